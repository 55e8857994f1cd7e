"""Training: the optimizer of a wrapped tree, gradients of what trains, and optax transforms made for adapters."""

from jlora.optim.adalora import adalora, ranks
from jlora.optim.precondition import precondition
from jlora.optim.training import grad, optimizer, value_and_grad

__all__ = ["adalora", "grad", "optimizer", "precondition", "ranks", "value_and_grad"]
