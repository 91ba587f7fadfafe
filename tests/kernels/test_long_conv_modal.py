"""Modal filters: the chunked definition against the taps written out, and the Triton source under the interpreter.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import itertools
import os
import re

import pytest
import torch
from compiled import compiled_for_hopper
from compiler_faults import sass_of, undefined
from torch.nn import functional as F

from chela_plugin.kernels.folded_taps.reference import two_sided
from chela_plugin.kernels.long_conv import modal_conv, short_modal_conv
from chela_plugin.kernels.long_conv.reference import direct, modal_conv_reference, modal_powers, modal_scan, modal_taps

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
by_definition = pytest.mark.skipif(INTERPRETED, reason="plain PyTorch: runs in the process without TRITON_INTERPRET")

# fp32 sums over a chunk and powers through an approximate exp; outputs and factors of 11 and 8 significant bits.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("x", "log_time", "frequency", "residue", "short", "scale", "bias")


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def case(batch, tokens, channels, groups, modes, short, dtype=torch.float32):
    """Leaves in the order of NAMES, and a gradient of the output. Time constants up to 55 tokens, up to half a turn."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(batch, tokens, channels, generator=g).to(dtype) for _ in range(2))
    time, frequency = (torch.rand(groups, modes, generator=g) * most for most in (4, 3))
    rest = [
        torch.randn(*shape, generator=g) for shape in ((groups, modes, 2), (channels, short), (channels,), (channels,))
    ]
    return [t.requires_grad_() for t in (x, time, frequency, *rest)], dy


def convolve(leaves, **options):
    return modal_conv(*leaves[:4], **dict(zip(NAMES[4:], leaves[4:], strict=True)), **options)


def with_gradients(y, leaves, dy):
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def by_the_taps(leaves, silu):
    """The same through the whole filter and a Toeplitz matrix, in fp64."""
    x, time, frequency, residue, short, scale, bias = leaves
    taps = modal_taps(time, frequency, residue, x.shape[1]).repeat_interleave(x.shape[2] // time.shape[0], 0)
    u = direct(x, taps, causal=True) * scale + direct(x, short, causal=True) + bias
    return F.silu(u) if silu else u


def doubles(leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-6))


SHAPES = [(1, 1, 1, 1, 2, 1), (2, 5, 4, 2, 3, 3), (1, 64, 2, 1, 8, 7), (2, 150, 3, 1, 9, 8)]


@by_definition
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_and_states_equal_the_whole_filter_with_all_gradients(shape, silu, dtype, tolerance):
    leaves, dy = case(*shape)
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    found = with_gradients(convolve(leaves, silu=silu), leaves, dy.to(dtype))
    wide = doubles(leaves)
    for got, wanted in zip(found, with_gradients(by_the_taps(wide, silu), wide, dy.double()), strict=True):
        assert error(got, wanted) < tolerance


