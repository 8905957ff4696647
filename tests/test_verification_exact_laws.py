"""Guards C3: sampled speculative text that is not distributed as the target's own.

The shipped loop runs through every branch of its random decisions over rational tables of three
tokens, and the law of what it writes is compared with the law computed in fractions.

Legend: V = 3 tokens (2 ends a response), N drafted slots, T anchors of a response.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from fractions import Fraction
from functools import cache
from math import prod

import numpy as np
import pytest
import torch

from drafter import decoding
from drafter.config import DrafterConfig
from drafter.decoding import CachedDrafter, CachedTarget, decode_speculatively
from drafter.model import Drafter
from drafter.replay import SlotResults, count_decoded, count_rounds
from drafter.sampling import GeneratorSource, Sampling, warp
from drafter.verification import verify_rejection
from tests.tiny import NUM_TOKENS, tiny_target

V, EOS = 3, 2
SEED = 3  # of the tables: every warp leaves texts of all lengths
PLAIN = Sampling(1.0)
WARPS = [PLAIN, Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.71), Sampling(1.0, 2, 0.71)]
SUMS = ("emitted", "rounds", "accepted", "drafted", "unclipped", "accepted_at", "reached_at")


class EnumeratingSource:
    """A RandomSource that takes a given path of decisions, then the first of each further one."""

    def __init__(self, path=()):
        self.path, self.taken, self.weight = path, [], 1.0

    def bernoulli(self, prob):
        return self._decide([(True, prob), (False, 1.0 - prob)])

    def categorical(self, probs):
        assert probs.shape == (V,)
        return self._decide(list(enumerate(probs.tolist())))

    def _decide(self, options):
        assert sum(weight for _, weight in options) == pytest.approx(1, abs=1e-12)
        options = [(value, weight) for value, weight in options if weight > 0]
        depth = len(self.taken)
        index = self.path[depth] if depth < len(self.path) else 0
        self.taken.append((index, len(options)))
        value, weight = options[index]
        self.weight *= weight
        return value


def every_branch(run):
    """Yields (weight, run(source)) over all paths, depth first."""
    path = ()
    while path is not None:
        source = EnumeratingSource(path)
        out = run(source)
        yield source.weight, out
        taken = source.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        path = (*(i for i, _ in taken[:-1]), taken[-1][0] + 1) if taken else None


@cache
def table(*key):
    """Probabilities that depend on the key alone; some are zero."""
    rng = random.Random(f"{SEED}{key}")
    weights = [rng.randint(2, 7), rng.randint(2, 7), rng.randint(1, 5)]
    if rng.random() < 0.3:
        weights[rng.randrange(V)] = 0
    return tuple(Fraction(weight, sum(weights)) for weight in weights)


def warped(probs, sampling):
    """top-k, then top-p, of fractions; equal ones are kept lowest id first."""
    probs = list(probs)
    for keep_by_mass in (False, True):
        order = sorted(range(V), key=lambda i: (-probs[i], i))
        if keep_by_mass:
            limit = Fraction(str(sampling.top_p))
            kept = [i for n, i in enumerate(order) if sum(probs[j] for j in order[:n]) < limit]
        else:
            kept = order[: sampling.top_k or V]
        total = sum(probs[i] for i in kept)
        probs = [probs[i] / total if i in kept else Fraction(0) for i in range(V)]
    return probs


@cache
def target_law(prefix, sampling):
    return warped(table("p", prefix), sampling)


@cache
def draft_law(prefix, slot, sampling):
    # every third context drafts the target's own law, so that p = q occurs
    rows = table("p", prefix) if (len(prefix) + slot) % 3 == 0 else table("q", prefix, slot)
    return warped(rows, sampling)


def logits(rows):
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64).log()


class TableTarget:
    def __init__(self):
        self.committed = ()

    def prefill(self, prompt_ids):
        return logits([table("p", ())])[0]

    def verify(self, block_ids):
        self.block = tuple(block_ids)
        ends = range(1, len(self.block) + 1)
        return logits([table("p", self.committed + self.block[:end]) for end in ends])

    def commit(self, count):
        self.committed += self.block[:count]


class TableDrafter:
    def __init__(self, target, block_size):
        self.target, self.block_size = target, block_size

    def draft(self, anchor_id):
        prefix = (*self.target.committed, anchor_id)
        return logits([draft_law(prefix, k, PLAIN) for k in range(1, self.block_size)])


def enumerate_loop(block_size, max_new_tokens, rule, sampling=PLAIN, drafter=TableDrafter):
    """Returns [(weight, Decoded)] of the shipped loop, over every branch."""

    def run(source):
        target = TableTarget()
        return decode_speculatively(
            target,
            drafter(target, block_size),
            [0],
            max_new_tokens=max_new_tokens,
            eos_token_ids=(EOS,),
            sampling=sampling,
            source=source,
            rule=rule,
        )

    return list(every_branch(run))


def law_of(runs, key):
    law = defaultdict(float)
    for weight, decoded in runs:
        law[key(decoded)] += weight
    return law


def text_law(runs):
    return law_of(runs, lambda decoded: tuple(decoded.ids))


def joint_law(runs):
    return law_of(runs, lambda decoded: (tuple(decoded.ids), tuple(decoded.round_lengths)))


def exact_texts(max_new_tokens, sampling):
    """The target's own law of a response, as fractions."""
    law, open_texts = {}, {(): Fraction(1)}
    while open_texts:
        text, weight = open_texts.popitem()
        for token, p in enumerate(target_law(text, sampling)):
            longer = (*text, token)
            done = token == EOS or len(longer) == max_new_tokens
            if p > 0:
                (law if done else open_texts)[longer] = weight * p
    return law


