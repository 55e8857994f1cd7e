"""Training: the optimizer of a wrapped tree, and gradients of what trains."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jlora.apply import training
from jlora.optim.fit import Unchanged, check_gradients, check_state, is_hole, same_shapes, shapes_of
from jlora.targets.named import Names
from jlora.tree import (
    FROZEN,
    TRAINABLE,
    as_named,
    combine,
    has_nodes,
    label_fields,
    labels,
    partition,
    with_named,
    without_named,
)

TRAINABLE_B = "trainable_b"


def optimizer(
    tx: optax.GradientTransformation, tree: Any, *, b_lr_ratio: float | None = None, train: Names = ()
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

    More arguments of ``update`` are handed on: `value`, `grad` and `value_fn` of `optax.lbfgs` and of line searches. A
    tree among them is seen as the updates are, and a function is given whole trees. All of optax's transformations that
    take parameters work so, but for those of gradients by example (`optax.contrib.dpsgd`), which have no tree's shapes:
    they take the trainable half.

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
      train: patterns of plain leaves of the tree that train too: see `value_and_grad`.

    Returns:
      An optax transformation for the whole tree, or for its trainable half.

    Raises:
      TypeError: if `tx` is no transformation, or the arguments are swapped.
      ValueError: if nothing in the tree trains, or the ratio is not a positive number, or no ``lora_b`` trains for it,
        or a pattern of `train` matches no plain leaf; from `update`, if gradients, state and parameters are not of one
        tree.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> tx = jlora.optimizer(optax.adamw(1e-4), params)
      >>> state = tx.init(params)
      >>> [x.shape for x in jax.tree.leaves(state) if x.ndim]  # Adam's two moments, of A and B alone
      [(4, 2), (2, 3), (4, 2), (2, 3)]
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> float(params["kernel"].base.min())  # the base is held
      1.0

    References:
      Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
    """
    _check_transformation(tx, tree)
    tree, names = with_named(tree, train)
    _check_trains(tree)
    if b_lr_ratio is not None:
        _check_ratio(b_lr_ratio, tree)
        tx = optax.chain(tx, _scale_b(b_lr_ratio))
    transforms: dict[Hashable, optax.GradientTransformation] = {TRAINABLE: tx, FROZEN: optax.set_to_zero()}
    inner = optax.multi_transform(transforms, labels)
    shapes = shapes_of(tree)

    def init(params: Any) -> Any:
        params = as_named(params, names)
        _check_trains(params)
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, given = as_named(updates, names), None if params is None else as_named(params, names)
        whole, of = (shapes, "the tree that jlora.optimizer was given") if params is None else (given, "the parameters")
        check_gradients("optimizer", updates, whole, of, shapes=params is not None)
        extra = {name: _of_trainable(value, whole, names) for name, value in extra.items()}
        try:
            updates, after = inner.update(_without_frozen(updates, whole), state, given, **extra)
        except Exception:
            check_state(state, inner.init, whole)
            raise
        if not same_shapes(state, after):  # arrays of another shape may broadcast
            check_state(state, inner.init, whole)
        return without_named(_hold(updates), names), after

    return optax.GradientTransformationExtraArgs(init, update)


def _of_trainable(extra: Any, whole: Any, names: frozenset[str]) -> Any:
    """An argument of `update` as a transformation of the trainable leaves takes it: a tree masked, a function of one.

    Args:
      extra: the argument.
      whole: the parameters.
      names: of the plain leaves that train too.
    """
    marks = labels(whole)
    fill = lambda mark, x, own: x if mark == TRAINABLE else own
    if not callable(extra):
        return _masked(extra, whole, names)

    @functools.wraps(extra)
    def of_masked(masked: Any, *args: Any, **kwargs: Any) -> Any:
        tree = jax.tree.map(fill, marks, masked, whole, is_leaf=is_hole)
        return _masked(extra(without_named(tree, names), *args, **kwargs), whole, names)

    return of_masked


def _masked(x: Any, whole: Any, names: frozenset[str]) -> Any:
    """A tree of the parameters' structure as `optax.masked` has it; anything else as it is."""
    pick = lambda mark, x: x if mark == TRAINABLE else optax.MaskedNode()
    structure = lambda x: jax.tree.structure(x, is_leaf=is_hole)
    tree = as_named(x, names) if structure(x) == structure(without_named(whole, names)) else x
    is_whole = structure(tree) == structure(whole)
    return jax.tree.map(pick, labels(whole), _without_frozen(tree, whole)) if is_whole else x


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


