"""Fine-tunes SmolLM2-135M-Instruct on Hamlet with LoRA: one job for a laptop, a TPU pod and a GPU cluster.

Every process runs the same command. The base lies across the mesh, split both ways, and stays frozen; adapters and
their optimizer lie beside it. A step's batch depends on the seed and the step's number alone, so the losses are the
same up to rounding on any mesh and any number of processes.

Run again, the same command goes on from the last checkpoint: to the bit on the same mesh. SIGTERM to any
process, or Ctrl-C, ends all of them after the step under way, with a checkpoint of it and exit code 128 + the signal's
number. The second one ends a process at once.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import jlora
from jlora.examples import smollm2
from jlora.examples.fetch import HAMLET, SMOLLM2, FetchError, fetch
from jlora.examples.hamlet import MODEL, SCALE, split, windows
from jlora.examples.pod import data
from jlora.examples.pod.loop import name_of, train
from jlora.examples.pod.mesh import ACTIVATIONS, AXES, check_batch, check_model, make_mesh, place, read_mesh
from jlora.examples.pod.processes import PodError, start, stop_on_signal
from jlora.examples.pod.step import perplexity
from jlora.examples.smollm2 import PRETRAINED, SmolLM2
from jlora.examples.training import count, exit_code

TINY = SmolLM2(vocab=256, width=64, heads=4, kv_heads=2, hidden=128, layers=2)
REMAT = {"none": (), "full": (), "outputs": ("attention", "mlp")}


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code."""
    args = parse(argv)
    return exit_code(lambda: start_and_run(args), PodError, FetchError, OSError)


def start_and_run(args: argparse.Namespace) -> int:
    """Joins the other processes and runs the job on the mesh of all devices."""
    start(args)
    mesh = make_mesh(args.mesh)
    with jax.set_mesh(mesh), stop_on_signal() as stop:
        return run(args, mesh, stop)


def run(args: argparse.Namespace, mesh: Mesh, stop: Any) -> int:
    """The job from the files to the last line."""
    settings = {"dtype": args.dtype, "remat": args.remat != "none", "saved": REMAT[args.remat]}
    model = (TINY if args.tiny else PRETRAINED).clone(**settings, activations=ACTIVATIONS)
    check_model(model, mesh)
    check_batch(args.batch, args.accumulate, mesh)
    host, ids = tiny(model) if args.tiny else pretrained()
    train_set, held_out = split(windows(ids, args.length))
    say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes, mesh {told(mesh)}")
    params = adapt(model, place(host, mesh, args.base_dtype), args)
    say(jlora.summary(params))

    trained = train(model, params, train_set, args, mesh, stop)
    if trained.signal:
        say(
            f"{name_of(trained.signal)}: step {trained.step} of {args.steps} is saved; the same command goes on from it"
        )
        return 128 + trained.signal
    if args.evaluate:
        measure = lambda params: perplexity(model, params, data.in_order(held_out, mesh, args.batch))
        before, after = measure(jlora.unwrap(trained.params)), measure(trained.params)
        say(f"perplexity on {held_out.size:,} held-out tokens: pretrained {before:.4g}, LoRA {after:.4g}")
    export(trained.params, mesh, args)
    return 0


def say(what: Any) -> None:
    """Prints on one process of all."""
    if jax.process_index() == 0:
        print(what, flush=True)


def told(mesh: Mesh) -> str:
    """Returns a mesh as `--mesh` reads it."""
    return ",".join(f"{name}={mesh.shape[name]}" for name in AXES)


def pretrained() -> tuple[Any, list[int]]:
    """Returns the pretrained parameters on this host, and the play's tokens; each host has files of its own."""
    folder, text = fetch(SMOLLM2), (fetch(HAMLET) / "hamlet.txt").read_text(encoding="utf-8")
    return smollm2.load_params(folder), smollm2.load_tokenizer(folder).encode(text).ids


