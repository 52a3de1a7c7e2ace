#!/usr/bin/env python3
"""Convert a LLaMA checkpoint, as Meta released it, to a ggml model file.

    models/                          python convert.py models/7B/
        tokenizer.model              writes models/7B/ggml-model-f16.bin
        7B/
            params.json
            consolidated.00.pth      (larger models have .01, .02, ... too, and each becomes a file: .bin.1, .bin.2, ...)

The tensors keep their order and, as far as float16 can hold them, their values. A checkpoint is 13 to 130 GB of a stranger's
pickles: it is read without running what is in it and without filling the memory, it is checked before it is believed, and a
file takes its name only once it is complete.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import sys
import time
import warnings
import zipfile
from typing import TYPE_CHECKING, Iterator

from tinyllama import (
    BF16,
    F16,
    F32,
    GGML_EOS,
    GGML_TYPES,
    UNKNOWN_PIECE,
    Header,
    ModelError,
    check_tensors,
    exit_code,
    log,
    part_paths,
    replacing,
    write_ggml_header,
    write_ggml_tensor_header,
)

if TYPE_CHECKING:                                         # importing torch takes two seconds, too long for --help
    import torch
    from sentencepiece import SentencePieceProcessor

TYPES = {"torch.float32": F32, "torch.float16": F16, "torch.bfloat16": BF16}
KNOWN_PARAMS = ("dim", "multiple_of", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "rope_theta",
                "vocab_size", "ffn_dim_multiplier", "max_seq_len", "max_batch_size")              # not needed, but harmless
CHUNK = 1 << 20                                           # weights converted at a time: 4 MB as float32
MB = 1 << 20
INSTEAD = "get a GGUF file of this model, which tinyllama.py reads directly"


# ---------------------------------------------------------------------------------------------------------------------------
# 1. What lies beside the weights: the list of parts, params.json, the tokenizer
# ---------------------------------------------------------------------------------------------------------------------------

def find_parts(folder: str) -> list[str]:
    """The paths of consolidated.00.pth, .01, ... in a folder. ModelError if there are none, or one is missing."""
    names = sorted(os.listdir(folder))
    parts = sorted((int(match[1]), name) for name in names if (match := re.fullmatch(r"consolidated\.([0-9]+)\.pth", name)))
    for i, (number, _) in enumerate(parts):
        if number != i:
            raise ModelError(f"{folder}: consolidated.{i:02}.pth is missing, but there is {parts[-1][1]}")
    if parts:
        return [os.path.join(folder, name) for _, name in parts]
    for name in names:
        if re.fullmatch(r"config\.json|tokenizer\.json|.*\.safetensors.*|pytorch_model.*\.bin.*", name):
            raise ModelError(f"{folder}: a Hugging Face folder (it has {name}), where Meta's own layout is wanted (params.json, "
                             f"consolidated.00.pth): get Meta's original release, or {INSTEAD}")
    raise ModelError(f"{folder}: there is no consolidated.00.pth in this folder")


def read_start(path: str) -> bytes:
    """The first bytes of a file, which must not be one of the things that a failed download leaves in place of the file."""
    with open(path, "rb") as f:
        start = f.read(256)
    if not start:
        raise ModelError(f"{path}: empty")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a Git LFS pointer, which only stands for the file: fetch the file itself (git lfs pull)")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise ModelError(f"{path}: a web page saved under this name: download the file again")
    return start


def read_params(path: str) -> dict:
    """params.json, checked; keys that are null count as absent."""
    read_start(path)
    try:
        with open(path, "rb") as f:
            params = json.load(f)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(params, dict):
        raise ModelError(f"{path}: not a JSON object")
    params = {key: value for key, value in params.items() if value is not None}
    for key in ("dim", "multiple_of", "n_heads", "n_layers", "n_kv_heads"):
        value = params.get(key)
        if value is None and key != "n_kv_heads":
            raise ModelError(f"{path}: '{key}' is missing")
        if value is not None and (type(value) is not int or not 1 <= value < 1 << 31):            # a bool is an int, too
            raise ModelError(f"{path}: '{key}' is {value!r:.60}; it must be a whole number from 1 to 2147483647")
    for key in ("norm_eps", "rope_theta"):
        value = params.get(key, 1)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ModelError(f"{path}: '{key}' is {value!r:.60}; it must be a positive number")
    if params["dim"] % (2 * params["n_heads"]):
        raise ModelError(f"{path}: dim {params['dim']} is not an even number for each of {params['n_heads']} heads")
    return params


def find_tokenizer(folder: str) -> str:
    """tokenizer.model, which Meta's release keeps one folder up, once for all sizes."""
    tried = [os.path.normpath(os.path.join(folder, *up, "tokenizer.model")) for up in ([os.pardir], [])]
    for path in tried:
        if os.path.exists(path):
            return path
    raise ModelError(f"no tokenizer.model: tried {' and '.join(tried)}; --tokenizer PATH names another place")


