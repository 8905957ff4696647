"""Small whole runs through the real CLI: a tiny random target, a few conversations, the CPU."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from benchmarks.curves import scalars as scalars
from tests.tiny import tiny_target_dir
from train import RUN_DIR_VARIABLE, DrafterCLI, main

ROOT = Path(__file__).parent.parent
OVERLAYS = {
    name: ("--config", str(ROOT / "configs" / "trainer" / f"{name}.yaml"))
    for name in ("ddp", "fsdp2")
}
"""Arguments that make a run one of two processes."""
QUESTIONS = ["What is the sum of two and three?", "Tell me about the weather.", "Count them."]
ANSWERS = ["The answer is five.", "It is cold there, and the wind is strong.", "One, two, three."]


def write_rows(path: Path, count: int = 12) -> Path:
    """Writes conversations of different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{QUESTIONS[i % 3]} {i}"},
                {"role": "assistant", "content": f"{ANSWERS[i % 3]} {'and so on ' * (i % 4)}{i}"},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Returns a run's config; `changes` are dotted keys with dots written as two underscores."""
    if not list(folder.glob("*/tokenizer.json")):
        tiny_target_dir(folder, "llama", tied=True)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    out: dict[str, Any] = {
        "seed_everything": 3,
        "run_dir": str(folder / "run"),
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "block_size": 4,
            "num_layers": 1,
            "num_taps": 2,
            "learning_rate": 1e-3,
            "warmup_fraction": 0.1,
        },
        "data": {
            "target": str(find_target(folder)),
            "train_data": str(rows),
            "val_rows": 3,
            "num_anchors": 6,
            "batch_size": 2,
            "max_length": 128,
        },
        "verification": {
            "max_new_tokens": 12,
            "prompts_per_set": 3,
            "cache_dir": str(folder / "cache"),
        },
    }
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        place = out
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return out


def find_target(folder: Path) -> Path:
    """Returns the folder that `tiny_target_dir` made."""
    return next(path.parent for path in folder.glob("*/tokenizer.json"))


def cli(folder: Path, command: str = "fit", extra: tuple[str, ...] = (), **changes: Any) -> Any:
    """Runs `train.py COMMAND` in this process and returns the CLI object."""
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(config(folder, **changes)))
    return train([command, "--config", str(path), *extra])


def train(words: list[str]) -> Any:
    """Runs `train.py WORDS` in this process and returns the CLI object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(RUN_DIR_VARIABLE, raising=False)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setattr(sys, "argv", ["train.py"])
        patch.setattr(DrafterCLI, "setup_parser", _built_once)
        try:
            return main(words)
        finally:
            os.environ.pop(RUN_DIR_VARIABLE, None)


_PARSER: dict[str, Any] = {}


def _built_once(self: DrafterCLI, *args: Any) -> None:
    """Gives a CLI the parsers that the first one of this process built: they keep no values."""
    if not _PARSER:
        _SETUP_PARSER(self, *args)
        _PARSER.update(
            {
                name: getattr(self, name)
                for name in ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            }
        )
    self.__dict__.update(_PARSER)


_SETUP_PARSER = DrafterCLI.setup_parser


@cache
def train_parser() -> Any:
    """The parser of train.py: building it takes longer than parsing."""

    class Built(Exception):
        pass

    def stop(self: Any, parser: Any, args: Any) -> None:
        raise Built(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrafterCLI, "parse_arguments", stop)
        with pytest.raises(Built) as built:
            main(["fit"])
    return built.value.args[0]


def cli_process(
    folder: Path,
    command: str = "fit",
    extra: tuple[str, ...] = (),
    timeout: float = 300,
    **changes: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs `train.py COMMAND` in a process of its own; raises only as `finished` does."""
    path = folder / f"{command}.process.yaml"
    path.write_text(yaml.safe_dump(config(folder, **changes)))
    environment = {k: v for k, v in os.environ.items() if k != RUN_DIR_VARIABLE}
    words = [sys.executable, str(ROOT / "train.py"), command, "--config", str(path), *extra]
    return finished(words, timeout, environment | {"OMP_NUM_THREADS": "1"})


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.runs", "tests.faults"])
"""Importing torch and Lightning takes seconds: processes are forked from one that has."""


def forked(function: Callable[..., Any], *args: Any, output: Path, **environment: str) -> Any:
    """Starts `function(*args)` in a process of its own, with variables added to ours.

    It leads a process group, runs in the repository's root on one thread, and writes what it prints
    into the file `output`.
    """
    process = FORKS.Process(
        target=_in_fork, args=(function, args, str(output), os.environ | environment)
    )
    process.start()
    return process


