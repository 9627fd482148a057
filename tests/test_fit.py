"""The training loop and its checkpoints: exact resumption, early stopping, and every way a checkpoint can be broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from boltzgen.core import Context, Flow, Objective, Transform
from boltzgen.distributions import TorusNormal
from boltzgen.errors import CheckpointError, EnergyError, Interrupted, OutputError
from boltzgen.training.checkpoints import CheckpointStore, Snapshot, load_weights, save_weights
from boltzgen.training.fit import MAX_BAD_STEPS, FitResult, FitSettings, fit
from boltzgen.training.objectives import ForwardKL
from tests.registry import noise, seeded


class Affine(Transform):
    """x = shift + exp(log_scale) z."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.shift + self.log_scale.exp() * z, self.log_scale.sum().expand(len(z))

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.shift) / self.log_scale.exp(), -self.log_scale.sum().expand(len(x))


def affine_flow(size: int = 2) -> Flow:
    return Flow(TorusNormal(0, size), Affine(size))


DATA = 1.5 + 0.3 * noise(500, 2)


def settings(steps: int = 60, *, patience: int | None = None) -> FitSettings:
    return FitSettings(
        steps=steps, learning_rate=0.05, gradient_clip=10.0, ema_decay=0.9, checkpoint_every=7, evaluate_every=10, warmup=5,
        patience=patience,
    )  # fmt: skip


def train(flow: Flow, *, store: CheckpointStore | None = None, stop_after: int | None = None, **changed: object) -> FitResult:
    asked = iter(range(10**6))
    arguments: dict = {
        "settings": settings(),
        "generator": seeded(),
        "held_out": held_out_loss,
        "should_stop": lambda: stop_after is not None and next(asked) == stop_after - 1,
        "progress": False,
    } | changed
    return fit(flow, arguments.pop("objective", ForwardKL(DATA, batch_size=32)), store=store, **arguments)


def held_out_loss(flow: Flow) -> Mapping[str, float]:
    with torch.no_grad():
        return {"held_out_loss": -float(flow.log_prob(DATA[:100]).mean())}


def scripted(losses: list[float]) -> Callable[[Flow], Mapping[str, float]]:
    remaining = iter(losses)
    return lambda flow: {"held_out_loss": next(remaining)}


def without_seconds(result: FitResult) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def assert_same_weights(flow: Flow, other: Flow) -> None:
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("patience", [None, 3])
@pytest.mark.parametrize("stops", [(1,), (23,), (20, 13), (60,)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stops: tuple[int, ...], patience: int | None) -> None:
    whole, whole_generator = affine_flow(), seeded()
    expected = train(whole, settings=settings(patience=patience), generator=whole_generator)
    store = CheckpointStore(tmp_path / "stage", fingerprint="f")
    for stop in stops:
        with pytest.raises(Interrupted, match="resume"):
            train(affine_flow(), store=store, stop_after=stop, settings=settings(patience=patience))
    resumed, generator = affine_flow(), seeded(99)
    result = train(resumed, store=store, settings=settings(patience=patience), generator=generator)
    assert_same_weights(whole, resumed)
    assert without_seconds(result) == without_seconds(expected)
    assert (result.steps, result.stopped_early, result.skipped) == (expected.steps, expected.stopped_early, expected.skipped)
    assert torch.equal(generator.get_state(), whole_generator.get_state())


def test_a_resumed_run_without_its_generator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed, store = affine_flow(), affine_flow(), CheckpointStore(tmp_path, fingerprint="f")
    train(whole)
    with pytest.raises(Interrupted):
        train(affine_flow(), store=store, stop_after=23)
    snapshot = store.load()
    assert snapshot is not None
    store.save(Snapshot(snapshot.step, snapshot.weights, {**snapshot.state, "generator": seeded().get_state()}, snapshot.meta))
    train(resumed, store=store)
    with pytest.raises(AssertionError):
        assert_same_weights(whole, resumed)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, fingerprint="f")
    first, second = affine_flow(), affine_flow()
    result = train(first, store=store)

    class Forbidden(Objective):
        def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
            raise RuntimeError("no step is left to do")

    again = train(second, store=store, objective=Forbidden())
    assert_same_weights(first, second)
    assert without_seconds(again) == without_seconds(result)


def test_training_learns_the_data_and_keeps_the_average() -> None:
    flow = affine_flow()
    result = train(flow, settings=settings(200))
    assert result.steps == 200
    torch.testing.assert_close(flow.transform.shift, DATA.mean(0), atol=0.05, rtol=0)  # type: ignore[arg-type]
    losses = [row["held_out_loss"] for row in result.history]
    assert losses[-1] < losses[0] - 0.5
    assert losses[-1] == pytest.approx(held_out_loss(flow)["held_out_loss"], abs=1e-12), "the averaged weights are those evaluated and kept"


def test_early_stopping_keeps_the_best_weights() -> None:
    weights: list[dict[str, Tensor]] = []
    losses = scripted([3.0, 2.0, 2.5, 2.0, math.nan, 1.0])

    def held_out(flow: Flow) -> Mapping[str, float]:
        weights.append({name: tensor.clone() for name, tensor in flow.state_dict().items()})
        return losses(flow)

    flow = affine_flow()
    result = train(flow, held_out=held_out, settings=settings(patience=3))
    assert result.stopped_early
    assert result.steps == 50
    assert len(result.history) == 5
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, weights[1][name])
        assert not torch.equal(tensor, weights[-1][name])


