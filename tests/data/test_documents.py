"""Documents packed into samples: no token lost, no short document cut, little padding, the same on every start."""

import numpy as np
import pytest

from tlinformer_jax.data.batches import TrainingBatches, evaluation_batches, num_samples
from tlinformer_jax.data.documents import DocumentStream, best_fit
from tlinformer_jax.data.streams import TokenStream

END = 0


def stream_of(lengths) -> DocumentStream:
    """Documents of so many tokens, with an end-of-text after each; every other token is another id."""
    tokens = np.arange(1, sum(lengths) + len(lengths) + 1, dtype=np.uint32)
    tokens[np.cumsum(np.asarray(lengths) + 1) - 1] = END
    return DocumentStream.of(TokenStream(tokens, num_bytes=len(tokens), num_documents=len(lengths)), END)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Lengths: most are short, a few are very long."""
    return np.random.default_rng(seed).lognormal(5.0, 1.2, count).astype(int)


def rows_of(stream: DocumentStream, length: int, batch_size: int = 4) -> dict[str, np.ndarray]:
    batches = list(evaluation_batches(stream, length, batch_size))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_documents_begin_with_the_end_of_text_before_them_and_predict_their_own():
    rows = rows_of(stream_of([2, 0, 5, 1]), 4, batch_size=1)  # 1 2 E E 5 6 7 8 9 E 11 E
    found = {tuple(map(tuple, columns)) for columns in zip(rows["inputs"], rows["labels"], rows["documents"])}
    assert found == {
        ((0, 5, 6, 7), (5, 6, 7, 8), (0, 0, 0, 0)),
        ((1, 2, 8, 9), (2, 0, 9, 0), (0, 0, 1, 1)),
        ((0, 0, 11, 0), (0, 11, 0, 0), (0, 1, 1, 2)),
    }
    assert rows["weights"].sum(1).tolist() == [4, 4, 3]
    assert {name: array.dtype.name for name, array in rows.items()} == {
        "inputs": "int32",
        "labels": "int32",
        "documents": "int32",
        "weights": "float32",
    }


@pytest.mark.parametrize("length", [1, 64, 1024])
def test_every_token_but_the_first_is_predicted_once_after_the_one_before_it(length):
    stream = stream_of(drawn(300))
    rows = rows_of(stream, length)
    real = rows["weights"] > 0
    pairs = np.stack([rows["inputs"][real], rows["labels"][real]], axis=1)
    expected = np.stack([stream.tokens[:-1], stream.tokens[1:]], axis=1)
    np.testing.assert_array_equal(np.unique(pairs, axis=0), np.unique(expected, axis=0))
    assert len(pairs) == len(stream.tokens) - 1


def test_a_document_that_fits_is_whole_and_shares_its_number_with_none():
    lengths, length = drawn(300), 256
    stream = stream_of(lengths)
    rows = rows_of(stream, length)
    places = {label: place for place, label in np.ndenumerate(rows["labels"])}
    firsts = np.concatenate([[1], np.flatnonzero(stream.tokens == END) + 2])
    for number, (first, count) in enumerate(zip(firsts, lengths)):
        if 2 <= count < length:
            own = [places[token] for token in range(first + (number == 0), first + count)]
            row, start = own[0]
            here = rows["documents"][row] == rows["documents"][own[0]]
            assert own == [(row, start + offset) for offset in range(len(own))]
            assert np.flatnonzero(here).tolist() == list(range(start, start + len(own) + 1)), "and the end-of-text"
            assert rows["weights"][row][here].all()


@pytest.mark.parametrize("length", [512, 2048])
def test_little_is_padding(length):
    """Less than 0.2% of 1.4 million rows; more than 40% where no documents shared a sample."""
    lengths = drawn(5000)
    stream = stream_of(lengths)
    padding = stream.packing(length).padding
    assert padding == pytest.approx(1 - rows_of(stream, length, 1)["weights"].mean(dtype=float))
    assert padding < 0.002
    assert 1 - len(stream.tokens) / (length * (-(-(lengths + 1) // length)).sum()) > 0.4


@pytest.mark.parametrize("seed", range(5))
def test_it_is_best_fit_by_its_definition(seed):
    sizes, length = np.random.default_rng(seed).integers(1, 21, 200), 20
    room: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [sample for sample, left in enumerate(room) if left >= size]
        if not fitting:
            room.append(length)
            fitting = [len(room) - 1]
        room[min(fitting, key=lambda sample: room[sample])] -= size
    samples = best_fit(sizes, length)
    left = length - np.bincount(samples, weights=sizes)
    assert sorted(left.tolist()) == sorted(room)


def test_batches_are_the_same_on_every_start_and_epochs_take_every_sample_once():
    lengths = drawn(200)
    first, again = (TrainingBatches(stream_of(lengths), 128, 4, seed=3) for _ in range(2))
    for name, array in first.batch(7).items():
        np.testing.assert_array_equal(again.batch(7)[name], array)
    count = num_samples(stream_of(lengths), 128)
    taken = np.concatenate([first.indices(step) for step in range(-(-count // 4))])[:count]
    assert sorted(taken.tolist()) == list(range(count))
    other = TrainingBatches(stream_of(lengths), 128, 4, seed=4)
    assert not np.array_equal(other.batch(7)["inputs"], first.batch(7)["inputs"])


def test_a_sample_below_0_is_padding():
    packing = stream_of([3, 4]).packing(8)
    batch = packing.take(stream_of([3, 4]).tokens, np.array([-1]))
    assert not any(array.any() for array in batch.values())
