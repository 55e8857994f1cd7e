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


@pytest.mark.parametrize("is_tiled", [True, False])
@pytest.mark.parametrize("tile", [32, None], ids=["scales by rows", "scales for all rows"])
def test_a_quantised_kernel_is_gathered_in_a_mapped_function(tile, is_tiled):
    """Its codes, and those of its scales that are split."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(w, x):
        whole = lax.all_gather(w, "data", tiled=is_tiled)
        return x @ (whole if is_tiled else whole.reshape(64, 8))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    axes = {"w": jlora.Axes((0,), (1,))}
    base = jlora.quant.quantize({"w": noise(64, 8)}, "int8", targets="w", axes=axes, tile=tile)
    params, x = randomised(jlora.wrap(base, jlora.LoraSpec(targets="w", axes=axes, rank=2))), noise(4, 64)
    run = jlora.apply(lambda p, x: mapped(p["w"], x), fallback="ignore")
    merged = lambda p, x: x @ jlora.merge(p, dtype=jnp.float32)["w"]
    assert error(*jax.jit(lambda p, x: (run(p, x), merged(p, x)))(params, x)) <= 2e-5
