"""The same walk with axis bookkeeping only. Answers how a function uses each leaf of its parameters.

A probe follows a leaf through views as a factored weight does. It has one factor for each axis of the leaf, which owns
that axis alone; so wherever the leaf is used, the factors tell which of its axes the use contracts, produces or stacks.
An axis that no factor owns any more was taken away by a scan, a slice or an index: a batch axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.interpret import compat
from jlora.interpret.arithmetic import times
from jlora.interpret.control import CONTROL
from jlora.interpret.factored import Tracked
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.lookup import Lookup
from jlora.interpret.traced import traced
from jlora.interpret.views import VIEWS
from jlora.nodes.axes import Axes
from jlora.nodes.qarray import abstract, is_qarray
from jlora.targets.paths import flatten_named, in_order_of, refill, split_arrays

LINEAR = ("dot", "ragged_dot")
Owner = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a leaf: its kind, the leaf's axes in it (None where they are no such split), and where it stands."""

    kind: str
    axes: Axes | None
    primitive: str
    source: str


@dataclasses.dataclass(frozen=True)
class Site:
    """How a function uses one leaf.

    Args:
      kind: ``"dot"``, ``"embedding"``, ``"conv"``, ``"ragged_dot"`` or ``"other"``. A table that is both looked up and
        multiplied (tied) is an embedding.
      axes: the leaf's axes; None where its uses tell none or contradict each other.
      uses: every use, in the order of the program; none for a leaf that is not used.
      shape: the leaf's.
    """

    kind: str
    axes: Axes | None
    uses: tuple[Use, ...]
    shape: tuple[int, ...]

    def describe(self) -> str:
        return "; ".join(f"{use.kind} ({use.primitive}) {use.axes or ''} {use.source}".strip() for use in self.uses)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Probe(Tracked):
    """Leaves under observation: factor i owns one axis of one leaf, `owners[i]`.

    Args:
      owners: for each factor, the path of its leaf and the number of its axis.
      looked_up: the axes that a lookup took away, as (path, axis): those of a table, unless a product shows otherwise.
    """

    lenient: ClassVar[bool] = True
    key: ClassVar[None] = None
    owners: tuple[Owner, ...] = dataclasses.field(default=(), metadata={"static": True})
    looked_up: frozenset[Owner] = dataclasses.field(default=frozenset(), metadata={"static": True})

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for path, _ in self.owners))

    @property
    def wide(self) -> set[int]:
        """The axes that are those of a leaf."""
        return {axis for factor in self.factors for axis in self.owned(factor)}

    def axes_on(self, axes: Iterable[int]) -> set[Owner]:
        """The axes of leaves that stand on any of the given axes."""
        wanted = set(axes)
        pairs = zip(self.owners, self.factors, strict=True)
        return {owner for owner, factor in pairs if wanted & set(self.owned(factor))}


