"""The names, besides arrays and tensors, that pickles of weights may refer to, and the placeholder for each.

Trainers save logs, arguments and paths with the weights.  Objects of the classes listed here are dropped unread.  Any
other name is refused, because it may execute code.
"""

from __future__ import annotations

from typing import Any

from .pickles import Function, Inert, NamesCode, Placeholder, Refused, Unpickler, brief, key

INERT = Inert()
INERT_CLASSES = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "collections": ("deque",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "uuid": ("UUID",),
    "builtins": ("object", "complex", "slice", "range", "list", "dict", "tuple", "int", "float", "str", "bool"),
    "typing": ("Any",),
    "mmengine.logging.history_buffer": ("HistoryBuffer",),
    "mmengine.config.config": ("Config", "ConfigDict"),
    "mmcv.utils.config": ("Config", "ConfigDict"),
    "addict.addict": ("Dict",),
    "easydict": ("EasyDict",),
    "yacs.config": ("CfgNode",),
    "fvcore.common.config": ("CfgNode",),
    "detectron2.config.config": ("CfgNode",),
    "torch": ("device", "Generator", "strided", "contiguous_format", "channels_last", "preserve_format"),
    "torch.serialization": ("_get_layout",),
    "torch.torch_version": ("TorchVersion",),
}  # fmt: skip
"""Module -> classes of logs, settings and plain values, whose objects do not matter for the weights."""


def _encode(unpickler: Unpickler, text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`, which pickles of protocol 2 use to store bytes; only for latin1."""
    if encoding not in ("latin1", "latin-1"):
        raise NamesCode(f"_codecs.encode({brief(encoding)})")
    return _bytes(unpickler, text, encoding)


def _bytes(unpickler: Unpickler, content: Any = b"", encoding: Any = "latin1") -> bytes:
    """`bytes` and `bytearray` of data in the pickle; not of a number, which would allocate that many zeros."""
    if type(content) not in (str, bytes) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"makes bytes of a {type(content).__name__}")
    unpickler.spend(len(content))
    return content.encode("latin1") if isinstance(content, str) else content


def _set(unpickler: Unpickler, items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise Refused(f"makes a set of a {type(items).__name__}")
    unpickler.spend(len(items))
    return set(map(key, items))


def _dictionary(unpickler: Unpickler, items: Any = ()) -> dict[Any, Any]:
    """`OrderedDict()`, which is filled later, or `OrderedDict(pairs)`, from Python 2; `Counter(dictionary)`."""
    if type(items) is dict:
        return items
    if type(items) not in (list, tuple) or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in items):
        raise Refused("makes a dictionary of something other than pairs")
    unpickler.spend(len(items))
    return {key(name): value for name, value in items}


def _default_dictionary(unpickler: Unpickler, factory: Any = None) -> dict[Any, Any]:
    return {}


def _getattr(unpickler: Unpickler, owner: Any, name: Any) -> Inert:
    """`getattr`, which a log of mmengine uses for its own methods; the result is dropped."""
    if not isinstance(owner, Inert):
        raise NamesCode(f"getattr(..., {brief(name)})")
    return INERT


def _reconstructor(unpickler: Unpickler, kind: Any, base: Any = None, state: Any = None) -> Placeholder:
    """`copyreg._reconstructor`, which protocols 0 and 1 use to make objects; only for dropped ones."""
    if not isinstance(kind, Inert):
        raise Refused(f"makes an object of a {type(kind).__name__}")
    return INERT


NAMES: dict[tuple[str, str], Any] = {
    **{(module, name): INERT for module, names in INERT_CLASSES.items() for name in names},
    ("collections", "OrderedDict"): Function(_dictionary),
    ("collections", "Counter"): Function(_dictionary),
    ("collections", "defaultdict"): Function(_default_dictionary),
    ("_codecs", "encode"): Function(_encode),
    ("builtins", "bytes"): Function(_bytes),
    ("builtins", "bytearray"): Function(_bytes),
    ("builtins", "set"): Function(_set),
    ("builtins", "frozenset"): Function(_set),
    ("builtins", "getattr"): Function(_getattr),
    ("copyreg", "_reconstructor"): Function(_reconstructor),
}
