"""Why is the accepted length stuck near 1? Checks for the faults that are known to cause it.

Each check runs on the user's own drafter, target and rows, and gives one `Finding`. Faults that the
files show are read off them; faults of convention are found by running the drafter under other
conventions (`drafter.evaluation.conventions`): the one that it was trained under stands out.

Legend: S tokens, A anchors, N drafted slots, L tapped layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafter.decoding import CachedDrafter, CachedTarget
from drafter.evaluation.audit import Auditor
from drafter.evaluation.conventions import Convention, Examiner, Rate, Row, others
from drafter.evaluation.loading import LoadedDrafter
from drafter.evaluation.measure import FeatureStore, decode_prompt, replay_trajectory
from drafter.evaluation.trajectories import EvalPrompt, Trajectory, TrajectorySettings
from drafter.model import Drafter
from drafter.target import Target

ON_POLICY = 0.9
"""Share of the rows' tokens that should be the target's own argmax."""
MOST_OUTSIDE = 0.1
"""Of the rows' supervised tokens, outside a reduced draft vocabulary: one ends a draft of ten."""
LEAD_TOKENS = 8
"""That a template may put between an assistant's header and its words (an empty thought)."""
PROMPTS, NEW_TOKENS = 3, 48  # of the check of replay against the loop


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: Of the check.
        said: The figures that it stands on.
        fault: The likely cause, or "" if nothing is wrong.
        mend: What to do about it.
    """

    name: str
    said: str
    fault: str = ""
    mend: str = ""

    def lines(self) -> list[str]:
        """Returns it as lines of text."""
        if not self.fault:
            return [f"ok     {self.name}: {self.said}"]
        return [
            f"FAULT  {self.name}: {self.said}",
            f"       likely cause: {self.fault}",
            f"       what to do: {self.mend}",
        ]


@dataclass
class Patient:
    """What is examined.

    Attributes:
        loaded: The drafter, as read.
        target: The frozen target.
        rows: A few of the rows that it was trained on, or like them.
        header_ids: Tokens that the chat template opens an assistant's turn with; () for none.
        trained_block_size: K that the run's config names, if there is one.
        stored: Row's place to its features in a cache (S', L*D), if there is one.
    """

    loaded: LoadedDrafter
    target: Target
    rows: Sequence[Row]
    header_ids: Sequence[int] = ()
    trained_block_size: int | None = None
    stored: Callable[[int], Tensor] | None = None
    examiner: Examiner = field(init=False)

    def __post_init__(self) -> None:
        self.examiner = Examiner(self.drafter, self.target, self.rows)

    @property
    def drafter(self) -> Drafter:
        """The unwrapped drafter."""
        return self.loaded.drafter

    @property
    def exact(self) -> bool:
        """Whether passes differ by fp32's rounding at most."""
        return self.target.dtype in (torch.float32, torch.float64)

    @functools.cached_property
    @torch.no_grad()
    def own_words(self) -> tuple[float, float]:
        """The target's argmax share of the supervised tokens, and its nats for one of them."""
        right = count = 0
        nats = 0.0
        for batch in self.examiner.batches:
            last, _ = self.target.run((), input_ids=batch.input_ids)
            places = batch.supervised[0, 1:].nonzero().squeeze(-1)
            labels = batch.input_ids[0, 1:][places]
            for part, own in zip(places.split(256), labels.split(256), strict=True):
                logits = self.target.head.logits(last[0, part])
                right += int((logits.argmax(-1) == own).sum())
                nats += float(torch.nn.functional.cross_entropy(logits, own, reduction="sum"))
            count += len(labels)
        return right / max(1, count), nats / max(1, count)


def examine(patient: Patient) -> Iterator[Finding]:
    """Yields what each check found, as it is found; a wrong head ends it: all else follows."""
    checks = (
        _same_target,
        _head,
        _mask_token,
        _block_size,
        _draft_vocabulary,
        _supervision,
        _template,
        _on_policy,
        _stored_features,
        _conventions,
        _parity,
        _replay,
    )
    for check in checks:
        for finding in check(patient):
            yield finding
            if check is _head and finding.fault:
                return


