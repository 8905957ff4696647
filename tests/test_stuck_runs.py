"""The runner of the tests: a run that does not end says where it stands, and is gone."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.runs import finished, forked, joined

FORKED = """
import os, time
def waits_for_nothing():
    time.sleep(600)
print(os.getpid(), flush=True)
if os.fork() == 0:
    print(os.getpid(), flush=True)
waits_for_nothing()
"""


def runs(pid: int) -> bool:
    """Returns whether a process still does anything; the dead may wait for someone to ask."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_run_that_does_not_end_shows_the_stack_of_every_process_and_is_gone():
    with pytest.raises(AssertionError) as caught:
        finished([sys.executable, "-c", FORKED], 6, dict(os.environ))
    said = str(caught.value)
    assert "still ran after 6 s" in said
    assert said.count("in waits_for_nothing") == 2
    pids = [int(line) for line in said.splitlines() if line.isdigit()]
    assert len(pids) == 2
    assert not any(runs(pid) for pid in pids)


def test_a_run_that_ends_gives_its_code_and_words():
    done = finished([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 60, dict(os.environ))
    assert (done.returncode, done.stdout) == (3, "x\n")


def sleeps():
    """What a forked process does that never ends."""
    time.sleep(600)


def test_a_forked_run_that_does_not_end_shows_its_stack_and_is_gone(tmp_path):
    process = forked(sleeps, output=tmp_path / "printed")
    with pytest.raises(AssertionError, match="still ran after 5 s"):
        joined([process], 5)
    assert "in sleeps" in (tmp_path / "printed").read_text()
    assert not runs(process.pid)


def fails():
    """What a forked process does that ends with code 1."""
    sys.exit(1)


def test_what_outlasts_another_s_failure_is_said_to_have_done_so(tmp_path):
    processes = [forked(sleeps, output=tmp_path / "a"), forked(fails, output=tmp_path / "b")]
    with pytest.raises(AssertionError, match="still ran 2 s after one had failed"):
        joined(processes, 60, grace=2)
    assert not runs(processes[0].pid)
