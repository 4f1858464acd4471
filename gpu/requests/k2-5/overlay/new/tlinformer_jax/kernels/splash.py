"""Attention by splash attention, JAX's own TPU kernel.

Plain version: `models.attention._attend_xla`. The gain was not measured: no TPU was at hand.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels.common import Scores
from tlinformer_jax.parallel.sharding import batch_spec, open_axes

# Rows of a tile; lengths are padded to whole tiles. Larger tiles are used if they divide the padded length.
TILE = 128
LARGEST_TILE = 512


def attend_splash(
    query: Float[Array, "batch queries heads d_h"],
    key: Float[Array, "batch keys heads d_h"],
    value: Float[Array, "batch keys heads d_h"],
    scores: Scores,
    key_length: Int[Array, " batch"] | None,
    documents: tuple[Int[Array, "batch queries"], Int[Array, "batch keys"]] | None = None,
    interpret: bool = False,
) -> Float[Array, "batch queries heads d_h"]:
    """Computes exact softmax attention; on a mesh every device runs the kernel on its part of the batch and heads.

    `documents` are numbered from 0; see `models.attention.attend`.
    """
    lengths = jnp.full(query.shape[:1], key.shape[1], jnp.int32) if key_length is None else key_length

    def local(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, documents: Any):
        return _attend(query, key, value, lengths, documents, scores, interpret)

    axes = open_axes()
    if axes:
        (batch,) = batch_spec(query.shape[0]) or (None,)
        heads = "tensor" if "tensor" in axes and query.shape[2] % axes["tensor"] == 0 else None
        rows = PartitionSpec(batch, None, heads)
        # Every axis becomes manual, even axes of length 1: JAX refuses a kernel if the compiler partitions any axis.
        mesh = jax.sharding.get_abstract_mesh()
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
        given = (rows, rows, rows, PartitionSpec(batch), PartitionSpec(batch))
        local = jax.shard_map(local, axis_names=free, in_specs=given, out_specs=rows, check_vma=False)
    output = local(query, key, value, lengths, documents)
    if documents is not None and not scores.causal:
        valid = jnp.arange(key.shape[1]) < lengths[:, None]
        seen = (documents[0][:, :, None] == documents[1][:, None, :]) & valid[:, None, :]
        return jnp.where(jnp.any(seen, axis=-1)[..., None, None], output, 0)
    return output if key_length is None else jnp.where((key_length == 0)[:, None, None, None], 0, output)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    documents: tuple[jax.Array, jax.Array] | None,
    scores: Scores,
    interpret: bool,
) -> jax.Array:
    """Pads lengths to whole tiles and calls the kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    queries, heads = query.shape[1:3]
    query = (query.astype(jnp.float32) * scores.scale).astype(query.dtype)
    query, key, value = (
        jnp.pad(jnp.swapaxes(rows, 1, 2), ((0, 0), (0, 0), (0, -rows.shape[1] % TILE), (0, 0)))
        for rows in (query, key, value)
    )
    shape = (query.shape[2], key.shape[2])
    if scores.window is not None:
        mask: splash_attention_mask.Mask = splash_attention_mask.LocalMask(shape, (scores.window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask(shape) if scores.causal else splash_attention_mask.FullMask(shape)
    tiles = range(TILE, LARGEST_TILE + 1, TILE)
    q_tile, k_tile = (max(tile for tile in tiles if length % tile == 0) for length in shape)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=q_tile,
        block_kv=k_tile,
        block_q_dkv=q_tile,
        block_kv_dkv=k_tile,
        block_q_dq=q_tile,
        block_kv_dq=k_tile,
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # A query sees only keys of its own segment: its document, or without documents segment 0.
    masked = jnp.arange(shape[1])[None] >= jnp.maximum(lengths, 1)[:, None]
    if documents is None:
        ids = jnp.zeros((query.shape[0], shape[0]), jnp.int32), masked.astype(jnp.int32)
    else:
        own, keys = (jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % TILE))) for rows in documents)
        ids = own, jnp.where(masked, -1, keys)
    segments = splash_attention_kernel.SegmentIds(*ids)
    return jnp.swapaxes(jax.vmap(kernel)(query, key, value, segments), 1, 2)[:, :queries]
