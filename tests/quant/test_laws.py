"""The laws on quantised bases, over the zoo: what a function computes, its gradients, and where it falls back."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.models import MODELS
from tests.programs import PROGRAMS
from tests.support import error, exactly, randomised, same_bits, spec_of
from tests.test_laws import ILL_CONDITIONED, value_and_grad_of, value_of

ZOO = {program.name: program for program in PROGRAMS + MODELS}
every_program = pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=() if i % 8 == 0 else pytest.mark.slow, id=p.name) for i, p in enumerate(ZOO.values())],
)
FORMATS = [("nf4", False), ("int8", True), ("int4", False), ("fp8", True)]


def quantised(program, dtype="int8", double_quant=False):
    """The parameters with every kernel of the program quantised, in the smallest tiles that all of them allow."""
    axes = {exactly(path): jlora.Axes(*groups) for path, groups in program.axes.items()}
    for tile in (2, 3, 5, None):
        with contextlib.suppress(ValueError):
            settings = {"tile": tile, "double_quant": double_quant, "axes": axes}
            return jlora.quant.quantize(program.params, dtype, targets=tuple(axes), **settings)
    raise AssertionError(program.name)


@every_program
def test_equivalence(program):
    """apply(f)(w) == f(merge(w)), values and gradients; the low-rank path is taken where it is on a dense base."""
    dtype, double_quant = FORMATS[len(program.name) % len(FORMATS)]
    params = randomised(jlora.wrap(quantised(program, dtype, double_quant), spec_of(program)))
    run = value_and_grad_of if program.reverse else value_of
    with warnings.catch_warnings(record=True) as caught, jax.numpy_dtype_promotion("strict"):
        warnings.simplefilter("always")
        found, grads = jax.jit(run(jlora.apply(program.fn), program.args))(params)
    merged = lambda p: jlora.merge(p, dtype=jnp.float32)
    expected, wanted = jax.jit(run(lambda p, *args: program.fn(merged(p), *args), program.args))(params)
    assert error(found, expected) <= 2 * program.tolerance
    assert error(grads, wanted) <= ILL_CONDITIONED.get(program.name, 4 * program.tolerance)
    fell_back = [w.message for w in caught if issubclass(w.category, jlora.DenseFallbackWarning)]
    assert program.factored is None or program.factored == (not fell_back), fell_back


@every_program
def test_without_adapters(program):
    """A quantised leaf that is not adapted is its numbers, and nothing is warned of."""
    params = quantised(program)
    found = jax.jit(jlora.apply(program.fn, fallback="error"))(params, *program.args)
    expected = jax.jit(program.fn)(jlora.quant.dequantize(params), *program.args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert error(found, expected) <= program.tolerance


@pytest.mark.parametrize("program", list(ZOO.values())[::5], ids=list(ZOO)[::5])
def test_frozen_means_frozen(program):
    """The base keeps its bits through wrap and unwrap, and both halves of a partition go together again."""
    params = quantised(program)
    tree = jlora.wrap(params, spec_of(program))
    assert same_bits(jlora.unwrap(tree), params)
    assert same_bits(jlora.combine(*jlora.partition(tree)), tree)
