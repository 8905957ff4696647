"""What `predict` does with one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drafter.evaluation.measure import decode_prompt
from drafter.evaluation.trajectories import EvalPrompt, TrajectorySettings
from drafter.model import Drafter
from drafter.sampling import Sampling
from drafter.target import Target


@dataclass(frozen=True)
class Decoding:
    """How `predict` decodes.

    Args:
        max_new_tokens: Limit of a response in tokens.
        temperature: 0 is greedy.
        top_k: Keep the k most probable tokens; 0 for all.
        top_p: Keep the most probable tokens up to this mass.
        seed: Of sampled responses.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def predict_prompt(
    drafter: Drafter, target: Target, prompt: EvalPrompt, decoding: Decoding
) -> dict[str, Any]:
    """Returns a response by the real speculative loop, as plain values for a JSON line."""
    settings = TrajectorySettings(
        decoding.max_new_tokens,
        Sampling(decoding.temperature, decoding.top_k, decoding.top_p),
        decoding.seed,
    )
    decoded = decode_prompt(drafter, target, prompt.ids, settings, key=prompt.key)
    seconds = sum(decoded.seconds.values())
    return {
        "set": prompt.set_name,
        "id": prompt.prompt_id,
        "prompt_ids": prompt.ids,
        "response_ids": decoded.ids,
        "text": target.tokenizer.decode(decoded.ids, skip_special_tokens=True),
        "round_lengths": decoded.round_lengths,
        "accepted": [round_.accepted for round_ in decoded.rounds],
        "finished": decoded.finished,
        "seconds": seconds,
        "tokens_per_second": len(decoded.ids) / max(seconds, 1e-9),
    }
