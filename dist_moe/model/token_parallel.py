"""The forward pass of a step that is partitioned by tokens: each token's residual is on one rank alone, its owner.

    normed = gathered(norm(x)), of all tokens; x += scattered(attention(normed)), own tokens
    chosen = gathered(route(norm(x))); dispatched(norm(x)) to the hosts that compute some of a token's experts;
    x += given back(experts(normed, chosen)), own tokens

What travels is what the consumer would have made of it, so the bits are those of `Transformer`'s other pass. A dense
MLP is an expert that every token picks with weight 1. Shape suffixes: T tokens, D model dim, N rows of logits.
"""

from __future__ import annotations

import numpy as np

from dist_moe.kernels import KvView, LayerBuffers, OperandParts, OperandRows, RoutingRows, SumRows
from dist_moe.kernels.native import Kernels
from dist_moe.model.share import Share
from dist_moe.model.stopwatch import Part, Stopwatch
from dist_moe.model.weights import LayerWeights
from dist_moe.model.workspace import Workspace
from dist_moe.parallel.token_exchange import TokenExchange
from dist_moe.parallel.token_owners import Owners, RowNumbers


class TokenPass:
    """One rank's part in partitioned steps."""

    def __init__(
        self,
        kernels: Kernels,
        exchange: TokenExchange,
        share: Share,
        workspace: Workspace,
        buffers: LayerBuffers,
        stopwatch: Stopwatch,
    ) -> None:
        """Work in the buffers of the other pass.

        Args:
            kernels: What computes.
            exchange: Of tokens.
            share: This rank's.
            workspace: All buffers.
            buffers: Those of a layer, as kernels take them.
            stopwatch: Told where time goes.
        """
        self._kernels, self._exchange = kernels, exchange
        self._workspace, self._buffers = workspace, buffers
        self._stopwatch = stopwatch
        floats, int8 = OperandParts.FLOATS, OperandParts.INT8
        parts = (floats, int8, floats | int8) if share.quantized else (floats,)
        self._normed = {int(read): OperandRows(workspace.normed, read) for read in parts}
        self._head = OperandRows(workspace.head, share.head_parts)
        self._routing = RoutingRows(workspace.ids_TK, workspace.weights_TK)
        nodes = buffers.picks.nodes
        self._wanted_rows = np.empty(nodes * buffers.max_tokens, np.int32)
        self._wanted_count_N = np.empty(nodes, np.int32)

    def owners(self, tokens: int) -> Owners:
        """Who owns which of a step's tokens."""
        return self._exchange.owners(tokens)

    def attention(self, half: LayerWeights, owners: Owners, cache: KvView) -> None:
        """Own residuals += attention; afterwards every rank still has the operand that all of them attended with."""
        kernels, buffers, layer, mark = self._kernels, self._buffers, half.attention, self._stopwatch.mark
        kernels.norm_tokens(buffers, layer, owners.own)
        mark(Part.ATTENTION)
        self._exchange.gather(self._normed[layer.normed_parts], owners)
        mark(Part.EXCHANGE)
        kernels.attend(buffers, layer, cache)
        mark(Part.ATTENTION)
        sums_TD = self._workspace.sums_TD[: owners.count]
        self._exchange.reduce_scatter(sums_TD, SumRows(sums_TD), owners)
        mark(Part.EXCHANGE)
        kernels.add_own_sums(buffers, layer, owners.own)
        mark(Part.ATTENTION)

    def experts(self, half: LayerWeights, owners: Owners) -> None:
        """Own residuals += experts; afterwards every rank knows which experts all tokens picked."""
        kernels, buffers, layer, mark = self._kernels, self._buffers, half.experts, self._stopwatch.mark
        kernels.norm_tokens(buffers, layer, owners.own)
        kernels.route_tokens(buffers, layer, owners.own)
        mark(Part.EXPERTS)
        if layer.routed:
            self._exchange.gather(self._routing, owners)
            mark(Part.EXCHANGE)
        kernels.group_tokens(buffers, layer, owners.count)
        wanted = self._wanted(owners)
        mark(Part.EXPERTS)
        self._exchange.dispatch(self._normed[layer.normed_parts], owners, wanted)
        mark(Part.EXCHANGE)
        kernels.compute_experts(buffers, layer, owners.count)
        mark(Part.EXPERTS)
        sums_TD = self._workspace.sums_TD[: owners.count]
        self._exchange.give_back(sums_TD, SumRows(sums_TD), owners, wanted)
        mark(Part.EXCHANGE)
        kernels.add_own_sums(buffers, layer, owners.own)
        mark(Part.EXPERTS)

    def gather_head(self, owners: Owners) -> None:
        """Give all ranks the operand of lm_head, of which each rank has made the rows that it owns."""
        self._exchange.gather(self._head, owners)

    def _wanted(self, owners: Owners) -> list[RowNumbers]:
        """The tokens that each group of ranks computes some experts of."""
        count_N, T = self._wanted_count_N, owners.count
        row_NT = self._wanted_rows[: len(count_N) * T].reshape(len(count_N), T)
        self._kernels.list_tokens(row_NT, count_N, self._buffers)
        return [row_NT[node, : count_N[node]] for node in self._exchange.node_of_group]
