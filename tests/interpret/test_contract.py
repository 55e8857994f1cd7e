"""Products: which of them have a factored rule for which split of a kernel's axes, and with what precision."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora.variants import AdaptedParam, frozen, gained, plain, static, trained
from tests.interpret.support import check, noise, wrapped


def convolve(p, x, **settings):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, **settings)


CONVOLVED = noise(2, 6, 5, 4)


def test_a_convolution_contracts_the_window_and_the_channels():
    check(convolve, wrapped(noise(3, 2, 4, 6), jlora.Axes((0, 1, 2), (3,))), CONVOLVED)


@pytest.mark.parametrize(
    "axes", [((0, 2), (3,), (1,)), ((2,), (0, 1, 3)), ((0, 1), (2, 3)), ((3,), (0, 1, 2))], ids=str
)
def test_other_splits_of_a_convolution_are_computed_densely(axes):
    """By rows of the window, by channels, or the other way round."""
    params = wrapped(noise(3, 2, 4, 6), jlora.Axes(*axes))
    with pytest.warns(jlora.DenseFallbackWarning, match="conv_general_dilated"):
        check(convolve, params, CONVOLVED, fallback="warn")


def test_both_products_of_a_convolution_have_its_precision():
    fn = lambda p, x: convolve(p, x, precision=lax.Precision.HIGHEST)
    text = str(jax.make_jaxpr(jlora.apply(fn))(wrapped(noise(3, 2, 4, 6), jlora.Axes((0, 1, 2), (3,))), CONVOLVED))
    assert text.count("HIGHEST") == 2 * 3  # two operands each of W, a and b


RAGGED = noise(3, 8, 12)
SIZES = jnp.asarray([2, 0, 5])


def test_experts_of_a_ragged_product():
    check(lambda p, x: lax.ragged_dot(x, p["w"], SIZES), wrapped(RAGGED, jlora.Axes((1,), (2,), (0,))), noise(7, 8))


def test_experts_of_a_ragged_product_that_share_their_factors():
    """Where the experts are an axis of the in or of the out side, one of the two factors is that of all of them."""
    for axes in (jlora.Axes((0, 1), (2,)), jlora.Axes((1,), (0, 2))):
        check(lambda p, x: lax.ragged_dot(x, p["w"], SIZES), wrapped(RAGGED, axes), noise(7, 8))


def test_rows_behind_the_last_group_are_nothing():
    """Also of experts that share the whole kernel."""
    fn = lambda p, x: lax.ragged_dot(x, jnp.broadcast_to(p["w"], (2, 8, 6)), jnp.asarray([1, 2]))
    check(fn, wrapped(noise(8, 6), jlora.Axes((0,), (1,))), noise(7, 8))


def test_other_splits_of_experts_are_computed_densely():
    with pytest.warns(jlora.DenseFallbackWarning, match="ragged_dot"):
        params = wrapped(RAGGED, jlora.Axes((2,), (1,), (0,)))
        check(lambda p, x: lax.ragged_dot(x, p["w"], SIZES), params, noise(7, 8), fallback="warn")


@pytest.mark.parametrize(
    "settings",
    [{"variant": "oft", "options": {"block_size": 4}}, {"variant": "ia3", "options": {"on": "in"}}, {"variant": "ia3"}],
    ids=["turned", "scaled", "scaled behind"],
)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_acts_on_an_axis_acts_on_either_side(settings, is_transposed):
    """On the inputs where the axis is contracted, on the results where it is produced."""
    params = wrapped(noise(8, 12), jlora.Axes((0,), (1,)), **settings)
    fn = lambda p, x: x @ (p["w"].T if is_transposed else p["w"])
    check(fn, params, noise(5, 12 if is_transposed else 8))


CUTS = {
    "slice": lambda w: w[:4],
    "reshape": lambda w: w.reshape(2, 4, 12).sum(0),
    "split": lambda w: jnp.split(w, 2)[1],
    "lookup": lambda w: w[jnp.asarray([0, 5, 2, 7])],
}


@pytest.mark.parametrize("name", CUTS)
def test_a_view_that_cuts_the_axis_of_a_rotation_is_computed_densely(name):
    params = wrapped(noise(8, 12), jlora.Axes((0,), (1,)), variant="oft", options={"block_size": 4})
    with pytest.warns(jlora.DenseFallbackWarning):
        check(lambda p, x: x @ CUTS[name](p["w"]), params, noise(5, 4), fallback="warn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledParam(AdaptedParam):
    """A variant of one's own: every element of the kernel times a number of its own, which no product can factor."""

    base: Any = frozen()
    gain: Any = trained("batch in out")
    axes: jlora.Axes = static()
    layers: Any = static(default=None)

    @classmethod
    def create(cls, base, kernel, key):
        return cls(base, jnp.ones(kernel.sizes("batch in out")), **kernel.place)

    def effective(self, name, key):
        return gained(plain(self.base, name=name), self.beside(self.gain, "batch in out", fill=1))


@pytest.mark.parametrize(
    "fn, kernel, axes, x",
    [
        (lambda p, x: x @ p["w"], noise(8, 12), ((0,), (1,)), noise(5, 8)),
        (lambda p, x: lax.ragged_dot(x, p["w"], SIZES), RAGGED, ((1,), (2,), (0,)), noise(7, 8)),
        (convolve, noise(3, 2, 4, 6), ((0, 1, 2), (3,)), CONVOLVED),
    ],
    ids=["dot", "ragged", "conv"],
)
def test_a_gain_of_every_element_is_computed_densely(fn, kernel, axes, x):
    params = wrapped(kernel, jlora.Axes(*axes), variant=ScaledParam)
    with pytest.warns(jlora.DenseFallbackWarning):
        check(fn, params, x, fallback="warn")
