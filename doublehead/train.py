"""`python -m doublehead.train`: the command `doublehead train`; as a module, `doublehead.cli.train` itself.

It can be called too, as `doublehead.train(...)` from Python: the function and the old module have one name.
"""

import inspect
import sys
import types
from typing import Any

from doublehead.cli import train


class _Callable(types.ModuleType):
    # The command's module; called, it is `doublehead.api.training.train`, whose signature and help it has.

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _function()(*arguments, **options)

    @property
    def __doc__(self) -> str | None:
        return _function().__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function())


def _function() -> Any:
    from doublehead.api import training  # only now: the command line does without it

    return training.train


if __name__ == "__main__":
    train.main()
else:
    train.__class__ = _Callable
    sys.modules[__name__] = train
