"""`doublehead export`: what it writes runs without model code and computes what the model does."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torchvision

from doublehead.cli import export
from doublehead.config import ImageConfig
from doublehead.engine.checkpoint import load_model
from doublehead.engine.errors import UserError
from doublehead.exporting import ExportedDetections, ExportedDetector, load, loading, onnx_file, package
from doublehead.exporting.program import DetectorProgram, differences, exact_float32, example_input
from doublehead.models import ImageBatch
from tests.support.export_samples import CLASSES, QUICK, half_resnet18, save_tiny_ext


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a detector that finds something; all through this file ResNet-18 has half its depth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", half_resnet18)
        yield save_tiny_ext(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A package, made by the command line."""
    path = tmp_path_factory.mktemp("exported") / "detector.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "INDUCTOR_OPTIONS", QUICK)
        export.main([str(run), str(path), "--batch", "2", "--dynamic-batch", "--device", "cpu", "--readout", "split"])
    return path


def fails(*arguments):
    """The command's exit code and what it printed to stderr."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in arguments])
    return stop.value.code


# ---------------------------------------------------------------------- AOTInductor packages

OPEN_ELSEWHERE = """
import sys
for name in ("torchvision", "safetensors", "tyro", "tqdm", "doublehead.models", "doublehead.data"):
    sys.modules[name] = None  # importing it fails
import torch
from doublehead.exporting import load
detector = load(sys.argv[1])
torch.save([tuple(detector(*inputs)) for inputs in torch.load(sys.argv[2])], sys.argv[3])
"""


def test_a_fresh_process_computes_the_same_without_model_code(run, exported, tmp_path):
    inputs = [example_input(batch, 64, 96, seed=5) for batch in (1, 2)]
    torch.save(inputs, tmp_path / "in.pt")
    subprocess.run(
        [sys.executable, "-c", OPEN_ELSEWHERE, exported, tmp_path / "in.pt", tmp_path / "out.pt"],
        check=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    model = load_model(run).model
    model.set_readout("split")
    for batch, outputs in zip(inputs, torch.load(tmp_path / "out.pt"), strict=True):
        found = ExportedDetections(*outputs)
        with torch.no_grad():
            expected = model.detector(ImageBatch(*batch))
        assert found.count.min() > 20
        assert differences(found, expected) is None
        torch.testing.assert_close(tuple(found), tuple(expected[:4]), rtol=1e-4, atol=1e-3)


IN_THREADS = """
import sys, threading
import torch
from doublehead.exporting import load
from doublehead.exporting.program import example_input

detector = load(sys.argv[1])
inputs = [example_input(1, 64, 96, seed=i) for i in range(4)]
expected = [detector(*batch) for batch in inputs]
right = [0] * 4

def work(i):
    for _ in range(10):
        right[i] += all(torch.equal(*pair) for pair in zip(detector(*inputs[i]), expected[i]))

threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(right)
"""


def test_threads_may_share_a_package(exported):
    """Two calls at once within a package would wait for each other: see `PackageCall`."""
    done = subprocess.run(
        [sys.executable, "-c", IN_THREADS, exported], capture_output=True, text=True, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.stdout == "[10, 10, 10, 10]\n", done.stderr[-2000:]


def test_the_package_describes_itself(exported):
    detector = load(exported)
    assert detector.classes == CLASSES and detector.shape == (2, 64, 96)
    assert repr(detector) == "ExportedDetector(tiny-ext, 3 classes, 2 x 3 x 64 x 96, aoti on cpu)"
    note = detector.description
    assert note["category_ids"] == [3, 5, 8] and note["device"] == "cpu" and note["torch"] == torch.__version__
    assert note["preprocessing"]["mean"] == list(ImageConfig().mean)
    assert note["preprocessing"]["channel_order"] == "rgb" and note["preprocessing"]["min_size"] == [64]
    assert note["detection"]["readout"] == "split"
    assert note["outputs"]["boxes"]["shape"] == [2, 100, 4]


def test_images_of_any_size(run, exported):
    detector = load(exported)
    model = load_model(run).model
    model.set_readout("split")
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(3, 128, 170, generator=generator)]
    with torch.no_grad():
        (expected,) = model(images)
    (found,) = detector.detect(images)
    assert len(found["boxes"]) > 20 and found["boxes"][:, 2].max() > 100
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="up to 2 at a time, got 3"):
        detector.detect(images * 3)
    with pytest.raises(ValueError, match="96"):
        detector.detect([torch.rand(3, 170, 128)])  # upright: higher than 64


@pytest.mark.parametrize(
    ("pixels", "sizes", "message"),
    [
        (torch.zeros(3, 3, 64, 96), torch.ones(3, 2), r"pixels: expected float32 \[2, 3, 64, 96\] on cpu, got"),
        (torch.zeros(1, 3, 32, 96), torch.ones(1, 2), r"pixels: expected float32 \[1, 3, 64, 96\] on cpu, got"),
        (torch.zeros(1, 3, 64, 96), torch.ones(2, 2), r"sizes: expected float32 \[1, 2\] on cpu, got"),
        (torch.zeros(2, 3, 64, 96).half(), torch.ones(2, 2), "torch.float16"),
        (torch.zeros(2, 3, 64, 96), torch.ones(2, 2, dtype=torch.int64), "sizes: expected float32"),
    ],
)
def test_wrong_input_is_named(exported, pixels, sizes, message):
    with pytest.raises(ValueError, match=message):
        load(exported)(pixels, sizes)


# ---------------------------------------------------------------------- files that cannot be opened


def test_what_cannot_be_opened(exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.pt2")
    data = exported.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt2").write_text("no program")
    for name in ("cut.pt2", "text.pt2"):
        with pytest.raises(UserError, match=name):
            load(tmp_path / name)
    torch.save({"a": 1}, tmp_path / "other.pt2")  # a zip file
    with pytest.raises(UserError, match="not a detector that `doublehead export` wrote"):
        load(tmp_path / "other.pt2")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "doublehead.exported/9"}, "written in doublehead.exported/9"),
        ({"device": "cuda", "machine": "sm_90"}, r"made for CUDA \(sm_90\), and torch sees no CUDA device"),
    ],
)
def test_a_program_of_another_machine(exported, monkeypatch, changed, message):
    note = package.read_description(exported) | changed
    monkeypatch.setattr(loading, "read_description", lambda path: note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        load(exported)


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def quick_write(monkeypatch):
    """In place of compiling: writes a file, which `load` opens as a program that does what the test says."""

    def write(program, example, description, path):
        path.write_text(json.dumps(description))
        write.call = program
        write.description = description

    monkeypatch.setattr(package, "write_package", write)
    monkeypatch.setattr(
        "doublehead.exporting.load", lambda path: ExportedDetector(write.call, write.description, torch.device("cpu"))
    )
    return write


def test_says_what_it_does(run, tmp_path, quick_write, capsys):
    export.main([str(run), str(tmp_path / "a.pt2"), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "tiny-ext, 3 classes; 1 x 3 x 64 x 96 pixels" in text and "this takes some minutes" in text
    assert "checked against the model on a random input: the same " in text and "MiB" in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


def test_a_fixed_batch_is_exact(run, tmp_path, quick_write):
    export.main([str(run), str(tmp_path / "a.pt2"), "--device", "cpu", "--batch", "2"])
    detector = ExportedDetector(quick_write.call, quick_write.description, torch.device("cpu"))
    with pytest.raises(ValueError, match="pixels"):
        detector(*example_input(1, 64, 96))
    (found,) = detector.detect([torch.rand(3, 64, 90)])  # the second place stays empty
    assert len(found["boxes"]) > 10


def test_it_is_compared_without_tf32(run, tmp_path, quick_write, monkeypatch):
    conv, forward, seen = torch.backends.cudnn.conv, DetectorProgram.forward, []

    def watched(program, pixels, sizes):
        seen.append(conv.fp32_precision)
        return forward(program, pixels, sizes)

    monkeypatch.setattr(DetectorProgram, "forward", watched)
    before = conv.fp32_precision
    export.main([str(run), str(tmp_path / "a.pt2"), "--device", "cpu"])
    assert before != "ieee" and conv.fp32_precision == before
    assert seen == ["ieee"] * 2  # the package, and the model


@pytest.mark.parametrize("allowed", [True, False])
def test_exact_float32_leaves_the_switches_as_they_were(monkeypatch, allowed):
    """The older one too, which raises where two newer ones contradict it."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(cudnn, "deterministic", not allowed)
    before = cudnn.conv.fp32_precision
    with pytest.raises(ZeroDivisionError), exact_float32():
        assert cudnn.conv.fp32_precision == "ieee" and cudnn.deterministic
        raise ZeroDivisionError
    assert cudnn.conv.fp32_precision == before and cudnn.allow_tf32 == allowed
    assert cudnn.deterministic == (not allowed)


