"""Drop supernet layers into a Llama, take one weight step and one architecture step, and extract a smaller Llama."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas import SearchSpace
from jointnas_kernels import hf

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512,
    num_hidden_layers=4,
)  # fmt: skip
model = LlamaForCausalLM(config)  # random; a real one: AutoModelForCausalLM.from_pretrained(...)
input_ids = torch.randint(config.vocab_size, (2, 64))

space = SearchSpace(
    hidden=[128, 256], heads=[2, 4], head_dim=[32, 64], intermediate=[256, 512], blocks=[2, 3, 4], weight_bits=[2, 4, 8]
)
supernet = hf.convert(model, space)  # the model's weights, frozen; LoRA pairs; architecture parameters
optimizers = {
    "weight": torch.optim.AdamW(supernet.lora_parameters(), lr=2e-4),
    "arch": torch.optim.Adam(supernet.arch_parameters(), lr=3e-3),
}
generator = torch.Generator().manual_seed(0)
for mode, optimizer in optimizers.items():  # a search alternates the two
    supernet.mode(mode).draw(generator)  # whose gradients; one sampled architecture for this step
    loss = supernet(input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    print(f"{mode} step: loss {loss.item():.3f}")

choice = supernet.argmax()  # what the search has found so far
small = hf.extract(supernet, choice)  # a plain LlamaForCausalLM
print(f"{choice}\n{model.num_parameters():,} -> {small.num_parameters():,} parameters")

supernet.fix(choice)  # one-hot: computes what the extracted model computes
with torch.inference_mode():
    difference = (supernet(input_ids).logits - small(input_ids).logits).abs().max().item()
print(f"max|difference of logits| between the two: {difference:g}")
