"""What `kernels` runs on a GPU; imported only there, as Triton comes with torch for GPUs under Linux alone."""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, out, shortcut, weight, bias, mean, rstd, places, eps,
    C: tl.constexpr, SIZE: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr,
):
    """Normalise; a program does CB channels (whole groups of SIZE) of one sample, TILE places at a time."""
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = block * CB + tl.arange(0, CB)
    count, start = places * SIZE, n * places * C
    total = tl.zeros((CB,), tl.float32)
    for first in range(0, places, TILE):
        p = first + tl.arange(0, TILE)
        at, inside = start + p[:, None] * C + c[None, :], (p < places)[:, None]
        total += tl.sum(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), 0)
    mu = tl.sum(tl.reshape(total, (CB // SIZE, SIZE)), 1) / count
    mu_c = tl.reshape(tl.broadcast_to(mu[:, None], (CB // SIZE, SIZE)), (CB,))
    total = tl.zeros((CB,), tl.float32)
    for first in range(0, places, TILE):
        p = first + tl.arange(0, TILE)
        at, inside = start + p[:, None] * C + c[None, :], (p < places)[:, None]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, v - mu_c[None, :], 0.0)
        total += tl.sum(away * away, 0)
    inverse = 1 / tl.sqrt(tl.sum(tl.reshape(total, (CB // SIZE, SIZE)), 1) / count + eps)
    scale = tl.reshape(tl.broadcast_to(inverse[:, None], (CB // SIZE, SIZE)), (CB,)) * tl.load(weight + c).to(tl.float32)
    shift = tl.load(bias + c).to(tl.float32) - mu_c * scale
    for first in range(0, places, TILE):
        p = first + tl.arange(0, TILE)
        at, inside = start + p[:, None] * C + c[None, :], (p < places)[:, None]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if ADD:
            v += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            v = tl.maximum(v, 0.0)
        tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)
    group = n * (C // SIZE) + block * (CB // SIZE) + tl.arange(0, CB // SIZE)
    tl.store(mean + group, mu)
    tl.store(rstd + group, inverse)


@triton.jit
def backward(
    slope, x, dx, weight, mean, rstd, shifts, scales, places,
    C: tl.constexpr, SIZE: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr,
):
    """The gradient at the input, and each sample's gradients of shift and scale."""
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = block * CB + tl.arange(0, CB)
    count, start = places * SIZE, n * places * C
    group = n * (C // SIZE) + c // SIZE
    mu, inverse = tl.load(mean + group), tl.load(rstd + group)
    w = tl.load(weight + c).to(tl.float32)
    shift, scale = tl.zeros((CB,), tl.float32), tl.zeros((CB,), tl.float32)
    for first in range(0, places, TILE):
        p = first + tl.arange(0, TILE)
        at, inside = start + p[:, None] * C + c[None, :], (p < places)[:, None]
        d = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
        v = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mu[None, :]) * inverse[None, :]
        shift += tl.sum(d, 0)
        scale += tl.sum(d * v, 0)
    tl.store(shifts + n * C + c, shift)
    tl.store(scales + n * C + c, scale)
    one = tl.sum(tl.reshape(shift * w, (CB // SIZE, SIZE)), 1) / count
    two = tl.sum(tl.reshape(scale * w, (CB // SIZE, SIZE)), 1) / count
    one = tl.reshape(tl.broadcast_to(one[:, None], (CB // SIZE, SIZE)), (CB,))
    two = tl.reshape(tl.broadcast_to(two[:, None], (CB // SIZE, SIZE)), (CB,))
    for first in range(0, places, TILE):
        p = first + tl.arange(0, TILE)
        at, inside = start + p[:, None] * C + c[None, :], (p < places)[:, None]
        d = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
        v = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mu[None, :]) * inverse[None, :]
        result = inverse[None, :] * (w[None, :] * d - one[None, :] - two[None, :] * v)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
