"""The paper's recipe: updates, learning rates and gradients against formulas of spec/paper.md worked out here.

S is the number of samples an epoch, m the micro-batch; 256 sequences make an update.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import golden
from tests.test_configs import get_config, load
from tlinformer_jax.config.run import run_config
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data import wikitext103
from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.models import build_model
from tlinformer_jax.training.callbacks import Evaluate
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.optimizer import build_optimizer, learning_rate_schedule, run_horizon
from tlinformer_jax.training.step import TrainState, train_step

# GPT-2 tokens of WikiText-103's training rows: any number with 908 updates an epoch at N = 512 is like the real one.
WIKITEXT_TOKENS = 118_950_000
A_MILLIONTH = 3e-10  # of the peak rate


def paper_updates(samples: int, micro: int, epochs: int, batch: int = 256) -> int:
    # `batch` is the paper's 256 sequences, or fewer in a rehearsal
    return epochs * math.ceil(math.ceil(samples / micro) / (batch / micro))


def paper_rate(update: int, samples: int, micro: int, epochs: int = 10, warmup: int = 2000) -> float:
    if update < warmup:
        return 3e-4 * update / warmup
    total = epochs * math.ceil(samples / micro)
    return 3e-4 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def stream_of(num_tokens: int) -> TokenStream:
    """As many tokens, which take no memory."""
    return TokenStream(np.broadcast_to(np.uint16(0), num_tokens), num_tokens, 1)


def batches_of(config: TrainConfig, stream: TokenStream, length: int) -> TrainingBatches:
    return TrainingBatches(
        stream, length, config.batch_size, config.seed, config.equal_updates, config.micro_batch_size
    )


def evaluations(config, batches, last):
    """The updates before the last one after which a run is evaluated."""
    session = SimpleNamespace(run=SimpleNamespace(last_step=last), reader=SimpleNamespace(batches=batches))
    evaluate = Evaluate(config.eval_every, session, None)
    return {step for step in range(last + 1) if evaluate.is_due(step)}


@pytest.mark.parametrize(
    ("variant", "length", "micro", "updates"),
    [
        ("paper-512-512-0.5", 512, 32, 9080),
        ("paper-1k-512-0.5", 1024, 16, 4540),
        ("paper-2k-2k-0.5", 2048, 8, 2270),
    ],
)
def test_updates_and_learning_rates_on_a_corpus_of_wikitexts_size(variant, length, micro, updates):
    config = load("wt103", variant).train
    batches = batches_of(config, stream_of(WIKITEXT_TOKENS), length)
    samples = (WIKITEXT_TOKENS - 1) // length
    horizon = run_horizon(config, batches)
    assert (batches.samples_per_epoch, config.micro_batch_size) == (samples, micro)
    assert horizon.steps == updates == paper_updates(samples, micro, epochs=10)

    rates = learning_rate_schedule(config, horizon)(jnp.arange(updates))
    expected = [paper_rate(update, samples, micro) for update in range(updates)]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=A_MILLIONTH)
    assert expected[-1] > 0.97 * 3e-4

    each = updates // 10
    assert evaluations(config, batches, updates) == {each * epoch for epoch in range(1, 10)}
    sizes = [int((batches.indices(step) >= 0).sum()) for step in (0, each - 2, each - 1, each)]
    last = samples - (each - 1) * 256
    assert sizes == [256, 256, last, 256]
    assert 0 < last < 256
    assert last % micro, "so that the last micro-batch is short, too"


@pytest.mark.parametrize("micro", [32, 16, 8])
@pytest.mark.parametrize("samples", [1, 31, 32, 33, 255, 256, 257, 1000, 1024, 5000])
def test_updates_of_any_number_of_samples(samples, micro):
    config = dataclasses.replace(load("wt103", "paper-512-512-0.5").train, accumulation=256 // micro, warmup_steps=2)
    batches = batches_of(config, stream_of(4 * samples + 3), 4)
    horizon = run_horizon(config, batches)
    assert batches.samples_per_epoch == samples
    assert horizon.steps == paper_updates(samples, micro, epochs=10)
    rates = learning_rate_schedule(config, horizon)(jnp.arange(horizon.steps))
    expected = [paper_rate(update, samples, micro, warmup=2) for update in range(horizon.steps)]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=A_MILLIONTH)


@pytest.mark.slow
def test_gradients_are_those_of_the_papers_micro_batches():
    """13 samples in updates of 8 by micro-batches of 2: the epoch's last update holds 2 + 2 + 1 rows."""
    shrunk = get_config("wt103", "paper-512-512-0.5")
    shrunk.model.update(d_model=16, num_heads=2, num_blocks=1, hidden_depth=0, d_ff=32, vocab_size=257, dropout=0.0)
    shrunk.model.update(history_window=4, generation_window=4)
    shrunk.train.update(batch_size=8, accumulation=4, warmup_steps=1)
    config = run_config(shrunk)
    model, length = build_model(config.model), 12
    tokens = np.random.default_rng(3).integers(0, 257, 13 * length + 5).astype(np.uint16)
    batches = batches_of(config.train, TokenStream(tokens, len(tokens), 1), length)
    horizon = run_horizon(config.train, batches)
    assert (batches.samples_per_epoch, horizon.steps, horizon.decay_end) == (13, 20, 70)

    def mean_loss(params, rows):
        logits = model.apply({"params": params}, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    micro_gradient = jax.jit(jax.grad(mean_loss))
    optimizer = build_optimizer(config.train, horizon)
    apply = jax.jit(optimizer.update)
    params = params_from_reference(golden.random_weights(config.model), config.model)["params"]
    opt_state = optimizer.init(params)
    state = TrainState(jnp.int32(0), params, opt_state)
    ours = jax.jit(lambda state, batch: train_step(state, batch, model=model, config=config.train, horizon=horizon))

    counts = []
    for update in range(4):
        chosen = [index for index in batches.indices(update) if index >= 0]
        counts.append(len(chosen))
        gradient = jax.tree.map(jnp.zeros_like, params)
        for first in range(0, len(chosen), 2):
            rows = [tokens[i * length : i * length + length + 1] for i in chosen[first : first + 2]]
            part = micro_gradient(params, np.array(rows, np.int32))
            gradient = jax.tree.map(lambda total, new: total + new / 4, gradient, part)
        updates, opt_state = apply(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)

        state, metrics = ours(state, batches.batch(update))
        assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
        for value, truth in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(opt_state), strict=True):
            value, truth = np.asarray(value), np.asarray(truth)
            assert np.linalg.norm(value - truth) <= 1e-4 * np.linalg.norm(truth)
    assert counts == [8, 5, 8, 5]
    for value, truth in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(value, truth, rtol=0, atol=3e-5)


