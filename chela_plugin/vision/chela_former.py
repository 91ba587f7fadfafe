"""ChelaFormer: four stages of token mixers and MLPs (MetaFormer), and its entries in timm's registry."""

# No `from __future__ import annotations`: torch.fx copies annotations into the code that it writes, as strings then.
from collections import OrderedDict
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerNorm,
    LayerNorm2d,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_act_layer,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from chela_plugin.registry import MixerSpec, parse_pattern
from chela_plugin.vision.block import (
    MixerBlock,
    init_weights_outside,
    mixers_of,
    no_weight_decay_of,
    reparameterize_mixers,
)

__all__ = ["ChelaFormer"]


class Stage(nn.Module):
    """Halve the image if `downsample`, then mix its pixels as tokens: `[B, C, H, W]` to `[B, D, h, w]`."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        downsample: bool,
        first: int,
        mixers: list[MixerSpec],
        drop_path: list[float],
        mlp_ratio: float,
        init_values: float | None,
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            conv = nn.Conv2d(in_dim, dim, kernel_size=3, stride=2, padding=1, **dd)
            self.downsample = nn.Sequential(OrderedDict(norm=LayerNorm2d(in_dim, **dd), conv=conv))
        self.blocks = nn.ModuleList(
            MixerBlock(
                dim,
                depth=first + i,
                mixers=mixers,
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                drop_path=rate,
                norm_layer=LayerNorm,
                act_layer=act_layer,
                **dd,
            )
            for i, rate in enumerate(drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                tokens = checkpoint(block, tokens, grid)
            else:
                tokens = block(tokens, grid)
        return tokens.transpose(1, 2).reshape(x.shape)


class Head(nn.Module):
    """Pool, norm, classifier: `[B, D, h, w]` to `[B, num_classes]`; without pooling, scores of every place."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, device=None, dtype=None):
        super().__init__()
        self.global_pool = pooling(global_pool)
        self.norm: nn.Module = LayerNorm2d(dim, device=device, dtype=dtype)
        self.flatten: nn.Module = nn.Flatten(1) if global_pool else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = classifier(dim, num_classes, bool(global_pool), device=device, dtype=dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.flatten(self.norm(self.global_pool(x))))
        return x if pre_logits else self.fc(x)


def pooling(kind: str) -> SelectAdaptivePool2d:
    """timm's pooling; AssertionError, as timm's own models raise, for one that widens the features."""
    pool = SelectAdaptivePool2d(pool_type=kind)
    if pool.feat_mult() != 1:
        raise AssertionError(f"global_pool={kind!r} changes the width of the features, which the norm behind it fixes")
    return pool


def classifier(dim: int, num_classes: int, pooled: bool, **factory: Any) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    return nn.Linear(dim, num_classes, **factory) if pooled else nn.Conv2d(dim, num_classes, 1, **factory)


