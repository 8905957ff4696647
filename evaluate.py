"""Measures drafters: `python evaluate.py report --ckpt RUN --benchmarks gsm8k aime`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import train
from callbacks.run_files import git_commit
from data.eval_prompts import check_eval_prompts, load_eval_prompts
from data.overlap import overlap_lines, overlap_with_runs
from data.prompt_sets import FollowUps, Prompt
from data.sample_rows import sample_rows
from data.sharing import load_target, shared_between_runs
from data.sources import Source
from drafter.draft_length import read_draft_length, write_draft_length
from drafter.errors import UserError, one_sentence_errors
from drafter.evaluation.ablation import Ablation
from drafter.evaluation.asked import check_output, merge_asked, read_asked
from drafter.evaluation.calibration import find_draft_length, plot_calibration
from drafter.evaluation.contenders import searches_of, with_draft_length, with_searches
from drafter.evaluation.doctor import Patient, examine
from drafter.evaluation.loading import LoadedDrafter, check_fits, load_drafter
from drafter.evaluation.measure import FeatureStore
from drafter.evaluation.options import check_device, measured_as, parse, settings_from
from drafter.evaluation.output import show, write_ablation, write_result
from drafter.evaluation.plan import plan
from drafter.evaluation.recipes import flat, read_grid, read_yaml
from drafter.evaluation.report import prepare, report, sort_by_fit
from drafter.evaluation.results import merge, read_result, summarise
from drafter.evaluation.tables import name_apart
from drafter.files import write_atomic
from drafter.search import Search
from drafter.target import Target


def run_report(options: argparse.Namespace) -> None:
    """Measures drafters side by side; prints the tables and writes what was asked for."""
    settings = settings_from(options)
    searches = searches_of(options)
    check_audit(options, searches)
    check_prompts(options)
    if options.draft_length:
        read_draft_length(Path(options.draft_length))  # a mistake is told before the loading
    if options.output:
        check_output(Path(options.output), options.prompts or ())
    drafters, unreadable = load_all(options.ckpt, options.block_size)
    target = target_for(drafters, options)
    if settings.decodes and any(searches):
        _ = target.tree_masks  # says now what it can't do, not after hours
    drafters, misfits = sort_by_fit(drafters, target)
    misfits = [*unreadable, *misfits]
    prompts, follow_up = prompts_for(target, options)
    contenders = with_searches(drafters, searches)
    if options.draft_length:
        sampling = settings.trajectories.sampling
        contenders += with_draft_length(drafters, options.draft_length, sampling)
    if options.dry_run:
        print("\n".join([*misfits, *plan(contenders, target, prompts, follow_up, settings)]))
        return
    overlap = overlap_with_runs(drafters, prompts, target.tokenizer)
    print("\n".join(overlap_lines(overlap)))
    result = report(contenders, target, prompts, follow_up, settings)
    result |= {"misfits": misfits, "overlap": overlap, **where_and_when(target.device)}
    show(result)
    if options.output:
        write_result(result, Path(options.output))


def run_calibrate(options: argparse.Namespace) -> None:
    """Finds the draft length that pays here; writes it, with a plot beside it."""
    settings = settings_from(options)
    check_prompts(options)
    loaded = load_drafter(options.ckpt, options.block_size)
    target = target_for([loaded], options)
    check_fits(loaded, target)
    loaded.drafter.to(target.device, target.dtype).requires_grad_(False)
    prompts, follow_up = prompts_for(target, options)
    prepared = prepare(target, prompts, follow_up, settings)
    rule, record, found = find_draft_length(
        loaded, target, prepared.trajectories, settings.trajectories, settings.progress
    )
    output = Path(options.output)
    write_draft_length(rule, output, {**record, **where_and_when(target.device)})
    picture = output.with_suffix(".png")
    write_atomic(picture, plot_calibration(rule, found, record["confidence"]))
    best = found.best
    if record["calibration_error"]:
        off = ", ".join(f"{how} {error:.3f}" for how, error in record["calibration_error"].items())
        print(
            f"confidence ({record['confidence']}) is off by: {off} (on responses that it was not "
            "calibrated on)"
        )
    gain = found.tokens_per_second[best] / found.tokens_per_second[0] - 1
    print(
        f"a slot takes {1e3 * record['costs']['slot']:.2f} ms to verify, a round "
        f"{1e3 * record['costs']['fixed']:.1f} ms without drafts\n"
        f"draft while {rule.threshold:g} likely: {found.drafted[best]:.1f} of "
        f"{found.drafted[0]:.1f} slots a round, accepted length {found.accepted_length[best]:.3f} "
        f"of {found.accepted_length[0]:.3f}, {100 * gain:+.0f} % tokens per second, predicted on "
        "these prompts\n"
        f"rule: {output} (evaluate.py report --draft-length {output}); plot: {picture}"
    )


def run_doctor(options: argparse.Namespace) -> None:
    """Prints what each check of a drafter finds; exits with code 1 if one finds a fault."""
    loaded = load_drafter(options.ckpt, options.block_size)
    run = run_settings(loaded.run_config)
    source, cache = rows_to_look_at(options, run)
    if device_for(options) == "cpu":
        options.dtype = options.dtype or "float32"  # 16 bits are several times slower on most
    target = target_for([loaded], options)
    check_fits(loaded, target)
    loaded.drafter.to(target.device, target.dtype).requires_grad_(False)
    sample = sample_rows(
        target,
        source,
        cache,
        count=options.rows,
        max_length=options.max_length,
    )
    patient = Patient(
        loaded,
        target,
        sample.rows,
        sample.header_ids,
        run.get("model.block_size"),
        sample.stored,
    )
    findings = []
    for finding in examine(patient):
        print("\n".join(finding.lines()), flush=True)
        findings.append(finding)
        if options.output:
            record = where_and_when(target.device) | {"findings": [asdict(one) for one in findings]}
            write_atomic(Path(options.output), json.dumps(record, indent=1))
    faults = [finding for finding in findings if finding.fault]
    if faults:
        causes = "cause" if len(faults) == 1 else "causes"
        print(f"\n{len(faults)} likely {causes}: {', '.join(one.name for one in faults)}")
        sys.exit(1)
    print("\nno known fault: if accepted lengths are low, train longer, or on more aligned rows")


def rows_to_look_at(
    options: argparse.Namespace, run: dict[str, Any]
) -> tuple[str | list[str] | None, Path | None]:
    """Returns the rows and the cache that the options name, or else those of the run.

    Raises:
        UserError: The rows are needed, and not there.
    """
    cache = options.cache or (None if options.data else run.get("data.cache"))
    source = options.data or run.get("data.train_data")
    if cache is None and source:
        try:
            Source(source).entries()
        except UserError as error:
            if options.data:
                raise
            raise UserError(
                f"{options.ckpt} was trained on rows that can't be read ({error}); name rows like "
                "them with --data."
            ) from error
    return source, None if cache is None else Path(cache)


def run_settings(config: Path | None) -> dict[str, Any]:
    """Returns what a run's config says, by dotted name; nothing without one."""
    return {} if config is None else flat(read_yaml(config))