def observe(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> dict[str, Site]:
    """How a function uses each leaf of its first argument, by path; traces it once, abstractly."""
    paths, leaves, treedef = flatten_named("sites", params, is_qarray)
    leaves = [abstract(leaf) for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    shapes = {paths[i]: tuple(leaves[i].shape) for i in places}
    observer = _Observer(shapes)
    tree_of = refill(treedef, leaves, places)
    arrays, rebuild = split_arrays((args, kwargs))

    def walk(bases: list[Any], arrays: list[Any]) -> None:
        def plain(bases: list[Any]) -> list[Any]:
            inner_args, inner_kwargs = in_order_of(rebuild(arrays), (args, kwargs))
            outputs = fn(in_order_of(tree_of(bases), params), *inner_args, **inner_kwargs)
            return [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]

        probes = [_probe(path, base) for path, base in zip(shapes, bases, strict=True)]
        interpreter = Interpreter(observer.rules, observer.other, inline=True)
        jaxpr = traced("jlora.sites", plain, fn, list(shapes), bases)
        interpreter.arrays(interpreter.run(jaxpr, probes), None, "the function returns it")

    jax.eval_shape(walk, [leaves[i] for i in places], arrays)
    return {path: _site(tuple(uses.values()), shapes[path]) for path, uses in observer.uses.items()}


def _probe(path: str, base: Any) -> Probe:
    shape = base.shape
    factors = [jnp.zeros([n if i == axis else 1 for i, n in enumerate(shape)] + [1]) for axis in range(len(shape))]
    return Probe(base, tuple(factors), owners=tuple((path, axis) for axis in range(len(shape))))


class _Observer:
    """The rules of views and control flow as they are; those of products record what they see."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.uses: dict[str, dict[Any, Use]] = {path: {} for path in shapes}
        self.rules = {
            **VIEWS,
            **CONTROL,
            "dot_general": self.dot_general,
            "ragged_dot_general": self.ragged_dot,
            "conv_general_dilated": self.conv,
            "gather": self.gather,
            "concatenate": self.concatenate,
            "stack": self.concatenate,
            "mul": self.times,
            "div": self.times,
            **dict.fromkeys(("add", "add_any", "sub"), self.plus),
        }

    def dot_general(self, walk: Interpreter, eqn: Any, lhs: Any, rhs: Any) -> Any:
        bases = [v.base if isinstance(v, Probe) else v for v in (lhs, rhs)]
        for side, probe in enumerate((lhs, rhs)):
            if isinstance(probe, Probe):
                over, batch = (pair[side] for pair in eqn.params["dimension_numbers"])
                self.product(walk, probe, eqn, "dot", over, batch)
        return compat.bind(eqn, bases)

    def ragged_dot(self, walk: Interpreter, eqn: Any, x: Any, weight: Any, *rest: Any) -> Any:
        if isinstance(x, Probe) or not isinstance(weight, Probe):
            return DECLINED
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (_, over), (_, batch) = numbers.dot_dimension_numbers
        self.product(walk, weight, eqn, "ragged_dot", over, (*batch, *numbers.rhs_group_dimensions))
        return compat.bind(eqn, [x, weight.base, *rest])

    def conv(self, walk: Interpreter, eqn: Any, x: Any, weight: Any) -> Any:
        if isinstance(x, Probe) or not isinstance(weight, Probe):
            return DECLINED
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        self.product(walk, weight, eqn, "conv", [i for i in range(weight.ndim) if i != features], ())
        return compat.bind(eqn, [x, weight.base])

    def gather(self, walk: Interpreter, eqn: Any, weight: Any, indices: Any) -> Any:
        """A lookup that leaves a matrix may be the choice of an expert: it stays under observation."""
        if not isinstance(weight, Probe):
            return DECLINED
        rows = compat.bind(eqn, [weight.base, indices])
        lookup = Lookup(eqn.params, tuple(weight.base.shape), rows.ndim)
        places = lookup.places

        def change(factor: Any) -> Any:
            whole = {places[axis] for axis in weight.owned(factor) if axis in places and axis not in lookup.stacked}
            return jnp.zeros([n if place in whole else 1 for place, n in enumerate(rows.shape)] + [1])

        looked_up = weight.looked_up | weight.axes_on(lookup.picked)
        picked = weight.view(rows, change).replace(looked_up=frozenset(looked_up))
        is_matrix = len(picked.axes_on(range(rows.ndim))) >= 2
        return picked if is_matrix or not lookup.picked else self.other(walk, picked, eqn)

    def times(self, walk: Interpreter, eqn: Any, x: Any, y: Any) -> Any:
        """A kernel times a vector that is a leaf too stays under observation; the vector's use is another."""
        if not (isinstance(x, Probe) and isinstance(y, Probe)):
            return times(walk, eqn, x, y)
        few, many = sorted((x, y), key=lambda probe: len(probe.wide))
        if not few.wide < many.wide or (eqn.primitive.name == "div" and many is y):
            return DECLINED
        self.other(walk, few, eqn)
        return many.replace(base=compat.bind(eqn, [x.base, y.base]))

    def plus(self, walk: Interpreter, eqn: Any, x: Any, y: Any) -> Any:
        """Kernels that are summed are observed together; so is one that a constant is added to, and no activation."""
        values = [v.base if isinstance(v, Probe) else v for v in (x, y)]
        if not (isinstance(x, Probe) and isinstance(y, Probe)):
            probe, other = (x, y) if isinstance(x, Probe) else (y, x)
            is_same = tuple(probe.base.shape) == tuple(eqn.outvars[0].aval.shape)
            return DECLINED if compat.is_traced(other) or not is_same else probe.replace(base=compat.bind(eqn, values))
        few, many = sorted((x, y), key=lambda probe: len(probe.wide))
        if few.wide == many.wide:
            both = {"owners": (*x.owners, *y.owners), "looked_up": x.looked_up | y.looked_up}
            return Probe(compat.bind(eqn, values), (*x.factors, *y.factors), **both)
        if not few.wide < many.wide:
            return DECLINED
        self.other(walk, few, eqn)
        return many.replace(base=compat.bind(eqn, values))

    def concatenate(self, _: Interpreter, eqn: Any, *pieces: Any) -> Probe:
        """Leaves side by side are observed together."""
        base = compat.bind(eqn, [v.base if isinstance(v, Probe) else v for v in pieces])
        probes = [piece for piece in pieces if isinstance(piece, Probe)]

        def change(probe: Probe, factor: Any) -> Any:
            if "dimension" not in eqn.params:
                return jnp.expand_dims(factor, eqn.params["axis"])
            axis = eqn.params["dimension"]
            n = base.shape[axis] if axis in probe.owned(factor) else 1
            return jnp.zeros([n if i == axis else size for i, size in enumerate(factor.shape)])

        factors = tuple(change(probe, factor) for probe in probes for factor in probe.factors)
        owners = tuple(owner for probe in probes for owner in probe.owners)
        return Probe(base, factors, owners=owners, looked_up=frozenset().union(*(p.looked_up for p in probes)))

    def product(
        self, walk: Interpreter, probe: Probe, eqn: Any, kind: str, over: Iterable[int], batch: Iterable[int]
    ) -> None:
        """Records a product that contracts the axes `over`; an axis that is nowhere any more is a batch axis."""
        over, batch = {*over}, {*batch}
        free = {*range(probe.ndim)} - over - batch
        for path in probe.paths:
            ins, outs, stays = (_of(path, probe.axes_on(axes)) for axes in (over, free, batch))
            units = {axis for axis, n in enumerate(self.shapes[path]) if n == 1}
            gone = {*range(len(self.shapes[path]))} - ins - outs - stays - units
            self.add(walk, path, eqn, kind, _split(ins, outs | units, stays | gone))

    def other(self, walk: Interpreter, probe: Probe, eqn: Any, _: str = "") -> Any:
        """Records a use that is no product: a lookup if one took axes away, else anything."""
        for path in probe.paths:
            ins, outs = _of(path, probe.looked_up), _of(path, probe.axes_on(range(probe.ndim)))
            gone = {*range(len(self.shapes[path]))} - ins - outs
            axes = _split(ins, outs, gone) if ins else None
            self.add(walk, path, eqn, "embedding" if axes else "other", axes)
        return probe.base

    def add(self, walk: Interpreter, path: str, eqn: Any, kind: str, axes: Axes | None) -> None:
        use = Use(kind, axes, eqn.primitive.name if eqn is not None else "output", walk.source(eqn))
        self.uses[path].setdefault(walk.place(eqn), use)  # a loop's body may be traced twice


def _of(path: str, owners: Iterable[Owner]) -> set[int]:
    return {axis for name, axis in owners if name == path}


def _split(ins: set[int], outs: set[int], batch: set[int]) -> Axes | None:
    """The axes, if each stands in one group."""
    if ins & outs or ins & batch or outs & batch:
        return None
    return Axes(tuple(sorted(ins)), tuple(sorted(outs)), tuple(sorted(batch)))


def _site(uses: tuple[Use, ...], shape: tuple[int, ...]) -> Site:
    lookups = [use for use in uses if use.kind == "embedding" and use.axes]
    products = [use for use in uses if use.kind not in ("other", "embedding")]
    telling = lookups or [use for use in products if use.axes and use.axes.in_axis and use.axes.out_axis]
    if not telling:
        return Site("other", None, uses, shape)
    axes = telling[0].axes
    agree = all(use.axes is not None and _groups(use.axes) == _groups(axes) for use in telling)
    return Site(telling[0].kind, axes if agree else None, uses, shape)


def _groups(axes: Axes | None) -> Any:
    """The split of the axes whichever way round it is used."""
    return None if axes is None else ({axes.in_axis, axes.out_axis}, axes.batch_axis)
