"""What a model writes after the sample prompts of its config, during training and at its end.

for prompt, text in draw_samples(trainer, max_new_tokens=120): ...

Limit: a model that is sharded over ranks is read from the newest checkpoint, so it has samples at the end of a run only.
"""

from __future__ import annotations

from typing import NamedTuple

from kindling import device
from kindling.data.prompts import Exchange
from kindling.errors import KindlingError
from kindling.generation.completion import answer, complete
from kindling.generation.sampling import Sampling
from kindling.sample_prompts import sample_prompts
from kindling.tokenization.tokenizer import Tokenizer
from kindling.training.trainer import Trainer
from model import LanguageModel


class Sample(NamedTuple):
    """A prompt, and the text that the model wrote after it; of a fine-tuned model, an instruction and the answer."""

    prompt: str
    text: str


def draw_samples(trainer: Trainer, max_new_tokens: int) -> list[Sample]:
    """Return a sample for each prompt of the config. The n-th is drawn with seed n - 1, so it can be repeated.

    The random state of the training and its model do not change.
    """
    model, tokenizer, rng = trainer.unsharded_model(), trainer.run.tokenizer(), device.rng_state(trainer.runtime)
    was_training = model.training
    model.eval()
    try:
        return [
            Sample(prompt, _text_after(prompt, trainer, model, tokenizer, Sampling(max_new_tokens, seed=seed)))
            for seed, prompt in enumerate(sample_prompts(trainer.cfg))
        ]
    finally:
        model.train(was_training)
        device.set_rng_state(rng)


def _text_after(prompt: str, trainer: Trainer, model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling) -> str:
    try:
        if not trainer.cfg.data.instructions:
            return complete(model, tokenizer, prompt, sampling).text
        said = answer(model, tokenizer, trainer.cfg.data.template, [Exchange(prompt)], sampling)
    except KindlingError as e:  # such as an instruction that does not fit the context: it must not stop the rest
        return f"({e})"
    cut = "by the context" if sampling.max_new_tokens == model.cfg.block_size else "here"
    return said.text.rstrip() + ("" if said.stopped else f" ... (cut {cut})")
