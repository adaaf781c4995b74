"""Metrics, pictures, and the mask for one photo and one expression.

    python evaluate.py --ckpt runs/shapes/best.pt
    python evaluate.py --ckpt best.pt --data DATA --dataset refcoco --split val testA testB
    python evaluate.py --ckpt best.pt --image photo.jpg --text "the left cat" --output cat.png

All figures are percentages. Every expression has an IoU, measured at the photo's own size. mIoU is
the mean over expressions; CRIS, ETRIS, BarLeRIa and DCRIS print it as "IoU". oIoU is the sum of all
intersections over the sum of all unions; LAVT and later papers print it. P@0.5 is the share of
expressions with an IoU above 0.5. mIoU and oIoU differ by several points: compare like with like.

The figures follow the released programs of CRIS, ETRIS and DETRIS, step by step: comments 1 to 5
in the code. The model runs in single precision, on GPUs too, unless --precision says otherwise.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import re
import signal
import sys
import traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import adapters
import backbones
import data
import model

THRESHOLD = 0.35                        # of the probability, as in the authors' programs
LEVELS = (50, 60, 70, 80, 90)           # of P@0.5 to P@0.9, in percent
TILE = 110                              # side of a map of the inside, in pixels
HEADINGS = {"miou": "mIoU", "oiou": "oIoU", **{f"p{p}": f"P@{p / 100}" for p in LEVELS}}
GRES = {"miou": "mIoU (gIoU)", "oiou": "oIoU (cIoU)", "n_acc": "N-acc", "t_acc": "T-acc"}
BAD_INPUT = (model.WeightsError, model.ConfigError, data.DataError, OSError)


# ---- Metrics --------------------------------------------------------------------------------

def probabilities(net, images, tokens, device, dtype):
    """Images, uint8 (B, 3, S, S), and token ids (B, L) to probabilities (B, S, S)."""
    with torch.inference_mode(), autocast(device, dtype):
        images, tokens = (x.to(device, non_blocking=True) for x in (images, tokens))
        logits = net(data.normalise(images), tokens)
    if net.config.exact_masks:          # as in `loss`
        return F.interpolate(logits.float(), images.shape[-2:], mode="bilinear").sigmoid()[:, 0]
    # 1. Sigmoid, in single precision. 2. Bicubic interpolation from side s to S, corners aligned:
    # pixel i moves to i * (S - 1) / (s - 1). In training it is at i * S / s (`loss`), so a mask
    # drifts by up to one pixel of the logits to the lower right, in every published figure, too.
    return F.interpolate(logits.float().sigmoid(), images.shape[-2:], mode="bicubic",
                         align_corners=True)[:, 0]


def mask_of(square, width, height):
    """Probabilities (S, S) to the mask, bool (height, width), at the photo's own size."""
    # 3. Bicubic interpolation to the photo's size, as cv2.warpAffine does. 4. The threshold.
    return data.unletterbox(square, width, height) > THRESHOLD


def overlaps(net, dataset, device, dtype=None, batch_size=16, workers=0, rank=0, world=1,
             name="evaluating"):
    """Int64 (expressions, 4): each one's index, and its pixels of intersection, union and truth.

    The processes take whole batches in turn. So any number of processes computes the same batches
    and counts every expression once. All of them get the full table.
    """
    batches = [range(len(dataset))[i:i + batch_size] for i in range(0, len(dataset), batch_size)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches[rank::world], num_workers=workers, collate_fn=collate,
        pin_memory=device.type == "cuda", worker_init_fn=data.leave_signals_to_parent)
    rows = []
    bar = tqdm(loader, desc=name, unit="batch", leave=False, disable=rank > 0)
    for images, tokens, masks, indices in filter(None, bar):
        maps, pixels = probabilities(net.eval(), images, tokens, device, dtype), []
        for square, truth in zip(maps, masks):
            truth = truth.to(device, non_blocking=True)
            predicted = mask_of(square, *truth.shape[::-1])
            # 5. Intersection and union at the photo's own size; the authors add 1e-6 to the union.
            pixels += [(predicted & truth).sum(), (predicted | truth).sum(), truth.sum()]
        counts = torch.stack(pixels).view(-1, 3).tolist()       # waits for a GPU, once a batch
        rows += [[index, *three] for index, three in zip(indices, counts)]
    return np.array(sorted(sum(from_all(rows, world), [])), dtype=np.int64).reshape(-1, 4)


