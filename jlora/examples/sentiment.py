"""Teaches a sentence encoder the sentiment of movie reviews with LoRA: a real fine-tune, from an empty directory.

all-MiniLM-L6-v2 (22.6M parameters) learns from 2,000 rated sentences and is measured on 1,000 held-out ones, next to a
logistic regression on its frozen features: the probe. The head starts from the probe's, so that the difference is what
the encoder learns. The adapter is saved as PEFT's files and the merged model as safetensors, by PyTorch's names, with
the head as `classifier` (on the mean of the words' vectors, not on BERT's pooler). On two CPU cores all of it takes
about five minutes.

The first Ctrl-C in training ends it after the step under way, saves the adapter so far and exits with code 130.

References:
  Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014:
  the ratings of the sentences;
  Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", arXiv:2202.10054:
  the head fitted first.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.examples.fetch import MINILM, MOVIES, FetchError, fetch, read_member
from jlora.examples.minilm import Classifier, MiniLM, encode, load_params, load_tokenizer
from jlora.examples.plots import save_curves
from jlora.examples.probe import fit_probe
from jlora.examples.training import BATCH, Data, accuracy, count, exit_code, in_batches, interrupt_flag, train

RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LENGTH, SCALE = 64, 2
NAMES, MODEL = "bert-classifier", "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES = (
    "A warm, funny film that earns every one of its tears.",
    "The jokes are stale and the ending makes no sense.",
    "The plot is thin, but the leads are a joy to watch.",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code."""
    args = parse(argv)
    return exit_code(lambda: run(args), FetchError, AdapterError, OSError)


def run(args: argparse.Namespace) -> int:
    """The job from download to the last line; returns the exit code."""
    args.out.mkdir(parents=True, exist_ok=True)
    folder, tokenizer, train_set, held_out = prepare(args)
    model, encoder = Classifier(), jax.device_put(load_params(folder))
    plain, adapted = jax.jit(model.apply), jax.jit(jlora.apply(model.apply))
    start = {"encoder": encoder, "head": fit_head(encoder, train_set)}
    probe = accuracy(plain, start, held_out, "held out, probe")

    params = adapt(start, args)
    print(jlora.summary(params), flush=True)

    subset = {name: values[: args.subset] for name, values in held_out.items()}
    measure = partial(accuracy, adapted, data=subset)
    with interrupt_flag() as stop:
        params, history = train(model, params, train_set, args, stop, measure)
    adapter = args.out / "adapter"
    jlora.peft.save(adapter, params, names=NAMES, base_model=MODEL)
    if stop.is_set():
        print(f"stopped after {len(history.loss)} of {args.steps} steps; the adapter so far is in {adapter}")
        return 130

    size = against(adapter / "adapter_model.safetensors", folder / "model.safetensors")
    print(f"adapter, for PEFT: {adapter}, {size}")
    merged = export(args.out / "merged", params)
    lora = report(plain, adapted, params, merged, held_out)
    written_aside(args.out / "curves.png", lambda path: save_curves(path, history, probe, lora))
    print(f"curves: {args.out / 'curves.png'}")
    classify(adapted, params, tokenizer, args.sentences)
    print(f"accuracy on {len(held_out['labels']):,} held-out sentences, of the frozen probe and of LoRA:")
    print(f"probe {probe:.1%}\nLoRA {lora:.1%}", flush=True)
    return 0


def prepare(args: argparse.Namespace) -> tuple[Path, Any, Data, Data]:
    """Returns the model's folder, the tokenizer, the training set and the held-out set."""
    folder = fetch(MINILM)
    tokenizer = load_tokenizer(folder, LENGTH)
    movies = movie_sentences(fetch(MOVIES) / "hutto_ICWSM_2014.tar.gz")
    # One split whatever the settings, so that an adapter of one run can be measured by another.
    held, rest = np.split(np.random.default_rng(0).permutation(len(movies)), [1_000])
    train_set = dataset(tokenizer, movies, rest[: args.train])
    return folder, tokenizer, train_set, dataset(tokenizer, movies, held[: args.held_out])


def movie_sentences(archive: Path) -> list[tuple[str, int]]:
    """Returns the sentences whose mean rating is at least 0.5 from neutral, each once, with 1 for a positive rating."""
    lines = read_member(archive, RATINGS).decode().splitlines()
    ratings = {text.strip(): float(rating) for _, rating, text in (line.split("\t") for line in lines)}
    return [(text, int(rating > 0)) for text, rating in ratings.items() if abs(rating) >= 0.5]


