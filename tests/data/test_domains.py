"""Images, records and sounds: what is read from small files made here, how splits share files, and what is refused."""

import dataclasses
import gzip
import math
import pathlib
import re
import struct
import wave
import zlib

import numpy as np
import pytest

from tests.support.commands import ROOT, check_refusal, command
from tests.test_configs import CONFIGS, load
from tlinformer_jax.commands.prepare import prepare
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import run_config
from tlinformer_jax.data import domains
from tlinformer_jax.data.batches import take_samples
from tlinformer_jax.data.files import PACKAGES
from tlinformer_jax.data.sources import available_splits, load_split, load_stored_split, open_split
from tlinformer_jax.data.streams import ranked_groups
from tlinformer_jax.data.tokenizers import build_tokenizer, load_tokenizer, save_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.training.console import generation_flags
from tlinformer_jax.training.loop import train_and_evaluate

pytestmark = pytest.mark.usefixtures("own_cache")
TOKENIZERS = {"idx": "ids:256", "wav": "ids:256", "fasta": "letters:ACGT"}
END = 256
GUIDE = ROOT / "docs" / "guides" / "other_data.md"


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
    """Writes a file, compressed if its name ends in .gz."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def idx_bytes(images: np.ndarray) -> bytes:
    return struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape) + images.astype(np.uint8).tobytes()


def wav_bytes(samples, rate=8000, channels=1, bits=16, length=None) -> bytes:
    data = struct.pack(f"<{len(samples)}{'h' if bits == 16 else 'B'}", *samples)
    step = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * step, step, bits)
    size = len(data) if length is None else length
    head = struct.pack("<4sI8sI", b"RIFF", 36 + size, b"WAVEfmt ", 16)
    return head + form + struct.pack("<4sI", b"data", size) + data


def config_for(tmp_path: pathlib.Path, dataset: str, train: pathlib.Path | str, **changes) -> DataConfig:
    usual = {"dataset": dataset, "tokenizer": TOKENIZERS[dataset], "train_files": str(train)}
    return DataConfig(**usual | changes)


def split_of(config: DataConfig, split: str = "train"):
    return load_split(config, split, build_tokenizer(config.tokenizer))


def tokens_of(config: DataConfig, split: str = "train") -> list[int]:
    return np.array(split_of(config, split).tokens).tolist()


def images_of(count: int, rows: int = 2, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, rows, columns))


# ---- What is read


@pytest.mark.parametrize("name", ["images-idx3-ubyte", "images.gz"])
def test_a_sample_is_an_image_and_its_labels_are_its_pixels(tmp_path, name):
    images = images_of(5)
    path = write(tmp_path / name, idx_bytes(images))
    config = config_for(tmp_path, "idx", path, validation_files=str(path), test_files=str(path))
    stream = split_of(config)
    assert np.array(stream.tokens).tolist() == [0, *images.reshape(-1).tolist()]
    assert (stream.num_bytes, stream.num_documents) == (31, 5)
    batch = take_samples(stream, 6, np.array([3, 0]))
    np.testing.assert_array_equal(batch["labels"], images[[3, 0]].reshape(2, 6))
    assert batch["inputs"][:, 0].tolist() == [images[2, 1, 2], 0]
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])


def test_images_larger_than_a_block_are_joined(tmp_path):
    images = images_of(3, 300, 301)
    path = write(tmp_path / "large.gz", idx_bytes(images))
    found = list(domains.read_idx(path, None))
    np.testing.assert_array_equal(np.stack(found), images.reshape(3, -1))


@pytest.mark.parametrize("name", ["x.fna", "x.fasta.gz"])
def test_records_are_their_letters_with_an_end_after_each(tmp_path, name):
    text = b"\n>one some words\nACGT\nac\r\n\n>empty\n>two\nTTT"
    path = write(tmp_path / name, text)
    config = config_for(tmp_path, "fasta", path, validation_files=str(path), test_files=str(path))
    assert tokens_of(config) == [0, 1, 2, 3, 0, 1, 4, 3, 3, 3, 4]
    assert (split_of(config).num_bytes, split_of(config).num_documents) == (9, 2)
    of_bytes = config_for(tmp_path, "fasta", path, tokenizer="bytes", validation_files="x", test_files="x")
    assert tokens_of(of_bytes) == [*b"ACGTAC", END, *b"TTT", END]


def test_sounds_are_levels_with_an_end_after_each_in_the_order_of_their_names(tmp_path):
    def level(sample: int) -> int:  # by the definition of mu-law
        share = sample / 32768
        return math.floor(127.5 * (1 + math.copysign(math.log(1 + 255 * abs(share)) / math.log(256), share)) + 0.5)

    first, second = [0, 1, -1, 100, -100, 32767, -32768], [5000, -5000, 12]
    write(tmp_path / "b.wav", wav_bytes(second))
    write(tmp_path / "a.wav", wav_bytes(first))
    write(tmp_path / "c.wav", wav_bytes([]))
    files = str(tmp_path / "*.wav")
    config = config_for(tmp_path, "wav", files, validation_files=files, test_files=files)
    assert tokens_of(config) == [*map(level, first), END, *map(level, second), END]
    assert [level(sample) for sample in (0, 32767, -32768)] == [128, 255, 0]
    assert split_of(config).num_bytes == 10


def test_long_sounds_are_joined_from_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "BLOCK_SAMPLES", 3)
    samples = np.arange(-4000, 4000, 997)
    (found,) = domains.read_wav(write(tmp_path / "x.wav", wav_bytes(samples)), None)
    np.testing.assert_array_equal(found, domains.mu_law(samples))


def test_levels_are_heard_as_what_they_were(tmp_path):
    samples = np.arange(-32768, 32768)
    levels = domains.mu_law(samples)
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert len(np.unique(levels)) == 256
    with wave.open(str(write(tmp_path / "x.wav", domains.wav(levels)))) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 65536)
        heard = np.frombuffer(file.readframes(65536), "<i2")
    assert (np.abs(heard - samples) <= 4 + 0.03 * np.abs(samples)).all()
    np.testing.assert_array_equal(domains.mu_law(heard), levels)


def pixels_of(png: bytes) -> np.ndarray:
    """The grey levels of a PNG file without filters."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = {}, 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        found[kind], (check,) = png[at + 8 : at + 8 + size], struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + found[kind])
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", found[b"IHDR"][:10])
    assert (depth, colour, list(found)) == (8, 0, [b"IHDR", b"IDAT", b"IEND"])
    rows = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_images_are_drawn_ten_beside_each_other():
    images = images_of(12, 4, 4)
    samples = [np.append(7, image.reshape(-1)) for image in images]
    samples[11] = samples[11][:9]  # half an image
    page = pixels_of(domains.images_png(samples, 16))
    assert page.shape == (8, 40)
    np.testing.assert_array_equal(page[:4, 4:8], images[1])
    np.testing.assert_array_equal(page[4:, :4], images[10])
    np.testing.assert_array_equal(page[4:, 4:8], [*images[11][:2], [0] * 4, [0] * 4])
    assert pixels_of(domains.images_png(samples[:1], 16)).shape == (4, 4)


