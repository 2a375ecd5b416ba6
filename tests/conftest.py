"""What all tests share: the folder of real pictures, the `gpu` marker, and Triton on the CPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

#: Where Triton's kernels run in the tests. Without a GPU that is the CPU, in Triton's interpreter, which must be chosen
#: before a module with kernels is imported.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if TRITON_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.fixture
def triton_kernels() -> Iterator[str]:
    """The device on which `torch.ops.doublehead` runs the Triton kernels: here, if need be, in the interpreter."""
    pytest.importorskip("triton")
    from doublehead.ops._library import NAMESPACE, TRITON_KERNELS

    if TRITON_DEVICE == "cuda":
        yield "cuda"
        return
    with torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        for name, launch in TRITON_KERNELS.items():
            library.impl(name, launch, "CPU", allow_override=True)
        yield "cpu"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with `BCCD/`, `tiny_coco/`, ...: $DOUBLEHEAD_TEST_DATA, else ../shared/data beside the project."""
    path = Path(os.environ.get("DOUBLEHEAD_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test pictures: {path} does not exist; DOUBLEHEAD_TEST_DATA names another folder")
    return path


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, as deterministic PyTorch fills it: an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
