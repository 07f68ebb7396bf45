import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import TokenizerConfig
from kindling.data.prompts import Exchange, encode, find_marker, prompt_text
from kindling.tokenization.train_tokenizer import train_bpe

TOKENIZER = train_bpe(
    ["def add(a, b):\n    return a + b\n### Response: User: Assistant: " * 20], TokenizerConfig(), 300
)
TEMPLATES = ("alpaca", "user-assistant")


def test_the_alpaca_template_is_the_published_one_with_and_without_input():
    assert prompt_text("alpaca", Exchange("Add.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert prompt_text("alpaca", Exchange("Add.", input="1 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_the_user_assistant_template_is_seed_004s():
    assert prompt_text("user-assistant", Exchange("Add.")) == "User: Add.\nAssistant:"
    assert prompt_text("user-assistant", Exchange("Add.", input="1 2")) == "User: Add.\n1 2\nAssistant:"


def test_a_later_exchange_begins_with_the_marker_and_no_preamble():
    later = Exchange("Again ### Instruction: {x}", input="2")
    assert prompt_text("alpaca", later, first=False) == (
        "\n\n### Instruction:\nAgain ### Instruction: {x}\n\n### Input:\n2\n\n### Response:\n"
    )
    assert prompt_text("user-assistant", Exchange("Again"), first=False) == "\nUser: Again\nAssistant:"


def test_braces_of_an_instruction_are_text():
    assert "{input} {0} {{}}" in prompt_text("alpaca", Exchange("{input} {0} {{}}"))


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="chatml"):
        prompt_text("chatml", Exchange("x"))


@given(
    st.sampled_from(TEMPLATES), st.lists(st.tuples(st.text(), st.text(min_size=1), st.text()), min_size=1, max_size=3)
)
def test_each_text_is_encoded_on_its_own_and_every_response_is_closed(template, texts):
    exchanges = [Exchange(*t) for t in texts]
    segments = encode(template, exchanges, TOKENIZER)
    assert len(segments) == len(exchanges)
    for i, (exchange, (prompt, response)) in enumerate(zip(exchanges, segments)):
        assert TOKENIZER.decode(prompt) == prompt_text(template, exchange, first=i == 0)
        assert TOKENIZER.decode(response[:-1]) == exchange.response
        assert response[-1] == TOKENIZER.eos_id
        assert TOKENIZER.eos_id not in prompt + response[:-1]  # however the texts spell it


def test_the_text_of_a_control_token_in_an_instruction_is_plain_text():
    ((prompt, _),) = encode("alpaca", [Exchange("Say <|endoftext|>.", "x")], TOKENIZER)
    assert TOKENIZER.eos_id not in prompt and "<|endoftext|>" in TOKENIZER.decode(prompt)


def test_a_response_that_is_still_to_come_has_no_ids():
    ((prompt, response),) = encode("alpaca", [Exchange("Add.")], TOKENIZER)
    assert prompt and response == []


def test_the_beginning_token_stands_once_before_a_conversation():
    cfg = TokenizerConfig(bos_token="<bos>")
    tokenizer = train_bpe(["abc " * 50], cfg, 280)
    first, second = encode("alpaca", [Exchange("a", "b"), Exchange("c", "d")], tokenizer)
    assert first.prompt[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in first.prompt[1:] + first.response + second.prompt + second.response


@pytest.mark.parametrize(
    ("template", "response", "marker"),
    [
        ("alpaca", "x\n### Response: y", "### Response:"),
        ("alpaca", "### Instruction:\nmore", "### Instruction:"),
        ("alpaca", "# ### Response: not at a line's start", None),
        ("alpaca", "User: x", None),
        ("user-assistant", "x\nUser: y", "User:"),
        ("user-assistant", "the User: y\nUserName: z", None),
    ],
)
def test_a_marker_at_the_start_of_a_line_of_a_response_is_found(template, response, marker):
    assert find_marker(template, response) == marker
