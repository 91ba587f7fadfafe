"""The grammar of mixer strings: text to a tree of nodes that remember their column. Nothing is ever evaluated.

    spec    = name | name(key=value, ...)      value = int | float | bool | None | word | 'text' | (value, ...) | spec
    pattern = term + term + ...                term  = spec | N*spec

Inside parentheses `:` may stand for `=` (timm's --model-kwargs splits on `=`). One argument without a key stands for
`mixer=`, so `bidirectional(mamba2)` is `bidirectional(mixer=mamba2)`.

A scan comes first. It is linear, refuses every character that the grammar has no use for, bounds length and nesting,
and cuts the text at each top-level `+`; only then does each term go to `ast.parse`, whose tree is walked against the
grammar. So a hostile string meets our error before it can cost the parser any depth.
"""

from __future__ import annotations

import ast
import math
import warnings
from dataclasses import dataclass, replace

from chela_plugin.registry.errors import MixerSpecError

MAX_LENGTH = 10_000  # characters in a string
MAX_NESTING = 16  # parentheses within parentheses
MAX_TERMS = 1_000  # terms of a pattern
MAX_COUNT = 10_000  # N of N*spec: far above the depth of any model
MAX_INT = 2**63 - 1
SHORT_ESCAPES = {"\\": 0, "'": 0, '"': 0, "n": 0, "r": 0, "t": 0, "x": 2, "u": 4, "U": 8}  # letter: hex digits after it
DEFAULT_KEY = "mixer"

SPEC_FORM = "name or name(key=value, ...)"
VALUE_FORM = "a number, True, False, None, a word, 'text', a tuple (a, b) or a mixer"


@dataclass(frozen=True)
class ValueNode:
    """An option's value: a literal, a `SpecNode`, or a tuple of `ValueNode`s."""

    value: int | float | bool | str | SpecNode | tuple[ValueNode, ...] | None
    column: int


@dataclass(frozen=True)
class OptionNode:
    key: str
    value: ValueNode
    column: int


@dataclass(frozen=True)
class SpecNode:
    name: str
    options: tuple[OptionNode, ...]
    column: int


@dataclass(frozen=True)
class TermNode:
    count: int
    spec: SpecNode


def parse(text: str) -> tuple[TermNode, ...]:
    """The terms of a mixer string. Raises MixerSpecError outside the grammar, TypeError for what is no string."""
    if not isinstance(text, str):
        raise TypeError(f"a mixer string is a str such as 'chela(head_dim=64)', got {type(text).__name__}")
    cleaned, cuts = scan(text)
    if len(cuts) > MAX_TERMS:
        raise MixerSpecError(f"a pattern has at most {MAX_TERMS} terms", text, cuts[MAX_TERMS])
    ends = [*(cut - 1 for cut in cuts[1:]), len(cleaned)]
    return tuple(TermReader(text, cleaned, start, end).term() for start, end in zip(cuts, ends, strict=True))


def scan(text: str) -> tuple[str, list[int]]:
    """Check every character; return the text with `:` turned to `=` (same length) and where each term starts."""
    if len(text) > MAX_LENGTH:
        raise MixerSpecError(f"a mixer string has at most {MAX_LENGTH} characters, this one has {len(text)}")
    if not text.strip():
        raise MixerSpecError(f"an empty mixer string; expected {SPEC_FORM}", text, 0)
    cleaned = list(text)
    cuts = [0]
    open_at: list[int] = []
    previous = ""  # last character that is not a space, the closing quote for a text
    i = 0
    while i < len(text):
        c = text[i]
        if c in "'\"":
            if previous and (previous.isalnum() or previous in "_)'\""):
                raise MixerSpecError("expected ',' or ')' before a quoted text", text, i)
            i = end_of_text(text, i)
        elif c == "(":
            open_at.append(i)
            if len(open_at) > MAX_NESTING:
                raise MixerSpecError(f"parentheses nest at most {MAX_NESTING} deep", text, i)
        elif c == ")":
            if not open_at:
                raise MixerSpecError("')' without a '(' before it", text, i)
            open_at.pop()
        elif c == ":":
            if not open_at:
                raise MixerSpecError("':' stands for '=' inside parentheses only", text, i)
            cleaned[i] = "="
        elif c == "+" and not open_at:
            cuts.append(i + 1)
        elif c in " \t\r\n":
            cleaned[i] = " "
        elif not (c.isascii() and c.isalnum()) and c not in "_.,=*+-":
            hint = "; tuples are written (3, 7)" if c in "[]" else ""
            raise MixerSpecError(f"unexpected {c!r}; expected {SPEC_FORM}{hint}", text, i)
        if not c.isspace():
            previous = c
        i += 1
    if open_at:
        raise MixerSpecError("'(' is never closed", text, open_at[-1])
    return "".join(cleaned), cuts


