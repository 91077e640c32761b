"""What cannot work is refused with its cure and the promised exit status, and leaves the node as it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pellucid_cli.lab.clients import get
from pellucid_cli.lab.servers import speak_http
from pellucid_proxy.agent.status import read_status

from ..world import eventually
from .conftest import Figure
from .stage import INSTALLATION, Stage, policy

FAILED, WRONG, CANNOT = 1, 2, 3
SITE = "site.example"
RULES = policy(f"""
  - {{name: site, match: {{destinations: [{{domain: {SITE}}}]}}, action: Allow}}
  - {{match: {{}}, action: Block}}
""")
PATIENCE_S = 20.0


@dataclass
class Try:
    """One start that must fail. A case changes it, and its stage; left: what the stage must be put back by."""

    stage: Stage
    state: Path
    options: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    undo: ExitStack = field(default_factory=ExitStack)

    def ip(self, *words: str) -> None:
        """`ip` with words, in the node, and `del` for `add` afterwards."""
        self.stage.node.run(["ip", *words])
        self.undo.callback(self.stage.node.run, ["ip", *("del" if word == "add" else word for word in words)])

    def listen(self, address: str, port: int) -> None:
        self.undo.enter_context(self.stage.node.listen(address, port))

    def sysctl(self, name: str, value: str, after: str) -> None:
        self.stage.node.set_sysctls({name: value})
        self.undo.callback(self.stage.node.set_sysctls, {name: after})

    def replace(self, name: str, text: str) -> None:
        """A file of the policy folder has that text."""
        before = (self.stage.policy / name).read_text()
        self.stage.write(name, text)
        self.undo.callback(self.stage.write, name, before)

    def fake_nft(self, script: str) -> None:
        """The first nft on PATH is a shell script; $NFT is the real one."""
        folder = self.state.parent / "bin"
        folder.mkdir()
        (folder / "nft").write_text(f"#!/bin/sh\nNFT={shutil.which('nft')}\n{script}\n")
        (folder / "nft").chmod(0o755)
        self.env["PATH"] = f"{folder}:{self.env['PATH']}"

    def run(self) -> subprocess.CompletedProcess[str]:
        command = [*self.before, *self.stage.command(*self.options, state=self.state)]
        child = self.stage.node.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env)
        try:
            out, err = child.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.terminate()
            _, err = child.communicate()
            raise AssertionError(f"it runs:\n{err.decode()}") from None
        return subprocess.CompletedProcess(command, child.returncode, out.decode(), err.decode())


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("bad")) as built:
        built.serve("web", {80: speak_http})
        built.write("policy.yaml", RULES)
        yield built


def _no_rights(attempt: Try) -> None:
    attempt.before = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def _without(*capabilities: str) -> Callable[[Try], None]:
    def prepare(attempt: Try) -> None:
        attempt.before = ["setpriv", "--bounding-set=" + ",".join(f"-{each}" for each in capabilities)]

    return prepare


def _worker_user(name: str) -> Callable[[Try], None]:
    def prepare(attempt: Try) -> None:
        attempt.options += ["--worker-user", name]

    return prepare


def _no_ipv6(attempt: Try) -> None:
    attempt.sysctl("net.ipv6.conf.lo.disable_ipv6", "1", "0")


def _no_nft(attempt: Try) -> None:
    attempt.before = ["env", f"PATH={attempt.state.parent}"]


def _old_nft(attempt: Try) -> None:
    attempt.fake_nft('[ "$1" = --version ] && echo "nftables v0.9.0 (Fearless Fosdick)" && exit; exec $NFT "$@"')


def _old_kernel(attempt: Try) -> None:
    attempt.fake_nft("""
[ "$1" = -c ] || exec $NFT "$@"
rules=$(cat)
case $rules in *tproxy*) echo "/dev/stdin:1:1-2: Error: Could not process rule: No such file or directory" >&2; exit 1;; esac
echo "$rules" | $NFT "$@"
""")


def _nft_of_another_syntax(attempt: Try) -> None:
    attempt.fake_nft("""
