"""``strategy="merged"``: products with W + s A B, made once a call, and gradients through the rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_policies
from jax.flatten_util import ravel_pytree

import jlora
from tests.interpret.test_groups import (
    ALIKE,
    DIM,
    SQUARE,
    X,
    gradients,
    in_a_loop,
    kernels,
    mixed,
    of_casts,
    plain,
    stacked,
    wrapped,
)
from tests.support import compiled, equations, flops, randomised, same_bits

merged = functools.partial(jlora.apply, strategy="merged")
factored = functools.partial(jlora.apply, strategy="factored")


def check_alike(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


@pytest.mark.parametrize("fn", ALIKE)
def test_values_and_gradients_are_those_of_the_factors(fn):
    tree = wrapped(SQUARE)
    check_alike(gradients(merged(fn), tree, X), gradients(factored(fn), tree, X))


def test_with_a_batch_axis_and_under_casts_too():
    experts = wrapped(kernels(q=(2, DIM, 4), k=(2, DIM, 4), v=(2, DIM, 6)), axes=jlora.Axes(1, 2, 0))
    check_alike(gradients(merged(stacked), experts, X), gradients(factored(stacked), experts, X))
    cast = wrapped(SQUARE)
    check_alike(gradients(merged(of_casts), cast, X), gradients(factored(of_casts), cast, X), rtol=0.03)


def test_a_scale_of_the_outputs_acts_as_ever():
    params, axes = {"q": SQUARE["q"]}, {"q": jlora.Axes(0, 1)}
    tree = randomised(jlora.wrap(params, jlora.LoraSpec(targets=["q"], rank=2, variant="dora", axes=axes)))
    fn = lambda p, x: jnp.sin(x @ p["q"]).sum()
    check_alike(gradients(merged(fn), tree, X), gradients(factored(fn), tree, X))


def test_derivatives_of_any_order_and_mode():
    tree = wrapped(SQUARE)
    trainable, frozen = jlora.partition(tree)
    flat, unravel = ravel_pytree((trainable, X[:, :2]))

    def loss(apply):
        return lambda flat: apply(plain)(jlora.combine(unravel(flat)[0], frozen), unravel(flat)[1])

    exact = jax.hessian(loss(factored))(flat)
    check_alike(jax.hessian(loss(merged))(flat), exact)
    check_alike(jax.jacrev(jax.jacrev(loss(merged)))(flat), exact)
    one = lambda apply: lambda x: apply(lambda p, x: x @ p["q"])(tree, x)
    ones = jnp.ones_like(X)
    check_alike(jax.linear_transpose(one(merged), X)(ones), jax.linear_transpose(one(factored), X)(ones))
    check_alike(jax.vmap(jax.grad(loss(merged)))(flat[None]), jax.vmap(jax.grad(loss(factored)))(flat[None]))


def test_adapters_side_by_side_under_vmap():
    tree = wrapped(SQUARE)
    trainable, frozen = jlora.partition(tree)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), trainable)
    run = lambda apply: jax.vmap(lambda t: apply(plain)(jlora.combine(t, frozen), X))(many)
    check_alike(run(merged), run(factored))


def test_the_start_is_the_base_bit_for_bit():
    tree = jlora.wrap(SQUARE, jlora.LoraSpec(targets=[*SQUARE], rank=2, axes=dict.fromkeys(SQUARE, jlora.Axes(0, 1))))
    assert same_bits(merged(plain)(tree, X), plain(SQUARE, X))


def test_a_loop_multiplies_by_what_was_merged_once():
    jaxpr = jax.make_jaxpr(merged(in_a_loop))(wrapped(SQUARE), X)
    (loop,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    inside = [eqn.primitive.name for eqn in equations(loop.params["jaxpr"])]
    assert inside.count("merged_product") == 3 and "low_rank_product" not in inside
    assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns].count("dot_general") == 3  # A @ B of each kernel


def test_no_dense_gradient_is_made():
    """A compiled step multiplies what the frozen one does, and 4 T r (m + n) + 4 m n r."""
    tokens, m, n, r = 512, 96, 80, 2
    tree = jlora.wrap(kernels(q=(m, n)), jlora.LoraSpec(targets=["q"], rank=r, axes={"q": jlora.Axes(0, 1)}))
    step = lambda tree, x: gradients(merged(lambda p, x: jnp.square(x @ p["q"]).sum()), tree, x)
    most = 4 * tokens * m * n + 4 * tokens * r * (m + n) + 4 * m * n * r + 20 * (tokens * n + m * n)
    assert flops(compiled(step, tree, jnp.ones((tokens, m)))) <= most < 0.85 * 6 * tokens * m * n


def test_policies_see_the_product_as_the_function_wrote_it():
    """And save it or not: what is saved is not computed again."""
    tree = wrapped({"q": SQUARE["q"]})
    fn = lambda p, x: jnp.sin(jnp.sin(x @ p["q"])).sum()
    count = lambda policy: str(
        jax.make_jaxpr(lambda tree, x: gradients(jax.checkpoint(merged(fn), policy=policy), tree, x))(tree, X)
    ).count("merged_product[")
    assert count(checkpoint_policies.dots_saveable) == count(checkpoint_policies.everything_saveable) == 2
    assert count(checkpoint_policies.nothing_saveable) == 3


def test_with_dropout_all_is_factored():
    tree = wrapped(SQUARE, dropout=0.5)
    key = jax.random.key(0)
    assert same_bits(merged(plain, rng=key)(tree, X), factored(plain, rng=key)(tree, X))
    assert not same_bits(merged(plain, rng=key)(tree, X), merged(plain)(tree, X))


def test_other_uses_of_a_kernel_stay_factored():
    """Lookups, convolutions, arithmetic: the result is that of the merged tree."""
    table = kernels(q=(DIM, DIM))
    tree = wrapped(table)
    fn = lambda p, x: mixed(p["q"][jnp.array([1, 2])], x @ (2 * p["q"]), x @ p["q"])
    ours, exact = merged(fn)(tree, X), fn(jlora.merge(tree), X)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


@pytest.mark.slow
def test_losses_of_all_strategies_agree_over_200_steps():
    rng = np.random.default_rng(0)
    params = kernels(q=(16, 32), k=(32, 16))
    target = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    axes = dict.fromkeys(params, jlora.Axes(0, 1))
    start = jlora.wrap(params, jlora.LoraSpec(targets=[*params], rank=4, axes=axes))

    def losses(strategy):
        loss = jlora.apply(lambda p: jnp.square(jnp.tanh(x @ p["q"]) @ p["k"] - x @ target).mean(), strategy=strategy)
        tx = jlora.optimizer(optax.adam(1e-2), start)

        def step(state, _):
            tree, moments = state
            value, grads = jlora.value_and_grad(loss)(tree)
            updates, moments = tx.update(grads, moments, tree)
            return (optax.apply_updates(tree, updates), moments), value

        return jax.jit(lambda: lax.scan(step, (start, tx.init(start)), length=200)[1])()

    curves = [losses(strategy) for strategy in ("auto", "factored", "merged")]
    assert curves[0][-1] < 0.5 * curves[0][0]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=2e-3)


def test_a_strategy_of_another_name_is_refused():
    with pytest.raises(ValueError, match="strategy must be one of"):
        jlora.apply(plain, strategy="fused")
    with pytest.raises(ValueError, match=r"no gradient goes to W; freeze=False takes strategy=\"factored\""):
        jlora.apply(plain, strategy="merged", freeze=False)


def test_explain_estimates_each_strategy():
    """In FLOPs of a step: 4 T m n frozen, 6 T r (m + n) more through factors, 4 T r (m + n) + 4 m n r more merged."""
    tree = wrapped({"k": SQUARE["k"]})
    (use,) = jlora.explain(lambda p, x: x @ p["k"], tree, X).uses
    tokens, m, n, r = 10, DIM, 6, 3
    frozen, thin = 4 * tokens * m * n, tokens * r * (m + n)
    assert use.estimates == (frozen, frozen + 6 * thin, frozen + 4 * thin + 4 * m * n * r)
    assert use.strategy == "factored"
    assert "training FLOPs" not in str(jlora.explain(lambda p, x: x @ p["k"], tree, X[0, :2]))  # it would cost more
    table = jlora.explain(lambda p, x: x @ p["k"], tree, jnp.ones((100, DIM)))
    frozen, *others = table.uses[0].estimates
    told = ", ".join(f"{name} {cost / frozen:.3f}x" for name, cost in zip(("factored", "merged"), others, strict=True))
    assert told in " ".join(str(table).split())
