"""NMS on a CUDA device: the CPU's result index for index, and what only a device can show."""

from __future__ import annotations

import pytest
import torch

from doublehead.ops import batched_nms, nms, nms_padded
from doublehead.ops._library import native
from doublehead.ops.nms import reference
from tests.support.nms_cases import DTYPES, INF, NAN, THRESHOLDS, clustered_boxes, integer_boxes, random_images

NMS = torch.ops.doublehead.nms.default

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not native("nms_padded", "cuda"), reason="doublehead's CUDA part is not built, so there is nothing to compare"
    ),
]


def to_device(tensors, device="cuda"):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def padded_example(batch=3, count=500, seed=0):
    boxes, scores = clustered_boxes(batch * count, seed)
    groups = torch.arange(batch * count) % 5 - 1
    return boxes.view(batch, count, 4), scores.view(batch, count), groups.view(batch, count)


def assert_padded_as_on_cpu(boxes, scores, groups, threshold, max_output):
    actual = nms_padded(*to_device((boxes, scores, groups)), threshold, max_output)
    expected = nms_padded(boxes, scores, groups, threshold, max_output)
    assert torch.equal(actual[0].cpu(), expected[0]) and torch.equal(actual[1].cpu(), expected[1])


def assert_as_on_cpu(boxes, scores, groups, threshold):
    actual = NMS(*to_device((boxes, scores, groups)), threshold)
    assert torch.equal(actual.cpu(), NMS(boxes, scores, groups, threshold))


# ---------------------------------------------------------------------------------------------
# The CPU's result


@pytest.mark.parametrize("which", range(len(THRESHOLDS)))
def test_equals_reference(which):
    threshold = THRESHOLDS[which]
    for seed in range(which * 25, which * 25 + 25):
        boxes, scores, groups = random_images(seed)
        most = (0, 1, 40, 160)[seed % 4]
        actual = nms_padded(*to_device((boxes, scores, groups)), threshold, most)
        expected = reference.nms_padded(boxes, scores, groups, threshold, most)
        assert torch.equal(actual[0].cpu(), expected[0]) and torch.equal(actual[1].cpu(), expected[1]), seed
        one = boxes[0], scores[0], groups[0] if seed % 2 else None
        actual = NMS(*to_device(one), threshold)
        assert torch.equal(actual.cpu(), reference.nms(*one, threshold)), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0, NAN])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 4096, 4097, 9000])
def test_nms_of_one_group(count, threshold, dtype):
    for make_boxes in (clustered_boxes, integer_boxes):
        boxes, scores = make_boxes(count, seed=count)
        boxes = boxes.to(dtype)
        for column, bad in enumerate((NAN, INF, -INF, 0.0)):
            boxes[column + 7 :: 300, column] = bad
        assert_as_on_cpu(boxes, scores, None, threshold)


