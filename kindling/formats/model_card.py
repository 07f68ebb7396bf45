"""The model card of a run: what the model is, its data, its training, its evaluation, and how to load it.

    text = card(RunDirectory(Path("runs/demo")), "demo", checkpoint, ["model.safetensors", "config.json"])

Markdown with the YAML front matter of the Hugging Face hub. All figures are read from the run's files; what is not known is
left out. Who publishes the model chooses the licence. Absolute paths are shortened to their last part.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from config import Config, ModelConfig, SourceConfig
from kindling.config_io import to_yaml
from kindling.data.ledger import Ledger
from kindling.data.prompts import Exchange, prompt_text
from kindling.data.shards import SplitInfo, read_manifest
from kindling.data.sources import LANGUAGES
from kindling.errors import one_line
from kindling.evaluation import report, results_file
from kindling.formats.hf_layout import CLASSES, architecture
from kindling.public_paths import PublicPaths, is_on_hub
from kindling.runs.averaging import average_name, average_sha256
from kindling.runs.checkpoint import CheckpointError, RunDirectory, load_state, step_of
from kindling.runs.loading import Chat, chat_of
from kindling.runs.metrics import read_metrics
from kindling.sample_prompts import sample_prompts
from kindling.tables import Section, as_markdown

NATURAL = {"english": "en"}  # natural languages, and the hub's codes
CODE = set(LANGUAGES.values()) - {"markdown", "text"}
NEW_TOKENS = 64  # in the example


def card(
    run: RunDirectory, name: str, checkpoint: Path, files: Sequence[str] | None = None, averaged: Sequence[Path] = ()
) -> str:
    """Return the card of a checkpoint as Markdown; `name` is the title.

    `files` are listed if given. With several `averaged`, the weights are the mean of those at these checkpoints, of which
    `checkpoint` is the last. Raises KindlingError if the run's config, manifest or ledger cannot be read.
    """
    cfg, ledger = run.config(), _read_ledger(run)
    manifest = read_manifest(run.data)
    step = int(checkpoint.name.removeprefix("step_"))
    public = PublicPaths(cfg)
    parts = [
        _front_matter(cfg, ledger),
        f"# {name}\n",
        _introduction(cfg, checkpoint, step, averaged),
        _use(cfg, chat_of(run), files),
        _tables([_shape(cfg.model), _training(cfg, run, checkpoint, step)]),
        _tables(public([_sources(cfg), _ledger(ledger, cfg), _splits(manifest, cfg)])),
        *(_evaluation(run, averaged or [checkpoint], split, public) for split in ("val", "test")),
        _limits(cfg),
        f"<details>\n<summary>All settings</summary>\n\n```yaml\n{to_yaml(Config(**public(asdict(cfg))))}```\n\n</details>",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _read_ledger(run: RunDirectory) -> Ledger:
    try:
        return Ledger.read(run.data)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            f"{run.data / 'ledger.json'} must be as the run wrote it, but cannot be read ({one_line(e)}); copy it back "
            f"from data/"
        ) from None


def _tables(sections: list[Section]) -> str:
    return as_markdown("", [], sections).partition("\n")[2].strip("\n")  # without the title


def _languages(ledger: Ledger) -> list[str]:
    return sorted({row["language"] for row in ledger.rows.values() if row["kept"][0]})


def _front_matter(cfg: Config, ledger: Ledger) -> str:
    languages = _languages(ledger)
    code = [language for language in languages if language in CODE]
    tags = ["kindling", *(["code"] if code else []), *code]
    tags += ["instruction-tuned"] if cfg.data.instructions else []
    hub = [s.path for s in cfg.data.sources if s.path and is_on_hub(s)]
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if said := [NATURAL[one] for one in languages if one in NATURAL] + (["code"] if code else []):
        values["language"] = said
    if names := [path for path in dict.fromkeys(hub) if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)]:
        values["datasets"] = names
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}# license: choose one before you publish\n---\n"


def _introduction(cfg: Config, checkpoint: Path, step: int, averaged: Sequence[Path]) -> str:
    how = "trained from random weights"
    if cfg.train.init_from is not None:
        how = f"{'fine-tuned on instructions' if cfg.data.instructions else 'trained'} from the weights of "
        how += f"`{Path(cfg.train.init_from).name}`"
    if cfg.train.extend is not None:
        how += f", going on with the run `{Path(cfg.train.extend).name}`"
        if (began := _state(checkpoint).get("extended_from")) is not None:
            how += f" from its step {began:,}"
    when = f"as it was at step {step:,}"
    if len(averaged) > 1:
        when = f"the mean of its weights at {len(averaged)} checkpoints, from step {step_of(averaged[0]):,} to step {step:,}"
    return (
        f"This is a language model of {cfg.model.n_parameters:,} parameters, {how} with Kindling, "
        f"preset `{cfg.preset}`, {when}.\n\n"
        f"No licence is chosen here. Whoever publishes the model chooses one that the licences of its sources allow.\n"
    )


def _use(cfg: Config, chat: Chat | None, files: Sequence[str] | None) -> str:
    kind = architecture(cfg.model)
    own = ", trust_remote_code=True" if kind == "kindling" else ""
    inputs = f'tokenizer({next(iter(sample_prompts(cfg)), "The")!r}, return_tensors="pt")'
    new = "ids[0]"
    if chat is not None:
        asked = '[{"role": "user", "content": "Write a Python function that adds two numbers."}]'
        how = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        inputs = f"tokenizer.apply_chat_template(\n    {asked},\n    {how},\n)"
        new = "ids[0, inputs.input_ids.size(1) :]"
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(name{own})
model = AutoModelForCausalLM.from_pretrained(name{own})
inputs = {inputs}
room = {cfg.model.block_size} - inputs.input_ids.size(1)  # the context holds no more
ids = model.generate(**inputs, max_new_tokens=min({NEW_TOKENS}, room))
print(tokenizer.decode({new}, skip_special_tokens=True))
"""
    said = "" if kind != "kindling" else (
        "The architecture is none of transformers' own: `trust_remote_code=True` runs modeling_kindling.py, which is in "
        "this folder.\n\n"
    )  # fmt: skip
    template = ""
    if chat is not None:
        text = json.dumps(prompt_text(chat.template, Exchange("...")), ensure_ascii=False)
        template = f"It is asked in its chat template, which writes a question as `{text}`. "
        template += "" if chat.remembers else "It was fine-tuned on single exchanges: ask each question alone. "
        template += "A message that spells a control token is refused.\n\n"
    listed = f"Files: {', '.join(f'`{file}`' for file in files)}.\n" if files else ""
    return f"## Use\n\n{said}{template}```python\n{code}```\n\n{listed}"


