"""``jlora doctor``: what is here, what is missing, what is broken; nothing of the machine's paths or environment."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import pytest

import jlora
from jlora.cli import doctor, main
from jlora.interpret import eightbits

FILE = Path(doctor.__file__)


def rows(text):
    """The table's values by the names before them."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if line)


def told(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return rows(out)


def missing(monkeypatch, *packages):
    """As if these were not installed."""
    version = metadata.version

    def without(name):
        if name in packages:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    for module, package in doctor.PACKAGES.items():
        if package in packages:
            monkeypatch.setitem(sys.modules, module, None)


def test_versions_devices_and_what_they_allow(capsys):
    found = told(capsys)
    packages = "jax jaxlib flax optax orbax-checkpoint qwix safetensors".split()
    assert {name: found[name] for name in packages} == {name: metadata.version(name) for name in packages}
    assert found["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert (found["jlora"], found["backend"]) == (jlora.__version__, jax.default_backend())
    count = len(jax.devices())
    assert found["devices"] == f"{count} x {jax.devices()[0].device_kind} ({jax.devices()[0].platform})"
    assert found["sharding"].startswith("yes, over" if count > 1 else "there is one device")
    assert found["quantised bases (jlora.quant)"] == found["NNX modules (jlora.nnx)"] == "yes"


def test_what_is_not_installed_is_told_with_how_it_is_had(capsys, monkeypatch):
    missing(monkeypatch, "qwix", "tokenizers", "grain", "huggingface_hub")
    found = told(capsys)
    assert {found[name] for name in ("qwix", "tokenizers", "grain", "huggingface_hub")} == {"not installed"}
    assert found["quantised bases (jlora.quant)"] == 'no: pip install "jlora[quant]"'
    assert found["files of the Hub"] == "no: pip install huggingface_hub"
    assert found["NNX modules (jlora.nnx)"] == "yes"


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise RuntimeError('needs /home/me/lib.so and SECRET\\nmore')", "RuntimeError: needs <path> and SECRET"),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 +", "SyntaxError: invalid syntax (qwix.py, line 1)"),
    ],
)
def test_what_is_broken_is_told_and_stops_nothing(text, message, capsys, monkeypatch, tmp_path):
    (tmp_path / "qwix.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "qwix", raising=False)
    found = told(capsys)
    assert found["qwix"] == f"{metadata.version('qwix')}, but it can't be imported: {message}"
    assert (
        message in found["quantised bases (jlora.quant)"]
        and 'pip install "jlora[quant]"' in found["quantised bases (jlora.quant)"]
    )


def test_devices_that_cant_be_listed_stop_nothing(capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("Unable to initialize backend 'cuda': no file '/usr/lib/x y.so' at C:\\cuda\\x, ~/.cache/me")

    for name in ("devices", "device_count", "default_backend", "process_count"):
        monkeypatch.setattr(jax, name, fails)
    found = told(capsys)
    line = "not known: RuntimeError: Unable to initialize backend 'cuda': no file <path> at <path>, <path>"
    names = ("backend", "devices", "processes", "sharding", "apply(native_dots=True)")
    assert {found[name] for name in names} == {line}
    assert found["quantised bases (jlora.quant)"] == "yes"


def test_nothing_of_paths_addresses_and_the_environment_is_told(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "hf_secret" not in text and str(Path.home()) not in text and sys.prefix not in text and str(FILE) not in text
    assert not re.search(r"(^|\s)/\w", text)
    assert doctor.told(OSError("see https://me:token@host/x for file:///a/b")) == "OSError: see <address> for <address>"


@pytest.mark.parametrize(
    "version, message",
    [
        ("0.10.1", "0.10.1 is too old: the oldest supported is 0.10.2"),
        ("0.10.2", "is of the tested range"),
        ("0.11.5.dev20260101", "is of the tested range"),
        ("0.12.9", "is of the tested range"),
        ("0.13.0", "0.13.0 is newer than all that were tested, 0.10.2 to 0.12"),
        ("unknown", "not known; tested are 0.10.2 to 0.12"),
    ],
)
def test_whether_jax_is_of_a_tested_range(version, message, monkeypatch, capsys):
    of = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "jax" else of(name))
    assert message in told(capsys)["JAX's version"]


def test_the_oldest_is_that_of_the_package_and_the_newest_is_tested_here():
    settings = tomllib.loads((FILE.parents[2] / "pyproject.toml").read_text())
    assert f"jax>={doctor.OLDEST}" in settings["project"]["dependencies"]
    assert doctor._numbers(jax.__version__)[:2] <= doctor._numbers(doctor.NEWEST)


@pytest.mark.parametrize(
    "platforms, expected",
    [({}, "changes nothing: cpu has no such products"), ({"int8": ("cpu",)}, "yes, of kernels in int8"),
     ({"int8": ("cpu", "tpu"), "fp8": ("cpu",)}, "yes, of kernels in int8 and fp8")],
)  # fmt: skip
def test_native_dots_are_told_by_the_rule_of_the_interpreter(platforms, expected, monkeypatch, capsys):
    monkeypatch.setattr(eightbits, "PLATFORMS", platforms)
    assert told(capsys)["apply(native_dots=True)"] == expected


@pytest.mark.parametrize("module", ["jax", "flax"])
def test_its_file_runs_alone_where_jlora_cant_be_imported(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('built for another machine')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(FILE.parents[2])])}
    done = subprocess.run([sys.executable, "-P", str(FILE)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found, message = rows(done.stdout), "but it can't be imported: RuntimeError: built for another machine"
    assert message in found[module] and message in found["jlora"]
    assert found["optax"].startswith(metadata.version("optax"))
