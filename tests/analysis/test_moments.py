"""Moments: equal to NumPy's, exact whatever the order, and their way through JSON.  Groups, too."""

import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from doublehead.analysis import groups
from doublehead.analysis.moments import STEPS, Moments, MomentTable
from doublehead.data import build_dataset
from doublehead.engine.errors import UserError
from tests.support.data_samples import CocoFolder

CLASSES = ["a", "b", "c", "d"]


def pairs(count, seed=0):
    x = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    y = (0.7 * x + 0.3 * torch.rand(count, generator=torch.Generator().manual_seed(seed + 1))).clamp(0, 1)
    return x, y


def table_of(cells, x, y, shape=(2, 3, 5)):
    table = MomentTable(shape)
    table.add((1, *cells), x, y)
    return table


@pytest.fixture(scope="module")
def sample():
    x, y = pairs(60_000)
    x[:100], y[:100] = 1.0, 1.0
    draw = torch.Generator().manual_seed(9)
    return (torch.randint(3, (60_000,), generator=draw), torch.randint(5, (60_000,), generator=draw)), x, y


def test_equal_to_numpy(sample):
    cells, x, y = sample
    table = table_of(cells, x, y)
    assert len(table.cells) == 15
    for first, second in itertools.product(range(3), range(5)):
        mine = ((cells[0] == first) & (cells[1] == second)).numpy()
        a, b = x.numpy()[mine].astype(np.float64), y.numpy()[mine].astype(np.float64)
        found = table.cells[1, first, second]
        assert found.count == mine.sum()
        assert found.x_mean == pytest.approx(a.mean(), abs=4e-8) and found.y_mean == pytest.approx(b.mean(), abs=4e-8)
        assert found.x_std == pytest.approx(a.std(), abs=1e-7) and found.y_std == pytest.approx(b.std(), abs=1e-7)
        assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


