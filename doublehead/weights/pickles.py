"""A restricted unpickler for weights.

A pickle is a program.  Python's unpickler runs whatever a pickle refers to, and its C version allocates as much memory
as a few bytes claim; PyTorch's `weights_only` creates tensors from memory that the file does not fill.  This unpickler
builds plain values and the placeholders of this package only: names are looked up in a table of harmless entries, and
no more bytes are allocated than the file holds.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
from collections.abc import Callable, Mapping
from struct import unpack
from typing import Any, BinaryIO

SCALARS = (str, bytes, int, float, bool, type(None))
INERT_MODULES = (
    "torch.optim.", "torch.amp.", "torch.cuda.amp.", "omegaconf.", "pytorch_lightning.", "lightning.",
    "lightning_fabric.", "torchvision.transforms.",
)  # fmt: skip
"""Prefixes of modules whose objects are dropped unread: whole optimizers and schedules, and a trainer's settings and
callbacks."""
LONGEST_SHOWN = 200
"""The number of characters of a name that a message shows."""
MOST_OBJECTS = 2_000_000
"""Limit on a pickle's containers and memo entries; one byte of it may take up to 300 bytes of memory."""
BUFFER = 1 << 16
"""The number of bytes that a pickle may create in addition to its own length."""


class WeightsError(ValueError):
    """A file of weights cannot be read; the message names the file and the reason."""


class Refused(Exception):
    """A pickle does something that no file of weights needs."""


class NamesCode(Refused):
    """A pickle refers to a name that is not in the table."""


class Placeholder:
    """A placeholder for a class, a function or an object in a pickle."""

    __slots__ = ()

    def call(self, unpickler: Unpickler, *arguments: Any) -> Any:
        """The result of calling the class or function."""
        raise Refused(f"calls a {type(self).__name__}")

    def build(self, state: Any) -> None:
        """Set the object's state."""
        raise Refused(f"sets the state of a {type(self).__name__}")

    def fill(self) -> None:
        """Called when a pickle appends or sets items."""
        raise Refused(f"sets items of a {type(self).__name__}")


class Inert(Placeholder):
    """A class known to be harmless, and its objects; their contents are dropped."""

    __slots__ = ()

    def call(self, unpickler: Unpickler, *arguments: Any) -> Inert:
        return self

    def build(self, state: Any) -> None:
        pass

    def fill(self) -> None:
        pass


class Function(Placeholder):
    """A function of this package that replaces the one a pickle refers to."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def call(self, unpickler: Unpickler, *arguments: Any) -> Any:
        return self.function(unpickler, *arguments)


class Unpickler(pickle._Unpickler):
    """Runs one pickle of `file`.

    Args:
        file: positioned at the start of the pickle.
        length: the file's length in bytes; nothing is read beyond it, and about as many bytes are created at most.
        names: (module, name) -> placeholder or plain value; modules have their Python 3 names.
        storage: resolves persistent ids.

    Raises:
        Refused: (from `load`) the pickle refers to an unknown name or has an unknown operation.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: BinaryIO,
        length: int,
        names: Mapping[tuple[str, str], Any],
        storage: Callable[[Any], Any] | None = None,
    ) -> None:
        # latin1: arrays that Python 2 wrote are strings
        super().__init__(_Bounded(file, length), fix_imports=False, encoding="latin1", errors="strict")
        self._names, self._storage, self._left = names, storage, length + BUFFER
        self._objects = 0

    def spend(self, number: int) -> None:
        """Count bytes created from those in the file, which a pickle may use any number of times."""
        self._left -= number
        if self._left < 0:
            raise Refused("makes more data than the file holds")

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        found = self._names.get((module, name))
        if found is None and module.startswith(INERT_MODULES) and "." not in name:
            found = Inert()
        if found is None:
            raise NamesCode(shown(f"{module}.{name}".removeprefix("builtins."))[:LONGEST_SHOWN])
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise Refused("refers to something outside of the file")
        return self._storage(pid)

    def get_extension(self, code: int) -> Any:
        raise Refused("has an extension code of copyreg")

    def _call(self, callee: Any, arguments: Any) -> Any:
        if not isinstance(callee, Placeholder) or type(arguments) is not tuple:
            raise Refused(f"calls a {type(callee).__name__}")
        try:
            return callee.call(self, *arguments)
        except TypeError as error:
            raise Refused(f"calls a function with other arguments than it has ({error})") from error

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        self.append(self._call(klass, tuple(args)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        if self.stack.pop() and not isinstance(self.stack[-2], Inert):
            raise Refused("calls a class with named arguments")
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.build(state)
        elif type(target) is not dict:  # attributes of an OrderedDict, such as a state_dict's _metadata, are ignored
            raise Refused(f"sets the state of a {type(target).__name__}")

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Placeholder):
            target.fill()
        else:
            raise Refused(f"appends to a {type(target).__name__}")

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            target.update(pairs(items))
        elif isinstance(target, Placeholder):
            target.fill()
        else:
            raise Refused(f"sets items of a {type(target).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()  # this also rebinds `append`
        self.append(pairs(items))

    def load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise Refused(f"adds to a {type(target).__name__}")
        target.update(map(key, items))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(key, items)))

    def load_bytearray8(self) -> None:
        (number,) = unpack("<Q", self.read(8))
        self.append(self.read(number))  # bytes suffice; Python's own would allocate as many as are claimed

    def count(self) -> None:
        """Count a container or memo entry."""
        self._objects += 1
        if self._objects > MOST_OBJECTS:
            raise Refused(f"makes more than {MOST_OBJECTS:,} objects")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce  # (class, arguments), as (function, arguments)
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _counted(run: Callable[[Unpickler], None]) -> Callable[[Unpickler], None]:
    def counted(unpickler: Unpickler) -> None:
        unpickler.count()
        run(unpickler)

    return counted


for _opcode in (
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.MARK, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
):  # fmt: skip
    Unpickler.dispatch[_opcode[0]] = _counted(Unpickler.dispatch[_opcode[0]])


def key(value: Any) -> Any:
    """Check a dictionary key; hashing deeply nested tuples would overflow the stack or take exponential time.

    Raises:
        Refused: it is not a plain value.
    """
    parts = value if type(value) is tuple else (value,)
    if any(type(part) is int and part.bit_length() > 64 for part in parts):
        raise Refused("has a huge number as a key")  # equal hashes would take quadratic time, and so would printing one
    if isinstance(value, Placeholder) or all(type(part) in SCALARS for part in parts):
        return value
    raise Refused(f"has a {type(value).__name__} as a key")


def shown(name: Any) -> str:
    """A name for display, with control characters escaped."""
    name = name if isinstance(name, str) else str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def brief(value: Any) -> str:
    """An argument for a message; the text of a small nested tuple could be exponentially long."""
    return repr(value[:40]) if type(value) in (str, bytes) else f"a {type(value).__name__}"


def pairs(items: list[Any]) -> dict[Any, Any]:
    """A dictionary of (key, value, key, value, ...)."""
    return {key(items[i]): items[i + 1] for i in range(0, len(items), 2)}


class _Bounded:
    """A file that never allocates more bytes than it has."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length = file, length
        self.readline = file.readline

    def read(self, number: int) -> bytes:
        if number < 0 or number > self._length - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.read(number)


def unpickle(content: bytes, names: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any] | None = None) -> Any:
    """The contents of a pickle in memory; raises like `Unpickler.load`."""
    return Unpickler(io.BytesIO(content), len(content), names, storage).load()
