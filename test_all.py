"""All tests: `python test_all.py`. They need no weights, no data and no GPU, and a few minutes.

`MANY=20 python test_all.py` kills runs 20 times at random moments, takes steps of all presets at
their photos' full size. CLIP's vocabulary is looked for in pretrained/ and ../shared/pretrained/;
without it, the tests of CLIP's token ids are skipped with a message.
"""

import contextlib
import copy
import gzip
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
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
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
MANY = int(os.environ.get("MANY", 0))
TINY = {"train": 40, "val": 8, "test": 5}           # scenes
# The small model, smaller; dropout off, so that runs can be compared.
SMALL_RUN = ["--epochs", "2", "--milestones", "1", "--batch-size", "8", "--dropout", "0",
             "--head-width", "32", "--head-heads", "2", "--head-layers", "1"]


def program(module, *arguments):
    """Runs a program's command line in this process: its exit status, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with mock.patch.object(sys, "argv", [module.__file__, *map(str, arguments)]), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluate.run(module.main)
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def folder(test):
    """A temporary folder that goes with the test."""
    place = tempfile.TemporaryDirectory()
    test.addCleanup(place.cleanup)
    return Path(place.name)


def shake(module, seed=0):
    """Random numbers in all parameters, in double precision, so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator,
                                              dtype=torch.float64))
    return module


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---- Plain restatements: the layers as their formulas, with nothing but sums and products ---

def plain_conv(x, weight, bias):
    high, wide = weight.shape[-2:]
    padded = nn.functional.pad(x, [wide // 2, wide // 2, high // 2, high // 2])
    rows, columns = x.shape[-2:]
    out = sum(torch.einsum("bchw,dc->bdhw", padded[:, :, i:i + rows, j:j + columns],
                           weight[:, :, i, j]) for i in range(high) for j in range(wide))
    return out if bias is None else out + bias[:, None, None]


def plain_conv_bn_relu(x, layers):
    """x is a map (B, C, H, W), or (B, C, L), which is a map of one row."""
    if x.ndim == 3:
        conv = SimpleNamespace(weight=layers[0].weight[:, :, None], bias=layers[0].bias)
        return plain_conv_bn_relu(x[:, :, None], (conv, layers[1]))[:, :, 0]
    x = plain_conv(x, layers[0].weight, layers[0].bias).movedim(1, -1)
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    x = (x - mean) / torch.sqrt(variance + layers[1].eps) * layers[1].weight + layers[1].bias
    return x.clamp(min=0).movedim(-1, 1)


def plain_branches(x, dense):
    """DCRIS Eq. 1: three branches, each fed by the input and all branches before it."""
    x1 = plain_conv_bn_relu(x, dense.branch1)
    x2 = x3 = None
    for layer in dense.branch2:
        x2 = plain_conv_bn_relu(torch.cat([x, x1], 1) if x2 is None else x2, layer)
    for layer in dense.branch3:
        x3 = plain_conv_bn_relu(torch.cat([x, x1, x2], 1) if x3 is None else x3, layer)
    return torch.cat([x1, x2, x3], 1)


def plain_linear(x, layer):
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def plain_bottleneck(x, layers):
    return plain_linear(plain_linear(x, layers[0]).clamp(min=0), layers[2])


def plain_norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def plain_heads(q, k, v, heads, hidden=None):
    """softmax(q k^T / sqrt(d)) v in each head; no one looks where `hidden` is true."""
    out = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (q, k, v))):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, -1)


def plain_attention(query, key, value, layer, padding=None):
    """`layer` is an attention with PyTorch's names."""
    weights = (layer.in_proj_weight.chunk(3) if layer.in_proj_weight is not None else
               (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight))
    q, k, v = (x @ weight.T + bias for x, weight, bias in
               zip((query, key, value), weights, layer.in_proj_bias.chunk(3)))
    hidden = None if padding is None else padding[:, None]
    return plain_linear(plain_heads(q, k, v, layer.num_heads, hidden), layer.out_proj)


def plain_resize(x, rows, columns):
    """Bilinear, (B, C, h, w) to (B, C, rows, columns): places are those of the pixels' centres."""
    for axis, new in ((2, rows), (3, columns)):
        old = x.shape[axis]
        at = ((torch.arange(new).double() + 0.5) * old / new - 0.5).clamp(0, old - 1)
        low = at.long().clamp(max=old - 2)
        share = (at - low).view(-1, *[1] * (3 - axis))
        x = (1 - share) * x.index_select(axis, low) + share * x.index_select(axis, low + 1)
    return x


