"""A converted model finds what the source's maths find: pictures in, detections out, random weights, float64.

torchvision is compared with the installed package, the others with `restatements`, which are written from the sources.
"""

import dataclasses
import pickle
import re
import typing

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from doublehead.cli.convert import main
from doublehead.engine.checkpoint import load_model
from tests.restatements.detectron2 import STYLES, FasterRCNN
from tests.restatements.layers import Weights
from tests.restatements.maskrcnn_benchmark import GeneralizedRCNN
from tests.restatements.mmdet import TwoStage

PRE_NMS, POST_NMS = 200, 40
SHORT, LONG = 96, 128  # sides of the resized pictures: small, as float64 takes long
LIMITS = f"model.rpn.pre_nms_test={PRE_NMS}", f"model.rpn.post_nms_test={POST_NMS}"
SIZES = f"model.image.min_size=[{SHORT}]", f"model.image.max_size={LONG}"


def pictures(*sizes):
    """Pictures with smooth parts and edges, so that networks see more than noise: uint8 `[3, H, W]`."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for height, width in sizes:
        coarse = torch.rand(1, 3, 7, 9, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        smooth[:, height // 4 : height // 2, width // 3 :] *= 0.4
        found.append((smooth.clamp(0, 1) * 255).to(torch.uint8))
    return found


def converted(tmp_path, file, *options):
    main([str(file), str(tmp_path / "out"), *options])
    loaded = load_model(tmp_path / "out")
    assert_typed(loaded.recipe)
    return loaded._replace(model=loaded.model.double())


def assert_typed(config):
    """Every value is what its field declares: the recipe trains too."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            assert_typed(value)
        elif hint is float:
            assert isinstance(value, int | float) and not isinstance(value, bool), (name, value)
        elif isinstance(hint, type):
            assert type(value) is hint, (name, value)
        elif typing.get_origin(hint) is typing.Literal:
            assert value in typing.get_args(hint), (name, value)


