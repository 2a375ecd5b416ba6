"""Patches MMDetection to use our RoI pooling and NMS, also where mmcv has no compiled operators."""

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
CALLER = "doublehead.interop.mmdet.patch"


def patch() -> None:
    """Make MMDetection use this library's RoI pooling and NMS in the whole process, until `unpatch`.

    This affects every model, including those already built: the `forward` methods of `RoIAlign` and
    `SingleRoIExtractor` are replaced, and so are `nms`, `batched_nms` and `roi_align` of `mmcv.ops` in all modules of
    mmcv and mmdet.  Your own modules get the fast functions if they look them up in `mmcv.ops` at the call, or import
    them from there after `patch`.  A second call changes nothing.

    The results are mmcv's: its level rule, `aligned`, adaptive sampling, `(dets, keep)`, `nms_cfg` with
    `class_agnostic`, `max_num`, `score_threshold` and `split_thr`.  Calls that are not supported still go to mmcv:
    `pool_mode="max"`, `offset=1`, soft-NMS and other types, rotated boxes.

    mmcv without compiled operators is enough (`mmcv-lite`, which installs with current torch): call `patch` before
    `mmdet` is imported.  The functions above then work; every other operator in `mmcv.ops` raises a
    `NotImplementedError` with its name when called.  mmdet 3.3 refuses to be imported with mmcv 2.2 because of its
    version number alone; `patch` imports it anyway, with a warning.

    Raises:
        ImportError: mmcv or mmdet cannot be imported.
    """
    global _patch
    if _patch is None:
        _patch = _make()
    _patch.apply()


def unpatch() -> None:
    """Undo `patch`, if it was called.  Where mmcv has no compiled operators, its own then raise when called."""
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
    """Within this context `mmcv.ops` can be imported even without its compiled module; operators raise when called.

    The stand-in is removed afterwards, because mmengine looks for the module to tell mmcv from mmcv-lite.
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
