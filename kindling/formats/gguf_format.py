"""Models as GGUF files, for llama.cpp and the tools based on it (Ollama, LM Studio, llama-cpp-python).

    in_f16 = write(Path("model.gguf"), model, tokenizer, "q8_0", name="code-50m")
    found = difference(Path("model.gguf"), model, rows)

Four architectures of llama.cpp support shapes of ours: `gpt2` (learned positions, LayerNorm, gelu_new), `llama` (RoPE,
RMSNorm, SwiGLU), `qwen3` (like llama, with QK-norm) and `arcee` (like llama, with squared ReLU and no gate). Other shapes are
refused, and all tokenizers but plain byte-level BPE. Names, keys and bytes of the weights are those of llama.cpp's converter
(convert_hf_to_gguf.py). There are more keys: the tokens for fill-in-the-middle, and that no space is added before a text.

Limits of llama.cpp, not of the file: it reads gelu_new from a table in half precision, and by default stores keys and
values in half precision, so with F32 its logits differ from ours by about 1e-3. With Q8_0 it also rounds activations. It
drops bytes that no token spells; we refuse them. `llama_detokenize` drops spaces before some punctuation; its token by token
output does not. With `-c` one can set a longer context than block_size, for which a `gpt2` has no positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import ModelConfig
from kindling.data.exported_templates import jinja_template
from kindling.errors import KindlingError, one_line
from kindling.formats.fold_weights import fold_qk_norm, without_derived
from kindling.rope import frequencies
from kindling.tokenization.handwritten_bpe import ByteLevelBPE

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, GGUFWriter
    from torch import Tensor

    from kindling.formats.parity import Difference
    from kindling.tokenization.tokenizer import Tokenizer
    from model import GPT

Architecture = Literal["gpt2", "llama", "qwen3", "arcee"]
Kind = Literal["f32", "f16", "q8_0"]

_EVERY: dict[str, Any] = {
    "final_norm": True,
    "head_bias": False,
    "attn_out_proj": True,
    "qk_norm": False,
    "bigram_rows": 0,
}
_ROPE = {"position": "rope", "norm": "rmsnorm"}
HOLDS: dict[Architecture, dict[str, Any]] = {
    "qwen3": {**_ROPE, "activation": "swiglu", "bias": False, **_EVERY, "qk_norm": "learned", "qkv_bias": None},
    "gpt2": {"position": "learned", "norm": "layernorm", "activation": "gelu_new", **_EVERY, "d_head": None},
    "llama": {**_ROPE, "activation": "swiglu", **_EVERY},
    "arcee": {**_ROPE, "activation": "relu2", "bias": False, **_EVERY, "qkv_bias": None},
}
"""The settings that each architecture requires. All others, such as sizes and tied heads, are free.

Of two that are equally near to a shape with QK-norm, the first is named in an error: qwen3, which keeps it."""

_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "norm_f": "output_norm", "head": "output"}
_IN_BLOCK = {
    "norm_1": "attn_norm",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "norm_2": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.gate": "ffn_gate",
    "mlp.down": "ffn_down",
}
_FIM = {  # GGUF's keys of the tokens for fill-in-the-middle, and their names in StarCoder's vocabularies
    "fim_pre": "<fim_prefix>",
    "fim_suf": "<fim_suffix>",
    "fim_mid": "<fim_middle>",
    "fim_pad": "<fim_pad>",
    "fim_rep": "<repo_name>",
    "fim_sep": "<file_sep>",
}
ROPE_FACTORS = "rope_freqs.weight"
Q8_0_BLOCK = 32  # weights that share a scale
_OTHER_FORMATS = "export it with --to hf or --to int8"


class GGUFError(KindlingError):
    """A run that a GGUF file cannot hold, or a file that cannot be read back."""


def nearest_architecture(cfg: ModelConfig) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of llama.cpp that holds the most settings of a shape, and what it needs of the others."""
    cfg, _ = fold_qk_norm(without_derived(cfg), {})
    differing = {
        name: {field: must for field, must in holds.items() if getattr(cfg, field) != must}
        for name, holds in HOLDS.items()
    }
    if len(cfg.rope_factors) == 4:  # Llama 3's, a tensor of its own
        for name in differing.keys() - {"llama"}:
            differing[name]["rope_factors"] = ()
    nearest = min(differing, key=lambda name: len(differing[name]))
    return nearest, differing[nearest]


def architecture(cfg: ModelConfig) -> Architecture:
    """Return the architecture of llama.cpp that computes a shape exactly.

    Raises GGUFError if there is none; the error names the nearest one and the settings in which it differs.
    """
    nearest, missing = nearest_architecture(cfg)
    if not missing:
        return nearest
    needs = ", ".join(f"model.{field}={must} (is {getattr(cfg, field)})" for field, must in missing.items())
    raise GGUFError(
        f"a GGUF file must be of an architecture of llama.cpp, but none of them holds this model: the nearest, {nearest}, "
        f"needs {needs}; {_OTHER_FORMATS}"
    )


