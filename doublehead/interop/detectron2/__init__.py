"""Detectron2: its models made faster, or their weights brought here."""

from .accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
