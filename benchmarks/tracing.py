"""Python's share: tracing the gradient of an unrolled model, and eager calls, over LoRA written by hand.

CPU milliseconds of the least of several runs, caches cleared before each trace. What would make it look worse: models
whose kernels are reshaped or cast in ways of their own before each product, which LoRA by hand need not follow; eager
functions of few rows, where each call traces the function first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jlora
from benchmarks import others, told
from benchmarks.step_time import HEADS, loss, make_params, plain, textbook

WIDTH, HIDDEN = 64, 128


def milliseconds(call: Callable[[], Any], rounds: int, clear: bool = True) -> float:
    """CPU time of the quickest of some calls."""
    found = []
    for _ in range(rounds):
        if clear:
            jax.clear_caches()
        start = time.process_time()
        jax.block_until_ready(call())
        found.append(time.process_time() - start)
    return 1e3 * min(found)


class Dense(nn.Module):
    """linen's Dense without a bias, with LoRA by hand where `by_hand`."""

    features: int
    by_hand: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if not self.by_hand:
            return x @ kernel
        a = self.param("lora_a", nn.initializers.normal(), (x.shape[-1], 4))
        b = self.param("lora_b", nn.initializers.normal(), (4, self.features))
        return x @ jax.lax.stop_gradient(kernel) + 1.0 * ((x @ a) @ b)


class Decoder(nn.Module):
    """Pre-norm decoder layers, as linen users write them."""

    layers: int
    by_hand: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda features, name: Dense(features, self.by_hand, name=name)
        split = lambda x: x.reshape(*x.shape[:-1], HEADS, -1)
        for i in range(self.layers):
            h = nn.RMSNorm(name=f"norm1_{i}")(x)
            q, k, v = (split(dense(WIDTH, f"{name}_{i}")(h)) for name in "qkv")
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
            x = x + dense(WIDTH, f"o_{i}")(mixed)
            h = nn.RMSNorm(name=f"norm2_{i}")(x)
            x = x + dense(WIDTH, f"down_{i}")(nn.silu(dense(HIDDEN, f"gate_{i}")(h)) * dense(HIDDEN, f"up_{i}")(h))
        return x


class NnxLinear(nnx.Module):
    """nnx's Linear without a bias, with LoRA by hand."""

    def __init__(self, n: int, features: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(n, features, use_bias=False, rngs=rngs)
        self.a = nnx.Param(jax.random.normal(rngs(), (n, 4)))
        self.b = nnx.Param(jax.random.normal(rngs(), (4, features)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x) + 1.0 * ((x @ self.a[...]) @ self.b[...])


Traced = tuple[Callable[..., Any], Any, Any]


def bare(layers: int) -> tuple[Traced, Traced]:
    x = jnp.ones((2, 24, WIDTH))
    params = jlora.wrap(make_params(layers, WIDTH, HIDDEN), jlora.LoraSpec(rank=4))
    trainable, frozen = jlora.partition(params)
    ours = jlora.apply(lambda p: loss(p, x, plain))
    hand = lambda t, f: loss(jlora.combine(t, f), x, textbook)
    return (hand, trainable, frozen), (lambda t, f: ours(jlora.combine(t, f)), trainable, frozen)


def linen(layers: int) -> tuple[Traced, Traced]:
    x = jnp.ones((2, 24, WIDTH))
    init = lambda by_hand: jax.jit(Decoder(layers, by_hand).init)(jax.random.key(0), x)
    is_factor = lambda path, _: "lora" in jax.tree_util.keystr(path)
    pick = lambda keep: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if is_factor(path, leaf) == keep else None, init(True)
    )
    trainable, frozen = jlora.partition(jlora.wrap(init(False), jlora.LoraSpec(rank=4)))
    join = lambda t, f: jax.tree.map(lambda a, b: b if a is None else a, t, f, is_leaf=lambda leaf: leaf is None)
    hand = lambda t, f: jnp.sum(Decoder(layers, True).apply(join(t, f), x) ** 2)
    ours = jlora.apply(lambda p: jnp.sum(Decoder(layers).apply(p, x) ** 2))
    return (hand, pick(True), pick(False)), (lambda t, f: ours(jlora.combine(t, f)), trainable, frozen)


def in_nnx(layers: int) -> tuple[Traced, Traced]:
    x = jnp.ones((2, 24, WIDTH))
    rngs = nnx.Rngs(0)
    made = lambda make: nnx.split(others.Decoder(layers, WIDTH, HIDDEN, make, rngs))
    hand_graph, hand_state = made(lambda n, features: NnxLinear(n, features, rngs))
    graph, state = made(others.linear(rngs))
    params = jlora.wrap(nnx.as_pure(state), jlora.LoraSpec(rank=4))
    trainable, frozen = jlora.partition(params)
    is_factor = lambda path, _: path[-1] in ("a", "b")
    factors, rest = hand_state.split(is_factor, ...)
    run = lambda graph, state: jnp.sum(nnx.merge(graph, state)(x) ** 2)
    hand = lambda t, f: run(hand_graph, nnx.State.merge(t, f))
    ours = jlora.apply(lambda p: run(graph, p))
    return (hand, factors, rest), (lambda t, f: ours(jlora.combine(t, f)), trainable, frozen)


def eager(kernels: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A chain of products on four rows."""
    tree = jlora.wrap({f"{i}": {"kernel": jnp.ones((32, 32))} for i in range(kernels)}, jlora.LoraSpec(rank=4, alpha=4))
    x = jnp.ones((4, 32))

    def chain(p: Any, x: jax.Array, product: Callable[..., Any]) -> jax.Array:
        for i in range(kernels):
            x = product(p[f"{i}"], x)
        return x

    ours = jlora.apply(lambda p, x: chain(p, x, plain))
    return (lambda: chain(tree, x, textbook)), (lambda: ours(tree, x))


def gradient_ratio(pair: tuple[Traced, Traced], rounds: int) -> tuple[float, float, float]:
    """Milliseconds that tracing the gradient of the trainable leaves takes by hand and by `apply`, and their ratio."""

    def trace(traced: Traced) -> None:
        fn, trainable, frozen = traced
        jax.make_jaxpr(jax.grad(fn))(trainable, frozen)

    hand, ours = (milliseconds(lambda traced=traced: trace(traced), rounds) for traced in pair)
    return hand, ours, ours / hand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 30, "kernels": 120, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    models = {"bare jnp": bare, "linen": linen, "NNX": in_nnx}
    rows: list[Any] = [
        (f"gradient, {name}", *gradient_ratio(make(args.layers), args.rounds)) for name, make in models.items()
    ]
    hand, ours = (milliseconds(call, args.rounds + 3, clear=False) for call in eager(args.kernels))
    rows.append((f"eager, {args.kernels} kernels", hand, ours, ours / hand))
    told(f"CPU milliseconds, {args.layers} unrolled layers", ("", "by hand", "jlora", "ratio"), rows)


if __name__ == "__main__":
    main()
