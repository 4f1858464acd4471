"""The action `evaluate`: what it counts."""

from tests.evaluation.runs import trained
from tests.evaluation.test_report import STREAM
from tlinformer_jax.experiments.actions import run_action
from tlinformer_jax.training.setup import Run


def test_evaluations_at_all_lengths_count_the_same_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(Run, "split", lambda self, name, length=None: asked.append(name) or STREAM)
    run = trained()
    parts = [run_action(name, run) for name in ("evaluate", "evaluate@8", "evaluate@20")]
    assert [part["tokens"] for part in parts] == [len(STREAM.tokens) - 1] * 3
    assert [part["length"] for part in parts] == [12, 8, 20]
    assert asked == [part["split"] for part in parts] == ["validation"] * 3
