"""Designs as patches of the package."""
import dataclasses, functools
from typing import Any, NamedTuple
import jax, jax.numpy as jnp
import k2_variants as v, slide_variants as s
from tlinformer_jax.decoding import cache as cache_module, history, windowed
from tlinformer_jax.decoding.params import embed
from tlinformer_jax.kernels import history as kernel
from tlinformer_jax.models import block as block_module, cached_attention as ca, feed_forward as ff, layers as layers_module
from tlinformer_jax.models.layers import first_norm, layer_norm, project, projections, unbiased_projections
from tlinformer_jax.models.rope import rotary_angles, rotate
from tlinformer_jax.models.streams import Stream

PLACES = [(history.CachedHistory, "restore"), (history.CachedHistory, "_made"), (windowed, "embedded_history"), (history, "attend_context"),
          (kernel, "attend"), (kernel, "attend_few"), (kernel, "store"), (layers_module, "norm_branch"), (block_module, "update"),
          (ff, "feed_forward"), (layers_module, "feed_forward"), (ca, "use_kernels"), (cache_module, "CHUNK_ROWS"), (history, "write_rows"), (history, "for_chunks")]
ORIGINAL = [getattr(*place) for place in PLACES]
INTERPRET = False
OPTIONS = {"project": {}, "aligned": {"rt": 1024, "warps": 4, "unit": 1}, "pairs": {"pt": 128, "rt": 32, "warps": 4, "unit": 1}, "attend": {}, "few": {"block": 512, "qt": 64, "warps": 4, "stages": 3, "ones": True}, "norm": {"rows": 4, "warps": 4}, "gated": None}

def reset():
    for (owner, name), value in zip(PLACES, ORIGINAL): setattr(owner, name, value)

def plain(): ca.use_kernels = lambda *a: False

def lanes(at, layer, Kz, Vz):
    width, multiple = at.config.head_dim, kernel.ROW_TILE
    padding = ((0, 0), (0, -Kz.shape[1] % multiple), (0, 0), (0, 0))
    return jax.lax.optimization_barrier(tuple(ca.lane_rows(jnp.pad(array, padding), width)[0] for array in (Kz, Vz)))

def hoisted():
    def restore(self, restore_rows, shared, fixed, next_layer, parts):
        layer, Kz, Vz = shared
        width = self.at.config.head_dim
        key, value = lanes(self.at, layer, Kz, Vz)
        small = jax.lax.optimization_barrier(layer.out_bias.astype(Kz.dtype))
        shared = dataclasses.replace(layer, out_bias=small), Kz, Vz
        def attend(query, _, __, *, key_length, **rest):
            return kernel.attend_few(query[0], key, value, key_length, rest["scale"], **({"interpret": True} if INTERPRET else {}))[None]
        restore_rows = functools.partial(restore_rows, shared=shared, fixed=fixed, attend=attend)
        def rows(start):
            before = self.rows(start)
            return restore_rows(before, self.queries(start, before))
        def queries(start, rows):
            return project(next_layer, rows, self.at.rope(start), "q")[0]
        z = Stream.of(next_layer, restore_rows(self.z.rows, self.z.Q), self.z_rope, "q")
        new = dataclasses.replace(self, layer=next_layer, z=z, rows=rows, queries=queries, key_rows=None)
        return new._made(keep_rows="q" in parts)
    history.CachedHistory.restore = restore

def tables(at, start):
    angles = rotary_angles(at.positions(start)[None, :], at.config.head_dim, at.config.longest_wavelength)  # [1, rows, half]
    angles = jnp.moveaxis(angles[0], -1, 0)
    return jnp.cos(angles), jnp.sin(angles)

