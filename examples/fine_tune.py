"""Fine-tune a trained detector on other classes: its weights are taken, but for the last layers, which are new.

python examples/fine_tune.py runs/own-data-1 data/cells --classes RBC WBC
python examples/fine_tune.py models/torchvision data/cells     # what `doublehead convert` made of another project's
python examples/fine_tune.py                                   # a detector of shapes, on two of their classes
"""

import argparse

import sample_data

import doublehead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?", help="a run, a converted folder or a model.safetensors")
parser.add_argument("data", nargs="?", help="folder of the data set")
parser.add_argument("--classes", nargs="+", help="learn these alone, in this order")
parser.add_argument("--steps", type=int, help="optimizer steps; without it as many as the data need")
parser.add_argument("--out", help="folder of the run; without it runs/own-data-1, -2, ...")

if __name__ == "__main__":  # some systems start the processes that load images by importing this file
    options = parser.parse_args()
    data = {"root": options.data or sample_data.make_data()}
    classes = options.classes or (None if options.data else ["star", "ring"])
    result = doublehead.train(
        data=data | ({"classes": classes} if classes else {}),
        train={"steps": options.steps} if options.steps else {},
        start_from=options.checkpoint or sample_data.make_detector(),
        out=options.out,
    )
    print(f"{result.folder}: AP50 {100 * (result.metrics['AP50'] or 0):.1f}, of {', '.join(result.metrics['classes'])}")
