"""The scripts of evidence/ as modules, and records that were never measured."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from tests.support.paths import ROOT

FOLDER = ROOT / "evidence"
ORIGIN: dict[str, Any] = {
    "what": "made up", "command": "none", "commit": "abc1234", "date": "2026-01-01", "seeds": [0, 1, 2],
    "seconds": 60.0, "machine": {"processor": "a processor", "cores": 2, "threads": 1, "torch": "2.14"},
}  # fmt: skip
KINDS = ("fc", "conv", "double_fc", "double_conv", "double_head_reverse", "double_head", "double_head_ext")
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
HEADS = ("fc: both", "fc: boxes", "conv: both", "conv: boxes", "double_head_ext fc", "double_head_ext conv")


def script(name: str) -> ModuleType:
    """`evidence/NAME.py`; not under its own name, which a script of benchmarks/ may have too."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    if name != "tables":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("evidence_tables", FOLDER / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_runs(kinds: tuple[str, ...] = ("fc", "double_head")) -> dict[str, Any]:
    """As of trainings on BCCD: each kind is a point better than the one before, and seeds differ by a tenth of one."""
    log = {"loss": [[step, 3.0 - step / 100] for step in (20, 120)], "AP_by_step": {"60": 0.3, "96": 0.35, "120": 0.4}}
    runs = [
        {"kind": kind, "seed": seed, "seconds": 60.0, "step": 120, **log}
        | dict.fromkeys(NUMBERS, 0.4 + 0.01 * place + 0.001 * seed * place)
        for place, kind in enumerate(kinds)
        for seed in ORIGIN["seeds"]
    ]
    start = {"command": "doublehead train", "step": 480} | dict.fromkeys(NUMBERS, 0.3)
    return ORIGIN | {"runs": runs, "start": start}


def of_heads(variants: tuple[str, ...] = ()) -> dict[str, Any]:
    """As of `analyze heads`: Double-Head begins two points behind fc, and ends two before it."""
    results, heads = [], []
    for seed in ORIGIN["seeds"]:
        for step, gain in ((100, -0.02), (400, 0.02)):
            at = {"seed": seed, "step": step, "rois": 10 * step}
            for variant in ("base", *variants):
                for kind in KINDS:
                    ap = 0.4 + (gain * (1 + seed / 10) if kind.startswith("double_head") else 0.0)
                    ways = [("fused", "complementary")]
                    if kind == "double_head_ext":
                        ways += [("fused", one) for one in ("none", "max", "average")]
                        ways += [(one, "complementary") for one in ("split", "fc", "conv")]
                    results += [
                        {"variant": variant, "kind": kind, "readout": readout, "fusion": fusion, **at}
                        | dict.fromkeys(NUMBERS, ap - 0.001 * place)
                        for place, (readout, fusion) in enumerate(ways)
                    ]
            heads += [
                {"variant": "base", "head": head, **at, "loss_cls": 1.0, "loss_reg": 1.0, "windows": [5] * 20,
                 "score": [None] + [b / 20 for b in range(1, 20)],
                 "regressed_iou": [None] + [0.5 + (gain if "conv" in head else 0.0) + seed / 1000] * 19}
                for head in HEADS
            ]  # fmt: skip
    changes = {text: {text.partition("=")[0]: 1} for text in variants}
    return ORIGIN | {"steps": 400, "variants": {"base": {}} | changes, "results": results, "heads": heads}


def of_pearson() -> dict[str, Any]:
    """As of `analyze pearson`."""
    columns = ["head", "minus", "boxes", "group", "difference", "se", "se seeds", "seeds"]
    return ORIGIN | {"tables": {"pearson-differences": {
        "columns": columns, "rows": [["conv alone", "fc alone", "windows", "all", -0.05, 0.02, 0.01, 3]],
    }}}  # fmt: skip
