"""Text to cached tokens: counts, determinism, and what a kill, a full disk or a second process leave behind."""

import contextlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests.support.corpus import config_for, tokenizer_named, write_corpus
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data import cache, files, streams
from tlinformer_jax.data.sources import load_split, load_stored_split, open_split
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")
BYTES = ByteTokenizer()


def caches(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())


def test_the_stream_is_every_document_and_an_end_after_each(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "two words\\nlast line"}\n{"text": ""}\n{"text": "é\\n\\n"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    stream = load_split(config_for(tmp_path), "train", BYTES)
    expected = b"first\0two words\nlast line\0" + "é\n\n".encode() + b"\0"
    assert [0 if token == 256 else token for token in stream.tokens.tolist()] == list(expected)
    assert stream.tokens.dtype == np.uint16
    assert isinstance(stream.tokens, np.memmap)
    assert (stream.num_documents, stream.num_bytes) == (3, len(expected) - 3)
    assert (stream.num_words, stream.num_lines) == (1 + 4 + 1, 1 + 2 + 2)


def test_a_second_opening_finds_the_cache(tmp_path):
    write_corpus(tmp_path / "a.jsonl", documents=2)
    first, second = (open_split(config_for(tmp_path), "train", BYTES) for _ in range(2))
    assert (first[1], second[1]) == (False, True)
    np.testing.assert_array_equal(first[0].tokens, second[0].tokens)
    assert {**vars(first[0]), "tokens": None} == {**vars(second[0]), "tokens": None}


def test_what_the_tokens_depend_on_makes_another_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n')
    config = config_for(tmp_path)
    load_split(config, "train", BYTES)

    def is_found(config, tokenizer=BYTES):
        return open_split(config, "train", tokenizer)[1]

    assert is_found(config)
    assert not is_found(config_for(tmp_path, dataset="lines"))
    assert not is_found(config_for(tmp_path, text_field="body"))
    assert not is_found(config, ByteTokenizer(name="other bytes"))
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not is_found(config)
    path.write_text('{"text": "One", "body": "two"}\n')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not is_found(config)  # same path, size and time: the hash of the ends tells


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "no meta", "half meta", "list", "digit", "deep meta", "no tokens"]
)
def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, capsys, damage):
    texts = write_corpus(tmp_path / "a.jsonl", documents=2)
    expected = np.array(load_split(config_for(tmp_path), "train", BYTES).tokens)
    (directory,) = caches(tmp_path)
    tokens, meta = directory / cache.TOKENS_FILE, directory / cache.META_FILE
    if damage == "truncated":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif damage == "flipped":
        data = bytearray(tokens.read_bytes())
        data[100] ^= 1
        tokens.write_bytes(data)
    elif damage == "half meta":
        meta.write_text(meta.read_text()[:100])
    elif damage == "digit":  # of what bits per byte are divided by
        count = json.loads(meta.read_text())["counts"]["num_bytes"]
        meta.write_text(meta.read_text().replace(f'"num_bytes": {count}', f'"num_bytes": {count + 1000}'))
    elif damage == "list":
        meta.write_text("[]")
    elif damage == "deep meta":
        meta.write_text("[" * 100_000)
    else:
        (meta if damage == "no meta" else tokens).unlink()
    stream, found = open_split(config_for(tmp_path), "train", BYTES)
    assert not found
    assert "damaged token cache" in capsys.readouterr().err
    np.testing.assert_array_equal(stream.tokens, expected)
    assert stream.num_bytes == sum(len(text.encode()) for text in texts)
    assert open_split(config_for(tmp_path), "train", BYTES)[1]
    assert caches(tmp_path) == [directory]


def test_files_without_any_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(DataError, match="no text in"):
        load_split(config_for(tmp_path), "train", BYTES)
    assert caches(tmp_path) == []


def test_a_bad_line_leaves_nothing_behind(tmp_path):
    write_corpus(tmp_path / "a.jsonl", documents=3)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"body": "x"}\n')
    with pytest.raises(DataError, match="line 4: no field 'text'"):
        load_split(config_for(tmp_path), "train", BYTES)
    assert caches(tmp_path) == []


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_corpus(path, documents=1)
    real = streams.encode_pieces

    def grow(*arguments):
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
        return real(*arguments)

    monkeypatch.setattr(streams, "encode_pieces", grow)
    with pytest.raises(DataError, match="changed while it was read"):
        load_split(config_for(tmp_path), "train", BYTES)
    assert caches(tmp_path) == []


def test_a_split_without_files_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.validation_files = '': must hold a path or glob"):
        load_split(config_for(tmp_path), "validation", BYTES)
    with pytest.raises(DataError, match="split 'dev': must be one of train, validation, test"):
        load_split(DataConfig(), "dev", BYTES)


def test_the_embedded_corpus_comes_through_the_same_door():
    train, validation, test = (load_split(DataConfig(), split, BYTES) for split in ("train", "validation", "test"))
    assert train.num_documents > 8 * validation.num_documents > 0
    assert validation.num_documents + test.num_documents > 10


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", documents=1)
    (tmp_path / "cache").write_text("a file where the directory should be")
    for folder in (tmp_path / "cache", tmp_path / ("n" * 300)):
        monkeypatch.setenv("TLINFORMER_CACHE", str(folder))
        with pytest.raises(DataError, match=r"cannot be written \(.*\); TLINFORMER_CACHE may name") as caught:
            load_split(config_for(tmp_path), "train", BYTES)
        assert "\n" not in str(caught.value)