def collate(samples):
    """Images and tokens stacked, masks and indices listed; without broken samples (None)."""
    samples = [sample for sample in samples if sample]
    images, tokens, *lists = ([sample[key] for sample in samples]
                              for key in ("image", "tokens", "mask", "index"))
    return samples and (torch.stack(images), torch.stack(tokens), *lists)


def metrics(table):
    """The figures of a table from `overlaps`: mIoU, oIoU and P@0.5 to P@0.9 in percent, and the
    number of expressions. Raises DataError for an empty table.

    Where some expressions have no target, mIoU is GRES's gIoU and oIoU its cIoU. N-acc is the share
    of them with an empty prediction, T-acc of the others with another one. P@ is of the others.
    """
    if not len(table):
        raise data.DataError("no expression could be evaluated: every photo is broken")
    targets = table[:, 3] > 0
    intersections, unions, ious, empty = count_overlaps(table)
    found = {"miou": ious.mean(), "oiou": intersections.sum() / max(1, unions.sum()),
             **{f"p{p}": (ious[targets] > p / 100).sum() / max(1, targets.sum()) for p in LEVELS}}
    if not targets.all():
        found |= {"n_acc": empty[~targets].mean(),
                  "t_acc": (~empty[targets]).sum() / max(1, targets.sum())}
    return {**{key: 100 * float(value) for key, value in found.items()}, "expressions": len(table)}


def count_overlaps(table):
    """Each row's intersection, union and IoU, and whether its prediction counts as empty.

    Where some expressions have no target, predictions of fewer than 50 pixels count as empty, as
    the GRES paper does for its baselines: the intersection is 0 and, without target, the union 0
    and the IoU 1. Other predictions without target have IoU 0 and add to the unions, as in ReLA.
    """
    _, intersections, unions, targets = table.T
    empty = (targets == 0).any() & (unions - targets + intersections < 50)
    intersections = np.where(empty, 0, intersections)
    unions = np.where(empty & (targets == 0), 0, unions)
    return intersections, unions, np.where(unions, intersections / np.maximum(1, unions), 1), empty


# ---- One photo ------------------------------------------------------------------------------

def predict(net, tokenizer, photo, text, device, dtype=None):
    """The mask (bool, numpy) of the object that `text` refers to, at the size of the RGB photo.
    `net` is on the torch.device `device`. Raises DataError for an empty text."""
    if not data.clean(text):
        raise data.DataError("the expression is empty; say which object to segment")
    image = data.letterbox(photo, net.config.image_size)[None]
    tokens = tokenizer([text], net.config.length)
    square = probabilities(net.eval(), image, tokens, device, dtype)[0]
    return mask_of(square, *photo.size).cpu().numpy()


def predict_one(args, device, dtype):
    """--image and --text: one photo, one expression, one mask."""
    photo = data.read_photo(args.image, upright=True)
    net, tokenizer, _ = load_checkpoint(args.ckpt[0], args, device)
    tokens, most = len(tokenizer.encode(args.text)), net.config.length - 2
    if tokens > most:
        print(f"the expression has {tokens} tokens, of which {most} are read", file=sys.stderr)
    mask = predict(net, tokenizer, photo, args.text, device, dtype)
    save_picture(singled_out(photo, mask), args.output)
    save_picture(Image.fromarray(mask.astype(np.uint8) * 255), args.mask)
    if args.inside:
        save_picture(inside(net, tokenizer, photo, args.text, device), args.inside)
    print(f"{args.output}, {args.mask}: the mask has {100 * mask.mean():.1f}% of the pixels")


# ---- Whole splits and the table -------------------------------------------------------------

