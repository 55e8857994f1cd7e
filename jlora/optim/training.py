"""Training: the optimizer of a wrapped tree, and gradients of what trains."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
import optax

from jlora.optim.fit import Unchanged, check_gradients, check_state, same_shapes, shapes_of
from jlora.tree import FROZEN, TRAINABLE, combine, has_nodes, label_fields, labels, partition

TRAINABLE_B = "trainable_b"


def optimizer(
    tx: optax.GradientTransformation, tree: Any, *, b_lr_ratio: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """An `optax.multi_transform` that trains the adapters with `tx` and holds every other leaf as it is.

    It takes gradients of the whole tree, or those of `jlora.grad`, which have None at the frozen leaves; its updates
    are for `optax.apply_updates` on the whole tree. State is kept for the trainable leaves alone. It works as well on
    the trainable half of `jlora.partition`. Without it, an optimizer on the whole tree changes the frozen base too:
    weight decay (`optax.adamw`) shrinks it although its gradient is zero. Where a frozen leaf is a random key, as in
    the state of NNX, JAX casts it only under jit: there `optax.apply_updates` must be compiled.

    Transformations that wrap others (`optax.MultiSteps`, `optax.apply_if_finite`) go inside, as `tx`: outside they keep
    arrays for the frozen leaves too, and refuse gradients with None. Those that come before, such as
    `optax.clip_by_global_norm`, may stand in an `optax.chain` outside.

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
      TypeError: if `tx` is no transformation, or the arguments are swapped.
      ValueError: if nothing in the tree trains, or the ratio is not a positive number, or no ``lora_b`` trains for it;
        from `update`, if gradients, state and parameters are not of one tree.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> tx = jlora.optimizer(optax.adamw(1e-4), params)
      >>> state = tx.init(params)

    References:
      Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
    """
    _check_transformation(tx, tree)
    _check_trains(tree)
    if b_lr_ratio is not None:
        _check_ratio(b_lr_ratio, tree)
        tx = optax.chain(tx, _scale_b(b_lr_ratio))
    transforms: dict[Hashable, optax.GradientTransformation] = {TRAINABLE: tx, FROZEN: optax.set_to_zero()}
    inner = optax.multi_transform(transforms, labels)
    shapes = shapes_of(tree)

    def init(params: Any) -> Any:
        _check_trains(params)
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        whole, of = (
            (shapes, "the tree that jlora.optimizer was given") if params is None else (params, "the parameters")
        )
        check_gradients("optimizer", updates, whole, of, shapes=params is not None)
        try:
            updates, after = inner.update(_without_frozen(updates, whole), state, params, **extra)
        except Exception:
            check_state(state, inner.init, whole)
            raise
        if not same_shapes(state, after):  # arrays of another shape may broadcast
            check_state(state, inner.init, whole)
        return _hold(updates), after

    return optax.GradientTransformationExtraArgs(init, update)


def _check_transformation(tx: Any, tree: Any) -> None:
    if _is_transformation(tx):
        return
    if _is_transformation(tree):
        raise TypeError("optimizer: the arguments are swapped; call jlora.optimizer(tx, tree)")
    raise TypeError(f"optimizer: tx must be an optax transformation, found {type(tx).__name__}")


def _is_transformation(x: Any) -> bool:
    return all(callable(getattr(x, name, None)) for name in ("init", "update"))


def _check_trains(tree: Any) -> None:
    if TRAINABLE not in jax.tree.leaves(labels(tree)):
        raise ValueError("optimizer: no leaf of this tree trains; pass a tree that jlora.wrap returned")


def _hold(updates: Any) -> Any:
    hold = lambda mark, update: update if mark == TRAINABLE else Unchanged()
    return jax.tree.map(hold, labels(updates), updates)


def _without_frozen(updates: Any, tree: Any) -> Any:
    """The gradients with a scalar for each frozen leaf that the tree has: its own, or a hole, is not looked at."""
    places = {FROZEN: np.zeros((), np.float32)}
    fill = lambda mark, update: update if mark == TRAINABLE else places.get(mark)
    return jax.tree.map(fill, labels(tree), updates, is_leaf=lambda x: x is None)


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
