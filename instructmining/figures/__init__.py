"""All figures of the study under one name: tidy frames in, a matplotlib Figure out.

A figure names its columns in its docstring; the look is in `figure_style`. Figures have their own
light background and are closed in pyplot: a notebook shows one as the value of its cell.
"""

from __future__ import annotations

from .data import correlation_map, indicator_distributions, loss_by_source, two_losses
from .design import design_half_widths, procedure_diagram, training_curve
from .rule import coefficients, design_failure, predicted_measured, regression_panels, residual_page
from .style import FigureError
from .verdict import dose_response, judge_bars, search_trials, selected_random, size_curve, twin_auc

__all__ = [
    "FigureError", "coefficients", "correlation_map", "design_failure", "design_half_widths",
    "dose_response", "indicator_distributions", "judge_bars", "loss_by_source",
    "predicted_measured", "procedure_diagram", "regression_panels", "residual_page",
    "search_trials", "selected_random", "size_curve", "training_curve", "twin_auc", "two_losses",
]
