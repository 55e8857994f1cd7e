"""Peak memory of ``jlora merge`` for models of one size of tensor and another number of them.

    python benchmarks/merge_memory.py

Each model is merged by a process of its own, which samples its anonymous memory (Linux): pages of mapped files, which
the system may drop, are not counted.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jlora
from jlora.cli import main as command
from jlora.peft.models import write_model
from jlora.peft.tensors import TensorInfo

SIZE = 8192


def anonymous() -> float:
    """Anonymous memory of this process, in MB."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def measure(count: int) -> None:
    """Merges an adapter into `count` bfloat16 tensors and prints the memory above the start, at its peak."""
    infos = {f"layers.{i}.q.weight": TensorInfo((SIZE, SIZE), np.dtype(ml_dtypes.bfloat16)) for i in range(count)}
    write_model(Path("base"), infos, lambda _: np.zeros((SIZE, SIZE), ml_dtypes.bfloat16), 300 << 20)
    shapes = {name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in infos.items()}
    spec = jlora.LoraSpec(targets="*q*", rank=8, axes={"*q*": jlora.Axes(1, 0)})
    tree = jlora.wrap(shapes, spec)
    real = lambda x, label: jnp.full(x.shape, 0.01, x.dtype) if label == "trainable" else x
    jlora.peft.save("adapter", jax.tree.map(real, tree, jlora.labels(tree)))
    peak, start, done = [0.0], anonymous(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert command(["merge", "base", "adapter", "out"]) == 0
    done.set()
    watcher.join()
    print(f"| {count} | {count * SIZE**2 * 2 / 1e6:,.0f} | {peak[0] - start:,.0f} |")


def main() -> None:
    """Runs each size in a process and a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        return measure(given.one)
    print(f"| tensors of {SIZE} x {SIZE} | model, MB | peak above the start, MB |\n| --- | --- | --- |", flush=True)
    script, source = Path(__file__).resolve(), str(Path(jlora.__file__).parents[1])
    for count in (3, 6, 9):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [sys.executable, str(script), "--one", str(count)]
            environment = os.environ | {"PYTHONPATH": source}
            done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            print(done.stdout.splitlines()[-1], flush=True)
    return None


if __name__ == "__main__":
    main()
