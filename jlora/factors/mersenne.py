"""Random numbers as PyTorch draws them on a CPU: what PEFT draws anew from a seed, in the place of saving it.

PyTorch's generator is the Mersenne Twister. A float takes 24 bits of one output, and a permutation swaps each place
with one behind it (``aten/src/ATen/native/TensorFactories.cpp``, ``randperm_cpu``).
"""

from __future__ import annotations

import numpy as np


class Generator:
    """``torch.Generator().manual_seed(seed)``.

    Example:
      >>> Generator(0).uniform((2,), 0.0, 1.0)
      array([0.4962566, 0.7682218], dtype=float32)
      >>> Generator(0).permutation(10, 4)
      array([4, 1, 7, 5])
    """

    def __init__(self, seed: int) -> None:
        self._outputs = np.random.RandomState(seed & 0xFFFFFFFF)

    def _bits(self, count: int) -> np.ndarray:
        return self._outputs.randint(0, 2**32, size=count, dtype=np.uint32)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """``torch.empty(shape).uniform_(low, high)``, in float32."""
        unit = (self._bits(int(np.prod(shape))) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)
        first, width = np.float32(low), np.float32(high) - np.float32(low)
        return (unit.astype(np.float64) * width + first).astype(np.float32).reshape(shape)  # one rounding, as fused

    def permutation(self, count: int, first: int) -> np.ndarray:
        """The first entries of ``torch.randperm(count)``."""
        moved: dict[int, int] = {}
        found = np.empty(first, np.int64)
        bits = self._bits(min(first, count - 1))
        for i in range(first):
            at = i + int(bits[i]) % (count - i) if i < count - 1 else i
            found[i] = moved.get(at, at)
            moved[at] = moved.get(i, i)
        return found
