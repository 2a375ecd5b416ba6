"""Train a detector on your own data, in whichever layout your labelling tool exports: COCO, VOC, YOLO, LabelMe.

python examples/train_own_data.py data/cells               # model, sizes and steps fit the data and the device
python examples/train_own_data.py data/cells --steps 400   # shorter or longer
python examples/train_own_data.py                          # on generated shapes
"""

import argparse

import sample_data

import doublehead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", help="folder of the data set; without it shapes are generated")
parser.add_argument("--steps", type=int, help="optimizer steps; without it as many as the data need")
parser.add_argument("--side", type=int, help="short side to which images are resized, in pixels")
parser.add_argument("--out", help="folder of the run; without it runs/own-data-1, -2, ...")

if __name__ == "__main__":  # some systems start the processes that load images by importing this file
    options = parser.parse_args()
    result = doublehead.train(
        data=options.data or sample_data.make_data(),
        train={"steps": options.steps} if options.steps else {},
        model={"image": {"min_size": [options.side], "max_size": 2 * options.side}} if options.side else {},
        out=options.out,
    )
    print(f"{result.folder}: AP50 {100 * (result.metrics['AP50'] or 0):.1f}; go on with")
    print(f"    python examples/predict_and_draw.py {result.folder} PICTURE...")
