"""Search spaces of the DALL-E 2 prior."""

from __future__ import annotations

from diptych.tune_spaces import Domain, Space

_COSINE = "val/cosine_image_predicted"


def smoke() -> Space:
    """Four trials of seconds each, for tests and first calls.

    Searches: learning rate × depth, every combination. Takes: 4 runs of 10 steps on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-4, 1e-3)), "task.depth": Domain(values=(1, 2))},
    )


def demo() -> Space:
    """Size and rate of a small prior, early stopping the slow.

    Searches: depth, learning rate and weight decay by ASHA. Takes: 12 trials of `demo`, minutes on 2 CPU cores; two in three end early.
    """
    return Space(
        method="asha",
        recipe="demo",
        trials=12,
        metric=_COSINE,
        mode="max",
        parameters={
            "task.depth": Domain(values=(2, 3, 4)),
            "optim.lr": Domain(kind="loguniform", low=2e-4, high=5e-3),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-3, high=0.2),
        },
    )


def base() -> Space:
    """What dalle2-pytorch leaves to the user, for embeddings of one's own.

    Searches: learning rate, EMA, conditioning dropout and loss by TPE. Takes: 16 trials of `base`.
    """
    return Space(
        method="optuna",
        recipe="base",
        trials=16,
        metric=_COSINE,
        mode="max",
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-5, high=1e-3),
            "optim.ema_decay": Domain(values=(0.99, 0.999, 0.9999)),
            "task.text_cond_drop_prob": Domain(values=(0.0, 0.1, 0.2)),
            "task.loss_type": Domain(values=("l2", "huber")),
        },
    )
