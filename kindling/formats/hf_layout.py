"""Our configs and weights in transformers' names and layout, and back. Reads and writes no files.

    architecture(cfg)                       # a stock class that computes the same, such as "llama", else "kindling"
    hub_config(cfg, ids), hub_weights(weights, cfg)
    our_config(content), our_weights(tensors, cfg, "llama")

GPT-2's linear layers are stored as (in, out) and always have biases. The others have three matrices for queries, keys and
values. Qwen2 is Llama with biases of these three, Qwen3 is Llama with learned QK-norm; QK-norm without weights is folded into it
(fold_weights.py). Limit: transformers' Llama, Qwen2 and Qwen3 have dropout only on the attention weights, so only that is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from config import ModelConfig
from kindling.config_io import by_old_names, by_present_names
from kindling.errors import KindlingError
from kindling.formats.fold_weights import fold_qk_norm, without_derived
from model import GPT, LanguageModel, TransformersGPT2

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

Architecture = Literal["gpt2", "llama", "qwen2", "qwen3", "kindling"]
CLASSES: dict[Architecture, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "kindling": "KindlingForCausalLM",
}
CODE = "modeling_kindling.py"  # holds the class for all other shapes
OWN = "kindling"  # the key of our ModelConfig in config.json
_LLAMA: dict[str, tuple[Any, ...]] = {
    "position": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu",), "bias": (False,)
}  # fmt: skip
_EVERY: dict[str, tuple[Any, ...]] = {
    "final_norm": (True,), "attn_out_proj": (True,), "head_bias": (False,), "qk_norm": (False,), "bigram_rows": (0,),
    "qkv_bias": (None, False),
}  # fmt: skip
STOCK: dict[str, dict[str, tuple[Any, ...]]] = {  # the settings that the stock classes support; numbers are free
    "gpt2": {
        "position": ("learned",), "norm": ("layernorm",), "activation": ("gelu_new", "gelu", "relu", "relu2"), **_EVERY,
        "d_head": (None,)
    },
    "llama": {**_LLAMA, **_EVERY},
    "qwen2": {**_LLAMA, **_EVERY, "qkv_bias": (True,)},
    "qwen3": {**_LLAMA, **_EVERY, "qk_norm": ("learned", True)},
}  # fmt: skip
REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# settings that only training uses, or that choose the backbone; any weights fit them
TRAINING = ("dropout", "document_mask", "init_std", "embd_init_std", "residual_init", "backbone")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"} | {a: a for a in STOCK["gpt2"]["activation"]}
# the hub's names of our parameters; several names mean that ours is their concatenation, in this order
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "wte": ("transformer.wte",),
        "wpe": ("transformer.wpe",),
        "blocks.{}.norm_1": ("transformer.h.{}.ln_1",),
        "blocks.{}.attn.qkv": ("transformer.h.{}.attn.c_attn",),
        "blocks.{}.attn.proj": ("transformer.h.{}.attn.c_proj",),
        "blocks.{}.norm_2": ("transformer.h.{}.ln_2",),
        "blocks.{}.mlp.up": ("transformer.h.{}.mlp.c_fc",),
        "blocks.{}.mlp.down": ("transformer.h.{}.mlp.c_proj",),
        "norm_f": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    "llama": {
        "wte": ("model.embed_tokens",),
        "blocks.{}.norm_1": ("model.layers.{}.input_layernorm",),
        "blocks.{}.attn.qkv": tuple(f"model.layers.{{}}.self_attn.{t}_proj" for t in "qkv"),
        "blocks.{}.attn.proj": ("model.layers.{}.self_attn.o_proj",),
        "blocks.{}.norm_2": ("model.layers.{}.post_attention_layernorm",),
        "blocks.{}.mlp.up": ("model.layers.{}.mlp.up_proj",),
        "blocks.{}.mlp.gate": ("model.layers.{}.mlp.gate_proj",),
        "blocks.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
        "norm_f": ("model.norm",),
        "head": ("lm_head",),
    },
}
NAMES["qwen2"] = NAMES["llama"]
NAMES["qwen3"] = NAMES["llama"] | {
    f"blocks.{{}}.attn.{t}_norm": (f"model.layers.{{}}.self_attn.{t}_norm",) for t in "qk"
}
# masks and frequencies, which older versions saved with the weights
NO_WEIGHTS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


class HubFormatError(KindlingError):
    """A model that the format cannot hold, or a folder that Kindling cannot read."""


def unsupported_settings(cfg: ModelConfig, name: str) -> dict[str, Any]:
    """Return the settings of `cfg` that the stock class `name` does not support, each with a value that it does."""
    cfg = without_derived(cfg)
    found = {f: held[0] for f, held in STOCK[name].items() if getattr(cfg, f) not in held}
    if name == "gpt2" and cfg.kv_heads != cfg.n_head:
        found["n_kv_head"] = None
    return found


def nearest_stock(cfg: ModelConfig) -> tuple[Architecture, dict[str, Any]]:
    """Return the stock class that supports the most settings of `cfg`, and the values that it needs of the others.

    Of several that need as many changes, it is the one with QK-norm if the shape has that: no other setting buys as much.
    """
    stock: tuple[Architecture, ...] = ("qwen3", "gpt2", "llama", "qwen2")
    if not cfg.qk_norm:
        stock = ("gpt2", "llama", "qwen2", "qwen3")
    nearest = min(stock, key=lambda name: len(unsupported_settings(cfg, name)))
    return nearest, unsupported_settings(cfg, nearest)


def architecture(cfg: ModelConfig) -> Architecture:
    """Return the stock class that computes exactly the model of `cfg`, else "kindling", whose file supports every shape."""
    nearest, missing = nearest_stock(cfg)
    return "kindling" if missing else nearest


MEANING = {"n_kv_head": "kv_heads", "d_ff": "ff_width", "d_head": "head_dim", "qkv_bias": "has_qkv_bias"}
"""The properties that give the value of settings whose None means "derive"."""


def differing(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Return the settings in which two shapes differ. None and the value that it derives are the same."""
    unused = {*TRAINING} | (set() if "rope" in (a.position, b.position) else {"rope_theta", "rope_factors"})
    names = [f.name for f in fields(ModelConfig) if f.name not in unused]
    return [f for f in names if getattr(a, MEANING.get(f, f)) != getattr(b, MEANING.get(f, f))]


