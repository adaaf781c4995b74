"""Metrics, pictures, and the mask of one thing in one photo.

    python evaluate.py --ckpt runs/shapes/best.pt
    python evaluate.py --ckpt best.pt --data DATA --dataset refcoco --split val testA testB
    python evaluate.py --ckpt best.pt --image photo.jpg --text "the left cat" --output cat.png
    torchrun --nproc_per_node=2 evaluate.py --ckpt best.pt ...

All figures are percentages. IoU is taken per expression, at the photo's own size. mIoU is the mean
over expressions, which CRIS, ETRIS, BarLeRIa and DCRIS print as "IoU"; oIoU is the sum of all
intersections over the sum of all unions, which LAVT and later papers print. P@0.5 is the share of
expressions whose IoU is above 0.5. They differ by several points: compare like with like.

From logits to figures, step by step as in the released programs of CRIS, ETRIS and DETRIS:

1. sigmoid, in single precision;
2. bicubic interpolation from the logits' side s to the letterbox's side S, corner on corner
   (align_corners=True). Pixel i of the logits comes to i * (S - 1) / (s - 1), while in training it
   answered for i * S / s (`loss`), so a mask drifts by up to a pixel of the logits towards the
   lower right. Kept, as every published figure contains it;
3. bicubic interpolation from the square to the photo (`data.unletterbox`), as cv2.warpAffine does;
4. a pixel above 0.35 belongs to the mask;
5. intersection and union with the annotation at the photo's own size. They add 1e-6 to the union,
   and read the annotation from a PNG that was made of the same polygons beforehand.

Photos come to the square by the same function in the other direction (`data.letterbox`), and the
figures are computed in single precision, on GPUs too, unless --precision says otherwise.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model

THRESHOLD = 0.35                    # of the probability, as in the authors' programs
EXPECTED = (model.WeightsError, model.ConfigError, data.DataError, OSError)     # one line is enough
PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------

def probabilities(net, images, tokens, device, dtype):
    """Images, uint8 (B, 3, S, S), and token ids (B, L) to probabilities (B, S, S), in [0, 1]."""
    with torch.inference_mode(), autocast(device, dtype):
        logits = net(data.normalise(images.to(device)), tokens.to(device))
    return torch.nn.functional.interpolate(
        logits.float().sigmoid(), images.shape[-2:], mode="bicubic", align_corners=True)[:, 0]


def overlaps(net, dataset, device, dtype=None, batch_size=16, workers=0, rank=0, world=1,
             name="evaluating"):
    """Intersection and union of every expression: int64 (expressions, 3) with its index first.

    Whole batches are dealt to the processes in turn. So every expression counts exactly once, and
    in the same batch, however many share the work. All processes get the full table.
    """
    net.eval()
    batches = [range(i, min(i + batch_size, len(dataset)))
               for i in range(0, len(dataset), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches[rank::world], num_workers=workers,
                        collate_fn=collate)
    rows = []
    for batch in tqdm(loader, desc=name, unit="batch", leave=False, disable=rank > 0):
        if batch is None:
            continue
        maps = probabilities(net, batch["image"], batch["tokens"], device, dtype)
        for index, square, truth in zip(batch["index"], maps, batch["mask"]):
            truth = truth.to(device)
            predicted = data.unletterbox(square, *truth.shape[::-1]) > THRESHOLD
            rows.append((index, int((predicted & truth).sum()), int((predicted | truth).sum())))
    rows = [row for part in from_all(rows, world) for row in part]
    return np.array(sorted(rows), dtype=np.int64).reshape(-1, 3)


def collate(samples):
    """Photos have sizes of their own, so their masks stay a list."""
    samples = [sample for sample in samples if sample is not None]
    return {key: [s[key] for s in samples] if key in ("mask", "index") else
            torch.stack([s[key] for s in samples])
            for key in samples[0]} if samples else None


def metrics(table):
    """mIoU, oIoU and P@0.5 to P@0.9, percent, and the number of expressions, of `overlaps`."""
    _, intersections, unions = table.T
    if not len(table):
        raise data.DataError("no expression could be evaluated: every photo is broken")
    ious = intersections / unions
    return {"miou": 100 * float(ious.mean()),
            "oiou": 100 * float(intersections.sum() / unions.sum()),
            **{f"p{round(100 * p)}": 100 * float((ious > p).mean()) for p in PRECISIONS},
            "expressions": len(table)}


# ---------------------------------------------------------------------------------------------
# One photo
# ---------------------------------------------------------------------------------------------

def predict(net, tokenizer, photo, text, device, dtype=None):
    """The mask (bool, numpy) of what `text` means in an RGB photo, at the photo's own size.

    `device`, a torch.device, is the one that `net` is on.
    """
    if not data.clean(text):
        raise data.DataError("the expression is empty; say which thing is meant")
    net.eval()
    tokens, most = len(tokenizer.encode(text)), net.config.length - 2
    if tokens > most:
        print(f"the expression has {tokens} tokens, of which {most} are read",
              file=sys.stderr)
    image = data.letterbox(photo, net.config.image_size)
    square = probabilities(net, image[None], tokenizer([text], net.config.length), device, dtype)[0]
    return (data.unletterbox(square, *photo.size) > THRESHOLD).cpu().numpy()


def predict_one(args, device, dtype):
    """--image and --text: one photo, one sentence, one mask."""
    photo = data.read_photo(args.image, upright=True)
    net, tokenizer, _ = load_checkpoint(args.ckpt[0], args, device)
    mask = predict(net, tokenizer, photo, args.text, device, dtype)
    output = Path(args.output)
    plain = mask_path(output)
    save_picture(singled_out(photo, mask), output)
    save_picture(Image.fromarray(mask.astype(np.uint8) * 255), plain)
    print(f"{output}: the photo with its mask; {plain}: the mask alone, {photo.width}x"
          f"{photo.height}, {100 * mask.mean():.1f}% of the pixels")


def mask_path(output):
    """Where the plain mask goes that belongs to the picture OUTPUT."""
    return output.with_name(f"{output.stem}-mask.png")


# ---------------------------------------------------------------------------------------------
# Whole splits, and the table of their figures
# ---------------------------------------------------------------------------------------------

def evaluate_all(args, rank, world, device, dtype):
    """Evaluates all checkpoints. What is done when one of them fails is reported nevertheless."""
    results, about = {}, {}
    try:
        evaluate_each(args, rank, world, device, dtype, results, about)
    finally:
        if rank == 0 and results:
            report(results, about, args.json)


def evaluate_each(args, rank, world, device, dtype, results, about):
    """Fills {checkpoint: {split: metrics}} and {checkpoint: facts for the table}."""
    for path in args.ckpt:
        net, tokenizer, facts = load_checkpoint(path, args, device)
        name = args.dataset or facts["dataset"]
        if name is None:
            raise data.DataError(f"{path} does not say what it was trained on; add --dataset NAME")
        if name == "mixed":
            raise data.DataError("mixed is for training; evaluate on one of its parts: --dataset "
                                 + ", ".join(data.MIXED))
        about[str(path)] = facts
        splits = dict.fromkeys(
            args.split or data.held_out_splits(args.data, name, args.skip_broken))
        for place, split in enumerate(splits):
            refs, broken = data.read_split(args.data, name, split, args.skip_broken)
            # Released checkpoints do not say how many tokens they read: as usual for the data.
            usual = data.LENGTHS.get(name, 17) if facts["released"] else net.config.length
            length = args.length or usual
            dataset = data.ExpressionSet(refs, tokenizer, net.config.image_size, length,
                                         args.skip_broken)
            table = overlaps(net, dataset, device, dtype, args.batch_size, args.workers, rank,
                             world, f"{name} {split}")
            results.setdefault(str(path), {})[split] = metrics(table)
            if (broken or len(table) < len(dataset)) and rank == 0:
                print(f"{name}: {broken} broken entries left out of all splits, and of {split} "
                      f"{len(dataset) - len(table)} expressions whose photo or mask is broken",
                      file=sys.stderr)
            if args.panel and place == 0 and rank == 0:
                save_picture(panel(net, dataset, device, dtype), args.panel)


def report(results, about, json_path):
    """Prints the Markdown table, and writes {checkpoint: {split: metrics}}."""
    print(table_row("checkpoint", "preset", "tuned", "split", "expressions", "mIoU", "oIoU",
                    *(f"P@{p}" for p in PRECISIONS), "trained for"))
    print("|---|---|---:|---|" + "---:|" * (4 + len(PRECISIONS)))
    for path, splits in results.items():
        facts = about[path]
        for split, found in splits.items():
            print(table_row(path, facts["preset"], f"{facts['tuned']:,}", split,
                            found["expressions"], found["miou"], found["oiou"],
                            *(found[f"p{round(100 * p)}"] for p in PRECISIONS),
                            "" if facts["seconds"] is None else f"{facts['seconds']:.0f} s"))
    if json_path:
        save_json(results, json_path)


def load_checkpoint(path, args, device):
    """The model of a checkpoint, its tokenizer, and facts for the table.

    The facts: preset, tuned (how many parameters), dataset it was trained on, seconds of training.
    """
    checkpoint = model.read_checkpoint(path)
    net = model.load(path, args.vision_weights, args.text_weights, checkpoint).to(device)
    text = checkpoint["vocabulary"].get("text")
    vocabulary = (model.find_published("vocabulary", args.vocabulary)
                  if args.vocabulary or text is None else text.encode())
    released = "released" in checkpoint
    facts = {"preset": checkpoint["run"].get("preset", "released " * released + net.config.method),
             "released": released,
             "tuned": model.count(net)["tuned"], "dataset": checkpoint["run"].get("dataset"),
             "seconds": checkpoint.get("seconds")}
    return net, make_tokenizer(vocabulary, net.config), facts


def make_tokenizer(vocabulary, config):
    """The tokenizer of a file (or its bytes). ConfigError where the text tower knows fewer ids."""
    tokenizer = data.Tokenizer(vocabulary)
    if tokenizer.size > model.TEXT[config.text].vocabulary:
        name = "the vocabulary" if isinstance(vocabulary, bytes) else vocabulary
        raise model.ConfigError(f"{name} has {tokenizer.size} entries, more than the text tower "
                                f"{config.text} knows")
    return tokenizer


def table_row(*cells):
    return "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"


def save_json(figures, path):
    with model.replacing(path) as file:
        file.write(json.dumps(figures, indent=1).encode())


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

def panel(net, dataset, device, dtype=None, examples=8, columns=2, tile=180):
    """A picture of examples, evenly spaced over the data set: photo, truth, prediction."""
    places = sorted({round(i * (len(dataset) - 1) / max(1, examples - 1)) for i in range(examples)})
    cells = []
    for place in places:
        ref, sentence = dataset.pairs[place]
        try:
            photo, mask = data.read_pair(ref)
        except data.DataError:
            if not dataset.skip_broken:
                raise
            continue
        truth = mask.numpy() > 0
        predicted = predict(net, dataset.tokenizer, photo, sentence, device, dtype)
        iou = (predicted & truth).sum() / (predicted | truth).sum()
        cells.append(example(photo, truth, predicted, sentence, f"IoU {100 * iou:.1f}", tile))
    rows = -(-len(cells) // columns)
    width, height = 3 * tile + 40, tile + 44
    sheet = Image.new("RGB", (columns * width, max(1, rows) * height), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * width + 10, i // columns * height + 6))
    return sheet


def example(photo, truth, predicted, sentence, score, tile):
    """Photo, truth and prediction side by side under the expression."""
    font = ImageFont.load_default(15)
    cell = Image.new("RGB", (3 * tile + 20, tile + 38), "white")
    pen = ImageDraw.Draw(cell)
    room = 3 * tile - 80
    sentence = "".join(c if c.isprintable() else " " for c in sentence)
    while pen.textlength(sentence, font) > room:
        sentence = sentence[:-2].rstrip("…") + "…"
    pen.text((4, 2), sentence, "black", font)
    pen.text((3 * tile + 16, 2), score, "black", font, anchor="ra")
    for i, picture in enumerate((photo, singled_out(photo, truth), singled_out(photo, predicted))):
        scale = tile / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size],
                                 Image.Resampling.BICUBIC)
        left = i * (tile + 10) + (tile - picture.width) // 2
        cell.paste(picture, (left, 26 + (tile - picture.height) // 2))
    return cell


def singled_out(photo, mask):
    """The photo (RGB) in pale grey, except where its mask (bool, same size) is true."""
    grey = np.asarray(photo.convert("L"))[..., None]
    shown = np.where(mask[..., None], np.asarray(photo), 170 + grey // 4)
    return Image.fromarray(shown.astype(np.uint8))


def curves(log, width=420, height=260):
    """A picture of a run: training loss, and mIoU and oIoU on val, by epoch."""
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (2 * width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for left, series in ((0, [("loss", "#2962d6")]),
                         (width, [("miou", "#d63031"), ("oiou", "#279a4a")])):
        box = (left + 50, 30, left + width - 20, height - 40)
        values = [row[key] for row in log for key, _ in series]
        low, high = min(0.0, *values), max([*values, 1e-9]) * 1.05
        pen.rectangle(box, outline="#bbbbbb")
        for share in (0, 0.5, 1):
            y = box[3] - share * (box[3] - box[1])
            pen.text((box[0] - 6, y), f"{low + share * (high - low):.3g}", "#555555", font, "rm")
        pen.text((box[0], box[3] + 8), "epoch 1", "#555555", font)
        pen.text((box[2], box[3] + 8), str(log[-1]["epoch"]), "#555555", font, "ra")
        for i, (key, colour) in enumerate(series):
            points = [(box[0] + (box[2] - box[0]) * k / max(1, len(log) - 1),
                       box[3] - (row[key] - low) / (high - low) * (box[3] - box[1]))
                      for k, row in enumerate(log)]
            pen.line(points, colour, 2)
            for x, y in points:
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
            name = {"loss": "training loss", "miou": "mIoU on val", "oiou": "oIoU on val"}[key]
            pen.text((box[0] + 110 * i, 8), name, colour, font)
    return sheet


def save_picture(picture, path):
    """Writes a PIL image; the kind of file goes by the name's ending."""
    with model.replacing(path) as file:
        picture.save(file, PICTURES[Path(path).suffix.lower()])


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def add_shared_arguments(parser, precision):
    """The arguments that train.py takes as well; `precision`: the default of --precision."""
    parser.add_argument("--data", default="data", metavar="DIR", help="the data folder")
    parser.add_argument("--vision-weights", metavar="FILE",
                        help="the vision tower's file (default: its published name in pretrained/)")
    parser.add_argument("--text-weights", metavar="FILE", help="the text tower's file, likewise")
    parser.add_argument("--vocabulary", metavar="FILE", help="the tokenizer's file, likewise")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default=precision,
                        help="auto: bf16 on GPUs that have it, fp16 on others, fp32 on CPUs "
                             "(default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N",
                        default=4 if torch.cuda.is_available() else 0,
                        help="loader processes beside every training or evaluating one")
    parser.add_argument("--skip-broken", action="store_true",
                        help="leave out broken photos and entries, and count them")


