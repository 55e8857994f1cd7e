"""What the user asks for: `LoraSpec`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jlora.nodes.axes import Axes
from jlora.nodes.kernel import KernelSpec
from jlora.nodes.node import AdaptedParam
from jlora.spec.axolotl import from_axolotl
from jlora.spec.fastchat import from_fastchat
from jlora.spec.files import CONFIG, settings_of
from jlora.spec.llamafactory import from_llamafactory
from jlora.spec.peft import from_peft
from jlora.spec.validate import DROPOUT, INIT, check_known, checked, class_of, known_settings, plain_data, told
from jlora.targets.patterns import Pattern, matcher


@known_settings
@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What to adapt, and how. Plain data: it round-trips through JSON, YAML and TOML.

    Patterns select leaves by their paths, such as ``encoder/layer_0/query/kernel``:

    * A plain pattern matches the end of a path, name by name. ``query`` and ``attention/query`` match every leaf within
      each module of that name, ``query/kernel`` a leaf. ``*`` and ``?`` stand for parts of a name, ``**`` for any
      number of names.
    * A pattern that begins with ``re:``, is compiled by `re.compile`, or has one of ``( ) | ^ $ +``, a backslash or
      ``.*`` in it, is a regular expression. It must match the whole path of a leaf or of a module.
    * One that begins with ``module:`` is a regular expression for the whole dotted name of the module that holds the
      leaf, as PEFT writes it: ``module:.*layers.0.query``. With ``module?:`` there may be none.

    Args:
      targets: which leaves are adapted. It is ``"all-linear"``, a pattern (see above), a sequence of patterns, a
        function ``(path, leaf) -> bool``, or a tree of booleans with the structure of the parameters. A sequence of
        patterns may have ``"all-linear"`` in it. ``"all-linear"`` is every kernel of a linear layer. It leaves out
        those in ``train``, and an output layer named ``lm_head``, ``embed_out`` or ``logits_dense`` (MaxText's).
        Without `sites`, it knows kernels by the names ``kernel`` and ``w``. ``()`` adapts nothing, beside `train` (as
        LN tuning of norms) or ``bias="all"`` (as BitFit).
      exclude: patterns of leaves that are left out of the targets.
      rank: the rank r of ``lora_a`` (in, r) and ``lora_b`` (r, out).
      alpha: numerator of the scale.
      dropout: rate of the dropout on the low-rank path's input, on when `jlora.apply` is given `rng`.
      scaling: ``"alpha/r"``, ``"rslora"`` (alpha / sqrt(r)) or the scale itself as a number.
      init: ``"kaiming"`` (PEFT's default), ``"gaussian"``, ``"orthogonal"``; from the kernel itself ``"pissa"``,
        ``"pissa_niter_N"`` (N rounds of subspace iteration in place of the exact decomposition), ``"milora"``,
        ``"olora"``; or a function ``(key, in_shape, out_shape, rank, dtype) -> (lora_a, lora_b)`` for one kernel
        without batch axes. `jlora.init.eva`, `corda` and `lora_ga` take a wrapped tree and data.
      variant: a name in `jlora.variants.VARIANTS` (``"lora"``, ``"dora"``, ``"lora_fa"``, ``"vera"``, ``"adalora"``,
        ``"loha"``, ``"lokr"``, ``"ia3"``, ``"oft"``, ``"boft"``), or an `AdaptedParam` class.
      options: settings of the variant's own, such as ``{"block_size": 32}`` of OFT.
      layers: the layers to adapt, such as ``range(8, 16)``: by the number in a path, or on the stacked axis; None: all.
      layers_name: of the list of layers, where a path has other numbers before the layer's: ``"layers"``, or with what
        is before it, ``"encoder.layer"``; or several such names, of which a path has one. Or of the module that stacks
        the layers, where its own name has a number, as Flax's automatic ones: ``"ScanBlock_0"``.
      bias: which biases are trained too: ``"none"``, ``"all"`` or ``"lora_only"`` (those beside adapted kernels).
      lora_bias: whether the update has a bias of its own: the layer's becomes ``bias + scale * lora_bias``.
      train: patterns of leaves and modules trained in full (PEFT's ``modules_to_save``).
      train_tokens: rows of embedding tables to train, ``{pattern: indices}`` (PEFT's ``trainable_token_indices``).
      overrides: settings for the kernels that match a pattern, the first that matches:
        ``{"mlp/*": {"rank": 4, "alpha": 8}}`` (PEFT's ``rank_pattern`` and ``alpha_pattern``).
      axes: ``{pattern: Axes}`` for kernels whose axes neither `jlora.sites` nor Flax's conventions tell.
      dtype: the type of the factors; None is float32.
      seed: the seed of the factors, when `jlora.wrap` gets no key.

    Raises:
      ValueError: if a setting is out of its range; the message names it, what was found and what is expected.
      TypeError: if there is no such setting.

    Example:
      >>> import jlora
      >>> spec = jlora.LoraSpec(targets=("query", "value"), rank=4, alpha=8)
      >>> jlora.LoraSpec.from_dict(spec.to_dict()) == spec
      True

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685;
      Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
    """

    targets: Any = "all-linear"
    exclude: tuple[Pattern, ...] = ()
    rank: int = 8
    alpha: float = 16
    dropout: float = DROPOUT
    scaling: str | float = "alpha/r"
    init: str | Callable = INIT
    variant: str | type[AdaptedParam] = "lora"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[int] | None = None
    layers_name: str | Sequence[str] | None = None
    bias: str = "none"
    lora_bias: bool = False
    train: tuple[Pattern, ...] = ()
    train_tokens: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    dtype: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in checked(given).items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash((self.rank, self.alpha, self.dropout, self.scaling, self.bias, self.seed))

    @property
    def node(self) -> type[AdaptedParam]:
        """The class of the variant."""
        return class_of(self.variant)

    @property
    def variant_name(self) -> str:
        """As messages call it."""
        return told(self.variant)

    @property
    def scale(self) -> float:
        """The factor s of ``W + s * A @ B``."""
        if self.scaling == "rslora":
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank if self.scaling == "alpha/r" else float(self.scaling)

    @property
    def kernel(self) -> KernelSpec:
        """What a variant is told of it."""
        options = {**self.node.OPTIONS, **self.options}
        dtype = jnp.dtype(self.dtype or jnp.float32)
        return KernelSpec(self.rank, self.scale, float(self.dropout), self.init, dtype, options)

    def at(self, path: str) -> LoraSpec:
        """The spec with the overrides for one kernel put in.

        Args:
          path: of the kernel.

        Returns:
          The spec without overrides. The settings of the first pattern that matches are its own; where none matches it
          is the spec itself.

        Example:
          >>> import jlora
          >>> spec = jlora.LoraSpec(rank=8, overrides={"mlp/*": {"rank": 4}})
          >>> spec.at("layer_0/mlp/kernel").rank, spec.at("layer_0/query/kernel").rank
          (4, 8)
        """
        for pattern, settings in self.overrides.items():
            if matcher(pattern)(path):
                return dataclasses.replace(self, **settings, overrides={})
        return self

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data for JSON, YAML or TOML; settings that are None are left out.

        Returns:
          A dict of numbers, strings, lists and dicts, which `from_dict` takes.

        Raises:
          TypeError: if `targets`, `init` or `variant` is a function, a class or a tree, which no file holds.

        Example:
          >>> import jlora
          >>> told = jlora.LoraSpec(targets=("query", "value"), rank=4).to_dict()
          >>> told["targets"], told["rank"]
          (['query', 'value'], 4)
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: plain_data(name, value) for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraSpec:
        """The inverse of `to_dict`; settings that are absent take their defaults.

        Args:
          data: settings by the names of this class, such as ``json.load`` returns. `from_peft` takes PEFT's names.

        Returns:
          The spec.

        Raises:
          ValueError: if a setting is unknown, or out of its range.

        Example:
          >>> import jlora
          >>> jlora.LoraSpec.from_dict({"rank": 4, "dropout": 0.1}) == jlora.LoraSpec(rank=4, dropout=0.1)
          True
        """
        check_known("LoraSpec", data, [f.name for f in dataclasses.fields(cls)])
        return cls(**data)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any] | str | os.PathLike[str] | Any) -> LoraSpec:
        """The spec of an ``adapter_config.json``, or of the settings of PEFT's ``LoraConfig``, with PEFT's defaults.

        Names of modules are matched by PEFT's rules against the dotted path of the module that holds a leaf,
        ``layers.0.q_proj`` for ``layers/0/q_proj/kernel``; a tree without such a level has ``target_parameters``. As in
        PEFT, names in a list that match nothing are passed over as long as one matches, and so are ``rank_pattern`` and
        ``alpha_pattern``. ``modules_to_save`` and a classifier's head (by ``task_type``) become `train`.

        The methods are those of `jlora.variants`, with PEFT's options: OFT's series, BOFT's output scales. LN_TUNING
        trains modules whole. AdaLoRA's schedule belongs to `jlora.optim.adalora`. IA3 scales no biases here, as PEFT's
        does.

        Args:
          config: settings by PEFT's names, such as ``json.load`` returns. Those that tell nothing of the adapter
            (``base_model_name_or_path``, ``inference_mode``, ...) and unknown ones that are None are ignored. Or a
            configuration of PEFT's, such as its ``LoraConfig``; or the path of a JSON or YAML file, or of a directory
            with an ``adapter_config.json``.

        Returns:
          The spec.

        Raises:
          ValueError: if a setting is unknown or can't be honoured; the message says which, why, and what to do. Or if
            the file can't be trusted to hold settings.
          FileNotFoundError: if there is no such file.
          ImportError: if it is YAML, and PyYAML is not installed.

        Example:
          >>> import jlora
          >>> spec = jlora.LoraSpec.from_peft({"r": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True})
          >>> spec.rank, spec.alpha, spec.scaling
          (16, 8, 'rslora')

        References:
          https://huggingface.co/docs/peft/package_reference/lora
        """
        return _spec_of(cls, "from_peft", from_peft, config, CONFIG)

    @classmethod
    def from_axolotl(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> LoraSpec:
        """The spec of the adapter in an Axolotl configuration, matched as `from_peft` does.

        Args:
          config: the whole configuration, such as ``yaml.safe_load`` returns, or the path of its YAML or JSON file;
            what is not the adapter's is ignored. So are ``loraplus_lr_ratio``, which `jlora.optimizer` takes as
            ``b_lr_ratio``, and ``load_in_4bit``: the base of a ``qlora`` is quantised on its own, by
            `jlora.quant.quantize`, before `jlora.wrap`. With ``freeze_mm_modules`` the towers of other modalities and
            their projectors are left out (``exclude``).

        Returns:
          The spec.

        Raises:
          ValueError: if a setting of the adapter is unknown or can't be honoured.
          FileNotFoundError, ImportError: of a file, as of `from_peft`.

        Example:
          >>> import jlora
          >>> config = {"adapter": "qlora", "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True, "bf16": True}
          >>> jlora.LoraSpec.from_axolotl(config) == jlora.LoraSpec(targets="all-linear", rank=32, alpha=64)
          True

        References:
          https://docs.axolotl.ai/docs/config-reference.html
        """
        return _spec_of(cls, "from_axolotl", from_axolotl, config)

    @classmethod
    def from_llamafactory(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> LoraSpec:
        """The spec of the adapter in a LLaMA-Factory configuration, matched as `from_peft` does.

        Args:
          config: the whole configuration, such as ``yaml.safe_load`` returns, or the path of its YAML or JSON file. It
            is flat, or has a ``peft_config`` as v1's. What is not the adapter's is ignored. So is
            ``loraplus_lr_ratio``, which `jlora.optimizer` takes as ``b_lr_ratio``. Of a model of several modalities
            ``freeze_vision_tower`` and ``freeze_multi_modal_projector`` are true by default, and
            ``freeze_language_model`` false: what they freeze is left out (``exclude``), where a model has it.
            ``lora_target: all`` never names the projector.

        Returns:
          The spec.

        Raises:
          ValueError: if a setting of the adapter is unknown or can't be honoured, nothing of an adapter is there, or
            the configuration is another tool's.
          FileNotFoundError, ImportError: of a file, as of `from_peft`.

        Example:
          >>> import jlora
          >>> spec = jlora.LoraSpec.from_llamafactory({"finetuning_type": "lora", "lora_rank": 16, "pissa_init": True})
          >>> spec.targets, spec.alpha, spec.init
          ('all-linear', 32, 'pissa_niter_16')

        References:
          https://llamafactory.readthedocs.io/en/latest/
        """
        return _spec_of(cls, "from_llamafactory", from_llamafactory, config)

    @classmethod
    def from_fastchat(cls, settings: Mapping[str, Any] | str | os.PathLike[str]) -> LoraSpec:
        """The spec of the adapter in FastChat's settings of a training run, matched as `from_peft` does.

        Args:
          settings: those of ``fastchat.train.train_lora`` by the names of its flags, or the path of their JSON or YAML
            file. What is not the adapter's is ignored: FastChat's settings of models, data and training, and those of
            Transformers' ``TrainingArguments``. So is ``q_lora``: the base is quantised on its own, by
            `jlora.quant.quantize`, before `jlora.wrap`. ``lora_bias`` is PEFT's ``bias``.

        Returns:
          The spec.

        Raises:
          ValueError: if a setting of the adapter is unknown or can't be honoured, nothing of an adapter is there, or
            the settings are another tool's.
          FileNotFoundError, ImportError: of a file, as of `from_peft`.

        Example:
          >>> import jlora
          >>> spec = jlora.LoraSpec.from_fastchat({"lora_r": 16, "q_lora": True, "learning_rate": 2e-5})
          >>> spec.rank, spec.alpha, spec.dropout, spec.bias
          (16, 16, 0.05, 'none')

        References:
          https://github.com/lm-sys/FastChat, fastchat/train/train_lora.py
        """
        return _spec_of(cls, "from_fastchat", from_fastchat, settings)


def _spec_of(
    cls: type[LoraSpec], name: str, read: Callable[[Any], dict[str, Any]], given: Any, config: str | None = None
) -> LoraSpec:
    where = f"LoraSpec.{name}"
    settings, path = settings_of(where, given, config)
    try:
        return cls(**read(settings))
    except ValueError as error:
        told = str(error).removeprefix("LoraSpec: ")
        told = told if told.startswith(where) else f"{where}: {told}"
        raise ValueError(f"{told} (in {path})" if path else told) from None
