"""Random edits of sound containers (`fuzz.py`): an answer, or one of pqcli's errors, and soon."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.container.fuzz import ask, edited, sound_files, with_other_bytes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sound_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tmp_path_factory.mktemp("edited") / "x.pq.safetensors"


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 4), st.integers(0, 4), st.randoms(use_true_random=False))
def test_an_edited_file_gives_an_answer_or_one_of_our_errors(files, target, which, other, rng):
    ask(edited(files[which], files[other], rng), target)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 4), st.integers(0, 4), st.floats(0, 1), st.floats(0, 1))
def test_two_files_spliced_anywhere_give_an_answer_or_one_of_our_errors(files, target, which, other, first, second):
    head, tail = files[which].read_bytes(), files[other].read_bytes()
    ask(head[: int(first * len(head))] + tail[int(second * len(tail)) :], target)


def test_the_edits_are_of_every_kind(files):
    class Always:
        """Draws the first byte there is, and the given choice of edits."""

        def __init__(self, which):
            self.which = which

        def choice(self, options):
            return options[self.which] if len(options) == 7 else options[0]

        def randrange(self, _stop):
            return 1

    found = [with_other_bytes(b"abcd", b"ABCDEF", Always(which)) for which in range(7)]
    assert found == [b"a\x01cd", b"a\x01bcd", b"acd", b"abbcd", b"a", b"aBCDEF", b"aBCDEF"]
