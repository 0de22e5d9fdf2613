"""How fast an adapter trains here, beside a plain transformers.Trainer on the same rows: a ratio in one run.

    python benchmarks/qlora.py

Plain: rows in random order, padded to `max_tokens`, the usual tutorial's way. Ours: batches of rows of like length,
padded to their longest. The same model, adapter, rows, steps and seed; tokens are real ones, padding not counted. The
loss is that on held-out topics.
"""

import statistics
import tempfile
import time

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, set_seed

from lib import chat, classifier, opinions, profiles, qlora

ROUNDS = 3


class Fixed(qlora.Collator):
    """Pads every row to the same length."""

    def __init__(self, pad, length):
        super().__init__(pad)
        self.length = length

    def __call__(self, items):
        batch = super().__call__(items)
        fill = {"input_ids": self.pad, "attention_mask": 0, "labels": qlora.IGNORED}
        extra = self.length - batch["input_ids"].shape[1]
        return {k: torch.nn.functional.pad(v, (0, extra), value=fill[k]) for k, v in batch.items()}


def once(settings, model, rows, plain):
    """Train one adapter; returns (real tokens a second, held-out loss)."""
    q = settings.qlora
    set_seed(settings.seed)
    loaded = chat.load(model, settings.chat.precision)
    tuned = get_peft_model(prepare_model_for_kbit_training(loaded.model, False), qlora.lora(settings))
    fit, held = (
        qlora.encode(loaded.tokenizer, part, q.max_tokens, q.end_of_turn)
        for part in classifier.split(rows, q.held_out_share, settings.seed)
    )
    collate = Fixed(loaded.pad, q.max_tokens) if plain else qlora.Collator(loaded.pad)
    with tempfile.TemporaryDirectory() as folder:
        arguments = qlora.arguments(settings, model, len(fit), folder)
        arguments.eval_strategy, arguments.eval_on_start, arguments.save_strategy = "no", False, "no"
        arguments.train_sampling_strategy = "random" if plain else "group_by_length"
        arguments.include_num_input_tokens_seen = "non_padding"
        trainer = Trainer(tuned, arguments, train_dataset=fit, eval_dataset=held, data_collator=collate)
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
        return trainer.state.num_input_tokens_seen / seconds, trainer.evaluate()["eval_loss"]


def main():
    settings = profiles.load("tiny")
    frame = opinions.load(settings.opinions)
    rows = frame[(frame["split"] == "train") & (frame["trait"] == "extraversion")]
    ratios = []
    for i in range(ROUNDS):
        speed = {plain: once(settings, settings.chat.models[0], rows, plain) for plain in (True, False)}
        ratios.append(speed[False][0] / speed[True][0])
        for plain, (rate, loss) in speed.items():
            print(f"round {i + 1}, {'plain' if plain else 'ours '}: {rate:7.0f} tokens/s, held-out loss {loss:.3f}")
    print(f"ours is {statistics.median(ratios):.1f} times as fast (rounds: {', '.join(f'{r:.1f}' for r in ratios)})")


if __name__ == "__main__":
    main()