def assert_equal(model, images, expected, least=40):
    """The same boxes, labels and scores in the same order."""
    with torch.inference_mode():
        found = model(images)
    assert sum(len(scores) for _, scores, _ in expected) >= least
    for mine, (boxes, scores, labels) in zip(found, expected, strict=True):
        assert mine["labels"].tolist() == labels.tolist()
        torch.testing.assert_close(mine["scores"].double(), scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(mine["boxes"].double(), boxes, atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------------------------
# Detectron2


@pytest.mark.parametrize("style", ["caffe", "pytorch"])
def test_detectron2(tmp_path, style):
    weights, images = Weights(0), pictures((128, 100), (110, 150))
    source = FasterRCNN(weights, 5, SHORT, LONG, style, (PRE_NMS, POST_NMS))
    with torch.inference_mode():
        source(images[:1])  # makes the weights up
        expected = source(images)
    file = tmp_path / "model_final"
    if style == "caffe":  # as a published file: a pickle of numpy arrays
        arrays = {name: tensor.numpy() for name, tensor in weights.tensors.items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol=2))
    else:  # as a training's: with what tells the style
        mean, std = (torch.tensor(values)[:, None, None] for values in STYLES[style])
        torch.save({"model": weights.tensors | {"pixel_mean": mean, "pixel_std": std}, "iteration": 5}, file)
    model = converted(tmp_path, file, "--set", *LIMITS, *SIZES).model
    assert_equal(model, images, [(boxes, scores, labels + 1) for boxes, scores, labels in expected])


# ---------------------------------------------------------------------------------------------
# MMDetection


@pytest.mark.parametrize("double, style", [(False, "caffe"), (True, "pytorch")])
def test_mmdet(tmp_path, double, style):
    weights, images = Weights(11, counters=True), pictures((100, 128), (150, 110))
    source = TwoStage(weights, 5, (LONG, SHORT), double, style, PRE_NMS, POST_NMS)
    with torch.inference_mode():
        source(images[:1])
        expected = source(images)
    file = tmp_path / "epoch_12.pth"
    notes = {"CLASSES": tuple("abcde"), "config": f"model = dict(backbone=dict(style='{style}'))"}
    torch.save({"meta": notes, "state_dict": weights.tensors, "optimizer": {"state": {}}}, file)
    loaded = converted(tmp_path, file, "--set", *LIMITS, *SIZES)
    assert loaded.classes == list("abcde")
    assert_equal(loaded.model, images, [(boxes, scores, labels + 1) for boxes, scores, labels in expected])


# ---------------------------------------------------------------------------------------------
# maskrcnn-benchmark and the authors' release


AUTHORS_LIMITS = "model.rpn.pre_nms_test=200", "model.rpn.post_nms_test=60"
AUTHORS_SIZES = "model.image.min_size=[128]", "model.image.max_size=160"  # in smaller ones the scores are nearly equal


def authors_source(weights, double=True, **options):
    return GeneralizedRCNN(weights, 6, 128, 160, double=double, pre_nms=200, post_nms=60, **options)


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """Weights, pictures, and the converted model."""
    weights, images = Weights(2, counters=True), pictures((128, 100), (110, 150))
    with torch.inference_mode():
        authors_source(weights)(images)
    state = {f"module.{name}": tensor for name, tensor in weights.tensors.items() if not is_counter_of_body(name)}
    folder = tmp_path_factory.mktemp("authors")
    torch.save({"model": state, "iteration": 180000}, folder / "model.pth", _use_new_zipfile_serialization=False)
    return weights, images, converted(folder, folder / "model.pth", "--set", *AUTHORS_LIMITS, *AUTHORS_SIZES).model


@pytest.mark.parametrize("mode, readout", [(0, "conv"), (1, "fc"), (2, "split"), (3, "fused")])
def test_authors_double_head(authors, mode, readout):
    weights, images, model = authors
    source = authors_source(weights, mode=mode)
    with torch.inference_mode():
        expected = source(images)
    model.set_readout(readout)
    assert_equal(model, images, [from_coco(*found) for found in expected])


def is_counter_of_body(name):
    """The frozen batch norms of the backbone have no counters."""
    return name.startswith("backbone.") and name.endswith("num_batches_tracked")


def test_maskrcnn_benchmark(tmp_path):
    weights, images = Weights(3), pictures((128, 100), (110, 150))
    source = authors_source(weights, double=False)
    with torch.inference_mode():
        source(images[:1])
        expected = source(images)
    file = tmp_path / "model_final.pth"
    torch.save({"model": weights.tensors, "optimizer": {}, "scheduler": {}, "iteration": 90000}, file)
    model = converted(tmp_path, file, "--set", *AUTHORS_LIMITS, *AUTHORS_SIZES).model
    assert_equal(model, images, [from_coco(*found) for found in expected])


PREDICTOR = "roi_heads.box.predictor.bbox_pred"
AGNOSTIC = {  # the source, and the names of its regressors
    "detectron2": (lambda w: FasterRCNN(w, 5, SHORT, LONG, "caffe", (PRE_NMS, POST_NMS)),
                   ["roi_heads.box_predictor.bbox_pred"]),
    "mmdet": (lambda w: TwoStage(w, 5, (LONG, SHORT), True, "pytorch", PRE_NMS, POST_NMS),
              ["roi_head.bbox_head.fc_reg"]),
    "authors": (lambda w: authors_source(w, inner=24), [PREDICTOR, f"{PREDICTOR}_fc"]),
}  # fmt: skip


@pytest.mark.parametrize("project", AGNOSTIC)
def test_class_agnostic_boxes(tmp_path, project):
    """All classes move a box alike; in the file that is one box (the release's: after one of the background).

    The authors' non-local blocks have another inner width than half here.
    """
    make, regressors = AGNOSTIC[project]
    authors = project == "authors"
    weights, images = Weights(4, counters=project != "detectron2"), pictures((100, 128))
    source = make(weights)
    with torch.inference_mode():
        source(images)
        for name in (f"{layer}.{part}" for layer in regressors for part in ("weight", "bias")):
            rows = weights.tensors[name]
            weights.tensors[name] = rows[:4].repeat(len(rows) // 4, *[1] * (rows.dim() - 1))
        expected = source(images)
    state = {name: tensor for name, tensor in weights.tensors.items() if not is_counter_of_body(name)}
    for layer in regressors:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            rows = state[name][:4]
            state[name] = torch.cat((torch.randn_like(rows), rows)) if authors else rows
    torch.save({"state_dict" if project == "mmdet" else "model": state}, tmp_path / "model.pth")
    options = (*AUTHORS_LIMITS, *AUTHORS_SIZES) if authors else (*LIMITS, *SIZES)
    loaded = converted(tmp_path, tmp_path / "model.pth", "--set", *options)
    head = loaded.recipe.model.head
    assert head.class_agnostic_boxes and head.non_local.inner_dim == (24 if authors else None)
    found = [from_coco(*one) if authors else (one[0], one[1], one[2] + 1) for one in expected]
    assert_equal(loaded.model, images, found, least=20)


def from_coco(boxes, scores, labels):
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), scores, labels


# ---------------------------------------------------------------------------------------------
# torchvision


def lively(model):
    """Random weights with statistics that fit, and outputs that are not all the same."""
    norms = [layer for layer in model.backbone.modules() if hasattr(layer, "running_var")]

    def measure(layer, inputs):
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        layer.running_var.copy_(variance + 1e-3)
        layer.running_mean.copy_(mean)

    handles = [layer.register_forward_pre_hook(measure) for layer in norms]
    with torch.no_grad():
        images = torch.stack(pictures((SHORT, LONG), (SHORT, LONG))) / 255
        features = model.backbone((images - 0.45) / 0.225)
        for block in model.backbone.fpn.inner_blocks:
            block[0].weight.div_(features["0"].std())
        model.rpn.head.cls_logits.weight.mul_(30)
        model.rpn.head.bbox_pred.weight.mul_(10)
        model.roi_heads.box_predictor.cls_score.weight.mul_(12)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(10)
    for handle in handles:
        handle.remove()
    return model.eval()


def frozen(eps):
    return lambda channels: FrozenBatchNorm2d(channels, eps)


def torchvision_model(builder, classes, backbone, norm):
    """A model of torchvision's with the limits of the others."""
    torch.manual_seed(4)
    limits = {"rpn_pre_nms_top_n_test": PRE_NMS, "rpn_post_nms_top_n_test": POST_NMS}
    model = builder(
        resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=norm), num_classes=classes, min_size=SHORT,
        max_size=LONG, **limits,
    )  # fmt: skip
    return lively(model)


