"""The shipped loss overlays: each parses and sets what its name says; --help knows every field."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import itertools
import math
import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import losses
from drafter.module import DrafterModule
from losses import CombinedLoss, Schedule, WeightedTerm

FOLDER = Path(__file__).parents[1] / "configs" / "losses"
INTENDED = {
    "uniform": (math.inf, 0.0, 0.0),
    "decay": (10.0, 0.0, 0.0),
    "focal": (math.inf, 0.3, 0.0),
    "chain": (math.inf, 0.0, 40.0),
    "decay-focal": (10.0, 0.3, 0.0),
    "full": (10.0, 0.3, 40.0),
}
NAMES = pytest.mark.parametrize("name", INTENDED)


def settings(loss):
    return loss.gamma, loss.alpha_focal, loss.alpha_chain


def parse(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Owner, "model")
    return parser.instantiate_classes(parser.parse_args(list(arguments))).model.loss


class Owner:
    """Holds a loss as the LightningModule does.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: CombinedLoss | None = None) -> None:
        self.loss = loss


def test_the_shipped_overlays_are_the_promised_ones():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == INTENDED.keys()


@NAMES
def test_an_overlay_sets_the_intended_values_and_nothing_else(name):
    overlay = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert overlay.keys() == {"model"}
    assert overlay["model"].keys() == {"loss"}
    assert overlay["model"]["loss"].keys() == {"gamma", "alpha_focal", "alpha_chain", "alpha_kl"}
    assert overlay["model"]["loss"]["alpha_kl"] == 0.0
    assert settings(CombinedLoss(**overlay["model"]["loss"])) == INTENDED[name]


RIVALS = {
    "dpace": losses.DPace(),
    "dpace-prefix": losses.DPace(part="prefix"),
    "dpace-continuation": losses.DPace(part="continuation"),
    "accept-until-fail": losses.AcceptUntilFail(),
    "streak": losses.Chain("none"),
    "overlap": losses.Overlap(math.inf),
    "overlap-log": losses.Overlap(math.inf, "log"),
    "overlap-blend": losses.Overlap(math.inf, "blend"),
    "reverse-kl": losses.ReverseKL(math.inf),
}


def test_every_rival_has_an_overlay():
    folder = FOLDER.parent / "rivals"
    others = {"dspark", "forward-kl", "visible-prefix"}
    assert {path.stem for path in folder.glob("*.yaml")} == RIVALS.keys() | others


@pytest.mark.parametrize("name", RIVALS)
def test_a_module_saves_and_loads_a_rivals_settings(name):
    """A rival alone has no named weight; its extra term is an object, which no checkpoint keeps."""
    loss = parse(f"--config={FOLDER.parent / 'rivals' / name}.yaml")
    saved = DrafterModule(loss=loss).hparams["loss"]
    assert saved["extra"] is None
    again = DrafterModule(loss=saved).loss
    assert (again.alpha_cross_entropy, *settings(again)) == (1.0, math.inf, 0.0, 0.0)


def test_distillation_is_alone():
    loss = parse(
        f"--config={FOLDER / 'full'}.yaml", f"--config={FOLDER.parent / 'rivals/forward-kl.yaml'}"
    )
    assert (loss.alpha_cross_entropy, *settings(loss)) == (0.0, math.inf, 0.0, 0.0)
    assert loss.alpha_kl == 1.0
    assert loss.terms["forward_kl"] == losses.ForwardKL(math.inf)
    assert loss.needs_target
    over = parse("--model.loss.alpha_kl=1", f"--config={FOLDER / 'full'}.yaml")
    assert over == parse(f"--config={FOLDER / 'full'}.yaml")  # an overlay leaves no KL behind


def test_dspark_is_its_published_weights():
    overlay = yaml.safe_load((FOLDER.parent / "rivals" / "dspark.yaml").read_text())["model"]
    assert overlay.pop("confidence_head") == "attached"
    loss = parse(f"--model={overlay}", "--model.loss.focal_modulation=0")
    assert (loss.alpha_cross_entropy, *settings(loss)) == (0.1, 7.0, 0.0, 0.0)
    assert loss.extra == {
        # 0.9 times the L1 distance of the distributions, 2 (1 - a)
        "overlap": WeightedTerm(losses.Overlap(7.0), 2 * 0.9),
        "confidence": WeightedTerm(losses.Confidence(7.0), 1.0),
    }
    assert loss.reads_confidence


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_is_alone_or_on_top_of_the_papers_stack(name):
    rival = f"--config={FOLDER.parent / 'rivals' / name}.yaml"
    alone = parse(f"--config={FOLDER / 'full'}.yaml", rival)
    assert (alone.alpha_cross_entropy, *settings(alone)) == (0.0, math.inf, 0.0, 0.0)
    term = WeightedTerm(RIVALS[name], weight=-1.0 if name == "streak" else 1.0)
    assert alone.extra == {name.replace("-", "_"): term}
    added = parse(rival, f"--config={FOLDER / 'full'}.yaml", "--model.loss.alpha_cross_entropy=1")
    assert (added.alpha_cross_entropy, *settings(added)) == (1.0, *INTENDED["full"])
    assert added.extra == alone.extra


def test_the_defaults_are_the_papers():
    assert settings(CombinedLoss()) == INTENDED["full"]


@pytest.mark.parametrize(("first", "second"), itertools.permutations(INTENDED, 2))
def test_a_later_overlay_fully_overrides_an_earlier_one(first, second):
    files = [f"--config={FOLDER / name}.yaml" for name in (first, second)]
    assert settings(parse(*files)) == INTENDED[second]


def test_any_field_is_a_flag():
    loss = parse(
        "--model.loss.gamma=.inf",
        "--model.loss.chain_schedule.kind=warmup",
        "--model.loss.chain_schedule.end=0.2",
        '--model.loss.extra={"by_valid": {"term": {"class_path": "losses.Chain", '
        '"init_args": {"normalize": "valid"}}, "weight": -3}}',
    )
    assert loss.gamma == math.inf
    assert loss.chain_schedule == Schedule("warmup", end=0.2)
    assert loss.extra == {"by_valid": WeightedTerm(losses.Chain("valid"), weight=-3.0)}


@pytest.mark.parametrize("cls", [CombinedLoss, Schedule, WeightedTerm])
def test_every_setting_has_a_line_of_help(cls):
    documented = re.findall(r"^ {8}(\w+): ", cls.__doc__, flags=re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(cls)]
    assert documented[: len(fields)] == fields


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(losses.__path__)])
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(importlib.import_module(f"losses.{module}")).failed == 0
