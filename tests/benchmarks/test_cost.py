"""What a token costs: against counts by hand, and the site's tables against the command."""

import pytest

from benchmarks.cost import MODELS
from benchmarks.token_cost import generation_cost, training_cost
from tests.support.commands import ROOT, check_refusal, in_fork, in_forks

# Of the 41M shape: 8 layers of four D x D matrices and three D x F, and the head.
LAYERS, HEAD = 8 * (4 * 432**2 + 3 * 432 * 1280), 50257 * 432


def test_a_transformer_costs_its_weights_and_the_rows_it_reads():
    length = 8192
    rows = 8 * length * 432
    flops, read = generation_cost(MODELS["Transformer"], length)
    # 2 operations a weight; a row's key and value 2 each; 2 bytes a number.
    assert flops == pytest.approx(2 * (LAYERS + HEAD) + 4 * (rows + 8 * 432), rel=1e-9)
    assert read == pytest.approx(2 * (LAYERS + HEAD) + 2 * 2 * rows, rel=1e-9)
    # Trained, a token reads half of the others, and each product costs three.
    assert training_cost(MODELS["Transformer"], length) == pytest.approx(
        3 * (2 * (LAYERS + HEAD) + 4 * 8 * 432 * (length + 1) / 2), rel=1e-9
    )


def test_the_cost_of_a_token_grows_with_the_text_unless_its_window_slides():
    for name, config in MODELS.items():
        short, long = (generation_cost(config, length) for length in (2**20, 2**21))
        trained = training_cost(config, 2**19) / training_cost(config, 2**18)
        slides = name in ("sliding window 256 + 256", "Gated DeltaNet")
        assert long[0] / short[0] == pytest.approx(1.0 if slides else 2.0, rel=0.02)
        assert trained == pytest.approx(1.0 if slides else 2.0, rel=0.1)
        cached = 1.0 if slides or name.startswith("TConst") else 2.0
        assert long[1] / short[1] == pytest.approx(cached, rel=0.03)


def test_the_site_has_the_tables_that_the_command_prints():
    printed = in_fork("benchmarks.cost")
    assert printed.returncode == 0, printed.stderr
    tables = printed.stdout.strip().split("\n\n")
    assert len(tables) == 2
    page = (ROOT / "docs" / "when_to_use.md").read_text()
    assert all(table in page for table in tables)


def test_lengths_that_are_none_are_refused():
    wrong = [f"--at={given}" for given in ("", "0", "x", "1_000", "+8", "٨")]
    for flag, result in zip(wrong, in_forks([("benchmarks.cost", [flag]) for flag in wrong]), strict=True):
        check_refusal(result, f"{flag}: must be integers from 1")
