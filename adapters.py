"""Every trainable part that touches a frozen tower.

DCRIS (Xu et al., 2024) trains two of them. The text adapter bends the text tower a little; the
DenseCross adapter brings into the vision tower what its pretraining lacked: detail at several
scales (convolutions on the grid of patches) and language (attention to the words).
"""

import torch
import torch.nn as nn

SCALE = 0.2         # of an adapter's output, as in the authors' program


class TextAdapter(nn.Module):
    """DCRIS Eq. 3, on the MLP's shortcut of a text block: Down - ReLU - Up.

    Maps the residual stream (B, L, width) to itself plus 0.2 times the adapter's output. Starts as
    the identity: the up-projection is zero.
    """

    def __init__(self, width, rank):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        kaiming(self)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + SCALE * self.up(self.down(x).relu())


def conv_bn_relu(channels, out_channels, kernel):
    """A convolution that keeps the size. Unlike the head's: with bias, and eps 1e-3."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2),
        nn.BatchNorm2d(out_channels, eps=1e-3),
        nn.ReLU())


class DenseConvolutions(nn.Module):
    """DCRIS Eq. 1: three convolutions, each fed by all before it, beside their common input.

    The 3x3 and the 5x5 branch are squeezed to rank/16 channels first. Maps (B, rank, h, w) to the
    same shape: the branches have rank/2 + rank/4 + rank/4 channels.
    """

    def __init__(self, rank):
        super().__init__()
        half, quarter, thin = rank // 2, rank // 4, rank // 16
        self.branch1 = conv_bn_relu(rank, half, 1)
        self.branch2 = nn.Sequential(
            conv_bn_relu(rank + half, thin, 1), conv_bn_relu(thin, quarter, 3))
        self.branch3 = nn.Sequential(
            conv_bn_relu(rank + half + quarter, thin, 1), conv_bn_relu(thin, quarter, 5))

    def forward(self, x):
        x1 = self.branch1(x)                                # (B, rank/2, h, w)
        x2 = self.branch2(torch.cat([x, x1], 1))            # (B, rank/4, h, w)
        x3 = self.branch3(torch.cat([x, x1, x2], 1))        # (B, rank/4, h, w)
        return torch.cat([x1, x2, x3], 1) + x


class CrossAttention(nn.Module):
    """The attention of DCRIS Eq. 2: patches (B, N, rank) ask the words (B, L, text_width).

    Keys and values are one projection of the words. No padding mask, as in the authors' program.
    """

    def __init__(self, rank, text_width, dropout, width=128, heads=8):
        super().__init__()
        self.query = nn.Linear(rank, width)
        self.words = nn.Linear(text_width, width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.back = nn.Linear(width, rank)

    def forward(self, patches, words):
        words = self.words(words)
        fused, _ = self.attention(self.query(patches), words, words, need_weights=False)
        return self.back(fused)


class DenseCrossAdapter(nn.Module):
    """DCRIS Eq. 1-2, beside the MLP of a vision block.

    Takes the block's normed tokens (B, N, width), the text tower's final words (B, L, text_width)
    and the grid (rows, columns) of the last rows*columns tokens; returns what is added to the MLP's
    output, (B, N, width), already times 0.2. `rank` must be a multiple of 16.

    Class and register tokens have no place on the grid and skip convolutions and attention. The
    paper is silent on them; in the authors' program their branch hands on its input F_v, and the
    residual of Eq. 2 then doubles it.
    """

    def __init__(self, width, rank, text_width, dropout):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dense = DenseConvolutions(rank)
        self.cross = CrossAttention(rank, text_width, dropout)
        self.up = nn.Linear(rank, width)
        kaiming(self)

    def forward(self, x, words, grid):
        rows, columns = grid
        x = self.down(x).relu()                                         # F_v, (B, N, rank)
        others, patches = x.split([x.shape[1] - rows * columns, rows * columns], dim=1)
        dense = self.dense(patches.transpose(1, 2).unflatten(2, grid))  # (B, rank, rows, columns)
        cross = self.cross(dense.flatten(2).transpose(1, 2), words)     # (B, rows*columns, rank)
        return SCALE * self.up(torch.cat([others, cross], dim=1) + x)


def kaiming(module):
    """He et al.'s initialisation (ReLU) of all linear layers and convolutions, zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
