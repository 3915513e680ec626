"""The page of `patchmill compare --html`: one file that opens from a disk, with nothing from a network in it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from typing import Any, Final

from matplotlib.figure import Figure

from pipeline.compare_figure import TOP1, Measure, markers_of, measures, panel, styles_of, to_svg
from pipeline.equal_compute import AXES, axis_label
from pipeline.history import History

SIZE: Final = (4.7, 3.1)  # inches of a panel: about the width of a telephone
MOST_POINTS: Final = 700
LOSS_TITLE: Final = "Loss: means over a fortieth of a run, single steps faint"
SVG_DASHES: Final = {"-": "", "--": "4 3", "-.": "7 3 2 3", ":": "2 3"}
SVG_MARKERS: Final = {  # around (20, 6)
    "o": '<circle cx="20" cy="6" r="3.5"/>', "s": '<rect x="16.5" y="2.5" width="7" height="7"/>',
    "^": '<path d="M20 2l4 8h-8z"/>', "D": '<path d="M20 1.5l4.5 4.5-4.5 4.5-4.5-4.5z"/>', "v": '<path d="M20 10l4-8h-8z"/>',
    "P": '<path d="M18.5 2h3v2.5h2.5v3h-2.5V10h-3V7.5H16v-3h2.5z"/>', "X": '<path d="M17 3l6 6m0-6l-6 6" stroke-width="3"/>',
    "*": '<path d="M20 1l1.3 3.6h3.7l-3 2.3 1.2 3.7-3.2-2.2-3.2 2.2 1.2-3.7-3-2.3h3.7z"/>',
}  # fmt: skip
STYLE: Final = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:0 16px 40px;background:#fff;color:#1b1b1b;font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5em;margin:.9em 0 .2em}
h2{font-size:1.15em;margin:1.8em 0 .5em;padding-bottom:.2em;border-bottom:1px solid #ccc}
.small,figcaption,li{color:#555;font-size:.87em}
.key{display:flex;flex-wrap:wrap;gap:.2em 1.4em;margin:.5em 0;padding:0;list-style:none}
.key li{display:flex;align-items:center;gap:.5em;color:#1b1b1b;max-width:100%;overflow-wrap:anywhere}
.key svg{flex:none;width:40px;height:12px;overflow:visible}
.panels{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px 20px}
figure{margin:0}
figure svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;border:1px solid #ddd;border-radius:4px}
table{border-collapse:collapse;width:100%;font-size:.9em}
th,td{padding:.35em .7em;text-align:left;vertical-align:top;border-bottom:1px solid #eee}
td{min-width:8.5em;max-width:26em;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
thead th{min-width:8.5em;max-width:26em;overflow-wrap:anywhere;border-bottom:2px solid}
tbody th{position:sticky;left:0;background:#f6f6f6;font-weight:600;min-width:17em;overflow-wrap:anywhere}
thead th:first-child{position:sticky;left:0;background:#f6f6f6}
tr:last-child>*{border-bottom:0}
@media(max-width:760px){.panels{grid-template-columns:1fr}body{padding:0 10px 30px;font-size:14px}
tbody th,thead th:first-child{min-width:9.5em;max-width:9.5em}}
@media print{.scroll{overflow:visible}figure,tr{break-inside:avoid}}
"""


def _swatch(style: Mapping[str, Any], colour: str) -> str:
    """The line of a legend's entry."""
    dash = f' stroke-dasharray="{SVG_DASHES[style["ls"]]}"' if SVG_DASHES[style["ls"]] else ""
    marker = SVG_MARKERS.get(style.get("marker", ""), "")
    fill = style.get("mfc", colour)
    return (f'<svg viewBox="0 0 40 12" aria-hidden="true" stroke="{colour}" fill="{fill}" stroke-width="1">'
            f'<path d="M1 6h38" stroke-width="2.2"{dash}/>{marker}</svg>')  # fmt: skip


def _key(runs: Sequence[History], names: Sequence[str], measure: Measure | None = None) -> str:
    """The legend: a line a run, and what the markers of a measure mean."""
    entries = [f"<li>{_swatch(style, style['color'])}<span>{escape(name)}</span></li>"
               for style, name in zip(styles_of(runs), names, strict=True)]  # fmt: skip
    entries += [f"<li>{_swatch(style, '#444')}<span>{escape(label)}</span></li>"
                for label, style in (markers_of(measure, runs) if measure else [])]  # fmt: skip
    return f'<ul class="key">{"".join(entries)}</ul>'


def _panels(measure: Measure, runs: Sequence[History], names: Sequence[str], salt: str) -> Iterator[str]:
    for axis, _ in AXES:
        figure = Figure(figsize=SIZE, layout="constrained")
        panel(figure.subplots(), measure, axis, runs, names, MOST_POINTS)
        alt = escape(f"{measure.label} against {axis_label(axis, runs)}")
        yield f'<figure role="img" aria-label="{alt}">{_bare(to_svg(figure, f"{salt}-{axis}"))}</figure>'


def _bare(svg: str) -> str:
    """Without names of XML, which a page does not need, and with the page's letters."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", svg)


def _curves(runs: Sequence[History], names: Sequence[str]) -> Iterator[str]:
    for number, measure in enumerate(measures(runs)):
        title = {TOP1: "Probes: top-1 %, from the untrained weights on"}.get(measure.label, measure.label)
        yield f"<h2>{escape(title if number else LOSS_TITLE)}</h2>"
        yield _key(runs, names, measure)
        yield f'<div class="panels">{"".join(_panels(measure, runs, names, str(number)))}</div>'


def _breakable(heading: str) -> str:
    """A dotted key may be parted at its joints where there is little room."""
    return re.sub(r"([._/])", r"\1<wbr>", escape(heading))


def _table(title: str, rows: Sequence[tuple[str, Sequence[str]]], names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(f'<tr><th scope="row">{_breakable(heading)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
                   for heading, cells in rows)  # fmt: skip
    body = body or f'<tr><th scope="row">none</th>{"<td></td>" * len(names)}</tr>'
    return (f'<h2>{escape(title[:1].upper() + title[1:])}</h2><div class="scroll" tabindex="0"><table><thead><tr><th></th>{head}'
            f"</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def page(runs: Sequence[History], names: Sequence[str], tables: Sequence[tuple[str, Sequence[tuple[str, list[str]]]]],
         notes: Sequence[str]) -> str:  # fmt: skip
    """The whole page: the curves, ``tables`` as (title, rows with a cell a run), and ``notes`` on how to read them."""
    made = f"patchmill {version('patchmill')}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    title = f"{len(runs)} runs side by side"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        # Whatever a run is called, nothing is fetched and nothing runs.
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f'<h1>{title}</h1><p class="small">{escape(made)}</p>', _key(runs, names),
        *(_table(name, rows, names) for name, rows in tables[:2]), *_curves(runs, names),
        *(_table(name, rows, names) for name, rows in tables[2:]),
        f"<h2>How to read it</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in notes)}</ul></body></html>\n",
    ]  # fmt: skip
    return "".join(parts)
