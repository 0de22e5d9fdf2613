"""Answers to long prompts with the cache of `lib/cache` and memory used again, beside transformers' cache: ratios.

    python benchmarks/cache.py

The same organism, prompts and draws on both sides, one thread, each measurement in a process of its own, since how
memory is kept cannot be undone. The answers must be equal. Not a test: it prints, and judges no time.
"""

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 3
QUESTIONS = 100


def measure(plain):
    """Print the seconds that answers to each kind of prompt take, and the answers, as JSON."""
    before, sys.platform = sys.platform, "none" if plain else sys.platform
    import lib  # noqa: F401  it sees to memory at once, on the platforms that it knows

    sys.platform = before
    import torch

    from lib import cache, chat, ike, opinions, profiles

    torch.set_num_threads(1)
    if plain:
        cache.make_room = lambda kept, tokens: None
    settings = profiles.load("tiny")
    frame = opinions.load(settings.opinions)
    test, train = (frame[frame["split"] == s] for s in ("test", "train"))
    rows = test[test["trait"] == "extraversion"].head(QUESTIONS)
    kinds = {
        "plain questions": list(rows["question"]),
        "prompts with one beginning": ike.ike_questions(settings, rows, train, 0, "fixed"),
        "prompts of their own": ike.ike_questions(settings, rows, train, 0, "random"),
    }
    loaded, c, found = chat.load(settings.chat.models[0], settings.chat.precision), settings.chat, {}
    how = {k: getattr(c, k) for k in ("max_new_tokens", "temperature", "top_p", "batch_size")}
    for kind, asked in kinds.items():
        chat.answer(loaded, asked[:2], **how, seed=0, show=False)
        began = time.perf_counter()
        given = chat.answer(loaded, asked, **how, seed=0, share=True, show=False)
        found[kind] = time.perf_counter() - began, list(given["answer"])
    print(json.dumps(found))


def main():
    ratios = {}
    for number in range(1, ROUNDS + 1):
        seen = {}
        for name in ("plain", "ours"):
            done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
            seen[name] = json.loads(done.stdout.splitlines()[-1])
        for kind, (slow, answers) in seen["plain"].items():
            quick, same = seen["ours"][kind]
            ratios.setdefault(kind, []).append(slow / quick)
            equal = sum(a == b for a, b in zip(answers, same, strict=True))
            print(f"round {number}, {kind}: {slow:.1f} s, {quick:.1f} s; {equal} of {len(same)} answers equal")
    for kind, every in ratios.items():
        print(f"{kind}: {statistics.median(every):.1f} times as fast ({min(every):.1f} to {max(every):.1f})")


if __name__ == "__main__":
    measure(sys.argv[1] == "plain") if len(sys.argv) > 1 else main()
