"""The decoding state of a table: what each mixer keeps for one sequence, counted by hand."""

import pytest
import torch

from chela_plugin.harness.backbones import decoding_state
from chela_plugin.lm import ChelaConfig, ChelaForCausalLM

DIM, DEPTH = 96, 2
# mixer -> numbers a block keeps at any length, and for each token; at dim 96 with the defaults of each mixer
KEPT = {
    "attention": (0, 2 * DIM),  # a key and a value
    "identity": (0, 0),
    "linear_attention": (3 * 32 * 32 + 3 * 32, 0),  # 3 heads: sums of k v' and of k
    "gla": (48 * 96, 0),  # one head, keys half as wide as values
    "retnet": (4 * 12 * 24, 0),  # 4 heads
    "mamba": (3 * 192 + 192 * 16, 0),  # 3 inputs of the short convolution, 16 states a channel, expanded twice
    "mamba2": (3 * 448 + 3 * 64 * 128, 0),  # 192 channels and B and C of 128 in the convolution; 3 heads of 64 x 128
    "gated_deltanet": (3 * 192 + 48 * 96, 0),  # convolutions of q, k (48) and v (96)
    "conv": (6 * 128 + 2 * 8 * 128, 0),  # 6 inputs of the 7-tap kernel, 8 complex modes, for each of its 128 channels
    "conv(long=multiscale)": (0, 128),  # a kernel as long as the sequence: all inputs
    "chela": (6 * DIM + 2 * 8 * DIM + 2 * 19 * 48, 0),  # the same, and 2 heads of linear attention
    "chela(norm=batch)": (6 * DIM + 2 * 8 * DIM + 2 * 19 * 48, 0),  # in eval mode, as a model decodes
    "chela(long=none)": (6 * DIM + 2 * 20 * 48, 0),
    "chela(long=multiscale)": (2 * 16 * 48, DIM),
}


@pytest.mark.parametrize("mixer", KEPT)
def test_the_state_of_decoding_is_what_the_mixer_keeps(mixer):
    config = ChelaConfig(vocab_size=16, hidden_size=DIM, num_hidden_layers=DEPTH, intermediate_size=32, mixer=mixer)
    state = decoding_state(ChelaForCausalLM(config), DIM, torch.device("cpu"))
    fixed, per_token = KEPT[mixer]
    assert state is not None
    assert (state.fixed, state.per_token) == (DEPTH * fixed, DEPTH * per_token)


def test_blocks_of_two_mixers_add_up():
    config = ChelaConfig(
        vocab_size=16, hidden_size=DIM, num_hidden_layers=2, intermediate_size=32, mixer="gla + attention"
    )
    state = decoding_state(ChelaForCausalLM(config), DIM, torch.device("cpu"))
    assert state is not None
    assert (state.fixed, state.per_token) == (48 * 96, 2 * DIM)
