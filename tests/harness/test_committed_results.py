"""Every committed table of results is derived again from its JSON lines, and its runs had equal terms."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from chela_plugin.cli import app

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOLDERS = sorted(manifest.parent.name for manifest in RESULTS.glob("*/manifest.json"))


def test_there_are_committed_results():
    assert {"demo", "chela_parts"} <= set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_committed_report_is_what_its_json_lines_say(name):
    result = CliRunner().invoke(app, ["report", str(RESULTS / name), "--check", str(RESULTS / name / "report.md")])
    assert result.exit_code == 0, result.output
    assert "0 differences" in " ".join(result.output.split())
