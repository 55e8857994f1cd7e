"""Random programs: products of any dimension numbers, chains of views, and both inside control flow.

Kernels have any split of their axes into in, out and batch, so a product may contract some of the in axes only, or
in and out axes at once. In every case `apply(f)(w) == f(merge(w))`, in values and in the gradients of the factors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jlora
from tests.support import error, evaluated

TOLERANCE = 2e-5
sizes = st.integers(1, 4)


# -------------------------------------------------------------------------------- kernels


@st.composite
def axes_of(draw, ndim: int) -> jlora.Axes:
    """Any split of the axes with at least one in and one out."""
    first, second, *rest = draw(st.permutations(range(ndim)))
    groups = {"i": [first], "o": [second], "b": []}
    for axis in rest:
        groups[draw(st.sampled_from("iob"))].append(axis)
    return jlora.Axes(*(draw(st.permutations(group)) for group in groups.values()))


def node_of(shape: tuple[int, ...], axes: jlora.Axes, rank: int) -> jlora.LoraParam:
    """A kernel with random factors."""
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    ins, outs, batch = ([shape[i] for i in group] for group in (axes.in_axis, axes.out_axis, axes.batch_axis))
    return jlora.LoraParam(noise(*shape), noise(*batch, *ins, rank), noise(*batch, rank, *outs), axes=axes, scale=0.7)


def check(fn: Callable, node: jlora.LoraParam, *args: Any, fallback: str) -> None:
    """Values and gradients of the factors agree with those through the merged kernel."""

    def both(node, *args):
        ours = lambda node: jlora.apply(fn, fallback=fallback)(node, *args)
        theirs = lambda node: fn(jlora.merge(node), *args)
        return value_and_vjp(ours, node), value_and_vjp(theirs, node)

    found, expected = evaluated(both, node, *args)
    assert difference(found[0], expected[0]) <= TOLERANCE
    assert difference(found[1], expected[1]) <= TOLERANCE


def value_and_vjp(fn: Callable, node: jlora.LoraParam) -> Any:
    """The result, and the gradients of the factors for a random cotangent."""
    y, vjp = jax.vjp(lambda a, b: fn(dataclasses.replace(node, lora_a=a, lora_b=b)), node.lora_a, node.lora_b)
    return y, vjp(jnp.asarray(np.random.default_rng(2).standard_normal(y.shape), y.dtype))


def difference(found: Any, expected: Any) -> float:
    """The largest difference over the largest value, or over 1 (the size of the noise) where values cancel."""
    return error((found, jnp.ones(())), (expected, jnp.ones(())))


# -------------------------------------------------------------------------------- products


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A dot_general of a kernel and an activation."""

    kernel: tuple[int, ...]
    axes: jlora.Axes
    x: tuple[int, ...]
    numbers: Any
    kernel_first: bool
    rank: int

    def __call__(self, w: Any, x: Any) -> Any:
        return lax.dot_general(*((w, x) if self.kernel_first else (x, w)), self.numbers)


@st.composite
def products(draw) -> Product:
    ndim = draw(st.integers(2, 4))
    kernel = draw(st.tuples(*[sizes] * ndim))
    contracted, stacked = _cut(draw, draw(st.permutations(range(ndim))))
    shared = draw(st.permutations([*contracted, *stacked]))
    free = draw(st.lists(sizes, min_size=0 if shared else 1, max_size=4 - len(shared)))
    places = draw(st.permutations(range(len(shared) + len(free))))
    extents = dict(zip(places, [*(kernel[axis] for axis in shared), *free], strict=True))
    over, batch = (([*group], [places[shared.index(axis)] for axis in group]) for group in (contracted, stacked))
    kernel_first = draw(st.booleans())
    order = 1 if kernel_first else -1
    x = tuple(extents[place] for place in sorted(places))
    return Product(
        kernel, draw(axes_of(ndim)), x, (over[::order], batch[::order]), kernel_first, draw(st.integers(1, 3))
    )


def _cut(draw, axes: list[int]) -> tuple[list[int], list[int]]:
    """Two disjoint runs of the axes, each of which may be empty."""
    n = draw(st.integers(0, len(axes)))
    m = draw(st.integers(n, len(axes)))
    return axes[:n], axes[n:m]


@given(products())
def test_product(product):
    """Whatever the dimension numbers, a product has a factored rule."""
    check(product, node_of(product.kernel, product.axes, product.rank), _activations(product.x), fallback="error")


def _activations(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


@given(products())
def test_sites_of_product(product):
    """`sites` reads the axes off the product: contracted are in, free are out, stacked are batch."""
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (product.kernel, product.x))
    site = jlora.sites(lambda params, x: product(params["w"], x), {"w": w}, x)["w"]
    wide = {axis for axis, n in enumerate(product.kernel) if n > 1}
    over, stacked = (set(pair[0 if product.kernel_first else 1]) for pair in product.numbers)
    free = {*range(len(product.kernel))} - over - stacked
    if over & wide and free & wide:
        assert site.kind == "dot"
        assert [wide & {*group} for group in dataclasses.astuple(site.axes)] == [
            over & wide,
            free & wide,
            stacked & wide,
        ]
    if not over & wide:
        assert site.axes is None


