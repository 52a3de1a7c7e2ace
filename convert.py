#!/usr/bin/env python3
"""Convert the checkpoint of a LLaMA model, Hugging Face's or Meta's, to a ggml file.

    models/open_llama_3b/            models/
        config.json                      tokenizer.model
        tokenizer.model                  7B/
        model.safetensors                    params.json
                                             consolidated.00.pth, .01, ...

    python convert.py models/open_llama_3b      writes models/open_llama_3b/ggml-model-f16.bin
    python convert.py models/7B                 writes models/7B/ggml-model-f16.bin, .bin.1, ...
    python quantize.py models/7B                is the next step

A checkpoint is 7 to 130 GB of a stranger's files: nothing in them is run, tensors are mapped
where the format allows it and converted piece by piece, every field is checked before it is used,
and a file takes its name once it is complete.
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

# isort: split
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
from typing import Iterator

import tinyllama
from tinyllama import BF16, F16, F32, Header, ModelError, require

# isort: split
import numpy as np  # after tinyllama, which sets it up

Tensors = dict[str, np.ndarray]             # by name: float32, float16, or bfloat16 as uint16
TYPES = {"F32": F32, "F16": F16, "BF16": BF16}
CHUNK = 1 << 20                             # weights converted at a time: 4 MB as float32
MB = 1 << 20
INSTEAD = "get a GGUF file of this model, which tinyllama.py reads directly"


# -------------------------------------------------------------------------------------------------
# 1. Meta's layout
#
# params.json has the numbers of the model, consolidated.00.pth the tensors, as a torch pickle. A
# larger model comes in several such parts. Each becomes a ggml file, tensors in the same order.
# -------------------------------------------------------------------------------------------------

def find_parts(folder: str) -> list[list[str]]:
    """The files of each part: one of Meta's, or all of a Hugging Face folder, which is one part."""
    require(not os.path.isfile(folder), folder,
            f"a file; name its folder, {os.path.dirname(folder) or os.curdir}")
    names = sorted(n for n in os.listdir(folder) if re.fullmatch(r"consolidated\.\d\d\.pth", n))
    for i, name in enumerate(names):
        wanted = f"consolidated.{i:02}.pth"
        require(name == wanted, folder, f"{wanted} is missing, but there is {name}")
    return [[os.path.join(folder, name)] for name in names] or [hugging_face_files(folder)]


def read_bytes(path: str, n: int = -1) -> bytes:
    """A file, or its first n bytes. ModelError if it is empty, a web page or a Git LFS pointer."""
    require(os.path.isfile(path) or not os.path.exists(path), path, "not a file")
    with open(path, "rb") as f:
        data = f.read(n)
    tinyllama.refuse(path, data, tinyllama.FAILED_DOWNLOADS)
    return data


def read_json(path: str) -> dict:
    data = read_bytes(path)
    try:
        return {**json.loads(data)}
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON object ({error})") from None


# The numbers of a model that count, in Meta's words and in Hugging Face's.
WORDS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
         "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
         "hidden_dim": "intermediate_size", "sliding_window": "sliding_window",
         "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "multiple_of": "multiple_of"}
HARMLESS = {"tied", "vocab_size", "ffn_dim_multiplier", "max_seq_len", "max_batch_size"}