def _shape(cfg: ModelConfig) -> Section:
    heads = f"{cfg.n_head}" if cfg.kv_heads == cfg.n_head else f"{cfg.n_head}, {cfg.kv_heads} of keys and values"
    absent = {
        "biases": cfg.bias,
        "a final norm": cfg.final_norm,
        "an output projection of attention": cfg.attn_out_proj,
    }
    present = {"a bias in the head": cfg.head_bias, "normalised queries and keys": cfg.qk_norm is True}
    present["normalised queries and keys, with weights"] = cfg.qk_norm == "learned"
    rows = [
        ["class", CLASSES[architecture(cfg)]],
        ["parameters", f"{cfg.n_parameters:,}"],
        ["layers", f"{cfg.n_layer}"],
        ["heads", heads],
        ["width", f"{cfg.n_embd:,}"],
        ["width of the feed-forward layers", f"{cfg.ff_width:,}, {cfg.activation}"],
        ["context", f"{cfg.block_size:,} tokens"],
        ["vocabulary", f"{cfg.vocab_size:,} tokens"],
        ["positions", cfg.position],
        ["norm", cfg.norm],
        ["head", "shares the token embedding's matrix" if cfg.tie_embeddings else "a matrix of its own"],
    ]
    rows += [["pair embedding", f"{cfg.bigram_rows:,} rows"]] if cfg.bigram_rows else []
    rows += [["without", what] for what, there in absent.items() if not there]
    rows += [["with", what] for what, there in present.items() if there]
    return Section("Architecture", ["", ""], rows)


def _training(cfg: Config, run: RunDirectory, checkpoint: Path, step: int) -> Section:
    lines = [line for line in read_metrics(run.path / "metrics.jsonl") if line["step"] <= step]
    last: dict[str, Any] = {}
    for line in lines:
        last |= {key: value for key, value in line.items() if value is not None}
    at = {"val_loss", "val_perplexity", "val_bits_per_byte"} & lines[-1].keys() if lines else set()
    train, where = cfg.train, _state(checkpoint).get("environment")
    rate = f"{train.lr:g}" + (f", Muon {train.muon_lr:g}" if train.optimizer == "muon" else "")
    rows = [["steps", f"{step:,}"]]
    if "tokens" in last:
        rows.append(["tokens", f"{last['tokens']:,}"])
    if "elapsed_s" in last:
        rows.append(["seconds of training", f"{last['elapsed_s']:,.0f}"])
    if where:
        rows.append(["on", f"{where['device']}, {where['precision']}, torch {where['torch']}"])
    rows += [
        ["rows of a step", f"{train.batch_size:,} of {cfg.model.block_size:,} tokens"],
        ["optimiser", f"{train.optimizer}, weight decay {train.weight_decay:g}"],
        ["peak learning rate", f"{rate}, {train.schedule} after {train.warmup_steps:,} steps of warmup"],
    ]
    if "loss" in last:
        rows.append(["last training loss", f"{last['loss']:.4f} nats a token"])
    if "val_loss" in at:
        rows.append(["validation loss", f"{last['val_loss']:.4f} nats a token"])
    if "val_bits_per_byte" in at:
        rows.append(["validation bits per byte", f"{last['val_bits_per_byte']:.4f}"])
    if last.get("skipped_steps"):
        rows.append(["steps skipped, their gradient being no number", f"{last['skipped_steps']:,}"])
    return Section("Training", ["", ""], rows)


