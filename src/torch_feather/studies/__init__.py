"""Studies: many trainings that answer one question; each a table or a figure of the paper."""

from .compare import COMPARE
from .study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (COMPARE,)}