def test_sums_are_exact_beyond_int64():
    ones = torch.ones(50_000)
    table = table_of((0, 0), ones, ones)
    table.merge(table_of((0, 0), ones, ones))
    assert table.cells[1, 0, 0] == Moments(100_000, *[100_000 * STEPS] * 2, *[100_000 * STEPS**2] * 3)
    assert 100_000 * STEPS**2 > 2**63
    between = torch.tensor([0.4, 0.6, 1.4, 1.6]) / STEPS  # goes to the nearest step
    assert table_of((0, 0), between, between).cells[1, 0, 0] == Moments(4, 4, 4, 6, 6, 6)
    steps = torch.tensor([0, 1, STEPS // 2 + 1, STEPS - 1, STEPS])
    found = table_of((0, 0), steps / STEPS, 1 - steps / STEPS).cells[1, 0, 0]
    assert found.x == steps.sum() and found.xx == sum(s * s for s in steps.tolist())
    assert found.xy == sum(s * (STEPS - s) for s in steps.tolist())


def test_spread_does_not_cancel():
    x = torch.full((40_001,), 1 - 1 / STEPS, dtype=torch.float64)
    x[-1] = 1.0
    found = table_of((0, 0), x, x).cells[1, 0, 0]
    exact = Fraction(1, 40_001) - Fraction(1, 40_001**2)  # the variance, in steps
    assert found.x_std == pytest.approx(float(exact) ** 0.5 / STEPS, rel=1e-12)
    assert found.pearson == 1.0


def test_parts_in_any_order_give_the_same_bits(sample):
    cells, x, y = sample
    whole = table_of(cells, x, y)
    for seed in range(3):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = [
            table_of([cell[part] for cell in cells], x[part], y[part]) for part in order.split(7_001 + 1_000 * seed)
        ]
        random.Random(seed).shuffle(parts)
        halves = [MomentTable(whole.shape), MomentTable(whole.shape)]
        for number, part in enumerate(parts):
            halves[number % 2].merge(MomentTable.from_dict(json.loads(json.dumps(part.to_dict()))))
        halves[1].merge(halves[0])
        assert halves[1].to_dict() == whole.to_dict()


def test_what_is_undefined_is_none():
    nothing = Moments()
    values = (nothing.x_mean, nothing.x_std, nothing.y_mean, nothing.y_std, nothing.pearson)
    assert values == (None,) * 5
    one = table_of((0, 0), torch.tensor([0.25]), torch.tensor([0.5])).cells[1, 0, 0]
    assert (one.x_mean, one.y_mean, one.x_std, one.y_std, one.pearson) == (0.25, 0.5, 0.0, 0.0, None)
    flat = table_of((0, 0), torch.tensor([0.1, 0.2, 0.3]), torch.full((3,), 0.3)).cells[1, 0, 0]
    assert flat.pearson is None
    table = MomentTable((1,))
    table.add((torch.zeros(0, dtype=torch.int64),), torch.zeros(0), torch.zeros(0))
    assert table.cells == {}


def test_tables_of_different_shapes_do_not_merge():
    with pytest.raises(ValueError, match="cannot be merged"):
        MomentTable((2, 3)).merge(MomentTable((3, 2)))


# ---------------------------------------------------------------------- groups


def test_sizes_go_by_the_annotated_area():
    areas = [0.0, 1023.9, 1024.0, 9215.9, 9216.0, 1e6]
    found = [{"image_id": 4, "area": area, "iscrowd": 0, "bbox": [0, 0, 500, 500]} for area in areas]
    found.insert(2, {"image_id": 4, "area": 5.0, "iscrowd": 1, "bbox": [0, 0, 9, 9]})
    found.insert(3, {"image_id": 4, "area": 5.0, "iscrowd": 0, "bbox": [0, 0, 9, 0]})  # no target either
    sizes = groups.object_sizes([4, 9], found)
    assert sizes[4].tolist() == [0, 0, 1, 1, 2, 2] and sizes[9].tolist() == []
    assert groups.describe([], [], sizes) == ["objects: 2 small, 2 medium, 2 large"]


def test_sizes_are_in_the_order_of_the_targets(tmp_path):
    folder = CocoFolder(tmp_path)
    areas = {6: 9999.0, 2: 50.0, 9: 1024.0}  # of masks: they say nothing of the boxes
    for number, (i, area) in enumerate(areas.items()):
        folder.content["annotations"].append(folder.box(i, 20, (7, 3, 7)[number], [number, 1, 8, 9], area=area))
    dataset = build_dataset(folder.config(), "val")
    sizes = groups.object_sizes(dataset.image_ids, dataset.annotations())
    assert {image_id: size.tolist() for image_id, size in sizes.items()} == {10: [0], 20: [0, 2, 0, 1], 30: []}
    for _, target in dataset:
        assert len(target["labels"]) == len(sizes[target["image_id"]])
    cat, dog = dataset.classes.index("cat") + 1, dataset.classes.index("dog") + 1
    assert dataset[1][1]["labels"].tolist() == [dog, cat, dog, cat]  # in the order of `areas`, after the first


@pytest.mark.parametrize(
    "ap, thirds",
    [
        ([0.1, 0.9, 0.5], [(1,), (2,), (0,)]),
        ([0.1, 0.9, None, 0.5, 0.4, 0.2, 0.8], [(1, 6), (3, 4), (0, 5)]),
        ([0.4, 0.3, 0.2, 0.1], [(0, 1), (2,), (3,)]),
        ([0.5, 0.4, 0.3, 0.2, 0.1], [(0, 1), (2, 3), (4,)]),
        ([0.5, 0.5, 0.5], [(0,), (1,), (2,)]),
    ],
)
def test_difficulty_is_thirds_of_the_classes(ap, thirds):
    assert groups.difficulty_thirds(ap) == thirds


def metrics(**ap):
    return {"classes": {name: {"AP": value, "AP50": None} for name, value in ap.items()}}


def test_groups_from_a_run(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics(d=0.4, b=0.1, a=0.9, c=None, other=0.2)))
    for path in (tmp_path, tmp_path / "metrics.json"):
        found = groups.find_groups(CLASSES, str(path))
        assert [group.name for group in found] == ["all", *groups.SIZES, *groups.DIFFICULTIES]
        assert [group.classes for group in found[4:]] == [(0,), (3,), (1,)]
    assert found[0].sizes == (0, 1, 2, 3) and found[2].sizes == (1,) and found[4].sizes == (0, 1, 2)
    assert groups.describe(found, CLASSES, {1: torch.tensor([0])})[1:] == [
        "easy classes: a",
        "medium classes: d",
        "hard classes: b",
        "neither easy, medium nor hard, for lack of an AP: c",
    ]
    assert len(groups.find_groups(CLASSES, None)) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file"),
        ("{", "not a metrics.json"),
        ("[1, 2]", "has no AP of classes"),
        ('{"images": 3}', "has no AP of classes"),
        ('{"classes": {"a": {"AP50": 0.5}}}', "has no AP of classes"),
        ('{"classes": {"a": {"AP": "high"}}}', "has no AP of classes"),
        (json.dumps(metrics(a=0.1, b=0.2)), r"lacks the class 'c' of the data \(2 are missing\)"),
        (json.dumps(metrics(a=0.1, b=0.2, c=None, d=None)), "at least three classes"),
    ],
)
def test_unusable_metrics(tmp_path, content, message):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        groups.find_groups(CLASSES, str(path))
