"""Speculative decoding that the host does not wait in: a round is one recording, rows go together.

Legend: B rows (prompts side by side), N drafted slots, K = N + 1 block size, S places of a row, L
tapped layers, D hidden size, V vocabulary.

Draft, verification and acceptance all happen on the device, at fixed addresses: where a row stands
is a tensor there. So a round is recorded once (CUDA graphs), and the host only launches it, and
reads what a round gave while the next is running. A row that has ended runs on for a round or two;
what it gives is dropped. The slow twin is the loop of `drafter.decoding`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from drafter.arriving import Arriving
from drafter.decoding import Decoded
from drafter.graphs import Recorder
from drafter.model import Drafter
from drafter.sampling import GREEDY, GeneratorSource, Sampling, argmax
from drafter.static_rows import StaticRows
from drafter.target import Target
from drafter.target_session import frozen
from drafter.verification import Verdict, clip_round

LAG = 1
"""Rounds launched before the oldest is read."""


@dataclass
class _Job:
    """A prompt, and its response so far."""

    prompt_ids: Sequence[int]
    source: GeneratorSource | None
    decoded: Decoded = field(default_factory=lambda: Decoded([]))
    begun: float = 0.0
    done: bool = False


@dataclass
class _Launched:
    """What the device was asked for: a row's first token, or a round of all rows."""

    jobs: list[_Job | None]
    out: Arriving
    """(1, 1) the first token; or (B, 2K), see `StaticDecoder.verify`."""
    is_round: bool


