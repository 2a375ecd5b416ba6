"""The emulation of fp8 products: rounding, scales, and that it changes what it should."""

from __future__ import annotations

import pytest
import torch

from doublehead.config import HeadConfig
from doublehead.models import conv_tower
from doublehead.models.conv_tower import ConvTower
from tests.support.paths import ROOT


@pytest.fixture
def fp8(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fp8_accuracy

    return fp8_accuracy


def test_rounding_to_fp8(fp8):
    x = torch.tensor([[448.0, 17.0, -0.9, 0.0], [4.48, 0.17, 0.009, 0.0], [0.0, 0.0, 0.0, 0.0]])
    by_row = fp8.rounded(x, (1,))
    assert by_row[0].tolist() == [448, 16, -0.875, 0]  # three bits after the first; halfway to even
    torch.testing.assert_close(by_row[1], torch.tensor([4.48, 0.16, 0.00875, 0]))  # the row's own scale
    assert by_row[2].eq(0).all()
    assert ((by_row - x).abs() <= x.abs() / 16 + 1e-3).all()


def test_which_products_are_in_fp8(fp8, monkeypatch):
    torch.manual_seed(0)
    tower = ConvTower(16, HeadConfig(conv_dim=32, conv_blocks=3)).eval()
    torch.nn.init.normal_(tower[1].out.weight, std=0.2)
    x = torch.randn(5, 16, 7, 7)
    with torch.no_grad():
        exact = tower(x)
        off = []
        for products in ("none", "qkv", "all"):
            monkeypatch.setattr(conv_tower, "conv_head", fp8.conv_head_in(products, "row"))
            off.append(((tower(x) - exact).norm() / exact.norm()).item())
            assert tower(x, torch.tensor(2))[2:].eq(0).all()
    assert 0 < off[0] < off[1] < off[2] < 0.1, off
