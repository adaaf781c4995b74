"""From files to tensors: photos on a square, REFER data sets, CLIP's tokenizer, and drawn data.

    python data.py shapes DIR       draws a data set into DIR/shapes; shapes-b: the second domain
    python data.py check DIR        counts refs and expressions, and names the first broken entry
    python data.py parquet FILE... DIR/NAME     makes a data set of Hugging Face's tables

A REFER data set is a folder `ROOT/NAME` with two files, which are read as they are distributed:
`instances.json` has the photos' names and the objects' masks (COCO's annotations),
`refs(SPLITBY).p` or `.json` the expressions and the splits: a list of {"image_id": 7, "ann_id": 12,
"split": "train", "sentences": [{"sent": "the left cat"}]}. In gRefCOCO, `grefs(SPLITBY)`, `ann_id`
is a list: of objects, whose masks are joined, or [-1] where the expression refers to nothing.
"""

import argparse
import contextlib
import functools
import gzip
import html
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import tempfile
from collections import Counter, namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm


class DataError(ValueError):
    """Data that cannot be used. The message names file and entry, and says what to do."""


def reason(error):
    """An error as one short printable line: it may quote any text from a file."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:300])


# ---- Photos and the letterbox ---------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)          # CLIP's, also for DINOv2, as the authors did
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")     # none runs programs


def normalise(images):
    """Scales uint8 images (B, 3, S, S) to the towers' input: float32, by CLIP's mean and std."""
    channels = (images.float() / 255).unbind(1)
    return torch.stack([(x - mean) / std for x, mean, std in zip(channels, MEAN, STD)], dim=1)


def read_photo(path, upright=False):
    """Reads an RGB image. Raises DataError if it is not an image, is truncated, or is too large.

    `upright` applies EXIF's rotation, as phones need it. COCO's polygons need the stored pixels.
    """
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            if image.mode.startswith(("I", "F")):           # PIL would clip these at 255
                raise ValueError("more than 8 bits a channel; save it with 8 bits")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:          # each of PIL's decoders raises errors of other types
        raise DataError(f"{path}: cannot be read as an image ({reason(error)})") from None


def letterbox_place(width, height, size):
    """Where a photo lies in its letterbox: scale, left, top.

    Pixel (x, y) of the photo moves to (left + scale * x, top + scale * y) of the square, as in the
    authors' programs. The centre of the first pixel is (0, 0) in both.
    """
    scale = size / max(width, height)
    return scale, (size - scale * width) / 2, (size - scale * height) / 2


def letterbox(photo, size):
    """Resizes a photo (PIL, RGB) onto a square of the mean colour, bicubic: uint8 (3, S, S)."""
    scale, left, top = letterbox_place(*photo.size, size)
    if scale == 1 and left % 1 == top % 1 == 0:             # drawn photos: nothing to resize
        square = ImageOps.pad(photo, (size, size), color=MEAN_COLOUR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
    # `warp` fills borders with 0. So the mean colour is subtracted before it, and added afterwards.
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.float32)
    columns = torch.from_numpy(np.array(photo.transpose(Image.Transpose.TRANSPOSE))).flatten(1)
    columns = (columns - colour.repeat(photo.height)).unflatten(1, (-1, 3))         # (W, H, 3)
    square = warp(columns, scale, left, top, size, size)
    return (square + colour[:, None, None]).round_().clamp_(0, 255).byte().contiguous()


def letterbox_mask(mask, size):
    """Puts a mask, uint8 (H, W), 0 to 255, where its photo lies: uint8 (1, S, S), bilinear."""
    place = letterbox_place(*mask.shape[::-1], size)
    square = warp(mask.t()[..., None].float(), *place, size, size, cubic=False)
    return square.round_().byte().contiguous()


def unletterbox(square, width, height):
    """Takes a square map (S, S) back to the photo's size, (height, width): bicubic, 0 outside."""
    scale, left, top = letterbox_place(width, height, square.shape[-1])
    return warp(square.t()[..., None].float(), 1 / scale, -left / scale, -top / scale,
                width, height)[0]


