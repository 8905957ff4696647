"""FSDP2 for drafters: gradients and optimizer state are spread over the ranks.

A drafter has few layers, and its context keys and values are made before any layer runs, so it is
one unit: its weights are gathered for a step and let go after it. What each rank keeps is 1/world
of the weights, gradients and AdamW's moments.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from drafter.model import Drafter


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all ranks, with checkpoints in one file.

    A checkpoint holds whole tensors, so that any number of ranks, DDP, and `evaluate.py` read it.

    Args:
        process_group_backend: None goes by the device: gloo on CPUs, nccl on GPUs.
        timeout_seconds: That a rank waits for the others.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout_seconds: float = 1800.0
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def setup_environment(self) -> None:
        """Shards over every rank; Lightning's "auto" means over nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(drafter: Drafter, mesh: DeviceMesh) -> None:
    """Spreads a drafter's weights over the ranks of a mesh's `data_parallel` dimension, in place.

    The weights must be the same on every rank before.
    """
    # gathered weights stay until the backward pass has used them: one gathering a step
    fully_shard(drafter, mesh=mesh["data_parallel"], reshard_after_forward=False)


def is_sharded(drafter: Drafter) -> bool:
    """Returns whether `shard` has been at a drafter."""
    return isinstance(drafter, FSDPModule)


def whole(drafter: Drafter, device: torch.device) -> Drafter:
    """Returns the drafter, or if it is sharded an unsharded copy; all ranks call it together.

    Ranks that verify different prompts run different numbers of forwards, which a sharded drafter
    would wait for.

    Args:
        drafter: On every rank.
        device: Of the copy.
    """
    if not isinstance(drafter, FSDPModule):
        return drafter
    drafter.reshard()
    state = {name: full(tensor) for name, tensor in drafter.state_dict().items()}
    copy = Drafter(drafter.config)
    copy.to(device)
    copy.load_state_dict(state)
    return copy


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor whole, if it is spread over ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
