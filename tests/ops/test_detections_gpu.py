"""The CUDA kernels of the detections on a GPU: exact suppression, streams, graphs, devices, memory beyond 2^31."""

from __future__ import annotations

import pytest
import torch

from doublehead.ops import _fallback, _library, detections
from doublehead.ops._library import native
from doublehead.ops.detections import by_class, reference
from doublehead.ops.detections.arguments import DetectionArguments
from tests.support.detection_cases import OPTIONS, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native("detections_by_class", "cuda"), reason="doublehead's CUDA part is not built"),
]


def make(batch=2, rois=300, classes=6, seed=0, dtype=torch.float32, device="cuda", **how):
    logits, deltas, *others = tensors(batch, rois, classes, seed, **how)
    given = [item.to(device, dtype) for item in logits], deltas.to(device, dtype), *(x.to(device) for x in others)
    assert by_class.serves(DetectionArguments(*given, **OPTIONS))
    return given


def call_by_class(args):
    return torch.ops.doublehead.detections_by_class(*by_class.with_number(args))


def check_exactly(given, **changes):
    """The result is what suppression makes of all candidates, as the operator itself lists them; returns `count`."""
    options = OPTIONS | changes
    everything = by_class.MOST_DETECTIONS
    boxes, scores, labels, count = detections(*given, **(options | dict(nms_iou=1.0, max_detections=everything)))
    assert (count < everything).all(), "there may be more candidates"
    found = [item.cpu() for item in detections(*given, **options)]
    groups = torch.where(torch.arange(everything) < count.cpu()[:, None], labels.cpu(), -1)
    args = DetectionArguments(*given, **options)
    expected = reference.suppress(boxes.cpu(), scores.cpu(), groups, args)
    assert all(map(torch.equal, found, expected))
    return found[3]


@pytest.mark.parametrize("dtype", by_class.DTYPES)
@pytest.mark.parametrize("rois, classes, scale", [(1000, 2, 1.0), (1024, 2, 1.0), (1000, 81, 4.0), (65, 17, 2.0)])
@pytest.mark.parametrize("nms_iou", [0.0, 0.3, 0.5, 0.9])
def test_exactly(rois, classes, scale, dtype, nms_iou):
    given = make(3, rois, classes, dtype=dtype, scale=scale, crowd=30)
    threshold = 0.05 if classes == 2 else 0.75
    for most in (1, 100, 1000):
        count = check_exactly(given, nms_iou=nms_iou, score_threshold=threshold, max_detections=most)
        assert (count > 0).all()


@pytest.mark.parametrize("rois, classes", [(1000, 81), (300, 366), (9, by_class.MOST_CLASSES)])
def test_close_to_the_cpu(rois, classes):
    """In a random crowd a few near ties fall the other way than on the CPU, and no more."""
    given = make(2, rois, classes, scale=3.0)
    options = OPTIONS | {"max_detections": 300}
    found = [item.cpu() for item in detections(*given, **options)]
    expected = detections([item.cpu() for item in given[0]], *(item.cpu() for item in given[1:]), **options)
    for image in range(2):
        number, kept = int(expected[3][image]), int(found[3][image])
        assert abs(number - kept) <= 0.02 * number
        near = (expected[0][image, :number, None] - found[0][image, None, :kept]).abs().amax(-1) < 1e-2
        alike = near & (expected[2][image, :number, None] == found[2][image, None, :kept])
        assert alike.any(1).float().mean() > 0.98


@pytest.mark.parametrize("change", [dict(rois=1025), dict(classes=by_class.MOST_CLASSES + 1, rois=4)], ids=str)
def test_larger_calls_take_the_other_path(change):
    logits, deltas, *others = tensors(**(dict(batch=1, rois=50, classes=3, scale=1.0) | change))
    given = [item.cuda() for item in logits], deltas.cuda(), *(item.cuda() for item in others)
    args = DetectionArguments(*given, **OPTIONS)
    assert not by_class.serves(args)
    found, expected = detections(*given, **OPTIONS), reference.detections(args)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="must be .* to 1024|must be .* to 1216"):
        call_by_class(args)


