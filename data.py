"""From files to tensors: CLIP's tokenizer, REFER data sets, the letterbox, and drawn data.

    python data.py shapes DIR       draws the `shapes` data set into DIR/shapes
    python data.py shapes-b DIR     draws the second domain into DIR/shapes-b
    python data.py check DIR        compares the data sets found in DIR with their published sizes

A REFER data set is a folder `DATA/NAME` with `instances.json` (COCO's annotations) and
`refs(SPLITBY).p` (who is meant, and in which words), read as it is: no conversion, no database.
"""

import argparse
import functools
import gzip
import html
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import sys
import tempfile
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm


class DataError(ValueError):
    """Data that cannot be used; the message says which file and entry, and what to do."""


# ---------------------------------------------------------------------------------------------
# Photos and the letterbox
# ---------------------------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)          # CLIP's, also for DINOv2, as the authors did
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
MOST_PIXELS = 64_000_000
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")     # none runs programs


def normalise(images):
    """uint8 (B, 3, S, S) to what the towers read, float32."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def read_photo(path, upright=False):
    """An RGB image. DataError for what is none, cut short or absurdly large.

    EXIF's rotation is applied only if it shall be `upright`, as a phone's photo should: COCO's
    polygons belong to the pixels as they are stored.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # seen to here
            image = Image.open(path, formats=PHOTO_FORMATS)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} pixels; at most "
                                f"{MOST_PIXELS:,} are read, make it smaller")
            if image.mode.startswith("I;16"):       # 16-bit grey, which PIL would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise DataError(f"{path}: an image of 32-bit numbers, whose range is anybody's "
                                f"guess; save it as 8 or 16 bits")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too large to be a photo ({error})") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image") from None
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError) as error:         # what PIL's decoders raise
        raise DataError(f"{path}: broken image ({error})") from None


def letterbox_place(width, height, size):
    """How a photo lies in its letterbox: scale, left, top.

    Pixel (x, y) of the photo comes to (left + scale * x, top + scale * y) of the square, as in the
    authors' programs. The centre of the first pixel is (0, 0), here and there.
    """
    scale = size / max(width, height)
    return scale, (size - scale * width) / 2, (size - scale * height) / 2


def letterbox(photo, size):
    """A photo (PIL, RGB) on a square: longer side resized to `size`, centred, uint8 (3, S, S).

    Bicubic, with the mean colour around it.
    """
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.float32)
    columns = torch.from_numpy(np.array(photo.transpose(Image.Transpose.TRANSPOSE))).flatten(1)
    columns = (columns - colour.repeat(photo.height)).unflatten(1, (-1, 3))         # (W, H, 3)
    square = warp(columns, *letterbox_place(*photo.size, size), size, size)
    return to_bytes(square + colour[:, None, None])


def letterbox_mask(mask, size):
    """A mask, uint8 (H, W), 0 and 255, on a square at its photo's place: bilinear, 0 around it."""
    height, width = mask.shape
    place = letterbox_place(width, height, size)
    return to_bytes(warp(mask.t()[..., None].float(), *place, size, size, cubic=False))  # (1, S, S)


def unletterbox(square, width, height):
    """A square map (S, S) back at the photo's own size (height, width): bicubic, 0 outside."""
    scale, left, top = letterbox_place(width, height, square.shape[-1])
    return warp(square.t()[..., None].float(), 1 / scale, -left / scale, -top / scale,
                width, height)[0]


def to_bytes(x):
    return x.round_().clamp_(0, 255).byte().contiguous()


def warp(image, scale, left, top, width, height, cubic=True):
    """Resizes and moves: what was at (x, y) comes to (left + scale * x, top + scale * y).

    Image (W, H, C), float, to (C, height, width); bicubic or bilinear, whatever the scale (no
    antialiasing), 0 outside of the image. This is OpenCV 4's cv2.warpAffine, with which the
    authors' programs resize photos, masks and predictions; without a rotation, columns and rows can
    be resized one after the other. OpenCV rounds places to 1/32 pixel (5.0 no longer does).
    """
    if width * image.shape[1] > height * len(image):        # the axis that leaves less comes first
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
    """For each new pixel: the 4 (bicubic, a = -0.75) or 2 (bilinear) old ones it is computed from.

    A row of `length` pixels, of which pixel x comes to shift + scale * x, to `side` new ones:
    indices and weights (side, 4), 0 beyond the row's ends.
    """
    x = torch.arange(side, dtype=torch.float64)
    place = (1024 * x / scale).round() - round(1024 * shift / scale)        # in 1/1024 pixel
    place = ((place + 16) / 32).floor()[:, None] / 32                       # to 1/32, in pixels
    offsets = torch.arange(-1, 3) if cubic else torch.arange(2)
    index = place.floor().long() + offsets
    distance = (place - index).abs()
    weights = 1 - distance
    if cubic:
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1                          # up to 1
        far = -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3           # 1 to 2
        weights = torch.where(distance <= 1, near, far)
    weights = (weights * ((index >= 0) & (index < length))).float()
    return index.clamp(0, length - 1).to(device), weights.to(device)


