"""How each use of an adapted kernel is computed, and why."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jlora.apply import RULES, Settings, inner_settings, run_on_wrapped
from jlora.interpret.factored import Factored
from jlora.interpret.interpreter import Interpreter
from jlora.interpret.ragged import BY_ROWS
from jlora.interpret.sites import observe
from jlora.nodes.checks import check_whole
from jlora.nodes.node import is_node
from jlora.report.effect import without_effect
from jlora.report.groups import grouped, name_of, title
from jlora.report.html import Gauge, Row, page, trained_gauges
from jlora.report.text import Table, with_counts
from jlora.report.totals import Totals, in_bytes, short, totals
from jlora.targets.paths import flatten, split_arrays
from jlora.tree import has_nodes, unwrap


class Estimates(NamedTuple):
    """FLOPs of a use in a training step, by strategy, beside those of the same product with a frozen kernel.

    Those have a product each forward and backward, 4 T m n for T tokens and a kernel m x n. Through factors of rank r
    there are 6 T r (m + n) more; merged, 4 T r (m + n) + 4 m n r. In a loop they are those of one step; M is made once
    a call, so that of many steps merged ones take less than the sum.
    """

    frozen: float
    factored: float
    merged: float


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of an adapted kernel in a function: how it is computed, and why.

    Args:
      group: the paths of the kernels that share its input: one x @ [A ...] is computed for all of them.
      note: what of that is to be said.
      strategy: of `apply` by which it is computed; ``"dense"`` where it has no factored rule; of a function of
        `jlora.adapters.batched` it is ``"masks"`` or ``"gathered"``.
      estimates: what each strategy costs; None where the use is no product.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    factored: bool
    reason: str
    primitive: str
    source: str
    group: tuple[str, ...] = ()
    note: str = ""
    strategy: str = "factored"
    estimates: Estimates | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Table):
    """The table of `explain`, with its rows as values.

    Args:
      uses: every use of every adapted kernel.
      flops: of the forward pass, adapted and plain; None where XLA tells none.
      bytes_accessed: likewise.
      totals: parameters and bytes of the tree.
      without_effect: what trains without effect, by path, with the reason: it is not used, its use does not reach the
        result, or no gradient comes back to it.
      plain: the paths of kernels that could be adapted, and are neither adapted nor trained in full.
    """

    uses: tuple[Use, ...] = ()
    flops: tuple[float, float] | None = None
    bytes_accessed: tuple[float, float] | None = None
    totals: Totals | None = None
    without_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plain: tuple[str, ...] = ()

    def _text(self) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
        """Uses that are alike but for numbers in their paths are one row; a dense one's reason stands below it."""
        cells = lambda use: (str(use.shape), use.kind, _how(use), _line(use.source), _why(use))
        found: Any = grouped((name_of(use.path), 1, cells(use)) for use in self.uses)
        rows = [(title(name), *facts) for name, _, (*facts, _) in found]
        header = ("path", "shape", "kind", "computed", "at")
        return with_counts(header, rows, [count for _, count, _ in found]), ["", *(why for *_, (*_, why) in found)]

    def _repr_html_(self) -> str:
        return _page(self)


