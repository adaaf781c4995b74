"""How a method wires two towers, its adapters and the head; the presets; saving and loading.

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
from backbones import PUBLISHED, TEXT, VISION, Attached, WeightsError, after_end, freeze, sha256
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
    """DCRIS (Xu et al., 2024, Figure 1): all of the text first, then the image reading its words.

    Frozen DINOv2 with DenseCross adapters, frozen CLIP text tower with text adapters, and the head.
    """

    # Fields of Config that play a part here; other methods may lack them.
    own_fields = ("visual_adapter_layers", "visual_adapter_rank", "text_adapter_layers",
                  "text_adapter_rank", "text_convolutions", "legacy_position_resize")
    projects = False                        # whether CLIP's projection of the photo is used

    @staticmethod
    def check(config, vision, text):
        if config.visual_adapter_rank % 16:
            raise ConfigError(f"visual_adapter_rank {config.visual_adapter_rank}: the branches "
                              f"need a multiple of 16")
        if config.text_convolutions and config.text_adapter_rank % 16:
            raise ConfigError(f"text_adapter_rank {config.text_adapter_rank}: the branches need a "
                              f"multiple of 16")

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
            x = block(x, attached.get(i, backbones.NOTHING))
        return self.text.final(x, tokens)

    def image_branch(self, images, words):
        """Images and words to the three maps f_v (B, D, S/P, S/P)."""
        grid = self.vision.grid(images)
        attached = {int(i): Attached(beside_mlp=partial(adapter, words=words, grid=grid))
                    for i, adapter in self.dense_cross_adapters.items()}
        return feature_maps(self.vision, images, self.config.features, attached)


def make_head(config, text, widths, residual):
    """The head on maps of these three widths. The neck's residual is DCRIS's alone."""
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
        x = block(x, attached.get(i, backbones.NOTHING), rotary)
        if i in wanted:
            maps.append(vision.as_map(x, grid))
    return [*maps, vision.as_map(vision.final(x), grid)]


class BarLeRIa(nn.Module):
    """BarLeRIa (Wang et al., 2024, Figure 2): two towers side by side, a third network beside them.

    Frozen CLIP with normalizing flows on the shortcuts of its blocks, each of which has guests from
    the other tower; then the global branch, which reads the stages that the photo passed through.
    """

    own_fields = ("visual_flows", "text_flows", "flow_steps", "intertwined", "intertwined_rank",
                  "global_blocks", "global_width", "global_heads", "global_queries",
                  "global_patch")
    projects = True

    @staticmethod
    def check(config, vision, text):
        width = vision.embed or vision.width
        if width != text.embed or config.text in PUBLISHED and config.vision != config.text:
            raise ConfigError(f"vision {config.vision} and text {config.text} are not the two "
                              f"towers of one CLIP, whose tokens BarLeRIa compares")
        if config.global_blocks < 0:
            raise ConfigError(f"global_blocks is {config.global_blocks}; it must be at least 0")
        for field, divisor in (("text", text.depth), ("global_blocks", config.global_blocks)):
            if divisor and vision.depth % divisor:
                raise ConfigError(f"{field} {getattr(config, field)}: the {vision.depth} blocks of "
                                  f"{config.vision} are no multiple of {divisor}")
        if config.global_width % config.global_heads:
            raise ConfigError(f"global_width {config.global_width} is no multiple of global_heads, "
                              f"{config.global_heads}")
        if config.global_patch > config.image_size:
            raise ConfigError(f"global_patch {config.global_patch} is larger than image_size, "
                              f"{config.image_size}")

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
        projected = self.vision.project(self.vision.final(after_block[-1]))     # F_v, (B, N, E)
        features = [self.vision.as_map(x, grid)
                    for x in (*(after_block[i] for i in self.config.features), projected)]
        shortcut = None
        if self.global_branch is not None:
            prefix = self.vision.prefix
            prior = global_prior(self.text.project(words), projected[:, prefix:], padding)
            step = len(after_block) // self.config.global_blocks    # 3: blocks 3, 6, 9, 12 from 1
            stages = [x[:, prefix:] for x in after_block[step - 1::step]]
            shortcut = self.global_branch(images, words, prior, stages, grid)   # F_out^M
        return self.head(features, words, sentence, padding, shortcut)

    def local_branch(self, images, tokens, grid):
        """BarLeRIa Eq. 2-3: both towers block by block, each with guests from the other.

        Returns the vision tower's tokens (B, N, D) after every block, words and sentence. A vision
        tower r times as deep as the text tower takes r blocks to each of its blocks. All r receive
        the same words, and the text block the class token from before the first of them.
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
    In the vision tower words stand between class token and image (padding, too); in the text tower
    the class token stands first, so that under the causal mask every word sees it.
    """
    x = torch.cat([x[:, :index], visitors, x[:, index:]], dim=1)
    x = block(x, Attached(*flows), rotary)
    return torch.cat([x[:, :index], x[:, index + visitors.shape[1]:]], dim=1)


class ETRIS(nn.Module):
    """ETRIS (Xu et al., 2023): both towers side by side, with bridges between them at some heights.

    Frozen CLIP, or DINOv2 with CLIP's text tower. With normalizing flows on the vision tower's
    shortcuts it is the "SNF+ETRIS" of BarLeRIa's tables.
    """

    own_fields = ("bridges", "bridge_width", "bridge_heads", "visual_flows", "flow_steps")
    projects = True

    @staticmethod
    def check(config, vision, text):
        for tower in (vision, text):
            if tower.depth % config.bridges:
                raise ConfigError(f"bridges {config.bridges}: towers of {vision.depth} and "
                                  f"{text.depth} blocks cannot both be cut into so many parts")
        if config.bridge_width % config.bridge_heads:
            raise ConfigError(f"bridge_width {config.bridge_width} is no multiple of bridge_heads, "
                              f"{config.bridge_heads}")

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
        rotary, entered, after_block = self.vision.rotary_tables(grid), None, []
        visual_step, text_step = (len(tower.blocks) // len(self.bridges)
                                  for tower in (self.vision, self.text))
        for i, bridge in enumerate(self.bridges):
            for j in range(visual_step * i, visual_step * (i + 1)):
                x = self.vision.blocks[j](x, Attached(*self.visual_flows[j]), rotary)
                after_block.append(x)
            for block in self.text.blocks[text_step * i:text_step * (i + 1)]:
                words = block(words)
            patches, words, entered = bridge(x[:, prefix:], words, entered)
            after_block[-1] = x = torch.cat([x[:, :prefix], patches], dim=1)
        words, sentence = self.text.final(words, tokens)
        features = [self.vision.as_map(x, grid) for x in (
            *(after_block[i] for i in self.config.features),
            self.vision.project(self.vision.final(x)))]
        return self.head(features, words, sentence, after_end(tokens))


class UniModal(nn.Module):
    """The tuners of DCRIS Table 2 that know one tower at a time. Photo and words meet in the head.

    `full`: both towers learn. `fixed`: neither. `houlsby`, `compacter`: an adapter behind every
    block's MLP. `lora`: beside the linear layers of every vision block and of the attention of
    every text block (query, key and value count as three there, so that the paper's 1.57 million
    come out; it does not say where its own are).
    """

    own_fields = ("tuner_rank",)
    projects = False

    @staticmethod
    def check(config, vision, text):
        if config.method in ("full", "fixed") and config.tuner_rank != Config.tuner_rank:
            raise ConfigError(f"tuner_rank plays no part in method {config.method}")
        if config.method == "compacter" and config.tuner_rank % 4:
            raise ConfigError(f"tuner_rank {config.tuner_rank}: Compacter needs a multiple of 4")

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
    """Puts make(width) behind the MLP of every block of both towers."""
    for tower in (vision, text):
        for block in tower.blocks:
            block.mlp = nn.Sequential(block.mlp, make(tower.shape.width))


def wrap_linears(module, wrap):
    """Puts wrap(layer) in the place of every linear layer in a module."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, wrap(child))
        else:
            wrap_linears(child, wrap)


