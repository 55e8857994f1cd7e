"""LoRA on quantised bases against LoRA on the float32 one: memory, time and held-out perplexity of a real fine-tune.

    python -m benchmarks.qlora                          every base that the file of results lacks
    python -m benchmarks.qlora --rows dense nf4         these
    python -m benchmarks.qlora --rows dense "nf4, QPiSSA" --steps 160 --rank 16 --json benchmarks/qlora_long.json
    python -m benchmarks.qlora --rows                   prints the table of what is there
    python -m benchmarks.qlora --rows --noise 0.0935    and the perplexity with noise of this size on dense kernels

SmolLM2-135M-Instruct learns from Hamlet by the functions of `jlora.examples.hamlet`: the same windows, order of
batches, first adapters and held-out windows for every base. Each base's results are written when it is done. A step is
timed in turns with a dense one, and the median of the ratios is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.step_time import interleaved
from jlora.examples import hamlet
from jlora.examples.fetch import HAMLET, SMOLLM2, fetch
from jlora.examples.smollm2 import PRETRAINED, load_params, load_tokenizer, perplexity
from jlora.nodes.qarray import nbits

BASES = {
    "dense": [],
    "nf4": ["--quantize", "nf4"],
    "nf4, double": ["--quantize", "nf4", "--double-quant"],
    "int4": ["--quantize", "int4"],
    "int8": ["--quantize", "int8"],
    "fp8": ["--quantize", "fp8"],
    "nf4, LoftQ": ["--quantize", "nf4"],
    "nf4, QPiSSA": ["--quantize", "nf4"],
    "nf4, QERA": ["--quantize", "nf4"],
}
CALIBRATION = 96  # windows of the training set from which QERA knows the inputs
HEADER = [
    "base",
    "bits a weight",
    "tree, MB",
    "arguments, MB",
    "temporaries, MB",
    "perplexity before",
    "perplexity after",
    "over dense",
    "step over dense",
]


class Step:
    """The compiled training step on a tree, which each call takes on."""

    def __init__(self, tree: Any, batch: np.ndarray, args: argparse.Namespace) -> None:
        tx = hamlet.optimizer(tree, args)
        self.tree, self.state, self.batch = tree, tx.init(tree), batch
        self.program = hamlet.train_step(PRETRAINED, tx).lower(tree, self.state, batch).compile()

    def __call__(self) -> jax.Array:
        self.tree, self.state, loss = self.program(self.tree, self.state, self.batch)
        return loss


def cost(name: str, start: Any, batch: np.ndarray, rounds: int, args: argparse.Namespace) -> dict[str, float]:
    """What a step takes on this base, in bytes and in time; `start` makes the wrapped tree of a base."""
    tree = start(name)
    found = {"bits": jlora.quant.bits(tree) if BASES[name] else 32, "tree": sum(map(nbits, jax.tree.leaves(tree))) // 8}
    trees = {"dense": tree} if name == "dense" else {"dense": start("dense"), name: tree}
    steps = {base: Step(tree, batch, args) for base, tree in trees.items()}
    memory = steps[name].program.memory_analysis()
    times = interleaved(steps, rounds)
    return found | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": statistics.median(times[name]),
        "over dense": statistics.median(a / b for a, b in zip(times[name], times["dense"], strict=True)),
    }


def learnt(tree: Any, train_set: np.ndarray, held_out: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Held-out perplexity before and after training."""
    before = perplexity(tree, held_out)
    tree, _ = hamlet.train(PRETRAINED, tree, train_set, args)
    return {"before": before, "after": perplexity(tree, held_out)}


def begun(name: str, weights: Any, train_set: np.ndarray, args: argparse.Namespace) -> Any:
    """The wrapped tree of a base, as training begins."""
    params = jax.tree.map(jnp.array, weights)
    tree = hamlet.adapt(PRETRAINED, params, args)
    return STARTS[name](tree, params, train_set) if name in STARTS else tree


