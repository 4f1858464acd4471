"""Generates text: `python -m tlinformer_jax generate --workdir=DIR --prompt=TEXT | --prompt_file=FILE [...]`.

Prints the continuation on stdout as it is generated, and figures on stderr. Ctrl-C, or a closed stdout, ends the
generation: the text so far stays, the figures follow, and the status is 130. A full disk behind stdout ends it with an
error.
"""

import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from tlinformer_jax import environment
from tlinformer_jax.commands import cli
from tlinformer_jax.config.train import NUM_SEEDS
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import local_path, write_bytes, writing

if TYPE_CHECKING:
    from tlinformer_jax.config.model import ModelConfig
    from tlinformer_jax.decoding.stream import GenerationStream

WORKDIR, STEP = cli.run_flags()
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "UTF-8 file with the text to continue, including its last line end."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Most new tokens per sample.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; 1 draws by probability.")
TOP_K = flags.DEFINE_integer("top_k", None, "Draw only from the k likeliest tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Draw only from the likeliest tokens with this total probability.")
MIN_P = flags.DEFINE_float("min_p", None, "Draw only from tokens at least this likely relative to the likeliest.")
REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 discourages tokens seen before.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the first sample; sample i has seed + i.", lower_bound=0, upper_bound=NUM_SEEDS - 1
)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Number of continuations of the prompt.")
CONTEXT = flags.DEFINE_integer("context", 1, "Number of devices over which the history is split.")
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype",
    "auto",
    "Dtype of the cached history: auto is the model's, int8 takes about half of bfloat16's memory. On an NVIDIA GPU "
    "a token after a long text takes less time, a slide and a prompt more.",
)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a sample; may be given several times.")
STOP_AT_END = flags.DEFINE_bool("stop_at_end", True, "Whether the tokenizer's end of text ends a sample.")
STREAM = flags.DEFINE_bool(
    "stream", True, "Print a single sample as it is generated; several samples when all are done."
)
SAVE = flags.DEFINE_string(
    "save", None, "File for the images (FILE.png) or sounds (FILE.wav) of prompt and continuation."
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per sample, with tokens and log-probabilities.")

JSON_FIELDS = ("text", "finish_reason", "tokens", "logprobs", "hits", "slides")  # of each sample
# Flags that are options of the generator with the same name.
OPTIONS = (MAX_NEW_TOKENS, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, SEED, CACHE_DTYPE)


def main() -> None:
    """Restores a checkpoint's parameters, continues the prompt, and prints text and figures."""
    try:
        interrupted = _generate()
    except KeyboardInterrupt:  # before any text was generated
        interrupted = True
    cli.check_printed()
    if interrupted:
        sys.exit(environment.INTERRUPTED)


def _generate() -> bool:
    """Generates and prints; returns whether it was interrupted."""
    prompt = _prompt()
    options: dict[str, Any] = {flag.name: flag.value for flag in OPTIONS}
    options |= {"stop_strings": STOP.value, "logprobs": JSON.value}
    options["stop_tokens"] = None if STOP_AT_END.value else ()
    if "" in STOP.value:
        raise UserError("--stop=: must be a text of at least one character")
    if NUM_SAMPLES.value < 1:
        raise UserError(f"--num_samples={NUM_SAMPLES.value}: must be an integer >= 1")
    workdir = cli.given_path(WORKDIR, "the directory of a run")
    save = _saver(workdir)

    from tlinformer_jax.decoding.context_parallel import context_mesh
    from tlinformer_jax.decoding.generator import Generator
    from tlinformer_jax.decoding.sampling import GenerationConfig
    from tlinformer_jax.training.device_memory import GENERATION_ADVICE, memory_advice
    from tlinformer_jax.training.setup import use_compilation_cache

    with memory_advice(GENERATION_ADVICE):
        with cli.errors_by_flag():
            GenerationConfig.of(options)  # checks the options before anything is loaded
            use_compilation_cache()
            generator = Generator.from_workdir(workdir, STEP.value, context_mesh(CONTEXT.value))
            stream = generator.stream([prompt] * NUM_SAMPLES.value, **options)
        interrupted = _print_samples(stream)
    if save:
        assert generator.tokenizer is not None
        before = generator.tokenizer.encode(prompt)
        save([np.append(before, sample.tokens) for sample in stream.generations])
    _print_figures(stream, generator.decoder.config)
    return interrupted


def _prompt() -> str:
    """Returns the text to continue."""
    if (PROMPT.value is None) == (PROMPT_FILE.value is None):
        raise UserError("--prompt, --prompt_file: give one of the two")
    if PROMPT.value is not None:
        if not PROMPT.value:
            raise UserError("--prompt: must hold some text; it is empty")
        return PROMPT.value
    return cli.text_of_file(PROMPT_FILE.value or "", "--prompt_file")


def _saver(workdir: pathlib.Path) -> Callable[[list[np.ndarray]], None] | None:
    """Returns a function that writes the file of --save from the samples' tokens; None without the flag."""
    if not SAVE.value:
        return None
    from tlinformer_jax.config.run import load_config
    from tlinformer_jax.data import domains

    path, data = local_path(SAVE.value, "--save"), load_config(workdir).data
    kinds = {"idx": (".png", domains.images_png), "wav": (".wav", domains.sounds_wav)}
    if data.dataset not in kinds:
        raise UserError(f"--save={path}: works only for runs with data.dataset = 'idx' or 'wav', not {data.dataset!r}")
    ending, content = kinds[data.dataset]
    if path.suffix != ending:
        raise UserError(f"--save={path}: must end in {ending} for data.dataset = {data.dataset!r}")
    if data.dataset == "idx" and math.isqrt(data.sequence_length) ** 2 != data.sequence_length:
        raise UserError(f"--save={path}: needs square images, but data.sequence_length = {data.sequence_length}")
    cli.writable_file(SAVE.value, "--save")  # checked before the work

    def save(samples: list[np.ndarray]) -> None:
        with writing(f"--save={path}:"):
            write_bytes(path, content(samples, data.sequence_length))

    return save


def _print_samples(stream: "GenerationStream") -> bool:
    """Prints the samples in the form that the flags choose; returns whether it was interrupted."""
    live = STREAM.value and NUM_SAMPLES.value == 1 and not JSON.value
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    interrupted = False
    try:
        for piece in stream:
            if live:
                print(piece.text, end="", flush=True)
            if environment.reader_is_gone():
                stream.stop()
                return True
    except KeyboardInterrupt:
        interrupted = True
        rest = stream.stop()
        if live:
            print("".join(piece.text for piece in rest), end="")
    for number, sample in enumerate(stream.generations):
        if JSON.value:
            values = {name: getattr(sample, name) for name in JSON_FIELDS}
            print(json.dumps({"sample": number, "seed": (SEED.value + number) % NUM_SEEDS, **values}))
        elif live:
            print()
        else:
            print(sample.text if NUM_SAMPLES.value == 1 else f"--- sample {number}\n{sample.text}")
    sys.stdout.flush()
    return interrupted or environment.reader_is_gone()


def _print_figures(stream: "GenerationStream", config: "ModelConfig") -> None:
    """Prints speed, hits and slides, and memory on stderr."""
    from tlinformer_jax.models.cached_attention import int8_readers

    calls = stream.calls
    if not calls:
        return
    tokens, seconds = sum(call.tokens for call in calls), sum(call.seconds for call in calls)
    lines = [
        f"{tokens:,} tokens in {seconds:.2f} s, prefill and compilation included: {tokens / seconds:,.1f} tokens/s"
    ]
    speeds = [call.tokens / call.seconds for call in calls[1:]]
    if len(speeds) > 2:  # so that a compilation does not decide the median
        lines.append(f"{statistics.median(speeds):,.1f} tokens/s in the median call after the first")
    samples = stream.generations
    hits, slides = sum(sample.hits for sample in samples), sum(sample.slides for sample in samples)
    lines.append(f"{hits:,} hits, {slides:,} slides")
    lines.append(f"cache: {stream.cache_bytes}")
    if CACHE_DTYPE.value == "int8":
        lines.append(int8_readers(config))
    print("\n".join(lines), file=sys.stderr, flush=True)
