"""Export a quantized model, reload it with stock transformers and on the low-bit kernels. Writes small-w4 into the
current folder."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import jointnas
from jointnas_kernels import hf

folder = jointnas.quantize("small-w4", method="rtn", progress=False)  # the embedded model at W4A16

stock = AutoModelForCausalLM.from_pretrained(folder)  # transformers and compressed-tensors, nothing of this package
packed = hf.load(folder)  # the same integers on the low-bit kernels

tokenizer = AutoTokenizer.from_pretrained(folder)
input_ids = tokenizer("The old house stood", return_tensors="pt").input_ids
tokens = packed.generate(input_ids, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(tokens[0]))

with torch.inference_mode():
    difference = (stock(input_ids).logits - packed(input_ids).logits).abs().max().item()
print(f"max|difference of logits|, stock and packed: {difference:.2g}")
