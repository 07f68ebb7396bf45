"""A run's report as one HTML file: pictures and style are inside, and there are no scripts.

    text = page("runs/demo", facts, sections, pictures, [Samples("What it writes", note, samples)], config_yaml)

It can be sent by mail, read on a telephone, in light and dark mode, and printed. In the dark, pictures are inverted, so no text
may speak of light and dark colours. All texts from outside, such as names and what a model wrote,
are escaped. The page's policy forbids the browser to load anything.
"""

from __future__ import annotations

import base64
import html
import struct
from typing import NamedTuple

from kindling.tables import Section, as_html, as_html_text


class Picture(NamedTuple):
    """A PNG with its caption, and a text for those who cannot see it."""

    png: bytes
    caption: str
    alt: str


class Sample(NamedTuple):
    """A text of the model: a line that says where it is from, the prompt, the text, and the verdict on it."""

    what: str
    prompt: str
    text: str
    verdict: str = ""


class Samples(NamedTuple):
    """Texts of the model under a heading, with a note on their origin."""

    heading: str
    note: str
    samples: list[Sample]


STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --faint: #595959; --line: #c9c9c9; --box: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181b; --faint: #a8a8a8; --line: #44484d; --box: #22252a; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 64rem; background: var(--page); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
.figure { text-align: right; white-space: nowrap; } .wide { overflow-x: auto; }
.facts td { overflow-wrap: anywhere; } .facts td:first-child { color: var(--faint); overflow-wrap: normal; }
figure { margin: 1rem 0 1.5rem; } figcaption, .faint, ul { color: var(--faint); font-size: .9rem; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
pre { background: var(--box); padding: .75rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; margin: .25rem 0 1rem;
      white-space: pre-wrap; }
.prompt { color: var(--faint); } .warning { color: #b3261e; font-weight: bold; }
@media (prefers-color-scheme: dark) { .warning { color: #ff8a80; } }
@media screen and (prefers-color-scheme: dark) { figure img { filter: invert(.9) hue-rotate(180deg); } }
summary { cursor: pointer; }
@media screen and (max-width: 40rem) {
  body { padding: 1rem; }
  .wide table, .wide tbody, .wide tr, .wide td { display: block; } .wide thead { display: none; }
  .wide tr { padding: .35rem 0; border-bottom: 1px solid var(--line); }
  .wide td { padding: 0; border: 0; text-align: left; white-space: normal; overflow-wrap: anywhere; }
  .wide td[data-label]::before { content: attr(data-label) ": "; color: var(--faint); font-weight: normal; }
  .wide td.name { font-weight: bold; }
}
@media print { :root { --text: #000; --page: #fff; --faint: #444; --box: #f4f4f4; --line: #bbb; }
  body { max-width: none; padding: 0; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } .wide, pre { overflow: visible; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    title: str,
    facts: list[tuple[str, str]],
    sections: list[Section],
    pictures: list[Picture],
    texts: list[Samples],
    config: str,
    config_heading: str = "Config",
) -> str:
    """Return the page; `facts` are names and values, `sections` are tables after the texts, `config` is YAML or commands."""
    rows = "\n".join(f"<tr><td>{as_html_text(name)}</td><td>{as_html_text(value)}</td></tr>" for name, value in facts)
    shown = as_html_text(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{shown}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{shown}</h1>
<table class="facts"><tbody>
{rows}
</tbody></table>
<section>
<h2>Plots</h2>
{"".join(_picture(picture) for picture in pictures)}</section>
{"".join(_samples(found) for found in texts)}{as_html(sections)}<section>
<h2>{as_html_text(config_heading)}</h2>
<details>
<summary>{"config.yaml" if config_heading == "Config" else "all"}</summary>
<pre>{_lines(config)}</pre>
</details>
</section>
</body>
</html>
"""


def _picture(picture: Picture) -> str:
    # from the PNG's header; with the size, the page does not jump while it loads
    width, height = struct.unpack(">II", picture.png[16:24])
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{as_html_text(picture.alt)}">\n<figcaption>{as_html_text(picture.caption)}</figcaption>\n</figure>\n'
    )


def _samples(found: Samples) -> str:
    inner = "".join(_sample(sample) for sample in found.samples)
    head = f'<h2>{as_html_text(found.heading)}</h2>\n<p class="faint">{as_html_text(found.note)}</p>'
    return f"<section>\n{head}\n{inner}</section>\n"


def _sample(sample: Sample) -> str:
    verdict = f" <strong>{as_html_text(sample.verdict)}</strong>" if sample.verdict else ""
    prompt = f'<span class="prompt">{_lines(sample.prompt)}</span>' if sample.prompt else ""
    return f"<p>{as_html_text(sample.what)}{verdict}</p>\n<pre>{prompt}{_lines(sample.text)}</pre>\n"


def _lines(text: str) -> str:
    """Return a text of several lines escaped for HTML; control characters but newline and tab are visible escapes."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text))
