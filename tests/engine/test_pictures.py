"""Pictures: boxes where they belong, names inside the sheet, curves from a log."""

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.engine.pictures import (
    class_colour,
    detection_grid,
    draw_boxes,
    draw_curves,
    from_picture,
    save_picture,
    to_picture,
)

GREY = Image.new("RGB", (200, 150), (90, 90, 90))


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def labels(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_a_box_is_drawn_in_its_class_colour_at_its_place():
    drawn = draw_boxes(GREY, boxes((40, 50, 120, 100)), labels(2), ["a", "b"])
    pixels = np.array(drawn)
    for x, y in ((40, 75), (120, 75), (80, 50), (80, 100)):
        assert tuple(pixels[y, x]) == class_colour(2)
    assert tuple(pixels[75, 80]) == (90, 90, 90)  # the inside stays
    changed = np.argwhere((pixels != 90).any(axis=2))
    assert changed[:, 0].max() <= 102 and changed[:, 1].min() >= 38
    assert np.array(GREY).min() == np.array(GREY).max() == 90  # the picture given stays


def test_only_scores_from_the_threshold_on():
    where = boxes((10, 40, 50, 80), (100, 40, 140, 80))
    pixels = np.array(draw_boxes(GREY, where, labels(1, 1), ["a"], torch.tensor([0.5, 0.49]), threshold=0.5))
    assert tuple(pixels[60, 10]) == class_colour(1) and tuple(pixels[60, 100]) == (90, 90, 90)


@pytest.mark.parametrize("box", [(190, 2, 199, 20), (-20, -20, 500, 400), (50, 60, 50, 60), (60, 70, 50, 60)])
def test_names_stay_on_the_picture_and_odd_boxes_do_no_harm(box):
    pixels = np.array(draw_boxes(GREY, boxes(box), labels(1), ["a long name"], torch.tensor([0.9])))
    whole = (pixels == class_colour(1)).all(axis=2).sum()
    assert whole > 500  # the name's ground, not cut off


def test_nothing_to_draw():
    assert np.array_equal(draw_boxes(GREY, boxes(), labels(), ["a"], torch.zeros(0)), GREY)


def test_colours_of_many_classes_differ():
    assert len({class_colour(i) for i in range(1, 81)}) == 80


def test_tensors_and_pictures_convert_both_ways():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(from_picture(to_picture(image)), image)


def test_the_grid_shows_truth_left_and_detections_right():
    images = [torch.full((3, 60, 120), 90, dtype=torch.uint8), torch.full((3, 90, 45), 90, dtype=torch.uint8)] * 2
    targets = [{"boxes": boxes((10, 20, 40, 50)), "labels": labels(1)}] * 4
    outputs = [{"boxes": boxes((10, 20, 40, 50)), "labels": labels(2), "scores": torch.tensor([0.8])}] * 3
    outputs.append({"boxes": boxes(), "labels": labels(), "scores": torch.zeros(0)})
    pixels = np.array(detection_grid(images[:4], targets, outputs, ["a", "b"], side=240))

    def coloured(label):
        return np.argwhere((pixels == class_colour(label)).all(axis=2))

    gap, side = 12, 240
    pair = 2 * side + 3 * gap
    for label, shift, count in ((1, 0, 4), (2, side + gap, 3)):
        spots = coloured(label)
        columns = {(x - gap) // pair for _, x in spots}
        assert columns == {0, 1}
        inside = (spots[:, 1] - gap) % pair - shift
        assert inside.min() >= 0 and inside.max() < side
        # A box of the wide image lies at twice its own coordinates: 240 / 120.
        first = spots[(spots[:, 0] < 34 + side) & (spots[:, 1] < pair)] - (34, gap + shift)
        assert abs(first[:, 1].min() - 20) <= 1 and abs(first[:, 0].max() - 100) <= 1
        assert len({(y > 34 + side, (x - gap) // pair) for y, x in spots}) == count


@pytest.mark.parametrize("name, kind", [("a.jpg", "JPEG"), ("b.png", "PNG")])
def test_pictures_are_saved_whole_in_the_format_of_their_name(tmp_path, name, kind):
    save_picture(tmp_path / name, GREY)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and picture.size == GREY.size
    assert len(list(tmp_path.iterdir())) == 1


def test_curves_show_losses_precision_and_rate(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    real = Axes.plot

    def plot(axes, x, y, *args, **kwargs):
        drawn[kwargs.get("label", "lr")] = (list(x), [float(v) for v in y])
        return real(axes, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    records = [{"step": s, "lr": 0.1 / s, "loss": 3.0 / s, "loss_a": 2.0 / s, "loss_b": 1.0 / s} for s in (1, 2, 4)]
    records.insert(2, {"step": 2, "AP": 0.25, "AP50": 0.5})
    draw_curves(records, tmp_path / "curves.png", "title")
    assert drawn == {
        "total": ([1, 2, 4], [3, 1.5, 0.75]),
        "a": ([1, 2, 4], [2, 1, 0.5]),
        "b": ([1, 2, 4], [1, 0.5, 0.25]),
        "AP": ([2], [25]),
        "AP50": ([2], [50]),
        "lr": ([1, 2, 4], [0.1, 0.05, 0.025]),
    }
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
    draw_curves([], tmp_path / "empty.png")  # a run too short to log
    draw_curves([{"step": 1, "lr": 0.1, "loss": 0.0, "loss_a": 0.0}], tmp_path / "zero.png")


def test_names_with_line_breaks_are_drawn_in_one_line():
    """Class names may end with a line break, as those read from a file line by line do."""
    drawn = [draw_boxes(Image.new("RGB", (90, 60)), torch.tensor([[5.0, 20, 40, 40]]), torch.tensor([1]), [name])
             for name in ("person ", "person\n", "person\x00", "person\u2028")]  # fmt: skip
    assert all(picture.tobytes() == drawn[0].tobytes() for picture in drawn)


def test_long_names_are_cut_short():
    drawn = [draw_boxes(Image.new("RGB", (900, 60)), torch.tensor([[5.0, 20, 40, 40]]), torch.tensor([1]), [name])
             for name in ("x" * 59 + "\N{HORIZONTAL ELLIPSIS}", "x" * 61, "x" * 100_000, "x" * 60)]  # fmt: skip
    same = [picture.tobytes() == drawn[0].tobytes() for picture in drawn]
    assert same == [True, True, True, False]
