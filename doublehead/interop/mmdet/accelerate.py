"""MMDetection on this library's operators: RoI pooling and NMS, also where mmcv has no compiled operators."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn

from ..patching import Patch, import_or_explain
from . import mmcv_ops

_patch: Patch | None = None
CALLER = "doublehead.interop.mmdet.accelerate"


def accelerate() -> None:
    """Let MMDetection pool RoIs and suppress boxes with this library's operators, until `restore`.

    Everything in this process is faster afterwards, models that are built already too: `RoIAlign` and
    `SingleRoIExtractor` have other `forward` methods, and `nms`, `batched_nms` and `roi_align` of `mmcv.ops` are
    replaced in all modules of mmcv and mmdet.  Your own modules have the fast functions if they look them up in
    `mmcv.ops` at the call, or import them from there afterwards.  A second call changes nothing.

    The results are mmcv's: its level rule, `aligned`, adaptive sampling, `(dets, keep)`, `nms_cfg` with
    `class_agnostic`, `max_num`, `score_threshold` and `split_thr`.  What is not served goes to mmcv as before:
    `pool_mode="max"`, `offset=1`, soft-NMS and other types, rotated boxes.

    mmcv without compiled operators (`mmcv-lite`, the one that installs with current torch) is enough: call this before
    `mmdet` is imported.  What is replaced here then works, all else in `mmcv.ops` raises `NotImplementedError` by name
    when called.  mmdet 3.3 refuses to be imported with mmcv 2.2, by number alone; here it is imported all the same,
    with a warning.

    Raises:
        ImportError: mmcv or mmdet cannot be imported.
    """
    global _patch
    if _patch is None:
        _patch = _make()
    _patch.apply()


def restore() -> None:
    """Undo `accelerate`; without it, nothing happens.  Without compiled operators, mmcv's then raise when called."""
    global _patch
    if _patch is not None:
        _patch.undo()
    _patch = None


def _make() -> Patch:
    mmcv = import_or_explain("mmcv", CALLER, "install mmcv, or mmcv-lite, which needs no compiler")
    with _stand_in_for_compiled_operators():
        for name in ("mmcv.ops.nms", "mmcv.ops.roi_align"):
            import_or_explain(name, CALLER, "its version may not fit this torch: install another mmcv")
    nms = sys.modules["mmcv.ops.nms"]  # `mmcv.ops.nms` is the function
    roi_align = sys.modules["mmcv.ops.roi_align"]
    _import_mmdet(mmcv)
    extractor = import_or_explain(
        "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor", CALLER, "mmdet 3 is supported"
    ).SingleRoIExtractor
    layer = roi_align.RoIAlign
    return Patch(
        ("mmcv", "mmdet"),
        {
            nms.nms: mmcv_ops.make_nms(nms.nms),
            nms.batched_nms: mmcv_ops.make_batched_nms(nms.batched_nms),
            roi_align.roi_align: mmcv_ops.make_roi_align(roi_align.roi_align),
        },
        {
            (layer, "forward"): mmcv_ops.make_layer_forward(vars(layer)["forward"]),
            (extractor, "forward"): mmcv_ops.make_extractor_forward(extractor, layer),
        },
    )


def _import_mmdet(mmcv: ModuleType) -> None:
    advice = "install mmdet 3 (pip install mmdet)"
    try:
        import_or_explain("mmdet", CALLER, advice)
    except AssertionError as error:  # mmdet/__init__.py compares version numbers
        version = mmcv.__version__
        try:
            mmcv.__version__ = "2.1.0"
            import_or_explain("mmdet", CALLER, advice)
        finally:
            mmcv.__version__ = version
        warnings.warn(f"mmdet was imported although it says: {error}", stacklevel=4)


@contextlib.contextmanager
def _stand_in_for_compiled_operators() -> Iterator[None]:
    """Where mmcv has no compiled part, `mmcv.ops` can be imported inside; its operators raise when called.

    Afterwards the stand-in is gone again: mmengine looks for the part, to find out what kind of mmcv this is.
    """
    try:
        importlib.import_module("mmcv._ext")
    except ImportError:
        sys.modules["mmcv._ext"] = _NoOperators("mmcv._ext")
        try:
            yield
        finally:
            del sys.modules["mmcv._ext"]
    else:
        yield


class _NoOperators(ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_, **__) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name} is compiled code, which this mmcv does not have; doublehead provides RoIAlign "
                "(average), nms and batched_nms"
            )

        return missing
