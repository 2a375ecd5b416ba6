"""The old name of `doublehead.cli.installation`, and of the command `doublehead info`."""

from doublehead.cli.info import main
from doublehead.cli.old_names import announce

announce(__name__, "info", "doublehead.cli.installation")
if __name__ == "__main__":
    main()
else:
    from doublehead.cli.installation import compiled_part, report, served_by

    __all__ = ["compiled_part", "main", "report", "served_by"]
