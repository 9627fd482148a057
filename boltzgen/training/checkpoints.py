"""Checkpoints of a training loop: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from boltzgen.errors import CheckpointError, OutputError

_WEIGHTS, _STATE, _META = "weights.safetensors", "state.pt", "meta.json"


@dataclass(frozen=True)
class Snapshot:
    """The state of a training loop.

    Attributes:
        step: Steps done.
        weights: Named tensors.
        state: Nested dict of tensors and plain values (optimiser, random generator).
        meta: Plain JSON values (history, best loss).
    """

    step: int
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    meta: Mapping[str, Any]


class CheckpointStore:
    """The newest checkpoint of one training stage, in one folder.

    Args:
        folder: Folder of this stage.
        fingerprint: Hash of whatever must not change between writing and reading (system, configuration, data).
    """

    def __init__(self, folder: Path, *, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint beside the last one, then remove the last one.

        Raises:
            OutputError: If it cannot be written.
        """
        final = self.folder / f"step-{snapshot.step:08d}"
        partial = self.folder / f".partial-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in snapshot.weights.items()}, partial / _WEIGHTS)
            torch.save(dict(snapshot.state), partial / _STATE)
            hashes = {name: _sha256(partial / name) for name in (_WEIGHTS, _STATE)}
            meta = {"fingerprint": self.fingerprint, "step": snapshot.step, "sha256": hashes, "content": snapshot.meta}
            (partial / _META).write_text(json.dumps(meta))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except OSError as error:
            raise OutputError(f"cannot write the checkpoint {final}: {error.strerror or error}; free some space") from error
        for old in self.folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def load(self) -> Snapshot | None:
        """The newest checkpoint, or None if there is none.

        Raises:
            CheckpointError: If it is corrupt or belongs to another system or configuration.
        """
        folders = sorted(self.folder.glob("step-*"))
        if not folders:
            return None
        newest = folders[-1]
        advice = f"delete {newest} to start this stage again"
        try:
            meta = json.loads((newest / _META).read_text())
            for name, expected in meta["sha256"].items():
                if _sha256(newest / name) != expected:
                    raise CheckpointError(f"the checkpoint file {newest / name} is corrupt (its hash differs); {advice}")
            if meta["fingerprint"] != self.fingerprint:
                raise CheckpointError(f"the checkpoint {newest} belongs to another system or configuration; {advice}")
            weights = load_file(newest / _WEIGHTS)
            state = torch.load(newest / _STATE, weights_only=True)
            return Snapshot(step=int(meta["step"]), weights=weights, state=state, meta=meta["content"])
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {newest} is corrupt ({error}); {advice}") from error


def save_weights(module: nn.Module, path: Path, *, fingerprint: str) -> None:
    """Write the weights and buffers of a module to one safetensors file, atomically.

    Raises:
        OutputError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}
        save_file(tensors, partial, metadata={"fingerprint": fingerprint})
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; free some space") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Read weights and buffers written by :func:`save_weights`.

    Raises:
        CheckpointError: If the file is missing, corrupt, or made for another module.
    """
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another flow: {str(error).splitlines()[0]}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
