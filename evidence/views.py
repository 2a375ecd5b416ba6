"""The tables of the docs, as Markdown, from records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from findings import FINDINGS, Records, Test, fused
from paired import Effect, Sample, paired, sample, verdict
from reading import Record, Seeds, of_runs

from doublehead.analysis.heads.curves import WORDS, crossing, of_heads, over_windows, rois, steps
from doublehead.analysis.heads.specs import BASE
from doublehead.paper.rows import TABLES

PUBLISHED = {
    "fc": "single fc", "conv": "single conv", "double_fc": "double-fc, weighted",
    "double_conv": "double-conv, weighted", "double_head_reverse": "double-head-reverse, weighted",
    "double_head": "double-head, weighted",
}  # fmt: skip
"""Kind -> its row in the paper's Table 1; Ext is in Table 4."""
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LOSS_PARTS = 6
WINDOWS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
REGRESSORS = ("fc: both", "fc: boxes", "conv: both", "conv: boxes", "double_head_ext conv")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, last: bool = False) -> str:
    """A table; all columns but the first `left`, and with `last` the last, are numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    if last:
        rule[-1] = "---"
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def plus_minus(values: Sample | None, digits: int = 1) -> str:
    if values is None:
        return ""
    return f"{values.mean:.{digits}f}" + ("" if values.std is None else f" ± {values.std:.{digits}f}")


def shown(seeds: Seeds, digits: int = 1) -> str:
    """Mean ± sample standard deviation."""
    return plus_minus(sample(list(seeds.values())) if seeds else None, digits)


def signed(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def error(found: Effect, digits: int = 1) -> str:
    return "" if found.error is None else f"{found.error:.{digits + 1}f}"


def interval(found: Effect, digits: int = 1) -> str:
    return "" if found.interval is None else " .. ".join(signed(end, digits) for end in found.interval)


def compared(found: Effect | None, paper: float | None = None, digits: int = 1) -> list[str]:
    """Difference, standard error, effect size, 95 % interval, seeds, verdict."""
    if found is None:
        return [""] * 6
    size = signed(found.size)
    return [signed(found.mean, digits), error(found, digits), size, interval(found, digits), str(found.count),
            verdict(found, paper)]  # fmt: skip


COMPARED = ["difference", "s.e.", "effect size", "95 %", "seeds"]


def kinds_of(record: Record) -> list[str]:
    key = "runs" if "runs" in record else "results"
    found = {one["kind"] for one in record[key] if one.get("variant", BASE) == BASE}
    return [kind for kind in WORDS if kind in found]


def numbers_of(record: Record) -> Callable[[str, str], Seeds]:
    """(kind, metric) -> by seed, for either form of record."""
    get = of_runs if "runs" in record else of_heads
    return lambda kind, metric: get(record, kind, metric)


def published(kind: str) -> str:
    rows = {row.label: row for number in (4, 1) for row in TABLES[number].rows}
    label = PUBLISHED.get(kind, "Double-Head-Ext, R50")
    return f"{rows[label].published[0]:.1f}"


def kinds(record: Record) -> str:
    """Each kind's numbers, mean ± standard deviation; the paper's AP beside."""
    get = numbers_of(record)
    names = [name for name in NUMBERS if any(get(kind, name) for kind in kinds_of(record))]
    rows = [
        [WORDS[kind], str(len(get(kind, "AP"))), published(kind), *(shown(get(kind, name)) for name in names)]
        for kind in kinds_of(record)
    ]
    return markdown(["", "seeds", "AP, paper", *names], rows) + "\n\n" + origin(record)


def differences(record: Record) -> str:
    """Each kind minus the single fc-head, paired by seed."""
    get = numbers_of(record)
    rows = [
        [f"{WORDS[kind]} - single fc", name, *compared(paired(get(kind, name), get("fc", name)))[:-1]]
        for kind in kinds_of(record)
        if kind != "fc"
        for name in ("AP", "AP50", "AP75")
    ]
    return markdown(["", "", *COMPARED], rows, left=2)


def losses(record: Record) -> str:
    """The mean loss in each part of the training, of all seeds of a kind."""
    last = max(run["step"] for run in record["runs"])
    edges = [last * part // LOSS_PARTS for part in range(LOSS_PARTS + 1)]
    rows = []
    for kind in kinds_of(record):
        points = [point for run in record["runs"] if run["kind"] == kind for point in run["loss"]]
        parts = [
            [loss for step, loss in points if low < step <= high]
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
        rows.append([WORDS[kind], *(f"{fmean(part):.2f}" if part else "" for part in parts)])
    header = [f"steps {low + 1} .. {high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return markdown(["mean loss", *header], rows)


def by_step(record: Record) -> str:
    """AP of each kind by evaluated step: whole trainings."""
    points = sorted({int(step) for run in record["runs"] for step in run["AP_by_step"]})
    rows = [
        [WORDS[kind], *(
            shown({run["seed"]: 100 * run["AP_by_step"][str(step)] for run in record["runs"]
                   if run["kind"] == kind and str(step) in run["AP_by_step"]})
            for step in points
        )]
        for kind in kinds_of(record)
    ]  # fmt: skip
    return markdown(["AP after", *(f"{step} steps" for step in points)], rows)


def fusions(record: Record) -> str:
    """Table 3."""
    rows = []
    for row in TABLES[3].rows:
        get = {name: of_heads(record, "double_head_ext", name, **fused(row.fusion)) for name in NUMBERS[:3]}
        minus = of_heads(record, "double_head_ext", "AP", **fused("none"))
        against = compared(paired(get["AP"], minus))[:2] if row.fusion != "none" else ["", ""]
        rows.append([row.label, f"{row.published[0]:.1f}", *(shown(one) for one in get.values()), *against])
    return markdown(["", "AP, paper", *NUMBERS[:3], "AP - none", "s.e."], rows)


def readouts(record: Record) -> str:
    """One Ext read out in four ways (Figure 6)."""
    words = {"fc": "fc-head alone", "conv": "conv-head alone", "split": "fc classes, conv boxes",
             "fused": "fused classes, conv boxes"}  # fmt: skip
    rows = [
        [text, *(shown(of_heads(record, "double_head_ext", name, readout=readout)) for name in NUMBERS[:3])]
        for readout, text in words.items()
    ]
    return markdown(["Ext's read-out", *NUMBERS[:3]], rows)


def curves(record: Record, metric: str = "AP") -> str:
    """AP by RoIs seen, and what double_head has more than fc."""
    chosen = [
        kind for kind in ("fc", "conv", "double_fc", "double_head", "double_head_ext") if kind in kinds_of(record)
    ]
    rows = []
    for step in steps(record):
        get = {kind: of_heads(record, kind, metric, step=step) for kind in chosen}
        against = compared(paired(get["double_head"], get["fc"]))
        cells = [against[0], against[1], against[3]]
        rows.append([f"{rois(record, step):,}", *(shown(one) for one in get.values()), *cells])
    header = [f"{metric} after RoIs", *(WORDS[kind] for kind in chosen), "Double-Head - fc", "s.e.", "95 %"]
    return markdown(header, rows)


def regression(record: Record) -> str:
    """The IoU of regressed boxes by RoIs seen, on windows of an IoU of 0.5 or more, and conv - fc."""
    trained = {one["head"] for one in record["heads"] if one["variant"] == BASE}
    heads = [head for head in REGRESSORS if head in trained]
    tasks = [task for task in ("both", "boxes") if {f"conv: {task}", f"fc: {task}"} <= trained]
    rows = []
    for step in steps(record):
        get = {head: over_windows(record, head, "regressed_iou", 0.5, 1.0, step=step) for head in heads}
        against = [compared(paired(get[f"conv: {task}"], get[f"fc: {task}"]), digits=3) for task in tasks]
        cells = [cell for one in against for cell in (one[0], one[3])]
        rows.append([f"{rois(record, step):,}", *(shown(one, 3) for one in get.values()), *cells])
    differences = [name for task in tasks for name in (f"conv - fc: {task}", "95 %")]
    return markdown(["IoU after RoIs", *heads, *differences], rows)


def windows(record: Record) -> str:
    """Figure 2's second row at the end of the training, in four parts."""
    rows = [
        [head, *(shown(over_windows(record, head, "regressed_iou", *part), 3) for part in WINDOWS)]
        for head in REGRESSORS
    ]
    return markdown(["windows' IoU", *(f"{low:g} .. {high:g}" for low, high in WINDOWS)], rows)


