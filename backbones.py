"""The towers: one vision transformer, CLIP's text transformer, and their published weights.

A tower is stepped from outside, block by block: `embed`, then every one of `blocks`, then `final`.
The order in which two towers are stepped *is* the tuning method, and so it belongs to `model.py`.
What a method hangs onto a block travels in an `Attached`, or wraps one of its layers; no adapter
stands in this file. `Linear` and `MultiheadAttention`, PyTorch's layers made faster, serve adapters
and head, too.

References: DINOv2 with registers (https://github.com/facebookresearch/dinov2), CLIP
(https://github.com/openai/CLIP), EVA-02 as CLIP (https://github.com/baaivision/EVA). Tokens are
(B, N, D) everywhere.

    python backbones.py download dinov2-b clip-b vocabulary     into pretrained/
"""

import argparse
import hashlib
import http.client
import math
import os
import pickle
import re
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from tqdm import tqdm


class WeightsError(ValueError):
    """A weight file or checkpoint that cannot be used; the message says which, what and where."""


# ---------------------------------------------------------------------------------------------
# The transformer block
# ---------------------------------------------------------------------------------------------

def attend(q, k, v, heads, causal=False, rotary=None, padding=None, dropout=0.0):
    """softmax(q k^T / sqrt(D/heads)) v for each head: q (B, N, D), k and v (B, M, D) to (B, N, D).

    `rotary`: of `ViT.rotary_tables`. `padding` (B, M) is True where no one may look; not with
    `causal`.
    `dropout`: the share of the softmax's weights that become zero.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    visible = None if padding is None else ~padding[:, None, None]
    # On CPUs PyTorch falls back to slow code for dropout, and its fused bfloat16 is half as fast as
    # plain products. (Causal texts are short, and stay with PyTorch.)
    if q.device.type == "cpu" and not causal and (dropout or q.dtype == torch.bfloat16):
        x = UnfusedAttention.apply(q, k, v, visible, dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, visible, dropout, causal)   # (B, heads, N, C)
    return x.transpose(1, 2).flatten(2)


class MultiheadAttention(nn.MultiheadAttention):
    """The parameters of PyTorch's layer, computed by `linear` and `attend`.

    Queries (B, N, D), keys (B, M, kdim) and values (B, M, vdim) to (B, N, D) alone, without the
    attention's weights; padding (B, M) is True where no one may look. Of the constructor's options
    dropout, kdim and vdim count. PyTorch's own forward puts the batch second, which costs copies.
    """

    def forward(self, query, key, value, padding=None):
        weights = (self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else
                   (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        q, k, v = (linear(x, *layer) for x, *layer in zip(
            (query, key, value), weights, self.in_proj_bias.chunk(3)))
        x = attend(q, k, v, self.num_heads, padding=padding,
                   dropout=self.dropout if self.training else 0.0)
        return linear(x, self.out_proj.weight, self.out_proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x, causal=False, rotary=None):
        return self.out(attend(*self.qkv(x).chunk(3, dim=-1), self.heads, causal, rotary))


class MLP(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.activation = activation
        self.down = Linear(4 * width, width)

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class LayerScale(nn.Module):
    """A learned factor per channel (DINOv2)."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


def unchanged(x):
    return x


class Attached(NamedTuple):
    """What a tuning method attaches to one block. Each entry maps (B, N, D) to (B, N, D)."""
    attention_shortcut: Callable = unchanged    # stands on the skip connection of the attention
    mlp_shortcut: Callable = unchanged          # stands on the skip connection of the MLP
    beside_mlp: Callable | None = None          # added to the MLP, before LayerScale; normed input


NOTHING = Attached()


class Block(nn.Module):
    """A pre-norm transformer block with three places for a tuning method (see `Attached`)."""

    def __init__(self, width, heads, family):
        super().__init__()
        self.causal = family.causal
        self.norm1 = nn.LayerNorm(width, family.eps)
        self.attention = (InnerNormAttention(width, heads, family.eps) if family.eva else
                          Attention(width, heads))
        self.scale1 = LayerScale(width) if family.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, family.eps)
        self.mlp = (GatedMLP(width, family.activation, family.eps) if family.eva else
                    MLP(width, family.activation))
        self.scale2 = LayerScale(width) if family.layer_scale else nn.Identity()

    def forward(self, x, attached=NOTHING, rotary=None):
        attention = self.attention(self.norm1(x), self.causal, rotary)
        x = attached.attention_shortcut(x) + self.scale1(attention)
        normed = self.norm2(x)
        mlp = self.mlp(normed)
        if attached.beside_mlp is not None:
            mlp = mlp + attached.beside_mlp(normed)
        return attached.mlp_shortcut(x) + self.scale2(mlp)


# ---------------------------------------------------------------------------------------------
# The vision transformer
# ---------------------------------------------------------------------------------------------

