"""Tables come from the JSON lines alone, and a published digit that differs is found."""

import re

import pytest

from chela_plugin.harness import figures
from chela_plugin.harness import report as report_file
from chela_plugin.harness.results import ResultsFolder
from chela_plugin.harness.table import Row, check, marker, mean_and_spread, paired_difference, tables

CONFIG = {
    "digits": {
        "tasks": [{"task": "digits"}],
        "mixers": ["chela", "attention", "gone"],
        "baseline": "attention",
        "training": {"steps": 6, "batch_size": 8},
        "learning_rates": [0.01],
        "seeds": [0, 1],
        "parameter_tolerance": 0.02,
    }
}


def run(mixer, seed, validation):
    return {
        "record": "run",
        "ablation": "digits",
        "task": "digits",
        "mixer": mixer,
        "seed": seed,
        "cell": f"{mixer}{seed}",
        "status": "finished",
        "learning_rate": 0.01,
        "metric": "accuracy",
        "validation": validation,
        "validation_loss": 0.1,
        "steps": 6,
        "tokens": 768,
        "data": {"train": "1", "validation": "2"},
        "parameters": 104650,
        "parameter_ratio": 1.0004,
        "tokens_per_second": 1234.5,
        "peak_bytes": None,
        "state": {"fixed": 64, "per_token": 2.0},
        "path": "torch",
        "device": "<script>",
        "versions": {"torch": "2"},
        "revision": {"commit": None},
        "history": {"step": [3, 6], "seconds": [0.1, 0.2], "validation": [0.5, validation]},
    }


def read_test(mixer, seed, value):
    names = {"ablation": "digits", "task": "digits", "mixer": mixer, "seed": seed, "cell": f"{mixer}{seed}"}
    score = {"metric": "accuracy", "test": value, "test_loss": 0.1}
    return {"record": "test", **names, "learning_rate": 0.01, **score, "data": {"test": "3"}}


@pytest.fixture
def folder(tmp_path):
    failed = run("gone", 0, 0.0) | {"status": "failed", "reason": "ImportError: no\nsuch <package>"}
    with ResultsFolder(tmp_path / "r", CONFIG) as results:
        for seed in (0, 1):
            results.append(run("chela", seed, 0.96))
            results.append(run("attention", seed, 0.95))
        results.append(failed)
        for seed, a, b in ((0, 0.97, 0.95), (1, 0.98, 0.94)):
            results.append(read_test("chela", seed, a))
            results.append(read_test("attention", seed, b))
    return tmp_path / "r"


def test_the_table_holds_mean_spread_and_paired_difference(folder):
    (table,) = report_file.write_report(folder).tables
    chela, attention, gone = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert chela["test accuracy, %"] == "97.50 ± 0.71 (2)"
    # differences 2 and 4: mean 3, standard error 1, t quantile at one degree of freedom 12.706
    assert chela["minus attention"] == "+3.00 [-9.71, +15.71]"
    assert attention["minus attention"] == "0"
    assert chela["decoding state"] == "64 + 2 T"
    assert gone["test accuracy, %"] == "-"
    assert table.notes == ["`gone`, learning rate 0.01, seed 0: failed: ImportError: no such <package>"]


def test_a_report_agrees_with_the_records_it_was_made_from(folder):
    written = report_file.write_report(folder)
    assert check(written.markdown.read_text(), written.tables) == (1, [])


@pytest.mark.parametrize("place", range(8))
def test_any_changed_digit_is_found(folder, place):
    written = report_file.write_report(folder)
    text = written.markdown.read_text()
    start = text.index(marker("digits/digits")) + len(marker("digits/digits"))
    end = text.index("\n\n", start)
    digits = [m.start() for m in re.finditer(r"\d", text[start:end])]
    at = start + digits[place * (len(digits) - 1) // 7]
    changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    count, wrong = check(changed, written.tables)
    assert (count, len(wrong)) == (1, 1)
    assert "published" in wrong[0]


def test_a_row_left_out_is_found(folder):
    written = report_file.write_report(folder)
    lines = [line for line in written.markdown.read_text().splitlines() if not line.startswith("| gone")]
    assert check("\n".join(lines), written.tables)[1]


def test_a_table_of_other_results_is_found(folder):
    written = report_file.write_report(folder)
    text = written.markdown.read_text().replace(marker("digits/digits"), marker("bytes/bytes"))
    assert "no such table" in check(text, written.tables)[1][0]


def test_the_page_is_one_file_without_network_or_markup_from_records(folder):
    page = report_file.write_report(folder).page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)\w""", page)
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "<script" not in page and "&lt;package&gt;" in page
    assert page.count("data:image/png;base64,iVBOR") == 1


def test_a_folder_without_any_result_yet_still_reports(tmp_path):
    with ResultsFolder(tmp_path / "r", CONFIG):
        pass
    written = report_file.write_report(tmp_path / "r")
    assert written.curves.read_bytes().startswith(b"\x89PNG")


def test_one_seed_shows_no_spread():
    assert mean_and_spread([1.5], 1) == "1.5 (1)"
    assert paired_difference(Row("a", {}, {0: {"test": 2.0}}), Row("b", {}, {0: {"test": 1.5}}), 1.0, 1) == "+0.5"


def test_differences_pair_only_seeds_that_both_have():
    one, other = Row("a", {}, {0: {"test": 2.0}, 1: {"test": 9.0}}), Row("b", {}, {0: {"test": 1.0}, 2: {"test": 5.0}})
    assert paired_difference(one, other, 1.0, 1) == "+1.0"


def test_an_unfinished_ablation_gives_a_table_of_what_is_there():
    (table,) = tables({"ablations": CONFIG}, [])
    assert [row[1] for row in table.rows] == ["-"] * 3


def test_runs_with_other_terms_are_named_in_the_report(folder):
    log = folder / "results.jsonl"
    log.write_text(log.read_text().replace('"steps":6,', '"steps":5,', 1))
    written = report_file.write_report(folder)
    for text in (written.markdown.read_text(), written.page.read_text()):
        assert "4 finished runs were compared" in text
        assert "another number of steps than" in text


def test_parts_of_the_test_split_get_a_table_that_is_checked_and_a_picture(folder):
    with ResultsFolder(folder, CONFIG) as results:
        records = results.records
    for record in records:
        if record["record"] == "test":
            record["slices"] = {"4 pairs": 1.0, "64 pairs": record["test"]}
    whole, parts = tables({"ablations": CONFIG}, records)
    assert parts.key == "digits/digits by slice"
    assert parts.rows[0] == ["chela", "100.00 ± 0.00 (2)", "97.50 ± 0.71 (2)"]
    published = f"{whole.markdown()}\n\n{parts.markdown()}"
    assert check(published, [whole, parts]) == (2, [])
    assert len(check(published.replace("100.00", "100.01", 1), [whole, parts])[1]) == 1
    assert figures.slices({"ablations": CONFIG}, records).startswith(b"\x89PNG")


def test_speed_and_memory_are_drawn_against_length_where_there_are_several():
    ablations = {f"bytes_{t}": {**CONFIG["digits"], "backbone": {"dim": 8, "depth": 1}} for t in (64, 256)}
    for config in ablations.values():
        config["training"] = {**config["training"], "precision": "32-true"}
    records = [
        run("chela", 0, 0.5) | {"ablation": f"bytes_{t}", "cell": str(t), "sequence_length": t, "peak_bytes": t * 2**20}
        for t in (64, 256)
    ]
    assert figures.scaling({"ablations": ablations}, records).startswith(b"\x89PNG")
    assert figures.scaling({"ablations": ablations}, records[:1]) is None
