"""Lookups: in tables and in stacks, however they are written, in bounds and out of them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from tests.interpret.support import TABLES, VARIANTS, check, noise, wrapped
from tests.support import thinned

TABLE, EXPERTS = jlora.Axes((0,), (1,)), jlora.Axes((1,), (2,), (0,))
IDS, FAR = jnp.asarray([4, 0, 3]), jnp.asarray([0, 9, -1, -30])
X = noise(3, 8)
MODES = {
    "filled": {"mode": "fill", "fill_value": -1.5},
    "nothing": {"mode": "fill"},
    "clip": {"mode": "clip"},
    "wrap": {"mode": "wrap"},
}


def as_table(kernel, variant):
    return wrapped(kernel, TABLE, variant=variant, rank=1)


@pytest.mark.parametrize("variant, rows, mode", thinned(3, TABLES, (1, 6), MODES))
def test_rows_out_of_bounds_are_the_functions_own(variant, rows, mode):
    """No adapter acts on a value that is not of the table; where that is NaN, gradients are none the less numbers."""
    check(lambda p: jnp.take(p["w"], FAR, axis=0, **MODES[mode]), as_table(noise(rows, 8), variant))


@pytest.mark.parametrize("variant, experts, mode", thinned(5, VARIANTS, (1, 3), MODES))
def test_experts_out_of_bounds_are_the_functions_own(variant, experts, mode):
    fn = lambda p, x: jnp.einsum("bi,bio->bo", x, jnp.take(p["w"], FAR[:3], axis=0, **MODES[mode]))
    check(fn, wrapped(noise(experts, 8, 4), EXPERTS, variant=variant), X)


SPELLINGS = {
    "by an array": lambda w: w[IDS],
    "take": lambda w: jnp.take(w, IDS, axis=0),
    "mapped index": lambda w: jax.vmap(lambda i: w[i])(IDS),
    "mapped take": lambda w: jax.vmap(lambda i: jnp.take(w, i, axis=0))(IDS),
    "mapped slice": lambda w: jax.vmap(lambda i: lax.dynamic_index_in_dim(w, i, keepdims=False))(IDS),
    "mapped slice of one": lambda w: jax.vmap(lambda i: lax.dynamic_slice(w, (i, 0), (1, 8))[0])(IDS),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_lookup_is_one_however_it_is_written(name):
    fn, kernel = lambda p: SPELLINGS[name](p["w"]), noise(6, 8)
    (site,) = jlora.sites(fn, {"w": kernel}).values()
    assert (site.kind, site.axes) == ("embedding", TABLE)
    check(fn, as_table(kernel, "lora"))


CHOICES = {
    "by an array": lambda w, x: jnp.einsum("bi,bio->bo", x, w[IDS % 3]),
    "mapped index": lambda w, x: jax.vmap(lambda i, x: x @ w[i])(IDS % 3, x),
    "mapped take": lambda w, x: jax.vmap(lambda i, x: x @ jnp.take(w, i, axis=0))(IDS % 3, x),
}


@pytest.mark.parametrize("variant, name", thinned(3, VARIANTS, CHOICES))
def test_a_choice_of_experts_keeps_their_factors(variant, name):
    fn, kernel = lambda p, x: CHOICES[name](p["w"], x), noise(3, 8, 4)
    (site,) = jlora.sites(fn, {"w": kernel}, X).values()
    assert (site.kind, site.axes) == ("dot", EXPERTS)
    check(fn, wrapped(kernel, EXPERTS, variant=variant), X)


def test_an_index_into_each_of_two_axes():
    """Each factor is looked up by the index of its own axis."""
    check(lambda p: p["w"][IDS, IDS % 4].sum(), as_table(noise(6, 8), "lora"), fallback="ignore")


PARTS = {
    "of an axis that is not looked up": (((1,), (0,), (0,)), (1, 3), IDS[:, None]),
    "of an axis that is": (((1, 2), (), (0,)), (2, 8), IDS[:, None]),
    "of both": (((1, 2), (), (0, 1)), (2, 3), jnp.stack([IDS, IDS % 3], -1)),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("variant", TABLES)
def test_a_part_of_an_axis_is_taken(variant, name):
    (offsets, gone, found), sizes, indices = PARTS[name]
    numbers = lax.GatherDimensionNumbers(offsets, gone, found)
    fn = lambda p: lax.gather(p["w"], indices, numbers, sizes, mode="clip")
    check(fn, as_table(noise(6, 8), variant), fallback="ignore")


@pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_quantised_table(mode, dtype, double_quant):
    """No code stands for a value of the function's own."""
    base = jlora.quant.quantize({"w": noise(6, 8)}, dtype, targets="w", tile=4, double_quant=double_quant,
                                axes={"w": jlora.Axes((1,), (0,))})  # fmt: skip
    fn = lambda p: jnp.take(p["w"], FAR, axis=0, **MODES[mode])
    found, expected = jlora.apply(fn)(base), fn(jlora.quant.dequantize(base))
    assert jnp.array_equal(found, expected, equal_nan=True)


def test_what_flows_back_from_out_of_bounds_reaches_no_factor():
    """As the merged table has it, though the values there, and their derivatives, are no numbers."""
    masked = lambda y: jnp.where(jnp.isnan(y), 0, jnp.tanh(y * y))
    for rows in (1, 6):
        check(lambda p: masked(jnp.take(p["w"], FAR, axis=0)), as_table(noise(rows, 8), "lora"))
        check(lambda p: masked(jnp.tanh(jnp.take(p["w"], FAR, axis=0))), as_table(noise(rows, 8), "dora"))
    for experts in (1, 3):
        fn = lambda p, x: masked(jnp.einsum("bi,bio->bo", x, jnp.take(p["w"], FAR[:3], axis=0)))
        check(fn, wrapped(noise(experts, 8, 4), EXPERTS), X)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32], ids=lambda dtype: dtype.__name__)
def test_indices_of_a_type_that_does_not_hold_the_last_row(dtype):
    check(lambda p: jnp.take(p["w"], jnp.asarray([0, 3, 100], dtype), axis=0), as_table(noise(300, 8), "lora"))
