"""Feature caches: `python -m data.cache build|verify|repair|info`.

For example:

    python -m data.cache build --output cache --from configs/smollm2.yaml --train_data rows.jsonl
    torchrun --nproc-per-node 8 -m data.cache build ...     # any number of processes
    python train.py fit --config configs/smollm2.yaml --data.cache cache
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import fields
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from data.cache_build import Builder, CacheSettings
from data.cache_format import HELD_OUT, REPLAY, TRAIN, Manifest, read_manifest
from data.cache_repair import faults, repair
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.recipes import yaml_value

FROM_RUN = {
    "data": [field.name for field in fields(CacheSettings)],
    "model": ["target_layer_ids", "num_taps"],
    "verification": ["prompts_per_set", "max_new_tokens"],
}
"""Which settings of a run's config are settings of its cache, by group."""


def parse(args: list[str] | None) -> Namespace:
    """Returns the parsed command line."""
    parser = ArgumentParser(prog="python -m data.cache", description=__doc__)
    verbs = parser.add_subcommands(dest="verb")
    build = ArgumentParser(description="build a cache, or go on with one that is half-built")
    build.add_argument("--output", required=True, type=str, help="Folder of the cache.")
    build.add_argument("--device", default=None, type=str, help="Default: cuda if there is one.")
    build.add_argument("--batch_tokens", default=8192, type=int, help="The target runs at once.")
    build.add_argument("--budget_gb", default=None, type=float, help="Refuse a larger cache.")
    build.add_argument("--progress", default=True, type=bool, help="Show bars.")
    build.add_class_arguments(CacheSettings, None)
    verbs.add_subcommand("build", build)
    for verb, what in (
        ("verify", "read every byte and name what is wrong"),
        ("repair", "build anew the shards that are damaged, and no other"),
        ("info", "say what a cache holds"),
    ):
        own = ArgumentParser(description=what)
        own.add_argument("cache", type=str, help="Folder of the cache.")
        own.add_argument("--device", default=None, type=str, help="Default: cuda if there is one.")
        own.add_argument("--progress", default=True, type=bool, help="Show bars.")
        verbs.add_subcommand(verb, own)
    return parser.parse_args(with_run_settings(sys.argv[1:] if args is None else args))


def with_run_settings(args: list[str]) -> list[str]:
    """Returns the arguments with `--from RUN.yaml` replaced by what that config sets.

    Raises:
        UserError: The config is missing or not YAML.
    """
    if "--from" not in args:
        return args
    place = args.index("--from")
    if place + 1 >= len(args):
        raise UserError("--from needs a config of train.py.")
    path = Path(args[place + 1])
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--from {path}: there is no such config, or it is not YAML.") from error
    taken: list[str] = []
    for group, names in FROM_RUN.items():
        own = content.get(group) or {}
        taken += [
            f"--{name}={yaml_value(own[name])}" for name in names if own.get(name) is not None
        ]
        if group == "verification" and own.get("batch_size") is not None:
            taken.append(f"--verify_batch_size={own['batch_size']}")
    if reads_the_target((content.get("model") or {}).get("loss") or {}):
        taken.append("--last_hidden=true")
    # what stands on the command line comes later, so it wins
    return [*args[:place], *taken, *args[place + 2 :]]


def reads_the_target(loss: dict[str, Any]) -> bool:
    """Returns whether a loss, as a config has it, reads the target's distribution."""
    extras = [extra.get("term") or {} for extra in (loss.get("extra") or {}).values()]
    return bool(loss.get("alpha_kl")) or any(map(_term_reads_it, extras))


def _term_reads_it(term: dict[str, Any]) -> bool:
    kind: Any = locate(str(term.get("class_path", "")))
    # what can't be made is refused where the run is configured, in a sentence of its own
    with contextlib.suppress(TypeError, ValueError):
        return bool(kind(**(term.get("init_args") or {})).reads)
    return False


def run_build(options: Namespace) -> None:
    """Builds, and says what came of it."""
    names = [field.name for field in fields(CacheSettings)]
    settings = CacheSettings(**{name: options[name] for name in names})
    builder = Builder(
        settings,
        Path(options.output),
        device=options.device or default_device(),
        batch_tokens=options.batch_tokens,
        budget_gb=options.budget_gb,
        progress=options.progress,
    )
    manifest = builder.run()
    print("\n".join(describe(Path(options.output), manifest)))


def run_verify(options: Namespace) -> None:
    """Prints every fault; exits with code 1 if there is one."""
    folder = Path(options.cache)
    found = faults(folder, read_manifest(folder), options.progress)
    for fault in found.values():
        print(fault)
    if found:
        print(f"{len(found)} files are damaged; `python -m data.cache repair {folder}` mends them")
        sys.exit(1)
    print(f"{folder}: every byte is as it was written")


def run_repair(options: Namespace) -> None:
    """Mends what is damaged."""
    mended = repair(Path(options.cache), options.device or default_device(), options.progress)
    print(f"built anew: {', '.join(mended)}" if mended else "nothing is damaged")


def run_info(options: Namespace) -> None:
    """Prints what a cache holds."""
    folder = Path(options.cache)
    print("\n".join(describe(folder, read_manifest(folder))))


def describe(folder: Path, manifest: Manifest) -> list[str]:
    """Returns what a cache holds, a line each."""
    identity = manifest.identity
    total = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"cache      {folder}",
        f"target     {identity['target']['path']} ({identity['target']['fingerprint']}), run in "
        f"{identity['target']['dtype']}",
        f"features   layers {identity['layer_ids']} of {identity['target']['num_layers']}, hidden "
        f"size {identity['hidden_size']}, {identity['dtype']}"
        + (", with last_hidden" if identity["last_hidden"] else ""),
    ]
    for part in (TRAIN, HELD_OUT, REPLAY):
        shards = manifest.part(part)
        if shards:
            lines.append(
                f"{part:<10} {sum(s.rows for s in shards):,} rows, "
                f"{sum(s.tokens for s in shards):,} tokens, "
                f"{sum(s.positions for s in shards):,} positions in {len(shards)} shards"
            )
    tokens = sum(shard.tokens for shard in manifest.shards)
    lines.append(f"size       {total / 1e9:.3f} GB, {total / max(1, tokens):.0f} bytes a token")
    lines.append(
        f"aligned    {100 * manifest.argmax_share:.2f} % of the scored tokens are the target's own "
        "argmax"
    )
    return lines


def default_device() -> str:
    """Returns this process's own GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def main(args: list[str] | None = None) -> None:
    """Runs a verb; prints a user's mistake as one sentence and exits with code 2."""
    with one_sentence_errors():
        options = parse(args)
        own = options[options.verb]
        {"build": run_build, "verify": run_verify, "repair": run_repair, "info": run_info}[
            options.verb
        ](own)


if __name__ == "__main__":
    main()