class ViT(nn.Module):
    """Vision transformer: DINOv2 with registers, CLIP's, or EVA-02 as CLIP, by its family.

    Tokens are [class, registers, patches row by row], (B, 1 + registers + H/P * W/P, D). The
    learned grid of positions is resized to the image's own grid, bicubically; DINOv2's antialiased,
    as published. Raises ValueError where the patch does not divide the image.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape, family = shape, FAMILIES[shape.family]
        self.prefix = 1 + shape.registers       # tokens that stand before the patches
        self.frozen = False
        self.legacy_position_resize = False     # resize them as DINOv2's first release did
        width = shape.width
        self.patch = nn.Conv2d(3, width, shape.patch, stride=shape.patch,
                               bias=not family.norm_before)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = (nn.Parameter(torch.zeros(1, shape.registers, width))
                          if shape.registers else None)
        self.position = nn.Parameter(torch.zeros(1, 1 + shape.grid ** 2, width))
        if family.mask_token:           # without a use here; kept so that files load whole
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.norm_before = nn.LayerNorm(width, family.eps) if family.norm_before else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, shape.heads, family) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, family.eps)
        if shape.embed:
            self.projection = Linear(width, shape.embed, bias=family.eva)      # CLIP's has none
        for parameter in (self.class_token, self.registers, self.position):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def grid(self, images):
        """Rows and columns of patches of images (B, 3, H, W)."""
        height, width = images.shape[-2:]
        if height % self.shape.patch or width % self.shape.patch:
            raise ValueError(f"the patch size {self.shape.patch} does not divide an image of "
                             f"{height}x{width}")
        return height // self.shape.patch, width // self.shape.patch

    def positions(self, grid):
        """Positions of the class token and of a grid (rows, columns): (1, 1 + rows*columns, D)."""
        stored = self.shape.grid
        if grid == (stored, stored):
            return self.position
        class_position, patches = self.position[:, :1], self.position[:, 1:]
        patches = patches.float().unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        if self.legacy_position_resize:      # by the ratio of a grid a tenth of a patch larger
            patches = F.interpolate(patches, mode="bicubic",
                                    scale_factor=[(side + 0.1) / stored for side in grid])
        else:
            patches = F.interpolate(patches, grid, mode="bicubic",
                                    antialias=FAMILIES[self.shape.family].antialias)
        patches = patches.flatten(2).transpose(1, 2).to(class_position.dtype)
        return torch.cat([class_position, patches], dim=1)

    def rotary_tables(self, grid):
        """By how much EVA-02 turns queries and keys at every place of a grid; None for others.

        Cosines and sines (rows * columns, D/heads), each angle twice in a row. The first half of
        the channels turns with the row, the second with the column, pair i of each at the rate
        10000^(-4i / (D/heads)). At any grid, places span the 16x16 of its pretraining.
        """
        if not FAMILIES[self.shape.family].eva:
            return None
        half = self.shape.width // self.shape.heads // 2
        rates = 10000 ** -(torch.arange(0, half, 2, device=self.position.device) / half)
        rows, columns = (torch.arange(side, device=rates.device)[:, None] / side * 16 * rates
                         for side in grid)                                  # (side, half/2)
        angles = torch.cat([rows[:, None].expand(-1, grid[1], -1),
                            columns[None].expand(grid[0], -1, -1)], dim=-1)
        angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)          # (places, D/heads)
        return angles.cos(), angles.sin()

    def resize(self, image_size):
        """Resizes the stored grid of positions to square images of this size, for good."""
        grid = self.grid(torch.empty(0, 3, image_size, image_size, device="meta"))
        self.position = nn.Parameter(self.positions(grid).detach(), self.position.requires_grad)
        self.shape = replace(self.shape, grid=grid[0])

    def embed(self, images):
        """Images (B, 3, H, W), normalised, to the tokens that enter the first block."""
        grid = self.grid(images)
        patches = self.patch(images).flatten(2).transpose(1, 2)             # (B, H/P * W/P, D)
        batch = len(patches)
        x = torch.cat([self.class_token.expand(batch, -1, -1), patches], dim=1)
        x = x + self.positions(grid)
        if self.registers is not None:
            x = torch.cat([x[:, :1], self.registers.expand(batch, -1, -1), x[:, 1:]], dim=1)
        return self.norm_before(x)

    def final(self, x):
        """The tokens after the last block to the tower's output: a LayerNorm."""
        return self.norm(x)

    @property
    def projected_width(self):
        return self.shape.embed or self.shape.width

    def project(self, x):
        """Final tokens (B, N, D) into CLIP's space (B, N, E); as they are where there is none."""
        return self.projection(x) if self.shape.embed else x

    def as_map(self, x, grid):
        """The patch tokens of x as a map: (B, N, D) to (B, D, rows, columns)."""
        return x[:, self.prefix:].transpose(1, 2).unflatten(2, grid)

    def forward(self, images):
        """Images (B, 3, H, W), normalised, to the final normed tokens (B, N, D)."""
        x, rotary = self.embed(images), self.rotary_tables(self.grid(images))
        for block in self.blocks:
            x = block(x, rotary=rotary)
        return self.final(x)


# ---------------------------------------------------------------------------------------------
# The text transformer, and freezing
# ---------------------------------------------------------------------------------------------

