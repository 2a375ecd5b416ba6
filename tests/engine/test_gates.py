"""Gates of Ext, measured in one pass and chosen; the file that keeps the choice."""

import copy
import json

import pytest
import torch

from doublehead.data.shapes import ShapesDataset
from doublehead.engine import gates
from doublehead.engine.checkpoint import load_model
from doublehead.engine.evaluator import evaluate, inference
from doublehead.engine.gate_file import find_gate, gate_path, read_gate, set_gate, write_gate
from doublehead.engine.gates import GateCurve, GatePoint, format_curve, measure_gates
from doublehead.engine.sealed import read_sealed, write_sealed
from doublehead.errors import CheckpointError, UserError
from tests.support.analysis_detector import SIDE, save_detector
from tests.support.gates import own_findings

TRIED = (0.2, 0.25, 0.3, 0.4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("runs") / "ext")


@pytest.fixture(scope="module")
def original(run):
    return load_model(run).model


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def dataset(original):
    images = ShapesDataset("val", 5, SIDE)
    images.annotations = own_findings(original, images)
    return images


def curve(*losses: float) -> GateCurve:
    points = [GatePoint((number + 1) / 10, 0.5, 0.5 - loss / 100, loss) for number, loss in enumerate(losses)]
    return GateCurve(9, [GatePoint(0.0, 1.0, 0.5, 0.0), *points])


@pytest.mark.parametrize(
    "losses, gate",
    [
        ((0.0, 0.05, 0.3), 0.2),
        ((0.0, 0.3, 0.05, 0.0), 0.1),  # back within the bound, by chance
        ((-0.2, 0.1, 0.11), 0.2),  # a gain, and the bound itself
        ((0.0, 0.0), 0.2),
    ],
)
def test_the_chosen_gate_is_the_last_before_the_first_loss(losses, gate):
    assert curve(*losses).largest(0.1).gate == gate


def test_no_gate_is_chosen_where_the_smallest_loses_too_much():
    assert curve(0.2, 0.0).largest(0.1) is None


def test_the_table_marks_the_chosen_gate():
    lines = format_curve(curve(-0.001, 0.3), 0.1).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["none", "100.0", "%", "50.00", "0.00"],
        ["0.1", "50.0", "%", "50.00", "0.00", "*"],
        ["0.2", "50.0", "%", "49.70", "0.30"],
    ]


def test_one_pass_measures_what_runs_with_each_gate_do(model, dataset):
    readout = model.detector.readout
    (measured,) = measure_gates(model, dataset, readout, TRIED)
    assert measured.images == 5 and [point.gate for point in measured.points] == [0.0, *TRIED]
    assert model.detector.readout is readout
    for point in measured.points:
        model.set_readout("fused", ext_gate=point.gate)
        alone, _ = evaluate(model, dataset)
        assert point.survivors == alone["box_rois"]["share"]
        assert point.ap == pytest.approx(alone["AP"], abs=1e-6)
        assert point.loss == pytest.approx(100 * (measured.points[0].ap - point.ap))
    survivors = [point.survivors for point in measured.points]
    assert survivors[0] == 1 and 0 < survivors[2] < 1 and survivors == sorted(survivors, reverse=True)
    assert measured.points[0].ap > 0.5 and measured.points[-1].loss > 1


def test_detections_of_a_gate_are_those_of_a_run_with_it(model, dataset):
    image = dataset.load(0)[0]
    with inference(model):
        each = model.detect_gates([image], model.detector.readout, (0.0, 0.25))
        for gate, (found,) in zip((0.0, 0.25), each, strict=True):
            model.set_readout("fused", ext_gate=gate)
            (alone,) = model([image])
            assert len(found["scores"]) and found["labels"].equal(alone["labels"])
            for name in ("boxes", "scores"):
                torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-4)


def test_the_heads_run_once_for_all_gates(model, dataset):
    calls = []
    for head in model.detector.heads.values():
        head.register_forward_hook(lambda *_: calls.append(1))
    measure_gates(model, dataset, model.detector.readout, TRIED)
    assert len(calls) == 2 * len(dataset)


def test_held_out_images_are_the_second_half(model, dataset, run):
    (whole,) = measure_gates(model, dataset, model.detector.readout, TRIED)
    first, second = measure_gates(model, dataset, model.detector.readout, TRIED, held_out=True)
    assert (first.images, second.images) == (3, 2)
    begin = ShapesDataset("val", 3, SIDE)
    begin.annotations = lambda: [entry for entry in dataset.annotations() if entry["image_id"] <= 3]
    (alone,) = measure_gates(model, begin, model.detector.readout, TRIED)
    assert first == alone != whole and second.points != first.points
    kept = (3 * first.points[2].survivors + 2 * second.points[2].survivors) / 5  # 40 RoIs in every image
    assert kept == pytest.approx(whole.points[2].survivors)


