"""The fault suite: what is killed, damaged, full or hostile must end well, at random moments and places.

Two environment variables size it:

    DOUBLEHEAD_FAULTS        how many times as many rounds as in the ordinary run of the tests (1)
    DOUBLEHEAD_FAULTS_SEED   where its random numbers begin (0); every test prints its seed when it fails

`.ci/nightly` runs it at a nightly size, from a seed of its own.
"""

from __future__ import annotations

import os
import random
import zlib

import pytest

SCALE = int(os.environ.get("DOUBLEHEAD_FAULTS", "1"))
SEED = int(os.environ.get("DOUBLEHEAD_FAULTS_SEED", "0"))


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
