"""The training run, and a benchmark of its speed.

    torchrun train.py                                   drawn data, a small model, a laptop
    torchrun --nproc_per_node=2 train.py --preset dcris-b --data DATA --dataset refcoco
    torchrun --nproc_per_node=4 train.py --preset dcris-l --data DATA --dataset mixed
    torchrun train.py --preset shapes-lora --dataset shapes-b --init runs/shapes/best.pt
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --preset dcris-l --data DATA --dataset refcoco+
    python train.py --bench --preset dcris-b --batch-size 2         how fast is this machine?

The batch size is global: the same command means the same training on any number of processes.
A run writes OUT/log.jsonl (one object an epoch), last.pt, best.pt (by mIoU on val), val.png,
curves.png, and TensorBoard's events where that is installed.

A run that was stopped goes on with the same command and its --out, at the step where last.pt was
written, and ends with the weights that it would have had undisturbed (but for rounding on GPUs).
SIGTERM and Ctrl-C end it, saved, at most two steps after the one in hand; a second one at once.
previous.pt is the last.pt before, last.pt.damaged one that could not be read. No two runs write to
one folder: .lock in it sees to that.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
import types
import typing
import warnings
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import backbones
import data
import evaluate
import loss
import model


# ---------------------------------------------------------------------------------------------
# The same training on any number of processes
# ---------------------------------------------------------------------------------------------

class GlobalBatches:
    """This process's share of every global batch, as lists of (epoch, index).

    One permutation an epoch, from seed and epoch alone, is cut into global batches; every process
    takes an equal slice of each, in pieces of `micro` samples. The incomplete last one is dropped.
    Before each pass `epoch` may be set, and `step`, how many of its first batches to leave out.
    """

    def __init__(self, samples, batch, micro, rank, world, seed):
        self.samples, self.batch, self.micro, self.seed = samples, batch, micro, seed
        self.rank, self.local = rank, batch // world
        self.epoch, self.step = 1, 0

    def __len__(self):
        return (self.samples // self.batch - self.step) * (self.local // self.micro)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(self.step * self.batch, self.samples - self.batch + 1, self.batch):
            first = start + self.rank * self.local
            for i in range(first, first + self.local, self.micro):
                yield [(self.epoch, index) for index in order[i:i + self.micro]]


class BatchNormOverProcesses(torch.autograd.Function):
    """Batch normalisation of x (B, C, ...) by statistics over all processes' equal batches.

    Returns mean and variance (C,), too. Forward and backward each exchange one tensor: on CPUs
    every exchange costs time.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        over = [d for d in range(x.ndim) if d != 1]
        here = torch.stack(torch.var_mean(x, over, correction=0))           # (2, C)
        each = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(each, here)
        variances, means = torch.stack(each, 1)                             # (processes, C)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.over = eps, over
        ctx.mark_non_differentiable(mean, variance)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, variance = ctx.saved_tensors
        normal = nn.functional.batch_norm(x, mean, variance, eps=ctx.eps)
        to_bias, to_weight = gradient.sum(ctx.over), (gradient * normal).sum(ctx.over)
        # x reaches the losses of all processes through mean and variance, so its gradient is that
        # of their sum. Weight and bias get their local share: parameters are averaged later.
        sums = torch.stack([to_bias, to_weight])
        dist.all_reduce(sums)
        means = sums / (x.numel() / x.shape[1] * dist.get_world_size())
        through_mean, through_variance = (m.view(-1, *[1] * (x.ndim - 2)) for m in means)
        to_x = gradient - through_mean - normal.mul_(through_variance)
        to_x *= (weight * (variance + ctx.eps).rsqrt()).view(-1, *[1] * (x.ndim - 2))
        return to_x, to_weight, to_bias, None


def synced_batch_norm(self, x):
    """The forward of a BatchNorm layer with statistics over all processes' equal batches.

    x: (B, C, ...), as what it returns. For CPUs, where PyTorch's SyncBatchNorm does not run.
    """
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight,
                                        self.bias, eps=self.eps)
    kind = x.dtype
    x = x if kind == torch.float64 else x.float()
    x, mean, variance = BatchNormOverProcesses.apply(x, self.weight, self.bias, self.eps)
    with torch.no_grad():
        count = x.numel() // x.shape[1] * dist.get_world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
    return x.to(kind)


def distribute(net, world, device):
    """The model with gradients and batch statistics shared by all processes."""
    if world == 1:
        return net
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    else:
        for layer in net.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.forward = types.MethodType(synced_batch_norm, layer)
    # How far apart the entries of a dimension of one lie means nothing, and yet DDP warns of it.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # As views of the buckets in which they travel, gradients are kept once, not twice.
    return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------------------
