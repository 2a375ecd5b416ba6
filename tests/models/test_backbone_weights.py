"""A backbone's weights: a ResNet of one's own, as trainers save it and under others' names, and ImageNet's."""

import dataclasses
import email.message
import io
import os
import pickle
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save, save_file
from torchvision.ops import FrozenBatchNorm2d

from doublehead.config import BackboneConfig
from doublehead.models import backbone
from doublehead.models.backbone import build_backbone
from doublehead.weights import WeightsError, digest, read_file, resnet_state
from doublehead.weights.resnets import caffe2_name

CONFIG = BackboneConfig("resnet18", weights=None, fpn_channels=8)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


def load(path, **changes):
    return build_backbone(dataclasses.replace(CONFIG, weights=str(path), **changes)).body.state_dict()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def other_classes(state, classes, name="fc"):
    body = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    return body | {f"{name}.weight": torch.zeros(classes, 512), f"{name}.bias": torch.zeros(classes)}


def detectron2(state):
    """Under the names of Detectron2's conversion of torchvision's weights."""
    found = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        for stage in range(1, 5):
            layer = layer.replace(f"layer{stage}.", f"res{stage + 1}.")
        layer = layer.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        layer = layer.replace("bn1", "conv1.norm").replace("bn2", "conv2.norm")
        layer = f"stem.{layer}" if layer.startswith(("conv1", "fc")) else layer
        found[f"{layer}.{part}"] = tensor.numpy()
    return {"model": found, "__author__": "torchvision", "matching_heuristics": True}


SOUND = {
    "1000 classes": lambda s: s,
    "10 classes": lambda s: other_classes(s, 10),
    "no classifier": lambda s: {name: tensor for name, tensor in s.items() if not name.startswith("fc.")},
    "another classifier": lambda s: prefixed("backbone.", other_classes(s, 1)) | {"head.fc.bias": torch.zeros(3)},
    "module.": lambda s: prefixed("module.", s),
    "state_dict, module._orig_mod.": lambda s: {"state_dict": prefixed("module._orig_mod.", s), "epoch": 3},
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {}}},
    "Lightning": lambda s: {"state_dict": prefixed("model.", other_classes(s, 5)), "global_step": 1},
    "Lightning's encoder": lambda s: {"state_dict": prefixed("model.encoder.", s)},
    "averaged": lambda s: {"model_ema": prefixed("module.", s) | {"n_averaged": torch.tensor(3)}},
    "half": lambda s: {name: t.half() if t.is_floating_point() else t for name, t in s.items()},
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_resnet_as_trainers_save_it(tmp_path, state, kind):
    torch.save(SOUND[kind](state), tmp_path / "r.pth")
    same(load(tmp_path / "r.pth"), state, tolerance=1e-3 if kind == "half" else 0)


def same(loaded, state, tolerance=0):
    for name in ("conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.weight"):
        torch.testing.assert_close(loaded[f"body.{name}"], state[name], rtol=tolerance, atol=tolerance)


def test_a_resnet_in_other_files(tmp_path, state):
    save_file(prefixed("module.", {name: tensor.contiguous() for name, tensor in state.items()}),
              tmp_path / "r.safetensors")  # fmt: skip
    same(load(tmp_path / "r.safetensors"), state)
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(detectron2(state)))
    same(load(tmp_path / "r.pkl"), state)
    resnet = build_backbone(dataclasses.replace(CONFIG, neck="none", weights=str(tmp_path / "r.safetensors")))
    assert torch.equal(resnet.conv5.state_dict()["0.conv1.weight"], state["layer4.0.conv1.weight"])


def test_a_detector_of_this_library(tmp_path, state):
    """Its backbone and pyramid, by the names that a wrapper made of them too; nothing of a damaged one."""
    own = build_backbone(CONFIG).body.state_dict()
    path, metadata = tmp_path / "model.safetensors", {"format": "doublehead.model/1"}
    for start in ("detector.backbone.", "_orig_mod.detector.backbone."):
        tensors = prefixed(start, own)
        written = save(tensors, digest.with_digest(metadata, tensors))
        path.write_bytes(written)
        assert torch.equal(load(path)["body.conv1.weight"], own["body.conv1.weight"])
    path.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model.safetensors was changed or damaged since it was written"):
        load(path)
    tensors = prefixed("detector.backbone.", own | {"body.conv1.weight": own["body.conv1.weight"] * torch.nan})
    path.write_bytes(save(tensors, digest.with_digest(metadata, tensors)))
    with pytest.raises(ValueError, match="NaN or infinity in body.conv1.weight"):
        load(path)


