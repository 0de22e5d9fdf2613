"""Speed of answering many questions at once, beside `generate` for one question at a time: ratios of one run.

    python benchmarks/chat.py

The same organism, questions, limit and sampling on both sides. Not a test: it prints, and judges nothing.
"""

import statistics
import time

import torch

from lib import chat, opinions, organisms, paths

RUNS = 3
QUESTIONS = 100
BATCH = 100
MANY = 1000
SETTINGS = {"max_new_tokens": 80, "temperature": 0.7, "top_p": 0.9}


def one_at_a_time(c, questions):
    """Seconds for a token, generating for one question after another."""
    new, start = 0, time.perf_counter()
    for prompt in chat.prompts(c, questions):
        ids = c.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(c.model.device)
        more = {"attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0, "pad_token_id": c.pad}
        new += c.model.generate(ids, **more, **SETTINGS).shape[1] - ids.shape[1]
    return (time.perf_counter() - start) / new


def at_once(c, questions):
    """Seconds for a token, and in all, answering in batches."""
    start = time.perf_counter()
    table = chat.answer(c, questions, **SETTINGS, seed=0, batch_size=BATCH, show=False)
    spent = time.perf_counter() - start
    return spent / (table["new_tokens"] + table["ended"]).sum(), spent


def main():
    questions = list(opinions.read_csv(paths.OPINIONS / "test.csv")["question"].drop_duplicates()[:QUESTIONS])
    many = (questions * -(-MANY // len(questions)))[:MANY]
    for precision in ("fp32", "nf4"):
        c = chat.load(str(organisms.ORGANISMS / "tiny-llama"), precision)
        at_once(c, questions[:2])
        ratios = [one_at_a_time(c, questions) / at_once(c, questions)[0] for _ in range(RUNS)]
        print(
            f"{precision}: time a token, {QUESTIONS} questions in batches of {BATCH} against one generate a question: "
            f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}, {RUNS} runs)"
        )
        print(f"{precision}: {MANY} answers in {at_once(c, many)[1]:.1f} s")


if __name__ == "__main__":
    main()
