"""CUDA graphs of a training step: drafter, head, and the way back through both.

A step of a small drafter is about a thousand small kernels, and launching them one by one takes a
host longer than a GPU takes to run them. A CUDA graph is recorded once for a shape of batch and
then launched whole. What stays outside: the batch, the loss, its reduction over ranks, clipping and
the optimizer.

Recorded work reads and writes fixed addresses, so a batch is copied in, and what comes out is
copied before the next one. Graphs share one pool of memory: a step is through with it before the
next begins.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from drafter.blocks import DraftBatch
from losses.scores import CONFIDENCE, TARGET_SCORES, BlockScores

Forward = Callable[[DraftBatch], BlockScores]

MOST_GRAPHS = 32
"""Shapes of batches that are recorded; more are run kernel by kernel. With `data.pad_multiple` 64
there are about 16 of them out of rows of up to 1,024 tokens."""


READ = (
    "input_ids",
    "supervised",
    "document_ids",
    "positions",
    "anchors",
    "hidden_states",
    "last_hidden",
    "soft_labels",
    "visible",
)
"""Fields of a batch that scoring reads; the last three may be missing."""


class Recorder(Protocol):
    """Records what a function does on the device, to be done again."""

    def rehearse(self, work: Callable[[], None]) -> None:
        """Does `work` where it will be recorded: a first time may compile, or choose kernels."""
        ...

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns what does `work` again; whether it was done while it was recorded is open."""
        ...


