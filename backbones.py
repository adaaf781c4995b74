"""The towers: one vision transformer, CLIP's text transformer, and their published weights.

One block, for tokens x (B, N, D), before a tuning method adds to it:

    q, k, v = W_qkv norm(x) + b_qkv                      each (B, N, D), cut into heads
    a = softmax(q k^T / sqrt(D / heads)) v               for each head
    x = x + scale (W_out a + b_out)                      the scale: DINOv2's, DINOv3's
    h = activation(W_up norm(x) + b_up)                  (B, N, 4D); EVA-02's: see `MLP`
    x = x + scale (W_down h + b_down)

Shapes: B batch, N tokens, D width, L words, E width of CLIP's common space (`shape.embed`).
`tower.shape` holds a tower's sizes (`VisionShape`). `grid` is (rows, columns) of patches;
`shape.grid`, the side of the square one of pretraining.

`model.py` runs a tower step by step: `embed`, each of `blocks`, then `norm` or, for texts, `final`.
The order in which two towers take these steps *is* the tuning method. A method passes its adapters
to a block as an `Attached` tuple, or wraps one of its layers. No adapter is defined in this file.

References: DINOv2 with registers (https://github.com/facebookresearch/dinov2), CLIP
(https://github.com/openai/CLIP), EVA-02 as CLIP (https://github.com/baaivision/EVA), DINOv3
(https://github.com/facebookresearch/dinov3; neither paper uses it).

    python backbones.py download dinov2-b clip-b vocabulary     into pretrained/
"""

import argparse
import hashlib
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class WeightsError(ValueError):
    """A weight file or checkpoint that cannot be used; the message says which, what and where."""


# ---- The transformer block ------------------------------------------------------------------

