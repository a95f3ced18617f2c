"""The differentiable expectation against enumeration; feasibility; overhead fit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, OpSpec, Workload, enumerate_ops
from jointnas_kernels.latency.measure import fit
from jointnas_kernels.latency.schema import Calibration
from jointnas_kernels.space import WIDTHS, Choice, SearchSpace
from tests.latency.tables import CONFIG, SPACE, cost, synthetic

RANK = (2, 0, 1)


def random_probs(space: SearchSpace, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = {
        k: torch.rand(len(space.sizes(k)), generator=generator, dtype=torch.float64).softmax(0)
        for k in (*WIDTHS, "blocks")
    }
    for key in ("weight_bits", "act_bits"):
        if space.sizes(key):
            shape = (space.depth, len(space.sizes(key)))
            probs[key] = (3 * torch.rand(shape, generator=generator, dtype=torch.float64)).softmax(1)
    if space.head_bits:
        probs["head_bits"] = torch.rand(len(space.head_bits), generator=generator, dtype=torch.float64).softmax(0)
    return probs


def enumerated(table: LatencyTable, space: SearchSpace, probs: dict[str, torch.Tensor]) -> float:
    """Σ over every choice of P(choice) · latency, by definition."""
    bound = table.bind(space, RANK)
    total = 0.0
    for choice in space:
        p = 1.0
        for key in (*WIDTHS, "blocks"):
            p *= probs[key][space.sizes(key).index(getattr(choice, key))].item()
        for key in ("weight_bits", "act_bits"):
            for b, bits in enumerate(getattr(choice, key) or ()):
                p *= probs[key][b, space.sizes(key).index(bits)].item()
        if choice.head_bits is not None:
            p *= probs["head_bits"][space.sizes("head_bits").index(choice.head_bits)].item()
        total += p * bound.predict(choice)
    return total


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace((64, 128), (2, 4), (16, 32), (64, 192), (1, 2, 3)),
        SearchSpace((64, 128), (4,), (32,), (128,), (1, 3), (2, 8), (8, 16), group_size=64),
        SearchSpace((128,), (2, 4), (16,), (64, 128), (2, 3), (2, 4, 8), None, group_size=64),
        SearchSpace((64, 128), (2,), (16,), (64,), (2, 3), (4, 8), None, group_size=64, head_bits=(4, 8, 16)),
        SearchSpace((64, 128), (2,), (16, 32), (64,), (2, 3), group_size=32, head_bits=(8, 16)),
    ],
    ids=["widths", "joint", "weight-bits", "head-and-weights", "head"],
)
def test_expectation_is_the_enumeration(space: SearchSpace) -> None:
    table = synthetic(space)
    table = LatencyTable(
        table.header,
        table.rows,
        Calibration(fixed=0.3, per_block=0.07, mape_before=0.1, mape=0.0, points=[(1.0, 1, 1.0)]),
    )
    probs = random_probs(space)
    expected = table.expected(space, probs, RANK)
    assert expected.infeasible.item() == pytest.approx(0, abs=1e-12)
    assert expected.latency.item() == pytest.approx(enumerated(table, space, probs), rel=1e-10)


def test_expectation_of_a_certain_choice_is_its_prediction(table: LatencyTable) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        choice = SPACE.sample(generator)
        probs = {
            k: torch.tensor([float(s == getattr(choice, k)) for s in SPACE.sizes(k)], dtype=torch.float64)
            for k in (*WIDTHS, "blocks")
        }
        for key in ("weight_bits", "act_bits"):
            probs[key] = torch.tensor(
                [[float(s == b) for s in SPACE.sizes(key)] for b in getattr(choice, key)], dtype=torch.float64
            )
        expected = table.expected(SPACE, probs, RANK).latency.item()
        assert expected == pytest.approx(table.predict(choice, SPACE, RANK), rel=1e-12)


def test_gradient(table: LatencyTable) -> None:
    logits = {k: p.log().requires_grad_() for k, p in random_probs(SPACE).items()}

    def value(*flat: torch.Tensor) -> torch.Tensor:
        probs = {k: v.softmax(-1) for k, v in zip(logits, flat, strict=True)}
        return table.expected(SPACE, probs, RANK).latency

    assert torch.autograd.gradcheck(value, tuple(logits.values()), atol=1e-7)


def not_w2a16(spec: OpSpec) -> bool:
    return (spec.wbits, spec.abits) != (2, 16)


def test_infeasible_pairs_are_conditioned_on_and_reported() -> None:
    table = synthetic(feasible=not_w2a16)
    probs = random_probs(SPACE)
    expected = table.expected(SPACE, probs, RANK)
    bound = table.bind(SPACE, RANK)
    mass = probs["weight_bits"][:, 0] * probs["act_bits"][:, 1]  # P(W2A16) of each block
    share = (mass @ bound.keep) / bound.keep.sum(0)  # of the kept blocks, for every depth
    assert expected.infeasible.item() == pytest.approx((share @ probs["blocks"]).item())
    plain = synthetic().expected(SPACE, probs, RANK).latency.item()
    assert expected.latency.item() != pytest.approx(plain)
    certain = {k: torch.zeros_like(v) for k, v in probs.items()}
    for v in certain.values():
        v[..., 0] = 1.0  # W2 with A8: feasible
    choice = Choice(64, 2, 16, 64, 1, (2,) * 3, (8,) * 3)
    assert bound.expected(certain).latency.item() == pytest.approx(bound.predict(choice))
    with pytest.raises(JointNASError, match=r"W2A16 .* infeasible"):
        bound.predict(Choice(64, 2, 16, 64, 1, (2,) * 3, (16,) * 3))


def test_infeasible_at_some_widths_only() -> None:
    table = synthetic(feasible=lambda s: s.wbits != 2 or s.k != 128)
    probs = random_probs(SPACE)
    expected = table.expected(SPACE, probs)
    assert 0 < expected.infeasible.item() < 1
    assert torch.isfinite(expected.latency)


def test_restrict_removes_and_reports_bits_nothing_can_run() -> None:
    table = synthetic(feasible=lambda s: s.wbits != 2)
    space, removed = table.restrict(SPACE)
    assert space.weight_bits == (4, 8)
    assert space.act_bits == SPACE.act_bits
    assert removed == ["weight_bits 2: infeasible on this device"]
    coverage = table.coverage(SPACE, CONFIG)
    assert set(coverage.infeasible) == {"W2A8", "W2A16"}
    assert not coverage.missing
    assert "not on this device" in str(coverage)


def test_nothing_feasible_is_one_error() -> None:
    table = synthetic(feasible=lambda s: s.wbits == 16)
    with pytest.raises(JointNASError, match="no feasible bits"):
        table.restrict(SPACE)


HEAD_SPACE = SearchSpace.from_dict({**SPACE.to_dict(), "head_bits": [4, 8, 16]})


def test_the_heads_rows() -> None:
    """One at each precision and width, with activations of 16 bits, in the space's groups; the dense one always."""
    space = SearchSpace.from_dict({**SPACE.to_dict(), "head_bits": [4, 8]})
    rows = [s for s in enumerate_ops(space, CONFIG, Workload(batch=3, seq=16)) if s.op == "lm_head"]
    keys = ((4, 64), (8, 64), (16, 0))
    assert rows == [OpSpec("lm_head", 3, 97, h, w, 16, group) for h in (64, 128) for w, group in keys]
    plain = [s for s in enumerate_ops(SPACE, CONFIG, Workload(seq=16)) if s.op == "lm_head"]
    assert plain == [OpSpec("lm_head", 1, 97, h) for h in (64, 128)]


