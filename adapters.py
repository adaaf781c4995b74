"""Every trainable part that touches a frozen tower.

DCRIS (Xu et al., 2024) trains two of them. The text adapter bends the text tower a little; the
DenseCross adapter brings into the vision tower what its pretraining lacked: detail at several
scales (convolutions on the grid of patches) and language (attention to the words).

BarLeRIa (Wang et al., 2024) adapts CLIP's two towers with normalizing flows on their shortcuts,
lets each tower's tokens visit the other (`Intertwiner`), and runs a narrow network beside them that
holds on to what the sentence as a whole is about (`global_prior`, `GlobalShortcutTuning`).

Below them stands what both papers compare with: ETRIS's bridges between the towers, and adapters,
Kronecker-factored adapters and low-rank products inside one tower at a time.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbones import Linear, MultiheadAttention, attend, linear

SCALE = 0.2         # of an adapter's output, as in the authors' program


# ---------------------------------------------------------------------------------------------
# Initialisation: one function for each rule. The papers do not describe it; the rules were found by
# building the authors' models and measuring their weights.
# ---------------------------------------------------------------------------------------------

def truncated_normal_linears(module):
    """Truncated normal, std 0.02, zero bias: every linear layer of a vision transformer.

    DINOv2's and timm's initialisation. In the DETRIS program it also runs over the DenseCross
    adapters, which are inside the blocks by then, so an adapter's output is close to zero at first.
    """
    for layer in layers_of(module, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        zero_bias(layer)


def normal_linears(module):
    """Normal, std 0.02, zero bias: every linear layer of BarLeRIa's intertwiner and ETRIS."""
    for layer in layers_of(module, nn.Linear):
        nn.init.normal_(layer.weight, std=0.02)
        zero_bias(layer)