def value_and_grad(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, has_aux: bool = False, train: Names = ()
) -> Callable[..., Any]:
    """Like `jax.value_and_grad`, for what trains of a wrapped tree.

    Arguments that are no wrapped trees have the gradients that JAX gives them: inputs, soft prompts. A soft prompt may
    also stand beside the tree, as one of its leaves. There a plain leaf is frozen, unless it is named::

        params = {"model": jlora.wrap(model, spec), "prompt": jnp.zeros((8, 512))}

        def loss(params, tokens):
            forward = lambda params, tokens: ...  # puts params["prompt"] before the tokens' embeddings
            return jlora.apply(forward)(params, tokens)  # within jlora.grad the prompt is not frozen

        grads = jlora.grad(loss, train="prompt")(params, tokens)
        tx = jlora.optimizer(optax.adamw(1e-3), params, train="prompt")

    Args:
      loss: a scalar function of a wrapped tree and more arguments, which calls its model through `jlora.apply`.
      argnums: which arguments the gradients are of, one of which is a wrapped tree; with several, or a tuple, there is
        a tuple of gradients.
      has_aux: whether `loss` returns ``(value, aux)``.
      train: patterns of plain leaves of wrapped trees that train too, as in ``LoraSpec(train=...)``.

    Returns:
      A function with the arguments of `loss` that returns its value and the gradients: the structure of the wrapped
      tree with None at the frozen leaves.

    Raises:
      TypeError: when called, if no such argument is wrapped, or `argnums` names no argument.
      ValueError: when called, if `train` matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> loss = lambda params, x: jlora.apply(lambda p, x: (x @ p["kernel"]).sum())(params, x)
      >>> value, grads = jlora.value_and_grad(loss)(params, jnp.ones((5, 4)))
      >>> [g.shape for g in jax.tree.leaves(grads)]
      [(4, 2), (2, 3)]
      >>> value, (grads, of_x) = jlora.value_and_grad(loss, argnums=(0, 1))(params, jnp.ones((5, 4)))
      >>> of_x.shape
      (5, 4)
    """
    several = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(loss)
    def with_grad(*args: Any, **kwargs: Any) -> Any:
        places = [_place(i, args) for i in several]
        wrapped = [i for i in places if has_nodes(args[i])]
        if not wrapped:
            which = "the first argument" if several == (0,) else f"the arguments {several}"
            raise TypeError(f"value_and_grad, grad: no leaf of {which} is wrapped; pass jlora.wrap's result")
        halves = {i: partition(args[i], train=train) for i in wrapped}

        def of(*given: Any) -> Any:
            now = dict(zip(places, given, strict=True))
            whole = lambda i, x: combine(now[i], halves[i][1]) if i in halves else now.get(i, x)
            with training(train):
                return loss(*(whole(i, x) for i, x in enumerate(args)), **kwargs)

        given = [halves[i][0] if i in halves else args[i] for i in places]
        value, grads = jax.value_and_grad(of, argnums=tuple(range(len(places))), has_aux=has_aux)(*given)
        return value, grads[0] if isinstance(argnums, int) else grads

    return with_grad


def _place(i: int, args: Sequence[Any]) -> int:
    if isinstance(i, bool) or not isinstance(i, int) or not -len(args) <= i < len(args):
        raise TypeError(f"value_and_grad, grad: argnums has {i!r}, and there are {len(args)} positional arguments")
    return i % len(args)


def grad(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, has_aux: bool = False, train: Names = ()
) -> Callable[..., Any]:
    """Like `jax.grad`, for what trains of a wrapped tree; see `value_and_grad`.

    Args:
      loss: a scalar function of a wrapped tree and more arguments, which calls its model through `jlora.apply`.
      argnums: which arguments the gradients are of, one of which is a wrapped tree; with several, or a tuple, there is
        a tuple of gradients.
      has_aux: whether `loss` returns ``(value, aux)``; the function returns ``(gradients, aux)`` then.
      train: patterns of plain leaves of wrapped trees that train too: see `value_and_grad`.

    Returns:
      A function with the arguments of `loss` that returns the gradients: the structure of the wrapped tree with None at
      the frozen leaves.

    Raises:
      TypeError: when called, if no such argument is wrapped, or `argnums` names no argument.
      ValueError: when called, if a pattern of `train` matches no plain leaf, or one that can't train.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> loss = lambda params, x: jlora.apply(lambda p, x: (x @ p["kernel"]).sum())(params, x)
      >>> grads = jlora.grad(loss)(params, jnp.ones((5, 4)))
      >>> grads["kernel"].lora_a.shape, grads["kernel"].base is None
      ((4, 2), True)
    """

    @functools.wraps(loss)
    def only_grad(*args: Any, **kwargs: Any) -> Any:
        value, grads = value_and_grad(loss, argnums=argnums, has_aux=has_aux, train=train)(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return only_grad
