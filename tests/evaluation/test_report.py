"""The report of an evaluation, against the NumPy reference on samples cut by hand."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from tests.evaluation.runs import LENGTH, MODEL, costs, trained
from tlinformer_jax.commands import cli
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run, lines, write_report
from tlinformer_jax.files import finite

TOKENS = np.random.default_rng(3).integers(0, 257, 68).astype(np.uint16)  # 5 samples of 12, 7 labels are left
STREAM = TokenStream(TOKENS, num_bytes=68, num_documents=1, num_words=10, num_lines=2)
LENGTHS = (8, 20)


@pytest.fixture(scope="module")
def report():
    options = EvaluationOptions(by_position=True, lengths=LENGTHS)
    return evaluate_run(trained(), STREAM, options, split="validation", command=["evaluate", "--by_position"])


def curves(samples: list[np.ndarray], window: int) -> tuple[list[float], list[float], list[float]]:
    """Mean cost at each position of a sample, of the first window, of the later ones: token by token."""
    whole: dict[int, list[float]] = {}
    first: dict[int, list[float]] = {}
    later: dict[int, list[float]] = {}
    for sample in samples:
        for position, cost in enumerate(sample):
            whole.setdefault(position, []).append(cost)
            (first if position < window else later).setdefault(position % window, []).append(cost)
    return tuple([float(np.mean(found[i])) for i in sorted(found)] for found in (whole, first, later))


def check(part, samples):
    """A part of a report against what its samples' tokens cost."""
    every = np.concatenate(samples)
    assert part["tokens"] == len(every)
    assert part["figures"]["loss"] == pytest.approx(every.mean(), rel=1e-5)
    assert part["figures"]["perplexity"] == pytest.approx(math.exp(every.mean()), rel=1e-4)
    whole, first, later = curves(samples, MODEL.generation_window)
    assert part["by_position"]["edges"] == list(range(len(whole) + 1))
    np.testing.assert_allclose(part["by_position"]["loss"], whole, rtol=1e-5)
    assert part["by_position"]["tokens"] == [sum(len(s) > i for s in samples) for i in range(len(whole))]
    assert part["by_window_position"]["edges"] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(part["by_window_position"]["first"], first, rtol=1e-5)
    np.testing.assert_allclose(part["by_window_position"]["later"], later, rtol=1e-5)


def test_figures_and_curves_of_the_whole_samples(report):
    samples = costs(TOKENS, LENGTH)
    assert [len(sample) for sample in samples] == [12, 12, 12, 12, 12, 7]
    check(report, samples[:-1])
    later = np.mean([sample[4:] for sample in samples[:-1]])
    assert report["figures"]["loss_later_windows"] == pytest.approx(later, rel=1e-5)


def test_other_lengths_share_the_same_tokens(report):
    assert [part["length"] for part in report["by_length"]] == list(LENGTHS)
    for part in report["by_length"]:
        samples = costs(TOKENS, part["length"])
        assert sum(map(len, samples)) == len(TOKENS) - 1
        check(part, samples)
        assert part["figures"]["bits_per_byte"] == pytest.approx(
            sum(map(np.sum, samples)) / math.log(2) / (68 * 67 / 68), rel=1e-5
        )


def test_context_is_seen(report):
    """What is compared above differs by more than its tolerance from one length to the next."""
    losses = [report["figures"]["loss"], *(part["figures"]["loss"] for part in report["by_length"])]
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 1e-3


def test_what_the_report_says_of_its_run(report):
    assert report["command"] == ["evaluate", "--by_position"]
    assert (report["step"], report["split"], report["length"]) == (7, "validation", LENGTH)
    assert report["workdir_config"]["model"] == dataclasses.asdict(MODEL)
    assert set(report["workdir_config"]) == {"model", "train", "data"}
    assert (report["device"], report["jax"]) == (jax.devices()[0].device_kind, jax.__version__)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_transformer_has_the_same_curves_and_parts_not_asked_for_are_absent():
    model = dataclasses.replace(MODEL, architecture="transformer", num_blocks=1)
    run = trained(model)
    found = evaluate_run(run, STREAM, EvaluationOptions(length=20, by_position=True), split="test")
    samples = costs(TOKENS, 20, model)
    assert found["tokens"] == len(TOKENS) - 1, "as at every other length"
    np.testing.assert_allclose(
        found["by_window_position"]["later"], curves(samples, model.generation_window)[2], rtol=1e-5
    )
    assert found["figures"]["loss"] == pytest.approx(np.concatenate(samples).mean(), rel=1e-5)
    assert found["length"] == 20
    short = evaluate_run(run, STREAM, EvaluationOptions(length=20), split="test")
    assert set(found) - set(short) == {"by_position", "by_window_position"}
    assert "by_length" not in short


