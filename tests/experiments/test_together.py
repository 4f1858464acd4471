"""Runs that one program trains: each is what it would be alone."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.commands import TEXT_FILE, check_refusal, command
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import RunConfig, run_config
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments import together
from tlinformer_jax.experiments.job import Job, finished_result
from tlinformer_jax.experiments.plan import groups_of
from tlinformer_jax.experiments.together import train_together
from tlinformer_jax.models import build_model
from tlinformer_jax.training.loop import train_run

MODEL = {"vocab_size": 64, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
MODEL |= {"history_window": 4, "generation_window": 4, "dtype": "float32", "token_shift": True, "window_overlap": 1}
TRAIN = {"steps": 6, "batch_size": 8, "eval_every": 3, "warmup_steps": 2, "weight_decay": 0.1, "clip_norm": 0.1}
DATA = {"dataset": "recall", "tokenizer": "numbers:64", "sequence_length": 16, "num_items": 2}
DATA |= {"examples": 200, "curriculum": "8:2"}


def config(**changes) -> RunConfig:
    sections = {"model": dict(MODEL), "train": dict(TRAIN), "data": dict(DATA)}
    for name, value in changes.items():
        section, field = name.split("__")
        sections[section][field] = value
    return run_config(sections)


def job(folder, seed: int, rate: float, **changes) -> Job:
    one = config(train__seed=seed, train__learning_rate=rate, **changes)
    return Job(f"{seed}-{rate}", one, folder / f"{seed}-{rate}", "command", study="retrieval")


@pytest.fixture
def trained(monkeypatch):
    """The last copies' parameters as `train_together` has them."""
    kept: list = []
    real = together._trained
    monkeypatch.setattr(together, "_trained", lambda *given: kept.append(real(*given)) or kept[-1])
    return kept


@pytest.mark.slow
def test_each_is_what_it_would_be_alone(tmp_path, trained):
    """Seeds, learning rates, stages, warm-up, decay and clipping are each run's own."""
    jobs = [job(tmp_path, seed, rate) for seed, rate in ((0, 1e-2), (3, 1e-2), (0, 3e-2))]
    records = train_together(jobs)
    copies = trained[-1][0]
    for number, (one, record) in enumerate(zip(jobs, records)):
        if number == 1:  # which shares its rate with the first and nothing with the third
            continue
        alone = train_run(one.config, tmp_path / f"alone-{number}")
        params = jax.tree.map(lambda leaf, number=number: leaf[number], copies.params)
        # Adam scales tiny gradients up, so that rounding moves a parameter by 1e-4 on some processors. A wrong rate or
        # stage moves it by 1e-2.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, alone.params)
        assert record["validation"] == pytest.approx(alone.figures, abs=1e-4)
        assert [step for step, *_ in record["history"]] == [3, 6]
        assert (record["seed"], record["steps"], record["together"]) == (one.config.train.seed, 6, 3)
        assert run_config(record["config"]) == one.config
        assert finished_result(one) == json.loads(json.dumps(record))
    assert len({record["validation"]["loss"] for record in records}) == 3


@pytest.mark.slow
def test_runs_on_a_text_are_what_they_would_be_alone(tmp_path, trained):
    text = {"data__dataset": "text", "data__tokenizer": "bytes", "data__curriculum": "", "model__vocab_size": 257}
    text |= {"data__train_files": str(TEXT_FILE), "data__validation_files": str(TEXT_FILE)}
    jobs = [job(tmp_path, seed, rate, **text) for seed, rate in ((0, 1e-2), (3, 3e-2))]
    records = train_together(jobs)
    alone = train_run(jobs[1].config, tmp_path / "alone")
    params = jax.tree.map(lambda leaf: leaf[1], trained[-1][0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, alone.params)
    assert records[1]["validation"] == pytest.approx(alone.figures, rel=1e-4)
    assert records[0]["validation"]["loss"] != records[1]["validation"]["loss"]
    assert finished_result(jobs[1])["steps"] == 6, "no copy has a goal that would end it"


@pytest.mark.slow
def test_a_run_that_has_reached_its_goal_keeps_its_parameters(tmp_path, trained, monkeypatch):
    """The first reaches it at the first evaluation; the second never, and goes on to the end."""
    real = together._evaluated

    def with_accuracy(*given):
        return [figures | {"accuracy": accuracy} for figures, accuracy in zip(real(*given), (0.9, 0.1))]

    monkeypatch.setattr(together, "_evaluated", with_accuracy)
    goal = {"train__steps": "6@0.5", "data__curriculum": ""}
    first, second = train_together([job(tmp_path, seed, 1e-2, **goal) for seed in (0, 1)])
    assert (first["steps"], second["steps"]) == (3, 6)
    assert [step for step, *_ in first["history"]] == [3]
    assert first["target"]["reached"]
    assert not second["target"]["reached"]
    copies = trained[-1][0]
    ended, last = (jax.tree.leaves(tree)[0] for tree in (copies.ended, copies.params))
    assert np.abs(ended[0] - last[0]).max() > 1e-4, "it was trained on, to no effect"
    np.testing.assert_array_equal(ended[1], last[1])


@pytest.mark.slow
def test_the_speed_is_without_compilation(tmp_path, monkeypatch):
    """Both lengths of the curriculum are compiled, each for two seconds more: 6 updates of 128 tokens in 4 seconds."""
    real = together.update_copies

    def slowly_traced(*given, **fields):
        time.sleep(2)
        return real(*given, **fields)

    monkeypatch.setattr(together, "update_copies", slowly_traced)
    record, _ = train_together([job(tmp_path, seed, 1e-2, train__eval_every=0) for seed in (0, 1)])
    assert record["speed"]["tokens_per_second"] > 6 * 128 / 4
    record, _ = train_together(
        [job(tmp_path / "one", seed, 1e-2, train__steps=1, data__curriculum="") for seed in (0, 1)]
    )
    assert record["speed"] == {"tokens_per_second": None}


@pytest.mark.slow
def test_a_run_whose_loss_is_not_finite_harms_no_other(tmp_path, trained):
    whole = {"data__curriculum": ""}
    one = train_together([job(tmp_path / "a", seed, 1e-2, **whole) for seed in (0, 1)])[0]
    bad = dataclasses.replace(
        config(**whole), train=dataclasses.replace(config(**whole).train, learning_rate=1e30, seed=1)
    )
    beside = Job("bad", bad, tmp_path / "b" / "bad", "command", study="retrieval")
    again = train_together([job(tmp_path / "b", 0, 1e-2, **whole), beside])[0]
    assert again["validation"]["loss"] == one["validation"]["loss"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained[-1][0].params)), "a bad update was made"
    losses = [np.abs(leaf[1]).max() for leaf in jax.tree.leaves(trained[-1][0].params)]
    assert max(losses) > 1e20, "no update was bad"


