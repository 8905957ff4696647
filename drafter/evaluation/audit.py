"""Explains every place where two exact paths disagree, or says that it can't.

In bf16 a pass over K tokens and a pass over one round differently, so greedy texts may part at a
near tie. A divergence is explained iff, at the common prefix in higher precision, the gap between
the two tokens is at most twice the largest error of their logits in either pass (method.md), and
both passes are about equally far from that higher precision over the whole vocabulary. Without the
second condition a pass that is plainly wrong would excuse itself by its own error. Anything else is
a bug.

Legend: N drafted slots, V vocabulary.
Source: method.md, Exact verification.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from drafter.blocks import block_input_ids
from drafter.decoding import CachedDrafter, CachedTarget, DrafterEngine
from drafter.evaluation.measure import FeatureStore, feature_batches, run_loop
from drafter.evaluation.trajectories import (
    EvalPrompt,
    Trajectory,
    TrajectorySettings,
    batches_of,
)
from drafter.model import Drafter
from drafter.replay import replay_logits
from drafter.sampling import argmax
from drafter.target import Target
from drafter.target_loading import Loaded


@dataclass(frozen=True)
class Divergence:
    """Where two paths part, and whether rounding explains it.

    Attributes:
        set_name: Of the prompt.
        prompt_id: Likewise.
        turn: Likewise.
        what: `text` (speculative against plain), or `replay text` and `replay draft` (the loop
            against replay: the target's tokens, or the drafter's).
        position: Response token at which they part.
        tokens: The two tokens.
        gap: Difference of their logits in higher precision.
        bound: Twice the largest error of the two logits in either pass.
        noise_ratio: Error of the worse pass over that of the better, root mean square over the
            vocabulary.
        explained: Whether gap <= bound and noise_ratio <= MOST_NOISE_RATIO.
        reproduced: Whether both passes, run again, chose these tokens; if not, nothing is known of
            what they were, and the divergence counts as unexplained.
    """

    set_name: str
    prompt_id: int
    turn: int
    what: str
    position: int
    tokens: tuple[int, int]
    gap: float
    bound: float
    noise_ratio: float
    explained: bool
    reproduced: bool = True


MOST_NOISE_RATIO = 6.0
"""Measured on SmolLM2 in bf16: right passes stay below 4.5 in 178 divergences; logits of a wrong
row come to 10 and more, a shifted position or a stale cache entry to 4 to 30 at the slots behind
it."""


def explain(
    tokens: tuple[int, int], passes: Sequence[Tensor], reference_V: Tensor
) -> tuple[float, float, float, bool]:
    """Returns (gap, bound, noise_ratio, explained) of two tokens that two passes chose between.

    Args:
        tokens: The two.
        passes: Logits (V,) of either pass, at its own precision.
        reference_V: Logits of the same prefix in higher precision; -inf at tokens outside a reduced
            draft vocabulary, which have no noise.

    Example:
        >>> explain((0, 1), [torch.tensor([1.0, 1.1]), torch.tensor([1.1, 1.0])],
        ...         torch.tensor([1.0, 1.0]))[-1]
        True
    """
    pair = torch.tensor(tokens)
    reference_V = reference_V.double().cpu()
    errors = [p.double().cpu() - reference_V for p in passes]
    bound = 2 * max(float(error[pair].abs().max()) for error in errors)
    gap = float((reference_V[tokens[0]] - reference_V[tokens[1]]).abs())
    kept_V = reference_V.isfinite()
    noise = sorted(float(error[kept_V].square().mean().sqrt()) for error in errors)
    if noise[0] == 0:  # one pass is right to the last bit: then so must be the other
        ratio = 1.0 if noise[-1] == 0 else math.inf
    else:
        ratio = noise[-1] / noise[0]
    return gap, bound, ratio, gap <= bound and ratio <= MOST_NOISE_RATIO


class _TappedTarget(CachedTarget):
    """Keeps the logits that the token at an absolute position was last chosen from."""

    def __init__(self, target: Target, layer_ids: Sequence[int], position: int) -> None:
        super().__init__(target, layer_ids)
        self._position = position
        self.logits_V: Tensor | None = None

    def prefill(self, prompt_ids: Sequence[int]) -> Tensor:
        logits_V = super().prefill(prompt_ids)
        if len(prompt_ids) == self._position:
            self.logits_V = logits_V
        return logits_V

    def verify(self, block_ids: Sequence[int]) -> Tensor:
        row = self._position - len(self.committed) - 1
        logits = super().verify(block_ids)
        if 0 <= row < len(logits):
            self.logits_V = logits[row]
        return logits


class _TappedDrafter(CachedDrafter):
    """Keeps the logits of the newest draft."""

    logits_NV: Tensor | None = None

    def draft(self, anchor_id: int) -> Tensor:
        self.logits_NV = super().draft(anchor_id)
        return self.logits_NV


class _NoDrafts:
    """Drafts nothing, so that the loop is plain decoding."""

    block_size = 1

    def __init__(self, target: Target) -> None:
        self._target = target

    def draft(self, anchor_id: int) -> Tensor:
        return torch.empty(0, self._target.vocab_size, device=self._target.device)


class Auditor:
    """Compares paths of one target and drafter; greedy only.

    Args:
        target: Frozen, at the dtype under audit.
        drafter: Unwrapped, likewise.
        settings: Of decoding.
        prompts: All that are measured, every turn: a batch that answered one of them, or that gave
            its features, is made again to have the very logits.
        batch_size: Prompts that were answered together.
        anchors_per_chunk: Blocks that were replayed together.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        settings: TrajectorySettings,
        prompts: Sequence[EvalPrompt] = (),
        batch_size: int = 32,
        anchors_per_chunk: int = 128,
    ) -> None:
        assert settings.sampling.greedy
        self.target = target
        self.drafter = drafter
        self.settings = settings
        self.prompts = list(prompts)
        self.batch_size = batch_size
        self.anchors_per_chunk = anchors_per_chunk

    @cached_property
    def _reference(self) -> tuple[Target, Drafter]:
        """Both models in the next higher precision; made only when something is to be explained."""
        higher = torch.float64 if self.target.dtype == torch.float32 else torch.float32
        model = copy.deepcopy(self.target.model).to(higher)
        loaded = Loaded(model, self.target.tokenizer)
        target = Target(loaded, self.target.path, self.target.gguf_file)
        return target, copy.deepcopy(self.drafter).to(higher)

    def compare_texts(
        self, prompt: EvalPrompt, speculative: Sequence[int], plain: Sequence[int]
    ) -> Divergence | None:
        """Returns where the speculative text leaves the target's own; None if it never does."""
        position = first_difference(speculative, plain)
        if position is None:
            return None
        tokens = _pair(speculative, plain, position)
        passes = [
            self._target_logits(prompt, position, speculating=True),
            self._target_logits(prompt, position, speculating=False),
        ]
        reference_V = self._teacher_forced(self._reference[0], prompt, plain[:position])
        return self._divergence(prompt, "text", position, tokens, passes, reference_V)

    def compare_rounds(
        self,
        trajectory: Trajectory,
        ids: Sequence[int],
        lengths: Sequence[int],
        replayed: Sequence[int],
        group: Sequence[Trajectory] = (),
    ) -> Divergence | None:
        """Returns where the real loop leaves replay; None if every round is the same.

        Args:
            trajectory: What was replayed.
            ids: Response of the real loop.
            lengths: Its rounds.
            replayed: The rounds of replay.
            group: The trajectories that were replayed with it, in order; () for it alone.
        """
        prompt = trajectory.prompt
        if list(lengths) == list(replayed) and list(ids) == trajectory.ids:
            return None
        anchor, same = 0, 0
        while same < min(len(lengths), len(replayed)) and lengths[same] == replayed[same]:
            anchor += lengths[same]
            same += 1
        position = first_difference(ids, trajectory.ids)
        # the same draft is cut where the target's token differs, so not after the shorter round
        shorter = 0
        if same < min(len(lengths), len(replayed)):
            shorter = min(lengths[same], replayed[same])
        if position is not None and position <= anchor + shorter:
            tokens = _pair(ids, trajectory.ids, position)
            before = trajectory.ids[:position]
            passes = [
                self._target_logits(prompt, position, speculating=True),
                self._generated_logits(prompt, position),
            ]
            reference_V = self._teacher_forced(self._reference[0], prompt, before)
            return self._divergence(prompt, "replay text", position, tokens, passes, reference_V)
        # the shorter round lost the slot that ended it, the longer one kept it
        slot = shorter - 1
        passes = [
            self._loop_draft(prompt, anchor)[slot],
            self._replayed_draft(trajectory, anchor, group or [trajectory])[slot],
        ]
        tokens = (int(passes[0].argmax()), int(passes[1].argmax()))
        reference_NV = self._teacher_forced_draft(*self._reference, trajectory, anchor)
        place = anchor + 1 + slot
        return self._divergence(prompt, "replay draft", place, tokens, passes, reference_NV[slot])

    @torch.no_grad()
    def _replayed_draft(
        self, trajectory: Trajectory, anchor: int, group: Sequence[Trajectory]
    ) -> Tensor:
        """Replays the block at a response token again, in the same company; logits (N, V)."""
        place = list(group).index(trajectory)
        batch = next(found for found in feature_batches(group) if place in found)
        layer_ids = self.drafter.config.target_layer_ids
        states = FeatureStore.run(self.target, [group[i] for i in batch], layer_ids)
        return replay_logits(
            self.drafter,
            self.target.embed,
            self.target.head,
            states[batch.index(place)],
            torch.tensor(trajectory.tokens, device=self.target.device),
            len(trajectory.prompt.ids),
            anchor,
            anchors_per_chunk=self.anchors_per_chunk,
        )

    def _generated_logits(self, prompt: EvalPrompt, position: int) -> Tensor:
        """Answers the prompt's batch again; logits (V,) that its token was chosen from."""
        prompts = self.prompts or [prompt]
        places = [(p.set_name, p.prompt_id, p.turn) for p in prompts]
        wanted = places.index(_place(prompt))
        batch = next(b for b in batches_of(prompts, self.batch_size) if wanted in b)
        kept: list[Tensor] = []

        def watch(place: int, step: int, logits_V: Tensor) -> None:
            if (batch[place], step) == (wanted, position):
                kept.append(logits_V.clone())

        self.target.generate(
            [prompts[i].ids for i in batch], position + 1, batch_size=len(batch), watch=watch
        )
        return kept[0]

    @torch.no_grad()
    def _target_logits(self, prompt: EvalPrompt, position: int, *, speculating: bool) -> Tensor:
        """Decodes again up to a position; returns the logits its token was chosen from."""
        layer_ids = self.drafter.config.target_layer_ids if speculating else ()
        engine = _TappedTarget(self.target, layer_ids, len(prompt.ids) + position)
        drafter: DrafterEngine = _NoDrafts(self.target)
        if speculating:
            drafter = CachedDrafter(self.drafter, self.target, engine)
        until = replace(self.settings, max_new_tokens=position + 1)
        run_loop(engine, drafter, self.target, prompt.ids, until, prompt.key)
        assert engine.logits_V is not None
        return engine.logits_V

    @torch.no_grad()
    def _loop_draft(self, prompt: EvalPrompt, anchor: int) -> Tensor:
        """Decodes again up to the round at an anchor; returns the logits (N, V) of its draft."""
        engine = CachedTarget(self.target, self.drafter.config.target_layer_ids)
        drafter = _TappedDrafter(self.drafter, self.target, engine)
        until = replace(self.settings, max_new_tokens=anchor + 2)
        run_loop(engine, drafter, self.target, prompt.ids, until, prompt.key)
        assert drafter.logits_NV is not None
        return drafter.logits_NV

    @torch.no_grad()
    def _teacher_forced(self, target: Target, prompt: EvalPrompt, before: Sequence[int]) -> Tensor:
        """Returns the logits (V,) after a prefix, by one pass."""
        ids = torch.tensor([[*prompt.ids, *before]], device=target.device)
        last, _ = target.run((), input_ids=ids)
        return target.head.logits(last[0, -1])

    @torch.no_grad()
    def _teacher_forced_draft(
        self, target: Target, drafter: Drafter, trajectory: Trajectory, anchor: int
    ) -> Tensor:
        """Returns the logits (N, V) of the block at a response token, by one pass."""
        config, device = drafter.config, target.device
        at = len(trajectory.prompt.ids) + anchor
        ids = torch.tensor([trajectory.tokens[:at]], device=device)
        states = target.features(ids, torch.zeros_like(ids), config.target_layer_ids).hidden_states
        context = drafter.encode_context(states, torch.arange(at, device=device)[None])
        anchor_id = torch.tensor([[trajectory.tokens[at]]], device=device)
        block = target.embed(block_input_ids(anchor_id, config.block_size, config.mask_token_id))
        positions = at + torch.arange(config.block_size, device=device)
        hidden = drafter.denoise(block, positions.view(1, 1, -1), context)
        return drafter.head(target.head).logits(hidden[0, 0, 1:])

    def _divergence(
        self,
        prompt: EvalPrompt,
        what: str,
        position: int,
        tokens: tuple[int, int],
        passes: Sequence[Tensor],
        reference_V: Tensor,
    ) -> Divergence:
        gap, bound, ratio, explained = explain(tokens, passes, reference_V)
        chosen = [int(argmax(logits_V)) for logits_V in passes]
        reproduced = chosen == list(tokens) and tokens[0] != tokens[1]
        return Divergence(
            *_place(prompt),
            what,
            position,
            tokens,
            gap,
            bound,
            ratio,
            explained and reproduced,
            reproduced,
        )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Returns the first index at which two token sequences differ; None if they are equal.

    Example:
        >>> first_difference([1, 2, 3], [1, 2, 4]), first_difference([1], [1])
        (2, None)
    """
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def _pair(a: Sequence[int], b: Sequence[int], position: int) -> tuple[int, int]:
    assert position < min(len(a), len(b)), "one text is a part of the other: an end was missed"
    return a[position], b[position]


def _place(prompt: EvalPrompt) -> tuple[str, int, int]:
    return prompt.set_name, prompt.prompt_id, prompt.turn
