"""FSDP2 on two gloo processes: trains, verifies and resumes as DDP and as one process do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from drafter.errors import UserError
from drafter.module import DrafterModule
from tests.faults import kill_at
from tests.runs import OVERLAYS, cli, cli_fork, same, scalars, weights

SAVED = "run/checkpoints/last.ckpt"


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def fit(folder, overlay="fsdp2", extra=(), check=0, **changes):
    folder.mkdir(exist_ok=True)
    changes = {"data__batch_size": 2, "preemption__check_every_n_steps": 1, **changes}
    done = cli_fork(folder, extra=(*OVERLAYS[overlay], *extra), ranks=2, **changes)
    assert done.returncode == check, done.stdout[-3000:]
    return folder / SAVED


def test_trains_verifies_and_resumes(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    single = cli(one, data__batch_size=4)
    straight = fit(tmp_path / "straight")
    close(weights(straight), weights(single))
    ours, alone = scalars(tmp_path / "straight" / "run"), scalars(one / "run")
    for tag in ("train/cross_entropy", "train/grad_norm", "val/cross_entropy"):
        assert [v for _, v in ours[tag]] == pytest.approx([v for _, v in alone[tag]], abs=1e-4)
    lengths = [[v for _, v in log["val/accepted_length"]] for log in (ours, alone)]
    assert lengths[0] == pytest.approx(lengths[1], abs=1e-5)

    stopped = fit(tmp_path / "stopped", extra=kill_at(1, rank=1), check=143)
    state = torch.load(stopped, weights_only=True)
    assert state["global_step"] == 2
    shapes = {name: tensor.shape for name, tensor in state["state_dict"].items()}
    assert shapes == {name: tensor.shape for name, tensor in weights(single).items()}
    fit(tmp_path / "stopped", extra=("--ckpt_path", "last"))
    assert same(weights(stopped), weights(straight))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [3, 1])
def test_predicts_whatever_each_rank_has_to_do(tmp_path, prompts):
    fit(tmp_path, trainer__max_epochs=1)
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "Count them."}\n' * prompts)
    words = ("--ckpt_path", "last", f"--predictions.output={output}")
    done = cli_fork(
        tmp_path,
        "predict",
        (*OVERLAYS["fsdp2"], *words),
        ranks=2,
        data__predict_prompts=str(path),
        model__decoding__max_new_tokens=4,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = [p for p in tmp_path.glob("out*") if p.read_text()]
    assert sum(len(p.read_text().splitlines()) for p in found) == prompts


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "fsdp2"])
def test_the_other_strategy_goes_on_with_a_checkpoint(tmp_path, first):
    second = {"ddp": "fsdp2", "fsdp2": "ddp"}[first]
    straight = fit(tmp_path / "straight", second)
    mixed = fit(tmp_path / "mixed", first, kill_at(1), check=143)
    fit(tmp_path / "mixed", second, ("--ckpt_path", "last"))
    close(weights(mixed), weights(straight))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"log_gradient_norms_every": 1}, "needs whole gradients"),
        ({"optimizer": "muon"}, "needs whole matrices"),
    ],
)
def test_what_fsdp2_can_not_do_is_one_sentence(settings, told):
    module = DrafterModule(**settings)
    module.drafter = torch.nn.Linear(1, 1)
    module._device_mesh = "two ranks"  # what ModelParallelStrategy sets before it asks
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    with pytest.raises(UserError, match=told):
        module.configure_model()