def _in_fork(function: Any, args: Any, output: str, environment: dict[str, str]) -> None:
    os.setsid()
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    # a fork server hands its own method on, and loaders' workers would import everything again
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*args)


def joined(processes: list[BaseProcess], timeout: float, grace: float = 20) -> None:
    """Waits for forked processes; kills all after `timeout` s, or `grace` s after one has failed.

    Raises:
        AssertionError: They still ran; their output then has the stack of every thread.
    """
    end, why = time.monotonic() + timeout, f"after {timeout:.0f} s"
    try:
        while any(process.is_alive() for process in processes):
            if time.monotonic() > end:
                _show_stacks([pid for each in processes for pid in _members(each.pid)])
                raise AssertionError(f"{processes} still ran {why}.")
            running = [process.sentinel for process in processes if process.is_alive()]
            soon = time.monotonic() + grace  # the others end as it did, or wait for it
            if soon < end and any(process.exitcode for process in processes):
                end, why = soon, f"{grace:.0f} s after one had failed"
            wait(running, timeout=1)
    finally:
        for process in processes:
            _kill(process)
            process.kill()  # one that does not lead its group yet
            process.join()


def cli_fork(
    folder: Path,
    command: str = "fit",
    extra: tuple[str, ...] = (),
    ranks: int = 1,
    timeout: float = 120,
    **changes: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs `train.py COMMAND` in forked processes, one a rank, as `cli_process` does from nothing.

    Only Lightning's own start of the other ranks is left out: they get the variables it gives them.

    Raises:
        AssertionError: The run outlasted `timeout` s, or its ranks end with different codes.
    """
    path = folder / f"{command}.fork.yaml"
    settings = config(folder, **changes)
    path.write_text(yaml.safe_dump(settings))
    outputs = [folder / f"{command}.{rank}.out" for rank in range(ranks)]
    variables: dict[str, str] = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        variables |= {"WORLD_SIZE": str(ranks), RUN_DIR_VARIABLE: settings["run_dir"]}
    words = [command, "--config", str(path), *extra]
    processes = [
        forked(_run_rank, rank, ranks, words, output=output, **variables)
        for rank, output in enumerate(outputs)
    ]
    try:
        joined(processes, timeout)
        codes = [process.exitcode for process in processes]
        assert len(set(codes)) == 1, codes
    except AssertionError as error:
        said = "\n".join(output.read_text()[-10000:] for output in outputs)
        raise AssertionError(f"{words}: {error}\n{said}") from None
    said = "".join(output.read_text() for output in outputs)
    return subprocess.CompletedProcess(words, codes[0], said, "")


def _run_rank(rank: int, ranks: int, words: list[str]) -> None:
    if ranks > 1:
        os.environ["LOCAL_RANK"] = str(rank)
    else:
        os.environ.pop(RUN_DIR_VARIABLE, None)
    rank_zero_only.rank = rank  # Lightning reads it when it is imported
    sys.argv = ["train.py", *words]
    main()


def finished(
    words: list[str], timeout: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; one that outlasts `timeout` s says where all its processes wait.

    Raises:
        AssertionError: With what it printed, and the stack of every thread of every process.
    """
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONFAULTHANDLER": "1"},
        cwd=ROOT,
        start_new_session=True,  # so that other ranks and loaders' workers can be reached too
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _show_stacks(_members(process.pid))
        _kill(process)
        out, err = process.communicate()
        raise AssertionError(
            f"{words} still ran after {timeout:.0f} s.\n{out[-2000:]}\n{err[-20000:]}"
        ) from None
    except BaseException:  # Ctrl-C does not reach another session
        _kill(process)
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _show_stacks(pids: list[int]) -> None:
    for pid in pids:  # one after another: they write to one pipe
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.3)
    time.sleep(1)


def _members(group: int) -> list[int]:
    """Returns the processes of a group (Linux); elsewhere only the one that leads it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(int(place.name)) == group:
                found.append(int(place.name))
    return sorted(found) or [group]


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def weights(cli_or_path: Any) -> dict[str, torch.Tensor]:
    """Returns the drafter's weights of a finished CLI run, or of a checkpoint file."""
    if isinstance(cli_or_path, (str, Path)):
        state = torch.load(cli_or_path, weights_only=True, map_location="cpu")["state_dict"]
    else:
        state = cli_or_path.model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Returns whether two sets of weights agree to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
