"""FourierFT: the update is an inverse Fourier transform of a few trained coefficients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.dense import drawn, scattered, size_of, whole_size, with_matrix


class SpectrumForm(Form):
    """The coefficients; the seed of their places is a setting."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        return {**fields, **{name: x for name, x in spec.options.items() if name != "frequencies"}}

    def node(self, cls: Any, fields: Mapping[str, Any], kernel: Any) -> Any:
        count, most = fields["spectrum"].shape[-1], math.prod(size_of(kernel))
        if count > most:
            raise ValueError(f"peft.load: {kernel.path} has {most} numbers, and {count} coefficients are for it")
        return super().node(cls, fields, kernel)

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        return None, None

    def settings_of(self, node: Any) -> dict[str, Any]:
        return super().settings_of(node) | {"init_weights": True}


def zeros_of(cls: Any, base: Any, kernel: Kernel, most: int) -> Any:
    """A node whose coefficients are zero; by default there are `most` of them, or as many as the kernel has numbers."""
    count, size = kernel.option("frequencies"), math.prod(size_of(kernel))
    count = min(most, size) if count is None else count
    if type(count) is not int or not 1 <= count <= size:
        kernel.refuse("options['frequencies']", f"it is an integer of at most {size}", count)
    if type(kernel.option("seed")) is not int:
        kernel.refuse("options['seed']", "it is an integer", kernel.option("seed"))
    if type(kernel.option("scaling")) not in (int, float):
        kernel.refuse("options['scaling']", "it is a number", kernel.option("scaling"))
    spectrum = jnp.zeros(kernel.sizes("batch frequencies", frequencies=count), kernel.dtype)
    own = {name: x for name, x in kernel.spec.options.items() if name != "frequencies"}
    return cls(base, spectrum, **own, **kernel.place)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FourierFtParam(AdaptedParam):
    """``W + scaling * F``, with F the real part of a transform in two dimensions of some coefficients, axes flattened.

    The places of the coefficients are those that PyTorch draws with the option ``seed``; ``frequencies`` is their
    number, by default 1000. F has no small factors: a step computes the kernel and its whole gradient, at the cost of a
    merged kernel and of a Fourier transform. It starts as zero; PEFT draws it unless ``init_weights`` is true.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      spectrum: the coefficients, of shape (batch..., frequencies), trained; zero at the start.
      scaling, seed: the options.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="fourierft", options={"frequencies": 5})
      >>> jlora.wrap({"kernel": jnp.ones((4, 3))}, spec)["kernel"].spectrum.shape
      (5,)

    References:
      Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv:2405.03003.
    """

    KINDS = ("dot",)
    SETTINGS = ()
    OPTIONS = {"frequencies": None, "scaling": 150.0, "seed": 777}
    LINEAR = ("spectrum",)
    FORM = SpectrumForm(
        "FOURIERFT", {"fourierft_spectrum": "spectrum: frequencies"},
        {
            "n_frequency": ("options.frequencies", 1000), "scaling": ("options.scaling", 150.0),
            "random_loc_seed": ("options.seed", 777),
        },
        {"n_frequency": "n_frequency_pattern"}, orders_outputs=True, bias="fourier_only",
    )  # fmt: skip

    base: Any = frozen()
    spectrum: Any = trained("batch frequencies")
    axes: Axes = static()
    scaling: float = static(default=150.0)
    seed: int = static(default=777)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> Any:
        del key
        return zeros_of(cls, base, kernel, 1000)

    @property
    def settings(self) -> dict[str, Any]:
        count = self.spectrum.shape[-1]
        return {"options": {"frequencies": count, "scaling": self.scaling, "seed": self.seed}}

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del key
        shape, values = (
            whole_size(self, name, "FourierFT's coefficients"),
            self.spectrum.astype(wide(self.spectrum.dtype)),
        )
        whole = scattered(values, drawn(self.seed, shape, values.shape[-1]), shape)
        return with_matrix(self, jnp.fft.ifft2(whole).real * self.scaling)
