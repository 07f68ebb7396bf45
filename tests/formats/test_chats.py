"""Exports of fine-tuned runs: transformers and llama.cpp encode a conversation, and answer it, as we do."""

import gzip
import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from chats import HARD, asked, exchanges_of, ids_of, text_of
from conftest import shared_file
from tiny_runs import make_run

import export
from config import ModelConfig, TokenizerConfig
from kindling.data.exported_templates import jinja_template
from kindling.data.prompts import rendered_template
from kindling.formats import gguf_format, hf_format
from kindling.formats.hf_format import require_same_tokenizer
from kindling.formats.modelfile import modelfile
from kindling.generation.completion import answer
from kindling.generation.decoding import stream
from kindling.generation.sampling import Sampling
from kindling.runs.loading import load_model
from kindling.tokenization.handwritten_bpe import ByteLevelBPE
from kindling.tokenization.tokenizer import Tokenizer, from_json, load_json
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT

TEMPLATES = ("alpaca", "user-assistant")
# of these, tokens are made that span the border of question and answer, if nothing keeps them from it
TEXTS = ["Assistant:``` Assistant:(a, b) Response:\n\n    x\n\n  y = 12 naïve\n" * 20]
GREEDY = Sampling(greedy=True, max_new_tokens=24)


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "digits":
        special = ["<|endoftext|>", "<fim_prefix>"]
        return from_json(ByteLevelBPE.train(TEXTS, 320, special, split_digits=True).to_json(), TokenizerConfig())
    settings = {"bos": {"bos_token": "<bos>", "pad_token": "<pad>"}, "nfkc": {"normalizer": "nfkc"}, "plain": {}}
    return train_bpe(TEXTS, TokenizerConfig(**settings[kind]), 320)


