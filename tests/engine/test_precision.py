"""Precisions by name: what computes in them, and the one line where a processor lacks them."""

import pytest
import torch
from torch import nn

from doublehead.engine import precision
from doublehead.engine.evaluator import inference
from doublehead.engine.precision import FP32, in_float32, resolve_precision, set_precision
from doublehead.errors import UserError
from doublehead.models import build_detector, quantized
from doublehead.models.quantized import Support, int8_layers, int8_support, layers_in_int8
from doublehead.ops import int8
from doublehead.ops.processor import processor
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)
from tests.support.int8_samples import save_int8_detector
from tests.support.tiny_detectors import lively, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEEDS_INT8 = pytest.mark.skipif(int8_support().level == "none", reason=f"no int8 here: {int8_support().reason}")


@pytest.fixture
def native(monkeypatch):
    """Says what the processor has."""

    def has(bf16=False, fp16=False, level="seven_bits", reason="the processor has no VNNI"):
        fake = processor()._replace(x86=True, bf16=bf16, fp16=fp16)
        monkeypatch.setattr(precision, "processor", lambda: fake)
        for module in (quantized, int8):
            monkeypatch.setattr(module, "int8_support", lambda: Support(level, reason))

    return has


def test_one_line_where_the_processor_lacks_it(native):
    native()
    assert resolve_precision("fp32", CPU)[1:] == ("fp32", None, "", None)
    slow = "is emulated, slower than fp32: this processor lacks AVX512-"
    assert resolve_precision("bf16", CPU).note == f"bf16 {slow}BF16 and AMX"
    assert resolve_precision("fp16", CPU).note == f"fp16 {slow}FP16 and AMX"
    assert resolve_precision("bf16", CUDA).note == "" == resolve_precision("fp16", CUDA).note
    mode = resolve_precision("int8", CPU)
    assert mode[1:] == ("int8", None, "int8 inputs have 7 bits: the processor has no VNNI", None)
    native(bf16=True, fp16=True, level="vnni", reason="")
    assert [resolve_precision(name, CPU).note for name in ("fp32", "bf16", "fp16", "int8")] == [""] * 4
    assert resolve_precision("int8", CPU).dtype == torch.bfloat16


@pytest.mark.parametrize("bf16, used", [(True, "bf16"), (False, "fp32")])
def test_int8_without_operators_falls_back_and_says_so(native, bf16, used):
    native(bf16=bf16, level="none", reason="it is an abacus")
    mode = resolve_precision("int8", CPU)
    assert (mode.asked, mode.used, mode.dtype) == ("int8", used, precision.DTYPES[used])
    assert mode.note == f"int8 cannot run here, {used} runs in its place: it is an abacus"


def test_wrong_precisions_are_one_line():
    with pytest.raises(UserError, match="^precision is 'fp8': expected one of fp32, bf16, fp16, int8$"):
        resolve_precision("fp8", CPU)
    with pytest.raises(UserError, match="^precision int8 is for CPUs, this is cuda: take the device cpu, or"):
        resolve_precision("int8", CUDA)


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_whole_detector_computes_in_it_on_a_cpu(name, dtype):
    torch.manual_seed(0)
    model = build_detector(tiny("double_head_ext"), 4)
    lively(model.detector)
    image = torch.randint(256, (3, 64, 80), dtype=torch.uint8)
    seen = {}
    layers = [*model.detector.backbone.modules(), *model.detector.rpn.modules(), *model.detector.heads.modules()]
    for layer in layers:
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(lambda layer, _, output: seen.update({layer: output.dtype}))
    with inference(model), resolve_precision(name, CPU).autocast(CPU):
        (found,) = model([image])
    assert len(seen) > 20 and set(seen.values()) == {dtype}
    assert {key: value.dtype for key, value in found.items()} == {
        "boxes": torch.float32, "labels": torch.int64, "scores": torch.float32
    }  # fmt: skip
    with inference(model):
        (exact,) = model([image])
    assert len(found["scores"]) > 5 and (found["scores"][:5] - exact["scores"][:5]).abs().max() < 0.05
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@NEEDS_INT8
def test_int8_switches_the_layers_of_the_file_over(tmp_path):
    from doublehead.engine.checkpoint import load_model

    folder = save_int8_detector(tmp_path / "run")
    model = load_model(folder).model
    mode = set_precision(model, "int8", CPU, folder)
    assert mode.used == "int8" and layers_in_int8(model) == int8_layers(model)[2:]
    with in_float32(model, CPU, mode):
        assert layers_in_int8(model) == []
        assert not torch.is_autocast_enabled("cpu")
    assert layers_in_int8(model) == int8_layers(model)[2:]


def test_int8_of_a_machine_without_operators_computes_in_float(tmp_path, native):
    from doublehead.engine.checkpoint import load_model

    folder = save_int8_detector(tmp_path / "run")
    native(level="none", reason="it is an abacus")
    model = load_model(folder).model
    assert set_precision(model, "int8", CPU, folder).used == "fp32"
    assert layers_in_int8(model) == []


def test_the_reference_in_float32_leaves_autocast():
    with torch.autocast("cpu", torch.bfloat16), in_float32(nn.Identity(), torch.device("cpu"), FP32):
        assert not torch.is_autocast_enabled("cpu")