def check_params(path: str, params: dict, words: dict[str, str] = dict(zip(WORDS, WORDS))) -> dict:
    """params.json, checked; what is null counts as absent. Errors call its keys by `words`."""
    params = {key: value for key, value in params.items() if value is not None}
    for key, word in words.items():
        require(key in params or key not in ("dim", "n_layers", "n_heads"), path,
                f"'{word}' is missing")
        value, whole = params.get(key, 1), key not in ("norm_eps", "rope_theta")
        limit = tinyllama.MAX_LAYERS if key == "n_layers" else (1 << 31) - 1
        require(type(value) in ((int,) if whole else (int, float)) and 0 < value <= limit, path,
                f"'{word}' is {value!r:.60}; it must be a positive {'whole ' * whole}number "
                f"up to {limit}")
    dim, heads = params["dim"], params["n_heads"]
    require(dim % (2 * heads) == 0 and params.get("head_dim", dim // heads) == dim // heads, path,
            f"{words['dim']} {dim} is not {heads} heads of {params.get('head_dim', 'even size')}")
    return params


def read_pickle(path: str) -> Tensors:
    """The tensors of a torch checkpoint. Those of today's kind are mapped: they take no memory."""
    start = read_bytes(path, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # torch's are not for users
        import torch
        try:
            # A zip file can be mapped if nothing in it is compressed (torch compresses nothing).
            mmap = start.startswith(b"PK") and not any(
                entry.compress_type for entry in zipfile.ZipFile(path).infolist())
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            asks = re.search(r"(?:GLOBAL|[Cc]lass) ([\w.]+)", str(error))
            raise ModelError(f"{path}: refused, and nothing in it was run: it calls for "
                             + (asks[1] if asks else "more than plain tensors")) from None
        except Exception as error:              # torch raises what it likes at damage, at length
            reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
            raise ModelError(f"{path}: damaged or cut short ({reason})") from None

    for wrapper in ("model", "state_dict"):             # training scripts save more than weights
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    require(isinstance(tensors, dict), path, f"a {type(tensors).__name__}, not tensors by name")
    tensors = {str(name): t for name, t in tensors.items() if not str(name).endswith("freqs")}
    kinds = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
    for name, t in tensors.items():
        require(isinstance(t, torch.Tensor) and t.dtype in kinds and t.layout == torch.strided
                and not t.is_meta and t.numel() and t.dim() in (1, 2) and name.isprintable(), path,
                f"{name!r:.60} is not a vector or a matrix of {' or '.join(TYPES)}")
        bits = t.view(torch.int16) if t.dtype == torch.bfloat16 else t  # numpy has no bfloat16
        tensors[name] = bits.detach().numpy().view(kinds[t.dtype].dtype)
    return tensors


# -------------------------------------------------------------------------------------------------
# 2. Hugging Face's layout
#
# The same in other words. config.json is translated into the words of params.json, and the tensors
# get Meta's names. They lie in model.safetensors, or in the several files that
# model.safetensors.index.json lists, or in torch pickles. A safetensors file is
#
#     |  int64 n  |  n bytes of JSON  |  data ...                             little-endian
#
# and the JSON says which bytes of the data are which tensor:
#
#     {"lm_head.weight": {"dtype": "F16", "shape": [32000, 3200], "data_offsets": [0, 204800000]},
#      ..., "__metadata__": {...}}
#
# One difference is in the numbers. RoPE turns pairs of a head's E numbers: Meta pairs 2i with
# 2i + 1, Hugging Face i with i + E/2. So the rows of wq and wk, which make these numbers, are
# reordered: from each head we take row 0, E/2, 1, E/2 + 1, 2, ...
#
# LLaMA and Mistral can be converted, with a sentencepiece tokenizer.model, without biases and
# without RoPE scaling, and with heads of D / H numbers. CONFIG lists the rest.
# -------------------------------------------------------------------------------------------------

CONFIG = {                                  # what config.json says of a model that ggml can hold
    "model_type": ("llama", "mistral"), "hidden_act": ("silu", None), "mlp_bias": (False, None),
    "attention_bias": (False, None), "rope_type": ("default", None), "type": ("default", None),
    "partial_rotary_factor": (1, None), "quantization_config": (None,)}
MODEL_NAMES = ["model.embed_tokens", "model.norm", "lm_head"]           # in Meta's order
LAYER_NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",         # w1, w2, w3
               "input_layernorm", "post_attention_layernorm"]


def hugging_face_files(folder: str) -> list[str]:
    """The files that hold the tensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return [path]
        if os.path.exists(index := f"{path}.index.json"):
            places = read_json(index).get("weight_map")
            names = places.values() if isinstance(places, dict) else ()
            names = sorted({os.path.basename(str(name)) for name in names})
            require(names and "".join(names).isprintable(), index, "it names no files")
            return [os.path.join(folder, name) for name in names]
    raise ModelError(f"{folder}: there is no consolidated.00.pth in this folder (Meta's layout), "
                     "no model.safetensors and no pytorch_model.bin (Hugging Face's)")


def translate_config(path: str, config: dict) -> dict:
    """config.json in the words of params.json, checked."""
    for key in ("rope_scaling", "rope_parameters"):             # of older and of newer files
        rope = config.get(key) or {}
        config = config | (rope if isinstance(rope, dict) else {"rope_type": rope})
    for key, allowed in CONFIG.items():
        wanted = " or ".join("absent" if v is None else repr(v) for v in allowed)
        require(config.get(key) in allowed, path,
                f"'{key}' is {config.get(key)!r:.60}; for a ggml file it must be {wanted}")
    params = {key: config.get(word) for key, word in WORDS.items()}
    return check_params(path, params | {"tied": config.get("tie_word_embeddings")}, WORDS)


def translate_names(where: str, tensors: Tensors, params: dict) -> Tensors:
    """The tensors by Meta's names and in Meta's order. ModelError if a name is unknown."""
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    # A ggml file always has an output matrix.
    if params.get("tied") and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    n = params["n_layers"]
    metas = tinyllama.meta_names(MODEL_NAMES, "model.layers.{}.", LAYER_NAMES, n)
    for name in tensors:
        require(name in metas, where, f"{name!r:.80} is no tensor of a LLaMA with {n} layers")
    return {meta: tensors[name] for name, meta in metas.items() if name in tensors}


def read_safetensors(path: str) -> Tensors:
    """The tensors of a safetensors file, mapped. ModelError unless they fill it without a gap."""
    start, size = read_bytes(path, 256), os.path.getsize(path)
    n, wrong = int.from_bytes(start[:8], "little"), "damaged or cut short"
    require(8 + n <= size and n <= 100_000_000, path,           # the format's own limit
            f"{n} bytes of JSON in a file of {size}: {wrong}, or not a safetensors file")
    memory = np.memmap(path, np.uint8, "r")
    try:
        table = {**json.loads(bytes(memory[8:8 + n]))}
        table.pop("__metadata__", None)
        entries = sorted((entry["data_offsets"], name, str(entry["dtype"]), [*entry["shape"]])
                         for name, entry in table.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ModelError(f"{path}: its JSON does not say where the tensors lie: {wrong}") from None
    tensors, data, filled = {}, memory[8 + n:], 0
    for place, name, word, shape in entries:
        require(word in TYPES, path, f"{name!r:.60} is {word!r:.20}, not {' or '.join(TYPES)}")
        require({*map(type, shape)} == {int} and min(shape) > 0 and len(shape) <= 2, path,
                f"{name!r:.60} has the impossible shape {shape!s:.60}: {wrong}")
        dtype = TYPES[word].dtype
        begin, filled = filled, filled + math.prod(shape) * dtype.itemsize
        require(place == [begin, filled] and filled <= len(data), path,
                f"{name!r:.60}, {word} {shape!s:.60}, cannot be bytes {place!s:.60}: {wrong}")
        tensors[name] = data[begin:filled].view(dtype).reshape(shape)
    require(filled == len(data), path, f"{len(data) - filled} bytes after the tensors: {wrong}")
    return tensors


# -------------------------------------------------------------------------------------------------
# 3. The vocabulary
#
# A ggml file has the text of each token and nothing else: no scores, no types, no rules for the
# preparation of a text. tinyllama.py assumes what holds for LLaMA's own vocabulary. Whether it
# holds for another one is found by trying: `unsaid` encodes probe texts and every piece with both
# programs, compares the order of the scores, and warns of the first text that differs.
# -------------------------------------------------------------------------------------------------

def find_tokenizer(folder: str, hugging_face: bool) -> str:
    """The model's own tokenizer.model; Meta's release has one for all sizes, in the parent."""
    above = os.path.dirname(os.path.realpath(folder))           # of a symbolic link: its target's
    places = [folder] if hugging_face else [folder, above]
    tried = [os.path.join(place, "tokenizer.model") for place in places]
    for path in tried:
        if os.path.exists(path):
            return path
    raise ModelError(f"no tokenizer.model: tried {' and '.join(tried)}; --tokenizer PATH names "
                     f"another place. For a model that has a tokenizer.json alone, {INSTEAD}")


def read_tokenizer(path: str) -> tuple:
    """A SentencePieceProcessor, and the bytes of each token as a ggml file holds them."""
    model = read_bytes(path)
    require(not re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", model), path,
            f"a tiktoken vocabulary, as Llama 3 has: {INSTEAD}")
    from sentencepiece import SentencePieceProcessor
    try:
        tokenizer = SentencePieceProcessor(model_proto=model)
        return tokenizer, [token_bytes(tokenizer, i) for i in range(tokenizer.vocab_size())]
    except (RuntimeError, ValueError):
        raise ModelError(f"{path}: not a sentencepiece model, or a damaged one") from None


def token_bytes(tokenizer, i: int) -> bytes:
    """'\u2581the' -> b' the', '<0x0A>' -> b'\\n', '<s>' -> b''."""
    if tokenizer.is_unknown(i):
        return tinyllama.UNKNOWN_PIECE
    if tokenizer.is_control(i):
        return b""
    piece = tokenizer.id_to_piece(i)
    if tokenizer.is_byte(i):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("\u2581", " ").encode()


def added_tokens(folder: str) -> dict[str, str]:
    """{id: text} of the tokens that a model has beyond those of sentencepiece."""
    paths = (os.path.join(folder, f"{name}.json") for name in ("added_tokens", "tokenizer_config"))
    by_text, config = (read_json(path) if os.path.exists(path) else {} for path in paths)
    added, by_id = {str(i): text for text, i in by_text.items()}, config.get("added_tokens_decoder")
    for i, token in by_id.items() if isinstance(by_id, dict) else ():
        if isinstance(token, dict):
            added[i] = str(token.get("content", ""))
    return added


PROBES = ("a", " a", "a ", "a  b", "    ", "\t\n", "1234567890", "na\u00efve", "e\u0301", "\uff21",
          "\ufb01\u00bd", "\u4e16\U0001f999", "\u2581", "<s>")


def unsaid(params: dict, tokenizer, pieces: list[bytes]) -> Iterator[str]:
    """What a ggml file cannot say of a model, where it is not what tinyllama.py assumes."""
    for key, usual, flag in (("norm_eps", 1e-6, "--norm-eps"),
                             ("rope_theta", 10000, "--rope-freq-base")):
        if (value := params.get(key, usual)) != usual:
            text = f"{value:.10g}".replace("e-0", "e-")
            yield f"a ggml file has no {key}, {text} here: run tinyllama.py with {flag} {text}"
    if window := params.get("sliding_window"):
        yield f"a ggml file has no sliding_window, {window} here: stay within -c {window}"
    if unknown := [key for key in params if params[key] and key not in {*WORDS, *HARMLESS}]:
        yield f"params.json also has {', '.join(map(repr, unknown))}, which is ignored"
    if (ids := (tokenizer.bos_id(), tokenizer.eos_id())) != (1, tinyllama.GGML_EOS):
        yield f"the tokens of begin and end are {ids}, but tinyllama.py takes (1, 2)"

    ours = tinyllama.ggml_tokenizer(pieces)
    texts = {i: piece.decode() for i, piece in enumerate(pieces)
             if len(piece) > 1 and not tokenizer.is_unknown(i)}
    for text in (*PROBES, *(f"a{text}b" for text in texts.values())):
        if ours.encode(text) != tokenizer.encode(text):
            yield (f"a ggml file cannot say how this vocabulary is used: tinyllama.py cuts "
                   f"{text!r} into other tokens than sentencepiece does")
            return
    # tinyllama.py ranks merges by their ids, but spaces alone come last, as equals: so scores must
    # fall as ids rise, and pieces of spaces share one below. (No merge makes a single character.)
    scores = [(tokenizer.get_score(i), text) for i, text in texts.items() if len(text) > 1]
    ranks = [score for score, text in scores if text.strip(" ")]
    ranks += sorted({score for score, text in scores if not text.strip(" ")})
    if any(a <= b for a, b in zip(ranks, ranks[1:])):
        yield ("a ggml file has no scores, and this vocabulary's do not follow its ids: "
               "tinyllama.py cuts some texts into other tokens than sentencepiece does")


# -------------------------------------------------------------------------------------------------
# 4. The ggml file
# -------------------------------------------------------------------------------------------------

def check_part(where: str, tensors: Tensors, n_layers: int, sizes: dict[str, int],
               n_parts: int) -> dict[str, int]:
    """All sizes of a model, of which some are known. ModelError unless this is one of its parts."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    parts = tinyllama.count_parts(shapes, sizes["D"])
    sizes = {"V": len(tensors.get("tok_embeddings.weight", ()))} | sizes
    sizes = tinyllama.check_shapes(where, shapes, n_layers, sizes, parts)
    require(parts == n_parts, where,
            f"one of {parts} parts, as its tok_embeddings' width says, but there are {n_parts}")
    return sizes


def write_part(where: str, out: str, header: Header, pieces: list[bytes], tensors: Tensors,
               hugging_face: bool) -> int:
    """Write the ggml file `out`, with a line on stdout for each tensor; return its size in bytes.
    Vectors are always float32. With `hugging_face`, the rows of wq and wk are reordered."""
    print(f"{os.path.basename(where)} -> {os.path.basename(out)}", flush=True)
    with tinyllama.replacing(out) as f:
        tinyllama.write_ggml_header(f, header, pieces)
        for name, tensor in tensors.items():
            kind = tinyllama.TYPES["ggml"][header.ftype] if tensor.ndim == 2 else F32
            tinyllama.write_ggml_tensor_header(f, name, kind, tensor.shape)
            order = np.arange(len(tensor))              # of rows; only a chunk at a time is copied
            if hugging_face and name.endswith(("wq.weight", "wk.weight")):
                order = order.reshape(-1, 2, header.rot // 2).swapaxes(1, 2).ravel()
            step = max(1, CHUNK * len(tensor) // tensor.size)
            for i in range(0, len(tensor), step):
                old = tensor[order[i:i + step]]
                if old.dtype == BF16.dtype:             # it is the upper half of a float32
                    old = (old.astype("<u4") << 16).view("<f4")
                with np.errstate(over="ignore"):
                    new = old.astype(kind.dtype, copy=False)    # to nearest, halves to even
                require(finite(old), where, f"tensor '{name}' has NaN or infinity: damaged")
                require(finite(new), where,
                        f"tensor '{name}' has values that float16 cannot hold: use ftype 0")
                f.write(new)
            print(f"{name:40} {list(tensor.shape)!s:>16}  {kind.name}  "
                  f"{tensor.size * kind.dtype.itemsize / MB:9.2f} MB", flush=True)
        return f.tell()


def finite(x: np.ndarray) -> bool:
    """No NaN or infinity: they have all bits of the exponent. (np.isfinite is slow for float16.)"""
    infinity = np.array(np.inf, x.dtype).view(f"<u{x.itemsize}")
    return bool((x.view(infinity.dtype) & infinity).max() < infinity)


# -------------------------------------------------------------------------------------------------
# 5. The command line
# -------------------------------------------------------------------------------------------------

def convert(folder: str, ftype: int = 1, tokenizer: str | None = None, out: str | None = None,
            force: bool = False) -> None:
    """Convert the checkpoint in `folder`: ftype 0 to float32, 1 to float16. Reports on stdout,
    warns on stderr. Raises ModelError for what is not a checkpoint of a LLaMA model, and OSError.
    """
    start, size, parts = time.monotonic(), 0, find_parts(folder)
    hugging_face = not os.path.exists(os.path.join(folder, "consolidated.00.pth"))
    name = f"ggml-model-{tinyllama.TYPES['ggml'][ftype].name}.bin"
    outputs = tinyllama.part_paths(os.path.join(out or folder, name), len(parts))
    kept = [path for path in outputs if os.path.exists(path) and not force]
    for path in kept:
        print(f"{os.path.basename(path)} exists already: kept (--force makes it again)", flush=True)
    if kept == outputs:
        return

    path = os.path.join(folder, "config.json" if hugging_face else "params.json")
    params = (translate_config if hugging_face else check_params)(path, read_json(path))
    vocabulary = tokenizer or find_tokenizer(folder, hugging_face)
    processor, pieces = read_tokenizer(vocabulary)
    print(f"tokenizer: {vocabulary}, {len(pieces)} tokens", flush=True)
    notes, added = [*unsaid(params, processor, pieces)], added_tokens(folder)
    dim, n_layers, n_heads = params["dim"], params["n_layers"], params["n_heads"]
    head_dim = dim // n_heads
    sizes = {"D": dim, "q": dim, "E": head_dim, "k": params.get("n_kv_heads", 0) * head_dim,
             "F": params.get("hidden_dim", 0)}
    sizes = {letter: n for letter, n in sizes.items() if n}     # the first part tells the others
    os.makedirs(out or folder, exist_ok=True)

    for files, output in zip(parts, outputs):
        if output in kept:
            continue
        where = files[0] if len(files) == 1 else folder
        tensors: Tensors = {}
        for path in files:
            tensors |= (read_safetensors if path.endswith(".safetensors") else read_pickle)(path)
        if hugging_face:
            tensors = translate_names(where, tensors, params)
        sizes = check_part(where, tensors, n_layers, sizes, len(parts))
        rows = sizes["V"]
        require(rows >= len(pieces), where, f"tok_embeddings.weight has {rows} rows, but "
                f"{vocabulary} {len(pieces)} tokens: it is another model's")
        more = [added.get(str(i), "").encode(errors="replace") for i in range(len(pieces), rows)]
        multiple_of = params.get("multiple_of", 256)    # not needed: w1 tells F
        header = Header(rows, dim, multiple_of, n_heads, n_layers, head_dim, ftype)
        if force and output == outputs[0] and len(outputs) > 1:
            for old in filter(os.path.exists, outputs):     # never parts of two models together
                os.remove(old)
        size += write_part(where, output, header, pieces + more, tensors, hugging_face)
        del tensors                                     # before the next: some cannot be mapped
    seconds, n = time.monotonic() - start, len(outputs) - len(kept)
    print(f"total: {n} file{'s' * (n > 1)}, {size / MB:.2f} MB in {seconds:.1f} s", flush=True)
    for note in notes:                                  # last, where it is seen
        tinyllama.log(f"warning: {note}")
    if unnamed := more.count(b""):
        tinyllama.log(f"warning: {unnamed} rows of tok_embeddings have no name in {vocabulary}")


def main(argv: list[str] | None = None) -> int:
    """The exit code, as of `tinyllama.exit_code`; argparse exits with 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("ftype", metavar="FTYPE", type=int, nargs="?", default=1, choices=(0, 1),
                        help="type of the matrices: 0 float32, 1 float16 (default)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: tokenizer.model in DIR, or, "
                        "with Meta's layout, in its parent folder")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: DIR)")
    parser.add_argument("--force", action="store_true",
                        help="convert again what is there already; otherwise it is kept")
    args = parser.parse_args(argv)
    return tinyllama.exit_code(
        lambda: convert(args.dir, args.ftype, args.tokenizer, args.out, args.force))


if __name__ == "__main__":
    sys.exit(main())
