"""Data that is no text: images (IDX), genomes and proteins (FASTA) and sound (WAV).

    idx    the format of MNIST, unsigned bytes: a document is an image, its pixels row by row
    fasta  a document is a record, such as a chromosome or a protein: its letters, in upper case
    wav    16 bit, one channel, 8,000 samples a second: a document is a file, each sample one of 256 levels (mu-law)

A pixel, letter or sample is one byte, so an evaluation's bits per byte are bits per pixel, letter or sample.

Records and sounds have the tokenizer's end of text after each, as texts have. Images stand one after the other behind a
single 0: where N is the size of an image, every sample is one, whose first input is the last pixel of the one before.
"""

import itertools
import math
import pathlib
import struct
import wave
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.files import OnRead, read_blocks, read_lines
from tlinformer_jax.data.streams import Counts, Encoded, smallest_dtype
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import DataError, failure_told

Document = np.ndarray | str  # uint8 [length], or letters

# Where splits have no files of their own, train_files are dealt: of EVERY documents they get those at these places,
# and what is longer than a STRETCH counts as several documents.
EVERY = 20
PLACES = {"validation": 18, "test": 19}
STRETCH = 65_536
HASH = np.uint64(0x9E3779B97F4A7C15)  # of letters in a row; odd

RATE = 8_000  # samples of sound a second
LEVELS = 256  # of mu-law
BLOCK_SAMPLES = 1 << 20  # read at once
LARGEST_IMAGE = 1 << 24  # pixels
LARGEST_RECORD = 1 << 28  # letters; a record is held in memory
UNSIGNED_BYTES = 8  # the code of the type of an IDX file's values
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ*-"  # of a FASTA record whose tokenizer does not say


# ---- Documents become a split


def read_documents(path: pathlib.Path, config: DataConfig, on_read: OnRead) -> Iterator[Document]:
    """The documents of one file."""
    if config.dataset == "idx":
        return read_idx(path, on_read)
    if config.dataset == "wav":
        return read_wav(path, on_read)
    return read_fasta(path, on_read, config.letters or LETTERS)


def deal(documents: Iterable[Document], split: str, held_out: Collection[str], shingle: int = 0) -> Iterator[Document]:
    """The documents of `split` where train_files also hold the splits `held_out`; all of them where there are none.

    With `shingle`, records that share so many letters in a row stay together, and none is cut.
    """
    if not held_out:
        yield from documents
        return
    owners = {PLACES[other]: other for other in held_out}
    numbered: Iterable[tuple[int, Document]]
    if shingle:
        records = [record for record in documents if isinstance(record, str)]
        numbered = zip(families(records, shingle).tolist(), records)
    else:
        pieces = (document[at : at + STRETCH] for document in documents for at in range(0, len(document), STRETCH))
        numbered = enumerate(pieces)
    for number, document in numbered:
        if owners.get(number % EVERY, "train") == split:
            yield document