def crossings(record: Record) -> str:
    """After how many RoIs one kind or head passes another."""
    seen = rois(record, steps(record)[-1])

    def kind(name: str, metric: str) -> Callable[[int], Mapping[int, float]]:
        return lambda step: of_heads(record, name, metric, step=step)

    def head(name: str) -> Callable[[int], Mapping[int, float]]:
        return lambda step: over_windows(record, name, "regressed_iou", 0.5, 1.0, step=step)

    pairs = [
        *((f"{WORDS[ours]} and single fc, {metric}", kind(ours, metric), kind("fc", metric))
          for ours in ("conv", "double_head", "double_head_ext") for metric in ("AP", "AP75")),
        ("conv and fc for both tasks, IoU of boxes", head("conv: both"), head("fc: both")),
        ("conv and fc for boxes alone, IoU of boxes", head("conv: boxes"), head("fc: boxes")),
    ]  # fmt: skip
    rows = []
    for words, ours, theirs in pairs:
        at, end = crossing(record, ours, theirs), paired(ours(record["steps"]), theirs(record["steps"]))
        if end is None:  # one of them was not trained
            continue
        ahead = "the first" if end.mean > 0 else "the second"
        where = f"after about {at:,} RoIs" if at else f"none in {seen:,} RoIs"
        rows.append([words, where, ahead])
    return markdown(["", "the means cross", "ahead at the end"], rows, left=3)