# One epoch, step by step
# ---------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """How far a run is: what it needs, besides weights and optimizer, to go on exactly."""
    epoch: int = 1              # the one in hand
    step: int = 0               # steps of it that are done
    left_out: int = 0           # of these, changed nothing: loss or gradient was not finite
    loss: float = 0.0           # the sum of the others' losses
    skipped: int = 0            # broken refs that gave way to others
    seconds: float = 0.0        # what the steps took
    best: float = -1.0          # the highest mIoU on val so far, percent
    rows: list = field(default_factory=list)        # of log.jsonl

    @classmethod
    def of(cls, path, values):
        """The progress that a checkpoint holds. WeightsError if its values cannot be one's."""
        def finite(*numbers):
            return all(type(n) in (int, float) and math.isfinite(n) for n in numbers)

        try:
            progress = cls(**values)
            counts = (progress.epoch, progress.step, progress.skipped, progress.left_out)
            sound = (all(type(n) is int and 0 <= n < 2**40 for n in counts) and progress.epoch > 0
                     and finite(progress.loss, progress.seconds, progress.best)
                     and progress.left_out <= progress.step and -1 <= progress.best <= 100
                     and (progress.seconds > 0 or progress.step == 0 == progress.seconds)
                     and all({"epoch", "loss", "miou", "oiou", "images_per_s"} <= row.keys()
                             and finite(*row.values()) and row["images_per_s"] > 0
                             for row in progress.rows)
                     and progress.epoch == len(progress.rows) + 1
                     and all(row["epoch"] == i for i, row in enumerate(progress.rows, 1)))
        except (TypeError, AttributeError, OverflowError):
            sound = False
        if not sound:
            raise model.WeightsError(f"{path}: its progress (epoch, step, ...) is damaged")
        return progress