def dataset(tokenizer: Any, movies: list[tuple[str, int]], rows: np.ndarray) -> Data:
    """Returns the chosen sentences, encoded, with their labels."""
    texts, labels = zip(*(movies[row] for row in rows), strict=True)
    return {**encode(tokenizer, texts), "labels": np.array(labels, np.int32)}


def fit_head(encoder: Any, train_set: Data) -> dict[str, jax.Array]:
    """Returns the probe: the head's parameters fitted to the frozen encoder's features."""
    features = jnp.asarray(in_batches(jax.jit(MiniLM().apply), encoder, train_set, "frozen features"))
    labels = jnp.asarray(train_set["labels"])
    return fit_probe(features, labels, classes=2)


def adapt(params: Any, args: argparse.Namespace) -> Any:
    """Returns the parameters with an adapter on each linear layer, new or resumed, and the head to train in full.

    Raises:
      AdapterError: if what is resumed from is no adapter of this model.
    """
    if args.resume:
        try:
            return jlora.peft.load(args.resume, params, names=NAMES)
        except ValueError as error:
            raise AdapterError(str(error)) from error
    rank = args.rank
    spec = jlora.LoraSpec(targets="all-linear", rank=rank, alpha=SCALE * rank, train=("head",), seed=args.seed)
    return jlora.wrap(params, spec)


def export(folder: Path, params: Any) -> Any:
    """Returns the merged parameters as they are in the file that it writes."""
    jlora.peft.to_safetensors(params, folder, names=NAMES)
    print(f"merged model, by PyTorch's names: {folder}")
    return jlora.peft.from_safetensors(folder, like=jax.eval_shape(jlora.unwrap, params), names=NAMES)


def report(plain: Callable, adapted: Callable, params: Any, merged: Any, held_out: Data) -> float:
    """Returns the accuracy of the adapted model, having printed how the merged model's predictions compare."""
    logits = in_batches(adapted, params, held_out, "held out, LoRA")
    found = in_batches(plain, merged, held_out, "held out, merged")
    same = (logits.argmax(-1) == found.argmax(-1)).sum()
    gap = np.abs(logits - found).max()
    print(f"merged model: predictions identical on {same}/{len(logits)} held-out sentences "
          f"(max |logit difference| {gap:.1e})")  # fmt: skip
    return float((logits.argmax(-1) == held_out["labels"]).mean())


def classify(adapted: Callable, params: Any, tokenizer: Any, sentences: list[str]) -> None:
    """Prints one line a sentence: its predicted sentiment, the probability of that, and the sentence."""
    positive = jax.nn.softmax(in_batches(adapted, params, encode(tokenizer, sentences)))[:, 1]
    for p, sentence in zip(positive, sentences, strict=True):
        print(f"{'positive' if p > 0.5 else 'negative'} {max(p, 1 - p):6.1%}  {sentence}")


class AdapterError(ValueError):
    """An adapter that does not fit the model."""


def written_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` on a path beside `path` and renames the result, so that `path` is never half a file."""
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def against(adapter: Path, model: Path) -> str:
    """Returns the size of the adapter's file against the model's, in words."""
    small, large = adapter.stat().st_size, model.stat().st_size
    return f"{small / 1e6:.2f} MB, {small / large:.1%} of the model's {large / 1e6:.1f} MB"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the settings of the command line, `steps` worked out."""
    parser = argparse.ArgumentParser(
        prog="python -m jlora.examples.sentiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sentences", nargs="*", default=list(SENTENCES), help="sentences to classify at the end")
    add("--quick", action="store_true", help="30 steps on 480 sentences, 256 held out: to see that all works")
    add("--out", type=Path, default=Path("runs/sentiment"), metavar="DIR", help="where files go (%(default)s)")
    add("--epochs", metavar="N", type=count(1), default=2, help="passes over the training sentences (%(default)s)")
    add("--steps", metavar="N", type=count(0), help="batches of 32 to train on, instead of --epochs")
    add("--rank", metavar="N", type=count(1, MiniLM.width), default=8, help="rank of the adapters (%(default)s)")
    add("--lr", metavar="RATE", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    add("--seed", metavar="N", type=count(0), default=0, help="of the adapters and the order of batches (%(default)s)")
    add("--resume", type=Path, metavar="DIR", help="start from this adapter; with --steps 0, only measure it")
    args = parser.parse_args(argv)
    args.train, args.held_out, args.subset = (480, 256, 64) if args.quick else (2_000, 1_000, 192)
    if args.steps is None:
        args.steps = 30 if args.quick else args.epochs * (args.train // BATCH)
    return args


if __name__ == "__main__":
    sys.exit(main())