def _same_target(patient: Patient) -> Iterator[Finding]:
    theirs, ours = patient.loaded.target_fingerprint, patient.target.fingerprint
    if theirs is None:
        yield Finding("target", "the drafter's file does not say what it was trained for")
    elif theirs == ours:
        yield Finding("target", f"the one that it was trained for ({ours})")
    else:
        yield Finding(
            "target",
            f"trained for {theirs}, run with {ours}",
            "the target's weights, tokenizer or config are others than in training",
            "give the target that it was trained with, or train on from this drafter "
            "(--model.init_from) with this target",
        )


def _head(patient: Patient) -> Iterator[Finding]:
    target = patient.target
    tied = bool(getattr(target.config, "tie_word_embeddings", False))
    head, embedding = target.head.weight, target.embedding_weight
    if tied and not torch.equal(head.to(embedding.device), embedding):
        yield Finding(
            "head",
            "the target's config ties it to the embedding, its values differ",
            "the head was left at random, or was saved apart from the embedding",
            "load the target's own files; if it was fine-tuned with an untied head, set "
            "tie_word_embeddings to false in its config",
        )
        return
    share, nats = patient.own_words
    uniform = math.log(target.vocab_size)
    said = f"{share:.1%} of the rows' tokens are its argmax, {nats:.2f} nats a token"
    if share < 0.02 and nats > 0.8 * uniform:
        yield Finding(
            "head",
            f"{said}; chance gives {uniform:.2f}",
            "the target's head is missing or random (or the rows are in another tokenizer's ids)",
            "load a checkpoint that has lm_head, and rows that were tokenised for this target",
        )
    else:
        yield Finding("head", said)


def _mask_token(patient: Patient) -> Iterator[Finding]:
    token, tokenizer = patient.drafter.config.mask_token_id, patient.target.tokenizer
    meanings = [
        name
        for name in ("pad", "eos", "bos")
        if getattr(tokenizer, f"{name}_token_id", None) == token
    ]
    seen = sum(int((np.asarray(row.input_ids) == token).sum()) for row in patient.rows)
    if meanings or seen:
        what = f"the tokenizer's {meanings[0]} token" if meanings else f"in the rows {seen} times"
        yield Finding(
            "mask token id",
            f"{token} is {what}",
            "at a drafted slot the target reads it as text",
            "train with --model.mask_token_id set to a token that never occurs (left out, a "
            "reserved one is chosen)",
        )
    else:
        yield Finding("mask token id", f"{token}, which the rows never hold")


def _block_size(patient: Patient) -> Iterator[Finding]:
    """Compares what is recorded: drafts alone don't show it, a longer block's end is just wrong."""
    asked, trained = patient.drafter.config.block_size, patient.trained_block_size
    if trained is None or trained == asked:
        yield Finding("block size", f"K = {asked}")
        return
    yield Finding(
        "block size",
        f"decoded with K = {asked}, trained with K = {trained}",
        "slots behind those that it was trained on draft nothing of use"
        if asked > trained
        else "it could draft more than it is asked for",
        f"leave --block-size out, or set block_size to {trained} in its config",
    )


def _draft_vocabulary(patient: Patient) -> Iterator[Finding]:
    kept = patient.drafter.draft_tokens
    if kept is None:
        return
    batches = patient.examiner.batches
    ids = torch.cat([batch.input_ids[0][batch.supervised[0]] for batch in batches])
    share = float((~torch.isin(ids, kept)).float().mean())
    said = f"{share:.1%} of the rows' supervised tokens are not among the {len(kept)} drafted from"
    if share <= MOST_OUTSIDE:
        yield Finding("draft vocabulary", said)
        return
    yield Finding(
        "draft vocabulary",
        said,
        "each of them ends a draft, whatever was learned: the tokens were counted on other rows, "
        "or are too few",
        "train with a larger --model.draft_vocab_size, on rows like these",
    )


