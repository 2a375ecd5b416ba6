"""OpenVINO files: the model's detections, one clear line for what cannot be opened, and int8 for layers alone."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from doublehead.config import Recipe
from doublehead.engine.errors import UserError
from doublehead.exporting import load, onnx_file, openvino_file, openvino_runtime
from doublehead.exporting.as_model import ExportedModel, TranslatedModel
from doublehead.exporting.description import describe
from doublehead.exporting.openvino_int8 import kept_float, quantised
from doublehead.exporting.program import DetectorProgram, differences, example_input
from doublehead.models import ImageBatch, build_detector
from tests.support.tiny_detectors import lively, shallow, tiny

pytest.importorskip("onnxscript", reason="pip install 'doublehead[openvino]'")
if not openvino_runtime.is_installed():
    pytest.skip("OpenVINO is not installed: pip install 'doublehead[openvino]'", allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_detector(tiny("double_head_ext"), num_classes=4)
    lively(shallow(model.detector))
    return model.eval()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The file; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("openvino") / "a.xml"
    example = example_input(2, 64, 96)
    recipe = Recipe(name="tiny-ext", model=model.config)
    note = describe("openvino", recipe, ["a", "b", "c"], [1, 2, 3], example[0].shape, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "OPTIMIZE", False)  # it takes long, and OpenVINO simplifies the graph itself
        openvino_file.write_openvino(DetectorProgram(model.detector, plain=True), example, note, path)
    return path


@pytest.fixture
def copied(written, tmp_path):
    for file in (written, openvino_runtime.weights_of(written)):
        shutil.copy(file, tmp_path)
    return tmp_path / written.name


def test_a_file_gives_the_models_detections(model, written):
    assert sorted(path.name for path in written.parent.iterdir()) == ["a.bin", "a.xml"]
    detector = load(written)
    assert detector.classes == ["a", "b", "c"] and detector.shape == (2, 64, 96) and detector.precision == "fp32"
    assert repr(detector) == "ExportedDetector(tiny-ext, 3 classes, 2 x 3 x 64 x 96, openvino on cpu)"
    for seed in range(2):
        inputs = example_input(2, 64, 96, seed=seed)
        with torch.no_grad():
            expected = model.detector(ImageBatch(*inputs))
        found = detector(*inputs)
        assert found.count.min() > 10 and found.labels.dtype == found.count.dtype == torch.int64
        assert differences(found, expected) is None
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"pixels: expected float32 \[2, 3, 64, 96\] on cpu, got"):
        detector(*example_input(1, 64, 96))


def test_as_a_model(model, written):
    detector = load(written)
    exported = ExportedModel(detector)
    images = [torch.rand(3, 128, 170, generator=torch.Generator().manual_seed(2))]
    with torch.no_grad():
        (expected,) = model(images)
    (found,) = exported(images)
    assert len(found["boxes"]) > 10
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"an image of 64x170 .* becomes \d+x96, and the program takes up to 96x64"):
        exported([torch.rand(3, 170, 64)])


def test_programs_for_the_sizes_that_come(model):
    made = []

    class Program:
        def __init__(self, height, width):
            made.append((height, width))

        def detect(self, images):
            return [made[-1]]

    translated = TranslatedModel(model, Program)
    for height, width in ((64, 64), (30, 30), (64, 70), (64, 96), (640, 900), (96, 64), (128, 64)):
        translated([torch.zeros(3, height, width)])
    assert made == [(64, 64), (64, 96), (96, 64)]


# ---------------------------------------------------------------------- precisions


def test_bf16_where_the_processor_has_none(written, monkeypatch):
    asked = []
    monkeypatch.setattr(openvino_runtime, "computes_in", lambda precision: False)
    monkeypatch.setattr(openvino_runtime, "compiled", lambda graph, precision: asked.append(precision))
    with pytest.warns(UserWarning, match="bf16: OpenVINO finds none in this processor, and computes in fp32"):
        detector = load(written, precision="bf16")
    assert detector.precision == "fp32" and asked == ["fp32"]
    monkeypatch.setattr(openvino_runtime, "computes_in", lambda precision: True)
    assert load(written, precision="bf16").precision == "bf16" and asked == ["fp32", "bf16"]
    with pytest.raises(UserError, match=r"a.xml: computes in fp32, not in int8: export it with --precision int8"):
        load(written, precision="int8")
    with pytest.raises(UserError, match=r"a.xml: computes in fp32, not in fp16: OpenVINO files are in fp32, bf16 or"):
        load(written, precision="fp16")


def test_threads_and_precision_are_those_asked_for(written):
    before = torch.get_num_threads()
    graph, _ = openvino_runtime.read(written)
    try:
        torch.set_num_threads(1)
        compiled = openvino_runtime.compiled(graph)
    finally:
        torch.set_num_threads(before)
    properties = [compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")]
    assert properties == [1, 1]
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert openvino_runtime.compiled(graph, threads=2).get_property("INFERENCE_NUM_THREADS") == 2


def test_int8_leaves_everything_but_layers_alone(written):
    graph, _ = openvino_runtime.read(written)
    kept = set(kept_float(graph))
    changed = [node for node in graph.get_ops() if node.get_friendly_name() not in kept]
    names = Counter(node.get_type_name() for node in changed)
    layers = Counter(node.get_type_name() for node in graph.get_ops())
    assert names["Convolution"] == layers["Convolution"] > 20
    assert 0 < names["MatMul"] < layers["MatMul"]  # the attention's products have no weights
    assert set(names) == {"Convolution", "MatMul", "Add", "Constant", "Parameter", "Result"}
    assert {len(node.shape) for node in changed if node.get_type_name() == "Add"} == {4}


def test_int8_computes_nearly_the_same():
    """On a small network: NNCF takes long for a detector's."""
    pytest.importorskip("nncf", reason="pip install 'doublehead[openvino]'")
    from openvino import Model
    from openvino import opset13 as op

    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(*shape, generator=generator) / 5).numpy() for shape in ((8, 3, 3, 3), (8, 8, 1, 1), (8, 5))]
    pixels, sizes = op.parameter([1, 3, 8, 8], name="pixels"), op.parameter([1, 2], name="sizes")
    first = op.relu(op.convolution(pixels, weights[0], [1, 1], [1, 1], [1, 1], [1, 1]))
    second = op.add(first, op.convolution(first, weights[1], [1, 1], [0, 0], [0, 0], [1, 1]))
    pooled = op.reduce_max(second, [2, 3], False)
    scores = op.matmul(pooled, weights[2], False, False)
    boxes = op.multiply(op.reduce_sum(sizes, [0, 1], False), op.exp(scores))
    for parameter in (pixels, sizes):
        parameter.output(0).set_names({parameter.get_friendly_name()})
    graph = Model([boxes], [pixels, sizes], "small")

    inputs = [(torch.randn(1, 3, 8, 8, generator=generator), torch.tensor([[8.0, 8.0]])) for _ in range(8)]
    changed = quantised(graph, inputs)
    fed = Counter()
    for node in changed.get_ops():
        if node.get_type_name() == "FakeQuantize":
            fed.update(target.get_node().get_type_name() for target in node.output(0).get_target_inputs())
    assert set(fed) == {"Convolution", "Add", "MatMul"}
    values = [
        torch.from_numpy(openvino_runtime.compiled(each)([tensor.numpy() for tensor in inputs[0]])[0])
        for each in (graph, changed)
    ]
    error = (values[1] - values[0]).abs().mean() / values[0].abs().mean()
    assert 1e-4 < error < 0.3, error