def _state(checkpoint: Path) -> dict[str, Any]:
    """Return the training state of a checkpoint; empty if there is none."""
    try:
        return load_state(checkpoint, mapped=True)
    except CheckpointError:
        return {}


def _sources(cfg: Config) -> Section:
    weights = sum(s.weight for s in cfg.data.sources)

    def row(source: SourceConfig) -> list[str]:
        limits = [f"first {source.max_documents:,} documents"] if source.max_documents else []
        limits += [f"up to {source.max_bytes / 1e6:,.0f} MB"] if source.max_bytes else []
        return [source.label, source.kind, ", ".join(limits) or "-", f"{source.weight / weights:.0%}"]

    columns = ["source", "kind", "limit", "share wanted"]
    notes = []
    if any(s.kind in ("local-python", "docstrings") and s.path is None for s in cfg.data.sources):
        notes = ["local-python and docstrings read the Python source that is installed on the machine of the training"]
    return Section("Sources", columns, [row(s) for s in cfg.data.sources], notes, names=3)


def _ledger(ledger: Ledger, cfg: Config) -> Section:
    changes = ledger.names("changed")
    rows = [(f"changed: {label}" if label in changes else label, counts) for label, counts in ledger.totals()]
    if len(ledger.rows) > 1:
        rows += [(f"kept: {r['source']}, {r['language']}", (r["kept"][0], r["kept"][1])) for r in ledger.rows.values()]
    cells = [[label, f"{n:,}", f"{size / 1e6:,.2f}"] for label, (n, size) in rows]
    what = "examples" if cfg.data.instructions else "documents"
    return Section("Data", ["", what, "MB"], cells, list(ledger.notes))


def _splits(manifest: dict[str, Any], cfg: Config) -> Section:
    splits = {name: SplitInfo(**info) for name, info in manifest["splits"].items()}
    rows = [[name, f"{i.documents:,}", f"{i.tokens:,}", f"{i.bytes / 1e6:,.2f}"] for name, i in splits.items()]
    notes = ["split by a hash of the content"]
    if cfg.data.near_dedup is not None:
        notes[0] += "; near-duplicates of held-out documents are not trained on"
    return Section("Splits", ["", "documents", "tokens", "MB"], rows, notes)


def _evaluation(run: RunDirectory, checkpoints: Sequence[Path], split: str, public: PublicPaths) -> str:
    """Return the section on the evaluation of a split; empty if there is none. It says so if the weights were others."""
    path = run.path / results_file.file_name("eval.json", split)
    if not path.is_file():
        return ""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != results_file.FORMAT:
            raise ValueError(f"its format is {results['format']} and not {results_file.FORMAT}")
        kept = "losses_sha256" in results
        lines = (run.path / results_file.file_name("losses.jsonl", split)).read_bytes() if kept else b""
        if kept and hashlib.sha256(lines).hexdigest() != results["losses_sha256"]:
            raise ValueError("the losses beside it have changed")
        if "texts" in results:  # by the paths that were given
            results["texts"] = {Path(name).name: text for name, text in results["texts"].items()}
        sections = report.sections(public(results), public([json.loads(line) for line in lines.splitlines()]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        print(
            f"warning: {path} must be as evaluate.py writes it, but is not ({one_line(e)}); the card has none of it "
            f"until `python evaluate.py {run.path}` is run again",
            file=sys.stderr,
        )
        return ""
    said = ""
    if results.get("weights_sha256") != average_sha256(run, checkpoints):
        said = (
            f"**These figures are of other weights than those here: of {results.get('checkpoint', 'another step')}, "
            f"not of {average_name(checkpoints)}.**\n\n"
        )
    # one level below the card's own headings
    tables = re.sub(r"^## ", "### ", _tables(sections), flags=re.MULTILINE)
    name = {"val": "validation"}.get(split, split)
    return f"## Evaluation on the {name} split\n\n{said}{report.READING.capitalize()}.\n\n{tables}"


def _limits(cfg: Config) -> str:
    return f"""## Limits

- With {cfg.model.n_parameters:,} parameters it writes text that looks right far more often than it is right. Read what it
  writes before you run it or rely on it.
- It sees at most {cfg.model.block_size:,} tokens at once, and knows nothing beyond what it was trained on.
- Samples can repeat training data word for word, under the licence that this has. Under Memorisation stands how often they
  did, where it was measured.
- Nothing was done to keep it from writing what is false, insecure or offensive.
"""
