"""Small local copies of the data sets that the presets name, laid out and typed as the hub serves them."""

import hashlib
from dataclasses import replace
from pathlib import Path

from config import Config, SourceConfig, TokenizerConfig
from kindling.tokenization.train_tokenizer import train_bpe

QA = ["input", "output"]
# path on the hub, subset -> the file that holds its rows there, its columns of text, and some of the others
LAYOUTS = {
    ("bigcode/the-stack-dedup", None): (
        "data/python/data-00000-of-00144.parquet",
        ["content"],
        {
            "hexsha": "h",
            "size": 1,
            "ext": "py",
            "lang": "Python",
            "max_stars_repo_path": "src/a{}.py",
            "max_stars_repo_name": "me/r",
        },
    ),
    ("bigcode/starcoderdata", None): (
        "python/train-00000-of-00059.parquet",
        ["content"],
        {"max_stars_repo_path": "src/a{}.py", "max_stars_repo_name": "me/r", "max_stars_count": 1, "id": "1"},
    ),
    ("roneneldan/TinyStories", None): ("data/train-00000-of-00004-2d5a1467fff1081b.parquet", ["text"], {}),
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): (
        "sample/10BT/000_00000.parquet",
        ["text"],
        {
            "id": "u",
            "dump": "CC",
            "url": "https://example.org/{}",
            "language": "en",
            "language_score": 0.9,
            "score": 3.1,
        },
    ),
    ("nvidia/Nemotron-Pretraining-Code-v1", "Synthetic-Code"): (
        "Synthetic-Code/part_000000.parquet",
        ["text"],
        {"id": "x"},
    ),
    ("nvidia/Nemotron-CC-Math-v1", "4plus"): ("4plus/part_000000.parquet", ["text"], {"id": "x"}),
    ("nvidia/Nemotron-CC-Math-v1", "4plus_MIND"): ("4plus_MIND/part_000000.parquet", ["text"], {"id": "x"}),
    ("HuggingFaceFW/finewiki", "en"): (
        "data/enwiki/000_00000.parquet",
        ["text"],
        {"id": "x", "title": "t", "url": "https://example.org/w/{}"},
    ),
    ("open-web-math/open-web-math", None): (
        "data/train-00000-of-00114.parquet",
        ["text"],
        {"url": "https://example.org/m/{}", "date": "d"},
    ),
    ("nvidia/Nemotron-Pretraining-SFT-v1", "Nemotron-SFT-Code"): ("Nemotron-SFT-Code/part_000000.parquet", QA, {}),
    ("nvidia/Nemotron-Pretraining-SFT-v1", "Nemotron-SFT-General"): (
        "Nemotron-SFT-General/part_000000.parquet",
        QA,
        {},
    ),
    ("nvidia/OpenCodeInstruct", None): ("data/train-00000-of-00050.parquet", QA, {"id": "x", "domain": "generic"}),
    ("iamtarun/python_code_instructions_18k_alpaca", None): (
        "data/train-00000-of-00001-8b6e212f3e1ece96.parquet",
        ["instruction", "input", "output"],
        {"prompt": "Below is ... and the answer too: {}"},
    ),
    ("nvidia/OpenMathInstruct-2", None): (
        "data/train-00000-of-00032.parquet",
        ["problem", "generated_solution"],
        {"problem_source": "math"},
    ),
}
WORDS = (
    "river",
    "stone",
    "light",
    "seven",
    "under",
    "garden",
    "method",
    "value",
    "signal",
    "maple",
    "copper",
    "yellow",
)


def document(kind: str, n: int) -> str:
    """Return document `n` of a kind: no two are equal, and it is Python if the source holds Python."""
    digits = hashlib.sha256(f"{kind} {n}".encode()).digest()
    words = [WORDS[b % len(WORDS)] + (str(b) if b % 3 else "") for b in digits * 3]
    if "python" in kind:
        body = "\n".join(f"    {w}_{i} = {i} + len('{words[i - 1]}')" for i, w in enumerate(words))
        return f"def {words[0]}_{n}():\n{body}\n    return {n}\n"
    return f"{kind}, {n}. " + " ".join(words).capitalize() + ".\n"


def local_copy(source: SourceConfig, folder: Path, n_documents: int = 120) -> SourceConfig:
    """Write a small local copy of a data set of the hub under `folder`; return the source that reads the copy."""
    import pyarrow
    import pyarrow.parquet

    file, texts, columns = LAYOUTS[source.path, source.subset]
    root = folder / source.path
    rows = [{k: v.format(n) if isinstance(v, str) else v for k, v in columns.items()} for n in range(n_documents)]
    for n, row in enumerate(rows):
        for text in texts:  # named as the hub names them, whatever the preset says
            row[text] = document(source.language or source.label, n) if text == texts[0] else document("an answer", n)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / file)
    subsets = [s for path, s in LAYOUTS if path == source.path and s is not None]
    if subsets:  # as on the hub, the card says which files belong to a subset
        entry = "- config_name: {}\n  data_files:\n  - split: train\n    path: {}/*\n"
        card = "".join(entry.format(s, Path(LAYOUTS[source.path, s][0]).parent) for s in subsets)
        (root / "README.md").write_text(f"---\nconfigs:\n{card}---\n", encoding="utf-8")
    return replace(source, path=str(root))


def local_preset(cfg: Config, folder: Path) -> Config:
    """Return the preset with its own filters, columns, subsets and weights, reading small local copies of its sources."""
    sources = []
    for source in cfg.data.sources:
        if source.kind == "datasets":
            source = local_copy(source, folder)
        elif source.kind == "files":  # cloned repositories
            for n in range(120):
                path = folder / "repos" / "project" / f"module{n}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(document("python", n), encoding="utf-8")
                (folder / "repos" / f"unit{n}.c").write_text(
                    f"int f{n}(void) {{\n\treturn {n};\n}}\n" * 3, encoding="utf-8"
                )
                (folder / "repos" / f"Unit{n}.java").write_text(
                    f"class Unit{n} {{\n  int f = {n};\n}}\n", encoding="utf-8"
                )
            source = replace(source, path=str(folder / "repos"))
        sources.append(source)
    tokenizer = cfg.tokenizer
    if tokenizer.kind == "pretrained" or cfg.data.instructions:  # of a run that is fine-tuned
        # the published file cannot be had offline; its kind and its control token are the same
        path = folder / "tokenizer.json"
        texts = [document("python", n) for n in range(50)]
        path.write_text(train_bpe(texts, TokenizerConfig(), 600).to_json(), encoding="utf-8")
        tokenizer = replace(tokenizer, kind="pretrained", path=str(path))
    data = replace(cfg.data, sources=tuple(sources), val_fraction=0.1, test_fraction=0.1, workers=1)
    return replace(cfg, tokenizer=tokenizer, data=data)
