"""Teaches a language model to write like Hamlet with LoRA: a real fine-tune, from an empty directory.

SmolLM2-135M-Instruct (134.5M parameters, scanned layers) learns from the first nine tenths of the play, in windows of
128 tokens, and is measured on the rest of it: the perplexity of the model as it comes and with its adapters, which are
written as PEFT's files. On two CPU cores all of it takes about five minutes. `--quantize` keeps the frozen kernels of
the linear layers in a few bits a weight (QLoRA).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import jlora
from jlora.examples import training
from jlora.examples.fetch import HAMLET, SMOLLM2, FetchError, fetch
from jlora.examples.published import write_base
from jlora.examples.smollm2 import (
    PRETRAINED,
    SmolLM2,
    generate,
    load_params,
    load_tokenizer,
    next_token_losses,
    perplexity,
)
from jlora.quant.formats import package

LENGTH, BATCH, SCALE = 128, 4, 2
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "Enter the Ghost of the King\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code."""
    args = parse(argv)
    return training.exit_code(lambda: run(args), FetchError, OSError, ModuleNotFoundError)


def run(args: argparse.Namespace) -> None:
    """The job from download to the last line."""
    if args.quantize:
        package()  # if it is missing, that is said before anything is downloaded
    folder, text = fetch(SMOLLM2), (fetch(HAMLET) / "hamlet.txt").read_text(encoding="utf-8")
    model, tokenizer = PRETRAINED, load_tokenizer(folder)
    train_set, held_out = split(windows(tokenizer.encode(text).ids, LENGTH))
    params = adapt(model, jax.device_put(load_params(folder)), args)
    print(jlora.summary(params), flush=True)
    if args.quantize:
        print(f"{jlora.quant.bits(params):.2f} bits a weight of the frozen kernels, as {args.quantize}", flush=True)

    held_out = held_out[: args.held_out]
    sample = lambda: print(f"{args.prompt}{generate(params, tokenizer, args.prompt, args.tokens)}\n", flush=True)
    # B starts as zeros: for now the wrapped model is the pretrained one.
    before = perplexity(params, held_out)
    print(f"\n--- before: perplexity {before:.1f}")
    sample()
    params, _ = train(model, params, train_set, args)
    after = perplexity(params, held_out)
    print(f"\n--- after {args.steps} steps of {BATCH * LENGTH} tokens: perplexity {after:.1f}")
    sample()
    jlora.peft.save(args.out, params, names="llama", base_model=MODEL, task_type="CAUSAL_LM", portable=True)
    print(f"adapter for PEFT, vLLM, SGLang and llama.cpp: {args.out}")
    if args.base:
        write_base(folder, args.base)
        print(f"base model: {args.base} (the numbers of a 4-bit file, not the published weights)")
    print(f"perplexity on the last {held_out.size:,} tokens of the play, as the model comes and with LoRA:")
    base = f", {args.quantize}" if args.quantize else ""
    print(f"pretrained{base} {before:.1f}\nLoRA{base} {after:.1f}", flush=True)


def windows(ids: list[int], length: int) -> np.ndarray:
    """Returns the ids cut into rows (n, length); the last, if it is short, is left out."""
    n = len(ids) // length
    return np.array(ids[: n * length], np.int32).reshape(n, length)


def split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first nine tenths of the rows and the rest."""
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


def adapt(model: SmolLM2, params: Any, args: argparse.Namespace) -> Any:
    """Returns the parameters with an adapter on each linear layer, its kernel quantised if the settings say so.

    The axes of stacked kernels come from a trace.
    """
    forward = lambda params, ids: model.apply({"params": params}, ids)
    sites = jlora.sites(forward, params, jax.ShapeDtypeStruct((1, LENGTH), "int32"))
    spec = jlora.LoraSpec(targets="all-linear", rank=args.rank, alpha=SCALE * args.rank, seed=args.seed)
    if args.quantize:
        params = jlora.quant.quantize(params, args.quantize, double_quant=args.double_quant, sites=sites)
    return jlora.wrap(params, spec, sites=sites)


def train(model: SmolLM2, params: Any, rows: np.ndarray, args: argparse.Namespace) -> tuple[Any, list[float]]:
    """Returns the trained parameters and the loss of every step; the arrays in `params` are donated."""
    tx = optimizer(params, args)
    step, state, losses = train_step(model, tx), tx.init(params), []
    bar = tqdm(batches(rows, args.steps, args.seed), "training", args.steps, unit="step")
    for batch in bar:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        bar.set_postfix(loss=f"{training.running_mean(losses)[-1]:.3f}")
    return params, losses


def optimizer(params: Any, args: argparse.Namespace) -> optax.GradientTransformation:
    """Returns AdamW with clipped gradients, for what trains."""
    adamw = optax.adamw(training.learning_rate(args.lr, args.steps))
    return jlora.optimizer(optax.chain(optax.clip_by_global_norm(1.0), adamw), params)


def train_step(model: SmolLM2, tx: optax.GradientTransformation) -> Callable:
    """Returns the compiled step: (params, state, ids) to (params, state, loss)."""

    def mean_loss(params: Any, ids: jax.Array) -> jax.Array:
        return next_token_losses(jlora.apply(model.apply)({"params": params}, ids), ids).mean()

    def step(params: Any, state: Any, ids: jax.Array) -> tuple:
        loss, grads = jlora.value_and_grad(mean_loss)(params, ids)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batches(rows: np.ndarray, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yields `steps` batches of rows, as `training.batches` does."""
    return (batch["ids"] for batch in training.batches({"ids": rows}, steps, seed, BATCH))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the settings of the command line, `steps` worked out."""
    parser = argparse.ArgumentParser(
        prog="python -m jlora.examples.hamlet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", default=PROMPT, help="text to continue, before and after training")
    add("--quick", action="store_true", help="10 steps, 8 held-out windows, short samples: to see that all works")
    add("--out", type=Path, default=Path("runs/hamlet"), metavar="DIR", help="where the adapter goes (%(default)s)")
    add("--base", type=Path, metavar="DIR", help="write the base model there too, for Transformers, vLLM, llama.cpp")
    add("--steps", metavar="N", type=training.count(0), help=f"batches of {BATCH} windows of {LENGTH} tokens (80)")
    add("--rank", metavar="N", type=training.count(1, 192), default=8, help="rank of the adapters (%(default)s)")
    add("--lr", metavar="RATE", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    add("--seed", metavar="N", type=training.count(0), default=0, help="of adapters and batches (%(default)s)")
    add("--quantize", choices=("nf4", "int4", "int8", "fp8"), help="keep frozen kernels of linear layers so (dense)")
    add("--double-quant", action="store_true", help="quantise the scales of --quantize too")
    args = parser.parse_args(argv)
    if args.double_quant and not args.quantize:
        parser.error("--double-quant quantises the scales of --quantize: give both")
    args.held_out, args.tokens = (8, 16) if args.quick else (None, 48)
    if args.steps is None:
        args.steps = 10 if args.quick else 80
    return args


if __name__ == "__main__":
    sys.exit(main())
