"""A fine-tune under way: steps, epochs, the stop slice, and going on after a kill.

Shapes: E examples, B of them in a batch, N candidates.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tailrace.errors import TrainingDiverged
from tailrace.settings import TrainingSettings
from training.checkpoints import EpochRecord, Standing, load_checkpoint, save_checkpoint
from training.dataset import Batch, Corpus, Precision
from training.learner import Learner
from training.lessons import plan_batches
from training.losses import anchor_loss, listwise_loss, ndcg, parent_loss, pointwise_loss, rating_loss

BEST_KEPT = 3  # epochs whose weights are averaged
PATIENCE = 2  # epochs without a better stop loss before the end
CLIP_NORM = 1.0
PLACE_RATE = 10.0  # learning rate of the position bias, in those of the head
_WRITE_EVERY = 20  # steps between two points of a TensorBoard curve

Done = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class StopFigures:
    """The stop slice under one model: mean listwise loss, the parent's with the same position bias, mean NDCG@10."""

    loss: float
    parent_loss: float
    ndcg_10: float


class StopSlice:
    """The impressions that end training, with what the parent says of them."""

    def __init__(self, corpus: Corpus, parent: Learner, precision: Precision, unshown_weight: float) -> None:
        self._corpus, self._precision, self._unshown_weight = corpus, precision, unshown_weight
        self._parent_logits = score_corpus(parent, corpus, precision, range(len(corpus)))

    def measure(self, learner: Learner) -> StopFigures | None:
        """Returns how the learner does, or None where no slate has a gain and so none can tell.

        Clicks were logged under the parent's order, so a position bias left out would speak for the parent; both
        models are given the learner's.
        """
        slates, loss, parent_loss, gained = 0, 0.0, 0.0, 0.0
        learner.eval()
        for chosen, batch in self._corpus.batches():
            taught = int(((batch.gains * batch.shown).sum(1) > 0).sum())
            if not taught:
                continue
            with torch.no_grad():
                logits, _ = learner(batch, self._precision)
                parents = pad_logits([self._parent_logits[index] for index in chosen], batch.real)
                bias = learner.place_bias(batch.shown)
                losses = [
                    listwise_loss(one + bias, batch.gains, batch.shown, batch.real, unshown_weight=self._unshown_weight)
                    for one in (logits, parents)
                ]
            slates += taught
            loss += taught * float(losses[0])
            parent_loss += taught * float(losses[1])
            gained += float(ndcg(logits, batch.gains, batch.shown).nansum())
        return StopFigures(loss / slates, parent_loss / slates, gained / slates) if slates else None


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
    ) -> None:
        """Goes on from `folder` where it holds a checkpoint with this fingerprint."""
        self.learner = learner
        self._corpus, self._stop, self._replay_logits = corpus, stop, replay_logits
        self._settings, self._precision, self._folder = settings, precision, folder
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
        """Learns until it is over. Raises TrainingDiverged."""
        saved_at = time.perf_counter()
        with SummaryWriter(str(self._folder / "tensorboard"), purge_step=self.standing.step) as writer:
            while not self.over:
                started = time.perf_counter()
                self.learner.train()
                epoch = len(self.standing.history)
                for chosen in self._plan(epoch)[self.standing.step - epoch * self.steps_per_epoch :]:
                    self._step(chosen, writer)
                    done(self.standing.step, self.total_steps)
                    if time.perf_counter() - saved_at > checkpoint_every_s:
                        self._save()
                        saved_at = time.perf_counter()
                self._close_epoch(time.perf_counter() - started, writer)
                self._save()

    def best_epochs(self) -> list[int]:
        """Returns the epochs whose weights are kept, best first."""
        return [epoch for _, epoch in self.standing.best]

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_batches(self._corpus.sizes, self._settings.batch, seed=self._settings.seed, epoch=epoch)

    def _step(self, chosen: Sequence[int], writer: SummaryWriter) -> None:
        settings, standing = self._settings, self.standing
        batch = self._corpus.batch(chosen)
        parents = pad_logits([self._replay_logits.get(index) for index in chosen], batch.real)
        share = rate_share(standing.step, self.total_steps, settings.warm_up_share)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * share
        torch.manual_seed(settings.seed * 1_000_003 + standing.step)  # dropout of this step, whatever came before
        losses = compute_losses(self.learner, batch, parents, settings, self._precision)
        losses["anchor"] = anchor_loss(self._parameters, self._anchors) / len(self._corpus)
        losses["total"] = losses["total"] + settings.anchor_weight * losses["anchor"]
        self._optimizer.zero_grad()
        losses["total"].backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP_NORM)
        figures = {name: loss.item() for name, loss in losses.items()}
        if not torch.isfinite(norm) or not torch.isfinite(losses["total"]):
            raise TrainingDiverged(standing.step, figures["total"])
        self._optimizer.step()
        for name, figure in figures.items():
            standing.totals[name] = standing.totals.get(name, 0.0) + figure
            if standing.step % _WRITE_EVERY == 0:
                writer.add_scalar(f"train/{name}", figure, standing.step)
        standing.step += 1

    def _close_epoch(self, took_s: float, writer: SummaryWriter) -> None:
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
            writer.add_scalar("stop/loss", figures.loss, standing.step)
            writer.add_scalar("stop/parent_loss", figures.parent_loss, standing.step)
            writer.add_scalar("stop/ndcg_10", figures.ndcg_10, standing.step)
            standing.best = sorted([*standing.best, (figures.loss, epoch)])[:BEST_KEPT]
            self.snapshots[epoch] = self.learner.learned()
            for old in set(self.snapshots) - set(self.best_epochs()):
                del self.snapshots[old]

    def _save(self) -> None:
        save_checkpoint(self._folder, self.standing, self._parameters, self._optimizer, self.snapshots)


def compute_losses(
    learner: Learner, batch: Batch, parents: Tensor, settings: TrainingSettings, precision: Precision
) -> dict[str, Tensor]:
    """Returns each loss of a batch, and under `total` what is minimised. `parents` are the parent's logits [B,N]."""
    logits, ratings = learner(batch, precision)
    as_seen = logits + learner.place_bias(batch.shown)
    losses = {
        "listwise": listwise_loss(
            as_seen, batch.gains, batch.shown, batch.real, unshown_weight=settings.unshown_weight
        ),
        "pointwise": pointwise_loss(as_seen, batch.clicked, batch.shown, batch.weights),
        "rating": rating_loss(ratings, batch.ratings),
        "parent": parent_loss(logits, parents, batch.real, batch.replayed),
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


def score_corpus(learner: Learner, corpus: Corpus, precision: Precision, among: Sequence[int]) -> dict[int, Tensor]:
    """Returns the click logits [N] of examples by their number, on the CPU."""
    learner.eval()
    found: dict[int, Tensor] = {}
    for chosen, batch in corpus.batches(among):
        with torch.no_grad():
            logits = learner(batch, precision)[0].cpu()
        widths = batch.real.sum(1).tolist()
        found |= {index: row[:width].clone() for index, row, width in zip(chosen, logits, widths, strict=True)}
    return found


def pad_logits(logits: Sequence[Tensor | None], real_BN: Tensor) -> Tensor:
    """Returns logits as [B,N], zeros where there are none."""
    padded = torch.zeros(real_BN.shape)
    for row, one in enumerate(logits):
        if one is not None:
            padded[row, : len(one)] = one
    return padded.to(real_BN.device)
