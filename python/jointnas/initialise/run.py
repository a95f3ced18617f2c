"""`initialise`: block by block, resumable.

    x_0 = embeddings of the calibration windows
    block b:   y = block(x) of the original;   quantizers of b from (x', y);   x <- y,   x' <- quantized block(x')

x' are the inputs the block sees when everything before it is quantized. In a supernet a block's precision is one choice
of several, and so is that of every block before it: `reconstruct` takes x' behind blocks of the same precision, the
other methods x' = x. Activations of a supernet are not quantized here.

Memory beyond the model: x, x' and y, and what the method needs for one block. With a folder, every finished block is
written at once (`block-000.safetensors`, renamed into place), and its errors to `blocks.jsonl`. A resumed run puts
finished blocks in, carries x and x' through them, and ends where an uninterrupted one would have, bit for bit on a CPU.
Learning end to end starts again where it was killed before its end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from jointnas.config import InitOptions, Method
from jointnas.data import Batches
from jointnas.initialise.bits import Bits
from jointnas.initialise.head import initialise_head
from jointnas.initialise.jobs import Plain, Supernets
from jointnas.initialise.problem import Row, State
from jointnas.initialise.store import Store
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.hf import Supernet
from jointnas_kernels.nn.base import unpacked
from jointnas_kernels.progress import Progress

METHODS: tuple[Method, ...] = get_args(Method)
DATA_FREE = ("rtn", "clip")


def calibration_windows(
    tokens: Tensor, options: InitOptions, seq_len: int, seed: int = 0, bos: int | None = None
) -> Tensor:
    """[samples, seq_len] token ids, drawn from a stream, integers [N] (`data.Streams`); each begins with `bos`."""
    most = len(tokens) // (seq_len - (bos is not None))
    count = options.samples or max(1, min(128, most))
    if most < count:
        raise JointNASError(
            f"options.samples is {count}, but {len(tokens)} tokens of data hold {most} calibration windows "
            f"of {seq_len}; lower options.samples or data.seq_len, or bring more data"
        )
    return Batches(tokens, count, seq_len, seed, bos).at(0).ids


def initialise(
    model: nn.Module, method: Method = "clip", calibration: Tensor | None = None, bits: Bits | None = None, *,
    options: InitOptions | None = None, folder: str | Path | None = None, progress: bool = True, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Initialises the weight quantizers of a supernet, or quantizes a plain model; in place.

    A supernet gets clip ratios for every precision of its space, and (unless by "rtn") of its head. In a plain
    transformers model every linear of a block becomes a `FakeQuantLinear`, whose weight lies on the grid it carries;
    `omniquant` also moves scales between norms and linears where activations are quantized. "rtn" (round to nearest)
    and "clip" (each group's ratio of least squared error, weighed by the energy of its inputs where there is
    calibration) need no `calibration` [windows, tokens]; errors are reported only with it. Finished blocks go to
    `folder`. "reconstruct" learns weights, or a supernet's LoRA pairs, and ratios; a plain model of few bits then also
    end to end (`options.end_epochs`).

    One row per block, or with a supernet per (block, weight bits): the mean squared error of the block's output with
    rounding to nearest (`mse_rtn`), where learning started (`mse_start`) and at the end (`mse`), and the mean square of
    that output (`power`). With reconstruct these are errors on the windows that were not learned from, and there are
    also `error_rtn`, `error_start`, `error`: the means of `blocks.relative_error` there. After learning end to end a
    last row holds `kl_start` and `kl`, the divergence from the original's predictions on those windows, in nats per
    token."""
    if method not in METHODS:
        raise unknown("quantizer initialiser", method, METHODS)
    options = options or InitOptions()
    if calibration is None and method not in DATA_FREE:
        raise JointNASError(
            f"initialise: {method} needs calibration tokens [windows, tokens]; without data: {', '.join(DATA_FREE)}"
        )
    if calibration is not None and (calibration.dim() != 2 or calibration.numel() == 0):
        shape = tuple(calibration.shape)
        raise JointNASError(f"initialise: calibration must be token ids [windows, tokens], got shape {shape}")
    job: Supernets | Plain
    if isinstance(model, Supernet):
        if bits is not None:
            raise JointNASError("initialise: a supernet's bits are those of its space; leave out `bits`")
        if model.space.weight_bits is None and not model.space.quantizes_head:
            return []
        if method == "gptq":
            raise JointNASError(
                "initialise: gptq decides how fixed weights are rounded, but a supernet rounds W + s B A anew in every "
                "step. Allowed for supernets: rtn, clip, omniquant, reconstruct; gptq is for the plain model that "
                "`extract` returns"
            )
        if method == "reconstruct" and next(model.linears())[1].lora_pairs == "shared":
            raise JointNASError(
                "initialise: reconstruct learns a LoRA pair per precision, and this supernet's precisions share one. "
                "Allowed: rtn, clip, omniquant"
            )
        job = Supernets(model, method, options, seed)
        store = None if folder is None else Store(Path(folder), job.settings(calibration))
        if model.space.quantizes_head and method != "rtn":
            initialise_head(model, calibration, None if store is None else store.within("head"))
        if model.space.weight_bits is None:
            return []
    else:
        if bits is None:
            raise JointNASError("initialise: a plain model needs `bits`, e.g. Bits.uniform(model.config, weight=4)")
        job = Plain(model, method, options, bits, seed)
        store = None if folder is None else Store(Path(folder), job.settings(calibration))
    return _walk(job, calibration, store, progress)


