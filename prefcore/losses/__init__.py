"""The methods: plain functions that read like the papers' formulas and return unreduced losses."""

from prefcore.losses._registry import Method, get, names
from prefcore.losses.metrics import PreferenceMetrics, preference_metrics
from prefcore.losses.pairwise import cdpo, dpo, ipo

__all__ = ["Method", "PreferenceMetrics", "cdpo", "dpo", "get", "ipo", "names", "preference_metrics"]
