"""What `sweep --check` says of the points."""

import jax
import jax.numpy as jnp

from tests.support.commands import TEXT_FILE, command_line, run_line
from tlinformer_jax import build_model
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.listing import list_points
from tlinformer_jax.experiments.plan import Sweep, plan_points

LENGTH, BATCH, LAYERS, FEATURES = 64, 8, 2, 16
POINTS = {
    "plain": {},
    "wide": {"model.d_ff": 48, "train.steps": 20_000},
    "goal": {"train.steps": "500@0.99"},
    "epochs": {"train.steps": "2epochs"},
    "half": {"train.sampled_windows": 1},
    "unread": {"train.steps": "3epochs", "data.dataset": "text", "data.tokenizer": "bytes"},
}
# Updates and tokens. Two epochs of 100 samples are 25 updates of 8; of two windows, one is sampled.
EXPECTED = {
    "plain": ("40", f"{40 * BATCH * LENGTH:,}"),
    "wide": ("20,000", f"{20_000 * BATCH * LENGTH:,}"),
    "goal": ("500", f"{500 * BATCH * LENGTH:,}"),
    "epochs": ("25", f"{25 * BATCH * LENGTH:,}"),
    "half": ("40", f"{40 * BATCH * LENGTH // 2:,}"),
    "unread": ("3epochs", "unknown"),
}


def test_the_points_are_listed_with_updates_parameters_and_tokens(own_cache):
    base = default_config_dict()
    base.model.update(vocab_size=257, d_model=FEATURES, num_heads=2, num_blocks=1, hidden_depth=0, d_ff=24)
    base.model.update(history_window=32, generation_window=32)
    base.train.update(steps=40, batch_size=BATCH)
    base.data.update(dataset="recall", sequence_length=LENGTH, num_items=8, examples=100)
    base.data.update(train_files=str(TEXT_FILE), validation_files=str(TEXT_FILE))
    points = plan_points(Sweep(base, POINTS))
    params = build_model(points[0].config.model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    plain = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = {"wide": plain + LAYERS * 3 * FEATURES * (48 - 24)}
    _, head, *lines = list_points([[point] for point in points], base).splitlines()
    assert head.split() == ["point", "updates", "parameters", "tokens", "fields", "that", "it", "sets"]
    for number, (point, line) in enumerate(zip(points, lines, strict=True)):
        updates, tokens = EXPECTED[point.point]
        fields = [f"{name}={value}" for name, value in POINTS[point.point].items()]
        size = f"{sizes.get(point.point, plain):,}"
        assert line.split() == [str(number), f"{point.point}-seed0", updates, size, tokens, *fields]
        assert line.index(tokens) + len(tokens) == head.index("tokens") + len("tokens"), (
            "figures stand below each other"
        )


def test_fields_of_the_base_are_above_the_points():
    """Only those that differ from the defaults, without the seed, which the sweep sets, and those of every point."""
    base = default_config_dict()
    base.model.update(d_model=48, num_heads=4, hidden_depth=2, history_window=32)
    base.train.update(steps=40, seed=3)
    points = {"a": {"model.history_window": 8}, "b": {"model.history_window": 16, "train.steps": 9}}
    listed = list_points([plan_points(Sweep(base, points))], base).splitlines()
    assert listed[0] == "base: model.d_model=48 model.num_heads=4 train.steps=40"
    listed = list_points([plan_points(Sweep({}, points))], {}).splitlines()
    assert listed[0] == "base: all defaults"


def test_the_command_prints_the_table_and_writes_nothing(tmp_path):
    """It needs no accelerator: training may use those of this machine."""
    line, environment = command_line(
        "sweep", "--sweep=configs/sweep_windows.py:tiny", "--check", f"--out={tmp_path}/out"
    )
    done = run_line(line, environment | {"JAX_PLATFORMS": "tpu"})
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:3] == ["base:", "data.sequence_length=64", "model.d_ff=64"]
    assert [row[:3] for row in rows[2:]] == [
        [str(number), f"{name}-seed0", "40"] for number, name in enumerate(("8-24", "16-16", "24-8", "auto-16"))
    ]
    assert {row[4] for row in rows[2:]} == {"20,480"}  # 40 updates of 8 samples of 64
    assert list(tmp_path.iterdir()) == []


def test_with_together_a_number_is_what_point_takes():
    line, environment = command_line(
        "sweep", "--sweep=configs/sweep_recall.py:plus", "--seeds=0,1,2", "--together", "--check"
    )
    done = run_line(line, environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    names = [row[1] for row in rows if row[0] == "5"]
    assert names == [f"128-8-plus_tlin-4_lr0.003-seed{seed}" for seed in (0, 1, 2)]
