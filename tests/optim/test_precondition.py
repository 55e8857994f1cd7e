"""Riemannian preconditioning: the formula, its invariance, what it leaves alone, and that it trains faster."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import Axes, LoraParam, LoraSpec
from jlora.optim import precondition
from tests.optim.support import at, noise_like, noisy, trained
from tests.support import same_bits

RNG = np.random.default_rng(0)
EPS = np.finfo(np.float32).eps


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def node(a: tuple[int, ...], b: tuple[int, ...], axes: Axes, layers: tuple[int, ...] | None = None) -> LoraParam:
    return LoraParam(None, normal(*a), normal(*b), axes=axes, layers=layers)


SHAPES = {
    "matrix": node((6, 2), (2, 5), Axes((0,), (1,))),
    "many_ins": node((3, 4, 2), (2, 5), Axes((0, 1), (2,))),
    "many_outs": node((6, 3), (3, 2, 4), Axes((0,), (1, 2))),
    "stacked": node((3, 6, 2), (3, 2, 5), Axes((1,), (2,), (0,))),
    "two_batches": node((2, 3, 4, 2, 2), (2, 3, 2, 2, 5), Axes((2, 3), (4, 5), (0, 1))),
    "last_axis_stacked": node((3, 6, 2), (3, 2, 5), Axes((0,), (1,), (2,))),
    "some_layers": node((2, 6, 2), (2, 2, 5), Axes((1,), (2,), (0,)), layers=(0, 3)),
    "rank_one": node((6, 1), (1, 5), Axes((0,), (1,))),
}


def by_hand(grads: Any, param: Any, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The two gradients in float64, one place of the batch axes at a time."""
    n, r = len(param.axes.batch_axis), param.lora_b.shape[len(param.axes.batch_axis)]
    grad_a, grad_b = (np.array(x, np.float64) for x in (grads.lora_a, grads.lora_b))
    for place in np.ndindex(*param.lora_a.shape[:n]):
        a = np.asarray(param.lora_a, np.float64)[place].reshape(-1, r)
        b = np.asarray(param.lora_b, np.float64)[place].reshape(r, -1)
        by_a = np.linalg.inv(a.T @ a + damping * np.eye(r))
        by_b = np.linalg.inv(b @ b.T + damping * np.eye(r))
        grad_a[place] = (grad_a[place].reshape(-1, r) @ by_b).reshape(grad_a[place].shape)
        grad_b[place] = (by_a @ grad_b[place].reshape(r, -1)).reshape(grad_b[place].shape)
    return grad_a, grad_b


@functools.partial(jax.jit, static_argnames="damping")
def preconditioned(grads: Any, params: Any, damping: float = 1e-6) -> Any:
    tx = precondition(damping)
    return tx.update(grads, tx.init(params), params)[0]


