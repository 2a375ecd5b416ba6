"""CUDA graphs of the detector on the device itself: equal to eager, recorded once, nothing waits."""

import copy

import pytest
import torch

from doublehead.models import build_detector, graph
from tests.support.graph_cases import assert_same_but_borderline, padded, pictures
from tests.support.tiny_detectors import batch, lively, tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Eager and recorded convolutions run the same algorithm, without TF32: only a fault of the graph makes a gap."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision
    cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision = True, False, "ieee"
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision = before


@pytest.fixture(params=["fc", "double_head", "double_head_ext"])
def model(request):
    torch.manual_seed(0)
    model = build_detector(tiny(request.param), num_classes=4)
    lively(model.detector)
    return model.eval().cuda()


def run_core(model, images, dtype=None):
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        return model.detector(images)


def on_device(images):
    return type(images)(*(tensor.cuda() for tensor in images))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_equals_eager_on_the_padded_batch(model, dtype, channels_last):
    if channels_last:
        model.to(memory_format=torch.channels_last)
    model.compile_graph(3, 96, 128, dtype=dtype)
    (captured,) = model._graphs._buckets.values()
    for _ in range(2):
        images = on_device(batch())
        found = captured(images)
        buffers = graph.empty_batch(3, 96, 128, "cuda")
        graph.fill(buffers, images)
        expected = run_core(model, buffers, dtype)
        assert expected.count[:2].min() > 0
        assert torch.equal(found.count, expected.count[:2])
        # Algorithms may differ between two runs of a convolution; under bfloat16 that can swap neighbours.
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype is None else {"rtol": 0.05, "atol": 0.5}
        torch.testing.assert_close(found.scores, expected.scores[:2], rtol=tolerance["rtol"], atol=1e-2)
        if dtype is None:
            torch.testing.assert_close(found.boxes, expected.boxes[:2], **tolerance)
            assert torch.equal(found.labels, expected.labels[:2])


@torch.no_grad()
def test_nothing_waits_and_nothing_is_recorded_per_call(model, monkeypatch):
    model.compile_graph(2, 64, 96)
    images = on_device(batch())
    model._graphs(model.detector, images)
    monkeypatch.setattr(graph, "record", lambda *_: pytest.fail("recorded again"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model._graphs(model.detector, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_eager_does_not_wait_either(model):
    images = on_device(batch())
    run_core(model, images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_core(model, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_buckets_share_memory_and_do_not_disturb_each_other(model):
    shapes = ((1, 64, 96), (2, 96, 128), (1, 128, 128))
    for shape in shapes:
        model.compile_graph(*shape)
    pools = {captured.recording.pool for captured in model._graphs._buckets.values()}
    assert len(pools) == 1
    images = [pictures((64, 90)), pictures((64, 90), (60, 90)), pictures((90, 64))]
    first = [model(of_bucket) for of_bucket in images]
    for of_bucket, shape, found in zip(
        images[::-1], ((1, 128, 128), (2, 96, 128), (1, 64, 96)), first[::-1], strict=True
    ):
        again = model(of_bucket)
        torch.testing.assert_close(again, found)
        expected = run_core(model, padded_on_device(model, of_bucket, shape))
        assert_same_but_borderline([item["scores"].cpu() for item in found], expected, model.config.detection)


def padded_on_device(model, images, shape):
    cpu = copy.deepcopy(model).cpu()
    return on_device(padded(cpu, images, *shape))


@torch.no_grad()
def test_new_weights_are_seen(model):
    model.compile_graph(1, 64, 96)
    images = pictures((64, 90))
    before = model(images)
    for head in model.detector.heads.values():
        if head.classifier is not None:
            head.classifier.bias.add_(torch.tensor([0.0, 4.0, 0.0, 0.0], device="cuda"))
    after = model(images)
    assert not torch.equal(before[0]["scores"], after[0]["scores"])
    model.release_graphs()
    torch.testing.assert_close(after, model(images), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_folded_weights_survive_other_calls(model):
    """A call in another dtype folds weights anew; the old ones' memory must not be used by others."""
    model.compile_graph(1, 64, 96)
    images = pictures((64, 90))
    before = model(images)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        run_core(model, on_device(batch()), torch.bfloat16)
    garbage = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(64)]
    torch.testing.assert_close(model(images), before)
    del garbage


@torch.no_grad()
def test_moves_to_the_cpu_and_back(model):
    model.compile_graph(1, 64, 96)
    images = pictures((64, 90))
    before = model(images)
    model.cpu()
    model(images)
    model.cuda()
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_inference_mode_and_training(model):
    with torch.inference_mode():
        model.compile_graph(1, 64, 96)
        images = pictures((64, 90))
        before = model(images)
    allocated = torch.cuda.memory_allocated()
    model.train()
    assert torch.cuda.memory_allocated() < allocated
    torch.testing.assert_close(model.eval()(images), before, rtol=1e-4, atol=1e-3)
