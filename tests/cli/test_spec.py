"""``jlora spec``: what other tools' files mean, as Python, and what in them is no adapter's."""

import json
import sys

import pytest

from jlora import LoraSpec
from jlora.cli import main
from jlora.spec.source import source
from tests.spec.test_acceptance import FOUND, READERS

FILES = {
    "axolotl": {"adapter": "qlora", "base_model": "m", "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True,
                "load_in_4bit": True, "learning_rate": 2e-4, "lora_mlp_kernel": True, "wandb_project": None},
    "llamafactory": {"finetuning_type": "lora", "lora_rank": 8, "pissa_init": True, "quantization_bit": 4,
                     "model_name_or_path": "m", "stage": "sft", "pissa_convert": True},
    "v1": {"model": "m", "peft_config": {"name": "lora", "r": 16, "export_dir": "out"}, "quant_config": {"name": "bnb"},
           "bf16": True},
    "fastchat": {"lora_r": 4, "lora_bias": "all", "q_lora": True, "model_name_or_path": "m", "model_max_length": 512,
                 "data_path": "d", "flash_attn": False},
    "peft": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"], "rank_pattern": {"a": 2},
             "trainable_token_indices": [1], "base_model_name_or_path": "m", "inference_mode": True},
    "adalora": {"peft_type": "ADALORA", "target_modules": "all-linear", "total_step": 9, "peft_version": "0.21.2"},
}  # fmt: skip
TOLD = {
    "axolotl": ["# the trainer's: learning_rate, lora_mlp_kernel, wandb_project",
                "# the base's: base_model, load_in_4bit"],
    "llamafactory": ["# the trainer's: pissa_convert, stage", "# the base's: model_name_or_path, quantization_bit"],
    "v1": ["# the trainer's: bf16, peft_config.export_dir", "# the base's: model, quant_config"],
    "fastchat": ["# the trainer's: data_path, flash_attn, model_max_length",
                 "# the base's: model_name_or_path, q_lora"],
    "peft": ["# the base's: base_model_name_or_path", "# PEFT's own: inference_mode"],
    "adalora": ["# the trainer's: total_step", "# PEFT's own: peft_version"],
}  # fmt: skip
BUILD = READERS | {"v1": LoraSpec.from_llamafactory, "adalora": LoraSpec.from_peft, "fastchat": LoraSpec.from_fastchat}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys, *arguments):
    code, (out, err) = main(["spec", *arguments]), capsys.readouterr()
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_printed_evaluates_to_the_spec_and_tells_what_is_no_adapters(name, suffix, home, capsys):
    (home / f"run.{suffix}").write_text(json.dumps(FILES[name], indent=1))
    text = printed(capsys, f"run.{suffix}")
    assert eval(text, {"LoraSpec": LoraSpec}) == BUILD[name](FILES[name])
    _, _, after = text.partition("\n)\n")
    assert after.splitlines() == TOLD[name]


def test_only_what_differs_from_the_defaults_is_printed(home, capsys):
    (home / "run.json").write_text(json.dumps(FILES["axolotl"]))
    lines = printed(capsys, "run.json").splitlines()
    assert lines[:4] == ["# run.json: a configuration of Axolotl's", "LoraSpec(", "    rank=32,", ")"]
    assert source(LoraSpec()) == "LoraSpec()"


def test_a_directory_of_an_adapter(home, capsys):
    (home / "adapter").mkdir()
    (home / "adapter/adapter_config.json").write_text(json.dumps(FILES["peft"]))
    assert eval(printed(capsys, "adapter"), {"LoraSpec": LoraSpec}) == LoraSpec.from_peft(FILES["peft"])


@pytest.mark.parametrize("tool", READERS)
def test_public_settings_that_are_read_are_told_and_round_trip(tool):
    """Those of public repositories; what tells the tool of a whole file tells that of its adapter's settings."""
    from jlora.cli.spec import reader_of

    for _, config in FOUND[tool]:
        try:
            spec = READERS[tool](config)
        except ValueError:
            continue
        assert reader_of(config) == f"LoraSpec.{READERS[tool].__name__}", config
        assert eval(source(spec), {"LoraSpec": LoraSpec}) == spec, config


def test_names_of_two_tools_are_read_as_the_one_that_is_named(home, capsys):
    (home / "run.json").write_text(json.dumps({"lora_r": 4, "lora_alpha": 8}))
    assert main(["spec", "run.json"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "jlora spec: run.json: its names are those of several tools: axolotl (by 'lora_r'), fastchat"
    )
    assert "--tool" in told
    assert "FastChat's" in printed(capsys, "run.json", "--tool", "fastchat")


REFUSED = {
    "missing": (["nowhere.yaml"], "there is no file 'nowhere.yaml'"),
    "folder": (["."], ". is a directory, without adapter_config.json"),
    "nothing": (["none.json"], "none.json: no name in it tells whose settings they are"),
    "mixed": (["mixed.json"], "several tools: llamafactory (by 'lora_rank'), axolotl (by 'adapter')"),
    "no names": (["numbers.yaml"], "numbers.yaml: no name in it tells"),
    "other tool": (["peft.json", "--tool", "axolotl"], "peft.json: LoraSpec.from_axolotl: this is an adapter_config"),
    "setting": (["bad.json"], "bad.json: LoraSpec.from_axolotl: lora_alpha=None can't be honoured"),
    "twice": (["twice.yaml"], "twice.yaml is no YAML file that can be trusted: it has ['r'] twice"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_cant_be_read_is_one_line_and_code_2(arguments, message, home, capsys):
    texts = {"none.json": {"learning_rate": 1}, "mixed.json": {"adapter": "lora", "lora_rank": 4, "lora_r": 4},
             "peft.json": FILES["peft"], "bad.json": {"adapter": "lora", "lora_r": 4}}  # fmt: skip
    for name, settings in texts.items():
        (home / name).write_text(json.dumps(settings))
    (home / "twice.yaml").write_text("r: 1\nr: 2")
    (home / "numbers.yaml").write_text("1: 2")
    assert main(["spec", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("jlora spec: ") and err.count("\n") == 1 and not out


def test_without_pyyaml_it_says_what_to_install(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (home / "run.yaml").write_text("r: 1")
    assert main(["spec", "run.yaml"]) == 2
    assert capsys.readouterr().err == (
        "jlora spec: run.yaml is YAML, and PyYAML is not installed: pip install pyyaml\n"
    )
