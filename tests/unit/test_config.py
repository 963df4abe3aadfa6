"""Configuration: frozen, typed, addressed by dotted paths, and every complaint names key, value, what is allowed and the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.config import (
    Config,
    ConfigError,
    RunConfig,
    apply_overrides,
    dotted_keys,
    get_path,
    load_config_file,
    load_recipe,
    recipes_of,
    set_path,
    task_config_class,
    task_names,
)
from diptych.documentation import field_documentation

SHIPPED = [(task, recipe) for task in task_names() for recipe in recipes_of(task)]
every_recipe = pytest.mark.parametrize(("task", "recipe"), SHIPPED)
every_task = pytest.mark.parametrize("task", task_names())


@pytest.fixture
def config() -> RunConfig:
    """Some whole configuration."""
    return load_recipe("coca", "smoke")


def test_recipes_are_found() -> None:
    """Discovery that finds nothing would make every test below pass."""
    assert len(SHIPPED) > 0
    assert {"coca", "dalle2_prior"} <= set(task_names())


@every_recipe
def test_recipe_is_whole_and_documented(task: str, recipe: str) -> None:
    """A recipe returns a run of its own task; its docstring says source, command, hardware and expected result."""
    function = recipes_of(task)[recipe]
    loaded = function()
    assert isinstance(loaded, RunConfig)
    assert loaded.task.name == task
    assert loaded.task.needs().keys[:3] == ("slot", "row", "weight")
    text = function.__doc__ or ""
    missing = [word for word in ("Source:", "Command:", "Hardware:", "Expected") if word not in text]
    assert not missing, f"docstring of {task}/{recipe} lacks {missing}"


@every_task
def test_every_task_has_a_smoke_recipe_for_a_cpu(task: str) -> None:
    """`diptych train TASK` starts from it, and any machine can run it."""
    smoke = load_recipe(task, "smoke")
    assert smoke.cluster.gpus_per_worker == 0
    assert smoke.train.steps <= 50


@every_recipe
def test_recipe_survives_json(task: str, recipe: str) -> None:
    """What is stored with the run reads back to an equal configuration, the task's own section included."""
    before = load_recipe(task, recipe)
    after = RunConfig.from_json(before.to_json())
    assert after == before
    assert type(after.task) is task_config_class(task)
    assert dotted_keys(after) == dotted_keys(before)


@every_recipe
def test_every_key_of_a_recipe_can_be_set_to_its_own_value(task: str, recipe: str) -> None:
    """KEY=VALUE with the value that JSON prints changes nothing: values survive the way through the command line."""
    config = load_recipe(task, recipe)
    stored = json.loads(config.to_json())
    for key in dotted_keys(config):
        value = stored
        for name in key.split("."):
            value = value[name]
        assert apply_overrides(config, [f"{key}={json.dumps(value)}"]) == config, key


@every_task
def test_every_field_is_documented(task: str) -> None:
    """`diptych recipes NAME` prints the string under each field."""
    undocumented = [key for key, text in _descriptions(load_recipe(task, "smoke")).items() if not text]
    assert not undocumented


def _descriptions(config: Config, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        found |= (
            _descriptions(value, f"{prefix}{name}.")
            if isinstance(value, Config)
            else {prefix + name: field_documentation(type(config), name)}
        )
    return found


def test_configuration_is_frozen(config: RunConfig) -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.workers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("data.trace=true", "data.trace", True),
        ("data.trace=False", "data.trace", False),
        ("optim.betas=[0.8,0.9]", "optim.betas", (0.8, 0.9)),
        ("optim.betas=0.8,0.9", "optim.betas", (0.8, 0.9)),
        ("data.keep=a.parquet,b.parquet", "data.keep", ("a.parquet", "b.parquet")),
        ("data.keep=", "data.keep", ()),
        ("name=x=y", "name", "x=y"),
        ("data.shards=s3://bucket/{00000..00099}.tar", "data.shards", "s3://bucket/{00000..00099}.tar"),
        ("task.context_length=12", "task.context_length", 12),
        ("task.architecture.width=64", "task.architecture.width", 64),
        ("train.strategy=zero2", "train.strategy", "zero2"),
    ],
)
def test_override(config: RunConfig, override: str, key: str, value: Any) -> None:
    changed = apply_overrides(config, [override])
    assert get_path(changed, key) == value
    others = {name: item for name, item in dotted_keys(config).items() if name != key}
    assert {name: item for name, item in dotted_keys(changed).items() if name != key} == others


