"""Register our models as soon as ``anomalib.models`` has been imported, in any Python that has anomalib-rdpp.

anomalib reads no entry points. This module is named by a ``.pth`` file, so Python imports it at every start: it is
standard library only, imports nothing of ours, and never lets an error of ours stop Python or the host.
``ANOMALIB_RDPP_AUTOLOAD=0`` switches it off.
"""

import os
import sys

HOST = "anomalib.models"


class RegisterAfterImport:
    """Import hook that lets others find ``anomalib.models`` and runs our registration behind it."""

    def find_spec(self, name, path=None, target=None):  # noqa: ANN001, ANN201, ARG002
        """Wrap the loader of ``anomalib.models``; leave every other module alone."""
        if name != HOST:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path) if finder is not self and hasattr(finder, "find_spec") else None
            if spec is not None:
                break
        else:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:  # noqa: ANN001
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Import our package, which registers itself; whatever goes wrong becomes one warning."""
    try:
        import anomalib_rdpp  # noqa: F401
    except Exception as error:  # noqa: BLE001  the host must start, whatever is wrong with us
        import warnings

        warnings.warn(
            f"anomalib-rdpp could not register its models ({type(error).__name__}: {error}); anomalib works without "
            "them. Reinstall anomalib-rdpp, or set ANOMALIB_RDPP_AUTOLOAD=0 to silence this.",
            stacklevel=2,
        )


if os.environ.get("ANOMALIB_RDPP_AUTOLOAD") != "0":
    sys.meta_path.insert(0, RegisterAfterImport())
