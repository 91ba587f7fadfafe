"""Mixer strings: what they mean, how they are spelt back, and that nothing in them is ever run."""

from __future__ import annotations

import contextlib
import copy
import keyword
import pickle
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin.registry import MixerSpec, MixerSpecError, MixerUnavailableError, parse_pattern

WORDS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(lambda word: not keyword.iskeyword(word))
LITERALS = st.one_of(
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    WORDS,
    st.text(max_size=12),
)
SPECS = st.recursive(
    st.builds(MixerSpec, WORDS),
    lambda inner: st.builds(
        MixerSpec,
        WORDS,
        st.dictionaries(WORDS, LITERALS | inner | st.lists(LITERALS | inner, max_size=3).map(tuple), max_size=3),
    ),
    max_leaves=4,
)


@given(SPECS)
@settings(max_examples=400, deadline=None)
def test_any_spec_survives_a_round_trip_through_its_string(spec):
    again = MixerSpec.parse(str(spec), check=False)
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)


@given(st.lists(st.tuples(st.integers(1, 50), SPECS), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_pattern_survives_a_round_trip_through_its_string(terms):
    text = " + ".join(f"{count}*{spec}" for count, spec in terms)
    pattern = parse_pattern(text, check=False)
    assert [(count, str(spec)) for count, spec in pattern.terms] == [(count, str(spec)) for count, spec in terms]
    assert parse_pattern(str(pattern), check=False) == pattern


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("chela", "chela"),
        (" chela ( ) ", "chela"),
        ("chela(long=modal, head_dim=64)", "chela(head_dim=64, long=modal)"),
        ("chela(head_dim:64,long:modal)", "chela(head_dim=64, long=modal)"),
        ("chela(a='b:c=d+e(')", "chela(a='b:c=d+e(')"),
        ("chela(a='word', b=\"it's\")", 'chela(a=word, b="it\'s")'),
        ("chela(a=-1, b=1e-3, c=-2.5, d=None, e=True)", "chela(a=-1, b=0.001, c=-2.5, d=None, e=True)"),
        ("chela(a=(3,7), b=(1,), c=())", "chela(a=(3, 7), b=(1,), c=())"),
        ("bidirectional(mamba2)", "bidirectional(mamba2)"),
        ("bidirectional(share=False, mixer=mamba2(d_state=64))", "bidirectional(mamba2(d_state=64), share=False)"),
        ("chela(\n  a=1,\n  b=2,\n)\n", "chela(a=1, b=2)"),
    ],
)
def test_a_spec_has_one_canonical_spelling(text, canonical):
    assert str(MixerSpec.parse(text, check=False)) == canonical


def test_true_and_one_are_different_values():
    assert MixerSpec("a", {"x": True}) != MixerSpec("a", {"x": 1})
    assert MixerSpec("a", {"x": 1.0}) != MixerSpec("a", {"x": 1})


def test_a_spec_is_immutable_and_can_be_copied():
    spec = MixerSpec("a", {"x": (1, MixerSpec("b", {"y": 2}))})
    with pytest.raises(AttributeError, match="immutable"):
        spec.name = "b"
    with pytest.raises(TypeError):
        spec.options["x"] = 2
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))


