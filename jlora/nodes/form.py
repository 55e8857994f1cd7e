"""How PEFT's files hold a variant: the method's name, the tensors of a module, the settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Form:
    """The files of one of PEFT's methods, as those of a variant.

    Args:
      method: PEFT's ``peft_type``.
      tensors: of a module, by the end of their names: a field, and the words of its axes in the file's order, as in
        ``{"hada_w1_a": "loha_b1: out rank"}``. The axes of a kernel that a word such as ``in`` stands for are one axis.
      settings: by PEFT's names what of a `jlora.LoraSpec` they are: ``"rank"``, ``"alpha"``, ``"dropout"``, or one of
        the variant's options, as ``"options.factor"``; with PEFT's default behind it.
      patterns: PEFT's names of the same settings by module, as ``{"r": "rank_pattern"}``.
      listed: PEFT's settings that name the modules of which they are true, as ``feedforward_modules``.
      fixed: settings that all files of such adapters have.
      shared: tensors that PEFT has once for all modules, by their names; written as `tensors` are.
      optional: whether a module may lack some of the tensors.
      kinds: of modules that PEFT's method takes: ``"linear"``, ``"conv"``.
      orders_outputs: whether it matters which outputs stand beside which, so that they can't be put in another order.
      bias: what the setting ``bias`` calls the biases beside adapted kernels; "": the method has no such setting.
      turns_bias: whether PEFT changes the bias beside an adapted kernel with it, which no node here does.
      integers: tensors of whole numbers.
    """

    method: str
    tensors: Mapping[str, str]
    settings: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    listed: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: bool = False
    kinds: tuple[str, ...] = ("linear",)
    orders_outputs: bool = False
    bias: str = ""
    turns_bias: bool = False
    integers: tuple[str, ...] = ()

    def field(self, tensor: str) -> tuple[str, tuple[str, ...]]:
        """The field that a tensor is, and the words of the tensor's axes."""
        name, _, words = (self.tensors.get(tensor) or self.shared[tensor]).partition(":")
        return name, tuple(words.split())

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        """The node's fields of those that the file has of one module, static ones among them.

        Args:
          fields: in float32, those that `tensors` and `shared` name. The axes of a kernel that one word stands for are
            one axis; tensors without words are as they are.
          spec: the settings of this module, a `KernelSpec`.
        """
        del spec
        return fields

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        """The inverse of `read`; a tensor that is not there is not written."""
        del node
        return fields

    def alike(
        self, own: Mapping[str, np.ndarray], shared: Mapping[str, np.ndarray], whole: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray] | None:
        """A module's own tensors, beside the file's shared ones in place of the module's; None: these are others.

        Args:
          own: of the module.
          shared: of the module.
          whole: of the file, as `joined` returns them.
        """
        same = all(np.array_equal(x, beginning(whole[name], x)) for name, x in shared.items())
        return own if same else None

    def joined(
        self, shared: Sequence[Mapping[str, np.ndarray]], sizes: Sequence[tuple[int, int]]
    ) -> Mapping[str, np.ndarray]:
        """The shared tensors of the file, of those of each module: the largest of each.

        Args:
          shared: of each module.
          sizes: of each, the numbers of outputs and of inputs.
        """
        del sizes
        return {name: max((of[name] for of in shared), key=np.size) for name in shared[0]}

    def class_of(self, cls: Any, spec: Any) -> Any:
        """The class of a module's node, where the settings tell which of several."""
        del spec
        return cls

    def node(self, cls: Any, fields: Mapping[str, Any], kernel: Any) -> Any:
        """The node, without a base, of what `read` returned, with the kernel's own axes, of all its layers."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in kernel.settings.items() if name in known}
        return cls(**{"base": None, **given, **fields})

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """How many inputs and outputs a module has, as far as the shapes of its tensors tell."""
        found: dict[str, int] = {}
        for tensor, x in tensors.items():
            found |= dict(zip(self.field(tensor)[1], x.shape, strict=False))
        return found.get("in"), found.get("out")

    def gain_of_bias(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """What PEFT multiplies the module's bias by, (out,); None: nothing."""
        del tensors
        return None

    def draw(self, spec: Any, ins: int, outs: int) -> dict[str, np.ndarray]:
        """The tensors that all modules have in common, where a file has their seed alone.

        Args:
          spec: the settings of a module, a `KernelSpec`.
          ins: the largest number of inputs of all modules.
          outs: the largest number of outputs.
        """
        del spec, ins, outs
        raise ValueError(
            f"peft.load: the file lacks {' and '.join(self.shared)}, which {self.method} draws anew from a seed; "
            "save it in PEFT with save_projection=True"
        )

    def settings_of(self, node: Any) -> dict[str, Any]:
        """PEFT's settings of one module."""
        settings = node.settings
        scale, rank = settings.get("scaling", 1.0), settings.get("rank", 1)
        known = {"rank": rank, "alpha": plain_number(scale * rank), "dropout": settings.get("dropout", 0.0)}
        known |= {f"options.{name}": value for name, value in settings.get("options", {}).items()}
        return {name: known.get(what, default) for name, (what, default) in self.settings.items()}

    def together(self, settings: Mapping[str, dict[str, Any]]) -> Mapping[str, dict[str, Any]]:
        """The settings of all modules, by name, where they depend on each other."""
        return settings


def beginning(x: np.ndarray, of: np.ndarray) -> np.ndarray:
    """As much of an array as another has, along each axis."""
    return x[tuple(map(slice, of.shape))]


def plain_number(x: float) -> float:
    """A number, whole where it is but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-6 * max(1.0, abs(x)) else x
