"""What the user asks for: `LoraSpec`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import init as inits
from jlora.axes import Axes
from jlora.nodes import AdaptedParam
from jlora.paths import Pattern, matcher, text_of
from jlora.settings import from_axolotl, from_llamafactory, from_peft
from jlora.variants import VARIANTS

BIASES = ("none", "all", "lora_only")
OVERRIDABLE = ("rank", "alpha", "dropout", "scaling", "init", "variant", "options", "dtype")


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What to adapt, and how. Plain data: it round-trips through JSON, YAML and TOML.

    Args:
      targets: ``"all-linear"`` (every kernel of a linear layer, by the name of ``kernel`` or ``w`` where no `sites` are
        given, but those of ``train`` and of an output layer named
        ``lm_head``), a pattern or a sequence of patterns over paths (see `jlora.paths.matcher`), a function
        ``(path, leaf) -> bool``, or a tree of booleans with the structure of the parameters.
      exclude: patterns taken out of the targets.
      rank: the rank r of ``lora_a`` (in, r) and ``lora_b`` (r, out).
      alpha: numerator of the scale.
      dropout: rate of the dropout on the low-rank path's input, on when `jlora.apply` is given `rng`.
      scaling: ``"alpha/r"``, ``"rslora"`` (alpha / sqrt(r)) or the scale itself as a number.
      init: ``"kaiming"`` (PEFT's default), ``"gaussian"``, ``"orthogonal"``; from the kernel itself ``"pissa"``,
        ``"pissa_niter_N"`` (N rounds of subspace iteration in place of the exact decomposition), ``"milora"``,
        ``"olora"``; or a function ``(key, in_shape, out_shape, rank, dtype) -> (lora_a, lora_b)`` for one kernel
        without batch axes. `jlora.init.eva` and `jlora.init.lora_ga` take a wrapped tree and data.
      variant: a name in `jlora.variants.VARIANTS` (``"lora"``, ``"dora"``, ``"lora_fa"``, ``"vera"``, ``"adalora"``,
        ``"loha"``, ``"lokr"``, ``"ia3"``, ``"oft"``, ``"boft"``), or an `AdaptedParam` class.
      options: settings of the variant's own, such as ``{"block_size": 32}`` of OFT.
      layers: the layers to adapt, such as ``range(8, 16)``: by the number in a path, or on the stacked axis; None: all.
      layers_name: of the list of layers, where a path has other numbers before the layer's.
      bias: which biases are trained too: ``"none"``, ``"all"`` or ``"lora_only"`` (those beside adapted kernels).
      lora_bias: whether the update has a bias of its own: the layer's becomes ``bias + scale * lora_bias``.
      train: patterns of leaves and modules trained in full (PEFT's ``modules_to_save``).
      train_tokens: rows of embedding tables to train, ``{pattern: indices}`` (PEFT's ``trainable_token_indices``).
      overrides: settings for the kernels that match a pattern, the first that matches:
        ``{"mlp/*": {"rank": 4, "alpha": 8}}`` (PEFT's ``rank_pattern`` and ``alpha_pattern``).
      axes: ``{pattern: Axes}`` for kernels whose axes neither `jlora.sites` nor Flax's conventions tell.
      dtype: of the factors; None is float32.
      seed: of the factors' initialisation, when `jlora.wrap` gets no key.

    Raises:
      ValueError: if a setting is out of its range; the message names it, what was found and what is expected.

    Example:
      >>> spec = LoraSpec(targets=("query", "value"), rank=4, alpha=8)
      >>> LoraSpec.from_dict(spec.to_dict()) == spec
      True

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685;
      Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
    """

    targets: Any = "all-linear"
    exclude: tuple[Pattern, ...] = ()
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    scaling: str | float = "alpha/r"
    init: str | Callable = "kaiming"
    variant: str | type[AdaptedParam] = "lora"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[int] | None = None
    layers_name: str | None = None
    bias: str = "none"
    lora_bias: bool = False
    train: tuple[Pattern, ...] = ()
    train_tokens: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    dtype: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        put("targets", _target_tuple(self.targets))
        put("rank", int(self.rank) if isinstance(self.rank, np.integer) else self.rank)
        put("exclude", _patterns("exclude", self.exclude))
        put("train", _patterns("train", self.train))
        put("axes", {pattern: _axes(pattern, value) for pattern, value in _mapping("axes", self.axes)})
        put("layers", None if self.layers is None else _indices("layers", self.layers))
        tokens = {p: _indices(f"train_tokens[{p!r}]", ids) for p, ids in _mapping("train_tokens", self.train_tokens)}
        put("train_tokens", tokens)
        put("options", dict(_mapping("options", self.options)))
        put("dtype", None if self.dtype is None else _float_dtype(self.dtype))
        _validate(self)
        put("overrides", {p: _override(self, p, value) for p, value in _mapping("overrides", self.overrides)})

    def __hash__(self) -> int:
        return hash((self.rank, self.alpha, self.dropout, self.scaling, self.bias, self.seed))

    @property
    def node(self) -> type[AdaptedParam]:
        """The class of the variant."""
        return VARIANTS[self.variant] if isinstance(self.variant, str) else self.variant

    @property
    def scale(self) -> float:
        """The factor s of ``W + s * A @ B``."""
        if self.scaling == "rslora":
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank if self.scaling == "alpha/r" else float(self.scaling)

    def at(self, path: str) -> LoraSpec:
        """The spec with the overrides for the kernel at `path` put in."""
        for pattern, settings in self.overrides.items():
            if matcher(pattern)(path):
                return dataclasses.replace(self, **settings, overrides={})
        return self

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data for JSON, YAML or TOML; settings that are None are left out.

        Raises:
          TypeError: if `targets`, `init` or `variant` is a function, a class or a tree, which no file holds.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(name, value) for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraSpec:
        """The inverse of `to_dict`; settings that are absent take their defaults.

        Raises:
          ValueError: if a setting is unknown.
        """
        _known("LoraSpec", data, [f.name for f in dataclasses.fields(cls)])
        return cls(**data)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoraSpec:
        """The spec of an ``adapter_config.json``, or of the settings of PEFT's ``LoraConfig``, with PEFT's defaults.

        Names of modules are matched by PEFT's rules against the dotted path of the module that holds a leaf,
        ``layers.0.q_proj`` for ``layers/0/q_proj/kernel``; a tree without such a level has ``target_parameters``. As in
        PEFT, names in a list that match nothing are passed over as long as one matches, and so are ``rank_pattern`` and
        ``alpha_pattern``. ``modules_to_save`` and a classifier's head (by ``task_type``) become `train`.

        The methods LORA, ADALORA, LOHA, LOKR, IA3, OFT, BOFT and VERA are those of `jlora.variants`; AdaLoRA's schedule
        belongs to `jlora.optim.adalora`. OFT's rotations are exact where PEFT's are a series, and BOFT's have no vector
        of output scales beside them.

        Args:
          config: settings by PEFT's names, such as ``json.load`` returns. Those that tell nothing of the adapter
            (``base_model_name_or_path``, ``inference_mode``, ...) and unknown ones that are None are ignored.

        Raises:
          ValueError: if a setting is unknown or can't be honoured; the message says which, why, and what to do.

        Example:
          >>> spec = LoraSpec.from_peft({"r": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True})
          >>> spec.rank, spec.alpha, spec.scaling
          (16, 8, 'rslora')

        References:
          https://huggingface.co/docs/peft/package_reference/lora
        """
        return _spec_of(cls, "from_peft", from_peft(config))

    @classmethod
    def from_axolotl(cls, config: Mapping[str, Any]) -> LoraSpec:
        """The spec of the adapter in an Axolotl configuration, matched as `from_peft` does.

        Args:
          config: the whole configuration, such as ``yaml.safe_load`` returns; what is not the adapter's is ignored. So
            are ``loraplus_lr_ratio``, which `jlora.optimizer` takes as ``b_lr_ratio``, and ``load_in_4bit``: the base
            of a ``qlora`` is quantised on its own, before `jlora.wrap`.

        Raises:
          ValueError: if a setting of the adapter is unknown or can't be honoured.

        Example:
          >>> config = {"adapter": "qlora", "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True, "bf16": True}
          >>> LoraSpec.from_axolotl(config) == LoraSpec(targets="all-linear", rank=32, alpha=64)
          True

        References:
          https://docs.axolotl.ai/docs/config-reference.html
        """
        return _spec_of(cls, "from_axolotl", from_axolotl(config))

    @classmethod
    def from_llamafactory(cls, config: Mapping[str, Any]) -> LoraSpec:
        """The spec of the adapter in a LLaMA-Factory configuration, matched as `from_peft` does.

        Args:
          config: the whole configuration, such as ``yaml.safe_load`` returns; what is not the adapter's is ignored. So
            is ``loraplus_lr_ratio``, which `jlora.optimizer` takes as ``b_lr_ratio``.

        Raises:
          ValueError: if a setting of the adapter is unknown or can't be honoured.

        Example:
          >>> spec = LoraSpec.from_llamafactory({"finetuning_type": "lora", "lora_rank": 16, "pissa_init": True})
          >>> spec.targets, spec.alpha, spec.init
          ('all-linear', 32, 'pissa_niter_16')

        References:
          https://llamafactory.readthedocs.io/en/latest/
        """
        return _spec_of(cls, "from_llamafactory", from_llamafactory(config))