# ---------------------------------------------------------------------------------------------
# The two data sets: one for training, one for evaluation
# ---------------------------------------------------------------------------------------------

class TrainSet(Dataset):
    """One sample per ref, in one of its expressions.

    `dataset[epoch, index]` depends on seed, epoch and index alone: a dictionary of image, uint8
    (3, S, S); tokens, int64 (L,); mask, uint8 (1, S, S), 0 to 255; ref, its id. With `skip_broken`
    a ref whose photo or mask is broken gives way to the next one, and `skipped` counts it.
    """

    def __init__(self, refs, tokenizer, image_size, length, seed=0, skip_broken=False):
        self.refs, self.tokenizer, self.seed = refs, tokenizer, seed
        self.image_size, self.length, self.skip_broken = image_size, length, skip_broken

    def __len__(self):
        return len(self.refs)

    def __getitem__(self, place):
        epoch, index = place
        for skipped in range(len(self.refs)):
            ref = self.refs[(index + skipped) % len(self.refs)]
            try:
                photo, mask = read_pair(ref)
                break
            except DataError:
                if not self.skip_broken:
                    raise
        else:
            raise DataError("every photo is broken")
        sentence = random.Random(f"{self.seed} {epoch} {index}").choice(ref.sentences)
        return {"image": letterbox(photo, self.image_size),
                "tokens": self.tokenizer([sentence], self.length)[0],
                "mask": letterbox_mask(mask, self.image_size), "ref": str(ref.id),
                "skipped": skipped}


class ExpressionSet(Dataset):
    """Every expression of every ref once, for evaluation.

    A dictionary of image, uint8 (3, S, S); tokens, int64 (L,); mask at the photo's own size, bool
    (H, W); index. With `skip_broken` None stands for an expression whose photo or mask is broken.
    """

    def __init__(self, refs, tokenizer, image_size, length, skip_broken=False):
        self.pairs = [(ref, sentence) for ref in refs for sentence in ref.sentences]
        self.tokenizer, self.image_size = tokenizer, image_size
        self.length, self.skip_broken = length, skip_broken
        self.last = None, None              # a ref and what was read of it, for its next expression

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        ref, sentence = self.pairs[index]
        try:
            if self.last[0] is not ref:
                photo, mask = read_pair(ref)
                self.last = ref, (letterbox(photo, self.image_size), mask > 0)
        except DataError:
            if not self.skip_broken:
                raise
            return None
        image, mask = self.last[1]
        return {"image": image, "tokens": self.tokenizer([sentence], self.length)[0],
                "mask": mask, "index": index}


def read_pair(ref):
    """The photo of a ref (PIL, RGB) and its mask, uint8 (height, width), 0 and 255."""
    photo = read_photo(ref.image)
    if photo.size != (ref.width, ref.height):
        raise DataError(f"{ref.image}: {photo.width}x{photo.height} pixels, but instances.json "
                        f"says {ref.width}x{ref.height}")
    return photo, torch.from_numpy(decode_mask(ref) * 255)


# ---------------------------------------------------------------------------------------------
# REFER data sets
# ---------------------------------------------------------------------------------------------

class Sizes(NamedTuple):
    """How many refs and expressions the splits of a data set have."""
    refs: dict
    expressions: dict