def total_variation(left, right):
    keys = set(left) | set(right)
    return sum(abs(float(left.get(k, 0)) - float(right.get(k, 0))) for k in keys) / 2


def assert_same_law(ours, exact):
    assert sum(exact.values()) == 1
    assert len(exact) >= 9
    assert set(exact) <= set(ours)
    assert sum(ours.values()) == pytest.approx(1, abs=1e-12)
    assert max(abs(ours[key] - float(exact.get(key, 0))) for key in list(ours)) < 1e-12


def exact_rounds(block_size, max_new_tokens, sampling):
    """Joint law of (text, round lengths) of rejection sampling, as fractions, by its recursion."""
    law = defaultdict(Fraction)

    def visit(text, lengths, weight):
        if text[-1] == EOS or len(text) == max_new_tokens:
            law[text, lengths] += weight
            return
        slots = [draft_law(text, k, sampling) for k in range(1, block_size)]
        for draft in itertools.product(range(V), repeat=block_size - 1):
            reached = weight * prod(q[x] for q, x in zip(slots, draft, strict=True))
            for n in range(block_size):
                if reached == 0:
                    break
                p = target_law(text + draft[:n], sampling)
                if n == block_size - 1:
                    emit(text, lengths, draft, n, p, reached)
                    break
                accept = min(Fraction(1), p[draft[n]] / slots[n][draft[n]])
                residual = [max(Fraction(0), a - b) for a, b in zip(p, slots[n], strict=True)]
                if accept < 1:
                    scaled = [x / sum(residual) for x in residual]
                    emit(text, lengths, draft, n, scaled, reached * (1 - accept))
                reached *= accept

    def emit(text, lengths, draft, n, probs, weight):
        for token, prob in enumerate(probs):
            new = [*draft[:n], token][: max_new_tokens - len(text)]
            if EOS in new:
                new = new[: new.index(EOS) + 1]
            if prob > 0:
                visit(text + tuple(new), (*lengths, len(new)), weight * prob)

    for token, p in enumerate(target_law((), sampling)):
        if p > 0:
            visit((token,), (), p)
    return law


def acceptances(text, block_size, sampling):
    """Rows of min(1, q/p) at the text's tokens, ragged: only slots within the text."""
    last = len(text) - 1
    return [
        [
            min(
                Fraction(1),
                draft_law(text[: t + 1], k, sampling)[text[t + k]]
                / target_law(text[: t + k], sampling)[text[t + k]],
            )
            for k in range(1, min(block_size - 1, last - t) + 1)
        ]
        for t in range(last)
    ]


def slots_of(rows, block_size):
    accept = np.zeros((len(rows), block_size - 1))
    valid = np.zeros_like(accept, dtype=bool)
    for t, row in enumerate(rows):
        accept[t, : len(row)], valid[t, : len(row)] = [float(a) for a in row], True
    return SlotResults(np.zeros_like(accept, dtype=np.int64), accept == 1, valid, accept)


def thinned(text, block_size, sampling):
    """Yields (exact weight, ResponseCounts) of every 0/1 decision of the acceptances."""
    rows = acceptances(text, block_size, sampling)
    flat = [a for row in rows for a in row]
    for bits in itertools.product((0, 1), repeat=len(flat)):
        weight = prod((a if bit else 1 - a for a, bit in zip(flat, bits, strict=True)), start=1)
        if weight > 0:
            left = iter(bits)
            decided = [[next(left) for _ in row] for row in rows]
            yield weight, count_rounds(slots_of(decided, block_size))