def parse_arguments():
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--dataset", metavar="NAME",
                        help="refcoco, refcoco+, refcocog-umd, refcocog-google, shapes, shapes-b "
                             "or a folder of DATA (default: what the checkpoint was trained on)")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="default: all but train")
    parser.add_argument("--json", metavar="OUT.json", help="also write the figures here")
    parser.add_argument("--panel", metavar="OUT.png", help="also draw examples of the first split")
    parser.add_argument("--image", metavar="PHOTO", help="one photo instead of a data set")
    parser.add_argument("--text", metavar="WORDS", help="what is meant in the photo")
    parser.add_argument("--output", metavar="OUT.png", help="the picture to make of it")
    parser.add_argument("--length", type=int, metavar="N",
                        help="tokens per expression (default: as in training; for checkpoints of "
                             "the authors' programs 17, on G-Ref 22)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    add_shared_arguments(parser, precision="fp32")
    args = parser.parse_args()
    one_photo = [args.image, args.text, args.output]
    if any(a is not None for a in one_photo) and (None in one_photo or len(args.ckpt) > 1):
        parser.error("one photo takes --image, --text, --output and a single --ckpt")
    if args.image and (args.json or args.panel or args.split or args.dataset):
        parser.error("--json, --panel, --split and --dataset have no meaning for one photo")
    if args.panel and len(args.ckpt) > 1:
        parser.error("--panel shows a single --ckpt")
    if args.length is not None and not 3 <= args.length <= 77:
        parser.error("--length is from 3 to 77")
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size is at least 1, --workers at least 0")
    outputs = [Path(path) for path in (args.panel, args.output) if path is not None]
    check_outputs([*outputs, *([mask_path(Path(args.output))] if args.output else [])],
                  [Path(args.json)] if args.json else [],
                  [args.image, *args.ckpt, args.vision_weights, args.text_weights, args.vocabulary])
    return args


def check_outputs(pictures, others, inputs):
    """Raises DataError, before any work is done, for an output (Path) that cannot be written, or
    would replace one of the `inputs` or another output."""
    taken = {Path(path).resolve() for path in inputs if path}
    for path in (*pictures, *others):
        if (path.exists() and not path.is_file() or not path.parent.is_dir()
                or not os.access(path.parent, os.W_OK)):
            raise data.DataError(f"{path}: not a file in a folder that can be written to")
        if path in pictures and path.suffix.lower() not in PICTURES:
            raise data.DataError(f"{path}: a picture's name ends in {', '.join(PICTURES)}")
        if path.resolve() in taken:
            raise data.DataError(f"{path}: would be written over another file of this call")
        taken.add(path.resolve())


def main():
    with processes() as (rank, world, device):
        args = parse_arguments()
        dtype = precision_type(args.precision, device)
        if args.image is not None:
            predict_one(args, device, dtype)
        else:
            evaluate_all(args, rank, world, device, dtype)


# ---------------------------------------------------------------------------------------------
# Processes, precision and errors: shared with train.py
# ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def processes():
    """Joins torchrun's processes, if it started us; yields rank, world size and device.

    The device comes from the local rank, so several machines work; NCCL on GPUs, gloo on CPUs.
    Where one process fails, all end: the first to fail says why, the others wait until it has.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world == 1:
        yield 0, 1, device
        return
    store, rank, world = next(dist.rendezvous("env://"))
    # A restart by torchrun shall not meet the addresses that the last attempt left in the store.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world)
    try:
        yield rank, world, device
        dist.barrier()                  # nobody leaves before the first process has saved all
    except BaseException as error:
        status = told_once(error, store)
        sys.stdout.flush()
        os._exit(status)                # an orderly leave would wait for the others
    gc.collect()                        # DistributedDataParallel, whose threads must end first
    dist.destroy_process_group()


def from_all(thing, world):
    """What each process has for `thing`, as a list, in all of them."""
    if world == 1:
        return [thing]
    things = [None] * world
    dist.all_gather_object(things, thing)
    return things


def precision_type(precision, device):
    """The type of mixed precision: None (single), bfloat16 or float16.

    `auto` is bfloat16 where a GPU has it, float16 on older ones, single precision on CPUs.
    """
    if precision == "auto":
        if device.type == "cpu":
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def run(main):
    """Runs a program; bad input becomes one line and exit status 2, SIGTERM status 143."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt as error:
        sys.exit(status_of(error))
    except Exception as error:
        sys.exit(tell(error))


class Parser(argparse.ArgumentParser):
    """Whose errors are told as all others are (`run`)."""

    def error(self, message):
        raise data.DataError(f"{message}; --help lists what there is")


def told_once(error, store):
    """Tells the error if this process is the first to fail, else waits until that one has.

    Returns the exit status.
    """
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return status_of(error)
    try:
        if store.add("failures", 1) > 1:
            store.wait(["told"], timedelta(seconds=10))
            return status_of(error)
    except RuntimeError:                # the store has gone with the process that kept it
        pass
    status = tell(error)
    with contextlib.suppress(RuntimeError):
        store.set("told", "yes")
    return status


def status_of(error):
    """The exit status: 2 for bad input, 128 + its number for a signal, 1 for all else."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, EXPECTED) else 1


def tell(error):
    """Says on stderr what went wrong, in a line where that is enough. Returns the exit status."""
    name = Path(sys.argv[0]).name
    if isinstance(error, EXPECTED):
        # An error from a loader's worker brings the worker's traceback: its last line is the error.
        line = str(error).strip().splitlines()[-1].removeprefix("data.DataError: ")
        print(f"{name}: {line}", file=sys.stderr)
    elif isinstance(error, dist.DistError) or "gloo" in str(error):
        print(f"{name}: lost another process, which ended without a word (killed?)",
              file=sys.stderr)
    elif str(error).startswith("DataLoader worker"):
        print(f"{name}: lost a process of the loader, which was killed (out of memory? try fewer "
              f"--workers)", file=sys.stderr)
    elif (isinstance(error, (MemoryError, torch.OutOfMemoryError))
          or "can't allocate memory" in str(error)):
        print(f"{name}: out of memory; try a smaller --batch-size or, in training, --micro-batch",
              file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    return status_of(error)


if __name__ == "__main__":
    run(main)
