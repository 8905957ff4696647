"""Guards C1, C4, C6 and C10: greedy text that differs, caches left behind, replay unlike the loop.

Legend: R response tokens, N drafted slots, K block size.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drafter.attention import build_visibility
from drafter.blocks import DraftBatch, build_blocks
from drafter.config import DrafterConfig
from drafter.decoding import CachedDrafter, CachedTarget, decode_plainly, decode_speculatively
from drafter.head import score_blocks
from drafter.initialise import initialise_from_target
from drafter.metrics import AcceptedLength
from drafter.model import Drafter
from drafter.replay import SlotResults, count_decoded, count_rounds, replay_slots
from drafter.sampling import GREEDY, Sampling, warp
from tests.tiny import NUM_TOKENS, SLIDING_WINDOW, VOCAB_SIZE, tiny_target

FAMILIES = ("llama", "qwen3", "gemma3")
K = 6
MAX_NEW = 24
SUMS = ("emitted", "rounds", "accepted", "drafted", "unclipped", "matched", "wasted")
PER_ROUND = ("round_lengths", "round_accepted")


def prompts(count=8):
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 5, 9, 12, 14, 17, 20, 7][:count]  # with the response all cross gemma's window
    assert min(lengths) + MAX_NEW > SLIDING_WINDOW + K
    return [torch.randint(5, NUM_TOKENS, (n,), generator=generator).tolist() for n in lengths]


class Setup:
    """A target, its own greedy texts, and a drafter overfitted to the first three of them."""

    def __init__(self, folder, family):
        self.target = tiny_target(folder, family)
        self.eos = self.target.eos_token_ids
        self.prompts = prompts()
        self.texts = [r.ids for r in self.target.generate(self.prompts, MAX_NEW)]
        torch.manual_seed(0)
        self.config = DrafterConfig.for_target(
            self.target.config,
            block_size=K,
            num_layers=2,
            target_layer_ids=(0, 2),
            mask_token_id=NUM_TOKENS,
        )
        self.drafter = Drafter(self.config)
        initialise_from_target(self.drafter, self.target.final_norm, self.target.layers, "norm")
        self._overfit(steps=60)

    def features(self, ids):
        row = torch.tensor(ids)[None]
        return self.target.features(
            row, torch.zeros_like(row), self.config.target_layer_ids
        ).hidden_states

    def training_batch(self, prompt, text, anchors=None):
        ids, start = [*prompt, *text], len(prompt)
        anchors = range(start, len(ids) - 1) if anchors is None else anchors
        row = torch.tensor(ids)[None]
        return DraftBatch(
            input_ids=row,
            supervised=torch.arange(len(ids))[None] >= start,
            document_ids=torch.zeros_like(row),
            positions=torch.arange(len(ids))[None],
            anchors=torch.tensor(list(anchors))[None],
            sample_ids=torch.zeros(1, dtype=torch.long),
            hidden_states=self.features(ids),
        )

    def training_forward(self, batch):
        """Blocks and states, as the training step computes them."""
        blocks = build_blocks(batch, K, self.config.mask_token_id)
        visibility = build_visibility(batch.anchors, batch.document_ids, K)
        embeds = self.target.embed(blocks.input_ids)
        hidden = self.drafter(
            batch.hidden_states, batch.positions, embeds, blocks.positions, visibility
        )
        return blocks, hidden

    def _overfit(self, steps):
        pairs = [pair for pair in zip(self.prompts, self.texts, strict=True) if len(pair[1]) > 6]
        batches = [self.training_batch(*pair) for pair in pairs[:3]]
        optimizer = torch.optim.Adam(self.drafter.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            for batch in batches:
                blocks, hidden = self.training_forward(batch)
                scores = score_blocks(self.target.head, hidden, blocks)
                (-scores.log_prob.sum() / scores.valid.sum() / len(batches)).backward()
            optimizer.step()
        self.drafter.eval().requires_grad_(False)

    def decode(self, prompt, max_new_tokens=MAX_NEW):
        """The real loop over the real engines, which note what they saw."""
        engine = NotingTarget(self.target, self.config.target_layer_ids)
        drafter = NotingDrafter(self.drafter, self.target, engine)
        decoded = decode_speculatively(
            engine, drafter, prompt, max_new_tokens=max_new_tokens, eos_token_ids=self.eos
        )
        return decoded, engine, drafter

    def replay(self, prompt, text, **kwargs):
        return replay_slots(
            self.drafter,
            self.target.embed,
            self.target.head,
            self.features([*prompt, *text]),
            torch.tensor([*prompt, *text]),
            len(prompt),
            **{"sampling": GREEDY, **kwargs},
        )


class NotingTarget(CachedTarget):
    def __init__(self, *args):
        super().__init__(*args)
        self.lengths, self.verified = [], []

    def verify(self, block_ids):
        logits = super().verify(block_ids)
        self.verified.append((list(block_ids), logits))
        return logits

    def commit(self, count):
        super().commit(count)
        self.lengths.append(self.session.length)


class NotingDrafter(CachedDrafter):
    def __init__(self, *args):
        super().__init__(*args)
        self.lengths, self.logits = [], []

    def draft(self, anchor_id):
        self.logits.append(super().draft(anchor_id))
        self.lengths.append(self.context.length)
        return self.logits[-1]


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    @cache
    def make(family):
        return Setup(tmp_path_factory.mktemp(family), family)

    return make


@pytest.fixture(params=FAMILIES)
def setup(setups, request):
    return setups(request.param)


class FakeDrafter:
    """Drafts of a known quality: it has the target's text and sees how far the loop has come."""

    block_size = K

    def __init__(self, kind, engine, prompt_length, text):
        self.kind, self.engine, self.start, self.text = kind, engine, prompt_length, text
        self.generator = torch.Generator().manual_seed(len(text) + prompt_length)

    def draft(self, anchor_id):
        at = self.engine.session.length - self.start
        assert self.text[at] == anchor_id
        truth = torch.tensor([*self.text[at + 1 : at + K], *[5] * K][: K - 1])
        noise = torch.randint(5, NUM_TOKENS, (K - 1,), generator=self.generator)
        wrong = (truth + 1) % VOCAB_SIZE
        tokens = {
            "oracle": truth,
            "noisy oracle": torch.where(noise % 3 == 0, wrong, truth),
            "random": noise,
            "always wrong": wrong,
            "constant": torch.full_like(truth, 5),
        }[self.kind]
        return F.one_hot(tokens, VOCAB_SIZE).float()