SHAPES = [(3, 5), (4, 4)]  # K, max_new_tokens: many rounds; clipping within a draft


@cache
def rejection_runs(block_size, max_new_tokens, sampling):
    return enumerate_loop(block_size, max_new_tokens, "rejection", sampling)


@pytest.mark.parametrize("sampling", WARPS, ids=str)
@pytest.mark.parametrize(("block_size", "max_new_tokens"), SHAPES)
def test_rejection_sampling_writes_the_targets_law(block_size, max_new_tokens, sampling):
    runs = rejection_runs(block_size, max_new_tokens, sampling)
    assert_same_law(text_law(runs), exact_texts(max_new_tokens, sampling))


@pytest.mark.parametrize("sampling", WARPS, ids=str)
@pytest.mark.parametrize("rule", ["rejection-argmax", "sample-and-match"])
@pytest.mark.parametrize("block_size", [3, 4])
def test_argmax_drafts_write_the_targets_law(block_size, rule, sampling):
    runs = enumerate_loop(block_size, 4, rule, sampling)
    assert_same_law(text_law(runs), exact_texts(4, sampling))
    assert any(r.accepted for _, decoded in runs for r in decoded.rounds)
    # both ends of a response occur: a clipped round and an EOS within a draft
    assert {decoded.finished for _, decoded in runs} == {True, False}


@pytest.mark.parametrize("sampling", [WARPS[0], WARPS[3]], ids=str)
@pytest.mark.parametrize(("block_size", "max_new_tokens"), SHAPES)
def test_text_and_round_lengths_have_their_joint_law(block_size, max_new_tokens, sampling):
    exact = exact_rounds(block_size, max_new_tokens, sampling)
    texts = defaultdict(Fraction)
    for (text, _), weight in exact.items():
        texts[text] += weight
    assert texts == exact_texts(max_new_tokens, sampling)  # the recursion here is exact itself
    assert_same_law(joint_law(rejection_runs(block_size, max_new_tokens, sampling)), exact)


@pytest.mark.parametrize("sampling", [WARPS[0], WARPS[3]], ids=str)
@pytest.mark.parametrize(("block_size", "max_new_tokens"), SHAPES)
def test_thinning_a_trajectory_gives_the_loops_joint_law(block_size, max_new_tokens, sampling):
    law = defaultdict(Fraction)
    for text, p in exact_texts(max_new_tokens, sampling).items():
        for weight, counts in thinned(text, block_size, sampling):
            law[text, counts.round_lengths] += p * weight
    assert law == exact_rounds(block_size, max_new_tokens, sampling)


@pytest.mark.parametrize("sampling", [WARPS[0], WARPS[3]], ids=str)
@pytest.mark.parametrize(("block_size", "max_new_tokens"), SHAPES)
def test_expectations_equal_the_means_of_the_loop_and_of_thinning(
    block_size, max_new_tokens, sampling
):
    zero = dict.fromkeys(SUMS, 0.0)
    expected, of_thinning, of_loop = dict(zero), dict(zero), dict(zero)

    def add(sums, counts, weight):
        for name in SUMS:
            sums[name] = sums[name] + float(weight) * getattr(counts, name)

    def padded(counts):
        # a response of one token has no round, and the loop then knows no block size
        return counts if len(counts.accepted_at) else count_rounds(slots_of([], block_size))

    for text, p in exact_texts(max_new_tokens, sampling).items():
        rows = acceptances(text, block_size, sampling)
        add(expected, count_rounds(slots_of(rows, block_size)), p)
        for weight, counts in thinned(text, block_size, sampling):
            add(of_thinning, counts, p * weight)
    for weight, decoded in rejection_runs(block_size, max_new_tokens, sampling):
        counts = count_decoded(decoded.rounds, decoded.drafts, decoded.ids)
        add(of_loop, padded(counts), weight)
    for name in SUMS:
        np.testing.assert_allclose(of_thinning[name], expected[name], atol=1e-12, err_msg=name)
        np.testing.assert_allclose(of_loop[name], expected[name], atol=1e-12, err_msg=name)
    assert 0 < expected["accepted"] < expected["drafted"]


def argmax_scored_with_a_soft_q(draft_logits, sampling, source, rule):
    return draft_logits.argmax(-1).tolist(), warp(draft_logits, sampling)


def likelier_of_two(draft_logits, sampling, source, rule):
    q_NV = warp(draft_logits, sampling)
    drafts = [[source.categorical(q) for q in q_NV] for _ in range(2)]
    return max(drafts, key=lambda d: prod(float(q[x]) for q, x in zip(q_NV, d, strict=True))), q_NV


