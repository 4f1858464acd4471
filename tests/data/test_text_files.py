"""Text files: every format gives the same documents, and whatever is wrong is named in one line."""

import gzip
import json
import lzma
import os
import pathlib

import pytest

from tlinformer_jax.commands.cli import text_of_file
from tlinformer_jax.data import files
from tlinformer_jax.data.files import find_files, read_documents
from tlinformer_jax.errors import DataError

zstandard = pytest.importorskip("zstandard")

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ["First line.\nSecond: é字😀\n", " leading and trailing \n\n", "x" * 100_000 + "\u2028 no line end here"]


def documents(path: pathlib.Path, text_field="text", dataset="text") -> list[str]:
    """The documents of a file, their pieces joined."""
    found, parts = [], []
    for text, ends in read_documents(path, dataset, text_field):
        parts.append(text)
        if ends:
            found.append("".join(parts))
            parts = []
    assert not parts
    return found


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines(tmp_path, ending):
    lines = [json.dumps({"title": "t", "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    path = tmp_path / f"a.jsonl{ending}"
    # Blank lines and empty documents are skipped; the last line needs no newline.
    data = "\n\n".join([*lines, '{"text": ""}', lines[0]]).encode()
    path.write_bytes(COMPRESS[ending](data))
    assert documents(path) == [*TEXTS, TEXTS[0]]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_file_is_one_document_or_one_a_line(tmp_path, ending):
    text = "".join(TEXTS)
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](text.encode()))
    assert documents(path) == [text]
    lines = ["First line.", "Second: é字😀", " leading and trailing ", TEXTS[2]]
    assert documents(path, dataset="lines") == lines


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_reader_of_text_drops_a_byte_order_mark(tmp_path, ending):
    """Training files, --text_file and --prompt_file give the same text for a file with a mark and without."""
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}.txt{ending}"
        path.write_bytes(COMPRESS[ending](mark + "The é.\n\ufeffx".encode()))
        assert documents(path) == [text_of_file(str(path), "--text_file")] == ["The é.\n\ufeffx"]


def test_the_field_of_a_json_line_can_be_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "body": "yes"}\n')
    assert documents(path, text_field="body") == ["yes"]


def test_windows_line_ends_and_byte_order_marks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert documents(path) == ["one\r\ntwo\r\n"]
    assert documents(path, dataset="lines") == ["one", "two"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    assert documents(path) == ["one"]


def test_an_empty_file_has_no_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"")
    assert documents(path) == []


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_concatenated_compressed_files_are_one(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](b"one ") + COMPRESS[ending](b"two"))
    assert documents(path) == ["one two"]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_truncated_file_is_refused(tmp_path, ending, kept):
    path = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESS[ending](b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(20_000)))
    path.write_bytes(whole[:kept])
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending}: truncated") as caught:
        documents(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_damaged_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"this is no compressed file at all, whatever its name says")
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending}: damaged"):
        documents(path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"title": "x", "body": 1}', r"no field 'text' \(data\.text_field\); the line has 'title', 'body'"),
        (b"{}", "the line has no fields"),
        (b"[1]", "no field 'text'"),
        (b'{"text": 3}', "must be a string, not int"),
        (b'{"text": null}', "must be a string, not NoneType"),
        (b'{"text": "x"', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"text": "\xff"}', "not valid UTF-8 .byte 0xff"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, match):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=match) as caught:
        documents(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", ["text", "lines"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3("])
def test_bad_utf8_in_a_text_file_is_named_with_its_line(tmp_path, dataset, bad):
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 20_000 + b"bad " + bad + b" here\n" * 20_000)
    with pytest.raises(DataError, match=r"a\.txt, line 20001: not valid UTF-8"):
        documents(path, dataset=dataset)


def test_a_character_cut_by_the_end_of_the_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo é".encode()[:-1])
    with pytest.raises(DataError, match="line 2: not valid UTF-8"):
        documents(path)


