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
    "verifier_lm_head.weight": "head",
    "verifier_norm.weight": "final norm",
}
"""Tensors of a file that are the target's, and which of it."""
_ENDS = {
    "embedding": ("embed_tokens.weight",),
    "head": ("lm_head.weight", "embed_tokens.weight"),  # the second where they are tied
    "final norm": ("model.norm.weight",),
}


def check_borrowed(
    name: str, borrowed: Mapping[str, Path], target: Mapping[str, Tensor], target_name: str
) -> None:
    """Raises UserError unless tensors that a drafter's file has beside its own are the target's.

    Args:
        name: Of the drafter.
        borrowed: Tensor to file.
        target: "embedding" (V, D), "head" (V, D) and "final norm" (D,), those that are known.
        target_name: For the message.
    """
    for tensor, file in borrowed.items():
        theirs = target.get(BORROWED[tensor])
        if theirs is None:
            continue
        own = read_tensor(file, tensor)
        if own.shape != theirs.shape or not torch.equal(own, theirs.detach().cpu().to(own.dtype)):
            raise UserError(
                f"{name}: its {tensor} is not the {BORROWED[tensor]} of {target_name}, and "
                "drafters here use their target's; give the target that it was trained with."
            )


def tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor in a folder's safetensors, in pieces or not.

    Raises:
        UserError: There is none, or it can't be read.
    """
    try:
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
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


def leave_out(folder: Path, borrowed: Mapping[str, Path], verifier: str | None) -> None:
    """Compares with the target where its files are here, and prints what is left out.

    Args:
        folder: Of the drafter.
        borrowed: Tensor to file.
        verifier: The target's folder or hub name; None where it is not told.

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
        check_borrowed(str(folder), borrowed, found, verifier)
    what = "the same as the target's" if found else "the target's, compared when it is loaded"
    print(f"{folder}: left out {', '.join(sorted(borrowed))}: {what}", flush=True)
