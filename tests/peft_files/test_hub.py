"""Adapters and models by their names on the Hub: what is asked for, what is refused, and what is said.

The client is the real one, `huggingface_hub`; the Hub is a small one on the loopback, which keeps a log.
"""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants, file_download

import jlora
from jlora.cli import main
from jlora.peft.hub import is_name
from tests.hubs import TOKEN, Hub
from tests.peft_files.trees import assert_same, lora, merged, nested, noise
from tests.processes import ROOT

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
NAME, BASE = "org/adapter", "org/base"
STATE = {f"layers.{i}.q_proj.weight": noise(6, 5) for i in range(3)}
TREES = {version: nested({name: lora(x, scale=scale) for name, x in STATE.items()})
         for version, scale in (("v1", 0.5), ("v2", 4.0))}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
PICKLES = {"adapter_model.bin": b"a program", "pytorch_model.bin": b"a program", "training_args.bin": b"another"}


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of two versions of an adapter, and of its base, a model of several files."""
    home = tmp_path_factory.mktemp("saved")
    for version, tree in TREES.items():
        jlora.peft.save(home / version, tree, base_model=BASE, task_type="CAUSAL_LM")
    jlora.peft.to_safetensors(nested(STATE), home / "base", shard_bytes=150)
    for name in ("config.json", "tokenizer.model"):
        (home / "base" / name).write_text("{}")
    return home


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A Hub with the two, the client's settings, and an empty working folder."""
    hub = Hub()
    adapter = hub.add(NAME, contents(saved / "v1") | PICKLES | {"optimizer.pt": b"", f"checkpoint-1/{WEIGHTS}": b""})
    adapter.branches["first"] = adapter.branches["main"]
    adapter.commit(contents(saved / "v2"))
    hub.add(BASE, contents(saved / "base") | PICKLES | {"onnx/config.json": b"{}", "flax_model.msgpack": b""})
    monkeypatch.chdir(tmp_path)
    with hub.served() as address:
        configure(monkeypatch, address, tmp_path / "cache")
        yield hub


