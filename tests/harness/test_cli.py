"""The `chela` command: what it prints, and that a mistake is one message and exit code 2."""

import importlib.util
import sys

import pytest

from chela_plugin import cli


@pytest.fixture
def chela(monkeypatch, capsys):
    """`chela('report', 'x')` returns exit code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["chela", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(cli, "console", cli.Console(highlight=False, width=120))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


def test_mixers_are_listed(chela):
    code, out, _ = chela("mixers")
    assert code == 0
    assert "attention" in out and "bidirectional" in out


def test_ablate_ends_with_the_table_and_the_paths_and_report_checks_it(chela, tiny, tmp_path):
    out = tmp_path / "out"
    code, text, err = chela(
        "ablate", tiny(), "training.steps=4", "training.evaluate_every=2", "--workers", 1, "--out", out
    )
    assert code == 0, err
    for shown in ("minus attention", "curves.png", "report.html", "report.md"):
        assert shown in text
    assert chela("report", out, "--check", out / "report.md")[0] == 0
    published = tmp_path / "README.md"
    published.write_text((out / "report.md").read_text().replace("1.0000", "1.0001"))
    code, text, _ = chela("report", out, "--check", published)
    assert code == 1
    assert "published '1.0001', the records give '1.0000'" in text


def test_two_ablations_share_a_folder_and_a_report(chela, tiny, tmp_path):
    one, other = (
        tiny("one", mixers=["identity"], baseline="identity"),
        tiny("other", mixers=["identity"], baseline="identity"),
    )
    code, text, err = chela("ablate", one, other, "training.steps=4", "--workers", 1, "--out", tmp_path / "out")
    assert code == 0, err
    assert "one/digits" in text and "other/digits" in text


def test_a_failed_run_shows_in_the_exit_code(chela, tiny, tmp_path):
    path = tiny(mixers=["attention", "identity"], baseline="identity", backbone__mlp_hidden=4)
    code, text, _ = chela("ablate", path, "--workers", 1, "--out", tmp_path / "out")
    assert code == 1
    assert "UnmatchedParameters" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablate", "digts"], "did you mean 'digits'"),
        (["ablate", "digits", "training.stepz=3"], "did you mean 'steps'"),
        (["ablate", "digits", "mixers=[atention]", "baseline=atention"], "attention"),
        (["ablate", "training.steps=3"], "no ablation given"),
        (["ablate", "digits", "digits"], "two ablations are named 'digits'"),
        (["report", "no/such/folder"], "no results folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(chela, words, message):
    code, _, err = chela(*words)
    assert code == 2
    assert message in err and "Traceback" not in err


def test_a_results_folder_that_is_not_ours_is_refused(chela, tiny, tmp_path):
    code, _, err = chela("ablate", tiny(), "--out", tmp_path)
    assert code == 2
    assert "is no results folder" in err


@pytest.mark.parametrize("package", ["lightning", "sklearn", "matplotlib", "tensorboard"])
def test_a_missing_optional_package_shows_the_pip_line(chela, tiny, tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    code, _, err = chela("ablate", tiny(), "--workers", 1, "--out", tmp_path / "out")
    assert code == 2
    assert f"{package} is not installed; run: pip install 'chela-plugin[harness]'" in err
