"""The old name of `doublehead.cli.tables`, and of the command `doublehead tables`."""

from doublehead.cli.old_names import stand_in

stand_in(__name__, "tables")
