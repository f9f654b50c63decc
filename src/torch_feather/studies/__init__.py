"""Studies: training runs that answer one question, mostly a table or figure of the paper."""

from .backbones import BACKBONES
from .compare import COMPARE
from .flops import FLOPS
from .latency import LATENCY
from .mobilenet import MOBILENET_STUDY
from .networks import NETWORKS_STUDY
from .recipe import RECIPE
from .stability import STABILITY
from .study import Study
from .threshold import THRESHOLD

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        RECIPE,
        THRESHOLD,
        STABILITY,
        BACKBONES,
        MOBILENET_STUDY,
        FLOPS,
        LATENCY,
        NETWORKS_STUDY,
        COMPARE,
    )
}
