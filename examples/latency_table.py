"""Measure a latency table on this machine, and predict models from it. Writes table.jsonl into the current folder."""

import torch
from transformers import LlamaConfig

from jointnas import LatencyTable, SearchSpace
from jointnas_kernels import latency

config = LlamaConfig(
    vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512,
    num_hidden_layers=4,
)  # fmt: skip
space = SearchSpace(
    hidden=[128, 256], heads=[4], head_dim=[64], intermediate=[512], blocks=[2, 3, 4], weight_bits=[4, 8]
)

workload = latency.Workload("decode", batch=1, seq=64)  # one token after 64
latency.profile(space, config, "table.jsonl", workload=workload, seconds_per_operation=0.002, progress=False)

table = LatencyTable.load("table.jsonl")
print(table.summary())
for choice in (space.full(), space.sample(torch.Generator().manual_seed(0))):
    print(f"{table.predict(choice, space):.3f} ms: {choice}")

uniform = {
    "hidden": torch.full((2,), 1 / 2), "heads": torch.ones(1), "head_dim": torch.ones(1), "intermediate": torch.ones(1),
    "blocks": torch.full((3,), 1 / 3, requires_grad=True), "weight_bits": torch.full((4, 2), 1 / 2),
}  # fmt: skip
expected = table.expected(space, uniform).latency  # differentiable: an objective of the search
expected.backward()
print(f"{expected.item():.3f} ms expected; slope by number of blocks: {uniform['blocks'].grad.tolist()}")