WRONG = {
    "cut off": (lambda s, p: os.truncate(saved(s, p), 100_000), "truncated or damaged"),
    "a folder": (lambda s, p: p.mkdir(), "a folder"),
    "text": (lambda s, p: p.write_text("no weights"), "not a checkpoint"),
    "code": (lambda s, p: torch.save(torch.nn.Linear(1, 1), p), "names torch.nn.modules.linear.Linear, which is code"),
    "no numbers": (lambda s, p: torch.save({"conv1.weight": 3}, p), "'conv1.weight' is a int"),
    "NaN": (lambda s, p: saved(s | {"bn1.bias": torch.full((64,), torch.nan)}, p), "NaN or infinity in bn1.bias"),
    "more than float32 has": (lambda s, p: saved(s | {"bn1.bias": torch.full((64,), 1e300, dtype=torch.float64)}, p),
                              "NaN or infinity in bn1.bias"),
    "a missing tensor": (lambda s, p: saved({n: s[n] for n in s if n != "layer3.0.conv1.weight"}, p),
                         "missing layer3.0.conv1.weight, unexpected nothing"),
    "another tensor": (lambda s, p: saved(s | {"layer3.0.se.weight": torch.zeros(1)}, p),
                       "missing nothing, unexpected layer3.0.se.weight"),
    "gray pictures": (lambda s, p: saved(s | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, p),
                      "size mismatch for conv1.weight: (64, 1, 7, 7)"),
    "whole numbers": (lambda s, p: saved(s | {"bn1.bias": torch.zeros(64, dtype=torch.int8)}, p), "torch.int8"),
    "a detector": (lambda s, p: saved(prefixed("backbone.body.", s) | {"rpn.x": torch.zeros(1)}, p),
                   "more than a ResNet: rpn.x. A detector of another project: doublehead convert"),
    "two": (lambda s, p: saved(prefixed("encoder_q.", s) | prefixed("encoder_k.", s), p), "several ResNets"),
    "another network": (lambda s, p: saved({"blocks.0.weight": torch.zeros(1)}, p), "no ResNet with torchvision's"),
}  # fmt: skip


def saved(state, path):
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_in_a_line(tmp_path, state, kind):
    breaks, message = WRONG[kind]
    breaks(state, tmp_path / "r.pth")
    with pytest.raises(ValueError) as refused:
        load(tmp_path / "r.pth")
    said = str(refused.value)
    assert message in said and said.startswith("backbone.weights: ") and str(tmp_path / "r.pth") in said
    assert "\n" not in said and len(said) < 500


# ---------------------------------------------------------------------------------------------
# Caffe2's names


def caffe2_names(name):
    """The blob of a tensor of torchvision's ResNet-50; None: Caffe2 has none."""
    layer, _, part = name.rpartition(".")
    if part not in ("weight", "bias") or layer == "fc":
        return {"fc.weight": "pred_w", "fc.bias": "pred_b"}.get(name)
    if layer in ("conv1", "bn1"):
        return "conv1_w" if layer == "conv1" else f"res_conv1_bn_{part[0].replace('w', 's')}"
    stage, block, *rest = layer.split(".")
    kind, number = rest[0][:-1], rest[0][-1]
    norm = kind == "bn" or rest == ["downsample", "1"]
    branch = "branch1" if rest[0] == "downsample" else f"branch2{'abc'[int(number) - 1]}"
    return f"res{int(stage[5:]) + 1}_{block}_{branch}_" + (f"bn_{part[0].replace('w', 's')}" if norm else "w")


def test_caffe2_names():
    for name in ("resnet50", "resnet101"):
        with torch.device("meta"):
            names = list(getattr(torchvision.models, name)(weights=None).state_dict())
        blobs = {caffe2_names(name): name for name in names if caffe2_names(name)}
        assert blobs["res4_5_branch2c_bn_b"] == "layer3.5.bn3.bias"
        assert blobs["res2_0_branch1_w"] == "layer1.0.downsample.0.weight"
        for blob, target in blobs.items():
            assert caffe2_name(blob) == (None if blob.startswith("pred") else target)


