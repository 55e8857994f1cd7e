"""Another tool's settings while they are read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn

UNSET = (None, False, 0)
MAX_NAMES = 10_000  # in a list: each is a part of a regular expression
NEAR, CLOSE = 0.7, 0.85  # a name that is alike; a slip of a letter or two


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings under PEFT's names. None stands for what was not set, as it does in all of these tools.

    Args:
      where: the function that was called, for messages.
      values: by PEFT's name.
      names: what the tool calls them, by PEFT's name, where it has another.
    """

    where: str
    values: Mapping[str, Any]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or PEFT's default where there is none."""
        value = self.values.get(name)
        return default if value is None else value

    def is_set(self, name: str) -> bool:
        """Whether a setting has a value that switches something on."""
        value = self.values.get(name)
        return len(value) > 0 if isinstance(value, Collection) else value not in UNSET

    def flag(self, name: str) -> bool:
        """A setting that is true or false, and false by default."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {self.names.get(name, name)} must be true or false, found {value!r}")
        return value

    def number(self, name: str, default: float) -> Any:
        """A setting that is a finite number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            raise ValueError(f"{self.where}: {self.names.get(name, name)} must be a number, found {_short(value)}")
        return value

    def keyed(self, name: str) -> Mapping[str, Any]:
        """A setting that maps names to values, and is empty by default."""
        value = self.get(name, {})
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            self.refuse(name, "it must map patterns of modules' names to values")
        return value

    def listed(self, name: str) -> tuple[str, ...]:
        """A setting that is a list of names, and empty by default."""
        value = self.get(name, ())
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(x, str) and x for x in value):
            raise ValueError(
                f"{self.where}: {self.names.get(name, name)} must be a list of names, found {_short(value)}"
            )
        if len(value) > MAX_NAMES:
            raise ValueError(
                f"{self.where}: {self.names.get(name, name)} has {len(value)} names; at most {MAX_NAMES} are read. "
                "Give what they end with, or a regular expression"
            )
        return tuple(value) if isinstance(value, (list, tuple)) else tuple(sorted(value))

    def refuse(self, name: str, why: str) -> NoReturn:
        """Says why a setting can't be honoured, and what to do."""
        found = self.values.get(name)
        raise ValueError(f"{self.where}: {self.names.get(name, name)}={found!r} can't be honoured: {why}")

    def refuse_set(self, reasons: Mapping[str, str]) -> None:
        """Refuses each setting that is set, for its reason."""
        for name, why in reasons.items():
            if self.is_set(name):
                self.refuse(name, why)

    def refuse_unknown(self, known: Collection[str], prefixes: tuple[str, ...] | None = None) -> None:
        """Refuses a setting that is not known, with the nearest that is; one that switches nothing on is no matter.

        Args:
          known: all names that mean something, or are known to mean nothing to an adapter.
          prefixes: of an adapter's settings, where others stand beside them: a whole training configuration. A name
            with none of them is refused only if it is close to a known one.
        """
        for name, value in self.values.items():
            is_off = len(value) == 0 if isinstance(value, Collection) else value in UNSET
            if name in known or is_off:
                continue
            near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
            is_near = bool(difflib.get_close_matches(name, known, n=1, cutoff=CLOSE))
            if prefixes is None or name.startswith(prefixes) or is_near:
                hint = f"did you mean {near[0]!r}?" if near else "leave it out, if the adapter does not depend on it"
                raise ValueError(f"{self.where} knows no setting {name!r} (found {_short(value)}); {hint}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Tool(NamedTuple):
    """How a tool's settings are told from those of the others.

    Args:
      what: they are.
      alone: names that the tool alone has.
      shared: names that it has, and some of the others.
    """

    what: str
    alone: tuple[str, ...]
    shared: tuple[str, ...] = ()


TOOLS = {  # by the function that reads them
    "LoraSpec.from_peft": Tool("an adapter_config.json of PEFT's", ("peft_type", "target_modules", "r")),
    "LoraSpec.from_llamafactory": Tool(
        "a configuration of LLaMA-Factory's", ("finetuning_type", "lora_target", "lora_rank", "peft_config")
    ),
    "LoraSpec.from_axolotl": Tool(
        "a configuration of Axolotl's",
        ("adapter", "lora_target_linear", "base_model"),
        ("lora_r", "lora_target_modules"),
    ),
    "LoraSpec.from_fastchat": Tool(
        "a configuration of FastChat's",
        ("q_lora", "lora_weight_path", "model_max_length", "lazy_preprocess"),
        ("lora_r", "lora_target_modules"),
    ),
}


def readers_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The functions that may read some settings, each with a name that tells it.

    A name that one tool alone has tells more than those that are shared.

    Example:
      >>> readers_of({"lora_r": 8, "q_lora": True})
      {'LoraSpec.from_fastchat': 'q_lora'}
      >>> [*readers_of({"lora_r": 8})]
      ['LoraSpec.from_axolotl', 'LoraSpec.from_fastchat']
    """
    found = lambda names: next((name for name in names if config.get(name) is not None), None)
    alone = {reader: name for reader, tool in TOOLS.items() if (name := found(tool.alone))}
    return alone or {reader: name for reader, tool in TOOLS.items() if (name := found(tool.shared))}


def refuse_others(where: str, config: Mapping[str, Any]) -> None:
    """Refuses the settings of another of the tools: read here, they would be this one's defaults.

    Raises:
      ValueError: if there are names that the other alone has, and none that this one alone has.
    """
    found = readers_of(config)
    if found and where not in found:
        what = " or ".join(TOOLS[reader].what for reader in found)
        name = next(iter(found.values()))
        raise ValueError(f"{where}: this is {what}, since it has {name!r}; {' or '.join(found)} reads it")


def mapping(where: str, config: Any) -> dict[str, Any]:
    """The settings as a dict of their own.

    Raises:
      ValueError: if they are no mapping from names.
    """
    names = config if isinstance(config, Mapping) else ()
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in names):
        odd = next((f" with the key {name!r}" for name in names if not isinstance(name, str)), "")
        raise ValueError(
            f"{where}: expected a mapping from settings to values, such as json.load or yaml.safe_load returns, or the "
            f"path of their file, found {type(config).__name__}{odd}"
        )
    return dict(config)
