"""What a spec's settings may be: each is brought into its form, or refused by its name, what was expected and found."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factors.random import RANDOM
from jlora.factors.spectral import SPECTRAL, spectral
from jlora.nodes.axes import Axes, AxesOfConv, AxesOfUse
from jlora.nodes.checks import check_variant
from jlora.nodes.node import AdaptedParam
from jlora.targets.patterns import Pattern, matcher, text_of
from jlora.variants import VARIANTS

T = TypeVar("T")

INIT, DROPOUT = "kaiming", 0.0  # the defaults of settings that not every variant has
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


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a `jlora.LoraSpec`, each in its form.

    Raises:
      ValueError: if one is out of its range; the message names it, what was found and what is expected.
    """
    pairs = lambda name: mapping(name, given[name])
    found = dict(given) | {
        "targets": target_tuple(given["targets"]),
        "rank": int(given["rank"]) if isinstance(given["rank"], np.integer) else given["rank"],
        "exclude": patterns("exclude", given["exclude"]),
        "train": patterns("train", given["train"]),
        "axes": {pattern: axes_of(pattern, value) for pattern, value in pairs("axes")},
        "layers": None if given["layers"] is None else indices("layers", given["layers"]),
        "layers_name": names_of_lists(given["layers_name"]),
        "train_tokens": {p: indices(f"train_tokens[{p!r}]", ids) for p, ids in pairs("train_tokens")},
        "options": dict(pairs("options")),
        "dtype": None if given["dtype"] is None else float_dtype(given["dtype"]),
    }
    check_ranges(found)
    if found["targets"] == () and not found["train"] and not found["train_tokens"] and found["bias"] != "all":
        raise ValueError(
            'LoraSpec: targets must be "all-linear", patterns, a function (path, leaf) -> bool or a tree of booleans, '
            "found (): nothing would train. It is for train=, train_tokens= or bias='all' alone"
        )
    return found | {"overrides": {p: override(found, p, value) for p, value in pairs("overrides")}}


def target_tuple(targets: Any) -> Any:
    strings = [targets] if isinstance(targets, str) else [t for t in jax.tree.leaves(targets) if isinstance(t, str)]
    if "all_linear" in strings:
        raise ValueError("LoraSpec: targets has 'all_linear'; every linear layer is targets=\"all-linear\"")
    if (isinstance(targets, str) and targets == "all-linear") or callable(targets):
        return targets
    if isinstance(targets, Mapping) and "all-linear" in strings:
        raise ValueError('LoraSpec: targets is a tree that has "all-linear"; a tree holds True or False')
    leaves = jax.tree.leaves(targets)
    if leaves and all(isinstance(leaf, bool) for leaf in leaves):
        return targets
    if isinstance(targets, Sequence) and not isinstance(targets, (str, bytes)) and not targets:
        return ()  # beside leaves that train in full
    if not isinstance(targets, (str, re.Pattern, Sequence)) or isinstance(targets, bytes) or not targets:
        raise ValueError(
            'LoraSpec: targets must be "all-linear", patterns, a function (path, leaf) -> bool or a tree of booleans, '
            f"found {targets!r}"
        )
    found = patterns("targets", targets)
    return "all-linear" if {*found} == {"all-linear"} else found


def names_of_lists(given: Any) -> str | tuple[str, ...] | None:
    names = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    is_named = given is None or (bool(names) and all(isinstance(name, str) and name for name in names))
    expect(is_named, "layers_name", "the name of the list of layers, several of them, or None", given)
    return given if given is None or isinstance(given, str) else tuple(names)


def patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    is_many = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    patterns: tuple[Any, ...] = tuple(value) if is_many else (value,)
    for pattern in patterns:
        expect(isinstance(pattern, (str, re.Pattern)), name, "a pattern (a string) or a sequence of them", value)
        try:
            matcher(pattern)
        except ValueError as error:
            raise ValueError(f"LoraSpec: {name}: {error}") from None
    return patterns


def mapping(name: str, value: Any) -> list[tuple[str, Any]]:
    expect(isinstance(value, Mapping), name, "a mapping from patterns", value)
    patterns(name, list(value))
    return list(value.items())


