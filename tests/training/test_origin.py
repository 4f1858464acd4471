"""--init_from: a new run from another's parameters, and whatever does not fit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.support.commands import check_refusal, in_fork
from tests.training.test_resume import events, run_config
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.models import build_model
from tlinformer_jax.training import loop, setup
from tlinformer_jax.training.checkpoint import restore_params
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.saving import Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A configuration and the directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("origin")
    config = run_config(folder, steps=2, eval_every=0, checkpoint_every=0)
    train_and_evaluate(config, folder / "run")
    return config, folder / "run"


def other_run(config):
    """Fine-tuning on longer sequences with other windows."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, history_window=3, generation_window=5),
        data=dataclasses.replace(config.data, sequence_length=12),
        train=dataclasses.replace(config.train, steps=4, checkpoint_every=3, log_every=1, seed=5, keep_checkpoints=9),
    )


def crash(*_, **__):
    raise RuntimeError("crash")


def test_a_new_run_starts_from_the_parameters_and_needs_neither_flag_nor_origin_again(trained, tmp_path, monkeypatch):
    config, source = trained
    here, again = tmp_path / "here", tmp_path / "again"
    shutil.copytree(source, tmp_path / "source")
    config = other_run(config)
    train_and_evaluate(config, here, init_from=tmp_path / "source")

    run = setup.build_run(config, ByteTokenizer())
    _, params = restore_params(source, run.abstract_state.params)
    (here / "checkpoints" / "3").rename(tmp_path / "3")
    (here / "checkpoints" / "4").rename(tmp_path / "4")
    with Checkpoints(here, 9) as checkpoints:
        start, _ = checkpoints.restore(run.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, start.params, params)
    fresh = run.initial_state()
    jax.tree.map(np.testing.assert_array_equal, start.replace(params=0), fresh.replace(params=0))
    assert [event["step"] for event in events(here)] == [1, 2, 3, 4, 4]

    # Crashed after step 0 was saved, the origin gone: the same command without the flag goes on.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_steps", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train_and_evaluate(config, again, init_from=tmp_path / "source")
    (tmp_path / "source").rename(tmp_path / "gone")
    train_and_evaluate(config, again)
    assert events(again) == events(here)


@pytest.mark.slow
def test_a_crash_before_step_0_was_saved_goes_on_from_the_same_step_of_the_origin(trained, tmp_path, monkeypatch):
    config, source = trained
    shutil.copytree(source, tmp_path / "source")
    config = other_run(config)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train_and_evaluate(config, tmp_path / "here", init_from=tmp_path / "source")
    assert not list((tmp_path / "here" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "here" / "init_from.json").read_text()) == {
        "workdir": str(tmp_path / "source"),
        "step": 2,
    }
    # The other run has gone on meanwhile.
    more = dataclasses.replace(trained[0], train=dataclasses.replace(trained[0].train, steps=3))
    train_and_evaluate(more, tmp_path / "source")
    train_and_evaluate(config, tmp_path / "here")
    train_and_evaluate(config, tmp_path / "straight", init_from=source)
    assert events(tmp_path / "here") == events(tmp_path / "straight")