METHODS = {"dcris": DCRIS, "barleria": BarLeRIa, "etris": ETRIS,
           **dict.fromkeys(("full", "fixed", "houlsby", "compacter", "lora"), UniModal)}


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------

# For drawn data: small, and quickly trained. There are no pretrained towers, so they learn, too.
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
# The authors' programs train CLIP's positions besides what they count, and so do these.
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
# 0.09 to 0.10 million parameters; flows alone, and guests, have fewer.
CARRIED = {**DRAWN, "vision": "small", "train_towers": False}
PRESETS |= {
    "shapes-full": replace(PRESETS["full"], **CARRIED),
    "shapes-fixed": replace(PRESETS["fixed"], **CARRIED),
    "shapes-houlsby": replace(PRESETS["houlsby"], tuner_rank=80, **CARRIED),
    "shapes-compacter": replace(PRESETS["compacter"], tuner_rank=304, **CARRIED),
    "shapes-lora": replace(PRESETS["lora"], tuner_rank=12, **CARRIED),
    "shapes-dcris": replace(PRESETS["shapes"], **CARRIED),
    "shapes-etris": replace(PRESETS["etris"], bridges=2, bridge_width=56, **CARRIED),
    "shapes-snf": replace(PRESETS["snf"], **CARRIED),
    "shapes-snf-etris": replace(PRESETS["snf-etris"], bridges=2, bridge_width=56, **CARRIED),
    "shapes-barleria-local": replace(PRESETS["barleria-local"], intertwined_rank=16, **CARRIED),
}


