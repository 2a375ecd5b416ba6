"""Models in files: every kind comes back, also from a wrapper; what is damaged, foreign or not finite is refused."""

import dataclasses
import json
import math
import sys
import tracemalloc

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from doublehead.cli import detect, evaluate, export
from doublehead.config import BackboneConfig, HeadConfig, ModelConfig, NonLocalConfig, Recipe, to_dict
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.engine.errors import CheckpointError
from doublehead.exporting import onnx_file  # noqa: F401 (before `tiny`: it needs the real models)
from doublehead.models import build_detector
from doublehead.models.readout import BRANCHES
from tests.support.damaged_files import damaged
from tests.support.engine_standin import TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)

CLASSES, IDS = ["a", "b"], [2, 5]


def small(kind="double_head_ext", **head):
    neck = "none" if kind == "conv5" else "fpn"
    backbone = BackboneConfig(
        "resnet18", norm="batch_norm", weights=None, frozen_stages=0, fpn_channels=8, neck=neck
    )  # fmt: skip
    non_local = NonLocalConfig(enabled=True, groups=2)
    heads = HeadConfig(kind, fc_dim=8, conv_dim=16, conv_blocks=1, non_local=non_local)
    return Recipe("small", model=ModelConfig(backbone=backbone, head=dataclasses.replace(heads, **head)))


@pytest.fixture
def tiny(monkeypatch):
    """Files are of tiny detectors: the real ones are tens of megabytes."""
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())


