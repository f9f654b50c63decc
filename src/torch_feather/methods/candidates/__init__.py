"""Changes of Feather that a study explores; a method here has no name in the registry.

Name one as `torch_feather.methods.candidates:feather_ham`. The protocol of the study
(docs/protocol.md) says which of them are compared, and by which test one becomes a method.
"""

from .ham import feather_ham
from .phases import feather_phases
from .sensitivity import feather_sensitivity

__all__ = ["feather_ham", "feather_phases", "feather_sensitivity"]