def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def random_model(its: Tokenizer) -> GPT:
    """A GPT-2 whose text depends on every token of the prompt, and is ASCII."""
    torch.manual_seed(0)
    sizes = {"block_size": 512, "vocab_size": its.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(ModelConfig(**sizes, tie_embeddings=False)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.3)
        for i in range(its.vocab_size):
            text = its.decode([i])
            if not (text.isascii() and text.isprintable()) or text in its.special_tokens:
                model.head.weight[i] = 0.0  # never the largest logit
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the folder of transformers of a random model with a template."""
    root = tmp_path_factory.mktemp("chats")

    @cache
    def made(kind: str, template: str | None):
        folder = root / f"{kind}-{template}"
        folder.mkdir()
        model = random_model(tokenizer(kind))
        hf_format.write(folder, model, tokenizer(kind), "# a card\n", template)
        return folder, model

    return made


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was fine-tuned on conversations."""
    its = tokenizer("plain")
    rows = torch.randint(0, 250, (2, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(export, "sample", lambda run: rows)  # its data has no held-out rows
    return make_run(tmp_path / "runs/talk", its, random_model(its), max_exchanges=4)


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["plain", "digits", "bos", "nfkc"])
def test_apply_chat_template_gives_our_text_and_ids(exported, kind, template):
    folder, _ = exported(kind, template)
    its, theirs = tokenizer(kind), auto(folder)
    begin = its.cfg.bos_token or ""
    for messages in HARD:
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == begin + text_of(
            template, messages, its.cfg.eos_token
        )
        assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids_of(
            template, messages, its
        )
    whole = asked("Add.", "a + b")
    its_own = ids_of(template, [*whole, *asked("x")], its)
    ids = theirs.apply_chat_template(whole)["input_ids"]
    assert ids == its_own[: len(ids)] and ids[-1] == its.eos_id


def test_without_the_split_tokens_would_span_question_and_answer():
    its, messages = tokenizer("plain"), asked("Add.", "```python\nx\n```", "Again.")
    joined = text_of("user-assistant", messages, its.cfg.eos_token).split(its.cfg.eos_token)
    ids = [*its.encode(joined[0]), its.eos_id, *its.encode(joined[1])]
    assert ids != ids_of("user-assistant", messages, its)  # so these conversations tell the two apart


def shared_chats() -> list[list[dict]]:
    """500 conversations of 1 to 4 questions; the sets hold single ones, so that several are joined."""
    python = gzip.decompress(shared_file("codealpaca/python_alpaca_subset.jsonl.gz").read_bytes()).splitlines()
    evolved = json.loads(gzip.decompress(shared_file("codealpaca/evol-codealpaca-2k-1.json.gz").read_bytes()))
    rows = [row for pair in zip(map(json.loads, python), evolved) for row in pair]
    chats, i = [], 0
    for n in (1 + k % 4 for k in range(500)):
        turns = [t for row in rows[i : i + n] for t in (f"{row['instruction']}\n{row.get('input', '')}", row["output"])]
        chats.append(asked(*turns[:-1], system=("You write Python.",) if len(chats) % 8 < 4 else ()))
        i += n
    return chats


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_500_conversations_of_real_data_have_our_ids(tmp_path, template):
    path = shared_file("starcoder2_tokenizer/tokenizer.json")
    its = load_json(path, TokenizerConfig(kind="pretrained", path=str(path)))
    hf_format._write_tokenizer(tmp_path, its, 100_000, template)
    theirs, chats = auto(tmp_path), shared_chats()
    given = theirs.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    assert len(given) == 500
    assert sum(ids != ids_of(template, chat, its) for ids, chat in zip(given, chats)) == 0


def test_a_message_that_spells_a_control_token_is_refused_and_is_text_for_who_encodes_it_as_text(exported):
    theirs, its = auto(exported("plain", "alpaca")[0]), tokenizer("plain")
    messages = asked("What is <|endoftext|>?")
    with pytest.raises(Exception, match=r"must not spell a control token, but has <\|endoftext\|>"):
        theirs.apply_chat_template(messages, add_generation_prompt=True)
    text = text_of("alpaca", messages, its.cfg.eos_token)
    assert theirs(text, split_special_tokens=True).input_ids == ids_of("alpaca", messages, its)


def test_a_run_that_was_not_fine_tuned_has_no_template_and_reads_control_tokens_as_text(exported):
    folder, _ = exported("plain", None)
    assert auto(folder).chat_template is None and not (folder / "chat_template.jinja").exists()
    assert auto(folder)("<|endoftext|>").input_ids == tokenizer("plain").encode("<|endoftext|>")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["pre_tokenizer"]["type"] == "ByteLevel"
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 0


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("kind", ["plain", "digits"])
def test_an_export_with_a_template_still_has_the_runs_tokenizer(exported, kind, template):
    folder, _ = exported(kind, template)
    require_same_tokenizer(folder, tokenizer(kind))
    with pytest.raises(hf_format.HubFormatError, match="the ids of the run's tokenizer"):
        require_same_tokenizer(folder, tokenizer("digits" if kind == "plain" else "plain"))


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_the_pipeline_answers_as_our_chat_does_and_stops_where_it_does(exported, kind):
    from transformers import AutoModelForCausalLM, pipeline

    folder, model = exported(kind, "alpaca")
    its, messages = tokenizer(kind), asked("Add a and b.")
    ids = ids_of("alpaca", messages, its)
    *_, sixth = stream(model, ids, replace(GREEDY, max_new_tokens=6), its.eos_id)
    ending = random_model(its)
    with torch.no_grad():  # this token is now the end
        ending.head.weight[[its.eos_id, sixth]] = ending.head.weight[[sixth, its.eos_id]]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stopped = 0
    for ours in (model, ending):
        with torch.no_grad():
            theirs.lm_head.weight.copy_(ours.head.weight)
        chat = pipeline("text-generation", model=theirs, tokenizer=auto(folder))
        for one in (messages, asked("Add.", system=("Be brief.",)), asked("Add.", "``` a", "Now <b>.", "\n\nc", " d")):
            given = chat(one, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1]
            want = answer(ours, its, "alpaca", exchanges_of(one), GREEDY)
            assert given["role"] == "assistant"
            assert given["content"] == want.text and len(set(want.text)) > 1
            stopped += want.stopped
    assert stopped
    assert theirs.generation_config.eos_token_id == [its.eos_id]


def test_the_model_card_asks_in_the_template_by_code_that_runs_as_it_stands(run, monkeypatch, capsys):
    assert export.main([str(run.path), "--to", "hf"]) == 0
    folder = run.path / "export/hf"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "### Instruction:" in card and "ask each question alone" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    (model, _), asks = load_model(run, torch.device("cpu")), asked("Write a Python function that adds two numbers.")
    sampling = replace(GREEDY, max_new_tokens=64)
    assert capsys.readouterr().out == answer(model, run.tokenizer(), "alpaca", exchanges_of(asks), sampling).text + "\n"


# -- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_holds_the_same_template_and_one_of_a_base_run_none(tmp_path):
    from gguf import GGUFReader

    its = tokenizer("plain")
    for template in (None, *TEMPLATES):
        path = tmp_path / f"{template}.gguf"
        gguf_format.write(path, random_model(its), its, "f32", "m", template)
        field = GGUFReader(path).fields.get("tokenizer.chat_template")
        assert (field and field.contents()) == (template and jinja_template(template, its))


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_llama_cpp_answers_as_our_chat_does(tmp_path, kind):
    library = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is not installed")
    its, path = tokenizer(kind), tmp_path / "m.gguf"
    model = random_model(its)
    gguf_format.write(path, model, its, "f32", "m", "alpaca")
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}
    theirs = library.Llama(str(path), n_ctx=512, n_threads=1, verbose=False, **exact)
    greedy = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "max_tokens": GREEDY.max_new_tokens}
    for messages in (asked("Add a and b."), asked("Add.", system=("Be brief.",)), asked("Add.", "def f", "Again.")):
        said = theirs.create_chat_completion(messages, **greedy)["choices"][0]["message"]["content"]
        assert said == answer(model, its, "alpaca", exchanges_of(messages), GREEDY).text