def warp(image, scale, left, top, width, height, cubic=True):
    """Resizes and moves an image: pixel (x, y) moves to (left + scale * x, top + scale * y).

    Takes (W, H, C), float; returns (C, height, width). Bicubic or bilinear without antialiasing; 0
    outside the image. It equals OpenCV 4's cv2.warpAffine, as the authors' programs call it, which
    rounds positions to 1/32 pixel (OpenCV 5.0 does not). The two axes are resized one by one.
    """
    if scale == 1 and left % 1 == top % 1 == 0:             # drawn photos: nothing to resize
        left, top = int(left), int(top)
        borders = left, width - len(image) - left, top, height - image.shape[1] - top
        return F.pad(image.permute(2, 1, 0), borders)
    if width * image.shape[1] > height * len(image):        # first the axis that shrinks more
        return warp(image.transpose(0, 1), scale, top, left, height, width, cubic).transpose(1, 2)

    def resize_first_axis(image, side, shift):
        index, weights = taps(len(image), side, scale, shift, cubic, image.device)
        return F.embedding_bag(index, image.flatten(1), mode="sum",         # sums of weighted rows
                               per_sample_weights=weights.to(image.dtype))

    columns = resize_first_axis(image, width, left)                         # (width, H * C)
    rows = columns.t().unflatten(0, image.shape[1:])                        # (H, C, width)
    return resize_first_axis(rows, height, top).unflatten(1, (-1, width)).transpose(0, 1)


@functools.lru_cache(maxsize=256)           # photos have few different sizes
def taps(length, side, scale, shift, cubic, device):
    """For each new pixel of a row: the old pixels that it is computed from, and their weights.

    Pixel x of a row of `length` pixels moves to shift + scale * x in a row of `side` pixels.
    Returns indices and weights (side, 4) for bicubic (a = -0.75) or (side, 2) for bilinear. Pixels
    beyond the row's ends have weight 0.
    """
    x = torch.arange(side, dtype=torch.float64)
    place = (1024 * x / scale).round() - round(1024 * shift / scale)        # in 1/1024 pixel
    place = ((place + 16) / 32).floor()[:, None] / 32                       # to 1/32, in pixels
    index = place.floor().long() + (torch.arange(-1, 3) if cubic else torch.arange(2))
    distance = (place - index).abs()
    weights = 1 - distance
    if cubic:
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1                          # up to 1
        far = -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3           # 1 to 2
        weights = torch.where(distance <= 1, near, far)
    weights = (weights * ((index >= 0) & (index < length))).float()
    return index.clamp(0, length - 1).to(device), weights.to(device)


# ---- The two data sets: one for training, one for evaluation --------------------------------

class Ref(NamedTuple):
    """An object in a photo, or several or none: the mask, and the expressions for it."""
    id: int
    image_id: int
    image: str                  # path
    width: int
    height: int
    segmentations: list         # of each object: polygons or RLE, in COCO's form
    sentences: tuple


class TrainSet(Dataset):
    """One sample per ref, with one of its expressions.

    `dataset[epoch, index]` depends on seed, epoch and index alone. It is a dictionary of image,
    uint8 (3, S, S); tokens, int64 (L,); mask, uint8 (1, S, S), 0 to 255; ref, its id. With
    `skip_broken`, the next ref replaces one whose photo or mask is broken.
    """

    def __init__(self, refs, tokenizer, image_size, length, seed=0, skip_broken=False):
        self.refs, self.tokenizer, self.seed = refs, tokenizer, seed
        self.image_size, self.length, self.skip_broken = image_size, length, skip_broken

    def __len__(self):
        return len(self.refs)

    def __getitem__(self, epoch_and_index):
        epoch, index = epoch_and_index
        for i in range(index, index + len(self.refs)):
            ref = self.refs[i % len(self.refs)]
            if pair := read_pair(ref, self.skip_broken):
                break
        else:
            raise DataError(f"no ref can be used: every photo or mask is broken, {ref.image} too")
        photo, mask = pair
        sentence = random.Random(f"{self.seed} {epoch} {index}").choice(ref.sentences)
        return {"image": letterbox(photo, self.image_size),
                "tokens": self.tokenizer([sentence], self.length)[0],
                "mask": letterbox_mask(mask, self.image_size), "ref": str(ref.id)}


class ExpressionSet(Dataset):
    """Every expression of every ref once, for evaluation.

    `dataset[index]` is a dictionary of image, uint8 (3, S, S); tokens, int64 (L,); mask at the
    photo's own size, bool (H, W); index. Or, with `skip_broken`, None for a broken photo or mask.
    """

    def __init__(self, refs, tokenizer, image_size, length, skip_broken=False):
        self.pairs = [(ref, sentence) for ref in refs for sentence in ref.sentences]
        self.tokenizer, self.image_size = tokenizer, image_size
        self.length, self.skip_broken = length, skip_broken
        self.last = None, None                  # the next expression often has the same ref

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        ref, sentence = self.pairs[index]
        if self.last[0] is not ref:
            pair = read_pair(ref, self.skip_broken)
            self.last = ref, pair and {"image": letterbox(pair[0], self.image_size),
                                       "mask": pair[1] > 0}
        tokens = self.tokenizer([sentence], self.length)[0]
        return self.last[1] and {**self.last[1], "tokens": tokens, "index": index}


