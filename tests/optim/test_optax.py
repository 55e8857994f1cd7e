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
from tests.support import randomised, same_bits

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
PARAMS = {"up": {"kernel": normal(6, 8), "bias": normal(8).at[0].set(-0.0)}, "down": normal(8, 4), "head": normal(4, 2)}
X, Y = normal(8, 6), normal(8, 2)


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"] @ params["head"]


def loss(params: Any, x: jax.Array = X, y: jax.Array = Y) -> jax.Array:
    return jnp.mean((jlora.apply(model)(params, x) - y) ** 2)


@functools.cache
def wrapped(variant: str = "lora") -> Any:
    rank = {} if variant == "ia3" else {"rank": 4}
    return randomised(jlora.wrap(PARAMS, LoraSpec(targets=("kernel", "down"), train="head", variant=variant, **rank)))


GRADIENT, WHOLE = jax.jit(jlora.grad(loss)), jax.jit(jax.grad(loss))


def train(tx: Any, params: Any, gradient: Any = GRADIENT, steps: int = 3, **extra: Any) -> tuple[Any, Any]:
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(gradient(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


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


@pytest.mark.parametrize(
    "gradient",
    [pytest.param(GRADIENT, id="with_holes"), pytest.param(WHOLE, id="of_the_whole_tree", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_frozen_leaves_keep_every_bit(name, gradient):
    after, _ = train(jlora.optimizer(TRANSFORMS[name], wrapped()), wrapped(), gradient)
    assert same_bits(frozen_half(after), frozen_half(wrapped()))
    pairs = zip(*(jax.tree.leaves(jlora.partition(tree)[0]) for tree in (after, wrapped())), strict=True)
    assert all(not np.array_equal(x, y) and jnp.isfinite(x).all() for x, y in pairs)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_half_alone_trains_alike(name):
    """On the trainable half a transformation needs no `jlora.optimizer`."""
    half, frozen = jlora.partition(wrapped())
    of_half = jax.jit(lambda half: GRADIENT(jlora.combine(half, frozen)))
    after, _ = train(TRANSFORMS[name], half, of_half)
    expected, _ = train(jlora.optimizer(TRANSFORMS[name], wrapped()), wrapped())
    assert_close(after, jlora.partition(expected)[0])


def test_multi_steps_average_the_gradients():
    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    tx = jlora.optimizer(optax.MultiSteps(optax.adamw(0.01), 2), wrapped())
    params, state = wrapped(), tx.init(wrapped())
    for x, y in halves:
        updates, state = tx.update(jlora.grad(loss)(params, x, y), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, train(jlora.optimizer(optax.adamw(0.01), wrapped()), wrapped(), steps=1)[0])


@pytest.mark.parametrize("gradient", [GRADIENT, WHOLE], ids=["with_holes", "of_the_whole_tree"])
def test_clipping_outside_is_by_the_norm_of_what_trains(gradient):
    trainable = jax.tree.leaves(jlora.partition(GRADIENT(wrapped()))[0])
    norm = float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in trainable)))
    clip = lambda limit: optax.chain(optax.clip_by_global_norm(limit), jlora.optimizer(optax.sgd(1.0), wrapped()))
    step = lambda tx: tx.update(gradient(wrapped()), tx.init(wrapped()), wrapped())[0]
    assert_close(step(clip(norm / 2)), jax.tree.map(lambda x: -x / 2, trainable))
    assert_close(step(clip(norm * 1.01)), jax.tree.map(lambda x: -x, trainable))


def test_hyperparameters_are_read_and_set():
    tx = jlora.optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), wrapped())
    state = tx.init(wrapped())
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == 0.5
    state = optax.tree_utils.tree_set(state, learning_rate=0.25)
    updates, _ = tx.update(GRADIENT(wrapped()), state, wrapped())
    assert_close(updates, jax.tree.map(lambda x: -x / 4, GRADIENT(wrapped())))


def test_a_schedule_free_run_is_evaluated_at_its_average():
    """A run on the half has the averages of optax on the bare factors; `combine` gives the tree to evaluate."""
    half, frozen = jlora.partition(wrapped())
    tx = optax.contrib.schedule_free_adamw(0.01)
    half, state = train(tx, half, lambda half: GRADIENT(jlora.combine(half, frozen)), steps=20)
    average = optax.contrib.schedule_free_eval_params(state, half)
    evaluated = jlora.combine(average, frozen)
    assert same_bits(frozen_half(evaluated), frozen_half(wrapped()))

    leaves, treedef = jax.tree.flatten(jlora.partition(wrapped())[0])
    of_leaves = lambda leaves: jax.tree.leaves(GRADIENT(jlora.combine(treedef.unflatten(leaves), frozen)))
    bare, bare_state = train(tx, leaves, of_leaves, steps=20)
    assert_close(average, optax.contrib.schedule_free_eval_params(bare_state, bare))
    assert float(loss(evaluated)) < 0.8 * float(loss(wrapped()))
    assert not np.allclose(loss(evaluated), loss(jlora.combine(half, frozen)), rtol=1e-4)
    assert jax.tree.structure(jlora.merge(evaluated)) == jax.tree.structure(PARAMS)


def test_a_schedule_free_run_inside_the_optimizer_has_the_same_average():
    tx = jlora.optimizer(optax.contrib.schedule_free_adamw(0.01), wrapped())
    after, state = train(tx, wrapped(), steps=5)
    half, frozen = jlora.partition(wrapped())
    alone, alone_state = train(
        optax.contrib.schedule_free_adamw(0.01), half, lambda half: GRADIENT(jlora.combine(half, frozen)), steps=5
    )
    inner = state.inner_states["trainable"].inner_state
    assert_close(inner.z, alone_state.z)
    assert_close(jlora.partition(after)[0], alone)


# -------------------------------------------------------------------------------- LoRA+ of every variant


def updates_of(variant: str, **settings: Any) -> Any:
    tx = jlora.optimizer(optax.adam(0.1), wrapped(variant), **settings)
    return tx.update(GRADIENT(wrapped(variant)), tx.init(wrapped(variant)), wrapped(variant))[0]


@pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa", "adalora"])
def test_the_ratio_scales_lora_b_of_every_variant_and_nothing_else(variant):
    once, scaled = updates_of(variant), updates_of(variant, b_lr_ratio=16.0)
    pairs = zip(jax.tree_util.tree_leaves_with_path(scaled), jax.tree.leaves(once), strict=True)
    ratios = {jax.tree_util.keystr(path): float(jnp.median(x / y)) for (path, x), y in pairs}
    assert {path for path, ratio in ratios.items() if ratio == 16} == {"['down'].lora_b", "['up']['kernel'].lora_b"}
    assert {ratio for path, ratio in ratios.items() if "lora_b" not in path} == {1.0}


@pytest.mark.parametrize("variant", ["vera", "loha", "lokr", "ia3"])
def test_the_ratio_is_refused_where_no_lora_b_trains(variant):
    with pytest.raises(ValueError, match=r"no lora_b in this tree trains, so b_lr_ratio=16.0 would do nothing"):
        jlora.optimizer(optax.adam(0.1), wrapped(variant), b_lr_ratio=16.0)
