"""Detections: the definition against a loop, and the CPU path, Triton's and CUDA's kernels against the definition."""

from __future__ import annotations

import pytest
import torch

from doublehead.ops.detections.arguments import DetectionArguments
from tests.support.detection_cases import OPTIONS, candidate_scores, clear, naive, tensors
from tests.support.detection_checks import EMULATED, FUSION_NAMES, INF, NAN, check, defined, run


@pytest.fixture(params=["cpu", "triton", EMULATED, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where to call the operator: the CPU, where the Triton kernels serve it, CUDA emulated, or CUDA."""
    return request.getfixturevalue("triton_kernels") if request.param == "triton" else request.param


@pytest.fixture
def exact(request, device):
    """Whether results must equal those of the reference bit by bit: that is so on the CPU."""
    return request.node.callspec.params["device"] == "cpu"


# ---------------------------------------------------------------------------------------------
# The definition


@pytest.mark.parametrize("fusion", FUSION_NAMES)
@pytest.mark.parametrize("heads", [1, 2])
def test_definition_equals_the_loop_over_boxes(fusion, heads):
    for seed in range(3):
        inputs = tensors(3, 15, 5, seed, heads)
        inputs[1][0, 3, 2], inputs[1][1, :, 1, 0] = NAN, INF
        options = OPTIONS | {"fusion": fusion, "max_detections": 12, "min_size": 8.0}
        options["least_side"] = [0.0, 1.0, 9.0][seed]
        boxes, scores, labels, count = defined(inputs, options)
        assert count.any()
        for image in range(3):
            expected = naive(inputs, options, image)
            number = int(count[image])
            assert number == len(expected)
            assert labels[image, :number].tolist() == [label for _, label, _ in expected]
            assert scores[image, :number].tolist() == [score for score, _, _ in expected]
            torch.testing.assert_close(boxes[image, :number], torch.tensor([box for *_, box in expected]).view(-1, 4))
            assert not boxes[image, number:].any() and not scores[image, number:].any()
            assert not labels[image, number:].any()


# ---------------------------------------------------------------------------------------------
# Every implementation equals the definition


def test_boxes_outside_of_the_image_keep_the_least_side(device, exact, poison):
    proposals = torch.tensor(
        [[-30.0, 10, -20, 20], [130, 10, 140, 20], [10, -30, 20, -20], [10, 90, 20, 99], [10, 10, 20, 20]]
    )
    logits = torch.tensor([[0.0, 5 - roi] for roi in range(5)])
    valid, sizes = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[70, 90]])
    inputs = [logits[None]], torch.zeros(1, 5, 2, 4), proposals[None], valid, sizes
    boxes, *_, count = check(inputs, device, exact, least_side=1.0)
    expected = [[0.0, 10, 1, 20], [89, 10, 90, 20], [10, 0, 20, 1], [10, 69, 20, 70], [10, 10, 20, 20]]
    assert count.tolist() == [5] and boxes[0, :5].tolist() == expected


@pytest.mark.parametrize("classes", [2, 81, 366])
@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_crowds(device, exact, poison, classes, fusion):
    options = OPTIONS | {"fusion": fusion, "max_detections": 30}
    scale = 3.0 if classes > 2 else 1.0
    inputs = next(x for seed in range(99) if clear(x := tensors(2, 12, classes, seed, 2, scale, crowd=2), options))
    count = check(inputs, device, exact, **options)[3]
    survivors = (candidate_scores(inputs[0], options, inputs[3]) > 0.05).sum()
    assert 0 < count.sum() < survivors  # some are suppressed


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1e-4, 0.05])
def test_every_class_survives(device, exact, poison, threshold):
    inputs = tensors(1, 6, 7, seed=2, scale=0.3)
    count = check(inputs, device, exact, score_threshold=threshold, nms_iou=1.0, max_detections=50)[3]
    assert count.item() == int(inputs[3].sum()) * 6


def test_no_survivors(device, exact, poison):
    inputs = tensors(1, 5, 5)
    for options in (dict(score_threshold=1.5), dict(score_threshold=INF), dict(min_size=1e6)):
        assert not any(item.any() for item in check(inputs, device, exact, **options))
    inputs[3][:] = False
    assert not any(item.any() for item in check(inputs, device, exact))


def test_ties_go_to_the_lower_roi_then_class(device, exact, poison):
    logits, deltas, proposals, valid, sizes = tensors(2, 9, 4, seed=3, crowd=9)
    logits = [torch.ones_like(item) for item in logits]
    valid[:] = True
    boxes, scores, labels, count = check((logits, deltas * 0, proposals, valid, sizes), device, exact, nms_iou=1.0)
    assert count.tolist() == [20, 20] and len(set(scores.flatten().tolist())) == 1
    assert labels.tolist() == [([1, 2, 3] * 9)[:20]] * 2
    assert torch.equal(boxes[:, :18:3], boxes[:, 1:19:3])  # three classes of one RoI after the other


@pytest.mark.parametrize("batch, rois, classes", [(2, 0, 5), (0, 4, 5), (0, 0, 2), (2, 4, 1)])
def test_empty(device, exact, batch, rois, classes):
    for heads in (1, 2):
        found = check(tensors(batch, rois, classes, heads=heads), device, exact)
        assert not any(item.any() for item in found) and found[0].shape == (batch, 20, 4)


@pytest.mark.parametrize("most", [0, 1, 3, 500])
def test_number_of_slots(device, exact, poison, most):
    found = check(tensors(2, 4, 4), device, exact, max_detections=most)
    assert [item.shape for item in found] == [(2, most, 4), (2, most), (2, most), (2,)]


def test_huge_logits(device, exact):
    logits, *others = tensors(1, 6, 5, seed=4)
    logits = [torch.full_like(item, -1e4) for item in logits]
    for roi in range(6):
        logits[0][0, roi, roi % 5], logits[1][0, roi, (roi + 1) % 5] = 1e4, 3e4
    others[2][:] = True
    _, scores, labels, _ = check((logits, *others), device, exact, fusion="max", nms_iou=1.0)
    assert set(scores.flatten().tolist()) == {0.0, 1.0} and set(labels.flatten().tolist()) == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------------------------------------
# What is not a number


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_what_is_not_finite_costs_what_is_made_of_it_and_no_other(device, exact, poison, fusion):
    clean = tensors(2, 9, 4, seed=5, crowd=9)
    clean[3][:] = True
    logits, deltas, proposals, valid, sizes = [[x.clone() for x in clean[0]], *(x.clone() for x in clean[1:])]
    logits[0][0, 0, 1], logits[0][0, 1, 0], logits[0][0, 2] = NAN, INF, -INF
    proposals[0, 3, 0], proposals[0, 4, 3] = NAN, INF
    proposals[0, 5] = torch.tensor([-3e38, 0, 3e38, 9])  # its width overflows
    deltas[1, 0, 1, 2], deltas[1, 1, 2, 0], deltas[1, 2, 3, 1] = NAN, INF, -INF
    options = dict(fusion=fusion, nms_iou=1.0, max_detections=60, min_size=0.0, score_threshold=-1.0)
    found = check((logits, deltas, proposals, valid, sizes), device, exact, **options)
    assert found[3].tolist() == [3 * 3, 9 * 3 - 3]
    clean[3][0, :6] = False  # the first image without its bad RoIs
    for a, e in zip(found, run(clean, OPTIONS | options, device), strict=True):
        assert torch.equal(a[0], e[0])


def test_infinite_logarithms_of_sides_are_bounded(device, exact):
    logits, deltas, proposals, valid, sizes = tensors(1, 2, 2, seed=6, scale=0.1)
    valid[:] = True
    deltas[0, 0, 1] = torch.tensor([0.0, 0.0, INF, 0.0])  # as wide as the image
    deltas[0, 1, 1] = torch.tensor([0.0, 0.0, -INF, 0.0])  # without width
    boxes, *_, count = check((logits, deltas, proposals, valid, sizes), device, exact)
    assert count.item() == 1 and boxes[0, 0, 0] == 0 and boxes[0, 0, 2] == 90


def test_an_excluded_class_is_no_error(device, exact):
    inputs = tensors(1, 4, 4, seed=7)
    for item in inputs[0]:
        item[..., 2] = -INF
    labels = check(inputs, device, exact, score_threshold=0.0)[2]
    assert set(labels.flatten().tolist()) == {0, 1, 3}


def test_padding_may_hold_anything(device, exact, poison):
    inputs = tensors(2, 8, 4, seed=8)
    inputs[3][:, ::3] = False
    expected = check(inputs, device, exact)
    for item in (*inputs[0], inputs[1], inputs[2]):
        item[~inputs[3]] = NAN
    for a, e in zip(check(inputs, device, exact), expected, strict=True):
        assert torch.equal(a, e)


def test_boxes_outside_of_the_image_are_dropped(device, exact, poison):
    logits, deltas, proposals, valid, sizes = tensors(1, 6, 3, seed=9)
    valid[:] = True
    proposals[0, :3] += torch.tensor([1000.0, 0, 1000, 0])
    proposals[0, 3:5] -= torch.tensor([0, 1000.0, 0, 1000])
    boxes, *_, count = check((logits, deltas * 0.1, proposals, valid, sizes), device, exact, score_threshold=0.0)
    assert count.item() == 2  # the two classes of the last RoI
    assert (boxes >= 0).all() and (boxes[..., 2:] <= torch.tensor([90.0, 70.0])).all()


# ---------------------------------------------------------------------------------------------
# Slots for the survivors of a RoI


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_slots_hold_as_many_classes_as_can_survive(triton_kernels, poison, fusion):
    from doublehead.ops.detections.kernel import candidate_slots, candidates

    both = fusion in ("complementary", "max")
    for most in (1, 2, 3, 7, 19, 20):
        # `most` classes share the probability of each head; the threshold is a hair lower
        logits = [torch.full((1, 1, 64), -INF) for _ in range(2)]
        logits[0][..., 1 : 1 + most] = 0
        second = 1 + most if both else 1
        logits[1][..., second : second + most] = 0
        threshold = 1 / most - 1e-6
        _, deltas, proposals, _, sizes = tensors(1, 1, 64)
        options = OPTIONS | {"fusion": fusion, "score_threshold": threshold, "min_size": 0.0, "least_side": 0.0}
        arguments = DetectionArguments(
            [item.to(triton_kernels) for item in logits],
            *(x.to(triton_kernels) for x in (deltas, proposals, torch.tensor([[True]]), sizes)),
            **options,
        )
        *_, groups = candidates(arguments)
        survivors = (2 if both else 1) * most
        assert groups[0, :survivors].tolist() == list(range(1, 1 + survivors))
        assert (groups[0, survivors:] == -1).all()
        assert candidate_slots(64, fusion, threshold) == groups.shape[1] == survivors


def test_slots_never_exceed_the_classes():
    kernel = pytest.importorskip("doublehead.ops.detections.kernel", exc_type=ImportError)
    for threshold in (-INF, -1.0, 0.0, 5e-324, 1e-30, 0.001):
        assert kernel.candidate_slots(81, "max", threshold) == 80
    assert kernel.candidate_slots(81, "none", 0.05) == 20 and kernel.candidate_slots(81, "complementary", 0.05) == 40
    assert kernel.candidate_slots(81, "average", 2.0) == kernel.candidate_slots(81, "max", INF) == 1
    assert kernel.candidate_slots(2, "none", 0.5) == 1


# ---------------------------------------------------------------------------------------------
# Layouts and dtypes


def test_strides(device, exact):
    logits, deltas, proposals, valid, sizes = tensors(2, 8, 5, seed=10)
    strided = (
        [item.transpose(1, 2).contiguous().transpose(1, 2) for item in logits],
        deltas.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        proposals.repeat_interleave(2, -1)[..., ::2],
        valid.t().contiguous().t(),
        sizes.flip(1).flip(1).t().contiguous().t(),
    )
    found = check(strided, device, exact)
    for a, e in zip(found, run((logits, deltas, proposals, valid, sizes), OPTIONS, device), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device, exact, dtype):
    logits, deltas, proposals, valid, sizes = tensors(2, 8, 5, seed=11)
    inputs = [item.to(dtype) for item in logits], deltas.to(dtype), proposals, valid, sizes.long()
    boxes, scores, *_ = check(inputs, device, exact)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert boxes.dtype == scores.dtype == wide
    boxes, scores, *_ = check((logits, *inputs[1:]), device, exact)
    assert boxes.dtype == wide and scores.dtype == torch.float32


def test_more_classes_than_the_kernel_holds(device, exact):
    check(tensors(1, 2, 4500, seed=12, scale=4.0), device, exact)


def test_suppression_is_told_how_large_a_class_can_be(triton_kernels, monkeypatch):
    from doublehead.ops.detections import kernel

    told, suppress = [], kernel.nms_padded
    monkeypatch.setattr(kernel, "nms_padded", lambda *arguments: told.append(arguments[5:]) or suppress(*arguments))
    check(tensors(2, 5, 4, seed=0), triton_kernels, exact=False)
    assert told == [(5,)]
