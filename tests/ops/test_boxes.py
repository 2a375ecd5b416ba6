"""Box arithmetic against torchvision's, and where torchvision loses precision."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder

from doublehead.ops import box_area, box_iou, clip_boxes, decode_boxes, encode_boxes
from tests.support.nms_cases import NAN, clustered_boxes

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (2.0, 3.0, 4.0, 0.5)]
DTYPES = [torch.float32, torch.float64]


def some_boxes(*shape, seed=0, dtype=torch.float32):
    return clustered_boxes(math.prod(shape), seed)[0].view(*shape, 4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_encode_equals_torchvision(weights, dtype):
    reference, proposals = some_boxes(50, seed=1, dtype=dtype), some_boxes(50, seed=2, dtype=dtype)
    expected = BoxCoder(weights).encode_single(reference, proposals)
    actual = encode_boxes(reference, proposals, weights)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_equals_torchvision(weights, dtype):
    boxes = some_boxes(50, dtype=dtype)
    deltas = 25 * torch.randn(50, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))  # beyond the clip too
    assert (deltas / torch.tensor(weights))[:, 2:].max() > math.log(1000 / 16)
    expected = BoxCoder(weights).decode_single(deltas, boxes)
    torch.testing.assert_close(decode_boxes(deltas, boxes, weights), expected, rtol=1e-6, atol=1e-4)


def test_decode_clip_can_be_chosen():
    boxes, deltas = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 9, -9]])
    decoded = decode_boxes(deltas, boxes, clip=math.log(5))
    torch.testing.assert_close(decoded, torch.tensor([[-4.0, 1 - math.exp(-9), 6, 1 + math.exp(-9)]]))


def test_decode_inverts_encode():
    reference, proposals = some_boxes(3, 20, seed=1, dtype=torch.float64), some_boxes(20, seed=2, dtype=torch.float64)
    deltas = encode_boxes(reference, proposals, WEIGHTS[1])
    torch.testing.assert_close(decode_boxes(deltas, proposals, WEIGHTS[1], clip=math.inf), reference)


def test_leading_dimensions_broadcast():
    boxes, deltas = some_boxes(2, 7), torch.randn(2, 7, 5, 4, generator=torch.Generator().manual_seed(0))
    decoded = decode_boxes(deltas, boxes[:, :, None], WEIGHTS[1])
    assert decoded.shape == (2, 7, 5, 4)
    for label in range(5):
        torch.testing.assert_close(decoded[:, :, label], decode_boxes(deltas[:, :, label], boxes, WEIGHTS[1]))
    encoded = encode_boxes(decoded, boxes[:, :, None], WEIGHTS[1])
    assert encoded.shape == (2, 7, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_computed_and_returned_in_float32(dtype):
    # 3001.5 is neither a float16 nor a bfloat16; the sides of the box are.
    boxes, deltas = torch.tensor([[2993.5, 0.0, 3009.5, 16.0]]), torch.tensor([[0.5, 0, 0, 0]], dtype=dtype)
    decoded = decode_boxes(deltas, boxes)
    assert decoded.dtype == torch.float32 and decoded.tolist() == [[3001.5, 0, 3017.5, 16]]
    large = torch.tensor([[0, 0, 60000, 60000]], dtype=dtype)
    assert box_area(large).dtype == torch.float32 and box_area(large).isfinite().all()
    assert box_iou(large, large).tolist() == [[1.0]]
    assert encode_boxes(large, large).tolist() == [[0, 0, 0, 0]]
    shifted = torch.tensor([[2048, 0, 2064, 16]], dtype=dtype)
    assert box_iou(shifted, torch.tensor([[2049.0, 0, 2065, 16]])).item() == pytest.approx(15 / 17)


def test_area_equals_torchvision():
    boxes = torch.cat((some_boxes(30), some_boxes(5).flip(-1), torch.tensor([[3.0, 0, 1, 5]])))
    assert torch.equal(box_area(boxes), torchvision.ops.box_area(boxes))
    assert box_area(boxes)[-1] == -10
    assert box_area(torch.tensor([1, 2, 4, 6])).item() == 12


@pytest.mark.parametrize("dtype", DTYPES)
def test_iou_equals_torchvision(dtype):
    a, b = some_boxes(40, seed=1, dtype=dtype), some_boxes(30, seed=2, dtype=dtype)
    assert torch.equal(box_iou(a, b), torchvision.ops.box_iou(a, b))
    assert (box_iou(a, b) > 0).any() and (box_iou(a, b) == 0).any()


def test_iou_is_batched_and_broadcasts():
    a, b = some_boxes(3, 1, 10, seed=1), some_boxes(4, 6, seed=2)
    iou = box_iou(a, b[None, :, :])
    assert iou.shape == (3, 4, 10, 6)
    for i in range(3):
        for j in range(4):
            assert torch.equal(iou[i, j], torchvision.ops.box_iou(a[i, 0], b[j]))
    assert box_iou(a[:, 0, :0], b[0]).shape == (3, 0, 6)


def test_iou_of_boxes_without_area():
    a = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5], [10, 10, 0, 0]])
    iou = box_iou(a, a)
    assert iou[0].tolist() == [1, 0, 0] and iou[1, 1].isnan() and iou[2, 2] == 0


def test_clip_equals_torchvision():
    boxes, sizes = some_boxes(3, 40) * 1.5 - 200, torch.tensor([[800, 1344], [333, 500], [1, 2000]])
    clipped = clip_boxes(boxes, sizes)
    for image in range(3):
        expected = torchvision.ops.clip_boxes_to_image(boxes[image], tuple(sizes[image].tolist()))
        assert torch.equal(clipped[image], expected)
    assert not torch.equal(clipped, boxes)
    assert torch.equal(clip_boxes(boxes[0], sizes[0].float()), clipped[0])
    assert clip_boxes(boxes.half(), sizes).dtype == torch.float16


def test_clip_leaves_nan():
    clipped = clip_boxes(torch.tensor([[[NAN, -1.0, 9, math.inf]]]), torch.tensor([[5, 7]]))
    assert clipped[0, 0, 0].isnan() and clipped[0, 0, 1:].tolist() == [0, 7, 5]


CALLS = {
    "area": lambda a, b: box_area(a),
    "iou": box_iou,
    "encode": lambda a, b: encode_boxes(a, b, WEIGHTS[1]),
    "decode": lambda a, b: decode_boxes(a / 1000, b, WEIGHTS[1]),
    "clip": lambda a, b: clip_boxes(a, b[:, 0, 2:]),
    "clip, one pixel stays": lambda a, b: clip_boxes(a, b[:, 0, 2:], 1.0),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
def test_static(call):
    # Compiles whole, with shapes left open, and touches no data: it runs on tensors that have none.
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (7, 4):
        a, b = some_boxes(2, count, seed=1), some_boxes(2, count, seed=2)
        assert torch.equal(compiled(a, b), call(a, b))
        assert call(a.to("meta"), b.to("meta")).shape == call(a, b).shape


@every_call
def test_gradients(call):
    a = some_boxes(2, 3, seed=1, dtype=torch.float64).requires_grad_()
    b = some_boxes(2, 3, seed=2, dtype=torch.float64).requires_grad_()
    inputs = (a,) if call is CALLS["area"] else (a, b)
    assert torch.autograd.gradcheck(lambda *x: call(x[0], x[1] if len(x) > 1 else b), inputs)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: box_area(torch.zeros(3)), r"boxes must have shape \[\.\.\., 4\], got \[3\]"),
        (lambda: box_iou(torch.zeros(2, 5), torch.zeros(2, 4)), r"a must have shape \[\.\.\., 4\]"),
        (lambda: box_iou(torch.zeros(2, 4), torch.zeros(2, 5)), r"b must have shape \[\.\.\., 4\]"),
        (lambda: encode_boxes(torch.zeros(2, 3), torch.zeros(2, 4)), "reference must have shape"),
        (lambda: encode_boxes(torch.zeros(2, 4), torch.zeros(2, 3)), "proposals must have shape"),
        (lambda: decode_boxes(torch.zeros(2, 8), torch.zeros(2, 4)), "deltas must have shape"),
        (lambda: decode_boxes(torch.zeros(2, 4), torch.zeros(())), r"boxes must have shape \[\.\.\., 4\], got \[\]"),
        (lambda: encode_boxes(torch.zeros(2, 4), torch.zeros(2, 4), (1, 2, 3)), "weights must be 4 numbers .* got 3"),
        (lambda: clip_boxes(torch.zeros(1, 2, 4), torch.zeros(1, 3)), r"sizes must have shape \[\.\.\., 2\]"),
        (lambda: clip_boxes(torch.zeros(1, 2, 5), torch.zeros(1, 2)), r"boxes must have shape \[\.\.\., 4\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
