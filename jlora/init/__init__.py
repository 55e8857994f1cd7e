"""How factors start: the public names.

The functions of `jlora.factors` draw them, or take them from the kernel itself. `corda`, `eva` and `lora_ga` take them
from batches of data: functions of a wrapped tree that give the tree with other factors. They work under jit and on
sharded trees: every large array is a product with, or the gradient of, a placed one. The gradients are compiled once
for all batches; under a jit of one's own they are written out for each.
"""

from jlora.factors.random import RANDOM, embedding, gaussian, kaiming, orthogonal
from jlora.factors.spectral import SPECTRAL, milora, olora, pissa, spectral
from jlora.init.corda import corda
from jlora.init.eva import eva
from jlora.init.lora_ga import lora_ga

__all__ = [
    "RANDOM",
    "SPECTRAL",
    "corda",
    "embedding",
    "eva",
    "gaussian",
    "kaiming",
    "lora_ga",
    "milora",
    "olora",
    "orthogonal",
    "pissa",
    "spectral",
]