def attend(q, k, v, heads, causal=False, rotary=None, padding=None, dropout=0.0):
    """softmax(q k^T / sqrt(D/heads)) v for each head: q (B, N, D), k and v (B, M, D) to (B, N, D).

    `causal`: a token sees itself and the tokens before it. `rotary`: of `ViT.rotary_tables`.
    `padding` (B, M): True for the tokens that no one sees; not together with `causal`.
    `dropout`: the share of the softmax's weights that become zero.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    visible = None if padding is None else ~padding[:, None, None]
    # On CPUs PyTorch falls back to slow code for dropout, and its fused bfloat16 is half as fast as
    # plain products. (Causal texts are short, so they take PyTorch's.)
    if q.device.type == "cpu" and not causal and (dropout or q.dtype == torch.bfloat16):
        x = UnfusedAttention.apply(q, k, v, visible, dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, visible, dropout, causal)   # (B, heads, N, ...)
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention. EVA-02's and DINOv3's keys have no bias (`key_bias` in `Family`);
    EVA-02's has a LayerNorm before `out`."""

    def __init__(self, width, heads, family):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=family.key_bias)
        self.query_bias, self.value_bias = (
            None if family.key_bias else nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.norm = nn.LayerNorm(width, family.eps) if family.eva else nn.Identity()
        self.out = Linear(width, width)

    def forward(self, x, causal=False, rotary=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.query_bias is not None:
            q, v = q + self.query_bias, v + self.value_bias
        return self.out(self.norm(attend(q, k, v, self.heads, causal, rotary)))


class MLP(nn.Module):
    """Two linear layers; EVA-02's is gated (SwiGLU), with a LayerNorm before its last layer."""

    def __init__(self, width, family):
        super().__init__()
        # The three matrices of a gated MLP are as large as the two of an ordinary one.
        hidden = 8 * width // 3 if family.eva else 4 * width
        self.gate = Linear(width, hidden) if family.eva else None
        self.up = Linear(width, hidden)
        self.activation = family.activation
        self.norm = nn.LayerNorm(hidden, family.eps) if family.eva else nn.Identity()
        self.down = Linear(hidden, width)

    def forward(self, x):
        h = self.up(x)
        h = self.activation(h) if self.gate is None else self.activation(self.gate(x)) * h
        return self.down(self.norm(h))


class LayerScale(nn.Module):
    """A learned factor per channel (DINOv2, DINOv3)."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Attached(NamedTuple):
    """What a tuning method attaches to one block. Each entry maps (B, N, D) to (B, N, D)."""
    attention_shortcut: Callable = nn.Identity()    # on the skip connection of the attention
    mlp_shortcut: Callable = nn.Identity()          # on the skip connection of the MLP
    beside_mlp: Callable | None = None              # of the normed input; added to the MLP


class Block(nn.Module):
    """A pre-norm transformer block with three places for adapters (see `Attached`)."""

    def __init__(self, width, heads, family):
        super().__init__()
        self.causal = family.causal
        self.norm1 = nn.LayerNorm(width, family.eps)
        self.attention = Attention(width, heads, family)
        self.scale1 = LayerScale(width) if family.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, family.eps)
        self.mlp = MLP(width, family)
        self.scale2 = LayerScale(width) if family.layer_scale else nn.Identity()

    def forward(self, x, attached=Attached(), rotary=None):
        attention = self.attention(self.norm1(x), self.causal, rotary)
        x = attached.attention_shortcut(x) + self.scale1(attention)
        normed = self.norm2(x)
        mlp = self.mlp(normed)
        if attached.beside_mlp is not None:
            mlp = mlp + attached.beside_mlp(normed)
        return attached.mlp_shortcut(x) + self.scale2(mlp)


class MultiheadAttention(nn.MultiheadAttention):
    """PyTorch's layer, for adapters and head, computed by `linear` and `attend`.

    Queries (B, N, D), keys (B, M, kdim) and values (B, M, vdim) to (B, N, D), batch first and so
    without PyTorch's copies. `padding` (B, M): True for the keys that no one sees. Of the
    constructor's options dropout, kdim and vdim count.
    """

    def forward(self, query, key, value, padding=None):
        weights = (self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else
                   (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        q, k, v = map(linear, (query, key, value), weights, self.in_proj_bias.chunk(3))
        x = attend(q, k, v, self.num_heads, padding=padding,
                   dropout=self.dropout if self.training else 0.0)
        return linear(x, self.out_proj.weight, self.out_proj.bias)


# ---- The two towers -------------------------------------------------------------------------

class ViT(nn.Module):
    """Vision transformer: DINOv2 with registers, DINOv3, CLIP's, or EVA-02 as CLIP, by its family.

    Tokens are [class, registers, patches row by row], (B, 1 + registers + H/P * W/P, D). The
    learned grid of positions is resized to the image's own grid, bicubically; DINOv2's antialiased,
    as published. DINOv3 has no such grid. Raises ValueError if the patch does not divide the image.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape, family = shape, FAMILIES[shape.family]
        self.prefix = 1 + shape.registers       # tokens before the patches
        self.legacy_position_resize = False     # as DINOv2's first release resized them
        width = shape.width
        self.patch = nn.Conv2d(3, width, shape.patch, shape.patch, bias=not family.norm_before)
        self.norm_before = nn.LayerNorm(width, family.eps) if family.norm_before else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, shape.heads, family) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, family.eps)
        self.projected_width = shape.embed or width
        # Final tokens (B, N, D) into CLIP's space (B, N, E); unchanged in towers without one.
        self.projection = (Linear(width, shape.embed, bias=family.eva) if shape.embed else
                           nn.Identity())
        positions = 1 + shape.grid ** 2 if shape.grid else 0
        self.class_token, self.registers, self.position = (
            nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, tokens, width), std=0.02))
            if tokens else None for tokens in (1, shape.registers, positions))

    def grid(self, images):
        """Rows and columns of patches of images (B, 3, H, W)."""
        height, width = images.shape[-2:]
        if height % self.shape.patch or width % self.shape.patch:
            raise ValueError(f"patch {self.shape.patch} does not divide {height}x{width} pixels")
        return height // self.shape.patch, width // self.shape.patch

    def positions(self, grid):
        """Positions of the class token and of a grid (rows, columns): (1, 1 + rows*columns, D)."""
        stored = self.shape.grid
        if grid == (stored, stored):
            return self.position
        class_position, patches = self.position[:, :1], self.position[:, 1:]
        patches = patches.float().unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        how = {"size": grid, "antialias": FAMILIES[self.shape.family].antialias}
        if self.legacy_position_resize:     # by the ratio of a grid a tenth of a patch larger
            how = {"scale_factor": [(side + 0.1) / stored for side in grid]}
        patches = F.interpolate(patches, mode="bicubic", **how)
        patches = patches.flatten(2).transpose(1, 2).to(class_position.dtype)
        return torch.cat([class_position, patches], dim=1)

    def rotary_tables(self, grid):
        """By how much queries and keys are rotated at every place of a grid (rows, columns).

        Cosines and sines, (rows * columns, channels of a head), in single precision, and whether
        the two channels of a pair are half a head apart (True) or neighbours (False). Half of the
        pairs are rotated by the row, half by the column, pair i of each at the rate
        base^(-4i / channels). EVA-02: neighbours, base 10000, and any grid is rescaled to the 16x16
        of pretraining. DINOv3: half a head apart, base 100, rates times 2 pi, and any grid spans -1
        to 1. None for other towers.
        """
        rotary = FAMILIES[self.shape.family].rotary
        if rotary is None:
            return None
        halves = rotary == "halves"
        device, quarter = self.class_token.device, self.shape.width // self.shape.heads // 4
        exponents = torch.arange(quarter, device=device) / quarter
        sides = [torch.arange(side, device=device) for side in grid]
        if halves:
            rates = 2 * math.pi * 100 ** -exponents
            sides = [(numbers + 0.5) / len(numbers) * 2 - 1 for numbers in sides]
        else:
            rates = 10000 ** -exponents
            sides = [numbers / len(numbers) * 16 for numbers in sides]
        places = torch.cartesian_prod(*sides)                               # (places, 2)
        angles = (places[:, :, None] * rates).flatten(1)                    # one for each pair
        angles = angles.repeat(1, 2) if halves else angles.repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin(), halves

    def resize(self, image_size):
        """Resizes the stored grid of positions once, to that of square images of this size."""
        grid = self.grid(torch.empty(0, 3, image_size, image_size, device="meta"))
        if self.position is not None:
            self.position = nn.Parameter(self.positions(grid).detach(), self.position.requires_grad)
            self.shape = self.shape._replace(grid=grid[0])

    def embed(self, images):
        """Images (B, 3, H, W), normalised, to the tokens that enter the first block."""
        grid = self.grid(images)
        patches = self.patch(images).flatten(2).transpose(1, 2)             # (B, H/P * W/P, D)
        batch = len(patches)
        x = torch.cat([self.class_token.expand(batch, -1, -1), patches], dim=1)
        if self.position is not None:
            x = x + self.positions(grid)
        if self.registers is not None:
            x = torch.cat([x[:, :1], self.registers.expand(batch, -1, -1), x[:, 1:]], dim=1)
        return self.norm_before(x)

    def as_map(self, x, grid):
        """The patch tokens of x as a map: (B, N, D) to (B, D, rows, columns)."""
        return x[:, self.prefix:].transpose(1, 2).unflatten(2, grid)

    def forward(self, images):
        """Images (B, 3, H, W), normalised, to the final normed tokens (B, N, D)."""
        x, rotary = self.embed(images), self.rotary_tables(self.grid(images))
        for block in self.blocks:
            x = block(x, rotary=rotary)
        return self.norm(x)


