"""Evaluates a trained model: `python -m tlinformer_jax.evaluate --workdir=DIR [--split=validation]`."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from tlinformer_jax import cli
from tlinformer_jax.errors import UserError

if TYPE_CHECKING:
    from tlinformer_jax.config import RunConfig

cli.define_process_flags()
WORKDIR = flags.DEFINE_string("workdir", "", "Working directory of a run.")
SPLIT = flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "Split to evaluate on.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest good one if not given.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Sequences at a time; as in training if not given.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print the figures as one JSON object.")


LABELS = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity per token",
    "perplexity_per_word": "perplexity per word",
    "perplexity_per_word_with_eol": "  line ends as words",
    "bits_per_byte": "bits per byte",
    "loss_first_window": "loss in the first window",
    "loss_later_windows": "loss in later windows",
}


def main() -> None:
    """Restores a checkpoint's parameters and prints loss and perplexity on a split."""
    from tlinformer_jax.config import load_config
    from tlinformer_jax.parallel.mesh import MeshConfig
    from tlinformer_jax.parallel.processes import joined
    from tlinformer_jax.training.memory import advised, evaluation_advice
    from tlinformer_jax.training.setup import use_compilation_cache

    if not WORKDIR.value:
        raise UserError("--workdir: must name the directory of a run")
    cluster = cli.cluster()
    workdir = pathlib.Path(WORKDIR.value).expanduser()
    # Any machine will do, whatever mesh the training had.
    config = dataclasses.replace(load_config(workdir), mesh=MeshConfig())
    if BATCH_SIZE.value is not None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batch_size=BATCH_SIZE.value))
    use_compilation_cache()
    if cluster is not None:
        import jax

        # It would take SIGTERM for a training loop that asks for it; this command ends at once.
        jax.config.update("jax_enable_preemption_service", False)
    with joined(cluster), advised(lambda: evaluation_advice(config.train.evaluation_batch_size)):
        _evaluate(config, workdir)


def _evaluate(config: "RunConfig", workdir: pathlib.Path) -> None:
    import jax

    from tlinformer_jax.data.tokenizers import load_tokenizer
    from tlinformer_jax.training.checkpoint import restore_params
    from tlinformer_jax.training.evaluation import summary
    from tlinformer_jax.training.setup import build_run

    run = build_run(config, load_tokenizer(workdir))
    stream = run.split(SPLIT.value)
    step, params = restore_params(workdir, run.abstract_state.params, STEP.value)
    result = run.evaluate(params, stream)
    figures = summary(result, stream, config.model.generation_window)
    if jax.process_index() != 0:
        return
    if JSON.value:
        print(json.dumps({"step": step, "split": SPLIT.value, "tokens": result.tokens, **figures}))
        return
    print(f"{config.model.architecture}, step {step}, {SPLIT.value} split, {result.tokens:,} tokens")
    for name, value in figures.items():
        print(f"  {LABELS[name]:26} {value:.5g}")


if __name__ == "__main__":
    cli.run(main)
