"""What comes from outside: how many real settings are read, mutated files refused, killed writers survived.

    python benchmarks/borders.py                     # all, in about half an hour
    python benchmarks/borders.py --count 300 --kills 20

Prints one table. A mutated file counts as refused where the error names the file or the directory, as loaded where
every number is finite and the base is as it was; anything else is a fault, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import safetensors.numpy

import jlora
from jlora import LoraSpec
from jlora.peft.tensors import TensorFile, read_json
from tests.checkpoint.support import APIS
from tests.kills import WRITERS, kills
from tests.peft_files.pickles import written
from tests.peft_files.trees import flat, lora, nested
from tests.processes import Job

D, NAMES = 6, [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
STATE = {
    f"{name}.weight": np.random.default_rng(i).normal(size=(D, D + 1)).astype(np.float32)
    for i, name in enumerate(NAMES)
}


def row(what: str, found: str, seconds: float) -> None:
    print(f"{what:50} {found:44} {seconds:7.1f} s", flush=True)


def accepted() -> int:
    """The settings of real configurations: how many of them are read."""
    told = json.loads((Path(__file__).parents[1] / "tests" / "spec" / "accepted.json").read_text())
    readers = {"axolotl": LoraSpec.from_axolotl, "llamafactory": LoraSpec.from_llamafactory,
               "llamafactory_v1": LoraSpec.from_llamafactory, "peft": LoraSpec.from_peft}  # fmt: skip
    for name, read in readers.items():
        start, good = time.perf_counter(), 0
        for count, settings in told[name]:
            try:
                read(settings)
                good += count
            except ValueError:
                pass
        total = sum(count for count, _ in told[name])
        row(f"settings of {name}", f"{good} of {total} are read", time.perf_counter() - start)
    return 0


def training(count: int, rng: random.Random) -> int:
    """A training loop that is killed again and again, and goes on from its last whole step."""
    start, last = time.perf_counter(), -1
    numbers = lambda text, word: [
        int(x.split()[1]) for x in text.splitlines(True) if x.startswith(word) and x[-1] == "\n"
    ]
    with tempfile.TemporaryDirectory() as home:
        for _ in range(count):
            with Job("tests.checkpoint.pod", "endless", home, APIS[0], devices=4) as job:
                job.wait_for(f"saved {last + 2}\n")
                time.sleep(rng.uniform(0, 0.3))
                job.kill()
                loaded, saved = (numbers(job.printed(), word) for word in ("loaded", "saved"))
            assert last - 1 <= loaded[0] <= last + 1, (last, loaded)
            last = saved[-1]
    row("a training loop, killed", f"{count} times, goes on from its last whole step", time.perf_counter() - start)
    return 0


# ------------------------------------------------------------------------------------------ mutated files


def adapter_files(home: Path) -> Iterator[tuple[str, Path, Path, Callable[[Path], Any]]]:
    """A directory of each kind, the file in it that is mutated, and how it is read."""
    tree = nested({name: lora(x) for name, x in STATE.items()})
    pairs = {name: (flat(tree)[f"{name}.weight"].lora_a, flat(tree)[f"{name}.weight"].lora_b) for name in NAMES}
    pairs = {name: (np.asarray(a), np.asarray(b)) for name, (a, b) in pairs.items()}
    load = lambda path: jlora.peft.load(path, nested(STATE))
    for what, name in (("PEFT's weights", "adapter_model.safetensors"), ("PEFT's settings", "adapter_config.json")):
        jlora.peft.save(home / name, tree)
        yield what, home / name, home / name / name, load
    arrays = safetensors.numpy.load_file(home / "adapter_config.json" / "adapter_model.safetensors")
    pickled = home / "pickled"
    pickled.mkdir()
    shutil.copyfile(home / "adapter_config.json" / "adapter_config.json", pickled / "adapter_config.json")
    (pickled / "adapter_model.bin").write_bytes(written(arrays))
    yield "PEFT's pickles", pickled, pickled / "adapter_model.bin", load
    mlx = home / "mlx"
    mlx.mkdir()
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
    (mlx / "adapter_config.json").write_text(json.dumps(settings))
    keys = {f"{n}.lora_{x}": np.ascontiguousarray(y) for n, (a, b) in pairs.items() for x, y in (("a", a), ("b", b))}
    safetensors.numpy.save_file(keys, mlx / "adapters.safetensors")
    yield "MLX-LM's weights", mlx, mlx / "adapters.safetensors", load
    yield "MLX-LM's settings", mlx, mlx / "adapter_config.json", load
    for tool, stem, down, up in (
        ("kohya's files", lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
        ("diffusers' files", lambda n: f"transformer.{n}", "lora_A.weight", "lora_B.weight"),
    ):
        keys = {f"{stem(n)}.{down}": np.ascontiguousarray(a.T) for n, (a, b) in pairs.items()}
        keys |= {f"{stem(n)}.{up}": np.ascontiguousarray(b.T) for n, (a, b) in pairs.items()}
        keys |= {f"{stem(n)}.alpha": np.asarray(4, np.float32) for n in pairs}
        at = home / tool.split("'")[0]
        at.mkdir()
        safetensors.numpy.save_file(keys, at / "adapter.safetensors")
        yield tool, at, at / "adapter.safetensors", lambda path: load(path / "adapter.safetensors")
    orbax = home / "orbax"
    jlora.checkpoint.save(orbax, tree)
    told = next(path for path in (orbax / "about").iterdir() if path.is_file())
    yield "Orbax checkpoints' descriptions", orbax, told, lambda path: jlora.checkpoint.load(path, nested(STATE))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three changes, most of them near the beginning, where the names are."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        end = len(data) if rng.random() < 0.3 else min(len(data), 700)
        at, kind = rng.randrange(end), rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'0123456789{}[]",:.-+eE \x00\xff')
        elif kind == 2:
            del data[at : at + rng.randint(1, 30)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 30)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 5:
            data = data[:at] if rng.random() < 0.2 else data + rng.randbytes(4)
        else:
            other = rng.randrange(end)
            data[at], data[other] = data[other], data[at]
    return bytes(data)


def outcome(directory: Path, read: Callable[[Path], Any]) -> str:
    before = {name: x.copy() for name, x in STATE.items()}
    try:
        tree = read(directory)
    except (ValueError, FileNotFoundError) as error:
        return "refused" if str(directory) in str(error) else f"FAULT: does not name the file: {error}"
    except Exception as error:  # a fault of ours, whatever it is
        return f"FAULT: {type(error).__name__}: {error}"
    leaves = [np.asarray(x, np.float64) for node in flat(tree).values() for x in _arrays(node)]
    is_finite = all(np.isfinite(x).all() for x in leaves)
    is_same = all(np.array_equal(x, STATE[name]) for name, x in before.items())
    return "loaded" if is_finite and is_same else "FAULT: loaded with other numbers than finite ones"


def _arrays(node: Any) -> list[Any]:
    fields = ("lora_a", "lora_b", "scale") if hasattr(node, "lora_a") else ()
    return [getattr(node, name) for name in fields]


def mutations(count: int, rng: random.Random) -> int:
    faults = 0
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, directory, file, read in adapter_files(Path(home)):
            whole, start, seen = file.read_bytes(), time.perf_counter(), Counter()
            for _ in range(count):
                file.unlink()
                file.write_bytes(mutated(whole, rng))
                result = outcome(directory, read)
                seen[result.partition(":")[0]] += 1
                if result.startswith("FAULT"):
                    print(f"  {what}: {result[:300]}", flush=True)
            file.write_bytes(whole)
            assert outcome(directory, read) == "loaded"
            faults += seen["FAULT"]
            told = ", ".join(f"{n} {name.lower()}" for name, n in sorted(seen.items()))
            row(f"{count} mutations of {what}", told, time.perf_counter() - start)
    return faults


# ------------------------------------------------------------------------------------------ sizes


def sizes() -> int:
    """Files that are large on purpose: how long until they are read, or refused."""
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    plain = lambda n: {f"layers.{i}.q_proj": 3 for i in range(n)}
    regexes = lambda n: {rf".*layers\.{i}\.q.*": 3 for i in range(n)}
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    with tempfile.TemporaryDirectory() as home:
        at = Path(home) / "file"

        def keys() -> None:
            at.write_text("{" + ",".join(f'"k{i}":1' for i in range(300_000)) + ',"k5":1}')
            read_json(at)

        def tensors() -> None:
            text = ("{" + ",".join(f'"t{i}":{entry}' for i in range(120_000)) + f',"t5":{entry}}}').encode()
            text += b" " * (-len(text) % 8)
            at.write_bytes(len(text).to_bytes(8, "little") + text)
            TensorFile(at)

        cases: dict[str, Callable[[], Any]] = {
            "300,000 keys, one twice": keys,
            "120,000 tensors, one twice": tensors,
            "300 x 300 regular expressions": lambda: LoraSpec.from_peft(
                peft | {"rank_pattern": regexes(300), "alpha_pattern": regexes(300)}
            ),
            "600 x 600 plain patterns": lambda: LoraSpec.from_peft(
                peft | {"rank_pattern": plain(600), "alpha_pattern": plain(600)}
            ),
            "20,000 rank patterns": lambda: LoraSpec.from_peft(peft | {"rank_pattern": plain(20_000)}),
            "100,000 target modules": lambda: LoraSpec.from_peft(peft | {"target_modules": [*plain(100_000)]}),
        }
        for what, case in cases.items():
            start = time.perf_counter()
            try:
                case()
                found = "read"
            except ValueError:
                found = "refused"
            row(what, found, time.perf_counter() - start)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each kind of file")
    parser.add_argument("--kills", type=int, default=40, help="of each writer, at random moments")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fork.*")
    rng = random.Random(given.seed)
    for kind in WRITERS:  # first: what is forked must not have JAX's threads yet
        start = time.perf_counter()
        done, ended = kills(kind, given.kills, rng)
        row(
            f"{kind}: killed at random moments",
            f"{done - ended} times, the last whole state loads",
            time.perf_counter() - start,
        )
    training(given.kills, rng)
    accepted()
    sizes()
    return 1 if mutations(given.count, rng) else 0


if __name__ == "__main__":
    sys.exit(main())
