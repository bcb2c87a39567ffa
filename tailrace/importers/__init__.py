"""Public data sets as events with their own timestamps. Pure readers: nothing here knows Kafka."""

from collections.abc import Mapping

from tailrace.importers.deskdrop import read_deskdrop
from tailrace.importers.generic import read_csv, read_jsonl
from tailrace.importers.mind import read_mind
from tailrace.importers.movielens import read_movielens, read_movietweetings
from tailrace.importers.source import Dataset, Importer, Reading, Row, SkipBad

__all__ = ["IMPORTERS", "Dataset", "Importer", "Reading", "Row", "SkipBad"]

IMPORTERS: Mapping[str, Importer] = {
    "csv": read_csv,
    "deskdrop": read_deskdrop,
    "jsonl": read_jsonl,
    "mind": read_mind,
    "movielens": read_movielens,
    "movietweetings": read_movietweetings,
}
