"""Detectron2: its models made faster, or their weights brought here."""
