"""Connection tracking that others' `flush ruleset` does not switch off.

The kernel tracks connections while a rule asks for it. When the last such rule is flushed, what slips through meanwhile is seen by
nobody. So the agent holds a table of its own with one rule that no packet ever reaches. It belongs to the agent's socket
(NFT_TABLE_F_OWNER, Linux 5.12): nobody else can change or flush it, and it goes with the socket, however the process ends.
"""

from __future__ import annotations

import socket
import struct

from . import netlink
from .nftables import GENERAL, INET, SUBSYSTEM, TABLE

_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = SUBSYSTEM | 0, SUBSYSTEM | 3, SUBSYSTEM | 6
_BATCH = struct.pack("=BB", 0, 0) + struct.pack("!H", SUBSYSTEM >> 8)
_APPEND = 0x800
_OWNER = 0x2  # NFT_TABLE_F_OWNER
_CHAIN = b"asks\0"


def keep(table: str) -> socket.socket:
    """Connections are tracked until the socket that is returned is closed; the table is called after ours. Raises OSError."""
    own = netlink.attribute(TABLE, f"{table}_tracking".encode() + b"\0")
    general = GENERAL.pack(INET, 0)
    state = netlink.nested(
        1,
        netlink.attribute(1, b"ct\0"),
        netlink.nested(2, netlink.attribute(1, _be32(1)), netlink.attribute(2, _be32(0))),
    )  # NFTA_LIST_ELEM: NFTA_EXPR_NAME, NFTA_EXPR_DATA: NFTA_CT_DREG, NFTA_CT_KEY (state)
    flags = netlink.REQUEST | netlink.CREATE
    holding = netlink.opened(netlink.NETLINK_NETFILTER)
    try:
        batch = [
            netlink.message(_BEGIN, netlink.REQUEST, _BATCH),
            netlink.message(_NEW_TABLE, flags, general + own + netlink.attribute(2, _be32(_OWNER))),
            netlink.message(_NEW_CHAIN, flags, general + own + netlink.attribute(3, _CHAIN)),
            netlink.message(
                _NEW_RULE,
                flags | _APPEND | netlink.ACK,
                general + own + netlink.attribute(2, _CHAIN) + netlink.nested(4, state),
            ),
            netlink.message(_END, netlink.REQUEST, _BATCH),
        ]
        for _ in netlink.asked(holding, b"".join(batch)):
            pass
    except BaseException:
        holding.close()
        raise
    return holding


def _be32(number: int) -> bytes:
    return number.to_bytes(4, "big")
