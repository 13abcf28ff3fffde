"""A run as one HTML file, to mail or to keep: verdict, tables and pictures, with nothing outside it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from experiments.history import Check, History
from experiments.report import layer_table, table_header, table_row

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; }
body { max-width: 62em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin-top: 2em; }
pre { font-size: 13px; overflow-x: auto; background: #f5f5f5; padding: 0.8em; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; } td { padding: 0.15em 0.8em 0.15em 0; vertical-align: top; }
.PASS { color: #00664d; } .FAIL { color: #a33b00; font-weight: bold; } .SKIP { color: #666; }
"""


def report_page(
    history: History, title: str, line: str, checks: Sequence[Check], pictures: Mapping[str, bytes]
) -> str:
    """The page of a finished run; `line` says the run in one line, `pictures` are PNG files by name."""
    assert history.final
    table = "\n".join([table_header(history.data).strip("\n"), *map(table_row, history.epochs)])
    origin = history.origin
    return "\n".join([
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>',
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(line)}</p>",
        f"<p>Started {escape(origin.date)}, commit {escape(origin.commit or 'none')}, "
        f"{escape(history.device)}, {escape(history.precision)}. "
        f"Data: {escape(history.data.name)} ({escape(history.data.source)}).</p>",
        "<h2>Verdict</h2><table>",
        *(f'<tr><td class="{c.status}">{c.status}</td><td>{escape(c.name)}</td>'
          f"<td>{escape(c.message)}</td></tr>" for c in checks),
        "</table>",
        f"<h2>Epochs</h2><pre>{escape(table)}</pre>",
        f"<h2>Layers</h2><pre>{escape(layer_table(history.final.count))}</pre>",
        "<h2>Pictures</h2>",
        *(f'<figure><img alt="{escape(name)}" src="data:image/png;base64,'
          f'{base64.b64encode(content).decode()}"></figure>' for name, content in pictures.items()),
        "<h2>Settings</h2><table>",
        *(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
          for name, value in history.settings.items()),
        f"</table><p>{escape(', '.join(f'{k} {v}' for k, v in history.versions.items()))}</p></html>",
        "",
    ])  # fmt: skip
