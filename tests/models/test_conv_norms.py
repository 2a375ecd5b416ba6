"""What `evidence/conv_norms.py` measures: statistics at rest, the starting scales, the IoU of regressed boxes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from doublehead.config import HeadConfig, LossConfig, ModelConfig
from doublehead.models.heads import HeadOutput
from doublehead.models.structures import RoISamples
from doublehead.ops.boxes import encode_boxes
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "evidence"))

import conv_norms  # noqa: E402

CONFIG = ModelConfig(head=HeadConfig("conv", conv_dim=16, conv_blocks=3), loss=LossConfig(w_fc=1.0, w_conv=1.0))


def batch(seed: int) -> conv_norms.Batch:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(1, 6, 4, generator=generator) * 20
    boxes[..., 2:] += boxes[..., :2] + 10
    rois = RoISamples(boxes, torch.tensor([[True] * 5 + [False]]), torch.tensor([[0, 1, 2, 1, 2, 2]]), boxes + 2)
    return conv_norms.Batch({1.3: torch.randn(6, 8, 7, 7, generator=generator)}, rois)


def test_statistics_at_rest_are_those_of_all_batches():
    heads, batches = conv_norms.fresh(CONFIG, "ones", 8, 3, seed=0), [batch(0), batch(1)]
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    again = conv_norms.with_statistics_at_rest(heads, batches)
    conv = again["conv"].tower[0].residual[0]
    maps = [conv(one.pooled[1.3]) for one in batches]
    expected = torch.stack([values.var((0, 2, 3)) for values in maps]).mean(0)
    torch.testing.assert_close(again["conv"].tower[0].residual[1].running_var, expected.detach())
    assert not again.training and all(tensor.equal(before[name]) for name, tensor in heads.state_dict().items())


@pytest.mark.parametrize("scales", ["ones", "uniform"])
def test_starting_scales(scales):
    heads = conv_norms.fresh(CONFIG, scales, 8, 3, seed=0)
    weights = torch.cat([layer.weight for layer in heads.modules() if isinstance(layer, nn.BatchNorm2d)])
    if scales == "ones":
        assert (weights == 1).all()
    else:
        assert 0 <= weights.min() < 0.1 and 0.9 < weights.max() < 1


class Perfect(nn.Module):
    """Says where each RoI's object is."""

    def __init__(self, batches: list[conv_norms.Batch]) -> None:
        super().__init__()
        self.deltas = {
            id(one.pooled): encode_boxes(one.rois.matched_boxes, one.rois.boxes, CONFIG.roi.box_weights)[0]
            for one in batches
        }

    def forward(self, pooled: dict[float, torch.Tensor]) -> dict[str, HeadOutput]:
        deltas = self.deltas[id(pooled)]
        return {"conv": HeadOutput(torch.zeros(6, 3), deltas[:, None].expand(-1, 3, 4))}


def test_reading_of_perfect_heads():
    batches = [batch(0), batch(1)]
    found = conv_norms.read(Perfect(batches), batches, replace(CONFIG))
    assert found == pytest.approx({"iou": 1.0, "loss_cls": 1.0986123, "loss_reg": 0.0}, abs=1e-5)


def test_the_record_has_every_head_and_seed():
    record = json.loads((ROOT / "evidence" / "records" / "conv_norms.json").read_text())
    found = {(row["head"], row["seed"]) for row in record["results"]}
    assert found == {(head, seed) for head in conv_norms.HEADS for seed in record["seeds"]} and record["commit"]
