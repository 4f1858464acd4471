"""Candidates for the kernels of prefill and slide."""
import functools
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from tlinformer_jax.kernels.common import (LEAST_PIECE, LOG2_E, call_kernel, dot, feature_pieces, iota, masked_load,
                                           masked_store, merge_softmaxes)
from tlinformer_jax.kernels.key_value import KeyValue


def exp2(x, ftz, interpret):
    if not ftz or interpret:
        return jnp.exp2(x)
    from jax.experimental.pallas import triton
    return triton.elementwise_inline_asm("ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
                                         result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)])[0]


def powers(scores, shift, scale, ftz, interpret):
    """2 ** (scores * scale - shift[:, None]): one multiply-add and one ex2 each; XLA's Triton contracts no products with sums."""
    if not ftz or interpret:
        return jnp.exp2(scores * scale - shift[:, None])
    import struct
    from jax.experimental.pallas import triton
    factor = struct.pack(">f", scale).hex().upper()
    negative = jnp.broadcast_to(-shift[:, None], scores.shape)
    code = "{ .reg .f32 t; fma.rn.f32 t, $1, 0f" + factor + ", $2; ex2.approx.ftz.f32 $0, t; }"
    return triton.elementwise_inline_asm(code, args=[scores, negative], constraints="=f,f,f", pack=1,
                                         result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)])[0]


