"""Detectors as programs that need no model code: written by `doublehead export`, opened by `load`.

Opening an AOTInductor package needs torch and `doublehead.ops`, an ONNX file onnxruntime; neither needs torchvision.
"""

from .loading import ExportedDetections, ExportedDetector, load

__all__ = ["ExportedDetections", "ExportedDetector", "load"]
