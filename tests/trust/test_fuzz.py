"""Untrusted input: mixer strings, presets, YAML, results files and checkpoints are data.

Whatever is in them, nothing runs, nothing takes a second, nothing raises but our errors. A few thousand inputs in CI,
200,000 with CHELA_NIGHTLY=1 (tests/conftest.py).
"""

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chela_plugin.harness.config import ConfigError, load_ablation, shipped
from chela_plugin.harness.results import ResultsError, load_tensors, open_for_reading, read_records, save_tensors
from chela_plugin.harness.table import tables
from chela_plugin.harness.train.config import load_run
from chela_plugin.harness.train.config import shipped as shipped_runs
from chela_plugin.registry import MixerSpecError, MixerUnavailableError, parse_pattern
from chela_plugin.registry.presets import read_preset

NIGHTLY = settings.get_current_profile_name() == "nightly"


def fuzzed(ci: int, nightly: int) -> settings:
    """The nightly counts of this file add up to 200,000."""
    return settings(
        max_examples=nightly if NIGHTLY else ci,
        deadline=None,  # of the clock on the wall, which a busy machine stretches; `harmless` counts processor time
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class"}
watched: list[str] | None = None


def look(event: str, arguments: tuple) -> None:
    if watched is not None and event in RUNS:
        watched.append(f"{event} {arguments!r}"[:300])


sys.addaudithook(look)  # it can't be removed, only told to look away


@contextlib.contextmanager
def harmless():
    """A process, connection or unpickling that a fuzzed input starts fails the test, and so does a second's work.

    The collector waits meanwhile: after 100,000 examples a round of it took 1.9 s, which was no input's doing.
    """
    global watched
    watched = []
    gc.disable()
    start = time.thread_time()
    try:
        yield
    finally:
        seen, watched = watched, None
        taken = time.thread_time() - start
        gc.enable()
        assert not seen, "\n".join(seen)
        assert taken < 1.0, f"{taken:.1f} s"


def mutated(seeds: list[str], pieces: list[str]) -> st.SearchStrategy[str]:
    """A seed with up to six edits: a piece or a character put in, a run cut out, a run repeated."""
    place = st.integers(0, 10_000)
    piece = st.sampled_from(pieces) | st.characters() | st.text(max_size=4)
    edit = st.tuples(place, st.integers(0, 8), piece, st.integers(0, 3))

    def apply(seed: str, edits: list[tuple[int, int, str, int]]) -> str:
        for at, length, new, times in edits:
            at %= len(seed) + 1
            seed = seed[:at] + new + seed[at : at + length] * times + seed[at + length :]
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=6))


SPECS = [
    "chela(head_dim=64, long=modal)",
    "3*chela + attention",
    "bidirectional(mamba2(d_state=64), share=False)",
    "chela(short=(3, 7), long:modal) + native",
    "chela_modal(head_dim=-1.5e-3)",
    "gla(a='it\\'s', b=None, c=True)",
    "999999999*chela",
    "__import__('os').system('touch x')",
]
SPEC_PIECES = [
    *[
        "(",
        ")",
        "=",
        ":",
        ",",
        "*",
        "+",
        "-",
        "'",
        '"',
        "\\",
        "**",
        "0x",
        "1e999",
        "1j",
        "...",
        "[",
        "{",
        "`",
        "@",
        "None",
        "True",
        "native",
        "if",
        "chela",
        "mixer=",
        "f''",
        "b''",
        "9**9**9",
        "0_0",
        "_",
    ],
    *["a.b", ":=", ";", "#", "!", "%s", "{}", "lambda"],
    *("'" * 3, "(" * 20, ")" * 20, "9" * 400, "\n", "\t", " ", "\x00", "\u202e", "\ud800", "é"),
]


@given(
    mutated(SPECS, SPEC_PIECES)
    | st.text(max_size=80)
    | st.lists(st.sampled_from(SPEC_PIECES), max_size=30).map("".join)
)
@fuzzed(ci=1_500, nightly=80_000)
def test_mixer_strings_raise_nothing_but_our_errors(text):
    try:
        with harmless():
            pattern = parse_pattern(text)
    except (MixerSpecError, MixerUnavailableError) as error:
        assert len(str(error)) < 3_000  # one that a terminal can show
        return
    assert parse_pattern(str(pattern)) == pattern
    assert len(pattern.expand(7)) == 7


