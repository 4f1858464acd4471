"""Data that the caller brings: every source gives the batches that plain arithmetic says, also after a kill."""

import importlib
import itertools
import json
import os
import sys
import textwrap

import numpy as np
import pytest

from tests.support.commands import run_line
from tests.support.compilation import quick_flags
from tests.support.optional import need_modules
from tlinformer_jax import load_run, train_and_evaluate
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data import ordered as ordered_data
from tlinformer_jax.data.batches import ALL, StagedReader, TrainingBatches, evaluation_batches
from tlinformer_jax.data.given import TokenFile, given_loader
from tlinformer_jax.data.ordered import OrderedBatches
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import build_tokenizer, load_tokenizer
from tlinformer_jax.decoding import Generator
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run
from tools.fault_check import logged

N, ROWS, VOCABULARY, END = 8, 8, 66, 65
IDS = np.random.default_rng(0).integers(0, 65, 3000).astype(np.uint16)
DOCUMENTS = [part.tolist() for part in np.split(IDS, np.sort(np.random.default_rng(1).choice(3000, 60, replace=False)))]
CONFIG = DataConfig(dataset="tokens", tokenizer="ids:65", sequence_length=N)
FRESH = {  # a new source of the same documents at every call
    "list": lambda: DOCUMENTS,
    "dicts": lambda: [{"input_ids": document, "attention_mask": [1] * len(document)} for document in DOCUMENTS],
    "datasets": lambda: package("datasets").Dataset.from_dict({"input_ids": DOCUMENTS}),
    "generator": lambda: (document for document in DOCUMENTS),
    "again": lambda: Again(DOCUMENTS),
    "grain map": lambda: grain().MapDataset.source(DOCUMENTS),
    "grain repeated": lambda: grain().MapDataset.source(DOCUMENTS).repeat(3),
    "grain loader": lambda: grain().DataLoader(
        data_source=DOCUMENTS, sampler=grain().samplers.SequentialSampler(len(DOCUMENTS)), worker_count=0
    ),
    "grain iterator": lambda: grain().MapDataset.source(DOCUMENTS).to_iter_dataset(),
}
SEEKING = ("list", "dicts", "datasets", "grain map", "grain repeated", "grain loader", "grain iterator")


