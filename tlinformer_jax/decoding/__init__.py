"""From a prompt to text, with a cache.

generator         prompts in, tokens or text out
stream            a running generation: when the host calls the device, when a window slides
decoder           the token step, the loop on the device, one interface to all architectures
windowed          `prefill` and `slide` of TLinFormer and TConstFormer
history           C in `prefill` and `slide`, in chunks of rows
causal            the histories of later blocks with `model.causal_history`
layered           `prefill` of the baselines
cache             types and sizes of the caches
memory            bytes of a cache
context_parallel  generation on several devices
sampling          options, and sampling of the next token
params            parameters in the form that the decoder reads
"""

from tlinformer_jax.decoding.context_parallel import context_mesh
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.generator import Generator
from tlinformer_jax.decoding.memory import cache_bytes
from tlinformer_jax.decoding.sampling import GenerationConfig
from tlinformer_jax.decoding.stream import Generation, GenerationStream, Piece

__all__ = [
    "Decoder",
    "Generation",
    "GenerationConfig",
    "GenerationStream",
    "Generator",
    "Piece",
    "cache_bytes",
    "context_mesh",
]
