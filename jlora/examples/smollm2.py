"""SmolLM2-135M-Instruct, a small Llama, in plain Flax linen: the decoder, its layers scanned; weights and tokenizer.

The weights are those of a GGUF file, dequantised: Q4_1, with embeddings in Q8_0.

References:
  Allal et al., "SmolLM2: When Smol Goes Big", arXiv:2502.02737;
  Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971;
  Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jlora
from jlora.examples.gguf import Gguf, read_gguf

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"
CONTROL = 3  # the type of such tokens in a GGUF file
EPSILON, ROPE_BASE = 1e-5, 1e5
Cache = tuple[jax.Array, jax.Array]  # keys and values, (batch, size, kv_heads, width // heads), stacked by the scan


class Attention(nn.Module):
    """Grouped-query attention over (batch, length, width); given a cache, writes to it at `start` and attends to it."""

    heads: int
    kv_heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: jax.Array, mask: jax.Array, cache: Cache | None, start: jax.Array | int
    ) -> tuple[jax.Array, Cache | None]:
        width, dense = x.shape[-1], partial(nn.Dense, use_bias=False, dtype=self.dtype)
        q, k, v = (
            dense(heads * (width // self.heads), name=name)(x).reshape(*x.shape[:2], heads, -1)
            for name, heads in (("q_proj", self.heads), ("k_proj", self.kv_heads), ("v_proj", self.kv_heads))
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache = (written(cache[0], k, start), written(cache[1], v, start))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return dense(width, name="o_proj")(mixed.reshape(x.shape)), cache


class Mlp(nn.Module):
    """SwiGLU: (..., width) to (..., width)."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        gate, up = dense(self.hidden, name="gate_proj")(x), dense(self.hidden, name="up_proj")(x)
        return dense(x.shape[-1], name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    """A transformer layer with the norms before attention and MLP, as a step of a scan: the carry is x."""

    heads: int
    kv_heads: int
    hidden: int
    dtype: Any
    activations: jax.P | None

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, angles: jax.Array, mask: jax.Array, start: jax.Array | int
    ) -> tuple[jax.Array, Cache | None]:
        norm = partial(nn.RMSNorm, epsilon=EPSILON, dtype=self.dtype)
        attention = Attention(self.heads, self.kv_heads, self.dtype, name="attention")
        mixed, cache = attention(norm(name="attention_norm")(x), angles, mask, cache, start)
        x = x + checkpoint_name(mixed, "attention")
        x = x + checkpoint_name(Mlp(self.hidden, self.dtype, name="mlp")(norm(name="mlp_norm")(x)), "mlp")
        return on_mesh(x, self.activations), cache


