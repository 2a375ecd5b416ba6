"""The old name of `doublehead.cli.convert`, and of the command `doublehead convert`."""

from doublehead.cli.old_names import stand_in

stand_in(__name__, "convert")
