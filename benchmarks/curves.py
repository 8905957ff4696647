"""Reads what runs logged to TensorBoard."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) pairs of every scalar tag in a run's event files, first to last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        # files of one second are read by the order of their names, .10 before .9
        tag: [
            (event.step, event.value)
            for event in sorted(events.Scalars(tag), key=attrgetter("wall_time"))
        ]
        for tag in events.Tags()["scalars"]
    }
