"""`doublehead info`."""

import subprocess
import sys

import pytest
import torch

import doublehead
from doublehead.cli import installation
from doublehead.ops import _fallback, _library, int8
from doublehead.ops.processor import processor


def test_command_prints_the_report():
    # As `-m doublehead info`, where torchvision is missing: the operators and this command need torch alone.
    code = "import sys; sys.modules['torchvision'] = None; from doublehead.cli import main; main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["doublehead", doublehead.__version__]
    assert any(line.startswith("torch") and torch.__version__ in line for line in lines)
    for part in ("CPU part", "CUDA part"):
        assert any(line.startswith(part) for line in lines)


def rows(report: str) -> dict[str, list[str]]:
    """The table's lines: operator -> what serves it on cpu and on cuda."""
    lines = [line.split() for line in report.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in _library.SCHEMAS}


def test_table_lists_every_operator_as_torch_dispatches_it():
    table = rows(installation.report())
    assert set(table) == set(_library.SCHEMAS)
    for name, served in table.items():
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"doublehead::{name}", "CPU")
        assert (served[0] == "reference") == (not kernel), name
        assert (served[1] == "reference") == (_library.why_reference(name) is not None), name
    if "_C" not in _library.UNLOADED:
        assert table["nms_padded"][0] == "C++"
    assert table["conv_head"][0] == "PyTorch" and table["conv_head"][1] in ("Triton", "reference")


def test_why_there_is_no_kernel(monkeypatch):
    name = "nms_padded"
    unloaded = {"_C": "it is not built", "_C_cuda": "this torch was built without CUDA"}
    monkeypatch.setattr(_library, "UNLOADED", unloaded)
    monkeypatch.setattr(_library, "_registered", lambda name, key: False)
    monkeypatch.setattr(_fallback, "no_triton", lambda: _fallback.NO_TRITON)
    monkeypatch.setattr(_fallback, "refusal", _fallback.Refusals())
    assert installation.served_by(name, "cpu") == ("reference", "_C is not loaded")
    assert installation.served_by(name, "cuda") == ("reference", _library.no_cuda_part())
    report = installation.report()
    assert set(sum(rows(report).values(), [])) == {"reference"}
    assert "CPU part     not loaded: it is not built" in report
    assert "CUDA part    not loaded: this torch was built without CUDA" in report
    assert "reference on cuda: _C_cuda is not loaded: this torch was built without CUDA" in report
    assert "reference on cuda: Triton is not installed" in report
    monkeypatch.setattr(_library, "UNLOADED", {"_C": "it is not built"})
    assert installation.served_by(name, "cuda") == ("reference", "no CUDA kernel in this version")


def test_every_gpu_has_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["New", "Old"][index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(_fallback, "no_triton", lambda: None)
    monkeypatch.setattr(_fallback, "_start_triton", lambda: None)
    monkeypatch.setattr(_fallback, "refusal", _fallback.Refusals())
    lines = installation.report().splitlines()
    reasons = [line for line in lines if line.startswith("reference on cuda")]
    (refused,) = [line for line in reasons if not line.startswith("reference on cuda: for the CPU alone")]
    assert refused.startswith("reference on cuda:1: GPU 1 is sm_75") and "conv_head" in refused
    assert rows("\n".join(lines))["conv_head"][1] == "Triton"


def test_the_precision_of_float32_is_shown():
    switch, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            switch.fp32_precision = precision
            report = installation.report()
            assert f'torch.backends.cudnn.conv.fp32_precision = "{precision}"' in report
    finally:
        switch.fp32_precision = before
    assert f'cuda.matmul.fp32_precision = "{torch.backends.cuda.matmul.fp32_precision}"' in report


@pytest.mark.skipif("_C" in _library.UNLOADED, reason=f"the CPU part is not loaded: {_library.UNLOADED.get('_C')}")
def test_build_info_of_the_cpu_part():
    build = installation.compiled_part("_C").build_info()
    assert build["compiler"].split()[-1][0].isdigit()
    assert "-O3" in build["flags"]
    assert build["torch"][0].isdigit()
    assert build["instruction_set"] in installation.report()


@pytest.mark.skipif("_C_cuda" in _library.UNLOADED, reason=f"no CUDA part: {_library.UNLOADED.get('_C_cuda')}")
def test_build_info_of_the_cuda_part():
    build = installation.compiled_part("_C_cuda").build_info()
    assert build["cuda_runtime"] >= 12000
    archs = build["archs"].split(",")
    assert all(int(arch) >= 75 for arch in archs)
    assert f"sm_{archs[0]}" in installation.report()


def test_what_the_cpu_means_for_each_precision(monkeypatch):
    lines = installation.report().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("CPU  "))
    assert lines[first].endswith(processor().listed())
    assert [line.split()[0] for line in lines[first + 1 : first + 5]] == ["fp32", "bf16", "fp16", "int8"]
    new = processor()._replace(x86=True, bf16=True, fp16=False)
    monkeypatch.setattr("doublehead.engine.precision.processor", lambda: new)
    monkeypatch.setattr(int8, "int8_support", lambda: int8.Support("vnni", ""))
    report = installation.report()
    assert "  bf16       native\n" in report
    assert "  fp16       emulated, slower than fp32: this processor lacks AVX512-FP16 and AMX\n" in report
    assert "  int8       native; the other layers compute in bf16\n" in report
    monkeypatch.setattr(int8, "int8_support", lambda: int8.Support("none", "it is an abacus"))
    assert "  int8       cannot run: it is an abacus\n" in installation.report()
