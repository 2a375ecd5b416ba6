"""What a training says and writes down: its log, TensorBoard's events, warnings, and errors in one line."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading

import pytest

from doublehead import errors
from doublehead.data import DataError
from doublehead.engine import errors as engine_errors
from doublehead.engine.logs import RunLog, counted_warnings, read_log
from doublehead.errors import UserError, shown_to_user

RECORD = {"step": 1, "lr": 0.5, "loss": 2.0, "loss_cls": 2.0, "images_per_second": 3.0, "time": 4.0}


def test_a_log_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="log.jsonl, line 2"):
        read_log(path)


def test_warnings_are_shown_once_and_counted(capsys):
    import warnings

    with counted_warnings() as counts:
        for _ in range(3):
            warnings.warn("this and\nthat", stacklevel=1)
        warnings.warn("other", stacklevel=1)
    assert dict(counts) == {"UserWarning: this and that": 3, "UserWarning: other": 1}
    shown = capsys.readouterr().err
    assert shown.count("warning: UserWarning: this and that\n") == 1 and "3 times: UserWarning: this and" in shown


# ---------------------------------------------------------------------- a log that is not whole

FOREIGN = {
    b"\xff\xfe\x00\x81": "not JSON", b"[1]": "not an object with a step", b"3": "not an object with a step",
    b'{"a": 1}': "not an object with a step", b'{"step": true}': "not an object with a step",
    b'{"step": 2, "lr": 1, "loss": "x"}': "loss is not a number", b'{"step": 2, "loss": 1}': "loss without lr",
    b"[" * 100000: "not JSON", b"": "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_lines_are_left_out_with_a_word_and_kept_beside(tmp_path, capsys, line):
    path = tmp_path / "log.jsonl"
    whole = json.dumps(RECORD).encode() + b"\n" + line + b"\n" + json.dumps(RECORD | {"step": 2}).encode() + b"\n"
    path.write_bytes(whole)
    with pytest.raises(UserError, match="log.jsonl, line 2: not a record of a training") as caught:
        read_log(path)
    assert FOREIGN[line] in str(caught.value)
    RunLog(tmp_path, 2, lambda record: record["step"] <= 2).close()
    assert [record["step"] for record in read_log(path)] == [1, 2]
    assert (tmp_path / "log.jsonl.damaged-1").read_bytes() == whole
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 lines that are no records are left out, the first is line 2" in said
    RunLog(tmp_path, 2, lambda record: True).close()  # it is whole now
    assert not capsys.readouterr().out and not (tmp_path / "log.jsonl.damaged-2").exists()


# ---------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("room", [0, 30, 150, 700, 1500])
@pytest.mark.parametrize("victim", ["log.jsonl", "tensorboard"])
def test_a_disk_that_fills_up_is_one_error_here_and_now(tmp_path, monkeypatch, victim, room):
    log = RunLog(tmp_path)
    file = tmp_path / "log.jsonl" if victim == "log.jsonl" else next((tmp_path / "tensorboard").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    threads = threading.active_count()
    if victim == "log.jsonl":
        monkeypatch.setattr(log._board, "write", lambda *args: None)
    else:
        monkeypatch.setattr(log, "_file", open(os.devnull, "wb", buffering=0))  # noqa: SIM115 (closed by the log)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + room, before[1]))
    try:
        with pytest.raises(UserError, match=f"{victim}.*: cannot be written: .*--resume goes on from the last"):
            for step in range(1, 100):
                log.write(RECORD | {"step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.close()  # nothing is left to be written
    assert threading.active_count() == threads
    assert all(record["loss"] == 2.0 for record in read_log(tmp_path / "log.jsonl"))


def test_tensorboard_reads_the_events(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(RECORD | {"step": step, "loss": 1 / step})
    log.write({"step": 3, "AP": 0.25, "AP50": 0.5, "APl": None})
    log.close()
    RunLog(tmp_path, 2, lambda record: record["step"] <= 2).close()  # step 3 is to be repeated
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/lr", "train/loss", "train/loss_cls", "speed/images_per_second",
                                             "val/AP", "val/AP50"}  # fmt: skip
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


# ---------------------------------------------------------------------- errors in one line


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("this\n  and that"), 2, "error: this and that\n"),
        (DataError("a.png: no image"), 2, "error: a.png: no image\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "error: x/y: No space left on device\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2, "error: x: Is a directory\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (BrokenPipeError(), 141, "error: the program that reads the output has ended (broken pipe)\n"),
    ],
)
def test_a_command_line_shows_one_line(capsys, error, code, said):
    with pytest.raises(SystemExit) as stop, shown_to_user():
        raise error
    assert stop.value.code == code and capsys.readouterr().err == said


def test_the_errors_import_nothing_of_the_library():
    """So that every package may raise them; and the names that scripts import stay one class each."""
    command = (
        "import sys, doublehead.errors; "
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in ('doublehead', 'torch', 'tyro')))"
    )
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert loaded == "['doublehead', 'doublehead.errors', 'doublehead.version']\n"  # the package itself has a version
    assert DataError is errors.DataError and issubclass(DataError, UserError) and DataError("x").exit_code == 2
    for name in ("CheckpointError", "UserError", "config_errors", "shown_to_user"):
        assert getattr(engine_errors, name) is getattr(errors, name)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"), shown_to_user():
        raise ValueError("a bug")
