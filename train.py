"""The training run.

    torchrun train.py                                   drawn data, a small model, a laptop
    torchrun --nproc_per_node=2 train.py --preset dcris-b --data DATA --dataset refcoco
    torchrun --nproc_per_node=4 train.py --preset dcris-l --data DATA --dataset mixed
    torchrun train.py --preset shapes-lora --dataset shapes-b --init runs/shapes/best.pt
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --preset dcris-l --data DATA --dataset refcoco+

The batch size is global: the same command means the same training on any number of processes.
A run writes OUT/log.jsonl (one object an epoch), last.pt, best.pt (by mIoU on val), val.png,
curves.png, and TensorBoard's events where that is installed.
"""

import argparse
import contextlib
import json
import math
import sys
import time
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import model


# ---------------------------------------------------------------------------------------------
# The same training on any number of processes
# ---------------------------------------------------------------------------------------------

class GlobalBatches:
    """This process's share of every global batch, as lists of (epoch, index).

    One permutation an epoch, from seed and epoch alone, is cut into global batches; every process
    takes an equal slice of each, in pieces of `micro` samples. The incomplete last one is dropped.
    """

    def __init__(self, samples, batch, micro, rank, world, seed):
        self.samples, self.batch, self.micro, self.seed = samples, batch, micro, seed
        self.rank, self.local = rank, batch // world
        self.epoch = 1

    def __len__(self):
        return self.samples // self.batch * (self.local // self.micro)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, self.samples - self.batch + 1, self.batch):
            first = start + self.rank * self.local
            for i in range(first, first + self.local, self.micro):
                yield [(self.epoch, index) for index in order[i:i + self.micro]]


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes, and of its gradient on the way back."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return MeanOverProcesses.forward(ctx, gradient)


def synced_batch_norm(self, x):
    """The forward of a BatchNorm layer with statistics over all processes' equal batches.

    For CPUs, where PyTorch's SyncBatchNorm does not run.
    """
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight,
                                        self.bias, eps=self.eps)
    kind = x.dtype
    x = x if kind == torch.float64 else x.float()
    over = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = MeanOverProcesses.apply(x.mean(over))
    centred = x - mean.view(shape)
    variance = MeanOverProcesses.apply(centred.square().mean(over))
    with torch.no_grad():
        count = x.numel() // x.shape[1] * dist.get_world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
    scale = self.weight * (variance + self.eps).rsqrt()
    return (centred * scale.view(shape) + self.bias.view(shape)).to(kind)


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
    return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)


# ---------------------------------------------------------------------------------------------
# One epoch
# ---------------------------------------------------------------------------------------------

def train_epoch(net, optimizer, scaler, loader, pieces, device, dtype, bar):
    """Trains for an epoch; the mean loss over all samples and processes, and the skipped refs."""
    net.train()
    total, skipped = torch.zeros((), device=device), 0
    for step, batch in enumerate(loader, 1):
        images, tokens, masks = (batch[key].to(device, non_blocking=True)
                                 for key in ("image", "tokens", "mask"))
        skipped += int(batch["skipped"].sum())
        last_piece = step % pieces == 0
        # Gradients travel between processes only with the last piece of a global batch.
        alone = not last_piece and isinstance(net, DistributedDataParallel)
        with net.no_sync() if alone else contextlib.nullcontext():
            with evaluate.autocast(device, dtype):
                logits = net(data.normalise(images), tokens)
            loss = model.text_to_pixel_loss(logits, masks / 255)
            scaler.scale(loss / pieces).backward()
        total += loss.detach()
        if last_piece:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if bar.n % 10 == 0 and not bar.disable:     # reading the loss waits for the device
                bar.set_postfix(loss=f"{loss.item():.4f}")
    mean = total / step
    if dist.is_initialized():
        counts = torch.stack([mean, torch.tensor(float(skipped), device=device)])
        dist.all_reduce(counts)
        mean, skipped = counts[0] / dist.get_world_size(), int(counts[1])
    return mean.item(), skipped


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource             # not on Windows
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
    """The folder of this run: OUT, or the first free (resuming: the last used) runs/PRESET[-N]."""
    def used(folder):
        log = folder / "log.jsonl"
        return (folder / "last.pt").exists() or log.exists() and log.stat().st_size > 0

    if args.out:
        out = Path(args.out)
        if used(out) and not args.resume:
            raise FileExistsError(f"{out} holds a run already; --resume goes on with it, another "
                                  f"--out starts afresh")
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"{out} is a file; --out names a folder")
    else:
        names = [Path("runs", args.preset + (f"-{n}" if n > 1 else "")) for n in range(1, 10_000)]
        if args.resume:
            out = [names[0], *(name for name in names if (name / "last.pt").exists())][-1]
        else:
            out = next(name for name in names if not name.exists())
    if args.resume and not (out / "last.pt").exists():
        raise FileNotFoundError(f"{out / 'last.pt'}: no run to resume")
    return out


