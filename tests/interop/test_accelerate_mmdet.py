"""MMDetection made faster: against a stand-in of its call signatures with plain maths, and against itself."""

import copy
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from doublehead.interop import mmdet
from tests.support.plain_operators import plain_nms, plain_roi_align, random_boxes

INSTALLED = importlib.util.find_spec("mmdet") is not None and importlib.util.find_spec("mmcv") is not None
stand_ins = pytest.mark.skipif(INSTALLED, reason="mmdet itself is here and is tested in place of its stand-ins")
real = pytest.mark.skipif(not INSTALLED, reason="mmdet is not installed (pip install mmdet mmcv-lite mmengine)")


# ---------------------------------------------------------------------------------------------
# Stand-ins


def roi_align(input, rois, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True):
    if pool_mode == "max":
        return "mmcv's maximum"
    return plain_roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)


class RoIAlign(nn.Module):
    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio = (output_size,) * 2, spatial_scale, sampling_ratio
        self.pool_mode, self.aligned = pool_mode, aligned

    def forward(self, input, rois):
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.pool_mode,
                         self.aligned)  # fmt: skip


def nms(boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1):
    if offset:
        return "mmcv's offset"
    rows = torch.arange(len(scores))
    if score_threshold > 0:
        rows = rows[scores > score_threshold]
    kept = rows[plain_nms(boxes[rows], scores[rows], iou_threshold)]
    kept = kept[:max_num] if max_num > 0 else kept
    return torch.cat((boxes[kept], scores[kept, None]), 1), kept


def batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
    if nms_cfg is None:
        order = scores.sort(descending=True).indices
        return torch.cat((boxes[order], scores[order, None]), 1), order
    options = dict(nms_cfg)
    if options.pop("type", "nms") != "nms" or boxes.shape[1] == 5:
        return "mmcv's other types"
    agnostic = options.pop("class_agnostic", class_agnostic)
    most = options.pop("max_num", -1)
    if len(boxes) < options.pop("split_thr", 10000) and agnostic:
        _, kept = nms(boxes, scores, **options)
    else:
        groups = [(idxs == group).nonzero()[:, 0] for group in idxs.unique()]
        kept = torch.cat([rows[nms(boxes[rows], scores[rows], **options)[1]] for rows in groups])
        kept = kept[scores[kept].argsort(descending=True)]
    kept = kept[:most] if most > 0 else kept
    return torch.cat((boxes[kept], scores[kept, None]), 1), kept


class SingleRoIExtractor(nn.Module):
    def __init__(self, strides=(4, 8, 16), finest_scale=20, **layer):
        super().__init__()
        self.finest_scale = finest_scale
        self.roi_layers = nn.ModuleList(RoIAlign(3, 1 / stride, **layer) for stride in strides)

    def map_roi_levels(self, rois, num_levels):
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        return (side / self.finest_scale + 1e-6).log2().floor().clamp(0, num_levels - 1).long()

    def forward(self, feats, rois, roi_scale_factor=None):
        if len(feats) == 1:
            return self.roi_layers[0](feats[0], rois)
        level = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            centre, half = (rois[:, 1:3] + rois[:, 3:]) / 2, (rois[:, 3:] - rois[:, 1:3]) / 2 * roi_scale_factor
            rois = torch.cat((rois[:, :1], centre - half, centre + half), 1)
        output = feats[0].new_zeros(len(rois), feats[0].shape[1], 3, 3)
        for i, feature in enumerate(feats):
            if (level == i).any():
                output[level == i] = self.roi_layers[i](feature, rois[level == i])
        return output


class OtherRule(SingleRoIExtractor):
    def map_roi_levels(self, rois, num_levels):
        return torch.full((len(rois),), 1)


EXTRACTORS = "mmdet.models.roi_heads.roi_extractors"


