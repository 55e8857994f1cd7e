"""What a spec's settings may be: each is brought into its form, or refused by its name, what was expected and found."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora import init as inits
from jlora.axes import Axes
from jlora.checks import check_variant
from jlora.nodes import AdaptedParam
from jlora.paths import Pattern, matcher, text_of
from jlora.variants import VARIANTS

if TYPE_CHECKING:
    from jlora.spec import LoraSpec

T = TypeVar("T")

BIASES = ("none", "all", "lora_only")
PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_name",
    "rank_pattern": "overrides",
    "alpha_pattern": "overrides",
    "trainable_token_indices": "train_tokens",
    "init_lora_weights": "init",
    "use_rslora": 'scaling="rslora"',
    "use_dora": 'variant="dora"',
}
OVERRIDABLE = ("rank", "alpha", "dropout", "scaling", "init", "variant", "options", "dtype")


def target_tuple(targets: Any) -> Any:
    strings = [targets] if isinstance(targets, str) else [t for t in jax.tree.leaves(targets) if isinstance(t, str)]
    if targets != "all-linear" and (close := {*strings} & {"all-linear", "all_linear"}):
        raise ValueError(f'LoraSpec: targets has {min(close)!r}; every linear layer is targets="all-linear", by itself')
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
    return patterns("targets", targets)


def patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    is_many = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    patterns: tuple[Any, ...] = tuple(value) if is_many else (value,)
    for pattern in patterns:
        expect(isinstance(pattern, (str, re.Pattern)), name, "a pattern (a string) or a sequence of them", value)
        matcher(pattern)
    return patterns


def mapping(name: str, value: Any) -> list[tuple[str, Any]]:
    expect(isinstance(value, Mapping), name, "a mapping from patterns", value)
    patterns(name, list(value))
    return list(value.items())


def override(spec: LoraSpec, pattern: str, settings: Any) -> dict[str, Any]:
    where = f"overrides[{pattern!r}]"
    expect(isinstance(settings, Mapping), where, "a mapping of settings", settings)
    check_known(where, settings, OVERRIDABLE)
    settings = of_variant(spec, settings) | dict(settings)
    try:
        checked = dataclasses.replace(spec, **settings, overrides={})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    found = {name: getattr(checked, name) for name in settings}
    return found | {"dtype": jnp.dtype(jnp.float32)} if found.get("dtype", 0) is None else found


def of_variant(spec: LoraSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What another variant does not take over from the spec: options, and settings that mean nothing to it."""
    variant = settings.get("variant")
    node = VARIANTS.get(variant) if isinstance(variant, str) else variant
    if node is None:
        return {}
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    return {"options": {}} | {name: defaults[name] for name in ("init", "dropout") if name not in node.SETTINGS}


def axes_of(pattern: str, value: Any) -> Axes:
    if isinstance(value, Axes):
        return value
    if isinstance(value, Mapping):
        check_known(f"axes[{pattern!r}]", value, ["in_axis", "out_axis", "batch_axis"])
    try:
        return Axes(**value) if isinstance(value, Mapping) else Axes(*value)
    except TypeError:
        expected = "jlora.Axes, or its in_axis, out_axis and batch_axis"
        raise ValueError(f"LoraSpec: axes[{pattern!r}] must be {expected}, found {value!r}") from None