def plain_sines(at, width):
    """sin and cos of at / 10000^(2i / width), in turn."""
    rates = [at / 10000 ** (2 * i / width) for i in range(width // 2)]
    return torch.tensor([f(rate) for rate in rates for f in (math.sin, math.cos)]).double()


def as_map(x, rows, columns):
    """Tokens (B, N, D) to a map (B, D, rows, columns)."""
    return x.transpose(1, 2).reshape(len(x), -1, rows, columns)


class Exact(unittest.TestCase):
    """In double precision, on random numbers."""

    def setUp(self):
        torch.manual_seed(0)

    def same(self, a, b):
        self.assertEqual(a.shape, b.shape)
        self.assertGreater(float(b.detach().std()), 1e-3)       # not a comparison of nothing
        self.assertLess(float((a - b).detach().abs().max()), 1e-10)


class Equations(Exact):
    """Every equation of DCRIS against a plain restatement."""

    def test_dense_cross_adapter_equations_1_and_2(self):
        adapter = shake(adapters.DenseCrossAdapter(24, 32, 20, dropout=0.0))
        x, words = torch.randn(2, 3 + 20, 24).double(), torch.randn(2, 7, 20).double()
        f = plain_linear(x, adapter.down).clamp(min=0)
        f_v = as_map(f[:, 3:], 4, 5)
        f_dense = (plain_branches(f_v, adapter.dense) + f_v).flatten(2).transpose(1, 2)
        projected = plain_linear(words, adapter.cross.words)
        cross = plain_linear(plain_attention(plain_linear(f_dense, adapter.cross.query), projected,
                                             projected, adapter.cross.attention),
                             adapter.cross.back)
        f_cross = torch.cat([2 * f[:, :3], cross + f[:, 3:]], 1)
        self.same(adapter(x, words, (4, 5)), 0.2 * plain_linear(f_cross, adapter.up))
        widths = [plain_conv_bn_relu(f_v, adapter.dense.branch1).shape[1],
                  *(branch[1][0].out_channels
                    for branch in (adapter.dense.branch2, adapter.dense.branch3))]
        self.assertEqual(widths, [16, 8, 8])

    def test_text_adapter_equation_3(self):
        x = torch.randn(2, 5, 20).double()
        adapter = adapters.BottleneckAdapter(20, 8, 0.2).double()
        self.assertTrue(torch.equal(adapter(x), x))         # it starts as the identity
        shake(adapter)
        f_w = plain_bottleneck(x, (adapter.down, None, adapter.up))
        self.same(adapter(x), x + 0.2 * f_w)

    def test_dense_text_adapter(self):
        adapter = shake(adapters.DenseTextAdapter(20, 32))
        x = torch.randn(2, 6, 20).double()
        f = plain_linear(x, adapter.down).clamp(min=0)
        branches = plain_branches(f[:, 1:].transpose(1, 2), adapter.dense).transpose(1, 2)
        hidden = torch.cat([2 * f[:, :1], branches + f[:, 1:]], 1)
        self.same(adapter(x), x + 0.2 * plain_linear(hidden, adapter.up))

    def test_neck_equation_4(self):
        for residual in (True, False):
            neck = shake(head.Neck([6, 8, 10], 12, 16, residual))
            features = [torch.randn(2, c, 4, 5).double() for c in (6, 8, 10)]
            sentence = torch.randn(2, 12).double()
            s = plain_linear(sentence, neck.sentence)[:, None]
            gated = []
            for x, layers, gate in zip(features, neck.maps, neck.gates):
                x = plain_conv_bn_relu(x, layers)
                # The attention in full: any queries and keys, one token to look at.
                full = nn.MultiheadAttention(16, 4, batch_first=True).double()
                full.load_state_dict({
                    "in_proj_weight": torch.cat([torch.randn(32, 16), gate.value.weight]),
                    "in_proj_bias": torch.cat([torch.randn(32), gate.value.bias]),
                    "out_proj.weight": gate.out.weight, "out_proj.bias": gate.out.bias})
                fused = plain_attention(x.flatten(2).transpose(1, 2), s, s, full)
                gated.append(x * as_map(fused, 4, 5))
            f_f = plain_conv_bn_relu(torch.cat(gated, 1), neck.fuse)
            place = torch.tensor([[[2 * j / 4 - 1 for j in range(5)] for i in range(4)],
                                  [[2 * i / 3 - 1 for j in range(5)] for i in range(4)]],
                                 dtype=torch.float64)
            out = torch.cat([f_f, place.expand(2, -1, -1, -1)], 1)
            for layers in neck.coordinates:
                out = plain_conv_bn_relu(out, layers)
            with self.subTest(residual=residual):
                self.same(neck(features, sentence), out + f_f if residual else out)

    def test_decoder(self):
        decoder = shake(head.Decoder(16, 12, heads=4, layers=2, dropout=0.0))
        x, words = torch.randn(2, 16, 3, 5).double(), torch.randn(2, 6, 12).double()
        padding = torch.arange(6) >= torch.tensor([[4], [6]])
        places = torch.stack([torch.cat([plain_sines(column, 8), plain_sines(row, 8)])
                              for row in range(3) for column in range(5)])
        word_places = torch.stack([plain_sines(at, 12) for at in range(6)])
        y = x.flatten(2).transpose(1, 2)
        for layer in decoder.layers:
            z = plain_norm(y, layer.norm1)
            z = plain_attention(z + places, z + places, z, layer.self_attention)
            y = y + plain_norm(z, layer.self_attention_norm)
            z = plain_norm(y, layer.norm2) + places
            z = plain_attention(z, words + word_places, words, layer.cross_attention, padding)
            y = y + plain_norm(z, layer.cross_attention_norm)
            z = plain_linear(plain_norm(y, layer.norm3), layer.feed_forward[0]).clamp(min=0)
            y = y + plain_linear(plain_norm(z, layer.feed_forward[3]), layer.feed_forward[4])
        y = as_map(plain_norm(y, decoder.norm), 3, 5)
        # The module makes its positions in single precision: they are compared apart.
        self.assertLess(float((head.sine_positions_2d(3, 5, 16) - places).abs().max()), 1e-6)
        self.assertLess(float((head.sine_positions(6, 12) - word_places).abs().max()), 1e-6)
        with mock.patch.object(head, "sine_positions_2d", lambda *_: places), \
                mock.patch.object(head, "sine_positions", lambda *_: word_places):
            self.same(decoder(x, words, padding), y)

    def test_projector_equation_5(self):
        projector = shake(head.Projector(8, 12))
        x, sentence = torch.randn(3, 8, 3, 4).double(), torch.randn(3, 12).double()
        f_c = plain_conv_bn_relu(plain_resize(x, 6, 8), projector.image[0])
        f_c = plain_conv_bn_relu(plain_resize(f_c, 12, 16), projector.image[1])
        f_c = plain_conv(f_c, projector.image[2].weight, projector.image[2].bias)
        f_l = plain_linear(sentence, projector.sentence)
        self.same(projector(x, sentence), torch.cat([
            plain_conv(f_c[i:i + 1], f_l[i, :-1].reshape(1, 4, 3, 3), f_l[i, -1:])
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
        with mock.patch.object(backbones, "onednn_linear", nn.functional.linear):
            for inputs in ((x, weight, bias), (x, weight, None), (x, *frozen),
                           (x[0, 0], weight, bias), (x.detach(), weight, bias)):
                self.assertTrue(torch.autograd.gradcheck(product, inputs))
            # Nothing is kept for a frozen weight but the weight.
            self.assertIsNone(product(x, *frozen).grad_fn.saved_tensors[0])
        # Where the machine has it, large layers go there, and agree with PyTorch's.
        layer, x = backbones.Linear(512, 640), torch.randn(2, 128, 512, requires_grad=True)
        found = []
        for way in (backbones.ONEDNN_LINEAR, None):
            with mock.patch.object(backbones, "ONEDNN_LINEAR", way):
                out = layer(x)
                self.assertEqual("OneDNN" in type(out.grad_fn).__name__, way is not None)
                self.assertNotIn("OneDNN", type(layer(x[:, :10]).grad_fn).__name__)
                found.append(
                    (out, *torch.autograd.grad((out ** 2).sum(), (x, *layer.parameters()))))
        for one, plain in zip(*found):
            self.assertLess(float((one - plain).detach().abs().max() / plain.std()), 1e-5)

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
        x = torch.randn(2, 9, 12)               # bfloat16 on CPUs goes the same way
        half = backbones.attend(*3 * [x.bfloat16()], heads=3)
        self.assertEqual(half.dtype, torch.bfloat16)
        self.assertLess((half - backbones.attend(x, x, x, heads=3)).abs().max(), 0.03)


def plain_block(x, block, flows=()):
    """A CLIP block, with flows (two modules or none) on its shortcuts."""
    attention_flow, mlp_flow = flows if len(flows) else (nn.Identity(), nn.Identity())
    qkv = plain_linear(plain_norm(x, block.norm1), block.attention.qkv).chunk(3, -1)
    later = torch.ones(x.shape[1], x.shape[1]).bool().triu(1) if block.causal else None
    mixed = plain_heads(*qkv, block.attention.heads, later)
    x = attention_flow(x) + plain_linear(mixed, block.attention.out)
    up = plain_linear(plain_norm(x, block.norm2), block.mlp.up)
    return mlp_flow(x) + plain_linear(up / (1 + torch.exp(-1.702 * up)), block.mlp.down)


def tiny_barleria(depth=2, text_depth=2, **overrides):
    """A whole BarLeRIa, small enough to be written out."""
    config = replace(model.PRESETS["shapes-barleria"], image_size=24, features=(0, 1),
                     train_towers=False, **overrides)
    vision = backbones.ViT(backbones.VisionShape(4, 16, depth, 2, grid=3, embed=8, family="clip"))
    text = backbones.TextTransformer(backbones.TextShape(12, text_depth, 3, 8, 40, 9))
    return shake(model.BarLeRIa(config, vision.requires_grad_(False),
                                text.requires_grad_(False)))


class BarleriaEquations(Exact):
    """Every equation of BarLeRIa against a plain restatement."""

    def setUp(self):
        super().setUp()
        self.images = torch.randn(2, 3, 24, 24).double()
        self.tokens = torch.tensor([[38, 7, 3, 39, 0, 0], [38, 9, 4, 5, 6, 39]])

    def test_flow_equation_1(self):
        flow = adapters.NormalizingFlow(6, steps=3).double()
        x = torch.randn(2, 5, 6).double()
        self.assertLess(float((flow(x) - x).abs().max()), 0.02)     # it starts near the identity
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
                                    net.vision.blocks[j], net.visual_flows[j])
                    x = torch.cat([y[:, :1], y[:, 1 + 6:]], 1)
                    stages.append(x)
                t = plain_block(torch.cat([cls, t], 1), block, net.text_flows[i])[:, 1:]
            found, words, sentence = net.local_branch(self.images, self.tokens, (6, 6))
            self.assertEqual(len(found), depth)
            for a, b in zip(found, stages):
                self.same(a, b)
            t = plain_norm(t, net.text.norm)
            self.same(words, t)
            self.same(sentence, torch.stack([t[0, 3], t[1, 5]]) @ net.text.projection)

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
        stages = [torch.randn(2, 36, 16).double() for _ in range(2)]

        def resized(x, old, new):
            return plain_resize(as_map(x, old, old), new, new).flatten(2).transpose(1, 2)

        image = torch.stack([
            (self.images[:, None, :, 5 * i:5 * i + 5, 5 * j:5 * j + 5]
             * net.patch.weight).sum((2, 3, 4)) + net.patch.bias
            for i in range(4) for j in range(4)], 1) + net.position
        queries, w = net.queries.expand(2, -1, -1), plain_bottleneck(words, net.words)
        for i, (block, side) in enumerate(zip(net.blocks, (4, 6))):
            patches = resized(prior[:, 6:], 6, side)
            p = plain_linear(torch.cat([prior[:, :6], patches], 1), net.priors[i])
            p = torch.cat([torch.zeros(2, 3, 6).double(), p], 1)
            x = torch.cat([queries, w, image], 1)                               # Eq. 5
            q, k, v = plain_linear(plain_norm(x, block.norm1), block.qkv).chunk(3, -1)
            v = v + p @ block.prior.weight.T                                    # Eq. 6
            x = x + plain_linear(plain_heads(q, k, v, heads=2), block.out)
            up = plain_linear(plain_norm(x, block.norm2), block.mlp[0])
            x = x + plain_linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), block.mlp[2])
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
        self.assertFalse(net.head.neck.residual)                # Eq. 11: tested with DCRIS Eq. 4
        f_mm = net.head.decoder(net.head.neck(maps, sentence) + f_out, words, padding)
        # Eq. 12: tested with DCRIS Eq. 5
        self.same(net(self.images, self.tokens), net.head.projector(f_mm, sentence))

    def test_without_visitors_and_flows_the_towers_are_themselves(self):
        net = tiny_barleria(visual_flows=False, text_flows=False, intertwined=False)
        stages, *found = net.local_branch(self.images, self.tokens, (6, 6))
        for a, b in zip((net.vision.norm(stages[-1]), *found),
                        (net.vision(self.images), *net.text(self.tokens))):
            self.assertTrue(torch.equal(a, b))

    def test_gradient_stops_at_the_prior_and_the_stages(self):
        net = tiny_barleria()
        stages, words, _ = net.local_branch(self.images, self.tokens, (6, 6))
        projected = net.vision.projection(net.vision.norm(stages[-1]))
        self.assertTrue(words.requires_grad and projected.requires_grad)
        prior = adapters.global_prior(words @ net.text.projection, projected[:, 1:],
                                      backbones.after_end(self.tokens))
        self.assertFalse(prior.requires_grad)
        leaves = [x[:, 1:].detach().requires_grad_() for x in stages]
        words = words.detach().requires_grad_()
        net.global_branch(self.images, words, prior, leaves, (6, 6)).square().sum().backward()
        self.assertTrue(all(x.grad is None for x in leaves))        # F_v^i
        self.assertGreater(float(words.grad.abs().max()), 1e-6)     # the words get one
        net.zero_grad()
        net(self.images, self.tokens).square().sum().backward()
        for name, parameter in net.named_parameters():
            self.assertEqual(parameter.grad is not None and bool(parameter.grad.any()),
                             parameter.requires_grad, name)


class Tuners(Exact):
    """The methods that the papers compare with."""

    def test_bridge(self):
        first, second = (shake(adapters.Bridge(10, 12, width=16, heads=8, first_stage=i == 0,
                                               last_stage=i == 1))
                         for i in range(2))
        patches, words = torch.randn(2, 6, 10).double(), torch.randn(2, 5, 12).double()
        p, w, before = patches, words, None
        for bridge in (first, second):
            v = plain_conv_bn_relu(p.transpose(1, 2), bridge.patches_down).transpose(1, 2)
            t = plain_linear(w, bridge.words_down)
            if before is not None:
                v = plain_norm(v + before[0], bridge.patches_norm)
                t = plain_norm(t + before[1], bridge.words_norm)
            before = v, t
            read_v = v * plain_attention(v, t, t, bridge.patches_read)
            read_t = t * plain_attention(t, v, v, bridge.words_read)
            p = p + plain_conv_bn_relu(read_v.transpose(1, 2), bridge.patches_up).transpose(1, 2)
            w = w + plain_linear(read_t, bridge.words_up)
        found = second(*first(patches, words))
        self.same(found[0], p)
        self.same(found[1], w)

    def test_etris_bridges_after_every_part_of_the_towers(self):
        net, calls = model.build("shapes-etris").eval(), []
        for name, module in net.named_modules():
            if re.fullmatch(r"((vision|text)\.blocks|bridges)\.\d", name):
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        net(*Methods.batch(self, net))
        self.assertEqual(calls, ["vision.blocks.0", "vision.blocks.1", "text.blocks.0", "bridges.0",
                                 "vision.blocks.2", "vision.blocks.3", "text.blocks.1",
                                 "bridges.1"])

    def test_compacter_weight_is_a_sum_of_kronecker_products(self):
        factors = torch.randn(4, 4, 4).double()
        layer = shake(adapters.KroneckerLinear(12, 8, factors))
        weight = sum(torch.kron(factors[i], layer.b[i]) for i in range(4))
        for shape in ((5, 12), (2, 3, 12)):
            x = torch.randn(shape).double()
            self.same(layer(x), x @ weight.T + layer.bias)
        owners = [name for name, _ in model.build("shapes-compacter").named_parameters(
            remove_duplicate=False) if "factors" in name]
        self.assertEqual(owners, ["factors"])

    def test_lora_is_beside_its_layer_and_merges_into_it(self):
        x = torch.randn(2, 3, 12).double()
        lora = shake(adapters.LoRA(nn.Linear(12, 18), rank=2, parts=3))
        beside = [x @ lora.down[i].T @ lora.up[i].T for i in range(3)]
        self.same(lora(x), plain_linear(x, lora.frozen) + torch.cat(beside, -1))
        merged = lora.frozen.weight + (lora.up @ lora.down).flatten(0, 1)
        self.same(lora(x), x @ merged.T + lora.frozen.bias)

    def test_at_their_start_tuners_are_the_frozen_model(self):
        for name in ("houlsby", "compacter", "lora"):
            torch.manual_seed(0)
            plain = model.build("shapes-fixed").eval()
            torch.manual_seed(0)
            tuned = model.build(f"shapes-{name}").eval()
            tuned.head.load_state_dict(plain.head.state_dict())
            images, tokens = Methods.batch(self, plain)
            self.assertTrue(torch.equal(tuned(images, tokens), plain(images, tokens)), name)

    def test_what_learns(self):
        for name, prefixes in (
                ("full", ("vision.", "text.")), ("fixed", ()),
                ("houlsby", ("vision.blocks.0.mlp.1.", "text.blocks.1.mlp.1.")),
                ("compacter", ("vision.blocks.3.mlp.1.", "factors")),
                ("lora", ("vision.blocks.0.mlp.down.up", "text.blocks.0.attention.qkv.down")),
                ("etris", ("bridges.0.", "bridges.1.")), ("snf", ("visual_flows.3.1.",)),
                ("snf-etris", ("visual_flows.0.0.", "bridges.1.")),
                ("barleria-local", ("text_flows.1.0.", "intertwiner."))):
            net = model.build(f"shapes-{name}").train()
            for parameter in net.parameters():          # nothing zero that hides a gradient
                if parameter.requires_grad and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            net(*Methods.batch(self, net)).square().sum().backward()
            learn = {n for n, p in net.named_parameters() if p.requires_grad}
            self.assertEqual(learn, {n for n, p in net.named_parameters()
                                     if p.grad is not None and p.grad.any()}, name)
            for prefix in prefixes:
                self.assertTrue(any(n.startswith(prefix) for n in learn), (name, prefix))
            if name not in ("full", "etris", "snf-etris"):
                self.assertFalse(any(n.startswith(("vision.patch", "text.embedding"))
                                     for n in learn), name)


class Counts(unittest.TestCase):
    """Parameters, exactly, and the papers' printed millions."""

    def tuned(self, preset, **overrides):
        with torch.device("meta"):
            return model.count(model.build(preset, **overrides))["tuned"]

    def test_readme_says_what_the_program_says(self):
        readme = (HERE / "README.md").read_text()
        for line in program(model)[1].splitlines():
            if line.startswith("| "):
                self.assertIn(line, readme)
        for published in model.PUBLISHED.values():
            self.assertIn(f"`{published.file}`", readme)
            self.assertIn(f"<{published.address}>", readme)
        known = "".join((HERE / name).read_text() for name in ("train.py", "evaluate.py"))
        for flag in set(re.findall(r"(?<=[ `])--[a-z][a-z_-]+", readme)):
            field = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
            self.assertTrue(f'"{flag}"' in known or hasattr(model.Config, field) or flag in (
                "--nnodes", "--nproc_per_node", "--rdzv-endpoint", "--max-restarts", "--help"),
                flag)

    def test_parts(self):
        with torch.device("meta"):
            for count, module in (
                    (86_582_784, backbones.ViT(backbones.VISION["dinov2-b"])),
                    (86_192_640, backbones.ViT(backbones.VISION["clip-b"])),
                    (86_263_040, backbones.ViT(backbones.VISION["eva-b"])),
                    (63_428_096, backbones.TextTransformer(backbones.TEXT["clip-b"])),
                    (382_896, adapters.DenseCrossAdapter(768, 128, 512, 0.1)),
                    (66_112, adapters.BottleneckAdapter(512, 64, 0.2)),
                    (69_720, adapters.DenseTextAdapter(512, 64)),
                    (1_815_440, model.build("barleria").global_branch)):
                self.assertEqual(parameters(module), count, type(module))
            for name, positions in (("barleria", (1 + 26 ** 2) * 768 + 77 * 512), ("dcris-b", 0),
                                    ("snf", (1 + 26 ** 2) * 768 + 77 * 512),
                                    ("barleria-eva", 77 * 512)):
                self.assertEqual(model.count(model.build(name))["positions"], positions, name)
        for name, tuned in (
                ("dcris-b", 6 * (382_896 + 66_112)), ("fixed", 0), ("full", 149_971_456),
                ("houlsby", 1_982_976), ("lora", 1_572_864), ("etris", 1_387_648),
                ("etris-dino", 1_387_648), ("snf", 184_416), ("snf-etris", 1_387_648 + 184_416),
                ("barleria-local", 390_656), ("barleria", 2_206_096)):
            self.assertEqual(self.tuned(name), tuned, name)
        self.assertEqual(self.tuned("etris", bridge_width=64), 598_592)     # the released file

    def test_papers_figures(self):
        rows = json.loads(program(model, "--json")[1])
        self.assertEqual([row["preset"] for row in rows], list(model.PRESETS))
        printed = {row["preset"]: f"{row['tuned'] / 1e6:.2f}" for row in rows
                   if row["paper_millions"] is not None}
        self.assertEqual(printed, {name: f"{paper:.2f}" for name, paper in model.PAPER.items()})

    def test_dcris_tables_3_to_5(self):
        odd = (1, 3, 5, 7, 9, 11)
        for visual, text, tuned in ((odd, (), 6 * 382_896), ((), odd, 6 * 66_112)):     # Table 3
            self.assertEqual(self.tuned("dcris-b", visual_adapter_layers=visual,
                                        text_adapter_layers=text), tuned)
        for visual, text in ((64, 64), (128, 64), (128, 128), (256, 128)):              # Table 4
            with torch.device("meta"):
                parts = (adapters.DenseCrossAdapter(768, visual, 512, 0.1),
                         adapters.BottleneckAdapter(512, text, 0.2))
            self.assertEqual(
                self.tuned("dcris-b", visual_adapter_rank=visual, text_adapter_rank=text),
                6 * sum(parameters(part) for part in parts))
        for layers, millions in (                                                       # Table 5
                ((8,), "0.45"), ((6, 11), "0.90"), ((4, 8, 11), "1.35"), ((3, 6, 9, 11), "1.80"),
                ((3, 5, 7, 9, 11), "2.25"), (odd, "2.69"), ((1, 3, 5, 7, 9, 10, 11), "3.14"),
                ((1, 3, 4, 5, 7, 9, 10, 11), "3.59"), (tuple(range(12)), "5.39")):
            tuned = self.tuned("dcris-b", visual_adapter_layers=layers, text_adapter_layers=layers)
            self.assertEqual(f"{tuned / 1e6:.2f}", millions, layers)


def drawn_tensors(shapes, layers):
    """Random tensors of these shapes, and a weight and a bias for each of the layers."""
    for name, shape in layers.items():
        shapes = {**shapes, f"{name}weight": shape, f"{name}bias": shape[:1]}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def dinov2_state(width=128, depth=2, patch=14, grid=5):
    """Random tensors under the official names and in the official shapes."""
    one, square, up = (width,), (width, width), (4 * width, width)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid ** 2, width),
              "register_tokens": (1, 4, width), "mask_token": (1, width)}
    layers = {"patch_embed.proj.": (width, 3, patch, patch), "norm.": one}
    for b in (f"blocks.{i}." for i in range(depth)):
        shapes |= {f"{b}ls1.gamma": one, f"{b}ls2.gamma": one}
        layers |= {f"{b}norm1.": one, f"{b}norm2.": one, f"{b}attn.qkv.": (3 * width, width),
                   f"{b}attn.proj.": square, f"{b}mlp.fc1.": up, f"{b}mlp.fc2.": up[::-1]}
    return drawn_tensors(shapes, layers)


