"""ChelaConfig: sizes of the language model and the string that names its mixers."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from chela_plugin.lm.distributions import distributions, parse_saved
from chela_plugin.registry import MixerSpec, parse_pattern


@strict
class ChelaConfig(PreTrainedConfig):
    """Configuration of `ChelaModel` and `ChelaForCausalLM`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width D.
        num_hidden_layers: Number of blocks.
        mixer: Spec or pattern string, e.g. `'chela'`, `'3*chela + attention'`; `native` stands for `chela`. Kept in its
            canonical form, which is what `save_pretrained` writes.
        intermediate_size: Hidden width of the SwiGLU MLP; by default the multiple of 64 nearest to 8/3 D, which gives
            the MLP the 8 D^2 parameters of an ungated one four times as wide (arXiv:2002.05202, section 2).
        norm_eps: Added to the mean square in every RMSNorm.
        initializer_range: Standard deviation of the normal initialisation of embeddings and MLPs. Mixers initialise
            themselves.
        tie_word_embeddings: Whether the output layer shares the embedding's weight.
        use_cache: Whether a forward pass outside training returns a cache.
        mixer_distributions: Written when the config is saved: what to install for mixers that are not ours.

    Raises:
        MixerSpecError (a ValueError): `mixer` is no valid pattern.
        ValueError: a size below 1.
        StrictDataclassFieldValidationError: a value of the wrong type, e.g. a class where `mixer` takes a string.
    """

    model_type = "chela"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers reads a plain list here

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 12
    mixer: str = "chela"
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    mixer_distributions: dict[str, str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = max(64, round(self.hidden_size * 8 / 3 / 64) * 64)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.mixer = str(parse_saved(self.mixer, self.mixer_distributions))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As saved."""
        out = super().to_dict()
        del out["mixer_distributions"]
        strangers = distributions(parse_pattern(self.mixer))
        return out | {"mixer_distributions": strangers} if strangers else out

    def mixer_specs(self) -> list[MixerSpec]:
        """One spec a block, `native` resolved."""
        specs = parse_pattern(self.mixer).expand(self.num_hidden_layers)
        return [MixerSpec.parse("chela") if spec.name == "native" else spec for spec in specs]
