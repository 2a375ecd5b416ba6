"""`doublehead quantize` and --precision of detect, evaluate and export, with a real, tiny, untrained detector."""

import json
import re
import shutil
import sys

import pytest
import torch
import torchvision

import doublehead
from doublehead.analysis.tables import collect
from doublehead.cli import detect, evaluate, export, quantize
from doublehead.config import to_dict
from doublehead.data.shapes import CLASSES
from doublehead.engine import evaluator, precision, quantizing
from doublehead.engine.checkpoint import load_model
from doublehead.engine.files import write_json
from doublehead.engine.int8_file import read_int8
from doublehead.errors import DataError
from doublehead.models import quantized
from doublehead.models.quantized import Support, int8_layers, int8_support, layers_in_int8
from doublehead.ops import int8
from tests.support.analysis_detector import recipe, save_detector
from tests.support.detect_samples import many, save_tiny_detector
from tests.support.engine_standin import checksums, one_thread  # noqa: F401 (a fixture)
from tests.support.int8_samples import save_int8_detector
from tests.support.page_samples import narrow_resnet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning"),
    pytest.mark.skipif(int8_support().level == "none", reason=f"no int8 here: {int8_support().reason}"),
]
FEW = ("--images", "3", "--data.val-images", "2")


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """A narrow backbone: the heads are what these tests are about."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torchvision.models, "resnet18", narrow_resnet)
        yield


@pytest.fixture(scope="module")
def prepared(narrow, tmp_path_factory):
    return save_int8_detector(tmp_path_factory.mktemp("int8") / "run")


@pytest.fixture
def run(prepared, tmp_path):
    """A detector with an int8.json."""
    return shutil.copytree(prepared, tmp_path / "run")


@pytest.fixture
def bare(run):
    """A detector without."""
    (run / "int8.json").unlink()
    return run


def code(command, *arguments) -> int:
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def refused(capsys, command, *arguments, exit_code=2) -> str:
    """The one line."""
    capsys.readouterr()
    assert code(command, *arguments) == exit_code
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ") and out == "", (out, err)
    return line


def known_ap(monkeypatch, of_layer=0.0):
    """AP 50.00 in fp32; each layer in int8 takes `of_layer` off, the second one ten times that."""
    calls = []

    def evaluate(model, dataset, world, **settings):
        used = layers_in_int8(model)
        calls.append(used)
        loss = sum(of_layer * (10 if name == int8_layers(model)[1] else 1) for name in used)
        return {"AP": 0.5 - loss}, []

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    return calls


# ---------------------------------------------------------------------- quantize


def test_the_whole_way(bare, capsys):
    assert code(quantize, bare, *FEW) == 0
    said = capsys.readouterr().out
    assert "calibrated on 3 images of shapes (train), measured on 2 of shapes (val)" in said
    assert re.search(r"^fp32 +\d+\.\d\d\nint8 +\d+\.\d\d +[+-]\d+\.\d\d$", said, re.MULTILINE)
    content = json.loads((bare / "int8.json").read_text())
    model = load_model(bare).model
    assert list(content["scales"]) == int8_layers(model) and content["calibration"]["images"] == 3
    assert content["measured"]["bits"] == int8_support().bits
    assert read_int8(bare, model).scales == content["scales"]
    before = checksums(bare)
    assert code(evaluate, bare, "--precision", "int8", "--device", "cpu", "--data.val-images", "2") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"int8 AP \d+\.\d\d, fp32 AP \d+\.\d\d: [+-]\d+\.\d\d "
        r"\(fp32 as doublehead quantize measured it on these images\)",
        last,
    )
    assert checksums(bare) == before


def test_the_layer_that_hurts_is_named(bare, capsys, monkeypatch):
    calls = known_ap(monkeypatch, 0.0005)
    assert code(quantize, bare, *FEW) == 0
    said = capsys.readouterr().out
    content = json.loads((bare / "int8.json").read_text())
    names = list(content["scales"])
    assert [entry["layer"] for entry in content["left_out"]] == names[1:2]
    assert calls[0] == [] and calls[1] == names  # fp32 first
    assert f"in int8: {len(names) - 1} of {len(names)} layers\nin float: {names[1]} (AP 49." in said
    assert re.search(r"^int8, all layers +49\.\d\d +-0\.\d\d$", said, re.MULTILINE)
    plan = read_int8(bare, load_model(bare).model)
    assert plan.left_out == names[1:2] and plan.measured["fp32"] == 0.5


def test_no_layer_is_left_and_nothing_is_written(bare, capsys, monkeypatch):
    known_ap(monkeypatch, 0.1)
    before = checksums(bare)
    assert code(quantize, bare, *FEW) == 1
    assert "nothing is written; allow more by --most-loss" in capsys.readouterr().err.splitlines()[-1]
    assert checksums(bare) == before


def test_a_link_to_nothing_is_kept(bare, capsys):
    (bare / "int8.json").symlink_to("moved/int8.json")
    assert refused(capsys, quantize, bare, *FEW).endswith(
        "int8.json: exists; --overwrite measures again and replaces it"
    )
    assert (bare / "int8.json").is_symlink()


def test_an_existing_file_is_kept(run, capsys, monkeypatch):
    before = checksums(run)
    assert refused(capsys, quantize, run, *FEW).endswith(
        "int8.json: exists; --overwrite measures again and replaces it"
    )
    assert checksums(run) == before
    known_ap(monkeypatch)
    assert code(quantize, run, *FEW, "--overwrite") == 0
    assert checksums(run) != before


@pytest.mark.parametrize("where", ["calibrating", "measuring"])
def test_ctrl_c_leaves_nothing(bare, capsys, monkeypatch, where):
    def stop(*_, **__):
        raise KeyboardInterrupt

    if where == "calibrating":
        monkeypatch.setattr(quantizing, "measure_scales", stop)
    else:
        monkeypatch.setattr(evaluator, "evaluate", stop)
    before = checksums(bare)
    assert code(quantize, bare, *FEW) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by Ctrl-C"
    assert checksums(bare) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--images", "0"), "--images is 0, at least 1 is accepted"),
        (("--images", "5000"), "--images is 5000, and shapes (train) has 4000: give at most 4000"),
        (("--most-loss", "-1"), "--most-loss is -1.0, 0 .. 100 is accepted (points of AP)"),
        (("--most-loss", "nan"), "--most-loss is nan, 0 .. 100 is accepted (points of AP)"),
        (("--data.train-split", "val"), "calibration and validation images must differ: give --data.train-split"),
        (("--data.root", "nowhere"), "nowhere"),
    ],
)
def test_wrong_options(bare, capsys, arguments, said):
    before = checksums(bare)
    assert said in refused(capsys, quantize, bare, *arguments)
    assert checksums(bare) == before


def test_images_of_other_classes(tmp_path, capsys):
    folder = save_detector(tmp_path / "dogs", classes=("cat", "dog"))
    assert f"its classes are {', '.join(CLASSES)}, not cat, dog" in refused(capsys, quantize, folder)


def test_an_unreadable_image_is_named(bare, capsys, monkeypatch):
    def load(self, index):
        raise DataError(f"{index}.png: cannot be decoded")

    monkeypatch.setattr("doublehead.data.shapes.ShapesDataset.load", load)
    assert refused(capsys, quantize, bare, *FEW) == "error: 0.png: cannot be decoded"


def test_a_machine_without_the_operators(bare, capsys, monkeypatch):
    for module in (quantized, int8):
        monkeypatch.setattr(module, "int8_support", lambda: Support("none", "it is an abacus"))
    said = refused(capsys, quantize, bare, *FEW)
    assert said == "error: this machine cannot run int8, nor measure it: it is an abacus"


def test_no_such_checkpoint(tmp_path, capsys):
    assert "no such file" in refused(capsys, quantize, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- --precision


def test_evaluate_measures_fp32_on_other_images(run, tmp_path, capsys):
    metrics = tmp_path / "metrics.json"
    arguments = "--precision", "int8", "--device", "cpu", "--metrics", metrics
    assert code(evaluate, run, *arguments, "--data.val-images", "2") == 0
    out = capsys.readouterr().out
    assert "measuring fp32 too: doublehead quantize measured on other images, or in another read-out" in out
    assert out.splitlines()[-1].endswith("(both measured now)")
    written = json.loads(metrics.read_text())
    assert written["precision"] == "int8" and written["fp32"]["source"] == "both measured now"
    assert code(evaluate, run, *arguments, "--overwrite") == 0
    assert "fp32 AP 50.00" in capsys.readouterr().out.splitlines()[-1]  # as stored, for these four images


def test_the_tables_leave_other_precisions_out(tmp_path):
    write_json(tmp_path / "recipe.json", to_dict(recipe("double_head_ext")))
    for name in ("metrics", "metrics-other"):
        write_json(tmp_path / f"{name}.json", {"AP": 0.5})
    write_json(tmp_path / "metrics-int8.json", {"precision": "int8", "AP": 0.4})
    found = collect(tmp_path)
    assert [evaluation.metrics["AP"] for evaluation in found.evaluations] == [0.5, 0.5]
    assert found.notes[0] == f"{tmp_path / 'metrics-int8.json'}: measured in int8, left out: the tables are of fp32"


def test_evaluate_compares_every_readout(run, capsys):
    arguments = "--precision", "int8", "--device", "cpu", "--data.val-images", "2", "--readouts", "fc", "conv"
    assert code(evaluate, run, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" AP ")[0] for line in lines] == ["fc: int8", "conv: int8"]


def test_16_bits_in_evaluate_detect_and_python_on_a_cpu(run, tmp_path, capsys, monkeypatch):
    lacking = precision.processor()._replace(x86=True, bf16=False)
    monkeypatch.setattr(precision, "processor", lambda: lacking)
    said = "bf16 is emulated, slower than fp32: this processor lacks"
    metrics = tmp_path / "metrics.json"
    arguments = "--precision", "bf16", "--device", "cpu", "--data.val-images", "1", "--metrics", metrics
    assert code(evaluate, run, *arguments) == 0
    assert f"note: {said}" in capsys.readouterr().out
    assert json.loads(metrics.read_text())["precision"] == "bf16"
    pictures = many(tmp_path / "in", 1)
    found = {}
    for option, name in (("--precision", "bf16"), ("--amp", "bf16"), ("--amp", "off")):
        out = tmp_path / (option + name)
        assert code(detect, run, pictures, "--out", out, option, name, "--device", "cpu", "--score-threshold", 0) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"note: {said}")]
        assert len(notes) == (name == "bf16")
        (entry,) = json.loads((out / "detections.json").read_text())["pictures"]
        found[option + name] = [detection["score"] for detection in entry["detections"]]
    assert found["--precisionbf16"] == found["--ampbf16"] != found["--ampoff"]
    with pytest.warns(UserWarning, match=said):
        predictor = doublehead.load(run, "cpu", precision="bf16")
    detections = predictor.predict(pictures / "0.jpg", 0)
    assert predictor.precision == "bf16" and detections.scores.dtype == torch.float32
    assert detections.scores.tolist() == found["--ampbf16"]
    with pytest.raises(doublehead.errors.UserError, match="precision int8 is for CPUs"):
        predictor._mode = precision.Mode("int8", "int8", None)
        monkeypatch.setattr("doublehead.api.predictor.find_device", torch.device)
        predictor.to("cuda")
    assert predictor.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:int8 inputs have 7 bits")
def test_int8_from_python_is_that_of_detect(run, tmp_path):
    pictures = many(tmp_path / "in", 1)
    arguments = "--precision", "int8", "--device", "cpu", "--score-threshold", 0
    assert code(detect, run, pictures, "--out", tmp_path / "out", *arguments) == 0
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]
    predictor = doublehead.load(run, "cpu", precision="int8")
    assert layers_in_int8(predictor.model) and predictor.precision == "int8"
    found = predictor.predict(pictures / "0.jpg", 0).scores.tolist()
    assert found == [detection["score"] for detection in entry["detections"]]
    exact = doublehead.load(run, "cpu").predict(pictures / "0.jpg", 0).scores.tolist()
    assert found != exact and found[:3] == pytest.approx(exact[:3], abs=0.2)
    assert predictor.evaluate(progress=False)["images"] == 4


def test_int8_needs_its_file(bare, tmp_path, capsys):
    many(tmp_path / "in", 1)
    say = f"int8.json: no such file; make it: doublehead quantize {bare}"
    for command, *more in (
        (evaluate, "--device", "cpu"), (detect, tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu"),
    ):  # fmt: skip
        assert say in refused(capsys, command, bare, *more, "--precision", "int8")
    assert not (tmp_path / "out").exists()
    with pytest.raises(doublehead.errors.UserError, match="no such file; make it"):
        doublehead.load(bare, "cpu", precision="int8")


def test_int8_falls_back_with_one_line(run, capsys, monkeypatch):
    lacking = precision.processor()._replace(bf16=False)
    monkeypatch.setattr(precision, "processor", lambda: lacking)
    for module in (quantized, int8):
        monkeypatch.setattr(module, "int8_support", lambda: Support("none", "it is an abacus"))
    assert code(evaluate, run, "--precision", "int8", "--device", "cpu", "--data.val-images", "1") == 0
    out = capsys.readouterr().out
    assert out.count("note: int8 cannot run here, fp32 runs in its place: it is an abacus") == 1
    assert "int8 AP" not in out


def test_contradictions_and_what_has_no_int8(run, tmp_path, capsys):
    many(tmp_path / "in", 1)
    out = tmp_path / "out"
    said = refused(capsys, detect, run, tmp_path / "in", "--out", out, "--precision", "bf16", "--amp", "off")
    assert said == "error: --precision bf16 and --amp off contradict each other: leave one out"
    for file, name, why in (
        ("a.pt2", "int8", " is for OpenVINO files (.xml); packages compute in fp32"),
        ("a.onnx", "bf16", " is for OpenVINO files (.xml); an ONNX file's runtime may choose another than fp32"),
        ("a.xml", "fp16", ": OpenVINO files (.xml) have fp32, bf16 or int8"),
    ):
        said = refused(capsys, export, run, tmp_path / file, "--precision", name, "--device", "cpu")
        assert said == f"error: --precision {name}{why}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "run"]
    with pytest.raises(
        doublehead.errors.UserError, match="precision is 'int4': expected one of fp32, bf16, fp16, int8"
    ):
        doublehead.load(run, "cpu", precision="int4")


def test_a_stand_in_without_heads_computes_in_fp32(tmp_path, monkeypatch):
    """Nothing of int8 is looked at where nobody asks for it."""
    from tests.support.engine_standin import tiny_models

    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    folder = save_tiny_detector(tmp_path / "run")
    pictures = many(tmp_path / "in", 1)
    assert code(detect, folder, pictures, "--out", tmp_path / "out", "--device", "cpu", "--precision", "fp32") == 0
