"""Values of a configuration: from flags, from `--set` and from JSON, checked by one decoder."""

import dataclasses
import json
import math
import random
import subprocess
import sys
import types
import typing

import pytest

from doublehead.config import DataConfig, Recipe, TrainConfig, check, from_dict, parse, to_dict
from doublehead.config.bounds import Bounds
from doublehead.errors import shown_to_user
from doublehead.interop.mapping import ConversionError
from doublehead.interop.settings import with_settings
from doublehead.recipes import RECIPES

WHOLE, FINITE = "a whole number of at least", "a finite number"
WRONG_VALUES = {  # field: the flag's text, what the message shows, what is accepted
    "train.steps": ("0", "0", f"{WHOLE} 1"),
    "train.batch_size": ("70000", "70000", "a whole number from 1 to 65536"),
    "train.accumulate": ("-1", "-1", f"{WHOLE} 1"),
    "train.log_every": ("0", "0", f"{WHOLE} 1"),
    "train.seed": ("-3", "-3", f"{WHOLE} 0"),
    "train.lr": ("nan", "nan", f"{FINITE} of at least 0"),
    "train.gamma": ("inf", "inf", f"{FINITE} of at least 0"),
    "train.weight_decay": ("-0.1", "-0.1", f"{FINITE} of at least 0"),
    "train.momentum": ("1.0", "1.0", f"{FINITE} of at least 0 and below 1"),
    "train.ema_decay": ("1.5", "1.5", f"{FINITE} of at least 0 and below 1 or None"),
    "train.clip_grad_norm": ("0.0", "0.0", f"{FINITE} above 0 or None"),
    "train.horizontal_flip": ("2.0", "2.0", f"{FINITE} from 0 to 1"),
    "data.workers": ("-1", "-1", f"{WHOLE} 0"),
    "data.train_images": ("0", "0", f"{WHOLE} 1 or None"),
    "data.max_skipped": ("1.1", "1.1", f"{FINITE} from 0 to 1"),
    "data.max_pixels": ("178956971", "178956971", "a whole number from 1 to 178956970"),
    "model.backbone.norm_eps": ("-1e-05", "-1e-05", f"{FINITE} of at least 0"),
    "model.backbone.frozen_stages": ("6", "6", "a whole number from 0 to 5"),
    "model.head.non_local.inner_dim": ("-4", "-4", f"{WHOLE} 0 or None"),
    "model.roi.samples": ("0", "0", f"{WHOLE} 1"),
    "model.roi.conv_box_scale": ("0.0", "0.0", f"{FINITE} above 0"),
    "model.rpn.nms_iou": ("nan", "nan", FINITE),
    "model.loss.smooth_l1_beta": ("-1.0", "-1.0", f"{FINITE} of at least 0"),
    "model.detection.ext_gate": ("1.0", "1.0", f"{FINITE} of at least 0 and below 1"),
    "model.image.size_divisible": ("0", "0", f"{WHOLE} 1"),
}
WRONG_ITEMS = {  # the same of lists: what the message shows of the item
    "train.milestones": ("3 -1", "train.milestones[1] is -1", f"{WHOLE} 0"),
    "model.image.min_size": ("0 800", "model.image.min_size[0] is 0", f"{WHOLE} 1"),
    "model.image.std": ("1.0 1.0 0.0", "model.image.std[2] is 0.0", f"{FINITE} other than 0"),
    "model.rpn.anchor_sizes": ("-8.0", "model.rpn.anchor_sizes[0] is -8.0", f"{FINITE} above 0"),
}
CASES = [
    (field, text, f"{field} is {shown}, {said} is accepted") for field, (text, shown, said) in WRONG_VALUES.items()
]
CASES += [(field, text, f"{what}, {said} is accepted") for field, (text, what, said) in WRONG_ITEMS.items()]


def from_flag(field: str, text: str) -> None:
    from doublehead.cli.train import parse as parse_flags  # needs tyro

    with shown_to_user():
        parse_flags([f"--{field.replace('_', '-')}", *text.split()])


