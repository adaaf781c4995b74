"""Every trainable part that touches a frozen tower.

DCRIS (Xu et al., 2024): the text adapter adjusts the text tower a little. The DenseCross adapter
gives the vision tower what its pretraining did not: detail at several scales (convolutions on the
grid of patches) and language (attention to the words).

BarLeRIa (Wang et al., 2024): normalizing flows on the shortcuts of CLIP's two towers, tokens of
each tower that visit the other (`Intertwiner`), and a narrow network beside them that follows the
meaning of the whole sentence (`global_prior`, `GlobalShortcutTuning`).

The rest is what the papers compare with: ETRIS's bridges between the towers, then Compacter and
LoRA inside one tower at a time.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbones import Linear, MultiheadAttention, attend, linear

SCALE = 0.2         # of an adapter's output: from DETRIS, the DCRIS authors' program; in no paper


def normal_linears(module):
    """Initialises every linear layer: normal, std 0.02, zero bias. (The papers give no such rule.)

    It is the rule of the authors' programs for DenseCross adapters, ETRIS's bridges, BarLeRIa's
    intertwiner and global blocks. Where no BatchNorm follows, a first output is close to zero.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def kaiming_convolutions(module):
    """Initialises every convolution: Kaiming normal for ReLU, zero bias (DETRIS's rule)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def bottleneck(width, rank, out_width):
    """Down, ReLU, up: (..., width) to (..., out_width)."""
    return nn.Sequential(Linear(width, rank), nn.ReLU(), Linear(rank, out_width))


# ---- DCRIS ----------------------------------------------------------------------------------

class BottleneckAdapter(nn.Module):
    """x + scale * Up(ReLU(Down(x))), (B, N, width).

    With scale 0.2 this is DCRIS Eq. 3, on the MLP's shortcut of a text block. With scale 1 it is
    Houlsby et al. (2019), after a block's MLP, before LayerScale and skip connection. That paper
    adds another after the attention, and trains LayerNorms; DCRIS Table 2's count matches one.
    """

    def __init__(self, width, rank, scale):
        super().__init__()
        self.scale = scale
        self.down = Linear(width, rank)
        self.up = Linear(rank, width)
        # DETRIS has another text adapter (below); to start as the identity is our choice.
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x):
        return x + self.scale * self.up(self.down(x).relu())


def conv_bn_relu(channels, out_channels, kernel, dims):
    """A convolution that keeps the size. Unlike the head's: with bias, and eps 1e-3."""
    convolution, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
    return nn.Sequential(convolution(channels, out_channels, kernel, padding=kernel // 2),
                         norm(out_channels, eps=1e-3), nn.ReLU())


class DenseConvolutions(nn.Module):
    """The three branches of DCRIS Eq. 1. Each sees the input and the branches before it.

    Maps (B, rank, h, w) to the same shape: the branches have rank/2, rank/4 and rank/4 channels.
    A 1x1 convolution reduces to rank/16 channels before the 3x3 and the 5x5. With `dims` 1 the
    input is a sequence (B, rank, L).
    """

    def __init__(self, rank, dims=2):
        super().__init__()
        half, quarter, thin = rank // 2, rank // 4, rank // 16
        self.branch1 = conv_bn_relu(rank, half, 1, dims)
        self.branch2 = nn.Sequential(
            conv_bn_relu(rank + half, thin, 1, dims), conv_bn_relu(thin, quarter, 3, dims))
        self.branch3 = nn.Sequential(
            conv_bn_relu(rank + half + quarter, thin, 1, dims),
            conv_bn_relu(thin, quarter, 5, dims))

    def forward(self, x):
        x1 = self.branch1(x)                                # (B, rank/2, h, w)
        x2 = self.branch2(torch.cat([x, x1], 1))            # (B, rank/4, h, w)
        x3 = self.branch3(torch.cat([x, x1, x2], 1))        # (B, rank/4, h, w)
        return torch.cat([x1, x2, x3], 1)                   # (B, rank, h, w)


class DenseTextAdapter(nn.Module):
    """The text adapter of DETRIS: convolutions over the words.

    With h = ReLU(Down(x)), a word becomes x + 0.2 Up([b1, b2, b3] + h). The branches b are those of
    Eq. 1 in one dimension. Unlike CLIP's attention they also see later words, and padding. The
    first token skips the branches and becomes x + 0.2 Up(2 h). `rank` is a multiple of 16. Layers
    start as PyTorch initialises them, as in that program.
    """

    def __init__(self, width, rank):
        super().__init__()
        self.down = Linear(width, rank)
        self.dense = DenseConvolutions(rank, dims=1)
        self.up = Linear(rank, width)

    def forward(self, x):
        hidden = self.down(x).relu()                                    # (B, L, rank)
        branches = self.dense(hidden[:, 1:].transpose(1, 2)).transpose(1, 2)
        return x + SCALE * self.up(torch.cat([hidden[:, :1], branches], dim=1) + hidden)


class CrossAttention(nn.Module):
    """The attention of DCRIS Eq. 2: patches (B, N, rank) read the words (B, L, text_width).

    Both are first projected to `width`. No padding mask, as in the authors' program.
    """

    def __init__(self, rank, text_width, dropout, width=128, heads=8):
        super().__init__()
        self.query = Linear(rank, width)
        self.words = Linear(text_width, width)
        self.attention = MultiheadAttention(width, heads, dropout)
        self.back = Linear(width, rank)

    def forward(self, patches, words):
        words = self.words(words)
        return self.back(self.attention(self.query(patches), words, words))


class DenseCrossAdapter(nn.Module):
    """DCRIS Eq. 1-2, beside the MLP of a vision block.

        F_v = ReLU(Down(x))                                     (B, N, rank)
        F_dense = [b1, b2, b3] + F_v                            Eq. 1; b: `DenseConvolutions`
        y = 0.2 Up(CrossAttention(F_dense, words) + F_v)        Eq. 2; (B, N, width)

    x (B, N, width) are the block's normed tokens, words (B, L, text_width) the text tower's final
    ones; y is added to the MLP's output, before LayerScale. The last tokens are `grid`'s patches.
    Class and register tokens have no place on it. They skip branches and cross-attention, so Up
    reads 2 F_v (as in the authors' program; the paper does not say). `rank` is a multiple of 16.
    """

    def __init__(self, width, rank, text_width, dropout):
        super().__init__()
        self.down = Linear(width, rank)
        self.dense = DenseConvolutions(rank)
        self.cross = CrossAttention(rank, text_width, dropout)
        self.up = Linear(rank, width)
        kaiming_convolutions(self)
        normal_linears(self)                # the attention's in-projection keeps PyTorch's Xavier

    def forward(self, x, words, grid):
        rows, columns = grid
        x = self.down(x).relu()                                         # F_v, (B, N, rank)
        others, patches = x.split([x.shape[1] - rows * columns, rows * columns], dim=1)
        patches = patches.transpose(1, 2).unflatten(2, grid)            # (B, rank, rows, columns)
        dense = self.dense(patches) + patches                           # Eq. 1
        cross = self.cross(dense.flatten(2).transpose(1, 2), words)     # (B, rows*columns, rank)
        return SCALE * self.up(torch.cat([others, cross], dim=1) + x)   # Eq. 2


# ---- BarLeRIa -------------------------------------------------------------------------------

class NormalizingFlow(nn.Module):
    """BarLeRIa Eq. 1, on a shortcut: an affine map, planar flows (Rezende and Mohamed, 2015).

        z_0 = mu + exp(log_sigma) * x,      z_j = z_{j-1} + scale_j * tanh(w_j . z_{j-1} + b_j)

    for every token x of (B, N, width). scale, w and b are the paper's lambda, gamma and beta. The
    paper prints no affine map and a vector beta; its count of 0.18 million matches the map and a
    scalar. It says elementwise product; the authors' program takes the inner product, as the
    transposed gamma suggests. A flow starts close to the identity. It may stop being invertible
    (w_j . scale_j < -1). The loss has no log-Jacobian (appendix A.2).
    """

    def __init__(self, width, steps):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(width))
        self.log_sigma = nn.Parameter(torch.zeros(width))
        self.w, self.scale = (nn.Parameter(torch.empty(steps, width)) for _ in range(2))
        self.b = nn.Parameter(torch.empty(steps))
        for parameter in (self.w, self.scale, self.b):
            nn.init.uniform_(parameter, -0.01, 0.01)

    def forward(self, x):
        z = self.mu + self.log_sigma.exp() * x                  # z_0, (B, N, width)
        # w_j . z_{j-1} is w_j . z_0 plus (w_j . scale_i) tanh_i for each i < j. So the inner
        # products are one product, and the sum of all steps is another.
        heights = z @ self.w.t() + self.b                       # w_j . z_0 + b_j, (B, N, steps)
        passed_on, bends = self.w @ self.scale.t(), []          # w_i . scale_j at [i, j]
        for j in range(len(self.w)):
            bends.append(heights[..., j].tanh())
            heights = heights + bends[j][..., None] * passed_on[:, j]
        return z + torch.stack(bends, dim=-1) @ self.scale


