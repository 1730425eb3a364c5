"""Make our models anomalib models: found by name, by class path, in lists and by the command line.

The host looks models up among the subclasses of ``AnomalibModule``, among the attributes of ``anomalib.models`` and,
for class paths, in ``ALLOWED_MODULES``. Made for and tested with anomalib 2.7.
"""

import warnings
from importlib.metadata import version

HOST_VERSION = "2.7"


def register() -> None:
    """Enter our models into the host's look-ups; any further call changes nothing."""
    import anomalib.models as host

    import anomalib_rdpp

    if not version("anomalib").startswith(f"{HOST_VERSION}."):
        warnings.warn(
            f"anomalib-rdpp was made for anomalib {HOST_VERSION}, this is {version('anomalib')}: if its models "
            f'misbehave, install "anomalib>={HOST_VERSION},<2.8".',
            stacklevel=2,
        )
    for name in anomalib_rdpp.MODELS:
        setattr(host, name, getattr(anomalib_rdpp, name))
        if name not in host.__all__:
            host.__all__.append(name)
    host.ALLOWED_MODULES.add("anomalib_rdpp")