ODD = Config.visual_adapter_layers


def adapters_at(visual, text):
    return {"visual_adapter_layers": visual, "text_adapter_layers": text}


# Rows of the table: preset, overrides, millions of tuned parameters as the papers print them.
TABLE = [
    ("full", {}, 149.97), ("fixed", {}, 0.00), ("houlsby", {}, 1.98), ("compacter", {}, 1.62),
    ("lora", {}, 1.57), ("etris-dino", {}, None), ("dcris-b", {}, 2.69), ("dcris-l", {}, None),
    ("detris-b", {}, None), ("detris-l", {}, None), ("detris-l-mixed", {}, None),
    ("etris", {}, 1.39), ("snf", {}, 0.18), ("snf-etris", {}, 1.57), ("barleria-local", {}, 0.39),
    ("barleria", {}, 2.21), ("barleria-eva", {}, None), ("barleria-l", {}, None),
    *((name, {}, None) for name in PRESETS if name.startswith("shapes")),
    ("dcris-b", adapters_at(ODD, ()), None), ("dcris-b", adapters_at((), ODD), None),   # Table 3
    *(("dcris-b", {"visual_adapter_rank": visual, "text_adapter_rank": text}, None)     # Table 4
      for visual, text in ((64, 64), (128, 64), (128, 128), (256, 128))),
    *(("dcris-b", adapters_at(layers, layers), millions) for layers, millions in [      # Table 5
        ((8,), 0.45), ((6, 11), 0.90), ((4, 8, 11), 1.35), ((3, 6, 9, 11), 1.80),
        ((3, 5, 7, 9, 11), 2.25), (ODD, 2.69), ((1, 3, 5, 7, 9, 10, 11), 3.14),
        ((1, 3, 4, 5, 7, 9, 10, 11), 3.59), (tuple(range(12)), 5.39)])]


# ---------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------

def configure(preset, **overrides):
    """The configuration of a preset (or a Config) with some fields changed. Raises ConfigError."""
    if not isinstance(preset, Config) and preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    unknown = overrides.keys() - {field.name for field in fields(Config)}
    if unknown:
        raise ConfigError(f"a configuration has no field {sorted(unknown)[0]!r}")
    config = replace(preset if isinstance(preset, Config) else PRESETS[preset], **{
        field: tuple(value) if isinstance(value, list) else value
        for field, value in overrides.items()})
    check(config)
    return config


MOST = {"image_size": 4096, "length": 1000, "flow_steps": 100, "global_patch": 4096, "bridges": 100,
        "head_layers": 100, "batch_size": 10**6, "lr": 1e3, "epochs": 10**6}


