"""Parts of timm, transformers and fla that are theirs to change, each behind one file of ours.

When a release moves one, the test of that line fails and says which file to mend (CONTRIBUTING, "A changed seam").
A private part that is imported but not listed fails too.
"""

import ast
import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"timm": "timm", "transformers": "transformers", "fla": "flash-linear-attention"}

# our file, their module, their name, parameters that we pass or replace (None where it is no function)
SEAMS = [
    ("chela_plugin/attn_layer.py", "timm.models.vision_transformer", "ATTN_LAYERS", None),
    ("chela_plugin/attn_layer.py", "timm.models.vision_transformer", "Block.__init__", ["attn_layer"]),
    ("chela_plugin/attn_layer.py", "timm.models.naflexvit", "get_block_fn", ["cfg"]),
    ("chela_plugin/attn_layer.py", "timm.models.naflexvit", "EvaBlock", None),
    ("chela_plugin/attn_layer.py", "timm.models.metaformer", "MetaFormer.__init__", ["token_mixers"]),
    ("chela_plugin/attn_layer.py", "timm.models.metaformer", "Pooling", None),
    ("chela_plugin/vision/chela_vit.py", "timm.models._features", "feature_take_indices", ["num_features", "indices"]),
    ("chela_plugin/vision/chela_vit.py", "timm.models.vision_transformer", "VisionTransformer.__init__", ["block_fn"]),
    (
        "chela_plugin/vision/chela_vit.py",
        "timm.models.vision_transformer",
        "checkpoint_filter_fn",
        ["state_dict", "model"],
    ),
    ("chela_plugin/vision/chela_vit.py", "timm.models.vision_transformer", "get_init_weights_vit", ["mode"]),
    (
        "chela_plugin/lm/model.py",
        "transformers",
        "GenerationMixin._prepare_cache_for_generation",
        ["generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"],
    ),
    (
        "chela_plugin/lm/model.py",
        "transformers",
        "GenerationMixin._valid_auto_compile_criteria",
        ["model_kwargs", "generation_config"],
    ),
    ("chela_plugin/lm/model.py", "transformers", "PreTrainedModel.get_compiled_call", ["compile_config"]),
    ("chela_plugin/lm/model.py", "transformers", "GenerationMixin._supports_default_dynamic_cache", None),
    ("chela_plugin/lm/cache.py", "transformers", "Cache.__init__", ["layers"]),
    ("chela_plugin/lm/model.py", "transformers.modeling_layers", "GradientCheckpointingLayer", None),
    ("chela_plugin/lm/fla_mixer.py", "fla.models.utils", "FLACache", None),
    ("chela_plugin/lm/fla_cpu.py", "fla.backends", "register", ["backend"]),
    ("chela_plugin/lm/fla_cpu.py", "fla.backends", "BaseBackend.is_available", None),
    ("chela_plugin/lm/fla_cpu.py", "fla.modules.activations.ops", "swiglu_fwd", ["x", "y"]),
    ("chela_plugin/lm/fla_cpu.py", "fla.modules.activations.ops", "swiglu_fwdbwd", ["x", "y", "g", "use_weight"]),
    ("chela_plugin/lm/fla_cpu.py", "fla.utils", "device_platform", None),
    ("chela_plugin/lm/fused_block.py", "fla.modules.activations.ops", "swiglu_fwd", ["x", "y", "output_contiguous"]),
    (
        "chela_plugin/lm/fused_block.py",
        "fla.modules.activations.ops",
        "swiglu_fwdbwd",
        ["x", "y", "g", "use_weight", "output_contiguous"],
    ),
]


@pytest.mark.parametrize(("ours", "module", "name", "parameters"), SEAMS, ids=lambda value: str(value)[-40:])
def test_a_seam_is_where_it_was(ours, module, name, parameters):
    host = module.partition(".")[0]
    found = pytest.importorskip(host) and importlib.import_module(module)
    place = f"{module}.{name} of {host} {importlib.metadata.version(DISTRIBUTIONS[host])}"
    for part in name.split("."):
        assert hasattr(found, part), f"{place} is gone; mend {ours}"
        found = getattr(found, part)
    if parameters is not None:
        signature = inspect.signature(inspect.unwrap(found)).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        lacking = [p for p in parameters if p not in signature and not open_ended]
        assert not lacking, f"{place} takes no {', '.join(lacking)} any more; mend {ours}"


@pytest.mark.skipif(not (ROOT / "chela_plugin").is_dir(), reason="reads the source; here is only an installed package")
def test_no_private_part_is_imported_that_is_not_listed():
    """Private: a leading underscore anywhere in the path of what is imported from one of the hosts."""
    listed = {(module, name.split(".")[0]) for _, module, name, _ in SEAMS}
    unlisted = []
    for file in (ROOT / "chela_plugin").rglob("*.py"):
        if "bench" in file.parts:  # times peers as they are; no user's path leads through it
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] in DISTRIBUTIONS:
                for alias in node.names:
                    private = any(part.startswith("_") for part in [*node.module.split("."), alias.name])
                    if private and (node.module, alias.name) not in listed:
                        unlisted.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}")
    assert not unlisted, "\n".join(unlisted)
