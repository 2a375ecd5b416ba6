"""A pytest plugin (`-p bare_machine`): as if only what a machine lent for its GPU has were installed.

That is torch, torchvision, Triton, numpy, Pillow, tqdm, pytest and pytest-benchmark.
"""

from __future__ import annotations

import sys

MISSING = ("tyro", "pycocotools", "simplejpeg", "hypothesis", "onnx", "onnxruntime", "onnxscript", "matplotlib", "xdist")


class Missing:
    """A finder that finds none of `MISSING`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Missing())
