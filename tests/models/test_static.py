"""The core has no shape made from data: it compiles whole, exports, and never asks the device for a value."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.models import ImageBatch, build_detector
from doublehead.models.backbone import build_backbone
from tests.support.tiny_detectors import batch, lively, shallow, targets, tiny

KINDS = ["fc", "double_head", "double_head_ext"]
# Compiling takes long; Ext has every part that the other kinds have.
ext_alone = pytest.mark.parametrize("detector", ["double_head_ext"], indirect=True)


@pytest.fixture(params=KINDS)
def detector(request):
    torch.manual_seed(0)
    return build_detector(tiny(request.param), num_classes=4).detector


@ext_alone
def test_inference_compiles_as_one_graph(detector):
    """Compiled once, for images of any size above 64 pixels: below, the coarsest map has a single row."""
    lively(shallow(detector))
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((96, 128), (128, 192)):
            images = batch(*size)
            torch._dynamo.mark_dynamic(images.pixels, (2, 3))
            expected, found = detector(images), compiled(images)
            assert expected.count.min() > 0
            torch.testing.assert_close(found, expected)


@ext_alone
def test_training_compiles_as_one_graph(detector):
    torch._dynamo.reset()  # forgets that another test had sizes that differ: shapes are fixed here, which is quicker
    shallow(detector).train()
    compiled = torch.compile(detector, fullgraph=True, backend="eager")
    images = batch()
    torch.manual_seed(1)
    expected = detector(images, targets())
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(images, targets()), expected)


@ext_alone
def test_inference_exports(detector):
    lively(shallow(detector))
    images = batch()
    with torch.no_grad():
        program = torch.export.export(detector, (images,))
        other = batch()
        torch.testing.assert_close(program.module()(other), detector(other))


class NoDataDependence(TorchDispatchMode):
    """Fails on every operator that reads a value back or makes a shape out of data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in self.FORBIDDEN):
            raise AssertionError(f"data-dependent operator {name}")
        if "index.Tensor" in name and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError("boolean indexing")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_nothing_between_pixels_and_result_depends_on_data(detector, training):
    images = batch()
    with NoDataDependence():
        detector.train(training)(images, targets() if training else None)


def test_the_guard_itself_finds_data_dependence():
    x = torch.randn(5)
    for offence in (lambda: x[x > 0], lambda: x.sum().item(), lambda: torch.nonzero(x), lambda: bool(x.any())):
        with pytest.raises(AssertionError), NoDataDependence():
            offence()


def test_detections_do_not_depend_on_the_batch(detector):
    """An image gives the same result alone and beside another; padding is never seen."""
    lively(detector)
    torch.manual_seed(3)
    images = ImageBatch(torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 96.0], [64.0, 96.0]]))
    with torch.no_grad():
        both = detector(images)
        for row in range(2):
            alone = detector(ImageBatch(images.pixels[row : row + 1], images.sizes[row : row + 1]))
            assert alone.count[0] == both.count[row]
            torch.testing.assert_close(alone.boxes[0], both.boxes[row], atol=1e-3, rtol=1e-4)


def test_read_out_can_change_after_construction():
    model = build_detector(tiny("double_head_ext"), num_classes=4)
    lively(model.detector)
    images = batch()
    with torch.no_grad():
        results = {}
        for readout in ("fused", "split", "fc", "conv"):
            model.set_readout(readout)
            results[readout] = model.detector(images).scores
    assert not torch.equal(results["fused"], results["split"])
    assert not torch.equal(results["fc"], results["conv"])
    with pytest.raises(ValueError, match="detection.readout"):
        build_detector(tiny("double_head"), num_classes=4).set_readout("fc")


def test_config_of_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes"):
        build_detector(tiny("fc"), num_classes=1)


def test_frozen_and_trained_stages():
    config = dataclasses.replace(tiny("fc").backbone, frozen_stages=2)
    detector = build_detector(dataclasses.replace(tiny("fc"), backbone=config), 4).detector
    trained = {name.split(".")[0] for name, p in detector.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


def test_stride_in_1x1_moves_the_stride_of_each_stage():
    config = dataclasses.replace(tiny("fc").backbone, name="resnet50")
    strides = {}
    for first in (False, True):
        body = build_backbone(dataclasses.replace(config, stride_in_1x1=first)).body.body
        stages = [body[f"layer{stage}"][0] for stage in range(1, 5)]
        strides[first] = [(block.conv1.stride, block.conv2.stride) for block in stages]
    assert strides[False] == [((1, 1), (1, 1))] + 3 * [((1, 1), (2, 2))]
    assert strides[True] == [((1, 1), (1, 1))] + 3 * [((2, 2), (1, 1))]


def test_legacy_boxes_and_their_level_rule_need_each_other():
    legacy = dataclasses.replace(tiny("fc"), legacy_boxes=True)
    with pytest.raises(ValueError, match="legacy_boxes and roi.level_rule 'maskrcnn_benchmark' need each other"):
        build_detector(legacy, 4)
    roi = dataclasses.replace(legacy.roi, level_rule="maskrcnn_benchmark")
    detector = build_detector(dataclasses.replace(legacy, roi=roi), 4).detector
    assert detector.min_side == detector.rpn.min_side == 1.0