def configure(monkeypatch, address, cache):
    """The client's settings, which it has read from the environment when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    offline(monkeypatch, False)


def offline(monkeypatch, is_offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    reset = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils._http.reset_sessions
    reset()


def loaded(source=NAME, **settings):
    return jlora.peft.load(source, nested(STATE), **settings)


def assert_is(tree, version):
    assert_same(merged(tree), merged(TREES[version]))


@pytest.mark.parametrize(
    "name", ["org/name", "o/n", "Org_1/a.b-c", "1/2", "org/name.v2", f"{'a' * 96}/{'b' * 96}", "org/_a"]
)
def test_names_of_the_hub(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "name", "./org/name", "/org/name", "../name", "org/name/", "org/name/file", "org/.name", "org/name-",
     "org//name", "org/a..b", "org/a--b", "org/name.git", "org/näme", "~/name", f"{'a' * 97}/b", "org/name\n",
     "org\\name"],
)  # fmt: skip
def test_paths_are_no_names_of_the_hub(name):
    assert not is_name(name)


def test_an_adapter_of_the_hub_is_that_of_its_directory(hub, saved):
    assert_is(loaded(), "v2")
    assert_same(merged(loaded()), merged(jlora.peft.load(saved / "v2", nested(STATE))))
    assert {*hub.files} == {CONFIG, WEIGHTS}


def test_a_revision_is_a_branch_or_a_commit(hub):
    assert_is(loaded(revision="first"), "v1")
    assert_is(loaded(revision=hub.repositories[NAME].branches["first"]), "v1")
    assert_is(loaded(revision="main"), "v2")


def test_a_private_repository_wants_a_token(hub, saved, monkeypatch):
    hub.add("org/private", contents(saved / "v1"), private=True)
    with pytest.raises(FileNotFoundError, match=r"org/private is no file or directory here.*hf auth login.*HF_TOKEN"):
        loaded("org/private")
    with pytest.raises(PermissionError, match="org/private on the Hub is not given for this token"):
        loaded("org/private", token="hf_wrong")
    assert_is(loaded("org/private", token=TOKEN), "v1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_is(loaded("org/private", cache_dir="another"), "v1")
    with pytest.raises(FileNotFoundError):
        loaded("org/private", token=False, cache_dir="a third")


def test_the_cache_is_where_it_is_said_to_be(hub, tmp_path):
    loaded(cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models--org--adapter").is_dir() and not (tmp_path / "cache").exists()


def test_offline_it_is_read_from_the_cache(hub, monkeypatch):
    loaded()
    hub.forget()
    offline(monkeypatch, True)
    assert_is(loaded(), "v2")
    with pytest.raises(FileNotFoundError, match=r"the cache .*cache lacks files of .*'first'.*HF_HUB_OFFLINE"):
        loaded(revision="first")
    with pytest.raises(FileNotFoundError, match=r"org/other is no file or directory here.*HF_HUB_OFFLINE"):
        loaded("org/other")
    assert not hub.log


def test_what_the_cache_has_in_part_is_no_adapter(hub, monkeypatch):
    huggingface_hub.hf_hub_download(NAME, CONFIG)
    offline(monkeypatch, True)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors|lacks files of org/adapter"):
        loaded()


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    hub.is_down = True
    with pytest.raises(ConnectionError, match=r"can't be asked for it \(.*500.*\), and the cache .* lacks files"):
        loaded()
    hub.is_down = False
    loaded()
    hub.is_down = True
    assert_is(loaded(), "v2")  # as the client has it: from the cache


def test_no_hub_at_all(tmp_path, monkeypatch):
    configure(monkeypatch, "http://127.0.0.1:1", tmp_path)
    with pytest.raises(ConnectionError, match=r"the Hub at http://127.0.0.1:1 can't be asked for it"):
        loaded()


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("org/nothing", {"token": TOKEN}, r"org/nothing is no file or directory here, and the Hub has no repository"),
        (NAME, {"revision": "v9"}, "org/adapter on the Hub has no revision 'v9'"),
        ("nothing", {}, "nothing is no directory or file here, and no name of a repository on the Hub"),
        ("org/adapter/checkpoint-1", {}, "no directory or file here, and no name of a repository"),
        (BASE, {}, r"org/base on the Hub, at \w+, has adapter_model.bin and no adapter_model.safetensors: a pickle"),
    ],
)
def test_what_is_not_there_is_told_with_both_readings(hub, source, settings, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        loaded(source, **settings)


def test_a_gated_repository(hub, saved, capsys):
    hub.add("org/gated", contents(saved / "v1"), gated=True)
    with pytest.raises(
        PermissionError, match=r"org/gated on the Hub is gated.*Ask for it at http://.*/org/gated; then"
    ):
        loaded("org/gated")
    assert main(["merge", BASE, "org/gated", "out"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("jlora merge: org/gated on the Hub is gated") and not list(Path().glob("out*"))
    assert_is(loaded("org/gated", token=TOKEN), "v1")


def test_pickles_are_refused_and_never_asked_for(hub, saved, capsys):
    hub.add("org/old", {CONFIG: contents(saved / "v1")[CONFIG]} | PICKLES)
    with pytest.raises(ValueError, match=r"has adapter_model.bin and no adapter_model.safetensors: a pickle.*not down"):
        loaded("org/old")
    hub.add("org/old-model", {"config.json": b"{}", "pytorch_model.bin.index.json": b"{}"} | PICKLES)
    assert main(["merge", "org/old-model", NAME, "out"]) == 2
    assert "org/old-model on the Hub, at " in (told := capsys.readouterr().err) and "save_pretrained" in told
    assert not [name for name in hub.files if name.endswith((".bin", ".pt"))] and not Path("out").exists()


def test_a_pickle_that_the_cache_has_is_not_read(hub, saved):
    hub.add("org/old", {CONFIG: contents(saved / "v1")[CONFIG]} | PICKLES)
    huggingface_hub.hf_hub_download("org/old", "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which is a program"):
        loaded("org/old")


def test_adapters_in_folders_of_a_repository_are_named(hub, saved):
    hub.add("org/several", {f"{version}/{n}": x for version in TREES for n, x in contents(saved / version).items()})
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors.*there is one in v1, v2"):
        loaded("org/several")


def test_weights_without_settings(hub, saved):
    hub.add("org/half", {WEIGHTS: contents(saved / "v1")[WEIGHTS]})
    with pytest.raises(
        FileNotFoundError, match=r"org/half on the Hub, at \w+, has no adapter_config.json; it has adap"
    ):
        loaded("org/half")


def test_a_path_wins_over_a_name(hub, saved):
    shutil.copytree(saved / "v1", NAME)
    assert_is(loaded(), "v1")
    with pytest.raises(ValueError, match="org/adapter is a path here, which has no revisions; 'first' is one of"):
        loaded(revision="first")
    assert not hub.log


def test_a_path_object_is_never_a_name(hub):
    with pytest.raises(FileNotFoundError, match=r"org/adapter is no adapter of PEFT's: it has no adapter_config.json"):
        loaded(Path(NAME))
    assert not hub.log


def test_adapters_of_other_tools(hub, saved, capsys):
    pairs = {f"layers.{i}.q_proj": TREES["v1"]["layers"][str(i)]["q_proj"]["weight"] for i in range(3)}
    mlx = {
        f"{name}.{part}": np.asarray(getattr(node, part))
        for name, node in pairs.items()
        for part in ("lora_a", "lora_b")
    }
    settings = {"lora_parameters": {"rank": 2, "scale": 0.5}, "model": BASE}
    checkpoint = {"0000100_adapters.safetensors": b"of an earlier step"}
    files = {"adapters.safetensors": safetensors.numpy.save(mlx), CONFIG: json.dumps(settings).encode()}
    hub.add("org/mlx", files | checkpoint)
    assert_is(loaded("org/mlx"), "v1")
    assert {*hub.files} == {*files}
    assert main(["convert", "org/mlx", "made", "--to", "peft"]) == main(["diff", "org/mlx", str(saved / "v1")]) == 0
    assert_is(loaded("made"), "v1")


def test_the_tables_of_an_adapter_of_the_hub(hub, tmp_path):
    model = lambda rows: {"embed_tokens": {"embedding": noise(rows, 4)}, "q": {"kernel": noise(4, 4)}}
    larger = jlora.wrap(model(12), jlora.LoraSpec(targets=["q"], rank=2, train=["embed_tokens"]))
    jlora.peft.save(tmp_path / "larger", larger)
    hub.add("org/larger", contents(tmp_path / "larger"))
    tree = jlora.peft.load("org/larger", jlora.peft.resize_tables(model(10), "org/larger", revision="main"))
    assert tree["embed_tokens"]["embedding"].shape == (12, 4)


def test_a_model_and_an_adapter_of_the_hub_are_merged(hub, saved, capsys):
    assert main(["merge", BASE, NAME, "out"]) == 0
    assert main(["merge", str(saved / "base"), str(saved / "v2"), "expected"]) == 0
    assert contents("out") == contents("expected") and not any(path.is_symlink() for path in Path("out").iterdir())
    assert {*hub.files} == {CONFIG, WEIGHTS} | {path.name for path in (saved / "base").iterdir()}
    hub.forget()
    assert main(["merge", BASE, NAME, "first", "--revision", "first", "--base-revision", "main"]) == 0
    assert_same(merged(jlora.peft.from_safetensors("first")), merged(TREES["v1"]))
    assert {*hub.files} <= {CONFIG, WEIGHTS}  # the base is in the cache


def test_a_merge_that_can_not_be_written_downloads_nothing(hub, capsys):
    Path("out").mkdir()
    assert main(["merge", BASE, NAME, "out"]) == 2
    assert "--force replaces it" in capsys.readouterr().err and not hub.log


def test_a_model_in_one_file(hub, saved, capsys):
    jlora.peft.to_safetensors(nested(STATE), "single")
    hub.add("org/single", contents("single") | {"config.json": b"{}", "other.safetensors": b""})
    shutil.rmtree("single")
    assert main(["merge", "org/single", NAME, "out"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"model.safetensors", "config.json"}
    assert "other.safetensors" not in hub.files


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin"]
)
def test_an_index_that_names_other_files_is_refused(hub, shard, capsys):
    index = {"weight_map": {"layers.0.q_proj.weight": shard}}
    hub.add("org/bad", {"model.safetensors.index.json": json.dumps(index).encode(), "pytorch_model.bin": b""})
    assert main(["merge", "org/bad", NAME, "out"]) == 2
    assert "must map names of tensors to names of files beside it" in capsys.readouterr().err
    assert shard not in hub.files


def test_an_index_that_names_a_file_that_is_not_there(hub, capsys):
    index = {"weight_map": {"layers.0.q_proj.weight": "model-00001-of-00002.safetensors"}}
    hub.add("org/short", {"model.safetensors.index.json": json.dumps(index).encode()})
    assert main(["merge", "org/short", NAME, "out"]) == 2
    assert "org/short on the Hub, at " in (told := capsys.readouterr().err)
    assert "has no model-00001-of-00002.safetensors; it has model.safetensors.index.json" in told


def test_the_commands_take_names_and_revisions(hub, saved, capsys):
    assert main(["inspect", NAME, "--revision", "first", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["adapter"] == NAME and told["modules"][0]["scale"] == 0.5
    assert main(["diff", NAME, NAME, "--revision-a", "first"]) == 1
    assert main(["diff", NAME, str(saved / "v1"), "--revision-a", "first", "--cache-dir", "mine"]) == 0
    assert Path("mine").is_dir()
    hub.forget()
    assert main(["convert", NAME, "orbax", "--to", "orbax", "--base", BASE, "--base-revision", "main"]) == 0
    assert "config.json" not in hub.files and "tokenizer.model" not in hub.files
    assert main(["diff", NAME, "orbax"]) == 0
    assert main(["inspect", str(saved / "v1"), "--revision", "first"]) == 2
    assert "which has no revisions" in capsys.readouterr().err


def test_without_the_client(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'org/adapter is no file or directory here; .*pip install "jlora\[hub\]"'):
        loaded()
    assert main(["inspect", NAME]) == 2
    assert "jlora inspect: org/adapter is no file" in capsys.readouterr().err
    jlora.peft.save("adapter", TREES["v1"])
    with pytest.raises(ImportError, match=r'To upload adapter, .*pip install "jlora\[hub\]"'):
        jlora.peft.push("adapter", NAME)


def test_the_client_is_imported_only_where_it_is_used():
    code = "import sys, jlora, jlora.peft, jlora.cli; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_what_is_pushed_is_loaded(hub, saved, tmp_path):
    shutil.copytree(saved / "v1", "adapter")
    for name in ("optimizer.pt", "adapter_model.bin", "notes.txt", "other.safetensors"):
        Path("adapter", name).write_text("mine")
    url = jlora.peft.push("adapter", "me/new", token=TOKEN, private=True)
    assert url == f"{constants.ENDPOINT}/me/new" and hub.repositories["me/new"].private
    assert {*hub.repositories["me/new"].files("main")} == {".gitattributes", CONFIG, WEIGHTS, CARD}
    assert_is(loaded("me/new", token=TOKEN), "v1")
    jlora.peft.push(saved / "v2", "me/new", token=TOKEN, commit_message="again")  # it is there already
    assert_is(loaded("me/new", token=TOKEN), "v2")


def test_an_activated_adapter_is_pushed_and_loaded(hub):
    jlora.peft.save("adapter", TREES["v1"], invocation_tokens=[3, 1])
    jlora.peft.push("adapter", "me/new", token=TOKEN)
    assert_is(loaded("me/new", token=TOKEN, invocation_tokens=[3, 1]), "v1")
    with pytest.raises(ValueError, match="is activated"):
        loaded("me/new", token=TOKEN)


def test_a_push_to_a_branch(hub, saved):
    url = jlora.peft.push(saved / "v1", NAME, token=TOKEN, revision="tried")
    assert url == f"{constants.ENDPOINT}/{NAME}/tree/tried"
    assert_is(loaded(revision="tried"), "v1")
    assert_is(loaded(), "v2")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "is no adapter of PEFT's: it has no adapter_config.json and no adapter_model.safetensors"),
        ("pickle", "has adapter_model.bin, a pickle, and no adapter_model.safetensors; .*jlora convert"),
        ("cut", r"adapter_config.json is of an earlier save than adapter_model.safetensors, which was cut off"),
        ("damaged", "is no whole safetensors file"),
    ],
)
def test_what_is_no_adapter_is_not_pushed(hub, saved, kind, message):
    at = Path("adapter")
    if kind != "none":
        shutil.copytree(saved / "v1", at)
    if kind == "pickle":
        (at / WEIGHTS).rename(at / "adapter_model.bin")
    if kind == "damaged":
        (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-1])
    if kind == "cut":
        before = (at / CONFIG).read_bytes()
        jlora.peft.save(at, TREES["v2"])
        (at / CONFIG).write_bytes(before)
        os.utime(at / CONFIG, ns=(0, 0))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        jlora.peft.push(at, "me/new", token=TOKEN)
    assert not hub.log


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("me/new", {}, "takes nothing into me/new with this token"),
        ("me/new", {"token": "hf_wrong"}, "takes nothing into me/new with this token"),
        ("others/new", {"token": TOKEN}, r"takes nothing into others/new .*403.*an account that may write"),
    ],
)
def test_a_push_that_is_not_allowed(hub, saved, name, settings, message):
    with pytest.raises(PermissionError, match=message):
        jlora.peft.push(saved / "v1", name, **settings)


def test_a_push_that_reaches_no_hub(hub, saved, monkeypatch):
    with pytest.raises(ValueError, match="'new' is no name of a repository on the Hub; expected is org/name"):
        jlora.peft.push(saved / "v1", "new", token=TOKEN)
    hub.is_down = True
    with pytest.raises(ConnectionError, match=r"can't be asked to take me/new \(.*500.*\); push it again"):
        jlora.peft.push(saved / "v1", "me/new", token=TOKEN)
    hub.forget()
    offline(monkeypatch, True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set: unset it"):
        jlora.peft.push(saved / "v1", "me/new", token=TOKEN)
    assert not hub.log


@pytest.mark.slow
def test_the_environment_says_where_the_hub_is(hub, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "jlora", "merge", BASE, NAME, "out"]
    run = lambda **more: subprocess.run(command, capture_output=True, text=True, env=environment | more)
    first = run()
    assert first.returncode == 0 and (tmp_path / "home" / "hub" / "models--org--base").is_dir(), first.stderr
    hub.forget()
    shutil.rmtree("out")
    again = run(HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and not hub.log, again.stderr
    assert_same(merged(jlora.peft.from_safetensors("out")), merged(TREES["v2"]))
