"""Batches: one global order for any number of processes, every label once an epoch, the paper's epochs."""

import numpy as np
import pytest

from tlinformer_jax.data import batches as module
from tlinformer_jax.data.batches import (
    TrainingBatches,
    epoch_permutation,
    evaluation_batches,
    num_samples,
    paper_gradient_weights,
)
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.errors import DataError


def stream_of(length: int) -> TokenStream:
    """Tokens that name their own position."""
    return TokenStream(np.arange(length, dtype=np.uint32), num_bytes=length, num_documents=1)


def real_samples(batches: TrainingBatches, step: int) -> int:
    """Rows of an update that are not padding."""
    return int((batches.indices(step) >= 0).sum())


def epoch_rows(batches: TrainingBatches, steps) -> np.ndarray:
    """[rows, N + 1] of several updates, padding left out."""
    rows = []
    for step in steps:
        batch = batches.batch(step)
        real = batch["weights"][:, 0] > 0
        rows.append(np.concatenate([batch["inputs"][:, :1], batch["labels"]], axis=1)[real])
    return np.concatenate(rows)


def test_a_batch_holds_consecutive_tokens_and_labels_shifted_by_one():
    batch = TrainingBatches(stream_of(1000), 16, 8, seed=0).batch(3)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((8, 16), "int32"),
        "labels": ((8, 16), "int32"),
        "weights": ((8, 16), "float32"),
    }
    np.testing.assert_array_equal(batch["labels"], batch["inputs"] + 1)
    np.testing.assert_array_equal(batch["inputs"][:, 0] % 16, 0)
    np.testing.assert_array_equal(batch["inputs"], batch["inputs"][:, :1] + np.arange(16))


@pytest.mark.parametrize("equal_updates", [True, False])
@pytest.mark.parametrize("length", [1 + 8 * 24, 1 + 8 * 24 + 7, 8 * 24])
def test_each_label_but_the_first_token_and_the_remainder_exactly_once_an_epoch(length, equal_updates):
    n, size = 8, 4  # 24 or 23 samples: with 23 the last update is short, or crosses into the next epoch
    batches = TrainingBatches(stream_of(length), n, size, seed=5, equal_updates=equal_updates)
    count = batches.samples_per_epoch
    assert count == (length - 1) // n
    rows = epoch_rows(batches, range(batches.updates_for_epochs(3)))
    for epoch in range(3):
        labels = rows[epoch * count : (epoch + 1) * count, 1:]
        np.testing.assert_array_equal(np.sort(labels.ravel()), np.arange(1, count * n + 1))


def test_every_epoch_has_another_order_and_every_seed_too():
    batches = TrainingBatches(stream_of(1 + 8 * 64), 8, 16, seed=0)
    orders = [batches.indices(step) for step in range(8)]
    first, second = np.concatenate(orders[:4]), np.concatenate(orders[4:])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(64))
    assert not np.array_equal(TrainingBatches(stream_of(1 + 8 * 64), 8, 16, seed=1).indices(0), orders[0])


def test_the_order_is_the_one_that_earlier_runs_used():
    """If this fails, runs that were begun before the change can no longer be resumed in their order."""
    assert epoch_permutation(12, seed=7, epoch=3).tolist() == [7, 1, 9, 6, 0, 11, 10, 4, 2, 8, 3, 5]


def test_streams_read_in_turn_sort_their_epochs_once(monkeypatch):
    """Runs of several seeds in one program take a batch of each stream for every update."""
    sorted_epochs = []

    def counted(*given):
        sorted_epochs.append(given)
        return epoch_permutation(*given)

    monkeypatch.setattr(module, "epoch_permutation", counted)
    streams = [TrainingBatches(stream_of(1 + 8 * 10), 8, 4, seed) for seed in range(5)]
    found = [[stream.indices(step) for stream in streams] for step in range(5)]  # two epochs
    assert sorted(sorted_epochs) == [(10, seed, epoch) for seed in range(5) for epoch in range(2)]
    for seed in range(5):
        expected = np.concatenate([epoch_permutation(10, seed, epoch) for epoch in range(2)])
        np.testing.assert_array_equal(np.concatenate([row[seed] for row in found]), expected)