def assert_close(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("damping, names", [(1e-6, [*SHAPES]), (0.3, ["matrix", "some_layers"])])
def test_the_formula(damping, names):
    """Of kernels of all shapes, in one tree."""
    params = {name: SHAPES[name] for name in names}
    grads = {name: noise_like(param, seed=i) for i, (name, param) in enumerate(params.items())}
    found = preconditioned(grads, params, damping)
    for name, param in params.items():
        grad_a, grad_b = by_hand(grads[name], param, damping)
        assert_close(found[name].lora_a, grad_a, 1e-3)
        assert_close(found[name].lora_b, grad_b, 1e-3)
        assert (found[name].lora_a.dtype, found[name].lora_b.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.slow
def test_outside_of_jit_the_formula_is_the_same():
    param, tx = SHAPES["matrix"], precondition()
    grads = noise_like(param)
    found = tx.update(grads, tx.init(param), param)[0]
    assert_trees_close(found, preconditioned(grads, param))


@functools.partial(jax.jit, static_argnames="damping")
def step_of_the_product(param: Any, gradient: jax.Array, damping: float) -> jax.Array:
    """dA B + A dB for a loss whose gradient by the product A B is given."""
    grads = dataclasses.replace(param, lora_a=gradient @ param.lora_b.mT, lora_b=param.lora_a.mT @ gradient)
    new = preconditioned(grads, param, damping)
    return new.lora_a @ param.lora_b + param.lora_a @ new.lora_b


def test_the_step_does_not_depend_on_the_factorisation():
    """Of a stack of three."""
    a, b, gradient = normal(3, 9, 3), normal(3, 3, 7), normal(3, 9, 7)
    mix = np.array([[3.0, 1, 0], [0, 0.2, 0.5], [1, 0, 4]], np.float32)
    axes = Axes((1,), (2,), (0,))
    pairs = (a, b), (a @ mix, np.linalg.inv(mix) @ b)
    steps = lambda damping: [
        step_of_the_product(LoraParam(None, *pair, axes=axes), gradient, damping) for pair in pairs
    ]
    one, other = steps(1e-12)
    assert_close(other, one, 1e-3)
    damped, otherwise = map(np.asarray, steps(10))
    assert np.abs(otherwise - damped).max() > 0.01


def test_the_step_is_the_gradient_projected():
    """G P_B + P_A G, with the projections on the rows of B and the columns of A."""
    a, b, gradient = (np.asarray(x, np.float64) for x in (normal(9, 3), normal(3, 7), normal(9, 7)))
    of_a, of_b = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    param = LoraParam(None, a.astype(np.float32), b.astype(np.float32), axes=Axes((0,), (1,)))
    found = step_of_the_product(param, gradient.astype(np.float32), 1e-12)
    assert_close(found, gradient @ of_b + of_a @ gradient, 1e-4)


# -------------------------------------------------------------------------------- where it could break


def test_the_start_is_finite():
    """B = 0: the gradient of A is zero, and stays so."""
    param = dataclasses.replace(SHAPES["matrix"], lora_b=np.zeros((2, 5), np.float32))
    grads = dataclasses.replace(param, lora_a=np.zeros((6, 2), np.float32), lora_b=normal(2, 5))
    found = jax.device_get(preconditioned(grads, param))
    assert not found.lora_a.any()
    assert np.isfinite(found.lora_b).all() and found.lora_b.any()


@pytest.mark.parametrize("rank", [4, 32])
def test_dependent_rows_are_finite(rank):
    rng = np.random.default_rng(rank)
    for size in (1e-3, 1.0, 1e3):
        rows = rng.normal(size=(8, rank, 2)) @ rng.normal(size=(8, 2, 64)) * size
        param = LoraParam(None, normal(8, 48, rank), rows.astype(np.float32), axes=Axes((1,), (2,), (0,)))
        found = preconditioned(jax.tree.map(np.ones_like, param), param)
        assert np.isfinite(found.lora_a).all() and np.isfinite(found.lora_b).all()


def test_the_damping_has_a_floor():
    param = dataclasses.replace(SHAPES["matrix"], lora_b=100 * np.eye(2, dtype=np.float32))
    found = preconditioned(jax.tree.map(np.ones_like, param), param, 1e-30)
    assert_close(found.lora_a, np.full((6, 2), 1e-4 / (1 + 8 * EPS)), 1e-6)


def test_factors_of_half_precision_are_solved_in_float32():
    param = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SHAPES["matrix"])
    grads = noise_like(param)
    found, (grad_a, _) = preconditioned(grads, param), by_hand(grads, param, 1e-6)
    assert found.lora_a.dtype == jnp.bfloat16
    assert_close(np.asarray(found.lora_a, np.float32), grad_a, 1e-2)


# -------------------------------------------------------------------------------- in a tree

PARAMS = {"up": {"kernel": normal(6, 5), "bias": normal(5)}, "down": {"kernel": normal(5, 2)}, "head": normal(2, 2)}
X, Y = normal(16, 6), normal(16, 2)


def model(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] @ params["head"]


def loss(params: Any) -> jax.Array:
    return jnp.mean((jlora.apply(model)(params, X) - Y) ** 2)


@functools.cache
def wrapped(variant: str = "lora") -> Any:
    return noisy(PARAMS, spec_of(variant))


def spec_of(variant: str) -> LoraSpec:
    rank = {} if variant == "ia3" else {"rank": 2}
    return LoraSpec(variant=variant, targets="kernel", train="head", **rank)


PLAIN, CHAINED = optax.sgd(1.0), optax.chain(precondition(), optax.sgd(1.0))


def updates_of(tx: Any, grads: Any, params: Any) -> Any:
    return tx.update(grads, tx.init(params), params)[0]


def assert_trees_close(x: Any, y: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), x, y)