def clip_state(width=128, depth=2, vision_width=128, grid=3, patch=16):
    """The same for OpenAI's CLIP, both towers."""
    shapes = {"token_embedding.weight": (300, width), "positional_embedding": (77, width),
              "text_projection": (width, 64), "logit_scale": (),
              "visual.class_embedding": (vision_width,), "visual.proj": (vision_width, 64),
              "visual.positional_embedding": (1 + grid ** 2, vision_width),
              "visual.conv1.weight": (vision_width, 3, patch, patch)}
    layers = {"ln_final.": (width,), "visual.ln_pre.": (vision_width,),
              "visual.ln_post.": (vision_width,)}
    for prefix, d in (("", width), ("visual.", vision_width)):
        for b in (f"{prefix}transformer.resblocks.{i}." for i in range(depth)):
            layers |= {f"{b}ln_1.": (d,), f"{b}ln_2.": (d,), f"{b}attn.in_proj_": (3 * d, d),
                       f"{b}attn.out_proj.": (d, d), f"{b}mlp.c_fc.": (4 * d, d),
                       f"{b}mlp.c_proj.": (d, 4 * d)}
    return drawn_tensors(shapes, layers)


def eva_state(width=192, depth=2, grid=3, patch=16):
    """The same for EVA-02 as CLIP, which has CLIP's text tower and another vision tower."""
    text = {name if name == "logit_scale" else f"text.{name}": tensor
            for name, tensor in clip_state(depth=depth).items() if not name.startswith("visual.")}
    one, square, hidden = (width,), (width, width), width // 3 * 8
    shapes = {"visual.cls_token": (1, 1, width), "visual.pos_embed": (1, 1 + grid ** 2, width)}
    layers = {"visual.patch_embed.proj.": (width, 3, patch, patch), "visual.head.": (64, width),
              "visual.norm.": one}
    for b in (f"visual.blocks.{i}." for i in range(depth)):
        shapes |= {f"{b}attn.{letter}_proj.weight": square for letter in "qkv"}
        shapes |= {f"{b}attn.q_bias": one, f"{b}attn.v_bias": one,
                   f"{b}attn.rope.freqs_cos": (grid ** 2, 64)}
        layers |= {f"{b}norm1.": one, f"{b}norm2.": one, f"{b}attn.inner_attn_ln.": one,
                   f"{b}attn.proj.": square, f"{b}mlp.w1.": (hidden, width),
                   f"{b}mlp.w2.": (hidden, width), f"{b}mlp.ffn_ln.": (hidden,),
                   f"{b}mlp.w3.": (width, hidden)}
    return {**text, **drawn_tensors(shapes, layers)}


