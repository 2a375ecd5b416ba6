"""The networks before the heads at inference on a CPU: batch norms folded, ReLU and residual in the convolutions.

`backbone`, `sequence`, `rpn_head`, `one_after_other` and `side_by_side` compute what the modules would, or return None
where they do not know the modules, or where something must see them run: hooks, gradients, training, a tracer.  The
modules stay as they are, and so do their weights; what was folded and packed is remembered beside them, until a weight
changes.

- `plan`: reads modules into a plan, and says no to what it does not know.
- `layers`: one convolution with what follows it.
- `run`: runs a plan.
- `linear`: fully connected layers.
- `guards`: whether nothing but the result can be noticed.
"""

from .linear import one_after_other, side_by_side, with_relu
from .networks import backbone, forget, rpn_head, sequence

__all__ = ["backbone", "forget", "one_after_other", "rpn_head", "sequence", "side_by_side", "with_relu"]
