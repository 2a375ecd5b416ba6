"""The compiled NMS against its definition, index for index, on whatever boxes Hypothesis thinks of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doublehead.ops import box_iou, nms_padded
from doublehead.ops._library import native
from doublehead.ops.nms import reference
from tests.support.nms_cases import DTYPES, INF, NAN, clustered_boxes, is_greedy_result
from tests.support.nms_strategies import images, thresholds

NMS = torch.ops.doublehead.nms.default

pytestmark = pytest.mark.skipif(
    not native("nms_padded", "cpu"), reason="doublehead's compiled part is not built, so there is nothing to compare"
)


@settings(max_examples=200, deadline=None)
@given(images(), thresholds, st.integers(0, 160))
def test_padded_equals_reference(example_images, threshold, max_output):
    boxes, scores, groups = example_images
    actual = nms_padded(boxes, scores, groups, threshold, max_output)
    expected = reference.nms_padded(boxes, scores, groups, threshold, max_output)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@settings(max_examples=100, deadline=None)
@given(images(), thresholds, st.booleans())
def test_nms_equals_reference(example_images, threshold, grouped):
    boxes, scores, groups = (tensor[0] for tensor in example_images)
    groups = groups if grouped else None
    assert torch.equal(NMS(boxes, scores, groups, threshold), reference.nms(boxes, scores, groups, threshold))


# The kernel chooses by area and place which boxes to compare. These pairs lie at the edge of what its bounds allow: one
# box inside the other, or moved along x, or longer, with an IoU next to the threshold; each pair is far from the
# others, and there are so many that the edges of levels and strips fall between the two of some.
@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.01, 0.99),
    st.floats(1.0, 500.0),
    st.sampled_from(["inside", "moved", "longer"]),
    st.integers(0, 2**16),
)
def test_pairs_at_the_threshold(threshold, side, kind, seed):
    pairs = 1500
    generator = torch.Generator().manual_seed(seed)
    ratio = threshold * (1 + 1e-5 * torch.randn(pairs, generator=generator))
    sides = side * (1 + torch.rand(pairs, generator=generator))
    left, length = torch.zeros(pairs), sides.clone()
    if kind == "inside":
        length *= ratio
    elif kind == "longer":
        length /= ratio
    else:
        left = sides * (1 - ratio) / (1 + ratio)
    x = 3000 * torch.randn(pairs, generator=generator)
    y = torch.arange(pairs) * 1024.0
    first = torch.stack((x, y, x + sides, y + sides), 1)
    second = torch.stack((x + left, y, x + left + length, y + sides), 1)
    swap = torch.rand(pairs, generator=generator) < 0.5
    better, worse = torch.where(swap[:, None], second, first), torch.where(swap[:, None], first, second)
    iou = box_iou(better[:, None], worse[:, None])[:, 0, 0]
    kept = NMS(torch.cat((better, worse)), torch.arange(2 * pairs).flip(0).float(), None, threshold)
    expected = torch.cat((torch.ones(pairs, dtype=torch.bool), ~(iou.double() > threshold))).nonzero()[:, 0]
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_group(threshold, dtype):
    # Several strips; float16 and bfloat16 give many equal coordinates. Some boxes are not finite, some have no area.
    boxes, scores = clustered_boxes(3000, seed=1, objects=60)
    boxes = boxes.to(dtype)
    for column, bad in enumerate((NAN, INF, -INF, 0.0)):
        boxes[column::300, column] = bad
    kept = NMS(boxes, scores, None, threshold)
    expected, count = reference.nms_padded(
        boxes[None], scores[None], torch.zeros(1, 3000, dtype=torch.int64), threshold, 400
    )
    assert torch.equal(kept[:400], expected[0, : count.item()])
    distinct = torch.randperm(3000, generator=torch.Generator().manual_seed(1)).float()
    kept = NMS(boxes, distinct, None, threshold)
    assert is_greedy_result(kept, boxes, distinct, torch.zeros(3000), threshold)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_threads_change_nothing(groups, threshold):
    boxes, _ = clustered_boxes(40_000, seed=2, objects=500, spread=0.05)
    scores = torch.randperm(40_000, generator=torch.Generator().manual_seed(2)).float()
    labels = torch.arange(40_000) % groups
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(NMS(boxes, scores, labels, threshold))
    finally:
        torch.set_num_threads(threads)
    assert is_greedy_result(results[0], boxes, scores, labels, threshold)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_more_images_than_threads():
    boxes, scores = clustered_boxes(9 * 200, seed=3)
    boxes, scores = boxes.view(9, 200, 4), scores.view(9, 200)
    groups = torch.arange(1800).view(9, 200) % 3
    actual = nms_padded(boxes, scores, groups, 0.5, 50)
    expected = reference.nms_padded(boxes, scores, groups, 0.5, 50)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(boxes=torch.zeros(2, 5, 3)), "boxes must have size 4 in dimension 2"),
        (dict(boxes=torch.zeros(5, 4)), "boxes must have 3 dimensions"),
        (dict(boxes=torch.zeros(2, 5, 4, dtype=torch.int64)), "boxes must be float32"),
        (dict(scores=torch.zeros(2, 4)), "scores must have size 5 in dimension 1"),
        (dict(scores=torch.zeros(2, 5, dtype=torch.int64)), "scores must be float32"),
        (dict(groups=torch.zeros(2, 5)), "groups must be Long"),
        (dict(groups=torch.zeros(2, 6, dtype=torch.int64)), "groups must have size 5 in dimension 1"),
        (dict(max_output=-1), "max_output must be >= 0"),
    ],
)
def test_kernel_reads_nothing_it_should_not(change, message):
    # The raw operator, behind the public function's checks.
    arguments = dict(
        boxes=torch.zeros(2, 5, 4), scores=torch.zeros(2, 5), groups=torch.zeros(2, 5, dtype=torch.int64), max_output=3
    )
    arguments.update(change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.doublehead.nms_padded(iou_threshold=0.5, **arguments)
