"""Patches of the package, one function for each design."""
import functools
import jax, jax.numpy as jnp
import k2_variants as v
from tlinformer_jax.decoding import cache as cache_module, history
from tlinformer_jax.kernels import history as kernel
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models import cached_attention as ca
from tlinformer_jax.models.layers import layer_norm
from tlinformer_jax.models.rope import Rope

from tlinformer_jax.decoding import windowed
ORIGINAL = (history.attend_context, windowed.embedded_history, history.CachedHistory._made, kernel.attend, kernel.attend_few, kernel.store, cache_module.CHUNK_ROWS)

def reset():
    history.attend_context, windowed.embedded_history, history.CachedHistory._made, kernel.attend, kernel.attend_few, kernel.store, cache_module.CHUNK_ROWS = ORIGINAL

def transposed():
    """Keys and values as [2, heads, d_h, rows] from the product; XLA adds bias, rotates and writes."""
    original = history.CachedHistory._made
    def made(self, keep_rows):
        if not self.keys or keep_rows or self.key_rows is not None:
            return original(self, keep_rows)
        at, (keys, *rest) = self.at, self.keys
        def body(start, keys):
            rows = self.rows(start)
            layer, width = self.layer, keys.key.shape[2]
            normed = layer_norm(rows, layer.norm1_scale, layer.norm1_bias)[0]
            kernel_ = layer.qkv_kernel[:, 1:, :, :width]
            products = jnp.einsum("dphk,ld->phkl", kernel_, normed)
            rope = at.rope(start)
            return v.store_xla(keys, products, layer.qkv_bias[1:, :, :width].astype(rows.dtype), (rope.cos.T, rope.sin.T), at.row, start)
        keys = history.for_chunks(at.held, at.cache.room, body, keys)
        import dataclasses
        return dataclasses.replace(self, keys=tuple(rest), filled=(*self.filled, keys))
    history.CachedHistory._made = made

def fast_attention(attend=None, few=None):
    kernel.attend = functools.partial(v.attend, **(attend or {}))
    kernel.attend_few = functools.partial(v.few, **(few or {"block": 512, "qt": 64, "warps": 4, "stages": 3, "ones": True}))

from typing import NamedTuple, Any
class LookedUp(NamedTuple):
    table: Any
    tokens: Any
    tables: Any
    @property
    def dtype(self): return self.table.dtype

def lookup(**options):
    """Queries of block 0 are looked up and rotated inside the kernel that reads the context."""
    attend_context, embedded = ca.attend_context, history.embedded_history
    options = options or {"block": 512, "qt": 64, "warps": 4, "stages": 2, "ones": True}
    def context(query, key, value, *, head_dim, key_length, **rest):
        if not isinstance(query, LookedUp):
            return attend_context(query, key, value, head_dim=head_dim, key_length=key_length, **rest)
        padding = ((0, 0), (0, -key.shape[1] % kernel.ROW_TILE), (0, 0), (0, 0))
        key, value = (ca.lane_rows(jnp.pad(array, padding), head_dim)[0] for array in (key, value))
        return v.few(query.table, key, value, key_length, rest["scale"], tokens=query.tokens, tables=query.tables, **options)[None]
    def made(params, at, z_rows, z_rope, fill):
        new = embedded(params, at, z_rows, z_rope, fill)
        if new.queries.__name__ != "looked_up":
            return new
        table = new.queries.__closure__[[c for c in new.queries.__code__.co_freevars].index("table")].cell_contents
        def looked_up(start, rows):
            rope = at.rope(start)
            return LookedUp(table, at.ids(start)[0], (rope.cos, rope.sin))
        import dataclasses
        return dataclasses.replace(new, queries=looked_up)
    history.attend_context = context
    windowed.embedded_history = made

def flat_words(**options):
    original = kernel.store
    def store(cache, projected, bias, tables, row, start, tokens=None, interpret=False):
        if tokens is None:
            return original(cache, projected, bias, tables, row, start, tokens, interpret)
        return v.store_flat(cache, projected, bias, tables, row, start, tokens, interpret=interpret, **options)
    kernel.store = store

def chunk(rows):
    cache_module.CHUNK_ROWS = rows

DESIGNS = {
    "base": (),
    "transposed": (transposed,),
    "all": (transposed, fast_attention, functools.partial(flat_words, ft=64, rt=64)),
    "all, lookup": (transposed, fast_attention, lookup, functools.partial(flat_words, ft=64, rt=64)),
    "all, chunks of 65536": (transposed, fast_attention, functools.partial(flat_words, ft=64, rt=64), functools.partial(chunk, 65536)),
    "all, chunks of 131072": (transposed, fast_attention, functools.partial(flat_words, ft=64, rt=64), functools.partial(chunk, 131072)),
}

def use(name):
    reset()
    for patch in DESIGNS[name]:
        patch()


# ---- second round
import dataclasses
from tlinformer_jax.models import block as block_module, layers as layers_module
from tlinformer_jax.models.feed_forward import feed_forward
from tlinformer_jax.models.rope import rotary_angles
from tlinformer_jax.models.streams import Stream
from tlinformer_jax.models.layers import project
ORIGINAL2 = (history.CachedHistory.restore, layers_module.norm_branch, block_module.update, windowed.embedded_history, history.write_rows, layers_module.layer_norm)
reset1 = reset
def reset():
    reset1()
    (history.CachedHistory.restore, layers_module.norm_branch, block_module.update, windowed.embedded_history, history.write_rows, layers_module.layer_norm) = ORIGINAL2