class TextTransformer(nn.Module):
    """CLIP's causal text transformer, and EVA-02-CLIP's, which differs by its activation.

    Token ids are (B, L), L up to `shape.positions`. The end-of-text token has the highest id.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape, family = shape, FAMILIES[shape.family]
        width = shape.width
        self.embedding = nn.Embedding(shape.vocabulary, width)
        self.position = nn.Parameter(torch.zeros(shape.positions, width))
        self.blocks = nn.ModuleList(Block(width, shape.heads, family) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, family.eps)
        self.projection = nn.Parameter(torch.zeros(width, shape.embed))     # into CLIP's space
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        nn.init.normal_(self.projection, std=width ** -0.5)

    def embed(self, tokens):
        """Token ids (B, L) to the tokens that enter the first block (B, L, D)."""
        return self.embedding(tokens) + self.position[:tokens.shape[1]]

    def final(self, x, tokens):
        """Tokens after the last block to `words` (B, L, D), normed, and `sentence` (B, E)."""
        words = self.norm(x)
        end = words[torch.arange(len(words), device=words.device), tokens.argmax(dim=-1)]
        return words, end @ self.projection

    def forward(self, tokens):
        """Token ids (B, L) to `words` (B, L, D) and `sentence` (B, E)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.final(x, tokens)


