"""all-MiniLM-L6-v2, a small BERT, in plain Flax linen: the encoder, its weights, its tokenizer.

References:
  Wang et al., "MiniLM: Deep Self-Attention Distillation", arXiv:2002.10957;
  Reimers and Gurevych, "Sentence-BERT", arXiv:1908.10084.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention over (batch, length, width), blind to padding."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        q, k, v = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:-1], self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        return nn.Dense(width, name="output")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """A transformer layer with the norms after the sums, as in BERT."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attended = SelfAttention(self.heads, name="attention")(x, mask)
        x = nn.LayerNorm(epsilon=1e-12, name="attention_norm")(x + attended)
        hidden = nn.gelu(nn.Dense(self.hidden, name="intermediate")(x), approximate=False)
        return nn.LayerNorm(epsilon=1e-12, name="output_norm")(x + nn.Dense(x.shape[-1], name="output")(hidden))


class MiniLM(nn.Module):
    """Token ids and mask, both (batch, length), to one mean-pooled vector a text: (batch, width)."""

    vocab: int = 30_522
    positions: int = 512
    width: int = 384
    heads: int = 12
    hidden: int = 1_536
    layers: int = 6

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        words = nn.Embed(self.vocab, self.width, name="words")(ids)
        positions = nn.Embed(self.positions, self.width, name="positions")(jnp.arange(ids.shape[1]))
        # Every text here is a single segment, so its type is 0 throughout.
        types = nn.Embed(2, self.width, name="types")(jnp.zeros_like(ids))
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(words + positions + types)
        for i in range(self.layers):
            x = Layer(self.heads, self.hidden, name=f"layer_{i}")(x, mask)
        return mean_pool(x, mask)


class Classifier(nn.Module):
    """MiniLM with a linear head: token ids and mask to logits (batch, classes)."""

    encoder: MiniLM = MiniLM()
    classes: int = 2

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="head")(self.encoder(ids, mask))


def mean_pool(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean over the unmasked positions: (batch, length, width) to (batch, width)."""
    weights = mask[..., None].astype(x.dtype)
    return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)


def load_params(folder: Path) -> dict[str, Any]:
    """Returns the pretrained parameters of `MiniLM()` from `folder/model.safetensors`."""
    return params_from_bert(load_file(folder / "model.safetensors"), MiniLM.layers)


def params_from_bert(tensors: Mapping[str, np.ndarray], layers: int) -> dict[str, Any]:
    """Returns linen parameters from tensors named as Hugging Face's BERT names them.

    PyTorch keeps a linear layer's weight as (out, in), Flax as (in, out).
    """

    def dense(name: str) -> dict:
        return {"kernel": np.ascontiguousarray(tensors[f"{name}.weight"].T), "bias": tensors[f"{name}.bias"]}

    def norm(name: str) -> dict:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def embed(name: str) -> dict:
        return {"embedding": tensors[f"embeddings.{name}_embeddings.weight"]}

    def layer(name: str) -> dict:
        return {
            "attention": {
                **{part: dense(f"{name}.attention.self.{part}") for part in ("query", "key", "value")},
                "output": dense(f"{name}.attention.output.dense"),
            },
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "intermediate": dense(f"{name}.intermediate.dense"),
            "output": dense(f"{name}.output.dense"),
            "output_norm": norm(f"{name}.output.LayerNorm"),
        }

    return {
        "words": embed("word"),
        "positions": embed("position"),
        "types": embed("token_type"),
        "norm": norm("embeddings.LayerNorm"),
        **{f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(layers)},
    }


def load_tokenizer(folder: Path, length: int = 64) -> Tokenizer:
    """Returns the tokenizer of `folder/tokenizer.json`, cutting and padding every text to `length` tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns `ids` (int32) and `mask` (bool) of the texts, both (len(texts), length)."""
    rows = tokenizer.encode_batch(list(texts))
    ids = np.array([row.ids for row in rows], np.int32)
    return {"ids": ids, "mask": np.array([row.attention_mask for row in rows], bool)}


def embed(params: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Returns the sentence vectors of the texts at unit length: (len(texts), width)."""
    tokens = encode(tokenizer, texts)
    vectors = MiniLM().apply({"params": params}, tokens["ids"], tokens["mask"])
    return np.asarray(vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True))