class Intertwiner(nn.Module):
    """The projections of BarLeRIa Eq. 2-3: tokens of one tower at the other's width.

        [class, _, image] = vision block([class, P(words), image])      Eq. 2
        [_, words] = text block([P'(class), words])                     Eq. 3; _: removed again

    Words (B, L, text_width), class token (B, 1, vision_width). All layers share P and P'. The paper
    writes one matrix, W_proj; its count of 0.39 million matches P and P' as two bottlenecks.
    """

    def __init__(self, vision_width, text_width, rank):
        super().__init__()
        self.words = bottleneck(text_width, rank, vision_width)
        self.class_token = bottleneck(vision_width, rank, text_width)
        normal_linears(self)

    def forward(self, words, class_token):
        return self.words(words), self.class_token(class_token)


def global_prior(words, patches, padding):
    """BarLeRIa Eq. 4: tokens dissimilar to the expression are scaled towards zero.

        p = max(0, cos(t, m)) t      for every token t of words and patches; max: their program's

    m is the mean of the expression's tokens, start and end tokens too. (The paper does not say how
    it combines the words.) Words (B, L, E) and patches (B, N, E) are in CLIP's common space;
    padding (B, L) is True where there is no word. Returns (B, L + N, E), detached.
    """
    words, patches = words.detach(), patches.detach()
    real = ~padding[..., None]
    mean = (words * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)          # (B, 1, E)
    tokens = torch.cat([words, patches], dim=1)
    return F.cosine_similarity(tokens, mean, dim=-1).clamp(min=0)[..., None] * tokens


