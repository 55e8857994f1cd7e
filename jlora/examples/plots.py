"""Pictures: a training run, and text whose tokens have values."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from jlora.examples.training import History, running_mean

BLUE, GREY, ORANGE = "#1f6fb4", "#666666", "#d9741a"


def save_curves(path: Path, history: History, probe: float, final: float) -> None:
    """Draws loss and accuracy over the steps into the PNG file `path`.

    Args:
      path: where to write.
      history: what training recorded.
      probe: held-out accuracy of the frozen probe, the dashed line.
      final: held-out accuracy of the trained model on all held-out sentences.
    """
    # A Figure of its own, not pyplot's: no display is looked for and no global state is left behind.
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _loss_axes(left, history)
    _accuracy_axes(right, history, probe, final)
    figure.suptitle("Movie-review sentiment: all-MiniLM-L6-v2 with LoRA", fontsize=13)
    figure.savefig(path, dpi=150)


def _loss_axes(axes: Axes, history: History) -> None:
    steps = np.arange(1, len(history.loss) + 1)
    axes.plot(steps, history.loss, color=BLUE, alpha=0.3, linewidth=1, label="each batch")
    axes.plot(steps, running_mean(history.loss), color=BLUE, linewidth=2, label="mean of the last 15")
    axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    _finish(axes, len(steps))


def _accuracy_axes(axes: Axes, history: History, probe: float, final: float) -> None:
    steps = np.arange(1, len(history.accuracy) + 1)
    axes.plot(steps, running_mean(history.accuracy), color=BLUE, linewidth=2, label="training, mean of the last 15")
    at, correct = np.reshape(history.subset, (-1, 2)).T
    axes.plot(at, correct, "o", color=ORANGE, label="held out, a subset")
    axes.plot(len(steps), final, "*", color=ORANGE, markersize=15, label=f"held out, all: {final:.1%}", clip_on=False)
    axes.axhline(probe, color=GREY, linestyle="--", label=f"frozen probe: {probe:.1%}")
    axes.set(title="Accuracy", xlabel="step", ylabel="correct", ylim=(0.4, 1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, len(steps))


def _finish(axes: Axes, steps: int) -> None:
    axes.set_xlim(0, max(1, steps) * 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def draw_tokens(
    axes: Axes, tokens: Sequence[str], values: Sequence[float], limit: float, columns: int = 72
) -> AxesImage:
    """Draws a text, each token on a ground whose colour tells its value, from -`limit` (brown) to `limit` (green).

    Args:
      axes: where to draw; all else is taken off it.
      tokens: the text's parts, one after the other; line breaks are shown, and break the line.
      values: one for each token.
      limit: the value of the strongest colours.
      columns: letters in a line, at most.

    Returns:
      The picture of the ground, for a colour bar.
    """
    rows, places = 0, []  # (row, column, letter, value)
    column = 0
    for token, value in zip(tokens, values, strict=True):
        for letter in token:
            places.append((rows, column, "↵" if letter == "\n" else letter, value))
            column += 1
            if letter == "\n" or column == columns:
                rows, column = rows + 1, 0
    ground = np.full((rows + 1, 1 + max(place[1] for place in places)), np.nan)
    for row, column, letter, value in places:
        ground[row, column] = value
        axes.text(column, row, letter, family="monospace", fontsize=9, ha="center", va="center")
    axes.axis("off")
    return axes.imshow(ground, cmap="BrBG", vmin=-limit, vmax=limit, alpha=0.6, aspect="auto")
