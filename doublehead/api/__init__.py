"""What `import doublehead` offers for own data: `load` and its `Predictor`, and `train`.

The functions stand in `doublehead/__init__.py`, which imports these modules when one of them is first used.
"""
