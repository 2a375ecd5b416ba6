"""Training the heads comes to what its formulas say, and they start as the release's: `evidence/implementation.py`."""

from __future__ import annotations

import json
import sys

import pytest
from torch import nn

from doublehead.config import NonLocalConfig
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "evidence"))

import gradient_flow  # noqa: E402
import implementation  # noqa: E402
import norms_and_rates  # noqa: E402
import starting_values  # noqa: E402
from gradient_flow import Case  # noqa: E402

SMALL = implementation.WIDTHS[1]
PLAIN = NonLocalConfig(enabled=False)


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        (Case("fc"), 50),
        (Case("double_fc"), 50),
        (Case("conv", 1), 50),
        (Case("double_head_ext", 3), 25),
        (Case("double_conv", 3, PLAIN), 10),
        (Case("double_conv", 5), 10),
    ],
    ids=str,
)
def test_training_is_its_formulas(case, steps):
    assert max(gradient_flow.train_both(case, steps)) < implementation.FLOAT64


def test_gradients_in_float32_are_as_exact_as_the_formulas():
    found = gradient_flow.gradients_in_float32(Case("double_head_ext", 3), steps=11, every=2)
    assert 1e-8 < found.plain and found.library < implementation.TWICE * found.plain


def test_starting_values():
    for check in implementation.of_start(SMALL):
        assert check.passed, check


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv.tower.0.residual.0.weight", lambda tensor: nn.init.kaiming_uniform_(tensor, a=1)),
        ("conv.tower.0.residual.0.weight", lambda tensor: nn.init.normal_(tensor, std=tensor.std().item())),
        ("conv.tower.1.phi.bias", nn.init.zeros_),
        ("conv.tower.1.out.weight", lambda tensor: nn.init.normal_(tensor, std=1e-3)),
        ("conv.tower.2.residual.7.weight", nn.init.zeros_),
        ("fc.tower.1.weight", lambda tensor: nn.init.kaiming_uniform_(tensor, a=5**0.5)),
        ("conv.regressor.weight", lambda tensor: nn.init.normal_(tensor, std=0.01)),
        ("fc.classifier.weight", lambda tensor: nn.init.uniform_(tensor, -0.01 * 3**0.5, 0.01 * 3**0.5)),
    ],
)
def test_another_start_is_found(name, change):
    """The check of the starting values can fail: for a size, a form, and a constant."""
    heads = implementation.fresh(SMALL, 0)
    change(dict(heads.named_parameters())[name].detach())
    assert {name for name, misfit in starting_values.misfits(heads.state_dict()) if misfit > 5} == {name}


def test_the_rules_of_norms_and_rates():
    for check in implementation.of_rules():
        assert check.passed, check


def test_other_norms_are_found():
    heads = implementation.fresh(SMALL, 0)
    assert norms_and_rates.norm_settings(heads) == 0
    heads["conv"].tower[0].residual[1].momentum = 0.01
    assert norms_and_rates.norm_settings(heads) == pytest.approx(0.09)
    assert norms_and_rates.norm_settings(nn.SyncBatchNorm(4)) == float("inf")


def test_the_record_holds_every_check():
    record = json.loads(implementation.RECORD.read_text())
    assert all(check["passed"] == (check["largest_difference"] <= check["bound"]) for check in record["checks"])
    assert all(check["passed"] for check in record["checks"])
    names = [check["name"] for check in record["checks"]]
    assert names[: len(gradient_flow.CASES)] == [f"training, {case}" for case in gradient_flow.CASES]
    assert len(names) == len(set(names)) and record["commit"] and record["differences"] == implementation.DIFFERENCES