@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_inside_the_optimizer(variant):
    params = wrapped(variant)

    @jax.jit
    def step(params: Any) -> Any:
        grads = jlora.grad(loss)(params)
        updates = updates_of(jlora.optimizer(CHAINED, params), grads, params)
        return grads, updates, optax.apply_updates(params, updates)

    grads, updates, after = jax.device_get(step(params))
    for layer in ("up", "down"):
        grad_a, grad_b = by_hand(grads[layer]["kernel"], params[layer]["kernel"], 1e-6)
        assert_close(updates[layer]["kernel"].lora_a, -grad_a, 1e-3)
        assert_close(updates[layer]["kernel"].lora_b, -grad_b, 1e-3)
    assert same_bits(updates["head"].base, -grads["head"].base)
    if variant == "dora":
        assert same_bits(updates["up"]["kernel"].magnitude, -grads["up"]["kernel"].magnitude)
    assert same_bits(jlora.partition(after)[1], jlora.partition(params)[1])


def test_gradients_of_the_whole_tree_and_of_the_half_and_outside_the_optimizer():
    params = wrapped()
    half, rest = jlora.partition(params)
    inside, of_half = jlora.optimizer(CHAINED, params), jlora.optimizer(CHAINED, half)
    outside = optax.chain(precondition(), jlora.optimizer(PLAIN, params))

    @jax.jit
    def all_updates(params: Any, half: Any) -> Any:
        grads = jlora.grad(loss)(params)
        return (
            updates_of(inside, grads, params),
            updates_of(inside, jax.grad(loss)(params), params),
            updates_of(of_half, jax.grad(lambda half: loss(jlora.combine(half, rest)))(half), half),
            updates_of(CHAINED, grads, half),
            updates_of(outside, grads, params),
        )

    holes, *others = all_updates(params, half)
    assert jax.tree.structure(others[-1]) == jax.tree.structure(holes)
    for updates in others:
        assert_trees_close(jax.tree.leaves(updates), jax.tree.leaves(holes))


def test_a_frozen_a_is_seen_from_outside():
    """With gradients with holes, and with those of the whole tree."""
    params = wrapped("lora_fa")
    tx = optax.chain(precondition(), jlora.optimizer(PLAIN, params))

    def step(params: Any, grads: Any) -> Any:
        updates = updates_of(tx, grads, params)
        return grads, updates, optax.apply_updates(params, updates)

    both = jax.jit(lambda params: [step(params, grad(loss)(params)) for grad in (jlora.grad, jax.grad)])
    for grads, updates, after in both(params):
        a, b = np.asarray(params["up"]["kernel"].lora_a), -np.asarray(grads["up"]["kernel"].lora_b)
        assert_close(updates["up"]["kernel"].lora_b, np.linalg.solve(a.T @ a + 1e-6 * np.eye(2), b), 1e-3)
        assert same_bits(jlora.partition(after)[1], jlora.partition(params)[1])


def test_a_frozen_a_out_of_sight_is_refused():
    params = wrapped("lora_fa")
    tx = jlora.optimizer(CHAINED, params)
    with pytest.raises(ValueError, match=r"the lora_a of a LoraFaParam is frozen, and out of sight"):
        tx.init(params)


