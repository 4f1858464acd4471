"""Sweep files, their points, and what is said of those that cannot be used."""

import pathlib
import subprocess
import sys

import pytest

from tests.support.commands import TEXT_FILE
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.plan import (
    Sweep,
    check_data,
    chosen_points,
    load_sweep,
    overrides_between,
    plan_points,
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def sweep(points, **parts) -> Sweep:
    base = default_config_dict()
    base.model.update(d_model=16, num_heads=2)
    return Sweep(base, points, **parts)


def test_points_are_named_after_point_and_seed_and_change_only_what_they_say():
    points = plan_points(
        sweep({"wide": {"model.history_window": 128}, "auto": {"model.history_window": "auto"}}, seeds=(3, 4))
    )
    assert [point.name for point in points] == ["wide-seed3", "wide-seed4", "auto-seed3", "auto-seed4"]
    assert [point.config.train.seed for point in points] == [3, 4, 3, 4]
    assert [point.config.model.history_window for point in points] == [128, 128, "auto", "auto"]
    assert points[0].overrides == {"model.history_window": 128}
    assert {point.config.model.d_model for point in points} == {16}


def test_a_point_may_have_seeds_of_its_own():
    points = plan_points(sweep({"a": {"train.seed": (1, 2)}, "b": {"train.seed": 7}, "c": {}}))
    assert [point.name for point in points] == ["a-seed1", "a-seed2", "b-seed7", "c-seed0"]
    assert points[2].config.train.seed == 7
    assert points[2].overrides == {}


def test_flags_change_the_base_of_all_points():
    changed = sweep({"a": {}, "b": {"model.history_window": 8}})
    base = changed.base.copy_and_resolve_references()
    base.train.steps = 17
    assert {point.config.train.steps for point in plan_points(changed, base)} == {17}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model.num_heads": 7}, "point bad: model.num_heads = 7: must divide"),
        ({"model.widnow": 7}, "point bad: model.widnow = 7: no such field"),
        ({"modle.dtpye": 7}, "point bad: modle.dtpye = 7: no such field; did you mean model.dtype?"),
        ({"window": 7}, "point bad: window = 7: no such section"),
        ({"model": 7}, "point bad: model = 7: must be a section of fields"),
        ({"train.seed": -1}, "point bad: train.seed = -1"),
        ({"train.seed": ()}, "point bad: train.seed must hold"),
        ({"train.seed": (1, 1)}, "point bad-seed1: occurs twice"),
    ],
)
def test_a_bad_point_is_named(overrides, says):
    with pytest.raises(UserError, match=says):
        plan_points(sweep({"good": {}, "bad": overrides}))


def test_text_that_is_not_there_and_too_small_a_vocabulary_are_found_before_any_run():
    missing = {"data.dataset": "text", "data.train_files": "none/*.txt", "data.validation_files": "none/*.txt"}
    with pytest.raises(UserError, match=r"point bad-seed0: data.train_files: no file matches '/.*/none/\*.txt'"):
        check_data(plan_points(sweep({"good": {}, "bad": missing})))
    books = {"data.dataset": "text"} | {f"data.{split}_files": str(TEXT_FILE) for split in ("train", "validation")}
    with pytest.raises(UserError, match=r"point bad-seed0: data.test_files: no file matches '/.*/none.txt'"):
        check_data(plan_points(sweep({"good": books, "bad": books | {"data.test_files": "none.txt"}})))
    with pytest.raises(UserError, match=r"point bad-seed0: model.vocab_size = 100"):
        check_data(plan_points(sweep({"good": {}, "bad": {"model.vocab_size": 100}})))


def test_jobs_of_an_array_share_all_points_out_among_them():
    points = plan_points(sweep({name: {} for name in "abcde"}))
    assert chosen_points(points, None, None) == points
    assert [chosen_points(points, job, None) for job in range(5)] == [[point] for point in points]
    two = [chosen_points(points, job, 2) for job in range(2)]
    assert [[point.point for point in part] for part in two] == [["a", "c", "e"], ["b", "d"]]
    for job, jobs, says in (
        (5, None, "--point=5: must be 0 .. 4"),
        (-1, None, "--point=-1"),
        (2, 2, "--point=2: must be 0 .. 1"),
        (0, 6, "--points=6: must be 1 .. 5"),
        (0, 0, "--points=0"),
        (None, 2, "--points: needs --point"),
    ):
        with pytest.raises(UserError, match=says):
            chosen_points(points, job, jobs)


def test_overrides_between_are_what_leads_from_one_to_the_other():
    before, after = default_config_dict(), default_config_dict()
    after.model.history_window = 8
    after.train.steps = 3
    assert overrides_between(before, after) == {"model.history_window": 8, "train.steps": 3}


HEAD = "from tlinformer_jax.config.run import default_config_dict\nfrom tlinformer_jax.experiments.plan import Sweep\n"
FILES = {
    "x = 3": "must be a Python file with a function get_sweep; it has none",
    "def get_sweep(": "line 1: ",
    "def get_sweep():\n  return 3": "get_sweep must return a Sweep, not int",
    "def get_sweep():\n  raise RuntimeError('no luck')": "RuntimeError in .*, line 2: no luck",
    f"{HEAD}def get_sweep():\n  return Sweep(3, {{'a': {{}}}})": "Sweep.base must be a ConfigDict, not int",
    f"{HEAD}def get_sweep():\n  return Sweep(default_config_dict(), {{}})": "must name at least one point",
    f"{HEAD}def get_sweep():\n  return Sweep({{}}, {{'a/b': {{}}}})": "point 'a/b': must be letters",
    f"{HEAD}def get_sweep():\n  return Sweep({{}}, {{'a': 3}})": "point a: must be a dictionary",
    f"{HEAD}def get_sweep():\n  return Sweep({{}}, {{'a': {{}}}}, seeds=())": "Sweep.seeds must be",
    f"{HEAD}def get_sweep():\n  return Sweep({{}}, {{'a': {{}}}}, study='all')": "Sweep.study = 'all': must be one of",
}


@pytest.mark.parametrize("text", FILES)
def test_a_bad_sweep_file_gets_one_line_and_leaves_nothing(text, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=f"--sweep={tmp_path}/bad.py.*{FILES[text]}") as raised:
        load_sweep(str(tmp_path / "bad.py"))
    assert len(str(raised.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.py"]


def test_files_that_are_not_there(tmp_path):
    for path, says in ((tmp_path / "none.py", "No such file"), (tmp_path, "Is a directory"), ("", "must name a sweep")):
        with pytest.raises(UserError, match=says):
            load_sweep(str(path))


def test_the_process_of_a_sweep_needs_no_jax():
    """Or it would hold the device that its points need."""
    script = (
        "import sys; from tlinformer_jax.experiments import actions, job, plan, report; "
        f"plan.check_data(plan.plan_points(plan.load_sweep('{CONFIGS}/sweep_windows.py:tiny'))); "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=CONFIGS.parent, timeout=60)
