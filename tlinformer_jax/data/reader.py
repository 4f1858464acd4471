"""Training batches prepared ahead by threads, so that the accelerator never waits for them.

Reads with grain where it is installed and with a thread pool of the standard library otherwise. Either way batch
`step` is `TrainingBatches.batch(step)`, so both give the same stream, and its state is the next step's number.
"""

import collections
import concurrent.futures
import importlib.util
from collections.abc import Generator, Iterator
from typing import Self

from tlinformer_jax.data.batches import ALL, Batch, Rows, TrainingBatches
from tlinformer_jax.errors import DataError

ENDLESS = 1 << 48  # more updates than any run makes; grain wants a length


class PrefetchedBatches(Iterator[Batch]):
    """An iterator over training batches with a checkpointable position. Close it, or use it in a `with`."""

    def __init__(self, source: Generator[Batch, None, None], start_step: int) -> None:
        self._source, self._step = source, start_step

    def __next__(self) -> Batch:
        batch = next(self._source)
        self._step += 1
        return batch

    def state(self) -> dict[str, int]:
        """The position: the number of the update that comes next. Batches prepared ahead do not count."""
        return {"step": self._step}

    def close(self) -> None:
        """Ends the threads."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetched(
    batches: TrainingBatches,
    start_step: int = 0,
    rows: Rows = ALL,
    *,
    num_threads: int = 2,
    ahead: int = 4,
    use_grain: bool | None = None,
) -> PrefetchedBatches:
    """Returns the batches, or rows of them, from update `start_step` on, prepared ahead.

    Args:
      batches: the stream.
      start_step: the first update; `state()["step"]` of an earlier iterator goes on where that one stood.
      rows: of each batch, that this process holds.
      num_threads: threads that prepare batches.
      ahead: batches kept ready.
      use_grain: whether grain reads; None: if it is installed.

    Raises:
      DataError: if `start_step` is negative.
    """
    if start_step < 0:
        raise DataError(f"data position step = {start_step}: must be 0 or more")
    if use_grain is None:
        use_grain = importlib.util.find_spec("grain") is not None
    read = _read_with_grain if use_grain else _read_with_threads
    return PrefetchedBatches(read(batches, start_step, rows, num_threads, ahead), start_step)


def _read_with_threads(
    batches: TrainingBatches, start_step: int, rows: Rows, num_threads: int, ahead: int
) -> Generator[Batch, None, None]:
    executor = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
    pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    try:
        for step in range(start_step, ENDLESS):
            pending.append(executor.submit(batches.batch, step, rows))
            if len(pending) > ahead:
                yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _read_with_grain(
    batches: TrainingBatches, start_step: int, rows: Rows, num_threads: int, ahead: int
) -> Generator[Batch, None, None]:
    import grain

    steps = grain.MapDataset.range(start_step, ENDLESS)
    read = steps.map(lambda step: batches.batch(int(step), rows))
    # Threads only: grain's worker processes need absl's flags parsed (grain#1361), and each would map the tokens.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(ahead, num_threads))
    iterator = iter(read.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        close = getattr(iterator, "close", None)  # not in every version of grain
        if close is not None:
            close()
