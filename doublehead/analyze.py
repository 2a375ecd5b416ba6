"""The old name of `doublehead.cli.analyze`, and of the command `doublehead analyze`."""

from doublehead.cli.old_names import stand_in

stand_in(__name__, "analyze")
