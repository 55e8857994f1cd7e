"""The card beside an adapter, its task and its base's name."""

import json

import jax.numpy as jnp
import pytest
import yaml

import jlora
from jlora.cli import main
from jlora.peft import card, files
from tests.peft_files.trees import adapted, lora, nested, noise

STATE = {f"layers.{i}.{p}.weight": noise(6, 6) for i in range(2) for p in ("q_proj", "v_proj")}
TREE = nested({name: lora(x, rank=2, scale=2.0) for name, x in STATE.items()})


def saved(directory, tree=TREE, **settings):
    """The card's metadata, its text, and the settings beside."""
    jlora.peft.save(directory, tree, **settings)
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text, json.loads((directory / "adapter_config.json").read_text())


def test_the_card_tells_settings_and_how_to_load(tmp_path):
    front, text, settings = saved(tmp_path, base_model="me/model", task_type="CAUSAL_LM")
    assert front == {
        "base_model": "me/model", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:me/model", "lora"],
    }  # fmt: skip
    assert (settings["task_type"], settings["base_model_name_or_path"]) == ("CAUSAL_LM", "me/model")
    assert "# LoRA adapter of [me/model]" in text and "Rank: 2\n- Alpha: 4\n" in text
    assert "Targets: `q_proj`, `v_proj`" in text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/model"), "ADAPTER")' in text
    assert "vllm serve me/model --enable-lora --max-lora-rank 8 --lora-modules name=ADAPTER" in text
    assert 'jlora.peft.load("ADAPTER", params)' in text and "jlora merge me/model ADAPTER OUT" in text


@pytest.mark.parametrize("task", card.TASKS)
def test_each_task_of_pefts(task, tmp_path):
    front, text, settings = saved(tmp_path, task_type=task)
    assert settings["task_type"] == task and front.get("pipeline_tag") == card.TASKS[task].pipeline
    assert f"import {card.TASKS[task].model}\n" in text


@pytest.mark.parametrize("task", ["CAUSAL", "causal_lm", "", 3, True])
def test_what_is_no_task_of_pefts_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match=r"task_type must be one of PEFT's, CAUSAL_LM, .*, or None, found"):
        jlora.peft.save(tmp_path / "adapter", TREE, task_type=task)
    assert not (tmp_path / "adapter").exists()


def test_the_tasks_are_pefts():
    peft = pytest.importorskip("peft")
    assert {*card.TASKS} == {task.value for task in peft.TaskType}
    assert card.checked_task(peft.TaskType.SEQ_CLS) == "SEQ_CLS"


@pytest.mark.parametrize(
    "base", [None, "/home/me/model", "../model", "model\n---\nlicense: mit", "a`b", "x: y", "<script>", "C:\\model"]
)
def test_what_is_no_name_of_the_hub_stays_out_of_the_card(base, tmp_path):
    front, text, settings = saved(tmp_path, base_model=base)
    assert front == {"library_name": "peft", "tags": ["lora"]} and settings["base_model_name_or_path"] == base
    assert base is None or base not in text
    assert "`BASE` the model that it was trained on" in text and "# LoRA adapter\n" in text


@pytest.mark.parametrize("base", ["gpt2", "me/123", "1/2", "null", "yes", "1.5"])
def test_names_are_text_in_the_metadata(base, tmp_path):
    assert saved(tmp_path, base_model=base)[0]["base_model"] == base


def test_what_vllm_does_not_take_is_served_merged(tmp_path):
    spec = jlora.LoraSpec(targets="q_proj", rank=2, variant="dora", axes={"q_proj": jlora.Axes(1, 0)})
    _, text, _ = saved(tmp_path / "dora", jlora.wrap(nested(STATE), spec), base_model="me/model")
    assert "# DoRA adapter" in text and "--enable-lora" not in text
    assert "jlora merge me/model ADAPTER OUT && vllm serve OUT" in text
    ranks = nested({name: lora(x, rank=rank) for rank, (name, x) in enumerate(STATE.items(), 1)})
    _, text, settings = saved(tmp_path / "ranks", ranks)
    assert settings["rank_pattern"] and "of some modules" in text and "--enable-lora" not in text
    _, text, _ = saved(tmp_path / "portable", ranks, portable=True)
    assert "--max-lora-rank 8" in text


