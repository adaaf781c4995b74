"""DCRIS, BarLeRIa, ETRIS and the tuners they are compared with; presets; saving and loading.

    python model.py             the presets and their parameters, beside the papers' figures
    python model.py --json      the same for programs

`build(name)` makes a model, `load(path)` reads a checkpoint. A model maps images (B, 3, S, S),
normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P) for patches of P pixels.
"""

import argparse
import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
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
    """What a model is made of, and its training recipe."""
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
    exact_masks: bool = False           # logits are enlarged to the photo's pixels (`loss.py`)
    batch_size: int = 32                # over all processes together
    lr: float = 1e-4
    warmup: int = 0                     # steps in which the learning rate rises to `lr`
    epochs: int = 50
    milestones: tuple[int, ...] = (35,)     # after each, the learning rate is divided by 10

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
        self.head = make_head(config, vision, text, residual=True)

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
        """Images and words to the three maps f_v (B, width, S/P, S/P)."""
        grid = self.vision.grid(images)
        attached = {int(i): Attached(beside_mlp=partial(adapter, words=words, grid=grid))
                    for i, adapter in self.dense_cross_adapters.items()}
        return feature_maps(self.vision, images, self.config.features, attached)


def make_head(config, vision, text, residual):
    """The head. Its last map is in CLIP's space if the vision tower has one."""
    widths = [vision.shape.width, vision.shape.width, vision.projected_width]
    return Head(widths, text.shape.width, text.shape.embed, config.head_width, config.head_heads,
                config.head_layers, config.dropout, residual)


def feature_maps(vision, images, wanted, attached):
    """Images to the maps (B, D or E, S/P, S/P) after the blocks `wanted` and at the tower's end.

    `attached`: number of a block -> what a tuning method attaches to it.
    """
    grid = vision.grid(images)
    x, rotary, maps = vision.embed(images), vision.rotary_tables(grid), []
    for i, block in enumerate(vision.blocks):
        x = block(x, attached.get(i, Attached()), rotary)
        if i in wanted:
            maps.append(vision.as_map(x, grid))
    return [*maps, vision.as_map(vision.projection(vision.norm(x)), grid)]


