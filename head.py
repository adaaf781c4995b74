"""The segmentation head: neck, decoder, projector (DCRIS section 3.4, BarLeRIa appendix C).

It follows ETRIS (Xu et al., 2023), which simplified CRIS (Wang et al., 2022), and DETRIS, the DCRIS
authors' later program. The three maps are (B, C_i, h, w), words (B, L, D), the sentence (B, E).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbones import Linear, MultiheadAttention, linear


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


def conv_bn_relu(channels, out_channels, kernel=1, layer=nn.Conv2d):
    """Convolution, norm, ReLU. Unlike the adapters': without bias, eps 1e-5."""
    return nn.Sequential(layer(channels, out_channels, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Gate(nn.Module):
    """A factor for each channel of a map, from the sentence s: x * (W_o (W_v s + b_v) + b_o).

    ETRIS writes it as multi-head attention of every pixel to one token, s. With one key the softmax
    is always 1, so queries, keys and heads have no effect and are left out. All start as in
    PyTorch's attention, where W_q, W_k and W_v are one matrix: W_v Xavier, bound
    sqrt(6 / (4 width)), W_o as every linear layer, b_v and b_o zero.
    """

    def __init__(self, width):
        super().__init__()
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        nn.init.uniform_(self.value.weight, -(1.5 / width) ** 0.5, (1.5 / width) ** 0.5)
        nn.init.zeros_(self.value.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, sentence):
        return x * self.out(self.value(sentence))[:, :, None, None]


class Neck(nn.Module):
    """The cross-modal neck (DCRIS Eq. 4, BarLeRIa Eq. 11).

        F_f = ConvBnReLU([gate(ConvBnReLU(f), Linear(sentence)) for each map f])        1x1
        out = ConvBnReLU(ConvBnReLU([F_f, F_coord]))            3x3; F_coord: x and y in [-1, 1]

    Three maps (B, C_i, h, w), sentence (B, E) to one map (B, width, h, w); `residual` adds
    F_f at the end, as DETRIS does (it is not in Eq. 4).
    """

    def __init__(self, channels, sentence_width, width, residual):
        super().__init__()
        self.residual = residual
        self.sentence = Linear(sentence_width, width)
        self.maps = nn.ModuleList(conv_bn_relu(c, width) for c in channels)
        # The authors write the third one as a transposed convolution, which has another fan-in.
        nn.init.kaiming_uniform_(self.maps[2][0].weight.transpose(0, 1), a=5 ** 0.5)
        self.gates = nn.ModuleList(Gate(width) for _ in channels)
        self.fuse = conv_bn_relu(len(channels) * width, width)
        self.coordinates = nn.Sequential(
            conv_bn_relu(width + 2, width, 3), conv_bn_relu(width, width, 3))

    def forward(self, features, sentence):
        sentence = self.sentence(sentence)
        gated = [gate(project(f), sentence)
                 for f, project, gate in zip(features, self.maps, self.gates)]
        fused = self.fuse(torch.cat(gated, dim=1))                          # F_f, (B, width, h, w)
        rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64, device=fused.device)
                         for side in fused.shape[-2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        place = torch.stack([x, y]).to(fused)[None]                         # F_coord, (1, 2, h, w)
        first, second = self.coordinates
        # 514 channels do not suit matrix units, so the last two are convolved apart.
        weights = first[0].weight.split([fused.shape[1], 2], dim=1)
        out = sum(F.conv2d(part, w, padding=1) for part, w in zip((fused, place), weights))
        out = second(first[1:](out))
        return out + fused if self.residual else out


def sine_positions(length, width, device=None):
    """Sines and cosines of the positions in turn, (length, width), base 10000."""
    rates = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates           # (length, width/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def sine_positions_2d(rows, columns, width, device=None):
    """The same for a grid, row by row, (rows*columns, width): one half for x, one for y."""
    x = sine_positions(columns, width // 2, device)[None].expand(rows, -1, -1)
    y = sine_positions(rows, width // 2, device)[:, None].expand(-1, columns, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, attention to the words, feed-forward: x (B, h*w, width) to the same.

    Each attention's output passes a second LayerNorm before dropout and residual. Words are
    (B, L, text_width); `places` (h*w, width) and `word_places` (L, text_width) are the positions.
    """

    def __init__(self, width, text_width, heads, dropout):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = MultiheadAttention(width, heads, dropout)
        self.self_attention_norm = nn.LayerNorm(width)
        self.cross_attention = MultiheadAttention(
            width, heads, dropout, kdim=text_width, vdim=text_width)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(width),
            Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, words, places, word_places, padding):
        normed = self.norm1(x)
        query = key = normed + places
        mixed = self.self_attention(query, key, normed)
        x = x + self.dropout(self.self_attention_norm(mixed))
        read = self.cross_attention(self.norm2(x) + places, words + word_places, words, padding)
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
        places = sine_positions_2d(*grid, x.shape[1], x.device).to(x.dtype)
        word_places = sine_positions(*words.shape[1:], words.device).to(words.dtype)
        x = x.flatten(2).transpose(1, 2)                                    # (B, h*w, width)
        for layer in self.layers:
            x = layer(x, words, places, word_places, padding)
        return self.norm(x).transpose(1, 2).unflatten(2, grid)


class Projector(nn.Module):
    """The up-sampling projector (DCRIS Eq. 5, BarLeRIa Eq. 12).

        F_c = conv1x1(ConvBnReLU(up(ConvBnReLU(up(x)))))    up: bilinear by 2; ConvBnReLU: 3x3
        F_l = linear(sentence)                              a 3x3 kernel and a bias
        logits = conv3x3(F_c, F_l)                          each sample has its own kernel

    Map x (B, width, h, w) and sentence (B, E) to logits (B, 1, 4h, 4w), in single precision or
    double. The 1x1 convolution is folded into the kernel.
    """

    def __init__(self, width, sentence_width):
        super().__init__()
        self.channels = width // 2
        self.image = nn.Sequential(
            conv_bn_relu(width, width, 3, UpsampledConvolution),
            conv_bn_relu(width, self.channels, 3, UpsampledConvolution),
            nn.Conv2d(self.channels, self.channels, 1))
        self.sentence = Linear(sentence_width, self.channels * 9 + 1)

    def forward(self, x, sentence):
        *larger, last = self.image
        for layer in larger:
            x = layer(x)                                                    # at last (B, C, 4h, 4w)
        kernel, bias = self.sentence(sentence).split([self.channels * 9, 1], dim=1)     # F_l
        # F_c = W x + b, so F_l . F_c = (F_l W) . x + F_l . b at each of the kernel's 9 positions
        # (taps). `fold` moves products the other way than a convolution reads, hence `flip`.
        kernel = kernel.unflatten(1, (self.channels, 9)).flip(2)            # (B, C, 9)
        constant = torch.einsum("bck,c->bk", kernel, last.bias)[..., None]  # (B, 9, 1)
        kernel = torch.einsum("bck,cd->bkd", kernel, last.weight[..., 0, 0])    # (B, 9, C)
        taps = constant + kernel @ x.flatten(2)                             # (B, 9, 16 h w)
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
        return F.fold(taps, x.shape[-2:], 3, padding=1) + bias[..., None, None]


class UpsampledConvolution(nn.Conv2d):
    """Bilinear upsampling by 2, then a 3x3 convolution: (B, C, h, w) to (B, C', 2h, 2w). No bias.

    Both are linear, so they swap: one linear layer takes the kernel's 9 products on the small map,
    a matrix for rows and one for columns upsample, shift and add them. A third of the products.
    """

    def forward(self, x):
        rows, columns = (upsample_and_shift(side, x.device).to(x.dtype) for side in x.shape[-2:])
        # Channels come last in memory, so most of the moves of axes below copy nothing.
        kernel = self.weight.permute(2, 3, 0, 1).flatten(0, 2)              # (9 C', C)
        taps = linear(x.permute(0, 2, 3, 1), kernel).unflatten(3, (3, -1))  # (B, h, w, 3, 3 C')
        taps = taps.permute(0, 3, 1, 2, 4).flatten(1, 2).flatten(2)         # (B, 3 h, w * 3 C')
        tall = rows.permute(2, 0, 1).flatten(1) @ taps                      # (B, 2h, w * 3 C')
        tall = tall.unflatten(2, (-1, self.out_channels))                   # (B, 2h, w * 3, C')
        wide = columns.permute(2, 1, 0).flatten(1) @ tall                   # (B, 2h, 2w, C')
        return wide.permute(0, 3, 1, 2)


def upsample_and_shift(side, device):
    """(3, side, 2 * side): entry [k, i, j] is the weight of pixel i of a row in pixel j + k - 1 of
    the upsampled row, which tap k reads for its output pixel j. Zeros beyond the ends."""
    up = F.interpolate(torch.eye(side, device=device)[None], scale_factor=2, mode="linear")[0]
    return torch.stack([F.pad(up, (1 - k, k - 1)) for k in range(3)])