def from_json(field: str, value: object) -> Recipe:
    values = json.loads(json.dumps(to_dict(Recipe())))
    *path, last = field.split(".")
    inner = values
    for name in path:
        inner = inner[name]
    inner[last] = value
    return from_dict(json.loads(json.dumps(values)))


@pytest.mark.parametrize("field, text, message", CASES)
def test_one_message_for_one_mistake(field, text, message, capsys):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        from_flag(field, text)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(ConversionError) as error:
        with_settings(Recipe(), [f"{field}={text}"])
    assert str(error.value) == f"--set: {message}"
    numbers = [json.loads(item.replace("nan", "NaN").replace("inf", "Infinity")) for item in text.split()]
    with pytest.raises(ValueError) as error:
        from_json(field, numbers if field in WRONG_ITEMS else numbers[0])
    assert str(error.value) == message


def test_an_empty_list_is_refused_where_an_item_is_needed(capsys):
    pytest.importorskip("tyro")
    message = "model.image.min_size is {}, a list of at least 1 is accepted"
    with pytest.raises(SystemExit):
        from_flag("model.image.min_size", "")
    assert message.format("()") in capsys.readouterr().err
    for wrong in (
        lambda: with_settings(Recipe(), ["model.image.min_size=[]"]),
        lambda: from_json("model.image.min_size", []),
    ):
        with pytest.raises(ValueError, match="a list of at least 1 is accepted"):
            wrong()
    assert from_json("train.milestones", []).train.milestones == ()  # the rate stays


WRONG_TYPES = {  # of --set and JSON; tyro refuses these flags in its own words
    "train.steps": ("many", "many", f"{WHOLE} 1"),
    "train.seed": ("0.5", 0.5, f"{WHOLE} 0"),
    "train.lr": ("fast", "fast", f"{FINITE} of at least 0"),
    "model.head.fused": ("yes", "yes", "true or false"),
    "model.backbone.neck": ("pan", "pan", "one of fpn, none"),
    "model.image.mean": ("1.5 2.5", [1.5, 2.5], "a list of 3"),
    "train.ema_decay": ("much", "much", f"{FINITE} of at least 0 and below 1 or None"),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_wrong_types(field):
    text, value, accepted = WRONG_TYPES[field]
    message = f"{field} is {value!r}, {accepted} is accepted"
    with pytest.raises(ValueError) as error:
        from_json(field, value)
    assert str(error.value) == message
    with pytest.raises(ConversionError) as error:
        with_settings(Recipe(), [f"{field}={text}"])
    assert str(error.value) == f"--set: {message}"


SPELLINGS = {
    "model.head.fused": {"true": True, "True": True, "false": False, "False": False},
    "train.ema_decay": {"none": None, "None": None, "null": None, "0.5": 0.5, "0": 0.0},
    "model.backbone.weights": {"none": None, "null": None, "imagenet": "imagenet", '"my file.pth"': "my file.pth"},
    "train.milestones": {"": (), "[]": (), "3": (3,), "3,5": (3, 5), "3, 5": (3, 5), "3 5": (3, 5), "[3, 5]": (3, 5)},
    "model.image.mean": {"[1, 0.5, 0]": (1.0, 0.5, 0.0), "1,0.5,0": (1.0, 0.5, 0.0)},
    "model.backbone.neck": {"none": "none", '"fpn"': "fpn"},
    "train.lr": {"1e-3": 0.001, "1": 1.0},
    "train.steps": {"1_000": 1000, "12.0": 12},
}


@pytest.mark.parametrize(
    "field, text, value", [(f, t, v) for f, spellings in SPELLINGS.items() for t, v in spellings.items()]
)
def test_spellings_of_set(field, text, value):
    found = with_settings(Recipe(), [f"{field}={text}"])
    for name in field.split("."):
        found = getattr(found, name)
    assert repr(found) == repr(value)  # 1.0 is not 1 here


# ---------------------------------------------------------------------- all fields


def fields(cls: type, name: str = "") -> typing.Iterator[tuple[str, object]]:
    for field, hint in typing.get_type_hints(cls, include_extras=True).items():
        full = f"{name}.{field}" if name else field
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, full)
        else:
            yield full, hint


