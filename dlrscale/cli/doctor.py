"""`dlrscale doctor`: what this machine and environment lack for a run, and how to mend it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dlrscale import engine, launcher, record, tracking
from dlrscale.errors import ConfigError

GIB, MIB = 1 << 30, 1 << 20
RANKS_TIMEOUT_S = 120
LOW_DISK_BYTES, LOW_SHM_BYTES, LOW_MEMORY_BYTES, LOW_FILES = 10 * GIB, 512 * MIB, 4 * GIB, 1024
ENVIRONMENT = re.compile(
    r"^(DS_|DEEPSPEED_|NCCL_|GLOO_|OMP_|MKL_|TORCH|PYTORCH|CUDA_|HIP_|ROCR_|HF_|TRANSFORMERS_|MLFLOW_|MASTER_|RANK$|"
    r"WORLD_SIZE$|LOCAL_RANK$|SLURM_JOB_NUM_NODES$|XDG_CACHE_HOME$|TMPDIR$|CXX$|CC$|LD_PRELOAD$|https?_proxy$|HTTPS?_PROXY$)"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """What a check found: `ok`, `warn` (a run may go, with a cost) or `FAIL` (it will not), and how to mend it."""

    level: str
    text: str
    mend: str = ""


Check = Callable[[], Iterator[Finding]]


def packages() -> Iterator[Finding]:
    """Python and each required package against the minimum that setup.cfg asks for."""
    from packaging.requirements import Requirement

    try:
        about = metadata.metadata("dlrscale")
        needed = [Requirement(text) for text in metadata.requires("dlrscale") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("warn", "dlrscale is not installed, but imported from a folder", "Run `pip install -e .` in it.")
        return
    wanted, here = about["Requires-Python"], platform.python_version()
    if wanted and not Requirement(f"python{wanted}").specifier.contains(here, prereleases=True):
        yield Finding("FAIL", f"Python {here}, and {wanted} is needed", "Make a virtual environment of a newer Python.")
    found = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        mend = f"pip install -c constraints.txt '{requirement}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{requirement.name} is not installed", mend)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding("FAIL", f"{requirement.name} {version}, and {requirement.specifier} is needed", mend)
        found.append(f"{requirement.name} {version}")
    yield Finding("ok", f"Python {here}, {', '.join(found)}")


def devices() -> Iterator[Finding]:
    """The build of torch, and the accelerators that a run would take."""
    import torch

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    text = f"torch {torch.__version__} ({build} build), runs go to: {engine.device_type()}"
    if engine.device_type() == "cpu":
        yield Finding("ok", f"{text} ({os.cpu_count()} cores)")
        if build != "CPU" and not torch.cuda.is_available():
            yield Finding(
                "warn",
                "torch has a GPU build, and no GPU is seen",
                "On a GPU machine look at the driver: `nvidia-smi`.",
            )
        return
    if engine.device_type() == "cuda" and not torch.cuda.is_available():
        yield Finding(
            "FAIL", f"{text}, but torch sees none", "Set DS_ACCELERATOR=cpu, or mend the driver: `nvidia-smi`."
        )
        return
    yield Finding("ok", f"{text}, {engine.device_count()} of them")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        used = free < 0.8 * total
        yield Finding("warn" if used else "ok", name, "Another process holds memory there." if used else "")


def launch_program() -> Iterator[Finding]:
    """DeepSpeed's launcher beside the interpreter."""
    program = launcher.deepspeed()
    if shutil.which(program):
        yield Finding("ok", f"DeepSpeed's launcher: {program}")
    else:
        yield Finding(
            "FAIL",
            "DeepSpeed's launcher is neither beside this Python nor on PATH",
            "pip install -c constraints.txt deepspeed",
        )


