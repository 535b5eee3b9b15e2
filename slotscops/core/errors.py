"""The two ways a command ends early: the user's mistake (exit 2) and a failure while running (exit 1)."""

import difflib
from collections.abc import Iterable

from slotscops.core.address import hide_secrets


def visible(text: object) -> str:
    """The text as one line that is safe to print: newlines, escape sequences and other controls are spelled out.

    Names of files, archive members and settings, and the messages of servers, come from other people. A newline in
    one of them could otherwise forge a line of our output. Passwords and values of queries in URLs are hidden.
    """
    shown = hide_secrets(str(text)).encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


class _OneLine(Exception):
    """Its text is safe to print, whatever names and values of other people's files the message quotes."""

    def __str__(self) -> str:
        return visible(super().__str__())


class UserError(_OneLine, ValueError):
    """A mistake that the user can fix. The one-line message: what came, what was needed, what to do. Exit code 2."""


class ClaimError(UserError):
    """A folder belongs to other work. Processes find this out at different times, so each of them prints it."""


class RunError(_OneLine, RuntimeError):
    """A run that started well and cannot go on, such as a loss that is not finite. Exit code 1."""


class SilentLoaderError(RunError):
    """No batch came in time. The run is as it was after its last step and can be saved."""


class DamageError(RunError):
    """A sample of a data set is damaged. The message names it and its file; training replaces it by another sample."""


def first_line(error: Exception) -> str:
    """The first line of another library's error message, or the error's type if the message is empty.

    Our messages quote it. Secrets in URLs become '***'. Characters that cannot be printed, such as escape sequences in
    a damaged file, become '?'.
    """
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in hide_secrets(line))


def shorten(text: str, length: int = 300) -> str:
    """The text in one line of at most `length` characters: its start, and its end, which says what to do."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    end = (length - 3) // 3
    return f"{line[: length - 3 - end]}...{line[-end:]}"


def suggest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' or an empty string."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section
        close = [c for c in candidates if c.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return f"; did you mean '{close[0]}'?" if close else ""