class GlobalBlock(nn.Module):
    """A pre-norm transformer block whose attention also mixes the global prior, BarLeRIa Eq. 6.

    x and prior p_i: (B, N, width). The values are LN(x) W_v + p_i W_p (the paper prints I W_p, and
    says that p is projected).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.prior = Linear(width, width, bias=False)        # W_p
        self.out = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, x, prior):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(attend(q, k, v + self.prior(prior), self.heads))
        return x + self.mlp(self.norm2(x))


class GlobalShortcutTuning(nn.Module):
    """BarLeRIa Eq. 5-8: a narrow transformer beside the towers, steered by the global prior.

        [queries, words, image] = block_i([queries, words, image], p_i)     Eq. 5 (i = 1), Eq. 7
        image = resized(image) + Linear(LN(stage_i))                        Eq. 8

    The image tokens come from its own patch layer. A stage is the vision tower's patches after some
    block. Stages (section 2.4) and prior (our choice) are detached: the gradient reaches the towers
    through the words alone.

    The queries are learned tokens that the others read; only the image tokens leave the network.
    Our choice where the paper is silent: the sum of Eq. 8 goes on into the next block; all stages
    share one LayerNorm and linear layer; queries have no prior; padding counts as words do.
    """

    def __init__(self, vision_width, text_width, embed, out_width, width, heads, blocks, queries,
                 rank, patch, side):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, queries, width))
        self.words = bottleneck(text_width, rank, width)
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, side * side, width))
        self.side = side
        self.priors = nn.ModuleList(Linear(embed, width) for _ in range(blocks))
        self.blocks = nn.ModuleList(GlobalBlock(width, heads) for _ in range(blocks))
        self.stage = nn.Sequential(nn.LayerNorm(vision_width), Linear(vision_width, width))
        self.out = Linear(width, out_width)
        normal_linears(self)
        for parameter in (self.queries, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images, words, prior, stages, grid):
        """Images (B, 3, S, S), words (B, L, text_width), prior (B, L + h*w, embed), for each block
        a stage (B, h*w, vision_width), and the grid (h, w), to F_out^M (B, out_width, h, w)."""
        x = self.patch(images)
        image_grid = x.shape[-2:]                   # this network's own, until Eq. 8
        image = x.flatten(2).transpose(1, 2)
        image = image + resized(self.position, (self.side, self.side), image_grid)
        others = torch.cat([self.queries.expand(len(images), -1, -1), self.words(words)], dim=1)
        prior_words, prior_patches = prior.split([words.shape[1], stages[0].shape[1]], dim=1)
        for project, block, stage in zip(self.priors, self.blocks, stages, strict=True):
            p = project(torch.cat([prior_words, resized(prior_patches, grid, image_grid)], dim=1))
            p = F.pad(p, (0, 0, self.queries.shape[1], 0))      # zero for the queries
            x = block(torch.cat([others, image], dim=1), p)                         # Eq. 5, 7
            others, image = x.split([others.shape[1], image.shape[1]], dim=1)
            image = resized(image, image_grid, grid) + self.stage(stage.detach())   # Eq. 8
            image_grid = grid
        return self.out(image).transpose(1, 2).unflatten(2, grid)


def resized(tokens, grid, new_grid):
    """Tokens (B, h*w, C) of one grid (h, w) to those of another, bilinearly."""
    if tuple(grid) == tuple(new_grid):
        return tokens
    x = F.interpolate(tokens.transpose(1, 2).unflatten(2, grid), new_grid, mode="bilinear")
    return x.flatten(2).transpose(1, 2)


# ---- ETRIS ----------------------------------------------------------------------------------

def pointwise_bn_relu(width, out_width, std):
    """A 1x1 convolution of patches (B, width, N); no bias, and weights that start with this std."""
    convolution = nn.Conv1d(width, out_width, 1, bias=False)
    nn.init.normal_(convolution.weight, std=std)
    return nn.Sequential(convolution, nn.BatchNorm1d(out_width), nn.ReLU())


class Bridge(nn.Module):
    """One stage of ETRIS's Bridger (Xu et al., 2023): patches and words read each other.

    Both are reduced to `width` channels. From the second stage on, the reduced tokens of the stage
    before are added, then a LayerNorm follows. Each side attends to the other and is multiplied by
    what it read. The product is widened and added to the tower's tokens.

    ETRIS writes one 1x1 convolution of each stage as a transposed one: on the way down in the last
    stage, else on the way up. For it PyTorch swaps fan-in and fan-out, so both convolutions of a
    stage start with the same std (Kaiming normal, fan-out).
    """

    def __init__(self, vision_width, text_width, width, heads, first_stage, last_stage):
        super().__init__()
        std = (2 / (vision_width if last_stage else width)) ** 0.5
        self.patches_down = pointwise_bn_relu(vision_width, width, std)
        self.words_down = Linear(text_width, width)
        if not first_stage:
            self.patches_norm, self.words_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches_read = MultiheadAttention(width, heads)
        self.words_read = MultiheadAttention(width, heads)
        self.patches_up = pointwise_bn_relu(width, vision_width, std)
        self.words_up = Linear(width, text_width)
        normal_linears(self)

    def forward(self, patches, words, before=None):
        """Patches (B, N, vision_width) and words (B, L, text_width), bridged.

        Also returns the reduced tokens, (B, N, width) and (B, L, width); `before` is that pair of
        the stage before.
        """
        v = self.patches_down(patches.transpose(1, 2)).transpose(1, 2)
        t = self.words_down(words)
        if before is not None:
            v, t = self.patches_norm(v + before[0]), self.words_norm(t + before[1])
        found = v * self.patches_read(v, t, t)                  # patches times what they read
        patches = patches + self.patches_up(found.transpose(1, 2)).transpose(1, 2)
        words = words + self.words_up(t * self.words_read(t, v, v))
        return patches, words, (v, t)


# ---- Tuners of one tower at a time ----------------------------------------------------------

class KroneckerLinear(nn.Module):
    """A linear layer whose weight is the sum over i of A_i (x) B_i: 1/n of the parameters.

    (..., width) to (..., out_width), both multiples of n. All layers of a model share the small
    matrices A_i, `factors` (n, n, n), of variance 1/n. B_i starts so that the weight has He et
    al.'s variance, 2 / width.
    """

    def __init__(self, width, out_width, factors):
        super().__init__()
        n = len(factors)
        self.factors = (factors,)       # in a tuple, so that the parameter stays the model's alone
        self.b = nn.Parameter(torch.randn(n, out_width // n, width // n) * (2 / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x):
        products = torch.einsum("iab,icd->acbd", self.factors[0], self.b)
        return linear(x, products.flatten(2).flatten(0, 1), self.bias)      # (out_width, width)


class CompacterAdapter(nn.Module):
    """Compacter (Karimi Mahabadi et al., 2021), after a block's MLP: (B, N, width) to the same.

    A Houlsby adapter of Kronecker-factored layers, one for each block as in that paper's
    Compacter++. The B_i are full matrices, as in its PHM-adapter: B_i of rank 1 would need a
    bottleneck 21,860 wide for the 1.62 million of DCRIS Table 2.
    """

    def __init__(self, width, rank, factors):
        super().__init__()
        self.down = KroneckerLinear(width, rank, factors)
        self.up = KroneckerLinear(rank, width, factors)
        nn.init.zeros_(self.up.b)

    def forward(self, x):
        return x + self.up(self.down(x).relu())


class LoRA(nn.Module):
    """Hu et al. (2021): a frozen linear layer, and beside it Up(Down(x)) without a ReLU.

    (B, N, in_features) to (B, N, out_features). Where one layer computes several `parts` (query,
    key and value), each has its own pair. That paper's factor alpha / rank is 1. Up starts at zero.
    """

    def __init__(self, frozen, rank, parts=1):
        super().__init__()
        self.frozen = frozen
        self.down = nn.Parameter(torch.randn(parts, rank, frozen.in_features)
                                 * frozen.in_features ** -0.5)
        self.up = nn.Parameter(torch.zeros(parts, frozen.out_features // parts, rank))

    def forward(self, x):
        low = linear(x, self.down.flatten(0, 1)).unflatten(-1, self.down.shape[:2])
        return self.frozen(x) + torch.einsum("bnpr,por->bnpo", low, self.up).flatten(2)