@pytest.mark.parametrize("kind", ["oracle", "noisy oracle", "random", "always wrong", "constant"])
def test_greedy_text_is_the_targets_own_whatever_is_drafted(setup, kind):
    accepted, metric, oracle_lengths = 0, AcceptedLength(), []
    for index, (prompt, full) in enumerate(zip(setup.prompts, setup.texts, strict=True)):
        limit = MAX_NEW if index % 2 else (1, 2, K, K + 1)[index // 2]
        text = full[:limit]
        options = {"max_new_tokens": limit, "eos_token_ids": setup.eos}
        engine = CachedTarget(setup.target)
        drafter = FakeDrafter(kind, engine, len(prompt), full)
        decoded = decode_speculatively(engine, drafter, prompt, **options)
        assert decoded.ids == text
        assert decode_plainly(CachedTarget(setup.target), prompt, **options).ids == text
        assert sum(decoded.round_lengths) == len(text) - 1
        assert engine.session.length == len(prompt) + len(text) - 1
        accepted += sum(round_.accepted for round_ in decoded.rounds)
        oracle_lengths += [round_.unclipped for round_ in decoded.rounds]
        metric.update(count_decoded(decoded.rounds, decoded.drafts, decoded.ids))
    figures = metric.compute()
    assert figures["responses_without_round"] == sum(
        len(text) == 1 or index == 0 for index, text in enumerate(setup.texts)
    )
    if kind == "oracle":
        assert set(oracle_lengths) == {K}
        assert figures["accepted_length_unclipped"] == K
        assert figures["accepted_length"] < K  # the clipped one is what the text has
    if kind == "noisy oracle":
        assert 0 < accepted < figures["drafted_per_round"] * figures["rounds"]
    if kind == "always wrong":
        assert accepted == 0
        assert figures["accepted_length"] == 1


def test_the_trained_drafter_changes_no_token(setup):
    for prompt, text in zip(setup.prompts, setup.texts, strict=True):
        decoded, _, _ = setup.decode(prompt)
        assert decoded.ids == text


def test_greedy_replay_walks_the_loops_rounds(setup):
    accepted, lengths = 0, set()
    for prompt, text in zip(setup.prompts, setup.texts, strict=True):
        for limit in (2, K, MAX_NEW):
            decoded, _, _ = setup.decode(prompt, limit)
            looped = count_decoded(decoded.rounds, decoded.drafts, decoded.ids)
            slots = setup.replay(prompt, text[:limit])
            replayed = count_rounds(slots)
            assert decoded.ids == text[:limit]
            for name in (*SUMS, *PER_ROUND):
                assert getattr(looped, name) == getattr(replayed, name), name
            if decoded.rounds:
                np.testing.assert_array_equal(looped.accepted_at, replayed.accepted_at)
                np.testing.assert_array_equal(looped.reached_at, replayed.reached_at)
                starts = np.cumsum([0, *decoded.round_lengths[:-1]])
                np.testing.assert_array_equal(slots.drafts[starts], decoded.drafts)
            accepted += looped.accepted
            lengths |= set(decoded.round_lengths)
    assert accepted > 0
    assert len(lengths) >= 3, "acceptance too uniform to tell the two apart"


def test_replay_does_not_depend_on_how_anchors_are_chunked(setups):
    setup = setups("qwen3")
    prompt, text = setup.prompts[1], setup.texts[1]
    whole = setup.replay(prompt, text)
    for size in (1, 5):
        parts = setup.replay(prompt, text, anchors_per_chunk=size)
        for name in ("drafts", "match", "valid", "accept"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_a_response_of_one_token_has_no_round(setup):
    prompt, text = setup.prompts[0], setup.texts[0][:1]
    decoded, engine, drafter = setup.decode(prompt, 1)
    assert (decoded.ids, decoded.rounds) == (text, [])
    assert (engine.lengths, drafter.lengths) == ([], [])
    for sampling, log_probs in ((GREEDY, None), (Sampling(1.0), torch.tensor([-1.0]))):
        slots = setup.replay(prompt, text, sampling=sampling, log_probs=log_probs)
        assert slots.match.shape == (0, K - 1)
        counts = count_rounds(slots)
        assert (counts.rounds, counts.emitted, counts.round_lengths) == (0, 0, ())


def test_training_and_decoding_give_the_same_slot_logits(setup):
    rounds = 0
    for prompt, text in zip(setup.prompts, setup.texts, strict=True):
        decoded, _, drafter = setup.decode(prompt)
        if not decoded.rounds:
            continue
        starts = len(prompt) + np.cumsum([0, *decoded.round_lengths[:-1]])
        blocks, hidden = setup.training_forward(setup.training_batch(prompt, text, starts.tolist()))
        trained = setup.target.head.logits(hidden[0, :, 1:])
        torch.testing.assert_close(torch.stack(drafter.logits), trained, rtol=1e-5, atol=2e-5)
        # the labels are what the loop then emitted
        for start, labels, valid in zip(starts, blocks.labels[0], blocks.valid[0], strict=True):
            at = start - len(prompt) + 1
            assert labels[valid].tolist() == text[at : at + K - 1]
        rounds += len(decoded.rounds)
    assert rounds > 20


def test_caches_hold_committed_tokens_only_after_every_round(setup):
    rejected = 0
    for prompt in setup.prompts:
        decoded, engine, drafter = setup.decode(prompt)
        emitted = 1 + np.cumsum([0, *decoded.round_lengths])
        assert engine.lengths == (len(prompt) + emitted[1:] - 1).tolist()
        assert drafter.lengths == (len(prompt) + emitted[:-1] - 1).tolist()
        # logits behind the cropped cache equal those of a pass without one
        for before, (block, logits) in zip(emitted, engine.verified, strict=False):
            row = torch.tensor([*prompt, *decoded.ids[: before - 1], *block])[None]
            features = setup.target.features(
                row, torch.zeros_like(row), (1,), last_hidden=True
            ).last_hidden
            plain = setup.target.head.logits(features[0, -len(block) :])
            torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        rejected += sum(round_.length < K for round_ in decoded.rounds[:-1])
    assert rejected > 0


def test_sampled_replay_accepts_with_min_1_q_over_p(setups):
    setup = setups("gemma3")
    sampling = Sampling(1.2, top_k=20, top_p=0.95)
    responses = setup.target.generate(setup.prompts, MAX_NEW, sampling, seed=4)
    some = set()
    for prompt, response in zip(setup.prompts, responses, strict=True):
        log_probs = torch.tensor(response.log_probs, dtype=torch.float64)
        slots = setup.replay(prompt, response.ids, sampling=sampling, log_probs=log_probs)
        _, hidden = setup.training_forward(setup.training_batch(prompt, response.ids))
        q = warp(setup.target.head.logits(hidden[0, :, 1:]), sampling)
        for t, k in np.ndindex(*slots.accept.shape):
            at = t + k + 1
            inside = at < len(response.ids)
            assert slots.valid[t, k] == inside
            wanted = 0.0
            if inside:
                wanted = min(1.0, float(q[t, k, response.ids[at]]) / float(log_probs[at].exp()))
                some.add((wanted > 0) + (wanted == 1))
            assert slots.accept[t, k] == pytest.approx(wanted, abs=1e-4)
    assert some == {0, 1, 2}


# ---------------------------------------------------------------- EOS, with scripted engines

ENDS = (98, 99)


class ScriptedTarget:
    """Continues a fixed text, whatever stands before."""

    def __init__(self, text):
        self.text, self.done = text, 0

    def prefill(self, prompt_ids):
        return self._logits(0)[0]

    def verify(self, block_ids):
        self.block = list(block_ids)
        return torch.cat([self._logits(self.done + 1 + i) for i in range(len(block_ids))])

    def commit(self, count):
        assert self.block[:count] == self.text[self.done : self.done + count]
        self.done += count

    def _logits(self, at):
        return F.one_hot(torch.tensor([self.text[at]]), 100).float()


class ScriptedDrafter:
    def __init__(self, target, text):
        self.target, self.text, self.block_size = target, text, K

    def draft(self, anchor_id):
        at = self.target.done + 1
        return F.one_hot(torch.tensor(self.text[at : at + K - 1]), 100).float()


def scripted(text, drafted=None, max_new_tokens=30):
    options = {"max_new_tokens": max_new_tokens, "eos_token_ids": ENDS}
    plain = decode_plainly(ScriptedTarget(text), [1], **options)
    target = ScriptedTarget(text)
    drafter = ScriptedDrafter(target, drafted or text)
    return decode_speculatively(target, drafter, [1], **options), plain, target


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("earlier_rounds", [0, 2])
@pytest.mark.parametrize("slot", range(K + 1))
def test_an_eos_ends_the_text_in_whichever_slot_it_stands(slot, earlier_rounds, end):
    # slot 0 is the token before the round, 1..K-1 are drafted, K is the bonus
    at = earlier_rounds * K + slot
    text = [10 + i % 50 for i in range(60)]
    text[at] = end
    text[at + 1] = ENDS[0]  # what follows must not be read
    decoded, plain, target = scripted(text)
    assert decoded.ids == plain.ids == text[: at + 1]
    assert decoded.finished
    assert plain.finished
    assert decoded.round_lengths == [K] * earlier_rounds + ([slot] if slot else [])
    assert target.done == len(decoded.ids) - 1
    if slot:
        last = decoded.rounds[-1]
        assert last.accepted == min(slot, K - 1)
        assert last.unclipped == K
    counts = count_decoded(decoded.rounds, decoded.drafts, decoded.ids)
    assert counts.drafted == sum(min(K - 1, at - t) for t in range(0, at, K))


@pytest.mark.parametrize("limit", range(1, 2 * K + 2))
def test_the_limit_of_new_tokens_holds_within_a_block(limit):
    decoded, plain, target = scripted([10 + i for i in range(60)], max_new_tokens=limit)
    assert decoded.ids == plain.ids == [10 + i for i in range(limit)]
    assert not decoded.finished
    assert sum(decoded.round_lengths) == limit - 1
    assert target.done == limit - 1


def test_a_rejected_eos_ends_nothing_and_a_corrected_one_does():
    text = [10 + i for i in range(60)]
    drafted = list(text)
    drafted[3] = ENDS[1]
    decoded, plain, _ = scripted(text, drafted, max_new_tokens=20)
    assert decoded.ids == plain.ids == text[:20]
    assert decoded.round_lengths[0] == 3
    text[3] = ENDS[0]
    decoded, plain, _ = scripted(text, drafted, max_new_tokens=20)
    assert decoded.ids == plain.ids == text[:4]
    assert decoded.rounds[-1].accepted == 2
    assert decoded.rounds[-1].unclipped == 3


# ---------------------------------------------------------------- the walk


def slow_walk(match, valid):
    """Rounds of a greedy trajectory by the loop that the method describes."""
    last, drafted_slots = match.shape
    out = {"lengths": [], "accepted": [], "drafted": 0, "unclipped": 0, "matched": 0, "wasted": 0}
    accepted_at, reached_at = [0] * drafted_slots, [0] * drafted_slots
    t = 0
    while t < last:
        n = 0
        while n < drafted_slots and valid[t, n] and match[t, n]:
            n += 1
        ended_by_draft = t + n == last
        out["lengths"].append(n if ended_by_draft else n + 1)
        out["accepted"].append(n)
        out["unclipped"] += drafted_slots + 1 if ended_by_draft else n + 1
        for k in range(drafted_slots):
            out["drafted"] += bool(valid[t, k])
            accepted_at[k] += k < n
            reached_at[k] += bool(k <= n and valid[t, k])
            out["matched"] += bool(match[t, k])
            out["wasted"] += bool(match[t, k] and k > n)
        t += n + 1
    return out, accepted_at, reached_at


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("drafted_slots", [1, 2, 5])
def test_the_flow_over_positions_equals_a_plain_walk(drafted_slots, rate):
    rng = np.random.default_rng(int(100 * rate) + drafted_slots)
    for last in (*range(9), 40):
        valid = np.arange(last)[:, None] + 1 + np.arange(drafted_slots) <= last
        match = (rng.random((last, drafted_slots)) < rate) & valid
        slots = SlotResults(match.astype(np.int64), match, valid, match.astype(np.float64))
        counts = count_rounds(slots)
        wanted, accepted_at, reached_at = slow_walk(match, valid)
        assert counts.round_lengths == tuple(wanted["lengths"])
        assert counts.round_accepted == tuple(wanted["accepted"])
        assert counts.rounds == len(wanted["lengths"])
        assert counts.emitted == sum(wanted["lengths"]) == last
        assert counts.accepted == sum(wanted["accepted"])
        for name in ("drafted", "unclipped", "matched", "wasted"):
            assert getattr(counts, name) == wanted[name], name
        assert counts.accepted_at.tolist() == accepted_at
        assert counts.reached_at.tolist() == reached_at
