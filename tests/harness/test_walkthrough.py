"""docs/compare-your-mixer.md: every block of it runs, from the mixer's file to the checked table."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from chela_plugin import cli

PAGE = Path(__file__).parents[2] / "docs" / "compare-your-mixer.md"
# The page's own commands at a size for a test: the same mixers, fewer and shorter steps.
SMALLER = [
    *("training.steps=4", "training.warmup_steps=1", "training.evaluate_every=2", "learning_rates=[1e-3]", "seeds=[0]"),
    *("tasks.0.context=32", "tasks.0.train_bytes=4000", "tasks.0.validation_bytes=1000", "tasks.0.test_bytes=1000"),
    "training.accelerator=cpu",
]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(file or '', language, text) of each fenced block."""
    return re.findall(r"(?:<!-- file: (\S+) -->\n)?```(\w+)\n(.*?)```", page, flags=re.DOTALL)


def install(project: Path) -> None:
    """What pip's editable install leaves of pyproject.toml: the entry point's metadata, and the folder on the path."""
    text = (project / "pyproject.toml").read_text()
    name, version = (re.search(rf'^{key} = "(.+)"$', text, flags=re.MULTILINE)[1] for key in ("name", "version"))
    group, entry = re.search(r'^\[project\.entry-points\."(.+)"\]\n(\w+ = ".+")$', text, flags=re.MULTILINE).groups()
    info = project / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + entry.replace('"', "") + "\n")


def test_the_page_leads_from_one_file_to_a_checked_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "console", cli.Console(highlight=False, width=120))

    def command(words: list[str]) -> str:
        extra = [*SMALLER, "--workers", "1"] if words[:2] == ["chela", "ablate"] else []
        monkeypatch.setattr(sys, "argv", [*words, *extra])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        assert not exit.value.code, printed.out + printed.err
        return printed.out

    shown = ""
    ran = []
    for file, language, text in blocks(PAGE.read_text(encoding="utf-8")):
        if file:
            (tmp_path / file).write_text(text)
        elif language == "python":
            exec(compile(text, f"{PAGE.name}, python", "exec"), {})
            ran.append("python")
        elif language == "sh":
            for line in text.splitlines():
                words = shlex.split(line)
                ran.append(" ".join(words[:2]))
                if words[0] == "pip":
                    install(tmp_path)
                else:
                    shown += command(words)
    assert ran == ["pip install", "chela mixers", "python", "chela ablate", "chela report", "chela report"]
    assert "ema-mixer" in shown
    report = (tmp_path / "runs" / "compare" / "report.md").read_text()
    for mixer in ("ema", "attention", "gla", "ema + attention"):
        assert f"| {mixer} |" in report
    assert "equal terms: 4 runs, 0 violations" in shown
    assert "1 tables, 0 differences" in shown
