"""Imports OpenVINO and NNCF without their usage reports."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

_REPORTS = "openvino_telemetry"


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Inside, `openvino` and `nncf` are imported as where their reports are not installed.

    By default they tell Google Analytics of every import, and leave an identifier in ~/intel, without asking.
    """
    if _REPORTS in sys.modules:  # somebody has decided before
        yield
        return
    sys.modules[_REPORTS] = None  # importing it fails
    try:
        yield
    finally:
        del sys.modules[_REPORTS]


def import_openvino() -> Any:
    """The package `openvino`.

    Raises:
        ImportError: it is not installed.
    """
    with without_reports():
        import openvino
    return openvino


def import_nncf() -> Any:
    """The package `nncf`.

    Raises:
        ImportError: it is not installed.
    """
    with without_reports():
        import nncf
    return nncf