# ---- Splits that share files


def test_every_20th_image_is_held_out_where_a_split_has_no_files(tmp_path):
    images = images_of(45)
    config = config_for(tmp_path, "idx", write(tmp_path / "all", idx_bytes(images)))
    wanted = {"validation": [18, 38], "test": [19, 39]}
    wanted["train"] = sorted(set(range(45)) - {18, 38, 19, 39})
    assert available_splits(config) == ("train", "validation", "test")
    for split, numbers in wanted.items():
        assert tokens_of(config, split) == [0, *images[numbers].reshape(-1).tolist()]
    other = write(tmp_path / "other", idx_bytes(images[:2]))
    with_test = config_for(tmp_path, "idx", tmp_path / "all", test_files=str(other))
    assert tokens_of(with_test, "test") == [0, *images[:2].reshape(-1).tolist()]
    assert tokens_of(with_test, "train") == [0, *np.delete(images, [18, 38], axis=0).reshape(-1).tolist()]


def test_a_long_record_counts_as_several_only_where_it_is_shared(tmp_path):
    letters = np.random.default_rng(0).integers(0, 4, 20 * 65_536 + 10)
    text = ">chromosome\n" + "".join("ACGT"[letter] for letter in letters)
    path = write(tmp_path / "x.fa.gz", text.encode())
    config = config_for(tmp_path, "fasta", path)
    stretches = [[*letters[start : start + 65_536], 4] for start in range(0, len(letters), 65_536)]
    assert tokens_of(config, "validation") == stretches[18]
    assert tokens_of(config, "test") == stretches[19]
    assert tokens_of(config) == [letter for stretch in (*stretches[:18], stretches[20]) for letter in stretch]
    alone = config_for(tmp_path, "fasta", path, validation_files=str(path), test_files=str(path))
    assert tokens_of(alone) == [*letters, 4]