def before_0_13(name):
    """What torchvision called a tensor before 0.13, and still does in the published weights."""
    name = re.sub(r"(backbone\.fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
    return name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")


TORCHVISION = {
    "published": (detection.FasterRCNN, 12, "resnet50", frozen(0.0), before_0_13, []),
    "fine-tuned": (detection.FasterRCNN, 7, "resnet18", frozen(1e-2), str, ["model.backbone.norm_eps=1e-2"]),
    "from scratch": (detection.FasterRCNN, 7, "resnet18", nn.BatchNorm2d, str, []),
    "mask": (detection.MaskRCNN, 5, "resnet18", frozen(0.0), str, []),
    "keypoint": (detection.KeypointRCNN, 2, "resnet18", frozen(0.0), str, []),
}


@pytest.mark.parametrize("case", TORCHVISION)
def test_torchvision(tmp_path, case):
    builder, classes, backbone, norm, rename, more = TORCHVISION[case]
    theirs = torchvision_model(builder, classes, backbone, norm)
    file = tmp_path / "model.pth"
    torch.save({rename(name): tensor for name, tensor in theirs.state_dict().items()}, file)
    model = converted(tmp_path, file, "--set", *LIMITS, *SIZES, *more).model
    theirs.roi_heads.mask_roi_pool = theirs.roi_heads.keypoint_roi_pool = None  # no masks: boxes alone
    images = [image.double() / 255 for image in pictures((128, 100), (110, 150))]
    with torch.inference_mode():
        expected = [(found["boxes"], found["scores"], found["labels"]) for found in theirs.double()(images)]
    assert_equal(model, images, expected)
