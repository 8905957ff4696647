"""Holds an exported folder to what engines ask of it: `python -m drafter.export check DIR`.

No engine is needed, and none is run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafter.borrowed import tensor_files
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.acceptance import ACCEPTANCE, acceptance_lines, prompts_lines
from drafter.evaluation.loading import PROVENANCE
from drafter.export_rules import IDS_RULE, SIZES_RULE, Finding, config_rules, said_by
from drafter.export_tensors import tensor_rules
from drafter.speculators_layout import is_speculators, local_verifier, verifier_name


def check_export(folder: Path, config: Mapping[str, Any]) -> list[Finding]:
    """Returns every rule for a folder, kept or not.

    Args:
        folder: With the weights.
        config: Content of its config.json.
    """
    findings = config_rules(config)
    if any(one.fault for one in findings if one.rule in (SIZES_RULE, IDS_RULE)):
        return findings  # no shape can be told
    try:
        files = tensor_files(folder)
    except UserError as error:
        return [*findings, Finding("weights are safetensors", str(error), "export it anew")]
    return findings + tensor_rules(said_by(config), files, is_speculators(config))


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a folder's config.json; raises UserError if there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its config.json can't be read ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder}: its config.json is no JSON object.")
    return config


def launch_lines(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Returns what starts each engine with a checked folder.

    Source: the engines' documents on speculative decoding (`--speculative-config` of vLLM,
    `--speculative-algorithm DFLASH` of SGLang) and the cards of published DFlash drafters.
    """
    said = said_by(config)
    target, explained = _target_of(folder, config)
    speculative = {
        "method": "dflash",
        "model": str(folder),
        "num_speculative_tokens": said.block_size - 1,
    }
    vllm = ["vllm", "serve", target, "--speculative-config", json.dumps(speculative)]
    sglang = [
        *("python", "-m", "sglang.launch_server", "--model-path", target),
        *("--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(folder)),
        *("--speculative-num-draft-tokens", str(said.block_size)),
    ]
    lines = [f"vLLM:   {shlex.join(vllm)}"]
    lines += [explained] if explained else []
    if is_speculators(config):
        return [*lines, "SGLang: reads the z-lab layout; export it with --format zlab"]
    return [*lines, f"SGLang: {shlex.join(sglang)}"]


def main(args: list[str]) -> None:
    """Prints every rule, the launch lines and expected acceptance; exits with 1 on a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m drafter.export check", description="holds a folder to what engines ask"
    )
    parser.add_argument("folder", help="as an export wrote it, in either layout")
    folder = Path(parser.parse_args(args).folder)
    with one_sentence_errors():
        config = read_config(folder)
        findings = check_export(folder, config)
        for one in findings:
            print(f"fault  {one.rule}: {one.fault}; {one.mend}" if one.fault else f"ok  {one.rule}")
        faults = sum(bool(one.fault) for one in findings)
        print(f"{folder}: {faults} of {len(findings)} rules are broken", flush=True)
        print_warnings(folder, config)
        if faults:
            sys.exit(1)
        for line in [*launch_lines(folder, config), *_expected(folder, config)]:
            print(line, flush=True)


def print_warnings(folder: Path, config: Mapping[str, Any]) -> None:
    """Says what others than this machine's users cannot load."""
    name = local_verifier(config)
    if name is not None:
        print(
            f"warning: {folder} names its target by a path of this machine ({name}), which others "
            "cannot load; export it with --verifier and the target's hub name",
            flush=True,
        )


def _target_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what a launch line has as target, and a word on it where that is a stand-in."""
    name = verifier_name(config)
    if name is not None:
        return name, ""
    unknown = "TARGET is the target that it was trained with"
    try:
        target = json.loads((folder / PROVENANCE).read_text())["target"]
        path, gguf_file = target["path"], target.get("gguf_file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "TARGET", unknown
    if path is None:
        return "TARGET", unknown
    if gguf_file is None:
        return str(path), ""
    if (Path(path) / gguf_file).is_file():
        return str(Path(path) / gguf_file), ""
    return "TARGET", f"TARGET is the file {gguf_file} of {path}"


def _expected(folder: Path, config: Mapping[str, Any]) -> list[str]:
    file = folder / ACCEPTANCE
    if not file.is_file():
        return [f"{ACCEPTANCE}: none; export with --results to say what to expect"]
    try:
        saved = json.loads(file.read_text())
        repeated = prompts_lines(folder, saved, said_by(config).block_size)
        return [*acceptance_lines(saved), f"as in {file}", *repeated]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({error}); export with --results anew.") from error
