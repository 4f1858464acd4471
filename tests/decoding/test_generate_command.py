"""The command that generates: what it prints where, how it ends, and one line for every mistake."""

import dataclasses
import io
import json
import pathlib
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from tests.support import golden
from tests.support.commands import ROOT, check_refusal, command, command_line, in_forks
from tlinformer_jax import ModelConfig
from tlinformer_jax.commands import generate
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import RunConfig, load_config, save_config
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer, save_tokenizer
from tlinformer_jax.decoding import Generator, stream
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.stream import DeviceCall, TextStream
from tlinformer_jax.environment import PatientStream
from tlinformer_jax.errors import UserError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.step import TrainState

MODEL = ModelConfig(
    vocab_size=260,
    d_model=16,
    num_heads=2,
    num_blocks=1,
    hidden_depth=0,
    d_ff=24,
    history_window=16,
    generation_window=16,
    dtype="float32",
)
PROMPT = "Grüße"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """What a training run leaves behind, with weights of the golden files' scale."""
    folder = tmp_path_factory.mktemp("run")
    save_config(RunConfig(MODEL, TrainConfig(), DataConfig(tokenizer="bytes")), folder)
    save_tokenizer(ByteTokenizer(), folder)
    params = params_from_reference(golden.random_weights(MODEL), MODEL)["params"]
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), params, {"count": jnp.int32(0)}))
    return folder


@pytest.fixture(scope="module")
def expected(workdir):
    """What the library says of the prompt."""
    model = Generator.from_workdir(workdir)
    return model.run([PROMPT] * 2, max_new_tokens=40, temperature=1.0, logprobs=True)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """The command in this process: status, stdout, stderr."""
    with flagsaver.flagsaver():
        flags.FLAGS(["generate", *arguments])
        try:
            generate.main()
            status = 0
        except SystemExit as ended:
            status = ended.code
    return status, *capsys.readouterr()


DRAW = ("--max_new_tokens=40", "--temperature=1")


def test_text_goes_to_stdout_and_figures_to_stderr(workdir, expected):
    result = command("generate", f"--workdir={workdir}", f"--prompt={PROMPT}", *DRAW)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == expected[0].text.splitlines()
    assert result.stdout.endswith("\n")
    assert re.search(r"^40 tokens in \d+\.\d\d s, .*: [\d.]+ tokens/s$", result.stderr, re.M)
    assert re.search(r"^39 hits, 2 slides$", result.stderr, re.M)
    parts = re.search(
        r"^cache: ([\d,]+) bytes \((.*)\), of which ([\d,]+) are in use; by .* ([\d,]+)$", result.stderr, re.M
    )
    sizes = [int(size.replace(",", "")) for size in re.findall(r"[a-z]+ ([\d,]+)", parts[2])]
    assert sum(sizes) == int(parts[1].replace(",", ""))
    assert int(parts[4].replace(",", "")) == 2 * (len(PROMPT.encode()) + 39) * 16 * 4


