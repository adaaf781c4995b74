"""Training, and a benchmark of its speed.

    torchrun train.py                                   drawn data, a small model, a laptop
    torchrun --nproc_per_node=2 train.py --preset dcris-b --data DATA --dataset refcoco
    torchrun train.py --preset shapes-lora --dataset shapes-b --init runs/shapes/best.pt
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --preset dcris-l --data DATA --dataset mixed
    python train.py --bench --preset dcris-b --batch-size 2         how fast is this machine?

The batch size is global: the same command means the same training on any number of processes, but
for dropout's random numbers (and, with --micro-batch, the samples in a batch norm's statistics).

The folder OUT (default: runs/PRESET) is the run. It holds log.jsonl (one object an epoch), last.pt,
best.pt (by mIoU on val) and val.png. The same command continues a stopped run from last.pt, and
ends with the weights of an undisturbed run (up to rounding on GPUs). SIGTERM and Ctrl-C stop the
run after the step (on GPUs after at most ten more) or validation, and save it. Twice, they end it.
"""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils import benchmark
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import backbones
import data
import evaluate
import loss
import model


# ---- One step, one epoch --------------------------------------------------------------------

@dataclass
class Progress:
    """How far a run is. A checkpoint holds it, so that the run continues exactly there."""
    epoch: int = 1              # the current epoch
    step: int = 0               # its steps that are done
    loss: float = 0.0           # the sum of their losses
    seconds: float = 0.0        # time that the steps took
    rows: list = field(default_factory=list)        # of log.jsonl


