"""An independent implementation of the specification: NumPy, float64, plain loops, published names.

It shares no code with the library. It is slow and follows the specification line by line, so that every fast
path can be compared with something that is easy to check by eye.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]
# What a cache keeps of rows of keys or values [n, heads, d].
Kept = Callable[[np.ndarray], np.ndarray]


def logits(
    weights: Weights, config, tokens: np.ndarray, documents: np.ndarray | None = None, kept: Kept | None = None
) -> np.ndarray:
    """Teacher-forced logits float64 [batch, length, V] of integer tokens [batch, length].

    `config` needs the fields of ModelConfig; `weights` has the published names. Rows see those of their own document
    alone; `documents`, integers [batch, length], are one if not given. Positions start again with each. `kept` is
    applied to the history's keys and values under `compress`.
    """
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    rows = []
    documents = np.zeros(np.shape(tokens), int) if documents is None else documents
    for sequence, ids in zip(np.asarray(tokens), np.asarray(documents), strict=True):
        embedded = weights["embedding.weight"][sequence]
        if config.architecture in ("tlinformer", "tconstformer"):
            starts = range(0, len(sequence), config.generation_window)
            x = np.concatenate([_predicted(weights, config, embedded, start, ids, kept) for start in starts])
        else:
            x = _baseline(weights, config, embedded, ids)
        x = _norm(x, weights["transformer.norm.weight"], weights["transformer.norm.bias"])
        rows.append(x @ weights["embedding.weight"].T)
    return np.stack(rows)


def places(ids: np.ndarray) -> np.ndarray:
    """Positions in their documents."""
    return np.tril(ids[:, None] == ids[None, :], -1).sum(1)


def key_rows(weights: Weights, config, rows: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """What the first layer's keys are made of, of the embeddings from position 0 on."""
    return rows + tokens_before(weights["token_shift"][None], rows, ids) if config.token_shift else rows


