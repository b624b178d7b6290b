"""Keys and values of the tokens so far, so that generation computes each token once.

    cache = KVCache(model.config, batch=2, capacity=512)
    logits = model.next_logits(prompts, cache, lengths)  # prefill: (B, T) right-padded prompts, (B,) their lengths
    cache = cache.select(torch.tensor([0, 0, 0, 1]))     # three samples of the first prompt, one of the second
    logits = model.next_logits(tokens, cache)            # decode: (B, 1) tokens

A sliding-window layer keeps W slots and writes position p into slot p mod W, so that it never fills up.

B batch, T new tokens, S slots, K key/value heads, D head size.
"""

import torch
from torch import Tensor

from model.attention_masks import Visibility, in_reach, see_before
from model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer; rows may differ in length.

    Memory is taken at the first write, in the dtype and on the device of the keys. Use it under `torch.no_grad()` or
    `torch.inference_mode()`.

    Attributes:
        batch: B.
        capacity: tokens a row can hold; layers whose window is no longer than that never fill up.
        longest: tokens in the longest row.
        lengths: (B,) tokens in each row, or None while all rows are `longest` long.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int) -> None:
        self.batch = batch
        self.capacity = capacity
        self.longest = 0
        self.lengths: Tensor | None = None
        self._endless = all(window is not None and window <= capacity for window in config.windows)
        self._slots = [capacity if window is None else min(window, capacity) for window in config.windows]
        self._keys: list[Tensor | None] = [None] * config.n_layer
        self._values: list[Tensor | None] = [None] * config.n_layer

    def select(self, rows: Tensor) -> "KVCache":
        """A new cache with these rows, in this order; a row may occur several times, to be continued independently.

        Args:
            rows: (B',) int64 row numbers.
        """
        chosen = object.__new__(KVCache)
        chosen.__dict__.update(self.__dict__)
        chosen.batch = len(rows)
        if self.lengths is not None:
            chosen.lengths = self.lengths[rows.to(self.lengths.device)]
            chosen.longest = int(chosen.lengths.max())
        for name in ("_keys", "_values"):
            tensors = getattr(self, name)
            setattr(chosen, name, [None if x is None else x.index_select(0, rows.to(x.device)) for x in tensors])
        return chosen

    def has_room(self, tokens: int) -> bool:
        """Whether every row can take so many tokens more."""
        return self._endless or self.longest + tokens <= self.capacity

    def room_of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, each (B, K, S, D); allocated if need be, with the heads and dtype of `like`."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (self.batch, like.shape[1], self._slots[layer], like.shape[3])
            keys, values = like.new_zeros(shape), like.new_zeros(shape)
            self._keys[layer], self._values[layer] = keys, values
        return keys, values