def run_merge(options: argparse.Namespace) -> None:
    """Joins result files, makes all figures anew, and writes the whole as `report` does."""
    check_output(Path(options.output))
    result = summarise(merge([read_result(Path(path)) for path in options.results]))
    result["prompts"] = merge_asked(read_asked(Path(path)) for path in options.results)
    show(result)
    write_result(result, Path(options.output))


def run_ablation(options: argparse.Namespace) -> None:
    """Trains and measures grids of recipes; one process, one target, one set of features."""
    settings = settings_from(options)
    grids = [read_grid(path) for path in options.config]
    check_prompts(options)
    features = FeatureStore(int(options.feature_budget_gb * 1e9))
    overlaps: dict[str, Any] = {}  # reading all training rows takes longer than measuring a row

    def measure(run_dir: Path, sizes: Sequence[int | None]) -> list[dict[str, Any]]:
        checkpoint = str(run_dir / "checkpoints" / "last.ckpt")  # the budget's end, not its best
        results = []
        for size in sizes:
            loaded = load_drafter(checkpoint, size)
            target = target_for([loaded], options)
            prompts, follow_up = prompts_for(target, options)
            result = report([loaded], target, prompts, follow_up, settings, features)
            del result["prompts"]  # a table's rows are not exported
            result["overlap"] = overlap_with_runs([loaded], prompts, target.tokenizer, overlaps)
            results.append(result)
        return results

    ablation = Ablation(
        Path(options.output),
        train=train_row,
        measure=measure,
        measured_as=measured_as(options),
        overrides=options.overrides,
        record=where_and_when(torch.device(device_for(options))),
        fresh=options.fresh,
    )
    if options.dry_run:
        print("\n".join(ablation.pending(grids, options.seeds)))
        return
    with shared_between_runs():
        missing = ablation.run(grids, options.seeds, options.budget)
    if missing:
        print(
            f"{missing} rows are left or in other processes' hands; tables are made by the same "
            "command (without --budget) once all rows are there."
        )
        return
    tables = options.tables and Path(options.tables)
    write_ablation(ablation.results(grids, options.seeds), Path(options.output), tables)