def after_end(tokens):
    """True where a token id (B, L) is padding, i.e. comes after the end-of-text token.

    The authors' programs test for id 0 instead, which is also the id of a "!" inside a word.
    """
    return torch.arange(tokens.shape[1], device=tokens.device) > tokens.argmax(-1, keepdim=True)


# ---- Rotary positions, families and shapes --------------------------------------------------

def rotate(x, cos, sin, halves):
    """Rotary positions: rotates pairs of channels of the patches' tokens, which are the last ones.

    x is (B, heads, N, C); cos and sin, (patches, C), and `halves` come from
    `ViT.rotary_tables`. The tokens before the patches have no position and are not rotated.
    """
    others, image = x.split([x.shape[2] - len(cos), len(cos)], dim=2)
    pairs, axis = ((2, -1), -2) if halves else ((-1, 2), -1)
    first, second = image.unflatten(-1, pairs).unbind(axis)
    turned = torch.stack([-second, first], axis).flatten(-2)                # rotated by 90 degrees
    return torch.cat([others, (image * cos + turned * sin).to(x.dtype)], dim=2)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Family(NamedTuple):
    """How one family of towers differs from the others, except for its sizes."""
    activation: Callable
    eps: float = 1e-5               # of the LayerNorms
    causal: bool = False            # a token sees itself and those before it
    layer_scale: bool = False       # a learned factor per channel at the end of both branches
    key_bias: bool = True           # False: only queries and values have a bias
    rotary: str | None = None       # how channels pair: "halves", "neighbours"; None: no rotation
    eva: bool = False               # EVA-02: a gated MLP, norms inside attention and MLP
    norm_before: bool = False       # CLIP: a LayerNorm before the first block, patches without bias
    antialias: bool = False         # when the grid of positions is resized


FAMILIES = {
    "dinov2": Family(F.gelu, eps=1e-6, layer_scale=True, antialias=True),
    # Both DINOs were trained on photos normalised by ImageNet's mean and std, and get CLIP's here.
    "dinov3": Family(F.gelu, layer_scale=True, key_bias=False, rotary="halves"),
    "clip": Family(quick_gelu, norm_before=True),
    "eva": Family(F.silu, eps=1e-6, key_bias=False, rotary="neighbours", eva=True),
    "clip text": Family(quick_gelu, causal=True),
    "eva text": Family(F.gelu, causal=True),
}


class VisionShape(NamedTuple):
    """The sizes of a vision tower; `load_vision` reads them from a file's tensors."""
    patch: int
    width: int
    depth: int
    heads: int
    grid: int               # side of the grid of learned positions; 0: there is none
    registers: int = 0
    embed: int = 0          # width of the space shared with the text, where there is one
    family: str = "dinov2"  # a name in FAMILIES


class TextShape(NamedTuple):
    """The sizes of a text tower; `load_text` reads them from a file's tensors."""
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
    "dinov3-b": VisionShape(16, 768, 12, 12, grid=0, registers=4, family="dinov3"),
    "dinov3-l": VisionShape(16, 1024, 24, 16, grid=0, registers=4, family="dinov3"),
    "clip-b": VisionShape(16, 768, 12, 12, grid=14, embed=512, family="clip"),
    "clip-l": VisionShape(14, 1024, 24, 16, grid=16, embed=768, family="clip"),
    "eva-b": VisionShape(16, 768, 12, 12, grid=14, embed=512, family="eva"),
    "small": VisionShape(8, 96, 3, 3, grid=0, registers=2, family="dinov3"),
    "small-clip": VisionShape(8, 96, 3, 3, grid=8, embed=96, family="clip"),
}
TEXT = {
    "clip-b": TextShape(512, 12, 8, embed=512, vocabulary=49408, positions=77),
    "clip-l": TextShape(768, 12, 12, embed=768, vocabulary=49408, positions=77),
    "eva-b": TextShape(512, 12, 8, embed=512, vocabulary=49408, positions=77, family="eva text"),
    "small": TextShape(96, 2, 3, embed=96, vocabulary=1024, positions=32),
}


