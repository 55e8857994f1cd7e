"""The nodes of a wrapped tree: what stands where a leaf was.

Fields that hold arrays say in their metadata whether they train. Constructors never validate: `jax.tree.map` puts
anything into a node (labels, shardings, None); `jlora.wrap` validates.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored
from jlora.interpret.laid import Laid, laid_out
from jlora.nodes.fields import GROUPS, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.qarray import is_qarray

_ARRAY_ATTRIBUTES = frozenset(
    "T mT at astype reshape ravel flatten transpose swapaxes squeeze sum mean max min dot take copy item tolist size"
    " real block_until_ready".split()
)


class NotAnArrayError(TypeError, AttributeError):
    """A node was used as an array; also an AttributeError, so that `hasattr` answers."""


class AdaptedParam(abc.ABC):
    """A leaf of a parameter tree with what adapts it; a pytree node whose leaves are arrays only.

    Used as an array it refuses, since arithmetic on the base alone would drop the adapter without a word.

    A variant is one such class: a dataclass, registered as a pytree, whose array fields are declared with `trained` and
    `frozen` and its settings with `static`. It says how it starts (`create`) and what it stands for (`effective`).

    Attributes:
      KINDS: the uses of a kernel that it adapts.
      SETTINGS: the settings of `jlora.LoraSpec` that mean something to it, beside the targets.
      OPTIONS: settings of its own, with their defaults.
      LINEAR: the fields in which its update is linear (``start.1`` is the second array of one that holds a tuple).
        With them zero it changes nothing, and ranks of zeros add nothing: so adapters of other ranks and scales can be
        stacked (`jlora.adapters.stack`).
    """

    KINDS: ClassVar[tuple[str, ...]] = ("dot", "embedding", "conv", "ragged_dot")
    SETTINGS: ClassVar[tuple[str, ...]] = ("rank", "alpha", "scaling", "init", "dropout")
    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    LINEAR: ClassVar[tuple[str, ...]] = ()

    base: Any

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> Self:
        """The node right after `jlora.wrap`; `kernel` tells shapes, axes and the spec. Runs under jit."""
        raise NotImplementedError(f"{cls.__name__} is not made by jlora.wrap")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a `jlora.LoraSpec` that make such a node anew."""
        node: Any = self
        rank = {"rank": node.lora_a.shape[-1]} if hasattr(node, "lora_a") else {}
        given = {"scaling": "scale", "dropout": "dropout"}
        return rank | {name: getattr(node, field) for name, field in given.items() if hasattr(node, field)}

    def resolved(self) -> AdaptedParam:
        """The node that functions see in place of this one."""
        return self

    def identity(self) -> Self:
        """The same node where it changes nothing: with zeros in the fields of `LINEAR`."""
        if not self.LINEAR:
            raise ValueError(
                f"{type(self).__name__} says neither in which fields its update is linear (LINEAR), nor what it is "
                "where it changes nothing (identity), so that none can stand for an adapter that lacks this kernel"
            )
        return with_linear(self, jnp.zeros_like)

    @abc.abstractmethod
    def effective(self, name: str, key: jax.Array | None) -> Factored | jax.Array:
        """The value that functions see in place of the leaf; `name` is its path, `key` switches dropout on."""

    def beside(self, x: jax.Array, dims: str, fill: float = 0) -> jax.Array:
        """An array put beside the base: axes in the base's order, of size 1 where it has none, the word's own last.

        Args:
          x: with the axes that `dims` names, as in `trained`; those of adapted layers only.
          fill: its value for the layers that are not adapted.
        """
        return laid_out(self.laid(x, dims, fill))

    def laid(self, x: jax.Array, dims: str, fill: float = 0) -> Laid:
        """As `beside`, for a factor that nothing is computed with: laid out only where a rule needs it so."""
        node: Any = self
        groups = [getattr(node.axes, f"{word}_axis") if word in GROUPS else (word,) for word in dims.split()]
        x = self.everywhere(x, fill) if dims.startswith("batch") else x
        return self._laid(x, [axis for group in groups for axis in group])

    def placed(self, x: jax.Array, order: Sequence[int | str]) -> jax.Array:
        """As `beside`, for an array whose axes are these of the base, and one of its own that has a name."""
        return laid_out(self._laid(x, order))

    def _laid(self, x: jax.Array, order: Sequence[int | str]) -> Laid:
        place = {axis if isinstance(axis, int) else self.ndim: i for i, axis in enumerate(order)}
        return Laid(x, tuple(map(place.get, range(self.ndim + 1))))

    def everywhere(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """An array of the adapted layers, with `fill` for the others."""
        node: Any = self
        if getattr(node, "layers", None) is None:
            return x
        place = {layer: i for i, layer in enumerate(node.layers)}
        blank = jnp.full_like(x[:1], fill)
        count = self.shape[node.axes.batch_axis[0]]
        return jnp.concatenate([x[place[i] : place[i] + 1] if i in place else blank for i in range(count)])

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
            f"a {type(self).__name__} of shape {tuple(self.shape)} was used as an array: {self.advice()}"
        )

    def advice(self) -> str:
        """What to do where a function was given the node in place of an array."""
        return (
            "this function was given a tree that jlora.wrap has wrapped. Call it through jlora.apply, as in "
            "jlora.apply(model.apply)(variables, x), or fold the adapters first with jlora.merge(params); an "
            "nnx.Module to be called is what jlora.nnx.wrap(model, spec) returns"
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
class TrainableParam(AdaptedParam):
    """A leaf that is trained in full: a head, a norm, a bias. No copy of its original value is kept."""

    base: Any = trained()

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del name, key
        return self.base


def with_linear(node: Any, fn: Callable[[Any], Any]) -> Any:
    """The node with a function of each array of its `LINEAR`."""
    changes: dict[str, Any] = {}
    for name, _, place in (entry.partition(".") for entry in type(node).LINEAR):
        value = getattr(node, name)
        if not place:
            changes[name] = fn(value)
        elif value:
            changes[name] = tuple(fn(x) if i == int(place) else x for i, x in enumerate(value))
    return dataclasses.replace(node, **changes)


def is_node(x: Any) -> bool:
    """Whether `x` is a node of a wrapped tree."""
    return isinstance(x, AdaptedParam)


def is_unit(x: Any) -> bool:
    """Whether `x` stands where one leaf of the plain tree stood: a node, or a quantised leaf."""
    return is_node(x) or is_qarray(x)
