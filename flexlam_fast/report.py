"""The report of a rollout: ``report.json`` for programs, and one self-contained ``report.html`` for people."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

from flexlam_fast.evaluate.charts import latency_chart, return_chart
from flexlam_fast.evaluate.files import make_folder, write
from flexlam_fast.evaluate.page import page
from flexlam_fast.evaluate.summary import disjoint_above, normalised
from flexlam_fast.evaluate.table import HEADER, RolloutTable, ScenarioScores, plus_minus

STRIP_NOTE = (
    "Each row is one transition that the expert played. The encoder turns the two real frames on the left into codes; "
    "the decoder sees o<sub>t</sub> and the first k of them, the rest replaced by the null latent, and draws "
    "o<sub>t+1</sub>. The noise is the same in every column. Below each picture: PSNR against the real o<sub>t+1</sub>."
)


#: What a report consists of.
FILES = ("report.json", "report.html", "strip.png")


class ReportFiles(NamedTuple):
    """Where a report was written; ``strip`` is None without a film strip."""

    json: Path
    html: Path
    strip: Path | None


def write_report(
    table: RolloutTable, folder: Path, strip: bytes | None = None, title: str = "FlexLAM at several budgets"
) -> ReportFiles:
    """Write ``report.json``, ``report.html`` and, when there is one, ``strip.png``.

    Args:
        table: the rollout.
        folder: made if it is not there.
        strip: a film strip as PNG.
        title: of the page.

    Raises:
        DataError: if matplotlib is not installed.
        StorageError: naming the file that could not be written.
    """
    make_folder(folder, *FILES)
    data, page_name, picture = (folder / name for name in FILES)
    files = ReportFiles(data, page_name, picture if strip else None)
    html = render_html(table, strip, title)
    write(files.json, json.dumps(table.json(), indent=2) + "\n")
    if files.strip is not None and strip is not None:
        write(files.strip, strip)
    write(files.html, html)
    return files


def render_html(table: RolloutTable, strip: bytes | None = None, title: str = "FlexLAM at several budgets") -> str:
    """Return the whole page: nothing in it is loaded from elsewhere."""
    ks = [cell.budget for cell in table.scenarios[0].cells]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">One checkpoint, {len(ks)} budgets ({", ".join(map(str, ks))} codes per decision), '
        f"{len(table.scenarios)} scenarios, {table.episodes} episodes for every number.</p>",
        _section(f"At the full budget, k = {max(ks)}", _grid(map(_tile, table.scenarios))),
        _section(
            "Return against budget", _grid(_returns(table)) + _note("Bars and bands are 95% confidence intervals.")
        ),
        _section("Latency against budget", _grid([_latency(table), _latency_words(table)])),
        _section("The table", f'<div class="card scroll">{_table(table)}</div>' + _note(escape(table.caption()))),
    ]
    if strip is not None:
        image = base64.b64encode(strip).decode()
        picture = f'<img alt="film strip" src="data:image/png;base64,{image}">'
        parts.append(
            _section("What the codes hold", f'<figure class="film">{picture}</figure><p class="note">{STRIP_NOTE}</p>')
        )
    parts.append(_section("Measured with", f'<div class="card">{_facts(table)}</div>'))
    return page(escape(title), "\n".join(parts))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _grid(cards: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def _note(text: str) -> str:
    return f'<p class="note" style="margin-top:12px">{text}</p>'


def _tile(scenario: ScenarioScores) -> str:
    """The headline of a scenario: where on the way from random to expert the full budget stands."""
    best = max(scenario.cells, key=lambda cell: cell.budget).score
    share = normalised(best.mean, scenario.random.mean, scenario.expert.mean)
    width = 0.0 if share is None else 100 * min(max(share, 0.0), 1.0)
    above = disjoint_above(best, scenario.random)
    verdict = (
        "above random, the 95% intervals do not touch" if above else "the 95% interval touches that of random play"
    )
    mean, _, spread = plus_minus(best).partition(" ")
    return (
        f'<div class="card"><h3>{escape(scenario.name)}</h3><div class="big">{mean} <small>{spread}</small></div>'
        f'<div class="track"><i style="width:{width:.1f}%"></i></div>'
        f'<div class="scale"><span>random {plus_minus(scenario.random)}</span>'
        f"<span>expert {plus_minus(scenario.expert)}</span></div>"
        f'<p class="verdict{" yes" if above else ""}">{verdict}</p></div>'
    )


def _returns(table: RolloutTable) -> list[str]:
    return [
        f'<figure class="card"><h3>{escape(s.name)}</h3>{return_chart(s, i)}</figure>'
        for i, s in enumerate(table.scenarios)
    ]


def _latency(table: RolloutTable) -> str:
    return f'<figure class="card"><h3>one decision, batch 1</h3>{latency_chart(table)}</figure>'


def _latency_words(table: RolloutTable) -> str:
    first = table.scenarios[0].cells
    rows = "".join(
        f"<tr><td>{c.budget}</td><td>{c.latency.mean:.1f}</td><td>{1000 / c.latency.mean:.0f}</td></tr>" for c in first
    )
    head = "<tr><th>k</th><th>ms (mean)</th><th>decisions per second</th></tr>"
    return (
        f'<div class="card"><h3>what a budget buys ({escape(table.scenarios[0].name)})</h3><table>{head}{rows}</table>'
        '<p class="note" style="margin:14px 0 0">The first code comes with the prefill; every further code is one more '
        "pass. The point is the mean, its bar reaches from the median to the 99th percentile.</p></div>"
    )


def _table(table: RolloutTable) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    lines, before = [], ""
    for row in table.rows():
        kind = ' class="same"' if row[0] == before else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
        before = row[0]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _facts(table: RolloutTable) -> str:
    facts = [
        ("policy", table.policy),
        ("backend", table.backend),
        ("device", f"{table.machine.device}, {table.machine.threads} threads"),
        ("versions", ", ".join(f"{name} {version}" for name, version in table.machine.versions)),
        ("episodes", f"{table.episodes} per scenario, budget and agent; seed {table.seed}; sessions {table.sessions}"),
    ]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"