PRESETS = ["spec: chela(long=modal)\nsummary: why\n", "spec: &a chela\nsummary: *a\n", "{spec: 2*chela, summary: x}"]
YAML_PIECES = [
    *[
        "!!int",
        "!!bool",
        "!!float",
        "!!binary",
        "!!timestamp",
        "!!set",
        "!!omap",
        "!!pairs",
        "2001-99-99",
        "1:1:1:1",
        "0o9",
        ".inf",
        ".nan",
        "{",
        "}",
        "[",
        "]",
    ],
    *[
        "|",
        ">",
        "---",
        "...",
        "'",
        '"',
        "~",
        "null",
        "#",
        "seeds",
        "mixers",
        "tasks",
        "-1",
        "1e400",
        "999999999999999999999",
        "[[[[[[[[[[[[[[[[",
    ],
    *(": ", "- ", "? ", "&a ", "*a", "!!python/object/apply:os.system [x]", "%YAML 1.1", "<<: *a", "<<: 3"),
    *("9" * 5_000, "\n", "  ", "\t", "\x00", "\ud800", "\ufeff"),
]


@given(mutated(PRESETS, YAML_PIECES + SPEC_PIECES))
@fuzzed(ci=300, nightly=20_000)
def test_presets_raise_nothing_but_our_errors(text):
    with contextlib.suppress(MixerSpecError), harmless():
        preset = read_preset("fuzzed.yaml", text)
        assert preset.base in preset.spec


ABLATIONS = [path.read_text() for path in shipped("ablations").values()]
ABLATIONS += ["tasks: [digits]\nmixers: [chela]\nbaseline: chela\nlearning_rates: [0.1]\nseeds: [0]\n"]


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@given(st.data())
@fuzzed(ci=300, nightly=30_000)
def test_ablation_files_raise_nothing_but_our_errors(folder, data):
    text = data.draw(mutated(ABLATIONS, YAML_PIECES) | st.lists(st.sampled_from(YAML_PIECES), max_size=20).map("".join))
    overrides = data.draw(
        st.lists(
            st.sampled_from(["seeds=[1]", "tasks.0.task=*a", "seeds.0=" + "9" * 30, "training=!!bool 3"]), max_size=1
        )
    )
    path = folder / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError), harmless():
        load_ablation(path, overrides)


RUNS_OF_TRAINING = [path.read_text() for path in shipped_runs().values()]


@given(mutated(RUNS_OF_TRAINING, [*YAML_PIECES, "task: ", "model", "machine: ", "images", "language"]))
@fuzzed(ci=200, nightly=10_000)
def test_training_files_raise_nothing_but_our_errors(folder, text):
    path = folder / "training.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError), harmless():
        load_run(path, ["seed=1"])


RECORDS = [
    '{"record":"run","cell":"1","ablation":"a","task":"digits","mixer":"chela","seed":0,"learning_rate":0.1,'
    '"status":"finished","device":"cpu","validation":0.5,"parameters":3,"parameter_ratio":1.0,"state":null,'
    '"tokens_per_second":1.0,"peak_bytes":null,"path":"reference"}',
    '{"record":"test","cell":"1","ablation":"a","task":"digits","mixer":"chela","seed":0,"learning_rate":0.1,'
    '"metric":"accuracy","test":0.5}',
]
MANIFEST = (
    '{"format":"chela-plugin results","version":1,"ablations":{"a":{"tasks":[{"task":"digits"}],"mixers":["chela"],'
    '"baseline":"chela","learning_rates":[0.1],"seeds":[0],"parameter_tolerance":0.02,'
    '"training":{"steps":3,"batch_size":2}}}}'
)
JSON_PIECES = [
    *[
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "\\",
        "\\u",
        "\\ud800",
        "null",
        "true",
        "NaN",
        "-Infinity",
        "1e999",
        "-",
        ".",
        '"record":"run"',
        '"cell":[]',
        '"seed":{}',
    ],
    *("9" * 5_000, "[" * 2_000, '{"a":' * 500, "\n", "\r", "\x00", "\u2028", "é"),
]


@given(st.data())
@fuzzed(ci=500, nightly=40_000)
def test_results_files_raise_nothing_but_our_errors(folder, data):
    lines = data.draw(st.lists(mutated(RECORDS, JSON_PIECES) | st.sampled_from(RECORDS), min_size=1, max_size=3))
    manifest = data.draw(st.just(MANIFEST) | mutated([MANIFEST], JSON_PIECES))
    (folder / "results.jsonl").write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
    (folder / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ResultsError), harmless():
        read_records(folder / "results.jsonl")
    with contextlib.suppress(ResultsError), harmless():
        tables(*open_for_reading(folder))


@pytest.fixture(scope="module")
def checkpoint(folder) -> bytes:
    save_tensors(folder / "whole.safetensors", {"w": torch.ones(2, 3), "n": torch.tensor(1)}, {"step": 1})
    return (folder / "whole.safetensors").read_bytes()