def float_dtype(value: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    expect(jnp.issubdtype(dtype, jnp.floating), "dtype", "a floating type such as 'bfloat16'", value)
    return dtype


def validate(spec: LoraSpec) -> None:
    expect(type(spec.rank) is int and spec.rank >= 1, "rank", "an integer of at least 1", spec.rank)
    expect(is_number(spec.alpha) and spec.alpha > 0, "alpha", "a positive finite number", spec.alpha)
    expect(is_number(spec.dropout) and 0 <= spec.dropout < 1, "dropout", "a rate in [0, 1)", spec.dropout)
    is_scale = spec.scaling in ("alpha/r", "rslora") if isinstance(spec.scaling, str) else is_number(spec.scaling)
    expect(is_scale, "scaling", '"alpha/r", "rslora" or a finite number', spec.scaling)
    is_init = (
        callable(spec.init) or inits.spectral(spec.init) or (isinstance(spec.init, str) and spec.init in inits.RANDOM)
    )
    names = (*inits.RANDOM, *inits.SPECTRAL, "pissa_niter_N")
    data = " (jlora.init.eva and jlora.init.lora_ga take the wrapped tree and batches)"
    hint = data if spec.init in ("eva", "lora_ga") else nearest(spec.init, names)
    expect(bool(is_init), "init", f"one of {names} or a function{hint}", spec.init)
    is_class = isinstance(spec.variant, type) and issubclass(spec.variant, AdaptedParam)
    is_variant = is_class or (isinstance(spec.variant, str) and spec.variant in VARIANTS)
    expected = f"one of {tuple(VARIANTS)}, or a subclass of jlora.AdaptedParam{nearest(spec.variant, VARIANTS)}"
    expect(is_variant, "variant", expected, spec.variant)
    if not isinstance(spec.variant, str):
        check_variant(spec.variant)
    check_known(f"{spec.variant_name}: options", spec.options, list(spec.node.OPTIONS))
    check_settings(spec)
    expect(isinstance(spec.lora_bias, bool), "lora_bias", "True or False", spec.lora_bias)
    is_name = spec.layers_name is None or (isinstance(spec.layers_name, str) and spec.layers_name != "")
    expect(is_name, "layers_name", "the name of the list of layers, or None", spec.layers_name)
    expect(spec.bias in BIASES, "bias", f"one of {BIASES}", spec.bias)
    expect(type(spec.seed) is int, "seed", "an integer", spec.seed)


def check_settings(spec: LoraSpec) -> None:
    """Refuses an init or a dropout that the variant does not have; a rank and a scale are everybody's."""
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    for name in ("init", "dropout"):
        given = getattr(spec, name)
        if name not in spec.node.SETTINGS and given != defaults[name]:
            raise ValueError(f"LoraSpec: {name}={given!r} means nothing to {spec.variant_name}; leave it out")


def indices(name: str, value: Any) -> tuple[int, ...]:
    is_many = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
    expected = "a sequence of different indices of at least 0"
    expect(is_many and len(value) > 0, name, expected, value)
    indices = tuple(int(n) for n in value if isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0)
    expect(len(indices) == len(value) == len({*indices}), name, expected, value)
    return indices


def is_number(value: Any) -> bool:
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def expect(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"LoraSpec: {name} must be {expected}, found {found!r}")


def check_known(where: str, data: Mapping[str, Any], names: Sequence[str], error: type[Exception] = ValueError) -> None:
    for name in data:
        if name not in names:
            ours = PEFT_NAMES.get(name, "")
            is_here = ours.partition("=")[0] in names
            hint = (
                f"; PEFT's {name} is {ours} here, and LoraSpec.from_peft takes PEFT's own settings" if is_here else ""
            )
            known = ", ".join(names) or "none"
            raise error(f"{where} has no setting {name!r}{hint or nearest(name, names)} (it has {known})")


def known_settings(cls: type[T]) -> type[T]:
    """Gives a dataclass a constructor that tells an unknown setting from its nearest, and from PEFT's names."""
    init, names = cls.__init__, [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **settings: Any) -> None:
        check_known(cls.__name__, settings, names, TypeError)
        init(self, *args, **settings)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def nearest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name).lower(), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close and close[0] != name else ""


def plain_data(name: str, value: Any) -> Any:
    if isinstance(value, re.Pattern):
        return text_of(value)
    if isinstance(value, Axes):
        return {k: list(v) for k, v in dataclasses.asdict(value).items()}
    if isinstance(value, bool) and name != "targets":
        return value
    if isinstance(value, Mapping) and name != "targets":
        return {k: plain_data(name, v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [plain_data(name, v) for v in value]
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.number):
        return value.item()
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"LoraSpec.to_dict: {name} is {value!r}, which plain data can't hold; use patterns or a name")
    return value
