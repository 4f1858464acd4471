"""Rows split over an axis of the mesh: what each device holds, and what comes of them together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tlinformer_jax.kernels.common import Scores, merge_softmaxes
from tlinformer_jax.models.attention import attend, attend_with_lse
from tlinformer_jax.parallel.sharding import SplitRows, build_mesh

PARTS = 4
SPLIT = SplitRows("context", PARTS)


def on_devices(function):
    """`function` on four devices, on arrays that all hold whole; results are stacked over the devices."""
    mesh = build_mesh({"context": PARTS}, jax.devices()[:PARTS])

    def stacked(*arguments):
        return jax.tree.map(lambda array: array[None], function(*arguments))

    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec("context")}
    return jax.jit(jax.shard_map(stacked, mesh=mesh, check_vma=False, **specs))


def test_every_row_lies_on_one_device():
    rows = jnp.arange(24).reshape(1, 24, 1)
    mine, positions = on_devices(lambda rows: (SPLIT.take(rows), SPLIT.positions(2, 3)))(rows)
    np.testing.assert_array_equal(mine[:, 0, :, 0], [range(i, 24, PARTS) for i in range(PARTS)])
    np.testing.assert_array_equal(positions, mine[:, 0, 2:5, 0])


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_rows_are_counted_where_they_lie(length):
    counts = on_devices(SPLIT.count)(jnp.int32(length))
    np.testing.assert_array_equal(counts, [len(range(i, length, PARTS)) for i in range(PARTS)])


@pytest.mark.parametrize("length", [1, 5, 8, 24])
def test_any_rows_can_be_gathered(length):
    rows = jnp.arange(48.0).reshape(2, 24, 1)
    gather = on_devices(lambda rows, start: SPLIT.gather(SPLIT.take(rows), start, length))
    for start in range(24 - length + 1):
        for found in gather(rows, start):
            np.testing.assert_array_equal(found, rows[:, start : start + length])


@pytest.mark.parametrize("valid", [0, 2, 13, 24])
def test_merged_attention_and_its_gradient_are_those_of_one_device(valid):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, slope = (
        jax.random.normal(key, (2, rows, 3, 8)) * 2 for key, rows in zip(keys, (5, 24, 24, 5), strict=True)
    )

    def parted(query, key, value):
        options = {"key_length": SPLIT.count(valid), "backend": "xla"}
        found = attend_with_lse(query, SPLIT.take(key), SPLIT.take(value), Scores(8**-0.5), **options)
        return merge_softmaxes(*found, SPLIT.axis)[0]

    def loss(function, *arrays):
        return jnp.sum(function(*arrays) * slope)

    whole = functools.partial(attend, scores=Scores(8**-0.5), key_length=valid, backend="xla")
    expected = jax.value_and_grad(functools.partial(loss, whole), argnums=(0, 1, 2))(query, key, value)
    # Every device computes the whole loss, so its share of it is a fourth.
    share = functools.partial(lambda *arrays: loss(parted, *arrays) / PARTS)
    found = on_devices(jax.value_and_grad(share, argnums=(0, 1, 2)))(query, key, value)
    for one, each in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(each.sum(axis=0), one, atol=2e-5, rtol=1e-5)
