"""The collector while botocore makes a client: lazy, never off, and afterwards as it was."""

import gc
import os
from collections.abc import Iterator

import pytest

from weightstream.cachefs.origin.quiet_gc import quiet_gc


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_collects_rarely_inside_and_as_before_afterwards() -> None:
    gc.set_threshold(500, 7, 8)
    with quiet_gc():
        first, *others = gc.get_threshold()
        assert first >= 50_000
        assert others == [7, 8]
        assert gc.isenabled()
        with quiet_gc():
            pass
        assert gc.get_threshold()[0] >= 50_000  # somebody is still inside
    assert gc.get_threshold() == (500, 7, 8)


def test_restores_after_an_error() -> None:
    gc.set_threshold(500, 7, 8)
    with pytest.raises(ValueError, match="no client"), quiet_gc():
        raise ValueError("no client")
    assert gc.get_threshold() == (500, 7, 8)


@pytest.mark.parametrize("first", [0, 200_000])
def test_leaves_a_collector_alone_that_is_off_or_lazier(first: int) -> None:
    gc.set_threshold(first, 7, 8)
    with quiet_gc():
        assert gc.get_threshold() == (first, 7, 8)
    assert gc.get_threshold() == (first, 7, 8)


def test_keeps_what_somebody_else_set_meanwhile() -> None:
    gc.set_threshold(500, 7, 8)
    with quiet_gc():
        gc.set_threshold(900, 5, 5)
    assert gc.get_threshold() == (900, 5, 5)


def test_a_forked_child_has_the_usual_collector() -> None:
    gc.set_threshold(500, 7, 8)
    with quiet_gc():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.get_threshold() == (500, 7, 8) else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
