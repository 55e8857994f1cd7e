"""Optax's own transformations, as they are, with `jlora.optimizer`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import LoraSpec
from tests.optim.support import at, noise_like, noisy, run, stepped
from tests.support import same_bits

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
BIAS = np.array([-0.0, *range(1, 8)], np.float32)
PARAMS = {"up": {"kernel": normal(6, 8), "bias": BIAS / 8}, "down": normal(8, 4), "head": normal(4, 2)}
X, Y = normal(8, 6), normal(8, 2)


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"] @ params["head"]


def loss(params: Any, x: jax.Array = X, y: jax.Array = Y) -> jax.Array:
    return jnp.mean((jlora.apply(model)(params, x) - y) ** 2)


@functools.cache
def wrapped() -> Any:
    return noisy(PARAMS, LoraSpec(targets=("kernel", "down"), train="head", rank=4))


GRADIENT = jax.jit(jlora.grad(loss))


def frozen_half(params: Any) -> Any:
    return jlora.partition(params)[1]


def assert_close(x: Any, y: Any) -> None:
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, jax.tree.leaves(x), jax.tree.leaves(y))


TRANSFORMS = {
    "multi_steps": optax.MultiSteps(optax.adamw(0.01), 2).gradient_transformation(),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(0.01, weight_decay=0.1),
    "muon": optax.contrib.muon(0.01),
    "lion": optax.lion(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=4, weight_decay_rate=0.1),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1),
    "schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.001, 0.01, 2, 10)),
    "nesterov": optax.sgd(0.01, momentum=0.9, nesterov=True),
    "centralised": optax.chain(optax.centralize(), optax.adam(0.01)),
    "trust_ratio": optax.chain(optax.scale_by_trust_ratio(), optax.scale(-0.01)),
    "preconditioned": optax.chain(jlora.optim.precondition(), optax.adamw(0.01)),
}


# One kernel to adapt, a head trained in full, a bias that stays.
SMALL = {"kernel": normal(6, 8), "bias": BIAS, "head": normal(8, 4)}


@functools.cache
def small() -> Any:
    return noisy(SMALL, LoraSpec(targets="kernel", train="head", rank=4))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_frozen_leaves_keep_every_bit_and_the_half_alone_trains_alike(name):
    """On the trainable half a transformation needs no `jlora.optimizer`."""
    tx, (half, frozen) = TRANSFORMS[name], jlora.partition(small())
    grads = noise_like(half, 3)

    @jax.jit
    def both(params: Any, half: Any) -> Any:
        return at(run(jlora.optimizer(tx, params), params, grads), -1), at(run(tx, half, grads), -1)

    after, alone = both(small(), half)
    assert same_bits(frozen_half(after), frozen)
    pairs = zip(*map(jax.tree.leaves, (alone, half)), strict=True)
    assert all(not np.array_equal(x, y) and np.isfinite(x).all() for x, y in pairs)
    assert_close(jlora.partition(after)[0], alone)


@pytest.mark.parametrize("name", ["multi_steps", *(pytest.param(x, marks=pytest.mark.slow) for x in ("muon", "lion"))])
def test_gradients_of_the_whole_tree_train_alike(name):
    """What they say of frozen leaves is not looked at."""
    tx, grads = jlora.optimizer(TRANSFORMS[name], small()), noise_like(small(), 3)
    holes = jlora.partition(grads)[0]
    after, expected = jax.jit(lambda params: [at(run(tx, params, x), -1) for x in (grads, holes)])(small())
    assert same_bits(after, expected) and same_bits(frozen_half(after), frozen_half(small()))


def test_multi_steps_average_the_gradients():
    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    tx = jlora.optimizer(optax.MultiSteps(optax.adamw(0.01), 2), wrapped())
    once = jlora.optimizer(optax.adamw(0.01), wrapped())

    @jax.jit
    def both(params: Any) -> Any:
        after, state = params, tx.init(params)
        for x, y in halves:
            after, state = stepped(tx, after, state, jlora.grad(loss)(params, x, y))
        return after, stepped(once, params, once.init(params), jlora.grad(loss)(params))[0]

    assert_close(*both(wrapped()))


def test_clipping_outside_is_by_the_norm_of_what_trains():
    """Gradients of the whole tree have none for what is frozen; those with holes have nothing there."""

    @jax.jit
    def clipped(params: Any, limits: Any) -> Any:
        clip = lambda limit: optax.chain(optax.clip_by_global_norm(limit), jlora.optimizer(optax.sgd(1.0), params))
        updates = lambda tx, grads: tx.update(grads, tx.init(params), params)[0]
        return [[updates(clip(x), grad(loss)(params)) for grad in (jlora.grad, jax.grad)] for x in limits]

    trainable = jax.tree.leaves(GRADIENT(wrapped()))
    norm = float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in trainable)))
    halved, kept = clipped(wrapped(), [norm / 2, norm * 1.01])
    for updates in halved:
        assert_close(updates, [-np.asarray(x) / 2 for x in trainable])
    for updates in kept:
        assert_close(updates, [-np.asarray(x) for x in trainable])


def test_hyperparameters_are_read_and_set():
    tx = jlora.optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), wrapped())
    state = tx.init(wrapped())
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == 0.5
    state = optax.tree_utils.tree_set(state, learning_rate=0.25)
    grads = GRADIENT(wrapped())
    assert_close(jax.jit(tx.update)(grads, state, wrapped())[0], jax.tree.map(lambda x: -np.asarray(x) / 4, grads))


def test_a_schedule_free_run_is_evaluated_at_its_average():
    """A run on the half has the averages of optax on the bare factors; `combine` gives the tree to evaluate.

    Inside the optimizer it has the same averages.
    """
    half, frozen = jlora.partition(wrapped())
    leaves, treedef = jax.tree.flatten(half)
    tx = optax.contrib.schedule_free_adamw(0.01)
    inside = jlora.optimizer(tx, wrapped())
    of_half = lambda half: jlora.grad(loss)(jlora.combine(half, frozen))
    of_leaves = lambda leaves: jax.tree.leaves(of_half(treedef.unflatten(leaves)))

    @jax.jit
    def three_runs(params: Any, half: Any, leaves: Any) -> Any:
        return (
            with_state(inside, params, jlora.grad(loss), 20),
            with_state(tx, half, of_half, 20),
            with_state(tx, leaves, of_leaves, 20),
        )

    (after, state), (half, alone), (bare, bare_state) = three_runs(wrapped(), half, leaves)
    average = optax.contrib.schedule_free_eval_params(alone, half)
    evaluated = jlora.combine(average, frozen)
    assert_close(average, optax.contrib.schedule_free_eval_params(bare_state, bare))
    assert_close(state.inner_states["trainable"].inner_state.z, alone.z)
    assert_close(jlora.partition(after)[0], half)
    before, at_average, at_end = map(jax.jit(loss), (wrapped(), evaluated, jlora.combine(half, frozen)))
    assert at_average < 0.8 * before and not np.allclose(at_average, at_end, rtol=1e-4)
    assert jax.tree.structure(jax.eval_shape(jlora.merge, evaluated)) == jax.tree.structure(PARAMS)


def with_state(tx: Any, params: Any, gradient: Any, steps: int) -> Any:
    """The parameters and the state after some steps."""
    step = lambda _, carry: stepped(tx, *carry, gradient(carry[0]))
    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))


# -------------------------------------------------------------------------------- LoRA+ of every variant


def shapes_of(variant: str) -> Any:
    rank = {} if variant == "ia3" else {"rank": 4}
    spec = LoraSpec(targets=("kernel", "down"), train="head", variant=variant, **rank)
    return jax.eval_shape(lambda: jlora.wrap(PARAMS, spec))


@pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa", "adalora"])
def test_the_ratio_scales_lora_b_of_every_variant_and_nothing_else(variant):
    half, _ = jlora.partition(shapes_of(variant))
    plain, plus = (jlora.optimizer(optax.adam(0.1), half, b_lr_ratio=ratio) for ratio in (None, 16.0))
    updates = jax.jit(lambda half, grads: [tx.update(grads, tx.init(half), half)[0] for tx in (plain, plus)])
    once, scaled = updates(noise_like(half, seed=1), noise_like(half))
    pairs = zip(jax.tree_util.tree_leaves_with_path(scaled), jax.tree.leaves(once), strict=True)
    ratios = {jax.tree_util.keystr(path): float(np.median(np.asarray(x) / y)) for (path, x), y in pairs}
    assert {path for path, ratio in ratios.items() if ratio == 16} == {"['down'].lora_b", "['up']['kernel'].lora_b"}
    assert {ratio for path, ratio in ratios.items() if "lora_b" not in path} == {1.0}


@pytest.mark.parametrize("variant", ["vera", "loha", "lokr", "ia3"])
def test_the_ratio_is_refused_where_no_lora_b_trains(variant):
    with pytest.raises(ValueError, match=r"no lora_b in this tree trains, so b_lr_ratio=16.0 would do nothing"):
        jlora.optimizer(optax.adam(0.1), shapes_of(variant), b_lr_ratio=16.0)