def findings(records: Records) -> str:
    rows = []
    for claim, where, tests, reason in FINDINGS:
        for number, test in enumerate(tests):
            said = (claim, where, reason) if number == 0 else ("", "", "")
            rows.append([*said[:2], *_tested(test, records.get(test.record)), said[2]])
    header = ["the paper says", "in", "compared here", "verdict", "paper", *COMPARED, "reason"]
    return markdown(header, rows, left=4, last=True)


def _tested(test: Test, record: Record | None) -> list[str]:
    paper, found = signed(test.paper, test.digits), test.effect(record) if record else None
    if found is None:
        return [test.words, "no record", paper, *[""] * len(COMPARED)]
    *cells, word = compared(found, test.paper, test.digits)
    return [test.words, f"**{word}**", paper, *cells]


def norms(record: Record) -> str:
    """What batch norms do to a young conv-head."""
    rows = []
    for key in dict.fromkeys((one["when"], one["head"], one["statistics"]) for one in record["results"]):
        mine = [one for one in record["results"] if (one["when"], one["head"], one["statistics"]) == key]
        rows.append([*key, *(plus_minus(sample([one[name] for one in mine]), 3) for name in ("iou", "loss_cls"))])
    return markdown(["when", "head", "statistics", "IoU of boxes", "classification loss"], rows, left=3)


def implementation(record: Record) -> str:
    rows = [
        [one["name"], one["compared"], f"{one['largest_difference']:.2g}", f"{one['bound']:.2g}",
         "yes" if one["passed"] else "**no**"]
        for one in record["checks"]
    ]  # fmt: skip
    return markdown(["check", "compared", "found", "bound", "passed"], rows, left=2) + "\n\n" + origin(record)


def own_data(record: Record) -> str:
    """The trial in docs/own-data.md."""
    words = {"own": "`own-data`, from scratch", "from": "`own-data --from` the demonstration"}
    rows = []
    for kind, text in words.items():
        runs = [run for run in record["runs"] if run["kind"] == kind]
        early = {run["seed"]: 100 * run["AP_by_step"]["96"] for run in runs}
        minutes = fmean(run["seconds"] for run in runs) / 60
        rows.append(
            [text, shown(early), *(shown(of_runs(record, kind, name)) for name in NUMBERS[:3]), f"{minutes:.1f}"]
        )
    return markdown(["", "AP after 96 steps", *NUMBERS[:3], "minutes"], rows) + "\n\n" + origin(record)


