"""``adapter_config.json``: what it says of each module, by PEFT's rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from jlora.nodes.form import Form
from jlora.peft.invocation import SETTING, tokens_of
from jlora.spec import LoraSpec, modules
from jlora.spec.methods import METHODS, SCHEDULE
from jlora.targets.layers import layer_of
from jlora.targets.patterns import is_of_modules, matcher

# where the factors started: told apart from what they are now
STARTS = ("pissa", "olora")
NEUTRAL = (None, True, False, "true", "gaussian", "orthogonal", "eva")
_START_SETTINGS = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "task_type")
_REPLACED = "rank_pattern", "alpha_pattern"
_TOLD = (*_START_SETTINGS, *_REPLACED, SETTING)  # of LoRA: not settings of a spec
# of other methods: how they started, how they are to be trained, and what the tensors tell
_UNSAID = {
    "ADALORA": f"{SCHEDULE} r rank_pattern",
    "OFT": "r",
    "LOKR": "decompose_both",
    "SHIRA": "mask_type random_seed",
    "WAVEFT": "proportional_parameters",
    "RANDLORA": "projection_prng_key sparse very_sparse",
    "PVERA": "generator_seed",
    "DELORA": "delora_lambda lambda_pattern",
}
_STARTS = "init_weights init_lora_weights init_ia3_weights init_logits_std init_vector_bank_bound task_type"


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of an adapter.

    Args:
      data: as the file has them.

    Raises:
      ValueError: if a setting is missing, unknown, of another method, or no finite number.
    """

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        needed = ("peft_type", "r", "lora_alpha") if self.data.get("peft_type", "LORA") == "LORA" else ()
        if missing := [name for name in needed if self.data.get(name) is None]:
            raise ValueError(f"the settings lack {' and '.join(missing)}")
        if not isinstance(self.data["peft_type"], str) or self.data["peft_type"] not in METHODS:
            raise ValueError(
                f"peft_type is {self.data['peft_type']!r}; files of {', '.join(METHODS)} are read. Merge the adapter "
                "in PEFT, into its base"
            )
        given = self.data.get("trainable_token_indices") or []
        for name, ids in given.items() if isinstance(given, Mapping) else [("embed_tokens", given)]:
            if not name or not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"trainable_token_indices has {ids!r} for {name!r}; expected is a list of row numbers")
        _ = self.spec, self.start, self.invocation  # errors at once

    @cached_property
    def spec(self) -> LoraSpec:
        """The settings as those of a `jlora.LoraSpec`, but for the start of the factors."""
        # what a later PEFT adds and leaves switched off changes nothing
        is_off = lambda name, value: (
            name not in ("r", "lora_alpha") and (value is None or value is False or value == {})
        )
        if not self.is_lora:
            return self._other_spec(is_off)
        kept = {name: x for name, x in self.data.items() if name not in _TOLD and not is_off(name, x)}
        targets = self.data.get("target_modules") or self.data.get("target_parameters") or self._others()
        try:
            spec = LoraSpec.from_peft(kept | ({} if targets else {"target_modules": ["."]}))
        except ValueError as error:
            told = str(error).split(" can't be honoured: ")
            if len(told) == 1:
                raise
            raise ValueError(f"{told[0]} can't be honoured here; merge the adapter in PEFT, into its base") from None
        patterns = [self.data.get(name) or {} for name in _REPLACED]
        if not all(isinstance(pattern, Mapping) for pattern in patterns):
            raise ValueError("rank_pattern and alpha_pattern must map patterns of modules' names to numbers")
        return dataclasses.replace(spec, overrides=modules.overrides(*patterns))

    def _other_spec(self, is_off: Callable[[str, Any], bool]) -> LoraSpec:
        """The settings of another method than LoRA, but for its start and its schedule."""
        method = self.data["peft_type"]
        unsaid, own = f"{_STARTS} {_UNSAID.get(method, '')}".split(), METHODS[method].names.split()
        is_form = lambda n, x: method == "MISS" and n == "init_weights" and isinstance(x, str)  # "bat", "mini"
        kept = {
            n: x for n, x in self.data.items() if (n not in unsaid or is_form(n, x)) and (n in own or not is_off(n, x))
        }
        return LoraSpec.from_peft(kept | ({} if self.data.get("target_modules") else {"target_modules": ["."]}))

    @property
    def is_lora(self) -> bool:
        return self.data["peft_type"] == "LORA"

    @property
    def form(self) -> Form | None:
        """How the files of another method than LoRA hold a module."""
        return None if self.is_lora else self.spec.node.FORM

    def _others(self) -> bool:
        return bool(self.data.get("modules_to_save") or self.data.get("trainable_token_indices"))

    @cached_property
    def start(self) -> str | None:
        """The initialisation, where it has changed the base that the adapter belongs to."""
        given = self.data.get("init_lora_weights") if self.is_lora else None
        name = given.lower() if isinstance(given, str) else given
        if name in NEUTRAL:
            return None
        if name in STARTS:
            return str(name)
        raise ValueError(
            f"init_lora_weights is {given!r}, which changes the base in a way that the file does not tell; convert the "
            "adapter in PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )

    @cached_property
    def invocation(self) -> tuple[int, ...] | None:
        """The tokens after which the adapter acts; None: it acts at all."""
        return tokens_of(self.data)

    @property
    def conv1d(self) -> bool:
        return bool(self.data.get("fan_in_fan_out"))

    def at(self, name: str) -> LoraSpec:
        """The settings of a module, by ``rank_pattern`` and ``alpha_pattern``.

        Of a weight that ``target_parameters`` names the patterns are for its own name, not for its module's.
        """
        weight = f"{name}.weight"
        is_parameter = any(f".{weight}".endswith(f".{target}") for target in self.parameters)
        return self.spec.at(_leaf(weight if is_parameter else name))

    def is_target(self, name: str) -> bool:
        """Whether a module, or a parameter, is one that the settings name."""
        path = _leaf(name)
        if self.spec.layers is not None and layer_of(path, self.spec.layers_name) not in self.spec.layers:
            return False
        return self._names(self.spec.targets, name) and not self._names(self.spec.exclude, name)

    @property
    def has_open_targets(self) -> bool:
        """Whether the targets are a shorthand that only a model resolves."""
        return self.spec.targets == "all-linear"

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.data.get("target_parameters") or ())

    def is_saved(self, parameter: str) -> bool:
        """Whether a parameter lies in a module of ``modules_to_save``."""
        saved, module = tuple(self.data.get("modules_to_save") or ()), parameter.rpartition(".")[0]
        return (bool(saved) and self._names(modules.within(saved), module)) or self._is_norm(module)

    def _is_norm(self, module: str) -> bool:
        """Whether a module is one that LN tuning trains whole."""
        return self.data["peft_type"] == "LN_TUNING" and self._names(self.spec.train, module)

    @property
    def has_tables(self) -> bool:
        """Whether the tables of which rows are trained are named."""
        return isinstance(self.data.get("trainable_token_indices"), Mapping)

    def tokens(self, name: str) -> tuple[int, ...]:
        """The rows of a module's table that are trained; none where it is not named."""
        given = self.data.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((ids for key, ids in given.items() if name.endswith(key)), ())
        return tuple(given or ())

    def _names(self, patterns: Any, name: str) -> bool:
        if isinstance(patterns, str):
            return patterns == "all-linear"
        paths = lambda pattern: [_leaf(name)] if is_of_modules(pattern) else [_leaf(name), name.replace(".", "/")]
        return any(matcher(pattern)(path) for pattern in patterns for path in paths(pattern))


def _leaf(name: str) -> str:
    """A module's name as the path of a leaf in it."""
    return f"{name.replace('.', '/')}/weight"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A rank and an alpha, with the rule that makes the scale of them."""

    rank: int
    alpha: float
    rslora: bool = False

    @classmethod
    def of(cls, rank: int, scale: float) -> Scale:
        """The settings of a scale: alpha a whole number where one of the two rules has it so."""
        plain, root = scale * rank, scale * math.sqrt(rank)
        if not _is_whole(plain) and _is_whole(root):
            return cls(rank, round(root), True)
        return cls(rank, round(plain) if _is_whole(plain) else plain)


def _is_whole(x: float) -> bool:
    return abs(x - round(x)) < 1e-6 * max(1.0, abs(x)) and round(x) != 0
