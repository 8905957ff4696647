"""Writes a trained drafter as others load it: `python -m drafter.export runs/smollm2 --output DIR`.

The folder has the z-lab layout (method.md, last section): `config.json` and one `model.safetensors`
without embedding and head; or, with `--format speculators`, that library's. A card and the
drafter's provenance lie beside them. `python -m drafter.export check DIR` holds a folder to what
vLLM and SGLang ask of it (a run called `check` is given as `./check`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafter.borrowed import WEIGHTS
from drafter.draft_vocabulary import ReducedHead
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.acceptance import (
    ACCEPTANCE,
    ACCEPTANCE_PROMPTS,
    expected_acceptance,
    expected_prompts,
)
from drafter.evaluation.asked import read_asked, write_asked
from drafter.evaluation.loading import (
    PROVENANCE,
    LoadedDrafter,
    check_fits,
    drafter_fingerprint,
    load_drafter,
)
from drafter.evaluation.markdown import markdown
from drafter.evaluation.recipes import flat, read_yaml
from drafter.evaluation.results import read_result
from drafter.export_check import main as check
from drafter.export_check import print_warnings, read_config
from drafter.files import file_stamp, local_copy, pieces, write_atomic
from drafter.publish import publish
from drafter.speculators_layout import verifier_of, write_speculators
from drafter.target import Target

CONFIG, CARD = "config.yaml", "README.md"
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = {
    "zlab": "in the z-lab layout: no embedding, no head",
    "speculators": "in the speculators library's layout: no embedding, no head",
}
WRITTEN = frozenset(
    ("config.json", WEIGHTS, PROVENANCE, CONFIG, CARD, ACCEPTANCE, ACCEPTANCE_PROMPTS)
)
"""Names of what an export may write."""
SHOWN = (
    "trainer.max_epochs",
    "trainer.precision",
    "model.num_layers",
    "model.block_size",
    "model.draft_vocab_size",
    "model.confidence_head",
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
    "data.visible_prefix.share",
    "data.max_length",
    "data.limit_rows",
    "data.val_rows",
    "seed_everything",
)
"""Settings of a recipe that its card lists; config.yaml has all."""
OFF = {
    "model.draft_vocab_size": None,
    "model.confidence_head": "none",
    "data.visible_prefix.share": 0.0,
}
"""Values at which they are left out of it."""


def export(
    loaded: LoadedDrafter,
    output: Path,
    dtype: str = "bfloat16",
    title: str | None = None,
    note: str = "",
    result: Mapping[str, Any] | None = None,
    layout: str = "zlab",
    verifier: str | None = None,
    prompts: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes a drafter's folder; what is there is replaced only once the new one is whole.

    Args:
        loaded: The drafter. Of a run, its recipe and provenance go along.
        output: The folder.
        dtype: Of the weights in the file, and in config.json.
        title: Of the card; the folder's name by default.
        note: Further paragraphs of the card: data, licence.
        result: Of `evaluate.py report`, for the card and for acceptance.json.
        layout: One of LAYOUTS.
        verifier: What the speculators layout calls the target; what the drafter was trained for
            by default.
        prompts: Those of the result (asked.read_asked), which go along with it.

    Raises:
        UserError: The dtype or the layout is unknown, the folder holds something else, the weights
            are not finite in that dtype, the result is another drafter's, the speculators library
            could not read the target, or the z-lab layout is asked to hold a reduced vocabulary.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    if layout not in LAYOUTS:
        raise UserError(f"format {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}.")
    speculators = layout == "speculators"
    target = loaded.target_path, loaded.target_gguf_file
    named = verifier_of(*target, verifier) if speculators else {}
    if not speculators and verifier is not None:
        raise UserError("--verifier is told by the speculators layout only; leave it out.")
    if not speculators and not loaded.drafter.config.num_target_layers:
        raise UserError(
            f"{loaded.name} does not tell how many layers its target has, and the z-lab layout "
            "does; write num_target_layers into its config.json."
        )
    head_rows = None
    if loaded.drafter.draft_tokens is not None:
        if not speculators:
            raise UserError(
                f"{loaded.name} drafts from {len(loaded.drafter.draft_tokens)} tokens only, and "
                "the z-lab layout cannot say which; export it with --format speculators."
            )
        head_rows = _head_rows(loaded, verifier)
    output = output.resolve()
    _check_replaceable(output)
    drafter = loaded.drafter.to(getattr(torch, dtype))
    if drafter.confidence_head is not None:
        drafter.set_confidence_head(False)
        print(
            f"{loaded.name}: its confidence head is left out, for engines refuse tensors that they "
            "do not know; draft lengths are decided by it from the run or its checkpoint only."
        )
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
        if speculators:
            write_speculators(drafter, aside, named, head_rows)
        else:
            drafter.save_pretrained(aside, max_shard_size="1TB")
        (aside / WEIGHTS).chmod(0o644)  # safetensors makes it private
        write_atomic(aside / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
        if loaded.run_config is not None:
            shutil.copyfile(loaded.run_config, aside / CONFIG)
        said = drafter.config.to_dict()
        card = model_card(title or output.name, said, provenance, note, result, layout)
        write_atomic(aside / CARD, card)
        if result is not None:
            asked = expected_prompts(result, prompts)
            if asked:
                write_asked(asked, aside / ACCEPTANCE_PROMPTS)
            else:
                lacking = "do not have all their" if prompts else "have no"
                print(
                    f"{loaded.name}: its results {lacking} prompts beside them (OUT-prompts.jsonl "
                    "of `evaluate.py report --output OUT.json`), so none go along."
                )
            saved = expected_acceptance(result, len(asked))
            write_atomic(aside / ACCEPTANCE, json.dumps(saved, indent=2) + "\n")
        _put_in_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _head_rows(loaded: LoadedDrafter, verifier: str | None) -> Tensor:
    """Returns the rows (R, D) of the target's head that a reduced draft vocabulary keeps."""
    path = loaded.target_path or verifier
    assert path is not None  # verifier_of has looked
    target = Target.load(path, loaded.target_gguf_file, loaded.target_dtype)
    check_fits(loaded, target)
    head = loaded.drafter.head(target.head)
    assert isinstance(head, ReducedHead)
    if head.rows.bias is not None:
        raise UserError(
            f"the head of {path} has a bias, and the speculators layout has no place for one; a "
            "drafter of the whole vocabulary (no --model.draft_vocab_size) can be exported."
        )
    return head.rows.weight


