"""ONNX files: standard operators alone, and the model's detections, by onnxruntime on the CPU."""

import dataclasses
import json

import pytest
import torch

from doublehead.config import Recipe
from doublehead.engine.errors import UserError
from doublehead.exporting import load, onnx_file, onnx_operators
from doublehead.exporting.description import describe
from doublehead.exporting.program import DetectorProgram, differences, example_input
from doublehead.models import ImageBatch, build_detector
from doublehead.ops import detections, multiscale_roi_align, nms_padded
from tests.support.detection_cases import OPTIONS, clear, tensors
from tests.support.tiny_detectors import lively, shallow, tiny

pytest.importorskip("onnxscript", reason="pip install 'doublehead[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'doublehead[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'doublehead[onnx]'")


def with_roi(config, **changes):
    return dataclasses.replace(config, roi=dataclasses.replace(config.roi, **changes))


def gated(config):
    return dataclasses.replace(config, detection=dataclasses.replace(config.detection, ext_gate=0.2))


def agnostic(config):
    return dataclasses.replace(config, head=dataclasses.replace(config.head, class_agnostic_boxes=True))


MODELS = {
    "fc": with_roi(tiny("fc"), aligned=True, sampling_ratio=0, level_rule="detectron2"),
    "double_head": agnostic(tiny("double_head")),
    "double_head_ext": gated(tiny("double_head_ext")),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_gives_its_detections(kind, tmp_path, monkeypatch):
    config = MODELS[kind]
    monkeypatch.setattr(onnx_file, "OPTIMIZE", kind == "double_head_ext")  # once: it takes long
    torch.manual_seed(0)
    model = build_detector(config, num_classes=4)
    lively(shallow(model.detector))
    program, example = DetectorProgram(model.detector, plain=True), example_input(2, 64, 96)
    note = describe("onnx", Recipe(name=kind, model=config), ["a", "b", "c"], [1, 2, 3], example[0].shape, "cpu")
    onnx_file.write_onnx(program, example, note, tmp_path / "a.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]  # weights inside

    detector = load(tmp_path / "a.onnx")
    assert detector.classes == ["a", "b", "c"] and detector.shape == (2, 64, 96)
    for seed in range(2):
        inputs = example_input(2, 64, 96, seed=seed)
        with torch.no_grad():
            expected = model.detector(ImageBatch(*inputs))
        found = detector(*inputs)
        assert found.count.min() > 10
        assert differences(found, expected) is None
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)

    written = onnx.load(tmp_path / "a.onnx")
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}
    assert [[dim.dim_value for dim in output.type.tensor_type.shape.dim] for output in written.graph.output] == [
        [2, 100, 4], [2, 100], [2, 100], [2],
    ]  # fmt: skip
    assert json.loads(written.metadata_props[0].value)["kind"] == "onnx"