def _spec_of(cls: type[LoraSpec], name: str, fields: Mapping[str, Any]) -> LoraSpec:
    try:
        return cls(**fields)
    except ValueError as error:
        raise ValueError(f"LoraSpec.{name}: {str(error).removeprefix('LoraSpec: ')}") from None


def _target_tuple(targets: Any) -> Any:
    if (isinstance(targets, str) and targets == "all-linear") or callable(targets):
        return targets
    leaves = jax.tree.leaves(targets)
    if leaves and all(isinstance(leaf, bool) for leaf in leaves):
        return targets
    if not isinstance(targets, (str, re.Pattern, Sequence)) or isinstance(targets, bytes) or not targets:
        raise ValueError(
            'LoraSpec: targets must be "all-linear", patterns, a function (path, leaf) -> bool or a tree of booleans, '
            f"found {targets!r}"
        )
    return _patterns("targets", targets)


def _patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    is_many = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    patterns: tuple[Any, ...] = tuple(value) if is_many else (value,)
    for pattern in patterns:
        _expect(isinstance(pattern, (str, re.Pattern)), name, "a pattern (a string) or a sequence of them", value)
        matcher(pattern)
    return patterns


def _mapping(name: str, value: Any) -> list[tuple[str, Any]]:
    _expect(isinstance(value, Mapping), name, "a mapping from patterns", value)
    _patterns(name, list(value))
    return list(value.items())


