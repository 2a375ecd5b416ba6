"""Hostile files of torch.save, and a thousand broken ones: refused in one line, never a crash, never much memory."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from doublehead.weights import WeightsError
from tests.support.paths import ROOT
from tests.support.weight_files import ARRAYS, LAUGHS, TENSORS, read

rebuild, rebuild_v3 = torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stored:
    """Pickled as a reference to a storage."""

    def __init__(self, *parts):
        self.parts = parts


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.parts if isinstance(value, Stored) else None


def dumps(content):
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


def archive(path, content, records, **more):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", dumps(content), **more)
        for name, data in records.items():
            file.writestr(f"m/{name}", data, **more)


def storage(number=4, key="0", kind=torch.FloatStorage):
    return Stored("storage", kind, key, "cpu", number)


DATA = struct.pack("<4f", 1, 2, 3, 4)
HUGE = 10**12
HOSTILE = {
    "beyond the storage": (Call(rebuild, storage(), 0, (5,), (1,), False, {}), "more than there are"),
    "an offset beyond it": (Call(rebuild, storage(), 1, (4,), (1,), False, {}), "more than there are"),
    "a stride beyond it": (Call(rebuild, storage(), 0, (2,), (4,), False, {}), "more than there are"),
    "a negative offset": (Call(rebuild, storage(), -1, (4,), (1,), False, {}), "wrong strides"),
    "a negative stride": (Call(rebuild, storage(), 3, (4,), (-1,), False, {}), "sensible shape"),
    "a missing stride": (Call(rebuild, storage(), 0, (2, 2), (1,), False, {}), "wrong strides"),
    "terabytes by stride 0": (Call(rebuild, storage(), 0, (HUGE,), (0,), False, {}), "more than there are"),
    "a wider type": (Call(rebuild_v3, storage(), 0, (4,), (1,), False, {}, torch.float64), "more than there are"),
    "a longer storage": (Call(rebuild, storage(5), 0, (5,), (1,), False, {}), "16 bytes where 5 numbers"),
    "a shorter storage": (Call(rebuild, storage(3), 0, (3,), (1,), False, {}), "16 bytes where 3 numbers"),
    "a negative storage": (Call(rebuild, storage(-4), 0, (4,), (1,), False, {}), "an unknown way"),
    "no record": (Call(rebuild, storage(key="7"), 0, (4,), (1,), False, {}), "no record 'm/data/7'"),
    "another record": (Call(rebuild, storage(key="../data.pkl"), 0, (4,), (1,), False, {}), "no record"),
    "a storage that is none": (Call(rebuild, "x", 0, (4,), (1,), False, {}), "without a storage"),
    "a kind that is none": (Call(rebuild, storage(kind=dict), 0, (4,), (1,), False, {}), "an unknown way"),
    "another reference": (Stored("file", torch.FloatStorage, "0", "cpu", 4), "something other than its own storages"),
    "complex": (Call(rebuild, storage(2, kind=torch.ComplexFloatStorage), 0, (2,), (1,), False, {}),
                "a tensor in a ComplexFloatStorage"),
    "quantised": (Call(torch._utils._rebuild_qtensor, storage(), 0, (4,), (1,), (), False, {}), "a quantised tensor"),
    "sparse": (torch.eye(2).to_sparse(), "a sparse tensor"),
    "on no device": (torch.zeros(3, device="meta"), "without data"),
    "float8": (torch.zeros(16).to(torch.float8_e5m2), "of type float8_e5m2"),
    "a negated view": (Call(rebuild, storage(), 0, (4,), (1,), False, {}, {"neg": True}), "conjugated or negated"),
    "of a class": (Call(torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (HUGE,), (1,), 0,
                        torch.strided, "cpu", False), "of a class of its own"),
    "uninitialised": (Call(torch.FloatTensor, 1000), "names torch.FloatTensor"),
    "uninitialised too": (Call(torch.Tensor, 1000), "a parameter of a int"),
    "a storage of its own": (Call(torch.storage.UntypedStorage, HUGE), "calls a StorageKind"),
    "bytes": (Call(bytearray, HUGE), "makes bytes of a int"),
    "from numpy": (Call(torch._utils._rebuild_device_tensor_from_numpy, np.zeros(2), torch.float32, "cpu", False),
                   "another device"),
    "a parameter of nothing": (Call(torch._utils._rebuild_parameter, [1], False, {}), "a parameter of a list"),
    "a type of a type": (Call(torch._tensor._rebuild_from_type_v2, print, torch.Tensor, (), {}), "names print"),
    "a subclass": (Call(torch._tensor._rebuild_from_type_v2, rebuild, torch.nn.Linear,
                        (storage(), 0, (4,), (1,), False, {}), {}), "names torch.nn.modules.linear.Linear"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensors(tmp_path, kind):
    value, message = HOSTILE[kind]
    path = tmp_path / "m.pth"
    if isinstance(value, torch.Tensor):
        torch.save({"model": {"a": value}}, path)
    else:
        archive(path, {"model": {"a": value}}, {"data/0": DATA, "version": "3"})
    with pytest.raises(WeightsError) as refused:
        read(path)
    assert message in str(refused.value) and str(path) in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_sound_file_made_by_the_same_means(tmp_path):
    """So that the others are refused for what they do, and not for how they are made."""
    archive(tmp_path / "m.pth", {"model": {"a": Call(rebuild, storage(), 1, (3,), (1,), False, {})}}, {"data/0": DATA})
    assert read(tmp_path / "m.pth").tensors["a"].tolist() == [2, 3, 4]
    archive(tmp_path / "b.pth", {"a": Call(rebuild, storage(), 0, (4,), (1,), False, {})},
            {"data/0": struct.pack(">4f", 1, 2, 3, 4), "byteorder": "big"})  # fmt: skip
    assert read(tmp_path / "b.pth").tensors["a"].tolist() == [1, 2, 3, 4]


def test_tensors_of_many_times_the_files_length(tmp_path):
    """Each is sound, but they share their numbers: a copy of every one would be 4 GB."""
    number = 1 << 14
    shared = storage(number)
    names = {f"a{i}": Call(rebuild, shared, 0, (number,), (1,), False, {}) for i in range(2000)}
    archive(tmp_path / "m.pth", names, {"data/0": bytes(4 * number)})
    with pytest.raises(WeightsError, match="many times the file's length"):
        read(tmp_path / "m.pth")


def test_records_that_overlap(tmp_path):
    """A directory may say that many records are the same bytes."""
    keys = [str(i) for i in range(100)]
    content = {f"a{key}": Call(rebuild, storage(1 << 12, key), 0, (1 << 12,), (1,), False, {}) for key in keys}
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", dumps(content))
        file.writestr("m/data/0", bytes(1 << 14))
        first = file.getinfo("m/data/0")
        for key in keys[1:]:
            again = zipfile.ZipInfo(f"m/data/{key}")
            again.header_offset, again.file_size, again.compress_size = first.header_offset, 1 << 14, 1 << 14
            again.CRC = first.CRC
            file.filelist.append(again)
    with pytest.raises(WeightsError, match="longer than the file"):
        read(path)


def test_archives_that_are_no_weights(tmp_path):
    path = tmp_path / "m.pth"
    archive(path, {}, {"constants.pkl": b""})
    with pytest.raises(WeightsError, match="a TorchScript program"):
        read(path)
    archive(path, {"a": 1}, {}, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="a compressed archive"):
        read(path)
    np.savez(tmp_path / "m.npz", a=np.zeros(2))
    with pytest.raises(WeightsError, match="not one of torch.save"):
        read(tmp_path / "m.npz")


@pytest.mark.parametrize("key", [b")" + b"\x85" * 300_000, LAUGHS], ids=["deep", "endless"])
def test_lists_of_tensors_that_cannot_be_hashed(tmp_path, key):
    """Where files before PyTorch 1.6 list their storages: the stack would overflow, or hashing never end."""
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    (tmp_path / "m.pth").write_bytes(b"".join(head) + b"\x80\x02]" + key + b"a.")
    with pytest.raises(WeightsError, match="no list of its tensors"):
        read(tmp_path / "m.pth")


def test_damaged_names_are_seen(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"alpha": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes().replace(b"alpha", b"alphb"))
    with pytest.raises(WeightsError, match="other names or shapes than were written"):
        read(path)


def test_truths_are_0_or_1_whatever_the_file_has(tmp_path):
    """Another byte as a bool is undefined in C++."""
    archive(tmp_path / "m.pth", {"a": Call(rebuild, storage(kind=torch.BoolStorage), 0, (4,), (1,), False, {})},
            {"data/0": b"\0\1\2\xff"})  # fmt: skip
    assert read(tmp_path / "m.pth").tensors["a"].view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_a_flipped_bit_is_seen(tmp_path):
    """torch.load takes the damaged tensor."""
    path = tmp_path / "m.pth"
    torch.save({"a": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(np.ones(9, "<f4").tobytes()) + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="'a': .* a damaged copy"):
        read(path)
    torch.serialization.set_crc32_options(False)  # a file without sums is read all the same
    try:
        torch.save({"a": torch.ones(1000)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(path).tensors["a"].eq(1).all()


FUZZ = """
import pickle, random, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from doublehead.weights import WeightsError, read_file, take_state
from pathlib import Path

