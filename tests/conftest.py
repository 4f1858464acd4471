"""Test-wide settings: eight simulated CPU devices, float32 products, a persistent compilation cache."""

import gc
import importlib.metadata
import os
import pathlib

from tests.support.compilation import quick_flags

ON_GPU = os.environ.get("JAX_PLATFORMS", "cpu") not in ("", "cpu")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not ON_GPU:
    # A collective waits for devices that share a few cores with whatever else runs: 40 seconds, the default, were seen
    # to be too few.
    flags = f"--xla_force_host_platform_device_count=8 {quick_flags()}"
    if importlib.metadata.version("jax") < "0.12":  # where the flag is known to exist; an unknown one is fatal
        flags += " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    # XLA's threads, by default one for each core. Devices that wait in a collective hold theirs, and with more devices
    # than threads none may be left to compute what they wait for.
    os.environ.setdefault("NPROC", "16")

# PyTorch's and NumPy's threads wait for each other by spinning, which on cores that are shared takes most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Programs are small, and many workers and commands compile the same ones: all are kept, in commands as well.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402  (reads the environment set above)
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Before the first import of the package.
ROOMS = [f"tlinformer_jax.{room}" for room in ("models", "kernels", "decoding", "training")]
jaxtyping.install_import_hook(ROOMS, "tests.support.shapes.checked")

from tests.support import figures, shapes  # noqa: E402, F401  (shapes is what the hook calls)

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))


@pytest.fixture(scope="session", autouse=True)
def tokens_of_tests(tmp_path_factory):
    """Keeps tokens of the tests' texts out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLINFORMER_CACHE", str(tmp_path_factory.mktemp("tlinformer_cache")))
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keeps tokens and downloads of a test in a folder of its own."""
    monkeypatch.setenv("TLINFORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list[figures.Panel]]:
    """File name -> what each panel of a saved figure shows."""
    return figures.recorded(monkeypatch)


@pytest.fixture
def own_traces():
    """Clears JAX's caches before and after a test that patches code, so that it shares no trace with other tests."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long tests at the start of each worker's share, so that no worker starts one at the end.

    `--dist worksteal` first gives every worker an equal share of the list, in order.
    """
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    workers, left = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items)
    items.clear()
    for worker in range(workers):
        part = long[worker::workers]
        count = max(0, left // (workers - worker) - len(part))
        items += [*part, *others[:count]]
        left, others = left - len(part) - count, others[count:]


def pytest_collection_finish() -> None:
    """Looks for garbage seldom: tracing makes many objects and few cycles, and this took a fifth of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
