"""lm-evaluation-harness with our models: its figures are those of `evaluate`, of the model, of `generate`."""

import importlib
import json
import math
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from tests.support.commands import TEXT as TEXT_FLAGS
from tests.support.commands import check_refusal, command
from tests.support.optional import need_modules
from tlinformer_jax.decoding import Generator
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_text
from tlinformer_jax.training.checkpoint import load_run

with_lm_eval = pytest.mark.slow  # .ci/run installs it for these alone
SHRUNK = (
    "--config.train.steps=60",
    "--config.train.warmup_steps=10",
    "--config.train.eval_every=0",
    "--config.train.batch_size=8",
    "--config.model.d_model=48",
    "--config.model.num_blocks=1",
    *TEXT_FLAGS,
)
TEXT = (
    "The for statement is used to iterate over the elements of a sequence (such as a string, tuple or list) "
    "or other iterable object: 'for' target_list 'in' starred_expression_list ':' suite. ÄÖÜ and so on. "
)
# Tokens: three samples of 128 and a short one; exactly one; less than one.
TEXTS = (TEXT * 2, ("The while statement. " * 7)[:128], "A class.")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """What README's first command trains, a smaller model on less text."""
    need_modules("lm_eval", extra="lm-eval")
    path = tmp_path_factory.mktemp("harness") / "run"
    trained = command("tlinformer_jax.main", "--config=configs/tiny.py", *SHRUNK, f"--workdir={path}")
    assert trained.returncode == 0, trained.stderr
    return path


@pytest.fixture(scope="module")
def model(workdir):
    from tlinformer_jax.interop.harness import HarnessModel

    return HarnessModel(str(workdir))


def requests(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


@with_lm_eval
def test_rolling_equals_evaluate(workdir, model):
    found, run = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in TEXTS))),
        load_run(workdir),
    )
    for text, total in zip(TEXTS, found):
        evaluated = evaluate_text(run, text, EvaluationOptions(), text_file="text.txt")
        assert evaluated["tokens"] == len(text.encode())
        assert abs(-total / evaluated["tokens"] - evaluated["figures"]["loss"]) < 1e-4


@with_lm_eval
def test_loglikelihood_is_the_models(workdir, model):
    cases = [("The for", " statement"), ("", "The"), ("x =", " 1\n"), (TEXT.strip(), " is"), ("A", " class." * 30)]
    found, run = model.loglikelihood(requests("loglikelihood", *cases)), load_run(workdir)
    log_probabilities = jax.jit(lambda rows: jax.nn.log_softmax(run.run.model.apply({"params": run.params}, rows)[0]))
    for (context, continuation), (total, _) in zip(cases, found):
        before, after = context.encode() or [256], continuation.encode()
        tokens = [*before, *after][-(max(128, len(after)) + 1) :][:-1]
        rows = np.pad(tokens, (0, 256 - len(tokens)))  # of one length; no token sees those that follow it
        log_probs = np.asarray(log_probabilities(rows[None]))[len(tokens) - len(after) : len(tokens)]
        assert total == pytest.approx(sum(row[token] for row, token in zip(log_probs, after)), abs=1e-4 * len(after))


@with_lm_eval
def test_greedy_continuations_are_told_from_others(workdir, model):
    (text,) = Generator.from_workdir(workdir).generate(["The for"], max_new_tokens=5)
    other = text[:-1] + ("x" if text[-1] != "x" else "y")
    cases = [("The for", text), ("The for", other)]
    (_, greedy), (_, not_greedy) = model.loglikelihood(requests("loglikelihood", *cases))
    assert greedy
    assert not not_greedy


@with_lm_eval
def test_generations_are_those_of_the_generator(workdir, model):
    (whole,) = Generator.from_workdir(workdir).generate(["The for"], max_new_tokens=40)
    (drawn,) = Generator.from_workdir(workdir).generate(["The for"], max_new_tokens=9, temperature=0.7)
    stop = whole[3:5]
    greedy = {"until": [stop], "max_gen_toks": 40, "do_sample": False, "temperature": 0.7}
    found = model.generate_until(
        requests(
            "generate_until",
            ("The for", greedy),
            ("The for", {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 0.7}),
            ("The for", {"until": stop, "max_gen_toks": 40}),
            ("The for", {"until": ["no such text"], "max_gen_toks": 40}),
            ("", {"max_gen_toks": 3}),
        )
    )
    stopped = whole[: whole.index(stop)]
    assert found[:4] == [stopped, drawn, stopped, whole]
    assert len(found[4].encode()) <= 3


def local_tasks(folder: pathlib.Path) -> list[dict]:
    """A task of each kind, on data in a folder."""
    rows = [{"text": text, "question": "The for", "choices": [" statement", "xqzjxqzj"], "answer": 0} for text in TEXTS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    rolling = {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    choice = {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    generation = {
        "task": "generation",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [common | task for task in (rolling, choice, generation)]


@with_lm_eval
def test_local_tasks_through_the_harness(model, tmp_path, monkeypatch):
    """The harness's own loop, and its figures; nothing is fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate

    found = simple_evaluate(model=model, tasks=local_tasks(tmp_path), bootstrap_iters=0)["results"]
    total = sum(model.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS))))
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / size, abs=1e-4)
    assert found["choice"]["acc,none"] == 1
    assert found["generation"]["exact_match,none"] == 0


@with_lm_eval
def test_the_command_knows_the_model(workdir, tmp_path):
    """`python -m tlinformer_jax.interop.harness`, and a working directory that is none in one line."""
    task = local_tasks(tmp_path)[1]
    (tmp_path / "choice.yaml").write_text(json.dumps(task))
    arguments = ("--model", "tlinformer", "--tasks", "choice", "--include_path", str(tmp_path))
    place = ("--model_args", f"workdir={workdir},max_length=64", "--output_path", f"{tmp_path}/out")
    found = command("tlinformer_jax.interop.harness", "run", *arguments, *place)
    assert found.returncode == 0, found.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    stored = json.loads(results.read_text())
    assert stored["results"]["choice"]["acc,none"] == 1
    wrong = command("tlinformer_jax.interop.harness", "run", *arguments, "--model_args", f"workdir={tmp_path}/none")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith(f"error: workdir {tmp_path}/none: no readable config.json")


@with_lm_eval
@pytest.mark.parametrize("name", ["max_length", "batch_size", "max_gen_toks"])
def test_what_is_no_number_is_refused(name, workdir):
    from tlinformer_jax.interop.harness import HarnessModel

    with pytest.raises(ConfigError, match=rf"lm-eval\.{name} = 'auto': must be an integer >= 1"):
        HarnessModel(str(workdir), **{name: "auto"})


def test_without_lm_eval_it_says_what_is_missing(monkeypatch):
    needed = "needs the package lm-eval: pip install 'tlinformer-jax[lm-eval]'"
    check_refusal(command("tlinformer_jax.interop.harness", "run", blocked=("lm_eval",)), needed)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "tlinformer_jax.interop.harness", raising=False)
    with pytest.raises(UserError, match=re.escape(needed)):
        importlib.import_module("tlinformer_jax.interop.harness")
