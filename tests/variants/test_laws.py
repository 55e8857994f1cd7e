"""The laws for every variant, on every use of a kernel; what it does not have raises an error that says so.

One compiled program of a case gives all that its laws compare.
"""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import error, evaluated, same_bits
from tests.variants.cases import CASES, DENSE, KINDS, UNSUPPORTED, moved, wrapped

STACKED = ("stacked", "stacked_experts", "expert", "ragged")
SOME = ("dense", "stacked")  # enough where another initialiser is all that differs
USES = {kind: STACKED if kind == "lora+layers" else SOME if "+" in kind else tuple(CASES) for kind in KINDS}
USES["ia3+in"] = tuple(CASES)
PAIRS = {(kind, use) for kind in KINDS for use in USES[kind]} - UNSUPPORTED
# B is zero, or another factor is: nothing is added. The others start from W up to rounding.
EXACT = {"lora", "lora_fa", "vera", "adalora", "loha", "lokr", "own", "ia3", "ia3+in", "lora+layers"}
EXACT |= {"miss", "road", "c3a", "gralora", "hira", "delora", "fourierft", "waveft", "shira", "randlora", "pvera"}
EXACT |= {"lora+pissa", "lora+pissa_niter_8", "lora+olora", "lora+milora", "lora_fa+olora"}
EXACT_USES = [("lora", use) for use in ("conv", "embedding", "expert", "multi_axis", "ragged", "tied")]

# The cases: each part that a factored weight may have, with each rule of a product; every other kind with one use or
# two, every other use with one kind or more; each part and each rule in 16 bits too.
PARTS = ("lora", "dora", "loha", "ia3", "oft", "own")
RULES = ("dense", "stacked", "conv", "embedding")
OTHERS = [
    ("lora_fa", "tied"),
    ("vera", "multi_axis"),
    ("vera", "stacked_experts"),
    ("adalora", "tied"),
    ("adalora", "ragged"),
    ("lokr", "expert"),
    ("lokr", "dense"),
    ("boft", "out_in"),
    ("miss", "multi_axis"),
    ("hra", "stacked"),
    ("road", "multi_axis"),
    ("c3a", "multi_axis"),
    ("pvera", "multi_axis"),
    ("randlora", "multi_axis"),
    ("fourierft", "multi_axis"),
    ("waveft", "out_in"),
    ("shira", "multi_axis"),
    ("shira", "stacked"),
    ("gralora", "multi_axis"),
    ("hira", "stacked"),
    ("delora", "out_in"),
    ("ia3+in", "tied"),
    ("ia3+in", "conv"),
    ("lora+layers", "stacked"),
    ("lora+layers", "expert"),
    *((kind, "dense") for kind in KINDS if USES[kind] == SOME),
]
OTHERS += [(kind, "dense") for kind in KINDS if kind not in PARTS and kind not in dict(OTHERS)]
QUICK = [(*pair, "f32") for pair in [*itertools.product(PARTS, RULES), *OTHERS] if pair in PAIRS]
QUICK += [(*pair, "bf16") for pair in zip(PARTS, itertools.cycle(RULES), strict=False)]
# Slow: each part with every other use, all laws in 16 bits; of the other kinds all that is left, in values alone.
SLOW = [(*pair, "bf16") for pair in sorted(PAIRS) if pair[0] in PARTS and (*pair, "f32") not in QUICK]
LEFT = sorted(PAIRS - {case[:2] for case in QUICK + SLOW})
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
WITH_GRADIENT = {(*pair, dtype) for pair in PAIRS for dtype in DTYPES}
STARTS = [kind for kind in KINDS if USES[kind] == SOME]  # the same nodes with other values
WITH_GRADIENT -= {(kind, "dense", "f32") for kind in STARTS}
# An optimizer and vmap know nothing of products: each kind has them once, or twice. JAX has no such vmap of ragged_dot.
MOVED = {(kind, use, "f32") for kind, use in OTHERS if use != "ragged"} | {(kind, "dense", "f32") for kind in PARTS}
MOVED &= WITH_GRADIENT


def test_the_cases_meet_every_kind_and_every_use():
    assert {(kind, use) for kind, use, _ in QUICK + SLOW} <= PAIRS
    assert {kind for kind, _, _ in QUICK} == {*KINDS}
    assert {use for _, use, _ in QUICK} == {*CASES}
    assert {kind for kind, _, _ in MOVED & {*QUICK}} == {*KINDS} - {*STARTS}
    assert {use for _, use, _ in WITH_GRADIENT & {*QUICK}} == {*CASES}
    assert {(kind, use) for kind, use, _ in QUICK + SLOW} | {*LEFT} == PAIRS
    in_16_bits = [(kind, use) for kind, use, dtype in QUICK if dtype == "bf16"]
    assert ({kind for kind, _ in in_16_bits}, {use for _, use in in_16_bits}) == ({*PARTS}, {*RULES})


def total(y):
    y = y.astype(jnp.float32)
    return (jnp.sin(y) * np.cos(np.arange(y.size)).reshape(y.shape).astype(np.float32)).sum()


def with_gradient(fn, is_wanted, of=jlora.value_and_grad):
    """The values of a function of a tree, and the gradients if they are wanted."""

    def run(params):
        if not is_wanted:
            return fn(params), None
        (_, y), grads = of(lambda p: (total(y := fn(p)), y), has_aux=True)(params)
        return y, grads

    return run


def cast(args, dtype):
    return tuple(np.asarray(x).astype(dtype if x.dtype == jnp.float32 else x.dtype) for x in args)


