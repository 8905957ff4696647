"""The ways to decode that `benchmarks.decode` holds side by side."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from drafter.decoding import (
    CachedDrafter,
    CachedTarget,
    Decoded,
    decode_plainly,
    decode_speculatively,
)
from drafter.draft_length import DraftLength
from drafter.evaluation.loading import LoadedDrafter
from drafter.graphs import CudaRecorder
from drafter.model import Drafter
from drafter.static_decoding import StaticDecoder
from drafter.static_search import StaticSearchDecoder
from drafter.target import Target
from drafter.target_session import frozen

Prompts = Sequence[Sequence[int]]
ALONE, SPECULATIVE = "target alone", "speculative"
OTHERS = "transformers"
"""What names of ways that are not ours begin with."""


@dataclass
class Way:
    """A way to decode.

    Attributes:
        name: In the table.
        decode: Prompts to response ids.
        rows: Prompts side by side.
        ours: Whether it is this package's.
        drafter: The drafter's name, if it has one.
        drafts: What its drafts are (`drafter.evaluation.plots.SEARCH_STYLES`).
        decoded: Where it leaves what came of the prompts, if it is recorded and drafts.
        passes: Milliseconds of its recorded passes, launched by themselves.
    """

    name: str
    decode: Callable[[Prompts], list[list[int]]]
    rows: int = 1
    ours: bool = True
    drafter: str | None = None
    drafts: str | None = None
    decoded: list[Decoded] | None = None
    passes: Callable[[], dict[str, float]] | None = None


def ways(
    target: Target,
    contenders: Sequence[LoadedDrafter],
    longest: int,
    new: int,
    rows: Sequence[int],
    recorded_only: bool = False,
) -> Iterator[Way]:
    """Yields what is measured, one after another: each holds caches of its own.

    Args:
        target: The frozen target.
        contenders: Drafters on its device and in its dtype, in every way to use their drafts.
        longest: Tokens of the longest prompt.
        new: Most tokens of a response.
        rows: Of ours on fixed shapes; searches and cut drafts have one.
        recorded_only: Leave out transformers' `generate`, and our loops kernel by kernel.
    """
    plain = [loaded for loaded in contenders if loaded.plain]
    length = longest + new
    if not recorded_only:
        yield from _kernel_by_kernel(target, plain, contenders[0].drafter, new)
    for count in rows:
        yield _rows_way(StaticDecoder(target, None, rows=count, length=length), new)
        for loaded in plain:
            decoder = StaticDecoder(target, loaded.drafter, rows=count, length=length)
            yield _rows_way(decoder, new, loaded.name)
    for loaded in contenders:
        if (use := loaded.search or loaded.length) is not None:
            searched = StaticSearchDecoder(target, loaded.drafter, use, length=length)
            yield _searched_way(searched, new, loaded.name.removesuffix(f", {use.label}"))


def _kernel_by_kernel(
    target: Target, plain: Sequence[LoadedDrafter], any_drafter: Drafter, new: int
) -> Iterator[Way]:
    yield Way(f"{OTHERS}, target alone", _transformers(target, new), ours=False)
    if target.device.type == "cuda":  # generate compiles by itself then
        static = _transformers(target, new, cache_implementation="static")
        yield Way(f"{OTHERS}, target alone, static cache, compiled", static, ours=False)
    lookup = _transformers(target, new, prompt_lookup_num_tokens=any_drafter.config.num_drafted)
    yield Way(f"{OTHERS}, prompt lookup", lookup, ours=False)
    yield Way("target alone, kernel by kernel", partial(decode_alone, target, new))
    for loaded in plain:
        loop = partial(_loop, target, loaded.drafter, new)
        yield Way("speculative, kernel by kernel", loop, drafter=loaded.name)


def decode_alone(target: Target, new: int, prompts: Prompts) -> list[list[int]]:
    """Returns the target's own responses, a token a pass, kernel by kernel."""
    ends = target.eos_token_ids
    return [
        decode_plainly(CachedTarget(target), prompt, max_new_tokens=new, eos_token_ids=ends).ids
        for prompt in prompts
    ]


def _loop(target: Target, drafter: Drafter, new: int, prompts: Prompts) -> list[list[int]]:
    out = []
    settings: dict[str, Any] = {"max_new_tokens": new, "eos_token_ids": target.eos_token_ids}
    for prompt in prompts:
        engine = CachedTarget(target, drafter.config.target_layer_ids)
        own = CachedDrafter(drafter, target, engine)
        out.append(decode_speculatively(engine, own, prompt, **settings).ids)
    return out


def _transformers(
    target: Target, new: int, **settings: Any
) -> Callable[[Prompts], list[list[int]]]:
    ends = target.eos_token_ids

    def generate(prompts: Prompts) -> list[list[int]]:
        out = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=target.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = target.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    repetition_penalty=1.0,  # some models' own settings have another
                    eos_token_id=list(ends),
                    pad_token_id=ends[0],
                    **settings,
                )
            out.append(answer[0, len(prompt) :].tolist())
        return out

    return generate


def _rows_way(decoder: StaticDecoder, new: int, name: str | None = None) -> Way:
    decoded: list[Decoded] = []

    def decode(prompts: Prompts) -> list[list[int]]:
        decoded[:] = decoder.decode(prompts, max_new_tokens=new)
        return [one.ids for one in decoded]

    def passes() -> dict[str, float]:
        decoder.stand_at(decoder.length // 2)
        parts = {"ms_verify": decoder.verify}
        if decoder.drafter is not None:
            parts["ms_draft"] = decoder.draft
        return {key: milliseconds(part, decoder.target.device) for key, part in parts.items()}

    one = passes if decoder.rows == 1 else None
    if name is None:
        return Way(ALONE, decode, decoder.rows, passes=one)
    return Way(SPECULATIVE, decode, decoder.rows, True, name, "one draft", decoded, one)


def _searched_way(decoder: StaticSearchDecoder, new: int, name: str) -> Way:
    decoded: list[Decoded] = []
    plan = decoder.plan
    kind = "cut draft" if isinstance(plan, DraftLength) else plan.kind

    def decode(prompts: Prompts) -> list[list[int]]:
        decoded[:] = decoder.decode(prompts, max_new_tokens=new)
        return [one.ids for one in decoded]

    def passes() -> dict[str, float]:
        decoder.stand_at(decoder.length // 2)
        # of cut drafts those that are as long as most; a tree is padded
        usual = min(decoder.node_counts, key=lambda count: abs(count - drafted(decoded)))
        device, verify = decoder.target.device, partial(decoder.verify, usual)
        return {
            "ms_draft": milliseconds(decoder.draft, device),
            "ms_verify": milliseconds(verify, device),
        }

    return Way(plan.label, decode, 1, True, name, kind, decoded, passes)


def drafted(decoded: Sequence[Decoded]) -> float:
    """Returns drafted tokens a round, on average, padding of trees not counted."""
    counts = [len(draft) for one in decoded for draft in one.trees or one.drafts]
    return sum(counts) / max(1, len(counts))


def milliseconds(work: Callable[[], None], device: torch.device, times: int = 50) -> float:
    """Returns what `work` takes, recorded where there is a GPU."""

    def done() -> None:
        with frozen(device):
            work()

    run = done
    if device.type == "cuda":
        recorder = CudaRecorder()
        recorder.rehearse(done)
        run = recorder(done)
        torch.cuda.synchronize()
    else:
        times = 10
    run()
    begun = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times * 1e3
