"""Samples of the tasks, read back one by one as a person would, and their way into batches."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data import tasks
from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.needles import NOISE, WORDS
from tlinformer_jax.data.sources import answer_positions, available_splits, find_split, load_split, pydoc_articles
from tlinformer_jax.data.tasks import DEPTHS, AnswerPositions, TaskSplit, answer_batches
from tlinformer_jax.data.tokenizers import (
    ByteTokenizer,
    NumberTokenizer,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from tlinformer_jax.errors import ConfigError, DataError

RECALL = DataConfig(dataset="recall", tokenizer="numbers:64", sequence_length=48, num_items=6, examples=500)
COPY = DataConfig(dataset="copy", tokenizer="numbers:9", sequence_length=22)
GAP = dataclasses.replace(RECALL, dataset="recall-gap")
PARITY = DataConfig(dataset="parity", tokenizer="numbers:4", sequence_length=24)
S5 = DataConfig(dataset="s5", tokenizer="numbers:240", sequence_length=24)
NIAH = [
    DataConfig(dataset=f"niah-{kind}", tokenizer="bytes", sequence_length=1024, num_items=items, examples=500)
    for kind, items in ((1, 1), (2, 1), (3, 1), (2, 4))
]
PASSKEY = DataConfig(dataset="passkey", tokenizer="bytes", sequence_length=640, num_items=3, examples=500)

KEY_SIZE = 5  # digits of a passkey


def split_of(config: DataConfig, name: str = "train") -> TaskSplit:
    return load_split(config, name, build_tokenizer(config.tokenizer))


def test_random_words_are_splitmix64_and_depend_on_their_place_alone():
    known = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * tasks.GOLDEN
    assert tasks.mixed(known).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = tasks.random_bits(tasks.key_of("a"), np.arange(100), 7)
    np.testing.assert_array_equal(tasks.random_bits(tasks.key_of("a"), np.array([42, 3]), 5), words[[42, 3], :5])
    assert len(set(words.ravel().tolist())) == 700
    assert not (words == tasks.random_bits(tasks.key_of("b"), np.arange(100), 7)).any()


def test_distinct_numbers_in_every_order_equally_often():
    found = tasks.distinct(tasks.random_bits(1, np.arange(24_000), 4), 4)
    counts = collections.Counter(map(tuple, found.tolist()))
    assert set(counts) == set(itertools.permutations(range(4), 2))
    assert max(abs(count - 2000) for count in counts.values()) < 4.5 * 2000**0.5
    assert sorted(tasks.distinct(tasks.random_bits(1, np.arange(1), 20), 10)[0].tolist()) == list(range(10))


@pytest.mark.parametrize(("count", "bound"), [(1, 1), (1, 5), (5, 5), (7, 8), (50, 60), (128, 130), (32, 4095)])
def test_distinct_numbers_are_those_of_floyds_algorithm_one_by_one(count, bound):
    """Fields close to full repeat replacements of replacements."""
    bits = tasks.random_bits(2, np.arange(300), 2 * count)
    for found, row in zip(tasks.distinct(bits, bound), bits):
        chosen: list[int] = []
        for number in range(count):
            newest = bound - count + number
            one = int(tasks.below(row[number : number + 1], newest + 1)[0])
            chosen.append(newest if one in chosen else one)
        assert found.tolist() == [chosen[place] for place in np.argsort(row[count:], kind="stable")]


def check_questions(samples, pairs: int, apart: int) -> list[list[int]]:
    """Checks that every key is asked for once, with its value, `apart` tokens behind it. Returns the places of the
    questions in each sample, counted from where they begin."""
    begin = pairs * (apart + 1)
    places = []
    for tokens, answers, starts, sources in zip(samples.tokens, samples.answers, samples.starts, samples.sources):
        known = dict(zip(tokens[0 : begin : apart + 1].tolist(), tokens[apart : begin : apart + 1].tolist()))
        assert len(known) == pairs
        assert all(1 <= key < 32 <= value < 64 for key, value in known.items())
        asked = np.flatnonzero(tokens[begin:] < 32) + begin
        assert sorted(tokens[asked].tolist()) == sorted(known)
        np.testing.assert_array_equal(np.flatnonzero(answers), asked)
        for at in asked:
            assert tokens[at + 1] == known[tokens[at]]
            assert (starts[at], tokens[sources[at]], tokens[sources[at] - apart]) == (at, tokens[at + 1], tokens[at])
        assert (starts[~answers] == -1).all()
        places.append((asked - begin).tolist())
    return places


def test_recall_asks_for_every_pair_once():
    places = check_questions(split_of(RECALL).task.make(np.arange(300), 48), pairs=6, apart=1)
    # The power law: small gaps are the likely ones, and all occur.
    counts = np.bincount([place // 2 for place in itertools.chain(*places)], minlength=18)
    assert counts[0] > 1.5 * counts[8] > 0
    assert counts.min() > 0


def test_a_recall_with_a_gap_has_a_filler_between_key_and_value():
    """The questions are those of recall; the filler says nothing of the value."""
    task = split_of(GAP).task
    samples = task.make(np.arange(300), 48)
    check_questions(samples, pairs=6, apart=2)
    same = (samples.tokens[:, 1:18:3] == samples.tokens[:, 2:18:3]).sum()
    assert 20 < same < 100  # of 1,800 fillers one in 32
    assert task.chance(48) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6)


@pytest.mark.parametrize("config", [PARITY, S5])
def test_states_are_products_of_all_elements_so_far(config):
    """Things are moved one permutation after the other, by hand."""
    count = 2 if config is PARITY else 5
    permutations = list(itertools.permutations(range(count)))
    split = split_of(config)
    batch, samples = tasks.take_task_samples(split, 24, np.array([3, 8, -1]))
    assert batch["weights"].tolist() == [[1.0] * 24] * 2 + [[0.0] * 24]
    assert not batch["labels"][2].any()
    for inputs, labels in zip(batch["inputs"][:2], batch["labels"][:2]):
        place = list(range(count))  # of each thing
        for element, label in zip(inputs, labels):
            place = [permutations[element][at] for at in place]
            assert permutations[label - len(permutations)] == tuple(place)
    if config is PARITY:
        np.testing.assert_array_equal(batch["labels"][:2] - 2, np.cumsum(batch["inputs"][:2], axis=1) % 2)
    assert (samples.sources == 0).all()
    np.testing.assert_array_equal(samples.starts, [np.arange(24)] * 3)
    many = split.task.make(np.arange(2000), 24)
    counts = np.bincount(many.labels[:, 20] - len(permutations), minlength=len(permutations))
    assert len(counts) == len(permutations)
    assert max(abs(counts - 2000 / len(counts))) < 5 * (2000 / len(counts)) ** 0.5
    assert split.task.chance(24) == 1 / len(permutations)


def test_copies_are_what_stood_a_half_before():
    samples = split_of(COPY).task.make(np.arange(40), 22)
    for tokens, answers, starts, sources in zip(samples.tokens, samples.answers, samples.starts, samples.sources):
        assert tokens[11] == 0
        np.testing.assert_array_equal(tokens[:11], tokens[12:])
        assert ((tokens[:11] > 0) & (tokens[:11] < 9)).all()
        np.testing.assert_array_equal(np.flatnonzero(answers), np.arange(11, 22))
        np.testing.assert_array_equal(starts[11:], np.arange(11, 22))
        np.testing.assert_array_equal(tokens[sources[11:]], tokens[12:])


def test_passkeys_hide_in_text_that_goes_on_around_them():
    split = split_of(PASSKEY, "validation")
    samples, text = split.task.make(np.arange(60), 640), b"\0".join(a.encode() for a in pydoc_articles("validation"))
    for number, (tokens, answers, starts, sources) in enumerate(
        zip(samples.tokens, samples.answers, samples.starts, samples.sources)
    ):
        written = bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8))
        hidden, asked = written.split(b" What is the pass key of")
        name, answer = asked.split(b"? It is")
        keys = re.findall(rb" The pass key of((?: \d){2}) is((?: \d){5})\.", hidden)
        assert len(keys) == len(dict(keys)) == 3
        assert dict(keys)[name] == answer
        assert len(answer) == 2 * KEY_SIZE == answers.sum()
        assert (starts[-1], (starts >= 0).sum()) == (640 - len(answer), 1)
        assert written[sources[-1] :].startswith(answer + b".")
        assert re.sub(rb" The pass key of[ \d]+ is[ \d]+\.", b"", hidden) in text
        # The last depths are where the question stands.
        possible = (len(hidden) - 2 * KEY_SIZE - 1) * DEPTHS // 640 + 1
        assert possible < DEPTHS
        assert sources[-1] * DEPTHS // 640 == number % possible
    assert len({bytes(tokens[:100].astype(np.uint8)) for tokens in samples.tokens}) > 50


@pytest.mark.parametrize("config", NIAH, ids=["S-NIAH-1", "S-NIAH-2", "S-NIAH-3", "MK-NIAH"])
def test_needles_in_a_haystack(config):
    symbols, size = ("0123456789abcdef", 32) if config.dataset == "niah-3" else ("0123456789", 7)
    text = b"\0".join(article.encode() for article in pydoc_articles("validation"))
    haystack = NOISE.encode() * 99 if config.dataset == "niah-1" else text
    samples, seen = split_of(config, "validation").task.make(np.arange(60), 1024), set()
    for tokens, answers, starts, sources in zip(samples.tokens, samples.answers, samples.starts, samples.sources):
        written = bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8))
        *body, question = written.split(b" What is the special magic number for ")
        assert len(body) == 1
        name, answer = question.split(b"? It is")
        found = re.findall(rb" The special magic number for (\w{5}) is((?: [0-9a-f])+)\.", body[0])
        needles = dict(found)
        assert len(needles) == len(found) == config.num_items
        assert set(needles) <= {word.encode() for word in WORDS.split()}
        assert needles[name] == answer
        value = answer.decode().split(" ")[1:]
        assert (len(value), set(value) <= set(symbols)) == (size, True)
        assert (answers.sum(), np.flatnonzero(answers)[0]) == (2 * size, 1024 - 2 * size)
        assert starts[-1] == 1024 - 2 * size
        assert written[sources[-1] :].startswith(answer + b".")
        assert re.sub(rb" The special magic number for \w{5} is(?: [0-9a-f])+\.", b"", body[0]) in haystack
        seen |= {answer, name}
    assert len(seen) > 60 + 20  # values all differ; of 128 names many occur


def test_every_symbol_of_a_value_is_drawn_equally_often():
    task = split_of(NIAH[2]).task
    values = task.make(np.arange(400), 1024).tokens[:, -63::2]
    for place in (0, 1, 3, 4, 31):
        counts = np.unique(values[:, place], return_counts=True)[1]
        assert len(counts) == 16
        assert max(abs(counts - 25)) < 5 * 5
    assert task.chance(1024) == 16.0**-32
    assert [split_of(config).task.chance(1024) for config in (NIAH[0], NIAH[3])] == [1e-7, 1 / 4]


@pytest.mark.parametrize(("length", "possible"), [(256, range(1, 16)), (1024, range(19)), (4096, range(20))])
def test_every_depth_that_can_hold_a_passkey_is_asked_for_equally_often(length, possible):
    """Before the first key stand the 26 bytes up to it; after the last its full stop and the question, 48 bytes."""
    task = split_of(dataclasses.replace(PASSKEY, num_items=4, sequence_length=length), "validation").task
    samples = task.make(np.arange(12 * len(possible)), length)
    depths = samples.sources.max(axis=1) * DEPTHS // length
    assert collections.Counter(depths.tolist()) == dict.fromkeys(possible, 12)


def test_a_training_sample_asks_for_several_passkeys_one_after_the_other():
    config = dataclasses.replace(PASSKEY, sequence_length=400, num_items=2)
    assert split_of(config, "validation").task.questions == 1
    samples, after = split_of(config).task.make(np.arange(40), 400), []
    for tokens, answers, starts, sources in zip(samples.tokens, samples.answers, samples.starts, samples.sources):
        written = bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8))
        body, *questions = written.split(b" What is the pass key of")
        keys = dict(part.split(b".")[0].split(b" is") for part in body.split(b" The pass key of")[1:])
        asked = dict(question.split(b"? It is") for question in questions)
        assert len(keys) == 2
        assert asked == keys
        labels = [bytes(run.astype(np.uint8)) for run in np.split(tokens[1:][answers], 2)]
        assert labels == list(asked.values())
        ends = np.flatnonzero(starts >= 0)
        after.append(sources[ends[0]] < sources[ends[1]])
        for end, answer in zip(ends, labels):
            assert bytes(tokens[starts[end] + 1 : end + 2].astype(np.uint8)) == answer
            assert written[sources[end] :].startswith(answer + b".")
    assert 5 < sum(after) < 35


@pytest.mark.parametrize("config", [RECALL, COPY, PASSKEY, GAP, PARITY, S5, *NIAH])
def test_a_sample_is_the_same_in_every_batch_and_training_never_sees_the_validation(config):
    split = split_of(config)
    length = config.sequence_length
    all_at_once, one = split.task.make(np.arange(20), length), split.task.make(np.array([17]), length)
    np.testing.assert_array_equal(all_at_once.tokens[17], one.tokens[0])
    for other in ("validation", "test"):
        held_out = split_of(config, other).task.make(np.arange(20), length)
        assert not {bytes(row) for row in all_at_once.tokens} & {bytes(row) for row in held_out.tokens}
    batches = TrainingBatches(split, length, 8, seed=3)
    batch = batches.batch(5)
    np.testing.assert_array_equal(batch["inputs"], split.task.make(batches.indices(5), length).tokens[:, :-1])
    np.testing.assert_array_equal(batch["weights"] > 0, split.task.make(batches.indices(5), length).answers)
    np.testing.assert_array_equal(batches.batch(5, np.array([6, 2]))["labels"], batch["labels"][[6, 2]])


@pytest.mark.parametrize(
    "config",
    [RECALL, COPY, PASSKEY, dataclasses.replace(PASSKEY, num_items=1), GAP, PARITY, S5, *NIAH],
    ids=lambda config: f"{config.dataset}, {config.num_items}",
)
def test_as_many_labels_count_as_are_said_to(config):
    """The loss reads no more of a sample than these, and none before the first."""
    for length in (config.sequence_length, config.sequence_length + 10):
        answers = split_of(config).task.make(np.arange(40), length).answers
        said = answer_positions(config, build_tokenizer(config.tokenizer), length)
        assert (answers.sum(axis=1) == said.most).all()
        assert said.first == np.flatnonzero(answers.any(axis=0))[0]
    assert answer_positions(DataConfig(dataset="pydoc"), build_tokenizer("bytes"), 64) is None


def test_regions_are_seen_from_the_window_of_the_answer():
    split = TaskSplit(split_of(RECALL).task, 5)
    window, rows, found = 8, 6, []
    for batch in answer_batches(split, 48, 4, slice(None), window, lambda n: min(n, rows)):
        found.append(batch)
        for starts, cells, inputs, labels in zip(batch["starts"], batch["cells"], batch["inputs"], batch["labels"]):
            assert ((starts >= 0) == (cells >= 0)).all()
            for at in np.flatnonzero(starts >= 0):
                source = next(i for i in range(1, 12, 2) if inputs[i] == labels[at] and inputs[i - 1] == inputs[at])
                begin = at // window * window
                region = 0 if source >= begin else 1 if source >= begin - rows else 2
                assert cells[at] == region * DEPTHS + source * DEPTHS // 48
    assert (found[1]["starts"][1:] == -1).all()  # padding
    assert {int(cell) // DEPTHS for batch in found for cell in batch["cells"].ravel() if cell >= 0} == {0, 1, 2}


def test_recall_of_shorter_samples_asks_for_fewer_pairs_in_proportion():
    task, tokenizer = split_of(RECALL).task, NumberTokenizer(64)
    for length, pairs in ((7, 1), (8, 1), (16, 2), (47, 5), (48, 6), (96, 6)):
        samples = task.make(np.arange(20), length)
        assert samples.tokens.shape == (20, length + 1)
        assert (samples.answers.sum(axis=1) == pairs).all()
        assert (samples.tokens[:, : 2 * pairs : 2] < 32).all()
        assert (samples.tokens[:, 2 * pairs : -1] < 32).sum() == 20 * pairs  # nothing but the questions
        assert task.chance(length) == pytest.approx(sum(1 / left for left in range(1, pairs + 1)) / pairs)
        assert answer_positions(RECALL, tokenizer, length) == AnswerPositions(2 * pairs, pairs)


def test_chance_is_what_guessing_among_the_unused_values_gets_right():
    """A guesser who knows the sample's values, told after every question which one it was, against the formula."""
    task = split_of(dataclasses.replace(RECALL, tokenizer="numbers:8192")).task  # two keys rarely have the same value
    samples = task.make(np.arange(20_000), 48)
    rng, right = np.random.default_rng(0), 0
    for tokens, ends in zip(samples.tokens, samples.starts):
        left = tokens[1:12:2].tolist()
        for at in np.flatnonzero(ends >= 0):
            right += left[rng.integers(len(left))] == tokens[at + 1]
            left.remove(tokens[at + 1])
    assert right / 120_000 == pytest.approx(task.chance(48), abs=0.005)


