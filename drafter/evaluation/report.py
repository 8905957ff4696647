"""Figures of one or more drafters on the same trajectories, as a dict and as a table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drafter.config import DrafterConfig
from drafter.errors import UserError
from drafter.evaluation.measure import DrafterMetrics, measure
from drafter.evaluation.trajectories import (
    EvalPrompt,
    Trajectory,
    TrajectorySettings,
    generate_trajectories,
)
from drafter.model import Drafter
from drafter.target import Target

FORMAT = 1
AVERAGE = "average"
AVERAGED = (
    "accepted_length",
    "accepted_length_per_response",
    "accepted_length_unclipped",
    "accepted_per_round",
    "drafted_per_round",
    "waste_ratio",
)
PHASES = ("prefill", "draft", "verify", "bookkeeping")


@dataclass
class LoadedDrafter:
    """A drafter and what its file says of its target."""

    name: str
    drafter: Drafter
    target_path: str | None = None
    target_gguf_file: str | None = None
    target_fingerprint: str | None = None
    target_dtype: str = "auto"


def load_drafter(path: str) -> LoadedDrafter:
    """Returns the drafter in a checkpoint, a run folder or a published drafter's folder.

    Args:
        path: A Lightning .ckpt; a run folder (its best checkpoint, or else its last); or a folder
            with config.json and model.safetensors.

    Raises:
        UserError: None of these, or the weights don't fit the config; names the tensors.
    """
    where = Path(path)
    if where.is_dir() and (where / "checkpoints").is_dir():
        found = [where / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        where = next((file for file in found if file.is_file()), found[0])
    if where.is_dir() and (where / "config.json").is_file():
        return LoadedDrafter(where.name, Drafter.from_pretrained(where).eval())
    if not where.is_file():
        raise UserError(f"{path}: no checkpoint, run folder or drafter folder is there.")
    try:
        checkpoint = torch.load(where, map_location="cpu", weights_only=True)
        config = DrafterConfig.from_dict(checkpoint["drafter_config"])
        prefix = "drafter."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items()}
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where} is not a checkpoint of a drafter: {reason}") from error
    drafter = Drafter(config)
    missing, unexpected = drafter.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(f"{where}: missing tensors {missing}, unexpected tensors {unexpected}.")
    target = checkpoint.get("target", {})
    return LoadedDrafter(
        path,
        drafter.eval(),
        target.get("path"),
        target.get("gguf_file"),
        target.get("fingerprint"),
        target.get("dtype", "auto"),
    )


def report(
    drafters: Sequence[LoadedDrafter],
    target: Target,
    prompts: Sequence[EvalPrompt],
    settings: TrajectorySettings,
    *,
    mode: str = "replay",
    folder: Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Returns every drafter's figures on every prompt set and on their average.

    Args:
        drafters: Measured on the same trajectories.
        target: Of all of them.
        prompts: Of one or more sets.
        settings: Of the trajectories.
        mode: `replay` or `decode`; the latter also times decoding with and without the drafter.
        folder: Where trajectories are kept.
        batch_size: Prompts generated together.
        progress: Show bars.

    Raises:
        UserError: A drafter belongs to a target of another shape.
    """
    begun = time.perf_counter()
    if mode == "decode":  # the loop writes its own responses
        trajectories = [Trajectory(prompt, [], [], False) for prompt in prompts]
    else:
        trajectories = generate_trajectories(
            target, prompts, settings, folder=folder, batch_size=batch_size, progress=progress
        )
    generated = time.perf_counter() - begun
    results = []
    for loaded in drafters:
        check_fits(loaded, target)
        drafter = loaded.drafter.to(device=target.device, dtype=target.dtype)
        results.append(
            _measure_one(loaded, drafter, target, trajectories, settings, mode, progress)
        )
    return {
        "format": FORMAT,
        "mode": mode,
        "settings": asdict(settings),
        "target": {"path": target.path, "fingerprint": target.fingerprint},
        "dtype": str(target.dtype),
        "device": str(target.device),
        "seconds_generating_trajectories": generated,
        "drafters": results,
    }


