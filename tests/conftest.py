"""What all tests share: the folder of real pictures, and the `gpu` marker."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with `BCCD/`, `tiny_coco/`, ...: $DOUBLEHEAD_TEST_DATA, else ../shared/data beside the project."""
    path = Path(os.environ.get("DOUBLEHEAD_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test pictures: {path} does not exist; DOUBLEHEAD_TEST_DATA names another folder")
    return path
