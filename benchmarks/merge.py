"""Time of `jlora.merge` over that of a copy of the tree: bfloat16 kernels of one size.

What would make it look worse: a machine whose copies are fast beside its products; a larger rank; kernels that are
each of another shape, since each shape is compiled.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import told


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - start, time.process_time() - cpu


def tree_of(count: int, size: int, rank: int) -> Any:
    keys = jax.random.split(jax.random.key(0), count)
    make = jax.jit(lambda key: (jax.random.normal(key, (size, size)) * size**-0.5).astype(jnp.bfloat16))
    tree = jlora.wrap({f"layer_{i}": {"kernel": make(key)} for i, key in enumerate(keys)}, jlora.LoraSpec(rank=rank))
    trainable, frozen = jlora.partition(tree)
    return jlora.combine(jax.tree.map(lambda x: jnp.full_like(x, 0.02), trainable), frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"count": 28, "size": 4096, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    tree = tree_of(args.count, args.size, args.rank)
    jlora.merge({"one": tree["layer_0"]})  # compiles
    copy = seconds(lambda: jax.tree.map(jnp.copy, tree))
    kept = seconds(lambda: jlora.merge(tree))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jlora.merge({"one": tree_of(1, args.size, args.rank)["layer_0"]}, donate=True)
    given = seconds(lambda: jlora.merge(tree, donate=True))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    rows = [(name, wall, cpu, 1e3 * cpu / args.count) for name, (wall, cpu) in
            (("copy", copy), ("merge", kept), ("merge, donated", given))]  # fmt: skip
    told(
        f"Merging {args.count} bfloat16 kernels of {args.size} x {args.size}, rank {args.rank}; donated, the peak of "
        f"memory is {more:.0f} MB above that of the calls before",
        ("", "seconds", "CPU seconds", "CPU ms a kernel"),
        rows,
    )


if __name__ == "__main__":
    main()
