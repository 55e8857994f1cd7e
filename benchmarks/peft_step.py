"""A training step of stock PEFT on torch, for `benchmarks.step_time`: a process that takes its turn when told to.

Run with a Python that has ``torch`` and ``peft``. It makes the model that the other benchmarks have. For each line on
its standard input it runs one step, loss and gradients, and prints the seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]


class Layer(nn.Module):
    """The pre-norm decoder layer of `benchmarks.step_time`."""

    def __init__(self, d: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (d, hidden), "up": (d, hidden)}
        for name, shape in (shapes | {"down": (hidden, d)}).items():
            setattr(self, name, nn.Linear(*shape, bias=False))
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)

    def forward(self, x: Any) -> Any:
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        h = self.norm1(x)
        mixed = nn.functional.scaled_dot_product_attention(
            *(split(f(h)) for f in (self.q, self.k, self.v)), is_causal=True
        )
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("layers", "d", "hidden", "tokens", "rank", "heads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    base = nn.Sequential(*(Layer(args.d, args.hidden, args.heads) for _ in range(args.layers)))
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=PROJECTIONS, lora_dropout=0.0)
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    x = torch.randn(4, args.tokens // 4, args.d)
    for _ in sys.stdin:
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        (model(x) ** 2).mean().backward()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