def leave_signals_to_parent(worker):
    """Keeps Ctrl-C from a loader's process. SIGTERM ends it 3 s later; until then a run saves."""
    os.setsid()
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(3))


def read_pair(ref, skip_broken=False):
    """Reads the photo of a ref (PIL, RGB) and its mask, uint8 (height, width), 0 and 255. Broken
    ones raise DataError; with `skip_broken` the error is printed, and None returned."""
    try:
        photo = read_photo(ref.image)
        if photo.size != (ref.width, ref.height):
            raise DataError(f"{ref.image}: {photo.width}x{photo.height} pixels, but "
                            f"instances.json says {ref.width}x{ref.height}")
        return photo, torch.from_numpy(decode_mask(ref) * 255)
    except DataError as error:
        if not skip_broken:
            raise DataError(f"{error}; --skip-broken leaves it out") from None
        tqdm.write(f"left out: {error}", file=sys.stderr)       # above the progress bar


def decode_mask(ref):
    """The mask of a ref, uint8 (height, width), 0 and 1. Raises DataError if an object has none."""
    size = [ref.height, ref.width]
    try:
        mask = np.zeros(size, np.uint8, order="F")          # as pycocotools'
        for rle in ref.segmentations:
            if isinstance(rle, list):
                # pycocotools takes two points for a box, and memory for an outline far outside.
                polygons = [p for p in rle if len(p) >= 6 and len(p) % 2 == 0]
                if not polygons or not np.abs(np.concatenate(polygons)).max() < 4 * max(size):
                    raise ValueError("no polygon of three points or more, or one far outside")
                rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *size))
            elif isinstance(rle["counts"], list):
                rle = pycocotools.mask.frPyObjects(rle, *size)
            if list(rle["size"]) != size:
                raise ValueError(f"RLE of size {rle['size']}")
            part = pycocotools.mask.decode(rle)
            # pycocotools does not define the pixels after the end of a short RLE.
            if not 0 < np.count_nonzero(part) == pycocotools.mask.area(rle):
                raise ValueError("an empty mask, or an RLE that does not fill the image")
            mask |= part
    except Exception as error:              # an entry of a wrong type can raise nearly anything
        raise DataError(f"ref {reason(ref.id)} of {ref.image}, {ref.width}x{ref.height}: unusable "
                        f"segmentation in instances.json ({reason(error)})") from None
    return mask


# ---- The REFER reader -----------------------------------------------------------------------

# {split: (refs, expressions)}. Expressions of G-Ref are as commonly reported; the other numbers
# were counted in the refer toolkit's files.
PUBLISHED_SIZES = {
    "refcoco": {"train": (42404, 120624), "val": (3811, 10834),
                "testA": (1975, 5657), "testB": (1810, 5095)},
    "refcoco+": {"train": (42278, 120191), "val": (3805, 10758),
                 "testA": (1975, 5726), "testB": (1798, 4889)},
    "refcocog-umd": {"train": (42226, 80512), "val": (2573, 4896), "test": (5023, 9602)},
    "refcocog-google": {"train": (44822, 85474), "val": (5000, 9536)},
}
MIXED = ("refcoco", "refcoco+", "refcocog-umd")
# The SPLITBY that a data set's name may leave out (None: neither). In other folders: an only one.
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": None}
# Of files of one SPLITBY the last is read: the pickle, as by gRefCOCO's own loader.
REFS_FILES = ("grefs(*).json", "grefs(*).p", "refs(*).json", "refs(*).p")
WHERE = ("the README says where to get RefCOCO, RefCOCO+, RefCOCOg and the COCO images, and "
         "`python data.py shapes DIR` draws a data set")


def read_split(root, name, split, skip_broken=False, keep_leaks=False):
    """The refs of one split, and the number of broken entries in all splits. Raises DataError.

    `mixed` joins refcoco, refcoco+ and refcocog-umd. Their splits overlap, so its train leaves out
    the images in val and test splits of the three (G-Ref's google split is not compared).
    `keep_leaks` keeps these images, as DETRIS, the DCRIS authors' program, does.
    """
    parts = [read_refs(root, part) for part in (MIXED if name == "mixed" else (name,))]
    broken = [error for _, errors in parts for error in errors]
    if broken and not skip_broken:
        raise DataError(f"{broken[0]}; --skip-broken leaves such entries out")
    joined = [ref for splits, _ in parts for ref in splits.get(split, [])]
    if name == "mixed" and split == "train" and not keep_leaks:
        held_out = {ref.image_id for splits, _ in parts
                    for other, refs in splits.items() if other != "train" for ref in refs}
        joined = [ref for ref in joined if ref.image_id not in held_out]
    if not joined:
        found = dict.fromkeys(str(other) for splits, _ in parts for other in splits)
        raise DataError(f"{name} in {root} has no split {split!r}; found: {', '.join(found)}")
    return joined, len(broken)