# -------------------------------------------------------------------------------- views


@dataclasses.dataclass(frozen=True)
class View:
    """One look at a kernel, named for the report of a failure."""

    name: str
    settings: Any
    fn: Callable[[Any], Any] = dataclasses.field(repr=False)


@st.composite
def views(draw, shape: tuple[int, ...]) -> View:
    return draw(st.sampled_from([make for make, fits in VIEWS if fits(shape)]).flatmap(lambda make: make(shape)))


@st.composite
def transposed(draw, shape):
    order = draw(st.permutations(range(len(shape))))
    return View("transpose", order, lambda w: lax.transpose(w, order))


@st.composite
def reshaped(draw, shape):
    new = draw(factorisations(math.prod(shape)))
    return View("reshape", new, lambda w: w.reshape(new))


@st.composite
def factorisations(draw, n: int) -> list[int]:
    """Up to four sizes whose product is n."""
    new = []
    while n > 1 and len(new) < 3:
        new.append(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])))
        n //= new[-1]
    return [*new, n]


@st.composite
def sliced(draw, shape):
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    limits = [draw(st.integers(start + 1, n)) for start, n in zip(starts, shape, strict=True)]
    strides = [draw(st.integers(1, 2)) for _ in shape]
    return View("slice", (starts, limits, strides), lambda w: lax.slice(w, starts, limits, strides))


@st.composite
def dynamically_sliced(draw, shape):
    lengths = [draw(st.integers(1, n)) for n in shape]
    starts = [draw(st.integers(0, n)) for n in shape]  # one past the end is clamped
    return View("dynamic_slice", (starts, lengths), lambda w: lax.dynamic_slice(w, _unknown(starts), lengths))


def _unknown(starts: list[int]) -> list[Any]:
    """Indices that are computed, so that no constant is folded into the slice."""
    return [lax.add(jnp.int32(start), jnp.int32(0)) for start in starts]


@st.composite
def squeezed(draw, shape):
    axis = draw(st.sampled_from([i for i, n in enumerate(shape) if n == 1]))
    return View("squeeze", axis, lambda w: lax.squeeze(w, [axis]))


@st.composite
def expanded(draw, shape):
    axis = draw(st.integers(0, len(shape)))
    return View("expand", axis, lambda w: lax.expand_dims(w, [axis]))


@st.composite
def broadcast(draw, shape):
    """New axes among the old, and axes of size 1 repeated."""
    ndim = len(shape) + draw(st.integers(0, 4 - len(shape)))
    places = sorted(draw(st.permutations(range(ndim)))[: len(shape)])
    kept = dict(zip(places, shape, strict=True))
    new = [n if (n := kept.get(i, 1)) > 1 else draw(st.integers(1, 3)) for i in range(ndim)]
    return View("broadcast", (new, places), lambda w: lax.broadcast_in_dim(w, new, places))


@st.composite
def reversed_(draw, shape):
    axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    return View("rev", axes, lambda w: lax.rev(w, axes))


@st.composite
def multiplied(draw, shape):
    del shape
    how = draw(st.sampled_from(["left", "right", "over", "negative"]))
    fns = {"left": lambda w: 0.5 * w, "right": lambda w: w * -1.5, "over": lambda w: w / 0.8, "negative": lambda w: -w}
    return View("scale", how, fns[how])