def two_sided_by_the_taps(leaves, silu):
    """The two-sided filter through all its taps and a Toeplitz matrix, in fp64."""
    x, *modes, short, scale, bias = leaves
    tokens, sides = x.shape[1], [[t.chunk(2)[side] for t in modes] for side in range(2)]
    ahead, behind = (modal_taps(*side, tokens).repeat_interleave(2 * x.shape[2] // len(modes[0]), 0) for side in sides)
    u = direct(x, two_sided(ahead, behind), causal=False) * scale + direct(x, short, causal=False) + bias
    return F.silu(u) if silu else u


TWO_SIDED = [(1, 1, 1, 2, 2, 1), (2, 70, 4, 4, 3, 3), (1, 150, 3, 2, 9, 7)]


@by_definition
@pytest.mark.parametrize("shape", TWO_SIDED)
def test_two_sided_scans_equal_the_whole_filter_with_all_gradients(shape):
    leaves, dy = case(*shape)
    wide = doubles(leaves)
    found = with_gradients(convolve(wide, silu=True, causal=False), wide, dy.double())
    for got, wanted in zip(found, with_gradients(two_sided_by_the_taps(wide, True), wide, dy.double()), strict=True):
        assert error(got, wanted) < 1e-10


@by_definition
def test_the_final_states_are_those_of_the_recurrence():
    leaves, _ = case(2, 70, 6, 2, 3, 1)
    x, time, frequency, residue = doubles(leaves)[:4]
    _, states = modal_scan(x, time, frequency, residue)
    pole = modal_powers(time, frequency, torch.tensor([1])).squeeze(-1).repeat_interleave(3, 0)
    state = torch.zeros(2, 6, 3, dtype=torch.complex128)
    for t in range(70):
        state = pole * state + x[:, t, :, None]
    torch.testing.assert_close(states, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [[0, 150], [0, 1, 1, 70, 134, 150]])
def test_packed_sequences_are_convolved_alone_with_all_gradients(cuts, monkeypatch):
    small_segments(monkeypatch)
    leaves, dy = case(1, 150, 2, 1, 2, 3)
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    found = with_gradients(convolve(leaves, silu=True, cu_seqlens=cu_seqlens), leaves, dy)
    wide = doubles(leaves)
    parts = [modal_conv_reference(wide[0][:, a:b], *wide[1:], True) for a, b in itertools.pairwise(cuts) if b > a]
    for got, wanted in zip(found, with_gradients(torch.cat(parts, 1), wide, dy.double()), strict=True):
        assert error(got, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [101, 200])
def test_the_future_does_not_change_the_past_bit_for_bit(tokens, monkeypatch):
    small_segments(monkeypatch)
    leaves, _ = case(1, tokens, 2, 1, 3, 7)
    x = leaves[0].detach()
    later = x.clone()
    later[:, 90:] = 1e6 * torch.randn_like(later[:, 90:])
    with torch.no_grad():
        before, after = (convolve([t, *leaves[1:]])[:, :90] for t in (x, later))
    assert torch.equal(before, after)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_nothing_in_is_nothing_out(shape):
    leaves, _ = case(1, 1, 4, 2, 3, 3)
    leaves[0] = torch.zeros(shape, requires_grad=True)
    y = convolve(leaves, silu=True)
    y.sum().backward()
    assert y.shape == shape and leaves[0].grad is not None and not leaves[3].grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"shape \[B, T, D\]"),
        ({"log_time": torch.zeros(3, 2)}, "D = 4 a multiple of G"),
        ({"frequency": torch.zeros(2, 3)}, r"frequency must be \[G, M\]"),
        ({"residue": torch.zeros(2, 2)}, r"residue \[G, M, 2\]"),
        ({"short": torch.zeros(4, 9)}, "K from 1 to 8"),
        ({"scale": torch.zeros(3)}, r"scale must be of shape \[4\]"),
        ({"bias": torch.zeros(1)}, r"bias must be of shape \[4\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens must not decrease"),
        ({"short": torch.zeros(4, 2), "causal": False}, "odd number of short taps"),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    good = {
        "x": torch.zeros(1, 5, 4), "log_time": torch.zeros(2, 2), "frequency": torch.zeros(2, 2),
        "residue": torch.zeros(2, 2, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        modal_conv(**{**good, **changes})


def small_segments(monkeypatch):
    """Segments of one chunk, so that short sequences carry states from one to the next; and few columns."""
    if INTERPRETED:
        from chela_plugin.kernels.long_conv import configs, launch_modal

        monkeypatch.setattr(launch_modal, "modal_segment_size", lambda *_: 64)
        monkeypatch.setattr(launch_modal, "modal_blocks_for", lambda *_: configs.ModalBlocks(64, 16, 4, 1, True))


@interpreted
@pytest.mark.parametrize(("cut", "silu"), [(False, True), (True, False)])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 65, 40, 2, 4, 2)])
def test_kernels_equal_the_definition_with_all_gradients(shape, silu, cut, monkeypatch):
    if cut:
        small_segments(monkeypatch)
    leaves, dy = case(*shape)
    found = with_gradients(convolve(leaves, silu=silu), leaves, dy)
    wide = doubles(leaves)
    wanted = with_gradients(modal_conv_reference(*wide, silu), wide, dy.double())
    for got, value in zip(found, wanted, strict=True):
        assert error(got, value) < TOLERANCE[torch.float32]


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_meet_fp32_states(dtype):
    leaves, dy = case(2, 150, 4, 2, 3, 3, dtype)
    y = convolve(leaves, silu=True)
    wide = doubles(leaves)
    wanted = with_gradients(modal_conv_reference(*wide, True), wide, dy.double())
    found = with_gradients(y, leaves, dy)
    assert [t.dtype for t in found] == [dtype, dtype, *[torch.float32] * 6]
    for got, value in zip(found, wanted, strict=True):
        assert error(got, value) < TOLERANCE[dtype]


@interpreted
def test_parts_left_out_are_left_out():
    leaves, dy = case(2, 70, 4, 2, 3, 3)
    few = leaves[:4]
    found = with_gradients(modal_conv(*few), few, dy)
    wide = doubles(few)
    wanted = with_gradients(modal_conv_reference(*wide, None, None, None, False), wide, dy.double())
    for got, value in zip(found, wanted, strict=True):
        assert error(got, value) < TOLERANCE[torch.float32]
    every_other = torch.stack([leaves[0], leaves[0]], dim=2)[:, :, 1]
    assert torch.equal(modal_conv(every_other, *few[1:]), found[0])


