"""Measures one drafter on trajectories: by replay, or by the real decoding loop.

Legend: S tokens of prompt and response, L tapped layers, D hidden size, N drafted slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from drafter.blocks import PADDING_DOCUMENT
from drafter.decoding import (
    CachedDrafter,
    CachedTarget,
    Decoded,
    Rule,
    decode_plainly,
    decode_speculatively,
)
from drafter.evaluation.trajectories import Trajectory, TrajectorySettings
from drafter.metrics import AcceptanceByPosition, AcceptedLength, WasteRatio
from drafter.model import Drafter
from drafter.replay import ResponseCounts, count_decoded, count_rounds, replay_slots, thin
from drafter.sampling import GeneratorSource, keyed_uniforms
from drafter.target import Target

STREAM_DECODE = 2
"""Stream of `keyed_uniforms` that seeds the real loop's generator for a prompt."""


class DrafterMetrics(nn.Module):
    """The metrics of one prompt set, as one module whose states move and sync together.

    Args:
        num_drafted: N.
    """

    def __init__(self, num_drafted: int) -> None:
        super().__init__()
        self.length = AcceptedLength()
        self.by_position = AcceptanceByPosition(num_drafted)
        self.waste = WasteRatio()

    def update(self, counts: ResponseCounts) -> None:
        """Adds one response."""
        self.length.update(counts)
        self.by_position.update(counts)
        self.waste.update(counts)

    def compute(self) -> dict[str, Any]:
        """Returns all figures, floats and a list `accept_rate` of N; syncs over ranks."""
        out: dict[str, Any] = {k: float(v) for k, v in self.length.compute().items()}
        out |= {k: float(v) for k, v in self.waste.compute().items()}
        out["accept_rate"] = self.by_position.compute().tolist()
        return out


FEATURE_BATCH_TOKENS = 4096
"""Tokens that the target runs at once, padding included, to give features for replay."""


