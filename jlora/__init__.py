"""LoRA as a pure transform of a parameter tree.

`wrap` puts the factors A and B next to each kernel, `apply` runs an unchanged function on the wrapped tree at the
factored cost, `optimizer` trains the adapters and holds the base, `merge` gives a plain tree again, W + scale * A @ B.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jlora import adapters, checkpoint, init, optim, peft, quant, sharding, variants
from jlora.apply import DenseFallbackError, DenseFallbackWarning, apply
from jlora.convert import fold_and_restart, to_plain_lora
from jlora.nodes.axes import Axes
from jlora.nodes.fold import MergePrecisionWarning
from jlora.nodes.node import AdaptedParam, TrainableParam
from jlora.optim import grad, optimizer, value_and_grad
from jlora.report import explain, merge_error, sites, summary
from jlora.serial import register_all
from jlora.spec import LoraSpec
from jlora.tree import combine, labels, merge, partition, unwrap
from jlora.variants.lora import LoraParam
from jlora.wrap import wrap

if TYPE_CHECKING:
    from jlora import nnx

__version__ = "0.2.0"
register_all()  # for flax.serialization and jax.export


def __getattr__(name: str) -> Any:
    if name != "nnx":  # Flax's NNX is imported where it is used
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    return importlib.import_module("jlora.nnx")


__all__ = [
    "AdaptedParam",
    "Axes",
    "DenseFallbackError",
    "DenseFallbackWarning",
    "LoraParam",
    "LoraSpec",
    "MergePrecisionWarning",
    "TrainableParam",
    "adapters",
    "apply",
    "checkpoint",
    "combine",
    "explain",
    "fold_and_restart",
    "grad",
    "init",
    "labels",
    "merge",
    "merge_error",
    "nnx",
    "optim",
    "optimizer",
    "partition",
    "peft",
    "quant",
    "sharding",
    "sites",
    "summary",
    "to_plain_lora",
    "unwrap",
    "value_and_grad",
    "variants",
    "wrap",
]
