"""Small files for lm-eval's tasks, in the plain formats that harness_data.py reads; the rows are made up."""

import gzip
import json
from pathlib import Path

PAGES = [
    " \n = Ada Stone = \n \n Ada Stone was a <unk> of the northern river , born in 1901 . \n \n = = Work = = \n \n"
    " She drew 1 @,@ 200 maps \u2013 all of them lost . \n \n",
    " = River = \n \n A river is water that moves = downhill = . \n \n = = = Uses = = = \n \n Boats use it . \n",
]
ACTIVITY = [
    "Making tea: A woman fills a kettle. She turns it on. the woman then",
    "2",
    "sings to the kettle.",
    "eats the cup.",
    "pours the water into a cup.",
    "leaves by the window.",
]
WIKIHOW = [
    "Home and Garden: How to sweep a floor. Take a broom. Begin in a corner.",
    "0",
    "Move towards the door.",
    "Wash the broom in milk.",
    "Paint the floor.",
    "Sit down.",
]


def arc_rows(n: int) -> list[dict]:
    return [
        {"query": f"Question: What is {i} plus one?", "choices": [str(i), str(i + 1), "a cat"], "gold": 1}
        for i in range(n)
    ]


def gsm8k_rows(n: int) -> list[dict]:
    return [
        {"question": f"Ann has {i} pens and buys 2. How many?", "answer": f"{i}+2=<<{i}+2={i + 2}>>\n#### {i + 2}"}
        for i in range(n)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.write(text)
    return path


def write_plain(folder: Path) -> Path:
    """Write each of the five tasks' data in its plain form and return the folder."""
    (folder / "wikitext-2").mkdir(parents=True)
    with gzip.open(folder / "wikitext-2/test.txt.gz", "wt", encoding="utf-8") as f:
        f.write("".join(PAGES))
    with gzip.open(folder / "hellaswag_val_full.txt.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join(ACTIVITY + WIKIHOW) + "\n")
    write_jsonl(folder / "arc_easy.jsonl.gz", arc_rows(6))
    write_jsonl(folder / "arc_challenge.jsonl", arc_rows(6))
    write_jsonl(folder / "gsm8k_test.jsonl.gz", gsm8k_rows(8))
    return folder
