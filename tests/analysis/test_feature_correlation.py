"""`doublehead analyze feature-correlation`: the cosines are those of a loop over objects and cells."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.analysis import feature_correlation
from doublehead.analysis.feature_correlation import (
    CosineSum,
    CosineTable,
    cosine_sum,
    head_maps,
    measure_image,
    output_map,
)
from doublehead.analysis.readers import open_readers
from doublehead.cli.analyze import main
from tests.support.analysis_commands import failure, saved
from tests.support.analysis_detector import stop_after
from tests.support.engine_standin import MemoryDataset, one_thread  # noqa: F401 (a fixture)

CPU = torch.device("cpu")


def numpy_mean(features):
    """Mean cosine of every two cells over objects, [S*S, S*S]; objects with a zero vector are left out of its pairs."""
    objects, _, side, _ = features.shape
    total, count = np.zeros((2, side**2, side**2))
    for k in range(objects):
        cells = features[k].reshape(-1, side**2).T.astype(np.float64)
        for i, a in enumerate(cells):
            for j, b in enumerate(cells):
                if a.any() and b.any():
                    total[i, j] += a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    count[i, j] += 1
    with np.errstate(invalid="ignore"):
        return total / count, count


def pictures(count=5):
    """Images of several sizes, the second one without an object."""
    generator = torch.manual_seed(1)
    images = [torch.randint(256, (3, 64 + 8 * i, 96), generator=generator, dtype=torch.uint8) for i in range(count)]
    boxes = [(0, [5, 6, 40, 30]), (0, [50, 2, 20, 50]), (2, [0, 0, 96, 80]), (3, [30, 30, 20, 20]), (4, [8, 9, 70, 60])]
    annotations = [{"image_id": 10 * i + 7, "bbox": [float(v) for v in box], "category_id": 2} for i, box in boxes]
    data = MemoryDataset(images, annotations)
    data.classes = ["cat", "dog"]
    return data


# ---------------------------------------------------------------------- the sums


def test_cosines_are_numpys_and_zero_vectors_are_left_out():
    features = torch.randn(6, 5, 3, 3, generator=torch.manual_seed(0))
    features[1, :, 0, 2] = 0
    features[:, :, 2, 2] = 0
    found = cosine_sum(features)
    expected, count = numpy_mean(features.numpy())
    np.testing.assert_allclose(found.mean(), expected, atol=1e-9)
    assert (found.count.numpy() == count).all() and (found.objects, found.zeros) == (6, 7)
    assert np.isnan(found.mean()[8]).all() and np.isnan(found.mean()[:, 8]).all()


def test_sums_do_not_depend_on_how_the_objects_are_shared():
    features = torch.randn(7, 4, 2, 2, generator=torch.manual_seed(0))
    whole = cosine_sum(features)
    table = CosineTable()
    for part in reversed(features.split([3, 1, 3])):
        table.merge(CosineTable({("a", "input"): cosine_sum(part)}))
    merged = CosineTable.from_dict(json.loads(json.dumps(table.to_dict()))).sums["a", "input"]
    assert (merged.total == whole.total).all() and (merged.count == whole.count).all() and merged.objects == 7


def test_the_sum_of_very_many_objects_fits():
    full = torch.full((1, 1), 2**30 * (2**33 - 1))
    assert CosineSum(full, torch.full((1, 1), 2**33 - 1)).mean() == 1


# ---------------------------------------------------------------------- the maps


def test_the_fc_heads_output_is_rebuilt_cell_by_cell(tmp_path):
    tower = saved(tmp_path / "run").detector.heads["fc"].tower.eval()
    x = torch.randn(2, 64, 3, 3, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = output_map(tower, x)
        assert found.shape == (2, 8, 3, 3)
        block = tower[1].weight.view(8, 64, 3, 3)[:, :, 1, 2]
        torch.testing.assert_close(found[:, :, 1, 2], x[:, :, 1, 2] @ block.T)
        # Its sum over the cells, with the bias, is what the layer gives.
        torch.testing.assert_close(found.sum((2, 3)) + tower[1].bias, tower[1](x.flatten(1)))


def test_the_conv_heads_output_is_the_map_before_the_average(tmp_path):
    tower = saved(tmp_path / "run").detector.heads["conv"].tower.eval()
    x = torch.randn(2, 64, 3, 3, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = output_map(tower, x)
        assert found.shape == (2, 16, 3, 3)
        torch.testing.assert_close(found.mean((2, 3)), tower(x), atol=1e-5, rtol=1e-5)


def test_each_head_sees_the_object_at_its_own_scale(tmp_path):
    saved(tmp_path / "run")
    (reader,) = open_readers([f"m={tmp_path / 'run'}"], CPU)
    image, target = pictures()[0]
    maps = head_maps(reader, image, target["boxes"])
    assert set(maps) == {("m, fc", "input"), ("m, fc", "output"), ("m, conv", "input"), ("m, conv", "output")}
    features = reader.features(image, target["boxes"])
    rois = torch.cat((torch.zeros(2, 1), features.boxes), 1)
    pooled = reader.model.detector.roi_pooling(features.maps, rois)
    assert (maps["m, fc", "input"] == pooled[1.0]).all() and (maps["m, conv", "input"] == pooled[1.3]).all()
    assert (pooled[1.0] != pooled[1.3]).any()


def whole(readers) -> CosineTable:
    table = CosineTable()
    for image, target in (pictures()[i] for i in range(5)):
        table.merge(measure_image(readers, image, target))
    return table


def test_images_make_the_whole(tmp_path):
    saved(tmp_path / "run")
    readers = open_readers([f"m={tmp_path / 'run'}"], CPU)
    sums = whole(readers).sums
    assert {value.objects for value in sums.values()} == {5}
    images = [pictures()[i] for i in (0, 2, 3, 4)]
    inputs = [head_maps(readers[0], image, target["boxes"])["m, conv", "output"] for image, target in images]
    expected, _ = numpy_mean(torch.cat(inputs).numpy())
    np.testing.assert_allclose(sums["m, conv", "output"].mean(), expected, atol=1e-8)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(feature_correlation, "build_dataset", lambda *args, **more: pictures())


def test_table_and_figure(memory, tmp_path, capsys):
    saved(tmp_path / "run")
    out = tmp_path / "out"
    main(["feature-correlation", f"m={tmp_path / 'run'}", "--out", str(out), "--device", "cpu"])
    with open(out / "feature-correlation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 81
    readers = open_readers([f"m={tmp_path / 'run'}"], CPU)
    expected = whole(readers).sums["m, fc", "output"]
    place = {"head": "m, fc", "map": "output", "row": "1", "column": "2", "other_row": "3", "other_column": "3"}
    (row,) = [row for row in rows if place.items() <= row.items()]
    assert float(row["cosine"]) == expected.mean()[1, 8] and int(row["objects"]) == expected.count[1, 8]
    assert min(Image.open(out / "feature-correlation.png").size) > 500
    assert "m, conv, output: mean cosine of two cells" in capsys.readouterr().out


def test_a_stopped_measurement_goes_on(memory, tmp_path, monkeypatch, capsys):
    saved(tmp_path / "run")
    command = ["feature-correlation", f"m={tmp_path / 'run'}", "--device", "cpu", "--out"]
    main([*command, str(tmp_path / "whole")])
    with stop_after(monkeypatch, feature_correlation, 3):
        main([*command, str(tmp_path / "out")])
    assert not (tmp_path / "out" / "feature-correlation.csv").exists()
    main([*command, str(tmp_path / "out")])
    assert "3 of 5 images are done already" in capsys.readouterr().out
    names = ("feature-correlation.csv", "feature-correlation.png")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_a_single_head_has_one_row(memory, tmp_path, capsys):
    saved(tmp_path / "run", "fc")
    main(["feature-correlation", f"m={tmp_path / 'run'}", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "m, fc, output" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "run")
    end = ["--out", tmp_path / "out", "--device", "cpu"]
    assert "no checkpoint is named" in failure(["feature-correlation", *end], capsys)
    assert "leave :fc out" in failure(["feature-correlation", f"{tmp_path / 'run'}:fc", *end], capsys)
    message = failure(["feature-correlation", tmp_path / "run", *end], capsys)
    assert "its classes are disc, square, triangle, ring, cross, star, not cat, dog" in message
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        feature_correlation, "build_dataset", lambda *args, **more: MemoryDataset(pictures().images, [])
    )
    assert "the data have no object" in failure(["feature-correlation", tmp_path / "run", *end], capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["state"]
