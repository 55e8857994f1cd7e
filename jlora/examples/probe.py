"""A linear probe: a logistic regression on frozen features."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


def fit_probe(x: jax.Array, labels: jax.Array, classes: int) -> dict[str, jax.Array]:
    """Returns the kernel (features, classes) and bias (classes,) fitted to features x (n, features)."""
    return fit_logistic(x, labels, best_decay(x, labels, classes), classes)


def best_decay(x: jax.Array, labels: jax.Array, classes: int) -> float:
    """Returns the weight decay whose head does best on the last fifth of the training set, fitted to the rest."""
    cut = len(x) * 4 // 5
    heads = [(decay, fit_logistic(x[:cut], labels[:cut], decay, classes)) for decay in DECAYS]
    right = lambda head: jnp.mean((x[cut:] @ head["kernel"] + head["bias"]).argmax(-1) == labels[cut:])
    return max(heads, key=lambda pair: right(pair[1]))[0]


@partial(jax.jit, static_argnums=3)
def fit_logistic(x: jax.Array, labels: jax.Array, decay: float, classes: int) -> dict[str, jax.Array]:
    """Returns kernel and bias of a full-batch logistic regression with weight decay."""

    def loss(head: dict) -> jax.Array:
        logits = x @ head["kernel"] + head["bias"]
        penalty = decay * jnp.sum(head["kernel"] ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + penalty

    def step(carry: tuple, _: None) -> tuple:
        head, state = carry
        value, grad = jax.value_and_grad(loss)(head)
        updates, state = tx.update(grad, state, head, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(head, updates), state), None

    tx = optax.lbfgs()
    head = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    (head, _), _ = jax.lax.scan(step, (head, tx.init(head)), length=100)
    return head
