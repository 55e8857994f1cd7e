"""Training loops as Flax code has them: each learns, holds the base to the bit, and goes on where it stopped."""

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
from tests.test_readme import blocks

STEPS, KEY = 12, jax.random.key(7)
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # the default reads far ahead, on many threads
SPEC = jlora.LoraSpec(rank=2, dropout=0.1)


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


class Optax:
    """A function, its parameters, an optax transformation."""

    def __init__(self):
        self.base = LINEN.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
        self.tree = jlora.wrap(self.base, SPEC)
        self.tx = jlora.optimizer(optax.adamw(2e-2, weight_decay=0.1), self.tree)
        self.state = {"tx": self.tx.init(self.tree), "step": jnp.zeros((), jnp.int32)}
        self.compiled = jax.jit(self.pure)

    def step(self, batch):
        self.tree, self.state, value = self.compiled(self.tree, self.state, batch)
        return value

    def pure(self, params, state, batch):
        forward = jlora.apply(LINEN.apply, rng=jax.random.fold_in(KEY, state["step"]))
        loss = lambda params: squared_error(forward({"params": params}, batch["x"]), batch["y"])
        value, grads = jlora.value_and_grad(loss)(params)
        updates, after = self.tx.update(grads, state["tx"], params)
        return optax.apply_updates(params, updates), {"tx": after, "step": state["step"] + 1}, value

    def save(self, checkpoints, step, extra):
        checkpoints.save(step, self.tree, state=self.state, extra=extra)

    def load(self, checkpoints):
        _, self.tree, self.state, extra = checkpoints.load(self.base, state=self.state)
        return extra


class OptaxOnTheTrainableHalf(Optax):
    """The optimizer knows nothing of the base, so any transformation will do."""

    def __init__(self):
        super().__init__()
        self.tx = optax.adamw(2e-2, weight_decay=0.1)
        self.state["tx"] = self.tx.init(jlora.partition(self.tree)[0])

    def pure(self, params, state, batch):
        trainable, frozen = jlora.partition(params)
        forward = jlora.apply(LINEN.apply, rng=jax.random.fold_in(KEY, state["step"]))
        whole = lambda half: {"params": jlora.combine(half, frozen)}
        loss = lambda half: squared_error(forward(whole(half), batch["x"]), batch["y"])
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, after = self.tx.update(grads, state["tx"], trainable)
        trainable = optax.apply_updates(trainable, updates)
        return jlora.combine(trainable, frozen), {"tx": after, "step": state["step"] + 1}, value


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
        self.base = LINEN.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
        params = jlora.wrap(self.base, SPEC)
        tx = jlora.optimizer(optax.adamw(2e-2, weight_decay=0.1), params)
        self.state = TrainState.create(apply_fn=LINEN.apply, params=params, tx=tx)

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


GRAPHDEF = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param, ...)[0]


def forward(params, rest, x):
    """What the model makes of its input, and what it holds beside its parameters afterwards."""
    model = nnx.merge(GRAPHDEF, params, rest, copy=True)
    return model(x), nnx.state(model, nnx.Not(nnx.Param))


def saved_keys(rest):
    """The state of an NNX model with the numbers of its random keys in place of these: no file has keys."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    pure = nnx.as_pure(rest)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, pure)


def with_keys(rest, numbers):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    back = lambda x, data: jax.random.wrap_key_data(data) if is_key(x) else data
    nnx.update(rest, jax.tree.map(back, nnx.as_pure(rest), numbers))
    return rest


class NnxFunctional:
    """`nnx.split` and optax under `jax.jit`."""

    def __init__(self):
        _, self.base, self.rest = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param, ...)
        self.tree = jlora.wrap(self.base, SPEC)
        self.tx = jlora.optimizer(optax.adamw(2e-2, weight_decay=0.1), self.tree)
        self.state = self.tx.init(self.tree)
        self.compiled = jax.jit(self.pure)

    def step(self, batch):
        self.tree, self.rest, self.state, value = self.compiled(self.tree, self.rest, self.state, batch)
        return value

    def pure(self, params, rest, state, batch):
        def loss(params):
            predicted, after = jlora.apply(forward)(params, rest, batch["x"])
            return squared_error(predicted, batch["y"]), after

        (value, rest), grads = jlora.value_and_grad(loss, has_aux=True)(params)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, value

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
        _, params, self.rest = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param, ...)
        self.base = nnx.as_pure(params)
        trainable, self.frozen = jlora.partition(jlora.wrap(self.base, SPEC))
        self.adapter = jax.tree.map(nnx.LoRAParam, trainable)
        self.optimizer = nnx.Optimizer(self.adapter, optax.adamw(2e-2, weight_decay=0.1), wrt=nnx.LoRAParam)

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
every_loop = pytest.mark.parametrize("make", LOOPS, ids=[loop.__name__ for loop in LOOPS])


def train(loop, batches, steps):
    return [float(loop.step(next(batches))) for _ in range(steps)]


@every_loop
def test_the_loss_falls_and_the_base_stays(make):
    loop = make()
    before, start = jlora.unwrap(loop.tree), loop.tree
    losses = train(loop, iter(dataset()), STEPS)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert same_bits(jlora.unwrap(loop.tree), before)
    factors = [jax.tree.leaves(jlora.partition(tree)[0]) for tree in (start, loop.tree)]
    moved = [not same_bits(x, y) for x, y in zip(*factors, strict=True)]
    assert len(moved) == 4 and all(moved)


@every_loop
def test_a_run_that_was_stopped_goes_on_to_the_bit(make, tmp_path):
    whole = make()
    losses = train(whole, iter(dataset()), STEPS)

    first, batches = make(), iter(dataset())
    before = train(first, batches, STEPS // 2)
    with jlora.checkpoint.Checkpoints(tmp_path) as checkpoints:
        first.save(checkpoints, STEPS // 2, batches.get_state())

    second, batches = make(), iter(dataset())
    batches.set_state(second.load(jlora.checkpoint.Checkpoints(tmp_path)))
    assert before + train(second, batches, STEPS // 2) == losses
    assert same_bits(second.tree, whole.tree)


def test_an_optimizer_of_nnx_on_variables_around_nodes_is_no_way():
    """`nnx.Optimizer` takes the values of its variables for arrays: it would lose the nodes inside of them."""
    _, params, rest = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param, ...)
    model = nnx.merge(GRAPHDEF, jlora.wrap(params, SPEC), rest)
    optimizer = nnx.Optimizer(model, jlora.optimizer(optax.adam(1e-2), nnx.state(model, nnx.Param)), wrt=nnx.Param)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    with pytest.raises(ValueError, match="optimizer: the state does not fit the parameters"):
        optimizer.update(model, grads)


# -------------------------------------------------------------------------------- metrics


def scalars(folder):
    """The scalars of TensorBoard's files: records of a length, its checksum, an event and its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (file,) = folder.glob("events.*")
    data, found = file.read_bytes(), []
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        event, data = event_pb2.Event.FromString(data[12:end]), data[end + 4 :]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_the_readme_writes_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    (block,) = blocks("py")
    exec(block, {"folder": tmp_path, "loss": jnp.float32(0.5), "step": 3})
    assert scalars(tmp_path / "tensorboard") == [(3, "train/loss", 0.5)]