def draw(hint: object, rng: random.Random) -> object:
    """A value that the annotation accepts, as JSON has it."""
    plain, bounds = hint, ()
    if typing.get_origin(hint) is typing.Annotated:
        plain, bounds = hint.__origin__, hint.__metadata__
    if typing.get_origin(plain) in (typing.Union, types.UnionType):
        inner = typing.get_args(plain)[0]
        return None if rng.random() < 0.3 else draw(typing.Annotated[(inner, *bounds)] if bounds else inner, rng)
    if typing.get_origin(plain) is typing.Literal:
        return rng.choice(typing.get_args(plain))
    if typing.get_origin(plain) is tuple:
        items = typing.get_args(plain)
        return [draw(items[0], rng) for _ in range(rng.randint(1, 5) if items[-1] is Ellipsis else len(items))]
    if plain in (str, bool):
        return rng.choice(["", "a b", "None", "größe"]) if plain is str else rng.random() < 0.5
    number = next((bound for bound in bounds if isinstance(bound, Bounds)), Bounds(least=-9))
    least = number.least if number.least is not None else number.above if number.above is not None else -9
    most = number.most if number.most is not None else number.below if number.below is not None else 10**6
    value = rng.randint(least, most) if plain is int else rng.uniform(least, most) or 0.5
    return value if number.accepts(value) else 0.5


def test_random_recipes_survive_json():
    rng = random.Random(0)
    hints = dict(fields(Recipe))
    for _ in range(50):
        values: dict = {}
        for field, hint in hints.items():
            *path, last = field.split(".")
            inner = values
            for name in path:
                inner = inner.setdefault(name, {})
            inner[last] = draw(hint, rng)
        recipe = from_dict(values)
        check(recipe)
        assert to_dict(recipe) == to_dict(from_dict(json.loads(json.dumps(to_dict(recipe)))))
        assert json.loads(json.dumps(to_dict(recipe))) == values
        assert from_dict(values) == recipe


def test_text_and_json_agree_on_every_field():
    """`--set` of what JSON holds gives what JSON gives."""
    values = dict(flat(to_dict(Recipe())))
    for field, hint in fields(Recipe):
        text = values[field] if isinstance(values[field], str) else json.dumps(values[field])
        assert parse(text, hint, field) == values[field], field


def flat(values: dict, name: str = "") -> typing.Iterator[tuple[str, object]]:
    for field, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{name}{field}.")
        else:
            yield f"{name}{field}", value


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass(name):
    check(RECIPES[name])


# ---------------------------------------------------------------------- in Python

NAMES = (  # what scripts import from here
    "HeadKind Norm Fusion ReadOut BackboneConfig RPNConfig RoIConfig NonLocalConfig HeadConfig LossConfig "
    "DetectionConfig ImageConfig ModelConfig DataConfig TrainConfig Recipe to_dict from_dict"
)


def test_the_names_stay():
    import doublehead.config

    assert not [name for name in NAMES.split() if not hasattr(doublehead.config, name)]
    assert doublehead.config.ReadOut is doublehead.config.ReadOutName


def test_check_takes_what_python_gives(tmp_path):
    np = pytest.importorskip("numpy")
    check(DataConfig(root=tmp_path, workers=np.int64(1), max_skipped=np.float32(0.5)), "data")
    check(dataclasses.replace(TrainConfig(), milestones=[1, 2], lr=1), "train")


@pytest.mark.parametrize(
    "changes", [{"log_every": 20.0}, {"steps": True}, {"lr": math.nan}, {"amp": "fp8"}, {"lr": "1"}]
)
def test_check_refuses(changes):
    with pytest.raises(ValueError, match=f"^train.{next(iter(changes))} is .* is accepted$"):
        check(dataclasses.replace(TrainConfig(), **changes), "train")


def test_the_configuration_imports_nothing_of_the_library():
    heavy = "('torch', 'numpy', 'tyro', 'PIL')"
    code = f"import doublehead.config, sys; print([name for name in sys.modules if name.split('.')[0] in {heavy}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
