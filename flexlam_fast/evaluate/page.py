"""The frame of ``report.html``: its style and its skeleton. It loads nothing from anywhere."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --paper: #f6f7f9; --card: #ffffff; --ink: #161b26; --muted: #5c6675; --rule: #dfe3e9;
  --good: #18794e; --track: #e8ebf0;
  --series-0: #2f5fdd; --series-1: #c2571a; --series-2: #18794e; --series-3: #8e4ec6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1217; --card: #181c23; --ink: #e7eaf0; --muted: #9aa4b2; --rule: #2c333d;
    --good: #4cc38a; --track: #2a303a;
    --series-0: #7ea2ff; --series-1: #f0955c; --series-2: #4cc38a; --series-3: #c59bee;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1180px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 8px; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 14px; }
h3 { font-size: 15px; margin: 0 0 10px; }
p { margin: 0 0 12px; max-width: 76ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 14px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 20px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.big { font-size: 34px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.15; }
.big small { font-size: 16px; font-weight: 400; color: var(--muted); letter-spacing: 0; }
.scale { display: flex; justify-content: space-between; color: var(--muted); font-size: 13px; }
.track { height: 8px; border-radius: 4px; background: var(--track); margin: 14px 0 6px; overflow: hidden; }
.track i { display: block; height: 100%; border-radius: 4px; background: var(--series-0); }
.verdict { font-size: 14px; margin: 10px 0 0; color: var(--muted); }
.verdict.yes { color: var(--good); }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 500; font-size: 13px; border-top: 0; }
th:first-child, td:first-child { text-align: left; }
tr.same td:first-child, tr.same td:nth-child(4), tr.same td:nth-child(5) { color: transparent; user-select: none; }
tr.same td { border-top-color: transparent; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure { margin: 0; }
figure.film { background: #ffffff; border: 1px solid var(--rule); border-radius: 12px; padding: 8px; overflow-x: auto; }
figure.film img { display: block; width: 100%; min-width: 880px; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


def page(title: str, body: str) -> str:
    """Return a whole document; ``title`` is escaped already, ``body`` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
