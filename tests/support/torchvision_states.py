"""Weights of torchvision's Faster R-CNN, and files of them."""

from __future__ import annotations

from collections import OrderedDict

import torch

from doublehead.interop.torchvision import faster_rcnn_config
from doublehead.models import build_detector


def torchvision_state(classes):
    """This library's model under torchvision's names; that these are right, test_convert_parity shows."""
    torch.manual_seed(0)
    model = build_detector(faster_rcnn_config("frozen_batch_norm", 0.0, "resnet18", 16, 8, 7), classes + 1)
    theirs = {"detector.rpn.conv": "rpn.head.conv.0.0", "detector.rpn.objectness": "rpn.head.cls_logits",
              "detector.rpn.deltas": "rpn.head.bbox_pred", "detector.heads.fc.tower.1": "roi_heads.box_head.fc6",
              "detector.heads.fc.tower.3": "roi_heads.box_head.fc7",
              "detector.heads.fc.classifier": "roi_heads.box_predictor.cls_score",
              "detector.heads.fc.regressor": "roi_heads.box_predictor.bbox_pred"}  # fmt: skip
    state = OrderedDict()
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        state[f"{theirs.get(layer, layer.removeprefix('detector.'))}.{part}"] = tensor
    return state


def write(tmp_path, content, name="model.pth", **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name