def ranks() -> Iterator[Finding]:
    """A start of ranks by the launcher that add up one number."""
    count = 2 if engine.device_type() == "cpu" else engine.device_count()
    line = [
        launcher.deepspeed(), "--no_local_rank", "--num_gpus", str(count), "--master_addr", "127.0.0.1",
        "--master_port", str(launcher.free_port()), str(Path(engine.__file__).with_name("hello.py")),
    ]  # fmt: skip
    env = launcher.environment(count)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(key, None)
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                line, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            yield Finding("FAIL", f"the launcher did not start ({error})", "pip install -c constraints.txt deepspeed")
            return
        try:
            process.wait(RANKS_TIMEOUT_S)
            why = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            why = f"no answer after {RANKS_TIMEOUT_S} s"
        finally:
            launcher.end_group(process)
        log.seek(0)
        said = log.read().decode(errors="replace")
    if f"ranks that answered: {count}" in said and process.returncode == 0:
        yield Finding("ok", f"{count} ranks started by the launcher answered in {time.monotonic() - start:.0f} s")
    else:
        tail = "\n".join(said.splitlines()[-12:])
        yield Finding(
            "FAIL", f"{count} ranks did not answer ({why}); the end of their output:\n{tail}", "See its last error."
        )


def compiling() -> Iterator[Finding]:
    """The C++ compiler, ninja, and DeepSpeed's CPU Adam."""
    needed = engine.device_type() != "cpu"
    what = "only optimizer offload on a GPU would use it; torch's AdamW does that work without"
    compiler = engine.compiler()
    if compiler is None:
        yield Finding(
            "warn" if needed else "ok", f"no C++ compiler; {what}", "Install g++ to have it." if needed else ""
        )
    else:
        yield Finding("ok", f"C++ compiler: {compiler}")
    if not shutil.which("ninja", path=launcher.environment(1)["PATH"]):
        yield Finding("warn" if needed else "ok", "no ninja, which builds it", "pip install ninja" if needed else "")
    if engine.device_type() == "cuda" and not engine.cuda_toolkit():
        yield Finding(
            "warn", f"no CUDA toolkit (nvcc) to build it with; {what}", "Install torch's own, or set CUDA_HOME."
        )
    library = engine.cpu_adam()
    if library.is_file():
        yield Finding("ok", f"DeepSpeed's CPU Adam is built: {library}")
    elif needed and compiler:
        text = "DeepSpeed's CPU Adam is not built: the first run with offload does it, 30 to 120 s"
        yield Finding("warn", text, "dlrscale doctor --build")
    else:
        yield Finding("ok", f"DeepSpeed's CPU Adam is not built; {what}")


def build() -> Iterator[Finding]:
    """Build the CPU Adam now."""
    if engine.compiler() is None:
        yield Finding(
            "FAIL", "no C++ compiler to build DeepSpeed's CPU Adam with", "Install g++, or leave --build out."
        )
        return
    os.environ["PATH"] = launcher.environment(1)["PATH"]  # ninja lies beside the interpreter
    with tempfile.TemporaryFile() as log:
        try:
            with _stdout_to(log):
                seconds = engine.build_cpu_adam()
        except Exception as error:  # torch's and DeepSpeed's own, whichever the compiler met
            log.seek(0)
            said = "\n".join((log.read().decode(errors="replace") + str(error)).splitlines()[-12:])
            yield Finding("FAIL", f"DeepSpeed's CPU Adam did not build:\n{said}", "See the compiler's first error.")
            return
    yield Finding("ok", f"DeepSpeed's CPU Adam was built or loaded in {seconds:.0f} s")


