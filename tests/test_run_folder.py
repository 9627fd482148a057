"""The run folder: never another's, checked before the work, complete or not at all."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from boltzgen.config import load_config, make_config
from boltzgen.core import Estimate
from boltzgen.errors import CheckpointError, OutputError
from boltzgen.md.platforms import count_cores
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

CONFIG = make_config({"topology": "/data/a.pdb", "system": "/data/a.xml"})


def results() -> Results:
    estimates = (
        Estimate("delta_f", 1.25, 0.1, "kT", 900.0, note="left handed minus rest"),
        Estimate("never", float("nan"), float("inf"), "kT", 0.0),
        Estimate("profile", np.array([0.0, np.inf]), np.array([0.1, 0.2]), "kT", 900.0),
    )
    origin = provenance(3, "Reference", sha256={"a.pdb": "12ab"})
    return Results(
        "generator", estimates, {"ess_raw": 0.5, "n_samples": np.int64(10)}, {"data": 1.0}, "reliable", origin, reasons=("fine",)
    )


def test_a_finished_run_has_its_results_last(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs/demo") as folder:
        folder.settle_config(CONFIG)
        folder.write_npz("weights.npz", {"log_w": np.arange(3.0)})
        assert not folder.finished
        folder.finish(results())
    content = json.loads(folder.results_path.read_text())
    assert content["schema"] == 1
    assert content["estimates"][0] == {"name": "delta_f", "value": 1.25, "stderr": 0.1, "unit": "kT", "n_effective": 900.0,
                                       "note": "left handed minus rest"}  # fmt: skip
    assert content["estimates"][1]["value"] is None
    assert content["estimates"][2]["value"] == [0.0, None]
    assert {"torch", "openmm", "boltzgen", "python"} <= set(content["provenance"]["versions"])
    rows = list(csv.DictReader((folder.path / "results.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["delta_f", "never"]
    assert rows[0]["sha256"] == "a.pdb=12ab"
    assert rows[0]["seed"] == "3"
    assert load_config(folder.config_path) == CONFIG
    assert RunFolder.read(folder.path).finished
    assert not list(folder.path.glob(".*partial"))


def test_another_run_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.write_text("config.yaml", "x")
        (folder.checkpoints / "a").write_text("x")
    with pytest.raises(OutputError, match=r"holds another run \(unfinished\); use --resume"):
        RunFolder.create(tmp_path)
    with RunFolder.create(tmp_path, resume=True) as folder:
        assert folder.resumed
        assert (folder.checkpoints / "a").exists()
    with RunFolder.create(tmp_path, overwrite=True) as folder:
        assert not folder.resumed
        assert not folder.config_path.exists()
        assert not (folder.checkpoints / "a").exists()
    with pytest.raises(OutputError, match="contradict"):
        RunFolder.create(tmp_path, overwrite=True, resume=True)


def test_a_run_that_failed_before_it_made_anything_is_replaced(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.settle_config(CONFIG)
    with RunFolder.create(tmp_path) as folder:
        assert not folder.resumed
        assert not folder.config_path.exists()
        folder.write_text("trajectory.npz", "hours of work")
    with pytest.raises(OutputError, match=r"holds another run \(unfinished\)"):
        RunFolder.create(tmp_path)


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not a boltzgen run"):
            RunFolder.create(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.write_text("config.yaml", "x")
        code = f"from boltzgen.workflows.run_folder import RunFolder; RunFolder.create({str(tmp_path)!r}, resume=True)"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        assert f"another process (id {os.getpid()})" in second.stderr
    RunFolder.create(tmp_path, resume=True).close()


def test_a_read_only_place_fails_at_the_start() -> None:
    with pytest.raises(OutputError, match="cannot write to /proc/boltzgen-run"):
        RunFolder.create(Path("/proc/boltzgen-run"))


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="cannot write to"):
        RunFolder.create(tmp_path / "out")


def test_a_full_disk_fails_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="has 10 MB left and a run needs 500 MB"):
        RunFolder.create(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.write_text("results.csv", "old")
        os.symlink("/dev/full", tmp_path / f".results.csv.{os.getpid()}.partial")
        with pytest.raises(OutputError, match=r"cannot write .*results.csv: No space left on device"):
            folder.write_text("results.csv", "new")
        assert (tmp_path / "results.csv").read_text() == "old"


def test_a_run_resumes_only_with_its_own_configuration(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.settle_config(CONFIG)
    with RunFolder.create(tmp_path, resume=True) as folder:
        folder.settle_config(CONFIG)
        changed = make_config({**CONFIG.model_dump(mode="json"), "evaluation": {"n_samples": 300}})
        folder.settle_config(changed)  # what comes after training may change
        assert load_config(folder.config_path) == changed
        with pytest.raises(CheckpointError, match="other values of temperature, seed, data"):
            folder.settle_config(make_config({"topology": "/data/a.pdb", "system": "/data/a.xml", "seed": 5, "temperature": "310 kelvin"}))


def test_reading_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no config.yaml"):
        RunFolder.read(tmp_path)
    with RunFolder.create(tmp_path) as folder:
        folder.settle_config(CONFIG)
    with pytest.raises(OutputError, match="is not finished"):
        RunFolder.read(tmp_path)


def test_cores_are_counted_where_the_system_does_not_tell_those_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = provenance(3, "Reference", sha256={})["machine"]["cores"]
    assert allowed == count_cores() == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert provenance(3, "Reference", sha256={})["machine"]["cores"] == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores() == 1


def test_the_log_is_written_and_let_go(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        logging.getLogger("boltzgen.test").info("a word")
    logging.getLogger("boltzgen.test").info("too late")
    text = (folder.path / "run.log").read_text()
    assert "a word" in text
    assert "too late" not in text
