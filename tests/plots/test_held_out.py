"""Which held-out text is drawn."""

import numpy as np
import pytest
import torch

from config import ModelConfig, TokenizerConfig
from kindling.data.shards import ShardWriter, TokenDataset, write_manifest
from kindling.device import Runtime
from kindling.plots import held_out
from kindling.plots.held_out import candidates, past_header, typical_text
from kindling.plots.inspection import InspectionError, losses_of
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT

CPU = Runtime(torch.device("cpu"), "fp32")
LICENCE = "# Copyright 2024 A. Nother\n# Licensed under X.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["def f(x):\n    return x\n" * 20], TokenizerConfig(), 280)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(block_size=64, vocab_size=300, n_layer=1, n_head=2, n_embd=16, init_std=0.5)).eval()


def dataset(folder, tokenizer, texts: list[str]) -> TokenDataset:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "val", np.dtype("<u2"))
    for text in texts:
        writer.add(np.array([*tokenizer.encode(text), tokenizer.eos_id]), len(text))
    writer.close()
    about = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    write_manifest(folder, fingerprint="tiny", dtype="<u2", splits={"val": writer.info}, **about)
    return TokenDataset(folder, "val")


@pytest.mark.parametrize(
    ("header", "rest"),
    [
        (LICENCE, "import os\n"),
        ("#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n\n" + LICENCE + "\n\n", "# What follows\nimport os\n"),
        ("/*\n Copyright (C) 2001\n */\n", "#include <stdio.h>\n/* more */\n"),
        ("// SPDX-License-Identifier: MIT\n\n", "package main\n"),
        ('"""\nCopyright 2020.\n"""\n', "x = 1\n"),
        ("<!-- License: MIT -->\n", "# Title\n"),
        ("", '"""What this does."""\n\n# Copyright of others is below\n'[:24]),
        ("", "import licence\n" + LICENCE),
        ("", "/* copyright, never closed\nx = 1\n"),
        ("", ""),
    ],
)
def test_a_header_is_the_comments_at_the_top_down_to_the_last_that_speaks_of_a_licence(header, rest):
    assert past_header(header + rest) == len(header)


def test_the_text_with_the_median_loss_is_chosen_past_its_header_and_said(tmp_path, model, tokenizer):
    texts = [LICENCE + f"value_{i} = {'abcdefgh'[i] * 150}\n" for i in range(7)]
    data = dataset(tmp_path / "data", tokenizer, texts)
    chosen = typical_text(model, data, tokenizer, CPU)
    means = {text.name: np.nanmean(losses_of(model, text, CPU)) for text in candidates(data, tokenizer, 64)}
    assert len(means) == 7 and len(set(means.values())) == 7
    assert means[chosen.name] == np.median(list(means.values()))
    number = int(chosen.name.split()[1])
    assert chosen.name == f"document {number} of the val split, from line 3" and chosen.first_line == 3
    assert tokenizer.decode(chosen.ids[1:]).startswith(f"value_{number} = ")
    length = len(tokenizer.encode(texts[number]))
    assert chosen.what == (
        f"64 of {length} tokens of {chosen.name}; a typical one: its loss of {means[chosen.name]:.2f} is the median of 7"
    )


def test_texts_are_compared_from_all_over_a_split_always_the_same(tmp_path, tokenizer):
    data = dataset(tmp_path / "data", tokenizer, [f"document_{i} = {'x' * 150}\n" for i in range(300)])
    names = [text.name for text in candidates(data, tokenizer, 64)]
    assert names == [text.name for text in candidates(data, tokenizer, 64)] and len(names) == held_out.COMPARED
    numbers = [int(name.split()[1]) for name in names]
    assert min(numbers) < 100 and max(numbers) > 200


def test_short_texts_are_compared_only_if_there_are_no_others(tmp_path, tokenizer):
    long = "y = " + "x" * 150
    assert [
        t.name[:10] for t in candidates(dataset(tmp_path / "a", tokenizer, ["a = 1", long, "b = 2"]), tokenizer, 64)
    ] == ["document 1"]
    short = candidates(dataset(tmp_path / "b", tokenizer, ["a = 1", "b = 2"]), tokenizer, 64)
    assert sorted(text.name[:10] for text in short) == ["document 0", "document 1"]


def test_a_split_of_nothing_but_headers_is_refused(tmp_path, model, tokenizer):
    with pytest.raises(InspectionError, match="2 of its documents do not; give one with --text"):
        typical_text(model, dataset(tmp_path / "data", tokenizer, [LICENCE, LICENCE + "\n\n"]), tokenizer, CPU)
