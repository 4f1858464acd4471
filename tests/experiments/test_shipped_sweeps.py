"""The sweeps of configs/: what they hold, and that they compare models on equal terms."""

import collections
import dataclasses
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest

from tlinformer_jax import build_model
from tlinformer_jax.analysis.flops import active_parameters
from tlinformer_jax.config.model import ARCHITECTURES
from tlinformer_jax.config.named import load_python
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.actions import checked_actions
from tlinformer_jax.experiments.plan import (
    check_data,
    check_together,
    chosen_points,
    load_sweep,
    plan_points,
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def depth(point) -> int:
    return point.config.model.num_layers


def test_the_shipped_sweeps_hold_what_they_promise():
    full = plan_points(load_sweep(f"{CONFIGS}/sweep_windows.py"))
    shares = {
        round(int(point.config.model.history_window) / sum(windows(point)), 3)
        for point in full
        if point.config.model.history_window != "auto"
    }
    assert {0.382, 0.5, 0.618} <= shares
    for name in ("history_window", "generation_window"):
        assert {64, 128, 256, 512, 1024} <= {getattr(point.config.model, name) for point in full}
    assert {(point.config.model.num_blocks, point.config.model.hidden_depth) for point in full} == {
        (2, 2),
        (4, 0),
        (1, 6),
    }
    assert {depth(point) for point in full} == {8}
    assert "auto-256-seed0" in [point.name for point in full]
    assert len(plan_points(load_sweep(f"{CONFIGS}/sweep_windows.py:knee"))) >= 9
    for point in full:
        train, length = point.config.train, point.config.data.sequence_length
        assert length == 1024
        assert train.batch_size * length == 131_072
        assert 30e6 <= train.steps * 131_072 < 30e6 + 131_072
        assert train.warmup_steps < train.steps / 5


def windows(point) -> tuple[int, int]:
    return int(point.config.model.history_window), point.config.model.generation_window


def test_the_architectures_are_compared_on_equal_terms():
    points = plan_points(load_sweep(f"{CONFIGS}/sweep_architectures.py"))
    seeds = {
        name: [point.config.train.seed for point in points if point.point == name] for name in ("base-1k", "1k-512-0.5")
    }
    assert seeds == {"base-1k": [0, 1, 2], "1k-512-0.5": [0, 1, 2]}
    for length in (512, 1024):
        there = {p.config.model.architecture for p in points if p.config.data.sequence_length == length}
        assert there == {"transformer", "tlinformer", "tconstformer", "sliding_window"}
    (batch,) = {point.config.train.batch_size * point.config.data.sequence_length for point in points}
    assert batch == 131_072
    assert len({(point.config.train.steps, point.config.model.dropout, depth(point)) for point in points}) == 1
    assert len(plan_points(load_sweep(f"{CONFIGS}/sweep_architectures.py:base-1k"))) == 3
    (longer,) = plan_points(load_sweep(f"{CONFIGS}/sweep_architectures.py:4k-512-0.5"))
    assert longer.name == "4k-512-0.5-seed0"
    assert (longer.config.data.sequence_length, longer.config.train.batch_size) == (4096, 32)
    assert longer.config.train.steps == points[0].config.train.steps
    with pytest.raises(UserError, match="variant = 'huge': must be base-N or N-T-r"):
        load_sweep(f"{CONFIGS}/sweep_architectures.py:huge")


def test_the_options_are_compared_on_equal_terms():
    points = plan_points(load_sweep(f"{CONFIGS}/sweep_options.py"))
    configs = [point.config for point in points]
    assert {config.train.batch_size * config.data.sequence_length for config in configs} == {65_536}
    assert {(config.train.learning_rate, config.model.dropout) for config in configs} == {(1e-3, 0.0)}
    assert len({dataclasses.replace(config.train, seed=0, batch_size=64) for config in configs}) == 1
    assert collections.Counter(point.point for point in points) == {
        **dict.fromkeys(("books-plain", "books-plus", "books-base", "books-base-plus"), 3),
        **dict.fromkeys(("books-overlap-16", "books-wavelengths-64", "books-all-options"), 1),
        **dict.fromkeys(("books-overlap-32", "books-plus-taps"), 1),
        **dict.fromkeys(("books-sliding", "books-sliding-plus", "books-no-history"), 1),
    }
    options = {point.point: (point.config.model.token_shift, point.config.model.window_overlap) for point in points}
    assert options["books-plain"] == (False, 0)
    assert options["books-plus"] == options["books-base-plus"] == options["books-sliding-plus"] == (True, 0)
    assert options["books-all-options"] == (True, 16)
    (alone,) = (point.config for point in points if point.point == "books-no-history")
    assert (alone.model.architecture, alone.data.sequence_length) == ("transformer", 256)


def evidence(variant: str) -> list:
    return plan_points(load_sweep(f"{CONFIGS}/sweep_evidence.py:{variant}"))


def test_the_evidence_is_gathered_on_equal_terms():
    tokens = {"rates": 60e6, "books": 600e6, "long": 300e6, "8k": 200e6, "large": 300e6, "knee": 300e6, "gap": 200e6}
    for variant, wanted in tokens.items():
        points = evidence(variant)
        for point in points:
            train, model = point.config.train, point.config.model
            update = train.batch_size * point.config.data.sequence_length
            assert update == 65_536
            assert wanted <= train.steps * update < wanted + update
            assert (train.schedule, train.weight_decay, train.clip_norm) == ("wsd:0.2", 0.06, 1.0)
            assert model.dropout == (0.0 if "dropout0" in point.name or variant == "8k" else 0.1)
            # A cut run loses little, and the last evaluation before the rate falls is near the fall.
            assert train.checkpoint_every == train.eval_every == train.warmup_steps == train.steps // 10
            plain = point.point.split("-lr")[0] in ("1k-base", "1k-tlin", "8k-200m-tlin")
            assert model.token_shift == (not model.recurrent and not plain)
        assert len({(depth(point), point.config.model.d_model) for point in points}) == 1
        sizes = [parameters(point.config.model) for point in points]
        assert sizes == pytest.approx([124e6 if variant == "large" else 41e6] * len(points), rel=0.01)
    for point in evidence("books") + evidence("long") + evidence("8k") + evidence("gap"):
        assert ("history" in point.then) == (point.config.data.sequence_length != 256)
        assert "evaluate" in point.then
    with pytest.raises(UserError, match="variant = 'huge': must be one of rates, books, long, 8k, large"):
        evidence("huge")


def test_every_model_of_the_evidence_has_its_own_rate():
    """Most are equal, so each gets another one here."""
    module = runpy.run_path(f"{CONFIGS}/sweep_evidence.py")
    rates = module["RATES"]
    rates.update({name: 1e-4 * number for number, name in enumerate(rates, 1)})
    used = set()
    for variant in ("books", "long", "large", "knee"):
        for point in plan_points(module["get_sweep"](variant)):
            model = re.sub("^(1k|8k)-|-dropout0$|-1024$", "", point.point)
            model = "causal-plus" if variant == "knee" else model
            assert point.config.train.learning_rate == rates[model]
            used.add(model)
    assert used == set(rates)


def test_the_evidence_holds_what_it_promises():
    books = collections.Counter(point.point.removeprefix("1k-") for point in evidence("books"))
    single = ("base", "tlin", "tconst-plus", "sliding-plus", "delta", "hybrid", "no-history")
    assert books == dict.fromkeys(("base-plus", "plus", "causal-plus"), 3) | dict.fromkeys(single, 1) | {
        "base-plus-dropout0": 1,
        "plus-dropout0": 1,
    }
    (alone,) = (point.config for point in evidence("books") if "no-history" in point.name)
    assert (alone.model.architecture, alone.data.sequence_length) == ("transformer", 256)
    trials = evidence("rates")
    for job in range(7):
        mine = [point.config for point in chosen_points(trials, job, 7)]
        assert [config.train.learning_rate for config in mine] == [3e-4, 6e-4, 1e-3, 2e-3]
        assert len({dataclasses.replace(config, train=mine[0].train) for config in mine}) == 1
    assert not any(point.then for point in trials)  # what chooses the rates does not see the test split
    assert {p.config.model.architecture for p in trials} == set(ARCHITECTURES)
    long = {point.point: (windows(point), point.then) for point in evidence("long")}
    assert [point.point for point in evidence("books")[:15]] == [
        *("1k-base", *["1k-base-plus"] * 3, "1k-tlin", *["1k-plus"] * 3, "1k-tconst-plus", "1k-sliding-plus"),
        *("1k-delta", "1k-hybrid", "1k-no-history", "1k-base-plus-dropout0", "1k-plus-dropout0"),
    ]  # records name a point by its number
    assert (
        long["8k-plus-1024"] == long["8k-causal-plus-1024"] == ((1024, 1024), ("evaluate", "evaluate@65536", "history"))
    )
    assert {name for name in long if long[name][0] == (256, 256)} == {
        f"8k-{name}" for name in ("base-plus", "plus", "sliding-plus", "delta", "causal-plus")
    }
    shape = load_python("large:125m", "--config", "get_config").model
    for point in evidence("large"):
        model = point.config.model
        fields = ("vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth", "history_window")
        assert [getattr(model, field) for field in fields] == [shape[field] for field in fields]
        assert point.config.data.sequence_length == 2048
    knee = evidence("knee")
    assert [windows(point) for point in knee] == [(size, 512 - size) for size in (64, 128, 256, 384, 448)]
    assert {point.study for point in knee} == {"windows"}
    assert all(point.config.model.causal_history for point in knee)
    gap = {point.point.removeprefix("gap-"): point.config.model for point in evidence("gap")}
    assert set(gap) == {"base-plus", "plus", "causal-plus", "sliding-plus", "no-history", "causal-plus-512"}
    assert dataclasses.replace(gap["causal-plus"], causal_history=False) == gap["plus"]
    assert dataclasses.replace(gap["causal-plus-512"], history_window=256) == gap["causal-plus"]
    assert {point.config.model.architecture for point in evidence("tiny")} == {"transformer", "tlinformer"}


def test_each_architecture_gets_three_rates_and_a_job_of_its_own():
    points = plan_points(load_sweep(f"{CONFIGS}/sweep_options.py:rates"))
    for job in range(4):
        mine = [point.config for point in chosen_points(points, job, 4)]
        assert len({dataclasses.replace(config.train, learning_rate=0.0) for config in mine}) == 1
        assert len({(config.model, config.data) for config in mine}) == 1
        assert len({config.train.learning_rate for config in mine}) == 3
    with pytest.raises(UserError, match="variant = 'huge': must be one of all, rates"):
        load_sweep(f"{CONFIGS}/sweep_options.py:huge")


def test_recall_with_the_shift_has_every_setting_and_stages_that_seeds_can_share():
    points = plan_points(load_sweep(f"{CONFIGS}/sweep_recall.py:plus"))
    shifted = [point for point in points if point.config.model.token_shift]
    assert len(shifted) == 36
    assert all("-plus_" in point.name for point in shifted)
    assert {p.name for p in points if p.config.data.curriculum} == {
        f"{setting}_{model}-4_lr0.003-seed0"
        for setting in ("128-8-grown-plus", "256-16-grown-plus")
        for model in ("attention", "tlin", "tconst", "sliding")
    } | {f"{setting}_tlin-4_lr0.003-seed0" for setting in ("128-8-grown-plain", "256-16-grown-plain")}
    causal = plan_points(load_sweep(f"{CONFIGS}/sweep_recall.py:plus-causal"))
    assert [point.name.replace("_causal-", "_tlin-") for point in causal] == [
        point.name for point in shifted if "_tlin-" in point.name
    ]
    assert all(point.config.model.causal_history for point in causal)
    for point in points + causal + plan_points(load_sweep(f"{CONFIGS}/sweep_recall.py:plus-grown")):
        check_together(point.config)


def test_what_is_compared_has_as_many_parameters_the_same_recipe_and_neighbours_tokens():
    books, experts = (
        plan_points(load_sweep(f"{CONFIGS}/sweep_comparators.py:{name}")) for name in ("books", "experts")
    )
    assert len({(point.config.train, point.config.data, point.config.model.dropout) for point in books + experts}) == 1
    for point in plan_points(load_sweep(f"{CONFIGS}/sweep_comparators.py:passkey")) + books + experts:
        model = point.config.model
        assert model.token_shift != model.recurrent  # whose short convolution it stands for
    sizes = {point.point: (parameters(point.config.model), active_parameters(point.config.model)) for point in books}
    assert set(sizes) == {"base-1k-plus", "1k-512-0.5-plus", "sliding-1k-512-plus", "delta-1k", "hybrid-1k"}
    for total, active in sizes.values():
        assert total == active == pytest.approx(41e6, rel=0.01)
    routers = 8 * 432 * 8
    for point in experts:
        total, active = parameters(point.config.model), active_parameters(point.config.model)
        dense, kind = sizes[point.point.rpartition("-")[0]][0], point.point.rpartition("-")[2]
        added = 8 * 3 * 432 * (5120 - 1280)
        expected = {"moe": (dense + added + routers, dense + routers), "wide": (dense + added, dense + added)}
        assert (total, active) == expected[kind]


def parameters(config) -> int:
    params = jax.eval_shape(build_model(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("where", "points", "architectures"),
    [
        ("sweep_recall.py", 243, 4),
        ("sweep_recall.py:512-64-tight", 27, 4),
        ("sweep_recall.py:seeds", 24, 4),
        ("sweep_recall.py:plus", 45, 4),
        ("sweep_recall.py:plus-grown", 4, 1),
        ("sweep_recall.py:plus-causal", 9, 1),
        ("sweep_recall.py:causal", 9, 1),
        ("sweep_recall.py:tiny", 2, 2),
        ("sweep_copy.py", 72, 4),
        ("sweep_comparators.py:recall", 18, 2),
        ("sweep_comparators.py:passkey", 12, 4),
        ("sweep_comparators.py:tiny", 6, 4),
        ("sweep_capacity.py", 175, 3),
        ("sweep_capacity.py:pairs", 105, 3),
        ("sweep_capacity.py:rows", 80, 2),
        ("sweep_capacity.py:tiny", 3, 1),
        ("sweep_state.py", 80, 4),
        ("sweep_state.py:s5-64", 20, 4),
        ("sweep_state.py:causal", 5, 1),
        ("sweep_state.py:tiny", 2, 2),
        ("sweep_niah.py", 48, 4),
        ("sweep_niah.py:16k", 48, 4),
        ("sweep_niah.py:s1-1k", 12, 4),
        ("sweep_niah.py:1k-plus-causal", 12, 1),
        ("sweep_niah.py:tiny", 2, 2),
        ("sweep_passkey.py", 12, 4),
        ("sweep_passkey.py:tlin", 3, 1),
        ("sweep_passkey.py:plus", 23, 2),
        ("sweep_passkey.py:tiny", 2, 2),
    ],
)
def test_sweeps_of_retrieval(where, points, architectures):
    sweep = load_sweep(f"{CONFIGS}/{where}")
    planned = plan_points(sweep)
    assert len(planned) == len({repr(point.config) for point in planned}) == points
    assert len({point.config.model.architecture for point in planned}) == architectures
    assert checked_actions(sweep.then) == tuple(sweep.then)
    depths = {(p.config.model.architecture, p.config.model.num_layers) for p in planned}
    assert len({layers for _, layers in depths}) <= 3
    if "passkey" not in where and ("niah" not in where or ":s1" in where):  # which need books
        check_data(planned)


def test_capacity_varies_one_size_alone_and_names_no_point_as_another_sweep_does():
    planned = plan_points(load_sweep(f"{CONFIGS}/sweep_capacity.py"))
    sizes = {(p.config.data.num_items, p.config.model.history_window) for p in planned}
    assert sizes == {(2**n, 32) for n in range(2, 9)} | {(64, 2**n) for n in range(8)}
    rest = {
        (
            dataclasses.replace(p.config.data, num_items=1),
            dataclasses.replace(p.config.model, history_window=1, architecture="tlinformer"),
            dataclasses.replace(p.config.train, seed=0),
        )
        for p in planned
    }
    assert len(rest) == 1
    others = plan_points(load_sweep(f"{CONFIGS}/sweep_recall.py"))
    assert not {p.name for p in planned} & {p.name for p in others}
    assert next(p for p in planned if p.config.data.num_items == 4).name.startswith("pairs4-rows32_")


@pytest.mark.parametrize(
    ("sweep", "allowed"),
    [
        ("recall:9-9", "all, seeds, plus, plus-grown, plus-causal, causal, tiny, 64-4, 128-8"),
        ("niah:s1-wrong", "1k, 4k, "),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_with_the_sweeps_own_variants(sweep, allowed):
    name, _, variant = sweep.partition(":")
    with pytest.raises(UserError, match=f"variant = '{variant}': must be one of {allowed}"):
        load_sweep(f"{CONFIGS}/sweep_{name}.py:{variant}")
