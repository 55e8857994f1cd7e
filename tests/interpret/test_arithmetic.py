"""Kernels times numbers and vectors, summed, fused: the factors are kept, in a type that holds the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.interpret.support import OPTIONS, VARIANTS, check, noise, wrapped
from tests.support import error, randomised, thinned

MATRIX = jlora.Axes((0,), (1,))
X, COLUMNS, ROWS = noise(5, 8), noise(4), noise(8)
C = jnp.asarray(0.7)

SCALED = {
    "by columns": lambda w: w * COLUMNS,
    "over columns": lambda w: w / (2 + COLUMNS),
    "by a traced number": lambda w: C * w,
    "by columns, of the transpose": lambda w: (COLUMNS[:, None] * w.T).T,
    "negative": lambda w: -w,
}


@pytest.mark.parametrize("variant, name", thinned(4, VARIANTS, SCALED))
def test_scaled(variant, name):
    check(lambda p, x: x @ SCALED[name](p["w"]), wrapped(noise(8, 4), MATRIX, variant=variant), X)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_by_rows(variant):
    """A rotation mixes the rows."""
    is_turned = variant in ("oft", "boft")
    params = wrapped(noise(8, 4), MATRIX, variant=variant)
    check(lambda p, x: x @ (p["w"] * ROWS[:, None]), params, X, fallback="ignore" if is_turned else "error")


def test_the_vector_has_its_gradient():
    """It may be what trains: of a norm folded into the kernel."""
    params = wrapped(noise(8, 4), MATRIX)
    slope = lambda fn, p: jax.grad(lambda g: jnp.sum(jnp.sin(fn(p, g))))(COLUMNS)
    fn = lambda p, g: X @ (p["w"] * g)
    assert error(slope(jlora.apply(fn, fallback="error"), params), slope(fn, jlora.merge(params))) <= 2e-5


def several(variant, targets="*"):
    params = {"w": noise(8, 4), "u": noise(8, 4), "t": noise(4, 8), "plain": noise(8, 4)}
    spec = jlora.LoraSpec(targets=targets, rank=2, variant=variant, options=OPTIONS.get(variant, {}),
                          axes={"*": MATRIX})  # fmt: skip
    return randomised(jlora.wrap(params, spec))


SUMS = {
    "of two": lambda p: p["w"] + p["u"],
    "of three": lambda p: p["w"] + p["u"] + p["w"],
    "with a transpose": lambda p: p["w"] - p["t"].T,
    "with an array": lambda p: 1.0 - p["w"],
    "with what is not adapted": lambda p: p["w"] + 0.1 * p["plain"],
}
FUSED = {
    "out": lambda p: jnp.concatenate([p["w"], p["u"]], 1),
    "out, one not adapted": lambda p: jnp.concatenate([p["plain"], p["w"], p["plain"]], 1),
    "in, one not adapted": lambda p: jnp.concatenate([p["w"][:4], p["plain"][4:]], 0),
    "stacked, one not adapted": lambda p: jnp.stack([p["w"], p["plain"], p["u"]])[jnp.asarray([1, 0])][1],
}


@pytest.mark.parametrize("variant, name", thinned(3, ("lora", "loha", "dora"), [*SUMS, *FUSED]))
def test_summed_and_fused(variant, name):
    """What has an output scale can't be: it is computed densely, and rightly."""
    fallback = "ignore" if variant == "dora" else "error"
    check(lambda p, x: x @ (SUMS | FUSED)[name](p), several(variant, ("w", "u", "t")), X, fallback=fallback)


def test_a_sum_with_activations_is_no_kernel():
    """A table of positions that is added to a batch: nothing of the batch's size follows it."""
    fn = lambda p, x: jnp.tanh(x + p["w"]) @ COLUMNS
    with pytest.warns(jlora.DenseFallbackWarning, match="for add at"):
        check(fn, wrapped(noise(8, 4), MATRIX), noise(3, 8, 4), fallback="warn")


# -------------------------------------------------------------------------------- types

COMPLEX = {
    "times i": lambda w: w * 1j,
    "over i": lambda w: w / 2j,
    "a traced number": lambda w: w * (C + 1j * C),
    "cast, then scaled": lambda w: w.astype(jnp.complex64) * (0.3 - 1j),
    "a view of it": lambda w: (w.T * 1j).T,
}


@pytest.mark.parametrize("variant, name", thinned(5, VARIANTS, COMPLEX))
def test_complex_views(variant, name):
    params = wrapped(noise(8, 4), MATRIX, variant=variant)
    check(lambda p, x: x.astype(jnp.complex64) @ COMPLEX[name](p["w"]), params, X)
    check(lambda p, x: jnp.dot(x, COMPLEX[name](p["w"])), params, X)  # an input that stays real


