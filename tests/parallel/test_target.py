"""What depends on the kind of device follows the target that a program is traced for."""

import threading

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import TrainConfig
from tlinformer_jax.models.attention import choose_backend, head_multiple
from tlinformer_jax.parallel.mesh import device_kind, platform, target
from tlinformer_jax.training.step import DETERMINISTIC, compiler_options

HALF = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)


def test_outside_it_is_jax_own_device():
    assert (platform(), device_kind()) == (jax.default_backend(), jax.devices()[0].device_kind)


def test_tpu():
    with target("tpu", "TPU v5 lite"):
        assert (platform(), device_kind()) == ("tpu", "TPU v5 lite")
        assert choose_backend(HALF, None, return_lse=False) == "splash"
        assert ModelConfig().compute_dtype == jnp.bfloat16
        assert not ModelConfig().plan().scan_layers
        assert compiler_options(TrainConfig(deterministic=True)) is None, "a TPU repeats itself anyway"
    assert platform() == jax.default_backend()


def test_nvidia_gpu():
    with target("gpu", "NVIDIA H100 80GB HBM3"):
        assert choose_backend(HALF, None, return_lse=False) == "cudnn"
        assert head_multiple(jnp.bfloat16, "auto") == 8
        assert compiler_options(TrainConfig()) == {"xla_gpu_enable_triton_gemm": False}
        assert (
            compiler_options(TrainConfig(deterministic=True)) == {"xla_gpu_enable_triton_gemm": False} | DETERMINISTIC
        )
    with target("gpu", "AMD Instinct MI300X"):
        assert choose_backend(HALF, None, return_lse=False) == "xla"
        assert compiler_options(TrainConfig()) is None
        assert compiler_options(TrainConfig(deterministic=True)) == DETERMINISTIC


def test_other_threads_keep_their_own():
    seen = []
    with target("tpu", "TPU v5 lite"):
        thread = threading.Thread(target=lambda: seen.append(platform()))
        thread.start()
        thread.join()
    assert seen == [jax.default_backend()]