def tokens_before(vectors: np.ndarray, rows: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """The sum over k of 10 * vectors[k - 1] * rows[t - k], over the rows of t's own document."""
    total = np.zeros_like(rows)
    for back, vector in enumerate(vectors[: len(rows) - 1], 1):
        own = 1.0 if ids is None else (ids[back:] == ids[:-back])[:, None]
        total[back:] += 10.0 * vector * rows[:-back] * own
    return total


def mean_loss(all_logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats over all positions."""
    return float(token_losses(all_logits, labels).mean())


def token_losses(all_logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy in nats of each position."""
    shifted = all_logits - all_logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, np.asarray(labels, int)[..., None], -1)[..., 0]


def _predicted(
    weights: Weights, config, embedded: np.ndarray, start: int, ids: np.ndarray | None = None, kept: Kept | None = None
) -> np.ndarray:
    """The window that predicts from position `start` on; the tokens before it that run with it are dropped."""
    before = min(config.window_overlap, start)
    n, stop = start - before, start + config.generation_window
    return _window(weights, config, embedded, n, embedded[n:stop], ids=ids, kept=kept)[before:]


def _window(
    weights: Weights,
    config,
    embedded: np.ndarray,
    n: int,
    x: np.ndarray,
    first: int = 0,
    probe: list | None = None,
    ids: np.ndarray | None = None,
    kept: Kept | None = None,
) -> np.ndarray:
    """The window x at n; rows before `first` do not exist. `probe` gets queries, keys and values of blocks' starts."""
    m = len(x)
    ids = np.zeros(len(embedded), int) if ids is None else ids
    context, past, new = embedded[first:n], places(ids)[first:n], places(ids)[n : n + m]
    of_c, of_x = ids[first:n], ids[n : n + m]
    observed = min(len(context), _history_window(config, len(context))) if len(context) else 0
    rows = np.arange(len(context) - observed, len(context))
    of_z = of_c[rows]
    if config.causal_history:
        histories = _histories(weights, config, embedded[:n], first, ids, kept)
        y = np.concatenate([context[rows], x])
        for b, C in enumerate(histories):
            before = C[: len(context) - observed]
            y = _causal_block(weights, config, b, before, y, observed, embedded, first, ids, kept, probe)
        return y[observed:]
    for b in range(config.num_blocks):
        block = f"transformer.transformer_layers.{b}."
        layer = _Layer(weights, block + "compress_context_layer.", config)
        qc, kc, vc = layer.project(context, past)
        qx, kx, vx = layer.project(x, new)
        if b == 0 and config.token_shift:
            keyed = key_rows(weights, config, embedded, ids)
            kc, kx = layer.project(keyed[first:n], past)[1], layer.project(keyed[n : n + m], new)[1]
        if b > 0 and config.key_taps:
            taps = tokens_before(layer.get("key_taps"), embedded, ids)
            kc = layer.project(context + taps[first:n], past)[1]
        if kept is not None and len(context):
            kc, vc = kept(kc), kept(vc)
        if probe is not None:
            probe.append((qc[rows], qx, kc, vc, kx, vx))
        z = layer.update(context[rows], _attend(qc[rows], kc, vc, ids=(of_z, of_c)))
        seen = _attend(qx, kx, vx, causal=True, ids=(of_x, of_x))
        if config.architecture == "tlinformer":
            seen = seen + _attend(qx, kc, vc, ids=(of_x, of_c))
        x = layer.update(x, seen)
        for j in range(config.hidden_depth):
            layer = _Layer(weights, f"{block}hidden_layers.{j}.", config)
            qz, kz, vz = layer.project(z, past[rows])
            qx, kx, vx = layer.project(x, new)
            z, x = (
                layer.update(z, _attend(qz, kz, vz, ids=(of_z, of_z))),
                layer.update(
                    x, _attend(qx, kx, vx, causal=True, ids=(of_x, of_x)) + _attend(qx, kz, vz, ids=(of_x, of_z))
                ),
            )
        layer = _Layer(weights, block + "restore_context_shape_layer.", config)
        _, kz, vz = layer.project(z, past[rows])
        qx, kx, vx = layer.project(x, new)
        context = layer.update(context, _attend(qc, kz, vz, ids=(of_c, of_z)))
        x = layer.update(x, _attend(qx, kx, vx, causal=True, ids=(of_x, of_x)) + _attend(qx, kz, vz, ids=(of_x, of_z)))
    return x


def _histories(
    weights: Weights, config, embedded: np.ndarray, first: int, ids: np.ndarray, kept: Kept | None
) -> list[np.ndarray]:
    """C of each block with `causal_history`, rows `first` .. n - 1: a row reads its own window and that window's z."""
    n, size = len(embedded), config.generation_window
    positions, C = places(ids)[first:n], embedded[first:]
    found = [C]
    for b in range(config.num_blocks - 1):
        layer = _Layer(weights, f"transformer.transformer_layers.{b}.compress_context_layer.", config)
        q, k, v = layer.project(C, positions)
        k = layer.project(_keyed(weights, config, b, C, embedded, ids[:n], first), positions)[1]
        k, v = (k, v) if kept is None or not len(C) else (kept(k), kept(v))
        attended = np.zeros_like(q)
        for start in range(0, n, size):
            window = slice(max(start - first, 0), max(min(start + size, n) - first, 0))
            z = start - (min(start, _history_window(config, start)) if start else 0)
            seen = slice(max(z - first, 0), window.stop)
            of = ids[first:n][window], ids[first:n][seen]
            attended[window] = _attend(q[window], k[seen], v[seen], causal=True, ids=of)
        C = layer.update(C, attended)
        found.append(C)
    return found


def _keyed(
    weights: Weights, config, b: int, rows: np.ndarray, embedded: np.ndarray, ids: np.ndarray, first: int
) -> np.ndarray:
    """What the keys of rows `first`, ... of C are made of in block b."""
    last = first + len(rows)
    if b == 0 and config.token_shift:
        return key_rows(weights, config, embedded, ids)[first:last]
    if b > 0 and config.key_taps:
        name = f"transformer.transformer_layers.{b}.compress_context_layer.key_taps"
        return rows + tokens_before(weights[name], embedded, ids)[first:last]
    return rows


def _causal_block(
    weights: Weights,
    config,
    b: int,
    before: np.ndarray,
    y: np.ndarray,
    observed: int,
    embedded: np.ndarray,
    first: int,
    ids: np.ndarray,
    kept: Kept | None,
    probe: list | None,
) -> np.ndarray:
    """The next y, the rows of z and x, of a block with `causal_history`; `before` are the rows of C before z.

    `first` is the position of the first of all these rows; `embedded` and `ids` are those of the whole sequence.
    """
    h, block = len(before), f"transformer.transformer_layers.{b}."
    n, whole, rows = h + observed, ids, slice(first, first + h + len(y))
    positions, ids = places(ids)[rows], ids[rows]
    layer = _Layer(weights, block + "compress_context_layer.", config)
    context, x = np.concatenate([before, y[:observed]]), y[observed:]
    (qc, kc, vc), (qx, kx, vx) = layer.project(context, positions[:n]), layer.project(x, positions[n:])
    kc = layer.project(_keyed(weights, config, b, context, embedded, whole, first), positions[:n])[1]
    if b == 0:
        kx = layer.project(_keyed(weights, config, b, x, embedded, whole, first + n), positions[n:])[1]
    if kept is not None and h:  # a cache keeps the rows of z with the window
        kc, vc = (np.concatenate([kept(rows[:h]), rows[h:]]) for rows in (kc, vc))
    if probe is not None:
        probe.append((qc[h:], qx, kc, vc, kx, vx))
    q, k, v = np.concatenate([qc[h:], qx]), np.concatenate([kc, kx]), np.concatenate([vc, vx])
    y = layer.update(y, _attend(q, k, v, causal=True, ids=(ids[h:], ids)))
    for name in [*(f"hidden_layers.{j}." for j in range(config.hidden_depth)), "restore_context_shape_layer."]:
        layer = _Layer(weights, block + name, config)
        qy, ky, vy = layer.project(y, positions[h:])
        y = layer.update(y, _attend(qy, ky, vy, causal=True, ids=(ids[h:], ids[h:])))
    return y


def _baseline(weights: Weights, config, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    window = None
    if config.architecture == "sliding_window":
        window = config.history_window + config.generation_window
    layers = config.num_blocks * (config.hidden_depth + 2)
    for i in range(layers):
        layer = _Layer(weights, f"transformer.transformer_layers.{i}.", config)
        fourth = i % 4 == 3 or (layers < 4 and i == layers - 1)
        if config.architecture == "gated_deltanet" or (config.architecture == "gated_deltanet_hybrid" and not fourth):
            x = layer.update(x, _gated_deltanet(layer, x))
            continue
        q, k, v = layer.project(x, places(ids))
        if i == 0 and config.token_shift:
            k = layer.project(key_rows(weights, config, x, ids), places(ids))[1]
        x = layer.update(x, _attend(q, k, v, causal=True, window=window, ids=(ids, ids)))
    return x


def _gated_deltanet(layer: "_Layer", x: np.ndarray) -> np.ndarray:
    """What the layer's heads give to each row, [length, heads * width]."""
    y, length = _norm(x, layer.get("norm1.weight"), layer.get("norm1.bias")), len(x)
    heads = len(layer.get("A_log"))
    qkv, gate = np.split(y @ layer.get("qkvg_proj.weight").T, [-len(layer.get("qkvg_proj.weight")) // 4], axis=-1)
    mixed = np.zeros_like(qkv)
    for back in range(min(4, length)):
        mixed[back:] += layer.get("conv.weight")[:, 3 - back] * qkv[: length - back]
    mixed = mixed / (1 + np.exp(-mixed))
    q, k, v = (part.reshape(length, heads, -1) for part in np.split(mixed, 3, axis=-1))
    rates = y @ layer.get("rates_proj.weight").T
    g = -np.exp(layer.get("A_log")) * np.log1p(np.exp(rates[:, :heads] + layer.get("dt_bias")))
    q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
    o = delta_rule(q, k, v, g, 1 / (1 + np.exp(-rates[:, heads:])))[0]
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * layer.get("head_norm.weight")
    return o.reshape(length, -1) * gate / (1 + np.exp(-gate))


def delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, state: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [length, heads, d] and the last state [heads, d, d] of the gated delta rule, row by row."""
    length, heads, d = q.shape
    state = np.zeros((heads, d, d)) if state is None else state.copy()
    o = np.zeros((length, heads, d))
    for t in range(length):
        S = np.exp(g[t])[:, None, None] * state
        news = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        state = S + np.einsum("hk,hv->hkv", k[t], news)
        o[t] = np.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(d)
    return o, state


def _history_window(config, n: int) -> int:
    if config.history_window == "auto":
        return 8 * math.floor((12 * math.log(n) + 7) / 8)
    return config.history_window


class _Layer:
    def __init__(self, weights: Weights, prefix: str, config) -> None:
        self.weights, self.prefix, self.heads, self.config = weights, prefix, config.num_heads, config

    def get(self, name: str) -> np.ndarray:
        return self.weights[self.prefix + name]

    def project(self, u: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
        y = _norm(u, self.get("norm1.weight"), self.get("norm1.bias"))
        qkv = y @ self.get("qkv_proj.weight").T + self.get("qkv_proj.bias")
        parts = qkv.reshape(len(u), 3, self.heads, u.shape[1] // self.heads).swapaxes(0, 1)
        return [*_rope(parts[:2], positions, self.config.longest_wavelength), parts[2]]

    def update(self, u: np.ndarray, attended: np.ndarray) -> np.ndarray:
        v = (
            u
            + attended.reshape(len(u), self.get("out_proj.weight").shape[1]) @ self.get("out_proj.weight").T
            + self.get("out_proj.bias")
        )
        y = _norm(v, self.get("norm2.weight"), self.get("norm2.bias"))
        if self.config.num_experts < 2:
            return v + self.expert(y, "ffn.")
        output = np.zeros_like(v)
        shares = expert_shares(y @ self.get("ffn.router.weight").T, self.config.experts_per_token)
        for number in range(self.config.num_experts):
            rows = np.flatnonzero(shares[:, number])
            output[rows] += shares[rows, number, None] * self.expert(y[rows], f"ffn.experts.{number}.")
        return v + output

    def expert(self, y: np.ndarray, name: str) -> np.ndarray:
        gate = y @ self.get(f"{name}w1.weight").T
        inner = gate / (1 + np.exp(-gate)) * (y @ self.get(f"{name}w3.weight").T)
        return inner @ self.get(f"{name}w2.weight").T


def expert_shares(logits: np.ndarray, top: int) -> np.ndarray:
    """What each expert's output counts for each row, 0 for those that it does not take; [rows, E]."""
    shares = np.zeros_like(logits)
    for row, values in enumerate(logits):
        probabilities = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
        best = np.argsort(-probabilities)[:top]
        shares[row, best] = probabilities[best]
        if top > 1:
            shares[row] /= shares[row].sum()
    return shares


def _norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.sum(-1, keepdims=True) / x.shape[-1]
    return x / np.sqrt((x * x).sum(-1, keepdims=True) / x.shape[-1] + 1e-5) * scale + bias


def _rope(x: np.ndarray, positions: np.ndarray, longest: int) -> np.ndarray:
    """Of rows [.., n, heads, d]."""
    width = x.shape[-1]
    frequencies = 10000.0 ** (-2 * np.arange(width // 2) / width)
    if longest:
        frequencies = np.where(2 * math.pi / frequencies <= longest, frequencies, 0)
    angles = positions[:, None] * frequencies
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    rotated = np.empty_like(x)
    rotated[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    rotated[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return rotated


def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = False,
    window: int | None = None,
    ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """`ids` are the documents of queries and of keys; a query with no key of its own gets 0. If `causal`, the queries
    are of the last rows of the keys."""
    if len(k) == 0:
        return np.zeros_like(q)
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        distance = len(k) - len(q) + np.arange(len(q))[:, None] - np.arange(len(k))[None, :]
        hidden = (distance < 0) | (distance >= (window or len(k) + 1))
        scores = np.where(hidden, -np.inf, scores)
    if ids is not None:
        scores = np.where(ids[0][:, None] == ids[1][None, :], scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = weights.sum(-1, keepdims=True)  # at least 1 where there is a key
    return np.einsum("hqk,khd->qhd", weights / np.where(total == 0, 1, total), v)
