"""Swin V1 and V2 written as plainly as possible, on whole maps, able to exclude hidden tokens.

They take the weights of a GreenSwin or GreenSwinV2 and share no code with them: windows come from
``torch.roll`` and a region mask, patch merging from strided slices.
"""

import math

import torch
from torch.nn import functional as F

from greenmim_mm.models import GreenSwin, GreenSwinV2


def plain_swin(
    model: GreenSwin | GreenSwinV2, images: torch.Tensor, mask: torch.Tensor | None = None
):
    """Maps ``(B, H, W, C)`` after each stage (before merging), and the last one normalised.

    ``mask``: ``(rows, columns)`` bool over 32x32 pixel units, True = hidden: no token attends to
    a hidden one.
    """
    version = 2 if isinstance(model, GreenSwinV2) else 1
    images = F.pad(images, (0, -images.shape[-1] % 4, 0, -images.shape[-2] % 4))
    conv = model.patch_embed.projection
    x = F.conv2d(images, conv.weight, conv.bias, stride=4).permute(0, 2, 3, 1)
    x = model.patch_embed.norm(x)
    maps = []
    for index, stage in enumerate(model.stages):
        rows, columns = x.shape[1:3]
        hidden = torch.zeros(rows, columns, dtype=torch.bool)
        if mask is not None:
            side = 8 >> index
            hidden = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
        for number, block in enumerate(stage.blocks):
            shifted = number % 2 == 1
            if version == 1:
                x = x + attention(model, index, block, block.norm1(x), hidden, shifted)
                x = x + block.ffn.layers(block.norm2(x))
            else:
                x = x + block.norm1(attention(model, index, block, x, hidden, shifted))
                x = x + block.norm2(block.ffn.layers(x))
                x = x if block.norm3 is None else block.norm3(x)
        maps.append(x)
        if index < 3:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
            cells = torch.stack(
                [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)], dim=-1
            ).flatten(3)
            if version == 1:
                x = stage.downsample.reduction(stage.downsample.norm(cells))
            else:
                merging = model.stages[index + 1].downsample
                x = merging.norm(merging.reduction(cells))
    return maps, model.norm3(maps[-1])


def attention(model, stage, block, x, hidden, shifted):
    """Window attention of one block over a map ``(B, H, W, C)``."""
    batch, rows, columns, channels = x.shape
    size = model.window_sizes[stage]
    height = width = size
    shift = size // 2 if shifted else 0
    if not model.pad_small_map and min(rows, columns) <= size:
        height, width, shift = min(rows, columns), min(rows, columns), 0
    x = F.pad(x, (0, 0, 0, -columns % width, 0, -rows % height))
    hidden = F.pad(hidden, (0, -columns % width, 0, -rows % height))
    region = torch.zeros(x.shape[1:3], dtype=torch.long)
    if shift:
        for count, (low, high) in enumerate([(0, -size), (-size, -shift), (-shift, None)]):
            region[low:high] += 10 * count
            region[:, low:high] += count

    def windows(y):
        y = torch.roll(y, (-shift, -shift), (0, 1))
        y = y.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        return y.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (windows, height * width, ...)

    msa = block.attn.w_msa
    heads = model.num_heads[stage]
    y, x_column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    y, x_column = y.flatten(), x_column.flatten()
    index = (y[:, None] - y + size - 1) * (2 * size - 1) + x_column[:, None] - x_column + size - 1
    if isinstance(model, GreenSwinV2):
        table = 16 * msa.cpb_mlp(offsets_v2(model, stage, x.dtype)).sigmoid()
        projection_bias = torch.cat([msa.q_bias, torch.zeros_like(msa.q_bias), msa.v_bias])
    else:
        table, projection_bias = msa.relative_position_bias_table, msa.qkv.bias
    bias = table[index].permute(2, 0, 1)
    # The region mask was made for the rolled map.
    rolled = torch.roll(region, (shift, shift), (0, 1))
    apart = windows(rolled)[:, :, None] != windows(rolled)[:, None, :]
    blocked = apart | windows(hidden)[:, None, :]
    # A hidden query may see everything: its output is excluded further on.
    blocked = blocked & ~windows(hidden)[:, :, None]
    out = []
    for image in x:
        tokens = windows(image)
        qkv = F.linear(tokens, msa.qkv.weight, projection_bias)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if isinstance(model, GreenSwinV2):
            scale = msa.logit_scale.clamp(max=math.log(100)).exp()
            score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        else:
            score = q @ k.transpose(-2, -1) * (channels // heads) ** -0.5
        score = score + bias
        weight = score.masked_fill(blocked[:, None], float('-inf')).softmax(-1)
        merged = msa.proj((weight @ v).transpose(1, 2).flatten(2))
        merged = merged.unflatten(0, (x.shape[1] // height, -1)).unflatten(2, (height, width))
        merged = merged.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        out.append(torch.roll(merged, (shift, shift), (0, 1))[:rows, :columns])
    return torch.stack(out)


def offsets_v2(model, stage, dtype):
    """Log-spaced offsets ``((2 * w - 1) ** 2, 2)``, row by row."""
    size = model.window_sizes[stage]
    trained = model.pretrained_window_sizes[stage] or size
    offsets = []
    for row in range(1 - size, size):
        for column in range(1 - size, size):
            scaled = [8 * delta / max(trained - 1, 1) for delta in (row, column)]
            offsets.append([math.copysign(math.log2(1 + abs(s)) / 3, s) for s in scaled])
    # The buffer is float32, as in every Swin V2: so are the offsets that the network sees.
    return torch.tensor(offsets, dtype=torch.float32).to(dtype)
