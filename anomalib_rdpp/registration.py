"""Make our models anomalib models: found by name, by class path, in lists and by the command line.

anomalib looks models up among the subclasses of ``AnomalibModule``, among the attributes of ``anomalib.models`` and,
for class paths, in ``ALLOWED_MODULES``. Made for and tested with anomalib 2.7.
"""

import warnings
from functools import wraps
from importlib.metadata import version
from typing import Any

ANOMALIB_VERSION = "2.7"


def register() -> None:
    """Enter our models into anomalib's look-ups; any further call changes nothing."""
    import anomalib.models as models_of_anomalib  # by `as`: its package doesn't name it yet

    import anomalib_rdpp

    if not version("anomalib").startswith(f"{ANOMALIB_VERSION}."):
        warnings.warn(
            f"anomalib-rdpp was made for anomalib {ANOMALIB_VERSION}, this is {version('anomalib')}: if its models "
            f'misbehave, install "anomalib>={ANOMALIB_VERSION},<2.8".',
            stacklevel=2,
        )
    if "anomalib_rdpp" in models_of_anomalib.ALLOWED_MODULES:
        return
    models_of_anomalib.ALLOWED_MODULES.add("anomalib_rdpp")
    models_of_anomalib.__all__.extend(anomalib_rdpp.MODELS)
    for name in anomalib_rdpp.MODELS:
        setattr(models_of_anomalib, name, getattr(anomalib_rdpp, name))
    get_model = models_of_anomalib.get_model

    @wraps(get_model)
    def get_model_by_path_too(model: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Take our class paths as a string too, as the command line does; anomalib has them in dictionaries alone."""
        if isinstance(model, str) and model.startswith("anomalib_rdpp."):
            model = {"class_path": model}
        return get_model(model, *args, **kwargs)

    models_of_anomalib.get_model = get_model_by_path_too
