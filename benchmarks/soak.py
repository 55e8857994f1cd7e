"""Trains, swaps adapters and saves in one process for thousands of steps: what is compiled, and what stays in memory.

    python benchmarks/soak.py --steps 3000

prints, for each tenth of the run, how many programs were compiled in it and how much memory the process holds. After
the first tenth nothing may be compiled, and memory may not grow.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import psutil
from jax._src import monitoring

import jlora

COMPILED = "/jax/core/compile/backend_compile_duration"


def model(params, x):
    def layer(h, kernel):
        return h + jnp.tanh(h @ kernel), None

    return jax.lax.scan(layer, x @ params["embed"]["kernel"], params["layers"]["kernel"])[0] @ params["head"]["kernel"]


def kernels(width=64, depth=3):
    keys = iter(jax.random.split(jax.random.key(0), 3))
    noise = lambda *shape: jax.random.normal(next(keys), shape) / shape[-2] ** 0.5
    shapes = {"embed": (16, width), "layers": (depth, width, width), "head": (width, 8)}
    return {name: {"kernel": noise(*shape)} for name, shape in shapes.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--swap-every", type=int, default=10)
    args = parser.parse_args()
    compiled = []
    monitoring.register_event_duration_secs_listener(lambda event, *_, **__: event == COMPILED and compiled.append(1))
    x = jax.random.normal(jax.random.key(1), (8, 16))
    params = kernels()
    spec = jlora.LoraSpec(rank=4, axes={"layers/kernel": jlora.Axes((1,), (2,), (0,))})
    trees = [jlora.wrap(params, spec, key=jax.random.key(n)) for n in range(3)]
    adapters, base = [jlora.partition(tree)[0] for tree in trees], jlora.partition(trees[0])[1]
    tx = jlora.optimizer(optax.adamw(1e-3), trees[0])
    states = [tx.init(tree) for tree in trees]

    @jax.jit
    def step(tree, state, x):
        loss = lambda tree: jnp.mean(jlora.apply(model)(tree, x) ** 2)
        value, grads = jlora.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    process, which, before = psutil.Process(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for n in range(args.steps):
            if n % args.swap_every == 0:
                which = (which + 1) % len(adapters)
            tree = jlora.combine(adapters[which], base)
            tree, states[which], _ = step(tree, states[which], x)
            adapters[which], _ = jlora.partition(tree)
            if n % args.save_every == 0:
                jlora.checkpoint.save(Path(folder) / f"adapter_{which}", tree, overwrite=True)
                jlora.checkpoint.load(Path(folder) / f"adapter_{which}", params)
            if (n + 1) % (args.steps // 10) == 0:
                gc.collect()
                held = process.memory_info().rss / 2**20
                print(f"{n + 1:6d} steps  {len(compiled) - before:4d} compiled  {held:8.1f} MiB", flush=True)
                before = len(compiled)


if __name__ == "__main__":
    main()
