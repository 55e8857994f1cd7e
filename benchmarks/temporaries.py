"""The temporaries of a compiled gradient step over those of the frozen model, by CPU's compiler; nothing is run.

Llama-like layers, bfloat16, LoRA on all linear layers, each layer under a policy of `jax.checkpoint`. The floor is a
gradient of the input alone. What would make it look worse: few tokens, where the kernels and their gradients count.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

import jlora
from benchmarks import told
from benchmarks.residuals import POLICIES, layer, shapes_of, textbook


def model(one: Callable[..., Any], policy: Any) -> Callable[..., jax.Array]:
    """A loss of (trees of the layers, x)."""
    one = one if policy is None else jax.checkpoint(one, policy=policy)

    def run(trees: list[Any], x: jax.Array) -> jax.Array:
        for tree in trees:
            x = one(tree, x)
        return jnp.square(x.astype(jnp.float32)).mean()

    return run


def temporaries(fn: Callable[..., Any], *args: Any) -> int:
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def measured(policy: Any, layers: int, d: int, tokens: int) -> tuple[float, ...]:
    """Gigabytes of the floor, and textbook, jlora and full fine-tuning over it."""
    shapes = shapes_of(d, 11 * d // 4)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    norms = {name: jax.ShapeDtypeStruct((d,), jnp.bfloat16) for name in ("norm1", "norm2")}
    spec = jlora.LoraSpec(targets=[*shapes], axes={name: jlora.Axes(0, 1) for name in shapes}, rank=16)
    trainable, frozen = jlora.partition(jax.eval_shape(lambda params: jlora.wrap(params, spec), params))
    x = jax.ShapeDtypeStruct((8, tokens // 8, d), jnp.bfloat16)
    named = policy is POLICIES["save_only_these_names"]
    plain = functools.partial(layer, named=named)

    def adapted(one: Callable[..., Any]) -> Callable[..., Any]:
        loss = model(one, policy)

        def of_factors(ts: Any, x: Any, fs: Any, norms: Any) -> Any:
            return loss(
                [jlora.combine(t, f) | jax.lax.stop_gradient(n) for t, f, n in zip(ts, fs, norms, strict=True)], x
            )

        return jax.value_and_grad(of_factors, argnums=(0, 1))

    many = lambda tree: [tree] * layers
    floor = temporaries(
        jax.value_and_grad(lambda x, trees: model(plain, policy)(jax.lax.stop_gradient(trees), x)),
        x,
        many(params | norms),
    )
    forms = (functools.partial(plain, linear=textbook), jlora.apply(plain))
    found = [temporaries(adapted(one), many(trainable), x, many(frozen), many(norms)) for one in forms]
    found.append(temporaries(jax.value_and_grad(model(plain, policy), argnums=(0, 1)), many(params | norms), x))
    return floor / 1e9, *(one / floor for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 4, "d": 2048, "tokens": 16384}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    policies = POLICIES | {"nothing_saveable": checkpoint_policies.nothing_saveable}
    rows = [(name, *measured(policy, args.layers, args.d, args.tokens)) for name, policy in policies.items()]
    told(
        f"Temporaries of a gradient step, {args.layers} layers, d {args.d}, {args.tokens} tokens",
        ("", "floor, GB", "textbook", "jlora", "full"),
        rows,
    )


if __name__ == "__main__":
    main()
