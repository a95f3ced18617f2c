"""Search with transformers' Trainer: 20 steps, and the last 10 of them again from a checkpoint, as after a kill.
Writes runs/trainer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from jointnas import SearchCallback, SearchSpace
from jointnas_kernels import hf

config = LlamaConfig(
    vocab_size=128, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256,
    num_hidden_layers=3,
)  # fmt: skip
space = SearchSpace(
    hidden=[64, 128], heads=[2, 4], head_dim=[16, 32], intermediate=[128, 256], blocks=[1, 2, 3], weight_bits=[4, 8],
    group_size=64,
)  # fmt: skip
starts = torch.randint(128, (64, 1), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in (starts + 3 * torch.arange(32)) % 128]  # counting in threes


def search_for(steps: int, folder: str, checkpoint: str | None = None) -> Trainer:
    torch.manual_seed(0)
    supernet = hf.convert(LlamaForCausalLM(config), space, lora_rank=8)
    args = TrainingArguments(
        folder, max_steps=steps, save_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none",
    )  # fmt: skip
    search = SearchCallback(arch_every=2, lr_arch=0.05)  # every second optimizer step trains the architecture
    trainer = Trainer(
        supernet, args, train_dataset=data, callbacks=[search],
        optimizer_cls_and_kwargs=search.optimizer_cls_and_kwargs(supernet, args),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


whole = search_for(20, "runs/trainer/whole")
resumed = search_for(20, "runs/trainer/resumed", checkpoint="runs/trainer/whole/checkpoint-10")
pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
print(f"resumed bit for bit: {all(torch.equal(a, b) for a, b in pairs)}")

supernet = hf.Supernet.from_pretrained("runs/trainer/whole/checkpoint-20")  # a checkpoint is a saved supernet
choice = supernet.argmax()
small = hf.extract(supernet, choice)  # a plain LlamaForCausalLM
small.save_pretrained("runs/trainer/small")
print(f"{small.num_parameters():,} parameters: {choice}")
