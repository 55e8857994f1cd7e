"""The nodes of a wrapped tree: what stands where a leaf was.

Fields that hold arrays say in their metadata whether they train. Constructors never validate: `jax.tree.map` puts
anything into a node (labels, shardings, None); `jlora.wrap` validates.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax

from jlora.interpret.factored import Factored, transposed
from jlora.spec import Axes


def trained(**kwargs: Any) -> Any:
    """A field of a node that trains."""
    return dataclasses.field(metadata={"trained": True}, **kwargs)


def frozen(**kwargs: Any) -> Any:
    """A field of a node that stays as it is."""
    return dataclasses.field(metadata={"trained": False}, **kwargs)


def static(**kwargs: Any) -> Any:
    """A field of a node that is part of the tree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


_ARRAY_ATTRIBUTES = frozenset(
    "T mT at astype reshape ravel flatten transpose swapaxes squeeze sum mean max min dot take copy item tolist size"
    " real block_until_ready".split()
)


class NotAnArrayError(TypeError, AttributeError):
    """A node was used as an array; also an AttributeError, so that `hasattr` answers."""


class AdaptedParam(abc.ABC):
    """A leaf of a parameter tree with what adapts it; a pytree node whose leaves are arrays only.

    Used as an array it refuses, since arithmetic on the base alone would drop the adapter without a word.
    """

    base: Any

    @abc.abstractmethod
    def effective(self, name: str, key: jax.Array | None) -> Factored | jax.Array:
        """The value that functions see in place of the leaf; `name` is its path, `key` switches dropout on."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotAnArrayError(
            f"a {type(self).__name__} of shape {tuple(self.shape)} was used as an array: this function was given a "
            "tree that jlora.wrap has wrapped. Call it through jlora.apply, as in jlora.apply(model.apply)(variables, "
            "x), or fold the adapters first with jlora.merge(params)"
        )

    __jax_array__ = __array__ = __getitem__ = __iter__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = __len__ = __bool__ = __float__ = __int__ = _refuse

    def __eq__(self, other: Any) -> Any:
        return self._refuse() if isinstance(other, (int, float, np.ndarray, jax.Array)) else self is other

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAY_ATTRIBUTES:
            self._refuse()
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraParam(AdaptedParam):
    """A kernel W with low-rank factors: stands for ``W + scale * A @ B``.

    Args:
      base: W, frozen.
      lora_a: A, of shape (batch..., in..., r), trained.
      lora_b: B, of shape (batch..., r, out...), trained.
      axes: which axes of W are in, out and batch.
      scale: s.
      dropout: rate of the dropout on A's input.

    References:
      Hu et al., arXiv:2106.09685.
    """

    base: Any = frozen()
    lora_a: Any = trained()
    lora_b: Any = trained()
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        batch = self.axes.batch_axis
        n = len(batch)
        lora_b = lax.transpose(self.lora_b, [i for i in range(self.lora_b.ndim) if i != n] + [n])
        factors = (
            _align(self.lora_a, (*batch, *self.axes.in_axis), self.ndim),
            _align(lora_b, (*batch, *self.axes.out_axis), self.ndim),
        )
        key = key if self.dropout else None
        return Factored(self.base, factors, key=key, name=name, scale=self.scale, dropout=self.dropout)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainableParam(AdaptedParam):
    """A leaf that is trained in full: a head, a norm, a bias. No copy of its original value is kept."""

    base: Any = trained()

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del name, key
        return self.base


def is_node(x: Any) -> bool:
    """Whether `x` is a node of a wrapped tree."""
    return isinstance(x, AdaptedParam)


def check_whole(where: str, path: str, node: AdaptedParam) -> None:
    """Refuses a node that lacks some of its arrays."""
    if any(getattr(node, field.name) is None for field in leaf_fields(node)):
        raise ValueError(
            f"{where}: {path} lacks some of its arrays, as in one half of jlora.partition; jlora.combine the two first"
        )


def check_fit(where: str, path: str, node: AdaptedParam) -> None:
    """Refuses a node that is not whole, or whose factors are not those of its base."""
    check_whole(where, path, node)
    if not isinstance(node, LoraParam):
        return
    of = lambda axes: tuple(node.shape[axis] for axis in axes)
    batch, rank = of(node.axes.batch_axis), node.lora_a.shape[-1]
    expected = (*batch, *of(node.axes.in_axis), rank), (*batch, rank, *of(node.axes.out_axis))
    found = tuple(node.lora_a.shape), tuple(node.lora_b.shape)
    if found != expected:
        raise ValueError(
            f"{where}: the factors of {path} have shapes {found}, but beside its base of shape {tuple(node.shape)} "
            f"they have {expected}: these are of another kernel, or stacked and not under jax.vmap"
        )


def leaf_fields(node: AdaptedParam) -> list[dataclasses.Field]:
    """The fields of a node that hold arrays."""
    return [field for field in dataclasses.fields(node) if not field.metadata.get("static")]  # type: ignore[arg-type]


def _align(factor: jax.Array, order: tuple[int, ...], ndim: int) -> jax.Array:
    """Puts a factor's axes in the kernel's order, with axes of size 1 where it has none; the rank stays last."""
    ordered = transposed(factor, [*sorted(range(len(order)), key=order.__getitem__), len(order)])
    return lax.expand_dims(ordered, [axis for axis in range(ndim) if axis not in order])