def test_an_epoch_boundary_inside_an_update():
    batches = TrainingBatches(stream_of(1 + 8 * 10), 8, 4, seed=0)  # 10 samples: update 2 is half of each epoch
    expected = np.concatenate([epoch_permutation(10, 0, epoch) for epoch in range(2)])
    np.testing.assert_array_equal(np.concatenate([batches.indices(step) for step in range(5)]), expected)
    assert [batches.updates_for_epochs(k) for k in (0, 1, 2)] == [0, 3, 5]
    assert [real_samples(batches, step) for step in range(5)] == [4] * 5


def test_the_papers_last_update_of_an_epoch_is_smaller():
    batches = TrainingBatches(stream_of(1 + 8 * 10), 8, 4, seed=0, equal_updates=False)
    assert [batches.updates_for_epochs(k) for k in (0, 1, 2)] == [0, 3, 6]
    assert [real_samples(batches, step) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    last = batches.batch(2)
    assert last["weights"][:, 0].tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(last["inputs"][:2, 0], 8 * epoch_permutation(10, 0, 0)[8:])
    np.testing.assert_array_equal(batches.batch(3)["inputs"][:, 0], 8 * epoch_permutation(10, 0, 1)[:4])


@pytest.mark.parametrize("micro_batch", [32, 16, 8])
@pytest.mark.parametrize("samples", [256 * 3, 256 * 3 + 1, 256 * 3 + 32, 256 * 3 + 33, 256 * 4 - 1])
def test_updates_an_epoch_are_the_papers(samples, micro_batch):
    """ceil(ceil(S/m) / (256/m)), and the gradient a sum of micro-batch means over 256/m."""
    batches = TrainingBatches(stream_of(1 + 2 * samples), 2, 256, seed=0, equal_updates=False)
    micro_batches = -(-samples // micro_batch)
    assert batches.updates_for_epochs(1) == -(-micro_batches // (256 // micro_batch))
    left = real_samples(batches, 3) if samples > 768 else 256
    losses = np.random.default_rng(0).normal(size=256)
    losses[left:] = 1e9  # padding must not count
    expected = sum(
        losses[start : min(start + micro_batch, left)].mean() / (256 // micro_batch)
        for start in range(0, left, micro_batch)
    )
    weights = paper_gradient_weights(left, 256, micro_batch)
    np.testing.assert_allclose((weights * losses).mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("equal_updates", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_global_order_is_the_same_for_any_number_of_processes(num_processes, equal_updates):
    batches = TrainingBatches(stream_of(1 + 8 * 30), 8, 8, seed=3, equal_updates=equal_updates)
    for step in range(9):
        whole = batches.batch(step)
        shares = [np.arange(8)[process::num_processes] for process in range(num_processes)]
        for name, array in whole.items():
            for rows in shares:
                np.testing.assert_array_equal(batches.batch(step, rows)[name], array[rows])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_evaluation_visits_every_sample_once_in_order(num_processes):
    stream = stream_of(1 + 8 * 10 + 3)
    shares = np.split(np.arange(4), num_processes)
    parts = [list(evaluation_batches(stream, 8, 4, rows)) for rows in shares]
    rows = []
    for step in zip(*parts, strict=True):
        labels = np.concatenate([part["labels"] for part in step])
        weights = np.concatenate([part["weights"] for part in step])
        assert labels.shape == (4, 8)
        rows.append(labels[weights > 0])
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(1, 81))


def test_a_corpus_shorter_than_one_sample_is_refused():
    assert num_samples(stream_of(9), 8) == 1
    TrainingBatches(stream_of(9), 8, 4, seed=0)
    for refused in (
        lambda: TrainingBatches(stream_of(8), 8, 4, seed=0),
        lambda: next(evaluation_batches(stream_of(8), 8, 4)),
    ):
        with pytest.raises(DataError, match=r"data\.sequence_length = 8: .* only 8 tokens; it must hold"):
            refused()