def test_images_without_anything_to_keep_are_refused(model, dataset):
    empty = ShapesDataset("val", 2, SIDE)
    empty.annotations = lambda: []
    with pytest.raises(UserError, match="has no object to find, so no AP can be measured: give images with boxes"):
        measure_gates(model, empty, model.detector.readout, TRIED)
    half = ShapesDataset("val", 2, SIDE)
    half.annotations = lambda: [entry for entry in dataset.annotations() if entry["image_id"] == 1]
    with pytest.raises(UserError, match=r"the second half of shapes \(val\) \(1 images\) has no object to find: leave"):
        measure_gates(model, half, model.detector.readout, TRIED, held_out=True)
    elsewhere = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 1.0, 1.0], "area": 1.0, "iscrowd": 0}
    empty.annotations = lambda: [elsewhere]
    with pytest.raises(UserError, match="the detector has AP 0 without a gate: there is none to keep"):
        measure_gates(model, empty, model.detector.readout, TRIED)


# ---------------------------------------------------------------------- the file


@pytest.fixture
def kept(tmp_path, run, model):
    """A copy of the run, with a gate."""
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    measured = curve(0.0, 0.05)
    point = measured.points[2]
    write_gate(folder / "gate.json", model, model.detector.readout, point, [measured], 0.1, "shapes (val)", {})
    return folder


def test_the_file_gives_the_gate_back(kept, model):
    content = read_gate(kept, model)
    assert content["gate"] == 0.2 and content["loss"] == 0.05 and content["images"] == 9
    assert content["AP"] == {"without": 0.5, "with": 0.4995} and content["held_out"] is None
    assert find_gate(kept, model, "calibrated") == find_gate(kept / "model.safetensors", model, "calibrated") == 0.2
    assert find_gate(kept, model, 0.7) == 0.7 and find_gate(kept, model, None) is None
    set_gate(kept, model, "calibrated")
    assert model.detector.readout.gated and model.detector.readout.detection.ext_gate == 0.2


def test_checkpoints_of_one_run_have_gates_of_their_own(kept):
    (kept / "best.safetensors").write_bytes((kept / "model.safetensors").read_bytes())
    assert gate_path(kept) == gate_path(kept / "model.safetensors") == kept / "gate.json"
    assert gate_path(kept / "best.safetensors") == kept / "best.gate.json"


def test_a_file_that_does_not_belong_is_refused(kept, model, tmp_path):
    path = kept / "gate.json"
    text = path.read_text()
    for changed, message in (
        (text.replace('"gate": 0.2', '"gate": 0.3'), "edited or damaged since it was written"),
        (text.replace('"images": 9', '"images": 10'), "edited or damaged since it was written"),
        (text[:-20], r"not a file of doublehead, or damaged \(Unterminated"),
        ("[1, 2]", "it names no format"),
        (text.replace("gate/1", "gate/2"), "its format is 'doublehead.gate/2', this version reads"),
    ):
        path.write_text(changed)
        with pytest.raises(CheckpointError, match=message) as raised:
            find_gate(kept, model, "calibrated")
        assert str(raised.value).endswith(f"make it again: doublehead calibrate {kept} --overwrite")
    path.write_text(json.dumps(json.loads(text)))  # other white space
    assert find_gate(kept, model, "calibrated") == 0.2
    model.detector.heads["conv"].classifier.bias.data += 1
    with pytest.raises(CheckpointError, match="calibrated for other weights than those of"):
        find_gate(kept, model, "calibrated")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"gate.json: no such file; make it: doublehead calibrate {kept}$"):
        find_gate(kept, model, "calibrated")


def test_a_gate_of_the_right_checksum_and_no_sense_is_refused(kept, model):
    path = kept / "gate.json"
    content = read_sealed(path, "doublehead.gate/1", "")
    for change, message in (({"gate": 1.5}, "above 0 and below 1, got 1.5"), ({"AP": 3}, "AP: expected a dictionary")):
        write_sealed(path, content.pop("format", "doublehead.gate/1"), content | change)
        with pytest.raises(CheckpointError, match=message):
            read_gate(kept, model)


def test_a_gate_is_for_what_it_was_measured_with(kept, model):
    with pytest.raises(UserError, match="measured with detection.fusion 'complementary', not 'max'"):
        find_gate(kept, model, "calibrated", "fused", "max")
    with pytest.raises(
        UserError, match="a gate is for the read-out 'fused' with two classifiers, not for read-out 'fc'"
    ):
        find_gate(kept, model, "calibrated", "fc")
    with pytest.raises(UserError, match="not for fusion 'none'"):
        find_gate(kept, model, "calibrated", "fused", "none")


def test_gates_that_do_nothing_and_numbers_that_are_none_are_refused(tmp_path, model, run):
    plain = load_model(save_detector(tmp_path / "plain", "double_head")).model
    for asked in (0.2, "calibrated"):
        with pytest.raises(UserError, match="its head is 'double_head', and a gate is for 'double_head_ext'; it skips"):
            set_gate(tmp_path / "plain", plain, asked)
    set_gate(tmp_path / "plain", plain, 0)
    for asked in ("yes", True, [1]):
        with pytest.raises(UserError, match="a score from 0 .no gate. to below 1, or 'calibrated', is accepted"):
            set_gate(run, model, asked)
    with pytest.raises(UserError, match="expected 0 .off. or a score below 1, got 2"):
        set_gate(run, model, 2)
    model.set_readout("split")
    with pytest.raises(UserError, match="not for read-out 'split'"):
        set_gate(run, model, 0.2)


def test_the_tried_gates_are_in_order():
    assert list(gates.GATES) == sorted(set(gates.GATES)) and 0 < gates.GATES[0] and gates.GATES[-1] < 1
