"""Campaigns: what is planned, what is run again and what is not, and what is made of the results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from boltzgen.cli import commands
from boltzgen.config import CampaignConfig, load_config, make_config
from boltzgen.core import Estimate
from boltzgen.errors import ConfigError, InputError, OutputError
from boltzgen.estimators.cycles import close_cycles, combine_repeats
from boltzgen.workflows.campaign import prepare, run_campaign, run_task
from boltzgen.workflows.campaign_gather import gather
from boltzgen.workflows.campaign_plan import Task, adopt, input_hashes, plan, sealed_results, write_tasks
from boltzgen.workflows.run_folder import RunFolder
from tests.assertions import assert_z
from tests.test_tfep import exact, files

__all__ = ["files"]


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two legs, there and back, small and without a learned map."""
    ends = {name: {"system": str(folder / f"{name}.xml")} for name in ("a", "b")}
    made: dict[str, Any] = {
        "task": "campaign",
        "defaults": {
            "topology": str(folder / "topology.pdb"), "platform": {"name": "Reference"},
            "data": {"source": "langevin", "steps_per_replica": 6000, "save_interval": 10, "timestep": "0.5 femtosecond",
                     "exchange_interval": 10, "friction": "20/picosecond"},
            "map": {"kind": "affine"}, "evaluation": {"n_bootstrap": 20, "n_shares": 4},
        },
        "legs": {"there": {"a": ends["a"], "b": ends["b"]}, "back": {"a": ends["b"], "b": ends["a"]}},
        "repeats": 2,
        "cycles": {"round": ["there", "back"]},
    }  # fmt: skip
    return made | changes


def campaign(folder: Path, **changes: Any) -> CampaignConfig:
    made = make_config(values(folder, **changes))
    assert isinstance(made, CampaignConfig)
    return made


