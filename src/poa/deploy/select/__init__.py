"""The best sub-network for a budget. Nothing here imports torch."""

from poa.deploy.select.budget import FIGURES, Constraint, Figure, constraint
from poa.deploy.select.front import pareto_front
from poa.deploy.select.join import Joined, SettingFilter, join
from poa.deploy.select.pick import Relaxation, RunnerUp, Selection, select
from poa.deploy.select.row import Row

__all__ = [
    "FIGURES",
    "Constraint",
    "Figure",
    "Joined",
    "Relaxation",
    "Row",
    "RunnerUp",
    "Selection",
    "SettingFilter",
    "constraint",
    "join",
    "pareto_front",
    "select",
]