class StaticDecoder(StaticRows):
    """Decodes prompts in rows, speculatively or (without a drafter) a token a pass.

    Greedy, or with a temperature by sample-and-match: the target's token at each place is drawn,
    and drafts count as far as they agree. Either way a response is the target's own.

    Args:
        target: The frozen target.
        drafter: None for the target alone.
        rows: B.
        length: S, the most tokens of prompt and response.
        sampling: How the target's tokens are chosen.
        recorder: None for CUDA graphs on a GPU, and for running kernel by kernel on a CPU.

    Raises:
        UserError: The target's attention, or the drafter's rope, needs the host.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        rows: int = 1,
        length: int,
        sampling: Sampling = GREEDY,
        recorder: Recorder | None = None,
    ) -> None:
        block_size = 1 if drafter is None else drafter.config.block_size
        super().__init__(
            target,
            drafter,
            rows=rows,
            length=length,
            behind=(LAG + 2) * block_size,  # rows run on behind their end
            sampling=sampling,
            recorder=recorder,
        )
        with frozen(target.device):
            self._going_B = torch.zeros_like(self._length_B, dtype=torch.bool)
            self._draft_BN = self._length_B.new_zeros(rows, block_size - 1)
            self._out_BO = self._length_B.new_zeros(rows, 2 * block_size)
            # of the last round, and from which place on; not yet in the drafter's context
            self._taps = self._empty_taps(block_size)
            self._taps_start_B = torch.zeros_like(self._length_B)
        self._round: Callable[[], None] | None = None

    # ------------------------------------------------------------------ on the device

    def draft(self) -> None:
        """Drafts behind every row's anchor, after taking in what the last round committed."""
        assert self.drafter is not None
        offsets_K = torch.arange(self.block_size, device=self.target.device)
        self._take_in(self._taps, self._taps_start_B[:, None] + offsets_K)
        logits_BNV = self.drafter.head(self.target.head).logits(self._denoise())
        self._draft_BN.copy_(argmax(logits_BNV))

    def verify(self) -> None:
        """Runs the target over every row's block and moves on by what it agrees with.

        Leaves (B, 2K): the target's K tokens, the N drafts, and how many of these it accepted.
        """
        offsets_K = torch.arange(self.block_size, device=self.target.device)
        ids_BK = torch.cat((self._anchor_B[:, None], self._draft_BN), 1)
        last_BKD, taps = self._static.run(ids_BK, self._length_B[:, None] + offsets_K)
        logits_BKV = self.target.head.logits(last_BKD)
        chosen_BK = self._choose(logits_BKV, self._emitted_B[:, None] + offsets_K)
        agrees_BN = self._draft_BN == chosen_BK[:, :-1]
        accepted_B = agrees_BN.long().cumprod(1).sum(1)
        self._out_BO.copy_(torch.cat((chosen_BK, self._draft_BN, accepted_B[:, None]), 1))
        self._taps.copy_(taps)
        self._taps_start_B.copy_(self._length_B)
        newest_B = chosen_BK.gather(1, accepted_B[:, None]).squeeze(1)
        self._anchor_B.copy_(torch.where(self._going_B, newest_B, self._anchor_B))
        count_B = torch.where(self._going_B, accepted_B + 1, 0)
        self._length_B.add_(count_B)
        self._emitted_B.add_(count_B)

    def stand_at(self, length: int) -> None:
        """Puts all rows at a place where they stay: for timing `draft` and `verify`."""
        self._going_B.fill_(False)
        self._length_B.fill_(length)
        self._taps_start_B.fill_(length)

    def _do_round(self) -> None:
        if self.drafter is not None:
            self.draft()
        self.verify()

    def _begin(self, row: int, job: _Job, max_new_tokens: int) -> _Launched:
        """Runs a prompt, and puts its row where the first round begins."""
        job.begun = time.perf_counter()
        first_11 = self._prefill(row, job.prompt_ids, job.source, max_new_tokens)
        with frozen(self.target.device):
            self._going_B[row] = True
            # nothing to take in yet: this is written where no anchor sees it, and then over it
            self._taps_start_B[row] = len(job.prompt_ids)
        return _Launched([job], Arriving(first_11), is_round=False)

    # ------------------------------------------------------------------ on the host

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int] | None = None,
        sources: Sequence[GeneratorSource] | None = None,
    ) -> list[Decoded]:
        """Returns the target's own responses, in the order of the prompts.

        Args:
            prompts: Token ids, at least one each; more than B of them take rows as they get free.
            max_new_tokens: At least 1.
            eos_token_ids: Any of them ends a response; None for the target's.
            sources: Random decisions of each prompt, one for each token; needed unless greedy.

        Raises:
            UserError: A prompt is empty, or does not fit with its response into S, or into the
                target's context.
        """
        self._check(prompts, max_new_tokens, sources)
        self.stand_at(0)  # an interrupted call may have left rows going
        ends = self.target.eos_token_ids if eos_token_ids is None else eos_token_ids
        none: list[GeneratorSource | None] = [None] * len(prompts)
        jobs = [_Job(*pair) for pair in zip(prompts, sources or none, strict=True)]
        waiting = deque(jobs)
        rows: list[_Job | None] = [None] * self.rows
        launched: deque[_Launched] = deque()
        while waiting or any(rows) or launched:
            for row, job in enumerate(rows):
                if (job is None or job.done) and waiting:
                    begun = rows[row] = waiting.popleft()
                    launched.append(self._begin(row, begun, max_new_tokens))
                elif job is not None and job.done:
                    rows[row] = None
                    self._going_B[row] = False
            if any(rows):
                launched.append(self._launch(list(rows)))
            while len(launched) > (LAG if any(rows) else 0):
                self._read(launched.popleft(), max_new_tokens, ends)
        return [job.decoded for job in jobs]

    def _launch(self, jobs: list[_Job | None]) -> _Launched:
        if self._round is None:
            state = [self._anchor_B, self._length_B, self._emitted_B]
            self._round = self._record(self._do_round, [*state, self._taps_start_B, self._taps])
        self._round()
        # on a CPU nothing is on its way: the next round would write over it
        out = self._out_BO if self._out_BO.is_cuda else self._out_BO.clone()
        return _Launched(jobs, Arriving(out), is_round=True)

    def _read(self, launched: _Launched, max_new_tokens: int, ends: Collection[int]) -> None:
        rows = launched.out.read().tolist()
        for job, numbers in zip(launched.jobs, rows, strict=True):
            if job is None or job.done:
                continue
            out = job.decoded
            if launched.is_round:
                chosen, draft = numbers[: self.block_size], numbers[self.block_size : -1]
                round_ = clip_round(
                    draft,
                    Verdict(numbers[-1], chosen[numbers[-1]]),
                    eos_token_ids=ends,
                    remaining=max_new_tokens - len(out.ids),
                    block_size=self.block_size,
                )
                out.ids += round_.tokens
                if self.drafter is not None:
                    out.rounds.append(round_)
                    out.drafts.append(draft)
            else:
                out.ids += numbers
            out.finished = out.ids[-1] in ends
            job.done = out.finished or len(out.ids) >= max_new_tokens
            if job.done:
                out.seconds = {"decode": time.perf_counter() - job.begun}
