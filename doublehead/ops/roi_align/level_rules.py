"""The level rules of known projects by name: shorthand for `LevelRule`s.

Only the public functions read this table.  The operators and their kernels know epsilons and offsets, no names.
"""

from __future__ import annotations

from .._checks import ArgumentValueError, check_choice
from .pooling import AddedTo, LevelRule

LEVEL_RULES = {
    "torchvision": LevelRule(1e-6, AddedTo.LEVEL),
    "detectron2": LevelRule(1e-8, AddedTo.CANONICAL_RATIO),
    "mmdet": LevelRule(1e-6, AddedTo.FINEST_RATIO),
    # A box of maskrcnn-benchmark ends with its last pixel, whose coordinate is one less.
    "maskrcnn_benchmark": LevelRule(1e-6, AddedTo.CANONICAL_RATIO, end_offset=1.0),
}
_NAMES = tuple(LEVEL_RULES)


def resolve(level_rule: str | LevelRule) -> LevelRule:
    """The rule that a name stands for; a rule stands for itself."""
    if isinstance(level_rule, LevelRule):
        return level_rule
    check_choice("level_rule", level_rule, _NAMES, ArgumentValueError)
    return LEVEL_RULES[level_rule]
