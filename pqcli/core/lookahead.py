"""Work on threads that runs ahead of its reader by a bounded amount, with results in order.

The kernels of this package release the interpreter lock, so threads are enough; what has to be bounded is the memory
that waiting items and results take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    n_threads: int,
    *,
    ahead: int | None = None,
    cost: Callable[[Item], int] | None = None,
    budget: int = 0,
    join: bool = True,
) -> Iterator[Result]:
    """`work(item)` of every item, in the items' order, by `n_threads` threads.

    At most `ahead` items (None: any number) are with the threads, or done and not yet given out; the next one is
    drawn from `items`, in the caller's thread, when there are fewer. With `cost`, an item starts when it and all those
    before it that are not done with cost no more than `budget` together, or when it would be alone; an item that the
    caller has been given is done with when the next is asked for.

    The first exception, of `work` or of `items`, ends the iteration. What has not started then never does; what has is
    waited for, unless `join` is False. Closing ends it likewise, and never waits: it may be the garbage collector that
    closes, at any moment, in a thread that holds a lock which the work begun is waiting for.
    """
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(n_threads)
    try:
        for item in items:
            size = cost(item) if cost else 0
            while waiting and held + size > budget:
                future, freed = waiting.popleft()
                yield future.result()
                held -= freed
            waiting.append((pool.submit(work, item), size))
            held += size
            del item  # the pool alone holds it, for as long as it is worked on
            while ahead is not None and len(waiting) >= ahead:
                future, freed = waiting.popleft()
                yield future.result()
                held -= freed
        while waiting:
            yield waiting.popleft()[0].result()
    except GeneratorExit:
        join = False
        raise
    finally:
        pool.shutdown(wait=join, cancel_futures=True)