class Stops:
    """Within it SIGTERM and SIGINT are noted in `wish`, 0 before; a second one ends the process."""

    def __enter__(self):
        self.wish = 0
        self.usual = {number: signal.signal(number, self.note)
                      for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        if self.wish:
            os._exit(128 + number)
        self.wish = number

    def __exit__(self, *error):
        for number, handler in self.usual.items():
            signal.signal(number, handler)


class Report:
    """A few numbers of a step, on their way from the device.

    They are read a step later: to read them at once, the host would wait for the device.
    """

    def __init__(self, numbers, refs):
        self.numbers, self.refs, self.arrived = numbers.to("cpu", non_blocking=True), refs, None
        if numbers.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers.tolist()


class Trainer:
    """A model, its optimizer and its progress: takes steps, and can be saved between any two."""

    def __init__(self, net, config, seed, rank, world, device, dtype, pieces):
        self.net, self.device, self.dtype, self.pieces = net, device, dtype, pieces
        self.seed, self.rank, self.world, self.half = seed, rank, world, dtype is torch.float16
        self.learned = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.learned, lr=config.lr, fused=True)
        # Besides scaling, which float16 alone needs, it leaves out steps that are not finite.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self.half else 1.0)
        self.parallel = distribute(net, world, device)
        self.statistics = [s for layer in net.modules()
                           if isinstance(layer, nn.modules.batchnorm._BatchNorm)
                           for s in (layer.running_mean, layer.running_var)]
        self.progress, self.in_a_row, self.random = Progress(), 0, []

    def step(self, samples, wish):
        """Takes a step on the next `pieces` of `samples`, a loader's iterator.

        Returns its Report: mean loss, broken refs, how many processes were told to stop (`wish`)
        and whether the step was left out, the same in all processes; and this one's refs.
        """
        # BatchNorm's statistics change in the forward pass, before the step is known to be good.
        before = [s.clone() for s in self.statistics]
        total, skipped, refs = 0.0, 0, []
        for piece in range(1, self.pieces + 1):
            batch = next(samples)
            images, tokens, masks = (batch[key].to(self.device, non_blocking=True)
                                     for key in ("image", "tokens", "mask"))
            skipped += int(batch["skipped"].sum())
            refs += batch["ref"]
            # Gradients travel between processes only with the last piece of a global batch.
            alone = self.world > 1 and piece < self.pieces
            with self.parallel.no_sync() if alone else contextlib.nullcontext():
                with evaluate.autocast(self.device, self.dtype):
                    logits = self.parallel(data.normalise(images), tokens)
                part = loss.text_to_pixel_loss(logits, masks / 255) / self.pieces
                self.scaler.scale(part).backward()
            total = total + part.detach().double()
        numbers = torch.stack([total / self.world, *torch.tensor(
            [skipped, bool(wish)], dtype=torch.float64).to(self.device, non_blocking=True)])
        if self.world > 1:
            dist.all_reduce(numbers)
        # A loss that is not finite can have finite gradients (float16). So one gets 0 added, or NaN
        # where the loss is not finite, and the scaler leaves the step out.
        self.learned[0].grad += numbers[0] - numbers[0]
        bad = ~torch.nn.utils.get_total_norm([p.grad for p in self.learned]).isfinite()
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.half else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        for now, then in zip(self.statistics, before):
            now.copy_(torch.where(bad, then, now))
        return Report(torch.cat([numbers, bad[None].double()]), refs)

    def count(self, report):
        """Adds a step's report to the progress; whether to stop."""
        loss, skipped, stop, bad = report.read()
        self.progress.skipped += int(skipped)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad:
            self.progress.left_out += 1
        else:
            self.progress.loss += loss
        if self.in_a_row == 3 and not self.half:
            refs = evaluate.from_all(report.refs, self.world)
            raise model.ConfigError(
                f"loss or gradient was not finite in three steps in a row of epoch "
                f"{self.progress.epoch}, at last with refs {', '.join(sum(refs, []))}; "
                f"these steps changed nothing; try a lower --lr, or find what is odd in the data")
        return bool(stop)

    def epoch(self, loader, batches, save, save_every, name):
        """Trains from where the progress stands to the end of its epoch, and calls `save` there
        and every so many steps. SystemExit, saved, if a process was told to stop.
        """
        progress = self.progress
        batches.epoch, batches.step = progress.epoch, progress.step
        steps = progress.step + len(batches) // self.pieces
        # Dropout, too, depends on the place in the run and the process alone. (Where another number
        # of processes goes on, this seed has to do.)
        torch.manual_seed((self.seed * 100_003 + progress.epoch) * 1009 + self.rank
                          + 104_729 * progress.step)
        samples, reports, stop, saved = iter(loader), deque(), False, True
        if progress.step and len(self.random) == self.world:
            host, on_device = self.random[self.rank]
            torch.set_rng_state(host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self.device)
        self.net.train()
        begun = time.monotonic() - progress.seconds
        with Stops() as stops, tqdm(initial=progress.step, total=steps, unit="step", desc=name,
                                    disable=self.rank > 0) as bar:
            while progress.step < steps and not stop:
                reports.append(self.step(samples, stops.wish))
                progress.step += 1
                progress.seconds = max(time.monotonic() - begun, 1e-9)
                saved = save_every > 0 and progress.step % save_every == 0
                late = 0 if saved else 1        # a checkpoint needs the last report, too
                while len(reports) > late:
                    stop |= self.count(reports.popleft())
                if saved:
                    save()
                bar.update()
                if bar.n % 10 == 0:
                    seen = bar.n - len(reports) - progress.left_out
                    bar.set_postfix(loss=f"{progress.loss / max(1, seen):.4f}")
            while reports:
                stop |= self.count(reports.popleft())
            if not saved:
                save()
            # The last step's wish, or one that came during the save, is in no report. This gathers
            # it, and nobody leaves before the first process has saved.
            if any(evaluate.from_all(bool(stop or stops.wish), self.world)):
                sys.exit(128 + (stops.wish or signal.SIGTERM))

    def save(self, path, **more):
        """Writes a checkpoint to go on from; the one that was there stays as previous.pt."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        random = evaluate.from_all((torch.get_rng_state(), on_device), self.world)
        if self.rank == 0:
            model.save(path, self.net, previous=path.with_name("previous.pt"), **more,
                       progress=asdict(self.progress), random=random,
                       optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def restore(self, path, checkpoint):
        """Takes up what `save` wrote besides the weights. WeightsError where that does not fit."""
        self.progress = Progress.of(path, checkpoint["progress"])
        optimizer, scaler = self.optimizer.state_dict(), self.scaler.state_dict()
        try:
            state, (group,) = (checkpoint["optimizer"][key] for key in ("state", "param_groups"))
            sound = (group == {**optimizer["param_groups"][0], "lr": group["lr"]}
                     and 0 < group["lr"] < math.inf
                     and state.keys() == set(range(len(self.learned)))
                     and all(moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
                             and same_kind(moments["step"], torch.tensor(0.0))
                             and same_kind(moments["exp_avg"], self.learned[i])
                             and same_kind(moments["exp_avg_sq"], self.learned[i])
                             and moments["step"] >= 0 and moments["exp_avg_sq"].min() >= 0
                             for i, moments in state.items())
                     and checkpoint["scaler"] == {**scaler, **{
                         name: checkpoint["scaler"][name] for name in ("scale", "_growth_tracker")}}
                     and 0 < checkpoint["scaler"]["scale"] < math.inf
                     and type(checkpoint["scaler"]["_growth_tracker"]) is int)
            self.random = [(host, on_device) for host, on_device in checkpoint["random"]]
            for host, on_device in self.random:
                torch.Generator().set_state(host)       # raises where it is no such state
                sound &= on_device is None or on_device.dtype == torch.uint8
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
            sound = False
        if not sound or not self.random:
            raise model.WeightsError(f"{path}: its optimizer, scaler or random state is not this "
                                     f"run's")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])


def same_kind(tensor, other):
    """Whether a value is a dense, finite tensor in memory with the other's shape and type."""
    return (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            and tensor.device.type == "cpu" and tensor.shape == other.shape
            and tensor.dtype == other.dtype and bool(tensor.isfinite().all()))


