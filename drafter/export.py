"""Writes a trained drafter as others load it: `python -m drafter.export runs/smollm2 --output DIR`.

The folder has the z-lab layout (method.md, last section): `config.json` and one `model.safetensors`
without embedding and head. A card and the drafter's provenance lie beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.loading import (
    PROVENANCE,
    LoadedDrafter,
    drafter_fingerprint,
    load_drafter,
)
from drafter.evaluation.markdown import markdown
from drafter.evaluation.recipes import flat, read_yaml
from drafter.evaluation.results import read_result
from drafter.files import file_stamp, local_copy, pieces, write_atomic

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"
DTYPES = ("bfloat16", "float16", "float32")
SHOWN = (
    "trainer.max_epochs",
    "trainer.precision",
    "model.num_layers",
    "model.block_size",
    "model.init_from_target",
    "model.optimizer",
    "model.learning_rate",
    "model.warmup_fraction",
    "model.weight_decay",
    "model.max_grad_norm",
    "model.loss.gamma",
    "model.loss.alpha_focal",
    "model.loss.alpha_chain",
    "model.loss.alpha_kl",
    "data.batch_size",
    "data.num_anchors",
    "data.max_length",
    "data.limit_rows",
    "data.val_rows",
    "seed_everything",
)
"""Settings of a recipe that its card lists; config.yaml has all."""


def export(
    loaded: LoadedDrafter,
    output: Path,
    dtype: str = "bfloat16",
    title: str | None = None,
    note: str = "",
    result: Mapping[str, Any] | None = None,
) -> None:
    """Writes a drafter's folder; what is there is replaced only once the new one is whole.

    Args:
        loaded: The drafter. Of a run, its recipe and provenance go along.
        output: The folder.
        dtype: Of the weights in the file, and in config.json.
        title: Of the card; the folder's name by default.
        note: Further paragraphs of the card: data, licence.
        result: Of `evaluate.py report`, for the card.

    Raises:
        UserError: The dtype is unknown, the folder holds something else, the weights are not finite
            in that dtype, or the result is another drafter's.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    output = output.resolve()
    _check_replaceable(output)
    drafter = loaded.drafter.to(getattr(torch, dtype))
    bad = [name for name, tensor in drafter.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{loaded.name}: {', '.join(bad)} is not finite in {dtype}.")
    if result is not None:
        result = _only_of(result, {loaded.fingerprint, drafter_fingerprint(drafter)}, loaded.name)
    provenance = provenance_of(loaded)
    aside = output.with_name(f".{output.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        drafter.config.dtype = getattr(torch, dtype)
        drafter.save_pretrained(aside, max_shard_size="1TB")
        (aside / WEIGHTS).chmod(0o644)  # safetensors makes it private
        write_atomic(aside / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
        if loaded.run_config is not None:
            shutil.copyfile(loaded.run_config, aside / CONFIG)
        card = model_card(title or output.name, drafter.config.to_dict(), provenance, note, result)
        write_atomic(aside / CARD, card)
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(output: Path) -> None:
    """Raises UserError unless a folder is new, empty, or an export of ours and nothing else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; give a folder.")
    names = {file.name for file in output.iterdir()}
    others = sorted(names - {"config.json", WEIGHTS, PROVENANCE, CONFIG, CARD})
    if others or (names and PROVENANCE not in names):
        held = f" beside others {others[0]}" if others else ""
        raise UserError(f"{output} holds{held} what no export has written; choose another folder.")


def _only_of(result: Mapping[str, Any], fingerprints: set[str], name: str) -> dict[str, Any]:
    """Returns a result with the drafter's own figures only."""
    own = [one for one in result["drafters"] if one.get("fingerprint") in fingerprints]
    if not own:
        raise UserError(f"the results are of other drafters than {name}; measure it first.")
    return {**result, "drafters": own, "comparisons": []}


def provenance_of(loaded: LoadedDrafter) -> dict[str, Any]:
    """Returns where a drafter comes from: its target, its run's provenance and its recipe."""
    if loaded.provenance:
        return dict(loaded.provenance)
    run: dict[str, Any] = {}
    if loaded.run_config is not None:
        files = pieces(loaded.run_config.parent, "provenance", ".json")
        run = {"runs": [json.loads(file.read_text()) for file in files]}
        run["settings"] = flat(read_yaml(loaded.run_config))
        data = run["settings"].get("data.train_data")
        data = local_copy(data) if isinstance(data, str) else data
        if isinstance(data, str) and Path(data).is_file():
            run["train_data_stamp"] = file_stamp(data)
    return {
        "target": {
            "path": loaded.target_path,
            "gguf_file": loaded.target_gguf_file,
            "fingerprint": loaded.target_fingerprint,
            "dtype": loaded.target_dtype,
        },
        "exported": time.strftime("%Y-%m-%d"),
        "checkpoint": loaded.path,
        "fingerprint_before_rounding": loaded.fingerprint,
        **run,
    }


def model_card(
    title: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    note: str = "",
    result: Mapping[str, Any] | None = None,
) -> str:
    """Returns a drafter's card in Markdown."""
    target = provenance["target"]
    known = target["path"] is not None
    settings = provenance.get("settings", {})
    dflash = config["dflash_config"]
    lines = [
        f"# {title}",
        "",
        "A block-diffusion drafter for speculative decoding, trained with l2r-drafter. It proposes "
        f"{config['block_size'] - 1} tokens after every token that its target accepts; the text "
        "stays the target's own.",
        "",
        *([f"- target: {target['path']} (fingerprint {target['fingerprint']})"] * known),
        f"- {config['num_hidden_layers']} layers, width {config['hidden_size']}, K = "
        f"{config['block_size']}; reads target layers "
        f"{', '.join(map(str, dflash['target_layer_ids']))}; mask token {dflash['mask_token_id']}",
        f"- weights in {config['dtype']}, in the z-lab layout: no embedding, no head",
        "",
    ]
    if settings:
        shown = [f"| `{name}` | {settings[name]} |" for name in SHOWN if name in settings]
        lines += ["## Recipe", "", "| setting | value |", "| --- | --- |", *shown, ""]
    for run in provenance.get("runs", [])[-1:]:
        began, where, commit = (run.get(key) for key in ("started", "device", "git_commit"))
        lines += [f"Trained {str(began)[:10]} on {where}, commit {commit}.", ""]
    if note:
        lines += [note.rstrip(), ""]
    if result is not None:
        lines += ["## Accepted length", "", markdown(result).rstrip(), ""]
        where = [result[key] for key in ("device_name", "date", "revision") if result.get(key)]
        lines += [f"`{result.get('command', 'evaluate.py report')}` ({', '.join(where)})", ""]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Exports; prints a user's mistake as one sentence and exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m drafter.export", description=__doc__)
    parser.add_argument("drafter", help="a run, a checkpoint or a drafter's folder")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--title", help="of the card")
    parser.add_argument("--note", help="Markdown file whose text the card contains")
    parser.add_argument("--results", help="JSON file of `evaluate.py report`, for the card")
    options = parser.parse_args(args)
    with one_sentence_errors():
        if options.note and not Path(options.note).is_file():
            raise UserError(f"--note {options.note}: there is no such file.")
        export(
            load_drafter(options.drafter),
            Path(options.output),
            options.dtype,
            options.title,
            Path(options.note).read_text() if options.note else "",
            read_result(Path(options.results)) if options.results else None,
        )
        print(f"{options.output}: {options.dtype}", flush=True)


if __name__ == "__main__":
    main()