# -- the script -------------------------------------------------------------------------------------------------------


def test_the_modelfile_stands_beside_the_gguf_file_and_is_replaced_only_with_it(run, capsys):
    assert export.main([str(run.path), "--to", "gguf"]) == 0
    out = run.path / "export"
    assert sorted(p.name for p in out.iterdir()) == ["talk-f16.Modelfile", "talk-f16.gguf"]
    assert f"ollama create talk -f {out / 'talk-f16.Modelfile'}" in capsys.readouterr().out
    text = (out / "talk-f16.Modelfile").read_text(encoding="utf-8")
    assert text == modelfile("talk-f16.gguf", "alpaca", run.tokenizer(), 512)
    (out / "talk-f16.gguf").unlink()
    (out / "talk-f16.Modelfile").write_text("mine", encoding="utf-8")
    with pytest.raises(export.ExportError, match=r"talk-f16\.Modelfile must not exist yet"):
        export.main([str(run.path), "--to", "gguf"])
    assert [p.name for p in out.iterdir()] == ["talk-f16.Modelfile"]
    assert export.main([str(run.path), "--to", "gguf", "--replace"]) == 0
    assert (out / "talk-f16.Modelfile").read_text(encoding="utf-8") == text


def test_a_modelfile_has_the_defaults_of_generate_py():
    text = modelfile("a b.gguf", "user-assistant", tokenizer("plain"), 512)
    assert text.startswith('FROM ./a b.gguf\nTEMPLATE """{{- $first')
    assert text.count('"""') == 2
    assert text.partition('{{ end }}"""\n')[2] == (
        'PARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0.8\nPARAMETER top_k 50\nPARAMETER top_p 1.0\n'
        "PARAMETER min_p 0.0\nPARAMETER repeat_penalty 1.0\nPARAMETER num_predict 200\nPARAMETER num_ctx 512\n"
    )


def test_an_export_whose_template_has_changed_since_the_training_is_refused(run, tmp_path):
    made = make_run(
        tmp_path / "runs/old",
        tokenizer("plain"),
        random_model(tokenizer("plain")),
        template=rendered_template("alpaca") + "!",
    )
    with pytest.raises(Exception, match="template"):
        export.main([str(made.path), "--to", "gguf"])
    assert not (made.path / "export").exists()