class Trainer:
    """A model, its optimizer and its progress."""

    def __init__(self, net, batches, device, dtype, compiled=False, path=None, metadata=None):
        self.net, self.batches, self.device, self.dtype = net, batches, device, dtype
        self.seed, self.rank, self.world = batches.seed, batches.rank, batches.world
        self.path, self.metadata = path, metadata       # of last.pt
        learned = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, fused=True)
        # Small gradients vanish in float16: it scales the loss, and skips steps that overflow.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        # The compiled module shares its parameters with `net`, which keeps their names.
        self.parallel = distribute(torch.compile(net) if compiled else net, self.world, device)
        self.progress = Progress()
        self.unread, self.refs = 0.0, []        # sum of losses, and refs, since `read`

    def step(self, samples):
        """One optimization step on the next `micro_batches` that a loader's iterator gives."""
        progress, micro_batches = self.progress, self.batches.micro_batches
        # Dropout depends on the place in the run and the process, so a resumed run repeats it.
        torch.manual_seed((self.seed * 100_003 + progress.epoch) * 1009 + self.rank
                          + 104_729 * progress.step)
        for i in range(micro_batches):
            batch = next(samples)
            images, tokens, masks = (batch[key].to(self.device, non_blocking=True)
                                     for key in ("image", "tokens", "mask"))
            # Gradients are averaged over processes only once, after the last micro-batch.
            local = self.world > 1 and i + 1 < micro_batches
            with self.parallel.no_sync() if local else contextlib.nullcontext():
                with evaluate.autocast(self.device, self.dtype):
                    logits = self.parallel(data.normalise(images), tokens)      # (B, 1, h, w)
                value = loss.text_to_pixel_loss(logits, masks / 255, self.net.config.exact_masks)
                share = value / micro_batches
                self.scaler.scale(share).backward()
            self.unread += share.detach().double() / self.world
            self.refs += batch["ref"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1

    def rate(self):
        """The learning rate: it rises for `warmup` steps; each milestone divides it by 10."""
        config, progress = self.net.config, self.progress
        step = (progress.epoch - 1) * self.batches.steps + progress.step + 1
        falls = sum(progress.epoch > end for end in config.milestones)
        return config.lr * min(1, step / max(1, config.warmup)) * 0.1 ** falls

    def read(self, received=()):
        """Adds up the losses of the steps since the last call, for which it waits for the device.

        received: the signals that this process got. Returns whether any process got one, the same
        in all of them. Raises ConfigError if a loss is not finite.
        """
        numbers = torch.stack([self.unread, torch.full_like(self.unread, len(received))])
        if self.world > 1:
            dist.all_reduce(numbers)
        value, signals = numbers.tolist()
        if not math.isfinite(value):
            refs = sum(evaluate.from_all(self.refs, self.world), [])
            raise model.ConfigError(
                f"the loss is {value} in epoch {self.progress.epoch} with refs {', '.join(refs)}; "
                f"{self.path}, if saved, is from before; try a lower --lr in another --out")
        self.progress.loss += value
        self.unread, self.refs = 0.0, []
        return signals > 0

    def epoch(self, loader, save_every, received, name):
        """Trains to the end of the current epoch, from the step where the progress is.

        Saves at the end and every `save_every` steps. SystemExit, saved, if a process got a signal.
        """
        progress, steps = self.progress, self.batches.steps
        self.batches.epoch, self.batches.step = progress.epoch, progress.step
        read_every = 1 if self.device.type == "cpu" else 10         # reading makes a GPU idle
        stop = False
        begun = time.monotonic() - progress.seconds
        self.net.train()
        with tqdm(initial=progress.step, total=steps, unit="step", desc=name,
                  disable=self.rank > 0) as bar:
            samples = iter(loader)      # its processes know the bar, above which they write
            while progress.step < steps and not stop:
                self.step(samples)
                bar.update()
                to_save = progress.step == steps or save_every and progress.step % save_every == 0
                if to_save or progress.step % read_every == 0:
                    stop = self.read(received)
                    progress.seconds = time.monotonic() - begun
                    bar.set_postfix(loss=f"{progress.loss / progress.step:.4f}", refresh=False)
                if to_save or stop:
                    self.save()
        del samples                     # ends its processes
        if stop:
            if self.world > 1:
                dist.barrier()          # no process leaves before the first has saved
            sys.exit(128 + (received or [signal.SIGTERM])[0])

    def save(self):
        """Writes last.pt, from which `restore` continues. Raises OSError."""
        if self.rank == 0:
            model.save(self.path, self.net, **self.metadata, progress=asdict(self.progress),
                       optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def restore(self, checkpoint):
        """Continues where `save` wrote this checkpoint."""
        self.progress = Progress(**checkpoint["progress"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])


# ---- The run --------------------------------------------------------------------------------

def train(args, config, init, rank, world, device):
    """The whole run, in each process. `init`: (path, checkpoint) of --init, or None."""
    started, dtype = time.monotonic(), evaluate.precision_type(args.precision, device)
    out = Path(args.out or f"runs/{args.preset}")
    if rank == 0:
        lock_folder(out)
    tokenizer, train_set, val_set = load_data(args, config, init, rank, world)
    batches = GlobalBatches(len(train_set), config.batch_size, args.micro_batch, rank, world,
                            args.seed)
    run = {"preset": args.preset, "dataset": args.dataset, "refs": len(train_set),
           "first_refs": args.refs, "keep_leaks": args.keep_leaks, "skip_broken": args.skip_broken,
           "seed": args.seed, "precision": str(dtype or torch.float32), "compile": args.compile,
           "init": init and model.sha256(init[0]), "random_towers": args.random_towers,
           "vocabulary": hashlib.sha256(tokenizer.text.encode()).hexdigest()}
    vocabulary = {} if config.text in model.PUBLISHED else {"text": tokenizer.text}
    metadata = {"run": run, "vocabulary": vocabulary}
    last, checkpoint = out / "last.pt", None
    if last.exists():
        checkpoint = read_same_run(last, config, run)
        net = model.load(last, args.vision_weights, args.text_weights, checkpoint)
    else:
        torch.manual_seed(args.seed)
        net = model.build(config, *tower_files(args, config, init), init=init)
    trainer = Trainer(net.to(device), batches, device, dtype, args.compile, last, metadata)
    if checkpoint:
        trainer.restore(checkpoint)
        del checkpoint                  # frees the second copy of weights and optimizer
    seen = evaluate.from_all((config, run, trainer.progress), world)
    model.require(seen == seen[:1] * world, f"the processes differ in their command, their data or "
                                            f"{last}; all machines must share --data and --out")
    loader = DataLoader(
        train_set, batch_sampler=batches, num_workers=args.workers,
        pin_memory=device.type == "cuda", worker_init_fn=data.leave_signals_to_parent)
    progress, received = trainer.progress, catch_signals()
    for epoch in range(progress.epoch, config.epochs + 1):
        trainer.epoch(loader, args.save_every, received, f"epoch {epoch}/{config.epochs}")
        begun = time.monotonic()
        # As evaluate.py does it: in single precision, 16 photos at once.
        table = evaluate.overlaps(net, val_set, device, workers=args.workers, rank=rank,
                                  world=world, name="validating")
        found = evaluate.metrics(table)
        row = {"epoch": epoch, "loss": progress.loss / progress.step, "lr": trainer.rate(),
               "miou": found["miou"], "oiou": found["oiou"], "p50": found["p50"],
               "images_per_s": progress.step * config.batch_size / progress.seconds,
               "peak_memory_gb": peak_memory_gb(device),
               "seconds": progress.seconds + time.monotonic() - begun}
        rows = [*progress.rows, row]
        metadata["seconds"] = sum(row["seconds"] for row in rows)
        # last.pt is written last: a run that is killed before repeats the validation.
        if rank == 0:
            if found["miou"] > max((row["miou"] for row in progress.rows), default=-1):
                model.save(out / "best.pt", net, epoch=epoch, miou=found["miou"], **metadata)
            show_epoch(out, rows)
            examples = evaluate.panel([(args.preset, net, val_set)], [table], device)
            evaluate.save_picture(examples, out / "val.png")
        trainer.progress = progress = Progress(epoch + 1, rows=rows)
        trainer.save()
    if rank == 0:
        best = max(row["miou"] for row in progress.rows)
        print(f"{out}: finished after epoch {config.epochs}, best mIoU on val {best:.2f}, "
              f"in {time.monotonic() - started:.0f} s; --out DIR starts another run")


def tower_files(args, config, init):
    """The towers' files, at the start of a run. ConfigError for a frozen tower without weights."""
    if init or args.random_towers:
        return None, None
    files = (model.find_published(config.vision, args.vision_weights),
             model.find_published(config.text, args.text_weights))
    model.require(None not in files or config.towers_learn,
                  f"preset {args.preset} freezes its towers, but there is no file of one: --init "
                  f"CKPT takes both from a trained run such as runs/shapes/best.pt")
    return files


def load_data(args, config, init, rank, world):
    """The tokenizer, the training samples, and the expressions of val. Draws a missing drawn set.

    The vocabulary is CLIP's for a published text tower, that of the run in --init, or else the
    data set's. Raises ConfigError, DataError, OSError.
    """
    folder = Path(args.data, args.dataset)
    if rank == 0 and args.dataset in data.DOMAINS and not folder.exists():
        data.draw_shapes(args.data, name=args.dataset)
    if world > 1:
        dist.barrier()
    vocabulary = args.vocabulary or folder / "merges.txt"
    if init:
        vocabulary = init[1]["vocabulary"]["text"].encode()
    elif config.text in model.PUBLISHED:
        vocabulary = model.find_published("vocabulary", args.vocabulary)
    refs, broken = data.read_split(args.data, args.dataset, "train", args.skip_broken,
                                   args.keep_leaks)
    val_refs, _ = data.read_split(args.data, args.dataset, "val", args.skip_broken)
    tokenizer = evaluate.make_tokenizer(vocabulary, config)     # after a wrong --dataset was named
    refs = [*itertools.islice(itertools.cycle(refs[:args.refs or None]), len(refs))]
    if broken and rank == 0:
        print(f"{broken} broken entries left out of all splits", file=sys.stderr)
    size = config.image_size, config.length
    return (tokenizer, data.TrainSet(refs, tokenizer, *size, args.seed, args.skip_broken),
            data.ExpressionSet(val_refs, tokenizer, *size, args.skip_broken))


# ---- The same training on any number of processes -------------------------------------------

class GlobalBatches:
    """This process's share of every global batch, as lists of (epoch, index).

    One permutation an epoch, from seed and epoch alone, is cut into global batches; every process
    takes an equal slice of each, in `micro_batches` of `micro` samples. The incomplete last batch
    is dropped. Before each pass set `epoch`, and `step`, the number of batches to leave out.
    """

    def __init__(self, samples, batch, micro, rank, world, seed):
        local = batch // world
        self.micro = micro if 0 < micro < local else local
        model.require(samples >= batch and not (batch % world or local % self.micro),
                      f"batch_size {batch} is more than the {samples} refs, or cannot be divided "
                      f"into equal shares of {world} process(es), each in micro-batches of "
                      f"{self.micro}; change --batch-size or --micro-batch")
        self.samples, self.batch, self.local, self.seed = samples, batch, local, seed
        self.rank, self.world, self.micro_batches = rank, world, local // self.micro
        self.steps = samples // batch           # of an epoch
        self.epoch, self.step = 1, 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for step in range(self.step, self.steps):
            first = step * self.batch + self.rank * self.local
            for i in range(first, first + self.local, self.micro):
                yield [(self.epoch, index) for index in order[i:i + self.micro]]


def distribute(net, world, device):
    """The model with gradients averaged, and batch statistics taken, over all processes."""
    if world == 1:
        return net
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.forward = functools.partial(batch_norm_over_processes, layer)
    # Strides of dimensions of size one have no meaning, but DDP warns of them.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)    # gradients are stored once


def batch_norm_over_processes(layer, x):
    """Batch normalisation of x (B, C, ...) with statistics over all processes' equal batches.

    PyTorch's own SyncBatchNorm does not run on CPUs, and makes a program wait for GPUs. Here mean
    and mean square are summed over processes in one exchange, and so are their gradients in the
    backward pass. Their difference is exact enough: means are within 6 standard deviations of 0.
    """
    if not layer.training:
        return type(layer).forward(layer, x)
    wide = (x if x.dtype == torch.float64 else x.float()).movedim(1, -1)        # (B, ..., C)
    others = [*range(x.ndim - 1)]
    local = torch.stack([wide.mean(others), wide.square().mean(others)])        # (2, C)
    mean, square = all_reduce(local, "sum", dist.group.WORLD) / dist.get_world_size()
    variance = (square - mean.square()).clamp(min=0)
    with torch.no_grad():
        count = x.numel() // x.shape[1] * dist.get_world_size()
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * count / (count - 1), layer.momentum)
        layer.num_batches_tracked += 1
    scale = layer.weight * (variance + layer.eps).rsqrt()
    shift = layer.bias - mean * scale
    return torch.addcmul(shift, wide, scale).movedim(-1, 1).to(x.dtype)


# ---- Folder, resume, log --------------------------------------------------------------------

def lock_folder(out):
    """Makes the folder OUT and keeps other runs out of it until this process ends. OSError."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)       # stays open
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OSError(f"{out}: another run is writing there; choose another --out") from None
    except OSError:                             # a file system without locks
        pass


def read_same_run(path, config, run):
    """The checkpoint last.pt. Raises ConfigError if it is of another run, WeightsError, OSError."""
    checkpoint = model.read_checkpoint(path)
    model.require("progress" in checkpoint, f"{path}: not a last.pt, from which a run continues")
    before = {**asdict(checkpoint["config"]), **checkpoint["run"]}
    different = [f"{key} {before.get(key)} there, {value} here"
                 for key, value in {**asdict(config), **run}.items() if before.get(key) != value]
    model.require(not different, f"{path} is of another run: {'; '.join(different)}; --out DIR "
                                 f"starts a new run")
    return checkpoint


def catch_signals():
    """A list to which SIGTERM and SIGINT are added. A second later, another ends the process."""
    received = []

    def note(number, frame):
        received.append(number)
        time.sleep(1)           # a scheduler signals all processes, and torchrun passes it on
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


def show_epoch(out, rows):
    """Writes log.jsonl, and prints the last row."""
    with model.replacing(out / "log.jsonl") as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    tqdm.write("epoch {epoch}: loss {loss:.4f}, val mIoU {miou:.2f}, oIoU {oiou:.2f}, "
               "P@0.5 {p50:.2f}, {images_per_s:.0f} images/s, {seconds:.0f} s".format(**rows[-1]))


# ---- Command line ---------------------------------------------------------------------------

def parse_arguments():
    parser = evaluate.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="shapes", choices=model.PRESETS)
    add("--dataset", metavar="NAME",
        help="refcoco, refcoco+, refcocog-umd, refcocog-google, mixed, shapes, shapes-b or a "
             "folder of DATA (default of presets shapes*: shapes)")
    add("--out", metavar="DIR", help="the run's folder (default: runs/PRESET)")
    add("--save-every", type=int, default=0, metavar="STEPS", help="save within epochs, too")
    add("--seed", type=int, default=0)
    add("--refs", type=int, default=0, metavar="N",
        help="train on the first N refs; an epoch keeps its steps, so each ref comes more often")
    add("--micro-batch", type=int, default=0, metavar="N",
        help="samples a process takes at once, also in batch norms; gradients add up to the batch")
    add("--keep-leaks", action="store_true",
        help="mixed: train also on photos of the val and test splits, as DETRIS does")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--init", metavar="CKPT", help="take towers and vocabulary from this run on drawn data, "
                                          "and freeze the towers (but for shapes-full)")
    either("--random-towers", action="store_true", help="towers without weights, to try a machine")
    add("--compile", action="store_true", help="compile the model (minutes): faster steps on GPUs")
    add("--bench", action="store_true", help="time forward pass and step; train nothing")
    evaluate.add_shared_arguments(parser, precision="auto")
    group = parser.add_argument_group("fields of the configuration", "default: the preset's; see "
                                      "model.Config. A list without a number is empty")
    for entry in fields(model.Config):
        options = ({"action": argparse.BooleanOptionalAction} if entry.type is bool else
                   {"type": entry.type} if entry.type in (int, float, str) else
                   {"type": int, "nargs": "*"})
        group.add_argument("--" + entry.name.replace("_", "-"), **options)
    args = parser.parse_args()
    if args.dataset is None and model.PRESETS[args.preset].text not in model.PUBLISHED:
        args.dataset = "shapes"
    if args.dataset is None and not args.bench:
        parser.error(f"--preset {args.preset} needs --dataset NAME")
    if args.init and (args.vision_weights or args.text_weights or args.vocabulary):
        parser.error("--init brings towers and vocabulary; leave the options for files away")
    return args


def configuration(args, init):
    """The preset's configuration with the fields that were given. Raises ConfigError.

    The length depends on the data set. The towers of `init` bring their names, and are frozen.
    """
    given = {name: value for name, value in vars(args).items()
             if hasattr(model.Config, name) and value is not None}
    given.setdefault("length", model.usual_length(model.PRESETS[args.preset], args.dataset))
    if init:
        path, checkpoint = init
        model.require("text" in checkpoint["vocabulary"],
                      f"{path}: not a run on drawn data; --init takes the towers and the "
                      f"vocabulary of one, such as runs/shapes/best.pt")
        towers = checkpoint["config"]
        given = {"vision": towers.vision, "text": towers.text, "train_towers": False, **given}
    return model.configure(args.preset, **given)


def main():
    keep_memory()
    with evaluate.processes() as (rank, world, device):
        args = parse_arguments()
        init = (args.init, model.read_checkpoint(args.init)) if args.init else None
        action = bench if args.bench else train
        action(args, configuration(args, init), init, rank, world, device)


# ---- The benchmark, and memory --------------------------------------------------------------

def bench(args, config, init, rank, world, device):
    """Prints a table of speed, arithmetic and memory, measured on random numbers.

    Times are the first process's means of five calls, made while all processes work.
    """
    dtype = evaluate.precision_type(args.precision, device)
    batches = GlobalBatches(config.batch_size, config.batch_size, args.micro_batch, rank, world, 0)
    trainer = Trainer(model.build(config).to(device), batches, device, dtype, args.compile)
    batch, threads = random_batch(config, batches.micro, device), torch.get_num_threads()

    def forward():
        trainer.net.eval()
        with torch.no_grad(), evaluate.autocast(device, dtype):
            trainer.parallel(data.normalise(batch["image"]), batch["tokens"])

    def step():
        trainer.net.train()
        trainer.step(iter([batch] * batches.micro_batches))

    def seconds(action, calls=5):
        timer = benchmark.Timer("action()", globals={"action": action}, num_threads=threads)
        return timer.timeit(calls).mean             # after two calls; waits for a GPU

    samples = {forward: batches.micro, step: batches.local}
    times = {action: seconds(action) for action in samples}
    memory = peak_memory_gb(device)
    # Many CPUs take minutes for a large product in half precision. A GPU is slow at the first few.
    side, calls = (4096, 500) if device.type == "cuda" else (512 if dtype else 4096, 5)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = 2e-9 * side**3 / seconds(lambda: backbones.linear(left, right), calls)
    gflop = {action: count_gflop(action, device) for action in samples}
    if rank == 0:
        print(f"{args.preset}, batch {config.batch_size}, {dtype or torch.float32}, {device.type}, "
              f"{world} process(es) of {threads} thread(s), {memory:.4g} GB of memory each\n\n"
              f"| | images/s | GFLOP per image | share of a product's {product:.4g} GFLOP/s |\n"
              f"|---|---:|---:|---:|")
        for action, count in samples.items():
            print(f"| {action.__name__} | {count * world / times[action]:.4g} | "
                  f"{gflop[action] / count:.4g} | {gflop[action] / times[action] / product:.1%} |")


def count_gflop(action, device):
    """The multiplications plus additions, in billions, that PyTorch counts in a call."""
    warnings.filterwarnings("ignore", "Using `torch.compile")       # about the counter's hooks
    # The counter does not know oneDNN's linear layer (given two shapes) or CPUs' fused attention.
    counts = {backbones.ONEDNN_LINEAR: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with plain, torch.compiler.set_stance("force_eager"), FlopCounterMode(
            display=False, custom_mapping=counts) as counter:
        action()
    return counter.get_total_flops() / 1e9


def random_batch(config, samples, device):
    """A batch as the loader makes them, of random numbers, on the device."""
    size, end = config.image_size, model.TEXT[config.text].vocabulary - 1
    tokens = torch.randint(1, end, (samples, config.length), device=device)
    tokens[:, -1] = end
    image = torch.randint(256, (samples, 3, size, size), device=device).byte()
    return {"image": image, "tokens": tokens, "mask": image[:, :1], "ref": samples * ["random"]}


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_memory():
    """Makes glibc keep freed memory: to get pages from the system again costs up to a third of a
    step on CPUs. The price: the process never shrinks."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)        # glibc alone has it
    mallopt(-1, -1)         # M_TRIM_THRESHOLD: keep any amount
    mallopt(-4, 0)          # M_MMAP_MAX: no block gets its own pages


if __name__ == "__main__":
    evaluate.run(main)
