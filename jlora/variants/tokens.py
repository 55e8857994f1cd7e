"""Some rows of an embedding table, trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import split_axes
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.node import AdaptedParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokensParam(AdaptedParam):
    """A table of which some rows train: PEFT's ``trainable_token_indices``.

    It stands for ``W + E (rows - W[tokens])`` with E the rows' places, n columns of the unit matrix: a low-rank update
    of rank n, so that neither a copy of the table nor its gradient is made. The sum is the row up to the rounding of
    the difference.

    Args:
      base: the table W, of shape (tokens, features), frozen.
      rows: of shape (n, features), trained; they start as the table's.
      tokens: which rows, n of them.

    References:
      PEFT's trainable tokens, https://huggingface.co/docs/peft/package_reference/trainable_tokens.
    """

    base: Any = frozen()
    rows: Any = trained("tokens out")
    tokens: tuple[int, ...] = static()

    axes = Axes((0,), (1,))

    @classmethod
    def of(cls, path: str, base: Any, tokens: Sequence[int]) -> TokensParam:
        """The node right after `jlora.wrap`.

        Raises:
          ValueError: if a token has no row.
        """
        if outside := [token for token in tokens if token >= base.shape[0]]:
            raise ValueError(f"wrap: train_tokens names {outside}, but {path} has {base.shape[0]} rows")
        rows = jnp.asarray(base)[jnp.asarray(tokens)].astype(jnp.float32)
        return cls(base, rows, tuple(tokens))

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        if split := split_axes(self.rows, self.base, "train_tokens"):
            raise ValueError(
                f"apply: the rows of {name} are split over {split} inside jax.shard_map, where those that are trained "
                "can't be found by their numbers. Put jlora.apply around the shard_map, or keep the rows of the table "
                "whole"
            )
        places = jnp.asarray(self.tokens)
        unit = jax.nn.one_hot(places, self.shape[0], axis=0, dtype=self.rows.dtype)
        change = self.rows - jax.lax.stop_gradient(self.base[places].astype(self.rows.dtype))
        return low_rank(self.base, unit[:, None, :], change.T[None], name=name)
