"""The six benchmarks of the paper by name: public sets of the hub, as prompts of one or more turns.

Only prompts are read, never answers. `datasets` fetches and keeps them; a folder of files of the
same shape (`{"turns": [...]}` a line) stands in where there is no network: `load_prompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.prompt_sets import Rows
from drafter.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's prompts are, and how a row becomes the user's turns.

    Attributes:
        path: hub id, or a builder of `datasets` ("json").
        split: split of it.
        turns: row -> what the user says in each turn.
        config: configuration of the hub data set.
        options: further arguments of `datasets.load_dataset`.
    """

    path: str
    split: str
    turns: Callable[[Mapping[str, Any]], list[str]]
    config: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


_REASON = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_CONTEST = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program\n\n### Question:\n"
)
_CONTEST_END = "\n\n### Answer: (use the provided format with backticks)"
_LIVECODEBENCH = "hf://datasets/livecodebench/code_generation_lite/"


def _contest(row: Mapping[str, Any]) -> list[str]:
    starter = row.get("starter_code")
    wanted = (
        f"### Format: Use the following code structure:\n```python\n{starter}\n```"
        if starter
        else "### Format: Write your code in the following format:\n"
        "```python\n# YOUR CODE HERE\n```"
    )
    return [f"{_CONTEST}{row['question_content']}\n\n{wanted}{_CONTEST_END}"]


def _humaneval(row: Mapping[str, Any]) -> list[str]:
    return [
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{row['prompt']}\n```"
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        "openai/gsm8k", "test", lambda row: [row["question"] + _REASON], config="main"
    ),
    "aime": Benchmark("HuggingFaceH4/aime_2024", "train", lambda row: [row["problem"] + _REASON]),
    "humaneval": Benchmark("openai/openai_humaneval", "test", _humaneval),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp", "test", lambda row: [row["prompt"]], config="sanitized"
    ),
    # the data set is a script, which `datasets` no longer runs: its files are read instead
    "livecodebench": Benchmark(
        "json",
        "test",
        _contest,
        options={
            "data_files": {
                "test": [f"{_LIVECODEBENCH}test{part}.jsonl" for part in ("", *range(2, 7))]
            }
        },
    ),
    "mt-bench": Benchmark(
        "HuggingFaceH4/mt_bench_prompts", "train", lambda row: list(row["prompt"])
    ),
}


def benchmark_rows(names: Sequence[str]) -> dict[str, Rows]:
    """Returns rows of the named benchmarks for `load_prompt_sets`; each is fetched when it is read.

    Raises:
        UserError: an unknown name; or, on reading, a set that can't be fetched.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise UserError(
            f"no benchmark is named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)} (files "
            "of your own go to --prompts)"
        )
    return {name: _rows(name) for name in names}


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    import datasets

    benchmark = BENCHMARKS[name]
    try:
        rows = datasets.load_dataset(
            benchmark.path, benchmark.config, split=benchmark.split, **benchmark.options
        )
    except Exception as error:  # datasets raises a dozen kinds for what a user can mend
        raise UserError(
            f"benchmark {name}: `datasets` cannot load {benchmark.path}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; without network, give a folder "
            "of prompt files with --benchmark-dir"
        ) from error
    for index, row in enumerate(rows):
        where = f"benchmark {name}, row {index}"
        try:
            yield where, {"turns": benchmark.turns(row)}
        except (KeyError, TypeError) as error:
            yield where, UserError(f"{where}: it lacks what a prompt needs ({error!r})")
