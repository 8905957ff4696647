"""Trees of drafts, and drafts cut by confidence, decoded from recordings: one prompt at a time.

Legend: N drafted slots, K = N + 1 block size, n nodes of a tree, B = 1 row, L tapped layers, D
hidden size, R tokens of a slot, M drafts, P places of a response.

A round is two recordings (CUDA graphs) and a little work of the host's between them. The first
takes in what the last round accepted, and drafts; the host builds the tree, or cuts the draft. The
second verifies it; the host follows the target's tokens through it. So the host waits for the
device twice a round. That is in the nature of it: which tree is verified depends on the draft, and
the heap that builds it runs on the host. Launches are what is saved.

The slow twins are the loops of `drafter.tree_decoding` and `drafter.decoding`: tokens and rounds
are the same, rounding of the target's passes apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from drafter.arriving import Arriving
from drafter.decoding import Clock, Decoded
from drafter.draft_length import DraftLength, confidence_of
from drafter.graphs import Recorder
from drafter.model import Drafter
from drafter.sampling import GREEDY, GeneratorSource, Sampling, argmax
from drafter.search import ROOT, Search, TokenTree, build, candidates, candidates_shape, merged
from drafter.static_rows import StaticRows, sent
from drafter.target import Target
from drafter.target_session import frozen
from drafter.verification import Verdict, clip_round, verify_tree

ROW_0 = -ROOT
"""Row of a tree's first node in a pass; the anchor is row 0."""