@st.composite
def split(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    at = draw(st.integers(0, shape[axis]).filter(lambda at: shape[axis] > 1 or at == 0))
    pieces = (at, shape[axis] - at)
    pick = draw(st.sampled_from([i for i, n in enumerate(pieces) if n]))
    return View("split", (axis, pieces, pick), lambda w: lax.split(w, pieces, axis)[pick])


@st.composite
def unstacked(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    pick = draw(st.integers(0, shape[axis] - 1))
    return View("unstack", (axis, pick), lambda w: jnp.unstack(w, axis=axis)[pick])


@st.composite
def tiled(draw, shape):
    times = [draw(st.integers(1, 2)) for _ in shape]
    return View("tile", times, lambda w: jnp.tile(w, times))


@st.composite
def picked(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    index = draw(st.integers(0, shape[axis] - 1))
    return View("take", (axis, index), lambda w: jnp.take(w, lax.add(jnp.int32(index), jnp.int32(0)), axis=axis))


@st.composite
def gathered(draw, shape):
    """Elements by two arrays of indices, which some negative numbers are in."""
    first, second = (draw(st.lists(st.integers(-n, n - 1), min_size=3, max_size=3)) for n in shape[:2])
    return View("gather", (first, second), lambda w: w[jnp.array(first), jnp.array(second)])


@st.composite
def repeated(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    return View("concatenate", axis, lambda w: lax.concatenate([w, -w], axis))


ALWAYS, FEW_AXES = (lambda shape: True), (lambda shape: len(shape) < 4)
VIEWS = [
    (transposed, ALWAYS),
    (reshaped, ALWAYS),
    (sliced, ALWAYS),
    (dynamically_sliced, ALWAYS),
    (squeezed, lambda shape: 1 in shape and len(shape) > 1),
    (expanded, FEW_AXES),
    (broadcast, lambda shape: math.prod(shape) <= 64),
    (reversed_, ALWAYS),
    (multiplied, ALWAYS),
    (split, ALWAYS),
    (unstacked, lambda shape: len(shape) > 1),
    (picked, lambda shape: len(shape) > 1),
    (gathered, lambda shape: len(shape) > 1),
    (tiled, lambda shape: math.prod(shape) <= 64),
    (repeated, lambda shape: math.prod(shape) <= 64),
]


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Views of a kernel one after the other, and what is done with the last: a product over an axis, or another use."""

    kernel: tuple[int, ...]
    axes: jlora.Axes
    rank: int
    views: list[View]
    x: tuple[int, ...]
    end: int | str

    def __call__(self, w: Any, x: Any) -> Any:
        for view in self.views:
            w = view.fn(w)
        if isinstance(self.end, int):
            return jnp.tensordot(x, w, [[0], [self.end]])
        return (w if self.end == "as it is" else jnp.tanh(w)) * jnp.mean(x)


@st.composite
def chains(draw, longest: int = 5) -> Chain:
    ndim = draw(st.integers(2, 4))
    kernel = draw(st.tuples(*[sizes] * ndim))
    steps, shape = [], kernel
    for _ in range(draw(st.integers(1, longest))):
        steps.append(draw(views(shape)))
        shape = jax.eval_shape(steps[-1].fn, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    end = draw(st.sampled_from([*range(len(shape)), "as it is", "elementwise"]))
    x = (shape[end] if isinstance(end, int) else 2, 3)
    return Chain(kernel, draw(axes_of(ndim)), draw(st.integers(1, 3)), steps, x, end)


@given(chains())
def test_chain_of_views(chain):
    """Whatever the views, the factors are seen as the kernel is; or the kernel is computed densely, and rightly."""
    check(chain, node_of(chain.kernel, chain.axes, chain.rank), _activations(chain.x), fallback="ignore")


# -------------------------------------------------------------------------------- control flow

AROUND: dict[str, Callable] = {
    "jit": lambda f: jax.jit(f),
    "jit of a view": lambda f: lambda w, x: f(jax.jit(lambda w: -w)(w), x),
    "checkpoint": lambda f: jax.checkpoint(f),
    "constant of a scan": lambda f: lambda w, x: lax.scan(lambda c, row: (c, f(w, row)), 0, jnp.stack([x, 2 * x]))[1],
    "carried by a scan": lambda f: lambda w, x: lax.scan(lambda c, row: (c, f(c, row)), w, jnp.stack([x, -x]))[1],
    "changed by a scan": lambda f: lambda w, x: lax.scan(lambda c, row: (0.5 * c, f(c, row)), w, jnp.stack([x, -x]))[1],
    "vmap over inputs": lambda f: lambda w, x: jax.vmap(lambda row: f(w, row))(jnp.stack([x, 2 * x])),
    "cond": lambda f: lambda w, x: lax.cond(jnp.sum(x) > 0, lambda v: f(v, x), lambda v: f(v, -x), w),
    "chosen by cond": lambda f: lambda w, x: f(lax.cond(jnp.sum(x) > 0, lambda v: v, lambda v: 2 * v, w), x),
    "fori_loop": lambda f: lambda w, x: lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y + f(w, x)), 0 * f(w, x)),
}
OVER_A_STACK: dict[str, Callable] = {
    "scan": lambda f: lambda ws, x: lax.scan(lambda c, w: (c, f(w, x)), 0, ws)[1],
    "scan in reverse": lambda f: (
        lambda ws, x: lax.scan(lambda y, w: (f(w, x) - 2 * y, None), 0 * f(ws[0], x), ws, reverse=True)[0]
    ),
    "map": lambda f: lambda ws, x: lax.map(lambda w: f(w, x), ws),
    "vmap": lambda f: lambda ws, x: jax.vmap(f, (0, None))(ws, x),
    "index": lambda f: lambda ws, x: f(lax.dynamic_index_in_dim(ws, lax.add(1, 0), keepdims=False), x),
}


@pytest.mark.slow
@given(chains(3), st.lists(st.sampled_from(list(AROUND)), min_size=1, max_size=2))
def test_chain_inside_control_flow(chain, around):
    fn = chain
    for name in around:
        fn = AROUND[name](fn)
    check(fn, node_of(chain.kernel, chain.axes, chain.rank), _activations(chain.x), fallback="ignore")


@pytest.mark.slow
@given(chains(3), st.sampled_from(list(OVER_A_STACK)), st.sampled_from(["in_axis", "out_axis", "batch_axis"]))
def test_chain_over_a_stack(chain, over, part):
    """Stacked kernels one by one; the axis of the stack may be any part of the kernel's axes."""
    groups = {name: tuple(axis + 1 for axis in group) for name, group in dataclasses.asdict(chain.axes).items()}
    groups[part] = (0, *groups[part])
    node = node_of((2, *chain.kernel), jlora.Axes(**groups), chain.rank)
    check(OVER_A_STACK[over](chain), node, _activations(chain.x), fallback="ignore")
