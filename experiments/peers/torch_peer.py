"""torch's contestants: transformers.generate, TRL's rollout and DistillationTrainer, dense scores.

Runs in the virtual environment of trl.txt; knows nothing of ours but the protocol.
"""

from __future__ import annotations

import os
import tempfile
from importlib import metadata
from typing import Any

import torch

from omniopd_jax.bench.protocol import Spec, Work, serve

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _work(run: Any) -> Work:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}

    def once() -> None:
        run()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    def memory() -> tuple[int, int]:
        now = torch.cuda.memory_allocated()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return now, peak

    about = {"versions": versions, "device": _DEVICE, "threads": torch.get_num_threads()}
    return Work(once, about=about, memory=memory if _DEVICE == "cuda" else None)


def _prompts(spec: Spec, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (spec["batch"], spec["prompt_tokens"])
    return torch.randint(2, vocab_size, shape, generator=generator).to(_DEVICE)


def _model(spec: Spec) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec["dtype"])
    return AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype).to(_DEVICE)


def _rollout_transformers(spec: Spec) -> Work:
    model = _model(spec).eval()
    model.generation_config.eos_token_id = None  # nothing stops early
    tokens = _prompts(spec, model.config.vocab_size)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=spec["new_tokens"],
                pad_token_id=0,
            )

    return _work(run)


def _trainer(spec: Spec) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=spec["batch"],
        max_completion_length=spec["new_tokens"],
        learning_rate=1e-6,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,  # forward KL, as our anchor
        gradient_checkpointing=False,
        bf16=spec["dtype"] == "bfloat16",
        use_cpu=_DEVICE == "cpu",
        report_to=[],
        max_steps=1000,
    )
    rows = Dataset.from_dict({"prompt": ["w2 w3"] * 64})
    trainer = DistillationTrainer(
        model=_model(spec), teacher_model=_model(spec), args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.generation_config.eos_token_id = None  # nothing stops early
    return trainer


def _rollout_trl(spec: Spec) -> Work:
    trainer = _trainer(spec)
    prompts = _prompts(spec, trainer.model.config.vocab_size).tolist()

    def run() -> None:
        drawn = trainer._generate_single_turn(prompts, None, {})
        drawn = drawn[1] if isinstance(drawn, tuple) else drawn
        assert len(drawn) == spec["batch"]
        assert len(drawn[0]) >= spec["new_tokens"], len(drawn[0])

    return _work(run)


def _update_trl(spec: Spec) -> Work:
    """One training step on responses that are there already, then clipping, AdamW and zeroed gradients."""
    trainer = _trainer(spec)
    trainer.create_optimizer_and_scheduler(1000)
    model = trainer.model
    model.train()
    prompts = _prompts(spec, model.config.vocab_size)
    responses = _prompts(dict(spec, prompt_tokens=spec["new_tokens"]), model.config.vocab_size)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": torch.ones_like(responses),
        "num_items_in_batch": torch.tensor(float(responses.numel()), device=_DEVICE),
    }
    trainer._prepare_inputs = lambda batch: batch  # the rollout is measured apart
    trainer.current_gradient_accumulation_steps = 1

    def run() -> None:
        trainer.training_step(model, inputs, responses.numel())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return _work(run)


def _score(spec: Spec) -> Work:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(spec["batch"], spec["new_tokens"], spec["width"], generator=generator).to(_DEVICE)
    embedding = torch.randn(spec["vocabulary"], spec["width"], generator=generator).to(_DEVICE) * spec["width"] ** -0.5
    targets = torch.randint(0, spec["vocabulary"], hidden.shape[:2], generator=generator).to(_DEVICE)

    def run() -> None:
        with torch.no_grad():
            logprobs = torch.log_softmax(hidden @ embedding.T, dim=-1)
            -(logprobs.exp() * logprobs).sum(dim=-1)
            logprobs.gather(-1, targets[..., None])

    return _work(run)


def _products(spec: Spec) -> Work:
    """The matrix products of an update; weights lie as torch.nn.Linear has them, outputs × inputs."""
    generator = torch.Generator().manual_seed(0)
    operands = []
    for rows, inputs, outputs, count, _ in spec["products"]:
        sizes = ((rows, inputs), (rows, outputs), (outputs, inputs), (outputs, inputs))
        for _ in range(count):
            dtype = getattr(torch, spec["dtype"])
            operands.append([torch.randn(size, generator=generator).to(_DEVICE, dtype) for size in sizes])

    def run() -> None:
        with torch.no_grad():
            for x, dy, weight, reference in operands:
                for product in (x @ weight.T, x @ reference.T, dy @ weight, dy.T @ x):
                    del product

    return _work(run)


_PREPARE = {
    ("rollout", "transformers"): _rollout_transformers,
    ("rollout", "trl"): _rollout_trl,
    ("update", "trl"): _update_trl,
    ("score", "torch"): _score,
    ("products", "torch"): _products,
}


def prepare(spec: Spec) -> Work:
    torch.manual_seed(0)
    if hasattr(os, "sched_getaffinity") and _DEVICE == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return _PREPARE[spec["work"], spec["engine"]](spec)


if __name__ == "__main__":
    serve(prepare)