@pytest.mark.parametrize("groups", [1, 2, 80, 1000, 70_000])
@pytest.mark.parametrize("count", [12_000, 80_000, 200_000])
def test_many_boxes(count, groups):
    boxes, _ = clustered_boxes(count, seed=1, objects=300, spread=0.05)
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(1)).float()
    assert_as_on_cpu(boxes, scores, torch.arange(count) % groups if groups > 1 else None, 0.6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_groups_beside_small_ones(dtype):
    # One in rounds, some by a block each, the smallest of one box; 8,193 boxes are the fewest that are sorted.
    for count in (8192, 8193, 30_000):
        boxes, scores = clustered_boxes(count, seed=count, objects=300)
        groups = torch.randint(count, (count,), generator=torch.Generator().manual_seed(1))
        groups[: count // 2] = 0
        groups[count // 2 :][: count // 4] %= 7
        assert_as_on_cpu(boxes.to(dtype), scores, groups, 0.5)


@pytest.mark.parametrize("score_dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 16, 300])
def test_batches(batch, score_dtype):
    boxes, scores, groups = padded_example(batch, 400)
    assert_padded_as_on_cpu(boxes, scores.to(score_dtype), groups, 0.5, 100)


@pytest.mark.parametrize("max_output", [0, 1, 64, 100, 1000, 6000])
@pytest.mark.parametrize("groups", [1, 5])
def test_early_stop(groups, max_output):
    boxes, scores = clustered_boxes(2 * 12_000, seed=2, objects=500)
    labels = (torch.arange(24_000) % groups).view(2, 12_000)
    assert_padded_as_on_cpu(boxes.view(2, 12_000, 4), scores.view(2, 12_000), labels, 0.7, max_output)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_groups_without_rounds(dtype):
    boxes, scores = clustered_boxes(2 * 8000, seed=5, objects=300)
    boxes, scores = boxes.view(2, 8000, 4).to(dtype), scores.view(2, 8000)
    groups = (torch.arange(16_000) % 80).view(2, 8000)  # 100 boxes each
    expected = nms_padded(boxes, scores, groups, 0.5, 300)
    for largest_group in (100, 0):
        actual = nms_padded(*to_device((boxes, scores, groups)), 0.5, 300, largest_group)
        assert torch.equal(actual[0].cpu(), expected[0]) and torch.equal(actual[1].cpu(), expected[1])
    wrong = nms_padded(*to_device((boxes, scores, groups * 0)), 0.5, 300, 100)  # one group of 8,000: left out
    assert not wrong[1].any() and (wrong[0] == -1).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(shape):
    assert_padded_as_on_cpu(torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), 0.5, 3)


def test_strided_inputs():
    boxes, scores, groups = padded_example()
    table = torch.cat((boxes, scores[..., None]), 2).cuda().transpose(0, 1)
    view = table[..., :4].transpose(0, 1), table[..., 4].T, groups.cuda().repeat_interleave(2, 1)[:, ::2]
    actual = nms_padded(*view, 0.5, 200)
    assert torch.equal(actual[0].cpu(), nms_padded(boxes, scores, groups, 0.5, 200)[0])


def test_offsets_above_32_bits():
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free GPU memory")
    boxes, scores, groups = padded_example(3, 300)
    table = torch.empty(3, (1 << 28) + 7, 4, dtype=torch.float16, device="cuda")
    assert table.stride(0) * 2 > 1 << 31
    table[:, :300] = boxes.half()
    actual = nms_padded(table[:, :300], scores.cuda(), groups.cuda(), 0.5, 100)
    expected = nms_padded(boxes.half(), scores, groups, 0.5, 100)
    assert torch.equal(actual[0].cpu(), expected[0])


# ---------------------------------------------------------------------------------------------
# Streams, graphs, devices, memory


def test_a_thousand_repeats_are_equal():
    arguments = to_device(padded_example(2, 3000))
    first = nms_padded(*arguments, 0.5, 1000)[0]
    boxes, scores = (tensor.cuda() for tensor in clustered_boxes(6000, seed=3))
    alone = nms(boxes, scores, 0.7)
    for _ in range(1000):
        assert torch.equal(nms_padded(*arguments, 0.5, 1000)[0], first)
        assert torch.equal(nms(boxes, scores, 0.7), alone)


def test_a_hundred_repeats_of_many_boxes_are_equal():
    boxes, scores = (tensor.cuda() for tensor in clustered_boxes(40_000, seed=3, objects=300))
    for classes in (1, 3, 80):
        groups = torch.arange(40_000, device="cuda") % classes
        first = batched_nms(boxes, scores, groups, 0.7)
        assert all(torch.equal(batched_nms(boxes, scores, groups, 0.7), first) for _ in range(100))


@pytest.mark.parametrize("count", [100, 2000, 9000])
def test_padded_waits_for_nothing(count):
    arguments = to_device(padded_example(2, count))
    nms_padded(*arguments, 0.5, 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nms_padded(*arguments, 0.5, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [100, 2000, 9000])
def test_graph_replayed_with_other_inputs(count):
    # Capture fails if anything is read back, so this too shows that nothing is.
    arguments = to_device(padded_example(2, count))
    nms_padded(*arguments, 0.5, 300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, number = nms_padded(*arguments, 0.5, 300)
    for seed in range(5):
        example = padded_example(2, count, seed)
        for argument, new in zip(arguments, example, strict=True):
            argument.copy_(new)
        indices.fill_(-7)
        number.fill_(-7)
        graph.replay()
        expected = nms_padded(*example, 0.5, 300)
        assert torch.equal(indices.cpu(), expected[0]) and torch.equal(number.cpu(), expected[1])


def test_another_stream():
    example = padded_example(2, 3000)
    expected = nms_padded(*example, 0.5, 500)[0]
    stream = torch.cuda.Stream()
    for _ in range(20):
        arguments = to_device(example)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            moved = [arguments[0] + 0, arguments[1] + 0, arguments[2] + 0]  # on this stream, like what follows
            indices = nms_padded(*moved, 0.5, 500)[0]
            kept = nms(moved[0][0], moved[1][0], 0.5)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(indices.cpu(), expected)
        assert torch.equal(kept.cpu(), nms(example[0][0], example[1][0], 0.5))


@pytest.mark.parametrize("count", [3000, 20_000])
def test_two_streams_at_once(count):
    # Kernels whose blocks wait for each other must not wait for those of another kernel.
    examples = [padded_example(1, count, seed) for seed in range(2)]
    expected = [nms_padded(*example, 0.5, 500)[0] for example in examples]
    arguments = [to_device(example) for example in examples]
    streams = [torch.cuda.Stream() for _ in examples]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for given, stream in zip(arguments, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(nms_padded(*given, 0.5, 500)[0])
    torch.cuda.synchronize()
    for i, indices in enumerate(found):
        assert torch.equal(indices.cpu(), expected[i % 2])


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    example = padded_example()
    assert torch.cuda.current_device() == 0
    indices, _ = nms_padded(*to_device(example, "cuda:1"), 0.5, 200)
    assert indices.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(indices.cpu(), nms_padded(*example, 0.5, 200)[0])
    with pytest.raises(RuntimeError, match="scores must be on cuda:1"):
        torch.ops.doublehead.nms_padded(example[0].to("cuda:1"), *to_device(example[1:], "cuda:0"), 0.5, 200)


def test_memory_for_200_000_boxes():
    boxes, scores = (tensor.cuda() for tensor in clustered_boxes(200_000, seed=4, objects=300))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nms(boxes, scores, 0.7)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # a mask of all pairs would take 5 GB


# ---------------------------------------------------------------------------------------------
# Inside torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    boxes, scores, groups = to_device(padded_example(2, 60))
    operators = torch.ops.doublehead
    torch.library.opcheck(operators.nms_padded.default, (boxes.to(dtype), scores.to(dtype), groups, 0.5, 20))
    torch.library.opcheck(operators.nms_padded.default, (boxes[:, :0], scores[:, :0], groups[:, :0], 0.5, 20))
    torch.library.opcheck(operators.nms.default, (boxes[0].to(dtype), scores[0], None, 0.5))
    torch.library.opcheck(operators.nms.default, (boxes[0].to(dtype), scores[0], groups[0], 0.5))


def test_compiled():
    compiled = torch.compile(nms_padded, fullgraph=True)
    for seed in range(3):
        arguments = *to_device(padded_example(2, 300, seed)), 0.5, 100
        assert all(map(torch.equal, compiled(*arguments), nms_padded(*arguments)))
    compiled = torch.compile(lambda *a: batched_nms(*a) + 1, fullgraph=True, dynamic=True)
    for count in (60, 1, 0, 45):
        boxes, scores = (tensor.cuda() for tensor in clustered_boxes(count, count))
        arguments = boxes, scores, torch.arange(count, device="cuda") % 4, 0.5
        assert torch.equal(compiled(*arguments) - 1, batched_nms(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    boxes, scores, groups = to_device(padded_example(1, 400))
    with torch.autocast("cuda", dtype=dtype):
        actual = nms_padded(boxes, scores, groups, 0.5, 100)[0]
    assert torch.equal(actual, nms_padded(boxes, scores, groups, 0.5, 100)[0])


def test_kernel_reads_nothing_it_should_not():
    boxes, scores, groups = to_device(padded_example(2, 5))
    operator = torch.ops.doublehead.nms_padded
    for bad, message in (
        ((boxes[..., :3], scores, groups), "boxes must have size 4 in dimension 2"),
        ((boxes.long(), scores, groups), "boxes must be float32"),
        ((boxes, scores[:, :4], groups), "scores must have size 5 in dimension 1"),
        ((boxes, scores.long(), groups), "scores must be float32"),
        ((boxes, scores, groups.float()), "groups must be Long"),
        ((boxes, scores, groups[:1]), "groups must have size 2 in dimension 0"),
        ((boxes, scores.cpu(), groups), "scores must be on a CUDA device"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*bad, 0.5, 3)
    with pytest.raises(RuntimeError, match="max_output must be >= 0"):
        operator(boxes, scores, groups, 0.5, -1)