class CacheStep:
    """One forward's use of a cache: the positions of the new tokens, what they see, and where they are written.

    Three cases. An empty cache: the new tokens see each other as without a cache, through the same fast kernels;
    padding is at the right end, where no real token sees it. One token: it is written, then sees all slots in use.
    Several tokens after others: old slots and new tokens side by side under a mask.

    Args:
        cache: read and written.
        length: T.
        lengths: (B,) real tokens of each row, the rest being padding at the right; None: all T.
        device: of the tokens.

    Raises ValueError where the cache has no room for them.
    """

    def __init__(self, cache: KVCache, length: int, lengths: Tensor | None, device: torch.device) -> None:
        longest_new = length if lengths is None else int(lengths.max())
        if not cache.has_room(longest_new):
            raise ValueError(
                f"the cache holds {cache.longest} of {cache.capacity} tokens and has no room for {longest_new} more"
            )
        assert lengths is None or length > 1, "a decoding step takes one token in every row"
        self.cache = cache
        self.length = length
        self.lengths = lengths
        self.uniform = cache.lengths is None and lengths is None
        start = torch.tensor([cache.longest], device=device) if cache.lengths is None else cache.lengths
        new = torch.tensor([length], device=device) if lengths is None else lengths
        self._start, self._new = start, new  # (1 or B)
        self._longest_after = cache.longest + longest_new
        positions = start[:, None] + torch.arange(length, device=device)  # (1 or B, T)
        self.positions = positions[0] if len(positions) == 1 else positions
        self._takes: dict[int, tuple[Tensor, Tensor]] = {}

    def visibility(self, window: int | None) -> Visibility:
        """Which of the keys that `update` returns the new tokens see, in a layer with this window."""
        device = self._start.device
        if self.cache.longest == 0:
            return see_before(self.length, window, None, device)
        slots = self.cache.capacity if window is None else min(window, self.cache.capacity)
        if self.length == 1:
            used = min(slots, self.cache.longest + 1)
            if self.uniform:
                return Visibility(causal=False)
            return Visibility(causal=False, mask=(_slot_positions(self._start, slots) >= 0)[:, None, None, :used])
        query = (self._start[:, None] + torch.arange(self.length, device=device))[:, :, None]  # (1 or B, T, 1)
        old = _slot_positions(self._start - 1, slots)[:, None, : min(slots, self.cache.longest)]  # (1 or B, 1, S)
        sees_old = (old >= 0) & in_reach(query, old, window)  # (1 or B, T, S)
        sees_new = in_reach(query, query.transpose(1, 2), window)  # (1 or B, T, T)
        return Visibility(causal=False, mask=torch.cat((sees_old, sees_new), dim=-1).unsqueeze(1))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) new keys and values; return the keys and values to attend to, (B, K, ·, D)."""
        assert not (torch.is_grad_enabled() and k.requires_grad), "a cache is for torch.no_grad()"
        rooms = self.cache.room_of(layer, k)
        slots, longest = rooms[0].shape[2], self.cache.longest
        if self.length == 1:
            for room, fresh in zip(rooms, (k, v), strict=True):
                self._write_one(room, fresh)
            used = min(slots, longest + 1)
            return rooms[0][:, :, :used], rooms[1][:, :, :used]
        seen = (k, v)
        if longest > 0:
            used = min(slots, longest)
            seen = torch.cat((rooms[0][:, :, :used], k), 2), torch.cat((rooms[1][:, :, :used], v), 2)
        for room, fresh in zip(rooms, (k, v), strict=True):
            self._write_many(room, fresh)
        return seen

    def finish(self) -> None:
        """Count the new tokens, once every layer has written them."""
        if not self.uniform:
            self.cache.lengths = (self._start + self._new).expand(self.cache.batch)
        self.cache.longest = self._longest_after if self.uniform or self.length == 1 else self._count_longest()

    def _count_longest(self) -> int:
        assert self.cache.lengths is not None
        return int(self.cache.lengths.max())

    def _write_one(self, room: Tensor, fresh: Tensor) -> None:
        """Write one new token's keys or values (B, K, 1, D) into the layer's (B, K, S, D)."""
        slots = room.shape[2]
        if self.uniform:
            room[:, :, self.cache.longest % slots] = fresh[:, :, 0]
        else:
            rows = torch.arange(len(room), device=room.device)
            room[rows, :, self._start % slots] = fresh[:, :, 0]

    def _write_many(self, room: Tensor, fresh: Tensor) -> None:
        """Write new keys or values (B, K, T, D) into the layer's (B, K, S, D)."""
        slots, longest = room.shape[2], self.cache.longest
        if self.cache.lengths is None and longest + self.length <= slots:  # padding lands behind the row's end: unseen
            room[:, :, longest : longest + self.length] = fresh
            return
        if slots not in self._takes:
            # each slot takes the last of the new tokens that belong in it, and keeps what it has where there is none
            index = _slot_positions(self._start + self._new - 1, slots) - self._start[:, None]  # (1 or B, S)
            self._takes[slots] = index.clamp(min=0)[:, None, :, None], (index >= 0)[:, None, :, None]
        index, taken = self._takes[slots]
        candidates = fresh.gather(2, index.expand(len(room), room.shape[1], slots, room.shape[3]))
        room.copy_(torch.where(taken, candidates, room))


def _slot_positions(last: Tensor, slots: int) -> Tensor:
    """(R, S) position that each slot holds once the tokens up to `last` (R,) are written; negative: none yet."""
    slot = torch.arange(slots, device=last.device)
    return last[:, None] - (last[:, None] - slot) % slots
