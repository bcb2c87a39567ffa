"""A fine-tune under way: steps, epochs, the stop slice, and going on after a kill.

Shapes: E examples, B of them in a batch, N candidates.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tailrace.errors import TrainingDiverged
from tailrace.settings import TrainingSettings
from training.batches import Labels
from training.checkpoints import EpochRecord, Standing, load_checkpoint, save_checkpoint
from training.dataset import Corpus
from training.learner import Learner
from training.lessons import plan_batches
from training.losses import anchor_loss, listwise_loss, parent_loss, pointwise_loss, rating_loss
from training.precision import Precision
from training.stop_slice import StopSlice, pad_logits
from training.trackers import Facts, Trackers, open_trackers

BEST_KEPT = 3  # epochs whose weights are averaged
PATIENCE = 2  # epochs without a better stop loss before the end
CLIP_NORM = 1.0
PLACE_RATE = 10.0  # learning rate of the position bias, in those of the head
_WRITE_EVERY = 20  # steps between two points of a tracked curve

Done = Callable[[int, int], None]  # steps done, steps in all


class Course:
    """A learner, its lessons, its optimizer and where it stands."""

    def __init__(
        self,
        learner: Learner,
        corpus: Corpus,
        stop: StopSlice,
        replay_logits: Mapping[int, Tensor],
        settings: TrainingSettings,
        *,
        precision: Precision,
        folder: Path,
        fingerprint: str,
        facts: Facts,
    ) -> None:
        """Goes on from `folder` where it holds a checkpoint with this fingerprint; trackers are told the facts."""
        self.learner = learner
        self._corpus, self._stop, self._replay_logits = corpus, stop, replay_logits
        self._settings, self._precision, self._folder, self._facts = settings, precision, folder, facts
        self._team = corpus.team
        self._optimizer = make_optimizer(learner, settings)
        self._parameters = {name: weight for name, weight in learner.named_parameters() if weight.requires_grad}
        # The head alone is held: layers have a rate of their own, a fortieth of the head's, and dropout.
        self._anchors = {
            name: weight.detach().clone()
            for name, weight in self._parameters.items()
            if name.startswith("ranker.head.")
        }
        found = load_checkpoint(folder, fingerprint, self._parameters, self._optimizer)
        self.resumed = found is not None
        self.standing, self.snapshots = found or (Standing(fingerprint), {})
        self.steps_per_epoch = len(self._plan(0))
        self.total_steps = settings.epochs * self.steps_per_epoch

    @property
    def over(self) -> bool:
        """Whether all epochs are done, or the last ones were no better."""
        history = self.standing.history
        if len(history) >= self._settings.epochs:
            return True
        losses = [record.stop_loss for record in history if record.stop_loss is not None]
        return len(losses) > PATIENCE and min(losses[-PATIENCE:]) >= min(losses[:-PATIENCE])

    def run(self, done: Done, checkpoint_every_s: float) -> None:
        """Learns until it is over; of a team, each calls it. Raises TrainingDiverged."""
        saved_at = time.perf_counter()
        with self._open_trackers() as trackers:
            while not self.over:
                started = time.perf_counter()
                self.learner.train()
                epoch = len(self.standing.history)
                for chosen in self._plan(epoch)[self.standing.step - epoch * self.steps_per_epoch :]:
                    self._step(chosen, trackers)
                    done(self.standing.step, self.total_steps)
                    if time.perf_counter() - saved_at > checkpoint_every_s:
                        self._save()
                        saved_at = time.perf_counter()
                self._close_epoch(time.perf_counter() - started, trackers)
                self._save()

    def best_epochs(self) -> list[int]:
        """Returns the epochs whose weights are kept, best first."""
        return [epoch for _, epoch in self.standing.best]

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_batches(self._corpus.sizes, self._settings.batch, seed=self._settings.seed, epoch=epoch)

    def _step(self, chosen: Sequence[int], trackers: Trackers) -> None:
        settings, standing = self._settings, self.standing
        labels = self._corpus.labels(chosen)
        parents = pad_logits([self._replay_logits.get(index) for index in chosen], labels.real)
        share = rate_share(standing.step, self.total_steps, settings.warm_up_share)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * share
        # Dropout of this step, whatever came before, and each of a team its own.
        torch.manual_seed((settings.seed * 1_000_003 + standing.step) * self._team.size + self._team.rank)
        scores = score_batch(self.learner, self._corpus, chosen, labels, self._precision)
        losses = compute_losses(scores, labels, parents, settings)
        losses["anchor"] = self._team.count_once(anchor_loss(self._parameters, self._anchors) / len(self._corpus))
        losses["total"] = losses["total"] + settings.anchor_weight * losses["anchor"]
        self._optimizer.zero_grad()
        losses["total"].backward()  # type: ignore[no-untyped-call]
        self._team.add_up_gradients(self._parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP_NORM)
        figures = {name: loss.item() for name, loss in losses.items()}
        if not torch.isfinite(norm) or not torch.isfinite(losses["total"]):
            raise TrainingDiverged(standing.step, figures["total"])
        self._optimizer.step()
        for name, figure in figures.items():
            standing.totals[name] = standing.totals.get(name, 0.0) + figure
        if standing.step % _WRITE_EVERY == 0:
            trackers.write({f"train/{name}": figure for name, figure in figures.items()}, standing.step)
        standing.step += 1

    def _close_epoch(self, took_s: float, trackers: Trackers) -> None:
        standing, epoch = self.standing, len(self.standing.history)
        figures = self._stop.measure(self.learner)
        standing.history.append(
            EpochRecord(
                epoch=epoch,
                losses={name: total / self.steps_per_epoch for name, total in standing.totals.items()},
                stop_loss=figures.loss if figures else None,
                parent_stop_loss=figures.parent_loss if figures else None,
                stop_ndcg_10=figures.ndcg_10 if figures else None,
                took_s=took_s,
            )
        )
        standing.totals = {}
        if figures:
            trackers.write({f"stop/{name}": figure for name, figure in asdict(figures).items()}, standing.step)
            standing.best = sorted([*standing.best, (figures.loss, epoch)])[:BEST_KEPT]
            self.snapshots[epoch] = self.learner.learned()
            for old in set(self.snapshots) - set(self.best_epochs()):
                del self.snapshots[old]

    def _open_trackers(self) -> AbstractContextManager[Trackers]:
        if not self._team.leads:
            return nullcontext(Trackers())
        return open_trackers(self._settings, self._folder, self._facts, from_step=self.standing.step)

    def _save(self) -> None:
        if self._team.leads:
            save_checkpoint(self._folder, self.standing, self._parameters, self._optimizer, self.snapshots)


class Scores(NamedTuple):
    """What a learner says of a batch: click logits, ratings, and what is added to the logits for places, all [B,N]."""

    logits: Tensor
    ratings: Tensor
    place_bias: Tensor


def score_batch(
    learner: Learner, corpus: Corpus, chosen: Sequence[int], labels: Labels, precision: Precision
) -> Scores:
    """Returns the scores of all the examples: those of the corpus's own from here, others' from the rest of the team.

    Gradients flow through the own alone.
    """
    own_B = torch.tensor([corpus.team.owns(index) for index in chosen], device=labels.real.device)
    said = torch.zeros(2, *labels.real.shape, device=labels.real.device)
    if own_B.any():
        own_batch = corpus.batch([index for index in chosen if corpus.team.owns(index)], learner.ranker.taste_model)
        own = torch.stack(learner(own_batch, precision))
        said[:, own_B, : own.shape[2]] = own
    logits, ratings = corpus.team.share_scores(said)
    bias = learner.place_bias(labels.shown)
    return Scores(logits, ratings, torch.where(own_B.unsqueeze(1), bias, bias.detach()))


def compute_losses(scores: Scores, labels: Labels, parents: Tensor, settings: TrainingSettings) -> dict[str, Tensor]:
    """Returns each loss of a batch, and under `total` what is minimised. `parents` are the parent's logits [B,N]."""
    as_seen = scores.logits + scores.place_bias
    losses = {
        "listwise": listwise_loss(
            as_seen, labels.gains, labels.shown, labels.real, unshown_weight=settings.unshown_weight
        ),
        "pointwise": pointwise_loss(
            as_seen + labels.arrived.log().unsqueeze(1), labels.clicked, labels.shown, labels.weights
        ),
        "rating": rating_loss(scores.ratings, labels.ratings),
        "parent": parent_loss(scores.logits, parents, labels.real, labels.replayed),
    }
    losses["total"] = (
        losses["listwise"]
        + settings.pointwise_weight * losses["pointwise"]
        + settings.rating_weight * losses["rating"]
        + settings.kl_weight * losses["parent"]
    )
    return losses


def rate_share(step: int, total: int, warm_up_share: float) -> float:
    """Returns which share of its peak the learning rate has at a step: a linear rise, then a linear fall to nothing.

    >>> [rate_share(step, 10, 0.2) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm_up = max(round(total * warm_up_share), 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return (total - step) / max(total - warm_up, 1)


def make_optimizer(learner: Learner, settings: TrainingSettings) -> torch.optim.AdamW:
    """Returns AdamW with one rate for the head, one for layers and one for places; norms and biases do not decay.

    Places learn faster than the head: what both could explain goes to whichever is first, and should not go to it.
    """
    peaks = {
        "ranker.ranking": settings.learning_rate,
        "ranker.head": settings.head_learning_rate,
        "position_bias": PLACE_RATE * settings.head_learning_rate,
    }
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in learner.named_parameters():
        if weight.requires_grad:
            peak = next(peak for prefix, peak in peaks.items() if name.startswith(prefix))
            groups.setdefault((peak, settings.weight_decay * (weight.dim() > 1)), []).append(weight)
    return torch.optim.AdamW(
        [{"params": group, "peak": peak, "weight_decay": decay} for (peak, decay), group in groups.items()],
        lr=settings.head_learning_rate,
        fused=True,
    )