def _supervision(patient: Patient) -> Iterator[Finding]:
    masks = [np.asarray(row.supervised) for row in patient.rows]
    share = float(np.mean(np.concatenate(masks)))
    whole = sum(bool(mask[1:].all()) for mask in masks)
    said = f"{share:.0%} of the rows' tokens are the assistant's"
    if whole > len(masks) / 2:
        yield Finding(
            "supervised mask",
            f"{said}, in {whole} of {len(masks)} rows from the first on",
            "prompts are trained on as if the target had written them",
            "give rows with `messages`, or with `prompt_ids` and `response_ids` apart",
        )
    else:
        yield Finding("supervised mask", said)


def _template(patient: Patient) -> Iterator[Finding]:
    header = list(patient.header_ids)
    if not header:
        yield Finding("chat template", "the target has none: not compared")
        return
    opened = 0
    for row in patient.rows:
        ids = np.asarray(row.input_ids).tolist()
        first = int(np.flatnonzero(row.supervised)[0])
        before = ids[max(0, first - len(header) - LEAD_TOKENS) : first]
        opened += any(before[i : i + len(header)] == header for i in range(len(before)))
    said = f"{opened} of {len(patient.rows)} responses begin where the target's template begins one"
    if opened < len(patient.rows) / 2:
        yield Finding(
            "chat template",
            said,
            "the rows were rendered with another template, or the mask begins elsewhere",
            "render with the target's own (`messages` do so by themselves), and serve with the "
            "same",
        )
    else:
        yield Finding("chat template", said)


def _on_policy(patient: Patient) -> Iterator[Finding]:
    share, _ = patient.own_words
    said = f"{share:.1%} of the responses' tokens are what the target would say"
    if share < ON_POLICY:
        yield Finding(
            "on-policy share",
            said,
            "the responses are another model's, or were sampled: the drafter learns to draft "
            "what this target does not say",
            "let the target answer the prompts: python -m data.regenerate",
        )
    else:
        yield Finding("on-policy share", said)


def _stored_features(patient: Patient) -> Iterator[Finding]:
    if patient.stored is None:
        yield Finding("feature cache", "none is used")
        return
    worst, where = 0.0, 0
    layer_ids = patient.drafter.config.target_layer_ids
    for place in range(len(patient.rows)):
        kept = patient.stored(place)
        fresh = patient.examiner.features(place, layer_ids)[0, : len(kept)]
        kept = kept.to(fresh.device, fresh.dtype)
        error = float((kept - fresh).norm() / fresh.norm()) if kept.shape == fresh.shape else 1.0
        if error > worst:
            worst, where = error, place
    said = f"stored and recomputed states differ by {worst:.1e} at most (row {where})"
    if worst > 0.05:
        yield Finding(
            "feature cache",
            said,
            "the cache holds other rows' states, other layers', or another target's",
            "`python -m data.cache verify`; if every byte is as it was written, build it anew",
        )
    else:
        yield Finding("feature cache", said)


_MENDS = {
    "layer ids": (
        "the drafter was trained with target layers {name} than its config names (some code counts "
        "a layer's input as its state, some its output)",
        "correct dflash_config.target_layer_ids: here id i is the output of decoder layer i, "
        "counted from 0",
    ),
    "mask token": (
        "the drafter was trained with {name} at drafted slots",
        "set dflash_config.mask_token_id to it",
    ),
    "labels": (
        "the drafter was trained to predict tokens {name} than the slot that it fills",
        "train it here: slot k of a block predicts the token at anchor + k, with no shift",
    ),
    "positions": (
        "the drafter was trained with block positions {name} than the tokens' own",
        "train it here, or shift its positions where it is served",
    ),
    "visibility": (
        "the drafter was trained with {name}, which it never has when it drafts",
        "train it here: a block sees the states before its anchor and no other",
    ),
}


def _conventions(patient: Patient) -> Iterator[Finding]:
    """Finds the one convention, if any, under which the drafter is clearly better."""
    own = Convention.of(patient.drafter)
    as_is = patient.examiner.rate(own)
    rates: dict[str, dict[str, Rate]] = {
        check: {name: patient.examiner.rate(one) for name, one in found.items()}
        for check, found in others(own, patient.target).items()
    }
    everything = [(r.share, c, n) for c, found in rates.items() for n, r in found.items()]
    _, worst_check, worst_name = max(everything, default=(0.0, "", ""))
    wrong = worst_check and rates[worst_check][worst_name].clearly_above(as_is)
    for check, found in rates.items():
        listed = ", ".join(f"{name} {rate}" for name, rate in found.items()) or "no other to try"
        said = f"{as_is} of drafts right as it is; {listed}"
        if wrong and check == worst_check:
            cause, mend = _MENDS[check]
            yield Finding(check, said, cause.format(name=worst_name), mend)
        else:
            yield Finding(check, said)


