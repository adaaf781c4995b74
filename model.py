"""Four methods that join two towers, adapters and a head; presets; saving and loading.

    python model.py             the presets and their parameters, beside the papers' figures
    python model.py --json      the same for programs
    python model.py export runs/dcris-b/best.pt tuned.safetensors

`build(name)` makes a model, `load(path)` reads a checkpoint. A model maps images (B, 3, S, S),
normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P) for patches of P pixels.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import backbones
from adapters import (SCALE, BottleneckAdapter, Bridge, CompacterAdapter, DenseCrossAdapter,
                      DenseTextAdapter, GlobalShortcutTuning, Intertwiner, LoRA, NormalizingFlow,
                      global_prior)
from backbones import PUBLISHED, TEXT, VISION, Attached, WeightsError, after_end, sha256
from head import Head

PRETRAINED = Path("pretrained")


class ConfigError(ValueError):
    """A configuration that cannot be built; the message says which field, and why."""


@dataclass(frozen=True)
class Config:
    """Everything that distinguishes one training run of a model from another."""
    # what is built
    method: str = "dcris"
    vision: str = "dinov2-b"            # a name in VISION
    text: str = "clip-b"                # a name in TEXT
    train_towers: bool = False          # the towers learn, too, instead of staying frozen
    train_positions: bool = False       # CLIP's position embeddings learn, even in frozen towers
    image_size: int = 448               # side of the letterboxed photo, pixels
    length: int = 17                    # tokens per expression, both ends included
    # DCRIS
    visual_adapter_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)    # blocks count from 0
    visual_adapter_rank: int = 128
    text_adapter_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    text_adapter_rank: int = 64
    text_convolutions: bool = False     # DETRIS: convolutions in the text adapters, too
    legacy_position_resize: bool = False    # DETRIS: DINOv2's positions as at its first release
    # BarLeRIa
    visual_flows: bool = True           # normalizing flows on the shortcuts of the vision tower
    text_flows: bool = True             # and of the text tower
    flow_steps: int = 4                 # planar flows in each
    intertwined: bool = True            # words visit the vision tower, its class token the text
    intertwined_rank: int = 32          # of their projections, and of the global branch's for words
    global_blocks: int = 4              # of global shortcut tuning; 0: none of it
    global_width: int = 144
    global_heads: int = 3
    global_queries: int = 128
    global_patch: int = 16              # pixels
    # ETRIS
    bridges: int = 3                    # stages of the Bridger, spread over the towers
    bridge_width: int = 128
    bridge_heads: int = 8
    # Houlsby, Compacter, LoRA
    tuner_rank: int = 64
    # the head
    features: tuple[int, ...] = (4, 8)  # blocks whose output the head sees, besides the last's
    head_width: int = 512
    head_heads: int = 8
    head_layers: int = 3                # of the decoder
    dropout: float = 0.1                # of the decoder and the DenseCross adapters
    # how it is trained
    batch_size: int = 32                # over all processes together
    lr: float = 1e-4
    epochs: int = 50
    milestones: tuple[int, ...] = (35,)     # after each of these epochs the rate is a tenth

    @property
    def towers_learn(self):
        return self.train_towers or self.method == "full"


class DCRIS(nn.Module):
    """DCRIS (Xu et al., 2024, Figure 1): first the text, then the image, which reads the words.

    Frozen DINOv2 with DenseCross adapters, frozen CLIP text tower with text adapters, and the head.
    """

    def __init__(self, config, vision, text):
        super().__init__()
        self.config, self.vision, self.text = config, vision, text
        adapter = DenseTextAdapter if config.text_convolutions else partial(
            BottleneckAdapter, scale=SCALE)
        self.text_adapters = nn.ModuleDict({
            str(i): adapter(text.shape.width, config.text_adapter_rank)
            for i in config.text_adapter_layers})
        self.dense_cross_adapters = nn.ModuleDict({
            str(i): DenseCrossAdapter(vision.shape.width, config.visual_adapter_rank,
                                      text.shape.width, config.dropout)
            for i in config.visual_adapter_layers})
        self.head = make_head(config, text, 3 * [vision.shape.width], residual=True)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        words, sentence = self.text_branch(tokens)
        features = self.image_branch(images, words)
        return self.head(features, words, sentence, after_end(tokens))

    def text_branch(self, tokens):
        """Token ids (B, L) to words f_t (B, L, D) and sentence f_s (B, E)."""
        x = self.text.embed(tokens)
        attached = {int(i): Attached(mlp_shortcut=adapter)
                    for i, adapter in self.text_adapters.items()}
        for i, block in enumerate(self.text.blocks):
            x = block(x, attached.get(i, Attached()))
        return self.text.final(x, tokens)

    def image_branch(self, images, words):
        """Images and words to the three maps f_v (B, D, S/P, S/P)."""
        grid = self.vision.grid(images)
        attached = {int(i): Attached(beside_mlp=partial(adapter, words=words, grid=grid))
                    for i, adapter in self.dense_cross_adapters.items()}
        return feature_maps(self.vision, images, self.config.features, attached)


def make_head(config, text, widths, residual):
    """The head for maps of these three widths. Only DCRIS's neck has a residual."""
    return Head(widths, text.shape.width, text.shape.embed, config.head_width, config.head_heads,
                config.head_layers, config.dropout, residual)


