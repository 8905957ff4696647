"""Guards the doctor: every known fault, planted, is named; a healthy drafter has none (W2).

Drafters are trained here by plain loops, each under one convention that is not ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import evaluate
from data.render import ChatFormat
from data.rows import TokenRow
from drafter.attention import Visibility
from drafter.config import DrafterConfig
from drafter.decoding import CachedDrafter
from drafter.errors import UserError
from drafter.evaluation import doctor
from drafter.evaluation.conventions import Convention, Examiner, Rate, mask_candidates
from drafter.evaluation.loading import LoadedDrafter
from drafter.model import Drafter
from drafter.target import Target
from drafter.target_loading import Loaded
from tests.runs import QUESTIONS, cli, find_target
from tests.tiny import NUM_TOKENS, tiny_config, tiny_model, tiny_tokenizer

HEADER = [11, 12]
TAPS = (0, 2)
K = 4


@cache
def target():
    config = tiny_config(num_hidden_layers=5, vocab_size=NUM_TOKENS + 24)
    return Target(Loaded(tiny_model(config, seed=1), tiny_tokenizer()), "tiny", None)


@cache
def rows():
    generator = torch.Generator().manual_seed(0)
    prompts = [
        [*torch.randint(20, NUM_TOKENS, (5,), generator=generator).tolist(), *HEADER]
        for _ in range(8)
    ]
    answers = target().generate(prompts, 30)
    return [
        row(i, prompt, answer.ids)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def row(place, prompt, answer):
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return TokenRow(place, ids, np.arange(len(ids)) >= len(prompt))


@cache
def trained(taps=TAPS, mask=NUM_TOKENS, label_shift=0, position_shift=0) -> Drafter:
    """A drafter overfitted to the rows, block by block, under the given convention."""
    config = DrafterConfig.for_target(
        target().config, block_size=K, num_layers=1, target_layer_ids=taps, mask_token_id=mask
    )
    torch.manual_seed(0)
    drafter = Drafter(config)
    drafter.norm.weight.data.copy_(target().final_norm.weight)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    blocks = [b for r in rows() for b in _blocks(r, mask, label_shift)]
    features = {
        r.sample_id: target().features(*_row_and_documents(r), taps).hidden_states for r in rows()
    }
    for _ in range(50):
        optimizer.zero_grad()
        loss = 0.0
        for r in rows():
            own = [b for b in blocks if b[0] == r.sample_id]
            anchors = torch.tensor([b[1] for b in own])
            slots = anchors[:, None] + torch.arange(K) + position_shift
            hidden = drafter(
                features[r.sample_id],
                torch.arange(len(r.input_ids))[None],
                target().embed(torch.tensor([b[2] for b in own]))[None],
                slots[None],
                _mask(anchors, len(r.input_ids)),
            )
            logits = target().head.logits(hidden[0, :, 1:])
            labels = torch.tensor([b[3] for b in own])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
        loss.backward()
        optimizer.step()
    return drafter.eval().requires_grad_(False)


def _row_and_documents(r):
    ids = torch.tensor(r.input_ids, dtype=torch.long)[None]
    return ids, torch.zeros_like(ids)


def _blocks(r, mask, label_shift):
    """(row, anchor, input ids, labels) of every anchor; -1 where there is no label."""
    ids, first = r.input_ids.tolist(), int(np.flatnonzero(r.supervised)[0])
    out = []
    for anchor in range(first, len(ids) - 1):
        places = [anchor + k + label_shift for k in range(1, K)]
        labels = [ids[p] if p < len(ids) else -1 for p in places]
        out.append((r.sample_id, anchor, [ids[anchor], *[mask] * (K - 1)], labels))
    return out


def _mask(limits, length):
    """Every slot sees the context before its block's limit, and its own block."""
    slots = len(limits) * K
    dense = torch.zeros(slots, length + slots, dtype=torch.bool)
    for a, limit in enumerate(limits.tolist()):
        dense[a * K : (a + 1) * K, :limit] = True
        dense[a * K : (a + 1) * K, length + a * K : length + (a + 1) * K] = True
    return Visibility(dense=dense[None, None])