@pytest.mark.parametrize("text", ["1", "true", "null", "1e3", "2024", "007"])
def test_text_that_looks_like_another_type_stays_text_where_text_is_wanted(config: RunConfig, text: str) -> None:
    """A run may be called 2024, and a folder true."""
    assert apply_overrides(config, [f"name={text}"]).name == text
    assert apply_overrides(config, [f"data.shards={text}"]).data.shards == text


def test_overrides_apply_in_order(config: RunConfig) -> None:
    assert apply_overrides(config, ["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.step=5", ["train.step", "train.steps"]),
        ("trian.steps=5", ["trian.steps", "train.steps"]),
        ("lr=0.1", ["lr", "optim.lr"]),
        ("task.contxt_length=5", ["task.contxt_length", "task.context_length"]),
        ("train.steps.more=5", ["train.steps.more"]),
        ("=5", ["KEY=VALUE"]),
        ("train.steps=many", ["train.steps", "'many'", "integer", "Optimizer steps"]),
        ("train.steps=0", ["train.steps", "0", "greater than or equal to 1"]),
        ("train.steps=true", ["train.steps", "a number"]),
        ("optim.lr=false", ["optim.lr", "a number"]),
        ("train.steps=2.5", ["train.steps", "2.5", "integer"]),
        ("optim.lr=-1", ["optim.lr", "-1", "greater than 0"]),
        ("optim.betas=0.9", ["optim.betas"]),
        ("train.strategy=zero4", ["train.strategy", "'zero4'", "ddp, zero1, zero2, zero3", "zero"]),
        ("train.precision=bf61", ["train.precision", "Did you mean bf16?"]),
        ("data.validation_share=1", ["data.validation_share", "1", "less than 1"]),
        ("train={}", ["train", "one of its keys", "global_batch_size"]),
        ("train.steps", ["train.steps", "KEY=VALUE", "Example"]),
        ("cluster.read_threads=2", ["cluster.read_threads", "2", "cluster.data_cpus=0"]),
        ("train.offload=true", ["train.offload", "ddp", "zero1"]),
        ("train.micro_batches=100000", ["train.micro_batches", "100000", "global_batch_size"]),
    ],
)
def test_wrong_override_names_key_value_and_remedy(config: RunConfig, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(config, [override])
    message = str(caught.value)
    assert all(part in message for part in parts), message


@every_task
def test_misspelt_keys_of_every_task_are_refused(task: str) -> None:
    """One letter off is never silently another key, nor nothing."""
    config = load_recipe(task, "smoke")
    keys = dotted_keys(config)
    for key in keys:
        wrong = key + "x"
        assert wrong not in keys
        with pytest.raises(ConfigError, match="Did you mean"):
            set_path(config, wrong, 1)


def test_wrong_names_of_task_and_recipe() -> None:
    with pytest.raises(ConfigError, match=r"TASK.*coca2.*Did you mean coca\?"):
        load_recipe("coca2", "smoke")
    with pytest.raises(ConfigError, match=r"--recipe.*smok.*Did you mean smoke\?"):
        load_recipe("coca", "smok")


def test_stored_configuration_with_an_unknown_key_is_refused(config: RunConfig, tmp_path: Any) -> None:
    data = json.loads(config.to_json())
    data["train"]["stepz"] = 4
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"train\.stepz"):
        load_config_file(str(tmp_path / "config.json"))
    data = json.loads(config.to_json()) | {"task": {"name": "nonesuch"}}
    with pytest.raises(ConfigError, match="nonesuch"):
        RunConfig.from_json(json.dumps(data))
    with pytest.raises(ConfigError, match="JSON"):
        RunConfig.from_json("steps: 3")
    with pytest.raises(ConfigError, match=r"missing\.json"):
        load_config_file(str(tmp_path / "missing.json"))


