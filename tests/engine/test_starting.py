"""A training that starts from a trained detector: its model, the weights that fit, and one line on all others."""

import dataclasses
from collections import Counter

import pytest
import torch

from doublehead.config import BackboneConfig, DataConfig, HeadConfig, Recipe, RoIConfig, field_names
from doublehead.engine.checkpoint import LoadedModel, load_model, save_model
from doublehead.engine.starting import Source, read_source
from doublehead.errors import UserError
from doublehead.models import build_detector
from doublehead.models.heads import Heads
from doublehead.models.readout import BRANCHES
from tests.support.tiny_detectors import tiny

CLASSES = ["ant", "bee", "cat"]
OTHERS = ["dog", "cat", "ant", "elk"]


def small(kind="double_head_ext", **head):
    backbone = BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=1, fpn_channels=8)
    if kind == "conv5":
        backbone = dataclasses.replace(backbone, neck="none")
    heads = HeadConfig(kind, fc_dim=8, conv_dim=16, conv_blocks=1, **head)
    return dataclasses.replace(tiny(kind), backbone=backbone, head=heads, roi=RoIConfig(samples=16, output_size=3))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """`detector(kind)`: a file of a detector of `CLASSES`, all of whose weights are unlike new ones."""
    folder, made = tmp_path_factory.mktemp("detectors"), set()

    def make(kind="double_head_ext", **head):
        path = folder / f"{kind}{len(head)}.safetensors"
        if path not in made:
            torch.manual_seed(1)
            config = small(kind, **head)
            model = build_detector(config, len(CLASSES) + 1)
            for number, tensor in enumerate(model.state_dict().values()):
                if tensor.is_floating_point():
                    tensor.add_(number + 1)  # batch norms' too
            save_model(path, model, Recipe("old", model=config), CLASSES, [1, 2, 3])
            made.add(path)
        return path

    return make


def started(path, classes, *given, recipe=None):
    """A new model of that source for `classes`, the recipe, and the line; before: its own weights."""
    recipe = recipe or Recipe("new", "a recipe")
    source = read_source(path, recipe, given)
    recipe = source.recipe(recipe)
    torch.manual_seed(2)
    model = build_detector(recipe.model, len(classes) + 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = source.copy_to(model, recipe.model, classes)
    assert "\n" not in line and str(path) in line
    return model.state_dict(), before, recipe, line


def test_its_model_is_taken_and_no_weights_are_fetched(detector):
    recipe = Recipe("new", "a recipe; from elsewhere", data=DataConfig("coco"))  # its backbone: ImageNet's
    assert recipe.model.backbone.weights == "imagenet"
    state, _, made, line = started(detector(), CLASSES, recipe=recipe)
    assert made.model == small() and made.data.format == "coco"
    assert made.about == f"a recipe; from {detector()}"
    assert line == f"{detector()}: all weights"
    mine = load_model(detector()).model.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in state.items())


def heads(kind, classes):
    """The heads of a detector, under their names there."""
    conv5 = torch.nn.Conv2d(8, 16, 1) if kind == "conv5" else None
    made = Heads(small(kind).head, small(kind).roi, 8, len(classes) + 1, conv5)
    return torch.nn.ModuleDict({"detector": torch.nn.ModuleDict({"heads": made})})


@pytest.mark.parametrize("kind", BRANCHES)
def test_rows_of_the_same_classes_are_copied_by_name(kind):
    trained, model = heads(kind, CLASSES), heads(kind, OTHERS)
    old, new = trained.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = Source("old", LoadedModel(trained, Recipe(model=small(kind)), CLASSES, [1, 2, 3]))
    line = source.copy_to(model, small(kind), OTHERS)
    state = model.state_dict()
    seen = Counter()
    for name, tensor in state.items():
        layer = name.split(".")[-2]
        if layer not in ("classifier", "regressor"):
            assert torch.equal(tensor, old[name]), name
            continue
        each = {"classifier": 1, "regressor": 4}[layer]
        now, before, fresh = (whole.unflatten(0, (-1, each)) for whole in (tensor, old[name], new[name]))
        for row, source in ((0, 0), (2, 3), (3, 1)):  # background, cat, ant
            assert torch.equal(now[row], before[source]), name
        for row in (1, 4):
            assert torch.equal(now[row], fresh[row]), name
        seen[layer] += 1
    branches = BRANCHES[kind].values()
    tasks = [sum(branch.classifies for branch in branches), sum(branch.regresses for branch in branches)]
    assert [seen["classifier"] / 2, seen["regressor"] / 2] == tasks
    assert "the rows of background, cat, ant by name, those of dog, elk new" in line and "new:" not in line


def test_the_same_classes_in_another_order_are_copied_by_name(detector):
    state, _, _, line = started(detector("fc"), ["cat", "ant", "bee"])
    old = load_model(detector("fc")).model.state_dict()
    name = "detector.heads.fc.classifier.bias"
    assert torch.equal(state[name], old[name][[0, 3, 1, 2]])
    assert line.endswith("the rows of background, cat, ant, bee by name")


