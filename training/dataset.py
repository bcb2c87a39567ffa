"""From examples to tensors: texts as tokens, what the frozen layers say of them, and batches of packed impressions.

An impression is packed: its user is read once and all its candidates meet that user in one pass. The states of
distinct item texts below the split are computed once. So is what lies above the split but does not learn: it is kept
between epochs, as float16, in which item states rest in serving too. With no layer left to learn only the pooled top
states are kept, and an epoch is arithmetic on a few numbers per candidate.

Shapes: E examples, B of them in a batch, N candidates, U user tokens, T states per item, H hidden size, F features.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import fields
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tailrace.tastes import TasteModel
from training.batches import Batch, Labels
from training.examples import Example
from training.lessons import Lesson
from training.model import SplitRanker, masked_mean
from training.precision import Precision
from training.reading import Reading, ServedReader
from training.rescoring import BundleScorer
from training.team import ALONE, Team

KEPT_BYTES = 3 * 2**30  # states kept between epochs; what does not fit is computed again when its turn comes
EXAMPLES_PER_PASS = 32  # about a thousand states: enough to keep the products busy, few enough for a core's cache
_BYTES_PER_NUMBER = 2

Done = Callable[[int, int], None]  # examples read, examples in all
Tensors = TypeVar("Tensors", "Batch", "Labels")


class Corpus:
    """Examples as batches for one ranker, of which the layers below `first_layer` stay as they are.

    Labels are those of all; only what `team` says is this process's own has been read, and can be scored here.
    """

    def __init__(
        self,
        ranker: SplitRanker,
        tokenizer: Tokenizer,
        lessons: Sequence[Lesson],
        *,
        first_layer: int,
        max_user_tokens: int,
        max_item_tokens: int,
        units: tuple[NDArray[np.float64], NDArray[np.float64]],
        precision: Precision,
        device: torch.device,
        threads: int = 1,
        team: Team = ALONE,
        served: BundleScorer | None = None,
        kept_bytes: int = KEPT_BYTES,
        done: Done | None = None,
    ) -> None:
        """Reads every text once. The ranker must be on `device`, and its frozen layers stay in evaluation mode.

        Passes run beside each other in `threads`, each on one core: two threads within a pass wait for each other at
        every product, and where another process wants a core too they wait several times as long as they work.
        With no layer left to learn, `served`, the ranker as it serves, reads in its place; its calls run beside each
        other too, each on as many cores as it was opened with.
        """
        self.lessons, self.team = lessons, team
        self.own = [index for index in range(len(lessons)) if team.owns(index)]
        self._ranker, self._first_layer, self._precision, self.device = ranker, first_layer, precision, device
        self._pooled_only = first_layer == len(ranker.bert.stack)
        self._shared = min(_first_difference(ranker), first_layer)
        self._pad_token = ranker.bert.shape.pad_token_id or 0
        self._mean, self._std = units
        self._worth_under, self._worth = TasteModel.ignorant(), dict[int, NDArray[np.float32]]()

        # 1. Texts as tokens, cut as they are in serving.
        self._users = _tokenize(tokenizer, [lesson.example.user_text for lesson in lessons], max_user_tokens)
        distinct: dict[str, int] = {}
        self._rows = {
            index: [distinct.setdefault(text, len(distinct)) for text in lessons[index].example.texts]
            for index in self.own
        }
        self._served: ServedReader | None = None
        with ThreadPoolExecutor(threads) as pool:
            # 2. Every distinct item text, below the split.
            if served is None:
                self._table, self._table_mask = self._read_items(
                    _tokenize(tokenizer, list(distinct), max_item_tokens), pool
                )
            else:
                assert self._pooled_only, "layers that learn need more than what the head is given"
                self._served = ServedReader(served, [lessons[index].example for index in self.own], threads=threads)
            # 3. What is above the split and does not learn, until the room is used up. Examples of like length go
            #    together, always the same ones: noise of padding is then the same after a restart.
            order = [index for index in np.lexsort((self.widths, self.lengths)).tolist() if index in self._rows]
            sizes = np.cumsum([self._size(index) for index in order])
            chunks = _chunks(order[: int(np.searchsorted(sizes, kept_bytes, side="right"))])
            self._kept: dict[int, Reading] = {}
            for chunk, readings in zip(chunks, pool.map(self._read, chunks), strict=True):
                self._kept |= dict(zip(chunk, readings, strict=True))
                if done:
                    done(len(self._kept), len(order))

    def __len__(self) -> int:
        return len(self.lessons)

    @property
    def examples(self) -> list[Example]:
        """What the lessons are about."""
        return [lesson.example for lesson in self.lessons]

    @property
    def sizes(self) -> list[int]:
        """What decides the size of each example's tensors: user tokens, or candidates where only those are left."""
        return self.widths if self._pooled_only else self.lengths

    @property
    def lengths(self) -> list[int]:
        """User tokens of each example."""
        return [len(tokens) for tokens in self._users]

    @property
    def widths(self) -> list[int]:
        """Candidates of each example."""
        return [len(lesson.example.texts) for lesson in self.lessons]

    def passes(self, among: Collection[int]) -> list[list[int]]:
        """Returns these examples in batches of like length, as many in each as are best read in one pass."""
        wanted = set(among)
        return _chunks([index for index in np.lexsort((self.lengths, self.widths)).tolist() if index in wanted])

    def features(self, index: int) -> NDArray[np.float32]:
        """Returns float32 [N,F]: the features of a lesson's candidates, in standard units."""
        raw_NF = self.lessons[index].example.features_NF
        return ((raw_NF - self._mean) / self._std).astype(np.float32)

    def batch(self, chosen: Sequence[int], taste_model: TasteModel) -> Batch:
        """Returns what a model with this taste model reads of these examples, which must be its own, on the device."""
        missing = [index for index in chosen if index not in self._kept]
        fresh = dict(zip(missing, self._read(missing), strict=True)) if missing else {}
        held = [self._kept[index] if index in self._kept else fresh[index] for index in chosen]
        rows, real = self._pad_rows(chosen)
        if self._first_layer == self._ranker.split_layer and not self._pooled_only:
            states, state_mask = self._table[rows].float(), self._table_mask[rows] * real.unsqueeze(-1)
        else:
            states = torch.nn.utils.rnn.pad_sequence([one.states for one in held], batch_first=True).float()
            state_mask = real.unsqueeze(-1).long() if self._pooled_only else self._table_mask[rows] * real.unsqueeze(-1)
        users = [one.users for one in held]
        lengths = torch.tensor([len(states) for states in users])
        features = [self.features(index) for index in chosen]
        return self._place(
            Batch(
                user_vectors=torch.stack([one.vector for one in held]),
                users=torch.nn.utils.rnn.pad_sequence(users, batch_first=True).float(),
                user_mask=(torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
                states=states,
                state_mask=state_mask,
                features=_pad(features, 0.0),
                tag_worth=_pad([self._tag_worth(index, taste_model) for index in chosen], 0.0),
                real=real,
            )
        )

    def _tag_worth(self, index: int, taste_model: TasteModel) -> NDArray[np.float32]:
        """Returns [N]: solved once for each example, as long as it is the same model that asks."""
        if self._worth_under is not taste_model:
            self._worth_under, self._worth = taste_model, {}
        if index not in self._worth:
            self._worth[index] = taste_model.worth_of(self.lessons[index].example.tastes)
        return self._worth[index]

    def labels(self, chosen: Sequence[int]) -> Labels:
        """Returns what became of these examples, on the device."""
        lessons = [self.lessons[index] for index in chosen]
        examples = [lesson.example for lesson in lessons]
        gains = _pad([one.gains_N for one in examples], 0.0)
        places = torch.arange(gains.shape[1])
        return self._place(
            Labels(
                real=places < torch.tensor([len(one.gains_N) for one in examples]).unsqueeze(1),
                shown=places < torch.tensor([one.num_shown for one in examples]).unsqueeze(1),
                gains=gains,
                clicked=_pad([one.clicked_N for one in examples], False),
                ratings=_pad([one.ratings_N for one in examples], float("nan")),
                weights=torch.tensor([lesson.weight for lesson in lessons]),
                arrived=torch.tensor([one.arrived for one in examples]),
                replayed=torch.tensor([lesson.replayed for lesson in lessons]),
            )
        )

    def _place(self, tensors: Tensors) -> Tensors:
        return type(tensors)(*(getattr(tensors, field.name).to(self.device) for field in fields(tensors)))

    def _read_items(self, tokens: list[list[int]], pool: Executor) -> tuple[Tensor, Tensor]:
        """Returns float16 states [M,T,H] of items after layer k and their mask [M,T]."""
        longest = max(map(len, tokens), default=0)
        kept = self._ranker.item_states or longest
        table = torch.zeros(len(tokens), kept, self._ranker.bert.shape.hidden_size, dtype=torch.float16)
        mask = torch.zeros(len(tokens), kept, dtype=torch.int64)

        def read(chunk: list[int]) -> None:
            with torch.no_grad(), self._precision():
                states, state_mask, _ = self._ranker.encode_items(
                    *self._pad_tokens([tokens[row] for row in chunk]), with_vectors=False
                )
            table[chunk, : states.shape[1]] = states.cpu().half()
            mask[chunk, : states.shape[1]] = state_mask.cpu()

        list(pool.map(read, _chunks(np.argsort([len(one) for one in tokens], kind="stable").tolist())))
        return table, mask

    def _read(self, chosen: Sequence[int]) -> list[Reading]:
        """Returns what the layers that stay as they are say of examples.

        Where the first layer that learns is the split, candidates have no states of their own: the table holds them.
        """
        if self._served is not None:
            return [self._served.read(self.lessons[index].example) for index in chosen]
        ranker = self._ranker
        tokens, user_mask = self._pad_tokens([self._users[index] for index in chosen])
        rows, real = self._pad_rows(chosen)
        states = self._table[rows].to(self.device, torch.float32)
        state_mask = (self._table_mask[rows] * real.unsqueeze(-1)).to(self.device)
        if self._first_layer == ranker.split_layer and not self._pooled_only:
            states, state_mask = states[:, :0], state_mask[:, :0]
        with torch.no_grad(), self._precision():
            users = ranker.read_alone(tokens, user_mask)
            users, states = ranker.advance(users, user_mask, states, state_mask, ranker.split_layer, self._shared)
            vectors = ranker.embed_users(users, user_mask, self._shared).float().cpu()
            users, states = ranker.advance(users, user_mask, states, state_mask, self._shared, self._first_layer)
        lengths, widths = user_mask.sum(1).tolist(), real.sum(1).tolist()
        if self._pooled_only:
            users, states, lengths = users[:, :0], masked_mean(states, state_mask).unsqueeze(-2), [0] * len(chosen)
        users, states = users.cpu().half(), states.cpu().half()
        return [
            Reading(users[row, :length].clone(), states[row, :width].clone(), vectors[row])
            for row, (length, width) in enumerate(zip(lengths, widths, strict=True))
        ]

    def _size(self, index: int) -> int:
        """Returns how many bytes keeping an example takes."""
        tokens, items = len(self._users[index]), len(self._rows[index])
        if self._pooled_only:
            vectors = items
        else:
            own = 0 if self._first_layer == self._ranker.split_layer else items * self._table.shape[1]
            vectors = tokens + own
        return (vectors + 2) * self._ranker.bert.shape.hidden_size * _BYTES_PER_NUMBER

    def _pad_rows(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the candidates' rows in the table [B,N] and which of them are real."""
        rows = [torch.tensor(self._rows[index]) for index in chosen]
        widths = torch.tensor([len(one) for one in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, torch.arange(padded.shape[1]) < widths.unsqueeze(1)

    def _pad_tokens(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(one) for one in tokens])
        rows = [torch.tensor(one) for one in tokens]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_token)
        mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long()
        return padded.to(self.device), mask.to(self.device)


def _first_difference(ranker: SplitRanker) -> int:
    """Returns the first layer above the split in which what ranks differs from what embeds; the top one at most.

    Below it both say the same of a user, who is read once for both. Layers that never learned never differ.
    """
    for number, (ranks, embeds) in enumerate(zip(ranker.upper, ranker.bert.stack[ranker.split_layer :], strict=True)):
        pairs = zip(ranks.parameters(), embeds.parameters(), strict=True)
        if ranks is ranker.upper[-1] or not all(torch.equal(one, other) for one, other in pairs):
            return ranker.split_layer + number
    return ranker.split_layer


def _chunks(numbers: list[int]) -> list[list[int]]:
    return [numbers[start : start + EXAMPLES_PER_PASS] for start in range(0, len(numbers), EXAMPLES_PER_PASS)]


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[list[int]]:
    own = Tokenizer.from_str(tokenizer.to_str())  # truncation is a state of the tokenizer: leave the caller's alone
    own.no_padding()
    own.enable_truncation(most)
    return [encoding.ids for encoding in own.encode_batch(list(texts))]


def _pad(columns: Sequence[NDArray[np.generic]], value: float | bool) -> Tensor:
    tensors = [torch.from_numpy(np.array(column)) for column in columns]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