def feature_maps(vision, images, wanted, attached):
    """Images to the maps (B, D, S/P, S/P) after the blocks `wanted` and after the final norm.

    `attached`: number of a block -> what a tuning method attaches to it.
    """
    grid = vision.grid(images)
    x, rotary = vision.embed(images), vision.rotary_tables(grid)
    maps = []
    for i, block in enumerate(vision.blocks):
        x = block(x, attached.get(i, Attached()), rotary)
        if i in wanted:
            maps.append(vision.as_map(x, grid))
    return [*maps, vision.as_map(vision.norm(x), grid)]


class BarLeRIa(nn.Module):
    """BarLeRIa (Wang et al., 2024, Figure 2): two towers side by side and a global branch.

    Both are CLIP's, and frozen except for their position embeddings. Their blocks have normalizing
    flows on their shortcuts and receive visiting tokens from the other tower. The global branch
    reads the patches after every third of 12 blocks.
    """

    def __init__(self, config, vision, text):
        super().__init__()
        self.config, self.vision, self.text = config, vision, text
        visual_width, text_width, embed = vision.shape.width, text.shape.width, text.shape.embed
        self.visual_flows = flow_pairs(vision, config.visual_flows, config.flow_steps)
        self.text_flows = flow_pairs(text, config.text_flows, config.flow_steps)
        self.intertwiner = (Intertwiner(visual_width, text_width, config.intertwined_rank)
                            if config.intertwined else None)
        self.global_branch = GlobalShortcutTuning(
            visual_width, text_width, embed, out_width=config.head_width,
            width=config.global_width, heads=config.global_heads, blocks=config.global_blocks,
            queries=config.global_queries, rank=config.intertwined_rank,
            patch=config.global_patch, side=config.image_size // config.global_patch,
        ) if config.global_blocks else None
        self.head = make_head(config, text, [visual_width, visual_width, vision.projected_width],
                              residual=False)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        grid, padding = self.vision.grid(images), after_end(tokens)
        after_block, words, sentence = self.local_branch(images, tokens, grid)
        projected = self.vision.projection(self.vision.norm(after_block[-1]))     # F_v, (B, N, E)
        features = [self.vision.as_map(x, grid)
                    for x in (*(after_block[i] for i in self.config.features), projected)]
        shortcut = None
        if self.global_branch is not None:
            prefix = self.vision.prefix
            prior = global_prior(words @ self.text.projection, projected[:, prefix:], padding)
            step = len(after_block) // self.config.global_blocks    # 3: after blocks 2, 5, 8, 11
            stages = [x[:, prefix:] for x in after_block[step - 1::step]]
            shortcut = self.global_branch(images, words, prior, stages, grid)   # F_out^M
        return self.head(features, words, sentence, padding, shortcut)          # Eq. 9

    def local_branch(self, images, tokens, grid):
        """BarLeRIa Eq. 2-3: both towers block by block, with visiting tokens.

        Returns the vision tower's tokens (B, N, D) after every block, words and sentence. A vision
        tower r times as deep as the text tower runs r blocks per text block. All r receive the
        same words; the text block receives the class token from before the first of them.
        """
        x, words = self.vision.embed(images), self.text.embed(tokens)
        rotary = self.vision.rotary_tables(grid)
        ratio = len(self.vision.blocks) // len(self.text.blocks)
        after_block = []
        for i, text_block in enumerate(self.text.blocks):
            visiting_words, visiting_class = x[:, :0], words[:, :0]     # no visitors
            if self.intertwiner is not None:
                visiting_words, visiting_class = self.intertwiner(words, x[:, :1])
            for j in range(ratio * i, ratio * (i + 1)):
                x = with_visitors(self.vision.blocks[j], x, visiting_words, self.vision.prefix,
                                  self.visual_flows[j], rotary)
                after_block.append(x)
            words = with_visitors(text_block, words, visiting_class, 0, self.text_flows[i])
        return after_block, *self.text.final(words, tokens)


def flow_pairs(tower, wanted, steps):
    """For each block of a tower two flows, on its attention's and its MLP's shortcut; or none."""
    return nn.ModuleList(
        nn.ModuleList(NormalizingFlow(tower.shape.width, steps) for _ in range(2 if wanted else 0))
        for _ in tower.blocks)


def with_visitors(block, x, visitors, index, flows, rotary=None):
    """Runs a block with extra tokens (B, G, D) inserted at `index` of x, then removes them.

    `flows`: none, or one each for the block's shortcuts, in the order of `Attached`.
    In the vision tower words (and padding) go between class token and image. In the text tower the
    class token goes first, so that every word sees it under the causal mask.
    """
    x = torch.cat([x[:, :index], visitors, x[:, index:]], dim=1)
    x = block(x, Attached(*flows), rotary)
    return torch.cat([x[:, :index], x[:, index + visitors.shape[1]:]], dim=1)


