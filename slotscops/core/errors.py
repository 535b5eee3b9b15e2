"""The two ways a command ends early: the user's mistake (exit 2) and a failure while running (exit 1)."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what came, what was needed, what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run that started well and cannot go on, such as a loss that is not finite. Exit code 1."""


class DamageError(RunError):
    """One sample of a data set is not what was written. The message names it and its file; training replaces it."""


def first_line(error: Exception) -> str:
    """The first line of another library's message, to stand within one of ours; its type where it says nothing.

    What a terminal would obey instead of showing it, such as the escape sequences of a damaged file, becomes '?'.
    """
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)
