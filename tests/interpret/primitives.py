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
    "gather": "embedding, or a choice",
}
HEAD = """# What becomes of a kernel in each primitive

Every program is a sequence of JAX's primitives, and each of them meets a kernel in one of four ways.

- **factored**: the product with the base is as it was, and two small products are added. The weight is not built.
- **view**: the kernel is seen another way, and its factors follow: the next primitive meets a kernel again.
- **recursed into**: the primitive holds a function of its own, and the walk goes on inside.
- **dense**: the kernel is computed, at the cost of a merged one, and a warning says so.

A rule may decline where a kernel's axes do not allow it, such as a reshape that cuts an axis of a rotation; then the
kernel is computed densely, and the warning tells why. `jlora.explain` shows what each use of a program becomes.

A quantised base is moved as **codes** where codes and scales follow a view, and becomes **numbers** where only they
can; a product makes the numbers where it needs them, once forwards and once backwards.

`jlora.sites` sees **views** as `jlora.apply` does, and records the use where they end.

This table is made from the rules themselves, for jax {version}.

| primitive | an adapted kernel | its base, if quantised | seen by `jlora.sites` as |
| --- | --- | --- | --- |
"""


def names() -> list[str]:
    """The primitives that JAX lists, and those that have rules."""
    listed = {x.name for x in vars(primitives).values() if isinstance(x, core.Primitive)}
    return sorted(listed | {*RULES})


def row(name: str) -> tuple[str, str, str]:
    """How an adapted kernel, a quantised base and `sites` meet a primitive."""
    if name in CONTROL:
        return "recursed into", "recursed into", "recursed into"
    base = "a product" if name in PRODUCTS else "codes" if name in STORED else "numbers"
    if name in CONTRACTIONS:
        return "factored", base, SEEN_AS[name]
    return ("view", base, "a view") if name in RULES else ("dense", "numbers", "other")


def table() -> str:
    rows = {name: row(name) for name in names()}
    lines = [f"| `{name}` | {' | '.join(facts)} |" for name, facts in rows.items() if facts[0] != "dense"]
    dense = ", ".join(f"`{name}`" for name, facts in rows.items() if facts[0] == "dense")
    return HEAD.format(version=jax.__version__) + "\n".join(lines) + f"\n\nAll others are dense: {dense}.\n"


if __name__ == "__main__":
    print(table(), end="")
