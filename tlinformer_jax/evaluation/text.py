"""Perplexity of any text: with a run in memory, or with the directory that it has left."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from tlinformer_jax.data.streams import TokenStream, cut_documents, encode_pieces, smallest_dtype
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import DataError
from tlinformer_jax.evaluation.report import EvaluationOptions, Report, Source, describe, evaluate_source
from tlinformer_jax.evaluation.trained import load_run
from tlinformer_jax.files import finite
from tlinformer_jax.training.setup import TrainedRun


@dataclasses.dataclass(frozen=True)
class TextFigures:
    """A model's figures of a text: loss in nats per token, its exponential, exp(nats / words), nats / ln 2 / bytes.

    All tokens are predicted, the first one from an end-of-text. Words are what stands between white space.
    """

    tokens: int
    words: int
    bytes: int
    loss: float
    perplexity: float
    perplexity_per_word: float | None
    bits_per_byte: float


def text_perplexity(source: str | pathlib.Path | TrainedRun, text: str, length: int | None = None) -> TextFigures:
    """The figures of a text in samples of `length` tokens (None: as trained) that do not overlap; the last is shorter.

        from tlinformer_jax import load_run, text_perplexity

        figures = text_perplexity("runs/tiny", "The for statement is used to iterate.")
        run = load_run("runs/tiny")  # for many texts: restores and compiles once
        losses = [text_perplexity(run, text).loss for text in ("A class.", "A function.")]

    Raises a UserError for an empty text, a length that is not allowed, or a directory that cannot be used.
    """
    trained = source if isinstance(source, TrainedRun) else load_run(source)
    tokens = text_source(text, trained.run.tokenizer)
    report = evaluate_source(trained, tokens, EvaluationOptions(length=length))
    figures, counted = report["figures"], tokens.counted
    assert isinstance(counted, TokenStream)
    return TextFigures(
        report["tokens"],
        counted.num_words or 0,
        counted.num_bytes,
        *map(figures.get, ("loss", "perplexity", "perplexity_per_word", "bits_per_byte")),
    )


def evaluate_text(
    trained: TrainedRun, text: str, options: EvaluationOptions, *, text_file: str, command: Sequence[str] = ()
) -> Report:
    """What `evaluate_run` returns, of all tokens of a text at every length."""
    source = text_source(text, trained.run.tokenizer, text_file)
    head = describe(trained, command) | {"text_file": text_file}
    return finite(head | evaluate_source(trained, source, options))


def text_source(text: str, tokenizer: Tokenizer, name: str = "text") -> Source:
    """The tokens of a text after an end-of-text."""
    if not isinstance(text, str):
        raise DataError(f"{name}: must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{name}: must be text; it holds parts of characters (surrogates)") from None
    # In pieces, where the tokenizer allows it: some take long over a long text.
    pieces = cut_documents([(text, True)], tokenizer.safe_cut)
    encoded, counts = encode_pieces(pieces, tokenizer, smallest_dtype(tokenizer.vocab_size))
    if len(encoded) < 2:
        raise DataError(f"{name}: must hold some text; it holds no token")
    # The end-of-text that follows every document comes to the front.
    stream = TokenStream(np.roll(encoded, 1), counts.num_bytes, 1, counts.num_words, counts.num_lines)
    return Source(name, stream, dataclasses.replace(stream, tokens=encoded[:-1]), whole=True)
