"""Views of a quantised leaf: codes and scales follow them where no tile is cut, and give the numbers of the view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora.interpret.stored import STORED, regrouped
from jlora.nodes.qarray import dense
from tests.support import exactly


def quantised(*shape, axes, tile=4):
    """Tiles lie along the first of the in axes."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    given = {exactly("w"): axes}
    return jlora.quant.quantize({"w": x}, "int8", targets="w", tile=tile, axes=given)["w"]


ROWS, COLUMNS = quantised(8, 12, axes=jlora.Axes((0,), (1,))), quantised(8, 12, axes=jlora.Axes((1,), (0,)))
ONE = quantised(8, 12, axes=jlora.Axes((0,), (1,)), tile=None)  # one scale for each column
STACK = quantised(3, 8, 12, axes=jlora.Axes((1,), (2,), (0,)))
PICK = jnp.asarray([2, 0])

FOLLOWED = {
    "transpose": (ROWS, lambda w: w.T),
    "whole tiles": (ROWS, lambda w: w[4:8]),
    "columns": (ROWS, lambda w: w[:, 3:9]),
    "every second column": (ROWS, lambda w: lax.slice(w, (0, 0), (8, 12), (1, 2))),
    "any rows of one scale": (ONE, lambda w: w[:, 2:5]),
    "split at a tile": (ROWS, lambda w: lax.split(w, (4, 4), 0)[1]),
    "split of columns": (ROWS, lambda w: lax.split(w, (5, 7), 1)[0]),
    "a layer": (STACK, lambda w: lax.slice(w, (1, 0, 0), (2, 8, 12))),
    "a layer by its number": (STACK, lambda w: lax.dynamic_slice(w, (PICK[0], 0, 0), (1, 8, 12))),
    "layers looked up": (STACK, lambda w: w.at[PICK].get(mode="promise_in_bounds")),
    "rows looked up": (COLUMNS, lambda w: w.at[PICK].get(mode="promise_in_bounds")),
    "a new axis": (ROWS, lambda w: lax.broadcast_in_dim(w, (8, 1, 12), (0, 2))),
    "tiled axis split at the tiles": (ROWS, lambda w: w.reshape(2, 4, 12)),
    "tiled axis split within the tiles": (ROWS, lambda w: w.reshape(4, 2, 12)),
    "columns split": (ROWS, lambda w: w.reshape(8, 3, 4)),
    "merged, the tiles last": (COLUMNS, lambda w: w.reshape(96)),
    "layers merged into rows": (STACK, lambda w: w.reshape(24, 12)),
    "side by side": (ROWS, lambda w: lax.concatenate([w, w], 1)),
    "one after the other": (ROWS, lambda w: lax.concatenate([w, w], 0)),
}
CUT = {
    "half of a tile": (ROWS, lambda w: w[2:6]),
    "every second row": (ROWS, lambda w: lax.slice(w, (0, 0), (8, 12), (2, 1))),
    "split within a tile": (ROWS, lambda w: lax.split(w, (2, 6), 0)[0]),
    "rows by their number": (ROWS, lambda w: lax.dynamic_slice(w, (PICK[0], 0), (4, 12))),
    "rows of tiles looked up": (ROWS, lambda w: w.at[PICK].get(mode="promise_in_bounds")),
    "repeated": (ROWS, lambda w: lax.broadcast_in_dim(w, (3, 8, 12), (1, 2))),
    "merged, the tiles first": (ROWS, lambda w: w.reshape(96)),
    "split so that tiles are cut": (quantised(12, 4, axes=jlora.Axes((0,), (1,))), lambda w: w.reshape(2, 6, 4)),
}


def followed(stored, view):
    """What the rule makes of the leaf: the pieces of which the view is the first, or None."""
    shape = jax.ShapeDtypeStruct(stored.shape, jnp.float32)
    eqn = [e for e in jax.make_jaxpr(view)(shape).eqns if e.primitive.name in STORED][-1]
    if eqn.primitive.name == "concatenate":
        return STORED["concatenate"](eqn, stored, stored)
    return STORED[eqn.primitive.name](eqn, stored, *starts_of(eqn))


def starts_of(eqn):
    """The indices of a lookup and of a slice at a traced place, which the tests know."""
    if eqn.primitive.name == "gather":
        return (PICK[:, None],)
    if eqn.primitive.name != "dynamic_slice":
        return ()
    return [PICK[0], *[jnp.int32(0)] * (len(eqn.invars) - 2)]


@pytest.mark.parametrize("name", FOLLOWED)
def test_codes_follow(name):
    stored, view = FOLLOWED[name]
    expected = np.asarray(view(dense(stored)))
    pieces = [np.asarray(dense(piece)) for piece in followed(stored, view)]
    assert any(piece.shape == expected.shape and np.array_equal(piece, expected) for piece in pieces)


@pytest.mark.parametrize("name", CUT)
def test_codes_do_not_follow(name):
    assert followed(*CUT[name]) is None


def test_leaves_of_other_tiles_do_not_go_together():
    eqn = jax.make_jaxpr(lambda v, w: lax.concatenate([v, w], 0))(dense(ROWS), dense(COLUMNS)).eqns[-1]
    assert STORED["concatenate"](eqn, ROWS, COLUMNS) is None


def test_a_stack_is_taken_apart_by_layers_alone():
    eqn = jax.make_jaxpr(jnp.unstack)(dense(STACK)).eqns[-1]
    if eqn.primitive.name == "unstack":
        pieces = STORED["unstack"](eqn, STACK)
        np.testing.assert_array_equal(jnp.stack([dense(piece) for piece in pieces]), dense(STACK))
        eqn = jax.make_jaxpr(lambda w: jnp.unstack(w, axis=1))(dense(STACK)).eqns[-1]
        assert STORED["unstack"](eqn, STACK) is None


@pytest.mark.parametrize(
    "old, new, groups",
    [
        ((6, 4), (6, 4), [([0], [0]), ([1], [1])]),
        ((6, 4), (24,), [([0, 1], [0])]),
        ((24,), (6, 4), [([0], [0, 1])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((2, 3, 4), (6, 2, 2), [([0, 1], [0]), ([2], [1, 2])]),
        ((3, 1), (3,), [([0], [0]), ([1], [])]),
    ],
)
def test_a_reshape_falls_into_runs_of_axes(old, new, groups):
    assert regrouped(old, new) == groups
