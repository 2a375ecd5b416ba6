"""Charts of an evaluation: what they show is what pycocotools and the matching gave, for any names and counts."""

import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from doublehead.engine import charts
from doublehead.engine.coco_metrics import detailed_metrics
from tests.support.engine_standin import MemoryDataset

ODD_NAMES = ["_hidden", "US$ 1 and $x^{", "long " * 40, "two\nlines", "кошка", "猫", "", "\ud800", "%s {} \\frac"]


def details_of(names, images=12, found=True, seed=0):
    """Random boxes, and detections near them."""
    rng = np.random.default_rng(seed)
    dataset = MemoryDataset([torch.zeros(3, 8, 8, dtype=torch.uint8)] * images, [], len(names))
    dataset.classes = list(names)
    truths, detections = [], []
    for number in range(3 * images + len(names)):
        category = 3 * (number % len(names)) + 2
        one = {"image_id": 10 * (number % images) + 7, "category_id": category}
        where = [*rng.uniform(0, 90, 2).tolist(), 20.0, 20.0]
        truths.append(one | {"id": number + 1, "iscrowd": 0, "bbox": where, "area": 400.0})
        moved = (np.array(where) + [*rng.normal(0, 4, 2), 0, 0]).tolist()
        detections.append(one | {"bbox": moved, "score": float(rng.random())})
    dataset._annotations = truths
    return detailed_metrics(dataset.coco_ground_truth(), detections if found else [], dataset, voc=False)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    drawn = []
    monkeypatch.setattr(charts, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def texts(axes):
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()]


def test_the_curves_are_pycocotools_precision_and_the_legend_the_ap_of_the_metrics(figures):
    metrics, details = details_of("abc")
    charts.draw_pr_curves(details, "x.png", "title")
    at_half, mean = figures[0].axes
    for axes, curves, name in ((at_half, details.precision[0], "AP50"), (mean, details.precision.mean(axis=0), "AP")):
        *each, whole = (line.get_ydata() for line in axes.lines)
        assert np.array_equal(whole, curves.mean(axis=1))
        assert {tuple(line) for line in each} == {tuple(curves[:, k]) for k in range(3)}
        expected = {f"{100 * metrics['classes'][k][name]:.1f}  {k}" for k in "abc"}
        assert texts(axes)[0] == f"{100 * metrics[name]:.1f}  mean of 3 classes" and set(texts(axes)[1:]) == expected
    colours = [{text: line.get_color() for text, line in zip(texts(axes), axes.get_legend().get_lines(), strict=True)}
               for axes in (at_half, mean)]  # fmt: skip
    assert [[c[-1] for c in one] for one in colours][0] == [[c[-1] for c in one] for one in colours][1]
    assert list(colours[0].values()) == list(colours[1].values())  # a class has its line in both


def test_many_classes_have_curves_and_the_best_and_worst_have_names(figures):
    _, details = details_of([f"class {k}" for k in range(30)])
    charts.draw_pr_curves(details, "x.png")
    assert len(figures[0].axes[0].lines) == 30 + 6 + 1 and len(texts(figures[0].axes[0])) == 8


def test_a_class_without_boxes_is_named_and_not_drawn(figures):
    _, details = details_of("abc")
    details.precision[:, :, 1] = -1
    charts.draw_pr_curves(details, "x.png")
    assert "without a box in the ground truth: b" in figures[0].get_suptitle()
    assert len(figures[0].axes[0].lines) == 3 and min(figures[0].axes[0].lines[-1].get_ydata()) >= 0


def test_the_confusion_shows_its_numbers_and_its_rule(figures):
    _, details = details_of("ab")
    details = details._replace(confusion=np.array([[8, 1, 1], [0, 12345, 5], [2, 0, 0]]))
    charts.draw_confusion(details, "x.png", "title")
    axes = figures[0].axes[0]
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}  # (column, row)
    assert cells == {(0, 0): "8", (1, 0): "1", (2, 0): "1", (1, 1): "12k", (2, 1): "5", (0, 2): "2"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (10)", "b (12k)", "background"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a (10)", "b (12k)", "missed"]
    shares = np.asarray(axes.images[0].get_array()) ** 2
    assert shares[0] == pytest.approx([0.8, 0.1, 0.1]) and shares[2] == pytest.approx([0.2, 0, 0])
    title = figures[0].get_suptitle()
    assert "(best F1)" in title and "IoU ≥ 0.5" in title and "crowd" in title
    for text in axes.texts:  # to be read in grey
        column, row = text.get_position()
        ground = np.dot(axes.images[0].to_rgba(np.sqrt(shares))[row, column][:3], [0.3, 0.59, 0.11])
        assert abs(ground - np.dot(to_rgb(text.get_color()), [0.3, 0.59, 0.11])) > 0.35


def test_the_scores_show_right_and_wrong_and_the_threshold(figures):
    _, details = details_of("ab", images=40)
    charts.draw_scores(details, "x.png")
    counts, curves = figures[0].axes
    ranked, threshold = details.ranking, details.best_f1["threshold"]
    heights = [bar.get_height() for bar in counts.patches]
    up, down = (sum(abs(height) for height in heights if height * sign > 0) for sign in (1, -1))
    assert (up, down) == (ranked.hits.sum(), (~ranked.hits).sum())
    f1, precision, recall, marked = curves.lines
    best = np.argmax(f1.get_ydata())
    assert f1.get_xdata()[best] == threshold == marked.get_xdata()[0]
    assert (precision.get_ydata()[best], recall.get_ydata()[best]) == tuple(
        details.best_f1[name] for name in ("precision", "recall")
    )
    assert len({line.get_linestyle() for line in curves.lines}) == 4


@pytest.mark.parametrize(
    "names, found", [(ODD_NAMES, True), (["one"], True), (["one", "two"], False), ([f"c{k}" for k in range(25)], True)]
)
def test_any_names_and_counts_are_drawn_without_a_warning(tmp_path, names, found):
    _, details = details_of(names, found=found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = charts.draw_charts(details, tmp_path, "$a and $b")
    assert written == ["pr_curves.png", "confusion.png", "scores.png"]
    assert {path.name for path in tmp_path.iterdir()} == set(written)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert 500 < picture.width < 2000 and picture.height < 2000


def test_names_that_cannot_be_drawn_are_numbers():
    drawn = [charts._drawn(name, number) for number, name in enumerate(ODD_NAMES, start=1)]
    assert drawn[:2] == ["_hidden", r"US\$ 1 and \$x^{"] and len(drawn[2]) <= 24
    assert drawn[3:8] == ["two lines", "кошка", "class 6", "class 7", "class 8"]