class BarLeRIa(nn.Module):
    """BarLeRIa (Wang et al., 2024, Figure 2): two towers side by side and a global branch.

    Both are CLIP's, and frozen (in the authors' program all but the positions). Their blocks have
    normalizing flows on their shortcuts and receive visiting tokens from the other tower. The
    global branch reads the patches after every third of 12 blocks.
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
        self.head = make_head(config, vision, text, residual=False)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        grid, padding = self.vision.grid(images), after_end(tokens)
        after_block, words, sentence = self.local_branch(images, tokens, grid)
        projected = self.vision.projection(self.vision.norm(after_block[-1]))   # (B, N, E)
        features = [self.vision.as_map(x, grid)
                    for x in (*(after_block[i] for i in self.config.features), projected)]
        shortcut = None
        if self.global_branch is not None:
            prefix = self.vision.prefix
            prior = global_prior(words @ self.text.projection, projected[:, prefix:], padding)
            stages = [after_block[part[-1]][:, prefix:]                 # 2, 5, 8, 11 of 0 to 11
                      for part in cut(len(after_block), self.config.global_blocks)]
            shortcut = self.global_branch(images, words, prior, stages, grid)   # F_out^M
        return self.head(features, words, sentence, padding, shortcut)      # Eq. 9: neck + shortcut

    def local_branch(self, images, tokens, grid):
        """BarLeRIa Eq. 2-3: both towers block by block, with visiting tokens.

        Returns the vision tower's tokens (B, N, D) after every block, words and sentence. A deeper
        vision tower runs several blocks per text block. All of them receive the same words; the
        text block receives the class token from before the first of them.
        """
        x, words = self.vision.embed(images), self.text.embed(tokens)
        rotary, after_block = self.vision.rotary_tables(grid), []
        parts = cut(len(self.vision.blocks), len(self.text.blocks))
        for text_block, text_flows, part in zip(self.text.blocks, self.text_flows, parts):
            visiting_words, visiting_class = x[:, :0], words[:, :0]     # none, as wide as the host
            if self.intertwiner is not None:
                visiting_words, visiting_class = self.intertwiner(words, x[:, :1])
            for j in part:
                x = with_visitors(self.vision.blocks[j], x, visiting_words, self.vision.prefix,
                                  self.visual_flows[j], rotary)
                after_block.append(x)
            words = with_visitors(text_block, words, visiting_class, 0, text_flows)
        return after_block, *self.text.final(words, tokens)


def cut(depth, parts):
    """The numbers of `depth` blocks, in parts of nearly equal size: a list of ranges."""
    return [range(depth * i // parts, depth * (i + 1) // parts) for i in range(parts)]


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

    The towers are frozen but for CLIP's positions. With normalizing flows on the vision tower's
    shortcuts this is the "SNF+ETRIS" of BarLeRIa's tables.
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
        self.head = make_head(config, vision, text, residual=False)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        grid, prefix = self.vision.grid(images), self.vision.prefix
        x, words = self.vision.embed(images), self.text.embed(tokens)
        rotary, reduced, after_block = self.vision.rotary_tables(grid), None, []
        vision_parts, text_parts = (cut(len(tower.blocks), len(self.bridges))
                                    for tower in (self.vision, self.text))
        for bridge, vision_part, text_part in zip(self.bridges, vision_parts, text_parts):
            for j in vision_part:
                x = self.vision.blocks[j](x, Attached(*self.visual_flows[j]), rotary)
                after_block.append(x)
            for j in text_part:
                words = self.text.blocks[j](words)
            patches, words, reduced = bridge(x[:, prefix:], words, reduced)
            after_block[-1] = x = torch.cat([x[:, :prefix], patches], dim=1)
        words, sentence = self.text.final(words, tokens)
        projected = self.vision.projection(self.vision.norm(x))
        features = [self.vision.as_map(tokens_i, grid) for tokens_i in (
            *(after_block[i] for i in self.config.features), projected)]
        return self.head(features, words, sentence, after_end(tokens))


class UniModal(nn.Module):
    """The tuners of DCRIS Table 2 that change each tower alone. Photo and words meet in the head.

    `full`: both towers learn. `fixed`: neither does. `houlsby`, `compacter`: an adapter after the
    MLP of every block. `lora`: beside all linear layers of vision blocks, and those of the
    attention in text blocks (there query, key and value count as three layers, which gives the
    paper's 1.57 million; the paper does not say where it puts them).
    """

    def __init__(self, config, vision, text):
        super().__init__()
        self.config, self.vision, self.text = config, vision, text
        rank = config.tuner_rank
        blocks = [(block, tower.shape.width) for tower in (vision, text) for block in tower.blocks]
        if config.method == "houlsby":
            for block, width in blocks:
                block.mlp = nn.Sequential(block.mlp, BottleneckAdapter(width, rank, scale=1))
        elif config.method == "compacter":
            self.factors = nn.Parameter(torch.randn(4, 4, 4) / 2)
            for block, width in blocks:
                block.mlp = nn.Sequential(block.mlp, CompacterAdapter(width, rank, self.factors))
        elif config.method == "lora":
            for part in (part for block in vision.blocks for part in (block.attention, block.mlp)):
                for name, layer in list(part.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, LoRA(layer, rank))
            for block in text.blocks:
                block.attention.qkv = LoRA(block.attention.qkv, rank, parts=3)
                block.attention.out = LoRA(block.attention.out, rank)
        self.head = make_head(config, vision, text, residual=True)

    def forward(self, images, tokens):
        """Images (B, 3, S, S), normalised, and token ids (B, L) to logits (B, 1, 4S/P, 4S/P)."""
        words, sentence = self.text(tokens)
        features = feature_maps(self.vision, images, self.config.features, {})
        return self.head(features, words, sentence, after_end(tokens))


# ---- Presets --------------------------------------------------------------------------------

# For drawn data: small and quick to train. No pretrained towers exist, so the towers learn, too.
# The vision tower is a small DINOv3: from nothing, its rotary positions learn places sooner.
DRAWN = {"train_towers": True, "train_positions": False, "text": "small", "image_size": 64,
         "features": (0, 1), "head_width": 64, "head_heads": 2, "head_layers": 1, "dropout": 0.0,
         "exact_masks": True, "lr": 1.5e-3, "warmup": 100, "epochs": 4, "milestones": (3,)}
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
        DCRIS_B, vision="small", visual_adapter_layers=(1,), visual_adapter_rank=16,
        text_adapter_layers=(1,), text_adapter_rank=16, **DRAWN),
    "shapes-barleria": replace(
        BARLERIA, vision="small-clip", intertwined_rank=16, global_blocks=2, global_width=48,
        global_heads=2, global_queries=8, global_patch=8, **DRAWN),
    "dcris-b": DCRIS_B,
    "dcris-l": DCRIS_L,
    # Beyond the papers: DINOv3. Its patches of 16 pixels give the grid of 32x32 at 512.
    "dcris-b-dinov3": replace(DCRIS_B, vision="dinov3-b", image_size=512),
    "dcris-l-dinov3": replace(DCRIS_L, vision="dinov3-l", image_size=512),
    "detris-b": DETRIS_B,
    "detris-l": DETRIS_L,
    "detris-l-mixed": replace(
        DETRIS_L, visual_adapter_rank=384, visual_adapter_layers=tuple(range(1, 24)),
        text_adapter_rank=384, text_adapter_layers=tuple(range(1, 12))),
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
    **{method: replace(DCRIS_B, method=method) for method in ("full", "fixed", "houlsby")},
    "compacter": replace(DCRIS_B, method="compacter", tuner_rank=208),
    "lora": replace(DCRIS_B, method="lora", tuner_rank=8),
}
# All tuners on the towers of a run on drawn data (`train.py --init`). Ranks and widths give each
# 0.17 to 0.18 million parameters; `full` has more, `fixed`, flows and visiting tokens fewer.
PRESETS |= {
    f"shapes-{name}": replace(PRESETS["shapes" if name == "dcris" else name], **sizes,
                              **{**DRAWN, "vision": "small", "train_towers": False})
    for name, sizes in {
        "full": {}, "fixed": {}, "houlsby": {"tuner_rank": 181}, "compacter": {"tuner_rank": 712},
        "lora": {"tuner_rank": 28}, "dcris": {"visual_adapter_layers": (0, 2)},
        "etris": {"bridges": 2, "bridge_width": 80},
        "snf": {}, "snf-etris": {"bridges": 2, "bridge_width": 80},
        "barleria-local": {"intertwined_rank": 16}}.items()}
# Millions of tuned parameters as the papers print them (DCRIS Table 2, BarLeRIa Table 4).
PAPER = {"full": 149.97, "fixed": 0.00, "houlsby": 1.98, "compacter": 1.62, "lora": 1.57,
         "dcris-b": 2.69, "etris": 1.39, "snf": 0.18, "snf-etris": 1.57, "barleria-local": 0.39,
         "barleria": 2.21}


# ---- Building -------------------------------------------------------------------------------

# Method -> its class, and how the fields begin that it reads but some other method does not.
METHODS = {
    "dcris": (DCRIS, ("visual_adapter", "text_adapter", "text_convolutions", "legacy_position")),
    "barleria": (BarLeRIa, ("visual_flows", "text_flows", "flow_steps", "intertwined", "global")),
    "etris": (ETRIS, ("visual_flows", "flow_steps", "bridge")),
    **dict.fromkeys(("full", "fixed"), (UniModal, ())),
    **dict.fromkeys(("houlsby", "compacter", "lora"), (UniModal, ("tuner_rank",))),
}


def configure(preset, **overrides):
    """The configuration of a preset (or a Config) with some fields changed; lists become tuples.

    Raises ConfigError; TypeError for a name that is no field.
    """
    config = PRESETS.get(preset) if isinstance(preset, str) else preset
    require(config, f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    config = replace(config, **{field: tuple(value) if isinstance(value, list) else value
                                for field, value in overrides.items()})
    check(config)
    return config


def usual_length(config, dataset):
    """Tokens per expression: 22 on G-Ref and mixed, else those of `config`, which is a preset's.
    As in the authors' program, `detris-*` have 22 on G-Ref umd alone, `detris-l-mixed` nowhere."""
    detris = config.text_convolutions
    long = ["refcocog-umd"] if detris else ["refcocog-umd", "refcocog-google", "mixed"]
    return 22 if dataset in long and config != PRESETS["detris-l-mixed"] else config.length


def require(condition, message):
    if not condition:
        raise ConfigError(message)


def check(config):
    """Raises ConfigError, which names the field, if no model can have this configuration."""
    for field, names in (("method", METHODS), ("vision", VISION), ("text", TEXT)):
        require(getattr(config, field) in names,
                f"{field} {getattr(config, field)!r} is unknown; there are {', '.join(names)}")
    vision, text, (method, own) = VISION[config.vision], TEXT[config.text], METHODS[config.method]
    others = tuple(start for _, starts in METHODS.values() for start in starts)
    for field, value in asdict(config).items():
        if field.startswith(others) and not field.startswith(own):
            require(value == getattr(Config, field), f"{field} plays no part in method "
                    f"{config.method}; take a preset of another method")
        if type(value) in (int, float):
            enough = value >= 0 if field in ("dropout", "global_blocks", "warmup") else value > 0
            require(enough, f"{field} {value} is too small")
    require(3 <= config.length <= text.positions,
            f"length {config.length}: {config.text} reads 3 to {text.positions} tokens")
    require(config.dropout < 1, f"dropout {config.dropout} is not below 1")
    require(len(config.features) == 2, f"features {config.features}: name two blocks")
    require(method is not BarLeRIa or config.text in ("small", config.vision),
            f"vision {config.vision} and text {config.text} are not the two towers of one CLIP")
    layers = {"features": vision.depth}
    if method is DCRIS:
        layers |= {"visual_adapter_layers": vision.depth, "text_adapter_layers": text.depth}
    for field, depth in layers.items():
        blocks = getattr(config, field)
        require(blocks == tuple(i for i in range(depth) if i in blocks), f"{field} {blocks}: the "
                f"tower has {depth} blocks, 0 to {depth - 1}; name each block once, in order")
    for kind, field in ((BarLeRIa, "global_blocks"), (ETRIS, "bridges")):
        require(method is not kind or getattr(config, field) <= vision.depth,
                f"{field} {getattr(config, field)}: the vision tower has {vision.depth} blocks")
    for field, divisor in (
            ("image_size", vision.patch), ("head_width", 4), ("head_width", config.head_heads),
            ("visual_adapter_rank", 16),
            ("text_adapter_rank", 16 if config.text_convolutions else 1),
            ("global_width", config.global_heads), ("bridge_width", config.bridge_heads),
            ("tuner_rank", 4 if config.method == "compacter" else 1)):
        value = getattr(config, field)
        require(value % divisor == 0, f"{field} {value} is no multiple of {divisor}; "
                                      f"{max(1, round(value / divisor)) * divisor} is")


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
    model = METHODS[config.method][0](config, vision, text)
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
            if tower.shape.family not in ("dinov2", "dinov3", "eva")]


