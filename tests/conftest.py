"""The longest files go first, so that two workers end together."""

from __future__ import annotations

import pytest
import torch

LONGEST = (
    "resume_matrix",
    "real_target",
    "run_ddp",
    "run_training",
    "data_cache_fill",
    "run_fsdp2",
    "data_cache",
)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """Lightning sets one thread for runs of several processes, and leaves it so."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
