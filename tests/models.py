"""Small models of Flax (linen and NNX), Equinox and Haiku, as programs with the truth about their kernels.

A builder returns `(fn, shapes, args)`: an ordinary function of a parameter tree, the abstract parameter tree, and
the other inputs. Weights are filled from the name of the model. Every kernel to adapt is given by its path
and one letter an axis: `i`n, `o`ut or `b`atch.
"""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.programs import Program, ints, noise

BATCH, SEQUENCE, WIDTH, HEADS, HEAD, HIDDEN, VOCABULARY, LAYERS = 2, 5, 12, 3, 4, 20, 17, 6

MODELS: list[Program] = []


def model(roles: dict[str, str], *, kind: dict[str, str] | None = None, **facts):
    """Registers what the decorated builder returns as a program."""

    def register(build):
        fn, shapes, args = build()
        axes = {path: tuple(_where(text, role) for role in "iob") for path, text in roles.items()}
        kinds = dict.fromkeys(roles, "dot") | (kind or {})
        MODELS.append(Program(build.__name__, fn, filled(shapes, build.__name__), args, axes, kinds, **facts))
        return build

    return register


def _where(text: str, role: str) -> tuple[int, ...]:
    return tuple(i for i, letter in enumerate(text) if letter == role)


def filled(shapes: Any, name: str) -> Any:
    """Gives every leaf numbers from the name: small noise to kernels, values near one to vectors (scales, biases)."""
    rng = np.random.default_rng(list(name.encode()))
    number = lambda leaf: 0.2 * rng.standard_normal(leaf.shape) + float(leaf.ndim == 1)
    return jax.tree.map(lambda leaf: jnp.asarray(number(leaf).astype(np.float32)), shapes)


def inputs(*shape: int) -> jax.Array:
    return noise(np.random.default_rng(shape), shape)


TOKENS = ints([3, 0, 16, 3, 9], [1, 2, 2, 14, 5])


def under(prefix: str, roles: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}/{path}": text for path, text in roles.items()}


# -------------------------------------------------------------------------------- linen