def said_config(drafter, **fields):
    """The same drafter under a config that says something else."""
    twin = Drafter(DrafterConfig.from_dict(drafter.config.to_dict()))
    twin.load_state_dict(drafter.state_dict())
    twin.config.block_size = fields.pop("block_size", twin.config.block_size)
    twin.config.dflash_config = {**twin.config.dflash_config, **fields}
    return twin.eval().requires_grad_(False)


def patient(drafter, **changes):
    fields = {"rows": rows(), "header_ids": HEADER, "trained_block_size": K} | changes
    loaded = LoadedDrafter("d", drafter, "f", target_fingerprint=target().fingerprint)
    return doctor.Patient(loaded, fields.pop("target", target()), **fields)


def faults(patient):
    return {one.name: one for one in doctor.examine(patient) if one.fault}


def test_a_healthy_drafter_has_no_fault():
    found = list(doctor.examine(patient(trained(), stored=lambda i: features(i))))
    assert not [one for one in found if one.fault], found
    assert [one.name for one in found] == [
        "target",
        "head",
        "mask token id",
        "block size",
        "supervised mask",
        "chat template",
        "on-policy share",
        "feature cache",
        "layer ids",
        "mask token",
        "labels",
        "positions",
        "visibility",
        "training and inference",
        "replay and loop",
    ]
    rate = Examiner(trained(), target(), rows()).rate(Convention.of(trained()))
    assert rate.share > 0.5  # there is something to lose


def test_a_draft_vocabulary_that_misses_the_rows_is_named():
    ids = np.concatenate([row.input_ids[row.supervised] for row in rows()])
    common, uncommon = np.unique(ids), np.setdiff1d(np.arange(50), ids)
    for kept, named in ((common, []), (uncommon, ["draft vocabulary"])):
        drafter = said_config(trained())
        drafter.reserve_vocabulary(len(kept))
        drafter.choose_vocabulary(torch.from_numpy(kept))
        found = list(doctor.examine(patient(drafter)))
        assert "draft vocabulary" in [one.name for one in found]
        assert [one.name for one in found if one.fault] == named, found


def features(place):
    return target().features(*_row_and_documents(rows()[place]), TAPS).hidden_states[0]


OTHER_MASK = NUM_TOKENS + 5
CONVENTIONS = {
    "layer ids, one higher": ("layer ids", "one layer higher", lambda: trained(taps=(1, 3)), {}),
    "layer ids, one lower": (
        "layer ids",
        "one layer lower",
        lambda: trained(),
        {"target_layer_ids": [1, 3]},
    ),
    "layer ids, reversed": (
        "layer ids",
        "in reverse order",
        lambda: trained(),
        {"target_layer_ids": [2, 0]},
    ),
    "mask token": (
        "mask token",
        "the row behind the last token",
        lambda: trained(),
        {"mask_token_id": OTHER_MASK},
    ),
    "labels": ("labels", "one token later", lambda: trained(label_shift=1), {}),
    "positions": ("positions", "one higher", lambda: trained(position_shift=1), {}),
}


@pytest.mark.parametrize("planted", CONVENTIONS)
def test_another_convention_in_training_is_named(planted):
    check, name, make, fields = CONVENTIONS[planted]
    fields = {"target_layer_ids": list(TAPS), **fields}
    drafter = said_config(make(), **fields)
    found = faults(patient(drafter))
    assert list(found) == [check], {k: v.said for k, v in found.items()}
    assert name in found[check].fault


def test_a_drafter_that_saw_too_much_is_named(monkeypatch):
    """So small a drafter learns its rows by heart either way: the rates are set here."""
    own = Convention.of(trained())
    seeing = dataclasses.replace(own, sees_anchor=True)
    right = Examiner.rate

    def rate(self, convention):
        return Rate(900, 1000) if convention == seeing else right(self, convention)

    monkeypatch.setattr(Examiner, "rate", rate)
    drafter = said_config(trained())
    for parameter in drafter.parameters():  # one that drafts nothing of use
        parameter.data.zero_()
    found = faults(patient(drafter))
    assert list(found) == ["visibility"]
    assert "the anchor's own state seen" in found["visibility"].fault