# Expressions of G-Ref as commonly reported; all else from the refer toolkit's files.
PUBLISHED_SIZES = {
    "refcoco": Sizes(
        {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
        {"train": 120624, "val": 10834, "testA": 5657, "testB": 5095}),
    "refcoco+": Sizes(
        {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
        {"train": 120191, "val": 10758, "testA": 5726, "testB": 4889}),
    "refcocog-umd": Sizes(
        {"train": 42226, "val": 2573, "test": 5023},
        {"train": 80512, "val": 4896, "test": 9602}),
    "refcocog-google": Sizes(
        {"train": 44822, "val": 5000}, {"train": 85474, "val": 9536}),
}
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc"}        # where a folder holds several
MIXED = ("refcoco", "refcoco+", "refcocog-umd")
# Tokens per expression, both ends included, as the authors cut them.
LENGTHS = {"refcoco": 17, "refcoco+": 17, "refcocog-umd": 22, "refcocog-google": 22, "mixed": 22}
WHERE = ("the README says where RefCOCO, RefCOCO+, RefCOCOg and the COCO images are to be had, and "
         "`python data.py shapes DIR` draws a data set")


class Ref(NamedTuple):
    """One thing meant: its photo, its outline, and the expressions that mean it."""
    id: int
    image_id: int
    image: str                  # path
    width: int
    height: int
    segmentation: object        # polygons or RLE, in COCO's form
    sentences: tuple


class PlainUnpickler(pickle._Unpickler):
    """Builds plain values (lists, dicts, sets, strings, numbers): a pickle can name any program.

    It is Python's unpickler, as C's takes memory up to the highest index that a file names. Tuples
    become lists, which are no keys: to hash a = (b, b), b = (c, c), ... takes exponential time.
    """
    def listed(count):
        def load(self):
            self.stack[-count:] = [self.stack[-count:]]
        return load

    dispatch = {**pickle._Unpickler.dispatch, pickle.TUPLE[0]: pickle._Unpickler.load_list,
                pickle.EMPTY_TUPLE[0]: pickle._Unpickler.load_empty_list,
                pickle.TUPLE1[0]: listed(1), pickle.TUPLE2[0]: listed(2),
                pickle.TUPLE3[0]: listed(3)}

    def find_class(self, module, name):
        raise DataError(f"it asks for {module}.{name}, which could run code; a refs file holds "
                        f"only lists, dicts, strings and numbers. Refused")

    def persistent_load(self, pid):
        raise DataError(f"it refers to an object outside ({pid!r}). Refused")


def locate(data, name):
    """The folder and the refs file of a data set NAME or NAME-SPLITBY. Raises DataError."""
    data = Path(data)
    if not data.is_dir():
        raise DataError(f"{data}: no such data folder; {WHERE}")
    folder, split_by = data / name, SPLIT_BY.get(name)
    if not folder.is_dir() and "-" in name:
        folder, split_by = data / name.rsplit("-", 1)[0], name.rsplit("-", 1)[1]
    if not (folder / "instances.json").is_file():
        found = sorted(p.parent.name for p in data.glob("*/instances.json"))
        raise DataError(f"{data}: no data set {name!r} (no {folder / 'instances.json'}); found: "
                        f"{', '.join(found) or 'none'}; {WHERE}")
    files = sorted(folder.glob("refs(*).p"))
    chosen = [f for f in files if f.name == f"refs({split_by}).p"] if split_by else files
    if len(chosen) != 1:
        splits = [f.name[5:-3] for f in files]
        raise DataError(
            f"{folder}: no refs({split_by or '*'}).p; found: {', '.join(splits) or 'none'}"
            if not chosen else
            f"{folder}: several refs files; name one: "
            f"{', '.join(f'{folder.name}-{s}' for s in splits)}")
    return folder, chosen[0]


def load_refs_file(path):
    try:
        with open(path, "rb") as file:
            refs = PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    except DataError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    except OSError:
        raise
    except Exception as error:          # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable pickle ({one_line(repr(error))})") from None
    if not isinstance(refs, list):
        raise DataError(f"{path}: holds a {type(refs).__name__} where a list of refs is expected")
    return refs


def one_line(message):
    """What can be shown of a message that quotes a file, in which anything may stand."""
    return "".join(c if c.isprintable() else "?" for c in str(message)[:300])


def by_id(entries):
    """Entries by their id; None for an id that two different entries have."""
    table = {}
    for entry in entries:
        if table.setdefault(entry["id"], entry) is not entry and table[entry["id"]] != entry:
            table[entry["id"]] = None
    return table


def load_instances(path):
    """Images and annotations of instances.json, both by id."""
    try:
        with open(path, encoding="utf-8") as file:
            instances = json.load(file)
        return by_id(instances["images"]), by_id(instances["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not COCO annotations ({type(error).__name__}: "
                        f"{one_line(error)})") from None


@functools.lru_cache(maxsize=len(MIXED))
def read_refs(data, name, skip_broken=False):
    """All splits of one data set: {split: [Ref]}, and how many broken entries were left out.

    Raises DataError for the first broken entry (its file, place and field), unless `skip_broken`.
    """
    folder, path = locate(data, name)
    refs = load_refs_file(path)
    images, annotations = load_instances(folder / "instances.json")
    photos = photo_folder([Path(data, "images", "train2014"),
                           Path(data, "images", "mscoco", "images", "train2014"),
                           Path(data, "images"), folder / "images"], images)
    present = set(os.listdir(photos))
    splits, skipped = {}, 0
    for place, entry in enumerate(refs):
        try:
            ref = read_ref(entry, images, annotations, photos, present)
        except (DataError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            if not skip_broken:
                what = (error if isinstance(error, DataError) else
                        f"no {error}" if isinstance(error, KeyError) else f"not a ref ({error})")
                raise DataError(f"{path}, entry {place}: {one_line(what)}; --skip-broken leaves "
                                f"such entries out") from None
            skipped += 1
        else:
            splits.setdefault(entry["split"], []).append(ref)
    return splits, skipped


def photo_folder(folders, images):
    """The first of these folders that holds a photo of the data set (the first few are tried)."""
    names = [str(image["file_name"]) for image in list(images.values())[:20]
             if isinstance(image, dict) and "file_name" in image]
    for folder in folders:
        if any(os.path.isfile(f"{folder}/{name[:255]}") for name in names):
            return folder
    some = one_line(", ".join(names[:3])) or "(no file_name)"
    raise DataError(f"no images: none of {some}, ... is in "
                    f"{', '.join(map(str, folders))}; {WHERE}")


def read_ref(entry, images, annotations, photos, present):
    """The Ref of one entry of a refs file."""
    # The ref's own file_name carries an annotation's suffix: the image goes by its id.
    ref_id, image_id, ann_id = (entry[key] for key in ("ref_id", "image_id", "ann_id"))
    if not all(isinstance(key, (int, str)) for key in (ref_id, image_id, ann_id)):
        raise DataError("ref_id, image_id or ann_id is neither a number nor a name")
    if ann_id not in annotations:
        raise DataError(f"ref {ref_id}: annotation {ann_id} is not in instances.json")
    if image_id not in images:
        raise DataError(f"ref {ref_id}: image {image_id} is not in instances.json")
    if annotations[ann_id] is None or images[image_id] is None:
        raise DataError(f"ref {ref_id}: instances.json has several images {image_id}, or "
                        f"annotations {ann_id}")
    image, segmentation = images[image_id], annotations[ann_id].get("segmentation")
    if not segmentation:
        raise DataError(f"ref {ref_id}: annotation {ann_id} has no mask")
    name, width, height = image["file_name"], image["width"], image["height"]
    if len(name) > 255:
        raise DataError(f"image {image_id}: a file_name of {len(name)} characters")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"image {image_id}: file_name {name!r} leads out of the image folder")
    if not (isinstance(width, int) and isinstance(height, int)
            and width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise DataError(f"image {image_id}: a size of {width}x{height}")
    if name not in present and not (photos / name).is_file():
        raise DataError(f"image {image_id}: {photos / name} is missing")
    sentences = tuple(sentence["sent"] for sentence in entry["sentences"])
    if not sentences or not all(clean(sentence) for sentence in sentences):
        raise DataError(f"ref {ref_id}: an expression is empty")
    if not isinstance(entry["split"], str):
        raise DataError(f"ref {ref_id}: the split is no name")
    return Ref(ref_id, image_id, str(photos / name), width, height, segmentation, sentences)


def read_split(data, name, split, skip_broken=False, keep_leaks=False):
    """The refs of one split, and how many broken entries were left out. Raises DataError.

    `mixed` joins refcoco, refcoco+ and refcocog-umd. Their splits overlap, so its train leaves out
    every image that stands in a val or test split of any of the three; `keep_leaks` joins them as
    they are, which is what DCRIS's authors trained on. (G-Ref's google split is not looked at.)
    """
    parts = MIXED if name == "mixed" else (name,)
    joined, held_out, skipped, found = [], set(), 0, set()
    for part in parts:
        splits, broken = read_refs(data, part, skip_broken)
        joined += splits.get(split, [])
        skipped += broken
        found |= splits.keys()
        held_out |= {ref.image_id for s, refs in splits.items() if s != "train" for ref in refs}
    if name == "mixed" and split == "train" and not keep_leaks:
        joined = [ref for ref in joined if ref.image_id not in held_out]
    if not joined:
        raise DataError(f"{name} in {data} has no split {split!r}; found: "
                        f"{one_line(', '.join(sorted(found))) or 'none'}")
    return joined, skipped


def held_out_splits(data, name, skip_broken=False):
    """The names of a data set's splits but for train, in the order of its refs file."""
    names = [split for split in read_refs(data, name, skip_broken)[0] if split != "train"]
    if not names:
        raise DataError(f"{name} in {data} has no split but train; add --split train")
    return names


def run_lengths_of(counts):
    """The run lengths in a compressed RLE string: differences to the last but one, base 32."""
    lengths, value, shift = [], 0, 0
    for c in counts:
        bits = ord(c) - 48
        if not 0 <= bits < 64:
            raise DataError("RLE counts that are no compressed RLE")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:               # negative
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def decode_mask(ref):
    """The mask of a ref, uint8 (height, width) of 0 and 1. DataError where there is none."""
    try:
        if isinstance(ref.segmentation, dict):
            rle = ref.segmentation
            if list(rle["size"]) != [ref.height, ref.width]:
                raise DataError(f"RLE of size {rle['size']}")
            counts = rle["counts"]
            counts = counts if isinstance(counts, list) else run_lengths_of(counts)
            # pycocotools leaves the rest of a short one undefined.
            if any(type(n) is not int or n < 0 for n in counts) or sum(counts) != (
                    ref.height * ref.width):
                raise DataError("RLE counts that do not fill the image")
            rle = pycocotools.mask.frPyObjects({"size": rle["size"], "counts": counts},
                                               ref.height, ref.width)
        else:
            # Two points are no area (and pycocotools would take them for a box).
            polygons = [polygon for polygon in ref.segmentation
                        if len(polygon) >= 6 and len(polygon) % 2 == 0]
            if not polygons:
                raise DataError("no polygon of three points or more")
            # pycocotools takes memory for every pixel of an outline, also outside of the image.
            if not (np.abs(np.concatenate(polygons)) < 4 * max(ref.width, ref.height)).all():
                raise DataError("coordinates far outside of the image")
            rle = pycocotools.mask.merge(
                pycocotools.mask.frPyObjects(polygons, ref.height, ref.width))
        mask = pycocotools.mask.decode(rle)
        if not mask.any():
            raise DataError("an empty mask")
    except (DataError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"ref {one_line(ref.id)} of {ref.image}, {ref.width}x{ref.height}: "
                        f"unusable segmentation in instances.json ({one_line(what)})") from None
    return mask


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------

MERGES = 49152 - 256 - 2        # CLIP reads so many lines of its longer vocabulary file
MOST_BYTES = 50_000_000                # of a vocabulary; CLIP's has 3.2 million
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern, to be matched on `kinds(text)` in place of the text.
PIECES = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[a-z]+|0|[^ a-z0]+")

LONGEST = 2_000             # characters of an expression


def clean(text):
    """Lower case, HTML entities resolved (twice: "&amp;lt;" is common), only plain spaces.

    DataError for an absurdly long text: to merge a word of n letters takes n squared steps.
    """
    if len(text) > LONGEST:
        raise DataError(f"an expression of {len(text):,} characters; at most {LONGEST:,} are read")
    text = html.unescape(html.unescape(text)).strip()
    return "".join(" " if is_space(c) else c for c in text).lower()


def is_space(character):
    # str.isspace() also takes four control characters for spaces that CLIP's pattern does not.
    return character.isspace() and not "\x1c" <= character <= "\x1f"


def kinds(text):
    r"""The text with every character replaced by one that stands for its kind.

    Python's `re` knows no \p{L} and \p{N}, so letters become ASCII letters, numbers (also ² and Ⅳ)
    "0", spaces " ", all else "!". What CLIP's pattern names literally stays as it is; "ſ" equals
    "s" where case is ignored, as it is there. "z" occurs in none of its literals.
    """
    def kind(c):
        if c.isascii() and (c.isalpha() or c in "'<|>"):
            return c.lower()
        if c == "ſ":
            return "s"
        category = unicodedata.category(c)[0]
        return "z" if category == "L" else "0" if category == "N" else " " if is_space(c) else "!"
    return "".join(map(kind, text))


@functools.cache
def byte_symbols():
    """CLIP's printable character for each of the 256 bytes, in the order of its vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return dict(zip(printable + others,
                    [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]))


def symbols_of(piece):
    """The symbols of a piece of text before any merge: its bytes, the last marked as the end."""
    *word, last = (byte_symbols()[b] for b in piece.encode("utf-8", errors="replace"))
    return (*word, last + "</w>")


def merge_pair(word, pair):
    """The symbols of `word` with every occurrence of `pair`, from the left, made one."""
    merged, i = [], 0
    while i < len(word):
        if word[i:i + 2] == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


class Tokenizer:
    """CLIP's byte-level BPE, from `bpe_simple_vocab_16e6.txt.gz` or a `merges.txt` (or its bytes).

    `tokenizer(texts, length)` gives token ids, int64 (B, length): start, pieces, end, then 0. A
    text too long keeps its end token last. Raises DataError where the file is no vocabulary.
    Reference: https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py, of which only the
    repair of garbled encodings (ftfy) is left out.
    """

    def __init__(self, path):
        try:
            with io.BytesIO(path) if isinstance(path, bytes) else open(path, "rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                raw = (gzip.GzipFile(fileobj=file) if packed else file).read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES:,} bytes")
            self.text = raw.decode("utf-8")
            lines = self.text.split("\n")
            pairs = [tuple(line.split()) for line in lines[1:MERGES + 1] if line.strip()]
            if "#version" not in lines[0] or any(len(pair) != 2 for pair in pairs):
                raise ValueError("expected a #version line, then two symbols a line")
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            name = "the vocabulary" if isinstance(path, bytes) else path
            raise DataError(f"{name}: not a BPE vocabulary ({error})") from None
        symbols = list(byte_symbols().values())
        vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(p) for p in pairs]
        self.ids = {symbol: i for i, symbol in enumerate([*vocabulary, START, END])}
        self.ranks = {pair: i for i, pair in enumerate(pairs)}
        self.size = len(vocabulary) + 2
        self.known = {START: [self.ids[START]], END: [self.ids[END]]}      # piece -> ids

    def piece_ids(self, piece):
        """The ids of one piece of text: its bytes, merged in the order of the vocabulary."""
        if piece in self.known:
            return self.known[piece]
        word = symbols_of(piece)
        while len(word) > 1:
            pair = min(zip(word, word[1:]), key=lambda p: self.ranks.get(p, math.inf))
            if pair not in self.ranks:
                break
            word = merge_pair(word, pair)
        self.known[piece] = [self.ids[symbol] for symbol in word]
        return self.known[piece]

    def encode(self, text):
        """The ids of a text of any length, without start and end."""
        text = clean(text)
        return [i for match in PIECES.finditer(kinds(text))
                for i in self.piece_ids(text[match.start():match.end()])]

    def __call__(self, texts, length):
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.ids[START], *self.encode(text)[:length - 2], self.ids[END]]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ---------------------------------------------------------------------------------------------
# Drawn data: scenes of figures, and expressions that single one out
# ---------------------------------------------------------------------------------------------

# Corners, radius (so that all kinds look equally large), and that of every second corner.
KINDS = {"circle": (32, 1.0, 1.0), "square": (4, 1.15, 1.15), "triangle": (3, 1.35, 1.35),
         "star": (10, 1.3, 0.65), "diamond": (4, 1.5, 0.8)}
EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "lowest": (0, 1)}


class Domain(NamedTuple):
    """What the scenes of one drawn data set are made of, and the words for it."""
    colours: dict
    sizes: dict                 # radius by the canvas's longer side
    kinds: tuple                # of KINDS
    textures: tuple             # none: all are plain, and nobody says so
    directions: dict            # relations of two figures, by the direction from one to the other
    nearest: bool               # "nearest to" is a relation, too
    ways: tuple                 # how often a figure is meant by its look, its place, a relation
    ground: tuple               # how light it is, from 0 to 255
    noise: float                # standard deviation, of 255


DOMAINS = {
    "shapes": Domain(
        {"red": (214, 48, 49), "green": (39, 154, 74), "blue": (41, 98, 214),
         "yellow": (241, 196, 15), "purple": (136, 62, 168), "orange": (232, 126, 34)},
        {"small": (0.13, 0.15), "large": (0.20, 0.235)},
        ("circle", "square", "triangle", "star"), (),
        {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)},
        nearest=False, ways=(0.5, 0.3, 0.2), ground=(200, 245), noise=5),
    "shapes-b": Domain(
        {"pink": (240, 130, 175), "teal": (20, 140, 140), "brown": (125, 75, 40),
         "lime": (165, 215, 40), "navy": (25, 35, 110), "coral": (235, 95, 75)},
        {"little": (0.13, 0.15), "big": (0.20, 0.235)},
        ("circle", "square", "triangle", "star", "diamond"), ("plain", "striped", "dotted"),
        {"to the left of": (-1, 0), "to the right of": (1, 0), "over": (0, -1), "under": (0, 1)},
        nearest=True, ways=(0.4, 0.25, 0.35), ground=(150, 250), noise=14),
}
SCENES = {"train": 6500, "val": 150, "test": 150}
CANVASES = ((64, 64), (64, 48), (48, 64), (64, 56), (56, 64))


class Figure(NamedTuple):
    kind: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    reach: float                # radius of the circle around it, pixels
    points: list                # outline, pixels


def outline(kind, x, y, radius, turn):
    """The corners of a figure around (x, y), turned by so many radians."""
    count, *radii = KINDS[kind]
    corners = [(2 * math.pi * i / count + turn, radius * radii[i % 2]) for i in range(count)]
    return [(x + r * math.sin(angle), y - r * math.cos(angle)) for angle, r in corners]


def invent_figures(rng, width, height, domain=DOMAINS["shapes"]):
    """Two to four figures that do not touch."""
    figures, side, number = [], max(width, height), rng.randint(2, 4)
    for attempt in itertools.count(1):
        kind, colour = rng.choice(domain.kinds), rng.choice(list(domain.colours))
        size = rng.choice(list(domain.sizes))
        texture = rng.choice(domain.textures) if domain.textures else ""
        radius = side * rng.uniform(*domain.sizes[size])
        reach = radius * KINDS[kind][1] + 1
        x, y = (rng.uniform(reach, extent - reach) for extent in (width, height))
        if all(math.hypot(x - f.x, y - f.y) > reach + f.reach for f in figures):
            turn = rng.uniform(-0.05, 0.05) + (math.pi / 4 if kind == "square" else 0)
            points = outline(kind, x, y, radius, turn)
            figures.append(Figure(kind, colour, size, texture, x, y, reach, points))
        if len(figures) == number:
            return figures
        if attempt % 200 == 0:          # no room is left: begin again
            figures.clear()


def fits(figure, look):
    """Whether a look, (size, texture, colour, kind) with "" for any, is true of a figure."""
    return all(wanted in ("", own) for wanted, own in
               zip(look, (figure.size, figure.texture, figure.colour, figure.kind)))


def looks_of(figure):
    """All looks true of a figure."""
    return itertools.product(("", figure.size), dict.fromkeys(("", figure.texture)),
                             ("", figure.colour), ("", figure.kind))


def phrase(look):
    return " ".join(filter(None, (*look[:3], look[3] or "shape")))


def expressions(figure, figures, margin, domain=DOMAINS["shapes"]):
    """All expressions that mean this figure and no other: by look, by place, by relation.

    Places and relations count from centre to centre; whatever is closer than `margin` (pixels) is
    neither left nor right, and an expression that would hang on it is not made.
    """
    looks, places, relations = [], [], []
    others = [f for f in figures if f is not figure]
    anchors = [(look, f) for f in others for look in looks_of(f)
               if sum(fits(g, look) for g in figures) == 1]
    for look in looks_of(figure):
        rivals = [f for f in others if fits(f, look)]
        if not rivals:
            looks.append(f"the {phrase(look)}")
            continue
        for word, (dx, dy) in EXTREMES.items():
            if all((figure.x - f.x) * dx + (figure.y - f.y) * dy > margin for f in rivals):
                places.append(f"the {word} {phrase(look)}")
        for anchor, at in anchors:
            if at in rivals:
                continue
            for word, (dx, dy) in domain.directions.items():
                ahead, *behind = [(f.x - at.x) * dx + (f.y - at.y) * dy for f in (figure, *rivals)]
                if ahead > margin and max(behind) < -margin:
                    relations.append(f"the {phrase(look)} {word} the {phrase(anchor)}")
            near, *far = [math.hypot(f.x - at.x, f.y - at.y) for f in (figure, *rivals)]
            if domain.nearest and near < min(far) - margin:
                relations.append(f"the {phrase(look)} nearest to the {phrase(anchor)}")
    return looks, places, relations


def draw_scene(rng, figures, width, height, domain=DOMAINS["shapes"]):
    """The picture of a scene: figures on a plain, noisy ground, antialiased."""
    fine = 4
    ground = tuple(rng.randint(*domain.ground) for _ in range(3))
    image = Image.new("RGB", (width * fine, height * fine), ground)
    pen = ImageDraw.Draw(image)
    for figure in figures:
        colour = tuple(min(255, max(0, c + rng.randint(-14, 14)))
                       for c in domain.colours[figure.colour])
        points = [(x * fine, y * fine) for x, y in figure.points]
        pen.polygon(points, fill=colour)
        if figure.texture in ("striped", "dotted"):
            inside = Image.new("1", image.size)
            ImageDraw.Draw(inside).polygon(points, fill=1)
            lighter = tuple(90 + c * 165 // 255 for c in colour)
            image.paste(lighter, mask=ImageChops.logical_and(
                inside, pattern(figure.texture, image.size, 5 * fine)))
    image = image.resize((width, height), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, domain.noise, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@functools.lru_cache
def pattern(texture, size, period):
    """Where a canvas is lighter: vertical stripes or dots, so many pixels apart (mode 1)."""
    y, x = np.mgrid[:size[1], :size[0]] % period / period
    return Image.fromarray(x < 0.4 if texture == "striped" else np.hypot(x - 0.5, y - 0.5) < 0.32)


def run_lengths(mask):
    """COCO's uncompressed RLE of a mask: lengths of runs, column by column, zeros first."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [0]])
    ends = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], ends, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts if counts[-1] else counts[:-1]}


def draw_shapes(data, scenes=SCENES, seed=0, name="shapes"):
    """Draws a data set of DOMAINS into DATA/NAME, in the REFER layout, and returns that folder.

    {split: number of scenes}. Two figures of each scene are meant, in up to three expressions
    each; one in four masks is stored as RLE. The vocabulary, `merges.txt`, is learned from the
    training expressions and, as rare ones, the words of all domains, so that in a text tower that
    was trained on one and is carried to another every word is one token; what the tower makes of a
    word it has never seen is left to chance. The folder appears only once it is whole.
    """
    domain = DOMAINS[name]
    folder = Path(data) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=data,
                                         ignore_cleanup_errors=True) as temporary:
            draft = Path(temporary) / name
            draw_into(draft, domain, name, scenes, seed)
            os.rename(draft, folder)
    except OSError as error:
        raise OSError(f"{folder}: could not be drawn: {error.strerror or error}") from error
    return folder


def draw_into(draft, domain, name, scenes, seed):
    """All files of a data set, in a folder that is not there yet."""
    (draft / "images").mkdir(parents=True)
    images, annotations, refs = [], [], []
    todo = [split for split, number in scenes.items() for _ in range(number)]
    for image_id, split in enumerate(tqdm(todo, desc=f"drawing {name}", unit="scene"), 1):
        rng = random.Random(f"{seed} {split} {image_id}")
        draw_one(rng, domain, image_id, f"{name}_{split}", draft, images, annotations, refs)
    categories = [{"id": i, "name": kind} for i, kind in enumerate(KINDS, 1)]
    with open(draft / "instances.json", "w", encoding="utf-8") as file:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, file)
    with open(draft / f"refs({name}).p", "wb") as file:
        pickle.dump(refs, file, protocol=2)
    captions = [s["sent"] for ref in refs if ref["split"] == "train" for s in ref["sentences"]]
    merges = "\n".join(" ".join(pair) for pair in learn_merges(captions + all_words()))
    (draft / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def all_words():
    """The words of all domains."""
    return sorted({word for domain in DOMAINS.values()
                   for part in (domain.colours, domain.sizes, domain.kinds, domain.textures,
                                domain.directions, ["nearest to"])
                   for words in part for word in words.split()})


def draw_one(rng, domain, image_id, prefix, folder, images, annotations, refs):
    """Draws one scene and adds what belongs to it to the three lists."""
    width, height = rng.choice(CANVASES)
    figures = invent_figures(rng, width, height, domain)
    name = f"{prefix}_{image_id:06d}.jpg"
    draw_scene(rng, figures, width, height, domain).save(folder / "images" / name, quality=92)
    images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    meant = []
    for figure in figures:
        polygon = [round(v, 2) for point in figure.points for v in point]
        mask = pycocotools.mask.decode(pycocotools.mask.frPyObjects([polygon], height, width))
        annotations.append({
            "id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0,
            "category_id": list(KINDS).index(figure.kind) + 1, "area": int(mask.sum()),
            "segmentation": run_lengths(mask[..., 0]) if rng.random() < 0.25 else [polygon]})
        ways = expressions(figure, figures, 0.06 * max(width, height), domain)
        if any(ways):
            weights = [weight if way else 0 for weight, way in zip(domain.ways, ways)]
            sentences = {rng.choice(way) for way in rng.choices(ways, weights, k=3)}
            meant.append((annotations[-1], sorted(sentences)))
    for annotation, sentences in rng.sample(meant, min(2, len(meant))):
        refs.append({
            "ref_id": len(refs) + 1, "ann_id": annotation["id"], "image_id": image_id,
            "category_id": annotation["category_id"], "split": prefix.split("_")[1],
            "file_name": f"{name[:-4]}_{annotation['id']}.jpg",
            "sentences": [{"sent": s, "raw": s, "tokens": s.split(), "sent_id": 10 * len(refs) + i}
                          for i, s in enumerate(sentences)]})


def learn_merges(texts, most=510):
    """Byte-pair merges learned from texts: the most frequent pair again and again."""
    words = Counter(symbols_of(piece) for text in texts for piece in clean(text).split())
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += times
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = Counter({merge_pair(word, merges[-1]): times for word, times in words.items()})
    return merges


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def check(data):
    """Prints a Markdown table: what is in DATA beside the published sizes."""
    folders = sorted(p.parent for p in Path(data).glob("*/instances.json"))
    if not folders:
        raise DataError(f"{data}: no folder with an instances.json in it; {WHERE}")
    print("| data set | split | refs | published | expressions | published | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for folder in folders:
        files = sorted(folder.glob("refs(*).p"))
        for split_by in (file.name[5:-3] for file in files):
            plain = len(files) == 1 or SPLIT_BY.get(folder.name) == split_by
            name = folder.name if plain else f"{folder.name}-{split_by}"
            splits, skipped = read_refs(data, name, True)
            published = PUBLISHED_SIZES.get(name, Sizes({}, {}))
            for split, refs in splits.items():
                counts = len(refs), sum(len(ref.sentences) for ref in refs)
                expected = published.refs.get(split), published.expressions.get(split)
                verdict = "" if None in expected else "ok" if counts == expected else "differs"
                print(f"| {name} | {split} | {counts[0]:,} | {thousands(expected[0])} | "
                      f"{counts[1]:,} | {thousands(expected[1])} | {verdict} |")
            if skipped:
                print(f"| {name} | broken entries | {skipped:,} | | | | "
                      f"training without --skip-broken names the first |")


def thousands(number):
    return "" if number is None else f"{number:,}"


def main():
    parser = argparse.ArgumentParser(description="Draw the shapes data set, or check a data folder")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (("shapes", "draw the shapes data set into DIR/shapes"),
                          ("shapes-b", "draw its second domain into DIR/shapes-b"),
                          ("check", "compare the data sets in DIR with their published sizes")):
        commands.add_parser(name, help=purpose).add_argument("dir", metavar="DIR")
    args = parser.parse_args()
    if args.command == "check":
        check(args.dir)
    elif (Path(args.dir) / args.command).exists():
        raise DataError(f"{Path(args.dir) / args.command} exists already; remove it to draw again")
    else:
        print(draw_shapes(args.dir, name=args.command))


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
