"""What people have is read: settings of adapters in public repositories, as ``accepted.json`` lists them.

They are of the examples of Axolotl and of LLaMA-Factory, flat and v1, and of files named ``adapter_config.json`` that
PEFT 0.2 to 0.21 wrote or reads; beside each is the number of files that have it. Of these files only the adapter's own
settings are there, without names of models and paths.
"""

import collections
import json
import pathlib

import pytest

from jlora import LoraSpec
from jlora.targets.patterns import matcher

FOUND = json.loads(pathlib.Path(__file__).with_name("accepted.json").read_text())
READERS = {
    "axolotl": LoraSpec.from_axolotl,
    "llamafactory": LoraSpec.from_llamafactory,
    "llamafactory_v1": LoraSpec.from_llamafactory,
    "peft": LoraSpec.from_peft,
}
# How many files are read; and how many are refused, by what the reason begins with
ACCEPTED = {"axolotl": 186, "llamafactory": 37, "llamafactory_v1": 5, "peft": 39}
REFUSED = {
    "axolotl": {
        "unfrozen_parameters=['^model": 3,  # what trains beside the adapter, by regular expressions of its own
        "relora=True can't be honoured: it merges and starts again while it trains": 1,
        "peft={'loftq_config': {'loftq_bits': 4}} can't be honoured": 1,
    },
    "llamafactory": {"adapter_name_or_path='saved' can't be honoured": 1},  # to predict with
    "llamafactory_v1": {"peft_config.adapter_name_or_path='saved' can't be honoured": 1},  # to export
    "peft": {
        "target_modules=None can't be honoured: PEFT's tables by architecture are not here": 4,  # not from an adapter
        "r=32 can't be honoured: the size of a block is set, not their number": 1,
        "knows no setting 'use_khatri_rao' (found True)": 1,
        "peft_type='PREFIX_TUNING' can't be honoured": 1,
    },
}


def read(tool):
    """The settings that are accepted with their specs and numbers of files; and the reasons for the others."""
    accepted, reasons = [], collections.Counter()
    for files, config in FOUND[tool]:
        try:
            accepted.append((files, config, READERS[tool](config)))
        except ValueError as error:
            reasons[str(error).removeprefix(f"LoraSpec.{READERS[tool].__name__}").lstrip(": ")] += files
    return accepted, reasons


@pytest.mark.parametrize("tool", READERS)
def test_what_is_accepted_and_what_is_refused(tool):
    accepted, reasons = read(tool)
    assert sum(files for files, _, _ in accepted) == ACCEPTED[tool]
    refused = collections.Counter()
    for reason, files in reasons.items():
        refused[next((start for start in REFUSED[tool] if reason.startswith(start)), reason)] += files
    assert refused == REFUSED[tool]


# -------------------------------------------------------------------------------- no setting is silently a default


def axolotl(config):
    """Rank, alpha, dropout, variant, scaling; whether all linear layers, what else by name; whether more trains."""
    numbers = config["lora_r"], config["lora_alpha"], config.get("lora_dropout") or 0
    names, is_all = config.get("lora_target_modules"), config.get("lora_target_linear") is True
    leaves = config.get("lora_target_parameters")
    kind = "lora", "rslora" if config.get("peft_use_rslora") else "alpha/r"
    return *numbers, *kind, is_all, names, leaves, bool(config.get("lora_modules_to_save"))


def llamafactory(config):
    if config["finetuning_type"] == "oft":
        return LoraSpec().rank, LoraSpec().alpha, 0, "oft", "alpha/r", config["oft_target"] == "all", None, None, False
    rank, names = config.get("lora_rank", 8), [name.strip() for name in config["lora_target"].split(",")]
    numbers = rank, config.get("lora_alpha", 2 * rank), config.get("lora_dropout", 0)
    return *numbers, "lora", "alpha/r", names == ["all"], None if names == ["all"] else names, None, False


def llamafactory_v1(config):
    given = config["peft_config"]
    numbers = given["r"], given["lora_alpha"], given["lora_dropout"]
    return *numbers, "lora", "alpha/r", given["target_modules"] == "all", None, None, False


def peft(config):
    numbers = {
        "LORA": lambda: (config["r"], config["lora_alpha"], config["lora_dropout"]),
        "LOHA": lambda: (config["r"], config["alpha"], 0),
        "LOKR": lambda: (config["r"], config["alpha"], 0),
        "IA3": lambda: (LoraSpec().rank, LoraSpec().alpha, 0),
    }[config["peft_type"]]()
    names = config["target_modules"]
    kind = config["peft_type"].lower(), "rslora" if config.get("use_rslora") else "alpha/r"
    is_all, is_saved = names == "all-linear", bool(config["modules_to_save"])
    return *numbers, *kind, is_all, None if is_all else names, None, is_saved


TOLD = {"axolotl": axolotl, "llamafactory": llamafactory, "llamafactory_v1": llamafactory_v1, "peft": peft}


@pytest.mark.parametrize("tool", READERS)
def test_what_is_accepted_says_what_the_settings_say(tool):
    for _, config, spec in read(tool)[0]:
        rank, alpha, dropout, variant, scaling, is_all, names, leaves, is_saved = TOLD[tool](config)
        assert (spec.rank, spec.alpha, spec.dropout) == (rank, alpha, dropout), config
        assert (spec.variant, spec.scaling, spec.init) == (variant, scaling, "kaiming") or "pissa_init" in config, (
            config
        )
        targets = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
        assert ("all-linear" in targets) == is_all and bool(spec.train) == is_saved, config
        named = [matcher(target) for target in targets if target != "all-linear"]
        assert bool(named) == (bool(names) or bool(leaves)), config
        if isinstance(names, list):
            paths = [f"model/{name.replace('.', '/')}/kernel" for name in names]
            assert all(any(is_target(path) for is_target in named) for path in paths), config
        for leaf in leaves or ():
            assert any(is_target(f"model/{leaf.replace('.', '/')}") for is_target in named), config
        assert not any(is_target("model/nowhere/kernel") for is_target in named), config


def test_pissa_and_the_size_of_blocks_are_those_that_are_set():
    specs = [(config, spec) for _, config, spec in read("llamafactory")[0]]
    assert [spec.init for config, spec in specs if "pissa_init" in config] == ["pissa_niter_16"]
    assert [spec.options for config, spec in specs if "oft_block_size" in config] == [
        {"block_size": 32, "cayley": "neumann", "terms": 5}
    ]


def test_towers_that_are_frozen_are_left_out():
    specs = [(config, spec) for _, config, spec in read("axolotl")[0] if config.get("freeze_mm_modules")]
    assert specs
    for _, spec in specs:
        assert any(matcher(pattern)("model/vision_tower/layers/0/q_proj/kernel") for pattern in spec.exclude)


@pytest.mark.parametrize("tool", READERS)
def test_what_is_accepted_round_trips(tool):
    for _, config, spec in read(tool)[0]:
        assert LoraSpec.from_dict(spec.to_dict()) == spec, config
        assert LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec, config