def test_the_test_samples_of_a_task_are_others_than_the_validation_samples(tmp_path):
    files = {"train_files": str(tmp_path / "a.txt"), "validation_files": str(tmp_path / "b.txt")}
    for name, text in (("a", "train "), ("b", "valid ")):
        (tmp_path / f"{name}.txt").write_text(text * 500)
    hidden = DataConfig(dataset="passkey", sequence_length=512, **files)
    for config in (RECALL, hidden):
        splits = [split_of(config, name) for name in ("validation", "test")]
        one, other = (split.task.make(np.arange(50), config.sequence_length).tokens for split in splits)
        assert not any((row == one).all(axis=1).any() for row in other)
    assert b"valid" in other[0].astype(np.uint8).tobytes()  # without test files of its own


def test_a_curriculum_takes_every_sample_once_whatever_their_length():
    config = DataConfig(
        dataset="passkey", tokenizer="bytes", sequence_length=1024, curriculum="256:2,512:3", num_items=1, examples=64
    )
    batches = TrainingBatches(split_of(config), 1024, 4, seed=0, stages=config.stages)
    shapes = [batches.batch(step)["inputs"].shape for step in range(7)]
    assert shapes == [(16, 256)] * 2 + [(8, 512)] * 3 + [(4, 1024)] * 2
    order = np.concatenate([batches.indices(step) for step in range(7)])
    assert len(order) == 64
    assert sorted(order.tolist()) == list(range(64))
    assert [batches.length(step) for step in (0, 1, 2, 4, 5, 99)] == [256, 256, 512, 512, 1024, 1024]
    assert batches.updates_for_epochs(1) == 7
    assert [config.samples_before(update, 4) for update in (0, 1, 2, 3, 5, 7)] == [0, 16, 32, 40, 56, 64]
    # A process that holds some rows of the batch holds all samples of each.
    some = batches.batch(3, np.array([2]))["inputs"]
    np.testing.assert_array_equal(some, batches.batch(3)["inputs"][4:6])


