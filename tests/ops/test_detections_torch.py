"""Detections inside torch: opcheck, torch.compile, export, autocast, errors; on a GPU; and compiled for GPUs."""

from __future__ import annotations

import math

import pytest
import torch

from doublehead.ops import detections
from doublehead.ops.detections import by_class
from doublehead.ops.detections.arguments import DetectionArguments
from tests.support.detection_cases import OPTIONS, tensors

# ---------------------------------------------------------------------------------------------
# Inside torch


@pytest.mark.parametrize("heads, rois", [(1, 6), (2, 6), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(heads, rois, dtype):
    logits, deltas, *others = tensors(2, rois, 4, heads=heads)
    logits = [item.to(dtype).requires_grad_() for item in logits]
    arguments = (logits, deltas.requires_grad_(), *others, *OPTIONS.values())
    torch.library.opcheck(torch.ops.doublehead.detections.default, arguments)
    args = DetectionArguments([item.detach() for item in logits], deltas.detach(), *arguments[2:])
    torch.library.opcheck(torch.ops.doublehead.detections_by_class.default, by_class.with_number(args))


def test_it_has_no_gradient():
    logits, deltas, *others = tensors()
    logits, deltas = [item.requires_grad_() for item in logits], deltas.requires_grad_()
    found = detections(logits, deltas, *others)
    assert not any(item.requires_grad for item in found)
    found = torch.ops.doublehead.detections(logits, deltas, *others, *OPTIONS.values())
    assert not any(item.requires_grad for item in found)


def test_compiled_with_dynamic_shapes():
    def call(*inputs, most):
        return detections(*inputs, max_detections=most)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, rois, classes, most in ((2, 12, 5, 20), (3, 7, 4, 9), (1, 1, 2, 1)):
        inputs = tensors(batch, rois, classes)
        for a, e in zip(compiled(*inputs, most=most), call(*inputs, most=most), strict=True):
            assert torch.equal(a, e)


class Detect(torch.nn.Module):
    def forward(self, fc, conv, deltas, proposals, valid, sizes):
        return detections([fc, conv], deltas, proposals, valid, sizes)


def test_exported():
    batch, rois = torch.export.Dim("batch", min=1), torch.export.Dim("rois", min=1)
    shapes = {name: {0: batch, 1: rois} for name in ("fc", "conv", "deltas", "proposals", "valid")}
    flat = [(*inputs[0], *inputs[1:]) for inputs in (tensors(2, 12), tensors(3, 5), tensors(4, 2))]
    program = torch.export.export(Detect(), flat[0], dynamic_shapes=shapes | {"sizes": {0: batch}})
    for inputs in flat:
        for a, e in zip(program.module()(*inputs), Detect()(*inputs), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    inputs = tensors()
    expected = detections(*inputs, **OPTIONS)
    with torch.autocast("cpu", dtype=dtype):
        assert all(torch.equal(a, e) for a, e in zip(detections(*inputs, **OPTIONS), expected, strict=True))
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("doublehead::detections", key)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(logits=[]), ValueError, "logits must be those of 1 or 2 classifiers, got 0"),
        (dict(logits=[torch.zeros(5, 4)]), ValueError, r"logits\[0\] must have shape \[B, R, C\].*got \[5, 4\]"),
        (dict(logits=[torch.zeros(2, 5, 0)]), ValueError, r"logits\[0\] must .* C >= 1, got \[2, 5, 0\]"),
        (dict(logits=[torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)]), ValueError, r"logits\[1\] must .*got \[2, 5, 4\]"),
        (dict(deltas=torch.zeros(2, 5, 4)), ValueError, r"deltas must have shape \[B, R, C, 4\] = \[2, 5, 3, 4\]"),
        (dict(deltas=torch.zeros(2, 5, 3, 4, dtype=torch.int32)), TypeError, "deltas must be float16.*torch.int32"),
        (dict(proposals=torch.zeros(2, 4, 4)), ValueError, r"proposals must have shape.*got \[2, 4, 4\]"),
        (dict(valid=torch.zeros(2, 5)), TypeError, "valid must be bool, got torch.float32"),
        (dict(sizes=torch.zeros(2, 3)), ValueError, r"sizes must have shape \[B, 2\] = \[2, 2\].*got \[2, 3\]"),
        (dict(sizes=torch.zeros(2, 2, device="meta")), ValueError, "sizes must be on the device of.*cpu, got meta"),
        (dict(sizes=torch.zeros(2, 2, dtype=torch.complex64)), TypeError, "sizes must be real.*complex64"),
        (dict(fusion="sum"), ValueError, "fusion must be one of complementary, max, average, none, got 'sum'"),
        (dict(score_threshold=math.nan), ValueError, "score_threshold must be a number, got nan"),
        (dict(max_detections=-1), ValueError, "max_detections must be >= 0, got -1"),
        (dict(box_weights=(1.0, 1.0, 1.0)), ValueError, r"box_weights must be 4 numbers.*\(1.0, 1.0, 1.0\)"),
        (dict(box_weights=(1.0, 0.0, 1.0, 1.0)), ValueError, "box_weights must be 4 numbers other than 0"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(
        logits=[torch.zeros(2, 5, 3)],
        deltas=torch.zeros(2, 5, 3, 4),
        proposals=torch.zeros(2, 5, 4),
        valid=torch.ones(2, 5, dtype=torch.bool),
        sizes=torch.zeros(2, 2),
    )
    with pytest.raises(error, match=message):
        detections(**(arguments | change))


# ---------------------------------------------------------------------------------------------
# On a GPU


def on_gpu(inputs):
    logits, *others = inputs
    return [item.cuda() for item in logits], *(item.cuda() for item in others)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    inputs = on_gpu(tensors())
    detections(*inputs, **OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        detections(*inputs, **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_graph_replayed_with_other_inputs():
    inputs = on_gpu(tensors(2, 300, 81, scale=3.0))
    detections(*inputs, **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = detections(*inputs, **OPTIONS)
    for seed in range(4):
        other = on_gpu(tensors(2, 300, 81, seed, scale=3.0))
        for target, source in zip((*inputs[0], *inputs[1:]), (*other[0], *other[1:]), strict=True):
            target.copy_(source)
        for item in found:
            item.fill_(-7)
        graph.replay()
        assert all(torch.equal(a, e) for a, e in zip(found, detections(*other, **OPTIONS), strict=True))


# ---------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here


def test_compiled_kernels_do_not_spill():
    pytest.importorskip("triton")
    from doublehead.ops.detections.kernel import BLOCK_DETECTIONS
    from doublehead.ops.score_fusion.kernel import MAX_CLASSES, warps
    from tests.support.triton_compile import Case, compile_cases

    module = "doublehead.ops.detections.kernel"
    sizes = {name: "i32" for name in ("rois", "classes", "slots")}
    numbers = {n: "fp32" for n in ("threshold", "min_size", "least_side")}
    numbers |= {f"weight_{letter}": "fp32" for letter in "xywh"}
    results = {"boxes": "*fp32", "scores": "*fp32", "groups": "*i64"}
    inputs = {"fc_logits": "*bf16", "conv_logits": "*bf16", "deltas": "*bf16", "proposals": "*fp32", "valid": "*u8"}
    signature = inputs | {"sizes": "*fp32"} | results | sizes | numbers
    cases = []
    for block, slots, fusion in ((128, 64, "complementary"), (MAX_CLASSES, MAX_CLASSES, "max")):
        constants = {"FUSION": fusion, "BLOCK_CLASSES": block, "BLOCK_SLOTS": slots}
        cases.append(Case(module, "_candidates", signature, constants, warps(block), 3))
    kept = {"kept_boxes": "*fp32", "kept_scores": "*fp32", "kept_labels": "*i64"}
    gather = {"kept": "*i64"} | results | kept | {"candidates": "i32", "detections": "i32"}
    cases.append(Case(module, "_gather", gather, {"BLOCK": BLOCK_DETECTIONS}, 4, 3))
    for compiled in compile_cases(cases):
        assert compiled.stack == compiled.local == 0, compiled
        assert compiled.registers <= 255 and compiled.shared <= 16 * 1024, compiled
