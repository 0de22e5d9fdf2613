"""The gallery: one HTML page of every figure and table of a profile, to be opened from disk."""

import json

import jinja2
import pandas as pd

from lib import paths
from lib.artifacts import replacing

ROWS = 20  # of a table that are shown; the whole stands in its CSV

PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>From Text to Emoji: figures and tables ({{ profile }})</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem 1.5rem; }
 nav a { margin-right: 1rem; } article { margin: 2.5rem 0; border-top: 1px solid #ccc; padding-top: 1rem; }
 img { max-width: 100%; height: auto; } figcaption, .caption { color: #444; }
 table { border-collapse: collapse; font-size: .85rem; } .wide { overflow-x: auto; }
 th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #ddd; }
 code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
</style></head><body>
<h1>From Text to Emoji: figures and tables</h1>
<p>Profile <b>{{ profile }}</b>: {{ figures }} figures and {{ tables }} tables of {{ notebooks|length }} notebooks.
The paper: <a href="https://arxiv.org/abs/2409.10245">arXiv 2409.10245</a>.</p>
<nav>{% for name in notebooks %}<a href="#{{ name }}">{{ name }}</a>{% endfor %}</nav>
{% for name, items in notebooks.items() %}<h2 id="{{ name }}">{{ name }}</h2>
{% for item in items %}<article id="{{ item.stem }}">
<h3>{{ item.stem }}</h3>
{% if item.kind == "figure" %}<figure><img src="{{ item.stem }}.png" alt="{{ item.caption }}" loading="lazy">
<figcaption>{{ item.caption }}</figcaption></figure>
{% else %}<p class="caption">{{ item.caption }}</p><div class="wide">{{ item.html|safe }}</div>
{% if item.cut %}<p>{{ item.cut }} more rows in the CSV.</p>{% endif %}{% endif %}
<p>Paper: {{ item.paper }}. Files: {% for end in item.files %}<a href="{{ item.stem }}.{{ end }}">{{ end }}</a>
{% endfor %}</p><p>Made by <code>{{ item.command }}</code></p></article>
{% endfor %}{% endfor %}</body></html>
""")


def _item(path):
    item = json.loads(path.read_text("utf-8")) | {"stem": path.stem}
    item["files"] = [end for end in ("png", "pdf", "csv", "md", "tex") if path.with_suffix(f".{end}").exists()]
    if item["kind"] == "table":
        table = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
        item["html"] = table.head(ROWS).to_html(index=False, border=0)
        item["cut"] = max(0, len(table) - ROWS)
    return item


def write(profile):
    """Write figures/<profile>/index.html from what notebooks have saved there; returns its path."""
    folder = paths.FIGURES / profile
    items = [_item(p) for p in sorted(folder.glob("[0-9][0-9]_*.json"))]
    notebooks = {}
    for item in items:
        notebooks.setdefault(item["notebook"], []).append(item)
    counts = {f"{kind}s": sum(i["kind"] == kind for i in items) for kind in ("figure", "table")}
    with replacing(folder / "index.html") as tmp:
        tmp.write_text(PAGE.render(profile=profile, notebooks=notebooks, **counts), "utf-8")
    return folder / "index.html"
