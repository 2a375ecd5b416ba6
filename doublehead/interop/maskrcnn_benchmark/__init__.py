"""maskrcnn-benchmark and the authors' release of Double-Head R-CNN: their weights brought here."""