def changed(state, change):
    """A copy of a table after a change; None leaves an entry out."""
    return {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}


class Towers(unittest.TestCase):
    """Frozen towers and their files."""

    def saved(self, state):
        path = folder(self) / "weights.pth"
        torch.save(state, path)
        return path

    def test_files_load_whole(self):
        image, tokens = torch.randn(2, 3, 112, 224), torch.tensor([[298, 5, 299]])
        for state, shape, text_shape in (
                (dinov2_state(), backbones.VisionShape(14, 128, 2, 2, grid=5, registers=4), None),
                (clip_state(vision_width=192),
                 backbones.VisionShape(16, 192, 2, 3, grid=3, embed=64, family="clip"),
                 backbones.TextShape(128, 2, 2, 64, 300, 77)),
                (eva_state(), backbones.VisionShape(16, 192, 2, 3, grid=3, embed=64, family="eva"),
                 backbones.TextShape(128, 2, 2, 64, 300, 77, family="eva text"))):
            path = self.saved(state)
            towers = [backbones.load_vision(path)]
            self.assertEqual(towers[0].shape, shape)
            patches = 112 // shape.patch * (224 // shape.patch)
            self.assertEqual(towers[0](image).shape[1], 1 + shape.registers + patches)
            if text_shape:
                towers.append(backbones.load_text(path))
                self.assertEqual(towers[1].shape, text_shape)
                words, sentence = towers[1](tokens)
                self.assertEqual((words.shape, sentence.shape), ((1, 3, 128), (1, 64)))
            found = sum((t.double() ** 3).sum() for tower in towers
                        for t in tower.state_dict().values())
            self.assertAlmostEqual(found.item(), sum(
                (t.double() ** 3).sum() for name, t in state.items()
                if not re.search("freqs|mask_token|logit_scale", name)).item())
            for tower in towers:
                self.assertFalse(any(p.requires_grad for p in tower.parameters()))

    def by_hand(self, state, eps):
        """A tower in double precision, its tensors by the file's names, norm and linear layer."""
        s = {name: tensor.double() for name, tensor in state.items()}

        def norm(x, name):
            x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(
                x.var(-1, unbiased=False, keepdim=True) + eps)
            return x * s[name + ".weight"] + s[name + ".bias"]

        def linear(x, name, join="."):
            return x @ s[f"{name}{join}weight"].T + s[f"{name}{join}bias"]

        return backbones.load_vision(self.saved(state)).double(), s, norm, linear

    def patches(self, image, weight):
        size = weight.shape[-1]
        rows, columns = image.shape[1] // size, image.shape[2] // size
        return torch.stack([
            (image[:, size * i:size * i + size, size * j:size * j + size] * weight).sum((1, 2, 3))
            for i in range(rows) for j in range(columns)])

    def mixed(self, q, k, v):
        """Attention of heads of 64 channels; (N, D)."""
        return plain_heads(q[None], k[None], v[None], q.shape[1] // 64)[0]

    def test_dinov2_by_hand(self):
        """One block, written out from the official names."""
        tower, s, norm, linear = self.by_hand(dinov2_state(depth=1), 1e-6)
        image = torch.randn(1, 3, 70, 70).double()
        x = torch.cat([s["cls_token"][0], self.patches(image[0], s["patch_embed.proj.weight"])
                       + s["patch_embed.proj.bias"]]) + s["pos_embed"][0]
        x = torch.cat([x[:1], s["register_tokens"][0], x[1:]])
        q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").chunk(3, -1)
        x = x + s["blocks.0.ls1.gamma"] * linear(self.mixed(q, k, v), "blocks.0.attn.proj")
        up = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
        up = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        x = x + s["blocks.0.ls2.gamma"] * linear(up, "blocks.0.mlp.fc2")
        self.assertLess(float((tower(image)[0] - norm(x, "norm")).abs().max()), 1e-10)

    def test_clip_vision_by_hand(self):
        tower, s, norm, linear = self.by_hand(clip_state(depth=1), 1e-5)
        image = torch.randn(1, 3, 48, 48).double()
        x = torch.cat([s["visual.class_embedding"][None],
                       self.patches(image[0], s["visual.conv1.weight"])])
        x = norm(x + s["visual.positional_embedding"], "visual.ln_pre")
        block = "visual.transformer.resblocks.0."
        q, k, v = linear(norm(x, block + "ln_1"), block + "attn.in_proj", "_").chunk(3, -1)
        x = x + linear(self.mixed(q, k, v), block + "attn.out_proj")
        up = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
        x = x + linear(up / (1 + torch.exp(-1.702 * up)), block + "mlp.c_proj")
        x = norm(x, "visual.ln_post")
        self.assertLess(float((tower(image)[0] - x).abs().max()), 1e-10)
        self.assertLess(float((tower.projection(x) - x @ s["visual.proj"]).abs().max()), 1e-10)

    def test_eva_vision_by_hand(self):
        """One block; the rotary tables are the module's, in single precision."""
        tower, s, norm, linear = self.by_hand(eva_state(depth=1), 1e-6)
        image = torch.randn(1, 3, 48, 48).double()
        x = torch.cat([s["visual.cls_token"][0],
                       self.patches(image[0], s["visual.patch_embed.proj.weight"])
                       + s["visual.patch_embed.proj.bias"]]) + s["visual.pos_embed"][0]
        block = "visual.blocks.0."
        y = norm(x, block + "norm1")
        q, k, v = (y @ s[f"{block}attn.{letter}_proj.weight"].T for letter in "qkv")
        q, v = q + s[block + "attn.q_bias"], v + s[block + "attn.v_bias"]
        for tokens, n, c in itertools.product((q, k), range(9), range(0, 192, 2)):
            # Pairs of channels as complex numbers, multiplied by e^(i angle).
            place = n // 3 if c % 64 < 32 else n % 3
            angle = place / 3 * 16 * 10000 ** (-(c % 32) / 32)
            number = complex(*tokens[1 + n, c:c + 2]) * complex(math.cos(angle), math.sin(angle))
            tokens[1 + n, c], tokens[1 + n, c + 1] = number.real, number.imag
        y = norm(self.mixed(q, k, v), block + "attn.inner_attn_ln")
        x = x + linear(y, block + "attn.proj")
        y = norm(x, block + "norm2")
        gate = linear(y, block + "mlp.w1")
        y = gate / (1 + torch.exp(-gate)) * linear(y, block + "mlp.w2")
        x = norm(x + linear(norm(y, block + "mlp.ffn_ln"), block + "mlp.w3"), "visual.norm")
        self.assertLess(float((tower(image)[0] - x).abs().max()), 1e-5)
        self.assertLess(float((tower.projection(x) - linear(x, "visual.head")).abs().max()), 1e-10)

    def test_rotary_positions_rotate_the_patches_alone(self):
        torch.manual_seed(0)
        tower = backbones.ViT(backbones.VisionShape(8, 128, 1, 2, grid=4, embed=8, family="eva"))
        x = torch.randn(1, 2, 5 + 6, 64)        # the class token and four others before the patches
        rotated = backbones.rotate(x, *tower.rotary_tables((2, 3)))
        self.assertTrue(torch.equal(rotated[:, :, :6], x[:, :, :6]))    # and the place (0, 0)
        self.assertTrue((rotated[:, :, 6:] != x[:, :, 6:]).any(-1).all())
        self.assertTrue(torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-5))
        # On any grid, places span 16: (1, 0) of two rows is where (2, 0) of four is.
        self.assertTrue(torch.equal(tower.rotary_tables((2, 3))[0][3],
                                    tower.rotary_tables((4, 4))[0][8]))

    def test_positions_are_resized_and_can_stay_so(self):
        path = self.saved(dinov2_state())
        image = torch.randn(1, 3, 98, 98)
        stays = backbones.load_vision(path, image_size=98)
        self.assertEqual((stays.shape.grid, stays.position.shape), (7, (1, 50, 128)))
        self.assertTrue(torch.equal(stays(image), backbones.load_vision(path)(image)))
        with self.assertRaisesRegex(ValueError, "14 does not divide"):
            backbones.load_vision(path, image_size=100)
        # DINOv2's antialiased, CLIP's not.
        for state, antialias in ((dinov2_state(), True), (clip_state(grid=5), False)):
            tower = backbones.load_vision(self.saved(state))
            stored = tower.position[:, 1:].transpose(1, 2).unflatten(2, (5, 5))
            expected = nn.functional.interpolate(stored, (7, 9), mode="bicubic",
                                                 antialias=antialias).flatten(2).transpose(1, 2)
            self.assertTrue(torch.equal(tower.positions((7, 9))[:, 1:], expected))
            self.assertTrue(torch.equal(tower.positions((7, 9))[:, :1], tower.position[:, :1]))

    def test_legacy_positions(self):
        """DINOv2's first release: cubic (a = -0.75), by the ratio of rows + 0.1 to those stored."""
        tower = backbones.ViT(backbones.VisionShape(14, 64, 1, 1, grid=25, registers=4))
        values = torch.randn(25)
        with torch.no_grad():                           # alike along the columns
            tower.position[0, 1:] = values[:, None].expand(25, 25).flatten()[:, None]
        tower.legacy_position_resize = True
        for rows in (20, 35):
            found = tower.positions((rows, rows))[0, 1:, 0].unflatten(0, (rows, rows))[:, 0]
            for i in range(rows):
                at = (i + 0.5) * 25 / (rows + 0.1) - 0.5
                expected = sum(float(values[min(max(j, 0), 24)]) * weight(at - j, cubic=True)
                               for j in range(math.floor(at) - 1, math.floor(at) + 3))
                self.assertAlmostEqual(float(found[i].detach()), expected, places=4)

    def test_openais_archives(self):
        """They are TorchScript, in half precision, with three plain numbers."""
        state = clip_state()
        plain = self.saved(state)
        root = nn.Module()
        for name, tensor in {**state, "context_length": torch.tensor(77),
                             "input_resolution": torch.tensor(224),
                             "vocab_size": torch.tensor(300)}.items():
            at, (*parts, last) = root, name.split(".")
            for part in parts:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_buffer(last, tensor.half() if tensor.is_floating_point() else tensor)
        archive = plain.with_name("ViT-B-16.pt")
        torch.jit.script(root).save(str(archive))
        for read in (backbones.load_vision, backbones.load_text):
            for half, single in zip(read(archive).parameters(), read(plain).parameters()):
                self.assertTrue(torch.equal(half, single.half().float()))

    def test_text_is_causal_and_padding_comes_after_the_end(self):
        tower = backbones.TextTransformer(backbones.TEXT["small"]).eval()
        a = torch.tensor([[1000, 5, 6, 1001, 0, 0]])
        b = torch.tensor([[1000, 5, 7, 1001, 0, 0]])
        (words_a, sentence), (words_b, _) = tower(a), tower(b)
        self.assertTrue(torch.equal(words_a[:, :2], words_b[:, :2]))
        self.assertFalse(torch.allclose(words_a[:, 2], words_b[:, 2]))
        self.assertTrue(torch.allclose(sentence, words_a[:, 3] @ tower.projection, atol=1e-5))
        self.assertEqual(backbones.after_end(a).tolist(), [[False] * 4 + [True] * 2])

    def test_bad_files_are_refused_by_name(self):
        dinov2, eva, zeros = dinov2_state(), eva_state(), torch.zeros
        vision, text = backbones.load_vision, backbones.load_text
        for read, state, change, message in (
                (vision, dinov2, {"blocks.1.attn.qkv.bias": None},
                 r"1 tensor\(s\) missing, the first: blocks\.1\.attn\.qkv\.bias"),
                (vision, dinov2, {"extra": zeros(3)}, r"1 tensor\(s\) unexpected.*extra"),
                (vision, dinov2, {"norm.weight": zeros(7)},
                 r"1 tensor\(s\) misshapen.*norm\.weight, \(7,\) in the file, \(128,\) expected"),
                (vision, dinov2, {"pos_embed": zeros(1, 25, 128)}, "misshapen.*pos_embed"),
                (vision, dinov2, {"cls_token": zeros(1, 1, 128).double() + 1e300},
                 "cls_token holds numbers not finite in torch.float32"),
                (vision, dinov2, {"register_tokens": None}, "no vision tower"),
                (vision, dinov2, {"patch_embed.proj.weight": None}, "missing.*proj.weight"),
                (vision, eva, {"visual.blocks.1.attn.q_bias": None},
                 r"missing, the first: visual\.blocks\.1\.attn\.q_bias"),
                (vision, eva, {"visual.blocks.0.attn.k_bias": zeros(192)},
                 "unexpected, the first: visual.blocks.0.attn.k_bias"),
                (vision, eva, {"visual.head.weight": zeros(64, 7)},
                 r"visual\.head\.weight, \(64, 7\) in the file, \(64, 192\) expected"),
                (text, eva, {"text.ln_final.bias": None}, "first: text.ln_final.bias"),
                (text, dinov2, {}, "no text tower")):
            with self.subTest(message), self.assertRaisesRegex(backbones.WeightsError, message):
                read(self.saved(changed(state, change)))

    def test_unreadable_files_are_refused_and_run_no_code(self):
        class Script(nn.Module):
            @torch.jit.export
            def __getstate__(self):
                return 1

            @torch.jit.export
            def __setstate__(self, state: int):
                torch.from_file("harmed", True, 4)

            def forward(self, x):
                return x

        path = self.saved(dinov2_state())
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 0x40
        torch.jit.script(Script()).save(str(path))
        for content, message in (
                (whole[:5000], "not a readable"), (flipped, "not a readable"),
                (path.read_bytes(), "not a readable"), (b"", "not a readable"),
                (pickle.dumps({"cls_token": Harm(path.with_name("harmed"))}), "not a readable")):
            path.write_bytes(content)
            with self.assertRaisesRegex(backbones.WeightsError, f"weights.pth: {message}"):
                backbones.load_vision(path)
        self.assertFalse(path.with_name("harmed").exists() or Path("harmed").exists())


