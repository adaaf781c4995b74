"""All tests: `python test_all.py`. They need no weights, no data and no GPU, and a few minutes.

`MANY=20 python test_all.py` kills runs 20 times at random moments, takes steps of all presets at
their photos' full size. CLIP's vocabulary is looked for in pretrained/ and ../shared/pretrained/;
without it, the tests of CLIP's token ids are skipped with a message.
"""

import argparse
import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import adapters
import backbones
import data
import evaluate
import head
import loss
import model
import train

HERE = Path(__file__).resolve().parent
VOCABULARY = next((folder / "bpe_simple_vocab_16e6.txt.gz"
                   for folder in (HERE / "pretrained", HERE.parent / "shared" / "pretrained")
                   if (folder / "bpe_simple_vocab_16e6.txt.gz").is_file()), None)
CPU = torch.device("cpu")
# All tests but those of class Gpu run on CPUs, in this process and in those that it starts.
GPU = torch.cuda.is_available()
torch.cuda.is_available = lambda: False
os.environ["CUDA_VISIBLE_DEVICES"] = ""
SAFETENSORS = importlib.util.find_spec("safetensors")
MANY = int(os.environ.get("MANY", 0))
TINY = {"train": 40, "val": 8, "test": 5}           # scenes
# The small model, smaller; dropout off, so that runs can be compared.
SMALL_RUN = ["--epochs", "2", "--milestones", "1", "--batch-size", "8", "--lr", "1e-3",
             "--warmup", "2", "--head-width", "32", "--head-heads", "2", "--head-layers", "1"]


def program(module, *arguments, status=0):
    """Runs a program's command line, which must end with this status: its output and errors."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [module.__file__, *map(str, arguments)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluate.run(module.main)
        except SystemExit as stop:
            found = stop.code or 0
    assert found == status, (found, err.getvalue())
    return out.getvalue(), err.getvalue()


def folder(test):
    """A temporary folder that goes with the test, or with the class of tests."""
    place = tempfile.TemporaryDirectory()
    (test.addClassCleanup if isinstance(test, type) else test.addCleanup)(place.cleanup)
    return Path(place.name)


def shake(module, spread=0.5):
    """Random numbers in all parameters, in double precision, so that nothing cancels."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=spread, generator=generator)
    return module


# ---- Plain restatements: the layers as their formulas ---------------------------------------

def plain_conv_bn_relu(x, layers):
    """x is a map (B, C, H, W), or a sequence (B, C, L)."""
    convolve = F.conv1d if x.ndim == 3 else F.conv2d
    x = convolve(x, layers[0].weight, layers[0].bias, padding="same").movedim(1, -1)
    tokens = x.flatten(0, -2)
    x = (x - tokens.mean(0)) / torch.sqrt(tokens.var(0, unbiased=False) + layers[1].eps)
    return (x * layers[1].weight + layers[1].bias).clamp(min=0).movedim(-1, 1)


def plain_branches(x, dense):
    """DCRIS Eq. 1: three branches, each fed by the input and all branches before it."""
    found = [x]
    for branch in ([dense.branch1], dense.branch2, dense.branch3):
        y = torch.cat(found, 1)
        for layers in branch:
            y = plain_conv_bn_relu(y, layers)
        found.append(y)
    return torch.cat(found[1:], 1)


def plain_linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def plain_bottleneck(x, layers):
    return plain_linear(plain_linear(x, layers[0]).clamp(min=0), layers[2])


def plain_norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def plain_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def plain_heads(q, k, v, heads, hidden=None):
    """softmax(q k^T / sqrt(d)) v in each head; no one looks where `hidden` is true."""
    out = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (q, k, v))):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, -1)


def plain_block(x, block, activation, flows=(), rotated=lambda x: x):
    """A block of any family, with flows (two modules or none) on its shortcuts."""
    attention_flow, mlp_flow = flows if len(flows) else (nn.Identity(), nn.Identity())
    attention, mlp, eva = block.attention, block.mlp, block.mlp.gate is not None
    later = torch.ones(x.shape[1], x.shape[1]).bool().triu(1) if block.causal else None
    y = plain_norm(x, block.norm1)
    q, k, v = plain_linear(y, attention.qkv).chunk(3, -1)
    if attention.query_bias is not None:
        q, v = q + attention.query_bias, v + attention.value_bias
    y = plain_heads(rotated(q), rotated(k), v, attention.heads, later)
    y = plain_linear(plain_norm(y, attention.norm) if eva else y, attention.out)
    x = attention_flow(x) + y * getattr(block.scale1, "gamma", 1)
    y = plain_norm(x, block.norm2)
    if eva:
        y = activation(plain_linear(y, mlp.gate)) * plain_linear(y, mlp.up)
        y = plain_norm(y, mlp.norm)
    else:
        y = activation(plain_linear(y, mlp.up))
    return mlp_flow(x) + plain_linear(y, mlp.down) * getattr(block.scale2, "gamma", 1)


def plain_rotation(x, rows=2, columns=3):
    """EVA-02: pairs of channels as complex numbers, multiplied by e^(i angle) at each patch."""
    pairs = torch.view_as_complex(x[:, 1:].unflatten(-1, (-1, 2)).contiguous())
    for n, c in itertools.product(range(rows * columns), range(pairs.shape[-1])):
        place = n // columns / rows if c % 32 < 16 else n % columns / columns
        angle = 16 * place * 10000 ** (-(c % 16) / 16)
        pairs[:, n, c] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([x[:, :1], torch.view_as_real(pairs).flatten(-2)], 1)


