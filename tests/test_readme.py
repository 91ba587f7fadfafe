"""README's Python runs as it stands, in a fresh interpreter without an import of ours before it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_first_example_runs():
    pytest.importorskip("transformers")
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert "timm.create_model('chela_vit_small')" in example
    subprocess.run([sys.executable, "-c", example], check=True, timeout=300)


def test_the_error_shown_is_the_error_raised():
    import chela_plugin

    with pytest.raises(chela_plugin.MixerSpecError) as raised:
        chela_plugin.MixerSpec.parse("chela(log=modal)")
    for line in str(raised.value).splitlines():
        assert line.rstrip() in README, f"README's example shows another message than {line!r}"


def test_the_speed_tables_are_those_of_the_committed_results():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py"], capture_output=True, text=True, check=True)
    for table in done.stdout.strip().split("\n\n"):
        assert table in README, f"README lacks this table, or a digit differs:\n{table}"


def test_the_demos_tables_are_derived_again_from_its_json_lines():
    from typer.testing import CliRunner

    from chela_plugin.cli import app

    folder = ROOT / "benchmarks/results/demo"
    result = CliRunner().invoke(app, ["report", str(folder), "--check", str(ROOT / "README.md")])
    assert result.exit_code == 0, result.output
    assert "2 tables, 0 differences" in " ".join(result.output.split())


def test_readme_refers_to_files_that_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