def keep_memory():
    """Has glibc keep the memory of tensors that are gone, for those of the next step.

    Otherwise it gives large blocks back to the system, which clears each page anew when it is
    needed again: up to a third of a step on CPUs. The price: the process stays as large as it ever
    was. Other C libraries have no such switches.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)         # M_TRIM_THRESHOLD: no limit to what is kept
        mallopt(-4, 0)          # M_MMAP_MAX: no block gets pages of its own


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------

def from_first(make, rank, world):
    """What `make()` gives in the first process, in all of them; an error, too, is everybody's."""
    if world == 1:
        return make()
    box = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except (OSError, ValueError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def run_folder(args):
    """The folder of this run, which no other run has: OUT, or the first free runs/PRESET[-N].

    Resuming without OUT: the one with a checkpoint that was written to last. Raises OSError.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if args.out:
        names = [Path(args.out)]
    else:
        names = [Path("runs", args.preset + (f"-{n}" if n > 1 else "")) for n in range(1, 10_000)]
        if args.resume or restarted:
            used = [name for name in names if checkpoints(name) or restarted and name.exists()]
            used = sorted(used, key=os.path.getmtime, reverse=True) or names[:1]
            names = used if restarted else used[:1]     # a restart's own is the newest that is free
        else:           # one that holds nothing but a lock was left by a run that failed at once
            names = [name for name in names
                     if not name.exists() or name.is_dir() and set(os.listdir(name)) <= {".lock"}]
    for out in names:
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"{out} is a file; --out names a folder")
        if args.resume == "must" and not checkpoints(out):
            raise FileNotFoundError(f"{out / 'last.pt'}: no run to resume; without --resume one "
                                    f"begins")
        if (out / "best.pt").exists() and not checkpoints(out):
            raise FileExistsError(f"{out} holds the best.pt of a run and no last.pt to go on from; "
                                  f"another --out starts afresh")
        if lock_folder(out):
            return out
    raise FileExistsError(f"{out}: another run is writing there; give this one another --out")


def lock_folder(out):
    """Whether this process may write to the folder `out`; no other one may then until it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)       # never closed
    except OSError as error:
        raise OSError(f"{out}: cannot be written to: {error.strerror}") from None
    try:            # lockf, unlike flock, is not held by a loader's process that outlives this one
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:        # others come from file systems without locks
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
    os.utime(out)                   # a restart looks for the folder that was taken last
    return True


def checkpoints(out):
    """The checkpoints in a folder that a run can go on from, the newest first."""
    return [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]


def newest_whole(out):
    """The path to go on from, or None. A damaged last.pt gives way to previous.pt, with a warning.

    It is renamed, or the next one saved would make it the previous.pt.
    """
    paths = checkpoints(out)
    for path in paths:
        try:
            model.read_checkpoint(path)
            return path
        except model.WeightsError as error:
            if path == paths[-1]:
                raise
            path.rename(f"{path}.damaged")
            print(f"warning: {error}; kept as {path.name}.damaged, going on from {paths[-1]}",
                  file=sys.stderr)


def find_towers(args, config, init):
    """The paths of both towers' files, None for those that come from none.

    Raises ConfigError where a tower would be frozen that comes from nowhere.
    """
    if init or args.random_towers:
        return None, None
    paths = model.find_weights(config, args.vision_weights, args.text_weights)
    if None in paths and not config.towers_learn:
        raise model.ConfigError(
            f"preset {args.preset} keeps its towers as they are, but there is no file of one: "
            f"--init CKPT takes both from a trained run such as runs/shapes/best.pt")
    return paths


def draw_if_missing(args):
    """Draws the data set if it is one to be drawn and not there."""
    folder = Path(args.data) / args.dataset
    if args.dataset in data.DOMAINS and not folder.exists():
        try:
            data.draw_shapes(args.data, name=args.dataset)
        except OSError:
            if not folder.exists():     # else another run has drawn the same in the meantime
                raise


def find_vocabulary(args, config, init):
    """The tokenizer's file, or what was in it: CLIP's for a published text tower, that of the run
    its towers come from, or else the data set's own."""
    if args.vocabulary:
        return args.vocabulary
    if init is not None:
        return str(init[1]["vocabulary"]["text"]).encode()
    if config.text in model.PUBLISHED:
        return model.find_published("vocabulary")
    path = Path(args.data) / args.dataset / "merges.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the text tower {config.text!r} needs a "
                                f"vocabulary of the data, or --vocabulary FILE")
    return path