def find_published(name, path=None):
    """`path`, or the file in `pretrained/` that is published under this name; None if none is.
    Raises FileNotFoundError, which says where to get it."""
    if name not in PUBLISHED:               # a tower for drawn data
        return path
    path = Path(path or PRETRAINED / PUBLISHED[name].file)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `python backbones.py download {name}` "
                                f"gets it, or says how, from {PUBLISHED[name].address}")
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
    Raises OSError, which names `path`; the old file is then still there."""
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
        raise OSError(f"{path}: could not be written: {cause}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def save(path, model, **more):
    """Writes a checkpoint: configuration, the towers' files and SHA-256, tuned tensors, `more`.
    Raises OSError."""
    with replacing(path) as file:
        torch.save({"config": asdict(model.config), "towers": model.sources, "run": {},
                    "vocabulary": {}, **more, "tensors": tuned_tensors(model)}, file)


def read_checkpoint(path):
    """The dictionary that `save` wrote, with a Config in "config".

    A file of the authors' programs gives {released, run, vocabulary} instead. Raises OSError, and
    WeightsError for any other content.
    """
    try:
        content = backbones.read_file(path)
        if "state_dict" in content:
            return {"run": {}, "vocabulary": {}, "released": {
                name.removeprefix("module."): tensor
                for name, tensor in content["state_dict"].items()}}
        return {**content, "config": configure(Config(), **content["config"])}
    except (KeyError, TypeError, AttributeError, RuntimeError, ConfigError) as error:
        raise WeightsError(f"{path}: not a checkpoint of this project "
                           f"({type(error).__name__}: {error})") from None


def load(path, vision_weights=None, text_weights=None, checkpoint=None):
    """A model in eval mode from a checkpoint; pass `checkpoint` if it was read already.

    A tower that is not in the checkpoint is read from the file given, or from `pretrained/`. It
    must be the file of the training run (SHA-256). Raises WeightsError or OSError.
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
            raise WeightsError(f"{path}: {kind}_weights must be the {source['file']} of the "
                               f"training run, of SHA-256 {source['sha256']}")
    backbones.load_tensors(tuned_tensors(model), checkpoint["tensors"], path)
    return model.eval()