def check_fits(loaded: LoadedDrafter, target: Target) -> None:
    """Raises UserError for a target of another shape; warns of another target of the same."""
    config = loaded.drafter.config
    if (config.hidden_size, config.num_target_layers) != (target.hidden_size, target.num_layers):
        raise UserError(
            f"{loaded.name} was made for a target of hidden size {config.hidden_size} and "
            f"{config.num_target_layers} layers; {target.path} has {target.hidden_size} and "
            f"{target.num_layers}."
        )
    if loaded.target_fingerprint not in (None, target.fingerprint):
        print(f"warning: {loaded.name} was trained with other weights than {target.path} holds")


def _measure_one(
    loaded: LoadedDrafter,
    drafter: Drafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    settings: TrajectorySettings,
    mode: str,
    progress: bool,
) -> dict[str, Any]:
    metrics: dict[str, DrafterMetrics] = {}
    seconds: dict[str, dict[str, float]] = {}
    decoding = mode == "decode"
    if decoding:  # both loops once, untimed: the first passes on a device are slow
        warm_up = replace(settings, max_new_tokens=min(8, settings.max_new_tokens))
        list(measure(drafter, target, trajectories[:1], warm_up, mode=mode, plain=True))
    begun = time.perf_counter()
    for response in measure(
        drafter, target, trajectories, settings, mode=mode, plain=decoding, progress=progress
    ):
        name = response.trajectory.prompt.set_name
        if name not in metrics:
            metrics[name] = DrafterMetrics(drafter.config.num_drafted)
        metrics[name].update(response.counts)
        times = seconds.setdefault(name, {"tokens": 0.0, "speculative": 0.0, "plain": 0.0})
        times["tokens"] += len(response.ids)
        times["speculative"] += sum(response.seconds.values())
        times["plain"] += sum(response.plain_seconds.values())
        for phase, value in response.seconds.items():
            times[phase] = times.get(phase, 0.0) + value
    sets = {name: metric.compute() for name, metric in metrics.items()}
    if decoding:
        for name, figures in sets.items():
            figures |= _speeds(seconds[name])
    average = {key: _mean(figures[key] for figures in sets.values()) for key in AVERAGED}
    if decoding:
        average["speedup"] = _mean(figures["speedup"] for figures in sets.values())
    return {
        "name": loaded.name,
        "block_size": drafter.config.block_size,
        "seconds_measuring": time.perf_counter() - begun,
        "sets": sets,
        AVERAGE: average,
    }


def _mean(values: Iterable[float]) -> float:
    """Returns the mean of the finite values; nan if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def without_nan(value: Any) -> Any:
    """Returns a JSON-like value with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _speeds(times: dict[str, float]) -> dict[str, float]:
    speculative = times["tokens"] / max(times["speculative"], 1e-9)
    plain = times["tokens"] / max(times["plain"], 1e-9)
    out = {
        "tokens_per_second": speculative,
        "tokens_per_second_plain": plain,
        "speedup": speculative / plain,
    }
    return out | {f"seconds_{phase}": times.get(phase, 0.0) for phase in PHASES}


def table(result: dict[str, Any]) -> str:
    """Returns the report as aligned text, one row for each drafter and set."""
    decoding = result["mode"] == "decode"
    head = ["drafter", "set", "accepted length", "per response", "unclipped", "waste", "responses"]
    head += ["tokens/s", "plain", "ratio"] if decoding else []
    rows = [head]
    for drafter in result["drafters"]:
        named = [*drafter["sets"].items(), (AVERAGE, drafter[AVERAGE])]
        for name, figures in named:
            row = [drafter["name"], name]
            row += [
                f"{figures[key]:.3f}"
                for key in (
                    "accepted_length",
                    "accepted_length_per_response",
                    "accepted_length_unclipped",
                )
            ]
            waste = figures["waste_ratio"]
            row.append(f"{waste:.3f}" if math.isfinite(waste) else "-")
            row.append(f"{figures['responses']:.0f}" if name != AVERAGE else "")
            if decoding:
                for key in ("tokens_per_second", "tokens_per_second_plain"):
                    row.append(f"{figures[key]:.1f}" if key in figures else "")
                row.append(f"{figures['speedup']:.2f}")
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
