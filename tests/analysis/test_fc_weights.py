"""`doublehead analyze fc-weights`: the correlations are numpy's, cell by cell."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.analysis.cell_maps import by_distance, mean_of_pairs, pair_limits, pair_rows, tiled
from doublehead.analysis.fc_weights import fc_heads, weight_correlation
from doublehead.cli.analyze import main
from doublehead.engine import checkpoint
from tests.support.analysis_commands import CLASSES, failure, saved
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_correlation_is_numpys():
    weight = torch.randn(5, 4, 3, 3, generator=torch.manual_seed(0))
    weight[:, :, 0, 1] = 0.5 * weight[:, :, 0, 0] + 0.1
    blocks = weight.double().numpy().transpose(2, 3, 0, 1).reshape(9, -1)
    found = weight_correlation(weight)
    np.testing.assert_allclose(found, np.corrcoef(blocks), atol=1e-12)
    assert found[0, 1] == pytest.approx(1)


def test_a_cell_of_equal_weights_is_a_gap():
    weight = torch.randn(5, 4, 2, 2, generator=torch.manual_seed(0))
    weight[:, :, 1, 0] = 0.1
    found = weight_correlation(weight)
    assert np.isnan(found[2]).all() and np.isnan(found[:, 2]).all() and np.isnan(found).sum() == 7


def test_means_limits_and_distances_by_brute_force():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(9, 9))
    matrix[3, 7] = np.nan
    cells = [(row, column) for row in range(3) for column in range(3)]
    pairs = {(a, b): matrix[i, j] for i, a in enumerate(cells) for j, b in enumerate(cells) if i != j}
    known = {pair: value for pair, value in pairs.items() if value == value}
    assert mean_of_pairs(matrix) == pytest.approx(np.mean(list(known.values())))
    assert pair_limits([matrix]) == (min(known.values()), max(known.values()))
    groups = {}
    for ((y, x), (v, u)), value in known.items():
        groups.setdefault((y - v) ** 2 + (x - u) ** 2, []).append(value)
    expected = [(square**0.5, len(values), np.mean(values)) for square, values in sorted(groups.items())]
    np.testing.assert_allclose(by_distance(matrix), expected)
    rows = {row[:4]: row[4] for row in pair_rows(matrix)}
    assert len(rows) == 81 and rows[1, 2, 3, 1] == matrix[1, 6]


def test_a_map_lies_in_its_cells_place():
    matrix = np.arange(81.0).reshape(9, 9)
    image = tiled(matrix)
    assert image.shape == (11, 11)
    for cell in range(9):
        row, column = divmod(cell, 3)
        tile = image[4 * row : 4 * row + 3, 4 * column : 4 * column + 3]
        assert (tile == matrix[cell].reshape(3, 3)).all()
    assert np.isnan(image[3]).all() and np.isnan(image[:, 7]).all()


def test_every_fc_head_is_written_and_drawn(tmp_path, capsys):
    models = {kind: saved(tmp_path / kind, kind) for kind in ("double_head", "double_fc")}
    out = tmp_path / "out"
    main(["fc-weights", f"a={tmp_path / 'double_head'}", str(tmp_path / "double_fc"), "--out", str(out)])
    rows = table(out / "fc-weights.csv")
    assert list(dict.fromkeys(row["head"] for row in rows)) == ["a, fc", "double_fc, fc_1", "double_fc, fc_2"]
    assert len(rows) == 3 * 81
    weight = models["double_fc"].detector.heads["fc_2"].tower[1].weight.detach().double().numpy()
    cells = weight.reshape(8, 64, 9).transpose(2, 0, 1).reshape(9, -1)
    place = {"head": "double_fc, fc_2", "row": "1", "column": "3", "other_row": "2", "other_column": "2"}
    (value,) = [float(row["correlation"]) for row in rows if place.items() <= row.items()]
    assert value == pytest.approx(np.corrcoef(cells)[2, 4])
    assert {row["distance"] for row in table(out / "fc-weights-distance.csv")} >= {"1.0", "2.0"}
    assert min(Image.open(out / "fc-weights.png").size) > 500
    assert "double_fc, fc_1: mean correlation of two cells" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = ["fc-weights", str(tmp_path / "double_head"), "--out", str(out)]
    said = failure(again, capsys)
    assert "holds fc-weights.csv: give another folder, or --overwrite to replace it" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    main([*again, "--overwrite"])
    assert len(table(out / "fc-weights.csv")) == 81


def test_a_gap_is_said_and_left_empty(tmp_path, capsys):
    detector = saved(tmp_path / "run", "fc")
    with torch.no_grad():
        fc_heads(detector)["fc"][:, :, 1, 1] = 0
    recipe = checkpoint.load_model(tmp_path / "run").recipe
    checkpoint.save_model(tmp_path / "run" / "model.safetensors", detector, recipe, CLASSES, [1, 2])
    main(["fc-weights", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert sum(row["correlation"] == "" for row in table(tmp_path / "out" / "fc-weights.csv")) == 17
    assert "run, fc: 1 cells have only equal weights" in capsys.readouterr().out


def test_mistakes_are_named_and_nothing_is_written(tmp_path, capsys):
    saved(tmp_path / "run", "conv")
    out = tmp_path / "out"
    cases = {
        (tmp_path / "run",): "its head is 'conv', which has no fc-head",
        (): "no checkpoint is named",
        (f"a={tmp_path}", f"a={tmp_path / 'run'}"): "two checkpoints have the name 'a'",
        (f"{tmp_path / 'run'}:fc",): "leave :fc out",
        (tmp_path / "nowhere",): "nowhere: no such file",
    }
    for arguments, message in cases.items():
        assert message in failure(["fc-weights", *arguments, "--out", out], capsys)
    assert not out.exists()
