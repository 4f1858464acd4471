"""Models with mixtures of experts (`model.num_experts`): logits, decoding, training, devices and reports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_exactness import TOLERANCE, largest_error, make_decoder, truth
from tests.parallel.test_batch_split import MODEL as SPREAD
from tests.parallel.test_batch_split import TRAIN, agree
from tests.parallel.test_batch_split import gradient as gradient_over
from tests.support import golden
from tests.support.models import SMALL
from tests.support.optional import need_modules
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.analysis.flops import active_parameters, training_flops
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES, RECURRENT
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.evaluation.report import expert_rows
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import read_weights, write_safetensors
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models import feed_forward as module
from tlinformer_jax.models.cached_attention import token_layer
from tlinformer_jax.models.cached_rows import CachedRows
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.parallel.sharding import UNSPLIT
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.optimizer import decay_mask
from tlinformer_jax.training.setup import build_run
from tlinformer_jax.training.step import batch_gradient

EXPERTS = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, num_experts=5, experts_per_token=2)


# ---- Models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_references(architecture):
    config = dataclasses.replace(EXPERTS, architecture=architecture, hidden_depth=int(architecture == "tlinformer"))
    tokens, expected = truth(config, 19, 2)
    weights = golden.random_weights(config)
    variables = params_from_reference(weights, config)
    np.testing.assert_allclose(jax.jit(build_model(config).apply)(variables, tokens), expected, atol=TOLERANCE)
    back = params_to_reference(variables, config)
    assert back.keys() == weights.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


@pytest.mark.parametrize(
    "architecture",
    [
        "tlinformer",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tconstformer", "transformer", "gated_deltanet_hybrid")
        ),
    ],
)
def test_decoding_equals_the_reference(architecture):
    config = dataclasses.replace(EXPERTS, architecture=architecture)
    assert largest_error(make_decoder(config), [3, 4, 5, 1, 12], 23) < TOLERANCE


@pytest.mark.slow
def test_a_tokens_layer_attends_by_the_kernel_and_routes_by_plain_products():
    config = dataclasses.replace(EXPERTS, architecture="transformer", d_model=24)
    layer, rng = make_decoder(config).params.layers[1], np.random.default_rng(0)
    x, *past = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 24), *[(2, 2, 12, 128)] * 2))
    rows = CachedRows(KeyValue(*past), jnp.asarray([5, 100], jnp.int32))
    plain, kernel = (
        token_layer(layer, config, x, rope_table(jnp.asarray([5, 100]), 12), rows, None, backend)
        for backend in ("plain", "triton_interpreted")
    )
    for found, expected in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain)):
        np.testing.assert_allclose(found, expected, atol=2e-5)


# ---- Training


def golden_scale(config: ModelConfig):
    return params_from_reference(golden.random_weights(config), config)["params"]


def batch_of(length: int = 16, batch: int = 2) -> dict[str, jax.Array]:
    tokens = np.random.default_rng(3).integers(0, SMALL.vocab_size, (batch, length + 1)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((batch, length), np.float32)}
    return jax.tree.map(jnp.asarray, batch)


def loss_and_gradient(config: ModelConfig, divisor: float = 32.0, **options):
    """Of the batch, and of golden-scale parameters."""

    def loss(params, batch):
        return summed_loss(params, batch, jax.random.key(0), model=build_model(config), divisor=divisor, **options)[0]

    return jax.jit(jax.value_and_grad(loss))(golden_scale(config), batch_of())


def planned(config: ModelConfig, **plan) -> ModelConfig:
    return dataclasses.replace(config, memory=ExecutionPlan(**{"scan_layers": False} | plan))


def check_equal(found, expected, tolerance: float = 1e-4) -> None:
    """Losses and gradients are equal, and gradients are not small against their tolerance."""
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    for (path, array), other in zip(jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1])):
        assert np.abs(array - other).max() < tolerance * np.abs(other).max(), jax.tree_util.keystr(path)


def router_gradients(gradient) -> dict[str, np.ndarray]:
    paths = jax.tree_util.tree_leaves_with_path(gradient)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths if "router" in path[-1].key}


def without_losses(monkeypatch) -> None:
    monkeypatch.setattr(module, "BALANCE_LOSS", 0.0)
    monkeypatch.setattr(module, "Z_LOSS", 0.0)


@pytest.mark.slow
def test_training_minimises_the_mean_loss_and_each_layers_losses(monkeypatch, own_traces):
    """The reported loss is the cross-entropy alone; its gradient that of the sum, by ordinary differentiation."""
    config, calls = planned(dataclasses.replace(EXPERTS, architecture="transformer", num_blocks=1)), []
    params, batch, key = golden_scale(config), batch_of(), jax.random.key(0)

    def loss(params):
        return summed_loss(params, batch, key, model=build_model(config), divisor=32.0)[0]

    def recorded(output, logits, chosen, weight, tally):
        calls.append((logits, chosen))
        return output

    def explicit(params):
        calls.clear()
        total = loss(params)
        for logits, chosen in calls:
            probabilities, experts = jax.nn.softmax(logits).reshape(-1, 5), jax.nn.one_hot(chosen, 5).reshape(-1, 5)
            total += 0.01 * 5 * jnp.sum(jnp.mean(experts, axis=0) * jnp.mean(probabilities, axis=0))
            total += 0.001 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        return total

    found = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(module, "_with_losses", recorded)
    jax.clear_caches()
    plain = jax.jit(jax.value_and_grad(loss))(params)
    expected = jax.jit(jax.grad(explicit))(params)
    assert len(calls) == config.num_layers
    check_equal(found, (plain[0], expected))
    difference = [np.abs(a - b).max() for a, b in zip(*(router_gradients(g[1]).values() for g in (found, plain)))]
    assert min(difference) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "blocks", "hidden", "plan"),
    [
        ("transformer", 1, 2, {"scan_layers": True, "checkpointing": True}),
        ("tlinformer", 1, 2, {"scan_layers": True, "segments": 2, "checkpointing": True}),
        ("tconstformer", 2, 0, {"checkpointing": True}),
    ],
)
def test_scanned_checkpointed_and_windowed_gradients_are_the_plain_ones(architecture, blocks, hidden, plan):
    config = dataclasses.replace(EXPERTS, architecture=architecture, num_blocks=blocks, hidden_depth=hidden)
    check_equal(loss_and_gradient(planned(config, **plan)), loss_and_gradient(planned(config)))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"causal_history": True, "history_window": 6}], ids=["published", "causal"])
def test_the_losses_count_once_however_the_history_is_cut(changes, monkeypatch, own_traces):
    """The z-loss is a mean over rows, and so the same in chunks; the balance loss is of each chunk's own."""
    monkeypatch.setattr(module, "BALANCE_LOSS", 0.0)
    config = dataclasses.replace(EXPERTS, **changes)
    whole = loss_and_gradient(planned(config, checkpointing=True))
    check_equal(loss_and_gradient(planned(config, checkpointing=True, chunk=2)), whole)
    check_equal(loss_and_gradient(planned(config)), whole)
    without_losses(monkeypatch)
    jax.clear_caches()
    plain = loss_and_gradient(planned(config, checkpointing=True))
    for found, other in zip(*(router_gradients(gradient).values() for _, gradient in (whole, plain))):
        assert np.abs(found - other).max() > 1e-3 * np.abs(other).max()


