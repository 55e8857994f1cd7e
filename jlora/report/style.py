"""The style of the views: two palettes, and which of them the page around asks for."""

from __future__ import annotations

LIGHT = {
    "back": "#ffffff", "text": "#1f2328", "dim": "#5f6771", "line": "#d5dae0", "hover": "#f2f5f8", "plain": "#dfe4ea",
    "adapted": "#0b5cad", "adapted-back": "#dcebfb", "full": "#6a3fb5", "full-back": "#ece4fb",
    "factored": "#0f6b2b", "factored-back": "#d8f3e0", "dense": "#9a3a00", "dense-back": "#ffe3d0",
}  # fmt: skip
DARK = {
    "back": "#191c20", "text": "#e6e9ee", "dim": "#9ba5b0", "line": "#383f48", "hover": "#23282e", "plain": "#3a424c",
    "adapted": "#8cc4ff", "adapted-back": "#143555", "full": "#cdb4ff", "full-back": "#38275c",
    "factored": "#7fe09a", "factored-back": "#143d22", "dense": "#ffb27d", "dense-back": "#53290f",
}  # fmt: skip

# JupyterLab; VS Code; Sphinx's themes and Colab. Where none tells, the reader's system does.
TOLD_LIGHT = ("[data-jp-theme-light=true]", "body.vscode-light", "[data-theme=light]", "html[theme=light]")
TOLD_DARK = ("[data-jp-theme-light=false]", "body.vscode-dark", "body.vscode-high-contrast", "[data-theme=dark]",
             "html[theme=dark]")  # fmt: skip

RULES = """
.jlora-view{background:var(--jl-back);color:var(--jl-text);border:1px solid var(--jl-line);border-radius:8px;
padding:12px 16px;max-width:62em;box-sizing:border-box;font:13px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:anywhere;text-align:left}
.jlora-view .head{padding:0 0 10px;margin:0 0 8px;border-bottom:1px solid var(--jl-line)}
.jlora-view .gauge{display:grid;
grid-template-columns:6.5em minmax(32px,1fr) minmax(0,3.5fr);gap:0 10px;font-variant-numeric:tabular-nums}
.jlora-view .gauge>span:first-child{color:var(--jl-dim)}
.jlora-view .bar{display:flex;height:8px;margin-top:.45em;border-radius:4px;overflow:hidden;background:var(--jl-plain)}
.jlora-view .bar i{display:block;padding:0;border-radius:0;min-width:2px;background:currentColor}
.jlora-view .bar .plain{background:var(--jl-plain)}
.jlora-view details{margin:0;padding:0;border:0;background:none;box-shadow:none}
.jlora-view details>:not(summary){margin-left:7px;padding-left:13px;border-left:1px solid var(--jl-line)}
.jlora-view details>.leaf{padding-left:29px}
.jlora-view details>.each{padding-left:29px}
.jlora-view>.leaf{padding-left:16px}
.jlora-view summary,.jlora-view .leaf{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 16px;
padding-top:1px;padding-bottom:1px}
.jlora-view summary{cursor:pointer;list-style:none;padding-left:16px;position:relative;border-radius:4px;font-size:1em;
font-weight:400}
.jlora-view summary::-webkit-details-marker{display:none}
.jlora-view summary::before{content:"";position:absolute;left:4px;top:.5em;border:4px solid transparent;
border-left:6px solid var(--jl-dim);border-right:0}
.jlora-view details[open]>summary::before{transform:rotate(90deg)}
.jlora-view summary:hover,.jlora-view .leaf:hover{background:var(--jl-hover)}
.jlora-view b{font-weight:600;color:inherit}
.jlora-view summary>span:first-child>b,.jlora-view .told>b{
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
font-size:12.5px}
.jlora-view .told>span,.jlora-view .share,.jlora-view .count,.jlora-view .each{color:var(--jl-dim);
font-size:12px;font-variant-numeric:tabular-nums}
.jlora-view .share{margin-left:auto;white-space:nowrap}
.jlora-view .share b{display:inline-block;min-width:4.6em;text-align:right;color:var(--jl-text);
font:600 12px system-ui,-apple-system,"Segoe UI",sans-serif}
.jlora-view .count{border:1px solid var(--jl-line);border-radius:9px;padding:0 6px}
.jlora-view i{font-style:normal;font-size:11.5px;font-weight:600;padding:1px 7px;border-radius:9px}
.jlora-view details[open]>summary i:not(.dense){display:none}
.jlora-view em{display:block;font-style:normal;color:var(--jl-dense)}
.jlora-view .frozen b,.jlora-view .frozen{color:var(--jl-dim);font-weight:400}
"""


def _palette(selectors: str, palette: dict[str, str]) -> str:
    return f"{selectors}{{{';'.join(f'--jl-{name}:{colour}' for name, colour in palette.items())}}}"


def _within(pages: tuple[str, ...]) -> str:
    return ",".join(f"{page} .jlora-view" for page in pages)


def _mark(name: str) -> str:
    chip = f".jlora-view .{name}{{color:var(--jl-{name});background:var(--jl-{name}-back)}}"
    return f"{chip}.jlora-view .bar .{name}{{background:var(--jl-{name})}}"


STYLE = "<style>{}</style>".format(
    "".join(
        [
            _palette(".jlora-view", LIGHT),
            f"@media (prefers-color-scheme:dark){{{_palette('.jlora-view', DARK)}}}",
            _palette(_within(TOLD_LIGHT), LIGHT),
            _palette(_within(TOLD_DARK), DARK),
            RULES.replace("\n", ""),
            *map(_mark, ("adapted", "full", "factored", "dense")),
        ]
    )
)