def made(how, norm=False):
    original = history.CachedHistory._made
    def _made(self, keep_rows):
        if not self.keys or keep_rows or self.key_rows is not None: return original(self, keep_rows)
        at, (keys, *rest) = self.at, self.keys
        layer, width = self.layer, keys.key.shape[2]
        if how == "project":
            weights, bias = jax.lax.optimization_barrier(s.prepared(layer.qkv_kernel[:, 1:], layer.qkv_bias[1:], width))
        else:
            weights = jax.lax.optimization_barrier(jnp.moveaxis(layer.qkv_kernel[:, 1:, :, :width], 0, -1))
            bias = layer.qkv_bias[1:, :, :width].astype(weights.dtype)
        def body(start, keys):
            rows = self.rows(start)
            normed = v.norm(rows[0], layer.norm1_scale, layer.norm1_bias, **OPTIONS["norm"], interpret=INTERPRET) if norm else first_norm(layer, rows)[0]
            if how == "project":
                return s.project(keys, normed, weights, bias, tables(at, start), at.row, start, **OPTIONS["project"], interpret=INTERPRET)
            products = jnp.einsum("phkd,ld->phkl", weights, normed)
            return s.store_aligned(keys, products, bias, tables(at, start), at.row, start, **OPTIONS["aligned"], interpret=INTERPRET)
        keys = history.for_chunks(at.held, at.cache.room, body, keys)
        return dataclasses.replace(self, keys=tuple(rest), filled=(*self.filled, keys))
    history.CachedHistory._made = _made

def words(how):
    def embedded_history(params, at, z_rows, z_rope, fill):
        layer, vocabulary = params.blocks[0].compress, params.embedding[None]
        caches = at.cache.history
        first, later = caches[:1], caches[1:]
        width = at.config.head_dim
        def rows(start): return at.embed(params, start).rows
        def projected(start, rows): return project(layer, rows, at.rope(start), "q")[0]
        def looked_up(start, rows): return rotate(jnp.take(table, at.ids(start), axis=0, mode="clip"), at.rope(start))
        z = Stream.of(layer, z_rows, z_rope, "q")
        if at.cache.room < history.ROWS_PER_TOKEN * at.config.vocab_size:
            if not fill: return history.CachedHistory(at, layer, z, z_rope, rows, projected, later, first, None)
            return history.CachedHistory(at, layer, z, z_rope, rows, projected, caches, (), None)._made(keep_rows=False)
        table = projections(layer, vocabulary, "q")[0, :, 0]
        if fill:
            if how == "pairs":
                products, bias = unbiased_projections(layer, vocabulary, "kv")
                pairs = jax.lax.optimization_barrier(v.pairs_table(products[0], bias, width))
                def write(start, keys):
                    return s.store_pairs(keys, pairs, tables(at, start), at.row, start, at.ids(start)[0], **OPTIONS["pairs"], interpret=INTERPRET)
            else:
                normed = first_norm(layer, vocabulary)[0]
                weights, bias = jax.lax.optimization_barrier(s.prepared(layer.qkv_kernel[:, 1:], layer.qkv_bias[1:], width))
                def write(start, keys):
                    return s.project(keys, normed, weights, bias, tables(at, start), at.row, start, at.ids(start)[0], **OPTIONS["project"], interpret=INTERPRET)
            first = tuple(history.for_chunks(at.held, at.cache.room, write, keys) for keys in first)
        return history.CachedHistory(at, layer, z, z_rope, rows, looked_up, later, first)
    windowed.embedded_history = embedded_history

class Words(NamedTuple):
    table: Any
    tokens: Any

def norms():
    original, branch0 = windowed.embedded_history, layers_module.norm_branch
    def embedded(params, at, z_rows, z_rope, fill):
        new = original(params, at, z_rows, z_rope, fill)
        if fill and not new.filled and new.keys: return new
        return dataclasses.replace(new, rows=lambda start: Words(params.embedding, at.ids(start)[0]))
    queries0 = None
    update = block_module.update
    def updated(params, x, attended, dropout=None):
        if not isinstance(x, Words): return update(params, x, attended, dropout)
        product = jnp.einsum("blhk,hkd->bld", attended, params.out_kernel)
        x, normed = v.add_norm(x.table, product[0], params.out_bias, params.norm2_scale, params.norm2_bias, tokens=x.tokens, **OPTIONS["norm"], interpret=INTERPRET)
        return x[None] + ff.feed_forward(params.router, params.gate_up_kernel, params.down_kernel, normed[None])
    windowed.embedded_history, block_module.update = embedded, updated