def hugging_face(state):
    """A state in the publishers' names under Hugging Face's: DINOv2's, or CLIP's with both."""
    dinov2 = "cls_token" in state
    words = ("query", "key", "value") if dinov2 else ("q_proj", "k_proj", "v_proj")
    names = {
        r"^(cls|mask|register)_token": r"embeddings.\1_token", "^norm": "layernorm",
        "^pos_embed": "embeddings.position_embeddings", "^blocks": "encoder.layer",
        "^patch_embed.proj": "embeddings.patch_embeddings.projection",
        r"ls(\d).gamma": r"layer_scale\1.lambda1", "attn.proj": "attention.output.dense",
        "attn.qkv": "attention.attention.qkv"} if dinov2 else {
        "^(class|token)_embedding": r"embeddings.\1_embedding", "^ln_final": "final_layer_norm",
        "^positional_embedding": "embeddings.position_embedding.weight",
        "^conv1": "embeddings.patch_embedding", "^ln_pre": "pre_layrnorm",
        "^ln_post": "post_layernorm", "^proj$": "visual_projection.weight",
        "^text_projection": "text_projection.weight", "^transformer.resblocks": "encoder.layers",
        r"\.ln_(\d)": r".layer_norm\1", "c_fc": "fc1", "c_proj": "fc2",
        "attn.out_proj": "self_attn.out_proj", "attn.in_proj_": "self_attn.qkv."}
    out = {}
    for name, tensor in state.items():
        model_prefix = "vision_model." if name.startswith("visual.") else "text_model."
        name = name.removeprefix("visual.")
        for official, theirs in names.items():
            name = re.sub(official, theirs, name)
        if "_projection." in name:
            tensor = tensor.T.contiguous()
        elif not dinov2 and name != "logit_scale":
            name = model_prefix + name
        if ".qkv." in name:
            out |= {name.replace("qkv", word): part.clone()
                    for word, part in zip(words, tensor.chunk(3))}
        else:
            out[name] = tensor
    return out


class HuggingFace(unittest.TestCase):
    """Their layouts give the towers that the publishers' files give."""

    def test_folders_and_files(self):
        vision, text = backbones.load_vision, backbones.load_text
        ids = {f"{kind}_model.embeddings.position_ids": torch.arange(7)[None]
               for kind in ("vision", "text")}
        for state, more, reads in ((dinov2_state(), {}, [vision]),
                                   (clip_state(), ids, [vision, text])):
            place = folder(self)
            torch.save(state, place / "own.pt")
            theirs = {**hugging_face(state), **more}
            torch.save(theirs, place / "pytorch_model.bin")
            for read, path in itertools.product(reads, (place, place / "pytorch_model.bin")):
                tower, expected = read(path), read(place / "own.pt")
                self.assertEqual(tower.shape, expected.shape)
                for name, tensor in expected.state_dict().items():
                    self.assertTrue(torch.equal(tower.state_dict()[name], tensor), name)
            for name in [name for name in theirs if re.search(r"0\..*\.(key|k_proj)\.bias", name)]:
                for value, message in ((None, "missing, the first"), (torch.zeros(3), "misshapen")):
                    torch.save(changed(theirs, {name: value}), place / "pytorch_model.bin")
                    with self.assertRaisesRegex(backbones.WeightsError, f"{message}.*{name}"):
                        reads["text_model" in name](place)
        with self.assertRaises(IsADirectoryError):
            vision(folder(self))

    def test_safetensors(self):
        place = folder(self)
        (place / "model.safetensors").write_bytes(b"12345678{}")
        try:
            import safetensors.torch
        except ImportError:
            with self.assertRaisesRegex(backbones.WeightsError, "pip install safetensors"):
                backbones.load_vision(place)
            return
        with self.assertRaisesRegex(backbones.WeightsError, "model.safetensors: not a readable"):
            backbones.load_vision(place)
        state = dinov2_state()
        safetensors.torch.save_file(hugging_face(state), place / "model.safetensors")
        tower = backbones.load_vision(place)
        self.assertTrue(torch.equal(tower.class_token, state["cls_token"]))


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