OPTIONS = {"few": {"block": 512, "qt": 64, "warps": 4, "stages": 3, "ones": True}, "norm": {"rows": 8, "warps": 4}, "store_t": {"rt": 1024, "warps": 4}, "pairs": {"pt": 32, "rt": 64, "warps": 8}}

def kv_columns(norm=False, pallas=True):
    original = history.CachedHistory._made
    def made(self, keep_rows):
        if not self.keys or keep_rows or self.key_rows is not None:
            return original(self, keep_rows)
        at, (keys, *rest) = self.at, self.keys
        layer, width = self.layer, keys.key.shape[2]
        weights = jax.lax.optimization_barrier(layer.qkv_kernel[:, 1:, :, :width])
        bias = layer.qkv_bias[1:, :, :width].astype(weights.dtype)
        def body(start, keys):
            rows = self.rows(start)
            normed = v.norm(rows[0], layer.norm1_scale, layer.norm1_bias, **OPTIONS["norm"]) if norm else layer_norm(rows, layer.norm1_scale, layer.norm1_bias)[0]
            products = jnp.einsum("dphk,ld->phkl", weights, normed)
            angles = rotary_angles(at.positions(start), at.config.head_dim, at.config.longest_wavelength).T
            tables = jnp.cos(angles), jnp.sin(angles)
            if pallas:
                return v.store_t(keys, products, bias, tables, at.row, start, **OPTIONS["store_t"])
            return v.store_xla(keys, products, bias, tables, at.row, start)
        keys = history.for_chunks(at.held, at.cache.room, body, keys)
        return dataclasses.replace(self, keys=tuple(rest), filled=(*self.filled, keys))
    history.CachedHistory._made = made

def hoisted():
    def restore(self, restore_rows, shared, fixed, next_layer, parts):
        layer, Kz, Vz = shared
        width = self.at.config.head_dim
        padding = ((0, 0), (0, -Kz.shape[1] % kernel.ROW_TILE), (0, 0), (0, 0))
        lanes = jax.lax.optimization_barrier(tuple(ca.lane_rows(jnp.pad(array, padding), width)[0] for array in (Kz, Vz)))
        def attend(query, key, value, *, key_length, **rest):
            return v.few(query[0], *lanes, key_length, rest["scale"], **OPTIONS["few"])[None]
        restore_rows = functools.partial(restore_rows, shared=shared, fixed=fixed)
        def rows(start):
            before = self.rows(start)
            return restore_rows(before, self.queries(start, before), attend=attend)
        def queries(start, rows):
            return project(next_layer, rows, self.at.rope(start), "q")[0]
        z = Stream.of(next_layer, restore_rows(self.z.rows, self.z.Q, attend=functools.partial(ca.attend_context, head_dim=width)), self.z_rope, "q")
        new = dataclasses.replace(self, layer=next_layer, z=z, rows=rows, queries=queries, key_rows=None)
        return new._made(keep_rows="q" in parts)
    history.CachedHistory.restore = restore

def norm_kernel():
    original = layers_module.norm_branch
    def branch(x, scale, bias):
        if x.shape[1] < 4096: return original(x, scale, bias)
        return x, v.norm(x[0], scale, bias, **OPTIONS["norm"])[None]
    layers_module.norm_branch = branch

class Words(NamedTuple):
    table: Any
    tokens: Any

def add_norm():
    embedded, update = windowed.embedded_history, block_module.update
    def made(params, at, z_rows, z_rope, fill):
        new = embedded(params, at, z_rows, z_rope, fill)
        return dataclasses.replace(new, rows=lambda start: Words(params.embedding, at.ids(start)[0]))
    def updated(params, x, attended, dropout=None):
        if not isinstance(x, Words): return update(params, x, attended, dropout)
        product = jnp.einsum("blhk,hkd->bld", attended, params.out_kernel)
        x, normed = v.add_norm(x.table, product[0], params.out_bias, params.norm2_scale, params.norm2_bias, tokens=x.tokens, **OPTIONS["norm"])
        return x[None] + feed_forward(params.router, params.gate_up_kernel, params.down_kernel, normed[None])
    windowed.embedded_history, block_module.update = made, updated

def word_pairs():
    original = kernel.store
    def store(cache, projected, bias, tables, row, start, tokens=None, interpret=False):
        if tokens is None: return original(cache, projected, bias, tables, row, start, tokens, interpret)
        table = v.pairs_table(projected, bias, cache.key.shape[2])   # loop invariant; hoisted by a barrier below
        return v.store_pairs(cache, table, tables, row, start, tokens, **OPTIONS["pairs"])
    kernel.store = store
    write_rows = history.write_rows

ATTEND = {}
def attention2(): kernel.attend = functools.partial(v.attend, **ATTEND)
def few2(): kernel.attend_few = functools.partial(v.few, **OPTIONS["few"])

DESIGNS = {
    "base": (),
    "columns by XLA": (functools.partial(kv_columns, pallas=False), attention2, few2, hoisted),
    "columns": (kv_columns, attention2, few2, hoisted, word_pairs),
    "columns, norm": (functools.partial(kv_columns, norm=True), attention2, few2, hoisted, norm_kernel, word_pairs),
    "columns, add and norm": (functools.partial(kv_columns, norm=True), attention2, few2, hoisted, add_norm, word_pairs),
}