def test_real_and_imaginary_parts_of_two_kernels():
    """As S5, LRU and Fourier neural operators write it."""
    fn = lambda p, x: jnp.real((x * (1 + 2j)) @ (p["w"] + 1j * p["u"]))
    check(fn, several("lora"), X)
    check(fn, several("dora"), X, fallback="ignore")


def test_the_real_part_of_a_complex_kernel():
    fn = lambda p, x: x @ jnp.real((p["w"] * (0.3 + 1j)) * 1j)
    check(fn, wrapped(noise(8, 4), MATRIX), X, fallback="ignore")


STORED, INTEGERS = (jnp.float8_e4m3fn, jnp.float8_e5m2), (jnp.int32, jnp.int8, jnp.bool_)


@pytest.mark.parametrize("variant, dtype", thinned(3, VARIANTS, STORED))
def test_eight_bits_are_those_of_the_merged_kernel(variant, dtype):
    """A product scaled by hand: the sum is rounded, not the base alone, which may overflow where the sum does not."""
    params = wrapped(noise(8, 4), MATRIX, variant=variant)
    small = lambda v, scale: (v / scale).astype(dtype)

    def scaled(p, x):
        largest = jnp.max(jnp.abs(p["w"]), axis=0)
        step = largest / jnp.finfo(dtype).max.astype(jnp.float32)
        return lax.dot(small(x, 0.02), small(p["w"], step), preferred_element_type=jnp.float32) * (0.02 * step)

    for fn in (
        scaled,
        lambda p, x: small(x, 0.2) @ small(p["w"], 0.5),
        lambda p, x: x @ (2 * small(p["w"], 1)).astype(jnp.float32),
    ):
        found, expected = jlora.apply(fn, fallback="ignore")(params, X), fn(jlora.merge(params), X)
        assert found.dtype == expected.dtype
        assert error(found.astype(jnp.float32), expected.astype(jnp.float32)) <= 1e-5
    (site,) = jlora.sites(scaled, {"w": noise(8, 4)}, X).values()
    assert [use.kind for use in site.uses][-1] == "dot"


@pytest.mark.parametrize("variant, dtype, on", thinned(5, VARIANTS, INTEGERS, ("in", "out")))
def test_integers_times_a_kernel(variant, dtype, on):
    """What acts on the inputs acts on them as numbers."""
    options = {"options": {"on": on}} if variant == "ia3" else {}
    params = wrapped(noise(8, 4), MATRIX, variant=variant, **options)
    check(lambda p, x: jnp.dot(x, p["w"]), params, (jnp.arange(24) % 5).reshape(3, 8).astype(dtype))


@pytest.mark.parametrize("variant", [*thinned(3, VARIANTS)])
def test_inputs_of_a_coarser_type(variant):
    """A product of bfloat16 and float32 is one of float32 on the low-rank path too."""
    params = wrapped(noise(8, 4), MATRIX, variant=variant)
    check(lambda p, x: lax.dot(x, p["w"], preferred_element_type=jnp.float32), params, X.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("is_adapted", [False, True], ids=["bare", "adapted"])
def test_a_quantised_kernel_is_scaled_and_cast_in_the_programs_order(is_adapted, dtype):
    kernel = noise(8, 4).astype(jnp.bfloat16)
    base = jlora.quant.quantize({"w": kernel}, dtype, targets="w", tile=4, axes={"w": MATRIX})
    spec = jlora.LoraSpec(targets="w", axes={"w": MATRIX}, rank=2)
    params = randomised(jlora.wrap(base, spec)) if is_adapted else base
    plain = jlora.merge(params, dtype=jnp.bfloat16) if is_adapted else jlora.quant.dequantize(params)
    for view in (
        lambda w: (w * 0.5).astype(jnp.float32),
        lambda w: (w.astype(jnp.float32) / 3).astype(jnp.bfloat16).astype(jnp.float32),
        lambda w: ((w * 3).T.astype(jnp.float32) * 0.1).T,
    ):
        fn = lambda p, x, view=view: x @ view(p["w"])
        found, expected = jlora.apply(fn)(params, X), fn(plain, X)
        assert found.dtype == expected.dtype
        # A merged kernel is rounded to bfloat16; without adapters both are the same numbers.
        assert np.abs(found - expected).max() <= (0.06 if is_adapted else 1e-5)