# ---------------------------------------------------------------------- files that cannot be opened


def test_weights_that_are_missing_or_others(copied):
    weights = openvino_runtime.weights_of(copied)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"a.bin: damaged, or not the weights of a.xml"):
        load(copied)
    weights.write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"a.xml: .*damaged"):
        load(copied)
    weights.unlink()
    with pytest.raises(UserError, match=r"a.xml: its weights are missing: a.bin belongs beside it"):
        load(copied)


@pytest.mark.parametrize("content", ["", "<annotation><object/></annotation>", "no xml", "<net name='a'"])
def test_what_is_no_program(copied, content, capfd):
    copied.write_text(content)
    with pytest.raises(UserError) as refused:
        load(copied)
    assert str(refused.value).startswith(f"{copied}: not an OpenVINO file, or damaged (")
    if "<net" not in content:  # other formats' parsers print errors
        assert capfd.readouterr().err == ""
    assert "\n" not in str(refused.value)


def test_a_program_of_others_and_a_cut_one(copied):
    text = copied.read_text()
    copied.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not an OpenVINO file, or damaged"):
        load(copied)
    copied.write_text(text.replace("<doublehead ", "<somebody "))
    with pytest.raises(UserError, match="not a detector that `doublehead export` wrote"):
        load(copied)


def test_without_openvino(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"a.xml: an OpenVINO file; to open it: pip install openvino"):
        load(copied)


# ---------------------------------------------------------------------- threads, processes


def test_a_forked_process_is_refused(written, monkeypatch):
    detector, before = load(written), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: before + 1)
    with pytest.raises(
        RuntimeError, match=f'opened in process {before}, of which .* is a fork, where OpenVINO .* "spawn"'
    ):
        detector(*example_input(2, 64, 96))


ELSEWHERE = """
import sys, threading
for name in ("torchvision", "onnx", "nncf", "tyro", "doublehead.models"):
    sys.modules[name] = None  # importing it fails
import torch
from doublehead.exporting import load
torch.set_num_threads(2)
detector = load(sys.argv[1])
inputs = torch.load(sys.argv[2])
expected = [detector(*batch) for batch in inputs]

def right():
    return all(all(torch.equal(*pair) for pair in zip(detector(*batch), wanted))
               for batch, wanted in zip(inputs * 2, expected * 2))

results = []
threads = [threading.Thread(target=lambda: results.append(right())) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert results == [True] * 4
print("right")
"""


def test_threads_without_model_code_and_reports(written, tmp_path):
    """In a home of its own: OpenVINO would leave an identifier for its usage reports there."""
    torch.save([example_input(2, 64, 96, seed=seed) for seed in range(2)], tmp_path / "in.pt")
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, written, tmp_path / "in.pt"], capture_output=True, text=True, timeout=180,
        env={name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(home)},
    )  # fmt: skip
    assert done.stdout == "right\n", (done.returncode, done.stderr[-2000:])
    assert list(home.glob("intel")) == []


def test_the_description_is_in_the_file(written):
    graph, note = openvino_runtime.read(written)
    description = json.loads(note)
    assert description["kind"] == "openvino" and description["precision"] == "fp32"
    assert description[openvino_runtime.WEIGHTS] == openvino_runtime.digest(openvino_runtime.weights_of(written))
