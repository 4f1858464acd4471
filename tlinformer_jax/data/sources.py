"""The corpora by name: the one entry point through which training and evaluation load a split."""

from tlinformer_jax.data.config import DataConfig
from tlinformer_jax.data.pydoc import load_pydoc
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")


def load_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> TokenStream:
    """The split 'train', 'validation' or 'test' of the configured corpus as a token stream."""
    assert config.dataset == "pydoc" and split in SPLITS
    return load_pydoc(split, tokenizer)
