"""Writes the README's tables from the files that the commands wrote: ``python bench/readme.py [--check]``.

In ``docs/vizdoom-tiny``, ``*/rollout.md`` come from ``flexlam-fast rollout`` and ``reconstruct.md`` from ``flexlam-fast
reconstruct``; ``bench/results/*.json`` comes from ``pytest bench/ --benchmark-only --write-results``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "docs" / "vizdoom-tiny"


def bench_tables() -> str:
    """One table per device that the benches have run on."""
    parts = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        found = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines = [f"`{found['device']}`, commit `{found['commit'][:9]}`, {found['date']}, {versions}:", ""]
        lines += ["| bench | ours, ms | peer | peer, ms | floor, ms |", "|---|---:|---|---:|---:|"]
        for row in found["rows"]:
            for peer, ms in row["peers"].items() or {"none": float("nan")}.items():
                floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.2f}"
                lines.append(f"| `{row['id']}` | {row['ours_ms']:.2f} | {peer} | {ms:.2f} | {floor} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def render(text: str) -> str:
    """Return the README with every marked block filled from its source."""
    blocks = {
        "rollout": "\n\n".join(path.read_text().strip() for path in sorted(SHIPPED.glob("*/rollout.md"))),
        "reconstruct": (SHIPPED / "reconstruct.md").read_text(),
        "bench": bench_tables(),
    }
    for name, body in blocks.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        filled = f"<!-- {name} -->\n{body.strip()}\n<!-- /{name} -->"
        text, count = pattern.subn(lambda _, filled=filled: filled, text)
        assert count == 1, f"README.md: expected one block {name}, got {count}"
    return text


def main() -> None:
    """Fill README.md, or with ``--check`` end with 1 if it is not what the files say."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md: expected the tables of the files, got others; run make readme" if new != old else 0)
    path.write_text(new)


if __name__ == "__main__":
    main()