MODELS = {
    "demo": "the demonstration, heads 256 and 128 wide", "bccd": "BCCD (`own-data`), the same heads",
    "large": "generated shapes, heads 1024 wide",
}  # fmt: skip
"""Folder in the record of precisions -> words."""


def precision(record: Record) -> str:
    """What int8 and a gate cost."""
    rows = []
    for run in sorted(record["runs"], key=lambda run: list(MODELS).index(run["model"])):
        fp32, int8, gated = (100 * run[name] for name in ("fp32", "int8", "gated"))
        rows.append(
            [MODELS[run["model"]], str(run["images"]), f"{fp32:.2f}", f"{int8:.2f} ({int8 - fp32:+.2f})",
             str(run["left_out"]), f"{run['gate']:g}", f"{100 * run['survivors']:.1f} %", f"{fp32 - gated:.2f}"]
        )  # fmt: skip
    header = ["model", "images", "fp32", "int8 heads", "layers left in float", "gate", "RoIs the conv-head sees",
              "loss by the gate"]  # fmt: skip
    return markdown(header, rows) + "\n\n" + origin(record)


def quantized(record: Record) -> str:
    """What `quantize` prints of the demonstration."""
    (run,) = (one for one in record["runs"] if one["model"] == "demo")
    fp32, int8 = 100 * run["fp32"], 100 * run["int8"]
    layers = f"in int8: {run['in_int8']} of {run['in_int8'] + run['left_out']} layers"
    lines = ["                      AP  difference", f"fp32               {fp32:.2f}",
             f"int8               {int8:.2f}       {int8 - fp32:+.2f}", "", layers]  # fmt: skip
    return "\n".join(["```text", *lines, "```"])


def start(record: Record) -> str:
    """The demonstration, from which trainings start."""
    one = record["start"]
    cells = [f"{100 * one[name]:.1f}" for name in NUMBERS[:3]]
    return markdown(["", "steps", *NUMBERS[:3]], [[f"`{one['command']}`", str(one["step"]), *cells]])


def costs(records: Records) -> str:
    """The time of each record: what its trainings or measurements took, and where it is known of all around them."""
    rows = [
        [record["what"].partition(":")[0].partition(".")[0].partition("?")[0], f"`{name}.json`",
         f"{record['seconds'] / 60:.1f}", f"{record['wall_seconds'] / 60:.1f}" if "wall_seconds" in record else "",
         str(len(record["seeds"])), trained_on(record["machine"])]
        for name, record in records.items()
    ]  # fmt: skip
    return markdown(["", "record", "minutes", "wall minutes of the part", "seeds", "on"], rows, left=2, last=True)


def throughput(records: Records) -> str:
    """How fast `analyze heads` trains one seed, evaluation left out; the seeds of a GPU's record ran side by side."""
    rows = []
    for name, record in records.items():
        if not name.startswith("heads-"):
            continue
        first, seen = record["seeds"][0], rois(record, steps(record)[-1])
        heads = {(row["variant"], row["head"]) for row in record["heads"] if row["seed"] == first}
        speed = fmean(seen / training["seconds"] for training in record["trainings"])
        rows.append([f"`{name}.json`", trained_on(record["machine"]), str(len(heads)), f"{speed:,.0f}",
                     f"{speed * len(heads):,.0f}"])  # fmt: skip
    header = ["record", "on", "heads side by side", "RoIs a second", "times heads"]
    return markdown(header, rows, left=2)


def origin(record: Record) -> str:
    """One line: where and when a record was made."""
    machine, seeds = record["machine"], ", ".join(map(str, record["seeds"]))
    return (
        f"Seeds {seeds}; {record['seconds'] / 60:.0f} minutes; {trained_on(machine)}, torch {machine['torch']}; "
        f"{record['date']}, commit {record['commit']}."
    )


def trained_on(machine: Mapping[str, Any]) -> str:
    """The GPU, or else the processor and its threads."""
    if "gpu" in machine:
        return machine["gpu"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['processor']}, {threads}"