@interpreted
def test_the_operator_keeps_torchs_contract():
    from chela_plugin.kernels.long_conv import ops_modal

    leaves, dy = case(1, 5, 2, 1, 1, 2)
    torch.library.opcheck(ops_modal.forward_op, (*leaves, None, True, True, True))
    with torch.no_grad():
        _, u, states = ops_modal.forward(*leaves, None, True, True, True)
    x, *rest = (t.detach() for t in leaves)
    torch.library.opcheck(ops_modal.backward_op, (dy, x, u, states, *rest, None, True, True))


@interpreted
def test_a_compiled_module_keeps_the_operator_whole():
    leaves, dy = case(1, 70, 4, 2, 3, 3)
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled(leaves, silu=True), leaves, dy)
    torch.testing.assert_close(found, with_gradients(convolve(leaves, silu=True), leaves, dy))


@by_definition
def test_segments_fill_the_device_and_rows_that_do_so_stay_whole():
    from chela_plugin.kernels.long_conv.configs import modal_segment_size

    assert modal_segment_size(32, 1000, 64) == 1024
    assert modal_segment_size(1, 32768, 64) == 1024
    assert modal_segment_size(1, 4096, 64) == 256
    assert modal_segment_size(1, 1, 64) == 256


@interpreted
@pytest.mark.parametrize("cuts", [None, [0, 1, 1, 70, 134, 150]])
@pytest.mark.parametrize("shape", TWO_SIDED)
def test_two_sided_kernels_equal_the_definition_with_all_gradients(shape, cuts, monkeypatch):
    small_segments(monkeypatch)
    leaves, dy = case(*shape)
    packed = None if cuts is None or shape[1] != 150 else torch.tensor(cuts)
    found = with_gradients(convolve(leaves, silu=True, causal=False, cu_seqlens=packed), leaves, dy)
    wide = doubles(leaves)  # fp64 runs by the definition
    wanted = with_gradients(convolve(wide, silu=True, causal=False, cu_seqlens=packed), wide, dy.double())
    for got, value in zip(found, wanted, strict=True):
        assert error(got, value) < TOLERANCE[torch.float32]


@interpreted
@pytest.mark.parametrize("silu", [False, True])
def test_branches_fold_inside_with_all_gradients(silu):
    g = torch.Generator().manual_seed(1)
    leaves, dy = case(2, 130, 6, 2, 3, 7)
    x, *modes, kernel, _, bias = leaves
    kernels = [kernel, torch.randn(6, 3, generator=g).requires_grad_()]
    scales = torch.randn(3, 6, generator=g).requires_grad_()
    given = [x, *modes, scales, bias, *kernels]
    y = short_modal_conv(x, *modes, kernels=kernels, scales=scales, bias=bias, silu=silu)
    found = with_gradients(y, given, dy)
    wide = doubles(given)  # fp64 runs by the definition
    y = short_modal_conv(*wide[:4], kernels=wide[6:], scales=wide[4], bias=wide[5], silu=silu)
    for got, wanted in zip(found, with_gradients(y, wide, dy.double()), strict=True):
        assert error(got, wanted) < TOLERANCE[torch.float32]


def shared_offset(register, defined):
    """Of an address in shared memory or a product's descriptor: what is added to `global_smem`, not counting what each
    thread adds."""
    operation, operands = defined.get(register, ("", []))
    if operands == ["global_smem"]:
        return 0
    for operand in operands:
        found = shared_offset(operand, defined) if operand.startswith("%") else None
        if found is not None:
            numbers = [int(x) for x in operands if x.isdigit()] if operation == "add.s32" else []
            return found + sum(numbers)
    return None


