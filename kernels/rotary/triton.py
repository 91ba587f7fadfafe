"""Triton kernel of rotary positions: the angles of a block of tokens are found once for all heads of q and k."""

import triton
import triton.language as tl


@triton.jit
def turn(x, y, z, out_x, out_y, out_z, position, frequency, T, H, half,
         x_b, x_t, x_h, y_b, y_t, y_h, z_b, z_t, z_h, o_b, o_t, o_h, p_b, p_t,
         BACK: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """out_x and out_y: x and y turned, `[B, T, H, 2 half]`. BACK: by the negative angles, and z copied to out_z.

    A program is (row, BT tokens)."""
    blocks = tl.cdiv(T, BT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BT + tl.arange(0, BT)
    w = tl.arange(0, BW)
    live = (t < T)[:, None] & (w < half)[None, :]
    place = tl.load(position + b * p_b + t * p_t, t < T, other=0).to(tl.float32)
    angle = place[:, None] * tl.load(frequency + w, w < half, other=0.0)[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACK:
        sin = -sin
    for h in range(H):
        to = b * o_b + t[:, None] * o_t + h * o_h + w[None, :]
        at = b * x_b + t[:, None] * x_t + h * x_h + w[None, :]
        x0 = tl.load(x + at, live, other=0.0)
        x1 = tl.load(x + at + half, live, other=0.0)
        at = b * y_b + t[:, None] * y_t + h * y_h + w[None, :]
        y0 = tl.load(y + at, live, other=0.0)
        y1 = tl.load(y + at + half, live, other=0.0)
        if BACK:
            at = b * z_b + t[:, None] * z_t + h * z_h + w[None, :]
            z0 = tl.load(z + at, live, other=0.0)
            z1 = tl.load(z + at + half, live, other=0.0)
            tl.store(out_z + to, z0, live)
            tl.store(out_z + to + half, z1, live)
        x0, x1, y0, y1 = x0.to(tl.float32), x1.to(tl.float32), y0.to(tl.float32), y1.to(tl.float32)
        tl.store(out_x + to, x0 * cos - x1 * sin, live)
        tl.store(out_x + to + half, x1 * cos + x0 * sin, live)
        tl.store(out_y + to, y0 * cos - y1 * sin, live)
        tl.store(out_y + to + half, y1 * cos + y0 * sin, live)
