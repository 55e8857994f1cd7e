"""WaveFT: the update is an inverse wavelet transform of a few trained coefficients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.dense import drawn, scattered, whole_size, with_matrix
from jlora.variants.fourierft import SpectrumForm, zeros_of

# What a coefficient of the lower and of the upper half adds to a pair of neighbours: their mean, their difference.
_HAAR = np.array([[1.0, 1.0], [1.0, -1.0]]) * 0.5**0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WaveFtParam(AdaptedParam):
    """``W + scaling * H``, with H the inverse Haar transform of some coefficients, one level deep, axes flattened.

    Each coefficient is of a block of 2 x 2 numbers. With the option ``wavelet=False`` it is of one number: an update of
    some entries. Their places are those that PyTorch draws with ``seed``; ``frequencies`` is their number, by default
    2592. H has no small factors: a step computes the kernel and its whole gradient, at the cost of a merged kernel.
    PEFT's other families of wavelets are not here.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      spectrum: the coefficients, of shape (batch..., frequencies), trained; zero at the start.
      scaling, seed, wavelet: the options.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="waveft", options={"frequencies": 5})
      >>> jlora.wrap({"kernel": jnp.ones((4, 3))}, spec)["kernel"].spectrum.shape
      (5,)

    References:
      Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv:2505.12532.
    """

    KINDS = ("dot",)
    SETTINGS = ()
    OPTIONS = {"frequencies": None, "scaling": 25.0, "seed": 777, "wavelet": True}
    LINEAR = ("spectrum",)
    FORM = SpectrumForm(
        "WAVEFT", {"waveft_spectrum": "spectrum: frequencies"},
        {
            "n_frequency": ("options.frequencies", 2592), "scaling": ("options.scaling", 25.0),
            "random_loc_seed": ("options.seed", 777), "use_idwt": ("options.wavelet", True),
        },
        {"n_frequency": "n_frequency_pattern"}, fixed={"wavelet_family": "db1"}, orders_outputs=True,
        bias="waveft_only",
    )  # fmt: skip

    base: Any = frozen()
    spectrum: Any = trained("batch frequencies")
    axes: Axes = static()
    scaling: float = static(default=25.0)
    seed: int = static(default=777)
    wavelet: bool = static(default=True)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> Any:
        del key
        if type(kernel.option("wavelet")) is not bool:
            kernel.refuse("options['wavelet']", "it is True or False", kernel.option("wavelet"))
        return zeros_of(cls, base, kernel, 2592)

    @property
    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("scaling", "seed", "wavelet")}
        return {"options": {"frequencies": self.spectrum.shape[-1], **own}}

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del key
        shape, values = whole_size(self, name, "WaveFT's coefficients"), self.spectrum.astype(wide(self.spectrum.dtype))
        places = drawn(self.seed, shape, values.shape[-1])
        if self.wavelet:
            places, shares = _spread(places, shape)
            values = (values[..., None] * jnp.asarray(shares, values.dtype)).reshape(*values.shape[:-1], -1)
        return with_matrix(self, scattered(values, places, shape) * self.scaling)


def _spread(places: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The four places of each coefficient, (2, 4 n), one after the other, and its shares of them, (n, 4)."""
    halves = [(n + 1) // 2 for n in shape]
    (row, low), (column, left) = ((at % half, at // half) for at, half in zip(places, halves, strict=True))
    rows, columns = 2 * row[:, None, None] + [[0], [1]], 2 * column[:, None, None] + [[0, 1]]
    # Of PEFT's bands the upper right one has differences of rows, and the lower left one of columns.
    shares = _HAAR[left][:, :, None] * _HAAR[low][:, None, :]
    at = [np.broadcast_to(x, shares.shape).reshape(-1) for x in (rows, columns)]
    return np.stack(at), shares.reshape(-1, 4)