def describe_run(args, init, dtype, train_set):
    """What a checkpoint says of its run besides the configuration; resuming asks for the same."""
    return {"dataset": args.dataset, "seed": args.seed, "keep_leaks": args.keep_leaks,
            "skip_broken": args.skip_broken, "precision": str(dtype or torch.float32),
            "preset": args.preset, "init": init and model.sha256(init[0]),
            "refs": len(train_set),
            "vocabulary": hashlib.sha256(train_set.tokenizer.text.encode()).hexdigest()}


def load_data(args, config, init, rank):
    """The tokenizer, the training samples, and the expressions of val."""
    refs, broken = data.read_split(args.data, args.dataset, "train", args.skip_broken,
                                   args.keep_leaks)
    val_refs, _ = data.read_split(args.data, args.dataset, "val", args.skip_broken)
    if len(refs) < config.batch_size:
        raise model.ConfigError(f"batch_size {config.batch_size}, but only {len(refs)} refs")
    if broken and rank == 0:
        print(f"{broken} broken entries left out of train, val and all other splits",
              file=sys.stderr)
    tokenizer = evaluate.make_tokenizer(find_vocabulary(args, config, init), config)
    size = config.image_size, config.length
    return (tokenizer, data.TrainSet(refs, tokenizer, *size, args.seed, args.skip_broken),
            data.ExpressionSet(val_refs, tokenizer, *size, args.skip_broken))


def load_init(path):
    """(path, checkpoint) of a run that trained its own towers, so that it holds them."""
    checkpoint = model.read_checkpoint(path)
    if "text" not in checkpoint["vocabulary"] or any(checkpoint["towers"].values()):
        raise model.ConfigError(f"{path}: no run on drawn data; --init takes the towers of one, "
                                f"and its vocabulary")
    method = checkpoint["config"].method
    if method in ("houlsby", "compacter", "lora"):
        raise model.ConfigError(f"{path}: its towers have the layers of {method} inside; --init "
                                f"takes those of a run such as runs/shapes/best.pt")
    return path, checkpoint


def load_model(args, config, towers, init, run, path):
    """A fresh model and None, or the one to go on with and its checkpoint, of `path`."""
    torch.manual_seed(args.seed)
    if path is None:
        return model.build(config, *towers, init), None
    checkpoint = model.read_checkpoint(path)
    if not {"progress", "random", "optimizer", "scaler"} <= checkpoint.keys():
        raise model.WeightsError(f"{path}: not the last.pt of a run (progress, random, optimizer, "
                                 f"scaler); a best.pt cannot be resumed")
    before = {**asdict(checkpoint["config"]), **checkpoint["run"]}
    different = [f"{key} {before.get(key)} there, {value} here"
                 for key, value in {**asdict(config), **run}.items()
                 if key not in before or type(before[key]) is not type(value)
                 or before[key] != value]
    if different:
        raise model.ConfigError(f"{path} is a checkpoint of another run: {'; '.join(different)}; "
                                f"another --out starts afresh")
    return model.load(path, args.vision_weights, args.text_weights, checkpoint), checkpoint


def train(args, config, init, rank, world, device):
    """The whole run of one process."""
    pieces, micro = divide_batch(config.batch_size, args.micro_batch, world)
    dtype = evaluate.precision_type(args.precision, device)
    out = from_first(lambda: run_folder(args), rank, world)
    path = from_first(lambda: newest_whole(out), rank, world)
    towers = find_towers(args, config, init)
    if config.text in model.PUBLISHED:
        find_vocabulary(args, config, init)     # what is missing is better said before the work
    from_first(lambda: draw_if_missing(args), rank, world)
    tokenizer, train_set, val_set = load_data(args, config, init, rank)
    run = describe_run(args, init, dtype, train_set)
    net, checkpoint = load_model(args, config, towers, init, run, path)
    trainer = Trainer(net.to(device), config, args.seed, rank, world, device, dtype, pieces)
    if checkpoint:
        trainer.restore(path, checkpoint)
        del checkpoint                  # the weights and the optimizer's state a second time
    progress = trainer.progress
    batches = GlobalBatches(len(train_set), config.batch_size, micro, rank, world, args.seed)
    steps = len(batches) // pieces
    if progress.step > steps:
        raise model.WeightsError(f"{path}: at step {progress.step} of an epoch of {steps}")
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=args.workers,
                        pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_parent)
    kept = {"run": run, "vocabulary": {} if config.text in model.PUBLISHED else {
        "text": tokenizer.text}}
    log = Log(out, progress.rows) if rank == 0 else None

    def save():
        trainer.save(out / "last.pt", **kept)

    for epoch in range(progress.epoch, config.epochs + 1):
        for group in trainer.optimizer.param_groups:
            group["lr"] = config.lr * 0.1 ** sum(epoch > end for end in config.milestones)
        trainer.epoch(loader, batches, save, args.save_every, f"epoch {epoch}/{config.epochs}")
        if progress.left_out == steps:
            raise model.ConfigError(f"no step of epoch {epoch} had a finite loss and gradient")
        begun = time.monotonic()
        table = evaluate.overlaps(net, val_set, device, None, config.batch_size, args.workers,
                                  rank, world, "validating")        # in single precision
        found = evaluate.metrics(table)
        images = steps * config.batch_size
        row = {"epoch": epoch, "loss": progress.loss / (steps - progress.left_out),
               "lr": trainer.optimizer.param_groups[0]["lr"], "miou": found["miou"],
               "oiou": found["oiou"], "p50": found["p50"],
               "images_per_s": images / progress.seconds,
               "peak_memory_gb": peak_memory_gb(device),
               "seconds": progress.seconds + time.monotonic() - begun}
        if progress.left_out:
            row["left_out"] = progress.left_out
        if rank == 0 and (progress.skipped or len(table) < len(val_set)):
            print(f"skipped {progress.skipped} broken refs, {len(val_set) - len(table)} "
                  f"expressions of val", file=sys.stderr)
        rows = [*progress.rows, row]
        kept["seconds"] = sum(images / row["images_per_s"] for row in rows)  # without validation
        # last.pt comes last: a run that is killed before repeats the epoch's end, and all of this.
        if rank == 0:
            if found["miou"] > progress.best:
                model.save(out / "best.pt", net, epoch=epoch, miou=found["miou"], **kept)
            log.show(rows)
            evaluate.save_picture(evaluate.panel(net, val_set, device), out / "val.png")
        trainer.progress = progress = Progress(
            epoch + 1, best=max(progress.best, found["miou"]), rows=rows)
        save()
    if rank == 0:
        print(f"{out}: best mIoU on val {progress.best:.2f}; best.pt, last.pt, log.jsonl, val.png, "
              f"curves.png")