def held_out_splits(root, name):
    """The splits to evaluate: all except train, in the order of the refs file, or else val."""
    return [split for split in read_refs(root, name)[0] if split != "train"] or ["val"]


def find_data_sets(root):
    """The refs files in ROOT: {NAME or NAME-SPLITBY: path}. Raises DataError if there is none."""
    found = {}
    for folder in sorted(Path(root).glob("*")):
        files = {path.stem.partition("(")[2][:-1]: path
                 for pattern in REFS_FILES for path in folder.glob(pattern)}
        for split_by, path in sorted(files.items()):
            main = SPLIT_BY.get(folder.name, split_by if len(files) == 1 else None)
            found[folder.name if split_by == main else f"{folder.name}-{split_by}"] = path
    if not found:
        deep = any(next(Path(root).glob(pattern), None) for pattern in REFS_FILES)
        raise DataError(f"{root}: no folder with a {' or '.join(REFS_FILES)} in it; "
                        f"{'name the folder above it' if deep else WHERE}")
    return found


class PlainUnpickler(pickle.Unpickler):
    """Builds only lists, dicts, strings and numbers. A plain unpickler runs what a file names."""

    def find_class(self, module, name):
        raise DataError(f"it asks for {module}.{name}, which could run code")


@functools.lru_cache(maxsize=len(MIXED))
def read_refs(root, name):
    """Reads a data set: its splits, {split: [Ref]}, and an error message per broken entry.

    Raises DataError if the data set or its images are missing, or a file is damaged.
    """
    files = find_data_sets(root)
    if name not in files:
        raise DataError(f"{root}: no data set {name!r}; found: {', '.join(files)}; {WHERE}")
    path = refs_file = files[name]
    try:
        with open(path, "rb") as file:          # a pickle of Python 2 or 3
            entries = (json.load(file) if path.suffix == ".json" else
                       PlainUnpickler(file, encoding="utf-8", errors="replace").load())
        if not entries or not isinstance(entries, list):
            raise ValueError("expected a list of refs")
        path = refs_file.with_name("instances.json")
        instances = json.loads(path.read_bytes())
        instances = {f"{kind} {entry['id']}": entry for kind in ("image", "annotation")
                     for entry in instances[f"{kind}s"]}
    except Exception as error:                  # damaged files raise errors of many types
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None
    folders = [path.parent / "images", Path(root, "images/train2014"),
               Path(root, "images/mscoco/images/train2014"), Path(root, "images")]
    if not any(place.is_dir() and any(place.iterdir()) for place in folders):
        raise DataError(f"no images in any of {', '.join(map(str, folders))}; {WHERE}")
    find_photo = functools.cache(lambda name: next(
        filter(os.path.isfile, (os.path.join(place, name) for place in folders)), None))
    splits, broken = {}, []
    for place, entry in enumerate(entries):
        try:
            ref = read_ref(place, entry, instances, find_photo)
            splits.setdefault(entry["split"], []).append(ref)
        except Exception as error:          # an entry of a wrong type can raise nearly anything
            broken.append(f"{refs_file}, entry {place}: not a usable ref ({reason(error)})")
    return splits, broken


def read_ref(place, entry, instances, find_photo):
    """Makes a Ref from entry number `place` of a refs file. A broken entry can raise any error."""
    image = instances[f"image {entry['image_id']}"]
    path = find_photo(image["file_name"])       # the entry's own file_name is not that of a file
    if not path:
        raise DataError(f"no image folder holds {image['file_name']}")
    ids, sentences = (part if isinstance(part, (list, tuple)) else [part]
                      for part in (entry["ann_id"], entry["sentences"]))
    if not ids or -1 in ids and ids != [-1]:
        raise DataError("ann_id is an object, a list of objects, or [-1] alone")
    objects = [] if ids == [-1] else [instances[f"annotation {i}"] for i in ids]
    if any(str(annotation["image_id"]) != str(image["id"]) for annotation in objects):
        raise DataError("its annotation is of another image")
    sentences = tuple(s if isinstance(s, str) else s["sent"] for s in sentences)
    segmentations = [annotation["segmentation"] for annotation in objects]
    if not all(segmentations) or not all(map(clean, sentences or [""])):
        raise DataError("its mask or an expression is empty")
    return Ref(entry.get("ref_id", place), entry["image_id"], path, int(image["width"]),
               int(image["height"]), segmentations, sentences)


# ---- Tokenizer ------------------------------------------------------------------------------

