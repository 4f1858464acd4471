"""Compares the first window's logits of two runs: `python -m tools.first_window --before=RUN --after=RUN`.

The first window has no history, so that there a TLinFormer computes what a Transformer with the same parameters does.
After a conversion by --init_from, both runs must agree until the first update (--after_step=0). Logits are computed in
float32 for the first tokens of samples of the second run's validation split. Prints a JSON object.

Layers are not looped over here: a Transformer loops over all of its layers and a TLinFormer only over a block's hidden
ones, and the compiler rounds a layer in a loop differently from the same layer outside.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import write_text, writing
from tlinformer_jax.models import build_model
from tlinformer_jax.training.checkpoint import load_run
from tlinformer_jax.training.setup import TrainedRun

BEFORE = flags.DEFINE_string("before", "", "Working directory of the first run.")
AFTER = flags.DEFINE_string("after", "", "Working directory of the second run, with windows.")
BEFORE_STEP = flags.DEFINE_integer("before_step", None, "Its checkpoint; the newest if not given.", lower_bound=0)
AFTER_STEP = flags.DEFINE_integer("after_step", 0, "Checkpoint of the second run.", lower_bound=0)
SAMPLES = flags.DEFINE_integer("samples", 16, "Number of samples.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File that also gets the result.")


def logits(trained: TrainedRun, tokens: np.ndarray) -> np.ndarray:
    """Returns a run's logits in float32, [samples, tokens, V]."""
    config = trained.run.config.model
    plan = dataclasses.replace(config.plan(), scan_layers=False)  # see above
    config = dataclasses.replace(config, dtype="float32", memory=plan)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(build_model(config).apply)({"params": trained.params}, tokens))


def compared(before: TrainedRun, after: TrainedRun, tokens: np.ndarray) -> dict[str, Any]:
    """Compares the logits that two runs have for the same tokens."""
    one, other = logits(before, tokens), logits(after, tokens)
    return {
        "samples": len(tokens),
        "tokens": tokens.shape[1],
        "logits": one.size,
        "equal_bits": float(np.mean(one == other)),
        "largest_difference": float(np.abs(one - other).max()),
        "largest_logit": float(np.abs(one).max()),
        "same_most_likely_token": float(np.mean(one.argmax(-1) == other.argmax(-1))),
    }


def main() -> None:
    """Loads both runs, compares them and prints the result."""
    out = cli.writable_file(OUT.value) if OUT.value else None
    before = load_run(cli.given_path(BEFORE, "the directory of a run"), BEFORE_STEP.value)
    after = load_run(cli.given_path(AFTER, "the directory of a run"), AFTER_STEP.value)
    model, data = after.run.config.model, after.run.config.data
    if not model.windowed:
        raise UserError(f"--after={AFTER.value}: must be a run with windows; it is a {model.architecture}")
    if data.is_task:
        raise UserError(f"--after={AFTER.value}: must be a run on text; its data are the task {data.dataset}")
    if before.run.config.model.vocab_size != model.vocab_size:
        sizes = f"it has {before.run.config.model.vocab_size}, --after has {model.vocab_size}"
        raise UserError(f"--before={BEFORE.value}: must have as large a vocabulary as --after; {sizes}")
    stream, length = after.run.split("validation"), data.sequence_length
    samples = min(SAMPLES.value, len(stream.tokens) // length)
    window = min(model.generation_window, length)
    tokens = np.asarray(stream.tokens[: samples * length], np.int32).reshape(samples, length)[:, :window]
    names = {"before": before, "after": after}
    result = {name: [run.run.config.model.architecture, run.step] for name, run in names.items()}
    result |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **compared(before, after, tokens)}
    text = json.dumps(result, indent=1)
    if out is not None:
        with writing(f"{out}:"):
            write_text(out, text + "\n")
    print(text)


if __name__ == "__main__":
    cli.run(main)
