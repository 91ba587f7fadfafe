"""Options are checked against the factory's signature when the string is parsed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chela_plugin.registry import (
    MixerSpec,
    MixerSpecError,
    UnknownMixerError,
    create_mixer,
    parse_pattern,
    register_mixer,
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("toy(scale=2)", "toy(scale=2.0)"),
        ("toy(heads=None)", "toy(heads=None)"),
        ("toy(kind=fancy)", "toy(kind=fancy)"),
        ("toy(taps=(5,))", "toy(taps=(5,))"),
        ("toy(label=x)", "toy(label=x)"),
        ("both(toy)", "both(toy)"),
        ("both(mixer=toy(scale=3))", "both(toy(scale=3.0))"),
        ("both(both(toy))", "both(both(toy))"),
        ("wide(layer=GatedLinearAttention, anything=(1, 2))", "wide(anything=(1, 2), layer=GatedLinearAttention)"),
    ],
)
def test_options_that_fit_the_signature_are_accepted(text, canonical):
    spec = MixerSpec.parse(text)
    assert str(spec) == canonical
    assert MixerSpec.parse(str(spec)) == spec


def test_a_word_becomes_a_mixer_where_the_annotation_asks_for_one():
    assert isinstance(MixerSpec.parse("both(toy)").options["mixer"], MixerSpec)
    assert MixerSpec.parse("toy(label=toy)").options["label"] == "toy"


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("toy(head=4)", 4, r"no option 'head'; valid options: heads, scale, kind, taps, label, on"),
        ("toy(dim=4)", 4, "set by the host"),
        ("toy(causal=True)", 4, "set by the host"),
        ("toy(heads=4.5)", 4, r"'heads' of toy expects int \| None, got 4.5"),
        ("toy(heads=True)", 4, "expects int"),
        ("toy(on=1)", 4, "expects bool"),
        ("toy(scale=True)", 4, "expects float"),
        ("toy(scale=big)", 4, "expects float"),
        ("toy(label=3)", 4, "expects str"),
        ("toy(kind=odd)", 4, r"Literal\['plain', 'fancy'\]"),
        ("toy(scale=2, taps=(1, 2.5))", 13, "expects tuple"),
        ("toy(taps=3)", 4, r"written \(3,\)"),
        ("both", 0, "needs the option 'mixer'"),
        ("both(mixer=3)", 5, "expects MixerSpec"),
        ("both(tox)", 5, "did you mean 'toy'"),
        ("both(toy(scale=big))", 9, "expects float"),
        ("both(native)", 5, "in a pattern only"),
        ("toy + both(toy(head=4))", 15, "no option 'head'"),
        ("native(a=1)", 0, "takes no options"),
        ("wide", 0, r"it needs layer"),
    ],
)
def test_a_wrong_option_is_one_error_with_its_column(text, column, message):
    with pytest.raises(MixerSpecError, match=message) as caught:
        parse_pattern(text)
    assert caught.value.column == column


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownMixerError, match="did you mean 'chela'"):
        MixerSpec.parse("chella")
    with pytest.raises(UnknownMixerError, match="did you mean 'chela'"):
        MixerSpec.parse("CHELA")
    with pytest.raises(UnknownMixerError, match=r"Known: .*toy"):
        MixerSpec.parse("zzzzzz")


def test_a_stray_annotation_that_cannot_be_read_names_the_option():
    def stray(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, x: Nowhere = 1):  # type: ignore[name-defined]  # noqa: F821 - the point
        return nn.Identity()

    register_mixer("stray", stray)
    with pytest.raises(MixerSpecError, match="'Nowhere' of option 'x' can't be read"):
        MixerSpec.parse("stray(x=1)")
    assert MixerSpec.parse("stray")


def test_a_class_may_be_a_factory():
    class Mine(nn.Module):
        def __init__(self, dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, width: int = 1):
            super().__init__()

    register_mixer("mine", Mine)
    assert isinstance(create_mixer("mine(width=3)", 8, causal=True), Mine)
    with pytest.raises(MixerSpecError, match="valid options: width"):
        MixerSpec.parse("mine(height=3)")


def test_create_mixer_passes_options_and_placement_on():
    mixer = create_mixer("toy(scale=2)", 8, causal=True, dtype=torch.float64)
    assert torch.equal(mixer(torch.ones(1, 3, 8, dtype=torch.float64)), torch.full((1, 3, 8), 2.0, dtype=torch.float64))
    assert create_mixer(MixerSpec("toy", {"scale": 2}), 8, causal=False, device="meta").weight.is_meta


def test_a_spec_built_by_hand_is_checked_too():
    with pytest.raises(MixerSpecError, match="valid options"):
        create_mixer(MixerSpec("toy", {"head": 2}), 8, causal=True)


def test_a_factorys_refusal_names_the_spec():
    with pytest.raises(ValueError, match=r"toy\(heads=3\): dim 8 is not divisible by heads 3"):
        create_mixer("toy(heads=3)", 8, causal=True)
    with pytest.raises(ValueError, match=r"both\(toy\): it sees both directions and can't be causal"):
        create_mixer("both(toy)", 8, causal=True)


def test_create_mixer_refuses_what_is_no_single_mixer_and_no_width():
    with pytest.raises(MixerSpecError, match="expected one mixer"):
        create_mixer("toy + both(toy)", 8, causal=True)
    with pytest.raises(MixerSpecError, match="only a host"):
        create_mixer("native", 8, causal=True)
    for dim in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="at least 1"):
            create_mixer("toy", dim, causal=True)


def test_a_factory_that_returns_no_module_is_a_type_error():
    register_mixer("wrong", lambda dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None: "text")
    with pytest.raises(TypeError, match=r"must return an nn.Module, got str"):
        create_mixer("wrong", 8, causal=True)


def test_a_factory_without_the_hosts_arguments_is_refused_when_it_is_registered():
    with pytest.raises(TypeError, match="takes no causal, depth"):
        register_mixer("short", lambda dim: None)
    with pytest.raises(TypeError, match="callable"):
        register_mixer("short", 3)


def test_run_time_names_may_be_registered_again_but_hide_nothing():
    register_mixer("again", lambda dim, **options: nn.Identity())
    register_mixer("again", lambda dim, **options: nn.Linear(dim, dim))
    assert isinstance(create_mixer("again", 8, causal=True), nn.Linear)
    for taken in ("attention", "chela_modal", "native", "a b"):
        with pytest.raises(MixerSpecError):
            register_mixer(taken, lambda dim, **options: nn.Identity())
