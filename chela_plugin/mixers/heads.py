"""How a width is divided into heads, and what is said when it can't be."""

from __future__ import annotations

from collections.abc import Sequence

from chela_plugin.kernels.linear_attention import MAX_WIDTH


def divide(mixer: str, width: int, num_heads: int | None, head_dim: int | None, widths: Sequence[int]) -> int:
    """Number of heads for `width` channels.

    Args:
        mixer: name for the error message.
        width: channels to divide.
        num_heads, head_dim: what the user asked for; None where it is left to us.
        widths: head widths to try in turn when the user gave neither.

    Raises ValueError when the heads don't divide the width evenly.
    """
    if num_heads is not None and num_heads < 1:
        raise ValueError(f"{mixer}: num_heads must be at least 1, got {num_heads}")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"{mixer}: head_dim must be at least 1, got {head_dim}")
    if num_heads is not None and head_dim is not None and num_heads * head_dim != width:
        raise ValueError(f"{mixer}: num_heads={num_heads} x head_dim={head_dim} must make {width} channels")
    if num_heads is not None:
        if width % num_heads:
            raise ValueError(
                f"{mixer}: {width} channels are not divisible by num_heads={num_heads}; choose one of {divisors(width)}"
            )
        return num_heads
    for each in [head_dim] if head_dim is not None else widths:
        if width % each == 0:
            return width // each
    asked = f"head_dim={head_dim}" if head_dim is not None else f"a head_dim of {' or '.join(map(str, widths))}"
    raise ValueError(f"{mixer}: {width} channels are not divisible by {asked}; choose one of {divisors(width)}")


def attention_heads(mixer: str, dim: int, num_heads: int | None, head_dim: int | None) -> int:
    """`divide` for softmax attention and its likes: by default heads are 64 wide, 32 in models narrower than 128."""
    return divide(mixer, dim, num_heads, head_dim, (64, 32, 16, 8) if dim >= 128 else (32, 16, 8))


def key_value_heads(mixer: str, keys: int, values: int, heads: int) -> dict[str, int]:
    """What `heads` heads make of so many key and value channels, as mixers' arguments. Raises as `divide` does."""
    for width in (keys, values):
        divide(mixer, width, heads, None, ())
    return {"num_heads": heads, "key_dim": keys // heads, "value_dim": values // heads}


def heads_at_least(width: int, narrowest: int, most: int) -> int:
    """The most heads, up to `most`, that divide `width` into parts at least `narrowest` wide (else 1)."""
    return max([n for n in range(1, most + 1) if width % n == 0 and width // n >= narrowest], default=1)


def fewest_heads(least: int, *widths: int) -> int:
    """The fewest heads, from `least` on, that every width allows (`check_head_widths`); `least` if none are."""
    fits = (n for n in range(least, min(widths) + 1) if all(w % n == 0 and w // n <= MAX_WIDTH for w in widths))
    return next(fits, least)


def check_head_widths(mixer: str, *widths: int) -> None:
    """Raise ValueError for heads wider than linear attention's kernels take."""
    if max(widths) > MAX_WIDTH:
        raise ValueError(f"{mixer}: heads are at most {MAX_WIDTH} wide, here {max(widths)}; use more, narrower heads")


def expanded(mixer: str, dim: int, factor: float, option: str) -> int:
    """`factor * dim` channels. Raises ValueError unless that is a whole positive number."""
    width = dim * factor
    if width < 1 or width != int(width):
        raise ValueError(
            f"{mixer}: {option}={factor} of {dim} channels makes {width:g}, not a whole number of channels"
        )
    return int(width)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