leaves = st.sampled_from(sorted(dotted_keys(load_recipe("coca", "smoke"))))
steps = st.integers(1, 10**12)
floats = st.floats(min_value=1e-12, max_value=1e6, allow_nan=False)


@given(steps=steps, lr=floats, name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20), data=st.data())
def test_set_then_get(steps: int, lr: float, name: str, data: st.DataObject) -> None:
    """What is set is what is got, nothing else changes, the original is untouched, and setting back restores it."""
    before = load_recipe("coca", "smoke")
    values = {"train.steps": steps, "optim.lr": lr, "name": name}
    order = data.draw(st.permutations(list(values)))
    after = before
    for key in order:
        after = set_path(after, key, values[key])
    assert {key: get_path(after, key) for key in values} == values
    assert before == load_recipe("coca", "smoke")
    assert RunConfig.from_json(after.to_json()) == after
    for key in order:
        after = set_path(after, key, get_path(before, key))
    assert after == before


@given(
    key=leaves, value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    """No value makes anything but a valid configuration or a `ConfigError`."""
    config = load_recipe("coca", "smoke")
    try:
        changed = set_path(config, key, value)
    except ConfigError as error:
        assert error.remedy or error.allowed
    else:
        assert get_path(changed, key) is not None or value is None


@given(text=st.text(max_size=30))
def test_any_text_on_the_command_line_is_taken_or_refused(text: str) -> None:
    config = load_recipe("coca", "smoke")
    try:
        apply_overrides(config, [text])
    except ConfigError as error:
        assert str(error)


@given(key=st.from_regex(r"[a-z_]{1,12}(\.[a-z_]{1,12}){0,3}", fullmatch=True))
def test_get_path_knows_a_key_or_says_so(key: str) -> None:
    config = load_recipe("coca", "smoke")
    try:
        get_path(config, key)
    except ConfigError as error:
        assert key in str(error)
    else:
        assert any(name == key or name.startswith(f"{key}.") for name in dotted_keys(config))


def test_errors_travel_between_processes() -> None:
    import pickle

    error = ConfigError("train.steps", 0, "at least 1", "Raise it.")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.key, copy.remedy) == (str(error), "train.steps", "Raise it.")


def test_configuration_needs_no_torch_and_no_ray() -> None:
    """Bad calls, `diptych recipes` and search spaces answer at once."""
    code = (
        "import sys\nfrom diptych.config import *\n[load_recipe(t, r).to_json() for t in task_names() for r in recipes_of(t)]\n"
        "print(sorted({'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "stored", "least", "most"), [("3", 3, 3, 3), ("2..8", "2..8", 2, 8), ('"2..8"', "2..8", 2, 8), ("4..4", 4, 4, 4)]
)
def test_workers_are_a_number_or_a_range(given: str, stored: int | str, least: int, most: int) -> None:
    config = apply_overrides(load_recipe("coca", "smoke"), [f"workers={given}"])
    assert (config.workers, config.least_workers, config.most_workers) == (stored, least, most)
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("given", ["0", "8..2", "2..", "..8", "2...8", "a..b", "1.5", "true", "[2,8]", "-1..3"])
def test_other_workers_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"workers: received .*a whole number from 1 on, or a range such as 2\.\.8"):
        apply_overrides(load_recipe("coca", "smoke"), [f"workers={given}"])


def test_values_that_are_right_only_together_are_accepted_in_any_order() -> None:
    config = load_recipe("gpt2", "smoke")
    for overrides in (["task.model=gpt2", "task.tokenizer="], ["task.tokenizer=", "train.steps=7", "task.model=gpt2"]):
        task = apply_overrides(config, overrides).task
        assert (task.model, task.tokenizer) == ("gpt2", "")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"task.tokenizer: received ''"):
        apply_overrides(config, ["task.tokenizer=", "train.steps=7"])
    with pytest.raises(ConfigError, match=r"task.modle"):
        apply_overrides(config, ["task.modle=gpt2", "task.tokenizer="])
