"""Search spaces of the DALL-E 2 decoder."""

from __future__ import annotations

from diptych.tune_spaces import Domain, Space


def smoke() -> Space:
    """Four trials of seconds each, for tests and first calls.

    Searches: learning rate × EMA, every combination. Takes: 4 runs of 10 steps on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-4, 1e-3)), "optim.ema_decay": Domain(values=(0.9, 0.99))},
    )


def scenes() -> Space:
    """Rate, warm-up and averaging of a base U-Net on the demo's scenes, early stopping the slow.

    Searches: learning rate, warm-up, weight decay and EMA by ASHA. Takes: 9 trials of `scenes`; two in three end early.
    """
    return Space(
        method="asha",
        recipe="scenes",
        trials=9,
        parameters={
            "optim.lr": Domain(kind="loguniform", low=1e-4, high=3e-3),
            "optim.warmup_steps": Domain(values=(0, 50, 200)),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-3, high=0.1),
            "optim.ema_decay": Domain(values=(0.99, 0.995, 0.999)),
        },
    )


def base() -> Space:
    """What dalle2-pytorch leaves to the user, for embeddings of one's own.

    Searches: learning rate and both conditioning dropouts by TPE. Takes: 12 trials of 10,000 steps of `base`, each on one GPU of 24 GB.
    """
    return Space(
        method="optuna",
        recipe="base",
        trials=12,
        config={"train.steps": 10_000, "validation.every_steps": 2_500},
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-5, high=1e-3),
            "task.image_cond_drop_prob": Domain(values=(0.0, 0.1, 0.2)),
            "task.text_cond_drop_prob": Domain(values=(0.1, 0.5)),
        },
    )
