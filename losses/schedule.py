"""Schedules of loss weights over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["constant", "linear", "warmup", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A factor on a weight, as a function of the run's progress from 0 to 1.

    Args:
        kind: `constant` is 1 throughout, whatever the other fields; `linear` and `cosine` go from
            `start` at `begin` to `final` at `end` along a line or half a cosine, and hold these
            values outside; `warmup` is linear, but off (0) before `begin`.
        start: Factor at `begin`.
        begin: Share of the run's steps after which the factor starts to move.
        end: Share of the run's steps from which it is `final`.
        final: Factor from `end` on.

    Raises:
        ValueError: An unknown kind, a factor that is negative or not finite, or not
            0 <= begin <= end <= 1.

    Example:
        >>> chain = Schedule("linear", start=0.0, begin=0.2, end=0.6)
        >>> [round(chain.multiplier(progress), 3) for progress in (0.0, 0.2, 0.5, 1.0)]
        [0.0, 0.0, 0.75, 1.0]
    """

    kind: ScheduleKind = "constant"
    start: float = 0.0
    begin: float = 0.0
    end: float = 1.0
    final: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "warmup", "cosine"):
            raise ValueError(
                f"The schedule's kind is {self.kind!r}; choose constant, linear, warmup or cosine."
            )
        for name in ("start", "final"):
            factor = getattr(self, name)
            if not (factor >= 0 and math.isfinite(factor)):
                raise ValueError(
                    f"The schedule's {name} is {factor}; give a finite factor of 0 or more."
                )
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(
                f"The schedule runs from {self.begin} to {self.end}; give shares of the run with "
                "0 <= begin <= end <= 1."
            )

    def multiplier(self, progress: float) -> float:
        """Returns the factor at a progress of 0 (first step) to 1 (end of the run)."""
        if self.kind == "constant":
            return 1.0
        if progress < self.begin:
            return 0.0 if self.kind == "warmup" else self.start
        if progress >= self.end:
            return self.final
        done = (progress - self.begin) / (self.end - self.begin)
        if self.kind == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return self.start + (self.final - self.start) * done

    @property
    def silent(self) -> bool:
        """Whether the factor is 0 throughout."""
        turns = (0.0, self.begin, (self.begin + self.end) / 2, self.end)
        return not any(self.multiplier(progress) for progress in turns)