def test_triton_is_not_needed(monkeypatch, recwarn):
    given = make()
    expected = detections(*given, **OPTIONS)
    monkeypatch.setattr(_fallback, "refusal", lambda index=None: _fallback.NO_COMPILER)
    assert all(map(torch.equal, detections(*given, **OPTIONS), expected))
    assert not recwarn and _library.language("detections", "cuda") == "CUDA"


def test_offsets_above_32_bits():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    logits, deltas, *others = make(3, 40, 5)
    expected = detections(logits, deltas, *others, **OPTIONS)
    table = torch.empty(3, (1 << 29) + 8, device="cuda", dtype=torch.float16)
    far = table.as_strided((3, 40, 5, 4), (table.stride(0), 20, 4, 1))
    far.copy_(deltas)
    assert far.stride(0) * 2 > 1 << 30
    found = detections(logits, far, *others, **OPTIONS)
    assert all(map(torch.equal, found, detections(logits, deltas.half(), *others, **OPTIONS)))
    assert torch.equal(found[3], expected[3])


def test_one_box_for_all_classes():
    logits, deltas, *others = make(2, 200, 9)
    shared = deltas[:, :, :1].contiguous()
    found = detections(logits, shared.expand_as(deltas), *others, **OPTIONS)
    assert all(map(torch.equal, found, detections(logits, shared.repeat(1, 1, 9, 1), *others, **OPTIONS)))


def test_a_hundred_repeats_are_equal():
    given = make(4, 1000, 81, scale=3.0)
    first = detections(*given, **OPTIONS)
    for _ in range(100):
        assert all(map(torch.equal, detections(*given, **OPTIONS), first))


def test_another_stream_and_device():
    given = make(2, 500, 21)
    expected = detections(*given, **OPTIONS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            moved = [item + 0 for item in given[0]], *(given[1] + 0, given[2] + 0, given[3].clone(), given[4] + 0)
            found = detections(*moved, **OPTIONS)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, found, expected))
    if torch.cuda.device_count() > 1:
        found = detections(*make(2, 500, 21, device="cuda:1"), **OPTIONS)
        assert found[0].device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", by_class.DTYPES)
def test_opcheck(dtype):
    given = make(2, 6, 4, dtype=dtype)
    args = DetectionArguments(*given, **OPTIONS)
    torch.library.opcheck(torch.ops.doublehead.detections.default, tuple(args))
    torch.library.opcheck(torch.ops.doublehead.detections_by_class.default, by_class.with_number(args))


def test_kernel_reads_nothing_it_should_not():
    logits, deltas, proposals, valid, sizes = make(2, 5, 4)
    for bad, message in (
        (([], deltas, proposals, valid, sizes), "1 or 2 tensors"),
        ((logits, deltas[..., :3], proposals, valid, sizes), "deltas must have size 4 in dimension 3"),
        ((logits, deltas[:, :, :3], proposals, valid, sizes), "deltas must have size 4 in dimension 2"),
        (([logits[0], logits[1][:1]], deltas, proposals, valid, sizes), "logits must have size 2 in dimension 0"),
        (([logits[0], logits[1].half()], deltas, proposals, valid, sizes), "logits must be Float"),
        ((logits, deltas.double(), proposals, valid, sizes), "deltas must be float32, float16 or bfloat16"),
        ((logits, deltas, proposals.half(), valid, sizes), "proposals must be Float"),
        ((logits, deltas, proposals[:, :4], valid, sizes), "proposals must have size 5 in dimension 1"),
        ((logits, deltas, proposals, valid.byte(), sizes), "valid must be Bool"),
        ((logits, deltas, proposals, valid, sizes.half()), "sizes must be float32"),
        ((logits, deltas, proposals.cpu(), valid, sizes), "proposals must be on a CUDA device"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call_by_class(DetectionArguments(*bad, **OPTIONS))
    args = DetectionArguments(logits, deltas, proposals, valid, sizes, **OPTIONS)
    with pytest.raises(RuntimeError, match="max_detections must be 1 to 1024"):
        call_by_class(args._replace(max_detections=0))
    with pytest.raises(RuntimeError, match="fusion must be 0 to 3"):
        torch.ops.doublehead.detections_by_class(*args[:5], 4, *args[6:])
