"""Language runs: any causal model of transformers' registry on a stream of tokens."""

from __future__ import annotations

import difflib
import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from chela_plugin.harness.config import ConfigError, Training
from chela_plugin.harness.data_order import batch_rows
from chela_plugin.harness.extras import need
from chela_plugin.harness.train.checkpoint import Tensors, load_model, model_tensors
from chela_plugin.harness.train.config import LanguageModel, LanguageRun
from chela_plugin.harness.train.flops import language_flops
from chela_plugin.harness.train.tokens import Stream, streams
from chela_plugin.harness.training import learning_rate_at
from chela_plugin.harness.update import adamw


def new_model(config: LanguageModel, vocabulary: int) -> nn.Module:
    """A fresh model on the CPU. Raises ConfigError for an unknown type or argument."""
    need("transformers", "lm")
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.model_type == "chela":
        import chela_plugin.lm  # registers the type, also where the autoload hook is switched off
    else:
        import importlib.util

        if importlib.util.find_spec("fla") is not None:
            import fla.models  # noqa: F401  # registers its types

            import chela_plugin.lm.fla_models  # noqa: F401  # token_mixer
    given = config.config
    if "vocab_size" in given and given["vocab_size"] != vocabulary:
        raise ConfigError(f"model.config.vocab_size is {given['vocab_size']}, the data's is {vocabulary}; leave it out")
    try:
        kind = type(AutoConfig.for_model(config.model_type))
    except ValueError:
        raise ConfigError(
            f"model.model_type {config.model_type!r} is none that transformers knows here; for fla's, install "
            "'chela-plugin[lm]'"
        ) from None
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", ()))
    if hasattr(kind, "token_mixer"):
        known.add("token_mixer")
    known -= {"self", "kwargs"}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"model.config: {kind.__name__} has no argument {key!r}; {hint}")
    try:
        return AutoModelForCausalLM.from_config(kind(**{**given, "vocab_size": vocabulary}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.config: {error}") from None


def micro_batches(batch: int, world: int, micro: int | None) -> int:
    """How many micro-batches a process takes for an update. Raises ConfigError where the sizes don't divide."""
    if batch % world:
        raise ConfigError(f"training.batch_size {batch} can't be shared by {world} devices; make it a multiple")
    share = batch // world
    size = micro or share
    if share % size:
        raise ConfigError(
            f"training.batch_size {batch} over {world} device(s) is {share}, no multiple of machine.micro_batch_size "
            f"{size}"
        )
    return share // size


def shard_blocks(model: nn.Module, mesh: Any, *, names: tuple[str, ...]) -> nn.Module:
    """FSDP2: every block is a unit that is gathered, used and dropped; what remains is one more."""
    from torch.distributed.fsdp import fully_shard

    data: Any = mesh["data_parallel"]
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=data)
    return cast(nn.Module, fully_shard(model, mesh=data))


class LanguageWork:
    """A language run's part of the loop (`loop.Work`)."""

    unit = "tokens"

    def __init__(self, run: LanguageRun, fabric: Any):
        self.run, self.fabric = run, fabric
        recipe = run.training
        self.train_data, self.validation, vocabulary = streams(run.data, run.context)
        self.micro_batches = micro_batches(recipe.batch_size, fabric.world_size, run.machine.micro_batch_size)
        torch.manual_seed(run.seed)
        self.new = lambda: new_model(run.model, vocabulary)
        self.model = self.new()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.flops_per_unit, self.flop_model = language_flops(self.model, run.context)
        if run.model.gradient_checkpointing:
            cast(Any, self.model).gradient_checkpointing_enable()
        free = {n for n, p in self.model.named_parameters() if getattr(p, "_no_weight_decay", False)}
        self.wrapped = fabric.setup_module(self.model)
        for name, parameter in self.model.named_parameters():
            if name in free:
                cast(Any, parameter)._no_weight_decay = True  # sharding makes new parameters
        self.optimizer = fabric.setup_optimizers(adamw(self.model, recipe.weight_decay))
        self.steps, self.gradient_clip = recipe.steps, recipe.gradient_clip
        self.units_per_step = recipe.batch_size * run.context

    def set_rate(self, step: int) -> float:
        rate = learning_rate_at(step, self.run.training.learning_rate, cast(Training, self.run.training))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def start(self, step: int) -> None:
        pass

    def loss(self, step: int, micro: int) -> Tensor:
        batch, world = self.run.training.batch_size, self.fabric.world_size
        numbers = batch_rows(len(self.train_data), batch, self.run.seed, step)
        mine = numbers[self.fabric.global_rank * (batch // world) :][: batch // world]
        return self._loss(self.train_data, mine.chunk(self.micro_batches)[micro])

    def _loss(self, stream: Stream, numbers: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all but the first token of each sequence, by the model's own loss."""
        tokens = stream.rows(numbers)
        if self.fabric.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.fabric.device, non_blocking=True)
        return self.wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss

    def stepped(self, step: int) -> None:
        pass

    def due(self, step: int) -> bool:
        return step % self.run.training.evaluate_every == 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats and bits a token. Every process makes the same number of calls, since FSDP gathers in each."""
        self.wrapped.eval()
        rank, world = self.fabric.global_rank, self.fabric.world_size
        count = min(len(self.validation), self.run.training.validation_sequences)
        size = self.run.training.batch_size // world // self.micro_batches
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, count, size * world):
            numbers = torch.arange(start, min(start + size * world, count))[rank::world]
            used = numbers if len(numbers) else torch.zeros(1, dtype=torch.long)  # a call that isn't counted
            total += torch.tensor([self._loss(self.validation, used).item() * len(numbers), len(numbers)])
        total = self.fabric.all_reduce(total.to(self.fabric.device), reduce_op="sum").cpu()
        nats = (total[0] / total[1]).item()
        return {"validation_loss": nats, "validation_bits_per_token": nats / math.log(2)}

    def extra_tensors(self, keep: bool) -> Tensors:
        return {}

    def load_extra(self, tensors: Tensors) -> None:
        pass

    def finish(self, out: Path) -> dict[str, float]:
        """Save for `AutoModelForCausalLM.from_pretrained(out)`. Every process calls it."""
        tensors = model_tensors(self.model, self.fabric.global_rank == 0)
        if self.fabric.global_rank == 0:
            from transformers.utils import logging

            logging.disable_progress_bar()  # it would stand in the middle of our lines
            plain: Any = self.new()
            dtype = next(iter(tensors.values())).dtype
            load_model(plain.to(dtype) if dtype.is_floating_point else plain, tensors)
            plain.save_pretrained(out)
        return {}


def strategy(run: LanguageRun, vocabulary: int, world: int) -> Any:
    """Fabric's strategy for FSDP over `world` processes."""
    from lightning.fabric.strategies import ModelParallelStrategy

    with torch.device("meta"):
        model: Any = new_model(run.model, vocabulary)
    names = tuple(getattr(model, "_no_split_modules", None) or ())
    if not names:
        raise ConfigError(f"machine.strategy fsdp: {type(model).__name__} doesn't name its blocks; use ddp")
    return ModelParallelStrategy(partial(shard_blocks, names=names), data_parallel_size=world, tensor_parallel_size=1)
