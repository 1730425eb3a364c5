"""RD++ (CVPR 2023) and AAND (TIP 2026) as anomalib models.

Installed beside anomalib, ``anomalib train --model RDPP`` works as typed, ``get_model("rdpp")`` too.
"""

import anomalib.models  # noqa: F401  first and whole: half of it would be imported by our modules otherwise

from anomalib_rdpp.aand.lightning_model import AAND
from anomalib_rdpp.published import load_published, to_published
from anomalib_rdpp.rdpp.lightning_model import RDPP
from anomalib_rdpp.registration import register

__version__ = "0.1.0"
MODELS = ("RDPP", "AAND")
__all__ = ["AAND", "RDPP", "load_published", "to_published"]

register()
