"""Measures one drafter on trajectories: by replay, or by the real decoding loop.

Legend: S tokens of prompt and response, L tapped layers, D hidden size, N drafted slots.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from drafter.decoding import (
    CachedDrafter,
    CachedTarget,
    Decoded,
    DrafterEngine,
    Rule,
    decode_plainly,
    decode_speculatively,
)
from drafter.draft_length import DraftLength
from drafter.evaluation.trajectories import Trajectory, TrajectorySettings
from drafter.metrics import AcceptanceByPosition, AcceptedLength, WasteRatio
from drafter.model import Drafter
from drafter.packing import batches_by_length, pad_rows
from drafter.prompt_lookup import PromptLookup
from drafter.replay import (
    ResponseCounts,
    SlotResults,
    count_decoded,
    count_rounds,
    replay_slots,
    replay_trees,
    thin,
)
from drafter.sampling import GeneratorSource, keyed_uniforms
from drafter.search import Search
from drafter.target import Target
from drafter.tree_decoding import CachedTreeTarget, decode_with_search

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
    """Target features of trajectories, kept between drafters and epochs up to a budget of bytes.

    Args:
        budget_bytes: 0 keeps nothing beyond the batch in use.
    """

    budget_bytes: int = 0
    used: int = 0
    _kept: dict[Hashable, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def each(
        self,
        target: Target,
        trajectories: Sequence[Trajectory],
        layer_ids: tuple[int, ...],
        done: Collection[int] = (),
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """Yields batches of (number, features (1, S, L*D)), from memory where kept.

        Which trajectories are run together depends on the trajectories alone: what a batch gives
        is the same to the bit whatever was `done` before.

        Args:
            target: That generated the trajectories.
            trajectories: Of one or more sets.
            layer_ids: Tapped layers.
            done: Numbers not needed; a batch of nothing else does not run.
        """
        for batch in feature_batches(trajectories):
            if all(index in done for index in batch):
                continue
            names = [
                (target.fingerprint, target.dtype, layer_ids, tuple(trajectories[i].tokens))
                for i in batch
            ]
            stored = [target.kept_features(trajectories[i].tokens, layer_ids) for i in batch]
            if all(own is not None for own in stored):
                states = [own for own in stored if own is not None]
            elif not all(name in self._kept for name in names):
                states = self.run(target, [trajectories[i] for i in batch], layer_ids)
                for name, own in zip(names, states, strict=True):
                    size_bytes = own.numel() * own.element_size()
                    if name not in self._kept and self.used + size_bytes <= self.budget_bytes:
                        self.used += size_bytes
                        self._kept[name] = own.clone()  # a view would keep the whole batch
            else:
                states = [self._kept[name] for name in names]
            yield [(i, own) for i, own in zip(batch, states, strict=True) if i not in done]

    @staticmethod
    def run(
        target: Target, trajectories: Sequence[Trajectory], layer_ids: tuple[int, ...]
    ) -> list[Tensor]:
        """Returns features (1, S, L*D) of a batch of trajectories, by one pass of the target."""
        rows = [trajectory.tokens for trajectory in trajectories]
        ids, documents = pad_rows(rows, target.device)
        found = target.features(ids, documents, layer_ids)
        return [
            found.hidden_states[row : row + 1, : len(tokens)] for row, tokens in enumerate(rows)
        ]


def feature_batches(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Returns which trajectories the target runs together, within FEATURE_BATCH_TOKENS."""
    return batches_by_length([t.length for t in trajectories], FEATURE_BATCH_TOKENS)


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
    """By phase of the real loop; see `Decoded`."""


