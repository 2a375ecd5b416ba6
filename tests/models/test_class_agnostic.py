"""One box regressor for all classes is one for each with equal weights: results, losses, gradients, exports."""

import copy
import dataclasses

import pytest
import torch

from doublehead.analysis.readers import Reader
from doublehead.config import (
    BackboneConfig,
    HeadConfig,
    ImageConfig,
    ModelConfig,
    NonLocalConfig,
    Recipe,
    RoIConfig,
    RPNConfig,
    from_dict,
    to_dict,
)
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.models import DoubleHeadRCNN, ImageBatch, build_detector
from doublehead.models.detections import detect
from doublehead.models.readout import ReadOut, Sources
from doublehead.models.structures import Detections, Proposals, pad_targets

CLASSES = 5
BOXES = [torch.tensor([[5.0, 5, 30, 40]]), torch.tensor([[10.0, 8, 60, 45], [50, 20, 60, 44]])]
TARGETS = pad_targets(BOXES, [torch.tensor([1]), torch.tensor([2, 4])])


def config(kind: str, agnostic: bool) -> ModelConfig:
    """Small; the non-local block's inner width is another than half, too."""
    non_local = NonLocalConfig(groups=2, inner_dim=6)
    return ModelConfig(
        BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=16),
        RPNConfig((8, 16, 32, 64, 128), pre_nms_train=40, pre_nms_test=40, post_nms_train=30, post_nms_test=20),
        RoIConfig(samples=16),
        HeadConfig(kind, 16, 32, 3, non_local=non_local, class_agnostic_boxes=agnostic),
        image=ImageConfig(min_size=(64,), max_size=64),
    )


def images() -> ImageBatch:
    generator = torch.Generator().manual_seed(3)
    return ImageBatch(torch.randn(2, 3, 64, 64, generator=generator), torch.tensor([[64.0, 60.0], [50.0, 64.0]]))


def pair(kind: str) -> tuple[DoubleHeadRCNN, DoubleHeadRCNN]:
    """A class-agnostic model with lively outputs, and a class-specific one with its weights."""
    torch.manual_seed(0)
    agnostic = build_detector(config(kind, True), CLASSES)
    for layer in agnostic.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        agnostic.detector.train()(images(), TARGETS)
    for head in agnostic.detector.heads.values():
        for layer in filter(None, (head.classifier, head.regressor)):
            torch.nn.init.normal_(layer.weight, std=0.5)
    specific = build_detector(config(kind, False), CLASSES)
    tiled = {
        name: tensor.repeat(CLASSES, *[1] * (tensor.dim() - 1)) if ".regressor." in name else tensor
        for name, tensor in agnostic.state_dict().items()
    }
    specific.load_state_dict(tiled)
    return agnostic.eval(), specific.eval()


@pytest.fixture(scope="module")
def ext() -> tuple[DoubleHeadRCNN, DoubleHeadRCNN]:
    return pair("double_head_ext")


@pytest.mark.parametrize("kind", ["fc", "double_head"])  # that one runs its conv-head on some RoIs alone
def test_detections(kind):
    agnostic, specific = pair(kind)
    assert agnostic.detector.heads["conv" if kind == "double_head" else "fc"].regressor.weight.shape[0] == 4
    with torch.no_grad():
        expected, found = specific.detector(images()), agnostic.detector(images())
    assert expected.count.min() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("readout", ["fused", "split", "fc", "conv"])
def test_read_outs(ext, readout):
    agnostic, specific = (copy.deepcopy(model) for model in ext)
    for model in (agnostic, specific):
        model.set_readout(readout)
    with torch.no_grad():
        torch.testing.assert_close(agnostic.detector(images()), specific.detector(images()))


def test_losses_and_gradients(ext):
    agnostic, specific = (copy.deepcopy(model).train() for model in ext)
    losses = []
    for model in (agnostic, specific):
        torch.manual_seed(1)
        losses.append(model.detector(images(), TARGETS))
        sum(losses[-1].values()).backward()
    torch.testing.assert_close(*losses)
    assert losses[0]["loss_conv_reg"] > 0
    of_classes = specific.detector.heads["conv"].regressor.weight.grad.view(CLASSES, 4, -1)
    torch.testing.assert_close(agnostic.detector.heads["conv"].regressor.weight.grad, of_classes.sum(0))


class HeadToDetections(torch.nn.Module):
    """What a class-agnostic model computes otherwise than others do."""

    def __init__(self, model: DoubleHeadRCNN) -> None:
        super().__init__()
        self.head, self.config = model.detector.heads["fc"], model.config

    def forward(self, pooled: torch.Tensor, boxes: torch.Tensor) -> Detections:
        proposals = Proposals(boxes, torch.ones_like(boxes[..., 0], dtype=torch.bool))
        sizes = boxes.new_tensor([[64.0, 64.0]]).expand(len(boxes), 2)
        readout = ReadOut(Sources(("fc",), "fc"), self.config.detection)
        return detect({"fc": self.head(pooled)}, readout, proposals, sizes, self.config.roi.box_weights)


def test_compiles_and_exports(ext):
    model = HeadToDetections(ext[0])
    arguments = torch.randn(6, 16, 7, 7), (torch.rand(2, 3, 4) * 30).cumsum(-1)
    with torch.no_grad():
        expected = model(*arguments)
        assert expected.count.min() > 0
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(*arguments), expected)
        torch.testing.assert_close(torch.export.export(model, arguments).module()(*arguments), expected)


def test_readers_of_the_analysis(ext):
    picture = torch.randint(256, (3, 64, 60), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    labels = torch.tensor([1, 3])
    readings = []
    for model in ext:
        reader = Reader("one", model, Recipe(model=model.config), list("abcd"), model.detector.readout)
        features = reader.features(picture, BOXES[1])
        readings.append(reader.read(features, features.boxes, labels))
    torch.testing.assert_close(*readings)


def test_checkpoints_remember_it(ext, tmp_path):
    agnostic, _ = ext
    recipe = Recipe(model=agnostic.config)
    save_model(tmp_path / "model.safetensors", agnostic, recipe, list("abcd"), [1, 2, 3, 4], 0)
    model, _, *_ = load_model(tmp_path / "model.safetensors")
    assert model.config == agnostic.config
    with torch.no_grad():
        torch.testing.assert_close(model.eval().detector(images()), agnostic.detector(images()))


def test_models_from_before_keep_their_shapes():
    values = to_dict(ModelConfig())
    del values["head"]["class_agnostic_boxes"], values["head"]["non_local"]["inner_dim"]
    assert from_dict(values, ModelConfig) == ModelConfig()
    head = dataclasses.replace(HeadConfig(), class_agnostic_boxes=False, non_local=NonLocalConfig(inner_dim=None))
    assert head == HeadConfig()