def test_the_speed_after_the_first_call_is_a_median(workdir, monkeypatch, capsys):
    """So that the calls that compile, here the first two, do not count."""
    calls = []

    def timed(seconds, tokens):
        calls.append(DeviceCall(100.0 if len(calls) < 2 else tokens / (50 + len(calls)), tokens))
        return calls[-1]

    monkeypatch.setattr(stream, "DeviceCall", timed)
    _, _, err = run(capsys, f"--workdir={workdir}", f"--prompt={PROMPT}", *DRAW)
    speeds = sorted(call.tokens / call.seconds for call in calls[1:])
    assert len(speeds) % 2, "the median is one of them"
    assert f"\n{speeds[len(speeds) // 2]:.1f} tokens/s in the median call after the first\n" in err
    assert speeds[0] < 1 < 50 < speeds[len(speeds) // 2]


def test_samples_as_json_and_as_text(workdir, expected, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    common = (f"--workdir={workdir}", f"--prompt_file={file}", "--num_samples=2", *DRAW)
    status, out, err = run(capsys, *common, "--json")
    assert (status, err.count("tokens/s") >= 1) == (0, True)
    for number, (line, wanted) in enumerate(zip(out.splitlines(), expected, strict=True)):
        assert json.loads(line) == {
            "sample": number,
            "seed": number,
            "text": wanted.text,
            "finish_reason": "length",
            "tokens": wanted.tokens,
            "logprobs": wanted.logprobs,
            "hits": 39,
            "slides": 2,
        }
    status, out, _ = run(capsys, *common)
    assert (status, out) == (0, "".join(f"--- sample {i}\n{sample.text}\n" for i, sample in enumerate(expected)))


def test_one_sample_in_one_piece_and_a_stop_text(workdir, expected, capsys):
    common = (f"--workdir={workdir}", f"--prompt={PROMPT}", *DRAW)
    stop = expected[0].text[5:8]
    for flag in ("--stream", "--nostream"):
        status, out, _ = run(capsys, *common, flag, f"--stop={stop}", "--stop=never")
        assert (status, out) == (0, expected[0].text[: expected[0].text.index(stop)] + "\n")


def test_every_option_reaches_the_generator(workdir, monkeypatch, capsys):
    asked = {}

    def noted(self, prompts, **options):
        asked.update(options, prompts=prompts)
        raise UserError("enough")

    monkeypatch.setattr(Generator, "stream", noted)
    options = ["--max_new_tokens=3", "--temperature=0.5", "--top_k=4", "--top_p=0.9", "--min_p=0.1", "--seed=8"]
    options += ["--repetition_penalty=1.5", "--stop=a", "--stop=b,c", "--nostop_at_end", "--json", "--cache_dtype=int8"]
    with pytest.raises(UserError, match="enough"):
        run(capsys, f"--workdir={workdir}", "--prompt=x", *options)
    assert asked == {
        "prompts": ["x"],
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 8,
        "stop_strings": ["a", "b,c"],
        "stop_tokens": (),
        "logprobs": True,
        "cache_dtype": "int8",
    }


def test_an_int8_cache_is_said_with_what_reads_it(workdir, capsys):
    arguments = (f"--workdir={workdir}", f"--prompt={PROMPT}", *DRAW)
    (status, out, err), (_, _, exact) = run(capsys, *arguments, "--cache_dtype=int8"), run(capsys, *arguments)
    assert status == 0
    assert out
    assert "\nint8 cache: read by plain JAX for a token, by plain JAX for prefill and slide\n" in err
    sizes = [re.search(r"^cache: (.*)[\d,]+ bytes \(history ([\d,]+)", text, re.M).groups() for text in (err, exact)]
    assert sizes[0][0].startswith("int8, ")
    small, large = (int(size.replace(",", "")) for _, size in sizes)
    assert small * 4 * 8 == large * (8 + 2)  # 8 features a head with a scale of two bytes, in place of float32's 8 * 4
    assert "int8" not in exact


def test_ids_without_a_text_are_not_counted(workdir, capsys):
    """The model has ids that its tokenizer, of 257 entries, does not have."""
    arguments = ("--max_new_tokens=200", "--temperature=1", "--nostop_at_end", "--num_samples=2", "--json")
    _, out, err = run(capsys, f"--workdir={workdir}", f"--prompt={PROMPT}", *arguments)
    tokens = [token for line in out.splitlines() for token in json.loads(line)["tokens"]]
    assert len(tokens) == 400 > (known := sum(token < 257 for token in tokens))
    assert err.startswith(f"{known} tokens in ")


def test_ctrl_c_prints_what_there_is_and_the_figures(workdir):
    arguments = (f"--workdir={workdir}", f"--prompt={PROMPT}", "--max_new_tokens=100000000", "--nostop_at_end")
    line, environment = command_line("generate", *arguments, "--temperature=1")
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    start = process.stdout.read(50)  # text comes while the rest is being made
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    text, figures = (start + out).decode("utf-8"), err.decode()
    assert process.returncode == 130, figures
    assert "Traceback" not in figures
    assert text.endswith("\n")
    count = int(re.search(r"^([\d,]+) tokens in ", figures, re.M)[1].replace(",", ""))
    assert len(text) - 1 <= count < 100_000_000
    assert re.search(r"^[\d,]+ hits, [\d,]+ slides\ncache: ", figures, re.M)


def test_interrupted_text_is_shown_to_its_end(workdir, expected, monkeypatch, capsys):
    calls, run_steps = [], Decoder.run_steps

    def interrupted(self, cache, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_steps(self, cache, *arguments)

    monkeypatch.setattr(Decoder, "run_steps", interrupted)
    # Drawn by then: the first token, 9 to the end of the window that the prompt's 7 bytes began, a window of 16.
    texts = TextStream(ByteTokenizer(), [])
    begun = texts.push(expected[0].tokens[:26])[0] + texts.finish()
    # The last character could begin the stop string, and is held back until the end.
    arguments = (f"--workdir={workdir}", f"--prompt={PROMPT}", *DRAW, f"--stop={begun[-1]}\0")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (130, begun + "\n")
    assert err.startswith("26 tokens in ")


def test_a_reader_that_goes_away_ends_it_quietly(workdir):
    line, environment = command_line(
        "generate",
        f"--workdir={workdir}",
        "--prompt=x",
        "--max_new_tokens=100000000",
        "--nostop_at_end",
    )
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        figures = process.stderr.read()
    assert process.returncode == 130, figures
    assert "Traceback" not in figures
    assert " hits, " in figures


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_text_that_a_full_disk_loses_is_an_error_after_the_figures(options, workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", PatientStream(io.FileIO("/dev/full", "w")))
    with pytest.raises(UserError, match=r"^stdout: .*\(No space left"):
        run(capsys, f"--workdir={workdir}", f"--prompt={PROMPT}", *DRAW, *options)
    assert " hits, " in capsys.readouterr().err


MISTAKES = {
    "no prompt": ([], "--prompt, --prompt_file: give one of the two"),
    "two prompts": (["--prompt=a", "--prompt_file=b"], "--prompt, --prompt_file: give one of the two"),
    "empty prompt": (["--prompt="], "--prompt: must hold some text; it is empty"),
    "no prompt file": (["--prompt_file=/none/there"], "--prompt_file=/none/there: cannot be read (No such file"),
    "a folder": (["--prompt_file=/tmp"], "--prompt_file=/tmp: cannot be read (Is a directory)"),
    "empty prompt file": (["--prompt_file={empty}"], "empty.txt: must hold some text; it is empty"),
    "no text in the file": (["--prompt_file={binary}"], "binary.txt, line 1: not valid UTF-8 (byte 0xff"),
    "broken prompt": (["--prompt=a\udcff"], "must be text; it holds parts of characters"),
    "negative count": (["--prompt=a", "--max_new_tokens=-1"], "--max_new_tokens=-1: must be an integer >= 0"),
    "negative temperature": (["--prompt=a", "--temperature=-1"], "--temperature=-1.0: must be 0 (greedy) or"),
    "not a number": (["--prompt=a", "--temperature=nan"], "--temperature=nan: must be"),
    "top_k": (["--prompt=a", "--top_k=0"], "--top_k=0: must be an integer >= 1"),
    "top_p": (["--prompt=a", "--top_p=1.5"], "--top_p=1.5: must be a number in (0, 1]"),
    "min_p": (["--prompt=a", "--min_p=-0.1"], "--min_p=-0.1: must be a number in [0, 1]"),
    "penalty": (["--prompt=a", "--repetition_penalty=0"], "--repetition_penalty=0.0: must be 1 (no penalty)"),
    "no samples": (["--prompt=a", "--num_samples=0"], "--num_samples=0: must be an integer >= 1"),
    "empty stop": (["--prompt=a", "--stop="], "--stop=: must be a text of at least one character"),
    "no workdir": (["--prompt=a", "--workdir="], "--workdir: must name the directory of a run"),
    "nothing there": (["--prompt=a", "--workdir=/none/there"], "workdir /none/there: no readable config.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_by_their_flag(name, workdir, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    files = {"empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt"}
    files["empty"].write_bytes(b"")
    files["binary"].write_bytes(b"ab\xff")
    with pytest.raises(UserError) as caught:
        run(capsys, f"--workdir={workdir}", *(argument.format(**files) for argument in arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_workdirs_that_do_not_hold_what_they_need(workdir, tmp_path, capsys):
    arguments = (f"--workdir={tmp_path}", "--prompt=a")
    config = load_config(workdir)
    save_config(config, tmp_path)
    with pytest.raises(UserError, match="no readable tokenizer"):
        run(capsys, *arguments)
    save_tokenizer(ByteTokenizer(), tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint; train into it first"):
        run(capsys, *arguments)
    small = dataclasses.replace(config, model=dataclasses.replace(MODEL, vocab_size=100))
    save_config(small, tmp_path)
    with pytest.raises(UserError, match=r"model\.vocab_size = 100: must be at least 257, the vocabulary of tokenizer"):
        run(capsys, *arguments)


def test_a_mistake_is_one_line_and_status_2():
    line = ["--workdir=/none/there", "--prompt=a"]
    workdir, context = in_forks([("generate", line), ("generate", [*line, "--context=2"])])
    check_refusal(workdir, "workdir /none/there")
    check_refusal(
        context, "--context=2: must be from 1 to the number of devices of this machine; there is 1 device (cpu)"
    )
