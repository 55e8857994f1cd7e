"""A gradient step of each variant over that of plain LoRA: time, FLOPs and temporary memory, on this machine.

Run with ``python benchmarks/variants.py``. The model is a stack of square layers with a tanh behind each; programs take
turns, and medians of ratios are printed.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from step_time import interleaved

import jlora

SPECS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"variant": "dora"},
    "lora_fa": {"variant": "lora_fa"},
    "lora, pissa": {"init": "pissa_niter_2"},
    "vera": {"variant": "vera"},
    "adalora": {"variant": "adalora"},
    "loha, rank 4": {"variant": "loha", "rank": 4},
    "lokr, rank 2": {"variant": "lokr", "rank": 2},
    "ia3": {"variant": "ia3"},
    "oft": {"variant": "oft"},
    "boft": {"variant": "boft"},
}


def loss(params: list[Any], x: jax.Array) -> jax.Array:
    for p in params:
        x = jnp.tanh(x @ p["kernel"])
    return jnp.mean(x * x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 4, "d": 1024, "tokens": 4096, "rank": 16, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape), args.dtype)
    params = [{"kernel": noise(args.d, args.d) / np.sqrt(args.d).astype(args.dtype)} for _ in range(args.layers)]
    x = noise(args.tokens, args.d)
    steps, costs = {}, {}
    for name, settings in SPECS.items():
        halves = jlora.partition(jlora.wrap(params, jlora.LoraSpec(**({"rank": args.rank} | settings))))
        step = jax.jit(jax.value_and_grad(lambda t, f, x: jlora.apply(loss)(jlora.combine(t, f), x)))
        program = step.lower(*halves, x).compile()
        steps[name] = lambda program=program, halves=halves: program(*halves, x)
        costs[name] = program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes
    times = interleaved(steps, args.rounds)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.dtype}: {args.layers} layers, d={args.d},")
    print(f"{args.tokens} tokens, rank {args.rank}: a gradient step over that of plain LoRA")
    print(f"{'':14s} {'time':>6s} {'FLOPs':>7s} {'memory':>7s}")
    for name, seconds in times.items():
        time = statistics.median(a / b for a, b in zip(seconds, times["lora"], strict=True))
        flops, memory = (mine / base for mine, base in zip(costs[name], costs["lora"], strict=True))
        print(f"{name:14s} {time:5.2f}x {flops:6.3f}x {memory:6.2f}x")


if __name__ == "__main__":
    main()