def relatives(records: list[str], length: int) -> list[set[int]]:
    """By definition: pairs that share `length` letters are merged until nothing changes."""
    found = [{number} for number in range(len(records))]
    for number, record in enumerate(records):
        runs = {record[at : at + length] for at in range(len(record) - length + 1)}
        kin = {n for n, other in enumerate(records) if any(run in other for run in runs)} | {number}
        joined = set().union(kin, *(family for family in found if family & kin))
        found = [family for family in found if not family & joined] + [joined]
    return found


def test_records_that_share_letters_are_in_one_split(tmp_path):
    rng = np.random.default_rng(3)
    records = ["".join("ACGT"[letter] for letter in rng.integers(0, 4, size)) for size in rng.integers(2, 40, 120)]
    records += ["ACG" + record[-9:] + "T" for record in records[::3]]
    numbers = ranked_groups([np.frombuffer(record.encode(), np.uint8) for record in records], 8)
    found = [np.flatnonzero(numbers == number).tolist() for number in range(numbers.max() + 1)]
    assert sorted(map(sorted, relatives(records, 8))) == sorted(found)
    assert np.diff([len(family) for family in found]).max() <= 0  # the largest is first
    path = write(tmp_path / "x.fasta", "".join(f">{n}\n{record}\n" for n, record in enumerate(records)).encode())
    config = config_for(tmp_path, "fasta", path, shingle=8)
    splits = {}
    for split in ("train", "validation", "test"):
        ids = "".join("ACGT\n"[token] for token in tokens_of(config, split))
        splits[split] = ids.splitlines()
    assert sorted([*splits["train"], *splits["validation"], *splits["test"]]) == sorted(records)
    wanted = sorted((frozenset(records[n] for n in family) for family in relatives(records, 8)), key=len)
    owners = {record: split for split, held in splits.items() for record in held}
    for family in wanted:
        assert len({owners[record] for record in family}) == 1
    assert 20 < len(wanted) < len(records)
    assert owners[next(iter(wanted[-1]))] == "train"
    held = [len({family for family in wanted if family & set(splits[split])}) for split in ("validation", "test")]
    assert all(0 <= count - len(wanted) // 20 <= 1 for count in held)
    single = config_for(tmp_path, "fasta", path)
    assert tokens_of(single, "test") != tokens_of(config, "test")
    with pytest.raises(ConfigError, match=r"data\.shingle = 8: must be 0 for data\.dataset = 'idx'"):
        config_for(tmp_path, "idx", path, shingle=8)


def test_too_few_documents_to_share(tmp_path):
    config = config_for(tmp_path, "idx", write(tmp_path / "all", idx_bytes(images_of(18))))
    with pytest.raises(DataError, match=r"validation: no text in .*every 20th document"):
        split_of(config, "validation")


def test_tokens_are_found_again_until_files_or_shares_change(tmp_path):
    path = write(tmp_path / "all", idx_bytes(images_of(40)))
    config, tokenizer = config_for(tmp_path, "idx", path), build_tokenizer("ids:256")
    assert [open_split(config, "train", tokenizer)[1] for _ in range(2)] == [False, True]
    alone = config_for(tmp_path, "idx", path, validation_files=str(path), test_files=str(path))
    stream, found = open_split(alone, "train", tokenizer)
    assert (found, stream.num_documents) == (False, 40)
    write(path, idx_bytes(images_of(41)))
    stream, found = open_split(config, "train", tokenizer)
    assert (found, stream.num_documents) == (False, 37)
    np.testing.assert_array_equal(load_stored_split(config, "train", tokenizer).tokens, stream.tokens)
    lines = list(prepare(config))
    assert lines[0].startswith("train: 223 tokens, 37 documents, 223 bytes, 1.000 bytes per token, found in the cache")


# ---- What is refused

GOOD = idx_bytes(images_of(2))
BAD = {
    "other magic": ("idx", b"\x89PNG" + GOOD, "begins with the bytes 00 00 08 and at least 02, not '89 50 4e 47'"),
    "floats": ("idx", b"\0\0\x0d\x03" + GOOD[4:], "not '00 00 0d 03'"),
    "labels": ("idx", b"\0\0\x08\x01\0\0\0\x02ab", "not '00 00 08 01'"),
    "an empty file": ("idx", b"", "begins with the bytes"),
    "half a header": ("idx", GOOD[:9], "truncated: it ends within its IDX header"),
    "half an image": ("idx", GOOD[:-1], "truncated: its header says 2 images of 6 bytes"),
    "an image too few": ("idx", GOOD[:-6], "truncated: its header says 2 images of 6 bytes"),
    "a byte too many": ("idx", GOOD + b"x", "too long: its header says 2 images of 6 bytes"),
    "an image too many": ("idx", GOOD + GOOD[-6:], "too long: its header says 2 images of 6 bytes"),
    "images of nothing": ("idx", idx_bytes(np.zeros((2, 0, 3))), "an image has 0 x 3 values; must be at least 1"),
    "huge images": (
        "idx",
        struct.pack(">HBB3I", 0, 8, 3, 1, 1 << 20, 1 << 20),
        "truncated: its header says 1 images of 1,099,511,627,776 bytes, but 0 bytes follow",
    ),
    "no record": ("fasta", b"ACGT\n", "line 1: a FASTA file must begin with a line that starts with '>'"),
    "no line": ("fasta", b"", "contains no FASTA record"),
    "another letter": ("fasta", b">x\nACGT\nACNT\n", "line 3: 'N' is not one of the letters ACGT; see data.tokenizer"),
    "no text": ("fasta", b">x\n\xff\n", "line 2: 'ÿ' is not one of the letters"),
    "another rate": (
        "wav",
        wav_bytes([1], rate=16000),
        "1 channels of 16 bit at 16000 Hz; must be 1 of 16 bit at 8000",
    ),
    "8 bit": ("wav", wav_bytes([1], bits=8), "has 1 channels of 8 bit"),
    "stereo": ("wav", wav_bytes([1, 1], channels=2), "has 2 channels"),
    "half a sample": ("wav", wav_bytes([1, 2], length=4)[:-1], "truncated: its header says 2 samples, but 1 follow"),
    "half a sound": ("wav", wav_bytes([1, 2], length=8), "truncated: its header says 4 samples, but 2 follow"),
    "no sound": ("wav", b"OggS" + bytes(60), "cannot be read as WAV"),
    "half a head": ("wav", wav_bytes([1])[:20], "cannot be read as WAV"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_in_one_line_and_leaves_no_cache(tmp_path, name):
    dataset, data, message = BAD[name]
    path = write(tmp_path / "bad", data)
    config = config_for(tmp_path, dataset, path, validation_files=str(path), test_files=str(path))
    with pytest.raises(DataError) as caught:
        split_of(config)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [found for found in (tmp_path / "cache" / "tokens").iterdir() if found.is_dir()]


@pytest.mark.parametrize("dataset", ["idx", "fasta"])
def test_a_gz_that_is_cut_off_is_refused(tmp_path, dataset):
    data = {"idx": GOOD, "fasta": b">x\nACGT\n"}[dataset]
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(data)[:-4])
    with pytest.raises(DataError, match=r"cut\.gz: truncated"):
        split_of(config_for(tmp_path, dataset, path, validation_files="x", test_files="x"))


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "message"),
    [
        ("idx", "bytes", "must be 'ids:256' for data.dataset = 'idx'"),
        ("wav", "ids:255", "must be 'ids:256' for data.dataset = 'wav'"),
        ("fasta", "ids:256", "is only for data.dataset = 'tokens', 'idx', 'wav'"),
        ("fasta", "numbers:64", "is only for data.dataset"),
        ("text", "letters:ACGT", "is only for data.dataset = 'fasta'"),
        ("fasta", "letters:ACA", "must be letters: and some of A-Z, * and -, each once"),
        ("fasta", "letters:", "must be letters: and some of"),
        ("fasta", "letters:acgt", "must be letters: and some of"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(dataset, tokenizer, message):
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(DataConfig(dataset=dataset, tokenizer=tokenizer).tokenizer)
    assert str(caught.value).startswith(f"data.tokenizer = {tokenizer!r}: ")
    assert message in str(caught.value)


def test_letters_are_ids_and_back(tmp_path):
    save_tokenizer(build_tokenizer("letters:ACGT"), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("letters:ACGT", 5, 4)
    assert tokenizer.encode("TGCA").tolist() == [3, 2, 1, 0]
    assert tokenizer.decode([3, 4, 0, 127]) == b"TA"
    for text in ("ACGTN", "acgt", "é", "A\n"):
        with pytest.raises(DataError, match=r"tokenizer letters:ACGT: .* is not one of its letters"):
            tokenizer.encode(text)


@pytest.mark.parametrize("name", ["images", "genome", "proteins", "audio"])
def test_a_config_names_the_package_that_ships_its_data(name):
    config, head = load(name).data, (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    (package,) = {package for place, package in PACKAGES.items() if config.train_files.startswith(place)}
    assert f"Debian package {package}" in head


@pytest.mark.parametrize("name", ["images", "genome", "proteins", "audio"])
def test_the_first_generation_is_that_of_the_guide(name):
    (line,) = re.findall(rf"^tlinformer generate --workdir=runs/{name} (.*)$", GUIDE.read_text(), re.M)
    config = load(name).data
    assert generation_flags(config) == line
    if name == "images":  # only square images can be saved
        oblong = dataclasses.replace(config, sequence_length=6)
        assert generation_flags(oblong) == "--prompt=0 --max_new_tokens=6 --temperature=1 --num_samples=50"
    if name == "genome":
        starred = dataclasses.replace(config, tokenizer="letters:*CA")
        assert generation_flags(starred) == "--prompt='*CA' --temperature=1"


def test_absent_data_is_one_line_with_path_and_package():
    place = "/usr/share/asterisk/sounds/en_US_f_Allison/none/*.wav"
    refused = command("prepare", f"--config={CONFIGS}/audio.py", f"--config.data.train_files={place}")
    package = "the Debian package asterisk-core-sounds-en-wav ships it"
    check_refusal(refused, f"error: data.train_files: no file matches '{place}'; {package}\n")


# ---- A run


@pytest.mark.slow
def test_a_run_on_images_gives_bits_per_pixel(tmp_path):
    images = images_of(60, 4, 4) // 64
    model = {"d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "history_window": 8}
    data = config_for(tmp_path, "idx", write(tmp_path / "all", idx_bytes(images)), sequence_length=16)
    config = run_config(
        {
            "model": model | {"generation_window": 8, "dtype": "float32"},
            "train": {"steps": 2, "batch_size": 8, "eval_every": 0},
            "data": vars(data),
        }
    )
    figures = train_and_evaluate(config, tmp_path / "run")
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2))
    assert "perplexity_per_word" not in figures