def _run_child(tmp_path: pathlib.Path, before: str = "", **changes) -> subprocess.Popen:
    """A process that opens the training split and prints "TOKENS FOUND"."""
    code = f"""
        {before}
        from tlinformer_jax.config.data import DataConfig
        from tlinformer_jax.data.sources import open_split
        from tlinformer_jax.data.streams import check_token_ids
        from tlinformer_jax.data.tokenizers import build_tokenizer
        from tlinformer_jax.errors import UserError
        config = {config_for(tmp_path, **changes)!r}
        try:
            stream, found = open_split(config, "train", build_tokenizer(config.tokenizer))
        except UserError as error:
            raise SystemExit(str(error))
        check_token_ids(stream, 1 << 20, "train")  # as every user of a split does
        print(len(stream.tokens), found)
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **pipes)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path):
    """A limit on the size of a file makes a real write fail, as a full disk does."""
    write_corpus(tmp_path / "a.jsonl", documents=20)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}))"
    child = _run_child(tmp_path, before=limit)
    _, message = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "the token cache cannot be written (File too large); TLINFORMER_CACHE may name" in message
    assert len(message.strip().splitlines()) == 1
    assert caches(tmp_path) == []
    assert not open_split(config_for(tmp_path), "train", BYTES)[1]


def test_kill_in_the_middle_of_tokenising_then_a_correct_second_run(tmp_path):
    tokenizer = tokenizer_named("gpt2")
    texts = write_corpus(tmp_path / "a.jsonl", documents=300, words=4000)
    child = _run_child(tmp_path, tokenizer="gpt2")
    tokens = tmp_path / "cache" / "tokens"
    _wait_until(lambda: any(path.stat().st_size for path in tokens.glob(f"*.tmp-*/{cache.TOKENS_FILE}")), child)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    (left,) = caches(tmp_path)
    assert ".tmp-" in left.name
    stream, found = open_split(config_for(tmp_path, tokenizer="gpt2"), "train", tokenizer)
    assert not found
    expected = np.concatenate([np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in texts])
    np.testing.assert_array_equal(stream.tokens, expected)
    (made,) = caches(tmp_path)  # and what the killed run left is gone
    assert ".tmp-" not in made.name


def test_what_a_killed_run_has_left_is_removed_and_another_hosts_is_not(tmp_path):
    write_corpus(tmp_path / "a.jsonl", documents=1)
    load_split(config_for(tmp_path), "train", BYTES)
    (made,) = caches(tmp_path)
    stale, foreign = (made.with_name(f"{made.name}.tmp-{node}-1-1") for node in (os.uname().nodename, "another.host"))
    for path in (stale, foreign):
        path.mkdir()
    (made / cache.TOKENS_FILE).unlink()  # so that it is made again
    load_split(config_for(tmp_path), "train", BYTES)
    assert caches(tmp_path) == [made, foreign]


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_two_processes_at_once_make_one_sound_cache(tmp_path, locks):
    write_corpus(tmp_path / "a.jsonl", documents=100)
    no_locks = """
        import errno, fcntl
        def refuse(*_): raise OSError(errno.ENOLCK, "no locks here")
        fcntl.flock = refuse
    """
    before = textwrap.indent(textwrap.dedent(no_locks), " " * 8).strip() if locks == "without locks" else ""
    children = [_run_child(tmp_path, before=before) for _ in range(3)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    stream = load_split(config_for(tmp_path), "train", BYTES)
    assert {output.split()[0] for output, _ in outputs} == {str(len(stream.tokens))}
    if locks == "with locks":
        assert sorted(output.split()[1] for output, _ in outputs) == ["False", "True", "True"]
    (made,) = caches(tmp_path)
    assert ".tmp-" not in made.name


def _wait_until(condition, child: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert child is None or child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _peak_memory(child: subprocess.Popen) -> int:
    """The peak of the summed resident memory of a process and its children, in bytes, until it ends."""
    peak = 0
    while child.poll() is None:
        children = pathlib.Path(f"/proc/{child.pid}/task/{child.pid}/children")
        total = 0
        with contextlib.suppress(OSError):
            for pid in [str(child.pid), *children.read_text().split()]:
                total += int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        peak = max(peak, total)
        time.sleep(0.02)
    return peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    tokenizer_named("gpt2")
    peaks = []
    write_corpus(tmp_path / "some.txt", 4, words=220_000)  # of 1.3 MB each: "books"; to draw all would take longest
    some = (tmp_path / "some.txt").read_text()
    for documents in (8, 48):  # in one file
        (tmp_path / "a.jsonl").write_text(some * (documents // 4))
        child = _run_child(tmp_path, tokenizer="gpt2")
        peaks.append(_peak_memory(child))
        assert child.returncode == 0
    assert peaks[1] < 1.15 * peaks[0]
    assert peaks[1] < 700e6


def test_patterns_of_a_stored_configuration_search_no_disks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_ENTRIES", 10)
    write_corpus(tmp_path / "a.jsonl", documents=1)
    for number in range(11):
        (tmp_path / f"{number}.other").touch()
    for pattern in ("**/*.jsonl", "*/../a.jsonl"):
        config = config_for(tmp_path, train_files=str(tmp_path / pattern))
        with pytest.raises(DataError, match=r"data\.train_files: '.*' would search more than 10 files and folders"):
            load_stored_split(config, "train", BYTES)
    assert not (tmp_path / "cache").exists()
    load_stored_split(config_for(tmp_path), "train", BYTES)  # one folder is no search
