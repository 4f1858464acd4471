"""What depends on the kind of device follows the target that a program is traced for."""

import functools
import threading

import jax
import jax.numpy as jnp
import pytest

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.decoding import layered
from tlinformer_jax.decoding.cache import init_cache
from tlinformer_jax.decoding.params import decoder_params
from tlinformer_jax.models.attention import choose_backend, head_multiple
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.parallel.mesh import device_kind, platform, target
from tlinformer_jax.training.step import DETERMINISTIC, compiler_options

HALF = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)


def test_outside_it_is_jax_own_device():
    assert (platform(), device_kind()) == (jax.default_backend(), jax.devices()[0].device_kind)


def test_tpu():
    with target("tpu", "TPU v5 lite"):
        assert (platform(), device_kind()) == ("tpu", "TPU v5 lite")
        assert choose_backend(HALF, None, with_lse=False) == "splash"
        assert ModelConfig().compute_dtype == jnp.bfloat16
        assert not ModelConfig().plan().scan_layers
        assert compiler_options(TrainConfig(deterministic=True)) is None, "a TPU repeats itself anyway"
    assert platform() == jax.default_backend()


def test_nvidia_gpu():
    with target("gpu", "NVIDIA H100 80GB HBM3"):
        assert choose_backend(HALF, None, with_lse=False) == "cudnn"
        assert head_multiple(jnp.bfloat16, "auto") == 8
        assert compiler_options(TrainConfig()) == {"xla_gpu_enable_triton_gemm": False}
        assert (
            compiler_options(TrainConfig(deterministic=True)) == {"xla_gpu_enable_triton_gemm": False} | DETERMINISTIC
        )
    with target("gpu", "AMD Instinct MI300X"):
        assert choose_backend(HALF, None, with_lse=False) == "xla"
        assert compiler_options(TrainConfig()) is None
        assert compiler_options(TrainConfig(deterministic=True)) == DETERMINISTIC


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_prompt_is_read_in_short_chunks_without_cudnn(backend, monkeypatch):
    """Plain products keep the scores of a chunk in memory: those of 4096 x 4096 rows would be 16 times as many."""
    config = ModelConfig(
        architecture="transformer", attention=backend, dtype="bfloat16", vocab_size=8, d_model=16, num_heads=2
    )
    model, rows, real = LanguageModel(config), set(), layered.attend_chunk

    def recorded(query, *rest):
        rows.add(query.shape[1])
        return real(query, *rest)

    monkeypatch.setattr(layered, "attend_chunk", recorded)
    number, prompt = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (4096,)))
    with target("gpu", "NVIDIA H100 80GB HBM3"):
        variables = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)), jax.random.key(0))
        typed = jax.eval_shape(lambda variables: model.apply(variables, method=model.parameters), variables)
        params = jax.eval_shape(functools.partial(decoder_params, config=config), typed)
        cache = jax.eval_shape(functools.partial(init_cache, config, 1, 4096))
        given = {"params": params, "cache": cache, "row": number, "prompt": prompt, "length": number}
        jax.eval_shape(functools.partial(layered.prefill, config=config), **given)
    assert rows == {1024}


def test_other_threads_keep_their_own():
    seen = []
    with target("tpu", "TPU v5 lite"):
        thread = threading.Thread(target=lambda: seen.append(platform()))
        thread.start()
        thread.join()
    assert seen == [jax.default_backend()]
