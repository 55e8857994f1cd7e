"""Models beside the same models with LoRA written into them by hand: what a step ought to cost.

The hand-written loss takes the factors as a tree of their own, `{..., kernel's module: {"lora_a": A, "lora_b": B}}`,
so that gradients are taken of the factors alone; every frozen leaf passes `stop_gradient`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

RANK, SCALE = 8, 2.0
LAYERS, WIDTH, HEADS, HIDDEN, SEQUENCE, BATCH, VOCABULARY = 2, 128, 4, 512, 64, 4, 256
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A loss and its twin with LoRA by hand.

    Attributes:
        name: unique name.
        plain_loss: `plain_loss(params, batch)`, a scalar.
        hand_loss: `hand_loss(params, lora, batch)`, equal to `plain_loss(merged(params, lora), batch)`.
        params: the tree of kernels and other leaves.
        make_lora: `make_lora(params, random_b=False)`, factors (batch..., in, rank) and (batch..., rank, out).
        axes: path of each adapted kernel -> (in_axis, out_axis, batch_axis).
        batch: inputs and targets.
    """

    name: str
    plain_loss: Callable
    hand_loss: Callable
    params: Any
    make_lora: Callable
    axes: dict[str, tuple]
    batch: Any

    @property
    def targets(self) -> list[str]:
        return list(self.axes)


def merged(params, lora):
    """The plain tree, W + SCALE * A @ B where there are factors."""
    leaves, factors = flatten_dict(params), flatten_dict(lora)
    modules = {path[:-1] for path in factors}
    deltas = {(*m, "kernel"): SCALE * factors[*m, "lora_a"] @ factors[*m, "lora_b"] for m in modules}
    return unflatten_dict(leaves | {path: leaves[path] + delta for path, delta in deltas.items()})


# -------------------------------------------------------------------------------- the models


class LoraDense(nn.Dense):
    """nn.Dense with the two factors of its kernel in the collection "lora": x @ W + (s (x @ A)) @ B, then the bias."""

    @nn.compact
    def __call__(self, x):
        a, b = self.get_variable("lora", "lora_a"), self.get_variable("lora", "lora_b")
        y = x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features)) + (SCALE * (x @ a)) @ b
        return y + self.param("bias", self.bias_init, (self.features,)) if self.use_bias else y


class Mlp(nn.Module):
    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(self.dense(HIDDEN, name="up")(x))
        x = nn.gelu(self.dense(HIDDEN, name="middle")(x))
        return self.dense(WIDTH, name="down")(x)


class Block(nn.Module):
    """Pre-norm causal attention and SwiGLU; the second argument and output are for nn.scan."""

    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        x = x + self.attention(nn.RMSNorm(name="norm1")(x))
        return x + self.swiglu(nn.RMSNorm(name="norm2")(x)), None

    def attention(self, x):
        q, k, v = (self.linear(WIDTH, name)(x).reshape(*x.shape[:-1], HEADS, -1) for name in "qkv")
        mask = nn.make_causal_mask(x[..., 0])
        return self.linear(WIDTH, "o")(nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))

    def swiglu(self, x):
        gate, up = self.linear(HIDDEN, "gate")(x), self.linear(HIDDEN, "up")(x)
        return self.linear(WIDTH, "down")(nn.silu(gate) * up)

    def linear(self, features, name):
        return self.dense(features, use_bias=False, name=name)


class Unrolled(nn.Module):
    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        for i in range(LAYERS):
            x, _ = Block(self.dense, name=f"layer{i}")(x)
        return embed.attend(nn.RMSNorm(name="norm")(x))


class Scanned(nn.Module):
    dense: type[nn.Module] = nn.Dense
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(block, {"params": 0, "lora": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers(self.dense, name="layers")(embed(tokens))
        return embed.attend(nn.RMSNorm(name="norm")(x))


# -------------------------------------------------------------------------------- the pairs


def pair_of(name: str, model: Callable[..., nn.Module], loss: Callable, axes: dict[str, tuple], batch) -> Pair:
    """`loss(predict, batch)` of the model as it is and of the model of LoraDense."""
    plain, hand = model(), model(dense=LoraDense)

    def plain_loss(params, batch):
        return loss(lambda x: plain.apply({"params": params}, x), batch)

    def hand_loss(params, lora, batch):
        frozen = jax.lax.stop_gradient(params)
        return loss(lambda x: hand.apply({"params": frozen, "lora": lora}, x), batch)

    def make_lora(params, random_b: bool = False):
        leaves = flatten_dict(params, sep="/")
        return unflatten_dict({k: v for path in axes for k, v in factors_of(path, leaves[path], random_b)}, sep="/")

    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), batch["x"]))["params"]
    return Pair(name, plain_loss, hand_loss, initialised(shapes), make_lora, axes, batch)


def factors_of(path: str, kernel: jax.Array, random_b: bool):
    """The two factors of a kernel (batch..., in, out), by path; B is zero unless it is to be random."""
    *stacked, inputs, outputs = kernel.shape
    rng = np.random.default_rng(list(path.encode()))
    module = path.removesuffix("kernel")
    yield module + "lora_a", normal(rng, (*stacked, inputs, RANK), inputs**-0.5)
    yield module + "lora_b", normal(rng, (*stacked, RANK, outputs), 0.1 * random_b)


def initialised(shapes):
    """Kernels of variance 1 / in, and ones."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return normal(rng, leaf.shape, leaf.shape[-2] ** -0.5) if leaf.ndim > 1 else jnp.ones(leaf.shape)

    return jax.tree.map(fill, shapes)


def normal(rng: np.random.Generator, shape, scale: float) -> jax.Array:
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def squared_error(predict, batch):
    return jnp.mean((predict(batch["x"]) - batch["y"]) ** 2)


def cross_entropy(predict, batch):
    return optax.softmax_cross_entropy_with_integer_labels(predict(batch["x"]), batch["y"]).mean()


def vectors() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {"x": normal(rng, (256, WIDTH), 1.0), "y": normal(rng, (256, WIDTH), 1.0)}


def text() -> dict[str, jax.Array]:
    tokens = jnp.asarray(np.random.default_rng(2).integers(VOCABULARY, size=(BATCH, SEQUENCE + 1)), jnp.int32)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


MATRIX, STACK = ((0,), (1,), ()), ((1,), (2,), (0,))
MLP_AXES = {f"{name}/kernel": MATRIX for name in ("up", "middle", "down")}
UNROLLED_AXES = {f"layer{i}/{name}/kernel": MATRIX for i in range(LAYERS) for name in PROJECTIONS}
SCANNED_AXES = {f"layers/{name}/kernel": STACK for name in PROJECTIONS}


def remat(**kwargs) -> nn.Module:
    return Scanned(remat=True, **kwargs)


PAIRS = [
    pair_of("mlp", Mlp, squared_error, MLP_AXES, vectors()),
    pair_of("unrolled", Unrolled, cross_entropy, UNROLLED_AXES, text()),
    pair_of("scan", Scanned, cross_entropy, SCANNED_AXES, text()),
    pair_of("scan_remat", remat, cross_entropy, SCANNED_AXES, text()),
]