def test_groups_differ_in_seed_and_rate_alone(tmp_path):
    jobs = [job(tmp_path, 0, 1e-2), job(tmp_path, 0, 1e-2, train__steps=7), job(tmp_path, 1, 3e-2)]
    assert [[one.name for one in group] for group in groups_of(jobs)] == [["0-0.01", "1-0.03"], ["0-0.01"]]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data__curriculum": "8:2@0.5"}, "data.curriculum"),
        ({"model__dropout": 0.1}, "model.dropout"),
        ({"train__sampled_windows": 1}, "train.sampled_windows"),
        ({"train__accumulation": 2}, "train.accumulation"),
        ({"train__max_skipped_updates": 1}, "train.max_skipped_updates"),
        ({"train__eval_every": "epoch"}, "train.steps"),
    ],
)
def test_what_runs_cannot_have_together_is_refused(tmp_path, changes, field):
    with pytest.raises(ConfigError, match=field):
        train_together([job(tmp_path, seed, 1e-2, **changes) for seed in (0, 1)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_groups_in_processes_of_their_own(tmp_path):
    """Two programs for three points of two seeds. A job of an array takes whole groups. Refusals come first."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    asked = ("sweep", f"--sweep={tmp_path}/sweep.py", f"--out={tmp_path}/out", "--together", "--seeds=0,1")
    done = command(*asked, "--point=1", "--points=2")
    assert done.returncode == 0, done.stderr
    assert "point 1 of 1, other-seed0 and 1 more: starting" in done.stderr
    assert sorted(path.parent.name for path in tmp_path.glob("out/*/result.json")) == ["other-seed0", "other-seed1"]
    done = command(*asked)
    assert done.returncode == 0, done.stderr
    assert "point 1 of 2, one-seed0 and 3 more: starting" in done.stderr
    assert "point 2 of 2, other-seed0 and 1 more: already finished" in done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/result.json")]
    assert sorted(record["together"] for record in records) == [2, 2, 4, 4, 4, 4]
    assert all("evaluate" in record["then"] for record in records)
    refused = command(*asked, "--config.model.dropout=0.1")
    check_refusal(refused, "point one-seed0: model.dropout = 0.1: must be 0 for --together")


SWEEP = f"""
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.plan import Sweep

def get_sweep():
    base = default_config_dict()
    base.model.update({MODEL})
    base.train.update({TRAIN})
    base.data.update({DATA | {"curriculum": ""}})
    points = {{"one": {{}}, "two": {{"train.learning_rate": 0.01}}, "other": {{"train.steps": 3}}}}
    return Sweep(base, points, study="retrieval")
"""


@pytest.mark.parametrize("architecture", ["transformer", "gated_deltanet"])
def test_a_copys_matrices_get_their_gradients_from_sums_over_one_axis(architecture):
    """Over batch and length apart, XLA would write the operands of these products a second time, transposed."""
    fields = {"token_shift": False, "window_overlap": 0, "architecture": architecture}
    model = build_model(ModelConfig(**MODEL | fields))
    batch, length, copies = 3, 5, 2
    tokens = jnp.zeros((copies, batch, length), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(model.apply({"params": params}, tokens, method=model.hidden_states))

    keys = jax.random.split(jax.random.key(0), copies)
    params = jax.vmap(lambda key: model.init(key, tokens[0])["params"])(keys)
    sums = [tuple(sizes) for sizes in summed_axes(jax.make_jaxpr(jax.vmap(jax.grad(loss)))(params, tokens).jaxpr)]
    assert (batch * length,) in sums
    assert (batch, length) not in sums


def summed_axes(jaxpr):
    """Yields the sizes of the axes over which each product of a program sums."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            axes, _ = equation.params["dimension_numbers"][0]
            yield [equation.invars[0].aval.shape[axis] for axis in axes]
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from summed_axes(inner)