class Diverging(Objective):
    """NaN in chosen calls, else a quadratic; counts its calls."""

    def __init__(self, bad: Callable[[int], bool]) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, flow: Flow, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        self.calls += 1
        value = math.nan if self.bad(self.calls) else 1.0
        loss = value * sum((p - 1.0).square().sum() for p in flow.parameters())
        return loss, {"loss": float(loss.detach())}


def test_diverging_training_is_given_up_with_advice() -> None:
    objective = Diverging(lambda call: call > 4)
    with pytest.raises(EnergyError, match="lower the learning rate"):
        train(affine_flow(), objective=objective, settings=settings(1000))
    assert objective.calls == 4 + MAX_BAD_STEPS


def test_single_bad_steps_are_skipped_and_counted() -> None:
    flow = affine_flow()
    result = train(flow, objective=Diverging(lambda call: call % 3 == 0))
    assert result.skipped == 20
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert all(math.isfinite(row["loss"]) for row in result.history), "skipped steps are left out of the recorded averages"


FILES = ("weights.safetensors", "state.pt", "meta.json")


@pytest.fixture
def written(tmp_path: Path) -> tuple[CheckpointStore, Path]:
    """A store with one checkpoint, and the folder of the checkpoint."""
    store = CheckpointStore(tmp_path / "stage", fingerprint="this system")
    train(affine_flow(), store=store, settings=settings(5))
    (folder,) = (tmp_path / "stage").glob("step-*")
    return store, folder


def check_refused(store: CheckpointStore, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(affine_flow(), store=store)
    for word in (*words, "delete", "start this stage again"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_found(written: tuple[CheckpointStore, Path], name: str, where: float) -> None:
    store, folder = written
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content))] ^= 1
    (folder / name).write_bytes(content)
    check_refused(store, name, "corrupt")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(written: tuple[CheckpointStore, Path], name: str) -> None:
    store, folder = written
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    check_refused(store, name, "corrupt")


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_missing_file_is_found(written: tuple[CheckpointStore, Path], name: str) -> None:
    store, folder = written
    (folder / name).unlink()
    check_refused(store, name, "corrupt")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe"])
def test_a_broken_list_of_hashes_is_found(written: tuple[CheckpointStore, Path], content: bytes) -> None:
    store, folder = written
    (folder / "SHA256SUMS").write_bytes(content)
    check_refused(store, "corrupt")


def test_a_checkpoint_of_another_system_is_refused(written: tuple[CheckpointStore, Path]) -> None:
    check_refused(CheckpointStore(written[0].folder, fingerprint="another system"), "another system or configuration")


def test_a_checkpoint_of_another_flow_is_refused(written: tuple[CheckpointStore, Path]) -> None:
    with pytest.raises(CheckpointError, match="belongs to another flow"):
        train(affine_flow(3), store=written[0])


def test_a_partial_checkpoint_is_ignored(written: tuple[CheckpointStore, Path]) -> None:
    store, folder = written
    partial = folder.parent / ".partial-12345"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    snapshot = store.load()
    assert snapshot is not None
    assert snapshot.step == 5
    assert CheckpointStore(folder / "nothing here", fingerprint="f").load() is None


def test_only_the_newest_checkpoint_is_kept_and_a_failed_write_keeps_the_last(
    written: tuple[CheckpointStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = written
    snapshot = store.load()
    assert snapshot is not None
    store.save(Snapshot(9, snapshot.weights, snapshot.state, snapshot.meta))
    assert [path.name for path in store.folder.iterdir()] == ["step-00000009"]

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        store.save(Snapshot(12, snapshot.weights, snapshot.state, snapshot.meta))
    assert [path.name for path in store.folder.iterdir()] == ["step-00000009"]


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "stage").write_text("a file in place of the folder")
    with pytest.raises(OutputError, match="cannot write the checkpoint"):
        train(affine_flow(), store=CheckpointStore(tmp_path / "stage", fingerprint="f"))
    with pytest.raises(OutputError, match=r"cannot write .*flow.safetensors"):
        save_weights(affine_flow(), tmp_path / "stage" / "flow.safetensors", fingerprint="f")


def test_weights_round_trip_and_foreign_or_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    flow, fresh = affine_flow(), affine_flow()
    train(flow)
    save_weights(flow, path, fingerprint="f")
    assert [file.name for file in tmp_path.iterdir()] == ["flow.safetensors"]
    load_weights(fresh, path, fingerprint="f")
    assert_same_weights(flow, fresh)
    with pytest.raises(CheckpointError, match="belong to another system or configuration"):
        load_weights(fresh, path, fingerprint="g")
    with pytest.raises(CheckpointError, match=r"belong to another flow.*size mismatch for transform.shift"):
        load_weights(affine_flow(3), path, fingerprint="f")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_weights(fresh, path, fingerprint="f")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_weights(fresh, tmp_path / "nowhere.safetensors", fingerprint="f")
