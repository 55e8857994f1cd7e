"""Tables of a wrapped tree, in text and in a notebook's HTML: `summary` and `explain`."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable
from typing import Any

import jax

from jlora.apply import RULES, run_on_wrapped
from jlora.checks import check_whole
from jlora.interpret.factored import Factored
from jlora.interpret.interpreter import Interpreter
from jlora.nodes import is_node
from jlora.paths import flatten, split_arrays
from jlora.qarray import is_qarray, nbits
from jlora.tree import TRAINABLE, has_nodes, labels, unwrap

MAX_ROWS = 200


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header, and lines that sum them up; prints as text, shows as HTML in a notebook."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...]

    def __str__(self) -> str:
        shown = [self.header, *self.rows[:MAX_ROWS]]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in shown]
        left = len(self.rows) - MAX_ROWS
        return "\n".join([*lines, *([f"... {left} more rows"] if left > 0 else []), *self.footer])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = lambda tag, row: "".join(f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in row)
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        footer = "<br>".join(html.escape(line) for line in self.footer)
        return f"<table><thead><tr>{cells('th', self.header)}</tr></thead><tbody>{body}</tbody></table><p>{footer}</p>"


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of an adapted kernel in a function: how it is computed, and why."""

    path: str
    shape: tuple[int, ...]
    kind: str
    factored: bool
    reason: str
    primitive: str
    source: str


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Table):
    """The table of `explain`, with its rows as values.

    Args:
      uses: every use of every adapted kernel.
      flops: of the forward pass, adapted and plain; None where XLA tells none.
      bytes_accessed: likewise.
    """

    uses: tuple[Use, ...] = ()
    flops: tuple[float, float] | None = None
    bytes_accessed: tuple[float, float] | None = None