def override(spec: Mapping[str, Any], pattern: str, settings: Any) -> dict[str, Any]:
    """The settings of one override in their forms, with what goes along with another variant."""
    where = f"overrides[{pattern!r}]"
    expect(isinstance(settings, Mapping), where, "a mapping of settings", settings)
    check_known(where, settings, OVERRIDABLE)
    settings = of_variant(settings) | dict(settings)
    try:
        whole = checked({**spec, **settings, "overrides": {}})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    found = {name: whole[name] for name in settings}
    return found | {"dtype": jnp.dtype(jnp.float32)} if found.get("dtype", 0) is None else found


def of_variant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What another variant does not take over from the spec: options, and settings that mean nothing to it."""
    variant = settings.get("variant")
    node = VARIANTS.get(variant) if isinstance(variant, str) else variant
    if node is None:
        return {}
    defaults = {"init": INIT, "dropout": DROPOUT}
    return {"options": {}} | {name: value for name, value in defaults.items() if name not in node.SETTINGS}


def axes_of(pattern: str, value: Any) -> Axes:
    if isinstance(value, Axes):
        return value
    if isinstance(value, Mapping):
        check_known(f"axes[{pattern!r}]", value, ["in_axis", "out_axis", "batch_axis", "lookup", "conv"])
        expect(type(value.get("lookup", True)) is bool, f"axes[{pattern!r}]", "lookup, true or false", value)
        expect(value.get("conv", True) is True, f"axes[{pattern!r}]", "conv, true", value)
    try:
        kinds = {"lookup": AxesOfUse, "conv": AxesOfConv}
        made: Any = next((kind for name, kind in kinds.items() if isinstance(value, Mapping) and name in value), Axes)
        return made(**value) if isinstance(value, Mapping) else made(*value)
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


def check_ranges(spec: Mapping[str, Any]) -> None:
    """Refuses a setting that is out of its range."""
    rank, alpha, dropout, scaling = (spec[name] for name in ("rank", "alpha", "dropout", "scaling"))
    expect(type(rank) is int and rank >= 1, "rank", "an integer of at least 1", rank)
    expect(is_number(alpha) and alpha > 0, "alpha", "a positive finite number", alpha)
    expect(is_number(dropout) and 0 <= dropout < 1, "dropout", "a rate in [0, 1)", dropout)
    is_scale = scaling in ("alpha/r", "rslora") if isinstance(scaling, str) else is_number(scaling)
    expect(is_scale, "scaling", '"alpha/r", "rslora" or a finite number', scaling)
    check_init(spec["init"])
    check_variant_settings(spec)
    expect(isinstance(spec["lora_bias"], bool), "lora_bias", "True or False", spec["lora_bias"])
    expect(spec["bias"] in BIASES, "bias", f"one of {BIASES}", spec["bias"])
    expect(type(spec["seed"]) is int, "seed", "an integer", spec["seed"])


def check_init(init: Any) -> None:
    is_init = callable(init) or spectral(init) or (isinstance(init, str) and init in RANDOM)
    names = (*RANDOM, *SPECTRAL, "pissa_niter_N")
    data = f" (jlora.init.{init} takes the wrapped tree and batches)"
    hint = data if init in ("eva", "corda", "lora_ga") else nearest(init, names)
    expect(bool(is_init), "init", f"one of {names} or a function{hint}", init)


def check_variant_settings(spec: Mapping[str, Any]) -> None:
    """Refuses what is no variant, and an option, init or dropout that it does not have; a rank is everybody's."""
    variant = spec["variant"]
    is_class = isinstance(variant, type) and issubclass(variant, AdaptedParam)
    is_variant = is_class or (isinstance(variant, str) and variant in VARIANTS)
    expected = f"one of {tuple(VARIANTS)}, or a subclass of jlora.AdaptedParam{nearest(variant, VARIANTS)}"
    expect(is_variant, "variant", expected, variant)
    if not isinstance(variant, str):
        check_variant(variant)
    node, name = class_of(variant), told(variant)
    check_known(f"{name}: options", spec["options"], list(node.OPTIONS))
    for setting, default in (("init", INIT), ("dropout", DROPOUT)):
        if setting not in node.SETTINGS and spec[setting] != default:
            raise ValueError(f"LoraSpec: {setting}={spec[setting]!r} means nothing to {name}; leave it out")


def class_of(variant: str | type[AdaptedParam]) -> type[AdaptedParam]:
    """The class of a variant."""
    return VARIANTS[variant] if isinstance(variant, str) else variant


def told(variant: str | type[AdaptedParam]) -> str:
    """A variant as messages call it."""
    return f"variant {variant!r}" if isinstance(variant, str) else f"variant {variant.__name__}"


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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(value).items()}
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
