"""AdaLoRA's allocation of ranks: a budget of triplets for all kernels, spent on those that matter most."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.interpret.compat import is_traced
from jlora.interpret.products import wide
from jlora.nodes.node import is_node
from jlora.optim.fit import check_gradients, is_hole
from jlora.optim.triplets import Schedule, chosen, importance, map_nodes, pruned, running_mean, sensitivity_of, weights
from jlora.targets.paths import flatten
from jlora.variants.adalora import AdaLoraParam


class AdaLoraState(NamedTuple):
    """The state of `adalora`; its trees are those of the parameters, with None beside the AdaLoRA factors.

    Args:
      count: the updates made so far, a scalar.
      sensitivity: the running mean of ``|w * g|`` of each weight, in float32.
      uncertainty: the running mean of its distance from that mean, in float32.
      keep: in place of each node, which of its triplets are kept, of the shape (batch..., r) of its ``lora_e``.
      inner: the state of the inner transformation.
    """

    count: jax.Array
    sensitivity: Any
    uncertainty: Any
    keep: Any
    inner: Any


def adalora(
    tx: optax.GradientTransformation,
    *,
    total_steps: int,
    target_rank: int,
    warmup_steps: int,
    final_steps: int,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Trains with `tx`, and zeroes the least important singular values of all AdaLoRA kernels as training goes.

    A triplet is a value of ``lora_e`` with its column of ``lora_a`` and its row of ``lora_b``. Its importance is
    ``s(e) + mean(s(column)) + mean(s(row))``, where s is a running mean of ``|w * g|`` times one of how much that
    varies, w being the weight after the step of `tx` and g its gradient. The budget b(t) is all triplets up to update
    `warmup_steps`, falls as a cubic to `target_rank` for each kernel (each stacked layer, each expert) on average, and
    stays there for the last `final_steps`. The b(t) most important triplets of all kernels together are kept. Of the
    others ``lora_e`` becomes exactly zero; until the last phase, where the choice is fixed, they may come back.

    It goes inside `jlora.optimizer`. To accumulate, put `optax.MultiSteps` between the two:
    ``jlora.optimizer(optax.MultiSteps(adalora(tx, ...), 4), params)``. Nothing may come after it in an `optax.chain`:
    in ``optax.chain(adalora(...), optax.scale(0.5))`` a value that should be zero is halved, and no kernel ever loses
    a rank. Scale within `tx`. Outside of jit the next update raises an error for such values. Under jit nothing can be
    raised: the only sign is that `ranks` do not fall.

    Add `jlora.variants.orthogonality` to the loss. `ranks` tells what is left of each kernel.

    Args:
      tx: any optax transformation.
      total_steps: the updates of the whole training, warm-up and last phase included.
      target_rank: the mean rank of a kernel in the end.
      warmup_steps: updates before the budget falls.
      final_steps: updates after it has fallen.
      interval: updates between two prunings while the budget falls; values that were zeroed train in between.
      beta1, beta2: decays of the two running means.

    Returns:
      A transformation whose `update` needs the parameters; state: `AdaLoraState`.

    Raises:
      ValueError: if the phases do not fit into `total_steps`, or a number is out of its range. From `init`: if the tree
        has no AdaLoRA kernel, or fewer triplets than the target. From `update`: if it gets no parameters, if a frozen
        base would be trained, or (outside of jit) if a value that the last update zeroed is not zero.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="adalora", rank=3))
      >>> steps = dict(total_steps=4, warmup_steps=1, final_steps=1)  # of a run: 1000, 100 and 300
      >>> tx = jlora.optimizer(jlora.optim.adalora(optax.adamw(1e-3), target_rank=2, **steps), params)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jlora.optim.ranks(params)
      {'kernel': array(2)}

    References:
      Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
    """
    _check_steps(total_steps, warmup_steps, final_steps, interval, target_rank)
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= beta < 1:
            raise ValueError(f"adalora: {name} must be from 0 up to, not including, 1, found {beta!r}")
    schedule = Schedule(target_rank, warmup_steps, total_steps - final_steps, interval)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> AdaLoraState:
        _check_ranks(params, target_rank)
        zeros = lambda x: jnp.zeros_like(x, wide(x.dtype))
        sensitivity, uncertainty = (map_nodes(lambda node: weights(zeros, node), params) for _ in range(2))
        keep = map_nodes(lambda node: jnp.ones_like(node.lora_e, bool), params)
        return AdaLoraState(jnp.zeros((), jnp.int32), sensitivity, uncertainty, keep, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AdaLoraState]:
        if params is None:
            raise ValueError("adalora: it needs the parameters: tx.update(grads, state, params)")
        _check_zeroed(params, state, schedule)
        grads = updates
        try:
            updates, inner = tx.update(grads, state.inner, params, **extra)
        except Exception:
            check_gradients("adalora", grads, params, "the parameters")
            _check_holes(grads, params)
            raise
        _check_base(updates)
        step = state.count + 1
        learns = step < schedule.end
        now = map_nodes(sensitivity_of, params, updates, grads)
        sensitivity = running_mean(jnp.where(learns, beta1, 1), state.sensitivity, now)
        varied = jax.tree.map(lambda x, mean: jnp.abs(x - mean), now, sensitivity)
        uncertainty = running_mean(jnp.where(learns, beta2, 1), state.uncertainty, varied)
        best = chosen(map_nodes(importance, sensitivity, uncertainty), schedule, step)
        due = schedule.prunes(step)
        keep = jax.tree.map(lambda new, old: jnp.where(due & (step <= schedule.end), new, old), best, state.keep)
        return pruned(updates, params, keep, due), AdaLoraState(step, sensitivity, uncertainty, keep, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def ranks(tree: Any) -> dict[str, np.ndarray]:
    """The current rank of each AdaLoRA kernel: how many of its singular values are not zero.

    Args:
      tree: a wrapped tree, or the trainable half of it.

    Returns:
      For the path of each kernel an array of shape (batch...): a rank for each stacked layer and expert. All are zero
      right after `jlora.wrap`, since ``lora_e`` starts there.

    Raises:
      ValueError: if the tree has no AdaLoRA kernel.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="adalora", rank=2))
      >>> params["kernel"].lora_e.shape, jlora.optim.ranks(params)
      ((2,), {'kernel': array(0)})
    """
    paths, leaves, _ = flatten(tree, is_node)
    nodes = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, AdaLoraParam)}
    _check_any("ranks", nodes)
    return {path: np.asarray(np.count_nonzero(np.asarray(node.lora_e), axis=-1)) for path, node in nodes.items()}


