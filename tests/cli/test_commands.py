"""The command line, from arguments to files, text and exit codes."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.cli import main, parser
from jlora.cli import merge as merge_command
from jlora.peft.tensors import TensorFile
from tests.optim.support import noisy

AXES = {"q_proj": jlora.Axes(1, 0), "up_proj": jlora.Axes(1, 0)}
SPECS = {"lora": {"rank": 4}, "dora": {"rank": 2, "variant": "dora"}, "some": {"rank": 2, "layers": [0, 2]}}


@functools.cache
def model():
    rng = np.random.default_rng(0)
    linear = lambda out, ins: {"weight": rng.normal(size=(out, ins)).astype(np.float32)}
    layer = lambda: {
        "attn": {"q_proj": linear(8, 8)},
        "mlp": {"up_proj": linear(12, 8)},
        "norm": {"weight": np.ones(8, np.float32)},
    }
    layers = {str(i): layer() for i in range(3)}
    return jax.device_put({"model": {"embed_tokens": linear(20, 8), "layers": layers}, "lm_head": linear(20, 8)})


@functools.cache
def adapted(name):
    return noisy(model(), jlora.LoraSpec(targets=["q_proj", "up_proj"], axes=AXES, **SPECS[name]))


@functools.cache
def merged(name):
    return jax.device_get(jax.jit(jlora.merge)(adapted(name)))


def assert_merged(name):
    """What was written to "out" is what the library merges."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), jlora.peft.from_safetensors("out"), merged(name)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a model of several files and adapters of both kinds."""
    folder = tmp_path_factory.mktemp("written")
    jlora.peft.to_safetensors(model(), folder / "base", shard_bytes=1500)
    (folder / "base" / "config.json").write_text("{}")
    (folder / "base" / "pytorch_model.bin").write_text("not copied")
    for name in SPECS:
        jlora.peft.save(folder / name, adapted(name), base_model="me/tiny")
    jlora.checkpoint.save(folder / "orbax", adapted("lora"))
    return folder


@pytest.fixture
def home(written, tmp_path, monkeypatch):
    """A copy of it, as the working folder."""
    home = shutil.copytree(written, tmp_path / "home")
    monkeypatch.chdir(home)
    return home


def test_inspect_tells_targets_ranks_and_size(home, capsys):
    assert main(["inspect", "lora"]) == 0
    text = capsys.readouterr().out
    assert "me/tiny" in text and "attn.q_proj" in text and "8 -> 12" in text and "portable         yes" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert main(["inspect", "dora"]) == 0
    assert "DoRA" in capsys.readouterr().out


def test_inspect_as_json_has_each_module(home, capsys):
    assert main(["inspect", "lora", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    node = adapted("lora")["model"]["layers"]["1"]["mlp"]["up_proj"]["weight"]
    module = next(m for m in told["modules"] if m["name"] == "model.layers.1.mlp.up_proj")
    assert (module["shape"], module["rank"], module["scale"]) == ([8, 12], 4, 4.0)
    np.testing.assert_allclose(module["norm"], np.linalg.norm(4 * np.asarray(node.lora_a) @ node.lora_b), rtol=1e-5)
    assert told["parameters"] == sum(m["parameters"] for m in told["modules"]) == 3 * 4 * (16 + 20)


def test_inspect_reads_an_orbax_adapter_of_any_variant(home, capsys):
    assert main(["inspect", "orbax"]) == 0
    assert "attn.q_proj" in capsys.readouterr().out
    kernel = {"dense": {"kernel": np.eye(8, dtype=np.float32)}}
    jlora.checkpoint.save("ia3", noisy(kernel, jlora.LoraSpec(variant="ia3")))
    assert main(["inspect", "ia3"]) == 0
    assert "Ia3Param" in capsys.readouterr().out


def test_inspect_finds_values_that_are_not_finite(home, capsys):
    trainable, frozen = jlora.partition(adapted("lora"))
    broken = jlora.combine(jax.tree.map(lambda x: np.full_like(x, np.nan), trainable), frozen)
    jlora.peft.save("broken", broken, allow_nonfinite=True)
    assert main(["inspect", "broken"]) == 1
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize("name", SPECS)
def test_merge_is_that_of_the_library(home, name, capsys):
    assert main(["merge", "base", name, "out"]) == 0
    assert_merged(name)
    assert (home / "out" / "config.json").exists() and not (home / "out" / "pytorch_model.bin").exists()
    assert not list(home.glob("out.*"))


def test_merge_casts_what_it_merges(home):
    assert main(["merge", "base", "lora", "out", "--dtype", "bfloat16"]) == 0
    merged = jlora.peft.from_safetensors("out")
    assert merged["lm_head"]["weight"].dtype == jnp.float32
    assert merged["model"]["layers"]["0"]["attn"]["q_proj"]["weight"].dtype == jnp.bfloat16


def test_merge_goes_on_where_it_was_interrupted(home, monkeypatch, capsys):
    written, last = [], [2]
    real = merge_command.write_tensors

    def write(path, *rest):
        if len(written) == last[0]:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *rest)

    monkeypatch.setattr(merge_command, "write_tensors", write)
    assert main(["merge", "base", "lora", "out"]) == 130
    assert not (home / "out").exists() and (home / "out.partial").is_dir()
    last[0] = None
    assert main(["merge", "base", "lora", "out"]) == 0
    assert len(written) == len({*written}) == len(list((home / "base").glob("*.safetensors")))
    assert_merged("lora")


def test_a_merge_of_another_adapter_starts_anew(home, monkeypatch):
    real = merge_command._finish
    monkeypatch.setattr(merge_command, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["merge", "base", "lora", "out"])
    monkeypatch.setattr(merge_command, "_finish", real)
    assert main(["merge", "base", "dora", "out"]) == 0
    assert_merged("dora")


def test_merge_leaves_what_is_not_its_own(home, capsys):
    (home / "out.partial").mkdir()
    (home / "out.partial" / "notes.txt").write_text("mine")
    assert main(["merge", "base", "lora", "out"]) == 2
    assert (home / "out.partial" / "notes.txt").read_text() == "mine"
    assert main(["merge", "base", "lora", "other"]) == main(["merge", "base", "dora", "other", "--force"]) == 0


def test_merge_tells_the_type_in_the_settings(home):
    (home / "base" / "config.json").write_text(json.dumps({"torch_dtype": "float32", "layers": 3}))
    assert main(["merge", "base", "lora", "out", "--dtype", "bfloat16"]) == 0
    settings = json.loads((home / "out" / "config.json").read_text())
    assert settings == {"torch_dtype": "bfloat16", "layers": 3}


def test_merge_reads_each_tensor_once(home, monkeypatch):
    sizes = []
    real = TensorFile.__getitem__
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, name: sizes.append(name) or real(self, name))
    assert main(["merge", "base", "lora", "out"]) == 0
    base_names = [name for name in sizes if not name.startswith("base_model.model.")]
    assert sorted(base_names) == sorted({*base_names})  # each tensor of the base is read once