def test_the_head_is_predicted_at_its_bits() -> None:
    table, choice = synthetic(HEAD_SPACE), HEAD_SPACE.full()
    base = table.predict(choice, HEAD_SPACE)
    assert base == pytest.approx(synthetic().predict(replace(choice, head_bits=None), SPACE), rel=1e-12)
    for bits in (4, 8):
        saved = cost(OpSpec("lm_head", 1, 97, 128)) - cost(OpSpec("lm_head", 1, 97, 128, bits, 16, 64))
        assert base - table.predict(replace(choice, head_bits=bits), HEAD_SPACE) == pytest.approx(saved)
    assert table.bind(HEAD_SPACE).original() == pytest.approx(synthetic().bind(SPACE).original(), rel=1e-12)
    with pytest.raises(JointNASError, match=r"lacks 4 operations of this space, first lm_head 1x97x64 W4A16"):
        synthetic().bind(HEAD_SPACE)


def test_gradient_of_the_heads_bits() -> None:
    table = synthetic(HEAD_SPACE, lambda s: s.op != "lm_head" or s.wbits != 4 or s.k != 64)
    logits = {k: p.log().requires_grad_() for k, p in random_probs(HEAD_SPACE).items()}

    def value(*flat: torch.Tensor) -> torch.Tensor:
        probs = {k: v.softmax(-1) for k, v in zip(logits, flat, strict=True)}
        return torch.stack(table.expected(HEAD_SPACE, probs, RANK))

    assert torch.autograd.gradcheck(value, tuple(logits.values()), atol=1e-7)


