"""The TPU compiler's cycles of the products that share an input, over those of frozen kernels; no TPU is needed.

One group of kernels on one chip: forward and backward pass, a bfloat16 base, float32 factors, compiled ahead of time
by libtpu (``pip install libtpu``, of JAX's version). The cycles are the compiler's own model: it puts the same
product at 11.8 or at 14.3 million of them, so less than 5% of difference means nothing. What would make it look
worse: other layouts of the inputs, small kernels, few tokens.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jlora
from benchmarks import told
from benchmarks.residuals import textbook

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
GROUPS = {"qkv": (3, 4096), "gate+up": (2, 11008)}
WIDTH, RANK = 4096, 16


def by_hand(x: jax.Array, nodes: list[Any]) -> list[jax.Array]:
    """LoRA whose kernels share x @ [A ...], written by hand."""
    joint = jnp.concatenate([node.lora_a.astype(x.dtype) for node in nodes], -1)
    middles = jnp.split(x @ joint, len(nodes), -1)
    products = [x @ jax.lax.stop_gradient(node.base) for node in nodes]
    return [
        y + (node.scale * h) @ node.lora_b.astype(x.dtype) for y, h, node in zip(products, middles, nodes, strict=True)
    ]


def plain(kernels: list[Any], x: jax.Array) -> list[jax.Array]:
    return [x @ kernel for kernel in kernels]


FORMS: dict[str, Callable[..., list[jax.Array]]] = {
    "textbook": lambda nodes, x: [textbook(x, node) for node in nodes],
    "grouped by hand": lambda nodes, x: by_hand(x, nodes),
    "jlora": jlora.apply(plain),
    "jlora, merged": jlora.apply(plain, strategy="merged"),
}


def cycles(fn: Callable[..., Any], device: Any, *args: Any) -> int:
    """What the compiler estimates for the operations of a program without loops, summed."""
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    text = jax.jit(fn).lower(*placed).compile().as_text()
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def pulled_back(fn: Callable[..., Any], cotangents: Any, *args: Any) -> Any:
    """The results of a function, and what flows back to its arguments."""
    results, back = jax.vjp(fn, *args)
    return results, back(cotangents)


def ratios(device: Any, group: str, tokens: int) -> list[float]:
    """Cycles of each form, and of kernels trained in full, over those of frozen kernels."""
    count, features = GROUPS[group]
    kernels = [jax.ShapeDtypeStruct((WIDTH, features), jnp.bfloat16)] * count
    axes = {str(i): jlora.Axes(0, 1) for i in range(count)}
    spec = jlora.LoraSpec(targets=[*axes], rank=RANK, axes=axes)
    trainable, rest = jlora.partition(jax.eval_shape(lambda kernels: jlora.wrap(kernels, spec), kernels))
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.bfloat16)
    cts = [jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16)] * count
    floor = cycles(lambda cts, x, p: pulled_back(lambda x: plain(p, x), cts, x), device, cts, x, kernels)

    def adapted(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda cts, t, x, rest: pulled_back(lambda t, x: form(jlora.combine(t, rest), x), cts, t, x)

    found = [cycles(adapted(form), device, cts, trainable, x, rest) for form in FORMS.values()]
    found.append(cycles(functools.partial(pulled_back, plain), device, cts, kernels, x))
    return [one / floor for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 16384])
    args = parser.parse_args()
    rows = []
    for chip in args.chips:
        device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
        for group in GROUPS:
            rows += [(f"{chip} {group}, {n} tokens", *ratios(device, group, n)) for n in args.tokens]
    told(f"TPU cycles over frozen kernels, {WIDTH} wide, rank {RANK}", ("", *FORMS, "full"), rows)


if __name__ == "__main__":
    main()
