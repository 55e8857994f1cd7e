"""`apply`: runs an unchanged function on a wrapped tree."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import threading
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.compat import is_traced
from jlora.interpret.contract import CONTRACTIONS
from jlora.interpret.control import CONTROL
from jlora.interpret.factored import Factored, plain
from jlora.interpret.interpreter import Interpreter
from jlora.interpret.quantised import Quantised, shape_of
from jlora.interpret.ragged import BY_ROWS
from jlora.interpret.traced import traced
from jlora.interpret.views import VIEWS
from jlora.nodes.checks import check_fit, check_value
from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import is_node, is_unit
from jlora.nodes.qarray import is_qarray
from jlora.targets.named import Names, named, patterns_of
from jlora.targets.paths import checked_key, flatten, in_order_of, refill
from jlora.targets.patterns import matcher

RULES = {**VIEWS, **CONTRACTIONS, **CONTROL}
_COMPUTED = object()  # in the place of a result that is an array
FALLBACKS = ("warn", "error", "ignore")
STRATEGIES = ("auto", "factored", "merged")


class DenseFallbackWarning(UserWarning):
    """A use of an adapted kernel had no factored rule, so that ``W + s A B`` was computed for it.

    Functions of `jlora.apply` warn of it under ``fallback="warn"``. The result is right. The use costs what it costs
    with a merged kernel, and it has no dropout. The message says which kernel it is, where it is used, and why.
    `jlora.explain` shows every use.

    To fix it, write the use as a product, a convolution or a lookup; or leave the kernel out by
    ``LoraSpec(exclude=...)``; or take the cost with ``fallback="ignore"``.

    Example:
      >>> import jax.numpy as jnp, jlora, warnings
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> with warnings.catch_warnings(record=True) as told:
      ...     warnings.simplefilter("always")
      ...     norm = jlora.apply(lambda p: jnp.square(p["kernel"]).sum())(params)
      >>> told[0].category.__name__, float(norm)
      ('DenseFallbackWarning', 12.0)
    """


class DenseFallbackError(ValueError):
    """A use of an adapted kernel had no factored rule, and a dense computation was forbidden by ``fallback="error"``.

    Functions of `jlora.apply` raise it when they are called. The message and the ways to fix it are those of
    `DenseFallbackWarning`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> jlora.apply(lambda p: jnp.square(p["kernel"]).sum(), fallback="error")(params)
      Traceback (most recent call last):
      jlora.apply.DenseFallbackError: kernel of shape (4, 3) is computed densely, as W + s A B, for ...
    """


def apply(
    fn: Callable[..., Any],
    *args: Any,
    rng: jax.Array | None = None,
    fallback: str = "warn",
    freeze: bool = True,
    train: Names = (),
    native_dots: bool = False,
    strategy: str = "auto",
) -> Callable[..., Any]:
    """Makes an unchanged function run on wrapped trees, at the cost of the factors.

    Wherever the function multiplies by an adapted kernel, ``x @ (W + s A B)`` is computed as
    ``x @ W + s (x @ A) @ B``: in any framework, under scan, remat, vmap, cond, jit. A use that has no factored rule is
    computed densely and warned of; the result is that of ``fn`` on the merged tree in every case. Such a use has no
    dropout. Like `jax.jit`, it traces `fn`, so Python can't branch on the values of arrays in it.

    Args:
      fn: any function. An argument that contains a wrapped node, or a quantised leaf, is a parameter tree;
        others are passed on as they are.
      *args: none. The arguments of `fn` go to the function that is returned.
      rng: a PRNG key that switches the adapters' dropout on. Without it, a tree that has dropout is reported once, in
        the log ``jlora``.
      fallback: what a dense computation does: ``"warn"``, ``"error"`` or ``"ignore"``.
      freeze: whether bases and plain leaves of parameter trees pass `jax.lax.stop_gradient`.
      train: patterns of plain leaves of parameter trees that do not: see `jlora.value_and_grad`.
      native_dots: whether products with kernels in int8 (on TPUs and NVIDIA's GPUs) or fp8 (on GPUs that have it) are
        computed in 8 bits. The tiles must have 128 elements or more. The inputs are rounded to 8 bits too, row by row.
        Gradients are those of the exact product. Elsewhere it changes nothing.
      strategy: how products with adapted kernels are computed. With dropout on all are factored.
        ``"factored"``: ``x @ W + s (x @ A) @ B``.
        ``"merged"``: ``x @ M``. ``M = W + s A B`` is made once per call, in the type of W. Use it if a call uses each
        kernel many times, such as decoding in a loop, or if W is float32 and there are many tokens. No gradient of the
        size of W is computed. M is a second copy of the adapted kernels, which is kept for gradients. If W has 16 bits,
        M is rounded to them, and a small update can be lost.
        ``"auto"``: the one that costs less without a second copy or rounding. This is ``"factored"`` on all hardware
        that was measured.

    Returns:
      A function with the arguments and results of `fn`, to use under `jax.jit`, `jax.grad`, `jax.vmap`.

    Raises:
      ValueError: if `fallback` is none of the three, or `strategy` is none of its three, or is ``"merged"`` under
        ``freeze=False``; when called, if a wrapped tree lacks arrays or values (one half of `jlora.partition`, a plan),
        or a pattern of `train` matches no leaf.
      TypeError: if `rng` is no PRNG key, or the arguments of `fn` are given here; when called, if `fn` returns an
        object that hides an array.
      DenseFallbackError: when called, under ``fallback="error"``.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> jlora.apply(lambda params, x: x @ params["kernel"])(params, jnp.ones((5, 4))).shape
      (5, 3)
    """
    if args or not callable(fn):
        raise TypeError("apply takes the function alone and returns one: jlora.apply(fn)(params, x)")
    if fallback not in FALLBACKS:
        raise ValueError(f"apply: fallback must be one of {FALLBACKS}, found {fallback!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"apply: strategy must be one of {STRATEGIES}, found {strategy!r}")
    if strategy == "merged" and not freeze:
        raise ValueError(
            'apply: strategy="merged" multiplies by W + s A B, through which no gradient goes to W; freeze=False takes '
            'strategy="factored"'
        )
    if rng is not None:
        checked_key("apply: rng", rng)
    settings = Settings(rng, freeze, native_dots, strategy == "merged", train, tells_dropout=True)
    run = applied(fn, fallback, settings)
    return functools.wraps(fn)(run) if hasattr(fn, "__name__") else run


def applied(fn: Callable[..., Any], fallback: str, settings: Settings, *, by_rows: bool = False) -> Callable[..., Any]:
    """As `apply`, of settings that are known to be right.

    Args:
      by_rows: whether it runs inside a `jax.vmap` over rows.
    """
    return functools.partial(run_on_wrapped, fn, _interpreter(fallback, by_rows), settings)


class Settings(NamedTuple):
    """How wrapped trees are run: as `apply` has it."""

    rng: jax.Array | None = None
    freeze: bool = True
    native_dots: bool = False
    merged: bool = False
    train: Names = ()
    tells_dropout: bool = False


def run_on_wrapped(
    fn: Callable[..., Any],
    interpreter: Interpreter,
    settings: Settings,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Traces `fn` with the bases in place of the nodes, then evaluates the trace on the weights."""
    paths, leaves, treedef = flatten((args, kwargs), is_unit)
    places = [i for i, leaf in enumerate(leaves) if is_unit(leaf)]
    if not places:
        _INNER.add(settings)
        return fn(*args, **kwargs)
    for i in places:
        leaves[i] = leaves[i].resolved() if is_node(leaves[i]) else leaves[i]
        _check(_inside(paths[i]), leaves[i])
    if settings.tells_dropout and settings.rng is None and any(getattr(leaf, "dropout", 0) for leaf in leaves):
        _tell_dropout_is_off()
    if settings.freeze:
        leaves = _frozen((args, kwargs), paths, leaves, settings.train)
    values = [_value(_inside(paths[i]), leaves[i], _key(settings.rng, paths[i], leaves[i]), settings) for i in places]
    arguments_of = refill(treedef, leaves, places)
    result: list[Any] = []

    def on_bases(bases: list[Any]) -> list[Any]:
        args, kwargs = in_order_of(arguments_of(bases), given)
        returned = fn(*args, **kwargs)
        outputs, outdef = jax.tree.flatten(returned)
        for x in outputs:
            _check_result(x)
        kept = [_COMPUTED if isinstance(x, jax.Array) else x for x in outputs]
        result[:] = [kept, outdef, in_order_of(outdef.unflatten(kept), returned)]
        return [x for x in outputs if isinstance(x, jax.Array)]

    bases = [shape_of(v.base) if isinstance(v, Factored) else v for v in values]
    given = args, kwargs
    jaxpr = traced("jlora.apply", on_bases, fn, [_inside(paths[i]) for i in places], bases)
    with _FALLBACKS.told_once():
        arrays = interpreter.arrays(interpreter.run(jaxpr, values), None, "the function returns it")
    computed = iter([_array(x, aval) for x, aval in zip(arrays, jaxpr.out_avals, strict=True)])
    kept, outdef, ordered = result
    return in_order_of(outdef.unflatten([next(computed) if x is _COMPUTED else x for x in kept]), ordered)


@functools.cache
def _tell_dropout_is_off() -> None:
    """Once in a process: not a warning, since evaluation is meant to be so."""
    logging.getLogger("jlora").warning(
        "jlora.apply: the spec has dropout, and no rng was given, so it is off; for training, apply(fn, rng=key)"
    )


def _check_result(x: Any) -> None:
    """Refuses an object that holds an array of the trace where JAX does not see it."""
    held = [*getattr(x, "__dict__", {}).values(), *(x.values() if isinstance(x, Mapping) else ())]
    held += [cell.cell_contents for cell in getattr(x, "__closure__", None) or () if cell != types.CellType()]
    if not isinstance(x, jax.Array) and any(is_traced(value) for value in held):
        raise TypeError(
            f"apply: the function returns a {type(x).__name__} that holds an array and is no pytree; return the array, "
            "or register the class with jax.tree_util.register_dataclass"
        )


def _check(path: str, leaf: Any) -> None:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)):
        raise ValueError(
            f"apply: {path} is a plan, without values; jax.eval_shape(jlora.apply(fn), params, ...) takes such a tree"
        )
    if is_node(leaf):
        check_fit("apply", path, leaf)


