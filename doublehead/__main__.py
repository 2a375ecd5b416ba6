"""`python -m doublehead COMMAND ...`: the program `doublehead`, also for `torchrun -m doublehead`."""

from doublehead.cli import main

if __name__ == "__main__":
    main()
