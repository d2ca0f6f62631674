"""How a command ends early, and what it prints then."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a recipe, its data, a checkpoint or an output folder. Commands print it and exit with code 2.

    Args:
        problems: a dotted key (`optimizer.lr`), argument or path, and on one line what was expected and found.
        shared: whether every process raises this error, rather than this one alone.
    """

    def __init__(self, *problems: tuple[str, str], shared: bool = False):
        super().__init__(*problems)
        self.problems, self.shared = list(problems), shared

    def __str__(self) -> str:
        return "\n".join(f"{key}: {' '.join(message.split())}" for key, message in self.problems)


class Stopped(Exception):
    """A run that ended early by no mistake of the user's.

    Commands exit with its `code`: 143 after a signal, 130 after Ctrl-C, 1 if the run diverged.
    """

    def __init__(self, code: int, message: str):
        self.code = code
        super().__init__(message)


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command, prints its `UserError` or `Stopped` on stderr, one line per mistake, and returns the exit code.

    Of several processes the first on each machine prints; a mistake that may be its own only gets its rank.
    """
    rank = os.environ.get("RANK", "0")
    try:
        command()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            where = "" if error.shared or rank == "0" else f"rank {rank}: "
            print("".join(f"error: {where}{line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2
    except Stopped as stop:
        if rank == "0":
            print(f"{'error' if stop.code == 1 else 'stopped'}: {stop}", file=sys.stderr)
        return stop.code
    return 0
