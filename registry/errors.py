"""The errors of the registry: a string that is wrong, a name nobody declared, a mixer that cannot run here."""

from __future__ import annotations

WINDOW = 60  # characters shown on either side of the marked column of a long string


class MixerSpecError(ValueError):
    """A mixer string that can't be read, shown with the place that is wrong and what was expected there.

    Args:
        message: what is wrong and what was expected.
        text: the whole string; None where there is none to show.
        column: 0-based index into `text` of the first wrong character.
    """

    def __init__(self, message: str, text: str | None = None, column: int | None = None):
        self.message = message
        self.text = text
        self.column = column
        super().__init__(message if text is None else f"{message}\n{marked(text, column)}")

    def __reduce__(self):
        return rebuild, (type(self), self.message, self.text, self.column)


class UnknownMixerError(MixerSpecError):
    """A mixer name that no installed distribution, preset or `register_mixer` call declares."""


class MixerUnavailableError(ImportError):
    """A mixer that is declared but can't be loaded in this environment.

    Attributes: `mixer` its name, `reason` one line, `remedy` the command that mends it or None.
    """

    def __init__(self, mixer: str, reason: str, remedy: str | None = None):
        self.mixer = mixer
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"mixer '{mixer}' can't be used here: {reason}" + (f"\n  {remedy}" if remedy else ""))

    def __reduce__(self):
        return type(self), (self.mixer, self.reason, self.remedy)


def rebuild(kind: type[MixerSpecError], message: str, text: str | None, column: int | None) -> MixerSpecError:
    return kind(message, text, column)


def marked(text: str, column: int | None) -> str:
    """The string on one line with a caret under `column`; a long string is cut to the neighbourhood of the caret."""
    # Control characters and line breaks would move the caret away from its column.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: (column or 0) + WINDOW])
    start = max(0, (column or 0) - WINDOW)
    head, tail = "..." if start else "", "..." if len(text) > len(line) else ""
    shown = f"  {head}{line[start:]}{tail}"
    return shown if column is None else f"{shown}\n  {' ' * (len(head) + column - start)}^"
