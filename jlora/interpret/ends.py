"""What of a weight acts at the ends of a product: its output scale and its input transform."""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora.interpret.factored import Factored, Stride, turned, whole
from jlora.interpret.gain import scaled_by
from jlora.interpret.products import Labels, cast, computing


@dataclasses.dataclass(frozen=True)
class Ends:
    """An output scale and an input transform in a product of x and a weight: each acts on x or on the result."""

    weight: Factored
    ws: Labels
    xs: Labels
    out: Labels
    gain_on_x: bool
    turn_on_x: bool

    @classmethod
    def of(cls, weight: Factored, ws: Labels, xs: Labels, out: Labels) -> Ends | None:
        """None if one of them can act at neither end."""
        if weight.roles in ((), ("a", "b"), ("a", "b", "merged")):
            return cls(weight, ws, xs, out, False, False)
        names = lambda factor: {ws[axis] for axis in weight.owned(factor)}
        gain = names(weight.gain) if weight.gain is not None else set()
        turn = set().union(*(names(rows) for rows, _ in weight.turns))
        at = None if weight.turned_axis is None else ws[weight.turned_axis]
        turn_on_x = at in xs and at not in out and turn <= {*xs}
        turn_on_y = at in out and at not in xs and turn <= {*out}
        if not (gain <= {*xs} or gain <= {*out}) or (turn and not (turn_on_x or turn_on_y)):
            return None
        return cls(weight, ws, xs, out, not gain <= {*out}, turn_on_x)

    @property
    def acts_on_x(self) -> bool:
        return self.turn_on_x or self.gain_on_x

    def before(self, x: Any, dtype: Any) -> Any:
        """The input as what acts on it leaves it, in a type to compute in; if nothing does, as it is."""
        if self.acts_on_x:
            x = cast(x, dtype)
        if self.turn_on_x:
            for rows, stride in self.weight.turns:
                x = self._turned(x, self.xs, rows, stride)
        return self._scaled(x, self.xs) if self.gain_on_x else x

    def after(self, y: Any) -> Any:
        y = y if self.gain_on_x else self._scaled(y, self.out, self.weight.keeps_result)
        if self.turn_on_x or not self.weight.turns:
            return y
        given = y.dtype
        y = cast(y, computing(given))
        for rows, stride in reversed(self.weight.turns):
            y = self._turned(y, self.out, rows, stride, transpose=True)
        return cast(y, given)

    def _scaled(self, x: Any, xs: Labels, keeps_result: bool = False) -> Any:
        gain = self.weight.gain
        if gain is None:
            return x
        labels = tuple(self.ws[axis] for axis in self.weight.owned(gain))
        return scaled_by(x, xs, whole(self.weight, gain)[..., 0], labels, keeps_result)

    def _turned(self, x: Any, xs: Labels, rows: Any, stride: Stride, transpose: bool = False) -> Any:
        labels = tuple(self.ws[axis] for axis in self.weight.owned(rows))
        at = self.ws[self.weight.turned_axis or 0]
        return turned(x, xs, whole(self.weight, rows), labels, at, stride, transpose=transpose)