@torch.no_grad()
def _walk(job: Supernets | Plain, calibration: Tensor | None, store: Store | None, progress: bool) -> list[Row]:
    blocks, count = job.blocks, len(job.blocks.layers)
    rows: list[Row] = []
    states: list[State] = []
    ended = store.within("end-to-end") if store is not None and job.end_epochs else store
    todo = store is None or ended is None or store.finished() < count or ended.finished() < count
    x = blocks.start(calibration) if calibration is not None and todo else None
    behind = [] if x is None else [x.clone() for _ in range(job.chains)]  # inputs behind quantized blocks
    bar = Progress(f"initialise: {job.method}", count, 0, progress)
    for b in range(count):
        began = time.monotonic()
        with unpacked(blocks.layers[b]):
            y = None if x is None else blocks.advance(b, x.clone())
            found = store.load(b) if store is not None else None
            if found is None:
                state, new = job.solve(b, x, behind, y)
                for row in new:
                    row["seconds"] = time.monotonic() - began
                if store is not None:
                    store.save(b, state, new)
            else:
                state, new = found
            job.install(b, {k: v.to(blocks.device) for k, v in state.items()})
            x = y
            for i, inputs in enumerate(behind):
                blocks.advance(b, inputs, job.weights(b, i))
        rows += new
        if job.end_epochs:
            states.append(state)
        bar.step(**{k: v for k, v in new[-1].items() if k in ("mse_rtn", "mse", "error_rtn", "error")})
    bar.close()
    if isinstance(job, Plain) and job.end_epochs:
        rows.append(_end(job, calibration, x, states, ended))
    if store is not None:
        store.report(rows)
    return rows


def _end(
    job: Plain, calibration: Tensor | None, y: Tensor | None, states: list[State], kept: Store | None
) -> Row:  # fmt: skip
    """Learns end to end, or takes it from its own store, which keeps the result by blocks, too."""
    count = len(states)
    found = [] if kept is None else [block for b in range(count) if (block := kept.load(b)) is not None]
    if len(found) == count:
        states, row = [state for state, _ in found], found[0][1][0]
    else:
        assert calibration is not None
        assert y is not None
        states, row = job.end(calibration, y, states)
        if kept is not None:
            for b, state in enumerate(states):
                kept.save(b, state, [row])
    for b, state in enumerate(states):
        job.install(b, {k: v.to(job.blocks.device) for k, v in state.items()})
    return row