def _value(path: str, leaf: Any, key: Any, settings: Settings) -> Any:
    """What a node, or a quantised leaf, stands for."""
    native = settings.native_dots
    if is_qarray(leaf):
        return plain(Quantised(leaf, native=native), name=path)
    if is_qarray(leaf.base):
        leaf = dataclasses.replace(leaf, base=Quantised(leaf.base, native=native))
    value = leaf.effective(path, key)
    check_value(path, leaf, value)
    return value.merged_ahead() if settings.merged and isinstance(value, Factored) else value


def _array(x: Any, aval: Any) -> Any:
    """A constant of the trace as an array."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype)


def _frozen(arguments: tuple[Any, Any], paths: list[str], leaves: list[Any], train: Names) -> list[Any]:
    """Stops the gradient of what is frozen in each argument that holds a node, but for leaves that `train` names."""
    args, kwargs = arguments
    frozen: list[Any] = []
    of_trees: dict[str, Any] = {}
    for argument in (*args, *(kwargs[name] for name in sorted(kwargs))):
        here = slice(len(frozen), len(frozen) + len(jax.tree.leaves(argument, is_leaf=is_unit)))
        is_tree = any(map(is_unit, leaves[here]))
        of_trees |= dict(zip(paths[here], leaves[here], strict=True)) if is_tree else {}
        frozen += [_stopped(leaf) for leaf in leaves[here]] if is_tree else leaves[here]
    around = _AROUND.get()
    if not around and isinstance(train, tuple) and not train:
        return frozen
    inside = {_inside(path): leaf for path, leaf in of_trees.items()}
    kinds = [{path: x for path, x in inside.items() if is_node(x) == kind} for kind in (False, True)]
    names = named(train, *kinds) | {path for path in kinds[0] if any(matcher(pattern)(path) for pattern in around)}
    pairs = zip(paths, leaves, frozen, strict=True)
    return [leaf if path in of_trees and _inside(path) in names else stopped for path, leaf, stopped in pairs]


@contextlib.contextmanager
def training(train: Names) -> Iterator[None]:
    """Within it the leaves that `train` names are not frozen by calls of `apply`, where they have them."""
    before = _AROUND.set((*_AROUND.get(), *patterns_of(train)))
    try:
        yield
    finally:
        _AROUND.reset(before)


_AROUND: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("jlora.train", default=())


def _stopped(leaf: Any) -> Any:
    if not is_node(leaf):
        return jax.tree.map(_stop, leaf)
    if not any(map(is_traced, jax.tree.leaves(leaf))):
        return leaf
    fields = [f.name for f in leaf_fields(leaf) if not f.metadata.get("trained")]
    return dataclasses.replace(leaf, **{name: jax.tree.map(_stop, getattr(leaf, name)) for name in fields})


def _stop(leaf: Any) -> Any:
    is_float = is_traced(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)  # known numbers have no gradient
    return lax.stop_gradient(leaf) if is_float else leaf


def _inside(path: str) -> str:
    """A node's path within its argument: ``0/1/params/...`` counts args or kwargs, and which."""
    return path.split("/", 2)[-1]


