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
from jlora.nodes.form import Form
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

    Used as an array it refuses, with a TypeError, since arithmetic on the base alone would drop the adapter without a
    word.

    A variant is one such class: a dataclass, registered as a pytree. Its array fields are declared with
    `jlora.variants.trained` and `jlora.variants.frozen`, its settings with `jlora.variants.static`. Three fields it
    must have: ``base``, ``axes`` and ``layers``. It says how it starts (`create`) and what it stands for (`effective`).
    ``LoraSpec(variant=...)`` takes the class.

    Attributes:
      base: the leaf itself, an array or a quantised leaf.
      KINDS: the uses of a kernel that it adapts: of ``"dot"``, ``"embedding"``, ``"conv"`` and ``"ragged_dot"``.
      SETTINGS: the settings of `jlora.LoraSpec` that mean something to it, beside the targets.
      OPTIONS: settings of its own, with their defaults.
      LINEAR: the fields in which its update is linear (``start.1`` is the second array of one that holds a tuple).
        With them zero it changes nothing, and ranks of zeros add nothing: so adapters of other ranks and scales can be
        stacked (`jlora.adapters.stack`).
      FORM: how PEFT's files hold it, if PEFT has it.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, jlora
      >>> from jlora.variants import AdaptedParam, frozen, gained, plain, static, trained
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True, eq=False)
      ... class GainParam(AdaptedParam):  # each output times a number
      ...     SETTINGS = ()
      ...     base: jax.Array = frozen()
      ...     gain: jax.Array = trained("batch out")
      ...     axes: jlora.Axes = static()
      ...     layers: tuple | None = static(default=None)
      ...
      ...     @classmethod
      ...     def create(cls, base, kernel, key):
      ...         return cls(base, jnp.ones(kernel.sizes("batch out"), kernel.dtype), **kernel.place)
      ...
      ...     def effective(self, name, key):
      ...         return gained(plain(self.base, name=name), self.beside(self.gain, "batch out", fill=1))
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant=GainParam))
      >>> params["kernel"].gain.shape, jlora.apply(lambda p, x: x @ p["kernel"])(params, jnp.ones(4))
      ((3,), Array([4., 4., 4.], dtype=float32))
    """

    KINDS: ClassVar[tuple[str, ...]] = ("dot", "embedding", "conv", "ragged_dot")
    SETTINGS: ClassVar[tuple[str, ...]] = ("rank", "alpha", "scaling", "init", "dropout")
    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    LINEAR: ClassVar[tuple[str, ...]] = ()
    FORM: ClassVar[Form | None] = None

    base: Any

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> Self:
        """Makes the node of one kernel, as it is right after `jlora.wrap`.

        A variant overrides it. It runs under `jax.jit`, or abstractly: it may not look at values. What it returns
        stands for the kernel itself, so that training starts from the plain model.

        Args:
          base: the leaf, which becomes the field ``base``.
          kernel: a `jlora.variants.Kernel`: shapes, axes, and what the spec says of this kernel.
          key: a PRNG key, another one for each path.

        Returns:
          The node, whose arrays have the shapes that their fields declare.

        Raises:
          NotImplementedError: here, for classes that other functions make.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from jlora.variants import Axes, Kernel, LoraParam
          >>> from jlora.nodes.kernel import KernelSpec
          >>> kernel = Kernel("kernel", (4, 3), Axes((0,), (1,)), "dot", KernelSpec(rank=2, scale=1.0))
          >>> LoraParam.create(jnp.ones((4, 3)), kernel, jax.random.key(0)).lora_a.shape
          (4, 2)
        """
        raise NotImplementedError(f"{cls.__name__} is not made by jlora.wrap")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a `jlora.LoraSpec` that make such a node anew, by name.

        A variant whose rank is not that of a field ``lora_a``, or that has options, overrides it.
        """
        node: Any = self
        rank = {"rank": node.lora_a.shape[-1]} if hasattr(node, "lora_a") else {}
        given = {"scaling": "scale", "dropout": "dropout"}
        return rank | {name: getattr(node, field) for name, field in given.items() if hasattr(node, field)}

    def resolved(self) -> AdaptedParam:
        """The node that functions see in place of this one.

        A variant need not override it. A node of several adapters gives that of the one that acts.

        Returns:
          A node; here this one itself.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.TrainableParam(jnp.ones(3))
          >>> node.resolved() is node
          True
        """
        return self

    def identity(self) -> Self:
        """The same node where it changes nothing: with zeros in the fields of `LINEAR`.

        `jlora.adapters.stack` puts it in the place of an adapter that lacks a kernel. A variant without `LINEAR`
        overrides it.

        Returns:
          A node of the same class, shapes and settings, which stands for the base.

        Raises:
          ValueError: if the class says neither `LINEAR` nor `identity`.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.LoraParam(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), axes=jlora.Axes((0,), (1,)))
          >>> float(node.identity().lora_b.sum())
          0.0
        """
        if not self.LINEAR:
            raise ValueError(
                f"{type(self).__name__} says neither in which fields its update is linear (LINEAR), nor what it is "
                "where it changes nothing (identity), so that none can stand for an adapter that lacks this kernel"
            )
        return with_linear(self, jnp.zeros_like)

    @abc.abstractmethod
    def effective(self, name: str, key: jax.Array | None) -> Factored | jax.Array:
        """The value that functions see in place of the leaf.

        A variant overrides it. It is called whenever a function of `jlora.apply` is traced, and by `jlora.merge`. What
        the arrays of `Factored` are made from has gradients.

        Args:
          name: the leaf's path, for messages.
          key: a PRNG key that switches dropout on; None: it is off.

        Returns:
          A `jlora.variants.Factored`, made by `jlora.variants.low_rank`, `plain`, `gained` or `turned_by`; or an array
          of the base's shape, which is then computed as it is.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.LoraParam(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), axes=jlora.Axes((0,), (1,)))
          >>> node.effective("kernel", None).dense()[0]
          Array([3., 3., 3.], dtype=float32)
        """

    def beside(self, x: jax.Array, dims: str, fill: float = 0) -> jax.Array:
        """An array put beside the base: axes in the base's order, of size 1 where it has none, its own axis last.

        So `effective` hands its arrays to `jlora.variants.low_rank` and the like.

        Args:
          x: with the axes that `dims` names, those of adapted layers only.
          dims: its axes by name, as in `jlora.variants.trained`, such as ``"batch in rank"``.
          fill: its value for the layers that are not adapted.

        Returns:
          An array with one axis more than the base has.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.LoraParam(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), axes=jlora.Axes((0,), (1,)))
          >>> node.beside(node.lora_a, "batch in rank").shape, node.beside(node.lora_b, "batch rank out").shape
          ((4, 1, 2), (1, 3, 2))
        """
        return laid_out(self.laid(x, dims, fill))

    def laid(self, x: jax.Array, dims: str, fill: float = 0) -> Laid:
        """As `beside`, without a transpose: the array is laid out only where a rule needs it so.

        Args:
          x: as in `beside`.
          dims: as in `beside`.
          fill: as in `beside`.

        Returns:
          What stands for the array, to be handed to `jlora.variants.low_rank`; nothing else can be computed with it.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.LoraParam(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), axes=jlora.Axes((0,), (1,)))
          >>> node.laid(node.lora_b, "batch rank out").shape
          (1, 3, 2)
        """
        node: Any = self
        groups = [getattr(node.axes, f"{word}_axis") if word in GROUPS else (word,) for word in dims.split()]
        x = self.everywhere(x, fill) if dims.startswith("batch") else x
        return self._laid(x, [axis for group in groups for axis in group])

    def placed(self, x: jax.Array, order: Sequence[int | str]) -> jax.Array:
        """As `beside`, for an array whose axes are named by number.

        Args:
          x: an array.
          order: for each axis of `x` the axis of the base that it is; a string for the one axis of its own.

        Returns:
          An array with one axis more than the base has.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.TrainableParam(jnp.ones((4, 3)))
          >>> node.placed(jnp.ones((3, 5)), (1, "own")).shape
          (1, 3, 5)
        """
        return laid_out(self._laid(x, order))

    def _laid(self, x: jax.Array, order: Sequence[int | str]) -> Laid:
        place = {axis if isinstance(axis, int) else self.ndim: i for i, axis in enumerate(order)}
        return Laid(x, tuple(map(place.get, range(self.ndim + 1))))

    def everywhere(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """An array of the adapted layers as one of all layers, with `fill` for the others.

        Args:
          x: an array whose first axis has the adapted layers.
          fill: the value for the layers that are not adapted.

        Returns:
          An array whose first axis has all layers; `x` itself where all are adapted.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> spec = jlora.LoraSpec(rank=2, layers=[1], axes={"kernel": jlora.Axes((1,), (2,), (0,))})
          >>> node = jlora.wrap({"kernel": jnp.ones((3, 4, 4))}, spec)["kernel"]
          >>> node.lora_a.shape, node.everywhere(node.lora_a).shape
          ((1, 4, 2), (3, 4, 2))
        """
        node: Any = self
        if getattr(node, "layers", None) is None:
            return x
        place = {layer: i for i, layer in enumerate(node.layers)}
        blank = jnp.full_like(x[:1], fill)
        count = self.shape[node.axes.batch_axis[0]]
        return jnp.concatenate([x[place[i] : place[i] + 1] if i in place else blank for i in range(count)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the base."""
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The type of the base's numbers."""
        return self.base.dtype

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotAnArrayError(
            f"a {type(self).__name__} of shape {tuple(self.shape)} was used as an array: {self.advice()}"
        )

    def advice(self) -> str:
        """What to do where a function was given the node in place of an array.

        Returns:
          A text, which ends the message of the error.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> "jlora.apply" in jlora.TrainableParam(jnp.ones(3)).advice()
          True
        """
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
    """A leaf that is trained in full: a head, a norm, a bias.

    `jlora.wrap` makes it of the leaves that ``LoraSpec(train=...)`` and ``LoraSpec(bias=...)`` name. No copy of the
    original value is kept: `jlora.unwrap` gives the trained one.

    Args:
      base: the leaf, of any shape, trained.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> wrapped = jlora.wrap(params, jlora.LoraSpec(targets="dense", rank=2, train=["head"]))
      >>> type(wrapped["head"]["kernel"]).__name__, wrapped["head"]["kernel"].base.shape
      ('TrainableParam', (3, 2))
    """

    base: Any = trained()

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del name, key
        return self.base


def with_linear(node: Any, fn: Callable[[Any], Any]) -> Any:
    """The node with a function of each array of its `LINEAR`."""
    changes: dict[str, Any] = {}
    for name, _, place in (entry.partition(".") for entry in type(node).LINEAR):
        value = getattr(node, name)
        if not place and not isinstance(value, tuple):
            changes[name] = fn(value)
        elif place and value:
            changes[name] = tuple(fn(x) if i == int(place) else x for i, x in enumerate(value))
    return dataclasses.replace(node, **changes)


def is_node(x: Any) -> bool:
    """Whether `x` is a node of a wrapped tree."""
    return isinstance(x, AdaptedParam)


def is_unit(x: Any) -> bool:
    """Whether `x` stands where one leaf of the plain tree stood: a node, or a quantised leaf."""
    return is_node(x) or is_qarray(x)
