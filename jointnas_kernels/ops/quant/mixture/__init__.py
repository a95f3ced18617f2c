"""quant_lora_mix, the mixture of a weight's precisions, and quant_lora_linear, the layer on it that never forms dW."""
