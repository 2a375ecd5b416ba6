"""benchmarks/smoke.py: it passes here, sees a wrong kernel, one that was not run, and an operator nobody runs."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.support.paths import BENCHMARKS

pytest.importorskip("triton")
sys.path.insert(0, str(BENCHMARKS))

import smoke  # noqa: E402
import smoke_cases  # noqa: E402
import smoke_detector  # noqa: E402

from doublehead.ops._library import CPU_ONLY, SCHEMAS, TRITON_KERNELS  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself runs there")
KERNELS = [name for name, case in smoke_cases.CASES.items() if not case.cuda]


def test_without_a_gpu_nothing_is_checked(capsys):
    assert smoke.main([]) == 0
    assert capsys.readouterr().out == "no GPU: nothing checked\n"
    assert smoke.main(["--only", "nms"]) == 0
    assert capsys.readouterr().out == "no GPU: nothing checked\n"


def test_an_unknown_case_is_an_error_without_a_gpu_too(capsys):
    assert smoke.main(["--only", "nms", "nmz"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("no case nmz; there are: ")


def test_every_kernel_passes_on_the_cpu(capsys):
    assert smoke.main(["--device", "cpu", "--jobs", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all ok"
    assert all(any(line.startswith(name) and " ok" in line for line in lines) for name in KERNELS)


def test_every_operator_has_a_case(monkeypatch):
    assert smoke.forgotten_operators(smoke_cases.CASES) == set()
    monkeypatch.setitem(SCHEMAS, "new", "new(Tensor x) -> Tensor")
    assert smoke.forgotten_operators(smoke_cases.CASES) == {"new"}


def test_a_wrong_kernel_fails_and_the_others_run(monkeypatch, capsys):
    right = TRITON_KERNELS["fused_conv"]
    monkeypatch.setitem(TRITON_KERNELS, "fused_conv", lambda *arguments: right(*arguments) * 1.05)
    assert smoke.main(["--device", "cpu", "--jobs", "0", "--only", "fused_conv", "nms"]) == 1
    output = capsys.readouterr().out
    assert "failed: fused_conv float32, fused_conv float16\n" in output and "wrong: 1x1, 3x3, mean" in output


def test_a_reference_in_the_kernels_place_fails(monkeypatch, capsys):
    monkeypatch.setitem(TRITON_KERNELS, "fuse_scores", smoke_cases.score_fusion_reference.fuse_scores)
    monkeypatch.setitem(TRITON_KERNELS, "fuse_scores_backward", smoke_cases.score_fusion_reference.fuse_scores_backward)
    assert smoke.main(["--device", "cpu", "--jobs", "0", "--only", "fuse_scores"]) == 1
    assert "no Triton kernel of score_fusion was launched" in capsys.readouterr().out


def test_a_compiled_kernel_that_is_not_called_fails(monkeypatch, capsys):
    """As it would be if Triton's, or plain PyTorch, took its place."""
    right = smoke_cases.CASES["nms"]
    monkeypatch.setitem(smoke_cases.CASES, "nms", right._replace(operators=("nms", "nms_padded")))
    assert smoke.main(["--device", "cpu", "--jobs", "0", "--only", "nms"]) == 1
    output = capsys.readouterr().out
    assert "FAILED  nms_padded was not called" in output and "nms was not called" not in output


def test_what_a_detector_must_call_on_a_gpu_it_calls():
    """On a CPU `detections` takes the place of `detections_by_class`, to which it hands its calls on a GPU."""
    for name in ("detector, inference", "detector, training"):
        case = smoke_cases.CASES[name]
        with smoke.watched() as seen:
            list(case.run("cpu", torch.float32))
        others = (TRITON_KERNELS.keys() | CPU_ONLY) - {"detections"}
        assert {operator.removesuffix("_by_class") for operator in case.operators} == seen.called - others


def test_processes_side_by_side_and_one_that_is_stopped(capsys):
    assert smoke.main(["--device", "cpu", "--jobs", "2", "--only", "nms", "nms_padded"]) == 0
    assert capsys.readouterr().out.count("  ok\n") == 9  # and the heading
    assert smoke.main(["--device", "cpu", "--jobs", "1", "--only", "nms", "fuse_scores", "--seconds", "0.2"]) == 1
    output = capsys.readouterr().out
    assert "stopped after 0.2 s" in output and "not begun within 0.2 s" in output


@pytest.mark.parametrize("name", ["detector, inference", "detector, training"])
def test_the_detectors_steps(name):
    for what, error, bound in smoke_cases.CASES[name].run("cpu", torch.float32):
        assert error <= bound, what


def test_unlike_detections_are_seen():
    with torch.no_grad():
        found = smoke_detector.tiny_ext().detector(smoke_detector.batch())
    assert smoke_detector.unlike(found, found) == 0
    assert smoke_detector.unlike(found._replace(labels=found.labels + 1), found) > 0.5
