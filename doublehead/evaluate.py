"""The old name of `doublehead.cli.evaluate`, and of the command `doublehead evaluate`."""

from doublehead.cli.old_names import stand_in

stand_in(__name__, "evaluate")
