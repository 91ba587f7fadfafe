"""ChelaViT: timm's Vision Transformer with a token mixer chosen by a string, and its entries in timm's registry."""

# No `from __future__ import annotations`: torch.fx copies annotations into the code that it writes, as strings then.
import math
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, PatchDropout, get_act_layer, get_norm_layer, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn, get_init_weights_vit
from torch import Tensor, nn

from chela_plugin.registry import parse_pattern
from chela_plugin.vision.block import (
    MixerBlock,
    PatchConv,
    init_weights_outside,
    mixers_of,
    no_weight_decay_of,
    reparameterize_mixers,
)

__all__ = ["ChelaViT"]


class ChelaViT(VisionTransformer):
    """Vision Transformer (arXiv:2010.11929) whose blocks mix tokens with any mixer; average pooling, no class token.

    Everything else is timm's: position embedding, resizing, pooling, heads, feature extraction, parameter groups.

    Args:
        mixer: Spec or pattern string, e.g. `'chela'`, `'bidirectional(mamba2)'`, `'3*chela + attention'`; `native`
            stands for `chela`. The canonical string is kept as the attribute `mixer`.
        embed_dim, depth, mlp_ratio: Width D, number of blocks, hidden width of the MLP over D.
        patch_drop_rate: Share of patches dropped in training; only without mixers that read the patch grid.
        weight_init: timm's scheme for everything but the mixers, which initialise themselves.
        device, dtype: Of all parameters, the mixers' included.

    Raises:
        TypeError: `mixer` is not a string.
        ValueError: a bad spec (`MixerSpecError`), an image that whole patches don't fill, pooling that needs a class
            token or attention, patch dropout with a mixer that reads the grid.
    A mixer that is only causal is built with a warning that names `bidirectional(...)`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max"] = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        mixer: str = "chela",
        init_values: float | None = None,
        pos_embed: Literal["learn", "none"] = "learn",
        fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["", "jax", "jax_nlhb", "moco", "skip", "reset"] = "",
        norm_layer: str | type[nn.Module] | None = None,
        act_layer: str | type[nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        if global_pool not in ("", "avg", "avgmax", "max"):
            raise ValueError(f"ChelaViT has no class token; global_pool is '', avg, avgmax or max, got {global_pool!r}")
        mixers = mixers_of(mixer, depth)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            mlp_ratio=mlp_ratio,
            init_values=init_values,
            class_token=False,
            pos_embed=pos_embed,
            fc_norm=fc_norm,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init=weight_init,
            norm_layer=get_norm_layer(norm_layer) or LayerNorm,
            act_layer=get_act_layer(act_layer) or nn.GELU,
            block_fn=cast(type[nn.Module], partial(MixerBlock, mixers=mixers)),
            device=device,
            dtype=dtype,
        )
        self.mixer = str(parse_pattern(mixer))
        check_divisible(img_size, patch_size, self.patch_embed)
        self.patch_embed.proj = PatchConv.of(cast(nn.Conv2d, self.patch_embed.proj))
        # A block takes the grid too, which a Sequential could not pass on (TorchScript compiles its forward).
        cast(Any, self).blocks = nn.ModuleList(self.blocks)
        if patch_drop_rate > 0:
            for spec, block in zip(mixers, self.blocks, strict=True):
                if block.uses_grid:
                    raise ValueError(
                        f"patch_drop_rate breaks the patch grid that mixer {str(spec)!r} reads; set it to 0"
                    )
            # A recurrent mixer sees order: keep what remains in raster order, where timm would shuffle it.
            self.patch_drop = PatchDropout(patch_drop_rate, num_prefix_tokens=0, ordered=True)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation for everything but the mixers; those only `reset_parameters()`, if `needs_reset`."""
        mode = mode or self.weight_init_mode
        head_bias = -math.log(self.num_classes) if "nlhb" in mode else 0.0
        init = get_init_weights_vit(mode, head_bias, needs_reset=needs_reset)
        reset = get_init_weights_vit("reset", needs_reset=needs_reset)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        init_weights_outside([block.mixer for block in cast(list[MixerBlock], self.blocks)], self, init, reset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: the position embedding, and what the mixers mark."""
        return {"pos_embed"} | no_weight_decay_of(self)

    @torch.jit.ignore
    def reparameterize(self) -> "ChelaViT":
        """Fold the branches of every mixer's convolution, in place; for inference (call eval() first)."""
        reparameterize_mixers(self)
        return self

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """timm's: resample the position embedding, and the patch embedding, to new sizes."""
        patch = self.patch_embed.patch_size if patch_size is None else to_2tuple(patch_size)
        check_divisible(self.patch_embed.img_size if img_size is None else img_size, patch, self.patch_embed)
        super().set_input_size(img_size=cast(Any, img_size), patch_size=cast(Any, patch_size))
        self.patch_embed.proj = PatchConv.of(cast(nn.Conv2d, self.patch_embed.proj))  # timm may have made a new one

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image `[B, C, H, W]` to embedded patches `[B, T, D]` and their grid."""
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return self.patch_drop(self._pos_embed(self.patch_embed(x))), grid

    # No masks: a mixer sees the whole image. The reason stands here because TorchScript reads text behind
    # `type: ignore` as a type.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Image `[B, C, H, W]` to class scores `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    # As forward.
    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Image `[B, C, H, W]` to normalised patch features `[B, T, D]`."""
        x, grid = self._patches(x)
        if torch.jit.is_scripting():
            for block in self.blocks:
                x = block(x, grid)
        else:
            x = self._through_blocks(x, grid)
        return self.norm(x)

    @torch.jit.ignore
    def _through_blocks(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """All blocks; on a GPU each hands its last branch on, to be added where the next one takes its norm."""
        chained = not self.grad_checkpointing and type(x) is Tensor and x.is_cuda  # fx traces calls of modules
        branch: Tensor | None = None
        for block in cast(list[MixerBlock], self.blocks):
            if chained and not block.hooked():
                x, branch = block.branches(x, branch, grid)
                continue
            x, branch = x if branch is None else x + branch, None
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x if branch is None else x + branch

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Features after the blocks in `indices` (the last n if an int, all if None), as timm's method of this name.

        Each is `[B, D, h, w]` for `output_fmt='NCHW'`, `[B, T, D]` for `'NLC'`, normalised if `norm`. There are no
        prefix tokens, so `return_prefix_tokens` changes nothing.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        if attn_mask is not None or is_causal:  # parameters that get_intermediate_layers passes on
            raise ValueError("ChelaViT takes no attn_mask and no is_causal: its mixers see every patch of the image")
        x, grid = self._patches(x)
        if output_fmt == "NCHW" and x.shape[1] != grid[0] * grid[1]:
            raise ValueError("dropped patches leave no grid: use output_fmt='NLC' or eval mode with patch_drop_rate")
        features = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
            if i in take:
                y = self.norm(x) if norm else x
                features.append(y.transpose(1, 2).unflatten(2, grid).contiguous() if output_fmt == "NCHW" else y)
        if output_dict:
            out: dict[str, Any] = {"image_intermediates": features}
            return out if intermediates_only else out | {"image_features": self.norm(x)}
        return features if intermediates_only else (self.norm(x), features)


def check_divisible(img_size: int | tuple[int, int], patch_size: int | tuple[int, int], embed: nn.Module) -> None:
    """Raise ValueError for an image that whole patches don't fill: timm would leave its edge out silently."""
    size, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if not embed.dynamic_img_pad and (size[0] % patch[0] or size[1] % patch[1]):
        raise ValueError(
            f"an image of {size[0]} x {size[1]} is not whole patches of {patch[0]} x {patch[1]}; "
            "choose another img_size or patch_size, or dynamic_img_pad=True"
        )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "chela_vit_tiny_patch16_224": _cfg(),
        "chela_vit_small_patch16_224": _cfg(),
        "chela_vit_base_patch16_224": _cfg(),
        "chela_vit_tiny": _cfg(),
        "chela_vit_small": _cfg(),
        "chela_vit_base": _cfg(),
    }
)


