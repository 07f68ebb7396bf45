"""Other people's models: folders as transformers writes them, in the place of a run, against transformers itself."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import assert_one_clear_line, script
from others import CHATML, LLAMA_3, save, theirs, tokenizer

from kindling.data.jinja_chat import TemplateError, cut_turns, end_of_answers
from kindling.data.prompts import Exchange, encode, flatten, prompt_that_fits
from kindling.errors import KindlingError
from kindling.formats.hf_import import PretrainedModel, find_model
from kindling.generation.decoding import stream
from kindling.generation.sampling import Sampling
from kindling.runs.loading import load_model

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
FOLDERS = {
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", {"bos": True, "shards": True}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA_3, "head_dim": 16, "dtype": torch.bfloat16}),
    "qwen2": ("Qwen2", {"template": CHATML, "ends": (2, 0), "shards": True}),
    "qwen3": ("Qwen3", {"template": CHATML, "head_dim": 24, "tie_word_embeddings": True, "dtype": torch.float16}),
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
SMALL = ["--preset", "alpaca", "--train.micro-batch-size", "None", "--data.workers", "1", "--train.batch-size", "4",
         "--train.compile", "off", "--train.device", "cpu", "--data.val-fraction", "0.2", "--data.test-fraction", "0.2",
         "--train.held-out-answers", "1", "--train.sample-prompts", "Add.", "--data.near-dedup", "None",
         "--data.sources.0.kind", "jsonl", "--data.decontaminate"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("others")

    @cache
    def made(name: str) -> Path:
        architecture, settings = FOLDERS[name]
        return save(root / name, architecture, **settings)

    return made


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_the_logits_and_the_greedy_text_of_transformers(folder, name):
    run = find_model(folder(name))
    model, _ = load_model(run, torch.device("cpu"))
    reference, idx = theirs(folder(name)), torch.arange(5, 85)[None]
    with torch.no_grad():
        logits = reference(idx).logits
        assert torch.allclose(model(idx), logits, atol=1e-4, rtol=0)
        gpt = model.for_generation()
        cache = gpt.new_cache(1)
        gpt.forward_cached(idx[:, :50], cache)
        for at in (50, 51):
            assert torch.allclose(gpt.forward_cached(idx[:, at : at + 1], cache), logits[:, at], atol=1e-4, rtol=0)
    assert sum(p.numel() for p in reference.parameters()) == run.config().model.n_parameters
    said = reference.generate(idx[:, :10], do_sample=False, max_new_tokens=128, eos_token_id=None, pad_token_id=0)
    ours = list(stream(model, idx[0, :10].tolist(), Sampling(greedy=True, max_new_tokens=128), eos_id=-1))
    assert ours == said[0, 10:].tolist()


def test_tokens_that_begin_and_end_a_text_are_those_of_the_folder(folder):
    llama, qwen2, gpt2 = (find_model(folder(name)).tokenizer() for name in ("llama", "qwen2", "gpt2"))
    assert (llama.bos_id, llama.end_ids) == (3, (0,))
    assert (qwen2.bos_id, qwen2.end_ids, qwen2.cfg.eos_token) == (None, (2, 0), "<|im_end|>")  # where its answers end
    assert (gpt2.bos_id, gpt2.end_ids) == (None, (0,))


def test_a_tokenizer_is_loaded_once_and_refuses_what_it_would_rewrite(folder, monkeypatch):
    from kindling.formats import hf_import

    loaded, load = [], hf_import.load_pretrained
    monkeypatch.setattr(hf_import, "load_pretrained", lambda cfg: loaded.append(cfg) or load(cfg))
    run = find_model(folder("gpt2"))
    assert run.tokenizer() is run.tokenizer() and len(loaded) == 1
    assert not run.tokenizer().may_rewrite and not run.config().tokenizer.lossy


def test_a_long_context_is_used_in_part_and_a_note_says_so(tmp_path, capsys):
    run = find_model(save(tmp_path / "long", "Llama", max_position_embeddings=100_000))
    assert run.config().model.block_size == 2048
    assert "of the context of 100,000 tokens" in capsys.readouterr().err


# -- chat templates -------------------------------------------------------------------------------------------------------

TALK = [Exchange("Add 1 and 2.", "3"), Exchange("And <|im_end|> of it?", "No <|im_start|>!")]
MESSAGES = [
    {"role": role, "content": text} for e in TALK for role, text in (("user", e.instruction), ("assistant", e.response))
]


@pytest.fixture(scope="module")
def own(folder):
    """The tokenizer and the template of a folder that has one."""
    run = find_model(folder("qwen2"))
    return run.tokenizer(), run.config().data.template


def test_ids_are_those_of_apply_chat_template(own, folder):
    from transformers import AutoTokenizer

    ours, template = own
    reference = AutoTokenizer.from_pretrained(folder("qwen2"))
    plain = [m for m in MESSAGES if "<|" not in m["content"]] + [{"role": "user", "content": "  And\nthen?"}]
    wanted = reference.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    exchanges = [TALK[0], Exchange("  And\nthen?")]
    assert prompt_that_fits(template, exchanges, ours, 96, 1) == (wanted, 0)
    assert flatten(encode(template, exchanges, ours)) == wanted
    system = [{"role": "system", "content": "Be brief."}, *plain]
    wanted = reference.apply_chat_template(system, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt_that_fits(template, exchanges, ours, 200, 1, before="Be brief.\n\n") == (wanted, 0)


def test_only_answers_and_the_tokens_that_end_them_are_responses(own):
    ours, template = own
    first, second = encode(template, TALK, ours)
    assert ours.decode(first.prompt) == "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    assert (ours.decode(first.response), first.response[-1]) == ("3<|im_end|>", ours.eos_id)
    # what a message spells stays text
    assert second.prompt.count(ours.eos_id) == 1 and "And <|im_end|> of it?" in ours.decode(second.prompt)
    assert second.response.count(ours.eos_id) == 1 and ours.special_ids["<|im_start|>"] not in second.response


def test_the_oldest_exchanges_are_left_out_of_a_question_that_is_too_long(own):
    ours, template = own
    long = [Exchange("x " * 20, "y"), Exchange("Add.", "3"), Exchange("Why?")]
    ids, dropped = prompt_that_fits(template, long, ours, 96, 10)
    assert dropped == 1 and "x x" not in ours.decode(ids) and len(ids) <= 86


THINKS = CHATML.replace(
    "message.content", "('<think></think>' if message.role == 'assistant' and loop.last else '') + message.content"
)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CHATML.replace("'<|im_end|>\n'", "'\n'"), MESSAGES[:2], "end it with a special token"),
        (CHATML.replace("<|im_start|>assistant\n' -", "' -"), MESSAGES[:2], "directly after the prompt"),
        (THINKS, [*MESSAGES[:2], {"role": "user", "content": "Why?"}], "changes them when the next question"),
        ("{%- if messages -%}{{ raise_exception('no') }}{%- endif -%}", MESSAGES[:2], "but gives TemplateError: no"),
        ("{%- for x in messages -%}", MESSAGES[:2], "must be Jinja"),
    ],
    ids=["no end", "no prompt", "answers change", "raises", "no Jinja"],
)  # fmt: skip
def test_a_template_that_does_not_show_the_answers_is_refused_with_the_way_out(template, messages, said):
    with pytest.raises(TemplateError, match=said) as e:
        cut_turns(template, messages, SPECIAL)
    assert "--data.template alpaca" in str(e.value)


def test_an_answer_may_be_trimmed_and_have_thoughts_before_it():
    assert end_of_answers(THINKS, SPECIAL) == "<|im_end|>"
    (turn,) = cut_turns(
        CHATML.replace("message.content", "message.content | trim"),
        [*MESSAGES[:1], {"role": "assistant", "content": " 3 "}],
        SPECIAL,
    )
    assert (turn.words, turn.end) == ("3", "<|im_end|>")


def test_an_export_of_ours_opens_by_the_same_door_with_its_template(tmp_path):
    from test_hf_format import random_model, small
    from test_hf_format import tokenizer as ours

    from kindling.formats.hf_format import write
    from presets import preset

    model = random_model(small(preset("demo").model))
    write(tmp_path, model, ours(), "# a card\n", "alpaca")
    run = find_model(tmp_path)
    again, _ = load_model(run, torch.device("cpu"))
    idx = torch.arange(80)[None]
    assert run.config().model == model.cfg and torch.equal(again(idx), model(idx))
    talk = [Exchange("Add.", "x"), Exchange("And <|endoftext|>?", "y")]
    assert encode(run.config().data.template, talk, run.tokenizer()) == encode("alpaca", talk, ours())


# -- bad input ------------------------------------------------------------------------------------------------------------


def changed(name: str, **values):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def weights(change):
    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def in_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


NORM = "transformer.ln_f.weight"
BAD = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "must hold a tokenizer.json"),
    "pickle": (pickled, "have transformers load it and call save_pretrained"),
    "gguf": (in_gguf, "holds model.gguf, which llama.cpp runs"),
    "missing": (weights(lambda w: {n: t for n, t in w.items() if n != NORM}), f"{NORM} is missing"),
    "too many": (weights(lambda w: w | {"more": torch.ones(1)}), "more has no place"),
    "shape": (weights(lambda w: w | {NORM: torch.ones(7)}), r"must be \(48,\) real numbers, .* but is \(7,\)"),
    "NaN": (weights(lambda w: w | {NORM: w[NORM] * torch.nan}), "holds NaN or infinity"),
    "integers": (weights(lambda w: w | {NORM: torch.ones(48, dtype=torch.int8)}), "torch.int8"),
    "quantised": (changed("config.json", quantization_config={"quant_method": "gptq"}), "quantization_config must be None"),
    "custom class": (changed("config.json", auto_map={"AutoModel": "x.Y"}), "auto_map must be None"),
    "another class": (changed("config.json", model_type="mixtral"), "but is of 'mixtral'"),
    "no config": (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "must be a readable JSON file"),
    "a size for no memory": (changed("config.json", vocab_size=10**12), r"wte.weight must be \(1000000000000, 48\)"),
    "impossible size": (changed("config.json", n_embd=-1), "n_embd must be at least 1, but is -1; fetch it again"),
    "sliding": (changed("config.json", layer_types=["sliding_attention"]), r"must be \['full_attention'\] to be computed"),
    "tokenizer of nothing": (lambda f: (f / "tokenizer.json").write_text("{}", encoding="utf-8"), "of the `tokenizers` library"),
    "template not in UTF-8": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "jinja must be a text"),
    "template of another type": (changed("tokenizer_config.json", chat_template={"a": 1}), "must be a text, .* is a dict"),
    "templates without names": (changed("tokenizer_config.json", chat_template=["x"]), "a list of texts with names"),
    "int8": (lambda f: (f / "config.json").write_text('{"weights_sha256": ""}', encoding="utf-8"), "is an export to int8"),
    "small": (changed("config.json", vocab_size=310), r"wte.weight must be \(310, 48\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_used_is_one_clear_line(folder, name, tmp_path):
    break_it, said = BAD[name]
    shutil.copytree(folder("gpt2"), tmp_path / "bad")
    break_it(tmp_path / "bad")
    with pytest.raises(KindlingError, match=said) as e:
        run = find_model(tmp_path / "bad")
        run.tokenizer()
        load_model(run, torch.device("cpu"))
    assert str(tmp_path / "bad") in str(e.value) and "\n" not in str(e.value)


def test_a_tokenizer_without_an_end_or_larger_than_the_model_is_refused(folder, tmp_path):
    shutil.copytree(folder("llama"), tmp_path / "bad")
    for name in ("config.json", "generation_config.json"):
        changed(name, eos_token_id=None)(tmp_path / "bad")
    changed("tokenizer_config.json", eos_token=None)(tmp_path / "bad")
    with pytest.raises(KindlingError, match="must name the token that ends a text"):
        find_model(tmp_path / "bad").config()
    with pytest.raises(KindlingError, match="must have at most vocab_size=290 ids"):
        find_model(save(tmp_path / "small", "Llama", vocab_size=290)).tokenizer()


# -- the scripts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory, folder) -> Path:
    """A working directory in which a folder with its own template was fine-tuned."""
    place = tmp_path_factory.mktemp("work")
    shutil.copytree(folder("qwen2"), place / "chat")
    rows = [
        {"instruction": f"Add {i} and 2.", "input": "", "output": f"def f():\n    return {i} + 2"} for i in range(40)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = script("sft_train.py", "chat", *tuned(place), "--train.max-steps", "2", cwd=place)
    assert result.returncode == 0, result.stderr
    (place / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return place


def tuned(place: Path) -> list[str]:
    return [*SMALL, "--data.sources.0.path", str(place / "rows.jsonl")]


def test_fine_tuning_uses_the_template_of_the_model_and_audits_it(work):
    out = (work / "stdout.txt").read_text(encoding="utf-8")
    assert "template of the model" in out and "are supervised on their response and its end" in out
    assert "<|im_start|>assistant\n[[def f():" in out and "<|im_end|>]]\n---" in out


def test_what_was_fine_tuned_is_resumed_and_goes_back_to_transformers(work):
    from transformers import AutoTokenizer

    result = script("sft_train.py", "chat", *tuned(work), "--train.max-steps", "3", cwd=work)
    assert result.returncode == 0 and "resuming at step 2" in result.stdout, result.stderr
    result = script("export.py", "chat-sft", cwd=work)
    assert result.returncode == 0 and "as Qwen2ForCausalLM" in result.stdout, result.stderr
    back, before = (AutoTokenizer.from_pretrained(work / f) for f in ("runs/chat-sft/export/hf", "chat"))
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    assert back.apply_chat_template(MESSAGES, **asked) == before.apply_chat_template(MESSAGES, **asked)
    reference = theirs(work / "runs/chat-sft/export/hf")
    assert reference.generation_config.eos_token_id == [2, 0] and reference.config.model_type == "qwen2"
    again = PretrainedModel(work / "runs/chat-sft/export/hf")
    model, _ = load_model(again, torch.device("cpu"))
    idx = torch.arange(5, 85)[None]
    assert torch.allclose(model(idx), reference(idx).logits, atol=1e-4, rtol=0)
    assert again.config().data.template == find_model(work / "chat").config().data.template


def test_a_flag_chooses_a_template_of_ours(work):
    result = script("sft_train.py", "chat", *tuned(work), "--data.template", "user-assistant", "--audit", cwd=work)
    assert result.returncode == 0 and "template user-assistant" in result.stdout, result.stderr
    assert "User: Add" in result.stdout and "[[def f()" in result.stdout


def test_a_folder_is_asked_evaluated_and_continued(work):
    result = script("generate.py", "chat", "--prompt", "def", "--max-new-tokens", "3", cwd=work)
    assert result.returncode == 0, result.stderr
    flags = ("--eval.benchmarks", "none", "--text", "rows.jsonl", "--field", "output")
    result = script("evaluate.py", "chat", *flags, cwd=work)
    assert result.returncode == 0 and "nobody knows what a model of others has not seen" in result.stdout, result.stderr
    found = json.loads((work / "chat/eval.json").read_text(encoding="utf-8"))
    text = found["texts"]["rows.jsonl"]
    assert text["all"]["documents"] == len(text["losses"]) == 40 and found["language_modelling"].keys() == {"skipped"}
    assert [sum(column) for column in zip(*text["losses"])][1] == text["all"]["bytes"]


def test_a_bad_folder_ends_a_script_with_one_line_and_leaves_nothing(work, tmp_path):
    shutil.copytree(work / "chat", tmp_path / "bad")
    changed("config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_parameters=None)(tmp_path / "bad")
    assert_one_clear_line(script("generate.py", "bad/config.json", cwd=tmp_path), "but is a file; name the folder")
    for command in (("generate.py", "bad"), ("sft_train.py", "bad", *tuned(work))):
        result = script(*command, cwd=tmp_path)
        assert_one_clear_line(result, "rope_scaling.rope_type must be 'default' or 'linear' or 'llama3'", "is 'yarn'")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_the_server_answers_for_a_folder(folder):
    from kindling.serving.open_export import is_export
    from kindling.serving.open_run import open_run

    opened = open_run(find_model(folder("qwen3")), "cpu", "fp32", None)
    (folder("qwen3").parent / "damaged").mkdir()
    (folder("qwen3").parent / "damaged/config.json").write_text("{", encoding="utf-8")
    assert not is_export(folder("qwen3").parent / "damaged")  # which would give a false reason
    assert not is_export(folder("qwen3")) and opened.remembers and "im_start" in (opened.template or "")
    assert tokenizer().convert_tokens_to_ids("<|im_end|>") == opened.vocabulary.eos_id
