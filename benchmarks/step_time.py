"""Time of a training step over the frozen floor, on this machine.

Run with ``python -m benchmarks.step_time``; on an accelerator, say, with ``--d 4096 --hidden 11264 --tokens 8192
--dtype bfloat16`` (the type of the base and of the activations; factors are float32). The floor is the forward and
input-gradient pass of the same frozen model without LoRA. Programs take turns, so that the machine's drift touches
all alike; medians of ratios are printed. Beside jlora are LoRA written into the model by hand, NNX's, Qwix's, and
with ``--peft python`` that of PEFT on torch with as many threads, in a process of its own. What would make it look
worse: few tokens, large ranks, small kernels; an accelerator, whose compiler makes less of how products are written.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks import others, told

HEADS = others.HEADS


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
            result = jax.block_until_ready(call())
            times[name].append(result if isinstance(result, float) else time.perf_counter() - start)
    return times


def steps(layers: int, d: int, hidden: int, tokens: int, rank: int, dtype: str, rounds: int, peft: str) -> None:
    params = make_params(layers, d, hidden, jnp.dtype(dtype))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, tokens // 4, d)), dtype)
    wrapped = jlora.wrap(params, jlora.LoraSpec(rank=rank, alpha=rank))
    trainable, frozen = jlora.partition(wrapped)
    model = jlora.apply(lambda p, x: loss(p, x, plain))
    merging = jlora.apply(lambda p, x: loss(p, x, plain), strategy="merged")
    gradient = lambda f: jax.jit(jax.value_and_grad(f))
    floor = gradient(lambda x, p: loss(p, x, plain))
    ours = gradient(lambda t, f, x: model(jlora.combine(t, f), x))
    by_merging = gradient(lambda t, f, x: merging(jlora.combine(t, f), x))
    book = gradient(lambda t, f, x: loss(jlora.combine(t, f), x, textbook))
    full = gradient(lambda p, x: loss(p, x, plain))
    merged = gradient(lambda t, f, x: loss(jlora.merge(jlora.combine(t, f)), x, plain))
    programs: dict[str, Callable[[], Any]] = {
        "frozen floor": lambda: floor(x, params),
        "jlora": lambda: ours(trainable, frozen, x),
        "jlora, merged strategy": lambda: by_merging(trainable, frozen, x),
        "textbook": lambda: book(trainable, frozen, x),
        "jlora.merge, then the function": lambda: merged(trainable, frozen, x),
        "full fine-tune": lambda: full(params, x),
    }
    if dtype == "float32":
        programs["nnx.LoRA"] = others.step_of_nnx(layers, d, hidden, rank, x)
        if importlib.util.find_spec("qwix"):
            programs["Qwix"] = others.step_of_qwix(layers, d, hidden, rank, x)
        if peft:
            sizes = {"layers": layers, "d": d, "hidden": hidden, "tokens": tokens, "rank": rank, "heads": HEADS}
            programs["PEFT, torch"] = Peft(peft, **sizes)
    times = interleaved(programs, rounds)
    ratio = lambda name, to: statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))
    rows = [(name, ratio(name, "frozen floor"), 1e3 * statistics.median(times[name])) for name in programs]
    told(
        f"A gradient step, {dtype}: {layers} layers, d {d}, hidden {hidden}, {tokens} tokens, rank {rank}",
        ("", "over the floor", "median ms"),
        rows,
    )
    if "PEFT, torch" in programs:
        print(f"jlora over PEFT: {ratio('jlora', 'PEFT, torch'):.2f}")


class Peft:
    """A process of stock PEFT on torch, which takes its turn when told to."""

    def __init__(self, python: str, **sizes: int):
        flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
        command = [python, str(Path(__file__).with_name("peft_step.py")), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    for name, default in {"layers": 4, "d": 768, "hidden": 2048, "tokens": 1024, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peft", default="", metavar="PYTHON", help="a Python that has torch and peft")
    steps(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
