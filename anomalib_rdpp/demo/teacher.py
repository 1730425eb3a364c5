"""A small teacher for trials: with ImageNet weights where they can be had, random otherwise."""
# ruff: noqa: T201  a demo talks

from anomalib_rdpp.teacher import Teacher

CANDIDATES = ("resnet18.tv_in1k", "tf_efficientnet_lite0")  # the second one's weights are in anomalib-rdpp[edge]


def choose_teacher(pre_trained: bool = True) -> dict[str, str | bool]:
    """Say which teacher ``RDPP`` and ``AAND`` are to take, as arguments of theirs; a random one is said loudly.

    Args:
        pre_trained: Take ImageNet weights if they can be had.
    """
    for backbone in CANDIDATES if pre_trained else ():
        try:
            Teacher(backbone)
        except Exception as error:  # noqa: BLE001, PERF203  no network, or a download that broke, as each version says it
            print(f"    No weights of {backbone}: {str(error).splitlines()[0]}")
        else:
            print(f"    Teacher: {backbone}, ImageNet weights.")
            return {"backbone": backbone, "pre_trained": True}
    print("    RANDOM TEACHER: no ImageNet weights here, so the figures below are lower than those of real use.")
    return {"backbone": CANDIDATES[0], "pre_trained": False}
