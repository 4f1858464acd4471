"""WikiText-103 from small files of the real format: zip, parquet, download; and what the errors tell."""

import contextlib
import dataclasses
import hashlib
import http.server
import pathlib
import resource
import threading
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data import wikitext103 as known
from tlinformer_jax.data.sources import find_split, load_split, open_split
from tlinformer_jax.data.tokenizers import ByteTokenizer, build_tokenizer
from tlinformer_jax.errors import DataError

# As in wiki.*.tokens: a line starts and ends with a space; a blank line holds one space.
pytestmark = pytest.mark.usefixtures("own_cache")
LINES = {
    "train": [" \n", " = Title <unk> = \n", " \n", " Senjō no 戦場 @-@ 3 , a\u00a0b . \n", " \n"] * 700,
    "valid": [" \n", " = Valid = \n", " one two \n"],
    "test": [" \n", " = Test = \n", " \n"],
}
ROWS = {
    "train": ["", " = Title <unk> = \n", "", " Senjō no 戦場 @-@ 3 , a\u00a0b . \n", ""] * 700,
    "validation": ["", " = Valid = \n", " one two \n"],
    "test": ["", " = Test = \n", ""],
}
WORDS = {"train": (4 + 8) * 700, "validation": 3 + 2, "test": 3}


def write_zip(directory: pathlib.Path, variant: str) -> bytes:
    facts = known.VARIANTS[variant]
    path = directory / facts.zip_name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, lines in LINES.items():
            archive.writestr(facts.member.format(split), "".join(lines))
    return path.read_bytes()


def write_parquet(directory: pathlib.Path, rows: dict[str, list[str]] = ROWS) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, texts in rows.items():
        cut = len(texts) // 2 if split == "train" else 0
        parts = [part for part in (texts[:cut], texts[cut:]) if part]
        for i, part in enumerate(parts):
            table = pyarrow.table({"text": pyarrow.array(part, pyarrow.string())})
            parquet.write_table(table, directory / f"{split}-{i:05d}-of-{len(parts):05d}.parquet")


def expect(monkeypatch, variant: str = "wikitext103", words=WORDS, **changes) -> None:
    """Makes the module expect the small files instead of the published ones."""
    monkeypatch.setattr(known, "ROWS", {split: len(rows) for split, rows in ROWS.items()})
    monkeypatch.setattr(known, "WORDS", words)
    monkeypatch.setitem(known.VARIANTS, variant, dataclasses.replace(known.VARIANTS[variant], **changes))


def expect_zip(monkeypatch, data: bytes, variant: str = "wikitext103", **changes) -> None:
    expect(monkeypatch, variant, size=len(data), sha256=hashlib.sha256(data).hexdigest(), **changes)


def config_for(tmp_path: pathlib.Path, **changes) -> DataConfig:
    return DataConfig(**{"dataset": "wikitext103"} | changes)


@pytest.fixture
def manual(tmp_path) -> pathlib.Path:
    """The cache's folder for what a user has downloaded."""
    directory = tmp_path / "cache" / "downloads"
    directory.mkdir(parents=True)
    return directory


def test_the_published_facts():
    assert known.ROWS == {"train": 1_801_350, "validation": 3_760, "test": 4_358}
    assert known.WORDS["test"] == 241_211
    assert known.VARIANTS["wikitext103"].zip_name == "wikitext-103-v1.zip"
    assert known.VARIANTS["wikitext103"].words_tolerance == 0


@pytest.mark.parametrize("kind", ["zip", "parquet", "parquet in its folder"])
@pytest.mark.parametrize("variant", ["wikitext103", "wikitext103-raw"])
def test_rows_and_counts(tmp_path, monkeypatch, manual, kind, variant):
    if kind == "zip":
        expect_zip(monkeypatch, write_zip(manual, variant), variant)
    else:
        expect(monkeypatch, variant)
        place = manual / f"{variant.replace('wikitext103', 'wikitext-103')}-v1" if "folder" in kind else manual
        place.mkdir(exist_ok=True)
        write_parquet(place)
    config = config_for(tmp_path, dataset=variant)
    for split, rows in ROWS.items():
        assert list(known.read_documents(config, split)) == [(row, True) for row in rows]
        stream = load_split(config, split, ByteTokenizer())
        expected = np.concatenate([[*row.encode(), 256] for row in rows])
        np.testing.assert_array_equal(stream.tokens, expected)
        assert (stream.num_documents, stream.num_lines, stream.num_words) == (len(rows), len(rows), WORDS[split])
        assert stream.num_bytes == len("".join(rows).encode())