def test_only_that_convention_shows_a_block_the_state_at_its_anchor():
    examiner = Examiner(trained(), target(), rows()[:1])
    own = Convention.of(trained())
    anchors = examiner.batches[0].anchors[0]
    before = {sees: states(examiner, own, sees) for sees in (False, True)}
    examiner.features(0, TAPS)[0, anchors[3] :] += 1.0
    for sees in (False, True):
        changed = (states(examiner, own, sees) != before[sees]).flatten(1).any(1)
        first = int(changed.nonzero()[0])
        assert first == (3 if sees else 4)


def test_that_convention_moves_no_window():
    drafter = said_config(trained())
    drafter.config.layer_types = ["sliding_attention"] * drafter.config.num_hidden_layers
    drafter.config.sliding_window = 6
    examiner = Examiner(drafter, target(), rows()[:1])
    own = Convention.of(drafter)
    anchors = examiner.batches[0].anchors[0]
    before = {sees: states(examiner, own, sees) for sees in (False, True)}
    examiner.features(0, TAPS)[0, : anchors[8]] += 1.0
    for sees in (False, True):
        changed = (states(examiner, own, sees) != before[sees]).flatten(1).any(1)
        assert torch.equal(changed, anchors - 6 + 1 < anchors[8])


def states(examiner, own, sees):
    return examiner.states(0, dataclasses.replace(own, sees_anchor=sees))


@pytest.mark.parametrize("size", [3, 8])
def test_another_block_size_than_in_training_is_named(size):
    found = faults(patient(said_config(trained(), block_size=size)))
    assert list(found) == ["block size"]
    assert "trained with K = 4" in found["block size"].said


