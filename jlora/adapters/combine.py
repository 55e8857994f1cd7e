"""Several updates of one kernel made one: the mathematics, for trees and for files.

References:
  PEFT's ``add_weighted_adapter``, https://huggingface.co/docs/peft/developer_guides/model_merging.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.nearest import Factors, nearest, truncated
from jlora.adapters.pruning import agreeing, count_kept, disjoint_mean, dropped, largest
from jlora.interpret.compat import is_traced

_OF_FACTORS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("linear", "cat", "svd", *(name + end for name in _OF_FACTORS for end in ("", "_svd")))
MAJORITIES = ("total", "frequency")
A, B, UPDATE = range(3)  # what is pruned, for the keys


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How updates are combined.

    Args:
      method: one of `METHODS`.
      density: the share of values that pruning keeps; other methods do without.
      majority_sign_method: one of `MAJORITIES`, of the methods with votes.
      svd_rank: of the result of a method with svd; None: the largest rank of what is combined.
    """

    method: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None

    @property
    def is_of_updates(self) -> bool:
        """Whether whole updates are combined, and decomposed again."""
        return self.method.endswith("svd")

    @property
    def is_random(self) -> bool:
        return self.method.startswith("dare")

    @property
    def has_votes(self) -> bool:
        return "ties" in self.method

    @property
    def prunes(self) -> bool:
        return self.method.removesuffix("_svd") in _OF_FACTORS

    def check(self, where: str, count: int) -> None:
        """Refuses what is no recipe for so many adapters.

        Raises:
          ValueError: that says which setting, what was expected and what was found.
        """
        if self.method not in METHODS:
            near = difflib.get_close_matches(str(self.method), METHODS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: method must be one of {', '.join(METHODS)}, found {self.method!r}{meant}")
        if self.majority_sign_method not in MAJORITIES:
            raise ValueError(
                f"{where}: majority_sign_method must be 'total' or 'frequency', found {self.majority_sign_method!r}"
            )
        self._check_density(where)
        if self.svd_rank is not None:
            check_rank(where, "svd_rank", self.svd_rank)
        if count == 1 and self.prunes:
            raise ValueError(
                f"{where}: method={self.method!r} is for several adapters, and there is one, of which PEFT makes "
                "method='linear' whatever is asked for; say that"
            )

    def _check_density(self, where: str) -> None:
        if self.density is None and not self.prunes:
            return
        if not (isinstance(self.density, (int, float, np.number)) and 0 < self.density <= 1):
            needs = f"method={self.method!r} needs density" if self.prunes else "density is"
            raise ValueError(
                f"{where}: {needs}, the share of values that is kept, above 0 and at most 1, found {self.density!r}"
            )

    def check_factors(self, where: str, path: str, ranks: Sequence[int], shapes: Sequence[Sequence[int]]) -> None:
        """Refuses the updates of one kernel that the method can't combine.

        Args:
          where: who asks.
          path: of the kernel.
          ranks: of the updates.
          shapes: of what is pruned in each.
        """
        if not self.is_of_updates and self.method != "cat" and len({*ranks}) > 1:
            raise ValueError(
                f"{where}: method={self.method!r} adds factor to factor, so all updates of a kernel need one rank; "
                f"those of {path} have {', '.join(map(str, ranks))}. method='cat' and the methods with svd take them"
            )
        empty = [shape for shape in shapes if self.prunes and not count_kept(shape, self.density or 0)]
        if empty and not self.is_random:
            raise ValueError(
                f"{where}: density={self.density:g} keeps none of the {math.prod(empty[0])} values of a factor of "
                f"{path}; raise it"
            )


def check_rank(where: str, name: str, rank: Any) -> None:
    """Refuses a rank that is no positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ValueError(f"{where}: {name} must be a positive integer, found {rank!r}")


def checked_weights(where: str, weights: Any, count: int) -> jax.Array:
    """The weights as an array of shape (count,).

    Raises:
      ValueError: if there are others than that many finite numbers.
    """
    if isinstance(weights, Mapping):
        raise ValueError(f"{where}: weights must be a sequence of {count} numbers, in the adapters' order, not a dict")
    found = jnp.asarray(weights, jnp.float32)
    if found.shape != (count,):
        raise ValueError(f"{where}: expected {count} weights, one for each adapter, found shape {tuple(found.shape)}")
    if not is_traced(found) and not np.isfinite(np.asarray(found)).all():
        raise ValueError(f"{where}: weights must be finite, found {np.asarray(found).tolist()}")
    return found


def combined(
    pairs: Sequence[Factors],
    scales: Sequence[float],
    weights: jax.Array,
    recipe: Recipe,
    rank: int,
    places: Sequence[int],
    key: jax.Array | None,
) -> Factors:
    """One pair of factors, at scale 1, for several updates ``s_i * A_i @ B_i`` of one kernel.

    ``"cat"`` and ``"svd"`` stand for ``sum(w_i * s_i * A_i @ B_i)``: the one exactly, the other as well as its rank
    allows. The methods of factors add A to A and B to B, each times ``sqrt(|w_i * s_i|)``, and A with the sign too: as
    PEFT does, and an approximation, since the product has terms ``A_i @ B_j`` too.

    Args:
      pairs: of each update A, of shape (in, r_i), and B, of shape (r_i, out).
      scales: s_i.
      weights: w_i, of shape (n,).
      recipe: the method and its settings.
      rank: of what a method with svd gives; of a smaller kernel as much as it has.
      places: of the updates' adapters among all: with the key they tell what DARE draws.
      key: of the kernel, for DARE; None for other methods.

    Returns:
      A of shape (in, r) and B of shape (r, out).
    """
    strengths = weights * jnp.asarray(scales, weights.dtype)
    rank = min(rank, pairs[0][0].shape[0], pairs[0][1].shape[1])
    keys = lambda part: [None if key is None else part_key(key, place, part) for place in places]
    if recipe.method in ("cat", "svd"):
        joined = _joined(pairs, strengths)
        return joined if recipe.method == "cat" else truncated(*joined, rank)
    if recipe.is_of_updates:
        updates = [scale * (a @ b) for (a, b), scale in zip(pairs, scales, strict=True)]
        return nearest(_mixed(updates, weights, recipe, keys(UPDATE)), rank)[0]
    root, sign = jnp.sqrt(jnp.abs(strengths)), jnp.where(strengths < 0, -1, 1)
    lora_a = _mixed([a for a, _ in pairs], sign * root, recipe, keys(A))
    return lora_a, _mixed([b for _, b in pairs], root, recipe, keys(B))


def part_key(key: jax.Array, place: int, part: int) -> jax.Array:
    """The key of what DARE draws in one adapter for A, B or the whole update of a kernel, whose key is given."""
    return jax.random.fold_in(jax.random.fold_in(key, place), part)


def _joined(pairs: Sequence[Factors], strengths: jax.Array) -> Factors:
    """[s_1 A_1, s_2 A_2, ...] and the B below each other."""
    scaled = [a * strength.astype(a.dtype) for (a, _), strength in zip(pairs, strengths, strict=True)]
    return jnp.concatenate(scaled, 1), jnp.concatenate([b for _, b in pairs], 0)


def _mixed(arrays: Sequence[jax.Array], weights: jax.Array, recipe: Recipe, keys: Sequence[Any]) -> jax.Array:
    """The weighted sum of arrays of one shape, pruned first; with votes the mean of those that agree in sign."""
    stacked = jnp.stack([_pruned(x, recipe, key) for x, key in zip(arrays, keys, strict=True)])
    weights = weights.astype(stacked.dtype).reshape(-1, *[1] * (stacked.ndim - 1))
    if not recipe.has_votes:
        return (weights * stacked).sum(0)
    return disjoint_mean(weights * stacked, agreeing(stacked, recipe.majority_sign_method))


def _pruned(x: jax.Array, recipe: Recipe, key: Any) -> jax.Array:
    if not recipe.prunes or recipe.density is None or recipe.density == 1:
        return x
    return dropped(x, recipe.density, key) if recipe.is_random else largest(x, recipe.density)
