"""Cache against online training, and one device against several: the numbers of README.

python benchmarks/stream_and_scale.py --target TARGET.gguf --rows rows.jsonl.gz --output results

Everything runs through `train.py` and `data.cache` in processes of their own. Each result is a line
of `results/results.jsonl` at once; what is there is not run again. With `--toy` it runs on two
processes of a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.curves import scalars

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "tuning" / "start.yaml"
TOY = [
    "--trainer.precision=32-true",
    "--trainer.log_every_n_steps=1",
    "--data.num_workers=0",
    "--data.num_anchors=4",
    "--data.max_length=160",
    "--data.target_dtype=float32",
    "--model.num_layers=1",
    "--verification.max_new_tokens=8",
]
NO_VERIFICATION = ["--verification.every_n_epochs=0", "--verification.before_training=false"]


class Bench:
    """Runs commands and keeps what they give."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output = Path(options.output)
        self.work = Path(options.work)
        self.output.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = self.output / "results.jsonl"
        self.begun = time.perf_counter()

    def done(self) -> dict[str, dict[str, Any]]:
        """Returns the results so far by name."""
        if not self.results.exists():
            return {}
        rows = map(json.loads, self.results.read_text().splitlines())
        return {row["name"]: row for row in rows}

    def keep(self, name: str, **what: Any) -> None:
        """Writes and prints a result."""
        at = round(time.perf_counter() - self.begun, 1)
        line = json.dumps({"name": name, "at_s": at, **what})
        with self.results.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def start(self, name: str, words: list[str], gpu: int | None = None) -> subprocess.Popen[bytes]:
        """Starts a command, its output in <work>/<name>.log."""
        environment = dict(os.environ)
        environment.pop("L2R_RUN_DIR", None)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        log = (self.work / f"{name}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, env=environment
        )

    def fit(
        self, name: str, extra: list[str], gpu: int | None = None, verify: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a training run whose steps are timed."""
        options = self.options
        words = [
            "train.py",
            "fit",
            f"--config={CONFIG}",
            *([] if not options.toy else TOY),
            f"--run_dir={self.work / name}",
            f"--data.train_data={options.rows}",
            f"--data.limit_rows={options.limit_rows}",
            f"--data.val_rows={options.val_rows}",
            *([] if options.batch_size is None else [f"--data.batch_size={options.batch_size}"]),
            "--data.keep_in_memory=false",
            "--trainer.enable_progress_bar=false",
            "--verification.progress=false",
            f"--verification.prompts_per_set={options.prompts}",
            f"--trainer.accelerator={'cpu' if options.toy else 'gpu'}",
            "--trainer.profiler=benchmarks.step_profiler.StepProfiler",
            f"--trainer.profiler.output={self.work / name}.json",
            f"--trainer.profiler.warmup={options.warmup}",
            f"--trainer.profiler.steps={options.steps}",
            *([] if verify else NO_VERIFICATION),
            *options.extra,
            *extra,
        ]
        return self.start(name, words, gpu)

    def wait(self, name: str, process: subprocess.Popen[bytes], expected: int = 0) -> bool:
        """Waits; keeps the failure if it is one."""
        code = process.wait()
        if code != expected:
            tail = (self.work / f"{name}.log").read_text(errors="replace")[-1500:]
            self.keep(f"{name} FAILED", code=code, tail=tail)
        return code == expected

    def timing(self, name: str) -> dict[str, Any]:
        """Returns what the run's profiler wrote."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # ------------------------------------------------------------------ experiments

    def cache(self) -> None:
        """Builds the cache on all devices and reads every byte of it."""
        options, name = self.options, "build"
        if name in self.done():
            return
        words = ["-m", "torch.distributed.run", f"--nproc-per-node={options.devices}"]
        words += ["-m", "data.cache", "build", f"--output={self.work / 'cache'}"]
        words += ["--from", str(CONFIG), f"--target={options.target}"]
        words += [f"--train_data={options.rows}", f"--limit_rows={options.limit_rows}"]
        words += [f"--val_rows={options.val_rows}", f"--prompts_per_set={options.prompts}"]
        words += ["--progress=false"]
        if options.toy:
            words += ["--max_length=160", "--target_dtype=float32", "--max_new_tokens=8"]
            words += ["--shard_gb=0.002"]
        begun = time.perf_counter()
        if not self.wait(name, self.start(name, words)):
            return
        seconds = time.perf_counter() - begun
        manifest = json.loads((self.work / "cache" / "manifest.json").read_text())
        size = sum(shard["bytes"] for shard in manifest["shards"])
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        self.keep(
            name,
            seconds=seconds,
            gigabytes=size / 1e9,
            tokens=tokens,
            bytes_per_token=size / tokens,
            argmax_share=manifest["argmax_share"],
        )

    def stream(self) -> None:
        """The same run from the cache and online, side by side on two devices."""
        more, done = [f"--trainer.max_epochs={self.options.epochs}"], self.done()
        online = [*more, f"--data.target={self.options.target}"]
        running = {}
        if "cached" not in done:
            running["cached"] = self.fit("cached", [*more, *self.from_cache()], gpu=0)
        if "online" not in done:
            running["online"] = self.fit("online", online, gpu=1)
        if "verify" not in done:
            words = ["-m", "data.cache", "verify", str(self.work / "cache")]
            if self.wait("verify", self.start("verify", words)):
                said = (self.work / "verify.log").read_text().splitlines()
                self.keep("verify", said=said[-1:])
        for name, process in running.items():
            if self.wait(name, process):
                self.keep(name, **self.timing(name))
        self.compare("curves", "cached", "online")
        name = "online-again"
        wanted = self.options.again and name not in done
        if wanted and self.wait(name, self.fit(name, online, gpu=1)):
            self.keep(name, **self.timing(name))
            self.compare("curves of two online runs", "online", name)

    def compare(self, title: str, *names: str) -> None:
        """Keeps how far two runs' logged losses lie apart, at the beginning and over all."""
        curves = [loss_curve(self.work / name) for name in names]
        steps = sorted(curves[0].keys() & curves[1].keys())
        if not steps:
            return
        apart = [abs(curves[0][step] - curves[1][step]) for step in steps]
        self.keep(
            title,
            logged_steps=len(steps),
            first_differences=apart[:5],
            mean_difference=sum(apart) / len(apart),
            largest_difference=max(apart),
            last=[curve[steps[-1]] for curve in curves],
        )

    def scale(self) -> None:
        """A step on one device, and on all with the batch of each unchanged."""
        options = self.options
        devices, limit = options.devices, options.warmup + options.steps
        common = [*self.from_cache(), "--trainer.max_epochs=100", "--trainer.limit_val_batches=0"]
        common += [f"--trainer.max_steps={limit + 1}"]
        rows = "" if options.batch_size is None else f", {options.batch_size} rows a device"
        strategies = {"one": ["--trainer.devices=1"]}
        strategies |= {name: self.overlay(name) for name in ("ddp", "fsdp2")}
        for strategy, extra in strategies.items():
            name = strategy + rows
            if name in self.done() or strategy not in options.only:
                continue
            if self.wait(name, self.fit(name, [*extra, *common], 0 if devices == 1 else None)):
                self.keep(name, **self.timing(name))
        found = self.done()
        alone = found.get("one" + rows, {}).get("seconds_per_step")
        efficiency = {
            name: alone / found[name + rows]["seconds_per_step"]
            for name in strategies
            if alone and name != "one" and name + rows in found
        }
        self.keep("scaling efficiency" + rows, devices=devices, **efficiency)

    def resume(self) -> None:
        """FSDP2 with verification: stopped by SIGTERM in mid-epoch, and resumed."""
        limit = min(100, self.options.warmup + self.options.steps)
        extra = [*self.overlay("fsdp2"), *self.from_cache(), "--trainer.max_epochs=1"]
        extra += [f"--trainer.limit_train_batches={limit}", "--preemption.check_every_n_steps=1"]
        kill = [
            "--trainer.callbacks+=tests.faults.KillAt",
            f"--trainer.callbacks.init_args.step={limit // 2}",
        ]
        name = "fsdp2-resumed"
        if name in self.done():
            return
        first = self.fit(name, [*extra, *kill], verify=True)
        if self.wait(name, first, 128 + signal.SIGTERM):
            second = self.fit(name, [*extra, "--ckpt_path=last"], verify=True)
            if self.wait(name, second):
                said = (self.work / f"{name}.log").read_text(errors="replace").splitlines()
                lengths = [line for line in said if "accepted length" in line]
                self.keep(name, said=lengths, steps=len(loss_curve(self.work / name)))

    def from_cache(self) -> list[str]:
        """Arguments that read features from the cache."""
        return [f"--data.cache={self.work / 'cache'}", f"--data.target={self.options.target}"]

    def overlay(self, name: str) -> list[str]:
        """Arguments that put a run on all devices."""
        words = [f"--config={ROOT / 'configs' / 'trainer' / name}.yaml"]
        words += [f"--trainer.devices={self.options.devices}"]
        return [*words, f"--trainer.accelerator={'cpu' if self.options.toy else 'gpu'}"]


def loss_curve(run_dir: Path) -> dict[int, float]:
    """Returns the logged cross-entropy by step."""
    return dict(scalars(run_dir).get("train/cross_entropy", []))


def main() -> None:
    """Runs what is asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--work", default="/tmp/stream_and_scale", help="caches and runs")
    parser.add_argument("--parts", nargs="+", default=["cache", "stream", "scale", "resume"])
    parser.add_argument(
        "--only", nargs="+", default=["one", "ddp", "fsdp2"], help="strategies of `scale`"
    )
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--limit_rows", type=int, default=6000)
    parser.add_argument("--val_rows", type=int, default=200)
    parser.add_argument("--batch_size", type=int, help="rows of a device; None for the config's")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=32, help="verified")
    parser.add_argument("--warmup", type=int, default=200, help="steps; shapes compile")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--again", action="store_true", help="also a second online run, to compare")
    parser.add_argument("--extra", action="append", default=[], help="one more word of every fit")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget earlier work")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
        shutil.rmtree(options.output, ignore_errors=True)
    bench = Bench(options)
    for part in options.parts:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
