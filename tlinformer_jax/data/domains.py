"""Data that is not text: images (IDX), genomes and proteins (FASTA) and sound (WAV).

    idx    the format of MNIST, unsigned bytes: a document is an image, its pixels row by row
    fasta  a document is a record, such as a chromosome or a protein: its letters, in upper case
    wav    16 bit, one channel, 8,000 samples per second: a document is a file, each sample one of 256 levels (mu-law)

A pixel, letter or sample is one byte, so an evaluation's bits per byte are bits per pixel, letter or sample.

Records and sounds are followed by the tokenizer's end of text, as texts are. Images follow each other directly after a
single 0: if N is the size of an image, every sample is one image, with the previous image's last pixel as first input.
"""

import functools
import io
import math
import pathlib
import string
import struct
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.files import read_blocks, read_lines
from tlinformer_jax.data.streams import Counts, Encoded, ranked_groups, smallest_dtype
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import DataError, file_errors_as

Document = np.ndarray | str  # uint8 [length], or letters

# A split without files of its own takes every 20th document of train_files: those whose number has this remainder.
# A document longer than LONGEST_PIECE counts as several. With data.shingle, families of records are counted instead.
HELD_OUT_PERIOD = 20
HELD_OUT_REMAINDERS = {"validation": 18, "test": 19}
LONGEST_PIECE = 65_536

RATE = 8_000  # samples of sound per second
LEVELS = 256  # of mu-law
BLOCK_SAMPLES = 1 << 20  # samples per read
UNSIGNED_BYTES = 8  # an IDX file's code for values of this type
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ*-"  # allowed in FASTA records if the tokenizer names none


# ---- From documents to a split


def held_out(config: DataConfig, split: str) -> list[str]:
    """Returns the splits held out of train_files; empty if `split` is not read from train_files."""
    if config.field_of_files(split) != "train_files":
        return []
    return [other for other in HELD_OUT_REMAINDERS if config.field_of_files(other) == "train_files"]


def identity(config: DataConfig, split: str) -> dict[str, Any]:
    """Returns what a split depends on apart from its files."""
    others = held_out(config, split)
    shared = {"dataset": config.dataset, "split": split if others else "", "held_out": others}
    return shared | ({"shingle": config.shingle} if config.shingle and others else {})


def read_documents(path: pathlib.Path, config: DataConfig) -> Iterator[Document]:
    """Yields the documents of one file."""
    readers: dict[str, Callable[..., Iterator[Document]]] = {"idx": read_idx, "wav": read_wav, "fasta": read_fasta}
    return readers[config.dataset](path, config)


def documents_of_split(documents: Iterable[Document], config: DataConfig, split: str) -> Iterator[Document]:
    """Yields the documents of `split`: all of them if no other split gets some of its files.

    With data.shingle, records that share this many consecutive letters are in one split, and no record is cut.
    """
    others = held_out(config, split)
    if not others:
        yield from documents
        return
    owners = {HELD_OUT_REMAINDERS[other]: other for other in others}
    numbered: Iterable[tuple[int, Document]]
    if config.shingle:
        records = [record for record in documents if isinstance(record, str)]
        letters = [np.frombuffer(record.encode("ascii"), np.uint8) for record in records]
        numbered = zip(ranked_groups(letters, config.shingle).tolist(), records)
    else:
        size = LONGEST_PIECE
        numbered = enumerate(document[at : at + size] for document in documents for at in range(0, len(document), size))
    for number, document in numbered:
        if owners.get(number % HELD_OUT_PERIOD, "train") == split:
            yield document


