"""Read-outs, and the way from head outputs to detections."""

import dataclasses

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

from doublehead.config import DetectionConfig, LossConfig
from doublehead.models.detections import detect
from doublehead.models.heads import HeadOutput
from doublehead.models.readout import BRANCHES, ReadOut, resolve_sources
from doublehead.models.structures import Proposals
from doublehead.ops import fuse_scores

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def test_sources_of_every_kind():
    found = {kind: resolve_sources(kind, "fused", "complementary", LossConfig()) for kind in BRANCHES}
    assert {kind: (s.classes, s.boxes) for kind, s in found.items()} == {
        "fc": (("fc",), "fc"),
        "conv": (("conv",), "conv"),
        "double_fc": (("fc_1",), "fc_2"),
        "double_conv": (("conv_1",), "conv_2"),
        "double_head": (("fc",), "conv"),
        "double_head_reverse": (("conv",), "fc"),
        "double_head_ext": (("fc", "conv"), "conv"),
        "conv5": (("conv5",), "conv5"),
    }


@pytest.mark.parametrize(
    ("readout", "fusion", "classes", "boxes"),
    [
        ("fused", "max", ("fc", "conv"), "conv"),
        ("fused", "none", ("fc",), "conv"),
        ("split", "complementary", ("fc",), "conv"),
        ("fc", "complementary", ("fc",), "fc"),
        ("conv", "complementary", ("conv",), "conv"),
    ],
)
def test_ext_read_outs(readout, fusion, classes, boxes):
    assert resolve_sources("double_head_ext", readout, fusion, LossConfig()) == (classes, boxes)


@pytest.mark.parametrize(
    ("loss", "readout", "fusion", "message"),
    [
        (LossConfig(l_fc=0.0), "fused", "complementary", "fc-head's classifier"),
        (LossConfig(l_conv=1.0), "fused", "max", "conv-head's classifier"),
        (LossConfig(l_conv=1.0), "conv", "complementary", "conv-head's classifier"),
        (LossConfig(l_fc=1.0), "fc", "complementary", "fc-head's box regressor"),
        (LossConfig(l_conv=0.0), "split", "complementary", "conv-head's box regressor"),
        (LossConfig(w_conv=0.0), "fused", "complementary", "conv-head's classifier and the conv-head's box"),
    ],
)
def test_untrained_read_outs_are_refused(loss, readout, fusion, message):
    with pytest.raises(ValueError, match=message):
        resolve_sources("double_head_ext", readout, fusion, loss)


def test_unknown_read_outs_are_refused():
    with pytest.raises(ValueError, match="needs head.kind 'double_head_ext', got 'double_head'"):
        resolve_sources("double_head", "conv", "complementary", LossConfig())
    with pytest.raises(ValueError, match="detection.readout"):
        resolve_sources("double_head_ext", "both", "complementary", LossConfig())
    with pytest.raises(ValueError, match="detection.fusion"):
        resolve_sources("double_head_ext", "fused", "sum", LossConfig())


def naive_detections(scores, deltas, boxes, size, config):
    """One image, one class at a time, with torchvision's operators."""
    decoded = BoxCoder(WEIGHTS).decode(deltas.flatten(1), [boxes])
    decoded = clip_boxes_to_image(decoded.reshape(-1, scores.shape[1], 4), size)
    found = []
    for label in range(1, scores.shape[1]):
        class_boxes, class_scores_ = decoded[:, label], scores[:, label]
        sides = class_boxes[:, 2:] - class_boxes[:, :2]
        keep = (class_scores_ > config.score_threshold) & (sides >= config.min_size).all(1)
        class_boxes, class_scores_ = class_boxes[keep], class_scores_[keep]
        for row in nms(class_boxes, class_scores_, config.nms_iou).tolist():
            found.append((class_scores_[row].item(), label, class_boxes[row].tolist()))
    return sorted(found, key=lambda item: -item[0])[: config.max_detections]


def test_detect_equals_the_loop_over_classes():
    torch.manual_seed(0)
    batch, slots, classes = 3, 40, 6
    corner = torch.rand(batch, slots, 2) * 60
    proposals = Proposals(
        torch.cat([corner, corner + 5 + torch.rand(batch, slots, 2) * 30], -1),
        torch.arange(slots).expand(batch, slots) < torch.tensor([[slots], [11], [0]]),
    )
    outputs = {
        name: HeadOutput(torch.randn(batch * slots, classes) * 2, torch.randn(batch * slots, classes, 4))
        for name in ("fc", "conv")
    }
    sizes = torch.tensor([[80.0, 90.0], [64.0, 50.0], [30.0, 30.0]])
    config = DetectionConfig(max_detections=25)
    for fusion in ("complementary", "max", "average"):
        sources = resolve_sources("double_head_ext", "fused", fusion, LossConfig())
        readout = ReadOut(sources, dataclasses.replace(config, fusion=fusion))
        result = detect(outputs, readout, proposals, sizes, WEIGHTS)
        scores = fuse_scores(outputs["fc"].logits, outputs["conv"].logits, fusion).unflatten(0, (batch, slots))
        deltas = outputs["conv"].deltas.unflatten(0, (batch, slots))
        for row in range(batch):
            valid = proposals.valid[row]
            expected = naive_detections(
                scores[row][valid], deltas[row][valid], proposals.boxes[row][valid], sizes[row].tolist(), config
            )
            count = int(result.count[row])
            assert count == len(expected)
            assert result.labels[row, :count].tolist() == [label for _, label, _ in expected]
            assert result.scores[row, :count].tolist() == pytest.approx([score for score, _, _ in expected])
            expected_boxes = torch.tensor([box for _, _, box in expected]).reshape(-1, 4)
            torch.testing.assert_close(result.boxes[row, :count], expected_boxes)
            assert not result.boxes[row, count:].any() and not result.labels[row, count:].any()
            assert not result.scores[row, count:].any()