@pytest.fixture
def package(monkeypatch):
    contents = {
        "mmcv": {"__version__": "2.1.0"},
        "mmcv._ext": {},
        "mmcv.ops": {"RoIAlign": RoIAlign, "roi_align": roi_align, "nms": nms, "batched_nms": batched_nms},
        "mmcv.ops.nms": {"nms": nms, "batched_nms": batched_nms},
        "mmcv.ops.roi_align": {"RoIAlign": RoIAlign, "roi_align": roi_align},
        "mmdet": {},
        "mmdet.models": {},
        "mmdet.models.roi_heads": {},
        EXTRACTORS: {},
        f"{EXTRACTORS}.single_level_roi_extractor": {"SingleRoIExtractor": SingleRoIExtractor},
        "mmdet.models.user": {"suppress": batched_nms},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    yield sys.modules
    mmdet.unpatch()


def features(strides=(4, 8, 16)):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 128 // stride, 160 // stride, requires_grad=True) for stride in strides]


def rois_of(number):
    return torch.cat((torch.arange(number)[:, None] % 2, random_boxes(number)), 1)


@stand_ins
@pytest.mark.parametrize("layer", [{}, {"aligned": False}, {"sampling_ratio": 2}])
@pytest.mark.parametrize("factor", [None, 1.3])
@pytest.mark.parametrize("strides", [(4, 8, 16), (8,), (4, 16, 32)])
def test_extractor(package, layer, factor, strides):
    extractor, maps, rois = SingleRoIExtractor(strides, **layer), features(strides), rois_of(30)
    expected = extractor(maps, rois, factor)
    mmdet.patch()
    found = extractor(maps, rois, factor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.square().sum(), maps, allow_unused=True) for y in (found, expected))
    for of_ours, of_theirs in zip(*grads, strict=True):
        torch.testing.assert_close(of_ours, torch.zeros_like(of_ours) if of_theirs is None else of_theirs,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


@stand_ins
def test_the_level_of_a_box_on_the_border_is_mmdets(package):
    """torchvision's rule would take this box to the next level."""
    extractor, maps, rois = SingleRoIExtractor(), features(), torch.tensor([[0, 0, 0, 39.999977, 39.999977]])
    expected = extractor(maps, rois)
    mmdet.patch()
    torch.testing.assert_close(extractor(maps, rois), expected, rtol=1e-4, atol=1e-5)


@stand_ins
def test_an_extractor_with_a_rule_of_its_own_keeps_it(package):
    extractor, maps, rois = OtherRule(), features(), rois_of(10)
    expected = extractor(maps, rois)
    mmdet.patch()
    torch.testing.assert_close(extractor(maps, rois), expected, rtol=1e-4, atol=1e-5)


@stand_ins
def test_roi_align_function(package):
    (x,), rois = features((4,)), rois_of(6)
    expected = roi_align(x, rois, (2, 3), 0.25)
    mmdet.patch()
    fast = package["mmcv.ops"].roi_align
    assert fast is not roi_align
    torch.testing.assert_close(fast(x, rois, (2, 3), 0.25), expected, rtol=1e-4, atol=1e-5)
    assert fast(x, rois, (2, 3), 0.25, 0, "max", True) == "mmcv's maximum"
    assert RoIAlign(3, pool_mode="max")(x, rois) == "mmcv's maximum"


@stand_ins
@pytest.mark.parametrize("options", [{}, {"max_num": 7}, {"score_threshold": 0.5}])
def test_nms(package, options):
    boxes, scores = random_boxes(90), torch.rand(90)
    expected = nms(boxes, scores, 0.4, **options)
    mmdet.patch()
    fast = package["mmcv.ops"].nms
    torch.testing.assert_close(fast(boxes, scores, 0.4, **options), expected)
    torch.testing.assert_close(fast(boxes, scores, iou_thr=0.4, **options), expected)
    dets, kept = fast(boxes.numpy(), scores.numpy(), 0.4, **options)
    assert isinstance(dets, np.ndarray) and kept.tolist() == expected[1].tolist()
    assert fast(boxes, scores, 0.4, offset=1) == "mmcv's offset"


@stand_ins
@pytest.mark.parametrize("more", [{}, {"split_thr": 10}, {"class_agnostic": True},
                                  {"class_agnostic": True, "split_thr": 10}])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"max_num": 7}, {"score_threshold": 0.5, "max_num": 20}])
