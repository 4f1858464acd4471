"""The prefetching reader: the same stream with and without grain, resumable at any step."""

import itertools
import threading
import time

import numpy as np
import pytest

from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.reader import prefetched
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.errors import DataError

BATCHES = TrainingBatches(TokenStream(np.arange(1 + 8 * 30, dtype=np.uint32), 1, 1), 8, 8, seed=3, equal_updates=False)


@pytest.fixture(params=["grain", "threads"])
def use_grain(request):
    if request.param == "grain":
        pytest.importorskip("grain")
    return request.param == "grain"


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("rows", [slice(None), np.arange(4), np.array([1, 2, 7])], ids=str)
def test_the_stream_is_the_plain_one(use_grain, rows):
    with prefetched(BATCHES, 0, rows, use_grain=use_grain) as reader:
        for step, batch in enumerate(itertools.islice(reader, 20)):  # five epochs
            assert_same(batch, BATCHES.batch(step, rows))


def test_resuming_at_any_step_gives_the_rest_of_the_same_stream(use_grain):
    for stop in range(10):
        with prefetched(BATCHES, use_grain=use_grain) as reader:
            for _ in range(stop):
                next(reader)
            state = reader.state()
        assert state == {"step": stop}
        with prefetched(BATCHES, state["step"], use_grain=use_grain) as reader:
            for step in range(stop, stop + 6):
                assert_same(next(reader), BATCHES.batch(step))


def test_a_resumed_run_may_use_another_number_of_processes(use_grain):
    with prefetched(BATCHES, 0, np.arange(4, 8), use_grain=use_grain) as reader:
        next(reader)
        step = reader.state()["step"]
    parts = []
    for process in range(4):
        with prefetched(BATCHES, step, np.arange(2 * process, 2 * process + 2), use_grain=use_grain) as reader:
            parts.append(next(reader)["inputs"])
    np.testing.assert_array_equal(np.concatenate(parts), BATCHES.batch(1)["inputs"])


def test_batches_are_prepared_ahead(use_grain, monkeypatch):
    asked = []
    plain = TrainingBatches.batch

    def noted(self, step, *arguments):
        asked.append(step)
        return plain(self, step, *arguments)

    monkeypatch.setattr(TrainingBatches, "batch", noted)
    with prefetched(BATCHES, 5, use_grain=use_grain, ahead=4) as reader:
        next(reader)
        deadline = time.monotonic() + 10
        while len(asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert set(range(5, 10)) <= set(asked)  # the one that was taken and four more
        assert len(asked) <= 8  # and no endless queue
        assert reader.state() == {"step": 6}


def test_closing_ends_the_threads():
    before = threading.active_count()
    reader = prefetched(BATCHES, use_grain=False)
    next(reader)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_caller(use_grain, monkeypatch):
    def fail(self, step, *arguments):
        raise DataError("the file is gone")

    monkeypatch.setattr(TrainingBatches, "batch", fail)
    with prefetched(BATCHES, use_grain=use_grain) as reader, pytest.raises(DataError, match="the file is gone"):
        next(reader)


def test_impossible_positions_are_refused():
    with pytest.raises(DataError, match="step = -1"):
        prefetched(BATCHES, -1)
