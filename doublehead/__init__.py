"""Double-Head R-CNN for PyTorch."""

__version__ = "0.1.0"
