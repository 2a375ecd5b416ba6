"""Arrays and tensors of every kind for files of weights, and a small file that would become a large object."""

from __future__ import annotations

import numpy as np
import torch

from doublehead.weights import read_file, take_state

ARRAYS = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "Fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "transposed": np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(1, 2, 0),
    "strided": np.arange(20, dtype=np.int64)[::3],
    "big-endian": np.arange(4, dtype=">f4") / 3,
    "big-endian half": np.arange(4, dtype=">f2"),
    "no dimensions": np.array(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "bool": np.array([True, False]),
    "half": np.array([1, np.inf, 6e-8], np.float16),
    "bytes": np.array([200, 255, 0, 10, 13], np.uint8),
    "unsigned": np.array([2**63 + 1], np.uint64),
    "number": np.float32(0.1),
    "count": np.int64(-5),
    "truth": np.bool_(True),
    "NaN": np.array([np.nan, -0.0]),
}


def read(path):
    return take_state(path, read_file(path))


TENSORS = {
    "plain": torch.randn(2, 3),
    "double": torch.randn(3, dtype=torch.float64),
    "half": torch.randn(3).half(),
    "bfloat16": torch.randn(3).bfloat16(),
    "int": torch.arange(3, dtype=torch.int32),
    "bool": torch.tensor([True, False]),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "transposed": torch.randn(2, 3, 4).permute(2, 0, 1),
    "a part": torch.arange(20.0)[5:15:2],
    "expanded": torch.randn(1, 4).expand(1, 4),
    "no dimensions": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}
TENSORS["shared"] = TENSORS["plain"][1]
LAUGHS = b"I1\n\x85" + b"2\x86" * 60
"""A tuple of a few bytes that holds 2^60 numbers: its text, its hash and comparisons with another never end."""
