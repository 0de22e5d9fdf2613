"""Keys and values of the tokens a model has read, kept so that a further token, or a row less, costs little.

transformers copies all of them for every new token, and again for every row that leaves a batch: half of the time a
small model takes to answer long prompts on a CPU.
"""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SPARE = 32  # tokens of room made at a time


class Roomy(DynamicLayer):
    """A DynamicLayer that writes new tokens into room made beforehand, and moves rows only where one has left.

    keys and values are views, (rows, heads, tokens, dimension), of the first rows and tokens of that room.
    """

    def __init__(self, keys, values):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.room = keys, values, (keys, values)

    def update(self, key_states, value_states, *args, **kwargs):
        """Add tokens to every row: views of the keys and of the values of all tokens read so far."""
        rows, _, seen, _ = self.keys.shape
        last = seen + key_states.shape[2]
        if last > self.room[0].shape[2]:
            self.room = tuple(_wider(old, last - seen + SPARE) for old in (self.keys, self.values))
        self.keys, self.values = (room[:rows, :, :last] for room in self.room)
        self.keys[:, :, seen:], self.values[:, :, seen:] = key_states, value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        """Go on with the rows `beam_idx` only, in that order."""
        self.keys, self.values = only(self.keys, beam_idx), only(self.values, beam_idx)


def _wider(old, more):
    """A copy with `more` tokens of room behind."""
    rows, heads, seen, size = old.shape
    new = old.new_empty(rows, heads, seen + more, size)
    new[:, :, :seen] = old
    return new


def only(tensor, keep):
    """The rows `keep` of a tensor, in that order: a view of its first rows, those not in place being moved there."""
    moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero().squeeze(1)
    if len(moved):
        tensor[moved] = tensor[keep[moved]]
    return tensor[: len(keep)]


def staying(ended):
    """Numbers of the rows that go on, those at the end taking the places of earlier ones that have ended: tensor.

    ended: bool (rows,). So as few rows as can be are moved.
    """
    count = int((~ended).sum())
    keep = torch.arange(count, device=ended.device)
    keep[ended[:count]] = count + (~ended[count:]).nonzero().squeeze(1)
    return keep


def make_room(cache, tokens):
    """Give the layers of a transformers cache room, in place; `tokens` at most will follow in a row.

    cache: or several of them, as its `parts`. Layers that keep something else than all keys and values, or will drop
    some of them, stay as they are.
    """
    for part in getattr(cache, "parts", [cache]):
        part.layers[:] = [Roomy(x.keys, x.values) if _whole(x, tokens) else x for x in part.layers]


def _whole(layer, more):
    """Whether a layer has kept the keys and values of all tokens, and will after `more`."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.is_initialized and layer.cumulative_length + more < layer.sliding_window
    return type(layer) is DynamicLayer and layer.is_initialized


def repeated(once, places):
    """A DynamicCache of several rows, from one of a single row.

    places: (rows, tokens), which token of that row stands where in each row.
    """
    found = DynamicCache()
    for i, layer in enumerate(once.layers):
        found.update(*(kept[0][:, places].transpose(0, 1) for kept in (layer.keys, layer.values)), i)
    return found
