"""A pytest plugin (`-p tests.support.bare_machine`): as if only what a machine lent for its GPU has were installed.

That is torch, torchvision, Triton, numpy, Pillow, tqdm, pytest and pytest-benchmark.
"""

from __future__ import annotations

import sys

MISSING = ("tyro", "pycocotools", "simplejpeg", "hypothesis", "onnx", "onnxruntime", "onnxscript", "xdist")


class Without:
    """A finder of modules that finds none of `MISSING`, as if they were not there."""

    def __init__(self, finder) -> None:
        self._finder = finder

    def __getattr__(self, name: str):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self._finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
