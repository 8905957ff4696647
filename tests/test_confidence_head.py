"""The confidence head (DSpark): its loss, what it leaves alone, and draft lengths decided by it.

The slow twins: the loss as a float64 loop over slots; the Brier score by both outcomes; every
branch of the sampler, and the real loop, with drafts that the head cuts.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

import evaluate
from drafter.draft_length import DraftLength, confidence_of
from drafter.errors import UserError
from drafter.evaluation.loading import load_drafter
from drafter.evaluation.trajectories import EvalPrompt
from drafter.export import main as export_main
from drafter.export_check import main as check_main
from drafter.memory import count_weights
from drafter.model import Drafter
from drafter.module import DrafterModule
from drafter.muon import Muon
from losses import BlockScores, CombinedLoss, Confidence, Overlap, WeightedTerm
from losses.confidence import calibration
from losses.schedule import Schedule
from tests import losses_twins as twins
from tests.runs import cli, find_target, same, scalars
from tests.test_draft_length import HALF, NEW, PROMPTS, rounds_of
from tests.test_step_graphs import batches, close, gradients, recorded
from tests.test_verification_exact_laws import (
    WARPS,
    TableDrafter,
    assert_same_law,
    enumerate_loop,
    exact_texts,
    text_law,
)
from tests.tiny import tiny_target
from tests.tiny_drafters import overfitted_drafter

LENGTHS = (5, 2, 0, 4)
HYPER_PARAMETERS = [
    "attention", "betas", "block_size", "compile_drafter", "cuda_graphs", "final_lr_fraction",
    "init_from", "init_from_target", "intermediate_size", "learning_rate",
    "log_gradient_norms_every", "loss", "mask_token_id", "max_grad_norm", "momentum",
    "num_layers", "num_taps", "on_nonfinite", "optimizer", "target_layer_ids", "total_steps",
    "warmup_fraction", "weight_decay",
]  # fmt: skip


def some_scores(lengths=LENGTHS, seed=0, dtype=torch.float64):
    """Blocks with an overlap and a head's logits; all three scores are leaves."""
    scores = twins.random_scores(lengths, 5, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    shape = scores.valid.shape
    overlap = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    logit = (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    scores.overlap, scores.confidence = overlap.requires_grad_(), logit.requires_grad_()
    return scores


def twin(scores, gamma):
    """(numerator, denominator) of the loss, slot by slot."""
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for m in range(len(scores.valid)):
        for k in twins.valid_positions(scores, m):
            c, a = scores.confidence[m, k - 1].double().sigmoid(), scores.overlap[m, k - 1].item()
            cost = -(a * c.log() + (1 - a) * (1 - c).log())
            numerator = numerator + twins.weight(k, gamma) * cost
            denominator += twins.weight(k, gamma)
    return numerator, denominator


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("gamma", [3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_and_its_gradient_are_the_twins(gamma, dtype):
    scores = some_scores(dtype=dtype)
    ratio, (numerator, denominator) = Confidence(gamma)(scores), twin(scores, gamma)
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(ratio.numerator, numerator.to(dtype), **exact)
    assert float(ratio.denominator) == pytest.approx(denominator)
    assert torch.equal(
        Confidence(gamma).window_denominator(scores.counts_N.to(dtype)), ratio.denominator
    )
    ours, theirs = (
        torch.autograd.grad(value, scores.confidence, retain_graph=True)[0]
        for value in (ratio.numerator, numerator)
    )
    torch.testing.assert_close(ours, theirs.to(dtype), atol=1e-6, rtol=1e-5)
    assert (ours[~scores.valid] == 0).all()
    # the acceptance that it is held to is fixed
    rest = torch.autograd.grad(
        ratio.numerator, (scores.overlap, scores.log_prob), allow_unused=True
    )
    assert rest == (None, None)


def test_it_is_least_where_the_head_says_the_overlap():
    scores = some_scores()
    scores.confidence = scores.overlap.detach().logit().requires_grad_()
    least = Confidence()(scores).numerator
    (grad,) = torch.autograd.grad(least, scores.confidence)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-14, rtol=0)
    for seed in range(3):
        other = some_scores()
        other.overlap, other.confidence = scores.overlap, some_scores(seed=seed).confidence
        assert Confidence()(other).numerator > least


def test_two_ranks_and_two_micro_batches_add_up():
    loss = CombinedLoss(extra={"confidence": WeightedTerm(Confidence(3.0), 2.0)})
    parts = [some_scores((5, 1), 1), some_scores((4, 4), 2)]
    whole = BlockScores(
        **{
            name: torch.cat([getattr(part, name).detach() for part in parts])
            for name in ("log_prob", "correct", "valid", "overlap", "confidence")
        }
    )
    counts = whole.counts_N
    term = sum(loss(part, 0.0, counts).contributions["confidence"] for part in parts)
    torch.testing.assert_close(term, 2 * twins.mean(twin(whole, 3.0)))


def test_a_silent_term_leaves_the_head_connected():
    """DDP waits for the gradient of every parameter."""
    silent = WeightedTerm(Confidence(), weight=0.0)
    scores = some_scores()
    plain = CombinedLoss()(twins.random_scores(LENGTHS, 5), 0.0).total
    total = CombinedLoss(extra={"confidence": silent})(scores, 0.0).total
    assert torch.equal(total, plain)
    (grad,) = torch.autograd.grad(total, scores.confidence)
    assert (grad == 0).all()


def test_a_detached_heads_term_alone_leaves_the_drafter_connected():
    """Its state and the overlap that it is held to pass no gradient on."""
    alone = {"alpha_cross_entropy": 0.0, "alpha_focal": 0.0, "alpha_chain": 0.0}
    loss = CombinedLoss(**alone, extra={"confidence": WeightedTerm(Confidence())})
    scores = some_scores()
    scores.outside = scores.valid & ~scores.correct
    scores.log_prob = torch.where(scores.outside, -math.inf, scores.log_prob)
    out = loss(scores, 0.0)
    assert torch.equal(out.total, out.contributions["confidence"])
    (grad,) = torch.autograd.grad(out.total, scores.log_prob)
    assert (grad == 0).all()


def test_calibration_is_the_mean_over_both_outcomes():
    scores = some_scores()
    brier, bias, slots = 0.0, 0.0, 0
    for m in range(len(scores.valid)):
        for k in twins.valid_positions(scores, m):
            c, a = scores.confidence[m, k - 1].sigmoid().item(), scores.overlap[m, k - 1].item()
            brier += a * (c - 1) ** 2 + (1 - a) * c**2
            bias += c - a
            slots += 1
    found = {name: float(ratio.value) for name, ratio in calibration(scores).items()}
    assert found == pytest.approx(
        {"confidence_brier": brier / slots, "confidence_bias": bias / slots}
    )
    scores.confidence = None
    assert calibration(scores) == {}


def test_what_is_missing_is_told():
    scores = some_scores()
    scores.confidence = None
    with pytest.raises(ValueError, match=r"model\.confidence_head"):
        Confidence()(scores)
    with pytest.raises(ValueError, match="temperature of a loss is 0"):
        Confidence(temperature=0.0)
    loss = CombinedLoss(extra={"confidence": WeightedTerm(Confidence())})
    assert (loss.reads, loss.reads_whole) == (("overlap",), ("overlap",))
    assert loss.reads_confidence
    assert not CombinedLoss(extra={"overlap": WeightedTerm(Overlap())}).reads_confidence


# ---------------------------------------------------------------------- in a run


def terms(**weight):
    named = {"overlap": "losses.Overlap", "confidence": "losses.Confidence"}
    return {
        name: {"term": {"class_path": named[name]}, "weight": value}
        for name, value in weight.items()
    }


def fit(folder, head, extra, **changes):
    changes |= {"trainer__max_epochs": 1, "trainer__limit_train_batches": 2}
    changes |= {"model__max_grad_norm": 0.0, "verification__every_n_epochs": 0}
    if head != "none":
        changes["model__confidence_head"] = head
    return cli(
        folder,
        model__loss={"extra": terms(**extra)},
        run_dir=str(folder / f"{head}-{len(list(folder.iterdir()))}"),
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    both = {"overlap": 1.0, "confidence": 1.0}
    return {
        "none": fit(folder, "none", {"overlap": 1.0}),
        "detached": fit(folder, "detached", both),
        "attached": fit(folder, "attached", both),
    }


def run_dir(run):
    return run.config.fit.run_dir


def split(run):
    """Returns the trained weights of the drafter proper, and of its head."""
    state = run.model.drafter.state_dict()
    head = {name: state.pop(name) for name in list(state) if name.startswith("confidence_head.")}
    return state, head


def test_a_detached_head_leaves_the_drafter_as_it_would_be_without(runs):
    plain, none = split(runs["none"])
    assert none == {}
    state, head = split(runs["detached"])
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert all(bool(tensor.any()) for tensor in head.values())  # they start at zero
    attached, _ = split(runs["attached"])
    assert not all(torch.equal(attached[name], plain[name]) for name in plain)


def test_gradients_reach_the_drafter_through_an_attached_state_only(runs):
    for kind, reaches in (("attached", True), ("detached", False)):
        module = runs[kind].model
        out = module.loss(module(batches(runs[kind], 1)[0]), 1.0)
        grads = torch.autograd.grad(
            out.contributions["confidence"], list(module.drafter.parameters()), allow_unused=True
        )
        named = dict(zip(dict(module.drafter.named_parameters()), grads, strict=True))
        assert named["confidence_head.weight"].any()
        assert (named["fc.weight"] is not None) is reaches


def test_a_drafter_without_a_head_is_saved_as_before(runs, tmp_path):
    none, attached = (
        torch.load(f"{run_dir(runs[kind])}/checkpoints/last.ckpt", weights_only=True)
        for kind in ("none", "attached")
    )
    assert "confidence_head" not in json.dumps(none["drafter_config"])
    assert sorted(none["hyper_parameters"]) == HYPER_PARAMETERS
    added = attached["state_dict"].keys() - none["state_dict"].keys()
    assert added == {"drafter.confidence_head.weight", "drafter.confidence_head.bias"}
    assert attached["hyper_parameters"]["confidence_head"] == "attached"
    assert attached["drafter_config"]["dflash_config"]["confidence_head"] is True
    # those that were saved between have one that says that it is off
    none["hyper_parameters"]["draft_vocab_size"] = None
    torch.save(none, tmp_path / "between.ckpt")
    for path in (tmp_path / "between.ckpt", f"{run_dir(runs['none'])}/checkpoints/last.ckpt"):
        module = DrafterModule.load_from_checkpoint(path, weights_only=True)
        assert same(module.state_dict(), none["state_dict"])
    reduced = DrafterModule(draft_vocab_size=20).hparams
    assert sorted(reduced) == sorted([*HYPER_PARAMETERS, "draft_vocab_size"])


def test_it_is_logged_with_its_calibration(runs):
    found = scalars(Path(run_dir(runs["attached"])))
    for stage in ("train", "val"):
        for name in ("confidence", "confidence_brier", "confidence_bias"):
            assert f"{stage}/{name}" in found
    assert not any("confidence" in name for name in scalars(Path(run_dir(runs["none"]))))


def test_it_is_saved_loaded_and_counted(runs, tmp_path):
    loaded = load_drafter(run_dir(runs["attached"])).drafter
    assert torch.equal(
        loaded.confidence_head.weight, split(runs["attached"])[1]["confidence_head.weight"]
    )
    loaded.save_pretrained(tmp_path / "folder")
    again = load_drafter(str(tmp_path / "folder")).drafter
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    counted = count_weights(loaded.config)
    for place, large in enumerate((True, False)):
        sizes = [p.numel() for p in loaded.parameters() if (p.ndim > 1) is large]
        assert counted[place] == sum(sizes)


@pytest.mark.parametrize("layout", ["zlab", "speculators"])
def test_an_export_says_that_it_leaves_the_head_out(runs, tmp_path, capsys, layout):
    words = [run_dir(runs["attached"]), "--output", str(tmp_path / "out"), "--format", layout]
    export_main(words)
    assert "its confidence head is left out" in capsys.readouterr().out
    exported = load_drafter(str(tmp_path / "out")).drafter
    assert exported.confidence_head is None
    assert exported.state_dict().keys() == split(runs["none"])[0].keys()
    check_main([str(tmp_path / "out")])
    assert "unknown" not in capsys.readouterr().out


def test_recorded_steps_equal_those_kernel_by_kernel(runs):
    run = runs["attached"]
    graphs = recorded(run.model)
    for batch in batches(run, 2):
        scores, expected = graphs(batch), run.model(batch)
        close([scores.confidence], [expected.confidence])
        close(gradients(run.model, scores), gradients(run.model, expected))
    assert len(graphs) > 0


def test_a_head_and_its_loss_come_together(runs):
    target, term = runs["none"].model.target, Confidence()
    trains, off = {"confidence": WeightedTerm(term)}, Schedule("warmup", final=0.0)
    later = {"confidence": WeightedTerm(term, schedule=Schedule("warmup", begin=0.5))}
    for head, extra, message in (
        ("none", trains, "the drafter has none"),
        ("attached", None, "No term of the loss trains"),
        ("attached", {"confidence": WeightedTerm(term, 0.0)}, "No term of the loss trains"),
        ("attached", {"confidence": WeightedTerm(term, 1.0, off)}, "No term of the loss trains"),
        ("attached", later, None),
    ):
        module = DrafterModule(CombinedLoss(extra=extra), block_size=4, confidence_head=head)
        module.attach(target)
        if message is None:
            module._check_confidence_head("fit")
        else:
            with pytest.raises(UserError, match=message):
                module._check_confidence_head("fit")
        module._check_confidence_head("predict")


def test_another_drafters_weights_start_with_or_without_a_head(runs):
    target = runs["none"].model.target
    for path, wanted in (("none", "detached"), ("attached", "none"), ("attached", "attached")):
        module = DrafterModule(init_from=run_dir(runs[path]), confidence_head=wanted, block_size=4)
        module.attach(target)
        given, _ = split(runs[path])
        state = module.drafter.state_dict()
        assert all(torch.equal(state[name], given[name]) for name in given)
        head = module.drafter.confidence_head
        assert (head is None) is (wanted == "none")
        if head is not None:
            assert bool(head.weight.any()) is (path == "attached")


def test_muon_steps_it_as_a_vector(runs):
    drafter = Drafter(runs["attached"].model.drafter.config)
    head = set(map(id, drafter.confidence_head.parameters()))
    module = DrafterModule(optimizer="muon", total_steps=2, confidence_head="attached")
    module.drafter = drafter
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, Muon)
    assert head <= set(map(id, optimizer.param_groups[1]["params"]))


# ---------------------------------------------------------------------- draft lengths


class HeadDrafter(TableDrafter):
    """Cuts by a head that knows the context, and no token that will be drawn."""

    def draft(self, anchor_id):
        sure = torch.tensor([0.9, 0.3, 0.8]).roll(anchor_id + len(self.target.committed))
        return HALF.cut(super().draft(anchor_id), sure)


@pytest.mark.parametrize("rule", ["rejection", "sample-and-match"])
def test_drafts_that_a_head_cuts_write_the_targets_law(rule):
    runs = enumerate_loop(4, 4, rule, WARPS[0], HeadDrafter)
    assert_same_law(text_law(runs), exact_texts(4, WARPS[0]))
    assert len({len(draft) for _, decoded in runs for draft in decoded.drafts}) > 1


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    target = tiny_target(folder, "llama")
    prompts = [EvalPrompt("s", i, ids) for i, ids in enumerate(PROMPTS)]
    drafter = overfitted_drafter(target, prompts, block_size=6, new_tokens=NEW, steps=25)
    with_head = copy.deepcopy(drafter)
    with_head.set_confidence_head(True)
    with_head.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(drafter.config.hidden_size, generator=generator)
    with_head.confidence_head.weight.copy_(drawn)
    with_head.confidence_head.bias.fill_(1.0)
    return folder, target, drafter, with_head


def test_the_text_stays_the_targets_and_replay_counts_the_same_rounds(setup):
    _, target, drafter, with_head = setup
    texts = [response.ids for response in target.generate(PROMPTS, NEW)]
    lengths = {}
    for name, one in (("probability", drafter), ("head", with_head)):
        lengths[name] = []
        for place, text in enumerate(texts):
            found, counts = rounds_of((target, one), DraftLength(0.4), place)
            assert found.ids == text
            assert list(counts.round_lengths) == found.round_lengths
            lengths[name] += [len(draft) for draft in found.drafts]
    assert len(set(lengths["head"])) > 2
    assert lengths["head"] != lengths["probability"]


def test_confidence_is_what_the_head_says_and_else_the_largest_probability(setup):
    _, target, drafter, with_head = setup
    states = torch.randn(4, drafter.config.hidden_size)
    logits = target.head.logits(states)
    head = with_head.confidence_head
    said = confidence_of(with_head, states, logits)
    torch.testing.assert_close(said, (states @ head.weight + head.bias).sigmoid())
    torch.testing.assert_close(confidence_of(drafter, states, logits), logits.softmax(-1).amax(-1))


def test_calibrate_goes_by_the_head(setup, tmp_path, capsys):
    folder, _, _, with_head = setup
    with_head.save_pretrained(tmp_path / "drafter")
    rows = [{"prompt_ids": ids} for ids in PROMPTS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--ckpt", str(tmp_path / "drafter"), "--target", str(find_target(folder))]
    common += ["--device", "cpu", "--prompts", str(tmp_path / "p.jsonl"), "--no-progress"]
    common += ["--max-new-tokens", "12", "--cache-dir", str(tmp_path / "cache")]
    rule = tmp_path / "rule.json"
    evaluate.main(["calibrate", *common, "--output", str(rule)])
    assert "confidence (by its head) is off by" in capsys.readouterr().out
    content = json.loads(rule.read_text())
    assert content["confidence"] == "by its head"
    assert content["bounds"] != [1.0]
