"""A search of a few steps on the embedded model, from latency table to exported model. Writes into runs/example."""

import json

from jointnas import RunConfig, search

config = RunConfig(
    out="runs/example",
    space={"base": "tiny", "hidden": [256], "heads": [4], "head_dim": [64], "weight_bits": [4, 8], "act_bits": "none"},
    latency={"seq": 64, "seconds_per_operation": 0.001, "calibrate": 0},
    data={"batch_size": 2, "seq_len": 64},
    search={"steps": 4, "lr_arch": 0.05, "budget_max": 0.9, "importance_batches": 1},  # budget: share of the parameters
    quantizer={"options": {"samples": 8, "epochs": 1}},  # calibration windows and passes; the defaults are 128 and 1
    finetune={"steps": 4},
    eval={"tokens": 2048, "tasks": []},
)
folder = search(config)  # table, search, prune, distil, export, evaluate, report

for row in json.loads((folder / "eval.json").read_text()):
    print("{name}: {params:,} parameters, {predicted_ms:.2f} ms, perplexity {perplexity:.1f}".format(**row))
print(f"found {json.loads((folder / 'choice.json').read_text())['choice']}")
print(f"model in {folder / 'final'}, report in {folder / 'report.html'}")