def evaluate_all(args, rank, world, device, dtype):
    """Prints a row of a Markdown table, and writes --json, after each split of each checkpoint."""
    results, heading, models, tables = {}, None, [], []
    for path in args.ckpt:
        net, tokenizer, checkpoint = load_checkpoint(path, args, device)
        name = args.dataset or checkpoint["run"].get("dataset")
        model.require(name not in (None, "mixed"), f"{path}: its data set is {name or 'unknown'}; "
                      f"choose one to evaluate it on, e.g. --dataset refcoco")
        preset = checkpoint["run"].get("preset", net.config.method)
        about = [path, preset, f"{model.count(net)['tuned']:,}"]
        time = f"{checkpoint['seconds']:.0f} s" if "seconds" in checkpoint else ""
        for i, split in enumerate(args.split or data.held_out_splits(args.data, name)):
            refs, broken = data.read_split(args.data, name, split, args.skip_broken)
            dataset = data.ExpressionSet(refs, tokenizer, net.config.image_size,
                                         net.config.length, args.skip_broken)
            table = overlaps(net, dataset, device, dtype, args.batch_size, args.workers, rank,
                             world, f"{name} {split}")
            figures = metrics(table)
            if rank > 0:
                continue
            if broken:
                print(f"{broken} broken entries left out of all splits", file=sys.stderr)
            *percentages, expressions = figures.values()
            if heading != [*figures]:           # with N-acc and T-acc, or without
                heading, names = [*figures], HEADINGS | (GRES if "n_acc" in figures else {})
                print(table_row("checkpoint", "preset", "tuned", "split", "expressions",
                                *(names[key] for key in heading[:-1]), "trained for"))
                print("|---|---|---:|---|" + "---:|" * (1 + len(heading)))
            print(table_row(*about, split, expressions, *percentages, time), flush=True)
            results.setdefault(path, {})[split] = figures
            if args.json:
                with model.replacing(args.json) as file:
                    file.write(json.dumps(results, indent=1).encode())
            if args.panel and i == 0:
                model.require(not models or dataset.pairs == models[0][2].pairs,
                              f"{path} is of another data set; --panel compares on one: --dataset")
                models.append((preset, net, dataset))
                tables.append(table)
    if models:
        save_picture(panel(models, tables, device, dtype), args.panel)


def load_checkpoint(path, args, device):
    """The model of a checkpoint, its tokenizer, and what `model.read_checkpoint` found."""
    checkpoint = model.read_checkpoint(path)
    net = model.load(path, args.vision_weights, args.text_weights, checkpoint).to(device)
    usual = model.usual_length(net.config, args.dataset if "released" in checkpoint else None)
    net.config = model.configure(net.config, length=args.length or usual)
    own = checkpoint["vocabulary"].get("text", "").encode()
    vocabulary = args.vocabulary or own or model.find_published("vocabulary")
    return net, make_tokenizer(vocabulary, net.config), checkpoint


def make_tokenizer(vocabulary, config):
    """The tokenizer of a file, or its bytes. ConfigError if the text tower has fewer entries."""
    tokenizer, most = data.Tokenizer(vocabulary), model.TEXT[config.text].vocabulary
    model.require(tokenizer.size <= most, f"the vocabulary has {tokenizer.size} entries, the text "
                  f"tower {config.text} only {most}; choose another --vocabulary")
    return tokenizer


def table_row(*cells):
    return "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"


# ---- Pictures -------------------------------------------------------------------------------

def panel(models, tables, device, dtype=None):
    """A picture of examples: photo, truth, and the mask that each model predicts, with its IoU.
    models: (name, model, data set) of each, of the same expressions; tables: from `overlaps`."""
    ious, strips = np.stack([count_overlaps(table)[2] for table in tables]), []
    for row in choose_examples(ious):
        ref, sentence = models[0][2].pairs[int(tables[0][row, 0])]
        photo, truth = data.read_pair(ref)
        shown = [("", photo), ("truth", singled_out(photo, truth.numpy() > 0))]
        for (name, net, dataset), iou in zip(models, ious[:, row]):
            mask = predict(net, dataset.tokenizer, photo, sentence, device, dtype)
            shown.append((f"{name}: IoU {100 * iou:.1f}", singled_out(photo, mask)))
        strips.append((data.clean(sentence), shown))
    return sheet(strips, columns=2 if len(models) == 1 else 1)


