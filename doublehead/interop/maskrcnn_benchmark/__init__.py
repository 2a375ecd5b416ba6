"""Converts weights of maskrcnn-benchmark and of the authors' release of Double-Head R-CNN."""
