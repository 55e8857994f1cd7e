"""What the tests of the interpreter share: one adapted kernel, and the law for a function of it."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora
from tests.support import error, evaluated, randomised

RNG = np.random.default_rng(0)
OPTIONS = {"oft": {"block_size": 4}, "boft": {"block_size": 2, "factors": 2}, "lokr": {"factor": 2}}
VARIANTS = ("lora", "dora", "ia3", "oft", "boft")  # one for each of what a weight may be made of
TABLES = ("lora", "dora", "ia3")


def noise(*shape: int) -> Any:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def wrapped(kernel: Any, axes: Any, **settings: Any) -> Any:
    """``{"w": kernel}`` with a random adapter."""
    if isinstance(variant := settings.get("variant"), str):
        settings = {"options": OPTIONS.get(variant, {})} | settings
    spec = jlora.LoraSpec(targets="w", axes={"w": axes}, **({"rank": 2} | settings))
    return randomised(jlora.wrap({"w": kernel}, spec))


def check(fn: Any, params: Any, *args: Any, fallback: str = "error", tolerance: float = 2e-5) -> None:
    """Values and gradients are those of the merged kernel; where that has no number there is none."""

    def run(fn: Any) -> Any:
        def loss(p: Any) -> Any:
            y = fn(p, *args)
            return jnp.sum(jnp.nan_to_num(jnp.real(jnp.sin(jnp.asarray(y, jnp.result_type(y, jnp.float32)))))), y

        return jlora.value_and_grad(loss, has_aux=True)

    merged = lambda p, *args: fn(jlora.merge(p), *args)
    both = lambda p: [run(f)(p) for f in (jlora.apply(fn, fallback=fallback), merged)]
    ((_, found), slopes), ((_, expected), wanted) = evaluated(both, params)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.array_equal(np.isnan(np.asarray(found, complex)), np.isnan(np.asarray(expected, complex)))
    known = lambda y: [part(jnp.nan_to_num(jnp.asarray(y, jnp.complex64))) for part in (jnp.real, jnp.imag)]
    assert error(known(found), known(expected)) <= tolerance
    assert error(slopes, wanted) <= tolerance
