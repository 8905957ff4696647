"""Guards model.cuda_graphs: a recorded step gives what the same step gives kernel by kernel.

On a CPU a tape stands in for CUDA graphs: it repeats every operation on the tensors that it had
when it was recorded, and runs no Python of ours again.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drafter.graphs as graphs_module
from drafter.graphs import StepGraphs, trained_scores
from drafter.module import DrafterModule
from losses import CombinedLoss, ForwardKL, Overlap, WeightedTerm
from tests.runs import cli, weights


def storages(tree):
    return {t.untyped_storage()._cdata for t in tree_leaves(tree) if torch.is_tensor(t)}


class Tape(TorchDispatchMode):
    """A `Recorder`: what it returns repeats the operations of `work`, each into its own result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def rehearse(self, work):
        work()

    def __call__(self, work):
        tape = Tape()
        with tape:
            work()
        return tape.repeat

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        made = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        # views and results of in-place operations lie where their input lies
        fresh = [t.untyped_storage()._cdata not in given for t in made]
        self.calls.append((function, args, kwargs or {}, made, fresh))
        return out

    @torch.no_grad()
    def repeat(self):
        for function, args, kwargs, made, fresh in self.calls:
            again = [t for t in tree_leaves(function(*args, **kwargs)) if torch.is_tensor(t)]
            for old, new, own in zip(made, again, fresh, strict=True):
                if own:
                    old.copy_(new)


def recorded(module, recorder=None):
    trained = [p for p in module.parameters() if p.requires_grad]
    return StepGraphs(lambda batch: module(batch, fixed_shape=True), trained, recorder or Tape())


@pytest.fixture
def run(tmp_path):
    return cli(tmp_path, trainer__max_steps=1, data__num_anchors=3, model__block_size=4)


def batches(run, of=3):
    """Returns batches of two shapes, with and without invalid blocks, and slots."""
    run.trainer.state.fn = "fit"
    loader, made = run.datamodule.train_dataloader(), []
    for epoch in range(of):
        loader.batches.set_epoch(epoch)
        made += [run.datamodule.add_features(b, *run.model.feature_request()) for b in loader]
    return made


def packed_batches(run):
    """Returns batches of one length whose positions, and numbers of blocks, differ."""
    made = []
    for epoch, packed in ((0, 128), (1, 128), (2, 0), (3, 0)):
        run.datamodule.pack_length, run.datamodule.pad_multiple = packed, 64
        loader = run.datamodule.train_dataloader()
        loader.batches.set_epoch(epoch)
        made += [run.datamodule.add_features(b, *run.model.feature_request()) for b in loader]
    return made


def test_packed_rows_keep_their_positions_and_blocks(run):
    run.trainer.state.fn = "fit"
    module, made = run.model, packed_batches(run)
    assert len({batch.anchors.shape for batch in made}) > 1
    assert any((batch.positions[0].diff() < 0).any() for batch in made)
    graphs = recorded(module)
    for batch in made * 2:
        close([graphs(batch).log_prob], [module(batch).log_prob])
    assert len(graphs) > 1


def gradients(module, scores):
    out = module.loss(scores, 0.5)
    return torch.autograd.grad(out.total, [p for p in module.parameters() if p.requires_grad])


def close(a, b):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


KL = {"kl": WeightedTerm(ForwardKL(), 100.0)}
BLEND = {"blend": WeightedTerm(Overlap(form="blend"), 100.0)}


@pytest.mark.parametrize(("extra", "read"), [(None, ()), (KL, ("kl",)), (BLEND, ("kl", "overlap"))])
def test_replays_equal_steps_kernel_by_kernel(run, extra, read):
    module = run.model
    module.loss = CombinedLoss(extra=extra)
    graphs = recorded(module)
    shapes, replayed = set(), 0
    for batch in batches(run):
        shapes.add((batch.hidden_states.shape, batch.anchors.shape))
        before = len(graphs)
        scores, expected = graphs(batch), module(batch)
        replayed += len(graphs) == before and before > 0
        assert torch.equal(scores.valid, expected.valid)
        assert torch.equal(scores.correct & scores.valid, expected.correct & expected.valid)
        close([scores.log_prob], [expected.log_prob])
        assert trained_scores(scores).keys() == {"log_prob", *read}
        close(trained_scores(scores).values(), trained_scores(expected).values())
        close(gradients(module, scores), gradients(module, expected))
        with torch.no_grad():  # the optimizer writes where the recorded kernels read
            for parameter in module.parameters():
                parameter.mul_(1.01)
    assert len(shapes) > 1
    assert replayed > 3


def test_a_gradient_outlives_the_next_replay(run):
    """Accumulation adds a second micro-batch to the gradient of the first."""
    module = run.model
    graphs = recorded(module)
    first = batches(run, 1)[0]
    second = first._map(torch.clone)
    second.hidden_states = second.hidden_states.flip(-1)
    graphs(first)
    for parameter in module.parameters():
        parameter.grad = None
    for batch in (first, second):
        module.loss(graphs(batch), 0.5).total.backward()
    found = [p.grad for p in module.parameters() if p.requires_grad]
    ones, others = (gradients(module, module(batch)) for batch in (first, second))
    close(found, [a + b for a, b in zip(ones, others, strict=True)])


def test_shapes_are_recorded_at_second_sight_and_not_without_end(run, monkeypatch):
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 1)
    graphs = recorded(run.model)
    all_batches = batches(run)
    recorded_after = []
    for batch in all_batches[:1] * 3:
        graphs(batch)
        recorded_after.append(len(graphs))
    assert recorded_after == [0, 1, 1]
    for batch in all_batches * 2:
        close([graphs(batch).log_prob], [run.model(batch).log_prob])
    assert len(graphs) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_ends_with_the_same_weights(tmp_path, monkeypatch, accumulate):
    settings = {"trainer__accumulate_grad_batches": accumulate, "trainer__max_epochs": 3}
    settings |= {"model__log_gradient_norms_every": 4, "trainer__log_every_n_steps": 2}
    for name in ("plain", "recorded"):
        (tmp_path / name).mkdir()
    plain = cli(tmp_path / "plain", **settings)
    made = []

    def make(self):
        made.append(recorded(self))
        return made[-1]

    monkeypatch.setattr(DrafterModule, "_make_graphs", make)
    ours = cli(tmp_path / "recorded", **settings)
    assert len(made[0]) > 0
    assert ours.trainer.global_step == plain.trainer.global_step
    found, expected = weights(ours), weights(plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_without_a_gpu_nothing_is_recorded(tmp_path):
    run = cli(tmp_path, trainer__max_steps=2, model__cuda_graphs=True)
    assert run.model._make_graphs() is None


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("packed batches", {"data__pack_length": 128, "data__pad_multiple": 8}),
        ("batches seldom", {}),
        (None, {"data__pad_multiple": 8}),
    ],
)
def test_where_shapes_seldom_repeat_a_run_says_that_it_records_none(
    tmp_path, monkeypatch, caplog, reason, change
):
    run = cli(tmp_path, trainer__max_steps=2, model__cuda_graphs=True, **change)
    monkeypatch.setattr(DrafterModule, "device", torch.device("cuda"))
    with caplog.at_level("INFO"):
        graphs = run.model._make_graphs()
    assert (graphs is None) == (reason is not None)
    assert reason is None or f"[cuda_graphs] not used: {reason}" in caplog.text
