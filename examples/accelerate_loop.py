"""Search in a training loop of your own under accelerate, saved after 10 of 20 steps and resumed bit for bit. Writes
runs/accelerate."""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas import SearchSpace
from jointnas_kernels import hf

config = LlamaConfig(
    vocab_size=128, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256,
    num_hidden_layers=3,
)  # fmt: skip
space = SearchSpace(hidden=[64, 128], heads=[2, 4], head_dim=[16, 32], intermediate=[128, 256], blocks=[1, 2, 3])
starts = torch.randint(128, (80, 1), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in (starts + 3 * torch.arange(32)) % 128]  # counting in threes


def search(steps: int, save_at: int | None = None, resume: bool = False) -> hf.Supernet:
    torch.manual_seed(0)
    supernet = hf.convert(LlamaForCausalLM(config), space, lora_rank=8)
    optimizer = torch.optim.AdamW([
        {"params": supernet.lora_parameters(), "lr": 1e-2},
        {"params": supernet.arch_parameters(), "lr": 0.05, "betas": (0.5, 0.999), "weight_decay": 0.0},
    ])  # fmt: skip
    accelerator = Accelerator(cpu=True)  # several ranks: DistributedDataParallelKwargs(find_unused_parameters=True)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model, optimizer, loader = accelerator.prepare(supernet, optimizer, loader)
    if resume:
        accelerator.load_state("runs/accelerate")  # seed, step and mode of the draws, too
        loader = accelerator.skip_first_batches(loader, supernet.step)
    for batch in loader:
        supernet.mode("arch" if supernet.step % 2 else "weight")  # whose gradients
        loss = model(**batch).loss  # draws an architecture from (seed, step, mode), and counts the step
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if supernet.step == save_at:
            accelerator.save_state("runs/accelerate")
    print(f"step {supernet.step} of {steps}: loss {loss.item():.3f}")
    return supernet


whole = search(20, save_at=10)
resumed = search(20, resume=True)
pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
print(f"resumed bit for bit: {all(torch.equal(a, b) for a, b in pairs)}")

whole.save_pretrained("runs/accelerate/supernet")
print(hf.Supernet.from_pretrained("runs/accelerate/supernet").argmax())
