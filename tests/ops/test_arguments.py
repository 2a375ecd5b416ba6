"""How arguments reach the operators' functions: packed by name, checked by one grammar, computed in the dtype meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import doublehead
from doublehead.ops import _dtypes, _library

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def names_of(packed: tuple) -> Iterator[str]:
    """The strings in `packed`, which must stand in the fields of their own name."""
    for field, value in zip(getattr(packed, "_fields", [None] * len(packed)), packed, strict=True):
        if isinstance(value, tuple):
            yield from names_of(value)
        else:
            assert field in (None, value)
            yield value


@pytest.mark.parametrize("name", sorted(_library.PACKERS))
def test_packed_arguments_have_the_schemas_names_in_its_order(name):
    names = [argument.name for argument in getattr(torch.ops.doublehead, name).default._schema.arguments]
    packed = _library.PACKERS[name](*names)
    assert list(names_of(packed)) == names
    assert any(hasattr(part, "_fields") for part in packed)


def test_pytorchs_internals_are_used_in_one_file():
    package = Path(doublehead.__file__).parent
    internals = re.compile(r"torch\._C|register_vmap|register_fake\(f")
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")
             if internals.search(path.read_text(encoding="utf-8"))}  # fmt: skip
    assert files == {"ops/_library.py"}


def test_which_tensors_decide_on_the_dtype():
    half, single, double, byte = (torch.zeros(1, dtype=d) for d in (torch.half, torch.float, torch.double, torch.uint8))
    for tensor in (half, single, half.bfloat16(), byte):
        assert _dtypes.box_dtype(tensor) == _dtypes.score_dtype(tensor) == torch.float32
        assert _dtypes.pooling_dtype(tensor) == _dtypes.resizing_dtype(tensor.dtype) == torch.float32
        assert _dtypes.accumulation_dtype(tensor.dtype) == torch.float32
    assert _dtypes.box_dtype(half, double) == _dtypes.score_dtype(half, double) == torch.float64
    assert _dtypes.pooling_dtype(double) == _dtypes.resizing_dtype(torch.float64) == torch.float64
    assert _dtypes.accumulation_dtype(torch.float64) == torch.float64
    assert _dtypes.box_dtype(single, byte) == torch.float32
    assert set(_dtypes.FLOATS) == set(FLOATS)


def test_a_layer_runs_in_autocasts_dtype():
    x = torch.zeros(1)
    assert _dtypes.layer_dtype(x) == torch.float32 and _dtypes.layer_dtype(x.half()) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert _dtypes.layer_dtype(x) == torch.bfloat16