class StaticSearchDecoder(StaticRows):
    """Decodes prompts one after another, with several drafts at once or with drafts cut short.

    Greedy, or with a temperature by sample-and-match. Either way a response is the target's own.

    A pass that verifies has a fixed number of nodes: the budget, or M * N. A tree of fewer is
    padded with nodes that nothing sees, and costs what a full one does. Cut drafts have a recording
    for each length instead, all made before the first round.

    Args:
        target: The frozen target.
        drafter: Drafts N slots.
        plan: How one drafter pass becomes a tree, or how many of its slots are verified.
        length: The most tokens of prompt and response.
        sampling: How the target's tokens are chosen.
        recorder: None for CUDA graphs on a GPU, and for running kernel by kernel on a CPU.

    Raises:
        UserError: The target's attention, or the drafter's rope, needs the host; or the target
            can't verify trees.
    """

    drafter: Drafter

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        plan: Search | DraftLength,
        *,
        length: int,
        sampling: Sampling = GREEDY,
        recorder: Recorder | None = None,
    ) -> None:
        self.plan = plan
        slots = drafter.config.num_drafted
        self.node_counts = _node_counts(plan, slots)
        most = max(self.node_counts)
        super().__init__(
            target,
            drafter,
            rows=1,
            length=length,
            behind=1 + max(most, slots),
            sampling=sampling,
            recorder=recorder,
        )
        _ = target.tree_masks  # looks at what they do
        shape: tuple[int, ...] = (slots,)
        others = 0
        if isinstance(plan, Search):
            shape = candidates_shape(plan, slots, target.vocab_size)
            others = plan.uniforms(0, 0, 0, 1, slots).shape[1]
        device = target.device
        with frozen(device):
            self._static.join()
            # from the host: the anchor, how many tokens to take in, K rows of the last pass
            self._news = _Inbox((2 + self.block_size,), device)
            # likewise: tokens of a pass, and the row of each one's parent
            self._nodes = _Inbox((2, 1 + most), device)
            # to the host: N argmax drafts and what the plan reads; the target's tokens
            self._shape = (1, *shape)
            told = slots + math.prod(shape)
            self._told = torch.zeros(told, dtype=torch.double, device=device)
            self._chosen_1n = self._length_B.new_zeros(1, 1 + most)
            # what drafts behind each token of the response are drawn with, but for the argmax one
            self._drawn_PMN = self._told.new_zeros(length, others, slots)
            self._taps = self._empty_taps(1 + most)  # of the last pass
        self._recorded: tuple[Callable[[], None], dict[int, Callable[[], None]]] | None = None

    # ------------------------------------------------------------------ on the device

    def draft(self) -> None:
        """Takes in what the last round accepted, and drafts behind it."""
        self._advance()
        states_BND = self._denoise()
        logits_BNV = self.drafter.head(self.target.head).logits(states_BND)
        if isinstance(self.plan, DraftLength):
            found = confidence_of(self.drafter, states_BND, logits_BNV)
        else:
            drawn_BMN = self._drawn_PMN.index_select(0, self._emitted_B - 1)
            found = candidates(self.plan, logits_BNV, drawn_BMN)
        # ids and confidences are exact in fp64
        self._told.copy_(torch.cat((argmax(logits_BNV).double().flatten(), found.flatten())))

    def verify(self, count: int) -> None:
        """Runs the target over the anchor and `count` nodes; leaves its token behind each."""
        ids_1n, parents_n = self._nodes.there[:1, : 1 + count], self._nodes.there[1, : 1 + count]
        seen_nn = ancestors(parents_n, self.block_size - 1)
        depths_1n = seen_nn.sum(-1)[None] - 1
        last_1nD, taps = self._static.run_tree(ids_1n, self._length_B, depths_1n, seen_nn[None])
        logits_1nV = self.target.head.logits(last_1nD)
        chosen_1n = self._choose(logits_1nV, self._emitted_B[:, None] + depths_1n)
        self._chosen_1n[:, : 1 + count].copy_(chosen_1n)
        self._taps[:, : 1 + count].copy_(taps)

    def _advance(self) -> None:
        """Moves accepted nodes to their positions, in both models' caches, and the row with them.

        K rows are moved whatever their number is: what lies behind an anchor nobody sees.
        """
        anchor_1, count_1, rows_K = self._news.there.split((1, 1, self.block_size))
        start_B1 = self._length_B[:, None]
        places_1K = start_B1 + torch.arange(self.block_size, device=rows_K.device)
        self._static.move(start_B1 + rows_K, places_1K)
        self._take_in(self._taps.index_select(1, rows_K), places_1K)
        self._anchor_B.copy_(anchor_1)
        self._length_B.add_(count_1)
        self._emitted_B.add_(count_1)

    # ------------------------------------------------------------------ on the host

    def stand_at(self, length: int) -> None:
        """Puts the row at a place where it stays: for timing `draft` and `verify`."""
        self._news.put([0] * (2 + self.block_size))
        self._nodes.put(self._padded(0, TokenTree([], [])))
        self._length_B.fill_(length)
        self._emitted_B.fill_(1)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int] | None = None,
        sources: Sequence[GeneratorSource] | None = None,
        seed: int = 0,
        keys: Sequence[int] | None = None,
    ) -> list[Decoded]:
        """Returns the target's own responses, in the order of the prompts.

        Args:
            prompts: Token ids, at least one each.
            max_new_tokens: At least 1.
            eos_token_ids: Any of them ends a response; None for the target's.
            sources: Random decisions of each prompt, one for each token; needed unless greedy.
            seed: Of drafts that are drawn.
            keys: Of each prompt, likewise; None for 0, 1, 2, ...

        Raises:
            UserError: A prompt is empty, or does not fit with its response into the decoder's
                length, or into the target's context.
        """
        self._check(prompts, max_new_tokens, sources)
        if self._recorded is None:
            self._record_all()
        ends = self.target.eos_token_ids if eos_token_ids is None else eos_token_ids
        none: list[GeneratorSource | None] = [None] * len(prompts)
        found = []
        for prompt, source, key in zip(
            prompts, sources or none, keys or range(len(prompts)), strict=True
        ):
            if isinstance(self.plan, Search) and self._drawn_PMN.numel():
                slots = self.block_size - 1
                drawn = self.plan.uniforms(seed, key, 0, max_new_tokens, slots)
                self._drawn_PMN[:max_new_tokens] = sent(drawn, self.target.device)
            found.append(self._decode(prompt, source, max_new_tokens, ends))
        return found

    def _decode(
        self,
        prompt_ids: Sequence[int],
        source: GeneratorSource | None,
        max_new_tokens: int,
        ends: Collection[int],
    ) -> Decoded:
        assert self._recorded is not None
        run_draft, run_verify = self._recorded
        clock = Clock()  # what is read below has arrived: a lap is done when it ends
        first = Arriving(self._prefill(0, prompt_ids, source, max_new_tokens)).read()
        clock.lap("prefill", first)
        out = Decoded(first[0].tolist(), finished=int(first) in ends)
        rows: list[int] = []  # of the last pass, to take in
        while not out.finished and len(out.ids) < max_new_tokens:
            self._news.put([out.ids[-1], len(rows), *rows, *[0] * (self.block_size - len(rows))])
            run_draft()
            told = Arriving(self._told).read()
            clock.lap("draft", told)
            draft, tree = self._plan(told)
            count = next(count for count in self.node_counts if count >= len(tree.tokens))
            self._nodes.put(self._padded(out.ids[-1], tree))
            clock.lap("bookkeeping", told)
            run_verify[count]()
            wanted = Arriving(self._chosen_1n).read()[0].tolist()
            clock.lap("verify", told)
            path, following = _follow(tree, wanted)
            round_ = clip_round(
                [tree.tokens[place] for place in path],
                Verdict(len(path), following),
                eos_token_ids=ends,
                remaining=max_new_tokens - len(out.ids),
                block_size=self.block_size,
            )
            # the anchor and all but the newest emitted token have been run
            rows = [0, *(place + ROW_0 for place in path[: round_.length - 1])]
            out.take(round_, draft, ends)
            if isinstance(self.plan, Search):
                out.trees.append(tree.depths)
            clock.lap("bookkeeping", told)
        out.seconds = clock.seconds
        return out

    def _record_all(self) -> None:
        self.stand_at(0)
        state = [self._anchor_B, self._length_B, self._emitted_B]
        verify = {
            count: self._record(partial(self.verify, count), state) for count in self.node_counts
        }
        self._recorded = self._record(self.draft, state), verify

    def _plan(self, told: Tensor) -> tuple[list[int], TokenTree]:
        """Returns the argmax draft, cut if it is to be, and what is verified."""
        slots = self.block_size - 1
        draft, found = told[:slots].long().tolist(), told[slots:].view(self._shape)
        if isinstance(self.plan, DraftLength):
            draft = draft[: int(self.plan.kept(found))]
            return draft, merged([draft])
        (tree,) = build(self.plan, found)
        return draft, tree

    def _padded(self, anchor_id: int, tree: TokenTree) -> list[list[int]]:
        """Returns tokens of a pass, and rows of their parents; padding is its own parent."""
        count, nodes = self._chosen_1n.shape[1], len(tree.tokens)
        ids = [anchor_id, *tree.tokens, *[0] * (count - 1 - nodes)]
        return [ids, [0, *(parent + ROW_0 for parent in tree.parents), *range(1 + nodes, count)]]


