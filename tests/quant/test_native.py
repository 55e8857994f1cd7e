"""Products in 8 bits: asked for, on hardware that has them, with the exact product's gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.interpret import eightbits
from tests.support import error, same_bits

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)


def base(dtype="int8", tile=128, **settings):
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(256, 32)), jnp.float32)
    return jlora.quant.quantize({"kernel": kernel}, dtype, tile=tile, **settings)


def run(params, x, **settings):
    return jlora.apply(lambda p, x: x @ p["kernel"], **settings)(params, x)


def lowered(params, platform, **settings):
    """The program for a platform that is not here."""
    traced = jax.jit(lambda params, x: run(params, x, **settings)).trace(params, X)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def dots(text):
    return set(re.findall(r"dot_general .*: \(tensor<[0-9x]*x(\w+)>, tensor<[0-9x]*x(\w+)>", text))


@pytest.mark.parametrize(
    "dtype, platform, kind",
    [("int8", "tpu", "i8"), ("int8", "cuda", "i8"), ("fp8", "cuda", "f8E4M3FN"), ("fp8", "tpu", "f32"),
     ("int8", "cpu", "f32"), ("nf4", "tpu", "f32"), ("int4", "tpu", "f32")],
)  # fmt: skip
def test_where_products_are_in_eight_bits(dtype, platform, kind):
    assert dots(lowered(base(dtype), platform, native_dots=True)) == {(kind, kind)}
    assert dots(lowered(base(dtype), platform)) == {("f32", "f32")}


@pytest.mark.parametrize("settings", [{"tile": 64}, {"double_quant": True}])
def test_formats_that_have_none(settings):
    assert dots(lowered(base(**settings), "tpu", native_dots=True)) == {("f32", "f32")}


def test_without_such_hardware_nothing_changes():
    assert same_bits(run(base(), X, native_dots=True), run(base(), X))


@pytest.mark.parametrize("dtype, most", [("int8", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("tile", [128, None])
def test_values_and_gradients(dtype, most, tile, monkeypatch):
    """Here as if the CPU had such products: near to the exact ones, with the gradient of these."""
    monkeypatch.setattr(eightbits, "PLATFORMS", {"int8": ("cpu",), "float8_e4m3fn": ("cpu",)})
    params = jlora.wrap(base(dtype, tile), jlora.LoraSpec(rank=4))
    turned = lambda p, x: jnp.einsum("df,td->ft", p["kernel"], x)

    @jax.jit
    def program(params, x):
        values = run(params, x, native_dots=True), run(params, x)
        slope = lambda **settings: jax.grad(lambda x: run(params, x, **settings).sum())(x)
        return *values, jlora.apply(turned, native_dots=True)(params, x), slope(native_dots=True), slope()

    found, exact, found_turned, *slopes = program(params, X)
    assert 0 < error(found, exact) < most
    assert error(*slopes) <= 1e-6
    assert error(found_turned, exact.T) < most


def test_in_loops_and_stacks(monkeypatch):
    monkeypatch.setattr(eightbits, "PLATFORMS", {"int8": ("cpu",)})
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 256, 256)) / 16, jnp.float32)
    axes = {"kernel": jlora.Axes(1, 2, 0)}
    params = jlora.quant.quantize({"kernel": kernel}, "int8", tile=None, targets="kernel", axes=axes)

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]

    found, exact = (jax.jit(jlora.apply(scanned, native_dots=native))(params, X) for native in (True, False))
    assert 0 < error(found, exact) < 0.05