def leave_signals_to_parent(worker):
    """Keeps a loader's process out of the group to which a terminal and torchrun send signals: its
    parent wants samples for another step or two."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Log:
    """OUT/log.jsonl, one object an epoch, with curves.png and TensorBoard's events beside it.

    The checkpoint holds the rows, too. What the log has beyond them, a resumed run repeats.
    """

    def __init__(self, out, rows):
        self.out = out
        for left in out.glob("*.[0-9]*.tmp"):       # of a process that was killed while it wrote
            left.unlink()
        self.write(rows)
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out), purge_step=len(rows) + 1)

    def write(self, rows):
        with model.replacing(self.out / "log.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)

    def show(self, rows):
        self.write(rows)
        evaluate.save_picture(evaluate.curves(rows), self.out / "curves.png")
        row = rows[-1]
        tqdm.write(f"epoch {row['epoch']}: loss {row['loss']:.4f}, val mIoU {row['miou']:.2f}, "
                   f"oIoU {row['oiou']:.2f}, P@0.5 {row['p50']:.2f}, "
                   f"{row['images_per_s']:.0f} images/s, {row['seconds']:.0f} s")
        if self.board:
            for key, value in row.items():
                self.board.add_scalar(key, value, row["epoch"])
            self.board.flush()


# ---------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------

def bench(args, config, rank, world, device):
    """Times a preset's forward pass and step on random numbers, and the loader on random photos.

    The first process prints a table of its own times, taken while all of them work, and with --json
    writes the same figures.
    """
    dtype = evaluate.precision_type(args.precision, device)
    if dtype is torch.float16 and device.type == "cpu":
        raise model.ConfigError("--bench --precision fp16: CPUs multiply such matrices in minutes "
                                "each; take bf16 or fp32")
    pieces, micro = divide_batch(config.batch_size, args.micro_batch, world)
    torch.manual_seed(args.seed)
    trainer = Trainer(model.build(config).to(device), config, args.seed, rank, world, device,
                      dtype, pieces)
    batch = random_batch(config, micro, device)
    images, tokens = data.normalise(batch["image"].to(device)), batch["tokens"].to(device)

    def forward():
        trainer.net.eval()
        with torch.no_grad(), evaluate.autocast(device, dtype):
            trainer.net(images, tokens)

    def step():
        trainer.net.train()
        trainer.step(iter([batch] * pieces), 0)

    for _ in range(2):                      # from the second on there are Adam's moments, too
        step()
    memory = peak_memory_gb(device)
    # Without AVX-512 a CPU takes half an hour for a bfloat16 product of 4096x4096.
    slow = (device.type == "cpu" and dtype is not None
            and torch.backends.cpu.get_cpu_capability() != "AVX512")
    side = 256 if slow else 4096
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    work = {"forward": forward, "step": step, "product": lambda: left @ right,
            "linear": lambda: backbones.linear(left, right)}
    # The arithmetic of this process. The counter does not know oneDNN's linear layer, nor, on CPUs,
    # fused attention, which is therefore taken apart here.
    counts = {backbones.ONEDNN_LINEAR: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    gflop = {}
    for name in ("forward", "step"):
        plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
        with plain, FlopCounterMode(display=False, custom_mapping=counts) as counter:
            work[name]()
        gflop[name] = counter.get_total_flops() / 1e9
    seconds = {name: [] for name in work}
    for _ in tqdm(range(args.rounds + 1), desc="timing", unit="round", leave=False,
                  disable=rank > 0):
        for name, action in work.items():
            if world > 1:
                dist.barrier()
            begun = wait_for(device)
            action()
            seconds[name].append(wait_for(device) - begun)
    # The first round warms up.
    seconds = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    speeds = {name: 2e-9 * side**3 / seconds[name] for name in ("product", "linear")}
    fastest = max(speeds.values())
    found = {"preset": args.preset, "image_size": config.image_size, "length": config.length,
             "batch": config.batch_size, "micro_batch": micro, "processes": world,
             "threads": torch.get_num_threads(),
             "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
             "precision": str(dtype or torch.float32).removeprefix("torch."),
             "product_side": side, "product_gflops": speeds["product"],
             "linear_gflops": speeds["linear"],
             "peak_memory_gb": memory}
    for name, samples in (("forward", micro), ("step", micro * pieces)):
        found[name] = {"seconds_per_image": seconds[name] / (samples * world),
                       "images_per_s": samples * world / seconds[name],
                       "gflop_per_image": gflop[name] / samples,
                       "share": gflop[name] / seconds[name] / fastest}
    if rank == 0:
        found["loader_images_per_s"] = loader_speed(config)
        show_speed(found, args.json)


def wait_for(device):
    """The time, in seconds, once the device has done all it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_batch(config, samples, device):
    """What a loader might give: photos, masks and sentences of random numbers."""
    size, vocabulary = config.image_size, model.TEXT[config.text].vocabulary
    tokens = torch.randint(1, vocabulary - 2, (samples, config.length))
    tokens[:, 0], tokens[:, -1] = vocabulary - 2, vocabulary - 1        # start and end
    image, mask = (torch.randint(256, (samples, channels, size, size), dtype=torch.uint8)
                   for channels in (3, 1))
    batch = {"image": image, "tokens": tokens, "mask": mask}
    if device.type == "cuda":
        batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
    return {**batch, "skipped": torch.zeros(samples), "ref": samples * ["random"]}


