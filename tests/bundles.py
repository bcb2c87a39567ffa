"""Bundles that differ from one another as a test needs it."""

import shutil
from pathlib import Path

import onnx


def retouch_graph(bundle: Path, folder: Path, name: str) -> Path:
    """Returns `folder`, now a copy of a bundle in which one int8 graph has other bytes that mean the same."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("fp16", "weights.safetensors", "manifest.json"))
    path = folder / "int8" / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    model.producer_version += " retouched"
    path.write_bytes(model.SerializeToString())
    return folder
