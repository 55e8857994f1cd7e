"""Training loops as JAX and Flax code has them: each learns, holds the base to the bit, goes on where it stopped."""

import functools

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jlora
from tests.support import same_bits

STEPS, KEY = 12, jax.random.key(7)
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # the default reads far ahead, on many threads
SPEC = jlora.LoraSpec(rank=2, dropout=0.1)
ADAMW = optax.adamw(2e-2, weight_decay=0.1)


def dataset():
    """An endless row of batches: inputs, and what a model of other weights makes of them."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(48, 6)).astype(np.float32)
    targets = np.tanh(rows @ rng.normal(size=(6, 3)).astype(np.float32))
    source = [{"x": x, "y": y} for x, y in zip(rows, targets, strict=True)]
    return grain.MapDataset.source(source).seed(0).shuffle().repeat().batch(16).to_iter_dataset(READ)


def squared_error(predicted, y):
    return jnp.mean((predicted - y) ** 2)


LINEN = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(3)])


wrapped = jax.jit(lambda base: jlora.wrap(base, SPEC))


@functools.cache
def linen():
    """Parameters, the same with adapters, and the transformation that trains these."""
    base = jax.jit(LINEN.init)(jax.random.key(0), np.ones((1, 6), np.float32))["params"]
    tree = wrapped(base)
    return base, tree, jlora.optimizer(ADAMW, tree)


def optax_step(params, state, batch):
    forward = jlora.apply(LINEN.apply, rng=jax.random.fold_in(KEY, state["step"]))
    loss = lambda params: squared_error(forward({"params": params}, batch["x"]), batch["y"])
    value, grads = jlora.value_and_grad(loss)(params)
    updates, after = linen()[2].update(grads, state["tx"], params)
    return optax.apply_updates(params, updates), {"tx": after, "step": state["step"] + 1}, value


def optax_step_on_the_half(params, state, batch):
    trainable, frozen = jlora.partition(params)
    forward = jlora.apply(LINEN.apply, rng=jax.random.fold_in(KEY, state["step"]))
    whole = lambda half: {"params": jlora.combine(half, frozen)}
    loss = lambda half: squared_error(forward(whole(half), batch["x"]), batch["y"])
    value, grads = jax.value_and_grad(loss)(trainable)
    updates, after = ADAMW.update(grads, state["tx"], trainable)
    trainable = optax.apply_updates(trainable, updates)
    return jlora.combine(trainable, frozen), {"tx": after, "step": state["step"] + 1}, value


class Optax:
    """A function, its parameters, an optax transformation."""

    compiled = staticmethod(jax.jit(optax_step))

    def __init__(self):
        self.base, self.tree, _ = linen()
        self.state = {"tx": self.first_state(), "step": jnp.int32(0)}

    def first_state(self):
        return jax.jit(linen()[2].init)(self.tree)

    def step(self, batch):
        self.tree, self.state, value = self.compiled(self.tree, self.state, batch)
        return value

    def save(self, checkpoints, step, extra):
        checkpoints.save(step, self.tree, state=self.state, extra=extra)

    def load(self, checkpoints):
        _, self.tree, self.state, extra = checkpoints.load(self.base, state=self.state)
        return extra


class OptaxOnTheTrainableHalf(Optax):
    """The optimizer knows nothing of the base, so any transformation will do."""

    compiled = staticmethod(jax.jit(optax_step_on_the_half))

    def first_state(self):
        return jax.jit(ADAMW.init)(jlora.partition(self.tree)[0])


@jax.jit
def train_step(state, batch):
    def loss(params):
        forward = jlora.apply(state.apply_fn, rng=jax.random.fold_in(KEY, state.step))
        return squared_error(forward({"params": params}, batch["x"]), batch["y"])

    value, grads = jlora.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


class LinenTrainState:
    """Flax's `TrainState`: its functions, unchanged."""

    def __init__(self):
        self.base, params, tx = linen()
        self.state = jax.jit(lambda params: TrainState.create(apply_fn=LINEN.apply, params=params, tx=tx))(params)

    @property
    def tree(self):
        return self.state.params

    def step(self, batch):
        self.state, value = train_step(self.state, batch)
        return value

    def save(self, checkpoints, step, extra):
        checkpoints.save(step, self.state.params, state=self.state.opt_state, extra=extra)

    def load(self, checkpoints):
        step, params, opt_state, extra = checkpoints.load(self.base, state=self.state.opt_state)
        self.state = self.state.replace(step=step, params=params, opt_state=opt_state)
        return extra


class Mlp(nnx.Module):
    """Parameters, the statistics of a batch norm, and the keys of a dropout."""

    def __init__(self, rngs):
        self.up = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)
        self.down = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.tanh(self.norm(self.up(x)))))


GRAPHDEF = nnx.split(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))), nnx.Param, ...)[0]


@functools.cache
def mlp():
    """Parameters, the same with adapters, and what the model holds beside."""
    base, rest = jax.jit(lambda: nnx.split(Mlp(nnx.Rngs(0)), nnx.Param, ...)[1:])()
    return base, wrapped(base), rest


@functools.cache
def nnx_tx():
    return jlora.optimizer(ADAMW, mlp()[1])