def linen(module: nn.Module, *args, **kwargs):
    """(fn, shapes, args) of a module whose only variables are parameters."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    return (lambda params, *args: module.apply({"params": params}, *args, **kwargs)), shapes, args


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, name="down")(nn.relu(nn.Dense(HIDDEN, name="up")(x)))


@model({"up/kernel": "io", "down/kernel": "io"})
def linen_mlp():
    return linen(Mlp(), inputs(BATCH, WIDTH))


@model({"layers_0/kernel": "io", "layers_2/kernel": "io"}, tolerance=5e-2)
def linen_bfloat16():
    bf16 = jnp.bfloat16
    return linen(nn.Sequential([nn.Dense(HIDDEN, dtype=bf16), nn.silu, nn.Dense(7, dtype=bf16)]), inputs(BATCH, WIDTH))


ATTENTION = {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"}
BLOCK = under("attention", ATTENTION) | {"up/kernel": "io", "down/kernel": "io"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        attention = nn.MultiHeadDotProductAttention(HEADS, deterministic=True, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x), mask=nn.make_causal_mask(x[..., 0]))
        hidden = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        for i in range(2):
            x, _ = Block(name=f"block{i}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


@model(
    {"embed/embedding": "io"} | under("block0", BLOCK) | under("block1", BLOCK),
    kind={"embed/embedding": "embedding"},
    agree=False,
)
def linen_transformer_with_tied_embedding():
    return linen(Transformer(), TOKENS)


def scanned(block: type[nn.Module], axis: int) -> nn.Module:
    return nn.scan(block, {"params": axis}, split_rngs={"params": True}, length=LAYERS)()


@model({path: "b" + roles for path, roles in BLOCK.items()})
def linen_scan():
    return linen(scanned(Block, 0), inputs(BATCH, SEQUENCE, WIDTH))


@model({path: roles[0] + "b" + roles[1:] for path, roles in BLOCK.items()})
def linen_scan_at_axis_one():
    return linen(scanned(Block, 1), inputs(BATCH, SEQUENCE, WIDTH))


@model({path: "b" + roles for path, roles in BLOCK.items()})
def linen_scan_remat():
    return linen(scanned(nn.remat(Block, prevent_cse=False), 0), inputs(BATCH, SEQUENCE, WIDTH))


@model({path: "b" + roles for path, roles in BLOCK.items()})
def linen_scan_remat_with_policy():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return linen(scanned(nn.remat(Block, prevent_cse=False, policy=policy), 0), inputs(BATCH, SEQUENCE, WIDTH))


@model(BLOCK)
def linen_remat():
    return linen(nn.remat(Block)(), inputs(BATCH, SEQUENCE, WIDTH))


@model({path: "b" + roles for path, roles in BLOCK.items()})
def linen_vmap():
    vmapped = nn.vmap(Block, {"params": 0}, split_rngs={"params": True})
    return linen(vmapped(), inputs(LAYERS, BATCH, SEQUENCE, WIDTH))


class DenseGenerals(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((HEADS, HEAD), name="split")(x)
        heads = nn.DenseGeneral(6, axis=-1, batch_dims=(0,), name="per_example")(nn.silu(heads))
        return nn.DenseGeneral(7, axis=(-2, -1), name="join")(heads)


@model({"split/kernel": "ioo", "per_example/kernel": "bio", "join/kernel": "iio"})
def linen_dense_general():
    return linen(DenseGenerals(), inputs(BATCH, SEQUENCE, WIDTH))


class Einsums(nn.Module):
    @nn.compact
    def __call__(self, x):
        kv = nn.Einsum((2, HEADS, WIDTH, HEAD), "BTD,SKDH->SBTKH", use_bias=False, name="kv")(x)
        query = nn.Einsum((HEADS, WIDTH, HEAD), "BTD,NDH->BTNH", name="query")(x)
        return nn.Einsum((HEADS, HEAD, 7), "BTNH,NHD->BTD", name="out")(query * kv[0] + kv[1])


@model({"kv/kernel": "ooio", "query/kernel": "oio", "out/kernel": "iio"})
def linen_einsum():
    return linen(Einsums(), inputs(BATCH, SEQUENCE, WIDTH))


@model({f"cell/{gate}/kernel": "io" for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")})
def linen_lstm():
    return linen(nn.RNN(nn.LSTMCell(7)), inputs(BATCH, SEQUENCE, WIDTH))


@model({f"cell/{gate}/kernel": "io" for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")})
def linen_optimized_lstm():
    return linen(nn.RNN(nn.OptimizedLSTMCell(7)), inputs(BATCH, SEQUENCE, WIDTH))


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(HIDDEN, name="up")(x))
        return nn.Dense(7, name="down")(nn.relu(x))


@model({"params/up/kernel": "io", "params/down/kernel": "io"}, tolerance=1e-4)
def linen_batch_norm():
    """Of all variables, statistics included: (output, updates)."""
    module, x = BatchNormed(), inputs(8, WIDTH)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    return (lambda variables, x: module.apply(variables, x, mutable=["batch_stats"])), shapes, (x,)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        hidden = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Dense(HIDDEN, name="up")(x)))
        return nn.Dense(7, name="down")(hidden)


@model({"up/kernel": "io", "down/kernel": "io"})
def linen_dropout():
    """Has a static keyword, `train`, and needs a key where it is true."""
    module, x = Dropped(), inputs(BATCH, WIDTH)

    def fn(params, x, key, train: bool = True):
        return module.apply({"params": params}, x, train=train, rngs={"dropout": key})

    return fn, jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))["params"], (x, jax.random.key(5))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(5, (3, 2), strides=2, padding="VALID", name="conv2")(x))
        return nn.Dense(7, name="head")(x.reshape(x.shape[0], -1))


@model(
    {"conv1/kernel": "iiio", "conv2/kernel": "iiio", "head/kernel": "io"},
    kind={"conv1/kernel": "conv", "conv2/kernel": "conv"},
)
def linen_conv():
    return linen(ConvNet(), inputs(BATCH, 9, 8, 4))


# -------------------------------------------------------------------------------- NNX


def split(build, *args):
    """(fn, shapes, args) of an NNX module."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return (lambda state, *args: nnx.merge(graph, state)(*args)), shapes, args


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@model({"up/kernel": "io", "down/kernel": "io"})
def nnx_mlp():
    return split(NnxMlp, inputs(BATCH, WIDTH))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs, keep_rngs=False)
        self.mlp = NnxMlp(rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


NNX_BLOCK = under("attention", ATTENTION) | {"mlp/up/kernel": "io", "mlp/down/kernel": "io"}


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@model(
    {"embed/embedding": "io", "head/kernel": "io"} | under("blocks/0", NNX_BLOCK) | under("blocks/1", NNX_BLOCK),
    kind={"embed/embedding": "embedding"},
)
def nnx_transformer():
    return split(NnxTransformer, TOKENS)


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.mlp = NnxMlp(rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.mlp(self.embed(tokens)))


@model(
    {"embed/embedding": "io", "mlp/up/kernel": "io", "mlp/down/kernel": "io"},
    kind={"embed/embedding": "embedding"},
    agree=False,
)
def nnx_tied_embedding():
    return split(NnxTied, TOKENS)


def stack_of_blocks(rngs):
    return nnx.vmap(NnxBlock)(rngs.split(LAYERS))


@model({path: "b" + roles for path, roles in NNX_BLOCK.items()})
def nnx_stacked_nnx_scan():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: stack_of_blocks(nnx.Rngs(0))))
    forward = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return (lambda state, x: forward(x, nnx.merge(graph, state))), shapes, (inputs(BATCH, SEQUENCE, WIDTH),)


