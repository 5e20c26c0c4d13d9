"""Writes the README's tables and the plots from the files that hold the figures: ``python bench/report.py [--check]``.

In ``docs/vizdoom-tiny``, ``*/rollout.md`` come from ``flexlam-fast rollout`` and ``reconstruct.md`` from ``flexlam-fast
reconstruct``; ``bench/results/*.json`` comes from ``pytest bench/ --benchmark-only --write-results``, and is also drawn
into ``docs/bench/*.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plot

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "docs" / "vizdoom-tiny"
HEADER = "| bench | ours, ms | peer | peer, ms | times ours | floor, ms |\n|---|---:|---|---:|---:|---:|"
MOST_ROWS = 20  # a device with more rows is folded


def load_reports(folder: Path) -> list[dict[str, Any]]:
    """Return what every results file in ``folder`` holds, by the file's name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def three_digits(x: float | None) -> str:
    """Three significant digits; more before the point if there are more. None is empty."""
    if x is None:
        return ""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Render one line per row and peer; what a row's further lines would repeat is left empty."""
    lines = [HEADER]
    for row in rows:
        ours, floor = three_digits(row["ours_ms"]), three_digits(row["floor_ms"])
        first = (f"`{row['id']}`", ours, floor)
        for name, ms in row["peers"].items():
            lines.append(
                f"| {first[0]} | {first[1]} | {name} | {three_digits(ms)} | {ms / row['ours_ms']:.2f} | {first[2]} |"
            )
            first = ("", "", "")
        if not row["peers"]:
            lines.append(f"| {first[0]} | {ours} | none | | | {floor} |")
    return "\n".join(lines)


def earlier(rows: Sequence[dict[str, Any]]) -> str:
    """Which rows are of an earlier run than the file's head, by commit."""
    old: dict[str, list[str]] = {}
    for row in rows:
        if "run" in row:
            old.setdefault(f"`{row['run']['commit'][:9]}`, {row['run']['date']}", []).append(row["id"])
    return "".join(f"; {len(ids)} rows from commit {run}: {', '.join(ids)}" for run, ids in old.items())


def bench_tables(reports: Sequence[dict[str, Any]], plots: str) -> str:
    """One table and one plot per device that the benches have run on; ``plots`` is the way to the folder of plots."""
    parts = []
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        image = f"![{report['device']}: times the floor]({plots}/{report['device']}.svg)"
        rows = table(report["rows"])
        if len(report["rows"]) > MOST_ROWS:
            rows = f"<details><summary>All {len(report['rows'])} rows</summary>\n\n{rows}\n\n</details>"
        about = f"`{report['device']}`, commit `{report['commit'][:9]}`, {report['date']}, {versions}"
        about += earlier(report["rows"])
        parts.append(f"{about}:\n\n{image}\n\n{rows}")
    return "\n\n".join(parts)


def render(text: str, reports: Sequence[dict[str, Any]], plots: str) -> str:
    """Return the README with every marked block filled from its source."""
    blocks = {
        "rollout": "\n\n".join(
            path.read_text(encoding="utf-8").strip() for path in sorted(SHIPPED.glob("*/rollout.md"))
        ),
        "reconstruct": (SHIPPED / "reconstruct.md").read_text(encoding="utf-8"),
        "bench": bench_tables(reports, plots),
    }
    for name, body in blocks.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        filled = f"<!-- {name} -->\n{body.strip()}\n<!-- /{name} -->"
        text, count = pattern.subn(lambda _, filled=filled: filled, text)
        assert count == 1, f"README.md: expected one block {name}, got {count}"
    return text


def check(readme: Path, reports: Sequence[dict[str, Any]], plots: Path) -> list[str]:
    """Return one sentence for each thing that is not what the files say."""
    stale = []
    old = readme.read_text(encoding="utf-8")
    if render(old, reports, way(readme, plots)) != old:
        stale.append(f"{readme.name}: expected the tables of the files, got others; run make bench-report")
    for report in reports:
        path = plots / f"{report['device']}.svg"
        if not path.is_file() or not plot.is_fresh(path.read_text(encoding="utf-8"), report):
            stale.append(f"{path.name}: expected a plot of the results, got none or another; run make bench-report")
    return stale


def way(readme: Path, plots: Path) -> str:
    """Return the relative path from the README to the plots, with forward slashes."""
    return Path(os.path.relpath(plots.resolve(), readme.resolve().parent)).as_posix()


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the README and draw the plots, or with ``--check`` end with 1 if they are not what the files say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is stale")
    parser.add_argument("--plots-only", action="store_true", help="leave the README alone")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of results files")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "bench", help="folder of plots")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(argv)
    reports = load_reports(args.results)
    if args.check:
        sys.exit("\n".join(check(args.readme, reports, args.plots)) or 0)
    args.plots.mkdir(parents=True, exist_ok=True)
    for report in reports:
        (args.plots / f"{report['device']}.svg").write_text(plot.draw(report), encoding="utf-8")
    if not args.plots_only:
        old = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(render(old, reports, way(args.readme, args.plots)), encoding="utf-8")


if __name__ == "__main__":
    main()
