"""The `chela` command: what it prints, and that a mistake is one message and exit code 2."""

import importlib.util

import pytest


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
        (["ablate", "digits", "--track", "wanbd"], "choose from wandb, trackio"),
        (["ablate", "digits", "--workers", "2", "--ray", "local"], "--workers and --ray exclude each other"),
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


def test_without_ray_its_option_shows_the_pip_line(chela, tiny, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    code, _, err = chela("ablate", tiny(), "--ray", "local", "--out", tmp_path / "out")
    assert code == 2
    assert "ray is not installed; run: pip install 'chela-plugin[ray]'" in err


def test_time_that_is_up_is_exit_code_75_and_the_command_to_go_on(chela, tiny, tmp_path):
    path, out = tiny(training__steps=100_000, mixers=["identity"], baseline="identity"), tmp_path / "out"
    words = ["ablate", path, "training.evaluate_every=100000", "--out", out, "--workers", 1, "--max-seconds", 1]
    code, text, err = chela(*words)
    assert code == 75, err
    assert f"chela ablate {path} training.evaluate_every=100000 --out {out} --workers 1 --max-seconds 1.0" in text


def test_a_report_whose_runs_had_other_terms_is_an_error(chela, tiny, tmp_path):
    out = tmp_path / "out"
    assert chela("ablate", tiny(), "--workers", 1, "--out", out)[0] == 0
    log = out / "results.jsonl"
    log.write_text(log.read_text().replace('"order":"', '"order":"x', 1))
    assert chela("report", out)[0] == 0  # it is written all the same, and says so
    code, text, _ = chela("report", out, "--check", out / "report.md")
    assert code == 1
    assert "another order of examples than" in text and "equal terms: 2 runs, 1 violations" in text
