"""Vision backbones; importing this package registers them with timm."""

from chela_plugin.vision.chela_former import ChelaFormer
from chela_plugin.vision.chela_vit import ChelaViT

__all__ = ["ChelaFormer", "ChelaViT"]
