"""Sums over the processes of a run."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_ranks(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns the sum of a tensor over all ranks; the tensor itself in a single process.

    Args:
        tensor: Of the same shape and dtype on every rank; it is not changed.
        device: Where the backend can reduce it; None for where it is. The result comes back to
            where the tensor is.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    total = tensor.to(tensor.device if device is None else device, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)