def content(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model's file; its metadata and tensors."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, TinyDetector(3), small(), CLASSES, IDS, step=4)
    return path, *content(path)


@pytest.fixture
def write(saved, tmp_path):
    """Writes the file again by hand: with other metadata, other tensors, with the digest as it was or without."""
    path, metadata, tensors = saved

    def write(describe=None, change=None, digest=True):
        new = metadata | (describe or {})
        if not digest:
            new = {name: text for name, text in new.items() if not name.startswith("digest")}
        safetensors.torch.save_file(tensors | (change(tensors) if change else {}), tmp_path / path.name, new)
        return tmp_path / path.name

    return write


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        load_model(path, **options)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and len(said.splitlines()) == 1 and len(said) < 900
    return said.removeprefix(f"{path}: ")


# ---------------------------------------------------------------------- what is written can be read


@pytest.mark.parametrize("kind", BRANCHES)
def test_every_kind_of_head_comes_back(tmp_path, kind):
    recipe = small(kind)
    model = build_detector(recipe.model, 3)
    save_model(tmp_path / "model.safetensors", model, recipe, CLASSES, IDS)
    loaded = load_model(tmp_path)
    assert loaded.recipe == recipe and loaded.category_ids == IDS
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name


def with_compiled_parts(model):
    model.features[3] = torch.compile(model.features[3])
    model.features = torch.compile(model.features)
    model.locate = nn.DataParallel(model.locate)
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "parts compiled": with_compiled_parts,
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled, then parallel, then averaged": lambda model: torch.optim.swa_utils.AveragedModel(
        nn.DataParallel(torch.compile(model))
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_written_by_its_own_names(saved, tmp_path, tiny, kind):
    path = tmp_path / "model.safetensors"
    save_model(path, WRAPPERS[kind](load_model(saved[0]).model), small(), CLASSES, IDS, step=4)
    metadata, tensors = content(path)
    assert metadata == saved[1] and tensors.keys() == saved[2].keys()  # the digest, too
    assert load_model(path).classes == CLASSES


@pytest.mark.parametrize("start", ["_orig_mod.", "module.", "module._orig_mod."])
def test_files_of_earlier_versions_with_the_names_of_a_wrapper(saved, tmp_path, tiny, start):
    path, metadata, tensors = saved
    old = {name: text for name, text in metadata.items() if not name.startswith("digest")}
    wrapped = {f"{start}{name}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(wrapped, tmp_path / path.name, old)
    assert torch.equal(load_model(tmp_path).model.classify.weight, tensors["classify.weight"])


def test_words_of_a_file_stay_one_line(saved, tmp_path, tiny):
    path, metadata, tensors = saved
    safetensors.torch.save_file(tensors | {"two\nlines" + "x" * 5000: torch.ones(3)}, tmp_path / path.name, metadata)
    assert "unexpected two linesxxx" in refusal(tmp_path / path.name)
    other = metadata | {"format": "doublehead.model/\n" + "x" * 5000}
    safetensors.torch.save_file(tensors, tmp_path / path.name, other)
    assert "written in doublehead.model/ xxx" in refusal(tmp_path / path.name)


def test_a_tensor_that_is_there_under_both_names(saved, tmp_path, tiny):
    path, metadata, tensors = saved
    safetensors.torch.save_file(tensors | {"module.classify.bias": torch.ones(3)}, tmp_path / path.name, metadata)
    assert "some tensors are there twice" in refusal(tmp_path / path.name)


def test_no_part_of_a_detector_is_named_like_a_wrapper():
    from doublehead.weights.wrappers import COUNTERS, WRAPPERS

    for kind in BRANCHES:
        with torch.device("meta"):
            model = build_detector(small(kind).model, 3)
        assert not {part for name in model.state_dict() for part in name.split(".")} & (WRAPPERS | COUNTERS).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_taken_where_no_value_changes(write, saved, tiny, dtype):
    def change(tensors):
        return {name: t.to(dtype) for name, t in tensors.items() if t.is_floating_point()}

    loaded = load_model(write(change=change, digest=False)).model.state_dict()
    for name, tensor in saved[2].items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.to(dtype).to(tensor.dtype))


def test_what_cannot_be_read_is_not_written(tmp_path):
    for classes, ids, words in (([], [], "at least one"), (["a"], [1, 2], "a list of 1"), (["a", "a"], [1, 2], "'a'")):
        with pytest.raises(CheckpointError, match=f"model.safetensors: not written: .*{words}"):
            save_model(tmp_path / "model.safetensors", TinyDetector(2), Recipe(), classes, ids)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- damage


def test_no_damage_to_a_file_goes_unseen(tmp_path, tiny, rounds, seeded):
    path = tmp_path / "model.safetensors"
    save_model(path, TinyDetector(3), Recipe(), CLASSES, IDS)
    whole, unseen = path.read_bytes(), []
    for _ in range(rounds(300)):
        seed = seeded.getrandbits(32)
        path.write_bytes(damaged(whole, seed))
        try:
            load_model(path)
            unseen.append(seed)
        except CheckpointError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert not unseen


def test_what_was_changed_by_hand_is_noticed_unless_the_file_is_an_old_one(write, tiny):
    name = "classify.bias"

    def change(tensors):
        return {name: tensors[name] + 1}

    assert "changed or damaged since it was written" in refusal(write(change=change))
    assert "changed or damaged" in refusal(write({"classes": '["a", "c"]'}))
    assert "changed or damaged" in refusal(write({"note": "mine"}))
    assert "changed or damaged" in refusal(write({"digest": "0" * 64}))
    assert load_model(write(change=change, digest=False)).classes == CLASSES


WRONG_LABELS = {
    "a number": ({"classes": "7"}, "classes: expected a list, got 7"),
    "numbers": ({"classes": "[1, 2]"}, "classes[0]: expected text, got 1"),
    "empty name": ({"classes": '["a", " "]'}, "classes[1]: expected text, got ' '"),
    "twice": ({"classes": '["a", "a"]'}, "classes: 'a' is there twice"),
    "none": ({"classes": "[]"}, "classes: expected at least one"),
    "no JSON": ({"classes": "["}, "its classes is not JSON"),
    "deep": ({"classes": "[" * 200_000}, "its classes is not JSON"),
    "few ids": ({"category_ids": "[1]"}, "category_ids: expected a list of 2, got a list of 1"),
    "ids as text": ({"category_ids": '["1", "2"]'}, "category_ids[0]: expected a whole number, got '1'"),
    "truth as id": ({"category_ids": "[true, 2]"}, "category_ids[0]: expected a whole number, got True"),
    "ids twice": ({"category_ids": "[3, 3]"}, "category_ids: 3 is there twice"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_labels_that_are_none(write, kind):
    describe, words = WRONG_LABELS[kind]
    said = refusal(write(describe, digest=False))
    assert words in said and "description cannot be used" in said


WRONG_RECIPES = {
    "no dictionary": ("model.backbone", 3, "model.backbone is 3, a dictionary of BackboneConfig fields is accepted"),
    "text": ("model.head.fc_dim", "8", "model.head.fc_dim is '8', a whole number of at least 0 is accepted"),
    "truth": ("model.head.fc_dim", True, "model.head.fc_dim is True, a whole number of at least 0 is accepted"),
    "a fraction": ("model.head.fc_dim", 8.5, "model.head.fc_dim is 8.5, a whole number of at least 0 is accepted"),
    "number for truth": ("model.head.fused", 1, "model.head.fused is 1, true or false is accepted"),
    "NaN": ("model.rpn.nms_iou", math.nan, "model.rpn.nms_iou is nan, a finite number is accepted"),
    "not named so": ("model.head.kind", "triple", "model.head.kind is 'triple', one of fc, conv,"),
    "no list": ("model.image.min_size", 800, "model.image.min_size is 800, a list of at least 1 is accepted"),
    "text in a list": ("model.rpn.anchor_sizes", [8, "x"], "model.rpn.anchor_sizes[1] is 'x', a finite number"),
    "short list": ("model.roi.box_weights", [1, 2], "model.roi.box_weights is [1, 2], a list of 4 is accepted"),
    "negative": ("model.backbone.fpn_channels", -8, "model.backbone.fpn_channels is -8, a whole number of at least 0"),
    "terabytes": ("model.backbone.fpn_channels", 2**20, "its weights do not fit its recipe: missing"),
    "overflow": ("model.backbone.fpn_channels", 2**40, "its recipe makes no model (Storage size calculation"),
    "beyond numbers": ("model.backbone.fpn_channels", 10**400, "fpn_channels is a huge number, a whole number of"),
    "too deep": ("model.head.conv_blocks", 10**9 + 1, "conv_blocks is 1000000001, with"),
    "one deeper": ("model.head.conv_blocks", 3, "its weights do not fit its recipe: missing"),
}


@pytest.mark.parametrize("kind", WRONG_RECIPES)
def test_recipes_of_no_model(write, kind):
    name, value, words = WRONG_RECIPES[kind]
    recipe = json.loads(json.dumps(to_dict(small())))
    *path, last = name.split(".")
    inner = recipe
    for part in path:
        inner = inner[part]
    inner[last] = value
    path = write({"recipe": json.dumps(recipe)}, digest=False)
    tracemalloc.start()
    try:
        assert words in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_no_weights(write, tiny, dtype):
    def change(tensors):
        return {"classify.bias": tensors["classify.bias"].to(dtype)}

    assert "classify.bias is of" in refusal(write(change=change, digest=False))


def test_fractions_that_float32_does_not_have(write, tiny):
    def change(tensors):
        return {"classify.bias": torch.full((3,), 0.1, dtype=torch.float64)}

    said = refusal(write(change=change, digest=False))
    assert "classify.bias is of float64, which does not become the recipe's float32 unchanged" in said


# ---------------------------------------------------------------------- NaN and infinity


def not_finite(saved, folder, value=math.nan):
    model = load_model(saved[0]).model
    with torch.no_grad():
        model.classify.bias[1] = value
        model.features[1].running_var[0] = value
    save_model(folder / "model.safetensors", model, small(), CLASSES, IDS)
    return folder / "model.safetensors"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(saved, tmp_path, tiny, value):
    path = not_finite(saved, tmp_path, value)
    said = refusal(path)
    assert said.startswith("NaN or infinite numbers in 2 of its ") and "damaged" not in said
    assert "(features.1.running_var, classify.bias)" in said
    assert not load_model(path, finite=False).model.classify.bias[1].isfinite()


@pytest.mark.parametrize("command", [evaluate, detect, export], ids=lambda module: module.__name__)
def test_commands_refuse_weights_that_are_not_finite(saved, tmp_path, tiny, capsys, command):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    path = not_finite(saved, tmp_path)
    arguments = {
        evaluate: ["--data.val-images", "2", "--device", "cpu"],
        detect: [str(tmp_path / "pictures"), "--out", str(tmp_path / "found"), "--device", "cpu"],
        export: [str(tmp_path / "model.pt2"), "--device", "cpu"],
    }
    with pytest.raises(SystemExit) as ended:
        command.main([str(path), *arguments[command]])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {path}: NaN or infinite numbers in 2 of its ")
    assert len(error.splitlines()) == 1 and not (tmp_path / "model.pt2").exists()
