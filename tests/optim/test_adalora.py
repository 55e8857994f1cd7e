"""AdaLoRA's ranks: against the paper's algorithm in float64, kernel by kernel, and in training."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import Axes, LoraSpec
from jlora.optim import adalora, ranks
from jlora.optim.triplets import Schedule
from jlora.variants.adalora import AdaLoraParam, orthogonality
from tests.optim.support import at, noise_like, noisy, run, stepped, trained
from tests.support import same_bits

STEPS = {"total_steps": 30, "warmup_steps": 5, "final_steps": 8, "target_rank": 1}
END = 22


def normal(rng: Any, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def kernels(seed: int = 0) -> Any:
    """A matrix, a stack of three with many axes, two of four layers: 6 kernels, 4 + 9 + 4 triplets."""
    rng = np.random.default_rng(seed)
    make = lambda a, e, b, axes, layers=None: AdaLoraParam(
        None, normal(rng, *a), normal(rng, *e), normal(rng, *b), axes=axes, layers=layers
    )
    return {
        "matrix": make((6, 4), (4,), (4, 5), Axes((0,), (1,))),
        "stacked": make((3, 2, 4, 3), (3, 3), (3, 3, 2, 2), Axes((1, 2), (3, 4), (0,))),
        "some": make((2, 3, 2), (2, 2), (2, 2, 5), Axes((0,), (2,), (1,)), layers=(1, 3)),
        "nothing": None,
        "plain": normal(rng, 3),
    }


class ByHand:
    """The algorithm in float64, over matrices; the gradients go straight into plain gradient descent."""

    def __init__(self, params: Any, rate: float, interval: int = 1, beta1: float = 0.85, beta2: float = 0.85):
        self.triplets = matrices(params)
        self.rate, self.interval, self.betas = rate, interval, (beta1, beta2)
        self.means = [[np.zeros_like(x) for x in kernel] for kernel in self.triplets]
        self.spreads = [[np.zeros_like(x) for x in kernel] for kernel in self.triplets]
        self.keep = None

    def step(self, t: int, grads: Any) -> None:
        for k, kernel in enumerate(matrices(grads)):
            for i, grad in enumerate(kernel):
                self.triplets[k][i] = self.triplets[k][i] - self.rate * grad
                if t < END:
                    now = abs(self.triplets[k][i] * grad)
                    self.means[k][i] = self.betas[0] * self.means[k][i] + (1 - self.betas[0]) * now
                    away = abs(now - self.means[k][i])
                    self.spreads[k][i] = self.betas[1] * self.spreads[k][i] + (1 - self.betas[1]) * away
        if t > 5 and (t % self.interval == 0 or t == END) and t <= END:
            self.keep = self.best(budget_by_hand(t, 17, 6))
        if t > 5 and (t % self.interval == 0 or t >= END):
            for kernel, keep in zip(self.triplets, self.keep, strict=True):
                kernel[1] = np.where(keep, kernel[1], 0)

    def best(self, budget: int) -> list[np.ndarray]:
        score = [[m * u for m, u in zip(*pair, strict=True)] for pair in zip(self.means, self.spreads, strict=True)]
        importance = [e + a.mean(0) + b.mean(1) for a, e, b in score]
        threshold = np.sort(np.concatenate(importance))[::-1][budget - 1]
        return [x >= threshold for x in importance]


def budget_by_hand(t: int, triplets: int, kernels: int, start: int = 5, end: int = END, rank: int = 1) -> int:
    target, left = rank * kernels, min(max(end - t, 0), end - start)
    return target + (triplets - target) * left**3 // (end - start) ** 3


def matrices(tree: Any) -> list[list[np.ndarray]]:
    """A (in, r), e (r,), B (r, out) of every single kernel."""
    found = []
    for node in (tree[name] for name in ("matrix", "stacked", "some")):
        a, e, b = (np.asarray(x, np.float64) for x in (node.lora_a, node.lora_e, node.lora_b))
        r = e.shape[-1]
        places = np.ndindex(*e.shape[:-1])
        found += [[a[place].reshape(-1, r), e[place], b[place].reshape(r, -1)] for place in places]
    return found


@pytest.mark.parametrize("interval", [1, 4])
def test_thirty_steps_of_the_algorithm(interval):
    params = kernels()
    grads = noise_like(params, 30, seed=7)
    tx = adalora(optax.sgd(0.05), interval=interval, beta1=0.8, beta2=0.9, **STEPS)
    history, hand = compiled_run(tx, params, grads), ByHand(params, 0.05, interval, 0.8, 0.9)
    left, masks = [], []
    for t in range(1, 31):
        params = at(history, t - 1)
        hand.step(t, at(grads, t - 1))
        for found, expected in zip(matrices(params), hand.triplets, strict=True):
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_array_equal(x == 0, y == 0)
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        left.append(triplets_of(params))
        masks.append(np.concatenate([(params[name].lora_e != 0).ravel() for name in ("matrix", "stacked", "some")]))
    assert all(np.array_equal(mask, masks[END - 1]) for mask in masks[END:]), "what is masked in the end stays"
    assert any((after & ~before).any() for before, after in itertools.pairwise(masks[5:END])), "but not before"
    assert left[:5] == [17] * 5 and left[END - 1 :] == [6] * 9
    assert left == sorted(left, reverse=True) or interval > 1
    if interval == 1:
        assert left == [budget_by_hand(t, 17, 6) for t in range(1, 31)]


def compiled_run(tx: Any, params: Any, grads: Any) -> Any:
    """The parameters after each step, as numpy."""
    return jax.device_get(jax.jit(lambda params, grads: run(tx, params, grads))(params, grads))


def triplets_of(params: Any) -> int:
    return sum(int(x.sum()) for x in ranks(params).values())


# -------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("start, end, triplets, kernels, rank", [(0, 10, 1010, 10, 1), (100, 1300, 2304, 192, 8)])
def test_the_budget_is_the_cubic_rounded_down(start, end, triplets, kernels, rank):
    steps = np.arange(end + 10)
    budget = lambda t: Schedule(rank, start, end, 1).budget(t, triplets, kernels)
    found = jax.jit(jax.vmap(budget))(steps)
    expected = [budget_by_hand(int(t), triplets, kernels, start, end, rank) for t in steps]
    np.testing.assert_array_equal(found, expected)


def test_the_corners_of_the_budget():
    corners = {0: 17, 1: 17, 5: 17, 6: 15, 21: 6, 22: 6, 30: 6, 1000: 6}
    budget = jax.jit(jax.vmap(lambda t: Schedule(1, 5, END, 1).budget(t, 17, 6)))
    assert budget(np.array(list(corners))).tolist() == list(corners.values())
    assert [budget_by_hand(t, 17, 6) for t in corners] == list(corners.values())


@pytest.mark.parametrize("interval, expected", [(1, [6, 7, 8, 9, 10, 11, 12]), (3, [6, 9, 10, 11, 12])])
def test_when_it_prunes(interval, expected):
    assert np.flatnonzero(Schedule(1, 5, 10, interval).prunes(np.arange(13))).tolist() == expected


def test_equal_scores_keep_the_budget():
    """Gradients of zero: nothing is known, and yet as many stay as should."""
    params, grads = stack_of_two()
    assert triplets_of({"kernel": pruned(params, jax.tree.map(np.zeros_like, grads))}) == 2


def test_factors_of_half_precision_become_exactly_zero():
    params, grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stack_of_two())
    assert triplets_of({"kernel": pruned(params, grads)}) == 2


def stack_of_two() -> Any:
    """A kernel of two layers, 8 triplets, and a gradient."""
    rng = np.random.default_rng(5)
    shapes = (2, 8, 4), (2, 4), (2, 4, 16)
    make = lambda: AdaLoraParam(None, *(normal(rng, *shape) for shape in shapes), axes=Axes((1,), (2,), (0,)))
    return make(), make()


@jax.jit
def pruned(params: Any, grads: Any) -> Any:
    """The parameters after all steps down one gradient."""
    tx = adalora(optax.sgd(0.1), **(STEPS | {"warmup_steps": 0}))
    step = lambda _, carry: stepped(tx, *carry, grads)
    return jax.lax.fori_loop(0, END, step, (params, tx.init(params)))[0]


# -------------------------------------------------------------------------------- in a tree

RNG = np.random.default_rng(3)
PARAMS = {
    "layers": {"kernel": normal(RNG, 3, 6, 6) / 6, "bias": normal(RNG, 3, 6)},
    "out": {"kernel": normal(RNG, 6, 4)},
    "head": normal(RNG, 4, 4),
}
X, Y = normal(RNG, 16, 6), normal(RNG, 16, 4)
AXES = {"layers/kernel": Axes((1,), (2,), (0,))}
SPEC = LoraSpec(variant="adalora", rank=3, targets="kernel", train="head", axes=AXES)


def model(params: Any, x: jax.Array) -> jax.Array:
    layer = lambda x, p: (jnp.tanh(x @ p["kernel"] + p["bias"]), None)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["out"]["kernel"] @ params["head"]


def loss(params: Any) -> jax.Array:
    return jnp.mean((jlora.apply(model)(params, X) - Y) ** 2)


@functools.cache
def wrapped() -> Any:
    return noisy(PARAMS, SPEC)


def tx_of(params: Any, inner: Any, **settings: Any) -> Any:
    return jlora.optimizer(adalora(inner, **(STEPS | settings)), params)


def test_scanned_kernels_share_one_budget():
    params = wrapped()
    training = jax.jit(lambda params: trained(tx_of(params, optax.adamw(0.01)), params, jax.grad(loss), 30))
    after = at(jax.device_get(training(params)), -1)
    found = ranks(after)
    assert found.keys() == {"layers/kernel", "out/kernel"}
    assert found["layers/kernel"].shape == (3,) and found["out/kernel"].shape == ()
    assert found["layers/kernel"].sum() + found["out/kernel"] == 4
    assert same_bits(jlora.partition(after)[1], jlora.partition(params)[1])
    assert not np.array_equal(after["head"].base, params["head"].base)


def test_gradients_with_holes_of_the_whole_tree_and_of_the_half_train_alike():
    params = wrapped()
    half, rest = jlora.partition(params)
    whole, of_half = (tx_of(tree, optax.adamw(0.1), warmup_steps=0) for tree in (params, half))

    @jax.jit
    def first_steps(params: Any, half: Any) -> Any:
        holes, of_all = (
            stepped(whole, params, whole.init(params), grad(loss)(params))[0] for grad in (jlora.grad, jax.grad)
        )
        grads = jax.grad(lambda half: loss(jlora.combine(half, rest)))(half)
        return holes, of_all, stepped(of_half, half, of_half.init(half), grads)[0]

    holes, of_all, halved = first_steps(params, half)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, holes, of_all)
    jax.tree.map(close, halved, jlora.partition(holes)[0])
    assert same_bits(jlora.partition(holes)[1], rest) and triplets_of(holes) == 10
    assert ranks(halved).keys() == ranks(holes).keys()


def test_multi_steps_around_it_count_updates():
    params = wrapped()
    every = optax.MultiSteps(adalora(optax.adam(0.01), **STEPS), 2).gradient_transformation()
    grads = noise_like(jlora.partition(params)[0], END * 2)
    history = compiled_run(jlora.optimizer(every, params), params, grads)
    assert (triplets_of(at(history, 9)), triplets_of(at(history, -1))) == (12, 4)


def test_the_state_is_float32_and_beside_what_trains_alone():
    params = wrapped()
    state = jax.eval_shape(tx_of(params, optax.sgd(0.1)).init, params).inner_states["trainable"].inner_state
    factors = [x for node in (params["layers"]["kernel"], params["out"]["kernel"]) for x in (node.lora_a, node.lora_b)]
    size = sum(x.size for x in factors) + 12
    means = jax.tree.leaves((state.sensitivity, state.uncertainty))
    assert sum(x.size for x in means) == 2 * size and {x.dtype for x in means} == {jnp.dtype("float32")}
    assert sum(x.size for x in jax.tree.leaves(state.keep)) == 12


def test_shapes_alone():
    params = jax.eval_shape(wrapped)
    tx = tx_of(params, optax.adam(0.1))
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, jlora.partition(params)[0], state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_kernels_are_pruned_alike(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params, grads = stack_of_two()
    a, e, b = (NamedSharding(mesh, P("data", *rest)) for rest in ((None, None), (None,), (None, "model")))
    placed = dataclasses.replace(params, lora_a=a, lora_e=e, lora_b=b)
    with jax.set_mesh(mesh):
        found = pruned(*jax.device_put((params, grads), (placed, placed)))
    expected = pruned(params, grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)
    assert ranks({"kernel": found})["kernel"].sum() == 2
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, placed)))


def test_ranks_go_where_the_loss_wants_them():
    """One kernel must learn a matrix of rank 3, the other nothing."""
    rng = np.random.default_rng(0)
    need = normal(rng, 8, 3) @ normal(rng, 3, 8)
    base = {name: {"kernel": np.zeros((8, 8), np.float32)} for name in ("needed", "idle")}
    spec = LoraSpec(variant="adalora", rank=4, alpha=4, targets="kernel")
    both = jlora.apply(lambda p, x: (x @ p["needed"]["kernel"], x @ p["idle"]["kernel"]))

    def loss(params: Any) -> jax.Array:
        found, idle = both(params, np.eye(8, dtype=np.float32))
        return jnp.mean((found - need) ** 2) + jnp.mean(idle**2) + 0.01 * orthogonality(params)

    steps = {"total_steps": 400, "warmup_steps": 100, "final_steps": 150, "target_rank": 2}

    @jax.jit
    def training(base: Any) -> Any:
        params = jlora.wrap(base, spec)
        after = at(
            trained(jlora.optimizer(adalora(optax.adam(0.05), **steps), params), params, jlora.grad(loss), 400), -1
        )
        return after, loss(params), loss(after)

    after, loss_before, loss_after = training(base)
    found = ranks(after)
    assert found["needed/kernel"] >= 3 and found["needed/kernel"] + found["idle/kernel"] == 4
    assert loss_after < 0.05 * loss_before


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warmup_steps": 22}, r"warmup_steps=22 and final_steps=8 leave none of total_steps=30"),
        ({"final_steps": 40}, r"leave none of total_steps=30"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, found 0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0"),
        ({"final_steps": 1.5}, "final_steps must be an integer of at least 0, found 1.5"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"target_rank": 0}, "target_rank must be an integer of at least 1"),
        ({"beta1": 1}, "beta1 must be from 0"),
        ({"beta2": -0.1}, "beta2 must be from 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        adalora(optax.sgd(0.1), **(STEPS | settings))


def test_a_target_above_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"target_rank=3 is more than the kernels have: 17 triplets in 6 kernels"):
        adalora(optax.sgd(0.1), **(STEPS | {"target_rank": 3})).init(kernels())
    jax.eval_shape(adalora(optax.sgd(0.1), **(STEPS | {"target_rank": 3})).init, wrapped())


@pytest.mark.parametrize("tell", [adalora(optax.sgd(0.1), **STEPS).init, ranks], ids=["adalora", "ranks"])
def test_a_tree_without_such_kernels_is_refused(tell):
    with pytest.raises(ValueError, match="no leaf of this tree is an AdaLoRA kernel"):
        tell(jax.eval_shape(lambda: jlora.wrap(PARAMS, dataclasses.replace(SPEC, variant="lora"))))


def test_an_update_without_parameters_is_refused():
    tx = adalora(optax.sgd(0.1), **STEPS)
    with pytest.raises(ValueError, match="it needs the parameters"):
        tx.update(kernels(), jax.eval_shape(tx.init, kernels()))