@pytest.mark.parametrize("kind, use, dtype", QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_laws(kind, use, dtype):
    """Equivalence with the merged tree, identity at the start, abstract trees; what is frozen, vmap over adapters."""
    chosen = ((kind, use, dtype) in WITH_GRADIENT, (kind, use, dtype) in MOVED)
    case, dtype = CASES[use], DTYPES[dtype]
    start = wrapped(kind, case, dtype)
    params = moved(start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results, after, both = evaluated(lambda *trees: program(case, dtype, *chosen, *trees), start, params)
    fell_back = [w.message for w in caught if issubclass(w.category, jlora.DenseFallbackWarning)]
    assert bool(fell_back) == ((kind, use) in DENSE), fell_back
    assert_equivalent(results, dtype)
    assert error(results["start"], results["plain"]) <= (2e-6 if dtype == jnp.float32 else 4e-2)
    assert_abstract(kind, case, dtype, start, results["merged"])
    if chosen[1]:
        assert_frozen(start, params, after, case)
        assert error(both, np.stack([results["start"], results["found"]])) <= 2e-5


def program(case, dtype, has_gradient, is_moved, start, params):
    """All that the laws compare, of a tree right after wrap and of the same some way from there."""
    args, exact = cast(case.args, dtype), cast(case.args, jnp.float32)
    run = lambda tree: jlora.apply(case.fn, fallback="ignore")(tree, *args)
    with jax.numpy_dtype_promotion("strict"):
        found, grads = with_gradient(lambda p: jlora.apply(case.fn)(p, *args), has_gradient, jax.value_and_grad)(params)
    merged = lambda p: case.fn(jlora.merge(p, dtype=jnp.float32), *exact)
    expected, expected_grads = with_gradient(merged, has_gradient)(params)
    results = {
        "found": found,
        "grads": grads,
        "expected": expected,
        "expected_grads": expected_grads,
        "start": run(start),
        "plain": case.fn(jlora.unwrap(start), *args),
        "merged": jlora.merge(params),
    }
    return results, *((trained(params, grads), of_both(run, start, params)) if is_moved else (None, None))


def of_both(run, start, params):
    """A function of two adapters on one base, by vmap."""
    (one, frozen), (two, _) = jlora.partition(start), jlora.partition(params)
    return jax.vmap(lambda part: run(jlora.combine(part, frozen)))(jax.tree.map(lambda *x: jnp.stack(x), one, two))


def trained(params, grads):
    """After two steps of an optimizer, which sees the gradient of every leaf."""
    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1), params)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_equivalent(results, dtype):
    """apply(f)(w) == f(merge(w)), values and gradients; none of what is frozen."""
    tolerance = 2e-5 if dtype == jnp.float32 else 4e-2
    assert results["found"].dtype == dtype
    assert error(results["found"], results["expected"]) <= tolerance
    if results["grads"] is not None:
        trained, frozen = jlora.partition(results["grads"])
        assert error(trained, results["expected_grads"]) <= 3 * tolerance
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(frozen))


@pytest.mark.parametrize("kind, use", [(kind, "dense") for kind in sorted(EXACT) if "dense" in USES[kind]] + EXACT_USES)
def test_identity_at_the_start(kind, use):
    """Bit for bit; loops round otherwise, and other kinds start from W up to rounding."""
    case = CASES[use]
    run = jax.jit(lambda tree: (jlora.apply(case.fn)(tree, *case.args), case.fn(jlora.unwrap(tree), *case.args)))
    np.testing.assert_array_equal(*run(wrapped(kind, case)))


def assert_frozen(start, before, after, case):
    (part, frozen), (part_before, frozen_before) = jlora.partition(after), jlora.partition(before)
    assert same_bits(frozen, frozen_before)
    assert not same_bits(part, part_before)
    assert same_bits(jlora.unwrap(start), case.params)
    assert same_bits(jlora.unwrap(after), case.params)


def assert_abstract(kind, case, dtype, start, merged):
    """wrap, merge and partition give trees of the same shapes, types and structure from shapes alone."""
    wrap = lambda params: wrapped(kind, dataclasses.replace(case, params=params), dtype)
    whole = lambda params: (w := wrap(params), jlora.merge(w), jlora.partition(w))
    concrete, abstract = (start, merged, jlora.partition(start)), jax.eval_shape(whole, case.params)
    facts = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert facts(concrete) == facts(abstract)
    assert jax.tree.structure(concrete) == jax.tree.structure(abstract)
    again = jlora.combine(*concrete[2])
    assert same_bits(again, start)
    assert "trainable" in str(jlora.summary(again))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({kind for kind, _ in LEFT}))
def test_values(kind):
    """Of uses that are left: right after wrap those of the plain tree, later on those of the merged one."""
    cases = {use: CASES[use] for _, use in [pair for pair in LEFT if pair[0] == kind]}
    start = {use: wrapped(kind, case) for use, case in cases.items()}
    all_of = lambda tree: {use: case.fn(tree[use], *case.args) for use, case in cases.items()}
    run = jlora.apply(all_of, fallback="ignore")

    def program(start, params):
        return (run(start), all_of(jlora.unwrap(start))), (run(params), all_of(jlora.merge(params)))

    at_first, later = evaluated(program, start, {use: moved(tree) for use, tree in start.items()})
    for use in cases:
        assert error(*(values[use] for values in at_first)) <= 2e-6, use
        assert error(*(values[use] for values in later)) <= 2e-5, use


@pytest.mark.parametrize("kind, use", sorted(UNSUPPORTED))
def test_what_a_variant_does_not_have_is_an_error(kind, use):
    with pytest.raises(
        ValueError, match=r"variant '\w+' adapts no (embedding|ragged_dot|conv), but (table|w) of shape .*overrides"
    ):
        wrapped(kind, CASES[use])
