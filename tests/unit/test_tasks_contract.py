"""Every task, by discovery: its recipes build, its example satisfies its needs, forward and weights agree, padding counts nothing."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

from diptych.batches import FIELDS, check_batch
from diptych.config import ConfigError, RunConfig, TaskConfig, load_recipe, recipes_of, set_path, task_config_class, task_names
from diptych.documentation import field_documentation
from diptych.trainers import tasks
from diptych.trainers.task import Batch, Task
from diptych.trainers.tasks import load_task_class

TASKS = task_names()
DIM = 16


def make(name: str) -> Task:
    """The task of the recipe `smoke`; embeddings, whose dimension a run takes from its data, have `DIM` here."""
    config = load_recipe(name, "smoke").task
    for key, value in (("embed_dim", DIM), ("image_embed_dim", DIM)):
        if key in type(config).model_fields and getattr(config, key) is None:
            config = set_path(config, key, value)
    return load_task_class(name)(config, seed=3)


def drawn(task: Task, batch: Batch) -> Batch:
    """The batch with the task's draws."""
    return batch | task.draws(batch)


def test_every_module_of_a_task_is_found_and_has_recipes():
    modules = {module.name for module in iter_modules(tasks.__path__)}
    assert len(TASKS) > 0
    assert modules == set(TASKS)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ConfigError, match="coca"):
        load_task_class("cocoa")


@pytest.mark.parametrize("name", TASKS)
def test_recipes_build_survive_storage_and_say_what_they_are(name):
    recipes = recipes_of(name)
    assert "smoke" in recipes
    for recipe, function in recipes.items():
        config = function()
        assert isinstance(config, RunConfig)
        assert type(config.task) is task_config_class(name)
        assert RunConfig.from_json(config.to_json()) == config
        for word in ("Source:", "Command:", "Hardware:", "Expected"):
            assert word in (inspect.getdoc(function) or ""), f"{name}.{recipe} lacks {word}"


@pytest.mark.parametrize("name", TASKS)
def test_every_key_of_a_configuration_is_documented(name):
    def undocumented(cls: type) -> list[str]:
        found = []
        for key, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, TaskConfig.__mro__[1]):
                found += undocumented(field.annotation)
            if not field_documentation(cls, key):
                found.append(f"{cls.__name__}.{key}")
        return found

    assert not undocumented(task_config_class(name))


@pytest.mark.parametrize("name", TASKS)
def test_example_batch_satisfies_the_needs(name):
    task = make(name)
    for size in (1, 5):
        batch = task.example_batch(size)
        check_batch({key: value.numpy() for key, value in batch.items()}, task.needs)
        assert not set(task.draws(batch)) & set(FIELDS), "a draw must not replace data"
    assert all(torch.equal(task.example_batch(4)[key], value) for key, value in task.example_batch(4).items())


@pytest.mark.parametrize("name", TASKS)
def test_forward_agrees_with_weights(name):
    task = make(name).eval()
    batch = drawn(task, task.example_batch(6))
    output = task(batch)
    terms = output.terms | task.contrast(output.features, batch["weight"], slice(0, 6))
    weights = task.weights(batch)
    assert set(terms) == set(weights)
    assert set(task.coefficients) <= set(terms)
    for key, term in terms.items():
        assert term.weight.item() == pytest.approx(weights[key].item())
        assert term.weight > 0
        assert torch.isfinite(term.sum)
    features = task.features(batch)
    assert set(features) == set(output.features)
    assert all(torch.allclose(features[key], value) for key, value in output.features.items())


@pytest.mark.parametrize("name", TASKS)
def test_every_trainable_parameter_gets_a_gradient(name):
    task = make(name).eval()
    batch = drawn(task, task.example_batch(6))
    _loss(task, batch).backward()
    assert not [key for key, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert any(parameter.grad.abs().sum() > 0 for parameter in task.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("garbage", [False, True], ids=["zeros", "garbage"])
def test_rows_of_padding_contribute_nothing(name, garbage):
    task = make(name).eval()
    plain = task.example_batch(4)
    padded = _pad(plain, task.example_batch(7, seed=1), garbage)
    sums = {}
    for key, batch in (("plain", plain), ("padded", padded)):
        task.zero_grad()
        loss = _loss(task, drawn(task, batch))
        loss.backward()
        sums[key] = (loss.item(), [parameter.grad.clone() for parameter in task.parameters() if parameter.grad is not None])
    assert sums["padded"][0] == pytest.approx(sums["plain"][0], rel=1e-6)
    for one, other in zip(sums["plain"][1], sums["padded"][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TASKS)
def test_draws_depend_on_the_slot_alone(name):
    task = make(name)
    batch = task.example_batch(6)
    whole = task.draws(batch)
    part = task.draws({key: value[[4, 2]] for key, value in batch.items()})
    assert set(whole) == set(part)
    for key, value in part.items():
        assert torch.equal(value, whole[key][[4, 2]])


@pytest.mark.parametrize("name", TASKS)
def test_fresh_weights_are_a_function_of_the_seed(name):
    torch.manual_seed(0)
    one = make(name).state_dict()
    torch.manual_seed(1)
    other = make(name).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", TASKS)
def test_validation_and_summary_are_finite_and_do_not_train(name):
    task = make(name).eval()
    batch = drawn(task, task.example_batch(6))
    with torch.no_grad():
        validation = task.validate(batch)
        figures = task.summarise(validation.rows)
    assert validation.terms
    assert all(torch.isfinite(term.sum) and term.weight > 0 for term in validation.terms.values())
    assert all(len(row) == 6 for row in validation.rows.values())
    assert all(isinstance(value, float) and value == value for value in figures.values())


@pytest.mark.parametrize("name", TASKS)
def test_gradient_checkpointing_changes_nothing(name):
    plain, checkpointed = make(name).train(), make(name).train()
    checkpointed.set_gradient_checkpointing()
    gradients = []
    for task in (plain, checkpointed):
        torch.manual_seed(5)
        _loss(task, drawn(task, task.example_batch(4))).backward()
        gradients.append([parameter.grad for parameter in task.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_recipe_modules_import_neither_torch_nor_ray():
    import subprocess
    import sys

    code = "import sys; from diptych.config import *; [recipes_of(n) for n in task_names()]; print(*sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
    assert import_module("diptych.recipes")


def _loss(task: Task, batch: Batch) -> torch.Tensor:
    """The loss of one batch that is the whole global batch."""
    output = task(batch)
    terms = output.terms | task.contrast(output.features, batch["weight"], slice(0, len(batch["weight"])))
    return torch.stack([task.coefficients.get(key, 1.0) * term.sum / term.weight for key, term in terms.items()]).sum()


def _pad(batch: Batch, filler: Batch, garbage: bool) -> Batch:
    """`batch` with 3 rows of padding behind it, of zeros or of what another sample would hold."""
    padded = {}
    for key, value in batch.items():
        rows = filler[key][:3] if garbage else torch.zeros_like(filler[key][:3])
        padded[key] = torch.cat([value, rows])
    padded["slot"][4:], padded["row"][4:], padded["weight"][4:] = -1, -1, 0.0
    return padded
