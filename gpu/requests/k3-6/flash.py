"""Flash attention without dropout for short key sequences, after kernels/dropout.py; features in pieces."""
import functools
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from tlinformer_jax.kernels.common import LOG2_E, call_kernel, dot, iota, masked_load, masked_store


def pieces_of(width, whole):
    if whole:
        return ((0, max(16, pl.next_power_of_2(width))),)
    found, start = [], 0
    while start < width:
        size = max(16, 1 << ((width - start).bit_length() - 1))
        found.append((start, size)); start += size
    return tuple(found)


def load(ref, place, rows, pieces, width, limit=None):
    out, (row, head) = [], place
    for start, size in pieces:
        features = start + iota(size)
        mask = None
        if start + size > width:
            mask = (features < width)[None, :]
        if limit is not None:
            inside = (rows < limit)[:, None]
            mask = inside if mask is None else mask & inside
        out.append(masked_load(ref.at[row, rows[:, None], head, features[None, :]], mask))
    return out


def store(ref, place, rows, pieces, width, values):
    row, head = place
    for (start, size), value in zip(pieces, values):
        features = start + iota(size)
        mask = (rows < ref.shape[1])[:, None] & (features < width)[None, :]
        masked_store(ref.at[row, rows[:, None], head, features[None, :]], value.astype(ref.dtype), mask)


def product(left, right):
    total = None
    for one, two in zip(left, right):
        part = dot(one, two, 1)
        total = part if total is None else total + part
    return total


def forward_kernel(q_ref, k_ref, v_ref, o_ref, lse_ref, *, tile, scale, causal, width, pieces):
    place = pl.program_id(2), pl.program_id(1)
    bq, bk = tile[:2]
    start = pl.program_id(0) * bq
    rows = start + iota(bq)
    query = load(q_ref, place, rows, pieces, width)
    count = k_ref.shape[1]

    def block(index, carry, masked):
        top, total, sums = carry
        columns = index * bk + iota(bk)
        scores = product(query, load(k_ref, place, columns, pieces, width))
        if masked:
            scores = jnp.where(columns[None, :] <= rows[:, None], scores, -jnp.inf)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        factor = jnp.exp2((top - new) * scale)
        weights = jnp.exp2(scores * scale - (new * scale)[:, None])
        value = load(v_ref, place, columns, pieces, width)
        half = weights.astype(value[0].dtype)
        return new, total * factor + jnp.sum(weights, axis=1), [one * factor[:, None] + dot(half, part, 0) for one, part in zip(sums, value)]

    carry = jnp.full((bq,), -1e30, jnp.float32), jnp.zeros((bq,), jnp.float32), [jnp.zeros((bq, size), jnp.float32) for _, size in pieces]
    full, last = count // bk, count // bk
    if causal:
        full, last = start // bk, (start + bq + bk - 1) // bk
    carry = jax.lax.fori_loop(0, full, functools.partial(block, masked=False), carry)
    if causal:
        carry = jax.lax.fori_loop(full, last, functools.partial(block, masked=True), carry)
    top, total, sums = carry
    store(o_ref, place, rows, pieces, width, [one / total[:, None] for one in sums])
    masked_store(lse_ref.at[(*place, rows)], top * scale + jnp.log(total) * LOG2_E)


def query_kernel(q_ref, k_ref, v_ref, o_ref, g_ref, lse_ref, dq_ref, delta_ref, *, tile, scale, true_scale, causal, width, pieces):
    place = pl.program_id(2), pl.program_id(1)
    bq, bk = tile[:2]
    start = pl.program_id(0) * bq
    rows = start + iota(bq)
    query, output, gradient = (load(ref, place, rows, pieces, width) for ref in (q_ref, o_ref, g_ref))
    lse = masked_load(lse_ref.at[(*place, rows)])
    delta = sum(jnp.sum(o.astype(jnp.float32) * g.astype(jnp.float32), axis=1) for o, g in zip(output, gradient))
    count = k_ref.shape[1]

    def block(index, sums, masked):
        columns = index * bk + iota(bk)
        key = load(k_ref, place, columns, pieces, width)
        scores = product(query, key) * scale
        if masked:
            scores = jnp.where(columns[None, :] <= rows[:, None], scores, -jnp.inf)
        weights = jnp.exp2(scores - lse[:, None])
        slope = product(gradient, load(v_ref, place, columns, pieces, width))
        slope = (weights * (slope - delta[:, None])).astype(q_ref.dtype)
        return [one + dot(slope, part, 0) for one, part in zip(sums, key)]

    sums = [jnp.zeros((bq, size), jnp.float32) for _, size in pieces]
    full, last = count // bk, count // bk
    if causal:
        full, last = start // bk, (start + bq + bk - 1) // bk
    sums = jax.lax.fori_loop(0, full, functools.partial(block, masked=False), sums)
    if causal:
        sums = jax.lax.fori_loop(full, last, functools.partial(block, masked=True), sums)
    store(dq_ref, place, rows, pieces, width, [one * true_scale for one in sums])
    masked_store(delta_ref.at[(*place, rows)], delta)


