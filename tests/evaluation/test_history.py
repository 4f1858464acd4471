"""What the history contributes, against the NumPy reference with rows taken away or swapped, one window at a time."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from tests.evaluation.runs import LENGTH, MODEL, trained, weights
from tests.support import reference
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.batches import take_samples
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.errors import UserError
from tlinformer_jax.evaluation.history import distance_edges, measure_history

DEEP = dataclasses.replace(MODEL, hidden_depth=1, history_window=3)
# Each distance and each size of a batch compiles programs: one case with windows and one without have a smaller last
# batch, and a distance that ends within a window.
FEW = {"samples": 2, "distances": (0, 9), "batch_size": 2}
OPTIONS = {"samples": 3, "distances": (0, 5, 9), "batch_size": 2}


@functools.cache
def double(model):
    return {name: np.asarray(array, np.float64) for name, array in weights(model).items()}


def window_costs(model, tokens, labels, start, cut, seen=None):
    """Nats of a window's tokens with the history cut at `cut` (None: not); a baseline runs what is left alone."""
    if not model.windowed:
        first = 0 if cut is None else max(0, start - cut)
        return last_costs(model, tokens[first:], labels[first:], start - first)
    size, overlap = model.generation_window, min(start, model.window_overlap)
    n, table = start - overlap, double(model)["embedding.weight"]
    embedded = table[tokens]
    first = 0 if cut is None else max(0, n - cut)
    x = reference._window(double(model), model, embedded, n, embedded[n : start + size], first, seen)[overlap:]
    x = reference._norm(x, double(model)["transformer.norm.weight"], double(model)["transformer.norm.bias"])
    return reference.token_losses(x @ table.T, labels[start : start + size])


def last_costs(model, tokens, labels, start):
    """Nats of a window's tokens by the reference's forward pass of the whole sequence."""
    stop = start + model.generation_window
    found = reference.logits(weights(model), model, tokens[None, :stop])[0]
    return reference.token_losses(found[start:], labels[start:stop])


def swapped_costs(model, tokens, labels, other, start):
    """Nats of a window's tokens in the sequence that begins with the rows of another text."""
    n = max(0, start - model.window_overlap)
    return window_costs(model, np.concatenate([other[:n], tokens[n:]]), labels, start, None)


