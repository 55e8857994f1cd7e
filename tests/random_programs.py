"""Random programs: each is a few lines of Python over kernels and activations, whose shapes are known as it is drawn.

    python -m tests.random_programs --seed 0 --count 10000

draws programs from the seeds that follow, and checks of each that ``apply(f)(w)`` is ``f(merge(w))``, values and
gradients. What fails is cut down to the lines that matter, and printed; it becomes a test of its own.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jlora
from jlora.variants import VARIANTS
from tests.support import evaluated, filled

SIZES = (4, 8)
GLOBALS = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, "checkpoint_name": checkpoint_name}
KINDS = ("lora", "lora", "lora", *VARIANTS, "ia3 in")
OPTIONS = {"oft": {"block_size": 4}, "boft": {"block_size": 2, "factors": 2}, "lokr": {"factor": 2}}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}


@dataclasses.dataclass(frozen=True)
class Random:
    """A program: lines that each make a value of those before, and what its kernels are adapted by.

    Args:
      lines: of Python, ``name = expression``, over ``p`` (the kernels by name) and the names of ARGUMENTS.
      roles: of each kernel's axes: ``i``, ``o`` or ``b`` for each.
      sizes: of them.
      kind: the variant.
      dtype: of the kernels and the activations.
      quantised: to which format the bases are, or None.
      mode: ``"grad"``, ``"jit"`` or ``"vmap"`` (over stacked adapters).
    """

    lines: tuple[str, ...]
    roles: dict[str, str]
    sizes: dict[str, tuple[int, ...]]
    kind: str
    dtype: str
    quantised: str | None
    mode: str

    def __str__(self) -> str:
        body = "\n".join(f"    {line}" for line in self.lines)
        kernels = ", ".join(f"{name}: {self.roles[name]} {self.sizes[name]}" for name in self.roles)
        base = f", {self.quantised} bases" if self.quantised else ""
        return f"{self.kind}, {self.dtype}{base}, {self.mode}; {kernels}\n{body}"

    def fn(self, p: dict[str, Any], arguments: dict[str, Any]) -> list[Any]:
        """The values that no line reads, and that are differentiable."""
        env = {**GLOBALS, **arguments, "p": p}
        made = []
        for line in self.lines:
            name, _, expression = line.partition(" = ")
            env[name] = eval(expression, env)
            made.append(name)
        read = set(re.findall(r"\bv\d+\b", " ".join(line.partition(" = ")[2] for line in self.lines)))
        return [env[name] for name in made if name not in read]


def arguments(dtype: Any = jnp.float32) -> dict[str, Any]:
    """What a program has beside its kernels; its shapes are all that drawing one needs."""
    rng = np.random.default_rng(7)
    noise = lambda *shape: jnp.asarray(0.7 * rng.standard_normal(shape), dtype)
    return {
        "x4": noise(3, 4), "x8": noise(3, 8), "y4": noise(2, 3, 4), "y8": noise(2, 3, 8),
        "u4": noise(4), "u8": noise(8), "m44": noise(4, 4), "m48": noise(4, 8), "m84": noise(8, 4), "m88": noise(8, 8),
        "c": jnp.asarray(0.6, dtype), "i": jnp.asarray(1), "flag": jnp.asarray(True),
        "ids": jnp.asarray([0, 3, 2]), "far": jnp.asarray([1, 9, -1]),
    }  # fmt: skip


class Drawing:
    """A program as it is drawn: what it has so far, by name, with shape and type."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.lines: list[str] = []
        self.weights: dict[str, Any] = {}  # kernels and views of them
        self.values: dict[str, Any] = {}  # activations

    def one(self, items: Any) -> Any:
        items = list(items)
        return items[self.rng.integers(len(items))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def weight(self, test: Callable[[Any], bool] = lambda _: True) -> tuple[str, Any]:
        found = [(name, x) for name, x in self.weights.items() if test(x)]
        if not found:
            raise LookupError
        return self.one(found)

    def value(self, test: Callable[[Any], bool] = lambda _: True) -> tuple[str, Any]:
        found = [(name, x) for name, x in self.values.items() if test(x)]
        if not found:
            raise LookupError
        return self.one(found)

    def add(self, expression: str, is_weight: bool, env: dict[str, Any]) -> None:
        """Takes a line in, if JAX takes it and its value is of a size to go on with."""
        try:
            made = jax.eval_shape(lambda env: eval(expression, {**GLOBALS, **env}), env)
        except (TypeError, ValueError, ZeroDivisionError, IndexError):
            return
        if not hasattr(made, "shape") or made.ndim > 5 or np.prod(made.shape) > 4096:
            return
        if not jnp.issubdtype(made.dtype, jnp.inexact):
            return
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        (self.weights if is_weight else self.values)[name] = made
        env[name] = made


# ------------------------------------------------------------------------------------------- views of a weight


def transpose(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 2)
    return f"jnp.transpose({name}, {tuple(map(int, d.rng.permutation(w.ndim)))})"


def reshape(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 1)
    axis = int(d.rng.integers(w.ndim))
    if w.ndim >= 2 and d.chance(0.5):
        axis = min(axis, w.ndim - 2)
        shape = (*w.shape[:axis], w.shape[axis] * w.shape[axis + 1], *w.shape[axis + 2 :])
    else:
        shape = (*w.shape[:axis], 2, w.shape[axis] // 2, *w.shape[axis + 1 :])
    return f"jnp.reshape({name}, {shape})"


def cut(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 1 and max(w.shape) >= 2)
    axis = d.one(i for i, n in enumerate(w.shape) if n >= 2)
    n = w.shape[axis]
    return d.one([
        f"lax.slice_in_dim({name}, {n // 2}, {n}, axis={axis})",
        f"lax.slice_in_dim({name}, 0, {n}, stride=2, axis={axis})",
        f"lax.dynamic_slice_in_dim({name}, i, {n // 2}, axis={axis})",
        f"jnp.split({name}, 2, {axis})[1]",
        f"lax.rev({name}, ({axis},))",
        f"lax.index_in_dim({name}, {n - 1}, {axis}, keepdims={d.chance(0.5)})",
        f"lax.dynamic_index_in_dim({name}, i, {axis}, keepdims={d.chance(0.5)})",
        f"jnp.take({name}, i, axis={axis})",
        f"jnp.roll({name}, 1, {axis})",
    ])  # fmt: skip


def gather(d: Drawing) -> str:
    """The choice of several weights of a stack, or of rows."""
    name, w = d.weight(lambda w: w.ndim >= 1)
    axis = int(d.rng.integers(w.ndim))
    ids = d.one(["ids", "far"])
    return d.one([
        f"jnp.take({name}, {ids}, axis={axis}, mode='{d.one(['clip', 'wrap'])}')",
        f"jnp.take({name}, {ids}, axis={axis}, mode='fill', fill_value={d.one([0.0, -1.0])})",
        f"jax.vmap(lambda i: lax.dynamic_index_in_dim({name}, i, {axis}, keepdims=False))(ids)",
        f"jax.vmap(lambda i: {name}[i])(ids % {w.shape[0]})",
        f"{name}[ids % {w.shape[0]}]",
        f"jnp.take_along_axis({name}, jnp.broadcast_to(i, {(*w.shape[:-1], 1)}), axis=-1)",
    ])  # fmt: skip


def grow(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 1)
    axis = int(d.rng.integers(w.ndim + 1))
    return d.one([
        f"jnp.expand_dims({name}, {axis})",
        f"jnp.broadcast_to({name}, {(2, *w.shape)})",
        f"jnp.squeeze({name})",
        f"jnp.tile({name}, {(2,) + (1,) * (w.ndim - 1)})",
        f"jnp.repeat({name}, 2, axis={min(axis, w.ndim - 1)})",
        f"jnp.pad({name}, {((0, 1),) * w.ndim})",
    ])  # fmt: skip


def arithmetic(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 1)
    vectors = [v for v in ("u4", "u8") for _ in range(1)]
    axis = d.one(range(w.ndim))
    u = {4: "u4", 8: "u8"}.get(w.shape[axis], "c")
    u = f"{u}.reshape({[-1 if i == axis else 1 for i in range(w.ndim)]})" if u in vectors else u
    return d.one([
        f"{name} * {d.one(['0.5', 'c', '(-c)', u])}", f"{name} * {u}", f"{name} / (1.5 + {u} * {u})", f"-{name}",
        f"{name} + {d.one(['0.25', 'c', u])}", f"{u} - {name}", f"c * {name} + {name}",
    ])  # fmt: skip


def together(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 1)
    other, _ = d.weight(lambda x: x.shape == w.shape)
    plain = f"m{w.shape[0]}{w.shape[1]}" if w.shape in ((4, 4), (4, 8), (8, 4), (8, 8)) else other
    axis = int(d.rng.integers(w.ndim))
    return d.one([  # a weight less itself is zero, or what rounding leaves of it: no quotient of that is told apart
        f"{name} + {other}", f"1.5 * {name} - {d.one([other, plain])}", f"jnp.concatenate([{name}, {other}], {axis})",
        f"jnp.concatenate([{plain}, {name}], {axis})", f"jnp.stack([{name}, {other}], {axis})",
        f"jnp.where(flag, {name}, {other})", f"lax.select_n(flag, {name}, {plain})",
        f"lax.cond(flag, lambda a, b: a, lambda a, b: b, {name}, {other})",
    ])  # fmt: skip


def marked(d: Drawing) -> str:
    name, _ = d.weight()
    return d.one([
        f"lax.stop_gradient({name})", f"checkpoint_name({name}, 'w')", f"lax.optimization_barrier({name})",
        f"jax.jit(lambda w: w)({name})", f"jnp.copy({name})", f"lax.reduce_precision({name}, 8, 20)",
        f"{name}.astype(jnp.float32)", f"{name}.astype(jnp.bfloat16).astype(jnp.float32)",
    ])  # fmt: skip


def densely(d: Drawing) -> str:
    """What has no factored rule."""
    name, w = d.weight(lambda w: w.ndim >= 1)
    axis = int(d.rng.integers(w.ndim))
    return d.one([
        f"jnp.tanh({name})", f"{name} / jnp.linalg.norm({name}, axis={axis}, keepdims=True)", f"{name} * {name}",
        f"jax.nn.softmax({name}, axis={axis})", f"jnp.cumsum({name}, {axis})", f"lax.map(lambda r: 2.0 * r, {name})",
        f"lax.associative_scan(jnp.add, {name})", f"jnp.sort({name}, {axis})",
        f"{name} - {name}.mean({axis}, keepdims=True)",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------- uses of a weight


def product(d: Drawing) -> str:
    """A contraction of one axis of a weight with one of a value, either way round."""
    name, w = d.weight(lambda w: 1 <= w.ndim <= 3)
    value, x = d.value(lambda x: x.ndim >= 1 and {*x.shape} & {*w.shape})
    pairs = [(a, b) for a, n in enumerate(x.shape) for b, m in enumerate(w.shape) if n == m and n > 1]
    if not pairs:
        raise LookupError
    a, b = d.one(pairs)
    if d.chance(0.5):
        return f"jnp.tensordot({value}, {name}, (({a},), ({b},)))"
    return f"jnp.tensordot({name}, {value}, (({b},), ({a},)))"


def einsum(d: Drawing) -> str:
    """A product with batch axes, and axes that are summed."""
    name, w = d.weight(lambda w: 2 <= w.ndim <= 3)
    value, x = d.value(lambda x: 1 <= x.ndim <= 3)
    letters = "abc"[: w.ndim]
    ours, left = [], list(zip(letters, w.shape, strict=True))
    for n in x.shape:
        same = [pair for pair in left if pair[1] == n]
        chosen = d.one(same) if same and d.chance(0.7) else None
        ours.append(chosen[0] if chosen else "xyz"[len(ours)])
        left = [pair for pair in left if pair != chosen]
    kept = [letter for letter in dict.fromkeys((*ours, *letters)) if d.chance(0.6)]
    both = (f"{''.join(ours)},{letters}", f"{value}, {name}")
    if d.chance(0.5):
        both = (f"{letters},{''.join(ours)}", f"{name}, {value}")
    return f"jnp.einsum('{both[0]}->{''.join(kept)}', {both[1]})"


def matrix_use(d: Drawing) -> str:
    """A square matrix in what JAX has of control flow and transforms."""
    name, w = d.weight(lambda w: w.ndim == 2 and w.shape[0] == w.shape[1])
    x = d.value(lambda x: x.ndim == 2 and x.shape[-1] == w.shape[0])[0]
    return d.one([
        f"lax.scan(lambda h, _: (jnp.tanh(h @ {name}), h.sum()), {x}, None, length=3)[0]",
        f"lax.scan(lambda h, r: (h + jnp.tanh(r @ {name}), h), {x}[0], {x})[1]",
        f"lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ {name}), {x})",
        f"lax.while_loop(lambda s: s[1] < 2, lambda s: (jnp.tanh(s[0] @ {name}), s[1] + 1), ({x}, 0))[0]",
        f"lax.cond(flag, lambda h, w: h @ w, lambda h, w: -h @ w.T, {x}, {name})",
        f"jax.vmap(lambda r: r @ {name})({x})",
        f"jax.vmap(lambda r: r @ {name}, in_axes=1)({x}.T)",
        f"jax.vmap(lambda r: {x} @ r, in_axes={d.one([0, 1])})({name})",
        f"jax.checkpoint(lambda h: jnp.tanh(h @ {name}))({x})",
        f"jax.jit(lambda h, w: h @ w)({x}, {name})",
        f"jax.grad(lambda h: jnp.sum(jnp.tanh(h @ {name})))({x})",
        f"jax.jvp(lambda h: h @ {name}, ({x},), ({x},))[1]",
        f"jax.linear_transpose(lambda h: h @ {name}, {x})({x})[0]",
        f"jax.vmap(lambda r: lax.while_loop(lambda s: abs(s).sum() > 2, lambda s: 0.3 * jnp.sin(s @ {name}), r))({x})",
        f"jnp.einsum('ti,ij,jk->tk', {x}, {name}, {name})",
        f"{x} @ {name} @ {name}.T",
        f"{x}[:0] @ {name}",
        f"jax.nn.gelu({x} @ {name}).astype(jnp.bfloat16).astype(jnp.float32)",
        f"jnp.dot(jnp.round(3 * {x}).astype(jnp.int32), {name})",
        f"jnp.real({x} @ ({name} * 1j) * (1 - 2j))",
        f"(lambda a, b: a + b)(*jnp.split({x} @ jnp.concatenate([{name}, {name}], 1), 2, -1))",
    ])  # fmt: skip


def stack_use(d: Drawing) -> str:
    """A stack of matrices: scanned, mapped over, chosen from."""
    name, w = d.weight(lambda w: w.ndim == 3 and w.shape[1] == w.shape[2])
    x = d.value(lambda x: x.ndim == 2 and x.shape[-1] == w.shape[1])[0]
    return d.one([
        f"lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), {x}, {name})[0]",
        f"lax.scan(lambda h, w: (h + jnp.tanh(h @ w), w), {x}, {name}, reverse=True)[0]",
        f"lax.map(lambda w: {x} @ w, {name})",
        f"jax.vmap(lambda w: {x} @ w)({name})",
        f"lax.fori_loop(0, {w.shape[0]}, lambda k, h: jnp.tanh(h @ {name}[k]), {x})",
        f"jax.vmap(lambda k, r: r @ {name}[k])(ids % {w.shape[0]}, {x})",
        f"jax.vmap(lambda k, r: r @ jnp.take({name}, k, axis=0))(ids % {w.shape[0]}, {x})",
        f"jnp.einsum('ti,tij->tj', {x}, {name}[ids % {w.shape[0]}])",
        f"lax.switch(i, [lambda h, k=k: h @ {name}[k] for k in range({w.shape[0]})], {x})",
        f"lax.ragged_dot({x}, {name}, jnp.asarray([2, 1] + [0] * {w.shape[0] - 2}))",
        f"jax.checkpoint(lambda h: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, {name})[0])({x})",
    ])  # fmt: skip


def other_use(d: Drawing) -> str:
    name, w = d.weight(lambda w: w.ndim >= 1)
    x = d.value(lambda x: x.ndim == 2)[0]
    n = w.shape[0]
    return d.one([
        f"jnp.sum({name} ** 2)",
        f"jnp.take({name}, jnp.asarray([[0, 1], [{n - 1}, 0]]), axis=0)",
        f"jax.nn.one_hot(ids, {n}) @ {name}.reshape({n}, -1)",
        f"lax.conv_general_dilated({x}[None], {name}.reshape(2, 2, -1)[:, :, :4], (1,), 'SAME',"
        " dimension_numbers=('NHC', 'HIO', 'NHC'), feature_group_count=1)",
        f"lax.conv_general_dilated(x4[None], jnp.broadcast_to({name}, (2, *{name}.shape)), (1,), 'SAME',"
        " dimension_numbers=('NHC', 'HIO', 'NHC'))",
        f"{x}.sum() * {name}",
    ])  # fmt: skip


def activation(d: Drawing) -> str:
    name, x = d.value()
    total = f"{name}.sum(-1)" if x.ndim else f"{name} + 1"
    return d.one([f"jnp.tanh({name})", f"{name} * c", total, f"{name}[..., :4]"])


VIEWS = (transpose, reshape, cut, gather, grow, arithmetic, together, marked, densely)
USES = (product, product, einsum, matrix_use, matrix_use, stack_use, stack_use, other_use)
ROLES = ("io", "oi", "bio", "boi", "ibo", "iio", "ioo", "io")


def draw(seed: int) -> Random:
    """A program of a few lines."""
    d = Drawing(seed)
    roles = {name: d.one(ROLES) for name in ("w", "k")[: 1 + d.chance(0.6)]}
    square = d.one(SIZES)
    size = lambda: square if d.chance(0.7) else d.one(SIZES)
    sizes = {name: tuple(d.one((1, 2, 3)) if role == "b" else size() for role in text) for name, text in roles.items()}
    dtype = d.one(["float32"] * 6 + ["bfloat16"])
    quantised = d.one(["int8", "nf4"]) if d.chance(0.25) else None
    mode = d.one(["grad", "grad", "jit", "jit", "vmap"])
    shapes = jax.eval_shape(lambda: arguments(dtype))
    kernels = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in sizes.items()}
    env = {**shapes, "p": kernels}
    d.weights = {f"p['{name}']": x for name, x in kernels.items()}
    d.values = {name: shapes[name] for name in ("x4", "x8", "y4", "y8")}
    for _ in range(d.one((1, 2, 3, 4, 5, 6))):
        _attempt(d, d.one(VIEWS) if d.chance(0.6) else d.one(USES), env)
    for _ in range(8):
        if any(name in d.values for name in _ends(d.lines)):
            break
        _attempt(d, d.one(USES), env)
    if d.chance(0.3):
        _attempt(d, activation, env)
    return Random(tuple(d.lines), roles, sizes, d.one(KINDS), dtype, quantised, mode)


def _attempt(d: Drawing, template: Callable[[Drawing], str], env: dict[str, Any]) -> None:
    try:
        expression = template(d)
    except LookupError:
        return
    d.add(expression, template in VIEWS, env)


def _ends(lines: list[str]) -> list[str]:
    return [line.partition(" = ")[0] for line in lines]


# ------------------------------------------------------------------------------------------- the law


def wrapped(program: Random) -> Any:
    """The program's kernels, with random adapters."""
    rng = np.random.default_rng(3)
    noise = lambda shape: jnp.asarray(0.6 * rng.standard_normal(shape), program.dtype)
    params = {name: noise(shape) for name, shape in program.sizes.items()}
    group = lambda text, role: tuple(i for i, letter in enumerate(text) if letter == role)
    axes = {f"re:{name}": jlora.Axes(*(group(text, role) for role in "iob")) for name, text in program.roles.items()}
    variant, _, on = program.kind.partition(" ")
    options = {"on": "in"} if on else OPTIONS.get(variant, {})
    spec = jlora.LoraSpec(targets=tuple(axes), axes=axes, rank=2, alpha=2, variant=variant, options=options)
    if program.quantised:
        params = jlora.quant.quantize(params, program.quantised, targets=tuple(axes), axes=axes, tile=2)
    trainable, frozen = jlora.partition(jlora.wrap(params, spec))
    return jlora.combine(filled(trainable, 0.3), frozen)


def check(program: Random) -> str:
    """What is wrong with a program, in a word and a number; nothing if the law holds.

    What differs in bfloat16 is rounding, unless it differs in float32 too.
    """
    told = _check(program)
    is_rounding = told.startswith("is wrong") and program.dtype != "float32"
    return _check(dataclasses.replace(program, dtype="float32")) if is_rounding else told


def _check(program: Random) -> str:
    params, given = wrapped(program), arguments(program.dtype)
    dense = jnp.dtype(program.dtype) if program.quantised else None
    merged = lambda tree: program.fn(jlora.merge(tree, dtype=dense), given)
    factored = lambda tree: jlora.apply(program.fn)(tree, given)
    run = {"grad": _with_gradients, "jit": _values, "vmap": _mapped}[program.mode]
    both = lambda tree: (run(factored)(tree), run(merged)(tree))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jlora.DenseFallbackWarning)
        try:
            found, expected = evaluated(both, params)
        except Exception as error:
            return f"raises {type(error).__name__}: {str(error)[:300]}" if _runs(run(merged), params) else ""
    dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (found, expected)]
    if dtypes[0] != dtypes[1]:
        return f"has types {dtypes}"
    is_coarse = "bfloat16" in str(program) or program.quantised is not None
    worst = max(map(_difference, jax.tree.leaves(found), jax.tree.leaves(expected)), default=0.0)
    return f"is wrong by {worst:.2g}" if not worst <= TOLERANCE["bfloat16" if is_coarse else "float32"] else ""


def _runs(fn: Callable[[Any], Any], params: Any) -> bool:
    """Whether a function runs; of one that does not there is nothing to say."""
    try:
        jax.jit(fn)(params)
    except Exception:
        return False
    return True


def _difference(x: Any, y: Any) -> float:
    x, y = (np.asarray(v, np.complex128) for v in (x, y))
    if x.shape != y.shape or (np.isnan(x) != np.isnan(y)).any():
        return np.inf
    x, y = np.nan_to_num(x), np.nan_to_num(y)
    return float(np.abs(x - y).max(initial=0) / (1e-1 + np.abs(y).max(initial=0)))


def _values(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return fn


def _with_gradients(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def loss(tree: Any) -> tuple[Any, Any]:
        made = fn(tree)
        numbers = lambda x: jnp.nan_to_num(jnp.real(x)).ravel().astype(jnp.float32)
        return sum(jnp.vdot(jnp.cos(jnp.arange(x.size)), numbers(x)) for x in made), made

    return jlora.value_and_grad(loss, has_aux=True)


def _mapped(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Over two adapters of one base."""

    def run(tree: Any) -> Any:
        trainable, frozen = jlora.partition(tree)
        both = jax.tree.map(lambda x: jnp.stack([x, -0.5 * x]), trainable)
        return jax.vmap(lambda part: fn(jlora.combine(part, frozen)))(both)

    return run


def shrunk(program: Random, told: str) -> Random:
    """The program without the lines, and with the simplest settings, with which it still fails alike."""
    kind = told.split()[0]
    fails = lambda candidate: check(candidate).split()[:1] == [kind]
    changed = True
    while changed:
        changed = False
        for candidate in _smaller(program):
            if fails(candidate):
                program, changed = candidate, True
                break
    return program


def _smaller(program: Random) -> list[Random]:
    candidates = []
    for i, line in enumerate(program.lines):
        name = line.partition(" = ")[0]
        gone, rest = {name}, []
        for other in program.lines[i + 1 :]:
            if gone & set(re.findall(r"\bv\d+\b", other.partition(" = ")[2])):
                gone.add(other.partition(" = ")[0])
            else:
                rest.append(other)
        lines = (*program.lines[:i], *rest)
        if lines:
            candidates.append(dataclasses.replace(program, lines=lines))
    simpler = {"quantised": None, "dtype": "float32", "mode": "jit", "kind": "lora"}
    candidates += [
        dataclasses.replace(program, **{field: value})
        for field, value in simpler.items()
        if getattr(program, field) != value
    ]
    used = " ".join(program.lines)
    if unused := [name for name in program.roles if f"p['{name}']" not in used]:
        keep = lambda facts: {name: fact for name, fact in facts.items() if name not in unused}
        candidates.append(dataclasses.replace(program, roles=keep(program.roles), sizes=keep(program.sizes)))
    return candidates


def causes(program: Random) -> collections.Counter[str]:
    """Why kernels are computed densely in a program, by primitive."""
    params, given = wrapped(program), arguments(program.dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(functools.partial(jlora.apply(program.fn), params), given)
    told = [str(w.message) for w in caught if issubclass(w.category, jlora.DenseFallbackWarning)]
    return collections.Counter(re.search(r"for (the output|\S+?)(?: at|:)", text)[1] for text in told)  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--causes", action="store_true", help="count the causes of dense computations instead")
    parser.add_argument("--values", action="store_true", help="look at values alone, which takes half the time")
    args = parser.parse_args()
    seeds, failed, found = range(args.seed, args.seed + args.count), 0, collections.Counter[str]()
    for done, seed in enumerate(seeds, 1):
        program = dataclasses.replace(draw(seed), mode="jit") if args.values else draw(seed)
        if args.causes:
            found.update(causes(program))
        elif told := check(program):
            failed += 1
            small = shrunk(program, told)
            print(f"\nseed {seed} {check(small)}\n{small}", flush=True)
        if done % 200 == 0:
            jax.clear_caches()
            print(f"{done} programs, {failed} failed", file=sys.stderr, flush=True)
    print(f"seeds {seeds.start} to {seeds.stop - 1}: {failed} of {len(seeds)} failed" if not args.causes else found)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