class TextTransformer(nn.Module):
    """CLIP's causal text transformer, and EVA-02-CLIP's, which differs by its activation.

    Token ids are (B, L) with L up to `shape.positions`. The end-of-text token has the highest id of
    the vocabulary, which is how its place is found.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.frozen = False
        width = shape.width
        self.embedding = nn.Embedding(shape.vocabulary, width)
        self.position = nn.Parameter(torch.zeros(shape.positions, width))
        self.blocks = nn.ModuleList(
            Block(width, shape.heads, FAMILIES[shape.family]) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, FAMILIES[shape.family].eps)
        self.projection = nn.Parameter(torch.zeros(width, shape.embed))
        # The temperature of CLIP's pretraining loss; kept so that files load whole.
        self.logit_scale = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        nn.init.normal_(self.projection, std=width ** -0.5)

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def embed(self, tokens):
        """Token ids (B, L) to what enters the first block (B, L, D)."""
        length = tokens.shape[1]
        if length > self.shape.positions:
            raise ValueError(f"a text of {length} tokens: this tower reads at most "
                             f"{self.shape.positions}")
        return self.embedding(tokens) + self.position[:length]

    def final(self, x, tokens):
        """Tokens after the last block to `words` (B, L, D), normed, and `sentence` (B, E)."""
        words = self.norm(x)
        end = tokens.argmax(dim=-1)
        return words, self.project(words[torch.arange(len(words), device=words.device), end])

    def project(self, words):
        """Final words (..., D) into the space shared with the photo (..., E)."""
        return words @ self.projection

    def forward(self, tokens):
        """Token ids (B, L) to `words` (B, L, D) and `sentence` (B, E)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.final(x, tokens)


def after_end(tokens):
    """True where a token id (B, L) is padding, i.e. stands after the end-of-text token.

    The authors' programs ask for id 0 instead, which is also the id of a "!" inside a word.
    """
    return torch.arange(tokens.shape[1], device=tokens.device) > tokens.argmax(-1, keepdim=True)


def freeze(tower):
    """No gradients, and eval mode for good: `train()` no longer reaches the tower."""
    tower.frozen = True
    return tower.requires_grad_(False).eval()


def unfreeze(tower):
    """The tower learns, but for the two tensors that play no part outside pretraining."""
    tower.frozen = False
    tower.requires_grad_(True)
    for name in ("mask_token", "logit_scale"):
        if hasattr(tower, name):
            getattr(tower, name).requires_grad_(False)
    return tower.train()


# ---------------------------------------------------------------------------------------------
# EVA-02's variants
# ---------------------------------------------------------------------------------------------

def rotate(x, cos, sin):
    """Rotary positions: turns pairs of channels of the image's tokens, which are the last ones.

    x is (B, heads, N, C); cos and sin, (image tokens, C), are `ViT.rotary_tables`'s. Whatever
    stands before the image has no place in it and stays as it is.
    """
    others, image = x.split([x.shape[2] - len(cos), len(cos)], dim=2)
    first, second = image.unflatten(-1, (-1, 2)).unbind(-1)
    quarter = torch.stack([-second, first], dim=-1).flatten(-2)             # turned by 90 degrees
    return torch.cat([others, (image * cos + quarter * sin).to(x.dtype)], dim=2)


class InnerNormAttention(nn.Module):
    """EVA-02's: keys have no bias, and a LayerNorm stands before the output layer."""

    def __init__(self, width, heads, eps):
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.out = Linear(width, width)

    def forward(self, x, causal=False, rotary=None):
        x = attend(self.query(x), self.key(x), self.value(x), self.heads, causal, rotary)
        return self.out(self.norm(x))


class GatedMLP(nn.Module):
    """EVA-02's SwiGLU, with a LayerNorm before the last layer."""

    def __init__(self, width, activation, eps):
        super().__init__()
        hidden = 8 * width // 3         # three matrices as large as the two of an ordinary MLP
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.activation = activation
        self.norm = nn.LayerNorm(hidden, eps)
        self.down = Linear(hidden, width)

    def forward(self, x):
        return self.down(self.norm(self.activation(self.gate(x)) * self.up(x)))


# ---------------------------------------------------------------------------------------------
# Families and shapes
# ---------------------------------------------------------------------------------------------

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Family(NamedTuple):
    """What sets one family of towers apart from another, besides its numbers."""
    activation: Callable
    eps: float = 1e-5               # of the LayerNorms
    causal: bool = False            # a token sees itself and those before it
    layer_scale: bool = False       # a learned factor per channel at the end of both branches
    eva: bool = False               # EVA-02: rotary positions, a gated MLP, norms inside both
    norm_before: bool = False       # CLIP: a LayerNorm before the first block, patches without bias
    mask_token: bool = False        # of self-supervised pretraining
    antialias: bool = False         # when the grid of positions is resized


FAMILIES = {
    "dinov2": Family(F.gelu, eps=1e-6, layer_scale=True, mask_token=True, antialias=True),
    "clip": Family(quick_gelu, norm_before=True),
    "eva": Family(F.silu, eps=1e-6, eva=True),
    "clip text": Family(quick_gelu, causal=True),
    "eva text": Family(F.gelu, causal=True),
}


@dataclass(frozen=True)
class VisionShape:
    """The numbers that fix a vision tower; `load_vision` reads them off a file's tensors."""
    patch: int
    width: int
    depth: int
    heads: int
    grid: int               # side of the grid of learned positions
    registers: int = 0
    embed: int = 0          # width of the space shared with the text, where there is one
    family: str = "dinov2"  # a name in FAMILIES


