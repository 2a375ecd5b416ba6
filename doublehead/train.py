"""`python -m doublehead.train`: the command `doublehead train`; as a module, `doublehead.cli.train` itself."""

import sys

from doublehead.cli import train

if __name__ == "__main__":
    train.main()
else:
    sys.modules[__name__] = train