class Again:
    """An iterable without length that can be read again."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def package(name):
    need_modules(name, extra="test")
    return importlib.import_module(name)


def grain():
    return package("grain")


def load(data, split="train", positions=None, tokenizer="ids:65"):
    loader = given_loader({split: data}, VOCABULARY, ROWS, positions, True)
    return loader(CONFIG, split, build_tokenizer(tokenizer))


def ordered(data, positions=None) -> OrderedBatches:
    return OrderedBatches(load(data, positions=positions), N, ROWS, 0)


def taken(batches, count, start=0, rows=slice(None)):
    reader = batches.prefetched(start, rows)
    found = list(itertools.islice(reader, count))
    reader.close()
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def expected_batches(count):
    """Epoch after epoch of all documents, each with its end, cut into samples that overlap by one token."""
    row = np.tile(np.concatenate([[*document, END] for document in DOCUMENTS]), 4)
    batches = []
    for start in range(0, count * N * ROWS, N * ROWS):
        part = row[start : start + N * ROWS + 1].astype(np.int32)
        inputs, labels = part[:-1].reshape(ROWS, N), part[1:].reshape(ROWS, N)
        batches.append({"inputs": inputs, "labels": labels, "weights": np.ones((ROWS, N), np.float32)})
    return batches


@pytest.mark.parametrize("kind", ["array", "signed", "npy", "bin", "bin of uint32", "mapped", "name"])
def test_arrays_and_files_are_the_row_of_their_ids(tmp_path, kind):
    np.save(tmp_path / "a.npy", IDS)
    IDS.tofile(tmp_path / "a.bin")
    IDS.astype("<u4").tofile(tmp_path / "b.bin")
    data = {
        "array": IDS,
        "signed": IDS.astype(np.int64),
        "npy": tmp_path / "a.npy",
        "bin": tmp_path / "a.bin",
        "bin of uint32": TokenFile(tmp_path / "b.bin", "uint32"),
        "mapped": np.memmap(tmp_path / "a.bin", np.uint16, mode="r"),
        "name": f"{tmp_path}/b.bin:uint32",
    }[kind]
    plain = TrainingBatches(TokenStream(IDS, 0, 0), N, ROWS, seed=3)
    batches = TrainingBatches(load(data), N, ROWS, seed=3)
    assert_same([batches.batch(step) for step in (0, 99)], [plain.batch(step) for step in (0, 99)])


@pytest.mark.parametrize("kind", FRESH)
def test_documents_are_joined_with_their_ends(kind):
    epochs = 1 if kind == "generator" else 3
    count = epochs * sum(len(document) + 1 for document in DOCUMENTS) // (N * ROWS) - 1
    assert_same(taken(ordered(FRESH[kind]()), count), expected_batches(count))
    assert_same(taken(ordered(FRESH[kind]()), 3, rows=np.array([2])), [_rows(b, [2]) for b in expected_batches(3)])


def _rows(batch, rows):
    return {name: array[rows] for name, array in batch.items()}


def test_a_vocabulary_ends_its_documents_as_its_tokenizer_does():
    batch = taken(OrderedBatches(load([[7], [8, 9]], tokenizer="numbers:66"), N, ROWS, 0), 1)[0]
    assert batch["inputs"][0].tolist() == [7, 0, 8, 9, 0, 7, 0, 8]


@pytest.mark.parametrize("kind", FRESH)
@pytest.mark.parametrize("start", [0, 1, 30, 60])
def test_reading_goes_on_where_a_run_has_stopped(tmp_path, monkeypatch, capfd, kind, start):
    if kind == "generator" and start == 60:
        return  # it has one epoch, of 47 batches
    monkeypatch.setattr(ordered_data, "RECORD_EVERY", 0)
    positions, count = tmp_path / "positions.jsonl", 10
    taken(ordered(FRESH[kind](), positions), start + 5)
    with positions.open("a") as file:
        earlier = {"step": 1, "items": {"epoch": 0, "item": 3, "state": None}, "offset": 4, "carry": [7], "batch": "x"}
        file.write(f'{json.dumps(earlier)}\n{{"step": 3, "it')  # an earlier version's, and a kill while it was written
    source = FRESH[kind]()
    seen = []
    if kind == "list":

        class Noting(list):
            def __getitem__(self, number):
                seen.append(number)
                return super().__getitem__(number)

        source = Noting(source)
    batches = ordered(source, positions)
    seen.clear()
    capfd.readouterr()
    assert_same(taken(batches, count, start), expected_batches(start + count)[start:])
    told = capfd.readouterr().err
    assert ("continues at item" in told) == (start > 0 and kind in SEEKING)
    assert ("are read again and dropped" in told) == (start > 0 and kind not in SEEKING)
    if kind == "list" and start == 30:
        assert min(seen) > 0.5 * 30 * N * ROWS / 3000 * len(DOCUMENTS)  # not from the beginning


def test_other_data_than_before_is_said(tmp_path, capfd):
    positions = tmp_path / "positions.jsonl"
    taken(ordered((document for document in DOCUMENTS), positions), 5)
    taken(ordered((document for document in DOCUMENTS), positions), 5, start=3)
    assert "changed" not in capfd.readouterr().err
    taken(ordered((document for document in DOCUMENTS[::-1]), positions), 5, start=3)
    assert "train_data: has changed or was reordered since the last run here" in capfd.readouterr().err


TOKENS = IDS[: ROWS * (N + 1)].reshape(ROWS, N + 1).astype(np.int64)


@pytest.mark.parametrize(
    ("item", "weight"),
    [
        (TOKENS, 1),
        ({"tokens": TOKENS}, 1),
        ({"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), "text": "x"}, 1),
        ({"input_ids": TOKENS, "attention_mask": np.tril(np.ones_like(TOKENS), 4)}, np.tri(ROWS, N, 3)),
        ({"input_ids": TOKENS, "labels": np.where(np.tri(ROWS, N + 1, 4), TOKENS, -100)}, np.tri(ROWS, N, 3)),
        ({"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:]}, 1),
        ({"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "weights": np.eye(ROWS, N)}, np.eye(ROWS, N)),
    ],
)
def test_batches_are_trained_on_as_they_come(item, weight):
    weights = np.full((ROWS, N), weight, np.float32)
    batch = {"inputs": TOKENS[:, :-1].astype(np.int32), "labels": TOKENS[:, 1:].astype(np.int32), "weights": weights}
    assert_same(taken(ordered([item]), 2), [batch, batch])
    stream = load([item, item], "validation")
    assert_same(list(evaluation_batches(stream, N, ROWS)), [batch, batch])
    (last,) = evaluation_batches(stream, N, 3 * ROWS)
    assert_same([_rows(last, slice(ROWS, 2 * ROWS))], [batch])
    assert not any(array[2 * ROWS :].any() for array in last.values())


def test_samples_that_grain_batches():
    rows = IDS[: 3 * ROWS * (N + 1)].reshape(3 * ROWS, N + 1).astype(np.int32)
    data = grain().MapDataset.source(list(rows)).shuffle(seed=3).batch(ROWS)
    order = [data[step] for step in range(3)]
    for source in (data, data.to_iter_dataset()):
        found = taken(ordered(source), 3)
        np.testing.assert_array_equal([batch["labels"] for batch in found], [rows[:, 1:] for rows in order])


def test_what_follows_a_batch_of_n_tokens_is_not_asked_for():
    batch = taken(ordered([TOKENS[:, :-1]]), 1)[0]
    np.testing.assert_array_equal(batch["labels"][:, :-1], TOKENS[:, 1:-1])
    np.testing.assert_array_equal(batch["weights"], np.tile([1] * (N - 1) + [0], (ROWS, 1)))


def test_validation_documents_are_one_row():
    for kind in ("list", "dicts", "generator", "again", "grain map", "grain iterator"):
        stream = load(FRESH[kind](), "validation")
        assert stream.tokens.tolist() == [token for document in DOCUMENTS for token in (*document, END)]


BAD = {
    "floats": (np.ones(100), r"train_data: must hold integers, token ids; its dtype is float64"),
    "a table": (
        np.ones((10, 10), int),
        r"train_data: must be one row of token ids, \[length\]; its shape is \[10, 10\]",
    ),
    "no iterable": (3, "train_data: must be token ids, a .npy or .bin file or an iterable of .*, not int"),
    "a dict of splits": ({"train": [[1]]}, "train_data: must be token ids, .*, not dict"),
    "bytes": (b"abc", "train_data: must be token ids, .*, not bytes"),
    "only None": ([None] * 5, "train_data: all of its 5 items are None"),
    "nothing": ([], "train_data: ends after 0 items"),
    "an empty generator": (iter(()), "train_data: ends after 0 items"),
    "text": (["some text"], "train_data, item 0: must be token ids, not text; data.dataset = 'text' reads text"),
    "a list of ids": ([1, 2, 3], r"train_data, item 0: must be a document \[length\] or a batch"),
    "floats in a document": ([[0.5]], "train_data, item 0: must be integers, token ids; its dtype is float64"),
    "a ragged item": ([[[1], [2, 3]]], "train_data, item 0: must be a list of token ids"),
    "past the vocabulary": (
        [[1, 66]],
        "train_data, item 0: token id 66 is outside the vocabulary; model.vocab_size = 66",
    ),
    "negative": ([[1, -1]], "train_data, item 0: token id -1 is outside the vocabulary"),
    "other names": ([{"ids": [1]}], r"train_data, item 0: must have 'input_ids', .* it has \['ids'\]"),
    "no labels": ([{"inputs": TOKENS}], "train_data, item 0: has 'inputs', so it must have 'labels' too"),
    "a short batch": (
        [TOKENS[:2]],
        r"train_data, item 0: a batch must be \[8, 9\] or \[8, 8\], because of train.batch_size and",
    ),
    "labels of another length": (
        [{"inputs": TOKENS[:, 1:], "labels": TOKENS[:, 2:]}],
        r"train_data, item 0, 'labels': must have the shape of its tokens, \[8, 8\]; it is \[8, 7\]",
    ),
    "other labels beside ids": (
        [{"input_ids": TOKENS, "labels": np.roll(TOKENS, 1)}],
        "train_data, item 0, 'labels': must be the same ids, or -100",
    ),
    "weights that are words": (
        [{"inputs": TOKENS[:, 1:], "labels": TOKENS[:, 1:], "weights": "all"}],
        "train_data, item 0, 'weights': must be numbers >= 0",
    ),
    "weights that are not numbers": (
        [{"inputs": TOKENS[:, 1:], "labels": TOKENS[:, 1:], "weights": np.full((ROWS, N), np.nan)}],
        "train_data, item 0, 'weights': must be numbers >= 0; it holds nan",
    ),
    "a mask of the rows": (
        [{"input_ids": TOKENS, "attention_mask": np.ones(ROWS)}],
        r"train_data, item 0, 'attention_mask': must have the shape of its tokens, \[8, 9\]; it is \[8\]",
    ),
    "a padded document": (
        [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}],
        "train_data, item 0, 'attention_mask': must not hold 0: every token of a document counts",
    ),
    "a document with a prompt left out": (
        [{"input_ids": [1, 2, 0], "labels": [-100, 2, 0]}],
        "train_data, item 0, 'labels': must not hold -100: every token of a document counts",
    ),
    "a long batch": ([np.ones((8, 11), int)], r"data.sequence_length; it is \[8, 11\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_compiled(what):
    data, message = BAD[what]
    with pytest.raises(DataError, match=message) as caught:
        ordered(data)
    assert "\n" not in str(caught.value)


def test_an_iterable_is_begun_twice_before_training():
    """To see what its items are, and to check the first one; each time may start workers or fill a buffer."""
    begun = []

    class Source:
        def __iter__(self):
            begun.append(True)
            return iter(DOCUMENTS)

    with StagedReader(ordered(Source()), None, 0, ALL) as reader:
        next(reader)
    assert len(begun) == 3


def test_a_position_that_cannot_be_kept_is_said(tmp_path):
    class Reader:
        def __init__(self):
            self.items = iter(DOCUMENTS)

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.items)

        def get_state(self):
            return object()

        def set_state(self, state):
            pass

    with pytest.raises(DataError, match="train_data: get_state must return bytes, or a value that JSON can store"):
        taken(ordered(Reader(), tmp_path / "positions.jsonl"), 2)
    assert not (tmp_path / "positions.jsonl").exists() or not (tmp_path / "positions.jsonl").read_text()


def test_a_late_item_is_named_by_its_number():
    for item, message in (
        ([99], "item 2: token id 99"),
        (TOKENS, "item 2: is a batch; items before it are documents"),
    ):
        with pytest.raises(DataError, match=message):
            taken(ordered([[1] * 40, [2] * 40, item]), 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.bin",
            b"abc",
            r"a.bin': cannot be read \(Size of available data is not a multiple of the data-type size",
        ),
        ("a.bin", b"", r"a.bin': cannot be read \(cannot mmap an empty file"),
        ("a.bin", np.arange(50, dtype="<u4").tobytes(), "every second uint16 is 0, as in uint32 files"),
        ("a.npy", b"nonsense", "a.npy': cannot be read"),
        ("a.npy", b"PK\5\6" + bytes(18), "a.npy': cannot be read"),  # an empty .npz
        ("a.npy", None, "a.npy': cannot be read .No such file"),
        ("a.txt", b"1 2 3", "a.txt': must be a file of token ids, .npy or .bin"),
    ],
)
def test_a_file_that_holds_no_ids_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"train_data = '{tmp_path}/")
    assert "\n" not in str(caught.value)


def run_config(**data) -> dict:
    model = {"d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 32}
    train = {"steps": 4, "batch_size": ROWS, "log_every": 2, "checkpoint_every": 2, "warmup_steps": 0}
    return {
        "model": model | {"history_window": 4, "generation_window": 4, "dtype": "float32"},
        "train": train,
        "data": {"dataset": "tokens", "tokenizer": "ids:65", "sequence_length": N} | data,
    }


@pytest.mark.slow
def test_a_run_on_files_is_evaluated_and_generates_from_its_directory(tmp_path):
    np.save(tmp_path / "train.npy", IDS)
    IDS[:300].tofile(tmp_path / "validation.bin")
    files = {"train_data": tmp_path / "train.npy", "validation_data": str(tmp_path / "validation.bin")}
    figures = train_and_evaluate(run_config(), tmp_path / "run", **files)
    assert "bits_per_byte" not in figures
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert stored["train_files"] == str(tmp_path / "train.npy")
    assert stored["validation_files"] == f"{tmp_path}/validation.bin:uint16"
    assert load_tokenizer(tmp_path / "run").name == "ids:65"
    trained = load_run(tmp_path / "run")
    report = evaluate_run(trained, trained.run.split("validation"), split="validation")
    assert report["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    (text,) = Generator.from_workdir(tmp_path / "run").generate(["1 2 3"], max_new_tokens=5)
    assert all(0 <= int(word) < 128 for word in text.split())
    # The same files by the configuration alone.
    named = run_config(train_files=str(tmp_path / "train.npy"), validation_files=f"{tmp_path}/validation.bin")
    assert train_and_evaluate(named, tmp_path / "named") == figures


def test_data_of_a_program_is_not_kept(tmp_path, capfd):
    figures = train_and_evaluate(run_config(), tmp_path / "run", train_data=DOCUMENTS, validation_data=IDS[:100])
    told = capfd.readouterr().err
    assert f"next, in Python: evaluate_run(load_run('{tmp_path}/run', validation_data=...))" in told
    assert '--prompt="1 2 3"' in told
    with pytest.raises(DataError, match=r"data\.validation_files = '': must name"):
        load_run(tmp_path / "run").run.split("validation")
    trained = load_run(tmp_path / "run", validation_data=IDS[:100])
    report = evaluate_run(trained)  # the split is read by itself
    assert report["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    longer = evaluate_run(trained, options=EvaluationOptions(length=2 * N))
    assert (longer["length"], longer["tokens"]) == (2 * N, 99)
    with pytest.raises(DataError, match=r"data\.train_files = '': must name a .npy or .bin file"):
        train_and_evaluate(run_config(), tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (run_config(dataset="pydoc", tokenizer="bytes"), {}, "data.dataset = 'pydoc': must be 'tokens'"),
        (run_config(tokenizer="ids:2"), {}, "data.tokenizer = 'ids:2': must be ids:V with V from 4"),
        (run_config(), {"validation_data": None}, "validation_data: must be given too"),
        (run_config(), {"validation_data": IDS[:5]}, "the validation split has only 5 tokens"),
        (
            run_config(),
            {"validation_data": IDS[:50] + 100},
            "split 'validation' of data.dataset = tokens, position 0: token id 1",
        ),
        (run_config(), {"train_data": -IDS.astype(int)}, "token id -.* is outside the vocabulary"),
    ],
)
def test_a_run_that_cannot_be_is_refused_with_nothing_written(tmp_path, config, data, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        train_and_evaluate(config, tmp_path / "run", **{"train_data": DOCUMENTS, "validation_data": IDS[:50], **data})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_epochs_of_an_iterable_are_not_known(tmp_path):
    for train, message in (
        ({"steps": "1epoch"}, "epochs are unknown"),
        ({"eval_every": "epoch"}, "in updates"),
    ):
        config = run_config()
        config["train"] |= train
        with pytest.raises((ConfigError, DataError), match=message):
            train_and_evaluate(config, tmp_path / "run", train_data=DOCUMENTS, validation_data=IDS[:50])


# Trains on each kind of data: to a kill in a fork, on from there, and once without a kill.
TRAINING = """
    import os, pathlib, signal, sys
    from tests.data.test_given import FRESH, IDS, run_config
    from tlinformer_jax import train_and_evaluate

    def trained(name, kind, killed_after=None):
        config = run_config()
        config["model"] |= {"architecture": "transformer", "dropout": 0.1}  # is soon traced
        config["train"] |= {"steps": 110, "log_every": 20, "checkpoint_every": 20}
        data = IDS if kind == "array" else FRESH[kind]()
        kill = lambda view: view.step == killed_after and os.kill(os.getpid(), signal.SIGKILL)
        workdir = pathlib.Path(sys.argv[1]) / name / kind
        return train_and_evaluate(config, workdir, train_data=data, validation_data=IDS[:200], callbacks=[kill])

    for kind in sys.argv[2:]:
        if not (child := os.fork()):
            trained("parts", kind, killed_after=75)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for kind in sys.argv[2:]:
        print("next kind", file=sys.stderr)
        print(kind, trained("parts", kind)["loss"].hex(), flush=True)
    for kind in ("array", "list"):
        print(kind, trained("whole", kind)["loss"].hex(), flush=True)
"""
KINDS = ("array", "list", "grain map", "grain iterator", "again")  # all but the first give the same batches


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_go_on_bit_by_bit(tmp_path):
    """An epoch has 47 updates: one ends before the kill, one after it."""
    grain()
    line = [sys.executable, "-c", textwrap.dedent(TRAINING), str(tmp_path), *KINDS]
    done = run_line(line, os.environ | {"XLA_FLAGS": quick_flags()})
    assert done.returncode == 0, done.stderr
    for kind, told in zip(KINDS, done.stderr.split("next kind")[1:], strict=True):
        assert "continuing from step" in told, (kind, told)
        assert ("train_data: continues at item" in told) == (kind in SEEKING), (kind, told)
    *parts, array, documents = [line.split()[-1] for line in done.stdout.splitlines()]
    assert parts == [array, *[documents] * 4]
    assert array != documents
    for kind in KINDS:
        part = logged(tmp_path / "parts" / kind)
        assert part == logged(tmp_path / "whole" / ("array" if kind == "array" else "list"))
        assert len(part) >= 6
