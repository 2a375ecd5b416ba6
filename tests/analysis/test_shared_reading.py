"""Several heads read on the same boxes: what each gives alone, to the bit, from one run of what they share."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from doublehead.analysis.readers import open_readers
from doublehead.analysis.shared_reading import read_each, shared_features
from doublehead.config import DataConfig
from doublehead.data import build_dataset
from doublehead.engine.checkpoint import load_model, save_model
from tests.support.analysis_detector import SIDE, save_detector
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)

CHUNK = 70


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """An Ext in three ways, one of the same backbone with other heads, and one with another backbone."""
    folder = tmp_path_factory.mktemp("runs")
    ext, other = save_detector(folder / "ext"), save_detector(folder / "another", "conv")
    loaded = load_model(ext)
    with torch.no_grad():
        for weight in loaded.model.detector.heads.parameters():
            weight.mul_(1.1)
    save_model(folder / "same.safetensors", *loaded)
    texts = [f"all={ext}", f"fc={ext}:fc", f"conv={ext}:conv", f"same={folder}/same.safetensors:conv", f"other={other}"]
    return open_readers(texts, torch.device("cpu"))


@pytest.fixture(scope="module")
def image():
    image, target = build_dataset(DataConfig(val_images=1, image_size=SIDE), "val")[0]
    return image, target["boxes"]


@pytest.fixture(scope="module")
def boxes():
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(150, 2, generator=draw) * 80
    return torch.cat((corners, corners + 5 + torch.rand(150, 2, generator=draw) * 40), dim=1)


def test_equal_to_reading_each_alone(readers, image, boxes):
    labels = torch.arange(len(boxes)) % 6 + 1
    together = read_each(readers, shared_features(readers, *image), boxes, labels, CHUNK)
    for reader, found in zip(readers, together, strict=True):
        features = reader.features(*image)
        alone = reader.read_all(features, reader.rois(features, boxes), labels, CHUNK)
        assert found.scores.equal(alone.scores) and found.boxes.equal(alone.boxes), reader.name
    assert not any(one.scores.equal(together[0].scores) for one in together[1:])


def test_what_they_share_runs_once(readers, image, boxes):
    seen, hooks = Counter(), []

    def count(name):
        return lambda *_: seen.update([name])

    for reader in (readers[0], *readers[3:]):  # the models
        detector = reader.model.detector
        parts = {"backbone": detector.backbone, "pooling": detector.roi_pooling}
        parts |= {f"{reader.name} {name}": head for name, head in detector.heads.items()}
        hooks += [part.register_forward_hook(count(name)) for name, part in parts.items()]
    read_each(readers, shared_features(readers, *image), boxes, torch.ones(len(boxes), dtype=torch.int64), CHUNK)
    for hook in hooks:
        hook.remove()
    assert seen.pop("backbone") == 2  # of five readers
    chunks = 3
    assert seen.pop("pooling") == 2 * chunks  # both of the Ext's scales in one call, for "same" too; and the other's
    assert dict(seen) == dict.fromkeys(("all fc", "all conv", "same conv", "other conv"), chunks)


def test_equal_weights_on_other_images_make_other_features(readers):
    digests = [reader.backbone_digest for reader in readers]
    assert digests[:4] == [digests[0]] * 4 and digests[4] != digests[0]
    config = readers[0].model.config
    for change in (
        {"image": replace(config.image, max_size=99)},
        {"legacy_boxes": True},
        {"backbone": replace(config.backbone, fpn_norm=not config.backbone.fpn_norm)},
    ):
        model = copy.copy(readers[0].model)
        model.config = replace(config, **change)
        assert replace(readers[0], model=model).backbone_digest != digests[0], change