def test_batches_hold_as_many_tokens_as_in_training_unless_told_otherwise():
    run = trained().run  # on a mesh that wants multiples of its devices
    large = dataclasses.replace(run.config.train, batch_size=65_536, accumulation=2)
    large = dataclasses.replace(run, config=dataclasses.replace(run.config, train=large))  # 32,768 x 12 tokens
    ways = run.mesh.size
    assert large.evaluation_batch_size(12, 10**6) == 32_768
    assert large.evaluation_batch_size(24, 10**6) == 16_384
    assert run.evaluation_batch_size(16, 10**6) == 1024, "at least 16,384 tokens"
    assert run.evaluation_batch_size(10**6, 10**6) == ways
    assert run.evaluation_batch_size(1, 3) == max(ways, 4)
    assert run.evaluation_batch_size(1, 10**6, batch_size=16) == 16


def test_each_length_is_compiled_once(report):
    """The report's three lengths are known; of the same and one more, only that one is new."""
    step = trained().run.eval_step
    known = step._cache_size()
    evaluate_run(trained(), STREAM, EvaluationOptions(lengths=(*LENGTHS, 9)), split="train")
    assert step._cache_size() == known + 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 68}, "evaluation.length = 68: must be at most 67 for the validation split"),
        ({"lengths": (8, 100)}, "evaluation.lengths = 100: must be at most 67"),
        ({"lengths": (0,)}, "evaluation.lengths = 0: must be an integer from 1"),
        ({"length": 2**31}, "evaluation.length = 2147483648"),
        ({"batch_size": -1}, "evaluation.batch_size = -1"),
    ],
)
def test_options_that_are_not_allowed(options, says):
    with pytest.raises(ConfigError) as caught:
        evaluate_run(trained(), STREAM, EvaluationOptions(**options), split="validation")
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("option", ["length", "batch_size"])
@pytest.mark.parametrize("value", [0, -4, 1.5, 2**31])
def test_a_run_refuses_them_too(option, value):
    allowed = "must be an integer from 1 to 2147483647"
    with pytest.raises(ConfigError, match=rf"^evaluation\.{option} = {value}: {allowed}$"):
        trained().run.evaluate(trained().params, STREAM, **{option: value})


def test_no_array_of_all_tokens_times_the_vocabulary(monkeypatch):
    """What the compiled step needs on each device beside its arguments, against that array's part."""
    size, length = 2048, 8192
    run = trained(dataclasses.replace(MODEL, vocab_size=size, generation_window=64)).run
    monkeypatch.setattr("tlinformer_jax.training.evaluation.LOSS_CHUNK", 1024)
    row = jax.ShapeDtypeStruct((run.mesh.size, length), np.int32)
    batch = {"inputs": row, "labels": row, "weights": jax.ShapeDtypeStruct(row.shape, np.float32)}
    with jax.set_mesh(run.mesh):
        memory = run.eval_step.lower(run.abstract_state.params, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * size * 4 / 4, memory


def test_tables_show_the_report(report):
    text = lines(report)
    assert text[0] == "tlinformer, step 7, validation split, 60 tokens"
    rows = [line.split() for line in text]
    whole = report["by_position"]
    assert ["0", "to", "0", "5", f"{whole['loss'][0]:.5g}"] in rows
    window = report["by_window_position"]
    assert ["3", "to", "3", f"{window['first'][3]:.5g}", f"{window['later'][3]:.5g}"] in rows
    part = report["by_length"][1]
    assert any(row[:1] == ["20"] and f"{part['figures']['loss']:.5g}" in row for row in rows)


def test_joined_bins_keep_the_mean():
    """64 bins of a report become 16 rows of a table, whose tokens and mean are those of four bins."""
    whole = {"edges": list(range(65)), "loss": [float(i) for i in range(64)], "tokens": [1, 3] * 32}
    window = {"edges": [0, 1], "first": [None], "first_tokens": [0]}
    report = {"workdir_config": {"model": {"architecture": "a"}}, "step": 0, "split": "test", "tokens": 1}
    report |= {"figures": {}, "length": 64, "by_position": whole, "by_window_position": window}
    rows = [line.split() for line in lines(report)]
    mean = (0 * 1 + 1 * 3 + 2 * 1 + 3 * 3) / 8
    assert ["0", "to", "3", "8", f"{mean:.5g}"] in rows
    assert ["60", "to", "63", "8", f"{mean + 60:.5g}"] in rows
    assert ["0", "to", "0", "-"] in rows


def test_reports_appear_whole_or_not_at_all(tmp_path):
    target = cli.writable_file(str(tmp_path / "report.json"))
    assert list(tmp_path.iterdir()) == []
    values = {"loss": 1.0, "command": ["--a=[1,  2]", "x"], "edges": [0, 1, None], "parts": [{"loss": [0.5, 2.0]}]}
    write_report(values, target)
    with pytest.raises(ValueError, match="JSON"):
        write_report({"loss": math.inf}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads(target.read_text()) == values
    assert ' "edges": [ 0, 1, null ],' in target.read_text().splitlines()
    assert finite({"a": [math.inf, 1.5], "b": math.nan}) == {"a": [None, 1.5], "b": None}
    for name in ("none/report.json", ".", "report.json/x"):
        with pytest.raises(UserError, match="--out="):
            cli.writable_file(str(tmp_path / name))
