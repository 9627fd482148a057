"""Several states seen from one reference space, through a map to each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from boltzgen.core import Target, Transform, summed_log_det_error
from boltzgen.errors import ShapeError


class MappedStates:
    """K states and maps T_k from a reference space to the space of each: ũ_k(z) = u_k(T_k z) − ln|det ∂T_k z/∂z|.

    ∫ e^{−ũ_k(z)} dz = ∫ e^{−u_k(x)} dx = Z_k for every map, and z = T_k⁻¹(x) of samples x of state k have the density e^{−ũ_k}/Z_k: MBAR of
    ũ gives ln Z_k/Z_0. The space is that of state 0 where T_0 is the identity. Two states differ by ũ_1 − ũ_0, the work of a
    :class:`~boltzgen.core.Bridge`.

    Args:
        targets: The states.
        transforms: The map to each; ``Chain()`` is the identity.

    References:
        Paliwal & Shirts, J. Chem. Theory Comput. 9, 4700 (2013), eq. 5; Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020).
    """

    def __init__(self, targets: Sequence[Target], transforms: Sequence[Transform]) -> None:
        if len(targets) != len(transforms) or len(targets) < 2:
            raise ShapeError(f"expected a map to each of two or more states, got {len(transforms)} maps and {len(targets)} states")
        self.targets, self.transforms = tuple(targets), tuple(transforms)

    @property
    def is_exact(self) -> bool:
        """Whether the energies of all states are."""
        return all(target.is_exact for target in self.targets)

    @property
    def log_det_error(self) -> float | None:
        """Largest error in nats of a difference of two pulled-back potentials; None where a Jacobian is only estimated."""
        errors = [transform.log_det_error for transform in self.transforms]
        return None if None in errors else summed_log_det_error(*sorted(error for error in errors if error is not None)[-2:])

    def reduced_potentials(self, x: Tensor, state: int) -> Tensor:
        """ũ_l of the pulled-back samples ``x [b, *event]`` of a state, for every l: ``[K, b]`` in kT, float64.

        That of their own state is u_k(x) + ln|det ∂T_k⁻¹x/∂x|, without passing through the map and back.
        """
        z, log_det = self.transforms[state].inverse(x)
        found = []
        for k, (target, transform) in enumerate(zip(self.targets, self.transforms, strict=True)):
            if k == state:
                found.append(target.reduced_potential(x) + log_det)
            else:
                mapped, jacobian = transform(z)
                found.append(target.reduced_potential(mapped) - jacobian)
        return torch.stack(found)
