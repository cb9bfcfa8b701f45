"""Every peer, in the order of tables."""

from __future__ import annotations

from benchmarks.frontier.peers.alone import GPTQ, HQQ, ROUNDING
from benchmarks.frontier.peers.bitdelta import BITDELTA
from benchmarks.frontier.peers.shared import FEW_BITS, LOW_RANK, TSV, WHITENED
from benchmarks.frontier.peers.tall import TALL
from benchmarks.frontier.peers.tvq import TVQ
from benchmarks.frontier.peers.ultradelta import ULTRADELTA

PEERS = (ROUNDING, HQQ, GPTQ, FEW_BITS, LOW_RANK, WHITENED, BITDELTA, TALL, TSV, TVQ, ULTRADELTA)
