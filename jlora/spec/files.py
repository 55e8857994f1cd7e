"""Files of settings, read strictly: what two readers could take for two things is refused.

JSON is read here for all of jlora. YAML needs PyYAML, which is imported when a file of it is read.
"""

from __future__ import annotations

import collections
import enum
import json
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"  # in a directory of PEFT's
LIMIT, YAML_LIMIT, MAX_NODES = 16 << 20, 1 << 20, 200_000  # bytes; and values, with those that aliases stand for
YAML = (".yaml", ".yml")
EXPECTED = "a mapping of settings, or the path of their .json, .yaml or .yml file"


def settings_of(where: str, given: Any, config: str | None = None) -> tuple[Any, str]:
    """The settings that were given, and the path that they were read from; empty where they were no file's.

    Args:
      where: the function that was called, for messages.
      given: the settings, or the path of their file. What is neither is returned as it is.
      config: of a directory, the file that has the settings; with it one of PEFT's objects may be given too.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no file of settings that can be trusted.
      ImportError: if it is YAML, and PyYAML is not installed.
    """
    if config is not None and not isinstance(given, Mapping) and _is_object(given):
        return plain(given.to_dict()), ""
    if not isinstance(given, (str, os.PathLike)):
        return given, ""
    try:
        return read_settings(given, config), os.fspath(given)
    except (OSError, ValueError, ImportError) as error:
        raise type(error)(f"{where}: {error}") from None


def _is_object(given: Any) -> bool:
    """Whether it is a configuration of PEFT's, such as its ``LoraConfig``."""
    return hasattr(given, "peft_type") and callable(getattr(given, "to_dict", None))


def plain(value: Any) -> Any:
    """The same without enums and sets, as a file would have it.

    Example:
      >>> plain({"target_modules": {"v_proj", "q_proj"}, "layers": (1, 2)})
      {'target_modules': ['q_proj', 'v_proj'], 'layers': [1, 2]}
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {plain(name): plain(x) for name, x in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    return [plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def read_settings(path: str | os.PathLike[str], config: str | None = None) -> dict[Any, Any]:
    """The settings in a JSON or YAML file.

    Args:
      path: of the file, or where `config` is given of a directory that has one of that name.
      config: that name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is another kind of file, too long, invalid, no mapping, or has a name twice.
      ImportError: if it is YAML, and PyYAML is not installed.
    """
    text = os.fspath(path)
    told = text if len(text) <= 200 else f"{text[:200]}..."
    if os.path.isdir(text):
        if config is None or not os.path.isfile(os.path.join(text, config)):
            lacks = "expected a file of settings" if config is None else f"without {config}"
            raise FileNotFoundError(f"{told} is a directory, {lacks}")
        text = os.path.join(text, config)
    if not os.path.isfile(text):
        raise FileNotFoundError(f"there is no file {told!r}; expected {EXPECTED}")
    file = Path(text)
    if file.suffix.lower() == ".json":
        return read_json(file)
    if file.suffix.lower() in YAML:
        return read_yaml(file)
    raise ValueError(f"{told} is no .json, .yaml or .yml file; expected {EXPECTED}")


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
      ValueError: if it is too long, no JSON, no object, or has a key twice or a number that is not finite.
    """
    if path.stat().st_size > limit:
        raise ValueError(f"{path} is no JSON file that can be trusted: it has over {limit} bytes")
    return parsed(str(path), path.read_bytes())


def parsed(where: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text; `where` it is, for messages. Errors as of `read_json`."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number of JSON")

    try:
        data = json.loads(text, parse_constant=refuse, object_pairs_hook=lambda pairs: unique(where, pairs))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON file that can be trusted: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object, found {type(data).__name__}")
    return data


def unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object.

    Raises:
      ValueError: if a name is there twice.
    """
    found = dict(pairs)
    if twice := _twice(name for name, _ in pairs):
        raise ValueError(f"{where}: it has {twice} twice; such a file means different things to different readers")
    return found


def _twice(names: Iterable[Hashable]) -> list[Any]:
    return [name for name, count in collections.Counter(names).items() if count > 1][:3]


def read_yaml(path: Path) -> dict[Any, Any]:
    """Reads a YAML file that holds one mapping, and makes no objects but plain data.

    Raises:
      ValueError: if it is too long, no YAML, no mapping, or has a key twice or aliases that stand for too much.
      ImportError: if PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{path} is YAML, and PyYAML is not installed: pip install pyyaml") from None
    if path.stat().st_size > YAML_LIMIT:
        raise ValueError(f"{path} is no YAML file that can be trusted: it has over {YAML_LIMIT} bytes")
    loader = None
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        node = loader.get_single_node()
        _check_nodes(node, {})
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", in line {error.problem_mark.line + 1}"
        told = error.problem or error.context
        raise ValueError(f"{path} is no YAML file that can be trusted: {told}{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} is no YAML file that can be trusted: {told}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of settings, found {type(data).__name__}")
    return data


def _check_nodes(node: Any, sizes: dict[int, int]) -> int:
    """How many values a node of YAML stands for, all that its aliases repeat counted again.

    Args:
      node: of PyYAML.
      sizes: of the nodes that were seen, by `id`; 0 while one is looked into.

    Raises:
      ValueError: if a name is there twice, an alias is within what it stands for, or there is too much.
    """
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"an alias in line {node.start_mark.line + 1} stands for what it is in")
        return sizes[id(node)]
    sizes[id(node)] = 0
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    keys = [(key.tag, key.value) for key, _ in pairs if isinstance(key.value, str)]
    if twice := _twice(key for key in keys if not key[0].endswith(":merge")):
        names = [name for _, name in twice]
        raise ValueError(
            f"it has {names} twice in the mapping of line {node.start_mark.line + 1}; such a file means different "
            "things to different readers"
        )
    parts = [part for pair in pairs for part in pair] if pairs else node.value
    sizes[id(node)] = size = 1 + sum(_check_nodes(part, sizes) for part in parts)
    if size > MAX_NODES:
        raise ValueError(f"it stands for over {MAX_NODES} values, by its aliases")
    return size
