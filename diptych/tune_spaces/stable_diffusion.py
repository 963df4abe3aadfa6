"""Search spaces of Stable Diffusion."""

from __future__ import annotations

from diptych.tune_spaces import Domain, Space


def smoke() -> Space:
    """Four trials of seconds each, for tests and first calls.

    Searches: learning rate × noise offset, every combination. Takes: 4 runs of 10 steps on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-4, 1e-3)), "task.noise_offset": Domain(values=(0.0, 0.1))},
    )


def thumbs_up() -> Space:
    """The 2 × 4 grid of the thumbs-up project's fine-tunes.

    Searches: learning rate {1e-5, 1e-3} × steps {400, 2000, 4000, 8000}, every combination. Takes: 8 runs of `thumbs_up` on one GPU of
    24 GB, 28,800 steps in all. At 1e-3 the project saw nothing but broken pictures; a loss that diverges ends its trial and not the sweep.
    """
    return Space(
        method="grid",
        recipe="thumbs_up",
        parameters={"optim.lr": Domain(values=(1e-5, 1e-3)), "train.steps": Domain(values=(400, 2_000, 4_000, 8_000))},
    )


def thumbs_up_small() -> Space:
    """The same grid on a model of a hundred thousand parameters and a hundredth of the steps.

    Searches: learning rate {1e-5, 1e-3} × steps {4, 20, 40, 80}, every combination. Takes: 8 runs of seconds on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(1e-5, 1e-3)), "train.steps": Domain(values=(4, 20, 40, 80))},
    )


def scenes() -> Space:
    """A text-to-image model from scratch: rate, warm-up and averaging, early stopping the slow.

    Searches: learning rate, warm-up and EMA by ASHA. Takes: 9 trials of `scenes`; two in three end early.
    """
    return Space(
        method="asha",
        recipe="scenes",
        trials=9,
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-4, high=6e-3),
            "optim.warmup_steps": Domain(values=(0, 50, 100)),
            "optim.ema_decay": Domain(values=(0.98, 0.99, 0.995)),
        },
    )


def lora() -> Space:
    """How large an adapter to learn, and how fast.

    Searches: rank, learning rate and schedule by TPE. Takes: 12 trials of `lora_reports` on one GPU of 8 GB.
    """
    return Space(
        method="optuna",
        recipe="lora_reports",
        trials=12,
        parameters={
            "task.lora.rank": Domain(values=(4, 8, 16)),
            "optim.lr": Domain(kind="loguniform", low=3e-5, high=1e-3),
            "optim.schedule": Domain(values=("constant", "cosine")),
        },
    )