def test_a_pattern_fills_the_depth_and_is_cut_where_it_ends():
    pattern = parse_pattern("3*chela + attention", check=False)
    assert "".join(spec.name[0] for spec in pattern.expand(10)) == "cccaccca" + "cc"
    assert "".join(spec.name[0] for spec in pattern.expand(2)) == "cc"
    assert str(pattern) == "3*chela + attention"
    with pytest.raises(ValueError, match="at least 1"):
        pattern.expand(0)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 0, "empty"),
        ("   ", 0, "empty"),
        ("chela(", 5, "never closed"),
        ("chela(a=(1, 2)", 5, "never closed"),
        ("chela)", 5, "without a"),
        ("chela(a='x", 8, "quote ' is never closed"),
        ("chela +", 6, "both sides"),
        ("+ chela", 0, "both sides"),
        ("a + + b", 2, "both sides"),
        ("chela:3", 5, "inside parentheses only"),
        ("chela(a=[1])", 8, "tuples are written"),
        ("chela(a={})", 8, "unexpected"),
        ("chela(a=1, a=2)", 11, "given twice"),
        ("chela(3)", 6, "key=value"),
        ("both(a, b)", 8, "key=value"),
        ("chela(**a)", 8, "no meaning"),
        ("chela(*a)", 6, "key=value"),
        ("chela(a=b.c)", 8, "expected a number"),
        ("chela(a=1+2)", 8, "expected a number"),
        ("chela(a=--1)", 8, "expected a number"),
        ("chela(a=-True)", 8, "expected a number"),
        ("chela(a=1e999)", 8, "finite"),
        ("chela(a=1j)", 8, "expected a number"),
        ("chela(a=...)", 8, "expected a number"),
        ("chela(a=99999999999999999999)", 8, "64 bits"),
        ("chela*3", 0, "whole number before"),
        ("1.5*chela", 0, "whole number before"),
        ("0*chela", 0, "from 1 to"),
        ("999999999*chela", 0, "from 1 to"),
        ("2*3*chela", 0, "whole number before"),
        ("(a + b)*2", 1, "whole number before"),
        ("(a + b)", 1, "expected a mixer"),
        ("a.b", 0, "expected a mixer"),
        ("a.b(c=1)", 0, "expected a mixer"),
        ("'chela'", 0, "expected a mixer"),
        ("3", 0, "expected a mixer"),
        ("chela(a='\\q')", 9, "escape"),
        ("chela(a='\\ud8')", 9, "escape"),
        ("chela(a='b' 'c')", 12, "before a quoted text"),
        ("chela(a=r'b')", 9, "before a quoted text"),
        ("chela(a=f'{b}')", 9, "before a quoted text"),
        ("chela(a='b\x00')", 10, "escaped form"),
        ("chela(a='\ud800')", 9, "escaped form"),
        ("chél", 2, "unexpected"),
        ("\N{FULLWIDTH LATIN SMALL LETTER C}hela", 0, "unexpected"),
        ("chela # comment", 6, "unexpected"),
        ("chela; x", 5, "unexpected"),
        ("chela(a=b)(c=d)", 0, "expected a mixer"),
    ],
)
def test_a_bad_string_is_shown_with_the_column_that_is_wrong(text, column, message):
    with pytest.raises(MixerSpecError, match=message) as caught:
        parse_pattern(text, check=False)
    assert caught.value.column == column
    shown, caret = str(caught.value).splitlines()[-2:]
    assert caret.strip() == "^"
    if column < len(text) and text[column].isprintable():
        assert shown[caret.index("^")] == text[column]


@pytest.mark.parametrize(
    "text",
    [
        "chela(a=1 b=2)",
        "chela(a=(b:=1))",
        "lambda: 3",
        "chela(a=lambda=3)",
        "chela(a=x if y else z)",
        "a b",
        "a(x for x in y)",
    ],
)
def test_other_python_is_refused_somewhere_inside_the_string(text):
    """The column is the one that Python's own parser reports, which differs between its versions."""
    with pytest.raises(MixerSpecError) as caught:
        parse_pattern(text, check=False)
    assert 0 <= caught.value.column < len(text)


def test_an_error_in_a_long_string_shows_its_neighbourhood_only():
    text = " + ".join(["chela(a=1)"] * 200) + " + chela(a=[) + " + " + ".join(["chela"] * 100)
    with pytest.raises(MixerSpecError) as caught:
        parse_pattern(text, check=False)
    shown, caret = str(caught.value).splitlines()[-2:]
    assert len(shown) < 140
    assert shown[caret.index("^")] == "["


def test_an_error_survives_pickling():
    with pytest.raises(MixerSpecError) as caught:
        MixerSpec.parse("chela(", check=False)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.column) == (str(caught.value), 5)


def test_one_mixer_is_no_pattern():
    for text in ("2*chela", "chela + attention"):
        with pytest.raises(MixerSpecError, match="expected one mixer"):
            MixerSpec.parse(text, check=False)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2**70, [1], {"a": 1}, object(), b"x"])
def test_a_value_that_no_string_can_spell_is_refused(value):
    with pytest.raises(MixerSpecError):
        MixerSpec("a", {"x": value})


@pytest.mark.parametrize("name", ["", "a b", "a-b", "é", "None", "lambda", "a.b", 3])
def test_a_name_that_no_string_can_spell_is_refused(name):
    with pytest.raises(MixerSpecError):
        MixerSpec(name)
    with pytest.raises(MixerSpecError):
        MixerSpec("a", {name: 1})


def test_what_is_no_string_is_a_type_error():
    for value in (None, 3, b"chela", ["chela"]):
        with pytest.raises(TypeError, match="str"):
            MixerSpec.parse(value)


