"""Reads what runs logged to TensorBoard."""

from __future__ import annotations

from pathlib import Path


def logged(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """Returns (step, value) of a run's scalars of one tag, first to last; none if it has none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]