def check(config):
    """Raises ConfigError, naming the field, for a configuration that no model can have."""
    for field in fields(Config):
        value, kind = getattr(config, field.name), type(field.default)
        if type(value) is not kind or kind is tuple and any(type(i) is not int for i in value):
            raise ConfigError(f"{field.name} is {value!r}, but must be of the kind of "
                              f"{field.default!r}")
    for field, table in (("method", METHODS), ("vision", VISION), ("text", TEXT)):
        if getattr(config, field) not in table:
            raise ConfigError(f"{field} {getattr(config, field)!r} is unknown; "
                              f"there are {', '.join(table)}")
    method, vision, text = METHODS[config.method], VISION[config.vision], TEXT[config.text]
    foreign = {field for other in METHODS.values() for field in other.own_fields}
    for field in sorted(foreign.difference(method.own_fields)):
        if getattr(config, field) != getattr(Config, field):
            raise ConfigError(f"{field} plays no part in method {config.method}; for another "
                              f"method take one of its presets")
    if vision.embed and not method.projects and config.towers_learn:
        raise ConfigError(f"method {config.method} would leave the projection of {config.vision} "
                          f"without use, so it cannot learn; take a tower of DINOv2's family")
    for field in fields(Config):
        value, most = getattr(config, field.name), MOST.get(field.name, 8192)
        if type(field.default) in (int, float) and field.name not in ("dropout", "global_blocks") \
                and not 0 < value <= most:
            raise ConfigError(f"{field.name} is {value}; it must be above 0 and at most {most}")
    if config.image_size % vision.patch or config.image_size == vision.patch:
        near = max(2, round(config.image_size / vision.patch)) * vision.patch
        raise ConfigError(f"image_size {config.image_size} is no multiple (twice or more) of the "
                          f"patch size {vision.patch} of {config.vision}; {near} is")
    if not 3 <= config.length <= text.positions:
        raise ConfigError(f"length {config.length}: {config.text} reads 3 to {text.positions} "
                          f"tokens, both ends included")
    for field, depth in (("visual_adapter_layers", vision.depth),
                         ("text_adapter_layers", text.depth), ("features", vision.depth)):
        layers = getattr(config, field)
        if field in method.own_fields + ("features",) and any(not 0 <= i < depth for i in layers):
            raise ConfigError(f"{field} {layers}: the tower has {depth} blocks, 0 to {depth - 1}")
        if list(layers) != sorted(set(layers)):
            raise ConfigError(f"{field} {layers}: each block once, in order")
    if list(config.milestones) != sorted({epoch for epoch in config.milestones if epoch > 0}):
        raise ConfigError(f"milestones {config.milestones}: epochs from 1 on, each once, in order")
    if len(config.features) != 2:
        raise ConfigError(f"features {config.features}: the head takes two blocks and the last")
    if config.head_width % 4 or config.head_width % config.head_heads:
        raise ConfigError(f"head_width {config.head_width}: it must be a multiple of 4 and of "
                          f"head_heads, {config.head_heads}")
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"dropout {config.dropout} is not in [0, 1)")
    method.check(config, vision, text)


def build(preset, vision_weights=None, text_weights=None, init=None, **overrides):
    """A model from a preset's name, or a Config, and changed fields of its configuration.

    Towers come from the files given and are random without them; `model.sources` says which. They
    are frozen unless `train_towers`; with `train_positions` CLIP's position embeddings learn.
    A list among the fields counts as a tuple. `init`: (path, checkpoint) of a run whose towers to
    start from. Raises ConfigError, WeightsError, OSError.
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
            tower = read(path)
            path = backbones.weight_file(path)
            sources[kind] = {"file": Path(path).name, "sha256": sha256(path)}
            if tower.shape != expected:
                raise WeightsError(f"{path} holds {tower.shape}, but {kind} = "
                                   f"{getattr(config, kind)} means {expected}")
        if init is not None:
            held = {name: tensor for name, tensor in init[1]["tensors"].items()
                    if name.startswith(f"{kind}.")}
            backbones.load_tensors(tower, held, init[0], [("^", f"{kind}.")])
        towers[kind] = freeze(tower)
    model = wire(config, **towers)
    model.sources = sources
    return model


def wire(config, vision, text):
    """The model of a Config on two frozen towers, of which is freed what is to learn.

    CLIP's vision positions are resized to the run's own grid before they learn, as in the authors'
    programs.
    """
    vision.legacy_position_resize = config.legacy_position_resize
    model = METHODS[config.method](config, vision, text)
    if config.towers_learn:
        for tower in (vision, text):
            backbones.unfreeze(tower)
    if config.train_positions:
        if vision.shape.family == "clip":
            vision.resize(config.image_size)
        for position in clip_positions(model):
            position.requires_grad_(True)
    return model


def clip_positions(model):
    """The position embeddings that the authors of ETRIS and BarLeRIa let learn: those of CLIP's
    towers and of EVA-02-CLIP's text tower (all that is named `positional_embedding` there)."""
    return [tower.position for tower in (model.vision, model.text)
            if tower.shape.family not in ("dinov2", "eva")]