def read_tokenizer(path: str) -> tuple[SentencePieceProcessor, list[bytes]]:
    """The tokenizer, and the bytes of each token as a ggml file holds them."""
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", read_start(path)):
        raise ModelError(f"{path}: a tiktoken vocabulary, as Llama 3 has, which has no place in a ggml file: {INSTEAD}")
    from sentencepiece import SentencePieceProcessor
    try:
        with open(path, "rb") as f:
            tokenizer = SentencePieceProcessor(model_proto=f.read())
        return tokenizer, [token_bytes(tokenizer, i) for i in range(tokenizer.vocab_size())]
    except (RuntimeError, ValueError):
        raise ModelError(f"{path}: not a sentencepiece model, or a damaged one") from None


def token_bytes(tokenizer: SentencePieceProcessor, i: int) -> bytes:
    """'\u2581the' -> b' the', '<0x0A>' -> b'\\n', '<s>' -> b''."""
    piece = tokenizer.id_to_piece(i)
    if tokenizer.is_unknown(i):
        return UNKNOWN_PIECE
    if tokenizer.is_control(i):
        return b""
    if tokenizer.is_byte(i):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("\u2581", " ").encode()


def ranks_follow_ids(tokenizer: SentencePieceProcessor) -> bool:
    """Whether the scores rank merges as tinyllama.py must, which has the ids alone: by the id, but pieces of nothing but spaces
    last and equal among themselves. Single characters do not count, since no merge makes them."""
    words, spaces = [], []
    for i in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(i)
        if len(piece) > 1 and not (tokenizer.is_unknown(i) or tokenizer.is_control(i) or tokenizer.is_byte(i)):
            (words if piece.strip("\u2581") else spaces).append(tokenizer.get_score(i))
    spaces_last = len(set(spaces)) <= 1 and not (words and spaces and max(spaces) >= min(words))
    return spaces_last and all(a > b for a, b in zip(words, words[1:]))


def unsaid(params: dict, tokenizer: SentencePieceProcessor) -> Iterator[str]:
    """What of a model the ggml file has no place for, where it is not what tinyllama.py assumes."""
    for key, usual, flag in (("norm_eps", 1e-6, "--norm-eps"), ("rope_theta", 10000, "--rope-freq-base")):
        if (value := params.get(key, usual)) != usual:
            text = f"{value:.10g}".replace("e-0", "e-")
            yield f"a ggml file cannot say that {key} is {text}: run tinyllama.py with {flag} {text}"
    if unknown := [key for key, value in params.items() if value and key not in KNOWN_PARAMS]:
        yield f"params.json also has {', '.join(map(repr, unknown))}: ignored, so the model may not be the LLaMA that is assumed"
    if not ranks_follow_ids(tokenizer):
        yield ("the vocabulary's scores do not follow its ids, and a ggml file has no scores: "
               "tinyllama.py will cut some texts into other tokens than sentencepiece does")
    if (ids := (tokenizer.bos_id(), tokenizer.eos_id())) != (1, GGML_EOS):
        yield f"a ggml file cannot say that the tokens of begin and end are {ids}: tinyllama.py takes {(1, GGML_EOS)}"


