"""generate --save: the images or sounds that prompt and continuation make."""

import json
import wave

import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.test_domains import pixels_of
from tests.decoding.test_generate_command import MODEL, run
from tests.support import golden
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import RunConfig, save_config
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.domains import mu_law
from tlinformer_jax.data.tokenizers import build_tokenizer, save_tokenizer
from tlinformer_jax.errors import UserError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.step import TrainState


def workdir(folder, dataset, tokenizer, length=16):
    """What a training run leaves behind."""
    data = DataConfig(dataset=dataset, tokenizer=tokenizer, train_files="/none", sequence_length=length)
    save_config(RunConfig(MODEL, TrainConfig(), data), folder)
    save_tokenizer(build_tokenizer(tokenizer), folder)
    params = params_from_reference(golden.random_weights(MODEL), MODEL)["params"]
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), params, {"count": jnp.int32(0)}))
    return f"--workdir={folder}"


DRAW = ("--temperature=1", "--nostop_at_end", "--json", "--num_samples=2")


def test_images_are_prompt_and_continuation_after_the_first_token(tmp_path, capsys):
    path = tmp_path / "drawn.png"
    arguments = (workdir(tmp_path, "idx", "ids:256"), "--prompt=0 200 100", "--max_new_tokens=14", f"--save={path}")
    status, out, _ = run(capsys, *arguments, *DRAW)
    assert status == 0
    page = pixels_of(path.read_bytes())
    for number, line in enumerate(out.splitlines()):
        pixels = np.minimum([200, 100, *json.loads(line)["tokens"]], 255)
        np.testing.assert_array_equal(page[:, 4 * number : 4 * number + 4], pixels.reshape(4, 4))


def test_sounds_are_prompt_and_continuation_without_the_ends(tmp_path, capsys):
    path = tmp_path / "heard.wav"
    arguments = (workdir(tmp_path, "wav", "ids:256"), "--prompt=128 9", "--max_new_tokens=30", f"--save={path}")
    status, out, _ = run(capsys, *arguments, *DRAW)
    assert status == 0
    silence = [128] * 2000
    drawn = [json.loads(line)["tokens"] for line in out.splitlines()]
    levels = [level for tokens in drawn for level in (128, 9, *(token for token in tokens if token < 256), *silence)]
    with wave.open(str(path)) as file:
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    np.testing.assert_array_equal(mu_law(heard), levels)


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (("fasta", "letters:ACGT"), "x.png", "works only for runs with data.dataset = 'idx' or 'wav', not 'fasta'"),
        (("idx", "ids:256"), "x.wav", "must end in .png for data.dataset = 'idx'"),
        (("wav", "ids:256"), "x.png", "must end in .wav for data.dataset = 'wav'"),
        (("idx", "ids:256", 20), "x.png", "needs square images, but data.sequence_length = 20"),
        (("idx", "ids:256"), "none/x.png", "must be a file that can be written (No such file or directory)"),
        (("idx", "ids:256"), "/proc/x.png", "must be a file that can be written ("),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_drawn(tmp_path, capsys, data, name, message):
    with pytest.raises(UserError) as caught:
        run(capsys, workdir(tmp_path, *data), "--prompt=A", f"--save={tmp_path / name}")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--save={tmp_path / name}: ")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / name).exists()