def encode(documents: Iterable[Document], config: DataConfig, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yields the tokens of documents in order, and counts; the module's docstring gives the format."""
    dtype = smallest_dtype(tokenizer.vocab_size)
    end = np.array([] if config.dataset == "idx" else [tokenizer.end_of_text], dtype)
    if config.dataset == "idx":
        yield np.zeros(1, dtype), Counts(num_bytes=1)  # counted as a byte, so that bits per byte are bits per token
    for document in documents:
        ids = tokenizer.encode(document) if isinstance(document, str) else document
        yield np.concatenate([ids.astype(dtype), end]), Counts(num_bytes=len(document), num_documents=1)


# ---- Images


def read_idx(path: pathlib.Path, _: object) -> Iterator[np.ndarray]:
    """Yields the images of an IDX file, counted by its first dimension, as uint8 [pixels]; memory holds all of them."""
    blocks = read_blocks(path)
    data = bytearray(next(blocks, b""))
    if data[:3] != bytes([0, 0, UNSIGNED_BYTES]) or not 2 <= data[3] <= 8:
        fault = f"an IDX file of images begins with the bytes 00 00 08 and at least 02, not {data[:4].hex(' ')!r}"
        raise DataError(f"{path}: {fault}")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataError(f"{path}: truncated: it ends within its IDX header")
    count, *sides = struct.unpack(f">{data[3]}I", data[4:start])
    size = math.prod(sides)
    if not size:
        raise DataError(f"{path}: an image has {' x '.join(map(str, sides))} values; must be at least 1")
    end = start + count * size
    for block in blocks:
        data += block
        if len(data) > end:  # a compressed file may be endless
            break
    if len(data) != end:
        kind, found = ("truncated", f"{len(data) - start:,}") if len(data) < end else ("too long", "more")
        fault = f"its header says {count:,} images of {size:,} bytes, but {found} bytes follow"
        raise DataError(f"{path}: {kind}: {fault}")
    yield from np.frombuffer(data, np.uint8, offset=start).reshape(count, size)


def png(image: np.ndarray) -> bytes:
    """Returns a PNG file of a greyscale image, uint8 [height, width]."""
    height, width = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # 0: no filter in this row
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def images_png(samples: Sequence[np.ndarray], pixels: int) -> bytes:
    """Returns a PNG file of square images of `pixels` pixels, ten per row.

    A sample is the pixel before an image and then the image's pixels; missing last pixels become black.
    """
    side, columns = math.isqrt(pixels), min(10, len(samples))
    page = np.zeros((-(-len(samples) // columns), columns, pixels), np.uint8)
    for image, sample in zip(page.reshape(-1, pixels), samples):
        known = sample[1 : pixels + 1]
        image[: len(known)] = np.minimum(known, LEVELS - 1)
    return png(page.reshape(-1, columns, side, side).swapaxes(1, 2).reshape(-1, columns * side))


# ---- Genomes and proteins


def read_fasta(path: pathlib.Path, config: DataConfig) -> Iterator[str]:
    """Yields the records of a FASTA file that have letters; refuses letters that the tokenizer does not name."""
    letters, record, begun = config.letters or LETTERS, list[str](), False
    allowed = dict.fromkeys(map(ord, letters + letters.lower()))
    texts = (block.decode("latin-1") for block in read_blocks(path))  # a description may have any bytes
    for number, line in enumerate(read_lines(texts, path), 1):
        line = line.strip(string.whitespace)  # of ASCII; \xa0 in Latin-1 is no letter
        if line.startswith(">"):
            if record:
                yield "".join(record)
            record, begun = [], True
        elif line and not begun:
            raise DataError(f"{path}, line {number}: a FASTA file must begin with a line that starts with '>'")
        elif wrong := line.translate(allowed):
            fault = f"{wrong[0]!r} is not one of the letters {letters}; see data.tokenizer"
            raise DataError(f"{path}, line {number}: {fault}")
        elif line:
            record.append(line.upper())
    if not begun:
        raise DataError(f"{path}: contains no FASTA record, which begins with a line that starts with '>'")
    if record:
        yield "".join(record)


# ---- Sound


def read_wav(path: pathlib.Path, _: object) -> Iterator[np.ndarray]:
    """Yields the one sound of a WAV file as levels, uint8 [samples]; nothing if the file has no samples."""
    try:
        with file_errors_as(f"{path}: cannot be read"), wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            if (channels, width, rate) != (1, 2, RATE):
                fault = f"has {channels} channels of {8 * width} bit at {rate} Hz; must be 1 of 16 bit at {RATE} Hz"
                raise DataError(f"{path}: {fault}")
            data = b"".join(iter(functools.partial(file.readframes, BLOCK_SAMPLES), b""))  # the header may be wrong
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path}: cannot be read as WAV ({str(error) or 'it ends within its header'})") from None
    samples = np.frombuffer(data[: len(data) // width * width], "<i2")
    if len(samples) != count:
        raise DataError(f"{path}: truncated: its header says {count:,} samples, but {len(samples):,} follow")
    if count:
        yield _all_levels()[samples.view("<u2")]


def mu_law(samples: np.ndarray) -> np.ndarray:
    """Returns the mu-law levels of 16-bit samples, uint8: finer near 0, which is level 128."""
    share = samples.astype(np.float64) / 2**15
    companded = np.sign(share) * np.log1p((LEVELS - 1) * np.abs(share)) / np.log(LEVELS)
    return np.floor((companded + 1) / 2 * (LEVELS - 1) + 0.5).astype(np.uint8)


@functools.cache
def _all_levels() -> np.ndarray:
    """Returns the level of each 16-bit sample, indexed by its bits as an unsigned number."""
    return mu_law(np.arange(2**16).astype(np.uint16).view(np.int16))


def from_mu_law(levels: np.ndarray) -> np.ndarray:
    """Returns 16-bit samples that have these levels."""
    companded = 2 * levels.astype(np.float64) / (LEVELS - 1) - 1
    share = np.sign(companded) * (LEVELS ** np.abs(companded) - 1) / (LEVELS - 1)
    return np.clip(np.round(share * 2**15), -(2**15), 2**15 - 1).astype("<i2")


def sounds_wav(samples: Sequence[np.ndarray], _: int) -> bytes:
    """Returns a WAV file of samples one after another, each followed by a quarter of a second of silence."""
    silence = mu_law(np.zeros(RATE // 4))
    return wav(np.concatenate([part for sample in samples for part in (sample[sample < LEVELS], silence)]))


def wav(levels: np.ndarray) -> bytes:
    """Returns a WAV file of a sound, levels uint8 [samples]."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, RATE, len(levels), "NONE", ""))
        file.writeframes(from_mu_law(levels).tobytes())
    return content.getvalue()
