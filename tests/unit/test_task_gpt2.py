"""GPT-2: losses equal a plain loop over transformers' model, however rows are laid out; padding counts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import GPT2Config as ModelConfig

from diptych.config import ConfigError, apply_overrides, build
from diptych.recipes.gpt2 import GPT2Architecture, GPT2Config, LoraConfig, smoke
from diptych.trainers.tasks.gpt2 import GPT2Task

SIZES = GPT2Architecture(layers=2, width=32, heads=2, positions=32)


def make(**changes: object) -> GPT2Task:
    """A tiny task without dropout."""
    fields = {"architecture": SIZES, "tokenizer": "train:64", "length": 16, "dropout": 0.0} | changes
    return GPT2Task(GPT2Config(**fields), seed=0)


def save_tokenizer(folder: Path, words: int = 40) -> None:
    """A word-level tokenizer with one special token that begins and ends texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "<unk>": 1} | {f"w{index}": index + 2 for index in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token="<unk>").save_pretrained(folder)


def save_model(folder: Path, vocabulary: int = 42) -> GPT2LMHeadModel:
    """A tiny GPT-2 with its tokenizer, as a folder."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(ModelConfig(vocab_size=vocabulary, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def test_fifty_steps_equal_a_plain_loop_over_transformers():
    task = make()
    peer = GPT2LMHeadModel(task.gpt2.config)
    peer.load_state_dict(task.gpt2.state_dict())
    ours, theirs = (torch.optim.AdamW(module.parameters(), lr=1e-3) for module in (task, peer))
    for step in range(50):
        batch = task.example_batch(8, seed=step)
        total, weight = task(batch).terms["next_token"]
        loss = total / weight
        labels = batch["tokens"].masked_fill(~batch["token_mask"], -100)
        expected = peer(batch["tokens"], attention_mask=batch["token_mask"].long(), labels=labels).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), step
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_layout_changes_no_loss_and_no_gradient(batching):
    plain, other = make(), make(batching=batching, buckets=3)
    batch = plain.example_batch(12)
    outputs = [task(batch) for task in (plain, other)]
    torch.testing.assert_close(outputs[1].terms["next_token"].sum, outputs[0].terms["next_token"].sum, rtol=1e-5, atol=0)
    assert outputs[1].report["accuracy"] == outputs[0].report["accuracy"]
    for output in outputs:
        output.terms["next_token"].sum.backward()
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-4, msg=name)
    padding = [float(output.report["padding"].sum / output.report["padding"].weight) for output in outputs]
    assert padding[1] < 0.6 * padding[0], padding


@pytest.mark.parametrize("batching", ["trim", "bucket", "pack"])
def test_padding_rows_contribute_nothing(batching):
    task = make(batching=batching, buckets=2)
    batch = task.example_batch(6)
    cut = {key: value[:4] for key, value in batch.items()}
    padded = dict(batch, weight=torch.tensor([1.0, 1, 1, 1, 0, 0]))
    expected, received = (task(part).terms["next_token"] for part in (cut, padded))
    torch.testing.assert_close(received.sum, expected.sum, rtol=1e-6, atol=0)
    assert received.weight == expected.weight == task.weights(padded)["next_token"] == (cut["token_mask"].sum(1) - 1).sum()
    nothing = task(dict(batch, weight=torch.zeros(6))).terms["next_token"]
    nothing.sum.backward()
    assert nothing.weight == 0
    assert all(p.grad is None or not p.grad.abs().any() for p in task.parameters())


def test_the_end_token_is_learned():
    task = make()
    tokens = torch.tensor([[5, 6, 7, 0] + [0] * 12]).repeat(4, 1)
    mask = torch.arange(16)[None].repeat(4, 1) < 4
    batch = {"tokens": tokens, "token_mask": mask, "weight": torch.ones(4), "slot": torch.arange(4), "row": torch.arange(4)}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for _ in range(30):
        term = task(batch).terms["next_token"]
        optimizer.zero_grad()
        (term.sum / term.weight).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.gpt2(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax() == 0


def test_perplexity_is_over_tokens_not_a_mean_of_means():
    task = make()
    parts = [task.example_batch(3, seed=seed) for seed in range(3)]
    outputs = [task.validate(part) for part in parts]
    rows = {key: torch.cat([output.rows[key] for output in outputs]) for key in outputs[0].rows}
    total = sum(output.terms["next_token"].sum for output in outputs) / sum(output.terms["next_token"].weight for output in outputs)
    assert task.summarise(rows)["perplexity"] == pytest.approx(float(total.detach().exp()), rel=1e-5)


def test_export_loads_in_transformers_and_gives_the_same_logits(tmp_path):
    save_model(tmp_path / "base")
    task = GPT2Task(GPT2Config(model=str(tmp_path / "base"), length=16), seed=0).eval()
    task.export(tmp_path / "out")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2 w3")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, task.gpt2(tokens).logits)


def test_adapters_train_alone_and_merge_at_export(tmp_path):
    save_model(tmp_path / "base")
    config = GPT2Config(model=str(tmp_path / "base"), length=16, dropout=0.0, lora=LoraConfig(rank=4))
    task = GPT2Task(config, seed=0)
    trained = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    batch = task.example_batch(4)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    before = task(batch).terms["next_token"].sum.item()
    for _ in range(10):
        optimizer.zero_grad()
        task(batch).terms["next_token"].sum.backward()
        optimizer.step()
    assert task(batch).terms["next_token"].sum.item() < before
    task.eval().export(tmp_path / "out")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(peer(batch["tokens"]).logits, task.gpt2(batch["tokens"]).logits, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_with_added_tokens_widens_the_embedding(tmp_path):
    save_model(tmp_path / "base", vocabulary=42)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<label>"]})
    tokenizer.save_pretrained(tmp_path / "wider")
    task = GPT2Task(GPT2Config(model=str(tmp_path / "base"), tokenizer=str(tmp_path / "wider"), length=16), seed=0)
    assert task.gpt2.config.vocab_size == 43


def test_the_seed_decides_fresh_weights():
    one, two = make(), make()
    torch.testing.assert_close(one.gpt2.lm_head.weight, two.gpt2.lm_head.weight, rtol=0, atol=0)
    other = GPT2Task(one.config, seed=1)
    assert not torch.equal(one.gpt2.lm_head.weight, other.gpt2.lm_head.weight)


def test_wrong_calls_name_key_and_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"task.length: received 64; allowed: at most task.architecture.positions = 32"):
        build(GPT2Config, {"architecture": SIZES, "tokenizer": "train:64", "length": 64}, "task")
    with pytest.raises(ConfigError, match=r"task.tokenizer: received 'train:many'"):
        apply_overrides(smoke(), ["task.tokenizer=train:many"])
    with pytest.raises(ConfigError, match=r"task.model: received .*nowhere"):
        GPT2Task(GPT2Config(model=str(tmp_path / "nowhere"), length=16), seed=0)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"allowed: a GPT-2. It is a bert"):
        GPT2Task(GPT2Config(model=str(tmp_path / "bert"), length=16), seed=0)
    save_model(tmp_path / "base")
    with pytest.raises(ConfigError, match="at most the model's positions = 32"):
        GPT2Task(GPT2Config(model=str(tmp_path / "base"), length=128), seed=0)
    with pytest.raises(ConfigError, match=r"task.lora.targets"):
        make(lora=LoraConfig(rank=2, targets=("q_proj",)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match="start and end tokens"):
        make(tokenizer=str(tmp_path / "endless"))
    with pytest.raises(ConfigError, match="samples without text"):
        smoke().task.check_data({"captions": 0})