def gated():
    original = ff.feed_forward
    def feed_forward(router, gate_up_kernel, down_kernel, x):
        if x.shape[1] < 4096: return original(router, gate_up_kernel, down_kernel, x)
        return (v.gated(x[0], gate_up_kernel, **OPTIONS["gated"], interpret=INTERPRET) @ down_kernel)[None]
    ff.feed_forward = feed_forward
    layers_module.feed_forward = feed_forward

def attention():
    if OPTIONS["attend"]: kernel.attend = functools.partial(v.attend, **OPTIONS["attend"])
def context():
    kernel.attend_few = functools.partial(v.few, **OPTIONS["few"])
def chunk(rows): cache_module.CHUNK_ROWS = rows

def tail():
    def for_chunks(length, capacity, body, carry, most=None):
        size = cache_module.chunk_rows(capacity, most)
        chunks = capacity // size
        per_round = min(chunks & -chunks, 1 << (max(1, chunks // cache_module.ROUNDS).bit_length() - 1))
        def one_round(number, carry):
            return jax.lax.fori_loop(0, per_round, lambda chunk, carry: body((number * per_round + chunk) * size, carry), carry)
        rounds = length // (per_round * size)
        carry = jax.lax.fori_loop(0, rounds, one_round, carry)
        if per_round == 1: rounds = rounds * 1
        return jax.lax.fori_loop(rounds * per_round, -(-length // size), lambda chunk, carry: body(chunk * size, carry), carry)
    history.for_chunks = for_chunks

def ones():
    """One chunk a round."""
    def for_chunks(length, capacity, body, carry, most=None):
        size = cache_module.chunk_rows(capacity, most)
        return jax.lax.fori_loop(0, -(-length // size), lambda chunk, carry: body(chunk * size, carry), carry)
    history.for_chunks = for_chunks

P = functools.partial
DESIGNS = {
    "plain": (plain,),
    "base": (),
    "store": (P(made, "store"), P(words, "pairs")),
    "store, tail": (P(made, "store"), P(words, "pairs"), tail),
    "store, tail, norms": (P(made, "store", norm=True), P(words, "pairs"), norms, tail),
    "store, tail, graphs": (P(made, "store"), P(words, "pairs"), tail),
    "store, graphs": (P(made, "store"), P(words, "pairs")),
    "store, loops in graphs": (P(made, "store"), P(words, "pairs")),
    "store, ones, loops in graphs": (P(made, "store"), P(words, "pairs"), ones),
    "base, loops in graphs": (),
}
TYPES = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
COMPILER = {"store, tail, graphs": {"xla_gpu_enable_command_buffer": TYPES, "xla_gpu_graph_min_graph_size": 1},
            "store, graphs": {"xla_gpu_enable_command_buffer": TYPES, "xla_gpu_graph_min_graph_size": 1, "xla_gpu_command_buffer_unroll_loops": True},
            "store, loops in graphs": {"xla_gpu_enable_command_buffer": TYPES + ",CONDITIONAL,WHILE", "xla_gpu_graph_min_graph_size": 1},
            "store, ones, loops in graphs": {"xla_gpu_enable_command_buffer": TYPES + ",CONDITIONAL,WHILE", "xla_gpu_graph_min_graph_size": 1},
            "base, loops in graphs": {"xla_gpu_enable_command_buffer": TYPES + ",CONDITIONAL,WHILE", "xla_gpu_graph_min_graph_size": 1}}
def use(name):
    reset()
    for patch in DESIGNS[name]: patch()