def test_convert_round_trips(home, capsys):
    assert main(["convert", "lora", "portable", "--to", "portable"]) == 0
    assert main(["convert", "lora", "as_orbax", "--to", "orbax", "--base", "base"]) == 0
    assert main(["convert", "as_orbax", "back", "--to", "peft"]) == 0
    for other in ("portable", "as_orbax", "back", "orbax"):
        assert main(["diff", "lora", other]) == 0
    jlora.checkpoint.load("as_orbax", model())
    assert json.loads((home / "portable/adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny"


def test_convert_a_stacked_flax_adapter_by_a_map(home, capsys):
    params = {"layers": {"attention": {"q_proj": {"kernel": np.ones((3, 8, 8), np.float32)}}}}
    axes = {"q_proj": jlora.Axes(1, 2, 0)}
    jlora.checkpoint.save("stacked", noisy(params, jlora.LoraSpec(targets="q_proj", rank=2, axes=axes)))
    assert main(["convert", "stacked", "torch", "--to", "peft", "--names", "llama"]) == 0
    names = {*TensorFile(home / "torch/adapter_model.safetensors")}
    assert "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight" in names and len(names) == 6


def saved(path, tensors):
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)


def other_tools(home):
    """The adapter "lora" as others write it: its scale is 4, its rank 4."""
    pairs = {}
    for i, layer in adapted("lora")["model"]["layers"].items():
        for module, last in (("attn", "q_proj"), ("mlp", "up_proj")):
            node = layer[module][last]["weight"]
            pairs[f"model.layers.{i}.{module}.{last}"] = np.asarray(node.lora_a), np.asarray(node.lora_b)
    mlx, kohya, diffusers = {}, {}, {"unet.x.lora_A.weight": np.ones((1, 2)), "unet.x.lora_B.weight": np.ones((2, 1))}
    for name, (a, b) in pairs.items():
        mlx |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        flat = f"lora_te_{name.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": a.T, f"{flat}.lora_up.weight": b.T, f"{flat}.alpha": np.float32(16)}
        dotted = f"text_encoder.{name}"
        diffusers |= {f"{dotted}.lora_A.weight": a.T, f"{dotted}.lora_B.weight": b.T, f"{dotted}.alpha": np.float32(16)}
    saved(home / "mlx/adapters.safetensors", mlx)
    (home / "mlx/adapter_config.json").write_text('{"lora_parameters": {"rank": 4, "scale": 4.0}, "model": "me/tiny"}')
    saved(home / "kohya.safetensors", kohya)
    saved(home / "diffusers.safetensors", diffusers)


TOOLS = {
    "mlx": ["mlx"],
    "mlx, named": ["mlx", "--from", "mlx"],
    "kohya": ["kohya.safetensors", "--base", "base"],
    "kohya, named": ["kohya.safetensors", "--from", "kohya", "--base", "base", "--component", "text_encoder"],
    "diffusers": ["diffusers.safetensors", "--component", "text_encoder"],
    "diffusers, named": ["diffusers.safetensors", "--component", "text_encoder", "--from", "diffusers"],
}