@pytest.mark.slow
def test_micro_batches_are_balanced_each_by_itself():
    config = planned(dataclasses.replace(EXPERTS, architecture="transformer", num_blocks=1))
    train, batch, step = TrainConfig(batch_size=2, accumulation=2), batch_of(), jnp.int32(0)
    params, model = golden_scale(config), build_model(config)
    together = jax.jit(functools.partial(batch_gradient, model=model, config=train, split=UNSPLIT))
    loss, _, gradient = together(batch, params, jnp.float32(32), step)

    @jax.jit
    @jax.value_and_grad
    def alone(params, batch):
        return summed_loss(params, batch, jax.random.key(0), model=model, divisor=32.0)[0]

    halves = [alone(params, jax.tree.map(lambda rows, half=half: rows[half : half + 1], batch)) for half in (0, 1)]
    check_equal((loss, gradient), jax.tree.map(jnp.add, *halves))


# ---- Devices

MESHES = {
    "expert": ({"expert": 8}, {"num_blocks": 1}),
    "expert, data, tensor": ({"expert": 2, "tensor": 2}, {}),
    "expert, window": ({"expert": 4, "window": 2}, {}),
    "transformer": ({"expert": 4, "fsdp": 2}, {"architecture": "transformer"}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "expert" else pytest.mark.slow) for n in MESHES])
def test_eight_devices_train_as_one_does(name, monkeypatch, own_traces):
    """With devices that balance their own sequences, but for the balance loss."""
    mesh, changes = MESHES[name]
    if "expert" not in mesh or mesh["expert"] < 8:
        without_losses(monkeypatch)
    config = dataclasses.replace(SPREAD, num_experts=8, experts_per_token=3, **changes)
    found = gradient_over(config, TRAIN, mesh)
    agree(gradient_over(config, TRAIN), found)
    assert any(np.abs(array).max() > 0 for array in router_gradients(found[2]).values())