class CudaRecorder:
    """Records CUDA graphs into one pool of memory, on one stream."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def rehearse(self, work: Callable[[], None]) -> None:
        """See `Recorder`."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        # an old autograd graph that only a cycle keeps would tie the parameters' gradients to the
        # default stream, which nothing recorded may wait for
        gc.collect()
        # while it records, the allocator can't take back what it keeps for other streams
        torch.cuda.empty_cache()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`; `work` must have been rehearsed."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # not `torch.cuda.graph`, which empties the cache again and collects garbage
        with torch.cuda.stream(self._stream):
            # thread_local: the loader's thread that page-locks batches may go on meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay


class Inputs:
    """Where recorded kernels read batches: one buffer a field, seen in any shape.

    A larger batch than any before gets a larger buffer; what was recorded keeps the old one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def like(self, batch: DraftBatch) -> DraftBatch:
        """Returns a batch of the same shapes in the buffers; its content is open."""
        views: dict[str, Any] = {}
        for name in READ:
            tensor = getattr(batch, name)
            if tensor is None:
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.numel() < tensor.numel():
                buffer = self._buffers[name] = tensor.new_empty(tensor.numel())
            views[name] = buffer[: tensor.numel()].view(tensor.shape)
        return DraftBatch(**views, sample_ids=batch.sample_ids)


class StepGraphs:
    """Runs `forward` and its backward pass from recordings, one for each shape of batch.

    A shape is run kernel by kernel when it is first seen, and recorded at the second sight.

    Args:
        forward: Scores a batch's blocks; its shapes must depend on the batch's shapes alone.
        parameters: What it trains; their storage must stay where it is.
        recorder: None for CUDA graphs.
    """

    def __init__(
        self,
        forward: Forward,
        parameters: list[nn.Parameter],
        recorder: Recorder | None = None,
    ) -> None:
        self._forward = forward
        self._parameters = parameters
        self._recorder = recorder or CudaRecorder()
        self._gradients = [torch.empty_like(p, requires_grad=False) for p in parameters]
        self._inputs = Inputs()
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recording] = {}

    def __len__(self) -> int:
        """Returns how many shapes are recorded."""
        return len(self._recorded)

    def __call__(self, batch: DraftBatch) -> BlockScores:
        """Returns a batch's scores; their backward pass gives all parameters a gradient, once."""
        shape = _shape(batch)
        recording = self._recorded.get(shape)
        if recording is None:
            if shape not in self._seen or len(self._recorded) >= MOST_GRAPHS:
                self._seen.add(shape)
                return self._forward(batch)
            recording = _Recording(
                self._forward,
                self._parameters,
                self._gradients,
                self._inputs.like(batch),
                batch,
                self._recorder,
            )
            self._recorded[shape] = recording
        recording.take(batch)
        names = (*masks(recording.scores), *trained_scores(recording.scores))
        found = _Replay.apply(recording, *self._parameters)
        return BlockScores(**dict(zip(names, found, strict=True)))


def _shape(batch: DraftBatch) -> Hashable:
    states = batch.hidden_states
    assert states is not None
    missing = tuple(getattr(batch, name) is None for name in READ[-3:])
    return (states.shape, states.dtype, batch.anchors.shape, missing)


def masks(scores: BlockScores) -> dict[str, Tensor]:
    """Returns what a loss reads beside them, by name."""
    named = {name: getattr(scores, name) for name in ("correct", "valid", "outside")}
    return {name: mask for name, mask in named.items() if mask is not None}


def trained_scores(scores: BlockScores) -> dict[str, Tensor]:
    """Returns the scores that have a gradient, by name."""
    named = {name: getattr(scores, name) for name in ("log_prob", *TARGET_SCORES, CONFIDENCE)}
    return {name: score for name, score in named.items() if score is not None}


class _Recording:
    """A forward and a backward pass over batches of one shape.

    Args:
        forward: See `StepGraphs`.
        parameters: Likewise.
        gradients: Where their gradients go.
        place: Where batches are read.
        batch: One of that shape.
        recorder: Of both passes.
    """

    def __init__(
        self,
        forward: Forward,
        parameters: list[nn.Parameter],
        gradients: list[Tensor],
        place: DraftBatch,
        batch: DraftBatch,
        recorder: Recorder,
    ) -> None:
        self._place = place
        self.gradients = gradients
        self.scores: BlockScores
        self.upstream: list[Tensor]

        def ahead() -> None:
            # what autocast keeps of weights must be made inside the graph, and not outlive it
            torch.clear_autocast_cache()
            with torch.enable_grad():
                self.scores = forward(place)
            torch.clear_autocast_cache()

        def back() -> None:
            with torch.autocast(batch.anchors.device.type, enabled=False):
                trained = trained_scores(self.scores)
                found = torch.autograd.grad(list(trained.values()), parameters, self.upstream)
            torch._foreach_copy_(gradients, found)
            # the graph, and with it the stream that it was made on, must not outlive its use
            for name, score in trained.items():
                setattr(self.scores, name, score.detach())

        def both() -> None:
            ahead()
            trained = trained_scores(self.scores).values()
            self.upstream = [torch.zeros_like(score, requires_grad=False) for score in trained]
            back()

        self.take(batch)
        recorder.rehearse(both)
        self.ahead = recorder(ahead)
        self.back = recorder(back)

    def take(self, batch: DraftBatch) -> None:
        """Copies a batch to where the recorded kernels read it."""
        for name in READ:
            tensor = getattr(batch, name)
            if tensor is not None:
                getattr(self._place, name).copy_(tensor, non_blocking=True)


class _Replay(torch.autograd.Function):
    """A recording as one operation of autograd; takes the parameters to give them gradients."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> tuple[Tensor, ...]:
        recording.ahead()
        ctx.recording = recording
        scores = recording.scores
        others = [mask.clone() for mask in masks(scores).values()]
        ctx.mark_non_differentiable(*others)
        trained = [score.detach().clone() for score in trained_scores(scores).values()]
        return *others, *trained

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        recording: _Recording = ctx.recording
        trained = upstream[len(masks(recording.scores)) :]
        torch._foreach_copy_(recording.upstream, list(trained))
        recording.back()
        # parameters keep their gradients beyond the next replay; copied here it is one launch
        return None, *torch._foreach_mul(recording.gradients, 1.0)