SHORT = dataclasses.replace(MODEL, architecture="transformer", num_blocks=1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, FEW),
        (SHORT, FEW),
        *(
            pytest.param(dataclasses.replace(base, **changes), options, marks=pytest.mark.slow)
            for base, changes, options in (
                (MODEL, {"architecture": "sliding_window", "token_shift": True}, FEW),
                (MODEL, {"architecture": "gated_deltanet"}, OPTIONS),
                (MODEL, {"architecture": "gated_deltanet_hybrid"}, FEW),
                (DEEP, {"architecture": "tconstformer"}, FEW),
                (DEEP, {"token_shift": True, "key_taps": 3, "longest_wavelength": 20, "window_overlap": 3}, OPTIONS),
                (MODEL, {"history_window": "auto", "num_blocks": 3}, FEW),
                (DEEP, {"causal_history": True, "token_shift": True, "key_taps": 2, "num_blocks": 3}, FEW),
            )
        ),
    ],
)
def test_losses_with_cuts_or_swapped_and_masses_are_those_of_the_reference(model, options):
    run, wanted = trained(model), options["samples"]
    stream = run.run.split("validation")
    found = json.loads(json.dumps(measure_history(run, stream, 22, **options)))
    count = (len(stream.tokens) - 1) // 22
    chosen = np.arange(wanted) * count // wanted
    batch = take_samples(stream, 22, chosen)
    firsts = list(range(0, 22, 4))
    starts = [max(0, first - model.window_overlap) for first in firsts]
    assert (found["starts"], found["samples"], found["length"]) == (starts, wanted, 22)
    assert found["tokens"] == [4 * wanted] * 5 + [2 * wanted]
    cuts = {str(distance): distance for distance in options["distances"]} | {"all": None}
    for name, cut in cuts.items():
        expected = [
            np.mean([window_costs(model, *pair, first, cut) for pair in zip(batch["inputs"], batch["labels"])])
            for first in firsts
        ]
        np.testing.assert_allclose(found["losses"][name], expected, atol=2e-5)
    others = take_samples(stream, 22, (chosen + count // 2) % count)["inputs"]
    samples = list(zip(batch["inputs"], batch["labels"], others))
    expected = [np.mean([swapped_costs(model, *sample, first) for sample in samples]) for first in firsts]
    np.testing.assert_allclose(found["losses"]["swapped"], expected, atol=2e-5)
    losses, tokens = {name: np.array(row) for name, row in found["losses"].items()}, np.array(found["tokens"])
    parts = [(str(part["distance"]), part, part["distance"]) for part in found["cuts"]]
    for name, part, distance in (*parts, ("swapped", found["swapped"], 0)):
        change = (losses[name] - losses["all"]) * tokens
        affected = np.array(starts) > distance
        assert part["loss"] == pytest.approx((losses[name] * tokens).sum() / tokens.sum(), abs=1e-6)
        assert part["change"] == pytest.approx(change.sum() / tokens.sum(), abs=1e-6)
        assert part["affected_change"] == pytest.approx(change[affected].sum() / tokens[affected].sum(), abs=1e-6)
        assert part["affected_tokens"] == tokens[affected].sum()
        assert np.abs((change / tokens)[~affected]).max() < 2e-6  # two units in the last place of a loss of 8 to 16
    assert found["cuts"][0]["affected_change"] != 0 != found["swapped"]["affected_change"]
    late = np.array(starts) >= 9
    assert found["same_tokens"]["tokens"] == tokens[late].sum()
    np.testing.assert_allclose(
        found["same_tokens"]["losses"],
        [(losses[name] * tokens)[late].sum() / tokens[late].sum() for name in cuts],
        atol=1e-6,
    )
    if model.windowed:
        check_masses(model, found, batch)
    else:
        assert (found["mass"], found["share"]) == ({"edges": [1], "x": [], "z": []}, [])


def check_masses(model, found, batch):
    edges = distance_edges(22)
    scale = np.sqrt(model.head_dim)
    sums = {(name, block): [np.zeros(len(edges)), 0] for name in "xz" for block in range(model.num_blocks)}
    shares = np.zeros(model.num_blocks)
    for tokens, labels in zip(batch["inputs"], batch["labels"]):
        for first in range(4, 22, 4):
            seen: list = []
            window_costs(model, tokens, labels, first, None, seen)
            start = first - model.window_overlap
            for block, (qz, qx, kc, vc, kx, vx) in enumerate(seen):
                joint = model.causal_history
                for name, queries in (("z", qz), ("x", qx[model.window_overlap :])):
                    keys = np.concatenate([kc, kx]) if joint and name == "x" else kc
                    scores = np.einsum("qhd,khd->hqk", queries, keys) / scale
                    if joint:  # the queries are of the last rows of the keys
                        scores[:, ~np.tri(len(queries), len(keys), len(keys) - len(queries), dtype=bool)] = -np.inf
                    paid = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
                    for row in range(start):
                        slot = int(np.log2(start - row))
                        sums[name, block][0][slot] += paid[:, :, row].mean(0).sum()
                    sums[name, block][1] += len(queries)
                layer = reference._Layer(
                    double(model), f"transformer.transformer_layers.{block}.compress_context_layer.", model
                )
                out = layer.get("out_proj.weight").T
                if joint:  # the last `paid` is that of x
                    read = np.einsum("hqk,khd->qhd", paid[:, :, :start], vc)
                    own = np.einsum("hqk,khd->qhd", paid[:, :, start:], vx)
                else:
                    read, own = reference._attend(qx, kc, vc), reference._attend(qx, kx, vx, causal=True)
                norms = [np.linalg.norm(part.reshape(len(qx), -1) @ out, axis=-1) for part in (read, own)]
                shares[block] += (norms[0] / (norms[0] + norms[1]))[model.window_overlap :].sum()
    used = len(found["mass"]["edges"]) - 1
    for name in "xz":
        if name == "x" and model.architecture == "tconstformer":
            assert found["mass"]["x"] == found["share"] == []
            continue
        for block in range(model.num_blocks):
            total, queries = sums[name, block]
            np.testing.assert_allclose(found["mass"][name][block], total[:used] / queries, atol=1e-5)
            if model.causal_history and name == "x":
                assert 0 < sum(found["mass"][name][block]) < 0.99, "the rest is on the window's own rows"
            else:
                assert sum(found["mass"][name][block]) == pytest.approx(1, abs=1e-5)
    if found["share"]:
        np.testing.assert_allclose(found["share"], shares / sums["x", 0][1], atol=1e-5)


@pytest.mark.slow
def test_distances_that_cut_nothing_are_left_out_and_a_step_is_that_of_the_evaluation():
    run = trained()
    stream = run.run.split("validation")
    found = measure_history(run, stream, samples=10**6, distances=(0, 8, 11), batch_size=64)
    assert [part["distance"] for part in found["cuts"]] == [0]
    losses = np.array(found["losses"]["all"]) @ np.array(found["tokens"]) / sum(found["tokens"])
    assert found["samples"] == (len(stream.tokens) - 1) // LENGTH
    assert losses == pytest.approx(run.run.evaluate(run.params, stream).loss, abs=1e-5)


def test_a_split_of_one_sample_has_no_other_text():
    run = trained(SHORT)
    found = measure_history(run, TokenStream(run.run.split("validation").tokens[:15], 15, 1), distances=(0,))
    assert (found["samples"], list(found["losses"]), found["swapped"]) == (1, ["all", "0"], None)


def test_what_has_no_history_is_refused():
    with pytest.raises(UserError, match="samples of 4 tokens: must be longer"):
        measure_history(trained(), trained().run.split("validation"), 4)
    copying = DataConfig(dataset="copy", tokenizer="numbers:9", sequence_length=12)
    task = load_split(copying, "validation", build_tokenizer(copying.tokenizer))
    with pytest.raises(UserError, match=r"data\.sequence_length = 101: must be even"):
        measure_history(trained(), task, 101)
    for option in ("length", "samples", "batch_size"):
        with pytest.raises(UserError, match=rf"^evaluation\.{option} = 0: must be an integer >= 1$"):
            measure_history(trained(), trained().run.split("validation"), **{option: 0})
