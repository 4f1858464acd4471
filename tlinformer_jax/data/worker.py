"""A tokenising process: `python -m tlinformer_jax.data.worker TOKENIZER_DIRECTORY DTYPE`.

Reads pickled lists of pieces from stdin and answers each with pickled (tokens, counts) on stdout, or with what is wrong
as a string, until stdin ends: when its parent dies, however that happens, it ends too. It is a process of its own,
neither a fork (JAX has threads by then) nor a `multiprocessing` child (which would import the parent's main module, and
JAX with it).
"""

import os
import pathlib
import pickle
import signal
import sys
from typing import Any

import numpy as np

from tlinformer_jax.data.pieces import encode_pieces
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.errors import DataError


def main(directory: str, dtype: str) -> None:
    """Serves until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they may reach a whole group of processes
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle, which then ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    tokenizer = load_tokenizer(pathlib.Path(directory))
    while True:
        try:
            pieces = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = encode_pieces(pieces, tokenizer, np.dtype(dtype))
        except DataError as error:
            answer = str(error)
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
