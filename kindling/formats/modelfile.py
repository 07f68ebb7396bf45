"""The Modelfile of a GGUF file: how Ollama asks a model that was fine-tuned on instructions, and samples its answers.

path = modelfile_path(Path("chat-f16.gguf"))          # chat-f16.Modelfile, beside it
path.write_text(modelfile("chat-f16.gguf", "alpaca", tokenizer, block_size=1024), encoding="utf-8")

ollama create chat -f chat-f16.Modelfile && ollama run chat
"""

from __future__ import annotations

from pathlib import Path

from kindling.data.exported_templates import Spelling, go_template
from kindling.data.jinja_chat import is_jinja
from kindling.generation.settings import Sampling


def modelfile_path(gguf: Path) -> Path:
    """Return the path of the Modelfile beside a GGUF file."""
    return gguf.with_name(f"{gguf.name.removesuffix('.gguf')}.Modelfile")


def modelfile(name: str, template: str, tokenizer: Spelling, block_size: int) -> str:
    """Return the Modelfile for the GGUF file called `name` in the same folder, with the defaults of generate.py."""
    sampling = Sampling()
    settings = {
        "stop": f'"{tokenizer.decode([tokenizer.eos_id])}"',  # of other ends, llama.cpp knows those that GGUF has a key for
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "num_predict": sampling.max_new_tokens,
        "num_ctx": block_size,
    }
    parameters = "".join(f"PARAMETER {key} {value}\n" for key, value in settings.items())
    # Ollama's language cannot say what a template in Jinja does; Ollama knows those of many models by their text in the GGUF file
    asked = "" if is_jinja(template) else f'TEMPLATE """{go_template(template, tokenizer)}"""\n'
    return f"FROM ./{name}\n{asked}{parameters}"
