"""Gradients, states and parameters that do not belong together: one clear error each; and what only looks so."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import jlora
from jlora import LoraSpec
from jlora.optim import adalora
from jlora.optim.fit import Unchanged
from tests.optim.support import at, noise_like, noisy, run, stepped
from tests.support import same_bits

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
PARAMS = {"up": {"kernel": normal(6, 8), "bias": normal(8)}, "down": normal(8, 4), "head": normal(4, 2)}
X, Y = normal(8, 6), normal(8, 2)


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"] @ params["head"]


def loss(params: Any) -> jax.Array:
    return jnp.mean((jlora.apply(model)(params, X) - Y) ** 2)


def spec_of(variant: str = "lora", rank: int = 4, **settings: Any) -> LoraSpec:
    return LoraSpec(**{"targets": ("kernel", "down"), "train": "head"} | settings, rank=rank, variant=variant)


@functools.cache
def wrapped(variant: str = "lora") -> Any:
    return noisy(PARAMS, spec_of(variant))


def shapes_of(*args: Any, **settings: Any) -> Any:
    return jax.eval_shape(lambda: jlora.wrap(PARAMS, spec_of(*args, **settings)))


def gradient(*args: Any, **settings: Any) -> Any:
    """Noise, for what trains in a tree wrapped so."""
    return noise_like(jlora.partition(shapes_of(*args, **settings))[0])


WITH_HOLES, OF_ALL = jax.jit(jlora.grad(loss)), jax.jit(jax.grad(loss))
ADAM = optax.adam(0.1)
HALVED = optax.chain(ADAM, optax.scale(0.5))
STEPS = {"total_steps": 8, "warmup_steps": 0, "final_steps": 2, "target_rank": 1}


# -------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize("grad", [WITH_HOLES, OF_ALL], ids=["with_holes", "of_the_whole_tree"])
def test_an_update_without_the_parameters(grad):
    tx, params = jlora.optimizer(ADAM, wrapped()), wrapped()

    def both(grads: Any, params: Any) -> Any:
        state = tx.init(params)
        return tx.update(grads, state), tx.update(grads, state, params)

    alone, expected = jax.jit(both)(grad(params), params)
    assert jax.tree.structure(alone) == jax.tree.structure(expected)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, alone, expected)


def test_the_half_without_the_parameters_and_with_gradients_of_the_whole_tree():
    half, _ = jlora.partition(wrapped())
    tx = jlora.optimizer(ADAM, half)

    @jax.jit
    def all_ways(grads: Any, of_all: Any, half: Any) -> Any:
        state = tx.init(half)
        ways = tx.update(grads, state), tx.update(grads, state, half), tx.update(of_all, state, half)
        return [updates for updates, _ in ways]

    alone, expected, of_all = all_ways(gradient(), OF_ALL(wrapped()), half)
    assert same_bits(alone, expected)
    assert jax.tree.structure(jax.eval_shape(optax.apply_updates, half, of_all)) == jax.tree.structure(half)


def test_two_optimizers_in_a_chain():
    tx = optax.chain(*(jlora.optimizer(optax.scale(x), wrapped()) for x in (2.0, 3.0)))
    updates = jax.jit(lambda grads: tx.update(grads, tx.init(wrapped()), wrapped())[0])(gradient())
    assert same_bits(jax.tree.leaves(updates), jax.tree.leaves(jax.tree.map(lambda x: x * 2 * 3, gradient())))


def test_a_masked_part_of_a_larger_tree():
    ones = np.ones(3, np.float32)
    parts = {"model": jlora.optimizer(ADAM, wrapped()), "extra": optax.sgd(1.0)}
    tx = optax.multi_transform(parts, {"model": "model", "extra": "extra"})
    updates_of = lambda tx, grads, tree: tx.update(grads, tx.init(tree), tree)[0]

    @jax.jit
    def both(grads: Any, params: Any) -> Any:
        whole = updates_of(tx, {"model": grads, "extra": ones}, {"model": params, "extra": ones})
        return whole, updates_of(parts["model"], grads, params)

    updates, alone = both(gradient(), wrapped())
    np.testing.assert_array_equal(updates["extra"], -ones)
    assert same_bits(updates["model"], alone)


def test_a_stack_of_adapters_under_vmap():
    """The optimizer is made for a stack, its functions see one of them."""
    stack = noise_like(gradient(), 2)
    tx = jlora.optimizer(ADAM, stack)
    updates, _ = jax.jit(jax.vmap(lambda one: tx.update(one, tx.init(one))))(stack)
    assert [x.shape for x in jax.tree.leaves(updates)] == [x.shape for x in jax.tree.leaves(stack)]


def test_a_frozen_leaf_costs_nothing_in_the_program():
    tx, params = jlora.optimizer(optax.sgd(0.1), wrapped()), wrapped()
    program = jax.make_jaxpr(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(gradient(), params)
    assert len(program.eqns) == len(jax.tree.leaves(gradient()))


# -------------------------------------------------------------------------------- what does not

WRONG = {
    "of a plain tree": (PARAMS, r"at down: expected a LoraParam, found an array of shape \(8, 4\)"),
    "of another rank": (gradient(rank=2), r"at down/lora_a: expected an array of shape \(8, 4\), found .* \(8, 2\)"),
    "of another variant": (gradient("dora"), r"at down: expected a LoraParam, found a DoraParam"),
    "of another scale": (gradient(alpha=3), r"at down: expected scale=4.0, found scale=0.75"),
    "of a bias too": (gradient(bias="all"), r"at up/bias: expected an array of shape \(8,\), found a TrainableParam"),
    "of fewer kernels": (gradient(targets="kernel"), r"at down: expected a LoraParam, found nothing"),
    "of a smaller tree": ({"up": gradient()["up"]}, r"at down: expected a LoraParam, found nothing"),
    "of a larger tree": (gradient() | {"more": np.ones(2)}, r"at more: expected no leaf, found .* shape \(2,\)"),
    "of other containers": (FrozenDict(gradient()), r"expected a tree of dict, found one of FrozenDict"),
    "with a hole": (gradient() | {"down": None}, r"at down: expected a LoraParam, found nothing"),
}


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adamw(0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", WRONG)
def test_gradients_that_do_not_fit(name, tx):
    grads, message = WRONG[name]
    tx, params = jlora.optimizer(tx, wrapped()), wrapped()
    state = jax.eval_shape(tx.init, params)
    for update in (tx.update, traced(tx.update)):
        with pytest.raises(ValueError, match=r"optimizer: the gradients do not fit the parameters.*" + message):
            update(grads, state, params)


def traced(fn: Any) -> Any:
    """The function, traced as under jit, but not compiled; its arguments may be shapes."""
    return functools.partial(jax.eval_shape, fn)


def test_gradients_that_do_not_fit_without_parameters():
    tx = jlora.optimizer(optax.sgd(0.1), wrapped())
    with pytest.raises(ValueError, match=r"the tree that jlora.optimizer was given at down: expected a LoraParam"):
        tx.update(PARAMS, jax.eval_shape(tx.init, wrapped()))


def test_a_factor_without_a_gradient():
    tx, grads = jlora.optimizer(ADAM, wrapped()), gradient()
    grads = jax.tree.map(lambda x: None if x.shape == (8, 4) else x, grads)
    with pytest.raises(ValueError, match=r"at down/lora_a: expected an array of shape \(8, 4\), found nothing"):
        tx.update(grads, jax.eval_shape(tx.init, wrapped()), wrapped())


def test_parameters_of_another_spec():
    tx = jlora.optimizer(ADAM, wrapped())
    with pytest.raises(ValueError, match=r"at down/lora_a: expected .* \(8, 2\), found .* \(8, 4\)"):
        tx.update(gradient(), jax.eval_shape(tx.init, wrapped()), shapes_of(rank=2))


STATES = {
    "another rank": ({"rank": 2}, r"mu/down/lora_a: expected shape \(8, 4\), found shape \(8, 2\)"),
    "a rank that broadcasts": ({"rank": 1}, r"mu/down/lora_a: expected shape \(8, 4\), found shape \(8, 1\)"),
    "another variant": ({"variant": "dora"}, r"the state does not fit the parameters at .*down"),
}


@pytest.mark.parametrize("with_params", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_spec(name, with_params):
    settings, message = STATES[name]
    other, params = shapes_of(**settings), wrapped() if with_params else None
    tx, state = jlora.optimizer(ADAM, wrapped()), jax.eval_shape(jlora.optimizer(ADAM, other).init, other)
    with pytest.raises(ValueError, match=message):
        traced(tx.update)(gradient(), state, params)


def test_a_state_of_another_optimizer():
    tx, other = jlora.optimizer(ADAM, wrapped()), optax.sgd(0.1, momentum=0.9)
    with pytest.raises(ValueError, match="the state does not fit the parameters"):
        traced(tx.update)(gradient(), jax.eval_shape(other.init, wrapped()), wrapped())


def test_a_state_of_the_half_says_to_pass_the_half():
    tx, half = jlora.optimizer(ADAM, wrapped()), jlora.partition(wrapped())[0]
    state = jax.eval_shape(tx.init, half)
    with pytest.raises(ValueError, match=r"expected MaskedNode, found NoneType.*tx.update\(grads, state, params\)"):
        traced(tx.update)(gradient(), state)
    traced(tx.update)(gradient(), state, half)


def test_errors_of_the_transformation_itself_are_its_own():
    def refuse(*_: Any) -> Any:
        raise RuntimeError("mine")

    tx = jlora.optimizer(optax.GradientTransformation(ADAM.init, refuse), wrapped())
    with pytest.raises(RuntimeError, match="mine"):
        tx.update(gradient(), jax.eval_shape(tx.init, wrapped()), wrapped())


def test_a_state_for_a_plain_tree_is_refused():
    with pytest.raises(ValueError, match="no leaf of this tree trains"):
        jlora.optimizer(ADAM, wrapped()).init(PARAMS)


@pytest.mark.parametrize("tx", [ADAM, optax.MultiSteps(ADAM, 2)], ids=["adam", "multi_steps"])
def test_swapped_arguments(tx):
    with pytest.raises(TypeError, match=r"the arguments are swapped; call jlora.optimizer\(tx, tree\)"):
        jlora.optimizer(wrapped(), tx)


@pytest.mark.parametrize("tx", [PARAMS, "adam", optax.adam], ids=["tree", "name", "not_called"])
def test_what_is_no_transformation(tx):
    with pytest.raises(TypeError, match="tx must be an optax transformation, found"):
        jlora.optimizer(tx, wrapped())


# -------------------------------------------------------------------------------- adalora


@functools.cache
def one_kernel() -> Any:
    """A wrapped kernel, its gradients of seven steps, and adalora inside of the optimizer, that scales in itself."""
    params = noisy({"down": PARAMS["down"]}, LoraSpec("down", variant="adalora", rank=4))
    return params, noise_like(jlora.partition(params)[0], 7), jlora.optimizer(adalora(HALVED, **STEPS), params)


def test_adalora_outside_of_the_optimizer_and_outside_of_jit_is_adalora_inside():
    params, grads, inside = one_kernel()
    outside = adalora(jlora.optimizer(HALVED, params), **STEPS)
    last, other = jax.jit(lambda params: [at(run(tx, params, grads), -1) for tx in (inside, outside)])(params)
    assert same_bits(last, other)
    assert sum(jlora.optim.ranks(last).values()) == 1
    eager = trained_outside_of_jit(inside, params, grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), eager, last)


def test_updates_of_adalora_that_are_rescaled_are_refused_where_values_are_known():
    params, grads, _ = one_kernel()
    scaled = optax.chain(jlora.optimizer(adalora(ADAM, **STEPS), params), optax.scale(0.5))
    with pytest.raises(ValueError, match=r"adalora: the last update made values of lora_e zero in .*, yet"):
        trained_outside_of_jit(scaled, params, grads)


def trained_outside_of_jit(tx: Any, params: Any, grads: Any) -> Any:
    state = tx.init(params)
    for step in range(7):
        params, state = stepped(tx, params, state, at(grads, step))
    return params


@pytest.mark.parametrize(
    "grads, message",
    [
        (gradient("adalora"), r"adalora: down/base is frozen, and has no gradient. Put adalora inside the optimizer"),
        (
            noise_like(wrapped("adalora")),
            r"adalora: the frozen base of down would be trained. Put adalora inside the optimizer",
        ),
    ],
    ids=["with_holes", "of_the_whole_tree"],
)
def test_adalora_without_the_optimizer_is_refused_on_the_whole_tree(grads, message):
    tx, params = adalora(optax.adamw(0.1), **STEPS), wrapped("adalora")
    with pytest.raises(ValueError, match=message):
        traced(tx.update)(grads, jax.eval_shape(tx.init, params), params)


def test_adalora_on_the_half_without_the_optimizer():
    half, _ = jlora.partition(wrapped("adalora"))
    tx = adalora(ADAM, **STEPS)
    state = jax.eval_shape(tx.init, half)
    traced(tx.update)(gradient("adalora"), state, half)
    with pytest.raises(ValueError, match=r"adalora: the gradients do not fit the parameters at down/lora_a"):
        traced(tx.update)(gradient("adalora", rank=2), state, half)


# -------------------------------------------------------------------------------- the whole state of an NNX model


class Dropped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(nnx.relu(self.first(x))))


@functools.cache
def dropped() -> Any:
    """The wrapped state of the model, and a compiled gradient."""
    make = lambda: nnx.split(Dropped(nnx.Rngs(0)))
    graph, _ = nnx.eval_shape(make)
    params = jax.jit(lambda: jlora.wrap(make()[1], LoraSpec("kernel", rank=2)))()
    loss = lambda params: jnp.mean((jlora.apply(lambda p, x: nnx.merge(graph, p)(x))(params, X) - Y) ** 2)
    return params, jax.jit(jlora.grad(loss))


def keys_of(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def raw(tree: Any) -> Any:
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.parametrize("whole_step", [False, True])
def test_the_random_state_of_a_model_keeps_its_bits(whole_step):
    before, grad = dropped()
    tx = jlora.optimizer(optax.adamw(0.1), before)
    update, add = (
        jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0]),
        jax.jit(optax.apply_updates),
    )
    step = lambda params: add(params, update(grad(params), params))
    after = (jax.jit(step) if whole_step else step)(before)
    assert keys_of(before)
    assert same_bits(raw(jlora.partition(after)[1]), raw(jlora.partition(before)[1]))
    assert not same_bits(raw(after), raw(before))


def test_a_key_outside_of_jit_says_how():
    """Eager JAX casts no key, and `optax.apply_updates` casts every leaf."""
    params, grad = dropped()
    tx = jlora.optimizer(optax.sgd(0.1), params)
    updates, _ = tx.update(grad(params), tx.init(params), params)
    with pytest.raises(TypeError, match=r"jax.jit\(optax.apply_updates\)\(params, updates\)"):
        optax.apply_updates(params, updates)


def test_frozen_counts_and_flags_take_their_update_outside_of_jit():
    leaves = {"count": jnp.uint32(3), "flag": jnp.array([True]), "old_key": jax.random.PRNGKey(1)}
    assert same_bits(optax.apply_updates(leaves, jax.tree.map(lambda _: Unchanged(), leaves)), leaves)