def _key(rng: jax.Array | None, path: str, node: Any) -> Any:
    if rng is None or not getattr(node, "dropout", 0):
        return None
    if node.dropout < 0:
        raise ValueError(
            f"apply: {_inside(path)} holds adapters of different dropout, which one program can't have; stack adapters "
            "of one rate, or call apply without rng, which has dropout off"
        )
    return jax.random.fold_in(rng, zlib.crc32(_inside(path).encode()))


@functools.cache
def _interpreter(fallback: str, by_rows: bool) -> Interpreter:
    return Interpreter(RULES, functools.partial(_densify, fallback), always=BY_ROWS if by_rows else {})


def _densify(fallback: str, interpreter: Interpreter, weight: Factored, eqn: Any, reason: str) -> Any:
    if fallback != "ignore" and weight.roles:
        found = _Fallback(eqn.primitive.name if eqn is not None else "the output", reason)
        place = weight.name, tuple(weight.base.shape), interpreter.source(eqn)
        if fallback == "error":
            raise DenseFallbackError(found.told([place]))
        _FALLBACKS.add(found, place)
    return weight.dense()


class _Inner(threading.local):
    """The settings of calls that find nothing wrapped, as those within a function that is explained."""

    def __init__(self) -> None:
        self.found: list[Settings] | None = None

    def add(self, settings: Settings) -> None:
        if self.found is not None:
            self.found.append(settings)