def choose_examples(ious):
    """The rows of eight examples, from IoUs (models, expressions). Of one model: evenly spaced. Of
    several: the six on which they differ most, and the two whose best IoU is lowest."""
    if len(ious) == 1:
        return sorted({round(i * (ious.shape[1] - 1) / 7) for i in range(8)})
    differ = np.argsort(ious.min(0) - ious.max(0), kind="stable")[:6]
    failed = np.argsort(ious.max(0), kind="stable")[:2]
    return list(dict.fromkeys((*differ, *failed)))


def sheet(strips, columns=1, tile=180):
    """A picture of strips, each a title and a list of (label, picture)."""
    width, height = max(len(shown) for _, shown in strips) * (tile + 10) + 10, tile + 54
    picture = Image.new("RGB", (columns * width, -(-len(strips) // columns) * height), "white")
    pen, font, small = ImageDraw.Draw(picture), *map(ImageFont.load_default, (15, 12))
    for i, (title, shown) in enumerate(strips):
        left, top = i % columns * width + 10, i // columns * height + 6
        while pen.textlength(title, font) > width - 20:
            title = title[:-2].rstrip("…") + "…"
        pen.text((left, top), title, "black", font)
        for label, tile_picture in shown:
            pen.text((left, top + 20), label, "black", small)
            picture.paste(ImageOps.pad(tile_picture, (tile, tile), color="white"), (left, top + 38))
            left += tile + 10
    return picture


def singled_out(photo, mask):
    """The photo (RGB) in pale grey, except where its mask (bool, same size) is true."""
    pale = photo.convert("L").point(lambda grey: 170 + grey // 4).convert("RGB")
    return Image.composite(photo, pale, Image.fromarray(mask))


def save_picture(picture, path):
    """Writes a PIL image. The name's ending decides the format. OSError for an unknown one."""
    with model.replacing(path) as file:
        picture.save(file, Image.registered_extensions().get(os.path.splitext(path)[1].lower()))


# ---- The inside of a model ------------------------------------------------------------------

@torch.inference_mode()
def inside(net, tokenizer, photo, text, device):
    """A picture of what a model does with a photo and an expression, layer by layer.

    A row for each layer in which patches (in BarLeRIa's last block: the class token) read words. A
    map shows the share of a patch's attention that goes to one token, the mean over heads. Its
    label has the mean over patches; what is missing to 100 % goes to padding. Black is 0, white the
    largest share in the row. In other maps black is the least value, white the largest.
    """
    image = data.letterbox(photo, net.config.image_size)[None]
    tokens = tokenizer([text], net.config.length)
    calls = []                          # of all layers, in their order: (layer, inputs, output)
    with torch.nn.modules.module.register_module_forward_hook(lambda *call: calls.append(call)):
        square = probabilities(net.eval(), image, tokens, device, None)[0]
    symbols = [*tokenizer.ids][:-2] + ["start", "end"]          # for the last two, START and END
    words = [symbols[i].removesuffix("</w>") for i in tokens[0, :tokens.argmax() + 1]]
    names = {layer: name for name, layer in net.named_modules()}
    patches, prefix, rows = math.prod(net.vision.grid(image)), net.vision.prefix, []
    for layer, inputs, output in calls:
        if isinstance(layer, backbones.MultiheadAttention) and inputs[1].shape[1] == len(tokens[0]):
            shares = attention_to_words(layer, *inputs)[0]
            rows.append((f"{names[layer]}: patches read words", word_maps(words, shares)))
        elif isinstance(layer, adapters.DenseCrossAdapter):
            rows[-1][1].append(("adapter's output", heat_map(output[0, -patches:].norm(dim=1))))
        elif isinstance(net, model.BarLeRIa) and layer is net.vision.blocks[-1].attention:
            shares = attention_of_class(layer, *inputs)
            rows.append((f"{names[layer]}: the class token reads", [
                *word_maps(words, shares[None, prefix:-patches]),       # none without visitors
                ("patches", heat_map(shares[-patches:]))]))
        elif isinstance(layer, adapters.GlobalShortcutTuning):
            prior = inputs[2][0, -patches:].norm(dim=1)
            rows.append((f"{names[layer]}: receives", [("global prior", heat_map(prior))]))
        elif layer is net.head:
            labels = [*(f"after block {i}" for i in net.config.features), "at the end",
                      "logits", "probability"]
            maps = [*(x[0].norm(dim=0) for x in inputs[0]), output[0, 0], square]
            mask = singled_out(photo, mask_of(square, *photo.size).cpu().numpy())
            shown = [("photo", photo), *zip(labels, map(heat_map, maps)), ("mask", mask)]
            rows.append(("head: receives three maps (norm at each patch), makes the mask", shown))
    return sheet(rows, tile=TILE)


def attention_to_words(layer, query, key, value, padding=None):
    """The weights (B, queries, keys) of a `MultiheadAttention`, as PyTorch computes them."""
    length_first = (x.transpose(0, 1) for x in (query, key, value))
    return torch.nn.MultiheadAttention.forward(layer, *length_first, key_padding_mask=padding)[1]


def attention_of_class(layer, x, causal, rotary):
    """What the first of tokens x (1, N, D) reads in a tower's `Attention`: N shares."""
    q, k, _ = layer.qkv(x).chunk(3, dim=-1)
    q = q if layer.query_bias is None else q + layer.query_bias
    one_hot = torch.eye(x.shape[1]).to(x).repeat(1, layer.heads)[None]         # the values
    shares = backbones.attend(q, k, one_hot, layer.heads, causal, rotary)
    return shares[0, 0].unflatten(0, (layer.heads, -1)).mean(0)


def word_maps(words, shares):
    """Labels and maps of the `words`, from shares of attention (patches, words and padding)."""
    return [(f"{word[:11]} {100 * share.mean():.0f}%", heat_map(share, shares.max()))
            for word, share in zip(words, shares.t())]


def heat_map(values, white=None):
    """A number for each patch as a picture: black, red, yellow, white; from 0 if white is given."""
    low, high = (values.min(), values.max()) if white is None else (0, white)
    side = math.isqrt(values.numel())
    heat = ((values - low) / (high - low + 1e-12)).float().cpu().view(side, side, 1)
    colours = (3 * heat - torch.arange(3)).clamp(0, 1) * 255
    picture = Image.fromarray(colours.byte().numpy())
    return ImageOps.expand(picture.resize((TILE - 2, TILE - 2), Image.Resampling.NEAREST), 1)


# ---- Command line ---------------------------------------------------------------------------

def add_shared_arguments(parser, precision):
    """The arguments that train.py takes as well; `precision`: the default of --precision."""
    add = parser.add_argument
    add("--data", default="data", metavar="DIR", help="the data folder")
    add("--vision-weights", metavar="FILE", help="default: the published file in pretrained/")
    add("--text-weights", metavar="FILE", help="likewise")
    add("--vocabulary", metavar="FILE", help="likewise, of the tokenizer")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default=precision,
        help="auto: bf16 or fp16 on GPUs, fp32 on CPUs (default: %(default)s)")
    add("--workers", type=int, metavar="N", default=4 if torch.cuda.is_available() else 0,
        help="loader processes beside every training or evaluating one")
    add("--skip-broken", action="store_true", help="leave out broken photos and entries")


def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="FILE")
    add("--dataset", metavar="NAME", help="refcoco, refcoco+, refcocog-umd, refcocog-google or any "
        "folder of DATA, such as shapes (default: what the checkpoint was trained on)")
    add("--split", nargs="+", metavar="SPLIT", help="default: all but train")
    add("--json", metavar="OUT.json", help="also write {checkpoint: {split: figures}} here")
    add("--panel", metavar="OUT.png", help="also draw examples of each checkpoint's first split")
    add("--image", metavar="PHOTO", help="one photo instead of a data set")
    add("--text", metavar="WORDS", help="which object of the photo to segment")
    add("--output", metavar="OUT.png", help="the picture to make of it")
    add("--inside", metavar="OUT.png", help="also draw what the model does, layer by layer")
    add("--length", type=int, metavar="N", help="tokens per expression (default: as in training)")
    add("--batch-size", type=int, default=16, metavar="N")
    add_shared_arguments(parser, precision="fp32")
    args = parser.parse_args()
    one_photo = (args.image, args.text, args.output)
    whole_splits = len(args.ckpt) > 1 or args.json or args.panel or args.split or args.dataset
    if any((*one_photo, args.inside)) and (None in one_photo or whole_splits):
        parser.error("one photo takes --image, --text, --output and one --ckpt, nothing of a split")
    args.mask = args.output and f"{os.path.splitext(args.output)[0]}-mask.png"
    inputs = [os.path.realpath(path) for path in (args.image, *args.ckpt) if path]
    for path in filter(None, (args.json, args.panel, args.output, args.mask, args.inside)):
        if os.path.exists(path) and (os.path.realpath(path) in inputs or not os.path.isfile(path)):
            parser.error(f"{path} is an input, or not a file; write to another place")
    return args


def main():
    with processes() as (rank, world, device):
        args = parse_arguments()
        dtype = precision_type(args.precision, device)
        if args.image:
            return predict_one(args, device, dtype)
        evaluate_all(args, rank, world, device, dtype)


# ---- Processes, precision and errors, also for train.py -------------------------------------

@contextlib.contextmanager
def processes():
    """Joins torchrun's processes, if there are some. Yields rank, world size and device.

    If one process fails, all end, and only the first to fail prints its error.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1, local_device()
        return
    store, rank, world = next(dist.rendezvous("env://"))
    # A restart by torchrun must not read the addresses that the last attempt left in the store.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    try:
        device = local_device()
        backend = {"device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(store=store, rank=rank, world_size=world, **backend)  # GPUs: NCCL
        yield rank, world, device
        dist.barrier()                  # all wait until rank 0 has saved its files
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # torchrun sends it when another has ended
        status = report_error(error, aloud=store.add("failures", 1) == 1)
        sys.stdout.flush()
        os._exit(status)                # sys.exit would wait for the other processes
    gc.collect()                        # ends the threads of DistributedDataParallel
    dist.destroy_process_group()


def local_device():
    """The GPU of the local rank, or the CPU. ConfigError for fewer GPUs than local processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False         # single precision is single precision
    model.require(int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count(),
                  "more processes than GPUs; choose a smaller --nproc_per_node")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def from_all(thing, world):
    """Every process gets the list of what all processes passed as `thing`, in order of rank."""
    things = [thing] * world
    if world > 1:
        dist.all_gather_object(things, thing)
    return things


def precision_type(precision, device):
    """The type of mixed precision, or None for single, which `auto` is on CPUs."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as `run` does all bad input."""

    def error(self, message):
        raise data.DataError(f"{message}; --help lists the options")


def run(main):
    """Runs a program. Bad input ends it with one line and status 2, SIGTERM with status 143."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(error))


def report_error(error, aloud=True):
    """Prints an error, in one line where that is enough. Returns the exit status."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return getattr(error, "code", 130) or 0
    text = str(error).strip()
    last = text.rpartition("\n")[2]         # below the traceback in the error of a loader's worker
    if isinstance(error, BAD_INPUT):
        text = last.removeprefix("data.DataError: ")
    elif isinstance(error, dist.DistError) or re.search("gloo|^DataLoader worker", text):
        text = f"lost another process (out of memory? try fewer --workers): {last}"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "t allocate memory" in text:
        text = "out of memory; try a smaller --batch-size or, in training, --micro-batch"
    else:
        text = "".join(traceback.format_exception(error)).strip()
    if aloud:
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
    return 2 if isinstance(error, BAD_INPUT) else 1


if __name__ == "__main__":
    run(main)
