"""What is computed in a thread gives its result or its error to whoever asks."""

from __future__ import annotations

import gc
import threading

import pytest

from sftx.background import in_background
from sftx.collector import collector_paused


def test_the_result_is_waited_for_and_computed_elsewhere() -> None:
    may_go_on = threading.Event()
    result = in_background(lambda: (may_go_on.wait(60), threading.current_thread()))
    may_go_on.set()
    went_on, thread = result()
    assert went_on
    assert thread is not threading.current_thread()
    assert thread.daemon  # a process that fails meanwhile does not wait for it


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    result = in_background(fail)
    with pytest.raises(OSError, match="the disk is gone"):
        result()


def test_the_collector_is_as_it_was_after_the_block() -> None:
    def fail_within() -> None:
        with collector_paused():
            assert not gc.isenabled()
            with collector_paused():
                pass
            assert not gc.isenabled()
            raise OSError

    assert gc.isenabled()
    with pytest.raises(OSError):  # noqa: PT011
        fail_within()
    assert gc.isenabled()
