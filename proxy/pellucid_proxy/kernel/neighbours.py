"""Other owners of packet marks and other transparent proxies, found in what nftables and iptables hold as text. Pure but for listing()."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

_WHOLE = 0xFFFFFFFF
_TIMEOUT_S = 5.0
_NUMBER = r"(0x[0-9a-f]+|\d+)"
_NFT_SET = re.compile(
    rf"(meta|ct) mark set (?:(meta|ct) )?mark (?:(?:&|and) {_NUMBER}(?: (?:\||or|\^|xor) {_NUMBER})?|(?:\||or|\^|xor) {_NUMBER})"
)
_NFT_MATCH = re.compile(rf"mark (?:&|and) {_NUMBER} (?:==|!=|>|<)")
_NFT_WHOLE = re.compile(r"meta mark set (?:(?:0x[0-9a-f]+|\d+)\s*(?:$|[a-z#])|ct mark (?:&|and) )")
_IPTABLES_MASKED = re.compile(rf"--(?:set-xmark|set-mark|mark|tproxy-mark) {_NUMBER}/{_NUMBER}")
_IPTABLES_OR = re.compile(rf"--or-mark {_NUMBER}")
_IPTABLES_RESTORE = re.compile(rf"--(?:nfmask|mask) {_NUMBER}")
_IPTABLES_WHOLE = re.compile(r"--set-xmark \S+/0xffffffff")
_PROXY = re.compile(r"\btproxy (?:ip6? )?to\b|-j TPROXY|\bredirect to\b|-j REDIRECT")


def listing(own_table: str) -> list[str]:
    """The rules of this network namespace that others own, a line each with the table before it. Raises OSError, TimeoutExpired."""
    said = _output("nft", "--terse", "list", "ruleset")
    found = list(_foreign(said, own_table))
    for family, command in (("ip", "iptables-legacy-save"), ("ip6", "ip6tables-legacy-save")):
        names = Path(f"/proc/net/{family}_tables_names")
        if (
            shutil.which(command) and names.exists() and names.read_text().strip()
        ):  # asking makes empty tables otherwise
            found += [f"{command}: {line}" for line in _output(command).splitlines() if line.startswith("-A")]
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False).stdout


def _foreign(said: str, own_table: str) -> Iterator[str]:
    table = ""
    for line in said.splitlines():
        if line.startswith("table "):
            table = " ".join(line.split()[:3])
        elif table and table not in (f"table inet {own_table}", f"table inet {own_table}_tracking"):
            yield f"{table}: {line.strip()}"


def colliding(lines: Iterable[str], mask: int) -> Iterator[tuple[str, int]]:
    """(rule, bits) of the rules that set or compare some bits of mask, but not the whole mark: they are at odds with ours."""
    for line in lines:
        bits = used(line) & mask
        if bits:
            yield line, bits


def used(rule: str) -> int:
    """The bits of marks that a rule sets or compares by a mask; those that it takes as a whole are none."""
    bits = 0
    for of, out_of, keep, put, only in _NFT_SET.findall(rule):
        if of == (out_of or "meta"):
            bits |= _partial((_number(put) | _number(only)) | ((_number(keep) ^ _WHOLE) if keep else 0))
    for match in _NFT_MATCH.findall(rule):
        bits |= _partial(_number(match))
    for value, masked in _IPTABLES_MASKED.findall(rule):
        bits |= _partial(_number(value) | _number(masked))
    for value in (*_IPTABLES_OR.findall(rule), *_IPTABLES_RESTORE.findall(rule)):
        bits |= _partial(_number(value))
    return bits


def overwriting(lines: Iterable[str]) -> list[str]:
    """Rules that set the whole mark of a packet, whatever it was."""
    return [line for line in lines if _NFT_WHOLE.search(line) or _IPTABLES_WHOLE.search(line)]


def proxies(lines: Iterable[str]) -> list[str]:
    """Rules that hand packets to a local listener."""
    return [line for line in lines if _PROXY.search(line)]


def _number(text: str) -> int:
    return int(text, 0) if text else 0


def _partial(bits: int) -> int:
    return 0 if bits == _WHOLE else bits
