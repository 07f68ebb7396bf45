"""Writes and reads folders in the format of the Hugging Face hub, which transformers loads.

    write(folder, model, tokenizer, card)               # config, weights, tokenizer, generation config, README.md
    difference(folder, model, rows)                     # between the model and the folder as transformers loads it
    cfg, weights = read(Path("models/gpt2"))            # a GPT-2, a Llama, a Qwen2, a Qwen3 or one of our own

Shapes that `GPT2LMHeadModel`, `LlamaForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM` compute are written for these classes
(hf_layout.py). All others need the file modeling_kindling.py, which is written into the folder. config.json holds our
`ModelConfig` under the key "kindling", so reading one of our folders gives the same config, unless weights were folded
(fold_weights.py). Limits: weights are in safetensors, written in float32; no SentencePiece.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from config import ModelConfig
from kindling.data.exported_templates import jinja_template, parts
from kindling.data.jinja_chat import is_jinja
from kindling.data.prompts import MARKERS
from kindling.errors import KindlingError, one_line
from kindling.files import sha256_file, write_json, write_text
from kindling.formats.hf_layout import (
    CLASSES,
    CODE,
    OWN,
    Architecture,
    HubFormatError,
    architecture,
    hub_config,
    hub_rope,
    hub_weights,
    our_config,
    our_weights,
    restore_config,
)
from kindling.formats.parity import Difference, compare
from kindling.tokenization.added_space import without_added_space
from kindling.tokenization.tokenizer import SentencePieceTokenizer, Tokenizer
from model import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"


def require_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise HubFormatError if the format cannot hold the tokenizer."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        raise HubFormatError(
            "the tokenizer must be of the `tokenizers` library to give the same ids in transformers, but the run has "
            "tokenizer.kind=sentencepiece; train a run with --tokenizer.kind bpe"
        )


def write(folder: Path, model: GPT, tokenizer: Tokenizer, card: str, template: str | None = None) -> None:
    """Write all files of the format into an existing empty folder; `card` becomes README.md.

    `template` is that of a run that was fine-tuned on instructions.
    Raises HubFormatError for a SentencePiece tokenizer, and if the folder cannot be written. The folder is then incomplete.
    """
    from safetensors import SafetensorError

    require_tokenizer(tokenizer)
    try:
        _write_model(folder, model, tokenizer, template)
        _write_tokenizer(folder, tokenizer, model.cfg.block_size, template)
        write_text(folder / "README.md", card)
    except (OSError, SafetensorError) as e:
        raise HubFormatError(
            f"{folder} must be writable and have room for the model, but writing gave: {one_line(e)}; free some space or "
            f"choose another folder"
        ) from None


def _write_model(folder: Path, model: GPT, tokenizer: Tokenizer, template: str | None) -> None:
    """Write config, code, weights, and the generation config with the special tokens."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    hub_config(model.cfg, ids).save_pretrained(folder)
    if architecture(model.cfg) in ("llama", "qwen2", "qwen3"):  # where transformers 4 reads it
        scaling = {"rope_scaling": hub_rope(model.cfg)} if model.cfg.rope_factors else {}
        _add(folder / CONFIG, rope_theta=model.cfg.rope_theta, **scaling)
    if architecture(model.cfg) == "kindling":
        shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
    # named_parameters lists a tied matrix once
    weights = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    save_file(hub_weights(weights, model.cfg), folder / WEIGHTS, metadata={"format": "pt"})
    several = template is not None or len(tokenizer.end_ids) > 1
    stops = {"eos_token_id": list(tokenizer.end_ids)} if several else {}  # what ends an answer
    GenerationConfig(**{**ids, **stops}).save_pretrained(folder)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int, template: str | None) -> None:
    """Write the tokenizer so that AutoTokenizer gives our ids: special tokens in a text are text, and only bos is added.

    With a chat template, it reads the special tokens of a text, as the template writes them between answers and questions.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    cfg = tokenizer.cfg
    backend = Backend.from_str(tokenizer.to_json())
    if template is not None and not is_jinja(template):
        _split_before_answers(backend, template)
    bos = cfg.bos_token
    before = "" if bos is None else f"{bos}:0 "
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A:0",
        pair=f"{before}$A:0 $B:1",
        special_tokens=[] if bos is None else [(bos, tokenizer.bos_id)],
    )
    named = {"bos_token": bos, "eos_token": cfg.eos_token, "pad_token": cfg.pad_token, "unk_token": cfg.unk_token}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
        split_special_tokens=template is None,  # "<|endoftext|>" in a document is 13 characters, not the end of it
        padding_side="left",  # new tokens must follow the prompt directly
        **{name: token for name, token in named.items() if token is not None},
    )
    try:
        fast.save_pretrained(folder)
    except Exception as e:  # the library raises plain Exception when the disk is full
        raise e if isinstance(e, OSError) else OSError(str(e)) from None
    if template is not None:
        write_text(folder / TEMPLATE, jinja_template(template, tokenizer))
    # a class name that transformers 4 knows
    _add(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _split_before_answers(backend: Backend, template: str) -> None:
    """Let no token span the border of a question and its answer, as none does in training."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.Split(parts(template).after, "merged_with_previous")
    present = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, *present])


