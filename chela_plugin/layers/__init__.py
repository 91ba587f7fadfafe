"""The CHELA mixer and its convolution."""

from .chela import Chela
from .mixer import Cache, Mixer
from .short_long_conv import ShortLongConv

__all__ = ["Cache", "Chela", "Mixer", "ShortLongConv"]
