"""Compare the training losses of the fused conv-head with those of its modules; draw docs/fused-training.png.

python benchmarks/fused_training.py              trains the small Ext detector four times, minutes on a CPU
python benchmarks/fused_training.py --steps 60   shorter
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from doublehead.config import Recipe
from doublehead.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PLAIN, FUSED, RECOMPUTE, OTHER = "module by module", "fused", "fused, recompute", "module by module, another seed"
RUNS = {PLAIN: (False, False, 0), FUSED: (True, False, 0), RECOMPUTE: (True, True, 0), OTHER: (False, False, 1)}
"""Run -> fused, recompute, seed."""


def small_recipe(steps: int, fused: bool, recompute: bool, seed: int) -> Recipe:
    """The recipe `shapes-ext`, cut to `steps`."""
    base = RECIPES["shapes-ext"]
    head = dataclasses.replace(base.model.head, fused=fused, recompute=recompute)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, head=head),
        data=dataclasses.replace(base.data, train_images=4 * steps, val_images=2, workers=0),
        train=dataclasses.replace(
            base.train, steps=steps, milestones=(int(0.8 * steps),), warmup_steps=min(50, steps // 4), log_every=1,
            seed=seed, device="cpu",
        ),
    )  # fmt: skip


def losses(recipe: Recipe) -> list[float]:
    """The training loss of every step."""
    from doublehead.engine.distributed import World
    from doublehead.engine.run import train

    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder), World())
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    styles = {PLAIN: ("black", "-"), FUSED: ("tab:red", "--"), RECOMPUTE: ("tab:blue", ":"), OTHER: ("0.7", "-")}
    for name, values in curves.items():
        color, line = styles[name]
        axes.plot(smooth(values, 15), label=name, color=color, linestyle=line)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, mean of 15 steps")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "fused-training.png")
    options = parser.parse_args()
    curves = {name: losses(small_recipe(options.steps, *run)) for name, run in RUNS.items()}
    draw(curves, options.out)
    quarter = options.steps // 4
    for name, values in curves.items():
        print(f"{name:32s} mean loss of the last quarter {sum(values[-quarter:]) / quarter:.4f}")


if __name__ == "__main__":
    main()
