"""report.json, report.html, and the demo that writes them."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flexlam_fast.backend import choose
from flexlam_fast.config import (
    BottleneckConfig,
    DecoderConfig,
    EncoderConfig,
    FlexLAMConfig,
    SequenceConfig,
    TranslatorConfig,
)
from flexlam_fast.errors import ConfigError, DataError
from flexlam_fast.evaluate import demo as demo_module
from flexlam_fast.evaluate.charts import latency_chart, return_chart
from flexlam_fast.evaluate.demo import demo, estimate_seconds
from flexlam_fast.evaluate.machine import Machine, look
from flexlam_fast.evaluate.summary import Score, latency
from flexlam_fast.evaluate.table import Cell, RolloutTable, ScenarioScores
from flexlam_fast.report import render_html, write_report
from flexlam_fast.types import VIZDOOM_ACTIONS

pytest.importorskip("matplotlib")

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def scenario(name: str, at_full: Score) -> ScenarioScores:
    cells = tuple(Cell(k, at_full if k == 4 else Score(1.0, 0.5, ()), latency([1.0 * k, 3.0 * k])) for k in (1, 4))
    return ScenarioScores(name, Score(0.25, 0.125, (0.0, 0.5)), Score(8.0, 1.0, (7.0, 9.0)), cells)


@pytest.fixture(scope="module")
def table() -> RolloutTable:
    machine = Machine("cpu (<fast> & small)", 2, (("flexlam_fast", "0.1.0"), ("torch", "2.13.0")))
    rows = (scenario("take_cover", Score(2.0, 0.5, (1.5, 2.5))), scenario("my_way_home", Score(0.5, 0.5, (0.0, 1.0))))
    return RolloutTable(rows, 2, 0, 3, "a <policy>", "reference", machine)


class Page(HTMLParser):
    """Collects what a browser would load, the ids, and what ids are referred to."""

    LOADS = ("src", "href", "xlink:href", "data", "srcset", "poster", "action")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in self.LOADS]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_json_has_the_promised_form(table: RolloutTable, tmp_path: Path) -> None:
    files = write_report(table, tmp_path / "new" / "folder", PNG)
    report: dict[str, Any] = json.loads(files.json.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(report) >= {"scenarios", "backend", "device", "versions"}
    assert list(report["scenarios"]) == ["take_cover", "my_way_home"]
    one = report["scenarios"]["take_cover"]
    assert set(one) == {"random", "expert", "budgets"}
    assert one["random"] == {"mean": 0.25, "ci95": 0.125}
    assert one["expert"] == {"mean": 8.0, "ci95": 1.0}
    assert one["budgets"]["4"] == {"mean": 2.0, "ci95": 0.5, "ms_mean": 8.0, "ms_p50": 8.0, "ms_p99": 11.92}
    assert list(one["budgets"]) == ["1", "4"]
    assert report["backend"] == "reference"
    assert report["versions"]["torch"] == "2.13.0"
    assert files.strip is not None
    assert files.strip.read_bytes() == PNG


def test_page_loads_nothing(table: RolloutTable) -> None:
    html = render_html(table, PNG, "a title")
    page = Page(html)
    assert all(load.startswith(("data:", "#")) for load in page.loads), page.loads
    assert base64.b64encode(PNG).decode() in html
    assert not {"script", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, addresses


def test_page_is_sound(table: RolloutTable) -> None:
    html = render_html(table, PNG, "1 < 2 <script>")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    wanted = {load[1:] for load in page.loads if load.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert wanted
    assert wanted <= set(page.ids)
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags
    assert "a &lt;policy&gt;" in html
    assert "prefers-color-scheme: dark" in html


def test_page_says_what_is_above_random(table: RolloutTable) -> None:
    tiles = re.findall(r'<h3>(\w+)</h3><div class="big">([-\d.]+) .*?<p class="verdict( yes)?">', render_html(table))
    assert tiles == [("take_cover", "2.00", " yes"), ("my_way_home", "0.50", "")]


def test_page_holds_every_row(table: RolloutTable) -> None:
    body = render_html(table).partition("<tbody>")[2].partition("</tbody>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]
    assert rows == [list(row) for row in table.rows()]


def test_charts_take_the_colours_of_the_page(table: RolloutTable) -> None:
    chart = return_chart(table.scenarios[0], 1)
    for word in ("expert", "random", "return", "budget k", "var(--series-1)", "var(--muted)", "var(--sans)"):
        assert word in chart
    assert not re.search(r"#0\d0\d0\d|DejaVu|metadata|<\?xml|DOCTYPE", chart)
    assert chart == return_chart(table.scenarios[0], 1)
    both = latency_chart(table)
    assert {"take_cover", "my_way_home"} <= set(re.findall(r">(\w+)</text>", both))


def test_charts_have_error_bars(table: RolloutTable) -> None:
    # Error bars are one group of line segments per series; without an interval they would have no length.
    spread = re.findall(
        r'id="return-take_cover-LineCollection_1">(.*?)</g>', return_chart(table.scenarios[0]), re.DOTALL
    )
    bars = re.findall(r"M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)", spread[0])
    assert len(bars) == 2
    assert all(x1 == x2 and float(y1) - float(y2) > 5 for x1, y1, x2, y2 in bars)


def test_machine_is_described() -> None:
    machine = look("cpu")
    assert machine.device.startswith("cpu (")
    assert {"flexlam_fast", "torch", "python"} <= {name for name, _ in machine.versions}


# ---- the demo --------------------------------------------------------------------------------------------------------


def small_config(frame: int = 64) -> FlexLAMConfig:
    return FlexLAMConfig(
        frame=frame,
        bottleneck=BottleneckConfig(slots=4),
        encoder=EncoderConfig(depth=1, width=32, heads=2, patch=16),
        decoder=DecoderConfig(depth=1, heads=2, head_dim=16, ffn=32, patch=16, steps=2),
        sequence=SequenceConfig(
            hidden=32, intermediate=64, layers=1, heads=2, kv_heads=2, head_dim=16, patch=16, window=4, stride=2
        ),
        translator=TranslatorConfig(
            depth=1, hidden=8, wide=16, discrete=(len(VIZDOOM_ACTIONS),), names=VIZDOOM_ACTIONS
        ),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flexlam_fast.policy import Policy

    path = tmp_path_factory.mktemp("demo") / "small"
    Policy(small_config()).save_pretrained(path)
    return path


def test_demo_end_to_end(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vizdoom")
    demo(
        str(checkpoint),
        output=tmp_path,
        scenarios=("take_cover",),
        budgets=(1, 4),
        episodes=2,
        sessions=2,
        progress=False,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    row = report["scenarios"]["take_cover"]
    assert set(row["budgets"]) == {"1", "4"}
    assert row["expert"]["mean"] > row["random"]["mean"]
    for told in row["budgets"].values():  # which of them is slower, a busy machine may get wrong
        assert 0 < told["ms_p50"] <= told["ms_p99"]
        assert told["ms_mean"] > 0
    assert (report["backend"], report["episodes"]) == (choose("auto", "cpu").name, 2)
    strip = (tmp_path / "strip.png").read_bytes()
    assert strip.startswith(b"\x89PNG")
    assert base64.b64encode(strip).decode() in (tmp_path / "report.html").read_text()
    said = capsys.readouterr().out
    assert "about" in said.partition("take_cover")[2].splitlines()[0]  # the estimate stands before the table
    assert all(name in said for name in ("report.json", "report.html", "strip.png"))


def test_demo_chooses_episodes_by_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlam_fast.policy import Policy

    policy = Policy.from_pretrained(checkpoint)
    fixed, each = estimate_seconds(policy, 1, (1, 4), 2)
    assert 0 < each < 60
    assert fixed > 0
    monkeypatch.setattr(demo_module, "estimate_seconds", lambda *_: (20.0, 10.0))
    counts = [demo_module._plan(policy, ("take_cover",), (1,), 2, None, seconds) for seconds in (0.0, 75.0, 1e6)]
    assert counts == [4, 5, 10]
    assert demo_module._plan(policy, ("take_cover",), (1,), 2, 33, 0.0) == 33


def test_demo_refuses_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlam_fast.policy import Policy

    Policy(small_config(128)).save_pretrained(tmp_path / "other")
    sentence = "demo: expected a model of square frames of 8 to 120 pixels and 3 channels, got 128x128x3"
    with pytest.raises(ConfigError, match=sentence):
        demo(str(tmp_path / "other"), output=tmp_path / "out", budgets=(1,))
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(
        DataError, match=r'matplotlib: expected it installed, got none; pip install "flexlam_fast\[demo\]"'
    ):
        demo(str(tmp_path / "other"))
