"""EVA and LoRA-GA against numpy, on plain, stacked and branched kernels."""

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
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
# Inputs with a spectrum that falls, as those of a network do.
BATCHES = [jnp.asarray(noise(40, 8, seed=i) * 0.6 ** np.arange(8)) for i in range(3)]


def model(params, x):
    x = jnp.tanh(x @ params["up"])
    x = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


def inputs_of(batch):
    """The inputs of each kernel, written out."""
    hidden = [np.tanh(np.asarray(batch) @ PARAMS["up"])]
    for w in PARAMS["layers"]:
        hidden.append(hidden[-1] + np.tanh(hidden[-1] @ w))
    return np.asarray(batch), np.stack(hidden[:-1]), hidden[-1]


def wrapped(**settings):
    spec = jlora.LoraSpec(targets=["up", "layers", "head"], rank=RANK, **settings)
    return jlora.wrap(PARAMS, spec, sites=jlora.sites(model, PARAMS, BATCHES[0]))


def projector(columns):
    return columns @ np.swapaxes(columns, -1, -2)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_eva_finds_the_directions_of_most_variance(variant):
    params = jax.jit(lambda params, batches: jlora.init.eva(model, params, batches))(wrapped(variant=variant), BATCHES)
    every = [np.concatenate(x, axis=-2) for x in zip(*map(inputs_of, BATCHES), strict=True)]
    for name, x in zip(("up", "layers", "head"), every, strict=True):
        _, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        leading = np.swapaxes(vt[..., :RANK, :], -1, -2)
        found = np.asarray(params[name].lora_a, np.float64)
        np.testing.assert_allclose(projector(found), projector(leading), atol=2e-3)
        np.testing.assert_allclose(np.abs(np.sum(found * leading, -2)), 1, atol=2e-3)  # one by one, in order
        assert not np.any(params[name].lora_b)
    assert error(jlora.apply(model)(params, BATCHES[0]), model(PARAMS, BATCHES[0])) <= 2e-6
    assert same_bits(jlora.unwrap(params), PARAMS)


def test_eva_leaves_embeddings_alone():
    fn = lambda params, tokens: params["table"][tokens] @ params["up"]
    tokens = jnp.asarray([1, 2, 3, 3, 7, 9, 11, 12])
    tree = {"table": PARAMS["table"], "up": PARAMS["up"]}
    spec = jlora.LoraSpec(targets=["table", "up"], rank=2)
    params = jlora.wrap(tree, spec, sites=jlora.sites(fn, tree, tokens))
    after = jlora.init.eva(fn, params, [tokens], passes=6)
    assert same_bits(after["table"], params["table"])
    _, _, vt = np.linalg.svd(np.asarray(PARAMS["table"])[np.asarray(tokens)])
    np.testing.assert_allclose(projector(np.asarray(after["up"].lora_a)), projector(vt[:2].T), atol=1e-2)


def test_eva_of_a_convolution_sees_its_patches():
    fn = lambda params, x: lax.conv_general_dilated(
        x, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    tree, x = {"conv": jnp.asarray(noise(3, 4, 6))}, noise(2, 9, 4) * 0.5 ** np.arange(4)
    params = jlora.wrap(tree, jlora.LoraSpec(targets="conv", rank=2), sites=jlora.sites(fn, tree, jnp.asarray(x)))
    found = jlora.init.eva(fn, params, [jnp.asarray(x)], passes=8)["conv"].lora_a.reshape(12, 2)
    patches = np.stack([x[:, i : i + 3].reshape(2, 12) for i in range(7)]).reshape(-1, 12)
    _, _, vt = np.linalg.svd(patches)
    np.testing.assert_allclose(projector(np.asarray(found)), projector(vt[:2].T), atol=1e-2)


def loss(params, batch):
    return jnp.square(model(params, batch) - 1).mean()


def test_lora_ga_takes_the_singular_vectors_of_the_gradient():
    params = jax.jit(lambda params, batches: jlora.init.lora_ga(loss, params, batches))(wrapped(), BATCHES)
    grads = [jax.grad(loss)(PARAMS, batch) for batch in BATCHES]
    for name in ("up", "layers", "head"):
        grad = sum(np.asarray(g[name], np.float64) for g in grads)
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        node = params[name]
        scale = grad.shape[-1] ** 0.25 / 16**0.5
        left, right = np.asarray(node.lora_a, np.float64) / scale, np.asarray(node.lora_b, np.float64) / scale
        np.testing.assert_allclose(projector(left), projector(u[..., :RANK]), atol=5e-3)
        rows, expected = np.swapaxes(right, -1, -2), np.swapaxes(vt[..., RANK : 2 * RANK, :], -1, -2)
        np.testing.assert_allclose(projector(rows), projector(expected), atol=2e-2)
    np.testing.assert_array_equal(jlora.apply(model)(params, BATCHES[0]), jlora.apply(model)(wrapped(), BATCHES[0]))
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
        init(loss, wrapped(), [])
    with pytest.raises(ValueError, match="nothing in it is wrapped"):
        init(loss, PARAMS, BATCHES)
    with pytest.raises(ValueError, match="it has VeraParam"):
        init(loss, wrapped(variant="vera"), BATCHES)
    with pytest.raises(TypeError, match=r"batches is an array of shape \(40, 8\).*\[batch\]"):
        init(loss, wrapped(), BATCHES[0])
    with pytest.raises(
        ValueError, match=r"lora_ga: .* head of .* maps 16 to 10, so it has 10, fewer than 2 x 6\. .*'rank': 5"
    ):
        tree = jlora.wrap(PARAMS, jlora.LoraSpec(targets="head", rank=6))
        jlora.init.lora_ga(loss, tree, BATCHES)
