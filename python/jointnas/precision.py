"""One precision of a whole model: "W4A8", with a head of other bits "W4A8H8"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from jointnas_kernels.errors import unknown
from jointnas_kernels.space import Choice, SearchSpace


@dataclass(frozen=True)
class Precision:
    """Bits of every block's weights and activations, and of the head's weight; None: the space does not search them."""

    weight: int
    act: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return f"W{self.weight}A{self.act or 16}" + (f"H{self.head}" if self.head is not None else "")

    @classmethod
    def parse(cls, text: str, space: SearchSpace, where: str = "precision") -> Precision:
        """From its name. A head that is not named gets as many bits as the weights, or the next more of the space.

        Raises:
            JointNASError: it is no such name, or the space does not have these bits.
        """
        known = [str(p) for p in precisions(space)]
        found = re.fullmatch(r"W(\d+)A(\d+)(?:H(\d+))?", text)
        if found is None:
            raise unknown("precision", text, known, where)
        weight, act, head = (None if bits is None else int(bits) for bits in found.groups())
        assert weight is not None
        if act == 16 and not space.act_bits:
            act = None
        if head is None and space.head_bits:
            head = next((bits for bits in space.head_bits if bits >= weight), space.head_bits[-1])
        precision = cls(weight, act, head)
        if precision not in precisions(space):
            raise unknown("precision", text, known, where)
        return precision

    def of(self, space: SearchSpace) -> SearchSpace:
        """The space with no other bits."""
        act, head = (None if bits is None else (bits,) for bits in (self.act, self.head))
        return replace(space, weight_bits=(self.weight,), act_bits=act, head_bits=head)

    def on(self, choice: Choice, depth: int) -> Choice:
        """A structure of a model of so many blocks, with these bits."""
        act = None if self.act is None else (self.act,) * depth
        return replace(choice, weight_bits=(self.weight,) * depth, act_bits=act, head_bits=self.head)


def precisions(space: SearchSpace) -> list[Precision]:
    """All that a space has; none where it does not search the bits of weights."""
    return [
        Precision(w, a, h)
        for w in space.weight_bits or ()
        for a in space.act_bits or (None,)
        for h in space.head_bits or (None,)
    ]