@torch.no_grad()
def _parity(patient: Patient) -> Iterator[Finding]:
    """Compares a training step's logits with those of the decoding loop's drafter."""
    own = Convention.of(patient.drafter)
    worst = 0.0
    for place, batch in enumerate(patient.examiner.batches[:PROMPTS]):
        states = patient.examiner.states(place, own)
        anchors = batch.anchors[0].tolist()
        for block in sorted({0, len(anchors) // 2, len(anchors) - 1}):
            ids = batch.input_ids[0, : anchors[block] + 1].tolist()
            if len(ids) < 2:  # nothing before the anchor
                continue
            engine = CachedTarget(patient.target, own.layer_ids)
            engine.prefill(ids[:-1])
            drawn = CachedDrafter(patient.drafter, patient.target, engine).draft(ids[-1])
            trained = patient.drafter.head(patient.target.head).logits(states[block, 1:])
            kept = trained.isfinite()  # -inf outside a reduced draft vocabulary, in both
            drawn, trained = drawn[kept], trained[kept]
            error = float((drawn - trained).abs().max() / trained.abs().max())
            worst = max(worst, error)
    said = f"logits of a training step and of the loop differ by {worst:.1e} of the largest"
    if worst > (1e-3 if patient.exact else 0.1):
        yield Finding(
            "training and inference",
            said,
            "a block is computed in another way when it is trained than when it drafts",
            "this is a bug of this package or of a change to it: please report it with this page",
        )
    else:
        yield Finding("training and inference", said)


@torch.no_grad()
def _replay(patient: Patient) -> Iterator[Finding]:
    """Compares the rounds of replay with those of the real loop, on a few prompts."""
    settings = TrajectorySettings(NEW_TOKENS)
    prompts = []
    for place, row in enumerate(patient.rows[:PROMPTS]):
        first = int(np.flatnonzero(row.supervised)[0])
        prompts.append(EvalPrompt("doctor", place, np.asarray(row.input_ids)[:first].tolist()))
    room = patient.target.max_length - NEW_TOKENS
    prompts = [prompt for prompt in prompts if 0 < len(prompt.ids) <= room]
    if not prompts:
        yield Finding("replay and loop", "no row has a prompt that leaves room: not compared")
        return
    target, drafter = patient.target, patient.drafter
    answers = target.generate([prompt.ids for prompt in prompts], NEW_TOKENS)
    auditor = Auditor(target, drafter, settings, prompts)
    same = explained = rounds = emitted = 0
    unexplained: list[Any] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        trajectory = Trajectory(prompt, answer.ids, [], answer.finished)
        (states,) = FeatureStore.run(target, [trajectory], drafter.config.target_layer_ids)
        replayed = replay_trajectory(drafter, target, trajectory, settings, states)
        loop = decode_prompt(drafter, target, prompt.ids, settings, key=prompt.key)
        rounds, emitted = rounds + len(loop.rounds), emitted + len(loop.ids) - 1
        parted = auditor.compare_rounds(
            trajectory, loop.ids, loop.round_lengths, replayed.counts.round_lengths
        )
        same += parted is None
        explained += parted is not None and parted.explained
        if parted is not None and not parted.explained:
            unexplained.append(parted)
    said = (
        f"accepted length {emitted / max(1, rounds):.2f} on {len(prompts)} prompts; rounds of loop "
        f"and replay: {same} the same, {explained} part at a near tie"
    )
    if unexplained:
        yield Finding(
            "replay and loop",
            f"{said}, {len(unexplained)} part without a reason (response token "
            f"{unexplained[0].position})",
            "the loop's caches, crops or positions are wrong",
            "this is a bug of this package or of a change to it: please report it with this page",
        )
    else:
        yield Finding("replay and loop", said)