def _node_counts(plan: Search | DraftLength, slots: int) -> Sequence[int]:
    """Returns how many nodes passes have, ascending."""
    if isinstance(plan, DraftLength):
        return range(slots + 1)
    return [plan.budget if plan.kind == "tree" else plan.drafts * slots]


def _follow(tree: TokenTree, wanted: Sequence[int]) -> tuple[list[int], int]:
    return verify_tree(tree, lambda place: wanted[place + ROW_0])


def ancestors(parents_n: Tensor, most: int) -> Tensor:
    """Returns which rows each row sees, (n, n) bool: itself and its ancestors.

    Args:
        parents_n: (n,) int64, the row of each one's parent; its own where it has none.
        most: Ancestors of a row, at most.

    Example:
        >>> ancestors(torch.tensor([0, 0, 1, 3]), most=2).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    """
    itself_nn = torch.eye(len(parents_n), device=parents_n.device)
    reached_nn = itself_nn.scatter(1, parents_n[:, None], 1.0)
    for _ in range((most - 1).bit_length()):  # each time twice as far; counts are exact in fp32
        reached_nn = (reached_nn @ reached_nn).clamp(max=1.0)
    return reached_nn > 0


class _Inbox:
    """Numbers of the host's, int64, at a fixed address on the device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.there = torch.zeros(shape, dtype=torch.long, device=device)
        self._here = torch.zeros(shape, dtype=torch.long, pin_memory=device.type == "cuda")

    def put(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Sends all of them; the host must have read something that came of the last ones."""
        self._here.copy_(torch.tensor(numbers))
        self.there.copy_(self._here, non_blocking=True)
