"""The plain-PyTorch language model; importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chela_plugin.lm.cache import ChelaCache
from chela_plugin.lm.config import ChelaConfig
from chela_plugin.lm.model import ChelaForCausalLM, ChelaModel

AutoConfig.register(ChelaConfig.model_type, ChelaConfig, exist_ok=True)
AutoModel.register(ChelaConfig, ChelaModel, exist_ok=True)
AutoModelForCausalLM.register(ChelaConfig, ChelaForCausalLM, exist_ok=True)

__all__ = ["ChelaCache", "ChelaConfig", "ChelaForCausalLM", "ChelaModel"]
