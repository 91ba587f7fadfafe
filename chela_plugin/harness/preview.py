"""A look at a task's examples in a terminal: pictures as shades, signals as curves, tokens above their targets."""

from __future__ import annotations

import math

from torch import Tensor

from chela_plugin.harness.tasks import IGNORE, Examples

WIDTH = 96
SHADES = " .:-=+*#%@"
BARS = "▁▂▃▄▅▆▇█"


def preview(data: Examples, row: int) -> str:
    """One example as text, at most WIDTH columns; a sequence's middle is left out where it is longer."""
    inputs, target = data.inputs[row], data.targets[row]
    answer = "" if target.ndim else f"class {int(target)} of {data.classes}\n"
    if not inputs.is_floating_point():
        sequences = inputs if inputs.ndim == 2 else inputs[None]
        lines = [_tokens(s, target if target.ndim else None, data) for s in sequences]
        return answer + "\n".join(lines)
    if inputs.ndim == 3:  # an image
        return answer + _shades(inputs.mean(0))
    side = math.isqrt(len(inputs))
    if side * side == len(inputs) and side <= WIDTH:  # a square picture, pixel by pixel
        return answer + _shades(inputs[:, 0].view(side, side))
    return answer + _curve(inputs[:, 0].float())


def _shades(image: Tensor) -> str:
    image = image[:: max(1, -(-image.shape[0] // WIDTH)), :: max(1, -(-image.shape[1] // WIDTH))].float()
    low, high = image.min(), image.max()
    level = ((image - low) / (high - low).clamp(min=1e-9) * (len(SHADES) - 1)).round().long()
    return "\n".join("".join(SHADES[i] for i in line).rstrip() for line in level.tolist())


def _curve(signal: Tensor) -> str:
    loudest = [part.abs().max() for part in signal.tensor_split(min(WIDTH, len(signal)))]
    top = max(loudest).clamp(min=1e-9)
    return "".join(BARS[int(value / top * (len(BARS) - 1))] for value in loudest)


def _tokens(tokens: Tensor, targets: Tensor | None, data: Examples) -> str:
    if data.padding is not None:
        used = (tokens != data.padding).nonzero().squeeze(1)
        tokens = tokens[used[0] : used[-1] + 1] if len(used) else tokens[:0]
        targets = targets[used[0] : used[-1] + 1] if targets is not None and len(used) else targets
    if data.metric == "bits_per_byte":
        return repr(bytes(tokens[: WIDTH - 4].tolist()).decode(errors="replace"))
    cell = len(str((data.vocabulary or data.classes) - 1)) + 1
    fits = max(1, WIDTH // cell - 1)
    places = list(range(len(tokens)))
    if len(places) > fits:
        places = [*places[: fits // 2], -1, *places[len(places) - (fits - fits // 2 - 1) :]]

    def line(values: list[str]) -> str:
        return "".join(("…" if place < 0 else values[place]).rjust(cell) for place in places).rstrip()

    shown = [line([str(t) for t in tokens.tolist()])]
    if targets is not None:
        shown.append(line(["" if t == IGNORE else str(t) for t in targets.tolist()]))
    return "\n".join(shown)