def finish(task: Task, out: Path, value: float, stderr: float = 0.1, *, verdict: str = "reliable") -> None:
    """Results as a run would leave them."""
    folder = task.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    estimate = {"name": "F_B - F_A", "value": value, "stderr": stderr, "unit": "kT", "n_effective": 100.0}
    results = {
        "schema": 1, "task": "tfep", "estimates": [estimate], "verdict": verdict, "verdict_reasons": ["said so"],
        "provenance": {"sha256": {f"{end}: {digest}": digest for end in task.config.ENDS for digest in input_hashes(task.config, end)}},
        "diagnostics": {"energy_evaluations": {"data": 10, "training": 5, "evaluation": 1}}, "wall_seconds": {"total": 2.0},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    assert adopt(folder, task.config)


def test_every_run_has_its_own_seed_and_a_folder_named_by_its_inputs(files: Path, tmp_path: Path) -> None:
    tasks = plan(campaign(files, temperatures=["300 kelvin", "400 kelvin"]))
    assert len(tasks) == len({task.key for task in tasks}) == len({task.config.seed for task in tasks}) == 8
    assert {task.config.a.temperature for task in tasks} == {task.config.b.temperature for task in tasks} == {"300 kelvin", "400 kelvin"}
    assert plan(campaign(files, temperatures=["300 kelvin", "400 kelvin"])) == tasks
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in files.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    one, other = plan(campaign(files)), plan(campaign(copy))
    assert [task.key for task in one] == [task.key for task in other]  # contents, not places
    (copy / "b.xml").write_text((copy / "a.xml").read_text())
    assert {task.key for task in one}.isdisjoint(task.key for task in plan(campaign(copy)))
    faster = campaign(files, engine={"threads": 2, "workers": 7})
    assert [task.key for task in plan(faster)] == [task.key for task in one]
    assert all(task.n_evaluations > 20_000 for task in one)
    legs = values(files)["legs"]
    longer = campaign(files, legs={name: leg | {"a": leg["a"] | {"steps_per_replica": 1_000_000}} for name, leg in legs.items()})
    assert all(task.n_evaluations > 1_000_000 for task in plan(longer))


def test_tasks_run_by_themselves(files: Path, tmp_path: Path) -> None:
    """What a job array does: boltzgen run TASK.json --resume."""
    task = plan(campaign(files, repeats=1))[0]
    write_tasks((task,), tmp_path)
    done = CliRunner().invoke(commands, ["run", str(task.file(tmp_path)), "--resume"])
    assert done.exit_code == 0, done.output
    assert (task.folder(tmp_path) / "results.json").exists()
    assert run_task(str(task.file(tmp_path)), str(task.folder(tmp_path)), 1) == ""  # nothing to do but to seal it
    assert sealed_results(task.folder(tmp_path)) is not None


def test_a_campaign_from_start_to_table(files: Path, tmp_path: Path) -> None:
    config = campaign(files)
    results = run_campaign(config, tmp_path, progress=False)
    named = {estimate.name: estimate for estimate in results.estimates}
    for name, sign in (("there", 1), ("back", -1)):
        assert_z(float(named[name].value), sign * exact(), float(named[name].stderr))
    assert_z(float(named["closure of round"].value), 0.0, float(named["closure of round"].stderr))
    assert float(named["there, cycles closed"].value) == pytest.approx(-float(named["back, cycles closed"].value))
    assert float(named["there, cycles closed"].stderr) < float(named["there"].stderr)
    assert "there" in (tmp_path / "report.html").read_text()
    stamps = {task.key: (task.folder(tmp_path) / "results.json").stat().st_mtime_ns for task in plan(config)}
    again = run_campaign(config, tmp_path, progress=False)
    assert again.to_dict()["estimates"] == results.to_dict()["estimates"]
    assert {task.key: (task.folder(tmp_path) / "results.json").stat().st_mtime_ns for task in plan(config)} == stamps


def test_only_what_changed_is_run_again(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = plan(campaign(files))
    assert prepare(tasks, tmp_path) == list(tasks)
    for task in tasks:
        finish(task, tmp_path, 1.0)
    assert prepare(tasks, tmp_path) == []
    changed = values(files)
    changed["legs"]["back"]["training"] = {"steps": 7}
    edited = plan(make_config(changed))  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        missing = prepare(edited, tmp_path)
    assert {task.leg for task in missing} == {"back"}
    assert len(missing) == 2
    assert "2 runs are new, 2 are no longer part of it" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_broken_results_are_made_again_and_never_averaged_in(
    files: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = campaign(files, cycles={})
    tasks = plan(config)
    for task in tasks:
        finish(task, tmp_path, 1.0)
    path = tasks[0].folder(tmp_path) / "results.json"
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(text[:50] if damage == "cut" else text.replace("1.0", "9.0", 1))
    table = gather(config, tasks, tmp_path)
    there = next(estimate for estimate in table.estimates if estimate.name == "there")
    assert float(there.value) == 1.0
    assert "1 of 2 runs are missing" in " ".join(table.reasons)
    with caplog.at_level("INFO"):
        assert prepare(tasks, tmp_path) == [tasks[0]]
    assert ("are made again" in caplog.text) == (damage != "gone")


def test_results_that_were_not_sealed_yet_are_kept(files: Path, tmp_path: Path) -> None:
    """A client that died between the end of a run and its seal."""
    tasks = plan(campaign(files, repeats=1))
    finish(tasks[0], tmp_path, 1.0)
    (tasks[0].folder(tmp_path) / "sealed.json").unlink()
    assert prepare(tasks, tmp_path) == [tasks[1]]
    assert sealed_results(tasks[0].folder(tmp_path)) is not None


def test_results_of_other_inputs_are_not_adopted(files: Path, tmp_path: Path) -> None:
    """A file that was changed after the plan and before the run read it."""
    copy = tmp_path / "inputs"
    copy.mkdir()
    for path in files.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    task = plan(campaign(copy, repeats=1, cycles={}))[0]
    finish(task, tmp_path, 1.0)
    (task.folder(tmp_path) / "sealed.json").unlink()
    (copy / "a.xml").write_text((copy / "b.xml").read_text())
    assert not adopt(task.folder(tmp_path), task.config)
    assert not (task.folder(tmp_path) / "results.json").exists()


def test_a_leg_that_another_process_runs_is_waited_for(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = plan(campaign(files, repeats=1))[0]
    write_tasks((task,), tmp_path)
    folder = RunFolder.create(task.folder(tmp_path))

    def meanwhile(_: float) -> None:
        finish(task, tmp_path, 1.0)
        folder.close()

    monkeypatch.setattr("boltzgen.workflows.campaign.time.sleep", meanwhile)
    assert run_task(str(task.file(tmp_path)), str(task.folder(tmp_path)), 1) == ""


def test_a_leg_that_fails_is_named_and_the_others_are_gathered(files: Path, tmp_path: Path) -> None:
    config = campaign(files, repeats=1, cycles={})
    tasks = plan(config)
    finish(tasks[0], tmp_path, 1.0)
    broken = values(files, repeats=1, cycles={}, engine={"workers": 1})
    broken["legs"]["back"]["a"] = {"system": str(files / "four.xml")}
    with pytest.raises(InputError, match=r"1 of 2 legs failed; the others are finished .*\n  back, repeat 1: .*4 particles"):
        run_campaign(make_config(broken), tmp_path, progress=False)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "results.json").read_text())["estimates"][0]["value"] == 1.0


def test_doubts_of_runs_reach_the_table(files: Path, tmp_path: Path) -> None:
    config = campaign(files)
    there, again, back, back_again = plan(config)
    finish(there, tmp_path, 1.0, verdict="low overlap")
    finish(again, tmp_path, 3.0)
    assert all(adopt(task.folder(tmp_path), task.config) for task in (there, again))
    finish(back, tmp_path, 0.5)
    finish(back_again, tmp_path, 0.5)
    table = gather(config, plan(config), tmp_path)
    said = " ".join(table.reasons)
    assert table.verdict == "not converged"
    assert "there, repeat 1: low overlap: said so" in said
    assert "there: repeats scatter more than their errors say" in said
    assert table.diagnostics["energy_evaluations"] == {"data": 40, "training": 20, "evaluation": 4}


def test_campaigns_that_cannot_work_are_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no leg away; there are there, back"):
        campaign(files, cycles={"round": ["there", "-away"]})
    with pytest.raises(ConfigError, match="cannot be the name of a leg"):
        campaign(files, legs={"-there": values(files)["legs"]["there"]})
    with pytest.raises(ConfigError, match="one stands twice"):
        campaign(files, temperatures=["300 kelvin", "300 kelvin"])
    with pytest.raises(ConfigError, match=r"legs\.there\.mapp: unknown key; did you mean 'map'"):
        campaign(files, legs={"there": {**values(files)["legs"]["there"], "mapp": {}}})
    with pytest.raises(ConfigError, match="address belong together"):
        campaign(files, engine={"kind": "scheduler"})
    with pytest.raises(ConfigError, match="gpus are those of this machine"):
        campaign(files, engine={"kind": "slurm", "gpus": ["0"]})
    given = values(files)
    given["defaults"]["data"] = {"source": "trajectory"}
    for leg in given["legs"].values():
        for end in ("a", "b"):
            leg[end]["files"] = [str(files / "a.xml")]
    with pytest.raises(ConfigError, match="would evaluate the same trajectories"):
        make_config(given)
    with pytest.raises(ConfigError, match="rest on the same trajectory"):
        make_config(given | {"repeats": 1})
    twice = tmp_path / "twice.yaml"
    twice.write_text("task: campaign\nlegs:\n  one: {topology: t.pdb}\n  one: {topology: t.pdb}\n")
    with pytest.raises(ConfigError, match="the key 'one' stands twice"):
        load_config(twice)
    lost = values(files)
    lost["defaults"]["topology"] = str(tmp_path / "none.pdb")
    with pytest.raises(InputError, match=r"cannot read .*none\.pdb"):
        plan(make_config(lost))  # type: ignore[arg-type]


def test_the_commands(files: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "campaign.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values(files)))
    shown = CliRunner().invoke(commands, ["campaign", str(path), "--out", str(out), "--plan"])
    assert "4 runs, about" in shown.output
    assert not out.exists()
    written = CliRunner().invoke(commands, ["campaign", str(path), "--out", str(tmp_path / "array"), "--tasks"])
    assert "4 runs, for boltzgen run FILE --resume" in written.output
    assert len(list((tmp_path / "array" / "legs").glob("*.json"))) == 4
    refused = CliRunner().invoke(commands, ["run", str(path)])
    assert "use boltzgen campaign" in refused.output
    assert "holds no campaign" in CliRunner().invoke(commands, ["gather", str(path), "--out", str(out)]).output
    config = load_config(path)
    assert isinstance(config, CampaignConfig)
    tasks = plan(config)
    write_tasks(tasks, out)
    assert "use --resume" in CliRunner().invoke(commands, ["campaign", str(path), "--out", str(out)]).output
    for task in tasks:
        finish(task, out, 1.0 if task.leg == "there" else -1.0)
    gathered = CliRunner().invoke(commands, ["gather", str(path), "--out", str(out)])
    assert "closure of round = 0.0000" in gathered.output
    printed = CliRunner().invoke(commands, ["config", "campaign"])
    (tmp_path / "example.yaml").write_text(printed.output)
    assert isinstance(load_config(tmp_path / "example.yaml"), CampaignConfig)


# --- the numbers


def estimate(value: float, stderr: float) -> Estimate:
    return Estimate("one", value, stderr, "kT", 100.0)


@pytest.mark.parametrize(("stated", "one_sigma", "two_sigma"), [(1.0, 0.68, 0.95), (0.5, 0.64, 0.89)])
def test_repeats_are_combined_with_calibrated_errors(stated: float, one_sigma: float, two_sigma: float) -> None:
    """Four normal repeats: intervals hold the truth as often as they say where stated errors are right, nearly so where half as large."""
    generator, z = np.random.default_rng(3), []
    for _ in range(4000):
        found = combine_repeats([estimate(float(v), stated) for v in generator.standard_normal(4)], name="x").estimate
        z.append(abs(float(found.value)) / float(found.stderr))
    assert np.mean(np.array(z) < 1) > one_sigma
    assert np.mean(np.array(z) < 1.96) > two_sigma


def test_combined_repeats_say_where_they_come_from() -> None:
    alone = combine_repeats([estimate(2.0, 0.3)], name="x")
    assert float(alone.estimate.stderr) == alone.within == 0.3
    assert math.isnan(alone.between)
    with pytest.raises(InputError, match="finite"):
        combine_repeats([estimate(math.nan, 0.1)], name="x")


def test_closing_a_cycle_is_the_least_squares_solution() -> None:
    legs = {"ab": estimate(1.0, 0.1), "bc": estimate(2.0, 0.2), "ac": estimate(3.6, 0.1)}
    found = close_cycles(legs, {"abc": ["ab", "bc", "-ac"]})
    values = [float(e.value) for e in found.estimates]
    assert values[0] + values[1] - values[2] == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(values, [1.1, 2.4, 3.5])  # −0.6 is shared as 1 : 4 : 1
    assert float(found.closures[0].value) == pytest.approx(-0.6)
    assert float(found.closures[0].stderr) == pytest.approx(math.sqrt(0.06))
    generator, rows = np.random.default_rng(1), []
    for _ in range(4000):
        noisy = {
            name: estimate(true + s * generator.standard_normal(), s) for name, true, s in (("ab", 1, 0.1), ("bc", 2, 0.2), ("ac", 3, 0.1))
        }
        closed = close_cycles(noisy, {"abc": ["ab", "bc", "-ac"]}).estimates
        rows.append([(float(e.value) - true) / float(e.stderr) for e, true in zip(closed, (1, 2, 3), strict=True)])
    np.testing.assert_allclose(np.std(rows, axis=0), 1.0, atol=0.05)
    with pytest.raises(InputError, match="no leg 'ad'"):
        close_cycles(legs, {"abd": ["ab", "ad"]})


def test_folders_that_cannot_be_written_are_an_error(files: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises((OutputError, NotADirectoryError)):
        write_tasks(plan(campaign(files, repeats=1)), blocked / "campaign")
