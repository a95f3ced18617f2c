"""One configuration schema: filled by YAML files and `--a.b=c`, no unknown keys, saved resolved with the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.latency import Workload
from jointnas_kernels.latency.profiler import LONGEST
from jointnas_kernels.latency.schema import Metric
from jointnas_kernels.space import SearchSpace, read_yaml
from jointnas_kernels.space.plain import HeadBits


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no true for 1; `~` is the home folder."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _literally(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("neither true nor false is a value of it")
        return os.path.expanduser(value) if isinstance(value, str) else value


class ModelConfig(Section):
    """Which model is compressed, and where it runs."""

    source: str = Field(
        default="embedded", description="'embedded', smollm2, or folder, .gguf file or hub name of a supported family"
    )
    revision: str | None = Field(default=None, description="hub revision")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: the checkpoint's bfloat16 where the device computes in it natively, else float32",
    )
    device: str = Field(default="auto", description="cpu, cuda or cuda:N; auto: cuda where there is one")
    base_bits: Literal[8] | None = Field(
        default=None, description="8: base weights rounded to 8 bits and kept so between uses; needs checkpointing"
    )


class DataConfig(Section):
    """Token streams. One part trains the LoRA weights, the other the architecture."""

    source: str = Field(
        default="embedded",
        description="'embedded', a .txt, .jsonl, .json or .parquet file, a folder of them, or hf:NAME[/config=SUBSET]",
    )
    text_column: str = Field(default="text", description="of records of plain text; see jointnas.records for others")
    seq_len: int = Field(default=128, ge=2, description="tokens of a window, BOS included")
    batch_size: int = Field(default=8, ge=1)
    arch_fraction: float = Field(
        default=0.5, gt=0, lt=1, description="share of the data that trains the architecture; embedded model: its own"
    )
    held_out_fraction: float = Field(default=0.05, gt=0, lt=0.5, description="for evaluation; embedded: its own")
    max_tokens: int | None = Field(default=None, ge=1, description="read and use only so many tokens for training")
    cache: str | None = Field(
        default=None, description="folder of tokenized files; none: ~/.cache/jointnas/tokens (under $XDG_CACHE_HOME)"
    )


class SpaceConfig(Section):
    """A named space, a YAML file, and overrides of single dimensions."""

    base: str = Field(default="tiny", description="llama3, qllama3, tiny, or a YAML file")
    hidden: list[int] | None = None
    heads: list[int] | None = None
    head_dim: list[int] | None = None
    intermediate: list[int] | None = None
    blocks: list[int] | None = None
    weight_bits: list[int] | Literal["none"] | None = Field(default=None, description="'none': not searched")
    act_bits: list[int] | Literal["none"] | None = Field(default=None, description="'none': not searched")
    group_size: int | None = None
    head_bits: list[int] | Literal["none"] | None = Field(
        default=None, description="of the head's weight: 4, 8, 16; 'none': not searched"
    )

    def build(self) -> SearchSpace:
        """The space.

        Raises:
            JointNASError: unknown name, missing file, or sizes that are not possible.
        """
        is_file = self.base.endswith((".yaml", ".yml")) or "/" in self.base
        base = SearchSpace.from_yaml(self.base) if is_file else SearchSpace.named(self.base)
        values = base.to_dict()
        for key, value in self.model_dump(exclude={"base"}).items():
            if value is not None:
                values[key] = None if value == "none" else value
        return SearchSpace.from_dict(values, where="space")


class LatencyConfig(Section):
    """The latency table and the workload it describes."""

    table: str | None = Field(default=None, description="table file; none: measured into the run folder")
    force: bool = Field(default=False, description="accept a table of another device")
    workload: Literal["prefill", "decode"] = "prefill"
    batch: int = Field(default=1, ge=1)
    seq: int = Field(default=128, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: the model's")
    threads: int | None = Field(default=None, ge=1)
    backends: list[str] | None = Field(default=None, description="which to try; none: all")
    seconds_per_operation: float = Field(
        default=0.03, gt=0, le=LONGEST, description="time spent on each of some hundred operations, by each backend"
    )
    metric: Metric = Field(default="latency", description="what a profile measures")
    calibrate: int = Field(default=6, ge=0, description="whole models measured to fit the overhead; 0: none")
    busy: Literal["stop", "mark"] = Field(
        default="stop", description="where the machine is too busy to be measured, or predictions miss whole models by "
        "more than 25 %: stop, or go on with a table that is marked"
    )  # fmt: skip

    def value(self) -> Workload:
        """The workload alone, of what `loading.resolve` made of the configuration."""
        return Workload(self.workload, self.batch, self.seq, self.dtype)


class SearchConfig(Section):
    """The bilevel loop. Defaults suit a model of billions of parameters; the demo shows those of a small one."""

    steps: int = Field(default=2000, ge=1, description="hard cap; reaching it without convergence is warned about")
    min_steps: int = Field(default=0, ge=0, description="do not stop earlier")
    weight_warmup: int = Field(default=0, ge=0, description="weight steps before the first architecture step")
    lora_rank: int = Field(default=32, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    lr_weight: float = Field(default=2e-4, gt=0)
    lr_arch: float = Field(default=3e-3, gt=0)
    clip_weight: float = Field(default=1.0, gt=0)
    clip_arch: float = Field(default=10.0, gt=0)
    lora_pairs: Literal["per-precision", "shared"] = Field(
        default="per-precision", description="of a linear whose weight bits are searched; shared: not with reconstruct"
    )
    relaxation: Literal["dirichlet", "reinmax", "gumbel"] = Field(default="dirichlet", description="of the widths")
    bit_relaxation: Literal["softmax", "dirichlet", "reinmax", "gumbel"] = Field(
        default="softmax", description="of the bits; softmax: their expected mixture, without a draw"
    )
    alpha_init: float = Field(default=0.0, description="added to the logits of the full sizes")
    importance: bool = Field(default=True, description="reorder channels, heads and blocks by importance first")
    importance_batches: int = Field(default=8, ge=1)
    depth: Literal["importance", "last"] = Field(
        default="importance", description="which blocks fewer of them leave out: the least important, or the last"
    )
    eta: float = Field(default=1.0, ge=0, description="weight of E[latency] / latency of the original")
    budget_min: float | None = Field(default=None, ge=0, description="parameters; below 2: as a share of the original")
    budget_max: float | None = Field(default=None, gt=0, description="parameters; below 2: as a share of the original")
    penalty: Literal["choices", "expectation"] = Field(
        default="choices", description="limits weigh on every choice, or on the expected model (the paper's Eq. 2)"
    )
    lambda_budget: float = Field(default=60.0, ge=0, description="final weight of budget and target-latency penalties")
    lambda_ramp: float = Field(default=0.5, ge=0, le=1, description="share of the steps over which it grows from 0")
    mu_infeasible: float = Field(default=1.0, ge=0, description="weight of the probability of infeasible bits")
    entropy_weight: float = Field(
        default=4.0, ge=0, description="final weight of the sum of normalised entropies, which grows from 0 over the "
        "second half of the steps, so that every dimension is decided at their end"
    )  # fmt: skip
    entropy_stop: float = Field(default=0.3, ge=0, le=1, description="stop when the normalised entropies are lower")
    entropy_stop_on: Literal["max", "mean"] = Field(
        default="max", description="all of them, or their mean over the dimensions (the paper's Eq. 4)"
    )
    skip_most: int = Field(
        default=5, ge=1, description="a step whose loss or gradients are not finite is skipped; so many weight steps, "
        "or architecture steps, in a row end the search"
    )  # fmt: skip
    collapse: float = Field(
        default=0.05, ge=0, le=1, description="end with an error where every dimension is decided within this share of "
        "the steps; 0: never"
    )  # fmt: skip
    log_every: int = Field(default=10, ge=1)
    gap_every: int = Field(default=50, ge=1, description="how often the discretisation gap is measured")
    gap_batches: int = Field(default=2, ge=1)
    save_every: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    gradient_checkpointing: bool = Field(default=False, description="recompute blocks in the backward pass")
    capture: bool = Field(default=True, description="on a CUDA device: replay the supernet's blocks as CUDA graphs")


Method = Literal["rtn", "clip", "gptq", "omniquant", "reconstruct"]


class InitOptions(Section):
    """Initialisation of weight quantizers from calibration windows (gptq, omniquant, reconstruct)."""

    samples: int | None = Field(
        default=None, ge=1, description="calibration windows of data.seq_len tokens; none: 128, or what the data hold"
    )
    batch: int = Field(default=4, ge=1, description="windows run at once, and learned from per step")
    damping: float = Field(default=0.01, gt=0, description="gptq: of the Hessian, as a share of its mean diagonal")
    act_order: bool = Field(default=False, description="gptq: inputs with the largest activations first")
    epochs: int | None = Field(
        default=None, ge=1, description="passes over the windows per block; none: 20 for omniquant, 1 for reconstruct"
    )
    lr_weight: float = Field(
        default=0.015, gt=0, description="reconstruct: of the weights, or of LoRA in a supernet, in quantizer steps"
    )
    lr_ratio: float = Field(default=3e-3, gt=0, description="reconstruct: of the clip logits")
    end_epochs: int | None = Field(
        default=None, ge=0, description="reconstruct, plain models: passes with the whole model after its blocks; "
        "none: 2 below 4 bits, else 0",
    )
    end_lr_weight: float = Field(default=5e-4, gt=0, description="of these, like lr_weight")
    end_lr_ratio: float = Field(default=5e-4, gt=0, description="of these, like lr_ratio")
    lr_clip: float = Field(default=1e-2, gt=0, description="omniquant: of the clip logits")
    lr_transform: float = Field(default=5e-3, gt=0, description="omniquant: of the equivalent transformation")
    transform: bool | None = Field(
        default=None, description="omniquant, plain models: learn it too; none: where activations are quantized"
    )


class QuantizerConfig(Section):
    """How the supernet's weight quantizers start. gptq is for plain models only (`jointnas quantize`)."""

    init: Method = "reconstruct"
    options: InitOptions = InitOptions()