class ChelaFormer(nn.Module):
    """MetaFormer (arXiv:2210.13452) whose blocks mix tokens with any mixer; features at strides 4, 8, 16 and 32.

    Convolutions embed the patches and halve the image between stages; there are no position embeddings, and no
    parameter depends on the size of the image, which may be any.

    Args:
        depths, dims: Blocks and width of each stage.
        mixer: Spec or pattern string over the blocks of all stages in order, as in ChelaViT; kept as `mixer`.
        mlp_ratio: Hidden width of the MLP over the stage's.
        init_values: Initial LayerScale, None for none.
        device, dtype: Of all parameters, the mixers' included.

    Raises:
        TypeError: `mixer` is not a string.
        ValueError: a bad spec (`MixerSpecError`).
    A mixer that is only causal is built with a warning that names `bidirectional(...)`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "fast", "avg", "avgmax", "max"] = "avg",
        depths: tuple[int, ...] = (2, 2, 6, 2),
        dims: tuple[int, ...] = (64, 128, 320, 512),
        mixer: str = "chela",
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | type[nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        mixers = mixers_of(mixer, sum(depths))
        self.mixer = str(parse_pattern(mixer))
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        stem = nn.Conv2d(in_chans, dims[0], kernel_size=7, stride=4, padding=2, **dd)
        self.stem = nn.Sequential(OrderedDict(conv=stem, norm=LayerNorm2d(dims[0], **dd)))
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages: list[Stage] = []
        in_dim, first = dims[0], 0
        for depth, dim, drop_path in zip(depths, dims, rates, strict=True):
            stages.append(
                Stage(
                    in_dim,
                    dim,
                    downsample=bool(stages),  # the stem has embedded the patches of the first
                    first=first,
                    mixers=mixers,
                    drop_path=drop_path,
                    mlp_ratio=mlp_ratio,
                    init_values=init_values,
                    act_layer=get_act_layer(act_layer) or nn.GELU,
                    **dd,
                )
            )
            in_dim, first = dim, first + depth
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.head = Head(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As MetaFormer: normal weights of deviation 0.02, no biases. The mixers initialise themselves.

        `needs_reset` for parameters without values, after `to_empty`: whatever has a `reset_parameters()` gets it.
        """

        def reset(module: nn.Module, name: str) -> None:
            if needs_reset and hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()

        def init(module: nn.Module, name: str) -> None:
            reset(module, name)
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        init_weights_outside([block.mixer for block in self.all_blocks()], self, init, reset)

    @torch.jit.ignore
    def all_blocks(self) -> list[MixerBlock]:
        """The blocks of all stages, in the order in which the mixer's pattern counts them."""
        return [module for module in self.stages.modules() if isinstance(module, MixerBlock)]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: what the mixers mark."""
        return no_weight_decay_of(self)

    @torch.jit.ignore
    def reparameterize(self) -> "ChelaFormer":
        """Fold the branches of every mixer's convolution, in place; for inference (call eval() first)."""
        reparameterize_mixers(self)
        return self

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then blocks in order (or stages, if `coarse`)."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass."""
        for stage in cast(list[Stage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes (0 for features), and another pooling unless None ('' for none)."""
        head = self.head
        if global_pool is not None:
            head.global_pool = pooling(global_pool).train(head.training)
            head.flatten = (nn.Flatten(1) if global_pool else nn.Identity()).train(head.training)
        like = next(self.parameters())
        pooled = not head.global_pool.is_identity()
        fc = classifier(self.num_features, num_classes, pooled, device=like.device, dtype=like.dtype)
        head.fc = fc.train(head.training)
        self.num_classes = num_classes

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the stages in `indices` (the last n if an int, all if None), as timm's method of this name.

        Each is `[B, D, h, w]`. `norm` changes nothing: the one norm behind the stages is that of the pooled features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        features = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and the head, which is of no use then."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.head.norm = nn.Identity().train(self.training)
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `[B, C, H, W]` to features `[B, D, H/32, W/32]`, rounded up."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to class scores `[B, num_classes]`, or to what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Image `[B, C, H, W]` to class scores `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"chela_former_s12": _cfg(), "chela_former_s24": _cfg()})


def _create_chela_former(variant: str, pretrained: bool, **kwargs: Any) -> ChelaFormer:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    model = build_model_with_cfg(
        ChelaFormer,
        variant,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
    if isinstance(model, ChelaFormer):
        # timm saves what the caller gave; the mixer belongs in a saved config also where it is the default.
        cast(Any, model)._model_args = {"mixer": model.mixer}
    return model


@register_model
def chela_former_s12(pretrained: bool = False, **kwargs: Any) -> ChelaFormer:
    """12 blocks of widths 64, 128, 320 and 512, those of PoolFormer-S12."""
    args = {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512)}
    return _create_chela_former("chela_former_s12", pretrained, **{**args, **kwargs})


@register_model
def chela_former_s24(pretrained: bool = False, **kwargs: Any) -> ChelaFormer:
    """24 blocks of widths 64, 128, 320 and 512, those of PoolFormer-S24."""
    args = {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512)}
    return _create_chela_former("chela_former_s24", pretrained, **{**args, **kwargs})