@pytest.mark.parametrize("classes", [["dog"], ["dog", "elk", "fox"]])
def test_of_other_classes_the_last_layers_are_new(detector, classes):
    """Also where there are as many: a row has the meaning of its class."""
    state, new, _, line = started(detector(), classes)
    for branch in ("fc", "conv"):
        for layer in ("classifier.weight", "classifier.bias", "regressor.weight", "regressor.bias"):
            name = f"detector.heads.{branch}.{layer}"
            assert torch.equal(state[name], new[name]), name
    layers = "heads.fc.classifier, heads.fc.regressor, heads.conv.classifier, heads.conv.regressor"
    assert f"; {layers} new: its 3 classes are none of the {len(classes)} here" in line and "by name" not in line


def test_a_regressor_of_all_classes_is_copied_whole(detector):
    path = detector("double_head", class_agnostic_boxes=True)
    state, _, _, line = started(path, ["dog"])
    name = "detector.heads.conv.regressor.weight"
    assert torch.equal(state[name], load_model(path).model.state_dict()[name])
    assert line.endswith("; heads.fc.classifier new: its 3 classes are none of the 1 here")


def test_a_regressor_of_all_classes_has_no_rows_for_each(detector):
    path = detector("double_head", class_agnostic_boxes=True)
    recipe, given = changed(head__class_agnostic_boxes=False)
    state, new, _, line = started(path, OTHERS, *given, recipe=recipe)
    name = "detector.heads.conv.regressor.weight"
    assert len(state[name]) == 4 * (len(OTHERS) + 1) and torch.equal(state[name], new[name])
    assert line.endswith("; heads.conv.regressor new: it has none of this shape")


def changed(**fields):
    """A recipe with the fields of a model that a user gives: `head__kind="fc"`."""
    recipe, names = Recipe(), []
    for path, value in fields.items():
        part, _, field = path.partition("__")
        inner = dataclasses.replace(getattr(recipe.model, part), **{field: value})
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **{part: inner}))
        names.append(f"model.{part}.{field}")
        assert names[-1] in set(field_names())
    return recipe, names


def test_the_users_own_options_of_the_model_apply(detector):
    recipe, given = changed(image__min_size=(96,), head__kind="double_head", backbone__norm="frozen_batch_norm")
    state, new, made, line = started(detector(), CLASSES, *given, recipe=recipe)
    assert made.model.image == dataclasses.replace(small().image, min_size=(96,))
    assert made.model.backbone == dataclasses.replace(small().backbone, norm="frozen_batch_norm")
    assert "detector.heads.conv.classifier.weight" not in state and "new" not in line
    assert line.endswith("not used of it: heads.fc.regressor, heads.conv.classifier")
    recipe, given = changed(head__fc_dim=12, rpn__aspect_ratios=(1.0,))
    _, _, made, line = started(detector(), CLASSES, *given, recipe=recipe)
    assert made.model.head.fc_dim == 12 and made.model.rpn.aspect_ratios == (1.0,)
    layers = "rpn.objectness, rpn.deltas, heads.fc.tower, heads.fc.classifier, heads.fc.regressor"
    assert line.endswith(f"tensors; {layers} new: it has none of this shape")


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"backbone__name": "resnet50"},
            r"\(resnet18, neck fpn, 8 channels\) does not fit --model.backbone.name: leave",
        ),
        ({"backbone__fpn_channels": 16}, "does not fit --model.backbone.fpn-channels: leave that out, or --from"),
        ({"backbone__weights": "imagenet"}, "and --model.backbone.weights exclude each other"),
    ],
)
def test_another_backbone_is_refused(detector, fields, message):
    recipe, given = changed(**fields)
    with pytest.raises(UserError, match=message):
        started(detector(), CLASSES, *given, recipe=recipe)


def damaged(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    return bytes(data)


CONVERT = "doublehead convert {} FOLDER, then give --from FOLDER$"
WRONG = {
    "missing.safetensors": (None, "--from .*missing.safetensors: no such file"),
    "model.pth": (
        b"\x80\x02}.",
        r"first make a model of it: doublehead convert \S+model.pth FOLDER, then give --from FOLDER$",
    ),
    "model.pkl": (b"\x80\x02}.", CONVERT.format(r"\S+model.pkl")),
    "model.pt2": (b"PK\x03\x04", "an exported program, .* here its model.safetensors is needed"),
    "model.onnx": (b"\x08\x07", "an exported program, .* here its model.safetensors is needed"),
    "state.pt": (b"PK\x03\x04", "this is a training state for --resume; give the model.safetensors beside it"),
    "cut.safetensors": (b"\x10", "not a safetensors file, or truncated"),
    "damaged.safetensors": (damaged, "changed or damaged since it was written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_detector_is_named(detector, tmp_path, name):
    content, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_bytes(content(detector("fc")) if callable(content) else content)
    with pytest.raises(UserError, match=message) as refused:
        read_source(tmp_path / name, Recipe(), ())
    assert str(refused.value).startswith(f"--from {tmp_path / name}: ") and "\n" not in str(refused.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--from \S+: this folder has no model.safetensors"):
        read_source(tmp_path, Recipe(), ())