@dataclass(frozen=True)
class TextShape:
    """The numbers that fix a text tower; `load_text` reads them off a file's tensors."""
    width: int
    depth: int
    heads: int
    embed: int              # width of the projected sentence
    vocabulary: int
    positions: int          # longest text, in tokens
    family: str = "clip text"


VISION = {
    "dinov2-b": VisionShape(14, 768, 12, 12, grid=37, registers=4),
    "dinov2-l": VisionShape(14, 1024, 24, 16, grid=37, registers=4),
    "clip-b": VisionShape(16, 768, 12, 12, grid=14, embed=512, family="clip"),
    "clip-l": VisionShape(14, 1024, 24, 16, grid=16, embed=768, family="clip"),
    "eva-b": VisionShape(16, 768, 12, 12, grid=14, embed=512, family="eva"),
    "small": VisionShape(8, 96, 4, 3, grid=8, registers=2),
    "small-clip": VisionShape(8, 96, 4, 3, grid=8, embed=96, family="clip"),
}
TEXT = {
    "clip-b": TextShape(512, 12, 8, embed=512, vocabulary=49408, positions=77),
    "clip-l": TextShape(768, 12, 12, embed=768, vocabulary=49408, positions=77),
    "eva-b": TextShape(512, 12, 8, embed=512, vocabulary=49408, positions=77, family="eva text"),
    "small": TextShape(96, 2, 3, embed=96, vocabulary=1024, positions=32),
}


# ---------------------------------------------------------------------------------------------
# Published files: where they are, and what they call their tensors
# ---------------------------------------------------------------------------------------------

class Published(NamedTuple):
    """A file: its name, where it is to be had, and its SHA-256 where the publisher gives one."""
    file: str
    address: str
    sha256: str | None = None


DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
CLIP = "https://openaipublic.azureedge.net/clip/models"
CLIP_B = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
PUBLISHED = {name: Published(address.rsplit("/", 1)[1], address, digest)
             for name, address, digest in (
    ("dinov2-b", f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", None),
    ("dinov2-l", f"{DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", None),
    ("clip-b", f"{CLIP}/{CLIP_B}/ViT-B-16.pt", CLIP_B),
    ("clip-l", f"{CLIP}/{CLIP_L}/ViT-L-14.pt", CLIP_L),
    ("eva-b", "https://huggingface.co/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_B_psz16_s8B.pt",
     None),
    ("vocabulary", "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
     "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"))}


# What a tensor is called here, as a regular expression, and in the published files.
DINOV2_NAMES = [
    (r"^class_token", "cls_token"),
    (r"^position", "pos_embed"),
    (r"^registers", "register_tokens"),
    (r"^patch\.", "patch_embed.proj."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.scale([12])\.", r".ls\1."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
]
CLIP_BLOCK_NAMES = [
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),
    (r"\.attention\.out\.", ".attn.out_proj."),
    (r"\.mlp\.up\.", ".mlp.c_fc."),
    (r"\.mlp\.down\.", ".mlp.c_proj."),
]
CLIP_TEXT_NAMES = CLIP_BLOCK_NAMES + [
    (r"^embedding\.", "token_embedding."),
    (r"^position", "positional_embedding"),
    (r"^norm\.", "ln_final."),
    (r"^projection", "text_projection"),
]
CLIP_VISION_NAMES = CLIP_BLOCK_NAMES + [
    (r"^class_token", "class_embedding"),
    (r"^position", "positional_embedding"),
    (r"^patch\.", "conv1."),
    (r"^norm_before\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^projection\.weight", "proj"),
    (r"^", "visual."),
]
EVA_VISION_NAMES = [
    (r"^class_token", "cls_token"),
    (r"^position", "pos_embed"),
    (r"^patch\.", "patch_embed.proj."),
    (r"^projection\.", "head."),
    (r"\.attention\.(query|value)\.bias", lambda match: f".attn.{match[1][0]}_bias"),
    (r"\.attention\.(query|key|value)\.", lambda match: f".attn.{match[1][0]}_proj."),
    (r"\.attention\.norm\.", ".attn.inner_attn_ln."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.mlp\.gate\.", ".mlp.w1."),
    (r"\.mlp\.up\.", ".mlp.w2."),
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.mlp\.down\.", ".mlp.w3."),
    (r"^", "visual."),
]
EVA_TEXT_NAMES = CLIP_TEXT_NAMES + [(r"^(?!logit_scale)", "text.")]
# Hugging Face's. Query, key and value are stored apart; `join` puts them together as "qkv".
HF_DINOV2_NAMES = [
    (r"^class_token", "embeddings.cls_token"),
    (r"^position", "embeddings.position_embeddings"),
    (r"^registers", "embeddings.register_tokens"),
    (r"^mask_token", "embeddings.mask_token"),
    (r"^patch\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attention\.qkv\.", ".attention.attention.qkv."),
    (r"\.attention\.out\.", ".attention.output.dense."),
    (r"\.scale([12])\.gamma", r".layer_scale\1.lambda1"),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
]
HF_CLIP_BLOCK_NAMES = [
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attention\.qkv\.", ".self_attn.qkv."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
]
HF_CLIP_VISION_NAMES = HF_CLIP_BLOCK_NAMES + [
    (r"^class_token", "embeddings.class_embedding"),
    (r"^position", "embeddings.position_embedding.weight"),
    (r"^patch\.", "embeddings.patch_embedding."),
    (r"^norm_before\.", "pre_layrnorm."),
    (r"^norm\.", "post_layernorm."),
    (r"^projection\.", "visual_projection."),
    (r"^(?!visual_projection)", "vision_model."),
]
HF_CLIP_TEXT_NAMES = HF_CLIP_BLOCK_NAMES + [
    (r"^embedding\.", "embeddings.token_embedding."),
    (r"^position", "embeddings.position_embedding.weight"),
    (r"^norm\.", "final_layer_norm."),
    (r"^projection", "text_projection.weight"),
    (r"^(?!text_projection|logit_scale)", "text_model."),
]


def transposed(tensor):
    return tensor.T


class Layout(NamedTuple):
    """How a family's published files call its tensors."""
    family: str             # a name in FAMILIES
    mark: str               # a tensor that only this layout has
    belongs: str            # regular expression of the names of this tower's tensors
    names: list
    views: dict = {}        # our name -> what makes our shape of the stored one


# CLIP's class token (D) and positions (N, D), in either layout.
UNBATCHED = {"class_token": lambda tensor: tensor[None, None],
             "position": lambda tensor: tensor[None]}
VISION_LAYOUTS = [
    Layout("dinov2", "register_tokens", r"", DINOV2_NAMES),
    Layout("clip", "visual.class_embedding", r"visual\.", CLIP_VISION_NAMES,
           {**UNBATCHED, "projection.weight": transposed}),
    Layout("eva", "visual.blocks.0.attn.inner_attn_ln.weight", r"visual\.", EVA_VISION_NAMES),
    Layout("dinov2", "embeddings.register_tokens", r"", HF_DINOV2_NAMES),
    Layout("clip", "vision_model.embeddings.class_embedding",
           r"(vision_model(?!\.embeddings\.position_ids)|visual_projection)\.",
           HF_CLIP_VISION_NAMES, UNBATCHED),
]
TEXT_LAYOUTS = [
    # OpenAI's archives carry three plain numbers among their tensors.
    Layout("clip text", "token_embedding.weight",
           r"(?!visual\.|input_resolution|context_length|vocab_size)", CLIP_TEXT_NAMES),
    Layout("eva text", "text.token_embedding.weight", r"text\.|logit_scale", EVA_TEXT_NAMES),
    Layout("clip text", "text_model.embeddings.token_embedding.weight",
           r"(text_model(?!\.embeddings\.position_ids)|text_projection)\.|logit_scale",
           HF_CLIP_TEXT_NAMES, {"projection": transposed}),
]
ORDINARY = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64}


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------

def load_vision(path, image_size=None):
    """A frozen vision tower from a published file, told by its content.

    That is DINOv2 with registers, CLIP, or EVA-02 as CLIP, as their authors published them, or the
    first two in Hugging Face's layout, the file or its folder. Files of both of CLIP's towers serve
    for either. `tower(images (B, 3, H, W))` gives the final normed tokens (B, N, D). Widths and
    depths are read off the tensors. With `image_size` (pixels) the grid of positions is resized to
    that size once and for good; without, it stays as published and is resized for every input.
    Raises WeightsError, naming the tensor, for anything missing, extra or misshapen; OSError where
    the file cannot be read; ValueError where the patch does not divide `image_size`.
    """
    tower = vision_tower(path, read_tensors(path))
    if image_size is not None:
        tower.resize(image_size)
    return tower


def vision_tower(path, state):
    """`load_vision`, of tensors that were read from `path`."""
    state, layout, size = in_layout(path, "vision", VISION_LAYOUTS, state)
    tables = {name: state.pop(name) for name in list(state)
              if ".freqs_" in name and layout.family == "eva"}
    width, _, _, patch = size("patch.weight", 4)
    positions = size("position", 3)[1]
    grid = math.isqrt(positions - 1)
    if grid == 0 or grid ** 2 != positions - 1:
        raise WeightsError(f"{path}: tensor {renamed('position', layout.names)} is misshapen: "
                           f"{positions} positions are not one and a square grid")
    shape = VisionShape(
        patch, width, depth=count_blocks(path, state, layout), heads=heads_of(path, width),
        grid=grid, registers=size("registers", 3)[1] if layout.family == "dinov2" else 0,
        embed=0 if layout.family == "dinov2" else size("projection.weight", 2)[0],
        family=layout.family)
    tower = tower_from(ViT, shape, state, path, layout.names)
    for name, table in tables.items():              # EVA-02's own cosines and sines
        ours = tower.rotary_tables((grid, grid))[name.endswith("sin")]
        if table.shape != ours.shape or not (table - ours).abs().max() < 0.01:   # of halves
            raise WeightsError(f"{path}: tensor {name} holds other angles than those of EVA-02 "
                               f"as CLIP")
    return tower


def load_text(path):
    """A frozen text tower, CLIP's or that of EVA-02 as CLIP; files as for `load_vision`.

    `tower(tokens (B, L))` gives `words` (B, L, D) and `sentence` (B, E). Errors: as `load_vision`.
    """
    return text_tower(path, read_tensors(path))


def text_tower(path, state):
    """`load_text`, of tensors that were read from `path`."""
    state, layout, size = in_layout(path, "text", TEXT_LAYOUTS, state)
    if layout.names is HF_CLIP_TEXT_NAMES:          # a text tower alone is saved without it
        state.setdefault("logit_scale", torch.zeros(()))
    vocabulary, width = size("embedding.weight", 2)
    shape = TextShape(
        width, depth=count_blocks(path, state, layout), heads=heads_of(path, width),
        embed=size("projection", 2)[1], vocabulary=vocabulary, positions=size("position", 2)[0],
        family=layout.family)
    return tower_from(TextTransformer, shape, state, path, layout.names)


def in_layout(path, kind, layouts, state):
    """The tensors of one tower that a file in one of the `layouts` holds: (state, layout, size).

    `state` has our shapes under the file's names; `size(name, n)` is the shape of the tensor that
    we call `name`, which must be there with n dimensions.
    """
    layout = next((layout for layout in layouts if layout.mark in state), None)
    if layout is None:
        marks = ", ".join(f"{layout.mark} ({layout.family})" for layout in layouts)
        raise WeightsError(f"{path}: no {kind} tower of a family known here, each of which has one "
                           f"of {marks}; found {some_of(state)}")
    state = {name: tensor for name, tensor in state.items() if re.match(layout.belongs, name)}
    join(path, state)

    def size(name, count):
        return dimensions(path, state, renamed(name, layout.names), count)

    for name, view in layout.views.items():
        size(name, 1 if name == "class_token" else 2)
        state[renamed(name, layout.names)] = view(state[renamed(name, layout.names)])
    return state, layout, size


def join(path, state):
    """Puts Hugging Face's queries, keys and values, stored apart, together as `qkv`."""
    stored = r"(.*\.(?:attention\.attention|self_attn)\.)(?:query|key|value|[qkv]_proj)(\.\w+)"
    matches = [re.fullmatch(stored, name) for name in state]
    for start, end in {match.groups() for match in matches if match}:
        words = ("q_proj", "k_proj", "v_proj")
        if start.endswith("attention.attention."):
            words = ("query", "key", "value")
        names = [f"{start}{word}{end}" for word in words]
        shapes = [dimensions(path, state, name, 2 if end == ".weight" else 1) for name in names]
        if len(set(shapes)) > 1:
            raise WeightsError(f"{path}: tensors {names[0]} and its two companions are misshapen, "
                               f"{shapes}")
        state[f"{start}qkv{end}"] = torch.cat([state.pop(name) for name in names])


def renamed(name, names):
    """A tensor's name here to its name in a file."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


HF_FILES = ("model.safetensors", "pytorch_model.bin")


def weight_file(path):
    """The file that `path` is, or, where it is a folder as Hugging Face's, the one in it."""
    if not os.path.isdir(path):
        return path
    for name in HF_FILES:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileNotFoundError(f"{path}: a folder without {' or '.join(HF_FILES)}")


def read_tensors(path):
    """Name -> tensor of a PyTorch file, TorchScript archive or .safetensors file, on the CPU.

    `path` may be a folder with such a file under one of Hugging Face's names.
    """
    path = weight_file(path)
    state = (read_safetensors(path)[0] if str(path).endswith(".safetensors") else
             read_file(path))
    if not isinstance(state, dict) or not state or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in state.items()):
        raise WeightsError(f"{path}: not a table of named tensors")
    check_plain(path, state)
    return dict(state)


