"""Slow, obvious twins of what the package computes fast. They share no code with it."""

import math

import numpy as np
import torch
from torch import Tensor


def contextual_conv2d(x, weight, bias, weight_offset, sampling_offset, mask, stride, padding, dilation) -> Tensor:
    """Equation 4, one output number at a time. x (B, C, H, W), offsets and mask as the op takes them."""
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[-2:]
    out_h = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    out_w = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1

    def pixel(b, c, row, column):
        return x[b, c, row, column] if 0 <= row < height and 0 <= column < width else x.new_zeros(())

    def bilinear(b, c, y, x_):
        top, left = math.floor(y.item()), math.floor(x_.item())
        down, right = y - top, x_ - left
        return (
            (1 - down) * (1 - right) * pixel(b, c, top, left)
            + (1 - down) * right * pixel(b, c, top, left + 1)
            + down * (1 - right) * pixel(b, c, top + 1, left)
            + down * right * pixel(b, c, top + 1, left + 1)
        )

    y = x.new_zeros(batch, channels, out_h, out_w)
    for b, c, row, column in np.ndindex(batch, channels, out_h, out_w):
        total = bias[c].clone()
        for k in range(kh * kw):
            at_y = row * stride - padding + k // kw * dilation + sampling_offset[b, 2 * k, row, column]
            at_x = column * stride - padding + k % kw * dilation + sampling_offset[b, 2 * k + 1, row, column]
            w = weight[c, 0, k // kw, k % kw] + weight_offset[b, c, k // kw, k % kw]
            total = total + w * mask[b, k, row, column] * bilinear(b, c, at_y, at_x)
        y[b, c, row, column] = total
    return y


def staged_loss(logits: list[Tensor], targets: Tensor, considered: list[list[set[int]]], alpha, reduction) -> Tensor:
    """Equations 1 and 2, sample by sample. targets: (B, N) probabilities."""
    losses = []
    for stage_logits, stage_sets in zip(logits, considered, strict=True):
        total, share = 0.0, 0.0
        for b, classes in enumerate(stage_sets):
            denominator = math.log(sum(math.exp(stage_logits[b, j]) for j in classes))
            total += -sum(float(targets[b, j]) * (float(stage_logits[b, j]) - denominator) for j in classes)
            share += sum(float(targets[b, j]) for j in classes)
        losses.append(total / (len(stage_sets) if reduction == "batch" else share) if share else 0.0)
    return alpha * sum(losses[:-1]) + losses[-1]


def random_resized_crop(height, width, attempts, place, ratio) -> tuple[int, int, int, int]:
    """timm's RandomResizedCropAndInterpolation.get_params, given the numbers that it would draw.

    attempts: [(height, width)] over the square root of the area. Returns top, left, height, width.
    """
    f = np.float32
    for of_height, of_width in attempts:
        h = int(np.floor(np.sqrt(f(height) * f(width)) * f(of_height) + f(0.5)))
        w = int(np.floor(np.sqrt(f(height) * f(width)) * f(of_width) + f(0.5)))
        if w <= width and h <= height:
            top = min(int(np.floor(f(place[0]) * f(height - h + 1))), height - h)
            left = min(int(np.floor(f(place[1]) * f(width - w + 1))), width - w)
            return top, left, h, w
    if width / height < min(ratio):
        h, w = round(width / min(ratio)), width
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def convnext_schedule(base, final, epochs, steps_per_epoch, warmup_epochs) -> np.ndarray:
    """The learning rate of every step as the ConvNeXt recipe defines it: linspace from 0, then cosine."""
    warmup = warmup_epochs * steps_per_epoch
    rest = epochs * steps_per_epoch - warmup
    rising = base * np.arange(warmup) / max(1, warmup)
    falling = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    return np.concatenate([rising, falling])


def without_offsets(x: Tensor, channels: int, kernel: int, out: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Zero weight offsets, zero sampling offsets, and a mask of ones."""
    batch, taps = len(x), kernel * kernel
    return (
        torch.zeros(batch, channels, kernel, kernel, dtype=x.dtype),
        torch.zeros(batch, 2 * taps, *out, dtype=x.dtype),
        torch.ones(batch, taps, *out, dtype=x.dtype),
    )
