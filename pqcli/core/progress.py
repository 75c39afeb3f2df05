"""How far one piece of work has come: said where it is done, heard where it was started.

Loops deep inside (an iteration of EM, a stretch of rows) say a fraction, and need not be handed anybody to say it to:

    with heard(print):
        with within(0.0, 0.9):
            tell(0.5)       # prints 0.45

It is heard in the thread in which the work was started, and in no thread that the work starts itself. Nobody need
listen, and nothing that is computed depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Hear = Callable[[float], None]
"""`hear(fraction)`: so much is done, of 1."""

_hear: ContextVar[Hear | None] = ContextVar("hear", default=None)


def tell(fraction: float) -> None:
    """So much of what is at work here is done."""
    hear = _hear.get()
    if hear is not None:
        hear(fraction)


@contextmanager
def heard(hear: Hear) -> Iterator[None]:
    """What the body tells goes to `hear`."""
    token = _hear.set(hear)
    try:
        yield
    finally:
        _hear.reset(token)


@contextmanager
def within(start: float, stop: float) -> Iterator[None]:
    """The body is the work from `start` to `stop` of what is at work here; it tells fractions of itself."""
    outer = _hear.get()
    if outer is None:
        yield
        return
    with heard(lambda fraction: outer(start + (stop - start) * fraction)):
        yield
    outer(stop)
