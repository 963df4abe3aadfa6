"""open_clip comes without what a model does not need, and with it for one that does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.clip_library import open_clip

UNUSED = ("timm", "wandb", "transformers", "torch._dynamo", "torch._inductor")
TOWER = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}}
WORDS = {"text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


def in_a_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def embedding(folder: Path) -> str:
    """Code that embeds with the model of `folder` and prints what it has imported."""
    return (
        "import sys; from diptych.trainers.clip_embedder import Embedder; from diptych.trainers.model_name import parse_model\n"
        f"print(Embedder(parse_model({str(folder)!r}), precision='fp32').warm_up(('image', 'text')))\n"
        f"print(sorted(set({UNUSED!r}) & set(sys.modules)))"
    )


def save_model(folder: Path, architecture: dict[str, object]) -> Path:
    """A model with random weights in a process of its own, which imports the whole of open_clip."""
    folder.mkdir()
    path = folder / "atom.json"
    path.write_text(json.dumps({"embed_dim": 16} | architecture))
    in_a_process(
        f"import open_clip; from safetensors.torch import save_file; open_clip.add_model_config({str(path)!r})\n"
        "state = open_clip.create_model('atom').state_dict()\n"
        f"save_file({{name: value.contiguous() for name, value in state.items()}}, {str(path.with_suffix('.safetensors'))!r})"
    )
    return folder


def test_a_model_of_open_clips_own_towers_needs_nothing_beside(tmp_path: Path) -> None:
    found = in_a_process(embedding(save_model(tmp_path / "own", TOWER | WORDS)))
    assert found.splitlines() == ["{'text': 16, 'image': 16}", "[]"]


def test_states_of_fewer_tokens_are_the_first_of_the_whole_length(tmp_path: Path) -> None:
    import torch

    from diptych.trainers.text_tower import TextTower

    tower = TextTower(str(save_model(tmp_path / "own", TOWER | WORDS)))
    length = tower.model.context_length
    tokens = torch.zeros(2, length, dtype=torch.long)
    tokens[:, :5] = torch.tensor([[1, 4, 5, 6, 9], [1, 7, 8, 9, 0]])
    states = tower.states(tokens, tokens > 0)
    assert tower.width == states.shape[2]
    torch.testing.assert_close(tower.states(tokens[:, :5], tokens[:, :5] > 0), states[:, :5])
    assert (states[0, :5].std(dim=1) > 0).all()
    assert not states[:, 5:].any()


def test_a_tower_of_timm_brings_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    tower = {"vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear", "image_size": 32}}
    found = in_a_process(embedding(save_model(tmp_path / "timm", tower | WORDS))).splitlines()
    assert found[0] == "{'text': 16, 'image': 16}"
    assert "timm" in found[1]


def test_a_text_tower_of_transformers_brings_transformers() -> None:
    from transformers import BertConfig

    code = (
        "import sys; from diptych import clip_library; from diptych.clip_library import open_clip\n"
        "assert open_clip.hf_model.transformers is None\n"
        "clip_library.complete({'vision_cfg': {}, 'text_cfg': {'hf_model_name': 'any'}})\n"
        "from transformers import BertConfig\n"
        f"config = BertConfig(**{BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).to_diff_dict()!r})\n"
        "tower = open_clip.model.HFTextEncoder('any', 4, config=config, pretrained=False, proj_type='linear')\n"
        "import torch; print(tower(torch.ones(2, 3, dtype=torch.long)).shape[1])"
    )
    assert in_a_process(code) == "4\n"


def test_the_compiler_is_there_for_those_who_ask() -> None:
    code = (
        "import sys, diptych.clip_library, torch, torchvision\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "print(before, is_compile_supported('cpu'), torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    assert in_a_process(code) == "False True 2.0\n"


def test_what_is_imported_already_is_left_alone() -> None:
    code = "import timm, transformers; from diptych.clip_library import open_clip; print(open_clip.timm_model.timm is timm, open_clip.hf_model.transformers is transformers)"
    pytest.importorskip("timm")
    assert in_a_process(code) == "True True\n"


def test_nothing_of_the_package_imports_open_clip_past_this_module() -> None:
    root = Path(__file__).resolve().parents[2] / "diptych"
    found = {
        path.name
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import open_clip", "from open_clip"))
    }
    assert found == {"clip_library.py", "embed_peer.py"}, "embed_peer's is in the program that clip-retrieval runs in"
    assert open_clip.__name__ == "open_clip"
