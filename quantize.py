#!/usr/bin/env python3
"""Quantize a ggml model, f16 or f32 as convert.py writes it, to 5 or 6 bits a weight.

    python quantize.py models/7B/ggml-model-f16.bin models/7B/ggml-model-q4_0.bin q4_0
    python quantize.py models/65B q4_1 --remove-f16 -t 4

The first makes the file OUT of the file IN. The second makes files of every part of the f16 model
in the folder DIR (ggml-model-f16.bin, .1, .2, ...), beside them. Files that exist are replaced
once the new ones are complete. TYPE is

    2 or q4_0    5 bits a weight: 32 weights share a scale (the default with DIR)
    3 or q4_1    6 bits a weight: 32 weights share a scale and an offset; more exact

Chapter 1 of tinyllama.py draws these blocks of 32 and turns them back into weights; this is the
other direction. The files are byte for byte those of llama.cpp of March 2023, so each step is its
step in float32.
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

# isort: split
import argparse
import os
import sys
from collections import deque
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from typing import BinaryIO, Callable, Iterable, Iterator, Sequence

import tinyllama
from tinyllama import F32, Q4_0, Q4_1, TYPES, Header, ModelError, Tensor, Type, f32, require

# isort: split
import numpy as np  # after tinyllama, which sets it up

# -------------------------------------------------------------------------------------------------
# 1. Weights to blocks
#
# numpy works on many blocks at once, so they stand in columns: row j has weight j of each block.
#
# q4_0, w = d * (n - 8), leaves n = 0 unused, so that the largest |w| is exact with either sign.
# (Later formats give d the sign that turns the largest weight into -8 d, and use all 16.) q4_1
# spends a second number, the smallest weight m, to use all 16: w = d * n + m.
# -------------------------------------------------------------------------------------------------

BLOCK = 32

# The original's round() takes halves away from zero; np.round takes them to the even neighbour.
# Adding 0.5 and truncating does it but for one float32: 0.49999997 + 0.5 is rounded to 1. Adding
# the float32 before 0.5 does it for every |v| < 2^22: a tie k + 0.5 becomes k + 1 - 2^-25, which
# float32 rounds to k + 1, and the float32 before the tie stays below k + 1.
HALF = np.nextafter(f32(0.5), f32(0))


def columns(x: np.ndarray) -> np.ndarray:
    """[..., n] floats -> [BLOCK, blocks] float32."""
    if not x.ndim or x.shape[-1] % BLOCK:
        raise ValueError(f"rows of shape {list(x.shape)} are not whole blocks of {BLOCK}")
    with np.errstate(over="ignore"):                    # what is beyond float32 becomes infinite
        v = x.reshape(-1, BLOCK).T.astype(f32, order="C")
    if not np.isfinite(v).all():
        raise ValueError("NaN or infinity among the weights")
    return v


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, or 0 where that is beyond float32. (The original went on with infinity and NaN; its
    casts made the same n of these as of 0.)"""
    with np.errstate(divide="ignore", over="ignore"):
        return np.nan_to_num(f32(1) / d, posinf=0)


