"""Export a detector as a program that needs no model code: onnxruntime runs .onnx, torch and doublehead.ops run .pt2.

python examples/export_and_deploy.py runs/own-data-1 detector.onnx photo.jpg
python examples/export_and_deploy.py                           # a detector of generated shapes
"""

import argparse

import sample_data

import doublehead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?", help="a run, a converted folder or a model.safetensors")
parser.add_argument(
    "out", nargs="?", default="detector.onnx", help="a new .onnx (pip install 'doublehead[onnx]') or .pt2"
)
parser.add_argument("pictures", nargs="*")

if __name__ == "__main__":
    options = parser.parse_args()
    model = doublehead.load(options.checkpoint or sample_data.make_detector())
    # The longer side for both: a program has one size, and so takes landscape and portrait pictures.
    side = -(-model.recipe.model.image.max_size // 32) * 32
    program = doublehead.load(model.export(options.out, height=side, width=side))
    for picture in options.pictures or sorted(sample_data.make_data().glob("val/*"))[:3]:
        print(f"{picture}\n  model:   {model.predict(picture)}\n  program: {program.predict(picture)}")
    print(f"{options.out} takes {program.exported.shape[0]} picture at a time, of up to {side}x{side} after resizing")
