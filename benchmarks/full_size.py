"""Time and memory of a training step of each recipe in configs/targets, at its target's full size.

python -m benchmarks.full_size --output full_size.jsonl            # a GPU of 80 GB, 2 minutes
python -m benchmarks.full_size --toy                               # a CPU
python -m benchmarks.full_size --table full_size.jsonl             # what was measured, as tables

Targets have the published shapes and random weights, made where they run; rows are random tokens of
the longest length. All else is the recipe's own file, run by train.py's classes: the target on
every micro-batch, the drafter's forward and backward pass, the optimizer. A line of the output is
one recipe; what is there with as many steps is not measured again, unless it failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from benchmarks.lines import read_lines, write_lines
from benchmarks.train_step import forget, mark, milliseconds, short_error
from callbacks.memory import estimate_run
from data.online import OnlineHiddenStates
from drafter.attention import choose_attention
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.markdown import markdown_rows
from drafter.memory import MemoryEstimate
from drafter.module import DrafterModule
from drafter.target import Target
from drafter.target_loading import Loaded
from evaluate import where_and_when
from tests.tiny import tiny_tokenizer

RECIPES = Path(__file__).parent.parent / "configs" / "targets"
EPOCH_ROWS = 200_000  # about what preset:ultrachat has
PROMPT_TOKENS = 8  # not supervised


@dataclass(frozen=True)
class Shapes:
    """A target as its config.json on the hub has it."""

    kind: type
    """Its config class."""
    fields: dict[str, Any]
    """What is not the same for all four."""


_LLAMA = {"vocab_size": 128256, "rms_norm_eps": 1e-5}
_LLAMA_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_LLAMA32_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
PUBLISHED = {
    "llama-3-8b-instruct": Shapes(
        LlamaConfig,
        _LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": _LLAMA_ROPE,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.2-3b-instruct": Shapes(
        LlamaConfig,
        _LLAMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "max_position_embeddings": 131072,
            "rope_parameters": _LLAMA32_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": Shapes(
        Qwen3Config,
        _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "qwen3-8b": Shapes(
        Qwen3Config,
        _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    ),
}
TOY_WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Depth, vocabulary, rope and head are the target's, so layer ids and mask token are too."""
TOY_SETTINGS: dict[str, dict[str, Any]] = {
    "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2, "precision": "32"},
    "data": {
        "target_dtype": "float32",
        "max_length": 128,
        "num_anchors": 4,
        "batch_size": 2,
        "num_workers": 0,
    },
}
"""fp32, because a CPU's bf16 products with a head of 150,000 rows take ten times as long."""


def target_config(name: str, toy: bool = False) -> Any:
    """Returns the transformers config of a recipe's target; a toy's is narrower."""
    shapes = PUBLISHED[name]
    widths = TOY_WIDTHS if toy else {"num_key_value_heads": 8, "head_dim": 128}
    ends = {"bos_token_id": None, "eos_token_id": tiny_tokenizer().eos_token_id}
    return shapes.kind(**{**shapes.fields, **widths, **ends})


def full_target(name: str, dtype: torch.dtype, device: torch.device, toy: bool = False) -> Target:
    """Returns a target of random weights, made where it runs: nothing is read or copied."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(target_config(name, toy), dtype=dtype)
    return Target(Loaded(model, tiny_tokenizer()), f"random {name}", None)


def recipe(name: str, toy: bool = False) -> dict[str, Any]:
    """Returns the settings of a recipe's file; a toy's batches are smaller."""
    settings: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    if toy:
        for group, smaller in TOY_SETTINGS.items():
            settings[group] |= smaller
    return settings


# ---------------------------------------------------------------------- measuring


class MarkedRows(OnlineHiddenStates):
    """The recipe's data, which tells a watch when the target's pass over a batch begins and ends.

    Args:
        watch: To be told.
        **settings: As the recipe has them.
    """

    def __init__(self, watch: Watch, **settings: Any) -> None:
        super().__init__(**settings)
        self.watch = watch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds the features, between two marks."""
        self.watch.features_begin()
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        self.watch.features_end()
        return batch


