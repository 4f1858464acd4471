"""Training speed: `python -m tlinformer_jax.bench.training --lengths=512,1024 --batch_tokens=32768 --out=DIR`.

Times whole training steps (forward, backward, AdamW) of the 41M shape on random tokens. The time of a step is the
median over `steps` steps, each waited for; compilation is reported apart.
"""

import json
import pathlib
import time
from typing import Any

from absl import flags

from tlinformer_jax import cli
from tlinformer_jax.errors import ConfigError

ARCHITECTURES = flags.DEFINE_list("architectures", ["tlinformer", "transformer"], "Architectures to time.")
LENGTHS = flags.DEFINE_list("lengths", ["512"], "Sequence lengths in tokens.")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 32768, "Tokens of a step.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 100, "Timed steps.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", 256, "history_window and generation_window.", lower_bound=1)
D_MODEL = flags.DEFINE_integer("d_model", 432, "Width.", lower_bound=1)
SCAN_LAYERS = flags.DEFINE_bool("scan_layers", True, "ModelConfig.scan_layers.")
OUT = flags.DEFINE_string("out", "", "Directory for training.json; none: print only.")


def time_training(architecture: str, length: int) -> dict[str, Any]:
    """Times the training step of one architecture at one length.

    Returns:
      architecture, length (tokens), batch (sequences), tokens_per_second, step_seconds (median), compile_seconds,
      first_loss and last_loss (nats), peak_bytes (of the device, whole process so far; None where unknown).
    """
    import jax
    import numpy as np

    from tlinformer_jax.bench.timing import Timing, peak_bytes
    from tlinformer_jax.models import ModelConfig, build_model
    from tlinformer_jax.parallel.mesh import MeshConfig, build_mesh
    from tlinformer_jax.parallel.sharding import batch_sharding, put_batch, tree_shardings
    from tlinformer_jax.training.config import TrainConfig
    from tlinformer_jax.training.optimizer import Horizon
    from tlinformer_jax.training.step import init_state, jit_train_step

    config = ModelConfig(
        architecture=architecture,
        d_model=D_MODEL.value,
        history_window=WINDOW.value,
        generation_window=WINDOW.value,
        scan_layers=SCAN_LAYERS.value,
    )
    batch_size = max(1, BATCH_TOKENS.value // length)
    train, model = TrainConfig(batch_size=batch_size), build_model(config)
    horizon = Horizon(STEPS.value, STEPS.value)
    mesh = build_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda key: init_state(key, model, train, horizon), jax.random.key(0))
        shardings = tree_shardings(shapes, mesh)
        init = jax.jit(lambda key: init_state(key, model, train, horizon), out_shardings=shardings)
        state = init(jax.random.key(0))
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length + 1), dtype=np.int32)
        weights = np.ones((batch_size, length), np.float32)
        batch = put_batch({"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}, mesh)
        started = time.perf_counter()
        step = jit_train_step(model, train, horizon, shardings, batch_sharding(mesh)).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - started
        losses, seconds = [], []
        for _ in range(STEPS.value + 2):
            started = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))  # waits for the step
            seconds.append(time.perf_counter() - started)
    median = Timing(tuple(seconds[2:])).median
    return {
        "architecture": architecture,
        "length": length,
        "batch": batch_size,
        "window": WINDOW.value,
        "tokens_per_second": batch_size * length / median,
        "step_seconds": median,
        "compile_seconds": compile_seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Times every architecture at every length."""
    from tlinformer_jax.bench.timing import device_facts

    try:
        lengths = [int(length) for length in LENGTHS.value]
    except ValueError:
        raise ConfigError("--lengths", LENGTHS.value, "must be integers, separated by commas") from None
    facts = device_facts()
    rows = []
    for architecture in ARCHITECTURES.value:
        for length in lengths:
            row = time_training(architecture, length)
            rows.append(row)
            print(
                f"{facts['device']}  {architecture:14} N {length:>8,}  batch {row['batch']:>4}  "
                f"{row['tokens_per_second']:>12,.0f} tokens/s  step {row['step_seconds'] * 1e3:.2f} ms  "
                f"compile {row['compile_seconds']:.1f} s  loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}",
                flush=True,
            )
    if OUT.value:
        folder = cli.writable_workdir(OUT.value, "--out")
        report = facts | {"rows": rows}
        pathlib.Path(folder, "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