def test_gpt2_tokens_of_every_row_and_an_end_after_each(tmp_path, monkeypatch, manual):
    expect_zip(monkeypatch, write_zip(manual, "wikitext103"))
    tokenizer = build_tokenizer("gpt2")
    config = config_for(tmp_path, tokenizer="gpt2")
    stream = load_split(config, "train", tokenizer)
    expected = np.concatenate([np.append(tokenizer.encode(row), 50256) for row in ROWS["train"]])
    np.testing.assert_array_equal(stream.tokens, expected)
    assert (stream.tokens[:2] == [50256, 796]).all()  # a blank row is its end alone; " =" follows


def test_once_tokenised_the_files_are_not_needed(tmp_path, monkeypatch, manual):
    expect_zip(monkeypatch, write_zip(manual, "wikitext103"))
    config = config_for(tmp_path)
    load_split(config, "train", ByteTokenizer())
    (manual / "wikitext-103-v1.zip").unlink()
    assert open_split(config, "train", ByteTokenizer())[1]
    assert find_split(config, "validation", ByteTokenizer()) is None


def _is_nothing_prepared(tmp_path) -> bool:
    found = [path.name for path in (tmp_path / "cache" / "tokens").rglob("*") if path.is_file()]
    return not [name for name in found if not name.endswith(".lock")]


def test_a_zip_with_another_checksum_is_refused(tmp_path, manual):
    write_zip(manual, "wikitext103")
    with pytest.raises(DataError, match=r"wikitext-103-v1\.zip: not the published file or damaged: sha256") as caught:
        load_split(config_for(tmp_path), "train", ByteTokenizer())
    assert "\n" not in str(caught.value)
    assert _is_nothing_prepared(tmp_path)


@pytest.mark.parametrize("wrong", ["rows", "words"])
def test_parquet_files_with_other_counts_are_refused(tmp_path, monkeypatch, manual, wrong):
    expect(monkeypatch)
    rows = ROWS["validation"][:-1] if wrong == "rows" else ["", " = Valid = \n", " one \n"]
    write_parquet(manual, ROWS | {"validation": rows})
    with pytest.raises(DataError, match=r"validation has \d rows and \d words, must have 3 and 5"):
        load_split(config_for(tmp_path), "validation", ByteTokenizer())
    assert _is_nothing_prepared(tmp_path)


def test_raw_words_may_differ_by_a_thousandth(tmp_path, monkeypatch, manual):
    write_parquet(manual)
    near, far = ({**WORDS, "train": round(WORDS["train"] * factor)} for factor in (1.0005, 1.01))
    config = config_for(tmp_path, dataset="wikitext103-raw")
    expect(monkeypatch, "wikitext103-raw", words=far)
    with pytest.raises(DataError, match="train has 3500 rows and 8400 words, must have 3500 and 8484"):
        load_split(config, "train", ByteTokenizer())
    expect(monkeypatch, "wikitext103-raw", words=near)
    assert load_split(config, "train", ByteTokenizer()).num_words == WORDS["train"]


def test_a_split_without_parquet_files_is_downloaded(tmp_path, monkeypatch, manual):
    data = write_zip(tmp_path, "wikitext103")
    write_parquet(manual, {"train": ROWS["train"], "test": ROWS["test"]})
    with serving(data) as (url, agents):
        expect_zip(monkeypatch, data, url=url)
        for split in ("train", "validation"):
            assert [row for row, _ in known.read_documents(config_for(tmp_path), split)] == ROWS[split]
            assert len(agents) == (split == "validation")


