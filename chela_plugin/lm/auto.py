"""Registers the language model with transformers' Auto classes without importing it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chela_plugin.lm.config import ChelaConfig


class ModelOnDemand:
    """Stands for a model class in an Auto class until it is used; `chela_plugin.lm.model` then registers itself.

    Importing that file brings transformers' model and generation code, 1.6 s that a program after a tokenizer or a
    configuration would wait for nothing.
    """

    config_class = ChelaConfig  # what the Auto classes look at when a model is registered

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(import_module("chela_plugin.lm.model"), self.name), attribute)

    def __reduce__(self):
        return ModelOnDemand, (self.name,)


AutoConfig.register(ChelaConfig.model_type, ChelaConfig, exist_ok=True)
AutoModel.register(ChelaConfig, ModelOnDemand("ChelaModel"), exist_ok=True)
AutoModelForCausalLM.register(ChelaConfig, ModelOnDemand("ChelaForCausalLM"), exist_ok=True)