MERGES = 49152 - 256 - 2        # CLIP reads so many lines of its longer vocabulary file
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern. It uses \p{L} (letters) and \p{N} (numbers), which Python's `re` does not have. In
# `re`, \w is letters, numbers and "_". \d is decimal digits; NUMBERS adds others, like ² and Ⅳ.
NUMBERS = r"\d" + "".join(c for c in map(chr, range(sys.maxunicode + 1))
                          if c.isnumeric() and not c.isdecimal() and not c.isalpha())
PIECES = re.compile(r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)"
                    rf"|[^\W_{NUMBERS}]+|[{NUMBERS}]|(?:[^\w ]|_)+")
# CLIP's printable character for each of the 256 bytes, in the order of its vocabulary.
BYTES = {b: chr(b) for b in range(256) if "!" <= chr(b) <= "~" or "¡" <= chr(b) != "\xad"}
BYTES |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTES)}


def clean(text):
    """Resolves HTML entities (twice: "&amp;lt;" is common), makes all spaces plain, lowers case."""
    text = html.unescape(html.unescape(text)).strip()
    # Python also takes four control characters for spaces; CLIP does not.
    return re.sub(r"[^\S\x1c-\x1f]", " ", text).lower()


def symbols_of(piece):
    """The symbols of a piece of text before any merge: its bytes, the last marked as the end."""
    *word, last = (BYTES[b] for b in piece.encode("utf-8", errors="replace"))
    return (*word, last + "</w>")


def merge_pair(word, pair):
    """Merges every occurrence of `pair` in the symbols of `word`, from the left."""
    merged = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


class Tokenizer:
    """CLIP's byte-level BPE, from `bpe_simple_vocab_16e6.txt.gz` or a `merges.txt` (or its bytes).

    `tokenizer(texts, length)` gives token ids, int64 (B, length): start, pieces, end, then 0. A
    text that is too long keeps its end token last. Raises DataError if the file is no vocabulary.
    Reference: openai/CLIP's clip/simple_tokenizer.py, without its repair of garbled text (ftfy).
    """

    def __init__(self, path):
        try:
            raw = path if isinstance(path, bytes) else Path(path).read_bytes()
            raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
            self.text = raw.decode("utf-8")
            lines = self.text.split("\n")
            pairs = [tuple(line.split()) for line in lines[1:MERGES + 1] if line.strip()]
            if "#version" not in lines[0] or any(len(pair) != 2 for pair in pairs):
                raise ValueError("expected a #version line, then two symbols a line")
        except Exception as error:          # damaged gzip data raise errors of several types
            name = "the vocabulary" if isinstance(path, bytes) else f"{path} (--vocabulary)"
            raise DataError(f"{name}: not a BPE vocabulary ({reason(error)})") from None
        vocabulary = [symbol + end for end in ("", "</w>") for symbol in BYTES.values()]
        vocabulary += ["".join(pair) for pair in pairs] + [START, END]
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary)}
        self.ranks = {pair: i for i, pair in enumerate(pairs)}
        self.size = len(vocabulary)

    @functools.cache                        # most words come again
    def piece_ids(self, piece):
        """The ids of one piece of text: its bytes, merged in the order of the vocabulary."""
        word = (piece,) if piece in (START, END) else symbols_of(piece)
        while pairs := [pair for pair in zip(word, word[1:]) if pair in self.ranks]:
            word = merge_pair(word, min(pairs, key=self.ranks.get))
        return [self.ids[symbol] for symbol in word]

    def encode(self, text):
        """The ids of a text of any length, without start and end."""
        return [i for piece in PIECES.findall(clean(text)) for i in self.piece_ids(piece)]

    def __call__(self, texts, length):
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.ids[START], *self.encode(text)[:length - 2], self.ids[END]]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ---- Hugging Face's tables of RefCOCO -------------------------------------------------------