def explain(fn: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Every use of every adapted kernel in a function: factored or dense, and why; FLOPs against the plain function.

    Traces `fn` abstractly: arrays may be of type `jax.ShapeDtypeStruct`. FLOPs and bytes are XLA's count for the
    forward pass before optimisation, of one step of each loop. Prints as text of eighty columns; in a notebook it shows
    as a tree that folds. Below it are lines for what trains without effect, and for kernels that could be adapted
    and are not.

    Args:
      fn: the unchanged function, as given to `jlora.apply`; or a loss that calls `jlora.apply`, whose `rng` and
        `strategy` are those explained; or what `jlora.adapters.batched` returns, with its arguments.
      tree: its wrapped first argument.
      *args, **kwargs: its other arguments.

    Returns:
      An `Explanation`: `uses` has a `Use` for each use of an adapter, with its `group`, `strategy` and `estimates`.

    Raises:
      TypeError: if `tree` holds no wrapped node.
      ValueError: if a node lacks some of its arrays, as in one half of `jlora.partition`.

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

    def told(
        walk: Interpreter, weight: Factored, eqn: Any, kind: str, group: Any, strategy: str = "dense", reason: str = ""
    ) -> None:
        primitive = eqn.primitive.name if eqn is not None else "output"
        shape: Any = shapes.get(weight.name, weight.base.shape)  # a fused weight has a name that no leaf has
        note = _by_rows(weight, strategy) or _grouped(weight, group)
        facts = (primitive, walk.source(eqn), group, note, strategy, _estimates(weight, eqn))
        use = Use(weight.name, tuple(shape), kind, not reason, reason, *facts)
        uses.setdefault((walk.place(eqn), weight.name), use)

    def dense(walk: Interpreter, weight: Factored, eqn: Any, reason: str) -> Any:
        told(walk, weight, eqn, "other", (), reason=reason)
        return weight.dense()

    always = BY_ROWS if hasattr(fn, "run_by") else {}
    interpreter = Interpreter(RULES, dense, told, inline=True, always=always)
    on_base = getattr(fn, "on_base", fn)
    arrays, rebuild = split_arrays((tree, args, kwargs))

    def run(walk: Interpreter, settings: Settings) -> Callable[[list[Any]], list[Any]]:
        def adapted(arrays: list[Any]) -> list[Any]:
            tree, args, kwargs = rebuild(arrays)
            return _arrays_only(_runner(fn, walk, settings)(tree, *args, **kwargs))

        return adapted

    def plain(arrays: list[Any]) -> Any:
        tree, args, kwargs = rebuild(arrays)
        return _arrays_only(run_on_wrapped(on_base, _silent(always), Settings(), unwrap(tree), *args, **kwargs))

    with inner_settings() as found:
        jax.eval_shape(run(interpreter, Settings()), arrays)
    settings = _settings(found)
    if settings != Settings():
        uses.clear()
        jax.eval_shape(run(interpreter, settings), arrays)

    def on_tree(tree: Any, rest: Any) -> list[Any]:  # without groups, in which adapters share products
        whole = Interpreter({}, lambda _, weight, *__: weight.anywhere().dense(), inline=True, always=always)
        return _arrays_only(_runner(fn, whole, Settings())(tree, *rest[0], **rest[1]))

    rest_arrays, rest_of = split_arrays((args, kwargs))
    names = [use.path for use in uses.values()]
    idle = without_effect(lambda tree, arrays: on_tree(tree, rest_of(arrays)), tree, rest_arrays, names)
    costs = _cost(run(_silent(always), settings), arrays), _cost(plain, arrays)
    return _explained(
        tuple(uses.values()), *costs, totals(tree), idle, _not_adapted(on_base, tree, nodes, args, kwargs)
    )


def _runner(fn: Any, walk: Interpreter, settings: Settings) -> Callable[..., Any]:
    """The function on wrapped trees; one of `jlora.adapters.batched` on all adapters."""
    of = lambda inner: functools.partial(run_on_wrapped, inner, walk, settings)
    return fn.run_by(of) if hasattr(fn, "run_by") else of(fn)


def _silent(always: Mapping[str, Any]) -> Interpreter:
    return Interpreter(RULES, lambda _, weight, *__: weight.dense(), inline=True, always=always)


def _settings(found: Sequence[Settings]) -> Settings:
    """Those of the calls of `apply` within the function, if they have one strategy, and dropout on or off alike."""
    kinds = {(settings.rng is not None, settings.merged) for settings in found}
    is_on, is_merged = kinds.pop() if len(kinds) == 1 else (False, False)
    return Settings(rng=jax.random.key(0) if is_on else None, merged=is_merged)


def _not_adapted(fn: Callable[..., Any], tree: Any, nodes: Mapping[str, Any], args: Any, kwargs: Any) -> list[str]:
    """The paths of kernels that could be adapted and are not."""
    found = observe(fn, unwrap(tree), args, kwargs)
    return [path for path, site in found.items() if path not in nodes and site.kind != "other" and site.axes]


def _estimates(weight: Factored, eqn: Any) -> Estimates | None:
    if not weight.pair or weight.rows or eqn is None or eqn.primitive.name != "dot_general":
        return None
    size = math.prod(weight.base.shape)
    over = math.prod(eqn.invars[0].aval.shape[axis] for axis in eqn.params["dimension_numbers"][0][0])
    tokens = math.prod(eqn.outvars[0].aval.shape) * over / size
    factors = sum(math.prod(factor.shape) for factor in weight.pair)
    frozen = 4 * tokens * size
    merged = 4 * tokens * factors + 4 * size * weight.pair[0].shape[-1]
    return Estimates(frozen, frozen + 6 * tokens * factors, frozen + merged)


def _by_rows(weight: Factored, strategy: str) -> str:
    """How the adapters of a batch's rows come to a product."""
    if strategy == "masks":
        return f"the ranks of all {weight.weights.shape[-1]} adapters at once, those of other rows' masked"
    return "each row's own factors, gathered" if strategy == "gathered" else ""


def _grouped(weight: Factored, group: Sequence[str]) -> str:
    """What there is to say of a group: the other kernels, by what their paths differ in."""
    if not group:
        return ""
    split = [name.split("/") for name in group]
    shared = next((i for i, names in enumerate(zip(*split, strict=False)) if len({*names}) > 1), 0)
    others = ["/".join(names[shared:]) for names, name in zip(split, group, strict=True) if name != weight.name]
    told = f"one x @ [A ...] with {', '.join(others)}" if others else "one x @ [A ...] for all its products with x"
    return f"{told}; with dropout on, one each, since each draws its own" if weight.dropout else told


def _arrays_only(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]


def _cost(fn: Callable[..., Any], arrays: list[Any]) -> dict[str, float]:
    return jax.jit(fn).lower(arrays).cost_analysis() or {}


def _explained(
    uses: tuple[Use, ...],
    adapted: dict[str, float],
    plain: dict[str, float],
    sums: Totals,
    idle: Mapping[str, str],
    not_adapted: Sequence[str],
) -> Explanation:
    pair = lambda name: (adapted[name], plain[name]) if name in adapted and name in plain else None
    flops, moved = pair("flops"), pair("bytes accessed")
    rows = tuple((u.path, str(u.shape), u.kind, _how(u), u.reason or u.primitive, _tail(u.source)) for u in uses)
    costs = [
        f"{' '.join(filter(None, ('forward', cost.name, cost.when)))}: {cost.show(cost.adapted)}, "
        f"{cost.ratio} of the plain model's"
        for cost in _costs(flops, moved)
    ]
    costs += _by_strategy(uses)
    header = ("path", "shape", "kind", "computed", "by", "at")
    footer = (_counts(uses), *costs, *sums.lines, *_idle(idle), *_could_be(not_adapted))
    return Explanation(header, rows, footer, uses, flops, moved, sums, dict(idle), tuple(not_adapted))


def _idle(idle: Mapping[str, str]) -> list[str]:
    """What trains in vain: a line for each reason."""
    reasons = dict.fromkeys(idle.values())
    paths = {why: [path for path, of in idle.items() if of == why] for why in reasons}
    return [f"WITHOUT EFFECT: {_listed(paths[why])}: {why}" for why in reasons]


def _could_be(paths: Sequence[str]) -> list[str]:
    return [f"not adapted, though kernels: {_listed(paths)}"] if paths else []


def _listed(paths: Sequence[str]) -> str:
    """Paths, those alike but for numbers as one."""
    found: Any = grouped((name_of(path), 1, ()) for path in paths)
    titles = [title(name) for name, *_ in found]
    return ", ".join(titles[:5]) + (f" and {len(titles) - 5} more" if titles[5:] else "")


def _by_strategy(uses: Sequence[Use]) -> list[str]:
    """What a training step would cost by each strategy, where the one that was not chosen might cost less."""
    found = [use.estimates for use in uses if use.estimates]
    if not found:
        return []
    frozen, factored, merged = (sum(costs) for costs in zip(*found, strict=True))
    if merged >= factored:
        return []
    ratios = f"factored {factored / frozen:.3f}x, merged {merged / frozen:.3f}x"
    by = 'apply(..., strategy="merged"), which rounds W + s A B to the type of W'
    return [f"training FLOPs, estimated, over frozen products': {ratios} ({by})"]


class _Cost(NamedTuple):
    """A cost of the forward pass: what it counts, of which state of the program, and how a number of it reads."""

    name: str
    when: str
    show: Callable[[float], str]
    adapted: float
    plain: float

    @property
    def ratio(self) -> str:
        return f"{self.adapted / max(self.plain, 1):.3f}x"


def _costs(flops: tuple[float, float] | None, moved: tuple[float, float] | None) -> list[_Cost]:
    """What XLA tells."""
    in_flops = lambda n: short(n, "G")
    found = (("FLOPs", "", in_flops, flops), ("bytes moved", "before fusion", in_bytes, moved))
    return [_Cost(*words, *values) for *words, values in found if values]  # type: ignore[call-arg]


def _counts(uses: Sequence[Use]) -> str:
    dense = sum(not use.factored for use in uses)
    return f"{len(uses)} {'use' if len(uses) == 1 else 'uses'}: {len(uses) - dense} factored, {dense} dense"


def _how(use: Use) -> str:
    return "factored" if use.factored else "dense"


def _why(use: Use) -> str:
    if use.factored:
        return use.note
    named = use.reason.startswith(use.primitive)
    return use.reason if named else f"{use.primitive}: {use.reason}"


def _tail(source: str) -> str:
    return source.rpartition("/")[2]


def _line(source: str) -> str:
    return _tail(source).partition(" (")[0]


def _page(table: Explanation) -> str:
    dense = sum(not use.factored for use in table.uses)
    gauges = [Gauge("uses", [("factored", len(table.uses) - dense), ("dense", dense)], "", _counts(table.uses))]
    for cost in _costs(table.flops, table.bytes_accessed):
        when = ", ".join(filter(None, ("forward", cost.when)))
        told = f"of the plain model's: {cost.show(cost.adapted)} for {cost.show(cost.plain)}, {when}"
        parts = [("plain", cost.plain), ("adapted", max(cost.adapted - cost.plain, 0))]
        gauges.append(Gauge(cost.name, parts, cost.ratio, told))
    if table.totals:
        gauges += trained_gauges(table.totals)
    return page([(use.path, _row(use)) for use in table.uses], gauges)


def _row(use: Use) -> Row:
    by = "" if use.primitive.startswith(use.kind) else use.primitive
    facts = (str(use.shape), use.kind, by, _tail(use.source))
    return Row(_how(use), _how(use), tuple(filter(None, facts)), why=_why(use), source=use.source)