def test_what_does_not_fit_is_refused_in_a_line(trained, tmp_path):
    config, source = trained
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300, d_ff=24))
    message = (
        r"init_from = .*: parameter blocks_0/compress/down_kernel is \[32, 16\] there and \[24, 16\] here; "
        r"must agree in model\.vocab_size: 257 -> 300, model\.d_ff: 32 -> 24$"
    )
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(wider, tmp_path / "run", init_from=source)
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, num_blocks=2))
    with pytest.raises(ConfigError, match=r"parameter blocks_1/\S+ is missing there and .*model\.num_blocks: 1 -> 2"):
        train_and_evaluate(deeper, tmp_path / "run", init_from=source)
    with pytest.raises(DataError, match=r"nothing: no readable config.json"):
        train_and_evaluate(config, tmp_path / "run", init_from=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="must not be workdir itself"):
        train_and_evaluate(config, tmp_path / "run", init_from=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # A directory that holds a run from scratch, and one that came from elsewhere.
    shutil.copytree(source, tmp_path / "scratch")
    with pytest.raises(ConfigError, match=r"needs a new workdir; .*scratch holds a run that began from scratch"):
        train_and_evaluate(config, tmp_path / "scratch", init_from=source)
    (tmp_path / "scratch" / "init_from.json").write_text(json.dumps({"workdir": "/elsewhere", "step": 4}))
    with pytest.raises(ConfigError, match=r"must be /elsewhere, from which the run in .*scratch started"):
        train_and_evaluate(config, tmp_path / "scratch", init_from=source)
    (tmp_path / "scratch" / "init_from.json").write_text("{")
    with pytest.raises(DataError, match=r"init_from.json: cannot be read, or is damaged"):
        train_and_evaluate(config, tmp_path / "scratch")


def first_logits(config, params):
    """Logits of the first generation window."""
    tokens = np.random.default_rng(1).integers(0, 257, (2, config.model.generation_window)).astype(np.int32)
    return build_model(config.model).apply({"params": jax.device_get(params)}, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "blocks", "shift"),
    [("transformer", 1, True), ("tconstformer", 2, False)],
)
def test_another_architecture_of_equal_layers_starts_with_the_same_first_window(
    architecture, blocks, shift, tmp_path, capfd
):
    """Four layers here and there: of the one block with two hidden layers, or of two without; and back again."""
    config = run_config(tmp_path, steps=2, eval_every=0, checkpoint_every=0, keep_checkpoints=9)
    one = dataclasses.replace(config.model, architecture=architecture, num_blocks=blocks, hidden_depth=4 // blocks - 2)
    other = dataclasses.replace(config.model, num_blocks=2, token_shift=shift, key_taps=2 * shift)
    if shift:
        run = setup.build_run(dataclasses.replace(config, model=other), ByteTokenizer())
        assert not np.asarray(run.initial_state().params["shift"]).any()
    previous, logits = None, None
    for number, model in enumerate((one, other, *(() if shift else (one,)))):
        own, here = dataclasses.replace(config, model=model), tmp_path / str(number)
        train_and_evaluate(own, here, init_from=previous)
        run = setup.build_run(own, ByteTokenizer())
        if previous is not None:
            start = restore_params(here, run.abstract_state.params, 0)[1]
            np.testing.assert_allclose(first_logits(own, start), logits, atol=2e-7, rtol=0)  # two programs round
        logits, previous = first_logits(own, restore_params(here, run.abstract_state.params)[1]), here
    if architecture == "transformer":
        mapped = "layers_0 -> blocks_0/compress, layers_1 -> blocks_0/restore, layers_2 -> blocks_1/compress, "
        assert f"init_from: layers there -> here: {mapped}" in capfd.readouterr().err


def test_other_numbers_of_layers_are_refused(trained, tmp_path):
    config, source = trained
    model = dataclasses.replace(config.model, architecture="transformer", hidden_depth=1)
    with pytest.raises(
        ConfigError, match=r"layers_2/\S+ is missing there .*must agree in model\.hidden_depth: 0 -> 1$"
    ):
        train_and_evaluate(dataclasses.replace(config, model=model), tmp_path / "run", init_from=source)


def test_the_command_refuses_it_before_anything_is_written(trained, tmp_path):
    arguments = ("--config=configs/tiny.py", f"--init_from={trained[1]}")
    message = f"init_from = '{trained[1]}': parameter blocks_0/compress/"
    check_refusal(in_fork("tlinformer_jax.main", *arguments, "--check"), message)


def test_layers_of_another_kind_are_refused(trained, tmp_path):
    config, source = trained
    model = dataclasses.replace(config.model, architecture="gated_deltanet")
    message = r"/A_log is missing there .*must agree in model\.architecture: 'tlinformer' -> 'gated_deltanet'$"
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(dataclasses.replace(config, model=model), tmp_path / "run", init_from=source)
