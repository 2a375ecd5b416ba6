"""Files that doublehead 0.1.0 wrote still open, and give what they gave.

`write_files.py` wrote them and noted what they gave, with torch 2.14 on a processor with AVX2.  The results are not
compared bit by bit: PyTorch chooses its float32 convolutions by the processor, and these models, whose weights are
random, enlarge differences in rounding.  Between AVX2, SSE4.1, and convolutions without oneDNN, scores differed by
up to 1e-4 and boxes by up to 0.002 pixels; the same detections were found.
"""

import copy
import json
import lzma
from pathlib import Path

import pytest
import torch

from doublehead.config import from_dict, to_dict
from doublehead.engine.checkpoint import load_model
from doublehead.exporting import load
from doublehead.exporting.program import example_input
from doublehead.ops import multiscale_roi_align
from doublehead.recipes import RECIPES
from doublehead.train import main as train

DATA = Path(__file__).parent / "data"
SCORES, BOXES = 3e-4, 5e-3
"""Largest differences; boxes are in pixels."""


def unpack(name, folder):
    path = folder / Path(name).name
    path.write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return path


def read(name):
    return json.loads(lzma.decompress((DATA / f"{name}.xz").read_bytes()))


def pictures():
    """The pictures of `write_files.py`."""
    images = []
    for i in range(2):
        state, values = 12345 + i, []
        for _ in range(3 * 8 * 10):
            state = (1103515245 * state + 12345) % 2**31
            values.append(state >> 23)
        coarse = torch.tensor(values, dtype=torch.uint8).view(3, 8, 10)
        images.append(coarse.repeat_interleave(9, 1).repeat_interleave(9 + i, 2))
    return images


def assert_same(found, expected):
    """Detections of one image, in any order: scores may be nearly equal."""
    labels, scores, boxes = (torch.as_tensor(expected[name]) for name in ("labels", "scores", "boxes"))
    assert len(found["labels"]) == len(labels) > 8
    same = found["labels"][:, None] == labels
    same &= (found["scores"][:, None] - scores).abs() <= SCORES
    same &= (found["boxes"][:, None] - boxes).abs().amax(-1) <= BOXES
    assert same.any(0).all() and same.any(1).all(), f"missing: {labels[~same.any(0)]}, {scores[~same.any(0)]}"


def test_recipes_are_read_and_are_the_same():
    recipes = read("recipes.json")
    assert len(recipes) > 40
    for name, values in recipes.items():
        assert from_dict(values) == RECIPES[name]
        assert _part_of(json.loads(json.dumps(to_dict(RECIPES[name]))), values) == values  # fields may be added


def _part_of(now, before):
    """`now` without the fields that `before` does not have."""
    return {key: _part_of(now[key], before[key]) for key in before} if isinstance(before, dict) else now


@pytest.mark.parametrize("name", ["ext", "legacy", "c4"])
def test_a_model_detects_what_it_did(name, tmp_path):
    model, recipe, classes, category_ids = load_model(unpack(f"{name}.safetensors", tmp_path))
    assert recipe.name == name and classes == ["cat", "dog", "bird"] and category_ids == [3, 5, 8]
    expected = read("detections.json")
    with torch.inference_mode():
        for found, image in zip(model(pictures()), expected[name], strict=True):
            assert_same(found, image)
        if name == "ext":
            for readout, images in expected["ext-readouts"].items():
                model.set_readout(*readout.split(), 0.0)
                for found, image in zip(model(pictures()), images, strict=True):
                    assert_same(found, image)


def test_a_model_that_was_pickled_whole_detects_what_it_did(tmp_path):
    model = torch.load(unpack("legacy-whole.pt", tmp_path), weights_only=False)
    with torch.inference_mode():
        for found, image in zip(copy.deepcopy(model)(pictures()), read("detections.json")["legacy"], strict=True):
            assert_same(found, image)


def in_batch(outputs):
    """The detections of each image of a padded batch."""
    boxes, scores, labels, count = (torch.as_tensor(output) for output in outputs)
    return [
        {"boxes": boxes[i, :n], "scores": scores[i, :n], "labels": labels[i, :n]} for i, n in enumerate(count.tolist())
    ]


