"""Sliding windows: how many, where, and that their IoUs fill [0, 1] for every kind of object."""

import pytest
import torch

from doublehead.analysis.windows import BINS, WINDOWS, iou_bins, object_windows, sliding_windows
from doublehead.ops import box_iou

HEIGHT, WIDTH = 480, 640
OBJECTS = {
    "in the middle": (300, 200, 400, 280),
    "the whole image": (0, 0, 640, 480),
    "nearly all": (3, 4, 633, 470),
    "small": (320, 240, 328, 250),
    "tiny": (320.3, 240.1, 320.8, 240.5),
    "thin upright": (300, 20, 303, 470),
    "thin lying": (20, 100, 620, 102.5),
    "thin at the border": (0, 0, 2, 480),
    "at the left": (0, 200, 80, 300),
    "at the bottom": (200, 400, 330, 480),
    "in the first corner": (0, 0, 50, 40),
    "in the last corner": (600, 440, 640, 480),
    "across a side": (0, 300, 640, 330),
}
BOXES = torch.tensor(list(OBJECTS.values()))


@pytest.fixture(scope="module")
def windows():
    return sliding_windows(BOXES, (HEIGHT, WIDTH), (0, 7))


def test_about_14000_for_each_object(windows):
    assert windows.shape == (len(OBJECTS), WINDOWS, 4) and windows.dtype == torch.float32
    assert abs(WINDOWS - 14_000) <= 1_400


def test_they_lie_in_the_image_and_overlap_their_object(windows):
    assert windows.min() >= 0 and (windows[..., 2] <= WIDTH).all() and (windows[..., 3] <= HEIGHT).all()
    assert (windows[..., 2:] > windows[..., :2]).all()
    low = torch.maximum(windows[..., :2], BOXES[:, None, :2])
    high = torch.minimum(windows[..., 2:], BOXES[:, None, 2:])
    assert (high > low).all()


@pytest.mark.parametrize("number", range(len(OBJECTS)), ids=OBJECTS)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_bin_of_iou_is_filled(number, seed):
    found = sliding_windows(BOXES[number, None], (HEIGHT, WIDTH), (seed, 3))[0]
    ious = box_iou(found, BOXES[number, None])[:, 0].clamp(0, 1)
    counts = iou_bins(ious).bincount(minlength=BINS)
    assert len(counts) == BINS and counts.sum() == WINDOWS
    assert counts.min() >= 0.01 * WINDOWS


def test_the_object_itself_is_among_them(windows):
    assert (windows == BOXES[:, None]).all(-1).any(1).all()


def test_the_seed_and_the_image_decide():
    def draw(seed, image, boxes=BOXES[[0, 3]]):
        return sliding_windows(boxes, (HEIGHT, WIDTH), (seed, image))

    before = draw(3, 5)
    torch.rand(3)
    assert torch.equal(before, draw(3, 5))
    for other in (draw(4, 5), draw(3, 6), draw(5, 3)):
        assert (before != other).any(-1).float().mean() > 0.99
    assert (before[0] != draw(3, 5, BOXES[[0, 0]])[1]).any()  # each object has its own
    assert draw(-1, -3).shape == before.shape


def test_jitter_stays_in_its_cell():
    boxes = torch.tensor([[300.0, 200, 400, 280]]).expand(40, 4)
    found = sliding_windows(boxes, (10_000, 10_000), (0, 0))
    widths = ((found[..., 2] - found[..., 0]) / 100).view(40, 7, -1)
    for cell in range(6):  # the widths' cells follow one another without a gap or an overlap
        assert widths[:, cell].max() < widths[:, cell + 1].min() * 1.0001
    assert widths.min() >= 0.2499 and widths.max() <= 4.001
    assert widths[:, 0].max() - widths[:, 0].min() > 0.2


def test_images_with_several_objects_and_without():
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    found = object_windows(image, {"boxes": BOXES[:3], "labels": torch.ones(3), "image_id": 7}, 0)
    assert torch.equal(found.boxes, sliding_windows(BOXES[:3], (HEIGHT, WIDTH), (0, 7)).flatten(0, 1))
    assert found.objects.bincount().tolist() == [WINDOWS] * 3
    pairs = [box_iou(found.boxes[k, None], BOXES[found.objects[k], None]).item() for k in range(0, 40_000, 999)]
    assert found.ious[:40_000:999].tolist() == pytest.approx(pairs)
    none = object_windows(image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "image_id": 7}, 0)
    assert [len(part) for part in none] == [0, 0, 0]


def test_bins_are_uniform_and_closed_above():
    ious = torch.tensor([0.0, 0.049, 0.051, 0.5, 0.949, 0.951, 1.0])
    assert iou_bins(ious).tolist() == [0, 0, 1, 10, 18, 19, 19]