@contextlib.contextmanager
def drafting(folder):
    """A folder to write to, which becomes `folder` when it is complete. DataError if it exists."""
    if folder.exists():
        raise DataError(f"{folder} exists already; name another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".tmp") as temporary:
        draft = Path(temporary, folder.name)
        (draft / "images").mkdir(parents=True)
        yield draft
        draft.rename(folder)


def convert_tables(files, folder):
    """Writes Hugging Face's tables of RefCOCO (parquet) as a REFER data set. Raises DataError."""
    import pyarrow.parquet                  # no other command needs it
    images, annotations, refs = {}, {}, []
    with drafting(folder) as draft:
        for file in dict.fromkeys(files):
            place, row = 0, {}
            try:
                for place, row in enumerate(pyarrow.parquet.read_table(file).to_pylist()):
                    for image, annotation, ref in read_row(row, draft):
                        images[image["id"]] = image
                        annotations[annotation["id"]] = annotation
                        refs.append(ref)
            except Exception as error:      # a file or table of another kind can raise anything
                raise DataError(f"{file}, row {place}: not read as jxu124/refcoco or moondream/"
                                f"refcoco-m ({reason(error)}); columns: {', '.join(row)}") from None
        coco = {"images": [*images.values()], "annotations": [*annotations.values()]}
        split_by = SPLIT_BY.get(folder.name, folder.name) or "umd"      # as jxu124/refcocog
        (draft / "instances.json").write_text(json.dumps(coco, default=bytes.decode))
        (draft / f"refs({split_by}).json").write_text(json.dumps(refs))


def read_row(row, draft):
    """Yields, for each ref of a table's row, its image and annotation as in COCO, and the ref."""
    if "raw_anns" in row:                   # jxu124's: one ref, the photo is elsewhere
        yield (json.loads(row["raw_image_info"]), json.loads(row["raw_anns"]), {
            key: row[key] for key in ("ref_id", "ann_id", "image_id", "split", "sentences")})
        return
    name, image_id = Path(row["file_name"]).name, row["image_id"]       # refcoco-m's: a photo
    (draft / "images" / name).write_bytes(row["image"]["bytes"])
    for sample in row["samples"]:
        height, width = sample["mask"]["size"]              # of an RLE, whose counts are bytes
        yield ({"id": image_id, "file_name": name, "width": width, "height": height},
               {"id": sample["id"], "image_id": image_id, "segmentation": sample["mask"]},
               {"ref_id": sample["id"], "ann_id": sample["id"], "image_id": image_id,
                "split": "val", "sentences": sample["sentences"]})


# ---- Drawn data: scenes of figures, and expressions that refer to exactly one of them -------

# Number of corners, and radius of even and odd corners (so that all kinds look equally large).
KINDS = {"circle": (32, 1.0, 1.0), "square": (4, 1.15, 1.15), "triangle": (3, 1.35, 1.35),
         "star": (10, 1.3, 0.65), "diamond": (4, 1.5, 0.8)}
EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "lowest": (0, 1)}
SCENES = {"shapes": {"train": 6500, "val": 150, "test": 150},
          "shapes-b": {"train": 4700, "val": 150, "test": 150}}
CANVASES = ((64, 64), (64, 48), (48, 64), (64, 56), (56, 64))
FINE = 4                            # pictures are drawn so many times larger, then averaged
ROW, COLUMN = np.mgrid[:64 * FINE, :64 * FINE] % (5 * FINE) / (5 * FINE)
LIGHTER = {"striped": Image.fromarray(COLUMN < 0.4),        # where a figure of a texture is lighter
           "dotted": Image.fromarray(np.hypot(COLUMN - 0.5, ROW - 0.5) < 0.32)}