class ETRIS(nn.Module):
    """ETRIS (Xu et al., 2023): both towers side by side, with a bridge after each part of them.

    The towers are frozen. With normalizing flows on the vision tower's shortcuts this is the
    "SNF+ETRIS" of BarLeRIa's tables.
    """

    def __init__(self, config, vision, text):
        super().__init__()
        self.config, self.vision, self.text = config, vision, text
        visual_width, text_width = vision.shape.width, text.shape.width
        self.visual_flows = flow_pairs(vision, config.visual_flows, config.flow_steps)
        self.bridges = nn.ModuleList(
            Bridge(visual_width, text_width, config.bridge_width, config.bridge_heads,
                   first_stage=i == 0, last_stage=i == config.bridges - 1)
            for i in range(config.bridges))
        self.head = make_head(config, text, [visual_width, visual_width, vision.projected_width],
                              residual=False)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        grid, prefix = self.vision.grid(images), self.vision.prefix
        x, words = self.vision.embed(images), self.text.embed(tokens)
        rotary, reduced, after_block = self.vision.rotary_tables(grid), None, []
        visual_step, text_step = (len(tower.blocks) // len(self.bridges)
                                  for tower in (self.vision, self.text))
        for i, bridge in enumerate(self.bridges):
            for j in range(visual_step * i, visual_step * (i + 1)):
                x = self.vision.blocks[j](x, Attached(*self.visual_flows[j]), rotary)
                after_block.append(x)
            for block in self.text.blocks[text_step * i:text_step * (i + 1)]:
                words = block(words)
            patches, words, reduced = bridge(x[:, prefix:], words, reduced)
            after_block[-1] = x = torch.cat([x[:, :prefix], patches], dim=1)
        words, sentence = self.text.final(words, tokens)
        features = [self.vision.as_map(x, grid) for x in (
            *(after_block[i] for i in self.config.features),
            self.vision.projection(self.vision.norm(x)))]
        return self.head(features, words, sentence, after_end(tokens))