def plain_dinov3_rotation(x, rows=2, columns=3):
    """DINOv3: the same with channels c and c + 32 of each head of 64, behind five other tokens."""
    pairs = torch.view_as_complex(x[:, 5:].unflatten(-1, (-1, 2, 32)).mT.contiguous())
    for n, c in itertools.product(range(rows * columns), range(32)):
        number, side = (n // columns, rows) if c < 16 else (n % columns, columns)
        angle = 2 * math.pi * ((2 * number + 1) / side - 1) / 100 ** (c % 16 / 16)
        pairs[:, n, :, c] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([x[:, :5], torch.view_as_real(pairs).mT.flatten(2)], 1)


def as_map(x, rows, columns):
    """Tokens (B, N, D) to a map (B, D, rows, columns)."""
    return x.transpose(1, 2).reshape(len(x), -1, rows, columns)


def bilinear(x, rows, columns):
    """A map (B, C, h, w) to (B, C, rows, columns)."""
    return F.interpolate(x, (rows, columns), mode="bilinear", align_corners=False)


class Exact(unittest.TestCase):
    """In double precision, on random numbers."""

    def setUp(self):
        torch.manual_seed(0)

    def same(self, a, b, tolerance=1e-10):
        self.assertEqual(a.shape, b.shape)
        self.assertGreater(float(b.detach().std()), 1e-3)       # not a comparison of nothing
        self.assertLess(float((a - b).detach().abs().max()), tolerance)


class Equations(Exact):
    """Every equation of DCRIS against a plain restatement."""

    def test_dense_cross_adapter_equations_1_and_2(self):
        adapter = shake(adapters.DenseCrossAdapter(24, 32, 20, dropout=0.0))
        x, words = torch.randn(2, 3 + 20, 24).double(), torch.randn(2, 7, 20).double()
        f = plain_linear(x, adapter.down).clamp(min=0)
        f_v = as_map(f[:, 3:], 4, 5)
        f_dense = (plain_branches(f_v, adapter.dense) + f_v).flatten(2).transpose(1, 2)
        query, words_read = (plain_linear(y, layer).transpose(0, 1) for y, layer in (
            (f_dense, adapter.cross.query), (words, adapter.cross.words)))
        read = nn.MultiheadAttention.forward(           # PyTorch's own puts the batch second
            adapter.cross.attention, query, words_read, words_read)[0].transpose(0, 1)
        cross = plain_linear(read, adapter.cross.back)
        f_cross = torch.cat([2 * f[:, :3], cross + f[:, 3:]], 1)
        self.same(adapter(x, words, (4, 5)), 0.2 * plain_linear(f_cross, adapter.up))

    def test_text_adapter_equation_3(self):
        x = torch.randn(2, 5, 20).double()
        adapter = adapters.BottleneckAdapter(20, 8, 0.2).double()
        self.assertTrue(torch.equal(adapter(x), x))         # it starts as the identity
        shake(adapter)
        f_w = plain_bottleneck(x, (adapter.down, None, adapter.up))
        self.same(adapter(x), x + 0.2 * f_w)

    def test_neck_equation_4(self):
        neck = shake(head.Neck([6, 8, 10], 12, 16, residual=True))
        features = [torch.randn(2, c, 4, 5).double() for c in (6, 8, 10)]
        sentence = torch.randn(2, 12).double()
        s = plain_linear(sentence, neck.sentence)
        gated = [plain_conv_bn_relu(x, layers)
                 * plain_linear(plain_linear(s, gate.value), gate.out)[:, :, None, None]
                 for x, layers, gate in zip(features, neck.maps, neck.gates)]
        f_f = plain_conv_bn_relu(torch.cat(gated, 1), neck.fuse)
        place = torch.zeros(2, 4, 5).double()
        for i, j in itertools.product(range(4), range(5)):
            place[:, i, j] = torch.tensor([2 * j / 4 - 1, 2 * i / 3 - 1], dtype=torch.float64)
        out = torch.cat([f_f, place.expand(2, -1, -1, -1)], 1)
        for layers in neck.coordinates:
            out = plain_conv_bn_relu(out, layers)
        self.same(neck(features, sentence), out + f_f)
        neck.residual = False
        self.same(neck(features, sentence), out)

    def test_projector_equation_5(self):
        projector = shake(head.Projector(8, 12))
        x, sentence = torch.randn(3, 8, 3, 4).double(), torch.randn(3, 12).double()
        f_c = plain_conv_bn_relu(bilinear(x, 6, 8), projector.image[0])
        f_c = plain_conv_bn_relu(bilinear(f_c, 12, 16), projector.image[1])
        f_c = F.conv2d(f_c, projector.image[2].weight, projector.image[2].bias)
        f_l = plain_linear(sentence, projector.sentence)
        self.same(projector(x, sentence), torch.cat([
            F.conv2d(f_c[i:i + 1], f_l[i, :-1].reshape(1, 4, 3, 3), f_l[i, -1:], padding=1)
            for i in range(3)]))

    def test_loss_equation_6(self):
        logits = torch.randn(2, 1, 4, 6).double() * 3
        masks = (torch.rand(2, 1, 8, 12) > 0.6).double()
        sigma = 1 / (1 + torch.exp(-logits))
        positive = masks[:, :, ::2, ::2] == 1                   # nearest: the upper left
        expected = -torch.where(positive, sigma, 1 - sigma).log().sum() / 48
        self.assertAlmostEqual(float(loss.text_to_pixel_loss(logits, masks)), float(expected), 10)
        certain = torch.full((1, 1, 2, 2), 1e4, requires_grad=True)     # no infinity here, either
        value = loss.text_to_pixel_loss(certain, torch.zeros(1, 1, 2, 2))
        value.backward()
        self.assertEqual(float(value), 1e4)
        self.assertTrue(torch.isfinite(certain.grad).all())

    def test_linear_layer_by_onednn(self):
        # Its backward pass, with PyTorch's linear layer in oneDNN's place, which is single.
        x, weight, bias = (torch.randn(*shape).double().requires_grad_()
                           for shape in ((2, 3, 5), (4, 5), (4,)))
        product, frozen = backbones.LinearByOneDNN.apply, (weight.detach(), bias.detach())
        with mock.patch.object(backbones, "onednn_linear", F.linear):
            for inputs in ((x, weight, bias), (x, weight, None), (x, *frozen),
                           (x[0, 0], weight, bias), (x.detach(), weight, bias)):
                self.assertTrue(torch.autograd.gradcheck(product, inputs))
            # Nothing is kept for a frozen weight but the weight.
            out = product(x, *frozen)
            self.assertIsNone(out.grad_fn.saved_tensors[0])
        # Where the machine has it, large layers go there, and agree with PyTorch's.
        layer, x = backbones.Linear(512, 640), torch.randn(2, 128, 512, requires_grad=True)
        out, plain = layer(x), F.linear(x, layer.weight, layer.bias)
        self.assertEqual("OneDNN" in type(out.grad_fn).__name__, bool(backbones.ONEDNN_LINEAR))
        self.assertNotIn("OneDNN", type(layer(x[:, :10]).grad_fn).__name__)
        for a, b in zip(*((y, *torch.autograd.grad((y ** 2).sum(), (x, *layer.parameters())))
                          for y in (out, plain))):
            self.same(a / b.std(), b / b.std(), 1e-5)

    def test_attention_with_dropout(self):
        """Which weights are dropped is random. With v the identity, the output is the weights."""
        q, k = torch.randn(2, 2, 3, 50, 40).double().unbind()
        v, visible = torch.eye(50).double().expand(2, 3, -1, -1), torch.rand(2, 1, 1, 50) > 0.2
        plain = (q @ k.transpose(2, 3) / 40 ** 0.5).masked_fill(~visible, -math.inf).softmax(-1)
        attention = backbones.UnfusedAttention.apply
        self.same(attention(q, k, v, visible, 0.0), plain)
        out = attention(q, k, v, visible, 0.3)
        left = out != 0
        self.assertAlmostEqual(float(left[visible.expand_as(out)].double().mean()), 0.7, delta=0.02)
        self.same(out[left], plain[left] / (1 - round(0.3 * 2**16) / 2**16))
        self.assertFalse(torch.equal(left, attention(q, k, v, visible, 0.3) != 0))

        def drawn_alike(q, k, v):
            torch.manual_seed(1)
            return attention(q, k, v, visible[..., :7], 0.3)

        q, k, v = (torch.randn(2, 3, n, 4).double().requires_grad_() for n in (5, 7, 7))
        self.assertTrue(torch.autograd.gradcheck(drawn_alike, (q, k, v)))


def tiny_barleria(depth=2, **overrides):
    """A whole BarLeRIa, small enough to be written out."""
    config = replace(model.PRESETS["shapes-barleria"], image_size=24, features=(0, 1),
                     train_towers=False, **overrides)
    vision = backbones.ViT(backbones.VisionShape(4, 16, depth, 2, grid=3, embed=8, family="clip"))
    text = backbones.TextTransformer(backbones.TextShape(12, 2, 3, 8, 40, 9))
    return shake(model.BarLeRIa(config, vision, text))


def batch(net, count=2):
    """Random images and one sentence for a model."""
    size = net.config.image_size
    tokens = torch.zeros(count, net.config.length, dtype=torch.int64)
    tokens[:, :5] = torch.tensor([510, 30, 40, 50, net.text.shape.vocabulary - 1])
    return torch.randn(count, 3, size, size), tokens


class BarleriaEquations(Exact):
    """Every equation of BarLeRIa against a plain restatement."""

    def setUp(self):
        super().setUp()
        self.images = torch.randn(2, 3, 24, 24).double()
        self.tokens = torch.tensor([[38, 7, 3, 39, 0, 0], [38, 9, 4, 5, 6, 39]])

    def test_flow_equation_1(self):
        flow = adapters.NormalizingFlow(6, steps=3).double()
        x = torch.randn(2, 5, 6).double()
        self.same(flow(x), x, 0.02)                         # it starts near the identity
        shake(flow)
        z = flow.mu + torch.exp(flow.log_sigma) * x
        for j in range(3):
            inner = sum(flow.w[j, d] * z[..., d] for d in range(6))
            z = z + flow.scale[j] * torch.tanh(inner + flow.b[j])[..., None]
        self.same(flow(x), z)

    def test_intertwined_towers_equations_2_and_3(self):
        for depth in (2, 4):            # as many blocks as the text tower, and twice as many
            net = tiny_barleria(depth)
            x, t = net.vision.embed(self.images), net.text.embed(self.tokens)
            twine, stages = net.intertwiner, []
            for i, block in enumerate(net.text.blocks):
                words = plain_bottleneck(t, twine.words)
                cls = plain_bottleneck(x[:, :1], twine.class_token)
                for j in (i,) if depth == 2 else (2 * i, 2 * i + 1):
                    y = plain_block(torch.cat([x[:, :1], words, x[:, 1:]], 1),
                                    net.vision.blocks[j], quick_gelu, net.visual_flows[j])
                    x = torch.cat([y[:, :1], y[:, 1 + 6:]], 1)
                    stages.append(x)
                t = plain_block(torch.cat([cls, t], 1), block, quick_gelu, net.text_flows[i])[:, 1:]
            t = plain_norm(t, net.text.norm)
            sentence = torch.stack([t[0, 3], t[1, 5]]) @ net.text.projection
            found, *ends = net.local_branch(self.images, self.tokens, (6, 6))
            self.assertEqual(len(found), depth)
            for a, b in zip([*found, *ends], [*stages, t, sentence]):
                self.same(a, b)

    def test_global_prior_equation_4(self):
        words, patches = torch.randn(2, 6, 8).double(), torch.randn(2, 10, 8).double()
        prior = adapters.global_prior(words, patches, backbones.after_end(self.tokens))
        expected = torch.zeros(2, 16, 8).double()
        for b, real in enumerate((4, 6)):
            meaning = sum(words[b, i] for i in range(real)) / real
            for i, token in enumerate([*words[b], *patches[b]]):
                cosine = (token @ meaning) / math.sqrt(token @ token) / math.sqrt(meaning @ meaning)
                expected[b, i] = min(1, max(0, float(cosine))) * token
        self.same(prior, expected)

    def test_global_shortcut_tuning_equations_5_to_8(self):
        # Patches of 5 pixels make a grid of their own, 4x4, beside the tower's 6x6.
        net = shake(adapters.GlobalShortcutTuning(
            16, 12, 8, out_width=10, width=6, heads=2, blocks=2, queries=3, rank=5, patch=5,
            side=4))
        words, prior = torch.randn(2, 6, 12).double(), torch.randn(2, 6 + 36, 8).double()
        stages = torch.randn(2, 2, 36, 16).double()

        def resized(x, old, new):
            return bilinear(as_map(x, old, old), new, new).flatten(2).transpose(1, 2)

        image = F.conv2d(self.images, net.patch.weight, net.patch.bias, stride=5)
        image = image.flatten(2).transpose(1, 2) + net.position
        queries, w = net.queries.expand(2, -1, -1), plain_bottleneck(words, net.words)
        for i, (block, side) in enumerate(zip(net.blocks, (4, 6))):
            p = torch.cat([prior[:, :6], resized(prior[:, 6:], 6, side)], 1)
            p = torch.cat([torch.zeros(2, 3, 6).double(), plain_linear(p, net.priors[i])], 1)
            x = torch.cat([queries, w, image], 1)                               # Eq. 5
            q, k, v = plain_linear(plain_norm(x, block.norm1), block.qkv).chunk(3, -1)
            v = v + plain_linear(p, block.prior)                                # Eq. 6
            x = x + plain_linear(plain_heads(q, k, v, heads=2), block.out)
            up = plain_linear(plain_norm(x, block.norm2), block.mlp[0])
            x = x + plain_linear(plain_gelu(up), block.mlp[2])
            queries, w, image = x[:, :3], x[:, 3:9], resized(x[:, 9:], side, 6)             # Eq. 7
            image = image + plain_linear(plain_norm(stages[i], net.stage[0]), net.stage[1])  # Eq. 8
        out = as_map(plain_linear(image, net.out), 6, 6)
        self.same(net(self.images, words, prior, stages, (6, 6)), out)

    def test_head_equations_11_and_12(self):
        """F_c + F_out^M enters the decoder; no residual around the neck's convolutions."""
        net = tiny_barleria()
        stages, words, sentence = net.local_branch(self.images, self.tokens, (6, 6))
        projected = plain_norm(stages[-1], net.vision.norm) @ net.vision.projection.weight.T
        maps = [as_map(x[:, 1:], 6, 6) for x in (stages[0], stages[1], projected)]
        padding = backbones.after_end(self.tokens)
        prior = adapters.global_prior(words @ net.text.projection, projected[:, 1:], padding)
        f_out = net.global_branch(self.images, words, prior, [x[:, 1:] for x in stages], (6, 6))
        self.assertFalse(net.head.neck.residual)                # Eq. 11
        f_mm = net.head.decoder(net.head.neck(maps, sentence) + f_out, words, padding)
        self.same(net(self.images, self.tokens), net.head.projector(f_mm, sentence))    # Eq. 12

    def test_gradient_stops_at_the_prior_and_the_stages(self):
        net = tiny_barleria()
        stages, words, patches = (x.requires_grad_() for x in (
            torch.randn(2, 2, 36, 16).double(), torch.randn(2, 6, 12).double(),
            torch.randn(2, 36, 8).double()))
        prior = adapters.global_prior(words @ net.text.projection, patches,
                                      backbones.after_end(self.tokens))
        self.assertFalse(prior.requires_grad)
        net.global_branch(self.images, words, prior, stages, (6, 6)).square().sum().backward()
        self.assertIsNone(stages.grad)                          # F_v^i
        self.assertGreater(float(words.grad.abs().max()), 1e-6)     # the words get one


class Tuners(Exact):
    """The methods that the papers compare with."""

    def test_compacter_weight_is_a_sum_of_kronecker_products(self):
        x, factors = torch.randn(2, 3, 12).double(), torch.randn(4, 4, 4).double()
        adapter = adapters.CompacterAdapter(12, 8, factors).double()
        self.assertTrue(torch.equal(adapter(x), x))         # it starts as the identity
        layer = shake(adapter).down
        weight = sum(torch.kron(factors[i], layer.b[i]) for i in range(4))
        self.same(layer(x), x @ weight.T + layer.bias)
        self.same(adapter(x), x + adapter.up(layer(x).clamp(min=0)))

    def test_lora_is_beside_its_layer_and_merges_into_it(self):
        x, frozen = torch.randn(2, 3, 12).double(), nn.Linear(12, 18).double()
        lora = adapters.LoRA(frozen, rank=2, parts=3).double()
        self.assertTrue(torch.equal(lora(x), frozen(x)))    # it starts as the frozen layer
        shake(lora)
        merged = frozen.weight + torch.cat([up @ down for up, down in zip(lora.up, lora.down)])
        self.same(lora(x), x @ merged.T + frozen.bias)


class Counts(unittest.TestCase):
    """Parameters, exactly, and the papers' printed millions."""

    def test_readme_says_what_the_program_says(self):
        readme, printed = (HERE / "README.md").read_text(), program(model)[0].splitlines()
        rows = re.findall(r"(?m)^\| [\w-]+ \|(?: (?:\d+\.\d\d)? \|){5}$", readme)
        self.assertEqual([row for row in rows if row not in printed], [])
        self.assertGreaterEqual(len(rows), 8)
        self.assertLessEqual({"dcris-b", "barleria"}, {row.split()[1] for row in rows})

    def test_python_of_readme_runs(self):
        """In its order, where a small random model is saved, and on fewer scenes and steps."""
        place = folder(self)
        vocabulary = data.draw_shapes(place / "data", TINY) / "merges.txt"
        (place / "runs" / "shapes").mkdir(parents=True)
        model.save(place / "runs" / "shapes" / "best.pt", model.build("shapes"),
                   vocabulary={"text": vocabulary.read_text()})
        blocks = re.findall(r"(?ms)^ *```python\n(.*?)^ *```", (HERE / "README.md").read_text())
        self.assertGreaterEqual(len(blocks), 9)
        scope, printed = {}, io.StringIO()
        with contextlib.chdir(place), contextlib.redirect_stdout(printed):
            for block in blocks:
                exec(textwrap.dedent(block).replace("range(60)", "range(2)"), scope)
        for fact in ("(2, 1, 128, 128)", "(2, 1, 104, 104)", "'tuned': 5280", "tensor(0., "):
            self.assertIn(fact, printed.getvalue().replace("torch.Size([", "(").replace("])", ")"))

    def test_parts(self):
        with torch.device("meta"):
            for count, module in (
                    (86_582_784, backbones.ViT(backbones.VISION["dinov2-b"])),
                    (85_659_648, backbones.ViT(backbones.VISION["dinov3-b"])),     # timm's figures
                    (303_128_576, backbones.ViT(backbones.VISION["dinov3-l"])),
                    (86_192_640, backbones.ViT(backbones.VISION["clip-b"])),
                    (86_263_040, backbones.ViT(backbones.VISION["eva-b"])),
                    (63_428_096, backbones.TextTransformer(backbones.TEXT["clip-b"])),
                    (382_896, adapters.DenseCrossAdapter(768, 128, 512, 0.1)),
                    (66_112, adapters.BottleneckAdapter(512, 64, 0.2)),
                    (69_720, adapters.DenseTextAdapter(512, 64)),
                    (1_815_440, model.build("barleria").global_branch),
                    (598_592, model.build("etris", bridge_width=64).bridges)):  # the released file
                self.assertEqual(sum(p.numel() for p in module.parameters()), count, type(module))

    def test_presets(self):
        rows = {row["preset"]: row for row in json.loads(program(model, "--json")[0])}
        for name, tuned in (
                ("dcris-b", 6 * (382_896 + 66_112)), ("fixed", 0), ("full", 149_971_456),
                ("houlsby", 1_982_976), ("lora", 1_572_864), ("etris", 1_387_648),
                ("etris-dino", 1_387_648), ("snf", 184_416), ("snf-etris", 1_387_648 + 184_416),
                ("barleria-local", 390_656), ("barleria", 2_206_096)):
            self.assertEqual(rows[name]["tuned"], tuned, name)
        self.assertEqual({name: f"{paper:.2f}" for name, paper in model.PAPER.items()}, {
            name: f"{row['tuned'] / 1e6:.2f}" for name, row in rows.items()
            if row["paper_millions"] is not None})
        for name, positions in (("barleria", (1 + 26 ** 2) * 768 + 77 * 512), ("dcris-b", 0),
                                ("snf", (1 + 26 ** 2) * 768 + 77 * 512),
                                ("barleria-eva", 77 * 512)):
            self.assertEqual(rows[name]["positions"], positions, name)
        with torch.device("meta"):              # DINOv3 has no positions that could learn
            net = model.build("etris", vision="dinov3-b")
        self.assertEqual(model.count(net)["positions"], 77 * 512)

    def test_dcris_tables_3_to_5(self):
        rows = [(6, 0, 128, 64, 2.30), (0, 6, 128, 64, 0.40),                           # Table 3
                (6, 6, 64, 64, 1.91), (6, 6, 128, 128, 3.09), (6, 6, 256, 128, 4.83)]   # Table 4
        for layers, millions in ((1, 0.45), (2, 0.90), (3, 1.35), (4, 1.80), (5, 2.25), (6, 2.69),
                                 (7, 3.14), (8, 3.59), (12, 5.39)):                     # Table 5
            rows.append((layers, layers, 128, 64, millions))
        for visual, text, visual_rank, text_rank, millions in rows:
            with torch.device("meta"):
                net = model.build(
                    "dcris-b", visual_adapter_layers=tuple(range(visual)),
                    visual_adapter_rank=visual_rank, text_adapter_layers=tuple(range(text)),
                    text_adapter_rank=text_rank)
            self.assertEqual(round(model.count(net)["tuned"] / 1e6, 2), millions)


# What the publishers' files call a tensor or a layer, where it is not as here.
DINOV2 = {
    "class_token": "cls_token", "position": "pos_embed", "registers": "register_tokens",
    "patch.": "patch_embed.proj.", "attention.qkv.": "attn.qkv.", "attention.out.": "attn.proj.",
    "mlp.up.": "mlp.fc1.", "mlp.down.": "mlp.fc2.", "scale1.gamma": "ls1.gamma",
    "scale2.gamma": "ls2.gamma"}
CLIP = {
    "class_token": "class_embedding", "position": "positional_embedding", "patch.": "conv1.",
    "embedding.": "token_embedding.", "norm_before.": "ln_pre.", "norm.": "ln_post.",
    "projection.weight": "proj", "projection": "text_projection",
    "blocks.": "transformer.resblocks.", "norm1.": "ln_1.", "norm2.": "ln_2.",
    "attention.qkv.": "attn.in_proj_", "attention.out.": "attn.out_proj.",
    "mlp.up.": "mlp.c_fc.", "mlp.down.": "mlp.c_proj."}
EVA = {
    **DINOV2, "projection.": "head.", "attention.query_bias": "attn.q_bias",
    "attention.value_bias": "attn.v_bias", "attention.norm.": "attn.inner_attn_ln.",
    "mlp.gate.": "mlp.w1.", "mlp.up.": "mlp.w2.", "mlp.norm.": "mlp.ffn_ln.",
    "mlp.down.": "mlp.w3."}
HF_DINOV2 = {
    "class_token": "embeddings.cls_token", "position": "embeddings.position_embeddings",
    "registers": "embeddings.register_tokens",
    "patch.": "embeddings.patch_embeddings.projection.", "norm.": "layernorm.",
    "blocks.": "encoder.layer.", "attention.qkv.": "attention.attention.qkv.",
    "attention.out.": "attention.output.dense.", "scale1.gamma": "layer_scale1.lambda1",
    "scale2.gamma": "layer_scale2.lambda1", "mlp.up.": "mlp.fc1.", "mlp.down.": "mlp.fc2."}
TIMM_DINOV3 = {
    **DINOV2, "registers": "reg_token", "attention.query_bias": "attn.q_bias",
    "attention.value_bias": "attn.v_bias", "scale1.gamma": "gamma_1", "scale2.gamma": "gamma_2"}
HF_DINOV3 = {
    **HF_DINOV2, "patch.": "embeddings.patch_embeddings.", "norm.": "norm.", "blocks.": "layer.",
    "attention.qkv.": "attention.qkv.", "attention.query_bias": "attention.q_proj.bias",
    "attention.value_bias": "attention.v_proj.bias", "attention.out.": "attention.o_proj.",
    "mlp.up.": "mlp.up_proj.", "mlp.down.": "mlp.down_proj."}
HF_CLIP = {
    "class_token": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight", "embedding.": "embeddings.token_embedding.",
    "patch.": "embeddings.patch_embedding.", "norm_before.": "pre_layrnorm.",
    "norm.": "post_layernorm.", "projection.": "visual_projection.",
    "projection": "text_projection.weight", "blocks.": "encoder.layers.",
    "norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attention.qkv.": "self_attn.qkv.",
    "attention.out.": "self_attn.out_proj.", "mlp.up.": "mlp.fc1.", "mlp.down.": "mlp.fc2."}
LAYOUTS = {             # what most names begin with, and the names
    "dinov2": ("", DINOV2), "clip": ("visual.", CLIP), "eva": ("visual.", EVA),
    "clip text": ("", {**CLIP, "norm.": "ln_final."}),
    "eva text": ("text.", {**CLIP, "norm.": "ln_final."}),
    "dinov3": ("", {**TIMM_DINOV3, "registers": "storage_tokens", "scale1.gamma": "ls1.gamma",
                    "scale2.gamma": "ls2.gamma"}),
    "timm dinov3": ("", TIMM_DINOV3), "hf dinov3": ("", HF_DINOV3),
    "hf dinov2": ("", HF_DINOV2), "hf clip": ("vision_model.", HF_CLIP),
    "hf clip text": ("text_model.", {**HF_CLIP, "norm.": "final_layer_norm."})}


def published(tower, kind):
    """A tower's tensors under the names and in the shapes of its publisher's files."""
    prefix, names = LAYOUTS[kind]
    layers = ["query", "key", "value"] if kind == "hf dinov2" else ["q_proj", "k_proj", "v_proj"]
    out = {}
    for ours, tensor in tower.state_dict().items():
        block, name, part = re.fullmatch(r"(blocks\.\d+\.|)(.+?)(weight|bias|)", ours).groups()
        theirs = names.get(name + part) or names.get(name, name) + part
        theirs = block.replace("blocks.", names.get("blocks.", "blocks.")) + theirs
        if "clip" in kind and ours in ("class_token", "position"):
            tensor = tensor.squeeze()
        if theirs in ("proj", "text_projection.weight"):
            tensor = tensor.T
        if theirs not in ("visual_projection.weight", "text_projection.weight"):
            theirs = prefix + theirs
        if (kind == "eva" or "hf" in kind) and "qkv" in theirs:
            out |= {theirs.replace("qkv", layer): rows.clone()
                    for layer, rows in zip(layers, tensor.chunk(3))}
        else:
            out[theirs] = tensor.clone()
    if kind == "dinov3":        # Meta's have one bias; a mask sets that of the keys to zero
        for i in range(tower.shape.depth):
            q, v = (out.pop(f"blocks.{i}.attn.{x}_bias") for x in "qv")
            out[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
    return out


SMALL_TOWERS = {
    "dinov2": backbones.VisionShape(14, 128, 2, 2, grid=5, registers=4),
    "clip": backbones.VisionShape(16, 192, 2, 3, grid=3, embed=64, family="clip"),
    "dinov3": backbones.VisionShape(16, 192, 2, 3, grid=0, registers=4, family="dinov3"),
    "eva": backbones.VisionShape(16, 192, 2, 3, grid=3, embed=64, family="eva"),
    "clip text": backbones.TextShape(128, 2, 2, 64, 300, 77),
    "eva text": backbones.TextShape(128, 2, 2, 64, 300, 77, family="eva text")}


def drawn_tower(kind, **sizes):
    """A small tower of random numbers."""
    shape = SMALL_TOWERS[re.sub("^(hf|timm) ", "", kind)]._replace(**sizes)
    make = backbones.TextTransformer if kind.endswith("text") else backbones.ViT
    return shake(make(shape), spread=0.1).float().eval()


def drawn_state(*kinds):
    """The tensors of a file of such towers."""
    return {name: tensor for kind in kinds
            for name, tensor in published(drawn_tower(kind), kind).items()}


class Towers(Exact):
    """Frozen towers and their files."""

    def saved(self, state):
        path = folder(self) / "weights.pth"
        torch.save(state, path)
        return path

    def test_files_load_whole(self):
        """Our tensors come back from every publisher's file, Hugging Face's folders too."""
        for kinds, more in (
                (["dinov2"], ["mask_token"]), (["hf dinov2"], ["embeddings.mask_token"]),
                (["dinov3"], ["mask_token", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"]),
                (["hf dinov3"], ["embeddings.mask_token"]), (["timm dinov3"], []),
                (["clip", "clip text"], ["context_length", "vocab_size", "logit_scale"]),
                (["hf clip", "hf clip text"], ["vision_model.embeddings.position_ids",
                                               "text_model.embeddings.position_ids"]),
                (["eva", "eva text"], ["visual.blocks.0.attn.rope.freqs_cos", "logit_scale"])):
            path = folder(self) / "pytorch_model.bin"
            torch.save({**drawn_state(*kinds), **dict.fromkeys(more, torch.tensor(77))}, path)
            for kind, read in zip(kinds, (backbones.load_vision, backbones.load_text)):
                expected, tower = drawn_tower(kind), read(path.parent if "hf" in kind else path)
                self.assertEqual(tower.shape, expected.shape)
                for name, tensor in expected.state_dict().items():
                    self.assertTrue(torch.equal(tower.state_dict()[name], tensor), (kind, name))
                self.assertFalse(any(p.requires_grad for p in tower.parameters()))
        with self.assertRaises(IsADirectoryError):
            backbones.load_vision(folder(self))
        # Those of timm without "qkvb" in their name leave the biases out.
        tower = backbones.load_vision(self.saved({
            name: tensor for name, tensor in drawn_state("timm dinov3").items()
            if not re.search("(q|v)_bias", name)}))
        for block in tower.blocks:
            self.assertFalse((block.attention.query_bias + block.attention.value_bias).any())

    @unittest.skipUnless(SAFETENSORS, "safetensors is not installed")
    def test_safetensors(self):
        import safetensors.torch
        path = folder(self) / "model.safetensors"
        state = drawn_state("hf dinov2")
        safetensors.torch.save_file(state, path)
        self.assertTrue(torch.equal(backbones.load_vision(path.parent).class_token,
                                    state["embeddings.cls_token"]))
        path.write_bytes(b"12345678{}")
        with self.assertRaisesRegex(backbones.WeightsError, "not a readable weight file"):
            backbones.load_vision(path.parent)

    def test_towers_by_hand(self):
        """Images of 2x3 patches, and texts; rotary tables are in single precision."""
        tokens = torch.tensor([[298, 5, 6, 299, 0, 0], [298, 7, 5, 9, 4, 299]])
        for kind, eps, activation, tolerance in (
                ("dinov2", 1e-6, plain_gelu, 1e-10), ("clip", 1e-5, quick_gelu, 1e-10),
                ("dinov3", 1e-5, plain_gelu, 1e-7),
                ("eva", 1e-6, lambda x: x / (1 + torch.exp(-x)), 1e-5),
                ("clip text", 1e-5, quick_gelu, 1e-10), ("eva text", 1e-5, plain_gelu, 1e-10)):
            tower = drawn_tower(kind).double()
            if kind.endswith("text"):
                x = tower.embedding.weight[tokens] + tower.position[:6]
                found = tower(tokens)[0]
            else:
                size = tower.shape.patch
                images = torch.randn(2, 3, 2 * size, 3 * size).double()
                x = F.conv2d(images, tower.patch.weight, tower.patch.bias, stride=size)
                x = torch.cat([tower.class_token.expand(2, -1, -1),
                               x.flatten(2).transpose(1, 2)], 1)
                x = x if kind == "dinov3" else x + tower.positions((2, 3))
                found = tower(images)
            if kind.startswith("dino"):
                x = torch.cat([x[:, :1], tower.registers.expand(2, -1, -1), x[:, 1:]], 1)
            if kind == "clip":
                x = plain_norm(x, tower.norm_before)
            for block in tower.blocks:
                x = plain_block(x, block, activation, rotated={
                    "eva": plain_rotation, "dinov3": plain_dinov3_rotation}.get(kind, lambda x: x))
            self.same(found, plain_norm(x, tower.norm), tolerance)
            self.assertEqual(tower.blocks[0].causal, kind.endswith("text"))
            self.assertEqual({layer.eps for layer in tower.modules()
                              if isinstance(layer, nn.LayerNorm)}, {eps})

    def test_positions_are_resized_and_can_stay_so(self):
        path = self.saved(drawn_state("dinov2"))
        image = torch.randn(1, 3, 98, 98)
        stays = backbones.load_vision(path, image_size=98)
        self.assertEqual((stays.shape.grid, stays.position.shape), (7, (1, 50, 128)))
        self.assertTrue(torch.equal(stays(image), backbones.load_vision(path)(image)))
        # DINOv2's antialiased, CLIP's not.
        for kind, antialias in (("dinov2", True), ("clip", False)):
            tower = drawn_tower(kind, grid=9)
            stored = as_map(tower.position[:, 1:], 9, 9)
            expected = F.interpolate(stored, (4, 7), mode="bicubic", antialias=antialias)
            self.assertTrue(torch.equal(as_map(tower.positions((4, 7))[:, 1:], 4, 7), expected))
            self.assertTrue(torch.equal(tower.positions((4, 7))[:, :1], tower.position[:, :1]))

    def test_rotary_tables_stay_in_single_precision(self):
        for kind in ("eva", "dinov3"):
            tower = drawn_tower(kind)
            expected = tower.rotary_tables((32, 20))
            with torch.autocast("cpu", torch.bfloat16):
                for low, single in zip(tower.bfloat16().rotary_tables((32, 20))[:2], expected):
                    self.assertTrue(torch.equal(low, single))

    def test_openais_archives(self):
        """They are TorchScript, in half precision, with plain numbers among the tensors."""
        root, number = nn.Module(), {"input_resolution": torch.tensor(224)}
        for name, tensor in {**drawn_state("clip", "clip text"), **number}.items():
            at, (*parts, last) = root, name.split(".")
            for part in parts:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_buffer(last, tensor.half() if tensor.is_floating_point() else tensor)
        path = folder(self) / "ViT-B-16.pt"
        torch.jit.script(root).save(str(path))
        for kind, read in (("clip", backbones.load_vision), ("clip text", backbones.load_text)):
            for half, single in zip(read(path).parameters(), drawn_tower(kind).parameters()):
                self.assertTrue(torch.equal(half, single.half().float()))

    def test_bad_files_are_refused_by_name(self):
        dinov2, hf, zeros = drawn_state("dinov2"), drawn_state("hf dinov2"), torch.zeros
        hf_key = "encoder.layer.0.attention.attention.key.bias"
        vision, text = backbones.load_vision, backbones.load_text
        for read, state, change, message in (
                (vision, dinov2, {"blocks.1.attn.qkv.bias": None},
                 r"1 tensor\(s\) missing, the first: blocks\.1\.attn\.qkv\.bias"),
                (vision, dinov2, {"extra": zeros(3)}, r"1 tensor\(s\) unexpected.*extra"),
                (vision, dinov2, {"norm.weight": zeros(7)},
                 r"1 tensor\(s\) misshapen.*norm\.weight, \(7,\) in the file, \(128,\) expected"),
                (vision, dinov2, {"cls_token": zeros(1, 1, 128).double() + 1e300},
                 "cls_token holds numbers not finite in torch.float32"),
                (vision, dinov2, {"register_tokens": None}, "no vision tower"),
                (vision, hf, {hf_key: None}, f"missing, the first: {hf_key}"),
                *((vision, drawn_state(kind), {name: None}, f"missing, the first: {name}")
                  for kind, name in (("dinov3", "blocks.1.attn.qkv.bias"), ("dinov2", "pos_embed"),
                                     ("timm dinov3", "blocks.0.attn.q_bias"))),
                (text, dinov2, {}, "no text tower")):
            with self.subTest(message), self.assertRaisesRegex(backbones.WeightsError, message):
                read(self.saved({name: tensor for name, tensor in {**state, **change}.items()
                                 if tensor is not None}))

    def test_unreadable_files_are_refused_and_run_no_code(self):
        class Script(nn.Module):
            @torch.jit.export
            def __getstate__(self):
                return 1

            @torch.jit.export
            def __setstate__(self, state: int):
                torch.from_file("harmed", True, 4)

        path = self.saved(drawn_state("dinov2"))
        whole, harm = path.read_bytes(), Harm(path.with_name("harmed"))
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 0x40
        torch.jit.script(Script()).save(str(path))
        for content in (whole[:5000], bytes(flipped), b"", path.read_bytes(), pickle.dumps(harm),
                        {"state_dict": harm}, {"state_dict": {"module.a": 5}}, [1]):
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
            for read in (model.load, backbones.load_vision, backbones.load_text):
                with self.assertRaisesRegex(backbones.WeightsError, r"\A.*weights.pth: .*\Z"):
                    read(path)
        self.assertFalse(Path(harm.path).exists() or Path("harmed").exists())


class Download(unittest.TestCase):
    def test_whole_or_not_at_all(self):
        place = folder(self)
        (place / "there.bin").write_bytes(bytes(range(256)) * 900)
        address, digest = (place / "there.bin").as_uri(), backbones.sha256(place / "there.bin")
        for at, expected, message in (
                ((place / "no").as_uri(), digest, "file:.*/no, fetched to .*file.bin: .*No such"),
                (address, "0" * 64, "there.bin, fetched to .*file.bin: invalid hash value"),
                (address, digest, None),
                ((place / "no").as_uri(), digest, None)):       # is there: nothing to do
            published = backbones.Published("file.bin", at, expected)
            refused = (self.assertRaisesRegex(backbones.WeightsError, message) if message else
                       contextlib.nullcontext())
            with mock.patch.dict(backbones.PUBLISHED, thing=published), refused, \
                    contextlib.redirect_stderr(io.StringIO()):
                path = Path(backbones.download("thing", place / "pretrained"))
            self.assertEqual([found.name for found in (place / "pretrained").iterdir()],
                             [] if message else ["file.bin"])
        self.assertEqual(path.read_bytes(), (place / "there.bin").read_bytes())

    def test_where_to_ask_for_gated_files(self):
        with self.assertRaisesRegex(backbones.WeightsError, "vitb16_.*ask .* at https://ai.meta"):
            backbones.download("dinov3-b", folder(self))


class Harm:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Methods(unittest.TestCase):
    def test_frozen_stays_and_tuned_learns(self):
        flows = r"(visual|text)_flows\.|intertwiner\."
        towers = r"(vision|text)\."
        for name, overrides, learning in (
                ("dcris", {}, r"(dense_cross|text)_adapters\."), ("full", {}, towers),
                ("fixed", {}, "nothing"), ("houlsby", {}, r".*mlp\.1\."),
                ("compacter", {}, r".*mlp\.1\.|factors"), ("lora", {}, r".*\.(down|up)$"),
                ("etris", {}, r"bridges\."), ("snf", {}, r"visual_flows\."),
                ("snf-etris", {}, r"bridges\.|visual_flows\."), ("barleria-local", {}, flows),
                ("barleria", {"train_towers": False, "train_positions": True},
                 rf"{flows}|global_branch\.|(vision|text)\.position"),
                ("barleria", {}, rf"{flows}|global_branch\.|{towers}")):
            torch.manual_seed(0)
            net = model.build(f"shapes-{name}", **overrides).train()
            for parameter in net.parameters():          # nothing zero that hides a gradient
                if parameter.requires_grad and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            before = {n: p.detach().clone() for n, p in net.named_parameters()}
            optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
            net(*batch(net)).square().sum().backward()
            optimizer.step()
            moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
            self.assertEqual(moved, {n for n in before if re.match(rf"head\.|{learning}", n)}, name)
            self.assertEqual(
                moved, {n for n, p in net.named_parameters() if p.requires_grad}, name)

    def test_logits_are_four_times_the_grid(self):
        for name, config in model.PRESETS.items():
            with torch.device("meta"):
                net = model.build(name).eval()
                side = 4 * config.image_size // net.vision.shape.patch
                self.assertEqual(net(*batch(net, 1)).shape, (1, 1, side, side), name)

    def test_bad_configurations(self):
        for preset, overrides, message in (
                ("dcris-b", {"image_size": 450}, "image_size 450 .* of 14.*448 is"),
                ("dcris-b", {"visual_adapter_layers": (3, 12)}, "the tower has 12 blocks, 0 to 11"),
                ("dcris-b", {"visual_adapter_rank": 100}, "rank 100 is no multiple of 16"),
                ("dcris-b", {"length": 78}, "3 to 77"), ("dcris-b", {"batch_size": -2}, "small"),
                ("dcris-b", {"head_heads": 7}, "head_width 512"),
                ("dcris-b", {"vision": "resnet"}, "'resnet' is unknown; there are dinov2-b"),
                ("dcris-b", {"visual_flows": False}, "visual_flows plays no part in .* dcris"),
                ("barleria", {"vision": "clip-l", "image_size": 420}, "are not the two towers"),
                ("shapes-barleria", {"global_blocks": 4},
                 "global_blocks 4: the vision tower has 3 blocks"),
                ("shapes-etris", {"bridges": 4}, "bridges 4: the vision tower has 3 blocks"),
                ("nothing", {}, "no preset 'nothing'; there are shapes")):
            with self.subTest(preset, **overrides), \
                    self.assertRaisesRegex(model.ConfigError, message):
                model.configure(preset, **overrides)

    def test_full_size_steps(self):
        for name in (model.PRESETS if MANY else ("dcris-b", "barleria")):
            torch.manual_seed(0)
            net = model.build(name).train()
            images, tokens = batch(net)
            masks = (torch.rand(2, 1, *images.shape[2:]) > 0.5).float()
            loss.text_to_pixel_loss(net(images, tokens), masks).backward()
            for parameter_name, parameter in net.named_parameters():
                if parameter.requires_grad:
                    self.assertTrue(parameter.grad.isfinite().all(), parameter_name)


class Checkpoints(unittest.TestCase):
    def test_towers_from_files_stay_in_their_files(self):
        place = folder(self)
        names = {"vision": backbones.Published("v.pth", "http://v"),
                 "text": backbones.Published("t.pt", "http://t")}
        vision = drawn_tower("dinov2", width=64, heads=1, grid=4)
        text = drawn_tower("clip text", width=64, heads=1)
        torch.save(published(vision, "dinov2"), place / "v.pth")
        torch.save(published(text, "clip text"), place / "t.pt")
        overrides = {"vision": "vision", "text": "text", "image_size": 56, "train_towers": False,
                     "visual_adapter_layers": (1,), "features": (0, 1)}
        with mock.patch.dict(backbones.VISION, vision=vision.shape), \
                mock.patch.dict(backbones.TEXT, text=text.shape), \
                mock.patch.dict(backbones.PUBLISHED, names), \
                mock.patch.object(model, "PRETRAINED", place):
            net = model.build("shapes", place / "v.pth", place / "t.pt", **overrides).eval()
            model.save(place / "a.pt", net)
            held = model.read_checkpoint(place / "a.pt")
            self.assertFalse([n for n in held["tensors"] if n.startswith(("vision.", "text."))])
            images, tokens = torch.randn(1, 3, 56, 56), torch.tensor([[298, 4, 299]])
            again = model.load(place / "a.pt")
            self.assertTrue(torch.equal(again(images, tokens), net(images, tokens)))
            name = "vision.class_token"         # a frozen tower comes from its file alone
            torch.save({**held, "config": asdict(held["config"]), "tensors": {
                **held["tensors"], name: net.vision.class_token + 1}}, place / "b.pt")
            with self.assertRaisesRegex(backbones.WeightsError, f"unexpected, the first: {name}"):
                model.load(place / "b.pt")
            torch.save(published(shake(vision).float(), "dinov2"), place / "v.pth")
            with self.assertRaisesRegex(backbones.WeightsError, "SHA-256"):
                model.load(place / "a.pt")
            (place / "v.pth").unlink()
            with self.assertRaisesRegex(FileNotFoundError, "http://v"):
                model.load(place / "a.pt")

    def test_bad_checkpoints_are_refused(self):
        place = folder(self)
        model.save(place / "a.pt", model.build("shapes"))
        held = torch.load(place / "a.pt")
        for change, message in (
                ({"tensors": {}}, "missing, the first: vision.class_token"),
                ({"config": held["config"] | {"colour": 1}}, "colour"),
                ({"config": held["config"] | {"image_size": 81}}, "image_size 81"),
                ({"config": None}, "not a checkpoint of this project")):
            torch.save(held | change, place / "b.pt")
            with self.subTest(message), self.assertRaisesRegex(
                    backbones.WeightsError, f"b.pt: .*{message}"):
                model.load(place / "b.pt")


# ---- Recorded from the authors' own programs ------------------------------------------------

# DETRIS-B (commit c94b1e1) and ETRIS with ViT-B/16 (cdc6d8e), both for RefCOCO, on weights and
# inputs that anyone can make (`Released`).
# Logits of two samples: rows 0, a third and the last, columns 1, the middle and the last but one.
RECORDED = {
    "detris-b": (3.8542, [9.1905, 8.796, 0.995, 12.1179, 22.3222, 2.6724, 4.4583, 18.1847, 9.3949,
                          10.8176, 16.5479, 9.6004, 9.5378, 21.3087, 7.4041, 1.428, 15.0338,
                          6.6799]),
    "etris": (6.0878, [-5.13, -9.9759, -11.6973, 26.7459, 34.1001, 42.937, 34.5625, 44.0553,
                       46.7584, -3.0702, -5.6767, -9.6869, 20.16, 29.4195, 30.2732, 24.6011,
                       31.3369, 31.6156])}
# One training step of DETRIS-B without dropout: the loss, and norms of gradients.
RECORDED_LOSS = 8.928863
RECORDED_GRADIENTS = {
    "txt_backbone.transformer.resblocks.3.adapter.D_fc1.weight": 11.1706,
    "txt_backbone.transformer.resblocks.1.adapter.dense_branch3.1.conv.weight": 0.433038,
    "dinov2.blocks.1.adapter.D_fc1.weight": 0.754839,
    "dinov2.blocks.5.adapter.dense_branch2.1.conv.weight": 0.008765,
    "dinov2.blocks.9.adapter.cross.multihead_attn.in_proj_weight": 0.09186,
    "dinov2.blocks.11.adapter.D_fc2.weight": 0.133813,
    "dinov2.blocks.7.adapter.dense_branch1.bn.bias": 0.001297,
    "neck.f5_proj.0.weight": 8.465, "neck.txt_proj.weight": 24.8328,
    "neck.f3_proj.1.weight": 0.586626, "neck.fusion4.multihead_attn.out_proj.weight": 13.8989,
    "decoder.layers.1.multihead_attn.in_proj_weight": 5.4226,
    "decoder.layers.2.ffn.4.weight": 6.8969,
    "proj.vis.3.0.weight": 57.8248, "proj.txt.weight": 51.516}
# How every learned tensor of DETRIS-B of 200 numbers or more starts: its standard deviation, by the
# first pattern that its name matches. Not here: norms (1 and 0) and what starts at 0.
RECORDED_STARTS = {
    r"resblocks.*dense_branch1.conv.weight": 0.0727, r"resblocks.*branch2.0.conv.weight": 0.0588,
    r"resblocks.*branch2.1.conv.weight": 0.1704, r"resblocks.*branch3.0.conv.weight": 0.0537,
    r"resblocks.*branch3.1.conv.weight": 0.1276, r"resblocks.*fc1.weight": 0.0256,
    r"resblocks.*fc2.(weight|bias)": 0.0722, r"dinov2.*branch1.conv.weight": 0.1251,
    r"dinov2.*branch2.0.conv.weight": 0.1021, r"dinov2.*branch2.1.conv.weight": 0.1667,
    r"dinov2.*branch3.0.conv.weight": 0.0945, r"dinov2.*branch3.1.conv.weight": 0.1,
    r"dinov2.*in_proj_weight": 0.0625, r"dinov2.*(fc1|fc2|proj).weight": 0.02,
    r"(neck|decoder).*in_proj_weight": 0.0312, r"neck.f[34]_proj": 0.0208,
    r"neck.f5_proj": 0.0255, r"neck.aggr": 0.0147, r"(neck.coord|proj.vis.[13])": 0.0085,
    r"proj.vis.4": 0.0361, r"(neck|decoder|proj)": 0.0255}


def released_shapes(net):
    """Name and shape of every tensor of the files in which the authors' programs keep a model."""
    detris = net.vision.shape.family == "dinov2"
    shapes = {}
    for prefix, tower, kind in (
            ("dinov2." if detris else "backbone.", net.vision, net.vision.shape.family),
            ("txt_backbone." if detris else "backbone.", net.text, net.text.shape.family)):
        shapes |= {prefix + name: list(tensor.shape)
                   for name, tensor in published(tower, kind).items()}
    others = {name: tensor for name, tensor in net.state_dict().items()
              if not name.startswith(("vision.", "text."))}
    for name, tensor in others.items():
        theirs, shape = backbones.renamed(name, model.RELEASED_NAMES), list(tensor.shape)
        if ".value." in theirs:                     # they have queries and keys, too
            theirs, shape[0] = theirs.replace("value.", "in_proj_"), 3 * shape[0]
        transposed = theirs == "neck.f5_proj.0.weight"
        if theirs.startswith("bridger.zoom") and len(shape) == 3:
            shape.append(1)
            transposed = ("zoom_in" in theirs) == (".2." in theirs)
        shapes[theirs] = [shape[1], shape[0], *shape[2:]] if transposed else shape
    return shapes


def recorded_weight(name, shape):
    """The tensor of that name in the recordings: seeded by its CRC-32, scaled by its kind."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise, last = torch.randn(shape, generator=generator), name.split(".")[-1]
    if last in ("num_batches_tracked", "logit_scale"):
        return torch.tensor(1) if last == "num_batches_tracked" else torch.tensor(2.6592)
    if last in ("running_var", "running_mean", "gamma"):
        return {"running_var": 0.8 + 0.4 * noise.sigmoid(), "running_mean": 0.1 * noise,
                "gamma": 0.3 + 0.05 * noise}[last]
    if len(shape) == 1:
        return 1 + 0.1 * noise if last == "weight" else 0.05 * noise
    if re.search("embed|token|position", last):
        return 0.3 * noise
    inputs = shape[0] if last in ("text_projection", "proj") else math.prod(shape[1:])
    return noise / math.sqrt(inputs)


class Released(unittest.TestCase):
    """Checkpoints of the authors' programs, DETRIS and ETRIS."""

    def test_logits_are_those_of_the_authors_programs(self):
        for name, (spread, logits) in RECORDED.items():
            with torch.device("meta"):
                net = model.build(name, **{"etris": {"bridge_width": 64}}.get(name, {}))
            net = model.load_released("recorded", {
                key: recorded_weight(key, shape) for key, shape in released_shapes(net).items()})
            size, generator = net.config.image_size, torch.Generator().manual_seed(7)
            images = torch.randn(2, 3, size, size, generator=generator)
            tokens = torch.zeros(2, net.config.length, dtype=torch.int64)
            for row, count in zip(tokens, (3, 7)):
                words = torch.randint(1, 49000, (count,), generator=generator)
                row[:count + 2] = torch.tensor([49406, *words, 49407])
            with torch.inference_mode():
                found = net(images, tokens)[:, 0]
            side = found.shape[-1]
            found = found[:, [0, side // 3, side - 1]][..., [1, side // 2, side - 2]].flatten()
            self.assertLess((found - torch.tensor(logits)).abs().max(), 1e-4 * spread, name)
            if name == "detris-b":
                self.one_step(net, images, tokens)

    def one_step(self, net, images, tokens):
        net.train()
        for layer in net.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            if isinstance(layer, nn.MultiheadAttention):
                layer.dropout = 0.0
        masks = torch.rand(2, 1, 448, 448, generator=torch.Generator().manual_seed(5)) > 0.7
        value = loss.text_to_pixel_loss(net(images, tokens), masks.float())
        value.backward()
        self.assertAlmostEqual(value.item(), RECORDED_LOSS, delta=1e-5)
        norms = {backbones.renamed(name, model.RELEASED_NAMES): p.grad.norm().item()
                 for name, p in net.named_parameters() if p.requires_grad}
        for name, norm in RECORDED_GRADIENTS.items():
            self.assertAlmostEqual(norms[name] / norm, 1, delta=0.01, msg=name)

    def test_training_starts_as_in_the_authors_program(self):
        torch.manual_seed(0)
        for name, parameter in model.build("detris-b").named_parameters():
            if not parameter.requires_grad or parameter.numel() < 200:
                continue
            theirs = backbones.renamed(name, model.RELEASED_NAMES).replace(".value.", ".in_proj_")
            spread = next((v for k, v in RECORDED_STARTS.items() if re.search(k, theirs)), None)
            if re.search(r"(norm|bn)\w*\.|ln_|\.1\.(weight|bias)$|ffn\.3|norm\d", theirs) or (
                    re.search("bias$", theirs)
                    and not re.search("resblocks.*fc2|neck.txt|ffn|^proj", theirs)):
                spread = 0
            self.assertAlmostEqual(float(parameter.detach().std()), spread, delta=0.15 * spread,
                                   msg=theirs)

    @mock.patch.dict(backbones.TEXT, t=backbones.TextShape(64, 6, 1, 64, 300, 77))
    @mock.patch.dict(backbones.VISION, v=backbones.VisionShape(14, 128, 6, 2, 5, 4),
                     deep=backbones.VisionShape(14, 64, 24, 1, 5, 4),
                     c=backbones.VisionShape(16, 128, 6, 2, 3, 0, 64, "clip"))
    @mock.patch.dict(model.PRESETS)
    def test_files_are_read_as_they_are_and_refused_by_name(self):
        """Small models in files of the authors' form."""
        path = folder(self) / "a.pth"
        for preset, fields, unused in (
                ("detris-b", {"vision": "v", "features": (2, 4), "visual_adapter_rank": 32,
                              "visual_adapter_layers": (1, 3), "text_adapter_rank": 16,
                              "text_adapter_layers": (1, 2, 5)}, ["txt_backbone.visual.proj"]),
                ("detris-l", {"vision": "deep", "text_adapter_layers": (1, 5)}, []),
                ("detris-l-mixed", {"vision": "deep", "visual_adapter_rank": 16,
                                    "text_adapter_layers": (1, 5)}, []),
                ("etris", {"vision": "c", "image_size": 48, "features": (1, 3),
                           "bridge_width": 64}, [])):
            model.PRESETS[preset] = replace(
                model.PRESETS[preset], text="t", head_width=64, head_layers=2, **fields)
            net = model.build(preset)
            state = {f"module.{name}": recorded_weight(name, shape) for name, shape in {
                **released_shapes(net), **dict.fromkeys(unused, (3, 3))}.items()}
            torch.save({"epoch": 40, "best_iou": np.float64(0.7), "state_dict": state}, path)
            again = model.load(path)
            self.assertEqual(again.config, net.config)
            self.assertTrue(torch.equal(again.head.neck.maps[2][0].weight,
                                        state["module.neck.f5_proj.0.weight"].transpose(0, 1)))
            torch.save({"state_dict": {**state, "module.proj.vis.4.bias": torch.ones(2)}}, path)
            with self.assertRaisesRegex(backbones.WeightsError, "first: proj.vis.4.bias, .2,."):
                model.load(path)
            torch.save({"state_dict": state}, path)
            args = argparse.Namespace(dataset="refcocog-umd", length=None, vocabulary="v",
                                      vision_weights=None, text_weights=None)
            with mock.patch("evaluate.make_tokenizer"):
                found = evaluate.load_checkpoint(path, args, CPU)[0].config.length
            self.assertEqual(found, 17 if "mixed" in preset else 22)

    def test_tokens_of_data_sets(self):
        names = ("refcoco", "refcocog-umd", "refcocog-google", "mixed", "mine")
        two, one, no = [17, 22, 22, 22, 17], [17, 22, 17, 17, 17], [17] * 5     # G-Refs
        due = {"dcris-b": two, "etris": two, "detris-b": one, "detris-l": one, "detris-l-mixed": no}
        self.assertEqual(due, {preset: [model.usual_length(model.PRESETS[preset], name)
                                        for name in names] for preset in due})


@unittest.skipIf(VOCABULARY is None, "no bpe_simple_vocab_16e6.txt.gz in pretrained/")
class ClipTokenizer(unittest.TestCase):
    # Made with an independent implementation (open_clip's tokenizer on the same vocabulary, with
    # OpenAI's two special tokens and without ftfy).
    TABLE = [
        ('the left cat on the sofa', [518, 1823, 2368, 525, 518, 15723]),
        ("woman's shirt, don't they've we're I'll it'd I'm", [2308, 568, 2523, 267, 847, 713, 889,
         1200, 649, 982, 328, 1342, 585, 1896, 328, 880]),
        ('Row of chairs: closest 3rd from the LEFT!!!', [1044, 539, 12033, 281, 14975, 274, 1973,
         633, 518, 1823, 995]),
        ('café naïve Zürich straße ŒUVRE', [15304, 1097, 35689, 563, 89, 6522, 4021, 1894, 127, 253,
         324, 129, 241, 84, 17501]),
        ('x² ½ Ⅳ 42nd ١٢٣', [343, 41175, 33613, 158, 227, 367, 275, 273, 1764, 149, 350, 149, 351,
         149, 352]),
        ('日本語の猫 где кот', [39121, 44353, 34002, 252, 21575, 163, 234, 360, 140, 111, 140, 112, 140,
         369, 27152, 13506, 141, 480]),
        ('\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 giraffe', [7334, 25023, 26304, 964,
         356, 22826]),
        ('&lt;b&gt; &amp;amp; &eacute; it&#39;s', [283, 321, 285, 261, 4166, 585, 568]),
        ('tabs\t and\n new\xa0lines \u2003 ', [29163, 537, 686, 3418]),
        ('a_b under_score @#$% -- ...', [320, 318, 321, 1798, 318, 4431, 31, 2, 3, 260, 2432, 678]),
        ("“quoted” ’s '' 's 'S 'ſ !'s", [728, 506, 27706, 728, 507, 728, 503, 338, 8445, 568, 568,
         6, 129, 379, 13222, 338]),
        ('<|endoftext|> <|startoftext|> <|endof', [49407, 49406, 27, 347, 945, 539]),
        ('İstanbul K ǅ ª º', [328, 16384, 11231, 330, 131, 484, 126, 359, 28059]),
        ('e\u0301 n\u0303 \ufb01', [324, 136, 479, 333, 136, 481, 171, 105, 479]),
        ('blk&wht tv guy w/ glasses', [22872, 261, 32470, 1583, 2149, 342, 270, 6116]),
        ('!', [256]),
        ('antidisestablishmentarianism pneumonoultramicroscopic', [3120, 4262, 7726, 12658, 1585,
         44351, 28714, 749, 20253, 9800, 535, 532, 23869]),
    ]

    @classmethod
    def setUpClass(cls):
        cls.tokenizer = data.Tokenizer(VOCABULARY)

    def test_table(self):
        for text, ids in self.TABLE:
            with self.subTest(text):
                self.assertEqual(self.tokenizer.encode(text), ids)

    def test_frame(self):
        path = folder(self) / "merges.txt"
        path.write_text("\n".join(self.tokenizer.text.split("\n")[:data.MERGES + 1]))
        for tokenizer in (self.tokenizer, data.Tokenizer(path)):
            tokens = tokenizer(["the left cat", "cat " * 40], 8)
            self.assertEqual(tokens.dtype, torch.int64)
            self.assertEqual(tokens.tolist(), [[49406, 518, 1823, 2368, 49407, 0, 0, 0],
                                               [49406, 2368, 2368, 2368, 2368, 2368, 2368, 49407]])
            self.assertEqual(tokenizer.size, 49408)


class OwnTokenizer(unittest.TestCase):
    def test_learned_merges(self):
        merges = data.learn_merges(["low low low lower newest newest"])
        tokenizer = data.Tokenizer(merges.encode())
        self.assertEqual(len(tokenizer.encode("low newest lower")), 3)
        self.assertEqual(len(tokenizer.encode("low  NEWEST\tlower")), 3)
        self.assertGreater(len(tokenizer.encode("unseen ²")), 2)
        self.assertEqual(tokenizer(["low"], 4).tolist()[0][0], tokenizer.size - 2)

    def test_broken_vocabularies(self):
        path = folder(self) / "v"
        cut = gzip.compress(b"#version\n" * 999)[:-20]
        for content in (b"", b"no header\na b\n", b"#version\none\n", b"\xff", cut):
            path.write_bytes(content)
            for source in (path, content):
                with self.assertRaisesRegex(data.DataError, "not a BPE vocabulary"):
                    data.Tokenizer(source)


# width, height, size; photo, mask and the way back of Letterbox.test_opencv.
OPENCV = [
    (64, 43, 45, [123, 123, 123, 181, 122, 27, 133, 54, 91, 117, 117, 117, 206, 151, 70, 168,
     102, 127, 104, 104, 104, 28, 165, 81, 202, 158, 106], [0, 0, 0, 0, 80, 255, 0, 255, 80,
     255, 0, 255, 80, 255, 0, 255], [1.116594, 0.035335, 0.29753, 0.959164, 0.009498, 0.262757,
     0.082005, 0.242975, 0.40332]),
    (50, 75, 96, [123, 167, 84, 123, 114, 129, 123, 139, 136, 117, 206, 113, 117, 164, 179, 117,
     103, 176, 104, 206, 71, 104, 193, 81, 104, 143, 211], [0, 255, 255, 255, 0, 0, 0, 0, 0,
     215, 215, 215, 0, 255, 255, 255], [0.366622, 0.490997, 0.738106, 0.279325, 0.366622,
     0.490997, 0.738106, 0.279325, 0.366622, 0.490997, 0.738106, 0.279325]),
    (640, 480, 448, [123, 123, 123, 159, 183, 107, 125, 107, 232, 117, 117, 117, 190, 66, 139,
     76, 136, 89, 104, 104, 104, 221, 105, 188, 133, 165, 118], [0, 0, 0, 0, 183, 0, 255, 183,
     183, 0, 255, 183, 183, 0, 255, 183], [0.114059, 0.774991, 0.418392, 0.114059, 0.774991,
     0.418392, 0.114059, 0.774991, 0.418392]),
]


class Letterbox(unittest.TestCase):
    def test_borders(self):
        square = data.letterbox(Image.new("RGB", (100, 50), "white"), 80)
        self.assertTrue((square[:, 22:58, 2:-2] == 255).all())
        borders = data.normalise(square[None])[:, :, [*range(19), *range(61, 80)]]
        self.assertLess(float(borders.abs().max()), 0.01)           # 0, but for rounding

    def test_extreme_photos_take_no_more_room_than_others(self):
        for size in ((900_000, 4), (4, 900_000), (4480, 10), (10, 4480), (1, 1)):
            self.assertEqual(data.letterbox(Image.new("RGB", size), 448).shape, (3, 448, 448))
        self.assertEqual(data.unletterbox(torch.rand(448, 448), 500_000, 3).shape, (3, 500_000))

    def test_opencv(self):
        """What OpenCV 4.8.1's warpAffine made of these, as the authors' programs call it."""
        for width, height, size, photo, mask, back in OPENCV:
            c, y, x = np.mgrid[:3, :height, :width]
            pixels = ((x * x * 7 + y * 13 + x * y * 3 + c * 29) % 256).astype(np.uint8)
            square = data.letterbox(Image.fromarray(pixels.transpose(1, 2, 0)), size)
            flags = torch.from_numpy(((x[0] // 3 + y[0] // 4) % 2 * 255).astype(np.uint8))
            v, u = np.mgrid[:size, :size]
            likely = torch.from_numpy(((u * 5 + v * v) % 64 / 63).astype(np.float32))
            found = (square[:, 3::size // 3, 4::size // 3].flatten(),
                     data.letterbox_mask(flags, size)[0, 3::size // 4, 4::size // 4].flatten(),
                     data.unletterbox(likely, width, height)[
                         height // 8::height // 3, 1::width // 3].flatten())
            for name, ours, theirs, most in zip(
                    ("photo", "mask", "back"), found, (photo, mask, back), (1, 1, 1e-5)):
                difference = np.abs(ours.double().numpy() - theirs).max()
                self.assertLessEqual(difference, most, (width, height, size, name))


class Refer(unittest.TestCase):
    """A REFER data set with everything that real ones have."""

    def setUp(self):
        self.root = folder(self)
        place = self.root / "images" / "train2014"
        place.mkdir(parents=True)
        self.photos = {i: place / f"COCO_train2014_{i:012d}.{'png' if i == 5 else 'jpg'}"
                       for i in range(1, 6)}
        noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6                        # "turn me by 90 degrees"
        for (i, path), mode in zip(self.photos.items(), ("RGB", "L", "CMYK", "RGB", "P")):
            Image.fromarray(noise).convert(mode).save(path, exif=exif if i == 4 else b"")
        stripe = np.zeros((60, 80), np.uint8)
        stripe[:, 7] = 1
        runs = {"size": [60, 80], "counts": [420, 60, 4320]}
        packed = data.pycocotools.mask.frPyObjects(runs, 60, 80)["counts"].decode()
        truth = {                   # annotation: expression, segmentation, photo
            11: ("polygons", [[10, 10, 30, 10, 30, 40, 10, 40]], 1),
            12: ("two parts", [[0, 0, 10, 0, 10, 10, 0, 10], [50, 20, 60, 20, 60, 50, 50, 50]], 1),
            13: ("uncompressed RLE", runs, 2),
            14: ("compressed RLE", {"size": [60, 80], "counts": packed}, 3),
            15: ("turned photo", [[0, 0, 80, 0, 80, 20, 0, 20]], 4),
            16: ("one pixel wide", [[5, 0, 6, 0, 6, 60, 5, 60]], 5),
            17: ("a spare line in it", [[1, 1, 2, 2], [20, 20, 40, 20, 40, 40, 20, 40]], 2)}
        self.instances = {
            "images": [{"id": i, "width": 80, "height": 60, "file_name": path.name}
                       for i, path in self.photos.items()],
            "annotations": [{"id": a, "image_id": i, "segmentation": s, "category_id": 1}
                            for a, (_, s, i) in truth.items()]}
        self.refs = [{"ref_id": a + 100, "ann_id": a, "image_id": i, "category_id": 1,
                      "split": "val" if a == 17 else "train",
                      "file_name": f"COCO_train2014_{i:012d}_{a}.jpg",
                      "sentences": [{"sent": text, "raw": text, "tokens": text.split(),
                                     "sent_id": a} for text in (name, "it")]}
                     for a, (name, _, i) in truth.items()]
        self.write("refcoco", "unc", self.refs)
        self.tokenizer = data.Tokenizer(b"#version: 0.2\n")

    def write(self, name, split_by, refs, file="refs({}).p"):
        data.read_refs.cache_clear()
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / file.format(split_by)).write_bytes(
            refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2)
            if file.endswith("p") else json.dumps(refs).encode())
        (self.root / name / "instances.json").write_text(json.dumps(self.instances))

    def read(self, name="refcoco", split="train", **options):
        return data.read_split(self.root, name, split, **options)[0]

    def test_masks(self):
        areas = {ref.id - 100: int(data.decode_mask(ref).sum())
                 for ref in self.read() + self.read(split="val")}
        self.assertEqual(areas, {11: 600, 12: 400, 13: 60, 14: 60, 15: 1600, 16: 60, 17: 400})

    def test_photos_of_every_kind(self):
        photos = {i: data.read_photo(path) for i, path in self.photos.items()}
        for i, photo in photos.items():
            self.assertEqual((photo.mode, photo.size), ("RGB", (80, 60)), i)
        turned, plain = (np.asarray(photos[i]).astype(int) for i in (4, 1))
        self.assertLess(np.abs(turned - plain).mean(), 1)           # EXIF is not applied
        self.assertEqual(data.read_photo(self.photos[4], upright=True).size, (60, 80))

    def test_samples_depend_on_seed_epoch_and_index_alone(self):
        """In training. For evaluation, every expression comes once."""
        refs = self.read()
        drawn = []
        for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
            dataset = data.TrainSet(refs, self.tokenizer, 64, 17, seed)
            drawn.append([dataset[epoch, i]["tokens"].tolist() for i in range(6)])
        self.assertEqual([other == drawn[0] for other in drawn], [True, True, False, False])
        image, mask, ref = (dataset[1, 0][key] for key in ("image", "mask", "ref"))
        self.assertEqual((image.shape, image.dtype), ((3, 64, 64), torch.uint8))
        self.assertEqual((mask.shape, ref), ((1, 64, 64), "111"))
        expressions = data.ExpressionSet(refs, self.tokenizer, 64, 17)
        self.assertEqual([expressions[i]["index"] for i in range(len(expressions))],
                         list(range(12)))
        self.assertEqual(expressions[2]["mask"].shape, (60, 80))

    def test_a_pickle_as_python_2_wrote_it(self):
        """Protocol 0, byte strings and unicode strings, long integers."""
        self.write("refcoco", "unc", (
            b"(lp0\n(dp1\nS'ref_id'\np2\nI1\nsS'ann_id'\nL11L\nsS'image_id'\nI1\nsS'split'\n"
            b"S'train'\nsS'file_name'\nS'x_11.jpg'\nsS'sentences'\n(lp3\n(dp4\nS'sent'\n"
            b"Vcaf\\u00e9\nsS'tokens'\n(lp5\nS'caf\\xc3\\xa9'\naS'cafe'\nasasa."))
        ref, = self.read()
        self.assertEqual((ref.id, ref.sentences), (1, ("café",)))

    def test_json(self):
        """Entries of four keys, and a photo in a folder of the folder."""
        expected, photo = self.read(), self.root / "mine" / "images" / "by day" / "a.png"
        photo.parent.mkdir(parents=True)
        self.photos[5].rename(photo)
        self.instances["images"][4]["file_name"] = "by day/a.png"
        self.write("mine", "x", [
            {**{key: ref[key] for key in ("image_id", "ann_id", "split")},
             "sentences": [s["sent"] for s in ref["sentences"]]} for ref in self.refs],
                   "refs({}).json")
        self.assertEqual(self.read("mine"), [
            ref._replace(id=i, image=str(photo) if ref.image_id == 5 else ref.image)
            for i, ref in enumerate(expected)])

    def test_several_objects_or_none(self):
        """gRefCOCO: masks are joined, or empty. What is broken is named, and can be left out."""
        for ids, message in (([11, -1], "or .-1. alone"), ([], "or .-1. alone"),
                             ([11, 13], "its annotation is of another image")):
            self.write("mine", "unc", [
                {"image_id": 1, "ann_id": i, "split": "train", "sentences": "them"}
                for i in ([11, 12], [-1], [12], ids)], "grefs({}).json")
            refs = self.read("mine", skip_broken=True)
            self.assertEqual([int(data.decode_mask(ref).sum()) for ref in refs], [1000, 0, 400])
            with self.assertRaisesRegex(data.DataError, f"entry 3: .*{message}.*--skip-broken"):
                self.read("mine")
        self.assertEqual(data.TrainSet(refs, self.tokenizer, 64, 17)[1, 1]["mask"].max(), 0)

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is not installed")
    def test_hugging_faces_tables(self):
        import pyarrow.parquet
        images, objects = ({entry["id"]: json.dumps(entry) for entry in self.instances[key]}
                           for key in ("images", "annotations"))
        rows = [{**ref, "bbox": [0.5, 1, 2, 3], "raw_anns": objects[ref["ann_id"]],
                 "raw_image_info": images[ref["image_id"]]} for ref in self.refs]
        photo = {"image": {"bytes": self.photos[3].read_bytes(), "path": "x.jpg"}, "image_id": 3,
                 "file_name": "new.jpg", "samples": [{
                     "id": 14, "category": "cat", "sentences": ["it"], "bbox": [7, 0, 1, 60],
                     "mask": self.instances["annotations"][3]["segmentation"]}]}
        files = [self.root / f"{i}.parquet" for i in range(4)]
        for file, table in zip(files, (rows[:4], rows[4:], [photo], [{"a": 1, "b": 2}])):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
        it = self.read()[3]._replace(id=14, sentences=("it",),
                                     image=str(self.root / "m" / "images" / "new.jpg"))
        for inputs, name, read_as, split, expected in (
                (files[:2], "refcoco+", "refcoco+", "val", self.read(split="val")),
                (files[:2], "refcocog", "refcocog-umd", "train", self.read()),
                (files[2:3], "m", "m", "val", [it])):
            program(data, "parquet", *inputs, self.root / name)
            self.assertEqual(self.read(read_as, split), expected)
        for inputs, name, message in (
                (files[3:4], "new", "3.parquet, row 0: not read as .*; columns: a, b"),
                ([files[0], self.photos[1]], "new", "1.jpg, row 0: not read as .*agic"),
                ([], "new", "takes files and a folder"), (files[:1], "m", "m exists already")):
            refused(self, data, ["parquet", *inputs, self.root / name], message)
        self.assertFalse([*self.root.glob("*new*"), *self.root.glob("*.tmp")])

    def read_all(self, skip_broken):
        """Reads all of train, and a training sample: how many entries were left out."""
        data.read_refs.cache_clear()
        refs, left_out = data.read_split(self.root, "refcoco", "train", skip_broken)
        samples = data.ExpressionSet(refs, self.tokenizer, 64, 17, skip_broken)
        data.TrainSet(refs, self.tokenizer, 64, 17, 0, skip_broken)[1, 0]
        return left_out + sum(samples[i] is None for i in range(len(samples)))

    def test_broken_data_sets(self):
        """One line says what is wrong. --skip-broken leaves out an entry, but not a whole file."""
        files = refs, coco = [self.root / "refcoco" / name
                              for name in ("refs(unc).p", "instances.json")]
        ref, image, mask = self.refs[0], *(self.instances[key][0]
                                           for key in ("images", "annotations"))
        photo, deep = self.photos[1], io.BytesIO()
        Image.new("F", (80, 60)).save(deep, "TIFF")
        whole = {path: path.read_bytes() for path in (*files, photo)}
        for where, change, message in (
                (refs, pickle.dumps([Harm(self.root / "h")]), r"asks for \w+.mkdir, which could"),
                (refs, pickle.dumps({"refs": []}), "expected a list of refs"),
                (refs, whole[refs][:-50], r"refs\(unc\).p: cannot be read"),
                (coco, whole[coco][:99], "instances.json: cannot be read"),
                (coco, b'{"annotations": []}', "no 'images'"),
                (ref, {"ann_id": 10**30}, "entry 0: .*no 'annotation 10+'"),
                (ref, {"image_id": [1]}, r"entry .*no 'image \[1\]'"),
                (ref, {"sentences": [{"sent": " &nbsp; "}]}, "an expression is empty"),
                (ref, {"sentences": [{"tokens": []}]}, "no 'sent'"),
                (image, {"file_name": "\x1b[2J"}, r"no image folder holds \?\[2J"),
                (image, {"width": 81}, "pixels, but instances.json says 81x"),
                (mask, {"segmentation": None}, "its mask or an expression is empty"),
                *((mask, {"segmentation": wrong}, "ref 111 of .*unusable segmentation")
                  for wrong in ([[1, 1, 2, 2]], [[math.nan] * 6], [[-9, -9, -5, -9, -5, -5]],
                                [[4e8, 4e8, -4e8, -4e8, 4e8, 0]],
                                {"size": [60, 80]}, {"size": [80, 60], "counts": [9, 4791]},
                                {"size": [60, 80], "counts": [9, 9000]})),
                (photo, deep.getvalue(), "more than 8 bits"),
                (photo, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not identify")):
            with self.subTest(message=message, change=change):
                if isinstance(where, dict):
                    with mock.patch.dict(where, change):
                        self.write("refcoco", "unc", self.refs)
                else:
                    where.write_bytes(change)
                with self.assertRaisesRegex(data.DataError, rf"\A.*{message}.*\Z"):
                    self.read_all(skip_broken=False)
                if where in files:
                    with self.assertRaises(data.DataError):
                        self.read_all(skip_broken=True)
                else:
                    self.assertGreaterEqual(self.read_all(skip_broken=True), 1)
                for path, content in whole.items():
                    path.write_bytes(content)
        self.assertFalse((self.root / "h").exists())

    def test_odd_texts_are_read(self):
        for text in ("\x00\x1b[2J\x07", "\u202eהחתול\u202c", "cat \ud800", "a word " * 999):
            self.refs[0]["sentences"] = [{"sent": text}]
            self.write("refcoco", "unc", self.refs)
            self.assertEqual(self.read_all(skip_broken=False), 0)

    def test_broken_photos_are_refused_or_skipped(self):
        self.photos[1].write_bytes(self.photos[1].read_bytes()[:200])
        for dataset, broken in ((data.TrainSet, (1, 0)), (data.ExpressionSet, 0)):
            with self.assertRaisesRegex(data.DataError, "1.jpg: cannot be read as .*--skip-broken"):
                dataset(self.read(), self.tokenizer, 64, 17)[broken]
        train_set, expressions = (dataset(self.read(), self.tokenizer, 64, 17, skip_broken=True)
                                  for dataset in (data.TrainSet, data.ExpressionSet))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual([train_set[1, i]["ref"] for i in range(4)],
                             [str(train_set.refs[i].id) for i in (2, 2, 2, 3)])
            self.assertEqual([expressions[i] is None for i in range(6)], [True] * 4 + [False] * 2)
            with self.assertRaisesRegex(data.DataError, "every photo or mask is broken, .*1.jpg"):
                data.TrainSet(train_set.refs[:1], self.tokenizer, 64, 17, skip_broken=True)[1, 0]
        self.assertRegex(err.getvalue(), r"(left out: .*1.jpg: cannot be read as an image.*\n){6}")

    def test_mixed_leaves_out_photos_of_val_and_test(self):
        for name, split_by in (("refcoco+", "unc"), ("refcocog", "umd")):
            self.write(name, split_by, [
                {**ref, "split": "test" if ref["image_id"] == 3 and name == "refcocog" else "train"}
                for ref in self.refs])
        clean = self.read("mixed")
        self.assertEqual({ref.image_id for ref in clean}, {1, 4, 5})      # 2 is val, 3 is test
        self.assertEqual(len(clean), 3 * 4)
        self.assertEqual(len(self.read("mixed", keep_leaks=True)), 6 + 7 + 6)

    def test_what_is_missing_is_said(self):
        self.write("mine", "unc", self.refs)
        self.assertEqual(len(self.read("mine")), 6)             # the only refs file
        self.write("mine", "other", self.refs)
        self.assertEqual(len(self.read("mine-other")), 6)
        for name, split, message in (
                ("mine", "train", "no data set 'mine'.*mine-other, mine-unc"),
                ("refcocog-umd", "train", "'refcocog-umd'; found: mine-other, mine-unc, ref"),
                ("refcoco", "testA", "no split 'testA'; found: train, val")):
            with self.assertRaisesRegex(data.DataError, message):
                self.read(name, split)
        shutil.rmtree(self.photos[1].parent)
        data.read_refs.cache_clear()
        with self.assertRaisesRegex(data.DataError, "no images in any of .*train2014"):
            self.read()
        with mock.patch.dict(sys.modules, pyarrow=None):
            refused(self, data, ["parquet", "x.parquet", self.root / "x"], "pyarrow")

    def test_check_prints_a_table(self):
        self.assertIn("| refcoco | train | 6 | 12 | published: 42,404 and 120,624 |",
                      program(data, "check", self.root)[0])
        self.write("a", "x", b"no pickle")
        self.write("b", "x", [{**self.refs[0], "image_id": 9}, *self.refs])
        self.instances["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
        self.write("c", "x", self.refs)
        out, err = program(data, "check", self.root, status=2)
        for row in ("a .* broken .*cannot be read", "b .* train .* 6 .* 12 ", "c .* val .* 1 .* 2 ",
                    "b .* broken .*entry 0: .*no 'image 9'", "c .* broken .*ref 111 of "):
            self.assertRegex(out, rf"(?m)^\| {row}")
        self.assertEqual(lines_of(err), [f"data.py: {self.root}: broken: a, b, c"])


class Drawn(unittest.TestCase):
    def referred(self, text, figures, domain):
        """Reads an expression back, word by word: the figures that it can refer to."""
        def matching(words):
            return [f for f in figures if {*words} <= {*f[:4], "shape"}]

        words = text.removeprefix("the ")
        for relation, (dx, dy) in domain.relations.items():
            left, _, right = words.partition(f" {relation} the ")
            if right:
                anchor, = matching(right.split())
                found = [f for f in matching(left.split()) if f is not anchor]
                if relation == "nearest to":
                    return [min(found, key=lambda f: math.hypot(f.x - anchor.x, f.y - anchor.y))]
                return [f for f in found if (f.x - anchor.x) * dx + (f.y - anchor.y) * dy > 0]
        first, *rest = words.split()
        if first in data.EXTREMES:
            dx, dy = data.EXTREMES[first]
            return [max(matching(rest), key=lambda f: f.x * dx + f.y * dy)]
        return matching([first, *rest])

    def test_an_expression_refers_to_one_figure(self):
        for name, domain in data.DOMAINS.items():
            read = [0, 0, 0]
            for seed in range(150):
                figures = data.invent_figures(random.Random(seed), 64, 48, domain)
                for figure in figures:
                    for kind, texts in enumerate(data.expressions(figure, figures, 4, domain)):
                        read[kind] += len(texts)
                        for text in texts:
                            self.assertEqual(self.referred(text, figures, domain), [figure], text)
            self.assertGreater(min(read), 500, name)

    def test_files(self):
        text = "the little striped coral diamond to the right of the big dotted lime circle"
        for name in data.DOMAINS:
            root = folder(self)
            home = data.draw_shapes(root, {"train": 30, "val": 4, "test": 3}, name=name)
            splits, broken = data.read_refs(root, name)
            self.assertEqual((set(splits), broken), ({"train", "val", "test"}, []))
            refs = splits["train"]
            self.assertTrue(all(data.decode_mask(ref).sum() > 20 for ref in refs))
            tokenizer = data.Tokenizer(home / "merges.txt")         # a word is a token
            self.assertEqual(len(tokenizer.encode(text)), len(text.split()))
            self.assertLessEqual(tokenizer.size, backbones.TEXT["small"].vocabulary)
            refused(self, data, [name, root], "exists already")       # never drawn over


class Metrics(unittest.TestCase):
    def test_by_hand(self):
        table = np.array([[0, 1, 2, 2], [1, 3, 4, 3], [2, 95, 100, 99], [3, 0, 10, 1]])
        found = evaluate.metrics(table)
        self.assertAlmostEqual(found["miou"], 100 * (0.5 + 0.75 + 0.95 + 0) / 4)
        self.assertAlmostEqual(found["oiou"], 100 * 99 / 116)
        self.assertEqual([found[f"p{p}"] for p in (50, 60, 70, 80, 90)], [50, 50, 50, 25, 25])
        self.assertEqual((len(found), found["expressions"]), (8, 4))

    def test_expressions_without_target_by_hand(self):
        """A prediction of 49 pixels is empty, one of 50 is not; then the same with a target."""
        found = evaluate.metrics(np.array([[0, 0, 49, 0], [1, 0, 50, 0], [2, 49, 99, 99],
                                           [3, 50, 100, 100], [4, 80, 120, 100]]))
        for key, value in {"miou": (1 + 0 + 0 + 1 / 2 + 2 / 3) / 5, "n_acc": 1 / 2, "t_acc": 2 / 3,
                           "oiou": 130 / (50 + 99 + 100 + 120), "p50": 1 / 3}.items():
            self.assertAlmostEqual(found[key], 100 * value, msg=key)

    def test_probabilities_keep_the_corners(self):
        logits, images = torch.randn(2, 1, 8, 8), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        net = mock.Mock(return_value=logits)
        net.config.exact_masks = False
        found = evaluate.probabilities(net, images, torch.zeros(2, 17), CPU, None)
        corners = logits.sigmoid()[:, 0, ::7, ::7]
        self.assertTrue(torch.allclose(found[:, ::31, ::31], corners, atol=1e-6))

    def test_exact_masks_are_compared_and_predicted_pixel_by_pixel(self):
        """Centres of 2x2 logits lie at 1/4 and 3/4 of the side, of 4x4 pixels at 1/8 to 7/8."""
        logits = torch.randn(1, 1, 2, 2)
        weights = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
        net = mock.Mock(return_value=logits)
        net.config.exact_masks = True
        found = evaluate.probabilities(net, torch.zeros(1, 3, 4, 4), torch.zeros(1, 17), CPU, None)
        expected = (weights @ logits[0, 0] @ weights.t()).sigmoid()
        self.assertTrue(torch.allclose(found[0], expected, atol=1e-6))
        mask = (torch.rand(4, 4) > 0.5).float()
        value = -torch.where(mask == 1, expected, 1 - expected).log().mean()
        self.assertAlmostEqual(
            float(loss.text_to_pixel_loss(logits, mask[None, None], exact=True)), float(value), 5)

    def test_shared_batches_are_the_same_batches(self):
        whole = list(train.GlobalBatches(37, 8, 8, 0, 1, seed=3))
        self.assertNotEqual(whole, list(train.GlobalBatches(37, 8, 8, 0, 1, seed=4)))
        for world, micro in ((1, 8), (2, 4), (2, 2), (4, 2)):
            shares = [list(train.GlobalBatches(37, 8, micro, rank, world, seed=3))
                      for rank in range(world)]
            pieces = 8 // world // micro            # of a share in each batch
            self.assertEqual({len(share) for share in shares}, {4 * pieces})
            self.assertEqual(whole, [sum((sum(share[i:i + pieces], []) for share in shares), [])
                                     for i in range(0, 4 * pieces, pieces)])


class Evaluating(unittest.TestCase):
    """evaluate.py with a small random model on a few drawn scenes, of which one photo is broken."""

    @classmethod
    def setUpClass(cls):
        cls.root = folder(cls)
        cls.ckpt = cls.root / "net.pt"
        cls.tokenizer = data.Tokenizer(data.draw_shapes(cls.root / "data", TINY) / "merges.txt")
        net = model.build("shapes", head_width=32, head_heads=2, head_layers=1)
        cls.net = shake(net, spread=0.15).float()
        model.save(cls.ckpt, cls.net, run={"dataset": "shapes"},
                   vocabulary={"text": cls.tokenizer.text})
        *cls.refs, cls.last = data.read_split(cls.root / "data", "shapes", "val")[0]
        Path(cls.last.image).write_bytes(b"no photo")
        cls.common = ["--ckpt", cls.ckpt, "--data", cls.root / "data"]

    def test_any_number_of_processes_finds_the_figures_of_predict(self):
        rows, found = [], []
        for ref in (ref for ref in self.refs if ref.image != self.last.image):
            photo, mask = data.read_pair(ref)
            for sentence in ref.sentences:
                guess = evaluate.predict(self.net, self.tokenizer, photo, sentence, CPU)
                truth = mask.numpy() > 0
                rows.append([len(rows), *map(np.sum, (guess & truth, guess | truth, truth))])
        for world in (1, 2, 3):
            file, panel = self.root / f"{world}.json", self.root / f"{world}.png"
            statuses, lines = launch([
                *self.common, "--split", "val", "test", "--skip-broken", "--batch-size", 3,
                "--json", file, "--panel", panel], None, world, "evaluate")
            printed = "\n".join(lines)
            self.assertEqual(statuses, [0] * world, printed)
            self.assertRegex(printed, r"left out: .*: cannot be read as an image")
            self.assertRegex(printed, r"\| val \| \d+ \| \d+\.\d\d \|(.|\n)+\| test \|")
            self.assertEqual(Image.open(panel).width, 2 * 580)
            found.append(json.loads(file.read_text())[str(self.ckpt)])
            self.assertEqual(found[0], found[-1])
        expected = evaluate.metrics(np.array(rows))
        self.assertGreater(expected["miou"], 1)
        for key, value in expected.items():     # from batches of one expression: other rounding
            self.assertAlmostEqual(found[0]["val"][key], value, delta=0.1, msg=key)

    def test_several_checkpoints_are_shown_where_they_differ(self):
        ious = np.array(([9, 9, 5, 5, 5, 4, 1, 3, 9], [9, 8, 9, 0, 2, 0, 1, 3, 8]))
        self.assertEqual(evaluate.choose_examples(ious), [3, 2, 5, 4, 1, 8, 6, 7])
        self.assertEqual(evaluate.choose_examples(ious[:1, :3]), [0, 1, 2])
        out = self.root / "several.png"
        program(evaluate, *self.common, "--ckpt", self.ckpt, self.ckpt, "--split", "val",
                "--skip-broken", "--panel", out)
        self.assertEqual(Image.open(out).width, 4 * 190 + 10)

    def test_one_photo(self):
        path, out, inside = self.refs[0].image, self.root / "out.png", self.root / "inside.png"
        program(evaluate, "--ckpt", self.ckpt, "--image", path, "--output", out,
                "--text", "the circle", "--inside", inside)
        photo, shown, plain = (np.asarray(Image.open(file)) for file in (
            path, out, self.root / "out-mask.png"))
        mask = evaluate.predict(self.net, self.tokenizer, Image.open(path), "the circle", CPU)
        self.assertTrue(np.array_equal(plain, mask * np.uint8(255)))
        self.assertTrue(np.array_equal(shown[mask], photo[mask]) and (shown[~mask] >= 170).all())
        # The head's three maps, logits, probability, photo and mask are seven pictures beside each
        # other; rows: the adapter, the decoder, the head.
        self.assertEqual(Image.open(inside).size, (7 * 120 + 10, 3 * 164))

    def test_the_inside_of_other_methods(self):
        photo = Image.open(self.refs[0].image)
        for preset, rows in (("shapes-barleria", 4), ("shapes-etris", 4), ("shapes-lora", 2),
                             ("shapes-barleria-local", 3)):
            net = model.build(preset)
            picture = evaluate.inside(net, self.tokenizer, photo, "the circle", CPU)
            self.assertEqual(picture.height, rows * 164, preset)
        colours = np.asarray(evaluate.heat_map(torch.tensor([0, 1 / 3, 2 / 3, 1])))
        self.assertEqual([[*colours[y, x]] for y in (20, 80) for x in (20, 80)],
                         [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255]])

    def test_shares_of_attention(self):
        """Against the formula: of PyTorch's layer, and of CLIP's and EVA-02's attention."""
        def shares(q, k, padding=torch.tensor(False)):          # (B, heads, tokens, channels)
            weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(padding, -torch.inf)
            return weights.softmax(-1).mean(1)

        def cut(x):
            return x.unflatten(-1, (3, -1)).transpose(1, 2)

        layer = shake(backbones.MultiheadAttention(24, 3, kdim=10, vdim=10))
        patches, words = torch.randn(2, 5, 24).double(), torch.randn(2, 4, 10).double()
        padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
        query_bias, key_bias, _ = layer.in_proj_bias.chunk(3)
        q, k = patches @ layer.q_proj_weight.t(), words @ layer.k_proj_weight.t()
        torch.testing.assert_close(
            evaluate.attention_to_words(layer, patches, words, words, padding),
            shares(cut(q + query_bias), cut(k + key_bias), padding[:, None, None]))
        for family in ("clip", "eva"):
            tower = backbones.ViT(backbones.VisionShape(8, 24, 1, 3, 2, embed=24, family=family))
            layer, x = shake(tower.blocks[0].attention), torch.randn(1, 7, 24).double()
            rotary, (q, k, _) = tower.rotary_tables((2, 2)), layer.qkv(x).chunk(3, dim=-1)
            q, k = cut(q + (0 if rotary is None else layer.query_bias)), cut(k)
            if rotary:
                q, k = (backbones.rotate(x, *rotary) for x in (q, k))
            torch.testing.assert_close(
                evaluate.attention_of_class(layer, x, False, rotary), shares(q, k)[0, 0])

    def test_bad_input_gets_one_line_and_status_2(self):
        place, photo = folder(self), self.refs[0].image
        one = ["--image", photo, "--text", "it", "--output", place / "o.png"]
        for arguments, message in (
                (["--ckpt", self.refs[0].image], "not a readable"),
                (["--split", "testC"], "no split 'testC'; found"), (one[2:], "one photo takes"),
                (["--dataset", "mixed"], "choose one to evaluate it on"),
                (["--split", "val", "--workers", 1], f"{self.last.image}: cannot be read"),
                (["--json", self.ckpt], "net.pt is an input"), (["--length", 99], "reads 3 to 32"),
                ([*one, "--image", self.last.image], "cannot be read as an image"),
                ([*one, "--output", place / "o.cat"], "o.cat: could not be written: unknown file"),
                ([*one, "--text", " &nbsp; "], "the expression is empty")):
            refused(self, evaluate, [*self.common, *arguments], f"evaluate.py: .*{message}")
        self.assertEqual(list(place.iterdir()), [])


class Runs(unittest.TestCase):
    """train.py, as a user starts it, on a few drawn scenes: alone, and where it is disturbed."""
    SCENES = {"train": 24, "val": 4, "test": 1}         # six steps an epoch

    @classmethod
    def setUpClass(cls):
        cls.root = folder(cls)
        data.draw_shapes(cls.root / "data", cls.SCENES)
        # With dropout, which must draw the same numbers again.
        cls.command = [*SMALL_RUN, "--dropout", "0.1", "--save-every", "2",
                       "--data", cls.root / "data"]
        for world in (1, 2):
            cls.printed = cls.run_out(f"whole{world}", None, world)

    @classmethod
    def run_out(cls, out, trick=None, world=1, *more):
        """A run in ROOT/OUT: its exit statuses, and the lines it printed but for progress."""
        return launch([*cls.command, "--out", cls.root / out, *more], trick, world)

    def log(self, out):
        return [json.loads(line) for line in (self.root / out / "log.jsonl").open()]

    def tensors(self, out, name="last.pt"):
        return model.read_checkpoint(self.root / out / name)["tensors"]

    def same_as_whole(self, out, world):
        """That a run left the files of the undisturbed one, bit for bit but for the times."""
        for name in ("last.pt", "best.pt"):
            a, b = self.tensors(f"whole{world}", name), self.tensors(out, name)
            self.assertEqual([key for key in a if not torch.equal(a[key], b[key])], [])
        for key in ("epoch", "loss", "lr", "miou", "oiou", "p50"):
            self.assertEqual(*([row[key] for row in self.log(run)]
                               for run in (f"whole{world}", out)))
        self.assertEqual({path.name for path in (self.root / out).iterdir()
                          if not path.name.startswith("events.")},
                         {".lock", "log.jsonl", "last.pt", "best.pt", "val.png"})

    def test_a_run_leaves_its_log_pictures_and_checkpoints(self):
        statuses, lines = self.printed
        self.assertEqual((statuses, len(lines)), ([0, 0], 1), lines)
        self.assertRegex(lines[0], "whole2: finished after epoch 2, best mIoU on val .*--out DIR")
        for world in (1, 2):
            whole = self.root / f"whole{world}"
            self.same_as_whole(whole.name, world)
            rows = self.log(whole.name)
            self.assertEqual([row["epoch"] for row in rows], [1, 2])
            self.assertEqual([row["lr"] for row in rows], [1e-3, 1e-4])
            self.assertEqual(set(rows[0]), {"epoch", "loss", "lr", "miou", "oiou", "p50",
                                            "images_per_s", "peak_memory_gb", "seconds"})
            with Image.open(whole / "val.png") as picture:
                self.assertGreater(np.asarray(picture).std(), 5)

    def samples(self):
        refs = data.read_split(self.root / "data", "shapes", "train")[0]
        tokenizer = data.Tokenizer(self.root / "data" / "shapes" / "merges.txt")
        return data.TrainSet(refs, tokenizer, 64, 17)

    def test_micro_batches_add_up(self):
        """On a model without batch statistics, which depend on the micro-batch."""
        samples, results = self.samples(), []
        for micro in (8, 4, 1):
            torch.manual_seed(0)
            net = nn.Conv2d(3, 1, 3, padding=1).double()
            start = net.weight.detach().clone()
            net.forward = lambda images, tokens, net=net: nn.Conv2d.forward(net, images.double())
            net.config = replace(model.PRESETS["shapes"], lr=1.0, warmup=0)
            batches = train.GlobalBatches(len(samples), 8, micro, 0, 1, seed=0)
            loader = torch.utils.data.DataLoader(samples, batch_sampler=batches)
            trainer = train.Trainer(net, batches, CPU, None)
            trainer.optimizer = torch.optim.SGD(net.parameters())
            with mock.patch.object(trainer, "save"), contextlib.redirect_stderr(io.StringIO()):
                trainer.epoch(loader, 0, [], "")
            results.append([*net.weight.detach().flatten(), trainer.progress.loss / 6])
        self.assertLess(np.ptp(results, axis=0).max(), 1e-12)
        self.assertGreater(float((net.weight - start).abs().max()), 0.05)

    def test_workers_read_the_same_samples(self):
        """Also where workers are started anew instead of forked."""
        samples = self.samples()
        batches = train.GlobalBatches(len(samples), 16, 16, 0, 1, seed=0)
        for workers, start in ((0, None), (4, "fork"), (1, "spawn")):
            loader = torch.utils.data.DataLoader(
                samples, batch_sampler=batches, num_workers=workers, multiprocessing_context=start,
                worker_init_fn=data.leave_signals_to_parent if workers else None)
            for batch, places in zip(loader, batches, strict=True):
                same = torch.utils.data.default_collate([samples[place] for place in places])
                for key in ("image", "tokens", "mask"):
                    self.assertTrue(torch.equal(batch[key], same[key]))

    def test_two_processes_take_the_steps_of_one(self):
        """In double precision, where rounding cannot hide a mistake (Adam amplifies it)."""
        for world in (1, 2):
            statuses, lines = self.run_out(f"double{world}", "double", world, "--dropout", 0)
            self.assertEqual(statuses, [0] * world, lines)
        a, b = self.tensors("double1"), self.tensors("double2")
        for name in a:
            self.assertLess(float((a[name] - b[name]).abs().max()), 1e-9, name)
        for a, b in zip(self.log("double1"), self.log("double2")):
            self.assertAlmostEqual(a["loss"], b["loss"], delta=1e-12)

    def test_barleria_on_mixed_data_in_bfloat16(self):
        """The three data sets of `mixed` as copies of the drawn one. The folder is the default."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder(self))
        drawn = data.draw_shapes("data", {"train": 8, "val": 2, "test": 1})
        for name, split_by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
            shutil.copytree(drawn, f"data/{name}")
            Path("data", name, "refs(shapes).p").rename(f"data/{name}/refs({split_by}).p")
        program(
            train, *SMALL_RUN, "--preset", "shapes-barleria", "--dataset", "mixed", "--vocabulary",
            "data/refcoco/merges.txt", "--epochs", 1, "--micro-batch", 4, "--precision", "bf16")
        run = Path.cwd() / "runs" / "shapes-barleria"
        config = model.read_checkpoint(run / "best.pt")["config"]
        self.assertEqual((config.method, config.length), ("barleria", 22))
        self.assertLess(self.log(run)[0]["loss"], 0.7)

    def test_expressions_without_target_are_learned_and_evaluated(self):
        root = folder(self)
        refs = data.draw_shapes(root, self.SCENES) / "refs(shapes).p"
        entries = pickle.loads(refs.read_bytes())
        refs.write_bytes(pickle.dumps([entry if entry["ref_id"] % 2 else {**entry, "ann_id": [-1]}
                                       for entry in entries]))
        program(train, *SMALL_RUN, "--epochs", 1, "--out", root, "--data", root)
        out, _ = program(evaluate, "--ckpt", root / "best.pt", "--split", "val", "--data", root)
        self.assertRegex(out, r"\| mIoU \(gIoU\) \| oIoU \(cIoU\) .*\| N-acc \| T-acc \|(.|\n)+val")

    def test_towers_are_carried_to_another_domain(self):
        place, best = folder(self), self.root / "whole1" / "best.pt"
        data.draw_shapes(place, self.SCENES, name="shapes-b")
        common = ["--dataset", "shapes-b", "--data", place, "--init", best, *SMALL_RUN,
                  "--epochs", 1]
        before = {name: tensor for name, tensor in self.tensors("whole1", "best.pt").items()
                  if name.startswith(("vision.", "text."))}
        for preset in ("shapes-full", "shapes-lora", "shapes-compacter", "shapes-barleria"):
            program(train, "--preset", preset, *common, "--out", place / preset)
            # Wrapped layers have longer names.
            after = {re.sub(r"frozen\.|(mlp)\.0", r"\1", name): tensor
                     for name, tensor in self.tensors(place / preset).items()}
            for name, tensor in before.items():
                learns = preset == "shapes-full"
                self.assertEqual(torch.equal(after[name], tensor), not learns, (preset, name))
        lora = ["--preset", "shapes-lora", *common, "--out", place / "shapes-lora"]
        self.assertRegex(program(train, *lora)[0], "shapes-lora: finished after epoch 1")
        for more, message in (
                (["--init", place / "shapes-full" / "best.pt"], "run: init"),
                (["--init", place / "shapes-lora" / "best.pt", "--out", place / "x"], "best.pt"),
                (["--init", place / "no.pt"], "No such file.*no.pt"),
                (["--preset", "houlsby", "--out", place / "x"], "the tower has 3 blocks")):
            refused(self, train, [*lora, *more], message)

    def test_bad_input_gets_one_line_and_status_2(self):
        place = folder(self)
        (place / "last").mkdir()
        shutil.copy(self.root / "whole1" / "last.pt", place / "last")
        for arguments, message in (
                (["--preset", "dcris-b"], "needs --dataset"),
                (["--init", "a.pt", "--random-towers"], "not allowed with"),
                (["--preset", "dcris-b", "--dataset", "refcoco", "--data", place / "no"],
                 "no such file; .python backbones.py download"),
                (["--preset", "shapes-lora"], "there is no file of one: --init"),
                (["--micro-batch", "5"], "micro-batches of 5; change"),
                (["--batch-size", "9999"], "more than the .* refs"),
                (["--out", place / "last", "--lr", 1, "--seed", 1],
                 "another run: lr 0.001 there, 1.0 here; seed 0 there, 1 here; --out DIR")):
            refused(self, train, [*self.command, "--out", place / "o", *arguments], message)

    def test_the_folder_is_the_run(self):
        last = self.root / "whole1" / "last.pt"
        before = last.read_bytes()
        train.lock_folder(self.root / "locked")
        for out, status, message in (
                ("whole1", 0, "finished after epoch 2, .*; --out DIR starts another"),
                ("locked", 2, "another run is writing there")):
            statuses, lines = self.run_out(out)
            self.assertEqual((statuses, len(lines)), ([status], 1), lines)
            self.assertRegex(lines[0], f"{out}: {message}")
        self.assertEqual(last.read_bytes(), before)

    def test_killed_at_chosen_places_a_run_ends_as_if_undisturbed(self):
        for world, tricks in ((1, ("drawing", "first step", "saving", "last step", "validating",
                                   "validated", "best saved", None)),
                              (2, ("saving", "last step", "validating", None))):
            out, drawn = f"killed{world}", folder(self)
            for trick in tricks:
                statuses, lines = self.run_out(out, trick, world, "--data", drawn)
                self.assertEqual(min(statuses) < 0, trick is not None, (trick, statuses, lines))
            self.same_as_whole(out, world)

    @unittest.skipUnless(MANY, "MANY=20 kills 20 runs at random moments")
    def test_killed_at_random_a_run_ends_as_if_undisturbed(self):
        for world, run in itertools.product((1, 2), range(0, MANY, 4)):
            out = f"random{world}-{run}"
            for trick in (*["at random"] * 4, None):
                statuses, _ = self.run_out(out, trick, world)
            self.assertEqual(statuses, [0] * world)
            self.same_as_whole(out, world)

    def test_a_disturbed_run_says_why_and_goes_on(self):
        """A signal ends it after the step, and saves it. Where one process fails, none hangs."""
        for trick, statuses, said, place in (
                ("terminate", [143], "", (1, 3)), ("interrupt", [130], "", (1, 3)),
                ("terminate all", [143], "", (1, 3)),
                ("terminate one", [143, 143], "", (1, 3)), ("terminate at last", [143], "", (1, 6)),
                ("terminate twice", [-signal.SIGTERM], "", (1, 2)),     # at once, unsaved
                ("fail at one", [1, 2], ".*photo 7: cannot be read.*", (1, 2)),
                ("one killed", [1, -signal.SIGKILL], ".*lost another process.*", (1, 2)),
                ("full disk", [2, 1], ".*last.pt: could not be written: .*File too large", (1, 4)),
                ("not finite", [2, 2], r".*the loss is nan in epoch 1 with refs (\d+, ){7}\d+; .*"
                                       r"last.pt, if saved, is from before; try a lower --lr.*",
                 (1, 4))):
            world = len(statuses)
            found, lines = self.run_out(trick, trick, world, "--workers", 2 - world)
            self.assertEqual(found, statuses, (trick, lines))
            self.assertRegex("\n".join(lines), rf"\A{said}\Z")
            progress = model.read_checkpoint(self.root / trick / "last.pt")["progress"]
            self.assertEqual((progress["epoch"], progress["step"]), place, trick)
        for out, world in (("terminate", 1), ("terminate one", 2), ("not finite", 2)):
            self.assertEqual(self.run_out(out, None, world)[0], [0] * world)
            self.same_as_whole(out, world)

    def test_processes_without_a_common_folder_are_refused(self):
        statuses, lines = self.run_out("whole2", "other disk", 2)
        self.assertEqual((statuses, len(lines)), ([2, 2], 1), lines)
        self.assertRegex(lines[0], "whole2/last.pt; all machines must share --data and --out")

    def test_restarted_by_torchrun(self):
        code = textwrap.dedent("""
            import os, test_all, evaluate, train
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                test_all.play("one killed", int(os.environ["RANK"]))
            evaluate.run(train.main)
        """)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--max-restarts=1", "--no-python", sys.executable, "-c", code,
             *map(str, self.command), "--out", self.root / "again"], cwd=HERE, timeout=120,
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr.count("lost another process"), 1)
        self.same_as_whole("again", 2)

    def test_benchmark(self):
        out, _ = program(train, "--bench", "--batch-size", 4, "--micro-batch", 2,
                         "--precision", "bf16")
        self.assertIn("shapes, batch 4, torch.bfloat16, cpu, 1 process(es) of ", out)
        forward, step = (float(re.search(rf"\| {name} \| \S+ \| (\S+) \|", out)[1])
                         for name in ("forward", "step"))
        # A linear layer of the vision tower alone: 67 tokens, 96 to 384 channels, three blocks.
        self.assertGreater(forward, 3 * 2e-9 * 67 * 96 * 384)
        self.assertLess(forward, step / 2)
        with mock.patch.object(train, "random_batch", lambda *_: torch.empty(2**50)):
            _, err = program(train, "--bench", status=1)
        self.assertRegex(err, r"\A.*out of memory; try a smaller --batch-size.*\n\Z")


def lines_of(printed):
    """The lines that programs printed, without progress."""
    return [line for line in printed.replace("\r", "\n").splitlines()
            if line.strip() and not re.match(r"epoch|.*\d+%\|", line)]


def refused(test, module, arguments, message):
    """That a program prints one line, an error, and ends with status 2."""
    with test.subTest(arguments=arguments):
        out, err = program(module, *arguments, status=2)
        test.assertEqual((out, len(lines_of(err))), ("", 1), err)
        test.assertRegex(lines_of(err)[0], message)


@unittest.skipUnless(GPU, "there is no GPU")
class Gpu(unittest.TestCase):
    """A GPU against the CPU, and a run on it."""

    def setUp(self):
        torch.manual_seed(0)
        self.enterContext(mock.patch.object(torch.cuda, "is_available", lambda: True))
        self.enterContext(mock.patch.dict(os.environ))
        del os.environ["CUDA_VISIBLE_DEVICES"]
        self.device = evaluate.local_device()

    def test_logits_are_those_of_the_cpu(self):
        for preset in ("dcris-b", "detris-b", "barleria"):
            net = model.build(preset).eval()
            for parameter in net.parameters():          # adapters that start as zero count, too
                parameter.data += 0.02 * torch.randn_like(parameter)
            batch = train.random_batch(net.config, 2, CPU)
            with torch.no_grad():
                on_cpu = net(data.normalise(batch["image"]), batch["tokens"])
                net.to(self.device)
                for dtype, share in ((None, 1e-3), (torch.bfloat16, 0.05)):
                    with evaluate.autocast(self.device, dtype):
                        images, tokens = (batch[key].to(self.device) for key in ("image", "tokens"))
                        found = net(data.normalise(images), tokens).float().cpu()
                    difference = float((found - on_cpu).square().mean().sqrt() / on_cpu.std())
                    with self.subTest(preset=preset, dtype=dtype):
                        print(f"{preset} {dtype or 'fp32'}: {difference:.1e}", file=sys.stderr)
                        self.assertGreater(difference, 0)
                        self.assertLess(difference, share)

    def test_a_step_is_saved_and_resumed(self):
        path = folder(self) / "last.pt"

        def trainer(net, compiled=False):
            batches = train.GlobalBatches(16, 16, 0, 0, 1, seed=0)
            return train.Trainer(net.to(self.device).train(), batches, self.device,
                                 torch.bfloat16, compiled, path, {})

        batch = train.random_batch(model.PRESETS["shapes"], 16, CPU)
        whole = trainer(model.build("shapes", warmup=0))
        before = whole.net.state_dict()["head.neck.sentence.weight"].clone()
        whole.step(iter([batch]))
        whole.read()
        whole.save()
        for compiled in (False, True):
            resumed = trainer(model.load(path), compiled)
            resumed.restore(model.read_checkpoint(path))
            resumed.step(iter([batch]))
            resumed.read()
            if not compiled:
                whole.step(iter([batch]))
                whole.read()
            self.assertAlmostEqual(resumed.progress.loss, whole.progress.loss, 2)
            for name, tensor in whole.net.state_dict().items():
                other = resumed.net.state_dict()[name]
                self.assertLess(float((tensor - other).abs().max()), 3e-3, name)
        after = whole.net.state_dict()["head.neck.sentence.weight"]
        self.assertGreater(float((after - before).abs().max()), 1e-3)

    def test_a_run_and_its_evaluation(self):
        root = folder(self)
        tokenizer = data.Tokenizer(data.draw_shapes(root / "data", TINY) / "merges.txt")
        for precision in ("bf16", "fp16", "fp32"):
            program(train, *SMALL_RUN, "--data", root / "data", "--workers", 2,
                    "--out", root / precision, "--precision", precision)
            row = json.loads((root / precision / "log.jsonl").read_text().splitlines()[-1])
            self.assertLess(row["loss"], 0.7)
        refs, _ = data.read_split(root / "data", "shapes", "val")
        net = model.build("shapes", head_width=32, head_heads=2, head_layers=1)
        shake(net, spread=0.15).float()
        dataset = data.ExpressionSet(refs, tokenizer, net.config.image_size, 17)
        on_cpu, on_gpu = (evaluate.metrics(evaluate.overlaps(net.to(device), dataset, device))
                          for device in (CPU, self.device))
        self.assertGreater(on_cpu["miou"], 1)
        for key, value in on_cpu.items():
            self.assertAlmostEqual(on_gpu[key], value, delta=0.05, msg=key)


def launch(arguments, trick=None, world=1, module="train"):
    """Runs a program in `world` processes of one thread: their exit statuses and printed lines.

    They are forked from a server that has loaded PyTorch already. `trick`: a key of TRICKS. The
    status of a process that hangs is None.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "torch._dynamo"])     # which optimizers import
    # The store lives as long as the processes, as torchrun's does.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, f"{rank}.txt") for rank in range(world)]
        children = [server.Process(target=child_main, args=(
            module, [*map(str, arguments)], output, trick,
            {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}))
                    for rank, output in enumerate(outputs)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        statuses = [child.exitcode for child in children]
        for child in children:
            child.kill()
        return statuses, lines_of("".join(output.read_text() for output in outputs))


def child_main(module, arguments, output, trick, environment):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)        # of a loader, as in a real run
    evaluate.tqdm.set_lock(threading.RLock())       # the usual one outlives a killed process
    # What a run draws for itself is smaller here.
    draw = data.draw_shapes
    data.draw_shapes = lambda place, name: draw(place, Runs.SCENES, name=name)
    if trick:
        play(trick, environment["RANK"])
    module = sys.modules[module]
    sys.argv = [module.__file__, *arguments]
    evaluate.run(module.main)


def play(trick, rank):
    """Lets a function do its work, and something happen after one of its calls."""
    ranks, owner, name, call, action, *arguments = TRICKS[trick]
    function, calls = getattr(owner, name), itertools.count(1)

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == call:
            action(*arguments)
        return result
    if rank in ranks:
        setattr(owner, name, watched)


def die_in_next_write():
    """At 100 kB of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)       # Python ignores it, and the write fails


def in_double():
    build, normalise = model.build, data.normalise
    model.build = lambda *args, **more: build(*args, **more).double()
    data.normalise = lambda images: normalise(images).double()


ALL, SECOND, STEP = (0, 1), (1,), (train.Trainer, "step")
KILL, TERMINATE = ((signal.raise_signal, number) for number in (signal.SIGKILL, signal.SIGTERM))
# In which processes, after which call of which function, what happens.
TRICKS = {
    "drawing": (ALL, Image.Image, "save", 20, *KILL),
    "first step": (ALL, *STEP, 1, *KILL),
    "saving": (ALL, *STEP, 5, die_in_next_write),
    "last step": (ALL, *STEP, 2, *KILL),                # of an epoch saved after step 4
    "validating": (ALL, evaluate, "probabilities", 2, *KILL),
    "validated": (ALL, evaluate, "metrics", 1, *KILL),
    "best saved": (ALL, model, "save", 1, *KILL),       # after the last step
    "at random": (ALL, train, "parse_arguments", 1, lambda: signal.setitimer(
        signal.ITIMER_REAL, random.uniform(0.1, 4))),
    "one killed": (SECOND, *STEP, 3, *KILL),
    "terminate": (ALL, *STEP, 3, *TERMINATE),
    "interrupt": (ALL, *STEP, 3, signal.raise_signal, signal.SIGINT),
    "terminate at last": (ALL, *STEP, 6, *TERMINATE),
    "terminate one": (SECOND, *STEP, 3, *TERMINATE),
    "terminate all": (ALL, *STEP, 3, lambda: [os.kill(pid, signal.SIGTERM) for pid in (  # loaders
        *(child.pid for child in multiprocessing.active_children()), os.getpid())]),
    "terminate twice": (ALL, *STEP, 3, lambda: [signal.raise_signal(signal.SIGTERM)
                                                for _ in range(2)]),
    "fail at one": (SECOND, *STEP, 3, data.read_photo, "photo 7"),
    "full disk": (ALL, *STEP, 5, resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000)),
    "not finite": (ALL, *STEP, 5, setattr, loss, "text_to_pixel_loss",
                   lambda logits, masks, exact: logits.sum() * math.nan),
    "double": (ALL, train, "parse_arguments", 1, in_double),
    "other disk": (SECOND, train, "load_data", 1, setattr, Path, "exists", lambda path: False),
}


class TimedResult(unittest.TextTestResult):
    """Prints the ten slowest tests at the end."""
    times, last = [], time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        now = time.monotonic()
        self.times.append((now - self.last, test.id()))
        self.last = now

    def printErrors(self):
        super().printErrors()
        for seconds, name in sorted(self.times)[:-11:-1]:
            self.stream.writeln(f"{seconds:6.1f} s  {name}")


if __name__ == "__main__":
    # Other packages' deprecations do not matter here.
    unittest.main(testRunner=unittest.TextTestRunner(verbosity=2, resultclass=TimedResult,
                                                     warnings="ignore"))
