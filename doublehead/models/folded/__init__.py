"""The networks before the heads at inference: batch norms folded, ReLU and residual in the convolutions' kernels.

`backbone`, `sequence`, `rpn_head`, `one_after_other` and `side_by_side` compute what the modules would, or return None
where they do not know the modules, or where something must see them run: hooks, gradients, training, a tracer.  The
modules stay as they are, and so do their weights; what was folded and packed is remembered beside them, until a weight
changes.

- `plan`: reads modules into a plan, and says no to what it does not know.
- `layers`: one convolution with what follows it; `on_cpu` and `on_cuda`: in one kernel; `stem`: a ResNet's first.
- `run`: runs a plan.
- `linear`: fully connected layers.
- `guards`: whether nothing but the result can be noticed; `watch`: whether the modules are as they were read.
"""

from .linear import one_after_other, predictors, side_by_side, with_relu
from .networks import backbone, constant, forget, held_tensors, rpn_head, sequence

__all__ = [
    "backbone",
    "constant",
    "forget",
    "held_tensors",
    "one_after_other",
    "predictors",
    "rpn_head",
    "sequence",
    "side_by_side",
    "with_relu",
]
