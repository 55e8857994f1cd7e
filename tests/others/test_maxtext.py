"""A decoder as MaxText's: scanned with the layers on axis 1, in remat, with boxes around its parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

import jlora
from tests.others import support
from tests.others.support import RANK

VOCABULARY, WIDTH, HEADS, GROUPS, HEAD, HIDDEN, LAYERS = 512, 256, 4, 2, 64, 512, 3
BATCH, LENGTH = 2, 64
POLICIES = {"full": None, "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}

# -------------------------------------------------------------------------------- the model


class DenseGeneral(nn.Module):
    """Contracts the last axes of the input; with a rank, LoRA by hand from the collection "lora"."""

    features: tuple[int, ...]
    names: tuple[str, ...]
    contracts: int = 1
    dtype: jnp.dtype = jnp.float32
    rank: int = 0

    @nn.compact
    def __call__(self, x):
        over = tuple(range(x.ndim - self.contracts, x.ndim))
        inputs = x.shape[-self.contracts :]
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", range(self.contracts), range(self.contracts, len(self.names))
        )
        boxed = nn.with_logical_partitioning(init, self.names)
        kernel = self.param("kernel", boxed, (*inputs, *self.features), jnp.float32)
        dot = lambda x, w, axes: lax.dot_general(x, jnp.asarray(w, self.dtype), ((axes, range(len(axes))), ((), ())))
        y = dot(jnp.asarray(x, self.dtype), kernel, over)
        if not self.rank:
            return y
        a = self.variable("lora", "lora_a", jnp.zeros, (*inputs, self.rank)).value
        b = self.variable("lora", "lora_b", jnp.zeros, (self.rank, *self.features)).value
        return y + dot(dot(x, a, over), b, (x.ndim - self.contracts,))


class RMSNorm(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), x.shape[-1:])
        wide = jnp.asarray(x, jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
        return jnp.asarray(normed * scale, self.dtype)


def rotary(x, positions):
    """(batch, length, heads, head) turned by the positions, half against half."""
    timescale = 10_000 ** (2 * jnp.arange(HEAD // 2) / HEAD)
    angles = positions[..., None, None] / timescale
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(jnp.asarray(x, jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    dense: functools.partial

    @nn.compact
    def __call__(self, x, positions, mask, decode):
        query = self.dense((HEADS, HEAD), ("embed", "q_heads", "kv"), name="query")(x)
        key = self.dense((GROUPS, HEAD), ("embed", "kv_heads", "kv"), name="key")(x)
        value = self.dense((GROUPS, HEAD), ("embed", "kv_heads", "kv"), name="value")(x)
        query, key = rotary(query, positions) * HEAD**-0.5, rotary(key, positions)
        if decode:
            key, value = self.cached("key", key, positions, mask), self.cached("value", value, positions, mask)
        query = query.reshape(*query.shape[:2], GROUPS, HEADS // GROUPS, HEAD)
        scores = jnp.einsum("btkgd,bskd->bkgts", query, key)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        out = jnp.einsum("bkgts,bskd->btkgd", nn.softmax(scores), value)
        dense = self.dense((WIDTH,), ("heads", "kv", "embed"), contracts=2, name="out")
        return dense(out.reshape(*out.shape[:2], HEADS, HEAD))

    def cached(self, name, new, positions, mask):
        shape = (new.shape[0], mask.shape[-1], *new.shape[2:])
        cache = self.variable("cache", f"cached_{name}", jnp.zeros, shape, new.dtype)
        cache.value = lax.dynamic_update_slice(cache.value, new, (0, positions[0, 0], 0, 0))
        return cache.value


class Mlp(nn.Module):
    dense: functools.partial

    @nn.compact
    def __call__(self, x):
        gate = self.dense((HIDDEN,), ("embed", "mlp"), name="wi_0")(x)
        up = self.dense((HIDDEN,), ("embed", "mlp"), name="wi_1")(x)
        return self.dense((WIDTH,), ("mlp", "embed"), name="wo")(nn.silu(gate) * up)


class Layer(nn.Module):
    dtype: jnp.dtype
    rank: int

    @nn.compact
    def __call__(self, x, positions, mask, decode):
        dense = functools.partial(DenseGeneral, dtype=self.dtype, rank=self.rank)
        normed = RMSNorm(self.dtype, name="pre_self_attention_layer_norm")(x)
        x = x + Attention(dense, name="self_attention")(normed, positions, mask, decode)
        x = x + Mlp(dense, name="mlp")(RMSNorm(self.dtype, name="post_self_attention_layer_norm")(x))
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), None


class Decoder(nn.Module):
    dtype: jnp.dtype
    rank: int
    policy: str

    @nn.compact
    def __call__(self, x, positions, mask, decode):
        layer = nn.remat(Layer, prevent_cse=False, policy=POLICIES[self.policy], static_argnums=(4,))
        layers = nn.scan(
            layer,
            variable_axes={"params": 1, "lora": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(self.dtype, self.rank, name="layers")(x, positions, mask, decode)
        x = RMSNorm(self.dtype, name="decoder_norm")(x)
        return DenseGeneral((VOCABULARY,), ("embed", "vocab"), dtype=self.dtype, name="logits_dense")(x)


class Model(nn.Module):
    dtype: jnp.dtype = jnp.float32
    rank: int = 0
    policy: str = "full"

    @nn.compact
    def __call__(self, tokens, positions=None, mask=None, decode=False):
        batch, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            mask = positions[:, :, None] >= positions[:, None]
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("vocab", "embed"))
        embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=init, name="token_embedder")
        decoder = Decoder(self.dtype, self.rank, self.policy, name="decoder")
        return decoder(jnp.asarray(embed(tokens), self.dtype), positions, mask, decode)


# -------------------------------------------------------------------------------- the tests

KERNELS = support.under(
    "decoder/layers",
    {
        "self_attention/query/kernel": "iboo",
        "self_attention/key/kernel": "iboo",
        "self_attention/value/kernel": "iboo",
        "self_attention/out/kernel": "ibio",
        "mlp/wi_0/kernel": "ibo",
        "mlp/wi_1/kernel": "ibo",
        "mlp/wo/kernel": "ibo",
    },
)
TOKENS = support.tokens_of(VOCABULARY, BATCH, LENGTH)
MODEL = Model()


def predict(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def loss(params, tokens):
    return support.cross_entropy(predict(params, tokens), tokens)


@functools.cache
def tree():
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), TOKENS))["params"]
    return support.wrapped(predict, support.filled(shapes), TOKENS)


def test_kernels_are_found():
    support.check_kernels(tree(), KERNELS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_dense(dtype):
    model = Model(dtype)
    support.check_all_factored(lambda params, tokens: model.apply({"params": params}, tokens), tree(), TOKENS)


def test_values():
    support.check_values(predict, tree(), TOKENS)


@pytest.mark.slow  # test_it_costs_what_it_costs_by_hand compares the same gradients with those of LoRA by hand
def test_training():
    support.check_training(loss, tree(), TOKENS)


@pytest.mark.slow
def test_generation():
    size = 24

    def step(params, tokens, positions, cache, mask):
        variables = {"params": params, "cache": cache}
        logits, new = MODEL.apply(variables, tokens, positions, mask, True, mutable=["cache"])
        return logits, new["cache"]

    shape = (LAYERS, BATCH, size, GROUPS, HEAD)
    cache = {"self_attention": {f"cached_{name}": jnp.zeros(shape) for name in ("key", "value")}}
    support.check_generation(predict, step, {"decoder": {"layers": cache}}, tree(), TOKENS[:, :16], size)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "minimal"])
def test_it_costs_what_it_costs_by_hand(policy):
    plain, by_hand = Model(policy=policy), Model(rank=RANK, policy=policy)
    lora = jax.eval_shape(lambda: by_hand.init(jax.random.key(0), TOKENS))["lora"]

    def hand_loss(lora, params, tokens):
        return support.cross_entropy(by_hand.apply({"params": params, "lora": lora}, tokens), tokens)

    support.check_against(
        hand_loss,
        lora,
        jlora.unwrap(tree()),
        lambda path: re.sub("/lora_([ab])", r"/kernel/\1", path),
        lambda params, tokens: support.cross_entropy(plain.apply({"params": params}, tokens), tokens),
        tree(),
        TOKENS,
    )


def test_adapter_files(tmp_path):
    support.check_files(tmp_path, tree(), "maxtext-qwen")