# ---- Published files: addresses, names of tensors, loading, fetching ------------------------

class Published(NamedTuple):
    """A file: its name, its address, and its SHA-256 where the publisher gives one."""
    file: str
    address: str            # of a gated file: the page on which to ask for access
    sha256: str | None = None
    gated: bool = False


DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
CLIP = "https://openaipublic.azureedge.net/clip/models"
CLIP_B = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
PUBLISHED = {name: Published(address.rsplit("/", 1)[1], address, *digest)
             for name, address, *digest in (
    ("dinov2-b", f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
    ("dinov2-l", f"{DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"),
    ("clip-b", f"{CLIP}/{CLIP_B}/ViT-B-16.pt", CLIP_B),
    ("clip-l", f"{CLIP}/{CLIP_L}/ViT-L-14.pt", CLIP_L),
    ("eva-b", "https://huggingface.co/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_B_psz16_s8B.pt"),
    ("vocabulary", "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
     "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"))}
PUBLISHED |= {
    name: Published(f"dinov3_{model}_pretrain_lvd1689m-{digest}.pth",
                    "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
                    gated=True)
    for name, model, digest in (("dinov3-b", "vitb16", "73cec8be"),
                                ("dinov3-l", "vitl16", "8aa4cbdd"))}


def columns(table):
    """The columns of a table of names, as (here, in a file) pairs for `renamed`; "-": no change."""
    ours, *files = zip(*(line.split() for line in table.strip().splitlines()))
    return [[pair for pair in zip(ours, theirs) if pair[1] != "-"] for theirs in files]


def renamed(name, names):
    """A tensor's name here to its name in a file."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


# here (a pattern)   DINOv2             CLIP                    Hugging Face's CLIP
DINOV2_NAMES, CLIP_NAMES, HF_CLIP_NAMES = columns(r"""
  ^embedding         -                  token_embedding         embeddings.token_embedding
  ^class_token       cls_token          class_embedding         embeddings.class_embedding
  ^position          pos_embed          positional_embedding    embeddings.position_embedding.weight
  ^registers         register_tokens    -                       -
  ^patch             patch_embed.proj   conv1                   embeddings.patch_embedding
  ^norm_before       -                  ln_pre                  pre_layrnorm
  ^norm\.            -                  ln_post.                post_layernorm.
  ^projection.weight -                  proj.T                  visual_projection.weight
  ^projection        -                  text_projection         text_projection.weight.T
  ^blocks            -                  transformer.resblocks   encoder.layers
  .norm(\d)          -                  .ln_\1                  .layer_norm\1
  .attention.qkv.    .attn.qkv.         .attn.in_proj_          .self_attn.qkv_proj.
  .attention.out     .attn.proj         .attn.out_proj          .self_attn.out_proj
  .scale(\d)         .ls\1              -                       -
  .mlp.up            .mlp.fc1           .mlp.c_fc               .mlp.fc1
  .mlp.down          .mlp.fc2           .mlp.c_proj             .mlp.fc2
""")
CLIP_VISION_NAMES = CLIP_NAMES + [("^", "visual.")]
CLIP_TEXT_NAMES = [(r"^norm\.", "ln_final.")] + CLIP_NAMES
EVA_NAMES = [                               # EVA-02 renamed some and has layers of its own
    (".attention.qkv", ".attn.qkv_proj"), (".attention.(q|v)[a-z]+_bias", r".attn.\1_bias"),
    (".attention.norm", ".attn.inner_attn_ln"), (".mlp.norm", ".mlp.ffn_ln"),
    (".mlp.gate", ".mlp.w1"), (".mlp.up", ".mlp.w2"), (".mlp.down", ".mlp.w3"),
    ("^projection", "head"), *DINOV2_NAMES, ("^", "visual.")]
HF_DINOV2_NAMES = DINOV2_NAMES + [          # Hugging Face renamed DINOv2's layers
    ("^blocks", "encoder.layer"), ("^norm", "layernorm"), ("attn.qkv", "attention.attention.qkv"),
    ("attn.proj", "attention.output.dense"), (r"ls(\d).gamma", r"layer_scale\1.lambda1"),
    ("pos_embed", "position_embeddings"), ("patch_embed.proj", "patch_embeddings.projection"),
    ("^(?=cls|pos|reg|patch)", "embeddings.")]
DINOV3_NAMES = [                            # Meta's own, after `separate_biases`
    ("^registers", "storage_tokens"), (".attention.(q|v)[a-z]+_bias", r".attn.qkv.bias.\1"),
    *DINOV2_NAMES]
TIMM_DINOV3_NAMES = [
    ("^registers", "reg_token"), (r".scale(\d).gamma", r".gamma_\1"),
    (".attention.(q|v)[a-z]+_bias", r".attn.\1_bias"), *DINOV2_NAMES]
HF_DINOV3_NAMES = [
    (".qkv", ".qkv_proj"), (".attention.(q|v)[a-z]+_bias", r".attention.\1_proj.bias"),
    (".attention.out", ".attention.o_proj"), (r".scale(\d).gamma", r".layer_scale\1.lambda1"),
    (".mlp.(up|down)", r".mlp.\1_proj"), ("^patch", "patch_embeddings"),
    ("^class_token", "cls_token"), ("^registers", "register_tokens"),
    ("^(?=cls|reg|patch)", "embeddings."), ("^blocks", "layer")]
# Tensors of the files that no tower needs: of pretraining alone, computed here, or plain numbers.
UNUSED = ("mask_token|logit_scale|freqs_|periods|bias_mask|position_ids|_resolution|context_length|"
          "vocab_size")

# The first of these tensors that a file has tells its layout: family, names, and what its layers
# for queries, keys and values are called.
FUSED, APART = ("qkv",), ("q", "k", "v")
LAYOUTS = {
    "vision": {
        "register_tokens": ("dinov2", DINOV2_NAMES, FUSED),
        "visual.class_embedding": ("clip", CLIP_VISION_NAMES, FUSED),
        "visual.blocks.0.attn.inner_attn_ln.weight": ("eva", EVA_NAMES, APART),
        "storage_tokens": ("dinov3", DINOV3_NAMES, FUSED),
        "blocks.0.gamma_1": ("dinov3", TIMM_DINOV3_NAMES, FUSED),
        "layer.0.attention.q_proj.weight": ("dinov3", HF_DINOV3_NAMES, APART),
        "embeddings.register_tokens": ("dinov2", HF_DINOV2_NAMES, ("query", "key", "value")),
        "vision_model.embeddings.class_embedding": (
            "clip", HF_CLIP_NAMES + [("^(?!visual_)", "vision_model.")], APART)},
    "text": {
        "token_embedding.weight": ("clip text", CLIP_TEXT_NAMES, FUSED),
        "text.token_embedding.weight": ("eva text", CLIP_TEXT_NAMES + [("^", "text.")], FUSED),
        "text_model.embeddings.token_embedding.weight": (
            "clip text", [(r"^norm\.", "final_layer_norm."), *HF_CLIP_NAMES,
                          ("^(?!text_)", "text_model.")], APART)},
}


def load_vision(path, image_size=None, state=None):
    """A frozen vision tower from a published file; its tensors tell the family and the sizes.

    The families: DINOv2 with registers, DINOv3, CLIP, and EVA-02 as CLIP, as their authors
    published them; the first three also in Hugging Face's layout, the file or its folder, and
    DINOv3 in timm's. `tower(images)`, of images (B, 3, H, W), gives the final normed tokens
    (B, N, D). `image_size` (pixels) resizes the grid of positions once; without it, the grid is
    resized for every input. `state`: the tensors, if they were read. Raises WeightsError, naming
    the tensor, for anything missing, extra or misshapen; OSError if the file cannot be read;
    ValueError if the patch does not divide `image_size`.
    """
    def shape(size, depth, family):
        width, dino = size("patch.weight", 0), family in ("dinov2", "dinov3")
        return VisionShape(
            size("patch.weight", 3), width, depth, heads=width // 64,
            grid=0 if family == "dinov3" else max(1, math.isqrt(size("position", -2) - 1)),
            registers=size("registers", 1) if dino else 0,
            embed=0 if dino else size("projection.weight", 0), family=family)

    tower = load_tower("vision", path, state, ViT, shape)
    if image_size is not None:
        tower.resize(image_size)
    return tower


def load_text(path, state=None):
    """A frozen text tower, CLIP's or that of EVA-02 as CLIP; files as for `load_vision`.

    `tower(tokens (B, L))` gives `words` (B, L, D) and `sentence` (B, E). `state`, errors: as there.
    """
    def shape(size, depth, family):
        vocabulary, width = (size("embedding.weight", axis) for axis in (0, 1))
        return TextShape(width, depth, heads=width // 64, embed=size("projection", 1),
                         vocabulary=vocabulary, positions=size("position", 0), family=family)

    return load_tower("text", path, state, TextTransformer, shape)


def load_tower(kind, path, state, tower_class, shape):
    """A frozen tower in single precision from a file in one of LAYOUTS[kind].

    `shape(size, depth, family)` is its shape; `size(name, axis)` of a tensor by its name here.
    """
    state = read_file(weight_file(path)) if state is None else state
    mark = next((name for name in LAYOUTS[kind] if name in state), None)
    if mark is None:
        raise WeightsError(f"{path}: no {kind} tower of a known family, each of which has one of "
                           f"{', '.join(LAYOUTS[kind])}; found {list(state)[:4]}")
    family, names, qkv = LAYOUTS[kind][mark]
    # Files of CLIP and EVA-02 hold both towers; the names of vision tensors begin so.
    prefix = r"visual|vision_" if family in ("clip", "eva") else r"(?!visual|vision_)"
    state = {name: tensor for name, tensor in state.items()
             if re.match(prefix, name) and not re.search(UNUSED, name)}
    if family == "dinov3":
        separate_biases(state)
    for name in {"visual.proj", "text_projection.weight"} & state.keys():
        state[f"{name}.T"] = state.pop(name).t()        # stored as the transpose of ours
    blocks = renamed("blocks.", names)
    depth = len({name[len(blocks):].split(".")[0] for name in state if name.startswith(blocks)})

    def size(name, axis):       # 1 for a missing tensor, which `load_tensors` then names
        stored = renamed(name, names)
        return state[stored].shape[axis] if stored in state else 1

    with torch.device("meta"):
        tower = tower_class(shape(size, depth, family))
    tower.to_empty(device="cpu")
    expected = {}
    for name, tensor in tower.state_dict().items():
        words = qkv if ".qkv." in name else FUSED
        for word, rows in zip(words, tensor.chunk(len(words))):
            expected[renamed(name, names).replace("qkv", word)] = rows
    load_tensors(expected, state, path)
    return tower.requires_grad_(False)


def separate_biases(state):
    """Gives each of DINOv3's files separate biases for queries and values.

    Hugging Face's and timm's `qkvb` files have them. Meta's have one for queries, keys and values,
    and a mask that sets the keys' to zero. timm's others have none, as these biases are all zero.
    """
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        state[f"{name}.q"], _, state[f"{name}.v"] = state.pop(name).tensor_split(3)
    if "blocks.0.gamma_1" in state and not any(name.endswith("q_bias") for name in state):
        for name in [name for name in state if name.endswith("attn.qkv.weight")]:
            for bias in ("q_bias", "v_bias"):
                state[name.replace("qkv.weight", bias)] = torch.zeros(len(state[name]) // 3)


@torch.no_grad()
def load_tensors(expected, state, path, names=()):
    """Copies each tensor of `state` into the one of the same name in `expected`, a state_dict.

    `names` translates our names into those of the file. Axes of length one may be missing or extra.
    Raises WeightsError that names, in the file's words, the first tensor missing, unexpected or
    misshapen, and their count, or one with numbers that are not finite.
    """
    own = {renamed(name, names): tensor for name, tensor in expected.items()}
    for problem, found in (
            ("missing", [name for name in own if name not in state]),
            ("unexpected", [name for name in state if name not in own]),
            ("misshapen", [f"{name}, {tuple(state[name].shape)} in the file, "
                           f"{tuple(tensor.shape)} expected" for name, tensor in own.items()
                           if name in state and state[name].squeeze().shape
                           != tensor.squeeze().shape])):
        if found:
            raise WeightsError(f"{path}: {len(found)} tensor(s) {problem}, the first: {found[0]}")
    for name, tensor in own.items():
        if not tensor.copy_(state[name].view_as(tensor)).isfinite().all():
            raise WeightsError(f"{path}: {name} holds numbers not finite in {tensor.dtype}")


def weight_file(path):
    """`path`, or the weight file in it if it is a folder of Hugging Face's."""
    files = (os.path.join(path, name) for name in ("model.safetensors", "pytorch_model.bin"))
    return next(filter(os.path.isfile, files), path)


# Some programs save a figure as a number of numpy's.
NUMPY_NUMBERS = [*((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
                   for core in ("core", "_core")),
                 np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64))]


