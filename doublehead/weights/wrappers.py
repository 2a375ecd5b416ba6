"""Removes what PyTorch's model wrappers add to tensor names."""

from __future__ import annotations

WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Name part that a wrapper adds, in front or where it wraps a submodule -> the wrapper."""
COUNTERS = {"n_averaged": "how many weights an average was made of"}
"""Tensor that a wrapper adds -> its meaning."""


def without_wrappers(name: str) -> str:
    """The model's own name for a tensor."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
