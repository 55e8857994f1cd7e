"""Many adapters on one base: a mixed batch over the base alone, and training together over training apart.

Run with ``python -m benchmarks.adapters``. Bytes and FLOPs are the compilers' counts, of CPU's and, where libtpu is
installed, of a TPU's; nothing is run for them. Times are of this machine: the program that trains all adapters at once,
and one that trains each by itself, take turns, and medians of ratios are printed. What would make it look worse: small
kernels, large ranks, more adapters than rows; factors in float32 beside a base of 16 bits.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import told
from jlora import adapters


def layer(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ params[name] for name in "qkv")
    x = x + jnp.tanh(q * k + v) @ params["o"]
    return x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def model(params: Any, x: jax.Array) -> jax.Array:
    for kernels in params:
        x = layer(kernels, x)
    return x


def plan(d: int, layers: int, dtype: Any, where: Any = None) -> Any:
    hidden = 11 * d // 4
    sizes = dict.fromkeys("qkvo", (d, d)) | {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}
    return [{name: jax.ShapeDtypeStruct(size, dtype, sharding=where) for name, size in sizes.items()}] * layers


def spec(rank: int, dtype: Any = None, seed: int = 0) -> jlora.LoraSpec:
    axes = {"re:.*": jlora.Axes((0,), (1,))}
    return jlora.LoraSpec(targets="re:.*", axes=axes, rank=rank, dtype=dtype, seed=seed)


def counted(rows: int, tokens: int, d: int, members: int, rank: int, types: Any, where: Any) -> tuple[float, float]:
    """Bytes and FLOPs of a mixed batch over those of the base alone."""
    base_type, factor_type = types
    params = plan(d, 2, base_type)
    wrap = lambda params: jlora.wrap(params, spec(rank, factor_type))
    stacked = jax.eval_shape(lambda params: adapters.stack([wrap(params)] * members), params)
    placed = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
    x, ids = jax.ShapeDtypeStruct((rows, tokens, d), base_type), jax.ShapeDtypeStruct((rows,), jnp.int32)
    cost = lambda fn, *args: jax.jit(fn).lower(*map(placed, args)).compile().cost_analysis()
    plain, mixed = cost(model, params, x), cost(adapters.batched(model), stacked, ids, x)
    return mixed["bytes accessed"] / plain["bytes accessed"], mixed["flops"] / plain["flops"]


def tpu() -> Any:
    """One chip of a v5e, to compile for; None where libtpu is not installed."""
    if not importlib.util.find_spec("libtpu"):
        return None
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return jax.sharding.SingleDeviceSharding(devices[0])


def costs(d: int, members: int, rank: int) -> None:
    rows = []
    for name, where in {"CPU": None, "TPU v5e": tpu()}.items():
        if name != "CPU" and where is None:
            continue
        for types in ((jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
            names = " / ".join(jnp.dtype(dtype).name for dtype in types)
            for count, tokens in ((32, 1), (8, 512)):
                found = counted(count, tokens, d, members, rank, types, where)
                rows.append((name, names, f"{count} x {tokens}", *found))
    header = ("compiler", "base / factors", "rows x tokens", "bytes", "FLOPs")
    told(f"A mixed batch over the base alone: {members} adapters of rank {rank}, d {d}", header, rows, digits=3)


def grads(half: Any, frozen: Any, x: jax.Array) -> Any:
    loss = lambda half: jnp.square(jlora.apply(model)(jlora.combine(half, frozen), x)).mean()
    return jax.grad(loss)(half)


def flops_of(fn: Any, *args: Any) -> float:
    return fn.lower(*args).compile().cost_analysis()["flops"]


def timed(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def training(d: int, rank: int, tokens: int, turns: int) -> None:
    """Gradients of n adapters in one program, over n programs of one."""
    key = jax.random.key(0)
    params = jax.tree.map(lambda x: jax.random.normal(key, x.shape) / x.shape[0] ** 0.5, plan(d, 2, jnp.float32))
    rows = []
    for members in (1, 8, 32):
        trees = [jlora.wrap(params, spec(rank, seed=seed)) for seed in range(members)]
        x = jax.random.normal(key, (members, tokens, d))
        halves = jlora.partition(adapters.stack(trees))
        axes = tuple(map(adapters.axes, halves))
        every = jax.jit(jax.vmap(grads, in_axes=(*axes, 0), out_axes=axes[0]))
        one, apart = jax.jit(grads), [jlora.partition(tree) for tree in trees]
        together = functools.partial(every, *halves, x)
        by_itself = lambda one=one, apart=apart, x=x: [one(*pair, x[i]) for i, pair in enumerate(apart)]
        flops = flops_of(every, *halves, x) / members / flops_of(one, *apart[0], x[0])
        timed(together), timed(by_itself)
        ratios = [timed(together) / timed(by_itself) for _ in range(turns)]
        rows.append((members, flops, statistics.median(ratios), min(ratios), max(ratios)))
    header = ("adapters", "FLOPs an example", "time", "least", "most")
    told(f"Gradients of all in one program over one program each, d {d}, {tokens} tokens each", header, rows, digits=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"d": 4096, "members": 8, "rank": 16, "train_d": 512, "tokens": 64, "turns": 9}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    costs(args.d, args.members, args.rank)
    training(args.train_d, args.rank, args.tokens, args.turns)


if __name__ == "__main__":
    main()
