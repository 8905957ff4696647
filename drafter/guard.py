"""Keeps a gradient that is not finite out of the weights, and its batch for inspection.

On a GPU nothing waits for the device: the fused optimizer skips such a step by itself, and whether
it did is looked up two steps later, when the answer has come to the host. (One step later
the device would still be at it, and a host that waits for it can't prepare the next.)
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drafter.arriving import Arriving
from drafter.blocks import DraftBatch
from drafter.errors import UserError
from drafter.files import replace_atomic

OnNonFinite = Literal["stop", "skip"]


LAG = {"cuda": 2, "cpu": 1}
"""Steps until a step's gradient norm is looked at; fixed, so that all ranks stop together."""


@dataclass
class _Pending:
    """A step whose gradient norm is on its way to the host."""

    norm: Arriving
    """()."""
    batch: DraftBatch
    step: int


class NonFiniteGuard:
    """Looks at every optimizer step's gradient norm.

    Args:
        action: `stop` ends the run, with the batch saved; `skip` leaves the step out and counts it.
    """

    def __init__(self, action: OnNonFinite) -> None:
        self.action = action
        self.skipped = 0
        self._pending: deque[_Pending] = deque()

    def protect(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        norm: Tensor,
        batch: DraftBatch,
        step: int,
    ) -> None:
        """Makes the coming optimizer step do nothing if the gradient is not finite.

        Args:
            optimizer: About to step; AdamW, fused on a GPU.
            parameters: Whose gradients make up the norm.
            norm: (), before clipping, the same on every rank.
            batch: The last that the gradient came from.
            step: Optimizer steps taken so far.
        """
        norm = norm.detach()
        self._pending.append(_Pending(Arriving(norm), batch, step))
        if norm.is_cuda:
            # what a GradScaler sets: fused AdamW changes neither weights nor state if it is 1
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            return
        if not torch.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over parameters without one

    def settle(self, folder: Path, rank: int, *, everything: bool = False) -> None:
        """Acts on earlier steps whose gradient was not finite.

        Args:
            folder: Where the batch is saved.
            rank: Of this process, for the file's name.
            everything: The last step too, and so wait for the device.

        Raises:
            UserError: The action is `stop`; says which rows, and where the batch is.
        """
        while self._pending:
            lag = LAG["cuda" if self._pending[0].norm.from_device else "cpu"]
            if len(self._pending) < lag and not everything:
                return
            self._settle_one(self._pending.popleft(), folder, rank)

    def _settle_one(self, pending: _Pending, folder: Path, rank: int) -> None:
        batch, step = pending.batch, pending.step
        if torch.isfinite(pending.norm.read()):
            return
        self.skipped += 1
        if self.action == "skip":
            return
        path = save_batch(batch, folder / f"nonfinite-step{step}-rank{rank}.safetensors")
        rows = ", ".join(map(str, batch.sample_ids.tolist()))
        raise UserError(
            f"The gradient of step {step} is not finite (rows {rows}); no weight was changed by "
            f"it, and the batch lies in {path}. Lower the learning rate, leave these rows out, or "
            "set --model.on_nonfinite skip."
        )


def save_batch(batch: DraftBatch, path: Path) -> Path:
    """Writes a batch's tensors to a safetensors file; returns its path."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.detach().cpu().contiguous()
    tensors["spans"] = torch.tensor(batch.document_spans())  # row, first, last of each document
    replace_atomic(path, lambda aside: save_file(tensors, aside))
    return path
