"""Batches prepared ahead: the same stream, from any step."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest

from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.errors import DataError

BATCHES = TrainingBatches(TokenStream(np.arange(1 + 8 * 30, dtype=np.uint32), 1, 1), 8, 8, seed=3, equal_updates=False)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("rows", [slice(None), np.arange(4), np.array([1, 2, 7])], ids=str)
def test_the_stream_is_the_plain_one_from_any_step(rows):
    for start in (0, 1, 9):
        with contextlib.closing(BATCHES.prefetched(start, rows)) as reader:
            for step, batch in enumerate(itertools.islice(reader, 20), start):  # five epochs
                assert_same(batch, BATCHES.batch(step, rows))


def test_a_resumed_run_may_use_another_number_of_processes():
    parts = []
    for process in range(4):
        with contextlib.closing(BATCHES.prefetched(1, np.arange(2 * process, 2 * process + 2))) as reader:
            parts.append(next(reader)["inputs"])
    np.testing.assert_array_equal(np.concatenate(parts), BATCHES.batch(1)["inputs"])


def test_batches_are_prepared_ahead(monkeypatch):
    asked = []
    plain = TrainingBatches.batch

    def noted(self, step, *arguments):
        asked.append(step)
        return plain(self, step, *arguments)

    monkeypatch.setattr(TrainingBatches, "batch", noted)
    with contextlib.closing(BATCHES.prefetched(5)) as reader:
        next(reader)
        deadline = time.monotonic() + 10
        while len(asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(asked) == list(range(5, 10))  # the one that was taken and four more


def test_closing_ends_the_threads():
    before = threading.active_count()
    reader = BATCHES.prefetched(0)
    next(reader)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_caller(monkeypatch):
    def fail(self, step, *arguments):
        raise DataError("the file is gone")

    monkeypatch.setattr(TrainingBatches, "batch", fail)
    with pytest.raises(DataError, match="the file is gone"):
        next(BATCHES.prefetched(0))
