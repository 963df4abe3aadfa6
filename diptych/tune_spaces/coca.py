"""Search spaces of CoCa."""

from __future__ import annotations

from diptych.tune_spaces import Domain, Space


def smoke() -> Space:
    """Four trials of seconds each, for tests and first calls.

    Searches: learning rate × weight of the caption loss, every combination. Takes: 4 runs of 10 steps on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-4, 1e-3)), "task.caption_weight": Domain(values=(1.0, 2.0))},
        # The loss itself changes with the weight, so it compares nothing.
        metric="val/caption",
        mode="min",
    )


def rates() -> Space:
    """How fast to learn, early stopping the slow.

    Searches: learning rate, warm-up, weight decay and β₂ by ASHA. Takes: 16 trials of `demo`'s CoCa; two in three end at 110 steps.
    """
    return Space(
        method="asha",
        recipe="demo",
        trials=16,
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-4, high=1e-2),
            "optim.warmup_steps": Domain(values=(0, 20, 50, 100)),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-3, high=0.3),
        },
    )


def population() -> Space:
    """A schedule found while training: the learning rate and the balance of the two losses change within a run.

    Searches: learning rate, weight decay and weight of the caption loss by PBT. Takes: 8 members of `demo`'s CoCa, 4 generations.
    """
    return Space(
        method="pbt",
        recipe="demo",
        config={"optim.schedule": "constant"},
        metric="val/image_to_text_r1",
        mode="max",
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-4, high=1e-2),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-3, high=0.3),
            "task.caption_weight": Domain(kind="uniform", low=0.5, high=4.0),
        },
    )


def lr_by_steps() -> Space:
    """The 2 × 4 grid of rates and lengths that the Stable Diffusion fine-tunes use, on a CoCa of 81 thousand parameters.

    Searches: learning rate {1e-5, 1e-3} × steps {4, 20, 40, 80}, a hundredth of the original's. Takes: 8 runs of seconds on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-5, 1e-3)), "train.steps": Domain(values=(4, 20, 40, 80))},
    )
