"""Tables and plots are those of the results files, and ``--check`` says when they are not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import plot  # noqa: E402
import report  # noqa: E402
from machine import Machine  # noqa: E402
from measure import OURS  # noqa: E402
from rows import Results, Row  # noqa: E402


def made_up_results(folder: Path) -> Path:
    """A results file of two rows, written by the harness, and a README with nothing in its blocks."""
    results = Results(Machine(torch.device("cpu")))
    peers = {"vector_quantize_pytorch FSQ": 0.4061, "flexlam_fast reference": 0.2}
    results.rows = [
        Row("fsq/fwd/8-5-5-5/256x64/fp32", 0.1, peers, 0.02154, "made up"),
        Row("fsq/host/8-5-5-5/1x1/fp32", 0.0123456, {"three plain torch ops": 0.00617}, 1.5e-6, "made up"),
    ]
    blocks = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in ("rollout", "reconstruct", "bench"))
    (folder / "README.md").write_text(f"# Made up\n{blocks}\n")
    return results.write(folder / "results")


def run_report(folder: Path, *more: str) -> None:
    """Run the report on a folder that :func:`made_up_results` filled."""
    places = {"--results": "results", "--plots": "docs/bench", "--readme": "README.md"}
    report.main([*more, *(word for name, part in places.items() for word in (name, str(folder / part)))])


def test_results_are_written_rendered_and_checked(tmp_path: Path) -> None:
    path = made_up_results(tmp_path)
    found = json.loads(path.read_text())
    assert list(found) == ["device", "commit", "date", "versions", "rows"]
    assert path.stem == found["device"]
    assert found["versions"]["torch"] == torch.__version__
    run_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| bench | ours, ms | peer | peer, ms | times ours | floor, ms |" in text
    assert "| `fsq/fwd/8-5-5-5/256x64/fp32` | 0.100 | vector_quantize_pytorch FSQ | 0.406 | 4.06 | 0.0215 |" in text
    assert "|  |  | flexlam_fast reference | 0.200 | 2.00 |  |" in text
    assert "| `fsq/host/8-5-5-5/1x1/fp32` | 0.0123 | three plain torch ops | 0.00617 | 0.50 | 1.50e-06 |" in text
    image = re.search(r"!\[.*\]\((.*)\)", text)
    assert image
    assert image[1] == f"docs/bench/{path.stem}.svg"
    assert (tmp_path / image[1]).read_text().count("<svg") == 1
    with pytest.raises(SystemExit) as done:
        run_report(tmp_path, "--check")
    assert done.value.code == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("table", "README.md: expected the tables"),
        ("plot", "svg: expected a plot"),
        ("results", "svg: expected a plot"),
    ],
)
def test_check_fails_on_what_is_stale(tmp_path: Path, spoil: str, said: str) -> None:
    path = made_up_results(tmp_path)
    run_report(tmp_path)
    readme, svg = tmp_path / "README.md", tmp_path / "docs" / "bench" / f"{path.stem}.svg"
    if spoil == "table":
        readme.write_text(readme.read_text().replace("4.06", "9.99"))
    elif spoil == "plot":
        svg.unlink()
    else:
        path.write_text(path.read_text().replace("0.4061", "0.4062"))  # 0.406 either way: the table stays
    before = readme.read_text()
    with pytest.raises(SystemExit) as done:
        run_report(tmp_path, "--check")
    assert said in str(done.value.code)
    assert len(str(done.value.code).splitlines()) == 1, "the other file is fresh"
    assert readme.read_text() == before


def test_a_plot_shows_every_bar_and_is_the_same_text_each_time(tmp_path: Path) -> None:
    found = json.loads(made_up_results(tmp_path).read_text())
    svg = plot.draw(found)
    assert svg == plot.draw(found)
    assert "<dc:date>" not in svg
    for told in (
        f"{OURS}: 0.1 ms",
        "vector_quantize_pytorch FSQ: 0.406 ms, 4.06 x ours",
        "fsq/fwd/8-5-5-5/256x64/fp32",
    ):
        assert f">{told}<" in svg
    assert svg.count(" x ours<") == 2
    assert "fsq/host" not in svg, "a host cost has no floor to compare with"
    whole = {**found["rows"][0], "id": "train/lam/tiny/b32"}
    assert "fsq/fwd" not in plot.draw({**found, "rows": [*found["rows"], whole]}), "whole tasks stand for their parts"
    assert plot.is_fresh(svg, found)
    assert not plot.is_fresh(svg, {**found, "commit": "another"})


@pytest.mark.parametrize(
    ("ms", "told"),
    [(1234.5, "1234"), (664.37, "664"), (97.31, "97.3"), (0.3, "0.300"), (0.02154, "0.0215"), (None, "")],
)
def test_numbers_have_three_digits(ms: float | None, told: str) -> None:
    assert report.three_digits(ms) == told


def test_many_rows_are_folded() -> None:
    row = Row("fsq/fwd/x", 1.0, {"peer": 2.0}, 0.5, "")._asdict()
    told = {"device": "d", "commit": "c", "date": "now", "versions": {"torch": "2"}}
    short, long = (report.bench_tables([{**told, "rows": [row] * n}], "docs/bench") for n in (20, 21))
    assert "<details>" not in short
    assert "<details><summary>All 21 rows</summary>" in long
    assert long.count("| `fsq/fwd/x` | 1.00 | peer | 2.00 | 2.00 | 0.500 |") == 21
