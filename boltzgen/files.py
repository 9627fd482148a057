"""Files that are there complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from boltzgen.errors import OutputError


@contextmanager
def written(path: Path, *, remedy: str) -> Iterator[Path]:
    """The name of a file to write, which becomes ``path`` when the block ends without an error.

    Args:
        path: The file, replaced whole.
        remedy: What the message tells the reader to do.

    Raises:
        OutputError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        with suppress(OSError):  # on a read-only disk even removing a file that is not there fails
            partial.unlink()
