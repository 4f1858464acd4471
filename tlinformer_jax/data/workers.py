"""Tokenising with several processes, in the order of the input."""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from tlinformer_jax.data.pieces import Counts, Piece, encode_pieces
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import DataError

Encoded = tuple[np.ndarray, Counts]
Worker = subprocess.Popen[bytes]
FEW_GROUPS = 16  # up to so many, starting processes takes longer than doing the work here


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_groups(
    groups: Iterable[list[Piece]], tokenizer: Tokenizer, dtype: np.dtype, num_workers: int, scratch: pathlib.Path
) -> Iterator[Encoded]:
    """Encodes groups of pieces with `num_workers` processes; results come in the groups' order.

    With few groups or one worker the work is done in this process.

    Args:
      groups: read no further ahead than keeps every worker busy.
      tokenizer: saved under `scratch`, from where the workers load it.
      dtype: of the tokens.
      num_workers: processes; 0 is one for each core.
      scratch: a directory for the tokenizer's files.

    Raises:
      DataError: if a worker dies, or a document cannot be encoded.
    """
    num_workers = num_workers or available_cores()
    groups = iter(groups)
    first = list(itertools.islice(groups, FEW_GROUPS)) if num_workers > 1 else []
    few = len(first) < FEW_GROUPS
    groups = itertools.chain(first, groups)
    del first  # the chain lets each group go once it is done
    if num_workers == 1 or few:
        yield from (encode_pieces(group, tokenizer, dtype) for group in groups)
        return
    directory = scratch / "tokenizer"
    directory.mkdir()
    tokenizer.save(directory)
    with _running_workers(directory, dtype, num_workers) as workers:
        yield from _in_order(groups, workers)


def _in_order(groups: Iterable[list[Piece]], workers: list[Worker]) -> Iterator[Encoded]:
    """Hands each group to an idle worker; at most twice as many groups as workers are under way."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def exchange(group: list[Piece]) -> Encoded:
        worker = idle.get()
        try:
            return _ask(worker, group)
        finally:
            idle.put(worker)  # a dead one too: whoever waits for it must fail, not wait for ever

    pending: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
    # One thread a worker: a thread only writes to and reads from its worker's pipes.
    executor = concurrent.futures.ThreadPoolExecutor(len(workers))
    try:
        for group in groups:
            pending.append(executor.submit(exchange, group))
            if len(pending) >= 2 * len(workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:
        for worker in workers:
            worker.kill()  # so that no thread waits for an answer any more
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _ask(worker: Worker, group: list[Piece]) -> Encoded:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        pickle.dump(group, worker.stdin, protocol=5)
        worker.stdin.flush()
        answer = pickle.load(worker.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
        longest = max((piece.text for piece in group), key=len)
        raise DataError(
            f"a tokenising process ended with status {worker.wait()} (-9: killed, most often for want of memory; "
            f"data.num_workers sets how many run); it had {len(longest):,} characters from {longest[:40]!r} on"
        ) from None
    if isinstance(answer, str):
        raise DataError(answer)
    return answer


@contextlib.contextmanager
def _running_workers(directory: pathlib.Path, dtype: np.dtype, count: int) -> Iterator[list[Worker]]:
    package_root = str(pathlib.Path(__file__).resolve().parents[2])
    environment = os.environ | {
        # The same modules as here, also where sys.path was changed after the start (notebooks, tests).
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, sys.path)]),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
        "OPENBLAS_NUM_THREADS": "1",  # numpy's thread pool would cost memory and start-up time
    }
    command = [sys.executable, "-m", "tlinformer_jax.data.worker", str(directory), np.dtype(dtype).name]
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment))
        yield workers
    finally:
        for worker in workers:
            with contextlib.suppress(BrokenPipeError), worker:  # closes the pipes, which ends it, and waits
                pass