def test_a_folder_whose_name_holds_wildcards_is_taken_by_its_name(tmp_path):
    for name in ("lr[0.1]", "lr0", "a*", "ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x[1].txt").write_text("x")
    for patterns, found in (
        ("lr[0.1]/x[1].txt", "lr[0.1]"),
        ("lr[0.1]/*.txt", "lr[0.1]"),
        ("a*/*.txt", "a*"),
        ("l*0/**", "lr0"),
    ):
        assert find_files(f"{tmp_path}/{patterns}", "data.train_files") == [tmp_path / found / "x[1].txt"]
    for pattern in ("/", ".", "/none/[*"):
        with pytest.raises(DataError, match="no file matches"):
            find_files(pattern, "data.train_files")


def test_globs_find_each_file_once_and_sorted(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.jsonl.xz", "deep/d.txt.gz", "x[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)

    def names(patterns):
        return [path.relative_to(tmp_path).as_posix() for path in find_files(patterns, "data.train_files")]

    assert names("[ab].txt, c.*,b.txt") == ["a.txt", "b.txt", "c.jsonl.xz"]
    assert names("**/*.txt*") == ["a.txt", "b.txt", "deep/d.txt.gz", "x[1].txt"]
    assert names("x[1].txt") == ["x[1].txt"]


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        ("*.txt,nothing*.txt", r"data\.train_files: no file matches 'nothing\*\.txt'"),
        ("a.txt,missing.txt", "no file matches 'missing.txt'"),
        ("table.csv", r"table\.csv is not read; its name must end in \.txt or \.jsonl"),
        (" , ", "must hold a path or glob"),
    ],
)
def test_an_empty_glob_or_a_foreign_file_is_refused(tmp_path, monkeypatch, patterns, match):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "table.csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=match) as caught:
        find_files(patterns, "data.train_files")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(DataError, match=r"cannot be read .Permission denied"):
        documents(path)


def test_a_file_that_vanished_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read .No such file"):
        documents(tmp_path / "a.txt")


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_an_endless_line_is_read_in_bounded_steps_and_not_to_its_end(tmp_path, monkeypatch, kind, ending):
    monkeypatch.setattr(files, "LARGEST_LINE", 1 << 20)
    path = tmp_path / f"a.{kind}{ending}"
    path.write_bytes(COMPRESS[ending](b'{"text": "' + b"a" * (1 << 26)))
    assert max(map(len, files.read_blocks(path))) <= 1 << 25
    message = rf"a\.{kind}\{ending}: holds a line of more than 1,048,576 characters; cut it into several"
    with pytest.raises(DataError, match=message):
        list(read_documents(path, "lines", "text"))


TABLE = {"title": ["a", "b", "c", "d"], "text": ["First é\n", None, "", "Second"], "year": [1, 2, 3, 4]}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow stream"])
def test_a_column_of_text_has_a_document_a_row(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    ipc, parquet = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow.parquet")
    table, path = pyarrow.table(TABLE), tmp_path / f"a.{kind.split()[0]}"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        with (ipc.new_file if kind == "arrow" else ipc.new_stream)(str(path), table.schema) as writer:
            for batch in table.to_batches(max_chunksize=2):
                writer.write_batch(batch)
    assert find_files(str(path), "data.train_files") == [path]
    assert documents(path) == ["First é\n", "Second"]
    assert documents(path, text_field="title", dataset="lines") == ["a", "b", "c", "d"]
    for field, message in (
        ("body", r"must have one column 'body' \(data.text_field\) of text; it has 'title' \(string\), 'text'"),
        ("year", r"must have one column 'year' .* of text; it has .*, 'year' \(int64\)"),
    ):
        with pytest.raises(DataError, match=message):
            documents(path, text_field=field)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"a\.{path.suffix[1:]}: cannot be read as {path.suffix[1:]}") as caught:
        documents(path)
    assert "\n" not in str(caught.value)


def test_two_columns_of_one_name_and_bytes_that_are_no_text_are_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    broken = pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(b"\xff\xfe"))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    for table, message in (
        (
            twice,
            r"a\.parquet: must have one column 'text' \(data.text_field\) of text; it has 'text' \(string\), 'text'",
        ),
        (pyarrow.table({"text": broken}), r"a\.parquet: column 'text' \(data.text_field\) is not valid UTF-8"),
    ):
        parquet.write_table(table, path)
        with pytest.raises(DataError, match=message):
            documents(path)
