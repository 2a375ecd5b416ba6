"""The layouts in which data sets lie in folders, found out by what is there.

`finding` looks; one module for each kind of annotations knows its layouts; `splits` chooses what to train on, or
divides a single split; `selection` keeps chosen classes.  They give the records that `doublehead.data.files` checks.
"""

from .finding import find_layout
from .layout import Family, Layout

__all__ = ["Family", "Layout", "find_layout"]
