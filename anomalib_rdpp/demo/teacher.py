"""A small teacher for trials: with ImageNet weights where they can be had, random otherwise."""
# ruff: noqa: T201  a demo talks

from urllib.request import urlopen

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

BACKBONE = "resnet18.tv_in1k"
FILE = f"timm/{BACKBONE}", "model.safetensors"


def choose_teacher(pre_trained: bool = True) -> dict[str, str | bool]:
    """Say which teacher ``RDPP`` and ``AAND`` are to take, as arguments of theirs; a random one is said loudly.

    Args:
        pre_trained: Take ImageNet weights if they can be had.
    """
    if pre_trained and _weights_are_at_hand():
        try:
            hf_hub_download(*FILE)  # nothing if they are in the cache, where timm looks too
        except Exception as error:  # noqa: BLE001  whatever breaks a download, which differs between versions
            print(f"    The download failed: {error}")
        else:
            return {"backbone": BACKBONE, "pre_trained": True}
    print("    RANDOM TEACHER: no ImageNet weights here, so the figures below are lower than those of real use.")
    return {"backbone": BACKBONE, "pre_trained": False}


def _weights_are_at_hand() -> bool:
    """Look into the cache, then for the server: a download alone would try for a minute before it gives up."""
    if isinstance(try_to_load_from_cache(*FILE), str):
        return True
    if constants.is_offline_mode():
        return False
    try:
        with urlopen(constants.ENDPOINT, timeout=5):  # noqa: S310  https, or what the user named in HF_ENDPOINT
            return True
    except OSError:
        return False