def find_weights(config, vision_weights=None, text_weights=None):
    """The paths of both towers' files: those given, else the published names in `pretrained/`.

    Towers without published weights (the drawn data's) have None. Raises FileNotFoundError that
    says where a missing file is to be had.
    """
    found = []
    for name, path in ((config.vision, vision_weights), (config.text, text_weights)):
        found.append(find_published(name, path) if name in PUBLISHED else path)
    return found


def find_published(name, path=None):
    """`path`, or the file published under this name in `pretrained/`. FileNotFoundError."""
    published = PUBLISHED[name]
    path = Path(path) if path is not None else PRETRAINED / published.file
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `python backbones.py download {name}` "
                                f"fetches it; it is published as {published.file} at "
                                f"{published.address}")
    return path


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------

def tuned_tensors(model):
    """Name -> tensor of all that a checkpoint must hold: what was tuned, and the head.

    Left out are the tensors of towers that are frozen and came from a file.
    """
    parameters = dict(model.named_parameters())
    return {name: tensor for name, tensor in model.state_dict().items()
            if model.sources.get(name.split(".")[0]) is None
            or name in parameters and parameters[name].requires_grad}


@contextlib.contextmanager
def replacing(path, previous=None):
    """A binary file to write that becomes `path` only once it is whole and on the disk.

    What stood there before becomes `previous`, if that is given. OSError names `path`; what stood
    there is then still at `path`, or at `previous`.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:      # ValueError: a picture too large for its format
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: could not be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def save(path, model, previous=None, **more):
    """Writes a checkpoint: configuration, the towers' file names and SHA-256, tuned tensors.

    `more` is kept beside them (plain values and tensors). The zip file that PyTorch makes of it has
    a checksum for each part. `previous` and OSError are those of `replacing`.
    """
    checkpoint = {"config": asdict(model.config), "towers": model.sources,
                  "tensors": tuned_tensors(model), **more}
    with replacing(path, previous) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:       # PyTorch's writer hides the OSError of a full disk
            hidden = error.__context__
            raise hidden if isinstance(hidden, OSError) else OSError("is the disk full?") from error


def read_checkpoint(path):
    """{config, towers, tensors, run, vocabulary, ...} as `save` or `export` wrote it, or {released,
    run, vocabulary} with the named tensors of the authors' programs.

    `config` is a Config. Raises WeightsError for anything else, OSError.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if str(path).endswith(".safetensors"):
        tensors, notes = backbones.read_safetensors(path)
        try:
            checkpoint = {**json.loads(notes["ris"]), "tensors": tensors}
            checkpoint["config"] = {field: tuple(value) if isinstance(value, list) else value
                                    for field, value in checkpoint["config"].items()}
        except (KeyError, ValueError, TypeError, AttributeError):
            raise WeightsError(f"{path}: not a file that `model.py export` wrote") from None
    else:
        checkpoint = backbones.read_file(path)
    released = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if isinstance(released, dict) and all(isinstance(name, str) for name in released):
        return {"released": released, "run": {}, "vocabulary": {}}
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(part), dict) for part in ("config", "towers", "tensors")):
        raise WeightsError(f"{path}: not a checkpoint of this project (config, towers, tensors)")
    if checkpoint["towers"].keys() != {"vision", "text"} or not all(
            source is None or isinstance(source, dict) and source.keys() == {"file", "sha256"}
            for source in checkpoint["towers"].values()):
        raise WeightsError(f"{path}: its towers are not a file and its sha256 each")
    for part in ("run", "vocabulary"):      # train.py's additions
        if not isinstance(checkpoint.setdefault(part, {}), dict):
            raise WeightsError(f"{path}: its {part} is not a table")
    text, seconds = checkpoint["vocabulary"].get("text", ""), checkpoint.get("seconds", 0.0)
    if not (all(isinstance(name, str) for name in checkpoint["tensors"])
            and isinstance(text, str) and isinstance(seconds, (int, float))
            and all(isinstance(checkpoint["run"].get(fact, ""), str)
                    for fact in ("preset", "dataset"))):
        raise WeightsError(f"{path}: the names of its tensors, its vocabulary, preset, data set or "
                           f"seconds are of a wrong type")
    try:
        checkpoint["config"] = Config(**checkpoint["config"])
        check(checkpoint["config"])
    except (TypeError, ConfigError) as error:
        raise WeightsError(f"{path}: its configuration cannot be built: {error}") from None
    return checkpoint