# ---- compress
def attend(query, cache, row, length, scale, *, qt=64, rt=64, warps=4, stages=3, ftz=True, programs=1056, sub=1, pipe=False, ones=False, vp=0, interpret=False):
    queries, heads, _ = query.shape
    width, room = cache.key.shape[2:]
    tiles = pl.cdiv(queries, qt * sub)
    parts = max(1, min(programs // (heads * tiles), room // (4 * rt)))
    kernel = functools.partial(_attend_kernel, scale=scale * LOG2_E, queries=queries, width=width, parts=parts, qt=qt, rt=rt, ftz=ftz, sub=sub, pipe=pipe, ones=ones, vp=vp, interpret=interpret)
    shape = (parts, heads, queries)
    outputs = [jax.ShapeDtypeStruct((*shape, width), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)]
    place = jnp.stack([row, length]).astype(jnp.int32)
    sums, tops, totals = call_kernel(kernel, (tiles, heads, parts), outputs, [query, cache, place], "attend_history", interpret, num_warps=warps, num_stages=stages)
    merged, lse = merge_softmaxes(sums, tops / LOG2_E, 0, totals)
    return jnp.swapaxes(merged, 0, 1), jnp.swapaxes(lse, 0, 1)


def _attend_kernel(query_ref, cache, place_ref, sums_ref, tops_ref, totals_ref, *, scale, queries, width, parts, qt, rt, ftz, sub, pipe, ones, vp, interpret):
    tile, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    pieces, lanes = feature_pieces(width, LEAST_PIECE), iota(rt)
    vpieces = ((0, vp),) if vp else pieces
    one = jnp.ones((rt, LEAST_PIECE), query_ref.dtype) if ones else None
    numbers = [(tile * sub + s) * qt + iota(qt) for s in range(sub)]
    query = [_queries(query_ref, one, head, queries, width, qt) for one in numbers]
    length = place_ref[1]
    each = pl.cdiv(pl.cdiv(length, rt), parts)
    begin = part * each
    place = (place_ref[0], head)
    dtype = query_ref.dtype

    def load(ref, start, size, rows):
        features = start + iota(size)
        mask = None if start + size <= width else (features < width)[:, None]
        return masked_load(ref.at[(*place, features[:, None], rows[None, :])], mask)

    def block(index, carry, masked):
        rows = index * rt + lanes
        keys = [load(cache.key, *piece, rows) for piece in pieces]
        values = [load(cache.value, *piece, rows) for piece in vpieces]
        new = []
        for s in range(sub):
            top, total, sums = carry[s]
            scores = jnp.zeros((qt, rt), jnp.float32)
            for key, q in zip(keys, query[s]):
                scores += dot(q, key, 0)
            if masked:
                scores = jnp.where((rows < length)[None, :], scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            factor = exp2((top - new_top) * scale, ftz, interpret)
            weights = powers(scores, new_top * scale, scale, ftz, interpret)
            shares = weights.astype(dtype)
            out = tuple(old * factor[:, None] + dot(shares, value, 1) for value, old in zip(values, sums))
            total = total * factor[:, None] + dot(shares, one, 0) if ones else total * factor + jnp.sum(weights, axis=1)
            new.append((new_top, total, out))
        return tuple(new)

    carry = tuple((jnp.full((qt,), -1e30, jnp.float32), jnp.zeros((qt, LEAST_PIECE) if ones else (qt,), jnp.float32), tuple(jnp.zeros((qt, size), jnp.float32) for _, size in vpieces)) for _ in range(sub))
    full = jnp.clip(length // rt, begin, begin + each)
    if pipe:  # the next block's scores are computed while this block's weights are
        assert sub == 1

        def scores_of(index):
            rows = index * rt + lanes
            scores = jnp.zeros((qt, rt), jnp.float32)
            for piece, q in zip(pieces, query[0]):
                scores += dot(q, load(cache.key, *piece, rows), 0)
            return scores

        def piped(index, carry):
            scores, top, total, sums = carry
            following = scores_of(jnp.minimum(index + 1, full - 1))
            rows = index * rt + lanes
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            factor = exp2((top - new_top) * scale, ftz, interpret)
            weights = powers(scores, new_top * scale, scale, ftz, interpret)
            shares = weights.astype(dtype)
            sums = tuple(old * factor[:, None] + dot(shares, load(cache.value, *piece, rows), 1) for piece, old in zip(pieces, sums))
            return following, new_top, total * factor + jnp.sum(weights, axis=1), sums

        carry = (jax.lax.fori_loop(begin, full, piped, (scores_of(jnp.maximum(jnp.minimum(begin, full - 1), 0)), *carry[0]))[1:],)
    else:
        carry = jax.lax.fori_loop(begin, full, functools.partial(block, masked=False), carry)
    end = jnp.clip(pl.cdiv(length, rt), begin, begin + each)
    carry = jax.lax.fori_loop(full, end, functools.partial(block, masked=True), carry)
    for one, (top, total, sums) in zip(numbers, carry):
        is_query = one < queries
        if ones: total = jnp.max(total, axis=1)
        for (start, size), values in zip(vpieces, sums):
            features = start + iota(size)
            masked_store(sums_ref.at[part, head, one[:, None], features[None, :]], values, is_query[:, None] & (features < width)[None, :])
        masked_store(tops_ref.at[part, head, one], top * scale, is_query)
        masked_store(totals_ref.at[part, head, one], total, is_query)


def _queries(ref, numbers, head, queries, width, qt):
    loaded = []
    for start, size in feature_pieces(width, LEAST_PIECE):
        features = start + iota(size)
        mask = (numbers < queries)[:, None] & (features < width)[None, :]
        loaded.append(masked_load(ref.at[numbers[:, None], head, features[None, :]], mask))
    return loaded


# ---- restore
def few(query, key, value, length, scale, *, tokens=None, tables=None, qt=64, block=1024, warps=4, stages=3, ftz=True, kt=256, ones=False, vp=0, interpret=False):
    """All rows at once; keys and values are loaded once for `block` queries. With tokens: looked up and rotated."""
    count = query.shape[0] if tokens is None else tokens.size
    heads, out_width = query.shape[1:]
    return call_kernel(
        functools.partial(_few_kernel, scale=scale * LOG2_E, queries=count, width=key.shape[1], qt=qt, block=block, ftz=ftz, kt=kt, ones=ones and sum(size for _, size in feature_pieces(key.shape[1], LEAST_PIECE)) > key.shape[1], vp=vp, interpret=interpret),
        (pl.cdiv(count, block), heads), jax.ShapeDtypeStruct((count, heads, out_width), query.dtype),
        [query, KeyValue(key[None], value[None]), length.astype(jnp.int32)[None], tokens, tables], "attend_context", interpret,
        num_warps=warps, num_stages=stages)


def _few_kernel(query_ref, cache, length_ref, tokens_ref, table_refs, output_ref, *, scale, queries, width, qt, block, ftz, kt, ones, vp, interpret):
    part, head = pl.program_id(0), pl.program_id(1)
    pieces = feature_pieces(width, LEAST_PIECE)
    count = cache.key.shape[3]
    half = width // 2
    vpieces = ((0, vp),) if vp else pieces

    def load(ref, start, size, rows, other=0.0):
        features = start + iota(size)
        mask = None if start + size <= width else (features < width)[:, None]
        return masked_load(ref.at[0, head, features[:, None], rows[None, :]], mask, other)

    chunks = [first + iota(kt) for first in range(0, count, kt)]
    keys = [[load(cache.key, *piece, rows) for piece in pieces] for rows in chunks]
    values = [[load(cache.value, *piece, rows, other=1.0 if ones else 0.0) for piece in vpieces] for rows in chunks]
    length = length_ref[0]

    def rotated(numbers):
        there = numbers < queries
        ids = masked_load(tokens_ref.at[numbers], there)
        loaded = []
        for start, size in pieces:
            features = start + iota(size)
            first = features < half
            pair = jnp.where(first, features, features - half)
            partner = jnp.where(first, features + half, features - half)
            mask = there[:, None] & (features < width)[None, :]
            own = masked_load(query_ref.at[ids[:, None], head, features[None, :]], mask).astype(jnp.float32)
            other = masked_load(query_ref.at[ids[:, None], head, partner[None, :]], mask).astype(jnp.float32)
            cos, sin = (masked_load(ref.at[numbers[:, None], pair[None, :]], mask) for ref in table_refs)
            loaded.append((own * cos + jnp.where(first, -other.T, other.T).T * sin if False else own * cos + other * (jnp.where(first, -1.0, 1.0)[None, :] * sin)).astype(query_ref.dtype))
        return loaded

    def tile(index, _, masked):
        numbers = part * block + index * qt + iota(qt)
        query = _queries(query_ref, numbers, head, queries, width, qt) if tokens_ref is None else rotated(numbers)
        top, total, sums = None, None, None
        for rows, key, value in zip(chunks, keys, values):
            scores = sum(dot(q, one, 0) for q, one in zip(query, key))
            if masked:
                scores = jnp.where((rows < length)[None, :], scores, -jnp.inf)
            largest = jnp.max(scores, axis=1)
            new_top = jnp.maximum(largest, -1e30) if top is None else jnp.maximum(top, largest)
            weights = powers(scores, new_top * scale, scale, ftz, interpret)
            shares = weights.astype(value[0].dtype)
            new = [dot(shares, one, 1) for one in value]
            if top is None:
                total, sums = None if ones else jnp.sum(weights, axis=1), new
            else:
                factor = exp2((top - new_top) * scale, ftz, interpret)
                total = None if ones else total * factor + jnp.sum(weights, axis=1)
                sums = [old * factor[:, None] + one for old, one in zip(sums, new)]
            top = new_top
        if ones:  # the values' padding is 1, so its sums are the totals
            total = jnp.sum(jnp.where((vpieces[-1][0] + iota(vpieces[-1][1]) == width)[None, :], sums[-1], 0.0), axis=1)
        inverse = (1.0 / jnp.where(total > 0, total, 1.0))[:, None]
        for (start, size), summed in zip(vpieces, sums):
            features = start + iota(size)
            mask = (numbers < queries)[:, None] & (features < output_ref.shape[2])[None, :]
            summed = jnp.where((features < width)[None, :], summed, 0.0) if ones and start + size > width else summed
            masked_store(output_ref.at[numbers[:, None], head, features[None, :]], (summed * inverse).astype(output_ref.dtype), mask)
        return _ + 1

    tiles = block // qt
    plain = jnp.minimum(length // count, 1) * tiles
    jax.lax.fori_loop(0, plain, functools.partial(tile, masked=False), jnp.int32(0))
    jax.lax.fori_loop(plain, tiles, functools.partial(tile, masked=True), jnp.int32(0))


# ---- store
def store_flat(cache, projected, bias, tables, row, start, tokens=None, *, ft=64, rt=64, warps=4, interpret=False):
    """Tiles of rows and of features of all heads, so that loads of a row are contiguous; heads are not padded."""
    rows = projected.shape[0] if tokens is None else tokens.size
    heads, width = cache.key.shape[1:3]
    place = jnp.stack([row, start]).astype(jnp.int32)
    return call_kernel(
        functools.partial(_store_flat, width=width, total=heads * width, vocab=projected.shape[0], ft=ft, rt=rt),
        (pl.cdiv(heads * width, ft), rows // rt),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
        [cache, projected, bias, tables, place, tokens], "store_history", interpret,
        aliases={n: n for n, _ in enumerate(jax.tree.leaves(cache))}, num_warps=warps, num_stages=1)


def _store_flat(_, projected_ref, bias_ref, table_refs, place_ref, tokens_ref, cache, *, width, total, vocab, ft, rt):
    tile, block = pl.program_id(1), pl.program_id(0)
    half = width // 2
    flat = block * ft + iota(ft)
    head, feature = flat // width, flat % width
    first = feature < half
    pair = jnp.where(first, feature, feature - half)
    partner = jnp.where(first, feature + half, feature - half)
    numbers = tile * rt + iota(rt)
    to = place_ref[1] + numbers
    there = (flat < total)
    sources = numbers if tokens_ref is None else jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab - 1)

    def load(part, features):
        rows = masked_load(projected_ref.at[sources[:, None], part, head[None, :], features[None, :]], there[None, :])
        bias = masked_load(bias_ref.at[part, head, features], there)
        return (rows.astype(jnp.float32) + bias.astype(jnp.float32)[None, :]).astype(rows.dtype)

    def write(ref, values):
        mask = jnp.broadcast_to(there[:, None], (ft, rt))
        masked_store(ref.at[place_ref[0], head[:, None], feature[:, None], to[None, :]], jnp.transpose(values.astype(ref.dtype)), mask)

    cos, sin = (masked_load(ref.at[numbers[:, None], pair[None, :]], there[None, :]) for ref in table_refs)
    own, other = load(0, feature).astype(jnp.float32), load(0, partner).astype(jnp.float32)
    sign = jnp.where(first, -1.0, 1.0)[None, :]
    write(cache.key, own * cos + other * (sign * sin))
    write(cache.value, load(1, feature))


def store_t(cache, projected, bias, tables, row, start, *, rt=512, warps=4, interpret=False):
    """Products [2, heads, d_h, rows]: everything is contiguous. tables: [half, rows]."""
    heads, width = cache.key.shape[1:3]
    rows = projected.shape[-1]
    place = jnp.stack([row, start]).astype(jnp.int32)
    return call_kernel(
        functools.partial(_store_t, half=width // 2, rt=rt), (rows // rt, heads, width // 2),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
        [cache, projected, bias, tables, place], "store_history", interpret,
        aliases={n: n for n, _ in enumerate(jax.tree.leaves(cache))}, num_warps=warps, num_stages=1)


def _store_t(_, projected_ref, bias_ref, table_refs, place_ref, cache, *, half, rt):
    tile, head, pair = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    numbers = tile * rt + iota(rt)
    to = place_ref[1] + numbers
    cos, sin = (masked_load(ref.at[pair, numbers]) for ref in table_refs)

    def load(part, feature):
        rows = masked_load(projected_ref.at[part, head, feature, numbers])
        return (rows.astype(jnp.float32) + bias_ref[part, head, feature].astype(jnp.float32)).astype(rows.dtype)

    def write(ref, feature, values):
        masked_store(ref.at[place_ref[0], head, feature, to], values.astype(ref.dtype))

    one, other = (load(0, f).astype(jnp.float32) for f in (pair, half + pair))
    write(cache.key, pair, one * cos - other * sin)
    write(cache.key, half + pair, one * sin + other * cos)
    for f in (pair, half + pair):
        write(cache.value, f, load(1, f))


def store_xla(cache, projected, bias, tables, row, start):
    both = (projected.astype(jnp.float32) + bias.astype(jnp.float32)[..., None]).astype(projected.dtype)
    half = both.shape[2] // 2
    one, other = both[0, :, :half].astype(jnp.float32), both[0, :, half:].astype(jnp.float32)
    cos, sin = tables
    key = jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=1).astype(cache.key.dtype)
    at = (row, 0, 0, start)
    return KeyValue(jax.lax.dynamic_update_slice(cache.key, key[None], at), jax.lax.dynamic_update_slice(cache.value, both[1][None], at))


# ---- gate and up with silu
def gated(x, kernel, *, bm=128, bn=128, bk=64, warps=8, stages=3, order=0, interpret=False):
    """silu(x @ gate) * (x @ up): x [rows, D], kernel [D, 2, F]."""
    rows, inner = x.shape
    columns = kernel.shape[2]
    grid = (pl.cdiv(rows, bm), columns // bn) if order else (columns // bn, pl.cdiv(rows, bm))

    def body(x_ref, kernel_ref, out_ref):
        m, n = (pl.program_id(0), pl.program_id(1)) if order else (pl.program_id(1), pl.program_id(0))
        number, column = m * bm + iota(bm), n * bn + iota(bn)

        def step(k, carry):
            g, u = carry
            features = k * bk + iota(bk)
            mask = features < inner
            a = masked_load(x_ref.at[number[:, None], features[None, :]], mask[None, :])
            wg, wu = (masked_load(kernel_ref.at[features[:, None], which, column[None, :]], mask[:, None]) for which in (0, 1))
            return g + dot(a, wg, 0), u + dot(a, wu, 0)

        zero = jnp.zeros((bm, bn), jnp.float32)
        g, u = jax.lax.fori_loop(0, pl.cdiv(inner, bk), step, (zero, zero))
        g, u = g.astype(x.dtype).astype(jnp.float32), u.astype(x.dtype).astype(jnp.float32)
        out_ref.at[number[:, None], column[None, :]]
        masked_store(out_ref.at[number[:, None], column[None, :]], (g * jax.nn.sigmoid(g) * u).astype(x.dtype))

    return call_kernel(body, grid, jax.ShapeDtypeStruct((rows, columns), x.dtype), [x, kernel], "gate_up", interpret, num_warps=warps, num_stages=stages)


# ---- words: halves of all heads apart, bias added before
def store_pairs(cache, table, tables, row, start, tokens, *, pt=32, rt=64, warps=4, interpret=False):
    """table [V, 2 (keys, values), 2 (halves), heads * half]."""
    heads, width = cache.key.shape[1:3]
    place = jnp.stack([row, start]).astype(jnp.int32)
    return call_kernel(
        functools.partial(_store_pairs, half=width // 2, total=heads * width // 2, vocab=table.shape[0], pt=pt, rt=rt),
        (pl.cdiv(heads * width // 2, pt), tokens.size // rt),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
        [cache, table, tables, place, tokens], "store_words", interpret,
        aliases={n: n for n, _ in enumerate(jax.tree.leaves(cache))}, num_warps=warps, num_stages=1)


def _store_pairs(_, table_ref, table_refs, place_ref, tokens_ref, cache, *, half, total, vocab, pt, rt):
    pairs = pl.program_id(0) * pt + iota(pt)
    numbers = pl.program_id(1) * rt + iota(rt)
    there = pairs < total
    head, feature = pairs // half, pairs % half
    to = place_ref[1] + numbers
    ids = jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab - 1)

    def load(part, side):
        return masked_load(table_ref.at[ids[:, None], part, side, pairs[None, :]], there[None, :])

    def write(ref, side, values):
        mask = jnp.broadcast_to(there[:, None], (pt, rt))
        masked_store(ref.at[place_ref[0], head[:, None], side * half + feature[:, None], to[None, :]], jnp.transpose(values.astype(ref.dtype)), mask)

    one, other = (load(0, side).astype(jnp.float32) for side in (0, 1))
    cos, sin = (masked_load(ref.at[numbers[:, None], feature[None, :]], there[None, :]) for ref in table_refs)
    write(cache.key, 0, one * cos - other * sin)
    write(cache.key, 1, one * sin + other * cos)
    for side in (0, 1):
        write(cache.value, side, load(1, side))


def pairs_table(products, bias, width):
    """[V, 2, heads, width] -> [V, 2, 2, heads * half], with bias."""
    both = (products[..., :width].astype(jnp.float32) + bias[..., :width].astype(jnp.float32)).astype(products.dtype)
    v, two, heads, _ = both.shape
    return jnp.swapaxes(both.reshape(v, two, heads, 2, width // 2), 2, 3).reshape(v, two, 2, heads * width // 2)


# ---- LayerNorm
def norm(x, scale, bias, epsilon=1e-5, *, rows=8, warps=4, interpret=False):
    """x [n, D]."""
    n, width = x.shape
    whole = pl.next_power_of_2(width)

    def body(x_ref, scale_ref, bias_ref, out_ref):
        numbers, features = pl.program_id(0) * rows + iota(rows), iota(whole)
        there = features < width
        wide = masked_load(x_ref.at[numbers[:, None], features[None, :]], there[None, :]).astype(jnp.float32)
        mean = jnp.sum(wide, axis=1) / width
        centred = jnp.where(there[None, :], wide - mean[:, None], 0.0)
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / width + epsilon)
        s, b = (masked_load(ref.at[features], there).astype(jnp.float32) for ref in (scale_ref, bias_ref))
        out = centred * inverse[:, None] * s[None, :] + b[None, :]
        masked_store(out_ref.at[numbers[:, None], features[None, :]], out.astype(out_ref.dtype), jnp.broadcast_to(there[None, :], (rows, whole)))

    return call_kernel(body, (n // rows,), jax.ShapeDtypeStruct(x.shape, x.dtype), [x, scale, bias], "layer_norm", interpret, num_warps=warps, num_stages=1)


def add_norm(x, product, product_bias, scale, bias, epsilon=1e-5, *, tokens=None, rows=8, warps=4, interpret=False):
    """(x + product + product_bias, its LayerNorm); with tokens x is looked up."""
    n, width = product.shape
    whole = pl.next_power_of_2(width)
    vocab = x.shape[0]

    def body(x_ref, product_ref, product_bias_ref, scale_ref, bias_ref, tokens_ref, sum_ref, out_ref):
        numbers, features = pl.program_id(0) * rows + iota(rows), iota(whole)
        there = features < width
        sources = numbers if tokens_ref is None else jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab - 1)
        s, b, pb = (masked_load(ref.at[features], there).astype(jnp.float32) for ref in (scale_ref, bias_ref, product_bias_ref))
        total = masked_load(x_ref.at[sources[:, None], features[None, :]], there[None, :]).astype(jnp.float32)
        total += masked_load(product_ref.at[numbers[:, None], features[None, :]], there[None, :]).astype(jnp.float32) + pb[None, :]
        rounded = total.astype(sum_ref.dtype)
        mask = jnp.broadcast_to(there[None, :], (rows, whole))
        masked_store(sum_ref.at[numbers[:, None], features[None, :]], rounded, mask)
        wide = rounded.astype(jnp.float32)
        mean = jnp.sum(wide, axis=1) / width
        centred = jnp.where(there[None, :], wide - mean[:, None], 0.0)
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / width + epsilon)
        out = centred * inverse[:, None] * s[None, :] + b[None, :]
        masked_store(out_ref.at[numbers[:, None], features[None, :]], out.astype(out_ref.dtype), mask)

    shape = jax.ShapeDtypeStruct(product.shape, product.dtype)
    return call_kernel(body, (n // rows,), [shape, shape], [x, product, product_bias, scale, bias, tokens], "add_norm", interpret, num_warps=warps, num_stages=1)
