"""`activated`: an adapter that acts at some tokens only, and the base at the others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.rows import Batched, by_row, stopped
from jlora.apply import FALLBACKS
from jlora.interpret.factored import Factored
from jlora.nodes.fields import frozen, trained
from jlora.nodes.node import AdaptedParam, TrainableParam, is_node
from jlora.targets.named import Names
from jlora.targets.paths import flatten
from jlora.variants.bias import GainedBiasParam, LoraBiasParam
from jlora.variants.tokens import TokensParam


def activated(
    fn: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    rng: jax.Array | None = None,
    fallback: str = "warn",
    train: Names = (),
) -> Callable[..., Any]:
    """Makes an unchanged function run with an adapter that acts at some tokens only: activated LoRA (aLoRA).

    At the other tokens every kernel is the base's. So the keys and values of the tokens before the first active one are
    those of the base, and a cache of them serves the base and any number of such adapters.

    Args:
      fn: as for `jlora.apply`. It sees batches of one row: an array of shape (rows, ...) comes as (1, ...).
      in_axes: of the arguments behind `active`, the axis of the rows, as in `jax.vmap`: one for all, or a tuple with
        one for each, which may be a tree; None for what all rows share.
      out_axes: of the results, likewise.
      rng, fallback, train: as in `jlora.apply`; each row has dropout of its own.

    Returns:
      A function of (tree, active, *args): a wrapped tree of low-rank adapters; where they act, an array of booleans of
      shape (rows, tokens), as `invoked` gives it; and the arguments of `fn`. In a step with a cache, `active` is for
      the tokens of that step. To use under `jax.jit`, in losses too.

    Raises:
      ValueError: if `fallback` is none of the three; when called, if nothing is wrapped, the rows are not as many as
        those of `active`, or an adapted kernel is multiplied with anything but one vector for each token.
      TypeError: when called, if `active` is no array of booleans (rows, tokens), or the tree has adapters that are no
        product beside the kernel's (DoRA, IA3, OFT and their like), biases, or leaves that are trained in full: they
        would act at all tokens.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> params = jax.tree.map(lambda x: x + 1, params)  # trained, say
      >>> run = jax.jit(jlora.adapters.activated(lambda p, x: x @ p["kernel"]))
      >>> active = jnp.array([[False, False, True], [False, False, False]])
      >>> y = run(params, active, jnp.ones((2, 3, 4)))
      >>> (y != y[1, 0])[..., 0]  # other than the base
      Array([[False, False,  True],
             [False, False, False]], dtype=bool)

    References:
      Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", arXiv:2504.12397.
    """
    if fallback not in FALLBACKS:
        raise ValueError(f"activated: fallback must be one of {FALLBACKS}, found {fallback!r}")
    return Activated(fn, in_axes, out_axes, rng, train, functools.partial(by_row, fallback))


def invoked(ids: Any, tokens: Sequence[int]) -> jax.Array:
    """Where an activated adapter acts: from the last occurrence of its invocation tokens in a row on, these included.

    Args:
      ids: token ids, of shape (rows, length).
      tokens: the ids of the invocation, in their order, as PEFT's ``alora_invocation_tokens``; known when the function
        is compiled.

    Returns:
      Booleans of shape (rows, length): all False in a row without the invocation.

    Raises:
      ValueError: if `tokens` are no whole numbers, or there are none, or `ids` is no array of whole numbers
        (rows, length).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.adapters.invoked(jnp.array([[5, 1, 2, 7, 1, 2, 9], [1, 7, 2, 7, 7, 7, 1]]), [1, 2]).astype(int)
      Array([[0, 0, 0, 0, 1, 1, 1],
             [0, 0, 0, 0, 0, 0, 0]], dtype=int32)
    """
    try:
        wanted, ids = np.asarray(tokens), jnp.asarray(ids)
    except (ValueError, TypeError) as error:  # ragged, or traced
        raise ValueError(
            "invoked: ids are one array (rows, length), padded, and tokens a list of whole numbers that is known when "
            "the function is compiled"
        ) from error
    if wanted.ndim != 1 or not wanted.size or wanted.dtype.kind not in "iu":
        raise ValueError(f"invoked: tokens are the ids of an invocation, such as [49152, 12], found {tokens!r}")
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"invoked: ids are whole numbers of shape (rows, length), found {ids.dtype} of {ids.shape}")
    places = jnp.arange(ids.shape[1])
    ahead = jnp.pad(ids, ((0, 0), (0, wanted.size - 1)), constant_values=-1)
    found = jnp.all(jnp.stack([ahead[:, i : i + len(places)] == token for i, token in enumerate(wanted)]), axis=0)
    found = found & (places + wanted.size <= len(places))
    last = jnp.max(jnp.where(found, places, -1), axis=1, keepdims=True)
    return (last >= 0) & (places >= last)


@dataclasses.dataclass(frozen=True, eq=False)
class Activated(Batched):
    """What `activated` returns."""

    name: ClassVar[str] = "activated"

    def __call__(self, tree: Any, active: Any, *args: Any, **kwargs: Any) -> Any:
        self._no_keywords(kwargs)
        _check(tree)
        active = jnp.asarray(active)
        if active.ndim != 2 or active.dtype != bool:
            raise TypeError(
                f"activated: active says at which tokens the adapter acts: booleans of shape (rows, tokens), found "
                f"{active.dtype} of shape {active.shape}"
            )
        held = stopped(tree, self.train)
        own = lambda mask: jax.tree.map(lambda leaf: ActiveParam.of(leaf, mask), held, is_leaf=is_node)
        return self._by_row(own, active, args)


def _check(tree: Any) -> None:
    """Refuses a tree without adapters, or with what would act at all tokens."""
    paths, leaves, _ = flatten(tree, is_node)
    nodes = [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]
    if not nodes:
        raise ValueError("activated: its first argument is a wrapped tree; nothing in this one is wrapped")
    for path, node in nodes:
        if found := next((what for kinds, what in _EVERYWHERE if isinstance(node, kinds)), None):
            raise TypeError(f"activated: {path} {found}, so it would act at all tokens; wrap without it")


_EVERYWHERE = (
    (TrainableParam, "is trained in full, by train= or bias="),
    (TokensParam, "has rows that are trained, by train_tokens="),
    ((LoraBiasParam, GainedBiasParam), "is the bias of an adapter"),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ActiveParam(AdaptedParam):
    """A kernel with an adapter that acts at some tokens of one row.

    Args:
      base: the kernel.
      node: the adapter's node, without its base.
      active: whether it acts, of shape (tokens,).
    """

    base: Any = frozen()
    node: Any = trained()
    active: Any = frozen()

    @classmethod
    def of(cls, leaf: Any, active: Any) -> Any:
        if not is_node(leaf):
            return leaf
        return cls(leaf.base, dataclasses.replace(leaf, base=()), active)

    @property
    def dropout(self) -> float:
        return getattr(self.node, "dropout", 0.0)

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        value = dataclasses.replace(self.node, base=self.base).effective(name, key)
        if not isinstance(value, Factored) or value.roles != ("a", "b"):
            raise TypeError(
                f"activated: {name} is a {type(self.node).__name__}, whose update is no product beside the kernel's, "
                "so that it would act at all tokens; give a tree of LoRA, LoRA-FA, VeRA, AdaLoRA or their like"
            )
        active = self.active.reshape(*[1] * self.ndim, -1)
        return value.replace(factors=(*value.factors, active), roles=(*value.roles, "active"), varies=None)
