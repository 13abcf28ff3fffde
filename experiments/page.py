"""A run as one HTML file, to mail or to keep: verdict, tables and pictures, with nothing outside it."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from html import escape

from experiments.history import Check, History
from experiments.report import (
    first_lines,
    layer_table,
    picture_title,
    run_line,
    table_header,
    table_row,
)
from experiments.settings import Settings

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; }
body { max-width: 62em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin-top: 2em; }
pre { font-size: 13px; overflow-x: auto; background: #f5f5f5; padding: 0.8em; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; } td:last-child { overflow-wrap: anywhere; }
td { padding: 0.15em 0.8em 0.15em 0; vertical-align: top; }
.PASS { color: #00664d; } .FAIL { color: #a33b00; font-weight: bold; } .SKIP { color: #666; }
"""


def report_page(
    history: History, settings: Settings, checks: Sequence[Check], pictures: Mapping[str, bytes]
) -> str:
    """The page of a finished run; `pictures` are PNG files by name."""
    assert history.final
    title = escape(picture_title(history, settings))
    table = "\n".join([table_header(history.data).strip("\n"), *map(table_row, history.epochs)])
    return "\n".join([
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1>",
        f"<p>{escape(run_line(history, settings, checks))}</p>",
        f"<pre>{escape(_run(history, settings))}</pre>",
        f"<h2>Verdict</h2>{_table(checks)}",
        f"<h2>Epochs</h2><pre>{escape(table)}</pre>",
        f"<h2>Layers</h2><pre>{escape(layer_table(history.final.count))}</pre>",
        "<h2>Pictures</h2>",
        *(f'<figure><img alt="{escape(name)}" src="data:image/png;base64,'
          f'{base64.b64encode(content).decode()}"></figure>' for name, content in pictures.items()),
        f"<h2>Preflight</h2>{_table(history.preflight) if history.preflight else '<p>off</p>'}",
        "<h2>Settings</h2><table>",
        *(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
          for name, value in history.settings.items()),
        "</table></html>",
        "",
    ])  # fmt: skip


def _run(history: History, settings: Settings) -> str:
    """What ran, from which sources and by which command."""
    assert history.final
    origin = history.origin
    started = f"Started:   {origin.date}, commit {origin.commit or 'none'}"
    command = shlex.join(["python", "-m", "experiments.debug_run", *origin.command])
    return "\n".join([first_lines(history, settings, history.final.count), started, "", command])


def _table(checks: Sequence[Check]) -> str:
    rows = (
        f'<tr><td class="{c.status}">{c.status}</td><td>{escape(c.name)}</td>'
        f"<td>{escape(c.message)}</td></tr>"
        for c in checks
    )
    return "\n".join(["<table>", *rows, "</table>"])