def key_kernel(q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, tile, scale, true_scale, causal, width, pieces):
    place = pl.program_id(2), pl.program_id(1)
    bq, bk = tile[:2]
    start = pl.program_id(0) * bk
    columns = start + iota(bk)
    key, value = (load(ref, place, columns, pieces, width) for ref in (k_ref, v_ref))
    count = q_ref.shape[1]

    def block(index, carry, masked):
        dk, dv = carry
        rows = index * bq + iota(bq)
        query, gradient = (load(ref, place, rows, pieces, width) for ref in (q_ref, g_ref))
        lse, delta = (masked_load(ref.at[(*place, rows)])[None, :] for ref in (lse_ref, delta_ref))
        scores = product(key, query) * scale
        if masked:
            scores = jnp.where(columns[:, None] <= rows[None, :], scores, -jnp.inf)
        weights = jnp.exp2(scores - lse)
        slope = weights * (product(value, gradient) - delta)
        slope, weights = slope.astype(q_ref.dtype), weights.astype(q_ref.dtype)
        return [one + dot(slope, part, 0) for one, part in zip(dk, query)], [one + dot(weights, part, 0) for one, part in zip(dv, gradient)]

    zeros = [jnp.zeros((bk, size), jnp.float32) for _, size in pieces]
    carry, end, first = (zeros, zeros), count // bq, 0
    if causal:
        first = (start + bk + bq - 1) // bq
        carry = jax.lax.fori_loop(start // bq, jnp.minimum(first, end), functools.partial(block, masked=True), carry)
    dk, dv = jax.lax.fori_loop(first, end, functools.partial(block, masked=False), carry)
    store(dk_ref, place, columns, pieces, width, [one * true_scale for one in dk])
    store(dv_ref, place, columns, pieces, width, dv)


def forward(q, k, v, *, tile, true_scale, causal, whole, interpret=False):
    b, n, h, w = q.shape
    kernel = functools.partial(forward_kernel, tile=tile, scale=true_scale * LOG2_E, causal=causal, width=w, pieces=pieces_of(w, whole))
    return call_kernel(kernel, (n // tile[0], h, b), [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)], [q, k, v], "short_forward", interpret, num_warps=tile[2], num_stages=tile[3])


def query_gradient(q, k, v, o, g, lse, *, tile, true_scale, causal, whole, interpret=False):
    b, n, h, w = q.shape
    kernel = functools.partial(query_kernel, tile=tile, scale=true_scale * LOG2_E, true_scale=true_scale, causal=causal, width=w, pieces=pieces_of(w, whole))
    return call_kernel(kernel, (n // tile[0], h, b), [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)], [q, k, v, o, g, lse], "short_query", interpret, num_warps=tile[2], num_stages=tile[3])


def key_gradient(q, k, v, g, lse, delta, *, tile, true_scale, causal, whole, interpret=False):
    b, n, h, w = q.shape
    kernel = functools.partial(key_kernel, tile=tile, scale=true_scale * LOG2_E, true_scale=true_scale, causal=causal, width=w, pieces=pieces_of(w, whole))
    return call_kernel(kernel, (k.shape[1] // tile[1], h, b), [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2, [q, k, v, g, lse, delta], "short_key", interpret, num_warps=tile[2], num_stages=tile[3])
