"""The results folder: nothing finished is lost, nothing of others is touched."""

import errno
import os
import subprocess
import sys
import time

import pytest

from chela_plugin.harness import results
from chela_plugin.harness.results import ResultsError, ResultsFolder, open_for_reading, read_records, write_atomically

CONFIG = {"a": {"seeds": [0]}}


def test_records_are_read_back_as_they_were_written(tmp_path):
    with ResultsFolder(tmp_path / "r", CONFIG) as folder:
        folder.append({"record": "run", "cell": "1", "x": 0.1})
        folder.append({"record": "run", "cell": "2", "x": "ü\n|"})
        written = list(folder.records)
    manifest, records = open_for_reading(tmp_path / "r")
    assert records == written
    assert manifest["ablations"] == CONFIG


@pytest.mark.parametrize("cut", range(1, 34))
def test_a_line_torn_anywhere_is_dropped_and_the_lines_before_it_are_kept(tmp_path, cut):
    with ResultsFolder(tmp_path / "r", CONFIG) as folder:
        folder.append({"record": "run", "cell": "1"})
        folder.append({"record": "run", "cell": "2"})
    log = tmp_path / "r" / "results.jsonl"
    os.truncate(log, log.stat().st_size - cut)
    with ResultsFolder(tmp_path / "r", CONFIG) as folder:
        cells = [r["cell"] for r in folder.records]
        assert cells == (["1"] if cut <= len('{"cell":"2","record":"run"}\n') else [])
        folder.append({"record": "run", "cell": "3"})
    assert [r["cell"] for r in read_records(log)[0]] == [*cells, "3"]


def test_damage_in_the_middle_is_an_error_and_nothing_is_removed(tmp_path):
    with ResultsFolder(tmp_path / "r", CONFIG) as folder:
        folder.append({"record": "run", "cell": "1"})
        folder.append({"record": "run", "cell": "2"})
    log = tmp_path / "r" / "results.jsonl"
    damaged = b"#" + log.read_bytes()[1:]
    log.write_bytes(damaged)
    with pytest.raises(ResultsError, match=r"results\.jsonl, line 1"), ResultsFolder(tmp_path / "r", CONFIG):
        pass
    assert log.read_bytes() == damaged


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with (
        pytest.raises(ResultsError, match=r"no results folder \(it holds 'thesis.tex'"),
        ResultsFolder(tmp_path, CONFIG),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_whole_line_that_is_no_record_is_an_error_also_at_the_end(tmp_path):
    with ResultsFolder(tmp_path / "r", CONFIG) as folder:
        folder.append({"record": "run", "cell": "1"})
        folder.append({"record": "run"})
    with pytest.raises(ResultsError, match=r"line 2: not a record of this harness"):
        open_for_reading(tmp_path / "r")


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match=r"cannot write to .*give another --out"):
        ResultsFolder(tmp_path / "file" / "r", CONFIG).__enter__()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "chela-plugin results"}'])
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ResultsError, match="was not written by this harness"), ResultsFolder(tmp_path, CONFIG):
        pass


def test_a_folder_of_another_version_is_refused(tmp_path):
    with ResultsFolder(tmp_path / "r", CONFIG):
        pass
    path = tmp_path / "r" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(ResultsError, match="format version 99, this is version 1"):
        open_for_reading(tmp_path / "r")


def test_another_config_under_the_same_name_is_refused_and_names_the_key(tmp_path):
    with ResultsFolder(tmp_path / "r", CONFIG):
        pass
    with pytest.raises(ResultsError, match=r"different: seeds"), ResultsFolder(tmp_path / "r", {"a": {"seeds": [1]}}):
        pass


def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path):
    first, second = ResultsFolder(tmp_path / "r", CONFIG), ResultsFolder(tmp_path / "r", CONFIG)
    with first, pytest.raises(ResultsError, match="another process is writing"), second:
        pass
    with ResultsFolder(tmp_path / "r", CONFIG):
        pass


def test_a_folder_that_was_never_written_can_not_be_reported(tmp_path):
    with pytest.raises(ResultsError, match=r"no manifest\.json"):
        open_for_reading(tmp_path)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultsFolder(tmp_path / "r", CONFIG) as folder:
        folder.append({"record": "run", "cell": "1"})
        monkeypatch.setattr(results.os, "fsync", full)
        with pytest.raises(ResultsError, match=r"No space left on device\. Finished runs are kept"):
            folder.append({"record": "run", "cell": "2"})
        with pytest.raises(ResultsError, match="No space left on device"):
            write_atomically(tmp_path / "r" / "manifest.json", b"{}")
        monkeypatch.undo()
    manifest, records = open_for_reading(tmp_path / "r")
    assert [r["cell"] for r in records] == ["1"]
    assert manifest["ablations"] == CONFIG
    assert not list((tmp_path / "r").glob(".*.part"))


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    script = (
        "import itertools, pathlib, sys\n"
        "from chela_plugin.harness.results import write_atomically\n"
        "for i in itertools.count():\n"
        "    write_atomically(pathlib.Path(sys.argv[1]), bytes([i % 251]) * 3_000_000)\n"
    )
    target = tmp_path / "state"
    for wait in (0.0, 0.013, 0.029):
        target.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", script, str(target)])
        while not target.exists():
            assert child.poll() is None
            time.sleep(0.005)
        time.sleep(wait)
        child.kill()
        child.wait()
        content = target.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
