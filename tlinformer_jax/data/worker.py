"""A tokenising process: `python -m tlinformer_jax.data.worker TOKENIZER_DIRECTORY DTYPE`.

Reads pickled lists of pieces from stdin and answers each with pickled (tokens, counts) on stdout, until stdin
ends: when its parent dies, however that happens, it ends too. It is a process of its own, neither a fork (JAX has
threads by then) nor a `multiprocessing` child (which would import the parent's main module, and JAX with it).
"""

import os
import pathlib
import pickle
import signal
import sys

import numpy as np

from tlinformer_jax.data.pieces import encode_pieces
from tlinformer_jax.data.tokenizers import load_tokenizer


def main(directory: str, dtype: str) -> None:
    """Serves until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both may reach a whole group of processes
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle, which then ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    tokenizer = load_tokenizer(pathlib.Path(directory))
    while True:
        try:
            pieces = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(encode_pieces(pieces, tokenizer, np.dtype(dtype)), answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
