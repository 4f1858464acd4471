"""Designs of the kernel that reads a token's int8 (or bfloat16) history; query float32 [heads, d], already scaled."""
import functools
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from tlinformer_jax.kernels.common import call_kernel, feature_pieces, iota, masked_load, merge_softmaxes, dot

LOG2_E = 1.4426950408889634

def asm_floats(x):
    """int8 [..] -> float32: four bytes of a word, each into the mantissa of 2^23 + byte + 128."""
    from jax.experimental.pallas import triton
    asm = """{ .reg .b32 w, h, a, b, c, d;
    xor.b32 w, $4, 0x80808080;
    prmt.b32 a, w, 0x4B000000, 0x7440;
    prmt.b32 b, w, 0x4B000000, 0x7441;
    prmt.b32 c, w, 0x4B000000, 0x7442;
    prmt.b32 d, w, 0x4B000000, 0x7443;
    sub.f32 $0, a, 0f4B000080;
    sub.f32 $1, b, 0f4B000080;
    sub.f32 $2, c, 0f4B000080;
    sub.f32 $3, d, 0f4B000080; }"""
    return triton.elementwise_inline_asm(asm, args=[x], constraints="=f,=f,=f,=f,r", pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)])[0]

def magic_floats(x):
    wide = x.astype(jnp.int32) + 0x4B400000
    return jax.lax.bitcast_convert_type(wide, jnp.float32) - 12582912.0

def unsigned_floats(x):
    wide = (jax.lax.bitcast_convert_type(x, jnp.uint8) ^ jnp.uint8(0x80)).astype(jnp.int32) | 0x4B000000
    return jax.lax.bitcast_convert_type(wide, jnp.float32) - 8388736.0

def cast_floats(x):
    return x.astype(jnp.float32)

def top_floats(x):
    """The byte on top of an int32: its sign is that of the integer, and 2^24 times too large."""
    return (x.astype(jnp.int32) << 24).astype(jnp.float32)

def top_asm_floats(x):
    from jax.experimental.pallas import triton
    asm = """{ .reg .b32 a, b, c, d;
    prmt.b32 a, $4, 0, 0x0444; prmt.b32 b, $4, 0, 0x1444; prmt.b32 c, $4, 0, 0x2444; prmt.b32 d, $4, 0, 0x3444;
    cvt.rn.f32.s32 $0, a; cvt.rn.f32.s32 $1, b; cvt.rn.f32.s32 $2, c; cvt.rn.f32.s32 $3, d; }"""
    return triton.elementwise_inline_asm(asm, args=[x], constraints="=f,=f,=f,=f,r", pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)])[0]

UNIT = {"top": 2.0**-24, "topasm": 2.0**-24}
CONVERT = {"top": top_floats, "topasm": top_asm_floats, "asm": asm_floats, "magic": magic_floats, "unsigned": unsigned_floats, "cast": cast_floats}

def wide(x, convert):
    return CONVERT[convert](x) if x.dtype == jnp.int8 else x.astype(jnp.float32)

def owned(query, cache, length, *, each, warps, parts, convert, style, stages=1, interpret=False):
    """A thread owns `each` neighbouring rows of a block, all features of them."""
    heads, width = query.shape
    outputs = [jax.ShapeDtypeStruct((parts, heads, last), jnp.float32) for last in (width, 1, 1)]
    body = {"3d": _kernel_3d, "unrolled": _kernel_unrolled}[style]
    sums, top, total = call_kernel(
        functools.partial(body, width=width, parts=parts, each=each, threads=32 * warps, convert=convert),
        (parts, heads), outputs, [query, cache, length], "owned", interpret, num_warps=warps, num_stages=stages)
    return merge_softmaxes(sums, top[..., 0] / LOG2_E, 0, total[..., 0])

def _span(length_ref, part, parts, size):
    length = length_ref[0]
    blocks = pl.cdiv(length, size)
    share = pl.cdiv(blocks, parts)
    begin = part * share
    return length, begin, jnp.minimum(begin + share, blocks)

def _finish(top, total, sums, refs, place, pieces):
    sums_ref, top_ref, total_ref = refs
    most = jnp.maximum(jnp.max(top), -1e30)
    factor = jnp.exp2(top - most)
    for (start, size), values in zip(pieces, sums):
        sums_ref[(*place, pl.ds(start, size))] = jnp.sum(values * factor[None, :], axis=1)
    top_ref[(*place, 0)] = most
    total_ref[(*place, 0)] = jnp.sum(total * factor)

