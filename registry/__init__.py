"""The registry: mixer strings, who declares which mixer, and one call that builds it. Imports no torch.

grammar.py     text to a tree, never evaluated
spec.py        MixerSpec and Pattern, canonical strings
installed.py   entry points, run-time registration, what is missing and how to mend it
presets.py     named specs from configs/mixers/
signature.py   options against a factory's annotations
resolve.py     all of these together: a checked MixerSpec
create.py      create_mixer
"""

from chela_plugin.registry.create import create_mixer
from chela_plugin.registry.errors import MixerSpecError, MixerUnavailableError, UnknownMixerError
from chela_plugin.registry.installed import MixerListing, list_mixers, register_mixer
from chela_plugin.registry.spec import MixerSpec, Pattern, parse_pattern

__all__ = [
    "MixerListing",
    "MixerSpec",
    "MixerSpecError",
    "MixerUnavailableError",
    "Pattern",
    "UnknownMixerError",
    "create_mixer",
    "list_mixers",
    "parse_pattern",
    "register_mixer",
]
