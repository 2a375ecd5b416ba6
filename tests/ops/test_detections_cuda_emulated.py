"""The CUDA kernels of the detections, run on the CPU by tests/cuda_emulation: scores and boxes within the bound of
rounding, and what suppression makes of them bit by bit.
"""

from __future__ import annotations

import pytest
import torch

from doublehead.ops.boxes import clip_boxes, decode_boxes
from doublehead.ops.detections import by_class, reference
from doublehead.ops.detections.arguments import DetectionArguments
from tests.cuda_emulation.build import IN_ORDER, every_order, open_emulated
from tests.support.detection_cases import OPTIONS, tensors
from tests.support.detection_checks import FUSION_NAMES, INF, NAN
from tests.support.emulated_detections import emulated, emulated_boxes, emulated_scores
from tests.support.guarded_memory import guarded, run_apart
from tests.support.precision import error_and_bound


def make(batch=2, rois=20, classes=6, seed=0, heads=2, scale=2.0, crowd=4, dtype=None, **options):
    logits, deltas, *others = tensors(batch, rois, classes, seed, heads, scale, crowd)
    logits, deltas = [item.to(dtype) for item in logits], deltas.to(dtype)
    return DetectionArguments(tuple(logits), deltas, *others, **(OPTIONS | options))


def check_exactly(args, order=IN_ORDER):
    """Equal to what the reference makes of the scores and boxes that the kernels compute; returns `count`."""
    assert by_class.serves(args)
    found = emulated(args, order)
    scores, (boxes, usable) = emulated_scores(args), emulated_boxes(args)
    labels = torch.arange(1, scores.shape[2] + 1)
    groups = torch.where(~scores.isnan() & usable[:, :, 1:], labels, -1).flatten(1)
    expected = reference.suppress(boxes[:, :, 1:].flatten(1, 2), scores.flatten(1), groups, args)
    assert all(map(torch.equal, found, expected))
    return found[3]


# ---------------------------------------------------------------------------------------------
# Scores and boxes


def check_rounding(actual, plain, exact, what):
    error, bound = error_and_bound(actual, plain, exact, what)
    assert error <= bound, (what, error, bound)


@pytest.mark.parametrize("fusion", FUSION_NAMES)
@pytest.mark.parametrize("heads, classes", [(1, 2), (2, 33), (2, 128), (1, 129), (2, by_class.MOST_CLASSES)])
def test_scores(heads, classes, fusion):
    args = make(2, 11, classes, heads=heads, scale=4.0, fusion=fusion, score_threshold=-1.0)
    scores = emulated_scores(args)
    plain = reference.class_scores(args.logits, fusion)[..., 1:]
    exact = reference.class_scores([item.double() for item in args.logits], fusion)[..., 1:]
    assert torch.equal(scores.isnan(), ~args.valid[..., None].expand_as(scores))
    check_rounding(scores[args.valid], plain[args.valid], exact[args.valid], "scores")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("least_side", [0.0, 1.0])
def test_boxes(dtype, least_side):
    args = make(3, 17, 5, dtype=dtype, least_side=least_side)
    boxes, _ = emulated_boxes(args)
    plain, exact = (
        clip_boxes(
            decode_boxes(args.deltas.to(wide), args.proposals[:, :, None].to(wide), args.box_weights).flatten(1, 2),
            args.sizes,
            least_side,
        ).view(3, 17, 5, 4)
        for wide in (torch.float32, torch.float64)
    )
    check_rounding(boxes, plain, exact, "boxes")


def test_a_score_equals_its_threshold_in_float32():
    args = make(1, 8, 3, seed=1)
    score = reference.class_scores(args.logits, args.fusion)[0, 0, 1].item()
    for logits in args.logits:
        logits[:] = logits[:, :1]
    args.valid[:] = True
    found = emulated(args._replace(score_threshold=-1.0, nms_iou=1.0))
    score = found[1][found[2] == 1][0].item()
    for threshold, survives in ((score, False), (score * (1 + 1e-9), False), (score * (1 - 1e-9), False),
                                (score * (1 - 1e-7), True)):  # fmt: skip
        labels = emulated(args._replace(score_threshold=threshold))[2]
        assert (labels == 1).any() == survives, threshold


# ---------------------------------------------------------------------------------------------
# Suppression and the merge, bit by bit


@every_order
@pytest.mark.parametrize("rois", [1, 8, 9, 33, 64, 65, 130])
def test_every_number_of_rois(rois, order):
    count = check_exactly(make(2, rois, 3, seed=rois, score_threshold=0.02), order)
    assert count.any()


@every_order
def test_long_classes(order):
    # 1024 candidates a class: all that a block sorts, and 16 tiles.
    args = make(1, 1024, 2, seed=2, scale=0.5, crowd=200, score_threshold=-1.0, max_detections=1024)
    args.valid[:] = True
    check_exactly(args, order)


