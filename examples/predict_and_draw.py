"""Detect objects in pictures, print them, and draw them.

    python examples/predict_and_draw.py runs/own-data-1 photos/*.jpg --out found
    python examples/predict_and_draw.py                            # a detector of generated shapes

CHECKPOINT is a run, a model.safetensors, a converted folder, or an exported .pt2 or .onnx.
"""

import argparse
from pathlib import Path

import sample_data

import doublehead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?")
parser.add_argument("pictures", nargs="*")
parser.add_argument("--out", type=Path, default=Path("found"), help="folder of the drawn pictures, a new one")
parser.add_argument("--score-threshold", type=float, default=0.5)

if __name__ == "__main__":
    options = parser.parse_args()
    predictor = doublehead.load(options.checkpoint or sample_data.make_detector())
    pictures = options.pictures or sorted(sample_data.make_data().glob("val/*"))[:8]
    options.out.mkdir(parents=True)
    for number, picture in enumerate(pictures, start=1):
        found = predictor.predict(picture, score_threshold=options.score_threshold)
        for name, score, box, _ in found:
            print(f"{picture}: {name} {score:.2f} at {[round(side) for side in box]}")
        predictor.draw(picture, found).save(options.out / f"{number}-{Path(picture).stem}.jpg")
