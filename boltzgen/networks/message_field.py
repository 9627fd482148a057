"""The embedded-atom field with exchanges of messages between its two layers; its exact divergence stays written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltzgen.networks.embedded_field import EmbeddedField, Layers, Pairs, at_times, silu_slope


class MessageField(EmbeddedField):
    """An :class:`EmbeddedField` whose particles tell each other their states before they push each other.

    After the states g_i⁰ of the embedded field, in every exchange r

        S_j = Σ_l W(ρ_jl, t) ⊙ P g_l,   g_j ← silu(E [g_j, S_j] + b(t))

    so that forces depend on surroundings of surroundings.

    **Divergence.** Let Z_il^e be the derivative of v_i along axis e by the state g_l. The last layer gives it; an exchange pulls it back,
    Z ← Eᵀ Z through the same particle and, because messages are linear in the states, Z_il ← P ᵀ Σ_j Y_ij ⊙ W_jl from the others:
    products of n × n matrices. What is left at the first layer meets the one pair (i, l) through which x_i moves the moments of l.

    Args:
        n_exchanges: Exchanges of messages.
        n_messages: Width of a message.
        n_particles, n_dimensions, length, labels, n_radial, n_scalars, n_vectors, hidden, reach, generator: As for the embedded field.
    """

    pair_of: Tensor
    orientation: Tensor

    def __init__(
        self,
        n_particles: int,
        n_dimensions: int,
        *,
        length: float,
        labels: Sequence[int] | None = None,
        n_exchanges: int = 1,
        n_messages: int = 32,
        n_radial: int = 16,
        n_scalars: int = 32,
        n_vectors: int = 8,
        hidden: int = 64,
        reach: float = 4.0,
        generator: torch.Generator,
    ) -> None:
        super().__init__(
            n_particles, n_dimensions, length=length, labels=labels, n_radial=n_radial, n_scalars=n_scalars, n_vectors=n_vectors,
            hidden=hidden, reach=reach, generator=generator,
        )  # fmt: skip
        pair_of, orientation = torch.zeros(n_particles, n_particles, dtype=torch.int64), torch.zeros(n_particles, n_particles)
        pair_of[self.first, self.second] = pair_of[self.second, self.first] = torch.arange(len(self.first))
        orientation[self.first, self.second], orientation[self.second, self.first] = 1.0, -1.0
        self.register_buffer("pair_of", pair_of, persistent=False)
        self.register_buffer("orientation", orientation, persistent=False)

        def weights(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * (3.0 / fan_in) ** 0.5)

        rounds, times = range(n_exchanges), self.N_TIMES
        self.message_radial = nn.ParameterList([weights(times, n_radial, n_messages, fan_in=4 * times) for _ in rounds])
        self.message_states = nn.ParameterList([weights(hidden, n_messages, fan_in=hidden) for _ in rounds])
        self.update = nn.ParameterList([weights(hidden + n_messages, hidden, fan_in=hidden + n_messages) for _ in rounds])
        self.update_shift = nn.ParameterList([nn.Parameter(torch.zeros(times, hidden)) for _ in rounds])

    def _exchange(self, pairs: Pairs, state: Tensor, times: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        inners = []
        for radial, message, update, shift in zip(self.message_radial, self.message_states, self.update, self.update_shift, strict=True):
            heard = (self._dense(pairs.radial @ at_times(radial, times)) * (state @ message).unsqueeze(1)).sum(2)
            together = torch.cat([state, heard / self.n_particles**0.5], dim=-1)
            inners.append(together @ update + at_times(shift, times).unsqueeze(1))
            state = nn.functional.silu(inners[-1])
        return state, tuple(inners)

    def _through_states(
        self, pairs: Pairs, layers: Layers, by_states: Tensor, scalars_slope: Tensor, weights_slope: Tensor, times: Tensor
    ) -> Tensor:
        n, scale = self.n_particles, self.n_particles**-0.5
        e = self._dense(pairs.direction) * self.orientation.to(by_states.dtype).unsqueeze(-1)  # from l to i, [b, i, l, d]
        own = torch.eye(n, dtype=e.dtype, device=e.device).reshape(1, n, n, 1, 1)
        z = e.unsqueeze(-1) * self._dense(by_states).unsqueeze(-2) + own * self._own_cotangent(pairs, layers, by_states).unsqueeze(2)
        states = [nn.functional.silu(inner) for inner in (layers.inner, *layers.exchanges[:-1])]
        total = torch.zeros(len(e), dtype=e.dtype, device=e.device)
        for r in reversed(range(len(layers.exchanges))):
            radial, message = self.message_radial[r], self.message_states[r]
            through = z * silu_slope(layers.exchanges[r])[:, None, :, None]
            by_state, by_heard = (through @ self.update[r].T).split([through.shape[-1], message.shape[1]], dim=-1)
            by_heard = by_heard * scale  # [b, i, j, d, messages]
            told = states[r] @ message
            slope = self._dense(pairs.slope @ at_times(radial, times))
            total = total + ((by_heard * e.unsqueeze(-1)).sum(3) * slope * told.unsqueeze(2)).sum(dim=(1, 2, 3))
            mine = torch.diagonal(by_heard, dim1=1, dim2=2).permute(0, 3, 1, 2)  # [b, i, d, messages]
            total = total + ((e @ mine) * slope * told.unsqueeze(1)).sum(dim=(1, 2, 3))
            w = self._dense(pairs.radial @ at_times(radial, times))
            heard = by_heard.permute(0, 4, 1, 3, 2).flatten(2, 3) @ w.permute(0, 3, 1, 2)  # [b, messages, i d, l]
            heard = heard.unflatten(2, (n, self.n_dimensions)).permute(0, 2, 4, 3, 1)
            z = by_state + heard @ message.T
        z = z * silu_slope(layers.inner)[:, None, :, None]
        cotangent = torch.diagonal(z, dim1=1, dim2=2).permute(0, 3, 1, 2)
        total = total + self._own_states(pairs, layers, cotangent, scalars_slope, weights_slope)
        return total + self._all_other_states(pairs, layers, z, e, scalars_slope, weights_slope)

    def _all_other_states(self, pairs: Pairs, layers: Layers, z: Tensor, e: Tensor, scalars_slope: Tensor, weights_slope: Tensor) -> Tensor:
        """The part in which x_i moves v_i through the moments of every other l, from derivatives by inner states ``[b, i, l, d, H]``."""
        n, c = self.n_particles, self.n_vectors
        toward = (z * e.unsqueeze(-1)).sum(3)
        total = (toward @ self.embedding[: self.n_scalars].T * n**-0.5 * self._dense(scalars_slope)).sum(dim=(1, 2, 3))
        by_products = (self.embedding[self.n_scalars :] + self._transposed_products()).T / n
        a = layers.vectors
        turning = self._dense(layers.weights / pairs.distance)
        along_a = (a.unsqueeze(1) * e.unsqueeze(3)).sum(-1)  # A_l·e_il, [b, i, l, C]
        straight = (toward @ by_products).unflatten(-1, (c, c)) @ along_a.unsqueeze(-1)
        total = total - (straight.squeeze(-1) * (self._dense(weights_slope) - turning)).sum(dim=(1, 2, 3))
        turned = (z @ by_products).unflatten(-1, (c, c))  # [b, i, l, d, C, C]
        turned = (turned * a.transpose(-1, -2)[:, None, :, :, None, :]).sum(dim=(3, 5))
        return total - (turned * turning).sum(dim=(1, 2, 3))

    def _dense(self, pairs: Tensor) -> Tensor:
        """Pairs ``[b, p, m]`` as a matrix ``[b, n, n, m]`` that is zero on its diagonal."""
        return pairs[:, self.pair_of] * self.orientation.to(pairs.dtype).abs().unsqueeze(-1)
