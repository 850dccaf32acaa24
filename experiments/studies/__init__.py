"""The articles' claims about batch normalization, each one measured.

A module for each study, all of one shape (`study.Study`): settings, run,
figure, verdict. `python -m experiments.studies` runs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.studies.study import Study

# In the order of the report.
NAMES = (
    "convergence",
    "covariate_shift",
    "learning_rate",
    "initialization",
    "overfitting",
    "batch_size",
    "recurrent",
    "cost",
    "transfer",
    "placement",
    "scale_and_shift",
    "older_remedies",
)


def find(name: str) -> Study:
    """Returns the study of a name, one of `NAMES`."""
    return importlib.import_module(f"experiments.studies.{name}").STUDY
