"""A gradient step of each variant over that of plain LoRA: time, FLOPs and temporary memory, on this machine.

Run with ``python -m benchmarks.variants``. The model is a stack of square layers with a tanh behind each; programs take
turns, and medians of ratios are printed. ``--table`` prints the rows of the second table of
docs/reference/variants.md instead, which takes no clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.step_time import interleaved
from jlora.variants import VARIANTS, AdaptedParam

SPECS: dict[str, dict[str, Any]] = {name: {"variant": name} for name in VARIANTS} | {
    "lora, pissa": {"init": "pissa_niter_2"},
    "loha, rank 4": {"variant": "loha", "rank": 4},
    "lokr, rank 2": {"variant": "lokr", "rank": 2},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model: `layers` kernels of (d, d), as many `tokens`, and the `rank`."""

    layers: int = 4
    d: int = 1024
    tokens: int = 4096
    rank: int = 16
    dtype: str = "float32"

    def inputs(self) -> tuple[list[Any], jax.Array]:
        rng = np.random.default_rng(0)
        noise = lambda *shape: jnp.asarray(rng.normal(size=shape), self.dtype)
        kernels = [{"kernel": noise(self.d, self.d) / np.sqrt(self.d).astype(self.dtype)} for _ in range(self.layers)]
        return kernels, noise(self.tokens, self.d)


#: Of docs/reference/variants.md.
TABLE = Sizes(layers=2)


def loss(params: list[Any], x: jax.Array) -> jax.Array:
    for p in params:
        x = jnp.tanh(x @ p["kernel"])
    return jnp.mean(x * x)


def step(settings: dict[str, Any], sizes: Sizes, inputs: tuple[list[Any], jax.Array]) -> tuple[tuple[Any, ...], Any]:
    """The arguments and the compiled program of a gradient step."""
    halves = jlora.partition(jlora.wrap(inputs[0], jlora.LoraSpec(**({"rank": sizes.rank} | settings))))
    program = jax.jit(jax.value_and_grad(lambda t, f, x: jlora.apply(loss)(jlora.combine(t, f), x)))
    arguments = (*halves, inputs[1])
    return arguments, program.lower(*arguments).compile()


def flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def trained(cls: type[AdaptedParam], sizes: Sizes = TABLE) -> int:
    """Numbers that train in one kernel."""
    kernel = {"kernel": jax.ShapeDtypeStruct((sizes.d, sizes.d), jnp.float32)}
    tree = jax.eval_shape(lambda k: jlora.wrap(k, jlora.LoraSpec(variant=cls, rank=sizes.rank)), kernel)
    return sum(x.size for x in jax.tree.leaves(jlora.partition(tree)[0]))


def paper(cls: type[AdaptedParam]) -> str:
    """A link to the first paper that the class names."""
    text = inspect.getdoc(cls) or ""
    number = re.search(r"arXiv:(\d+\.\d+)", text)
    if number:
        return f"[arXiv:{number[1]}](https://arxiv.org/abs/{number[1]})"
    address = re.search(r"https://openreview\.net/\S+\w", text)
    return f"[OpenReview]({address[0]})" if address else ""


def method(cls: type[AdaptedParam]) -> str:
    """Of PEFT's files; variants without files of their own are written as plain LoRA."""
    return f"`{cls.FORM.method if cls.FORM else 'LORA'}`"


def flops_over_lora() -> dict[str, float]:
    inputs = TABLE.inputs()
    costs = {name: flops(step({"variant": name}, TABLE, inputs)[1]) for name in VARIANTS}
    return {name: cost / costs["lora"] for name, cost in costs.items()}


def rows() -> list[str]:
    """Of the table in the docs: a variant, numbers that train, FLOPs over LoRA's, PEFT's method, paper."""
    costs = flops_over_lora()
    return [
        f'| `"{name}"` | {trained(cls):,} | {costs[name]:.2f} | {method(cls)} | {paper(cls)} |'
        for name, cls in VARIANTS.items()
    ]


def timed(sizes: Sizes, rounds: int) -> None:
    inputs = sizes.inputs()
    steps: dict[str, Callable[[], Any]] = {}
    costs = {}
    for name, settings in SPECS.items():
        arguments, program = step(settings, sizes, inputs)
        steps[name] = lambda program=program, arguments=arguments: program(*arguments)
        costs[name] = flops(program), program.memory_analysis().temp_size_in_bytes
    times = interleaved(steps, rounds)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {sizes.dtype}: {sizes.layers} layers, d={sizes.d},")
    print(f"{sizes.tokens} tokens, rank {sizes.rank}: a gradient step over that of plain LoRA")
    print(f"{'':14s} {'time':>6s} {'FLOPs':>7s} {'memory':>7s}")
    for name, seconds in times.items():
        time = statistics.median(a / b for a, b in zip(seconds, times["lora"], strict=True))
        cost, memory = (mine / base for mine, base in zip(costs[name], costs["lora"], strict=True))
        print(f"{name:14s} {time:5.2f}x {cost:6.3f}x {memory:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="print the rows of docs/reference/variants.md")
    args = vars(parser.parse_args())
    rounds, is_table = args.pop("rounds"), args.pop("table")
    if is_table:
        print("\n".join(rows()))
    else:
        timed(Sizes(**args), rounds)


if __name__ == "__main__":
    main()