class Watch(Callback):
    """Marks times and memory peaks of micro-batches; it never waits for the device.

    Args:
        on_gpu: Whether there is memory to be watched.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.estimate: MemoryEstimate | None = None
        self.marks: list[tuple[Any, Any, Any]] = []
        """Of each micro-batch: the features' begin and end, and its own end."""
        self.peaks: list[tuple[int, int]] = []
        """Of each micro-batch, in bytes: while the target ran, and after it."""
        self.others = 0
        """Bytes on the device before the first step that are not the drafter's."""
        self.facts: dict[str, Any] = {}
        self._begun: list[Any] = []
        self._target_peak = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimates what a step takes, as train.py does."""
        self.estimate = estimate_run(trainer, pl_module)
        if self.on_gpu:
            self.others = torch.cuda.memory_allocated() - _nbytes(pl_module.parameters())

    def features_begin(self) -> None:
        """Marks that the target begins."""
        self._begun = [mark(self.on_gpu)]
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def features_end(self) -> None:
        """Marks that the target is done."""
        self._begun.append(mark(self.on_gpu))
        if self.on_gpu:
            self._target_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Marks the end of a micro-batch, of the optimizer's step too where it had one."""
        self.marks.append((*self._begun, mark(self.on_gpu)))
        if self.on_gpu:
            self.peaks.append((self._target_peak, torch.cuda.max_memory_allocated()))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Looks at what is there while it is where it was trained."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        state = [
            value
            for values in trainer.optimizers[0].state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor) and value.device == pl_module.device
        ]
        target = list(datamodule.target.model.parameters())  # tied ones come once
        config = pl_module.drafter.config
        self.facts = {
            "optimizer_steps": trainer.global_step,
            "drafter_parameters": sum(p.numel() for p in pl_module.parameters()),
            "target_parameters": sum(p.numel() for p in target),
            "drafter_bytes": _nbytes(pl_module.parameters()),
            "optimizer_bytes": _nbytes(state),
            "target_bytes": _nbytes(target),
            "attention": choose_attention(
                pl_module.hparams.attention,
                torch.zeros(1, datamodule.num_anchors, device=pl_module.device),
                -(-datamodule.max_length // datamodule.pad_multiple) * datamodule.pad_multiple,
                config.block_size,
                config.head_dim,
            ),
        }


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a recipe's training step takes.

    Args:
        name: Of the recipe.
        options: The command's: `warmup` and `steps` are optimizer steps before and on the clock.
    """
    settings = recipe(name, options.toy)
    data, accumulate = settings["data"], settings["trainer"]["accumulate_grad_batches"]
    device = torch.device("cpu" if options.toy else "cuda")
    torch.manual_seed(settings["seed_everything"])
    watch = Watch(device.type == "cuda")
    steps = options.warmup + options.steps
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        target = full_target(name, getattr(torch, data["target_dtype"]), device, options.toy)
        count = steps * accumulate * data["batch_size"]
        _write_random_rows(rows, count, data["max_length"], target.vocab_size)
        ours = {"train_data": str(rows), "streaming": False, "val_rows": 0}
        datamodule = MarkedRows(
            watch,
            **{**data, **ours},
            block_size=settings["model"]["block_size"],
            seed=settings["seed_everything"],
        )
        datamodule.use_target(target)
        trainer = Trainer(
            **{**settings["trainer"], "max_epochs": None},
            max_steps=steps,
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(DrafterModule(**settings["model"]), datamodule=datamodule)
    assert watch.facts["optimizer_steps"] == steps, "the rows were too few"
    assert len(watch.marks) == steps * accumulate
    return _figures(watch, settings, options.warmup)


def _write_random_rows(path: Path, count: int, length: int, vocab_size: int) -> None:
    drawn = np.random.default_rng(0)
    known = len(tiny_tokenizer())  # beyond these there is no end of text
    with path.open("w") as file:
        for row in drawn.integers(known, vocab_size, (count, length)).tolist():
            prompt, response = row[:PROMPT_TOKENS], row[PROMPT_TOKENS:]
            file.write(json.dumps({"prompt_ids": prompt, "response_ids": response}) + "\n")


def _figures(watch: Watch, settings: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Returns a line's figures; seconds are medians of what came after the warm-up."""
    data, accumulate = settings["data"], settings["trainer"]["accumulate_grad_batches"]
    first = warmup * accumulate
    ends = [end for _, _, end in watch.marks[first - 1 :]]
    batch = statistics.median(milliseconds(a, b) for a, b in pairwise(ends)) / 1e3
    step = statistics.median(milliseconds(a, b) for a, b in pairwise(ends[::accumulate])) / 1e3
    features = [milliseconds(begin, end) for begin, end, _ in watch.marks[first:]]
    rows = data["batch_size"] * accumulate
    assert watch.estimate is not None
    line = watch.facts | {
        "batch_seconds": batch,
        "target_seconds": statistics.median(features) / 1e3,
        "step_seconds": step,
        "blocks_per_second": rows * data["num_anchors"] / step,
        "tokens_per_second": rows * data["max_length"] / step,
        "epoch_hours": EPOCH_ROWS / rows * step / 3600,
        "predicted_bytes": watch.estimate.total,
    }
    if watch.peaks:
        during, after = (max(column) for column in zip(*watch.peaks[first:], strict=True))
        line |= {
            "peak_bytes": max(during, after),
            "target_pass_peak_bytes": during,
            "warmup_peak_bytes": max(map(max, watch.peaks[:first])),
            # what the estimate is of: a step beside the target, without the target's own pass
            "drafter_peak_bytes": after - watch.others,
            "over_predicted": (after - watch.others) / watch.estimate.total,
            "over_weights_bytes": after
            - watch.others
            - line["drafter_bytes"]
            - line["optimizer_bytes"],
        }
    return line


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each recipe; returns the rows, which are in the output too."""
    device = torch.device("cpu" if options.toy else "cuda")
    output = Path(options.output) if options.output else None
    rows = read_rows(output)
    record = where_and_when(device)
    for name in options.recipes:
        settings = recipe(name, options.toy)
        line = {
            "recipe": name,
            "toy": options.toy,
            "rows": settings["data"]["batch_size"],
            "tokens": settings["data"]["max_length"],
            "anchors": settings["data"]["num_anchors"],
            "block_size": settings["model"]["block_size"],
            "layers": settings["model"]["num_layers"],
            "accumulate": settings["trainer"]["accumulate_grad_batches"],
            "precision": settings["trainer"]["precision"],
            "warmup": options.warmup,
            "steps": options.steps,
        }
        same = [row for row in rows if line.items() <= row.items()]
        if any("failed" not in row for row in same):
            continue
        rows = [row for row in rows if row not in same]
        rows.append(line | _measured(name, options) | record)
        forget()  # here: an error that is being handled would hold the target
        print(json.dumps(rows[-1]), flush=True)
        write_lines(output, rows)
    return rows


def _measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a recipe's figures, or why there are none: the next one goes on."""
    try:
        return measure(name, options)
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        return {"failed": short_error(error)}


# ---------------------------------------------------------------------- showing


SHOWN = ("rows", "accumulate", "target_parameters", "drafter_parameters", "target_bytes")
SHOWN += ("batch_seconds", "target_seconds", "step_seconds", "blocks_per_second")
SHOWN += ("tokens_per_second", "epoch_hours", "predicted_bytes")
"""What a line has that did not fail, on a GPU or a CPU."""


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """Returns the lines of a file of this benchmark; none without one.

    Raises:
        UserError: It holds something else.
    """
    try:
        rows = read_lines(path)
        ours = all("recipe" in row and ("failed" in row or row.keys() >= {*SHOWN}) for row in rows)
    except (ValueError, TypeError, AttributeError):  # no text, no JSON, or no object a line
        ours = False
    if not ours:
        raise UserError(f"{path} is not what --output of benchmarks.full_size writes.")
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Returns two markdown tables, of time and of memory; GB are 1e9 bytes."""
    done = [row for row in rows if "failed" not in row]
    sizes = {row["rows"] * row["accumulate"] for row in done}
    step = f"s a step of {sizes.pop()} rows" if len(sizes) == 1 else "s a step"
    head = ("recipe", "s a micro-batch", "of it the target's pass", step, "blocks/s", "tokens/s")
    head += (f"h an epoch of {EPOCH_ROWS:,} rows",)
    times = []
    for row in rows:
        if "failed" in row:
            times.append((row["recipe"], row["failed"], *[""] * (len(head) - 2)))
            continue
        batch, target = row["batch_seconds"], row["target_seconds"]
        times.append(
            (
                row["recipe"],
                f"{batch:.3f}",
                f"{target:.3f} ({100 * target / batch:.0f} %)",
                f"{row['step_seconds']:.2f}",
                f"{row['blocks_per_second']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['epoch_hours']:.1f}",
            )
        )
    memory_head = ("recipe", "parameters, target + drafter", "target GB", "step GB", "predicted")
    memory_head += ("step GB over weights and optimizer", "peak GB")
    kinds = ("target", "drafter_peak", "predicted", "over_weights", "peak")
    memory = [
        (
            row["recipe"],
            f"{row['target_parameters'] / 1e6:,.0f} M + {row['drafter_parameters'] / 1e6:,.1f} M",
            *(_gigabytes(row.get(f"{kind}_bytes")) for kind in kinds),
        )
        for row in done
    ]
    tables = [markdown_rows(head, times), *([markdown_rows(memory_head, memory)] if memory else [])]
    return "\n\n".join("\n".join(lines) for lines in tables)


def _gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps before the clock")
    parser.add_argument("--steps", type=int, help="optimizer steps on the clock: 2, a toy's 1")
    parser.add_argument("--output", help="JSON lines; what is there is not run again")
    parser.add_argument("--table", help="print the tables of such a file, and measure nothing")
    parser.add_argument("--toy", action="store_true", help="narrow targets on the CPU")
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = 1 if options.toy else 2
    if options.toy:
        torch.set_num_threads(1)  # on a busy machine such small products wait for their threads
    with one_sentence_errors():
        if options.table:
            if not Path(options.table).is_file():
                raise UserError(f"--table {options.table}: there is no such file.")
            print(show(read_rows(Path(options.table))))
            return
        if options.warmup < 1 or options.steps < 1:
            raise UserError("--warmup and --steps must be at least 1.")
        if not options.toy and not torch.cuda.is_available():
            raise UserError("There is no GPU here; --toy runs a small version on the CPU.")
        print(show(run(options)))


if __name__ == "__main__":
    main()
