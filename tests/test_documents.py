"""Documents that share a sample and do not see each other: `data.document_masking`, on every path that reads rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.test_batch_split import MESHES, gradient, gradient_error
from tests.parallel.test_batch_split import MODEL as SPREAD
from tests.parallel.test_batch_split import batch as spread_batch
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.run import RunConfig, run_config
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.streams import DocumentPiece, TokenStream, encode_pieces
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.evaluation.history import measure_history
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.kernels.common import Scores
from tlinformer_jax.models import attention, block, key_rows
from tlinformer_jax.models import history as model_history
from tlinformer_jax.models.attention import attend
from tlinformer_jax.models.layers import Dropout
from tlinformer_jax.training.check import check_run
from tlinformer_jax.training.checkpoint import load_run
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.setup import build_run

slow = pytest.mark.slow
TOLERANCE = 2e-5
LENGTH = 27  # six windows of 4 tokens, and one of 3
# Within a window, over several, from a window's edge on; the last is longer than the observation window of 3.
LAYOUTS = ([3, 2, 6, 1, 15], [9, 8, 10])
WINDOWED = dataclasses.replace(SMALL, history_window=3)
SHAPES = {
    "paper's block": {"hidden_depth": 2},
    "tconstformer": {"architecture": "tconstformer"},
    "transformer": {"architecture": "transformer"},
    "sliding_window": {"architecture": "sliding_window", "token_shift": True},
    "auto": {"history_window": "auto", "generation_window": 6},
    "overlap": {"window_overlap": 2, "hidden_depth": 0},
    "shift": {"token_shift": True, "key_taps": 2, "num_blocks": 3},
    "options": {"longest_wavelength": 20, "token_shift": True, "key_taps": 3, "window_overlap": 1},
    "causal history": {"causal_history": True, "token_shift": True, "key_taps": 2, "history_window": 5},
    "experts": {"num_experts": 3, "experts_per_token": 2},
}
PLANS = {
    "one after the other": ExecutionPlan(segments=2),
    "together": ExecutionPlan(segments=2, together=3, scan_layers=False),
    "checkpointing": ExecutionPlan(segments=2, together=2, checkpointing=True),
    "chunks": ExecutionPlan(chunk=2, checkpointing=True),
    "pairs": ExecutionPlan(checkpointing=True, paired=True),
}


def shaped(shape: str, plan: str = "one after the other", **changes) -> ModelConfig:
    return dataclasses.replace(WINDOWED, memory=PLANS[plan], **SHAPES[shape], **changes)


def documents_of(*layouts: list[int]) -> np.ndarray:
    return np.stack([np.repeat(np.arange(len(sizes)), sizes) for sizes in layouts]).astype(np.int32)


DOCUMENTS = documents_of(*LAYOUTS)


def tokens_of(config: ModelConfig, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (len(LAYOUTS), LENGTH + 1)).astype(np.int32)


def variables_of(config: ModelConfig):
    return params_from_reference(golden.random_weights(config), config)


def batch_of(config: ModelConfig, tokens: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights, "documents": DOCUMENTS}


def trained(config: ModelConfig, batch, windows=None):
    """The summed loss, and its gradient."""
    loss = functools.partial(summed_loss, model=build_model(config))
    function = jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays)[0]))
    return function(variables_of(config)["params"], batch, jax.random.key(0), windows)


# ---- Equal to the reference


@pytest.mark.parametrize(
    ("shape", "plan"),
    [("paper's block", "one after the other"), ("options", "together"), ("sliding_window", "one after the other")]
    + [pytest.param(shape, "together", marks=slow) for shape in SHAPES if shape not in ("options", "sliding_window")]
    + [pytest.param(shape, "chunks", marks=slow) for shape in ("paper's block", "causal history")],
)
def test_logits_are_the_references_and_at_a_windows_edge_as_if_alone(shape, plan):
    """Where a document begins at an edge, windows are cut as if it began the sample; 'auto' observes more, the further
    from the beginning."""
    config = shaped(shape, plan)
    tokens, weights = tokens_of(config)[:, :-1], golden.random_weights(config)
    logits, variables = jax.jit(build_model(config).apply), variables_of(config)
    found = logits(variables, tokens, documents=DOCUMENTS)
    np.testing.assert_allclose(found, reference.logits(weights, config, tokens, DOCUMENTS), atol=TOLERANCE)
    others = np.abs(found - reference.logits(weights, config, tokens))[DOCUMENTS > 0]
    assert others.max(-1).min() > 1e-3, "others would be seen"

    begin, rest = 12, 6 if config.history_window == "auto" else None  # of a first window, which observes nothing
    found = logits(variables, tokens, documents=documents_of([5, 7, 15], [12, 15]))[:, begin:][:, :rest]
    alone = reference.logits(weights, config, tokens[:, begin:])[:, :rest]
    np.testing.assert_allclose(found, alone, atol=TOLERANCE)


@slow
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ("options", "checkpointing"),
        ("paper's block", "chunks"),
        ("shift", "together"),
        ("shift", "pairs"),
        ("causal history", "chunks"),
        ("causal history", "checkpointing"),
    ],
)
def test_loss_and_gradient_are_the_references(shape, plan):
    """The gradient along the weights themselves."""
    config = shaped(shape, plan)
    weights, tokens = golden.random_weights(config), tokens_of(config)
    counted = np.random.default_rng(4).integers(0, 2, (len(LAYOUTS), LENGTH)).astype(np.float32)

    def truth(factor: float) -> float:
        scaled = {name: np.asarray(array, np.float64) * factor for name, array in weights.items()}
        logits = reference.logits(scaled, config, tokens[:, :-1], DOCUMENTS)
        pairs = zip(logits.reshape(-1, 1, config.vocab_size), tokens[:, 1:].reshape(-1, 1))
        return float(np.dot([reference.mean_loss(*pair) for pair in pairs], counted.reshape(-1)))

    value, gradients = trained(config, batch_of(config, tokens, counted))
    assert float(value) == pytest.approx(truth(1), rel=1e-5)
    slope = (truth(1 + 1e-6) - truth(1 - 1e-6)) / 2e-6
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(variables_of(config)["params"]), strict=True)
    assert sum(np.vdot(*pair) for pair in pairs) == pytest.approx(slope, rel=1e-3)


# ---- Nothing of another document is seen


def leak(config: ModelConfig, windows=None, with_logits: bool = False) -> float:
    """How much loss and gradient (and logits) of a sample's other documents change with one document's tokens."""
    tokens, other, params = tokens_of(config), tokens_of(config, seed=1), variables_of(config)["params"]
    built = build_model(config)
    loss = functools.partial(summed_loss, model=built)

    @jax.jit
    def outcome(params, batch, kept):
        update = jax.value_and_grad(lambda params: loss(params, batch, jax.random.key(0), windows)[0])(params)
        if not with_logits:
            return update
        logits = built.apply({"params": params}, batch["inputs"], documents=batch["documents"])
        return jnp.where(kept[..., None], logits, 0), update

    largest = 0.0
    for changed in range(3):
        kept = changed != DOCUMENTS
        before = batch_of(config, tokens, kept.astype(np.float32))  # the labels stay: a document's are its own
        after = before | {"inputs": np.where(kept, tokens[:, :-1], other[:, :-1])}
        pairs = zip(*(jax.tree.leaves(outcome(params, batch, kept)) for batch in (before, after)), strict=True)
        largest = max(largest, *(float(np.abs(np.asarray(one) - two).max()) for one, two in pairs))
    return largest


@pytest.mark.parametrize(
    ("shape", "plan", "backend"),
    [("transformer", "together", "xla")]
    + [
        pytest.param("options", "together", "xla", marks=slow),
        pytest.param("paper's block", "chunks", "xla", marks=slow),
        pytest.param("paper's block", "pairs", "xla", marks=slow),
    ]
    + [
        pytest.param(shape, "checkpointing", "xla", marks=slow)
        for shape in ("paper's block", "tconstformer", "sliding_window", "auto", "causal history")
    ]
    + [pytest.param(shape, "together", "splash", marks=slow) for shape in ("overlap", "sliding_window")],
)
def test_a_changed_document_changes_nothing_of_the_others(shape, plan, backend):
    """Logits where they are quickly compiled: the loss that each test asks for is made of the same rows."""
    with_logits = shape in ("options", "transformer", "sliding_window")
    assert leak(shaped(shape, plan, attention=backend), with_logits=with_logits) == 0


@slow
def test_neither_does_it_with_dropout_in_chunks_of_queries_nor_with_sampled_windows(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_SCORES", 2 * 2 * LENGTH * 3)
    assert leak(shaped("options", "checkpointing", hidden_depth=0, dropout=0.2), jnp.array([1, 3, 6])) == 0


@slow
def test_experts_do_not_carry_it_over():
    config = shaped("experts")
    tokens, other = tokens_of(config)[:, :-1], tokens_of(config, seed=1)[:, :-1]
    mixed, logits = np.where(DOCUMENTS == 1, other, tokens), jax.jit(build_model(config).apply)
    found = (np.asarray(logits(variables_of(config), each, documents=DOCUMENTS)) for each in (tokens, mixed))
    np.testing.assert_array_equal(*(array[DOCUMENTS != 1] for array in found))


def seen_causal(monkeypatch):
    real = block.attend

    def mutated(*qkv, scores, documents=None, **rest):
        return real(*qkv, scores, documents=None if scores.causal else documents, **rest)

    monkeypatch.setattr(block, "attend", mutated)


def seen_in_compress(monkeypatch):
    real = model_history.attend
    monkeypatch.setattr(model_history, "attend", lambda *qkv, **rest: real(*qkv, **rest | {"documents": None}))


def seen_in_hidden(monkeypatch):
    real = block.hidden

    def mutated(layer, config, z, x, dropout):
        return real(layer, config, dataclasses.replace(z, documents=None), x, dropout)

    monkeypatch.setattr(block, "hidden", mutated)


def seen_by_x_in_restore(monkeypatch):
    real = block.restore

    def mutated(layer, config, C, z, *rest):
        return real(layer, config, C, dataclasses.replace(z, documents=None), *rest)

    monkeypatch.setattr(block, "restore", mutated)


def seen_by_c_in_restore(monkeypatch):
    real = model_history.restore_rows

    def mutated(config, never_empty, C, Qc, layer, mask, documents):
        return real(config, never_empty, C, Qc, layer, mask._replace(documents=None))

    monkeypatch.setattr(model_history, "restore_rows", mutated)


def seen_by_the_token_shift(monkeypatch):
    monkeypatch.setattr(key_rows, "begins", lambda documents, back: jnp.zeros(documents.shape, bool))


MUTATIONS = [seen_in_hidden]
SLOW_MUTATIONS = [seen_causal, seen_in_compress, seen_by_x_in_restore, seen_by_c_in_restore, seen_by_the_token_shift]
MUTATIONS += [pytest.param(mutation, marks=slow) for mutation in SLOW_MUTATIONS]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_read_without_the_mask_is_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = shaped("options")
    tokens = tokens_of(config)[:, :-1]
    found = jax.jit(build_model(config).apply)(variables_of(config), tokens, documents=DOCUMENTS)
    error = np.abs(found - reference.logits(golden.random_weights(config), config, tokens, DOCUMENTS))
    assert error.max() > 1000 * TOLERANCE


# ---- Over devices


@functools.cache
def spread_gradient(axes: str | None):
    config = dataclasses.replace(SPREAD, token_shift=True, key_taps=3, window_overlap=1)
    data = spread_batch()
    ids = documents_of(*[[5, 14, 1, 23] if row % 2 else [17, 2, 24] for row in range(len(data["inputs"]))])
    return gradient(config, TrainConfig(), MESHES.get(axes), data | {"documents": jnp.asarray(ids)})


@slow
@pytest.mark.parametrize("axes", ["window", "data, window, context", "data, fsdp, tensor"])
def test_gradients_over_devices_are_those_of_one(axes):
    one, many = spread_gradient(None), spread_gradient(axes)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert gradient_error(one, many) < 1e-4


# ---- Runs

DATA = DataConfig(sequence_length=LENGTH, document_masking=True)
TEXT = ["a cat", "", "the dog barks at night, and the moon is full of it", "no", "what is this?"]


def text_stream() -> TokenStream:
    tokens, counts = encode_pieces(
        [DocumentPiece(text, "", ends=True) for text in TEXT], ByteTokenizer(), np.dtype(np.uint16)
    )
    return TokenStream(tokens, counts.num_bytes, counts.num_documents)


def test_an_evaluation_is_the_references():
    """Documents by hand: each after an end-of-text, in pieces of LENGTH, alone in a sample."""
    config = dataclasses.replace(WINDOWED, vocab_size=257, architecture="transformer")
    run = build_run(RunConfig(config, TrainConfig(batch_size=4), DATA), ByteTokenizer())
    stream = run.checked("validation", text_stream())
    weights, tokens, expected, start = golden.random_weights(config), stream.tokens.astype(int), 0.0, 0
    for text in TEXT:
        stop = start + len(text) + (start > 0)
        for begin in range(start, stop, LENGTH):
            cut = tokens[begin : min(begin + LENGTH, stop) + 1]
            logits = reference.logits(weights, config, cut[None, :-1])
            expected += reference.mean_loss(logits, cut[None, 1:]) * (len(cut) - 1)
        start = stop
    result = run.evaluate(jax.device_put(variables_of(config)["params"], run.shardings.params), stream)
    assert result.tokens == len(stream.tokens) - 1, "every token but the first, once"
    assert result.losses.sum() == pytest.approx(expected, rel=1e-5)


@slow
def test_a_run_trains_and_says_what_it_packs(tmp_path, capfd):
    config = dataclasses.replace(WINDOWED, vocab_size=257, hidden_depth=0, attention="auto")
    train = TrainConfig(steps=2, batch_size=8, learning_rate=1e-3, warmup_steps=1, log_every=1, eval_every=2)
    run = RunConfig(config, train, dataclasses.replace(DATA, sequence_length=64))
    figures = train_and_evaluate(run, tmp_path)
    assert figures is not None
    assert 2 < figures["loss"] < 8
    told = capfd.readouterr().err
    assert "no token sees another document; attention by 'xla'" in told
    assert "of packed documents, 0." in told
    with pytest.raises(UserError, match=r"history: data\.document_masking = True: must be False"):
        measure_history(load_run(tmp_path), load_run(tmp_path).run.split("validation"))
    assert "of packed documents" in check_run(run, compile_step=True)


def test_data_in_its_own_order_is_refused(tmp_path):
    data = dataclasses.replace(DATA, dataset="tokens", tokenizer="ids:256")
    run = RunConfig(dataclasses.replace(WINDOWED, vocab_size=257), TrainConfig(steps=1), data)
    documents = [[1, 2, 3] * 20, [4, 5] * 20]
    refused = r"data\.document_masking = True: must be False if train_data is an iterable"
    with pytest.raises(ConfigError, match=refused):
        train_and_evaluate(run, tmp_path, train_data=documents, validation_data=documents)


# ---- Attention, and what does not have it


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_query_without_keys_gets_nothing_and_gives_nothing(backend):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, n, 2, 12)), jnp.float32) for n in (5, 7, 7)]
    ids = jnp.array([[0, 0, 1, 2, 9]] * 2), jnp.array([[0, 0, 0, 1, 1, 2, 3]] * 2)
    options = {"scores": Scores(1.0), "documents": ids, "key_length": jnp.array([7, 5]), "backend": backend}

    def total(*arrays):
        return (attend(*arrays, **options) ** 2).sum()

    output = np.asarray(attend(*arrays, **options))
    gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    assert not output[:, 4].any()
    assert not output[1, 3].any(), "its only key is past the valid ones"
    assert output[0, 3].all()
    np.testing.assert_allclose(output[:, 3][0], arrays[2][0, 5], atol=1e-5)  # a single key
    assert all(np.isfinite(array).all() for array in gradients)
    assert not np.asarray(gradients[0])[:, 4].any()
    assert not np.asarray(gradients[1])[:, 6].any()


@pytest.mark.parametrize("backend", ["cudnn", "triton"])
def test_a_kernel_without_masks_refuses(backend):
    arrays, ids = [jnp.zeros((1, 2, 1, 8), jnp.float32)] * 3, jnp.zeros((1, 2), jnp.int32)
    dropout = Dropout.by_key(jax.random.key(0), 0.1) if backend == "triton" else None
    with pytest.raises(ValueError, match=f"'{backend}' does not support .*documents"):
        attend(*arrays, Scores(1.0), backend=backend, documents=(ids, ids), dropout=dropout)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "model",
            {"architecture": "gated_deltanet", "d_ff": 64},
            "model.architecture = 'gated_deltanet', which cannot",
        ),
        ("model", {"attention": "cudnn"}, "model.attention = 'cudnn', which cannot"),
        ("data", {"dataset": "copy", "tokenizer": "numbers:9"}, "data.dataset = 'copy', each sample of which is one"),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused(section, values, message):
    given = {"model": {"d_model": 16, "num_heads": 2}, "data": {"document_masking": True}}
    with pytest.raises(ConfigError, match=f"data.document_masking = True: must be False for {message}"):
        run_config(given | {section: given[section] | values})