def _put_in_place(new: Path, output: Path) -> None:
    """Renames a folder to `output`; what was there is removed only after that."""
    if not output.exists():
        new.rename(output)
        return
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(output: Path) -> None:
    """Raises UserError unless a folder is new, empty, or an export of ours and nothing else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; give a folder.")
    names = {file.name for file in output.iterdir()}
    others = sorted(names - WRITTEN)
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
    layout: str = "zlab",
) -> str:
    """Returns a drafter's card in Markdown."""
    target = provenance["target"]
    known = target["path"] is not None
    settings = provenance.get("settings", {})
    dflash, reduced = config["dflash_config"], config.get("draft_vocab_size")
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
        *([f"- drafts from {reduced} of {config['vocab_size']} tokens"] * (reduced is not None)),
        f"- weights in {config['dtype']}, {LAYOUTS[layout]}"
        f"{'' if reduced is None else ' but for the rows of these tokens'}",
        "",
    ]
    if settings:
        names = [n for n in SHOWN if n in settings and (n not in OFF or settings[n] != OFF[n])]
        shown = [f"| `{name}` | {settings[name]} |" for name in names]
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
    """Exports or checks; prints a user's mistake as one sentence and exits with code 2."""
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["check"]:
        return check(words[1:])
    parser = argparse.ArgumentParser(prog="python -m drafter.export", description=__doc__)
    parser.add_argument("drafter", help="a run, a checkpoint or a drafter's folder")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--format", default="zlab", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument(
        "--verifier", help="target's folder or hub name that the speculators layout tells"
    )
    parser.add_argument("--title", help="of the card")
    parser.add_argument("--note", help="Markdown file whose text the card contains")
    parser.add_argument(
        "--results",
        help="JSON file of `evaluate.py report`, for the card and acceptance.json; the prompts "
        "that lie beside it go along",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload it to this hub repository")
    options = parser.parse_args(words)
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
            options.format,
            options.verifier,
            read_asked(Path(options.results)) if options.results else (),
        )
        print(f"{options.output}: {options.dtype}", flush=True)
        if options.push_to_hub:
            folder = Path(options.output)
            print_warnings(folder, read_config(folder))
            print(publish(folder, options.push_to_hub, WRITTEN), flush=True)


if __name__ == "__main__":
    main()
