"""What a checkpoint costs: bytes on the disk, memory and time, against the adapter's bytes and the base's.

    python benchmarks/checkpoint_bytes.py --gigabytes 10

A bfloat16 base over eight virtual devices with an adapter of rank 16 and Adam's state: a step is saved by
`jlora.checkpoint.Checkpoints` and loaded again. Memory is anonymous memory of the process above that before the call,
at its peak (Linux); bytes read and written are those that the process asked of the system.
"""

import argparse
import os
import re
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jlora

D, HIDDEN = 4096, 11008


def number(path: str, pattern: str) -> int:
    """A number that the system tells of this process."""
    return int(re.search(pattern, Path(path).read_text())[1])


@contextmanager
def measured(name: str):
    """Prints the memory at its peak, the bytes read and written, and the time of a block."""
    anonymous = lambda: number("/proc/self/status", r"RssAnon:\s+(\d+)") / 1e3
    asked = lambda way: number("/proc/self/io", rf"{way}char: (\d+)") / 1e6
    start, peak, done = anonymous(), [0.0], threading.Event()
    read, written = asked("r"), asked("w")

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    amounts = f"{asked('r') - read:,.1f} | {asked('w') - written:,.1f} | {peak[0]:,.0f}"
    print(f"| {name} | {seconds:.2f} | {amounts} |", flush=True)


def base(gigabytes: float) -> dict:
    """Layers of a transformer of Llama 2's size, as many as fit, filled with different numbers."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    at = NamedSharding(mesh, PartitionSpec("data", "model"))
    shapes = {"query": (D, D), "value": (D, D), "up": (D, HIDDEN), "down": (HIDDEN, D)}
    count = max(1, round(gigabytes * 1e9 / sum(2 * np.prod(shape) for shape in shapes.values())))
    fill = jax.jit(lambda i, shape: jnp.full(shape, i, jnp.bfloat16), static_argnums=1, out_shardings=at)
    layer = lambda i: {name: {"kernel": fill(i, shape)} for name, shape in shapes.items()}
    return jax.block_until_ready({f"layer_{i}": layer(i) for i in range(count)})


@jax.jit
def noisy(tree):
    """The floating-point arrays of a tree with noise added."""
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
    return jax.tree.map(lambda x: noise(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def megabytes(tree) -> float:
    """The size of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6


def main() -> None:
    """Saves and loads, twice: the first calls compile the program that samples the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10, help="size of the base (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    params = base(given.gigabytes)
    tree = jlora.wrap(params, jlora.LoraSpec(rank=given.rank))
    half, frozen = jlora.partition(tree)
    half = jax.block_until_ready(noisy(half))  # Orbax compresses: zeros would take no room
    tree, state = jlora.combine(half, frozen), noisy(jlora.optimizer(optax.adam(1e-4), tree).init(tree))
    adapter = megabytes(half)
    print(f"base {megabytes(params):,.0f} MB, adapter {adapter:.1f} MB, optimizer's state {megabytes(state):.1f} MB")
    print("| call | seconds | MB read | MB written | peak memory above the start, MB |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = jlora.checkpoint.Checkpoints(folder)
        for step, when in enumerate(("first", "second")):
            with measured(f"{when} save, until it returns"):
                checkpoints.save(step, tree, state=state)
            with measured(f"{when} save, the rest in the background"):
                checkpoints.wait()
        sizes = [path.stat().st_size for path in Path(folder, "1").rglob("*") if path.is_file()]
        print(f"| on the disk, one step | | | {sum(sizes) / 1e6:,.1f} | |")
        with measured("load of adapter and state"):
            jax.block_until_ready(checkpoints.load(params, state=state)[1:3])
        with measured("load of the adapter alone"):
            jax.block_until_ready(jlora.checkpoint.load(f"{folder}/1", params))


if __name__ == "__main__":
    main()
