#!/usr/bin/env python3
"""Records migration streams of real QEMUs. See README.md.

usage: capture.py ENV.json [NAME...]

ENV.json is what `cargo xtask setup` writes: {"qemu": {VERSION: {"bin": ..., "data": ...}}}.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
MACHINE = "pc-i440fx-7.2"
UUID = "6f0d6d1e-3a57-4a0e-9d0c-0123456789ab"


def firmware(path):
    """A ROM of 64 KiB: the guest changes four bytes in each of 128 pages, over and over.

    It turns a bit of cr0 each time, for which TCG drops its translations: before 9.0 it would not
    notice the writes of later rounds otherwise.
    """
    code = bytes.fromhex(
        "fa"  # cli
        "0f20c0"  # again: mov eax, cr0
        "663500000100"  # xor eax, 0x10000
        "0f22c0"  # mov cr0, eax
        "b80010"  # mov ax, 0x1000
        "8ed8"  # next: mov ds, ax
        "ff061000"  # inc word [0x10]
        "8306000a07"  # add word [0xa00], 7
        "050001"  # add ax, 0x100: the next page
        "3d0090"  # cmp ax, 0x9000
        "72ed"  # jb next
        "ebdc"  # jmp again
    )
    rom = bytearray(64 << 10)
    rom[: len(code)] = code
    rom[0x1000:0x2000] = b"A page of its own. " * 215 + b"x" * 11
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea000000f0")  # jmp 0xf000:0
    path.write_bytes(rom)


class Qemu:
    def __init__(self, program, folder, name, *arguments, machine=MACHINE, paused=False):
        self.socket_path = folder / f"{name}.qmp"
        command = [program["bin"], "-L", program["data"], "-nodefaults", "-display", "none"]
        command += ["-accel", "tcg", "-machine", machine, "-bios", str(folder / "rom")]
        command += ["-qmp", f"unix:{self.socket_path},server=on,wait=off"]
        if not any(a == "-m" for a in arguments):
            command += ["-m", "16"]
        command += ["-S"] if paused else []
        self.child = subprocess.Popen(command + list(arguments), stdin=subprocess.DEVNULL)
        self.monitor = socket.socket(socket.AF_UNIX)
        for _ in range(1000):
            try:
                self.monitor.connect(str(self.socket_path))
                break
            except OSError:
                time.sleep(0.01)
        self.lines = self.monitor.makefile("r")
        self.lines.readline()
        self.execute("qmp_capabilities", enable=["oob"])
        if not paused and "-incoming" not in arguments:
            # All pages that the guest writes have been written once.
            time.sleep(0.3)

    def execute(self, command, **arguments):
        return self.send({"execute": command, "arguments": arguments})

    def send(self, message):
        message["id"] = 1
        self.monitor.sendall((json.dumps(message) + "\n").encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{message}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def capabilities(self, *names):
        states = [{"capability": name, "state": True} for name in names]
        self.execute("migrate-set-capabilities", capabilities=states)

    def parameters(self, **values):
        named = {name.replace("_", "-"): value for name, value in values.items()}
        self.execute("migrate-set-parameters", **named)

    def migrate(self, path, **more):
        self.execute("migrate", uri=f"unix:{path}", **more)

    def status(self):
        return self.execute("query-migrate").get("status")

    def wait(self, *wanted, seconds=30):
        until = time.time() + seconds
        while time.time() < until:
            status = self.status()
            if status in wanted:
                return status
            if status == "failed":
                raise RuntimeError(str(self.execute("query-migrate")))
            time.sleep(0.02)
        raise RuntimeError(f"still {self.status()}, not {wanted}")

    def end(self):
        self.child.kill()
        self.child.wait()


class Sink:
    """Takes what comes over each connection; writes nothing back."""

    def __init__(self, folder, name="sink"):
        self.path = folder / name
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        self.received = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            connection, _ = self.listener.accept()
            received = bytearray()
            self.received.append(received)
            threading.Thread(target=self.take, args=(connection, received), daemon=True).start()

    @staticmethod
    def take(connection, received):
        while piece := connection.recv(1 << 16):
            received += piece


class Proxy:
    """Carries each connection on to another socket, and keeps what went both ways."""

    def __init__(self, folder, to, name="proxy"):
        self.path = folder / name
        self.to = to
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        self.there, self.back, self.sockets = [], [], []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            source, _ = self.listener.accept()
            destination = socket.socket(socket.AF_UNIX)
            destination.connect(str(self.to))
            there, back = bytearray(), bytearray()
            self.there.append(there)
            self.back.append(back)
            self.sockets += [source, destination]
            for pair in ((source, destination, there), (destination, source, back)):
                threading.Thread(target=self.carry, args=pair, daemon=True).start()

    @staticmethod
    def carry(taken_from, given_to, kept):
        try:
            while piece := taken_from.recv(1 << 16):
                kept += piece
                given_to.sendall(piece)
        except OSError:
            pass
        try:
            given_to.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def cut(self):
        for one in self.sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def save(version, name, data):
    path = HERE / f"{version}-{name}"
    path.write_bytes(data)
    subprocess.run(["zstd", "-q", "-f", "--rm", "-19", str(path)], check=True)
    print(f"{path.name}: {len(data)} bytes, {path.with_name(path.name + '.zst').stat().st_size} packed")


def to_sink(program, folder, *arguments, capabilities=(), parameters=None, machine=MACHINE, paused=True):
    source = Qemu(program, folder, "source", *arguments, machine=machine, paused=paused)
    try:
        sink = Sink(folder)
        if capabilities:
            source.capabilities(*capabilities)
        if parameters:
            source.parameters(**parameters)
        source.migrate(sink.path)
        return source.wait("completed") and [bytes(r) for r in sink.received]
    finally:
        source.end()


def plain(version, program, folder):
    """Pre-copy; nothing comes back, QEMU closes at the end."""
    save(version, "plain", to_sink(program, folder)[0])


def no_description(version, program, folder):
    """Without the description of the device state at the end."""
    machine = MACHINE + ",suppress-vmdesc=on"
    save(version, "no-description", to_sink(program, folder, machine=machine)[0])


def ignore_shared(version, program, folder):
    """RAM in a shared file stays out; the UUID is to be checked."""
    backend = f"memory-backend-file,id=m0,size=16M,share=on,mem-path={folder}/ram"
    arguments = ["-object", backend, "-uuid", UUID]
    capabilities = ["x-ignore-shared", "validate-uuid"]
    machine = MACHINE + ",memory-backend=m0"
    data = to_sink(program, folder, *arguments, capabilities=capabilities, machine=machine)
    save(version, "ignore-shared", data[0])


def xbzrle(version, program, folder):
    """A guest that writes all the time, several rounds, pages as what changed in them."""
    source = Qemu(program, folder, "source")
    try:
        sink = Sink(folder)
        source.capabilities("xbzrle")
        source.parameters(max_bandwidth=2 << 20, downtime_limit=50, xbzrle_cache_size=32 << 20)
        source.migrate(sink.path)
        time.sleep(0.8)
        source.parameters(max_bandwidth=64 << 10, downtime_limit=1)
        time.sleep(0.5)
        source.parameters(max_bandwidth=1 << 30, downtime_limit=2000)
        source.wait("completed")
        save(version, "xbzrle", bytes(sink.received[0]))
    finally:
        source.end()


def pair(program, folder, capabilities, *arguments, machine=MACHINE, paused=False):
    destination = Qemu(program, folder, "destination", "-incoming", "defer", *arguments, machine=machine)
    source = Qemu(program, folder, "source", *arguments, machine=machine, paused=paused)
    for one in (source, destination):
        one.capabilities(*capabilities)
    arrival = folder / "arrival"
    destination.execute("migrate-incoming", uri=f"unix:{arrival}")
    return source, destination, Proxy(folder, arrival)


def return_path(version, program, folder):
    """Pre-copy with a return path (10.0: and with the acknowledgement of the switchover)."""
    capabilities = ["return-path"] + (["switchover-ack"] if version != "7.2" else [])
    source, destination, proxy = pair(program, folder, capabilities, paused=True)
    try:
        source.migrate(proxy.path)
        source.wait("completed")
        time.sleep(0.2)
        save(version, "return-path", bytes(proxy.there[0]))
        save(version, "return-path.back", bytes(proxy.back[0]))
    finally:
        source.end()
        destination.end()


def advised(version, program, folder):
    """Post-copy was announced, but the guest went over by pre-copy."""
    source, destination, proxy = pair(program, folder, ["postcopy-ram"], paused=True)
    try:
        source.migrate(proxy.path)
        source.wait("completed")
        time.sleep(0.2)
        save(version, "advised", bytes(proxy.there[0]))
        save(version, "advised.back", bytes(proxy.back[0]))
    finally:
        source.end()
        destination.end()


def postcopy(version, program, folder):
    """Post-copy of a guest that writes all the time."""
    source, destination, proxy = pair(program, folder, ["postcopy-ram"])
    try:
        source.parameters(max_bandwidth=1 << 20, downtime_limit=50, max_postcopy_bandwidth=2 << 20)
        source.migrate(proxy.path)
        time.sleep(0.4)
        source.execute("migrate-start-postcopy")
        source.wait("completed")
        time.sleep(0.2)
        save(version, "postcopy", bytes(proxy.there[0]))
        save(version, "postcopy.back", bytes(proxy.back[0]))
    finally:
        source.end()
        destination.end()


def recovery(version, program, folder):
    """Post-copy whose connection breaks; the second one goes on."""
    source, destination, proxy = pair(program, folder, ["postcopy-ram"])
    try:
        source.parameters(max_bandwidth=1 << 20, downtime_limit=50, max_postcopy_bandwidth=1 << 17)
        source.migrate(proxy.path)
        time.sleep(0.4)
        source.execute("migrate-start-postcopy")
        source.wait("postcopy-active")
        time.sleep(0.3)
        proxy.cut()
        source.wait("postcopy-paused")
        destination.wait("postcopy-paused")
        again = folder / "again"
        recover = {"exec-oob": "migrate-recover", "arguments": {"uri": f"unix:{again}"}}
        destination.send(recover)
        second = Proxy(folder, again, "second")
        source.parameters(max_postcopy_bandwidth=0)
        source.migrate(second.path, resume=True)
        source.wait("completed")
        time.sleep(0.2)
        save(version, "recovery", bytes(second.there[0]))
        save(version, "recovery.back", bytes(second.back[0]))
        save(version, "broken", bytes(proxy.there[0]))
    finally:
        source.end()
        destination.end()


def preempt(version, program, folder):
    """The first bytes of the channel that urgent pages take."""
    source, destination, proxy = pair(program, folder, ["postcopy-ram", "postcopy-preempt"])
    try:
        source.parameters(max_bandwidth=1 << 20, downtime_limit=50, max_postcopy_bandwidth=1 << 18)
        source.migrate(proxy.path)
        time.sleep(0.4)
        source.execute("migrate-start-postcopy")
        time.sleep(1)
        save(version, "preempt-channel", bytes(proxy.there[1])[:20000])
    finally:
        source.end()
        destination.end()


def multifd(version, program, folder):
    """The main stream and the first bytes of a channel of multifd."""
    destination = None
    try:
        machine = MACHINE if version == "7.2" else "pc-i440fx-10.0"
        source, destination, proxy = pair(program, folder, ["multifd"], machine=machine)
        for one in (source, destination):
            one.parameters(multifd_channels=1)
        source.migrate(proxy.path)
        source.wait("completed")
        time.sleep(0.2)
        streams = [bytes(there) for there in proxy.there]
        save(version, "multifd", next(s for s in streams if s[:4] == b"QEVM"))
        channel = next(s for s in streams if s[:4] == b"\x11\x22\x33\x44")
        save(version, "multifd-channel", channel[:40000])
    finally:
        source.end()
        if destination:
            destination.end()


def compress(version, program, folder):
    """Compressed pages, which QEMU knew before 9.1."""
    if version == "7.2":
        save(version, "compress", to_sink(program, folder, capabilities=["compress"])[0])


def huge_pages(version, program, folder):
    """The list of RAM blocks when post-copy was announced and a block has huge pages."""
    backend = "memory-backend-memfd,id=m0,size=16M,hugetlb=on,hugetlbsize=2M"
    machine = MACHINE + ",memory-backend=m0"
    source = Qemu(program, folder, "source", "-object", backend, machine=machine, paused=True)
    try:
        sink = Sink(folder)
        source.capabilities("postcopy-ram")
        source.migrate(sink.path)
        time.sleep(0.5)
        save(version, "huge-pages", bytes(sink.received[0])[:20000])
    finally:
        source.end()


def virtio_mem(version, program, folder):
    """virtio-mem tells early what is plugged; the machine type is of 10.0."""
    if version == "7.2":
        return
    arguments = ["-m", "16,maxmem=1G,slots=1", "-object", "memory-backend-ram,id=v0,size=128M"]
    arguments += ["-device", "virtio-mem-pci,memdev=v0,id=vm0,requested-size=0"]
    machine = "pc-i440fx-10.0"
    save(version, "virtio-mem", to_sink(program, folder, *arguments, machine=machine)[0])


ALL = [plain, no_description, ignore_shared, xbzrle, return_path, advised, postcopy, recovery]
ALL += [preempt, multifd, compress, huge_pages, virtio_mem]


def main():
    programs = json.loads(Path(sys.argv[1]).read_text())["qemu"]
    for version, program in programs.items():
        for capture in ALL:
            if len(sys.argv) > 2 and capture.__name__ not in sys.argv[2:]:
                continue
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                firmware(Path(folder) / "rom")
                try:
                    capture(version, program, Path(folder))
                except Exception as error:
                    print(f"{version} {capture.__name__}: {error!r}")


main()