class UniModal(nn.Module):
    """The tuners of DCRIS Table 2 inside one tower each. Image and words first meet in the head.

    `full`: both towers learn. `fixed`: neither does. `houlsby`, `compacter`: an adapter after the
    MLP of every block. `lora`: beside all linear layers of vision blocks, and those of the
    attention in text blocks (there query, key and value count as three layers, which gives the
    paper's 1.57 million; the paper does not say where it puts them).
    """

    def __init__(self, config, vision, text):
        super().__init__()
        self.config, self.vision, self.text = config, vision, text
        rank = config.tuner_rank
        if config.method == "houlsby":
            behind_mlps(vision, text, lambda width: BottleneckAdapter(width, rank, scale=1))
        elif config.method == "compacter":
            self.factors = nn.Parameter(torch.randn(4, 4, 4) / 2)
            behind_mlps(vision, text, lambda width: CompacterAdapter(width, rank, self.factors))
        elif config.method == "lora":
            for block in vision.blocks:
                wrap_linears(block, lambda layer: LoRA(layer, rank))
            for block in text.blocks:
                wrap_linears(block.attention, lambda layer: LoRA(
                    layer, rank, parts=layer.out_features // layer.in_features))
        self.head = make_head(config, text, 3 * [vision.shape.width], residual=True)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        words, sentence = self.text(tokens)
        features = feature_maps(self.vision, images, self.config.features, {})
        return self.head(features, words, sentence, after_end(tokens))


def behind_mlps(vision, text, make):
    """Adds make(width) after the MLP of every block of both towers."""
    for tower in (vision, text):
        for block in tower.blocks:
            block.mlp = nn.Sequential(block.mlp, make(tower.shape.width))


def wrap_linears(module, wrap):
    """Replaces every linear layer in a module by wrap(layer)."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, wrap(child))
        else:
            wrap_linears(child, wrap)


# ---- Presets --------------------------------------------------------------------------------

# For drawn data: small and quick to train. No pretrained towers exist, so the towers learn, too.
DRAWN = {"train_towers": True, "train_positions": False, "text": "small", "image_size": 64,
         "features": (1, 2), "head_width": 64, "head_heads": 2, "head_layers": 1, "dropout": 0.0,
         "batch_size": 16, "lr": 1e-3, "epochs": 4, "milestones": (3,)}
DCRIS_B = Config()
DCRIS_L = replace(
    DCRIS_B, vision="dinov2-l", visual_adapter_layers=(2, 6, 10, 14, 18, 22), features=(8, 16),
    batch_size=64, lr=2e-4)
# The DCRIS authors' released program, with its own recipe.
DETRIS_B, DETRIS_L = (
    replace(config, text_convolutions=True, legacy_position_resize=True, batch_size=32, lr=1e-4)
    for config in (replace(DCRIS_B, epochs=65, milestones=(35, 55)), DCRIS_L))
# As in the authors' programs, CLIP's positions learn, too, but are not counted.
BARLERIA = Config(method="barleria", vision="clip-b", train_positions=True, image_size=416,
                  features=(3, 7))
ETRIS_B = replace(BARLERIA, method="etris", visual_flows=False)
PRESETS = {
    "shapes": replace(
        DCRIS_B, vision="small", visual_adapter_layers=(2,), visual_adapter_rank=32,
        text_adapter_layers=(1,), text_adapter_rank=16, **DRAWN),
    "shapes-barleria": replace(
        BARLERIA, vision="small-clip", intertwined_rank=16, global_blocks=2, global_width=48,
        global_heads=2, global_queries=8, global_patch=8, **DRAWN),
    "dcris-b": DCRIS_B,
    "dcris-l": DCRIS_L,
    "detris-b": DETRIS_B,
    "detris-l": DETRIS_L,
    "detris-l-mixed": replace(
        DETRIS_L, visual_adapter_rank=384, visual_adapter_layers=tuple(range(1, 24)),
        text_adapter_rank=384, text_adapter_layers=tuple(range(1, 12)), length=22),
    "barleria": BARLERIA,
    "barleria-eva": replace(BARLERIA, vision="eva-b", text="eva-b"),
    "barleria-l": replace(                      # 416 is no multiple of its patches' 14 pixels
        BARLERIA, vision="clip-l", text="clip-l", image_size=420, features=(7, 15), batch_size=64,
        lr=2e-4),
    "barleria-local": replace(BARLERIA, global_blocks=0),
    "snf": replace(BARLERIA, text_flows=False, intertwined=False, global_blocks=0),
    "etris": ETRIS_B,
    "etris-dino": replace(ETRIS_B, vision="dinov2-b", image_size=448),
    "snf-etris": replace(ETRIS_B, visual_flows=True),
    "full": replace(DCRIS_B, method="full"),
    "fixed": replace(DCRIS_B, method="fixed"),
    "houlsby": replace(DCRIS_B, method="houlsby"),
    "compacter": replace(DCRIS_B, method="compacter", tuner_rank=208),
    "lora": replace(DCRIS_B, method="lora", tuner_rank=8),
}
# All tuners on the towers of a run on drawn data (`train.py --init`). Ranks and widths give each
# 0.09 to 0.10 million parameters; flows alone, and visiting tokens, have fewer.
PRESETS |= {
    f"shapes-{name}": replace(PRESETS[preset], **sizes,
                              **{**DRAWN, "vision": "small", "train_towers": False})
    for name, preset, sizes in (
        ("full", "full", {}),
        ("fixed", "fixed", {}),
        ("houlsby", "houlsby", {"tuner_rank": 80}),
        ("compacter", "compacter", {"tuner_rank": 304}),
        ("lora", "lora", {"tuner_rank": 12}),
        ("dcris", "shapes", {}),
        ("etris", "etris", {"bridges": 2, "bridge_width": 56}),
        ("snf", "snf", {}),
        ("snf-etris", "snf-etris", {"bridges": 2, "bridge_width": 56}),
        ("barleria-local", "barleria-local", {"intertwined_rank": 16}))}
# Millions of tuned parameters as the papers print them (DCRIS Table 2, BarLeRIa Table 4).
PAPER = {"full": 149.97, "fixed": 0.00, "houlsby": 1.98, "compacter": 1.62, "lora": 1.57,
         "dcris-b": 2.69, "etris": 1.39, "snf": 0.18, "snf-etris": 1.57, "barleria-local": 0.39,
         "barleria": 2.21}


# ---- Building -------------------------------------------------------------------------------

# Method -> its class, and those fields of Config that it uses but some other method does not.
METHODS = {
    "dcris": (DCRIS, {
        "visual_adapter_layers", "visual_adapter_rank", "text_adapter_layers", "text_adapter_rank",
        "text_convolutions", "legacy_position_resize"}),
    "barleria": (BarLeRIa, {
        "visual_flows", "text_flows", "flow_steps", "intertwined", "intertwined_rank",
        "global_blocks", "global_width", "global_heads", "global_queries", "global_patch"}),
    "etris": (ETRIS, {"bridges", "bridge_width", "bridge_heads", "visual_flows", "flow_steps"}),
    **dict.fromkeys(("full", "fixed"), (UniModal, set())),
    **dict.fromkeys(("houlsby", "compacter", "lora"), (UniModal, {"tuner_rank"})),
}


def configure(preset, **overrides):
    """The configuration of a preset (or a Config) with some fields changed; lists become tuples.

    Raises ConfigError.
    """
    config = PRESETS.get(preset) if isinstance(preset, str) else preset
    require(config is not None, f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    unknown = sorted(overrides.keys() - {field.name for field in fields(Config)})
    require(not unknown, f"a configuration has no field {', '.join(unknown)}")
    config = replace(config, **{field: tuple(value) if isinstance(value, list) else value
                                for field, value in overrides.items()})
    check(config)
    return config


def require(condition, message):
    if not condition:
        raise ConfigError(message)


def check(config):
    """Raises ConfigError, which names the field, if no model can have this configuration."""
    for field in fields(Config):
        value, default = getattr(config, field.name), field.default
        entries = value if type(value) is tuple else ()
        require(type(value) is type(default) and all(type(i) is int for i in entries),
                f"{field.name} is {value!r}; it must be of the kind of {default!r}")
        if type(value) in (int, float) and field.name not in ("dropout", "global_blocks"):
            require(value > 0, f"{field.name} is {value}; it must be above 0")
    for field, table in (("method", METHODS), ("vision", VISION), ("text", TEXT)):
        require(getattr(config, field) in table,
                f"{field} {getattr(config, field)!r} is unknown; there are {', '.join(table)}")
    vision, text = VISION[config.vision], TEXT[config.text]
    method, own_fields = METHODS[config.method]
    for field in sorted(set().union(*(names for _, names in METHODS.values())) - own_fields):
        require(getattr(config, field) == getattr(Config, field),
                f"{field} plays no part in method {config.method}; take a preset of another method")
    require(3 <= config.length <= text.positions,
            f"length {config.length}: {config.text} reads 3 to {text.positions} tokens")
    require(len(config.features) == 2, f"features {config.features}: name two blocks")
    require(0 <= config.dropout < 1, f"dropout {config.dropout} is not in [0, 1)")
    require(config.global_blocks >= 0, f"global_blocks {config.global_blocks} is negative")
    require(method in (BarLeRIa, ETRIS) or not (vision.embed and config.towers_learn),
            f"method {config.method} does not use the projection of {config.vision}, so it cannot "
            f"learn; take a DINOv2 tower")
    require(method is not BarLeRIa or (vision.embed or vision.width) == text.embed
            and (config.text not in PUBLISHED or config.vision == config.text),
            f"vision {config.vision} and text {config.text} are not the two towers of one CLIP")
    layers = [("features", vision.depth)]
    if method is DCRIS:
        layers += [("visual_adapter_layers", vision.depth), ("text_adapter_layers", text.depth)]
    for field, depth in layers:
        blocks = getattr(config, field)
        require(blocks == tuple(i for i in range(depth) if i in blocks),
                f"{field} {blocks}: the tower has {depth} blocks, 0 to {depth - 1}; name each "
                f"block once, in order")

    def multiple(field, of):
        value = getattr(config, field)
        require(value % of == 0, f"{field} {value} is no multiple of {of}")

    near = max(1, round(config.image_size / vision.patch)) * vision.patch
    require(config.image_size % vision.patch == 0,
            f"image_size {config.image_size} is no multiple of {vision.patch}, the patch of "
            f"{config.vision}; {near} is")
    multiple("head_width", of=4)                    # the decoder's positions
    multiple("head_width", of=config.head_heads)
    if method is DCRIS:                             # the convolutions' widths are 1/16 of a rank
        multiple("visual_adapter_rank", of=16)
        multiple("text_adapter_rank", of=16 if config.text_convolutions else 1)
    elif method is BarLeRIa:
        multiple("global_width", of=config.global_heads)
        for part, blocks in (("text", text.depth), ("global_blocks", config.global_blocks or 1)):
            require(vision.depth % blocks == 0,
                    f"{part} {getattr(config, part)}: the {vision.depth} blocks of {config.vision} "
                    f"are no multiple of {blocks}")
    elif method is ETRIS:
        multiple("bridge_width", of=config.bridge_heads)
        require(vision.depth % config.bridges == text.depth % config.bridges == 0,
                f"bridges {config.bridges}: the towers of {vision.depth} and {text.depth} blocks "
                f"cannot be cut into as many parts")
    elif config.method == "compacter":
        multiple("tuner_rank", of=4)                # Kronecker factors


def build(preset, vision_weights=None, text_weights=None, init=None, **overrides):
    """A model from a preset's name, or a Config, with the fields in `overrides` changed.

    The towers are read from the given files, or start with random weights; `model.sources` says
    which. `init`: (path, checkpoint) of a run from which to take the towers' weights instead.
    Raises ConfigError, WeightsError, OSError.
    """
    config = configure(preset, **overrides)
    towers, sources = {}, {}
    for kind, path, tower_class, shapes, read in (
            ("vision", vision_weights, backbones.ViT, VISION, backbones.load_vision),
            ("text", text_weights, backbones.TextTransformer, TEXT, backbones.load_text)):
        expected = shapes[getattr(config, kind)]
        if path is None:
            tower, sources[kind] = tower_class(expected), None
        else:
            tower, path = read(path), backbones.weight_file(path)
            sources[kind] = {"file": Path(path).name, "sha256": sha256(path)}
            if tower.shape != expected:
                raise WeightsError(f"{path}: {kind} {getattr(config, kind)} is {expected}, but the "
                                   f"file holds {tower.shape}")
        if init is not None:
            held = {name: tensor for name, tensor in init[1]["tensors"].items()
                    if name.startswith(f"{kind}.")}
            backbones.load_tensors(tower.state_dict(), held, init[0], [("^", f"{kind}.")])
        towers[kind] = tower.requires_grad_(False)
    model = wire(config, **towers)
    model.sources = sources
    return model


def wire(config, vision, text):
    """The model of a Config on two frozen towers; unfreezes the parts of them that learn.

    CLIP's vision positions are resized to the grid of `image_size` before they learn, as in the
    authors' programs.
    """
    vision.legacy_position_resize = config.legacy_position_resize
    method, _ = METHODS[config.method]
    model = method(config, vision, text)
    if config.towers_learn:
        vision.requires_grad_(True)
        text.requires_grad_(True)
    if config.train_positions:
        if vision.shape.family == "clip":
            vision.resize(config.image_size)
        for position in clip_positions(model):
            position.requires_grad_(True)
    return model


def clip_positions(model):
    """The position embeddings that learn in the programs of ETRIS and BarLeRIa: those of CLIP's
    towers and of EVA-02-CLIP's text tower (named `positional_embedding` there)."""
    return [tower.position for tower in (model.vision, model.text)
            if tower.shape.family not in ("dinov2", "eva")]


def find_weights(config, vision_weights=None, text_weights=None):
    """The paths of both towers' files: those given, else the published names in `pretrained/`.

    None for a tower without published weights (the drawn data's). Raises FileNotFoundError.
    """
    return [find_published(name, path) if name in PUBLISHED else path
            for name, path in ((config.vision, vision_weights), (config.text, text_weights))]


def find_published(name, path=None):
    """`path`, or the file published under this name in `pretrained/`.

    Raises FileNotFoundError, which says where to get the file.
    """
    published = PUBLISHED[name]
    path = Path(path or PRETRAINED / published.file)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `python backbones.py download {name}` "
                                f"fetches it; it is published as {published.file} at "
                                f"{published.address}")
    return path


# ---- Checkpoints ----------------------------------------------------------------------------

def tuned_tensors(model):
    """Name -> tensor of everything but the frozen parts of towers that came from a file."""
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items()
            if name in learns or model.sources.get(name.split(".")[0]) is None}


