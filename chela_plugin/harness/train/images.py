"""Image runs: data, augmentation, mixing, optimiser, schedule, averaging and losses are timm's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import chela_plugin.vision  # noqa: F401  # registers chela_vit_*, also where the autoload hook is switched off
from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.train.checkpoint import Tensors, load_model, model_tensors
from chela_plugin.harness.train.config import ImageRun
from chela_plugin.harness.train.flops import image_flops
from chela_plugin.harness.train.idx import IdxImages
from chela_plugin.harness.train.language import micro_batches
from chela_plugin.harness.train.loop import seed_all


def held(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A prefetched batch, whose memory is not given to a later one before this stream is done with it.

    timm's loader copies on a stream of its own. Before 1.0.31 nothing made those copies wait for the steps still
    queued, so where the GPU lagged behind the host (a slow mixer, a crowded card) steps were computed on the images and
    labels of later batches: losses near chance, or labels that are no class.
    """
    for tensor in (images, labels):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return images, labels


class ImageWork:
    """An image run's part of the loop (`loop.Work`).

    The saved and tested weights are the averaged ones where `ema_decay` is set, and the last epoch's: no epoch is
    chosen by the validation split.
    """

    unit = "images"
    flop_model = "3 x forward's matrix products and convolutions"

    def __init__(self, run: ImageRun, fabric: Any):
        self.run, self.fabric = run, fabric
        recipe, augmentation = run.training, run.augmentation
        mode = "L" if run.model.arguments.get("in_chans", 3) == 1 else "RGB"
        train, self.validation_data, self.classes = _datasets(run, mode)
        torch.manual_seed(run.seed)
        self.model = self._new()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        known: Any = self.model.pretrained_cfg
        size = run.model.arguments.get("img_size") or known["input_size"][1:]
        height, width = (size, size) if isinstance(size, int) else size
        channels = run.model.arguments.get("in_chans", 3)
        self.input_size = (channels, height, width)
        # timm's augmentations fill with the mean: one number a channel
        self.mean, self.std = (
            known[key] if len(known[key]) == channels else (sum(known[key]) / len(known[key]),) * channels
            for key in ("mean", "std")
        )
        self.flops_per_unit = image_flops(self.model, self.input_size)
        self.micro_batches = micro_batches(recipe.batch_size, fabric.world_size, run.machine.micro_batch_size)
        self.micro_batch_size = recipe.batch_size // fabric.world_size // self.micro_batches
        self.loader: Any = create_loader(
            train,
            self.input_size,
            self.micro_batch_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or 0.0,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            re_prob=augmentation.re_prob,
            re_mode=augmentation.re_mode,
            num_aug_repeats=augmentation.num_aug_repeats if fabric.world_size > 1 else 0,
            persistent_workers=False,  # fresh workers each epoch: their generators follow from (seed, step) alone
            **self._loading(),
        )
        self.steps_per_epoch = len(self.loader) // self.micro_batches
        if self.steps_per_epoch < 1:
            raise ConfigError(
                f"data.path {run.data.path} holds fewer training images than training.batch_size {recipe.batch_size}"
            )
        self.validation = self._validation(self.input_size)
        self.mixup = None
        if augmentation.mixup > 0 or augmentation.cutmix > 0:
            if self.micro_batch_size % 2:
                raise ConfigError(f"mixup takes an even number of images, a micro-batch has {self.micro_batch_size}")
            self.mixup = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                label_smoothing=augmentation.smoothing,
                num_classes=self.classes,
            )
        self.criterion: nn.Module
        if self.mixup is not None:
            self.criterion = SoftTargetCrossEntropy()
        elif augmentation.smoothing > 0:
            self.criterion = LabelSmoothingCrossEntropy(augmentation.smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()
        self.wrapped = fabric.setup_module(self.model)
        plain = create_optimizer_v2(
            self.model, recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.scheduler: Any = create_scheduler_v2(
            plain,
            recipe.scheduler,
            num_epochs=recipe.epochs,
            min_lr=recipe.min_learning_rate,
            warmup_lr=recipe.warmup_learning_rate,
            warmup_epochs=recipe.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )[0]
        self.optimizer = fabric.setup_optimizers(plain)
        self.average = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.steps, self.gradient_clip = recipe.epochs * self.steps_per_epoch, recipe.gradient_clip
        self.units_per_step = recipe.batch_size
        self.batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def _new(self) -> nn.Module:
        run = self.run
        try:
            return timm.create_model(run.model.name, num_classes=self.classes, **run.model.arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"model {run.model.name}: {error}") from None

    def _loading(self) -> dict[str, Any]:
        device = self.fabric.device
        return {
            "mean": self.mean,
            "std": self.std,
            "num_workers": self.run.data.workers,
            "distributed": self.fabric.world_size > 1,
            "pin_memory": device.type == "cuda",
            "device": device,
        }

    def _validation(self, size: tuple[int, int, int]) -> Any:
        """A loader over this process's share of the split at one size."""
        return create_loader(
            copy.copy(self.validation_data),  # timm sets the transform on the data set
            size,
            max(2, self.micro_batch_size),
            interpolation=self.run.augmentation.interpolation,
            crop_pct=self.run.training.crop_pct,
            **(self._loading() | {"num_workers": min(2, self.run.data.workers)}),
            persistent_workers=False,
        )

    def set_rate(self, step: int) -> float:
        self.scheduler.step_update(step)
        return self.optimizer.param_groups[0]["lr"]

    def start(self, step: int) -> None:
        for skipped in range(step % self.steps_per_epoch):  # read and dropped: the workers' generators move on
            first = step - step % self.steps_per_epoch + skipped
            for micro in range(self.micro_batches):
                self._next(first, micro)

    def _next(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        seed_all("images", self.run.seed, step, micro, self.fabric.global_rank)
        if self.batches is None:
            sampler = self.loader.sampler
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(step // self.steps_per_epoch)
            self.batches = iter(self.loader)
        images, labels = held(*next(self.batches))
        if micro == self.micro_batches - 1 and (step + 1) % self.steps_per_epoch == 0:
            self.batches = None
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def loss(self, step: int, micro: int) -> Tensor:
        images, labels = self._next(step, micro)
        seed_all("dropout", self.run.seed, step, micro, self.fabric.global_rank)
        return self.criterion(self.wrapped(images).float(), labels)

    def stepped(self, step: int) -> None:
        if self.average is not None:
            self.average.update(self.model, step=step)

    def due(self, step: int) -> bool:
        return step % (self.steps_per_epoch * self.run.training.evaluate_every) == 0

    def evaluate(self) -> dict[str, float]:
        model: nn.Module = self.model if self.average is None else self.average.module
        accuracy, loss = self._score(model, self.validation)
        return {"validation_accuracy": accuracy, "validation_loss": loss}

    @torch.no_grad()
    def _score(self, model: nn.Module, loader: Any) -> tuple[float, float]:
        """Top-1 accuracy and cross-entropy; images that timm's sampler repeats to fill up a share don't count."""
        model.eval()
        rank, world = self.fabric.global_rank, self.fabric.world_size
        left = len(range(rank, len(self.validation_data), world))
        total = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        for batch in loader:
            images, labels = held(*batch)
            with self.fabric.autocast():
                logits = model(images)
            logits, labels = logits[:left].float(), labels[:left]
            left -= len(labels)
            total[0] += (logits.argmax(-1) == labels).sum()
            total[1] += nn.functional.cross_entropy(logits, labels, reduction="sum")
            total[2] += len(labels)
        total = self.fabric.all_reduce(total, reduce_op="sum")
        return (total[0] / total[2]).item(), (total[1] / total[2]).item()

    def extra_tensors(self, keep: bool) -> Tensors:
        return {} if self.average is None else model_tensors(self.average.module, keep)

    def load_extra(self, tensors: Tensors) -> None:
        if self.average is not None:
            load_model(self.average.module, tensors)

    def finish(self, out: Path) -> dict[str, Any]:
        """Test at other sizes; save for `timm.create_model('local-dir:<out>')`. Every process calls it."""
        model: nn.Module = self.model if self.average is None else self.average.module
        found = {}
        for size in self.run.training.eval_sizes:
            moved: Any = copy.deepcopy(model)
            if hasattr(moved, "set_input_size"):
                moved.set_input_size(img_size=size)
            found[str(size)] = self._score(moved, self._validation((self.input_size[0], size, size)))[0]
        if self.fabric.global_rank == 0:
            plain = self._new()
            load_model(plain, model_tensors(model, True))
            # A mixer keeps its canonical string in the model; what was given stands beside it.
            arguments = {**getattr(plain, "_model_args", {}), **self.run.model.arguments}
            save_for_hf(plain, str(out), model_args=arguments, safe_serialization=True)
        return {"accuracy_at_size": found} if found else {}


def _datasets(run: ImageRun, mode: str) -> tuple[Any, Any, int]:
    """Training and validation set, and the number of classes. Raises ConfigError."""
    data = run.data
    if data.kind == "idx":
        train, test = IdxImages(data.path, "train", mode), IdxImages(data.path, "t10k", mode)
        return train, test, max(train.classes, test.classes)
    if not (data.path / "train").is_dir() or not any((data.path / n).is_dir() for n in ("validation", "val")):
        raise ConfigError(
            f"data.path {data.path} must hold train/ and validation/ (or val/), each with one folder a class"
        )
    try:
        sets = [
            create_dataset("", root=str(data.path), split=split, input_img_mode=mode)
            for split in ("train", "validation")
        ]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"data.path {data.path}: {error}") from None
    names: list[Any] = [s.reader.class_to_idx for s in sets]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ConfigError(f"data.path {data.path}: train and validation don't have the same classes: {', '.join(odd)}")
    return sets[0], sets[1], len(names[0])
