"""The block's equations stand once, in `models/block.py`, and those of `causal_history` in its own file; and a window
without history costs nothing for it."""

import ast
import pathlib
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import tlinformer_jax
from tlinformer_jax.models import ModelConfig, build_model
from tlinformer_jax.parallel.mesh import target

PACKAGE = pathlib.Path(tlinformer_jax.__file__).parent
# What computes attention, by the name that it is called by.
ATTENTION = {"attend", "attend_cached", "attend_chunk", "attend_context", "attend_history", "attend_parts"}
ATTENTION |= {"attend_few", "attend_splash", "attend_with_dropout", "attend_with_lse"}
ATTENTION |= {"dot_product_attention", "softmax"}
# The files in which something calls one of these, and what for.
CALLERS = {
    "models/block.py": "the equations",
    "models/causal_history.py": "the equations with `causal_history`",
    "models/history.py": "attend(Q, Kc, Vc), as `compress` reads a history that is kept whole; and `restore_rows`",
    "models/paired.py": "the same of two windows whose histories share an array, and `restore` of their rows",
    "decoding/history.py": "the same of one that is kept as a cache",
    "models/cached_attention.py": "the same, and the token step",
    "models/model.py": "the baselines' layers",
    "decoding/layered.py": "the baselines' prefill",
    "models/attention.py": "attention itself",
    "evaluation/history.py": "how a block that is run as above spreads its attention, measured",
    "models/feed_forward.py": "softmax of a router, which chooses experts",
}


def callers(tree: ast.AST, names: set[str], inside: str = "") -> Iterator[str]:
    """Functions (of a class: Class.method), not those inside of them, in which something of these names is called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from callers(node, names, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            called = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
            if names & {getattr(name, "attr", getattr(name, "id", "")) for name in called}:
                yield inside + node.name


def found(names: set[str]) -> dict[str, set[str]]:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "interop" / "pytorch.py"]  # PyTorch's copy
    trees = {path: ast.parse(path.read_text()) for path in files}
    places = {path.relative_to(PACKAGE).as_posix(): set(callers(tree, names)) for path, tree in trees.items()}
    return {place: functions for place, functions in places.items() if functions}


def test_attention_is_called_by_the_equations_alone():
    places = found(ATTENTION)
    assert set(places) == set(CALLERS)
    assert places["models/block.py"] == {"compress", "hidden", "restore"}
    assert places["models/causal_history.py"] == {"_attend_side_by_side", "_window_parts", "_x_parts", "compressed"}
    assert places["models/history.py"] == {"History.read", "History._read_first", "restore_rows"}
    assert places["models/paired.py"] == {"PairedHistory.read", "PairedHistory.restore"}
    assert places["decoding/history.py"] == {"CachedHistory._read_first"}
    assert places["models/model.py"] == {"forward_layers"}


def test_the_equations_are_called_by_the_block_and_by_the_decoder_alone():
    files = found({"compress", "hidden"})
    assert files.pop("data/domains.py") == {"png"}  # zlib's compress
    assert files.pop("models/causal_history.py") == {"restore"}  # which begins as `hidden`
    assert set(files) == {"models/block.py", "decoding/windowed.py"}
    assert files["models/block.py"] == {"dual_window_block"}
    assert len(files["decoding/windowed.py"]) == 1
    assert found({"read"})["models/block.py"] == {"compress"}
    # How `restore` maps it.
    assert not found({"restore_rows"}).keys() - {"models/history.py", "models/paired.py", "decoding/history.py"}


def products(config: ModelConfig, length: int) -> tuple[int, int]:
    """Matrix products of a gradient, and operations that work on no values."""
    model, tokens = build_model(config), jnp.zeros((2, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    key = jax.random.key(1)

    def total(params):
        return model.apply(params, tokens, train=True, rngs={"dropout": key}).sum()

    def count(jaxpr) -> tuple[int, int]:
        dots = empty = 0
        for equation in jaxpr.eqns:
            inner = [count(one) for one in jax.extend.core.jaxprs_in_params(equation.params)]
            dots += (equation.primitive.name == "dot_general") + sum(part[0] for part in inner)
            computes = equation.primitive.name in ("dot_general", "exp", "rsqrt", "logistic", "mul")
            empty += computes and any(0 in value.aval.shape for value in equation.outvars + equation.invars)
            empty += sum(part[1] for part in inner)
        return dots, empty

    return count(jax.make_jaxpr(jax.grad(total))(params).jaxpr)


@pytest.mark.parametrize(("architecture", "dropout"), [("tlinformer", 0.1), ("tconstformer", 0.0)])
def test_a_window_without_history_compiles_no_more_than_causal_layers(architecture, dropout):
    shape = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "generation_window": 8, "history_window": 8}
    shape |= {"dropout": dropout, "dtype": "float32"}
    config, causal = (ModelConfig(architecture=name, **shape) for name in (architecture, "transformer"))
    with target("gpu", "of no maker"):  # where no layers are scanned
        found, expected = products(config, 7), products(causal, 7)
    assert found == expected
    assert found[1] == 0
