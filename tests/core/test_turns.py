"""Turns: one works, others go on while it waits."""

import threading

import pytest

from vfs.turns import Turns


def test_one_works_at_a_time_and_gives_up_its_turn_to_wait() -> None:
    turns, order, waiting = Turns(), [], threading.Event()
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with turns.mine():
            order.append("second")
        waiting.set()

    with turns.mine():
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(10)
        assert not waiting.wait(0.05), "two at work"
        order.append("first")
        with turns.away():
            assert waiting.wait(10)
        order.append("first again")
    thread.join()
    assert order == ["first", "second", "first again"]


def test_a_turn_comes_back_after_an_error_and_none_is_made_up() -> None:
    turns = Turns()
    with turns.away():  # without one
        pass
    with pytest.raises(OSError, match="full"), turns.mine(), turns.away():
        raise OSError("full")
    with turns.mine():
        pass