def write(
    path: Path, model: GPT, tokenizer: Tokenizer, kind: Kind, name: str, template: str | None = None
) -> list[str]:
    """Write model and tokenizer to `path`; return the tensors that are in F16 although `kind` is q8_0.

    Q8_0 needs rows of a multiple of 32 weights; other matrices are in F16. Vectors and positions are always in F32. Tools show
    `name`. `template` is that of a run that was fine-tuned on instructions. Raises GGUFError before anything is written if the
    format cannot hold shape, tokenizer or weights. Raises OSError if writing fails, which leaves an incomplete file, so write to
    a temporary path.
    """
    import gguf

    arch = architecture(model.cfg)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(model.n_parameters(), 0, 0, 0))
    _add_shape(writer, model.cfg, arch, kind)
    _add_tokenizer(writer, tokenizer, model.cfg.vocab_size)
    if template is not None:
        writer.add_chat_template(jinja_template(template, tokenizer))
    in_f16 = []
    for tensor, values in _stored(model, arch):
        its = _type(tensor, values, kind)
        # `_encoded` copies, because tied and split tensors share memory
        writer.add_tensor(tensor, _encoded(tensor, values, its), raw_dtype=gguf.GGMLQuantizationType[its.upper()])
        if kind == "q8_0" and its == "f16":
            in_f16.append(tensor)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return in_f16


def read(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file of `write`, in float32, in the names and shapes of our `GPT`.

    A tied head is left out, as in `GPT.named_parameters`. A `gpt2` file has every bias; those that the model does not have are
    zeros. Raises GGUFError if the file cannot be read or is not one of ours.
    """
    import numpy as np
    import torch
    from gguf import dequantize

    reader = _open(path)
    try:
        if (arch := reader.fields["general.architecture"].contents()) not in HOLDS:
            raise ValueError(f"its architecture is {arch}")
        heads = [int(reader.fields[f"{arch}.attention.{key}"].contents()) for key in ("head_count", "head_count_kv")]
        stored = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
        return dict(_ours(stored, arch, *heads))
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, NotImplementedError) as e:
        raise GGUFError(f"{path} must be a GGUF file of Kindling's, but is not ({one_line(e)}); export again") from None


def difference(path: Path, model: GPT, rows: Tensor) -> Difference:
    """Compare the model with our GPT with the weights of a file, on rows (B, T) of at least 2 tokens.

    Raises GGUFError if the file has another shape.
    """
    import torch

    from kindling.formats.parity import compare
    from model import GPT

    held = GPT(fold_qk_norm(model.cfg, {})[0]).to(model.head.weight.device).eval()
    parameters, stored = dict(held.named_parameters()), read(path)
    extra = {name for name in stored if name not in parameters and stored[name].any()}
    wrong = extra | {n for n, p in parameters.items() if n not in stored or stored[n].shape != p.shape}
    if wrong:
        raise GGUFError(f"{path} must be of the model's shape, but {min(wrong)} is not; export again")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(stored[name])
    return compare(model, lambda row: held(row[None])[0], rows)


# -- weights ----------------------------------------------------------------------------------------------------------


def _stored(model: GPT, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of every tensor of the file."""
    import torch

    cfg = model.cfg
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if arch == "qwen3":
        cfg, parameters = fold_qk_norm(cfg, {name: p.detach().cpu() for name, p in parameters.items()})
    if len(cfg.rope_factors) == 4:  # as in the converter: what each frequency is divided by
        rope = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32), cfg.head_dim, cfg.rope_theta
        yield ROPE_FACTORS, frequencies(*rope) / frequencies(*rope, cfg.rope_factors)  # (D/2,)
    for ours, parameter in parameters.items():
        module, _, which = ours.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        name = _OUTSIDE[module] if block is None else f"blk.{block[1]}.{_IN_BLOCK[block[2]]}"
        values = parameter.detach().float().cpu()
        if arch != "gpt2" and name.endswith("attn_qkv"):
            widths = [n * cfg.head_dim for n in (cfg.n_head, cfg.kv_heads, cfg.kv_heads)]
            q, k, v = values.split(widths)
            if arch != "qwen3":  # its pairs are ours
                q, k = interleave(q, cfg.n_head), interleave(k, cfg.kv_heads)
            yield f"{name[:-3]}q.{which}", q
            yield f"{name[:-3]}k.{which}", k
            yield f"{name[:-3]}v.{which}", v
        else:
            yield f"{name}.{which}", values
        if arch == "gpt2" and module not in ("wte", "wpe", "head") and f"{module}.bias" not in parameters:
            yield f"{name}.bias", torch.zeros(values.size(0))  # gpt2 needs every bias


