"""Settings from files and from PEFT's objects: what is read, and what is refused with the file's name."""

import dataclasses
import enum
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora import LoraSpec
from jlora.peft.tensors import read_json
from jlora.spec import files

SETTINGS = {
    "from_peft": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]},
    "from_axolotl": {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "bf16": True},
    "from_llamafactory": {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj"},
    "from_fastchat": {"lora_r": 4, "q_lora": True},
}
BUILD = {name: getattr(LoraSpec, name) for name in SETTINGS}


def as_yaml(settings):
    return "# of a run\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a file in the working folder."""
    monkeypatch.chdir(tmp_path)
    return lambda name, text: Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["run.json", "run.yaml", "run.YML"])
@pytest.mark.parametrize("build", SETTINGS)
def test_a_file_is_read_as_its_settings(build, name, kind, write):
    settings = SETTINGS[build]
    write(name, json.dumps(settings) if name.endswith("json") else as_yaml(settings))
    assert BUILD[build](kind(name)) == BUILD[build](settings)


def test_a_directory_of_pefts_is_read_as_its_adapter_config(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS["from_peft"]))
    for path in (tmp_path, tmp_path / "adapter_config.json", str(tmp_path)):
        assert LoraSpec.from_peft(path) == LoraSpec.from_peft(SETTINGS["from_peft"])


def test_aliases_and_merged_mappings_of_yaml(write):
    write(
        "run.yaml", "x: &x {lora_r: 4, lora_alpha: 2}\ny: &y {<<: *x, lora_alpha: 8}\n<<: *y\nlora_r: 6\nq_lora: true"
    )
    spec = LoraSpec.from_fastchat("run.yaml")
    assert (spec.rank, spec.alpha) == (6, 8)


NO_FILES = {
    "missing": ("nowhere.json", None, FileNotFoundError, "there is no file 'nowhere.json'; expected a mapping of"),
    "empty name": ("", None, FileNotFoundError, "there is no file ''"),
    "a text": ('{"r": 8}' + " " * 5000, None, FileNotFoundError, "there is no file"),
    "a zero": ("a\0.json", None, FileNotFoundError, "there is no file"),
    "other kind": ("run.toml", "r = 8", ValueError, "run.toml is no .json, .yaml or .yml file"),
    "no kind": ("run", "{}", ValueError, "run is no .json, .yaml or .yml file"),
    "list": ("run.json", "[1]", ValueError, "run.json must hold a JSON object, found list"),
    "no json": ("run.json", "{", ValueError, "run.json is no JSON file that can be trusted"),
    "no text": ("run.json", b"\xff\xfe\x00{", ValueError, "run.json is no JSON file that can be trusted"),
    "twice": ("run.json", '{"r": 2, "r": 3}', ValueError, "run.json: it has ['r'] twice"),
    "twice below": ("run.json", '{"rank_pattern": {"q": 2, "q": 3}}', ValueError, "it has ['q'] twice"),
    "no number": ("run.json", '{"r": NaN}', ValueError, "run.json is no JSON file that can be trusted: NaN"),
    "deep": ("run.json", '{"a":' * 100_000, ValueError, "run.json is no JSON file that can be trusted"),
    "yaml of a list": ("run.yaml", "- r: 8", ValueError, "run.yaml must hold a mapping of settings, found list"),
    "yaml of nothing": ("run.yaml", "# none", ValueError, "run.yaml must hold a mapping of settings, found NoneType"),
    "no yaml": ("run.yaml", "r: 8\na: [1", ValueError, "run.yaml is no YAML file that can be trusted: expected ',' or"),
    "no text of yaml": ("run.yaml", b"r: \xff", ValueError, "run.yaml is no YAML file that can be trusted"),
    "several": ("run.yaml", "r: 8\n---\nr: 9", ValueError, "run.yaml is no YAML file that can be trusted"),
    "yaml twice": ("run.yaml", 'r: 8\n"r": 9', ValueError, "trusted: it has ['r'] twice in the mapping of line 1"),
    "yaml twice below": ("run.yml", "r: 8\na:\n  b: 1\n  b: 2", ValueError, "['b'] twice in the mapping of line 3"),
    "an object": ("run.yaml", "r: !!python/object/apply:os.getcwd []", ValueError, "could not determine a constructor"),
    "a circle": ("run.yaml", "r: &a [*a]", ValueError, "an alias in line 1 stands for what it is in"),
    "deep yaml": ("run.yaml", "r: " + "[" * 5000, ValueError, "run.yaml is no YAML file that can be trusted"),
    "no date": ("run.yaml", "r: 2001-99-99", ValueError, "run.yaml is no YAML file that can be trusted"),
    "other names": ("run.yaml", "1: 2", ValueError, "found dict with the key 1 (in run.yaml)"),
    "a setting": ("run.yaml", "r: 8\npeft_type: XLORA", ValueError, "peft_type='XLORA' can't be honoured: "),
}  # fmt: skip


