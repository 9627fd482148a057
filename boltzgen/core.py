"""The vocabulary of boltzgen: targets, transforms, distributions, flows, samples, estimates and the protocols between them.

Conventions: one batch axis, first; a scalar per sample is ``[b]``; lengths in nm; energies ``u`` are reduced (kT);
``forward`` maps latent ``z`` to physical ``x`` and ``log_det`` is ln|dx/dz|; log weights and densities are float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from boltzgen.errors import InexactDensityError, ShapeError, TrainingDataError

Role = Literal["train", "evaluate"]
Model = TypeVar("Model", bound=nn.Module, contravariant=True)

#: Largest error of a log density, in nats, that still counts as exact.
LOG_DET_TOLERANCE = 0.01


@dataclass(frozen=True)
class Context:
    """What a conditional map or field is conditioned on.

    Attributes:
        temperature_kelvin: Temperature in kelvin, where a flow is conditioned on it.
        features: Per-sample conditioning features ``[b, f]``.
    """

    temperature_kelvin: float | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class Molecule:
    """The bond graph of one molecule as plain data, free of any file format.

    Attributes:
        elements: Chemical symbol of every atom, ``n`` of them.
        bonds: Bonded pairs ``[m, 2]``, int64.
        masses: Masses in dalton ``[n]``, float64.
        names: Human-readable atom labels such as ``ALA2-CA``.
        constraints: Constrained pairs ``[c, 2]`` (a subset of ``bonds``), int64.
        constraint_lengths: Their lengths in nm ``[c]``, float64.
    """

    elements: tuple[str, ...]
    bonds: np.ndarray
    masses: np.ndarray
    names: tuple[str, ...]
    constraints: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    constraint_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def n_atoms(self) -> int:
        return len(self.elements)

    def neighbours(self, atom: int) -> list[int]:
        """Atoms bonded to ``atom``, in ascending order."""
        rows = self.bonds[(self.bonds == atom).any(axis=1)]
        return sorted(int(b if a == atom else a) for a, b in rows)


class Target(ABC):
    """An unnormalised density exp(-u(x)), with u in kT.

    Attributes:
        event_shape: Shape of one configuration, for particles ``(n, dimensions)``.
        labels: One label per particle (equal labels are equal particles), or an empty tuple.
        box: Box vectors ``[3, 3]`` in nm, or None.
        log_z: ln of the normalisation where it is known analytically, else None.
        is_exact: False for clipped, regularised or otherwise altered energies.
    """

    event_shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    box: Tensor | None = None
    log_z: float | None = None
    is_exact: bool = True

    @abstractmethod
    def reduced_potential(self, x: Tensor) -> Tensor:
        """Reduced potential, differentiable.

        Args:
            x: Configurations ``[b, *event]`` in nm.

        Returns:
            u(x) in kT, ``[b]``, float64. +inf is legal (weight zero).

        Raises:
            EnergyError: If an energy is not a number; the message names the row.
        """

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reduced potential ``[b]`` in kT and its gradient ``[b, *event]`` in kT/nm, in one pass, detached."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            u = self.reduced_potential(leaf)
            (gradient,) = torch.autograd.grad(u.sum(), leaf)
        return u.detach(), gradient

    def reduced_potentials(self, x: Tensor, states: Sequence[float]) -> Tensor:
        """Reduced potentials of every sample in every state, ``[K, b]``, for MBAR (see :meth:`at`)."""
        return torch.stack([self.at(state).reduced_potential(x) for state in states])

    def at(self, temperature_kelvin: float) -> Target:
        """The same system at another temperature.

        Raises:
            NotImplementedError: If this target has no temperature.
        """
        raise NotImplementedError(f"{type(self).__name__} has no temperature to change")


class Transform(nn.Module, ABC):
    """A bijection from latent to physical coordinates.

    Attributes:
        log_det_error: 0 for a closed form; measured error in nats for an ODE; None where it is only estimated.
    """

    log_det_error: float | None = 0.0

    @abstractmethod
    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to physical: ``(x, ln|dx/dz|)``, the second ``[b]`` in float64."""

    def signed(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`forward` gives, and the sign of det dx/dz ``[b]``: −1 where a map that is not one to one turns space inside out."""
        x, log_det = self(z, context)
        return x, log_det, torch.ones_like(log_det)

    @abstractmethod
    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Physical to latent: ``(z, ln|dz/dx|)``, the second ``[b]`` in float64."""

    def push(self, z: Tensor) -> Tensor:
        """x of :meth:`forward` alone, cheaper where the log determinant costs extra."""
        return self(z)[0]

    def pull(self, x: Tensor) -> Tensor:
        """z of :meth:`inverse` alone, cheaper where the log determinant costs extra."""
        return self.inverse(x)[0]


class Distribution(nn.Module, ABC):
    """A normalised density that can be sampled."""

    event_shape: tuple[int, ...]

    @property
    def log_det_error(self) -> float | None:
        """Error of :meth:`log_prob` in nats: 0 where closed, None where only estimated."""
        return 0.0

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Draw samples: ``(x [n, *event], log_prob [n])``."""

    def sample_signed(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`sample` gives, and the sign of every sample's weight ``[n]`` (:meth:`Transform.signed`)."""
        x, log_q = self.sample(n, generator=generator, context=context)
        return x, log_q, torch.ones_like(log_q)

    @abstractmethod
    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """ln of the density at ``x``, ``[b]``, float64."""


class Chain(Transform):
    """Transforms applied in the order given: ``Chain(f, g).forward(z) = g(f(z))``."""

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        """Sum of the errors of the parts; None if one of them is only estimated."""
        return summed_log_det_error(*(transform.log_det_error for transform in self.transforms))  # type: ignore[arg-type]

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for transform in self.transforms:
            z, log_det = transform(z, context)
            total = total + log_det
        return z, total

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for transform in reversed(list(self.transforms)):
            x, log_det = transform.inverse(x, context)  # type: ignore[operator]
            total = total + log_det
        return x, total


class Inverse(Transform):
    """A transform read backwards."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def log_det_error(self) -> float | None:  # type: ignore[override]
        """That of the transform."""
        return self.transform.log_det_error

    def forward(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(z, context)

    def inverse(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward(x, context)


class Flow(Distribution):
    """A base distribution pushed through a transform: ln q(x) = ln p(z) − ln|dx/dz|.

    Args:
        base: Distribution of the latent z.
        transform: Latent to physical.
        event_shape: Shape of one physical configuration; that of the base by default.
    """

    def __init__(self, base: Distribution, transform: Transform, *, event_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.base = base
        self.transform = transform
        self.event_shape = event_shape or base.event_shape

    @property
    def log_det_error(self) -> float | None:
        """Error of the density in nats: the base's and the transform's together."""
        return summed_log_det_error(self.base.log_det_error, self.transform.log_det_error)

    def sample(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor]:
        z, log_prob = self.base.sample(n, generator=generator, context=context)
        x, log_det = self.transform(z, context)
        return x, log_prob - log_det

    def sample_signed(self, n: int, *, generator: torch.Generator, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor]:
        z, log_prob = self.base.sample(n, generator=generator, context=context)
        x, log_det, sign = self.transform.signed(z, context)
        return x, log_prob - log_det, sign

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        if tuple(x.shape[1:]) != tuple(self.event_shape):
            raise ShapeError(f"expected configurations [b, {', '.join(map(str, self.event_shape))}], got {list(x.shape)}")
        z, log_det = self.transform.inverse(x, context)
        return self.base.log_prob(z, context) + log_det


class Bridge(nn.Module):
    """A map between two targets, for targeted free energy perturbation (Jarzynski, PRE 65, 046122 (2002), eq. 8).

    Args:
        target_a: State in which the samples are distributed.
        target_b: State onto which they are mapped.
        transform: Map from A to B.
    """

    def __init__(self, target_a: Target, target_b: Target, transform: Transform) -> None:
        super().__init__()
        self.target_a, self.target_b, self.transform = target_a, target_b, transform

    def works(self, x: Tensor) -> Tensor:
        """Generalised work u_B(Tx) − u_A(x) − ln|det J_T(x)| of samples ``x`` of A, in kT, ``[b]``."""
        y, log_det = self.transform(x)
        return self.target_b.reduced_potential(y) - self.target_a.reduced_potential(x) - log_det

    def reverse_works(self, y: Tensor) -> Tensor:
        """Generalised work u_A(T⁻¹y) − u_B(y) − ln|det J_{T⁻¹}(y)| of samples ``y`` of B, in kT, ``[b]``."""
        x, log_det = self.transform.inverse(y)
        return self.target_a.reduced_potential(x) - self.target_b.reduced_potential(y) - log_det


def summed_log_det_error(*errors: float | None) -> float | None:
    """Error in nats of a sum of log densities and log determinants; None if one of them is only estimated."""
    known = [error for error in errors if error is not None]
    return float(sum(known)) if len(known) == len(errors) else None


def require_exact_rows(role: Role, *, is_exact: bool, log_det_error: float | None) -> None:
    """Refuse rows that no statistically exact number may rest on.

    Raises:
        TrainingDataError: If the rows trained the model.
        InexactDensityError: If the density or the energy is not exact.
    """
    if role != "evaluate":
        raise TrainingDataError("these rows trained the model: an estimate on them would be biased; use rows held out for evaluation")
    if not is_exact:
        raise InexactDensityError("the energies are clipped or regularised; evaluate the samples with the exact target")
    require_exact_density(log_det_error)


def require_exact_density(log_det_error: float | None) -> None:
    """Refuse a log density whose error, in nats, is above the tolerance, or only estimated (None).

    Raises:
        InexactDensityError: Saying how well the density is known.
    """
    if log_det_error is None or not log_det_error <= LOG_DET_TOLERANCE:  # NaN, too
        error = "only estimated" if log_det_error is None else f"known to {log_det_error:.3g} nats only"
        raise InexactDensityError(f"the log density is {error}; weights need {LOG_DET_TOLERANCE} nats or better")


@dataclass(frozen=True)
class WeightedSamples:
    """Configurations with the log weights that turn them into samples of a target.

    Attributes:
        x: Configurations ``[n, *event]`` in nm.
        u: Reduced potentials of the target ``[n]`` in kT, float64.
        log_w: Log weights ``[n]``, float64; −inf is weight zero.
        log_q: Log density they were drawn from ``[n]``, or None (MD data).
        block: Time block or batch of every row ``[n]``, int64.
        chain: Chain or replica of every row ``[n]``, int64.
        role: ``train`` or ``evaluate``: estimators refuse rows that trained the model.
        log_det_error: Error of ``log_q`` in nats; None where it is only estimated.
        is_exact: False when ``u`` comes from an altered target.
        sign: Signs of the weights ``[n]``, of which ``log_w`` has the sizes; None where all are positive, as they are for every one-to-one
            map (:meth:`Transform.signed`).
    """

    x: Tensor
    u: Tensor
    log_w: Tensor
    log_q: Tensor | None
    block: Tensor
    chain: Tensor
    role: Role
    log_det_error: float | None = 0.0
    is_exact: bool = True
    sign: Tensor | None = None

    def __len__(self) -> int:
        return len(self.u)

    def __getitem__(self, rows: slice | Tensor) -> WeightedSamples:
        log_q, sign = (None if known is None else known[rows] for known in (self.log_q, self.sign))
        return replace(self, x=self.x[rows], u=self.u[rows], log_w=self.log_w[rows], log_q=log_q, block=self.block[rows],
                       chain=self.chain[rows], sign=sign)  # fmt: skip

    @property
    def positive_log_w(self) -> Tensor:
        """Log weights ``[n]``, −inf where the weight is negative: for what takes weights as probabilities, which is not exact then."""
        return self.log_w if self.sign is None else self.log_w.masked_fill(self.sign < 0, -torch.inf)

    @classmethod
    def unweighted(cls, x: Tensor, u: Tensor, *, role: Role, block: Tensor | None = None, chain: Tensor | None = None) -> WeightedSamples:
        """Samples that already follow the target (MD or MCMC): equal weights, no ``log_q``."""
        zeros = torch.zeros(len(x), dtype=torch.int64)
        return cls(x=x, u=u, log_w=torch.zeros(len(x), dtype=torch.float64), log_q=None, block=zeros if block is None else block,
                   chain=zeros if chain is None else chain, role=role)  # fmt: skip

    def weight_arrays(self) -> dict[str, np.ndarray]:
        """``log_w``, ``sign`` of the weight, ``log_q`` (empty without one) and ``u``, each ``[n]``, as they are stored."""
        log_q = np.zeros(0) if self.log_q is None else self.log_q.numpy()
        sign = np.ones(len(self)) if self.sign is None else self.sign.numpy()
        return {"log_w": self.log_w.numpy(), "sign": sign, "log_q": log_q, "u": self.u.numpy()}

    def require_exact(self) -> WeightedSamples:
        """These samples, if a statistically exact number may rest on them.

        Raises:
            TrainingDataError: If the rows trained the model.
            InexactDensityError: If the density or the energy is not exact.
        """
        require_exact_rows(self.role, is_exact=self.is_exact, log_det_error=self.log_det_error)
        return self


@dataclass(frozen=True)
class Estimate:
    """A number, or an array of them, with its error.

    Attributes:
        name: What it is.
        value: Scalar or ``[k]``.
        stderr: Standard error, as ``value``.
        unit: Unit, such as ``kT``.
        n_effective: Effective number of independent samples behind it.
        covariance: ``[k, k]`` where known.
        note: What a reader must know, e.g. which normalisation a ln Z has.
    """

    name: str
    value: float | np.ndarray
    stderr: float | np.ndarray
    unit: str
    n_effective: float
    covariance: np.ndarray | None = None
    note: str = ""

    def __str__(self) -> str:
        if isinstance(self.value, np.ndarray):
            return f"{self.name}: {self.value.shape} values [{self.unit}]"
        remark = f" ({self.note})" if self.note else ""
        if np.isnan(self.value):
            return f"{self.name}: not known{remark}"
        return f"{self.name} = {self.value:.4f} ± {self.stderr:.4f} {self.unit}".rstrip() + remark


class Objective(ABC, Generic[Model]):
    """A loss of a flow, or of a map between states; its data and targets are given to ``__init__``."""

    @abstractmethod
    def __call__(self, model: Model, /, *, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        """The loss (scalar, differentiable in the model's parameters) and named numbers to record."""


@dataclass(frozen=True)
class WalkerState:
    """The state of a set of Monte Carlo walkers.

    Attributes:
        x: Configurations ``[w, *event]`` in nm.
        u: Reduced potentials ``[w]`` in kT.
        log_q: Proposal log density at ``x`` ``[w]``, where a move keeps it.
    """

    x: Tensor
    u: Tensor
    log_q: Tensor | None = None


@dataclass(frozen=True)
class MoveInfo:
    """What one move did: which walkers accepted ``[w]`` and the log acceptance ratio ``[w]``."""

    accepted: Tensor
    log_ratio: Tensor


class Move(ABC):
    """A Markov kernel that leaves a target invariant."""

    @abstractmethod
    def init(self, x: Tensor) -> WalkerState:
        """Walkers at ``x`` ``[w, *event]``."""

    @abstractmethod
    def step(self, state: WalkerState, *, generator: torch.Generator) -> tuple[WalkerState, MoveInfo]:
        """One step of every walker."""