def test_adalora_beside_it_is_left_alone():
    params = noisy(PARAMS, LoraSpec(rank=2, targets="down/kernel"))
    params["up"] = noisy(PARAMS["up"], LoraSpec(rank=2, variant="adalora", targets="kernel"))
    grads = noise_like(jlora.partition(params)[0])
    tx = jlora.optimizer(optax.chain(precondition(), optax.scale(-1.0)), params)
    updates = jax.jit(lambda grads, params: updates_of(tx, grads, params))(grads, params)
    assert same_bits(jax.tree.leaves(updates["up"]), jax.tree.leaves(jax.tree.map(np.negative, grads["up"])))
    assert not np.allclose(updates["down"]["kernel"].lora_a, -grads["down"]["kernel"].lora_a)


def test_shapes_alone():
    params = jax.eval_shape(wrapped)
    tx = jlora.optimizer(optax.chain(precondition(), optax.adam(1.0)), params)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, jlora.partition(params)[0], state, params)
    assert updates["up"]["kernel"].lora_a.shape == (6, 2)


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("damping", [0, -1e-6, float("nan"), float("inf")])
def test_the_damping_is_a_positive_number(damping):
    with pytest.raises(ValueError, match="damping must be a positive number"):
        precondition(damping)


@pytest.mark.parametrize("variant", [None, "adalora", "ia3"])
def test_a_tree_without_factors_is_refused(variant):
    params = PARAMS if variant is None else jax.eval_shape(lambda: jlora.wrap(PARAMS, spec_of(variant)))
    with pytest.raises(ValueError, match="no node of this tree has factors lora_a and lora_b"):
        precondition().init(params)


def test_an_update_without_parameters_is_refused():
    tx = precondition()
    with pytest.raises(ValueError, match="it needs the parameters"):
        tx.update(SHAPES["matrix"], tx.init(SHAPES["matrix"]))


# -------------------------------------------------------------------------------- it trains faster


def test_it_fits_small_singular_values_at_the_pace_of_large_ones():
    """The loss after 100 steps of fitting a product of rank 3 whose singular values are 1, 0.1 and 0.01."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (20, 15))
    target = (left * [1, 0.1, 0.01] @ right.T).astype(np.float32)
    start = (rng.normal(size=(20, 3)) * 0.2).astype(np.float32)
    param = LoraParam(None, start, np.zeros((3, 15), np.float32), axes=Axes((0,), (1,)))
    loss = lambda param: 0.5 * jnp.sum((param.lora_a @ param.lora_b - target) ** 2)
    after = lambda tx: loss(at(trained(tx, param, jax.grad(loss), 100), -1))
    rates = np.array([0.1, 0.3, 1.0, 1.5], np.float32)
    preconditioned, plain = jax.jit(
        lambda: (after(optax.chain(precondition(1e-8), optax.sgd(0.3))), jax.vmap(lambda x: after(optax.sgd(x)))(rates))
    )()
    assert preconditioned < 1e-9
    assert np.all(plain > 1e-5)


# -------------------------------------------------------------------------------- on a mesh

PLACES = {
    "matrix": (node((8, 4), (4, 16), Axes((0,), (1,))), P("data", None), P(None, "model")),
    "heads": (node((8, 4), (4, 4, 6), Axes((0,), (1, 2))), P("data", None), P(None, "model", None)),
    "head_dims": (node((8, 4), (4, 6, 4), Axes((0,), (1, 2))), P("data", None), P(None, None, "model")),
    "stacked": (node((2, 8, 4), (2, 4, 16), Axes((1,), (2,), (0,))), P("data"), P("data", None, "model")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_gradients_stay_where_they_are(kind):
    """Of all the kernels in one program."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params = {name: param for name, (param, *_) in PLACES.items()}
    placed = {
        name: dataclasses.replace(param, lora_a=NamedSharding(mesh, of_a), lora_b=NamedSharding(mesh, of_b))
        for name, (param, of_a, of_b) in PLACES.items()
    }
    grads = noise_like(params)
    with jax.set_mesh(mesh):
        args = jax.device_put((grads, params), (placed, placed))
        step = preconditioned.lower(*args).compile()
        found = step(*args)
    assert_trees_close(found, preconditioned(grads, params))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, placed)))
    moves = ("all-to-all(", "collective-permute(") + (("all-gather(",) if kind == AxisType.Auto else ())
    assert not [op for op in moves if op in step.as_text()]