def loader_speed(config, photos=8, rounds=25):
    """Samples a second that one process of the loader makes of JPEG photos of 640x480 pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # as in a loader's process
    with tempfile.TemporaryDirectory() as folder:
        for i in range(photos):
            generator = torch.Generator().manual_seed(i)
            rough = torch.rand(1, 3, 60, 80, generator=generator)
            smooth = nn.functional.interpolate(rough, (480, 640), mode="bicubic").clamp(0, 1)
            grain = torch.rand(smooth.shape, generator=generator)
            pixels = (200 * smooth + 55 * grain)[0].permute(1, 2, 0).byte().numpy()
            Image.fromarray(pixels).save(Path(folder, f"{i}.jpg"), quality=90)
        outline = [320 + (150 + 9 * math.sin(9 * a)) * f(a)
                   for a in (k / 10 for k in range(60)) for f in (math.cos, math.sin)]
        refs = [data.Ref(id=i, image_id=i, image=Path(folder, f"{i}.jpg"), width=640, height=480,
                         segmentation=[outline], sentences=("the thing in the middle",))
                for i in range(photos)]
        dataset = data.TrainSet(refs, lambda texts, length: torch.zeros(1, length).long(),
                                config.image_size, config.length)
        times = []
        for epoch in range(rounds):
            begun = time.perf_counter()
            for i in range(photos):
                dataset[epoch, i]
            times.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return photos / statistics.median(times)


def show_speed(found, json_path):
    """Prints the benchmark's figures as Markdown, and writes them to `json_path`, if any."""
    print(f"{found['preset']}, {found['image_size']} pixels, {found['length']} tokens, batch "
          f"{found['batch']} ({found['micro_batch']} at once), {found['precision']}, "
          f"{found['device']}, {found['processes']} process(es) of {found['threads']} thread(s)\n")
    print(evaluate.table_row("", "s per image", "images/s", "GFLOP per image",
                             "share of the faster product"))
    print("|---|---:|---:|---:|---:|")
    for name in ("forward", "step"):
        row = found[name]
        print(evaluate.table_row(name, f"{row['seconds_per_image']:.4f}", row["images_per_s"],
                                 f"{row['gflop_per_image']:.1f}", f"{100 * row['share']:.0f}%"))
    side = found["product_side"]
    print(f"\nproduct of two {side}x{side} matrices: {found['product_gflops']:.0f} GFLOP/s a "
          f"process by PyTorch's matmul, {found['linear_gflops']:.0f} by backbones.linear"
          f"\npeak memory: {found['peak_memory_gb']:.2f} GB a process"
          f"\nloader: {found['loader_images_per_s']:.0f} JPEG photos of 640x480/s a process")
    if json_path:
        evaluate.save_json(found, json_path)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def divide_batch(batch, micro, world):
    """How many pieces, of how many samples, make one process's share of the global batch."""
    if batch % world:
        raise model.ConfigError(f"batch_size {batch} cannot be shared by {world} processes equally")
    local = batch // world
    micro = min(micro or local, local)
    if local % micro:
        raise model.ConfigError(f"--micro-batch {micro} does not divide a process's share of the "
                                f"batch, {local}")
    return local // micro, micro