@contextlib.contextmanager
def _stdout_to(file) -> Iterator[None]:
    """Send what is written to stdout and stderr, by child processes too, into a file meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        for number, handle in enumerate(kept, 1):
            os.dup2(handle, number)
            os.close(handle)


def places() -> Iterator[Finding]:
    """Home, caches and the temporary folder: each is written to and cleaned again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    named = {
        "HOME": (os.path.expanduser("~"), "caches go to the temporary folder instead"),
        "cache": (cache, "set XDG_CACHE_HOME to a folder that you may write to"),
        "TORCH_EXTENSIONS_DIR": (str(engine.cpu_adam().parents[1]), "set TORCH_EXTENSIONS_DIR to such a folder"),
        "hub cache": (os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"), "set HF_HOME to such a folder"),
        "TMPDIR": (tempfile.gettempdir(), "set TMPDIR to such a folder"),
    }
    good = []
    for name, (folder, mend) in named.items():
        fault = unwritable(Path(folder))
        if fault:
            yield Finding("warn", f"{name} {folder} cannot be written ({fault})", mend[0].upper() + mend[1:] + ".")
        else:
            good.append(f"{name} {folder}")
    if "TMPDIR" in os.environ and not os.path.isdir(os.environ["TMPDIR"]):
        yield Finding("warn", f"TMPDIR {os.environ['TMPDIR']} does not exist", "Make it, or unset TMPDIR.")
    if good:
        yield Finding("ok", f"can be written: {', '.join(good)}")


def unwritable(folder: Path) -> str | None:
    """Why no file can be made in a folder, or in the nearest one above it that exists; None if one can."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def disk() -> Iterator[Finding]:
    """Room for results here, and shared memory."""
    here = Path.cwd()
    fault = unwritable(here / "results")
    if fault:
        yield Finding(
            "FAIL", f"results cannot be written below {here} ({fault})", "Give --out, or go to another folder."
        )
    free = shutil.disk_usage(here).free
    low = free < LOW_DISK_BYTES
    mend = "A checkpoint of full training holds 12 bytes per parameter and more; give --out on a larger disk."
    yield Finding("warn" if low else "ok", f"{free / GIB:.1f} GiB of disk free here", mend if low else "")
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        low = total < LOW_SHM_BYTES and engine.device_type() != "cpu"
        mend = "NCCL talks through it: start the container with --shm-size=8g or --ipc=host." if low else ""
        yield Finding("warn" if low else "ok", f"/dev/shm of {total / MIB:.0f} MiB", mend)


def limits() -> Iterator[Finding]:
    """Memory of this machine, container and shell; open files; threads."""
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory available"
    caps = {f"{name} {value / GIB:.1f} GiB": value for name, value in memory_limits() if value < memory.total}
    low = min([memory.available, *caps.values()]) < LOW_MEMORY_BYTES
    text += "".join(f", limited by {cap}" for cap in caps)
    yield Finding(
        "warn" if low else "ok", text, "Each rank alone takes 0.5 GiB and more; raise the limit." if low else ""
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < LOW_FILES
    yield Finding("warn" if few else "ok", f"{files} open files allowed", "ulimit -n 4096" if few else "")
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY:
        yield Finding("warn", f"no file may grow beyond {largest / GIB:.2f} GiB", "ulimit -f unlimited")
    if threads := os.environ.get("OMP_NUM_THREADS"):
        yield Finding("ok", f"OMP_NUM_THREADS={threads} for each rank; unset, the cores are shared out among the ranks")


def memory_limits() -> Iterator[tuple[str, int]]:
    """Limits on memory other than the machine's own, in bytes: the control group's and the shell's."""
    groups = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/") and line != "0::/":
                groups.append(f"/sys/fs/cgroup{line[3:]}/memory.max")
    for file in groups:
        with contextlib.suppress(OSError, ValueError):  # `max` is no number
            yield "control group", int(Path(file).read_text())
    for name, number in (("ulimit -v", resource.RLIMIT_AS), ("ulimit -d", resource.RLIMIT_DATA)):
        value = resource.getrlimit(number)[0]
        if value != resource.RLIM_INFINITY:
            yield name, value


def mlflow_store(uri: str | None) -> Iterator[Finding]:
    """The MLflow store of a run: a file that can be made or written, or a server that answers."""
    if uri == "none":
        yield Finding("ok", "MLflow is turned off (--tracking-uri none)")
        return
    try:
        place = tracking.resolve(uri)
    except ConfigError as error:
        yield Finding("FAIL", str(error))
        return
    away = "Runs go on without it, and a mirror can be rebuilt from their records."
    path = tracking.sqlite_path(place)
    if path is None:
        reason = tracking.silence(place) if place.startswith("http") else None
        if reason:
            yield Finding(
                "warn", f"no MLflow server answers at {tracking.shown(place)} ({reason})", f"Start it. {away}"
            )
        else:
            yield Finding("ok", f"MLflow store: {tracking.shown(place)}")
        return
    fault = unwritable(path.parent)
    if not fault and path.exists():
        fault = None if os.access(path, os.R_OK | os.W_OK) else "the file may not be written"
        if not fault and path.stat().st_size and path.open("rb").read(15) != b"SQLite format 3":
            fault = "it is no SQLite file"
    if fault:
        yield Finding(
            "warn", f"the MLflow store {path} does not work ({fault})", f"Give --tracking-uri another place. {away}"
        )
    else:
        yield Finding("ok", f"MLflow store: {path}{'' if path.exists() else ' (made by the first run)'}")


def network() -> Iterator[Finding]:
    """Loopback, where ranks of one machine meet, and what is said about being offline."""
    try:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        yield Finding("ok", "a port on 127.0.0.1 can be opened and reached")
    except OSError as error:
        yield Finding("FAIL", f"no port on 127.0.0.1 can be opened and reached ({error})",
                      "Ranks meet there: allow it in the firewall or sandbox.")  # fmt: skip
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)
    ]
    if offline:
        yield Finding("ok", f"{', '.join(offline)} set: models and data must be local folders or in the hub's cache")


