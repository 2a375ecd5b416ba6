"""The old name of `doublehead.cli.export`, and of the command `doublehead export`."""

from doublehead.cli.old_names import stand_in

stand_in(__name__, "export")
