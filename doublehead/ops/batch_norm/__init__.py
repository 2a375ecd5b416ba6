"""Batch normalisation with what follows it: residual sum and ReLU."""

from .op import batch_norm_act, batch_norm_act_apply, batch_norm_act_backward

__all__ = ["batch_norm_act", "batch_norm_act_apply", "batch_norm_act_backward"]
