"""An adapter by itself, as PyTorch lays it out: what a file holds, without a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.nodes.form import Form
from jlora.nodes.kernel import KernelSpec
from jlora.nodes.node import AdaptedParam

LINEAR, EMBEDDING, CONV, EXPERTS = "linear", "embedding", "conv", "experts"


@dataclasses.dataclass(frozen=True)
class Update:
    """The low-rank update of one module or parameter, ``scale * B @ A`` in PyTorch's orientation.

    Args:
      kind: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"experts"``.
      a: (r, in), (r, tokens), (r, in, height, width) or (experts, r, in).
      b: (out, r), (features, r), (out, r) or (experts, out, r).
      scale: the scale s.
      magnitude: DoRA's, (out,), or None.
      bias: of B, (out,), or None: the layer's bias becomes ``bias + scale * bias_of_B``.
    """

    kind: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Those of its arrays that are there."""
        named = {"A": self.a, "B": self.b, "magnitude": self.magnitude, "bias of B": self.bias}
        return {name: x for name, x in named.items() if x is not None}


@dataclasses.dataclass(frozen=True)
class Filed:
    """What the files of another method than LoRA hold of one module.

    Args:
      tensors: by the end of their names in the file.
      node: the class of the variant.
      spec: the settings for this module, where it was read.
      settings: by PEFT's names, where it is to be written.
      shared: the tensors that all modules have in common, by their names.
      sizes: the numbers of outputs and of inputs, where it is to be written.
    """

    tensors: Mapping[str, np.ndarray]
    node: type[AdaptedParam]
    spec: KernelSpec | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, int] = (0, 0)

    kind = LINEAR  # or a convolution, which its tensors do not tell
    magnitude = bias = None

    @property
    def form(self) -> Form:
        """How the files hold it."""
        assert self.node.FORM is not None
        return self.node.FORM

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Those that are the module's own."""
        return dict(self.tensors)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter's files hold, by PyTorch's names of modules and parameters.

    Args:
      updates: by the name of the module, or of the parameter of stacked experts.
      full: arrays trained in full, by the name of the parameter.
      tokens: rows of tables, by the name of the module: the indices, and rows of shape (n, features).
      bases: copies of base weights that the files hold, by the name of the parameter; never used as weights.
      dropout: the rate at training.
      conv1d: whether 2-D weights are (in, out), as in GPT-2; None: not said.
      start: the initialisation, where it has changed the base (``"pissa"``, ``"olora"``); None otherwise.
      config: the settings, as read.
      form: of the files, if they are those of another method than LoRA; then `updates` has `Filed`s.
    """

    updates: Mapping[str, Any]
    full: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=dict)
    bases: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0
    conv1d: bool | None = None
    start: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: Form | None = None

    @property
    def is_dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates.values())

    @property
    def shared(self) -> Mapping[str, np.ndarray]:
        """The tensors that all modules have in common."""
        return getattr(next(iter(self.updates.values()), None), "shared", {})

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """All arrays that were trained, each with a name for messages."""
        for name, update in self.updates.items():
            yield from ((f"{part} of {name}", x) for part, x in update.arrays.items())
        yield from self.shared.items()
        yield from self.full.items()
        yield from ((f"rows of {name}", rows) for name, (_, rows) in self.tokens.items())