@contextlib.contextmanager
def replacing(path):
    """Opens a binary file for writing; it becomes `path` once it is complete and on the disk.

    Raises OSError, which names `path`; the old file is then still there.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError, RuntimeError) as error:
        # torch.save turns the OSError of a full disk into a RuntimeError.
        cause = error.__context__ or error if isinstance(error, RuntimeError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"{path}: could not be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def save(path, model, **more):
    """Writes a checkpoint: configuration, the towers' file names and SHA-256, tuned tensors.

    It also holds the plain values and tensors in `more`. Raises OSError.
    """
    with replacing(path) as file:
        torch.save({"config": asdict(model.config), "towers": model.sources,
                    "tensors": tuned_tensors(model), **more}, file)


def read_checkpoint(path):
    """The dictionary that `save` or `export` wrote, with a Config in "config".

    "run" and "vocabulary" are always there. A file of the authors' programs gives {released, run,
    vocabulary} instead. Raises FileNotFoundError, and WeightsError for any other content.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content, metadata = backbones.read_file(path)
    try:
        checkpoint = {"run": {}, "vocabulary": {}}
        if metadata is not None:
            checkpoint |= {**json.loads(metadata["ris"]), "tensors": content}
        elif "state_dict" in dict(content):
            return {**checkpoint, "released": {
                name.removeprefix("module."): tensor
                for name, tensor in content["state_dict"].items()}}
        else:
            checkpoint |= content
        checkpoint["config"] = configure(Config(), **checkpoint["config"])
        for part in ("tensors", "run", "vocabulary"):
            checkpoint[part] = dict(checkpoint[part])
        checkpoint["towers"] = {
            kind: source and {"file": source["file"], "sha256": source["sha256"]}
            for kind, source in (("vision", checkpoint["towers"]["vision"]),
                                 ("text", checkpoint["towers"]["text"]))}
    except Exception as error:              # whatever is wrong inside
        raise WeightsError(f"{path}: not a checkpoint of this project "
                           f"({type(error).__name__}: {error})") from None
    return checkpoint


