"""The views of `summary` and `explain` in a real browser, on pages of all kinds. Skipped where there is no Chromium."""

import functools
import html
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.image import imread

import jlora
from jlora.report.style import DARK, LIGHT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars""".split()
_skipped = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")
needs_chromium = lambda test: pytest.mark.slow(_skipped(test))  # it starts a browser


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(256, name="up")(x))), None


class Model(nn.Module):
    """Two blocks one by one, six in a scan, a kernel that is used densely, a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(1000, 64, name="embed")(tokens)
        for i in range(2):
            x, _ = Block(name=f"stem_{i}")(x)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=6)
        x, _ = layers(name="layers")(x, None)
        gate = self.param("gate", nn.initializers.lecun_normal(), (64, 64))
        return nn.Dense(1000, name="head")(nn.LayerNorm(name="norm")(x @ jnp.tanh(gate)))


@functools.cache
def views():
    """The summary and the explanation of that model, one of its bases quantised, its head trained in full; a plan."""
    model, tokens = Model(), jnp.zeros((2, 8), jnp.int32)
    fn = lambda params, tokens: model.apply({"params": params}, tokens)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    base = jlora.quant.quantize(shapes, targets="stem_1/up/kernel")
    spec = jlora.LoraSpec(
        targets=["query", "value", "up", "gate", "embed"],
        rank=4,
        train=("head",),
        axes={"gate": jlora.Axes((0,), (1,))},
    )
    params = jlora.wrap(base, spec, sites=jlora.sites(fn, base, tokens))
    return jlora.summary(params), jlora.explain(fn, params, tokens)


def browse(folder, body, *flags, page=""):
    """Opens a page in Chromium; returns what it writes. `page` goes into the tag of its body."""
    path = folder / "page.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body {page}>{body}", encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.decode()


def pixels(folder, body, *flags, size=(950, 1100), page=""):
    """Of a page, (height, width, 3), from 0 to 255."""
    shot = folder / "page.png"
    browse(folder, body, *flags, f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}", page=page)
    return np.round(imread(shot)[..., :3] * 255).astype(int)


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def area(image, colour):
    """How many pixels have a colour."""
    return int((image == rgb(colour)).all(-1).sum())


def contrast(a, b):
    """Of two colours, as WCAG has it: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""

    def luminance(colour):
        channels = np.array(rgb(colour)) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


SYSTEM_DARK = "--blink-settings=preferredColorScheme=0"
PAGES = {
    "plain": ("", (), LIGHT),
    "dark system": ("", (SYSTEM_DARK,), DARK),
    "JupyterLab, light": ("data-jp-theme-light=true", (SYSTEM_DARK,), LIGHT),
    "JupyterLab, dark": ("data-jp-theme-light=false", (), DARK),
    "VS Code, light": ("class=vscode-light", (SYSTEM_DARK,), LIGHT),
    "VS Code, dark": ("class=vscode-dark", (), DARK),
    "Sphinx, dark": ("data-theme=dark", (), DARK),
}


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
def test_colours_are_those_of_the_page(name, tmp_path):
    """What the notebook tells goes before what the system tells."""
    page, flags, palette = PAGES[name]
    other = DARK if palette is LIGHT else LIGHT
    for view, marks in zip(views(), (("adapted", "full"), ("factored", "dense")), strict=True):
        image = pixels(tmp_path, view._repr_html_(), *flags, page=page)
        assert area(image, palette["back"]) > 100_000
        assert area(image, palette["text"]) > 500 and area(image, palette["dim"]) > 300
        for mark in marks:
            assert area(image, palette[f"{mark}-back"]) > 300 and area(image, palette[mark]) > 30, mark
        assert area(image, other["adapted-back"]) == area(image, other["factored-back"]) == 0


@needs_chromium
def test_bars_are_as_long_as_their_parts(tmp_path):
    """Of parameters and of bytes: what trains, in the colour of what is adapted, and the rest of the bar."""
    summary = views()[0]
    image = pixels(tmp_path, summary._repr_html_())
    trained, rest = ((image == rgb(LIGHT[name])).all(-1).sum(1) for name in ("adapted", "plain"))
    bars = [(int(trained[row]), int(rest[row])) for row in np.flatnonzero(rest > 80)]
    sums = summary.totals
    first, last = (max(part, key=sum) for part in (bars[: len(bars) // 2], bars[len(bars) // 2 :]))
    for (part, left), share in ((first, sums.percent / 100), (last, sums.trained_bytes / sums.all_bytes)):
        assert part / (part + left) == pytest.approx(share, abs=0.02)


@needs_chromium
def test_modules_fold(tmp_path):
    """Opened, a page shows more; a click is all it takes, since the browser knows how to fold."""
    page = views()[0]._repr_html_()
    opened = re.sub(r"<details(?! open)", "<details open", page)
    drawn = [area(pixels(tmp_path, p, size=(950, 2400)), LIGHT["adapted-back"]) for p in (page, opened)]
    assert page.count("<details") > page.count("<details open") > 0 and drawn[1] > 1.2 * drawn[0]
    click = "<script>document.querySelector('details:not([open])>summary').click()</script>"
    assert browse(tmp_path, page + click, "--dump-dom").count("<details open") == page.count("<details open") + 1


MEASURE = """<pre id=out></pre><script>
const style = x => {
  const s = getComputedStyle(x);
  return [s.color, s.backgroundColor, s.display, s.font, s.margin, s.padding, s.border].join(" ")
};
const inside = [...document.querySelectorAll(".jlora-view, .jlora-view *")];
document.querySelector("#out").textContent = JSON.stringify({
  outside: [...document.querySelectorAll("#outside *")].map(style),
  cut: inside.filter(x => x.scrollWidth > x.clientWidth + 1 && getComputedStyle(x).display != "inline").length,
  right: Math.max(0, ...inside.map(x => x.getBoundingClientRect().right)),
  active: inside.filter(x => x.matches("script,img,link,iframe")).length,
  names: inside.filter(x => x.matches("b")).map(x => x.textContent),
})</script>"""


def measured(folder, body):
    """What the browser itself finds of a page, with scripts of the test's own."""
    dom = browse(folder, f"{body}{MEASURE}", "--dump-dom", "--window-size=950,900")
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))


