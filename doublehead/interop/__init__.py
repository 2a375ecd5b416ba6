"""Weights and conventions of other projects, one file each."""
