"""Boxes of models whose boxes end at their last pixel: every figure reads them where training has them."""

import dataclasses

import pytest
import torch

from doublehead.analysis import feature_correlation, pearson, qualitative, sliding_windows
from doublehead.analysis.readers import Reader, Reading
from doublehead.analysis.shared_reading import shared_features
from doublehead.analysis.windows import object_windows
from doublehead.config import ImageConfig
from doublehead.data.shapes import CLASSES
from doublehead.models import build_detector
from tests.support.analysis_detector import recipe, windows_225  # noqa: F401 (a fixture)
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("windows_225")
SIZE, RESIZED = (48, 64), (80, 106)
BOXES = torch.tensor([[10.0, 6, 30, 26], [33, 20, 61.5, 47]])
TARGET = {"boxes": BOXES, "labels": torch.tensor([1, 2]), "image_id": 3}
IMAGE = torch.randint(256, (3, *SIZE), generator=torch.manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def readers():
    """One Ext, read out in the three ways, that enlarges the image by 5/3."""
    plain = recipe("double_head_ext")
    config = dataclasses.replace(
        plain.model,
        legacy_boxes=True,
        roi=dataclasses.replace(plain.model.roi, level_rule="maskrcnn_benchmark"),
        image=ImageConfig(min_size=(80,), max_size=200, resize="maskrcnn_benchmark"),
    )
    torch.manual_seed(0)
    model = build_detector(config, len(CLASSES) + 1).eval()
    legacy = dataclasses.replace(plain, model=config)
    return {
        name: Reader(name, model, legacy, list(CLASSES), model.detector.resolve_readout(readout))
        for name, readout in (("conv", "conv"), ("fc", "fc"), ("Ext", "fused"))
    }


@pytest.fixture
def pooled(readers, monkeypatch):
    """The RoIs that were pooled, `Tensor[K, 4]` for each call."""
    seen, pooling = [], readers["Ext"].model.detector.roi_pooling
    forward = pooling.forward

    def watch(features, boxes, *more):
        seen.append(boxes[..., -4:].flatten(0, -2))
        return forward(features, boxes, *more)

    monkeypatch.setattr(pooling, "forward", watch)
    return seen


def in_training(readers) -> torch.Tensor:
    boxes = readers["Ext"].model.transform.targets([TARGET], [SIZE], [RESIZED]).boxes[0]
    x, y = RESIZED[1] / SIZE[1], RESIZED[0] / SIZE[0]
    ratio, end = torch.tensor([x, y, x, y]), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(boxes, (BOXES - end) * ratio + end)  # the last pixel's coordinate is scaled
    return boxes


def test_the_ground_truth_lies_where_training_has_it(readers):
    for features in shared_features(list(readers.values()), IMAGE, BOXES):
        assert features.boxes.equal(in_training(readers))
        torch.testing.assert_close(features.into_image(features.boxes), BOXES)


def test_windows_are_read_where_training_has_boxes(readers, pooled):
    """The window in the middle of the grid is the object's own box."""
    reader, windows = readers["fc"], object_windows(IMAGE, TARGET, 0)
    features, middle = reader.features(IMAGE, BOXES), len(windows.boxes) // 4
    objects = pearson.Objects(BOXES, TARGET["labels"], torch.zeros(2, dtype=torch.int64))
    pearson.window_pairs([reader], [features], objects, windows, chunk=9999)
    labels = TARGET["labels"][windows.objects]
    list(sliding_windows.read_windows([reader], [features], BOXES, windows, labels, 9999))
    expected = in_training(readers)
    assert len(pooled) == 2
    for rois in pooled:
        assert rois[[middle, 3 * middle + 1]].equal(expected)


def test_regressed_boxes_are_compared_in_the_images_pixels(readers, monkeypatch):
    reader, windows = readers["fc"], object_windows(IMAGE, TARGET, 0)
    features = reader.features(IMAGE, BOXES)
    monkeypatch.setattr(reader, "decode", lambda outputs, features, boxes, labels: Reading(labels.float(), boxes))
    labels = TARGET["labels"][windows.objects]
    ((_, ious),) = sliding_windows.read_windows([reader], [features], BOXES, windows, labels, 9999)
    torch.testing.assert_close(ious, windows.ious, atol=1e-5, rtol=0)


def test_proposals_are_compared_in_the_images_pixels(readers, monkeypatch):
    reader = readers["fc"]
    features = reader.features(IMAGE, BOXES)
    monkeypatch.setattr(reader, "proposals", lambda features: in_training(readers))
    objects = pearson.Objects(BOXES, TARGET["labels"], torch.zeros(2, dtype=torch.int64))
    pairs = pearson.proposal_pairs(reader, features, objects, chunk=9)
    torch.testing.assert_close(pairs.ious, torch.ones(2), atol=1e-6, rtol=0)


def test_feature_maps_are_those_of_training(readers, pooled):
    feature_correlation.head_maps(readers["Ext"], IMAGE, BOXES)
    assert len(pooled) == 1 and pooled[0].equal(in_training(readers))


def test_scores_at_objects_are_those_of_training(readers, pooled):
    qualitative.scores_at_boxes(readers, IMAGE, BOXES, TARGET["labels"])
    assert len(pooled) == 2 and all(rois.equal(in_training(readers)) for rois in pooled)


def test_windows_narrower_than_a_pixel_stay_boxes(readers):
    """Enlarged by their last pixel's coordinate they would end before they begin."""
    windows = torch.tensor([[10.0, 10, 10.2, 30], [63.9, 47.9, 64, 48]])
    reader = readers["fc"]
    rois = reader.rois(reader.features(IMAGE, BOXES), windows)
    assert (rois[:, 2:] - rois[:, :2] >= 1 - 1e-5).all() and (rois[:, 2:] <= torch.tensor([106.0, 80])).all()