def summary(tree: Any) -> Table:
    """What of a wrapped tree is adapted and what trains: shapes, ranks, parameters, percent.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> jlora.summary(jlora.wrap(params, jlora.LoraSpec(rank=2)))
      path          shape     adapter  rank  scale  trainable
      dense/kernel  (64, 32)  lora     2     8      192
      trainable 192 of 2,272, 8.45%; 768 B of 8.9 KiB
    """
    paths, leaves, _ = flatten(tree, is_node)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            check_whole("summary", path, leaf)
    rows = [_summary_row(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]
    arrays = [x for x in jax.tree.leaves(tree, is_leaf=is_qarray) if hasattr(x, "dtype")]
    trained = [x for x, mark in zip(*map(jax.tree.leaves, (tree, labels(tree))), strict=True) if mark == TRAINABLE]
    count, all_ = sum(map(_size, trained)), sum(map(_size, arrays))
    percent = f"{100 * count / max(all_, 1):.2f}%"
    total = (
        f"trainable {count:,} of {_short(all_)}, {percent}; "
        f"{_bytes(sum(map(nbits, trained)) / 8)} of {_bytes(sum(map(nbits, arrays)) / 8)}"
    )
    quantised = [x for x in arrays if is_qarray(x)]
    bits = sum(map(nbits, quantised)) / max(sum(map(_size, quantised)), 1)
    footer = (total, f"quantised: {len(quantised)} leaves, {bits:.2f} bits a weight") if quantised else (total,)
    return Table(("path", "shape", "adapter", "rank", "scale", "trainable"), tuple(rows), footer)


def _summary_row(path: str, node: Any) -> tuple[str, ...]:
    trained = jax.tree.leaves(jax.tree.map(lambda x, m: _size(x) if m == TRAINABLE else 0, node, labels(node)))
    settings = node.settings
    name = type(node).__name__.removesuffix("Param").lower().replace("trainable", "in full")
    rank, scale = str(settings.get("rank", "")), f"{settings['scaling']:g}" if "scaling" in settings else ""
    return path, str(tuple(node.shape)), name, rank, scale, f"{sum(trained):,}"


def explain(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Every use of every adapted kernel in a function: factored or dense, and why; FLOPs against the plain function.

    Traces `fn` abstractly: arrays may be `jax.ShapeDtypeStruct`s. FLOPs and bytes are XLA's count for the forward pass
    before optimisation, of one step of each loop.

    Args:
      fn: the unchanged function, as given to `jlora.apply`.
      tree: its wrapped first argument.
      *args, **kwargs: its other arguments.

    Raises:
      TypeError: if `tree` holds no wrapped node.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> table = jlora.explain(lambda p, x: x @ p["kernel"], params, jnp.ones((5, 4)))
      >>> [(use.path, use.kind, use.factored) for use in table.uses]
      [('kernel', 'dot', True)]
    """
    if not has_nodes(tree):
        raise TypeError("explain: no leaf of the second argument is wrapped; pass the tree that jlora.wrap returned")
    paths, leaves, _ = flatten(tree, is_node)
    nodes = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)}
    for path, node in nodes.items():
        check_whole("explain", path, node)
    shapes = {path: tuple(node.shape) for path, node in nodes.items()}
    uses: dict[Any, Use] = {}

    def told(walk: Interpreter, weight: Factored, eqn: Any, kind: str, reason: str = "") -> None:
        primitive = eqn.primitive.name if eqn is not None else "output"
        shape: Any = shapes.get(weight.name, weight.base.shape)  # a fused weight has a name that no leaf has
        use = Use(weight.name, tuple(shape), kind, not reason, reason, primitive, walk.source(eqn))
        uses.setdefault((walk.place(eqn), weight.name), use)

    def dense(walk: Interpreter, weight: Factored, eqn: Any, reason: str) -> Any:
        told(walk, weight, eqn, "other", reason)
        return weight.dense()

    interpreter = Interpreter(RULES, dense, told, inline=True)
    arrays, rebuild = split_arrays((tree, args, kwargs))

    def adapted(arrays: list[Any]) -> Any:
        tree, args, kwargs = rebuild(arrays)
        return _arrays_only(run_on_wrapped(fn, interpreter, None, True, False, tree, *args, **kwargs))

    def plain(arrays: list[Any]) -> Any:
        tree, args, kwargs = rebuild(arrays)
        silent = Interpreter(RULES, lambda _, weight, *__: weight.dense())  # walks only where leaves are quantised
        return _arrays_only(run_on_wrapped(fn, silent, None, True, False, unwrap(tree), *args, **kwargs))

    jax.eval_shape(adapted, arrays)
    return _explained(tuple(uses.values()), _cost(adapted, arrays), _cost(plain, arrays))


def _arrays_only(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]


def _cost(fn: Callable[..., Any], arrays: list[Any]) -> dict[str, float]:
    return jax.jit(fn).lower(arrays).cost_analysis() or {}


def _explained(uses: tuple[Use, ...], adapted: dict[str, float], plain: dict[str, float]) -> Explanation:
    pair = lambda name: (adapted[name], plain[name]) if name in adapted and name in plain else None
    flops, moved = pair("flops"), pair("bytes accessed")
    rows = tuple(
        (u.path, str(u.shape), u.kind, "factored" if u.factored else "dense", u.reason or u.primitive, _tail(u.source))
        for u in uses
    )
    dense = sum(not use.factored for use in uses)
    footer = [f"{len(uses)} {'use' if len(uses) == 1 else 'uses'}: {len(uses) - dense} factored, {dense} dense"]
    for name, values, show in (("FLOPs", flops, lambda n: _short(n, "G")), ("bytes", moved, _bytes)):
        if values:
            ratio = values[0] / max(values[1], 1)
            footer.append(f"forward {name}: {show(values[0])}, {ratio:.3f}x of the plain model's")
    header = ("path", "shape", "kind", "computed", "by", "at")
    return Explanation(header, rows, tuple(footer), uses, flops, moved)


def _tail(source: str) -> str:
    return source.rpartition("/")[2]


def _size(x: Any) -> int:
    return math.prod(x.shape)


def _short(n: float, giga: str = "B") -> str:
    """A count: of parameters, whose thousand millions are B, or of FLOPs, whose are G."""
    for unit, size in (("T", 1e12), (giga, 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return f"{int(n):,}"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
