"""Compiles a training step for TPUs that this machine does not have.

    python -m tools.training_topology --config=FILE --topology=v5e:16x16 [--config.FIELD=VALUE ...]

Prints the memory per chip, and for each kind of collective how often it runs in a step and how many bytes a chip
exchanges. It does not predict speed. Nothing is allocated, and no text is read.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError
from tools.topologies import PLATFORM, compile_without_tpus, program_lines, topology_devices

if TYPE_CHECKING:
    from tlinformer_jax.config.run import RunConfig

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "TPU generation and its grid of chips.")
LANES = 128


def main() -> None:
    """Compiles a step and prints its memory and exchanges."""
    compile_without_tpus()
    from tlinformer_jax.config.run import run_config

    model, compiled = compile_for(run_config(cli.config_values()), TOPOLOGY.value)
    print("\n".join([model, *program_lines(compiled)]))


def compile_for(config: "RunConfig", name: str) -> tuple[str, Any]:
    """Compiles a training step for a TPU topology.

    Args:
      config: configuration of the run; its data and tokenizer are ignored.
      name: name of the topology.

    Returns:
      a line about the model and its devices, and the step (`jax.stages.Compiled`).

    Raises:
      ConfigError: if the configuration does not fit the devices.
      UserError: for an unknown topology, or if the step does not fit a chip's memory.
    """
    import jax

    from tlinformer_jax.data.tokenizers import ByteTokenizer
    from tlinformer_jax.parallel.mesh import target
    from tlinformer_jax.training.console import model_line
    from tlinformer_jax.training.device_memory import is_out_of_memory
    from tlinformer_jax.training.setup import ANY_LENGTH, build_run, check_trainable

    devices = topology_devices(name)
    with target(PLATFORM, devices[0].device_kind):
        # No text is read, so the byte tokenizer replaces the real one: it fits every vocabulary.
        run = build_run(config, ByteTokenizer(), ANY_LENGTH, devices)
        check_trainable(run)
        try:
            return model_line(run), run.compiled_train_step()
        except jax.errors.JaxRuntimeError as error:
            reason = next(line for line in str(error).splitlines() if line.strip()).strip()[:300]
            if is_out_of_memory(error):
                raise UserError(f"--topology={name}: a step does not fit a chip's memory ({reason})") from error
            advice = ""
            if run.mesh.shape["fsdp"] > 1 and config.model.vocab_size % LANES:
                # Seen with libtpu 0.0.42 at a vocabulary of 257.
                advice = f"model.vocab_size = {config.model.vocab_size}, not a multiple of {LANES}, may be why; "
            raise UserError(f"--topology={name}: the TPU's compiler fails; {advice}it says: {reason}") from error


if __name__ == "__main__":
    cli.define_config_flag()
    cli.run(main)