before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (before + (256 << 20),) * 2)
rng, path = random.Random(0), Path(sys.argv[2], "mutated")
outcomes = {"read": 0, "refused": 0, "memory": 0}
OPCODES = b"".join(value for name, value in vars(pickle).items() if name.isupper() and type(value) is bytes)
for file in sorted(Path(sys.argv[2]).glob("real-*")):
    content = file.read_bytes()
    programs = content.find(b"PK\\3\\4", 1) if file.suffix == ".zip" else len(content)
    for _ in range(int(sys.argv[3])):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(programs)
            what = rng.randrange(4)
            if what == 0:
                changed[at] = rng.randrange(256)
            elif what == 1:
                changed[at] = rng.choice(OPCODES)
            elif what == 2:
                changed[at:at + 4] = rng.choice([b"\\xff" * 4, b"\\0\\0\\0\\x80", b"\\0" * 4])
            elif file.suffix != ".zip":  # a piece again, elsewhere
                begin = rng.randrange(len(content))
                changed[at:at] = content[begin:begin + rng.randint(1, 40)]
        path.write_bytes(changed)
        try:
            found = take_state(path, read_file(path))
            for tensor in found.tensors.values():
                tensor.float().sum()
                assert tensor.numel() <= len(changed)
            outcomes["read"] += 1
        except WeightsError as error:
            assert "\\n" not in str(error), str(error)
            outcomes["refused"] += 1
            outcomes["memory"] += "allocate" in str(error) or "MemoryError" in str(error)
print(outcomes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_mutated_files_neither_crash_nor_take_memory(tmp_path):
    """Seeded mutations of real files, in a process with 256 MB to spare."""
    state = {name: tensor for name, tensor in TENSORS.items() if name != "parameter"}
    for protocol in (0, 2, 5):
        (tmp_path / f"real-{protocol}.pkl").write_bytes(pickle.dumps({"model": ARRAYS, "epoch": 1}, protocol))
    torch.save({"model": state}, tmp_path / "real.pth", _use_new_zipfile_serialization=False)
    os.rename(tmp_path / "real.pth", tmp_path / "real-old.pth")
    torch.save({"model": state}, tmp_path / "real-new.zip")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(ROOT), str(tmp_path), "80"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    outcomes = eval(done.stdout)
    assert outcomes["refused"] > 200 and outcomes["read"] > 10 and outcomes["memory"] == 0
