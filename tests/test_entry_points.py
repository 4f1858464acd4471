"""The commands as a user types them: good runs, and one clear line for every mistake."""

import json
import re

from tests.support.commands import ROOT, TEXT, check_refusal, command, in_forks

TINY = ["--config=configs/tiny.py"]
SHRUNK = [
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.model.num_blocks=1",
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


def test_mistakes_get_one_line_and_status_2_and_leave_no_folder_of_their_own(tmp_path):
    (tmp_path / "old").mkdir()
    workdirs = ["run"] * len(MISTAKES) + ["old"]
    mistakes = [*MISTAKES.values(), MISTAKES["a file"]]
    cases = [[*arguments, f"--workdir={tmp_path}/{name}"] for (arguments, _), name in zip(mistakes, workdirs)]
    results = in_forks([("tlinformer_jax.main", case) for case in cases])
    for result, (_, message) in zip(results, mistakes, strict=True):
        check_refusal(result, message)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert results[[*MISTAKES].index("the quickstart's")].stderr.strip() in page


LONG = "n" * 300  # no file system takes this name; looking for it fails as in a folder that may not be searched


def test_a_path_that_cannot_be_reached_gets_one_line(tmp_path):
    text = [*TINY, "--config.data.dataset=text"]
    cases = {
        "--workdir=": ("tlinformer_jax.main", [*TINY, f"--workdir={tmp_path}/{LONG}"]),
        "data.train_files: ": ("prepare", [*text, f"--config.data.train_files={tmp_path}/{LONG}.txt"]),
        "cannot be read as a tokenizer": ("prepare", [*text, f"--config.data.tokenizer={tmp_path}/{LONG}"]),
        f"{LONG}: cannot be read": ("report", [f"--results={tmp_path}/{LONG}", f"--out={tmp_path}/results.md"]),
        f"--config=./{LONG}: cannot be read": ("prepare", [f"--config=./{LONG}"]),
    }
    for result, message in zip(in_forks(list(cases.values())), cases, strict=True):
        check_refusal(result, message)
        assert "(File name too long)" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refused_folder_for_traces_leaves_no_other_folder(tmp_path):
    (tmp_path / "file").touch()
    flags = [f"--workdir={tmp_path}/run", f"--profile={tmp_path}/file"]
    (result,) = in_forks([("tlinformer_jax.main", [*TINY, *flags])])
    check_refusal(result, "--profile=")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mistake_leaves_no_folder_for_traces_whichever_of_the_two_contains_the_other(tmp_path):
    arguments, message = MISTAKES["a file"]
    places = [("a", "a/trace"), ("b/run", "b"), ("c", "c")]
    cases = [[*arguments, f"--workdir={tmp_path}/{run}", f"--profile={tmp_path}/{trace}"] for run, trace in places]
    for result in in_forks([("tlinformer_jax.main", case) for case in cases]):
        check_refusal(result, message)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_workdir(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    check_refusal(command("tlinformer_jax.main", *TINY, f"--workdir={blocker}/run"), "--workdir")