def check_plain(path, state):
    """WeightsError for an entry that is no ordinary tensor of numbers, all of them in the file."""
    for name, tensor in state.items():
        if (not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided
                or tensor.is_nested or tensor.is_meta or tensor.dtype not in ORDINARY
                or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()):
            raise WeightsError(f"{path}: {name} is not a plain tensor of numbers")


def read_safetensors(path):
    """Name -> tensor, and the metadata, of a .safetensors file."""
    with open(path, "rb"):
        pass                                        # an OSError is about the path
    try:
        import safetensors
    except ImportError:
        raise WeightsError(f"{path}: to read .safetensors files, pip install safetensors; or take "
                           f"the same weights as {HF_FILES[1]}") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:                      # of a type of its own
        raise WeightsError(f"{path}: not a readable .safetensors file: {error}; "
                           f"fetch it again") from None


NUMPY_NUMBERS = [*((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
                   for core in ("core", "_core")),
                 np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64))]


def read_file(path):
    """What torch.save wrote, without running any code, or the tensors of a TorchScript archive.

    Raises WeightsError for all that is neither, OSError where the file cannot be opened.
    """
    with open(path, "rb"):
        pass                                        # an OSError from here on is about the content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # about TorchScript's age, or a foreign pickle
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    unpacked = sum(part.file_size for part in archive.infolist())
                    if unpacked > 4 * os.path.getsize(path) + 2**24:
                        raise ValueError("it would unpack to many times its size")
                    if archive.testzip():           # PyTorch does not look at the checksums
                        raise ValueError("a checksum is wrong, so it was damaged")
                    # A TorchScript archive holds its program under code/.
                    code = [name for name in archive.namelist() if "/code/" in name]
                    if any(b"__setstate__" in archive.read(name) for name in code):
                        raise ValueError("its program would run on loading")
                    if code:
                        return torch.jit.load(path, map_location="cpu").state_dict()
            # Some programs keep a figure as a number of numpy's.
            with torch.serialization.safe_globals(NUMPY_NUMBERS):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: not a readable weight file: damaged, of another kind, or with "
                           f"objects in it that could run code, which are refused") from None
    except Exception as error:                      # each reader has exceptions of its own
        reason = (str(error).strip() or repr(error)).splitlines()[0].partition(", file")[0]
        raise WeightsError(f"{path}: not a readable weight file: {reason}; "
                           f"fetch it again") from None


