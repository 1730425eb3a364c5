"""Register our models as soon as ``anomalib.models`` has been imported, in any Python that has anomalib-rdpp.

anomalib reads no entry points. This module is named by a ``.pth`` file, so Python imports it at every start: it is
standard library only, imports nothing of ours, and never lets an error of ours stop Python or anomalib.
``ANOMALIB_RDPP_AUTOLOAD=0`` switches it off.
"""

import os
import sys

ANOMALIB = "anomalib.models"


class RegisterAfterImport:
    """Import hook that lets the finders behind it find ``anomalib.models`` and wraps the loader that they give."""

    def find_spec(self, name, path=None, target=None):  # noqa: ANN001, ANN201
        """Find ``anomalib.models``; leave every other module alone."""
        if name != ANOMALIB or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = RegisteringLoader(spec.loader, self)
                return spec
        return None


class RegisteringLoader:
    """Loader that hands everything to the one it wraps and registers our models behind it."""

    def __init__(self, loader, finder) -> None:  # noqa: ANN001
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name):  # noqa: ANN001, ANN204
        return getattr(self.loader, name)

    def create_module(self, spec):  # noqa: ANN001, ANN201
        """Create what the wrapped loader creates."""
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:  # noqa: ANN001
        """Execute the module of anomalib, then register; once."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register()


def register() -> None:
    """Import our package, which registers itself; whatever goes wrong becomes one warning."""
    try:
        import anomalib_rdpp  # noqa: F401
    except Exception as error:  # noqa: BLE001  anomalib must start, whatever is wrong with us
        import warnings

        message = (
            f"anomalib-rdpp could not register its models ({type(error).__name__}: {error}); anomalib works without "
            "them. Reinstall anomalib-rdpp, or set ANOMALIB_RDPP_AUTOLOAD=0 to silence this."
        )
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # python -W error
            sys.stderr.write(f"{message}\n")


if os.environ.get("ANOMALIB_RDPP_AUTOLOAD") != "0":
    sys.meta_path.insert(0, RegisterAfterImport())