def kaiming_convolutions(module):
    """Kaiming normal for ReLU (by fan-in), zero bias: convolutions of the DenseCross adapter."""
    for layer in layers_of(module, (nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        zero_bias(layer)


def zero_up(down, up):
    """Down: Kaiming normal. Up and all biases: zero. So the adapter starts as the identity.

    For the plain adapters of DCRIS Eq. 3 and Houlsby. No program of the authors' has them, so this
    choice is ours.
    """
    nn.init.kaiming_normal_(down.weight, nonlinearity="relu")
    nn.init.zeros_(up.weight)
    zero_bias(down)
    zero_bias(up)


def layers_of(module, kind):
    return (layer for layer in module.modules() if isinstance(layer, kind))


def zero_bias(layer):
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------
# DCRIS
# ---------------------------------------------------------------------------------------------

class BottleneckAdapter(nn.Module):
    """x + scale * Up(ReLU(Down(x))), (B, N, width); starts as the identity (`zero_up`).

    DCRIS Eq. 3 on the MLP's shortcut of a text block, with a scale of 0.2. And Houlsby et al.
    (2019), with a scale of 1, behind the MLP of a block, in front of its LayerScale and skip
    connection. That paper has a second one behind the attention and trains the LayerNorms, too; the
    1.98 million of DCRIS Table 2 are met by one.
    """

    def __init__(self, width, rank, scale):
        super().__init__()
        self.scale = scale
        self.down = Linear(width, rank)
        self.up = Linear(rank, width)
        zero_up(self.down, self.up)

    def forward(self, x):
        return x + self.scale * self.up(self.down(x).relu())


def conv_bn_relu(channels, out_channels, kernel, dims):
    """A convolution that keeps the size, with bias, and eps 1e-3, both unlike the head's."""
    convolution, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
    return nn.Sequential(convolution(channels, out_channels, kernel, padding=kernel // 2),
                         norm(out_channels, eps=1e-3), nn.ReLU())


class DenseConvolutions(nn.Module):
    """The three branches of DCRIS Eq. 1: convolutions, each fed by the input and all before it.

    The 3x3 and the 5x5 branch are squeezed to rank/16 channels first. Maps (B, rank, h, w) to the
    same shape: the branches have rank/2 + rank/4 + rank/4 channels. With `dims` 1 they are
    sequences (B, rank, L).
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
    """The text adapter of DETRIS, the DCRIS authors' later program: convolutions over the words.

    With h = ReLU(Down(x)), a word's output is Up([b1, b2, b3] + h): the branches of Eq. 1 in one
    dimension and their input, added once. (In a DenseCross adapter it is added twice, in Eq. 1 and
    in Eq. 2.) The first token skips the branches and gives Up(2 h). `rank` must be a multiple of
    16. All layers start with PyTorch's own initialisation, as in that program.
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
    """The attention of DCRIS Eq. 2: patches (B, N, rank) ask the words (B, L, text_width).

    Keys and values are made of one projection of the words. No padding mask, as in the authors'
    program.
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

    Takes the block's normed tokens (B, N, width), the text tower's final words (B, L, text_width)
    and the grid (rows, columns) of the last rows*columns tokens; returns what is added to the MLP's
    output, (B, N, width), already times 0.2. `rank` must be a multiple of 16.

    Class and register tokens have no place on the grid and skip convolutions and attention. The
    paper is silent on them; in the authors' program their branch hands on its input F_v, and the
    residual of Eq. 2 then doubles it.
    """

    def __init__(self, width, rank, text_width, dropout):
        super().__init__()
        self.down = Linear(width, rank)
        self.dense = DenseConvolutions(rank)
        self.cross = CrossAttention(rank, text_width, dropout)
        self.up = Linear(rank, width)
        kaiming_convolutions(self)
        truncated_normal_linears(self)      # the attention's in-projection keeps PyTorch's Xavier

    def forward(self, x, words, grid):
        rows, columns = grid
        x = self.down(x).relu()                                         # F_v, (B, N, rank)
        others, patches = x.split([x.shape[1] - rows * columns, rows * columns], dim=1)
        patches = patches.transpose(1, 2).unflatten(2, grid)            # (B, rank, rows, columns)
        dense = self.dense(patches) + patches                           # Eq. 1
        cross = self.cross(dense.flatten(2).transpose(1, 2), words)     # (B, rows*columns, rank)
        return SCALE * self.up(torch.cat([others, cross], dim=1) + x)   # Eq. 2


# ---------------------------------------------------------------------------------------------
# BarLeRIa
# ---------------------------------------------------------------------------------------------

class NormalizingFlow(nn.Module):
    """BarLeRIa Eq. 1, on a block's shortcut: an affine map, then `steps` planar flows.

        z_0 = mu + exp(log_sigma) * x,      z_j = z_{j-1} + scale_j * tanh(w_j . z_{j-1} + b_j)

    for every token x of (B, N, width). scale, w and b are the paper's lambda, gamma and beta. It
    prints no affine map and a vector beta; the 0.18 million parameters of its table are met with
    the map and a scalar. It says elementwise product; the authors' program takes the inner one, as
    the transposed gamma suggests. Starts next to the identity (all zero: exactly the identity).
    There it is invertible; nothing enforces w_j . scale_j >= -1 later. No log-Jacobian enters the
    loss (appendix A.2).
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
        z = self.mu + self.log_sigma.exp() * x
        for w, scale, b in zip(self.w, self.scale, self.b):
            z = z + scale * torch.tanh(z @ w + b)[..., None]
        return z


def bottleneck(width, rank, out_width):
    """Down - ReLU - Up."""
    return nn.Sequential(Linear(width, rank), nn.ReLU(), Linear(rank, out_width))


class Intertwiner(nn.Module):
    """The projections of BarLeRIa Eq. 2-3, by which each tower's tokens visit the other.

    Words (B, L, text_width) become guests of the vision tower, the class token
    (B, 1, vision_width) a guest of the text tower. One pair serves all layers. The paper writes
    W_proj, one matrix; the 0.39 million parameters of its table are met with two narrow layers.
    """

    def __init__(self, vision_width, text_width, rank):
        super().__init__()
        self.words = bottleneck(text_width, rank, vision_width)
        self.class_token = bottleneck(vision_width, rank, text_width)
        normal_linears(self)

    def forward(self, words, class_token):
        return self.words(words), self.class_token(class_token)


def global_prior(words, patches, padding):
    """BarLeRIa Eq. 4: every token, weighted by its likeness to the expression. No parameters.

    Words (B, L, E) and patches (B, N, E) are in CLIP's common space, padding (B, L) is True where
    there is no word. Returns (B, L + N, E). The weight is the cosine similarity to the mean of the
    expression's tokens, both ends included, negatives set to 0; the paper leaves open how one
    number comes from F_l's many words. Without gradient, so that the prior does not pull on the
    towers.
    """
    words, patches = words.detach(), patches.detach()
    real = ~padding[..., None]
    meaning = (words * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)       # (B, 1, E)
    tokens = torch.cat([words, patches], dim=1)
    return F.cosine_similarity(tokens, meaning, dim=-1).clamp(min=0)[..., None] * tokens


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

    Its tokens are [queries, words, image]. The image's have a patch layer and a grid of positions
    of their own; what the patch leaves over at the right and lower edge is not seen. After each
    block they take in those of one stage of the vision tower, without gradient (section 2.4): of
    the towers' outputs, only the words get this network's gradient.

    Left open by the paper, and here: the sum of Eq. 8 goes on into the next block; one LayerNorm
    and linear layer brings all stages to this width; queries have no prior; padding takes part like
    words.
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
        truncated_normal_linears(self)
        for parameter in (self.queries, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images, words, prior, stages, grid):
        """Images (B, 3, S, S), words (B, L, text_width) and prior (B, L + h*w, embed) to F_out^M
        (B, out_width, h, w).

        `stages` are the vision tower's patch tokens (B, h*w, vision_width) on the grid (h, w), one
        a block.
        """
        x = self.patch(images)
        image_grid = x.shape[-2:]                   # this network's, until Eq. 8
        image = x.flatten(2).transpose(1, 2)
        image = image + resized(self.position, (self.side, self.side), image_grid)
        others = torch.cat([self.queries.expand(len(images), -1, -1), self.words(words)], dim=1)
        prior_words, prior_patches = prior.split([words.shape[1], stages[0].shape[1]], dim=1)
        for project, block, stage in zip(self.priors, self.blocks, stages, strict=True):
            p = project(torch.cat([prior_words, resized(prior_patches, grid, image_grid)], dim=1))
            p = F.pad(p, (0, 0, self.queries.shape[1], 0))      # queries have none
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


# ---------------------------------------------------------------------------------------------
# ETRIS
# ---------------------------------------------------------------------------------------------

class GatedCrossAttention(nn.Module):
    """Tokens x (B, N, width) times what they find in the other tower's (B, M, width), in x's
    shape."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = MultiheadAttention(width, heads)

    def forward(self, x, other):
        return x * self.attention(x, other, other)


def pointwise_bn_relu(width, out_width, std):
    """A 1x1 convolution of patches (B, width, N), without bias; batch normalisation, ReLU.

    The weights start from a normal distribution with standard deviation `std`.
    """
    convolution = nn.Conv1d(width, out_width, 1, bias=False)
    nn.init.normal_(convolution.weight, std=std)
    return nn.Sequential(convolution, nn.BatchNorm1d(out_width), nn.ReLU())


class Bridge(nn.Module):
    """One stage of ETRIS's Bridger (Xu et al., 2023): patches and words look at each other.

    Both come down to `width` channels, are joined with what entered the stage before (but for the
    first), look at each other, go back up and are added.

    ETRIS transposes one convolution a stage: on the way down in the last stage, on the way up in
    the others. With a 1x1 kernel that is the same layer with its weight transposed, but PyTorch
    swaps its fan-in and fan-out. So both convolutions of a stage start (Kaiming) with one fan-out:
    `vision_width` in the last stage, `width` in the others.
    """

    def __init__(self, vision_width, text_width, width, heads, first_stage, last_stage):
        super().__init__()
        std = (2 / (vision_width if last_stage else width)) ** 0.5
        self.patches_down = pointwise_bn_relu(vision_width, width, std)
        self.words_down = Linear(text_width, width)
        if not first_stage:
            self.patches_norm, self.words_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches_read = GatedCrossAttention(width, heads)
        self.words_read = GatedCrossAttention(width, heads)
        self.patches_up = pointwise_bn_relu(width, vision_width, std)
        self.words_up = Linear(width, text_width)
        normal_linears(self)

    def forward(self, patches, words, before=None):
        """Patches (B, N, vision_width) and words (B, L, text_width), bridged.

        And the narrow pair, (B, N, width) and (B, L, width), that this stage's attention took in;
        `before` is that pair of the stage before, None at the first.
        """
        v = self.patches_down(patches.transpose(1, 2)).transpose(1, 2)
        t = self.words_down(words)
        if before is not None:
            v, t = self.patches_norm(v + before[0]), self.words_norm(t + before[1])
        found = self.patches_up(self.patches_read(v, t).transpose(1, 2)).transpose(1, 2)
        return patches + found, words + self.words_up(self.words_read(t, v)), (v, t)


# ---------------------------------------------------------------------------------------------
# Tuners of one tower at a time
# ---------------------------------------------------------------------------------------------

class KroneckerFactors(nn.Module):
    """The small matrices A_i, (n, n, n), that all of a model's Compacter adapters share."""

    def __init__(self, n=4):
        super().__init__()
        self.a = nn.Parameter(torch.randn(n, n, n) * n ** -0.5)


class KroneckerLinear(nn.Module):
    """A linear layer whose weight is the sum over i of A_i (x) B_i: 1/n of the numbers.

    (..., width) to (..., out_width), both multiples of n. A_i and B_i start so that the weight has
    He et al.'s variance, 2 / width.
    """

    def __init__(self, width, out_width, factors):
        super().__init__()
        n = len(factors.a)
        self.factors = (factors,)       # in a tuple: they are the model's, not this layer's
        self.b = nn.Parameter(torch.randn(n, out_width // n, width // n) * (2 / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_width))

    def full_weight(self):
        products = torch.einsum("iab,icd->acbd", self.factors[0].a, self.b)
        return products.flatten(2).flatten(0, 1)                            # (out_width, width)

    def forward(self, x):
        return linear(x, self.full_weight(), self.bias)


class CompacterAdapter(nn.Module):
    """Compacter (Karimi Mahabadi et al., 2021), behind a block's MLP: (B, N, width) to the same.

    A Houlsby adapter of Kronecker-factored layers, one a block as in that paper's Compacter++. The
    B_i are full matrices, as in its PHM-adapter: were they of rank 1, the 1.62 million of DCRIS
    Table 2 would take a bottleneck 21,860 wide.
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

    (B, N, in_features) to (B, N, out_features). Where one layer stands for several `parts` (query,
    key and value), each has a pair of its own. That paper's constant factor alpha / rank is 1.
    Starts as the frozen layer: Up is zero.
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

    def merged(self):
        """The one linear layer that does the same: nothing is left to pay when it is used."""
        layer = Linear(self.frozen.in_features, self.frozen.out_features,
                       self.frozen.bias is not None).to(self.frozen.weight)
        layer.load_state_dict(self.frozen.state_dict())
        with torch.no_grad():
            layer.weight += (self.up @ self.down).flatten(0, 1)
        return layer