class BitsConfig(Section):
    """One precision for all blocks."""

    weight: int = Field(default=4, ge=2, le=8)
    act: int = Field(default=16, ge=2, le=16, description="16: activations stay as they are")
    group_size: int = Field(default=128, ge=1, description="inputs per scale; o_proj: at most the head dim")
    act_symmetric: bool = Field(default=False, description="activation quantizers without zero point")
    head: HeadBits = Field(default=16, description="of the head's weight; 16: it stays as it is")


class FinetuneConfig(Section):
    """Distillation of the found model from the original, trained through its quantizers:
    kd · KL(original || model) + (1 - kd) · cross-entropy."""

    train: Literal["full", "lora"] = Field(
        default="full", description="all weights, or the search's LoRA pairs alone (no optimizer state of weights)"
    )
    steps: int = Field(default=1000, ge=0)
    lr: float = Field(default=3e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps; then cosine to a tenth")
    weight_decay: float = Field(default=0.01, ge=0)
    kd: float = Field(default=0.7, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    clip: float = Field(default=1.0, gt=0)
    bf16: bool = Field(default=False, description="forward and backward under bf16 autocast, weights as they are")
    gradient_checkpointing: bool = Field(default=False, description="recompute blocks in the backward pass")
    batch_size: int | None = Field(default=None, ge=1, description="none: that of the data section")
    skip_most: int = Field(
        default=5, ge=1, description="so many skipped steps in a row, as those of a search, end the distillation"
    )
    log_every: int = Field(default=20, ge=1)
    save_every: int = Field(default=500, ge=1)


class ParallelConfig(Section):
    """Several processes that train one model, as torchrun starts them; a single process needs none of it."""

    mode: Literal["replicate", "full", "hybrid"] = Field(
        default="replicate", description="every rank has the whole model, all share one copy, or those of a node do"
    )
    shard: int | None = Field(default=None, ge=2, description="hybrid: ranks that share a copy; none: those of a node")
    prepare: Literal["device", "host"] = Field(
        default="device", description="where a shared model is whole before and after; host: if no device can hold it"
    )
    timeout: float = Field(default=60, gt=0, description="seconds after which a rank that does not answer is lost")

    @model_validator(mode="after")
    def _is_possible(self) -> ParallelConfig:
        if self.shard is not None and self.mode != "hybrid":
            raise ValueError("shard is of mode: hybrid")
        if self.prepare == "host" and self.mode == "replicate":
            raise ValueError("prepare: host is of models that are shared; set mode to full or hybrid")
        return self


class EvalConfig(Section):
    """What is reported of a model."""

    tokens: int = Field(default=65536, ge=2, description="held-out tokens for the perplexity")
    context: int | None = Field(
        default=None, ge=2, description="tokens per window of it; none: 256, or what model and text have at most"
    )
    tasks: list[str] = Field(
        default=["embedded"], description="embedded, paper (its seven tasks), names of lm-eval's; []: none"
    )
    shots: int | None = Field(default=None, ge=0, description="few-shot examples; none: the paper's, the task's own")
    task_files: str | None = Field(default=None, description="folder with the tasks' data; none: from the hub")
    task_limit: int | None = Field(default=None, ge=1, description="questions per task; none: all")

    @model_validator(mode="after")
    def _holds_a_window(self) -> EvalConfig:
        if self.context is not None and self.tokens < self.context:
            raise ValueError(f"tokens = {self.tokens} is less than one window of context = {self.context}")
        return self


class RunConfig(Section):
    """One search run."""

    out: str = Field(default="runs/search", description="the run's folder")
    seed: int = Field(default=0, ge=0)
    resume: Literal["auto", "never"] = Field(default="never", description="auto: from the last whole checkpoint")
    target_latency_ms: float | None = Field(default=None, gt=0, description="hard limit on the found model's latency")
    progress: bool = True
    tensorboard: bool = True
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    latency: LatencyConfig = LatencyConfig()
    search: SearchConfig = SearchConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _recomputes_what_is_packed(self) -> RunConfig:
        if self.model.base_bits is None:
            return self
        missing = [k for k in ("search", "finetune") if not getattr(self, k).gradient_checkpointing]
        if missing:
            raise ValueError(
                "model.base_bits saves memory only where blocks are recomputed in the backward pass; set "
                + " and ".join(f"{k}.gradient_checkpointing" for k in missing)
            )
        if self.parallel.mode != "replicate":
            raise ValueError("model.base_bits goes with parallel.mode: replicate only; the others divide the weights")
        return self

    @model_validator(mode="after")
    def _has_a_pair_for_what_is_learned(self) -> RunConfig:
        if self.search.lora_pairs == "shared" and self.quantizer.init == "reconstruct":
            raise ValueError(
                "search.lora_pairs: shared does not go with quantizer.init: reconstruct, which learns a pair per "
                "precision; take rtn, clip or omniquant"
            )
        return self


S = TypeVar("S", bound=Section)


def build(schema: type[S], values: Mapping[str, Any], where: str = "configuration") -> S:
    """Validates plain values; an error names the nearest allowed key, or the bad value's dotted name."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    places = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"  # a section: its message says it
        raise JointNASError(f"{': '.join(filter(None, (where, '.'.join(places), first['msg'])))}{got}")
    section: Any = schema
    for part in places[:-1]:
        section = section.model_fields[part].annotation
    allowed = [".".join([*places[:-1], name]) for name in section.model_fields]
    raise unknown("key", ".".join(places), allowed, where)


def load(path: str | Path) -> RunConfig:
    """A run configuration from a YAML file."""
    return build(RunConfig, read_yaml(path, "configuration file"), where=str(path))


def dump(config: BaseModel) -> str:
    """A configuration as YAML."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