HEADER_PIECES = [
    '"dtype":"F64"',
    '"shape":[-1]',
    '"shape":[99999999999]',
    '"data_offsets":[0,1]',
    "{",
    "}",
    "[" * 300,
    '"',
    "0",
]


@given(st.data())
@fuzzed(ci=500, nightly=20_000)
def test_checkpoints_raise_nothing_but_our_errors(folder, checkpoint, data):
    """Bytes anywhere, and headers that are still read as headers: the length in front is made to fit."""
    length = int.from_bytes(checkpoint[:8], "little")
    header, values = checkpoint[8 : 8 + length].decode(), checkpoint[8 + length :]
    if data.draw(st.booleans()):
        header = data.draw(mutated([header], HEADER_PIECES))
        raw = header.encode("utf-8", "surrogatepass")
        content = len(raw).to_bytes(8, "little") + raw + values
    else:
        at = data.draw(st.integers(0, len(checkpoint)))
        content = checkpoint[:at] + data.draw(st.binary(max_size=9)) + checkpoint[at + data.draw(st.integers(0, 9)) :]
    path = folder / "fuzzed.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(ResultsError), harmless():
        tensors, state = load_tensors(path)
        assert state == {"step": 1} and torch.equal(tensors["w"], torch.ones(2, 3))  # no damage passes as sound


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = {
    "ten anchors of ten": BOMB,
    "bomb in a known place": BOMB + "mixers: *i\ntasks: *i\n",
    "an alias of itself": "tasks: &a [*a]\n",
    "deep": "tasks: " + "[" * 20_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(300)),
    "long": "tasks: [" + "a, " * 500_000 + "]",
    "a number of sixty thousand digits": "seeds: [" + "9" * 60_000 + "]",
    "sixty to the power of": "seeds: [1" + ":1" * 20_000 + "]",
    "hexadecimal": "seeds: [0x" + "f" * 60_000 + "]",
    "merge keys": "a: &a {x: 1}\n" + "b: {<<: [" + ", ".join(["*a"] * 5_000) + "]}\n",
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_hostile_yaml_is_refused_within_a_second_and_200_megabytes(tmp_path, name):
    """In a process of its own, which the system ends when it asks for more."""
    (tmp_path / "hostile.yaml").write_text(HOSTILE_YAML[name])
    program = f"""
import resource, time
from chela_plugin.harness.config import ConfigError, load_ablation
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
try:
    load_ablation({str(tmp_path / "hostile.yaml")!r})
except ConfigError as error:
    assert len(str(error)) < 3_000, len(str(error))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(time.process_time() - start < 1.0 and grown < 200, time.process_time() - start, grown)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("True"), done.stdout + done.stderr[-2_000:]


@pytest.mark.parametrize(
    "line",
    [b"[" * 1_000_000, b'{"a":' * 200_000, b"9" * 2_000_000, b'"' + b"\\u0041" * 300_000, b"\xff" * 1_000_000],
    ids=["brackets", "objects", "digits", "escapes", "no text"],
)
def test_a_hostile_line_of_results_is_an_error_at_once(tmp_path, line):
    (tmp_path / "results.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ResultsError, match="line 1: not a record"):
        read_records(tmp_path / "results.jsonl")
    assert len(str(line)) > 1_000_000


def test_records_that_do_not_fit_their_manifest_are_an_error_that_names_the_remedy(tmp_path):
    (tmp_path / "manifest.json").write_text(MANIFEST)
    (tmp_path / "results.jsonl").write_text('{"record":"test","cell":"7"}\n')
    with pytest.raises(ResultsError, match=r"do not fit .* restore them"):
        tables(*open_for_reading(tmp_path))
    pytest.importorskip("matplotlib")
    from chela_plugin.harness.report import write_report

    (tmp_path / "results.jsonl").write_text(RECORDS[0] + "\n")  # enough for the table, not for the page
    with pytest.raises(ResultsError, match=r"do not fit .* restore them"):
        write_report(tmp_path)


def test_the_page_of_a_report_shows_what_records_hold_and_runs_none_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    from chela_plugin.harness.report import write_report

    evil = "<script>alert(1)</script>"
    record = json.loads(RECORDS[0]) | {"status": "failed", "reason": evil, "device": evil, "history": {}}
    record |= {"versions": {evil: evil}, "revision": {"commit": evil, "dirty": False}}
    (tmp_path / "manifest.json").write_text(MANIFEST)
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    page = write_report(tmp_path).page.read_text()
    assert evil not in page and "&lt;script&gt;" in page


def test_the_bounds_on_yaml_leave_room_for_every_shipped_file():
    from chela_plugin.harness.config import MAX_CONFIG_BYTES

    for text in ABLATIONS:
        assert len(text) < MAX_CONFIG_BYTES / 4
        yaml.safe_load(text)
