"""Long kernel generators: prefix consistency, stability, parameters."""

import pytest
import torch

from chela_plugin.layers.long_kernel import LONG_KERNELS, ModalKernel, MultiscaleKernel, create_long_kernel


@pytest.fixture(params=LONG_KERNELS)
def kernel(request):
    torch.manual_seed(0)
    return create_long_kernel(request.param, 6, max_len=50, dtype=torch.float64)


def test_the_first_taps_do_not_depend_on_the_length(kernel):
    long = kernel.taps(777)
    assert long.shape == (6, 777)
    for length in (1, 2, 15, 16, 17, 100, 333, 776):
        # A product may be blocked differently for another width: rounding only.
        torch.testing.assert_close(kernel.taps(length), long[:, :length], rtol=0, atol=1e-14)


def test_the_l1_norm_is_bounded_at_any_length(kernel):
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.mul_(3.0)  # somewhere else than at the initial values
        for length in (10, 1000, 20_000):
            assert bool((kernel.taps(length).abs().sum(1) <= kernel.l1_bound() * (1 + 1e-9)).all())


def test_every_parameter_gets_a_gradient(kernel):
    # 300 taps reach the fifth of eight sub-kernels: the far ones rest until a sequence is long enough.
    kernel.taps(300).square().sum().backward()
    for name, parameter in kernel.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_reset_parameters_draws_new_values(kernel):
    before = kernel.taps(20)
    kernel.reset_parameters()
    assert not torch.equal(before, kernel.taps(20))


def test_a_low_precision_module_still_makes_fp32_taps():
    assert create_long_kernel("modal", 2, max_len=8, dtype=torch.bfloat16).taps(9).dtype == torch.float32


def test_multiscale_stretches_its_last_sub_kernel_on():
    kernel = MultiscaleKernel(1, sub_taps=4, scales=2, dtype=torch.float64)
    taps = kernel.taps(4 * (2**5 - 1))
    # Scale 2 is scale 1's shape, stretched twice as far at half the decay: it spends the same sum times the ratio.
    one, two = taps[:, 4:12], taps[:, 12:28]
    torch.testing.assert_close(two.sum(), one.sum() * kernel.ratio().squeeze(), rtol=1e-12, atol=0)


def test_modal_taps_are_the_impulse_response_of_its_recurrence():
    kernel = ModalKernel(3, modes=4, dtype=torch.float64)
    log_radius, angle = kernel.poles()
    pole = torch.polar(log_radius.exp(), angle)
    state = torch.ones_like(pole)
    taps = []
    for _ in range(40):
        taps.append((kernel.residues() * state).real.sum(1))
        state = state * pole
    torch.testing.assert_close(kernel.taps(40), torch.stack(taps, 1), rtol=0, atol=1e-12)


def test_an_unknown_generator_lists_the_known_ones():
    with pytest.raises(ValueError, match="multiscale, explicit, modal, implicit"):
        create_long_kernel("fourier", 2, max_len=8)