@model({path: "b" + roles for path, roles in NNX_BLOCK.items()})
def nnx_stacked_lax_scan():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: stack_of_blocks(nnx.Rngs(0))))

    def fn(state, x):
        return jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, state)[0]

    return fn, shapes, (inputs(BATCH, SEQUENCE, WIDTH),)


@model({path: "b" + roles for path, roles in NNX_BLOCK.items()})
def nnx_stacked_remat_scan():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: stack_of_blocks(nnx.Rngs(0))))
    block = nnx.remat(lambda block, x: block(x))
    forward = nnx.scan(lambda x, layer: block(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return (lambda state, x: forward(x, nnx.merge(graph, state))), shapes, (inputs(BATCH, SEQUENCE, WIDTH),)


class NnxGenerals(nnx.Module):
    def __init__(self, rngs):
        self.split = nnx.LinearGeneral(WIDTH, (HEADS, HEAD), rngs=rngs)
        self.mix = nnx.Einsum("bthd,hde->bthe", (HEADS, HEAD, 6), (HEADS, 6), rngs=rngs)
        self.join = nnx.LinearGeneral((HEADS, 6), 7, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.join(nnx.silu(self.mix(self.split(x))))


@model({"split/kernel": "ioo", "mix/kernel": "bio", "join/kernel": "iio"})
def nnx_linear_general_and_einsum():
    return split(NnxGenerals, inputs(BATCH, SEQUENCE, WIDTH))


class NnxBatchNormed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 7, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))))


@model({"conv/kernel": "iio", "head/kernel": "io"}, kind={"conv/kernel": "conv"}, tolerance=1e-4)
def nnx_batch_norm():
    """Of parameters and statistics apart: (output, new statistics)."""
    graph, shapes, stats = nnx.split(nnx.eval_shape(lambda: NnxBatchNormed(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)

    def fn(params, stats, x):
        module = nnx.merge(graph, params, stats, copy=True)
        return module(x), nnx.state(module, nnx.BatchStat)

    return fn, shapes, (filled(stats, "statistics"), inputs(BATCH, 9, 4))


# -------------------------------------------------------------------------------- Equinox and Haiku


def equinox(build, call, *args):
    """(fn, shapes, args) of an Equinox module, whose linear weights are (out, in)."""
    shapes, static = eqx.partition(eqx.filter_eval_shape(build, jax.random.key(0)), _is_shape)
    return (lambda params, *args: call(eqx.combine(params, static), *args)), shapes, args


def _is_shape(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


@model({f"layers/{i}/weight": "oi" for i in range(3)})
def equinox_mlp():
    return equinox(
        lambda key: eqx.nn.MLP(WIDTH, 7, HIDDEN, 2, key=key), lambda mlp, x: jax.vmap(mlp)(x), inputs(BATCH, WIDTH)
    )


@model({f"{name}_proj/weight": "oi" for name in ("query", "key", "value", "output")})
def equinox_attention():
    return equinox(
        lambda key: eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key),
        lambda attention, x: jax.vmap(lambda x: attention(x, x, x))(x),
        inputs(BATCH, SEQUENCE, WIDTH),
    )


def haiku(forward, *args):
    """(fn, shapes, args) of a Haiku function, whose module names hold slashes."""
    transformed = hk.without_apply_rng(hk.transform(forward))
    return transformed.apply, jax.eval_shape(transformed.init, jax.random.key(0), *args), args


@model({"mlp/~/linear_0/w": "io", "mlp/~/linear_1/w": "io"})
def haiku_mlp():
    return haiku(lambda x: hk.nets.MLP([HIDDEN, 7])(x), inputs(BATCH, WIDTH))


@model(
    {"embed/embeddings": "io"}
    | {f"multi_head_attention/{name}/w": "io" for name in ("query", "key", "value", "linear")},
    kind={"embed/embeddings": "embedding"},
)
def haiku_attention():
    def forward(tokens):
        x = hk.Embed(VOCABULARY, WIDTH)(tokens)
        return hk.MultiHeadAttention(HEADS, HEAD, w_init=hk.initializers.RandomNormal())(x, x, x)

    return haiku(forward, TOKENS)
