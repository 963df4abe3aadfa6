"""Search spaces of GPT-2."""

from __future__ import annotations

from diptych.tune_spaces import Domain, Space


def smoke() -> Space:
    """Four trials of seconds each, for tests and first calls.

    Searches: learning rate × weight decay, every combination. Takes: 4 runs of 10 steps on one CPU core.
    """
    return Space(
        method="grid",
        parameters={"optim.lr": Domain(values=(3e-4, 3e-3)), "optim.weight_decay": Domain(values=(0.0, 0.1))},
    )


def prompts() -> Space:
    """Rate, regularisation and schedule of a small GPT-2 on some thousand prompts, early stopping the slow.

    Searches: learning rate, weight decay, dropout and warm-up by ASHA. Takes: 12 trials of `prompts_small`; two in three end early.
    """
    return Space(
        method="asha",
        recipe="prompts_small",
        trials=12,
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-4, high=6e-3),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-2, high=1.0),
            "optim.warmup_steps": Domain(values=(50, 100, 200)),
            "task.dropout": Domain(kind="uniform", low=0.0, high=0.3),
        },
    )


def population() -> Space:
    """A schedule found while training: rate, decay and dropout change within a run.

    Searches: learning rate, weight decay and dropout by PBT. Takes: 8 members of `prompts_small`, 4 generations.
    """
    return Space(
        method="pbt",
        recipe="prompts_small",
        config={"optim.schedule": "constant"},
        parameters={
            "optim.lr": Domain(kind="loguniform", low=3e-4, high=6e-3),
            "optim.weight_decay": Domain(kind="loguniform", low=1e-2, high=1.0),
            "task.dropout": Domain(kind="uniform", low=0.0, high=0.3),
        },
    )


def keyword_generator() -> Space:
    """How fast and how long to fine-tune GPT-2 (124M) on prompts.

    Searches: learning rate, schedule and weight decay by TPE. Takes: 8 trials of `keyword_generator`, one epoch each, on one GPU of 16 GB.
    """
    epoch = 73_718 // 16
    return Space(
        method="optuna",
        recipe="keyword_generator",
        config={"train.steps": epoch, "validation.every_steps": epoch // 4},
        parameters={
            "optim.lr": Domain(kind="loguniform", low=5e-5, high=1e-3),
            "optim.schedule": Domain(values=("linear", "cosine")),
            "optim.weight_decay": Domain(values=(0.0, 0.01, 0.1)),
        },
    )
