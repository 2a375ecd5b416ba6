"""The old name of `doublehead.cli.detect`, and of the command `doublehead detect`."""

from doublehead.cli.old_names import stand_in

stand_in(__name__, "detect")