ARTICLE = (
    [" \n", " = Valkyria Chronicles III = \n", " \n"]
    + [" Senjō no Valkyria 3 : <unk> Chronicles ( Japanese : 戦場のヴァルキュリア3 ) is a role @-@ playing game . \n"]
    * 4
    + [" \n", " = = Gameplay = = \n", " \n"]
    + [" Troops are divided into five classes : Scouts , <unk> , Engineers , Lancers and Armored Soldier . \n"] * 3
)
LINES = {"train": ARTICLE * 8, "valid": ARTICLE, "test": ARTICLE[:5]}


@pytest.fixture
def filled_cache(tmp_path, monkeypatch, own_cache) -> None:
    """A cache that a user filled by hand with a small file of the real format."""
    published = wikitext103.VARIANTS["wikitext103"]
    path = tmp_path / "cache" / "downloads" / published.zip_name
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, lines in LINES.items():
            archive.writestr(published.member.format(split), "".join(lines))
    data = path.read_bytes()
    splits = {ours: LINES[theirs] for ours, theirs in wikitext103.ZIP_SPLITS.items()}
    small = dataclasses.replace(published, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    words = {split: sum(len(line.split()) for line in lines) for split, lines in splits.items()}
    monkeypatch.setattr(wikitext103, "ROWS", {split: len(lines) for split, lines in splits.items()})
    monkeypatch.setattr(wikitext103, "WORDS", words)
    monkeypatch.setitem(wikitext103.VARIANTS, "wikitext103", small)


def sample_count(lines: list[str], length: int) -> int:
    """Samples of `length` in the GPT-2 tokens of the rows, each with its end."""
    tokenizer = build_tokenizer("gpt2")
    rows = ["" if line == " \n" else line for line in lines]
    return (sum(len(tokenizer.encode(row)) + 1 for row in rows) - 1) // length


@pytest.mark.slow
def test_rehearsal_of_two_epochs_on_real_rows(tmp_path, filled_cache):
    """The whole way from a hand-filled directory to metrics.jsonl; only the sizes are smaller."""
    length, warmup, batch, micro = 8, 3, 64, 8
    config = get_config("wt103", "paper-512-512-0.5")
    config.model.update(d_model=16, num_heads=2, num_blocks=1, hidden_depth=0, d_ff=16)
    config.model.update(history_window=4, generation_window=4)
    config.data.sequence_length = length
    config.train.update(
        steps="2epochs", warmup_steps=warmup, batch_size=batch, accumulation=batch // micro, log_every=1
    )
    final = train_and_evaluate(config, tmp_path / "run")

    samples = sample_count(LINES["train"], length)
    assert samples % batch % micro, "the last update is short, and its last micro-batch, too"
    updates = paper_updates(samples, micro, epochs=2, batch=batch)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/loss" in line}
    assert list(rates) == list(range(1, updates + 1))
    expected = [paper_rate(update, samples, micro, epochs=2, warmup=warmup) for update in range(updates)]
    np.testing.assert_allclose(list(rates.values()), expected, rtol=0, atol=A_MILLIONTH)
    assert updates > warmup + 3

    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert all(math.isfinite(loss) for loss in losses)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [updates // 2, updates]
    for line in evaluations:
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"]), rel=1e-6)
    assert evaluations[1]["eval/loss"] < evaluations[0]["eval/loss"] < math.log(50257) + 1
    assert final["loss"] == evaluations[1]["eval/loss"]


def test_evaluations_by_epoch_where_epochs_run_into_each_other():
    """With equal updates an epoch ends within an update; the evaluation follows that update."""
    config = TrainConfig(steps=20, batch_size=8, eval_every="epoch")
    batches = batches_of(config, stream_of(11 * 4 + 1), 4)
    seen = itertools.accumulate([8] * 20)
    ends = {step for step, rows in enumerate(seen, 1) if rows // 11 > (rows - 8) // 11}
    assert evaluations(config, batches, 20) == ends - {20}