def read_file(path):
    """What torch.save wrote, or the tensors of a TorchScript archive or a .safetensors file.

    Runs no code of the file. Raises WeightsError for any other content, OSError if the file cannot
    be opened.
    """
    open(path, "rb").close()                        # any error after this is about the content
    try:
        if str(path).endswith(".safetensors"):
            import safetensors
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        program = b""                               # of a TorchScript archive
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():               # PyTorch does not look at the checksums
                    raise ValueError("a checksum is wrong")
                program = b"".join(archive.read(name) for name in archive.namelist()
                                   if "/code/" in name)
        if b"__setstate__" in program:              # it would run on loading
            raise ValueError("it holds code")
        with warnings.catch_warnings(action="ignore"):      # TorchScript's age, foreign pickles
            if program:
                return torch.jit.load(path, map_location="cpu").state_dict()
            with torch.serialization.safe_globals(NUMPY_NUMBERS):
                return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(f"{path}: to read it, pip install safetensors") from None
    except Exception as error:                      # each reader has other exceptions
        raise WeightsError(f"{path}: not a readable weight file: it is damaged, of another kind, "
                           f"or holds code, which is refused; delete it, fetch it again") from error


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(name, folder="pretrained"):
    """Fetches a file of PUBLISHED into a folder, unless it is there, and returns its path.

    Raises WeightsError, and leaves no file, if it is gated, cannot be fetched, or has another
    SHA-256.
    """
    published = PUBLISHED[name]
    target = os.path.join(folder, published.file)
    if not os.path.exists(target):
        if published.gated:
            raise WeightsError(f"{target}: no such file; ask for it at {published.address}")
        os.makedirs(folder, exist_ok=True)
        try:
            torch.hub.download_url_to_file(published.address, target, published.sha256)
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"{published.address}, fetched to {target}: {error}") from error
    return target


