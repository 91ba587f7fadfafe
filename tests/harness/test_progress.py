"""Bars on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from chela_plugin.harness.progress import BarProgress, PlainProgress, progress_for


@pytest.mark.parametrize(("terminal", "kind"), [(True, BarProgress), (False, PlainProgress)])
def test_runs_and_loss_are_shown(terminal, kind):
    out = io.StringIO()
    with progress_for(Console(file=out, force_terminal=terminal, width=100, _environ={"TERM": "xterm"}), 2) as display:
        assert type(display) is kind
        display.skip(1)
        display.start("digits | bidirectional(gla) | [x]", steps=10)
        display.step("digits | bidirectional(gla) | [x]", 5, 1.25)
        if isinstance(display, BarProgress):
            display.bars.refresh()
        display.finish("digits | bidirectional(gla) | [x]", "validation 0.9 [bold]")
    text = out.getvalue()
    assert "validation 0.9 [bold]" in text  # no markup is taken from a label or an error message
    assert "[2/2]" in text
    assert ("loss 1.250" in text) == terminal
    assert ("\x1b[" in text) == terminal
