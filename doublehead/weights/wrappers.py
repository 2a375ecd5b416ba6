"""What PyTorch's wrappers of models do to the names of their tensors."""

from __future__ import annotations

WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Parts of names that a wrapper puts in, at the front or where a part of the model was wrapped -> the wrapper."""
COUNTERS = {"n_averaged": "how many weights an average was made of"}
"""Tensors that a wrapper adds -> what they are."""


def without_wrappers(name: str) -> str:
    """The name that the model itself gives a tensor."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