def load(path, vision_weights=None, text_weights=None, checkpoint=None):
    """A model in eval mode from a checkpoint, which is read unless it is given.

    Tower files are those given, or looked for in `pretrained/`, and must be the ones it was trained
    with (SHA-256). Raises WeightsError or OSError.
    """
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
    if "released" in checkpoint:
        return load_released(path, checkpoint["released"])
    config = checkpoint["config"]
    weights = []
    for kind, given in (("vision", vision_weights), ("text", text_weights)):
        name = getattr(config, kind)
        if checkpoint["towers"][kind] and name not in PUBLISHED:
            raise WeightsError(f"{path}: the {kind} tower {name!r} comes from no file")
        weights.append(find_published(name, given) if checkpoint["towers"][kind] else None)
    model = build(config, *weights)
    for kind, source in checkpoint["towers"].items():
        if source and source["sha256"] not in (None, model.sources[kind]["sha256"]):
            raise WeightsError(f"{path}: trained with {source['file']} of SHA-256 "
                               f"{str(source['sha256'])[:16]}..., but the file at hand has "
                               f"{model.sources[kind]['sha256'][:16]}...")
    backbones.load_tensors(model, checkpoint["tensors"], path, expected=tuned_tensors(model))
    return model.eval()


def export(checkpoint_path, out):
    """Writes what was tuned, the head and the configuration of a checkpoint, and nothing else.

    OUT.pt is a checkpoint as `save` writes it; OUT.safetensors holds the same tensors, and the rest
    as JSON in its metadata. Both load again. Raises WeightsError, OSError.
    """
    if os.path.exists(out) and os.path.samefile(checkpoint_path, out):
        raise OSError(f"{out}: would be written over what it is made of")
    checkpoint = read_checkpoint(checkpoint_path)
    net = load(checkpoint_path, checkpoint=checkpoint)
    odd = [name for name in (net.config.vision, net.config.text) if name.startswith("released-")]
    if odd:
        raise WeightsError(f"{checkpoint_path}: without its tower {odd[0]}, which was published "
                           f"nowhere else, it could not be loaded again")
    kept = {part: checkpoint[part] for part in ("run", "vocabulary")}
    if not str(out).endswith(".safetensors"):
        return save(out, net, **kept)
    try:
        import safetensors.torch
    except ImportError:
        raise WeightsError(f"{out}: to write .safetensors files, pip install safetensors; or name "
                           f"it .pt") from None
    notes = json.dumps({"config": asdict(net.config), "towers": net.sources, **kept})
    tensors = {name: tensor.contiguous() for name, tensor in tuned_tensors(net).items()}
    with replacing(out) as file:
        file.write(safetensors.torch.save(tensors, {"ris": notes}))


# ---------------------------------------------------------------------------------------------
# The table of parameters
# ---------------------------------------------------------------------------------------------

def count(model):
    """Parameters: frozen, tuned (all that learns but for the next two), positions, head.

    Positions are `clip_positions` where they learn. The authors of ETRIS and BarLeRIa let them,
    without counting them, and DCRIS's figure for full tuning does not count them, either.
    """
    apart = {id(position) for position in clip_positions(model)}
    sizes = {"frozen": 0, "tuned": 0, "positions": 0, "head": 0}
    for name, parameter in model.named_parameters():
        kind = ("head" if name.startswith("head.") else
                "frozen" if not parameter.requires_grad else
                "positions" if id(parameter) in apart else "tuned")
        sizes[kind] += parameter.numel()
    return sizes


