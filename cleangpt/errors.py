"""The one error that is the user's to mend, and how a command tells it."""

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


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command; its `UserError` is told on stderr by the main process, one line a mistake.

    Returns:
        The process's exit code: 0, or 2 for a mistake.
    """
    try:
        command()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print("".join(f"error: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2
    return 0