class Harm:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Methods(unittest.TestCase):
    def batch(self, net, count=2):
        size = net.config.image_size
        tokens = torch.zeros(count, net.config.length, dtype=torch.int64)
        tokens[:, :5] = torch.tensor([510, 30, 40, 50, net.text.shape.vocabulary - 1])
        return torch.randn(count, 3, size, size), tokens

    def test_frozen_stays_and_tuned_learns(self):
        for name, positions in (("shapes", False), ("shapes-barleria", True)):
            torch.manual_seed(0)
            net = model.build(name, train_towers=False, train_positions=positions).train()
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
            images, tokens = self.batch(net, 4)
            for _ in range(3):
                masks = (torch.rand(4, 1, 16, 16) > 0.5).float()
                loss.text_to_pixel_loss(net(images, tokens), masks).backward()
                for name, parameter in net.named_parameters():
                    self.assertEqual(parameter.grad is not None, parameter.requires_grad, name)
                optimizer.step()
                optimizer.zero_grad()
            for name, tensor in net.state_dict().items():
                frozen = name.startswith(("vision.", "text.")) and not (
                    positions and name in ("vision.position", "text.position"))
                self.assertEqual(torch.equal(tensor, before[name]), frozen, name)

    def test_towers_can_learn_too(self):
        for name in ("shapes", "shapes-barleria"):
            net = model.build(name)
            net(*self.batch(net)).sum().backward()
            self.assertFalse([name for name, p in net.named_parameters() if p.grad is None])

    def test_dcris_reads_the_words_and_without_adapters_is_its_towers(self):
        net = model.build("shapes", visual_adapter_layers=(), text_adapter_layers=()).eval()
        images, tokens = self.batch(net)
        words, _ = net.text_branch(tokens)
        self.assertTrue(torch.equal(words, net.text(tokens)[0]))
        last = net.image_branch(images, words)[-1].flatten(2).transpose(1, 2)
        self.assertTrue(torch.equal(last, net.vision(images)[:, net.vision.prefix:]))
        net = model.build("shapes", visual_adapter_layers=(1,)).eval()
        other = tokens.clone()
        other[:, 2] = 41
        a, b = (net.image_branch(images, net.text_branch(t)[0]) for t in (tokens, other))
        self.assertTrue(all((x - y).abs().max() > 1e-6 for x, y in zip(a, b)))

    def test_logits_are_four_times_the_grid(self):
        for name in ("shapes", "shapes-barleria"):
            net = model.build(name).eval()
            images, tokens = self.batch(net)
            self.assertEqual(net(images[:, :, :48], tokens).shape, (2, 1, 24, 32))
        with torch.device("meta"):
            for name, config in model.PRESETS.items():
                net = model.build(name).eval()
                side = 4 * config.image_size // net.vision.shape.patch
                images = torch.zeros(1, 3, config.image_size, config.image_size)
                tokens = torch.zeros(1, config.length, dtype=torch.int64)
                self.assertEqual(net(images, tokens).shape, (1, 1, side, side), name)

    def test_bad_configurations(self):
        for preset, overrides, message in (
                ("dcris-b", {"image_size": 450}, "image_size 450 .* of 14.*448 is"),
                ("dcris-b", {"visual_adapter_layers": (3, 12)}, "the tower has 12 blocks, 0 to 11"),
                ("dcris-b", {"text_adapter_layers": (-1,)}, "text_adapter_layers"),
                ("dcris-b", {"visual_adapter_layers": (3, 3)}, "each block once"),
                ("dcris-b", {"visual_adapter_rank": 100}, "rank 100 is no multiple of 16"),
                ("dcris-b", {"length": 78}, "3 to 77"), ("dcris-b", {"length": 2}, "3 to 77"),
                ("dcris-b", {"head_heads": 7}, "head_width 512"),
                ("dcris-b", {"lr": math.nan}, "above 0"), ("dcris-b", {"batch_size": -2}, "above"),
                ("dcris-b", {"vision": "resnet"}, "'resnet' is unknown; there are dinov2-b"),
                ("dcris-b", {"features": (4,)}, "two blocks"), ("dcris-b", {"dropout": 1.}, "drop"),
                ("dcris-b", {"colour": 1}, "no field colour"),
                ("dcris-b", {"features": (4, "8")}, "features"),
                ("dcris-b", {"visual_flows": False}, "visual_flows plays no part in .* dcris"),
                ("barleria", {"visual_adapter_rank": 64}, "rank plays no part in .*barleria"),
                ("barleria", {"vision": "clip-l", "image_size": 420}, "are not the two towers"),
                ("barleria", {"vision": "eva-b"}, "are not the two towers of one CLIP"),
                ("barleria", {"global_blocks": 13}, "global_blocks 13: clip-b has 12 blocks"),
                ("barleria", {"global_blocks": -1}, "global_blocks"),
                ("etris", {"bridges": 13}, "bridges 13: clip-b has 12 blocks"),
                ("barleria", {"global_width": 100}, "global_width 100 is no multiple of 3"),
                ("compacter", {"tuner_rank": 6}, "tuner_rank 6 is no multiple of 4"),
                ("fixed", {"tuner_rank": 6}, "tuner_rank plays no part in method fixed"),
                ("nothing", {}, "no preset 'nothing'; there are shapes")):
            with self.subTest(preset, **overrides), \
                    self.assertRaisesRegex(model.ConfigError, message):
                model.configure(preset, **overrides)

    def test_full_size_steps(self):
        for name in (model.PRESETS if MANY else ("dcris-b", "barleria")):
            torch.manual_seed(0)
            net = model.build(name).train()
            learns = {name: p for name, p in net.named_parameters() if p.requires_grad}
            before = {name: p.detach().clone() for name, p in learns.items()}
            optimizer = torch.optim.Adam(learns.values(), lr=1e-4)
            images, tokens = self.batch(net)
            masks = (torch.rand(2, 1, *images.shape[2:]) > 0.5).float()
            value = loss.text_to_pixel_loss(net(images, tokens), masks)
            value.backward()
            optimizer.step()
            self.assertTrue(math.isfinite(value.item()))
            # Below an up-projection that starts at zero nothing moves in the first step.
            still = {name for name, p in learns.items() if torch.equal(p, before[name])}
            self.assertFalse([name for name in still if not re.search(
                r"text_adapters.*down|mlp\.1\.|\.down$|factors", name)])


