"""The laws for every variant, on every use of a kernel; what it does not have raises an error that says so."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import error, has_loop, same_bits
from tests.variants.cases import CASES, DENSE, KINDS, UNSUPPORTED, moved, wrapped

STACKED = ("stacked", "stacked_experts", "expert", "ragged")
SOME = ("dense", "stacked")  # enough where another initialiser is all that differs
USES = {kind: STACKED if kind == "lora+layers" else SOME if "+" in kind else tuple(CASES) for kind in KINDS}
USES["ia3+in"] = tuple(CASES)
PAIRS = [(kind, use) for kind in KINDS for use in USES[kind] if (kind, use) not in UNSUPPORTED]
ROLES = ("lora", "dora", "loha", "ia3", "oft", "own")  # each part that a factored weight may have
CORE = ("dense", "stacked", "conv", "embedding")


def marked(kind, use, *more, slow=False):
    """A case, slow where another variant has the same parts, or another use the same rule."""
    quick = use == "dense" or (kind in ROLES and use in CORE)
    return pytest.param(kind, use, *more, marks=[] if quick and not slow else [pytest.mark.slow])


every_pair = pytest.mark.parametrize("kind, use", [marked(*pair) for pair in PAIRS])
some_pairs = pytest.mark.parametrize("kind, use", [pair for pair in PAIRS if pair[1] in ("dense", "tied")])
# B is zero, or another factor is: nothing is added. The others start from W up to rounding.
EXACT = {"lora", "lora_fa", "vera", "adalora", "loha", "lokr", "own", "ia3", "ia3+in", "lora+layers"}
EXACT |= {"lora+pissa", "lora+pissa_niter_8", "lora+olora", "lora+milora", "lora_fa+olora"}


def total(y):
    y = y.astype(jnp.float32)
    return (jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()


DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


@pytest.mark.parametrize(
    "kind, use, dtype",
    [
        marked(*pair, dtype, slow=dtype == "bf16" and pair[1] != "dense")
        for pair in PAIRS
        for dtype in DTYPES
        if dtype == "f32" or (pair[1] not in ("out_in", "stacked_experts") and pair[0] in ROLES)
    ],
)
def test_equivalence(kind, use, dtype):
    """apply(f)(w) == f(merge(w)), values and gradients, and factored."""
    case, dtype, tolerance = CASES[use], DTYPES[dtype], 2e-5 if dtype == "f32" else 4e-2
    params = moved(wrapped(kind, case, dtype))
    args = tuple(x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in case.args)
    run = lambda fn: jax.jit(jlora.value_and_grad(lambda p: (total(y := fn(p, *args)), y), has_aux=True))
    with warnings.catch_warnings(record=True) as caught, jax.numpy_dtype_promotion("strict"):
        warnings.simplefilter("always")
        (_, found), grads = run(jlora.apply(case.fn))(params)
    dense = lambda p, *args: case.fn(jlora.merge(p, dtype=jnp.float32), *args)
    exact = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in args]
    (_, expected), expected_grads = jax.jit(
        jlora.value_and_grad(lambda p: (total(y := dense(p, *exact)), y), has_aux=True)
    )(params)
    assert found.dtype == dtype
    assert error(found, expected) <= tolerance
    assert error(grads, expected_grads) <= 3 * tolerance
    fell_back = [w.message for w in caught if issubclass(w.category, jlora.DenseFallbackWarning)]
    assert bool(fell_back) == ((kind, use) in DENSE), fell_back


@every_pair
def test_identity_at_the_start(kind, use):
    case = CASES[use]
    found = jlora.apply(case.fn, fallback="ignore")(wrapped(kind, case), *case.args)
    expected = case.fn(case.params, *case.args)
    assert error(found, expected) <= 2e-6
    if kind in EXACT and not has_loop(jax.make_jaxpr(case.fn)(case.params, *case.args).jaxpr):
        np.testing.assert_array_equal(found, expected)


@some_pairs
def test_frozen_means_frozen(kind, use):
    case = CASES[use]
    params = before = wrapped(kind, case)
    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1), params)
    state = tx.init(params)
    gradient = jax.jit(jax.grad(lambda p: total(jlora.apply(case.fn, fallback="ignore")(p, *case.args))))
    for _ in range(2):
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert same_bits(jlora.partition(params)[1], jlora.partition(before)[1])
    assert not same_bits(jlora.partition(params)[0], jlora.partition(before)[0])
    assert same_bits(jlora.unwrap(params), case.params)


@every_pair
def test_pure_and_abstract(kind, use):
    case = CASES[use]
    whole = lambda p: (w := wrapped(kind, dataclasses.replace(case, params=p)), jlora.merge(w), jlora.partition(w))
    concrete, abstract = whole(case.params), jax.eval_shape(whole, case.params)
    facts = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert facts(concrete) == facts(abstract)
    assert jax.tree.structure(concrete) == jax.tree.structure(abstract)
    again = jlora.combine(*concrete[2])
    assert same_bits(again, concrete[0])
    assert "trainable" in str(jlora.summary(again))


@some_pairs
def test_an_adapter_is_a_value(kind, use):
    """vmap over two adapters on one base is one after the other."""
    case = CASES[use]
    one, two = (jlora.partition(moved(wrapped(kind, case), std))[0] for std in (0.1, 0.3))
    frozen = jlora.partition(wrapped(kind, case))[1]
    run = lambda part: jlora.apply(case.fn, fallback="ignore")(jlora.combine(part, frozen), *case.args)
    both = jax.vmap(run)(jax.tree.map(lambda *x: jnp.stack(x), one, two))
    assert error(both, jnp.stack([run(one), run(two)])) <= 2e-5


@pytest.mark.parametrize("kind, use", sorted(UNSUPPORTED))
def test_what_a_variant_does_not_have_is_an_error(kind, use):
    with pytest.raises(
        ValueError, match=r"variant 'b?oft' adapts no (embedding|ragged_dot), but (table|w) of shape .*overrides"
    ):
        wrapped(kind, CASES[use])