def test_msra_weights(tmp_path, monkeypatch):
    """A file as Detectron's R-50.pkl; random."""
    torch.manual_seed(0)
    blobs = {}
    for name, tensor in torchvision.models.resnet50(weights=None).state_dict().items():
        if (blob := caffe2_names(name)) is not None:
            blobs[blob] = (torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else tensor).numpy()
    blobs |= {"conv1_b": np.zeros(64, np.float32), "res2_0_branch2a_w_momentum": np.zeros(3, np.float32)}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    config = dataclasses.replace(CONFIG, name="resnet50", weights=str(path), stride_in_1x1=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        body = build_backbone(config).body.body
    block = body["layer2"][0]
    assert block.conv1.stride == (2, 2) and torch.equal(block.conv1.weight, torch.tensor(blobs["res3_0_branch2a_w"]))
    x = torch.randn(1, 512, 4, 4)
    for norm, blob in ((block.bn3, "res3_0_branch2c_bn"), (block.downsample[1], "res3_0_branch1_bn")):
        scale, bias = (torch.tensor(blobs[f"{blob}_{part}"])[:, None, None] for part in "sb")
        torch.testing.assert_close(norm(x), x * scale + bias, rtol=1e-6, atol=1e-6)  # an epsilon would be 5e-6

    monkeypatch.setattr(backbone, "_load", lambda *arguments, **more: None)  # takes a second
    config = dataclasses.replace(config, stride_in_1x1=False)
    with pytest.warns(UserWarning, match="R-50.pkl has Caffe2's names, .* set --model.backbone.stride-in-1x1 True"):
        build_backbone(config)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_a_scale_has_no_epsilon(tmp_path, eps):
    ones = np.ones(2, np.float32)
    content = {"conv1_w": ones, "res_conv1_bn_s": 3 * ones, "res_conv1_bn_b": ones}  # without "blobs", as some are
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(content))
    state = resnet_state(tmp_path / "r.pkl", read_file(tmp_path / "r.pkl"), eps)
    norm = FrozenBatchNorm2d(2, eps)
    norm.load_state_dict({name.removeprefix("bn1."): t for name, t in state.tensors.items() if name != "conv1.weight"})
    assert state.caffe2 and torch.equal(norm(torch.full((1, 2, 1, 1), 2.0)), torch.full((1, 2, 1, 1), 7.0))


def test_blobs_that_are_no_resnet(tmp_path):
    blobs = {"conv1_w": np.zeros(1, np.float32), "fpn_inner_res2_2_sum_w": np.zeros(1, np.float32)}
    with pytest.raises(WeightsError, match="blobs that no ResNet has: fpn_inner_res2_2_sum_w"):
        resnet_state(tmp_path / "d.pkl", {"blobs": blobs}, 1e-5)


# ---------------------------------------------------------------------------------------------
# ImageNet's


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """PyTorch's cache, empty, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def refuse(*arguments, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name, file", [("resnet50", "resnet50-0676ba61.pth"), ("resnet18", "resnet18-f37072fd.pth")])
def test_without_a_network_the_file_and_its_place_are_named(hub, name, file):
    with pytest.raises(ValueError) as refused:
        build_backbone(BackboneConfig(name))
    said = str(refused.value)
    assert said == (
        f"backbone.weights: the ImageNet weights {file} cannot be fetched (no network): put "
        f"https://download.pytorch.org/models/{file} at {hub / file}, or give --model.backbone.weights PATH of a "
        "ResNet's weights, or None to start from scratch"
    )


class Page(io.BytesIO):
    """What a proxy answers instead of the file."""

    def info(self):
        return email.message.Message()


class Broken(Page):
    """A connection that ends in the middle."""

    def read(self, size=-1):
        if self.tell():
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().read(5)


@pytest.mark.parametrize(
    "answer, reason",
    [
        (Page, r"invalid hash value \(expected \"f37072fd\", got \"\w+\"\)"),
        (Broken, ".*Connection reset by peer"),
    ],
)
def test_what_is_not_the_file_is_not_kept(hub, monkeypatch, answer, reason):
    monkeypatch.setattr("torch.hub.urlopen", lambda *arguments, **more: answer(b"<html>Please log in</html>"))
    with pytest.raises(ValueError, match=rf"weights resnet18-f37072fd.pth cannot be fetched \({reason}\): put https"):
        build_backbone(BackboneConfig("resnet18"))
    assert not list(hub.iterdir())


def test_imagenet_weights_in_the_cache(hub, state):
    hub.mkdir(parents=True)
    file = hub / "resnet18-f37072fd.pth"
    torch.save(state, file)
    same(build_backbone(BackboneConfig("resnet18")).body.state_dict(), state)
    os.truncate(file, 1000)
    with pytest.raises(ValueError, match=f"in {file} are damaged .*: remove it, to fetch them again, or give"):
        build_backbone(BackboneConfig("resnet18"))
