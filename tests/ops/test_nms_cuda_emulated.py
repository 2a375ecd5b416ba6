"""The CUDA kernels of NMS, run on the CPU by tests/cuda_emulation, against the definition: index for index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doublehead.ops import box_iou
from doublehead.ops.nms import reference
from tests.cuda_emulation.build import IN_ORDER, ORDERS, Order, every_order, open_emulated
from tests.support.guarded_memory import guarded, run_apart
from tests.support.nms_cases import DTYPES, INF, NAN, clustered_boxes, integer_boxes, is_greedy_result
from tests.support.nms_strategies import images, thresholds

emulated = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run_counted(boxes, scores, groups, threshold, max_output, *, padding=True, largest_group=0, chunk=0,
                largest_segment=-1, ranked=None, blocks=3, order=IN_ORDER):  # fmt: skip
    """The kernels' result, into poisoned memory, and the number of launches.

    chunk, largest_segment: other than those of make_plan (steps.h).
    ranked: whether few boxes are ordered by comparisons, and not as many are; by default, unless the others are given.
    blocks: how many work together.
    """
    if ranked is None:
        ranked = chunk == 0 and largest_segment == -1
    batch, count = scores.shape
    indices = torch.full((batch, max_output), -7)
    counts = torch.full((batch,), -7)
    if 0 in (batch, count, max_output):
        return indices.fill_(-1), counts.fill_(0), 0  # nms.cu launches nothing
    arguments = []
    for tensor in (boxes, scores):
        arguments += [tensor, strides(tensor), DTYPES.index(tensor.dtype)]
    arguments += [groups, strides(groups)] if groups is not None else [None, torch.zeros(3, dtype=torch.int64)]
    sizes = (batch, count, float(threshold), max_output, largest_group, chunk, largest_segment, int(ranked), blocks)
    launches = torch.full((1,), -7)
    open_emulated("nms.cpp").call("nms", *arguments, int(padding), *sizes, indices, counts, launches, order=order)
    return indices, counts, launches.item()


def run_padded(*arguments, **how):
    return run_counted(*arguments, **how)[:2]


def run_nms(boxes, scores, groups, threshold, **how):
    groups = None if groups is None else groups[None]
    indices, counts = run_padded(boxes[None], scores[None], groups, threshold, len(boxes), padding=False, **how)
    assert (indices[0, counts[0] :] == -1).all()
    return indices[0, : counts[0]]


def strides(tensor):
    return torch.tensor([*tensor.stride(), 0][:3])


def assert_equals_reference(boxes, scores, groups, threshold, max_output, **how):
    actual = run_padded(boxes, scores, groups, threshold, max_output, **how)
    expected = reference.nms_padded(boxes, scores, groups, threshold, max_output)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


# ---------------------------------------------------------------------------------------------
# Whatever Hypothesis thinks of: small chunks give several rounds, and either way to decide on a group gets its share.


@settings(emulated, max_examples=50)
@given(
    images(),
    thresholds,
    st.integers(0, 160),
    st.sampled_from([dict(), dict(ranked=False), dict(chunk=64), dict(chunk=128)]),
    st.sampled_from([-1, 0, 1, 20, 2048]),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from(ORDERS),
)
def test_padded_equals_reference(example_images, threshold, max_output, how, largest_segment, blocks, order):
    if how:
        how = dict(how, largest_segment=largest_segment)
    how = dict(how, blocks=blocks, order=order)
    assert_equals_reference(*example_images, threshold, max_output, **how)


@settings(emulated, max_examples=40)
@given(images(), thresholds, st.booleans(), st.sampled_from([0, 64]), st.sampled_from([-1, 30]))
def test_nms_equals_reference(example_images, threshold, grouped, chunk, largest_segment):
    boxes, scores, groups = (tensor[0] for tensor in example_images)
    groups = groups if grouped else None  # negative groups are groups here
    actual = run_nms(boxes, scores, groups, threshold, chunk=chunk, largest_segment=largest_segment)
    assert torch.equal(actual, reference.nms(boxes, scores, groups, threshold))


# ---------------------------------------------------------------------------------------------
# Sizes at the edges of tiles, chunks and segments


@pytest.mark.parametrize("largest_segment", [-1, 0, 2048], ids=["ranked", "rounds", "segments"])
@pytest.mark.parametrize("count", [1, 31, 33, 63, 64, 65, 128, 129, 200])
def test_one_group_of_every_size(count, largest_segment):
    boxes, scores = clustered_boxes(count, seed=count, objects=4)
    groups = torch.zeros(1, count, dtype=torch.int64)
    how = dict(largest_segment=largest_segment, order=ORDERS[count % len(ORDERS)])
    assert_equals_reference(boxes[None], scores[None], groups, 0.5, count + 3, **how)


@pytest.mark.parametrize("order", [ORDERS[1], Order(3, 7, resident=3)], ids=str)
@pytest.mark.parametrize("make_boxes, threshold", [(clustered_boxes, 0.5), (integer_boxes, 0.3)])
@pytest.mark.parametrize("how", [dict(), dict(largest_segment=2048), dict(chunk=448), dict(ranked=False)], ids=str)
def test_long_groups(make_boxes, threshold, how, order):
    # 1,100 boxes: two of a thread's in a segment, three rounds of 448, or one of 18 tiles.
    boxes, scores = make_boxes(1100, seed=1)
    groups = torch.zeros(1, 1100, dtype=torch.int64)
    actual, count = run_padded(boxes[None], scores[None], groups, threshold, 1100, order=order, **how)
    expected = reference.nms(boxes, scores, None, threshold)
    assert count.item() == len(expected) and torch.equal(actual[0, : len(expected)], expected)


@every_order
def test_segments_of_many_sizes_side_by_side(order):
    sizes = [1, 63, 64, 65, 1, 128, 2, 170, 129]
    boxes, scores = clustered_boxes(sum(sizes), seed=2, objects=5)
    groups = torch.repeat_interleave(torch.tensor([5, -3, 2**40, 0, 7, 2**62, -(2**63), 1, 2]), torch.tensor(sizes))
    shuffle = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    boxes, scores, groups = boxes[shuffle], scores[shuffle], groups[shuffle]
    expected = reference.nms(boxes, scores, groups, 0.4)
    assert torch.equal(run_nms(boxes, scores, groups, 0.4, order=order), expected)
    for largest_segment in (0, 1, 64, 2048):  # the larger ones go through rounds
        actual = run_nms(boxes, scores, groups, 0.4, chunk=128, largest_segment=largest_segment, order=order)
        assert torch.equal(actual, expected)


def test_many_groups_and_images():
    boxes, scores = clustered_boxes(4 * 150, seed=3)
    boxes, scores = boxes.view(4, 150, 4), scores.view(4, 150)
    groups = torch.randint(-1, 30, (4, 150), generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.float64):  # 64-bit scores are sorted in two steps
        for ranked in (True, False):
            assert_equals_reference(boxes, scores.to(dtype), groups, 0.5, 150, ranked=ranked)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.02, 0.5, 0.95, 1.0, 1.5, NAN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_threshold_and_dtype(threshold, dtype):
    boxes, scores = clustered_boxes(500, seed=4, objects=30)
    boxes, scores = boxes.to(dtype), scores.to(dtype)  # 16 bits: many ties
    for column, bad in enumerate((NAN, INF, -INF, 0.0)):
        boxes[column::100, column] = bad
    scores[::90] = NAN
    expected = reference.nms(boxes, scores, None, threshold)
    groups = torch.zeros(500, dtype=torch.int64)
    assert torch.equal(run_nms(boxes, scores, None, threshold), expected)
    assert torch.equal(run_nms(boxes, scores, None, threshold, chunk=128), expected)
    assert torch.equal(run_nms(boxes, scores, groups, threshold, largest_segment=2048), expected)


def test_strided_inputs():
    boxes, scores = clustered_boxes(2 * 200, seed=5)
    table = torch.cat((boxes.flip(1), scores[:, None]), 1).view(200, 2, 5)
    groups = (torch.arange(800) % 3).view(2, 400)[:, ::2]
    view = [table.transpose(0, 1)[..., :4], table[..., 4].T, groups]
    view[0] = torch.as_strided(table, (2, 200, 4), (5, 10, 1), 0)
    assert not any(tensor.is_contiguous() for tensor in view)
    assert_equals_reference(*view, 0.5, 150)


# ---------------------------------------------------------------------------------------------
# The rule at the threshold, and early stop


def check_pairs(pairs, threshold, side, dtype, seed, *segments):
    # The kernel leaves a division out where the result is clear without: here it is not, or only just.
    generator = torch.Generator().manual_seed(seed)
    slack = torch.tensor([1e-8, 1e-7, 1e-6, 4e-6, 1e-5])[torch.randint(5, (pairs,), generator=generator)]
    ratio = (threshold * (1 + slack.double() * torch.randn(pairs, generator=generator))).to(dtype)
    sides = side * (1 + torch.rand(pairs, generator=generator, dtype=dtype))
    zero = torch.zeros_like(sides)
    better = torch.stack((zero, zero, sides, sides), 1)
    worse = torch.stack((zero, zero, sides * ratio, sides), 1)
    iou = box_iou(better[:, None], worse[:, None])[:, 0, 0]
    groups = torch.arange(pairs).repeat(2)
    expected = torch.cat((torch.ones(pairs, dtype=torch.bool), ~(iou.double() > threshold))).nonzero()[:, 0]
    scores = torch.arange(2 * pairs).flip(0).float()
    for largest_segment in segments:
        kept = run_nms(torch.cat((better, worse)), scores, groups, threshold, largest_segment=largest_segment)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_many_pairs_at_the_threshold(threshold, dtype):
    check_pairs(700, threshold, 1.0, dtype, 0, 0)


@settings(emulated, max_examples=80)
@given(images(), st.one_of(thresholds, st.sampled_from([2.0, 1e300, INF, -INF])))
def test_rule_of_all_pairs(example_images, threshold):
    # Whatever the values are: infinite, NaN, tiny, inverted, without area.
    boxes = example_images[0].flatten(0, 1)
    boxes = boxes.float() if boxes.dtype != torch.float64 else boxes
    if len(boxes) == 0:
        return
    boxes = torch.cat((boxes[:110], torch.tensor(SPECIAL).to(boxes)))
    many, single = (torch.full((len(boxes), len(boxes)), 7, dtype=torch.uint8) for _ in range(2))
    is_double = int(boxes.dtype == torch.float64)
    open_emulated("nms.cpp").call("nms_rule", boxes, is_double, len(boxes), float(threshold), many, single)
    expected = box_iou(boxes, boxes).double() > threshold
    assert torch.equal(many, expected.byte()) and torch.equal(single, expected.byte())


SPECIAL = [
    [0.0, 0, 10, 10], [0, 0, 10, 5], [10, 0, 0, 10], [10, 10, 0, 0], [2, 2, 2, 8], [0, 0, 0, 0], [NAN, 0, 10, 10],
    [0, 0, NAN, 10], [-INF, 0, 10, 10], [0, 0, INF, INF], [-3e38, -3e38, 3e38, 3e38], [0, 0, 2e19, 2e19],
    [0, 0, 1e-20, 1e-20], [0, 0, 1e-22, 1e-22], [0, 0, 1e-15, 9e-16], [0, 0, 1e-45, 1e30],
]  # fmt: skip


@settings(emulated, max_examples=30)
@given(
    st.one_of(st.floats(1e-4, 1.0), st.sampled_from([1e-3, 0.1, 0.3, 0.5, 0.6, 0.7, 1.0])),
    st.sampled_from([1e-20, 1e-15, 1e-3, 1.0, 500.0, 1e17]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**16),
)
def test_pairs_at_the_threshold(threshold, side, dtype, seed):
    check_pairs(12, threshold, side, dtype, seed, 0, 2)


@pytest.mark.parametrize("max_output", [1, 63, 64, 65, 300])
def test_early_stop_changes_nothing(max_output):
    order = ORDERS[max_output % len(ORDERS)]
    boxes, scores = clustered_boxes(2 * 400, seed=6, objects=200)
    boxes, scores = boxes.view(2, 400, 4), scores.view(2, 400)
    groups = torch.randint(-1, 3, (2, 400), generator=torch.Generator().manual_seed(6))
    groups[1, 60:] = -1  # the second image has not as many as are wanted
    for how in (
        dict(), dict(chunk=192, largest_segment=0), dict(chunk=320, largest_segment=130), dict(largest_segment=2048)
    ):  # fmt: skip
        assert_equals_reference(boxes, scores, groups, 0.5, max_output, order=order, **how)


def test_nothing_overlaps():
    # Every box is kept, so every word of the mask that there is gets used.
    corners = torch.stack((torch.arange(1500) * 20.0, torch.zeros(1500)), 1)
    boxes, scores = torch.cat((corners, corners + 10), 1), torch.rand(1500, generator=torch.Generator().manual_seed(0))
    expected = scores.argsort(descending=True, stable=True)
    groups = torch.zeros(1500, dtype=torch.int64)
    assert torch.equal(run_nms(boxes, scores, None, 0.5), expected)
    assert torch.equal(run_nms(boxes, scores, groups, 0.5, largest_segment=2048), expected)


@pytest.mark.parametrize("max_output", [63, 64, 65, 127, 128, 129])
def test_stops_with_the_round_that_has_enough(max_output):
    corners = torch.stack((torch.arange(200) * 20.0, torch.zeros(200)), 1)
    boxes, scores = torch.cat((corners, corners + 10), 1)[None], torch.arange(200.0, 0.0, -1.0)[None]
    groups = torch.zeros(1, 200, dtype=torch.int64)
    indices, count = run_padded(boxes, scores, groups, 0.5, max_output, chunk=64, largest_segment=0)
    assert indices[0].tolist() == list(range(max_output)) and count.item() == max_output


def test_a_chain_of_suppressions():
    # Box i suppresses box i + 1 alone, so every second is kept: the longest chain a tile can hold.
    left = torch.arange(300) * 3.0
    boxes = torch.stack((left, torch.zeros(300), left + 10, torch.ones(300)), 1)
    scores = torch.arange(300, 0, -1).float()
    groups = torch.zeros(300, dtype=torch.int64)
    for how in (dict(chunk=128), dict(), dict(largest_segment=2048)):
        assert run_nms(boxes, scores, groups, 0.5, **how).tolist() == list(range(0, 300, 2))


def test_large_chunk():
    # 5,000 boxes in two rounds of the size that make_plan chooses, or of 50 tiles: what is behind the first is struck,
    # and a block of the mask takes several pairs of tiles.
    boxes, _ = clustered_boxes(5000, seed=7, objects=30)
    scores = torch.randperm(5000, generator=torch.Generator().manual_seed(7)).float()
    for chunk in (0, 3200):
        kept = run_nms(boxes, scores, None, 0.3, chunk=chunk)
        assert is_greedy_result(kept, boxes, scores, torch.zeros(5000), 0.3)


def test_every_row_of_a_tile_strikes():
    # 192 boxes apart from each other, then each once more: every kept box has one to strike, two tiles or more behind.
    corners = torch.stack((torch.arange(192) * 20.0, torch.zeros(192)), 1)
    boxes = torch.cat((corners, corners + 10), 1).repeat(2, 1)
    scores, groups = torch.arange(384, 0, -1).float(), torch.zeros(384, dtype=torch.int64)
    for how in (dict(), dict(chunk=128), dict(largest_segment=2048)):
        assert run_nms(boxes, scores, groups, 0.5, **how).tolist() == list(range(192))


# ---------------------------------------------------------------------------------------------
# What the plan makes of the sizes


def make_groups(batch, classes, each, seed=8):
    """`batch` images of `classes` groups of `each` boxes, mixed."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(classes).repeat_interleave(each)
    groups = torch.stack([groups[torch.randperm(len(groups), generator=generator)] for _ in range(batch)])
    boxes, scores = clustered_boxes(batch * classes * each, seed=seed, objects=9)
    return boxes.view(batch, -1, 4), scores.view(batch, -1), groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_group_changes_nothing(dtype):
    boxes, scores, groups = make_groups(2, 5, 30)
    boxes = boxes.to(dtype)
    expected = reference.nms_padded(boxes, scores, groups, 0.5, 100)
    for ranked in (True, False):
        launches = []
        for largest_group in (0, 30, 75, 76):
            *actual, number = run_counted(boxes, scores, groups, 0.5, 100, largest_group=largest_group, ranked=ranked)
            assert all(map(torch.equal, actual, expected)), largest_group
            launches.append(number)
        # Order and decide; or keys, numbers, boxes, and decide: a sort is more, on a device.
        assert launches == [2 if ranked else 4] * 4


