"""`int8.json`: found beside its checkpoint, and refused in one line where it does not belong to it."""

import json
import shutil

import pytest
import torch

from doublehead.engine.checkpoint import load_model, save_model
from doublehead.engine.int8_file import FORMAT, int8_path, read_int8, write_int8
from doublehead.engine.sealed import write_sealed
from doublehead.errors import UserError
from doublehead.models import build_detector
from doublehead.models.quantized import int8_layers
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)
from tests.support.int8_samples import save_int8_detector, write_plan


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_int8_detector(tmp_path_factory.mktemp("int8") / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def refusal(run, model=None) -> str:
    with pytest.raises(UserError) as error:
        read_int8(run, model or load_model(run).model)
    said = str(error.value)
    assert "\n" not in said and len(said) < 400
    return said


def test_what_was_written_is_read(run):
    model = load_model(run).model
    plan = read_int8(run, model)
    names = int8_layers(model)
    assert plan.scales == dict.fromkeys(names[1:], 0.05) and plan.left_out == names[1:2]
    assert plan.measured["fp32"] == 0.5
    assert read_int8(run / "model.safetensors", model) == plan


def test_each_checkpoint_has_its_own(tmp_path):
    assert int8_path(tmp_path) == int8_path(tmp_path / "model.safetensors") == tmp_path / "int8.json"
    assert int8_path(tmp_path / "best.safetensors") == tmp_path / "best.int8.json"


def test_none(run):
    (run / "int8.json").unlink()
    assert refusal(run).endswith(f"no such file; make it: doublehead quantize {run}")


@pytest.mark.parametrize("change", ["scale", "left out", "measured", "checksum", "digest"])
def test_edited_by_hand(run, change):
    path = run / "int8.json"
    content = json.loads(path.read_text())
    if change == "scale":
        content["scales"][next(iter(content["scales"]))] *= 1.001
    elif change == "left out":
        content["left_out"].clear()
    elif change == "measured":
        content["measured"]["int8"] = 0.5
    elif change == "checksum":
        del content["checksum"]
    else:
        content["weights"] = "0" * 64
    path.write_text(json.dumps(content))
    assert "int8.json: edited or damaged since it was written: its checksum does not fit" in refusal(run)


def test_spaces_are_no_change(run):
    path = run / "int8.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8, sort_keys=True))
    read_int8(run, load_model(run).model)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"format": "doublehead.other/1"}', "[" * 100_000, "\N{BYTE ORDER MARK}{}"]
)
def test_another_file(run, text):
    (run / "int8.json").write_text(text)
    assert "make it again: doublehead quantize" in refusal(run)


def test_bytes_that_are_no_text(run):
    (run / "int8.json").write_bytes(b"\xff\xfe\x00")
    assert "not a file of doublehead, or damaged" in refusal(run)


def test_of_other_weights(run):
    model, *more = load_model(run)
    with torch.no_grad():
        model.detector.heads["fc"].classifier.bias[0] += 1e-3
    save_model(run / "model.safetensors", model, *more)
    assert (
        f"int8.json: of other weights than those of {run}; make it again: doublehead quantize {run} --over"
        in refusal(run)
    )


def test_of_another_version(run):
    content = json.loads((run / "int8.json").read_text())
    write_sealed(run / "int8.json", "doublehead.int8/9", {name: content[name] for name in ("weights", "scales")})
    assert f"its format is 'doublehead.int8/9', this version reads '{FORMAT}'; make it again" in refusal(run)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scales": {"detector.heads.fc.tower.9": 0.1}}, "this version has no int8 layer detector.heads.fc.tower.9"),
        ({"scales": {"detector.heads.fc.tower.1": "x"}}, "scales.detector.heads.fc.tower.1: expected a finite number"),
        ({"left_out": [1]}, "left_out[0]: expected a dictionary"),
        ({"measured": {}}, "measured.fp32 is missing"),
    ],
)
def test_entries_that_fit_no_model(run, change, said):
    assert said in refusal(write_plan(run, **change).parent)


def test_a_model_without_such_heads(tmp_path):
    from dataclasses import replace

    from doublehead.config import BackboneConfig
    from tests.support.analysis_detector import recipe

    config = recipe("conv5").model
    c4 = replace(config, backbone=BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, neck="none"),
                 rpn=replace(config.rpn, anchor_sizes=(32, 64)))  # fmt: skip
    said = refusal(tmp_path, build_detector(c4, 7).eval())
    assert said == f"{tmp_path}: its head is 'conv5', which has no int8 layers: conv- and fc-heads have them"


def test_a_file_that_cannot_be_written_leaves_the_old_one(run):
    before = (run / "int8.json").read_bytes()
    with pytest.raises(ValueError):
        write_int8(run / "int8.json", {"fp32": float("nan")})
    assert (run / "int8.json").read_bytes() == before and sorted(p.name for p in run.iterdir()) == [
        "int8.json", "metrics.json", "model.safetensors"
    ]  # fmt: skip