def differences(overrides):
    """In words, how a row of the table differs from its preset."""
    layers = overrides.get("visual_adapter_layers", ())
    if layers and layers == overrides["text_adapter_layers"]:
        return f", layers {list(layers)}"
    return "".join(f", {field.replace('_adapter_', ' ')} "
                   f"{list(value) if isinstance(value, tuple) else value}"
                   for field, value in overrides.items())


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
    for preset, overrides, paper in TABLE:
        with torch.device("meta"):          # shapes only, no memory
            sizes = count(build(preset, **overrides))
        rows.append({"preset": preset + differences(overrides), **sizes, "paper_millions": paper})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print("Parameters in millions. Tuned: all that learns but for the head and CLIP's position\n"
          "embeddings; beside it the paper's figure.\n")
    print("| preset | frozen | tuned | paper | positions | head |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        paper = "" if row["paper_millions"] is None else f"{row['paper_millions']:.2f}"
        print(f"| {row['preset']} | {row['frozen'] / 1e6:.2f} | {row['tuned'] / 1e6:.2f} | {paper} "
              f"| {row['positions'] / 1e6:.2f} | {row['head'] / 1e6:.2f} |")


# ---------------------------------------------------------------------------------------------
# Checkpoints of the authors' programs, DETRIS and ETRIS
# ---------------------------------------------------------------------------------------------

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

    Every width, rank, layer and grid is read off the names and shapes. Not in the files, and taken
    as in the authors' configurations: 8 heads, heads of 64 in the towers, 17 tokens, the blocks
    whose maps the head takes, the size of DETRIS's photos, 448 pixels. (In ETRIS's files the grid
    of positions is that of the photo.)
    """
    backbones.check_plain(path, state)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    detris = any(name.startswith("dinov2.") for name in state)
    prefixes = ("dinov2.", "txt_backbone.") if detris else ("backbone.", "backbone.")

    def part(prefix):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()
                if name.startswith(prefix) and ".adapter." not in name}

    def size(name, axis=0):
        if name not in state or state[name].ndim <= axis:
            raise WeightsError(f"{path}: tensor {name} is missing or misshapen")
        return state[name].shape[axis]

    def numbers(pattern):
        matches = (re.match(pattern, name) for name in state)
        return tuple(sorted({int(match[1]) for match in matches if match}))

    vision = backbones.vision_tower(path, part(prefixes[0]))
    text = backbones.text_tower(path, part(prefixes[1]))
    third = vision.shape.depth // 3
    common = {
        "vision": shape_name(VISION, vision.shape), "text": shape_name(TEXT, text.shape),
        "head_width": size("neck.aggr.0.weight"),
        "head_layers": len(numbers(r"decoder\.layers\.(\d+)\."))}
    if detris:
        visual = numbers(r"dinov2\.blocks\.(\d+)\.adapter\.")
        words = numbers(r"txt_backbone\.transformer\.resblocks\.(\d+)\.adapter\.")
        resblock = "txt_backbone.transformer.resblocks"
        ranks = {}
        if visual:
            ranks["visual_adapter_rank"] = size(f"dinov2.blocks.{visual[0]}.adapter.D_fc1.weight")
        if words:
            ranks["text_adapter_rank"] = size(f"{resblock}.{words[0]}.adapter.D_fc1.weight")
        config = Config(
            visual_adapter_layers=visual, text_adapter_layers=words, legacy_position_resize=True,
            text_convolutions=any(".adapter.dense_branch1." in name for name in state
                                  if name.startswith(resblock)),
            features=(third, 2 * third), image_size=448, **ranks, **common)
    else:
        config = replace(
            ETRIS_B, bridges=len(numbers(r"bridger\.linear1\.(\d+)\.")),
            bridge_width=size("bridger.linear1.0.weight"), features=(third - 1, 2 * third - 1),
            image_size=vision.shape.grid * vision.shape.patch, **common)
    try:
        check(config)
    except ConfigError as error:
        raise WeightsError(f"{path}: no model can be made of it: {error}") from None
    net = wire(config, vision, text)
    net.sources = {kind: {"file": PUBLISHED[name].file if name in PUBLISHED else "", "sha256": None}
                   for kind, name in (("vision", config.vision), ("text", config.text))}
    own = {name: tensor for name, tensor in net.state_dict().items()
           if not name.startswith(("vision.", "text."))}
    rest = {name: tensor for name, tensor in state.items()
            if not name.startswith(prefixes) or ".adapter." in name}
    backbones.load_tensors(net, in_our_shapes(rest, config.bridges), path, RELEASED_NAMES, own)
    return net.eval()


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


def shape_name(table, shape):
    """The name of a tower's shape in VISION or TEXT; a new one is entered there, for `check`."""
    for name, known in table.items():
        # ETRIS's files hold CLIP's positions on the grid of the photo.
        if known == (replace(shape, grid=known.grid) if shape.family == "clip" else shape):
            return name
    name = f"released-{shape.width}x{shape.depth}"
    table[name] = shape
    return name


if __name__ == "__main__":
    try:
        main()
    except (WeightsError, ConfigError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