def draw_if_missing(args):
    if args.dataset in data.DOMAINS and not (Path(args.data) / args.dataset).exists():
        data.draw_shapes(args.data, name=args.dataset)


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


def describe_run(args, init, dtype):
    """What a checkpoint says of its run beside the configuration; resuming asks for the same."""
    return {"dataset": args.dataset, "seed": args.seed, "keep_leaks": args.keep_leaks,
            "skip_broken": args.skip_broken, "precision": str(dtype or torch.float32),
            "preset": args.preset, "init": init and model.sha256(init[0])}


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
    method = checkpoint["config"].get("method")
    if method in ("houlsby", "compacter", "lora"):
        raise model.ConfigError(f"{path}: its towers have the layers of {method} inside; --init "
                                f"takes those of a run such as runs/shapes/best.pt")
    return path, checkpoint


def load_model(args, config, init, run, out):
    """A fresh model and None, or the one to resume and its checkpoint."""
    torch.manual_seed(args.seed)
    if not args.resume:
        weights = (None, None) if init or args.random_towers else model.find_weights(
            config, args.vision_weights, args.text_weights)
        net = model.assemble(config, *weights, init)
        for kind, tower in (("vision", net.vision), ("text", net.text)):
            if tower.frozen and not (init or args.random_towers or net.sources[kind]):
                raise model.ConfigError(
                    f"preset {args.preset} keeps its {kind} tower as it is, but that comes from "
                    f"nowhere: --init CKPT takes it from a trained run such as runs/shapes/best.pt")
        return net, None
    path = out / "last.pt"
    checkpoint = model.read_checkpoint(path)
    if not {"epoch", "best", "optimizer", "scaler"} <= checkpoint.keys():
        raise model.WeightsError(f"{path}: not the last.pt of a run (epoch, best, optimizer, "
                                 f"scaler); a best.pt cannot be resumed")
    before = {**checkpoint["config"], **checkpoint["run"]}
    different = [f"{key} {before.get(key)} there, {value} here"
                 for key, value in {**asdict(config), **run}.items() if before.get(key) != value]
    if different:
        raise model.ConfigError(f"{path} is a checkpoint of another run: {'; '.join(different)}")
    return model.restore(path, checkpoint, args.vision_weights, args.text_weights), checkpoint


def train(args, config, init, rank, world, device):
    """The whole run of one process."""
    pieces, micro = divide_batch(config.batch_size, args.micro_batch, world)
    dtype = evaluate.precision_type(args.precision, device)
    run = describe_run(args, init, dtype)
    out = from_first(lambda: run_folder(args), rank, world)
    from_first(lambda: draw_if_missing(args), rank, world)
    tokenizer, train_set, val_set = load_data(args, config, init, rank)
    net, checkpoint = load_model(args, config, init, run, out)
    net.to(device)
    batches = GlobalBatches(len(train_set), config.batch_size, micro, rank, world, args.seed)
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=config.lr,
                                 fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    first, best = 1, -1.0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        first, best = checkpoint["epoch"] + 1, checkpoint["best"]
    parallel = distribute(net, world, device)
    kept = {"run": run, "vocabulary": {} if config.text in model.PUBLISHED else {
        "text": tokenizer.text}}
    log = Log(out, first) if rank == 0 else None

    for epoch in range(first, config.epochs + 1):
        begun = time.time()
        # Dropout, too, depends on seed, epoch and process alone, so a resumed run repeats it.
        torch.manual_seed((args.seed * 100_003 + epoch) * 1009 + rank)
        batches.epoch = epoch
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (0.1 if epoch > config.decay_epoch else 1)
        with tqdm(total=len(batches) // pieces, unit="step", disable=rank > 0,
                  desc=f"epoch {epoch}/{config.epochs}") as bar:
            loss, skipped = train_epoch(parallel, optimizer, scaler, loader, pieces, device, dtype,
                                        bar)
        trained = time.time() - begun
        if not math.isfinite(loss):
            raise model.ConfigError(f"the loss of epoch {epoch} is {loss}; nothing of it is saved, "
                                    f"{out} is as it was after epoch {epoch - 1}; try a lower --lr")
        table = evaluate.overlaps(net, val_set, device, dtype, config.batch_size, args.workers,
                                  rank, world, "validating")
        if rank > 0:
            continue
        found = evaluate.metrics(table)
        if skipped or len(table) < len(val_set):
            print(f"skipped {skipped} broken refs, {len(val_set) - len(table)} expressions of "
                  f"val", file=sys.stderr)
        log.add({"epoch": epoch, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
                 "miou": found["miou"], "oiou": found["oiou"], "p50": found["p50"],
                 "images_per_s": len(batches) * micro * world / trained,
                 "peak_memory_gb": peak_memory_gb(device), "seconds": time.time() - begun})
        kept["seconds"] = sum(len(batches) * micro * world / row["images_per_s"]
                              for row in log.rows)          # of training, without validation
        if found["miou"] > best:
            best = found["miou"]
            model.save(out / "best.pt", net, epoch=epoch, miou=best, **kept)
        model.save(out / "last.pt", net, epoch=epoch, best=best, optimizer=optimizer.state_dict(),
                   scaler=scaler.state_dict(), **kept)
        evaluate.save_picture(evaluate.panel(net, val_set, device, dtype), out / "val.png")
    if rank == 0:
        print(f"{out}: best mIoU on val {best:.2f}; best.pt, last.pt, log.jsonl, val.png, "
              f"curves.png")


