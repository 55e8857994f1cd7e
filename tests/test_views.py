"""`summary` and `explain` in a real browser, on a light page and on a dark one. Skipped where there is no Chromium."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.image import imread

import jlora
from jlora.report.html import COLOURS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = {"light": ("#ffffff", "#1f1f1f"), "dark": ("#111318", "#e6e6e6")}
TOKENS = jnp.zeros((2, 8), jnp.int32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(128, name="up")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(100, 64, name="embed")(tokens)
        for i in range(3):
            x = Block(name=f"layer_{i}")(x)
        gate = self.param("gate", nn.initializers.lecun_normal(), (64, 64))
        return nn.Dense(100, name="head")(x @ jnp.tanh(gate))


def views():
    """Of a small transformer: adapted kernels, one of them used densely, one on a quantised base, a head in full."""
    model = Model()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    quantised = jlora.quant.quantize(params, "nf4", targets="layer_1/up/kernel")
    spec = jlora.LoraSpec(targets=["query", "value", "up", "gate"], rank=4, train=("head",))
    params = jlora.wrap(quantised, spec)
    return jlora.summary(params), jlora.explain(lambda p, x: model.apply({"params": p}, x), params, TOKENS)


def screenshot(folder, body, colours, width=900, height=1000):
    """The pixels of a page, (height, width, 3), from 0 to 255."""
    back, fore = colours
    style = f"<style>body{{background:{back};color:{fore};margin:16px}}</style>"
    (folder / "page.html").write_text(f"<!doctype html><meta charset='utf-8'>{style}{body}", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = f"--disable-component-update --disable-sync --hide-scrollbars --window-size={width},{height}"
    where = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}"]
    command = [CHROMIUM, *flags.split(), *more.split(), *where, (folder / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.round(imread(folder / "page.png")[..., :3] * 255).astype(int)


def has(pixels, colour):
    """How many pixels have a colour, given as #rrggbb."""
    return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("page", PAGES)
def test_marks_and_text_stand_out(page, tmp_path):
    back, fore = PAGES[page]
    for view, marks in zip(views(), (("adapted", "whole"), ("factored", "dense")), strict=True):
        pixels = screenshot(tmp_path, view._repr_html_(), PAGES[page])
        assert has(pixels, back) > 0.7 * pixels[..., 0].size
        assert has(pixels, fore) > 300
        for mark in marks:
            assert has(pixels, COLOURS[mark]) > 200, mark


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_narrow_page_hides_nothing(tmp_path):
    """Lines are wrapped, not cut: as much is drawn, on more rows."""
    summary = views()[0]._repr_html_()
    narrow = f"<div style='width:300px'>{summary}</div>"
    narrow, wide = (screenshot(tmp_path, body, PAGES["light"]) for body in (narrow, summary))
    drawn = lambda pixels: pixels.min(-1) < 128
    assert drawn(narrow).any(1).sum() > 1.1 * drawn(wide).any(1).sum()
    assert drawn(narrow)[:, 330:].sum() == 0


def test_white_on_the_marks_is_readable():
    """A contrast of 4.5 or more, as WCAG asks of text."""
    for colour in COLOURS.values():
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = np.dot(linear, [0.2126, 0.7152, 0.0722])
        assert 1.05 / (luminance + 0.05) >= 4.5, colour