def _without_split(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the pre-tokenizers of a tokenizer.json in their order, without that of `_split_before_answers`."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    added = [{"String": parts(template).after} for template in MARKERS]
    is_added = bool(steps) and steps[0].get("behavior") == "MergedWithPrevious" and steps[0].get("pattern") in added
    return steps[1:] if is_added else steps


def _add(path: Path, **values: Any) -> None:
    """Set entries of a JSON file."""
    write_json(path, read_json(path) | values)


def difference(folder: Path, model: GPT, rows: Tensor) -> Difference:
    """Compare the model with the folder as transformers loads it, in float32, on rows (B, T) of at least 2 tokens.

    Loading a model of our own class runs the code in the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading is over before one can read it
    own = read_json(folder / CONFIG).get("model_type") == "kindling"
    device = model.head.weight.device
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own, dtype=torch.float32).to(device).eval()
    return compare(model, lambda row: theirs(row[None], use_cache=False).logits[0], rows)


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return config and weights of a folder with the hub's layout, in float32, under the names of our `GPT`.

    Settings that only training uses come from the folder's "kindling" key, else from the defaults of `ModelConfig`. Raises
    HubFormatError for other architectures, for settings that we do not have, and for files that are missing or damaged, or do
    not fit each other.
    """
    content, name, cfg = _read_config(folder)
    try:
        weights = our_weights(_read_weights(folder), cfg, name)
    except (HubFormatError, RuntimeError) as e:  # RuntimeError: torch's, for sizes that fit no memory
        raise HubFormatError(f"{folder}: {e if isinstance(e, HubFormatError) else one_line(e)}") from None
    if OWN not in content:
        return cfg, weights
    try:
        return restore_config(cfg, content[OWN], weights)
    except Exception as e:  # wrong types, unknown names or impossible values
        raise HubFormatError(
            f'{folder / CONFIG} must have our own config under "{OWN}", but has not ({one_line(e)}); delete that key'
        ) from None


def read_config(folder: Path) -> ModelConfig:
    """Return our config for a folder's config.json, and see that weights are there. Raises HubFormatError as `read` does.

    A folder that we wrote may have been made from a config with fewer biases, which only the weights show: it is read whole.
    """
    content, _, cfg = _read_config(folder)
    weight_files(folder)
    return read(folder)[0] if OWN in content else cfg


def _read_config(folder: Path) -> tuple[dict[str, Any], Architecture, ModelConfig]:
    """Return the content of a folder's config.json, the architecture that it names, and our config for it."""
    path = folder / CONFIG
    content = read_json(path)
    name = content.get("model_type")
    if name is None and "weights_sha256" in content:
        raise HubFormatError(
            f"{folder} must be a model that PyTorch can load, but is an export to int8; use it with `python autocomplete.py "
            f"{folder}` or `python serve.py {folder}`, or name the run"
        )
    if name not in CLASSES:
        raise HubFormatError(
            f"{path} must be of a model_type that Kindling computes ({', '.join(CLASSES)}), but is of {name!r}; choose another "
            f"model"
        )
    try:
        cfg = our_config(content, name)
    except HubFormatError as e:
        raise HubFormatError(f"{path}: {e}") from None
    except KindlingError as e:  # its way out is a flag, which changes no file
        raise HubFormatError(f"{path}: {str(e).rpartition(';')[0]}; fetch it again") from None
    except Exception as e:  # transformers and pydantic check types, and raise errors of their own
        raise HubFormatError(f"{path} must be a config of {name}, but is not ({one_line(e)}); fetch it again") from None
    return content, name, cfg


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises HubFormatError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise HubFormatError(
            f"{path} must be a readable JSON file of a model of the hub, but is not ({one_line(e)}); fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise HubFormatError(f"{path} must hold a JSON object, but holds a {type(content).__name__}; fetch it again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights; raises HubFormatError if there are none in safetensors."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        # only files directly in the folder
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise HubFormatError(f"{folder / INDEX} must name the files of the weights, but does not; fetch it again")
        if missing := sorted(n for n in names if not (folder / n).is_file()):
            raise HubFormatError(f"{folder} must hold all files of {INDEX}, but {missing[0]} is missing; fetch it too")
        return [folder / n for n in sorted(names)]
    gguf = next((p.name for p in sorted(folder.glob("*.gguf"))), None)
    pickled = next((p.name for p in sorted(folder.glob("pytorch_model*.bin"))), None)
    raise HubFormatError(
        f"{folder} must hold {WEIGHTS} or {INDEX}, but "
        + (f"holds {pickled}, which could run code; have transformers load it and call save_pretrained, which writes "
           f"safetensors" if pickled else f"holds {gguf}, which llama.cpp runs; fetch the model that it was made from" if gguf
           else "holds neither; fetch the weights too")
    )  # fmt: skip


def weights_sha256(folder: Path) -> str:
    """Return the sha256 of the file with the weights. If there are several, of their hashes in the order of their names."""
    hashes = [sha256_file(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError, ValueError, KeyError) as e:
            raise HubFormatError(
                f"{path.name} must be a whole safetensors file, but is not ({one_line(e)}); fetch it again"
            ) from None
    return tensors


def require_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise HubFormatError unless the folder's tokenizer and `tokenizer` give the same ids for every text."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise HubFormatError(
            f"{folder} must hold a tokenizer.json, to see that its ids are the run's, but does not; have transformers "
            f"load the tokenizer and call save_pretrained"
        )
    try:
        theirs = without_added_space(Backend.from_str(path.read_text(encoding="utf-8")).to_str())
    except Exception as e:  # the library raises plain Exception
        raise HubFormatError(
            f"{path} must be of the `tokenizers` library, but is not ({one_line(e)}); fetch it again"
        ) from None
    if _what_counts(theirs) != _what_counts(tokenizer.to_json()):
        raise HubFormatError(
            f"{path} must give the ids of the run's tokenizer, but is another; use it in the run with "
            f"--tokenizer.kind pretrained --tokenizer.path {folder}"
        )


def _what_counts(tokenizer_json: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json, without what our ids do not depend on."""
    content = json.loads(tokenizer_json)
    for name in ("version", "post_processor", "padding", "truncation"):
        content.pop(name, None)
    content["pre_tokenizer"] = _without_split(content.get("pre_tokenizer"))
    # we never search a text for special tokens, so how to match them does not count
    added = content.get("added_tokens", [])
    content["added_tokens"] = [{"id": t["id"], "content": t["content"]} if t.get("special") else t for t in added]
    return content
