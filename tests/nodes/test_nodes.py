"""Nodes: what they tell, and what they say when a function takes them for arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jlora import Axes, LoraSpec, wrap


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


X = normal(2, 4)
NODE = wrap({"kernel": normal(4, 4)}, LoraSpec(rank=2))["kernel"]
USES = {
    "x @ w": lambda: X @ NODE,
    "w @ x": lambda: NODE @ X.T,
    "numpy @ w": lambda: np.ones((2, 4)) @ NODE,
    "jnp.dot": lambda: jnp.dot(X, NODE),
    "jnp.einsum": lambda: jnp.einsum("ti,io", X, NODE),
    "jnp.take": lambda: jnp.take(NODE, jnp.array([1]), axis=0),
    "jnp.asarray": lambda: jnp.asarray(NODE),
    "jnp.sin": lambda: jnp.sin(NODE),
    "np.asarray": lambda: np.asarray(NODE),
    "w[0]": lambda: NODE[0],
    "for row in w": lambda: list(NODE),
    "w + 1": lambda: NODE + 1,
    "1 + w": lambda: 1 + NODE,
    "x * w": lambda: X[0] * NODE,
    "w / 2": lambda: NODE / 2,
    "-w": lambda: -NODE,
    "w ** 2": lambda: NODE**2,
    "under jit": lambda: jax.jit(lambda w: X @ w)(NODE),
}
says_how = pytest.raises(TypeError, match=r"LoraParam of shape .* used as an array.*jlora\.apply.*jlora\.merge")


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_node_used_as_an_array_says_how(use):
    with says_how:
        use()


MISSED = {
    "w.T": lambda: NODE.T,
    "w.astype": lambda: NODE.astype(jnp.bfloat16),
    "w.reshape": lambda: NODE.reshape(-1),
    "len(w)": lambda: len(NODE),
    "2 ** w": lambda: 2**NODE,
    "abs(w)": lambda: abs(NODE),
    "w // 2": lambda: NODE // 2,
    "w < 1": lambda: NODE < 1,
    "w == 1": lambda: NODE == 1,
    "bool(w)": lambda: bool(NODE),
    "float(w)": lambda: float(NODE),
}


@pytest.mark.parametrize("use", MISSED.values(), ids=MISSED)
def test_a_node_used_as_an_array_in_other_ways_says_how(use):
    with pytest.raises((TypeError, AttributeError), match=r"jlora\.apply.*jlora\.merge"):
        use()


def test_a_node_may_be_asked_what_it_has():
    assert hasattr(NODE, "base") and not hasattr(NODE, "astype")
    assert getattr(NODE, "size", None) is None


def test_a_node_tells_its_shape_and_dtype():
    assert (NODE.shape, NODE.ndim, NODE.dtype, NODE.rank) == ((4, 4), 2, jnp.float32, 2)


LINEN = {
    "dense": (nn.Dense(3), X, "params/kernel", Axes(0, 1)),
    "dense_general": (nn.DenseGeneral((2, 3)), X, "params/kernel", Axes(0, (1, 2))),
    "embed": (nn.Embed(7, 4), jnp.array([1, 2]), "params/embedding", Axes(0, 1)),
    "conv": (nn.Conv(5, (3,)), normal(2, 6, 4), "params/kernel", Axes((0, 1), 2)),
    "attention": (nn.MultiHeadDotProductAttention(2), normal(2, 5, 4), "params/query/kernel", Axes(0, (1, 2))),
}


@pytest.mark.parametrize("module, x, path, axes", LINEN.values(), ids=LINEN)
def test_a_linen_model_without_apply_says_how(module, x, path, axes):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    with says_how:
        module.apply(wrap(params, LoraSpec(rank=2, targets=path, axes={path: axes})), x)


NNX = {
    "linear": (lambda rngs: nnx.Linear(4, 3, rngs=rngs), X, "kernel"),
    "embed": (lambda rngs: nnx.Embed(7, 4, rngs=rngs), jnp.array([1, 2]), "embedding"),
    "attention": (lambda rngs: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs), normal(2, 5, 4), "query"),
}


@pytest.mark.parametrize("build, x, target", NNX.values(), ids=NNX)
def test_an_nnx_model_without_apply_says_how(build, x, target):
    graph, state = nnx.split(build(nnx.Rngs(0)))
    with says_how:
        nnx.merge(graph, wrap(state, LoraSpec(rank=2, targets=target)))(x)


def test_an_nnx_norm_trained_in_full_without_apply_says_how():
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, wrap(state, LoraSpec(rank=2, targets=lambda path, leaf: False, train="layers/1")))
    with pytest.raises(TypeError, match=r"jlora\.apply"):
        model(X)
