"""All figures of the study under one name: tidy frames in, a matplotlib Figure out.

A figure names its columns in its docstring; the look is in `style`. Figures have their own light
background and are closed in pyplot: a notebook shows one as the value of its cell.
"""

from __future__ import annotations

from .data import (
    plot_correlation_map,
    plot_design_half_widths,
    plot_dose_shares,
    plot_indicator_distributions,
    plot_loss_by_source,
    plot_procedure,
    plot_regime,
    plot_training_curve,
    plot_two_losses,
)
from .results import (
    plot_coefficients,
    plot_design_failure,
    plot_dose_response,
    plot_forest,
    plot_judge_bars,
    plot_loss_proxy,
    plot_predicted_measured,
    plot_regression_panels,
    plot_residual_page,
    plot_search_trials,
    plot_selected_random,
    plot_size_curve,
    plot_twin_auc,
)

__all__ = [
    "plot_coefficients", "plot_correlation_map", "plot_design_failure", "plot_design_half_widths",
    "plot_dose_response", "plot_dose_shares", "plot_forest", "plot_regime",
    "plot_indicator_distributions", "plot_judge_bars", "plot_loss_by_source",
    "plot_loss_proxy", "plot_predicted_measured", "plot_procedure", "plot_regression_panels",
    "plot_residual_page", "plot_search_trials", "plot_selected_random", "plot_size_curve",
    "plot_training_curve", "plot_twin_auc", "plot_two_losses",
]
