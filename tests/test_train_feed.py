# SPDX-License-Identifier: Apache-2.0
"""The thread that makes batches ready: the same batches, the same places, its errors in the asking thread."""

import gc
import threading
import time

import numpy as np
import pytest
import torch

from fusae.train.feed import Feed

D, B = 5, 4


class Source:
    """Batches that hold their own number; batch `bad` has a row of NaN, reading batch `fails` raises."""

    def __init__(self, count=10, bad=None, fails=None, delay=0.0):
        self.count, self.bad, self.fails, self.delay, self.at = count, bad, fails, delay, 0
        self.threads = set()

    def __next__(self):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        if self.at == self.count:
            raise StopIteration
        self.at += 1
        if self.at == self.fails:
            raise OSError("disk gone")
        x = torch.full((B, D), float(self.at))
        if self.at == self.bad:
            x[1:3, 2] = torch.tensor([torch.nan, torch.inf])
        return x

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def feed(*args, ahead=2, nonfinite="stop", **options):
    return Feed(Source(*args, **options), B, D, ahead=ahead, nonfinite=nonfinite)


def numbers(source):
    found = []
    while True:
        try:
            found.append(source.next()[0, 0].item())
        except StopIteration:
            return found


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_every_batch_comes_once_and_in_order(ahead):
    ours = feed(ahead=ahead)
    assert numbers(ours) == list(range(1, 11))
    assert ours.batches.threads == {"MainThread" if ahead == 0 else "fusae feed"}
    with pytest.raises(StopIteration):
        ours.next()
    ours.close()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_place_is_that_of_the_last_batch_given(ahead):
    ours = feed(ahead=ahead)
    assert ours.state_dict() == {"at": 0}
    for i in range(1, 6):
        ours.next()
        time.sleep(0.02)  # the thread reads on
        assert ours.state_dict() == {"at": i}
    other = feed(ahead=ahead)
    other.load_state_dict(ours.state_dict(), dropped=7, step=5)
    ours.close()
    assert other.dropped == 7 and numbers(other) == [6, 7, 8, 9, 10]
    other.close()


def test_looking_ahead_takes_nothing_away():
    ours = feed()
    assert ours.peek(6)[:, 0].tolist() == [1, 1, 1, 1, 2, 2]
    assert ours.state_dict() == {"at": 0}
    assert len(feed(count=2).peek(100)) == 8
    assert numbers(ours) == list(range(1, 11))
    with pytest.raises(StopIteration):
        feed(count=0).peek(1)
    with pytest.raises(ValueError, match="step 1: 2 of 4 rows"):
        feed(bad=1).peek(1)


def test_it_can_be_closed_and_goes_on():
    ours = feed(ahead=3)
    first = [ours.next()[0, 0].item() for _ in range(4)]
    ours.close()
    assert ours._thread is None
    assert first + numbers(ours) == list(range(1, 11))
    ours.close()


def test_the_thread_ends_with_what_it_feeds():
    ours = feed(count=100, ahead=3)
    ours.next()
    thread = ours._thread
    assert thread.is_alive()
    del ours
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_source_is_raised_where_its_batch_is_due(ahead):
    ours = feed(fails=4, ahead=ahead)
    assert [ours.next()[0, 0].item() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(OSError, match="disk gone"):
        ours.next()
    assert ours.state_dict() == {"at": 3}
    ours.close()


def test_waiting_is_measured_and_can_be_cut_short():
    ours = feed(delay=0.5, ahead=1)
    ours.next()
    assert ours.waited > 0.4
    ready = feed(delay=0.5, ahead=4)
    ready.peek(4 * B)
    before = ready.waited
    ready.next()
    assert ready.waited - before < 0.4, "it was there already"
    slow, stop = feed(delay=1.5), threading.Event()
    threading.Timer(0.1, stop.set).start()
    start = time.perf_counter()
    assert slow.next(stop) is None and time.perf_counter() - start < 1.4
    for one in (ours, ready, slow):
        one.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_rows_that_are_not_finite(ahead):
    ours = feed(bad=3, ahead=ahead)
    ours.next()
    ours.next()
    with pytest.raises(ValueError, match=r"step 3: 2 of 4 rows .* first is row 1 of the batch.*nonfinite = 'drop'"):
        ours.next()
    ours.close()
    ours = feed(bad=3, ahead=ahead, nonfinite="drop")
    sizes = [len(ours.next()) for _ in range(5)]
    assert sizes == [4, 4, 2, 4, 4] and ours.dropped == 2
    ours.close()


def test_finite_rows_with_a_sum_that_is_not():
    class Huge(Source):
        def __next__(self):
            return torch.full((B, D), 3e38)

    assert len(Feed(Huge(), B, D).next()) == B


def test_a_batch_of_nothing_but_nan_is_an_error():
    class Bad(Source):
        def __next__(self):
            return torch.full((B, D), torch.nan)

    with pytest.raises(ValueError, match="step 1: all 4 rows hold NaN or infinite values: nothing is left"):
        Feed(Bad(), B, D, nonfinite="drop", ahead=0).next()


@pytest.mark.parametrize("batch", [np.zeros((B, D)), torch.zeros(B, D + 1), torch.zeros(B - 1, D), torch.zeros(B)])
def test_what_is_no_batch(batch):
    class Odd(Source):
        def __next__(self):
            return batch

    with pytest.raises(ValueError, match=r"step 1: a batch must have shape \[batch_size, d\] = \[4, 5\], got"):
        Feed(Odd(), B, D).next()
