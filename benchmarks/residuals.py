"""What a layer keeps for the backward pass, over what the frozen layer keeps: from the jaxpr, so without noise.

A Llama-like layer, bfloat16, LoRA on all linear layers. The floor is the same layer with frozen kernels and a gradient
of its input alone. Counted are arrays of activations: arguments (parameters, factors, the input) are not. What would
make it look worse: no remat and small hidden layers, where inputs of products are a larger part of what is kept; a
policy that saves everything.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies, print_saved_residuals

import jlora
from benchmarks import told

NAMES = ("q", "k", "v", "attention", "gate", "up")
POLICIES = {
    "no remat": None,
    "dots_saveable": checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": checkpoint_policies.save_only_these_names(*NAMES),
}
SPECS = {"LoRA": {}, "dropout": {"dropout": 0.1}, "DoRA": {"variant": "dora"}}
Linear = Callable[[Any, jax.Array], jax.Array]


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Keeps its inputs and its result, as fused attention does."""
    split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
    weights = jnp.einsum("bqhd,bkhd->bhqk", split(q), split(k)) * (q.shape[-1] // heads) ** -0.5
    weights = jax.nn.softmax(weights.astype(jnp.float32), -1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, split(v)).reshape(q.shape)


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> tuple[jax.Array, Any]:
    mixed = attention(q, k, v, heads)
    return mixed, (q, k, v, mixed)


def _attention_backward(heads: int, kept: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(lambda *inputs: attention.fun(*inputs, heads), *kept[:3])[1](cotangent)


attention.defvjp(_attention_forward, _attention_backward)


def layer(p: dict[str, Any], x: jax.Array, linear: Linear = jnp.matmul, named: bool = False) -> jax.Array:
    """A pre-norm decoder layer; `linear` is a product of activations and a kernel."""
    name = checkpoint_name if named else lambda x, _: x
    h = norm(x, p["norm1"])
    q, k, v = (name(linear(h, p[key]), key) for key in ("q", "k", "v"))
    x = x + linear(name(attention(q, k, v, 4), "attention"), p["o"])
    h = norm(x, p["norm2"])
    gate, up = (name(linear(h, p[key]), key) for key in ("gate", "up"))
    return x + linear(jax.nn.silu(gate) * up, p["down"])


def shapes_of(d: int, hidden: int) -> dict[str, tuple[int, ...]]:
    kernels = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d)}
    return kernels | {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}


def textbook(x: jax.Array, node: Any) -> jax.Array:
    a, b = node.lora_a.astype(x.dtype), node.lora_b.astype(x.dtype)
    return x @ jax.lax.stop_gradient(node.base) + node.scale * ((x @ a) @ b)


def kept(fn: Callable[..., Any], policy: Any, *args: Any) -> int:
    """Bytes of activations that ``jax.grad(fn)`` keeps, summed over the layer's result."""
    fn = fn if policy is None else jax.checkpoint(fn, policy=policy)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(lambda *args: fn(*args).astype(jnp.float32).sum(), *args)
    lines = [line for line in text.getvalue().splitlines() if "from the argument" not in line]
    return sum(map(_bytes, lines))


def _bytes(line: str) -> int:
    """The bytes of an array that is told as ``bf16[2,512,256] output of mul from ...``."""
    kind, sizes = re.match(r"([a-z]+\d*)\[([\d,]*)\]", line).groups()  # type: ignore[union-attr]
    bits = 8 if kind == "bool" else int(re.sub("[a-z]", "", kind))
    return math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8


def over_floor(
    policy: Any, adapt: Callable[..., Any], d: int = 2048, hidden: int = 5632, tokens: int = 2048, **settings: Any
) -> float:
    """What LoRA keeps over what the frozen layer keeps.

    Args:
      policy: of `jax.checkpoint` around the layer; None: no remat.
      adapt: makes a function of a wrapped tree and x of the layer.
      settings: of the spec.
    """
    function = functools.partial(layer, named=policy is POLICIES["save_only_these_names"])
    x = jax.ShapeDtypeStruct((2, tokens, d), jnp.bfloat16)
    shapes = shapes_of(d, hidden)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    spec = jlora.LoraSpec(targets=[*shapes], axes={name: jlora.Axes(0, 1) for name in shapes}, rank=16, **settings)
    tree = jax.eval_shape(lambda params: jlora.wrap(params, spec), params)
    norms = {name: jax.ShapeDtypeStruct((d,), jnp.bfloat16) for name in ("norm1", "norm2")}
    trainable, frozen = jlora.partition(tree)

    def adapted(trainable: Any, x: Any, frozen: Any, norms: Any) -> Any:
        return adapt(function)(jlora.combine(trainable, frozen) | jax.lax.stop_gradient(norms), x)

    def plain(x: Any, params: Any) -> Any:
        return function(jax.lax.stop_gradient(params), x)

    return kept(adapted, policy, trainable, x, frozen, norms) / kept(plain, policy, x, params | norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    key = jax.random.key(0)
    forms = {"textbook": lambda fn: functools.partial(fn, linear=textbook), "jlora": lambda fn: jlora.apply(fn)}
    rows = [(f"LoRA, {name}", over_floor(policy, forms["textbook"]), over_floor(policy, forms["jlora"]))
            for name, policy in POLICIES.items()]  # fmt: skip
    for name in ("dropout", "DoRA"):
        rows.append((f"{name}, no remat", None, over_floor(None, lambda fn: jlora.apply(fn, rng=key), **SPECS[name])))
    told("Kept for the backward pass over the frozen layer", ("", "textbook", "jlora"), rows)


if __name__ == "__main__":
    main()