@torch.no_grad()
def replay_trajectory(
    drafter: Drafter,
    target: Target,
    trajectory: Trajectory,
    settings: TrajectorySettings,
    hidden_states: Tensor,
    *,
    search: Search | None = None,
    length: DraftLength | None = None,
    anchors_per_chunk: int = 128,
) -> MeasuredResponse:
    """Measures by one teacher-forced pass over every response position.

    Args:
        drafter: Unwrapped.
        target: That generated the trajectory.
        trajectory: Prompt and response.
        settings: It was generated under.
        hidden_states: (1, S, L*D), the target's features of prompt and response.
        search: Trees of drafts; None for one draft.
        length: Cuts the one draft; None verifies all slots.
        anchors_per_chunk: Blocks at once.
    """
    prompt = trajectory.prompt
    if search is not None:
        trees = replay_trees(
            drafter,
            target.embed,
            target.head,
            hidden_states,
            torch.tensor(trajectory.tokens, device=target.device),
            len(prompt.ids),
            search=search,
            seed=settings.seed,
            key=prompt.key,
            anchors_per_chunk=anchors_per_chunk,
        )
        certain = count_rounds(trees)
        return MeasuredResponse(trajectory, certain, certain, trajectory.ids)
    slots = slots_of(
        drafter,
        target,
        trajectory,
        settings,
        hidden_states,
        length=length,
        anchors_per_chunk=anchors_per_chunk,
    )
    counts = drawn = count_rounds(slots)
    if not settings.sampling.greedy:
        drawn = count_rounds(thin(slots, seed=settings.seed, prompt_id=prompt.key))
    return MeasuredResponse(trajectory, counts, drawn, trajectory.ids)


def slots_of(
    drafter: Drafter,
    target: Target,
    trajectory: Trajectory,
    settings: TrajectorySettings,
    hidden_states: Tensor,
    *,
    length: DraftLength | None = None,
    anchors_per_chunk: int = 128,
) -> SlotResults:
    """Returns what the blocks at all anchors of a trajectory drafted; see `replay_trajectory`."""
    return replay_slots(
        drafter,
        target.embed,
        target.head,
        hidden_states,
        torch.tensor(trajectory.tokens, device=target.device),
        len(trajectory.prompt.ids),
        sampling=settings.sampling,
        log_probs=torch.tensor(trajectory.log_probs) if trajectory.log_probs else None,
        length=length,
        anchors_per_chunk=anchors_per_chunk,
    )


@torch.no_grad()
def decode_prompt(
    drafter: Drafter,
    target: Target,
    prompt_ids: Sequence[int],
    settings: TrajectorySettings,
    *,
    key: int = 0,
    rule: Rule = "rejection",
    search: Search | None = None,
    length: DraftLength | None = None,
) -> Decoded:
    """Runs the real loop on one prompt, with random numbers keyed by (seed, prompt)."""
    target.check_length(len(prompt_ids), settings.max_new_tokens)
    if search is not None:
        return _decode_by_search(drafter, target, prompt_ids, settings, key, search)
    engine = CachedTarget(target, drafter.config.target_layer_ids)
    drafts = CachedDrafter(drafter, target, engine, length)
    return run_loop(engine, drafts, target, prompt_ids, settings, key, rule)


def _decode_by_search(
    drafter: Drafter,
    target: Target,
    prompt_ids: Sequence[int],
    settings: TrajectorySettings,
    key: int,
    search: Search,
) -> Decoded:
    engine = CachedTreeTarget(target, drafter.config.target_layer_ids)
    decoded = decode_with_search(
        engine,
        CachedDrafter(drafter, target, engine),
        prompt_ids,
        search=search,
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=target.eos_token_ids,
        sampling=settings.sampling,
        source=keyed_source(settings.seed, key),
        seed=settings.seed,
        key=key,
    )
    _check_account(decoded, engine)
    return decoded


@torch.no_grad()
def decode_by_lookup(
    target: Target,
    prompt_ids: Sequence[int],
    settings: TrajectorySettings,
    block_size: int,
    *,
    key: int = 0,
) -> Decoded:
    """Runs the real loop with drafts copied from the context: the baseline without a model."""
    engine = CachedTarget(target)
    drafter = PromptLookup(engine, block_size, target.vocab_size, target.device)
    return run_loop(engine, drafter, target, prompt_ids, settings, key)