def test_a_parquet_file_that_is_none_is_named(tmp_path, monkeypatch, manual):
    expect(monkeypatch)
    write_parquet(manual)
    (manual / "test-00000-of-00001.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet: cannot be read as parquet") as caught:
        load_split(config_for(tmp_path), "test", ByteTokenizer())
    assert "\n" not in str(caught.value)


def _assert_three_helpful_lines(message: str) -> None:
    lines = message.splitlines()
    assert len(lines) == 3
    assert "wikitext-103-v1.zip" in lines[1]
    assert "https://huggingface.co/datasets/Salesforce/wikitext" in lines[1]
    assert lines[2].endswith("/cache/downloads; TLINFORMER_CACHE may name another cache")


@contextlib.contextmanager
def serving(data: bytes):
    """A host that, like the real one, refuses Python's default clients."""
    agents = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            agents.append(self.headers.get("User-Agent", ""))
            refused = agents[-1].lower().startswith(("python", "urllib")) or not agents[-1]
            self.send_response(403 if refused else 200)
            self.send_header("Content-Length", "0" if refused else str(len(data)))
            self.end_headers()
            self.wfile.write(b"" if refused else data)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/wikitext-103-v1.zip", agents
    finally:
        server.shutdown()
        server.server_close()


def test_the_zip_is_downloaded_once_by_a_named_client(tmp_path, monkeypatch, manual):
    data = write_zip(tmp_path, "wikitext103")
    with serving(data) as (url, agents):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url)
        expect_zip(monkeypatch, data, url=url)
        for split in ("test", "train"):
            assert [row for row, _ in known.read_documents(config_for(tmp_path), split)] == ROWS[split]
        assert len(agents) == 2
        assert "tlinformer_jax" in agents[-1]


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch, manual):
    data = write_zip(tmp_path, "wikitext103")
    with serving(data[:-1]) as (url, _):
        expect_zip(monkeypatch, data, url=url)
        with pytest.raises(DataError, match="not the published file or damaged") as caught:
            load_split(config_for(tmp_path), "train", ByteTokenizer())
    assert f"({len(data) - 1} bytes), must be" in str(caught.value)
    _assert_three_helpful_lines(str(caught.value))
    assert _is_nothing_prepared(tmp_path)


def test_no_network_says_in_three_lines_what_to_do(tmp_path, monkeypatch):
    with serving(b"") as (url, _):
        pass  # the port is closed again
    expect_zip(monkeypatch, b"", url=url)
    with pytest.raises(DataError, match=r"wikitext103 is missing: .*Connection refused") as caught:
        load_split(config_for(tmp_path), "train", ByteTokenizer())
    _assert_three_helpful_lines(str(caught.value))
    assert _is_nothing_prepared(tmp_path)


def test_a_damaged_download_is_refused_later_too(tmp_path, monkeypatch, manual):
    data = write_zip(tmp_path, "wikitext103")
    with serving(data) as (url, _):
        expect_zip(monkeypatch, data, url=url)
        load_split(config_for(tmp_path), "train", ByteTokenizer())
    path = tmp_path / "cache" / "downloads" / "wikitext-103-v1.zip"
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"downloads/wikitext-103-v1\.zip: not the published file or damaged"):
        load_split(config_for(tmp_path), "test", ByteTokenizer())


def test_a_full_disk_while_downloading_is_one_clear_line(tmp_path, monkeypatch, manual):
    """A limit on the size of a file makes a real write fail, as a full disk does."""
    data = write_zip(tmp_path, "wikitext103") + bytes(30_000)
    config, old = config_for(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(data) as (url, _):
        expect_zip(monkeypatch, data, url=url)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        try:
            with pytest.raises(DataError, match=r"WikiText-103 cannot be written .File too large") as caught:
                load_split(config, "train", ByteTokenizer())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value)
    assert _is_nothing_prepared(tmp_path)
    assert [path.name for path in (tmp_path / "cache" / "downloads").iterdir()] == ["wikitext-103-v1.zip.lock"]