def join(kind: Type, shape: tuple[int, ...], n: np.ndarray, **scales: np.ndarray) -> np.ndarray:
    """n [BLOCK, blocks] and scales [blocks] -> the blocks of an array of weights of that shape."""
    blocks = np.empty(n.shape[1], kind.dtype)
    for name, values in scales.items():
        blocks[name] = values
    blocks["q"] = (n[0::2] | n[1::2] << 4).T
    return blocks.reshape(*shape[:-1], shape[-1] // BLOCK)


def quantize_q4_0(x: np.ndarray) -> np.ndarray:
    """[..., n] floats -> [..., n / 32] blocks of tinyllama.Q4_0.dtype, w = d * (n - 8), n in 1..15.

    [-7, 2.5, 0, ..., 0] becomes d = 1 and n = [1, 11, 8, ..., 8]. tinyllama.dequantize is the
    approximate inverse: it makes [-7, 3, 0, ..., 0] of them. A weight moves by at most d / 2 (and
    the rounding of float32). ValueError unless n is a multiple of 32 and x finite as float32.
    """
    x = np.asarray(x)
    v = columns(x)
    d = np.abs(v).max(axis=0) / f32(7)
    v *= inverse(d)                                     # v / d can differ in the last bit
    v += np.copysign(HALF, v)
    return join(Q4_0, x.shape, (v.astype(np.int8) + np.int8(8)).view(np.uint8), d=d)


def quantize_q4_1(x: np.ndarray) -> np.ndarray:
    """[..., n] floats -> [..., n / 32] blocks of tinyllama.Q4_1.dtype, w = d * n + m, n in 0..15.

    [-5, 10, 1.5, 0, ..., 0] becomes d = 1, m = -5 and n = [0, 15, 7, 5, ..., 5].
    tinyllama.dequantize is the approximate inverse: it makes [-5, 10, 2, 0, ..., 0] of them. A
    weight moves by at most d / 2 (and the rounding of float32). ValueError as for q4_0.
    """
    x = np.asarray(x)
    v = columns(x)
    m = v.min(axis=0)
    zero = np.flatnonzero(m == 0)                       # 0.0 and -0.0 are equal, and min takes
    m[zero] = v[v[:, zero].argmin(axis=0), zero]        # either; the original keeps the first
    # The original looks for the largest weight from the smallest normal float32 upwards (FLT_MIN,
    # taken for the most negative float). So blocks without a positive weight reach up to 0 and
    # waste some n, and a block of zeros has a d that is not 0.
    largest = v.max(axis=0, initial=np.finfo(f32).tiny)
    with np.errstate(over="ignore"):
        d = (largest - m) / f32(15)
    scale = inverse(d)
    v -= np.where(scale > 0, m, f32(0))     # where d is infinite, v - m may be, and times 0 is NaN
    v *= scale
    v += HALF
    return join(Q4_1, x.shape, v.astype(np.uint8), d=d, m=m)


QUANTIZERS = {2: quantize_q4_0, 3: quantize_q4_1}       # by ftype
FTYPES = {word: ftype for ftype in QUANTIZERS for word in (str(ftype), TYPES["ggml"][ftype].name)}


def histogram(blocks: np.ndarray) -> np.ndarray:
    """How often each n, 0 to 15, occurs in the blocks."""
    counts = np.bincount(blocks["q"].ravel(), minlength=256).reshape(16, 16)
    return counts.sum(axis=0) + counts.sum(axis=1)


# -------------------------------------------------------------------------------------------------
# 2. Files
#
# A matrix is read in chunks of rows. They go through a pool of threads (numpy releases Python's
# lock while it computes) and then, in order, into the new file: memory holds a few chunks.
# -------------------------------------------------------------------------------------------------

CHUNK = 1 << 18                             # weights: what a thread works on fits its L2 cache
MB = 1 << 20


def in_order(pool: Executor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """pool.map(work, items), but an item is taken only while fewer than `ahead` are pending."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_source(path: str) -> tuple[Header, list[bytes], dict[str, Tensor]]:
    """Open a file, which may be one part of several. ModelError if it cannot be quantized."""
    header, pieces, tensors, _ = tinyllama.read_ggml(path)
    for t in tensors.values():
        require(t.type.per_record == 1, path, f"tensor '{t.name}' is {t.type.name} already: "
                                              "quantize the f16 or f32 file it was made of")
        require(len(t.shape) == 1 or t.shape[-1] % BLOCK == 0, path,
                f"tensor '{t.name}' has rows of {t.shape[-1]}, not whole blocks of {BLOCK}")
    return header, pieces, tensors


def write_blocks(f: BinaryIO, tensor: Tensor, ftype: int, pool: Executor, ahead: int) -> np.ndarray:
    """Write a matrix as blocks; return their histogram."""
    def work(chunk: tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        try:
            blocks = QUANTIZERS[ftype](chunk[1])
        except ValueError as error:
            raise ModelError(f"{tensor.sources[0][0]}: tensor '{tensor.name}': {error}") from None
        return blocks, histogram(blocks)

    total = np.zeros(16, np.int64)
    chunks = tinyllama.read_rows(tensor, max(1, CHUNK // tensor.shape[-1]))
    for blocks, counts in in_order(pool, work, chunks, ahead):
        f.write(blocks)
        total += counts
    return total


def fractions(counts: np.ndarray) -> str:
    return ("hist: " + 16 * "%5.3f ") % tuple(counts.astype(f32) / f32(counts.sum()))


def quantize_file(source: tuple, f: BinaryIO, ftype: int, pool: Executor, ahead: int) -> None:
    """Write what `read_source` gave to `f` as type `ftype`, and to stdout the original's report:
    sizes before (always as if float32) and after, and the histograms."""
    header, pieces, tensors = source
    tinyllama.write_ggml_header(f, header._replace(ftype=ftype), pieces)
    total, total_old, total_new = np.zeros(16, np.int64), 0, 0
    for t in tensors.values():
        matrix = len(t.shape) == 2                      # the norms stay as they are
        kind = TYPES["ggml"][ftype] if matrix else t.type
        old, new = t._replace(type=F32).nbytes, t._replace(type=kind).nbytes
        dims = (*reversed(t.shape), 1)[:2]
        print("%48s - [%5d, %5d], type = %6s " % (t.name, *dims, t.type.name), end="", flush=True)
        tinyllama.write_ggml_tensor_header(f, t.name, kind, t.shape)
        if matrix:
            counts = write_blocks(f, t, ftype, pool, ahead)
            print("quantizing .. size = %8.2f MB -> %8.2f MB | %s"
                  % (old / MB, new / MB, fractions(counts)), flush=True)
            total += counts
        else:
            f.write(tinyllama.read_vector(t).astype(kind.dtype))
            print("size = %8.3f MB" % (new / MB), flush=True)
        total_old, total_new = total_old + old, total_new + new
    print("model size  = %8.2f MB\nquant size  = %8.2f MB" % (total_old / MB, total_new / MB))
    print(fractions(total), flush=True)


def quantize_files(files: Sequence[tuple[str, str]], ftype: int, threads: int) -> None:
    """Quantize each (path, target). All targets get their names in the end, one after another,
    so that parts belong together. ModelError for a file that cannot be quantized, OSError."""
    sources = [read_source(path) for path, _ in files]  # what headers say is checked first
    for path, target in files:
        require(not os.path.exists(target) or not os.path.samefile(path, target), target,
                "the input itself; quantize it into another file")
    with ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
        outputs = [stack.enter_context(tinyllama.replacing(target)) for _, target in files]
        for (path, target), source, f in zip(files, sources, outputs):
            if len(files) > 1:
                print(f"{os.path.basename(path)} -> {os.path.basename(target)}", flush=True)
            quantize_file(source, f, ftype, pool, 2 * threads)
        for f in outputs:                               # which may take seconds: the renames do not
            f.flush()
            os.fsync(f.fileno())


def folder_files(folder: str, ftype: int) -> list[tuple[str, str]]:
    """(source, target) for each part of the f16 model in a folder. ModelError if one is missing."""
    require(os.path.isdir(folder), folder, "not a folder; to quantize one file, give IN OUT TYPE")
    source, wide, target = (os.path.join(folder, f"ggml-model-{name}.bin")
                            for name in ("f16", "f32", TYPES["ggml"][ftype].name))
    hint = f", but there is {wide}: quantize that with quantize.py {wide} {target} {ftype}"
    require(os.path.exists(source), source, f"missing{hint if os.path.exists(wide) else ''}")
    *_, sizes = tinyllama.read_ggml_parts(source)
    return list(zip(*(tinyllama.part_paths(path, sizes["parts"]) for path in (source, target))))


# -------------------------------------------------------------------------------------------------
# 3. The command line
# -------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """The exit code, as of `tinyllama.exit_code`; argparse exits with 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="quantize.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="quantize.py [-t N] IN OUT TYPE\n       quantize.py [-t N] [--remove-f16] DIR [TYPE]")
    parser.add_argument("words", nargs="+", metavar="IN OUT TYPE, or DIR", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--threads", metavar="N", type=tinyllama.number(int, 1, 1024),
                        default=os.cpu_count() or 1,
                        help="threads to compute with (default: all processors, %(default)s)")
    parser.add_argument("--remove-f16", action="store_true",
                        help="remove the f16 files of DIR once all parts are quantized")
    args = parser.parse_intermixed_args(argv)
    *paths, word = args.words if len(args.words) > 1 else (*args.words, "q4_0")
    ftype, in_folder = FTYPES.get(word.lower()), len(paths) == 1
    if len(paths) > 2:
        parser.error("more than IN OUT TYPE")
    if not ftype:
        parser.error(f"'{word}' is not a TYPE: {', '.join(FTYPES)} are")
    if args.remove_f16 and not in_folder:
        parser.error("--remove-f16 goes with DIR")

    def run() -> None:
        files = folder_files(*paths, ftype) if in_folder else [tuple(paths)]
        quantize_files(files, ftype, args.threads)
        for path, _ in files if args.remove_f16 else ():
            os.remove(path)
    return tinyllama.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