@torch.no_grad()
def decode_alone(
    target: Target, prompt_ids: Sequence[int], settings: TrajectorySettings, *, key: int = 0
) -> Decoded:
    """Runs the target alone on one prompt, a token a pass."""
    return decode_plainly(
        CachedTarget(target),
        prompt_ids,
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=target.eos_token_ids,
        sampling=settings.sampling,
        source=keyed_source(settings.seed, key),
    )


def run_loop(
    engine: CachedTarget,
    drafter: DrafterEngine,
    target: Target,
    prompt_ids: Sequence[int],
    settings: TrajectorySettings,
    key: int,
    rule: Rule = "rejection",
) -> Decoded:
    """Decodes speculatively, and holds the loop to its own account: two independent counts agree.

    Args:
        engine: Fresh, of this prompt.
        drafter: Likewise.
        target: Whose EOS tokens end the response.
        prompt_ids: At least one token.
        settings: Limit, sampling and seed.
        key: Of the prompt's random numbers.
        rule: See `decode_speculatively`.
    """
    decoded = decode_speculatively(
        engine,
        drafter,
        prompt_ids,
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=target.eos_token_ids,
        sampling=settings.sampling,
        source=keyed_source(settings.seed, key),
        rule=rule,
    )
    _check_account(decoded, engine)
    return decoded


def _check_account(decoded: Decoded, engine: CachedTarget) -> None:
    assert sum(decoded.round_lengths) == len(decoded.ids) - 1
    assert len(decoded.rounds) == engine.passes - 1  # the first is prefill


def decode_trajectory(
    drafter: Drafter, target: Target, trajectory: Trajectory, settings: TrajectorySettings
) -> MeasuredResponse:
    """Measures by the real loop on the trajectory's prompt."""
    prompt = trajectory.prompt
    decoded = decode_prompt(drafter, target, prompt.ids, settings, key=prompt.key)
    return measured(trajectory, decoded, drafter.config.num_drafted)


def measured(trajectory: Trajectory, decoded: Decoded, num_drafted: int) -> MeasuredResponse:
    """Returns what the real loop did on a trajectory's prompt, counted."""
    counts = count_decoded(decoded.rounds, decoded.drafts, decoded.ids, num_drafted, decoded.trees)
    return MeasuredResponse(trajectory, counts, counts, decoded.ids, decoded.seconds)


def measure(
    drafter: Drafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    settings: TrajectorySettings,
    *,
    mode: str = "replay",
    features: FeatureStore | None = None,
    anchors_per_chunk: int = 128,
    progress: bool = False,
) -> Iterator[MeasuredResponse]:
    """Yields every trajectory's rounds; in replay, not always in the order given.

    Args:
        drafter: Unwrapped.
        target: That generated the trajectories.
        trajectories: Of any prompt sets.
        settings: They were generated under.
        mode: `replay` or `decode`.
        features: Kept between calls, in replay.
        anchors_per_chunk: Blocks at once, in replay.
        progress: Show a bar.
    """
    assert mode in ("replay", "decode")
    title = f"verifying ({mode})"
    with tqdm(total=len(trajectories), desc=title, disable=not progress, leave=False) as bar:
        if mode == "decode":
            for trajectory in trajectories:
                yield decode_trajectory(drafter, target, trajectory, settings)
                bar.update()
            return
        store = features or FeatureStore()
        for batch in store.each(target, trajectories, drafter.config.target_layer_ids):
            for index, states in batch:
                yield replay_trajectory(
                    drafter,
                    target,
                    trajectories[index],
                    settings,
                    states,
                    anchors_per_chunk=anchors_per_chunk,
                )
                bar.update()


def keyed_source(seed: int, key: int) -> GeneratorSource:
    """Returns the random decisions of the real loop on one prompt."""
    begin = int(keyed_uniforms(seed, key, 1, STREAM_DECODE)[0] * 2**53)
    return GeneratorSource(torch.Generator().manual_seed(begin))