def test_an_exported_program_runs(tmp_path):
    program = torch.export.load(unpack("ext.pt2", tmp_path)).module()
    with torch.no_grad():
        found = program(*example_input(2, 64, 96))
    for image, expected in zip(in_batch(found), in_batch(read("programs.json")["ext.pt2"]), strict=True):
        assert_same(image, expected)


def test_exported_operators_give_what_they_gave(tmp_path):
    exported = torch.export.load(unpack("operators.pt2", tmp_path))
    with torch.no_grad():
        found = exported.module()(*exported.example_inputs[0])
    expected = read("programs.json")["operators.pt2"]
    assert len(found) == len(expected) > 30
    for number, (output, values) in enumerate(zip(found, expected, strict=True)):
        wanted = torch.tensor(values, dtype=output.dtype)
        torch.testing.assert_close(output, wanted, rtol=2e-6, atol=2e-6, msg=lambda text, n=number: f"{n}: {text}")


def border_boxes():
    """The boxes of `write_files.py`: squares with sides at and next to the borders between levels."""
    steps = torch.tensor([-64.0, -32, -16, -12, -8, -4, -2, -1, 0, 1, 2, 4, 8, 12, 16, 32, 64], dtype=torch.float64)
    sides = torch.tensor([112.0, 224, 448], dtype=torch.float64)[:, None] * (1 + steps * 2**-23)
    sides = torch.cat([sides.flatten(), sides.flatten() - 1, sides.flatten() + 1]).float()
    zeros = torch.zeros_like(sides)
    return torch.stack([zeros, zeros, zeros, sides, sides], 1)


@pytest.mark.parametrize("rule", range(4))
def test_a_level_rule_draws_its_borders_where_it_did(rule):
    """By the number that exported programs hold, and by the name that recipes hold."""
    features = [torch.full((1, 1, 256 >> level, 256 >> level), float(level)) for level in range(4)]
    scales, boxes = [1 / 4, 1 / 8, 1 / 16, 1 / 32], border_boxes()
    by_number = torch.ops.doublehead.multiscale_roi_align(
        features, boxes, scales, [1.0], [1, 1], 1, False, 224.0, 4, rule
    )[0]
    name = ("torchvision", "detectron2", "mmdet", "maskrcnn_benchmark")[rule]
    (by_name,) = multiscale_roi_align(
        features, boxes, (1, 1), spatial_scales=scales, sampling_ratio=1, aligned=False, level_rule=name
    )
    expected = json.loads((DATA / "levels.json").read_text())[rule]
    assert by_number.flatten().tolist() == by_name.flatten().tolist() == expected and len(set(expected)) == 4


def test_an_onnx_file_runs(tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'doublehead[onnx]'")
    detector = load(unpack("ext.onnx", tmp_path))
    assert detector.classes == ["cat", "dog", "bird"] and detector.shape == (2, 64, 96)
    found = detector(*example_input(2, 64, 96, seed=9))
    for image, expected in zip(in_batch(found), in_batch(read("programs.json")["ext.onnx"]), strict=True):
        assert_same(image, expected)


def test_a_stopped_run_is_resumed(tmp_path, monkeypatch, capsys):
    """It was stopped after two of four steps; another one, from the same start, was not."""
    for name in ("model.safetensors", "state.pt"):
        unpack(f"run/{name}", tmp_path)
    for name in ("recipe.json", "log.jsonl"):
        (tmp_path / name).write_bytes((DATA / "run" / name).read_bytes())
    train(["--resume", str(tmp_path)])
    assert "steps    2 -> 4 x 2 images" in capsys.readouterr().out
    log, expected = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "log.jsonl", DATA / "run" / "log-of-the-whole.jsonl")
    )
    assert [record["step"] for record in log] == [record["step"] for record in expected] == [1, 2, 3, 4, 4]
    for record, wanted in zip(log, expected, strict=True):
        for name in wanted.keys() - {"time", "images_per_second"}:
            value = wanted[name]
            assert record[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-7)), name
    assert load_model(tmp_path).recipe.train.steps == 4 and (tmp_path / "metrics.json").exists()