# What the scenes of a drawn data set are made of, and the words for it.
Domain = namedtuple("Domain", "colours sizes kinds textures relations shares ground noise")
DOMAINS = {
    "shapes": Domain(
        colours={"red": (214, 48, 49), "green": (39, 154, 74), "blue": (41, 98, 214),
                 "yellow": (241, 196, 15), "purple": (136, 62, 168), "orange": (232, 126, 34)},
        sizes={"small": (0.13, 0.15), "large": (0.20, 0.235)},      # radius, of the longer side
        kinds=("circle", "square", "triangle", "star"), textures=(),      # none is named
        relations={"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)},
        shares=(0.5, 0.3, 0.2),         # of expressions by appearance, by place, by relation
        ground=(200, 245), noise=5),    # range of brightness, and standard deviation, of 255
    "shapes-b": Domain(
        colours={"pink": (240, 130, 175), "teal": (20, 140, 140), "brown": (125, 75, 40),
                 "lime": (165, 215, 40), "navy": (25, 35, 110), "coral": (235, 95, 75)},
        sizes={"little": (0.13, 0.15), "big": (0.20, 0.235)},
        kinds=("circle", "square", "triangle", "star", "diamond"),
        textures=("plain", "striped", "dotted"),
        relations={"to the left of": (-1, 0), "to the right of": (1, 0), "over": (0, -1),
                   "under": (0, 1), "nearest to": (0, 0)},
        shares=(0.4, 0.25, 0.35), ground=(150, 250), noise=14),
}
# The words of all domains. Each becomes one token of each vocabulary, so a text tower that was
# trained on one domain can be tuned on the other. It still has to learn what the new words mean.
WORDS = sorted({word for domain in DOMAINS.values() for names in domain[:5]
                for name in names for word in name.split()})
# The words for a figure; in pixels: its centre, the radius of a circle around it, its outline.
Figure = namedtuple("Figure", "size texture colour kind x y radius points")


def invent_figures(rng, width, height, domain=DOMAINS["shapes"]):
    """Two to four figures that do not touch."""
    figures, side, number = [], max(width, height), rng.randint(2, 4)
    for attempt in itertools.count(1):
        kind, size = rng.choice(domain.kinds), rng.choice(list(domain.sizes))
        radius = side * rng.uniform(*domain.sizes[size])
        reach = radius * KINDS[kind][1] + 1
        for _ in range(5):              # places to try
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            if all(math.hypot(x - f.x, y - f.y) > reach + f.radius for f in figures):
                turn = rng.uniform(-0.05, 0.05) + (math.pi / 4 if kind == "square" else 0)
                count, *radii = KINDS[kind]
                points = [(x + radius * radii[i % 2] * math.sin(2 * math.pi * i / count + turn),
                           y - radius * radii[i % 2] * math.cos(2 * math.pi * i / count + turn))
                          for i in range(count)]
                colour = rng.choice(list(domain.colours))
                texture = rng.choice(domain.textures) if domain.textures else ""
                figures.append(Figure(size, texture, colour, kind, x, y, reach, points))
                break
        if len(figures) == number:
            return figures
        if attempt % 40 == 0:           # no room is left: begin again
            figures.clear()


def phrases_of(figure):
    """All true descriptions of a figure, such as "red star" or "large shape"."""
    choices = ("", figure.size), ("", figure.texture), ("", figure.colour), ("shape", figure.kind)
    phrases = (" ".join(filter(None, words)) for words in itertools.product(*choices))
    return list(dict.fromkeys(phrases))         # a figure without texture gives each one twice


def expressions(figure, figures, margin, domain=DOMAINS["shapes"]):
    """All expressions that refer to this figure alone: by appearance, by place, by relation.

    Places and relations compare the figures' centres, which must differ by `margin` (pixels).
    """
    appearances, places, relations = [], [], []
    named = [(phrase, f) for f in figures for phrase in phrases_of(f)]
    times = Counter(phrase for phrase, _ in named)
    for phrase in phrases_of(figure):
        rivals = [f for other, f in named if other == phrase and f is not figure]
        if not rivals:
            appearances.append(f"the {phrase}")
            continue
        for word, (dx, dy) in EXTREMES.items():
            if all((figure.x - f.x) * dx + (figure.y - f.y) * dy > margin for f in rivals):
                places.append(f"the {word} {phrase}")
        anchors = [(p, f) for p, f in named if times[p] == 1 and f not in (figure, *rivals)]
        for anchor, at in anchors:
            near, *far = [math.hypot(f.x - at.x, f.y - at.y) for f in (figure, *rivals)]
            for word, (dx, dy) in domain.relations.items():
                ahead, *behind = [(f.x - at.x) * dx + (f.y - at.y) * dy for f in (figure, *rivals)]
                nearest = word == "nearest to" and near < min(far) - margin
                if nearest or ahead > margin and max(behind) < -margin:
                    relations.append(f"the {phrase} {word} the {anchor}")
    return appearances, places, relations


def draw_picture(rng, figures, width, height, domain):
    """The picture of a scene: figures on a plain, noisy ground, antialiased."""
    ground = tuple(rng.randint(*domain.ground) for _ in range(3))
    image = Image.new("RGB", (width * FINE, height * FINE), ground)
    for figure in figures:
        colour = tuple(c + rng.randint(-14, 14) for c in domain.colours[figure.colour])
        inside = Image.new("1", image.size)
        ImageDraw.Draw(inside).polygon([(x * FINE, y * FINE) for x, y in figure.points], fill=1)
        image.paste(colour, mask=inside)
        if figure.texture in LIGHTER:
            lighter = tuple(90 + c * 165 // 255 for c in colour)
            image.paste(lighter, mask=ImageChops.logical_and(inside, LIGHTER[figure.texture]))
    image = image.resize((width, height), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, domain.noise, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def draw_scene(rng, domain, image_id, path, coco, refs):
    """Draws one scene into the file `path`, and adds its entries to `coco` and `refs`."""
    width, height = rng.choice(CANVASES)
    figures = invent_figures(rng, width, height, domain)
    draw_picture(rng, figures, width, height, domain).save(path, quality=92)
    coco["images"].append({"id": image_id, "file_name": path.name,
                           "width": width, "height": height})
    described = []
    for figure in figures:
        coco["annotations"].append({
            "id": len(coco["annotations"]) + 1, "image_id": image_id, "iscrowd": 0,
            "category_id": list(KINDS).index(figure.kind) + 1,
            "segmentation": [[round(v, 2) for point in figure.points for v in point]]})
        choices = expressions(figure, figures, 0.06 * max(width, height), domain)
        if any(choices):
            weights = [share if texts else 0 for share, texts in zip(domain.shares, choices)]
            sentences = {rng.choice(texts) for texts in rng.choices(choices, weights, k=3)}
            described.append((coco["annotations"][-1], sorted(sentences)))
    for annotation, sentences in rng.sample(described, min(2, len(described))):
        refs.append({
            "ref_id": len(refs) + 1, "ann_id": annotation["id"], "image_id": image_id,
            "category_id": annotation["category_id"], "split": path.stem.split("_")[1],
            "file_name": f"{path.stem}_{annotation['id']}.jpg",
            "sentences": [{"sent": s, "raw": s, "tokens": s.split(), "sent_id": 10 * len(refs) + i}
                          for i, s in enumerate(sentences)]})


def draw_shapes(root, scenes=None, seed=0, name="shapes"):
    """Draws a data set of DOMAINS into ROOT/NAME, in the REFER layout, and returns that folder.

    `scenes` is {split: number}, by default SCENES[NAME]. Two figures of each scene have up to three
    expressions each. The vocabulary `merges.txt` is learned from those of train, and WORDS.
    """
    folder = Path(root, name)
    with drafting(folder) as draft:
        coco, refs = {"images": [], "annotations": []}, []
        coco["categories"] = [{"id": i, "name": kind} for i, kind in enumerate(KINDS, 1)]
        todo = [split for split, number in (scenes or SCENES[name]).items() for _ in range(number)]
        for image_id, split in enumerate(tqdm(todo, desc=f"drawing {name}", unit="scene"), 1):
            path = draft / "images" / f"{name}_{split}_{image_id:06d}.jpg"
            rng = random.Random(f"{seed} {split} {image_id}")
            draw_scene(rng, DOMAINS[name], image_id, path, coco, refs)
        (draft / "instances.json").write_text(json.dumps(coco))
        (draft / f"refs({name}).p").write_bytes(pickle.dumps(refs, protocol=2))
        texts = [s["sent"] for ref in refs if ref["split"] == "train" for s in ref["sentences"]]
        (draft / "merges.txt").write_text(learn_merges(texts + WORDS), encoding="utf-8")
    return folder


def learn_merges(texts):
    """Learns a `merges.txt`: the most frequent pair is merged until each word is one symbol."""
    words = Counter(symbols_of(piece) for text in texts for piece in clean(text).split())
    lines = ["#version: 0.2"]
    while any(len(word) > 1 for word in words):
        pairs = Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        lines.append(" ".join(best))
        words = {merge_pair(word, best): times for word, times in words.items()}
    return "\n".join(lines) + "\n"


# ---- Command line ---------------------------------------------------------------------------

def check(root):
    """Prints a table of the data sets in ROOT, all masks decoded. DataError if one is broken."""
    names, failed = find_data_sets(root), []
    print("| data set | split | refs | expressions | |\n|---|---|---:|---:|---|")
    for name in names:
        try:
            splits, broken = read_refs(root, name)
            for split, refs in splits.items():
                counts = len(refs), sum(len(ref.sentences) for ref in refs)
                published = PUBLISHED_SIZES.get(name, {}).get(split)
                differs = "published: {:,} and {:,}".format(*published) if published else ""
                verdict = "as published" if counts == published else differs
                print(f"| {name} | {split} | {counts[0]:,} | {counts[1]:,} | {verdict} |")
            if broken:
                raise DataError(f"{len(broken):,} broken entries, the first: {broken[0]}")
            for ref in tqdm([*itertools.chain(*splits.values())], name, leave=False):
                decode_mask(ref)
        except DataError as error:
            print(f"| {name} | broken | | | {error} |")
            failed.append(name)
    if failed:
        raise DataError(f"{root}: broken: {', '.join(failed)}")


def main():
    parser = argparse.ArgumentParser(usage="\n" + __doc__.split("\n\n")[1])
    parser.add_argument("command", choices=[*DOMAINS, "check", "parquet"])
    parser.add_argument("paths", metavar="PATH", nargs="+")
    args = parser.parse_args()
    *files, folder = map(Path, args.paths)
    try:
        if bool(files) != (args.command == "parquet"):
            raise DataError("parquet takes files and a folder, the other commands one folder")
        if args.command == "check":
            check(folder)
        elif args.command == "parquet":
            convert_tables(files, folder)
            print(folder)
        else:
            print(draw_shapes(folder, name=args.command))
    except (DataError, OSError, ImportError, KeyboardInterrupt) as error:
        parser.exit(2, f"data.py: {str(error) or 'interrupted'}\n")


if __name__ == "__main__":
    main()