def forward(params, rest, x):
    """What the model makes of its input, and what it holds beside its parameters afterwards."""
    model = nnx.merge(GRAPHDEF, params, rest, copy=True)
    return model(x), nnx.state(model, nnx.Not(nnx.Param))


def copied(rest):
    """The same state in variables of its own, which a run may change."""
    return jax.tree.map(lambda x: x, rest)


def saved_keys(rest):
    """The state of an NNX model with the numbers of its random keys in place of these, and the way back."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    pure = nnx.as_pure(rest)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, pure)


def with_keys(rest, numbers):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    back = lambda x, data: jax.random.wrap_key_data(data) if is_key(x) else data
    nnx.update(rest, jax.tree.map(back, nnx.as_pure(rest), numbers))
    return rest


@jax.jit
def functional_step(params, rest, state, batch):
    def loss(params):
        predicted, after = jlora.apply(forward)(params, rest, batch["x"])
        return squared_error(predicted, batch["y"]), after

    (value, rest), grads = jlora.value_and_grad(loss, has_aux=True)(params)
    updates, state = nnx_tx().update(grads, state, params)
    return optax.apply_updates(params, updates), rest, state, value


class NnxFunctional:
    """`nnx.split` and optax under `jax.jit`."""

    def __init__(self):
        self.base, self.tree, rest = mlp()
        self.rest = copied(rest)
        self.state = jax.jit(nnx_tx().init)(self.tree)

    def step(self, batch):
        self.tree, self.rest, self.state, value = functional_step(self.tree, self.rest, self.state, batch)
        return value

    def save(self, checkpoints, step, extra):
        checkpoints.save(step, self.tree, state=(self.state, saved_keys(self.rest)), extra=extra)

    def load(self, checkpoints):
        like = (self.state, saved_keys(self.rest))
        _, self.tree, (self.state, numbers), extra = checkpoints.load(self.base, state=like)
        self.rest = with_keys(self.rest, numbers)
        return extra


@nnx.jit
def nnx_step(adapter, optimizer, frozen, rest, batch):
    def loss(adapter):
        params = jlora.combine(nnx.as_pure(adapter), frozen)
        predicted, after = jlora.apply(forward)(params, rest, batch["x"])
        return squared_error(predicted, batch["y"]), after

    (value, after), grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(adapter)
    optimizer.update(adapter, grads)
    nnx.update(rest, after)
    return value


class NnxOptimizer:
    """`nnx.Optimizer` on the trainable half, whose arrays are variables of NNX."""

    def __init__(self):
        params, _, rest = mlp()
        self.base, self.rest = nnx.as_pure(params), copied(rest)
        trainable, self.frozen = jlora.partition(wrapped(self.base))
        self.adapter = jax.tree.map(nnx.LoRAParam, trainable)
        self.optimizer = nnx.Optimizer(self.adapter, ADAMW, wrt=nnx.LoRAParam)

    @property
    def tree(self):
        return jlora.combine(nnx.as_pure(self.adapter), self.frozen)

    def step(self, batch):
        return nnx_step(self.adapter, self.optimizer, self.frozen, self.rest, batch)

    @property
    def state(self):
        return nnx.as_pure(nnx.state(self.optimizer)), saved_keys(self.rest)

    def save(self, checkpoints, step, extra):
        checkpoints.save(step, self.tree, state=self.state, extra=extra)

    def load(self, checkpoints):
        _, tree, (optimizer, numbers), extra = checkpoints.load(self.base, state=self.state)
        trainable, self.frozen = jlora.partition(tree)
        self.adapter = jax.tree.map(nnx.LoRAParam, trainable)
        nnx.update(self.optimizer, optimizer)
        self.rest = with_keys(self.rest, numbers)
        return extra


LOOPS = [Optax, OptaxOnTheTrainableHalf, LinenTrainState, NnxFunctional, NnxOptimizer]


def train(loop, batches, steps):
    return [float(loop.step(next(batches))) for _ in range(steps)]


@pytest.fixture(scope="module", params=LOOPS, ids=[loop.__name__ for loop in LOOPS])
def whole(request):
    """A loop that nothing has stopped: its class, its tree before and after, and its losses."""
    loop = request.param()
    start = loop.tree
    losses = train(loop, iter(dataset()), STEPS)
    return request.param, start, loop.tree, losses


def test_the_loss_falls_and_the_base_stays(whole):
    _, start, end, losses = whole
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert same_bits(jlora.unwrap(end), jlora.unwrap(start))
    trained = [jax.tree.leaves(jlora.partition(tree)[0]) for tree in (start, end)]
    moved = [not same_bits(x, y) for x, y in zip(*trained, strict=True)]
    assert len(moved) == 4 and all(moved)


def test_a_run_that_was_stopped_goes_on_to_the_bit(whole, tmp_path):
    make, _, end, losses = whole
    first, batches = make(), iter(dataset())
    before = train(first, batches, STEPS // 2)
    with jlora.checkpoint.Checkpoints(tmp_path) as checkpoints:
        first.save(checkpoints, STEPS // 2, batches.get_state())

    second, batches = make(), iter(dataset())
    batches.set_state(second.load(jlora.checkpoint.Checkpoints(tmp_path)))
    assert before + train(second, batches, STEPS // 2) == losses
    assert same_bits(second.tree, end)