def test_the_axis_is_refused_where_there_is_nothing_to_split():
    refused = "must divide model.num_experts = 4"
    for changes, allowed in (({}, "must be 1 for model.num_experts = 0"), ({"num_experts": 4}, refused)):
        config = RunConfig(
            dataclasses.replace(SMALL, vocab_size=257, **changes),
            dataclasses.replace(TRAIN, mesh="expert=8"),
            DataConfig(),
        )
        with pytest.raises(ConfigError, match=f"^train.mesh = 'expert=8': expert {allowed}"):
            build_run(config, ByteTokenizer()).initial_state()


# ---- Reports


def test_operations_and_parameters_are_those_of_the_experts_that_a_row_takes():
    """As of an ordinary feed-forward as wide as they, but for the router."""
    config = dataclasses.replace(EXPERTS, hidden_depth=0)
    dense = dataclasses.replace(config, num_experts=0, d_ff=2 * config.d_ff)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(golden_scale(model))) for model in (config, dense)]
    routers = config.num_layers * config.d_model * 5
    assert active_parameters(config) == active_parameters(dense) + routers == sizes[1] + routers
    assert sizes[0] == active_parameters(config) + config.num_layers * 3 * 3 * config.d_model * config.d_ff
    for architecture in set(ARCHITECTURES) - set(RECURRENT):  # whose own widths depend on d_ff
        routed, wide = (dataclasses.replace(model, architecture=architecture) for model in (config, dense))
        few, many = (dataclasses.replace(model, num_experts=number) for model in (routed,) for number in (4, 8))
        assert training_flops(many, 19) - training_flops(few, 19) == pytest.approx(
            training_flops(few, 19) - training_flops(wide, 19)
        )
        assert training_flops(many, 19) < 1.2 * training_flops(wide, 19)


@pytest.mark.slow
def test_the_load_of_experts_is_that_of_the_rows_that_they_take(monkeypatch):
    config, chosen = planned(dataclasses.replace(EXPERTS, architecture="transformer", num_blocks=1)), []
    model, params, batch = build_model(config), golden_scale(config), batch_of()
    found = jax.jit(functools.partial(expert_rows, model=model))(params, batch)
    real = module.choose
    monkeypatch.setattr(module, "choose", lambda *given: chosen.append(real(*given)[1]) or real(*given))

    def all_chosen(params):
        model.apply({"params": params}, batch["inputs"])
        return list(chosen)

    expected = [np.bincount(np.ravel(experts), minlength=5) for experts in jax.jit(all_chosen)(params)]
    np.testing.assert_array_equal(found, expected)
    monkeypatch.undo()
    windowed = jax.jit(functools.partial(expert_rows, model=build_model(planned(EXPERTS))))(
        golden_scale(EXPERTS), batch
    )
    assert windowed.shape == (EXPERTS.num_layers, 5)
    assert windowed.sum(axis=1).min() >= 2 * 2 * 16, "two experts for each row of two sequences of 16"


def test_a_router_and_experts_decay_and_begin_as_ordinary_kernels_do():
    config = dataclasses.replace(EXPERTS, hidden_depth=1, d_model=64, d_ff=128)
    params = jax.jit(build_model(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    layer, decays = params["blocks_0"]["compress"], decay_mask(TRAIN, params)["blocks_0"]["compress"]
    stds = {"router_kernel": 0.02, "experts_gate_up_kernel": 0.02, "experts_down_kernel": 0.02 / 12**0.5}
    for name, std in stds.items():
        assert layer[name].std() == pytest.approx(std, rel=0.1)
        assert decays[name]


@pytest.mark.slow
def test_the_pytorch_module_refuses_experts(tmp_path):
    need_modules("torch", "safetensors", extra="torch")
    from tlinformer_jax.interop.pytorch import from_safetensors

    path = tmp_path / "experts.safetensors"
    write_safetensors(path, golden.random_weights(EXPERTS), EXPERTS)
    assert params_from_reference(read_weights(path), EXPERTS)
    with pytest.raises(ValueError, match=r"num_experts = 5: must be 0, this module has no experts$"):
        from_safetensors(path)


def test_more_experts_a_token_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"^model.experts_per_token = 3: must be at most model.num_experts = 2$"):
        ModelConfig(num_experts=2, experts_per_token=3)
    ModelConfig(num_experts=1, experts_per_token=3)
