"""Put the configs into the wheel; an editable install has them here and takes the start-up module alone."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STARTUP = ("anomalib_rdpp_autoload.py", "anomalib_rdpp_autoload.pth")


class PlaceFiles(BuildHookInterface):
    """Forced inclusions of both kinds of install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add them to the build."""
        del version
        startup = {str(Path(self.root, "startup", name)): name for name in STARTUP}
        configs = Path(self.root, "configs").glob("*.yaml")  # of trainings; grids of benchmarks stay here
        build_data["force_include"] |= startup | {str(path): f"anomalib_rdpp/configs/{path.name}" for path in configs}
        build_data["force_include_editable"] |= startup