class Log:
    """OUT/log.jsonl, one object an epoch, with curves.png and TensorBoard's events beside it."""

    def __init__(self, out, first_epoch):
        self.out, self.rows = out, []
        out.mkdir(parents=True, exist_ok=True)
        if first_epoch > 1:
            try:
                rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
                self.rows = [row for row in rows if row["epoch"] < first_epoch
                             and {"loss", "miou", "oiou", "images_per_s"} <= row.keys()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise data.DataError(f"{out / 'log.jsonl'}: damaged ({error}); mend or remove the "
                                     f"line") from None
        self.write()                # the folder is taken, and better now than later if it cannot be
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out))

    def write(self):
        with model.replacing(self.out / "log.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.rows)

    def add(self, row):
        self.rows.append(row)
        self.write()
        evaluate.save_picture(evaluate.curves(self.rows), self.out / "curves.png")
        tqdm.write(f"epoch {row['epoch']}: loss {row['loss']:.4f}, val mIoU {row['miou']:.2f}, "
                   f"oIoU {row['oiou']:.2f}, P@0.5 {row['p50']:.2f}, "
                   f"{row['images_per_s']:.0f} images/s, {row['seconds']:.0f} s")
        if self.board:
            for key, value in row.items():
                self.board.add_scalar(key, value, row["epoch"])
            self.board.flush()


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shapes", choices=model.PRESETS)
    parser.add_argument("--dataset", metavar="NAME",
                        help="refcoco, refcoco+, refcocog-umd, refcocog-google, mixed, shapes, "
                             "shapes-b or a folder of DATA (default of presets shapes*: shapes)")
    parser.add_argument("--out", metavar="DIR", help="default: runs/PRESET, numbered if it is used")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
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
    evaluate.add_shared_arguments(parser)
    group = parser.add_argument_group("fields of the configuration",
                                      "default: the preset's; model.Config says what each is")
    types_of = typing.get_type_hints(model.Config)
    for field in fields(model.Config):
        kind = types_of[field.name]
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif kind in (int, float, str):
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper())
        else:
            group.add_argument(flag, type=int, nargs="*", metavar="N")
    args = parser.parse_args()
    if args.workers < 0 or args.micro_batch < 0:
        parser.error("--workers and --micro-batch are at least 0")
    if not 0 <= args.seed < 2**31:
        parser.error("--seed is from 0 to 2147483647")
    drawn = model.PRESETS[args.preset].text not in model.PUBLISHED
    args.dataset = args.dataset or ("shapes" if drawn else None)
    if args.init and (args.random_towers or args.vision_weights or args.text_weights
                      or args.vocabulary):
        parser.error("--init brings towers and vocabulary; leave --random-towers and their files "
                     "away")
    if args.dataset is None:
        parser.error(f"--preset {args.preset} needs --dataset NAME")
    return args


def configuration(args, init):
    """The preset's configuration with the fields that were given.

    The length goes by the data. The towers of --init bring their names, and are frozen.
    """
    overrides = {field.name: getattr(args, field.name) for field in fields(model.Config)
                 if getattr(args, field.name) is not None}
    overrides = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in overrides.items()}
    if args.dataset in data.LENGTHS:
        overrides.setdefault("length", data.LENGTHS[args.dataset])
    if init is not None:
        towers = model.restore_config(init[0], init[1]["config"])
        overrides = {"vision": towers.vision, "text": towers.text, "train_towers": False,
                     **overrides}
    return model.configure(args.preset, **overrides)


def main():
    args = parse_arguments()
    init = load_init(args.init) if args.init else None
    config = configuration(args, init)
    with evaluate.processes() as (rank, world, device):
        train(args, config, init, rank, world, device)


if __name__ == "__main__":
    evaluate.run(main)
