"""Records what this process opens, makes or contacts, as Python's own audit events tell."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Describe = Callable[[str, tuple[object, ...]], str]
_watches: list[tuple[frozenset[str], Describe, list[str]]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    for events, describe, record in _watches:
        if event in events:
            record.append(describe(event, arguments))


sys.addaudithook(_hook)  # cannot be removed, so there is one for all tests


@contextmanager
def audited(*events: str, describe: Describe) -> Iterator[list[str]]:
    """Yields a list that grows by the description of each of these events while the body runs."""
    watch = (frozenset(events), describe, list[str]())
    _watches.append(watch)
    try:
        yield watch[2]
    finally:
        _watches.remove(watch)
