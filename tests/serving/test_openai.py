"""The `openai` package against the real server, on a run in PyTorch that counts to three."""

from dataclasses import replace

import openai
import pytest
from http_server import running
from tiny_runs import bigram_model, make_run

import serve
from config import TokenizerConfig
from kindling.serving.served_model import Limits
from kindling.tokenization.train_tokenizer import train_bpe

COUNTS = {"1": "2", "2": "3", "3": None, "x": "x", "\n": "\r", "\r": "1"}


def counting(folder, kind: str):
    """Serve a run that counts to three, and says x for ever after an x."""
    tokenizer = train_bpe(["no merges"], TokenizerConfig(), 261)
    make_run(folder / f"runs/{kind}", tokenizer, bigram_model(tokenizer, COUNTS, 192), kind=kind)
    flags = serve.Flags(run=folder / f"runs/{kind}", device="cpu")
    return replace(serve.to_serve(serve.open_model(flags), flags), limits=Limits(max_new_tokens=64, time_s=20))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(counting(tmp_path_factory.mktemp("serve"), "docstrings")) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


def complete(client, prompt, **more):
    return client.completions.create(model="any", prompt=prompt, temperature=0, **more)


def test_the_model_is_listed_and_found(client):
    (model,) = client.models.list().data
    assert model.id == "docstrings" and client.models.retrieve("docstrings").id == "docstrings"
    with pytest.raises(openai.NotFoundError, match="the model must be docstrings"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_model_writes(client):
    answer = complete(client, "a\n")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("\r123", "stop")
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens


def test_a_completion_ends_at_the_number_of_tokens_asked_for(client):
    (choice,) = complete(client, "x", max_tokens=5).choices
    assert (choice.text, choice.finish_reason) == ("xxxxx", "length")


def test_a_completion_ends_before_a_stop_string(client):
    for stop in ("3", ["23", "zz"]):
        (choice,) = complete(client, "1", stop=stop).choices
        assert (choice.text, choice.finish_reason) == ("23"[: 1 if stop == "3" else 0], "stop")


def test_several_prompts_and_samples_come_in_order(client):
    answer = complete(client, ["1", "x"], max_tokens=3, n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "23"), (1, "23"), (2, "xxx"), (3, "xxx")]


def test_samples_have_seeds_of_their_own_and_their_prompt_counts_once(client):
    one, four = (
        client.completions.create(model="any", prompt="q", temperature=1, seed=7, max_tokens=8, n=n) for n in (1, 4)
    )
    assert len({choice.text for choice in four.choices}) == 4 and four.choices[0].text == one.choices[0].text
    assert four.usage.prompt_tokens == one.usage.prompt_tokens


def test_token_ids_are_a_prompt(client):
    (first,) = complete(client, "1", logprobs=0).choices
    tokenizer = train_bpe(["no merges"], TokenizerConfig(), 261)
    assert complete(client, tokenizer.encode("1")).choices[0].text == first.text
    both = complete(client, [tokenizer.encode("1"), tokenizer.encode("2")])
    assert [c.text for c in both.choices] == ["23", "3"]


def test_the_prompt_is_echoed(client):
    assert complete(client, "21", echo=True).choices[0].text == "2123"


def test_log_probabilities_are_those_of_the_tokens(client):
    logprobs = complete(client, "1", logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["2", "3"] and logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == pytest.approx([0, 0], abs=1e-6)
    assert [len(likely) for likely in logprobs.top_logprobs] == [2, 2]
    assert max(logprobs.top_logprobs[0], key=logprobs.top_logprobs[0].get) == "2"
    chunks = complete(client, "1", logprobs=0, stream=True)
    assert [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset] == [0, 1]


def test_a_stream_joins_to_the_completion(client):
    chunks = list(complete(client, ["1", "x"], max_tokens=3, stream=True, stream_options={"include_usage": True}))
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "23", 1: "xxx"}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens >= 5
    reasons = {c.choices[0].index: c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason}
    assert reasons == {0: "stop", 1: "length"}


def test_the_same_seed_gives_the_same_text(client):
    texts = {
        client.completions.create(model="any", prompt="q", temperature=1, seed=7, max_tokens=8).choices[0].text
        for _ in range(2)
    }
    assert len(texts) == 1 and len(texts.pop()) > 0


def test_a_prompt_longer_than_the_context_is_cropped_and_that_is_said(client):
    answer = complete(client, "z" * 500 + "1", max_tokens=10)
    assert answer.choices[0].text == "23" and answer.truncated is True
    assert answer.usage.prompt_tokens <= 192
    assert complete(client, "1").truncated is False


def chat(client, text="Count.", **more):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    return client.chat.completions.create(model="any", messages=messages, temperature=0, **more)


def test_a_question_is_answered_in_the_template(client):
    (choice,) = chat(client).choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "\r123", "stop")


def test_an_answer_is_streamed(client):
    chunks = list(chat(client, stream=True, n=2, stream_options={"include_usage": True}))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "\r123", 1: "\r123"} and chunks[-1].usage.total_tokens > 0


def test_an_answer_has_log_probabilities(client):
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [token.token for token in content] == ["\r", "1", "2", "3"]
    assert all(len(token.top_logprobs) == 2 for token in content) and content[1].bytes == [49]


def test_a_long_conversation_keeps_its_last_question(client):
    messages = [{"role": role, "content": "y" * 60} for role in ("user", "assistant") * 5]
    answer = client.chat.completions.create(
        model="any", messages=[*messages, {"role": "user", "content": "Count."}], temperature=0
    )
    assert answer.choices[0].message.content == "\r123" and answer.truncated is True


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"temperature": -1}, "temperature", "a number from 0 to 100"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"n": 99}, "n", "from 1 to 16"),
        ({"best_of": 3}, "best_of", "left out"),
        ({"suffix": "b"}, "suffix", "never trained to fill in the middle"),
        ({"logprobs": 99}, "logprobs", "from 0 to 20"),
        ({"stop": [""]}, "stop", "1 to 1000 characters"),
        ({"presence_penalty": 1}, "presence_penalty", "left out"),
        ({"echo": True, "logprobs": 1}, "echo", "drop one"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request_that_names_the_field(client, more, param, said):
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="any", prompt="a", **more)
    assert e.value.param == param and said in e.value.body["message"]


def test_a_chat_refuses_tools_images_and_odd_turns(client):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for more in ({"tools": tools}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError):
            chat(client, **more)
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    for turns in ([("assistant", "a")], [("user", "a"), ("assistant", "b")], [("tool", "a")], [("user", image)], []):
        with pytest.raises(openai.BadRequestError):
            messages = [{"role": role, "content": content} for role, content in turns]
            client.chat.completions.create(model="any", messages=messages)


def test_a_run_that_saw_only_documents_refuses_to_chat_and_says_why(tmp_path):
    with running(counting(tmp_path, "local-python")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="fine-tuned on instructions to chat"):
            chat(client)
