"""Streams: every token once, in order, across files; and files that aren't what they should be."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.train.config import TextData, TokenData
from chela_plugin.harness.train.tokens import streams


def everything(stream):
    return stream.rows(torch.arange(len(stream))).flatten().tolist()


def test_a_folder_is_its_files_by_path_with_a_zero_byte_behind_each(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 8)))
    (tmp_path / "b" / "c.txt").write_bytes(bytes(range(20, 43)))
    (tmp_path / "empty").touch()
    data = TextData(kind="text", path=tmp_path, validation_share=0.25)
    train, validation, vocabulary = streams(data, 8)
    whole = [*range(1, 8), 0, *range(20, 43), 0]
    assert everything(train) == whole[:24] and everything(validation) == whole[24:]
    assert vocabulary == 256 and train.rows(torch.tensor([1])).dtype == torch.int64


def test_split_by_file_shares_no_file_and_stays_when_files_come(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(bytes([i + 1]) * 7)
    data = TextData(kind="text", path=tmp_path, split="file", validation_share=0.3)
    train, validation, _ = streams(data, 8)
    kept, held = set(everything(train)) - {0}, set(everything(validation)) - {0}
    assert not kept & held and kept | held == set(range(1, 41))
    (tmp_path / "new.txt").write_bytes(bytes([99]) * 7)
    assert held <= set(everything(streams(data, 8)[1]))


@pytest.mark.parametrize("kind", ["uint16", "uint32", "safetensors"])
def test_tokens_come_back_as_they_were_written(tmp_path, kind):
    tokens = np.random.default_rng(0).integers(0, 60_000, 100)
    path = tmp_path / ("t.safetensors" if kind == "safetensors" else "t.bin")
    if kind == "safetensors":
        save_file({"tokens": torch.from_numpy(tokens).int()}, path)
    else:
        tokens.astype(kind).tofile(path)
    dtype = {} if kind == "safetensors" else {"dtype": kind}
    train, validation, _ = streams(TokenData(kind="tokens", path=path, vocab_size=60_000, **dtype), 10)
    assert everything(train) + everything(validation) == tokens.tolist()


def test_a_file_that_holds_no_tokens_is_refused(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"123")
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    for name, more, message in [
        ("odd.bin", {}, "not whole uint16 numbers"),
        ("none.bin", {}, "is no file"),
        ("a.safetensors", {}, "names the tensor"),
        ("a.safetensors", {"tensor": "a"}, "one-dimensional"),
    ]:
        with pytest.raises(ConfigError, match=message):
            streams(TokenData(kind="tokens", path=tmp_path / name, vocab_size=9, **more), 8)
