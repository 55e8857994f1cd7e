"""Time of a training step over the frozen floor, and of tracing, on this machine.

Run with ``python benchmarks/step_time.py``; on an accelerator, say, with ``--d 4096 --hidden 11264 --tokens 8192
--dtype bfloat16`` (the type of the base and of the activations; factors are float32). The floor is the forward and
input-gradient pass of the same frozen model without LoRA. Programs take turns, so that the machine's drift touches all
alike; medians of ratios are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jlora

HEADS = 8


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    split = lambda x: x.reshape(*x.shape[:-1], HEADS, -1)
    return jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True).reshape(q.shape)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale.astype(x.dtype)


def layer(p: dict[str, Any], x: jax.Array, linear: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
    h = norm(x, p["norm1"])
    x = x + linear(p["o"], attention(linear(p["q"], h), linear(p["k"], h), linear(p["v"], h)))
    h = norm(x, p["norm2"])
    return x + linear(p["down"], jax.nn.silu(linear(p["gate"], h)) * linear(p["up"], h))


def loss(params: Any, x: jax.Array, linear: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
    for p in params:
        x = layer(p, x, linear)
    return jnp.mean(x * x)


def plain(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"]


def textbook(p: Any, x: jax.Array) -> jax.Array:
    node = p["kernel"]
    a, b = node.lora_a.astype(x.dtype), node.lora_b.astype(x.dtype)
    return x @ jax.lax.stop_gradient(node.base) + node.scale * ((x @ a) @ b)


def make_params(layers: int, d: int, hidden: int, dtype: Any = jnp.float32) -> list[Any]:
    rng = np.random.default_rng(0)
    kernel = lambda m, n: {"kernel": jnp.asarray(rng.normal(size=(m, n)).astype(np.float32) / np.sqrt(m), dtype)}
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (d, hidden), "up": (d, hidden)}
    make = lambda: {name: kernel(*shape) for name, shape in (shapes | {"down": (hidden, d)}).items()}
    return [make() | {"norm1": jnp.ones(d), "norm2": jnp.ones(d)} for _ in range(layers)]


def interleaved(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program, the programs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for call in programs.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return times


def steps(layers: int, d: int, hidden: int, tokens: int, rank: int, dtype: str, rounds: int) -> None:
    params = make_params(layers, d, hidden, jnp.dtype(dtype))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, tokens // 4, d)), dtype)
    wrapped = jlora.wrap(params, jlora.LoraSpec(rank=rank, alpha=rank))
    trainable, frozen = jlora.partition(wrapped)
    model = jlora.apply(lambda p, x: loss(p, x, plain))
    gradient = lambda f: jax.jit(jax.value_and_grad(f))
    floor = gradient(lambda x, p: loss(p, x, plain))
    ours = gradient(lambda t, f, x: model(jlora.combine(t, f), x))
    book = gradient(lambda t, f, x: loss(jlora.combine(t, f), x, textbook))
    full = gradient(lambda p, x: loss(p, x, plain))
    merged = gradient(lambda t, f, x: loss(jlora.merge(jlora.combine(t, f)), x, plain))
    times = interleaved(
        {
            "frozen floor": lambda: floor(x, params),
            "jlora": lambda: ours(trainable, frozen, x),
            "textbook": lambda: book(trainable, frozen, x),
            "merge, then apply": lambda: merged(trainable, frozen, x),
            "full fine-tune": lambda: full(params, x),
        },
        rounds,
    )
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {dtype}: {layers} layers, d={d}, hidden={hidden},")
    print(f"{tokens} tokens, rank {rank}: gradient step over the frozen floor")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["frozen floor"], strict=True))
        print(f"  {name:18s} {ratio:5.2f}x   median {statistics.median(seconds) * 1e3:7.0f} ms")


class Block(nn.Module):
    """A pre-norm decoder layer, as linen users write it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(h, mask=nn.make_causal_mask(h[..., 0]))
        h = nn.RMSNorm()(x)
        return x + nn.Dense(64)(nn.silu(nn.Dense(128)(h)) * nn.Dense(128)(h))


class Decoder(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = Block(name=f"layer_{i}")(x)
        return x


def tracing(layers: int, rounds: int) -> None:
    x = jnp.ones((2, 24, 64))
    decoder = Decoder(layers)
    variables = decoder.init(jax.random.key(0), x)
    params = make_params(layers, 64, 128)
    models = {
        "linen": (decoder.apply, variables),
        "bare jnp": (lambda p, x: loss(p, x, plain), params),
    }
    for name, (f, tree) in models.items():
        wrapped = jlora.wrap(tree, jlora.LoraSpec(rank=4))

        def trace(f: Callable[..., Any], tree: Any) -> None:
            jax.clear_caches()
            jax.make_jaxpr(lambda tree: f(tree, x))(tree)

        programs = {"f": lambda: trace(f, tree), "apply(f)": lambda: trace(jlora.apply(f), wrapped)}  # noqa: B023
        times = interleaved(programs, rounds)
        ratio = statistics.median(a / b for a, b in zip(times["apply(f)"], times["f"], strict=True))
        mine, theirs = statistics.median(times["apply(f)"]), statistics.median(times["f"])
        print(f"tracing {layers} unrolled layers, {name}: f {theirs:.2f} s, apply(f) {mine:.2f} s, {ratio:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    for name, default in {"layers": 4, "d": 768, "hidden": 2048, "tokens": 1024, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    args = vars(parser.parse_args())
    tracing(30, args["rounds"])
    steps(**args)


if __name__ == "__main__":
    main()
