"""Launches that remember the compiled kernel, with a kernel and tensors that only record what they are asked."""

from types import SimpleNamespace

import pytest
import torch

from chela_plugin.kernels import launching
from chela_plugin.kernels.backend import environment
from chela_plugin.kernels.launching import Launcher


class Recorder:
    """A kernel `(x, y, T, scale, DECAY, BLOCK)`: what went to Triton, and what to a compiled form."""

    arg_names = ("x", "y", "T", "scale", "DECAY", "BLOCK")
    form: type

    def __init__(self):
        self.by_triton, self.by_form = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.by_triton.append((grid, arguments, constants))
            return self.form(self, len(self.by_triton))

        return launch


class Form:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.by_form.append((self.number, grid, arguments))


Recorder.form = Form


def tensor(address=512, dtype=torch.bfloat16, device=0, cuda=True):
    return SimpleNamespace(
        data_ptr=lambda: address, dtype=dtype, is_cuda=cuda, get_device=lambda: device, address=address
    )


@pytest.fixture
def kernel():
    return Recorder()


def launch(launcher, x=None, y=None, T=64, scale=0.5, BLOCK=16):
    x, y = x or tensor(), y or tensor(1024)
    launcher((7,), (x, y), (T, scale), BLOCK=BLOCK, DECAY=0, num_warps=4)


def test_a_launch_like_an_earlier_one_goes_to_its_compiled_form(kernel):
    launcher = Launcher(kernel)
    launch(launcher)
    launch(launcher, tensor(2048), tensor(4096))
    assert len(kernel.by_triton) == 1
    # Addresses, numbers, and the constants in the order of the kernel's parameters, without Triton's own options.
    assert kernel.by_form == [(1, (7, 1, 1), (2048, 4096, 64, 0.5, 0, 16))]


@pytest.mark.parametrize(
    "other",
    [{"T": 65}, {"scale": 0.25}, {"BLOCK": 32}, {"x": tensor(dtype=torch.float16)}, {"x": tensor(device=1)}],
)
def test_what_a_form_depends_on_finds_another_form(kernel, other):
    launcher = Launcher(kernel)
    launch(launcher)
    launch(launcher, **other)
    assert len(kernel.by_triton) == 2 and not kernel.by_form
    launch(launcher, **other)
    launch(launcher)
    assert [number for number, _, _ in kernel.by_form] == [2, 1]


def test_unaligned_pointers_and_interpreted_kernels_are_left_to_triton(kernel):
    launcher = Launcher(kernel)
    for _ in range(2):
        launch(launcher, y=tensor(1028))
        launch(launcher, x=tensor(cuda=False))
    assert len(kernel.by_triton) == 4 and not kernel.by_form and not launcher.compiled


def test_the_table_stays_small(kernel):
    launcher = Launcher(kernel)
    launcher.LARGEST_TABLE = 8
    for T in range(1, 30):
        launch(launcher, T=T)
    assert len(launcher.compiled) <= 8


def test_a_prepared_launch_goes_to_the_form_that_its_first_one_found(kernel):
    launcher = Launcher(kernel)
    prepared = launcher.prepared((7,), (64, 0.5), BLOCK=16, DECAY=0, num_warps=4)
    for x in (tensor(512), tensor(2048), tensor(4096)):
        prepared((x, tensor(1024)))
    assert len(kernel.by_triton) == 1
    assert [arguments for _, _, arguments in kernel.by_form] == [(x, 1024, 64, 0.5, 0, 16) for x in (2048, 4096)]
    on_cpu = launcher.prepared((7,), (64, 0.5), BLOCK=16, DECAY=0, num_warps=4)
    for _ in range(2):
        on_cpu((tensor(cuda=False), tensor(cuda=False)))
    assert len(kernel.by_triton) == 3


class CudaLauncher:
    """Triton 3.6's, with the function that it compiles for a signature: here one that prints what it is given."""

    launch, num_ctas, global_scratch_size, profile_scratch_size = print, 1, 0, 0
    launch_cooperative_grid = launch_pdl = False


class Straight(Form):
    run, function, packed_metadata = CudaLauncher(), 77, (4, 1, 0)


class StraightRecorder(Recorder):
    form = Straight


def test_with_triton_3_6_a_launch_goes_straight_to_the_compiled_function_unless_a_profiler_has_a_hook(
    monkeypatch, capsys
):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(launching.torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    kernel = StraightRecorder()
    launcher = Launcher(kernel)
    for _ in range(2):
        launch(launcher)
    assert not kernel.by_form
    assert capsys.readouterr().out.split() == [
        *("7", "1", "1", "5", "77", "False", "False", "None", "None", "(4,", "1,", "0)", "None", "None", "None"),
        *("512", "1024", "64", "0.5", "0", "16"),
    ]
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch(launcher)
    assert len(kernel.by_form) == 1 and not capsys.readouterr().out


def test_the_environment_is_read_as_it_is_now(monkeypatch):
    monkeypatch.delenv("CHELA_NAME", raising=False)
    assert environment("CHELA_NAME") == "" and environment("CHELA_NAME", "0") == "0"
    monkeypatch.setenv("CHELA_NAME", "wörd")
    assert environment("CHELA_NAME") == "wörd"