def load(path, vision_weights=None, text_weights=None, checkpoint=None):
    """A model in eval mode from a checkpoint; pass `checkpoint` if it was read already.

    Tower files are those given, or looked for in `pretrained/`. They must be the files of the
    training run (SHA-256). Raises WeightsError or OSError.
    """
    checkpoint = checkpoint or read_checkpoint(path)
    if "released" in checkpoint:
        return load_released(path, checkpoint["released"])
    config, towers = checkpoint["config"], checkpoint["towers"]
    model = build(config, *(
        find_published(getattr(config, kind), given) if towers[kind] else None
        for kind, given in (("vision", vision_weights), ("text", text_weights))))
    for kind, source in towers.items():
        if source and source["sha256"] not in (None, model.sources[kind]["sha256"]):
            raise WeightsError(f"{path}: trained with {source['file']} of SHA-256 "
                               f"{source['sha256'][:16]}..., but {kind}_weights has "
                               f"{model.sources[kind]['sha256'][:16]}...")
    backbones.load_tensors(tuned_tensors(model), checkpoint["tensors"], path)
    return model.eval()


def export(checkpoint_path, out):
    """Writes a checkpoint's tuned tensors, head and configuration, without the optimizer's state.

    OUT.pt is a checkpoint as `save` writes it; OUT.safetensors holds the same tensors, and the rest
    as JSON in its metadata. `load` reads both. Raises WeightsError, OSError.
    """
    if os.path.exists(out) and os.path.samefile(checkpoint_path, out):
        raise OSError(f"{out}: is the checkpoint itself; name another file")
    checkpoint = read_checkpoint(checkpoint_path)
    model = load(checkpoint_path, checkpoint=checkpoint)
    metadata = {part: checkpoint[part] for part in ("run", "vocabulary")}
    if not str(out).endswith(".safetensors"):
        return save(out, model, **metadata)
    try:
        import safetensors.torch
    except ImportError:
        raise WeightsError(f"{out}: to write .safetensors files, pip install safetensors; or name "
                           f"it .pt") from None
    metadata |= {"config": asdict(model.config), "towers": model.sources}
    tensors = {name: tensor.contiguous() for name, tensor in tuned_tensors(model).items()}
    with replacing(out) as file:
        file.write(safetensors.torch.save(tensors, {"ris": json.dumps(metadata)}))


