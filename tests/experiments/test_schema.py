"""Results of actions whose lists do not belong together are named with their field."""

import pytest

from tests.support.results import MEASURED
from tlinformer_jax.experiments.schema import ACTIONS, misfit

EQUAL = "must have lists of equal length, not empty: "
MASS = MEASURED["mass"]


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("starts", [0, 4], f"'history' {EQUAL}starts, losses.all"),
        ("losses", {"all": []}, f"'history' {EQUAL}starts, losses.all"),
        ("same_tokens", {"distances": [0, None], "losses": [3.25]}, f"'history.same_tokens' {EQUAL}distances, losses"),
        ("same_tokens", {"distances": [], "losses": []}, f"'history.same_tokens' {EQUAL}distances, losses"),
        ("mass", MASS | {"edges": [1, 2]}, f"'history.mass' {EQUAL}x, z; edges with one number more"),
        ("mass", MASS | {"x": [[0.25, 0.75], [0.5]]}, f"'history.mass' {EQUAL}x, z; edges"),
        ("mass", MASS | {"z": [[], []]}, f"'history.mass' {EQUAL}x, z; edges"),
        ("mass", {"edges": [1], "x": [[]], "z": [[]]}, f"'history.mass' {EQUAL}x, z; edges"),
        ("mass", {"edges": [], "x": [], "z": []}, f"'history.mass' {EQUAL}x, z; edges"),
    ],
)
def test_lists_of_a_measured_history_that_do_not_fit_each_other(part, value, says):
    assert misfit(MEASURED | {part: value}, ACTIONS["history"], "history").startswith(says)


@pytest.mark.parametrize(
    "mass",
    [MASS, MASS | {"x": []}, {"edges": [1], "x": [], "z": []}],
    ids=["both", "the observation window alone", "a model without windows"],
)
def test_a_measured_history_fits(mass):
    assert misfit(MEASURED | {"mass": mass}, ACTIONS["history"], "history") == ""