def hub_config(cfg: ModelConfig, ids: dict[str, int | None]) -> PretrainedConfig:
    """Return the config of the class that `architecture` names, with our config in it; `ids` are those of special tokens."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    to = architecture(cfg)
    common: dict[str, Any] = {
        "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": "float32",
        OWN: by_old_names(asdict(cfg)),
        **ids,
    }
    if to == "gpt2":
        return GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
            n_head=cfg.n_head, n_inner=cfg.ff_width, activation_function=cfg.activation,
            layer_norm_epsilon=cfg.norm_eps, initializer_range=cfg.init_std, resid_pdrop=cfg.dropout,
            embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout, architectures=["GPT2LMHeadModel"], **common,
        )  # fmt: skip
    if to != "kindling":
        derived = to != "qwen3" and cfg.head_dim * cfg.n_head == cfg.n_embd  # Qwen3 does not derive it
        common |= {} if derived else {"head_dim": cfg.head_dim}
        return {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[to](
            vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size, hidden_size=cfg.n_embd,
            intermediate_size=cfg.ff_width, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.kv_heads, rms_norm_eps=cfg.norm_eps, initializer_range=cfg.init_std,
            rope_parameters=hub_rope(cfg) | {"rope_theta": cfg.rope_theta}, attention_dropout=cfg.dropout,
            architectures=[CLASSES[to]], **common,
        )  # fmt: skip
    from kindling.formats.modeling_kindling import KindlingConfig

    shape = by_old_names({f: v for f, v in asdict(cfg).items() if f not in (*TRAINING, "tie_embeddings")})
    module = CODE.removesuffix(".py")
    classes = {"AutoConfig": f"{module}.KindlingConfig", "AutoModelForCausalLM": f"{module}.KindlingForCausalLM"}
    return KindlingConfig(
        **shape, dropout=cfg.dropout, initializer_range=cfg.init_std, architectures=["KindlingForCausalLM"],
        auto_map=classes, **common,
    )  # fmt: skip


ROPE_FACTORS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""transformers' names of the numbers of `rope_factors`."""


def hub_rope(cfg: ModelConfig) -> dict[str, Any]:
    """Return transformers' settings of stretched rotary positions."""
    kind = {0: "default", 1: "linear", 4: "llama3"}[len(cfg.rope_factors)]
    of_tokens = (*cfg.rope_factors[:3], *map(int, cfg.rope_factors[3:]))
    return {"rope_type": kind, **dict(zip(ROPE_FACTORS, of_tokens))}


