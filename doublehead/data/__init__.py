"""Data sets and loaders: images and boxes in the usual tools' layouts, and shapes drawn on the fly.

Boxes are x1, y1, x2, y2 in pixels, measured between pixel edges: (0, 0, W, H) is a whole image.  Label i is class i - 1
of `dataset.classes`; 0 is the background.  Bad records raise a `DataError`; or they are left out, counted in
`dataset.skipped` and summarised in one `DataWarning`, up to a share of the set, beyond which they are an error again.
"""

from ..errors import DataError
from .dataset import DataWarning, DetectionDataset, Target
from .images import read_image
from .layouts import Layout, find_layout
from .loader import Loader, build_loader
from .opening import Splits, build_dataset, open_splits
from .transforms import horizontal_flip

__all__ = [
    "DataError", "DataWarning", "DetectionDataset", "Layout", "Loader", "Splits", "Target",
    "build_dataset", "build_loader", "find_layout", "horizontal_flip", "open_splits", "read_image",
]  # fmt: skip