_INNER = _Inner()


@contextlib.contextmanager
def inner_settings() -> Iterator[list[Settings]]:
    """The settings of the calls of `apply` within, that are given plain trees."""
    before, _INNER.found = _INNER.found, []
    try:
        yield _INNER.found
    finally:
        _INNER.found = before


class _Fallback(NamedTuple):
    """Why kernels are computed densely: the primitive that has no rule for them, and what is in the way."""

    primitive: str
    reason: str

    def told(self, places: Sequence[tuple[str, tuple[int, ...], str]]) -> str:
        (name, shape), *others = dict.fromkeys((name, shape) for name, shape, _ in places)
        lines = [line for line in dict.fromkeys(line for _, _, line in places) if line]
        more = f" and {len(others)} more ({_some([other for other, _ in others])})" if others else ""
        at = f" at {lines[0]}" if lines else ""
        return (
            f"{name} of shape {shape}{more} {'are' if others else 'is'} computed densely, as W + s A B, for "
            f"{self.primitive}{at}{f' and {len(lines) - 1} more' if lines[1:] else ''}: {self.reason}. Results "
            'are right, the cost is that of a merged kernel; jlora.explain shows every use, fallback="ignore" is silent'
        )


class _Fallbacks(threading.local):
    """The dense computations of the calls that run in a thread, innermost last: each cause is told once a call."""

    def __init__(self) -> None:
        self.calls: list[dict[_Fallback, list[Any]]] = []

    def add(self, found: _Fallback, place: Any) -> None:
        self.calls[-1].setdefault(found, []).append(place)

    @contextlib.contextmanager
    def told_once(self) -> Iterator[None]:
        self.calls.append({})
        try:
            yield
        finally:
            call = self.calls.pop()
        for found, places in call.items():
            warnings.warn(found.told(places), DenseFallbackWarning, stacklevel=1)


_FALLBACKS = _Fallbacks()


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
