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
