"""Computes the n-gram baseline of a text: `python -m tools.ngram_floor --config=configs/books.py --config.data...`.

Prints how well n-grams fitted on the training split predict the validation split (--split=test: the test split), for
each number of context tokens up to --context (3: 4-grams). The configuration names text and tokenizer; no model is
trained. With --width=28, images of 28 x 28 pixels are read by columns: the context is the pixels above.
"""

import numpy as np
from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError

cli.define_config_flag()
SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "Split to predict.")
CONTEXT = flags.DEFINE_integer("context", None, "Most tokens of context; default: 6 bytes, or 3 others.", lower_bound=0)
WIDTH = flags.DEFINE_integer("width", None, "Of square images, to read them by columns.", lower_bound=1)


def main() -> None:
    """Prints a line for each number of context tokens."""
    from tlinformer_jax.analysis.ngram import BYTE_VOCABULARY, BYTES, by_columns, kneser_ney_bits
    from tlinformer_jax.config.run import run_config
    from tlinformer_jax.data.sources import load_split
    from tlinformer_jax.data.streams import TokenStream
    from tlinformer_jax.data.tokenizers import build_tokenizer

    config = run_config(cli.config_values()).data
    if config.is_task:
        raise UserError(f"data.dataset = {config.dataset!r}: must be a text for n-grams")
    tokenizer = build_tokenizer(config.tokenizer)
    train, test = (load_split(config, split, tokenizer) for split in ("train", SPLIT.value))
    assert isinstance(train, TokenStream)
    assert isinstance(test, TokenStream)
    context = CONTEXT.value
    if context is None:
        context = BYTES if tokenizer.vocab_size <= BYTE_VOCABULARY else 3
    rows = [np.asarray(stream.tokens) for stream in (train, test)]
    if WIDTH.value:
        rows = [by_columns(tokens, WIDTH.value) for tokens in rows]
    for name, tokens in zip(("train", SPLIT.value), rows):
        if len(tokens) < context + 2:
            raise UserError(f"--context={context}: must be at most {len(tokens) - 2}, what the {name} split has")
    bits = kneser_ney_bits(*rows, tokenizer.vocab_size, context)
    for size, value in enumerate(bits):
        text = f"{size} tokens of context: perplexity {2**value:.2f} per token"
        if test.num_bytes:  # token ids of your own have none
            text += f", {value * len(rows[1]) / test.num_bytes:.3f} bits per byte"
        print(text)


if __name__ == "__main__":
    cli.run(main)
