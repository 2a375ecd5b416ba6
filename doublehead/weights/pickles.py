"""A machine that runs pickles of weights, and can do nothing else.

A pickle is a program.  Python's own machine runs whatever it names, and its C version allocates what a few bytes claim;
PyTorch's `weights_only` makes tensors of memory that the file does not fill.  This one builds plain values and the
stand-ins of this package: names are looked up in a table, what they stand for is data, and bytes are taken only
where the file has them.
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
"""What the names of modules begin with whose objects are dropped unread: optimizers and schedules saved whole, and a
trainer's settings and callbacks."""
LONGEST_SHOWN = 200
"""Characters of a name that a message shows."""
MOST_OBJECTS = 2_000_000
"""Containers that a pickle may make, and objects that it may note: a byte of it makes up to 300 in memory."""
BUFFER = 1 << 16
"""Bytes that a file may make beside those that it holds."""


class WeightsError(ValueError):
    """A file of weights cannot be read; the message names it and says why."""


class Refused(Exception):
    """What a pickle does that no file of weights does."""


class NamesCode(Refused):
    """A pickle names something that is not in the table."""


class StandIn:
    """What a pickle gets for a class, a function or an object: data that the machine itself handles."""

    __slots__ = ()

    def call(self, machine: Unpickler, *arguments: Any) -> Any:
        """The object of a class, or a function's result."""
        raise Refused(f"calls a {type(self).__name__}")

    def build(self, state: Any) -> None:
        """Take an object's state."""
        raise Refused(f"sets the state of a {type(self).__name__}")

    def fill(self) -> None:
        """Called where a pickle appends items, or sets them."""
        raise Refused(f"sets items of a {type(self).__name__}")


class Inert(StandIn):
    """A class that is known to be harmless, its objects, and what these hold: nothing."""

    __slots__ = ()

    def call(self, machine: Unpickler, *arguments: Any) -> Inert:
        return self

    def build(self, state: Any) -> None:
        pass

    def fill(self) -> None:
        pass


class Function(StandIn):
    """A function of ours in the place of one that a pickle names."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def call(self, machine: Unpickler, *arguments: Any) -> Any:
        return self.function(machine, *arguments)


class Unpickler(pickle._Unpickler):
    """Runs one pickle of `file`.

    Args:
        file: at the pickle's begin.
        length: of the file in bytes; nothing is read beyond it, and about as many bytes are made.
        names: (module, name) -> stand-in or plain value; modules by their names in Python 3.
        storage: what a persistent id stands for.

    Raises:
        Refused: (from `load`) the pickle names or does what is not known here.
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
        """Note bytes that are made of those in the file: a pickle may name the same ones again and again."""
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
        if not isinstance(callee, StandIn) or type(arguments) is not tuple:
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
        if isinstance(target, StandIn):
            target.build(state)
        elif type(target) is not dict:  # an OrderedDict's attributes, such as a state_dict's _metadata, are not needed
            raise Refused(f"sets the state of a {type(target).__name__}")

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, StandIn):
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
        elif isinstance(target, StandIn):
            target.fill()
        else:
            raise Refused(f"sets items of a {type(target).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()  # it also renews `append`
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
        self.append(self.read(number))  # bytes will do; Python's would make room for as many as are claimed

    def count(self) -> None:
        """Note a container, or an entry of the memo."""
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
    def counted(machine: Unpickler) -> None:
        machine.count()
        run(machine)

    return counted


for _opcode in (
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.MARK, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
):  # fmt: skip
    Unpickler.dispatch[_opcode[0]] = _counted(Unpickler.dispatch[_opcode[0]])


def key(value: Any) -> Any:
    """`value`, which becomes a key: hashing tuples in tuples without end would overflow the stack, or take forever.

    Raises:
        Refused: it is no plain value.
    """
    parts = value if type(value) is tuple else (value,)
    if any(type(part) is int and part.bit_length() > 64 for part in parts):
        raise Refused("has a huge number as a key")  # many of one hash would take forever, and so would showing one
    if isinstance(value, StandIn) or all(type(part) in SCALARS for part in parts):
        return value
    raise Refused(f"has a {type(value).__name__} as a key")


def shown(name: Any) -> str:
    """A name as it may be shown: control characters, which could write on a terminal, are escaped."""
    name = name if isinstance(name, str) else str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def brief(value: Any) -> str:
    """An argument as a message shows it: a tuple that holds another twice, and so on, is small, its text endless."""
    return repr(value[:40]) if type(value) in (str, bytes) else f"a {type(value).__name__}"


def pairs(items: list[Any]) -> dict[Any, Any]:
    """A dictionary of (key, value, key, value, ...)."""
    return {key(items[i]): items[i + 1] for i in range(0, len(items), 2)}


class _Bounded:
    """A file that allocates for no more bytes than it has."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length = file, length
        self.readline = file.readline

    def read(self, number: int) -> bytes:
        if number < 0 or number > self._length - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.read(number)


def unpickle(content: bytes, names: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle in memory holds; raises as `Unpickler.load` does."""
    return Unpickler(io.BytesIO(content), len(content), names, storage).load()
