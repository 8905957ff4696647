"""The speculative decoding loop, written against two small engines.

Legend: N drafted slots, V vocabulary, L tapped layers, D hidden size.

The engines hide the caches; the loop decides. After every round the target's cache holds exactly
the committed tokens but the newest (not yet run), and the drafter's context the same positions.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from drafter.blocks import block_input_ids
from drafter.draft_length import DraftLength, confidence_of
from drafter.model import DraftContext, Drafter
from drafter.sampling import GREEDY, GeneratorSource, RandomSource, Sampling, argmax, warp
from drafter.target import Target
from drafter.verification import (
    Round,
    Verdict,
    clip_round,
    one_hot,
    verify_greedy,
    verify_rejection,
    verify_sample_and_match,
)

Rule = Literal["rejection", "rejection-argmax", "sample-and-match"]


class TargetEngine(Protocol):
    """The target side of the loop."""

    def prefill(self, prompt_ids: Sequence[int]) -> Tensor:
        """Runs the prompt in a new cache; returns logits (V,) for the first response token."""
        ...

    def verify(self, block_ids: Sequence[int]) -> Tensor:
        """Runs a block (anchor and drafts) behind the cache; returns logits (len(block), V)."""
        ...

    def commit(self, count: int) -> None:
        """Keeps the first `count` tokens of the block just run, and drops the others."""
        ...


class DrafterEngine(Protocol):
    """The drafter side of the loop."""

    @property
    def block_size(self) -> int:
        """K."""
        ...

    def draft(self, anchor_id: int) -> Tensor:
        """Returns logits (n, V) for the slots behind the anchor, from committed context only.

        A block-diffusion drafter gives n = N; one that has nothing to offer may give fewer, or 0.
        """
        ...


@dataclass
class Decoded:
    """A response and how it came about.

    Attributes:
        ids: Response token ids, with the EOS that ended it.
        rounds: In order; the first token is prefill's and belongs to none.
        drafts: N argmax draft tokens of each round, also where sampled ones were verified.
        trees: Depths of the nodes of each round's tree, where trees were.
        seconds: By phase: prefill, draft, verify, bookkeeping; synchronised on CUDA.
        finished: Whether an EOS ended it.
    """

    ids: list[int]
    rounds: list[Round] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    trees: list[list[int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    def take(self, round_: Round, draft: list[int], eos_token_ids: Collection[int]) -> None:
        """Adds a round and its argmax draft."""
        self.ids += round_.tokens
        self.rounds.append(round_)
        self.drafts.append(draft)
        self.finished = self.ids[-1] in eos_token_ids

    @property
    def round_lengths(self) -> list[int]:
        """Tokens emitted by each round."""
        return [round_.length for round_ in self.rounds]


def decode_speculatively(
    target: TargetEngine,
    drafter: DrafterEngine,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    sampling: Sampling = GREEDY,
    source: RandomSource | None = None,
    rule: Rule = "rejection",
) -> Decoded:
    """Returns the target's own response to a prompt, drafted in blocks and verified exactly.

    Args:
        target: Fresh for each prompt.
        drafter: Likewise.
        prompt_ids: At least one token.
        max_new_tokens: At least 1.
        eos_token_ids: Any of them ends the response.
        sampling: Greedy, or the warp of both p and q.
        source: Random decisions; needed unless greedy.
        rule: With a temperature: drafts sampled from q and rejection sampling, argmax drafts and
            rejection sampling against a one-hot q, or argmax drafts and sample-and-match.
    """
    source = source or GeneratorSource(torch.Generator().manual_seed(0))
    clock = Clock()
    first_logits = target.prefill(prompt_ids)
    clock.lap("prefill", first_logits)
    first = choose(first_logits, sampling, source)
    out = Decoded([first], finished=first in eos_token_ids)
    while not out.finished and len(out.ids) < max_new_tokens:
        draft_logits = drafter.draft(out.ids[-1])
        clock.lap("draft", draft_logits)
        draft, q_NV = _draw_draft(draft_logits, sampling, source, rule)
        clock.lap("bookkeeping", draft_logits)
        target_logits = target.verify([out.ids[-1], *draft])
        clock.lap("verify", target_logits)
        verdict = _verify(draft, q_NV, target_logits, sampling, source, rule)
        round_ = clip_round(
            draft,
            verdict,
            eos_token_ids=eos_token_ids,
            remaining=max_new_tokens - len(out.ids),
            block_size=drafter.block_size,
        )
        # the anchor and all but the newest emitted token have been run
        target.commit(round_.length)
        argmax_draft = argmax(draft_logits).tolist() if q_NV is not None else draft
        out.take(round_, argmax_draft, eos_token_ids)
        clock.lap("bookkeeping", target_logits)
    out.seconds = clock.seconds
    return out


def decode_plainly(
    target: TargetEngine,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    sampling: Sampling = GREEDY,
    source: RandomSource | None = None,
) -> Decoded:
    """Returns the target's response, one token a pass: the baseline of the loop above."""
    source = source or GeneratorSource(torch.Generator().manual_seed(0))
    clock = Clock()
    logits = target.prefill(prompt_ids)
    clock.lap("prefill", logits)
    out = Decoded([choose(logits, sampling, source)])
    while out.ids[-1] not in eos_token_ids and len(out.ids) < max_new_tokens:
        logits = target.verify([out.ids[-1]])
        clock.lap("verify", logits)
        target.commit(1)
        out.ids.append(choose(logits[-1], sampling, source))
        clock.lap("bookkeeping", logits)
    out.finished = out.ids[-1] in eos_token_ids
    out.seconds = clock.seconds
    return out