def test_all_that_an_adapter_has_is_told(tmp_path):
    tree = adapted({"experts.down_proj": noise(2, 4, 6), "embed_tokens.weight": noise(8, 4), "q.weight": noise(4, 4)})
    tree["norm"] = {"weight": jlora.TrainableParam(jnp.ones(4))}
    _, text, _ = saved(tmp_path, tree)
    assert "Target parameters: `experts.down_proj`" in text and "Trained in full: `norm`" in text


def test_many_targets_are_cut(tmp_path):
    names = [f"module_{i}" for i in range(100)]
    _, text, _ = saved(tmp_path, nested({f"{name}.weight": lora(noise(2, 2), rank=1) for name in names}))
    assert "and 76 more" in text and max(map(len, text.splitlines())) < 600


def test_a_card_follows_its_adapter(tmp_path):
    saved(tmp_path)
    front, text, _ = saved(tmp_path, nested({n: lora(x, rank=3) for n, x in STATE.items()}), base_model="me/model")
    assert front["base_model"] == "me/model" and "Rank: 3" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


@pytest.mark.parametrize("text", ["", "mine", "---\nlibrary_name: peft\n---\nmine\n", "\xff\x00"])
def test_a_card_of_others_is_left(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    jlora.peft.save(tmp_path, TREE)
    assert (tmp_path / "README.md").read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("edit", [("Rank: 2", "Rank: 3"), ("# LoRA", "My results.\n\n# LoRA"), ("-->\n", "-->\nmore")])
def test_a_card_that_was_edited_is_left(edit, tmp_path):
    jlora.peft.save(tmp_path, TREE)
    edited = (tmp_path / "README.md").read_text().replace(*edit)
    (tmp_path / "README.md").write_text(edited)
    jlora.peft.save(tmp_path, TREE, base_model="me/model")
    assert (tmp_path / "README.md").read_text() == edited


def test_no_link_is_followed_and_no_directory_is_replaced(tmp_path):
    jlora.peft.save(tmp_path / "first", TREE)
    for name, make in (("link", lambda at: at.symlink_to(tmp_path / "first" / "README.md")),
                       ("broken", lambda at: at.symlink_to("nowhere")), ("folder", lambda at: at.mkdir())):  # fmt: skip
        (tmp_path / name).mkdir()
        make(tmp_path / name / "README.md")
        jlora.peft.save(tmp_path / name, TREE, base_model="me/model")
    assert (tmp_path / "link" / "README.md").is_symlink() and (tmp_path / "folder" / "README.md").is_dir()
    assert "me/model" not in (tmp_path / "first" / "README.md").read_text()


def test_a_card_that_can_not_be_written_leaves_a_whole_adapter(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr(card, "write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jlora.peft.save(tmp_path, TREE, base_model="me/model")
    jlora.peft.load(tmp_path, nested(STATE))
    assert card.is_own(tmp_path / "README.md") and not list(tmp_path.glob(".*"))


def test_a_write_that_fails_leaves_the_card_before(tmp_path, monkeypatch):
    jlora.peft.save(tmp_path, TREE)
    before = (tmp_path / "README.md").read_bytes()
    monkeypatch.setattr(files, "flush", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        card.write_card(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()))
    assert (tmp_path / "README.md").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_convert_keeps_the_task_and_the_base(tmp_path, capsys):
    saved(tmp_path / "adapter", task_type="SEQ_CLS", base_model="me/model")
    source, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    told = lambda: json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for to in ("peft", "portable"):
        assert main(["convert", source, out, "--to", to, "--force"]) == 0
        assert (told()["task_type"], told()["base_model_name_or_path"]) == ("SEQ_CLS", "me/model")
        assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    assert main(["convert", source, out, "--to", "peft", "--force", "--task-type", "CAUSAL_LM"]) == 0
    assert told()["task_type"] == "CAUSAL_LM"
    assert main(["convert", source, str(tmp_path / "o"), "--to", "orbax", "--task-type", "CAUSAL_LM"]) == 2
    assert "--task-type is for PEFT's settings" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["CAUSAL", 7, ["CAUSAL_LM"]])
def test_convert_refuses_a_task_that_peft_has_not(task, tmp_path, capsys):
    saved(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task}))
    command = ["convert", str(path.parent), str(tmp_path / "out"), "--to", "peft"]
    assert main(command) == 2
    assert "task_type must be one of PEFT's" in (told := capsys.readouterr().err) and "--task-type" in told
    assert not (tmp_path / "out").exists()
    assert main([*command, "--task-type", "CAUSAL_LM"]) == 0
