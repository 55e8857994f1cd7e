"""What is compiled: a step of training, and the loss of held-out rows."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jlora
from jlora.examples.smollm2 import SmolLM2, next_token_losses

CLIP = 1.0


def optimizer(params: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW behind a clip of the gradient's norm, for what trains."""
    return jlora.optimizer(optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(schedule)), params)


def abstract_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Returns the shapes of the optimizer's state, placed as what it follows."""
    state = jax.eval_shape(tx.init, params)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, state, jlora.sharding.of_state(state, params))


def first_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Returns the optimizer's state before the first step, on the mesh."""
    places = jlora.sharding.of_state(jax.eval_shape(tx.init, params), params)
    return jax.jit(tx.init, out_shardings=places)(params)


def train_step(
    model: SmolLM2, tx: optax.GradientTransformation, schedule: optax.Schedule, params: Any, state: Any
) -> Callable:
    """Returns the compiled step: (params, state, batch) to (params, state, metrics); the first two are donated.

    A batch holds `ids` (parts, rows, length), `step` and `stop`, the signals that processes got. The gradient is
    that of the whole batch, summed over its parts by a scan: one update a step with one place for the sum, where
    `optax.MultiSteps` would keep that sum as state and leave steps between that update nothing.
    """

    def mean_loss(params: Any, ids: jax.Array) -> jax.Array:
        return next_token_losses(jlora.apply(model.apply)({"params": params}, ids), ids).mean()

    def step(params: Any, state: Any, batch: dict[str, jax.Array]) -> tuple:
        def add(total: Any, ids: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jlora.value_and_grad(mean_loss)(params, ids)), None

        trainable, _ = jlora.partition(params)
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable)
        total, _ = lax.scan(add, zero, batch["ids"])
        loss, grads = jax.tree.map(lambda x: x / len(batch["ids"]), total)
        updates, state = tx.update(grads, state, params)
        told = {"loss": loss, "gradient_norm": optax.tree.norm(grads), "learning_rate": schedule(batch["step"])}
        return optax.apply_updates(params, updates), state, told | {"stop": batch["stop"].max()}

    places = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(step, in_shardings=(*places, None), out_shardings=(*places, None), donate_argnums=(0, 1))


def perplexity(model: SmolLM2, params: Any, batches: Iterable[jax.Array]) -> float:
    """Returns the perplexity of batches (1, rows, length) under plain or wrapped parameters, without rows of -1."""

    @jax.jit
    def summed(params: Any, ids: jax.Array) -> jax.Array:
        ids = ids[0]
        losses = next_token_losses(jlora.apply(model.apply)({"params": params}, ids.clip(0)), ids.clip(0)).mean(-1)
        counts = ids[:, 0] >= 0
        return jnp.stack([jnp.where(counts, losses, 0).sum(), counts.sum()])

    loss, rows = np.sum([np.asarray(summed(params, ids)) for ids in batches], axis=0)
    return float(np.exp(loss / rows))