def tiny(model: SmolLM2) -> tuple[Any, list[int]]:
    """Returns random parameters, and the bytes of the model's source code as tokens: nothing is downloaded."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8), np.int32)))["params"]
    rng = np.random.default_rng(0)
    random = lambda x: rng.normal(scale=x.shape[-2] ** -0.5, size=x.shape) if len(x.shape) > 1 else np.ones(x.shape)
    return jax.tree.map(random, shapes), list(Path(smollm2.__file__).read_bytes())


def adapt(model: SmolLM2, base: Any, args: argparse.Namespace) -> Any:
    """Returns the placed parameters with an adapter on each linear layer, which lies where its kernel does."""
    forward = lambda params, ids: model.apply({"params": params}, ids)
    sites = jlora.sites(forward, base, jax.ShapeDtypeStruct((args.batch, args.length), "int32"))
    spec = jlora.LoraSpec(targets="all-linear", rank=args.rank, alpha=SCALE * args.rank, seed=args.seed)
    return jlora.wrap(base, spec, sites=sites)


def export(params: Any, mesh: Mesh, args: argparse.Namespace) -> None:
    """Writes the adapter as PEFT's files; it alone is gathered, not the base."""
    trainable, frozen = jlora.partition(params)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, jax.P()))(trainable)
    if jax.process_index() == 0:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
        tree = jlora.combine(jax.tree.map(np.asarray, whole), shapes)
        model = None if args.tiny else MODEL
        told = {"base_model": model, "task_type": "CAUSAL_LM"}
        jlora.peft.save(args.out / "adapter", tree, names="llama", portable=True, **told)
        print(f"adapter for PEFT, vLLM, SGLang and llama.cpp: {args.out / 'adapter'}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jlora.examples.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    devices = parser.add_argument_group("devices and processes").add_argument
    devices("--virtual-devices", metavar="N", type=count(1), help="make N devices of this machine's CPU")
    devices(
        "--mesh", metavar="SIZES", type=read_mesh, default=read_mesh("fsdp"),
        help="sizes of the axes data, fsdp and tensor, as in data=2,fsdp=8,tensor=4; -1: the rest (fsdp=-1)",
    )  # fmt: skip
    devices(
        "--distributed", nargs="?", choices=("auto", "on", "off"), const="on", default="auto",
        help="join the processes of Cloud TPU, GKE, Slurm, Open MPI or Kubernetes: where JAX finds one of these, "
        "always, or never (auto; without a choice: on)",
    )  # fmt: skip
    devices("--coordinator", metavar="HOST:PORT", help="where process 0 is to be found, on machines without these")
    devices("--processes", metavar="N", type=count(1), help="how many there are; with --coordinator")
    devices("--process", metavar="I", type=count(0), help="which of them this is, from 0; with --coordinator")
    model = parser.add_argument_group("model").add_argument
    types = {"choices": ("bfloat16", "float32"), "default": "bfloat16"}
    model("--dtype", **types, help="of the computation (%(default)s); adapters and their sums are float32")
    model("--base-dtype", **types, help="of the frozen base (%(default)s)")
    model(
        "--remat", choices=tuple(REMAT), default="none",
        help="what of each layer the backward pass computes again: nothing, all, or all but what attention and MLP add "
        "to the stream (%(default)s)",
    )  # fmt: skip
    model("--rank", metavar="N", type=count(1, 32), default=8, help="rank of the adapters (%(default)s)")
    model("--tiny", action="store_true", help="a random model of two layers that learns bytes: nothing is downloaded")
    training = parser.add_argument_group("training").add_argument
    training("--steps", metavar="N", type=count(1), default=80, help="in all, those before a resume too (%(default)s)")
    training("--batch", metavar="N", type=count(1), default=8, help="windows in a step, of all devices (%(default)s)")
    training("--length", metavar="N", type=count(8, 8192), default=128, help="tokens in a window (%(default)s)")
    training("--accumulate", metavar="N", type=count(1), default=1, help="parts of a batch, one after another (1)")
    training("--lr", metavar="RATE", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    training("--seed", metavar="N", type=count(0), default=0, help="of adapters and the order of windows (%(default)s)")
    files = parser.add_argument_group("files").add_argument
    files(
        "--out", type=Path, default=Path("runs/pod"), metavar="DIR",
        help="for metrics.jsonl and the adapter, which process 0 writes, and for checkpoints (%(default)s)",
    )  # fmt: skip
    files(
        "--checkpoints", metavar="DIR", help="for checkpoints: one directory that all processes see (OUT/checkpoints)"
    )  # fmt: skip
    files("--save-every", metavar="N", type=count(1), default=20, help="steps between checkpoints (%(default)s)")
    files("--evaluate", action="store_true", help="the perplexity of held-out text in the end, with and without LoRA")
    args = parser.parse_args(argv)
    if len({args.coordinator is None, args.processes is None, args.process is None}) > 1:
        parser.error("--coordinator, --processes and --process go together: one process's own number is --process")
    args.checkpoints = args.checkpoints or str(args.out / "checkpoints")
    return args


if __name__ == "__main__":
    sys.exit(main())