def test_a_wrong_program_is_not_written(run, tmp_path, quick_write, monkeypatch, capsys):
    class Wrong(DetectorProgram):
        def forward(self, pixels, sizes):
            boxes, scores, labels, count = super().forward(pixels, sizes)
            return boxes + 1, scores, labels, count

    original = package.write_package
    monkeypatch.setattr(package, "write_package", lambda program, *rest: original(Wrong(program.detector), *rest))
    assert fails(run, tmp_path / "a.pt2", "--device", "cpu") == 1
    assert "does not compute what the model does" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    export.main([str(run), str(tmp_path / "a.pt2"), "--device", "cpu", "--no-check"])
    assert (tmp_path / "a.pt2").exists()


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    def write(program, example, description, path):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "write_package", write)
    with pytest.raises(SystemExit) as stop:
        export.main([str(run), str(tmp_path / "a.pt2"), "--device", "cpu"])
    assert stop.value.code == 130 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "OUT/old.pt2"), "old.pt2 exists: give another name"),
        (("RUN", "OUT/none/a.pt2"), "cannot be written"),
        (("RUN", "OUT/a.bin"), "its name must end in .pt2, .onnx or .xml"),
        (("RUN", "OUT/a.pt2", "--format", "onnx"), "its name must end in .onnx"),
        (("RUN", "OUT/a.pt2", "--height", "100"), "--height is 100, a multiple of 32 (image.size_divisible)"),
        (("RUN", "OUT/a.pt2", "--width", "0"), "--width is 0, a multiple of 32"),
        (("RUN", "OUT/a.pt2", "--dynamic-batch"), "with a --batch of at least 2"),
        (("RUN", "OUT/a.onnx", "--dynamic-batch", "--batch", "2"), "--dynamic-batch is for packages"),
        (("RUN", "OUT/a.pt2", "--batch", "0"), "--batch is 0, at least 1 is accepted"),
        (("RUN", "OUT/a.pt2", "--ext-gate", "2"), "detection.ext_gate: expected"),
        (("RUN", "OUT/a.onnx", "--device", "cuda"), "an ONNX file is for any device"),
        (("RUN", "OUT/a.xml", "--device", "cuda"), "OpenVINO runs on the CPU"),
        (("RUN", "OUT/old.xml"), "old.bin exists: give another name"),
        (("RUN", "OUT/a.onnx", "--precision", "int8"), "--precision int8 is for OpenVINO files (.xml)"),
        (("RUN", "OUT/a.xml", "--data.root", "OUT"), "--data.* are the images that --precision int8 is calibrated on"),
        (("RUN", "OUT/a.xml", "--precision", "int8", "--int8-images", "0"), "--int8-images is 0, at least 1"),
        (("RUN", "OUT/a.xml", "--int8-images", "3"), "--int8-images is for --precision int8: give both, or neither"),
        (("OUT/none", "OUT/a.pt2"), "none: no such file"),
        (("OUT", "OUT/a.pt2"), "this folder has no model.safetensors"),
        (("RUN", "OUT/a.pt2", "--format", "tensorrt"), "tensorrt"),
    ],
)
def test_user_errors(run, tmp_path, capsys, arguments, message):
    for name in ("old.pt2", "old.bin"):
        (tmp_path / name).write_text("kept")
    arguments = [argument.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for argument in arguments]
    assert fails(*arguments) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old.pt2": "kept", "old.bin": "kept"}


def test_missing_packages_are_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "NEEDED", ("onnx", "no_such_package"))
    assert fails(run, tmp_path / "a.onnx") == 2
    assert "--format onnx needs no_such_package: pip install 'doublehead[onnx]'" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fails(run, tmp_path / "a.pt2", "--device", "cpu") == 2
    assert "no compiler is found (no-such-compiler)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_cuda_device(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fails(run, tmp_path / "a.pt2", "--device", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_default_input_size_holds_landscape_pictures():
    assert export.input_size(ImageConfig(), None, None) == (800, 1344)
    assert export.input_size(ImageConfig(min_size=(600, 700), size_divisible=64), None, 128) == (704, 128)


# ---------------------------------------------------------------------- the comparison


def some_detections(number=40, images=1):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(images, number, 4, generator=generator) * 100
    labels = torch.randint(1, 4, (images, number), generator=generator)
    return boxes, torch.linspace(0.9, 0.1, number).repeat(images, 1), labels, torch.full((images,), number)


def test_differences_see_more_than_rounding():
    boxes, scores, labels, count = some_detections()
    assert differences((boxes + 1e-3, scores, labels, count), (boxes, scores, labels, count)) is None
    swapped = [values.clone() for values in (boxes, scores, labels)]
    for values in swapped:
        values[0, [3, 4]] = values[0, [4, 3]]
    assert differences((*swapped, count), (boxes, scores, labels, count)) is None
    for wrong in (
        (boxes + 1, scores, labels, count),
        (boxes, scores * 0.9, labels, count),
        (boxes, scores, labels % 3 + 1, count),
        (boxes, scores, labels, count - 1),
        (boxes, scores, labels, count * 0),
    ):
        assert differences(wrong, (boxes, scores, labels, count)).startswith("of image 0's 40 detections")
    none = torch.zeros(1, dtype=torch.int64)
    assert differences((boxes, scores, labels, none), (boxes, scores, labels, none)) is None


def test_differences_allow_one_in_fifty():
    expected = some_detections(100)
    found = (*expected[:3], expected[3] - 2)
    assert differences(found, expected) is None
    assert differences((*expected[:3], expected[3] - 3), expected) is not None


def test_example_input_has_padding():
    pixels, sizes = example_input(3, 64, 96)
    assert sizes.tolist() == [[64, 96], [56, 88], [48, 80]]
    assert pixels[2, :, 48:].eq(0).all() and pixels[2, :, :, 80:].eq(0).all() and pixels[2, :, 47, 79].ne(0).all()