def count_blocks(path, state, layout):
    """How many blocks the names of a tower's tensors speak of. WeightsError for a gap."""
    prefix = renamed("blocks.", layout.names).removesuffix(".")
    numbers = [int(match[1]) for match in
               (re.match(rf"{re.escape(prefix)}\.(\d{{1,4}})\.", name) for name in state) if match]
    missing = set(range(len(set(numbers)) or 1)) - set(numbers)
    if missing:
        raise WeightsError(f"{path}: tensors missing: there is no {prefix}.{min(missing)}.*")
    return max(numbers) + 1


def heads_of(path, width):
    """How many attention heads a published tower of this width has: each is 64 wide."""
    if width % 64:
        raise WeightsError(f"{path}: {width} channels cannot be shared by heads of 64")
    return width // 64


def dimensions(path, state, name, count):
    """The shape of a tensor that must be there with so many dimensions, none of them 0."""
    if name not in state:
        raise WeightsError(f"{path}: tensor {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != count or 0 in shape:
        raise WeightsError(f"{path}: tensor {name} is misshapen, {shape}")
    return shape


def some_of(state):
    return ", ".join(list(state)[:4]) + (", ..." if len(state) > 4 else "")


def tower_from(tower_class, shape, state, path, names):
    """A frozen tower of this shape that holds exactly these tensors, in single precision."""
    with torch.device("meta"):
        tower = tower_class(shape)
    load_tensors(tower, state, path, names)
    return freeze(tower)


def load_tensors(module, state, path, names=(), expected=None):
    """Puts the tensors of `state` in place of all of `module`'s, or of those in `expected`.

    `names` translates the module's own names into those of the file. Raises WeightsError that
    names, in the file's words, the first tensor missing, unexpected or misshapen, and their count.
    """
    own = module.state_dict() if expected is None else expected
    theirs = {renamed(name, names): name for name in own}
    check_plain(path, state)
    for problem, found in (
            ("missing", [n for n in theirs if n not in state]),
            ("unexpected", [n for n in state if n not in theirs]),
            ("misshapen", [n for n in theirs if state[n].shape != own[theirs[n]].shape]
             if theirs.keys() <= state.keys() else [])):
        if found:
            detail = ""
            if problem == "misshapen":
                detail = (f", {tuple(state[found[0]].shape)} in the file, "
                          f"{tuple(own[theirs[found[0]]].shape)} expected")
            raise WeightsError(f"{path}: {len(found)} tensor(s) {problem}, the first: "
                               f"{found[0]}{detail}")
    converted = {}
    for name, tensor in state.items():
        kind = own[theirs[name]].dtype
        if tensor.is_floating_point() != kind.is_floating_point:
            raise WeightsError(f"{path}: tensor {name} is of type {tensor.dtype}, {kind} expected")
        converted[theirs[name]] = tensor.to(kind)
        if not converted[theirs[name]].isfinite().all():
            raise WeightsError(f"{path}: tensor {name} holds numbers that are not finite in {kind}")
    module.load_state_dict(converted, strict=expected is None, assign=True)


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------

def download(name, folder="pretrained"):
    """Fetches a file of PUBLISHED into a folder, and returns its path.

    What has arrived stays beside it as FILE.part, and the next call goes on from there. The file
    gets its name only once it is whole and, where a SHA-256 is published, is found to be the one.
    Raises OSError where it cannot be fetched or written, WeightsError for another SHA-256.
    """
    published = PUBLISHED[name]
    target = os.path.join(folder, published.file)
    part = f"{target}.part"
    if os.path.isfile(target):
        check_digest(target, published, "remove it to fetch it again")
        return target
    if os.path.exists(target) or os.path.exists(folder) and not os.path.isdir(folder):
        raise OSError(f"{target}: cannot be made, something of that name is in the way")
    os.makedirs(folder, exist_ok=True)
    here = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(
        published.address, headers={"Range": f"bytes={here}-"} if here else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, open(part, "ab") as file:
            receive(response, file, here, published)
            os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        whole = str(error.headers.get("Content-Range")).rpartition("/")[2]
        if not (here and error.code == 416 and whole in (str(here), "None")):
            raise OSError(f"{published.address}: {error}" + (
                f"; {part} has {here} bytes of {whole}, remove it" if error.code == 416 else "")
            ) from None
        # else nothing was left to send
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException
            ) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{published.address}: {reason}; the same command goes on") from None
    check_digest(part, published, f"remove {part} and fetch it again")
    os.replace(part, target)
    return target


def receive(response, file, here, published):
    """Appends to `file`, of which `here` bytes are there, what is missing of a response's content.

    OSError where the content ends early.
    """
    length = int(response.headers.get("Content-Length") or 0)
    skip = 0 if getattr(response, "status", None) == 206 else here      # 206: only the rest comes
    total = here - skip + length if length else None
    with tqdm(desc=published.file, total=total, initial=here - skip, unit="B", unit_scale=True,
              unit_divisor=1024) as bar:
        while chunk := response.read(1 << 20):
            bar.update(len(chunk))
            file.write(chunk[skip:])
            skip = max(0, skip - len(chunk))
    if total is not None and bar.n < total:
        raise OSError(f"{published.address}: cut off after {bar.n:,} of {total:,} bytes; the same "
                      f"command goes on")


def check_digest(path, published, remedy):
    if published.sha256 is not None and sha256(path) != published.sha256:
        raise WeightsError(f"{path}: not the published file, whose SHA-256 is "
                           f"{published.sha256[:16]}...; {remedy}")


def main():
    parser = argparse.ArgumentParser(description="Fetch published weights into pretrained/.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="fetch a file, or go on fetching it")
    command.add_argument("names", metavar="NAME", nargs="+", choices=PUBLISHED,
                         help=", ".join(PUBLISHED))
    for name in parser.parse_args().names:
        print(download(name))


# ---------------------------------------------------------------------------------------------
# Speed on CPUs
# ---------------------------------------------------------------------------------------------

# PyTorch's products call MKL, which on AMD's CPUs leaves half of each vector unit idle. oneDNN's
# linear layer, the one torch.compile uses, fills it. (Intel's CPUs with AVX-512 take it, too;
# whether that helps them was not measured.)
ONEDNN_LINEAR = None
if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
    ONEDNN_LINEAR = torch.ops.mkldnn._linear_pointwise


def onednn_linear(x, weight, bias=None):
    return ONEDNN_LINEAR(x, weight, bias, "none", [], "")   # no activation after it


class LinearByOneDNN(torch.autograd.Function):
    """x (..., I), weight (O, I) and bias (O,) or None to x weight^T + bias, (..., O)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # frozen: keeps no x
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, weight), rows = ctx.saved_tensors, gradient.reshape(-1, gradient.shape[-1])
        x_learns, weight_learns, bias_learns = ctx.needs_input_grad
        return (onednn_linear(gradient, weight.t()) if x_learns else None,
                onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if weight_learns else None,
                rows.sum(0) if bias_learns else None)


def linear(x, weight, bias=None):
    """`F.linear`, or oneDNN's for large layers: x (..., I), weight (O, I), bias (O,) to (..., O).

    Below 2^23 multiplications our own autograd function costs more than oneDNN saves. `F.linear`
    does autocast's casting, and says clearly what is wrong with sizes that do not fit.
    """
    if (ONEDNN_LINEAR and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() * len(weight) >= 2**23 and x.shape[-1] == weight.shape[1]
            and not torch.is_autocast_enabled("cpu")):
        return LinearByOneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """PyTorch's layer, computed by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class UnfusedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(C)) v of all heads in plain products, with dropout of the weights.

    q (B, heads, N, C), k and v (B, heads, M, C), visible (B, 1, 1, M) or None. Its own backward: it
    keeps the weights once, and a byte each for which were dropped. Autograd would keep them three
    times: plain, masked, and the mask in their type.
    """

    @staticmethod
    def forward(ctx, q, k, v, visible, dropout):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)            # (B, heads, N, M)
        if visible is not None:
            scores.masked_fill_(~visible, -torch.inf)
        weights, dropped, ctx.rescale = scores.softmax(-1), None, 1.0
        if dropout:
            # Random numbers cost most, so each one of 64 bits is cut into four, one a weight. That
            # rounds the share to a multiple of 2^-16, below 1.
            threshold = min(round(dropout * 2**16), 2**16 - 1)
            bits = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-2**63, None)
            dropped = bits.view(torch.int16)[:weights.numel()].view_as(weights) < threshold - 2**15
            ctx.rescale = 1 / (1 - threshold / 2**16)
        out = (weights if dropped is None else weights.masked_fill(dropped, 0)) @ (v * ctx.rescale)
        ctx.save_for_backward(q, k, v, weights, dropped, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, weights, dropped, out = ctx.saved_tensors
        scale, rescaled = q.shape[-1] ** -0.5, gradient * ctx.rescale
        used = weights if dropped is None else weights.masked_fill(dropped, 0)
        to_v, to_scores = used.transpose(-1, -2) @ rescaled, rescaled @ v.transpose(-1, -2)
        if dropped is not None:
            to_scores.masked_fill_(dropped, 0)
        # A softmax's backward subtracts from each row the sum of its weights times their gradients,
        # which is the sum over the channels of what came out times its gradient.
        to_scores.sub_((gradient * out).sum(-1, keepdim=True)).mul_(weights)
        return to_scores @ k * scale, to_scores.transpose(-1, -2) @ q * scale, to_v, None, None


if __name__ == "__main__":
    try:
        main()
    except (WeightsError, OSError) as error:
        print(f"backbones.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
