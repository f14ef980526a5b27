"""Training on labels: whole classifiers, segmentation, detection. `fit` is the loop of all of them."""

from poa.tasks.fit import FitResult, Task, fit

__all__ = ["FitResult", "Task", "fit"]
