"""Collectives read from HLO: of programs compiled for eight simulated devices, and of texts as TPUs have them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tools.collectives import Shape, collectives

ROWS = PartitionSpec("d")


def _mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def _ring(x):
    return jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)])


def _text(function, out_specs=ROWS):
    """HLO of a function of one device's float32 [8, 16]."""
    run = jax.shard_map(function, mesh=_mesh(), in_specs=ROWS, out_specs=out_specs, check_vma=False)
    return jax.jit(run).lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()


def _found(text):
    return sorted((found.kind, found.trips, found.bytes) for found in collectives(text))


def _untold(text):
    """The same without what XLA says about trip counts, which the TPU's compiler does not say."""
    assert "known_trip_count" in text
    return re.sub(r'"known_trip_count":\{[^}]*\}', '"other":{}', text)


def test_every_kind_with_its_bytes():
    def each(x):
        whole = jax.lax.all_gather(x, "d", axis=1, tiled=True)
        part = jax.lax.psum_scatter(x, "d", tiled=True)
        return _ring(x) + jax.lax.psum(x, "d") + jax.lax.all_to_all(x, "d", 0, 0, tiled=True), whole, part

    text = _text(each, (ROWS, ROWS, ROWS))
    size = 8 * 16 * 4
    assert _found(text) == [
        ("all-gather", 1, 8 * size),
        ("all-reduce", 1, size),
        ("all-to-all", 1, size),
        ("collective-permute", 1, size),
        ("reduce-scatter", 1, size),
    ]
    scatter = next(found for found in collectives(text) if found.kind == "reduce-scatter")
    assert (scatter.operands, scatter.results) == ((Shape("f32", (8, 16)),), (Shape("f32", (1, 16)),))
    assert scatter.known_trips
    assert "reduce_scatter" in scatter.op_name


def test_loops_multiply_and_branches_are_read():
    def loops(x):
        def inner(i, x):
            return jax.lax.fori_loop(0, 4, lambda j, x: jax.lax.psum(x, "d") * 0.1, x)

        x = jax.lax.fori_loop(2, 5, inner, x)
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: _ring(x) * 2, lambda x: x, x)

    text = _text(loops)
    expected = [("all-reduce", 12, 512), ("collective-permute", 1, 512)]
    assert _found(text) == expected
    assert _found(_untold(text)) == expected
    assert next(found for found in collectives(text) if found.trips == 12).total_bytes == 12 * 512


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def until(x):
        return jax.lax.while_loop(lambda state: jnp.sum(state) < 3, lambda state: _ring(state) + 1, x)

    (found,) = collectives(_text(until))
    assert (found.kind, found.trips, found.known_trips) == ("collective-permute", 1, False)


@pytest.mark.parametrize("change", [str, _untold], ids=["told", "worked out"])
def test_a_loop_whose_length_another_loop_changes_counts_once_in_each_of_its_turns(change):
    def triangle(x):
        return jax.lax.fori_loop(
            0, 4, lambda i, x: jax.lax.fori_loop(0, i, lambda _, x: jax.lax.psum(x, "d") * 0.1, x), x
        )

    (found,) = collectives(change(_text(triangle)))
    assert (found.kind, found.trips, found.known_trips) == ("all-reduce", 4, False)


@pytest.mark.parametrize("change", [str, _untold], ids=["told", "worked out"])
def test_scan_over_split_weights_and_its_gradient(change):
    mesh = _mesh()

    def loss(weights, x):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, ROWS))
            return jnp.tanh(x), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    weights = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "d")))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, ROWS))
    found = _found(change(jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text()))
    # Each layer's weights are gathered forwards and backwards, and its gradient is reduced.
    size = 32 * 32 * 4
    assert found == [("all-gather", 5, size), ("all-gather", 5, size), ("all-reduce", 5, size)]


# As a TPU's compiler writes: tiled layouts, a loop that counts down, an all-gather spread over three fusions, pairs of
# start and done, a wrapped asynchronous operation.
TPU = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[256,128])) -> (s32[], bf16[256,128]) {
  %p = (s32[]{:T(128)}, bf16[256,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[256,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %i.1 = s32[]{:T(128)} subtract(%i, %two)
  %begun = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %on = bf16[1024,128]{1,0} fusion(%begun), kind=kOutput, calls=%carry
  %start = (bf16[256,128]{1,0}, bf16[256,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %done = bf16[256,128]{1,0:T(8,128)(2,1)} collective-permute-done(%start)
  ROOT %next = (s32[]{:T(128)}, /*index=1*/bf16[256,128]{1,0}) tuple(%i.1, %done)
}

%begin (a: bf16[256,128]) -> (bf16[256,128], bf16[1024,128]) {
  %a = bf16[256,128]{1,0} parameter(0)
  %g = bf16[1024,128]{1,0} all-gather(%a), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%carry (b: (bf16[256,128], bf16[1024,128])) -> bf16[1024,128] {
  %b = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}) parameter(0)
  %e = bf16[256,128]{1,0} get-tuple-element(%b), index=0
  ROOT %h = bf16[1024,128]{1,0} all-gather(%e), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%condition (q: (s32[], bf16[256,128])) -> pred[] {
  %zero = s32[]{:T(128)} constant(0)
  %q = (s32[]{:T(128)}, bf16[256,128]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%zero, %j), direction=LT
}

%wrapped (w: bf16[256,128]) -> bf16[64,128] {
  %w = bf16[256,128]{1,0} parameter(0)
  ROOT %s = bf16[64,128]{1,0} reduce-scatter(%w), channel_id=3, dimensions={0}, to_apply=%add
}

ENTRY %main (x.0: bf16[256,128]) -> bf16[64,128] {
  %x.0 = bf16[256,128]{1,0} parameter(0)
  %seven = s32[]{:T(128)} constant(7)
  %seven.1 = s32[]{:T(128)S(6)} copy(%seven)
  %t = (s32[]{:T(128)}, bf16[256,128]{1,0}) tuple(%seven.1, %x.0)
  %loop = (s32[]{:T(128)}, bf16[256,128]{1,0}) while(%t), condition=%condition, body=%body
  %y = bf16[256,128]{1,0} get-tuple-element(%loop), index=1
  %async = ((bf16[256,128]{1,0}), bf16[64,128]{1,0}, u32[]) async-start(%y), calls=%wrapped
  ROOT %z = bf16[64,128]{1,0} async-done(%async), calls=%wrapped
}
"""


def test_the_forms_of_tpus():
    # 7, 5, 3, 1: the body runs four times.
    assert _found(TPU) == [
        ("all-gather", 4, 1024 * 128 * 2),
        ("collective-permute", 4, 256 * 128 * 2),
        ("reduce-scatter", 1, 256 * 128 * 2),
    ]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("module @jit_f {}")


def test_bytes_of_dtypes():
    sizes = {"pred": 8, "s4": 4, "f8e4m3fn": 8, "bf16": 16, "f32": 32, "c64": 64, "token": 0}
    assert {dtype: Shape(dtype, (2, 4)).bytes for dtype in sizes} == sizes
