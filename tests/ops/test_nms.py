"""What `nms`, `batched_nms` and `nms_padded` return: torchvision's results, and the cases where it is wrong."""

from __future__ import annotations

import pytest
import torch
import torchvision

from doublehead.ops import batched_nms, nms, nms_padded
from doublehead.ops.nms import reference
from tests.support.nms_cases import INF, NAN, clustered_boxes, integer_boxes, is_greedy_result

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
THRESHOLDS = [0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]


def reference_nms(boxes, scores, iou_threshold):
    return reference.nms(boxes, scores, None, iou_threshold)


# Every case must hold for the operator, compiled or not, and for its definition.
every_nms = pytest.mark.parametrize("run", [nms, reference_nms], ids=["operator", "reference"])
every_batched_nms = pytest.mark.parametrize("run", [batched_nms, reference.nms], ids=["operator", "reference"])
every_device = pytest.mark.parametrize("device", DEVICES)


def make(boxes, scores, device="cpu", dtype=torch.float32):
    return torch.tensor(boxes, device=device, dtype=dtype), torch.tensor(scores, device=device)


def per_class(boxes, scores, classes, threshold):
    """NMS class by class by the definition, put together in the order of the scores."""
    kept = [torch.zeros(0, dtype=torch.int64)]
    for label in classes.unique():
        here = (classes == label).nonzero()[:, 0]
        kept.append(here[reference_nms(boxes[here], scores[here], threshold)])
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].sort(descending=True, stable=True).indices]


# ---------------------------------------------------------------------------------------------
# torchvision's results


