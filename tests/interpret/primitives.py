"""What becomes of a kernel in each primitive of JAX: the table of ``docs/primitives.md``.

    python -m tests.interpret.primitives > docs/primitives.md

writes it anew; a test compares the two, so that a primitive which a new JAX brings, or renames, is seen.
"""

import jax
from jax.extend import core
from jax.extend.core import primitives

from jlora.apply import RULES
from jlora.interpret.contract import CONTRACTIONS
from jlora.interpret.control import CONTROL
from jlora.interpret.quantised import PRODUCTS
from jlora.interpret.stored import STORED

SEEN_AS = {
    "dot_general": "dot",
    "ragged_dot_general": "ragged_dot",
    "conv_general_dilated": "conv",
    "gather": "embedding, or a chosen expert",
}
HEAD = """# What each operation does with a kernel

Every program is a sequence of operations. JAX calls their kinds *primitives*. The names are not always those that you
write:

| you write | the operation |
| --- | --- |
| `x @ w`, `jnp.dot`, `jnp.einsum`, `jax.lax.dot_general`, `nn.Dense` | `dot_general` |
| `jax.lax.conv`, `nn.Conv` | `conv_general_dilated` |
| `table[ids]`, `jnp.take`, `nn.Embed` | `gather` |
| `jax.lax.ragged_dot`, for experts | `ragged_dot_general` |
| `w.T`, `w.reshape(...)`, `w[0]`, `w.astype(...)` | `transpose`, `reshape`, `slice`, `convert_element_type` |

Each of them meets a kernel in one of four ways:

- **factored**: the product with the base is as it was, and two small products are added. The weight is not built.
- **view**: the kernel is seen in another way, and *A* and *B* change in the same way. The next operation meets a
  kernel again.
- **recursed into**: it contains a function; the same rules are applied there.
- **dense**: `W + s A B` is computed, and a warning says so, with the reason.

A rule may not fit the axes of a kernel, such as a reshape that cuts an axis that OFT rotates. Then the kernel is
computed densely too. `jlora.explain` shows what each use in your program becomes.

The third column is for a {{doc}}`quantised base <guides/qlora>`. Where a view can be applied to the **quantised
values** and their scales, nothing is dequantised. Elsewhere the kernel is **dequantised**. A product dequantises it
where it is used, once forwards and once backwards.

The last column is how `jlora.sites` records the use. It follows views, and records the use where they end.

Some names are internal ones: `jit`, `pjit` and `closed_call` come from `jax.jit`; `remat`, `remat2` and `checkpoint`
from `jax.checkpoint`; `pvary` and `pcast` from `jax.shard_map`.

This table is made from the rules themselves, for jax {version}.

| operation | an adapted kernel | its base, if quantised | seen by `jlora.sites` as |
| --- | --- | --- | --- |
"""
TAIL = """
## All other operations

A kernel that enters a program that JAX cannot see into is dense: a Pallas kernel (`pallas_call`), `jax.ffi`, or
`custom_partitioning`. So is one that enters a function with its own derivative, `jax.custom_jvp` or `jax.custom_vjp`.

:::{{dropdown}} All others are dense: the list
{dense}.
:::
"""
ORDER = ("factored", "view", "recursed into")


def names() -> list[str]:
    """The primitives that JAX lists, and those that have rules."""
    listed = {x.name for x in vars(primitives).values() if isinstance(x, core.Primitive)}
    return sorted(listed | {*RULES})


def row(name: str) -> tuple[str, str, str]:
    """How an adapted kernel, a quantised base and `sites` meet a primitive."""
    if name in CONTROL:
        return "recursed into", "recursed into", "recursed into"
    base = "a product" if name in PRODUCTS else "quantised values" if name in STORED else "dequantised"
    if name in CONTRACTIONS:
        return "factored", base, SEEN_AS[name]
    return ("view", base, "a view") if name in RULES else ("dense", "dequantised", "other")


def table() -> str:
    rows = {name: row(name) for name in names()}
    listed = sorted((name for name in rows if rows[name][0] != "dense"), key=lambda name: ORDER.index(rows[name][0]))
    lines = [f"| `{name}` | {' | '.join(rows[name])} |" for name in listed]
    dense = ", ".join(f"`{name}`" for name, facts in rows.items() if facts[0] == "dense")
    return HEAD.format(version=jax.__version__) + "\n".join(lines) + "\n" + TAIL.format(dense=dense)


if __name__ == "__main__":
    print(table(), end="")
