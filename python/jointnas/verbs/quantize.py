"""`quantize`: post-training quantization of a plain model at one precision, to an exported folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from jointnas import loading
from jointnas.config import BitsConfig, DataConfig, InitOptions, Method, ModelConfig
from jointnas.exporting import export_model
from jointnas.initialise import Bits, calibration_windows, initialise, single_space
from jointnas.initialise.head import quantize_head
from jointnas.run_folder import new
from jointnas_kernels.errors import JointNASError

log = logging.getLogger(__name__)
RECORD = "quantization.jsonl"  # in the exported folder: the errors of every block


def quantize(
    out: str,
    model: ModelConfig = ModelConfig(), bits: BitsConfig = BitsConfig(), method: Method = "reconstruct",  # noqa: B008
    data: DataConfig = DataConfig(), options: InitOptions = InitOptions(),  # noqa: B008
    seed: int = 0, resume: bool = False, progress: bool = True,
) -> Path:
    """Quantizes a model as it is, every block at one precision, and exports it; returns the new folder.

    Args:
        out: new folder. Until it is done, finished blocks are in OUT.partial.
        model: which model.
        bits: of weights and activations.
        method: rtn needs no data; the others learn from calibration windows of `data`.
        data: text of the calibration.
        options: of the methods.
        seed: of the calibration windows and their order.
        resume: continue an interrupted quantization.
        progress: show a progress bar.

    Raises:
        JointNASError: bad input, or `out` exists.
    """
    folder = new(out)
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists() and not resume:
        raise JointNASError(f"{partial} holds an unfinished quantization; pass --resume to continue it, or remove it")
    model_config = loading.model_config(model)
    loading.check_lengths(model_config, data_seq_len=None if method == "rtn" else data.seq_len)
    space = single_space(model_config, bits.weight, bits.act, bits.group_size, bits.head)
    origin, source = loading.origin(model), loading.load_model(model)
    windows = None
    if method != "rtn":
        streams = loading.load_streams(data, model, seed)
        windows = calibration_windows(streams.all, options, data.seq_len, seed, streams.bos)
    rows = initialise(
        source, method, windows, Bits.of(space.full(), space, act_symmetric=bits.act_symmetric), options=options,
        folder=partial, progress=progress, seed=seed,
    )  # fmt: skip
    if bits.head < 16:
        quantize_head(source, bits.head, bits.group_size, windows)
    facts = {}
    by_block = [row for row in rows if "mse" in row]
    if by_block:
        facts["error of the last block"] = f"{by_block[-1]['mse'] / by_block[-1]['power']:.2%} of its output's energy"
    if "kl" in rows[-1]:
        facts["divergence from the original"] = f"{rows[-1]['kl']:.3f} nats per token"
    if caveat := loading.caveat(model):
        facts["note"] = caveat
        log.warning("note: %s", caveat)
    on = "" if windows is None else f" on {windows.numel():,} tokens"
    export_model(
        source, folder, space.full(), range(space.depth), facts=facts,
        story=f"Quantized after training by `{method}`{on}.", **origin,
    )  # fmt: skip
    shutil.copy(partial / "blocks.jsonl", folder / RECORD)
    shutil.rmtree(partial)
    return folder
