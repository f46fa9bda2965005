"""Jacobians inside a network as numbers: by depth, and by time."""

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.engine.layer_jacobians import DepthSpectra
from ntk_callbacks.engine.segment_spectra import SegmentSpectra
from ntk_callbacks.engine.state_jacobians import TimeSpectra
from ntk_callbacks.instruments.instrument import tag_name

Scalars: TypeAlias = dict[str, Tensor | float | None]
Vectors: TypeAlias = dict[str, Tensor]


def by_depth(
    name: str, found: DepthSpectra, per_layer: bool
) -> tuple[Scalars, Vectors]:
    """Numbers of the Jacobians between layers.

    Args:
        name: Group of the tags.
        found: What was measured.
        per_layer: One scalar for each layer too, in the side group `<name>_layers`.

    Returns:
        Scalars of ∂h_{l+1}/∂h_l over all layers, if there are several; vectors by depth
        of this, of ∂h_l/∂x and of ∂f/∂h_l.
    """
    overall = _overall(found.step) if len(found.names) > 1 else {}
    scalars: Scalars = {f"{name}/{what}": value for what, value in overall.items()}
    reaches = {
        "step": (found.step, found.names[1:]),
        "from_input": (found.from_input, found.names),
        "to_output": (found.to_output, found.names),
    }
    vectors: Vectors = {}
    for reach, (spectra, layers) in reaches.items():
        if spectra is None:
            continue
        for what, values in _profiles(spectra).items():
            vectors[f"{name}/{reach}_{what}_by_depth"] = values
            if per_layer:
                scalars |= {
                    f"{name}_layers/{reach}_{what}/{tag_name(layer)}": value
                    for layer, value in zip(layers, values, strict=True)
                }
    return scalars, vectors


def by_time(name: str, found: dict[str, TimeSpectra]) -> tuple[Scalars, Vectors]:
    """Numbers of the Jacobians between the states of recurrent modules.

    Args:
        name: Group of the tags.
        found: What was measured, by module.

    Returns:
        In the side group `<name>_time`, for each module: scalars of ∂z_{t+1}/∂z_t over
        all times, and of ∂z_T/∂z_1; vectors by time t of both.
    """
    scalars: Scalars = {}
    vectors: Vectors = {}
    for module, spectra in found.items():
        part = tag_name(module)
        first = spectra.to_end.mean_square[0].mean()
        numbers = _overall(spectra.step) | {
            "to_end_mean_square": first,
            "to_end_growth": first ** (1 / (spectra.length - 1)),
        }
        scalars |= {
            f"{name}_time/{what}/{part}": value for what, value in numbers.items()
        }
        for reach in ("step", "to_end"):
            vectors |= {
                f"{name}_time/{reach}_{what}_by_time/{part}": values
                for what, values in _profiles(getattr(spectra, reach)).items()
            }
    return scalars, vectors


def _overall(step: SegmentSpectra) -> dict[str, Tensor | float]:
    """Over all steps and examples."""
    whats = ("mean_square", "singular_value_max", "singular_value_min", "isometry_gap")
    values = (
        # Geometric: the factors of successive steps multiply.
        step.mean_square.mean(1).log().mean().exp(),
        step.largest.max(),
        step.smallest.min(),
        step.isometry_gap.mean(),
    )
    return {f"step_{what}": value for what, value in zip(whats, values, strict=True)}


def _profiles(spectra: SegmentSpectra) -> dict[str, Float[Tensor, " k"]]:
    """Over the examples: mean ⟨s²⟩, largest s_max, smallest s_min."""
    if not len(spectra.formed):
        empty = spectra.mean_square.new_zeros(0)
        return dict.fromkeys(
            ("mean_square", "singular_value_max", "singular_value_min"), empty
        )
    return {
        "mean_square": spectra.mean_square.mean(1),
        "singular_value_max": spectra.largest.amax(1),
        "singular_value_min": spectra.smallest.amin(1),
    }