[ "$1" = -f ] || [ "$1" = -c ] || exec $NFT "$@"
echo "/dev/stdin:1:1-2: Error: syntax error, unexpected newline" >&2; exit 1
""")


def _nft_fails_in_earnest(attempt: Try) -> None:
    attempt.fake_nft("""
[ "$1" = -f ] || exec $NFT "$@"
rules=$(cat)
case $rules in *chain*) echo "/dev/stdin:1:1-2: Error: Could not process rule: Operation not supported" >&2; exit 1;; esac
echo "$rules" | $NFT "$@"
""")


def _mark_taken(attempt: Try) -> None:
    attempt.ip("rule", "add", "fwmark", "0x1000/0x3000", "lookup", "77", "pref", "9000")


def _mark_taken_in_ipv6(attempt: Try) -> None:
    attempt.ip("-6", "rule", "add", "fwmark", "0x40/0x40", "lookup", "77", "pref", "9000")


def _table_taken(attempt: Try) -> None:
    attempt.ip("route", "add", "198.51.100.0/24", "dev", "srv-web", "table", "15001")


def _rule_to_our_table(attempt: Try) -> None:
    attempt.ip("rule", "add", "from", "198.51.100.0/24", "lookup", "15001", "pref", "9000")


def _preference_taken(attempt: Try) -> None:
    attempt.ip("rule", "add", "from", "198.51.100.0/24", "lookup", "77", "pref", "101")


def _port_taken(attempt: Try) -> None:
    attempt.listen("127.0.0.1", 15001)


def _port_taken_in_ipv6(attempt: Try) -> None:
    attempt.listen("::1", 15001)


def _metrics_port_taken(attempt: Try) -> None:
    attempt.listen("127.0.0.1", 9090)
    attempt.options += ["--metrics", "127.0.0.1:9090"]


def _metrics_address_of_others(attempt: Try) -> None:
    attempt.options += ["--metrics", "203.0.113.9:9090"]


def _flows_in_no_folder(attempt: Try) -> None:
    attempt.options += ["--flows", str(attempt.state.parent / "no" / "flows")]


def _flows_to_a_pipe_that_nobody_reads(attempt: Try) -> None:
    os.mkfifo(attempt.state.parent / "pipe")
    attempt.options += ["--flows", str(attempt.state.parent / "pipe")]


def _state_is_a_file(attempt: Try) -> None:
    attempt.state.write_text("")


def _state_not_to_be_made(attempt: Try) -> None:
    attempt.state = Path("/proc/pellucid")


def _scope_missing(attempt: Try) -> None:
    attempt.replace("installation.yaml", INSTALLATION.replace(re.search(r"podCIDRs: \[.*?\], ", INSTALLATION)[0], ""))  # type: ignore[index]


def _mask_of_one_bit(attempt: Try) -> None:
    attempt.replace("installation.yaml", INSTALLATION.replace("spec: {", "spec: {marks: {mask: 4096}, "))


def _syntax(attempt: Try) -> None:
    attempt.replace("policy.yaml", RULES + "---\nkind: [")


def _value(attempt: Try) -> None:
    attempt.replace("policy.yaml", RULES.replace("action: Allow", "action: Alow"))


def _feature(attempt: Try) -> None:
    attempt.replace("policy.yaml", RULES.replace("action: Allow", "action: Allow, egress: {interface: wg0}"))


def _empty_file(attempt: Try) -> None:
    attempt.replace("policy.yaml", "")


def _unreadable(attempt: Try) -> None:
    (attempt.stage.policy / "dangling.yaml").symlink_to("nowhere")
    attempt.undo.callback((attempt.stage.policy / "dangling.yaml").unlink)


def _empty_folder(attempt: Try) -> None:
    folder = attempt.state.parent / "empty"
    folder.mkdir()
    attempt.options += ["--policy", str(folder)]


def _missing_folder(attempt: Try) -> None:
    attempt.options += ["--policy", str(attempt.state.parent / "missing")]


CASES: dict[str, tuple[Callable[[Try], None], int, str]] = {  # what: how, exit status, what it says (a pattern)
    "no rights": (_no_rights, CANNOT, "lacks the capability NET_ADMIN; run as root"),
    "no NET_RAW": (_without("net_raw"), CANNOT, "lacks the capability NET_RAW; run as root"),
    "no IPv6": (_no_ipv6, CANNOT, r"fd00:244:1::/64 is IPv6, which is off here; leave it out, or enable IPv6"),
    "nft missing": (_no_nft, CANNOT, "nft: the command is missing; install the package nftables"),
    "nft too old": (_old_nft, CANNOT, r"nftables v0\.9\.0 .* is too old; install nftables 1\.0 or later"),
    "a kernel without tproxy": (_old_kernel, CANNOT, "the kernel's nftables lack: tproxy; load the modules nft_tproxy"),
    "an nft of another syntax": (_nft_of_another_syntax, CANNOT, "lack: .*load the modules|does not know our syntax"),
    "a kernel that refuses in earnest": (_nft_fails_in_earnest, CANNOT, "Operation not supported; the kernel lacks a feature"),
    "mark taken": (_mark_taken, CANNOT, "fwmark 0x1000/0x3000.* uses bits 0x1000 of our mark 0x1040; choose two bits"),
    "mark taken in IPv6": (_mark_taken_in_ipv6, CANNOT, "ip -6 rule .*fwmark 0x40/0x40.* uses bits 0x40 of our mark"),
    "somebody's rule leads to our table": (_rule_to_our_table, CANNOT, r"lookup 15001.*; "),
    "somebody's routes in our table": (_table_taken, CANNOT, r"table 15001 already holds a route to 198\.51\.100\.0/24; choose another"),
    "preference taken": (_preference_taken, CANNOT, r"pref 101.*; "),
    "port taken": (_port_taken, FAILED, r"127\.0\.0\.1.*15001.*(taken|cannot be had).*`ss "),
    "port taken in IPv6": (_port_taken_in_ipv6, FAILED, r"::1.*15001.*(taken|cannot be had).*`ss "),
    "metrics port taken": (_metrics_port_taken, FAILED, "--metrics: 127.0.0.1:9090: Address already in use; give an address"),
    "metrics address of others": (_metrics_address_of_others, FAILED, "--metrics: 203.0.113.9:9090: .*; give an address"),
    "flow file in no folder": (_flows_in_no_folder, FAILED, "--flows: .*: No such file or directory; give a file"),
    "flow pipe that nobody reads": (_flows_to_a_pipe_that_nobody_reads, FAILED, "--flows: .*; give a file"),
    "state folder is a file": (_state_is_a_file, FAILED, "--state: .*; give a folder that can be written to"),
    "state folder cannot be made": (_state_not_to_be_made, FAILED, "--state: .*; give a folder that can be written to"),
    "no scope": (_scope_missing, WRONG, "--scope: nothing is in scope; give the pods' networks"),
    "a mask of one bit": (_mask_of_one_bit, WRONG, "has not two bits; give two"),
    "YAML that is none": (_syntax, WRONG, r"policy\.yaml:\d+"),
    "a value that is none": (_value, WRONG, r"policy\.yaml:\d+: spec\.rules\[0\]\.action: 'Alow' is not allowed.*did you mean Allow"),
    "a feature of later": (_feature, WRONG, r"spec\.rules\[0\]\.egress\.interface: needs feature .*leave it out"),
    "an empty file": (_empty_file, WRONG, r"policy\.yaml: is empty.*; make it readable or take it away"),
    "an unreadable file": (_unreadable, WRONG, r"dangling\.yaml: No such file or directory; make it readable or take it away"),
    "an empty folder": (_empty_folder, WRONG, "holds no manifest .*; write one"),
    "a worker user that is none": (_worker_user("nobody-of-that-name"), WRONG, "--worker-user nobody.*: there is no such user; name one"),
    "a worker user that is root": (_worker_user("0"), WRONG, "--worker-user 0: is root; name another user"),
    "no folder": (_missing_folder, WRONG, "'--policy': Directory .* does not exist"),
}  # fmt: skip
_told: dict[str, bool] = {}


@pytest.mark.parametrize("what", CASES)
def test_a_start_that_cannot_work_says_why_and_leaves_nothing(
    stage: Stage, tmp_path: Path, figure: Figure, what: str
) -> None:
    prepare, status, said = CASES[what]
    before = stage.left_behind()
    attempt = Try(stage, tmp_path / "state")
    with attempt.undo:
        prepare(attempt)
        done = attempt.run()
        words = " ".join(done.stderr.split())
        assert (done.returncode, bool(re.search(said, words)), "Traceback" in words) == (status, True, False), (
            done.stderr
        )
        assert done.stdout == ""
        assert (
            get(stage["a"], stage["web"].ipv4, 80, "other.example").end == "answered"
        )  # no rule of ours stands in the way
    assert stage.left_behind() == before
    _told[what] = True
    figure(
        "bad input at the start",
        f"{len(_told)} of {len(CASES)} refused with the promised status and cure, nothing left behind",
    )


@pytest.mark.parametrize("same", ["state folder", "table and port"])
def test_a_second_instance_is_refused_and_the_first_goes_on(
    stage: Stage, tmp_path: Path, figure: Figure, same: str
) -> None:
    with stage.run() as first:
        during = stage.left_behind()
        done = Try(stage, first.state if same == "state folder" else tmp_path / "state").run()
        assert done.returncode == FAILED
        if same == "state folder":
            assert re.search(
                r"--state: pellucid already runs with .*, as process \d+; stop it, or give another folder", done.stderr
            )
        else:
            assert "another pellucid owns the table pellucid in this network namespace; stop it" in done.stderr
        assert stage.left_behind() == during
        assert get(stage["a"], stage["web"].ipv4, 80, SITE).end == "answered"
        assert get(stage["a"], stage["web"].ipv4, 80, "other.example").end == "reset"
        assert first.running
    figure(f"second instance, same {same}", "refused; the first goes on")


def _rewrite(path: Path, text: str) -> Callable[[], object]:
    before = path.read_text()
    path.write_text(text)
    return lambda: path.write_text(before)


def _added(path: Path) -> Callable[[], object]:
    path.symlink_to("nowhere")
    return path.unlink


def _moved(folder: Path) -> Callable[[], object]:
    aside = folder.with_name("aside")
    aside.mkdir()
    names = os.listdir(folder)
    for name in names:
        (folder / name).rename(aside / name)

    def back() -> None:
        for name in names:
            (aside / name).rename(folder / name)

    return back


def _renamed(folder: Path) -> Callable[[], object]:
    aside = folder.with_name("renamed")
    folder.rename(aside)
    return lambda: aside.rename(folder)


BROKEN: dict[str, Callable[[Path], Callable[[], object]]] = {
    "a syntax error": lambda folder: _rewrite(folder / "policy.yaml", "kind: ["),
    "an unknown value": lambda folder: _rewrite(folder / "policy.yaml", RULES.replace("Block", "Blok")),
    "an empty file": lambda folder: _rewrite(folder / "policy.yaml", ""),
    "half a file": lambda folder: _rewrite(folder / "policy.yaml", RULES[: len(RULES) // 2]),
    "a file that cannot be read": lambda folder: _added(folder / "dangling.yaml"),
    "an empty folder": _moved,
    "no folder": _renamed,
    "another scope": lambda folder: _rewrite(
        folder / "installation.yaml", INSTALLATION.replace("10.244.1.0/24", "10.0.0.0/8")
    ),
}


def test_a_folder_that_goes_bad_while_running_changes_nothing_and_says_why(
    stage: Stage, tmp_path: Path, figure: Figure
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(stage.policy, folder)
    a, web = stage["a"], stage["web"]
    with stage.run(policy=folder) as instance:
        revision = read_status(str(instance.state)).revision
        for what, spoil in BROKEN.items():
            mend = spoil(folder)
            assert eventually(lambda: bool(read_status(str(instance.state)).problems)), what
            status = read_status(str(instance.state))
            assert status.revision == revision, what
            assert all(";" in problem or ". Cure" in problem or ": " in problem for problem in status.problems), (
                status.problems
            )
            assert get(a, web.ipv4, 80, SITE).end == "answered", what
            assert get(a, web.ipv4, 80, "other.example").end == "reset", what
            mend()
            assert eventually(lambda: not read_status(str(instance.state)).problems), what
        assert read_status(str(instance.state)).revision == revision
    figure(
        "bad policy while running", f"{len(BROKEN)} of {len(BROKEN)} refused as a whole, the good policy stays in force"
    )


def test_after_a_bad_start_the_last_good_policy_is_enforced(stage: Stage, tmp_path: Path) -> None:
    folder, state = tmp_path / "policy", tmp_path / "state"
    shutil.copytree(stage.policy, folder)
    with stage.run(policy=folder) as first:
        pass
    shutil.copytree(first.state, state)
    (folder / "policy.yaml").write_text("kind: [")
    log = (tmp_path / "log").open("wb")
    with log:
        child = stage.node.popen(stage.command(state=state, policy=folder), stderr=log)
        try:
            assert eventually(lambda: "ready: enforcing" in (tmp_path / "log").read_text(), PATIENCE_S)
            assert read_status(str(state)).source == "last-good"
            assert get(stage["a"], stage["web"].ipv4, 80, "other.example").end == "reset"
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE_S) == 0


def test_a_full_disk_costs_records_and_no_traffic(stage: Stage, tmp_path: Path, figure: Figure) -> None:
    """/dev/full takes no byte, as a full disk does."""
    with stage.run("--flows", "/dev/full") as instance:
        ends = [get(stage["a"], stage["web"].ipv4, 80, SITE).end for _ in range(50)]
        assert ends == ["answered"] * 50
        assert eventually(lambda: read_status(str(instance.state)).flows_dropped == 50)
        assert "No space left on device; records are lost until it can" in instance.log.read_text()
    figure("flow file on a full disk", "50 of 50 connections answered, 50 lost records counted")


def test_too_few_descriptors_cost_connections_and_not_the_policy(stage: Stage, tmp_path: Path) -> None:
    """A limit of 64 descriptors: what is beyond waits or is refused; nothing passes undecided, and all is well when it is over."""
    a, web = stage["a"], stage["web"]
    command = [sys.executable, "-c", _LIMITED, *stage.command("--workers", "1", state=tmp_path / "state")]
    with (tmp_path / "log").open("wb") as log:
        child = stage.node.popen(command, stderr=log)
        try:
            assert eventually(lambda: "ready: enforcing" in (tmp_path / "log").read_text(), PATIENCE_S), (
                tmp_path / "log"
            ).read_text()
            with ExitStack() as many:
                for _ in range(100):
                    with suppress(ConnectionResetError):  # a pod gets a part of the few that there can be
                        many.enter_context(a.connect(web.ipv4, 80))
            assert eventually(lambda: get(a, web.ipv4, 80, SITE).end == "answered")
            assert get(a, web.ipv4, 80, "other.example").end == "reset"
            assert child.poll() is None
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE_S) == 0


_LIMITED = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); os.execv(sys.argv[1], sys.argv[1:])"
