"""The cache with room: the same keys and values as transformers' own, whatever comes and goes."""

import platform
import subprocess
import sys

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lib import cache


def drawn(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2))


def test_tokens_and_rows_come_and_go_as_in_transformers_own():
    plain, kept = DynamicCache(), DynamicCache()
    for each in (plain, kept):
        for layer in range(2):
            each.update(*drawn(9, 5, layer), layer)
    cache.make_room(kept, 200)
    assert {type(x) for x in kept.layers} == {cache.Roomy}
    rows = 9
    for step in range(80):  # more than SPARE, so that room is made again
        if step % 11 == 5 and rows > 2:
            ended = torch.zeros(rows, dtype=torch.bool)
            ended[[0, rows // 2]] = True
            keep, rows = cache.staying(ended), rows - 2
            for each in (plain, kept):
                each.reorder_cache(keep)
        for layer in range(2):
            new = drawn(rows, 1 + step % 2, 100 + 2 * step + layer)
            for got, wanted in zip(kept.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(got, wanted)
    assert kept.get_seq_length() == plain.get_seq_length() > 5 + cache.SPARE
    assert rows == 1


def test_a_token_is_written_where_there_is_room():
    kept = DynamicCache()
    kept.update(*drawn(3, 5, 0), 0)
    cache.make_room(kept, 50)
    places = []
    for step in range(cache.SPARE):
        keys, _ = kept.update(*drawn(3, 1, step), 0)
        places.append(keys.data_ptr())
    assert len(set(places)) == 1


@pytest.mark.parametrize("ended", [[], [0], [7], [0, 1, 2], [5, 6, 7], [0, 3, 7], list(range(7))])
def test_rows_that_stay_fill_the_gaps(ended):
    gone = torch.zeros(8, dtype=torch.bool)
    gone[ended] = True
    keep = cache.staying(gone)
    assert sorted(keep.tolist()) == [i for i in range(8) if i not in ended]
    assert all(a == i for i, a in enumerate(keep.tolist()) if i not in ended)  # none moves without need
    rows = torch.arange(16.0).reshape(8, 2)
    assert torch.equal(cache.only(rows.clone(), keep), rows[keep])


def test_any_order_of_rows_may_be_asked_for():
    rows = torch.arange(16.0).reshape(8, 2)
    for keep in ([7, 6, 5, 4, 3, 2, 1, 0], [1, 0], [3, 3, 3], []):
        keep = torch.tensor(keep, dtype=torch.long)
        assert torch.equal(cache.only(rows.clone(), keep), rows[keep])


def test_a_window_that_would_drop_tokens_stays_with_transformers():
    for tokens, whole in ((4, True), (5, False)):
        kept = DynamicCache()
        kept.layers = [DynamicSlidingWindowLayer(sliding_window=10), DynamicLayer()]
        for layer in range(2):
            kept.update(*drawn(2, 5, layer), layer)
        cache.make_room(kept, tokens)
        assert [type(x) is cache.Roomy for x in kept.layers] == [whole, True]


def test_a_single_row_repeated_stands_where_each_row_has_it():
    once = DynamicCache()
    once.update(*drawn(1, 4, 0), 0)
    places = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    found = cache.repeated(once, places).layers[0]
    for row, order in enumerate(places):
        assert torch.equal(found.keys[row], once.layers[0].keys[0][:, order])
        assert torch.equal(found.values[row], once.layers[0].values[0][:, order])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_is_used_again():
    code = (
        "import lib, numpy, resource\n"
        "def faults():\n"
        "    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; numpy.ones(2**23)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first\n"
        "print(faults(), max(faults() for _ in range(5)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, again = map(int, done.stdout.split())
    assert again < first / 10