def choose(logits_V: Tensor, sampling: Sampling, source: RandomSource) -> int:
    """Returns the target's token for one position."""
    if sampling.greedy:
        return int(argmax(logits_V))
    return source.categorical(warp(logits_V, sampling))


def _draw_draft(
    logits_NV: Tensor, sampling: Sampling, source: RandomSource, rule: Rule
) -> tuple[list[int], Tensor | None]:
    """Returns N draft tokens and the distributions that they were really drawn from."""
    if sampling.greedy or rule == "sample-and-match":
        return argmax(logits_NV).tolist(), None
    if rule == "rejection-argmax":
        draft = argmax(logits_NV).tolist()
        return draft, one_hot(draft, logits_NV.shape[-1], logits_NV)
    q_NV = warp(logits_NV, sampling)
    return [source.categorical(q_V) for q_V in q_NV], q_NV


def _verify(
    draft: list[int],
    q_NV: Tensor | None,
    target_logits: Tensor,
    sampling: Sampling,
    source: RandomSource,
    rule: Rule,
) -> Verdict:
    if sampling.greedy:
        return verify_greedy(draft, argmax(target_logits).tolist())
    p_MV = warp(target_logits, sampling)
    if rule == "sample-and-match":
        return verify_sample_and_match(draft, p_MV, source)
    assert q_NV is not None
    return verify_rejection(draft, q_NV, p_MV, source)


class CachedTarget:
    """`TargetEngine` over a `Target` session; hands committed features to the drafter.

    Args:
        target: The frozen target.
        layer_ids: Tapped layers of the drafter, or () for plain decoding.
    """

    def __init__(self, target: Target, layer_ids: Sequence[int] = ()) -> None:
        self._target = target
        self._layer_ids = tuple(layer_ids)
        self.session = target.session()
        self._taps: list[Tensor] = []
        self._block_taps: Tensor | None = None
        self._block: list[int] = []
        self.committed: list[int] = []
        """Token ids in the cache: prompt and response but for the newest token."""
        self.passes = 0
        """Passes of the target so far, prefill included."""

    def prefill(self, prompt_ids: Sequence[int]) -> Tensor:
        """See `TargetEngine`."""
        last_hidden, taps = self._forward(prompt_ids)
        self._taps.append(taps)
        self.committed = list(prompt_ids)
        return self._target.head.logits(last_hidden[-1])

    def verify(self, block_ids: Sequence[int]) -> Tensor:
        """See `TargetEngine`."""
        last_hidden, self._block_taps = self._forward(block_ids)
        self._block = list(block_ids)
        return self._target.head.logits(last_hidden)

    def commit(self, count: int) -> None:
        """See `TargetEngine`."""
        assert self._block_taps is not None
        self._taps.append(self._block_taps[:count])
        self.committed += self._block[:count]
        self.session.crop(len(self.committed))

    def take_features(self) -> Tensor:
        """Returns (n, L*D) features committed since the last call."""
        taps, self._taps = torch.cat(self._taps), []
        return taps

    def _forward(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor(list(ids), device=self._target.device)
        last_hidden, taps = self.session.forward(tokens, self._layer_ids)
        self.passes += 1
        return last_hidden, taps


class CachedDrafter:
    """`DrafterEngine` over a `Drafter` and the features that a `CachedTarget` commits.

    Args:
        drafter: The unwrapped drafter.
        target: Lends embedding and head.
        engine: Of the same prompt.
        length: Cuts drafts; None verifies all slots.
    """

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        engine: CachedTarget,
        length: DraftLength | None = None,
    ) -> None:
        self._drafter = drafter
        self._target = target
        self._engine = engine
        self._length = length
        self.context = DraftContext()

    @property
    def block_size(self) -> int:
        """K."""
        return self._drafter.config.block_size

    @torch.no_grad()
    def draft(self, anchor_id: int) -> Tensor:
        """See `DrafterEngine`."""
        features = self._engine.take_features()
        start, device = self.context.length, features.device
        positions = torch.arange(start, start + len(features), device=device)
        self.context = self._drafter.encode_context(
            features.unsqueeze(0), positions.unsqueeze(0), self.context
        )
        anchor = torch.tensor([[anchor_id]], device=device)
        mask_id = self._drafter.config.mask_token_id
        block_ids = block_input_ids(anchor, self.block_size, mask_id)
        slots = self.context.length + torch.arange(self.block_size, device=device)
        hidden = self._drafter.denoise(
            self._target.embed(block_ids), slots.view(1, 1, -1), self.context
        )
        states_ND = hidden[0, 0, 1:]
        logits_NV = self._drafter.head(self._target.head).logits(states_ND)
        if self._length is None:
            return logits_NV
        return self._length.cut(logits_NV, confidence_of(self._drafter, states_ND, logits_NV))


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, tensor: Tensor) -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
