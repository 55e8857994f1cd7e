"""Kernels that are gathered from devices: what of an adapter differs from one to the other is gathered too."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from tests.interpret.support import VARIANTS, noise, wrapped
from tests.support import error, randomised, thinned

STACK = jlora.Axes((1,), (2,), (0,))
MESH = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
WAYS = {
    "tiled along in": (lambda k: lax.all_gather(k[0], "d", axis=0, tiled=True), 16),
    "tiled along out": (lambda k: lax.all_gather(k[0], "d", axis=1, tiled=True), 8),
    "stacked": (lambda k: lax.all_gather(k[0], "d", axis=0).sum(0), 8),
    "tiled along the layers": (lambda k: lax.all_gather(k, "d", axis=0, tiled=True).sum(0), 8),
}


@pytest.mark.parametrize("variant, name, check_vma", thinned(5, VARIANTS, WAYS, (True, False)))
def test_stages_that_are_gathered(variant, name, check_vma):
    """Each device has a layer of its own, factors and all."""
    gather, width = WAYS[name]
    params, x = wrapped(noise(2, 8, 6), STACK, variant=variant), noise(4, width)
    placed = functools.partial(
        jax.shard_map, mesh=MESH, in_specs=(P("d"), P("d")), out_specs=P("d"), check_vma=check_vma
    )
    fn = lambda p, x: placed(lambda k, x: x @ gather(k))(p["w"], x)
    assert error(jlora.apply(fn, fallback="ignore")(params, x), fn(jlora.merge(params), x)) <= 2e-5


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_of_one_kernel_keep_their_factors(check_vma):
    """As in fully sharded data parallelism: the factor that is not split is the same on all devices."""
    params, x = wrapped(noise(8, 6), jlora.Axes((0,), (1,))), noise(4, 8)
    placed = functools.partial(
        jax.shard_map, mesh=MESH, in_specs=(P("d"), P("d")), out_specs=P("d"), check_vma=check_vma
    )
    fn = lambda p, x: placed(lambda k, x: x @ lax.all_gather(k, "d", axis=0, tiled=True))(p["w"], x)
    assert error(jlora.apply(fn, fallback="error")(params, x), fn(jlora.merge(params), x)) <= 2e-5


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tiled", [False, True])
def test_adapters_under_vmap_that_are_gathered(tiled, axis):
    spec = jlora.LoraSpec(targets="w", axes={"w": jlora.Axes((0,), (1,))}, rank=2)
    trees = [randomised(jlora.wrap({"w": noise(8, 8)}, spec), std=std) for std in (0.3, 0.6)]
    stacked = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def fn(p):
        return jnp.sin(lax.all_gather(p["w"], "i", axis=axis, tiled=tiled)).sum(axis)

    found = jax.vmap(jlora.apply(fn, fallback="ignore"), axis_name="i")(stacked(trees))
    expected = jax.vmap(fn, axis_name="i")(stacked(list(map(jlora.merge, trees))))
    assert error(found, expected) <= 2e-5


def test_kernels_split_by_the_function_and_handed_in():
    params, x = wrapped(noise(8, 12), jlora.Axes((0,), (1,))), noise(4, 8)
    placed = jax.shard_map(lambda x, w: x @ w, mesh=MESH, in_specs=(P("d"), P()), out_specs=P("d"))
    for split in (lambda w: jnp.split(w, 3, 1)[0], lambda w: tuple(jnp.split(w, 2, 1))[1], lambda w: w[:, ::2]):
        fn = lambda p, x, split=split: placed(x, split(p["w"]))
        assert error(jlora.apply(fn, fallback="error")(params, x), fn(jlora.merge(params), x)) <= 2e-5