def test_batched_nms(package, options, more):
    boxes, scores, groups = random_boxes(90), torch.rand(90), torch.randint(0, 3, (90,))
    config = {"type": "nms", "iou_threshold": 0.4, **options, **more}
    before = copy.deepcopy(config)
    expected = batched_nms(boxes, scores, groups, config)
    mmdet.patch()
    torch.testing.assert_close(package["mmdet.models.user"].suppress(boxes, scores, groups, config), expected)
    assert config == before


@stand_ins
def test_other_suppression_stays_mmcvs(package):
    boxes, scores, groups = random_boxes(9), torch.rand(9), torch.zeros(9)
    mmdet.patch()
    fast = package["mmcv.ops"].batched_nms
    torch.testing.assert_close(fast(boxes, scores, groups, None), batched_nms(boxes, scores, groups, None))
    assert fast(boxes, scores, groups, {"type": "soft_nms", "iou_threshold": 0.5}) == "mmcv's other types"
    rotated = torch.cat((boxes, boxes[:, :1]), 1)
    assert fast(rotated, scores, groups, {"iou_threshold": 0.5}) == "mmcv's other types"
    found = fast(boxes, scores, groups, {"iou_threshold": 0.5}, class_agnostic=True)
    torch.testing.assert_close(found, batched_nms(boxes, scores, groups, {"iou_threshold": 0.5}, True))


@stand_ins
def test_unpatch(package):
    methods = RoIAlign.forward, SingleRoIExtractor.forward
    mmdet.patch()
    mmdet.patch()
    assert package["mmdet.models.user"].suppress is package["mmcv.ops"].batched_nms is not batched_nms
    mmdet.unpatch()
    assert (RoIAlign.forward, SingleRoIExtractor.forward) == methods
    operators = package["mmcv.ops"]
    assert (operators.nms, operators.batched_nms, operators.roi_align) == (nms, batched_nms, roi_align)
    assert package["mmdet.models.user"].suppress is batched_nms


@stand_ins
def test_former_names(package):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mmdet.accelerate()
        mmdet.accelerate()
        assert package["mmcv.ops"].nms is not nms
        mmdet.restore()
        mmdet.restore()
    assert package["mmcv.ops"].nms is nms
    names = [(f"doublehead.interop.mmdet.{old}", f"doublehead.interop.mmdet.{new}")
             for old, new in (("accelerate", "patch"), ("restore", "unpatch"))]  # fmt: skip
    assert [str(warning.message) for warning in caught] == [f"{old} is now called {new}" for old, new in names]
    assert all(warning.category is DeprecationWarning and warning.filename == __file__ for warning in caught)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError, match="mmcv cannot be imported .*mmcv-lite"):
        mmdet.patch()


# ---------------------------------------------------------------------------------------------
# The package itself


@pytest.fixture
def detector(monkeypatch):
    """Faster R-CNN of mmdet's own configuration, made small, with lively random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about mmcv's version, among others
        mmdet.patch()
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
        from mmengine.config import Config

        register_all_modules()
        configs = Path(sys.modules["mmdet"].__file__).parent / ".mim/configs"
        config = Config.fromfile(configs / "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py").model
        config.backbone.update(depth=18, init_cfg=None)
        config.neck.in_channels = [64, 128, 256, 512]
        config.roi_head.bbox_head.num_classes = 5
        config.test_cfg.rpn.max_per_img = 60
        torch.manual_seed(0)
        model = MODELS.build(config)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    nn.Module.train(model.backbone)
    with torch.no_grad():
        model.backbone(torch.rand(2, 3, 128, 160))
    model.eval()
    largest = {model.rpn_head.rpn_cls: 6.0, model.rpn_head.rpn_reg: 1.0}
    largest |= {model.roi_head.bbox_head.fc_cls: 5.0, model.roi_head.bbox_head.fc_reg: 3.0}
    for layer, size in largest.items():
        outputs = []
        hook = layer.register_forward_hook(lambda _, __, output, to=outputs: to.append(output.abs().max()))
        predict(model)
        hook.remove()
        with torch.no_grad():
            layer.weight.mul_(size / max(outputs))
    yield model.double()
    mmdet.unpatch()


def predict(model):
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    images = torch.rand(2, 3, 128, 160, generator=generator).to(dtype)
    sizes = [(128, 160), (110, 120)]
    samples = [DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0),
                                       "pad_shape": (128, 160), "batch_input_shape": (128, 160)})
               for size in sizes]  # fmt: skip
    with torch.no_grad():
        return [sample.pred_instances for sample in model.predict(images, samples)]


def compiled_part() -> ModuleType:
    """What mmcv's operators call: its compiled part, or the stand-in for it."""
    return sys.modules["mmcv.ops.nms"].ext_module


