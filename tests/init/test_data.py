"""EVA and LoRA-GA against numpy, on plain, stacked and branched kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.support import error, same_bits

RANK = 3


def noise(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


PARAMS = {"up": noise(8, 16), "layers": 0.3 * noise(3, 16, 16), "table": noise(20, 8), "head": noise(16, 10)}
PARAMS = jax.device_put(PARAMS)
# Inputs with a spectrum that falls, as those of a network do.
BATCHES = [jax.device_put(noise(40, 8, seed=i) * np.float32(0.6) ** np.arange(8, dtype=np.float32)) for i in range(3)]


def model(params, x):
    x = jnp.tanh(x @ params["up"])
    x = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


def inputs_of(batch):
    """The inputs of each kernel, written out."""
    hidden = [np.tanh(np.asarray(batch) @ np.asarray(PARAMS["up"]))]
    for w in np.asarray(PARAMS["layers"]):
        hidden.append(hidden[-1] + np.tanh(hidden[-1] @ w))
    return np.asarray(batch), np.stack(hidden[:-1]), hidden[-1]


def plan(params=PARAMS, **settings):
    spec = jlora.LoraSpec(targets=["up", "layers", "head"], rank=RANK, **settings)
    return jlora.wrap(params, spec, sites=jlora.sites(model, PARAMS, BATCHES[0]))


@functools.cache
def wrapped(**settings):
    return jax.jit(lambda params: plan(params, **settings))(PARAMS)


def shapes(**settings):
    return jax.eval_shape(lambda params: plan(params, **settings), PARAMS)


def projector(columns):
    return columns @ np.swapaxes(columns, -1, -2)


@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_eva_finds_the_directions_of_most_variance(variant):

    @jax.jit
    def started(params, batches):
        params = jlora.init.eva(model, params, batches)
        return params, jlora.apply(model)(params, batches[0]), model(PARAMS, batches[0])

    params, found, expected = started(wrapped(variant=variant), BATCHES)
    assert error(found, expected) <= 2e-6
    every = [np.concatenate(x, axis=-2) for x in zip(*map(inputs_of, BATCHES), strict=True)]
    for name, x in zip(("up", "layers", "head"), every, strict=True):
        _, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        leading = np.swapaxes(vt[..., :RANK, :], -1, -2)
        columns = np.asarray(params[name].lora_a, np.float64)
        np.testing.assert_allclose(projector(columns), projector(leading), atol=2e-3)
        np.testing.assert_allclose(np.abs(np.sum(columns * leading, -2)), 1, atol=2e-3)  # one by one, in order
        assert not np.any(params[name].lora_b)
    assert same_bits(jlora.unwrap(params), PARAMS)


def test_eva_leaves_embeddings_alone():
    """Beside a kernel of DoRA."""
    fn = lambda params, tokens: params["table"][tokens] @ params["up"]
    tokens = np.array([1, 2, 3, 3, 7, 9, 11, 12], np.int32)
    spec = jlora.LoraSpec(targets=["table", "up"], rank=2, variant="dora")

    @jax.jit
    def both(tree):
        params = jlora.wrap(tree, spec, sites=jlora.sites(fn, tree, tokens))
        return params, jlora.init.eva(fn, params, [tokens], passes=6)

    params, after = both({"table": PARAMS["table"], "up": PARAMS["up"]})
    assert same_bits(after["table"], params["table"])
    _, _, vt = np.linalg.svd(np.asarray(PARAMS["table"])[tokens])
    np.testing.assert_allclose(projector(np.asarray(after["up"].lora_a)), projector(vt[:2].T), atol=1e-2)


def test_eva_of_a_convolution_sees_its_patches():
    fn = lambda params, x: lax.conv_general_dilated(
        x, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = noise(2, 9, 4) * np.float32(0.5) ** np.arange(4, dtype=np.float32)

    @jax.jit
    def start(tree):
        params = jlora.wrap(tree, jlora.LoraSpec(targets="conv", rank=2), sites=jlora.sites(fn, tree, x))
        return jlora.init.eva(fn, params, [x], passes=8)["conv"].lora_a

    found = np.asarray(start({"conv": noise(3, 4, 6)})).reshape(12, 2)
    patches = np.stack([x[:, i : i + 3].reshape(2, 12) for i in range(7)]).reshape(-1, 12)
    _, _, vt = np.linalg.svd(patches)
    np.testing.assert_allclose(projector(found), projector(vt[:2].T), atol=1e-2)


def loss(params, batch):
    return jnp.square(model(params, batch) - 1).mean()


def test_lora_ga_takes_the_singular_vectors_of_the_gradient():

    @jax.jit
    def started(before, plain, batches):
        params = jlora.init.lora_ga(loss, before, batches)
        outputs = [jlora.apply(model)(tree, batches[0]) for tree in (params, before)]
        return params, outputs, [jax.grad(loss)(plain, batch) for batch in batches]

    params, (after, before), grads = started(wrapped(), PARAMS, BATCHES)
    np.testing.assert_array_equal(after, before)
    for name in ("up", "layers", "head"):
        grad = sum(np.asarray(g[name], np.float64) for g in grads)
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        node = params[name]
        scale = grad.shape[-1] ** 0.25 / 16**0.5
        left, right = np.asarray(node.lora_a, np.float64) / scale, np.asarray(node.lora_b, np.float64) / scale
        np.testing.assert_allclose(projector(left), projector(u[..., :RANK]), atol=5e-3)
        rows, expected = np.swapaxes(right, -1, -2), np.swapaxes(vt[..., RANK : 2 * RANK, :], -1, -2)
        np.testing.assert_allclose(projector(rows), projector(expected), atol=2e-2)
    assert same_bits(jlora.unwrap(params), PARAMS)


@pytest.mark.slow
def test_lora_ga_steps_nearer_to_full_training():
    """The update of W in one small step of gradient descent: its angle to the gradient, against a random start."""
    grads = sum(np.asarray(jax.grad(loss)(PARAMS, batch)["head"]) for batch in BATCHES)

    def cosine(params):
        total = lambda params: sum(jlora.apply(loss)(params, batch) for batch in BATCHES)
        node, grad = params["head"], jlora.grad(total)(params)["head"]
        step = node.lora_a @ grad.lora_b + grad.lora_a @ node.lora_b
        return float(np.sum(np.asarray(step) * grads) / np.linalg.norm(step) / np.linalg.norm(grads))

    assert cosine(jlora.init.lora_ga(loss, wrapped(), BATCHES)) > 0.9 > 0.7 > cosine(wrapped())


@pytest.mark.slow
@pytest.mark.parametrize("init", [jlora.init.eva, jlora.init.lora_ga])
def test_placed_as_the_base(init):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "model")))
    spec = jlora.LoraSpec(targets=["up", "layers", "head"], rank=RANK)
    placed = jlora.wrap(jax.tree.map(put, PARAMS), spec, sites=jlora.sites(model, PARAMS, BATCHES[0]))
    fn = model if init is jlora.init.eva else loss
    found, expected = init(fn, placed, BATCHES), init(fn, wrapped(), BATCHES)
    product = lambda node: node.lora_a @ jnp.swapaxes(node.lora_a, -1, -2)
    for name in ("up", "layers", "head"):
        assert error(product(found[name]), product(expected[name])) <= 1e-3


@pytest.mark.parametrize("init", [jlora.init.eva, jlora.init.lora_ga])
def test_what_can_not_be_is_said(init):
    with pytest.raises(ValueError, match="batches is empty"):
        init(loss, shapes(), [])
    with pytest.raises(ValueError, match="nothing in it is wrapped"):
        init(loss, PARAMS, BATCHES)
    with pytest.raises(ValueError, match="it has VeraParam"):
        init(loss, shapes(variant="vera"), BATCHES)
    with pytest.raises(TypeError, match=r"batches is an array of shape \(40, 8\).*\[batch\]"):
        init(loss, shapes(), BATCHES[0])
    with pytest.raises(
        ValueError, match=r"lora_ga: .* head of .* maps 16 to 10, so it has 10, fewer than 2 x 6\. .*'rank': 5"
    ):
        tree = jax.eval_shape(lambda params: jlora.wrap(params, jlora.LoraSpec(targets="head", rank=6)), PARAMS)
        jlora.init.lora_ga(loss, tree, BATCHES)