def _check_steps(total: int, warmup: int, final: int, interval: int, target_rank: int) -> None:
    least = {"total_steps": (total, 1), "warmup_steps": (warmup, 0), "final_steps": (final, 0)}
    for name, (value, low) in (least | {"interval": (interval, 1), "target_rank": (target_rank, 1)}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"adalora: {name} must be an integer of at least {low}, found {value!r}")
    if warmup + final >= total:
        raise ValueError(
            f"adalora: warmup_steps={warmup} and final_steps={final} leave none of total_steps={total} for the budget "
            "to fall in; their sum must be smaller"
        )


def _check_ranks(params: Any, target_rank: int) -> None:
    shapes = [x.lora_e.shape for x in jax.tree.leaves(params, is_leaf=is_node) if isinstance(x, AdaLoraParam)]
    _check_any("adalora", shapes)
    kernels, triplets = sum(math.prod(shape[:-1]) for shape in shapes), sum(map(math.prod, shapes))
    if target_rank * kernels > triplets:
        raise ValueError(
            f"adalora: target_rank={target_rank} is more than the kernels have: {triplets} triplets in {kernels} "
            f"kernels, {triplets / kernels:g} each. Wrap with a larger rank (1.5 times the target is usual)"
        )


def _check_zeroed(params: Any, state: AdaLoraState, schedule: Schedule) -> None:
    """Refuses parameters that have a value where the last update made it zero; seen only where values are known."""
    if any(map(is_traced, jax.tree.leaves((params, state.count, state.keep)))) or not schedule.prunes(state.count):
        return
    came_back = map_nodes(lambda node, keep: jnp.any((node.lora_e != 0) & ~keep), params, state.keep)
    paths, found, _ = flatten(came_back)
    for path, is_back in zip(paths, found, strict=True):
        if is_back:
            raise ValueError(
                f"adalora: the last update made values of lora_e zero in {path}, yet they are not zero: its updates "
                "were rescaled or not applied. Put what rescales them inside: adalora(optax.chain(tx, optax.scale(x)))"
            )


def _check_holes(grads: Any, params: Any) -> None:
    missing = lambda grad, leaf: is_hole(grad) and not is_hole(leaf)
    paths, found, _ = flatten(jax.tree.map(missing, grads, params, is_leaf=is_hole))
    for path, is_missing in zip(paths, found, strict=True):
        if is_missing:
            raise ValueError(f"adalora: {path} is frozen, and has no gradient. {_INSIDE}")


def _check_base(updates: Any) -> None:
    paths, nodes, _ = flatten(updates, is_node)
    for path, node in zip(paths, nodes, strict=True):
        if isinstance(node, AdaLoraParam) and jax.tree.leaves(node.base):
            raise ValueError(f"adalora: the frozen base of {path} would be trained. {_INSIDE}")


_INSIDE = "Put adalora inside the optimizer: jlora.optimizer(jlora.optim.adalora(tx, ...), params)"


def _check_any(name: str, kernels: Any) -> None:
    if not kernels:
        raise ValueError(f'{name}: no leaf of this tree is an AdaLoRA kernel; wrap with variant="adalora"')