def _kernel_3d(query_ref, cache, length_ref, sums_ref, top_ref, total_ref, *, width, parts, each, threads, convert):
    part, head = pl.program_id(0), pl.program_id(1)
    size_of_block = threads * each
    length, begin, end = _span(length_ref, part, parts, size_of_block)
    pieces = feature_pieces(width)
    lanes = each * iota(threads)[:, None] + iota(each)[None, :]
    query = [query_ref[head, pl.ds(*piece)] * LOG2_E for piece in pieces]

    def block(index, carry):
        top, total, sums = carry
        rows = index * size_of_block + lanes
        def load(ref):
            return [masked_load(ref.at[0, head, (start + iota(size))[:, None, None], rows[None]]) for start, size in pieces]
        keys, values = load(cache.key), load(cache.value)
        scales = None if cache.key_scale is None else [
            masked_load(ref.at[0, head, rows]).astype(jnp.float32) for ref in (cache.key_scale, cache.value_scale)]
        scores = sum(jnp.sum(wide(key, convert) * part[:, None, None], axis=0) for key, part in zip(keys, query))
        if scales:
            scores = scores * (scales[0] * UNIT.get(convert, 1.0))
        scores = jnp.where(rows < length, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        factor, weight = jnp.exp2(top - base), jnp.exp2(scores - base[:, None])
        share = weight * (scales[1] * UNIT.get(convert, 1.0)) if scales else weight
        new = [old * factor[None] + jnp.sum(wide(value, convert) * share[None], axis=2) for old, value in zip(sums, values)]
        return new_top, total * factor + jnp.sum(weight, axis=1), tuple(new)

    carry = (jnp.full((threads,), -jnp.inf, jnp.float32), jnp.zeros((threads,), jnp.float32),
             tuple(jnp.zeros((size, threads), jnp.float32) for _, size in pieces))
    top, total, sums = jax.lax.fori_loop(begin, end, block, carry)
    _finish(top, total, sums, (sums_ref, top_ref, total_ref), (part, head), pieces)

def _kernel_unrolled(query_ref, cache, length_ref, sums_ref, top_ref, total_ref, *, width, parts, each, threads, convert):
    part, head = pl.program_id(0), pl.program_id(1)
    size_of_block = threads * each
    length, begin, end = _span(length_ref, part, parts, size_of_block)
    lanes = each * iota(threads)[:, None] + iota(each)[None, :]
    query = [query_ref[head, f] * LOG2_E for f in range(width)]

    def block(index, carry):
        top, total, sums = carry
        rows = index * size_of_block + lanes
        keys, values = ([masked_load(ref.at[0, head, f, rows]) for f in range(width)] for ref in (cache.key, cache.value))
        scales = None if cache.key_scale is None else [
            masked_load(ref.at[0, head, rows]).astype(jnp.float32) for ref in (cache.key_scale, cache.value_scale)]
        scores = wide(keys[0], convert) * query[0]
        for key, q in zip(keys[1:], query[1:]):
            scores += wide(key, convert) * q
        if scales:
            scores = scores * (scales[0] * UNIT.get(convert, 1.0))
        scores = jnp.where(rows < length, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        factor, weight = jnp.exp2(top - base), jnp.exp2(scores - base[:, None])
        share = weight * (scales[1] * UNIT.get(convert, 1.0)) if scales else weight
        new = [old * factor + jnp.sum(wide(value, convert) * share, axis=1) for old, value in zip(sums, values)]
        return new_top, total * factor + jnp.sum(weight, axis=1), tuple(new)

    carry = (jnp.full((threads,), -jnp.inf, jnp.float32), jnp.zeros((threads,), jnp.float32),
             tuple(jnp.zeros((threads,), jnp.float32) for _ in range(width)))
    top, total, sums = jax.lax.fori_loop(begin, end, block, carry)
    most = jnp.maximum(jnp.max(top), -1e30)
    factor = jnp.exp2(top - most)
    for f, values in enumerate(sums):
        sums_ref[part, head, f] = jnp.sum(values * factor)
    top_ref[part, head, 0] = most
    total_ref[part, head, 0] = jnp.sum(total * factor)


# ---- four products an instruction
TRANSPOSE_AND_MULTIPLY = """{ .reg .b32 t0, t1, t2, t3, r0, r1, r2, r3;
    prmt.b32 t0, $4, $5, 0x5140; prmt.b32 t1, $6, $7, 0x5140;
    prmt.b32 t2, $4, $5, 0x7362; prmt.b32 t3, $6, $7, 0x7362;
    prmt.b32 r0, t0, t1, 0x5410; prmt.b32 r1, t0, t1, 0x7632;
    prmt.b32 r2, t2, t3, 0x5410; prmt.b32 r3, t2, t3, 0x7632;
    dp4a.s32.s32 $0, r0, $8, $12; dp4a.s32.s32 $1, r1, $8, $13;
    dp4a.s32.s32 $2, r2, $8, $14; dp4a.s32.s32 $3, r3, $8, $15; }"""
ROWS_PRODUCT = """{ .reg .b32 h, l;
    dp4a.s32.s32 h, $4, $5, 0; dp4a.s32.s32 l, $4, $6, 0;
    mad.lo.s32 $0, h, 128, l; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"""

def digits_of(query):
    """float32 [heads, d] -> words of four features' digits, int32 [heads, 2, d / 4], and scales [heads]."""
    most = jnp.max(jnp.abs(query), axis=1)
    number = jnp.round(query / most[:, None] * 16000).astype(jnp.int32)
    high = (number + 64) >> 7
    low = number - high * 128
    def words(digit):
        four = (digit & 0xFF).reshape(*digit.shape[:-1], -1, 4)
        return four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24
    return jnp.stack([words(high), words(low)], axis=1), most / 16000

def dp4a(query, cache, length, *, warps, parts, stages=1, interpret=False):
    heads, width = query.shape
    outputs = [jax.ShapeDtypeStruct((parts, heads, last), jnp.float32) for last in (width, 1, 1)]
    words, scales = digits_of(query * LOG2_E)
    sums, top, total = call_kernel(
        functools.partial(_kernel_dp4a, width=width, parts=parts, threads=32 * warps),
        (parts, heads), outputs, [words, scales, cache, length], "dp4a", interpret, num_warps=warps, num_stages=stages)
    return merge_softmaxes(sums, top[..., 0] / LOG2_E, 0, total[..., 0])

def _kernel_dp4a(words_ref, scale_ref, cache, length_ref, sums_ref, top_ref, total_ref, *, width, parts, threads):
    from jax.experimental.pallas import triton
    part, head, each = pl.program_id(0), pl.program_id(1), 4
    length, begin, end = _span(length_ref, part, parts, threads * each)
    lanes = each * iota(threads)[:, None] + iota(each)[None, :]
    shape = (threads, each)
    words = [[jnp.broadcast_to(words_ref[head, digit, f], shape) for f in range(width // 4)] for digit in range(2)]
    query_scale = scale_ref[head]
    int32 = jax.ShapeDtypeStruct(shape, jnp.int32)

    def block(index, carry):
        top, total, sums = carry
        rows = index * threads * each + lanes
        keys, values = ([masked_load(ref.at[0, head, f, rows]) for f in range(width)] for ref in (cache.key, cache.value))
        key_scale, value_scale = (masked_load(ref.at[0, head, rows]).astype(jnp.float32) for ref in (cache.key_scale, cache.value_scale))
        high, low = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
        for f in range(width // 4):
            high, low = (triton.elementwise_inline_asm(TRANSPOSE_AND_MULTIPLY,
                args=[*keys[4 * f: 4 * f + 4], words[digit][f], before],
                constraints=",".join(["=r"] * 4 + ["r"] * 12), pack=4, result_shape_dtypes=[int32])[0]
                for digit, before in enumerate((high, low)))
        scores = (high * 128 + low).astype(jnp.float32) * (key_scale * query_scale)
        scores = jnp.where(rows < length, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        factor, weight = jnp.exp2(top - base), jnp.exp2(scores - base[:, None])
        share = weight * value_scale
        most = jnp.maximum(jnp.max(share, axis=1), 1e-30)
        number = (share * (16256.0 / most)[:, None] + 0.5).astype(jnp.int32)
        upper, lower = (number >> 7).astype(jnp.int8), (number & 127).astype(jnp.int8)
        unit, new = most * (1 / 16256.0), []
        for value, old in zip(values, sums):
            product = triton.elementwise_inline_asm(ROWS_PRODUCT, args=[value, upper, lower],
                constraints="=r,=r,=r,=r,r,r,r", pack=4, result_shape_dtypes=[int32])[0]
            new.append(old * factor + jnp.sum(product, axis=1).astype(jnp.float32) * unit)
        return new_top, total * factor + jnp.sum(weight, axis=1), tuple(new)

    carry = (jnp.full((threads,), -jnp.inf, jnp.float32), jnp.zeros((threads,), jnp.float32),
             tuple(jnp.zeros((threads,), jnp.float32) for _ in range(width)))
    top, total, sums = jax.lax.fori_loop(begin, end, block, carry)
    most = jnp.maximum(jnp.max(top), -1e30)
    factor = jnp.exp2(top - most)
    for f, values in enumerate(sums):
        sums_ref[part, head, f] = jnp.sum(values * factor)
    top_ref[part, head, 0] = most
    total_ref[part, head, 0] = jnp.sum(total * factor)
