"""A predictor on a GPU: images from anywhere, detections on the CPU, the same as the CPU's."""

import pytest
import torch

import doublehead
from doublehead.exporting.program import exact_float32
from tests.support.export_samples import save_tiny_ext


@pytest.fixture
def exact():
    """Detections come in the order of their scores, of which the nearest two are 0.007 apart in log-odds.

    That is within TF32's rounding, and some hundred times float32's.
    """
    with exact_float32():
        yield


@pytest.mark.gpu
def test_images_from_anywhere_give_detections_on_the_cpu(tmp_path, exact):
    run = save_tiny_ext(tmp_path)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = doublehead.load(run, device="cpu").predict(image)
    predictor = doublehead.load(run)
    assert predictor.device.type == "cuda" and len(expected) > 0
    for given in (image, image.cuda(), image.cuda() / 255, image.permute(1, 2, 0).numpy()):
        found = predictor.predict(given)
        assert found.boxes.device.type == "cpu" and found.names == expected.names
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
        assert predictor.draw(given, found).size == (96, 64)
    assert predictor.to("cpu").predict(image).names == expected.names and predictor.device.type == "cpu"
