"""CUDA graphs of the detector: choice of the bucket, padding, and when a recording is stale.

A stand-in takes the place of the recording: its replay runs the detector into the recording's outputs.  What only a
device shows is in test_graph_gpu.py.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from doublehead.config import DetectionConfig
from doublehead.models import Detections, ImageBatch, build_detector, graph
from doublehead.ops._library import warn_fallback
from tests.support.graph_cases import assert_same_but_borderline, padded, pictures
from tests.support.tiny_detectors import lively, tiny


class Recorder:
    """Stands in for `graph.record`; counts what it records and replays."""

    def __init__(self):
        self.pools, self.replays = [], 0

    def __call__(self, run, device, pool=None):
        outputs = Detections(*(value.clone() for value in run()))

        def replay():
            self.replays += 1
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        self.pools.append(pool)
        return graph.Recording(outputs, replay, pool=f"pool {len(self.pools)}" if pool is None else pool)

    @property
    def recordings(self):
        return len(self.pools)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graph, "record", recorder)
    monkeypatch.setattr(graph, "CAPTURING_DEVICES", ("cpu",))
    return recorder


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = build_detector(tiny("double_head_ext"), num_classes=4)
    lively(model.detector)
    return model.eval()


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def test_only_borderline_detections_may_differ():
    options = DetectionConfig(score_threshold=0.05)
    scores = torch.tensor([[0.9, 0.5, 0.05001]])
    expected = Detections(None, scores, None, torch.tensor([3]))
    for same in ([0.9, 0.5, 0.05001], [0.9, 0.5], [0.9, 0.5, 0.05002, 0.05001]):
        assert_same_but_borderline([torch.tensor(same)], expected, options)
    for other in ([0.9, 0.05001], [0.9, 0.51, 0.05001], [0.9, 0.5, 0.06], []):
        with pytest.raises(AssertionError):
            assert_same_but_borderline([torch.tensor(other)], expected, options)


@torch.no_grad()
def test_equals_the_core_on_the_padded_batch(model, recorder):
    images = pictures((64, 80), (60, 64))
    model.compile_graph(3, 96, 128)
    for _ in range(2):
        found = model(images)
    assert (recorder.recordings, recorder.replays) == (1, 2)
    expected = model.detector(padded(model, images, 3, 96, 128))
    assert expected.count[:2].min() > 0 and expected.count[2] == 0
    _, after = model.transform(images)
    before = [(64, 80), (60, 64)]
    expected = model.transform.detections(Detections(*(value[:2] for value in expected)), before, after)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
def test_an_exact_fit_equals_eager(model, recorder):
    images = pictures((64, 96))
    expected = model(images)
    model.compile_graph(1, 64, 96)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert recorder.replays == 1


def test_padding_is_cleared():
    buffers = graph.empty_batch(2, 64, 64, "cpu")
    graph.fill(buffers, ImageBatch(torch.ones(2, 3, 64, 64), torch.full((2, 2), 64.0)))
    graph.fill(buffers, ImageBatch(torch.full((1, 3, 32, 64), 2.0), torch.tensor([[30.0, 60.0]])))
    assert buffers.pixels[0, :, :32].eq(2).all() and buffers.pixels[0, :, 32:].eq(0).all()
    assert buffers.pixels[1].eq(0).all() and buffers.sizes.tolist() == [[30, 60], [0, 0]]


@torch.no_grad()
def test_the_smallest_bucket_is_taken_and_else_eager(model, recorder):
    for bucket in ((2, 128, 128), (1, 96, 96), (1, 64, 96)):
        model.compile_graph(*bucket)
    taken = []
    for bucket, captured in model._graphs._buckets.items():
        captured.recording.replay = lambda bucket=bucket: taken.append(bucket[:3])
    for images in (pictures((64, 80)), pictures((80, 64)), pictures((64, 80), (80, 64))):
        model(images)
    assert taken == [(1, 64, 96), (1, 96, 96), (2, 128, 128)]
    expected = model(pictures((64, 64), (64, 64), (64, 64)))  # three fit nowhere
    assert len(taken) == 3 and all(len(found["boxes"]) for found in expected)


@torch.no_grad()
def test_results_are_not_overwritten(model, recorder):
    model.compile_graph(1, 64, 96)
    first = model(pictures((64, 96)))
    kept = copy.deepcopy(first)
    model([1 - image for image in pictures((64, 96))])
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_all_graphs_of_a_device_share_the_memory(model, recorder):
    model.compile_graph(1, 64, 96)
    model.compile_graph(2, 64, 96)
    assert recorder.pools == [None, "pool 1"]


CHANGES = {
    "weights": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "assigned weights": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "one weight": lambda model: model.detector.rpn.conv.bias.add_(1.0),
    "a buffer": lambda model: model.detector.backbone.body.bn1.running_mean.mul_(2),
    "a new tensor": lambda model: setattr(
        model.detector.rpn.conv, "bias", torch.nn.Parameter(model.detector.rpn.conv.bias + 1)
    ),
    "other memory": lambda model: setattr(model.detector.rpn.conv.bias, "data", model.detector.rpn.conv.bias.data + 1),
    "a submodule": lambda model: setattr(model.detector.rpn, "conv", copy.deepcopy(model.detector.rpn.conv)),
    "read-out": lambda model: model.set_readout("fc"),
    "training": lambda model: model.train().eval(),
    "moved": lambda model: model.to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_recorded_anew(model, recorder, change):
    images = pictures((64, 96))
    model.compile_graph(1, 64, 96)
    model(images)
    CHANGES[change](model)
    found = model(images)
    assert recorder.recordings == 2
    model.release_graphs()
    torch.testing.assert_close(found, model(images), rtol=0, atol=0)
    assert (recorder.recordings, recorder.replays) == (2, 2)


@torch.no_grad()
def test_nothing_is_recorded_without_a_change(model, recorder):
    model.compile_graph(1, 64, 96)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            model(pictures((64, 96)))
            model.detector(model.transform(pictures((64, 64), (64, 96)))[0])  # folds its weights anew
    model.eval()
    model.state_dict()
    model(pictures((64, 96)))
    assert recorder.recordings == 1


@torch.no_grad()
def test_folded_weights_live_as_long_as_the_graph(model, recorder):
    model.compile_graph(1, 64, 96)
    tower = model.detector.heads["conv"].tower
    folded = [weakref.ref(tensor) for tensor in tower.held_tensors()]
    tower.train().eval()
    assert tower.held_tensors() == [] and folded and all(tensor() is not None for tensor in folded)
    model.release_graphs()
    gc.collect()  # the stand-in's recording refers to itself
    assert all(tensor() is None for tensor in folded)


@torch.no_grad()
def test_a_submodule_in_training_mode_runs_eagerly(model, recorder):
    model.compile_graph(1, 64, 96)
    model.detector.rpn.train()
    model(pictures((64, 96)))
    assert recorder.replays == 0


def test_gradients_run_eagerly(model, recorder):
    model.compile_graph(1, 64, 96)
    model(pictures((64, 96)))
    assert recorder.replays == 0
    with torch.inference_mode():
        model(pictures((64, 96)))
    assert recorder.replays == 1


def test_precision(model, recorder):
    images = pictures((64, 96))
    with torch.no_grad():
        model.compile_graph(1, 64, 96, dtype=torch.bfloat16)
        found = model(images)
        batch = padded(model, images, 1, 64, 96)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model.detector(batch)
        torch.testing.assert_close(found[0]["scores"], expected.scores[0, : expected.count[0]], rtol=0, atol=0)
        assert not torch.equal(expected.scores, model.detector(batch).scores)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.compile_graph(1, 64, 96, dtype=torch.float32)  # in place of the other
            model.compile_graph(2, 64, 96)
        assert [bucket.dtype for bucket in model._graphs.buckets] == [None, torch.bfloat16]


def test_copies_and_pickles_have_no_graphs(original, model, recorder):
    model.compile_graph(1, 64, 96)
    names = set(model.state_dict())
    assert names == set(original.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._graphs.buckets == []
        with torch.no_grad():
            torch.testing.assert_close(other(pictures((64, 96))), model(pictures((64, 96))))
    assert recorder.replays == 2


def test_training_gives_the_memory_back(model, recorder):
    model.compile_graph(1, 64, 96)
    model.train()
    assert list(model._graphs._buckets.values()) == [None]


@torch.no_grad()
def test_without_a_capturing_device_it_runs_eagerly(model, monkeypatch):
    monkeypatch.setattr(graph, "record", lambda *_: pytest.fail("recorded on a device that cannot"))
    expected = model(pictures((64, 96)))
    with pytest.warns(RuntimeWarning, match="the model is on cpu, and graphs need CUDA"):
        model.compile_graph(1, 64, 96)
    torch.testing.assert_close(model(pictures((64, 96))), expected, rtol=0, atol=0)


@torch.no_grad()
def test_recorded_at_the_first_call_on_a_capturing_device(model, recorder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(graph, "CAPTURING_DEVICES", ())
        with pytest.warns(RuntimeWarning):
            model.compile_graph(1, 64, 96)
    assert recorder.recordings == 0
    model(pictures((64, 96)))
    assert (recorder.recordings, recorder.replays) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 64, 64), "batch: expected at least 1 image, got 0"),
        ((1, 50, 64), "height: expected a multiple of image.size_divisible = 32, got 50"),
        ((1, 64, 0), "width: expected a multiple of image.size_divisible = 32, got 0"),
        ((1, 64, 64, torch.int8), "dtype: expected torch.float16"),
    ],
)
def test_wrong_arguments(model, recorder, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.compile_graph(*arguments)


def test_weights_without_versions_are_refused(recorder):
    with torch.inference_mode():
        model = build_detector(tiny("fc"), num_classes=4).eval()
    with pytest.raises(ValueError, match=r"\.weight was made in inference mode"):
        model.compile_graph(1, 64, 64)


def test_training_mode_is_refused(model, recorder):
    with pytest.raises(RuntimeError, match="model.eval"):
        model.train().compile_graph(1, 64, 64)


class FakeCuda:
    """The parts of `torch.cuda` that recording uses; what is run inside a graph raises, as reading a value would."""

    def __init__(self, monkeypatch):
        self.capturing = False
        names = ("device", "stream", "Stream", "current_stream", "synchronize", "CUDAGraph", "graph")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name, self._nothing))

    def _nothing(self, *_, **__):
        return self

    wait_stream = __enter__ = _nothing

    def __exit__(self, *_):
        self.capturing = False

    def graph(self, *_, **__):
        self.capturing = True
        return self


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(graph, "why_reference", lambda name: None)
    return FakeCuda(monkeypatch)


def test_the_error_names_the_operators_that_cannot_be_recorded(cuda, recwarn):
    warn_fallback("fuse_scores", "no C compiler")  # warned of before: named all the same

    def run():
        warn_fallback("fuse_scores", "no C compiler")
        warn_fallback("detections", "GPU 0 is sm_75")
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="cannot record a graph") as caught:
        graph.record(run, torch.device("cuda", 0))
    assert str(caught.value).splitlines()[1:] == ["fuse_scores: no C compiler", "detections: GPU 0 is sm_75"]
    assert "capturing" in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [RuntimeError("something else"), torch.OutOfMemoryError("CUDA out of memory")])
def test_other_errors_while_recording_stay(cuda, error, recwarn):
    def run():
        if isinstance(error, torch.OutOfMemoryError):
            warn_fallback("detections", "GPU 0 is sm_75")
        if cuda.capturing:
            raise error

    with pytest.raises(type(error)) as caught:
        graph.record(run, torch.device("cuda", 0))
    assert caught.value is error


def test_without_the_cuda_part_nothing_is_recorded(cuda, monkeypatch):
    monkeypatch.setattr(graph, "why_reference", lambda name: "_C_cuda is not loaded: it is not built")
    with pytest.raises(RuntimeError, match="pyramid_roi_align: _C_cuda is not loaded: it is not built"):
        graph.record(lambda: pytest.fail("called"), torch.device("cuda", 0))
