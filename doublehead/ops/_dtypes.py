"""The dtypes that operators accept, and the dtypes that they compute in.

There is a rule for each kind of computation.  For one tensor of one of the four accepted dtypes all rules but
`layer_dtype` agree: float64 stays float64, and float32, float16 and bfloat16 are computed in float32.  They differ in
which tensors decide, and in what happens to other dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes of features, boxes, logits and weights that operators accept."""


def layer_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer of PyTorch would run on `x`: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and pairwise products: `dtype` itself, 16-bit floats and integers as float32."""
    return torch.promote_types(dtype, torch.float32)


def box_dtype(*boxes: Tensor) -> torch.dtype:
    """The dtype of arithmetic on boxes and deltas: the widest of theirs, at least float32, in which areas do not
    overflow.
    """
    dtype = torch.float32
    for tensor in boxes:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def score_dtype(*logits: Tensor) -> torch.dtype:
    """The dtype of probabilities and scores: float64 if one of the classifiers' logits are, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in logits) else torch.float32


def pooling_dtype(features: Tensor) -> torch.dtype:
    """The dtype of RoIAlign's boxes and sums: float64 for float64 features, else float32; boxes do not count."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def resizing_dtype(batch: torch.dtype) -> torch.dtype:
    """The dtype in which images are resized: float64 for a batch of float64, else float32; images do not count."""
    return torch.float64 if batch == torch.float64 else torch.float32
