"""How far a training is: one line of at most 80 columns, on a terminal and elsewhere."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest

from doublehead.engine.progress import Progress, bar_line, facts, fitting, seconds_left

RECORD = {"step": 92, "lr": 0.1, "loss": 1.2345, "loss_cls": 1.0, "loss_box": 0.2345, "images_per_second": 12.345}
LONG = RECORD | {"loss": 123456.78, "images_per_second": 12345.6}


def test_the_bar_has_the_total_loss_the_time_left_and_the_speed():
    assert bar_line(92, 240, facts(RECORD, 61), 79) == (
        " 38%|" + "█" * 10 + " " * 18 + "| 92/240, loss 1.234, 1:01 left, 12.3 images/s"
    )
    assert bar_line(120, 240, facts(None, None), 40, plain=True) == " 50%|" + "#" * 13 + " " * 13 + "| 120/240"[:9]


@pytest.mark.parametrize("width", [79, 59, 40, 20, 5])
@pytest.mark.parametrize("record", [None, RECORD, LONG])
def test_no_line_is_wider_than_asked_for(record, width):
    for step, total, left in ((0, 240, None), (92, 240, 61), (9_000_000, 90_000_000, 3600 * 1234.0), (240, 240, 0)):
        line = bar_line(step, total, facts(record, left), width)
        assert len(line) <= width and (f"{step}/{total}" in line or width < 20)
    assert len(fitting(["x" * 100], 79)) == 79


def test_what_has_no_room_is_left_out_whole():
    assert bar_line(92, 240, facts(RECORD, 61), 35) == "92/240, loss 1.234, 1:01 left"
    long = bar_line(9_000_000, 90_000_000, facts(LONG, 3600 * 1234.0), 79)
    assert long.endswith("9000000/90000000, loss 1.235e+05, 1234:00:00 left, 12346 images/s")


def test_the_time_left_is_that_of_the_steps_since_the_start():
    assert seconds_left(10.0, 5, 20) == 40.0 and seconds_left(10.0, 0, 20) is None


def test_elsewhere_plain_lines_say_the_same(capsys):
    progress = Progress(240, 90, shown=True, every=0)
    progress.advance()
    progress.show(LONG)
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"step 91/240, loss 1.235e\+05, \d+:\d\d left, 12346 images/s", line) and len(line) <= 80
    quiet = Progress(240, 90, shown=False, every=0)
    quiet.advance()
    quiet.show(LONG)
    quiet.close()
    assert capsys.readouterr() == ("", "")


SHOW = """
import time
from doublehead.engine.progress import Progress
progress = Progress(90_000_000, 89_999_990, shown=True)
for step in range(5):
    progress.show({"step": step, "loss": 123456.78, "loss_cls": 1.0, "images_per_second": 12345.6})
    time.sleep(0.11)
    progress.advance()
progress.close()
"""


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_on_a_terminal_no_line_is_wider_than_it_nor_than_80_columns(columns):
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    lines = re.split(r"[\r\n]+", seen.decode())
    assert max(len(line) for line in lines) < min(columns, 80)
    shown = [line for line in lines if "left" in line]
    assert shown and all("loss 1.235e+05" in line and "loss_cls" not in line for line in shown)
    assert ("12346 images/s" in seen.decode()) == (columns >= 80)
