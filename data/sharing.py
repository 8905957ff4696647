"""Targets and kept features that the runs of one process have in common.

A single run has its own. Inside `shared_between_runs`, where an ablation trains row after row, the
target is loaded once and the features of the same rows are computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from drafter.target import Target

DocumentFeatures = tuple[Tensor, Tensor | None]
"""hidden_states (S, L*D) and last_hidden (S, D), or packed soft labels in its place, or None."""


class KeptDocument(NamedTuple):
    """What is kept of a document's features."""

    states: Tensor
    """hidden_states (S, L*D)."""
    last: dict[str, Tensor]
    """What losses read of last_hidden, by `drafter.blocks.LastHidden`: itself (S, D), or packed
    soft labels."""


KeptFeatures = dict[Hashable, KeptDocument]
"""(row set, layer ids, sample id) -> what is kept of a row."""


@dataclass
class _Shared:
    targets: dict[Hashable, Target] = field(default_factory=dict)
    features: dict[Hashable, KeptFeatures] = field(default_factory=dict)


_shared: _Shared | None = None


@contextlib.contextmanager
def shared_between_runs() -> Iterator[None]:
    """Runs inside share targets and kept features; both are let go at the end."""
    global _shared
    before, _shared = _shared, _Shared()
    try:
        yield
    finally:
        _shared = before


def load_target(path: str, *, device: Any, **options: Any) -> Target:
    """Returns `Target.load`'s target, or the one that an earlier run has loaded the same way."""
    if _shared is None:
        return Target.load(path, device=device, **options)

    def key(dtype: str) -> Hashable:
        rest = sorted(
            (name, value)
            for name, value in options.items()
            if name != "dtype" and value is not None  # left out, or said to be nothing: the same
        )
        return (path, str(device).removesuffix(":0"), dtype, *rest)

    asked = str(options.get("dtype", "auto"))
    if key(asked) not in _shared.targets:
        target = Target.load(path, device=device, **options)
        # found again under the dtype that "auto" turned out to be
        for dtype in (asked, str(target.dtype).removeprefix("torch.")):
            _shared.targets[key(dtype)] = target
    return _shared.targets[key(asked)]


def shared_features(target: Target, rows: Hashable) -> KeptFeatures | None:
    """Returns the features that runs on the same target and rows keep; None outside.

    Args:
        target: That gives them.
        rows: Decides which tokens a sample id stands for.
    """
    if _shared is None:
        return None
    return _shared.features.setdefault((target.fingerprint, target.dtype, rows), {})
