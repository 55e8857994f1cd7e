"""What the tests share: specs from the zoo's truths, random adapters, errors, costs."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jlora
from tests.programs import Program


def exactly(path: str) -> str:
    """A pattern for one path."""
    return "re:" + re.escape(path)


def spec_of(program: Any, rank: int = 2, **settings: Any) -> jlora.LoraSpec:
    """The spec that adapts the kernels of a program, with the axes it tells, at scale 1."""
    axes = {exactly(path): jlora.Axes(*groups) for path, groups in program.axes.items()}
    settings = {"targets": tuple(axes), "axes": axes, "rank": rank, "alpha": rank} | settings
    return jlora.LoraSpec(**settings)


def randomised(tree: Any, std: float = 0.3) -> Any:
    """The wrapped tree with normal noise in all that trains."""
    trainable, frozen = jlora.partition(tree)
    return jlora.combine(filled(trainable, std), frozen)


def adapted(program: Program, base: Any = None) -> Any:
    """The program's parameters, or a base of few bits in their place, wrapped, with random adapters.

    It is the plan of `wrap`, filled, so that nothing is drawn.
    """
    base = program.params if base is None else base
    trainable, frozen = jlora.partition(jlora.wrap(jax.eval_shape(lambda: base), spec_of(program)))
    bases = jax.tree.unflatten(jax.tree.structure(frozen), jax.tree.leaves(base))
    return jlora.combine(filled(trainable), bases)


def thinned(share: int, *axes: Any) -> list[Any]:
    """All combinations of some values, as parameters of a test: one in `share` is quick, by turns, the others slow."""
    combinations = itertools.product(*map(enumerate, axes))
    quick = lambda pairs: sum(i for i, _ in pairs) % share == 0
    slow = lambda pairs: () if quick(pairs) else pytest.mark.slow
    return [pytest.param(*(value for _, value in pairs), marks=slow(pairs)) for pairs in combinations]


def filled(trainable: Any, std: float = 0.3) -> Any:
    """A tree of arrays, or of shapes, with normal noise in their places."""
    leaves, treedef = jax.tree.flatten(trainable)
    rng = np.random.default_rng(0)
    return treedef.unflatten([jnp.asarray(rng.normal(scale=std, size=x.shape).astype(x.dtype)) for x in leaves])


def floats(tree: Any) -> list[np.ndarray]:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return [np.asarray(x, np.float64) for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]


def error(found: Any, expected: Any) -> float:
    """The largest difference over the largest value; infinite where one alone is no number."""
    pairs = list(zip(floats(found), floats(expected), strict=True))
    if any((np.isnan(x) != np.isnan(y)).any() for x, y in pairs):
        return np.inf
    pairs = [(np.nan_to_num(x), np.nan_to_num(y)) for x, y in pairs]
    largest = max((np.abs(y).max(initial=0) for _, y in pairs), default=0) + 1e-6
    return max((np.abs(x - y).max(initial=0) for x, y in pairs), default=0) / largest


def same_bits(x: Any, y: Any) -> bool:
    """Whether two trees hold the same bits, in the same structure."""
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in pairs)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inside in jaxprs_in_params(eqn.params):
            yield from equations(inside)


def has_loop(jaxpr: Any) -> bool:
    """Whether there is a loop at any depth: compiled as one even in eager JAX, so that XLA may round otherwise."""
    return any(eqn.primitive.name in ("scan", "while") for eqn in equations(jaxpr))


def evaluated(fn: Any, *args: Any) -> Any:
    """``fn(*args)`` as one program of constants, most of which XLA evaluates while it compiles.

    That takes about half the time of making code for it; loops are compiled as ever. For what says nothing of the
    compiled program itself.
    """
    leaves, treedef = jax.tree.flatten(args)
    constants = [np.asarray(x) if isinstance(x, jax.Array) and not _is_key(x) else x for x in leaves]
    arrays = lambda: [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in constants]
    return jax.jit(lambda: fn(*treedef.unflatten(arrays())))()


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def compiled(fn: Any, *args: Any, **kwargs: Any) -> Any:
    return jax.jit(fn, **kwargs).lower(*args).compile()


def flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes
