"""Measures what the history contributes to a trained model, without any training.

A sample is measured in windows of W_og tokens; for a model without generation windows these are just blocks of tokens.
n is the position of a window's first row, counting the `model.window_overlap` rows before its own; d is a distance.

- *Cut at d*: the window's history is rows max(0, n - d) .. n - 1 of the sequence, at their positions; the observation
  window is the last W_oh of these rows. A model without generation windows runs only these rows and the window.
- *Swapped*: the window's history is rows 0 .. n - 1 of another text, the sample half of the split further on. The loss
  of a model that uses what its history says then rises about as much as without a history, or more.
- *Change*: mean loss with the cut or the swap minus mean loss without, over all tokens, and over tokens in windows with
  n > d, or n > 0 if swapped, as with a cut at 0.
- *Loss by history*: mean loss of the windows that start at n, with all of their own history. Different n are different
  tokens.
- *Loss of the same tokens*: over the windows whose history is at least as long as the largest distance.
- *Mass*: the part of the `compress` layers' softmax, for the window's tokens ('x', not in TConstFormer) and for the
  observation window ('z'), on rows n - r with r in a bin: the mean over queries, heads, windows and samples. With
  `model.causal_history` the softmax of x also has the window's own rows, so that its masses add up to less than 1.
- *Share*: the mean over tokens of |O a| / (|O a| + |O b|): a is what x reads from the history, b what it reads from its
  own window, O the output projection of the `compress` layer without its bias.

With `model.token_shift` or `model.key_taps` the first rows after a cut still have the tokens before them in their keys,
as in the whole sequence; without generation windows they do not.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.data.batches import num_samples, take_samples
from tlinformer_jax.data.documents import DocumentStream
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.errors import UserError, check_value, integer
from tlinformer_jax.kernels.common import Scores
from tlinformer_jax.models.attention import attend
from tlinformer_jax.models.block import dual_window_block
from tlinformer_jax.models.causal_history import with_later
from tlinformer_jax.models.history import History, observed_stream
from tlinformer_jax.models.layers import LayerParams, layer_norm
from tlinformer_jax.models.model import ModelParams, embed, hidden_states, prepare_params
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import PlacedWindow, Stream, place_window
from tlinformer_jax.models.windows import WindowFrame, num_windows
from tlinformer_jax.training.loss import LOSS_CHUNK, token_losses_and_hits
from tlinformer_jax.training.setup import TrainedRun

SAMPLES = 64
ALL, SWAPPED = "all", "swapped"
MASKED = "history: data.document_masking = True: must be False, because the history must be that of one text"
Sums = dict[str, jax.Array]
T = TypeVar("T")


def measure_history(
    trained: TrainedRun,
    stream: Split,
    length: int | None = None,
    *,
    samples: int = SAMPLES,
    distances: Sequence[int] = (),
    batch_size: int = 1,
) -> dict[str, Any]:
    """Measures the quantities above, in at most `samples` samples of `length` tokens (None: as trained).

    `distances` are where the history is cut, ascending; default: 0 and the powers of 4 from 16 that cut something.

    Returns:
      JSON: length, samples; starts, the first position of each window, and its tokens; losses: distance, 'all' if
      nothing is cut, or 'swapped' -> mean loss of each window, None without tokens; cuts, swapped and same_tokens, see
      `_losses`; mass: edges of bins, bin i being edges[i] .. edges[i + 1] - 1, each block's masses for x and z; share:
      of each block. The last two are empty without generation windows, and `swapped` is None if a split has one sample.
    """
    config = trained.run.config.model
    for name, value in (("length", length), ("samples", samples), ("batch_size", batch_size)):
        if value is not None:
            check_value(f"evaluation.{name}", value, integer(1))
    if isinstance(stream, DocumentStream):
        raise UserError(MASKED)
    length = length or trained.run.config.data.sequence_length
    check_measurable(config, length)
    if isinstance(stream, TaskSplit):
        stream.task.check(length)
    last = int(window_starts(config, num_windows(config, length))[-1])
    distances = distances or (0, *(4**power for power in range(2, 16) if 4**power < last))
    distances = tuple(distance for distance in distances if distance < last)
    local = jax.tree.map(jnp.asarray, jax.device_get(trained.params))
    params: Any = trained.run.model.apply({"params": local}, method=trained.run.model.parameters)
    cuts = {ALL: None} | {str(distance): distance for distance in distances}
    measures = {name: jax.jit(functools.partial(_sums, config=config, cut=cut)) for name, cut in cuts.items()}
    count = num_samples(stream, length)
    if count > 1:
        measures[SWAPPED] = measures[ALL]
    if not config.windowed:  # if nothing is cut or swapped, one pass gives the losses of all windows
        measures[ALL] = jax.jit(functools.partial(_whole_sums, config=config))
    totals: dict[str, dict[str, Any]] = {name: collections.defaultdict(float) for name in measures}
    wanted = min(count, samples)
    indices = np.arange(wanted) * count // wanted
    for start in range(0, wanted, batch_size):
        chosen = indices[start : start + batch_size]
        batch = take_samples(stream, length, chosen)
        other = take_samples(stream, length, (chosen + count // 2) % count)["inputs"]
        for name, measure in measures.items():
            given = batch | {"before": other if name == SWAPPED else batch["inputs"]}
            for part, value in measure(params, given).items():
                totals[name][part] += np.asarray(value, np.float64)
    return {"length": length, "samples": wanted} | _losses(config, distances, totals) | _masses(config, totals[ALL])


def check_measurable(config: ModelConfig, length: int) -> None:
    """Checks that samples have a history; raises a UserError if not."""
    if num_windows(config, length) < 2:
        allowed = f"must be longer than model.generation_window = {config.generation_window}"
        raise UserError(f"history: samples of {length} tokens: {allowed}")


def window_starts(config: ModelConfig, windows: int) -> np.ndarray:
    """Returns n of each window, int [windows]."""
    return np.maximum(np.arange(windows) * config.generation_window - config.window_overlap, 0)


def _sums(params: ModelParams, batch: dict[str, Any], *, config: ModelConfig, cut: int | None) -> Sums:
    """Returns losses and tokens of each window; without a cut, also the sums of `_probe`.

    `batch["before"]` has the tokens that windows read as their history.
    """
    params = prepare_params(params, config)
    size, length = config.generation_window, batch["inputs"].shape[1]
    windows = num_windows(config, length)
    width, hidden_of = 0, _block_hidden
    if config.windowed:
        width = max(config.observed_rows(int(start)) for start in window_starts(config, windows))
        hidden_of = functools.partial(_window_hidden, width=width, length=length)
    # Pad such that any slice stays inside.
    padded = {name: jnp.pad(rows, ((0, 0), (0, windows * size - length + width))) for name, rows in batch.items()}

    def losses_of(window: jax.Array | int, hidden: jax.Array) -> Sums:
        labels, weights = (rows_of(padded[name], window * size, size) for name in ("labels", "weights"))
        losses = token_losses_and_hits(hidden, params.embedding, labels, LOSS_CHUNK)[0] * weights
        return {"losses": jnp.sum(losses), "tokens": jnp.sum(weights)}

    def one(window: jax.Array) -> Sums:
        begin = window * size - config.window_overlap
        own = jnp.arange(windows * size + width) >= begin
        tokens = jnp.where(own, padded["inputs"], padded["before"])
        hidden, probed = hidden_of(params, config, tokens, begin, cut)
        return losses_of(window, hidden) | probed

    first = losses_of(0, hidden_states(params, config, embed(params, config, batch["inputs"][:, :size])))
    later = jax.lax.map(one, jnp.arange(1, windows))
    return later | {name: jnp.concatenate([value[None], later[name]]) for name, value in first.items()}


def _whole_sums(params: ModelParams, batch: dict[str, Any], *, config: ModelConfig) -> Sums:
    """Returns what `_sums` does without a cut or a swap, for a model without generation windows: in one pass."""
    size, length = config.generation_window, batch["inputs"].shape[1]
    params, windows = prepare_params(params, config), num_windows(config, length)
    hidden = hidden_states(params, config, embed(params, config, batch["inputs"]))
    losses = token_losses_and_hits(hidden, params.embedding, batch["labels"], LOSS_CHUNK)[0] * batch["weights"]

    def by_window(rows: Float[Array, "batch length"]) -> Float[Array, " windows"]:
        padded = jnp.pad(rows, ((0, 0), (0, windows * size - length)))
        return jnp.sum(padded.reshape(-1, windows, size), axis=(0, 2))

    return {"losses": by_window(losses), "tokens": by_window(batch["weights"])}


def _block_hidden(
    params: ModelParams,
    config: ModelConfig,
    tokens: Int[Array, "batch padded"],
    begin: Int[Array, ""],
    cut: int | None,
) -> tuple[Float[Array, "batch W_og D"], Sums]:
    """Computes the rows from `begin` on of a model without generation windows, on the sequence that the cut leaves."""
    size = config.generation_window
    start, rows = (0, tokens.shape[1]) if cut is None else (jnp.maximum(begin - cut, 0), cut + size)
    hidden = hidden_states(params, config, embed(params, config, rows_of(tokens, start, rows)))
    return rows_of(hidden, begin - start, size), {}


def _window_hidden(
    params: ModelParams,
    config: ModelConfig,
    tokens: Int[Array, "batch padded"],
    begin: Int[Array, ""],
    cut: int | None,
    width: int,
    length: int,
) -> tuple[Float[Array, "batch W_og D"], Sums]:
    """Computes the window whose first row is at `begin` > 0; without a cut, also returns the sums of `_probe`."""
    overlap, padded = config.window_overlap, tokens.shape[1]
    embedded, size = embed(params, config, tokens), overlap + config.generation_window
    x = rows_of(embedded, begin, size)
    reach = padded if cut is None else cut
    start, rows = jnp.maximum(begin - reach, 0), min(reach + width, padded)
    observed = jnp.asarray([config.observed_rows(n) for n in range(reach + 1)], jnp.int32)[begin - start]
    documents = None
    if config.causal_history and cut is not None:
        # The windows of the history are those of the whole sequence, so its rows stay where they are. No row after the
        # cut reads one before it, as if these were another document.
        documents = jnp.broadcast_to(jnp.arange(padded) >= start, tokens.shape).astype(jnp.int32)
        start, rows = jnp.zeros_like(begin), padded
    # Rows and rotations are counted from the first row that is not cut, whose position is `start`.
    history = rows_of(embedded, start, rows)
    rope = rope_table(start + jnp.arange(max(rows, size) + size), config.head_dim, config.longest_wavelength)
    layer = params.blocks[0].compress
    C = History.whole(layer, history.rows, rope, begin - start, history.key_rows, history.key_sums)
    C = dataclasses.replace(C, documents=documents)
    if config.causal_history:
        C = with_later(params.blocks, config, C, rope, documents=documents)
    own = Stream.of(layer, x.rows, rope.rows(begin - start, size), key_rows=x.key_rows)
    frame = WindowFrame(begin - start, begin - start - observed, observed, width, never_empty=False)
    if documents is not None:
        of_z, of_x = (rows_of(documents, first, count) for first, count in ((begin - observed, width), (begin, size)))
        frame = dataclasses.replace(frame, z_documents=of_z, x_documents=of_x)
    real = (jnp.arange(size) >= overlap) & (begin + jnp.arange(size) < length)
    placed, probed = place_window(frame, rope, size), Sums()
    for index, block in enumerate(params.blocks):
        if cut is None:
            probed |= _probe(config, block.compress, index, C, own, placed, real)
        later = params.blocks[index + 1 :]
        restored, states = dual_window_block(block, config, C, own, placed, later)
        if restored is not None:
            C, own = restored, Stream.of(later[0].compress, states, placed.x_rope)
    return layer_norm(states[:, overlap:], params.norm_scale, params.norm_bias), probed


def rows_of(arrays: T, start: jax.Array | int, count: int) -> T:
    """Returns rows start .. start + count - 1 of each array [batch, rows, ...]."""
    return jax.tree.map(lambda rows: jax.lax.dynamic_slice_in_dim(rows, start, count, axis=1), arrays)


def _probe(
    config: ModelConfig, layer: LayerParams, index: int, C: History, x: Stream, placed: PlacedWindow, real: jax.Array
) -> Sums:
    """Returns sums of block `index`: mass_x_B and mass_z_B [bins], queries_x_B, queries_z_B, share_B."""
    probed: Sums = {}
    together, key, n, scale = x.K.shape[0], C.K, placed.frame.history_length, config.attention_scale
    edges = distance_edges(key.shape[1])
    bins = jnp.searchsorted(edges, n - jnp.arange(key.shape[1]), side="right") - 1
    z = observed_stream(layer, C, placed, together)
    value = C.V
    if C.z is not None:  # z continues the rows of the block before
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=placed.frame.observed_start, axis=1)
        key, value = put(key, z.K), put(value, z.V)
    readers = {"z": (z.Q, jnp.arange(z.Q.shape[1]) < placed.frame.observed_length)}
    if config.architecture != "tconstformer":
        readers["x"] = (x.Q, real)
    rows = jnp.arange(key.shape[1])
    seen = rows < n
    for name, (query, counts) in readers.items():
        keys, visible = key, seen[None]
        if config.causal_history and name == "x":
            keys = jnp.concatenate([key, x.K], axis=1)
            earlier = jnp.tri(query.shape[1], dtype=bool)
            visible = jnp.concatenate([jnp.broadcast_to(seen, (len(earlier), len(rows))), earlier], axis=1)
        elif config.causal_history:
            visible = visible & (rows <= placed.frame.observed_start + jnp.arange(query.shape[1])[:, None])
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * scale, axis=-1, where=visible)
        weights, own_weights = weights[..., : len(rows)], weights[..., len(rows) :]
        paid = jnp.sum(jnp.mean(weights, axis=1) * counts[None, :, None], axis=(0, 1))
        binned = jnp.zeros(len(edges)).at[jnp.where(seen, bins, len(edges))].add(paid, mode="drop")
        probed[f"mass_{name}_{index}"] = binned
        probed[f"queries_{name}_{index}"] = together * jnp.sum(counts, dtype=jnp.float32)
        if name == "x":
            read = jnp.einsum("bhqk,bkhd->bqhd", weights, value.astype(jnp.float32))
            if config.causal_history:
                own = jnp.einsum("bhqk,bkhd->bqhd", own_weights, x.V.astype(jnp.float32))
            else:
                own = attend(x.Q, x.K, x.V, Scores(scale, causal=True), backend="xla")
            parts = jnp.stack([read, own.astype(jnp.float32)])
            norms = jnp.linalg.norm(jnp.einsum("nbqhd,hdo->nbqo", parts, layer.out_kernel), axis=-1)
            probed[f"share_{index}"] = jnp.sum(norms[0] / (norms[0] + norms[1]) * counts)
    return probed


def distance_edges(rows: int) -> np.ndarray:
    """Returns the lower edges of the bins of distances 1 .. rows: powers of two."""
    return 2 ** np.arange(max(1, int(rows).bit_length()))


def _losses(config: ModelConfig, distances: Sequence[int], totals: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns starts, tokens, losses, cuts, swapped and same_tokens of `measure_history`."""
    tokens: np.ndarray = totals[ALL]["tokens"]
    starts = window_starts(config, len(tokens))
    losses: dict[str, np.ndarray] = {name: sums["losses"] for name, sums in totals.items()}
    names = [*map(str, distances), ALL]

    def compared(name: str, affected: np.ndarray) -> dict[str, Any]:
        lost = losses[name] - losses[ALL]
        return {
            "loss": _mean(losses[name], tokens),
            "change": _mean(lost, tokens),
            "affected_tokens": int(tokens[affected].sum()),
            "affected_change": _mean(lost[affected], tokens[affected]),
        }

    same = starts >= max(distances, default=0)
    return {
        "starts": starts.tolist(),
        "tokens": [int(count) for count in tokens],
        "losses": {name: [_mean(*pair) for pair in zip(sums, tokens)] for name, sums in losses.items()},
        "cuts": [{"distance": distance} | compared(str(distance), starts > distance) for distance in distances],
        "swapped": compared(SWAPPED, starts > 0) if SWAPPED in losses else None,
        "same_tokens": {
            "tokens": int(tokens[same].sum()),
            "distances": [*distances, None],
            "losses": [_mean(losses[name][same], tokens[same]) for name in names],
        },
    }


def _masses(config: ModelConfig, sums: dict[str, Any]) -> dict[str, Any]:
    """Returns mass and share of `measure_history`."""
    totals = {name: value.sum(0) for name, value in sums.items()}
    used = max((int(np.flatnonzero(value).max()) + 1 for name, value in totals.items() if "mass" in name), default=0)

    def by_block(name: str, queries: str) -> list[Any]:
        found = [block for block in range(config.num_blocks) if f"{name}_{block}" in totals]
        return [totals[f"{name}_{block}"] / totals[f"{queries}_{block}"] for block in found]

    x, z = ([part[:used].tolist() for part in by_block(f"mass_{name}", f"queries_{name}")] for name in ("x", "z"))
    mass = {"edges": [2**power for power in range(used + 1)], "x": x, "z": z}
    return {"mass": mass, "share": [float(share) for share in by_block("share", "queries_x")]}


def _mean(losses: Any, tokens: Any) -> float | None:
    count = float(np.sum(tokens))
    return float(np.sum(losses)) / count if count else None