@every_nms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("make_boxes", [clustered_boxes, integer_boxes])
def test_nms_equals_torchvision(run, make_boxes, threshold, dtype):
    for count, seed in ((1, 0), (2, 1), (63, 2), (64, 3), (65, 4), (400, 5)):
        boxes, scores = (tensor.to(dtype) for tensor in make_boxes(count, seed))
        assert torch.equal(run(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@every_batched_nms
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_batched_nms_equals_torchvision(run, threshold):
    boxes, scores = clustered_boxes(600, seed=0)
    scores = scores.argsort().argsort() / 600.0  # distinct: torchvision leaves the order of ties open
    classes = torch.randint(7, (600,), generator=torch.Generator().manual_seed(0))
    expected = torchvision.ops.batched_nms(boxes, scores, classes, threshold)
    assert torch.equal(run(boxes, scores, classes, threshold), expected)


def test_boxes_and_scores_may_be_views():
    boxes, scores = clustered_boxes(300, seed=1)
    detections = torch.cat((boxes, scores[:, None], torch.zeros(300, 1)), 1)
    reversed_columns = boxes.flip(1).contiguous().flip(1)
    assert not detections[:, :4].is_contiguous()
    expected = nms(boxes, scores, 0.5)
    assert torch.equal(nms(detections[:, :4], detections[:, 4], 0.5), expected)
    assert torch.equal(nms(boxes.T.contiguous().T, scores.repeat_interleave(3)[::3], 0.5), expected)
    assert torch.equal(nms(reversed_columns, scores, 0.5), expected)


def test_batched_classes_may_be_a_view():
    boxes, scores = clustered_boxes(300, seed=1)
    classes = torch.arange(300) % 5
    assert torch.equal(
        batched_nms(boxes, scores, classes.repeat_interleave(2)[::2], 0.5), batched_nms(boxes, scores, classes, 0.5)
    )


# ---------------------------------------------------------------------------------------------
# Cases of nms


@every_nms
@every_device
def test_tied_scores_lowest_index_first(run, device):
    boxes, scores = make([[0, 0, 10, 10], [0, 0, 10, 9], [50, 0, 60, 10], [0, 0, 9, 10]], [0.5] * 4, device)
    assert run(boxes, scores, 0.5).tolist() == [0, 2]
    boxes = torch.zeros(200, 4, device=device)
    boxes[:, :2] = torch.arange(200, device=device)[:, None] * 20
    boxes[:, 2:] = boxes[:, :2] + 10
    assert run(boxes, torch.full((200,), 0.25, device=device), 0.5).tolist() == list(range(200))


@every_nms
@every_device
def test_negative_zero_ties_with_zero(run, device):
    boxes, scores = make([[0, 0, 10, 10], [0, 0, 10, 10], [30, 0, 40, 10]], [-0.0, 0.0, -0.0], device)
    assert run(boxes, scores, 0.5).tolist() == [0, 2]


@every_nms
@every_device
def test_duplicates_without_area_are_all_kept(run, device):
    boxes, scores = make([[5, 5, 5, 5], [5, 5, 5, 5], [5, 0, 5, 9], [5, 0, 5, 9]], [0.9, 0.8, 0.7, 0.6], device)
    assert run(boxes, scores, 0.5).tolist() == [0, 1, 2, 3]


@every_nms
@every_device
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_box_that_is_not_finite_is_kept_and_suppresses_nothing(run, column, bad, device):
    boxes, scores = make([[0, 0, 10, 10]] * 3 + [[0, 0, 10, 9]], [0.9, 0.8, 0.7, 0.6], device)
    boxes[0, column] = bad
    assert run(boxes, scores, 0.5).tolist() == [0, 1]
    assert run(boxes, scores.flip(0), 0.5).tolist() == [3, 0]


@every_nms
@every_device
def test_inverted_box_is_kept_and_suppresses_nothing(run, device):
    # Both sides inverted: the product of its sides is positive, its area is not.
    boxes, scores = make([[10, 10, 0, 0], [10, 10, 0, 0], [0, 0, 10, 10], [10, 0, 0, 10]], [0.9, 0.8, 0.7, 0.6], device)
    assert run(boxes, scores, 0.0).tolist() == [0, 1, 2, 3]


@every_nms
@every_device
def test_nan_score_comes_first_and_is_kept(run, device):
    boxes, scores = make([[0, 0, 10, 10], [30, 0, 40, 10], [0, 0, 10, 9], [60, 0, 70, 9]], [0.9, NAN, NAN, INF], device)
    assert run(boxes, scores, 0.5).tolist() == [1, 2, 3]


@every_nms
@every_device
def test_scores_of_either_sign_and_infinite(run, device):
    boxes, _ = make([[20 * i, 0, 20 * i + 10, 10] for i in range(6)], [0.0], device)
    scores = torch.tensor([-1.0, 1e-42, INF, -INF, 0.5, -1e-42], device=device)
    assert run(boxes, scores, 0.5).tolist() == [2, 4, 1, 5, 0, 3]


@every_nms
@every_device
def test_threshold_zero_suppresses_the_slightest_overlap(run, device):
    boxes, scores = make([[0, 0, 100, 1], [99.4, 0, 200, 1], [200, 0, 300, 1]], [0.9, 0.8, 0.7], device)
    assert run(boxes, scores, 0.0).tolist() == [0, 2]
    assert run(boxes, scores, -0.0).tolist() == [0, 2]


@every_nms
@every_device
@pytest.mark.parametrize("numerator, denominator", [(1, 10), (3, 10), (7, 10), (6, 10), (1, 5), (9, 10), (1, 2)])
def test_threshold_is_compared_unrounded(run, numerator, denominator, device):
    # In float32 some of these IoUs lie above the decimal fraction, and some below.
    boxes, scores = make([[0, 0, denominator, 1], [0, 0, numerator, 1]], [0.9, 0.8], device)
    threshold = numerator / denominator
    above = torch.tensor(threshold, dtype=torch.float32).double().item() > threshold
    assert run(boxes, scores, threshold).tolist() == ([0] if above else [0, 1])
    assert run(boxes.double(), scores, threshold).tolist() == [0, 1]
    assert run(boxes, scores, threshold).tolist() == torchvision.ops.nms(boxes.cpu(), scores.cpu(), threshold).tolist()


@every_nms
@pytest.mark.parametrize("threshold", [-0.5, -1e-9, 1.5, NAN, INF, -INF, 1e-40])
def test_unusual_thresholds(run, threshold):
    for make_boxes in (clustered_boxes, integer_boxes):
        boxes, scores = make_boxes(150, 3)
        assert torch.equal(run(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@every_nms
@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_boxes_are_computed_in_float32(run, dtype, device):
    # Areas of 10^8 overflow float16, and 300 + 1 is no bfloat16.
    boxes, scores = make([[0, 0, 10000, 10000], [0, 0, 10000, 9984], [0, 0, 10, 10]], [0.9, 0.8, 0.7], device, dtype)
    assert run(boxes, scores, 0.5).tolist() == [0, 2]
    boxes, scores = clustered_boxes(300, seed=4)
    boxes, scores = boxes.to(device, dtype), scores.to(device, dtype)
    assert torch.equal(run(boxes, scores, 0.5), run(boxes.float(), scores.float(), 0.5))


@every_nms
@pytest.mark.parametrize("score_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_may_have_another_dtype(run, score_dtype):
    boxes, _ = clustered_boxes(300, seed=5)
    scores = torch.randperm(300).to(score_dtype)  # bfloat16: with ties
    assert torch.equal(run(boxes.double(), scores, 0.5), torchvision.ops.nms(boxes.double(), scores.double(), 0.5))
    tiny = torch.tensor([1.0, 1.0 + 2**-40], dtype=torch.float64)
    assert run(boxes[[0, 0]], tiny, 0.5).tolist() == [1]


@every_nms
@pytest.mark.parametrize("scale", [1e-22, 1e-19, 1e-10, 1e10, 3e18, 1e21])
def test_boxes_of_any_unit(run, scale):
    # Areas from 1e-44, which float32 holds with one digit, to infinity.
    boxes, scores = clustered_boxes(200, seed=6)
    boxes = (boxes / 100 * scale).float()
    assert torch.equal(run(boxes, scores, 0.5), torchvision.ops.nms(boxes, scores, 0.5))


@every_nms
def test_far_from_the_origin(run):
    boxes, scores = clustered_boxes(300, seed=7)
    for offset in (-5e3, 1e5, -1e7):
        assert torch.equal(run(boxes + offset, scores, 0.5), torchvision.ops.nms(boxes + offset, scores, 0.5))


@every_nms
@every_device
def test_no_boxes(run, device):
    kept = run(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64 and kept.device.type == device


@pytest.mark.gpu
def test_runs_on_the_device_of_its_input():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    boxes, scores = (tensor.to("cuda:1") for tensor in clustered_boxes(100, seed=0))
    kept = nms(boxes, scores, 0.5)
    assert kept.device == torch.device("cuda:1")
    assert torch.equal(kept.cpu(), nms(boxes.cpu(), scores.cpu(), 0.5))


# ---------------------------------------------------------------------------------------------
# Cases of batched_nms


@every_batched_nms
@every_device
def test_negative_boxes_of_different_classes_are_both_kept(run, device):
    boxes, scores = make([[-10, -10, 1, 1], [-10, -10, 1, 1]], [0.9, 0.8], device)
    assert run(boxes, scores, torch.tensor([0, 1], device=device), 0.5).tolist() == [0, 1]
    assert run(boxes, scores, torch.tensor([1, 1], device=device), 0.5).tolist() == [0]


@every_batched_nms
@pytest.mark.parametrize(
    "labels", [[0, 1200], [-1, -2], [-1, 0], [2**62, -(2**63), 2**31], [0, 2**32], list(range(1200))]
)
def test_any_class_number(run, labels):
    boxes, scores = clustered_boxes(2000 if len(labels) > 3 else 300, seed=8)
    classes = torch.tensor(labels)[torch.arange(len(boxes)) % len(labels)]
    assert torch.equal(run(boxes, scores, classes, 0.5), per_class(boxes, scores, classes, 0.5))


@every_batched_nms
@every_device
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_a_bad_box_affects_no_other(run, bad, device):
    boxes, scores = clustered_boxes(200, seed=9)
    classes = torch.arange(200) % 3
    clean = run(boxes[1:].to(device), scores[1:].to(device), classes[1:].to(device), 0.5)
    boxes[0, 2] = bad
    kept = run(boxes.to(device), scores.to(device), classes.to(device), 0.5)
    assert 0 in kept.tolist()
    assert torch.equal(kept[kept != 0] - 1, clean)


@every_batched_nms
def test_float16_with_many_classes(run):
    boxes, scores = clustered_boxes(2000, seed=10)
    boxes, classes = boxes.half(), torch.arange(2000) % 500
    assert torch.equal(run(boxes, scores, classes, 0.5), per_class(boxes.float(), scores, classes, 0.5))


@every_batched_nms
def test_batched_without_boxes(run):
    kept = run(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32, torch.float16, torch.float64])
def test_classes_of_any_dtype_are_compared_by_value(dtype):
    boxes, scores = clustered_boxes(300, seed=11)
    classes = torch.arange(300) % 7
    assert torch.equal(batched_nms(boxes, scores, classes.to(dtype), 0.5), batched_nms(boxes, scores, classes, 0.5))


def test_float_classes():
    boxes, scores = make([[0, 0, 9, 9]] * 4, [0.9, 0.8, 0.7, 0.6])
    assert batched_nms(boxes, scores, torch.tensor([0.0, -0.0, 0.25, -1.5]), 0.5).tolist() == [0, 2, 3]
    assert batched_nms(boxes, scores, torch.tensor([True, True, False, False]), 0.5).tolist() == [0, 2]


@pytest.mark.parametrize("classes", [1, 2, 1000], ids="{}-classes".format)
def test_200_000_boxes(classes):
    # 200,000 squared is 4e10: neither that memory nor a 32-bit product of indices may be needed.
    boxes, _ = clustered_boxes(200_000, seed=12, objects=300, spread=0.03)
    scores = torch.randperm(200_000, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(200_000) % classes
    assert is_greedy_result(batched_nms(boxes, scores, labels, 0.5), boxes, scores, labels, 0.5)


# ---------------------------------------------------------------------------------------------
# nms_padded

every_padded = pytest.mark.parametrize("run", [nms_padded, reference.nms_padded], ids=["operator", "reference"])


def padded_example(device="cpu"):
    boxes, scores = clustered_boxes(3 * 120, seed=13)
    groups = torch.arange(360) % 4 - 1  # every fourth box is padding
    return [tensor.to(device) for tensor in (boxes.view(3, 120, 4), scores.view(3, 120), groups.view(3, 120))]


@every_padded
@every_device
@pytest.mark.parametrize("max_output", [0, 1, 7, 40, 120, 150])
def test_padded_is_batched_nms_of_each_image_cut_to_size(run, max_output, device):
    boxes, scores, groups = padded_example(device)
    indices, count = run(boxes, scores, groups, 0.5, max_output)
    assert indices.shape == (3, max_output) and count.shape == (3,)
    assert indices.dtype == count.dtype == torch.int64 and indices.device == count.device == boxes.device
    for image in range(3):
        real = (groups[image] >= 0).nonzero()[:, 0].cpu()
        kept = per_class(boxes[image].cpu()[real], scores[image].cpu()[real], groups[image].cpu()[real], 0.5)
        expected = real[kept][:max_output].tolist()
        assert count[image] == len(expected)
        assert indices[image].tolist() == expected + [-1] * (max_output - len(expected))


@every_padded
@every_device
def test_padding_is_never_returned_and_suppresses_nothing(run, device):
    boxes, scores = make([[[0, 0, 10, 10]] * 3, [[0, 0, 10, 10]] * 3], [[NAN, 0.8, 0.7], [0.9, 0.8, 0.7]], device)
    groups = torch.tensor([[-1, 0, 0], [-5, -1, -(2**63)]], device=device)
    indices, count = run(boxes, scores, groups, 0.5, 4)
    assert indices.tolist() == [[1, -1, -1, -1], [-1, -1, -1, -1]] and count.tolist() == [1, 0]


@every_padded
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_padded_without_boxes(run, shape):
    indices, count = run(torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), 0.5, 3)
    assert indices.tolist() == [[-1] * 3] * shape[0] and count.tolist() == [0] * shape[0]


@pytest.mark.parametrize("max_output", [1, 100, 1000, 5000])
def test_early_stop_changes_nothing(max_output):
    # More candidates than are tried at first, and so much overlap that the first do not yield enough.
    boxes, scores = clustered_boxes(20_000, seed=14, objects=400, spread=0.03)
    groups = torch.arange(20_000) % 5
    indices, count = nms_padded(boxes[None], scores[None], groups[None], 0.5, max_output)
    kept = batched_nms(boxes, scores, groups, 0.5)
    assert count.item() == min(max_output, len(kept))
    assert torch.equal(indices[0, : count.item()], kept[:max_output])


def test_images_do_not_touch_each_other():
    boxes, scores, groups = padded_example()
    alone = [nms_padded(boxes[i : i + 1], scores[i : i + 1], groups[i : i + 1], 0.5, 50)[0] for i in range(3)]
    assert torch.equal(nms_padded(boxes, scores, groups, 0.5, 50)[0], torch.cat(alone))


@pytest.mark.gpu
def test_padded_is_captured_in_a_cuda_graph():
    arguments = padded_example("cuda")
    expected = nms_padded(*arguments, 0.5, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, count = nms_padded(*arguments, 0.5, 20)
    indices.zero_(), count.zero_()
    graph.replay()
    assert torch.equal(indices, expected[0]) and torch.equal(count, expected[1])


def test_padded_without_groups_is_refused_by_name():
    with pytest.raises(TypeError, match=r"groups must be a Tensor\[B, N\], got NoneType"):
        nms_padded(torch.rand(1, 3, 4), torch.rand(1, 3), None, 0.5, 3)
