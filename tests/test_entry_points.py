"""The commands as a user types them: good runs, and one clear line for every mistake."""

import json
import pathlib
import re

import pytest

from tests.support.commands import ROOT, TEXT, check_refusal, command, in_forks

TINY = ["--config=configs/tiny.py"]
SHRUNK = [
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.model.num_blocks=1",
    "--config.model.hidden_depth=0",
    "--config.model.dtype=float32",
    "--config.data.sequence_length=64",
    "--config.train.steps=2",
    "--config.train.eval_every=0",
]


def test_training_and_evaluation_without_optional_packages(tmp_path):
    blocked = ("tensorflow", "tensorflow_datasets", "wandb")
    arguments = [f"--workdir={tmp_path}", f"--profile={tmp_path}/trace"]
    trained = command("tlinformer_jax.main", *TINY, *SHRUNK, *TEXT, *arguments, blocked=blocked)
    assert trained.returncode == 0, trained.stderr
    assert "traced steps 2 to 2" in trained.stderr
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert "left" in trained.stderr
    asked = ("--json", "--by_position", "--lengths=64,128", f"--out={tmp_path}/out.json")
    evaluated = command("evaluate", f"--workdir={tmp_path}", *asked, blocked=blocked)
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads(evaluated.stdout)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["step"] == 2
    assert abs(figures["loss"] - logged["eval/loss"]) < 1e-4
    assert {"perplexity", "bits_per_byte", "loss_first_window", "loss_later_windows"} <= set(figures)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["command"] == ["tlinformer_jax evaluate", f"--workdir={tmp_path}", *asked]
    assert (written["step"], written["split"], written["figures"]["loss"]) == (2, "validation", figures["loss"])
    assert [(part["length"], part["batch_size"]) for part in written["by_length"]] == [(64, 128), (128, 64)]
    for name in ("by_position", "by_window_position", "by_length"):
        assert written[name] == figures[name]
    # A text instead of a split, and lines instead of JSON.
    (tmp_path / "text.txt").write_text("The for statement.\n")
    text = command("evaluate", f"--workdir={tmp_path}", f"--text_file={tmp_path}/text.txt")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith(f"tlinformer, step 2, {tmp_path}/text.txt, 19 tokens\n  loss, nats per token ")


def test_help_says_what_a_command_does_and_lists_its_flags():
    found = command("evaluate", "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Evaluates a trained model: ")
    assert {"--lengths", "--workdir"} <= set(re.findall(r"--\w+(?=:)", found.stdout))


# One of each kind; tests/test_bad_inputs.py has all of them, and tests/test_model.py the model's fields.
MISTAKES = {
    "a flag": ([*TINY, "--wrokdir=/tmp/x"], "wrokdir"),
    "a field": ([*TINY, "--config.model.widnow=1"], "--config.model.widnow=1"),
    "the text": ([*TINY, "--config.data.sequence_length=9000000"], "data.sequence_length"),
    "the devices": ([*TINY, "--config.train.mesh=fsdp=3"], "it is 3, and there is 1 device"),
    "a file": ([*TINY, "--config.data.dataset=text", "--config.data.train_files=/none.txt"], "data.train_files"),
    "the quickstart's": ([*TINY, "--config.model.num_heads=7"], "model.num_heads = 7"),
}


LONG = "n" * 300  # no file system takes this name; looking for it fails as in a folder that may not be searched


def unreachable(folder: pathlib.Path) -> dict[str, tuple[str, list[str]]]:
    """What is said of a path that is too long, and the command that gets it."""
    text = [*TINY, "--config.data.dataset=text"]
    return {
        "--workdir=": ("tlinformer_jax.main", [*TINY, f"--workdir={folder}/{LONG}"]),
        "data.train_files: ": ("prepare", [*text, f"--config.data.train_files={folder}/{LONG}.txt"]),
        "cannot be read as a tokenizer": ("prepare", [*text, f"--config.data.tokenizer={folder}/{LONG}"]),
        f"{LONG}: cannot be read": ("report", [f"--results={folder}/{LONG}", f"--out={folder}/results.md"]),
        f"--config=./{LONG}: cannot be read": ("prepare", [f"--config=./{LONG}"]),
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Test -> its folder and the results of its commands; one process imports for all of them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("mistakes", "paths", "traces", "nested", "workdir")}
    (folders["mistakes"] / "old").mkdir()
    (folders["traces"] / "file").touch()
    (folders["workdir"] / "file").write_text("")
    file = MISTAKES["a file"][0]
    mistakes = [*((arguments, "run") for arguments, _ in MISTAKES.values()), (file, "old")]
    cases = {
        "mistakes": [[*arguments, f"--workdir={folders['mistakes']}/{name}"] for arguments, name in mistakes],
        "traces": [[*TINY, f"--workdir={folders['traces']}/run", f"--profile={folders['traces']}/file"]],
        "nested": [
            [*file, f"--workdir={folders['nested']}/{run}", f"--profile={folders['nested']}/{trace}"]
            for run, trace in (("a", "a/trace"), ("b/run", "b"), ("c", "c"))
        ],
        "workdir": [[*TINY, f"--workdir={folders['workdir']}/file/run"]],
    }
    commands = {name: [("tlinformer_jax.main", case) for case in part] for name, part in cases.items()}
    commands["paths"] = list(unreachable(folders["paths"]).values())
    results = iter(in_forks([case for part in commands.values() for case in part]))
    return {name: (folders[name], [next(results) for _ in part]) for name, part in commands.items()}


def test_mistakes_get_one_line_and_status_2_and_leave_no_folder_of_their_own(refused):
    folder, results = refused["mistakes"]
    for result, (_, message) in zip(results, [*MISTAKES.values(), MISTAKES["a file"]], strict=True):
        check_refusal(result, message)
    assert [path.name for path in folder.iterdir()] == ["old"]
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert results[[*MISTAKES].index("the quickstart's")].stderr.strip() in page


def test_a_path_that_cannot_be_reached_gets_one_line(refused):
    folder, results = refused["paths"]
    for result, message in zip(results, unreachable(folder), strict=True):
        check_refusal(result, message)
        assert "(File name too long)" in result.stderr
    assert list(folder.iterdir()) == []


def test_a_refused_folder_for_traces_leaves_no_other_folder(refused):
    folder, (result,) = refused["traces"]
    check_refusal(result, "--profile=")
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_mistake_leaves_no_folder_for_traces_whichever_of_the_two_contains_the_other(refused):
    folder, results = refused["nested"]
    assert len(results) == 3
    for result in results:
        check_refusal(result, MISTAKES["a file"][1])
    assert list(folder.iterdir()) == []


def test_unwritable_workdir(refused):
    _, (result,) = refused["workdir"]
    check_refusal(result, "--workdir")
