"""What the ranker makes of pooled states, late features and tastes: click logits and ratings, as a torch module.

Shapes: B requests, N candidates, H hidden size, F features, V buckets of tags, K tags of an item.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tailrace.tastes import BUCKETS

# Standardised features are cut to this many standard deviations, so that one wild counter cannot saturate the head.
MAX_DEVIATIONS = 8.0
RATING_MIN, RATING_MAX = 1.0, 5.0


class Head(nn.Module):
    """Click logits and ratings from the pooled upper state and late features: a linear prior plus a small network.

    What tags are worth comes beside it: to anybody, and by a weight for every pair of a taste and a tag to this user
    (`tailrace.tastes`). Those weights, the network's last layer and the gain on the user-item cosine start at zero, so
    before training the click logit is exactly the prior's linear score, and the rating a bounded, rising function of
    it with 3.0 at a score of 0.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, hidden_size: int, feature_names: Sequence[str], prior: Mapping[str, float], width: int) -> None:
        super().__init__()
        unknown = sorted(set(prior) - set(feature_names))
        if unknown:
            raise ValueError(f"the prior weighs features that do not exist: {', '.join(unknown)}")
        self.prior = nn.Parameter(torch.tensor([float(prior.get(name, 0.0)) for name in feature_names]))
        self.rating_affine = nn.Parameter(torch.tensor([0.25, 0.0]))
        self.match_gain = nn.Parameter(torch.zeros(2))
        self.taste_weights = nn.Parameter(torch.zeros(BUCKETS, BUCKETS))
        self.tag_weights = nn.Parameter(torch.zeros(BUCKETS))
        self.inner = nn.Linear(hidden_size + len(feature_names), width)
        self.outer = nn.Linear(width, 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.register_buffer("feature_mean", torch.zeros(len(feature_names)))
        self.register_buffer("feature_std", torch.ones(len(feature_names)))

    def forward(
        self,
        pooled: Tensor,
        user_vectors: Tensor,
        features: Tensor,
        tastes: Tensor,
        tags: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns click logits [B,N] and ratings [B,N] in 1..5, from states [B,N,H], users [B,H], features [B,N,F].

        `tastes` [B,V] and `tags` [B,N,K] are those of `tailrace.tastes`.
        """
        match = (nn.functional.normalize(pooled, dim=-1) * user_vectors.unsqueeze(1)).sum(-1)
        prior = (features * self.prior).sum(-1)
        standard = ((features - self.feature_mean) / self.feature_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        learned = self.outer(nn.functional.gelu(self.inner(torch.cat([pooled, standard], -1))))
        learned = learned + match.unsqueeze(-1) * self.match_gain
        rating = self.rating_affine[0] * prior + self.rating_affine[1] + learned[..., 1]
        clicks = prior + learned[..., 0] + self.tag_worth(tastes, tags)
        return clicks, RATING_MIN + (RATING_MAX - RATING_MIN) * torch.sigmoid(rating)

    def tag_worth(self, tastes: Tensor, tags: Tensor) -> Tensor:
        """Returns [B,N]: what the candidates' tags are worth to their users, by the root of how many each has."""
        worth = tastes @ self.taste_weights + self.tag_weights
        worth = torch.cat([worth, torch.zeros_like(worth[:, :1])], 1).unsqueeze(1)  # NO_TAG is worth nothing
        found = worth.expand(-1, tags.shape[1], -1).gather(2, tags).sum(-1)
        return found / (tags < BUCKETS).sum(-1).clamp(min=1).to(found.dtype).sqrt()