def test_splits_and_numbers_as_tokens(tmp_path):
    assert available_splits(RECALL) == available_splits(PASSKEY) == ("train", "validation", "test")
    assert find_split(PASSKEY, "validation", ByteTokenizer()).count == 50
    tokenizer = NumberTokenizer(64)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer
    assert tokenizer.decode(tokenizer.encode("5 63 7")) == b"5 63 7 "
    with pytest.raises(DataError, match="'64' must be a number from 1 to 63"):
        tokenizer.encode("5 64")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "recall", "num_items": 13}, "data.sequence_length = 48: must be at least 52, that is 4 for"),
        ({"dataset": "recall", "num_items": 32}, "data.num_items = 32: must be at most 31"),
        ({"dataset": "copy", "sequence_length": 7}, "data.sequence_length = 7: must be even"),
        ({"dataset": "recall", "tokenizer": "numbers:x"}, "data.tokenizer = 'numbers:x': must be numbers:V"),
        ({"dataset": "text", "tokenizer": "numbers:9"}, "data.tokenizer = 'numbers:9': is only for data.dataset"),
        (
            {"dataset": "passkey", "tokenizer": "bytes"},
            "data.sequence_length = 48: must be at least 384 for data.num_items = 4",
        ),
        ({"dataset": "passkey", "tokenizer": "bytes", "sequence_length": 10**7}, "has only"),
        ({"dataset": "pydoc", "tokenizer": "bytes", "curriculum": "8:1"}, "data.curriculum = '8:1': must be ''"),
        (
            {"dataset": "recall", "sequence_length": 16, "curriculum": "2:1"},
            "data.curriculum = '2:1': has samples of 2 tokens, and data.sequence_length must be at least 4, that is 4",
        ),
        ({"dataset": "passkey", "tokenizer": "bytes", "curriculum": "9:1"}, "data.curriculum = '9:1': must be LENGTH"),
        ({"dataset": "passkey", "tokenizer": "bytes", "curriculum": "8"}, "data.curriculum = '8': must be LENGTH"),
        (
            {"dataset": "passkey", "tokenizer": "bytes", "num_items": 101},
            "data.num_items = 101: must be an integer from 1 to 100",
        ),
        (
            {"dataset": "niah-3", "tokenizer": "bytes", "num_items": 1},
            "data.sequence_length = 48: must be at least 423",
        ),
        (
            {"dataset": "recall-gap", "num_items": 10},
            "data.sequence_length = 48: must be at least 50, that is 5 for each",
        ),
        ({"dataset": "s5"}, "data.tokenizer = 'numbers:64': must have at least 240 ids"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        split_of(DataConfig(**{"tokenizer": "numbers:64", "sequence_length": 48, **config}))
    assert "\n" not in str(caught.value)
