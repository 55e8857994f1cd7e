"""The model of `benchmarks.step_time` in NNX, with the LoRA of NNX itself and of Qwix: gradient steps of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

HEADS = 8


class Decoder(nnx.Module):
    """Pre-norm decoder layers.

    Args:
      make: makes a linear layer without a bias of its numbers of inputs and of outputs.
    """

    def __init__(self, layers: int, width: int, hidden: int, make: Callable[[int, int], Any], rngs: nnx.Rngs):
        shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        norms = lambda: {name: nnx.RMSNorm(width, rngs=rngs) for name in ("norm1", "norm2")}
        one = lambda: nnx.Dict({name: make(*shape) for name, shape in shapes.items()} | norms())
        self.layers = nnx.List([one() for _ in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        split = lambda x: x.reshape(*x.shape[:-1], HEADS, -1)
        for p in self.layers:
            h = p["norm1"](x)
            q, k, v = (split(p[name](h)) for name in ("q", "k", "v"))
            x = x + p["o"](jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
            h = p["norm2"](x)
            x = x + p["down"](nnx.silu(p["gate"](h)) * p["up"](h))
        return x


def linear(rngs: nnx.Rngs) -> Callable[[int, int], Any]:
    return lambda n, features: nnx.Linear(n, features, use_bias=False, rngs=rngs)


def with_lora(rank: int, rngs: nnx.Rngs) -> Callable[[int, int], Any]:
    """Linear layers with NNX's own LoRA around them."""
    return lambda n, features: nnx.LoRA(n, rank, features, base_module=linear(rngs)(n, features), rngs=rngs)


def step_of_nnx(layers: int, width: int, hidden: int, rank: int, x: jax.Array) -> Callable[[], Any]:
    rngs = nnx.Rngs(0)
    return _step(Decoder(layers, width, hidden, with_lora(rank, rngs), rngs), x)


def step_of_qwix(layers: int, width: int, hidden: int, rank: int, x: jax.Array) -> Callable[[], Any]:
    import qwix

    rngs = nnx.Rngs(0)
    model = Decoder(layers, width, hidden, linear(rngs), rngs)
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=float(rank))
    return _step(qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1)), x)


def _step(model: Any, x: jax.Array) -> Callable[[], Any]:
    """Loss and gradients of the LoRA parameters of a model."""
    graph, trainable, rest = nnx.split(model, nnx.LoRAParam, ...)
    assert jax.tree.leaves(trainable)
    loss = lambda t, rest, x: jnp.mean(nnx.merge(graph, t, rest)(x) ** 2)
    run = jax.jit(jax.value_and_grad(loss))
    return lambda: run(trainable, rest, x)