def train_row(arguments: list[str], run_dir: Path) -> train.DrafterCLI:
    """Trains one run of a recipe in this process, going on from its last checkpoint if any.

    Raises:
        UserError: The recipe can't be trained.
    """
    arguments = ["fit", *arguments, "--run_dir", str(run_dir)]
    if (run_dir / "config.yaml").exists():
        arguments += ["--ckpt_path", "last"]
    os.environ.pop(train.RUN_DIR_VARIABLE, None)
    own, sys.argv = sys.argv, ["train.py", *arguments]  # what the run's provenance should say
    try:
        return train.run()
    except SystemExit as stop:
        if stop.code != 2:  # it was told to end
            raise
        raise UserError("its settings are refused, as said above") from stop
    finally:
        sys.argv = own


def load_all(paths: Sequence[str], block_size: int | None) -> tuple[list[LoadedDrafter], list[str]]:
    """Returns the drafters that can be read, under names that tell them apart, and the errors.

    Raises:
        UserError: None can be read.
    """
    drafters: list[LoadedDrafter] = []
    errors: list[UserError] = []
    for path in paths:
        try:
            drafters.append(load_drafter(path, block_size))
        except UserError as error:
            errors.append(error)
    if not drafters:
        raise errors[0]
    return name_apart(drafters), [str(error) for error in errors]


def check_audit(options: argparse.Namespace, searches: Sequence[Search | None]) -> None:
    """Raises UserError where --audit is asked for together with what it can't look at."""
    if options.audit and any(searches):
        raise UserError("--audit looks at one draft a round; leave --search out.")
    if options.audit and options.draft_length:
        raise UserError("--audit looks at whole drafts; leave --draft-length out.")


def target_for(drafters: Sequence[LoadedDrafter], options: argparse.Namespace) -> Target:
    """Returns the target that the options name, or else the first that a drafter names."""
    device = device_for(options)
    naming = next((drafter for drafter in drafters if drafter.target_path), drafters[0])
    path = options.target or naming.target_path
    if path is None:
        raise UserError(f"{naming.name} does not say what its target is; pass --target.")
    return load_target(
        path,
        gguf_file=options.gguf_file or (None if options.target else naming.target_gguf_file),
        dtype=options.dtype or naming.target_dtype,
        device=device,
        revision=None,
        trust_remote_code=options.trust_remote_code,
    )


def check_prompts(options: argparse.Namespace) -> None:
    """Raises UserError where the prompts that the options name can't be there."""
    check_eval_prompts(options.benchmarks or (), options.benchmark_dir, options.prompts or ())


def prompts_for(target: Target, options: argparse.Namespace) -> tuple[list[Prompt], FollowUps]:
    """Returns the first turns that the options name, and what makes the turns after them."""
    return load_eval_prompts(
        target,
        options.max_new_tokens,
        benchmarks=options.benchmarks or (),
        benchmark_dir=options.benchmark_dir,
        files=options.prompts or (),
        skip=options.skip,
        limit=options.limit,
    )


def device_for(options: argparse.Namespace) -> str:
    """Returns the device that the options name, or else cuda where torch sees a GPU."""
    if options.device:
        return check_device(options.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def where_and_when(device: torch.device) -> dict[str, Any]:
    """Returns command, date, revision and device, for the record."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "revision": git_commit(),
        "torch": torch.__version__,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def main(args: list[str] | None = None) -> None:
    """Runs a verb; prints a user's mistake as one sentence and exits with code 2."""
    options = parse(sys.argv[1:] if args is None else args)
    verbs = {
        "report": run_report,
        "doctor": run_doctor,
        "merge": run_merge,
        "ablation": run_ablation,
        "calibrate": run_calibrate,
    }
    with one_sentence_errors():
        try:
            verbs[options.verb](options)
        except torch.OutOfMemoryError as error:
            if options.verb == "doctor":
                raise UserError(
                    f"out of memory on the device; lower --rows ({options.rows}) or --max-length "
                    f"({options.max_length})."
                ) from error
            raise UserError(
                f"out of memory on the device; lower --batch-size ({options.batch_size}) or "
                f"--feature-budget-gb ({options.feature_budget_gb:g}). What was finished is kept."
            ) from error


if __name__ == "__main__":
    main()
