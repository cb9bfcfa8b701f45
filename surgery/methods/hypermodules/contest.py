"""Contest: the alternatives of one generation, which compete for the locations of a bank.

While a contest is open, a sampled location's block is the softmax-weighted sum of what its incumbent and its
challengers generate (MUiR Eq. 8); every other location's block is generated as ever and pays nothing. Soft
weights are parameters with a learning rate of their own. Challengers use the location's own context, as in the
paper, or contexts of their own that were fitted to its block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from surgery.core.kernel import DENSE_CODE, TransposedIndex, generate, transpose
from surgery.methods.hypermodules.alignment import decide, starting_weight


class Contest(nn.Module):
    """Alternatives of N sampled locations of a bank of L.

    Attributes:
        chosen: `[N]` the sampled locations, ascending.
        candidates: `[N, 1+lambda]` hypermodules, the incumbent first.
        soft: parameter `[N, 1+lambda]`.
        contexts: parameter `[N, lambda, c]` of challengers that have their own, else None.
        factors: `[N, 1+lambda]`, by what contexts are multiplied; None where they are used as they are.
        group: `[N]`, numbers of the locations that are decided together, -1 for one that is alone; None where all are.
        saved: `[N, 1+lambda]`, blocks that each alternative saves, once they have a price.
        drawn: `[N]`, the column of the one alternative that is generated, where contests are judged by rewards.
        tried: `[P, N]`, the columns that were drawn since soft weights last moved, and
        costs: `[P, N]`, what each led to.

    Example:
        >>> contest = Contest(torch.tensor([0, 1, 2]), 3, torch.tensor([1]), torch.tensor([[2]]), 1, 0.5)
        >>> contest.soft.tolist(), contest.index.tolist()
        ([[0.0, 0.0]], [0, 1, 2, 2])
    """

    chosen: Tensor
    candidates: Tensor
    factors: Tensor | None
    group: Tensor | None
    index: Tensor
    offset: Tensor
    _source: Tensor
    _place: Tensor

    def __init__(
        self,
        psi: Tensor,
        hypermodules: int,
        chosen: Tensor,
        challengers: Tensor,
        context: int,
        alpha: float,
        contexts: Tensor | None = None,
        factors: Tensor | None = None,
        group: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """Open a contest.

        Args:
            psi: `[L]`, every location on a hypermodule.
            hypermodules: K, new ones counted.
            chosen: `[N]`.
            challengers: `[N, lambda]`.
            context: c.
            alpha: probability of not choosing the incumbent, at the start.
            contexts: `[N, lambda, c]`, where challengers do not use their location's own.
            factors: `[N, 1+lambda]`, by what contexts are multiplied with each alternative; 1 by default.
            group: `[N]` locations that are decided together, whose candidates are the same; -1 for one that is alone.
            dtype: of soft weights: that of the bank's rows.
        """
        super().__init__()
        self.context, self.hypermodules = context, hypermodules
        chosen = chosen.to(psi.device)
        candidates = torch.cat([psi[chosen].unsqueeze(1), challengers.to(psi)], 1)
        weight = starting_weight(alpha, challengers.shape[1])
        start = torch.full(candidates.shape, weight, dtype=dtype, device=psi.device)
        start[:, 0] = 0
        self.soft = nn.Parameter(start)
        self.contexts = None if contexts is None else nn.Parameter(contexts)
        given = {"chosen": chosen, "candidates": candidates, "factors": factors, "group": group}
        for name, tensor in given.items():
            self.register_buffer(name, tensor, persistent=False)
        for name, tensor in zip(("index", "offset"), self._bags(psi), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._transposed: TransposedIndex | None = None
        self.saved: Tensor | None = None
        self.drawn: Tensor | None = None
        self.tried = chosen.new_empty(0, len(chosen))
        self.costs = start.new_empty(0, len(chosen))

    def coefficients(self, contexts: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """`softmax(s_l)_i * z_l` for every entry of the code, in its order: `[E]`. # Eq. (8)

        Args:
            contexts: `[L, c]` of the bank.
            coefficients: `[L, c]` of the bank, contexts times factors; by default the contexts.
        """
        if self.drawn is None:
            probability = self.soft.softmax(1).to(contexts.dtype)
        else:
            probability = one_hot(self.drawn, self.soft.shape[1]).to(contexts.dtype)
        probability = (probability if self.factors is None else probability * self.factors).unsqueeze(2)
        own = contexts.index_select(0, self.chosen).unsqueeze(1)
        rivals = probability * (own if self.contexts is None else torch.cat([own, self.contexts], 1))
        # Entries are gathered from two tables, sampled and not, in the order of the code.
        plain = contexts if coefficients is None else coefficients
        table = torch.cat([plain.reshape(-1), rivals.reshape(-1)])
        return table.index_select(0, self._source)

    def blocks(
        self,
        rows: Tensor,
        contexts: Tensor,
        start: int = 0,
        stop: int | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """Generate the blocks `[L', d]` of locations `start` to `stop`, alternatives weighted. # Eq. (8)

        Args:
            rows: `[K*c, d]` of the bank, new hypermodules among them.
            contexts: `[L, c]` of the bank.
            start: first location.
            stop: one past the last location; the end by default.
            coefficients: `[L, c]` of the bank, contexts times factors; by default the contexts.
        """
        locations = len(contexts)
        stop = locations if stop is None else stop
        coefficient = self.coefficients(contexts, coefficients)
        if locations * len(rows) <= DENSE_CODE:
            code = coefficient.new_zeros(locations * len(rows)).index_add(0, self._place, coefficient)
            return code.view(locations, len(rows))[start:stop] @ rows
        if (start, stop) == (0, locations):
            return generate(rows, self.index, coefficient, self.transposed, self.offset)
        begin, end = int(self.offset[start]), int(self.offset[stop])
        offset = self.offset[start : stop + 1] - begin
        return generate(rows, self.index[begin:end], coefficient[begin:end], offset=offset)

    @property
    def transposed(self) -> TransposedIndex:
        """Users of every row; made once, for the code stays as it is until the contest is decided."""
        if self._transposed is None:
            self._transposed = transpose(self.index, self.hypermodules * self.context, self.offset)
        return self._transposed

    @torch.no_grad()
    def winners(self) -> tuple[Tensor, Tensor]:
        """Locations that take a challenger with a context of its own, and that challenger's column: `[W]` each."""
        winner = self._winner()
        won = (winner > 0) & (self.contexts is not None)
        return self.chosen[won], winner[won] - 1

    @torch.no_grad()
    def decide(self, psi: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The alignment and the contexts after this contest: `psi [L]`, `contexts [L, c]`."""
        winner = self._winner()
        psi, contexts = psi.clone(), contexts.clone()
        psi[self.chosen] = self.candidates.gather(1, winner.unsqueeze(1)).squeeze(1)
        if self.contexts is not None:
            won = winner > 0
            contexts[self.chosen[won]] = self.contexts[won, winner[won] - 1]
        return psi, contexts

    def _winner(self) -> Tensor:
        """The column of each location's winning alternative `[N]`; those of a group have their mean soft weights."""
        soft = self.soft
        if self.group is not None:
            together = self.group >= 0
            group = self.group[together]
            count = torch.bincount(group).to(soft).unsqueeze(1)
            sums = soft.new_zeros(len(count), soft.shape[1]).index_add(0, group, soft[together])
            soft = soft.clone()
            soft[together] = (sums / count)[group]
        return decide(self.candidates, soft)

    def _bags(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """`index [E]` and `offset [L+1]`: c entries where nothing competes, else c for each alternative."""
        locations, c = len(psi), self.context
        count, rivals = self.candidates.shape
        length = torch.full((locations,), c, device=psi.device)
        length[self.chosen] = c * rivals
        offset = torch.cat([length.new_zeros(1), length.cumsum(0)])
        basis = torch.arange(c, device=psi.device)
        index = length.new_empty(int(offset[-1]))
        source = torch.empty_like(index)
        plain = torch.ones(locations, dtype=torch.bool, device=psi.device)
        plain[self.chosen] = False
        rest = plain.nonzero().squeeze(1)
        at = (offset[rest].unsqueeze(1) + basis).reshape(-1)
        index[at] = (psi[rest].unsqueeze(1) * c + basis).reshape(-1)
        source[at] = (rest.unsqueeze(1) * c + basis).reshape(-1)
        steps = torch.arange(c * rivals, device=psi.device)
        at = (offset[self.chosen].unsqueeze(1) + steps).reshape(-1)
        index[at] = (self.candidates.unsqueeze(2) * c + basis).reshape(-1)
        source[at] = locations * c + torch.arange(count * rivals * c, device=psi.device)
        location = torch.arange(locations, device=psi.device).repeat_interleave(length)
        self.register_buffer("_source", source, persistent=False)
        self.register_buffer("_place", location * (self.hypermodules * c) + index, persistent=False)
        return index, offset
