"""Random changes of training images: boxes stay on their objects, draws depend on nothing but seed, epoch and image."""

import hashlib
import itertools
from dataclasses import replace

import pytest
import torch

from doublehead.config import AugmentConfig, DataConfig
from doublehead.data import build_dataset, build_loader, loader
from doublehead.data.transforms import GREY, augmented

ALL = AugmentConfig(scale=(0.5, 2.0), crop=0.5, colour=0.3)


def shapes(count=12):
    return build_dataset(DataConfig(train_images=count, image_size=48), "train", horizontal_flip=0.5)


def stream(count=9, augment=ALL, **options):
    """The first batches of a training: (images, targets)."""
    batches = build_loader(shapes(), options.pop("batch_size", 4), train=True, augment=augment, seed=3, **options)
    return list(itertools.islice(batches, count))


def digest(batches):
    """One hash for each image with its boxes and labels."""
    return [
        hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in (image, target["boxes"], target["labels"])))
        .hexdigest()
        for images, targets in batches
        for image, target in zip(images, targets, strict=True)
    ]  # fmt: skip


def picture(boxes, height=60, width=80):
    """Dark, with a bright rectangle in each box, in a channel of its own."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[number % 3, y1:y2, x1:x2] = 255
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "image_id": 7}
    return image, target | {"labels": torch.arange(1, len(boxes) + 1)}


def test_without_options_nothing_changes(monkeypatch):
    plain = digest(stream(augment=None))
    assert digest(stream(augment=ALL)) != plain
    monkeypatch.setattr(loader, "augmented", None)  # not even called
    assert digest(stream(augment=AugmentConfig())) == plain
    # As they were before there were such options.
    assert hashlib.sha256("".join(plain).encode()).hexdigest() == (
        "fc0e830932d6462e8128cdc6112ead14460381bf57e899563d5f426a1214575b"
    )


def test_draws_depend_on_seed_epoch_and_image_alone():
    whole = digest(stream())
    assert len(set(whole)) == len(whole)  # three epochs of twelve images: each time another change
    assert digest(stream(workers=2)) == whole
    assert digest(stream(4, start_step=5)) == whole[20:]
    ranks = [digest(stream(batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
    shared = [one for at in range(0, 18, 2) for rank in ranks for one in rank[at : at + 2]]
    assert shared == whole


def test_generators_stay_as_they_are():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = digest(stream(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert digest(stream(2)) == first


@pytest.mark.parametrize("config", [
    AugmentConfig(scale=(0.5, 0.9)), AugmentConfig(scale=(1.1, 2.0)), AugmentConfig(crop=1.0), replace(ALL, colour=0.0),
])  # fmt: skip
def test_boxes_stay_on_their_objects(config):
    image, target = picture([(10, 8, 30, 30), (50, 30, 70, 55)])
    changed = 0
    for seed in range(40):
        now, found = augmented(image, target, config, seed)
        changed += now.shape != image.shape or not torch.equal(now, image)
        assert 1 <= len(found["boxes"]) == len(found["labels"]) and found["image_id"] == 7
        for box, label in zip(found["boxes"], found["labels"].tolist(), strict=True):
            rows, columns = torch.where(now[label - 1] > 190)  # the frame's grey is darker
            bounds = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - bounds).abs().max() <= 1.5, (seed, box, bounds)
    assert changed > 20


def test_smaller_pictures_keep_their_frame_and_larger_ones_are_parts():
    image, target = picture([(20, 10, 60, 50)])
    small, found = augmented(image, target, AugmentConfig(scale=(0.5, 0.5)), 1)
    assert small.shape == image.shape and small.dtype == torch.uint8
    sides = found["boxes"][0, 2:] - found["boxes"][0, :2]
    assert sides.tolist() == pytest.approx([20, 20])
    outside = (small == torch.tensor(GREY, dtype=torch.uint8)[:, None, None]).all(0)
    assert outside.sum() == 60 * 80 * 3 // 4
    image, target = picture([(20, 10, 36, 22), (2, 2, 18, 14), (60, 40, 76, 52)])
    for seed in range(20):
        large, found = augmented(image, target, AugmentConfig(scale=(2.0, 2.0)), seed)
        assert large.shape == (3, 30, 40)
        seen = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(1)
        assert len(seen) and seen.min() >= 16 * 12 / 4 - 16  # whose centre is outside is left out


def test_a_box_that_vanishes_is_dropped_but_never_the_last():
    image, target = picture([(0, 0, 20, 20), (70, 50, 71, 51)])  # the second has one pixel
    half = AugmentConfig(scale=(0.5, 0.5))
    assert augmented(image, target, half, 0)[1]["labels"].tolist() == [1]
    image, target = picture([(70, 50, 71, 51)])
    now, found = augmented(image, target, half, 0)
    assert torch.equal(now, image) and torch.equal(found["boxes"], target["boxes"])


def test_colours_leave_boxes_and_shape():
    image, target = picture([(10, 8, 30, 30)])
    image = image // 2 + 40
    now, found = augmented(image, target, AugmentConfig(colour=0.5), 2)
    assert now.shape == image.shape and not torch.equal(now, image) and found is target


@pytest.mark.parametrize("height, width", [(1, 1), (5, 300), (300, 17), (16, 16)])
def test_odd_sizes_and_images_without_boxes(height, width):
    image, target = picture([], height, width)
    for seed in range(10):
        assert len(augmented(image, target, ALL, seed)[1]["boxes"]) == 0
        whole = target | {"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([1])}
        now, found = augmented(image, whole, ALL, seed)
        x1, y1, x2, y2 = found["boxes"][0].tolist()
        assert 0 <= x1 < x2 <= now.shape[2] and 0 <= y1 < y2 <= now.shape[1]


def test_a_scale_out_of_order_is_refused():
    with pytest.raises(ValueError, match=r"train.augment.scale is 2 to 0.5: the smaller factor comes first"):
        stream(augment=AugmentConfig(scale=(2.0, 0.5)))


def test_evaluation_is_not_augmented():
    images, _ = next(iter(build_loader(shapes(2), 2, train=False, augment=ALL)))
    assert all(torch.equal(image, shapes(2)[i][0]) for i, image in enumerate(images))
