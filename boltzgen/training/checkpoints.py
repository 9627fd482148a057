"""Checkpoints of a training loop: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from boltzgen.errors import CheckpointError, OutputError
from boltzgen.files import written

_REMEDY = "free some space or choose a folder you may write to"
_WEIGHTS, _STATE, _META = "weights.safetensors", "state.pt", "meta.json"

#: Hashes of the three files, in the format of ``sha256sum``.
_HASHES = "SHA256SUMS"


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
        state = io.BytesIO()
        torch.save(dict(snapshot.state), state)
        meta = {"fingerprint": self.fingerprint, "step": snapshot.step, "content": snapshot.meta}
        weights = to_bytes({name: tensor.contiguous() for name, tensor in snapshot.weights.items()})
        files = {_WEIGHTS: weights, _STATE: state.getvalue(), _META: json.dumps(meta).encode()}
        files[_HASHES] = "".join(f"{_sha256(content)}  {name}\n" for name, content in files.items()).encode()
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in files.items():
                (partial / name).write_bytes(content)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OutputError(f"cannot write the checkpoint {final}: {error.strerror or error}; {_REMEDY}") from error
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
            files = {name: (newest / name).read_bytes() for name in (_WEIGHTS, _STATE, _META, _HASHES)}
            listed = [line.split("  ") for line in files[_HASHES].decode().splitlines()]
            hashes = {name: digest for digest, name in listed}
            for name in (_WEIGHTS, _STATE, _META):
                if _sha256(files[name]) != hashes.get(name):
                    raise CheckpointError(
                        f"the checkpoint file {newest / name} is corrupt: it is not the one listed in {_HASHES}; {advice}"
                    )
            meta = json.loads(files[_META])
            if meta["fingerprint"] != self.fingerprint:
                raise CheckpointError(f"the checkpoint {newest} belongs to another system or configuration; {advice}")
            state = torch.load(io.BytesIO(files[_STATE]), weights_only=True)
            return Snapshot(step=int(meta["step"]), weights=from_bytes(files[_WEIGHTS]), state=state, meta=meta["content"])
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {newest} is corrupt ({error}); {advice}") from error


def save_weights(module: nn.Module, path: Path, *, fingerprint: str, description: Mapping[str, str] | None = None) -> None:
    """Write the weights and buffers of a module to one safetensors file, atomically.

    Args:
        module: What is written.
        path: Where.
        fingerprint: Hash of what it belongs to.
        description: More to keep beside the weights, by name; :func:`read_description` gives it back.

    Raises:
        OutputError: If it cannot be written.
    """
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}
    with written(path, remedy=_REMEDY) as partial:
        partial.write_bytes(to_bytes(tensors, metadata={**(description or {}), "fingerprint": fingerprint}))


def read_description(path: Path) -> dict[str, str]:
    """What was kept beside the weights in a file of :func:`save_weights`, its fingerprint included.

    Raises:
        CheckpointError: If the file is missing or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path} ({error}); restore the file, or train again") from error


def load_weights(module: nn.Module, path: Path, *, fingerprint: str | None) -> None:
    """Read weights and buffers written by :func:`save_weights`.

    Args:
        module: What they are read into.
        path: The file.
        fingerprint: What they must have been written with; None takes those of any run.

    Raises:
        CheckpointError: If the file is missing, corrupt, or made for another module or with another fingerprint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written_for = (file.metadata() or {}).get("fingerprint")
        if fingerprint is not None and written_for != fingerprint:
            raise CheckpointError(f"the weights {path} belong to another system or configuration; restore the file, or train again")
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path} ({error}); restore the file, or train again") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise CheckpointError(
            f"the weights {path} belong to another flow; give the configuration they were trained with ({reason})"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
