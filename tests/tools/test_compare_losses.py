"""The comparison of two evaluations of the same documents, against NumPy."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest

from tests.evaluation.runs import LENGTH, MODEL, trained
from tests.evaluation.test_documents import STREAM
from tests.support.commands import check_refusal, in_fork, in_forks
from tests.support.results import made_result
from tlinformer_jax.evaluation.bootstrap import mean_interval
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run, write_report
from tlinformer_jax.experiments.actions import run_action
from tlinformer_jax.experiments.job import write_result
from tlinformer_jax.training.setup import Run
from tools.compare_losses import check_comparable, comparison, pairs_of, read_losses

TOKENS = [100, 400, 100, 300, 100]
MEANS = np.array([3.0, 3.4, 3.9, 4.4, 5.0])
NUMBER = r"([+-]?\d+\.\d+)"


def part(losses, tokens=TOKENS, split="validation", length=LENGTH, sha256="a1"):
    documents = {"sha256": sha256, "loss": list(losses), "tokens": list(tokens)}
    return {"split": split, "length": length, "by_document": documents}


def compared(folder, a, b) -> list[str]:
    """The lines about two files' evaluations."""
    found = []
    for name, content in (("A", a), ("B", b)):
        (folder / f"{name}.json").write_text(json.dumps(content))
        found.append(read_losses(folder / f"{name}.json"))
    lines = []
    for pair in pairs_of(*found, "A, B"):
        check_comparable(*pair, "A, B")
        lines += comparison(*pair)
    return lines


def numbers(line: str) -> list[float]:
    return [float(text) for text in re.findall(NUMBER, line)]


def test_the_difference_is_paired(tmp_path):
    """B costs 0.1 more a token in every document: the difference is certain, though the means are not."""
    a, b = MEANS * TOKENS, (MEANS + 0.1) * TOKENS
    head, first, second, difference = compared(tmp_path, part(a), part(b))
    assert head == "validation split, 1,000 tokens of 5 documents, samples of 12 tokens"
    mean = float(a.sum() / 1000)
    low, high = mean_interval(a, TOKENS)[1:]
    assert numbers(first) == pytest.approx([mean, low, high], abs=1e-4)
    assert numbers(second) == pytest.approx([mean + 0.1, low + 0.1, high + 0.1], abs=1e-4)
    assert high - low > 0.5
    assert numbers(difference) == pytest.approx([0.1, 0.1, 0.1], abs=1e-4)


def test_documents_in_another_order_are_refused_or_make_the_interval_wide(tmp_path):
    a, b = MEANS * TOKENS, (MEANS + 0.1) * TOKENS
    order = [4, 1, 0, 3, 2]  # the three documents of 100 tokens
    mean, low, high = numbers(compared(tmp_path, part(a), part(b[order]))[-1])
    assert mean == pytest.approx(0.1, abs=1e-4)
    assert high - low > 0.3
    with pytest.raises(ValueError, match="must predict the same tokens; document 0 has 100 and 300"):
        compared(tmp_path, part(a), part(b[[3, 1, 0, 2, 4]], np.array(TOKENS)[[3, 1, 0, 2, 4]].tolist()))
    with pytest.raises(ValueError, match="must be of the same text"):
        compared(tmp_path, part(a), part(b[order], sha256="b2"))


