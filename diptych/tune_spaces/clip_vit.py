"""Search spaces of the prompt-embedding regression."""

from __future__ import annotations

from diptych.tune_spaces import Domain, Space


def smoke() -> Space:
    """Four trials of seconds each, for tests and first calls.

    Searches: learning rate × loss, every combination. Takes: 4 runs of 10 steps on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-4, 1e-3)), "task.loss": Domain(values=("cosine", "cosine_embedding"))},
        metric="val/cosine",
        mode="max",
    )


def scenes() -> Space:
    """Rate and regularisation of a small vision tower trained from scratch, early stopping the slow.

    Searches: learning rate, weight decay and warm-up by ASHA. Takes: 12 trials of `scenes`; two in three end early.
    """
    return Space(
        method="asha",
        recipe="scenes",
        trials=12,
        metric="val/cosine",
        mode="max",
        parameters={
            "optim.lr": Domain(kind="loguniform", low=1e-4, high=5e-3),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-3, high=0.3),
            "optim.warmup_steps": Domain(values=(0, 50, 100)),
        },
    )


def image_to_prompt() -> Space:
    """How much of CLIP ViT-L/14 to train, and how fast.

    Searches: first trained block, learning rate and loss by ASHA. Takes: 9 trials of `image_to_prompt` on one GPU of 16 GB; two in three end early.
    """
    return Space(
        method="asha",
        recipe="image_to_prompt",
        trials=9,
        parameters={
            "task.unfreeze_from": Domain(values=(15, 18, 21)),
            "optim.lr": Domain(kind="loguniform", low=1e-5, high=5e-4),
            "task.loss": Domain(values=("cosine", "cosine_embedding")),
        },
    )
