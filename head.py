"""The segmentation head: neck, decoder, projector (DCRIS section 3.4, BarLeRIa appendix C).

It follows CRIS (Wang et al., 2022) and ETRIS (Xu et al., 2023) with the DCRIS authors' later
simplification: all three maps have one size, and the projector's kernel comes from the sentence.
Maps are (B, C, h, w), words (B, L, D), the sentence (B, E).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv_bn_relu(channels, out_channels, kernel=1):
    """A convolution that keeps the size. Unlike the adapters': without bias, and eps 1e-5."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU())


class Gate(nn.Module):
    """Multi-head cross-attention of a map to one token, which is a gate per channel.

    With a single key the softmax is exactly 1, so queries, keys and heads drop out, and every
    pixel's attention is W_o (W_v s + b_v) + b_o. CRIS multiplies the map by it.
    """

    def __init__(self, width):
        super().__init__()
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, sentence):
        return x * self.out(self.value(sentence))[:, :, None, None]


class Neck(nn.Module):
    """The cross-modal neck (DCRIS Eq. 4, BarLeRIa Eq. 11).

    Three maps (B, C_i, h, w) and the sentence (B, E) to one map (B, width, h, w). `residual` adds
    the fused map F_f back at the end (DCRIS as released; not in BarLeRIa and ETRIS).
    """

    def __init__(self, channels, sentence_width, width, residual):
        super().__init__()
        self.residual = residual
        self.sentence = nn.Linear(sentence_width, width)
        self.maps = nn.ModuleList(conv_bn_relu(c, width) for c in channels)
        self.gates = nn.ModuleList(Gate(width) for _ in channels)
        self.fuse = conv_bn_relu(len(channels) * width, width)
        self.coordinates = nn.Sequential(
            conv_bn_relu(width + 2, width, 3), conv_bn_relu(width, width, 3))

    def forward(self, features, sentence):
        sentence = self.sentence(sentence)
        gated = [gate(project(x), sentence)
                 for x, project, gate in zip(features, self.maps, self.gates)]
        fused = self.fuse(torch.cat(gated, dim=1))                          # F_f, (B, width, h, w)
        rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64)
                         for side in fused.shape[-2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        place = torch.stack([x, y]).to(fused).expand(len(fused), -1, -1, -1)    # F_coord
        out = self.coordinates(torch.cat([fused, place], dim=1))
        return out + fused if self.residual else out


def sine_positions(length, width):
    """Sine and cosine positions (length, width), interleaved, base 10000."""
    angles = torch.arange(length)[:, None] * torch.exp(
        torch.arange(0, width, 2) * (-math.log(10000) / width))             # (length, width/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def sine_positions_2d(rows, columns, width):
    """Positions of a grid, row by row, (rows*columns, width): first half by x, second by y."""
    x = sine_positions(columns, width // 2)[None].expand(rows, -1, -1)
    y = sine_positions(rows, width // 2)[:, None].expand(-1, columns, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, attention to the words, feed-forward.

    Each attention's output passes a second LayerNorm before dropout and residual. Maps x
    (B, h*w, width) to the same shape; words (B, L, text_width); their positions are (h*w, width)
    and (L, text_width); padding (B, L) is True where there is no word.
    """

    def __init__(self, width, text_width, heads, dropout):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(
            width, heads, dropout, batch_first=True, kdim=text_width, vdim=text_width)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(width),
            nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, words, places, word_places, padding):
        normed = self.norm1(x)
        query = key = normed + places
        mixed, _ = self.self_attention(query, key, normed, need_weights=False)
        x = x + self.dropout(self.self_attention_norm(mixed))
        read, _ = self.cross_attention(self.norm2(x) + places, words + word_places, words,
                                       key_padding_mask=padding, need_weights=False)
        x = x + self.dropout(self.cross_attention_norm(read))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class Decoder(nn.Module):
    """The vision-language decoder: a map (B, width, h, w) reads the words (B, L, text_width).

    `padding` (B, L) is True where there is no word. Returns a map of the same shape.
    """

    def __init__(self, width, text_width, heads, layers, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, text_width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, words, padding):
        grid = x.shape[-2:]
        places = sine_positions_2d(*grid, x.shape[1]).to(x)
        word_places = sine_positions(*words.shape[1:]).to(words)
        x = x.flatten(2).transpose(1, 2)                                    # (B, h*w, width)
        for layer in self.layers:
            x = layer(x, words, places, word_places, padding)
        return self.norm(x).transpose(1, 2).unflatten(2, grid)


class Projector(nn.Module):
    """The up-sampling projector (DCRIS Eq. 5, BarLeRIa Eq. 12).

    Map (B, width, h, w) and sentence (B, E) to logits (B, 1, 4h, 4w): the sentence becomes the
    weights and bias of one 3x3 convolution over its own sample's four times larger map.
    """

    def __init__(self, width, sentence_width):
        super().__init__()
        self.channels = width // 2
        upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.image = nn.Sequential(
            upsample, conv_bn_relu(width, width, 3),
            upsample, conv_bn_relu(width, self.channels, 3),
            nn.Conv2d(self.channels, self.channels, 1))
        self.sentence = nn.Linear(sentence_width, self.channels * 9 + 1)

    def forward(self, x, sentence):
        x = self.image(x)                                                   # F_c, (B, C, 4h, 4w)
        batch, channels, height, width = x.shape
        kernel, bias = self.sentence(sentence).split([channels * 9, 1], dim=1)      # F_l
        logits = F.conv2d(x.reshape(1, batch * channels, height, width),
                          kernel.reshape(batch, channels, 3, 3), bias.flatten(),
                          padding=1, groups=batch)                          # (1, B, 4h, 4w)
        return logits.transpose(0, 1)


class Head(nn.Module):
    """Neck, decoder, projector: three maps, words and sentence to logits (B, 1, 4h, 4w).

    `shortcut`, a map (B, width, h, w), is added between neck and decoder (BarLeRIa's F_out^M).
    """

    def __init__(self, channels, text_width, sentence_width, width, heads, layers, dropout,
                 residual):
        super().__init__()
        self.neck = Neck(channels, sentence_width, width, residual)
        self.decoder = Decoder(width, text_width, heads, layers, dropout)
        self.projector = Projector(width, sentence_width)

    def forward(self, features, words, sentence, padding, shortcut=None):
        x = self.neck(features, sentence)
        if shortcut is not None:
            x = x + shortcut
        x = self.decoder(x, words, padding)
        return self.projector(x, sentence)
