"""The report as Markdown, as one HTML page, and its figures as PNGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL.Image import Image

from ..files import atomic_path
from ..pictures import encode, lines

_MARKDOWN = """\
# A weight space, measured

{{ about.models }} models, {{ about.components }} components of {{ about.numbers }} numbers; \
seed {{ about.seed }}; {{ minutes }} minutes. Intervals are 95%, over people (bootstrap).

| claim | measured | wanted | holds |
| --- | --- | --- | --- |
{% for name, part in parts %}{% for c in part.claims -%}
| {{ c.claim }} | {{ shown(c) }} | {{ c.wanted }} | {{ "yes" if c.holds else "**no**" }} |
{% endfor %}{% endfor %}
{% for name, part in parts %}
## {{ part.title }}
{% for t in part.tables %}
{{ t.title }}:

| {{ t.columns | join(" | ") }} |
|{{ " --- |" * t.columns | length }}
{% for row in t.rows -%}
| {{ row | join(" | ") }} |
{% endfor %}{% endfor %}
{% for note in part.notes %}
{{ note }}
{% endfor %}{% for c in part.curves %}
![{{ c.title }}]({{ name }}-{{ loop.index }}.png)
{% endfor %}{% for p in part.pictures %}
{{ p.title }}:

![{{ p.title }}]({{ p.file }})
{% endfor %}{% endfor %}"""

_HTML = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>w2w evaluate</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }
img { max-width: 100%; display: block }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
.no { background: #fbe3df } .yes { background: #e2f2e6 }
</style>
<h1>A weight space, measured</h1>
<p>{{ about.models }} models, {{ about.components }} components of {{ about.numbers }} numbers;
seed {{ about.seed }}; {{ minutes }} minutes. Intervals are 95%, over people (bootstrap).</p>
<table><tr><th>claim</th><th>measured</th><th>wanted</th><th>holds</th></tr>
{% for name, part in parts %}{% for c in part.claims %}
<tr class="{{ 'yes' if c.holds else 'no' }}"><td>{{ c.claim }}</td><td>{{ shown(c) }}</td>
<td>{{ c.wanted }}</td><td>{{ "yes" if c.holds else "no" }}</td></tr>
{% endfor %}{% endfor %}</table>
{% for name, part in parts %}
<h2 id="{{ name }}">{{ part.title }}</h2>
{% for t in part.tables %}<p>{{ t.title }}:</p>
<table><tr>{% for c in t.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in t.rows %}<tr>{% for x in row %}<td>{{ x }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for note in part.notes %}<p>{{ note }}</p>{% endfor %}
{% for c in part.curves %}<img src="{{ name }}-{{ loop.index }}.png" alt="{{ c.title }}">
{% endfor %}
{% for p in part.pictures %}<p>{{ p.title }}:</p>
<img src="{{ p.file }}" alt="{{ p.title }}">{% endfor %}
{% endfor %}
</html>
"""


def write_pictures(
    out: Path, name: str, pictures: Sequence[tuple[str, Image]]
) -> list[dict[str, str]]:
    """A section's pictures as PNGs beside the report: their titles and files."""
    told = []
    for i, (title, image) in enumerate(pictures, 1):
        file = f"{name}-picture-{i}.png"
        with atomic_path(out / file) as path:
            path.write_bytes(encode(image, "png", {}))
        told.append({"title": title, "file": file})
    return told


def write_pages(out: Path, result: Mapping[str, Any], order: Sequence[str]) -> None:
    """report.md, report.html and a PNG a plot, into the folder of `result`'s report.json."""
    done = result["sections"]
    parts = [(name, done[name]) for name in order if name in done]
    minutes = round(sum(part["seconds"] for _, part in parts) / 60)
    facts = {"about": result["about"], "parts": parts, "minutes": minutes, "shown": _shown}
    for name, part in parts:
        for i, plot in enumerate(part["curves"], 1):
            with atomic_path(out / f"{name}-{i}.png") as path:
                lines(path, plot["lines"], (plot["x"], plot["y"]), plot["title"])
    for file, template, html in (("report.md", _MARKDOWN, False), ("report.html", _HTML, True)):
        text = Environment(autoescape=html, keep_trailing_newline=True).from_string(template)
        with atomic_path(out / file) as path:
            path.write_text(text.render(**facts), encoding="utf-8")


def _shown(claim: Mapping[str, Any]) -> str:
    value, low, high = (f"{claim[key]:.2f}" for key in ("value", "low", "high"))
    return value if low == high == value else f"{value} ({low} to {high})"
