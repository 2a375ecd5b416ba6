"""Detectron2 made faster, against a stand-in of its call signatures with plain maths."""

import sys
import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

from doublehead.interop import detectron2
from tests.support.plain_operators import plain_nms, plain_roi_align, random_boxes


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor


class ROIAlign(nn.Module):
    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=True):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input, rois):
        return plain_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class RoIPool(nn.Module):
    sampling_ratio = aligned = spatial_scale = None

    def forward(self, input, rois):
        return torch.full((len(rois), input.shape[1], 3, 3), 7.0)


class ROIPooler(nn.Module):
    def __init__(self, output_size, scales, sampling_ratio, pooler_type, canonical_box_size=224, canonical_level=4):
        super().__init__()
        self.output_size = (output_size, output_size)
        self.canonical_box_size, self.canonical_level = canonical_box_size, canonical_level
        self.first = round(-torch.tensor(scales[0]).log2().item())
        aligned = pooler_type == "ROIAlignV2"
        self.level_poolers = nn.ModuleList(
            RoIPool() if pooler_type == "ROIPool" else ROIAlign(self.output_size, scale, sampling_ratio, aligned)
            for scale in scales
        )

    def forward(self, x, box_lists):
        boxes = torch.cat([item.tensor for item in box_lists])
        image = torch.cat([torch.full((len(item.tensor), 1), i) for i, item in enumerate(box_lists)])
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = (self.canonical_level + (side / self.canonical_box_size + 1e-8).log2()).floor().long() - self.first
        level = level.clamp(0, len(x) - 1)
        output = x[0].new_zeros(len(boxes), x[0].shape[1], *self.output_size)
        for i, pooler in enumerate(self.level_poolers):
            chosen = level == i
            output[chosen] = pooler(x[i], torch.cat((image, boxes), 1)[chosen])
        return output


def nms(boxes, scores, iou_threshold):
    return plain_nms(boxes, scores, iou_threshold)


def batched_nms(boxes, scores, idxs, iou_threshold):
    kept = torch.cat([rows[nms(boxes[rows], scores[rows], iou_threshold)]
                      for rows in ((idxs == group).nonzero()[:, 0] for group in idxs.unique())])  # fmt: skip
    return kept[scores[kept].argsort(descending=True)]


@pytest.fixture
def package(monkeypatch):
    """`detectron2` with the parts that matter, and a module of it that holds a function under its own name."""
    contents = {
        "detectron2": {},
        "detectron2.layers": {"ROIAlign": ROIAlign, "nms": nms, "batched_nms": batched_nms},
        "detectron2.modeling": {},
        "detectron2.modeling.poolers": {"ROIPooler": ROIPooler, "ROIAlign": ROIAlign},
        "detectron2.modeling.user": {"suppress": batched_nms, "nms": nms},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "not_detectron2", ModuleType("not_detectron2"))
    sys.modules["not_detectron2"].nms = nms
    yield sys.modules
    detectron2.unpatch()


def features():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 128 // stride, 160 // stride, requires_grad=True) for stride in (4, 8, 16)]


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("canonical", [(224, 4), (60, 3)])
def test_pooler(package, kind, ratio, canonical):
    pooler = ROIPooler(3, [1 / 4, 1 / 8, 1 / 16], ratio, kind, *canonical)  # made before
    maps, boxes = features(), random_boxes(30)
    arguments = (maps, [Boxes(boxes[:12]), Boxes(boxes[12:])])
    expected = pooler(*arguments)
    detectron2.patch()
    found = pooler(*arguments)
    assert type(found.grad_fn) is not type(expected.grad_fn)  # it is ours
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.square().sum(), maps, allow_unused=True) for y in (found, expected))
    for of_ours, of_theirs in zip(*grads, strict=True):
        torch.testing.assert_close(of_ours, torch.zeros_like(of_ours) if of_theirs is None else of_theirs,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


def test_the_level_of_a_box_on_the_border_is_detectron2s(package):
    """torchvision's rule would take this box to the next level."""
    pooler, maps = ROIPooler(3, [1 / 4, 1 / 8, 1 / 16], 2, "ROIAlignV2", 20, 2), features()
    boxes = [Boxes(torch.tensor([[0, 0, 39.99998, 39.99998]])), Boxes(torch.zeros(0, 4))]
    expected = pooler(maps, boxes)
    detectron2.patch()
    torch.testing.assert_close(pooler(maps, boxes), expected, rtol=1e-4, atol=1e-5)


def test_other_pooling_stays_theirs(package):
    detectron2.patch()
    pooler = ROIPooler(3, [1 / 4, 1 / 8, 1 / 16], 0, "ROIPool")
    assert (pooler(features(), [Boxes(random_boxes(2))] * 2) == 7).all()


def test_single_layer(package):
    layer, maps, boxes = ROIAlign((2, 3), 1 / 4, 0), features(), random_boxes(9)
    rois = torch.cat((torch.tensor([[0.0], [1], [1]] * 3), boxes), 1)
    expected = layer(maps[0], rois)
    detectron2.patch()
    torch.testing.assert_close(layer(maps[0], rois), expected, rtol=1e-4, atol=1e-5)


def test_suppression_in_all_its_modules(package):
    boxes, scores = random_boxes(120), torch.rand(120)
    groups = torch.randint(0, 4, (120,))
    expected = nms(boxes, scores, 0.4), batched_nms(boxes, scores, groups, 0.4)
    detectron2.patch()
    detectron2.patch()
    layers, user = package["detectron2.layers"], package["detectron2.modeling.user"]
    assert layers.nms is not nms and user.nms is layers.nms and user.suppress is layers.batched_nms is not batched_nms
    assert package["not_detectron2"].nms is nms
    assert layers.nms(boxes, scores, 0.4).tolist() == expected[0].tolist()
    assert user.suppress(boxes, scores, groups, 0.4).tolist() == expected[1].tolist()


def test_unpatch(package):
    methods = ROIPooler.forward, ROIAlign.forward
    detectron2.unpatch()  # nothing to undo
    detectron2.patch()
    assert ROIPooler.forward is not methods[0] and ROIAlign.forward is not methods[1]
    package["detectron2.modeling.user"].later = package["detectron2.layers"].nms  # imported since
    detectron2.unpatch()
    assert (ROIPooler.forward, ROIAlign.forward) == methods
    user = package["detectron2.modeling.user"]
    assert (user.nms, user.suppress, user.later) == (nms, batched_nms, nms)
    assert (package["detectron2.layers"].nms, package["detectron2.layers"].batched_nms) == (nms, batched_nms)


def test_former_names(package):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detectron2.accelerate()
        detectron2.accelerate()
        assert package["detectron2.layers"].nms is not nms
        detectron2.restore()
        detectron2.restore()
    assert package["detectron2.layers"].nms is nms
    names = [(f"doublehead.interop.detectron2.{old}", f"doublehead.interop.detectron2.{new}")
             for old, new in (("accelerate", "patch"), ("restore", "unpatch"))]  # fmt: skip
    assert [str(warning.message) for warning in caught] == [f"{old} is now called {new}" for old, new in names]
    assert all(warning.category is DeprecationWarning and warning.filename == __file__ for warning in caught)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match="detectron2.layers cannot be imported .*doublehead convert"):
        detectron2.patch()
