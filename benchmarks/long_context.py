"""Rows of 32k tokens: a few training steps with a random target, their memory and time.

python -m benchmarks.long_context                        # Llama-3-8B shapes; about 50 GB of a GPU
python -m benchmarks.long_context --toy                  # a CPU
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.shapes import SHAPES, random_target
from callbacks.memory import MemoryReport
from data.online import OnlineHiddenStates
from drafter.module import DrafterModule


class StepTimes(Callback):
    """Prints what every step takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        print(f"step {trainer.global_step}: {self.seconds[-1]:.3f} s", flush=True)


def main() -> None:
    """Trains a few steps on rows of the full length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--anchors", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    seed_everything(0)
    device, dtype = ("cpu", torch.float32) if options.toy else ("cuda", torch.bfloat16)
    shapes = SHAPES["toy" if options.toy else "llama3-8b"]
    target = random_target(shapes, options.length, device, dtype)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        with rows.open("w") as file:
            for _ in range(options.steps):
                ids = torch.randint(8, shapes["vocab_size"], (options.length,), generator=generator)
                row = {"prompt_ids": ids[:64].tolist(), "response_ids": ids[64:].tolist()}
                file.write(json.dumps(row) + "\n")
        datamodule = OnlineHiddenStates(
            target="random",
            train_data=str(rows),
            max_length=options.length,
            num_anchors=options.anchors,
            batch_size=1,
        )
        datamodule.use_target(target)
        times = StepTimes()
        trainer = Trainer(
            accelerator="cpu" if options.toy else "gpu",
            devices=1,
            precision="32-true" if options.toy else "bf16-mixed",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            log_every_n_steps=1,
            callbacks=[MemoryReport(), times],
        )
        trainer.fit(DrafterModule(num_layers=options.layers), datamodule)
    result: dict[str, Any] = {
        "length": options.length,
        "anchors": options.anchors,
        "seconds_per_step": min(times.seconds),
        "loss": float(trainer.callback_metrics["train/cross_entropy"]),
    }
    if not options.toy:
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