class SmolLM2(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocab); `remat` recomputes layers in the backward pass.

    All of a layer but what has one of the names `saved` ("attention", "mlp": what each adds) is recomputed.
    `activations` says how (batch, length, width) lies on the mesh of `jax.set_mesh`. The logits are products with the
    embeddings, or with a kernel of their own where they are not `tied`.

    Given a cache of earlier tokens' keys and values, `ids` go at position `start` of it, where they must fit, and the
    result is the logits and the new cache.
    """

    vocab: int = 49_152
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    hidden: int = 1_536
    layers: int = 30
    dtype: Any = jnp.float32
    remat: bool = False
    saved: tuple[str, ...] = ()
    activations: jax.P | None = None
    tied: bool = True

    @nn.compact
    def __call__(self, ids: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0) -> Any:
        positions = start + jnp.arange(ids.shape[1])
        keys = jnp.arange(ids.shape[1] if cache is None else cache[0].shape[2])
        mask = (positions[:, None] >= keys)[None, None]  # (1, 1, length, keys): the past and the token itself
        embed = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="embed")
        policy = jax.checkpoint_policies.save_only_these_names(*self.saved)
        layer = nn.remat(Layer, prevent_cse=False, policy=policy) if self.remat else Layer
        axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)  # cache, angles, mask, start
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=self.layers,
        )
        layers = scanned(self.heads, self.kv_heads, self.hidden, self.dtype, self.activations, name="layers")
        x = on_mesh(embed(ids), self.activations)
        x, new = layers(x, cache, rope_angles(positions, self.width // self.heads), mask, start)
        x = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
        head = embed.attend if self.tied else nn.Dense(self.vocab, use_bias=False, dtype=self.dtype, name="lm_head")
        logits = head(x)
        return logits if cache is None else (logits, new)

    def empty_cache(self, batch: int, size: int) -> Cache:
        """Returns a cache for `size` tokens, stacked by layer."""
        zeros = jnp.zeros((self.layers, batch, size, self.kv_heads, self.width // self.heads), self.dtype)
        return zeros, zeros


PRETRAINED = SmolLM2()


def on_mesh(x: jax.Array, spec: jax.P | None) -> jax.Array:
    """Returns x, laid out on the mesh as the spec says."""
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def rope_angles(positions: jax.Array, size: int) -> jax.Array:
    """Returns the angle by which each pair of a head's `size` features turns: (length, size // 2)."""
    return positions[:, None] * ROPE_BASE ** -(jnp.arange(0, size, 2) / size)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + size // 2) of x (batch, length, heads, size) by the angles (length, size // 2)."""
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def written(old: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """Returns the cache (batch, size, ...) with `new` (batch, length, ...) from position `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)


def load_params(folder: Path) -> dict[str, Any]:
    """Returns the pretrained parameters of `PRETRAINED`, in float32."""
    return params_from_llama(hf_tensors(folder), PRETRAINED.layers)


def load_config(folder: Path) -> dict[str, Any]:
    """Returns the model's sizes under the names of Hugging Face's `LlamaConfig`."""
    metadata = read_gguf(folder / FILE).metadata
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    }
    return {name: metadata[f"llama.{key}"] for name, key in names.items()} | {"tie_word_embeddings": True}


def hf_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns the pretrained weights in float32 under the names and in the layouts of Hugging Face's `transformers`."""
    return llama_tensors(read_gguf(folder / FILE))


def llama_tensors(file: Gguf) -> dict[str, np.ndarray]:
    """Returns a Llama's tensors under Hugging Face's names; the rows of queries and keys back in their order."""
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    layers = range(file.metadata["llama.block_count"])
    names |= {f"blk.{i}.{old}.weight": f"model.layers.{i}.{new}.weight" for i in layers for old, new in parts.items()}
    tensors = {new: file.tensors[old].dequantise() for old, new in names.items()}
    for part, heads in (("q", "head_count"), ("k", "head_count_kv")):
        for name in (f"model.layers.{i}.self_attn.{part}_proj.weight" for i in layers):
            tensors[name] = half_split(tensors[name], file.metadata[f"llama.attention.{heads}"])
    return tensors


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from llama.cpp's pairs (2i, 2i + 1) to Hugging Face's (i, i + half)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def params_from_llama(tensors: Mapping[str, np.ndarray], layers: int, tied: bool = True) -> dict[str, Any]:
    """Returns linen parameters, stacked by layer, from tensors named as Hugging Face's Llama names them.

    PyTorch keeps a linear layer's weight as (out, in), Flax as (in, out).
    """

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{i}.{name}.weight"].T for i in range(layers)])

    def kernels(module: str, *parts: str) -> dict:
        return {part: {"kernel": stacked(f"{module}.{part}")} for part in parts}

    return {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "layers": {
            "attention": kernels("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            "attention_norm": {"scale": stacked("input_layernorm")},
            "mlp": kernels("mlp", "gate_proj", "up_proj", "down_proj"),
            "mlp_norm": {"scale": stacked("post_attention_layernorm")},
        },
        "norm": {"scale": tensors["model.norm.weight"]},
        **({} if tied else {"lm_head": {"kernel": tensors["lm_head.weight"].T}}),
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of the GGUF file: byte-level BPE, each digit a token of its own."""
    return tokenizer_from(read_gguf(folder / FILE).metadata)


def tokenizer_from(metadata: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a GGUF file's metadata."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return tokenizer


def next_token_losses(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each token but the first, (batch, length - 1), given logits at each of `ids`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])


def perplexity(params: Any, ids: np.ndarray, model: SmolLM2 = PRETRAINED) -> float:
    """Returns the perplexity of windows of tokens (windows, length) under plain or wrapped parameters."""
    return float(np.exp(mean_loss(model, params, jnp.asarray(ids))))


@partial(jax.jit, static_argnums=0)
def mean_loss(model: SmolLM2, params: Any, ids: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of windows of tokens (windows, length), one window at a time."""

    def loss(row: jax.Array) -> jax.Array:
        return next_token_losses(jlora.apply(model.apply)({"params": params}, row[None]), row[None]).mean()

    return jax.lax.map(loss, ids).mean()


def generate(
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int = 48,
    model: SmolLM2 = PRETRAINED,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Returns the continuation of a prompt, under plain or wrapped parameters: sampled, or at 0 the likeliest tokens.

    It ends at `END` or after `tokens` tokens.
    """
    known = tokenizer.encode(prompt).ids
    # A few sizes for all prompts, so that few are compiled.
    size = -(-(len(known) + tokens) // 64) * 64
    buffer = np.pad(np.array(known, np.int32), (0, size - len(known)))
    last = len(known) + tokens - 1
    end, key = tokenizer.token_to_id(END), jax.random.key(seed)
    filled, at = continued(model, params, buffer, len(known), last, end, temperature, key)
    return tokenizer.decode(np.asarray(filled[len(known) : int(at) + 1]).tolist())


@partial(jax.jit, static_argnums=0)
def continued(
    model: SmolLM2, params: Any, buffer: jax.Array, known: int, last: int, end: int, temperature: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `buffer` (size,) filled after its `known` tokens, up to `end` or position `last`, and where it ended.

    A logit plus Gumbel noise is the largest as often as the softmax says.
    """

    def step(state: tuple) -> tuple:
        buffer, cache, at = state
        logits, cache = jlora.apply(model.apply)({"params": params}, buffer[None, at][None], cache, at)
        noise = temperature * jax.random.gumbel(jax.random.fold_in(key, at), (model.vocab,))
        likeliest = (logits[0, 0].astype(jnp.float32) + noise).argmax()
        following = jnp.where(at + 1 < known, buffer[at + 1], likeliest)
        return buffer.at[at + 1].set(following), cache, at + 1

    def unfinished(state: tuple) -> jax.Array:
        buffer, _, at = state
        return (at < last) & ((at < known) | (buffer[at] != end))

    buffer, _, at = jax.lax.while_loop(unfinished, step, (buffer, model.empty_cache(1, len(buffer)), jnp.array(0)))
    return buffer, at
