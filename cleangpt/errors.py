"""The ways in which a command ends early, and how it tells them."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a recipe, its data, a checkpoint or an output folder; commands tell it and exit with code 2.

    Args:
        problems: one `(key, message)` for each mistake. `key` is dotted (`optimizer.lr`), or the argument, file or
            folder that is wrong; `message` says what was expected and what was there, on one line.
    """

    def __init__(self, *problems: tuple[str, str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{key}: {' '.join(message.split())}" for key, message in self.problems))


class Stopped(Exception):
    """A run that ends before its last step, through no mistake of its user's; commands tell it and exit with its code.

    Args:
        code: 143 when a signal asked for it, 1 when training diverged. message: what happened, on one line.
    """

    def __init__(self, code: int, message: str):
        self.code = code
        super().__init__(message)


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command; its `UserError` or `Stopped` is told on stderr by the main process, one line a mistake.

    Returns:
        The process's exit code: 0, 2 for a mistake, or the code that it stopped with.
    """
    try:
        command()
    except (UserError, Stopped) as error:
        prefix = "error" if isinstance(error, UserError) or error.code == 1 else "stopped"
        if os.environ.get("RANK", "0") == "0":
            print("".join(f"{prefix}: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2 if isinstance(error, UserError) else error.code
    return 0