@pytest.mark.parametrize("biased", [argmax_scored_with_a_soft_q, likelier_of_two])
def test_the_check_catches_drafts_not_drawn_from_their_q(monkeypatch, biased):
    monkeypatch.setattr(decoding, "_draw_draft", biased)
    runs = enumerate_loop(3, 3 if biased is likelier_of_two else 4, "rejection")
    exact = exact_texts(3 if biased is likelier_of_two else 4, PLAIN)
    assert sum(weight for weight, _ in runs) == pytest.approx(1, abs=1e-12)
    assert total_variation(text_law(runs), exact) > 0.01
    with pytest.raises(AssertionError):
        assert_same_law(text_law(runs), exact)


P, Q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()


def frequencies(draw_draft, draws):
    """Frequencies of the first emitted token and of acceptance, by the shipped generator."""
    source = GeneratorSource(torch.Generator().manual_seed(3))
    p_MV, q_NV = P.repeat(2, 1), Q[None]
    counts, accepted = [0] * V, 0
    for _ in range(draws):
        draft = [draw_draft(source)]
        verdict = verify_rejection(draft, q_NV, p_MV, source)
        counts[draft[0] if verdict.accepted else verdict.next_token] += 1
        accepted += verdict.accepted
    return [count / draws for count in counts], accepted / draws


def test_field_report_frequencies_and_acceptance():
    emitted, accepted = frequencies(lambda source: source.categorical(Q), 40_000)
    assert emitted == pytest.approx(P.tolist(), abs=0.01)
    assert accepted == pytest.approx(0.6, abs=0.01)


def test_field_report_biased_mix_gives_its_known_wrong_law():
    emitted, _ = frequencies(lambda _: int(Q.argmax()), 20_000)
    assert emitted == pytest.approx([1 / 2, 1 / 6, 1 / 3], abs=0.015)
    assert max(abs(a - b) for a, b in zip(emitted, P.tolist(), strict=True)) > 0.1


# 0.999 quantiles of chi-square by degrees of freedom.
CRITICAL = (
    10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26, 32.91, 34.53,
    36.12, 37.70, 39.25, 40.79, 42.31, 43.82, 45.31, 46.80, 48.27, 49.73, 51.18, 52.62, 54.05,
)  # fmt: skip


def chi_square_excess(counts, law, draws):
    """The statistic over its critical value; rare outcomes share a cell."""
    assert set(counts) <= set(law)
    cells, rare = [], [0.0, 0.0]
    for outcome, probability in law.items():
        cell = [counts.get(outcome, 0), probability * draws]
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rare = [a + b for a, b in zip(rare, cell, strict=True)]
    cells += [rare] if rare[1] >= 1 else []
    assert len(cells) > 4
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells) / CRITICAL[len(cells) - 2]


@pytest.mark.parametrize("rule", ["rejection", "rejection-argmax", "sample-and-match"])
def test_real_engines_write_the_targets_law(tmp_path, rule):
    draws, max_new_tokens, sampling = 400, 3, Sampling(1.5, top_k=3)
    target = tiny_target(tmp_path, "qwen3")
    torch.manual_seed(5)
    config = DrafterConfig.for_target(
        target.config, block_size=3, num_layers=1, target_layer_ids=(1, 2), mask_token_id=NUM_TOKENS
    )
    drafter = Drafter(config).eval()
    prompt = [7, 30, 41, 55]

    law, open_texts = {}, {(): 1.0}
    while open_texts:
        text, weight = open_texts.popitem()
        ids = torch.tensor([*prompt, *text])[None]
        last = target.features(ids, torch.zeros_like(ids), (1,), last_hidden=True).last_hidden
        probs = warp(target.head.logits(last[0, -1]).double(), sampling)
        for token in probs.nonzero().flatten().tolist():
            longer = (*text, token)
            done = token in target.eos_token_ids or len(longer) == max_new_tokens
            (law if done else open_texts)[longer] = weight * float(probs[token])

    source = GeneratorSource(torch.Generator().manual_seed(11))
    counts = defaultdict(int)
    for _ in range(draws):
        engine = CachedTarget(target, config.target_layer_ids)
        decoded = decode_speculatively(
            engine,
            CachedDrafter(drafter, target, engine),
            prompt,
            max_new_tokens=max_new_tokens,
            eos_token_ids=target.eos_token_ids,
            sampling=sampling,
            source=source,
            rule=rule,
        )
        counts[tuple(decoded.ids)] += 1
    assert chi_square_excess(counts, law, draws) < 1
    uniform = {outcome: 1 / len(law) for outcome in law}
    assert chi_square_excess(counts, uniform, draws) > 1  # the sample is large enough to tell
