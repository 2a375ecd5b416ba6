"""The most important numbers of one GPU, within minutes: each operator and the whole detector beside its peer.

python benchmarks/headline.py                         at most 240 seconds
python benchmarks/headline.py --seconds 150 --out page.json
python benchmarks/headline.py --rows nms_4000 ext_1   these alone
python benchmarks/headline.py --device cpu --small    tiny sizes: tests the script; the times mean nothing

Needs torch, triton, torchvision and the compiled library. Each row's results are checked against its peer before
anything is timed; a row that fails is marked, and the others go on. Rows are printed as they are measured, the most
important first, and together at the end. Rows that do not fit into the time left are listed as skipped. Exit code: 1 if
a row failed, else 0, also without a GPU, where nothing is measured.

"ours" and "peer" are treated alike (see gpu_timing.py): both as CUDA graphs where both can be captured, else both
eager, from the call on an idle device to the end of its work. "device" is the device's own time of ours, which the
predictions are about; "floor" is the share of the least time that the memory allows.

The rows run in a process of their own. If one crashes or hangs, the rest run in a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
MARK = "@row "
"""Starts a line of the child that is meant for the parent."""


class Plan(NamedTuple):
    """A row's title, the seconds it may take on one H100 with preparation and compilation, and its targets."""

    title: str
    seconds: float
    predicted: str
    ratio: float | None = None
    """Least ratio: peer's time / ours."""
    most_us: float | None = None
    """Most microseconds on the device."""
    floor: float | None = None
    """Least share of the floor."""

    def target(self) -> str:
        parts = [f">= {self.ratio:g}x" if self.ratio else "", f"<= {self.most_us:g} us" if self.most_us else ""]
        parts += [f">= {self.floor:.0%} floor" if self.floor else ""]
        return ", ".join(part for part in parts if part) or "-"


PLAN = {
    "roi_forward": Plan("RoIAlign forward 7x7, 512 boxes, channels-last fp32", 4, "50-60 us", 6, floor=0.6),
    "roi_forward_bf16": Plan("  the same, bf16", 2, "36-40 us", 6, floor=0.6),
    "roi_forward_nchw": Plan("  the same, NCHW fp32", 2, "110-130 us", 6, floor=0.6),
    "roi_backward": Plan("RoIAlign backward 7x7, 512 boxes, channels-last fp32", 2, "75-85 us", 6, floor=0.5),
    "roi_backward_bf16": Plan("  the same, bf16", 2, "65-80 us", 6, floor=0.5),
    "nms_4000": Plan("nms, 4,000 boxes, 0.5", 2, "35 us", 6),
    "nms_12000": Plan("nms, 12,000 boxes, 0.5", 2, "135 us", 8),
    "nms_80x1000": Plan("batched_nms, 80 x 1000 boxes, 0.5", 3, "135-160 us", 8, most_us=130),
    "detections": Plan("logits -> 100 detections, 1000 RoIs x 81", 4, "30-35 us", most_us=60),
    "conv_head": Plan("conv-head inference, 1000 RoIs, bf16", 14, "1450-1650 us", 2, most_us=1500),
    "non_local": Plan("non-local block forward, 1000 RoIs, bf16", 5, "550 us", 2.4),
    "ext_1": Plan("Ext R50-FPN, bf16, batch 1, against Faster R-CNN", 25, "3500-4300 us", 3),
    "ext_16": Plan("  the same, batch 16", 20, "48000-56000 us", 1.5),
    "conv_head_training": Plan("conv-head training step, 1000 RoIs, bf16", 12, "8400 us", 1.4),
    "non_local_training": Plan("non-local block with backward, 1000 RoIs, bf16", 6, "1800 us", 1.8),
    "conv_head_fp32": Plan("conv-head inference fp32, PyTorch's own switches", 10, "3300 us", 1),
    "ext_1_fp32": Plan("Ext R50-FPN, fp32, batch 1, against Faster R-CNN", 12, "7600 us", 1),
    "roi_backward_1000": Plan("RoIAlign backward, 1000 boxes, fp32", 2, "100-120 us", 6, floor=0.5),
    "roi_backward_16": Plan("RoIAlign backward, 16 images x 512 boxes, fp32", 6, "640-730 us", 6, floor=0.5),
    "nms_200000": Plan("nms, 200,000 boxes, 0.7", 8, "5000-8000 us", 25),
    "fc_1": Plan("kind fc, bf16, batch 1, against Faster R-CNN", 8, "2400-2800 us"),
}
"""In order of importance, which is the order they run in."""

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------
# The page


def verdict(row: Row) -> str:
    """met, missed, or - where there is no target, no number to hold against it, or the sizes are tiny."""
    if row.get("tiny"):
        return "-"
    plan = PLAN[row["row"]]
    device = row.get("device_us") or row.get("ours_us")
    pairs = [
        (row.get("ratio"), plan.ratio),
        (plan.most_us, plan.most_us and device),  # turned round: at most
        (row.get("share_of_floor"), plan.floor),
    ]
    held = [value >= wanted for value, wanted in pairs if value and wanted]
    if not held:
        return "-"
    return "met" if all(held) else "missed"