def hub_weights(weights: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of our `GPT` in names and layout of the class that `architecture` names."""
    to = architecture(cfg)
    if to == "qwen3":
        cfg, weights = fold_qk_norm(cfg, weights)
    out: dict[str, Tensor] = {}
    for name, shape in _shapes(cfg, to).items():
        weight = weights.get(name)
        if weight is None:
            weight = torch.zeros(shape)  # a bias that GPT-2 has and ours does not
        names = hub_names(name, to)
        for theirs, part in zip(names, weight.split(_rows(cfg, shape, len(names)))):
            out[theirs] = (part.T if _turned(name, shape, to) else part).contiguous()
    return out


def our_weights(tensors: Mapping[str, Tensor], cfg: ModelConfig, to: Architecture) -> dict[str, Tensor]:
    """Return the weights of our `GPT` from those of a class; raises HubFormatError if some are missing or left over."""
    if to == "gpt2" and not any(name.startswith("transformer.") for name in tensors):  # like OpenAI's files on the hub
        tensors = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in tensors.items()}
    if cfg.n_layer > len(tensors):
        raise HubFormatError(
            f"the weights must be of {cfg.n_layer} layers, but are {len(tensors)} tensors; fetch them all"
        )
    left = {name: t for name, t in tensors.items() if not NO_WEIGHTS.search(name)}
    if cfg.tie_embeddings:
        _drop_tied_head(left, to)
    out: dict[str, Tensor] = {}
    for name, shape in _shapes(cfg, to).items():
        names = hub_names(name, to)
        parts = []
        for theirs, rows in zip(names, _rows(cfg, shape, len(names))):
            must = (rows, *shape[1:])[:: -1 if _turned(name, shape, to) else 1]
            parts.append(_taken(left, theirs, must))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        out[name] = (whole.T if _turned(name, shape, to) else whole).contiguous()
    if left:
        raise HubFormatError(f"the weights must be those of the config, but {next(iter(left))} has no place in it")
    return out


def _taken(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove a tensor and return it; raises HubFormatError if it is missing, or has another shape or type."""
    if name not in tensors:
        raise HubFormatError(f"the weights must be all that the config asks for, but {name} is missing; fetch them all")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape or tensor.dtype not in REAL:
        raise HubFormatError(
            f"{name} must be {shape} real numbers, as the config says, but is {tuple(tensor.shape)} of {tensor.dtype}; "
            f"fetch config and weights of the same model"
        )
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise HubFormatError(f"{name} must be of finite numbers, but holds NaN or infinity; fetch the weights again")
    return tensor


def _drop_tied_head(tensors: dict[str, Tensor], to: Architecture) -> None:
    """Remove a tied head that was saved as well; raises HubFormatError if it differs from the embedding."""
    (embedding,), (head,) = hub_names("wte.weight", to), hub_names("head.weight", to)
    if head in tensors and not torch.equal(tensors.pop(head), tensors.get(embedding, torch.empty(0))):
        raise HubFormatError(
            f"{head} must be {embedding}, as tie_word_embeddings says, but is another matrix; set that to false"
        )


def hub_names(name: str, to: Architecture) -> list[str]:
    """Return the class's names of our parameter: one name, or three for queries, keys and values."""
    if to == "kindling":
        return [name]
    stem, _, kind = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    theirs = NAMES[to][re.sub(r"\.\d+\.", ".{}.", stem)]
    return [f"{t.format(layer[1] if layer else '')}.{kind}" for t in theirs]


def _rows(cfg: ModelConfig, shape: tuple[int, ...], n_parts: int) -> list[int]:
    """Return the number of rows of each part of a parameter."""
    return [shape[0]] if n_parts == 1 else [n * cfg.head_dim for n in (cfg.n_head, cfg.kv_heads, cfg.kv_heads)]


def _turned(name: str, shape: tuple[int, ...], to: Architecture) -> bool:
    """Return whether the class stores a matrix transposed."""
    return to == "gpt2" and len(shape) == 2 and name.startswith("blocks.")


def _shapes(cfg: ModelConfig, to: Architecture) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of our GPT's parameters, including the biases that GPT-2 always has."""
    with torch.device("meta"):  # needs no memory
        gpt = GPT(replace(cfg, backbone="kindling", bias=cfg.bias or to == "gpt2"))
    return {name: tuple(p.shape) for name, p in gpt.named_parameters()}


def our_config(content: dict[str, Any], name: Architecture) -> ModelConfig:
    """Return our config for a config.json; settings that only training uses have the defaults of `ModelConfig`.

    Raises HubFormatError for what transformers computes differently from us, and ConfigError for impossible shapes.
    """
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    _require_known(content, name)
    if name == "gpt2":
        return _of_gpt2(GPT2Config.from_dict(content))
    if name == "llama":
        return _of_llama(LlamaConfig.from_dict(content))
    if name == "qwen2":
        return replace(_of_llama(Qwen2Config.from_dict(content)), qkv_bias=True)
    if name == "qwen3":
        return replace(_of_llama(Qwen3Config.from_dict(content)), qk_norm="learned")
    shape = [f.name for f in fields(ModelConfig) if f.name not in (*TRAINING, "tie_embeddings")]
    # older folders do not have these keys
    content = by_present_names({"pair_rows": 0, "d_head": None, "qkv_bias": None, "rope_factors": ()} | content)
    return ModelConfig(**{f: content[f] for f in shape}, tie_embeddings=content["tie_word_embeddings"])


def _require(settings: dict[str, tuple[Any, Any]]) -> None:
    """Raise HubFormatError for the first setting with a value that we do not compute."""
    for name, (value, must) in settings.items():
        if value not in must:
            raise HubFormatError(
                f"{name} must be {' or '.join(map(repr, must))} to be computed as Kindling does, but is {value!r}; "
                f"choose another model"
            )


def _require_known(content: dict[str, Any], name: Architecture) -> None:
    """Raise HubFormatError for a config.json with a setting that changes what is computed, and that we do not know."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    its = content.get("architectures")
    _require(
        {
            "quantization_config": (content.get("quantization_config"), (None,)),
            "architectures": (its, (None, [], [CLASSES[name]])),
            "rope_scaling.rope_type": (
                rope.get("rope_type", rope.get("type", "default")),
                ("default", "linear", "llama3"),
            ),
            "layer_types": (sorted({"full_attention", *(content.get("layer_types") or ())}), (["full_attention"],)),
            "use_sliding_window": (content.get("use_sliding_window", False), (False, None)),
            "auto_map": (content.get("auto_map") if name != "kindling" else None, (None,)),
        }
    )


def _of_gpt2(theirs: GPT2Config) -> ModelConfig:
    _require(
        {
            "activation_function": (theirs.activation_function, tuple(ACTIVATIONS)),
            "scale_attn_weights": (theirs.scale_attn_weights, (True,)),
            "scale_attn_by_inverse_layer_idx": (theirs.scale_attn_by_inverse_layer_idx, (False,)),
            "add_cross_attention": (theirs.add_cross_attention, (False,)),
        }
    )
    return ModelConfig(
        block_size=theirs.n_positions, vocab_size=theirs.vocab_size, n_layer=theirs.n_layer, n_head=theirs.n_head,
        n_embd=theirs.n_embd, d_ff=theirs.n_inner, norm_eps=theirs.layer_norm_epsilon,
        activation=ACTIVATIONS[theirs.activation_function], tie_embeddings=theirs.tie_word_embeddings,
    )  # fmt: skip


def _of_llama(theirs: LlamaConfig | Qwen2Config | Qwen3Config) -> ModelConfig:
    rope, heads = theirs.rope_parameters, theirs.num_attention_heads
    d_head = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    scaling = [float(rope[name]) for name in ROPE_FACTORS if rope["rope_type"] != "default" and name in rope]
    _require(  # not all classes have all settings
        {
            "hidden_act": (theirs.hidden_act, ("silu", "swish")),
            "attention_bias": (getattr(theirs, "attention_bias", False), (False,)),
            "mlp_bias": (getattr(theirs, "mlp_bias", False), (False,)),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        }
    )
    return ModelConfig(
        block_size=theirs.max_position_embeddings, vocab_size=theirs.vocab_size, n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads, n_kv_head=theirs.num_key_value_heads, n_embd=theirs.hidden_size,
        d_head=None if d_head * heads == theirs.hidden_size else d_head, d_ff=theirs.intermediate_size, position="rope",
        rope_theta=rope["rope_theta"], rope_factors=tuple(scaling[:1] if rope["rope_type"] == "linear" else scaling),
        norm="rmsnorm", norm_eps=theirs.rms_norm_eps, activation="swiglu", bias=False,
        tie_embeddings=theirs.tie_word_embeddings,
    )  # fmt: skip


def restore_config(
    cfg: ModelConfig, kept: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return config and weights as they were before they were written, if `kept`, our config of that time, still fits.

    If the folder has changed since, such as by another vocabulary, the config is that of the folder now, and only settings
    for training are taken from `kept`.
    """
    then = ModelConfig(**by_present_names(kept))
    biases = {name for name in weights if name.endswith(".bias")}
    if cfg.bias and not then.bias and not any(weights[name].any() for name in biases):
        cfg = replace(cfg, bias=False)
        weights = {name: w for name, w in weights.items() if name not in biases}
    if not differing(cfg, then):
        return then, weights
    return replace(cfg, **{f: getattr(then, f) for f in TRAINING if f != "backbone"}), weights


@torch.no_grad()
def load_into(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of our `GPT` into a model of the same shape, on either backbone."""
    if isinstance(model, TransformersGPT2):
        weights = {f"gpt2.{name}": weight for name, weight in hub_weights(weights, model.cfg).items()}
    for name, p in model.named_parameters():
        p.copy_(weights[name])