class Checkpoints(unittest.TestCase):
    def test_towers_from_files_stay_in_their_files(self):
        place = folder(self)
        names = {"vision": backbones.Published("v.pth", "http://v"),
                 "text": backbones.Published("t.pt", "http://t")}
        vision = backbones.VisionShape(14, 64, 2, 1, grid=4, registers=4)
        torch.save(dinov2_state(64, grid=4), place / "v.pth")
        torch.save(clip_state(64), place / "t.pt")
        overrides = {"vision": "vision", "text": "text", "image_size": 56, "train_towers": False,
                     "visual_adapter_layers": (1,), "features": (0, 1)}
        with mock.patch.dict(backbones.VISION, vision=vision), \
                mock.patch.dict(backbones.TEXT, text=backbones.TextShape(64, 2, 1, 64, 300, 77)), \
                mock.patch.dict(backbones.PUBLISHED, names), \
                mock.patch.object(model, "PRETRAINED", place):
            net = model.build("shapes", place / "v.pth", place / "t.pt", **overrides).eval()
            model.save(place / "a.pt", net)
            held = model.read_checkpoint(place / "a.pt")
            self.assertFalse([n for n in held["tensors"] if n.startswith(("vision.", "text."))])
            self.assertEqual(held["towers"]["vision"],
                             {"file": "v.pth", "sha256": backbones.sha256(place / "v.pth")})
            images, tokens = torch.randn(1, 3, 56, 56), torch.tensor([[298, 4, 299]])
            again = model.load(place / "a.pt")
            self.assertTrue(torch.equal(again(images, tokens), net(images, tokens)))
            self.assertFalse(again.training)
            self.assertFalse(any(p.requires_grad for p in again.vision.parameters()))
            name = "vision.class_token"         # a frozen tower comes from its file alone
            torch.save({**held, "config": asdict(held["config"]), "tensors": {
                **held["tensors"], name: net.vision.class_token + 1}}, place / "b.pt")
            with self.assertRaisesRegex(backbones.WeightsError, f"unexpected, the first: {name}"):
                model.load(place / "b.pt")
            torch.save(dinov2_state(64, grid=4), place / "v.pth")         # other numbers
            with self.assertRaisesRegex(backbones.WeightsError, "SHA-256"):
                model.load(place / "a.pt")
            (place / "v.pth").unlink()
            with self.assertRaisesRegex(FileNotFoundError, "http://v"):
                model.load(place / "a.pt")

    def test_export(self):
        place = folder(self)
        net = model.build("shapes").eval()
        model.save(place / "a.pt", net, run={"dataset": "shapes"}, vocabulary={"text": "a b"},
                   optimizer={"state": torch.zeros(1000)})
        for out in ("b.pt", "c.safetensors"):
            status, _, err = program(model, "export", place / "a.pt", place / out)
            if status and out == "c.safetensors":
                self.assertIn("safetensors", err)
                continue
            self.assertEqual(status, 0, err)
            again = model.load(place / out)
            self.assertEqual(again.config, net.config)
            for name, tensor in net.state_dict().items():
                self.assertTrue(torch.equal(again.state_dict()[name], tensor), name)
            status, _, err = program(model, "export", place / out, place / out)
            self.assertEqual(status, 2)
            self.assertIn("is the checkpoint itself", err)
            held = model.read_checkpoint(place / out)
            self.assertEqual(held["vocabulary"], {"text": "a b"})
            self.assertNotIn("optimizer", held)

    def test_bad_checkpoints_are_refused(self):
        place = folder(self)
        model.save(place / "a.pt", model.build("shapes"))
        whole = (place / "a.pt").read_bytes()
        held = torch.load(place / "a.pt")
        first = next(iter(held["tensors"]))
        for change, message in (
                (lambda c: c["tensors"].pop(first), f"missing, the first: {first}"),
                (lambda c: c["tensors"].update(x=torch.zeros(1)), "unexpected.*: x"),
                (lambda c: c["tensors"].update({first: torch.zeros(1)}), "misshapen"),
                (lambda c: c["tensors"].update({first: c["tensors"][first] * math.nan}), "finite"),
                (lambda c: c["config"].update(colour=1), "colour"),
                (lambda c: c["config"].update(image_size=81), "image_size 81"),
                (lambda c: c.pop("config"), "not a checkpoint of this project .*config")):
            changed = {**held, "tensors": dict(held["tensors"]), "config": dict(held["config"])}
            change(changed)
            torch.save(changed, place / "b.pt")
            with self.subTest(message), self.assertRaisesRegex(
                    backbones.WeightsError, f"b.pt: .*{message}"):
                model.load(place / "b.pt")
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 0x40
        for content in (whole[:len(whole) // 2], flipped, pickle.dumps(Harm(place / "harmed"))):
            (place / "c.pt").write_bytes(content)
            with self.assertRaisesRegex(backbones.WeightsError, "c.pt: not a readable"):
                model.load(place / "c.pt")
        self.assertFalse((place / "harmed").exists())

    def test_a_failed_save_keeps_the_old_file(self):
        place = folder(self)
        (place / "a.pt").write_bytes(b"old")
        full = OSError(28, "No space left on device")
        with mock.patch("os.fsync", side_effect=full), \
                self.assertRaisesRegex(OSError, "a.pt: could not be written: .*No space left"):
            model.save(place / "a.pt", model.build("shapes"))
        self.assertEqual([(p.name, p.read_bytes()) for p in place.iterdir()], [("a.pt", b"old")])


# ---------------------------------------------------------------------------------------------
# Recorded from the authors' own programs: DETRIS-B (commit c94b1e1) and ETRIS with ViT-B/16
# (cdc6d8e), both for RefCOCO, on weights and inputs that anyone can make (`Released`)
# ---------------------------------------------------------------------------------------------

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
    prefixes = ("dinov2.", "txt_backbone.") if detris else ("backbone.", "backbone.")
    vision_names = backbones.DINOV2_NAMES if detris else backbones.CLIP_VISION_NAMES
    shapes = {}
    for name, tensor in net.state_dict().items():
        kind, _, rest = name.partition(".")
        shape = list(tensor.shape)
        if kind == "vision":
            if not detris and rest in ("class_token", "position"):
                shape = shape[-1:] if rest == "class_token" else shape[1:]
            if rest == "projection.weight":
                shape.reverse()
            shapes[prefixes[0] + backbones.renamed(rest, vision_names).removesuffix(".T")] = shape
            continue
        if kind == "text":
            shapes[prefixes[1] + backbones.renamed(rest, backbones.CLIP_TEXT_NAMES)] = shape
            continue
        theirs = backbones.renamed(name, model.RELEASED_NAMES)
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
                     c=backbones.VisionShape(16, 128, 6, 2, 3, 0, 64, "clip"))
    def test_files_are_read_as_they_are_and_refused_by_name(self):
        """Small models in files of the authors' form."""
        place = folder(self)
        for preset, fields, unused, some in (
                ("detris-b", {"vision": "v", "features": (2, 4), "visual_adapter_rank": 32,
                              "visual_adapter_layers": (1, 3), "text_adapter_rank": 16,
                              "text_adapter_layers": (1, 2, 5)}, ["txt_backbone.visual.proj"],
                 ["dinov2.blocks.3.adapter.dense_branch2.1.bn.running_var",
                  "txt_backbone.transformer.resblocks.5.adapter.D_fc2.bias",
                  "proj.vis.3.1.weight"]),
                ("etris", {"vision": "c", "features": (1, 3), "bridge_width": 16}, [],
                 ["bridger.zoom_out.2.0.weight", "backbone.visual.positional_embedding",
                  "neck.f5_proj.1.running_mean"])):
            net = model.build(preset, text="t", head_width=64, head_layers=2, **fields)
            shapes = {**released_shapes(net), **dict.fromkeys(unused, (3, 3))}
            state = {f"module.{name}": recorded_weight(name, shape)
                     for name, shape in shapes.items()}
            torch.save({"epoch": 40, "best_iou": np.float64(0.7), "state_dict": state},
                       place / "a.pth")
            again = model.load(place / "a.pth")
            recipe = {key: getattr(net.config, key) for key in ("epochs", "milestones")}
            self.assertEqual(replace(again.config, **recipe), net.config)
            self.assertTrue(torch.equal(again.head.neck.maps[2][0].weight,
                                        state["module.neck.f5_proj.0.weight"].transpose(0, 1)))
            for name in some:
                key, short = f"module.{name}", name.split("backbone.")[-1]
                for change, message in (({}, "missing"), ({key: torch.zeros(3, 2)}, "misshapen")):
                    kept = {k: v for k, v in state.items() if k != key}
                    torch.save({"state_dict": kept | change}, place / "b.pth")
                    with self.subTest(name), self.assertRaisesRegex(
                            backbones.WeightsError, f"(?=.*{message}).*{re.escape(short)}"):
                        model.load(place / "b.pth")


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
    def test_a_mask_survives_the_way_there_and_back(self):
        for width, height in ((640, 480), (1000, 200), (150, 900), (33, 57), (2000, 1333)):
            y, x = np.mgrid[:height, :width]
            x, y = x / width, y / height
            mask = (np.hypot(x - 0.55, y - 0.45) < 0.3) | ((x < 0.2) & (y > 0.7))
            square = data.letterbox_mask(torch.from_numpy(mask * np.uint8(255)), 448)
            self.assertEqual((square.shape, square.dtype), ((1, 448, 448), torch.uint8))
            back = data.unletterbox(square[0] / 255, width, height).numpy() > 0.5
            self.assertGreater((back & mask).sum() / (back | mask).sum(), 0.98, (width, height))

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


def weight(x, cubic, a=-0.75):
    """The weight of a pixel at distance x: cubic interpolation with OpenCV's `a`, or linear."""
    x = abs(x)
    if not cubic:
        return max(0.0, 1 - x)
    return ((a + 2) * x ** 3 - (a + 3) * x ** 2 + 1 if x <= 1 else
            a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0)


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
        runs = data.run_lengths(stripe)
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
                      "sentences": [{"sent": text, "sent_id": a} for text in (name, "it")]}
                     for a, (name, _, i) in truth.items()]
        self.write("refcoco", "unc", self.refs)
        self.tokenizer = data.Tokenizer(b"#version: 0.2\n")

    def write(self, name, split_by, refs):
        data.read_refs.cache_clear()
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / f"refs({split_by}).p").write_bytes(
            refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2))
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
                (refs, whole[refs][:-50], r"refs\(unc\).p: cannot be read"),
                (coco, whole[coco][:99], "instances.json: cannot be read"),
                (coco, b'{"annotations": []}', "no 'images'"),
                (ref, {"ann_id": 10**30}, "entry 0: .*annotation 10+ is not in"),
                (ref, {"image_id": [1]}, "entry .*unhashable"),
                (ref, {"sentences": [{"sent": " &nbsp; "}]}, "an expression is empty"),
                (ref, {"sentences": [{"tokens": []}]}, "no 'sent'"),
                (image, {"file_name": "\x1b[2J"}, r"no image folder holds \?\[2J"),
                (image, {"width": 81}, "pixels, but instances.json says 81x"),
                (mask, {"segmentation": None}, "has no mask"),
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

    @unittest.skipUnless(MANY, "changes bytes at random; MANY=1 runs it")
    def test_mutated_files(self):
        """A few changed bytes: each file is read, or refused with the documented error."""
        chance = random.Random(0)
        for path in 120 * MANY * [*(self.root / "refcoco").iterdir(), self.photos[1]]:
            whole = path.read_bytes()
            start, old, new = chance.randrange(len(whole)), *chance.choices((0, 1, 8), k=2)
            path.write_bytes(whole[:start] + chance.randbytes(new) + whole[start + old:])
            with contextlib.suppress(data.DataError):
                self.read_all(skip_broken=False)
            path.write_bytes(whole)

    def test_broken_photos_are_refused_or_skipped(self):
        self.photos[1].write_bytes(self.photos[1].read_bytes()[:200])
        for dataset, broken in ((data.TrainSet, (1, 0)), (data.ExpressionSet, 0)):
            with self.assertRaisesRegex(data.DataError, "1.jpg: cannot be read as an image"):
                dataset(self.read(), self.tokenizer, 64, 17)[broken]
        train_set, expressions = (dataset(self.read(), self.tokenizer, 64, 17, skip_broken=True)
                                  for dataset in (data.TrainSet, data.ExpressionSet))
        self.assertEqual([train_set[1, i]["skipped"] for i in range(4)], [2, 1, 0, 0])
        self.assertEqual([expressions[i] is None for i in range(6)], [True] * 4 + [False] * 2)

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

    def test_check_prints_a_table(self):
        status, out, _ = program(data, "check", self.root)
        self.assertEqual(status, 0)
        self.assertIn("| refcoco | train | 6 | 12 | published: 42,404 and 120,624 |", out)


class Hostile(unittest.TestCase):
    def test_weight_files(self):
        path, harm = folder(self) / "w.pt", Harm(folder(self) / "h")
        for content in ({"state_dict": harm}, pickle.dumps(harm), b"", [1],
                        {"state_dict": {"module.a": 5}}):
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
            for read in (model.load, backbones.load_vision, backbones.load_text):
                with self.subTest(content=content, read=read), self.assertRaisesRegex(
                        (model.WeightsError, model.ConfigError), r"\A.+\Z"):
                    read(path)
        self.assertFalse(Path(harm.path).exists())


class Drawn(unittest.TestCase):
    def referred(self, text, figures, domain):
        """Reads an expression back, word by word: the figures that it can refer to."""
        def matching(words):
            return [f for f in figures if {*words} <= {*f[:4], "shape"}]

        words = text.removeprefix("the ")
        for relation, (dx, dy) in {**domain.directions, "nearest to": (0, 0)}.items():
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
            self.assertEqual({type(ref.segmentation) for ref in refs}, {list, dict})
            self.assertTrue(all(data.decode_mask(ref).sum() > 20 for ref in refs))
            tokenizer = data.Tokenizer(home / "merges.txt")         # a word is a token
            self.assertEqual(len(tokenizer.encode(text)), len(text.split()))
            self.assertLessEqual(tokenizer.size, backbones.TEXT["small"].vocabulary)
            self.assertNotEqual(program(data, name, root)[0], 0)    # never drawn over


