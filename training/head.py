"""What the ranker makes of pooled states, late features and the worth of tags: click logits and ratings, in torch.

Shapes: B requests, N candidates, H hidden size, F features.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

# Standardised features are cut to this many standard deviations, so that one wild counter cannot saturate the head.
MAX_DEVIATIONS = 8.0
RATING_MIN, RATING_MAX = 1.0, 5.0


class Head(nn.Module):
    """Click logits and ratings from the pooled upper state and late features: a linear prior plus a small network.

    What the candidates' tags are worth to the user is told beside them: a model of tastes solves for each user anew
    (`tailrace.tastes`), which no graph does. That worth, the network's last layer and the gain on the user-item cosine
    start at zero, so before training the click logit is exactly the prior's linear score, and the rating a bounded,
    rising function of it with 3.0 at a score of 0.
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
        tag_worth: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns click logits [B,N] and ratings [B,N] in 1..5, from states [B,N,H], users [B,H], features [B,N,F].

        `tag_worth` [B,N] is what the taste model says of the candidates' tags.
        """
        match = (nn.functional.normalize(pooled, dim=-1) * user_vectors.unsqueeze(1)).sum(-1)
        prior = (features * self.prior).sum(-1) + tag_worth
        standard = ((features - self.feature_mean) / self.feature_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        learned = self.outer(nn.functional.gelu(self.inner(torch.cat([pooled, standard], -1))))
        learned = learned + match.unsqueeze(-1) * self.match_gain
        rating = self.rating_affine[0] * prior + self.rating_affine[1] + learned[..., 1]
        return prior + learned[..., 0], RATING_MIN + (RATING_MAX - RATING_MIN) * torch.sigmoid(rating)
