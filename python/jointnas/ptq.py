"""Post-training quantization of a plain model at one precision, to an exported folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from jointnas import artifact, models
from jointnas import data as data_module
from jointnas.config import BitsConfig, DataConfig, InitOptions, Method, ModelConfig
from jointnas.initialise import DATA_FREE, Bits, calibration_windows, initialise, single_space
from jointnas_kernels.errors import JointNASError

RECORD = "quantization.jsonl"  # in the exported folder: the errors of every block


def quantize(
    out: Path,
    model: ModelConfig,
    bits: BitsConfig,
    method: Method,
    data: DataConfig,
    options: InitOptions,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """See `jointnas.quantize`."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists():
        raise JointNASError(f"{out} exists; choose another folder")
    if partial.exists() and not resume:
        raise JointNASError(f"{partial} holds an unfinished quantization; pass --resume to continue it, or remove it")
    config = models.model_config(model)
    space = single_space(config, bits.weight, bits.act, bits.group_size)
    source = models.load_model(model)
    windows = None
    if method not in DATA_FREE:
        tokenizer = None if data.source == "embedded" else models.load_tokenizer(model)
        tokens = data_module.load(data, tokenizer, seed).all
        windows = calibration_windows(tokens, options, data.seq_len, seed)
    rows = initialise(
        source, method, windows, Bits.of(space.full(), space, act_symmetric=bits.act_symmetric), options=options,
        folder=partial, progress=progress, seed=seed,
    )  # fmt: skip
    facts = {}
    if "mse" in rows[-1]:
        facts["error of the last block"] = f"{rows[-1]['mse'] / rows[-1]['power']:.2%} of its output's energy"
    on = "" if windows is None else f" on {windows.numel():,} tokens"
    licence, notices = models.licence(model)
    artifact.export(
        source, out, space.full(), range(space.depth), facts=facts, base=model.source, licence=licence, notices=notices,
        tokenizer=models.load_tokenizer(model) if models.has_tokenizer(model) else None,
        story=f"Quantized after training by `{method}`{on}.",
    )  # fmt: skip
    shutil.copy(partial / "blocks.jsonl", out / RECORD)
    shutil.rmtree(partial)
    return out