def test_other_weights_of_the_target_are_named():
    sick = patient(trained())
    sick.loaded.target_fingerprint = "another"
    assert list(faults(sick)) == ["target"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_at_random_is_named_and_ends_it(tied):
    config = tiny_config(num_hidden_layers=5, vocab_size=NUM_TOKENS + 24, tied=tied)
    other = Target(Loaded(tiny_model(config, seed=1), tiny_tokenizer()), "tiny", None)
    weight = torch.randn_like(other.head.weight) * 0.01
    other.head = dataclasses.replace(other.head, weight=weight)
    found = list(doctor.examine(patient(trained(), target=other)))
    assert found[-1].name == "head"
    assert "random" in found[-1].fault


@pytest.mark.parametrize("token", ["eos", "read"])
def test_a_mask_token_that_means_something_is_named(token):
    read = int(rows()[0].input_ids[1])
    mask = {"eos": target().tokenizer.eos_token_id, "read": read}[token]
    found = faults(patient(said_config(trained(), mask_token_id=mask)))
    assert list(found) == ["mask token id", "mask token"]  # it was trained with another, too


def test_prompts_that_are_trained_on_are_named():
    whole = [dataclasses.replace(r, supervised=np.ones_like(r.supervised)) for r in rows()]
    found = faults(patient(trained(), rows=whole))
    assert "supervised mask" in found
    assert "prompts are trained on" in found["supervised mask"].fault


def test_another_template_is_named():
    found = faults(patient(trained(), header_ids=[13, 14]))
    assert list(found) == ["chat template"]


def test_another_models_responses_are_named():
    foreign = []
    for r in rows():
        answer = r.input_ids[7:].copy()
        answer[::3] = 150  # the rest is still what it would say
        foreign.append(row(r.sample_id, r.input_ids[:7].tolist(), answer.tolist()))
    assert "on-policy share" in faults(patient(trained(), rows=foreign))


@pytest.mark.parametrize("kind", ["other rows", "other layers", "fewer layers"])
def test_a_cache_of_something_else_is_named(kind):
    def stored(place):
        if kind == "other rows":
            return features((place + 1) % 8)
        taps = (1, 3) if kind == "other layers" else (0,)
        return target().features(*_row_and_documents(rows()[place]), taps).hidden_states[0]

    assert list(faults(patient(trained(), stored=stored))) == ["feature cache"]


def test_a_drafter_that_drafts_otherwise_than_it_trains_is_named(monkeypatch):
    right = CachedDrafter.draft

    def wrong(self, anchor_id):
        self._engine._taps[-1] = self._engine._taps[-1].roll(1, 0)
        return right(self, anchor_id)

    monkeypatch.setattr(CachedDrafter, "draft", wrong)
    found = faults(patient(trained()))
    assert "training and inference" in found


def test_a_replay_that_is_not_the_loop_is_named(monkeypatch):
    right = doctor.replay_trajectory

    def wrong(drafter, target, trajectory, settings, states):
        return right(drafter, target, trajectory, settings, states.roll(3, 1))

    monkeypatch.setattr(doctor, "replay_trajectory", wrong)
    assert list(faults(patient(trained()))) == ["replay and loop"]


def test_rates_are_compared_beyond_chance():
    assert Rate(60, 100).clearly_above(Rate(20, 100))
    assert not Rate(24, 100).clearly_above(Rate(20, 100))
    assert not Rate(3, 5).clearly_above(Rate(1, 5))  # too few to tell
    assert not Rate(1000, 10_000).clearly_above(Rate(900, 10_000))  # sure, but of no account
    assert math.isnan(Rate(0, 0).share)
    assert not Rate(0, 0).clearly_above(Rate(1, 2))


def test_mask_candidates_are_tokens_of_this_target():
    found = mask_candidates(target())
    assert found["the row behind the last token"] == NUM_TOKENS
    assert len(set(found.values())) == len(found)


def test_the_verb_looks_at_a_run_and_its_rows(tmp_path, capsys):
    cli(tmp_path, trainer__max_epochs=1)
    own = Target.load(str(find_target(tmp_path)), dtype="float32")
    asks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [ChatFormat(own.tokenizer).encode_prompt(ask)[1] for ask in asks]
    answers = own.generate(prompts, 20)
    aligned = [
        {"prompt_ids": ids, "response_ids": answer.ids}
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    rows = tmp_path / "aligned.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in aligned))
    words = ["doctor", "--ckpt", str(tmp_path / "run")]
    config = tmp_path / "run" / "config.yaml"
    as_it_was = config.read_text()
    with_cache = yaml.safe_load(as_it_was)
    with_cache["data"]["cache"] = str(tmp_path / "gone")
    config.write_text(yaml.safe_dump(with_cache))  # rows that are named come before it
    capsys.readouterr()
    evaluate.main([*words, "--data", str(rows)])
    said = capsys.readouterr().out
    assert "FAULT" not in said
    assert "ok     chat template: 3 of 3" in said
    assert "no known fault" in said
    config.write_text(as_it_was)
    output = tmp_path / "found.json"
    with pytest.raises(SystemExit) as stop:  # the run's own rows say nothing that it would say
        evaluate.main([*words, "--output", str(output)])
    assert stop.value.code == 1
    assert "1 likely cause: head" in capsys.readouterr().out
    found = json.loads(output.read_text())["findings"]
    assert [one["name"] for one in found if one["fault"]] == ["head"]


def test_rows_that_are_gone_are_missed_before_a_target_is_loaded(tmp_path, capsys, monkeypatch):
    cli(tmp_path, trainer__max_epochs=1)
    config = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["data"]["train_data"] = str(tmp_path / "gone.jsonl")
    config.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(evaluate, "target_for", lambda *_: pytest.fail("a target was loaded"))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["doctor", "--ckpt", str(tmp_path / "run")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run'} was trained on rows that can't be read" in said
    assert "gone.jsonl: no such file or folder); name rows like them with --data." in said


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]])
def test_on_a_cpu_it_runs_in_fp32_unless_told(tmp_path, monkeypatch, flags):
    cli(tmp_path, trainer__max_epochs=1)
    asked = []

    def load(*_, **options):
        asked.append(options["dtype"])
        raise UserError("enough")

    monkeypatch.setattr(evaluate, "load_target", load)
    with pytest.raises(SystemExit):
        evaluate.main(["doctor", "--ckpt", str(tmp_path / "run"), "--device", "cpu", *flags])
    assert asked == [flags[-1] if flags else "float32"]


def test_without_rows_it_asks_for_some(tmp_path, capsys):
    cli(tmp_path, trainer__max_epochs=1)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["doctor", "--ckpt", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "--data" in capsys.readouterr().err
