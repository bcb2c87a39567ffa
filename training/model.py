"""The one-way split BERT ranker, as torch modules. Knows nothing of files, ONNX, Kafka or where features come from.

User tokens see only the user. Item tokens see the user and their own item, and their positions restart with every
item, so a score never depends on which other candidates are scored beside it. Below layer k (`split_layer`) item
tokens do not see the user either: their states after layer k belong to the item alone and are computed once per item,
optionally pooled to T (`item_states`) states. From layer k on, each item state attends in one softmax to the
user's keys and values of that layer and to the states of its own item. k=0 with all tokens is a cross-encoder whose
user half is shared by all candidates; k=L is two towers.

Shapes: B requests, N candidates, U user tokens, S item tokens, T states per item, L layers, h heads, d head size, H
hidden size (h*d), F features. Masks are 1 for real and 0 for padding, which
stands to the right.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tailrace.tastes import TasteModel
from training.bert import Bert, BertLayer
from training.head import Head

# Added to the attention score of padding: far below any real score, and still a finite float16.
MASKED = -1e4


class TextVector(nn.Module):
    """The embedding of a text: the mean over its tokens' top states, at unit length."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Returns vectors [B,H] of states [B,M,H]."""
        return nn.functional.normalize(masked_mean(states, mask), dim=-1)


