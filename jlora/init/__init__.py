"""Initial values of the factors.

`random` draws them, `spectral` takes them from the kernel itself, `data` from batches of the training data.
"""

from jlora.init.data import eva, lora_ga
from jlora.init.random import RANDOM, embedding, gaussian, kaiming, orthogonal
from jlora.init.spectral import SPECTRAL, milora, olora, pissa, spectral

__all__ = [
    "RANDOM",
    "SPECTRAL",
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
