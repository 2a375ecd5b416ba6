"""A pytest plugin (`-p tests.support.list_gpu_tests`): with `--collect-only -q`, lists the tests marked `gpu` again."""

from __future__ import annotations

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    print()
    for item in session.items:
        if item.get_closest_marker("gpu"):
            print(f"gpu: {item.nodeid}")
