"""The command line, the formats of files, what is refused and how, and what is written."""

import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from doublehead.cli.convert import main
from doublehead.engine.checkpoint import load_model
from doublehead.engine.errors import CheckpointError
from doublehead.engine.files import read_recipe
from doublehead.interop.classes import COCO, VOC, name_classes
from doublehead.interop.formats import convert
from doublehead.interop.loading import Checkpoint, read_checkpoint
from doublehead.interop.mapping import ConversionError
from doublehead.interop.mmdet.configuration import class_names
from tests.support.torchvision_states import torchvision_state, write


@pytest.fixture(scope="module")
def small():
    """A torchvision state_dict: ResNet-18, a narrow pyramid, 3 classes."""
    return torchvision_state(3)


def fails(capsys, *arguments):
    """The message that the command line ends with; DST must not be there afterwards."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    assert not Path(arguments[1]).exists()
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# What is written and said


def test_a_folder_is_written_that_the_other_commands_take(tmp_path, capsys, small):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nred panda\n\n")
    src = write(tmp_path, {"model": small, "optimizer": {"state": {}}, "epoch": 3})
    main([str(src), str(tmp_path / "out"), "--classes", str(names), "--set", "model.image.min_size=[64]"])
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "recipe.json"]
    loaded = load_model(tmp_path / "out")
    assert loaded.classes == ["cat", "dog", "red panda"] and loaded.category_ids == [1, 2, 3]
    assert loaded.recipe == read_recipe(tmp_path / "out")
    assert loaded.recipe.name == "torchvision-faster-rcnn-r18-fpn"
    assert loaded.recipe.model.image.min_size == (64,)
    state = loaded.model.state_dict()
    for name in ("backbone.body.layer3.1.conv2.weight", "backbone.fpn.inner_blocks.2.0.bias"):
        assert torch.equal(state[f"detector.{name}"], small[name])
    assert torch.equal(state["detector.heads.fc.classifier.weight"], small["roi_heads.box_predictor.cls_score.weight"])
    said = capsys.readouterr().out
    assert "torchvision's Faster R-CNN, 3 classes: cat, dog, red panda" in said
    assert "148 tensors: 148 used, 0 left out" in said or f"{len(small)} tensors: {len(small)} used" in said
    assert "entry 'optimizer' of the file: the optimizer's state" in said
    assert "model.backbone.norm_eps          0   <- the weights cannot tell: 0 as in the published COCO_V1" in said
    assert "model.image.min_size             [64]\n" in said  # given, and so not doubtful


def test_what_is_left_out_is_named_with_the_reason(tmp_path, capsys, small):
    state = small | {"roi_heads.mask_head.0.0.weight": torch.zeros(1), "roi_heads.mask_predictor.x": torch.zeros(1)}
    main([str(write(tmp_path, state)), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "torchvision's Mask R-CNN (its box branch)" in said
    assert "2 left out\n  2 x the mask branch: roi_heads.mask_head.0.0.weight, roi_heads.mask_predictor.x" in said


def test_a_folder_with_files_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "no such file"), str(tmp_path / "out")])
    assert "already holds files" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "no such file"), str(tmp_path / "out" / "mine")])
    assert "a file: give a new or an empty folder" in capsys.readouterr().err


def test_a_state_dict_as_safetensors(tmp_path, small):
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in small.items()}, tmp_path / "m.safetensors"
    )
    main([str(tmp_path / "m.safetensors"), str(tmp_path / "out")])
    assert load_model(tmp_path / "out").classes == ["class 1", "class 2", "class 3"]
    with pytest.raises(CheckpointError, match="already a model of this library"):
        read_checkpoint(tmp_path / "out" / "model.safetensors")


def test_half_precision_and_old_files(tmp_path, small):
    state = {f"module.{name}": tensor.half() for name, tensor in small.items()}
    src = write(tmp_path, {"state_dict": state}, _use_new_zipfile_serialization=False)
    checkpoint = read_checkpoint(src)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    assert checkpoint.notes and set(checkpoint.tensors) == set(small)


# ---------------------------------------------------------------------------------------------
# COCO's 90 numbers for 80 classes


def test_coco_models_of_torchvision_are_evaluated_with_the_right_ids(tmp_path, test_data, capsys):
    from doublehead.cli.evaluate import main as evaluate

    # Every picture shows what these two heads answer: category 62 is a chair, and 66 was never used.
    state = torchvision_state(90)
    bias = torch.zeros(91)
    bias[62], bias[66] = 9.0, 8.9
    state["roi_heads.box_predictor.cls_score.bias"] = bias
    main([str(write(tmp_path, state)), str(tmp_path / "out"), "--set", "model.image.min_size=[64]",
          "model.rpn.post_nms_test=5"])  # fmt: skip
    loaded = load_model(tmp_path / "out")
    assert loaded.category_ids == list(range(1, 91))
    assert loaded.classes[61] == "chair" and loaded.classes[65] == "unused 66" and loaded.recipe.data.format == "coco"
    results = tmp_path / "results.json"
    evaluate([str(tmp_path / "out"), "--data.root", str(test_data / "tiny_coco"), "--data.val-split", "train2017",
              "--data.val-images", "2", "--data.workers", "0", "--out", str(results)])  # fmt: skip
    found = {entry["category_id"] for entry in json.loads(results.read_text())}
    assert 62 in found and len(found) == 2
    assert not found & set(COCO) - {62}  # the unused number is none of the data set's


def test_class_names():
    assert name_classes(80, None) == (list(COCO.values()), list(COCO))
    assert name_classes(20, None)[0] == list(VOC)
    names, ids = name_classes(90, None)
    assert names[0] == "person" and names[11] == "unused 12" and names[89] == "toothbrush" and ids == list(range(1, 91))
    assert len(set(names)) == 90
    shuffled = list(reversed(COCO.values()))
    assert name_classes(80, shuffled) == (shuffled, list(reversed(COCO)))
    for given, message in [
        (["a"], "1 class names for a model of 2"),
        (["a", "a"], "more than once: a"),
        (["a", ""], "is empty"),
        (["a", "b\nc"], r"the class name 'b\\nc' has a control character inside"),
        (["a", "a "], "more than once: a"),
    ]:
        with pytest.raises(ConversionError, match=message):
            name_classes(2, given)
    assert name_classes(2, ["a\n", "\ufeffb"])[0] == ["a", "b"]


# ---------------------------------------------------------------------------------------------
# Files that cannot be read


class Evil:
    """Whoever unpickles it makes a folder beside the file."""

    def __init__(self, path):
        self.mark = str(path.parent / "executed")

    def __reduce__(self):
        return os.mkdir, (self.mark,)


BROKEN = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "a folder; give the checkpoint's file"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "text": (lambda path: path.write_text("hello, this is no checkpoint"), "not a checkpoint"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "a web page"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "code, torch": (lambda path: torch.save({"model": Evil(path)}, path), "names posix.mkdir, which is code"),
    "code, old torch": (
        lambda path: torch.save({"model": Evil(path)}, path, _use_new_zipfile_serialization=False),
        "names posix.mkdir, which is code",
    ),
    "code, pickle": (lambda path: path.write_bytes(pickle.dumps({"model": Evil(path)})), "names posix.mkdir, which is"),
    "code, getattr": (
        lambda path: torch.save({"meta": getattr_of("append")}, path),
        "names getattr",
    ),
    "code, codec": (lambda path: path.write_bytes(pickle.dumps(Codec())), "names _codecs.encode"),
    "foreign memory": (
        lambda path: path.write_bytes(b"cnumpy\nndarray\n((I1000\ntS'f4'\ntR."),
        "calls numpy.ndarray as numpy itself never does",
    ),
    "Python's own limits": (  # a key whose hash overflows the stack
        lambda path: path.write_bytes(b"\x80\x02(d)" + b"\x85" * 100_000 + b"Ns."),
        "has a tuple as a key",
    ),
    "a list": (lambda path: torch.save([torch.zeros(1)], path), "holds a list, not a dictionary"),
    "numbers": (lambda path: torch.save({"a": 3}, path), "'a' is a int, where a state_dict has tensors"),
    "nothing": (lambda path: torch.save({"state_dict": {}}, path), "no tensors in it"),
    "Detectron 1": (lambda path: path.write_bytes(pickle.dumps({"blobs": {}})), "first Detectron"),
    "Caffe2 names": (
        lambda path: path.write_bytes(pickle.dumps({"model": {"a": np.zeros(1)}, "matching_heuristics": True})),
        "Caffe2's names",
    ),
}


def getattr_of(name):
    class Getattr:
        def __reduce__(self):
            return getattr, ([], name)

    return Getattr()


class Codec:
    def __reduce__(self):
        import _codecs

        return _codecs.encode, ("x", "zip")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path, capsys, kind):
    breaks, message = BROKEN[kind]
    breaks(tmp_path / "model.pth")
    said = fails(capsys, tmp_path / "model.pth", tmp_path / "out")
    assert message in said and str(tmp_path / "model.pth") in said
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path, capsys, kind, share):
    path, state = tmp_path / "m", {f"layer{i}.weight": torch.rand(300) for i in range(20)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    elif kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    os.truncate(path, int(path.stat().st_size * share))
    assert "truncated" in fails(capsys, path, tmp_path / "out")


def test_logs_and_numbers_in_a_checkpoint_of_mmengine(tmp_path, monkeypatch):
    """HistoryBuffer as mmengine pickles it: numpy arrays, and its methods by getattr."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __getstate__(self):
            return {"log": np.zeros(3), "count": np.ones(3, np.int64), "methods": {"mean": HistoryBuffer.mean}}

        @classmethod
        def mean(cls):
            """A bound method, which pickle writes as getattr(HistoryBuffer, "mean")."""

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {
        "state_dict": {"neck.x": torch.ones(2)},
        "message_hub": {"loss": HistoryBuffer(), "step": np.int64(3), "best": np.float32(0.5)},
        "meta": {"dataset_meta": {"classes": ("a", "b")}},
    }
    checkpoint = read_checkpoint(write(tmp_path, content))
    assert checkpoint.tensors["neck.x"].tolist() == [1, 1] and class_names(checkpoint.meta) == ["a", "b"]
    assert checkpoint.ignored["message_hub"] == "logs of the training"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_pickle_protocol(tmp_path, protocol):
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3), "c": np.ones(2, ">f4")}
    content = pickle.dumps({"model": OrderedDict(arrays), "__author__": "x"}, protocol=protocol)
    for numpy in (b"numpy.core.", b"numpy._core."):  # numpy 1 and 2 call their modules so
        if protocol < 4:  # later ones write lengths
            content = content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", numpy)
        (tmp_path / "m.pkl").write_bytes(content)
        tensors = read_checkpoint(tmp_path / "m.pkl").tensors
        assert tensors["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["c"].tolist() == [1, 1]
        assert tensors["b"].shape == ()


# ---------------------------------------------------------------------------------------------
# Models that cannot be converted


def checkpoint_of(*names, **tensors):
    return Checkpoint(Path("m.pth"), {name: torch.zeros(1) for name in names} | tensors)


FOREIGN = {
    "version 2 of torchvision's": ["backbone.body.conv1.weight", "rpn.head.conv.1.0.weight"],
    "torchvision's RetinaNet, FCOS": ["backbone.body.conv1.weight", "head.classification_head.conv.0.0.weight"],
    "torchvision's SSD": ["backbone.features.0.weight"],
    "a detector on MobileNet": ["backbone.body.0.0.weight", "roi_heads.box_predictor.cls_score.weight"],
    "a Cascade R-CNN of Detectron2": ["backbone.bottom_up.res2.0.conv1.weight", "roi_heads.box_head.0.fc1.weight"],
    "a RetinaNet of Detectron2": ["backbone.bottom_up.stem.conv1.weight", "head.cls_subnet.0.weight"],
    "of Detectron2 without a pyramid": ["backbone.stem.conv1.weight", "roi_heads.res5.0.conv1.weight"],
    "a RetinaNet of MMDetection": ["neck.lateral_convs.0.conv.weight", "bbox_head.retina_cls.weight"],
    "a Cascade R-CNN of MMDetection": ["rpn_head.rpn_conv.weight", "roi_head.bbox_head.0.fc_cls.weight"],
    "MMDetection 1.x": ["rpn_head.rpn_conv.weight", "bbox_head.shared_fcs.0.weight"],
    "a RetinaNet of maskrcnn-benchmark": ["backbone.body.stem.conv1.weight", "rpn.head.cls_tower.0.weight"],
    "of maskrcnn-benchmark without a pyramid": ["backbone.body.stem.conv1.weight",
                                               "roi_heads.box.feature_extractor.head.layer4.0.conv1.weight"],
    "non-local blocks for regression alone": ["roi_heads.box.feature_extractor.reg_nonlocal.0.g.weight"],
    "a ResNet alone, not a detector": ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"],
    "not a detector of a known project": ["model.0.conv.weight"],
    "not a ResNet with a pyramid": ["backbone.bottom_up.stem.conv1.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_models_are_named(kind):
    with pytest.raises(ConversionError, match=kind):
        convert(checkpoint_of(*FOREIGN[kind]))


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


FC6, CLS, BOX = "roi_heads.box_head.fc6", "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
WRONG = {
    "missing": (lambda s: without(s, "backbone.fpn.layer_blocks.1.0.bias"), "missing: backbone.fpn.layer_blocks"),
    "missing width": (lambda s: without(s, f"{FC6}.weight"), f"missing: {FC6}.weight"),
    "unknown": (lambda s: s | {"roi_heads.extra.weight": torch.zeros(1)}, "unknown meaning: roi_heads.extra.weight"),
    "more than float32 has": (lambda s: s | {f"{CLS}.bias": torch.full((4,), 1e300, dtype=torch.float64)},
                              f"NaN, .* in place of weights: {CLS}.bias"),
    "no place": (lambda s: s | {"backbone.body.layer4.1.conv9.weight": torch.zeros(1)}, "without a place in"),
    "shape": (lambda s: s | {"rpn.head.conv.0.0.bias": torch.zeros(5)}, r"'rpn.head.conv.0.0.bias' has shape \(5,\)"),
    "anchors": (lambda s: s | {"rpn.head.cls_logits.weight": torch.zeros(15, 16, 1, 1)}, "rpn.head.cls_logits.weight"),
    "agnostic": (lambda s: s | {f"{BOX}.weight": torch.zeros(4, 8)}, "class-agnostic"),
    "terabytes": (  # a second layer of 2^40 numbers, which the first one only claims
        lambda s: s | {f"{FC6}.weight": torch.zeros(2**20, 16)},
        r"of wrong shape: .*box_head.fc6.bias' has shape",
    ),
    "one class": (lambda s: s | {f"{CLS}.weight": torch.zeros(1, 8)}, "no class besides the background"),
    "a vector": (lambda s: s | {f"{CLS}.weight": torch.zeros(4)}, "of 2 dimensions is needed"),
    "map": (lambda s: s | {f"{FC6}.weight": torch.zeros(8, 800)}, "do not form a square map of 16 channels"),
    "ResNet-34": (
        lambda s: s | {f"backbone.body.layer1.2.conv{k}.weight": torch.zeros(64, 64, 3, 3) for k in (1, 2)},
        r"\(3, 2, 2, 2\) basic blocks",
    ),
    "ResNeXt": (lambda s: s | {"backbone.body.layer1.0.conv2.weight": torch.zeros(64, 4, 3, 3)}, "a ResNeXt"),
    "NaN": (lambda s: s | {f"{CLS}.bias": torch.full((4,), torch.nan)}, f"NaN, .* in place of weights: {CLS}.bias"),
    "whole numbers": (lambda s: s | {f"{CLS}.bias": torch.zeros(4, dtype=torch.int8)}, f"whole numbers .*: {CLS}.bias"),
    "twice": (lambda s: s | {"rpn.head.conv.bias": torch.zeros(16)}, "are both for detector.rpn.conv.bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_do_not_make_a_model(tmp_path, capsys, small, kind):
    change, message = WRONG[kind]
    src = write(tmp_path, change(dict(small)))
    with pytest.raises(ConversionError, match=message):
        convert(read_checkpoint(src))
    fails(capsys, src, tmp_path / "out")


def test_a_wrong_format_is_an_error(tmp_path, capsys, small):
    src = write(tmp_path, small)
    assert "no tensor backbone.bottom_up.res2.*" in fails(capsys, src, tmp_path / "out", "--format", "detectron2")
    assert "torchvision's detectors have one" in fails(capsys, src, tmp_path / "out", "--style", "caffe")
    assert "3 classes" in fails(capsys, src, tmp_path / "out", "--classes", write_names(tmp_path, "a\nb"))
    assert "no field 'colour'" in fails(capsys, src, tmp_path / "out", "--set", "model.colour=1")
    assert "anchor_sizes" in fails(capsys, src, tmp_path / "out", "--set", "model.rpn.anchor_sizes=[8, 16]")


def write_names(tmp_path, text):
    (tmp_path / "names.txt").write_text(text)
    return tmp_path / "names.txt"
