"""The inference benchmark as a whole: its report and plots."""

import dataclasses
import functools
import json
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks import limits, parts, profiling, report, rows, runner
from benchmarks.plots import write_plots
from benchmarks.rows import Plan
from benchmarks.session import Session
from tests.support import commands, models
from tests.support.figures import check_lines
from tlinformer_jax import build_model
from tlinformer_jax.config.run import run_config, save_config
from tlinformer_jax.decoding.cache import init_cache
from tlinformer_jax.decoding.memory import tree_bytes

pytestmark = pytest.mark.usefixtures("one_measurement_of_the_device")
command = functools.partial(commands.command, "benchmarks.inference")
SMALL = dataclasses.replace(models.SMALL, num_blocks=1, hidden_depth=0, generation_window=8)
CONFIGS = [dataclasses.replace(SMALL, architecture=name) for name in ("tlinformer", "transformer")]
PLAN = Plan(
    lengths=((10, 1), (16, 1)),
    longest=(20,),
    parts=rows.PARTS,
    windows=2,
    seconds=0.02,
    max_uncached_length=10,
    max_quadratic_prefill=12,
    seed=0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_measurement_of_the_device) -> tuple[pathlib.Path, dict[str, Any]]:
    """A whole run at toy lengths: its folder, and inference.json."""
    folder = tmp_path_factory.mktemp("inference")
    runner.run_benchmark(PLAN, CONFIGS, out=folder, profile=folder / "traces")
    return folder, read(folder)


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The report; refuses NaN and infinities, which are no JSON."""
    return json.loads((folder / "inference.json").read_bytes().decode("ascii"), parse_constant=pytest.fail)


def row_of(values: dict[str, Any], architecture: str, length: int) -> dict[str, Any]:
    return next(row for row in values["rows"] if (row["architecture"], row["length"]) == (architecture, length))


def test_the_report_says_what_ran_where(finished):
    _, values = finished
    assert values["complete"] is True
    assert values["device"] == jax.devices()[0].device_kind
    assert values["jax"] == jax.__version__
    assert values["config"]["d_model"] == 16
    assert values["plan"]["lengths"] == [[10, 1], [16, 1]]
    assert values["ceilings"]["copy_bytes_per_second"] > 0
    assert values["weights"] == {"tlinformer": "random, seed 0", "transformer": "random, seed 0"}
    assert [(row["architecture"], row["length"], row["batch"]) for row in values["rows"]] == [
        (name, *place) for name in ("tlinformer", "transformer") for place in PLAN.lengths
    ]
    assert all("error" not in row for row in values["rows"])


def test_a_token_without_cache_is_not_timed_where_a_prefill_costs_too_much():
    plan = dataclasses.replace(PLAN, parts=("figure9",), max_uncached_length=100)
    decoder, _ = runner._decoder(CONFIGS[1], 0, None)
    ceilings = limits.Ceilings(1.0, 1.0, 1.0, 8)
    found = [rows.measure_row(plan, decoder, length, 1, ceilings, lambda row: None) for length in (10, 16)]
    assert ["uncached" in row for row in found] == [True, False]


def test_cache_bytes_are_the_arrays_and_equation_7(finished):
    _, values = finished
    for row in values["rows"]:
        config = dataclasses.replace(SMALL, architecture=row["architecture"])
        arrays = init_cache(config, row["batch"], row["capacity"])
        assert row["cache_bytes"] == tree_bytes(arrays)
        layers = 1 if config.windowed else 2
        assert row["equation_7_bytes"] == 2 * row["batch"] * row["length"] * 16 * 4 * layers
        # N = 10 stands in the window after 8 tokens, N = 16 at the beginning of the one after 16.
        history = row["length"] // 8 * 8 if config.windowed else row["length"]
        context = 6 if config.windowed else 0  # W_oh rows under `restore`
        assert row["used_bytes"] == row["batch"] * 2 * 16 * 4 * (layers * history + context)
    protocol = row_of(values, "tlinformer", 10)["figure9"]
    grown = [after - before for before, after in zip(protocol["token_used_bytes"], protocol["token_used_bytes"][1:])]
    assert grown == [2 * 2 * 16 * 4] * 5  # a row under each of two layers
    assert set(protocol["token_cache_bytes"]) == {row_of(values, "tlinformer", 10)["cache_bytes"]}


def test_an_int8_cache_is_measured_and_counted():
    """Prefilled, and of the Transformer above max_quadratic_prefill filled at random."""
    plan = dataclasses.replace(PLAN, parts=("sustained",), lengths=((16, 1),), cache_dtype="int8")
    values = runner.run_benchmark(plan, CONFIGS)
    for row, filled in zip(values["rows"], ("prefill", "random"), strict=True):
        config = dataclasses.replace(SMALL, architecture=row["architecture"])
        assert row["cache_bytes"] == tree_bytes(init_cache(config, 1, row["capacity"], cache_dtype="int8"))
        layers = 1 if config.windowed else 2
        assert row["equation_7_bytes"] == 2 * 16 * 16 * layers
        assert row["used_bytes"] == 2 * (16 + 2 * 2) * layers * 16 + 2 * 16 * 4 * 6 * config.windowed
        assert row["filled"] == filled
        assert row["sustained"]["seconds"] > 0


def test_every_row_has_its_parts_and_no_others(finished):
    _, values = finished
    found = {(row["architecture"], row["length"]): set(row["elapsed_seconds"]) for row in values["rows"]}
    common = {"windows", "sustained"}
    assert found == {
        ("tlinformer", 10): common | {"figure9", "prefill", "slide", "uncached"},
        ("tlinformer", 16): common | {"figure9", "prefill", "slide"},  # above max_uncached_length
        ("transformer", 10): common | {"figure9", "prefill", "uncached"},
        ("transformer", 16): common,  # above max_quadratic_prefill
    }
    batch: Any = SimpleNamespace(config=SMALL, batch=2, length=10)
    assert rows._parts_of(PLAN, batch) == ["prefill", "windows", "sustained", "slide"]  # Figure 9 is of one sequence
    assert [row["filled"] for row in values["rows"]] == ["prefill", "prefill", "prefill", "random"]


def test_figures_agree_with_each_other(finished):
    _, values = finished
    ceilings = limits.Ceilings(**values["ceilings"])
    for row in values["rows"]:
        for part in ("prefill", "sustained", "slide"):
            if part not in row:
                continue
            figures = row[part]
            by_bytes = figures["limit_bytes"] / max(ceilings.read_bytes_per_second, ceilings.copy_bytes_per_second)
            by_flops = figures["limit_flops"] / ceilings.matmul_flops_per_second
            assert figures["limit_seconds"] == pytest.approx(max(by_bytes, by_flops))
            assert figures["multiple"] == pytest.approx(figures["seconds"] / figures["limit_seconds"])
            assert 0 < figures["best_seconds"] <= figures["seconds"]
        sustained, windows = row["sustained"], row["windows"]
        assert sustained["tokens_per_second"] == pytest.approx(row["batch"] / sustained["seconds"])
        assert (sustained["steps"], sustained["history"]) == (
            8,
            row["length"] // 8 * 8 if "slide" in row else row["length"],
        )
        assert windows["tokens"] == 2 * 8 * row["batch"]
        assert windows["slides"] == (2 if "slide" in row else 0)
        assert windows["tokens_per_second"] == pytest.approx(windows["tokens"] / windows["seconds"])
        assert windows["seconds"] >= windows["limit_seconds"]
        assert row["memory"]["source"] == "live_arrays"  # the CPU counts no memory
        assert row["memory"]["peak_above_weights_bytes"] >= row["cache_bytes"]
        assert row["memory"]["exact"] is False
    slid = row_of(values, "tlinformer", 16)["slide"]
    assert (slid["history_before"], slid["history_after"]) == (16, 24)


def test_figure_9s_tokens_and_ratios(finished):
    _, values = finished
    model, baseline = (row_of(values, name, 10) for name in ("tlinformer", "transformer"))
    for row in (model, baseline):
        protocol = row["figure9"]
        assert len(protocol["token_seconds"]) == 6
        assert protocol["miss_seconds"] == protocol["token_seconds"][0]
        assert protocol["hit_seconds"] == protocol["token_seconds"][2]
        assert protocol["hit_token"] == 3
        without = row["uncached"]["seconds"]
        assert protocol["uncached_over_hit"] == pytest.approx(without / protocol["hit_seconds"])
        assert protocol["uncached_over_miss"] == pytest.approx(without / protocol["miss_seconds"])
    ratio = next(ratio for ratio in values["ratios"] if ratio["length"] == 10)
    assert ratio["miss"] == pytest.approx(baseline["figure9"]["miss_seconds"] / model["figure9"]["miss_seconds"])
    assert ratio["hit_sustained"] == pytest.approx(baseline["sustained"]["seconds"] / model["sustained"]["seconds"])
    other = next(ratio for ratio in values["ratios"] if ratio["length"] == 16)
    assert set(other) == {"length", "batch", "hit_sustained", "windows"}  # of what both have


def test_the_hit_is_a_token_that_did_not_slide():
    """A prompt that leaves one free row in its window: the third token slides, so the fourth is the hit."""
    decoder, _ = runner._decoder(SMALL, 0, None)
    found = parts.figure9(Session(decoder, 1, 15, 16, 0), 0.01)
    assert found["token_slid"] == [False, False, True, False, False, False]
    assert found["hit_token"] == 4
    assert found["hit_seconds"] == found["token_seconds"][3]


def test_the_longest_prompt(finished):
    _, values = finished
    assert [(row["architecture"], row["length"], row["fits"]) for row in values["longest"]] == [
        ("tlinformer", 20, True),
        ("transformer", 20, True),
    ]
    assert [row["filled"] for row in values["longest"]] == ["prefill", "random"]
    assert values["longest"][0]["tokens"] == 28


def test_the_table_holds_the_rows(finished):
    _, values = finished
    text = report.table(values)
    assert f"{values['rows'][0]['sustained']['multiple']:.2f}x" in text
    assert "transformer / tlinformer, N 10, batch 1: miss" in text


def test_panels_show_the_figures_of_the_report(finished, tmp_path, drawn):
    """Each curve has a point for every row that has its figure; the run has written the same pictures."""
    folder, values = finished
    files = write_plots(values, tmp_path)
    assert [file.name for file in files] == list(drawn) == ["figure9.png", "generation.png", "multiples.png"]
    assert all((folder / file.name).read_bytes() == file.read_bytes() for file in files)

    def curve(architecture: str, part: str, name: str, unit: float = 1.0) -> list[tuple[float, float]]:
        rows = [row for row in values["rows"] if row["architecture"] == architecture]
        return [(row["length"], row[part][name] * unit) for row in rows if name in row.get(part, {})]

    def ratio(label: str, part: str, name: str) -> dict[str, list[tuple[float, float]]]:
        pairs = zip(curve("transformer", part, name), curve("tlinformer", part, name))
        return {label: [(length, theirs / ours) for (length, theirs), (_, ours) in pairs]}

    panels, generation, (multiples,) = drawn.values()
    words = {"tlinformer": "TLinFormer", "transformer": "Transformer"}
    kinds = {"cache miss (first token)": "miss", "cache hit (third token)": "hit"}
    assert [panel.title[:3] for panel in panels] == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    for name, times, uncached in (("transformer", 0, 2), ("tlinformer", 1, 3)):
        expected = {label: curve(name, "figure9", f"{kind}_seconds", 1e3) for label, kind in kinds.items()}
        check_lines(panels[times].lines, expected)
        assert [len(points) for points in expected.values()] == [2, 2] or name == "transformer"
        expected = {label: curve(name, "figure9", f"uncached_over_{kind}") for label, kind in kinds.items()}
        check_lines(panels[uncached].lines, expected)
    memory = {(row["architecture"], row["length"]): row["cache_bytes"] for row in values["rows"]}
    cache = {words[name]: [(length, memory[name, length] * 1e-9) for length in (10, 16)] for name in words}
    check_lines(panels[4].lines, cache)
    misses, hits = (ratio(label, "figure9", f"{kind}_seconds") for label, kind in kinds.items())
    check_lines(panels[5].lines, misses | hits)

    rows = {name: [row for row in values["rows"] if row["architecture"] == name] for name in words}
    check_lines(  # windows of 4 tokens, each with what its slide takes
        generation[0].lines,
        {
            words[name]: [(r["length"], r["windows"]["seconds"] / r["windows"]["tokens"] * 1e3) for r in rows[name]]
            for name in words
        },
    )
    check_lines(generation[1].lines, {words[name]: curve(name, "prefill", "seconds", 1e3) for name in words})
    check_lines(generation[2].lines, {label: [(x, 1e3 * y) for x, y in points] for label, points in cache.items()})
    average = ratio("a token, on the average", "windows", "seconds")
    prefill, hit = ratio("prefill", "prefill", "seconds"), ratio("cache hit", "sustained", "seconds")
    check_lines(generation[3].lines, average | prefill | hit)
    parts = {"cache hit": "sustained", "slide": "slide", "prefill": "prefill"}
    expected = {
        f"{words[name]}, {label}": curve(name, part, "multiple") for name in words for label, part in parts.items()
    }
    check_lines(multiples.lines, {label: points for label, points in expected.items() if points})
    assert len(multiples.lines) == 5  # the baseline has no slide


def test_figures_are_drawn_again_from_records(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "part.json").write_text('{"rows": []}')
    others = [([f"--record={tmp_path}/{name}.json"], "must be records of") for name in ("other", "part")]
    wrong = [([], "--record: must name"), *others]
    lines = [[f"--record={folder}/inference.json", f"--out={tmp_path}/again"]]
    lines += [[*arguments, f"--out={tmp_path}/none"] for arguments, _ in wrong]
    drawn, *refused = commands.in_forks([("benchmarks.plots", line) for line in lines])
    assert drawn.returncode == 0, drawn.stderr
    for name in ("figure9.png", "generation.png", "multiples.png"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    for result, (_, says) in zip(refused, wrong, strict=True):
        commands.check_refusal(result, says)
    assert not (tmp_path / "none").exists()


def test_without_matplotlib_one_line_says_so(finished, tmp_path, monkeypatch, capsys):
    _, values = finished
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    runner._write_plots(values, tmp_path)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_traces_are_written(finished):
    folder, _ = finished
    for name in ("tlinformer/hit", "tlinformer/slide", "transformer/hit"):
        assert list((folder / "traces" / name).glob("**/*.xplane.pb"))
        assert profiling.device_kernels(folder / "traces" / name) == {}  # no device plane on the CPU


def test_kernels_are_added_up_by_name():
    def line(name: str, *events: tuple[str, float]) -> SimpleNamespace:
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=kind, duration_ns=ns) for kind, ns in events])

    gpu = SimpleNamespace(
        lines=[line("Stream #1", ("attend", 3e6), ("dense", 1e6), ("attend", 3e6)), line("XLA Modules", ("jit", 9e6))]
    )
    tpu = SimpleNamespace(lines=[line("Steps", ("0", 5e6)), line("XLA Ops", ("dense", 2e6))])
    found = profiling.add_up([gpu, tpu])
    assert found == {"attend": (2, 6e6), "dense": (2, 3e6)}
    text = profiling.kernel_table(found).splitlines()
    assert text[1].split() == ["6.000", "66.7%", "2", "3000.00", "attend"]


def test_weights_of_a_working_directory(tmp_path):
    from tlinformer_jax.config.train import TrainConfig
    from tlinformer_jax.training.optimizer import Horizon
    from tlinformer_jax.training.saving import Checkpoints
    from tlinformer_jax.training.step import init_state

    values = {"model": dataclasses.asdict(SMALL), "data": {"dataset": "pydoc", "tokenizer": "bytes"}}
    save_config(run_config(values), tmp_path)
    init = functools.partial(init_state, model=build_model(SMALL), config=TrainConfig(), horizon=Horizon(1, 1))
    state = jax.jit(init)(jax.random.key(7))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state)
    decoder, origin = runner._decoder(SMALL, 0, tmp_path)
    assert origin == f"{tmp_path}, step 0"
    assert (decoder.params.embedding == state.params["embedding"]).all()
    _, origin = runner._decoder(CONFIGS[1], 0, tmp_path)
    assert origin == "random, seed 0"
