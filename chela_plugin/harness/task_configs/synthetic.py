"""Tasks that are generated: multi-query associative recall (zoology) and the six of MAD."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from chela_plugin.harness.task_configs.base import Strict, TaskConfig


class Generated(TaskConfig):
    """A task made by rule: kept in the cache; equal seeds give equal data."""

    generated: ClassVar[bool] = True
    data_seed: int = Field(0, ge=0, description="of the generator; equal for all runs")


class MQARSetting(Strict):
    """One part of the mixture: sequences of `length` tokens with `pairs` keys and values."""

    length: int = Field(ge=8, multiple_of=2)
    pairs: int = Field(ge=1)
    examples: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> MQARSetting:
        if 4 * self.pairs > self.length:  # pairs take two places, queries and their answers two more
            raise ValueError(
                f"{self.pairs} pairs and their queries need a length of {4 * self.pairs}, not {self.length}"
            )
        return self


Mixture = Annotated[tuple[MQARSetting, ...], Field(min_length=1)]


def _mixture(*settings: tuple[int, int, int]) -> tuple[MQARSetting, ...]:
    return tuple(MQARSetting(length=length, pairs=pairs, examples=examples) for length, pairs, examples in settings)


TEST_GRID = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


class MQARTask(Generated):
    """Multi-query associative recall at zoology's settings; accuracy on the queries."""

    backbone_kind: ClassVar[str] = "language"
    module: ClassVar[str] = "mqar"
    task: Literal["mqar"]
    vocabulary: int = Field(8192, ge=8, multiple_of=2, le=32768)
    gap_power: float = Field(0.01, gt=0, le=1, description="of the power law of a query's distance; 1 is uniform")
    random_fill: bool = Field(True, description="whether places without a query hold random tokens, else token 0")
    train: Mixture = _mixture(
        (64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)
    )
    validation: Mixture = _mixture(*((length, pairs, 200) for length, pairs in TEST_GRID))
    test: Mixture = _mixture(*((length, pairs, 1000) for length, pairs in TEST_GRID))

    @model_validator(mode="after")
    def _keys_suffice(self) -> MQARTask:
        most = max(part.pairs for part in (*self.train, *self.validation, *self.test))
        if most > self.vocabulary // 2 - 1:
            raise ValueError(f"{most} pairs need {most} different keys, a vocabulary of {2 * most + 2} or more")
        return self


class MADTask(Generated):
    """What MAD's tasks share: accuracy, 12,800 examples to train, 1,280 to test."""

    backbone_kind: ClassVar[str] = "language"
    module: ClassVar[str] = "mad"
    vocabulary: int = Field(16, ge=8, le=32768)
    length: int = Field(128, ge=8)
    train_examples: int = Field(12_800, ge=1)
    validation_examples: int = Field(1_280, ge=1)
    test_examples: int = Field(1_280, ge=1)


class RecallTask(MADTask):
    """In-context recall: keys come again, and their values are asked for."""

    task: Literal["mad_recall"]
    length: int = Field(128, ge=8, multiple_of=2)


class NoisyRecallTask(MADTask):
    """In-context recall between tokens that mean nothing."""

    task: Literal["mad_noisy_recall"]
    vocabulary: int = Field(32, ge=8, le=32768)
    length: int = Field(128, ge=8, multiple_of=2)
    noise_vocabulary: int = Field(16, ge=1, description="of the vocabulary's tokens, how many are noise")
    noise: float = Field(0.2, ge=0, lt=1, description="share of pairs that are noise")

    @model_validator(mode="after")
    def _tokens_remain(self) -> NoisyRecallTask:
        if self.vocabulary - self.noise_vocabulary < 2:
            raise ValueError(
                f"noise_vocabulary {self.noise_vocabulary} leaves no key or value of {self.vocabulary} tokens"
            )
        return self


class FuzzyRecallTask(MADTask):
    """In-context recall with keys and values of one to several adjacent tokens."""

    task: Literal["mad_fuzzy_recall"]
    key_tokens: int = Field(3, ge=1, le=4, description="at most; all test keys are that long")
    value_tokens: int = Field(3, ge=1, le=4, description="at most")

    @model_validator(mode="after")
    def _fits(self) -> FuzzyRecallTask:
        if self.length <= 3 * (self.key_tokens + self.value_tokens):
            raise ValueError(f"length {self.length} is too short for keys and values of so many tokens")
        if max(self.key_tokens, self.value_tokens) > (self.vocabulary - 1) // 2:
            raise ValueError(f"a vocabulary of {self.vocabulary} has too few keys or values for motifs that long")
        return self


class SelectiveCopyingTask(MADTask):
    """Copy the tokens that stand between blanks, in order."""

    task: Literal["mad_selective_copying"]
    length: int = Field(256, ge=8)
    copied: int = Field(16, ge=1, description="tokens to copy")

    @model_validator(mode="after")
    def _fits(self) -> SelectiveCopyingTask:
        if self.length <= 2 * self.copied + 1:
            raise ValueError(
                f"copying {self.copied} tokens takes more than {2 * self.copied + 1} places, not {self.length}"
            )
        return self


class CompressionTask(MADTask):
    """All tokens again, from the last place's features alone."""

    backbone_kind: ClassVar[str] = "sequence"
    task: Literal["mad_compression"]
    length: int = Field(32, ge=2)


class MemorizationTask(MADTask):
    """A fixed map from keys to values that no sequence holds: it must be learned."""

    task: Literal["mad_memorization"]
    vocabulary: int = Field(256, ge=8, le=32768)
    length: int = Field(32, ge=2, multiple_of=2)
    train_examples: int = Field(256, ge=1)


TASKS: tuple[type[TaskConfig], ...] = (
    MQARTask,
    RecallTask,
    NoisyRecallTask,
    FuzzyRecallTask,
    SelectiveCopyingTask,
    CompressionTask,
    MemorizationTask,
)