@pytest.mark.parametrize("rois", [257, 511, 1023])
def test_classes_beside_the_sizes_of_the_sort(rois):
    check_exactly(make(1, rois, 2, seed=rois, scale=0.5, crowd=50, score_threshold=0.0, max_detections=300))


@every_order
@pytest.mark.parametrize("most", [1, 64, 65, 1024])
def test_early_stop_changes_nothing(most, order):
    args = make(1, 150, 4, seed=3, scale=1.0, crowd=120, score_threshold=0.0, max_detections=most)
    check_exactly(args, order)


@pytest.mark.parametrize("nms_iou", [-0.5, 0.0, 1e-4, 0.02, 0.95, 1.0, 1.5, NAN])
def test_every_threshold(nms_iou):
    args = make(1, 90, 3, seed=4, crowd=9, nms_iou=nms_iou, score_threshold=0.0, min_size=0.0)
    args.proposals[0, ::9, 2] = args.proposals[0, ::9, 0]  # no width
    check_exactly(args)


def test_a_chain_of_suppressions():
    # Box i suppresses box i + 1 alone, so every second is kept: the longest chain a tile can hold.
    rois = 200
    left = torch.arange(rois) * 3.0
    proposals = torch.stack((left, torch.zeros(rois), left + 10, torch.ones(rois)), 1)[None]
    logits = torch.stack((torch.zeros(rois), torch.linspace(4, 1, rois)), 1)[None]
    sizes = torch.tensor([[9.0, 1e4]])
    args = DetectionArguments(
        (logits,), torch.zeros(1, rois, 2, 4), proposals, torch.ones(1, rois, dtype=torch.bool), sizes,
        **(OPTIONS | {"max_detections": 1000}),
    )  # fmt: skip
    assert check_exactly(args).item() == rois // 2
    assert torch.equal(emulated(args)[0][0, : rois // 2], proposals[0, ::2])


@every_order
@pytest.mark.parametrize("most", [10, 1024])
def test_more_is_kept_than_a_block_merges_at_once(most, order):
    # 50 classes of 60 RoIs that hardly overlap: 3,000 keys, where the merge holds 2,048.
    args = make(1, 60, 51, seed=5, scale=0.1, crowd=60, score_threshold=0.0, nms_iou=0.9, max_detections=most)
    args.valid[:] = True
    assert check_exactly(args, order).item() == most


@every_order
def test_all_of_the_best_are_of_one_class(order):
    args = make(1, 120, 40, seed=6, scale=0.1, crowd=120, score_threshold=0.0, nms_iou=0.99, max_detections=100)
    args.valid[:] = True
    args.logits[0][..., 7] += 6.0 + torch.linspace(0, 1, 120)
    assert check_exactly(args, order).item() == 100
    assert set(emulated(args)[2].flatten().tolist()) == {7}


def test_the_best_lie_behind_a_sweep_that_finds_some():
    # One class has many of the best, so several sweeps over the classes each find some.
    args = make(1, 250, 30, seed=7, scale=0.3, crowd=250, score_threshold=0.0, nms_iou=0.99, max_detections=300)
    args.valid[:] = True
    args.logits[0][..., 3] += torch.linspace(0, 9, 250)
    args.logits[1][..., 5] += torch.linspace(5, 0, 250)
    assert check_exactly(args).item() == 300


def test_sweep_after_sweep_finds_better_ones():
    # Half of the classes have all of the best: 490 more in each sweep than the merge has room for beside 1,024.
    args = make(1, 250, 30, seed=14, scale=0.3, crowd=250, score_threshold=0.0, nms_iou=0.99, max_detections=1024)
    args.valid[:] = True
    args.logits[0][..., ::2] += 3.0
    assert check_exactly(args).item() == 1024


@pytest.mark.parametrize("last", [200, 300])
def test_many_classes(last):
    # A sweep of the merge takes a block two rounds; with 200 the second finds nothing.
    args = make(1, 20, 300, seed=8, scale=3.0, crowd=20, score_threshold=1e-4, max_detections=100, nms_iou=0.99)
    args.logits[0][..., 7] += 15.0
    for logits in args.logits:
        logits[..., last:] = -INF
    assert check_exactly(args).item() == 100


def test_most_classes():
    classes = by_class.MOST_CLASSES
    args = make(1, 8, classes, seed=15, heads=1, crowd=8, nms_iou=0.99)
    chosen = [1, 31, 32, 1023, 1024, classes - 1]
    for label in set(range(classes)) - set(chosen):
        args.logits[0][..., label] = -INF
    assert check_exactly(args).item() == 20


@every_order
def test_ties_go_to_the_lower_roi_then_class(order):
    args = make(2, 40, 9, seed=9, crowd=40, nms_iou=1.0, max_detections=1000, score_threshold=0.0)
    for logits in args.logits:
        logits[:] = 1.0
    args.valid[:] = True
    check_exactly(args, order)
    boxes, scores, labels, count = emulated(args._replace(deltas=args.deltas * 0), order)
    assert (count == 40 * 8).all() and len(set(scores[0, :320].tolist())) == 1
    assert labels[0, :320].tolist() == list(range(1, 9)) * 40


@every_order
def test_what_is_not_finite(order):
    args = make(2, 30, 5, seed=10, min_size=0.0, score_threshold=-1.0, max_detections=500)
    args.valid[:] = True
    args.logits[0][0, 0, 1], args.logits[1][0, 1, 0], args.logits[0][0, 2] = NAN, INF, -INF
    args.proposals[0, 3, 0], args.proposals[0, 4, 3] = NAN, INF
    args.deltas[1, 0, 1, 2], args.deltas[1, 1, 2, 0], args.deltas[1, 2, 3, 2] = NAN, INF, INF
    args.sizes[1, 0] = NAN
    count = check_exactly(args, order)
    assert count.tolist()[1] == 0 and count[0] > 0  # a height of NaN leaves no box


# ---------------------------------------------------------------------------------------------
# Layouts and dtypes


def test_one_box_for_all_classes():
    args = make(2, 30, 7, seed=11)
    shared = args.deltas[:, :, :1].contiguous()
    alike = args._replace(deltas=shared.expand(-1, -1, 7, -1)), args._replace(deltas=shared.repeat(1, 1, 7, 1))
    assert alike[0].deltas.stride(2) == 0
    assert all(map(torch.equal, *map(emulated, alike)))
    check_exactly(alike[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide_proposals", [True, False])
def test_dtypes_and_strides(dtype, wide_proposals):
    args = make(2, 21, 5, seed=12, dtype=dtype)
    proposals = args.proposals if wide_proposals else args.proposals.to(dtype)
    args = args._replace(proposals=proposals, sizes=args.sizes.long())
    expected = emulated(args)
    check_exactly(args)
    odd = torch.zeros(2 * 21 * 5 * 4 + 1, dtype=dtype)[1:].view(2, 21, 5, 4).copy_(args.deltas)  # not aligned
    strided = args._replace(
        logits=tuple(item.transpose(1, 2).contiguous().transpose(1, 2) for item in args.logits),
        proposals=proposals.repeat_interleave(2, -1)[..., ::2],
        valid=args.valid.t().contiguous().t(),
        sizes=args.sizes.t().contiguous().t(),
    )
    for deltas in (odd, args.deltas.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)):
        assert all(map(torch.equal, emulated(strided._replace(deltas=deltas)), expected))


@pytest.mark.parametrize("dtype", by_class.SIZE_DTYPES)
def test_dtypes_of_sizes(dtype):
    args = make(3, 12, 4, seed=13)
    assert all(map(torch.equal, emulated(args._replace(sizes=args.sizes.to(dtype))), emulated(args)))


# ---------------------------------------------------------------------------------------------
# Which calls are served


def test_limits_are_those_of_the_kernels():
    limits = torch.zeros(3, dtype=torch.int64)
    open_emulated("detections.cpp").call("detection_limits", limits)
    assert limits.tolist() == [by_class.MOST_ROIS, by_class.MOST_CLASSES, by_class.MOST_DETECTIONS]


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_the_operator_gets_all_arguments(fusion):
    args = make(2, 9, 4, fusion=fusion, max_detections=7)
    expected = reference.detections(args)
    assert by_class.with_name(by_class.with_number(args)) == args
    assert all(map(torch.equal, by_class.detections(args), expected))  # on the CPU, by its path there


def test_what_is_served():
    args = make(1, 4, 3)
    assert by_class.detections(args._replace(max_detections=0)) is None
    assert by_class.serves(args) and by_class.serves(make(1, 4, 3, heads=1))
    half = args.deltas.half()
    assert by_class.serves(args._replace(deltas=half))
    assert by_class.serves(args._replace(deltas=half, proposals=args.proposals.half()))
    not_served = [
        dict(logits=(args.logits[0].double(),)),
        dict(logits=(args.logits[0], args.logits[1].half())),
        dict(deltas=args.deltas.double()),
        dict(proposals=args.proposals.half()),
        dict(deltas=half, proposals=args.proposals.bfloat16()),
        dict(sizes=args.sizes.half()),
        dict(max_detections=0),
        dict(max_detections=by_class.MOST_DETECTIONS + 1),
    ]
    assert not any(by_class.serves(args._replace(**change)) for change in not_served)
    shapes = ((0, 4, 3), (1, 0, 3), (1, by_class.MOST_ROIS + 1, 3), (1, 4, 1), (1, 4, by_class.MOST_CLASSES + 1))
    assert not any(by_class.serves(make(*shape)) for shape in shapes)


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beside_the_tensors_is_touched(behind, dtype):
    args = make(rois=37, dtype=dtype)
    tensors = {
        name: guarded(value, behind) for name, value in args._asdict().items() if isinstance(value, torch.Tensor)
    }
    logits = tuple(guarded(value, behind) for value in args.logits)
    open_emulated("detections.cpp")  # compiled here
    assert run_apart(lambda: emulated(args._replace(logits=logits, **tensors))) == 0
