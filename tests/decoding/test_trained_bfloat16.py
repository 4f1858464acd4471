"""bfloat16 on a model that has learned real text: the decoder against the full forward pass."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from tests.support.commands import TEXT, command
from tlinformer_jax import build_model
from tlinformer_jax.config.run import load_config
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.training.checkpoint import restore_params
from tlinformer_jax.training.setup import build_run


def trained(workdir: pathlib.Path, architecture: str):
    """configs/tiny.py, half as wide, after 100 small steps: (config, variables, tokens of the text)."""
    result = command(
        "tlinformer_jax.main",
        "--config=configs/tiny.py",
        *TEXT,
        f"--config.model.architecture={architecture}",
        *("--config.train.steps=100", "--config.train.batch_size=2"),
        *("--config.model.d_model=48", "--config.model.num_heads=2"),
        "--config.train.eval_every=0",
        f"--workdir={workdir}",
    )
    assert result.returncode == 0, result.stderr
    config = load_config(workdir)
    run = build_run(config, load_tokenizer(workdir))
    _, params = restore_params(workdir, run.abstract_state.params)
    tokens = np.asarray(run.split("validation").tokens[: 2 * 420], np.int32)
    return config.model, {"params": jax.device_get(params)}, tokens


def decoded_logits(decoder: Decoder, tokens: np.ndarray, prompt: int, cache_dtype: str = "auto") -> np.ndarray:
    """Logits [rows, length - prompt, V] of rows whose first `prompt` tokens are prefilled, the rest fed one by one."""
    rows, total = tokens.shape
    cache = decoder.init_cache(rows, total, cache_dtype=cache_dtype)
    for row in range(rows):
        cache, _ = decoder.prefill(cache, row, tokens[row, :prompt])
    found = []
    for length in range(prompt, total):
        if decoder.config.windowed and history_of(decoder.config, length + 1) > history_of(decoder.config, length):
            for row in range(rows):
                cache = decoder.slide(cache, row, length)
        cache, logits = decoder.step(cache, tokens[:, length], np.ones(rows, bool))
        found.append(np.asarray(logits))
    return np.stack(found, axis=1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_decoder_takes_the_same_top_token_in_bfloat16(tmp_path, architecture):
    """On at least 99% of the positions whose two largest float32 logits are more than 0.05 apart."""
    config, variables, tokens = trained(tmp_path, architecture)
    half = dataclasses.replace(config, dtype="bfloat16")
    logits = [jax.jit(build_model(each).apply) for each in (config, half)]
    decoder = Decoder(build_model(half), variables)
    sequences = tokens.reshape(2, -1)
    exact, full = (np.asarray(function(variables, sequences))[:, 100:] for function in logits)
    decoded = decoded_logits(decoder, sequences, 100)
    second, first = np.moveaxis(np.sort(exact, axis=-1)[..., -2:], -1, 0)
    margin = first - second > 0.05
    clear = margin.sum()
    agree = (decoded.argmax(-1) == full.argmax(-1))[margin].sum()
    print(f"{architecture}: same top token at {agree} of {clear} positions")
    assert clear > 500
    assert agree >= 0.99 * clear