# ---- The table of parameters ----------------------------------------------------------------

def count(model):
    """Numbers of parameters: frozen, positions (`clip_positions`, if they learn), head, tuned.

    Tuned: all others that learn. None of the papers counts the positions, even where they learn.
    """
    positions = {id(position) for position in clip_positions(model)}
    sizes = {"frozen": 0, "tuned": 0, "positions": 0, "head": 0}
    for name, parameter in model.named_parameters():
        kind = ("head" if name.startswith("head.") else
                "frozen" if not parameter.requires_grad else
                "positions" if id(parameter) in positions else "tuned")
        sizes[kind] += parameter.numel()
    return sizes


def main():
    parser = argparse.ArgumentParser(description="The presets and their parameters.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("export", help="write the tuned part of a checkpoint alone")
    command.add_argument("ckpt", metavar="CKPT")
    command.add_argument("out", metavar="OUT", help="OUT.pt or OUT.safetensors")
    args = parser.parse_args()
    if args.command == "export":
        if Path(args.out).suffix not in (".pt", ".safetensors"):
            parser.error("OUT ends in .pt or .safetensors")
        export(args.ckpt, args.out)
        return
    rows = []
    for preset in PRESETS:
        with torch.device("meta"):          # shapes only, no memory
            sizes = count(build(preset))
        rows.append({"preset": preset, **sizes, "paper_millions": PAPER.get(preset)})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print("Parameters in millions. Tuned: all that learns, without the head and CLIP's position\n"
          "embeddings. Paper: the printed figure for tuned.\n")
    print("| preset | frozen | tuned | paper | positions | head |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        frozen, tuned, positions, head = (
            f"{row[part] / 1e6:.2f}" for part in ("frozen", "tuned", "positions", "head"))
        paper = "" if row["paper_millions"] is None else f"{row['paper_millions']:.2f}"
        print(f"| {row['preset']} | {frozen} | {tuned} | {paper} | {positions} | {head} |")


# ---- Checkpoints of the authors' programs, DETRIS and ETRIS ---------------------------------

# What a tensor is called here, as a regular expression, and in their files (behind "module.").
RELEASED_NAMES = [
    (r"^head\.neck\.sentence\.", "neck.txt_proj."),
    (r"^head\.neck\.maps\.(\d)\.", lambda match: f"neck.f{int(match[1]) + 3}_proj."),
    (r"^head\.neck\.gates\.(\d)\.",
     lambda match: f"neck.fusion{int(match[1]) + 3}.multihead_attn."),
    (r"\.multihead_attn\.out\.", ".multihead_attn.out_proj."),
    (r"^head\.neck\.fuse\.", "neck.aggr."),
    (r"^head\.neck\.coordinates\.0\.", "neck.coordconv.0.conv1."),
    (r"^head\.neck\.coordinates\.1\.", "neck.coordconv.1."),
    (r"^head\.decoder\.", "decoder."),
    (r"\.self_attention(_norm)?\.", r".self_attn\1."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"\.cross_attention_norm\.", ".cross_attn_norm."),
    (r"\.feed_forward\.", ".ffn."),
    (r"^head\.projector\.image\.(\d)\.",       # they have the upsamplings between
     lambda match: f"proj.vis.{(1, 3, 4)[int(match[1])]}."),
    (r"^head\.projector\.sentence\.", "proj.txt."),
    (r"^dense_cross_adapters\.(\d+)\.", r"dinov2.blocks.\1.adapter."),
    (r"^text_adapters\.(\d+)\.", r"txt_backbone.transformer.resblocks.\1.adapter."),
    (r"\.adapter\.down\.", ".adapter.D_fc1."),
    (r"\.adapter\.up\.", ".adapter.D_fc2."),
    (r"\.dense\.branch(\d(?:\.\d)?)\.0\.(weight|bias)$", r".dense_branch\1.conv.\2"),
    (r"\.dense\.branch(\d(?:\.\d)?)\.1\.(?=weight|bias|running|num)", r".dense_branch\1.bn."),
    (r"\.cross\.query\.", ".cross.image_proj."),
    (r"\.cross\.words\.", ".cross.text_proj."),
    (r"\.cross\.attention\.", ".cross.multihead_attn."),
    (r"\.cross\.back\.", ".cross.back_proj."),
    (r"^bridges\.(\d+)\.patches_down\.", r"bridger.zoom_in.\1."),
    (r"^bridges\.(\d+)\.patches_up\.", r"bridger.zoom_out.\1."),
    (r"^bridges\.(\d+)\.words_down\.", r"bridger.linear1.\1."),
    (r"^bridges\.(\d+)\.words_up\.", r"bridger.linear2.\1."),
    (r"^bridges\.(\d+)\.patches_read\.", r"bridger.fusion_v.\1.multihead_attn."),
    (r"^bridges\.(\d+)\.words_read\.", r"bridger.fusion_t.\1.multihead_attn."),
    (r"^bridges\.(\d+)\.(patches|words)_norm\.", lambda match:
        f"bridger.ln_{'v' if match[2] == 'patches' else 't'}.{int(match[1]) - 1}."),
]


def load_released(path, state):
    """A model in eval mode from the tensors of a released DETRIS or ETRIS checkpoint.

    Widths, ranks and layers are read from the names and shapes. The files do not hold, and the
    authors' configurations give: 8 heads, 17 tokens, the blocks whose maps the head takes, and
    448 pixels for DETRIS. (ETRIS's grid of positions is that of the photo.) Raises WeightsError.
    """
    detris = any(name.startswith("dinov2.") for name in state)
    vision_prefix, text_prefix = ("dinov2.", "txt_backbone.") if detris else 2 * ("backbone.",)
    rest = {name: tensor for name, tensor in state.items() if ".adapter." in name
            or not name.startswith((vision_prefix, text_prefix))}
    towers = {name: tensor for name, tensor in state.items() if name not in rest}
    vision, text = (
        read(path, state={name.removeprefix(prefix): tensor for name, tensor in towers.items()
                          if name.startswith(prefix)})
        for read, prefix in ((backbones.load_vision, vision_prefix),
                             (backbones.load_text, text_prefix)))

    def rows(pattern):
        """Number in the name -> rows of the tensor, of all whose names match the pattern."""
        return {int(match[1]): len(rest[match[0]]) if rest[match[0]].ndim else 0
                for match in (re.fullmatch(pattern, name) for name in rest) if match}

    config = DETRIS_B if detris else ETRIS_B
    found = {"vision": shape_name(path, VISION, vision.shape),
             "text": shape_name(path, TEXT, text.shape),
             "head_width": rows(r"neck\.aggr\.(0)\.weight").get(0, 0),
             "head_layers": len(rows(r"decoder\.layers\.(\d+)\.ffn\.0\.weight"))}
    third = vision.shape.depth // 3
    if detris:
        visual, words = (
            rows(rf"{blocks}\.(\d+)\.adapter\.D_fc1\.weight")
            for blocks in (r"dinov2\.blocks", r"txt_backbone\.transformer\.resblocks"))
        found |= {
            "features": (third, 2 * third),
            "visual_adapter_layers": tuple(sorted(visual)),
            "visual_adapter_rank": max(visual.values(), default=config.visual_adapter_rank),
            "text_adapter_layers": tuple(sorted(words)),
            "text_adapter_rank": max(words.values(), default=config.text_adapter_rank),
            "text_convolutions": any(re.match(r"txt_backbone.*\.dense_branch1\.", name)
                                     for name in rest)}
    else:
        bridges = rows(r"bridger\.linear1\.(\d+)\.weight")
        found |= {"features": (third - 1, 2 * third - 1), "bridges": len(bridges),
                  "bridge_width": max(bridges.values(), default=0),
                  "image_size": vision.shape.grid * vision.shape.patch}
    try:
        config = configure(config, **found)
    except ConfigError as error:
        raise WeightsError(f"{path}: no model can be made of it: {error}") from None
    model = wire(config, vision, text)
    model.sources = {kind: {"file": PUBLISHED[name].file if name in PUBLISHED else "",
                            "sha256": None}
                     for kind, name in (("vision", config.vision), ("text", config.text))}
    own = {name: tensor for name, tensor in model.state_dict().items()
           if not name.startswith(("vision.", "text."))}
    backbones.load_tensors(own, in_our_shapes(rest, config.bridges), path, RELEASED_NAMES)
    return model.eval()


def in_our_shapes(state, bridges):
    """The released tensors in the shapes of our layers, under the authors' names.

    Of the neck's attentions only values and outputs have an effect (`head.Gate`). Some 1x1
    convolutions are transposed ones, with weights (in, out, 1, 1): the neck's third, ETRIS's
    way up in all stages but the last and its way down in the last. ETRIS's are two-dimensional.
    """
    transposed = re.compile(rf"neck\.f5_proj\.0\.weight|bridger\.zoom_(out\.(?!{bridges - 1}\.)"
                            rf"\d+|in\.{bridges - 1})\.0\.weight")
    out = {}
    for name, tensor in state.items():
        if transposed.fullmatch(name) and tensor.ndim > 1:
            tensor = tensor.transpose(0, 1)
        if re.match(r"neck\.fusion\d\.multihead_attn\.in_proj_(weight|bias)", name):
            name = name.replace("in_proj_", "value.")
            tensor = tensor[len(tensor) // 3 * 2:] if tensor.ndim else tensor
        if re.match(r"bridger\.zoom_", name) and tensor.ndim == 4:
            tensor = tensor.flatten(2)
        out[name] = tensor
    return out


def shape_name(path, table, shape):
    """The name of a tower's shape in VISION or TEXT. Raises WeightsError if it is not there."""
    for name, known in table.items():
        # ETRIS's files hold CLIP's positions on the grid of the photo.
        if known == (shape._replace(grid=known.grid) if shape.family == "clip" else shape):
            return name
    raise WeightsError(f"{path}: its tower is of unknown size: {shape}; known: {', '.join(table)}")


if __name__ == "__main__":
    try:
        main()
    except (WeightsError, ConfigError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
