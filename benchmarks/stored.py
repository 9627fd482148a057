"""Command line and storage that the benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boltzgen.workflows.run_folder import provenance


def out_path(doc: str | None) -> Path:
    """Where the result goes: ``--out``, or ``results/NAME.json`` beside the script NAME."""
    script = Path(sys.argv[0]).resolve()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=script.parent / "results" / f"{script.stem}.json")
    return Path(parser.parse_args().out)


def store(out: Path, content: Mapping[str, Any]) -> None:
    """Write a result as JSON, with the command, the machine and the versions that made it."""
    made_by = provenance(0, "", sha256={})
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine = made_by["machine"] | {"load_1min": os.getloadavg()[0]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": command, "machine": machine, "versions": made_by["versions"], **content}, indent=2) + "\n")
    print(f"stored in {out}")
