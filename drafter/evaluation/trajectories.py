"""Trajectories: the target's own responses to prompts, generated once and kept under a key.

Replay reads every accepted length off them (method.md, Replay), so they must come from the very
target, dtype and sampling settings that are measured; all of these are part of the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from drafter.errors import UserError
from drafter.files import write_atomic
from drafter.sampling import GREEDY, Sampling, argmax
from drafter.target import Target

FORMAT = 3


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of a named set.

    Attributes:
        set_name: Such as "gsm8k".
        prompt_id: Its place in the set.
        ids: Prompt token ids, generation prompt included.
        response_ids: A stored response, used only where the caller trusts it.
        turn: Of its conversation, from 0; earlier turns stand in `ids` with the target's replies.
        text: The rendering that `ids` are the tokens of, generation prompt included; empty for one
            that came as token ids.
    """

    set_name: str
    prompt_id: int
    ids: list[int]
    response_ids: list[int] | None = None
    turn: int = 0
    text: str = ""

    @property
    def key(self) -> int:
        """What its random numbers are keyed by, whatever other prompts or ranks there are."""
        name = f"{self.set_name}/{self.prompt_id}" + (f"/{self.turn}" if self.turn else "")
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    @property
    def digest(self) -> str:
        """16 hex digits of a hash of its tokens."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Skipped:
    """A prompt that was not measured.

    Attributes:
        set_name: Its set.
        prompt_id: Its place in the set.
        turn: Of its conversation.
        reason: One clause.
    """

    set_name: str
    prompt_id: int
    turn: int
    reason: str


FollowUp = Callable[["Trajectory"], EvalPrompt | None]
"""Makes the prompt of a conversation's next turn from the target's reply to this one."""


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
    """Returns 20 hex digits of a hash over everything that determines a batch's responses.

    Prompts of one batch pad each other, which moves the last bits of bf16 sums: so the batch is
    what is kept and found again, not the prompt.
    """
    identity = {
        "format": FORMAT,
        "target": target.fingerprint,
        "ends": target.eos_token_ids,
        "dtype": str(target.dtype),
        "device": target.device.type,
        "settings": asdict(settings),
        "prompts": [[p.set_name, p.prompt_id, p.turn, p.ids] for p in prompts],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def batches_of(prompts: Sequence[EvalPrompt], batch_size: int) -> list[list[int]]:
    """Returns which prompts the target answers together: of one set, alike in length.

    Sets are kept apart, so that what is kept of one serves whatever others are measured with it.

    Raises:
        UserError: batch_size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    sets: dict[tuple[str, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        sets.setdefault((prompt.set_name, prompt.turn), []).append(index)
    batches = []
    for members in sets.values():
        members.sort(key=lambda i: (-len(prompts[i].ids), i))
        count = -(-len(members) // batch_size)
        edges = [round(n * len(members) / count) for n in range(count + 1)]
        batches += [members[a:b] for a, b in pairwise(edges)]
    return batches


def kept_trajectories(
    target: Target,
    prompts: Sequence[EvalPrompt],
    settings: TrajectorySettings,
    folder: Path,
    batch_size: int,
) -> int:
    """Returns how many of the prompts have a response in `folder` already."""
    return sum(
        len(batch)
        for batch in batches_of(prompts, batch_size)
        if _path(folder, target, [prompts[i] for i in batch], settings).exists()
    )


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
        folder: Where every finished batch is kept as `<key>.json`; None keeps nothing.
        batch_size: Prompts generated together.
        progress: Show a bar.

    Raises:
        UserError: A kept file is not readable.
    """
    found: dict[int, Trajectory] = {}
    batches = batches_of(prompts, batch_size)
    progress = progress and bool(prompts)
    title = "target answers"
    with tqdm(total=len(prompts), desc=title, unit="prompt", disable=not progress) as bar:
        for batch in batches:
            asked = [prompts[i] for i in batch]
            path = folder and _path(folder, target, asked, settings)
            if path and path.exists():
                answers = _read(path, asked)
                bar.update(len(batch))
            else:
                answers = _generate(target, asked, settings, bar)
                if path:
                    write_atomic(path, json.dumps([_to_json(answer) for answer in answers]))
            found.update(zip(batch, answers, strict=True))
    return [found[i] for i in range(len(prompts))]


def generate_conversations(
    target: Target,
    prompts: Sequence[EvalPrompt],
    settings: TrajectorySettings,
    follow_up: FollowUp,
    *,
    wanted: Callable[[EvalPrompt], bool] = lambda prompt: True,
    folder: Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[list[EvalPrompt], list[Trajectory]]:
    """Returns the prompts of all turns, and the target's responses to those that are wanted.

    The target's own reply stands in the context of the next turn.

    Args:
        target: As in `generate_trajectories`, like the other arguments.
        prompts: First turns.
        settings: Limit, sampling and seed.
        follow_up: Makes the next turn's prompt.
        wanted: Which prompts to answer; a turn after one that is not can't be asked.
        folder: Where batches are kept.
        batch_size: Prompts generated together.
        progress: Show bars.
    """
    asked: list[EvalPrompt] = []
    found: list[Trajectory] = []
    turn: list[EvalPrompt] = list(prompts)
    while turn:
        asked += turn
        answers = generate_trajectories(
            target,
            [prompt for prompt in turn if wanted(prompt)],
            settings,
            folder=folder,
            batch_size=batch_size,
            progress=progress,
        )
        found += answers
        turn = [following for a in answers if (following := follow_up(a)) is not None]
    return asked, found


def _generate(
    target: Target, prompts: Sequence[EvalPrompt], settings: TrajectorySettings, bar: Any
) -> list[Trajectory]:
    responses = target.generate(
        [prompt.ids for prompt in prompts],
        settings.max_new_tokens,
        settings.sampling,
        seed=settings.seed,
        prompt_ids=[prompt.key for prompt in prompts],
        batch_size=len(prompts),
        progress=bar,
    )
    return [
        Trajectory(prompt, list(r.ids), list(r.log_probs), r.finished)
        for prompt, r in zip(prompts, responses, strict=True)
    ]


def _path(
    folder: Path, target: Target, prompts: Sequence[EvalPrompt], settings: TrajectorySettings
) -> Path:
    return folder / f"{trajectory_key(target, prompts, settings)}.json"


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