def plain_compiled_operators(monkeypatch) -> None:
    """mmcv's compiled operators in plain PyTorch, called as mmcv calls them."""

    def roi_align_forward(input, rois, output, argmax_y, argmax_x, *, aligned_height, aligned_width, spatial_scale,
                          sampling_ratio, pool_mode, aligned):  # fmt: skip
        size = aligned_height, aligned_width
        output.copy_(plain_roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))

    def plain(boxes, scores, iou_threshold, offset):
        return plain_nms(boxes, scores, iou_threshold)

    compiled = compiled_part()
    monkeypatch.setattr(compiled, "roi_align_forward", roi_align_forward, raising=False)
    monkeypatch.setattr(compiled, "nms", plain, raising=False)


@real
def test_mmdets_faster_rcnn(detector, monkeypatch):
    """Without compiled operators it runs on ours; with plain ones in their place its own code says the same."""
    found = predict(detector)
    mmdet.unpatch()
    if getattr(compiled_part(), "__file__", None) is None:
        with pytest.raises(NotImplementedError, match="nms is compiled code"):
            predict(detector)
        plain_compiled_operators(monkeypatch)
    expected = predict(detector)
    assert sum(len(e.bboxes) for e in expected) > 20
    for f, e in zip(found, expected, strict=True):
        assert f.labels.tolist() == e.labels.tolist()
        torch.testing.assert_close(f.bboxes, e.bboxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(f.scores, e.scores, atol=1e-5, rtol=0)


@real
def test_mmengine_can_still_ask_what_kind_of_mmcv_this_is(detector):
    """`init_detector` does: a stand-in left behind would be an error there."""
    from mmengine.model import revert_sync_batchnorm

    assert revert_sync_batchnorm(detector) is detector


@real
def test_mmdets_faster_rcnn_trains(detector):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    sample = DetDataSample(metainfo={"img_shape": (128, 160), "batch_input_shape": (128, 160), "pad_shape": (128, 160)})
    boxes = torch.tensor([[10.0, 20, 90, 100], [40, 30, 150, 80]], dtype=torch.float64)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1, 3]))
    model = detector.train()
    losses = model.loss(torch.rand(1, 3, 128, 160, dtype=torch.float64), [sample])
    total = sum(sum(value) if isinstance(value, list) else value for name, value in losses.items() if "loss" in name)
    total.backward()
    assert total.isfinite() and model.neck.fpn_convs[0].conv.weight.grad.abs().sum() > 0
    assert model.roi_head.bbox_head.fc_reg.weight.grad.abs().sum() > 0


@real
def test_mmcvs_own_code_agrees(detector, monkeypatch):
    """The functions, against mmcv's Python around plain operators."""
    ours = copy.copy(vars(sys.modules["mmcv.ops.nms"]))
    mmdet.unpatch()
    if getattr(compiled_part(), "__file__", None) is None:
        plain_compiled_operators(monkeypatch)
    theirs = vars(sys.modules["mmcv.ops.nms"])
    assert ours["batched_nms"] is not theirs["batched_nms"]
    boxes, scores, groups = random_boxes(90), torch.rand(90), torch.randint(0, 3, (90,))
    for options in ({}, {"max_num": 7}, {"score_threshold": 0.5, "max_num": 20}):
        for more in ({}, {"split_thr": 10}, {"class_agnostic": True}, {"class_agnostic": True, "split_thr": 10}):
            arguments = boxes, scores, groups, {"type": "nms", "iou_threshold": 0.4, **options, **more}
            torch.testing.assert_close(ours["batched_nms"](*arguments), theirs["batched_nms"](*arguments))
        found, expected = (functions["nms"](boxes, scores, 0.4, **options) for functions in (ours, theirs))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours["batched_nms"](boxes, scores, groups, None),
                               theirs["batched_nms"](boxes, scores, groups, None))  # fmt: skip
