"""What a job records of each step: a line of JSON, the progress bar; speed against what the hardware can do."""

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import jlora
from jlora.examples.smollm2 import SmolLM2
from jlora.targets.paths import flatten

# Dense bfloat16 FLOP/s of a device, by its `device_kind`, as its maker states them (half of those with sparsity); none
# was measured here.
PEAKS = {
    r"TPU v4": 275e12,
    r"TPU v5( lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6( lite|e)": 918e12,
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100.*HBM3": 989e12,
    r"NVIDIA H200": 989e12,
}


class Recorder:
    """Writes ``metrics.jsonl``, one line a step, and moves the bar: on process 0 alone.

    Args:
      path: of the file; lines of steps after `first` are dropped, since those steps are done again.
      first: the steps that are done.
      last: the steps that are to be done.
      tokens: of a step.
      flops: of a token.
    """

    def __init__(self, path: Path, first: int, last: int, tokens: int, flops: float):
        self.is_main, self.tokens = jax.process_index() == 0, tokens
        peak = peak_flops(jax.devices()[0].device_kind)
        self.mfu = None if peak is None else tokens * flops / (peak * jax.device_count())
        self.bar = tqdm(None, "training", last, initial=first, unit="step", disable=not self.is_main)
        if self.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep_steps(path, first)
            self.file = path.open("a", encoding="utf-8")
        self.since: float | None = None  # the first step compiles: its time tells nothing

    def add(self, step: int, told: dict[str, Any]) -> dict[str, Any]:
        """Waits for a step's metrics, records them and returns them."""
        told = {name: x.item() for name, x in jax.device_get(told).items()}
        seconds = None if self.since is None else time.perf_counter() - self.since
        if self.is_main:
            self.write({"step": step, **told, "seconds": seconds, **self.speed(seconds), "memory_bytes": memory()})
        self.restart()
        return told

    def restart(self) -> None:
        """Leaves the time since the last step, such as that of a checkpoint, out of the next step's."""
        self.since = time.perf_counter()

    def speed(self, seconds: float | None) -> dict[str, float | None]:
        """Returns the speed of a step: None where there is no telling."""
        if seconds is None:
            return {"tokens_per_second": None, "mfu": None}
        return {"tokens_per_second": self.tokens / seconds, "mfu": self.mfu and self.mfu / seconds}

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line to the file, and shows it at the bar."""
        self.file.write(json.dumps({name: x for name, x in line.items() if name != "stop"}) + "\n")
        self.file.flush()
        formats = {"loss": ".3f", "tokens_per_second": ",.0f", "mfu": ".1%"}
        self.bar.set_postfix({name: f"{line[name]:{form}}" for name, form in formats.items() if line[name] is not None})
        self.bar.update()

    def close(self) -> None:
        """Ends the bar and the file."""
        self.bar.close()
        if self.is_main:
            self.file.close()


def keep_steps(path: Path, last: int) -> None:
    """Drops the lines of steps after `last`, and a line that was cut off; the file is replaced as a whole."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def flops_per_token(model: SmolLM2, params: Any, length: int) -> float:
    """Returns the model's FLOPs for a token of training with LoRA; what `remat` computes again does not count.

    Each weight of a kernel, or of the table as the head, takes a multiplication and an addition for the output and as
    many for the input's gradient; each of an adapter as many again for its own gradient. Attention's scores and sums
    take 4 x length x width a layer, and twice that backward; the causal half that is masked counts.

    References:
      Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, appendix B.
    """
    bases = zip(*flatten(jlora.unwrap(params))[:2], strict=True)
    kernels = sum(math.prod(x.shape) for path, x in bases if not path.endswith("scale"))
    adapters = sum(math.prod(x.shape) for x in jax.tree.leaves(jlora.partition(params)[0]))
    return 4 * kernels + 6 * adapters + 12 * model.layers * length * model.width


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's peak in bfloat16; None where it is not known, as of CPUs."""
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, device_kind)), None)


def memory() -> int | None:
    """Returns the most bytes that were in use on one of this process's devices; None where they don't tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x), default=None)
