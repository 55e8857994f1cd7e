"""Loops, threads, and arrays without elements."""

import threading

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora.interpret.interpreter import Interpreter
from tests.interpret.support import VARIANTS, check, noise, wrapped
from tests.support import error, thinned

MATRIX = jlora.Axes((0,), (1,))
X = noise(5, 8)

APART = {
    "map": lambda w, x: lax.map(lambda row: 2.0 * row, w).sum() * x,
    "scan": lambda w, x: lax.scan(lambda h, row: (h + row, h), jnp.zeros(8), w)[1] * x[0],
    "scan of the transpose": lambda w, x: lax.scan(lambda h, row: (h + row @ x[0], None), 0.0, w.T)[0] * x,
    "associative scan": lambda w, x: x @ lax.associative_scan(jnp.add, w),
    "mapped rows": lambda w, x: jax.vmap(lambda row: jnp.sin(row))(w) * x[0, 0],
    "rows in chunks": lambda w, x: lax.map(jnp.sum, w, batch_size=4) * x[0],
}


@pytest.mark.parametrize("variant, name", thinned(4, VARIANTS, APART))
def test_a_kernel_that_a_loop_takes_apart(variant, name):
    """Row by row, it is no longer one that is rotated."""
    check(lambda p, x: APART[name](p["w"], x), wrapped(noise(8, 8), MATRIX, variant=variant), X, fallback="ignore")


def _until(stop, step):
    return lambda x: lax.while_loop(stop, step, x)


WHILE = {
    "each its own number of steps": lambda w: _until(lambda h: jnp.abs(h).sum() > 1, lambda h: 0.1 * jnp.tanh(h @ w)),
    "a kernel in the predicate": lambda w: _until(lambda h: jnp.abs(h @ w).sum() > 1, lambda h: 0.5 * h),
    "of pairs": lambda w: (
        lambda x: lax.while_loop(
            lambda s: s[1] < jnp.abs(x[0]) * 4, lambda s: (0.2 * jnp.sin(s[0] @ w), s[1] + 1), (x, 0.0)
        )[0]
    ),
}


@pytest.mark.parametrize("variant, name", thinned(4, VARIANTS, WHILE))
def test_loops_that_end_one_by_one(variant, name):
    params = wrapped(noise(8, 8), MATRIX, variant=variant)
    for fn in (
        lambda p, x: jax.vmap(WHILE[name](p["w"]))(x),
        lambda p, x: jax.vmap(jax.vmap(WHILE[name](p["w"])))(x.reshape(1, 5, 8)),
        lambda p, x: jax.vmap(WHILE[name](p["w"]), in_axes=1)(x.T),
    ):
        found, expected = jlora.apply(fn)(params, X), fn(jlora.merge(params), X)
        assert error(found, expected) <= 2e-5


EMPTY = {
    "no rows": lambda w, x: x[:0] @ w,
    "no experts": lambda w, x: jnp.einsum("ti,eio->teo", x, jnp.broadcast_to(w, (0, 8, 8))),
    "of the other side": lambda w, x: w.T @ x[:0].T,
}


@pytest.mark.parametrize("variant, name", thinned(4, VARIANTS, EMPTY))
def test_arrays_without_elements(variant, name):
    check(lambda p, x: EMPTY[name](p["w"], x), wrapped(noise(8, 8), MATRIX, variant=variant), X, fallback="ignore")


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("tile", [2, 4, 8])
def test_a_quantised_kernel_scanned_along_its_tiles(tile, dtype):
    """Layers that share a scale: each finds that of its tile."""
    base = jlora.quant.quantize({"w": noise(8, 8)}, dtype, targets="w", tile=tile, axes={"w": MATRIX})
    fn = lambda p, x: lax.scan(lambda h, row: (h + row, row * h), x[0], p["w"])
    found, expected = jlora.apply(fn)(base, X), fn(jlora.quant.dequantize(base), X)
    assert error(found, expected) <= 1e-6


def test_threads_walk_apart():
    """One interpreter is shared by all that trace: each knows of its own walk alone."""
    barrier, seen = threading.Barrier(2), {}

    def rule(interpreter, eqn, x, weight):
        barrier.wait(10)  # both threads are within a walk
        seen[threading.current_thread().name] = len(interpreter.place(eqn)), interpreter.thin(eqn.invars[0], x).shape
        barrier.wait(10)
        return x @ weight.base

    interpreter = Interpreter({"dot_general": rule}, lambda *_: None)
    jaxpr = jax.make_jaxpr(lambda w, c: jnp.broadcast_to(c, (5, 8)) @ w)(noise(8, 4), noise(8))
    weight = wrapped(noise(8, 4), MATRIX)["w"].effective("w", None)
    walk = lambda: interpreter.run(jaxpr, [weight, noise(8)])
    threads = [threading.Thread(target=walk, name=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == dict.fromkeys("ab", (2, (1, 8)))


def test_one_function_traced_by_many_threads():
    params, found = wrapped(noise(3, 8, 8), jlora.Axes((1,), (2,), (0,))), {}
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w) + jax.jit(jnp.dot)(h, w), None), x, p["w"])[0]
    applied, expected = jlora.apply(fn), fn(jlora.merge(params), X)
    run = lambda n: found.update({n: jax.jit(lambda p, x: applied(p, x + 0 * n))(params, X)})
    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(error(y, expected) <= 1e-4 for y in found.values())
