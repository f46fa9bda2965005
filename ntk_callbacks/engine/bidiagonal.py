"""Largest and smallest singular values of matrices that are only multiplied with.

Golub–Kahan–Lanczos bidiagonalization of one matrix for each example, all examples in
every product. Vectors of the smaller side are kept and reorthogonalized; those of the
larger one are not, which one side's orthogonality makes up for (Simon, Zha 2000).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntk_callbacks.engine.segments import Product
from ntk_callbacks.layout import widened

_CHECKED = 8  # steps between looks at the residuals
# Of spectra from uniform to singular no smallest value has been seen to converge in all
# steps that had a residual of .2 s after 3/8 of them; those that did were below .05 s.
_TRIED, _HOPELESS = 3 / 8, 0.2


@dataclass(frozen=True, slots=True)
class ExtremeSingularValues:
    """Both ends of the spectrum of each matrix.

    Args:
        largest: s_max in float64; never above the true one but for round-off.
        smallest: s_min of the r = min(c, d) values; never below the true one.
        largest_converged: Whether its residual is as small as asked for.
        smallest_converged: The same of s_min, seldom true where the spectrum is dense
            near 0.
    """

    largest: Float[Tensor, " n"]
    smallest: Float[Tensor, " n"]
    largest_converged: Bool[Tensor, " n"]
    smallest_converged: Bool[Tensor, " n"]


def extreme_singular_values(
    times: Product,
    transposed: Product,
    shape: tuple[int, int, int],
    *,
    like: Tensor | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 64,
    seed: int = 0,
) -> ExtremeSingularValues:
    """s_max and s_min of n matrices J (c × d) from products J v and Jᵀu.

    A value s with vectors u, v has converged when ‖Jᵀu − s v‖ ≤ tolerance · s (u on
    the larger side): a singular value lies within that distance, and where it is the
    end of the spectrum the error is of second order. Round-off, 4 ε √r s_max, counts as
    0. The largest takes some 10 to 40 steps, of one product each way. The smallest is
    hard: the steps grow like the condition number, so that it converges for J near an
    isometry or with a gap above 0, and for r ≤ `max_steps`, where all is exact. What
    has not converged is an estimate from within the spectrum. It ends before
    `max_steps` where only smallest values are missing that are far from converging.

    Args:
        times: `(n, d) -> (n, c)`, J v of each example.
        transposed: `(n, c) -> (n, d)`, Jᵀu.
        shape: (n, c, d).
        like: Tensor of the dtype and device to work in; None for float64 on the CPU.
        tolerance: Relative residual.
        max_steps: Steps after which to stop; with r of them all is exact.
        seed: Of the random vector to start from.

    Returns:
        The two ends; NaN, and not converged, where J is not finite.

    Raises:
        ValueError: If there is no number, or an argument is out of its range.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 2.0, 0.5])).double()
        >>> found = extreme_singular_values(
        ...     lambda v: v @ a.mT, lambda u: u @ a, (1, 3, 3)
        ... )
        >>> found.largest, found.smallest
        (tensor([3.0000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))

    References:
        Golub, Kahan 1965; Simon, Zha 2000, doi:10.1137/S1064827597327309.
    """
    n, c, d = shape
    if min(shape) < 1:
        raise ValueError(f"extreme_singular_values: shape={shape}; expected ≥ 1 each.")
    if not tolerance > 0 or max_steps < 1:
        raise ValueError(
            f"extreme_singular_values: tolerance={tolerance}, max_steps={max_steps}; "
            "expected numbers above 0."
        )
    like = torch.empty(0, dtype=torch.float64) if like is None else like
    out, back = (transposed, times) if c <= d else (times, transposed)
    r = min(c, d)
    floor = 4 * torch.finfo(like.dtype).eps * r**0.5
    start = torch.randn(n, r, generator=torch.Generator().manual_seed(seed))
    v, _ = _unit(start.to(like), 0.0)
    basis = v[:, None]
    u, alpha = _unit(out(v), 0.0)
    alphas: list[Tensor] = [alpha]
    betas: list[Tensor] = []
    finished = torch.zeros(n, dtype=torch.bool, device=v.device)
    step, last = 0, min(r, max_steps)
    while True:
        step += 1
        scale = floor * torch.stack(alphas).amax(0)
        v, beta = _unit(_orthogonal(back(u), basis), scale)
        finished |= (beta == 0) | ~beta.isfinite()
        betas.append(beta)
        if step == last or step % _CHECKED == 0 or finished.all():
            found, hopeless = _ritz(alphas, betas, tolerance, floor, complete=step == r)
            given_up = hopeless & (_TRIED * last <= step < last < r)
            done = found.largest_converged & (found.smallest_converged | given_up)
            if step == last or done.all() or finished.all():
                return found
        basis = torch.cat([basis, v[:, None]], 1)
        u, alpha = _unit(out(v) - beta[:, None] * u, scale)
        alphas.append(alpha)


def _unit(
    rows: Float[Tensor, "n m"], nothing: Tensor | float
) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
    """Unit vectors and norms; both exactly zero where there is only round-off."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    zero = norms <= nothing
    units = rows / torch.where(zero, 1.0, norms)[:, None]
    return units.masked_fill(zero[:, None], 0.0), norms.masked_fill(zero, 0.0)


def _orthogonal(
    rows: Float[Tensor, "n r"], basis: Float[Tensor, "n k r"]
) -> Float[Tensor, "n r"]:
    """What is left of each vector outside of its basis."""
    # Twice: the first pass leaves the round-off of what it took away, which grows from
    # step to step where a few values are far above the others.
    for _ in range(2):
        rows = rows - (basis.mT @ (basis @ rows[..., None]))[..., 0]
    return rows


def _ritz(
    alphas: list[Tensor],
    betas: list[Tensor],
    tolerance: float,
    floor: float,
    complete: bool,
) -> tuple[ExtremeSingularValues, Bool[Tensor, " n"]]:
    """Ends of the spectra of the bidiagonal matrices; whether s_min is far off."""
    diagonal, above = (widened(torch.stack(t, 1)).cpu() for t in (alphas, betas))
    n = len(diagonal)
    ends = diagonal.new_full((2, n), torch.nan)
    converged = torch.zeros(2, n, dtype=torch.bool)
    hopeless = torch.zeros(n, dtype=torch.bool)
    for i in range(n):
        if not (diagonal[i].isfinite().all() and above[i].isfinite().all()):
            continue
        # Behind a β of 0 there are only zeros, which are no singular values of J.
        stops = (above[i] == 0).nonzero()
        k = int(stops[0]) + 1 if len(stops) else diagonal.shape[1]
        b = torch.diag(diagonal[i, :k]) + torch.diag(above[i, : k - 1], 1)
        left, s, _ = torch.linalg.svd(b)
        residuals = above[i, k - 1] * left[-1].abs()
        small = residuals <= torch.clamp(tolerance * s, min=floor * float(s[0]))
        small |= torch.tensor(complete)
        ends[:, i] = s[[0, -1]]
        converged[:, i] = small[[0, -1]]
        hopeless[i] = residuals[-1] >= _HOPELESS * s[-1]
    return ExtremeSingularValues(*ends, *converged), hopeless
