"""The paper's Tables 1 to 6: every row, its published numbers, and the recipe that reproduces it.

Wu et al., "Rethinking Classification and Localization for Object Detection", CVPR 2020.  Recipes name their rows in
their descriptions; `doublehead tables` prints the published numbers beside those of runs.
"""

from .rows import TABLES, rows_of
from .schema import OtherMethod, Row, Table

__all__ = ["TABLES", "OtherMethod", "Row", "Table", "rows_of"]