@pytest.mark.parametrize("name, text, error, message", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_of_settings_is_refused_by_name(name, text, error, message, write):
    if text is not None:
        write(name, text)
    with pytest.raises(error, match=re.escape(message)) as raised:
        LoraSpec.from_peft(name)
    assert str(raised.value).startswith("LoraSpec.from_peft: ") and "\n" not in str(raised.value)
    assert name[:60] in str(raised.value) or "\0" in name or text is None


@pytest.mark.parametrize("build", SETTINGS)
def test_each_reader_names_the_file(build, write):
    with pytest.raises(FileNotFoundError, match=f"LoraSpec.{build}: there is no file 'run.yaml'"):
        BUILD[build]("run.yaml")
    write("run.yaml", "a: 1\na: 2")
    with pytest.raises(ValueError, match=f"LoraSpec.{build}: run.yaml is no YAML file that can be trusted"):
        BUILD[build](Path("run.yaml"))
    other = next(name for name in SETTINGS if name != build)
    write("run.json", json.dumps(SETTINGS[other]))
    with pytest.raises(ValueError, match=rf"LoraSpec.{build}: this is .*; LoraSpec.{other} reads it \(in run.json\)"):
        BUILD[build]("run.json")


@pytest.mark.parametrize("build", SETTINGS)
def test_a_directory_without_settings_is_refused(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="is a directory, "):
        BUILD[build](tmp_path)


def test_long_files_are_not_read(write, monkeypatch):
    monkeypatch.setattr(files, "YAML_LIMIT", 100)
    write("run.yaml", "r: 8\n" + "#" * 100)
    with pytest.raises(ValueError, match="it has over 100 bytes"):
        LoraSpec.from_peft("run.yaml")


def test_aliases_that_stand_for_too_much_are_refused(write):
    """A page of text, of which a billion values would be made."""
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    write("run.yaml", "\n".join(["a0: &a0 [x, x]", *levels]))
    with pytest.raises(ValueError, match="it stands for over 200000 values, by its aliases"):
        LoraSpec.from_peft("run.yaml")


def test_pyyaml_is_needed_for_yaml_alone(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    write("run.json", json.dumps(SETTINGS["from_peft"]))
    write("run.yaml", "r: 8")
    assert LoraSpec.from_peft("run.json").rank == 4
    with pytest.raises(ImportError, match=r"run.yaml is YAML, and PyYAML is not installed: pip install pyyaml"):
        LoraSpec.from_peft("run.yaml")


def test_adapters_settings_are_read_by_the_same_reader():
    assert read_json is files.read_json


# -------------------------------------------------------------------------------- PEFT's objects


class PeftType(enum.StrEnum):
    LORA = "LORA"
    LOHA = "LOHA"


class TaskType(enum.Enum):
    SEQ_CLS = "SEQ_CLS"


@dataclasses.dataclass
class Config:
    """As PEFT's: settings by name, with a method that gives them as a dict."""

    r: int = 4
    lora_alpha: int = 8
    target_modules: object = frozenset({"v_proj", "q_proj"})
    task_type: object = TaskType.SEQ_CLS
    peft_type: object = PeftType.LORA
    layers_to_transform: object = (0, 2)
    rank_pattern: dict = dataclasses.field(default_factory=lambda: {"q_proj": 2})
    runtime_config: object = None

    def to_dict(self):
        return dataclasses.asdict(self)


def test_a_configuration_of_pefts_is_its_settings():
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS",
                "layers_to_transform": [0, 2], "rank_pattern": {"q_proj": 2}}  # fmt: skip
    assert LoraSpec.from_peft(Config()) == LoraSpec.from_peft(settings)
    given = SimpleNamespace(peft_type=PeftType.LOHA, to_dict=lambda: {"peft_type": PeftType.LOHA, "r": 3, "alpha": 5,
                                                                      "target_modules": {"q_proj"}})  # fmt: skip
    assert LoraSpec.from_peft(given).variant == "loha"


def test_a_configuration_of_pefts_that_cant_be_honoured():
    with pytest.raises(ValueError, match=r"task_type={'a': 1} can't be honoured"):
        LoraSpec.from_peft(Config(target_modules=None, task_type={"a": 1}))
    with pytest.raises(ValueError, match="target_modules=None can't be honoured"):
        LoraSpec.from_peft(Config(target_modules=None))


@pytest.mark.parametrize("build", [*SETTINGS][1:])
def test_other_readers_take_no_object_of_pefts(build):
    with pytest.raises(ValueError, match=r"expected a mapping from settings to values.*, found Config"):
        BUILD[build](Config())
