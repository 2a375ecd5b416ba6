"""Makes the committed records in evidence/records out of what evidence/run.sh left in its folder.

python evidence/record.py bccd [NAME] FOLDER    runs KIND-SEED in FOLDER, as NAME.json (bccd.json)
python evidence/record.py own-data FOLDER       runs own-SEED and from-SEED in FOLDER
python evidence/record.py precision FOLDER      runs in FOLDER with int8.json and gate.json
python evidence/record.py heads NAME FILE...    heads.json of `doublehead analyze heads`, as heads-NAME.json; seeds in
                                                several files, earlier records among them, join
python evidence/record.py figure FILE           the JSON file of another `doublehead analyze`, and its pictures

--start FOLDER: the run of `shapes-ext` that trainings started from; --commit SHA: with what they were made, if not with
what is checked out now; --seconds FILE --part PART: where run.sh kept the wall time; --out, --pictures FOLDER: where
they go.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doublehead.analysis.provenance import provenance

RECORDS = Path(__file__).resolve().parent / "records"
PICTURES = RECORDS.parent.parent / "docs" / "evidence"
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
BCCD = "BCCD, VOC layout: 205 training and 87 validation images, 3 classes"
KINDS = ("fc", "double_fc", "double_head", "double_head_ext")
COMMANDS = {
    "bccd": "doublehead train bccd-small --data.root DATA --data.on-bad-record skip --data.workers 1 "
    "--model.backbone.weights START/model.safetensors --model.backbone.norm frozen_batch_norm "
    "--model.backbone.frozen-stages 2 --model.head.kind KIND --train.steps {steps} --train.milestones {milestones} "
    "--train.warmup-steps 50 --train.eval-every 240 --train.checkpoint-every 120 --train.seed SEED --out KIND-SEED",
    "own": "doublehead train --data.root DATA --train.seed SEED --data.workers 1 --out own-SEED",
    "from": "doublehead train --from START --data.root DATA --train.seed SEED --data.workers 1 --out from-SEED",
}
"""Of each training; START: `doublehead train shapes-ext --out START`."""


def of_trainings(what: str, folder: Path, kinds: tuple[str, ...], commands: list[str]) -> dict[str, Any]:
    """The record of whole trainings, in folders KIND-SEED; runs that have not ended are left out.

    Raises:
        SystemExit: there is no run, or runs of one kind, or of different kinds, differ in more than they may.
    """
    found = [(kind, int(path.name.rpartition("-")[2]), path) for kind in kinds for path in ended(folder, kind)]
    if not found:
        raise SystemExit(f"{folder}: no run of {', '.join(kinds)} has ended")
    one_recipe([path for _, _, path in found])
    runs = [{"kind": kind, "seed": seed} | measured(path) for kind, seed, path in found]
    return {
        "what": what,
        **provenance(),
        "command": "; ".join(commands),
        "date": max(
            datetime.date.fromtimestamp((path / "metrics.json").stat().st_mtime) for _, _, path in found
        ).isoformat(),
        "seeds": sorted({seed for _, seed, _ in found}),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "data": BCCD,
        "runs": runs,
    }


def ended(folder: Path, kind: str) -> Iterator[Path]:
    """The run folders of a kind that have their last evaluation."""
    for path in sorted(folder.glob(f"{kind}-*")):
        if path.name.removeprefix(f"{kind}-").isdigit() and (path / "metrics.json").exists():
            yield path


def one_recipe(folders: list[Path]) -> None:
    """Hold the runs' recipes equal in everything but seed and kind of head.

    Raises:
        SystemExit: they are not.
    """
    recipes = []
    for folder in folders:
        recipe = json.loads((folder / "recipe.json").read_text())
        del recipe["train"]["seed"], recipe["model"]["head"]["kind"]
        recipes.append(recipe)
    for folder, recipe in zip(folders, recipes, strict=True):
        if recipe != recipes[0]:
            raise SystemExit(f"{folder}: its recipe is not that of {folders[0]}, apart from seed and kind")


def measured(folder: Path) -> dict[str, Any]:
    """What a run's `metrics.json` and `log.jsonl` say."""
    metrics = json.loads((folder / "metrics.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        **{name: metrics[name] for name in ("seconds", "step", *NUMBERS, "best")},
        "AP_by_step": {str(line["step"]): line["AP"] for line in log if "AP" in line},
        "loss": [[line["step"], round(line["loss"], 4)] for line in log if "loss" in line],
    }


def bccd(folder: Path, start: Path | None) -> dict[str, Any]:
    """The record of BCCD, with what all runs start from."""
    found = of_trainings(
        "BCCD from the backbone of generated shapes: kinds of heads, everything else equal", folder, KINDS, []
    )
    one = found["runs"][0]
    train = json.loads((folder / f"{one['kind']}-{one['seed']}" / "recipe.json").read_text())["train"]
    milestones = " ".join(map(str, train["milestones"]))
    found["command"] = COMMANDS["bccd"].format(steps=train["steps"], milestones=milestones)
    return found | started(start)


def started(folder: Path | None) -> dict[str, Any]:
    """What trainings started from: the demonstration's own numbers."""
    if folder is None:
        return {}
    metrics = json.loads((folder / "metrics.json").read_text())
    numbers = {name: metrics[name] for name in ("step", "seconds", *NUMBERS)}
    return {"start": {"command": "doublehead train shapes-ext --out START", **numbers}}


def own_data(folder: Path, start: Path | None) -> dict[str, Any]:
    """The record of the trial in docs/own-data.md."""
    what = "BCCD with the recipe own-data: from scratch, and from the demonstration"
    parts = [of_trainings(what, folder, (kind,), [COMMANDS[kind]]) for kind in ("own", "from")]
    found = parts[0] | {"command": "; ".join(part["command"] for part in parts)}
    found["runs"] = [run for part in parts for run in part["runs"]]
    found["seconds"] = round(sum(part["seconds"] for part in parts), 1)
    return found | started(start)


def precision(folder: Path) -> dict[str, Any]:
    """What int8 and a gate cost the models in `folder`, by the files that `quantize` and `calibrate` left beside them.

    Raises:
        SystemExit: none has both.
    """
    files = [
        [path.parent / name for name in ("int8.json", "gate.json")] for path in sorted(folder.glob("*/recipe.json"))
    ]
    files = [pair for pair in files if all(path.exists() for path in pair)]
    if not files:
        raise SystemExit(f"{folder}: no model has both int8.json and gate.json")
    runs = []
    for int8_file, gate_file in files:
        int8, gate = (json.loads(path.read_text()) for path in (int8_file, gate_file))
        recipe = json.loads((int8_file.parent / "recipe.json").read_text())
        runs.append(
            {"model": int8_file.parent.name, "seed": recipe["train"]["seed"], "images": int8["measured"]["images"],
             "bits": int8["measured"]["bits"], "fp32": int8["measured"]["fp32"], "int8": int8["measured"]["int8"],
             "in_int8": len(int8["scales"]), "left_out": len(int8["left_out"]), "gate": gate["gate"],
             "gated": gate["AP"]["with"], "survivors": gate["survivors"]}
        )  # fmt: skip
    times = [path.stat().st_mtime for pair in files for path in pair]
    return {
        "what": "What int8 and a gate cost: AP on validation images",
        **provenance(),
        "command": "doublehead quantize MODEL --images 64; doublehead calibrate MODEL",
        "date": datetime.date.fromtimestamp(max(times)).isoformat(),
        "seeds": sorted({run["seed"] for run in runs}),
        "seconds": round(max(times) - min(times), 1),
        "runs": runs,
    }


def heads(name: str, files: list[Path]) -> dict[str, Any]:
    """One `heads.json`, or several of different seeds, with shorter numbers."""
    found = joined(files)
    seconds = sum(one["seconds"] for one in found["trainings"]) + found["features"]["seconds"]
    return {"what": f"Heads alone, side by side: {name}", **shortened(found), "seconds": round(seconds, 1)}


def joined(files: list[Path]) -> dict[str, Any]:
    """Several `heads.json` in one; commit, date and machine at its top are the last file's, each training has its own.

    Raises:
        SystemExit: they are of different trainings or have no digest to tell by, or of a GPU in part, or share a seed.
    """
    contents = [json.loads(file.read_text()) for file in files]
    last = contents[-1]
    for file, content in zip(files[:-1], contents[:-1], strict=True):
        if content.get("digest") is None or content["digest"] != last.get("digest"):
            raise SystemExit(f"{file}: its trainings differ from those of {files[-1]} in more than seeds (digest)")
        if content["variants"] != last["variants"]:
            raise SystemExit(f"{file}: its variants are not those of {files[-1]}")
    gpus = {one.get("machine", {}).get("gpu") for content in contents for one in content["trainings"]}
    if len(gpus) > 1:
        raise SystemExit(f"trained on {' and on '.join(sorted(name or 'a CPU' for name in gpus))}: they do not join")
    seeds = sorted(seed for content in contents for seed in content["seeds"])
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"seeds {seeds}: one is in two files")
    rows = {name: [row for content in contents for row in content[name]] for name in ("trainings", "results", "heads")}
    return last | {"seeds": seeds} | rows