def test_a_report_and_a_record_of_real_evaluations(tmp_path, monkeypatch):
    """Of two models on one text, at each length that both have."""
    monkeypatch.setattr(Run, "split", lambda self, name, length=None: STREAM)
    other = trained(dataclasses.replace(MODEL, architecture="transformer", num_blocks=1))
    report = evaluate_run(trained(), STREAM, EvaluationOptions(length=LENGTH, lengths=(5, 7)))
    actions = ("evaluate", "evaluate@5", "evaluate@20")
    record = made_result("full", 20.0, then={name: run_action(name, other) for name in actions})
    write_report(report, tmp_path / "A.json")
    write_result(tmp_path / "B.json", record)
    done = in_fork("tools.compare_losses", f"{tmp_path}/A.json", f"{tmp_path}/B.json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.rpartition("samples of ")[2] for line in lines[::4]] == ["5 tokens", "12 tokens"]
    mine, its = report["by_length"][0]["figures"]["loss"], record["then"]["evaluate@5"]["figures"]["loss"]
    assert [numbers(line)[0] for line in lines[1:4]] == pytest.approx([mine, its, its - mine], abs=1e-4)
    assert numbers(lines[7])[0] == pytest.approx(
        record["then"]["evaluate"]["figures"]["loss"] - report["figures"]["loss"], abs=1e-4
    )


def test_a_test_split_of_the_text_is_compared_too(tmp_path):
    """In records it is the entry `test` of an evaluation of the validation split at the same length."""

    def record(more):
        tested = part((MEANS + 1 + more)[:3] * TOKENS[:3], TOKENS[:3], split="test", sha256="b2")
        return {"then": {"evaluate": part((MEANS + more / 2) * TOKENS) | {"test": tested}, "history": {"cuts": []}}}

    lines = compared(tmp_path, record(0), record(0.2))
    assert [line.partition(" ")[0] for line in lines[::4]] == ["validation", "test"]
    assert lines[4] == "test split, 600 tokens of 3 documents, samples of 12 tokens"
    assert [numbers(lines[line])[0] for line in (3, 7)] == pytest.approx([0.1, 0.2], abs=1e-4)
    other = record(0)
    del other["then"]["evaluate"]["test"]
    assert len(compared(tmp_path, record(0), other)) == 4


def test_single_evaluations_may_have_other_lengths(tmp_path):
    a, b = part(MEANS * TOKENS), part(MEANS * TOKENS, length=1024)
    assert "samples of 12 (A) and 1,024 (B) tokens" in compared(tmp_path, a, b)[0]
    several = a | {"by_length": [part(MEANS * TOKENS, length=16)]}
    with pytest.raises(
        ValueError,
        match=r"^A, B: must have evaluations of the same split at the same length; "
        r"they have validation 12, validation 16 and validation 1024$",
    ):
        compared(tmp_path, several, b)


SOUND = part(MEANS * TOKENS)


def damaged(**entries):
    found = copy.deepcopy(SOUND)
    found["by_document"] |= entries
    return found


REFUSED = {
    "test split": (part(MEANS * TOKENS, split="test"), "must be of the same split; they are of validation and test"),
    "fewer documents": (part([1.0, 2.0], [1, 2]), "must be of the same documents; they have 5 and 2"),
    "an old record": ({"then": {"evaluate": {"split": "validation"}}}, "must have losses by document (by_document)"),
    "an old report": ({"split": "validation", "length": 12}, "must have losses by document (by_document)"),
    "a list": ([], "must be a record of a sweep or a report"),
    "a number": (3, "must be a record of a sweep or a report"),
    "too few losses": (damaged(loss=[1.0]), "by_document: has 1 losses and 5 numbers of tokens"),
    "not finite": (damaged(loss=[None, 1, 1, 1, 1]), "losses must be finite"),
    "text": (damaged(tokens=["a", 1, 1, 1, 1]), "must be a record of a sweep or a report"),
    "no hash": ({"split": "validation", "length": 12, "by_document": {"loss": [], "tokens": []}}, "'sha256'"),
}


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    sound = tmp_path / "sound.json"
    sound.write_text(json.dumps(SOUND))
    single = json.dumps(part([3.0, 0.0], [5, 0]))
    texts = {name: json.dumps(content) for name, (content, _) in REFUSED.items()}
    texts |= {"no JSON": "{", "deep": "[" * 100_000, "single": single}
    messages = {name: message for name, (_, message) in REFUSED.items()}
    messages |= {"no JSON": "JSONDecodeError", "deep": "must be a record"}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    lines = [[f"{sound}", f"{tmp_path}/{name}.json"] for name in messages]
    lines += [[f"{tmp_path}/single.json"] * 2, [f"{sound}", f"{tmp_path}/none.json"], [f"{sound}"], [f"{sound}"] * 3]
    done = in_forks([("tools.compare_losses", line) for line in lines])
    for (name, message), result in zip(messages.items(), done):
        check_refusal(result, message)
        assert f"{tmp_path}/{name}.json" in result.stderr
    *_, single, missing, one, three = done
    check_refusal(single, "must have tokens of at least two documents")
    check_refusal(missing, f"error: {tmp_path}/none.json: cannot be read (No such file or directory)")
    check_refusal(one, "error: B.json: must be given; the arguments are A.json B.json")
    check_refusal(three, f"error: {sound}: unexpected argument")
