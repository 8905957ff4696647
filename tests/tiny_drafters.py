"""Small drafters that accept something: overfitted to a tiny target's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drafter.attention import build_visibilities
from drafter.blocks import DraftBatch, build_blocks
from drafter.config import DrafterConfig
from drafter.evaluation.trajectories import EvalPrompt
from drafter.head import score_blocks
from drafter.initialise import initialise_from_target
from drafter.model import Drafter
from drafter.target import Target
from tests.tiny import NUM_TOKENS


def overfitted_drafter(
    target: Target,
    prompts: Sequence[EvalPrompt],
    *,
    block_size: int = 4,
    steps: int = 60,
    new_tokens: int = 24,
    seed: int = 0,
    num_layers: int = 1,
    **layers: Any,
) -> Drafter:
    """A small drafter that was trained on the target's responses to these prompts.

    `layers` are fields of its config: how its layers see.
    """
    config = DrafterConfig.for_target(
        target.config,
        block_size=block_size,
        num_layers=num_layers,
        target_layer_ids=(0, 2),
        mask_token_id=NUM_TOKENS,
    )
    config = DrafterConfig.from_dict(config.to_dict() | layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(config)
    initialise_from_target(drafter, target.final_norm, target.layers, "norm")
    responses = target.generate([prompt.ids for prompt in prompts], new_tokens)
    pairs = [(p.ids, r.ids) for p, r in zip(prompts, responses, strict=True) if len(r.ids) > 2]
    batches = [_batch(target, config, prompt, response) for prompt, response in pairs]
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for batch in batches:
            blocks = build_blocks(batch, block_size, NUM_TOKENS)
            hidden = drafter(
                batch.hidden_states,
                batch.positions,
                target.embed(blocks.input_ids),
                blocks.positions,
                build_visibilities(
                    config.layer_attention, batch.anchors, batch.document_ids, block_size
                ),
            )
            scores = score_blocks(target.head, hidden, blocks)
            (-scores.log_prob.sum() / scores.valid.sum() / len(batches)).backward()
        optimizer.step()
    return drafter.eval().requires_grad_(False)


def _batch(
    target: Target, config: DrafterConfig, prompt: Sequence[int], response: Sequence[int]
) -> DraftBatch:
    row = torch.tensor([[*prompt, *response]])
    documents = torch.zeros_like(row)
    length = row.shape[1]
    return DraftBatch(
        input_ids=row,
        supervised=torch.arange(length)[None] >= len(prompt),
        document_ids=documents,
        positions=torch.arange(length)[None],
        anchors=torch.arange(len(prompt), length - 1)[None],
        sample_ids=torch.zeros(1, dtype=torch.long),
        hidden_states=target.features(row, documents, config.target_layer_ids).hidden_states,
    )