def test_groups_that_fall_on_the_same_place_of_the_table():
    boxes, scores, groups = make_groups(1, 150, 2)  # about ten of 150 groups do, in 1,024 places
    groups = torch.randint(2**62, (150,), generator=torch.Generator().manual_seed(0))[groups]
    for order in (IN_ORDER, Order(3, 7, resident=3)):
        assert_equals_reference(boxes, scores, groups, 0.1, 300, ranked=False, order=order)


def test_launches():
    # Two for few boxes; a sort is more, on a device. Rounds are in one.
    for count, ranked, largest_segment, expected in ((300, True, -1, 2), (300, False, 0, 3), (2000, True, -1, 2)):
        boxes, scores = clustered_boxes(count, seed=9)
        how = dict(chunk=0 if ranked else 64, ranked=ranked, largest_segment=largest_segment)
        *_, launches = run_counted(boxes[None], scores[None], None, 0.5, count, **how)
        assert launches == expected


@pytest.mark.parametrize("largest_group", [1, 5, 10**9, 2**62])
def test_a_wrong_bound_reads_and_writes_nothing_out_of_place(largest_group):
    boxes, scores, groups = make_groups(2, 3, 50)
    groups[:, 20:100] = 0  # more than half of the boxes
    assert_equals_reference(boxes, scores, groups, 0.5, 60, largest_group=largest_group)  # few boxes: all are compared
    indices, counts, _ = run_counted(boxes, scores, groups, 0.5, 60, largest_group=largest_group, ranked=False)
    expected, _ = reference.nms_padded(boxes, scores, groups, 0.5, 150)
    if largest_group <= 5:  # the group is left out, the others are as ever
        alone = torch.where(groups == 0, -1, groups)
        expected, _ = reference.nms_padded(boxes, scores, alone, 0.5, 60)
    assert torch.equal(indices, expected[:, :60]) and torch.equal(counts, (indices >= 0).sum(1))