@dataclass
class FeatureStore:
    """Target features of trajectories, kept between epochs up to a budget of bytes.

    Args:
        budget_bytes: 0 keeps nothing beyond the batch in use.
    """

    budget_bytes: int = 0
    used: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def each(
        self, target: Target, trajectories: Sequence[Trajectory], layer_ids: tuple[int, ...]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (number, features (1, S, L*D)) of every trajectory, from memory where kept."""
        waiting = [i for i in range(len(trajectories)) if i not in self._kept]
        for index in sorted(self._kept):
            yield index, self._kept[index]
        # similar lengths together, or most of the work is padding; the longest first, so that it
        # sets its batch's size
        waiting.sort(key=lambda i: -trajectories[i].length)
        while waiting:
            size = max(1, FEATURE_BATCH_TOKENS // trajectories[waiting[0]].length)
            batch, waiting = waiting[:size], waiting[size:]
            rows = [trajectories[i].tokens for i in batch]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            documents = torch.full_like(ids, PADDING_DOCUMENT)
            for row, tokens in enumerate(rows):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                documents[row, : len(tokens)] = 0
            found = target.features(ids.to(target.device), documents.to(target.device), layer_ids)
            for row, index in enumerate(batch):
                states = found.hidden_states[row : row + 1, : len(rows[row])]
                size_bytes = states.numel() * states.element_size()
                if self.used + size_bytes <= self.budget_bytes:
                    self.used += size_bytes
                    self._kept[index] = states.clone()  # a view would keep the whole batch
                yield index, states


@dataclass(frozen=True)
class MeasuredResponse:
    """One trajectory's rounds, and the text they make (the real loop's own, in decode mode)."""

    trajectory: Trajectory
    counts: ResponseCounts
    """What figures are made of; expectations in replay with a temperature."""
    drawn: ResponseCounts
    """Rounds that really happened, or one draw of them: for histograms and samples."""
    ids: list[int]
    seconds: dict[str, float] = field(default_factory=dict)
    plain_seconds: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def replay_trajectory(
    drafter: Drafter,
    target: Target,
    trajectory: Trajectory,
    settings: TrajectorySettings,
    hidden_states: Tensor,
    *,
    anchors_per_chunk: int = 128,
) -> MeasuredResponse:
    """Measures by one teacher-forced pass over every response position.

    Args:
        drafter: Unwrapped.
        target: That generated the trajectory.
        trajectory: Prompt and response.
        settings: It was generated under.
        hidden_states: (1, S, L*D), the target's features of prompt and response.
        anchors_per_chunk: Blocks at once.
    """
    prompt = trajectory.prompt
    input_ids = torch.tensor(trajectory.tokens, device=target.device)
    slots = replay_slots(
        drafter,
        target.embed,
        target.head,
        hidden_states,
        input_ids,
        len(prompt.ids),
        sampling=settings.sampling,
        log_probs=torch.tensor(trajectory.log_probs) if trajectory.log_probs else None,
        anchors_per_chunk=anchors_per_chunk,
    )
    counts = drawn = count_rounds(slots)
    if not settings.sampling.greedy:
        drawn = count_rounds(thin(slots, seed=settings.seed, prompt_id=prompt.key))
    return MeasuredResponse(trajectory, counts, drawn, trajectory.ids)


@torch.no_grad()
def decode_prompt(
    drafter: Drafter,
    target: Target,
    prompt_ids: Sequence[int],
    settings: TrajectorySettings,
    *,
    key: int = 0,
    rule: Rule = "rejection",
) -> Decoded:
    """Runs the real loop on one prompt, with random numbers keyed by (seed, prompt)."""
    target.check_length(len(prompt_ids), settings.max_new_tokens)
    engine = CachedTarget(target, drafter.config.target_layer_ids)
    return decode_speculatively(
        engine,
        CachedDrafter(drafter, target, engine),
        prompt_ids,
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=target.eos_token_ids,
        sampling=settings.sampling,
        source=_source(settings.seed, key),
        rule=rule,
    )


def decode_trajectory(
    drafter: Drafter,
    target: Target,
    trajectory: Trajectory,
    settings: TrajectorySettings,
    *,
    plain: bool = False,
) -> MeasuredResponse:
    """Measures by the real loop on the trajectory's prompt; `plain` times the target alone too."""
    prompt = trajectory.prompt
    decoded = decode_prompt(drafter, target, prompt.ids, settings, key=prompt.key)
    plain_seconds: dict[str, float] = {}
    if plain:
        plain_seconds = decode_plainly(
            CachedTarget(target),
            prompt.ids,
            max_new_tokens=settings.max_new_tokens,
            eos_token_ids=target.eos_token_ids,
            sampling=settings.sampling,
            source=_source(settings.seed, prompt.key),
        ).seconds
    counts = count_decoded(decoded.rounds, decoded.drafts, decoded.ids)
    return MeasuredResponse(trajectory, counts, counts, decoded.ids, decoded.seconds, plain_seconds)


def measure(
    drafter: Drafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    settings: TrajectorySettings,
    *,
    mode: str = "replay",
    features: FeatureStore | None = None,
    anchors_per_chunk: int = 128,
    plain: bool = False,
    progress: bool = False,
) -> Iterable[MeasuredResponse]:
    """Yields every trajectory's rounds; in replay, not always in the order given.

    Args:
        drafter: Unwrapped.
        target: That generated the trajectories.
        trajectories: Of any prompt sets.
        settings: They were generated under.
        mode: `replay` or `decode`.
        features: Kept between calls, in replay.
        anchors_per_chunk: Blocks at once, in replay.
        plain: Time the target alone too, in decode.
        progress: Show a bar.
    """
    assert mode in ("replay", "decode")
    title = f"verifying ({mode})"
    with tqdm(total=len(trajectories), desc=title, disable=not progress, leave=False) as bar:
        if mode == "decode":
            for trajectory in trajectories:
                yield decode_trajectory(drafter, target, trajectory, settings, plain=plain)
                bar.update()
            return
        store = features or FeatureStore()
        for index, states in store.each(target, trajectories, drafter.config.target_layer_ids):
            yield replay_trajectory(
                drafter,
                target,
                trajectories[index],
                settings,
                states,
                anchors_per_chunk=anchors_per_chunk,
            )
            bar.update()


def _source(seed: int, key: int) -> GeneratorSource:
    begin = int(keyed_uniforms(seed, key, 1, STREAM_DECODE)[0] * 2**53)
    return GeneratorSource(torch.Generator().manual_seed(begin))
