"""Work on threads runs ahead of its reader, but no further than it may."""

import gc
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core.lookahead import in_order


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 50), max_size=12),
    st.integers(1, 4),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(0, 60),
)
def test_results_come_in_the_order_of_the_items(items, n_threads, ahead, budget):
    cost = None if budget is None else lambda item: item
    assert list(in_order(items, lambda x: x * x, n_threads, ahead=ahead, cost=cost, budget=budget or 0)) == [
        x * x for x in items
    ]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_items_are_drawn_than_may_be_ahead(ahead):
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    for i in in_order(items(), lambda i: i, 2, ahead=ahead):
        assert len(drawn) <= i + ahead


def test_items_wait_until_their_cost_fits_the_budget_and_a_costly_one_goes_alone():
    held, most, lock = set(), [], threading.Lock()

    def work(item):
        with lock:
            held.add(item)
            most.append(sum(cost for _, cost in held))
        threading.Event().wait(0.003)
        with lock:
            held.remove(item)

    items = list(enumerate([60, 50, 150, 40, 30, 30]))
    list(in_order(items, work, 4, cost=lambda item: item[1], budget=100))
    assert max(most) == 150
    assert sorted(most)[-2] <= 100


def test_the_first_exception_ends_it_and_cancels_what_has_not_started():
    started = []

    def work(i):
        started.append(i)
        if i == 1:
            raise ValueError("one")
        return i

    results = in_order(range(100), work, 1, ahead=3)
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        list(results)
    assert len(started) < 6


def test_an_exception_of_the_items_ends_it_once_the_work_begun_has_ended():
    finished = []

    def items():
        yield 0
        raise OSError("gone")

    def work(i):
        threading.Event().wait(0.01)
        finished.append(i)

    with pytest.raises(OSError, match="gone"):
        list(in_order(items(), work, 1))
    assert finished in ([0], [])


def test_closing_it_early_does_not_wait_for_what_has_begun():
    release = threading.Event()
    results = in_order([0, 1], lambda i: i == 0 or release.wait(10), 1)
    assert next(results)
    results.close()
    release.set()


def test_a_collector_may_end_it_while_its_thread_holds_a_lock_that_the_work_wants():
    lock, ended = threading.Lock(), threading.Event()

    def work(i):
        if i:
            with lock:
                pass
        return i

    def abandoned():
        results = in_order(range(5), work, 2)
        assert next(results) == 0
        cycle = [results]
        cycle.append(cycle)

    def collect():
        with lock:
            abandoned()
            gc.collect()
        ended.set()

    threading.Thread(target=collect, daemon=True).start()
    assert ended.wait(20)
