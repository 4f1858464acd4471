"""`model.causal_history` against a Transformer of the same weights and against the NumPy reference.

Training plans and sampled windows: tests/test_training_paths.py and tests/test_window_sampling.py.
Documents: tests/test_documents.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.test_batch_split import MESHES, check
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.test_model import golden_scale
from tlinformer_jax import DualWindowBlock, ModelConfig, build_model
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.kernels import dropout
from tlinformer_jax.models.layers import layer_norm
from tlinformer_jax.models.model import embed, hidden_states, prepare_params
from tlinformer_jax.parallel.mesh import target
from tlinformer_jax.training.loss import summed_loss

slow = pytest.mark.slow
TOLERANCE = 2e-5
CONTINUED = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, causal_history=True, token_shift=True)
LENGTH = 15  # three windows of 4 tokens, and one of 3


def continued(**changes) -> ModelConfig:
    return dataclasses.replace(CONTINUED, **changes)


def tokens_of(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, SMALL.vocab_size, (2, length)).astype(np.int32)


# ---- A Transformer, if z contains the whole history


def as_transformer(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, architecture="transformer", causal_history=False)


def layers_in_order(weights, config: ModelConfig) -> dict[str, np.ndarray]:
    """Published weights under a Transformer's names: a block's layers are compress, hidden .., restore."""
    kinds = ["compress_context_layer", *(f"hidden_layers.{j}" for j in range(config.hidden_depth))]
    kinds.append("restore_context_shape_layer")
    names = {
        f"transformer.transformer_layers.{block}.{kind}.": f"transformer.transformer_layers.{block * len(kinds) + i}."
        for block in range(config.num_blocks)
        for i, kind in enumerate(kinds)
    }
    renamed = {}
    for name, array in weights.items():
        (old,) = [old for old in names if name.startswith(old)] or [""]
        renamed[names.get(old, "") + name.removeprefix(old)] = array
    return renamed


def logits_and_gradient(config: ModelConfig, variables):
    """Logits, and the gradient of the loss as training has it."""
    model, tokens = build_model(config), tokens_of(LENGTH + 1)
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((2, LENGTH), np.float32)}

    def loss(params):
        return summed_loss(params, batch, jax.random.key(0), model=model)[0]

    both = jax.jit(lambda params: (model.apply({"params": params}, batch["inputs"]), jax.grad(loss)(params)))
    return both(variables["params"])


@pytest.mark.parametrize(
    ("hidden_depth", "plan"),
    [
        (0, ExecutionPlan(together=3, chunk=5, checkpointing=True, paired=True)),
        pytest.param(2, ExecutionPlan(segments=2, together=2, chunk=5, checkpointing=True), marks=slow),
        *(pytest.param(1, ExecutionPlan(segments=2, together=n, scan_layers=False), marks=slow) for n in (1, 3)),
    ],
    ids=["in chunks", "in groups and chunks", "one after the other", "all together"],
)
def test_it_is_a_transformer_if_z_contains_the_whole_history(hidden_depth, plan):
    """Which has no pairs of windows: a plan with them runs without."""
    config = continued(history_window=12, hidden_depth=hidden_depth, memory=plan)
    assert not config.pairable
    weights, base = golden.random_weights(config), as_transformer(config)
    logits, gradient = logits_and_gradient(config, params_from_reference(weights, config))
    truth = params_from_reference(layers_in_order(weights, config), base)
    expected, true_gradient = logits_and_gradient(base, truth)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    found = layers_in_order(params_to_reference({"params": gradient}, config), config)
    true_gradient = params_to_reference({"params": true_gradient}, base)
    assert found.keys() == true_gradient.keys()
    for name, value in true_gradient.items():
        assert np.linalg.norm(found[name] - value) <= 1e-4 * np.linalg.norm(value), name


# ---- The reference

CASES = {
    "one after the other": (LENGTH, {"hidden_depth": 2, "memory": ExecutionPlan(2)}),
    "z not full at first": (23, {"history_window": 9, "memory": ExecutionPlan(2, together=2)}),
    # z of a window begins where that of the window before ends, so that they are one slice.
    "z after z": (23, {"history_window": 4, "memory": ExecutionPlan(together=2)}),
    "in chunks": (LENGTH, {"num_blocks": 3, "memory": ExecutionPlan(chunk=2, checkpointing=True)}),
    "taps": (LENGTH, {"num_blocks": 3, "key_taps": 2, "memory": ExecutionPlan(together=3)}),
    # The last window has 60 rows of history, and z 56.
    "auto": (70, {"history_window": "auto", "generation_window": 12, "memory": ExecutionPlan(together=5)}),
    # z has no row in the second window, whose history is one token.
    "auto, one token": (9, {"history_window": "auto", "generation_window": 1}),
}


# The others take seconds to compile. tests/decoding/test_exactness.py and tests/test_properties.py have similar ones.
QUICK = ("z not full at first", "z after z", "in chunks")


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=slow) for case in CASES])
def test_logits_are_the_references(case):
    length, changes = CASES[case]
    config, tokens = continued(**changes), tokens_of(length)
    weights = golden.random_weights(config)
    found = jax.jit(build_model(config).apply)(golden_scale(config), tokens)
    np.testing.assert_allclose(found, reference.logits(weights, config, tokens), atol=TOLERANCE)
    others = reference.logits(weights, dataclasses.replace(config, causal_history=False), tokens)
    assert np.abs(found - others)[:, config.generation_window :].max() > 0.1, "it is the paper's block"


def test_blocks_of_their_own_are_the_model():
    """The last window and its history, and the first window, which has none."""
    config = continued(token_shift=False)
    params, block = golden_scale(config)["params"], DualWindowBlock(config)

    @jax.jit
    def logits_of(x, history):
        for index in range(config.num_blocks):
            x, history = block.apply({"params": params[f"blocks_{index}"]}, x, history)
        return layer_norm(x, params["norm_scale"], params["norm_bias"]) @ params["embedding"].T

    expected = reference.logits(golden.random_weights(config), config, tokens_of())
    rows = params["embedding"][tokens_of()]
    np.testing.assert_allclose(logits_of(rows[:, 12:], rows[:, :12]), expected[:, 12:], atol=TOLERANCE)
    np.testing.assert_allclose(logits_of(rows[:, :4], None), expected[:, :4], atol=TOLERANCE)


@slow
def test_later_tokens_never_matter_and_every_earlier_one_does():
    """d logits[t] / d embedding[s] is 0 for s > t and not 0 for s <= t, also for s before h."""
    config = continued(token_shift=False)
    model, variables = build_model(config), golden_scale(config)
    mixing = jnp.asarray(np.random.default_rng(1).standard_normal(config.vocab_size), jnp.float32)
    rows = variables["params"]["embedding"][tokens_of()[:1]]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def influence(rows, position):
        gradient = jax.grad(lambda rows: model.apply(variables, inputs_embeds=rows)[0, position] @ mixing)(rows)
        return jnp.abs(gradient)[0].max(-1)

    for position, found in enumerate(np.asarray(influence(rows, jnp.arange(LENGTH)))):
        assert not found[position + 1 :].any()
        assert found[: position + 1].min() > 1e-6, position


def test_windows_that_run_together_share_the_keys_of_their_history(monkeypatch):
    """On a GPU no copies of them are made: the kernel gets those of two sequences for queries of three windows each. In
    block 0 windows read none, since its `compress` has run for the whole sample."""
    shapes = []

    def recorded(query, key, *rest):
        shapes.append((len(query), len(key)))
        return jnp.zeros_like(query), jnp.zeros(query.shape[:3])

    monkeypatch.setattr(dropout, "attend_with_dropout", recorded)
    plan = ExecutionPlan(together=3, scan_layers=False)
    config = continued(num_blocks=3, dtype="bfloat16", attention="deterministic", memory=plan)
    with target("gpu", "NVIDIA H200"):
        model = build_model(config)
        jax.eval_shape(model.apply, golden_scale(config), tokens_of())
    assert shapes.count((6, 2)) == config.num_blocks - 1


@pytest.mark.parametrize("rows", [3, 6])  # z is full in every window, or not in the first ones
def test_rows_stay_in_the_compute_dtype(rows):
    """Merged softmaxes are float32; rows that became float32 would cost time and memory."""
    config = continued(history_window=rows, dtype="bfloat16", memory=ExecutionPlan(together=3))
    model = build_model(config)

    def hidden(variables):
        params = prepare_params(model.apply(variables, method=model.parameters), config)
        return hidden_states(params, config, embed(params, config, jnp.asarray(tokens_of())))

    assert jax.eval_shape(hidden, golden_scale(config)).dtype == jnp.bfloat16


# ---- Over devices


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ("data, window, context", {}),
        pytest.param("context", {"memory": ExecutionPlan(2, chunk=2, checkpointing=True)}, marks=slow),
        pytest.param("context", {"history_window": 11}, marks=slow),
        pytest.param("window", {"num_blocks": 3}, marks=slow),
        pytest.param("fsdp, tensor", {}, marks=slow),
    ],
)
def test_loss_and_gradients_on_eight_devices_are_those_of_one(axes, changes):
    check(dataclasses.replace(TRAINED, causal_history=True, token_shift=True, **changes), MESHES[axes])


# ---- Refusals


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "tlinformer"])
def test_other_architectures_do_not_have_it(architecture):
    allowed = rf"model\.causal_history = True: must be False for model\.architecture = '{architecture}'$"
    with pytest.raises(ConfigError, match=allowed):
        continued(architecture=architecture, token_shift=False, d_ff=64)


def test_windows_do_not_overlap():
    with pytest.raises(
        ConfigError, match=r"model\.causal_history = True: must be False for model\.window_overlap = 2$"
    ):
        continued(window_overlap=2)


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_kernels_that_merge_no_softmaxes_are_refused(backend):
    with pytest.raises(ConfigError, match=rf"model\.attention = '{backend}': has no log-sum-exp with a gradient"):
        continued(attention=backend)