# ---------------------------------------------------------------------------------------------------------------------------
# 2. The weights
# ---------------------------------------------------------------------------------------------------------------------------

def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """The tensors of one part by name, in its order. Those of today's .pth files are mapped, not read: they take no memory."""
    start = read_start(path)
    import torch
    torch.set_num_threads(1)                              # one outruns any disk; several spin, waiting for each other
    try:
        # A zip file can be mapped where nothing in it is compressed (torch never does). Old torch wrote no zip files.
        mmap = start.startswith(b"PK") and not any(entry.compress_type for entry in zipfile.ZipFile(path).infolist())
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asks = re.search(r"(?:GLOBAL|[Cc]lass) ([\w.]+)", str(error))
        raise ModelError(f"{path}: refused, and nothing in it was run: not a checkpoint of plain tensors"
                         + (f", since it calls for {asks[1]}" if asks else "")) from None
    except Exception as error:                            # torch raises what it likes at damage, with pages of advice
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(f"{path}: damaged or cut short{reason and f' ({reason})'}") from None
    if not isinstance(tensors, dict):
        raise ModelError(f"{path}: it holds a {type(tensors).__name__} instead of tensors by name")
    tensors = {name: tensor for name, tensor in tensors.items() if not str(name).endswith("freqs")}
    for name, tensor in tensors.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel()
        if not plain or str(tensor.dtype) not in TYPES:
            raise ModelError(f"{path}: '{name}' is not a tensor of float16, bfloat16 or float32 numbers")
    return tensors


