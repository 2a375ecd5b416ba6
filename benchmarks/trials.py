"""The trial on blood cells in docs/own-data.md: three seeds of `own-data`, from scratch and from the demonstration.

python benchmarks/trials.py run FOLDER DATA          trains into FOLDER, ten minutes a run; what is there stays
python benchmarks/trials.py record FOLDER MACHINE    writes docs/bccd.json from the runs there, naming the machine
python benchmarks/trials.py                          rewrites the table in docs/own-data.md from docs/bccd.json
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "bccd.json"
PAGE = ROOT / "docs" / "own-data.md"
SEEDS = (0, 1, 2)
KINDS = {"own": "`own-data`, from scratch", "from": "`own-data --from` the demonstration"}
NUMBERS = ("AP", "AP50", "AP75")


def run(folder: Path, data: Path) -> None:
    """Train the demonstration and both kinds with each seed."""

    def train(name: str, *options: str) -> None:
        if not (folder / name / "metrics.json").exists():
            command = [sys.executable, "-m", "doublehead", "train", *options, "--out", str(folder / name)]
            subprocess.run(command, check=True)

    train("demo", "shapes-ext")
    for seed in SEEDS:
        options = ["--data.root", str(data), "--train.seed", str(seed), "--data.workers", "1"]
        train(f"own-{seed}", *options)
        train(f"from-{seed}", "--from", str(folder / "demo"), *options)


def record(folder: Path) -> dict[str, Any]:
    """What the runs in `folder` measured, and where."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    demo = json.loads((folder / "demo" / "metrics.json").read_text())
    runs = [
        {"kind": kind, "seed": seed} | _measured(folder / f"{kind}-{seed}") for kind in KINDS for seed in SEEDS
    ]  # fmt: skip
    return {
        "data": "BCCD, VOC layout: 205 training and 87 validation images, 3 classes",
        "demonstration": {name: demo[name] for name in NUMBERS},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "runs": runs,
    }


def _measured(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        **{name: metrics[name] for name in ("seconds", "step", *NUMBERS, "best")},
        "AP_by_step": {str(line["step"]): line["AP"] for line in log if "AP" in line},
    }


def table(recorded: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    rows = ["| | " + " | ".join(["AP after 96 steps", *NUMBERS, "minutes"]) + " |", "|" + " --- |" * 6]
    for kind, words in KINDS.items():
        runs = [entry for entry in recorded["runs"] if entry["kind"] == kind]
        early = [100 * entry["AP_by_step"]["96"] for entry in runs]
        columns = [early, *([100 * entry[name] for entry in runs] for name in NUMBERS)]
        minutes = mean(entry["seconds"] for entry in runs) / 60
        cells = [f"{mean(values):.1f} ± {stdev(values):.1f}" for values in columns]
        rows.append(f"| {words} | " + " | ".join([*cells, f"{minutes:.1f}"]) + " |")
    return "\n".join([*rows, "", _described(recorded)])


def _described(recorded: dict[str, Any]) -> str:
    runs = recorded["runs"]
    threads = "one thread" if recorded["threads"] == 1 else f"{recorded['threads']} threads"
    return (
        f"{runs[0]['step']} steps of 4 images; {recorded['machine']}, {threads}, the other core busy; torch "
        f"{recorded['torch']}; {recorded['date']}, commit {recorded['commit']}. The time includes five evaluations. "
        f"The demonstration had AP {100 * recorded['demonstration']['AP']:.1f} on its own pictures."
    )


def page() -> str:
    """docs/own-data.md with the table of the record."""
    text = table(json.loads(RECORD.read_text()))
    begin, end = "<!-- bccd begin -->", "<!-- bccd end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", PAGE.read_text(), flags=re.DOTALL)


def main() -> None:
    match sys.argv[1:]:
        case ["run", folder, data]:
            run(Path(folder), Path(data).resolve())
        case ["record", folder, machine]:
            RECORD.write_text(json.dumps(record(Path(folder)) | {"machine": machine}, indent=1) + "\n")
        case []:
            PAGE.write_text(page())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