def hosts(hostfile: str) -> Iterator[Finding]:
    """A DeepSpeed hostfile: its form, its names, and what reaches them."""
    try:
        slots = launcher.hostfile_slots(hostfile)
    except ConfigError as error:
        yield Finding("FAIL", str(error))
        return
    lines = [line.partition("#")[0].split() for line in Path(hostfile).read_text(encoding="utf-8").splitlines()]
    names = [words[0] for words in lines if words]
    yield Finding(
        "ok" if slots else "FAIL", f"hostfile: {len(names)} hosts, {slots} ranks", "" if slots else "Name a host."
    )
    for name in names:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            yield Finding("FAIL", f"host {name} has no address ({error})", "Mend the hostfile or the name service.")
    if not shutil.which("pdsh"):
        yield Finding(
            "FAIL", "pdsh is not on PATH; DeepSpeed starts other hosts by it", "Install pdsh (docs/cluster.md)."
        )


def examine(quick: bool, build_: bool, uri: str | None, hostfile: str | None) -> Iterator[tuple[str, Finding]]:
    """All checks, one after the other; one that itself fails is a finding too."""
    checks: dict[str, Check] = {
        "packages": packages, "devices": devices, "launcher": launch_program, "places": places, "disk": disk,
        "limits": limits, "network": network, "mlflow": lambda: mlflow_store(uri),
    }  # fmt: skip
    if hostfile:
        checks["hostfile"] = lambda: hosts(hostfile)
    if build_:
        checks["build"] = build
    checks["compiling"] = compiling
    if not quick:
        checks["ranks"] = ranks
    for name, check in checks.items():
        try:
            for finding in check():
                yield name, finding
        except Exception as error:
            yield (
                name,
                Finding(
                    "FAIL", f"the check broke: {type(error).__name__}: {error}", "Report it, with the block below."
                ),
            )


def bug_report() -> str:
    """What a bug report needs: versions, platform, device, environment and git state; no secret and no home path."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions().items())
    git = record.git_state()
    lines = [
        f"versions: {versions}",
        f"platform: {platform.platform()}, {os.cpu_count()} cores",
        f"device: {engine.device_type()} x {engine.device_count()}",
        f"git: {git['commit'] + (' with changes' if git['dirty'] else '') if git else 'no checkout'}",
    ]
    for name in sorted(os.environ):
        if ENVIRONMENT.match(name):
            value = "(set, not shown)" if SECRET.search(name) else tracking.shown(os.environ[name])
            lines.append(f"{name}={value}")
    return private("\n".join(lines))


def private(text: str) -> str:
    """A text in which homes are `~` and the current folder is `.`."""
    for folder, sign in ((str(Path.cwd()), "."), (os.path.expanduser("~"), "~")):
        if len(folder) > 1:
            text = re.sub(re.escape(folder) + r"(?=[/\s:;,)'\"]|$)", sign, text)
    return re.sub(r"(?<![\w.])/(?:home|Users)/[^/\s:]+|(?<![\w.])/root(?![\w.-])", "~", text)
