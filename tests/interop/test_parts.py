"""What converting is made of: rules for names, settings, what a checkpoint tells of its conventions."""

import dataclasses
from pathlib import Path

import pytest
import torch

from doublehead.config import BackboneConfig, Recipe, RPNConfig
from doublehead.interop.formats import PROJECTS, convert
from doublehead.interop.loading import Checkpoint
from doublehead.interop.mapping import ConversionError, Rule, Unneeded, check_cells, map_tensors
from doublehead.interop.mmdet.configuration import read_configuration
from doublehead.interop.settings import with_settings
from doublehead.interop.torchvision import faster_rcnn_config


def test_rules():
    rules = [Rule("a.*.b.**", "x.*.y.**"), Rule("c.*", "d.*", lambda tensor: -tensor)]
    mapped = map_tensors({"a.1.b.w": torch.ones(1), "c.w": torch.ones(1), "old.c.x": torch.ones(1)}, rules,
                         [Unneeded("old.**", "old")])  # fmt: skip
    assert set(mapped.tensors) == {"x.1.y.w", "d.w"} and mapped.tensors["d.w"] == -1
    assert mapped.unneeded == {"old.c.x": "old"} and mapped.sources["d.w"] == "c.w"
    with pytest.raises(ConversionError, match="unknown meaning: a.1.2.b.w"):  # * is one part of a name
        map_tensors({"a.1.2.b.w": torch.ones(1)}, rules, [])


SETTINGS = {
    "model.backbone.norm_eps=1": ("backbone", "norm_eps", 1.0),
    "model.backbone.stride_in_1x1=true": ("backbone", "stride_in_1x1", True),
    "model.backbone.weights=null": ("backbone", "weights", None),
    "model.image.channel_order=bgr": ("image", "channel_order", "bgr"),
    "model.image.mean=[1, 0.5, 0]": ("image", "mean", (1.0, 0.5, 0.0)),
    "model.rpn.anchor_sizes=[1,2]": ("rpn", "anchor_sizes", (1.0, 2.0)),
    "model.head.conv_blocks=3": ("head", "conv_blocks", 3),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting):
    part, name, value = SETTINGS[setting]
    found = getattr(getattr(with_settings(Recipe(), [setting]).model, part), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("setting", [
    "model", "model.image=1", "model.image.mean=[1, 2]", "model.image.mean=1", "model.image.min_size=[]", "model.x=1",
    "model.image.channel_order=grb", "model.backbone.stride_in_1x1=1", "model.head.conv_blocks=1.5",
    "model.image.max_size.x=1", "model.head.conv_blocks=true",
])  # fmt: skip
def test_wrong_settings(setting):
    with pytest.raises(ConversionError, match="--set"):
        with_settings(Recipe(), [setting])


CONFIGURATION = """
model = dict(
    backbone=dict(depth=50, style='caffe', type='ResNet'),
    data_preprocessor=dict(bgr_to_rgb=False, mean=[
        103.53,
        116.28, 123.675,
    ], std=[1.0, 1.0, 1.0]),
    rpn_head=dict(anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales=[
        4,
    ], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(reg_roi_scale_factor=1.5))
test_pipeline = [dict(keep_ratio=True, scale=(
    1000,
    600,
), type='Resize')]
"""


def test_an_mmdet_configuration_is_read():
    found = read_configuration({"cfg": CONFIGURATION})
    assert found.style == "caffe" and found.channel_order == "bgr"
    assert found.mean == [103.53, 116.28, 123.675] and found.std == [1, 1, 1]
    assert found.image_scale == (600, 1000) and found.conv_box_scale == 1.5
    assert found.anchor_sizes == (16, 32, 64, 128, 256) and found.aspect_ratios == (0.5, 1, 2)
    assert read_configuration({}) == read_configuration({"cfg": "nonsense = mean=[1, 2], scale=(("})
    two = CONFIGURATION + "train_pipeline = [dict(scale=(1333, 800), type='Resize')]"
    assert read_configuration({"config": two}).image_scale is None  # which of them is at test is not known
    for what in ("bbox_coder=dict(type='LegacyDeltaXYWHBBoxCoder')", "nms=dict(type='soft_nms')", "scales=[4, 8]"):
        with pytest.raises(ConversionError, match="not supported"):
            read_configuration({"cfg": what})


def test_detectron2_tells_normalisation_and_anchors():
    from doublehead.interop.detectron2.weights import CELLS, read_cells

    ratios = torch.tensor([1.0, 3.0])
    width, height = 10 / ratios.sqrt(), 10 * ratios.sqrt()
    cells = torch.stack([-width, -height, width, height], 1) / 2
    sizes, found, tensors = read_cells({f"{CELLS}.{level}": cells * 2**level for level in (1, 0)})
    assert sizes == (10, 20) and found == (1, 3) and len(tensors) == 2
    assert read_cells({})[:2] == (RPNConfig().anchor_sizes, RPNConfig().aspect_ratios)
    with pytest.raises(ConversionError, match="several sizes on a level"):
        read_cells({f"{CELLS}.0": torch.cat([cells, 2 * cells])})


def test_anchors_in_the_checkpoint_are_compared():
    cells = torch.tensor([[[-2.0, -2, 2, 2]], [[-4, -4, 4, 4]]])
    check_cells({}, cells)
    check_cells({"anchors.0": cells[0] + 1e-3, "anchors.1": cells[1]}, cells)
    with pytest.raises(ConversionError, match="'anchors.1' has other anchors than the recipe"):
        check_cells({"anchors.0": cells[0], "anchors.1": cells[1] + 1}, cells)
    with pytest.raises(ConversionError, match="anchors of 1 levels in the checkpoint, of 2"):
        check_cells({"anchors.0": cells[0]}, cells)


def test_every_project_can_be_named():
    assert set(PROJECTS) == {"torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"}
    with pytest.raises(ConversionError, match="expected one of torchvision, "):
        convert(Checkpoint(Path("a.pth"), {"a": torch.zeros(1)}), project="yolo")


def test_the_configuration_of_old():
    """`faster_rcnn_config` and `convert_faster_rcnn` stay what the README says they are."""
    config = faster_rcnn_config("batch_norm")
    assert dataclasses.replace(config.backbone, norm_eps=1e-5) == BackboneConfig(
        "resnet50", "batch_norm", weights=None, frozen_stages=0
    )
