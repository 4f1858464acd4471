"""New candidates: keys and values projected, rotated and stored by one kernel; the storing kernel with aligned rows."""
import functools
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from tlinformer_jax.kernels.common import call_kernel, dot, iota, masked_load, masked_store


def prepared(kernel, bias, width, pairs_multiple=128, inner_multiple=64):
    """[D, 2, heads, >= width] and [2, heads, >= width] to [2 halves, pairs, D], [2 halves, pairs]; both padded with 0."""
    inner, _, heads = kernel.shape[:3]
    half = width // 2
    kernel = kernel[..., :width].reshape(inner, 2, heads, 2, half).transpose(3, 1, 2, 4, 0).reshape(2, -1, inner)
    bias = bias[..., :width].reshape(2, heads, 2, half).transpose(2, 0, 1, 3).reshape(2, -1)
    more = -kernel.shape[1] % pairs_multiple
    return jnp.pad(kernel, ((0, 0), (0, more), (0, -inner % inner_multiple))), jnp.pad(bias, ((0, 0), (0, more))).astype(jnp.float32)


def project(cache, source, weights, bias, tables, row, start, tokens=None, *, pt=64, rt=128, kt=64, warps=4, stages=3, order=0, interpret=False):
    """Products of rows (or of looked-up rows) with the weights, bias, rotation, written from row `start`, a multiple of rt."""
    heads, width = cache.key.shape[1:3]
    rows = source.shape[0] if tokens is None else tokens.size
    assert rows % rt == 0
    half = width // 2
    place = jnp.stack([row, start // rt]).astype(jnp.int32)
    tiles = pl.cdiv(2 * heads * half, pt)
    grid = (tiles, rows // rt) if order == 0 else (rows // rt, tiles)
    return call_kernel(
        functools.partial(_project, heads=heads, half=half, inner=source.shape[1], vocab=source.shape[0], pt=pt, rt=rt, kt=kt, order=order),
        grid, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
        [cache, source, weights, bias, tables, place, tokens], "project_history", interpret,
        aliases={n: n for n, _ in enumerate(jax.tree.leaves(cache))}, num_warps=warps, num_stages=stages)


def _project(_, source_ref, weight_ref, bias_ref, table_refs, place_ref, tokens_ref, cache, *, heads, half, inner, vocab, pt, rt, kt, order):
    tile, block = pl.program_id(order), pl.program_id(1 - order)
    pairs, numbers = tile * pt + iota(pt), block * rt + iota(rt)
    sources = numbers if tokens_ref is None else jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab - 1)

    def step(k, carry):
        one, other = carry
        features = k * kt + iota(kt)
        rows = masked_load(source_ref.at[sources[:, None], features[None, :]], (features < inner)[None, :])
        first, second = (masked_load(weight_ref.at[part, pairs[:, None], features[None, :]]) for part in (0, 1))
        return one + dot(first, rows, 1), other + dot(second, rows, 1)

    zero = jnp.zeros((pt, rt), jnp.float32)
    products = jax.lax.fori_loop(0, pl.cdiv(inner, kt), step, (zero, zero))
    dtype = source_ref.dtype

    def biased(part):
        bias = masked_load(bias_ref.at[part, pairs])
        return (products[part].astype(dtype).astype(jnp.float32) + bias[:, None]).astype(dtype)

    one, other = biased(0), biased(1)
    is_key, is_value = pairs < heads * half, (pairs >= heads * half) & (pairs < 2 * heads * half)
    head, pair = pairs // half % heads, pairs % half
    to = (place_ref[1] + block) * rt + iota(rt)

    def write(ref, which, first, second):
        mask = jnp.broadcast_to(which[:, None], (pt, rt))
        for begin, values in ((0, first), (half, second)):
            masked_store(ref.at[place_ref[0], head[:, None], (begin + pair)[:, None], to[None, :]], values.astype(ref.dtype), mask)

    write(cache.value, is_value, one, other)
    cos, sin = (masked_load(ref.at[pair[:, None], numbers[None, :]], is_key[:, None]) for ref in table_refs)
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    write(cache.key, is_key, one * cos - other * sin, one * sin + other * cos)


def store_aligned(cache, products, bias, tables, row, start, *, rt=1024, unit=0, warps=4, interpret=False):
    """Products [2, heads, d_h, rows] without bias; tables [half, rows]; start a multiple of rt."""
    heads, width = cache.key.shape[1:3]
    half, rows = width // 2, products.shape[-1]
    unit = unit or rt
    place = jnp.stack([row, start // unit]).astype(jnp.int32)
    return call_kernel(
        functools.partial(_store_aligned, half=half, rt=rt, unit=unit), (heads, half, rows // rt),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
        [cache, products, bias, tables, place], "store_columns", interpret,
        aliases={n: n for n, _ in enumerate(jax.tree.leaves(cache))}, num_warps=warps, num_stages=1)


def _store_aligned(_, products_ref, bias_ref, table_refs, place_ref, cache, *, half, rt, unit):
    head, pair, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    numbers = tile * rt + iota(rt)
    to = place_ref[1] * unit + numbers
    loaded = [[masked_load(products_ref.at[part, head, f, numbers]) for f in (pair, half + pair)] for part in (0, 1)]
    cos, sin = (masked_load(ref.at[pair, numbers]) for ref in table_refs)

    def biased(part):
        return [(rows.astype(jnp.float32) + bias_ref[part, head, f].astype(jnp.float32)).astype(rows.dtype) for f, rows in zip((pair, half + pair), loaded[part])]

    def write(ref, first, second):
        for f, values in ((pair, first), (half + pair, second)):
            masked_store(ref.at[place_ref[0], head, f, to], values.astype(ref.dtype))

    one, other = (values.astype(jnp.float32) for values in biased(0))
    write(cache.key, one * cos - other * sin, one * sin + other * cos)
    write(cache.value, *biased(1))


def store_pairs(cache, table, tables, row, start, tokens, *, pt=32, rt=64, warps=4, order=0, unit=0, interpret=False):
    """Looks up, rotates and stores words; table [V, 2 (keys, values), 2 (halves), heads * half]; start a multiple of rt."""
    heads, width = cache.key.shape[1:3]
    unit = unit or rt
    place = jnp.stack([row, start // unit]).astype(jnp.int32)
    tiles = pl.cdiv(heads * width // 2, pt)
    return call_kernel(
        functools.partial(_store_pairs, half=width // 2, total=heads * width // 2, vocab=table.shape[0], pt=pt, rt=rt, order=order, unit=unit),
        (tiles, tokens.size // rt) if order == 0 else (tokens.size // rt, tiles),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
        [cache, table, tables, place, tokens], "store_words", interpret,
        aliases={n: n for n, _ in enumerate(jax.tree.leaves(cache))}, num_warps=warps, num_stages=1)


def _store_pairs(_, table_ref, table_refs, place_ref, tokens_ref, cache, *, half, total, vocab, pt, rt, order, unit):
    tile, block = pl.program_id(order), pl.program_id(1 - order)
    pairs, numbers = tile * pt + iota(pt), block * rt + iota(rt)
    there = pairs < total
    head, feature = pairs // half, pairs % half
    to = place_ref[1] * unit + numbers
    ids = jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab - 1)
    rows = [[masked_load(table_ref.at[ids[:, None], part, side, pairs[None, :]], there[None, :]) for side in (0, 1)] for part in (0, 1)]

    def write(ref, side, values):
        mask = jnp.broadcast_to(there[:, None], (pt, rt))
        masked_store(ref.at[place_ref[0], head[:, None], side * half + feature[:, None], to[None, :]], values.astype(ref.dtype), mask)

    one, other = (jnp.transpose(values).astype(jnp.float32) for values in rows[0])
    cos, sin = (masked_load(ref.at[feature[:, None], numbers[None, :]], there[:, None]) for ref in table_refs)
    write(cache.key, 0, one * cos - other * sin)
    write(cache.key, 1, one * sin + other * cos)
    for side in (0, 1):
        write(cache.value, side, jnp.transpose(rows[1][side]))
