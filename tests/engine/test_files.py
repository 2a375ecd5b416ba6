"""Files written at the same time, by processes that are killed, with the permissions of any other file."""

import os
import subprocess
import sys
import threading
import time
import types

import pytest

from doublehead.engine import files
from doublehead.engine.errors import UserError
from doublehead.engine.files import is_temporary, read_recipe, replacing, write_text
from doublehead.engine.picture_files import earlier_pictures


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch):
    """Files left behind are looked for at every write, not only now and then."""
    monkeypatch.setattr(files, "_next_scan", {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writers_at_the_same_time_do_not_tear_the_file(tmp_path):
    path = tmp_path / "file"
    texts = [letter * 300_000 for letter in "ab"]
    with replacing(path) as one, replacing(path) as other:
        one.write_text(texts[0][:1000])
        other.write_text(texts[1])
        with open(one, "a") as file:
            file.write(texts[0][1000:])
    assert path.read_text() == texts[0] and names(tmp_path) == ["file"]  # the last one to end

    torn, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            if (text := path.read_text()) not in texts:
                torn.append(text[:10])

    threads = [threading.Thread(target=lambda text=text: [write_text(path, text) for _ in range(30)]) for text in texts]
    reader = threading.Thread(target=read)
    reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    reader.join()
    assert not torn and names(tmp_path) == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "ours", "x")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    code = (
        "import os, sys; from doublehead.engine.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".another.tmp").touch()  # an earlier version's name
    assert process.returncode == -9 and is_temporary(left) and not list(tmp_path.glob("file*"))
    write_text(tmp_path / "another", "x")
    assert names(tmp_path) == ["another"]


def temporary_of(system, process, folder, age):
    path = folder / f".file.{system}-{process}-0123abcd.tmp"
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path.name


def test_what_others_may_still_be_writing_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()  # its number is not given to another process so soon
    here, elsewhere, minute, week = files.this_system(), "0f0f0f0f", 60, 7 * 24 * 3600
    stay = {
        temporary_of(here, os.getpid(), tmp_path, minute),  # another thread's
        temporary_of(here, os.getppid(), tmp_path, minute),
        temporary_of(elsewhere, gone.pid, tmp_path, minute),  # the number means nothing here
    }
    for process in (gone.pid, 10**30):
        temporary_of(here, process, tmp_path, minute)
    temporary_of(elsewhere, os.getppid(), tmp_path, week)
    for other in (".hidden.tmp", "file.tmp", ".file.zzz-1-0123abcd.tmp"):
        (tmp_path / other).touch()
        os.utime(tmp_path / other, (1, 1))
        stay.add(other)
    write_text(tmp_path / "new", "x")
    assert set(names(tmp_path)) == stay | {"new"}


def test_a_large_folder_is_not_looked_through_at_every_write(tmp_path, monkeypatch):
    looks = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or real(path))
    now = iter([0.0, 0.5, 1.0, 5.0, 10.4, 10.6, 10.7])  # looking takes half a second at first, then a tenth
    monkeypatch.setattr(files, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    for _ in range(5):
        write_text(tmp_path / "file", "x")
    assert len(looks) == 2


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127])
def test_the_longest_names(tmp_path, name):
    write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: texts.append((tmp_path / "pipe").read_text()))
    texts = []
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join()
    assert texts == ["through"] and (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_takes_nothing_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_text("/dev/full", "text")


def test_pipes_in_the_place_of_records_are_not_waited_for(tmp_path):
    for name in ("recipe.json", "detections.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="recipe.json: not a regular file"):
        read_recipe(tmp_path)
    assert earlier_pictures(tmp_path) == []
