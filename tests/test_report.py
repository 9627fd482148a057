"""The report: complete, self-contained, and safe against what users type."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from boltzgen.config import make_config
from boltzgen.core import Estimate
from boltzgen.errors import OutputError
from boltzgen.report.page import write_report
from boltzgen.report.pictures import energy_histograms, ramachandran
from boltzgen.workflows.report import build_report
from boltzgen.workflows.run_folder import Results, RunFolder, provenance

CONFIG = make_config({"topology": "/data/a.pdb", "system": "/data/a.xml", "evaluation": {"n_bootstrap": 20}})
PICTURES = ("ramachandran.png", "energies.png", "weights.png", "training.png", "profile_phi.png", "profile_psi.png", "profile_r.png")


def finished_run(path: Path, *, verdict: str = "reliable", n: int = 3000, m: int = 600) -> Path:
    """A run of synthetic data: two dihedrals and a distance, with weight-zero rows."""
    rng = np.random.default_rng(3)

    def rows(count: int) -> np.ndarray:
        angles = (rng.normal([-1.4, 2.0], 0.6, (count, 2)) + np.pi) % (2 * np.pi) - np.pi
        return np.column_stack([angles, rng.normal(0.4, 0.02, count)])

    u = rng.gamma(30, size=n) - 60
    u[:5] = np.inf
    log_q = -40 + 0.3 * rng.normal(size=n)
    log_w = np.where(np.isfinite(u), 2 + 0.5 * rng.normal(size=n), -np.inf)
    names = {"cv_names": np.array(["phi", "psi", "r"]), "cv_units": np.array(["rad", "rad", "nm"])}
    log = [{"stage": "likelihood", "step": k, "forward_kl": -k / 100, "held_out_loss": None} for k in range(0, 300, 10)]
    log += [{"stage": "energies", "step": k, "reverse_kl": 3 + math.exp(-k), "ess": 0.4} for k in range(0, 300, 10)]
    with RunFolder.create(path) as folder:
        folder.settle_config(CONFIG)
        folder.write_npz("weights.npz", {"log_w": log_w, "sign": np.ones(n), "log_q": log_q, "u": u, "cvs": rows(n)} | names)
        blocks = {"block": np.arange(m) // 50, "chain": np.arange(m) // 300}
        folder.write_npz("data.npz", {"cvs": rows(m), "u": rng.gamma(30, size=m) - 60} | blocks)
        folder.write_text("training.jsonl", "\n".join(json.dumps(row) for row in log))
        estimates = (
            Estimate("F(left) − F(rest)", 3.47618, 0.0213, "kT", 1500.0, note="left: φ in (0, 2) <rad>"),
            Estimate("never visited", math.nan, math.inf, "kT", 0.0),
        )
        diagnostics = {"ess_raw": 0.683, "ess_clipped": 0.74, "clip_fraction": 0.002, "pareto_k": 0.31, "n_samples": n,
                       "energy_evaluations": {"data": 4000000, "evaluation": 3000}}  # fmt: skip
        origin = provenance(7, "Reference", sha256={"a.pdb": "ab" * 32})
        folder.finish(Results("generator", estimates, diagnostics, {"data": 75.0, "evaluation": 3.0}, verdict, origin,
                              reasons=("enough samples",), notes=("The CMMotionRemover was left out.",)))  # fmt: skip
    return folder.path


def reported(folder: Path) -> Path:
    """The report of a finished run, made again."""
    return build_report(folder, CONFIG, json.loads((folder / "results.json").read_text()))


def test_a_report_is_complete_and_self_contained(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run <1>")
    page = reported(folder)
    assert not list(folder.glob(".*partial*"))
    text = page.read_text()
    assert page == folder / "report.html"
    for words in ("reliable", "enough samples", "3.476", "± 0.021", "not known", "68.3%", "0.20%", "0.310", "4,000,000", "1 min 15 s",
                  "CMMotionRemover", "ab" * 32, "torch", "Seed", "n_bootstrap: 20", "profile along φ"):  # fmt: skip
        assert words in text, words
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", text), "the page must not need another file"
    assert text.count("data:image/png;base64,") == len(PICTURES)
    assert "run &lt;1&gt;" in text
    assert "(0, 2) &lt;rad&gt;" in text
    for name in PICTURES:
        size = (folder / name).stat().st_size
        assert 5_000 < size < 300_000, f"{name}: {size} bytes"


def test_the_banner_carries_the_verdict(tmp_path: Path) -> None:
    text = reported(finished_run(tmp_path / "run", verdict="missing modes")).read_text()
    assert 'class="verdict bad"' in text
    assert "missing modes" in text


def test_a_run_without_its_data_is_refused(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    (folder / "weights.npz").unlink()
    with pytest.raises(OutputError, match=r"has no weights.npz"):
        reported(folder)


def test_a_generator_whose_data_missed_the_zero_is_drawn_without_them(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    with np.load(folder / "data.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["cvs"][:, 0] = 2.5
    np.savez(folder / "data.npz", **arrays)
    assert reported(folder).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["report.html", "energies.png"])
def test_a_full_disk_leaves_the_old_report(name: str, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    (folder / name).write_text("old")
    stem, suffix = name.split(".")
    os.symlink("/dev/full", folder / f".{stem}.{suffix}.{os.getpid()}.partial")
    with pytest.raises(OutputError, match=rf"cannot write .*{name}: No space left on device; free some space or"):
        reported(folder)
    assert (folder / name).read_text() == "old"
    assert not list(folder.glob(".*partial*"))


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run(tmp_path / "run")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write_text", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(OutputError, match=r"cannot write .*report.html: Read-only file system; .* make its folder writable"):
        write_report(folder, json.loads((folder / "results.json").read_text()))
    with pytest.raises(OutputError, match=r"cannot write /proc/boltzgen.png: "):
        energy_histograms(Path("/proc/boltzgen.png"), u_md=np.arange(9.0), u_flow=np.arange(9.0), w=np.full(9, 1 / 9))


def test_a_negative_weight_alone_in_its_bin_does_not_empty_the_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    angles = np.concatenate([rng.normal(-1.0, 0.2, (200, 2)), [[2.5, 2.5]]])
    w = np.append(np.full(200, 1.05 / 200), -0.05)
    path = ramachandran(tmp_path / "map.png", md=angles[:200], flow=angles, w=w, names=("phi", "psi"), temperature_kelvin=300.0)
    picture = plt.imread(path)[:, :, :3]
    reweighted = picture[:, int(0.64 * picture.shape[1]) : int(0.9 * picture.shape[1])]
    coloured = np.ptp(reweighted, axis=2) > 0.2
    assert coloured.mean() > 0.005
