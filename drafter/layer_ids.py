"""Which target layers a drafter reads: one convention, ids checked, states checked.

Layer id i is the output of the target's decoder layer i (0-based), which is `hidden_states[i + 1]`
in transformers. Never the last layer: there transformers' entry is after the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafter.errors import UserError


def default_layer_ids(num_layers: int, count: int) -> list[int]:
    """Returns `count` ids spread evenly from 1 to num_layers - 3 (halves to even), each once.

    Source: method.md, Drafter (the defaults of published DFlash drafters).

    Args:
        num_layers: Decoder layers of the target.
        count: Taps wanted, L; a small target may give fewer.

    Example:
        >>> default_layer_ids(30, 5), default_layer_ids(30, 1)
        ([1, 8, 14, 20, 27], [15])
    """
    if count < 1:
        raise UserError(f"num_taps is {count}; a drafter needs at least one tapped layer.")
    if count == 1:
        return [min(num_layers // 2, max(0, num_layers - 2))]
    first, last = 1, max(1, num_layers - 3)
    ids = {round(first + (last - first) * i / (count - 1)) for i in range(count)}
    return sorted(min(i, num_layers - 2) for i in ids)


def check_layer_ids(layer_ids: Sequence[int], num_layers: int) -> None:
    """Raises UserError unless all ids are different and in 0 .. num_layers - 2."""
    if not layer_ids:
        raise UserError("target_layer_ids is empty; name at least one target layer.")
    for layer_id in layer_ids:
        if layer_id == num_layers - 1:
            raise UserError(
                f"target_layer_ids names layer {layer_id}, the target's last: its state there is "
                f"after the final norm; choose from 0 to {num_layers - 2}."
            )
        if not 0 <= layer_id < num_layers:
            raise UserError(
                f"target_layer_ids names layer {layer_id}, but the target has {num_layers} layers; "
                f"choose from 0 to {num_layers - 2}."
            )
    if len(set(layer_ids)) != len(layer_ids):
        raise UserError(f"target_layer_ids {list(layer_ids)} names a layer twice.")


def assert_finite_features(
    hidden_states: Tensor, layer_ids: Sequence[int], sample_ids: Tensor | None = None
) -> None:
    """Raises UserError that names row, layer and position of the first state that is not finite.

    Args:
        hidden_states: (B, S, L*D).
        layer_ids: The L tapped layers.
        sample_ids: (B,) what the rows are called; None calls them by their place in the batch.
    """
    if bool(torch.isfinite(hidden_states).all()):
        return
    width = hidden_states.shape[-1] // len(layer_ids)
    row, position, column = (~torch.isfinite(hidden_states)).nonzero()[0].tolist()
    name = row if sample_ids is None else int(sample_ids[row])
    raise UserError(
        f"The target's hidden states are not finite: row {name}, layer "
        f"{layer_ids[column // width]}, position {position}. Try target_dtype bfloat16 or float32, "
        "or leave this row out."
    )