def encode(documents: Iterable[Document], config: DataConfig, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The tokens of documents in order, and counts; see the head of this file."""
    dtype = smallest_dtype(tokenizer.vocab_size)
    end = np.array([] if config.dataset == "idx" else [tokenizer.end_of_text], dtype)
    if config.dataset == "idx":
        yield np.zeros(1, dtype), Counts(num_bytes=1)  # so that bits per byte are those of a token
    for document in documents:
        ids = tokenizer.encode(document) if isinstance(document, str) else document
        yield np.concatenate([ids.astype(dtype), end]), Counts(num_bytes=len(document), num_documents=1)


# ---- Images


def read_idx(path: pathlib.Path, on_read: OnRead) -> Iterator[np.ndarray]:
    """The images of an IDX file, uint8 [pixels] each: what its first dimension counts."""
    blocks = read_blocks(path, on_read)
    data = bytearray()
    while (len(data) < 4 or len(data) < 4 + 4 * data[3]) and (block := next(blocks, b"")):
        data += block
    if data[:3] != bytes([0, 0, UNSIGNED_BYTES]) or not 2 <= data[3] <= 8:
        told = f"an IDX file of images begins with the bytes 00 00 08 and at least 02, not {data[:4].hex(' ')!r}"
        raise DataError(f"{path}: {told}")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataError(f"{path}: truncated: it ends within its IDX header")
    count, *sides = struct.unpack(f">{data[3]}I", data[4:start])
    size = math.prod(sides)
    if not 1 <= size <= LARGEST_IMAGE:
        raise DataError(f"{path}: an image has {' x '.join(map(str, sides))} values; must be 1 to {LARGEST_IMAGE:,}")
    del data[:start]
    found = 0
    for block in itertools.chain([b""], blocks):
        data += block
        whole = min(len(data) // size, count - found)
        yield from np.frombuffer(bytes(data[: whole * size]), np.uint8).reshape(whole, size)
        del data[: whole * size]
        found += whole
        if found == count and data:
            break
    if found < count or data:
        kind = "truncated" if found < count else "too long"
        told = f"its header says {count:,} images of {size:,} bytes, which is not what follows"
        raise DataError(f"{path}: {kind}: {told}")


def png(image: np.ndarray) -> bytes:
    """A PNG file of an image of grey levels, uint8 [height, width]."""
    height, width = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # 0: the row is not filtered
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def images_png(samples: Sequence[np.ndarray], pixels: int) -> bytes:
    """A PNG file of square images of `pixels` pixels, ten beside each other.

    A sample holds the pixel before an image, and then its pixels, of which the last may be missing: they are black.
    """
    side, columns = math.isqrt(pixels), min(10, len(samples))
    page = np.zeros((-(-len(samples) // columns), columns, pixels), np.uint8)
    for image, sample in zip(page.reshape(-1, pixels), samples):
        known = sample[1 : pixels + 1]
        image[: len(known)] = np.minimum(known, LEVELS - 1)
    return png(page.reshape(-1, columns, side, side).swapaxes(1, 2).reshape(-1, columns * side))


# ---- Genomes and proteins


def read_fasta(path: pathlib.Path, on_read: OnRead, letters: str) -> Iterator[str]:
    """The records of a FASTA file that have letters; others than `letters` are refused."""
    record: list[str] = []
    size, begun = 0, False
    for number, line in enumerate(read_lines(read_blocks(path, on_read), path), 1):
        line = line.strip()
        if line.startswith(b">"):
            if size:
                yield "".join(record)
            record, size, begun = [], 0, True
            continue
        if line and not begun:
            raise DataError(f"{path}, line {number}: a FASTA file begins with a line that begins with '>'")
        line = line.upper()
        if wrong := line.translate(None, letters.encode()):
            told = f"{chr(wrong[0])!r} is none of the letters {letters}; see data.tokenizer"
            raise DataError(f"{path}, line {number}: {told}")
        record.append(line.decode("ascii"))
        size += len(line)
        if size > LARGEST_RECORD:
            raise DataError(f"{path}, line {number}: a record must have at most {LARGEST_RECORD:,} letters")
    if not begun:
        raise DataError(f"{path}: holds no FASTA record, which begins with a line that begins with '>'")
    if size:
        yield "".join(record)


def families(records: Sequence[str], shingle: int) -> np.ndarray:
    """The family of each record, int64 [records], counted from the largest.

    Records that share `shingle` letters in a row, directly or through others, are of one family.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(records)
    letters = np.frombuffer("".join(records).encode("ascii"), np.uint8).astype(np.uint64)
    owners = np.repeat(np.arange(count), [len(record) for record in records])
    places = max(0, len(letters) - shingle + 1)
    codes = np.zeros(places, np.uint64)
    for letter in range(shingle):
        codes = codes * HASH + letters[letter : letter + places]
    within = owners[:places] == owners[shingle - 1 :]
    codes, owners = codes[within], owners[:places][within]
    order = np.argsort(codes, kind="stable")
    codes, owners = codes[order], owners[order]
    same = np.flatnonzero(codes[1:] == codes[:-1])
    links = coo_array((np.ones(len(same)), (owners[same], owners[same + 1])), shape=(count, count))
    _, found = connected_components(links, directed=False)
    sizes = np.bincount(found)
    ranks = np.empty_like(sizes)
    ranks[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return ranks[found]


# ---- Sound


def read_wav(path: pathlib.Path, on_read: OnRead) -> Iterator[np.ndarray]:
    """The one sound of a WAV file as levels, uint8 [samples]; none if it is empty."""
    try:
        with failure_told(f"{path}: cannot be read"), wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            if (channels, width, rate) != (1, 2, RATE):
                told = f"has {channels} channels of {8 * width} bit at {rate} Hz; must be 1 of 16 bit at {RATE} Hz"
                raise DataError(f"{path}: {told}")
            parts = [np.empty(0, np.uint8)]
            while data := file.readframes(BLOCK_SAMPLES):
                parts.append(mu_law(np.frombuffer(data[: len(data) // width * width], "<i2")))
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path}: cannot be read as WAV ({str(error) or 'it ends within its header'})") from None
    levels = np.concatenate(parts)
    if len(levels) != count:
        raise DataError(f"{path}: truncated: its header says {count:,} samples, but {len(levels):,} follow")
    on_read(path.stat().st_size)
    if count:
        yield levels


def mu_law(samples: np.ndarray) -> np.ndarray:
    """The levels of samples of 16 bit, uint8: finer the nearer to 0, which is level 128."""
    share = samples.astype(np.float64) / 2**15
    companded = np.sign(share) * np.log1p((LEVELS - 1) * np.abs(share)) / np.log(LEVELS)
    return np.floor((companded + 1) / 2 * (LEVELS - 1) + 0.5).astype(np.uint8)


def from_mu_law(levels: np.ndarray) -> np.ndarray:
    """Samples of 16 bit that have these levels."""
    companded = 2 * levels.astype(np.float64) / (LEVELS - 1) - 1
    share = np.sign(companded) * (LEVELS ** np.abs(companded) - 1) / (LEVELS - 1)
    return np.clip(np.round(share * 2**15), -(2**15), 2**15 - 1).astype("<i2")


def sounds_wav(samples: Sequence[np.ndarray], _: int) -> bytes:
    """A WAV file of samples one after the other, with a quarter of a second of silence after each."""
    silence = mu_law(np.zeros(RATE // 4))
    return wav(np.concatenate([part for sample in samples for part in (sample[sample < LEVELS], silence)]))


def wav(levels: np.ndarray) -> bytes:
    """A WAV file of a sound, levels uint8 [samples]."""
    data = from_mu_law(levels).tobytes()
    form = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    chunks = b"".join(name + struct.pack("<I", len(part)) + part for name, part in ((b"fmt ", form), (b"data", data)))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
