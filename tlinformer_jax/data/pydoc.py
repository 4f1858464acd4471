"""The text that every CPython carries: `pydoc_data.topics`, the language reference (79 articles, 465 kB)."""

import numpy as np

from tlinformer_jax.data.pieces import Piece, encode_pieces
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import Tokenizer


def load_pydoc(split: str, tokenizer: Tokenizer) -> TokenStream:
    """Articles in key order; every tenth is held out for validation."""
    from pydoc_data.topics import topics

    held_out = split == "validation"
    texts = [topics[key] for i, key in enumerate(sorted(topics)) if (i % 10 == 9) == held_out]
    pieces = [Piece(text, "", ends=True) for text in texts]
    tokens, counts = encode_pieces(pieces, tokenizer, np.dtype(np.uint32))
    return TokenStream(tokens, counts.num_bytes, counts.num_documents, counts.num_words, counts.num_lines)