@pytest.mark.parametrize(
    "text",
    [
        "chela(a=" * 100_000,
        "(" * 1_000_000,
        "chela(a=" + "(" * 5_000 + ")" * 5_000 + ")",
        "chela(a=" + "-" * 9_000 + "1)",
        "+".join("a" * 5_000),
        "*".join("a" * 4_999),
        ".".join("a" * 4_999),
        "a" * 1_000_000,
        "chela(a=" + "9" * 9_000 + ")",
        "chela(a=0x" + "f" * 9_000 + ")",
        "chela(a='" + "b" * 1_000_000,
        "chela(" + ",".join(f"a{i}=1" for i in range(1_200)) + ",=)",
        "9" * 9_000 + "*chela",
        "999999999*chela",
    ],
    ids=range(14),
)
def test_a_hostile_string_is_refused_at_once(text):
    with pytest.raises(MixerSpecError) as caught:
        parse_pattern(text, check=False)
    assert len(str(caught.value)) < 500


EVIL = [
    "__import__('os').system('false')",
    "chela(a=__import__('os'))",
    "chela(a=().__class__.__bases__[0].__subclasses__())",
    "chela(a=open('/etc/passwd'))",
    "eval('1')",
    "exec(a='1')",
    "(lambda: 1)()",
    "chela(a=[x for x in (1,)])",
    "chela(a=f'{1}')",
    "chela(a=b'')",
    "chela(a=9**9**9)",
    "chela(a='x' * 1000000000)",
    "\x00",
    "chela(a='\\N{DIGIT ONE}')",
    "chela(a=`1`)",
    "chela(a=yield)",
    "chela(a=await b)",
    "chela(a=1_0, b=0b1, c=0o7, d=1_000.0)",
    "chela(a=1if 1else 2)",
    "\N{MATHEMATICAL SCRIPT SMALL C}hela(a=1)",
    "print('hello')",
]

PIECES = [
    *("chela", "toy", "native", "mamba2", "both", "None", "True", "a", "mixer", "long", "3", "0", "1e9", "1e999", "0x"),
    *(
        "=",
        ":",
        ",",
        "(",
        ")",
        "'",
        '"',
        "+",
        "*",
        "-",
        ".",
        "\\",
        "\n",
        "\t",
        " ",
        "_",
        "99999",
        "é",
        "{",
        "[",
        "#",
        "@",
    ),
    *("**", ":=", "((", "))", "''", "'''", "\\x", "\\u", "\u2028", "\x00", "\ud800", "~", "\r\n", "\f", "lambda "),
    *(" for ", " if ", "f'", "3*", "()", "(a=1)", "(long=modal)", "=(3, 7)", "not ", "\N{PARTY POPPER}"),
]


def test_twenty_thousand_random_strings_raise_nothing_but_our_errors():
    rng = random.Random(0)
    seeds = [*EVIL, "chela(head_dim=64, long=modal)", "3*toy(taps=(1,2)) + native", "both(toy(scale=2), share=False)"]
    refused = 0
    for i in range(20_000):
        if i % 2:
            text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 12)))
        else:
            text = rng.choice(seeds)
            for _ in range(rng.randrange(4)):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice([*PIECES, ""]) + text[at + rng.randrange(3) :]
        try:
            pattern = parse_pattern(text, check=i % 4 < 2)
        except (MixerSpecError, MixerUnavailableError):
            refused += 1
        else:
            assert parse_pattern(str(pattern), check=False) == pattern, text
    assert 10_000 < refused < 20_000  # some of them do spell a pattern


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_arbitrary_text_raises_nothing_but_our_errors(text):
    with contextlib.suppress(MixerSpecError, MixerUnavailableError):
        parse_pattern(text)


def test_nothing_in_a_string_is_ever_run():
    program = """
import sys
from chela_plugin.registry import MixerSpecError, parse_pattern
seen, watching = [], False
def hook(event, arguments):
    if watching and event != "compile":  # ast.parse is a compile that stops at the tree
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
for repetition in range(2):  # the first loads what the registry itself needs
    for text in EVIL:
        for check in (False, True):
            watching = repetition == 1
            try:
                parse_pattern(text.replace("chela", "nobody"), check=check)
            except MixerSpecError:
                pass
            watching = False
print({event for event in seen if event[0] not in ("os.listdir", "os.scandir")})
""".replace("EVIL", repr(EVIL))
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
