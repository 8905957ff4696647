"""Guards distillation: KL(p || q) by mean rows is the divergence of two dense distributions."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from data import sharing
from data.cache import with_run_settings
from drafter.blocks import DraftBatch, build_blocks
from drafter.errors import UserError
from drafter.head import FrozenHead, score_blocks, score_slots
from drafter.soft_labels import SoftLabels, soft_labels
from losses import CombinedLoss, ForwardKL, WeightedTerm
from tests.losses_twins import valid_positions, weight
from tests.runs import cli, scalars, weights
from tests.tiny import tiny_target_dir

VARIANTS = {"plain": {}, "scaled": {"scale": 0.3}, "bias": {"bias": True, "scale": 1.7}}


def make_head(bias=False, dtype=torch.float64, **kwargs):
    torch.manual_seed(1)
    rows = torch.randn(23, 7, dtype=dtype)
    return FrozenHead(rows, torch.randn(23, dtype=dtype) if bias else None, **kwargs)


def dense_kl(head, target_hidden, hidden):
    """KL(p || q) token by token, (T,)."""
    p = head.logits(target_hidden).log_softmax(-1)
    return (p.exp() * (p - head.logits(hidden).log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_mean_rows_give_the_dense_divergence_and_its_gradient(variant, chunk_rows):
    head = make_head(**VARIANTS[variant])
    target_hidden = torch.randn(20, 7, dtype=torch.float64)
    hidden = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 23, (20,))
    upstream = torch.randn(2, 20, dtype=torch.float64)
    alone = score_slots(head, hidden, labels, chunk_rows)
    expected = dense_kl(head, target_hidden, hidden)
    loss = (alone.log_prob * upstream[0] + expected * upstream[1]).sum()
    (expected_grad,) = torch.autograd.grad(loss, hidden)
    soft = soft_labels(head, target_hidden, chunk_rows)
    scores = score_slots(head, hidden, labels, chunk_rows, soft=soft)
    loss = (scores.log_prob * upstream[0] + scores.further["kl"] * upstream[1]).sum()
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(scores.further["kl"], expected)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.equal(scores.log_prob, alone.log_prob)
    again = score_slots(
        head, hidden, labels, chunk_rows, soft=SoftLabels.unpacked(soft.packed(), head)
    )
    assert torch.equal(again.further["kl"], scores.further["kl"])
    with torch.no_grad():
        assert torch.equal(
            score_slots(head, hidden, labels, chunk_rows, soft=soft).further["kl"],
            scores.further["kl"],
        )


def test_it_is_zero_exactly_where_the_drafter_agrees():
    head = make_head(bias=True)
    hidden = torch.randn(20, 7, dtype=torch.float64)
    scores = score_slots(
        head, hidden, torch.zeros(20).long(), soft=soft_labels(head, hidden.clone())
    )
    torch.testing.assert_close(scores.further["kl"], torch.zeros(20, dtype=torch.float64))


def test_a_target_that_is_sure_gives_cross_entropy():
    head = make_head()
    sure, hidden = torch.randn(2, 9, 7, dtype=torch.float64)
    sure *= 10_000  # every logit is far from the next
    labels = head.logits(sure).argmax(-1)
    scores = score_slots(head, hidden, labels, soft=soft_labels(head, sure))
    torch.testing.assert_close(scores.further["kl"], -scores.log_prob)


def test_low_precision_stays_near():
    exact, low = make_head(dtype=torch.float32), make_head(dtype=torch.float32)
    low = FrozenHead(low.weight.bfloat16())
    target_hidden, hidden = torch.randn(2, 20, 7)
    labels = torch.zeros(20).long()
    found = score_slots(low, hidden, labels, soft=soft_labels(low, target_hidden)).further["kl"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense_kl(exact, target_hidden, hidden), atol=0.1, rtol=0.02)


def test_a_head_that_caps_its_logits_is_refused():
    with pytest.raises(UserError, match="caps its logits"):
        soft_labels(make_head(softcap=2.0), torch.randn(3, 7, dtype=torch.float64))


def make_batch():
    """Two rows, one shorter, one block without a slot."""
    supervised = torch.zeros(2, 12).bool()
    supervised[0, 3:12] = supervised[1, 2:6] = True
    documents = torch.zeros(2, 12).long()
    documents[1, 8:] = -1
    return DraftBatch(
        input_ids=torch.randint(0, 23, (2, 12)),
        supervised=supervised,
        document_ids=documents,
        positions=torch.arange(12).expand(2, 12),
        anchors=torch.tensor([[3, 7, 10], [2, 4, -1]]),
        sample_ids=torch.arange(2),
    )


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_every_slot_is_compared_with_the_position_before_its_label(fixed_shape, counted):
    head, batch = make_head(), make_batch()
    blocks = build_blocks(batch, 5, 0)
    last_hidden = torch.randn(2, 12, 7, dtype=torch.float64)
    hidden = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    num_slots = int(blocks.valid.sum()) if counted else None
    scores = score_blocks(
        head,
        hidden,
        blocks,
        num_slots,
        soft=soft_labels(head, last_hidden.flatten(0, 1)),
        fixed_shape=fixed_shape,
    )
    seen = 0
    for row in range(2):
        for block in range(3):
            for slot in range(1, 5):
                found = scores.kl[row * 3 + block, slot - 1]
                if not blocks.valid[row, block, slot - 1]:
                    assert found == 0
                    continue
                before = last_hidden[row, batch.anchors[row, block] + slot - 1]
                own = hidden[row, block, slot]
                expected = dense_kl(head, before[None], own[None])[0]
                torch.testing.assert_close(found, expected)
                seen += 1
    assert seen == blocks.valid.sum() > 8
    (grad,) = torch.autograd.grad(scores.kl.sum(), hidden)
    invalid = ~torch.cat((torch.zeros(2, 3, 1).bool(), blocks.valid), -1)
    assert not grad[invalid].any()


@pytest.mark.parametrize("gamma", [4.0, math.inf])
def test_the_term_is_the_weighted_mean_over_valid_slots(gamma):
    head, batch = make_head(), make_batch()
    blocks = build_blocks(batch, 5, 0)
    scores = score_blocks(
        head,
        torch.randn(2, 3, 5, 7, dtype=torch.float64),
        blocks,
        soft=soft_labels(head, torch.randn(24, 7, dtype=torch.float64)),
    )
    numerator = denominator = 0.0
    for m in range(6):
        for k in valid_positions(scores, m):
            numerator += weight(k, gamma) * scores.kl[m, k - 1].item()
            denominator += weight(k, gamma)
    assert ForwardKL(gamma)(scores).value.item() == pytest.approx(numerator / denominator)


def test_scores_without_a_divergence_are_one_clear_error():
    head, batch = make_head(), make_batch()
    scores = score_blocks(
        head, torch.randn(2, 3, 5, 7, dtype=torch.float64), build_blocks(batch, 5, 0)
    )
    loss = CombinedLoss(extra={"kl": WeightedTerm(ForwardKL())})
    assert loss.needs_target
    assert CombinedLoss(alpha_kl=0.5).weights(0.0)["forward_kl"] == 0.5
    assert not CombinedLoss().needs_target
    with pytest.raises(ValueError, match="soft labels"):
        loss(scores, 0.0)


@pytest.mark.parametrize(
    ("rival", "tag"), [("forward-kl", "forward_kl"), ("overlap-blend", "overlap_blend")]
)
def test_a_run_distils_online_from_memory_and_from_a_cache_alike(tmp_path, rival, tag):
    overlay = ("--config", f"configs/rivals/{rival}.yaml", "--model.loss.alpha_chain", "40")
    cached = {"data__cache": str(tmp_path / "states"), "data__cache_dtype": "float32"}
    curves, ends = [], []
    for name, changes in {
        "online": {},
        "device": {"data__keep_in_memory": "device"},
        "filled": {"data__fill_cache": True, **cached},
        "cached": cached,
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        run = cli(folder, extra=overlay, **changes)
        curves.append([value for _, value in scalars(folder / "run")[f"train/{tag}"]])
        ends.append(weights(run))
    assert all(0 < value < 10 for value in curves[0])
    for curve, end in zip(curves[1:], ends[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-4)
        for name, value in end.items():
            torch.testing.assert_close(value, ends[0][name], atol=1e-4, rtol=1e-3)


def test_a_target_that_caps_its_logits_is_refused_before_the_first_step(tmp_path, capsys):
    tiny_target_dir(tmp_path, "gemma3", tied=True, final_logit_softcapping=3.0)
    with pytest.raises(SystemExit):
        cli(tmp_path, model__loss={"alpha_kl": 1.0})
    assert "caps its logits" in capsys.readouterr().err


@pytest.mark.parametrize("where", [True, "device"])
def test_runs_that_share_features_keep_one_copy_of_a_row(tmp_path, where):
    with sharing.shared_between_runs():
        whole = {"extra": {"r": {"term": {"class_path": "losses.ReverseKL"}}}}
        runs = [{"alpha_kl": 0.0}, {"alpha_kl": 1.0}, whole, {"alpha_kl": 0.0}, {"alpha_kl": 1.0}]
        known, forms = [], []
        for i, loss in enumerate(runs):
            changes = {"model__loss": loss, "data__keep_in_memory": where}
            cli(tmp_path, run_dir=str(tmp_path / str(i)), trainer__max_steps=5, **changes)
            (kept,) = sharing._shared.features.values()
            assert len({(key[0], key[2]) for key in kept}) == len(kept) == 12
            known.append({id(own.states) for own in kept.values()})
            forms.append({form for own in kept.values() for form in own.last})
        assert all(one == known[0] for one in known)  # not made again, and not twice
        soft, whole = {"soft_labels"}, {"states"}
        if where == "device":  # the form that was asked for last: there is no room for both
            assert forms == [set(), soft, whole, whole, soft]
        else:
            assert forms == [set(), soft, soft | whole, soft | whole, soft | whole]


@pytest.mark.parametrize(
    ("loss", "asked"),
    [
        ({"alpha_kl": 0.5}, True),
        ({"extra": {"kl": {"term": {"class_path": "losses.ForwardKL"}}}}, True),
        ({"extra": {"d": {"term": {"class_path": "losses.DPace"}}}, "alpha_kl": 0.0}, False),
        ({"extra": {"o": {"term": {"class_path": "losses.Overlap"}}}}, True),
        (
            {
                "extra": {
                    "o": {"term": {"class_path": "losses.Overlap", "init_args": {"form": "x"}}}
                }
            },
            False,
        ),
        (None, False),
    ],
)
def test_a_cache_built_for_a_config_has_what_its_loss_reads(tmp_path, loss, asked):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"loss": loss}}))
    words = with_run_settings(["build", "--from", str(path)])
    assert ("--last_hidden=true" in words) == asked


def test_a_cache_without_it_is_refused_at_once(tmp_path, capsys):
    cached = {"data__cache": str(tmp_path / "states"), "trainer__max_epochs": 1}
    cli(tmp_path, data__fill_cache=True, **cached)
    with pytest.raises(SystemExit):
        cli(tmp_path, model__loss={"alpha_kl": 1.0}, data__num_workers=2, **cached)
    told = capsys.readouterr().err
    assert "--last_hidden true" in told
    assert "DataLoader worker" not in told