class Function(torch.nn.Module):
    """A function of tensors, as the exporter wants it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def through_onnx(function, tensors, path, levels=3):
    """What onnxruntime makes of `function(*tensors)`."""
    with torch.no_grad():
        exported = torch.export.export(Function(function), tuple(tensors))
        exported = exported.run_decompositions(onnx_operators.decompositions(levels))
    torch.onnx.export(
        exported, opset_version=onnx_file.OPSET, dynamo=True, optimize=False, verbose=False,
        custom_translation_table=onnx_operators.translations(),
    ).save(path, external_data=False)  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    results = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
    return [torch.from_numpy(result) for result in results]


# ---------------------------------------------------------------------- RoIAlign

ROI_BOXES = torch.tensor(
    [
        [0, 3.0, 4, 20, 30],
        [1, 0, 0, 96, 64],  # the whole image
        [1, -30, -20, 10, 15],  # over the border
        [0, 70, 50, 140, 100],
        [0, 5, 5, 5.2, 5.1],  # under a pixel
        [1, 8, 8, 8, 8],  # without area
        [0, 20, 10, 20 + 56, 10 + 56],  # on the edge between two levels
        [1, float("nan"), 0, 10, 10],
        [0, 0, 0, float("inf"), 10],
        [0, 10, 10, 110, 40],
    ]
)


@pytest.mark.parametrize(
    ("aligned", "sampling_ratio", "level_rule", "levels"),
    [
        (False, 2, "torchvision", 3),
        (True, 0, "detectron2", 3),
        (False, 0, "mmdet", 3),
        (False, 2, "maskrcnn_benchmark", 1),
    ],
)
def test_roi_align(tmp_path, aligned, sampling_ratio, level_rule, levels):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 5, 32 >> level, 48 >> level, generator=generator) for level in range(levels)]

    def pool(rois, *features):
        return multiscale_roi_align(
            features, rois, (3, 4), spatial_scales=[0.5 / 2**level for level in range(levels)], aligned=aligned,
            sampling_ratio=sampling_ratio, level_rule=level_rule, box_scales=(1.0, 1.3), canonical_size=56,
            canonical_level=2,
        )  # fmt: skip

    rois = ROI_BOXES[:5] if sampling_ratio == 0 and aligned else ROI_BOXES
    rois = torch.cat((rois, ROI_BOXES[6:]))
    expected = pool(rois, *features)
    found = through_onnx(pool, (rois, *features), tmp_path / "a.onnx")
    assert expected[0].abs().amax((1, 2, 3)).count_nonzero() >= 7
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- NMS


def nms_inputs(number=60, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, number, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + 10 + torch.rand(images, number, 2, generator=generator) * 20), -1)
    scores = torch.randn(images, number, generator=generator)  # logits: negative ones too
    groups = torch.randint(-1, 3, (images, number), generator=generator)
    return boxes, scores, groups


@pytest.mark.parametrize("max_output", [5, 70])
def test_nms(tmp_path, max_output):
    boxes, scores, groups = nms_inputs()
    scores[:, ::7] = 0.25  # ties
    boxes[0, 3, 2:] = boxes[0, 3, :2]  # without area
    groups[1] = -1  # nothing exists

    def suppress(*tensors):
        return nms_padded(*tensors, 0.5, max_output)

    expected = suppress(boxes, scores, groups)
    assert 0 < expected[1][0] < 60 and expected[1][1] == 0
    found = through_onnx(suppress, (boxes, scores, groups), tmp_path / "a.onnx")
    torch.testing.assert_close(found, list(expected), rtol=0, atol=0)


# ---------------------------------------------------------------------- detections


@pytest.mark.parametrize(("heads", "max_detections"), [(2, 20), (1, 200)])
def test_detections(tmp_path, heads, max_detections):
    options = OPTIONS | {"max_detections": max_detections}
    inputs = next(inputs for seed in range(50) if clear(inputs := tensors(batch=3, seed=seed, heads=heads), options))
    logits, deltas, proposals, valid, sizes = inputs
    logits[0][0, 1] = logits[0][0, 2]  # ties
    logits[-1][0, 1] = logits[-1][0, 2]
    logits[0][1, 0, 2] = float("nan")
    deltas[1, 3, 1, 2] = float("inf")
    deltas[1, 4, 1, 0] = float("nan")
    proposals[2, 5, 0] = float("-inf")
    proposals[1, 6], valid[1, 6] = torch.tensor([0, 0, 3e38, 20]), True
    deltas[1, 6, :, 2] = 30.0  # so wide that it ends beyond the largest number

    def find(deltas, proposals, valid, sizes, *logits):
        return detections(logits, deltas, proposals, valid, sizes, **options)

    given = (deltas, proposals, valid, sizes, *logits)
    expected = find(*given)
    assert expected[3].min() > 4
    found = through_onnx(find, given, tmp_path / "a.onnx")
    assert torch.equal(found[3], expected[3]) and torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[:2], list(expected[:2]), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------- what cannot be written


def test_an_operator_without_a_form_is_named(tmp_path):
    from doublehead.ops import fuse_scores

    program = Function(lambda a, b: fuse_scores(a, b))
    program.detector = torch.nn.Module()
    program.detector.config = tiny("fc")
    with pytest.raises(UserError, match=r"doublehead\.fuse_scores\.default cannot be expressed in ONNX"):
        onnx_file.write_onnx(program, (torch.zeros(2, 3), torch.zeros(2, 3)), {}, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_onnx_file_is_refused(tmp_path):
    through_onnx(lambda x: x + 1, (torch.zeros(2),), tmp_path / "a.onnx")
    with pytest.raises(UserError, match="not a detector that `doublehead export` wrote"):
        load(tmp_path / "a.onnx")
