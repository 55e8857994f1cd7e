"""The laws on quantised bases, over the zoo: what a function computes, its gradients, and where it falls back."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.models import MODELS
from tests.programs import PROGRAMS
from tests.support import adapted, error, exactly, randomised, same_bits, spec_of
from tests.test_zoo import total

ZOO = {program.name: program for program in PROGRAMS + MODELS}
FORMATS = [("nf4", False), ("int8", True), ("int4", False), ("fp8", True)]
LARGE = ("linen_transformer_with_tied_embedding", "vmap_of_scan")
# Of the zoo every eighth program; slow, and in values alone, all others. Formats and gradients go round, so that every
# format has some of both.
QUICK = [name for name in list(ZOO)[::8] if name not in LARGE]
SLOW = [name for name in ZOO if name not in QUICK]
WITH_GRADIENT = [name for i, name in enumerate(QUICK) if i // 4 % 2 == 0 and ZOO[name].reverse]
FORMAT_OF = {name: FORMATS[i % 4] for names in (QUICK, SLOW) for i, name in enumerate(names)}
# Their gradients amplify rounding.
ILL_CONDITIONED = {"grad_inside_of_scan": 1e-3, "nnx_transformer": 2e-4, "nnx_stacked_remat_scan": 2e-4}


def quantised(program, dtype="int8", double_quant=False):
    """The parameters with every kernel of the program quantised, in the smallest tiles that all of them allow."""
    axes = {exactly(path): jlora.Axes(*groups) for path, groups in program.axes.items()}
    for tile in (2, 3, 5, None):
        with contextlib.suppress(ValueError):
            settings = {"tile": tile, "double_quant": double_quant, "axes": axes}
            return jlora.quant.quantize(program.params, dtype, targets=tuple(axes), **settings)
    raise AssertionError(program.name)


def test_every_format_has_gradients():
    assert {FORMAT_OF[name] for name in WITH_GRADIENT} == {*FORMATS}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_laws(name):
    """apply(f)(w) == f(merge(w)); the low-rank path is taken where it is on a dense base.

    A quantised leaf that is not adapted is its numbers, and nothing is warned of.
    """
    program = ZOO[name]
    tree = adapted(program, quantised(program, *FORMAT_OF[name]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both = jax.jit(lambda tree: (on_adapters(program, tree), without_adapters(program, tree)))
        ((found, grads), (expected, wanted)), alone = both(tree)
    assert error(found, expected) <= 2 * program.tolerance
    assert error(grads, wanted) <= ILL_CONDITIONED.get(name, 4 * program.tolerance)
    fell_back = [w.message for w in caught if issubclass(w.category, jlora.DenseFallbackWarning)]
    assert program.factored == (not fell_back), fell_back
    assert jax.tree.structure(alone[0]) == jax.tree.structure(alone[1])
    assert error(*alone) <= program.tolerance


def on_adapters(program, tree):
    """Values, and gradients where they are wanted: of the function applied, and of it on the merged tree."""
    run = with_gradient if program.name in WITH_GRADIENT else lambda fn: lambda tree: (fn(tree), None)
    with jax.numpy_dtype_promotion("strict"):
        found = run(lambda p: jlora.apply(program.fn)(p, *program.args))(tree)
    return found, run(lambda p: program.fn(jlora.merge(p, dtype=jnp.float32), *program.args))(tree)


def with_gradient(fn):
    def run(tree):
        (_, y), grads = jlora.value_and_grad(lambda p: (total(y := fn(p)), y), has_aux=True)(tree)
        return y, grads

    return run


def without_adapters(program, tree):
    base = jlora.unwrap(tree)
    found = jlora.apply(program.fn, fallback="error")(base, *program.args)
    return found, program.fn(jlora.quant.dequantize(base), *program.args)


@pytest.mark.parametrize("name", QUICK[::4])
def test_frozen_means_frozen(name):
    """The base keeps its bits through wrap and unwrap, and both halves of a partition go together again."""
    base = quantised(ZOO[name])
    tree = jlora.wrap(base, spec_of(ZOO[name]))
    assert same_bits(jlora.unwrap(tree), base)
    assert same_bits(jlora.combine(*jlora.partition(tree)), tree)


# How a product with a quantised weight is transformed, as a function of its other input.
TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "vmap in columns": lambda f: lambda x: jax.vmap(f, in_axes=1, out_axes=1)(x.T).T,
    "map": lambda f: lambda x: jax.lax.map(f, x),
    "checkpoint": jax.checkpoint,
    "vmap of a scan": lambda f: lambda x: jax.lax.scan(lambda h, _: (h, jax.vmap(f)(h)), x, None, length=2)[1].sum(0),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("is_adapted", [True, False])
def test_a_product_is_linear_in_its_other_input(transform, dtype, is_adapted):
    """The barrier that keeps the numbers from being made ahead is no function of x: it can be transposed."""
    base = jlora.quant.quantize({"q": {"kernel": jax.random.normal(jax.random.key(0), (6, 6))}}, dtype)
    tree = randomised(jlora.wrap(base, jlora.LoraSpec(rank=2))) if is_adapted else base
    product = TRANSFORMS[transform](lambda x: jlora.apply(lambda p, x: x @ p["q"]["kernel"].T)(tree, x))
    whole = jlora.merge(tree, dtype=jnp.float32) if is_adapted else jlora.quant.dequantize(base)
    weight = whole["q"]["kernel"]
    x, y = (jax.random.normal(jax.random.key(seed), (6, 6)) for seed in (1, 2))
    scale = 2 if "scan" in transform else 1
    np.testing.assert_allclose(product(x), scale * x @ weight.T, atol=2e-5)
    np.testing.assert_allclose(jax.linear_transpose(product, x)(y)[0], scale * y @ weight, atol=2e-5)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.vdot(product(x), y))(x), scale * y @ weight, atol=2e-5)
    np.testing.assert_allclose(jax.jvp(product, (x,), (y,))[1], scale * y @ weight.T, atol=2e-5)


@pytest.mark.parametrize("form", ["plain", "scan", "vmap"])
def test_policies_of_remat_see_the_product_as_it_was_written(form):
    """And save it or not, as on a dense base; not the numbers, which are made for each product."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
    tree = jlora.wrap(jlora.quant.quantize(params, "int8", targets="*"), jlora.LoraSpec(targets="*", rank=2))
    fn = lambda p, x: jnp.sin(jnp.sin(x @ p["w"]))
    x = jnp.ones((8, 64))

    def count(policy):
        step = jax.checkpoint(jlora.apply(fn), policy=policy)
        forms = {
            "plain": step,
            "scan": lambda tree, x: jax.lax.scan(lambda x, _: (step(tree, x), None), x, None, length=2)[0],
            "vmap": lambda tree, x: jax.vmap(step, (None, 0))(tree, x[None]),
        }
        trainable, frozen = jlora.partition(tree)
        loss = lambda trainable, x: forms[form](jlora.combine(trainable, frozen), x).sum()
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(trainable, x)).count("frozen_product[")

    policies = jax.checkpoint_policies
    saved = {count(policy) for policy in (policies.dots_saveable, policies.dots_with_no_batch_dims_saveable)}
    assert saved == {count(policies.everything_saveable)}
    assert count(policies.nothing_saveable) > count(policies.dots_saveable)
