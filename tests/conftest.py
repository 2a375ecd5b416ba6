"""What all tests share: real pictures, the `gpu` marker, Triton on the CPU, the rounds of the fault suite."""

import contextlib
import logging
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import parallel, standins
from tests.support.interpreter import TRITON_DEVICE, kernels_on_cpu
from tests.support.paths import ROOT

if TRITON_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before a module with kernels is imported

# pytest 9.2 listens to every logger that does not propagate, and for a listener torch writes down each step of each
# compilation, which takes a third of the time of the tests that compile. Nobody reads it.
logging.getLogger("torch.__trace").propagate = True

MISSING = standins.install()
COMMAND_LINES = {"test_detect", "test_detect_exported", "test_export"}
"""Files whose tests run command lines, which need tyro."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone uses several cores; `pytest tests/ops/test_nms.py` is one process."""
    parallel.divide(config, parallel.usable_cores())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no CUDA device, and those of command lines without tyro."""
    if hasattr(config, "workerinput"):  # one of several processes: all must have the same order
        parallel.longest_first(items)
    for item in items:
        if "tyro" in MISSING and item.path.stem in COMMAND_LINES:
            item.add_marker(pytest.mark.skip(reason="needs tyro, which is not installed"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.fixture
def triton_kernels(monkeypatch) -> Iterator[str]:
    """The device on which `torch.ops.doublehead` runs the Triton kernels: here, if need be, in the interpreter."""
    pytest.importorskip("triton")
    from doublehead.ops import _library

    monkeypatch.setattr(_library, "COMPILED", {})  # kernels in CUDA would take most calls
    with contextlib.nullcontext() if TRITON_DEVICE == "cuda" else kernels_on_cpu():
        yield TRITON_DEVICE


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


# The fault suite: what is killed, damaged, full or hostile must end well, at random moments and places. `.ci/nightly`
# runs it at a nightly size, from a seed of its own.
SCALE = int(os.environ.get("DOUBLEHEAD_FAULTS", "1"))  # how many times the ordinary rounds
SEED = int(os.environ.get("DOUBLEHEAD_FAULTS_SEED", "0"))  # where its random numbers begin


@pytest.fixture
def rounds():
    """`rounds(n)`: n in the ordinary run, proportionally more at night."""
    return lambda number: number * SCALE


@pytest.fixture
def nightly() -> None:
    """For what only shows over many rounds."""
    if SCALE < 2:
        pytest.skip("shows only over many rounds: .ci/nightly runs it")


@pytest.fixture
def seeded(request) -> random.Random:
    """Random numbers of this test alone; pytest shows the printed seed with a failure."""
    print(f"repeat with DOUBLEHEAD_FAULTS_SEED={SEED} DOUBLEHEAD_FAULTS={SCALE} pytest '{request.node.nodeid}'")
    return random.Random(SEED * 1_000_003 + zlib.crc32(request.node.name.encode()))
