"""What the tests of the optimizers share: wrapped trees, and whole runs, each made by one compiled program."""

from typing import Any

import jax
import numpy as np
import optax

import jlora
from tests.support import randomised


def noisy(params: Any, spec: jlora.LoraSpec, std: float = 0.3, **settings: Any) -> Any:
    """The wrapped tree with normal noise in all that trains; what is frozen is as `jlora.wrap` makes it."""
    wrap = lambda params: jlora.wrap(params, spec, **settings)
    trainable, _ = jlora.partition(randomised(jax.eval_shape(wrap, params), std))
    return jlora.combine(trainable, jax.jit(lambda params: jlora.partition(wrap(params))[1])(params))


def noise_like(tree: Any, *more: int, seed: int = 0) -> Any:
    """Normal noise of the shapes of a tree, or several of it, stacked."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=(*more, *x.shape)).astype(x.dtype), tree)


def at(history: Any, step: int) -> Any:
    """One step of a history."""
    return jax.tree.map(lambda x: x[step], history)


def stepped(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    """A step of a transformation."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(tx: Any, params: Any, grads: Any) -> Any:
    """The parameters after each of the steps whose gradients are given, stacked."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = stepped(tx, *carry, grads)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


def trained(tx: Any, params: Any, gradient: Any, steps: int) -> Any:
    """The parameters after each of some steps down a gradient, stacked."""

    def step(carry: Any, _: None) -> Any:
        params, state = stepped(tx, *carry, gradient(carry[0]))
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), None, steps)[1]