def _create_chela_vit(variant: str, pretrained: bool, **kwargs: Any) -> ChelaViT:
    out_indices = kwargs.pop("out_indices", 3)
    model = build_model_with_cfg(
        ChelaViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
    if isinstance(model, ChelaViT):
        # timm saves what the caller gave; the mixer belongs in a saved config also where it is the default.
        cast(Any, model)._model_args = {"mixer": model.mixer}
    return model


@register_model
def chela_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChelaViT:
    """Width 192, 12 blocks."""
    args = {"patch_size": 16, "embed_dim": 192, "depth": 12}
    return _create_chela_vit("chela_vit_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def chela_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChelaViT:
    """Width 384, 12 blocks."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12}
    return _create_chela_vit("chela_vit_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def chela_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChelaViT:
    """Width 768, 12 blocks."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12}
    return _create_chela_vit("chela_vit_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def chela_vit_tiny(pretrained: bool = False, **kwargs: Any) -> ChelaViT:
    """Alias of `chela_vit_tiny_patch16_224`."""
    return chela_vit_tiny_patch16_224(pretrained, **kwargs)


@register_model
def chela_vit_small(pretrained: bool = False, **kwargs: Any) -> ChelaViT:
    """Alias of `chela_vit_small_patch16_224`."""
    return chela_vit_small_patch16_224(pretrained, **kwargs)


@register_model
def chela_vit_base(pretrained: bool = False, **kwargs: Any) -> ChelaViT:
    """Alias of `chela_vit_base_patch16_224`."""
    return chela_vit_base_patch16_224(pretrained, **kwargs)