def cells(row: Row) -> list[str]:
    plan = PLAN[row["row"]]
    if row["status"] != "measured":
        return [plan.title, *[""] * 5, plan.target(), row["status"].upper(), plan.predicted, row.get("why", "")[:150]]
    share = row.get("share_of_floor")
    return [
        plan.title, f"{row['ours_us']:,.1f}", f"{row['peer_us']:,.1f}", f"{row['ratio']:.2f}x",
        f"{row['device_us']:,.1f}" if row.get("device_us") else "", f"{share:.0%}" if share else "",
        plan.target(), verdict(row), plan.predicted, row["way"],
    ]  # fmt: skip


HEADER = ["case", "ours us", "peer us", "ratio", "device us", "floor", "target", "", "predicted", "how"]
WIDTHS = [52, 10, 11, 8, 10, 6, 19, 7, 16, 0]


def line(values: list[str]) -> str:
    return "  ".join(f"{v:{'<' if i in (0, 6, 7, 8, 9) else '>'}{WIDTHS[i]}}" for i, v in enumerate(values)).rstrip()


def page(rows: list[Row]) -> str:
    return "\n".join(line(values) for values in (HEADER, *(cells(row) for row in rows)))


# ---------------------------------------------------------------------------------------------
# The parent


class Child:
    """A process that measures rows, and its messages, line by line."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for text in self.process.stdout:
            self._lines.put(text.rstrip("\n"))
        self._lines.put(None)

    def next(self, seconds: float) -> str | None:
        """The next line; None at the end. TimeoutError if none comes."""
        try:
            return self._lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


class Run:
    """Measures all rows, in as many processes as necessary."""

    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        self.options, self.command = options, command
        self.deadline = time.time() + options.seconds
        self.rows: list[Row] = []
        self.about: dict[str, Any] = {}

    def measure(self) -> bool:
        """False if there is nothing to measure on."""
        left = list(self.options.rows)
        while left:
            nothing = self._one_process(left)
            if nothing is not None:
                print(nothing, flush=True)
                return False
        return True

    def complete(self) -> None:
        """List the rows that were not measured."""
        done = {row["row"] for row in self.rows}
        for key in self.options.rows:
            if key not in done:
                self._add({"row": key, "status": "skipped", "why": "stopped before its turn"})

    def _one_process(self, left: list[str]) -> str | None:
        """Take measured rows off `left`, at least one; the reason if there is no device."""
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if self.options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        begun, text = {"row": left[0], "limit": 100.0}, ""
        child = Child([*self.command, "--child", str(self.deadline), "--rows", *left], environment)
        try:
            while text is not None:
                # After the last row it only reports the state of the device.
                text = child.next(min(self.deadline - time.time(), begun["limit"] if left else 15))
                if text is None or not text.startswith(MARK):
                    print(text or "", end="\n" if text else "", flush=True)
                    continue
                message = json.loads(text.removeprefix(MARK))
                if "nothing" in message:
                    return message["nothing"]
                if "begin" in message:
                    begun = {"row": message["begin"], "limit": 20 + 3 * PLAN[message["begin"]].seconds}
                elif "about" in message:
                    self.about |= message["about"]
                    self.save()  # the last of them comes after the last row
                else:
                    left.remove(message["row"])
                    self._add(message)
        except TimeoutError:
            late = time.time() >= self.deadline
            if left:
                why = "no time left" if late else f"no answer within {begun['limit']:.0f} s"
                self._add({"row": begun["row"], "status": "skipped" if late else "failed", "why": why})
                left.remove(begun["row"])
        finally:
            code = child.stop()
        if left and text is None:
            self._add({"row": begun["row"], "status": "failed", "why": f"its process ended with code {code}"})
            left.remove(begun["row"])
        return None

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(cells(row)), flush=True)
        self.save()

    def save(self) -> None:
        if self.options.out:
            rows = [row | {"verdict": verdict(row), "plan": PLAN[row["row"]]._asdict()} for row in self.rows]
            self.options.out.write_text(json.dumps(self.about | {"rows": rows}, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="for everything (240)")
    parser.add_argument("--out", type=Path, help="write the page as JSON, too")
    parser.add_argument(
        "--rows", nargs="+", choices=list(PLAN), default=list(PLAN), metavar="ROW", help=", ".join(PLAN)
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.child is not None:
        sys.path.insert(0, str(HERE))
        from headline_child import child

        return child(options, MARK, {key: PLAN[key].seconds for key in options.rows})
    command = [sys.executable, str(HERE / "headline.py"), "--device", options.device]
    run = Run(options, command + ["--small"] * options.small)
    signal.signal(signal.SIGTERM, interrupt)  # stopped from outside, it still prints its page
    print(line(HEADER), flush=True)
    try:
        if not run.measure():
            return 0
    except KeyboardInterrupt:
        print("stopped", flush=True)
        run.complete()
    print(f"\n{json.dumps(run.about)}\n\n{page(run.rows)}", flush=True)
    return 1 if any(row["status"] == "failed" for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
