"""Launch of the kernel. Nothing here looks at a value, so it can go into a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, ready_for
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels

launch_gradient = Launcher(kernels.gradient)
ROWS, COLUMNS = 8, 256  # of a block: 16 numbers a thread of four warps
PROGRAMS = 2112  # 16 on each of an H100's 132 processors


def gradient(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.gradient`; h and da dense, of one dtype. The gradient is written over da."""
    rows, columns = h.shape
    blocks = ceil_div(columns, COLUMNS)
    each = ceil_div(ceil_div(rows, max(1, PROGRAMS // blocks)), ROWS) * ROWS
    programs = ceil_div(rows, each)
    sums = torch.empty(programs, columns, dtype=torch.float32, device=h.device)
    with ready_for(h):
        launch_gradient((programs, blocks), (h, da, da, sums), (rows, each, columns), BR=ROWS, BC=COLUMNS, num_warps=4)
    return da, sums.sum(0)