class Metrics(unittest.TestCase):
    def test_by_hand(self):
        table = np.array([[0, 1, 2], [1, 3, 4], [2, 95, 100], [3, 0, 10]])
        found = evaluate.metrics(table)
        self.assertAlmostEqual(found["miou"], 100 * (0.5 + 0.75 + 0.95 + 0) / 4)
        self.assertAlmostEqual(found["oiou"], 100 * 99 / 116)
        self.assertEqual([found[f"p{p}"] for p in (50, 60, 70, 80, 90)], [50, 50, 50, 25, 25])
        self.assertEqual(found["expressions"], 4)

    def test_probabilities_keep_the_corners(self):
        logits, images = torch.randn(2, 1, 8, 8), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        found = evaluate.probabilities(lambda *_: logits, images, torch.zeros(2, 17), CPU, None)
        corners = logits.sigmoid()[:, 0, ::7, ::7]
        self.assertTrue(torch.allclose(found[:, ::31, ::31], corners, atol=1e-6))

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
        place = tempfile.TemporaryDirectory()
        cls.addClassCleanup(place.cleanup)
        cls.root, cls.ckpt = Path(place.name), Path(place.name, "net.pt")
        cls.tokenizer = data.Tokenizer(data.draw_shapes(cls.root / "data", TINY) / "merges.txt")
        cls.net = shake(model.build("shapes", head_width=32, head_heads=2, head_layers=1)).float()
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
                predicted = evaluate.predict(self.net, self.tokenizer, photo, sentence, CPU)
                truth = mask.numpy() > 0
                rows.append((len(rows), (predicted & truth).sum(), (predicted | truth).sum()))
        for world in (1, 2, 3):
            file, panel = self.root / f"{world}.json", self.root / f"{world}.png"
            statuses, lines = launch([
                *self.common, "--split", "val", "test", "--skip-broken", "--batch-size", 3,
                "--json", file, "--panel", panel], None, world, "evaluate")
            printed = "\n".join(lines)
            self.assertEqual(statuses, [0] * world, printed)
            self.assertRegex(printed, r"left out 0 .* and \d+ expressions with a broken photo")
            self.assertRegex(printed, r"\| val \| \d+ \| \d+\.\d\d \|(.|\n)+\| test \|")
            self.assertEqual(Image.open(panel).width, 2 * 580)
            found.append(json.loads(file.read_text())[str(self.ckpt)])
            self.assertEqual(found[0], found[-1])
        expected = evaluate.metrics(np.array(rows))
        self.assertGreater(expected["miou"], 1)
        for key, value in expected.items():     # from batches of one expression: other rounding
            self.assertAlmostEqual(found[0]["val"][key], value, delta=0.1, msg=key)

    def test_one_photo(self):
        path, out = self.refs[0].image, self.root / "out.png"
        status, _, err = program(evaluate, "--ckpt", self.ckpt, "--image", path, "--output", out,
                                 "--text", "the circle")
        self.assertEqual(status, 0, err)
        photo, shown, plain = (np.asarray(Image.open(file)) for file in (
            path, out, self.root / "out-mask.png"))
        mask = evaluate.predict(self.net, self.tokenizer, Image.open(path), "the circle", CPU)
        self.assertTrue(np.array_equal(plain, mask * np.uint8(255)))
        self.assertTrue(np.array_equal(shown[mask], photo[mask]) and (shown[~mask] >= 170).all())

    def test_bad_input_gets_one_line_and_status_2(self):
        place, photo = folder(self), self.refs[0].image
        one = ["--image", photo, "--text", "it", "--output", place / "o.png"]
        for arguments, message in (
                (["--ckpt", self.refs[0].image], "not a readable"),
                (["--split", "testC"], "no split 'testC'; found"), (one[2:], "one photo takes"),
                (["--dataset", "mixed"], "choose one to evaluate it on"),
                (["--split", "val", "--workers", 1], f"{self.last.image}: cannot be read"),
                (["--json", self.ckpt], "net.pt is an input"), (["--length", 99], "from 3 to 77"),
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
        place = tempfile.TemporaryDirectory()
        cls.addClassCleanup(place.cleanup)
        cls.root = Path(place.name)
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
                         {".lock", "log.jsonl", "last.pt", "best.pt", "val.png", "curves.png"})

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
            for name in ("val.png", "curves.png"):
                with Image.open(whole / name) as picture:
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
            batches = train.GlobalBatches(len(samples), 8, micro, 0, 1, seed=0)
            loader = torch.utils.data.DataLoader(samples, batch_sampler=batches)
            trainer = train.Trainer(net, 1.0, batches, CPU, None)
            trainer.optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
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
                worker_init_fn=train.leave_signals_to_parent if workers else None)
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
        status, _, err = program(
            train, *SMALL_RUN, "--preset", "shapes-barleria", "--dataset", "mixed", "--vocabulary",
            "data/refcoco/merges.txt", "--epochs", 1, "--micro-batch", 4, "--precision", "bf16")
        self.assertEqual(status, 0, err)
        run = Path.cwd() / "runs" / "shapes-barleria"
        config = model.read_checkpoint(run / "best.pt")["config"]
        self.assertEqual((config.method, config.length), ("barleria", 22))
        self.assertLess(self.log(run)[0]["loss"], 0.7)

    def test_towers_are_carried_to_another_domain(self):
        place, best = folder(self), self.root / "whole1" / "best.pt"
        data.draw_shapes(place, self.SCENES, name="shapes-b")
        common = ["--dataset", "shapes-b", "--data", place, "--init", best, *SMALL_RUN,
                  "--epochs", 1]
        before = {name: tensor for name, tensor in self.tensors("whole1", "best.pt").items()
                  if name.startswith(("vision.", "text."))}
        unused = ("mask_token", "logit_scale")
        for preset in ("shapes-full", "shapes-lora", "shapes-compacter", "shapes-barleria"):
            status, _, err = program(train, "--preset", preset, *common, "--out", place / preset)
            self.assertEqual(status, 0, err)
            # Wrapped layers have longer names.
            after = {re.sub(r"frozen\.|(mlp)\.0", r"\1", name): tensor
                     for name, tensor in self.tensors(place / preset).items()}
            for name, tensor in before.items():
                learns = preset == "shapes-full" and name.split(".")[-1] not in unused
                self.assertEqual(torch.equal(after[name], tensor), not learns, (preset, name))
        lora = ["--preset", "shapes-lora", *common, "--out", place / "shapes-lora"]
        self.assertRegex(program(train, *lora)[1], "shapes-lora: finished after epoch 1")
        for more, message in (
                (["--init", place / "shapes-full" / "best.pt"], "run: init"),
                (["--init", place / "shapes-lora" / "best.pt", "--out", place / "x"], "best.pt"),
                (["--init", place / "no.pt"], "no.pt: no such"),
                (["--preset", "houlsby", "--out", place / "x"], "the tower has 4 blocks")):
            refused(self, train, [*lora, *more], message)

    def test_bad_input_gets_one_line_and_status_2(self):
        place = folder(self)
        for name in ("best", "last"):
            (place / name).mkdir()
            shutil.copy(self.root / "whole1" / f"{name}.pt", place / name / "last.pt")
        for arguments, message in (
                (["--preset", "dcris-b"], "needs --dataset"),
                (["--init", "a.pt", "--random-towers"], "leave --random-towers"),
                (["--bench", "--rounds", 0], "at least 1"),
                (["--preset", "dcris-b", "--dataset", "refcoco", "--data", place / "no"],
                 "no such file; .python backbones.py download"),
                (["--preset", "shapes-lora"], "there is no file of one: --init"),
                (["--micro-batch", "5"], "micro-batches of 5; change"),
                (["--batch-size", "9999"], "only .* refs"),
                (["--out", place / "last", "--lr", 1, "--seed", 1],
                 "another run: lr 0.001 there, 1.0 here; seed 0 there, 1 here; --out DIR"),
                (["--out", place / "best"], "not this run's last.pt")):
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
        moments = random.Random(0)
        for world, run in itertools.product((1, 2), range(0, MANY, 4)):
            out = f"random{world}-{run}"
            for _ in range(4):
                launch([*self.command, "--out", self.root / out], None, world,
                       kill_after=moments.uniform(0.5, 1 + 1.5 * world))
            self.assertEqual(self.run_out(out, None, world)[0], [0] * world)
            self.same_as_whole(out, world)

    def test_a_disturbed_run_says_why_and_goes_on(self):
        """A signal ends it after the step, and saves it. Where one process fails, none hangs."""
        for trick, statuses, said, place in (
                ("terminate", [143], "", (1, 3)), ("interrupt", [130], "", (1, 3)),
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
        file = self.root / "bench.json"
        status, out, err = program(train, "--bench", "--batch-size", 4, "--micro-batch", 2,
                                   "--rounds", 1, "--precision", "bf16", "--json", file)
        self.assertEqual(status, 0, err)
        found = json.loads(file.read_text())
        self.assertEqual((found["preset"], found["batch"], found["precision"]),
                         ("shapes", 4, "bfloat16"))
        # A linear layer of the vision tower alone: 67 tokens, 96 to 384 channels, four blocks.
        self.assertGreater(found["forward_gflop_per_image"], 4 * 2e-9 * 67 * 96 * 384)
        self.assertLess(found["forward_gflop_per_image"], found["step_gflop_per_image"] / 2)
        for name, value in found.items():
            self.assertIn(f"| {name} | {f'{value:.4g}' if type(value) is float else value} |", out)
        self.assertGreater(found["loader_images_per_s"], 30)
        with mock.patch.object(train, "random_batch", lambda *_: torch.empty(2**50)):
            status, _, err = program(train, "--bench")
        self.assertEqual((status, err.count("\n")), (1, 1), err)
        self.assertIn("out of memory; try a smaller --batch-size", err)


def lines_of(printed):
    """The lines that programs printed, without progress."""
    return [line for line in printed.replace("\r", "\n").splitlines()
            if line.strip() and not re.match(r"epoch|.*\d+%\|", line)]


def refused(test, module, arguments, message):
    """That a program prints one line, an error, and ends with status 2."""
    status, out, err = program(module, *arguments)
    with test.subTest(arguments=arguments):
        test.assertEqual((status, out, len(lines_of(err))), (2, "", 1), err)
        test.assertRegex(lines_of(err)[0], message)


def launch(arguments, trick=None, world=1, module="train", kill_after=None):
    """Runs a program in `world` processes of one thread: their exit statuses and printed lines.

    They are forked from a server that has loaded PyTorch already. `trick`: a key of TRICKS.
    `kill_after`: seconds until all are killed. The status of a process that hangs is None.
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
        if kill_after:
            time.sleep(kill_after)
            for child in children:
                child.kill()
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


def send(*signals):
    for number in signals:
        signal.raise_signal(number)


def die_in_next_write():
    """At 100 kB of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)       # Python ignores it, and the write fails


def in_double():
    build, normalise = model.build, data.normalise
    model.build = lambda *args, **more: build(*args, **more).double()
    data.normalise = lambda images: normalise(images).double()


ALL, SECOND = (0, 1), (1,)
STEP = train.Trainer, "step"
# In which processes, after which call of which function, what happens.
TRICKS = {
    "drawing": (ALL, Image.Image, "save", 20, send, signal.SIGKILL),
    "first step": (ALL, *STEP, 1, send, signal.SIGKILL),
    "saving": (ALL, *STEP, 5, die_in_next_write),
    "last step": (ALL, *STEP, 2, send, signal.SIGKILL),         # of an epoch saved after step 4
    "validating": (ALL, evaluate, "probabilities", 2, send, signal.SIGKILL),
    "validated": (ALL, evaluate, "metrics", 1, send, signal.SIGKILL),
    "best saved": (ALL, model, "save", 1, send, signal.SIGKILL),        # after the last step
    "one killed": (SECOND, *STEP, 3, send, signal.SIGKILL),
    "terminate": (ALL, *STEP, 3, send, signal.SIGTERM),
    "interrupt": (ALL, *STEP, 3, send, signal.SIGINT),
    "terminate at last": (ALL, *STEP, 6, send, signal.SIGTERM),
    "terminate one": (SECOND, *STEP, 3, send, signal.SIGTERM),
    "terminate twice": (ALL, *STEP, 3, send, signal.SIGTERM, signal.SIGTERM),
    "fail at one": (SECOND, *STEP, 3, data.read_photo, "photo 7"),
    "full disk": (ALL, *STEP, 5, resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000)),
    "not finite": (ALL, *STEP, 5, setattr, loss, "text_to_pixel_loss",
                   lambda logits, masks: logits.sum() * math.nan),
    "double": (ALL, train, "parse_arguments", 1, in_double),
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