def check_part(path: str, tensors: dict[str, torch.Tensor], header: Header, params: dict, n_parts: int) -> dict[str, int]:
    """Raise ModelError unless these are one part of `n_parts` of the model that params.json and the tokenizer speak of.

    Returns the sizes of the whole model, which are the same for each part.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = shapes.get("tok_embeddings.weight", ())[:1]
    if rows and rows != (header.n_vocab,):
        raise ModelError(f"{path}: tok_embeddings.weight has {rows[0]} rows, but the tokenizer has {header.n_vocab} tokens: "
                         "it is the tokenizer of another model")
    sizes = {"V": header.n_vocab, "D": header.dim, "HE": header.dim}
    if "n_kv_heads" in params:
        sizes["KE"] = params["n_kv_heads"] * header.rot
    sizes = check_tensors(path, shapes, header.n_layers, sizes)
    if sizes["parts"] != n_parts:
        raise ModelError(f"{path}: one of {sizes['parts']} parts, as the width of its tok_embeddings says, but there are {n_parts}")
    if sizes["KE"] % header.rot or header.n_heads * header.rot % sizes["KE"]:
        raise ModelError(f"{path}: {header.n_heads} heads of {header.rot} cannot share the {sizes['KE']} rows of wk")
    return sizes


def write_part(source: str, out: str, header: Header, pieces: list[bytes], tensors: dict[str, torch.Tensor]) -> int:
    """Write the ggml file `out`, with a line on stdout for each tensor; return its size in bytes. Vectors are always float32."""
    print(f"{os.path.basename(source)} -> {os.path.basename(out)}", flush=True)
    with replacing(out) as f:
        write_ggml_header(f, header, pieces)
        for name, tensor in tensors.items():
            kind = GGML_TYPES[header.ftype] if tensor.dim() == 2 else F32
            write_ggml_tensor_header(f, name, kind, tensor.shape)
            not_finite = too_large = 0
            for old in tensor.detach().split(max(1, CHUNK // tensor[0].numel())):
                new = old.half() if kind is F16 else old.float()              # rounds to nearest, halves to even
                if not new.abs().max() < math.inf:                            # false for a NaN, too
                    not_finite += int((~old.isfinite()).sum())
                    too_large += int((~new.isfinite()).sum())
                f.write(new.contiguous().numpy().data)
            if not_finite:
                raise ModelError(f"{source}: tensor '{name}' has {not_finite} values that are NaN or infinite: damaged")
            if too_large:
                raise ModelError(f"{source}: tensor '{name}' has {too_large} values that float16 cannot hold: use ftype 0")
            print(f"{name:40} {list(tensor.shape)!s:>16}  {TYPES[str(tensor.dtype)].name:>4} -> {kind.name}"
                  f"  {tensor.numel() * kind.dtype.itemsize / MB:9.2f} MB", flush=True)
        return f.tell()


# ---------------------------------------------------------------------------------------------------------------------------
# 3. The command line
# ---------------------------------------------------------------------------------------------------------------------------

def convert(folder: str, ftype: int = 1, tokenizer: str | None = None, out: str | None = None, force: bool = False) -> None:
    """Convert the checkpoint in `folder`: ftype 0 to float32, 1 to float16. It reports on stdout and warns on stderr.

    Raises ModelError for what is not a checkpoint of a LLaMA model, and OSError.
    """
    start, size = time.monotonic(), 0
    sources = find_parts(folder)
    outputs = part_paths(os.path.join(out or folder, f"ggml-model-{GGML_TYPES[ftype].name}.bin"), len(sources))
    kept = [path for path in outputs if os.path.exists(path) and not force]
    for path in kept:
        print(f"{os.path.basename(path)} exists already: kept (--force makes it again)", flush=True)
    if kept == outputs:
        return

    params = read_params(os.path.join(folder, "params.json"))
    processor, pieces = read_tokenizer(tokenizer or find_tokenizer(folder))
    dim, n_heads = params["dim"], params["n_heads"]
    header = Header(len(pieces), dim, params["multiple_of"], n_heads, params["n_layers"], dim // n_heads, ftype)
    print(", ".join(f"{key} {value}" for key, value in header._asdict().items()), flush=True)
    os.makedirs(out or folder, exist_ok=True)

    sizes = None
    for source, output in zip(sources, outputs):
        if output not in kept:
            tensors = read_checkpoint(source)
            part = check_part(source, tensors, header, params, len(sources))
            if part != (sizes := sizes or part):
                raise ModelError(f"{source}: its sizes {part} are not those of the parts before it, {sizes}: of another model")
            size += write_part(source, output, header, pieces, tensors)
            del tensors                                   # before the next one is read: some cannot be mapped
    seconds = time.monotonic() - start
    n = len(outputs) - len(kept)
    print(f"total: {n} file{'s' * (n > 1)}, {size / MB:.2f} MB in {seconds:.1f} s", flush=True)
    for note in unsaid(params, processor):                # last, where it is seen
        log(f"warning: {note}")


EXAMPLES = """examples:
  python convert.py models/7B/            float16, the usual way
  python convert.py models/7B/ 0          float32: twice the size, for values that float16 cannot hold
  python convert.py /media/disk/7B --tokenizer /media/disk/tokenizer.model --out models/7B

then make it small, and run it:
  python quantize.py models/7B/ggml-model-f16.bin models/7B/ggml-model-q4_0.bin 2
  python tinyllama.py -m models/7B/ggml-model-q4_0.bin -p "Simply put, quantum entanglement states that"
"""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 after an error (one line on stderr), 130 after Ctrl-C; argparse exits with 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", help="folder with params.json and consolidated.00.pth, .01, ...")
    parser.add_argument("ftype", metavar="FTYPE", type=int, nargs="?", default=1, choices=(0, 1),
                        help="type of the matrices: 0 float32, 1 float16 (default)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: tokenizer.model in DIR's parent folder, else in DIR")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: DIR)")
    parser.add_argument("--force", action="store_true", help="convert again what is there already; otherwise it is kept")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")                       # those of torch are not for users
    return exit_code(lambda: convert(args.dir, args.ftype, args.tokenizer, args.out, args.force))


if __name__ == "__main__":
    sys.exit(main())
