"""The one error that is the user's to mend."""


class UserError(Exception):
    """A mistake in a recipe, its data, a checkpoint or an output folder; commands tell it and exit with code 2.

    Args:
        problems: one `(key, message)` for each mistake. `key` is dotted (`optimizer.lr`), or the argument, file or
            folder that is wrong; `message` says what was expected and what was there, on one line.
    """

    def __init__(self, *problems: tuple[str, str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{key}: {' '.join(message.split())}" for key, message in self.problems))