@needs_chromium
def test_styles_do_not_leak(tmp_path):
    """What stands outside of the view, under the same names, is as it was."""
    names = "head gauge bar told share count each leaf frozen adapted full factored dense plain".split()
    inner = "".join(f"<i class={name}>x</i>" for name in names)
    outside = f"<div id=outside>{inner}<details open><summary>x</summary><div>x</div></details><b>x</b><em>x</em></div>"
    alone = measured(tmp_path, outside)
    for view in views():
        assert measured(tmp_path, outside + view._repr_html_())["outside"] == alone["outside"]


@needs_chromium
@pytest.mark.parametrize("width", [300, 400, 900])
def test_nothing_is_cut_or_sticks_out(width, tmp_path):
    name = "a" * 300
    odd = jlora.wrap({name: {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}, jlora.LoraSpec(rank=1))
    for view in (*views(), jlora.summary(odd)):
        page = re.sub(r"<details(?! open)", "<details open", view._repr_html_())
        found = measured(tmp_path, f"<div style='width:{width}px'>{page}</div>")
        assert found["cut"] == 0 and found["right"] <= width + 9, found


@needs_chromium
def test_names_are_text(tmp_path):
    name = "<script>document.title='no'</script><img src=x onerror=alert(1)>&amp;"
    wrapped = jlora.wrap({name: jnp.ones((4, 4))}, jlora.LoraSpec(targets=lambda path, leaf: True, rank=1))
    for view in (jlora.summary(wrapped), jlora.explain(lambda p, x: x @ p[name], wrapped, jnp.ones((2, 4)))):
        found = measured(tmp_path, view._repr_html_())
        assert found["active"] == 0 and name in found["names"]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_readable(palette):
    """A contrast of 4.5 at least, which WCAG asks of small text."""
    backs = [palette["back"], palette["hover"]]
    texts = [(palette[text], back) for text in ("text", "dim", "dense") for back in backs]
    marks = [(palette[mark], palette[f"{mark}-back"]) for mark in ("adapted", "full", "factored", "dense")]
    assert min(contrast(*pair) for pair in texts + marks) >= 4.5
    assert contrast(palette["adapted"], palette["plain"]) >= 3, "the parts of a bar"


def test_nothing_comes_from_outside():
    for view in views():
        page = view._repr_html_()
        assert not re.search(r"<script|<link|<img|url\(|@import|https?:|javascript:|\son\w+=", page)
        style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
        selectors = re.sub(r"\{[^{}]*\}", "{}", style.replace("@media (prefers-color-scheme:dark)", "")).split("{}")
        assert all(
            ".jlora-view" in part
            for selector in selectors
            for part in re.split(r",(?![^(]*\))", selector.strip("{}"))
            if part
        )
