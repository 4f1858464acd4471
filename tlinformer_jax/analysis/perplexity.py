"""Perplexity per token and per word, and bits per byte, from one sum of nats.

A perplexity per token depends on the tokenizer and on how many easy end-of-text tokens the stream holds, so it
compares only with itself. Per word and per byte the same nats are shared out over the text, whatever cut it into
tokens. All of them depend on the context length and on the stride (here N: samples do not overlap).
"""

import dataclasses
import math

from tlinformer_jax.data.streams import TokenStream


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The figures of one evaluation.

    Words are what stands between white space. Words, lines and bytes are scaled by `share`, that of the stream's tokens
    that were predicted: the first token and the dropped remainder are not. None where a stream's were not counted.
    """

    per_token: float  # exp(nats / evaluated tokens), end-of-text tokens included
    per_word: float | None  # exp(nats / words)
    per_word_with_eol: float | None  # exp(nats / (words + lines)), as in word-level results on WikiText-103
    bits_per_byte: float  # nats / ln 2 / UTF-8 bytes of the text
    evaluated_tokens: int
    share: float


def perplexity(total_nats: float, evaluated_tokens: int, stream: TokenStream) -> Perplexity:
    """Returns the figures for `total_nats`, the summed cross-entropy of `evaluated_tokens` tokens of `stream`."""
    length = len(stream.tokens)
    if not 0 < evaluated_tokens <= length:
        raise ValueError(f"evaluated_tokens = {evaluated_tokens}: must be 1 to {length}, the stream's length")
    share = evaluated_tokens / length
    words, lines = stream.num_words, stream.num_lines
    return Perplexity(
        per_token=_exp(total_nats / evaluated_tokens),
        per_word=None if words is None else _per(total_nats, share * words),
        per_word_with_eol=None if words is None or lines is None else _per(total_nats, share * (words + lines)),
        bits_per_byte=total_nats / math.log(2) / (share * stream.num_bytes) if stream.num_bytes else math.nan,
        evaluated_tokens=evaluated_tokens,
        share=share,
    )


def _per(nats: float, count: float) -> float:
    return _exp(nats / count) if count else math.nan


def _exp(value: float) -> float:
    """exp, but infinite where a float cannot hold it (an untrained model's figure per word)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
