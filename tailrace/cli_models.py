"""`tailrace models`: what is in the registry, which version serves, and how that changes."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click

from tailrace.cli_session import Session, as_json
from tailrace.errors import BrokerUnavailable, BundleError, Pinned
from tailrace.events import ModelAnnouncement
from tailrace.ids import ModelVersion
from tailrace.model_card import takes_our_input
from tailrace.registry import Registry, announce, new_version, open_registry
from tailrace.terminal import print_json, show_models

_OUTDATED = "was made for other features or text than this program makes"
_MANNER = {"rollback": " everyone again", "pin": ", pinned", "unpin": ", no longer pinned"}


@click.group()
def models() -> None:
    """The registry: versions, and the pointer that says which one serves."""


@models.command("list")
@as_json
@click.pass_obj
def list_models(session: Session, as_json: bool) -> None:
    """List the published versions, oldest first."""
    registry = open_registry(session.settings)
    found = [registry.manifest(version) for version in registry.versions()]
    found.sort(key=lambda manifest: (manifest.created_at, manifest.version))
    pointer = registry.pointer()
    if as_json:
        print_json({"pointer": pointer, "versions": found})
    else:
        show_models(found, pointer)


@models.command("show")
@click.argument("version", required=False)
@click.pass_obj
def show_model(session: Session, version: str | None) -> None:
    """Print the manifest of VERSION (default: the one that serves) as JSON."""
    registry = open_registry(session.settings)
    print_json(registry.manifest(_version_or_champion(registry, version)))


@models.command("promote")
@click.argument("version")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Only for this share of the users, beside the champion: as a canary.",
)
@click.pass_obj
def promote_model(session: Session, version: str, share: float | None) -> None:
    """Make VERSION serve: move the pointer and announce it. Replicas swap in place."""
    registry, chosen = open_registry(session.settings), ModelVersion(version)
    _require_ours(registry, chosen)
    _tell(session, registry.promote(chosen) if share is None else registry.start_canary(chosen, share))


@models.command("rollback")
@click.pass_obj
def rollback_model(session: Session) -> None:
    """End the canary; where none runs, make the champion before the present one serve again."""
    registry = open_registry(session.settings)
    pointer = registry.pointer()
    if pointer is not None and pointer.canary is None and pointer.history:
        _require_ours(registry, pointer.history[-1])
    _tell(session, registry.rollback(generation=None if pointer is None else pointer.generation))


@models.command("pin")
@click.argument("version", required=False)
@click.pass_obj
def pin_model(session: Session, version: str | None) -> None:
    """Make VERSION (default: the champion) serve, and refuse promotions and canaries until it is unpinned."""
    registry = open_registry(session.settings)
    chosen = _version_or_champion(registry, version)
    _require_ours(registry, chosen)
    _tell(session, registry.pin(chosen))


@models.command("unpin")
@click.pass_obj
def unpin_model(session: Session) -> None:
    """Let promotions and canaries through again."""
    _tell(session, open_registry(session.settings).unpin())


@models.command("export")
@click.argument("version")
@click.argument("directory", type=click.Path(path_type=Path))
@click.pass_obj
def export_model(session: Session, version: str, directory: Path) -> None:
    """Copy the files of VERSION, their sums checked, into DIRECTORY (new or empty)."""
    manifest = open_registry(session.settings).export(ModelVersion(version), directory)
    click.echo(f"{len(manifest.files)} files of {version} in {directory}")


@models.command("init")
@click.pass_obj
def init_models(session: Session) -> None:
    """Build version 0 from the base model, publish and promote it, unless a model serves already.

    A champion made for the features or the text of an older program cannot serve any more, and is replaced.
    """
    settings = session.settings
    registry = open_registry(settings)
    pointer = registry.pointer()
    if pointer is not None:
        if takes_our_input(registry.manifest(pointer.champion).model):
            click.echo(f"{pointer.champion} serves already")
            return
        outdated = f"{pointer.champion} {_OUTDATED}"
        if pointer.pinned:
            raise Pinned(f"{outdated}, but is pinned: `tailrace models unpin` lets a new version 0 take its place")
        click.echo(f"{outdated}: starting anew")
    from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
    from training.export import build_version_zero

    version = new_version(datetime.now(UTC))
    with tempfile.TemporaryDirectory(prefix="tailrace-export-") as temporary:
        built = build_version_zero(
            Path(temporary),
            version=version,
            feature_names=FEATURE_NAMES,
            prior=PRIOR_WEIGHTS,
            base_model=settings.registry.base_model,
            split_layer=settings.registry.split_layer,
            item_states=settings.registry.item_states,
            max_user_tokens=settings.registry.max_user_tokens,
            max_item_tokens=settings.registry.max_item_tokens,
        )
        registry.publish(Path(temporary), version=version)
    registry.promote(version, generation=None if pointer is None else pointer.generation)
    # Not announced, so that no Kafka is needed: who starts to serve reads the pointer, who serves looks at it often.
    click.echo(f"{version} published and promoted ({built.size_bytes / 1e6:.0f} MB, {built.took_s:.0f} s)")


def _version_or_champion(registry: Registry, version: str | None) -> ModelVersion:
    if version is not None:
        return ModelVersion(version)
    pointer = registry.pointer()
    if pointer is None:
        raise BundleError(f"no model serves from {registry.url}: `tailrace models init` makes the first")
    return pointer.champion


def _require_ours(registry: Registry, version: ModelVersion) -> None:
    """Raises BundleError where every replica would refuse the version, and serve on what it has."""
    if not takes_our_input(registry.manifest(version).model):
        raise BundleError(f"{version} {_OUTDATED}: no replica could serve it")


def _tell(session: Session, announcement: ModelAnnouncement) -> None:
    """Announces a pointer that has moved. Where no Kafka answers, says that it moved all the same."""
    try:
        announce(session.connected.kafka, announcement)
    except BrokerUnavailable as error:
        raise BrokerUnavailable(
            f"the pointer is at {announcement.version} but running replicas were not told: {error}; "
            f"then run `tailrace models promote {announcement.version}`"
        ) from error
    manner, previous = _MANNER.get(announcement.reason, ""), announcement.previous or "none"
    click.echo(f"{announcement.version} serves{manner} (before: {previous})")
    if announcement.canary is not None:
        click.echo(f"{announcement.canary} serves {announcement.canary_share:.0%} of the users beside it")
