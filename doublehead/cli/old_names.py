"""The modules that were the commands before there was one program; they go with the next release.

`python -m doublehead.evaluate` still runs the command, and `import doublehead.evaluate` gives `doublehead.cli.evaluate`
itself.  Each says the new name once.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings


def stand_in(module: str, command: str) -> None:
    """Run the command, or put `doublehead.cli.COMMAND` in the place of the old module.

    Args:
        module: `__name__` of the old module, `doublehead.COMMAND`; `__main__` when it is run.
    """
    announce(module, command, f"doublehead.cli.{command}", stacklevel=4)
    new = importlib.import_module(f"doublehead.cli.{command}")
    if module == "__main__":
        new.main()
    else:
        sys.modules[module] = new


def announce(module: str, command: str, new_module: str, stacklevel: int = 3) -> None:
    """Say the new name: on the terminal to who runs the command, as a `DeprecationWarning` to who imports the module.

    Args:
        module: `__name__` of the old module.
        stacklevel: the warning's stack level, so that it names the line that imports the old module.
    """
    if module == "__main__":
        if os.environ.get("RANK", "0") == "0":
            note = f"python -m doublehead.{command} is now doublehead {command}; the next release removes the old name"
            print(f"note: {note}", file=sys.stderr, flush=True)
    elif module == f"doublehead.{command}":  # not in worker processes, which import what was run as `__mp_main__`
        text = f"{module} is now {new_module}; the next release removes the old name"
        warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
