"""NMS inside torch: opcheck, torch.compile, torch.export, vmap, autocast, fake tensors; and its error messages."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from doublehead.ops import batched_nms, nms, nms_padded
from doublehead.ops.nms import reference
from tests.support.nms_cases import clustered_boxes

OPERATORS = torch.ops.doublehead


def padded_arguments(batch=2, count=60, seed=0):
    boxes, scores = clustered_boxes(batch * count, seed)
    groups = torch.arange(batch * count) % 4 - 1
    return boxes.view(batch, count, 4), scores.view(batch, count), groups.view(batch, count)


def equal(actual, expected):
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# ---------------------------------------------------------------------------------------------
# opcheck


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_opcheck_padded(dtype):
    boxes, scores, groups = padded_arguments()
    torch.library.opcheck(OPERATORS.nms_padded.default, (boxes.to(dtype), scores.to(dtype), groups, 0.5, 20))
    torch.library.opcheck(OPERATORS.nms_padded.default, (boxes[:, :0], scores[:, :0], groups[:, :0], 0.5, 20))


@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck_nms(count, grouped):
    boxes, scores = clustered_boxes(count, 0)
    torch.library.opcheck(OPERATORS.nms.default, (boxes, scores, torch.arange(count) % 3 if grouped else None, 0.5))


def test_opcheck_with_inputs_that_require_grad():
    boxes, scores, groups = padded_arguments()
    torch.library.opcheck(
        OPERATORS.nms_padded.default, (boxes.requires_grad_(), scores.requires_grad_(), groups, 0.5, 20)
    )
    boxes, scores = clustered_boxes(60, 0)
    torch.library.opcheck(OPERATORS.nms.default, (boxes.requires_grad_(), scores.requires_grad_(), None, 0.5))
    assert not nms(boxes, scores, 0.5).requires_grad


# ---------------------------------------------------------------------------------------------
# torch.compile and torch.export


def test_compiled_padded_with_dynamic_shapes():
    compiled = torch.compile(nms_padded, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, count, max_output in ((2, 60, 20), (3, 41, 50), (1, 1, 1), (2, 0, 3)):
        arguments = *padded_arguments(batch, count), 0.5, max_output
        assert equal(compiled(*arguments), nms_padded(*arguments))


@pytest.mark.parametrize("largest_group", [1, 60, 10**6])
def test_largest_group_changes_nothing(largest_group):
    """It is optional, also for programs of a time when there was none; the operator itself checks it too."""
    arguments = *padded_arguments(2, 60), 0.5, 20
    assert equal(nms_padded(*arguments, largest_group=largest_group), nms_padded(*arguments))
    assert equal(OPERATORS.nms_padded(*arguments), OPERATORS.nms_padded(*arguments, largest_group))
    assert equal(reference.nms_padded(*arguments, largest_group), nms_padded(*arguments))
    with pytest.raises(RuntimeError, match="largest_group must be >= 0, got -1"):
        OPERATORS.nms_padded(*arguments, -1)


def test_largest_group_may_be_a_dynamic_size():
    class Suppress(torch.nn.Module):
        def forward(self, *tensors):
            return nms_padded(*tensors, 0.5, 20, tensors[0].shape[1])

    count = torch.export.Dim("count", min=2, max=1000)
    arguments = padded_arguments(2, 60)
    program = torch.export.export(Suppress(), arguments, dynamic_shapes=(({1: count},) * 3,))
    assert equal(program.module()(*padded_arguments(2, 41)), nms_padded(*padded_arguments(2, 41), 0.5, 20))
    moved = torch.vmap(lambda *t: nms_padded(*t, 0.5, 20, 60))(*(tensor[None] for tensor in arguments))
    assert equal([result[0] for result in moved], nms_padded(*arguments, 0.5, 20))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_nms(dynamic):
    compiled = torch.compile(lambda *a: nms(*a) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (60, 1, 0, 45):
        boxes, scores = clustered_boxes(count, count)
        kept = compiled(boxes, scores, 0.5)
        assert kept.dtype == torch.int64 and torch.equal(kept - 1, nms(boxes, scores, 0.5))


def test_compiled_where_one_box_is_kept():
    compiled = torch.compile(lambda b, s: b[nms(b, s, 0.5)].sum(0), fullgraph=True, dynamic=True, backend="aot_eager")
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1), torch.rand(5)
    assert compiled(boxes, scores).tolist() == [0, 0, 10, 10]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_compiled_batched_nms(dtype):
    compiled = torch.compile(batched_nms, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (60, 45, 0):
        boxes, scores = clustered_boxes(count, count)
        classes = (torch.arange(count) % 4 - 2).to(dtype)
        assert torch.equal(compiled(boxes, scores, classes, 0.5), batched_nms(boxes, scores, classes, 0.5))


def test_compiled_reference_of_padded():
    # The definition is static too: shapes depend on shapes alone, and nothing is read back.
    compiled = torch.compile(reference.nms_padded, fullgraph=True, backend="aot_eager")
    arguments = *padded_arguments(2, 30), 0.5, 6
    assert equal(compiled(*arguments), nms_padded(*arguments))


class Suppress(torch.nn.Module):
    def forward(self, boxes, scores, groups):
        return nms_padded(boxes, scores, groups, 0.5, 20)


class SuppressAll(torch.nn.Module):
    def forward(self, boxes, scores, classes):
        return batched_nms(boxes, scores, classes, 0.5)


def test_exported_padded():
    batch, number = torch.export.Dim("batch", min=1), torch.export.Dim("number", min=1)
    shapes = {name: {0: batch, 1: number} for name in ("boxes", "scores", "groups")}
    program = torch.export.export(Suppress(), padded_arguments(), dynamic_shapes=shapes)
    for batch, count in ((2, 60), (3, 41), (5, 2)):
        arguments = padded_arguments(batch, count)
        assert equal(program.module()(*arguments), nms_padded(*arguments, 0.5, 20))


def test_exported_batched_nms():
    number = torch.export.Dim("number", min=1)
    shapes = {name: {0: number} for name in ("boxes", "scores", "classes")}
    example = (*clustered_boxes(60, 0), torch.arange(60) % 4)
    program = torch.export.export(SuppressAll(), example, dynamic_shapes=shapes)
    for count in (60, 45, 2):
        arguments = (*clustered_boxes(count, count), torch.arange(count) % 4)
        assert torch.equal(program.module()(*arguments), batched_nms(*arguments, 0.5))


# ---------------------------------------------------------------------------------------------
# Fake tensors, vmap, autocast


def test_fake_padded():
    with FakeTensorMode():
        indices, count = nms_padded(
            torch.empty(2, 9, 4), torch.empty(2, 9), torch.empty(2, 9, dtype=torch.int64), 0.5, 5
        )
    assert indices.shape == (2, 5) and count.shape == (2,) and indices.dtype == count.dtype == torch.int64


def test_fake_nms_has_an_unknown_length():
    with FakeTensorMode(shape_env=ShapeEnv()):
        kept = nms(torch.empty(9, 4), torch.empty(9), 0.5)
    assert kept.dtype == torch.int64 and kept.dim() == 1 and isinstance(kept.shape[0], torch.SymInt)


def test_vmap_padded():
    boxes, scores, groups = padded_arguments(6, 40)
    expected = nms_padded(boxes, scores, groups, 0.5, 20)
    folded = [tensor.unflatten(0, (3, 2)) for tensor in (boxes, scores, groups)]

    def run(*tensors):
        return nms_padded(*tensors, 0.5, 20)

    assert equal([r.flatten(0, 1) for r in torch.vmap(run)(*folded)], expected)
    moved = torch.vmap(run, in_dims=(1, 0, 2), out_dims=1)(
        folded[0].transpose(0, 1), folded[1], folded[2].movedim(0, 2)
    )
    assert equal([r.transpose(0, 1).flatten(0, 1) for r in moved], expected)
    shared = torch.vmap(run, in_dims=(None, 0, None))(boxes[:2], folded[1], groups[:2])
    for sample in range(3):
        assert equal((shared[0][sample], shared[1][sample]), run(boxes[:2], folded[1][sample], groups[:2]))


def test_vmap_of_vmap():
    boxes, scores, groups = (tensor.view(2, 3, 1, *tensor.shape[1:]) for tensor in padded_arguments(6, 40))
    nested = torch.vmap(torch.vmap(lambda *tensors: nms_padded(*tensors, 0.5, 20)))(boxes, scores, groups)
    flat = nms_padded(*(tensor.flatten(0, 2) for tensor in (boxes, scores, groups)), 0.5, 20)
    assert equal([r.flatten(0, 2) for r in nested], flat)


def test_vmap_nms_batches_where_all_keep_equally_many():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [30, 0, 40, 10]]).repeat(4, 1, 1).float()
    scores = torch.rand(4, 3)
    kept = torch.vmap(lambda b, s: nms(b, s, 0.5))(boxes, scores)
    assert torch.equal(kept, torch.stack([nms(b, s, 0.5) for b, s in zip(boxes, scores, strict=True)]))
    classes = torch.tensor([[0, -1, 0]]).repeat(4, 1)
    kept = torch.vmap(lambda b, s, c: batched_nms(b, s, c, 0.5))(boxes, scores, classes)
    assert torch.equal(kept, scores.argsort(descending=True))


def test_vmap_nms_says_what_to_do_where_they_do_not():
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 9]], [[0, 0, 10, 10], [30, 0, 40, 10]]]).float()
    with pytest.raises(ValueError, match="between 1 and 2 boxes.*nms_padded"):
        torch.vmap(lambda b, s: nms(b, s, 0.5))(boxes, torch.rand(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    # These boxes are one in 16 bits, and none overlaps another.
    boxes = torch.tensor([[4000.25 + 0.5 * i, 0, 4000.75 + 0.5 * i, 1] for i in range(8)])
    scores = torch.rand(8)
    with torch.autocast("cpu", dtype=dtype):
        assert len(nms(boxes, scores, 0.5)) == len(batched_nms(boxes, scores, torch.zeros(8), 0.5)) == 8
        assert nms_padded(boxes[None], scores[None], torch.zeros(1, 8, dtype=torch.int64), 0.5, 9)[1].item() == 8


@pytest.mark.parametrize("name", ["nms", "nms_padded"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", "FuncTorchBatched", "CompositeExplicitAutograd"])
def test_behaviour_is_registered_explicitly(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"doublehead::{name}", key)


# ---------------------------------------------------------------------------------------------
# Errors: the argument, what came, what is accepted


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(boxes=torch.zeros(5, 3)), ValueError, r"boxes must have shape \[N, 4\], got \[5, 3\]"),
        (dict(boxes=torch.zeros(1, 5, 4)), ValueError, r"boxes must have shape \[N, 4\], got \[1, 5, 4\]"),
        (dict(scores=torch.zeros(4)), ValueError, r"scores must have shape \[N\] = \[5\] like boxes, got \[4\]"),
        (dict(scores=torch.zeros(5, 1)), ValueError, r"scores must have shape \[N\] = \[5\] like boxes, got \[5, 1\]"),
        (dict(boxes=torch.zeros(5, 4, dtype=torch.int32)), TypeError, "boxes must be float16.*got torch.int32"),
        (dict(scores=torch.zeros(5, dtype=torch.int64)), TypeError, "scores must be float16.*got torch.int64"),
        (
            dict(scores=torch.zeros(5, device="meta")),
            ValueError,
            "scores must be on the device of boxes, cpu, got meta",
        ),
    ],
)
def test_errors_of_nms(change, error, message):
    arguments = dict(boxes=torch.zeros(5, 4), scores=torch.zeros(5), iou_threshold=0.5)
    arguments.update(change)
    with pytest.raises(error, match=message):
        nms(**arguments)
    with pytest.raises(error, match=message):
        batched_nms(idxs=torch.zeros(5), **arguments)


@pytest.mark.parametrize(
    "idxs, error, message",
    [
        (torch.zeros(4), ValueError, r"idxs must have shape \[N\] = \[5\] like boxes, got \[4\]"),
        (torch.zeros(5, dtype=torch.complex64), TypeError, "idxs must be integers or floats, got torch.complex64"),
        (torch.zeros(5, device="meta"), ValueError, "idxs must be on the device of boxes, cpu, got meta"),
    ],
)
def test_errors_of_batched_nms(idxs, error, message):
    with pytest.raises(error, match=message):
        batched_nms(torch.zeros(5, 4), torch.zeros(5), idxs, 0.5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(boxes=torch.zeros(5, 4)), ValueError, r"boxes must have shape \[B, N, 4\], got \[5, 4\]"),
        (dict(scores=torch.zeros(5)), ValueError, r"scores must have shape \[B, N\] = \[2, 5\] like boxes, got \[5\]"),
        (dict(groups=torch.zeros(5)), ValueError, r"groups must have shape \[B, N\] = \[2, 5\] like boxes, got \[5\]"),
        (dict(groups=torch.zeros(2, 5)), TypeError, "groups must be int64, got torch.float32"),
        (dict(max_output=-1), ValueError, "max_output must be >= 0, got -1"),
        (dict(largest_group=-2), ValueError, "largest_group must be >= 0, got -2"),
    ],
)
def test_errors_of_padded(change, error, message):
    arguments = dict(
        boxes=torch.zeros(2, 5, 4), scores=torch.zeros(2, 5), groups=torch.zeros(2, 5, dtype=torch.int64), max_output=3
    )
    arguments.update(change)
    with pytest.raises(error, match=message):
        nms_padded(iou_threshold=0.5, **arguments)
