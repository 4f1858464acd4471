"""Compiles the decoder for TPUs that this machine does not have: `python -m tools.decoder_topology --topology=v5e:2x2`.

libtpu compiles `prefill`, `step` and `slide` of the 41M shape, with a history of --length tokens split over all chips
of the topology. The tool prints the memory per chip and the exchanges between chips. Nothing is allocated or run.
"""

import functools
from typing import Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.errors import UserError
from tools.topologies import PLATFORM, compile_without_tpus, program_lines, topology_devices

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "TPU generation and its grid of chips.")
LENGTH = flags.DEFINE_integer("length", 4_000_000, "Tokens of the sequence.", lower_bound=1, upper_bound=2**31 - 1)
DTYPE = "bfloat16"


def main() -> None:
    """Compiles each of the three and prints its memory and exchanges."""
    compile_without_tpus()
    from tlinformer_jax.parallel.mesh import target
    from tlinformer_jax.training.device_memory import is_out_of_memory

    devices = topology_devices(TOPOLOGY.value)
    with target(PLATFORM, devices[0].device_kind):
        for name, lowered in lowered_decoder(ModelConfig(dtype=DTYPE), devices, LENGTH.value).items():
            try:
                compiled = lowered.compile()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"--topology={TOPOLOGY.value}: {name} does not fit a chip's memory ({str(error)[:300]})"
                ) from error
            print(f"{name}, {LENGTH.value:,} tokens on {len(devices)} x {devices[0].device_kind}")
            print("\n".join(program_lines(compiled)))


def lowered_decoder(config: ModelConfig, devices: Any, length: int) -> dict[str, Any]:
    """Lowers the decoder for one sequence with a split history; returns `jax.stages.Lowered` by name."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from tlinformer_jax.decoding import windowed
    from tlinformer_jax.decoding.cache import capacity_for, init_cache
    from tlinformer_jax.decoding.context_parallel import REPLICATED, cache_specs, on_devices, split_of
    from tlinformer_jax.decoding.decoder import step
    from tlinformer_jax.decoding.params import decoder_params
    from tlinformer_jax.models.model import build_model
    from tlinformer_jax.parallel.sharding import build_mesh

    mesh = build_mesh({"context": len(devices)}, devices)
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, REPLICATED))

    def params() -> Any:
        model = build_model(config)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        typed: Any = model.apply(variables, method=model.parameters)
        return decoder_params(typed, config)

    shapes = jax.tree.map(lambda leaf: whole(leaf.shape, leaf.dtype), jax.eval_shape(params))
    capacity = capacity_for(config, length + config.generation_window, len(devices))
    cache = jax.eval_shape(functools.partial(init_cache, config, 1, capacity, split_of(mesh, config)))
    cache = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        cache,
        cache_specs(cache),
    )
    number, prompt = whole((), jnp.int32), whole(cache.tokens.shape[1:], jnp.int32)
    calls = {
        "prefill": (windowed.prefill, number, prompt, number, number),
        "step": (step, whole((1,), jnp.int32), whole((1,), jnp.bool_)),
        "slide": (windowed.slide, number, number),
    }
    return {
        name: on_devices.lower(function, mesh, shapes, config, cache, *arrays)
        for name, (function, *arrays) in calls.items()
    }


if __name__ == "__main__":
    cli.run(main)