def from_inputs(tree: Any, params: Any, train_set: np.ndarray) -> Any:
    """The tree with factors by QERA."""
    forward = lambda params, ids: PRETRAINED.apply({"params": params}, ids)
    batches = [train_set[i : i + hamlet.BATCH] for i in range(0, CALIBRATION, hamlet.BATCH)]
    return jlora.quant.qera(forward, tree, params, batches, niter=4)


STARTS = {
    "nf4, LoftQ": lambda tree, params, _: jlora.quant.loftq(tree, params, iterations=5, niter=4),
    "nf4, QPiSSA": lambda tree, params, _: jlora.quant.qpissa(tree, params, iterations=5, niter=4),
    "nf4, QERA": from_inputs,
}


def noisy(weights: Any, size: float) -> Any:
    """The weights with Gaussian noise on linear kernels, of this size in the norm of each run of 64 inputs."""
    rng = np.random.default_rng(0)

    def with_noise(kernel: np.ndarray) -> np.ndarray:
        runs = kernel.reshape(len(kernel), -1, 64, kernel.shape[-1])
        scale = size * np.sqrt((runs**2).mean(2, keepdims=True))
        return (runs + scale * rng.normal(size=runs.shape)).astype(kernel.dtype).reshape(kernel.shape)

    return jax.tree.map(lambda x: with_noise(x) if x.ndim == 3 else x, weights)


def data(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the play to train on and held-out ones, as in the example."""
    text = (fetch(HAMLET) / "hamlet.txt").read_text(encoding="utf-8")
    return hamlet.split(hamlet.windows(load_tokenizer(folder).encode(text).ids, hamlet.LENGTH))


def known(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The results in the file, if they are of these settings."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{path} has results of {found['settings']}, not {settings}: give another --json")
    return found["rows"]


def table(rows: dict[str, dict[str, float]]) -> str:
    """The results as a table in Markdown."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for name in filter(rows.__contains__, BASES):
        row, dense = rows[name], rows.get("dense")
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("tree", "arguments", "temporaries")]
        change = f"{row['after'] / dense['after'] - 1:+.1%}" if dense else "?"
        perplexities = [f"{row['before']:.2f}", f"{row['after']:.2f}", change]
        lines.append([name, f"{row['bits']:.2f}", *sizes, *perplexities, f"{row['over dense']:.2f}x"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measures the rows, writing each as it is done, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--rows",
        nargs="*",
        choices=BASES,
        metavar="BASE",
        help=f"of {', '.join(map(repr, BASES))} (those not yet there)",
    )
    add("--steps", type=int, default=40)
    add("--rank", type=int, default=8)
    add("--held-out", type=int, help="held-out windows (all)")
    add("--rounds", type=int, default=5, help="of timing (%(default)s)")
    add("--noise", type=float, metavar="SIZE", help="over the norm of the kernels, as that of nf4's error")
    add("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    settings = {"steps": given.steps, "rank": given.rank, "held_out": given.held_out, "jax": jax.__version__}
    rows = known(given.json, settings)
    todo = [name for name in BASES if name not in rows] if given.rows is None else given.rows
    if todo or given.noise:
        folder = fetch(SMOLLM2)
        weights, (train_set, held_out) = load_params(folder), data(folder)
        held_out = held_out[: given.held_out]
        asked = ["--steps", str(given.steps), "--rank", str(given.rank)]
        args = {name: hamlet.parse([*asked, *flags]) for name, flags in BASES.items()}
        start = lambda name: begun(name, weights, train_set, args[name])
    for name in todo:
        row = cost(name, start, train_set[: hamlet.BATCH], given.rounds, args[name])
        rows[name] = row | learnt(start(name), train_set, held_out, args[name])
        given.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        print(f"{name}: {rows[name]}", flush=True)
    if given.noise:
        print(f"noise of {given.noise:.2%}: perplexity {perplexity(noisy(weights, given.noise), held_out):.2f}")
    print(table(rows))


if __name__ == "__main__":
    main()