def _override(spec: LoraSpec, pattern: str, settings: Any) -> dict[str, Any]:
    where = f"overrides[{pattern!r}]"
    _expect(isinstance(settings, Mapping), where, "a mapping of settings", settings)
    _known(where, settings, OVERRIDABLE)
    try:
        checked = dataclasses.replace(spec, **settings, overrides={})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    found = {name: getattr(checked, name) for name in settings}
    return found | {"dtype": jnp.dtype(jnp.float32)} if found.get("dtype", 0) is None else found


def _axes(pattern: str, value: Any) -> Axes:
    if isinstance(value, Axes):
        return value
    if isinstance(value, Mapping):
        _known(f"axes[{pattern!r}]", value, ["in_axis", "out_axis", "batch_axis"])
    try:
        return Axes(**value) if isinstance(value, Mapping) else Axes(*value)
    except TypeError:
        expected = "jlora.Axes, or its in_axis, out_axis and batch_axis"
        raise ValueError(f"LoraSpec: axes[{pattern!r}] must be {expected}, found {value!r}") from None


def _float_dtype(value: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    _expect(jnp.issubdtype(dtype, jnp.floating), "dtype", "a floating type", value)
    return dtype


def _validate(spec: LoraSpec) -> None:
    _expect(type(spec.rank) is int and spec.rank >= 1, "rank", "an integer of at least 1", spec.rank)
    _expect(_is_number(spec.alpha) and spec.alpha > 0, "alpha", "a positive finite number", spec.alpha)
    _expect(_is_number(spec.dropout) and 0 <= spec.dropout < 1, "dropout", "a rate in [0, 1)", spec.dropout)
    is_scale = spec.scaling in ("alpha/r", "rslora") if isinstance(spec.scaling, str) else _is_number(spec.scaling)
    _expect(is_scale, "scaling", '"alpha/r", "rslora" or a finite number', spec.scaling)
    is_init = (
        callable(spec.init) or inits.spectral(spec.init) or (isinstance(spec.init, str) and spec.init in inits.RANDOM)
    )
    names = (*inits.RANDOM, *inits.SPECTRAL, "pissa_niter_N")
    _expect(bool(is_init), "init", f"one of {names} or a function", spec.init)
    is_class = isinstance(spec.variant, type) and issubclass(spec.variant, AdaptedParam)
    is_variant = is_class or (isinstance(spec.variant, str) and spec.variant in VARIANTS)
    _expect(is_variant, "variant", f"one of {tuple(VARIANTS)}, or a subclass of jlora.AdaptedParam", spec.variant)
    _known(f"variant {spec.node.__name__}: options", spec.options, list(spec.node.OPTIONS))
    _check_settings(spec)
    _expect(isinstance(spec.lora_bias, bool), "lora_bias", "True or False", spec.lora_bias)
    is_name = spec.layers_name is None or (isinstance(spec.layers_name, str) and spec.layers_name != "")
    _expect(is_name, "layers_name", "the name of the list of layers, or None", spec.layers_name)
    _expect(spec.bias in BIASES, "bias", f"one of {BIASES}", spec.bias)
    _expect(type(spec.seed) is int, "seed", "an integer", spec.seed)


def _check_settings(spec: LoraSpec) -> None:
    """Refuses a setting that means nothing to the variant."""
    for field in dataclasses.fields(spec):
        given = getattr(spec, field.name)
        if field.name in ("init", "dropout") and field.name not in spec.node.SETTINGS and given != field.default:
            raise ValueError(f"LoraSpec: {field.name}={given!r} means nothing to {spec.node.__name__}; leave it out")


def _indices(name: str, value: Any) -> tuple[int, ...]:
    is_many = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
    expected = "a sequence of different indices of at least 0"
    _expect(is_many and len(value) > 0, name, expected, value)
    indices = tuple(int(n) for n in value if isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0)
    _expect(len(indices) == len(value) == len({*indices}), name, expected, value)
    return indices


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _expect(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"LoraSpec: {name} must be {expected}, found {found!r}")


def _known(where: str, data: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in data:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where} has no setting {name!r}{hint} (it has {', '.join(names)})")


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, re.Pattern):
        return text_of(value)
    if isinstance(value, Axes):
        return {k: list(v) for k, v in dataclasses.asdict(value).items()}
    if isinstance(value, bool) and name != "targets":
        return value
    if isinstance(value, Mapping) and name != "targets":
        return {k: _plain(name, v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(name, v) for v in value]
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.number):
        return value.item()
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"LoraSpec.to_dict: {name} is {value!r}, which plain data can't hold; use patterns or a name")
    return value
