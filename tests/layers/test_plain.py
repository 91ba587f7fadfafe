"""Plain forms against what they are plain forms of: same weights, same function, compiled by TorchScript."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from chela_plugin.layers import Chela, ShortLongConv
from chela_plugin.layers.long_kernel import LONG_KERNELS
from chela_plugin.layers.plain import plain_conv

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
F64 = {"rtol": 1e-10, "atol": 1e-12}  # the same sums in another order, in fp64


def chela(**options):
    torch.manual_seed(0)
    mixer = Chela(24, causal=False, dtype=torch.float64, **options)
    for grid in ((5, 7), (4, 3)):  # statistics that are not those of the start
        mixer(torch.randn(2, grid[0] * grid[1], 24, dtype=torch.float64), grid=grid if mixer.uses_grid else None)
    return mixer


@pytest.mark.parametrize(
    ("long", "dims", "norm"),
    [*itertools.product((*LONG_KERNELS, "none"), (2,), ("batch", "scale")), ("modal", 1, "batch")],
)
def test_plain_scripted_and_folded_forms_compute_what_the_mixer_computes(long, dims, norm):
    mixer = chela(long=long, dims=dims, norm=norm).eval()
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    grid = (3, 5) if dims == 2 else None
    plain = mixer.plain()
    expected = mixer(x, grid=grid)
    torch.testing.assert_close(plain(x, grid), expected, **F64)
    torch.testing.assert_close(torch.jit.script(plain)(x, grid), expected, **F64)
    torch.testing.assert_close(torch.jit.script(plain.reparameterize())(x, grid), expected, **F64)
    torch.testing.assert_close(mixer(x, grid=grid), expected, rtol=0, atol=0)  # folding one leaves the other whole


@pytest.mark.parametrize(
    "options",
    [{"phi": phi} for phi in ("identity", "elu1", "relu", "l2")]
    + [{"gate": False}, {"update_gate": True}]
    + [{"qk_from": "x"}, {"skip": False}],
)
def test_every_option_of_the_attention_has_a_plain_form(options):
    mixer = chela(dims=2, **options).eval()
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(mixer.plain())(x, (3, 5)), mixer(x, grid=(3, 5)), **F64)


@pytest.mark.parametrize("norm", ["batch", "scale"])
def test_plain_forms_train_the_mixers_own_weights(norm):
    mixer, x = chela(dims=2, norm=norm), torch.randn(2, 15, 24, dtype=torch.float64)
    plain = torch.jit.script(mixer.plain())
    gradients = []
    for form in (mixer, plain):
        mixer.zero_grad()
        (form(x, grid=(3, 5)) ** 2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in mixer.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-9)  # sums over 30 places, fp64
    assert set(mixer.plain().state_dict()) == set(mixer.state_dict())


def test_a_scripted_form_is_saved_and_loaded_without_its_python_source():
    mixer, x = chela(dims=2).eval(), torch.randn(2, 15, 24, dtype=torch.float64)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(mixer.plain()), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x, (3, 5)), mixer(x, grid=(3, 5)), **F64)


def test_what_has_no_plain_form_says_so():
    with pytest.raises(ValueError, match="no plain form"):
        Chela(24, causal=True).plain()
    with pytest.raises(ValueError, match="no plain form"):
        plain_conv(ShortLongConv(8, causal=True))
    with pytest.raises(TypeError, match="scriptable=True"):
        torch.jit.script(Chela(24, causal=False))
    with pytest.raises(ValueError, match="needs grid"):
        Chela(24, causal=False, dims=2).plain()(torch.randn(1, 6, 24))