def fenced_too_late(ptx):
    """How many products on tensor cores read a buffer whose stores no fence, and behind it no barrier, has passed."""
    defined = {
        found.group(2): (found.group(1), found.group(3).split(", "))
        for found in re.finditer(
            r"^\s*((?:mov|add|or|xor|mad|bfe|shr|shl|and|cvt)\.[\w.]+)\s+(%\w+), (.*);", ptx, re.MULTILINE
        )
    }
    sizes = {}
    events = []
    for line in ptx.splitlines():
        word = re.match(r"\s*(?:@%p\d+ )?(fence\.proxy\.async|wgmma\.mma_async|bar\.sync|st\.shared|stmatrix)", line)
        name = word.group(1) if word else ""
        if name == "wgmma.mma_async":
            n = int(re.search(r"m64n(\d+)k", line).group(1))
            operands = re.sub(r"\{[^}]*\}", "{}", line.split(maxsplit=1)[1]).split(", ")
            read = [
                (rows, shared_offset(operand, defined)) for rows, operand in zip((64, n), operands[1:], strict=False)
            ]
            events.append(("product", [start for _, start in read if start is not None]))
            for rows, start in read:
                if start is not None:  # 32 bytes a row and product, of which 4 or more make a tile
                    sizes[start] = max(sizes.get(start, 0), rows * 32 * 4)
        elif name in ("st.shared", "stmatrix"):
            base, more = re.search(r"\[\s*(%?\w+)\s*(?:\+\s*(\d+))?", line).groups()
            events.append(("store", (0 if base == "global_smem" else shared_offset(base, defined)) + int(more or 0)))
        elif name:
            events.append((name, None))
    found, unfenced, unbarred = 0, set(), set()
    for name, where in events:
        if name == "store":
            unfenced |= {start for start, size in sizes.items() if start <= where < start + size}
        elif name == "fence.proxy.async":
            unfenced, unbarred = set(), unbarred | unfenced
        elif name == "bar.sync":
            unbarred = set()
        elif set(where) & (unfenced | unbarred):
            found += 1
            unfenced, unbarred = unfenced - set(where), unbarred - set(where)
    return found


FORMS = [
    ("modal_scan", {"K": K, "SILU": SILU, "SAVE": SAVE, "REVERSE": REVERSE})
    for K in (0, 7)
    for SILU, SAVE, REVERSE in ((K > 0, False, False), (K > 0, True, False), (False, True, True))
] + [("modal_sums", {"SCALE": SCALE}) for SCALE in (False, True)]


@by_definition
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_tensor_cores_read_what_is_there(name, form, tmp_path):
    """Compiled for an H100: with its products in another order Triton 3.6 fenced one of `modal_sums` too late; in
    another form ptxas 12.8 took an operand's address from a register that nothing had written."""
    pytest.importorskip("triton")
    from chela_plugin.kernels.long_conv import configs, triton_modal

    kernel = getattr(triton_modal, name)
    part = "scan" if name == "modal_scan" else "sums"
    blocks = configs.modal_blocks_for(torch.bfloat16, part, form.get("K", 0) > 0)
    constants = {"C": blocks.chunk, "SP": 16, "CB": 16, "N": blocks.columns, "AHEAD": 0, "ADD": False}
    constants |= {"SCALE": True, "BIAS": True, "CARRY": True, "PACKED": False, "PRECISION": "tf32", "x_d": 1, "y_d": 1}
    constants |= {"g_d": 1, "X_T": 1024, "Y_T": 1024, "G_T": 1024, "STAGES": blocks.stages, "FETCH": blocks.fetch}
    halves = ("x", "y", "u", "add", "states", "into", "out", "du", "adjoints")
    sums = ("starts", "taps", "turn", "short", "scale", "bias", "dnear", "dinto", "dout", "dturn", "dscale")
    types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(sums, "*fp32") | {"places": "*i64"}
    aligned = ("D", "R", "Q", "size", "x_b", "x_t", "y_b", "y_t", "g_b", "g_t")
    compiled = compiled_for_hopper(
        kernel, constants | form | {"blocks": 1}, types, aligned=aligned, warps=blocks.warps, registers=blocks.registers
    )
    ptx = compiled.asm["ptx"]
    assert "wgmma" in ptx
    assert fenced_too_late(ptx) == 0 < fenced_too_late(ptx.replace("fence.proxy.async", "// none"))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = sass_of(cubin)
    assert "HGMMA" in sass and undefined(sass) == []


@by_definition
@pytest.mark.parametrize("fault", [False, True])
def test_an_operands_address_that_nothing_wrote_is_found(fault):
    """As ptxas 12.8 left it, and as it should be."""
    lines = ["UMOV UR12, UR4", "UMOV UR13, 0x40", "UIADD3 UR14, UP0, UR14, 0x20, URZ", "UMOV UR15, 0x40"]
    lines = ["S2UR UR4, SR_CgaCtaId", *([] if fault else ["UMOV UR14, UR4"]), *lines]
    lines += ["HGMMA.64x16x16.F32.BF16 R96, gdesc[UR12].tnspB, R96"]
    sass = "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines))
    found = undefined(sass)
    assert [line.split(" reads ")[1] for line in found] == (["UR14"] if fault else [])
    halved = sass.replace("UMOV UR15, 0x40", "NOP")
    assert any(line.startswith("HGMMA") and line.endswith("UR15") for line in undefined(halved))
