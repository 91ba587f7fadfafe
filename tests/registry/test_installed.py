"""Mixers of installed distributions: listed without importing, and one that is broken breaks nobody else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chela_plugin.registry import (
    MixerSpec,
    MixerSpecError,
    MixerUnavailableError,
    create_mixer,
    installed,
    list_mixers,
    parse_pattern,
)
from chela_plugin.registry.presets import presets

FACTORY = '''
import torch

def factory(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """What {name} is."""
    return torch.nn.Identity()
'''


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """A function that installs a distribution: its name, its entry points' lines, files, and Requires-Dist lines."""
    monkeypatch.setattr(installed, "scanned", {})
    monkeypatch.setattr(installed, "failed", {})

    def install(name, points, files=None, requires=()):
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        extras = sorted({line.split("extra == ")[1].strip("'\"") for line in requires if "extra == " in line})
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[chela_plugin.mixers]\n{points}\n")
        for file, text in (files or {}).items():
            (site / file).write_text(text)
        monkeypatch.syspath_prepend(str(site))

    return install


def row(name):
    return {listing.name: listing for listing in list_mixers()}[name]


def test_an_installed_mixer_is_listed_and_used(distribution):
    distribution("dist_a", "a_mixer = dist_a_code:factory", {"dist_a_code.py": FACTORY.format(name="a_mixer")})
    listing = row("a_mixer")
    assert (listing.distribution, listing.available, listing.reason) == ("dist_a", True, "")
    assert listing.summary == "What a_mixer is."
    assert "dist_a_code" not in sys.modules
    assert create_mixer("a_mixer", 8, causal=True) is not None


def test_listing_imports_nothing_heavy():
    program = (
        "import sys, chela_plugin; rows = chela_plugin.list_mixers(); "
        "print({'torch', 'pydantic', 'transformers', 'chela_plugin.mixers'} & set(sys.modules), len(rows) > 10)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set() True"


def test_a_missing_extra_shows_the_pip_line(distribution):
    distribution(
        "dist_b",
        "b_mixer = dist_b_code:factory [fast]",
        {"dist_b_code.py": FACTORY},
        ["no-such-package-of-anyone>=2; extra == 'fast'", "torch>=900; extra == 'fast'", "torch; extra == 'slow'"],
    )
    listing = row("b_mixer")
    assert not listing.available
    assert "no-such-package-of-anyone>=2 (not installed)" in listing.reason
    assert "torch>=900 (found " in listing.reason
    assert listing.remedy == "pip install 'dist_b[fast]'"
    with pytest.raises(MixerUnavailableError, match=r"pip install 'dist_b\[fast\]'") as caught:
        MixerSpec.parse("b_mixer")
    assert isinstance(caught.value, ImportError)


def test_an_extra_that_is_there_counts_as_available(distribution):
    distribution(
        "dist_c",
        "c_mixer = dist_c_code:factory [fast]",
        {"dist_c_code.py": FACTORY},
        ["torch>=1; extra == 'fast'", "no-such-package-of-anyone; extra == 'fast' and python_version < '3'"],
    )
    assert row("c_mixer").available


def test_two_owners_of_one_name_are_both_named(distribution):
    distribution("dist_d", "d_mixer = dist_d_code:factory")
    distribution("dist_e", "d_mixer = dist_e_code:factory\ne_mixer = dist_e_code:factory", {"dist_e_code.py": FACTORY})
    listing = row("d_mixer")
    assert not listing.available
    assert "dist_d" in listing.reason
    assert "dist_e" in listing.reason
    with pytest.raises(MixerUnavailableError, match=r"declared by dist_. and by dist_."):
        MixerSpec.parse("d_mixer")
    assert MixerSpec.parse("e_mixer")


@pytest.mark.parametrize(
    ("points", "files", "reason"),
    [
        ("f_mixer = dist_f_missing:factory", {}, "dist_f_missing"),
        ("f_mixer = dist_f_code:factory", {"dist_f_code.py": "1/0"}, "ZeroDivisionError"),
        ("f_mixer = dist_f_code:factory", {"dist_f_code.py": "def f(:"}, "SyntaxError"),
        ("f_mixer = dist_f_code:factory", {"dist_f_code.py": ""}, "AttributeError"),
        ("f_mixer = dist_f_code:factory", {"dist_f_code.py": "def factory(dim): pass"}, "takes no causal"),
        ("f_mixer = dist_f_code", {}, "not module:factory"),
        ("f_mixer = ", {}, "not module:factory"),
    ],
)
def test_a_broken_mixer_shows_its_reason_and_breaks_no_other(distribution, monkeypatch, points, files, reason):
    monkeypatch.delitem(sys.modules, "dist_f_code", raising=False)
    distribution("dist_f", points, files)
    with pytest.raises(MixerUnavailableError, match=reason):
        MixerSpec.parse("f_mixer")
    listing = row("f_mixer")
    assert not listing.available
    assert reason in listing.reason
    assert row("attention").available
    assert MixerSpec.parse("attention")


def test_unreadable_entry_points_break_no_other(distribution):
    distribution("dist_g", "this line is no entry point")
    listing = row("dist_g")
    assert not listing.available
    assert "can't be read" in listing.reason
    assert MixerSpec.parse("attention")


def test_a_name_that_no_string_can_spell_says_so(distribution):
    distribution("dist_h", "h-mixer = dist_h_code:factory", {"dist_h_code.py": FACTORY})
    assert "must rename it" in row("h-mixer").reason


def test_a_distribution_installed_meanwhile_is_found(distribution):
    with pytest.raises(MixerSpecError, match="unknown mixer 'i_mixer'"):
        MixerSpec.parse("i_mixer")
    distribution("dist_i", "i_mixer = dist_i_code:factory", {"dist_i_code.py": FACTORY})
    assert MixerSpec.parse("i_mixer")


def test_every_mixer_of_ours_has_a_summary_and_can_be_listed():
    for name in ("chela", "attention", "bidirectional", "identity"):
        assert row(name).distribution == "chela-plugin"
    assert row("chela_modal").preset == "chela(long=modal)"


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_stands_for_a_valid_spec(name):
    assert MixerSpec.parse(name) == MixerSpec.parse(presets()[name].spec)


def test_a_preset_takes_further_options_and_yields_to_them():
    assert str(MixerSpec.parse("chela_modal(gate=False)")) == "chela(gate=False, long=modal)"
    assert str(MixerSpec.parse("chela_modal(long=none)")) == "chela(long=none)"
    assert str(parse_pattern("2*chela_no_long + native")) == "2*chela(long=none) + native"