def main():
    parser = argparse.ArgumentParser(description="Fetch published weights into pretrained/.")
    parser.add_argument("command", choices=["download"])
    parser.add_argument("names", nargs="+", choices=PUBLISHED)
    for name in parser.parse_args().names:
        print(download(name))


# ---- Speed on CPUs --------------------------------------------------------------------------

# PyTorch's products call MKL, which uses half of each vector unit on AMD's CPUs. oneDNN's linear
# layer, which torch.compile uses, takes the whole. (Intel's CPUs with AVX-512 use it here, too;
# whether they gain was not measured.)
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

    Below 2^23 multiplications an autograd function in Python costs more than oneDNN saves.
    `F.linear` does autocast's casting, and has clear messages about sizes that do not fit.
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

    q (B, heads, N, C), k and v (B, heads, M, C), visible (B, 1, 1, M) or None. The backward by hand
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
            # Random numbers cost most, so each one of 64 bits serves four weights. That rounds the
            # share to a multiple of 2^-16, below 1.
            threshold = min(round(dropout * 2**16), 2**16 - 1)
            bits = torch.randint(-2**63, 2**63 - 1, (-(-weights.numel() // 4),))
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
        # A softmax's backward subtracts from each row the sum of its weights times their gradients.
        # That equals the sum over the channels of the output times its gradient.
        to_scores.sub_((gradient * out).sum(-1, keepdim=True)).mul_(weights)
        return to_scores @ k * scale, to_scores.transpose(-1, -2) @ q * scale, to_v, None, None


if __name__ == "__main__":
    try:
        main()
    except (WeightsError, OSError) as error:
        print(f"backbones.py: {error}", file=sys.stderr)
        sys.exit(2)