def parse_arguments():
    parser = evaluate.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shapes", choices=model.PRESETS)
    parser.add_argument("--dataset", metavar="NAME",
                        help="refcoco, refcoco+, refcocog-umd, refcocog-google, mixed, shapes, "
                             "shapes-b or a folder of DATA (default of presets shapes*: shapes)")
    parser.add_argument("--out", metavar="DIR", help="default: runs/PRESET, numbered if it is used")
    parser.add_argument("--resume", nargs="?", const="must", choices=("auto", "must"),
                        help="go on with the run in OUT (default: the last runs/PRESET); auto: or "
                             "begin one if there is none. An --out that is given means auto")
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                        help="write last.pt also every so many steps of an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=0, metavar="N",
                        help="samples a process takes at once; gradients add up to the batch")
    parser.add_argument("--keep-leaks", action="store_true",
                        help="mixed: train also on photos of the val and test splits, as the "
                             "authors of DCRIS did")
    parser.add_argument("--init", metavar="CKPT",
                        help="take towers and vocabulary from this run on drawn data, and keep "
                             "the towers frozen (but for shapes-full); --resume asks for it again")
    parser.add_argument("--random-towers", action="store_true",
                        help="towers without their weights, e.g. to try out a machine")
    parser.add_argument("--bench", action="store_true",
                        help="time forward pass, step and loader instead of training")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the benchmark")
    parser.add_argument("--json", metavar="OUT.json", help="also write its figures here")
    evaluate.add_shared_arguments(parser, precision="auto")
    group = parser.add_argument_group("fields of the configuration",
                                      "default: the preset's; model.Config says what each is. "
                                      "A list of layers without a number switches adapters off, "
                                      "--milestones without one keeps the rate constant")
    types_of = typing.get_type_hints(model.Config)
    for name in (f.name for f in fields(model.Config)):
        kind, flag = types_of[name], "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif kind in (int, float, str):
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper())
        else:
            group.add_argument(flag, type=int, nargs="*", metavar="N")
    args = parser.parse_args()
    if args.workers < 0 or args.micro_batch < 0 or args.save_every < 0:
        parser.error("--workers, --micro-batch and --save-every are at least 0")
    if not 0 <= args.seed < 2**31:
        parser.error("--seed is from 0 to 2147483647")
    drawn = model.PRESETS[args.preset].text not in model.PUBLISHED
    args.dataset = args.dataset or ("shapes" if drawn else None)
    if args.init and (args.random_towers or args.vision_weights or args.text_weights
                      or args.vocabulary):
        parser.error("--init brings towers and vocabulary; leave --random-towers, "
                     "--vision-weights, --text-weights and --vocabulary away")
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    if args.bench and (args.out or args.resume or args.save_every):
        parser.error("--bench trains nothing; leave --out, --resume and --save-every away")
    if args.json is not None:
        if not args.bench:
            parser.error("--json is for --bench; a run writes log.jsonl")
        evaluate.check_outputs([], [Path(args.json)], [
            args.init, args.vision_weights, args.text_weights, args.vocabulary])
    if args.dataset is None and not args.bench:
        parser.error(f"--preset {args.preset} needs --dataset NAME")
    return args


def configuration(args, init):
    """The preset's configuration with the fields that were given.

    The length goes by the data. The towers of --init bring their names, and are frozen.
    """
    overrides = {f.name: getattr(args, f.name) for f in fields(model.Config)
                 if getattr(args, f.name) is not None}
    if args.dataset in data.LENGTHS:
        overrides.setdefault("length", data.LENGTHS[args.dataset])
    if init is not None:
        towers = init[1]["config"]
        overrides = {"vision": towers.vision, "text": towers.text, "train_towers": False,
                     **overrides}
    return model.configure(args.preset, **overrides)


def main():
    keep_memory()
    with evaluate.processes() as (rank, world, device):
        args = parse_arguments()
        init = load_init(args.init) if args.init else None
        if args.bench:
            return bench(args, configuration(args, init), rank, world, device)
        train(args, configuration(args, init), init, rank, world, device)


if __name__ == "__main__":
    evaluate.run(main)
