"""Tensors in a drafter's files: its own, and those of its target that some have beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from drafter.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BORROWED = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "verifier_lm_head.weight": "whole head",
    "verifier_norm.weight": "final norm",
}
"""Tensors of a file that are the target's, and which of it; "head" has the rows of a reduced draft
vocabulary, if the drafter has one."""
_ENDS = {
    "embedding": ("embed_tokens.weight",),
    "whole head": ("lm_head.weight", "embed_tokens.weight"),  # the second where they are tied
    "final norm": ("model.norm.weight",),
}


def check_borrowed(
    name: str,
    borrowed: Mapping[str, Path],
    target: Mapping[str, Tensor],
    target_name: str,
    exact: bool = True,
) -> None:
    """Raises UserError unless tensors that a drafter's file has beside its own are the target's.

    They are compared as the coarser of the two dtypes has them.

    Args:
        name: Of the drafter.
        borrowed: Tensor to file.
        target: "embedding" and "whole head" (V, D), "head" (V or R, D) and "final norm" (D,), those
            that are known.
        target_name: For the message.
        exact: False for a target of quantised weights, whose differences are printed only.
    """
    for tensor, file in borrowed.items():
        theirs = target.get(BORROWED[tensor])
        if theirs is None:
            continue
        own = read_tensor(file, tensor)
        if _same(own, theirs.detach().cpu()):
            continue
        if exact or own.shape != theirs.shape:
            raise UserError(
                f"{name}: its {tensor} is not the {_said(tensor)} of {target_name}, and "
                "drafters here use their target's; give the target that it was trained with."
            )
        print(f"warning: {name}: its {tensor} is not quite the {_said(tensor)} of {target_name}")


def _said(tensor: str) -> str:
    return BORROWED[tensor].removeprefix("whole ")


def _same(own: Tensor, theirs: Tensor) -> bool:
    """Returns whether two tensors are equal to a step of the coarser dtype of the two."""
    if own.shape != theirs.shape or not own.is_floating_point():
        return False
    coarse = max(own.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    limits = torch.finfo(coarse)
    a, b = (tensor.to(coarse).float() for tensor in (own, theirs))
    return torch.allclose(a, b, rtol=limits.eps, atol=limits.tiny)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor in a folder's safetensors, in pieces or not.

    Raises:
        UserError: There is none, or it can't be read.
    """
    try:
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            for piece in sorted(set(weight_map.values())):
                named = {name for name, file in weight_map.items() if file == piece}
                with safe_open(folder / piece, "pt") as file:
                    absent = sorted(named - set(file.keys()))
                if absent:
                    raise ValueError(f"{piece} has no {absent[0]}")
            return {name: folder / file for name, file in weight_map.items()}
        with safe_open(folder / WEIGHTS, "pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: its {WEIGHTS} can't be read: {reason}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """Returns one tensor of a safetensors file."""
    with safe_open(file, "pt") as content:
        tensor: Tensor = content.get_tensor(name)
    return tensor


def leave_out(
    folder: Path,
    borrowed: Mapping[str, Path],
    verifier: str | None,
    kept: Tensor | None = None,
) -> None:
    """Compares with the target where its files are here, and prints what is left out.

    Args:
        folder: Of the drafter.
        borrowed: Tensor to file.
        verifier: The target's folder or hub name; None where it is not told.
        kept: (R,) the tokens that it drafts from; None for all.

    Raises:
        UserError: See `check_borrowed`.
    """
    found: dict[str, Tensor] = {}
    if verifier is not None and list(Path(verifier).glob("*.safetensors")):
        files = tensor_files(Path(verifier))
        for what, ends in _ENDS.items():
            names = [n for end in ends for n in sorted(files, key=len) if n.endswith(end)]
            if names:
                found[what] = read_tensor(files[names[0]], names[0])
        if "whole head" in found:
            whole = found["whole head"]
            found["head"] = whole if kept is None else whole[kept]
        check_borrowed(str(folder), borrowed, found, verifier)
    known = sorted(name for name in borrowed if BORROWED[name] in found)
    others = sorted(borrowed.keys() - set(known))
    told = [f"{', '.join(known)}: the same as the target's"] if known else []
    if others:
        told.append(f"{', '.join(others)}: the target's, compared when it is loaded")
    print(f"{folder}: left out {'; '.join(told)}", flush=True)