# ---- The table of parameters ----------------------------------------------------------------

def count(model):
    """Numbers of parameters: frozen, positions (`clip_positions`, if they learn), head, and tuned:
    all others that learn. None of the papers counts the positions, even where they learn."""
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
    args = parser.parse_args()
    with torch.device("meta"):              # shapes only, no memory
        rows = [{"preset": name, **count(build(name)), "paper_millions": PAPER.get(name)}
                for name in PRESETS]
    if args.json:
        return print(json.dumps(rows, indent=1))
    print("Parameters in millions. Tuned: all that learns, without the head and CLIP's position\n"
          "embeddings. Paper: the printed figure for tuned.\n")
    print("| preset | frozen | tuned | paper | positions | head |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [f"{row[part] / 1e6:.2f}" for part in ("frozen", "tuned", "positions", "head")]
        cells.insert(2, "" if row["paper_millions"] is None else f"{row['paper_millions']:.2f}")
        print(f"| {row['preset']} | {' | '.join(cells)} |")


# ---- Checkpoints of the authors' programs, DETRIS and ETRIS ---------------------------------

# What a tensor is called here, as a regular expression, and in their files (behind "module.").
RELEASED_NAMES = [
    ("^head.neck.sentence", "neck.txt_proj"), ("^head.neck.fuse", "neck.aggr"),
    (r"^head.neck.maps.(\d)", lambda m: f"neck.f{int(m[1]) + 3}_proj"),
    (r"^head.neck.gates.(\d)", lambda m: f"neck.fusion{int(m[1]) + 3}.multihead_attn"),
    (r"^(neck.fusion.*)\.out\.", r"\1.out_proj."),
    ("^head.neck.coordinates", "neck.coordconv"), ("coordconv.0", "coordconv.0.conv1"),
    ("^head.decoder", "decoder"), (".self_attention", ".self_attn"),
    (".cross_attention_norm", ".cross_attn_norm"), (".cross_attention", ".multihead_attn"),
    (".feed_forward", ".ffn"), ("^head.projector.sentence", "proj.txt"),
    # They have the upsamplings between.
    (r"^head.projector.image.(\d)", lambda m: f"proj.vis.{(1, 3, 4)[int(m[1])]}"),
    (r"^dense_cross_adapters.(\d+)", r"dinov2.blocks.\1.adapter"),
    (r"^text_adapters.(\d+)", r"txt_backbone.transformer.resblocks.\1.adapter"),
    (".adapter.down", ".adapter.D_fc1"), (".adapter.up", ".adapter.D_fc2"),
    (r".dense.branch(.*)\.0\.(\w+)$", r".dense_branch\1.conv.\2"),
    (r".dense.branch(.*)\.1\.(\w+)$", r".dense_branch\1.bn.\2"),
    (".cross.query", ".cross.image_proj"), (".cross.words", ".cross.text_proj"),
    (".cross.back", ".cross.back_proj"), (".cross.attention", ".cross.multihead_attn"),
    (r"^bridges.(\d).patches_down", r"bridger.zoom_in.\1"),
    (r"^bridges.(\d).patches_up", r"bridger.zoom_out.\1"),
    (r"^bridges.(\d).words_down", r"bridger.linear1.\1"),
    (r"^bridges.(\d).words_up", r"bridger.linear2.\1"),
    (r"^bridges.(\d).patches_read", r"bridger.fusion_v.\1.multihead_attn"),
    (r"^bridges.(\d).words_read", r"bridger.fusion_t.\1.multihead_attn"),
    (r"^bridges.(\d).patches_norm", lambda m: f"bridger.ln_v.{int(m[1]) - 1}"),
    (r"^bridges.(\d).words_norm", lambda m: f"bridger.ln_t.{int(m[1]) - 1}"),
]


def load_released(path, state):
    """A model in eval mode from the tensors of a released DETRIS or ETRIS checkpoint.

    The released models are the presets `detris-b`, `detris-l`, `detris-l-mixed`, and `etris` with
    bridges of width 64 (the one on ViT-B/16). Any other file raises WeightsError.
    """
    detris = any(name.startswith("dinov2.") for name in state)
    prefixes = ("dinov2.", "txt_backbone.") if detris else ("backbone.", "backbone.")
    vision, text = (
        read(path, state={name.removeprefix(prefix): tensor for name, tensor in state.items()
                          if name.startswith(prefix) and ".adapter." not in name})
        for read, prefix in zip((backbones.load_vision, backbones.load_text), prefixes))
    state = {name: tensor for name, tensor in state.items()
             if ".adapter." in name or not name.startswith(prefixes)}
    mixed = "dinov2.blocks.1.adapter.D_fc1.bias" in state       # in every block but the first
    config = (configure("etris", bridge_width=64) if not detris else
              PRESETS["detris-b"] if vision.shape.depth < 24 else
              PRESETS["detris-l-mixed" if mixed else "detris-l"])
    model = wire(config, vision, text)
    model.sources = dict.fromkeys(("vision", "text"), {"file": Path(path).name, "sha256": None})
    own = {name: tensor for name, tensor in model.state_dict().items()
           if not name.startswith(("vision.", "text."))}
    # Some 1x1 convolutions are transposed ones, with weights (in, out, 1, 1).
    transposed = {"neck.f5_proj.0.weight", *(f"bridger.zoom_{part}.0.weight"
                                             for part in ("in.2", "out.0", "out.1"))}
    in_our_shapes = {}
    for name, tensor in state.items():
        if name in transposed:
            tensor = tensor.transpose(0, 1)
        if name.startswith("neck.") and ".in_proj_" in name:    # only values matter: `head.Gate`
            name, tensor = name.replace("in_proj_", "value."), tensor.chunk(3)[-1]
        in_our_shapes[name] = tensor
    backbones.load_tensors(own, in_our_shapes, path, RELEASED_NAMES)
    return model.eval()


if __name__ == "__main__":
    main()