@pytest.mark.parametrize("arguments", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("to", ["peft", "portable"])
def test_convert_from_other_tools(home, arguments, to, capsys):
    other_tools(home)
    source, *more = arguments
    assert main(["convert", source, "made", "--to", to, *more]) == 0, capsys.readouterr().err
    assert main(["diff", "lora", "made"]) == 0
    jlora.peft.load("made", model())
    assert main(["merge", "base", "made", "out"]) == 0
    assert_merged("lora")


def test_convert_from_other_tools_to_orbax(home, capsys):
    other_tools(home)
    for source in ("mlx", "kohya.safetensors"):
        assert main(["convert", source, f"{source}.orbax", "--to", "orbax", "--base", "base"]) == 0
        assert main(["diff", "lora", f"{source}.orbax"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mlx", "--from", "kohya"], "is an adapter of mlx, not of kohya"),
        (["kohya.safetensors"], "--base DIRECTORY"),
        (["kohya.safetensors", "--base", "base/model-00001-of-00003.safetensors"], "convert: the adapter has model_"),
        (["diffusers.safetensors"], "several components"),
        (["mlx", "--component", "unet"], "--component is for files of kohya's"),
        (["lora", "--from", "mlx"], "is an adapter of peft, not of mlx"),
        (["orbax", "--from", "peft"], "is an adapter of orbax, not of peft"),
        (["lora", "--base", "base"], "--to peft needs none"),
        (["mlx", "--names", "llama"], "--names is for an Orbax adapter"),
    ],
)
def test_convert_from_other_tools_refuses(home, arguments, message, capsys):
    other_tools(home)
    assert main(["convert", *arguments[:1], "out", "--to", "peft", *arguments[1:]]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (home / "out").exists()


def test_inspect_reads_other_tools(home, capsys):
    other_tools(home)
    for source in ("mlx", "kohya.safetensors"):
        assert main(["inspect", source]) == 0
        assert "8 -> 12" in capsys.readouterr().out


def test_merge_tells_the_way_for_other_tools(home, capsys):
    other_tools(home)
    for source in ("mlx", "kohya.safetensors"):
        assert main(["merge", "base", source, "out"]) == 2
        assert "jlora convert makes PEFT's files of it" in capsys.readouterr().err


def test_diff_tells_what_differs(home, capsys):
    assert main(["diff", "lora", "lora"]) == 0
    assert main(["diff", "lora", "some"]) == 1
    text = capsys.readouterr().out
    assert "only in A" in text and "rank 4 and 2" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere is no directory"),
        (["inspect", "base"], "neither adapter_config.json nor"),
        (["merge", "base", "lora", "some"], "--force"),
        (["merge", "base", "lora", "some", "--force"], "no earlier result"),
        (["merge", "base", "lora", "lora", "--force"], "in the same place"),
        (["merge", "base", "lora", ".", "--force"], "in the same place"),
        (["merge", "base", "lora", "base/out"], "in the same place"),
        (["merge", "base", "orbax", "out"], "convert"),
        (["convert", "lora", "base", "--to", "orbax", "--base", "base", "--force"], "no earlier result"),
        (["convert", "lora", "out", "--to", "peft", "--names", "llama"], "for an Orbax adapter"),
        (["merge", "lora", "lora", "out"], "has no model.safetensors"),
        (["convert", "dora", "out", "--to", "portable"], "to_safetensors"),
        (["convert", "lora", "out", "--to", "orbax"], "needs --base"),
        (["convert", "orbax", "out", "--to", "peft", "--names", "lama"], "there is no map 'lama'"),
    ],
)
def test_errors_are_one_line_without_a_traceback(home, arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and captured.err.startswith(f"jlora {arguments[0]}: ")
        and "Traceback" not in captured.err
    )
    assert captured.err.count("\n") == 1 and not (home / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "merge", "convert", "diff", "blend", "spec", "doctor"])
def test_help_tells_each_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


@pytest.mark.slow
def test_it_runs_as_a_module(home):
    command = [sys.executable, "-m", "jlora", "diff", "lora", "lora"]
    environment = os.environ | {"PYTHONPATH": str(Path(jlora.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr


def test_merge_writes_no_infinite_weights_unless_it_is_told_to(home, capsys):
    trainable, frozen = jlora.partition(adapted("lora"))
    large = jlora.combine(jax.tree.map(lambda x: np.full_like(x, 3e2), trainable), frozen)
    jlora.peft.save("large", large)
    assert main(["merge", "base", "large", "out", "--dtype", "float16"]) != 0
    told = capsys.readouterr().err
    assert "not finite when they are merged into float16" in told and "--allow-nonfinite" in told
    assert not (home / "out").exists()
    assert main(["merge", "base", "large", "out", "--dtype", "float16", "--allow-nonfinite"]) == 0
    merged = jlora.peft.from_safetensors("out")
    assert any(np.isinf(np.asarray(x, np.float32)).any() for x in jax.tree.leaves(merged))
    assert main(["merge", "base", "large", "out", "--force", "--dtype", "float32"]) == 0
