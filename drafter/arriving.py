"""A device's number on its way to the host: nobody waits for it before it is read."""

from __future__ import annotations

import torch
from torch import Tensor


class Arriving:
    """Copies a tensor to the host without making the host wait for the device.

    Args:
        value: Of any shape; on a CPU it is there already.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach()
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    @property
    def from_device(self) -> bool:
        """Whether it has a way to go."""
        return self._arrived is not None

    def read(self) -> Tensor:
        """Returns the tensor on the host; waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value
