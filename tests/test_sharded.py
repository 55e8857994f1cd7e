"""`apply` where the function itself is mapped over a mesh: values and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support import error, randomised

P = jax.P


def megatron(mesh, check_vma):
    """A tensor-parallel MLP: columns of `up`, rows of `down`, one sum."""

    def local(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "model")

    specs = (P(None, "model"), P("model", None), P("data"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
    return lambda p, x: mapped(p["up"]["kernel"], p["down"]["kernel"], x)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"up": {"kernel": noise(6, 16)}, "down": {"kernel": noise(16, 6)}}
    x = noise(8, 6)
    plain = lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    wrapped = randomised(jlora.wrap(params, jlora.LoraSpec(rank=2, alpha=2)))
    mapped = jlora.apply(megatron(mesh, check_vma), fallback="error")
    loss = lambda f: jax.jit(jlora.value_and_grad(lambda p: jnp.sum(jnp.sin(f(p)))))
    found = loss(lambda p: mapped(p, x))(wrapped)
    expected = loss(lambda p: plain(jlora.merge(p), x))(wrapped)
    assert error(found, expected) <= 2e-5


VIEWS = {"as it is": lambda w: w, "transposed": lambda w: w.T, "reversed": lambda w: w[::-1]}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_mapped_product_in_a_loop_over_a_quantised_stack(view):
    """A layer is taken out of the stack, and what its codes can't follow is computed, before the shards are cut."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P("data")
    product = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), rows), out_specs=rows)
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(product(view(w), x)), None), x, p["w"])[0]
    plain = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ view(w)), None), x, p["w"])[0]
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
    axes = {"w": jlora.Axes((1,), (2,), (0,))}
    base = jlora.quant.quantize({"w": noise(2, 64, 64)}, "int8", targets="w", axes=axes)
    params = randomised(jlora.wrap(base, jlora.LoraSpec(targets="w", axes=axes, rank=2)), 0.05)
    merged = lambda p, x: plain(jlora.merge(p, dtype=jnp.float32), x)
    run = jax.jit(lambda p, x: (jlora.apply(fn, fallback="error")(p, x), merged(p, x)))
    assert error(*run(params, noise(4, 64))) <= 2e-5


def gathered(w, x):
    return x @ lax.all_gather(w, "data", tiled=True)


def stacked(w, x):
    return x @ lax.all_gather(w, "data").reshape(64, 8)


def handed_on(w, x):
    return x[:, :32] @ lax.ppermute(w, "data", [(0, 1), (1, 0)])


@pytest.mark.parametrize("local", [gathered, stacked, handed_on])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("tile", [32, None, 0], ids=["scales by rows", "scales for all rows", "dense"])
def test_a_split_kernel_goes_to_other_devices(local, check_vma, tile):
    """Its codes, its scales and its factors, of which some are split and others are everywhere the same."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P("data")), "out_specs": P("data")}
    mapped = jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs)
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, axes = {"w": noise(64, 8)}, {"w": jlora.Axes((0,), (1,))}
    if tile != 0:
        params = jlora.quant.quantize(params, "int8", targets="w", axes=axes, tile=tile)
    tree, x = randomised(jlora.wrap(params, jlora.LoraSpec(targets="w", axes=axes, rank=2))), noise(4, 64)
    run = lambda w, x: mapped(w["w"], x)
    both = lambda p, x: (jlora.apply(run, fallback="ignore")(p, x), run(jlora.merge(p, dtype=jnp.float32), x))
    assert error(*jax.jit(both)(tree, x)) <= 2e-5