@pytest.mark.parametrize("chunk", [1, 7, 63, 65, 100, 149])
def test_chunks_that_end_inside_a_tile(chunk):
    boxes, scores, groups = make_groups(2, 3, 50)
    assert_equals_reference(boxes, scores, groups, 0.5, 150, chunk=chunk, largest_segment=0)


IMAGES = [1, 2, 16, 300, 2_000, 10_000, 100_000, 1_000_000]
BOXES = [1, 3, 64, 100, 1_000, 1_024, 4_097, 12_000, 80_000, 1_000_000]


@pytest.mark.parametrize("is_double", [0, 1])
@pytest.mark.parametrize("grouped", [0, 1])
def test_memory_grows_with_the_boxes_alone(grouped, is_double):
    """Masks and lists are bounded: 256 MiB, or as many bytes as the boxes themselves take."""
    plan = torch.zeros(3, dtype=torch.int64)
    for number in IMAGES:
        for count in (count for count in BOXES if number * count < 1 << 30):
            open_emulated("nms.cpp").call("nms_plan", number, count, grouped, is_double, 0, plan)
            total, (workspace, masks, chunk) = number * count, plan.tolist()
            assert masks <= max(256 << 20, 8 * total), (number, count)
            assert workspace - masks <= (82 + 16 * is_double) * total + 64 * number + 8192, (number, count)
            assert min(64, count) <= chunk <= 8192, (number, count)
            open_emulated("nms.cpp").call("nms_plan", number, count, grouped, is_double, 1, plan)
            if grouped and chunk < count:
                assert plan[0] <= workspace - masks and not plan[1:].any()


def test_memory_of_ten_thousand_images():
    plan = torch.zeros(3, dtype=torch.int64)
    open_emulated("nms.cpp").call("nms_plan", 10_000, 1_024, 1, 0, 0, plan)
    assert plan[1] <= 256 << 20 and plan[0] < 1 << 30 and plan[2] == 256


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("how", [{}, {"ranked": False}, {"largest_segment": 64}, {"chunk": 128}], ids=str)
def test_nothing_beside_the_tensors_is_touched(behind, how):
    boxes, scores = (tensor.view(2, 201, -1).squeeze(-1) for tensor in clustered_boxes(2 * 201, seed=6))
    groups = torch.arange(402).view(2, 201) % 5
    inputs = [guarded(tensor, behind) for tensor in (boxes, scores, groups)]
    open_emulated("nms.cpp")  # compiled here
    assert run_apart(lambda: run_counted(*inputs, 0.5, 150, **how)) == 0