def _ours(stored: dict[str, Tensor], arch: str, n_head: int, n_kv_head: int) -> Iterator[tuple[str, Tensor]]:
    """Undo `_stored`. Raises KeyError for a name that it does not use."""
    import torch

    outside, in_block = ({theirs: ours for ours, theirs in names.items()} for names in (_OUTSIDE, _IN_BLOCK))
    for name, values in stored.items():
        if name == ROPE_FACTORS:
            continue
        parts = name.split(".")
        if parts[0] != "blk":
            yield f"{outside[parts[0]]}.{parts[1]}", values
            continue
        _, i, theirs, which = parts
        if theirs == "attn_q":
            k, v = (stored[f"blk.{i}.attn_{x}.{which}"] for x in "kv")
            if arch != "qwen3":
                values, k = halves(values, n_head), halves(k, n_kv_head)
            values = torch.cat((values, k, v))  # (C + 2 * n_kv_head * D, C)
            theirs = "attn_qkv"
        if theirs not in ("attn_k", "attn_v"):
            yield f"blocks.{i}.{in_block[theirs]}.{which}", values


def interleave(weight: Tensor, n_head: int) -> Tensor:
    """Reorder the rows of a projection (n_head * D, ...) to queries or keys from our RoPE layout to llama.cpp's.

    Ours rotates the pairs (i, i + D/2), as llama.cpp's qwen3 does; its llama and arcee the pairs (2i, 2i + 1).
    """
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(weight: Tensor, n_head: int) -> Tensor:
    """Undo `interleave`."""
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def _type(name: str, values: Tensor, kind: Kind) -> Kind:
    if kind == "f32" or values.dim() < 2 or name == "position_embd.weight":
        return "f32"
    return "f16" if values.size(1) % Q8_0_BLOCK else kind


def _encoded(name: str, values: Tensor, its: Kind) -> np.ndarray:
    """Return the array for the file, a copy. Raises GGUFError if a value is not finite in that type."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize, quantize

    its_type = GGMLQuantizationType[its.upper()]
    with np.errstate(over="ignore", invalid="ignore"):
        encoded = quantize(np.array(values.numpy(), order="C"), its_type)
        if not np.isfinite(dequantize(encoded, its_type)).all():
            raise GGUFError(
                f"the weights must be finite in {its}, but {name} is not; export with f32, or train it again"
            )
    return encoded


# -- keys -------------------------------------------------------------------------------------------------------------


def _add_shape(writer: GGUFWriter, cfg: ModelConfig, arch: Architecture, kind: Kind) -> None:
    import gguf

    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.ff_width)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_vocab_size(cfg.vocab_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(cfg.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
        writer.add_rope_dimension_count(cfg.head_dim)
        writer.add_rope_freq_base(cfg.rope_theta)
        if len(cfg.rope_factors) == 1:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(cfg.rope_factors[0])
    if arch == "qwen3" or cfg.d_head is not None:
        writer.add_key_length(cfg.head_dim)
        writer.add_value_length(cfg.head_dim)


def require_tokenizer(tokenizer: Tokenizer) -> ByteLevelBPE:
    """Return a tokenizer as plain byte-level BPE; raises GGUFError if it is another."""
    content = json.loads(tokenizer.to_json())
    try:
        if content.get("type") == "sentencepiece":
            raise ValueError("a tokenizer must be plain byte-level BPE, but is SentencePiece; use it")
        return ByteLevelBPE.from_dict(content)
    except ValueError as e:
        refused = str(e).partition("; use")[0]
        raise GGUFError(f"{refused}, for a GGUF file to hold it; {_OTHER_FORMATS}") from None


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    bpe = require_tokenizer(tokenizer)
    content = json.loads(tokenizer.to_json())
    tokens, types = _tokens(bpe, vocab_size)
    writer.add_tokenizer_model("gpt2")
    # llama.cpp's names for the two ways in which `handwritten_bpe.py` splits text into words
    writer.add_tokenizer_pre("starcoder" if bpe.split_digits else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    # without a bos token llama.cpp would use token 11; our documents follow an end-of-text token
    writer.add_bos_token_id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.eos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    for key, token in _FIM.items():
        if token in bpe.special_tokens:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", bpe.special_tokens[token])


def _tokens(bpe: ByteLevelBPE, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the token and the type of each id below vocab_size. Ids without a token get an unused one."""
    from gguf import TokenType

    if bpe.vocab_size > vocab_size:
        raise GGUFError(
            f"the tokenizer must fit in model.vocab_size={vocab_size}, but has {bpe.vocab_size} ids; use the run's own"
        )
    names = {i: token for token, i in (bpe.vocab | bpe.special_tokens).items()}
    types = dict.fromkeys(names, TokenType.NORMAL) | dict.fromkeys(bpe.special_tokens.values(), TokenType.CONTROL)
    ids = range(vocab_size)
    return [names.get(i, f"[PAD{i}]") for i in ids], [types.get(i, TokenType.UNUSED) for i in ids]


def _open(path: Path) -> GGUFReader:
    """Open a GGUF file. Raises GGUFError if it is missing or damaged."""
    import numpy as np
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        np.exceptions.AxisError,
    ) as e:
        raise GGUFError(f"{path} must be a whole GGUF file, but cannot be read ({one_line(e)}); export again") from None