class SplitRanker(nn.Module):
    """A BERT that encodes the user once and scores any number of candidates against it."""

    def __init__(
        self,
        bert: Bert,
        *,
        split_layer: int = 3,
        item_states: int = 4,
        feature_names: Sequence[str],
        prior: Mapping[str, float],
        head_width: int = 64,
    ) -> None:
        """`item_states` 0 keeps every token. Raises ValueError where the split or the prior does not fit."""
        super().__init__()
        if not 0 <= split_layer <= bert.shape.num_hidden_layers:
            raise ValueError(f"split_layer {split_layer} is not within 0..{bert.shape.num_hidden_layers}")
        if item_states < 0:
            raise ValueError(f"item_states {item_states} is negative; 0 keeps every token")
        self.bert = bert
        self.split_layer = split_layer
        self.item_states = item_states
        self.feature_names = tuple(feature_names)
        # What ranks begins as a copy of what embeds, and learns alone. So the vectors that candidates are drawn by and
        # that cosines compare stay what they were when an impression was logged, and, as the states below the split
        # do, stay valid from version to version: a swap encodes no item anew.
        self.ranking = nn.ModuleList(copy.deepcopy(layer) for layer in bert.stack[split_layer:])
        self.to_vector = TextVector()
        self.taste_model = TasteModel.ignorant()  # what `tag_worth` comes from; no part of a graph
        self.head = Head(bert.shape.hidden_size, feature_names, prior, head_width)

    @property
    def upper(self) -> list[BertLayer]:
        """The layers above the split that rank, lowest first."""
        return [layer for layer in self.ranking if isinstance(layer, BertLayer)]

    def forward(
        self,
        user_tokens: Tensor,
        user_mask: Tensor,
        item_tokens: Tensor,
        item_mask: Tensor,
        features: Tensor,
        tag_worth: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns click logits [B,N] and ratings [B,N] for tokens [B,U] and [B,N,S], as serving does in three steps."""
        batch, count, width = item_tokens.shape
        keys, values, vectors = self.encode_users(user_tokens, user_mask)
        states, state_mask = self.encode_items(
            item_tokens.reshape(-1, width), item_mask.reshape(-1, width), with_vectors=False
        )[:2]
        return self.score(
            keys,
            values,
            user_mask,
            vectors,
            states.reshape(batch, count, *states.shape[1:]),
            state_mask.reshape(batch, count, -1),
            features,
            tag_worth,
        )[:2]

    def encode_users(
        self, user_tokens: Tensor, user_mask: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys [B,L-k,h,d,U], values [B,L-k,h,U,d] and unit vectors [B,H] of the users' texts.

        `table` replaces the word embeddings (export hands it in as an input, to keep it out of the graph).
        """
        states = self.read_alone(user_tokens, user_mask, table)
        vectors = self.embed_users(states, user_mask)
        bias = _attention_bias(user_mask)
        all_keys, all_values = [], []
        for layer in self.upper:
            query, key, value = layer.project(states)
            all_keys.append(key.transpose(-1, -2))
            all_values.append(value)
            if layer is not self.upper[-1]:  # nobody looks at what comes out on top
                states = layer(states, query, key, value, bias)
        if not all_keys:  # two towers: nothing above the split attends
            none = self.bert.stack[-1].project(states)[2].unsqueeze(1)[:, :0]
            return none.transpose(-1, -2), none, vectors
        return torch.stack(all_keys, 1), torch.stack(all_values, 1), vectors

    def encode_items(
        self, item_tokens: Tensor, item_mask: Tensor, table: Tensor | None = None, *, with_vectors: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns states [N,T,H] after layer k, their mask [N,T] and unit vectors [N,H] of the items' texts [N,S].

        The vectors take the layers above the split too; without them they come back empty, which training prefers.
        """
        states = self.bert.embed(item_tokens, table)
        bias = _attention_bias(item_mask)
        kept, kept_mask = states, item_mask
        for depth, layer in enumerate([*self.bert.stack, None]):
            if depth == self.split_layer:
                kept, kept_mask = self._pool_segments(states, item_mask)
                if not with_vectors:
                    return kept, kept_mask, states.new_zeros(0)
            if layer is not None:
                states = layer(states, *layer.project(states), bias)
        return kept, kept_mask, self.to_vector(states, item_mask)

    def score(
        self,
        user_keys: Tensor,
        user_values: Tensor,
        user_mask: Tensor,
        user_vectors: Tensor,
        states: Tensor,
        state_mask: Tensor,
        features: Tensor,
        tag_worth: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns click logits [B,N], ratings [B,N] and the pooled top states [B,N,H] of candidates [B,N,T,H]."""
        batch, count, per_item, hidden = states.shape
        states = states.reshape(batch, count * per_item, hidden)
        user_bias = _attention_bias(user_mask)
        own_bias = _attention_bias(state_mask.reshape(batch * count, per_item))
        own_bias = own_bias.reshape(batch, 1, count, 1, per_item)
        for depth, layer in enumerate(self.upper):
            states = self._attend_jointly(
                layer, states, user_keys[:, depth], user_values[:, depth], user_bias, own_bias
            )
        pooled = masked_mean(states.reshape(batch * count, per_item, hidden), state_mask.reshape(-1, per_item))
        pooled = pooled.reshape(batch, count, hidden)
        click_logits, ratings = self.head(pooled, user_vectors, features, tag_worth)
        return click_logits, ratings, pooled

    def read_alone(self, tokens: Tensor, mask: Tensor, table: Tensor | None = None) -> Tensor:
        """Returns states [B,M,H] of texts after layer k: of users, and of items before their states are pooled."""
        states = self.bert.embed(tokens, table)
        bias = _attention_bias(mask)
        for layer in self.bert.stack[: self.split_layer]:
            states = layer(states, *layer.project(states), bias)
        return states

    def embed_users(self, states: Tensor, mask: Tensor, start: int | None = None) -> Tensor:
        """Returns unit vectors [B,H] from the states before layer `start`, k by default, by layers that never learn."""
        bias = _attention_bias(mask)
        for layer in self.bert.stack[self.split_layer if start is None else start :]:
            states = layer(states, *layer.project(states), bias)
        vectors: Tensor = self.to_vector(states, mask)
        return vectors

    def advance(
        self, users: Tensor, user_mask: Tensor, states: Tensor, state_mask: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Returns user states [B,U,H] and item states [B,N,T,H] after layers `start` to `stop`, k <= start <= stop.

        What `encode_users` and `score` do, layer by layer: training runs and keeps the layers that do not learn once.
        The last layer leaves the user's states as they were, because nothing above looks at them.
        """
        batch, count, per_item, hidden = states.shape
        joined = states.reshape(batch, count * per_item, hidden)
        user_bias = _attention_bias(user_mask)
        own_bias = _attention_bias(state_mask.reshape(batch * count, per_item)).reshape(batch, 1, count, 1, per_item)
        for layer in self.upper[start - self.split_layer : stop - self.split_layer]:
            query, key, value = layer.project(users)
            joined = self._attend_jointly(layer, joined, key.transpose(-1, -2), value, user_bias, own_bias)
            if layer is not self.upper[-1]:
                users = layer(users, query, key, value, user_bias)
        return users, joined.reshape(states.shape)

    def judge(
        self,
        user_vectors: Tensor,
        states: Tensor,
        state_mask: Tensor,
        features: Tensor,
        tag_worth: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns click logits [B,N] and ratings [B,N] from the top item states that `advance` ends with."""
        batch, count, per_item, hidden = states.shape
        pooled = masked_mean(states.reshape(-1, per_item, hidden), state_mask.reshape(-1, per_item))
        pooled = pooled.reshape(batch, count, hidden)
        judged: tuple[Tensor, Tensor] = self.head(pooled, user_vectors, features, tag_worth)
        return judged

    def _attend_jointly(
        self,
        layer: BertLayer,
        states: Tensor,
        user_key: Tensor,
        user_value: Tensor,
        user_bias: Tensor,
        own_bias: Tensor,
    ) -> Tensor:
        """Returns item states [B,N*T,H] after a layer in which each sees the user and its own item's states.

        All candidates meet the user's keys in one product per head; only the T by T products are per item.
        """
        batch, heads, num_user = user_value.shape[:3]
        count, per_item = own_bias.shape[2], own_bias.shape[4]
        query, key, value = layer.project(states)
        by_item = (batch, heads, count, per_item, layer.head_size)
        to_user = query @ user_key + user_bias
        to_own = query.reshape(by_item) @ key.reshape(by_item).transpose(-1, -2) + own_bias
        weights = layer.weigh(torch.cat([to_user, to_own.reshape(batch, heads, -1, per_item)], -1))
        on_user, on_own = weights[..., :num_user], weights[..., num_user:]
        from_own = on_own.reshape(batch, heads, count, per_item, per_item) @ value.reshape(by_item)
        return layer.finish(states, on_user @ user_value + from_own.reshape(query.shape))

    def _pool_segments(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns T means over contiguous segments of the real tokens [N,T,H], and which segments hold any [N,T]."""
        if self.item_states == 0:
            return states, mask
        # Token j of n falls into segment t where t*n <= j*T < (t+1)*n: whole numbers, so no rounding differs by device.
        total = mask.sum(1).reshape(-1, 1, 1)
        place = torch.arange(mask.shape[1], device=mask.device).reshape(1, 1, -1) * self.item_states
        segment = torch.arange(self.item_states, device=mask.device).reshape(1, -1, 1)
        inside = (segment * total <= place) & (place < (segment + 1) * total)
        member = (inside & (mask.unsqueeze(1) > 0)).to(states.dtype)
        size = member.sum(-1, keepdim=True)
        return (member / size.clamp(min=1.0)) @ states, (size.squeeze(-1) > 0).to(mask.dtype)


def _attention_bias(mask: Tensor) -> Tensor:
    """Returns [B,1,1,M], to be added to attention scores: 0 for real, far below for padding."""
    return ((1 - mask).to(torch.float32) * MASKED).unsqueeze(1).unsqueeze(1)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of the real states: [...,M,H] and [...,M] to [...,H]; zeros where there are none."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(-2) / weights.sum(-2).clamp(min=1.0)