def end_of_text(text: str, start: int) -> int:
    """Index of the quote that closes the one at `start`; only the escapes that `repr` writes are allowed."""
    i = start + 1
    while i < len(text):
        c = text[i]
        if c == text[start]:
            return i
        if c == "\\":
            digits = SHORT_ESCAPES.get(text[i + 1 : i + 2])
            code = text[i + 2 : i + 2 + (digits or 0)]
            if digits is None or len(code) != digits or any(d not in "0123456789abcdefABCDEF" for d in code):
                raise MixerSpecError("unknown escape; a backslash itself is written twice", text, i)
            i += 1
        elif not c.isprintable():
            raise MixerSpecError(f"a text holds {c!r} in its escaped form only", text, i)
        i += 1
    raise MixerSpecError(f"the quote {text[start]} is never closed", text, start)


class TermReader:
    """One term of a pattern: `ast.parse` on its characters, then a walk that allows what the grammar allows."""

    def __init__(self, text: str, cleaned: str, start: int, end: int):
        self.text = text
        source = cleaned[start:end]
        self.source = source.strip()
        self.start = start + len(source) - len(source.lstrip())
        if not self.source:
            raise MixerSpecError(f"expected a mixer on both sides of '+': {SPEC_FORM}", text, max(0, start - 1))

    def error(self, message: str, node: ast.AST) -> MixerSpecError:
        return MixerSpecError(message, self.text, self.column(node))

    def column(self, node: ast.AST) -> int:
        # ast counts UTF-8 bytes.
        return self.start + len(self.source.encode()[: getattr(node, "col_offset", 0)].decode(errors="ignore"))

    def term(self) -> TermNode:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's own advice on literals such as `1or 2`; refused below
                tree = ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            offset = min(max((error.offset or 1) - 1, 0), len(self.source) - 1)
            message = f"{error.msg or 'invalid syntax'}; expected {SPEC_FORM}"
            raise MixerSpecError(message, self.text, self.start + offset) from None
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise MixerSpecError(f"can't be read ({error}); expected {SPEC_FORM}", self.text, self.start) from None
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):
            return TermNode(self.count(tree.left), self.spec(tree.right))
        return TermNode(1, self.spec(tree))

    def count(self, node: ast.expr) -> int:
        if not isinstance(node, ast.Constant) or type(node.value) is not int:
            raise self.error("expected a whole number before '*', as in 3*chela", node)
        if not 1 <= node.value <= MAX_COUNT:
            raise self.error(f"a mixer repeats from 1 to {MAX_COUNT} times", node)
        return node.value

    def spec(self, node: ast.expr) -> SpecNode:
        if isinstance(node, ast.Name):
            return SpecNode(node.id, (), self.column(node))
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise self.error(f"expected a mixer: {SPEC_FORM}", node)
        options = []
        if len(node.args) > 1:
            raise self.error("options are written key=value; only one mixer may stand without a key", node.args[1])
        for argument in node.args:
            if not isinstance(argument, ast.Name | ast.Call):
                raise self.error("options are written key=value; only a mixer may stand without a key", argument)
            options.append(OptionNode(DEFAULT_KEY, self.value(argument), self.column(argument)))
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.error("'**' has no meaning here; options are written key=value", keyword.value)
            if any(option.key == keyword.arg for option in options):
                raise self.error(f"option '{keyword.arg}' is given twice", keyword)
            options.append(OptionNode(keyword.arg, self.value(keyword.value), self.column(keyword)))
        return SpecNode(node.func.id, tuple(options), self.column(node))

    def value(self, node: ast.expr) -> ValueNode:
        column = self.column(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            positive = node.operand
            if isinstance(positive, ast.Constant) and type(positive.value) in (int, float):
                inner = self.value(positive)
                return replace(inner, value=-inner.value, column=column)  # type: ignore[operator]  # a number, see above
        elif isinstance(node, ast.Constant):
            value = node.value
            if value is None or isinstance(value, bool | str):
                return ValueNode(value, column)
            if type(value) is int:
                if value > MAX_INT:
                    raise self.error("a whole number has at most 64 bits", node)
                return ValueNode(value, column)
            if type(value) is float:
                if not math.isfinite(value):
                    raise self.error("a number must be finite", node)
                return ValueNode(value, column)
        elif isinstance(node, ast.Name):
            return ValueNode(node.id, column)
        elif isinstance(node, ast.Tuple):
            return ValueNode(tuple(self.value(item) for item in node.elts), column)
        elif isinstance(node, ast.Call):
            return ValueNode(self.spec(node), column)
        raise self.error(f"expected {VALUE_FORM}", node)
