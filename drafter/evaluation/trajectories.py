"""Trajectories: the target's own responses to prompts, generated once and kept under a key.

Replay reads every accepted length off them (method.md, Replay), so they must come from the very
target, dtype and sampling settings that are measured; all of these are part of the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from drafter.errors import UserError
from drafter.files import write_atomic
from drafter.sampling import GREEDY, Sampling, argmax
from drafter.target import Target

FORMAT = 2


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of a named set.

    Attributes:
        set_name: Such as "gsm8k".
        prompt_id: Its place in the set.
        ids: Prompt token ids, generation prompt included.
        response_ids: A stored response, used only where the caller trusts it.
    """

    set_name: str
    prompt_id: int
    ids: list[int]
    response_ids: list[int] | None = None

    @property
    def key(self) -> int:
        """What its random numbers are keyed by, whatever other prompts or ranks there are."""
        digest = hashlib.sha256(f"{self.set_name}/{self.prompt_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Trajectory:
    """What the target answered.

    Attributes:
        prompt: The prompt.
        ids: Response token ids, with the EOS that ended it.
        log_probs: log p(token) under the warped target distribution; empty for greedy ones.
        finished: Whether an EOS ended it rather than the limit of new tokens.
    """

    prompt: EvalPrompt
    ids: list[int]
    log_probs: list[float]
    finished: bool

    @property
    def tokens(self) -> list[int]:
        """Prompt and response."""
        return [*self.prompt.ids, *self.ids]

    @property
    def length(self) -> int:
        """S, tokens of prompt and response."""
        return len(self.prompt.ids) + len(self.ids)


@dataclass(frozen=True)
class TrajectorySettings:
    """Everything beside target and prompts that determines trajectories."""

    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0


def trajectory_key(
    target: Target, prompts: Sequence[EvalPrompt], settings: TrajectorySettings
) -> str:
    """Returns 20 hex digits of a hash over everything that determines the trajectories."""
    identity = {
        "format": FORMAT,
        "target": target.fingerprint,
        "dtype": str(target.dtype),
        "device": target.device.type,
        "settings": asdict(settings),
        "prompts": [[p.set_name, p.prompt_id, p.ids] for p in prompts],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def generate_trajectories(
    target: Target,
    prompts: Sequence[EvalPrompt],
    settings: TrajectorySettings,
    *,
    folder: Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Trajectory]:
    """Returns the target's responses in the order of the prompts, from `folder` if they are there.

    Args:
        target: Generates at its own dtype.
        prompts: Of any sets.
        settings: Limit, sampling and seed.
        folder: Where `<key>.json` is read and written (atomically); None keeps nothing.
        batch_size: Prompts generated together.
        progress: Show a bar.

    Raises:
        UserError: A kept file is not readable.
    """
    path = folder and folder / f"{trajectory_key(target, prompts, settings)}.json"
    if path and path.exists():
        return _read(path, prompts)
    responses = target.generate(
        [prompt.ids for prompt in prompts],
        settings.max_new_tokens,
        settings.sampling,
        seed=settings.seed,
        prompt_ids=[prompt.key for prompt in prompts],
        batch_size=batch_size,
        progress=progress,
    )
    trajectories = [
        Trajectory(prompt, list(r.ids), list(r.log_probs), r.finished)
        for prompt, r in zip(prompts, responses, strict=True)
    ]
    if path:
        write_atomic(path, json.dumps([_to_json(trajectory) for trajectory in trajectories]))
    return trajectories


def stored_trajectories(prompts: Sequence[EvalPrompt], max_new_tokens: int) -> list[Trajectory]:
    """Returns the responses that came with the prompts, cut to `max_new_tokens`.

    Raises:
        UserError: A prompt has none.
    """
    missing = [prompt for prompt in prompts if not prompt.response_ids]
    if missing:
        raise UserError(
            f"trust_responses is on, but prompt {missing[0].prompt_id} of set "
            f"'{missing[0].set_name}' has no stored response ({len(missing)} of {len(prompts)} "
            "have none); add response_ids, or turn trust_responses off."
        )
    return [
        Trajectory(
            prompt,
            (prompt.response_ids or [])[:max_new_tokens],
            [],
            len(prompt.response_ids or []) <= max_new_tokens,
        )
        for prompt in prompts
    ]


@torch.no_grad()
def target_argmax_share(target: Target, trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """Returns (response tokens that are the target's own argmax, response tokens).

    Stored responses stand in for trajectories only as far as the two are equal.
    """
    equal = total = 0
    for trajectory in trajectories:
        ids = torch.tensor(trajectory.tokens, device=target.device)
        documents = torch.zeros(1, len(ids), dtype=torch.long, device=ids.device)
        states = target.features(ids[None], documents, (0,), last_hidden=True).last_hidden
        assert states is not None
        before = states[0, len(trajectory.prompt.ids) - 1 : -1]
        labels = ids[len(trajectory.prompt.ids) :]
        rows = target.head.chunk_rows()
        for part, wanted in zip(before.split(rows), labels.split(rows), strict=True):
            equal += int((argmax(target.head.logits(part)) == wanted).sum())
        total += len(labels)
    return equal, total


def _to_json(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "ids": trajectory.ids,
        "log_probs": trajectory.log_probs,
        "finished": trajectory.finished,
    }


def _read(path: Path, prompts: Sequence[EvalPrompt]) -> list[Trajectory]:
    try:
        rows = json.loads(path.read_text())
        return [
            Trajectory(prompt, row["ids"], row["log_probs"], row["finished"])
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a trajectory file ({error}); delete it.") from error
