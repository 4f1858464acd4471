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