def figure(file: Path) -> dict[str, Any]:
    """The record beside a figure, with the seeds of its heads."""
    found = shortened(json.loads(file.read_text()))
    origin = found["heads"]
    if isinstance(origin, dict):  # Figure 6, of another record
        seeds = json.loads(Path(origin["record"]).read_text())["seeds"]
        return {"what": f"Figure {found['figure']}", "seconds": 0.0} | found | {"seeds": seeds}  # measures nothing
    seeds = {int(seed) for one in origin for seed in re.findall(r"-seed(\d+)", one["checkpoint"])}
    return {"what": f"Figure {found['figure']}", **found, "seeds": sorted(seeds)}


def shortened(value: Any) -> Any:
    """The same with numbers of at most five decimals."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: shortened(one) for key, one in value.items()}
    return [shortened(one) for one in value] if isinstance(value, list) else value


def write(path: Path, record: dict[str, Any]) -> None:
    """As JSON, a line for each run or row."""
    lines = []
    for name, value in record.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n ]" if rows else json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def wall_seconds(file: Path, part: str) -> int:
    """How long a part of run.sh took, all its calls together.

    Raises:
        SystemExit: the part never ended.
    """
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    found = [int(seconds) for name, seconds in lines if name == part]
    if not found:
        raise SystemExit(f"{file}: {part} has not ended")
    return sum(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bccd", "own-data", "precision", "heads", "figure"))
    parser.add_argument("where", nargs="+")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--seconds", type=Path)
    parser.add_argument("--part")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args()
    *names, place = options.where
    match options.what:
        case "bccd":
            name, found = (names or ["bccd"])[0], bccd(Path(place), options.start)
        case "own-data":
            name, found = "own-data", own_data(Path(place), options.start)
        case "precision":
            name, found = "precision", precision(Path(place))
        case "heads":
            name, files = options.where[0], options.where[1:]
            name, found = f"heads-{name}", heads(name, [Path(file) for file in files])
        case _:
            found = figure(Path(place))
            name = found["figure"]
    if options.commit:
        for one in (found, *found.get("trainings", [])):
            one["commit"] = options.commit
    if options.seconds:
        found["wall_seconds"] = wall_seconds(options.seconds, options.part)
    if options.what == "figure":
        for picture in Path(place).parent.glob(f"{name}*.png"):
            shutil.copy(picture, options.pictures)
    write(options.out / f"{name}.json", found)
    print(options.out / f"{name}.json")


if __name__ == "__main__":
    main()
