"""Files of weights: real ones are read bit for bit, and no file reaches code, or memory that it does not fill."""

import argparse
import collections
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from doublehead.weights import WeightsError, pickles, read_plain
from tests.support.weight_files import ARRAYS, LAUGHS, TENSORS, read


def same(found, array):
    expected = np.asarray(array)
    expected = expected.astype(expected.dtype.newbyteorder("="))
    if expected.dtype == np.float16:
        expected = expected.astype(np.float32)  # weights are read so
    assert found.shape == expected.shape
    assert found.numpy().dtype == expected.dtype and found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("old", [False, True], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_numpy_bit_for_bit(tmp_path, protocol, old):
    content = pickle.dumps({"model": collections.OrderedDict(ARRAYS), "epoch": np.int64(3)}, protocol)
    if old:
        content = renamed(content, protocol)
    (tmp_path / "m.pkl").write_bytes(content)
    tensors = read(tmp_path / "m.pkl").tensors
    assert list(tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        same(tensors[name], array)


def renamed(content, protocol):
    """With the modules' names of numpy 1, which are a letter shorter."""
    modern, old = b"numpy._core.", b"numpy.core."
    if protocol < 4:  # names end with their lines
        return content.replace(modern, old)
    for name in (b"multiarray", b"numeric"):  # a length of one byte before each; and the length of the frame
        full = modern + name
        content = content.replace(bytes([len(full)]) + full, bytes([len(full) - 1]) + old + name)
    return content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]


def test_arrays_of_python_2(tmp_path):
    """Its arrays are strings, and its dictionaries lists of pairs."""
    data = bytes(range(0, 256, 16)).decode("latin1")
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nI2\nt"
    array += dtype + b"I00\n" + f"S{data!r}\n".encode("latin1") + b"tb"
    (tmp_path / "m.pkl").write_bytes(
        b"(dp0\nS'model'\nccollections\nOrderedDict\n((lp1\n(lp2\nS'a'\na" + array + b"aatRs."
    )
    same(read(tmp_path / "m.pkl").tensors["a"], np.frombuffer(data.encode("latin1"), "<f4").reshape(2, 2))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_torch_bit_for_bit(tmp_path, zipped, protocol):
    parameter = torch.nn.Parameter(torch.randn(2))
    parameter.note = "an attribute"  # saved by another function of torch
    content = {"state_dict": collections.OrderedDict(TENSORS, noted=parameter), "optimizer": {"x": torch.zeros(3)}}
    torch.save(content, tmp_path / "m.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "m.pth")
    assert list(found.tensors) == [*TENSORS, "noted"] and list(found.others) == ["optimizer"]
    for name, tensor in (TENSORS | {"noted": parameter}).items():
        expected = tensor.detach().float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor.detach()
        assert found.tensors[name].dtype == expected.dtype and torch.equal(found.tensors[name], expected)


def test_what_trainers_put_beside_weights_is_dropped_unread(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("/tmp"), nested=argparse.Namespace(x=[1])),
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "state": optimizer.state_dict(),
        "counts": collections.Counter("abc"),
        "default": collections.defaultdict(list, a=[1]),
        "queue": collections.deque([1], 3),
        "numbers": {1, 2j},
        "fixed": frozenset({1}),
        "size": torch.Size([2]),
        "device": torch.device("cpu"),
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
        found = read(tmp_path / "m.pth")
        assert torch.equal(found.tensors["weight"], model.weight) and set(found.others) == set(content) - {"model"}
    for protocol in range(6):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": {"a": np.ones(1)}, "args": content["args"]}, protocol))
        assert read(tmp_path / "m.pkl").tensors["a"] == 1


# ---------------------------------------------------------------------------------------------
# Files that a program would not write

DTYPE = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR"
LITTLE = DTYPE + b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
NEW = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
BIG = b"I1000000000000\n"


def array_of(dtype=LITTLE, shape=b"(I1\nt", data=b"S'abcd'\n", fortran=b"I00\n"):
    return NEW + b"(I1\n" + shape + dtype + fortran + data + b"tb"


HOSTILE = {
    "uninitialised": b"cnumpy\nndarray\n((I1000\ntS'f4'\ntR",
    "foreign memory": b"cnumpy\nndarray\n((I4\ntS'f4'\nS'0123456789abcdef'\nI-64\ntR",
    "a view": b"cnumpy\nndarray\n((I4\ntS'f4'\nS'0123456789abcdef'\nI0\n(I400\nttR",
    "a class's new": b"cnumpy\nndarray\n((I1000\ntS'f4'\nt\x81",
    "reconstructed": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000\ntS'f4'\ntR",
    "never filled": NEW,
    "filled twice": array_of() + b"(I1\n(I1\nt" + LITTLE + b"I00\nS'abcd'\ntb",
    "too short": array_of(shape=b"(I1000\nt"),
    "too long": array_of(data=b"S'abcdefgh'\n"),
    "no data": array_of(data=b"N"),
    "a list of objects": array_of(dtype=b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR", data=b"(lI1\na"),
    "pointers": array_of(dtype=b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR"),
    "void": array_of(dtype=b"cnumpy\ndtype\n(S'V4'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt(dS'a'\n(" + DTYPE
                           + b"I0\ntsI4\nI1\nI63\ntb"),
    "fields": array_of(dtype=DTYPE + b"(I3\nS'<'\nN(S'a'\nt(dI4\nI1\nI63\ntb"),
    "item size": array_of(dtype=DTYPE + b"(I3\nS'<'\nNNNI400\nI-1\nI0\ntb"),
    "flags": array_of(dtype=DTYPE + b"(I3\nS'<'\nNNNI-1\nI-1\nI63\ntb"),
    "a string": array_of(dtype=b"cnumpy\ndtype\n(S'S4'\nI0\nI1\ntR"),
    "complex": array_of(dtype=b"cnumpy\ndtype\n(S'c8'\nI0\nI1\ntR", data=b"S'abcdefgh'\n"),
    "date": array_of(dtype=b"cnumpy\ndtype\n(S'M8'\nI0\nI1\ntR", data=b"S'abcdefgh'\n"),
    "many types": array_of(dtype=b"cnumpy\ndtype\n(S'f4,f4'\nI0\nI1\ntR", data=b"S'abcdefgh'\n"),
    "byte order": array_of(dtype=DTYPE + b"(I3\nS'?'\nNNNI-1\nI-1\nI0\ntb"),
    "negative": array_of(shape=b"(I-1\nt"),
    "fractions": array_of(shape=b"(F1.0\nt"),
    "overflow": array_of(shape=b"(" + b"I4611686018427387904\n" * 4 + b"I0\nt", data=b"S''\n"),
    "dimensions": array_of(shape=b"(" + b"I1\n" * 100 + b"t"),
    "a huge empty one": array_of(shape=b"(I0\nI9223372036854775807\nI9223372036854775807\nt", data=b"S''\n"),
    "a number's type": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRS'abcdefgh'\ntR",
    "a number's bytes": b"cnumpy.core.multiarray\nscalar\n(" + LITTLE + b"S'abc'\ntR",
    "a buffer": b"cnumpy.core.numeric\n_frombuffer\n(S'abcd'\n" + LITTLE + b"(I1000\ntS'C'\ntR",
    "an order": b"cnumpy.core.numeric\n_frombuffer\n(S'abcd'\n" + LITTLE + b"(I1\ntS'A'\ntR",
    "axes": b"cnumpy.core.numeric\n_frombuffer\n(S'abcd'\n" + LITTLE + b"(I1\ntS'K'\n(I7\nttR",
    "a function's state": b"cnumpy.core.numeric\n_frombuffer\n(dS'function'\nNsb",
    "a class's state": b"cnumpy\ndtype\n(dS'a'\nI1\nsb",
    "slots": array_of() + b"N(dS'data'\nI1\ns\x86b",
    "a type of types": b"ctorch\nfloat32\n)R",
    "an item": array_of() + b"I0\nI1\ns",
    "bytes of a number": b"c__builtin__\nbytes\n(" + BIG + b"tR",
    "bytearray of a number": b"c__builtin__\nbytearray\n(" + BIG + b"tR",
    "a set of a number": b"c__builtin__\nset\n(" + BIG + b"tR",
    "range": b"c__builtin__\nset\n(c__builtin__\nrange\n(" + BIG + b"tRtR",
    "an extension": b"\x82\x01",
    "persistent": b"Pabc\n",
    "out of band": b"\x97",
    "instance": b"(iposix\nsystem\n",
    "object": b"(cposix\nsystem\nS'true'\no",
    "dotted": b"\x8c\x05numpy\x8c\x10ndarray.__init__\x93",
    "import": b"c__builtin__\n__import__\n(S'os'\ntR",
    "eval": b"c__builtin__\neval\n(S'1'\ntR",
    "an attribute": b"c__builtin__\ngetattr\n(]S'append'\ntR",
    "a codec": b"c_codecs\nencode\n(S'x'\nS'zip'\ntR",
    "optimizer's function": b"\x8c\x0btorch.optim\x8c\x13sgd._use_grad.__new\x93)R",
    "a method": b"\x8c\x15torch.optim.optimizer\x8c\x0eOptimizer.step\x93)R",
    "a name of lines": b"\x8c\x04a\nbc\x8c\x03d\x1be\x93",
    "a name without end": b"c" + b"x" * 10_000 + b"\ny\n",
    "huge bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "huge text": b"\x8d" + struct.pack("<Q", 2**40),
    "huge buffer": b"\x96" + struct.pack("<Q", 2**40),
    "huge long": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "huge frame": b"\x95" + struct.pack("<Q", 2**40),
    "huge memo": b"Nr" + struct.pack("<I", 2**32 - 1),  # Python's own unpickler makes a table of 64 GB
    "a deep key": b"(d)" + b"\x85" * 100_000 + b"I1\ns",  # whose hash would overflow the stack
    "a deep set": b"\x8f()" + b"\x85" * 100_000 + b"\x90",
    "an endless type": b"cnumpy\ndtype\n" + LAUGHS + b"\x85R",
    "an endless codec": b"c_codecs\nencode\nU\x01a" + LAUGHS + b"\x86R",
    "an endless attribute": b"c__builtin__\ngetattr\nN" + LAUGHS + b"\x86R",
    "endless axes": b"cnumpy.core.numeric\n_frombuffer\n(S'abcd'\n" + LITTLE + b"(I1\nI1\ntS'K'\n" + LAUGHS + LAUGHS
                    + b"\x86tR",
    "nothing": b"",
    "a missing memo": b"h\x07",
    "an empty stack": b"R",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("container", ["pickle", "zip"])
def test_hostile_pickles(tmp_path, kind, container):
    """Every one is refused in one line, without being read as weights, and without much memory."""
    content = b"\x80\x04}X\x05\0\0\0model}X\x01\0\0\0a" + HOSTILE[kind] + b"ss."
    path = tmp_path / "m"
    if container == "pickle":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", content)
            archive.writestr("m/version", "3")
    if kind == "huge memo":
        with pytest.raises(WeightsError, match="'a' is a NoneType"):
            read(path)
        return
    with pytest.raises(WeightsError, match=str(path)) as refused:
        read(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("program", [b"}" * 2000, b"(" * 2000, b"N" + b"\x94" * 2000, b")" + b"\x85" * 2000])
def test_objects_are_counted(tmp_path, monkeypatch, program):
    """A byte may make one of 300 bytes."""
    monkeypatch.setattr(pickles, "MOST_OBJECTS", 1000)
    (tmp_path / "m.pkl").write_bytes(b"\x80\x04" + program + b".")
    with pytest.raises(WeightsError, match="makes more than 1,000 objects"):
        read(tmp_path / "m.pkl")


def test_huge_numbers_in_a_name(tmp_path):
    """Python shows none of more than 4300 digits, nor could a message."""
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02}\x8b" + struct.pack("<i", 8000) + b"\1" * 8000 + b"\x85I1\ns.")
    for attempt in (read, read_plain):
        with pytest.raises(WeightsError, match="a huge number as a key"):
            attempt(tmp_path / "m.pkl")


def test_everything_in_a_file_as_torch_gives_it(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {"format": "x/1", "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "step": 3,
               "half": torch.ones(2).half(), "nested": [(1, {2: None}), {"a"}]}  # fmt: skip
    torch.save(content, tmp_path / "state.pt")
    found, expected = read_plain(tmp_path / "state.pt"), torch.load(tmp_path / "state.pt", weights_only=True)
    assert repr(found) == repr(expected) and found["half"].dtype == torch.half
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    deep = []
    for _ in range(150):
        deep = [deep]
    for wrong, message in ((argparse.Namespace(), "'a' is an object of a class"), (deep, "containers too deeply")):
        torch.save({"a": wrong}, tmp_path / "state.pt", pickle_protocol=4)
        with pytest.raises(WeightsError, match=message):
            read_plain(tmp_path / "state.pt")
    laughs = ["ha"]
    for _ in range(50):  # 2^50 of them, in a file of 1 kB
        laughs = [laughs, laughs]
    torch.save({"a": laughs}, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match="many times more values"):
        read_plain(tmp_path / "state.pt")