def test_heads_that_nothing_can_run() -> None:
    """At one width: conditioned on, and reported; the value is removed from the space, as at all of them."""
    table, space = synthetic(HEAD_SPACE, lambda s: s.op != "lm_head" or s.wbits != 4 or s.k != 64), HEAD_SPACE
    probs = random_probs(space)
    expected = table.expected(space, probs, RANK)
    infeasible = probs["hidden"][0] * probs["head_bits"][0]
    assert expected.infeasible.item() == pytest.approx(infeasible.item())
    total = 0.0
    for hidden, head in itertools.product(space.hidden, space.sizes("head_bits")):
        certain = {k: v.clone() for k, v in probs.items()}
        for key, size in (("hidden", hidden), ("head_bits", head)):
            certain[key] = torch.tensor([float(s == size) for s in space.sizes(key)], dtype=torch.float64)
        if (hidden, head) != (64, 4):
            p = (certain["head_bits"] @ probs["head_bits"]).item()
            p /= (1 - probs["head_bits"][0]).item() if hidden == 64 else 1.0
            p *= (certain["hidden"] @ probs["hidden"]).item()
            total += p * table.expected(space, certain, RANK).latency.item()
    assert expected.latency.item() == pytest.approx(total)
    with pytest.raises(JointNASError, match="a 4-bit head of 64 channels is infeasible on this device"):
        table.predict(replace(space.full(), hidden=64, head_bits=4), space)
    restricted, removed = table.restrict(space)
    assert (restricted.head_bits, removed) == ((8, 16), ["head_bits 4: infeasible on this device"])
    only = SearchSpace.from_dict({**SPACE.to_dict(), "head_bits": [4]})
    with pytest.raises(JointNASError, match=r"no feasible head_bits.*head_bits 4"):
        synthetic(only, lambda s: s.op != "lm_head" or s.wbits == 16).restrict(only)


def test_missing_operations_are_named(table: LatencyTable) -> None:
    partial = LatencyTable(table.header, table.rows[5:])
    with pytest.raises(JointNASError, match="lacks 5 operations"):
        partial.bind(SPACE)
    assert len(partial.coverage(SPACE, CONFIG).missing) == 5


def test_fastest_backend_wins(table: LatencyTable) -> None:
    row = table.rows[-1]
    faster = row.model_copy(update={"backend": "other", "median": row.median / 2, "p10": row.p10 / 2})
    merged = LatencyTable(table.header, [*table.rows, faster])
    assert merged.best(row.spec) == faster


def test_fit_recovers_the_overhead() -> None:
    points = [(o, b, 0.4 + 0.11 * b + o) for o, b in itertools.product((0.5, 1.0, 3.0), (1, 2, 6))]
    fitted = fit(points)
    assert fitted.fixed == pytest.approx(0.4)
    assert fitted.per_block == pytest.approx(0.11)
    assert fitted.mape < 1e-9 < fitted.mape_before


def test_fit_is_never_negative() -> None:
    fitted = fit([(2.0, 1, 1.0), (4.0, 2, 2.0), (6.0, 3, 3.5)])
    assert fitted.fixed >= 0
    assert fitted.per_block >= 0
