"""Training: the optimizer of a wrapped tree, and gradients of what trains."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
import optax

from jlora.tree import FROZEN, TRAINABLE, combine, has_nodes, label_fields, labels, partition

TRAINABLE_B = "trainable_b"


def optimizer(
    tx: optax.GradientTransformation, tree: Any, *, b_lr_ratio: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """An `optax.multi_transform` that trains the adapters with `tx` and holds every other leaf as it is.

    It takes gradients of the whole tree, or those of `jlora.grad`, which have None at the frozen leaves; its updates
    are for `optax.apply_updates` on the whole tree. State is kept for the trainable leaves alone. It works as well on
    the trainable half of `jlora.partition`.

    Transformations that wrap others (`optax.MultiSteps`, `optax.apply_if_finite`) go inside, as `tx`; those that come
    before, such as `optax.clip_by_global_norm`, may stand in an `optax.chain` outside.

    On the trainable half a transformation works by itself. So do those whose functions take the state together with
    the parameters, as schedule-free ones, which are evaluated at their average::

        half, frozen = jlora.partition(params)
        tx = optax.contrib.schedule_free_adamw(1e-3)
        state = tx.init(half)
        # a step: grads = jlora.grad(loss)(jlora.combine(half, frozen)); tx.update(grads, state, half); ...
        average = optax.contrib.schedule_free_eval_params(state, half)
        jlora.apply(model.apply)({"params": jlora.combine(average, frozen)}, x)

    Args:
      tx: any optax transformation.
      tree: a wrapped tree.
      b_lr_ratio: multiplies the updates of each ``lora_b`` (LoRA+; 16 is the paper's advice).

    Raises:
      ValueError: if nothing in the tree trains, or the ratio is not a positive number, or no ``lora_b`` trains for it.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> tx = jlora.optimizer(optax.adamw(1e-4), params)
      >>> state = tx.init(params)

    References:
      Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
    """
    if not hasattr(tx, "update"):
        raise TypeError(f"optimizer: tx must be an optax transformation, found {type(tx).__name__}")
    if TRAINABLE not in jax.tree.leaves(labels(tree)):
        raise ValueError("optimizer: no leaf of this tree trains; pass a tree that jlora.wrap returned")
    if b_lr_ratio is not None:
        _check_ratio(b_lr_ratio, tree)
        tx = optax.chain(tx, _scale_b(b_lr_ratio))
    transforms: dict[Hashable, optax.GradientTransformation] = {TRAINABLE: tx, FROZEN: optax.set_to_zero()}
    inner = optax.multi_transform(transforms, labels)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(_without_frozen(updates, params), state, params, **extra)
        return _hold(updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Unchanged:
    """The update of a frozen leaf: what it is added to comes back as it was.

    Not even zero may be added: that would turn -0.0 into 0.0 and flush subnormals. It holds no array, so it costs
    nothing, and other transformations pass it by.
    """

    __array_ufunc__ = None

    def __radd__(self, leaf: Any) -> Any:
        return leaf


def _hold(updates: Any) -> Any:
    hold = lambda mark, update: update if mark == TRAINABLE else Unchanged()
    return jax.tree.map(hold, labels(updates), updates)


def _without_frozen(updates: Any, params: Any) -> Any:
    """The gradients with a scalar for each frozen leaf, where the parameters have one: its own is not looked at."""
    nothing = np.zeros((), np.float32)
    updates = jax.tree.map(lambda mark, update: update if mark == TRAINABLE else nothing, labels(updates), updates)
    if params is None:
        return updates
    fill = lambda update, leaf: nothing if update is None and leaf is not None else update
    return jax.tree.map(fill, updates, params, is_leaf=lambda x: x is None)


def _scale_b(ratio: float) -> optax.GradientTransformation:
    """Scales the updates of each node's `lora_b`."""
    scale = lambda mark, update: update * ratio if mark == TRAINABLE_B else update
    return optax.stateless(lambda updates, _: jax.tree.map(scale, _labels_of_b(updates), updates))


def _labels_of_b(tree: Any) -> Any:
    is_b = lambda field: field.name == "lora_b" and field.metadata.get("trained")
    return label_fields(tree, lambda field: TRAINABLE_B if is_b(field) else TRAINABLE)


def _check_ratio(ratio: Any, tree: Any) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
        raise ValueError(f"optimizer: b_lr_ratio must be a positive number, found {ratio!r}")
    if TRAINABLE_B not in jax.tree.leaves(_labels_of_b(tree)):
        raise ValueError(f"optimizer: no lora_b in this tree trains, so b_lr_ratio={ratio!r} would do nothing")


def value_and_grad(loss: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Like `jax.value_and_grad`, for the trainable leaves of the first argument only.

    Args:
      loss: a scalar function of a wrapped tree and more arguments, which calls its model through `jlora.apply`.
      has_aux: whether `loss` returns ``(value, aux)``.

    Returns:
      A function with the arguments of `loss` that returns its value and the gradients: the structure of the wrapped
      tree with None at the frozen leaves.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> loss = lambda params, x: jlora.apply(lambda p, x: (x @ p["kernel"]).sum())(params, x)
      >>> value, grads = jlora.value_and_grad(loss)(params, jnp.ones((5, 4)))
      >>> [g.shape for g in jax.tree.leaves(grads)]
      [(4, 2), (2, 3)]
    """

    @functools.wraps(loss)
    def with_grad(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_nodes(tree):
            raise TypeError("value_and_grad, grad: no leaf of the first argument is wrapped; pass jlora.wrap's result")
        trainable, frozen = partition(tree)
        whole = lambda part: loss(combine(part, frozen), *args, **kwargs)
        return jax.value_and_grad(whole, has_aux=has_aux)(trainable)

    return with_grad


def grad(loss: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Like `jax.grad`, for the trainable leaves of the first argument only; see `value_and_grad`."""

    @functools.wraps(loss)
    def only_grad(tree: Any, *args: Any, **kwargs: Any) -> Any:
        value, grads = value_and_grad(loss, has_aux=has_aux)(tree, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return only_grad
