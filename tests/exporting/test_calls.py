"""Exported programs called from several threads and from forked processes, and descriptions that cannot be true."""

import copy
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch

from doublehead.config import Recipe
from doublehead.engine.errors import UserError
from doublehead.exporting import load
from doublehead.exporting.calls import PackageCall
from doublehead.exporting.description import describe, flaw_of


def in_threads(number, work):
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_package_works_on_one_call_at_a_time():
    """`test_export` has real packages."""
    inside, results = [], {}

    def compiled(pixels, sizes):
        assert not inside
        inside.append(pixels)
        time.sleep(0.001)
        inside.pop()
        return [pixels + 1]

    call = PackageCall(compiled)
    in_threads(8, lambda i: results.__setitem__(i, [call(torch.tensor([i]), None)[0].item() for _ in range(5)]))
    assert results == {i: [i + 1] * 5 for i in range(8)}

    def fails(pixels, sizes):
        raise ValueError("once")

    call = PackageCall(fails)
    for _ in range(2):  # a failure leaves it open
        with pytest.raises(ValueError, match="once"):
            call(torch.zeros(1), None)


def test_a_package_is_refused_in_a_forked_process(monkeypatch):
    call = PackageCall(lambda pixels, sizes: [pixels])
    assert call(torch.ones(1), None) == [torch.ones(1)]
    before = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: before + 1)
    with pytest.raises(RuntimeError, match=f'opened in process {before}, of which .* is a fork.* "spawn"'):
        call(torch.ones(1), None)


SESSIONS = """
import os, signal, sys, threading
import onnx, onnxruntime, torch
from onnx import TensorProto, helper
from doublehead.exporting.calls import SessionCall

signal.alarm(60)
torch.set_num_threads(1)  # its own would be missed by the forked process, whatever ONNX does
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("pixels", "sizes", "sum")]
nodes = [helper.make_node("MatMul", ["pixels", "sizes"], ["product"]), helper.make_node("Exp", ["product"], ["sum"])]
model = helper.make_model(helper.make_graph(nodes, "g", values[:2], values[2:]),
                          opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = 3, 3
options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL  # waits for its threads, as any session may

def open_session():
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

call, x = SessionCall(open_session, open_session()), torch.rand(400, 400) / 100
expected = call(x, x)[0]

def right():
    return all(torch.equal(call(x, x)[0], expected) for _ in range(5))

results = []
threads = [threading.Thread(target=lambda: results.append(right())) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert results == [True] * 6
child = os.fork()
if child == 0:
    signal.alarm(20)  # not inherited
    os._exit(0 if right() else 3)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert right()
print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_onnx_session_in_threads_and_forked_processes():
    """A session that waits for threads of its own would never answer after a fork."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name, reason="pip install 'doublehead[onnx]'")
    done = subprocess.run([sys.executable, "-c", SESSIONS], capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", (done.returncode, done.stderr[-2000:])


NOTE = describe("aoti", Recipe(), ["a"], [1], (1, 3, 64, 96), "cpu")
FLAWS = {
    "terabytes": (lambda note: note["inputs"]["pixels"].update(shape=[2**20, 3, 2**20, 64]), "inputs' shapes are"),
    "negative": (lambda note: note["inputs"]["pixels"].update(shape=[1, 3, -64, 96]), "not lists of positive integers"),
    "fractions": (lambda note: note["inputs"]["sizes"].update(shape=[1.0, 2]), "not lists of positive integers"),
    "another size": (lambda note: note["inputs"]["sizes"].update(shape=[2, 2]), "inputs' shapes are"),
    "no inputs": (lambda note: note.pop("inputs"), "'inputs' (KeyError)"),
    "a list": (lambda note: note.update(inputs=[1]), "TypeError"),
    "classes": (lambda note: note.update(classes=[1, 2]), "not a list of names"),
    "the images": (lambda note: note.update(preprocessing=None), "AttributeError"),
    "a switch": (lambda note: note.update(dynamic_batch="yes"), "has the wrong type"),
}


@pytest.mark.parametrize("kind", FLAWS)
def test_descriptions_that_cannot_be_true(tmp_path, kind):
    assert flaw_of(NOTE) is None
    change, message = FLAWS[kind]
    note = copy.deepcopy(NOTE)
    change(note)
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/extra/doublehead.json", json.dumps(note))
    with pytest.raises(UserError) as refused:
        load(tmp_path / "a.pt2")
    assert str(refused.value).startswith(f"{tmp_path / 'a.pt2'}: its description cannot be used: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{"])
def test_descriptions_that_are_none(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/extra/doublehead.json", content)
    with pytest.raises(UserError, match="not a detector that `doublehead export` wrote"):
        load(tmp_path / "a.pt2")
